"""A replica passes changes on to its primary: what goes out, what comes back, what happens if the primary does not."""

import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest

from harness import (
    ANY, Server, Wire, blobs, eventually, links, memory, multipart, patched, timed, upload, user_pass, wheel)

REPLICA = """
from types import SimpleNamespace

class App(devpi_lite.App):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        url = %r
        self.primary = devpi_lite.Primary(self.client, url, self.secret, self.store.node)
        self.replication = SimpleNamespace(wait_for=self.wait_for)

    def wait_for(self, serial, seconds):
        if serial > 1000:
            devpi_lite.time.sleep(seconds)
        return serial <= 1000

devpi_lite.App = App
"""
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


class FakePrimary(http.server.ThreadingHTTPServer):
    """Answers every request with `answer`: (status, reason, headers, body), or a function of the handler.

    `seen`: the requests, as (method, target, headers, SHA-256 of the body, its size)."""

    daemon_threads = True

    def __init__(self, certificate=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        if certificate:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(str(certificate))
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.seen, self.answer, self.refuses_expected = [], (200, "OK", {}, b"{}\n"), False
        self.connections = 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return "http://127.0.0.1:%d" % self.server_port

    def get_request(self):
        self.connections += 1
        return super().get_request()

    def handle_error(self, *_):
        pass

    def stop(self):
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def handle_expect_100(self):
        if self.server.refuses_expected:
            self.server.seen.append((self.command, self.path, self.headers, None, 0))
            self.answer()
            self.close_connection = True
            return False
        return super().handle_expect_100()

    def parse_request(self):
        parsed = super().parse_request()
        if parsed:
            setattr(self, "do_" + self.command, self.serve)
        return parsed

    def pieces(self):
        if self.headers["Transfer-Encoding"] == "chunked":
            while True:
                size = int(self.rfile.readline(), 16)
                piece = self.rfile.read(size)
                assert self.rfile.readline() == b"\r\n"
                if not size:
                    return
                yield piece
        left = int(self.headers["Content-Length"] or 0)
        while left:
            piece = self.rfile.read(min(left, 65536))
            if not piece:
                raise ConnectionError("the request broke off")
            left -= len(piece)
            yield piece

    def serve(self):
        digest, size = hashlib.sha256(), 0
        for piece in self.pieces():
            digest.update(piece)
            size += len(piece)
        self.server.seen.append((self.command, self.path, self.headers, digest.hexdigest(), size))
        if callable(self.server.answer):
            return self.server.answer(self)
        self.answer()

    def answer(self):
        self.answer_with(self.server.answer)

    def answer_with(self, response):
        status, reason, headers, body = response
        self.send_response(status, reason)
        for name, value in headers.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def fake():
    fake = FakePrimary()
    yield fake
    fake.stop()


@pytest.fixture(scope="module")
def shared_replica(tmp_path_factory, fake):
    folder = tmp_path_factory.mktemp("replica")
    server = Server(folder / "server").start()      # what comes from the primary by its log
    server.add_user("alice")
    server.add_index("alice/dev")
    upload(server, "alice/dev", wheel("here", "1.0"))
    server.stop()
    server.script = patched(folder, REPLICA % fake.url)
    server.start("--proxy-timeout", "0.3")
    yield server
    server.kill()


@pytest.fixture
def replica(shared_replica, fake):
    fake.seen.clear()
    fake.answer, fake.refuses_expected = (200, "OK", {"Content-Type": "application/json"}, b'{"message": "done"}\n'), False
    return shared_replica


def body_of(archive):
    return multipart({":action": "file_upload", "name": archive.name, "version": archive.version},
                     {"content": (archive.filename, archive.content)})


# -- what goes to the primary


@pytest.mark.parametrize("method, path", [
    ("PUT", "/bob"), ("PATCH", "/alice"), ("DELETE", "/alice"), ("PUT", "/alice/new"), ("PATCH", "/alice/dev"),
    ("DELETE", "/alice/dev?force"), ("POST", "/alice/dev/"), ("PUSH", "/alice/dev"), ("POST", "/alice/missing/"),
    ("PATCH", "/alice/dev/here"), ("PATCH", "/alice/dev/here/1.0"), ("DELETE", "/alice/dev/here/1.0"),
    ("DELETE", "/alice/dev/here"), ("DELETE", "/alice/dev/%2Bf/abc/here.whl"),
    ("PATCH", "/alice/dev/+f/abc/h%C3%A9re.whl?yank=a%20b&x=#1"), ("POST", "/alice/dev/+f/abc/here.whl"),
    ("POST", "/alice/dev/here"), ("POST", "/+outbox/retry")])
def test_a_change_is_passed_on_with_method_and_target_as_they_came(replica, fake, method, path):
    reply = replica.request(method, path, b"the body", headers={"Content-Type": "a/b", "X-Mine": "caf\xe9"})
    assert (reply.status, reply.body) == (200, b'{"message": "done"}\n')
    ((seen, target, headers, digest, size),) = fake.seen
    assert (seen, target, size) == (method, path.replace("#", "%23"), 8)
    assert (headers["Content-Type"], headers["X-Mine"], digest) == (
        "a/b", "caf\xe9", hashlib.sha256(b"the body").hexdigest())


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/alice/dev", 200), ("HEAD", "/alice/dev", 200), ("GET", "/alice/dev/+simple/here/", 200),
    ("HEAD", "/alice/dev/+simple/here/", 200), ("GET", "/+api", 200), ("POST", "/+api", 200),
    ("PUT", "/alice/dev/+f/abc/here.whl", 404), ("GET", "/alice/missing", 404), ("OPTIONS", "/alice/dev", 404),
    ("POST", "/", 404), ("POST", "/+changelog/1", 403), ("PUT", "/+authcheck", 400), ("MAKE", "/alice/dev", 404)])
