"""The primary is lost: a replica is promoted, others follow it, the old one comes back."""

import contextlib
import re
import shutil
import sqlite3
import time

import devpi_lite
import pytest
from harness import Server, blobs, documentation, eventually, patched, run_command, upload_docs, wheel
from replicas import comes_to_be, head, in_sync, primary_at, replica_at, rows, same, signed, status, unsound

# servers that ask again soon
SOON = """
devpi_lite.Limits.replica_pause = 0.2
devpi_lite.Limits.former_pause = 0.2
devpi_lite.Limits.log_wait = 1
"""


class Site:
    """A primary with an index, and replicas of it."""

    def __init__(self, folder, code=""):
        self.folder, self.script, self.servers = folder, patched(folder, SOON + code), []
        self.primary = self._kept(primary_at(folder / "p", script=self.script).start())
        self.primary.login("root")
        self.primary.add_user("ann")
        self.primary.add_index("ann/dev")
        self.secret = str(self.primary.directory / ".secret")

    def _kept(self, server):
        self.servers.append(server)
        return server

    def replica(self, name, of=None):
        server = replica_at(self.folder / name, of or self.primary, script=self.script, secret=self.secret)
        server.passwords.update(self.primary.passwords)
        return self._kept(server.start())

    def again(self, server, *options):
        """A server on the directory of another one, which has ended, started with these options."""
        new = Server(server.directory, "--secretfile", self.secret, *options, root_password=None, script=self.script)
        new.passwords.update(self.primary.passwords)
        return self._kept(new.start())

    def old(self):
        """The first primary as it was, at its port, after it has ended."""
        self.primary.start("--port", str(self.primary.port))
        return self.primary

    def close(self):
        for server in self.servers:
            if server.running:
                server.kill()


@pytest.fixture
def site(tmp_path):
    site = Site(tmp_path)
    yield site
    site.close()


def command(server, name, *words, **options):
    return run_command(name, *words, "--serverdir", server.directory, **options)


def done(result):
    assert (result.returncode, result.stderr) == (0, ""), result
    return result.stdout


def facts(server):
    with contextlib.closing(sqlite3.connect(server.directory / "devpi_lite.db")) as db:
        return dict(db.execute("SELECT key, value FROM node")), db.execute(
            "SELECT why, term, start_serial FROM history ORDER BY term").fetchall()


def fenced(server):
    """What the server says when it refuses an upload."""
    answer = eventually(lambda: (lambda answer: answer.status == 503 and answer)(
        server.upload("ann/dev", wheel("late", "1.%d" % time.time_ns()))))
    assert "Retry-After" in answer.headers
    return answer.text


def test_other_replicas_follow_a_promoted_one_without_a_snapshot(site):
    site.primary.upload("ann/dev", wheel("demo", "1.0"))
    first, second = site.replica("first"), site.replica("second")
    same(site.primary, first, second)
    assert "stop the server first" in command(first, "promote").stderr
    for server in (first, second):
        server.stop()
    site.primary.kill()
    done(command(first, "promote", "--force"))
    assert "is no replica: it is a primary" in command(first, "promote").stderr

    heir = site.again(first)
    follower = site.again(second, "--primary-url", heir.url)
    assert heir.upload("ann/dev", wheel("demo", "2.0")).status == 200
    assert follower.upload("ann/dev", wheel("demo", "3.0")).status == 200
    same(heir, follower)
    assert "snapshot" not in follower.output()
    assert status(follower)["primary-uuid"] == status(heir)["uuid"]
    for server in (heir, follower):
        node, history = facts(server)
        assert (node["term"], [row[:2] for row in history]) == ("2", [("init", 1), ("promote", 2)])
    assert status(heir)["term"] == 2 and status(heir)["fenced"] is None


