"""HTTP itself: request heads, bodies, connections, the headers and errors that every answer shares, absolute URLs."""

import ast
import contextlib
import itertools
import json
import os
import random
import re
import resource
import socket
import ssl
import time

import pytest

import devpi_lite
from harness import (
    BROWSER, SIMPLE_JSON, SOURCE, Server, Wire, user_pass, eventually, multipart, patched, wheel)

LOGIN = b'{"user": "root", "password": "secret"}'
BAD_JSON = "Bad request: could not decode json"
BODY_LIMIT = 4000
OUTSIDE = "https://index.example/sub"


@pytest.fixture(scope="module", autouse=True)
def many_descriptors():
    """Room for 2,000 connections in this process, and in the server that inherits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 6000 if hard == resource.RLIM_INFINITY else min(6000, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted) if soft != resource.RLIM_INFINITY else soft, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def site(shared_server):
    """The shared server with the index http/dev, which holds pkg 1.0."""
    shared_server.add_user("http")
    shared_server.add_index("http/dev", bases=[])
    shared_server.package = wheel("pkg", "1.0")
    assert shared_server.upload("http/dev", shared_server.package).status == 200
    return shared_server


@pytest.fixture(scope="module")
def proxied(tmp_path_factory):
    """A server that knows its outside URL and takes bodies of up to BODY_LIMIT bytes; it has the index http/dev."""
    server = Server(
        tmp_path_factory.mktemp("proxied") / "server", "--outside-url", OUTSIDE, "--max-request-body-size", BODY_LIMIT
    ).start()
    server.add_user("http")
    server.add_index("http/dev", bases=[])
    yield server
    if server.running:
        server.kill()


def head(first="GET /+api HTTP/1.1", *lines, host=True):
    """The bytes of a request head; each line str (latin-1) or bytes."""
    lines = (first,) + (("Host: localhost",) if host else ()) + lines
    return b"".join((line if isinstance(line, bytes) else line.encode("latin-1")) + b"\r\n" for line in lines) + b"\r\n"


def post(body, *lines, first="POST /+login HTTP/1.1"):
    return head(first, "Content-Length: %d" % len(body), *lines) + body


def chunked(*pieces, tail=b"0\r\n\r\n", first="POST /+login HTTP/1.1"):
    return (
        head(first, "Transfer-Encoding: chunked")
        + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
        + tail
    )


def assert_devpi_headers(headers, is_page=False):
    assert headers.get("X-DEVPI-API-VERSION") == "2"
    assert headers.get("X-DEVPI-SERVER-VERSION") == "6.20.3"
    assert re.fullmatch(r"\d+", headers.get("X-DEVPI-SERIAL"))
    assert re.fullmatch(r"[0-9a-f]{32}", headers.get("X-DEVPI-UUID"))
    assert headers.get("X-DEVPI-PRIMARY-UUID") == headers.get("X-DEVPI-UUID")
    assert headers.get("X-DEVPI-MASTER-UUID") == (None if is_page else headers.get("X-DEVPI-UUID"))


def assert_refused(server, data, *statuses):
    """One answer with one of the statuses and our headers, then the connection ends: what follows is not trusted."""
    with Wire(server, data) as wire:
        reply = wire.reply()
        assert reply.status in statuses, reply
        assert_devpi_headers(reply.headers)
        assert reply.body
        assert wire.closed()


# -- request heads --------------------------------------------------------------------------------


BAD_HEADS = {
    "bare LF after the request line": b"GET /+api HTTP/1.1\nHost: localhost\r\n\r\n",
    "bare LF between headers": b"GET /+api HTTP/1.1\r\nHost: localhost\nX-A: b\r\n\r\n",
    "a head of bare LFs": b"GET /+api HTTP/1.1\nHost: localhost\n\n\r\n\r\n",
    "bare CR in a value": head("GET /+api HTTP/1.1", "X-A: b\rc"),
    "bare CR in the request line": b"GET /+api\r HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "NUL in a value": head("GET /+api HTTP/1.1", "X-A: b\0c"),
    "NUL in a name": head("GET /+api HTTP/1.1", "X\0A: b"),
    "NUL in the path": head("GET /\0 HTTP/1.1"),
    "control character in the path": head("GET /a\x01b HTTP/1.1"),
    "folded header": head("GET /+api HTTP/1.1", "X-A: b", " folded: c"),
    "folded first header": b"GET /+api HTTP/1.1\r\n Host: localhost\r\n\r\n",
    "tab-folded header": head("GET /+api HTTP/1.1", "X-A: b", "\tc"),
    "space before the colon": head("GET /+api HTTP/1.1", "X-A : b"),
    "space in a name": head("GET /+api HTTP/1.1", "X A: b"),
    "no colon": head("GET /+api HTTP/1.1", "X-A"),
    "empty name": head("GET /+api HTTP/1.1", ": b"),
    "bracket in a name": head("GET /+api HTTP/1.1", "X(A): b"),
    "non-ASCII name": head("GET /+api HTTP/1.1", "X-\xe4: b"),
    "no Host": head("GET /+api HTTP/1.1", host=False),
    "two Hosts": head("GET /+api HTTP/1.1", "Host: localhost"),
    "Host with a space": head("GET /+api HTTP/1.1", "Host: local host", host=False),
    "Host with a path": head("GET /+api HTTP/1.1", "Host: localhost/a", host=False),
    "Host with markup": head("GET /+api HTTP/1.1", 'Host: a"><b', host=False),
    "no version": head("GET /+api"),
    "no path": head("GET HTTP/1.1"),
    "only a method": head("GET"),
    "space in the path": head("GET /a b HTTP/1.1"),
    "two spaces": head("GET  /+api HTTP/1.1"),
    "tab for a space": head("GET\t/+api\tHTTP/1.1"),
    "space at the end": head("GET /+api HTTP/1.1 "),
    "space before the method": head(" GET /+api HTTP/1.1"),
    "bracket in the method": head("G(T /+api HTTP/1.1"),
    "path without a slash": head("GET api HTTP/1.1"),
    "protocol in small letters": head("GET /+api http/1.1"),
    "another protocol": head("GET /+api HTTQ/1.1"),
    "version with two digits": head("GET /+api HTTP/1.10"),
    "version without a dot": head("GET /+api HTTP/11"),
}


@pytest.mark.parametrize("data", BAD_HEADS.values(), ids=BAD_HEADS)
def test_a_malformed_head_is_400_and_ends_the_connection(shared_server, data):
    assert_refused(shared_server, data + head(), 400)


AMBIGUOUS_FRAMING = {
    "Content-Length and Transfer-Encoding": (["Content-Length: 5", "Transfer-Encoding: chunked"], b"0\r\n\r\n"),
    "Transfer-Encoding and Content-Length": (["Transfer-Encoding: chunked", "Content-Length: 0"], b"0\r\n\r\n"),
    "two Content-Lengths that differ": (["Content-Length: 2", "Content-Length: 3"], b"{} "),
    "two equal Content-Lengths": (["Content-Length: 2", "Content-Length: 2"], b"{}"),
    "a list of Content-Lengths": (["Content-Length: 2, 2"], b"{}"),
    "Content-Length with a plus": (["Content-Length: +2"], b"{}"),
    "negative Content-Length": (["Content-Length: -2"], b"{}"),
    "hexadecimal Content-Length": (["Content-Length: 0x2"], b"{}"),
    "Content-Length with an underscore": (["Content-Length: 0_2"], b"{}"),
    "Content-Length with a space": (["Content-Length: 0 2"], b"{}"),
    "fractional Content-Length": (["Content-Length: 2.0"], b"{}"),
    "Content-Length in superscript": (["Content-Length: \xb2"], b"{}"),
    "empty Content-Length": (["Content-Length:"], b""),
    "Content-Length in words": (["Content-Length: two"], b"{}"),
    "chunked twice": (["Transfer-Encoding: chunked, chunked"], b"0\r\n\r\n"),
    "two Transfer-Encodings": (["Transfer-Encoding: chunked", "Transfer-Encoding: identity"], b"0\r\n\r\n"),
    "chunked not last": (["Transfer-Encoding: chunked, gzip"], b"0\r\n\r\n"),
    "almost chunked": (["Transfer-Encoding: xchunked"], b"0\r\n\r\n"),
    "quoted chunked": (['Transfer-Encoding: "chunked"'], b"0\r\n\r\n"),
    "chunked after a vertical tab": (["Transfer-Encoding: \x0bchunked"], b"0\r\n\r\n"),
    "unknown coding": (["Transfer-Encoding: zstd"], b"{}"),
    "empty Transfer-Encoding": (["Transfer-Encoding:"], b""),
}


@pytest.mark.parametrize("lines, body", AMBIGUOUS_FRAMING.values(), ids=AMBIGUOUS_FRAMING)
def test_a_body_whose_end_is_in_doubt_is_refused_and_nothing_after_it_is_read(shared_server, lines, body):
    unknown_coding = any("zstd" in line or "gzip" in line or "xchunked" in line for line in lines)
    assert_refused(
        shared_server, head("POST /+login HTTP/1.1", *lines) + body + head(), *([400, 501] if unknown_coding else [400])
    )


def test_http_1_0_with_chunks_is_refused(shared_server):
    assert_refused(shared_server, chunked(LOGIN, first="POST /+login HTTP/1.0"), 400)


@pytest.mark.parametrize("version", ["HTTP/2.0", "HTTP/3.0", "HTTP/0.9"])
def test_an_http_version_that_is_not_1_is_505(shared_server, version):
    assert_refused(shared_server, head("GET /+api " + version), 505)


@pytest.mark.parametrize(
    "data",
    [
        head("GET /%s HTTP/1.1" % ("a" * 100000)),
        head("GET /+api HTTP/1.1", "X-A: " + "a" * 100000),
        head("GET /+api HTTP/1.1", *["X-%d: b" % number for number in range(5000)]),
    ],
    ids=["long path", "long value", "many headers"],
)
def test_a_giant_head_is_refused(shared_server, data):
    assert_refused(shared_server, data, 400, 414, 431)


def test_a_head_without_end_is_cut_off(shared_server):
    with Wire(shared_server) as wire:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(5000):
                wire.send(b"a" * 10000)
            pytest.fail("50 MB of a head were taken")
    assert shared_server.get("/+api").status == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n" + head(),
        head("GET http://localhost/+api HTTP/1.1"),
        head("GET /+api HTTP/1.1", "X-Empty:", "X-Tab:\tb", "x-latin: \xe4\xf6", "X-Long: " + "a" * 20000),
        head("GET /+api HTTP/1.1", "host: localhost:%d" % 65535, host=False),
        head("GET /+api HTTP/1.1", "Host: [::1]:80", host=False),
        head("GET /+api?a=b&c=%20 HTTP/1.1"),
    ],
    ids=[
        "an empty line first",
        "absolute form",
        "odd but valid headers",
        "host in small letters",
        "IPv6 host",
        "query",
    ],
)
def test_what_the_standard_allows_is_understood(shared_server, data):
    with Wire(shared_server, data) as wire:
        reply = wire.reply()
        assert (reply.status, reply.json()["type"]) == (200, "apiconfig")


def test_a_head_may_come_byte_by_byte(shared_server):
    with Wire(shared_server) as wire:
        for byte in head():
            wire.send(bytes([byte]))
        assert wire.reply().status == 200


# -- bodies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        chunked(LOGIN),
        chunked(*[LOGIN[at : at + 1] for at in range(len(LOGIN))]),
        chunked(LOGIN, tail=b"0\r\nX-Checksum: abc\r\nX-More: d\r\n\r\n"),
        head("POST /+login HTTP/1.1", "transfer-encoding: CHUNKED")
        + b"00%X;name=value\r\n%s\r\n000\r\n\r\n" % (len(LOGIN), LOGIN),
    ],
    ids=["one chunk", "a chunk a byte", "trailers", "extension, zeros and capitals"],
)
def test_a_chunked_body_is_read_and_the_connection_goes_on(shared_server, data):
    with Wire(shared_server, data + head()) as wire:
        assert wire.reply("POST").json()["message"] == "login successful"
        assert wire.reply().json()["type"] == "apiconfig"


BAD_CHUNKS = {
    "no number": b"zz\r\n{}\r\n0\r\n\r\n",
    "empty size": b"\r\n{}\r\n0\r\n\r\n",
    "negative size": b"-2\r\n{}\r\n0\r\n\r\n",
    "plus": b"+2\r\n{}\r\n0\r\n\r\n",
    "0x": b"0x2\r\n{}\r\n0\r\n\r\n",
    "underscore": b"0_2\r\n{}\r\n0\r\n\r\n",
    "space before the size": b" 2\r\n{}\r\n0\r\n\r\n",
    "bare LF after the size": b"2\n{}\r\n0\r\n\r\n",
    "longer than announced": b"2\r\n{}{}\r\n0\r\n\r\n",
    "no CRLF after the chunk": b"2\r\n{}0\r\n\r\n",
    "bare LF after the chunk": b"2\r\n{}\n0\r\n\r\n",
    "endless extension": b"2;" + b"a" * 200000 + b"\r\n{}\r\n0\r\n\r\n",
    "bad trailer": b"2\r\n{}\r\n0\r\nno colon here\r\n\r\n",
    "endless trailers": b"2\r\n{}\r\n0\r\n" + b"X-A: b\r\n" * 30000 + b"\r\n",
}


@pytest.mark.parametrize("body", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_bad_chunks_are_refused_and_nothing_after_them_is_read(shared_server, body):
    with Wire(shared_server) as wire:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            wire.send(head("POST /+login HTTP/1.1", "Transfer-Encoding: chunked") + body + head())
        reply = wire.reply("POST")
        assert reply.status in ((400, 431) if b"X-A: b" in body else (400,)), reply
        assert wire.closed()


@pytest.mark.parametrize("size", [b"7fffffffffffffff", b"ffffffffffffffffffffff", b"1" * 1000])
def test_a_chunk_of_absurd_size_is_refused_before_it_is_read(shared_server, size):
    assert_refused(
        shared_server, head("POST /+login HTTP/1.1", "Transfer-Encoding: chunked") + size + b"\r\n{}", 400, 413
    )


@pytest.mark.parametrize(
    "first",
    [
        "GET / HTTP/1.1",
        "HEAD / HTTP/1.1",
        "DELETE /nobody-here HTTP/1.1",
        "GET /+api HTTP/1.1",
        "PUSH /no/index HTTP/1.1",
        "POST /no/such/path/at/all HTTP/1.1",
        "PATCH /+login HTTP/1.1",
        "OPTIONS / HTTP/1.1",
    ],
)
@pytest.mark.parametrize("frame", [post, lambda body, first: chunked(body, first=first)], ids=["length", "chunked"])
def test_the_body_of_any_request_is_consumed(shared_server, first, frame):
    body = head("GET /smuggled HTTP/1.1") * 3  # would be answered if it were taken for requests
    with Wire(shared_server, frame(body, first=first) + head()) as wire:
        wire.reply(first.split()[0])
        assert wire.reply().json()["type"] == "apiconfig"
        wire.send(head("GET /nobody-here HTTP/1.1"))
        assert wire.reply().json()["message"] == "no user 'nobody-here'"


def test_a_large_body_of_a_refused_request_is_consumed_too(shared_server):
    with Wire(shared_server, post(b"x" * 3000000, first="POST /no/such/path HTTP/1.1") + head()) as wire:
        assert wire.reply().status == 404
        assert wire.reply().status == 200


def test_push_is_a_method(site):
    """It reaches the routes: nothing is wrong with the request as HTTP, whether or not pushing is built."""
    reply = site.request("PUSH", "/no/index", {})
    assert reply.status == 404
    assert reply.json()["message"]


def test_expect_100_continue_is_answered_before_the_body_is_sent(shared_server):
    with Wire(
        shared_server, head("POST /+login HTTP/1.1", "Content-Length: %d" % len(LOGIN), "Expect: 100-continue")
    ) as wire:
        assert wire.input.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert wire.input.readline() == b"\r\n"
        wire.send(LOGIN)
        assert wire.reply("POST").status == 200
        wire.send(head())
        assert wire.reply().status == 200


def test_an_upload_with_expect_100_continue_arrives(site):
    package = wheel("expected", "1.0", size=200000)
    form = dict(package.fields, **{":action": "file_upload"})
    body, content_type = multipart(form, {"content": (package.filename, package.content)})
    with Wire(
        site,
        head(
            "POST /http/dev/ HTTP/1.1",
            "Content-Type: " + content_type,
            "Content-Length: %d" % len(body),
            "Expect: 100-continue",
            "Authorization: Basic " + user_pass("http", "pw"),
        ),
    ) as wire:
        assert wire.input.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert wire.input.readline() == b"\r\n"
        wire.send(body)
        assert wire.reply("POST").status == 200
    assert site.fetch("http/dev", package.filename, "expected") == package.content


@pytest.mark.parametrize(
    "path, method",
    [
        ("/+login", "POST"),
        ("/someone", "PUT"),
        ("/http", "PATCH"),
        ("/http/new", "PUT"),
        ("/http/dev", "PATCH"),
    ],
)
@pytest.mark.parametrize(
    "body",
    [b"{", b"{'user': 1}", b"\xff\xfe{}", b"nul", b'{"a": 1} x', b'{"a": [-%s]}' % (b"7" * 2000)],
    ids=lambda body: repr(body[:20]),
)
def test_malformed_json_is_400_with_devpis_message(site, path, method, body):
    reply = site.request(method, path, body, user="http", password="pw")
    assert (reply.status, reply.json()["message"]) == (400, BAD_JSON)


@pytest.mark.parametrize(
    "path, method",
    [("/+login", "POST"), ("/someone", "PUT"), ("/http", "PATCH"), ("/http/new", "PUT"), ("/http/dev", "PATCH")],
)
@pytest.mark.parametrize(
    "body",
    [b"3", b'"text"', b"null", b"[[]]", b"[" * 16000, b'{"a":' * 3000, b"1" * 10000],
    ids=["number", "text", "null", "list", "deep list", "deep object", "long number"],
)
def test_json_of_the_wrong_shape_is_400_with_a_sentence(site, path, method, body):
    reply = site.request(method, path, body, user="http", password="pw")
    assert reply.status == 400
    assert len(reply.json()["message"]) > 5


# -- the limit on bodies --------------------------------------------------------------------------


def login_body(size):
    return json.dumps({"user": "root", "password": "secret"}).ljust(size).encode()


def test_a_body_of_exactly_the_limit_is_taken(proxied):
    assert proxied.post("/+login", login_body(BODY_LIMIT)).status == 200


@pytest.mark.parametrize("path", ["/+login", "/http/dev/", "/no/such/path"])
def test_a_body_over_the_limit_is_413_before_it_is_sent(proxied, path):
    with Wire(
        proxied, head("POST %s HTTP/1.1" % path, "Content-Length: %d" % (BODY_LIMIT + 1), "Expect: 100-continue")
    ) as wire:
        assert wire.input.peek()[:12] == b"HTTP/1.1 413"  # no 100 Continue before it
        reply = wire.reply("POST")
        assert_devpi_headers(reply.headers)
        assert str(BODY_LIMIT) in reply.text


def test_a_chunked_body_over_the_limit_is_413(proxied):
    piece = b" " * 1000
    with Wire(proxied, chunked(*[piece] * (BODY_LIMIT // 1000 + 1))) as wire:
        assert wire.reply("POST").status == 413


def test_a_refused_large_body_does_not_hide_the_answer(proxied):
    """The sender who doesn't wait for 100 Continue still gets to read the 413."""
    reply = proxied.post("/+login", login_body(2000000))
    assert reply.status == 413
    assert str(BODY_LIMIT) in reply.json()["message"]


