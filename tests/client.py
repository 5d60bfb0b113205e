"""What the tests of the command line client use: a person with an empty home who types commands, and a gate before the server.

Standard library only. The client runs as a process of its own, without a terminal unless a test asks for one. On POSIX most of
these processes are forked from one that has imported everything already, which is most of a start's time.
"""

import atexit
import contextlib
import dataclasses
import functools
import http.client
import importlib.util
import io
import itertools
import json
import os
import pathlib
import re
import shlex
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time

from harness import SOURCE as SERVER_SOURCE
from harness import Server, compiled, path_of, temporary_folder

SOURCE = SERVER_SOURCE.with_name("devpi_lite_client.py")
SECONDS = 180           # for one command
POSIX = os.name == "posix"
FEATURES = ["projectconfig-v2", "push-no-docs", "push-only-docs", "push-register-project", "server-keyvalue-parsing"]
_numbers = itertools.count()

# What this machine has configured for a client, for the network or for Python itself.
_CONFIGURATION = re.compile(
    "(?i)(devpi|pip|uv|tox|twine|virtualenv|virtual_env|workon|python|xdg|requests|curl|ssl_cert|git|hg|py_colors|no_color|"
    "force_color|netrc|ci$|columns$|lines$|term$).*|.*_proxy")


SCRIPT = compiled("devpi_lite_client")      # as pip leaves an installed module


