"""Downloads: which requests count, how counts are kept, folded and forgotten, and who sees them."""

import contextlib
import datetime
import shutil
import sqlite3
import threading
import types

import pytest

import devpi_lite
from harness import (
    Server, documentation, eventually, patched, path_of, run_command, sdist, upload, upload_docs, wheel)
from replicas import primary_at, replica_at, same

QUICK = "devpi_lite.Limits.counts_pause = 0.05\n"
DEMO = wheel("demo", "1.0", size=2000)
ANY = {"Accept": "*/*"}


def filled(directory, code=QUICK, **keywords):
    """A server that writes its counts at once, with an index alice/dev that has the file DEMO."""
    server = Server(directory, script=patched(directory.parent, code), **keywords).start()
    server.add_user("alice")
    server.add_index("alice/dev", bases=[])
    upload(server, "alice/dev", DEMO)
    return server


@pytest.fixture
def here(tmp_path):
    server = filled(tmp_path / "server")
    yield server
    if server.running:
        server.kill()


def fetch(server, archive=DEMO, index="alice/dev", times=1, **options):
    for _ in range(times):
        reply = server.get(path_of(archive, index), headers=ANY, **options)
        assert (reply.status, reply.body) == (200, archive.content)


def counts(server, index="alice/dev", project="demo", **options):
    reply = server.get("/%s/%s/+downloads" % (index, project), **options)
    assert reply.status == 200, reply
    return reply.result


def eventually_total(server, total, **options):
    """The counts, when there are so many in all."""
    eventually(lambda: counts(server, **options)["total"] >= total)
    found = counts(server, **options)
    assert found["total"] == total
    return found


def today():
    return datetime.datetime.now(datetime.timezone.utc).date()


def rows(directory, sql, *values):
    with contextlib.closing(sqlite3.connect(str(directory / "downloads.db"))) as db, db:
        return db.execute(sql, values).fetchall()


# -- what counts


def test_downloads_are_counted_by_day_version_and_file(here):
    newer = [wheel("demo", "1.10"), sdist("demo", "1.10")]
    upload(here, "alice/dev", *newer)
    assert counts(here) == {"total": 0, "by_day": counts(here)["by_day"], "by_month": [],
                            "by_version": {}, "by_file": {}, "last_used": {}}
    fetch(here, times=3)
    for archive in newer:
        fetch(here, archive)
    found = eventually_total(here, 5)
    day = str(today())
    assert list(found["by_version"].items()) == [("1.10", 2), ("1.0", 3)]
    assert found["by_file"] == {DEMO.filename: 3, newer[0].filename: 1, newer[1].filename: 1}
    assert found["by_month"] == [[day[:7], 5]]
    assert found["last_used"] == dict.fromkeys(found["by_file"], day)
    days = [date for date, _ in found["by_day"]]
    assert len(days) == 30 and days[0] == str(today() - datetime.timedelta(29))
    assert [count for _, count in found["by_day"]] == [0] * 29 + [5]


def test_only_whole_distribution_files_count(here):
    path = path_of(DEMO, "alice/dev")
    docs = documentation("demo", "1.0")
    upload_docs(here, "alice/dev", docs)
    etag = here.request("HEAD", path, headers=ANY).headers["ETag"]
    for _ in range(3):      # from the second time on, the front responds
        assert here.request("HEAD", path, headers=ANY).status == 200
        assert here.get(path, headers=dict(ANY, **{"If-None-Match": etag})).status == 304
        assert here.get(path, headers=dict(ANY, Range="bytes=0-99")).status == 206
        assert here.get(path, headers=dict(ANY, Range="bytes=100-")).status == 206
        assert here.get(path, headers=dict(ANY, Range="bytes=9000-")).status == 416
        assert here.get(path + ".metadata", headers=ANY).status == 200
        assert here.get(path, headers={"Accept": "application/json"}).result["project"] == "demo"
        assert here.get(path_of(docs, "alice/dev"), headers=ANY).body == docs.content
        assert here.get("/alice/dev/demo/1.0/+doc/index.html").status == 200
    fetch(here)
    here.stop()
    here.start()
    assert counts(here)["by_file"] == {DEMO.filename: 1}


