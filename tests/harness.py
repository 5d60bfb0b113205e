"""What every test uses: the server under test as a process, requests to it, real archives and a fake upstream.

Standard library only; everything listens on 127.0.0.1, on ports that the system chooses.
"""

import atexit
import base64
import contextlib
import functools
import hashlib
import http.client
import io
import itertools
import json
import os
import pathlib
import py_compile
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse

from archives import (  # noqa: F401  (for the tests)
    Archive, around, documentation, multipart, normal_name, sdist, wheel, zipped)
from upstream import SIMPLE_JSON, Upstream  # noqa: F401

SOURCE = pathlib.Path(__file__).resolve().parent.parent / "devpi_lite.py"
OWNER = "(the owner of the index)"
JSON, HTML, ANY = "application/json", "text/html", "*/*"
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
START_SECONDS = 60
STOP_SECONDS = 25     # less than the 30 s that running requests may take to end
SOAK = bool(os.environ.get("DEVPI_LITE_SOAK"))  # tests of what a crowd does at random take ten times as long


def temporary_folder():
    """A folder that goes with this process."""
    folder = tempfile.mkdtemp(prefix="devpi_lite-")
    atexit.register(shutil.rmtree, folder, True)
    return folder


def compiled(name):
    """A module of the project as bytecode: hundreds of processes start it, and compiling takes half of each start.

    Where in_parallel.py runs the tests, all of them share what it has compiled.
    """
    folder = os.environ.get("DEVPI_LITE_BYTECODE")
    if folder:
        return pathlib.Path(folder) / (name + ".pyc")
    path = os.path.join(temporary_folder(), name + ".pyc")
    return pathlib.Path(py_compile.compile(str(SOURCE.with_name(name + ".py")), path, doraise=True))


PROGRAM = compiled("devpi_lite")        # as it is
sys.path.insert(0, str(PROGRAM.parent))         # for tests that import it

PATCHED = """\
import sys
sys.path.insert(0, %r)
import devpi_lite
devpi_lite._SCRYPT["n"] = 16
%s
sys.exit(devpi_lite.main(sys.argv[1:]))
"""


def patched(folder, code):
    """A script for `Server`, the program after some Python has changed `devpi_lite`: so that a rare moment comes for sure.

    Passwords are hashed with little work, for nearly every test makes some; checking one takes what making its hash took.
    """
    script = pathlib.Path(folder) / "patched.py"
    script.write_text(PATCHED % (str(PROGRAM.parent), code))
    return script


SCRIPT = patched(temporary_folder(), "")        # what a `Server` runs; tests in which a hash must be slow run PROGRAM


class Reply:
    """An answer, read to its end. `headers` match in any letter case (`.get`, `.get_all`)."""

    def __init__(self, response):
        self.status, self.reason, self.headers = response.status, response.reason, response.headers
        self.body = response.read()

    @property
    def text(self):
        return self.body.decode()

    def json(self):
        return json.loads(self.body)

    @property
    def result(self):
        return self.json()["result"]

    def __repr__(self):
        return "<%d %s %r>" % (self.status, self.reason, self.body[:300])


