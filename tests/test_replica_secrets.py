"""The secret of a primary and its replicas: how it is changed, kept, and told to nobody; and what
who does not have it, or misuses it, can do."""

import contextlib
import sqlite3
import threading
import time

import pytest

import devpi_lite
from harness import Server, eventually, patched, run_command, serial, wheel
from replicas import comes_to_be, in_sync, primary_at, replica_at, same, signed, status

OLD, NEW = b"0123456789abcdefghijklmnopqrstuvwxyz", b"the-newer-one-of-the-two-0123456789"
LOG = "/+repl/v1/log?after=-1&hash=&wait=0"
# a replica that asks again soon
SOON = """
devpi_lite.Limits.replica_pause = 0.2
devpi_lite.Limits.log_wait = 1
"""


def secret_file(path, *secrets):
    path.write_bytes(b"\n".join(secrets) + b"\n")
    path.chmod(0o600)
    return path


def facts(server):
    """The facts in the directory about the server."""
    with contextlib.closing(sqlite3.connect(server.directory / "devpi_lite.db")) as db:
        return dict(db.execute("SELECT key, value FROM node"))


def refusal(*words):
    """What a start says that ends at once; for servers that should not start."""
    done = run_command(*words, "--port", "0", timeout=20)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done
    return done.stderr


class Two:
    """A primary and a replica, each with a secret file of its own."""

    def __init__(self, folder):
        self.files = [secret_file(folder / name, OLD) for name in ("ps", "rs")]
        script = patched(folder, SOON)
        self.primary = primary_at(folder / "p", "--secretfile", self.files[0], script=script).start()
        self.replica = replica_at(folder / "r", self.primary, secret=self.files[1], script=script)
        self.replica.passwords = self.primary.passwords
        self.primary.add_user("ann")
        self.primary.add_index("ann/dev")
        # the replica finds it there again
        self.primary.options += ("--port", self.primary.port)
        self.replica.start()

    def is_whole(self, version):
        """A change comes to the replica, and one through it to the primary."""
        self.primary.upload("ann/dev", wheel("demo", version))
        same(self.primary, self.replica)
        through = self.replica.upload("ann/dev", wheel("demo", version + ".1"))
        assert through.status == 200, through
        same(self.primary, self.replica)

    def end(self):
        for server in (self.replica, self.primary):
            if server.running:
                server.kill()


@pytest.fixture
def two(tmp_path):
    two = Two(tmp_path)
    yield two
    two.end()


def good_at(token, *servers):
    """Whether the servers accept the session token of ann."""
    for server in servers:
        server.tokens["ann"] = token
    return [server.get("/+api", user="ann").result["authstatus"][0] == "ok" for server in servers]


# -- a new secret


def test_a_secret_is_changed_without_a_pause(two):
    """Files are replaced, servers start again, one after the other; in between all goes on."""
    primary, replica = two.primary, two.replica
    two.is_whole("1.0")
    by_old = primary.login("ann")

    secret_file(two.files[0], NEW, OLD)
    primary.restart()
    two.is_whole("2.0")
    assert good_at(by_old, primary, replica) == [True, True]
    there = replica.login("ann")        # signed by the old secret still
    assert good_at(there, primary, replica) == [True, True]

    secret_file(two.files[1], NEW, OLD)
    replica.restart()
    two.is_whole("3.0")
    by_new = primary.login("ann")
    for token in (by_old, there, by_new, replica.login("ann")):
        assert good_at(token, primary, replica) == [True, True]

    secret_file(two.files[0], NEW)
    primary.restart()
    two.is_whole("4.0")
    assert good_at(by_new, primary, replica) == [True, True]
    assert good_at(by_old, primary, replica) == [False, True]
    assert primary.get(LOG, headers=signed(primary, LOG, secret=OLD)).status == 401
    assert primary.get(LOG, headers=signed(primary, LOG, secret=NEW)).status == 409

    secret_file(two.files[1], NEW)
    replica.restart()
    two.is_whole("5.0")
    assert good_at(by_old, primary, replica) == [False, False]


def test_with_two_secrets_each_request_is_answered_by_its_own(two):
    secret_file(two.files[0], NEW, OLD)
    two.primary.restart()
    for secret, status_ in ((OLD, 409), (NEW, 409), (OLD[::-1], 401)):
        assert two.primary.get(LOG, headers=signed(two.primary, LOG, secret=secret)).status == status_
    in_sync(two.primary, two.replica)