def test_an_old_primary_that_comes_back_is_fenced_and_resync_heals_it(site):
    site.primary.upload("ann/dev", wheel("demo", "1.0"))
    first = site.replica("first")
    same(site.primary, first)
    first.stop()
    only_there = wheel("alone", "1.0", size=30000)
    site.primary.upload("ann/dev", only_there)
    site.primary.add_user("eve")
    site.primary.kill()
    done(command(first, "promote", "--force"))
    heir = site.again(first)
    heir.upload("ann/dev", wheel("demo", "2.0"))

    old = site.old()
    assert "term is 2, the one here 1" in fenced(old)
    assert old.fetch("ann/dev", only_there.filename, "alone") == only_there.content
    assert "takes no changes" in str(status(old)["messages"]) and status(old)["status"] == "fatal"
    assert old.get("/+health/ready", user=None).status == 503
    old.restart("--port", str(old.port))
    assert "term is 2" in fenced(old)

    assert "stop the server first" in command(old, "resync", "--primary-url", heir.url).stderr
    old.stop()
    told = command(old, "status")
    assert (told.returncode, "this primary takes no changes" in told.stdout) == (0, True), told
    assert "primary, term 1" in told.stdout
    refused = run_command("--serverdir", old.directory, "--primary-url", heir.url, "--port", "0")
    assert refused.returncode == 1 and "`resync`" in refused.stderr
    before = rows(old)
    listed = done(command(old, "resync", "--primary-url", heir.url, "--dry-run"))
    lines = listed.splitlines()
    assert "parted after serial" in lines[0]
    assert re.search(r"(?m)^ *\d+  20\S+Z  ann +file ann/dev/\S*/%s$" % re.escape(only_there.filename), listed), listed
    assert "user eve" in listed and "demo" not in listed.partition("\n")[2]
    assert rows(old) == before and not list(old.directory.glob("diverged-*"))

    said = done(command(old, "resync", "--primary-url", heir.url))
    (aside,) = old.directory.glob("diverged-*")
    assert str(aside) in said and listed in (aside / "changes.txt").read_text() + "\n"
    kept = {path.name for path in (aside / "files").rglob("*") if path.is_file()}
    assert only_there.sha256 in kept and wheel("demo", "1.0").sha256 not in kept
    with contextlib.closing(devpi_lite.open_rows(str(aside))) as db:
        assert [row["name"] for row in db.execute("SELECT name FROM users ORDER BY id")] == ["root", "ann", "eve"]
    healed = site.again(old, "--primary-url", heir.url)
    same(heir, healed)
    assert unsound(healed) == []
    for words in (("--serverdir", healed.directory), ("--url", healed.url)):
        told = " ".join(done(run_command("status", *words)).split())
        assert "replica of " + heir.url + ", term 2," in told and "0 changes behind, 0 files to fetch" in told
    assert healed.upload("ann/dev", wheel("demo", "4.0")).status == 200


def test_a_replica_does_not_follow_an_older_primary_ever(site):
    first, second = site.replica("first"), site.replica("second")
    same(site.primary, first, second)
    for server in (site.primary, first, second):
        server.stop()
    done(command(first, "promote", "--force"))
    heir = site.again(first)
    follower = site.again(second, "--primary-url", heir.url)
    same(heir, follower)
    follower.stop()
    heir.stop()
    old = site.old()
    lost = site.again(second, "--primary-url", old.url)
    assert "has been promoted (term 2)" in comes_to_be(lost, "diverged")["replication-trouble"]
    assert "a server has been promoted" in fenced(old)
    lost.stop()
    refused = command(lost, "resync", "--secretfile", site.secret)
    assert refused.returncode == 1 and "was the primary once" in refused.stderr
    # until it is told that it is the primary
    old.stop()
    refused = command(old, "promote")
    assert refused.returncode == 1 and "--force" in refused.stderr and "`resync`" in refused.stderr
    assert "term 3" in done(command(old, "promote", "--force"))
    old = site.old()
    assert old.upload("ann/dev", wheel("demo", "5.0")).status == 200
    same(old, site.again(lost, "--primary-url", old.url))
    # and the other one, which looks after its former primary, learns it
    assert "(its term is 3)" in fenced(site.again(heir))


def test_a_primary_that_lost_changes_takes_no_more_until_that_is_accepted(site):
    site.primary.upload("ann/dev", wheel("demo", "1.0"))
    replica = site.replica("r")
    same(site.primary, replica)
    done(run_command("backup", site.folder / "backup", "--serverdir", site.primary.directory))
    site.primary.upload("ann/dev", wheel("demo", "2.0"))
    same(site.primary, replica)
    replica.stop()
    site.primary.stop()
    shutil.rmtree(site.primary.directory)
    done(run_command("restore", site.folder / "backup", "--serverdir", site.primary.directory))
    node, history = facts(site.primary)
    assert node["term"] == "2" and history[-1][0] == "restore" and history[-1][2] == head(site.primary)[0]

    restored = site.old()
    replica = site.again(replica, "--primary-url", restored.url)
    trouble = comes_to_be(replica, "diverged")["replication-trouble"]
    assert "its last restore: at serial %d" % history[-1][2] in trouble
    assert status(replica)["uuid"] in fenced(restored)
    replica.stop()
    restored.stop()
    refused = command(restored, "promote")
    assert refused.returncode == 1 and "--accept-loss" in refused.stderr
    done(command(restored, "promote", "--accept-loss"))
    restored = site.old()
    replica = site.again(replica, "--primary-url", restored.url)
    comes_to_be(replica, "diverged")
    assert restored.upload("ann/dev", wheel("demo", "3.0")).status == 200
    replica.stop()
    assert "demo-2.0" in done(command(replica, "resync", "--secretfile", site.secret))
    same(restored, site.again(replica, "--primary-url", restored.url))