# -- connections ----------------------------------------------------------------------------------


def test_requests_sent_at_once_are_answered_in_order(shared_server):
    data = b"".join(head("GET /nobody-%d HTTP/1.1" % number) for number in range(50))
    data += post(LOGIN) + head("HEAD /+api HTTP/1.1") + head()
    with Wire(shared_server, data) as wire:
        for number in range(50):
            assert wire.reply().json()["message"] == "no user 'nobody-%d'" % number
        assert wire.reply("POST").json()["message"] == "login successful"
        assert wire.reply("HEAD").body == b""
        assert wire.reply().json()["type"] == "apiconfig"


def test_quick_answers_do_not_overtake_slow_ones(site):
    """A login, which is slow, is followed by what is answered at once."""
    with Wire(site, (post(LOGIN) + head("GET /http/dev/+simple/pkg/ HTTP/1.1", "Accept: " + SIMPLE_JSON)) * 3) as wire:
        for _ in range(3):
            assert wire.reply("POST").json()["message"] == "login successful"
            assert wire.reply().json()["name"] == "pkg"


def test_a_connection_is_kept_open_for_more_requests(shared_server):
    with Wire(shared_server) as wire:
        for _ in range(20):
            wire.send(head())
            reply = wire.reply()
            assert reply.status == 200
            assert (reply.headers.get("Connection") or "keep-alive").lower() == "keep-alive"


