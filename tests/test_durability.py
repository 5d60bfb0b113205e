"""Acknowledged means durable: SIGKILL in the middle of everything, lost and damaged blobs, a full disk."""

import contextlib
import hashlib
import os
import shutil
import sqlite3
import threading
import time

import pytest

from archives import documentation
from harness import blobs, user_pass, eventually, patched, path_of, sdist, submit, upload, upload_docs, wheel
from test_fsck import fsck

INDEX = "dur/stable"
WORKERS = 6


def prepare(server, volatile=False):
    server.add_user("dur")
    server.add_index(INDEX, volatile=volatile)
    server.login("dur", "pw")
    return server


def assert_no_temporary_files(server):
    folder = server.directory / "tmp"
    left = [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
    assert left == []


def assert_blobs_are_what_their_names_say(server):
    for name, path in blobs(server).items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == name


class Stream:
    """Workers that upload one archive after another until the server dies; `acknowledged` holds what was answered 200."""

    def __init__(self, server, round_number):
        self.server, self.round = server, round_number
        self.acknowledged, self.attempted, self.refused = [], [], []
        self.threads = [threading.Thread(target=self.run, args=(number,)) for number in range(WORKERS)]
        for thread in self.threads:
            thread.start()

    def run(self, worker):
        for count in range(10000):
            make = sdist if count % 3 == 0 else wheel
            archive = make("p%d" % (worker % 3), "%d.%d.%d" % (self.round, worker, count), size=(0, 3000, 300000)[count % 3])
            self.attempted.append(archive)
            try:
                reply = self.server.upload(INDEX, archive)
            except Exception:  # the server died under the request, in any of the ways a connection can end
                return
            if reply.status != 200:
                self.refused.append((archive.filename, reply.status, reply.reason))
                return
            self.acknowledged.append(archive)

    def join(self):
        for thread in self.threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self.threads)
        assert self.refused == []


def check_consistency(server, acknowledged, attempted):
    """All that was acknowledged is there byte for byte; what else is visible was attempted and is whole."""
    by_name = {archive.filename: archive for archive in attempted}
    visible = {}
    for project in server.get("/%s" % INDEX).result["projects"]:
        page = server.simple(INDEX, project)
        data = server.get("/%s/%s" % (INDEX, project)).result
        linked = [link["href"].rsplit("/", 1)[1] for version in data.values() for link in version.get("+links", ())]
        names = [entry["filename"] for entry in page["files"]]
        assert sorted(linked) == sorted(names) and len(set(names)) == len(names)
        assert set(page["versions"]) == set(data) == {by_name[name].version for name in names}
        visible.update((entry["filename"], entry) for entry in page["files"])
    assert {archive.filename for archive in acknowledged} <= set(visible) <= set(by_name)
    for filename, entry in visible.items():
        archive = by_name[filename]
        assert entry["hashes"] == {"sha256": archive.sha256} and entry["size"] == len(archive.content)
        reply = server.get(path_of(archive, INDEX), headers={"Accept": "*/*"})
        assert (reply.status, reply.body == archive.content) == (200, True)
        if filename.endswith(".whl"):
            assert server.get(path_of(archive, INDEX) + ".metadata", headers={"Accept": "*/*"}).body == archive.metadata
    return visible


def test_every_acknowledged_upload_survives_kill_9(make_server):
    server = prepare(make_server())
    acknowledged, attempted = [], []
    for number in range(3):
        stream = Stream(server, number)
        eventually(lambda: len(stream.acknowledged) >= 15 or stream.refused, seconds=60)
        time.sleep(0.013 * (number + 1))  # somewhere else in a commit each time
        server.kill()
        stream.join()
        assert len(stream.acknowledged) >= 15
        acknowledged += stream.acknowledged
        attempted += stream.attempted
        server.start()
        visible = check_consistency(server, acknowledged, attempted)
        assert_no_temporary_files(server)
        assert_blobs_are_what_their_names_say(server)
        assert len(visible) - len(acknowledged) <= WORKERS * (number + 1)
    serial = int(server.get("/+api").headers.get("X-DEVPI-SERIAL"))
    assert server.upload(INDEX, wheel("after", "1.0")).status == 200
    assert int(server.get("/+api").headers.get("X-DEVPI-SERIAL")) == serial + 1
    assert server.stop() == 0
    server.start()
    check_consistency(server, acknowledged, attempted + [wheel("after", "1.0")])