def test_what_many_fetch_at_once_is_counted_exactly(here):
    other = wheel("demo", "2.0", size=400000)       # a worker sends it each time
    upload(here, "alice/dev", other)
    crowd = [threading.Thread(target=fetch, args=(here, archive), kwargs={"times": 25})
             for archive in (DEMO, other) for _ in range(4)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert eventually_total(here, 200)["by_version"] == {"2.0": 100, "1.0": 100}


def test_files_of_a_mirror_count_at_the_mirror_from_the_first_on(here, upstream):
    archive = upstream.publish("pytest", "7.0")
    here.add_user("mia")
    here.add_mirror("mia/pypi", upstream)
    here.add_index("alice/top", bases=["mia/pypi"])
    for _ in range(3):      # the first time, it is sent as it comes
        assert here.fetch("alice/top", archive.filename, "pytest") == archive.content
    assert eventually_total(here, 3, index="mia/pypi", project="pytest")["by_version"] == {"7.0": 3}
    assert counts(here, "alice/top", "pytest") == counts(here, "mia/pypi", "pytest")
    assert rows(here.directory, "SELECT idx, project, version, last_used FROM sent_files") == [
        ("mia/pypi", "pytest", "7.0", str(today()))]


# -- who sees them


def test_counts_of_an_index_are_for_its_readers(here):
    here.add_user("bob")
    here.add_index("alice/secret", bases=[], acl_pkg_read=["alice"])
    here.add_index("alice/top", bases=["alice/secret", "alice/dev"])
    upload(here, "alice/secret", DEMO)
    fetch(here, times=2)
    fetch(here, index="alice/secret", user="alice", times=4)
    assert eventually_total(here, 4, index="alice/secret", user="alice")["by_version"] == {"1.0": 4}
    assert here.get("/alice/secret/demo/+downloads").status == 401
    assert here.get("/alice/secret/demo/+downloads", user="bob").status == 403
    assert counts(here, "alice/top")["total"] == counts(here, "alice/top", user="bob")["total"] == 2
    assert counts(here, "alice/top", user="alice")["total"] == 6


def test_a_project_that_is_not_there_has_no_counts(here):
    assert here.get("/alice/dev/nothing/+downloads").status == 404
    moved = here.get("/alice/dev/De_Mo/+downloads")
    assert (moved.status, moved.headers["Location"]) == (302, here.url + "/alice/dev/de-mo/+downloads")
    assert here.post("/alice/dev/demo/+downloads").status in (404, 405)


# -- how they are kept


def test_the_last_counts_are_written_when_the_server_stops(tmp_path):
    server = filled(tmp_path / "server", code="")
    fetch(server, times=7)
    assert counts(server)["total"] == 0
    assert server.stop() == 0
    server.start()
    assert counts(server)["by_version"] == {"1.0": 7}
    server.stop()
    assert sorted(path.name for path in server.directory.glob("downloads.db*")) == ["downloads.db"]


def test_days_are_folded_into_months(here):
    fetch(here)
    eventually_total(here, 1)
    here.stop()
    days = [today() - datetime.timedelta(back) for back in (29, 31, 32, 100)]
    for day in days:
        rows(here.directory, "INSERT INTO downloads SELECT id, ?, 10 FROM sent_files", str(day))
    here.script = patched(here.directory.parent, QUICK + "devpi_lite.Limits.cleaning = 0.1")
    here.start()
    eventually(lambda: rows(here.directory, "SELECT count(*) FROM downloads WHERE length(period) = 10") == [(2,)])
    months = {}
    for day, count in [(today(), 1), *((day, 10) for day in days)]:
        months[str(day)[:7]] = months.get(str(day)[:7], 0) + count
    found = counts(here)
    assert found["by_month"] == sorted(map(list, months.items()))
    assert found["total"] == 41
    assert found["by_day"][0] == [str(days[0]), 10] and sum(count for _, count in found["by_day"]) == 11


def test_a_deleted_file_is_forgotten(tmp_path):
    server = filled(tmp_path / "server", QUICK + "devpi_lite.Limits.cleaning = 0.1")
    newer = wheel("demo", "2.0")
    upload(server, "alice/dev", newer)
    fetch(server)
    fetch(server, newer)
    eventually_total(server, 2)
    assert server.delete("/alice/dev/demo/1.0", user="alice").status == 200
    eventually(lambda: counts(server)["by_version"] == {"2.0": 1})
    assert server.delete("/alice/dev", user="alice").status in (200, 201)
    eventually(lambda: rows(server.directory, "SELECT * FROM sent_files, downloads") == [])
    server.kill()


def test_a_damaged_database_is_put_aside(here):
    fetch(here)
    eventually_total(here, 1)
    here.stop()
    (here.directory / "downloads.db").write_bytes(b"no database " * 500)
    here.start()
    fetch(here)
    eventually_total(here, 1)
    assert (here.directory / "downloads.db.damaged").read_bytes().startswith(b"no database")
    assert "the counts of downloads begin anew" in here.output()


def test_read_only_media_show_counts_and_take_none(here, tmp_path):
    fetch(here, times=2)
    eventually_total(here, 2)
    here.stop()
    kept = (here.directory / "downloads.db").read_bytes()
    read_only = "devpi_lite.is_read_only = lambda path: True\n"
    here.script = patched(tmp_path, QUICK + read_only)
    here.start()
    fetch(here, times=3)
    assert here.stop() == 0
    assert (here.directory / "downloads.db").read_bytes() == kept
    here.start()
    assert counts(here)["total"] == 2


# -- the part itself


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """A `Downloads` without a server."""
    store = types.SimpleNamespace(read_only=False, closed=False)
    made = devpi_lite.Downloads(store, types.SimpleNamespace(serverdir=str(tmp_path)))
    yield made
    made.close()


def file(number, index="alice/dev", project="demo"):
    return devpi_lite.SentFile(index, project, "demo-%d.tar.gz" % number, str(number))


def test_memory_is_bounded_and_fills_early(downloads, monkeypatch):
    monkeypatch.setattr(devpi_lite.Limits, "counted_files", 10)
    for number in range(5):
        downloads.add(file(number))
    assert not downloads.full.is_set()
    for number in range(5, 30):
        downloads.add(file(number))
    assert downloads.full.is_set() and len(downloads.counts) == 10
    downloads.add(file(3))
    downloads.write()
    assert downloads.of_project(["alice/dev"], "demo") == {
        str(number): 1 + (number == 3) for number in reversed(range(10))}


def test_counts_that_can_not_be_written_are_kept(downloads):
    downloads.add(file(1))
    downloads.db.execute("ALTER TABLE downloads RENAME TO away")
    downloads.write()
    downloads.add(file(1))
    assert [complaint.level for complaint in downloads.complaints()] == ["warn"]
    downloads.db.execute("ALTER TABLE away RENAME TO downloads")
    downloads.write()
    assert list(downloads.complaints()) == []
    assert downloads.of_project(["alice/dev"], "demo") == {"1": 2}


def test_deleted_files_are_looked_for_in_some_projects_at_a_time(downloads, monkeypatch):
    monkeypatch.setattr(devpi_lite.Limits, "tidied_projects", 2)
    looked_at = []
    monkeypatch.setattr(downloads, "_forget_deleted", lambda *place: looked_at.append(place))
    places = [("a/b", "demo"), ("a/c", "demo"), ("a/b", "other"), ("a/b", "third"), ("a/a", "third")]
    for index, project in places:
        downloads.add(file(1, index, project))
        downloads.add(file(2, index, project))
    downloads.write()
    for _ in range(3):
        downloads.tidy()
    assert sorted(looked_at) == sorted(places), "each once"
    downloads.tidy()
    assert looked_at[5:] == looked_at[:2], "then from the first one on"


def test_indexes_and_projects_are_told_apart(downloads):
    for index, project, times in [("a/b", "demo", 1), ("a/c", "demo", 2), ("a/b", "other", 4)]:
        for _ in range(times):
            downloads.add_ready(file(1, index, project))
    downloads.take_from_front()
    downloads.write()
    assert downloads.of_project(["a/b"], "demo") == {"1": 1}
    assert downloads.of_project(["a/b", "a/c"], "demo") == {"1": 3}
    assert downloads.of_project([], "demo") == {}
    assert downloads.of_files(["a/b"], "other") == [("demo-1.tar.gz", "1", 4, str(today()))]
    assert downloads.by_day(["a/b", "a/c"], "demo", 2)[1] == (str(today()), 3)
    assert downloads.last_used("a/c", "demo") == {"demo-1.tar.gz": str(today())}


# -- other servers and copies


def test_a_backup_has_the_counts(here, tmp_path):
    fetch(here, times=3)
    eventually_total(here, 3)
    assert run_command("backup", tmp_path / "backups", "--serverdir", here.directory).returncode == 0
    assert run_command("backup", "verify", tmp_path / "backups").returncode == 0
    done = run_command("restore", tmp_path / "backups", "--serverdir", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    restored = Server(tmp_path / "new").start()
    try:
        assert counts(restored)["by_version"] == {"1.0": 3}
    finally:
        restored.kill()


def test_damaged_counts_do_not_stop_a_backup(here, tmp_path):
    here.stop()
    (here.directory / "downloads.db").write_bytes(b"no database " * 500)
    done = run_command("backup", tmp_path / "backups", "--serverdir", here.directory)
    assert done.returncode == 0 and "without the counts of downloads" in done.stderr
    shutil.rmtree(str(here.directory))
    assert run_command("restore", tmp_path / "backups", "--serverdir", here.directory).returncode == 0
    here.start()
    fetch(here)
    eventually_total(here, 1)


def test_a_replica_counts_what_it_sends_itself(tmp_path, upstream):
    archive = upstream.publish("pytest", "7.0")
    script = patched(tmp_path, QUICK)
    with contextlib.ExitStack() as stack:
        primary = primary_at(tmp_path / "p", script=script).start()
        stack.callback(primary.kill)
        primary.login("root")
        primary.add_user("alice")
        primary.add_index("alice/dev", bases=[])
        primary.add_mirror("alice/pypi", upstream)
        upload(primary, "alice/dev", DEMO)
        replica = replica_at(tmp_path / "r", primary, script=script).start()
        stack.callback(replica.kill)
        same(primary, replica)

        fetch(primary)
        fetch(replica, times=2)
        assert replica.fetch("alice/pypi", archive.filename, "pytest") == archive.content
        eventually_total(replica, 2)
        eventually_total(replica, 1, index="alice/pypi", project="pytest")
        eventually_total(primary, 1)
        primary.stop()
        assert rows(primary.directory, "SELECT filename FROM sent_files") == [(DEMO.filename,)]