def test_what_changes_nothing_is_served_here(replica, fake, method, path, status):
    assert replica.request(method, path, headers={"Accept": ANY}).status == status
    assert fake.seen == []


def test_a_login_is_served_here(replica, fake):
    replica.tokens.clear()
    token = replica.login("alice")
    auth = {"X-Devpi-Auth": user_pass("alice", token)}
    assert replica.get("/+api", headers=auth).result["authstatus"][:2] == ["ok", "alice"]
    assert fake.seen == []


def test_a_search_by_xmlrpc_is_served_here_and_an_upload_to_the_same_path_is_not(replica, fake):
    call = "<methodCall><methodName>search</methodName><params><param><value><struct><member><name>name</name>" \
           "<value><string>here</string></value></member></struct></value></param></params></methodCall>"
    reply = replica.post("/alice/dev", call, headers={"Content-Type": "text/xml"})
    assert reply.status == 200 and b"methodResponse" in reply.body
    assert fake.seen == []
    replica.post("/alice/dev", call, headers=FORM)
    assert len(fake.seen) == 1


def test_a_refresh_is_done_by_the_primary_and_then_here(replica, fake):
    fake.answer = (302, "Found", {"Location": "/elsewhere"}, b"")
    reply = replica.post("/alice/dev/+simple/Here/refresh")
    assert (reply.status, reply.headers["Location"]) == (302, replica.url + "/alice/dev/+simple/here/")
    assert [target for _, target, *_ in fake.seen] == ["/alice/dev/+simple/Here/refresh"]
    fake.answer = (403, "Forbidden", {}, b"no\n")
    reply = replica.post("/alice/dev/+simple/here/refresh")
    assert (reply.status, reply.body) == (403, b"no\n")


def test_no_endpoint_that_writes_is_local():
    import devpi_lite
    local = {each.endpoint.__name__ for entry in devpi_lite.ROUTES.values() for choice in entry.choices.values()
             for each in choice.routes if each.is_local}
    assert not {"create_user", "take_upload", "push", "delete_file", "yank_file", "modify_index", "retry_outbox"} & local
    for (path, _), entry in devpi_lite.ROUTES.items():
        for method, choice in entry.choices.items():
            kinds = {each.is_local for each in choice.routes}
            if method not in ("GET", "OPTIONS") and len(kinds) > 1:     # decided by the head alone
                assert {each.for_ for each in choice.routes if each.is_local} <= {"xml-rpc", "uploader"}, path


