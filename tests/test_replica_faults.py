"""What goes wrong between a primary and its replicas: ends and starts of either, lines that break
or alter what they carry, servers that are not the primary, histories that part.

`DEVPI_LITE_ROUNDS=20` ends each server that often.
"""

import os
import random
import shutil
import threading
import time

import pytest

import replay
from harness import (
    Server, eventually, patched, path_of, run_command, serial, wheel)
from replicas import (
    ANY, SOON, Between, Fake, comes_to_be, head, in_sync, passed_on, primary_at, replica_at, rows, same,
    status, unsound, upload_demo)

ROUNDS = int(os.environ.get("DEVPI_LITE_ROUNDS", 0)) or 2


class Site:
    """A primary with a stage, what is between, and what the test starts more."""

    def __init__(self, folder):
        self.folder, self.more = folder, []
        self.script = patched(folder, SOON)
        self.primary = primary_at(folder / "p", "--keep-log", "10M").start()
        self.primary.login("root")
        self.primary.add_user("ann")
        self.primary.add_index("ann/dev")
        self.between = Between(self.primary.port)

    def replica(self, name="r", url=None, options=(), **keywords):
        """A replica behind `between`, started."""
        server = replica_at(self.folder / name, self.primary, *options,
                            url=url or self.between.url, script=self.script, **keywords)
        server.passwords.update(self.primary.passwords)
        self.more.append(server)
        return server.start()

    def keep_old_primary(self):
        """Puts a copy of the primary's directory aside."""
        self.primary.stop()
        shutil.copytree(self.primary.directory, self.folder / "old")
        self.primary_starts()

    def put_old_primary_back(self):
        """The primary, which is stopped then, is as it was."""
        self.primary.stop()
        shutil.rmtree(self.primary.directory)
        shutil.move(str(self.folder / "old"), str(self.primary.directory))

    def primary_starts(self):
        self.primary.start()
        self.between.target = self.primary.port
        self.between.is_open = True

    def upload(self, version, server=None, size=0):
        return upload_demo(server or self.primary, version, size)

    def end(self):
        for server in (*self.more, self.primary):
            if server.running:
                server.kill()
        self.between.close()


@pytest.fixture
def site(tmp_path):
    site = Site(tmp_path)
    yield site
    site.end()


# -- starts and ends


def test_a_new_replica_takes_a_snapshot_where_the_log_was_cut(site):
    first = site.upload("1.0")
    site.primary.restart("--keep-log", "1K")
    site.between.target = site.primary.port
    for number in range(2, 12):
        site.upload("%d.0" % number)
    assert replay.log_of(site.primary.directory)[0].serial > 1
    replica = site.replica()
    same(site.primary, replica)
    assert replica.fetch("ann/dev", first.filename, "demo") == first.content
    site.upload("20.0")
    same(site.primary, replica)

    replica.stop()      # and one that comes back when the log was cut past it
    was = serial(site.primary)
    for number in range(21, 33):
        site.upload("%d.0" % number)
    assert replay.log_of(site.primary.directory)[0].serial > was + 1
    replica.start()
    same(site.primary, replica)
    assert len(replica.simple("ann/dev", "demo")["files"]) == 24
    assert unsound(replica) == []


def test_both_start_again_and_go_on(site):
    replica = site.replica()
    in_sync(site.primary, replica)
    replica.stop()
    site.upload("1.0")
    assert replica.start()
    same(site.primary, replica)
    site.primary.stop()
    assert comes_to_be(replica, "unreachable")
    site.primary_starts()
    site.upload("2.0")
    same(site.primary, replica)
    uuid = status(replica)["uuid"]
    # what was chosen at first is kept
    bare = Server(replica.directory, "--secretfile", str(site.primary.directory / ".secret"),
                  root_password=None, script=site.script)
    site.more.append(bare)
    replica.stop()
    bare.start()
    assert (status(bare)["role"], status(bare)["uuid"]) == ("REPLICA", uuid)
    same(site.primary, bare)


@pytest.mark.parametrize("who", ["primary", "replica"])
def test_kill_9_under_uploads_loses_nothing(site, who):
    replica = site.replica()
    in_sync(site.primary, replica)
    dice, sent = random.Random(who), []
    for number in range(ROUNDS):
        done = threading.Event()

        def upload(number=number):
            for count in range(1000):
                archive = wheel("demo", "%d.%d" % (number, count), size=30000)
                try:
                    if site.primary.upload("ann/dev", archive).status == 200:
                        sent.append(archive)
                except OSError:
                    return
                if done.is_set():
                    return

        thread = threading.Thread(target=upload)
        thread.start()
        time.sleep(dice.uniform(0.05, 0.3))
        victim = site.primary if who == "primary" else replica
        victim.kill()
        done.set()
        thread.join()
        before = head(replica) if who == "replica" else None
        if who == "primary":
            site.primary_starts()
        else:
            replica.start()
            assert status(replica)["serial"] >= before[0]
        same(site.primary, replica)
        assert unsound(replica) == [] and unsound(site.primary) == []
    assert len(sent) >= ROUNDS
    there = set(replica.filenames("ann/dev", "demo"))
    assert [each.filename for each in sent if each.filename not in there] == []
    for archive in sent[-3:]:
        assert replica.fetch("ann/dev", archive.filename, "demo") == archive.content


