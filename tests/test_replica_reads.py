"""What those who read through a replica see of its distance to the primary: they may ask for a serial that they
need, it says how many it lacks, and it refuses to be read when it is older than its operator allows."""

import re
import threading
import time

import pytest

from harness import SIMPLE_JSON, Wire, eventually, path_of, serial, serial_of, timed, upload, wheel
from replicas import HeldPair, comes_to_be, in_sync, replica_at, status


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = HeldPair(tmp_path_factory.mktemp("reads"))
    yield pair
    pair.end()


def lag_of(reply):
    (text,) = reply.headers.get_all("X-DEVPI-REPLICA-LAG")
    return int(text)


# -- a serial that a reader needs


def test_a_reader_gets_the_serial_that_it_needs_when_it_comes(pair):
    with pair.mark("hold"):
        archive, needed = pair.new_file("soon")
        found = []
        reader = threading.Thread(target=lambda: found.append(pair.names("soon", needed)))
        reader.start()
        time.sleep(0.1)
        assert not found
    reader.join()
    ((reply, names),) = found
    assert (names, serial_of(reply) >= needed, lag_of(reply)) == ([archive.filename], True, 0)
    assert "GET /ann/dev/+simple/soon/" not in pair.primary.whole_output()


def test_what_does_not_come_soon_is_had_from_the_primary(pair):
    pair.primary.add_index("ann/own", acl_pkg_read=["ann"])
    in_sync(pair.primary, pair.replica)
    with pair.mark("hold"):
        archive, _ = pair.new_file("late")
        hidden = wheel("hush", "1.0")
        upload(pair.primary, "ann/own", hidden)
        pair.primary.add_index("ann/new")
        needed = serial(pair.primary)
        eventually(lambda: lag_of(pair.replica.get("/+api")) > 0)
        before, _ = pair.names("late")
        assert before.status == 404 and lag_of(before) > 0
        reply, names = pair.names("late", needed)
        assert names == [archive.filename]
        assert (serial_of(reply), lag_of(reply) > 0) == (needed, True)
        headers = {"X-DEVPI-MIN-SERIAL": str(needed), "Accept": "*/*"}
        for method in ("GET", "HEAD"):
            file = pair.replica.request(method, path_of(archive, "ann/dev"), headers=headers)
            assert file.headers["Content-Length"] == str(len(archive.content))
            assert file.body == (archive.content if method == "GET" else b"")
        etag = pair.primary.get(path_of(archive, "ann/dev"), headers={"Accept": "*/*"}).headers["ETag"]
        again = pair.replica.get(path_of(archive, "ann/dev"), headers=dict(headers, **{"If-None-Match": etag}))
        assert (again.status, again.body) == (304, b"")
        assert pair.replica.get("/ann/new/+api", headers=headers).result["index"] == pair.replica.url + "/ann/new"
        # who may not read it there may not read it through the replica
        path = "/ann/own/+simple/hush/"
        assert pair.replica.get(path, headers=headers).status == 401
        assert pair.replica.get(path, headers=headers, user="ann", password="pw").status == 200
        # what tells of the replica is the replica's
        for path in ("/+status", "/+health/live", "/+metrics"):
            reply = pair.replica.get(path, headers=headers)
            assert reply.status == 200 and serial_of(reply) < needed, path
    in_sync(pair.primary, pair.replica)


def test_a_reader_is_not_served_what_was_kept_before(pair):
    """Neither a ready response to the same request nor a page that was made for it."""
    archives = [pair.new_file("often")[0]]
    for version in ("2.0", "3.0"):
        in_sync(pair.primary, pair.replica)
        for needed in (None, serial(pair.primary), serial(pair.primary) + 1):
            for _ in range(2):
                assert pair.names("often", needed)[1] == [each.filename for each in archives]
        with pair.mark("slow"):
            archive, needed = pair.new_file("often", version)
            archives.append(archive)
            assert pair.names("often", needed)[1] == [each.filename for each in archives]


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "1e3", "9" * 19, "٣"])
def test_a_serial_that_is_no_number_is_refused_by_the_replica_and_ignored_by_the_primary(pair, text):
    headers = {"X-DEVPI-MIN-SERIAL": text.encode().decode("latin-1")}
    assert pair.replica.get("/ann/dev", headers=headers).status == 400
    assert pair.primary.get("/ann/dev", headers=headers).status == 200