def test_small_answers_do_not_wait_for_delayed_acknowledgements(shared_server):
    def answers_come_at_once():
        with Wire(shared_server) as wire:
            started = time.monotonic()
            for number in range(50):
                wire.send(head("GET /nobody-%d HTTP/1.1" % number))
                wire.reply()
            return time.monotonic() - started < 1.5  # at 40 ms each it would be 2

    eventually(answers_come_at_once, 60)  # others may keep the machine busy


@pytest.mark.parametrize(
    "data",
    [
        head("GET /+api HTTP/1.1", "Connection: close"),
        head("GET /+api HTTP/1.1", "Connection: Keep-Alive, CLOSE"),
        post(LOGIN, "Connection: close"),
        head("GET /+api HTTP/1.0"),
        head("GET /+api HTTP/1.0", host=False),
    ],
    ids=["close", "close in a list", "close after a POST", "HTTP/1.0", "HTTP/1.0 without Host"],
)
def test_the_connection_ends_where_the_client_wants_it(shared_server, data):
    with Wire(shared_server, data) as wire:
        reply = wire.reply()
        assert reply.status == 200
        assert reply.headers.get("Connection").lower() == "close"
        assert wire.closed()


def test_requests_after_connection_close_are_not_answered(shared_server):
    with Wire(shared_server, head("GET /+api HTTP/1.1", "Connection: close") + head()) as wire:
        assert wire.reply().status == 200
        assert wire.closed()