# -- the primary away


def test_reads_go_on_and_changes_wait_while_the_primary_is_away(site):
    archive, absent = site.upload("1.0"), site.upload("2.0", size=40000)
    replica = site.replica(options=("--proxy-timeout", "2"))
    same(site.primary, replica)
    (blob,) = (replica.directory / "files").rglob(absent.sha256)
    replica.stop()
    blob.unlink()
    site.primary.stop()
    site.between.cut()
    replica.start()
    assert replica.get(path_of(archive, "ann/dev"), headers=ANY).body == archive.content
    assert len(replica.simple("ann/dev", "demo")["files"]) == 2
    missing = replica.get(path_of(absent, "ann/dev"), headers=ANY)
    assert missing.status == 503 and int(missing.headers["Retry-After"]) > 0, missing
    assert replica.post("/+login", {"user": "ann", "password": "pw"}).status == 200
    before = head(replica)
    for reply in (replica.upload("ann/dev", wheel("demo", "3.0")),
                  replica.put("/ann/new", {}, user="ann"),
                  replica.put("/eve", {"password": "x"}),
                  replica.delete("/ann/dev/demo", user="ann")):
        assert reply.status in (502, 503), reply        # a line that breaks may have sent it
        assert site.between.url in reply.json()["message"]
    assert head(replica) == before
    assert comes_to_be(replica, "unreachable")["serial"] == before[0]

    site.primary_starts()
    in_sync(site.primary, replica)
    assert replica.get(path_of(absent, "ann/dev"), headers=ANY).body == absent.content
    assert replica.upload("ann/dev", wheel("demo", "3.0")).status == 200
    same(site.primary, replica)


# -- a line that alters and breaks


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]


def test_what_the_line_alters_or_breaks_is_not_taken(site):
    """Snapshot, log and files: a byte altered, or the connection ended, here and there."""
    dice = random.Random(4)
    site.upload("1.0", size=100000)
    for number, (share, cuts) in enumerate([(0.5, False), (0.5, True), (0.9, False), (0.9, True)]):
        def change(data, sent, cuts=cuts):
            if len(data) < 30 or dice.random() > 0.7:
                return data
            at = min(len(data) - 1, int(len(data) * share))
            return None if cuts else flipped(data, at)

        site.between.change = change
        replica = site.replica("r%d" % number)
        eventually(lambda: site.between.changed > 1)
        for count in range(3):
            site.upload("%d.%d" % (number + 2, count), size=30000)
        time.sleep(0.25)
        own, theirs = head(replica), dict((each.serial, each.hash.hex().upper()) for each in
                                          replay.log_of(site.primary.directory))
        assert own[0] == -1 or theirs[own[0]] == own[1]
        assert [path for path in unsound(replica) if "/files/" in path] == []
        assert status(replica)["replication-state"] != "diverged"
        site.between.change = None
        same(site.primary, replica)
        assert unsound(replica) == []
        site.between.changed = 0
        replica.kill()


def test_a_damaged_file_of_the_primary_is_sent_to_nobody(site):
    archive, other = site.upload("1.0", size=20000), site.upload("2.0")
    (blob,) = (site.primary.directory / "files").rglob(archive.sha256)
    mode = blob.stat().st_mode
    blob.chmod(0o600)
    content = blob.read_bytes()
    blob.write_bytes(flipped(content, 10000))
    replica = site.replica()
    found = eventually(lambda: (lambda found: found["replication-errors"] and found)(status(replica)))
    (error,) = found["replication-errors"].values()
    assert archive.sha256 in error["url"] and error["message"]
    eventually(lambda: status(replica)["wanted"]["files"] == 1)
    assert replica.fetch("ann/dev", other.filename, "demo") == other.content
    assert replica.get(path_of(archive, "ann/dev"), headers=ANY).status in (500, 502, 503)
    assert unsound(replica) == []
    blob.write_bytes(content)
    blob.chmod(mode)
    same(site.primary, replica)
    assert status(replica)["replication-errors"] == {}
    assert replica.get(path_of(archive, "ann/dev"), headers=ANY).body == archive.content


# -- who is not the primary


def without_signature(status_, headers, body):
    return status_, {name: value for name, value in headers.items()
                     if name.lower() != "x-devpi-signature"}, body


def of_another(status_, headers, body):
    return status_, {**headers, "X-Devpi-Signature": "a" * 64}, body