@functools.lru_cache(maxsize=None)
def imported():
    """The client as a module of this process, for what no command shows by itself."""
    spec = importlib.util.spec_from_file_location("devpi_lite_client", str(SCRIPT))
    module = sys.modules["devpi_lite_client"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Printed(str):
    """What a command has written to stdout; `errors` is what went to stderr, `code` the exit code."""

    def __new__(cls, printed, errors, code):
        self = super().__new__(cls, printed)
        self.errors, self.code = errors, code
        return self

    @property
    def lines(self):
        return self.splitlines()

    def json(self):
        """The one JSON document that stdout is."""
        return json.loads(self)


class Client:
    """A person with a home of their own: `devpi("list", "-v")` runs the client and returns what it Printed.

    Nothing is configured, the client directory is the default one, and nobody answers questions. `command` is what is run.
    """

    def __init__(self, home):
        self.home = pathlib.Path(home)
        self.home.mkdir(parents=True, exist_ok=True)
        self.directory = self.home / ".devpi" / "client"
        self.command = [sys.executable, str(SCRIPT)]
        self.environment = clean_environment(self.home)

    @property
    def forked(self):
        """Whether a run may be forked: on POSIX, of the client itself, in this interpreter."""
        return POSIX and self.command == [sys.executable, str(SCRIPT)]

    # -- running

    def __call__(self, *arguments, expect=0, input=None, cwd=None, timeout=SECONDS, **environment):
        """Runs to the end. AssertionError unless the exit code is `expect` (None: any but 0), and if the client has a fault.

        `input` is what stands on stdin (text); without it stdin is empty. `environment` adds variables; None takes one away.
        """
        if self.forked:
            run = _nursery().run(self.command[1:] + [str(argument) for argument in arguments], str(cwd or self.home),
                                 self.environment_with(environment), input, timeout)
            return self.judge(arguments, Printed(*run), expect)
        process = self.start(*arguments, input=input is not None, cwd=cwd, **environment)
        try:
            printed, errors = process.communicate(None if input is None else input.encode(), timeout=timeout)
        except BaseException:           # interrupted as well: what the client has started ends with it
            end(process)
            raise
        return self.judge(arguments, Printed(_text(printed), _text(errors), process.returncode), expect)

    def judge(self, arguments, printed, expect):
        succeeded = printed.code != 0 if expect is None else printed.code == expect
        succeeded = succeeded and not re.search("Traceback|should not happen", printed + printed.errors)
        assert succeeded, "devpi %s: exit code %s\n%s\n-- stderr\n%s" % (
            " ".join(map(str, arguments)), printed.code, printed, printed.errors)
        return printed

    def start(self, *arguments, input=False, cwd=None, **environment):
        """The running process, its stdout and stderr in pipes; `input`: stdin too, else it is empty."""
        with _heeding_signals():
            return subprocess.Popen(
                self.command + [str(argument) for argument in arguments],
                cwd=str(cwd or self.home),
                env=self.environment_with(environment),
                stdin=subprocess.PIPE if input else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,     # no terminal to ask for a password on
            )

    def environment_with(self, more):
        return {name: str(value) for name, value in dict(self.environment, **more).items() if value is not None}

    def terminal(self, *arguments, cwd=None, size=(24, 80), **environment):
        """The same on a terminal of its own; see Terminal."""
        environment = dict({"TERM": "xterm"}, **environment)
        command = self.command + [str(argument) for argument in arguments]
        return Terminal(command, self.environment_with(environment), str(cwd or self.home), size)

    def with_peak_memory(self, *arguments, expect=0, cwd=None, timeout=1200, **environment):
        """(what it Printed, the most memory in bytes that it had resident at a time).

        A small process in between asks for it: a child counts what its parent had when it was forked.
        """
        note = self.home / ("peak-%d" % next(_numbers))
        done = subprocess.run(
            [sys.executable, "-IS", "-c", _MEASURE, str(note)] + self.command + [str(argument) for argument in arguments],
            cwd=str(cwd or self.home), env=self.environment_with(environment), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=timeout)
        printed = Printed(_text(done.stdout), _text(done.stderr), done.returncode)
        return self.judge(arguments, printed, expect), int(note.read_text())

    # -- the client directory

    def state(self, name="current.json"):
        """A file of the client directory; {} if it is not there."""
        path = self.directory / name
        return json.loads(path.read_text()) if path.exists() else {}

    def write_state(self, name, value):
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / name).write_text(json.dumps(value, indent=2, sort_keys=True))

    def mode(self, name="current.json"):
        return stat.S_IMODE((self.directory / name).stat().st_mode)

    def sign_in(self, server, user=None, index=None, url=None):
        """Leaves the state of `use URL/INDEX` and `login USER`, by the session that the harness knows; returns self."""
        url = url or server.url
        self.write_state("current.json", {
            "features": FEATURES, "login": url + "/+login", "username": user,
            "index": "%s/%s" % (url, index) if index else None,
            "pypisubmit": "%s/%s/" % (url, index) if index else None,
            "simpleindex": "%s/%s/+simple/" % (url, index) if index else None})
        if user and user not in server.tokens:
            server.login(user)
        self.write_state("auth.json", {"auth": {url + "/": [[user, server.tokens[user]]]} if user else {}})
        return self

    # -- files

    def shown(self, path):
        """The path as messages name it: with ~ for the home."""
        return "~/" + str(pathlib.Path(path).relative_to(self.home)).replace(os.sep, "/")

    def save(self, archive, directory="archives"):
        """Writes the archive below the home, under its own file name; returns the path."""
        directory = self.home / directory
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / archive.filename
        path.write_bytes(archive.content)
        return path

    def write(self, path, text, executable=False):
        """A text file below the home; returns its path."""
        path = self.home / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if executable:
            path.chmod(0o755)
        return path

    def add_command(self, name, program, directory="bin"):
        """An executable NAME, which is that Python program, on a PATH of its own; returns the PATH that finds it first.

        It begins as a shell script: a line with "#!" takes no interpreter whose path is long or has a space.
        """
        text = "#!/bin/sh\n'''exec' %s -IS \"$0\" \"$@\"\n' '''\n%s" % (shlex.quote(sys.executable), program)
        path = self.write(os.path.join(directory, name), text, executable=True)
        return os.pathsep.join([str(path.parent), self.environment["PATH"]])


def _text(data):
    """As the test wants to read it: with one kind of line end."""
    return data.decode("utf-8", "replace").replace("\r\n", "\n")


_MEASURE = """if True:
    import resource, subprocess, sys
    code = subprocess.call(sys.argv[2:])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    open(sys.argv[1], "w").write(str(peak))
    sys.exit(code)"""


def clean_environment(home):
    """The environment without what configures a client, with that home."""
    environment = {name: value for name, value in os.environ.items() if not _CONFIGURATION.fullmatch(name)}
    environment.update(
        HOME=str(home), USERPROFILE=str(home), APPDATA=str(home / "AppData"), TERM="dumb",
        GIT_CONFIG_NOSYSTEM="1", GIT_CEILING_DIRECTORIES=str(home), PYTHON_KEYRING_BACKEND="keyring.backends.null.Keyring")
    return environment


