"""A primary, its replicas and clients in one process, on a clock, disks and lines of their own: years of faults in seconds.

    python tests/simulator.py [--seeds N] [--from SEED] [--seconds S]      many seeds; the status is 1 if one failed
    python tests/simulator.py --shrink SEED                                 the fewest steps of it that fail
    python tests/simulator.py --seed SEED                                   one seed, each step shown

All that a node does is the real program's: its `Store`, `App`, `Handler`, `Follower`.  Three seams are other ones:
- the clock: `devpi_lite.time` is a `Clock`, with one time for each node;
- the disk: a folder in memory; full when the world says so; a crash leaves what lay there at a moment of a change;
- the line: a connection is a `Socket`, which carries bytes to another node here; it breaks, alters, repeats, is slow.

A seed draws the steps, and each step has dice of its own: so a step can be left out and the others are the same.  After each
step `World.check` says what must hold (see there).
"""

import argparse
import atexit
import base64
import collections
import contextlib
import dataclasses
import functools
import hashlib
import http.client
import io
import json
import logging
import os
import pathlib
import random
import secrets
import shutil
import sqlite3
import sys
import tempfile
import time
import traceback
import types

_HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parent)]

from archives import multipart, wheel  # noqa: E402

import devpi_lite  # noqa: E402

SECRET = b"a secret of the nodes that are simulated, long enough\n"
DAY = 86400


class Failure(AssertionError):
    """What must hold does not."""


# -- the clock


class Clock:
    """Stands for the module `time`: every node has a wall clock of its own; sleeping takes no time."""

    def __init__(self):
        self.now, self.steady = 1_800_000_000.5, 1000.0
        self.offsets = collections.defaultdict(float)
        self.node = None        # whose clock is asked

    def __getattr__(self, name):
        return getattr(time, name)

    def time(self):
        return self.now + self.offsets[self.node]

    def monotonic(self):
        return self.steady

    perf_counter = monotonic

    def gmtime(self, seconds=None):
        return time.gmtime(self.time() if seconds is None else seconds)

    def localtime(self, seconds=None):
        return time.localtime(self.time() if seconds is None else seconds)

    def sleep(self, seconds):
        self.pass_(seconds)

    def pass_(self, seconds):
        self.now += seconds
        self.steady += seconds

    @contextlib.contextmanager
    def of(self, node):
        before, self.node = self.node, node
        try:
            yield
        finally:
            self.node = before


class Chance:
    """Stands for the module `secrets`: a seed's run is the same each time."""

    def __init__(self, seed):
        self.dice = random.Random("secrets %s" % seed)

    def token_bytes(self, size=32):
        return bytes(self.dice.getrandbits(8) for _ in range(size))

    def token_hex(self, size=32):
        return self.token_bytes(size).hex()

    def token_urlsafe(self, size=32):
        return base64.urlsafe_b64encode(self.token_bytes(size)).rstrip(b"=").decode()

    def __getattr__(self, name):
        return getattr(secrets, name)


# -- the line


class Socket:
    """Our end of a connection to a node: what is sent is carried there when the answer is read."""

    def __init__(self, world, client, host):
        self.world, self.client, self.host = world, client, host
        self.sent, self.is_read = [], False

    def sendall(self, data):
        if self.is_read:
            self.sent, self.is_read = [], False
        self.sent.append(bytes(data))

    send = sendall

    def makefile(self, mode, *_, **__):
        return io.BufferedReader(_Answer(self))

    def carry(self):
        self.is_read = True
        return self.world.carry(self.client, self.host, b"".join(self.sent))

    def getpeername(self):
        return "127.0.0.1", 3141

    def setsockopt(self, *_):
        pass

    settimeout = setblocking = shutdown = setsockopt

    def gettimeout(self):
        return 30

    def close(self):
        pass


class _Answer(io.RawIOBase):
    def __init__(self, socket):
        self.socket, self.rest = socket, None

    def readable(self):
        return True

    def readinto(self, buffer):
        if self.rest is None:
            self.rest = memoryview(self.socket.carry())
        size = min(len(buffer), len(self.rest))
        buffer[:size] = self.rest[:size]
        self.rest = self.rest[size:]
        return size


class Connection(devpi_lite.UpstreamConnection):
    """A connection of a node to another one."""
    world = client = None

    def connect(self):
        self.world.begin(self.client, self.host)
        self.sock = Socket(self.world, self.client, self.host)


def client_of(world):
    """The class `UpstreamClient` whose connections lead to the world's nodes."""
    class Client(devpi_lite.UpstreamClient):
        def __init__(self, settings):
            super().__init__(settings)
            self.node = world.nodes[os.path.basename(settings.serverdir)]

        def _new_connection(self, key, url, timeout):
            connection = Connection(key[1], key[2], timeout=timeout)
            connection.world, connection.client = world, self.node
            return connection
    return Client


class _Sink:
    """A client's socket, as a handler sees it: it takes all at once."""
    family = None

    def __init__(self):
        self.fd = os.memfd_create("answer")

    def sendmsg(self, pieces):
        return os.writev(self.fd, pieces)

    def send(self, data):
        return os.write(self.fd, data)

    def fileno(self):
        return self.fd

    def recv(self, size):
        return b""

    def taken(self):
        try:
            size = os.lseek(self.fd, 0, os.SEEK_END)
            return os.pread(self.fd, size, 0)
        finally:
            os.close(self.fd)


class _Front:
    """What a `Handler` needs of a server."""
    stopping = False

    def __init__(self, app):
        self.app = app

    def give_back(self, connection, keep):
        if connection.pending is not None:
            raise Failure("an answer was not taken at once")


class Reply:
    """What a client got; `status` None: nothing, so what it asked for happened or not."""

    def __init__(self, raw):
        self.status, self.headers, self.body = None, {}, b""
        if not raw:
            return
        response = http.client.HTTPResponse(_Raw(raw))
        response.begin()
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def done(self):
        return self.status is not None and self.status < 300

    def json(self):
        return json.loads(self.body)


class _Raw:
    def __init__(self, raw):
        self.raw = raw

    def makefile(self, *_):
        return io.BytesIO(self.raw)


# -- the disk