def test_a_promoted_replica_that_lagged_is_told_by_the_one_that_has_more(site):
    site.primary.upload("ann/dev", wheel("demo", "1.0"))
    slow, fast = site.replica("slow"), site.replica("fast")
    same(site.primary, slow, fast)
    slow.stop()
    site.primary.upload("ann/dev", wheel("demo", "2.0"))
    in_sync(site.primary, fast)
    fast.stop()
    site.primary.kill()
    done(command(slow, "promote", "--force"))
    heir = site.again(slow)
    follower = site.again(fast, "--primary-url", heir.url)
    comes_to_be(follower, "diverged")
    assert "never had" in fenced(heir)
    # so the other one is made the primary, and loses nothing
    heir.stop()
    follower.stop()
    done(command(follower, "promote", "--force"))
    best = site.again(follower)
    assert facts(follower)[0]["term"] == "2"
    assert best.upload("ann/dev", wheel("demo", "3.0")).status == 200


def test_a_promotion_is_refused_while_the_primary_is_there_or_was_just_now(site):
    replica = site.replica("r")
    same(site.primary, replica)
    replica.stop()
    refused = command(replica, "promote")
    assert refused.returncode == 1 and "is there: stop it first" in refused.stderr
    site.primary.stop()
    refused = command(replica, "promote")
    assert refused.returncode == 1 and "wait a minute" in refused.stderr and "--force" in refused.stderr
    with contextlib.closing(sqlite3.connect(replica.directory / "devpi_lite.db")) as db:
        db.execute("UPDATE node SET value = ? WHERE key = 'heard'", (str(time.time() - 61),))
        db.commit()
    done(command(replica, "promote"))


def test_a_promotion_that_loses_files_needs_to_be_told_so(site):
    archive = wheel("demo", "1.0", size=40000)
    site.primary.upload("ann/dev", archive)
    (blob,) = (site.primary.directory / "files").rglob(archive.sha256)
    blob.write_bytes(b"damaged")
    replica = site.replica("r")
    eventually(lambda: status(replica)["replication-errors"])
    replica.stop()
    site.primary.stop()
    refused = command(replica, "promote", "--force")
    assert refused.returncode == 1 and "lost with it: 1 file; --accept-loss" in refused.stderr
    assert "--accept-loss" in refused.stderr
    done(command(replica, "promote", "--force", "--accept-loss"))
    assert facts(replica)[0]["accepted_term"] == "2"
    sentence = "files that did not come from the former primary: 1"
    assert sentence in command(replica, "status").stdout
    heir = site.again(replica)
    assert status(heir)["status"] == "warn" and status(heir)["messages"] == [sentence]
    assert heir.upload("ann/dev", archive).status == 200
    heir.restart()
    assert status(heir)["messages"] == []


def test_a_promotion_looks_at_the_files_themselves(site):
    """What is fetched on demand alone is not wanted; what has come may be, after a crash."""
    site.primary.upload("ann/dev", wheel("demo", "1.0"))
    upload_docs(site.primary, "ann/dev", documentation("demo", "1.0"))
    site.primary.stop()
    site.old()
    skips = replica_at(site.folder / "skips", site.primary, "--file-replication-skip-indexes", "all",
                       script=site.script, secret=site.secret)
    site.servers.append(skips.start())
    whole = site.replica("whole")
    in_sync(site.primary, skips, whole)
    for server in (site.primary, skips, whole):
        server.stop()
    refused = command(skips, "promote", "--force")
    assert refused.returncode == 1 and "lost with it: 2 files" in refused.stderr
    done(command(skips, "promote", "--force", "--accept-loss"))
    assert "did not come from the former primary: 2" in command(skips, "status").stdout

    with contextlib.closing(sqlite3.connect(whole.directory / "devpi_lite.db")) as db:
        db.execute("INSERT INTO wanted (sha256, size, is_docs, serial, since) "
                   "SELECT sha256, size, kind = 'doczip', 1, 0 FROM files")
        for table in ("doc_members", "docs"):
            db.execute("DELETE FROM " + table)
        db.commit()
    done(command(whole, "promote", "--force"))
    heir = site.again(whole)
    assert status(heir)["messages"] == []
    assert heir.get("/ann/dev/demo/1.0/+doc/index.html", headers={"Accept": "*/*"}).status == 200