def test_the_primary_ignores_a_serial_that_it_does_not_have(pair):
    began = time.monotonic()
    reply = pair.primary.get("/ann/dev", headers={"X-DEVPI-MIN-SERIAL": "1" + "0" * 17})
    assert reply.status == 200 and time.monotonic() - began < 0.3
    assert "X-DEVPI-REPLICA-LAG" not in reply.headers
    reply = pair.replica.get("/ann/dev", headers={"X-DEVPI-MIN-SERIAL": "1" + "0" * 17})
    assert (reply.status, serial_of(reply)) == (200, serial(pair.primary))


def test_a_login_with_a_password_that_is_not_here_yet_waits_for_it(pair):
    pair.primary.add_user("eve")
    in_sync(pair.primary, pair.replica)
    with pair.mark("hold"):
        needed = serial_of(pair.primary.patch("/eve", {"password": "newer"}, user="eve"))
        body, headers = {"user": "eve", "password": "newer"}, {"X-DEVPI-MIN-SERIAL": str(needed)}
        assert pair.replica.post("/+login", body).status == 401
        assert pair.replica.post("/+login", body, headers=headers).status == 200


# -- what it lacks


def test_each_response_says_once_how_many_serials_are_missing(pair):
    archive, _ = pair.new_file("count")
    in_sync(pair.primary, pair.replica)
    etag = pair.names("count")[0].headers["ETag"]

    def all_lags():
        for path, headers in (
                ("/ann/dev/+simple/count/", {"Accept": SIMPLE_JSON}), ("/ann/dev/+simple/count/", {"If-None-Match": etag}),
                ("/nobody", {}), ("/nobody/dev", {}), ("/+status", {}), ("/+metrics", {}), ("/+health/live", {}),
                (path_of(archive, "ann/dev"), {"Accept": "*/*"}), ("/+api", {}), ("/%ff", {}), ("/+repl/v1/log", {})):
            for _ in range(2):
                yield lag_of(pair.replica.get(path, headers=headers))
        head = pair.replica.raw(b"nonsense\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        yield int(re.findall(rb"(?i)\r\nX-DEVPI-REPLICA-LAG: ([0-9]+)\r\n", head)[0])
        yield lag_of(pair.replica.put("/ann", {}))

    assert set(all_lags()) == {0}
    with pair.mark("hold"):
        for version in ("2.0", "3.0"):
            pair.new_file("count", version)
            eventually(lambda: lag_of(pair.replica.get("/+api")) > 0)
        lags = list(all_lags())
        assert min(lags) >= 1
        gauge = re.search(r"(?m)^devpi_lite_replica_lag_serials (\d+)$", pair.replica.get("/+metrics").text)
        assert int(gauge[1]) == lag_of(pair.replica.get("/+api"))
    in_sync(pair.primary, pair.replica)
    assert set(all_lags()) == {0}


def test_a_replica_that_never_heard_of_its_primary_lacks_something(tmp_path, pair):
    replica = replica_at(tmp_path / "r", pair.primary, url="http://127.0.0.1:1").start()
    try:
        assert lag_of(replica.get("/+api")) == 1
        assert replica.get("/+health/ready").status == 503
    finally:
        replica.kill()


# -- changes that can't come back soon


@pytest.mark.parametrize("state, mark", [("diverged", "parted"), ("unreachable", "cut")])
def test_a_change_does_not_wait_for_what_can_not_come_back(pair, state, mark):
    user = "quick" + mark
    with pair.mark(mark):
        pair.primary.patch("/ann", {"title": mark}, user="ann")      # ends the replica's wait
        comes_to_be(pair.replica, state)
        for name in (user, user + "2"):
            reply, seconds = timed(pair.replica.put, "/" + name, {"password": "pw"})
            assert (reply.status, lag_of(reply) > 0, seconds < 2) == (201, True, True), (reply, seconds)
            assert serial_of(reply) == serial(pair.primary)
        assert pair.replica.get("/" + user).status == 404
        # a reader that needs it does not wait either
        reply, seconds = timed(pair.replica.get, "/" + user, headers={"X-DEVPI-MIN-SERIAL": str(serial(pair.primary))})
        assert (reply.status, seconds < 2) == (200, True)
    in_sync(pair.primary, pair.replica)
    assert pair.replica.get("/" + user).status == 200


def test_a_change_has_an_unreachable_primary_followed_at_once(pair):
    """Not after the pause."""
    with pair.mark("cut"):
        pair.primary.patch("/ann", {"title": "once"}, user="ann")
        comes_to_be(pair.replica, "unreachable")
        time.sleep(1)
    reply = pair.replica.put("/atonce", {"password": "pw"})
    assert (reply.status, lag_of(reply)) == (201, 0)
    assert pair.replica.get("/atonce").status == 200


# -- servers that nobody may follow


@pytest.mark.parametrize("kind", ["replica", "standalone"])
def test_who_follows_a_server_that_is_no_primary_is_told_so(tmp_path, pair, shared_server, kind):
    server = pair.replica if kind == "replica" else shared_server
    sentence = "this server is itself a replica of %s: --primary-url has to name that" % pair.primary.url \
        if kind == "replica" else "no server may follow this one: start it with --role primary"
    follower = replica_at(tmp_path / "r", pair.primary, url=server.url).start()
    try:
        found = eventually(lambda: (lambda found: found["replication-trouble"] and found)(status(follower)))
        assert found["replication-trouble"] == "%s says: %s" % (server.url, sentence)
        assert found["replication-state"] == "unreachable" and found["serial"] == -1
        eventually(lambda: sentence in follower.output())
        for path in ("log?after=-1&hash=", "snapshot", "blob/" + "5" * 64, "history"):
            reply = server.get("/+repl/v1/" + path)
            assert (reply.status, reply.json()["message"]) == (404, sentence)
    finally:
        follower.kill()


# -- how old it may be


def test_a_replica_that_is_too_old_is_not_read(tmp_path):
    pair = HeldPair(tmp_path, "--max-staleness", "2", "--proxy-timeout", "1")
    try:
        archive, _ = pair.new_file("old")
        in_sync(pair.primary, pair.replica)
        request = b"GET /ann/dev/+simple/old/ HTTP/1.1\r\nHost: a\r\nAccept: %s\r\n\r\n" % SIMPLE_JSON.encode()
        wire, replies = Wire(pair.replica), []
        for _ in range(3):
            wire.send(request)
            replies.append(wire.reply())
        assert [reply.status for reply in replies] == [200] * 3
        assert pair.replica.get("/+health/ready").status == 200

        # clocks of people say nothing of it
        for name in ("tomorrow", "yesterday"):
            with pair.mark(name):
                reply = pair.replica.get("/ann/dev")
                assert reply.status == 200
                metrics = pair.replica.get("/+metrics").text
                seconds = re.search(r"(?m)^devpi_lite_replica_lag_seconds (\S+)$", metrics)
                assert 0 <= float(seconds[1]) < 2
                assert not [text for text in status(pair.replica)["messages"] if "no response" in text]

        pair.primary.kill()
        eventually(lambda: pair.replica.get("/ann/dev").status == 503, 5)
        wire.send(request)
        for reply in (wire.reply(), pair.names("old")[0], pair.replica.get(path_of(archive, "ann/dev")),
                      pair.replica.get("/ann"), pair.replica.get("/"), pair.replica.get("/+health/ready"),
                      pair.replica.get("/no/index"), pair.replica.get("/ann", headers={"X-DEVPI-MIN-SERIAL": "1"})):
            assert reply.status == 503 and int(reply.headers["Retry-After"]) > 0, reply
        assert re.search(r"was last in sync with .* ago: --max-staleness allows 2", pair.names("old")[0].text)
        for name in ("tomorrow", "yesterday"):
            with pair.mark(name):
                assert pair.replica.get("/ann/dev").status == 503
        for path in ("/+status", "/+api", "/ann/+api", "/ann/dev/+api", "/+metrics", "/+health/live"):
            assert pair.replica.get(path).status == 200, path
        assert pair.replica.post("/+login", {"user": "ann", "password": "pw"}).status == 200
        assert status(pair.replica)["status"] == "fatal"

        pair.primary.start("--port", str(pair.primary.port))
        eventually(lambda: pair.replica.get("/ann/dev").status == 200)
        wire.send(request)
        assert wire.reply().body == replies[0].body
    finally:
        pair.end()


def test_a_replica_is_as_old_as_what_it_has_not_as_what_it_heard(tmp_path):
    """The primary responds, but what it says is not entered."""
    pair = HeldPair(tmp_path, "--max-staleness", "2", "--proxy-timeout", "0.5")
    try:
        with pair.mark("hold"):
            pair.new_file("stuck")
            eventually(lambda: pair.names("stuck")[0].status == 503, 5)
            # the primary takes what is passed on to it, and says what came of it
            assert pair.replica.put("/joe", {"password": "x"}, user="root").status in (201, 503)
            assert pair.replica.get("/ann/dev", headers={"X-DEVPI-MIN-SERIAL": "100"}).status == 200
        eventually(lambda: pair.names("stuck")[0].status == 200)
    finally:
        pair.end()


@pytest.mark.parametrize("text", ["1", "0", "-5", "x", "1e9"])
def test_a_staleness_that_no_replica_can_keep_is_refused(tmp_path, text):
    import devpi_lite
    with pytest.raises(ValueError):
        devpi_lite._staleness(text)