def disk(world):
    """A module `os` for the program: a crash may come where a file moves into its place."""
    module = types.ModuleType("os")
    module.__dict__.update(os.__dict__)

    def replace(source, target, **keywords):
        world.moment(target)
        os.replace(source, target, **keywords)
        world.moment(target)

    def unlink(path, **keywords):
        world.moment(path)
        os.unlink(path, **keywords)

    def write(fd, data):
        node = world.nodes.get(world.clock.node)
        if node is not None and node.free is not None and len(data) > node.free:
            raise OSError(28, "No space left on device")
        return os.write(fd, data)

    def utime(path, times=None, **keywords):
        os.utime(path, times or (keywords.get("ns") is None and (world.clock.time(),) * 2 or None), **keywords)

    module.write, module.utime = write, utime
    module.replace = module.rename = replace
    module.unlink = module.remove = unlink
    module.fsync = lambda fd: None      # memory is never cut off from its power
    return module


class _FullFile:
    """The file of an incoming blob on a disk with room for `left` bytes."""

    def __init__(self, file, left):
        self.file, self.left = file, left

    def write(self, data):
        if len(data) > self.left:
            raise OSError(28, "No space left on device")
        self.left -= len(data)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


# -- a node


class Node:
    """A server with its directory; `app` is None while it does not run."""

    def __init__(self, world, name, host):
        self.world, self.name, self.host = world, name, host        # host: the name under which it is asked
        self.directory = world.folder / name
        self.primary_host = None
        self.app = None
        self.is_doomed = False          # it has ended by a crash; what it does now does not happen
        self.crash_in, self.remains = None, None
        self.rests = False              # it was stopped because another one takes over
        self.free = None                # bytes that its disk has left; None: enough
        self.floor = (-1, b"")          # (serial, hash) that it may not go behind
        self.seen = None                # (serial, hash) at the last look
        self.lowest_term = 0
        self.keep_log = None
        self.checked = {}               # path -> (size, time) of files that were found sound

    def __str__(self):
        return self.name

    @property
    def is_replica(self):
        return self.primary_host is not None

    @property
    def term(self):
        return int(self.app.store.node["term"])

    @property
    def follower(self):
        return self.app.replication

    # - its life

    def start(self):
        world = self.world
        with world.clock.of(self.name):
            settings = dataclasses.replace(
                world.settings, serverdir=str(self.directory), role="replica" if self.is_replica else "primary",
                primary_url="http://%s:3141" % self.primary_host if self.is_replica else "")
            self.directory.mkdir(exist_ok=True)
            secret = devpi_lite.read_secret(str(self.directory), settings.secretfile)
            store = devpi_lite.Store(settings, create=True)
            try:
                store.commits.is_server = True
                if self.keep_log:
                    store.keep_log = self.keep_log
                devpi_lite.settle_role(store, settings)
                if not store.closed_to_rows:
                    devpi_lite.require_root(store, settings)
                app = devpi_lite.App(settings, store, secret)
                app.recover_all()
            except BaseException:
                store.close()
                raise
        self.app = app
        self._take_seams()
        return self

    def _take_seams(self):
        app = self.app

        app.store.writer.set_trace_callback(self._statement)
        incoming = app.blobs.incoming

        def limited(spooled=False):
            blob = incoming(spooled and self.free is None)
            if self.free is not None:
                blob.file = _FullFile(blob.file, self.free)
            return blob
        app.blobs.incoming = limited
        app.store.wait_for_serial = self._wait_in_vain
        if self.is_replica:
            follower = self.follower
            follower.files.crew.submit = lambda work, *_: work()
            follower.wait_for = self._wait_for

    def _statement(self, text):
        if text.startswith(("COMMIT", "BEGIN", "RELEASE")):
            self.moment()

    def _wait_in_vain(self, serial, seconds, *_):
        if self.app.store.serial < serial:
            self.world.clock.pass_(seconds)
        return self.app.store.serial >= serial

    def _wait_for(self, serial, seconds):
        """The replica follows while a relay waits."""
        for _ in range(2):
            if self.app.store.serial < serial:
                self.follower.follow_once()
        if self.app.store.serial < serial:
            self.world.clock.pass_(seconds)
        return self.app.store.serial >= serial

    def moment(self):
        """A moment at which it may be killed."""
        if self.crash_in is not None:
            self.crash_in -= 1
            if self.crash_in < 0:
                self.crash_in = None
                self.leave_remains()

    def leave_remains(self):
        """Put aside what a kill would leave now."""
        if self.remains is None:
            self.remains = self.world.folder / (self.name + ".remains")
            copy_files(self.directory, self.remains)
        self.is_doomed = True

    def stop(self):
        """End as a server that is told to."""
        if self.app is not None:
            with self.world.clock.of(self.name):
                self.app.close_all()
            self.app = None

    def fall(self):
        """End as one that is killed, at the drawn moment or now."""
        if not self.is_doomed:
            self.leave_remains()
        self.crash_in = None
        self.stop()
        shutil.rmtree(self.directory)
        os.rename(self.remains, self.directory)
        self.remains, self.is_doomed = None, False
        self.checked.clear()

    def forget(self):
        """It may be behind where it was: its operator did that."""
        self.floor, self.seen, self.lowest_term = (-1, b""), None, 0
        self.checked.clear()

    def make_room(self, free):
        """Have that many bytes free; None: enough."""
        self.free = free
        if self.app is not None:
            db = self.app.store.writer
            pages = db.execute("PRAGMA page_count").fetchone()[0]
            most = 1 << 30 if free is None else pages + free // 4096
            db.execute("PRAGMA max_page_count = %d" % most)

    # - what is asked of it

    def serve(self, raw):
        """The bytes of the answer to a request."""
        sink = _Sink()
        try:
            with self.world.clock.of(self.name):
                connection = devpi_lite.Connection(sink, "127.0.0.1", True, {})
                connection.buffer = raw
                devpi_lite.Handler(connection, ("127.0.0.1", 0), _Front(self.app))
        finally:
            taken = sink.taken()
        return b"" if self.is_doomed else taken

    def ask(self, method, path, user=None, body=None, headers=()):
        """A client's request: JSON if the body is no bytes."""
        if self.app is None:
            return Reply(b"")
        headers = dict(headers)
        if user:
            with self.world.clock.of(self.name):
                account = self.app.users.find(user)
                token = self.app.logins.tokens.issue(account) if account else "none"
            pair = base64.b64encode(("%s:%s" % (user, token)).encode()).decode()
            headers["X-Devpi-Auth"] = pair
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        headers = {"Host": self.host, "Accept": "application/json", "Content-Length": str(len(body or b"")), **headers}
        head = "%s %s HTTP/1.1\r\n%s\r\n" % (
            method, path, "".join("%s: %s\r\n" % pair for pair in headers.items()))
        return Reply(self.serve(head.encode() + (body or b"")))

    def fetch_files(self):
        """Of a replica: fetch the files that are wanted now, and put them into their places."""
        for _ in range(2):
            self.follower.files.fetch_once()

    # - what is there

    def head(self, db=None):
        with self.reading(db) as db:
            return tuple(devpi_lite.Store.head(db))

    @contextlib.contextmanager
    def reading(self, db=None):
        if db is not None:
            yield db
        elif self.app is not None:
            with self.app.store.read() as db:
                yield db
        else:
            with contextlib.closing(sqlite3.connect(str(self.directory / "devpi_lite.db"))) as db:
                db.row_factory = sqlite3.Row
                yield db