def test_resync_puts_back_what_a_power_cut_kept_from_the_disk(tmp_path):
    with contextlib.closing(Site(tmp_path, "devpi_lite.Limits.arrivals = 1e6")) as site:
        shared, only_there = wheel("demo", "1.0"), wheel("alone", "1.0")
        site.primary.upload("ann/dev", shared)
        first = site.replica("first")
        same(site.primary, first)
        first.stop()
        site.primary.upload("ann/dev", only_there)
        site.primary.kill()
        for path in blobs(site.primary).values():
            path.write_bytes(bytes(path.stat().st_size))
        done(command(first, "promote", "--force"))
        heir, old = site.again(first), site.primary

        done(command(old, "resync", "--primary-url", heir.url))
        (aside,) = old.directory.glob("diverged-*")
        kept, = (path for path in (aside / "files").rglob("*") if path.is_file())
        assert kept.read_bytes() == only_there.content
        healed = site.again(old, "--primary-url", heir.url)
        same(heir, healed)
        assert healed.fetch("ann/dev", shared.filename, "demo") == shared.content


def test_resync_of_a_replica_changes_nothing_when_the_primary_is_away(site):
    site.primary.upload("ann/dev", wheel("demo", "1.0"))
    replica = site.replica("r")
    same(site.primary, replica)
    replica.stop()
    before = rows(replica), head(replica)
    site.primary.stop()
    refused = command(replica, "resync", "--secretfile", site.secret)
    assert refused.returncode == 1 and "Connection refused" in refused.stderr
    for url in ("ftp://a", "http://user:word@a"):
        wrong = command(replica, "resync", "--secretfile", site.secret, "--primary-url", url)
        assert wrong.returncode == 2 and "--primary-url: it must be" in wrong.stderr, wrong
    assert (rows(replica), head(replica)) == before and not list(replica.directory.glob("diverged-*"))
    site.old()
    # also a second time within the same second
    for _ in range(2):
        said = done(command(replica, "resync", "--secretfile", site.secret))
        assert "all changes that are here" in said
    assert len(list(replica.directory.glob("diverged-*"))) == 2
    same(site.primary, site.again(replica, "--primary-url", site.primary.url))


def test_a_restored_replica_follows_on(site):
    site.primary.upload("ann/dev", wheel("demo", "1.0"))
    replica = site.replica("r")
    same(site.primary, replica)
    done(run_command("backup", site.folder / "backup", "--serverdir", replica.directory))
    site.primary.upload("ann/dev", wheel("demo", "2.0"))
    same(site.primary, replica)
    replica.stop()
    shutil.rmtree(replica.directory)
    done(run_command("restore", site.folder / "backup", "--serverdir", replica.directory))
    same(site.primary, site.again(replica, "--primary-url", site.primary.url))
    assert site.primary.upload("ann/dev", wheel("demo", "3.0")).status == 200
    assert status(site.primary)["term"] == 1


def test_each_beginning_is_in_the_history(site):
    site.primary.upload("ann/dev", wheel("demo", "1.0"))
    dump = site.folder / "dump"
    done(run_command("export", dump, "--serverdir", site.primary.directory))
    new = site.folder / "new"
    done(run_command("import", dump, "--serverdir", new))
    assert facts(Server(new))[1] == [("import", 1, -1)]
    site.primary.stop()
    last = head(site.primary)[0]
    assert site.primary.start().delete("/ann", user="root").status == 200
    site.primary.stop()
    assert run_command("import", dump, "--add", "--serverdir", site.primary.directory).returncode == 0
    assert facts(site.primary)[1] == [("init", 1, -1), ("import", 2, last + 1)]


def test_a_backup_that_is_tried_out_leaves_the_primary_alone(site):
    first = site.replica("first")
    same(site.primary, first)
    first.stop()
    site.primary.stop()
    done(command(first, "promote", "--force"))
    assert facts(first)[0]["former_url"] == site.primary.url
    done(run_command("backup", site.folder / "backup", "--serverdir", first.directory))
    done(run_command("restore", site.folder / "backup", "--serverdir", site.folder / "tried"))
    assert "former_url" not in facts(Server(site.folder / "tried"))[0]