def test_an_upload_that_was_cut_off_can_simply_be_repeated(make_server):
    server = prepare(make_server())
    stream = Stream(server, 0)
    eventually(lambda: len(stream.acknowledged) >= 5 or stream.refused)
    server.kill()
    stream.join()
    server.start()
    cut_off = [archive for archive in stream.attempted if archive not in stream.acknowledged]
    assert cut_off
    for archive in cut_off:
        assert server.upload(INDEX, archive).status == 200
        assert server.get(path_of(archive, INDEX), headers={"Accept": "*/*"}).body == archive.content


# -- small files, which are synced after their upload is acknowledged


NEVER_SYNCS = "devpi_lite.Limits.arrivals = 1e6"


def arrivals(server):
    with contextlib.closing(sqlite3.connect(str(server.directory / "devpi_lite.db"))) as db:
        return [sha256 for sha256, in db.execute("SELECT sha256 FROM arrivals ORDER BY id")]


def small_files(server, count):
    """Wheels, just uploaded."""
    archives = [wheel("small", "1.%d" % number) for number in range(count)]
    for archive in archives:
        upload(server, INDEX, archive)
    return archives


def place_of(server, archive):
    return server.directory / "files" / archive.sha256[:2] / archive.sha256


def remove(path):
    path.unlink()


def shorten(path):
    path.write_bytes(b"")


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("power_cut, repair", ((remove, False), (shorten, True), (zero, False)))
def test_a_power_cut_takes_no_acknowledged_upload(make_server, tmp_path, power_cut, repair):
    server = prepare(make_server(script=patched(tmp_path, NEVER_SYNCS)))
    small, large = small_files(server, 6), wheel("large", "1.0", size=100000)
    upload(server, INDEX, large)
    assert arrivals(server) == [archive.sha256 for archive in small]
    server.kill()
    for archive in small[1:]:
        power_cut(blobs(server)[archive.sha256])

    found = fsck(server.directory, "--checksum", status=0)
    assert sum("the next start puts it there" in line for line in found) == 5
    mended = fsck(server.directory, "--checksum", "--repair", status=0) if repair else []
    assert sum("taken from the database" in line for line in mended) == 5 * repair
    server.start()
    assert_all_are_here(server, [*small, large])
    assert arrivals(server) == []


def test_small_files_are_synced_together_and_leave_the_database(make_server, tmp_path):
    server = prepare(make_server(script=patched(
        tmp_path, "devpi_lite.Limits.arrivals = 0.1; devpi_lite.Limits.arrivals_deleted = 2")))
    archives = small_files(server, 7)
    eventually(lambda: arrivals(server) == [])
    assert_all_are_here(server, archives)


def test_a_file_that_was_deleted_at_once_is_no_trouble(make_server, tmp_path):
    server = prepare(make_server(script=patched(tmp_path, NEVER_SYNCS)), volatile=True)
    gone, kept = wheel("gone", "1.0"), wheel("kept", "1.0")
    for archive in (gone, kept):
        assert server.upload(INDEX, archive).status == 200
    assert server.delete("/%s/gone" % INDEX, user="dur").status == 200
    blobs(server)[gone.sha256].unlink()
    assert server.stop() == 0
    assert arrivals(server) == []
    server.start()
    assert server.get(path_of(gone, INDEX)).status == 410
    assert_all_are_here(server, [kept])
    assert "were not synced" not in server.output()


@pytest.mark.parametrize("kind", ("file", "docs"))
def test_other_bytes_in_the_place_of_a_small_file_are_written_over(make_server, kind):
    server = prepare(make_server())
    archive = wheel("small", "1.0") if kind == "file" else documentation("small", "1.0")
    path = place_of(server, archive)
    path.write_bytes(bytes(len(archive.content)))
    if kind == "file":
        upload(server, INDEX, archive)
    else:
        submit(server, INDEX, "small", "1.0")
        upload_docs(server, INDEX, archive)
    assert path.read_bytes() == archive.content