class Server:
    """A server process on its directory; not started by making it.

    The first start passes --root-passwd (unless `root_password` is None) and --no-root-pypi (unless `root_pypi`).
    `env` adds to the environment; `script` runs another copy of the file.
    """

    def __init__(
        self,
        directory,
        *options,
        root_password="secret",
        env=None,
        python=sys.executable,
        root_pypi=False,
        script=SCRIPT
    ):
        self.directory, self.options = pathlib.Path(directory), options
        self.python, self.script, self.environment = python, script, clean_environment(env)
        self.passwords = {} if root_password is None else {"root": root_password}
        self.root_pypi = root_pypi
        self.tokens, self.lines, self.process, self.url, self.port = {}, [], None, None, None
        self.marks, self.starts = itertools.count(1000), 0

    # -- life

    def start(self, *more_options):
        """Returns when the server listens; AssertionError with its output if it doesn't within START_SECONDS."""
        options = ["--serverdir", str(self.directory)]
        if not self.directory.exists() or not any(self.directory.iterdir()):
            if "root" in self.passwords:
                options += ["--root-passwd", self.passwords["root"]]
            if not self.root_pypi:
                options.append("--no-root-pypi")
        if not {"--port", "--listen"} & set(self.options + more_options) and "DEVPISERVER_PORT" not in self.environment:
            options += ["--port", "0"]
        options += self.options + more_options
        self.lines = []
        command = [str(self.python), str(self.script)] + [str(option) for option in options]
        # a start anew is in the other nursery, to whose interpreter no text has the same hash() as before
        self.starts += 1
        launch = functools.partial(forked, nursery=self.starts % 2) if may_fork(command, self.environment) else subprocess.Popen
        self.process = launch(
            command, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        _watchdog.add(self.pid)
        listening = threading.Event()
        self._reader = threading.Thread(
            target=self._read_output, args=(listening,), name="output of server", daemon=True
        )
        self._reader.start()
        if not listening.wait(START_SECONDS) or self.url is None:
            code = self.kill() if self.process.poll() is None else self.wait()
            raise AssertionError("the server did not start (exit code %s):\n%s" % (code, self.output()))
        return self

    def _read_output(self, listening):
        self.url = None
        for line in self.process.stdout:
            self.lines.append(line.decode(errors="replace"))
            address = "listens on" in self.lines[-1] and re.search(r"http://(127\.0\.0\.1|localhost|0\.0\.0\.0|\[::1?\]):([1-9]\d*)/", self.lines[-1])
            if address and not listening.is_set():
                self.port = int(address.group(2))
                self.url = "http://127.0.0.1:%d" % self.port
                listening.set()
        listening.set()  # it ended

    def stop(self):
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError("the server did not stop within %d s:\n%s" % (STOP_SECONDS, self.output()))

    def kill(self):
        """SIGKILL, as a power cut for the process."""
        self.process.kill()
        return self.wait(STOP_SECONDS)

    def wait(self, seconds=STOP_SECONDS):
        """Waits for the process to end by itself; returns the exit code."""
        code = self.process.wait(seconds)
        self._reader.join(5)
        self.process.stdout.close()
        _watchdog.remove(self.pid)
        return code

    def restart(self, *options):
        """Stops it if it runs and starts it again; `options` are added, for this start only."""
        if self.running:
            self.stop()
        return self.start(*options)

    @property
    def running(self):
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self):
        return self.process.pid

    def output(self):
        """What it has printed since the last start, stdout and stderr together, and we have read."""
        return "".join(self.lines)

    def whole_output(self):
        """The same with all that it says of what was asked until now: it writes its access log a moment later."""
        mark = "/+api?until=%d" % next(self.marks)
        self.get(mark)
        eventually(lambda: mark in self.output())
        return self.output()

    # -- requests

    def request(self, method, path, body=None, headers=None, user=None, password=None, follow=False):
        """One request on a connection of its own; the path goes out as it stands.

        A dict or list as body is sent as JSON. `user` with `password` sends Basic credentials; `user` alone the session
        token of the last login (it logs in first if there was none and the password is known).
        """
        sent = {"Accept": "application/json"}
        if isinstance(body, (dict, list)):
            body = json.dumps(body)
            sent["Content-Type"] = "application/json"
        if isinstance(body, str):
            body = body.encode()
        if user and password is not None:
            sent["Authorization"] = "Basic " + user_pass(user, password)
        elif user:
            if user not in self.tokens:
                self.login(user)
            sent["X-Devpi-Auth"] = user_pass(user, self.tokens[user])
        for name, value in (headers or {}).items():
            for known in [known for known in sent if known.lower() == name.lower()]:
                del sent[known]
            if value is not None:
                sent[name] = value
        reply = self._exchange(method, path, body, sent)
        for _ in range(10):
            if not follow or reply.status not in (301, 302, 303, 307, 308):
                break
            path = self._path_of(urllib.parse.urljoin(self.url + path, reply.headers["Location"]))
            if reply.status in (301, 302, 303):
                method, body = ("HEAD" if method == "HEAD" else "GET"), None
            reply = self._exchange(method, path, body, sent)
        return reply

    def _exchange(self, method, path, body, headers):
        connection = _Connection("127.0.0.1", self.port, timeout=60)
        try:
            connection.putrequest(
                method, path, skip_host="host" in {name.lower() for name in headers}, skip_accept_encoding=True
            )
            for name, value in headers.items():
                connection.putheader(name, value)
            if body is not None and "content-length" not in {name.lower() for name in headers}:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            return Reply(connection.getresponse())
        finally:
            connection.close()

    def _path_of(self, url):
        parts = urllib.parse.urlsplit(url)
        return parts.path + ("?" + parts.query if parts.query else "")

    def get(self, path, **options):
        return self.request("GET", path, **options)

    def put(self, path, body=None, **options):
        return self.request("PUT", path, body, **options)

    def post(self, path, body=None, **options):
        return self.request("POST", path, body, **options)

    def patch(self, path, body=None, **options):
        return self.request("PATCH", path, body, **options)

    def delete(self, path, **options):
        return self.request("DELETE", path, **options)

    def connect(self, timeout=30):
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def raw(self, data, timeout=30):
        """Sends the bytes; returns what comes back until the server closes, or for `timeout` seconds sends nothing."""
        received = []
        with self.connect(timeout) as connection:
            try:
                connection.sendall(data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused before it had read everything; an answer may be there all the same
            try:
                while True:
                    piece = connection.recv(65536)
                    if not piece:
                        break
                    received.append(piece)
            except (socket.timeout, ConnectionResetError):
                pass
        return b"".join(received)

    # -- users and indexes

    def login(self, user, password=None):
        """Returns the session token and remembers it for `request(user=...)`."""
        password = self.passwords[user] if password is None else password
        reply = self.post("/+login", {"user": user, "password": password})
        assert reply.status == 200, reply
        self.passwords[user], self.tokens[user] = password, reply.result["password"]
        return self.tokens[user]

    def add_user(self, name, password="pw", by=None):
        """Made by the user `by`; else by root if the server was given --restrict-modify, or by nobody in particular."""
        if by is None and any(str(option).startswith("--restrict-modify") for option in self.options):
            by = "root"
        reply = self.put("/" + name, {"password": password}, user=by)
        assert reply.status == 201, reply
        self.passwords[name] = password
        return reply.result

    def add_index(self, name, **config):
        """Makes the index as its user; returns its configuration."""
        reply = self.put("/" + name, config, user=name.partition("/")[0])
        assert reply.status == 200, reply
        return reply.result

    def add_mirror(self, name, upstream_url, **config):
        """A mirror of the URL, or of an Upstream."""
        return self.add_index(name, type="mirror", mirror_url=getattr(upstream_url, "url", upstream_url), **config)

    # -- releases

    def upload(self, index, archive, user=OWNER, password=None, fields=None, headers=None, raw=False):
        """Uploads as twine does, with user name and password: as the index's owner, or as `user` (None: as nobody).

        `fields` add to the form (None as a value leaves one out); with `raw` they are the whole form. Archive None:
        no file.
        """
        form = {}
        if not raw:
            form[":action"], form["protocol_version"] = "file_upload", "1"
            if archive is not None:
                form.update(
                    archive.fields,
                    md5_digest=archive.md5,
                    sha256_digest=archive.sha256,
                    blake2_256_digest=hashlib.blake2b(archive.content, digest_size=32).hexdigest(),
                )
        form.update(fields or {})
        body, content_type = multipart(
            {field: value for field, value in form.items() if value is not None},
            {"content": (archive.filename, archive.content)} if archive is not None else {},
        )
        user = index.partition("/")[0] if user is OWNER else user
        if user and password is None:
            password = self.passwords[user]
        return self.post(
            "/%s/" % index,
            body,
            user=user or None,
            password=password,
            headers=dict({"Content-Type": content_type}, **headers or {}),
        )

    def post_form(self, index, fields, files=None, user=OWNER, headers=None):
        """A form to the index, in the session of its owner or of `user`.

        `files` are as archives.multipart() takes them.
        """
        body, content_type = multipart(fields, files or {})
        user = index.partition("/")[0] if user is OWNER else user
        return self.post("/%s/" % index, body, user=user, headers=dict({"Content-Type": content_type}, **headers or {}))

    def post_file(self, index, archive, user=OWNER, headers=None, **fields):
        """Uploads in a session, with the archive's own fields alone; `fields` replace some."""
        form = dict(archive.fields, **fields)
        form.setdefault(":action", "file_upload")
        files = {"content": (archive.filename, archive.content)}
        return self.post_form(index, form, files, user, headers)

    def push(self, source, name, version, user=OWNER, **fields):
        """Pushes a release in a session: to `targetindex`, or elsewhere by `posturl`."""
        user = source.partition("/")[0] if user is OWNER else user
        body = dict({"name": name, "version": version}, **fields)
        return self.request("PUSH", "/" + source, body, user=user)

    def simple(self, index, project, **options):
        """The project's page as JSON."""
        reply = self.get("/%s/+simple/%s/" % (index, project), headers={"Accept": SIMPLE_JSON}, **options)
        assert reply.status == 200, reply
        assert reply.headers["Content-Type"] == SIMPLE_JSON, reply.headers
        return reply.json()

    def filenames(self, index, project, **options):
        return [file["filename"] for file in self.simple(index, project, **options)["files"]]

    def versions(self, index, project, **options):
        return self.simple(index, project, **options)["versions"]

    def fetch(self, index, filename, project, **options):
        """The file that the project's page links to, its hash checked."""
        (file,) = [file for file in self.simple(index, project, **options)["files"] if file["filename"] == filename]
        reply = self.get(
            self._path_of(urllib.parse.urljoin("%s/%s/+simple/%s/" % (self.url, index, project), file["url"])),
            headers={"Accept": "*/*"},
            **options
        )
        assert reply.status == 200, reply
        if "sha256" in file["hashes"]:
            assert hashlib.sha256(reply.body).hexdigest() == file["hashes"]["sha256"]
        return reply.body


def serial_of(reply):
    """The serial that the server had when it replied."""
    return int(reply.headers["X-DEVPI-SERIAL"])


def serial(server):
    """The serial of the server's last change."""
    return serial_of(server.get("/+api"))


def path_of(archive, index):
    """Where an uploaded file lies."""
    digest = archive.sha256
    return "/%s/+f/%s/%s/%s" % (index, digest[:3], digest[3:16], archive.filename)


def upload(server, index, *archives, **options):
    """Server.upload() of each, which must be taken; returns the last reply."""
    for archive in archives:
        reply = server.upload(index, archive, **options)
        assert reply.status == 200, reply
    return reply


def upload_docs(server, index, docs, **options):
    """Uploads what documentation() makes, which must be taken; returns the reply."""
    form = {":action": "doc_upload", "name": docs.name, "version": docs.version}
    reply = server.post_file(index, docs, **dict(form, **options))
    assert reply.status == 200, reply
    return reply


def submit(server, index, name, version, **fields):
    """Registers a release without files."""
    reply = server.post_form(index, dict(fields, **{":action": "submit", "name": name, "version": version}))
    assert reply.status == 200, reply


def page(server, index, project="demo", accept=SIMPLE_JSON):
    """The reply to who asks for the project's simple page."""
    return server.get("/%s/+simple/%s/" % (index, project), headers={"Accept": accept})


def project_list(server, index):
    """The names on the index's project list, in their order."""
    reply = server.get("/%s/+simple/" % index, headers={"Accept": SIMPLE_JSON})
    assert reply.status == 200, reply
    return [project["name"] for project in reply.json()["projects"]]


def get(server, path, method="GET", accept="*/*", **headers):
    """The reply to who takes anything, as clients ask for files; If_Range="..." is a header."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.request(method, path, headers=dict(sent, Accept=accept))


def links(server, release, rel=None, **options):
    """The links of "INDEX/PROJECT/VERSION" (of that kind), in their order; [] if it is not there."""
    reply = server.get("/" + release, **options)
    found = reply.result.get("+links", []) if reply.status == 200 else []
    return [link for link in found if rel in (None, link["rel"])]


def rels(server, release, **options):
    """The kinds of all links of "INDEX/PROJECT/VERSION", in their order."""
    return [link["rel"] for link in links(server, release, **options)]


def audited(server, **query):
    """The entries of the audit log, newest first."""
    reply = server.get("/+audit?" + urllib.parse.urlencode(query), user="root")
    assert reply.status == 200, reply
    return reply.result


def blobs(server):
    """{SHA-256: path} of all bytes that the server keeps under files/."""
    return {path.name: path for path in (server.directory / "files").rglob("*") if path.is_file()}


def extended(folder, option, chapter):
    """The path of a copy of the program, compiled, with another line in `Settings` and a chapter more."""
    text = SOURCE.read_text(encoding="utf-8")
    for mark, added in (("    read_only: bool = False ", option), ('if __name__ == "__m', chapter)):
        assert text.count(mark) == 1
        text = text.replace(mark, added + mark)
    (folder / "ponds.py").write_text(text, encoding="utf-8")
    return py_compile.compile(str(folder / "ponds.py"), str(folder / "ponds.pyc"), doraise=True)


def memory(server, peak=False):
    """The bytes that the server's process has in memory, or had at most; 0 where that is hidden."""
    line = r"VmHWM:\s+(\d+)" if peak else r"VmRSS:\s+(\d+)"
    with contextlib.suppress(FileNotFoundError), open("/proc/%d/status" % server.pid) as status:
        return int(re.search(line, status.read())[1]) << 10
    return 0


def worked(server):
    """The seconds of CPU time that the server and its ended children have had; 0 where that is hidden.

    On a busy machine more time goes by than that.
    """
    with contextlib.suppress(FileNotFoundError), open("/proc/%d/stat" % server.pid) as stat:
        ticks = map(int, stat.read().rpartition(")")[2].split()[11:15])
        return sum(ticks) / os.sysconf("SC_CLK_TCK")
    return 0


def timed(function, *arguments, **options):
    """(what the function returned, the seconds that it took)."""
    began = time.monotonic()
    return function(*arguments, **options), time.monotonic() - began


def user_pass(user, secret, encoding="utf-8"):
    """The pair as Authorization (behind "Basic") and X-Devpi-Auth carry it."""
    return base64.b64encode(("%s:%s" % (user, secret)).encode(encoding)).decode()


_numbers = itertools.count()


def new_index(server, user, **config):
    """The name of a new index of the user's, for one test alone."""
    name = "%s/x%d" % (user, next(_numbers))
    server.add_index(name, **config)
    return name


def run_command(*arguments, input=None, env=None, python=sys.executable, script=SCRIPT, timeout=120):
    """Runs `devpi_lite.py ARGUMENTS` to its end: .returncode, .stdout, .stderr (text)."""
    command, env = [str(python), str(script)] + [str(argument) for argument in arguments], clean_environment(env)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in range(3)]
        files[0].write(input or "")
        files[0].seek(0)
        launch = forked if may_fork(command, env) else subprocess.Popen
        process = launch(command, env=env, stdin=files[0], stdout=files[1], stderr=files[2])
        try:
            process.wait(timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        for file in files:
            file.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, files[1].read(), files[2].read())