def altered(status_, headers, body):
    return status_, headers, flipped(body, len(body) // 2) if body else body


def with_another_uuid(status_, headers, body):
    return status_, {**headers, "X-DEVPI-UUID": "b" * 32}, body


def later(status_, headers, body):
    return status_, {**headers, "X-Devpi-Head": "99999"}, body


def forked_off(status_, headers, body):
    return 409, headers, b'{"reason": "fork"}'


@pytest.mark.parametrize("change", [
    without_signature, of_another, altered, with_another_uuid, later, forked_off])
def test_a_fake_primary_is_not_believed(site, change):
    archive = site.upload("1.0")
    ask, is_honest = passed_on(site.primary), threading.Event()

    def answer(path, headers):
        reply = ask(path, headers)
        return reply if is_honest.is_set() else change(*reply)

    fake = Fake(answer)
    try:
        replica = site.replica(url=fake.url)        # from nothing: the snapshot
        assert comes_to_be(replica, "unreachable")["serial"] == -1
        assert head(replica) == (-1, "") and rows(replica)[1] == []
        assert replica.get("/ann").status in (404, 503) and archive.sha256 not in replay.blobs_of(
            replica.directory)
        is_honest.set()
        in_sync(site.primary, replica)
        is_honest.clear()                           # and from there: the log
        before = head(replica)
        site.upload("2.0")
        found = comes_to_be(replica, "unreachable", 25)
        assert head(replica) == before and found["primary-serial"] <= before[0], found
        is_honest.set()
        same(site.primary, replica)
    finally:
        fake.shutdown()
        fake.server_close()


def test_a_replica_with_another_secret_gets_nothing(site, tmp_path):
    site.upload("1.0")
    (tmp_path / "other").write_bytes(b"0123456789abcdef" * 4)
    (tmp_path / "other").chmod(0o600)
    replica = site.replica(secret=tmp_path / "other")
    found = comes_to_be(replica, "unreachable")
    assert found["serial"] == -1 and "secret" in found["replication-trouble"]
    assert rows(replica)[1] == []


# -- histories that part


def test_a_primary_that_went_back_in_time_is_not_followed_before_or_after_it_overtakes(site):
    site.upload("1.0")
    replica = site.replica()
    same(site.primary, replica)
    site.keep_old_primary()
    for number in range(2, 5):
        site.upload("%d.0" % number)
    same(site.primary, replica)
    before = head(replica)

    site.between.cut()
    site.put_old_primary_back()
    site.primary_starts()
    found = comes_to_be(replica, "diverged")
    assert found["replica-in-sync-at"] < time.time() and found["replication-trouble"]
    assert replica.fetch("ann/dev", wheel("demo", "4.0").filename, "demo")
    refused = site.primary.upload("ann/dev", wheel("demo", "10.0"))
    assert refused.status == 503 and "which this server never had" in refused.text

    replica.stop()
    site.primary.stop()
    accepted = run_command("promote", "--accept-loss", "--serverdir", site.primary.directory)
    assert accepted.returncode == 0, accepted
    site.primary_starts()
    for number in range(10, 18):
        site.upload("%d.0" % number)
    assert serial(site.primary) > before[0]
    replica.start()
    assert comes_to_be(replica, "diverged") and head(replica) == before
    assert replica.fetch("ann/dev", wheel("demo", "4.0").filename, "demo")
    site.upload("18.0")         # the loss is accepted


def test_a_primary_that_went_back_and_cut_its_log_is_not_followed_either(site):
    site.upload("1.0")
    replica = site.replica()
    same(site.primary, replica)
    site.keep_old_primary()
    lost = site.upload("2.0")
    same(site.primary, replica)
    replica.stop()
    before = head(replica)
    site.put_old_primary_back()
    site.primary.start("--keep-log", "1K")
    site.between.target = site.primary.port
    for number in range(10, 24):
        site.upload("%d.0" % number)
    assert replay.log_of(site.primary.directory)[0].serial > before[0] + 1
    replica.start()
    assert comes_to_be(replica, "diverged", 5) and head(replica) == before
    assert replica.fetch("ann/dev", lost.filename, "demo") == lost.content


def test_no_command_changes_rows_of_a_replica(site):
    site.upload("1.0")
    dump = site.folder / "dump"
    assert run_command("export", dump, "--serverdir", site.primary.directory).returncode == 0
    assert site.primary.delete("/ann", user="root").status == 200      # so that the dump fits
    replica = site.replica()
    same(site.primary, replica)
    replica.stop()
    before = rows(replica)
    for words in (("passwd", "root", "--stdin"), ("import", dump, "--add")):
        done = run_command(*words, "--serverdir", replica.directory, input="new-password\n")
        assert done.returncode == 1 and "this is a replica of" in done.stderr, done
    assert rows(replica) == before
    replica.start()
    same(site.primary, replica)