# -- headers on the way there


def test_credentials_come_along_and_what_belongs_to_the_connection_does_not(replica, fake):
    basic = "Basic " + user_pass("alice", "wrong")
    replica.put("/bob", b"{}", headers={
        "Authorization": basic, "X-Devpi-Auth": "abc", "Connection": "keep-alive, X-Hop", "X-Hop": "1", "TE": "trailers",
        "Keep-Alive": "5", "Upgrade": "h2c", "Proxy-Authorization": "secret", "Accept-Encoding": "gzip",
        "User-Agent": "devpi-client/7"})
    ((_, _, headers, _, _),) = fake.seen
    assert (headers["Authorization"], headers["X-Devpi-Auth"]) == (basic, "abc")
    assert (headers["Accept-Encoding"], headers["User-Agent"]) == ("gzip", "devpi-client/7")
    assert headers.get_all("Connection") == ["close"]
    assert not {"x-hop", "te", "keep-alive", "upgrade", "proxy-authorization"} & {name.lower() for name in headers}
    assert headers.get_all("Host") == ["127.0.0.1:%d" % fake.server_port]
    assert headers.get_all("X-DEVPI-PROXY") == ["replica"]
    assert headers.get_all("X-Outside-URL") == [replica.url]
    assert headers.get_all("X-Real-IP") == ["127.0.0.1"]
    assert headers.get_all("Content-Length") == ["2"]
    assert "Forwarded" not in headers


@pytest.mark.parametrize("said, address, is_local", [
    ({"X-Real-IP": "192.0.2.7"}, "192.0.2.7", False), ({"X-Forwarded-For": "192.0.2.7"}, "127.0.0.1", False),
    ({"Forwarded": "for=192.0.2.7"}, "127.0.0.1", False), ({"X-Real-IP": "127.0.0.1"}, "127.0.0.1", True)])
def test_the_primary_learns_of_the_client_what_the_replica_believes(replica, fake, said, address, is_local):
    replica.put("/bob", b"{}", headers=dict(said, **{"X-Outside-URL": "https://far.example/x"}))
    ((_, _, headers, _, _),) = fake.seen
    assert headers.get_all("X-Real-IP") == [address]
    assert "X-Forwarded-For" not in headers
    assert headers.get_all("Forwarded") == (None if is_local else ["for=unknown"])
    assert headers.get_all("X-Outside-URL") == ["https://far.example/x"]


def test_a_page_of_another_origin_is_refused_here(replica, fake):
    reply = replica.put("/bob", b"{}", headers={"Origin": "http://evil.example"})
    assert (reply.status, fake.seen) == (403, [])
    assert replica.put("/bob", b"{}", headers={"Origin": replica.url}).status == 200
    ((_, _, headers, _, _),) = fake.seen
    assert "Origin" not in headers


def test_an_absolute_target_names_a_path_only(replica, fake):
    data = b"PUT http://other.example:99/bob?x=%31 HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    assert replica.raw(data).startswith(b"HTTP/1.1 200 ")
    assert fake.seen[0][:2] == ("PUT", "/bob?x=%31")


def test_replicas_in_a_circle_do_not_pass_a_request_on_for_ever(replica, fake):
    reply = replica.put("/bob", b"{}", headers={"X-DEVPI-PROXY": "replica"})
    assert (reply.status, fake.seen) == (502, [])
    assert "is itself a replica" in reply.json()["message"]


# -- bodies


