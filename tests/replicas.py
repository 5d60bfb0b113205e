"""A primary and its replicas as processes, what is between them, and when they agree."""

import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import devpi_lite
from harness import SCRIPT, SIMPLE_JSON, Server, eventually, patched, serial_of, upload, wheel

ANY = {"Accept": "*/*"}
# a replica that asks again soon
SOON = """
devpi_lite.Limits.replica_pause = 0.2
devpi_lite.Limits.no_space_pause = 0.2
devpi_lite.Limits.log_wait = 1
devpi_lite.Limits.upstream_stall = 3      # the length of a response may be what the line altered
note = devpi_lite._note_failure
def soon(change, row, message):
    is_deleted = note(change, row, message)
    change.execute("UPDATE wanted SET due = ? WHERE due > 0", (devpi_lite.time.time() + 0.2,))
    return is_deleted
devpi_lite._note_failure = soon
"""


def primary_at(directory, *options, **keywords):
    """The server of a new or former primary, not started."""
    return Server(directory, "--role", "primary", *options, **keywords)


def replica_at(directory, primary, *options, url=None, script=SCRIPT, secret=None):
    """A replica of the server (reached by `url`), not started."""
    return Server(directory, "--primary-url", url or primary.url, "--secretfile",
                  str(secret or primary.directory / ".secret"), *options,
                  root_password=None, script=script)


def upload_demo(server, version, size=0):
    """Uploads a release of demo to ann/dev; returns the archive."""
    archive = wheel("demo", version, size=size)
    upload(server, "ann/dev", archive)
    return archive


def status(server):
    return server.get("/+status", user=None).result


def lags(primary, replica):
    """What the replica lacks, in words; "" if it has all."""
    one, other = status(primary), status(replica)
    if other["replication-state"] != "following":
        return "it is %s: %s" % (other["replication-state"], other.get("replication-trouble"))
    if (one["serial"], other["wanted"]["files"]) != (other["serial"], 0):
        return "serial %s of %s, %s" % (other["serial"], one["serial"], other["wanted"])
    return ""


def in_sync(primary, *replicas, seconds=20):
    """Returns when all replicas have the primary's serial and files."""
    until = time.monotonic() + seconds
    for replica in replicas:
        while True:
            lag = lags(primary, replica)
            if not lag:
                break
            assert time.monotonic() < until, lag + "\n" + replica.output()[-2000:]
            time.sleep(0.02)


def comes_to_be(replica, state, seconds=15):
    """Returns the replica's status when its state is that."""
    return eventually(lambda: (lambda found: found["replication-state"] == state and found)(
        status(replica)), seconds)


def rows(server):
    """All rows of people's data in the server's directory, as texts; and their serial."""
    with contextlib.closing(devpi_lite.open_rows(str(server.directory))) as db:
        db.execute("BEGIN")
        texts = sorted(json.dumps(row, sort_keys=True, default=_text) for row in devpi_lite.all_rows(db))
        serial = db.execute("SELECT max(serial) FROM changelog").fetchone()[0]
    return (-1 if serial is None else serial), texts


def _text(value):
    return value.hex() if isinstance(value, bytes) else dict(value)


def same(primary, *replicas):
    """Waits until the replicas are in sync, and compares rows and history."""
    in_sync(primary, *replicas)
    for replica in replicas:
        one, other = rows(primary), rows(replica)
        assert one[0] == other[0]
        assert [text for text in one[1] if text not in set(other[1])] == []
        assert [text for text in other[1] if text not in set(one[1])] == []
        assert head(primary) == head(replica)


def head(server):
    """(serial, hash) of the newest entry of the changelog."""
    with contextlib.closing(devpi_lite.open_rows(str(server.directory))) as db:
        return tuple(db.execute(
            "SELECT serial, hex(hash) FROM changelog ORDER BY serial DESC LIMIT 1").fetchone() or (-1, ""))


def unsound(server):
    """Paths below files/ and tmp/ that should not be there: bytes unlike their name, and litter."""
    found = [str(path) for path in (server.directory / "files").rglob("*") if path.is_file()
             and hashlib.sha256(path.read_bytes()).hexdigest() != path.name]
    return found + [str(path) for path in (server.directory / "tmp").rglob("*") if path.is_file()]


def signed(server, target, method="GET", secret=None, ts=None, signed_target=None, nonce=None,
           uuid="5" * 32, term=1, body=b""):
    """The headers of a request by a replica to the server."""
    key = hmac.new((secret or (server.directory / ".secret").read_bytes().strip()),
                   b"devpi-lite-replica", "sha256").digest()
    ts, nonce = str(int(ts or time.time())), nonce or secrets.token_hex(16)
    texts = (method, signed_target or target, uuid, str(term), ts, nonce, hashlib.sha256(body).hexdigest())
    mac = hmac.new(key, "\n".join(texts).encode(), "sha256").hexdigest()
    return {"Authorization": "Devpi-Replica id=%s,term=%d,ts=%s,nonce=%s,mac=%s" % (uuid, term, ts, nonce, mac)}


def signed_head(key, nonce, status_, body, uuid="7" * 32, epoch="e" * 32, term="1", head="0", digest=None):
    """The headers with which a server that has the key signs its response."""
    digest = digest or hashlib.sha256(body).hexdigest()
    texts = nonce, str(status_), uuid, epoch, term, head, digest
    return {"X-DEVPI-UUID": uuid, "X-Devpi-Epoch": epoch, "X-Devpi-Term": term, "X-Devpi-Head": head,
            "X-Devpi-Digest": digest,
            "X-Devpi-Signature": hmac.new(key, "\n".join(texts).encode(), "sha256").hexdigest()}