def copy_files(source, target):
    """A copy of a directory, as it would be found after a crash or in a backup; not what only a running process needs."""
    for folder, folders, names in os.walk(source):
        place = os.path.join(target, os.path.relpath(folder, source))
        os.makedirs(place, exist_ok=True)
        for name in names:
            if not name.endswith("-shm"):
                shutil.copy2(os.path.join(folder, name), os.path.join(place, name))


# -- the world


@functools.lru_cache(maxsize=None)
def upload_form(project, version, number):
    """(archive, body, type) of an upload; another number: other bytes."""
    archive = wheel(project, version, summary="number %d" % number, size=number * 700)
    form = {":action": "file_upload", "protocol_version": "1", **archive.fields, "sha256_digest": archive.sha256}
    return (archive, *multipart(form, {"content": (archive.filename, archive.content)}))


@functools.lru_cache(maxsize=None)
def base_settings():
    return devpi_lite.parse_options(devpi_lite.COMMANDS["serve"], ["--no-root-pypi", "--root-passwd", "secret"]).settings


class _Log(logging.Handler):
    """What the program logs as an error of its own: with a traceback."""

    def __init__(self):
        super().__init__()
        self.lines, self.errors = collections.deque(maxlen=200), []

    def emit(self, record):
        text = record.getMessage()
        self.lines.append(text)
        if record.exc_info:
            self.errors.append(text + "\n" + "".join(traceback.format_exception(*record.exc_info)))


STEPS = {}      # name -> (weight, the kinds of fault that it belongs to or None, function of a world and its dice)
FAULTS = ("end", "kill", "partition", "line", "clock", "disk", "replay", "short", "back", "twins",
          "promote")


def step(weight, faults=None):
    def register(function):
        STEPS[function.__name__] = weight, faults, function
        return function
    return register


PROJECTS, VERSIONS = ("alpha", "beta"), ("1.0", "1.1", "2.0")
USERS, INDEXES = ("ann", "bob"), ("dev", "stable")