def test_a_client_that_has_closed_its_side_still_gets_its_answers(shared_server):
    with Wire(shared_server, head() + post(LOGIN)) as wire:
        wire.socket.shutdown(socket.SHUT_WR)
        assert wire.reply().status == 200
        assert wire.reply("POST").status == 200
        assert wire.closed()


def test_2000_idle_connections_do_not_hold_up_a_request(shared_server):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 4600:
        pytest.skip("no room for as many descriptors")  # the server takes two for each connection, and some more
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(shared_server.connect()) for _ in range(2000)]
        for first in range(0, 2000, 200):  # half of them idle after a request, half before the first
            for connection in idle[first : first + 200 : 2]:
                connection.sendall(head())
            for connection in idle[first : first + 200 : 2]:  # more at a time might be 503, too much to wait for
                assert connection.recv(100000)[:15] == b"HTTP/1.1 200 OK"
        started = time.monotonic()
        assert shared_server.get("/+api").status == 200
        assert shared_server.post("/+login", LOGIN).status == 200
        assert time.monotonic() - started < 15  # and not when the idle ones have gone
        threads = "/proc/%d/task" % shared_server.pid
        if os.path.exists(threads):
            assert len(os.listdir(threads)) < 150
        for connection in idle[:20] + idle[-20:]:
            connection.sendall(head())
            assert connection.recv(100000)[:15] == b"HTTP/1.1 200 OK"


def test_slow_heads_do_not_hold_up_a_request(shared_server):
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(Wire(shared_server, head()[:20])) for _ in range(200)]
        started = time.monotonic()
        assert shared_server.post("/+login", LOGIN).status == 200
        assert time.monotonic() - started < 15  # a slow head has 30 s
        for wire in slow:
            wire.send(head()[20:])
        for wire in slow:
            assert wire.reply().status == 200


def test_slow_bodies_do_not_hold_up_a_request(shared_server):
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(Wire(shared_server, post(LOGIN)[:-5])) for _ in range(20)]
        started = time.monotonic()
        assert shared_server.get("/nobody-here").status == 404
        assert time.monotonic() - started < 15  # a slow body has 60 s
        for wire in slow[:4]:
            wire.send(LOGIN[-5:])
            assert wire.reply("POST").status == 200


def test_clients_that_vanish_in_the_middle_leave_no_trace(site):
    form = multipart(
        {":action": "file_upload", "name": "vanished", "version": "1.0"},
        {"content": ("vanished-1.0.tar.gz", b"x" * 100000)},
    )[0]
    for data in (
        head()[:10],
        post(LOGIN)[:-3],
        post(form, "Authorization: Basic aHR0cDpwdw==", first="POST /http/dev/ HTTP/1.1")[:-50000],
    ):
        Wire(site, data).socket.close()
    assert site.get("/http/dev/+simple/vanished/").status == 404
    assert "Traceback" not in site.whole_output()


# -- paths and methods ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, same",
    [
        ("/%2Bapi", "/+api"),
        ("/%2bapi", "/+api"),
        ("//+api", "/+api"),
        ("//http/dev/+api", "/http/dev/+api"),
        ("//http/dev", "/http/dev"),
        ("/%68ttp/dev", "/http/dev"),
        ("/http/", "/http"),
        ("/http/dev/", "/http/dev"),
        ("/http/dev/pkg/", "/http/dev/pkg"),
        ("/http/dev/pkg/1.0/", "/http/dev/pkg/1.0"),
        ("/http/dev/%2Bsimple/pkg/", "/http/dev/+simple/pkg/"),
    ],
)
def test_other_spellings_of_a_path_lead_to_the_same(site, path, same):
    reply, expected = site.get(path), site.get(same)
    assert expected.status == 200
    assert (reply.status, reply.body) == (200, expected.body)


def test_a_file_is_found_under_the_path_that_pip_writes(site):
    (file,) = site.simple("http/dev", "pkg")["files"]
    path = "/http/dev/" + file["url"].partition("#")[0].replace("../../", "").replace("+f", "%2Bf")
    assert "/%2Bf/" in path
    reply = site.get(path, headers={"Accept": "*/*", "Accept-Encoding": "identity"})
    assert (reply.status, reply.body) == (200, site.package.content)


@pytest.mark.parametrize(
    "path",
    [
        "/http//dev",
        "/http/dev//",
        "/http/dev//pkg",
        "/http/dev//+simple/",
        "/http/dev/+simple//",
        "/http/dev/+simple//pkg/",
        "/http/dev/pkg//1.0",
        "/+api/",
        "/+login/",
        "/+status/",
        "/+nothing",
        "/http/+nothing",
        "/http/dev/+nothing",
        "/http/dev/+nothing/pkg/",
        "/a/b/c/d/e/f",
        "/http/dev/+f/../../../../../../etc/passwd",
        "/http/dev/+f/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/http/dev/+f/abc/def/..%2f..%2fx",
        "/http/dev/pkg/1.0/1.0/1.0",
    ],
)
def test_a_path_that_is_none_of_ours_is_404(site, path):
    reply = site.get(path)
    assert reply.status == 404, reply
    assert_devpi_headers(reply.headers)


@pytest.mark.parametrize(
    "path",
    [
        "/%00",
        "/http/%00",
        "/http/dev/+simple/%00/",
        "/http/dev/pkg/%00",
        "/%ff",
        "/http/dev/%ff%fe",
        "/%",
        "/%zz",
        "/http/dev/+simple/%2e%2e/",
        "/http/dev/+f/%00/a",
        "/?%ff",
        "/http/dev/+simple/pkg%0d%0aX-Evil:1/",
    ],
)
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_odd_characters_in_a_path_are_the_clients_fault(site, path, method):
    reply = site.request(method, path, {} if method == "PUT" else None)
    assert reply.status in (200, 302, 400, 403, 404) and (reply.status != 200 or path == "/?%ff"), reply
    assert reply.headers.get("X-Evil") is None


def test_a_double_slash_does_not_redirect_to_another_host(site):
    for path in (
        "//evil.example/dev/+simple/A_B/",
        "//evil.example/A/B_C/1",
        "//http/dev/+simple",
        "///http/dev/Some_Pkg",
    ):
        location = site.get(path, headers={"Accept": "text/html"}).headers.get("Location")
        assert location is None or location.startswith(site.url + "/"), (path, location)