@contextlib.contextmanager
def _heeding_signals():
    """What is started meanwhile obeys Ctrl-C and SIGHUP, though we ignore them: under nohup, or in a script's background."""
    ignored = [number for number in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT))
               if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, lambda *_: None)      # which a new program does not inherit
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


def end(process):
    """Kills a process of Client.start and what it has started."""
    if POSIX:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    else:
        process.kill()
    process.communicate()


class _Nursery:
    """A process that has imported the client; each run is a fork of it that calls main(), and ends as an interpreter does."""

    _PROGRAM = """if True:
        import gc, json, os, socket, struct, sys
        sys.path.insert(0, os.path.dirname(sys.argv[2]))
        import devpi_lite_client
        import configparser, getpass, netrc, signal, ssl, subprocess, tarfile, tempfile, urllib.request, zipfile
        devpi_lite_client.RETRY_PAUSES = 0.05, 0.1      # many tests wait for both
        gc.freeze()
        link = socket.socket(fileno=int(sys.argv[1]))
        while True:
            data, files, _, _ = socket.recv_fds(link, 4, 3)
            if not data:
                sys.exit()
            data = link.recv(struct.unpack("i", data)[0], socket.MSG_WAITALL)
            pid = os.fork()
            if not pid:
                break
            for file in files:
                os.close(file)
            link.send(struct.pack("i", pid))
            status = os.waitpid(pid, 0)[1]
            link.send(struct.pack("i", status))
        link.close()
        os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        sys.argv, directory, environment = json.loads(data)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[0] = os.path.dirname(sys.argv[0])
        sys.exit(devpi_lite_client.main())"""

    def __init__(self):
        self._link, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-c", self._PROGRAM, str(other.fileno()), str(SCRIPT)], pass_fds=[other.fileno()])
        atexit.register(self._end)

    def _end(self):
        self._link.close()
        self._process.wait()

    def run(self, arguments, directory, environment, input, seconds):
        """(what it wrote to stdout, to stderr, the exit code)."""
        files = [tempfile.TemporaryFile() for _ in range(3)]
        files[0].write((input or "").encode())
        files[0].seek(0)
        request = json.dumps([arguments, directory, environment]).encode()
        socket.send_fds(self._link, [struct.pack("i", len(request))], [file.fileno() for file in files])
        self._link.sendall(request)
        (pid,) = struct.unpack("i", self._link.recv(4))
        self._link.settimeout(seconds)
        try:
            (status,) = struct.unpack("i", self._link.recv(4))
        except BaseException:           # it takes too long, or is interrupted: what the client has started ends with it
            os.killpg(pid, signal.SIGKILL)
            self._link.settimeout(None)
            self._link.recv(4)
            raise
        self._link.settimeout(None)
        for file in files[1:]:
            file.seek(0)
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        written = [_text(file.read()) for file in files[1:]]
        for file in files:
            file.close()
        return written + [code]


@functools.lru_cache(maxsize=None)
def _nursery():
    return _Nursery()