class World:
    """All nodes, and what is between them.

    `chain`: {hash: (serial, hash before)} of every entry that a node ever had; `states`: {hash: digest of the rows there}."""

    def __init__(self, seed, folder, verbose=False):
        self.seed, self.folder, self.verbose = seed, pathlib.Path(folder), verbose
        self.clock = Clock()
        self.dice = random.Random(seed)
        self.nodes = {}
        self.names = {}                 # host -> the node that is reached by it
        self.blocked = set()            # (name of a node, host, "out" or "back"): nothing comes through
        self.files_are_lost = False     # an operator has accepted that
        self.is_turning = False         # whether a name that leads to two servers changes at any moment
        self.badness = 0.0              # how probable a fault of a line is
        self.old = []                   # (app, raw request) that were signed and have been answered
        self.last_answers = {}          # (client, host, path) -> raw answer
        self.chain, self.states = {b"": (-1, b"")}, {}
        self.done = []                  # what happened, a text each
        self.copies = []                # (directory, name of the node) of a primary at earlier times
        self.log = _Log()
        (self.folder / "secret").write_bytes(SECRET)
        (self.folder / "secret").chmod(0o600)
        self.folder.chmod(0o700)
        self.settings = dataclasses.replace(
            base_settings(), secretfile=str(self.folder / "secret"), proxy_timeout=5, access_log=False)

    # - nodes

    def add(self, name, host, primary_host=None):
        node = self.nodes[name] = Node(self, name, host)
        node.primary_host = primary_host
        self.names[host] = node
        return node

    def running(self, is_replica=None):
        return [node for node in self.nodes.values() if node.app is not None
                and is_replica in (None, node.is_replica)]

    def moment(self, path):
        for node in self.nodes.values():
            if node.crash_in is not None and str(path).startswith(str(node.directory) + os.sep):
                node.moment()

    def note(self, text, *values):
        self.done.append(text % values)
        if self.verbose:
            print("   ", self.done[-1], flush=True)

    # - lines

    def begin(self, client, host):
        node = self.names.get(host)
        if client.is_doomed:
            raise ConnectionResetError("this node was killed")
        if (client.name, host, "out") in self.blocked:
            self.clock.pass_(10)
            raise TimeoutError("timed out")
        if node is None or node.app is None or node is client:
            raise ConnectionRefusedError(111, "Connection refused")

    def carry(self, client, host, raw):
        """Carry a request to a node, and its answer back, as far as the line lets them through."""
        dice, node = self.dice, self.names.get(host)
        if client.is_doomed:
            raise ConnectionResetError("this node was killed")
        if self.is_turning and "q" in self.nodes and host == self.nodes["q"].host and dice.random() < 0.3:
            node = self.names[host] = dice.choice([each for each in self.nodes.values() if each.host == host])
            self.note("  %s leads to %s", host, node)
        target = raw.partition(b"\r\n")[0].decode("latin-1").rpartition(" ")[0]
        fault = dice.random() < self.badness and dice.choice(
            ("lose", "lose answer", "cut", "cut", "cut", "flip", "flip", "flip", "old answer", "slow", "very slow", "twice"))
        is_signed = b"Devpi-Replica id=" in raw.partition(b"\r\n\r\n")[0] and b"/+repl/" in raw[:200]
        if fault:
            self.note("  line of %s: %s: %s", client, fault, target[:60])
        if (client.name, host, "out") in self.blocked:
            self.clock.pass_(30)
            raise TimeoutError("timed out")
        if fault == "slow":
            self.clock.pass_(dice.uniform(0, 20))
        if fault == "very slow":
            self.clock.pass_(dice.uniform(20, 200))
        if fault == "lose" or node is None or node.app is None:
            raise ConnectionResetError("the line broke")
        answer = node.serve(raw)
        if is_signed and not node.is_doomed:
            self._check_fence(node, raw, answer)
            if fault == "twice":
                self._refused(node, raw)
            if answer and Reply(answer).status < 400:       # one that was refused may be fit later
                self.old = [*self.old[-20:], (node.app, raw)]
        if node.is_doomed or fault == "lose answer" or not answer:
            raise ConnectionResetError("the line broke")
        if (client.name, host, "back") in self.blocked:
            self.clock.pass_(30)
            raise TimeoutError("timed out")
        place = client.name, host, target
        before, self.last_answers[place] = self.last_answers.get(place), answer
        if fault == "old answer" and before and is_signed:
            return before
        if fault == "cut":
            return answer[:cut_place(answer, dice)]
        if fault == "flip" and is_signed:
            at = cut_place(answer, dice) % len(answer)
            return answer[:at] + bytes([answer[at] ^ 1 << dice.randrange(8)]) + answer[at + 1:]
        return answer

    @staticmethod
    def _check_fence(node, raw, answer):
        """A primary that has met a later term takes no changes."""
        term = int(raw.partition(b",term=")[2].partition(b",")[0])
        if answer and Reply(answer).status in (200, 204, 409) and term > node.term and not node.app.store.closed_to_rows:
            raise Failure("%s, of term %d, goes on after it has met term %d" % (node, node.term, term))

    def _refused(self, node, raw):
        """A signed request that comes a second time is refused."""
        reply = Reply(node.serve(raw))
        if reply.status not in (None, 401):
            raise Failure("%s answered a request that was repeated: %s" % (node, reply.status))

    # - what must hold

    def check(self):
        """After each step:

        a node's serial and hash never go behind where they were, unless the step says so (I6), and each entry follows one
        that is known (I1); equal histories have equal rows (I2); a visible file has the bytes that its name says (I3);
        pages show what the rows say; no lag is negative; nothing failed that the program does not know of."""
        for node in self.nodes.values():
            if node.is_doomed or node.crash_in is not None:
                self.note("  %s is killed", node)
                node.fall()
            self._check_history(node)
            self._check_files(node)
        if self.log.errors:
            raise Failure("the program failed:\n" + self.log.errors[0])

    def _check_history(self, node):
        if not (node.directory / "devpi_lite.db").exists():
            return
        with node.reading() as db:
            head = node.head(db)
            if head != node.seen:
                cut = dict(map(tuple, db.execute("SELECT serial, hash FROM cut_entries").fetchall()))
                for serial, hash_ in cut.items():
                    if serial - 1 in cut:
                        self.chain.setdefault(hash_, (serial, cut[serial - 1]))
                for serial, hash_, prev in db.execute("SELECT serial, hash, prev FROM changelog").fetchall():
                    self.chain[hash_] = serial, prev
                if not self.descends(head, node.floor):
                    raise Failure("%s went from %s to %s" % (node, shown(node.floor), shown(head)))
                digest = hashlib.sha256(json.dumps(
                    list(devpi_lite.all_rows(db)), sort_keys=True, default=_text).encode()).digest()
                known = self.states.setdefault(head[1], (digest, node.name))
                if known[0] != digest:
                    raise Failure("%s has other rows at %s than %s" % (node, shown(head), known[1]))
                node.seen = node.floor = head
            term = int(db.execute("SELECT value FROM node WHERE key = 'term'").fetchone()[0])
            if term < node.lowest_term:
                raise Failure("%s is of term %d, and was of %d" % (node, term, node.lowest_term))
            node.lowest_term = term

    def descends(self, head, floor):
        """Whether a history contains another's newest entry."""
        serial, hash_ = head
        while serial > floor[0]:
            if hash_ not in self.chain:
                return None         # its entries were cut before anybody saw them
            prev = self.chain[hash_][1]
            serial, hash_ = serial - 1, prev
        return (serial, hash_) == tuple(floor)

    def _check_files(self, node):
        files = node.directory / "files"
        for entry in os.scandir(files) if files.exists() else ():
            if entry.is_dir():
                for file in os.scandir(entry.path):
                    facts = file.stat()
                    mark = facts.st_size, facts.st_ino
                    if node.checked.get(file.path) != mark:
                        with open(file.path, "rb") as opened:
                            if hashlib.sha256(opened.read()).hexdigest() != file.name:
                                raise Failure("%s has other bytes under %s" % (node, file.name))
                        node.checked[file.path] = mark

    def check_replica(self, node, worked):
        """After a replica has followed: it has its primary's history, or says that it does not."""
        state, head = node.follower.state, node.head()
        primary = self.names.get(node.primary_host)
        if worked and primary is not None and primary.app is not None and not primary.is_doomed and not self.is_turning:
            # what the primary has may be more by now: it may not be another one
            if self.descends(primary.head(), head) is False:
                raise Failure("%s follows %s at %s, which has %s" % (
                    node, primary, shown(head), shown(primary.head())))
        if state == "diverged" and not self.is_unclear(node) and self.descends(primary.head(), head) \
                and primary.term >= node.term:
            raise Failure("%s says that it diverged (%s), but has a prefix of %s's history" % (
                node, node.follower.trouble, primary))
        lag = node.follower.primary_serial
        if worked and lag is not None and lag < 0:
            raise Failure("negative lag")

    def is_unclear(self, node):
        """Whether the last answer to a replica may have been another server's than that which its name leads to now."""
        primary = self.names.get(node.primary_host)
        return self.badness > 0 or self.is_turning or bool(self.blocked) or primary is None or primary.app is None \
            or primary.is_doomed or primary.is_replica

    def check_pages(self, node, index, project):
        """A page shows what the rows say, and what it shows can be had, or is said to come later."""
        reply = node.ask("GET", "/%s/+simple/%s/" % (index, project), "root", headers={
            "Accept": "application/vnd.pypi.simple.v1+json"})
        if node.is_doomed:
            return
        user, name = index.split("/")
        with node.reading() as db:
            rows = dict(map(tuple, db.execute(
                "SELECT filename, files.sha256 FROM files JOIN projects ON projects.id = project_id "
                "JOIN indexes ON indexes.id = projects.index_id JOIN users ON users.id = user_id "
                "WHERE users.name = ? AND indexes.name = ? AND projects.name = ? AND kind = 'releasefile'",
                (user, name, project)).fetchall()))
        if reply.status != 200:
            if rows:
                raise Failure("%s: %s on the page of %s/%s, which has files" % (node, reply.status, index, project))
            return
        files = {file["filename"]: file for file in reply.json()["files"]}
        if {name: file["hashes"]["sha256"] for name, file in files.items()} != rows:
            raise Failure("%s: the page of %s/%s shows %s, the rows are %s" % (node, index, project, files, rows))
        for name, file in sorted(files.items()):
            path = "/%s/%s" % (index, file["url"].partition("/%s/" % index)[2] or file["url"].replace("../", ""))
            path = path.partition("#")[0]
            reply = node.ask("GET", path, "root", headers={"Accept": "*/*"})
            if reply.status == 200:
                if hashlib.sha256(reply.body).hexdigest() != rows[name]:
                    raise Failure("%s: another file came for %s" % (node, path))
            elif reply.status not in (None, 502, 503, 507) and not (reply.status == 404 and self.files_are_lost):
                raise Failure("%s: %s for %s, which is listed" % (node, reply.status, path))

    # - the run

    def run(self, steps):
        """Take the steps, [(number, name of a step or such a function), ...]; raises what failed."""
        logger = devpi_lite.log
        before = logger.handlers[:], logger.level, logger.propagate
        logger.handlers, logger.propagate = [self.log], False
        logger.setLevel(logging.INFO)
        kept = self.take_seams()
        try:
            self.begin_world()
            for number, name in steps:
                self.dice = random.Random("%s %s" % (self.seed, number))
                take = STEPS[name][2] if isinstance(name, str) else name
                self.note("%d %s", number, take.__name__)
                take(self, self.dice)
                self.clock.pass_(self.dice.uniform(0, 2))
                self.check()
            self.note("all faults end")
            self.settle()
        finally:
            for node in self.nodes.values():
                node.is_doomed = False
                with contextlib.suppress(Exception):
                    node.stop()
            vars(devpi_lite).update(kept)
            logger.handlers, level, logger.propagate = before
            logger.setLevel(level)

    def take_seams(self):
        """Put the clock, the disk and the line of this world into the program; returns what was there."""
        seams = {"time": self.clock, "os": disk(self), "UpstreamClient": client_of(self), "print": self.said,
                 "secrets": Chance(self.seed)}
        kept = {name: vars(devpi_lite).get(name) for name in seams}
        kept["print"] = print
        vars(devpi_lite).update(seams)
        return kept

    def said(self, *texts, file=None, **_):
        """What a command prints."""
        self.note("    %s", " ".join(map(str, texts))[:300])

    def begin_world(self):
        primary = self.add("p", "main")
        copy_files(templates()["p"], primary.directory)
        primary.start()
        for name in ("a", "b", "c"):
            node = self.add(name, "host-" + name, "main")
            if self.dice.random() < 0.7:
                copy_files(templates()["r"], node.directory)
                with contextlib.closing(sqlite3.connect(str(node.directory / "devpi_lite.db"))) as db:
                    db.execute("UPDATE node SET value = ? WHERE key = 'uuid'", ("%032x" % self.dice.getrandbits(128),))
                    db.commit()
            node.start()
        self.check()

    def heal(self):
        """An operator repairs what parted: then all are equal."""
        self.note("an operator heals all")
        for host in {node.host for node in self.nodes.values()}:
            self.names[host] = max((node for node in self.nodes.values() if node.host == host),
                                   key=lambda node: (not node.is_replica, node.term))
        reached = [node for node in primaries(self) if self.names[node.host] is node]
        if not reached:
            return
        primary = reached[0]
        if primary.app.store.closed_to_rows:
            let_go_on(self, primary)
        others = [node for node in self.nodes.values() if node is not primary]
        for node in others:
            if node.is_replica:
                node.stop()
                node.primary_host = primary.host
                node.start()
                self.catch_up([node])
        if primary.app.store.closed_to_rows:
            let_go_on(self, primary)
        for node in others:
            if not node.is_replica or node.follower.state == "diverged":
                if not make_replica(self, node, primary):
                    raise Failure("%s can't be made a replica of %s" % (node, primary))
        for _ in range(3):
            self.catch_up(self.running(True))
        if primary.app.store.closed_to_rows:
            raise Failure("%s is fenced again: %s" % (primary, primary.app.store.closed_to_rows))
        self.check()
        for node in self.running(True):
            if (node.follower.state, node.head()) != ("following", primary.head()):
                raise Failure("%s is %s at %s when all is healed, and %s at %s: %s" % (
                    node, node.follower.state, shown(node.head()), primary, shown(primary.head()), node.follower.trouble))

    def catch_up(self, nodes):
        """Let replicas follow and fetch."""
        self.clock.pass_(4000)
        for node in nodes:
            with self.clock.of(node.name):
                worked = node.follower.follow_once()
                self.check_replica(node, worked)
                node.fetch_files()

    def settle(self):
        """The faults end: whoever did not diverge has all, within a bound."""
        self.badness, self.blocked, self.is_turning = 0.0, set(), False
        self.clock.offsets.clear()
        self.dice = random.Random("%s end" % self.seed)
        for node in self.nodes.values():
            if node.app is None:
                node.start()
            node.make_room(None)
        for number in range(12):
            before = [node.head() for node in self.running()]
            self.catch_up(self.running(True))
            if number and before == [node.head() for node in self.running()] and not any(
                    node.follower.files.wanted.missing for node in self.running(True)):
                break
        self.check()
        for node in self.running(True):
            primary = self.names[node.primary_host]
            follower = node.follower
            with node.reading() as db:
                wanted = [tuple(row) for row in db.execute("SELECT sha256, error FROM wanted").fetchall()]
            if follower.state == "diverged":
                continue
            if primary.app is None or primary.is_replica:
                continue
            if follower.state != "following" or node.head() != primary.head():
                raise Failure("%s is %s at %s in the end (%s), and %s at %s" % (
                    node, follower.state, shown(node.head()), follower.trouble, primary, shown(primary.head())))
            lost = [sha256 for sha256, _ in wanted if primary.app.blobs.has(sha256)]
            if lost:
                raise Failure("%s never fetched %s: %s" % (node, lost, wanted))
        if len(self.running(False)) > 1 or any(node.follower.state == "diverged" for node in self.running(True)) \
                or any(node.app.store.closed_to_rows for node in self.running(False)):
            self.heal()
        for node in self.dice.sample(self.running(), 2):
            for user in USERS:
                self.check_pages(node, "%s/%s" % (user, self.dice.choice(INDEXES)), self.dice.choice(PROJECTS))