@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", "/+login"),
        ("PUT", "/+login"),
        ("DELETE", "/+login"),
        ("PATCH", "/+login"),
        ("POST", "/http"),
        ("PUSH", "/http"),
        ("PUT", "/"),
        ("POST", "/"),
        ("DELETE", "/"),
        ("PATCH", "/"),
        ("PUT", "/http/dev/+simple/"),
        ("POST", "/http/dev/+simple/pkg/"),
        ("DELETE", "/http/dev/+simple/pkg/"),
        ("GET", "/http/dev/+simple/pkg/refresh"),
        ("PUT", "/http/dev/pkg"),
        ("PUT", "/http/dev/pkg/1.0"),
        ("POST", "/http/dev/pkg"),
        ("POST", "/+status"),
        ("OPTIONS", "/"),
        ("OPTIONS", "/http/dev"),
        ("TRACE", "/"),
        ("CONNECT", "/http"),
        ("FOO", "/http/dev"),
        ("get", "/http"),
        ("PROPFIND", "/http/dev/+simple/"),
    ],
)
def test_a_method_that_a_path_does_not_have_is_404(site, method, path):
    reply = site.request(method, path)
    assert reply.status == 404, reply
    assert_devpi_headers(reply.headers)


@pytest.mark.parametrize(
    "path, accept",
    [
        ("/", "application/json"),
        ("/+api", "application/json"),
        ("/nobody-here", "application/json"),
        ("/http", "*/*"),
        ("/http/dev", "application/json"),
        ("/http/dev/+simple/", SIMPLE_JSON),
        ("/http/dev/+simple/pkg/", SIMPLE_JSON),
        ("/http/dev/+simple/pkg/", "text/html"),
        ("/http/dev/+simple/missing/", "text/html"),
        ("/http/dev/pkg", "application/json"),
        ("/http/dev/+simple/Pkg/", "text/html"),
        ("FILE", "*/*"),
    ],
)
def test_head_is_get_without_the_body(site, path, accept):
    if path == "FILE":
        path = "/http/dev/" + site.simple("http/dev", "pkg")["files"][0]["url"].partition("#")[0].replace("../../", "")
    data = head("%s " + path + " HTTP/1.1", "Accept: " + accept)
    with Wire(site, data.replace(b"%s", b"HEAD") + data.replace(b"%s", b"GET")) as wire:
        got_head, got = wire.reply("HEAD"), wire.reply("GET")
    assert got_head.body == b""
    assert got_head.status == got.status
    changing = {"date", "x-request-id"}
    assert sorted(pair for pair in got_head.headers.items() if pair[0].lower() not in changing) == sorted(
        pair for pair in got.headers.items() if pair[0].lower() not in changing
    )
    assert int(got.headers["Content-Length"]) == len(got.body)


# -- routes ---------------------------------------------------------------------------------------


def each_route():
    """(path as it is written, its query, method, route) of all routes."""
    for (path, query), entry in devpi_lite.ROUTES.items():
        for method, choice in entry.choices.items():
            for route in choice.routes:
                yield path, query, method, route


def endpoint_functions():
    """The functions of the chapters of endpoints, as syntax trees."""
    text = SOURCE.read_text(encoding="utf-8")
    first, last = (text[:re.search(rf"(?m)^# \d+  {title}$", text).start()].count("\n")
                   for title in ("For people", "Commands"))
    return [node for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef) and first < node.lineno < last]


def test_every_route_names_its_audience_and_its_permission():
    used = {"for_": set(), "may": set()}
    for function in endpoint_functions():
        for decorator in function.decorator_list:
            kind = ast.unparse(decorator.func) if isinstance(decorator, ast.Call) else ""
            if kind == "action":        # a form: GET and POST for those who have logged in
                used["may"].add(decorator.keywords[0].value.value)
            if kind == "route":
                named = {keyword.arg: keyword.value.value for keyword in decorator.keywords}
                for key, values in used.items():
                    assert named.get(key), f"a route of {function.name} does not name {key}"
                    values.add(named[key])
    assert used["for_"] == set(devpi_lite.AUDIENCES)
    by_the_body = {"modify user", "change password"}
    assert used["may"] | by_the_body == set(devpi_lite.PERMISSIONS)


def test_a_route_for_an_unknown_audience_or_permission_is_none():
    for for_, may in (("anybody", "read"), ("people", "reed")):
        with pytest.raises(KeyError):
            devpi_lite.route("GET", "/+odd", for_=for_, may=may)