@pytest.mark.parametrize("lines, said", [
    ((NEW, OLD, b"a-third-one-0123456789-0123456789-0123"), "3 lines"),
    ((NEW, b"short"), "line 2"), ((b"short", NEW), "line 1"), ((NEW, b"ab" * 20), "line 2"),
    ((b"", NEW, b"", OLD), "lines")])
def test_a_secret_file_with_a_wrong_line_is_refused(tmp_path, lines, said):
    path = secret_file(tmp_path / "secret", *lines)
    text = refusal("--serverdir", tmp_path / "p", "--secretfile", path)
    assert said in text and str(path) in text
    assert not [line for line in lines if len(line) > 5 and line.decode() in text]


def test_lines_may_end_as_in_windows(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(NEW + b"\r\n" + OLD + b"\r\n\r\n")
    path.chmod(0o600)
    server = primary_at(tmp_path / "p", "--secretfile", path).start()
    try:
        for secret in (NEW, OLD):
            assert server.get(LOG, headers=signed(server, LOG, secret=secret)).status == 409
    finally:
        server.kill()


# -- which secret a directory has known


def test_a_server_without_its_secret_does_not_make_another_one(two):
    in_sync(two.primary, two.replica)
    for server, role, path in ((two.replica, "replica", two.files[1]),
                               (two.primary, "primary", two.files[0])):
        server.stop()
        known = facts(server)["secret_id"]
        text = refusal("--serverdir", server.directory)
        assert "--secretfile" in text and role in text
        assert not (server.directory / ".secret").exists()

        other = secret_file(path.with_name("other"), OLD[::-1])
        text = refusal("--serverdir", server.directory, "--secretfile", other)
        assert str(other) in text and "second" in text
        secret_file(server.directory / ".secret", OLD[::-1])
        text = refusal("--serverdir", server.directory)
        assert str(server.directory / ".secret") in text
        assert facts(server)["secret_id"] == known and len(known) == 8

        secret_file(other, NEW, OLD[::-1])
        assert str(other) in refusal("--serverdir", server.directory, "--secretfile", other)
        secret_file(path, NEW, OLD)
        server.start()
        assert known != facts(server)["secret_id"]
        server.stop()
        secret_file(path, OLD)      # back again: both have been known
        assert str(path) in refusal("--serverdir", server.directory, "--secretfile", path)


def test_a_promoted_replica_needs_the_secret_that_it_had(two):
    in_sync(two.primary, two.replica)
    two.primary.stop()
    two.replica.stop()
    serverdir = two.replica.directory
    # whichever options say that it may be
    done = run_command("promote", "--force", "--serverdir", serverdir)
    assert done.returncode == 0, done
    assert "--secretfile" in refusal("--serverdir", serverdir)
    assert not (serverdir / ".secret").exists()
    new = Server(serverdir, "--secretfile", two.files[1], root_password=None).start()
    try:
        assert new.get(LOG, headers=signed(new, LOG, secret=OLD)).status == 409
    finally:
        new.kill()


def test_a_standalone_server_may_have_any_secret(tmp_path):
    paths = [secret_file(tmp_path / str(number), secret) for number, secret in enumerate((OLD, NEW))]
    server = Server(tmp_path / "s")
    try:
        for path in (*paths, None):
            server.start(*(("--secretfile", path) if path else ()))
            server.stop()
            assert "secret_id" not in facts(server)
        # a primary whose secret is lost gets a new one this way
        server.start("--role", "primary", "--secretfile", paths[0])
        server.stop()
        assert "--role standalone" in refusal(
            "--serverdir", server.directory, "--secretfile", paths[1])
        server.start("--role", "standalone", "--secretfile", paths[1])
        server.stop()
        server.start("--role", "primary", "--secretfile", paths[1])
        assert server.get(LOG, headers=signed(server, LOG, secret=NEW)).status == 409
    finally:
        if server.running:
            server.kill()


def test_a_primary_with_the_secret_of_its_directory_starts_again(tmp_path):
    server = primary_at(tmp_path / "p").start()
    try:
        assert (server.directory / ".secret").exists()
        assert server.restart() and server.stop() == 0
        (server.directory / ".secret").unlink()
        assert "--secretfile" in refusal("--serverdir", server.directory)
        assert not (server.directory / ".secret").exists()
    finally:
        if server.running:
            server.kill()


def test_a_replica_makes_no_secret_of_its_own(two):
    comes_to_be(two.replica, "following")
    assert not (two.replica.directory / ".secret").exists()
    text = refusal("--serverdir", two.replica.directory.with_name("new"), "--primary-url",
                   two.primary.url)
    assert "--secretfile" in text
    assert not (two.replica.directory.with_name("new") / ".secret").exists()
    assert status(two.replica)["role"] == "REPLICA"


# -- who may ask, and how often


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    primary = primary_at(folder / "p", script=patched(folder, """
devpi_lite.Limits.polls = 2
devpi_lite.Limits.known_replicas = 5
devpi_lite.Limits.longest_poll = 1
""")).start()
    replica = replica_at(folder / "r", primary)
    try:
        primary.login("root")
        primary.add_user("ann")
        primary.add_index("ann/dev")
        primary.upload("ann/dev", wheel("demo", "1.0", size=5000))
        replica.start()
        replica.passwords = primary.passwords
        in_sync(primary, replica)
        yield primary, replica
    finally:
        for server in (replica, primary):
            if server.running:
                server.kill()


FEED = [LOG, "/+repl/v1/snapshot", "/+repl/v1/blob/" + wheel("demo", "1.0", size=5000).sha256]


def seen_of(reply):
    """What a client sees of a response; not the time."""
    return reply.status, reply.reason, reply.body, sorted(
        item for item in reply.headers.items() if item[0] not in ("Date", "X-DEVPI-SERIAL"))


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_whatever_is_wrong_the_answer_is_the_same(pair, method):
    primary, _ = pair
    for target in FEED:
        good = signed(primary, target, method)
        assert primary.request(method, target, headers=good).status in (200, 409)
        wrong = [
            {}, good, signed(primary, target, method, secret=OLD),
            signed(primary, target, method, ts=time.time() - 90),
            signed(primary, target, method, ts=time.time() + 90),
            signed(primary, target, "POST"), signed(primary, target + "x", method),
            {"Authorization": "Devpi-Replica"}, {"Authorization": "Devpi-Replica id=1"},
            {"Authorization": "Bearer x"}, {"Authorization": "Basic cm9vdDp3cm9uZw=="},
            {"Authorization": "Basic !"}, {"X-Devpi-Auth": "cm9vdDp3cm9uZw=="},
            {"Authorization": good["Authorization"] + ",x" * 20000},
            {"Range": "bytes=0-5"}, {"If-None-Match": "*"}, {"User-Agent": "devpi-client/7.2"}]
        replies = [seen_of(primary.request(method, target, headers=headers)) for headers in wrong]
        assert replies[0][0] == 401
        assert [reply for reply in replies if reply != replies[0]] == []
        by_root = primary.request(method, target, user="root")
        assert seen_of(by_root) == replies[0]


def test_no_other_spelling_or_method_gets_anything(pair):
    primary, replica = pair
    for target in FEED:
        for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PUSH", "TRACE"):
            for server in pair:
                reply = server.request(method, target)
                assert reply.status >= 400 and b"ops" not in reply.body, (method, target, reply)
        path, _, query = target.partition("?")
        for spelled in (path + "/", path.replace("/v1/", "/v1//"), path.replace("/v1/", "%2fv1%2f"),
                        "/" + path, path.replace("+repl", "%2Brepl"), path + "%00", path + "/..",
                        "/ann/.." + path, "/ann/dev" + path):
            reply = primary.get(spelled + "?" + query)
            assert reply.status in (302, 400, 401, 404), (spelled, reply)
            assert b"pwhash" not in reply.body and b'"ops"' not in reply.body


@pytest.mark.parametrize("headers", [{}, {"X-DEVPI-MIN-SERIAL": "999"}])
def test_a_replica_passes_no_request_for_the_feed_on(pair, headers):
    primary, replica = pair
    for target in FEED:
        for method in ("GET", "POST"):
            reply = replica.request(method, target, headers={
                **signed(primary, target, method), **headers})
            assert reply.status == 404, reply
    asked = [line for line in primary.whole_output().splitlines() if "5" * 32 in line]
    assert asked == []


def test_nothing_of_the_feed_is_kept(pair):
    primary, replica = pair
    gzip = {"Accept-Encoding": "gzip", "Range": "bytes=0-9"}
    for target in FEED:
        for more in ({}, gzip):
            sent = {**signed(primary, target), **more}
            reply = primary.get(target, headers=sent)
            assert reply.status in (200, 206, 409)
            assert reply.headers.get_all("Cache-Control") == ["no-store"]
            assert "Content-Encoding" not in reply.headers
            assert primary.get(target, headers=sent).status == 401      # not out of a cache


def test_a_signature_is_not_good_again_after_a_restart(tmp_path):
    primary = primary_at(tmp_path / "p").start()
    try:
        sent = signed(primary, LOG)
        assert primary.get(LOG, headers=sent).status == 409
        until = int(time.time()) + 1
        while time.time() < until:
            time.sleep(0.01)
        primary.restart()
        assert primary.get(LOG, headers=sent).status == 401
        assert primary.get(LOG, headers=signed(primary, LOG)).status == 409
    finally:
        primary.kill()


class Clock:
    """In place of the module `time`."""

    def __init__(self, now):
        self.now = now

    def time(self):
        return self.now

    def __getattr__(self, name):
        return getattr(time, name)


def test_numbers_are_kept_as_long_as_they_count(monkeypatch):
    clock = Clock(1000.5)
    monkeypatch.setattr(devpi_lite, "time", clock)
    monkeypatch.setattr(devpi_lite.Limits, "nonces", 50)
    nonces = devpi_lite.Nonces()
    assert nonces.use(1000, b"a") and not nonces.use(1000, b"a") and nonces.use(1001, b"a")
    assert not nonces.use(999, b"b")                    # before the start
    assert not nonces.use(1100, b"b") and nonces.use(1060, b"b")
    clock.now += 59
    assert not nonces.use(1000, b"a") and not nonces.use(1060, b"b")
    clock.now += 200
    assert nonces.use(1259, b"a") and nonces.count == 1
    clock.now = 1000.5                  # the clock was wrong: replicas are believed at once
    assert nonces.use(1000, b"c")
    clock.now = 1400.5
    assert nonces.use(1350, b"a") and nonces.count == 1
    clock.now = 1500.5
    assert [nonces.use(1500, b"%d" % number) for number in range(50)] == [True] * 50
    with pytest.raises(devpi_lite.Busy):
        nonces.use(1500, b"one more")
    clock.now += 62
    assert nonces.use(1562, b"one more") and nonces.count == 1


def test_replicas_that_nobody_knows_do_not_pile_up(pair):
    primary, replica = pair
    for number in range(20):
        asked = signed(primary, LOG, uuid="%032x" % number)
        assert primary.get(LOG, headers=asked).status == 409
    eventually(lambda: status(replica)["uuid"] in status(primary)["polling_replicas"])
    assert len(status(primary)["polling_replicas"]) <= 5


def test_waiting_replicas_take_no_threads_from_others(pair):
    primary, replica = pair
    replica.stop()
    eventually(lambda: not any(each["in-request"] for each in status(primary)["polling_replicas"].values()))
    target = "/+repl/v1/log?after=%d&hash=%s&wait=99" % (serial(primary), head_hash(primary))
    replies, began = [], time.monotonic()
    threads = [threading.Thread(target=lambda: replies.append(primary.get(
        target, headers=signed(primary, target)).status)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(replies) == [204, 204, 503, 503, 503, 503]
    assert 0.9 < time.monotonic() - began < 6
    replica.start()
    in_sync(primary, replica)


def head_hash(server):
    with contextlib.closing(sqlite3.connect(server.directory / "devpi_lite.db")) as db:
        return db.execute("SELECT lower(hex(hash)) FROM changelog ORDER BY serial DESC").fetchone()[0]


@pytest.mark.parametrize("query", [
    "after=" + "9" * 16, "after=" + "9" * 5000, "after=-5&hash=", "after=1e9", "after=1&hash=zz",
    "after=0&hash=%s&wait=100" % ("0" * 64), "after=0&hash=&wait=-1", "after=0&missing=" + "9" * 99,
    "after=0&after=1", "after=%00", ""])
def test_odd_questions_of_a_replica_do_no_harm(pair, query):
    primary, _ = pair
    target = "/+repl/v1/log?" + query
    reply = primary.get(target, headers=signed(primary, target))
    assert reply.status in (400, 409), reply
    assert "Traceback" not in primary.output()