def shown(head):
    return "%d %s" % (head[0], head[1].hex()[:8])


def _text(value):
    return value.hex() if isinstance(value, bytes) else dict(value)


def cut_place(answer, dice):
    """Where an answer is cut: in the head, at its end, in the body, before the last byte."""
    head = answer.find(b"\r\n\r\n") + 4
    body = dice.randrange(head, len(answer) + 1) - 1
    return dice.choice((dice.randrange(1, head), head, body, body, body, len(answer) - 1))


@functools.lru_cache(maxsize=None)
def templates():
    """{name: directory} of a primary "p" with two users and their indexes, and of a replica "r" of it: worlds begin with
    them."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=memory(), prefix="devpi_lite-simulated-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    world = World("templates", folder)
    kept = world.take_seams()
    try:
        primary = world.add("p", "main").start()
        for user in USERS:
            assert primary.ask("PUT", "/" + user, "root", {"password": "first"}).status == 201
            for index in INDEXES:
                assert primary.ask("PUT", "/%s/%s" % (user, index), user, {
                    "type": "stage", "bases": [], "volatile": index == "dev"}).status == 200
        replica = world.add("r", "replica", "main").start()
        assert replica.follower.follow_once(), replica.follower.trouble
        replica.stop()
        primary.stop()
    finally:
        vars(devpi_lite).update(kept)
    return {"p": primary.directory, "r": replica.directory}


def memory():
    """A folder in memory, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