def test_the_same_bytes_in_the_place_of_a_small_file_stay_and_are_young_again(make_server):
    server = prepare(make_server())
    server.add_index("dur/other")
    archive = wheel("small", "1.0")
    upload(server, INDEX, archive)
    path = place_of(server, archive)
    os.utime(path, (1e9, 1e9))
    before = path.stat()
    upload(server, "dur/other", archive)
    assert path.stat().st_ino == before.st_ino
    assert path.stat().st_mtime > time.time() - 60      # so that no sweep takes it before the commit


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("folder", ("files", "trash"))
def test_a_small_file_is_synced_in_its_place_and_so_is_its_name(make_server, tmp_path, folder):
    server = prepare(make_server(script=patched(tmp_path, NEVER_SYNCS + """
sync = devpi_lite.os.fsync
def fsync(fd):
    print("synced <%s>" % devpi_lite.os.readlink("/proc/self/fd/%d" % fd), flush=True)
    sync(fd)
devpi_lite.os.fsync = fsync
""")))
    archive = wheel("small", "1.0")
    upload(server, INDEX, archive)
    path = place_of(server, archive)
    assert str(path) not in server.whole_output()
    if folder == "trash":       # `gc --older-than 0s` came between the file and the commit
        (server.directory / "trash").mkdir(exist_ok=True)
        path.rename(server.directory / "trash" / archive.sha256)
    assert server.stop() == 0
    assert arrivals(server) == []
    for synced in (path, path.parent):
        assert "synced <%s>" % synced in server.output()


def test_what_comes_during_a_sync_stays_in_the_database_until_the_next(make_server, tmp_path):
    server = prepare(make_server(script=patched(tmp_path, """
devpi_lite.Limits.arrivals = 0.01
really, go = devpi_lite.sync_files, %r
def sync_files(*arguments):
    print("syncing", flush=True)
    while not devpi_lite.os.path.exists(go):
        devpi_lite.time.sleep(0.01)
    really(*arguments)
    devpi_lite.Limits.arrivals = 1e6
devpi_lite.sync_files = sync_files
""" % str(tmp_path / "go"))))
    first, second = wheel("small", "1.0"), wheel("small", "2.0")
    upload(server, INDEX, first)
    eventually(lambda: "syncing" in server.output())
    upload(server, INDEX, second)
    (tmp_path / "go").touch()
    eventually(lambda: first.sha256 not in arrivals(server))
    assert arrivals(server) == [second.sha256]


def test_the_end_of_the_server_waits_for_a_sync(make_server, tmp_path):
    server = prepare(make_server(script=patched(tmp_path, """
devpi_lite.Limits.arrivals = 0.01
calls, really, close_all = [], devpi_lite.sync_files, devpi_lite.App.close_all
def sync_files(*arguments):
    calls.append(arguments)
    print("syncing", flush=True)
    if len(calls) == 1:
        devpi_lite.time.sleep(0.2)
    really(*arguments)
def close_and_linger(app):
    close_all(app)
    devpi_lite.time.sleep(0.3)
devpi_lite.sync_files, devpi_lite.App.close_all = sync_files, close_and_linger
""")))
    upload(server, INDEX, wheel("small", "1.0"))
    eventually(lambda: "syncing" in server.output())
    assert server.stop() == 0
    assert "were not synced" not in server.output()


def test_after_a_failed_sync_the_files_are_written_anew(make_server, tmp_path):
    """Linux tells of a failed write once: the next sync says that all is well."""
    server = prepare(make_server(script=patched(tmp_path, """
devpi_lite.Limits.arrivals = devpi_lite.Limits.arrivals_retry = 0.05
really, mended = devpi_lite.sync_files, %r
def sync_files(*arguments):
    if not devpi_lite.os.path.exists(mended):
        raise OSError(5, "the disk is ill")
    really(*arguments)
devpi_lite.sync_files = sync_files
""" % str(tmp_path / "mended"))))
    archive = wheel("small", "1.0")
    upload(server, INDEX, archive)
    place_of(server, archive).write_bytes(b"lost")
    eventually(lambda: server.output().count("new files were not synced") > 1)
    assert "new files can't be synced" in server.get("/+status").text
    assert server.upload(INDEX, wheel("second", "1.0")).status == 200
    assert arrivals(server) == [archive.sha256]         # the second was synced at once
    (tmp_path / "mended").touch()
    eventually(lambda: arrivals(server) == [])
    assert_all_are_here(server, [archive])
    assert "new files can't be synced" not in server.get("/+status").text