def clean_environment(more=None):
    """The environment without what configures a server or a proxy, plus `more`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("DEVPI") and not name.lower().endswith("_proxy")
    }
    return dict(kept, **more or {})


def eventually(condition, seconds=30, pause=0.02):
    """Polls until condition() is true and returns its value; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, "not within %s s" % seconds
        time.sleep(pause)


class _Connection(http.client.HTTPConnection):
    """Sends any path and method as they stand."""

    def _validate_path(self, url):
        pass

    def _validate_method(self, method):
        pass

    def _encode_request(self, request):
        return request.encode("utf-8", "surrogateescape")


class _Nursery:
    """A process that has imported the program: a fork of it saves most of what a start takes.

    For each start it forks a keeper, and that the program: the keeper reports the program's id, and its status at its end.
    """

    _PROGRAM = """if True:
        import atexit, gc, json, os, resource, signal, socket, struct, sys, threading, time
        sys.path.insert(0, sys.argv[2])
        import devpi_lite
        gc.freeze()
        link = socket.socket(fileno=int(sys.argv[1]))
        signal.signal(signal.SIGINT, signal.SIG_IGN)

        def reap():         # the keepers that have ended; False when there is none at all
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
                return True
            except ChildProcessError:
                return False

        while True:
            size, files, _, _ = socket.recv_fds(link, 4, 4)
            reap()
            if not size:
                until = time.monotonic() + 1        # that their processor time counts as that of the tests
                while reap() and time.monotonic() < until:
                    time.sleep(0.01)
                os._exit(0)
            data = link.recv(struct.unpack("i", size)[0], socket.MSG_WAITALL)
            if os.fork() == 0:
                break
            for file in files:
                os.close(file)
        link.close()
        report, *files = files
        pid = os.fork()
        if pid:
            for file in files:
                os.close(file)
            os.write(report, struct.pack("i", pid))
            os.write(report, struct.pack("i", os.waitpid(pid, 0)[1]))
            os._exit(0)
        os.close(report)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        sys.argv, environment, directory, mask, descriptors = json.loads(data)
        os.chdir(directory)
        os.umask(mask)
        resource.setrlimit(resource.RLIMIT_NOFILE, descriptors)
        os.environ.clear()
        os.environ.update(environment)
        time.tzset()
        sys.path[0] = os.path.dirname(sys.argv[0])
        with open(sys.argv[0]) as script:
            code = compile(script.read(), sys.argv[0], "exec")
        try:
            exec(code, {"__name__": "__main__", "__file__": sys.argv[0]})
        except SystemExit as end:
            if not isinstance(end.code, (int, type(None))):
                raise
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            except Exception:
                raise end
            # the end of an interpreter, but that it frees what it has imported: that would copy all its memory first
            threading._shutdown()
            atexit._run_exitfuncs()
            for file in (sys.stdout, sys.stderr):
                file.flush()
            os._exit((end.code or 0) & 255)"""

    def __init__(self):
        self._link, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._lock = threading.Lock()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-c", self._PROGRAM, str(other.fileno()), str(PROGRAM.parent)], env=clean_environment(),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[other.fileno()])
        atexit.register(self._end)

    def _end(self):
        self._link.close()
        self._process.communicate()

    def start(self, command, environment, files):
        """The end of a pipe that gives the new process's id and later its status."""
        import resource

        with self._lock:
            mask = os.umask(0o077)
            os.umask(mask)
            request = json.dumps([command[1:], environment, os.getcwd(), mask,
                                  resource.getrlimit(resource.RLIMIT_NOFILE)]).encode()
            ours, report = os.pipe()
            try:
                socket.send_fds(self._link, [struct.pack("i", len(request))], [report, *files])
                self._link.sendall(request)
            finally:
                os.close(report)
        return ours