# -- steps


def any_place(dice):
    return "%s/%s" % (dice.choice(USERS), dice.choice(INDEXES))


def some_node(world, dice, is_replica=None):
    nodes = world.running(is_replica)
    return dice.choice(nodes) if nodes else None


def change(world, node, what, *args, **keywords):
    """A client's change through a node; what it did must be seen there if it was told so (I4)."""
    is_closed, before = not node.is_replica and node.app.store.closed_to_rows, node.head()
    reply = node.ask(*args, **keywords)
    if is_closed and node.head() != before:
        raise Failure("%s takes changes, although %s" % (node, is_closed))
    world.note("  %s through %s: %s%s", what, node, reply.status, " " + reply.headers.get("X-DEVPI-SERIAL", "")
               if reply.status else "")
    if reply.done and node.is_replica and not node.is_doomed and "X-DEVPI-REPLICA-LAG" not in reply.headers:
        stated = int(reply.headers["X-DEVPI-SERIAL"])
        if node.app.store.serial < stated:
            raise Failure("%s said that a change was here: %d, %d" % (node, node.app.store.serial, stated))
    if reply.status is not None and reply.status >= 500 and reply.status not in (502, 503, 507):
        raise Failure("%s: %s %s" % (what, reply.status, reply.body[:300]))
    return reply


def upload_to(world, node, index, project, version="1.0", number=0):
    archive, body, type_ = upload_form(project, version, number)
    return change(world, node, "upload of %s to %s" % (archive.filename, index), "POST", "/%s/" % index,
                  index.partition("/")[0], body, {"Content-Type": type_})


@step(30)
def upload(world, dice):
    node = some_node(world, dice)
    if node is None:
        return
    index = any_place(dice)
    archive, body, type_ = upload_form(dice.choice(PROJECTS), dice.choice(VERSIONS), dice.randrange(4))
    reply = change(world, node, "upload of %s to %s" % (archive.filename, index), "POST", "/%s/" % index, "root" if
                   dice.random() < 0.1 else index.partition("/")[0], body, {"Content-Type": type_})
    if reply.done and "X-DEVPI-REPLICA-LAG" not in reply.headers and not node.is_doomed:
        world.check_pages(node, index, archive.name)


@step(5)
def remove(world, dice):
    node = some_node(world, dice)
    if node is None:
        return
    index = any_place(dice)
    path = "/%s/%s" % (index, dice.choice(PROJECTS))
    if dice.random() < 0.5:
        path += "/" + dice.choice(VERSIONS)
    change(world, node, "removal of " + path, "DELETE", path + "?force", index.partition("/")[0])


@step(3)
def yank(world, dice):
    node = some_node(world, dice)
    if node is None:
        return
    index = any_place(dice)
    path = "/%s/%s/%s" % (index, dice.choice(PROJECTS), dice.choice(VERSIONS))
    change(world, node, "yank of " + path, "PATCH", path, index.partition("/")[0], {"yanked": dice.choice((True, False, "why"))})


@step(3)
def index_changes(world, dice):
    node = some_node(world, dice)
    if node is None:
        return
    index = any_place(dice)
    user = index.partition("/")[0]
    kind = dice.randrange(3)
    if kind == 0:
        change(world, node, "end of " + index, "DELETE", "/" + index, user)
    elif kind == 1:
        change(world, node, "making " + index, "PUT", "/" + index, user, {
            "type": "stage", "bases": [], "volatile": dice.random() < 0.5})
    else:
        change(world, node, "change of " + index, "PATCH", "/" + index, user, {
            "title": str(dice.random()), "volatile": dice.random() < 0.5})


@step(3)
def user_changes(world, dice):
    node = some_node(world, dice)
    if node is None:
        return
    user = dice.choice((*USERS, "eve"))
    kind = dice.randrange(4)
    if kind == 0 and user == "eve":
        change(world, node, "end of " + user, "DELETE", "/" + user, "root")
    elif kind == 1:
        change(world, node, "making " + user, "PUT", "/" + user, "root", {"password": "first"})
    else:
        change(world, node, "password of " + user, "PATCH", "/" + user, "root", {"password": "x%d" % dice.randrange(9)})


@step(40)
def follow(world, dice):
    for node in world.running(True):
        if dice.random() < 0.6 and not node.is_doomed:
            follow_once(world, node)


def follow_once(world, node):
    with world.clock.of(node.name):
        worked = node.follower.follow_once()
    world.note("  %s: %s %s %s", node, node.follower.state, shown(node.head()), node.follower.trouble[:100])
    if not node.is_doomed:
        world.check_replica(node, worked)


@step(15)
def fetch(world, dice):
    for node in world.running(True):
        if dice.random() < 0.6 and not node.is_doomed:
            with world.clock.of(node.name):
                node.fetch_files()


@step(10)
def read(world, dice):
    node = some_node(world, dice)
    if node is not None:
        world.check_pages(node, any_place(dice), dice.choice(PROJECTS))


@step(3)
def status(world, dice):
    node = some_node(world, dice)
    if node is None:
        return
    reply = node.ask("GET", "/+status", "root")
    if reply.status is None:
        return
    facts = reply.json()["result"]
    if node.is_replica and facts["replication-state"] != node.follower.state:
        raise Failure("+status says %s" % facts)
    if node.is_replica and node.follower.state == "diverged" and facts["status"] != "fatal":
        raise Failure("%s diverged, and +status says %s" % (node, facts["status"]))
    metrics = node.ask("GET", "/+metrics", "root").body.decode()
    for line in metrics.splitlines():
        if not line.startswith("#") and line.rpartition(" ")[2].startswith("-") and line != "devpi_lite_serial -1":
            raise Failure("negative: " + line)