def test_a_start_with_small_files_to_be_synced_does_not_need_room_on_the_disk(make_server, tmp_path):
    server = prepare(make_server(script=patched(tmp_path, NEVER_SYNCS)))
    archive = wheel("small", "1.0")
    upload(server, INDEX, archive)
    server.kill()
    server.script = patched(tmp_path, """
def put_aside(*arguments):
    raise devpi_lite.NoSpace("nothing was stored: the disk is full")
devpi_lite.Blobs.put_aside = put_aside
""")
    server.start()
    assert_all_are_here(server, [archive])
    assert arrivals(server) == [archive.sha256]


def test_on_read_only_media_small_files_are_left_as_they_are(make_server, tmp_path):
    server = prepare(make_server(script=patched(tmp_path, NEVER_SYNCS)))
    archive = wheel("small", "1.0")
    upload(server, INDEX, archive)
    server.kill()
    with contextlib.closing(sqlite3.connect(str(server.directory / "devpi_lite.db"))) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    server.script = patched(tmp_path, """
devpi_lite.is_read_only = lambda path: True
devpi_lite.sync_files = None        # there it would fail
""")
    server.start()
    assert_all_are_here(server, [archive])
    assert server.stop() == 0
    assert arrivals(server) == [archive.sha256]
    assert "were not synced" not in server.output()


def test_what_a_failed_sync_lost_is_written_again(make_server, tmp_path):
    """Linux counts pages as written that could not be written: the next sync succeeds, and they are read from memory
    until they are dropped."""
    server = prepare(make_server(script=patched(tmp_path, """
devpi_lite.Limits.arrivals = devpi_lite.Limits.arrivals_retry = 0.05
really, lost = devpi_lite.sync_files, []
def sync_files(paths, folder):
    if not lost:
        for path in paths:
            if devpi_lite.os.path.isfile(path):
                lost.append(path)
                open(path, "r+b").write(bytes(devpi_lite.os.path.getsize(path)))
        raise OSError(5, "the disk is ill")
    really(paths, folder)
devpi_lite.sync_files = sync_files
""")))
    archive = wheel("small", "1.0")
    assert server.upload(INDEX, archive).status == 200
    eventually(lambda: arrivals(server) == [])
    assert server.output().count("new files were not synced") == 1
    assert_all_are_here(server, [archive])


def test_a_file_that_goes_away_before_its_sync_is_put_there_again(make_server, tmp_path):
    server = prepare(make_server(script=patched(tmp_path, NEVER_SYNCS)))
    archives = small_files(server, 3)
    blobs(server)[archives[1].sha256].unlink()
    assert server.stop() == 0
    assert arrivals(server) == []
    server.start()
    assert_all_are_here(server, archives)


def test_a_file_that_can_not_be_put_in_its_place_stops_no_start(make_server, tmp_path):
    server = prepare(make_server(script=patched(tmp_path, NEVER_SYNCS)))
    archives = small_files(server, 3)
    server.kill()
    path = blobs(server)[archives[1].sha256]
    path.unlink()
    path.mkdir()
    server.start()
    assert_all_are_here(server, [archives[0], archives[2]])
    assert arrivals(server) == [archives[1].sha256]
    assert "new files can't be put into their places (1; one: " in server.output()
    assert server.stop() == 0
    assert arrivals(server) == [archives[1].sha256]
    assert any("taken from the database" in line for line in fsck(server.directory, "--repair", status=0))
    server.start()
    assert_all_are_here(server, archives)
    assert arrivals(server) == []


def test_what_can_not_be_written_again_at_a_start_is_later(make_server, tmp_path):
    """Neither the row of a file that a power cut filled with zeroes is dropped while the disk is full, nor others lost."""
    server = prepare(make_server(script=patched(tmp_path, NEVER_SYNCS)))
    archives = small_files(server, 3)
    server.kill()
    zero(blobs(server)[archives[1].sha256])

    server.script = patched(tmp_path, """
devpi_lite.Limits.arrivals = devpi_lite.Limits.arrivals_retry = 0.05
really, refused = devpi_lite.Blobs.put_aside, []
def put_aside(blobs, data):
    if b"small-1.1" in data and len(refused) < 3:
        refused.append(data)
        raise devpi_lite.NoSpace("nothing was stored: the disk is full")
    return really(blobs, data)
devpi_lite.Blobs.put_aside = put_aside
""")
    server.start()
    eventually(lambda: arrivals(server) == [])
    assert server.output().count("new files can't be put into their places (1; one: ") == 3
    assert_all_are_here(server, archives)