@functools.lru_cache(maxsize=None)
def _nursery(number):
    return _Nursery()


def may_fork(command, environment):
    """Whether the process may be a fork of one that has imported the program: on Linux, of a script that patched() made."""
    return (sys.platform == "linux" and command[0] == sys.executable and os.path.basename(command[1]) == "patched.py"
            and _of_python(environment) == _of_python(os.environ))


def _of_python(environment):
    """Of an environment what an interpreter looks at when it starts."""
    return {name: value for name, value in environment.items() if re.match("PYTHON|LANG|LC_", name)}


class forked:
    """Like `subprocess.Popen`, for what may_fork()."""

    def __init__(self, command, env, stdin, stdout, stderr, nursery=1):
        self.args, self.returncode, self.stdout, self._lock = command, None, None, threading.Lock()
        with contextlib.ExitStack() as stack:
            if stdin is subprocess.DEVNULL:
                stdin = stack.enter_context(open(os.devnull, "rb"))
            if stdout is subprocess.PIPE:
                end, other = os.pipe()
                self.stdout, stdout = os.fdopen(end, "rb"), stack.enter_context(os.fdopen(other, "wb"))
            if stderr is subprocess.STDOUT:
                stderr = stdout
            self._report = _nursery(nursery).start(command, env, [stdin.fileno(), stdout.fileno(), stderr.fileno()])
        (self.pid,) = struct.unpack("i", os.read(self._report, 4))

    def poll(self):
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout=None):
        with self._lock:
            if self.returncode is None:
                if not select.select([self._report], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(self.args, timeout)
                (status,) = struct.unpack("i", os.read(self._report, 4))
                os.close(self._report)
                self.returncode = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
            return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and the nursery is about to report it
                os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class _Watchdog:
    """A process that kills the servers which are left when the test process is gone, however it went."""

    _PROGRAM = """if True:
        import os, signal, sys
        running = set()
        for line in sys.stdin:
            (running.add if line[0] == "+" else running.discard)(int(line[1:]))
        for pid in running:
            try: os.kill(pid, signal.SIGKILL)
            except OSError: pass"""

    def __init__(self):
        self._process = None

    def add(self, pid):
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-IS", "-c", self._PROGRAM],
                stdin=subprocess.PIPE,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._tell("+%d\n" % pid)

    def remove(self, pid):
        self._tell("-%d\n" % pid)

    def _tell(self, line):
        self._process.stdin.write(line.encode())
        self._process.stdin.flush()


_watchdog = _Watchdog()


class Wire:
    """A connection on which bytes are sent as they are, and answers read one after the other."""

    def __init__(self, server, data=b"", timeout=30, receive_buffer=None):
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(timeout)
        self.socket.connect(("127.0.0.1", server.port))
        self.input = self._Input(socket.SocketIO(self.socket, "r"))
        self.send(data)

    class _Input(io.BufferedReader):
        def close(self):
            """Stays open: HTTPResponse closes what it has read, but more answers may follow."""

    def makefile(self, mode):
        return self.input

    def send(self, data):
        self.socket.sendall(data)

    def reply(self, method="GET"):
        """The next answer (to a request with that method); interim answers are skipped."""
        response = http.client.HTTPResponse(self, method=method)
        response.begin()
        return Reply(response)

    def closed(self):
        """Whether the server closes the connection now, without another byte."""
        try:
            return self.input.read(1) == b""
        except ConnectionResetError:
            return True
        except socket.timeout:
            return False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.socket.close()