@step(12, "kill")
def crash(world, dice):
    """A node is killed at some moment of what it does next, or at rest."""
    node = some_node(world, dice)
    if node is None:
        return
    node.crash_in = dice.choice((0, 1, 2, 3, 4, 5, 7, 9, 12, 15, 20))
    for _ in range(dice.randrange(3)):
        if node.is_replica and dice.random() < 0.8:
            with world.clock.of(node.name):
                if dice.random() < 0.5:
                    node.follower.follow_once()
                else:
                    node.fetch_files()
        else:
            index = any_place(dice)
            archive, body, type_ = upload_form(dice.choice(PROJECTS), dice.choice(VERSIONS), dice.randrange(4))
            node.ask("POST", "/%s/" % index, index.partition("/")[0], body, {"Content-Type": type_})
    world.check()
    if dice.random() < 0.6:
        node.start()


@step(10)
def start(world, dice):
    """Nodes that are down come up again."""
    for node in world.nodes.values():
        if node.app is None and dice.random() < (0.3 if node.rests else 0.8):
            node.start()
            world.note("  %s starts", node)


@step(5, "end")
def restart(world, dice):
    node = some_node(world, dice)
    if node is not None:
        node.stop()
        node.start()


@step(5, "partition")
def partition(world, dice):
    """A line lets nothing through, in one direction or both."""
    node = some_node(world, dice, True)
    if node is not None:
        for way in dice.choice((("out",), ("back",), ("out", "back"))):
            world.blocked.add((node.name, node.primary_host, way))
            world.note("  %s -> %s: %s is blocked", node, node.primary_host, way)


@step(2, "partition line")
def line_heals(world, dice):
    world.blocked.clear()
    world.badness = 0.0


@step(7, "line")
def line_turns_bad(world, dice):
    world.badness = dice.choice((0.2, 0.5, 0.8))


@step(6, "clock")
def clock_jumps(world, dice):
    node = some_node(world, dice)
    if node is not None:
        world.clock.offsets[node.name] = dice.choice((DAY, -DAY, 70, -70, 50, -50, 0, 0))
        world.note("  %s's clock: %+d", node, world.clock.offsets[node.name])


@step(3, "clock")
def clocks_are_set(world, dice):
    world.clock.offsets.clear()


@step(2)
def time_passes(world, dice):
    world.clock.pass_(dice.choice((10, 100, 4000, DAY)))


@step(6, "disk")
def full_disk(world, dice):
    node = some_node(world, dice)
    if node is not None:
        node.make_room(dice.choice((0, 0, 500, 5000)))
        world.note("  %s has %s bytes left", node, node.free)


@step(5, "disk")
def disk_has_room(world, dice):
    for node in world.nodes.values():
        node.make_room(None)


@step(3)
def clean(world, dice):
    node = some_node(world, dice)
    if node is not None:
        with world.clock.of(node.name):
            node.app.clean_all()


@step(6, "replay")
def old_request(world, dice):
    """A request that was signed once comes again, to the same node or another one."""
    if world.old:
        app, raw = dice.choice(world.old)
        node = some_node(world, dice)
        if node is not None:
            reply = Reply(node.serve(raw))
            if reply.status == 200 and node.app is app:
                raise Failure("%s answered an old request" % node)


@step(6, "short")
def log_is_cut(world, dice):
    """The primary keeps a short log from now on."""
    node = some_node(world, dice, False)
    if node is not None:
        node.keep_log = node.app.store.keep_log = devpi_lite.LogBounds(dice.choice((300, 1500, 4000)), 90 * DAY)


@step(6, "back twins")
def copy_is_made(world, dice):
    """Somebody copies the primary's directory."""
    node = some_node(world, dice, False)
    if node is not None:
        target = world.folder / ("copy%d" % len(world.copies))
        if node.app is not None:
            copy_files(node.directory, target)
        world.copies.append((target, node.name))


@step(5, "back")
def copy_is_put_back(world, dice):
    """A primary is as it was, by hand (same epoch), or by the command's way (another one)."""
    if not world.copies:
        return
    copy, name = dice.choice(world.copies)
    node = world.nodes[name]
    if node.is_replica:
        return
    node.stop()
    shutil.rmtree(node.directory)
    copy_files(copy, node.directory)
    by_command = dice.random() < 0.5
    if by_command:
        store_closes(node)
        devpi_lite.begin_restored(str(node.directory / "devpi_lite.db"))
    node.forget()
    node.start()
    world.note("  %s is as in %s, %s", node, copy.name, "by restore" if by_command else "by hand")


def store_closes(node):
    """Fold the write-ahead log of a copy in."""
    with contextlib.closing(sqlite3.connect(str(node.directory / "devpi_lite.db"))) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


@step(8, "twins")
def name_turns(world, dice):
    """The name of two servers may lead to the other one between two requests."""
    world.is_turning = not world.is_turning


def run_command(world, node, name, *words):
    """Run a command of the program on a node's directory; whether it did its work."""
    command = devpi_lite.COMMANDS[name]
    with world.clock.of(node.name):
        try:
            command.run(devpi_lite.parse_options(command, ["--serverdir", str(node.directory), *words]))
            return True
        except devpi_lite.FatalError as error:
            world.note("    %s: %s", name, str(error)[:300])
            return False


def primaries(world):
    """The running primaries, that of the latest term first."""
    return sorted(world.running(False), key=lambda node: (node.term, node.head()), reverse=True)


@step(6, "promote")
def promote(world, dice):
    """A replica becomes the primary, while the old one is down, or cut off, or there."""
    node = some_node(world, dice, True)
    if node is None:
        return
    old = world.names.get(node.primary_host)
    if old is not None and old.app is not None and dice.random() < 0.6:
        old.stop()
        old.rests = True
    node.stop()
    words = ["--force"] + ["--accept-loss"] * (dice.random() < 0.6)
    world.files_are_lost |= len(words) == 2
    if run_command(world, node, "promote", *words):
        node.primary_host = None
        world.note("  %s is a primary", node)
    node.start()