LISTS_SYNCS = NEVER_SYNCS + """
really = devpi_lite.sync_files
def sync_files(paths, folder):
    really(paths, folder)
    print("synced:", *paths, flush=True)
devpi_lite.sync_files = sync_files
devpi_lite.Releases._refuse_early = lambda *arguments: None        # as if both came at once
"""


def test_a_file_that_no_change_has_the_bytes_of_is_synced_at_once(make_server, tmp_path):
    server = prepare(make_server(script=patched(tmp_path, LISTS_SYNCS)))
    first, other = wheel("small", "1.0"), wheel("small", "1.0", size=100)
    assert server.upload(INDEX, first).status == 200
    assert "synced:" not in server.whole_output()

    assert server.upload(INDEX, other).status == 409
    assert "synced: %s" % blobs(server)[other.sha256] in server.whole_output()

    path = blobs(server)[first.sha256]
    path.unlink()
    assert server.upload(INDEX, first).status == 200
    assert "synced: %s" % path in server.whole_output()
    assert arrivals(server) == [first.sha256]
    assert_all_are_here(server, [first])


def test_what_a_power_cut_left_in_a_place_is_no_test_result(make_server):
    server = prepare(make_server())
    archive, result = wheel("small", "1.0"), b'{"testenvs": {}}'
    assert server.upload(INDEX, archive).status == 200
    digest = hashlib.sha256(result).hexdigest()
    path = server.directory / "files" / digest[:2] / digest
    path.write_bytes(bytes(len(result)))
    reply = server.request("POST", path_of(archive, INDEX), body=result, headers={"Content-Type": "application/json"},
                           user="dur")
    assert reply.status == 200
    assert path.read_bytes() == result


def test_a_half_sent_upload_leaves_nothing_after_kill_9(make_server):
    server = prepare(make_server())
    archive = wheel("half", "1.0", size=2000000)
    before = (set(blobs(server)), server.get("/+api").headers.get("X-DEVPI-SERIAL"))
    with server.connect() as connection:
        head = (
            "POST /%s/ HTTP/1.1\r\nHost: x\r\nAuthorization: Basic %s\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            "Content-Length: 3000000\r\n\r\n" % (INDEX, user_pass("dur", "pw"))).encode()
        body = b'--b\r\nContent-Disposition: form-data; name="content"; filename="%s"\r\n\r\n' % archive.filename.encode()
        connection.sendall(head + body + archive.content[:1500000])
        eventually(lambda: any(path.stat().st_size for path in (server.directory / "tmp").rglob("*") if path.is_file()))
        server.kill()
    server.start()
    assert_no_temporary_files(server)
    assert (set(blobs(server)), server.get("/+api").headers.get("X-DEVPI-SERIAL")) == before
    assert server.get("/%s" % INDEX).result["projects"] == []


def test_every_acknowledged_user_and_index_survives_kill_9(make_server):
    server = prepare(make_server())
    acknowledged, lock = [], threading.Lock()

    def run(worker):
        for count in range(1000):
            name = "u%d-%d" % (worker, count)
            try:
                if server.put("/" + name, {"password": "pw", "title": name}).status != 201:
                    return
                token = server.post("/+login", {"user": name, "password": "pw"}).result["password"]
                auth = user_pass(name, token)
                reply = server.put("/%s/dev" % name, {"bases": [INDEX]}, headers={"X-Devpi-Auth": auth})
            except Exception:  # the server died under the request
                return
            if reply.status == 200:
                with lock:
                    acknowledged.append(name)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(acknowledged) >= 12, seconds=60)
    server.kill()
    for thread in threads:
        thread.join(30)
    server.start()
    users = server.get("/").result
    for name in acknowledged:
        assert users[name]["title"] == name
        assert users[name]["indexes"]["dev"]["bases"] == [INDEX]
    for name, user in users.items():
        if name.startswith("u"):
            assert user["title"] == name and set(user["indexes"]) <= {"dev"}
    assert server.post("/+login", {"user": acknowledged[-1], "password": "pw"}).status == 200