# a replica that enters nothing while there is a file `hold`, whose caches notice it late while there is a file `slow`,
# whose clock is set by files `tomorrow` and `yesterday`, and whose log is `cut` or `parted` by such files
HELD = """
import os, types
folder = %r
ANY_TIME = devpi_lite.time.time
is_there = lambda name: os.path.exists(os.path.join(folder, name))
devpi_lite.Limits.min_serial_time = 0.15
devpi_lite.Limits.replica_pause = 0.2
follow, touch = devpi_lite.Store.follow, devpi_lite.Freshness.touch
def held(self, *arguments):
    while is_there("hold"):
        devpi_lite.time.sleep(0.01)
    follow(self, *arguments)
def slow(self, tags):
    if is_there("slow"):
        devpi_lite.time.sleep(0.1)
    touch(self, tags)
devpi_lite.Store.follow, devpi_lite.Freshness.touch = held, slow
step = devpi_lite.Follower._follow
def troubled(self):
    if is_there("cut"):
        raise devpi_lite.UpstreamTrouble("cut")
    if is_there("parted"):
        raise devpi_lite.Diverged("parted")
    step(self)
    if is_there("cut") or is_there("parted"):
        troubled(self)
devpi_lite.Follower._follow = troubled
clock = types.SimpleNamespace(**vars(devpi_lite.time))
clock.time = lambda: ANY_TIME() + 86400 * is_there("tomorrow") - 86400 * is_there("yesterday")
devpi_lite.time = clock
"""


class HeldPair:
    """A primary, and a replica that can be held; `more`: what else changes the replica's program."""

    def __init__(self, folder, *options, more=""):
        self.folder = folder
        self.primary = primary_at(folder / "primary").start()
        self.replica = replica_at(folder / "replica", self.primary, *options,
                                  script=patched(folder, HELD % str(folder) + more))
        self.primary.add_user("ann")
        self.primary.add_index("ann/dev")
        self.replica.start()
        self.replica.passwords.update(self.primary.passwords)
        in_sync(self.primary, self.replica)

    @contextlib.contextmanager
    def mark(self, name):
        (self.folder / name).touch()
        try:
            yield
        finally:
            (self.folder / name).unlink()

    def new_file(self, project, version="1.0"):
        """Uploads a file to the primary; returns it and the serial of that."""
        archive = wheel(project, version)
        return archive, serial_of(upload(self.primary, "ann/dev", archive))

    def names(self, project, needed=None, **options):
        """The reply to who asks the replica for the project's page, and the names of the files on it."""
        headers = {"Accept": SIMPLE_JSON}
        if needed is not None:
            headers["X-DEVPI-MIN-SERIAL"] = str(needed)
        reply = self.replica.get("/ann/dev/+simple/%s/" % project, headers=headers, **options)
        return reply, [file["filename"] for file in reply.json()["files"]] if reply.status == 200 else None

    def end(self):
        for server in (self.replica, self.primary):
            if server.running:
                server.kill()


def passed_on(primary):
    """A function that asks the real primary: path, headers -> (status, headers, body)."""
    def ask(path, headers):
        asked = urllib.request.Request(primary.url + path, headers.body, {
            name: value for name, value in headers.items() if name.lower() != "host"})
        try:
            reply = urllib.request.urlopen(asked, timeout=30)
        except urllib.error.HTTPError as error:
            reply = error
        kept = {name: value for name, value in reply.headers.items()
                if name.lower().startswith("x-devpi") or name.lower() == "content-type"}
        return reply.status, kept, reply.read()
    return ask


class Between:
    """A TCP proxy before a server: `change(data, sent)` alters what the server sends ("sent" bytes
    came before on this connection); None cuts the connection there. `target` may be set anew."""

    def __init__(self, port):
        self.target, self.change, self.is_open = port, None, True
        self.changed = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = "http://127.0.0.1:%d" % self.listener.getsockname()[1]
        self.ends = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            if not self.is_open:
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self.target), 10)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            self.ends |= {client, server}
            for source, sink, is_answer in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pass, args=(source, sink, is_answer), daemon=True).start()

    def _pass(self, source, sink, is_answer):
        sent = 0
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                if not data:
                    break
                change = self.change
                if is_answer and change:
                    new = change(data, sent)
                    if new is None:
                        self.changed += 1
                        break
                    self.changed += new != data
                    sent, data = sent + len(data), new
                sink.sendall(data)
        for end in (source, sink):
            self.ends.discard(end)      # it is closed when the thread of the other direction has ended, too
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self):
        """Refuse and break all connections."""
        self.is_open = False
        for end in list(self.ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.ends.clear()

    def close(self):
        self.cut()
        # wakes accept(), where closing alone does not
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


class Fake(ThreadingHTTPServer):
    """A server that says it is a primary: passes what the real one says, altered by
    `change(path, status, headers, body) -> (status, headers, body)`."""

    daemon_threads = True

    def __init__(self, change):
        self.change, self.asked = change, []
        super().__init__(("127.0.0.1", 0), _FakeHandler)
        self.url = "http://127.0.0.1:%d" % self.server_port
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


    def handle_error(self, request, address):
        """Says nothing: the real primary ended, or the replica did."""


class Asked(dict):
    """The headers of a request, and its `body`, None without one."""

    body = None


class _FakeHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        asked = Asked(self.headers)
        if "Content-Length" in self.headers:
            asked.body = self.rfile.read(int(self.headers["Content-Length"]))
        status_, headers, body = self.server.change(self.path, asked)
        self.send_response(status_)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *texts):
        pass