@step(6, "promote back twins")
def repoint(world, dice):
    """A replica is started with the URL of another primary."""
    node = some_node(world, dice, True)
    found = primaries(world)
    if node is not None and found:
        primary = found[0] if dice.random() < 0.8 else dice.choice(found)
        node.stop()
        node.primary_host = primary.host
        node.start()
        world.note("  %s follows %s", node, primary.host)


@step(4, "promote back twins")
def accept_loss(world, dice):
    """An operator lets a primary that is fenced go on."""
    fenced = [node for node in world.running(False) if node.app.store.closed_to_rows]
    if fenced:
        let_go_on(world, dice.choice(fenced))


def let_go_on(world, node):
    node.stop()
    run_command(world, node, "promote", "--force", "--accept-loss")
    node.start()
    if node.app.store.closed_to_rows:
        raise Failure("%s is fenced after promote --accept-loss" % node)


@step(5, "promote back twins")
def resync(world, dice):
    """An operator makes a server that parted a replica of the newest primary."""
    found = primaries(world)
    parted = [node for node in world.running() if found and node is not found[0] and (
        node.follower.state == "diverged" if node.is_replica else node.app.store.closed_to_rows)]
    if parted:
        make_replica(world, dice.choice(parted), found[0])


def make_replica(world, node, primary):
    node.stop()
    is_done = run_command(world, node, "resync", "--primary-url", "http://%s:3141" % primary.host,
                          "--secretfile", world.settings.secretfile)
    if is_done:
        node.primary_host = primary.host
        node.forget()
    node.start()
    return is_done


@step(5, "promote")
def former_is_told(world, dice):
    """A promoted server tells its former primary."""
    for node in world.running(False):
        if "former_url" in node.app.store.node:
            store = node.app.store
            wait = store.wait_for_serial

            def once(*_):
                store.waits_are_over = True
            store.wait_for_serial = once
            try:
                with world.clock.of(node.name):
                    node.app.replication._tell_former_primary()
            finally:
                store.wait_for_serial, store.waits_are_over = wait, False


@step(8, "twins")
def second_primary(world, dice):
    """Another server starts on a copy of the primary's directory; the name leads to either."""
    if not world.copies:
        return
    copy, name = dice.choice(world.copies)
    old = world.nodes[name]
    if "q" not in world.nodes and not old.is_replica:
        node = Node(world, "q", old.host)
        copy_files(copy, node.directory)
        world.nodes["q"] = node
        node.start()
    elif "q" in world.nodes:
        node = world.nodes["q"]
        if node.host == old.host:
            world.names[old.host] = dice.choice((node, old))
            world.note("  %s leads to %s", old.host, world.names[old.host])


# -- seeds


def steps_of(seed, count=30, faults=None):
    """[(number, name), ...]: the steps of a seed. What people and replicas do is in each, with some kinds of `faults`."""
    dice = random.Random("steps %s" % seed)
    weights = {name: weight for name, (weight, fault, _) in STEPS.items() if fault is None}
    for chosen in faults or dice.sample(FAULTS, dice.randint(1, 4)):
        for name, (weight, fault, _) in STEPS.items():
            if fault and chosen in fault.split():
                weights[name] = 2 * weight
    names = dice.choices(list(weights), list(weights.values()), k=count)
    return list(enumerate(names))


def simulate(seed, steps=None, verbose=False):
    """Run a seed; raises `Failure` with the seed and the steps."""
    folder = tempfile.mkdtemp(dir=memory(), prefix="devpi_lite-simulated-")
    world = None
    try:
        templates()
        world = World(seed, folder, verbose)
        world.run(steps_of(seed) if steps is None else steps)
    except Exception as error:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__)) if not isinstance(
            error, Failure) else str(error)
        raise Failure("seed %s: %s\n%s" % (seed, text, "\n".join(world.done if world else ()))) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return world


def shrink(seed, faults=None):
    """The fewest steps found that still fail, and the failure."""
    steps, failure = steps_of(seed, faults=faults), None
    try:
        simulate(seed, steps)
        return None, None
    except Failure as error:
        failure = error
    size = len(steps) // 2
    while size:
        at = 0
        while at < len(steps):
            fewer = steps[:at] + steps[at + size:]
            try:
                simulate(seed, fewer)
                at += size
            except Failure as error:
                steps, failure = fewer, error
        size //= 2
    return steps, failure


@contextlib.contextmanager
def prepared():
    """What a simulation needs: no costly hashes, no waits, few folders."""
    seams = [(devpi_lite._SCRYPT, "n", 16)]
    attributes = [(devpi_lite.Limits, "log_wait", 0), (devpi_lite.Limits, "synced_alone", 1000),
                  (devpi_lite.Limits, "small_blob", 2000), (devpi_lite.Limits, "resumed_size", 100),
                  (devpi_lite, "BLOB_FOLDERS", ("ff",)),
                  (devpi_lite.RelayedResponse, "begins", lambda self, seconds=0: False)]
    seams += [(_Attributes(owner), name, value) for owner, name, value in attributes]
    before = [place[name] for place, name, _ in seams]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        for place, name, value in seams:
            place[name] = value
        yield
    finally:
        for (place, name, _), value in zip(seams, before):
            place[name] = value
        sys.setswitchinterval(interval)


class _Attributes:
    def __init__(self, owner):
        self.owner = owner

    def __getitem__(self, name):
        return vars(self.owner)[name]

    def __setitem__(self, name, value):
        setattr(self.owner, name, value)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed")
    parser.add_argument("--faults", help="kinds of fault, by comma: " + ", ".join(FAULTS))
    parser.add_argument("--shrink")
    parser.add_argument("--most", type=int, default=5, help="failures after which it ends")
    with prepared():
        return run(parser.parse_args())


def run(told):
    faults = told.faults and told.faults.split(",")
    if told.shrink is not None:
        steps, failure = shrink(int(told.shrink), faults)
        print(steps, failure, sep="\n")
        return 1 if steps else 0
    if told.seed is not None:
        simulate(int(told.seed), steps_of(told.seed, faults=faults), True)
        return 0
    began, failed, count = time.process_time(), [], 0
    until = time.monotonic() + told.seconds
    for seed in range(told.first, told.first + told.seeds):
        if time.monotonic() > until or len(failed) >= told.most:
            break
        try:
            simulate(seed, steps_of(seed, faults=faults))
        except Failure as failure:
            failed.append(seed)
            print(failure, "\n", flush=True)
        count += 1
    spent = time.process_time() - began
    print("%d seeds, %.0f ms CPU each, failed: %s" % (count, 1000 * spent / max(1, count), failed or "none"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