def test_no_endpoint_sees_to_what_its_route_says():
    endpoints = {route.endpoint.__name__ for *_, route in each_route()}
    functions = endpoint_functions()
    assert endpoints < {function.name for function in functions}
    for function in functions:
        for node in ast.walk(function):
            if isinstance(node, (ast.Assign, ast.AugAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in (each for tree in targets for each in ast.walk(tree)):
                    assert getattr(target, "attr", "") != "errors", \
                        f"{function.name} sets the form of errors"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).rpartition(".")[2]
                words = [each.value for each in node.args if isinstance(each, ast.Constant)]
                assert not (called == "require" and "read" in words), \
                    f"{function.name} checks the permission to read"
                assert called not in (
                    "require_read", "wants_json", "refuse_other_types", "_refuse_to_read",
                    "_without_final_slash", "_normal_name"), \
                    f"{function.name} calls {called}"


def test_a_path_has_one_route_for_each_audience_and_one_default():
    seen = set()
    for path, query, method, route in each_route():
        key = path, query, method, route.for_
        assert key not in seen, f"two routes for {key}"
        seen.add(key)
    for (path, _), entry in devpi_lite.ROUTES.items():
        for method, choice in entry.choices.items():
            defaults = [each.for_ for each in choice.routes
                      if each.audience.is_default]
            assert len(defaults) == 1 or len(choice.routes) == 1, (method, path, defaults)


def test_paths_that_overlap_are_those_whose_order_is_documented():
    words = {"user": "u", "index": "i", "name": "i", "file": ["+f/a", "+f/a/+doc/x", "+e/json"],
             "project": ["p", "pypi"], "version": ["1", "1+local", "json", "refresh"],
             "rest": ["x", "json", "a/json"], "other_user": "u", "other_index": "i",
             "token": ["~e30." + 43 * "x"]}
    entries, overlapping = list(devpi_lite.ROUTES.items()), set()
    for number, ((path, query), entry) in enumerate(entries):
        places = re.findall(r"\{(\w+)\}", path)
        for values in itertools.product(*(words[place] for place in places)):
            for end in {"", "/"} if path.endswith("[/]") else {""}:
                sample = path.replace("[/]", "") + end
                for place, value in zip(places, values):
                    sample = sample.replace("{%s}" % place, value)
                assert entry.pattern.fullmatch(sample), (path, sample)
                for (other, _), after in entries[number + 1:]:
                    if after.pattern.fullmatch(sample) and set(after.choices) & set(entry.choices):
                        overlapping.add((path + ("?" + query if query else ""), other))
    file = "/{user}/{index}/{file}[/]"
    refresh = ("/{user}/{index}/{project}/refresh", "/{user}/{name}/{project}/{version}[/]")     # devpi-web's
    docs = "/{user}/{index}/{project}/{version}/+doc/"
    by_token = (docs + "{token}/{rest}", docs + "{rest}")
    assert overlapping == {(file + "?yank unyank", file), refresh, by_token}


def test_a_word_that_begins_with_a_plus_is_no_version(site):
    found = site.get("/root/dev/demo/+unknown")
    assert (found.status, "there is nothing at" in found.json()["message"]) == (404, True)


@pytest.fixture(scope="module")
def closed(site):
    """The index http/closed, which http alone may read."""
    site.add_index("http/closed", bases=[], acl_pkg_read=["http"])
    return site


@pytest.mark.parametrize(
    "path, headers, status, form",
    [
        # no index: before the project's name, what is accepted, permission
        ("/http/gone/Some_Pkg", {"Accept": "text/plain"}, 404, "json"),
        ("/http/gone/Some_Pkg", {"User-Agent": "pip/26.0", "Accept": "*/*"}, 404, "json"),
        ("/http/gone/+simple/Some_Pkg", {"Accept": "text/plain"}, 404, "page"),
        # the project's name: before what is accepted, and permission
        ("/http/closed/Some_Pkg", {"Accept": "text/plain"}, "/http/closed/some-pkg", None),
        ("/http/closed/Some_Pkg/1.0/", {"Accept": "*/*"}, "/http/closed/some-pkg/1.0/", None),
        ("/http/closed/+simple/Some_Pkg/", {}, "/http/closed/+simple/some-pkg/", None),
        ("/http/closed/+pypi/Some_Pkg/json", {}, "/http/closed/+pypi/some-pkg/json", None),
        ("/http/closed/+simple/p%C3%A4", {"Accept": "text/html"}, 400, "page"),
        ("/http/closed/p%C3%A4", {"User-Agent": "pip/26.0", "Accept": "*/*"}, 400, "page"),
        ("/http/closed/p%C3%A4", {"Accept": "text/plain"}, "/http/closed/p-", None),
        # for documentation permission comes first
        ("/http/closed/Some_Pkg/1.0/+doc/a", {"Accept": "*/*"}, 401, "page"),
        ("/http/closed/Some_Pkg/1.0/+d/a", {"Accept": "*/*"}, 401, "page"),
        ("/http/dev/Some_Pkg/1.0/+doc/a", {}, "/http/dev/some-pkg/1.0/+doc/a", None),
        # what is accepted: before permission
        ("/http/closed/pkg", {"Accept": "text/plain"}, 415, "json"),
        ("/http/closed/", {"Accept": "text/plain"}, 415, "json"),
        # permission: before the final slash, and before what is not there
        ("/http/closed/", {"Accept": "*/*"}, 401, "json"),
        ("/http/closed/pkg/9.9/", {"Accept": "*/*"}, 401, "json"),
        # a page does not tell that there is an index
        ("/http/closed/", {"Accept": "text/html"}, 404, "page"),
        ("/http/closed/pkg/9.9/", {"Accept": "text/html"}, 404, "page"),
        ("/http/closed/Some_Pkg/1.0/", {"Accept": "text/html"}, 404, "page"),
        ("/http/dev/Some_Pkg/1.0/", {"Accept": "text/html"}, "/http/dev/some-pkg/1.0/", None),
        ("/http/closed/+simple/pkg/", {"Accept": "text/html"}, 401, "page"),
        ("/http/closed", {"User-Agent": "pip/26.0", "Accept": "*/*"}, 401, "page"),
        ("/http/closed", {"Accept": SIMPLE_JSON}, 401, "page"),
        # the final slash
        ("/http/dev/pkg/9.9/?a=b", {"Accept": "text/html"}, "/http/dev/pkg/9.9?a=b", None),
        ("/http/", {"Accept": "text/html"}, "/http", None),
        # which leads to where permission is looked at
        ("/http/closed/+simple", {"Accept": "*/*"}, "/http/closed/+simple/", None),
        ("/http/closed/+simple/pkg", {"Accept": "*/*"}, "/http/closed/+simple/pkg/", None),
    ],
)
def test_a_route_is_checked_in_the_order_that_clients_know(closed, path, headers, status, form):
    reply = closed.get(path, headers={"Accept": None, **headers})
    if form is None:
        assert (reply.status, reply.headers.get("Location")) == (302, closed.url + status)
    else:
        assert (reply.status, reply.headers["Content-Type"]) == (status, {
            "json": "application/json", "page": "text/html; charset=UTF-8"}[form])


@pytest.mark.parametrize(
    "method, path, content_type, status, form",
    [
        ("POST", "/http/gone", "application/json", 404, "text/plain; charset=utf-8"),
        ("POST", "/http/gone", "text/xml", 404, "text/plain; charset=utf-8"),
        ("PUSH", "/http/gone", "application/json", 404, "application/json"),
        ("POST", "/http/closed", "application/json", 401, "application/json"),
        ("POST", "/http/closed", "text/xml", 401, "text/plain; charset=utf-8"),
        ("POST", "/http/closed", "multipart/form-data", 401, "text/plain; charset=utf-8"),
        ("PATCH", "/http/gone", "application/json", 403, "application/json"),
        ("DELETE", "/http/gone", "application/json", 403, "application/json"),
        ("PATCH", "/http/gone/+f/abc/x?yank", "text/plain", 403, "application/json"),
        ("PATCH", "/http/gone/+f/abc/x", "text/plain", 404, "text/html; charset=UTF-8"),
        ("PATCH", "/http/dev/+f/abc/x?unyank", "text/plain", 403, "application/json"),
        ("DELETE", "/http/gone/+f/abc/x", "text/plain", 403, "application/json"),
        ("POST", "/http/gone/+f/abc/x", "application/json", 404, "application/json"),
        ("POST", "/http/gone/+simple/x", "application/json", 404, "text/plain; charset=utf-8"),
    ],
)
def test_who_changes_something_is_answered_in_the_form_of_the_route(
        closed, method, path, content_type, status, form):
    reply = closed.request(method, path, b"{}", {"Accept": "*/*", "Content-Type": content_type})
    assert (reply.status, reply.headers["Content-Type"]) == (status, form)


# -- what every answer carries --------------------------------------------------------------------


ANSWERS = {
    "users": ("GET", "/", None, 200),
    "discovery": ("GET", "/+api", None, 200),
    "login": ("POST", "/+login", LOGIN, 200),
    "failed login": ("POST", "/+login", b'{"user": "nobody-here", "password": "wrong"}', 401),
    "bad JSON": ("POST", "/+login", b"{", 400),
    "unknown user": ("GET", "/nobody-here", None, 404),
    "unknown index": ("GET", "/no/index", None, 404),
    "unknown path": ("GET", "/a/b/c/d/e/f", None, 404),
    "not permitted": ("DELETE", "/http/dev", None, 403),
    "redirect": ("GET", "/http/dev/+simple/PKG/", None, 302),
    "page": ("GET", "/http/dev/+simple/pkg/", None, 200),
    "upload without credentials": ("POST", "/http/dev/", b":action=submit&name=a&version=1", 401),
    "project": ("GET", "/http/dev/pkg", None, 200),
    "unsupported method": ("OPTIONS", "/http/dev", None, 404),
}


@pytest.mark.parametrize("method, path, body, status", ANSWERS.values(), ids=ANSWERS)
def test_every_answer_names_protocol_server_and_serial(site, method, path, body, status):
    headers = {"Content-Type": "application/x-www-form-urlencoded"} if path == "/http/dev/" else {}
    reply = site.request(method, path, body, headers=headers)
    assert reply.status == status
    assert_devpi_headers(reply.headers, is_page="/+simple/" in path)
    assert reply.headers.get("Date")


@pytest.mark.parametrize("accept", ["text/html", SIMPLE_JSON])
def test_the_head_of_a_page_is_short(site, accept):
    request = b"GET /http/dev/+simple/pkg/ HTTP/1.1\r\nHost: localhost\r\nAccept: %s\r\n\r\n" % accept.encode()
    for _ in range(2):      # made by a worker, and kept by the front
        with Wire(site, request) as wire:
            lines = list(iter(wire.input.readline, b"\r\n"))
        assert lines[0] == b"HTTP/1.1 200 OK\r\n"
        assert sum(map(len, lines)) + 2 <= 400, lines


@pytest.mark.parametrize(
    "method, path, body, status",
    [
        ANSWERS[name]
        for name in (
            "users",
            "discovery",
            "login",
            "failed login",
            "bad JSON",
            "unknown user",
            "unknown index",
            "not permitted",
            "project",
        )
    ],
)
@pytest.mark.parametrize("accept", ["application/json", "*/*", None])
def test_json_answers_have_the_bare_content_type(site, method, path, body, status, accept):
    reply = site.request(method, path, body, headers={"Accept": accept})
    assert reply.status == status
    assert reply.headers.get_all("Content-Type") == ["application/json"]
    assert isinstance(reply.json(), dict)
    assert status < 400 or reply.json()["message"]


def test_an_upload_error_that_is_not_json_is_plain_text_for_curl(site):
    """JSON if Accept names it, HTML if it names text/html, else plain text [W3.3]."""
    found = {}
    for accept in ("application/json", "text/html", "*/*"):
        reply = site.upload(
            "http/dev", wheel("pkg", "1.0"), user="http", fields={":action": "nonsense"}, headers={"Accept": accept}
        )
        assert (reply.status, reply.reason) == (400, "action 'nonsense' not supported")
        found[accept] = reply.headers["Content-Type"].partition(";")[0]
    assert found == {"application/json": "application/json", "text/html": "text/html", "*/*": "text/plain"}


def test_the_serial_is_that_of_the_last_change(site):
    before = int(site.get("/+api").headers["X-DEVPI-SERIAL"])
    assert int(site.put("/http/serial", {"bases": []}, user="http").headers["X-DEVPI-SERIAL"]) == before + 1
    assert int(site.get("/http").headers["X-DEVPI-SERIAL"]) == before + 1


def test_what_the_client_sent_cannot_add_a_header_or_markup(site):
    evil = "a%0d%0aSet-Cookie:%20x=1%3Cscript%3E"
    for path in (
        "/" + evil,
        "/http/" + evil,
        "/http/dev/+simple/%s/" % evil,
        "/http/dev/%s/1" % evil,
        "/http/dev/+f/abc/def/" + evil,
    ):
        reply = site.get(path, headers={"Accept": "text/html"})
        assert reply.status in (302, 400, 403, 404), reply
        assert reply.headers.get("Set-Cookie") is None
        assert b"=1<script>" not in reply.body or reply.headers["Content-Type"] == "application/json"


# -- absolute URLs --------------------------------------------------------------------------------


def api_url(server, key="login", path="/+api", **headers):
    reply = server.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    assert reply.status == 200
    return reply.result[key]


@pytest.mark.parametrize(
    "host, base",
    [
        ("foo.localhost", "http://foo.localhost"),
        ("foo.localhost:80", "http://foo.localhost"),
        ("foo.localhost:8080", "http://foo.localhost:8080"),
        ("[::1]:99", "http://[::1]:99"),
    ],
)
def test_absolute_urls_begin_with_the_host_that_was_asked(site, host, base):
    assert api_url(site, Host=host) == base + "/+login"
    assert api_url(site, "simpleindex", "/http/dev/+api", Host=host) == base + "/http/dev/+simple/"


@pytest.mark.parametrize(
    "outside",
    [
        "https://outside.example",
        "http://outside.example:8080",
        "https://outside.example/a/b",
        "https://outside.example/sub/",
    ],
)
def test_x_outside_url_from_loopback_replaces_the_host(site, outside):
    base = outside.rstrip("/")
    assert api_url(site, X_Outside_URL=outside) == base + "/+login"
    reply = site.get("/http/dev/+simple/P.K_G/", headers={"Accept": "text/html", "X-Outside-URL": outside})
    assert (reply.status, reply.headers["Location"]) == (302, base + "/http/dev/+simple/p-k-g/")


@pytest.mark.parametrize(
    "outside",
    [
        "javascript:alert(1)",
        "file:///etc",
        "outside.example",
        "//outside.example",
        "https://",
        'https://a"><b',
        "https://a b/",
        "",
    ],
)
def test_a_useless_x_outside_url_is_ignored(site, outside):
    assert api_url(site, X_Outside_URL=outside) == site.url + "/+login"


@pytest.mark.parametrize(
    "headers, base",
    [
        ({"Proto": "https", "Host": "pypi.example"}, "https://pypi.example"),
        (
            {"Proto": "HTTPS", "Host": "pypi.example:443", "Prefix": "/sub/"},
            "https://pypi.example/sub",
        ),
        ({"Host": "pypi.example:80"}, "http://pypi.example"),
        (
            {"Host": "client.example, pypi.example:8443", "Proto": "http, https"},
            "https://pypi.example:8443",
        ),
        ({"Proto": "gopher", "Host": "a b", "Prefix": "sub"}, None),
        ({"Host": "evil.example/path", "Prefix": "//x\"y"}, None),
    ],
)
def test_forwarded_headers_from_loopback_replace_what_host_says(site, headers, base):
    headers = {"X_Forwarded_" + name: value for name, value in headers.items()}
    assert api_url(site, Forwarded="host=evil.example", **headers) == (base or site.url) + "/+login"
    assert (
        api_url(site, X_Outside_URL="https://out.example", **headers)
        == "https://out.example/+login"
    )


def test_the_forwarded_prefix_is_taken_off_the_path(site, proxied):
    assert api_url(site, path="/sub/+api", X_Forwarded_Prefix="/sub") == site.url + "/sub/+login"
    assert api_url(site, path="/+api", X_Forwarded_Prefix="/sub") == site.url + "/sub/+login"
    assert api_url(proxied, X_Forwarded_Host="pypi.example") == OUTSIDE + "/+login"


def addresses(server, *headers):
    """The addresses in the access log of one request for each of these headers."""
    for number, each in enumerate(headers):
        server.get("/+api?case=%d" % number, headers=each)
    output = server.whole_output()
    return [
        re.search(r"(?m)\?case=%d .* (\S+)$" % number, output).group(1)
        for number in range(len(headers))
    ]


def test_of_the_headers_that_name_the_client_one_counts(make_server):
    forged = {
        "X-Forwarded-For": "203.0.113.7",
        "Forwarded": "for=203.0.113.7",
        "True-Client-IP": "203.0.113.7",
    }
    server = make_server()
    assert addresses(
        server,
        forged,
        {"X-Real-IP": "192.0.2.1", **forged},
        {"X-Real-IP": "203.0.113.9, 192.0.2.1"},
        {"X-Real-IP": "nonsense"},
        {"X-Real-IP": "[2001:db8::7]:443"},
        {"X-Real-IP": "192.0.2.8:1"},
    ) == ["127.0.0.1", "192.0.2.1", "192.0.2.1", "127.0.0.1", "2001:db8::7", "192.0.2.8"]
    assert server.whole_output().count("--real-ip-header X-Forwarded-For would make it") == 1
    server.restart("--real-ip-header", "X-Forwarded-For")
    assert addresses(
        server,
        {"X-Real-IP": "203.0.113.9"},
        {"X-Real-IP": "203.0.113.9", "X-Forwarded-For": "192.0.2.1"},
        {"X-Forwarded-For": "203.0.113.9, 192.0.2.1"},
    ) == ["127.0.0.1", "192.0.2.1", "192.0.2.1"]


def test_a_page_that_is_kept_is_logged_with_the_client_that_the_proxy_names(make_server):
    server = make_server()
    for _ in range(3):
        assert server.get("/+help", headers={"Accept": BROWSER, "X-Real-IP": "192.0.2.1"}).status == 200
    assert re.findall(r"(?m) GET /\+help 200 .* (\S+)$", server.whole_output()) == 3 * ["192.0.2.1"]


def test_what_a_stranger_says_of_clients_is_ignored_with_a_line_in_the_log(make_server, tmp_path):
    server = make_server(
        script=patched(tmp_path, "devpi_lite.App.trusts = lambda self, address: False")
    )
    headers = {
        "X-Real-IP": "203.0.113.9",
        "X-Forwarded-Host": "evil.example",
        "X-Outside-URL": "https://evil.example",
    }
    for _ in range(2):
        assert server.get("/+api", headers=headers).result["login"] == server.url + "/+login"
    output = server.whole_output()
    assert not re.search(r"(?m) 203\.0\.113\.9$", output)
    (line,) = [line for line in output.splitlines() if "is ignored" in line]
    assert "--trusted-proxy 127.0.0.1" in line


def test_tls_on_the_plain_port_leaves_a_line_in_the_log(server):
    for _ in range(2):
        with server.connect() as connection, pytest.raises(ssl.SSLError):
            ssl.create_default_context().wrap_socket(connection, server_hostname="localhost")
    (line,) = [
        line for line in server.whole_output().splitlines() if "speaks TLS to this port" in line
    ]
    assert "127.0.0.1" in line and "http://" in line
    answer = server.raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500))
    assert answer.startswith(b"HTTP/1.1 400 ") and b"plain HTTP" in answer