def test_a_large_body_streams_in_little_memory(replica, fake):
    piece, count = os.urandom(1 << 20), 20
    replica.put("/bob", b"{}")
    before = memory(replica, peak=True)
    with Wire(replica, b"POST /alice/dev/ HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (count << 20)) as wire:
        for _ in range(count):
            wire.send(piece)
        assert wire.reply().status == 200
    assert fake.seen[-1][4] == count << 20
    assert fake.seen[-1][3] == hashlib.sha256(piece * count).hexdigest()
    assert memory(replica, peak=True) - before < 8 << 20
    assert blobs(replica).keys() == {wheel("here", "1.0").sha256}


def test_a_chunked_body_stays_chunked(replica, fake):
    with Wire(replica, b"PUT /bob HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n") as wire:
        for piece in (b"abc", b"d" * 100000):
            wire.send(b"%x;x=y\r\n%b\r\n" % (len(piece), piece))
        wire.send(b"0\r\nTrailer: x\r\n\r\n")
        assert wire.reply().status == 200
        wire.send(b"GET /+api HTTP/1.1\r\nHost: a\r\n\r\n")
        assert wire.reply().status == 200
    ((_, _, headers, digest, size),) = fake.seen
    assert (headers["Transfer-Encoding"], headers["Content-Length"], size) == ("chunked", None, 100003)
    assert digest == hashlib.sha256(b"abc" + b"d" * 100000).hexdigest()


def test_a_body_is_asked_for_when_the_primary_asks_for_it(replica, fake):
    with Wire(replica, b"POST /alice/dev/ HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n") as wire:
        assert wire.input.readline() + wire.input.readline() == b"HTTP/1.1 100 Continue\r\n\r\n"
        wire.send(b"hello")
        assert wire.reply().status == 200
    ((_, _, headers, _, size),) = fake.seen
    assert (headers["Expect"], size) == ("100-continue", 5)


def test_a_body_that_the_primary_refuses_is_not_asked_for(replica, fake):
    fake.refuses_expected, fake.answer = True, (401, "Unauthorized", {"WWW-Authenticate": 'Basic realm="x"'}, b"no\n")
    with Wire(replica, b"POST /alice/dev/ HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n") as wire:
        assert wire.input.readline() == b"HTTP/1.1 401 Unauthorized\r\n"
        assert b"\r\nConnection: close\r\n" in wire.input.read()


def test_a_response_before_the_end_of_the_body_ends_the_sending(replica, fake):
    fake.answer = (413, "Too large", {"Connection": "close"}, b"too large\n")

    pieces = _Handler.pieces
    _Handler.pieces = lambda self: iter(())
    try:
        with Wire(replica, b"POST /alice/dev/ HTTP/1.1\r\nHost: a\r\nContent-Length: 90000000\r\n\r\n" + b"x" * 90000) as wire:
            time.sleep(0.05)
            wire.send(b"x")
            reply = wire.reply()
    finally:
        _Handler.pieces = pieces
    assert (reply.status, reply.reason, reply.body) == (413, "Too large", b"too large\n")


def test_a_body_that_breaks_off_breaks_off_there(replica, fake):
    with Wire(replica, b"POST /alice/dev/ HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\nabc") as wire:
        wire.socket.shutdown(socket.SHUT_WR)
        assert wire.reply().status == 400
    with Wire(replica, b"POST /alice/dev/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n") as wire:
        assert wire.reply().status == 400
    assert fake.seen == []


# -- what comes back


@pytest.mark.parametrize("status, reason, headers, body", [
    (200, "Upload of identical file to non volatile index.", {"Content-Type": "text/html"}, b""),
    (201, "Created", {"Content-Type": "application/json", "X-Devpi-Trigger": "queued"}, b"[]"),
    (401, "Unauthorized: taken", {"WWW-Authenticate": 'Basic realm="pypi"'}, b"no\n"),
    (403, "Forbidden: no permission", {"Content-Type": "text/plain"}, b"no\n"),
    (404, "Not Found", {}, b"nothing\n"), (409, "Conflict", {"Content-Type": "application/json"}, b'{"message": "is there"}'),
    (429, "Too Many Requests", {"Retry-After": "7"}, b"wait\n"), (503, "Busy", {"Retry-After": "1"}, b"busy\n"),
    (599, "Odd", {}, b"x"), (204, "No Content", {}, b"")])
def test_the_response_is_the_primarys(replica, fake, status, reason, headers, body):
    fake.answer = (status, reason, dict(headers, **{
        "X-DEVPI-SERIAL": "1", "X-DEVPI-UUID": "other", "Server": "other", "Keep-Alive": "9", "Connection": "X-Hop",
        "X-Hop": "1"}), body)
    reply = replica.put("/bob", b"{}")
    assert (reply.status, reply.reason, reply.body) == (status, reason, body)
    for name, value in headers.items():
        assert reply.headers.get_all(name) == [value]
    assert len(reply.headers.get_all("X-DEVPI-UUID")) == len(reply.headers.get_all("Date")) == 1
    assert "other" not in (reply.headers["X-DEVPI-UUID"], reply.headers["Server"])
    assert not {"Keep-Alive", "X-Hop"} & set(reply.headers)
    assert set(reply.headers.get_all("X-DEVPI-REPLICA-LAG", ["0"])) == {"0"}


def test_a_large_response_comes_in_pieces(replica, fake):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for _ in range(300):
            handler.wfile.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        handler.wfile.write(b"0\r\n\r\n")

    fake.answer = answer
    before = memory(replica, peak=True)
    reply = replica.put("/bob", b"{}")
    assert reply.body == b"x" * 65536 * 300
    assert memory(replica, peak=True) - before < 8 << 20


@pytest.mark.parametrize("location, here", [
    ("%s/bob", "%s/bob"), ("%s", "%s"), ("/bob", "/bob"), ("http://other.example/", "http://other.example/")])
def test_a_location_on_the_primary_is_one_here_and_is_not_followed(replica, fake, location, here):
    fake.answer = (302, "Found", {"Location": location.replace("%s", fake.url)}, b"")
    reply = replica.put("/bob", b"{}")
    assert (reply.status, reply.headers["Location"]) == (302, here.replace("%s", replica.url))
    assert len(fake.seen) == 1
    fake.answer = (302, "Found", {"Location": fake.url + "1/x"}, b"")       # another port
    assert replica.put("/bob", b"{}").headers["Location"] == fake.url + "1/x"


def test_a_change_that_does_not_come_back_in_time_is_said_to_be_late(replica, fake):
    fake.answer = (201, "Created", {"X-DEVPI-SERIAL": "2000"}, b"{}")
    began = time.monotonic()
    reply = replica.put("/bob", b"{}")
    assert time.monotonic() - began > 0.29
    assert reply.status == 201
    assert reply.headers.get_all("X-DEVPI-SERIAL") == ["2000"], "that of the change, which a reader needs"
    here = int(replica.get("/+api").headers["X-DEVPI-SERIAL"])
    assert reply.headers.get_all("X-DEVPI-REPLICA-LAG") == [str(2000 - here)]
    fake.answer = (404, "Not Found", {"X-DEVPI-SERIAL": "2000"}, b"{}")
    assert "X-DEVPI-REPLICA-LAG" not in replica.put("/bob", b"{}").headers


# -- a primary that is away or breaks off


def test_a_primary_that_is_away_is_503_and_reading_goes_on(tmp_path, make_server):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = "http://127.0.0.1:%d" % listener.getsockname()[1]
    replica = make_server(script=patched(tmp_path, REPLICA % url))
    message = "the primary %s can't be reached, try again" % url
    reply = replica.put("/bob", {"password": "x"})
    assert (reply.status, reply.headers["Retry-After"], reply.json()["message"]) == (503, "10", message)
    reply = replica.post("/root/x/", *body_with_type(), headers={"Accept": ANY})
    assert (reply.status, reply.reason, reply.headers["Retry-After"]) == (503, message, "10")
    assert replica.get("/root").status == 200


def body_with_type():
    return (body_of(wheel("p", "1.0"))[0],)


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 201 Cre", b"HTTP/1.1 201 Created\r\nContent-Length: 9\r\n\r\nabc",
                                  b"HTTP/1.1 201 Created\r\nContent-Type: te", b"nonsense\r\n\r\n"])