class Terminal:
    """A command on a pseudo terminal, of which it is the foreground: what is typed reaches it, Ctrl-C as well.

        with devpi.terminal("login", "alice") as terminal:
            terminal.expect("password for user alice")
            terminal.type("secret\\r")
            assert terminal.wait() == 0
        terminal.shown              # everything that was shown
    """

    def __init__(self, command, environment, directory, size):
        import fcntl
        import pty
        import termios

        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", size[0], size[1], 0, 0))
        with _heeding_signals():
            self.process = subprocess.Popen(
                command, cwd=directory, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(slave)
        self._read, self._found, self._changed, self._ended = b"", 0, threading.Condition(), False
        self._reader = threading.Thread(target=self._follow, name="terminal", daemon=True)
        self._reader.start()

    def _follow(self):
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:             # Linux says so when nobody has the other end any more
                data = b""
            with self._changed:
                self._read += data
                self._ended = not data
                self._changed.notify_all()
            if not data:
                return

    @property
    def shown(self):
        return self._read.decode("utf-8", "replace").replace("\r\n", "\n")

    def expect(self, text, seconds=SECONDS):
        """Returns when the text is shown, behind what the last call found; AssertionError if it isn't, or can't be any more."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while text not in self.shown[self._found:]:
                left = deadline - time.monotonic()
                assert left > 0 and not self._ended, "%r is not shown:\n%s" % (text, self.shown)
                self._changed.wait(left)
            self._found = self.shown.index(text, self._found) + len(text)

    def type(self, text):
        os.write(self._master, text.encode())

    def wait(self, seconds=SECONDS):
        """The exit code."""
        code = self.process.wait(seconds)
        self._reader.join(seconds)
        return code

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()
        os.close(self._master)


# -- the server's side


@functools.lru_cache(maxsize=None)
def shared_site():
    """One server for all files of tests: alice and bob ("pw-of-alice", ...), and root/pypi, a mirror of nothing.

    Each test makes indexes of its own, by new_index().
    """
    server = Server(os.path.join(temporary_folder(), "server")).start()
    atexit.register(server.kill)
    for name in ("alice", "bob"):
        server.add_user(name, "pw-of-" + name)
    server.add_mirror("root/pypi", "http://127.0.0.1:9/simple/")
    return server


def file_path(index, archive):
    """The path of an uploaded file, without the leading slash."""
    return path_of(archive, index).lstrip("/")


def file_url(server, index, archive):
    return server.url + path_of(archive, index)


def manual(server, release):
    """The first page of the documentation of "INDEX/PROJECT/VERSION"; None if there is none."""
    reply = server.get("/%s/+doc/index.html?raw" % release, headers={"Accept": "text/html"})
    return reply.text if reply.status == 200 else None


@dataclasses.dataclass(frozen=True)
class Passed:
    """The head of a request that came to a Gate. `headers` match in any letter case; `path` is as it stood."""

    method: str
    path: str
    headers: object


class Gate:
    """A port that leads to a server, as a proxy or a bad network before it would, and at which requests may meet a fault.

    `passed`: the heads of all requests, as Passed. With `certificate` (a PEM file that has the key too) the port speaks TLS.
    With `prefix` ("/devpi") the server lies below that path.
    A request for a whole URL is taken as a proxy takes it, CONNECT too: whatever host it names, it gets to the server.

        gate.fault("POST /alice/dev/", "reset", times=1)
        gate.fault("GET /alice/dev/demo", "answer", status=503, body=b"busy")

    Faults: "reset" at the head, "drop": close after the head, "cut" (after=N): close after N bytes of the body, "hang": read
    everything and never answer, "answer" (status=, body=, headers={}, early=False): answer in place of the server, if `early`
    without having read the body, "truncate" (after=N): end the server's answer after N bytes (head included), "late"
    (seconds=N): pass the request on after that time.
    """

    def __init__(self, server, certificate=None, prefix=""):
        self.server, self.passed, self._faults, self._lock = server, [], [], threading.Lock()
        self._tls = None
        if certificate:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(str(certificate))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.host = "127.0.0.1:%d" % self.port
        self._prefix = prefix
        self.url = "%s://%s%s" % ("https" if certificate else "http", self.host, prefix)
        self._released = threading.Event()
        threading.Thread(target=self._accept, name="gate", daemon=True).start()

    def fault(self, request, kind, times=None, **arguments):
        """Requests whose "METHOD PATH" begins so meet the fault from now on, or `times` times."""
        with self._lock:
            self._faults.append({"request": request, "kind": kind, "left": times, "arguments": arguments})

    def clear(self):
        """Forgets faults and requests."""
        with self._lock:
            self._faults, self.passed = [], []

    def count(self, request):
        return len([each for each in self.passed if ("%s %s" % (each.method, each.path)).startswith(request)])

    def close(self):
        self._listener.close()
        self._released.set()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return                  # closed
            threading.Thread(target=self._serve, args=(connection,), name="gate", daemon=True).start()

    def _serve(self, connection):
        try:
            with connection:
                if self._tls:
                    connection = self._tls.wrap_socket(connection, server_side=True)
                self._one_request(connection)
                connection.close()
        except (OSError, ValueError):
            pass                        # broken connections are what this is for

    def _one_request(self, connection):
        data = b""
        while b"\r\n\r\n" not in data:
            piece = connection.recv(65536)
            if not piece:
                return
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        first, _, lines = head.partition(b"\r\n")
        method, path, _ = first.decode("latin-1").split(" ", 2)
        headers = http.client.parse_headers(io.BytesIO(lines + b"\r\n\r\n"))
        kind, arguments = None, {}
        with self._lock:
            self.passed.append(Passed(method, path, headers))
            for fault in self._faults:
                if fault["left"] != 0 and ("%s %s" % (method, path)).startswith(fault["request"]):
                    if fault["left"] is not None:
                        fault["left"] -= 1
                    kind, arguments = fault["kind"], fault["arguments"]
                    break
        length = int(headers.get("Content-Length") or 0)
        if kind == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        if kind == "drop":
            return
        if kind in ("cut", "hang", "answer") and not arguments.get("early"):
            if "100-continue" in headers.get("Expect", ""):
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            wanted, got = min(length, arguments.get("after", length)), len(body)
            while got < wanted:
                piece = connection.recv(65536)
                if not piece:
                    return
                got += len(piece)
            if kind == "hang":
                self._released.wait()
        if kind == "answer":
            return self._answer(connection, **arguments)
        if kind in ("cut", "hang"):
            return
        if kind == "late":
            self._released.wait(arguments["seconds"])
        self._forward(connection, method, path, headers, body, arguments.get("after") if kind == "truncate" else None)

    def _answer(self, connection, status=200, body=b"", headers=None, early=False):
        lines = ["HTTP/1.1 %d %s" % (status, http.client.responses.get(status, "Whatever")), "Connection: close",
                 "Content-Length: %d" % len(body)]
        lines += ["%s: %s" % header for header in (headers or {}).items()]
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode() + body)
        if early:
            # What the client has still to send must not reset the connection before it has read the answer.
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass

    def _forward(self, connection, method, path, headers, body, limit):
        with socket.create_connection(("127.0.0.1", self.server.port), 30) as onward:
            if method == "CONNECT":
                connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                path = re.sub("^https?://[^/]+", "", path)
                if not path.startswith(self._prefix):
                    return self._answer(connection, status=404)
                path = path[len(self._prefix):] or "/"
                sent = ["%s %s HTTP/1.1" % (method, path), "Connection: close"]
                if self._tls or self._prefix:
                    sent.append("X-Outside-URL: " + self.url)
                sent += ["%s: %s" % header for header in headers.items() if header[0].lower() not in (
                    "connection", "proxy-connection", "proxy-authorization")]
                onward.sendall("\r\n".join(sent).encode("latin-1") + b"\r\n\r\n" + body)
            onward.settimeout(None)
            threading.Thread(target=_pump, args=(connection, onward), name="gate", daemon=True).start()
            _pump(onward, connection, limit)


def _pump(source, target, limit=None):
    """Passes on what comes until it ends, or until `limit` bytes are through."""
    try:
        while limit is None or limit > 0:
            data = source.recv(65536)
            if not data:
                break
            target.sendall(data if limit is None else data[:limit])
            limit = None if limit is None else limit - len(data)
    except OSError:
        pass
    try:
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


# A certificate for 127.0.0.1 and its key. It guards nothing.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgCfrv4GDS6dlPwSxQ
/wy0nFfWCDMF8zvi1kcQ2VTNiwmhRANCAAR7crQ2z/JCqB6YCstRagSrMEN9EPdD
+PK/v9idAsqhljTGX7Iuc/xkPeV1K7/rxoxs/ChMYZjxEBZ5Epdxi7UV
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBdjCCAR2gAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAkxMjcuMC4w
LjEwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CTEyNy4wLjAuMTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABHtytDbP8kKoHpgK
y1FqBKswQ30Q90P48r+/2J0CyqGWNMZfsi5z/GQ95XUrv+vGjGz8KExhmPEQFnkS
l3GLtRWjXjBcMBoGA1UdEQQTMBGHBH8AAAGCCWxvY2FsaG9zdDAPBgNVHRMBAf8E
BTADAQH/MA4GA1UdDwEB/wQEAwIChDAdBgNVHQ4EFgQUMSIPMfdUlhyYtDOnroCk
RQg+p00wCgYIKoZIzj0EAwIDRwAwRAIgSy8Kg4mjBJsMoHk+LVftteyXFLuvftaj
OBoq1P4t724CIAy7De1wJhp4cc5Sd3J/QDGYok4x0cTokuqsE+2tCU6s
-----END CERTIFICATE-----
"""
