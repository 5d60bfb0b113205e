"""The secret of a primary and its replicas: how it is changed, kept, and told to nobody; and what
who does not have it, or misuses it, can do."""

import base64
import contextlib
import json
import os
import re
import socket
import sqlite3
import ssl
import threading
import time
import tracemalloc
import zlib

import pytest

import devpi_lite
from harness import Server, eventually, patched, path_of, run_command, serial, wheel
from replicas import (
    Fake, comes_to_be, in_sync, passed_on, primary_at, replica_at, same, signed, signed_head, status,
    unsound)

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
    assert primary.get(LOG, headers=signed(primary, LOG, secret=NEW)).status == 200

    secret_file(two.files[1], NEW)
    replica.restart()
    two.is_whole("5.0")
    assert good_at(by_old, primary, replica) == [False, False]


def test_with_two_secrets_each_request_is_answered_by_its_own(two):
    secret_file(two.files[0], NEW, OLD)
    two.primary.restart()
    for secret, status_ in ((OLD, 200), (NEW, 200), (OLD[::-1], 401)):
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
            assert server.get(LOG, headers=signed(server, LOG, secret=secret)).status == 200
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
        if role == "replica":       # its primary has not accepted the new one yet
            comes_to_be(server, "unreachable")
            assert known == facts(server)["secret_id"]
            server.stop()
            secret_file(path, OLD)
            continue
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
        assert server.get(LOG, headers=signed(server, LOG, secret=NEW)).status == 200
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
        assert primary.request(method, target, headers=good).status in (200, 204, 409)
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
    body = json.dumps([wheel("demo", "1.0", size=5000).sha256])
    assert replica.post("/+repl/v1/blobs", body, headers={
        **signed(primary, "/+repl/v1/blobs", "POST"), **headers}).status == 404
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
        assert primary.get(LOG, headers=sent).status == 200
        until = int(time.time()) + 1
        while time.time() < until:
            time.sleep(0.01)
        primary.restart()
        assert primary.get(LOG, headers=sent).status == 401
        assert primary.get(LOG, headers=signed(primary, LOG)).status == 200
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
        assert primary.get(LOG, headers=asked).status == 200
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


@pytest.mark.parametrize("body", [
    b"[1]", b"[null]", b"[[]]", b"{}", b"5", b"[" * 10000, b"", b"x", b'["' + b"0" * 64 + b'"]' * 2])
def test_odd_lists_of_files_do_no_harm(pair, body):
    primary, _ = pair
    target = "/+repl/v1/blobs"
    reply = primary.post(target, body, headers=signed(primary, target, "POST", body=body))
    assert reply.status == 400, reply
    assert primary.post(target, body + b" ", headers=signed(primary, target, "POST", body=body)).status == 401
    assert primary.post(target, body).status == 401


@pytest.mark.parametrize("query", [
    "after=" + "9" * 16, "after=" + "9" * 5000, "after=-5&hash=", "after=1e9", "after=1&hash=zz",
    "after=0&hash=%s&wait=100" % ("0" * 64), "after=0&hash=&wait=-1", "after=0&missing=" + "9" * 99,
    "after=-1&after=-2", "after=%00", ""])
def test_odd_questions_of_a_replica_do_no_harm(pair, query):
    primary, _ = pair
    target = "/+repl/v1/log?" + query
    reply = primary.get(target, headers=signed(primary, target))
    assert reply.status in (200, 400, 409), reply
    assert "Traceback" not in primary.output()


# -- a primary that sends what is not right


def block(kind, *row):
    """A line of a snapshot with one row."""
    return json.dumps([kind, [row]]).encode()


def lines_of(data, folder):
    path = folder / "packed"
    path.write_bytes(data)
    with open(path, "rb") as file:
        return list(devpi_lite._unpacked_lines(file))