def test_a_primary_that_breaks_off_is_502_and_is_asked_once(replica, fake, sent):
    def answer(handler):
        handler.wfile.write(sent)
        handler.close_connection = True

    fake.answer = answer
    connections = fake.connections
    reply = replica.put("/bob", {"password": "x"})
    assert reply.status == 502
    assert "may have happened" in reply.json()["message"]
    assert (len(fake.seen), fake.connections - connections) == (1, 1)


def test_a_primary_that_hangs_holds_up_no_reader(tmp_path, make_server):
    hanging = FakePrimary()
    release = threading.Event()
    hanging.answer = lambda handler: release.wait(30) and handler.answer_with((200, "OK", {}, b"done\n"))
    replica = make_server("--threads", "4", script=patched(tmp_path, REPLICA % hanging.url))
    wires = [Wire(replica, b"PUT /bob HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}") for _ in range(30)]
    try:
        # two thirds of three times as many; a place is free for a moment between head and response
        eventually(lambda: len(hanging.seen) >= 8)
        reply = replica.put("/bob", {"password": "x"})
        assert (reply.status, reply.headers["Retry-After"]) == (503, "10")
        assert "too many requests wait" in reply.json()["message"]
        assert timed(replica.get, "/root")[1] < 1
        release.set()
        statuses = [wire.reply().status for wire in wires]
        assert 8 <= statuses.count(200) <= 12 and statuses.count(503) == 30 - statuses.count(200)
    finally:
        release.set()
        for wire in wires:
            wire.socket.close()
        hanging.stop()