def test_outside_url_of_the_operator_is_used_for_every_absolute_url(proxied):
    assert api_url(proxied) == OUTSIDE + "/+login"
    assert api_url(proxied, "pypisubmit", "/http/dev/+api") == OUTSIDE + "/http/dev/"
    reply = proxied.get("/http/dev/+simple/A.B/", headers={"Accept": "text/html"})
    assert (reply.status, reply.headers["Location"]) == (302, OUTSIDE + "/http/dev/+simple/a-b/")


def test_the_path_of_the_outside_url_is_stripped_from_requests(proxied):
    assert proxied.get("/sub/http/dev").result == proxied.get("/http/dev").result
    assert api_url(proxied, "index", "/sub/http/dev/+api") == OUTSIDE + "/http/dev"
    assert proxied.get("/sub").json()["type"] == "list:userconfig"
    assert proxied.get("/subway").json()["message"] == "no user 'subway'"


def test_x_outside_url_wins_over_the_option(proxied):
    assert api_url(proxied, X_Outside_URL="http://closer.example") == "http://closer.example/+login"


def test_file_links_are_relative_whatever_the_outside_url(proxied):
    assert proxied.upload("http/dev", wheel("linked", "1.0")).status == 200
    (file,) = proxied.simple("http/dev", "linked")["files"]
    assert re.fullmatch(r"\.\./\.\./\+f/[0-9a-f]{3}/[0-9a-f]{13}/linked-1\.0-py3-none-any\.whl(#.*)?", file["url"])