def test_a_snapshot_is_unpacked_in_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(devpi_lite.Limits, "log_response", 5 << 20)
    text = b"".join(b"x" * size + b"\n" for size in (0, 1, 3 << 20, 70, 1 << 20, (1 << 20) - 1, 5))
    for packed in (zlib.compress(text), zlib.compress(text, 0)):
        assert lines_of(packed, tmp_path) == text.split(b"\n")[:-1]
        for cut in (1, len(packed) // 2, len(packed) - 1):
            with pytest.raises(ValueError, match="not whole"):
                lines_of(packed[:cut], tmp_path)
    with pytest.raises(ValueError, match="not whole"):
        lines_of(zlib.compress(text + b"no end"), tmp_path)
    bomb = zlib.compress(bytes(300 << 20))
    assert len(bomb) < 400_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="line of more than"):
            lines_of(bomb, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def entry_of(packed, **more):
    """An entry as a line of JSON, right but for `more`."""
    facts_ = {"serial": 0, "ts": 1.0, "who": None, "prev": "",
              "hash": devpi_lite.entry_hash(b"", 0, packed).hex(),
              "ops": base64.b64encode(packed).decode()}
    return json.dumps({**facts_, **more}).encode()


def test_a_bomb_in_an_entry_is_refused(monkeypatch):
    monkeypatch.setattr(devpi_lite.Limits, "log_response", 1 << 20)
    entry = devpi_lite.entry_of(entry_of(zlib.compress(b"[" + b" " * (50 << 20) + b"]")))
    assert entry.is_sound
    with pytest.raises(devpi_lite.FatalError, match="more than"):
        entry.ops_for_replay()


@pytest.mark.parametrize("more", [
    {"who": ["x"]}, {"who": 1}, {"serial": 1.5}, {"serial": "1"}, {"serial": None}, {"ts": "x"},
    {"ts": []}, {"prev": 1}, {"prev": "xx"}, {"ops": 1}, {"ops": "é"}, {"hash": None}])
def test_an_odd_entry_is_none(more):
    with pytest.raises(ValueError):
        devpi_lite.entry_of(entry_of(zlib.compress(b"[]"), **more))


@pytest.mark.parametrize("line", [
    b"1", b"[]", b"{}", b"null", b'["user"]', b'[["user"], [["x"], {}]]', b'["user", 5]', b'["user", null]',
    b'["user", [5]]', b'["user", [[5, {}]]]', b'["user", [[null, {}]]]', b'["none", [[["x"], {}]]]',
    b'["user", [[[["x"]], {}]]]', b"[" * 100000, b'["user", [[["x"], 5]]]', b'["user", [[["x"], null]]]',
    b'["user", [[["x"], {}, {}]]]', b'["user", {"x": {}}]', b"\xff", b""])
def test_odd_rows_of_a_snapshot_are_refused(line):
    with pytest.raises(devpi_lite.FatalError):
        devpi_lite._block_of(line)


class Hostile:
    """A server that has the secret, and sends what it likes: `answers` path -> (status, body)."""

    uuid, (key,) = "7" * 32, devpi_lite.replication_keys((OLD,))

    def __init__(self):
        self.answers, self.extra = {}, {}
        self.server = Fake(self.answer)
        self.url = self.server.url

    def answer(self, path, headers):
        status_, body = self.answers.get(path.partition("?")[0], (404, b""))
        nonce = re.search("nonce=([0-9a-f]+)", headers.get("Authorization", "") or "nonce=0")[1]
        return status_, signed_head(self.key, nonce, status_, body, self.uuid, **self.extra), body

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hostile(tmp_path):
    server = Hostile()
    replica = replica_at(tmp_path / "r", None, url=server.url, script=patched(tmp_path, SOON),
                         secret=secret_file(tmp_path / "s", OLD))
    yield server, replica
    if replica.running:
        replica.kill()
    server.close()


OPS = zlib.compress(b"[]")
HISTORY = [["e" * 32, 1, -1, "", None, "init", 1.0]]
GOOD_USER = {"pwhash": None, "generation": "g", "created": "2026-01-01T00:00:00Z", "modified": None,
             "attributes": {}}
BAD_ROWS = [
    ["user", ["eve"], {**GOOD_USER, "pwhash": {"a": [1]}}],
    ["user", ["eve"], {**GOOD_USER, "pwhash": 1 << 80}],
    ["user", ["eve"], {**GOOD_USER, "generation": None}], ["user", ["eve"], {**GOOD_USER, "more": 1}],
    ["user", [["eve"]], GOOD_USER], ["user", [{}], GOOD_USER], ["user", ["e\ud800"], GOOD_USER],
    ["user", [1 << 70], GOOD_USER], ["user", ["eve", "bob"], GOOD_USER],
    ["user", ["eve"], {}], ["index", ["nobody", "dev"], {"type": "stage"}], ["index", ["x"], {}],
    ["file", ["nobody", "dev", "x", "1.0", "x.whl"], {}], ["user", ["eve"], [[[[]]]]]]


def test_rows_that_are_wrong_leave_nothing(tmp_path):
    store = devpi_lite.Store(devpi_lite.Settings(serverdir=str(tmp_path)), create=True)
    with contextlib.closing(store):
        for row in BAD_ROWS:
            entry = devpi_lite.entry_of(entry_of(OPS))
            good = block("user", ["bob"], GOOD_USER)
            with pytest.raises(devpi_lite.FatalError):
                store.start_from(map(devpi_lite._block_of, [good, block(*row)]), entry, "7" * 32)
            with store.read() as db:
                assert store.head(db)[0] == -1
                assert db.execute("SELECT count(*) FROM users").fetchone()[0] == 0


@pytest.mark.parametrize("history", [
    {}, [], [[]], 5, None, [5], [[{}] * 7], ["x" * 7],
    [["e" * 32, "abc", -1, "", None, "init", 1.0]], [["e" * 32, 1, -1, "", None, "init", 1e300]],
    [["e" * 32, 1, -1, "", None, "x\r\ny", 1.0]], [["e" * 32, 1, -1, "zz", None, "init", 1.0]],
    [["e" * 32, 1, -1, "", None, "init", None]]])
def test_an_odd_history_is_none(history):
    assert devpi_lite.epochs_from(HISTORY)[0].term == 1
    with pytest.raises(ValueError):
        devpi_lite.epochs_from(history)


@pytest.mark.parametrize("line", [b"", b"5", b"[1]", b"[[1]]", b'[["1", "00"]]', b'[[1, "00"]]', b'[[1, 2]]',
                                  b'[[-1, "%s"]]' % (b"0" * 64), b'[[1, "%s"]]' % (b"z" * 64), b"[" * 100000])
def test_odd_hashes_of_a_snapshot_are_none(line):
    assert devpi_lite._hashes_of(b'[[7, "%s"]]' % (b"0" * 64)) == [(7, bytes(32))]
    with pytest.raises(ValueError):
        devpi_lite._hashes_of(line)


def test_a_replica_lives_on_whatever_its_primary_sends(hostile):
    server, replica = hostile
    server.answers["/+repl/v1/snapshot"] = 200, zlib.compress(
        entry_of(OPS) + b"\n[]\n" + block(*BAD_ROWS[0]) + b"\n")
    replica.start()
    assert "can't be put" in comes_to_be(replica, "failing")["replication-trouble"]
    assert replica.get("/+api").status == 200

    server.answers["/+repl/v1/history"] = 200, b'{"history": [{}]}'
    server.answers["/+repl/v1/snapshot"] = 200, zlib.compress(entry_of(OPS) + b"\n[]\n")
    server.answers["/+repl/v1/log"] = 204, b""
    eventually(lambda: "history" in (status(replica)["replication-trouble"] or ""))
    server.answers["/+repl/v1/history"] = 200, json.dumps({"history": HISTORY}).encode()
    comes_to_be(replica, "following")
    assert "Traceback" not in replica.output()


def test_no_byte_is_taken_of_what_is_not_signed(hostile):
    """A server without the secret sends endlessly: it is left at its head."""
    server, replica = hostile
    sent = []

    class Endless(bytes):
        def __len__(self):
            return 1 << 40

    def answer(path, headers):
        sent.append(path)
        return 200, {"X-DEVPI-UUID": "7" * 32, "X-Devpi-Signature": "0" * 64}, Endless(bytes(1 << 20))

    server.server.change = answer
    replica.start()
    found = comes_to_be(replica, "unreachable")
    assert "does not know the secret" in found["replication-trouble"]


@pytest.mark.parametrize("extra", [
    {"uuid": "7" * 31}, {"uuid": "x" * 32}, {"epoch": "e"}, {"term": "-1"}, {"term": "1" * 10},
    {"head": "1e5"}, {"head": "9" * 16}, {"head": ""}, {"digest": "0" * 64}, {"digest": "é"}])
def test_odd_heads_are_refused_though_they_are_signed(extra, monkeypatch):
    (key,), said = devpi_lite.replication_keys((OLD,)), []

    class Response:
        status = 200

        def __enter__(self):
            return self

        def __exit__(self, *error):
            said.append("closed")

        def header(self, name):
            return self.headers.get(name, "")

        def length(self):
            return 2

        def read(self, size):
            data, self.body = self.body[:size], self.body[size:]
            return data

    class Client:
        def ask_primary(self, url, headers):
            response = Response()
            response.body = b"{}"
            nonce = re.search("nonce=([0-9a-f]+)", headers["Authorization"])[1]
            response.headers = signed_head(key, nonce, 200, b"{}", **extra)
            return response

    def ask(**options):
        primary = devpi_lite.Primary(Client(), "http://127.0.0.1", (OLD,), {"uuid": "1" * 32, "term": "1"})
        return primary.get_signed("/+repl/v1/history", **options)

    with pytest.raises(devpi_lite.UpstreamTrouble):
        ask()
    assert said == ["closed"]
    extra = {}
    assert (ask().serial, ask().term, ask(most=2).body) == (0, 1, b"{}")
    for length, most in ((2, 1), (None, None)):
        monkeypatch.setattr(Response, "length", lambda self, length=length: length)
        with pytest.raises(devpi_lite.UpstreamTrouble, match="can be taken"):
            ask(most=most)


def test_a_file_has_the_size_that_its_row_says(pair, tmp_path):
    """A line without TLS sends endlessly in place of a file."""
    primary, _ = pair
    archive = wheel("demo", "1.0", size=5000)
    lies, honest = [], threading.Event()
    ask = passed_on(primary)

    def answer(path, headers):
        if "/blob" in path and not honest.is_set():
            lies.append(path)
            return 200, {"Content-Type": "application/octet-stream"}, archive.content + bytes(5 << 20)
        return ask(path, headers)

    server = Fake(answer)
    replica = replica_at(tmp_path / "r", primary, url=server.url, script=patched(tmp_path, SOON))
    try:
        replica.start()
        eventually(lambda: lies and status(replica)["replication-errors"])
        (error,) = status(replica)["replication-errors"].values()
        assert str(len(archive.content)) in error["message"]
        assert replica.get(path_of(archive, "ann/dev"), headers={"Accept": "*/*"}).status == 503
        assert unsound(replica) == []
        honest.set()
        eventually(lambda: replica.get(path_of(archive, "ann/dev"), headers={"Accept": "*/*"}).status == 200)
    finally:
        replica.kill()
        server.shutdown()
        server.server_close()


# -- what a replica keeps to itself


def test_a_closed_index_is_closed_in_the_caches_of_a_replica(pair):
    primary, replica = pair
    primary.add_user("sue")
    primary.add_index("sue/dev")
    archive = wheel("hush", "1.0")
    primary.upload("sue/dev", archive)
    in_sync(primary, replica)
    paths = [path_of(archive, "sue/dev"), "/sue/dev/+simple/hush/", "/sue/dev/+simple/", "/sue/dev/hush",
             "/sue/dev/hush/1.0", path_of(archive, "sue/dev") + ".metadata"]
    for _ in range(3):      # the page, the ready response, that response
        assert [replica.get(path, headers={"Accept": "*/*"}).status for path in paths[:3]] == [200] * 3
    for body, status_ in ((["acl_pkg_read=sue"], 401), (["acl_pkg_read=:ANONYMOUS:"], 200),
                          (["acl_pkg_read=sue"], 401)):
        reply = primary.patch("/sue/dev", body, user="sue")
        assert reply.status == 200
        at = int(reply.headers["X-DEVPI-SERIAL"])
        eventually(lambda: status(replica)["serial"] >= at, pause=0.001)
        for path in paths:
            for _ in range(2):
                assert replica.get(path, headers={"Accept": "*/*"}).status == status_, path
    # one that is closed when it comes
    reply = primary.put("/sue/shut", {"acl_pkg_read": ["sue"]}, user="sue")
    assert reply.status == 200
    primary.upload("sue/shut", archive)
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        assert replica.get(path_of(archive, "sue/shut"), headers={"Accept": "*/*"}).status in (401, 404)
    in_sync(primary, replica)
    assert replica.get(path_of(archive, "sue/shut"), headers={"Accept": "*/*"}).status == 401


def test_a_changed_password_ends_what_a_replica_remembers(pair):
    primary, replica = pair
    primary.add_user("tim")
    primary.add_index("tim/dev", acl_pkg_read=["tim"])
    in_sync(primary, replica)
    token = replica.login("tim", "pw")
    for _ in range(3):
        assert replica.get("/tim/dev/+simple/", user="tim", password="pw").status == 200
        assert replica.get("/tim/dev/+simple/", user="tim").status == 200
    reply = primary.patch("/tim", {"password": "newer"}, user="tim", password="pw")
    assert reply.status == 200
    at = int(reply.headers["X-DEVPI-SERIAL"])
    eventually(lambda: status(replica)["serial"] >= at, pause=0.001)
    assert replica.get("/tim/dev/+simple/", user="tim", password="pw").status == 401
    assert replica.get("/tim/dev/+simple/", user="tim", password=token).status == 401
    assert replica.get("/tim/dev/+simple/", user="tim", password="newer").status == 200
    by_new = primary.login("tim", "newer")
    assert primary.delete("/tim", user="root").status == 200
    in_sync(primary, replica)
    assert replica.get("/+api", user="tim", password=by_new).result["authstatus"][0] != "ok"


def test_guesses_at_a_replica_have_to_wait(pair):
    primary, replica = pair
    primary.add_user("gus")
    in_sync(primary, replica)
    replies = [replica.post("/+login", {"user": "gus", "password": "x%d" % number}).status
               for number in range(8)]
    assert replies[0] == 401 and replies[-1] == 429
    assert replica.post("/+login", {"user": "gus", "password": "pw"}).status == 429


def test_nothing_of_the_secret_is_told(tmp_path):
    """In logs with --debug, status, metrics, errors and commands: neither the secret nor what is
    made of it."""
    path = secret_file(tmp_path / "secret", NEW, OLD)
    primary = primary_at(tmp_path / "p", "--secretfile", path, "--debug").start()
    replica = replica_at(tmp_path / "r", primary, "--debug", secret=path)
    try:
        primary.add_user("ann")
        primary.add_index("ann/dev")
        archive = wheel("demo", "1.0")
        primary.upload("ann/dev", archive)
        replica.start()
        in_sync(primary, replica)
        told = []
        macs = [signed(primary, LOG, secret=NEW), signed(primary, LOG, secret=OLD[::-1])]
        for server in (primary, replica):
            server.passwords["root"] = "secret"
            for headers in [{}] + macs:
                told.append(server.get(LOG, headers=headers).text)
            for page in ("/+status", "/+metrics", "/+health/ready", "/+api", "/ann", "/nobody/there"):
                for user in (None, "root"):
                    reply = server.get(page, user=user)
                    told.append(reply.text + str(reply.headers))
            told.append(run_command("status", "--serverdir", server.directory).stdout)
            told.append(run_command("status", "--json", "--serverdir", server.directory).stdout)
        told += [primary.whole_output(), replica.whole_output()]
        with open("/proc/%d/cmdline" % replica.pid) if os.path.exists("/proc/self/cmdline") \
                else open(os.devnull) as file:
            told.append(file.read())
        text = "\n".join(told)
        keys = [key for secret in (OLD, NEW) for key in (
            *devpi_lite.replication_keys((secret,)), *devpi_lite.derived_keys((secret,), b"devpi_lite session"),
            secret)]
        for key in keys:
            for form in (key.hex(), base64.b64encode(key).decode().rstrip("="), key.decode("latin-1")):
                assert form not in text
        assert not re.search("nonce=|mac=|Devpi-Replica id", text)
        assert facts(primary)["secret_id"] not in text
    finally:
        replica.kill()
        primary.kill()


def test_snapshots_that_nobody_reads_do_not_pile_up(tmp_path):
    # more than what the system takes for a client that does not read
    primary = primary_at(tmp_path / "p", script=patched(tmp_path, """
devpi_lite.Limits.sent_snapshots = 3
devpi_lite._snapshot_lines = lambda store: [devpi_lite.secrets.token_bytes(8 << 20)]
""")).start()
    target, open_ = "/+repl/v1/snapshot", []
    try:
        for _ in range(10):
            connection = primary.connect()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            head_ = "".join("%s: %s\r\n" % item for item in signed(primary, target).items())
            connection.sendall(("GET %s HTTP/1.1\r\nHost: x\r\n%s\r\n" % (target, head_)).encode())
            open_.append(connection)
            if b" 503 " in connection.recv(20):
                break
        else:
            pytest.fail("no request was refused")
        assert len(open_) >= 4
        for connection in open_:
            connection.close()
        eventually(lambda: primary.get(target, headers=signed(primary, target)).status == 200)
    finally:
        for connection in open_:
            connection.close()
        primary.kill()


def test_a_primary_that_redirects_or_has_no_good_certificate_is_named(hostile, tmp_path):
    from client import CERTIFICATE      # not at the top: it compiles the client
    server, replica = hostile
    asked = []

    def answer(path, headers):
        asked.append(headers)
        return 301, {"Location": "http://user:word@elsewhere.example/x"}, b""

    server.server.change = answer
    replica.start()
    found = comes_to_be(replica, "unreachable")["replication-trouble"]
    assert "elsewhere.example" in found and "--primary-url" in found and "word" not in found
    replica.kill()

    (tmp_path / "c.pem").write_text(CERTIFICATE)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(str(tmp_path / "c.pem"))
    secure = Fake(answer)
    secure.socket = tls.wrap_socket(secure.socket, server_side=True)
    url, count = secure.url.replace("http:", "https:"), len(asked)
    stranger = replica_at(tmp_path / "s1", None, url=url, secret=tmp_path / "s").start()
    try:
        assert "certificate" in comes_to_be(stranger, "unreachable")["replication-trouble"]
        assert len(asked) == count      # no signature went there
    finally:
        stranger.kill()
        secure.shutdown()
        secure.server_close()