def test_a_primary_with_tls(tmp_path, make_server):
    from client import CERTIFICATE      # not at the top: it compiles the client
    (tmp_path / "secure.pem").write_text(CERTIFICATE)
    secure = FakePrimary(tmp_path / "secure.pem")
    url = secure.url.replace("http:", "https:")
    script = patched(tmp_path, REPLICA % url)
    try:
        stranger = make_server(script=script)
        assert stranger.put("/bob", b"{}").status == 503       # nobody vouches for the certificate
        replica = make_server(script=script, env={"SSL_CERT_FILE": str(tmp_path / "secure.pem")})
        body = os.urandom(5 << 20)
        for framing in (b"", b"Expect: 100-continue\r\n"):
            with Wire(replica, b"PUT /bob HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n%b\r\n" % (len(body), framing)) as wire:
                if framing:
                    assert wire.input.readline() + wire.input.readline() == b"HTTP/1.1 100 Continue\r\n\r\n"
                wire.send(body)
                assert wire.reply().status == 200
            assert secure.seen[-1][3] == hashlib.sha256(body).hexdigest()
        secure.refuses_expected, secure.answer = True, (401, "Unauthorized", {}, b"no\n")
        with Wire(replica, b"PUT /bob HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n") as wire:
            assert wire.input.readline() == b"HTTP/1.1 401 Unauthorized\r\n"
    finally:
        secure.stop()


# -- clients


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize("options", [[], ["-H", "Expect: 100-continue"], ["-H", "Transfer-Encoding: chunked"], ["-0"]])
def test_curl_uploads_a_form(replica, fake, tmp_path, options):
    (tmp_path / "x.whl").write_bytes(os.urandom(3 << 20))
    done = subprocess.run(
        ["curl", "-sS", "-m", "20", "-F", ":action=file_upload", "-F", "content=@%s" % (tmp_path / "x.whl"), *options,
         "-w", "%{http_code}", replica.url + "/alice/dev/"], capture_output=True, text=True)
    assert done.stdout.endswith("200"), done
    assert fake.seen[-1][4] > 3 << 20


def test_a_real_primary_takes_what_the_replica_passes_on(make_server, tmp_path):
    primary = make_server("--outside-url", "http://primary.example")
    replica = make_server(script=patched(tmp_path, REPLICA % primary.url))
    reply = replica.put("/bob", {"password": "pw"})
    assert reply.status == 201, reply
    assert replica.put("/bob", {"password": "pw"}).status == 409
    assert replica.put("/eve", {"password": "pw"}, headers={"X-Forwarded-For": "192.0.2.1"}).status == 403
    primary.passwords["bob"] = "pw"
    token = primary.login("bob")
    replica.tokens["bob"] = token
    assert replica.put("/bob/dev", {}, user="bob").status == 200
    archive = wheel("demo", "1.0")
    reply = replica.upload("bob/dev", archive, user="bob", password="pw")
    assert reply.status == 200, reply
    assert replica.upload("bob/dev", archive, user="bob", password="no").status == 401
    (link,) = links(primary, "bob/dev/demo/1.0", rel="releasefile")
    assert link["href"].startswith("http://primary.example/bob/dev/+f/")
    reply = replica.post("/bob/dev/+simple/demo/refresh")
    assert reply.status == 404      # the primary has done it; here is no such index
    reply = replica.post("/bob/dev/", archive.content[:2000000], user="bob", headers={"Expect": "100-continue"})
    assert reply.status == 400
    assert json.loads(replica.patch("/bob", {"password": "new"}, user="bob").body)["message"].startswith("user updated")
    assert re.search(r"PUT /bob 201 ", primary.whole_output())


