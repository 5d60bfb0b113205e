"""A fake receiver: a real HTTP/1.1 server in threads of the test process that takes what is sent to it, and can misbehave.

It stands for what our server sends to: an index that takes uploads as PyPI does, a webhook, a Jenkins.
"""

import base64
import dataclasses
import fnmatch
import json
import re
import time
import urllib.parse

from misbehaving import Handler, Misbehaving

PIECE = 65536


class Receiver(Misbehaving):
    """`url` has neither path nor final slash: send to `receiver.url + "/anything"`. Every request is taken, by any method.

    `requests`: what arrived whole, in the order of arrival, as Received (a "hang-reading" one without its body).
    `connections`: how many were opened.  `sent`: how many bytes of endless answers went out.

        receiver = Receiver().start()
        receiver.answer(500, b"busy", times=2)          # then 200 again
        receiver.answer(403, path="/closed*")
        receiver.fault("hang", times=1)
        first, second = receiver.wait_for(2)            # AssertionError after 30 s
        assert (first.method, first.path) == ("POST", "/hook")
        first.json(), first.field("name"), first.files["content"], first.credentials, first.body, first.headers["Host"]
        receiver.stop()
    """

    faults = {"refuse", "hang", "hang-reading", "slow-read", "delay", "drop", "reset", "endless", "truncate", "garbage"}

    def __init__(self):
        super().__init__()
        self.reset()

    url = Misbehaving.host_url

    # -- what arrived

    def wait_for(self, n, path="*", seconds=30):
        """The first `n` requests to paths that match, as soon as they are there; AssertionError after `seconds`."""
        deadline = time.monotonic() + seconds
        with self._lock:
            while True:
                found = [request for request in self.requests if fnmatch.fnmatchcase(request.path, path)]
                if len(found) >= n:
                    return found[:n]
                left = deadline - time.monotonic()
                assert left > 0, "%d of %d requests to %s within %s s: %r" % (len(found), n, path, seconds, self.requests)
                self._lock.wait(left)

    def reset(self):
        """Forgets requests, answers and faults."""
        with self._lock:
            self.requests, self.connections, self.sent = [], 0, 0
            self._answers = []
        self.clear_faults()

    # -- what it says

    def answer(self, status, body=b"", headers=None, times=None, path="*"):
        """From now on (`times` times if given) requests whose path matches get this; the first answer given wins.

        Without any answer that applies: 200 with an empty body.
        """
        body = body.encode() if isinstance(body, str) else body
        with self._lock:
            self._answers.append({"what": (status, body, headers or {}), "left": times, "path": path})

    def fault(self, kind, path="*", times=None, **arguments):
        """From now on (`times` times if given) requests whose path matches meet the fault.

        "refuse": connecting is refused, by all paths, from now until clear_faults(); "hang": reads the request, never
        answers; "hang-reading": reads the head only, and neither answers nor closes; "slow-read" (piece=65536,
        delay=0.1): reads the body in pieces, `delay` apart, then answers; "delay" (seconds=1): answers later; "drop": reads the
        request, closes without an answer; "reset": resets the connection at the head; "endless" (status=200): an answer without
        end; "truncate": half of the body under the full Content-Length; "garbage": an answer that is no HTTP.
        """
        if kind == "refuse":
            return self.stop()
        super().fault(kind, path, times, **arguments)

    def clear_faults(self):
        """Healthy again (listening too, if it did before); what hangs or waits is let go: hanging connections break."""
        super().clear_faults()
        if self._http is None and self._port:
            self.start()

    def _record(self, request):
        with self._lock:
            self.requests.append(request)
            self._lock.notify_all()