@pytest.mark.parametrize("how", ["restore", "import"])
def test_a_primary_that_began_an_epoch_while_another_was_promoted_is_fenced(site, how):
    """Both have the same term then."""
    old = site.primary
    first, second = site.replica("first"), site.replica("second")
    same(old, first, second)
    dump = site.folder / "dump"
    done(run_command("backup" if how == "restore" else "export", dump, "--serverdir", old.directory))
    if how == "import":
        assert old.delete("/ann", user="root").status == 200
        same(old, first, second)
    for server in (first, second, old):
        server.stop()
    done(command(first, "promote", "--force"))
    if how == "restore":
        shutil.rmtree(old.directory)
        done(run_command("restore", dump, "--serverdir", old.directory))
    else:
        assert run_command("import", dump, "--add", "--serverdir", old.directory).returncode == 0
    assert facts(old)[0]["term"] == facts(first)[0]["term"] == "2"

    site.old()
    heir = site.again(first)
    follower = site.again(second, "--primary-url", heir.url)
    assert "term is 3" in eventually(lambda: status(old)["fenced"])
    assert heir.put("/zoe", {"password": "pw"}).status == 201
    assert old.put("/zoe", {"password": "pw"}).status == 503
    same(heir, follower)
    assert "snapshot" not in follower.output()
    assert (status(heir)["term"], status(heir)["fenced"]) == (3, None)
    assert [row[:2] for row in facts(follower)[1]] == [("init", 1), ("promote", 2), ("promote", 3)]


def test_resync_waits_for_those_who_read_the_database(site):
    replica = site.replica("r")
    same(site.primary, replica)
    replica.stop()
    before = head(replica)
    with contextlib.closing(sqlite3.connect(replica.directory / "devpi_lite.db", isolation_level=None)) as db:
        db.execute("BEGIN")
        db.execute("SELECT count(*) FROM node").fetchone()
        with contextlib.closing(sqlite3.connect(replica.directory / "devpi_lite.db")) as other:
            other.execute("INSERT OR REPLACE INTO node VALUES ('note', 'x')")
            other.commit()
        (site.folder / "other").mkdir()
        refused = command(replica, "resync", "--secretfile", site.secret,
                          script=patched(site.folder / "other", "devpi_lite.Limits.busy = 1"))
        assert refused.returncode == 1 and "another process reads" in refused.stderr
        db.execute("COMMIT")
    assert head(replica) == before and not list(replica.directory.glob("diverged-*"))
    done(command(replica, "resync", "--secretfile", site.secret))


def test_resync_knows_where_a_replica_parted_that_began_with_a_snapshot(site):
    """The entry of its snapshot is the first that the primary does not have: the one before is named in it."""
    site.primary.stop()
    shutil.copytree(site.primary.directory, site.folder / "copy")
    site.old()
    site.primary.upload("ann/dev", wheel("only-here", "1.0"))
    replica = site.replica("r")
    same(site.primary, replica)
    for server in (replica, site.primary):
        server.stop()
    shutil.rmtree(site.primary.directory)
    shutil.move(str(site.folder / "copy"), str(site.primary.directory))
    site.old().upload("ann/dev", wheel("other", "1.0"))
    said = done(command(replica, "resync", "--secretfile", site.secret, "--dry-run"))
    assert "parted after serial %d; 1 change here" % (head(site.primary)[0] - 1) in said, said
    assert "only_here" in said and "only the number is known" not in said


def test_a_primary_that_can_not_store_that_it_is_fenced_takes_no_changes_either(site, tmp_path):
    first = site.replica("first")
    same(site.primary, first)
    for server in (first, site.primary):
        server.stop()
    done(command(first, "promote", "--force"))
    heir = site.again(first)
    full = tmp_path / "full"
    full.touch()
    old = site.primary
    old.script = patched(tmp_path, SOON + """
import os
put = devpi_lite.Store.put_facts
def put_facts(db, facts):
    if facts.get("fenced") and os.path.exists(%r):
        raise devpi_lite.NoSpace("no room")
    put(db, facts)
devpi_lite.Store.put_facts = staticmethod(put_facts)
""" % str(full))
    old.start("--port", str(old.port))
    eventually(lambda: "was not stored" in old.output())
    assert "term is 2" in status(old)["fenced"] and status(old)["status"] == "fatal"
    assert old.get("/+health/ready", user=None).status == 503
    assert old.upload("ann/dev", wheel("late", "1.0")).status == 503
    assert "fenced" not in facts(old)[0]
    full.unlink()
    eventually(lambda: "fenced" in facts(old)[0])
    assert old.upload("ann/dev", wheel("late", "1.0")).status == 503
    assert old.output().count("takes no more changes: ") == 1
    assert heir.upload("ann/dev", wheel("demo", "2.0")).status == 200