# -- a real primary and its real replica


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    primary = Server(folder / "primary", "--role", "primary").start()
    replica = Server(folder / "replica", "--primary-url", primary.url, "--secretfile", folder / "primary" / ".secret",
                     root_password=None, root_pypi=True).start()
    yield primary, replica
    for server in (replica, primary):
        server.kill()


def test_what_a_replica_passed_on_is_there_at_once(pair):
    primary, replica = pair
    reply = replica.put("/bob", {"password": "pw"})
    assert reply.status == 201, reply
    assert reply.headers.get_all("X-DEVPI-REPLICA-LAG") == ["0"]
    replica.passwords["bob"] = primary.passwords["bob"] = "pw"
    replica.login("bob")
    assert replica.put("/bob/dev", {}, user="bob").status == 200
    for number in range(5):
        archive = wheel("demo", "1.%d" % number)
        reply = replica.upload("bob/dev", archive, user="bob", password="pw")
        assert (reply.status, reply.headers.get_all("X-DEVPI-REPLICA-LAG")) == (200, ["0"]), reply
        assert archive.filename in replica.filenames("bob/dev", "demo")
        assert replica.fetch("bob/dev", archive.filename, "demo") == archive.content
    assert replica.filenames("bob/dev", "demo") == primary.filenames("bob/dev", "demo")
    assert replica.upload("bob/dev", wheel("demo", "2.0"), user="bob", password="no").status == 401
    assert replica.patch("/bob/dev/demo/1.0", {"yanked": "bad"}, user="bob").status == 200
    assert replica.simple("bob/dev", "demo")["files"][0]["yanked"] == "bad"
    reply = replica.push("bob/dev", "demo", "1.1", user="bob", targetindex="bob/dev")
    assert reply.status != 503, reply
    reply = replica.patch("/bob", {"password": "new"}, user="bob")
    assert reply.status == 200, reply
    assert replica.post("/+login", {"user": "bob", "password": "pw"}).status == 401
    assert replica.post("/+login", {"user": "bob", "password": "new"}).status == 200
    token = replica.login("bob", "new")
    assert primary.get("/+api", headers={"X-Devpi-Auth": user_pass("bob", token)}).result["authstatus"][0] == "ok"
    replica.add_index("bob/volatile", volatile=True)
    upload(replica, "bob/volatile", wheel("gone", "1.0"))
    assert replica.delete("/bob/volatile/gone/1.0", user="bob").status == 200
    assert replica.get("/bob/volatile/gone/1.0").status == 404
    assert replica.delete("/bob/volatile", user="bob").status == 201
    assert replica.get("/bob/volatile").status == 404
    assert replica.post("/bob/dev/+simple/demo/refresh").status == 302


def test_twenty_people_upload_through_a_replica_at_once(pair):
    primary, replica = pair
    replica.add_user("crowd")
    replica.add_index("crowd/dev")
    found = []

    def work(number):
        archive = wheel("p%d" % number, "1.0")
        reply = replica.upload("crowd/dev", archive)
        found.append((reply.status, replica.filenames("crowd/dev", "p%d" % number) == [archive.filename]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(200, True)] * 20


def test_a_replica_whose_primary_is_gone_takes_logins_and_no_changes(pair):
    primary, replica = pair
    replica.add_user("late")
    primary.stop()
    reply = replica.put("/late/dev", {}, user="late")
    assert (reply.status, reply.headers["Retry-After"]) == (503, "10")
    assert replica.post("/+login", {"user": "late", "password": "pw"}).status == 200
    assert replica.get("/late").status == 200
    primary.start("--port", replica.options[1].rpartition(":")[2])
    assert replica.put("/late/dev", {}, user="late").status == 200
    assert replica.get("/late/dev").status == 200