@dataclasses.dataclass(frozen=True)
class Received:
    """One request. `path` has the query; `headers` match in any letter case (`.get`, `.get_all`); `at` is time.monotonic()."""

    method: str
    path: str
    headers: object
    body: bytes
    at: float

    def __repr__(self):
        return "<%s %s, %d bytes>" % (self.method, self.path, len(self.body))

    def json(self):
        return json.loads(self.body)

    @property
    def credentials(self):
        """(user, password) of Basic authentication; None without."""
        scheme, _, value = self.headers.get("Authorization", "").partition(" ")
        return tuple(base64.b64decode(value).decode().split(":", 1)) if scheme == "Basic" else None

    @property
    def parts(self):
        """The parts of a multipart form in their order, as (name, filename or None, bytes); ValueError if it is malformed."""
        content_type = self.headers.get("Content-Type", "")
        boundary = re.fullmatch(r'multipart/form-data; ?boundary=(?:"([^"]+)"|([^" ;]+))', content_type)
        if not boundary:
            raise ValueError("not a multipart form: %r" % content_type)
        delimiter = b"\r\n--" + (boundary.group(1) or boundary.group(2)).encode()
        preamble, *parts, end = (b"\r\n" + self.body).split(delimiter)
        if preamble or end.rstrip(b"\r\n") != b"--":
            raise ValueError("a multipart form with a broken begin or end: %r, %r" % (preamble[:100], end[:100]))
        return [_part(part) for part in parts]

    @property
    def fields(self):
        """The fields of the form (multipart or urlencoded) without its files: {name: [value, ...]}."""
        if self.headers.get("Content-Type", "").partition(";")[0] == "application/x-www-form-urlencoded":
            return urllib.parse.parse_qs(
                self.body.decode("ascii"), keep_blank_values=True, strict_parsing=True, encoding="utf-8", errors="strict"
            )
        fields = {}
        for name, filename, content in self.parts:
            if filename is None:
                fields.setdefault(name, []).append(content.decode())
        return fields

    def field(self, name):
        """The value of a field that occurs once."""
        (value,) = self.fields[name]
        return value

    @property
    def files(self):
        """The files of a multipart form: {field: (filename, bytes)}; ValueError if a field holds two."""
        files = [(name, (filename, content)) for name, filename, content in self.parts if filename is not None]
        if len(dict(files)) != len(files):
            raise ValueError("a field with two files: %r" % [name for name, _ in files])
        return dict(files)


def _part(part):
    """(name, filename or None, bytes) of what stands between two delimiters."""
    head, separator, content = part.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    if not separator or lines[0] or not all(re.match(r"[A-Za-z-]+: ", line) for line in lines[1:]):
        raise ValueError("a malformed part: %r" % part[:200])
    headers = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines[1:]}
    disposition = headers.get("content-disposition", "")
    found = re.fullmatch(r'form-data; name="([^"]*)"(?:; filename="([^"]*)")?', disposition)
    if not found:
        raise ValueError("a part that is no form field: %r" % head)
    return found.group(1), found.group(2), content


class _Handler(Handler):
    def __getattr__(self, name):
        """Every method is handled alike."""
        if name.startswith("do_"):
            return self.handle_any
        raise AttributeError(name)

    def handle_any(self):
        receiver = self.fake
        released = receiver._released
        kind, arguments = receiver.fault_for(self.path)
        if kind == "reset":
            return self.reset_connection()
        if kind == "hang-reading":
            receiver._record(Received(self.command, self.path, self.headers, b"", time.monotonic()))
            released.wait()
            return self.abandon()
        body = b"".join(self.pieces(arguments, released) if kind == "slow-read" else self.pieces())
        receiver._record(Received(self.command, self.path, self.headers, body, time.monotonic()))
        if kind == "delay":
            released.wait(arguments.get("seconds", 1))
        elif kind == "hang":
            released.wait()
            return self.abandon()
        elif kind == "drop":
            return self.abandon()
        elif kind == "garbage":
            self.wfile.write(b"\x00\xff this is no HTTP\r\n\r\n")
            return self.abandon()
        elif kind == "endless":
            return self.send_endless(arguments, released)
        status, body, headers = receiver._next(receiver._answers, self.path) or (200, b"", {})
        self.send_answer(status, body, headers, kind == "truncate")

    def pieces(self, slow=None, released=None):
        """The body of the request as it arrives; `slow` (the arguments of the fault) makes pauses."""
        piece, pause = (slow.get("piece", PIECE), slow.get("delay", 0.1)) if slow is not None else (PIECE, 0)
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while True:
                length = int(self.rfile.readline().partition(b";")[0], 16)
                yield self.rfile.read(length)
                self.rfile.readline()
                if not length:
                    return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            data = self.rfile.read(min(piece, left))
            if not data:
                raise ConnectionError("the request broke off")
            left -= len(data)
            yield data
            if pause:
                released.wait(pause)

    def send_answer(self, status, body, headers, truncate):
        self.send_response(status)
        for name, value in dict({"Content-Type": "text/plain; charset=utf-8", "Content-Length": len(body)}, **headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if truncate:
            self.wfile.write(body[: len(body) // 2])
            return self.abandon()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_endless(self, arguments, released):
        """Until the client has had enough (or 2 GiB have gone)."""
        self.send_response(arguments.get("status", 200))
        self.send_header("Content-Type", "text/plain")
        self.send_header("Connection", "close")
        self.end_headers()
        for _ in range(2**15):
            self.wfile.write(b"endless " * (PIECE // 8))
            with self.fake._lock:
                self.fake.sent += PIECE
            if released.is_set():
                break
        self.abandon()


Receiver.handler = _Handler