def test_a_resync_that_breaks_off_changes_nothing(site, tmp_path):
    replica = site.replica("r")
    same(site.primary, replica)
    replica.stop()
    before = rows(replica)
    breaks = patched(tmp_path, """
import os
devpi_lite.sync_tree = lambda folder: os._exit(9)
""")
    words = "resync", "--secretfile", site.secret, "--serverdir", replica.directory
    assert run_command(*words, script=breaks).returncode == 9
    assert rows(replica) == before and not list(replica.directory.glob("diverged-*"))
    stopped = run_command(*words, script=patched(tmp_path, """
def stop(folder):
    raise KeyboardInterrupt
devpi_lite.sync_tree = stop
"""))
    assert stopped.returncode == 1 and "the resync was stopped" in stopped.stderr
    assert rows(replica) == before and not list(replica.directory.glob("diverged-*"))
    with contextlib.closing(sqlite3.connect(replica.directory / "devpi_lite.db")) as db:
        db.execute("INSERT INTO outbox (delivery, index_id, target, kind, url, headers, body, due) "
                   "VALUES ('d', 1, 't', 'webhook', 'u', '{}', x'', 0)")
        db.commit()
    assert "1 message to webhooks or Jenkins would not be sent" in done(run_command(*words))
    assert len(list(replica.directory.glob("diverged-*"))) == 1 and unsound(replica) == []


def test_a_replica_that_is_behind_the_snapshot_of_the_promoted_one_follows_it(site):
    behind = site.replica("behind")
    same(site.primary, behind)
    behind.stop()
    for number in range(5):
        site.primary.upload("ann/dev", wheel("demo", "1.%d" % number))
    late = site.replica("late")
    same(site.primary, late)
    late.stop()
    site.primary.stop()
    done(command(late, "promote", "--force"))
    heir = site.again(late)
    heir.upload("ann/dev", wheel("demo", "2.0"))
    follower = site.again(behind, "--primary-url", heir.url)
    same(heir, follower)
    assert status(heir)["fenced"] is None


def test_resync_ends_no_primary(site):
    """Neither a dry run nor a wrong URL, from a directory of a later term."""
    done(run_command("backup", site.folder / "backup", "--serverdir", site.primary.directory))
    done(run_command("restore", site.folder / "backup", "--serverdir", site.folder / "tried"))
    for more in (["--dry-run"], []):
        refused = run_command("resync", "--serverdir", site.folder / "tried", "--primary-url",
                              site.primary.url, *more)
        assert refused.returncode == 1 and "`promote` the latter first" in refused.stderr, refused
    assert site.primary.upload("ann/dev", wheel("demo", "1.0")).status == 200
    assert status(site.primary)["fenced"] is None


def test_a_replica_of_a_fenced_primary_says_so(site):
    replica = site.replica("r")
    same(site.primary, replica)
    site.primary.upload("ann/dev", wheel("demo", "1.0"))
    target = "/+repl/v1/history"
    site.primary.get(target, headers=signed(site.primary, target, term=2))
    assert "term is 2" in fenced(site.primary)
    eventually(lambda: "takes no changes any more" in (status(replica)["replication-trouble"] or ""))
    assert status(replica)["status"] == "fatal" and replica.get("/+health/ready", user=None).status == 503
    assert rows(replica) == rows(site.primary)


def test_a_replica_without_anything_is_not_read_and_takes_another_secret(site, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_text("0123456789abcdef" * 4)
    wrong.chmod(0o600)
    replica = replica_at(site.folder / "r", site.primary, script=site.script, secret=wrong).start()
    site.servers.append(replica)
    comes_to_be(replica, "unreachable")
    assert replica.get("/ann/dev/+simple/", user=None).status == 503
    assert replica.get("/ann/dev/", user=None).status == 503
    replica.stop()
    told = command(replica, "status", "--nagios")
    assert told.returncode == 2 and "nothing has come from the primary yet" in told.stdout, told
    same(site.primary, site.again(replica, "--primary-url", site.primary.url))