# -- anything at all ------------------------------------------------------------------------------


def damaged(chance):
    """A request that was right before some of its bytes were changed, dropped or repeated."""
    form, content_type = multipart(
        {":action": "file_upload", "name": "fuzz", "version": "1"}, {"content": ("fuzz-1.tar.gz", b"\x1f\x8b\0\0")}
    )
    data = bytearray(
        chance.choice(
            [
                head(),
                post(LOGIN),
                chunked(LOGIN, b"  "),
                head(
                    "GET /http/dev/+simple/pkg/ HTTP/1.1",
                    "Accept: text/html;q=0.3, " + SIMPLE_JSON,
                    'If-None-Match: "x"',
                ),
                post(
                    form,
                    "Content-Type: " + content_type,
                    "Authorization: Basic aHR0cDpwdw==",
                    first="POST /http/dev/ HTTP/1.1",
                ),
                post(
                    b'{"bases": ["root/pypi"], "volatile": true}',
                    "Authorization: Basic aHR0cDpwdw==",
                    first="PUT /http/fuzz HTTP/1.1",
                ),
                post(
                    b'["volatile=False", "bases+=x/y"]',
                    "Authorization: Basic aHR0cDpwdw==",
                    first="PATCH /http/dev HTTP/1.1",
                ),
                head("GET /http/dev/+f/abc/0123456789abc/pkg-1.0.tar.gz HTTP/1.1", "Range: bytes=0-5"),
            ]
        )
    )
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        at = chance.randrange(len(data))
        data[at : at + chance.choice([0, 1, 1, 10])] = bytes(
            chance.randrange(256) for _ in range(chance.choice([0, 1, 1, 2]))
        ) * chance.choice([1, 1, 1, 50])
        data = data or bytearray(b"\0")
    return bytes(data)


def noise(chance):
    return bytes(chance.randrange(256) for _ in range(chance.randrange(1, 300))) + chance.choice(
        [b"", b"\r\n\r\n", b" / HTTP/1.1\r\n\r\n"]
    )


@pytest.mark.parametrize("make", [damaged, noise])
def test_no_bytes_make_the_server_answer_500_or_stop(site, make):
    chance = random.Random(20)
    for number in range(400):
        data = make(chance)
        with site.connect() as connection:
            received = []
            with contextlib.suppress(ConnectionResetError, BrokenPipeError, OSError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while True:
                    piece = connection.recv(65536)  # a server that neither answers nor closes fails here, after 10 s
                    if not piece:
                        break
                    received.append(piece)
        answer = b"".join(received)
        assert answer == b"" or re.match(rb"HTTP/1\.[01] ([1234]\d\d|501|505) ", answer), (number, data, answer)
        assert b"HTTP/1.1 500" not in answer, (number, data, answer)
    assert site.get("/+api").status == 200
    assert "Traceback" not in site.whole_output()


def test_connections_are_given_back(site):
    """After all this, the server holds no more than a few descriptors."""
    descriptors = "/proc/%d/fd" % site.pid
    if not os.path.exists(descriptors):
        pytest.skip("needs /proc")
    eventually(lambda: len(os.listdir(descriptors)) < 200, seconds=5)