def test_deletions_and_replacements_survive_kill_9(make_server):
    server = prepare(make_server(), volatile=True)
    gone, first, second = wheel("gone", "1.0"), wheel("kept", "1.0"), wheel("kept", "1.0", size=10)
    for archive in (gone, first, second):
        assert server.upload(INDEX, archive).status == 200
    assert server.delete("/%s/gone" % INDEX, user="dur").status == 200
    serial = server.get("/+api").headers.get("X-DEVPI-SERIAL")
    server.kill()
    server.start()
    assert server.get("/+api").headers.get("X-DEVPI-SERIAL") == serial
    assert server.get(path_of(gone, INDEX)).status == 410
    assert server.get(path_of(first, INDEX)).status == 410
    assert server.fetch(INDEX, second.filename, "kept") == second.content


def test_what_a_crash_left_in_the_directory_is_cleared_at_the_start(make_server):
    server = prepare(make_server())
    archive = wheel("kept", "1.0")
    server.upload(INDEX, archive)
    server.kill()
    (server.directory / "tmp").mkdir(exist_ok=True)
    (server.directory / "tmp" / "left-over").write_bytes(b"half a file")
    server.start()
    assert_no_temporary_files(server)
    assert server.fetch(INDEX, archive.filename, "kept") == archive.content


def test_caches_and_temporary_files_can_be_deleted_and_nothing_is_missing(make_server):
    server = prepare(make_server())
    archive = wheel("kept", "1.0")
    server.upload(INDEX, archive)
    before = server.get("/%s/kept" % INDEX).body
    url = server.url
    server.stop()
    for path in list(server.directory.iterdir()):
        if path.name in ("cache", "tmp"):
            shutil.rmtree(path)
        elif path.name in (".commits", "search.db"):
            path.unlink()
    server.start()
    assert server.get("/%s/kept" % INDEX).body == before.replace(url.encode(), server.url.encode())
    assert server.fetch(INDEX, archive.filename, "kept") == archive.content
    assert server.upload(INDEX, wheel("kept", "2.0")).status == 200


def test_a_missing_blob_is_never_answered_with_something_else(make_server):
    server = prepare(make_server())
    lost, kept = wheel("lost", "1.0"), wheel("kept", "1.0")
    for archive in (lost, kept):
        server.upload(INDEX, archive)
    server.stop()
    blobs(server)[lost.sha256].unlink()
    server.start()
    reply = server.get(path_of(lost, INDEX), headers={"Accept": "*/*"})
    assert reply.status == 404
    assert server.fetch(INDEX, kept.filename, "kept") == kept.content
    assert server.upload(INDEX, lost).status == 200
    assert server.get(path_of(kept, INDEX), headers={"Accept": "*/*"}).status == 200


@pytest.mark.parametrize("size", [1000, 600000])
def test_a_shortened_blob_is_never_taken_for_the_whole_file(make_server, size):
    server = prepare(make_server())
    archive, kept = wheel("short", "1.0", size=size), wheel("kept", "1.0")
    for each in (archive, kept):
        server.upload(INDEX, each)
    server.stop()
    path = blobs(server)[archive.sha256]
    path.chmod(0o600)
    path.write_bytes(archive.content[:len(archive.content) // 2])
    server.start()
    try:
        reply = server.get(path_of(archive, INDEX), headers={"Accept": "*/*"})
    except Exception:  # a connection that breaks before Content-Length is reached is an honest answer
        reply = None
    assert reply is None or reply.status in (404, 500, 502, 503)
    assert server.fetch(INDEX, kept.filename, "kept") == kept.content


# Runs the server with a limit on the size of any file it writes: past it a write fails, as on a full disk.
LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.argv[0] = %r
resource.setrlimit(resource.RLIMIT_FSIZE, (%d, %d))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_upload_that_does_not_fit_on_the_disk_is_refused_and_changes_nothing(make_server, tmp_path):
    limit = 3 << 20
    server = prepare(make_server())
    real = server.script
    small, big = wheel("fits", "1.0"), wheel("big", "1.0", size=2 * limit)
    assert server.upload(INDEX, small).status == 200
    server.stop()
    wrapper = tmp_path / "wrapped.py"
    wrapper.write_text(LIMITED % (str(real), limit, limit))
    server.script = wrapper
    server.start()
    before = (server.get("/+api").headers.get("X-DEVPI-SERIAL"), server.get("/%s" % INDEX).body, set(blobs(server)))
    reply = server.upload(INDEX, big)
    assert reply.status in (500, 503, 507)
    assert reply.reason and b"Traceback" not in reply.body
    assert (server.get("/+api").headers.get("X-DEVPI-SERIAL"), server.get("/%s" % INDEX).body, set(blobs(server))) == before
    assert_no_temporary_files(server)
    assert server.fetch(INDEX, small.filename, "fits") == small.content
    assert server.upload(INDEX, wheel("fits", "2.0")).status == 200
    server.stop()
    server.script = real
    server.start()
    assert server.upload(INDEX, big).status == 200
    assert server.fetch(INDEX, big.filename, "big") == big.content


# -- a database that does not belong to the files


CLEANS_OFTEN = "devpi_lite.Limits.cleaning = 0.05"


def released(server):
    """Archives uploaded to `server`, each older than the hour that a cleaning leaves alone."""
    archives = [wheel("kept", "1.%d" % number) for number in range(12)]
    for archive in archives:
        assert server.upload(INDEX, archive).status == 200
    for path in blobs(server).values():
        os.utime(path, (1e9, 1e9))
    return archives


def assert_all_are_here(server, archives):
    for archive in archives:
        assert server.get(path_of(archive, INDEX), headers={"Accept": "*/*"}).body == archive.content


@pytest.mark.parametrize("state", ("missing", "empty", "somebody else's"))
def test_a_server_does_not_start_as_a_new_one_over_files_whose_database_is_gone(make_server, tmp_path, state):
    server = prepare(make_server())
    archives = released(server)
    server.stop()
    database, aside = server.directory / "devpi_lite.db", tmp_path / "aside"
    os.replace(database, aside)
    if state == "empty":
        database.touch()
    elif state != "missing":
        with contextlib.closing(sqlite3.connect(str(database))) as db:
            db.execute("CREATE TABLE t (c)")
    with pytest.raises(AssertionError, match="fatal: .*restore"):
        server.start()
    with pytest.raises(AssertionError, match="fatal: .*restore"):
        server.start("--root-passwd", "secret")
    os.replace(aside, database)
    server.start()
    assert_all_are_here(server, archives)


def test_a_write_ahead_log_without_its_database_is_not_lost(make_server, tmp_path):
    server = prepare(make_server())
    archives = released(server)
    server.kill()
    database, aside = server.directory / "devpi_lite.db", tmp_path / "aside"
    shutil.rmtree(server.directory / "files")
    (server.directory / "files").mkdir()
    os.replace(database, aside)
    database.touch()
    with pytest.raises(AssertionError, match="fatal: .*is empty"):
        server.start()
    os.replace(aside, database)
    server.start()
    assert server.versions(INDEX, "kept") == [archive.version for archive in archives]


def test_an_older_database_and_then_the_newer_one_again_cost_no_file(make_server, tmp_path):
    server = prepare(make_server(script=patched(tmp_path, CLEANS_OFTEN)))
    server.stop()
    database = server.directory / "devpi_lite.db"
    shutil.copy(str(database), str(tmp_path / "older"))
    server.start()
    archives = released(server)
    server.stop()
    shutil.copy(str(database), str(tmp_path / "newer"))
    shutil.copy(str(tmp_path / "older"), str(database))
    server.start()
    eventually(lambda: not blobs(server))
    status = eventually(lambda: server.get("/+status").result["trash"]["files"] and server.get("/+status").result)
    assert status["trash"] == {"files": 12, "bytes": sum(len(archive.content) for archive in archives), "days": 7}
    assert status["status"] == "warn" and "older database" in status["messages"][0]
    server.stop()
    shutil.copy(str(tmp_path / "newer"), str(database))
    server.start()
    assert_all_are_here(server, archives)
    assert len(blobs(server)) == 12
