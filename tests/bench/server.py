"""The server under test: its process, what the operating system says about it, and the requests that prepare it.

CPU is in seconds, memory in MB (2**20 bytes).
"""

import base64
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import load

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))
import archives  # noqa: E402  (tests/archives.py)

PASSWORD = "bench-password"
START_SECONDS = 60
FILL_AT_ONCE = 16
TICKS = os.sysconf("SC_CLK_TCK")


class Program:
    """A copy of devpi_lite.py, so that a run measures one state of it, and the interpreter that runs it."""

    def __init__(self, script, python, folder):
        self.python, self.script = python, os.path.join(folder, "devpi_lite.py")
        shutil.copyfile(script, self.script)


class Server:
    """A server process on a directory of its own. Its output, the access log among it, goes to a file beside that."""

    def __init__(self, program, directory, *options):
        self.program, self.directory, self.log = program, directory, directory + ".log"
        self.options = list(options)    # of each start
        self.process, self.port, self.token = None, None, None
        self.start_seconds = self.start_cpu = None  # to the first answer, of the last start
        self.files = 0  # uploaded to it so far
        self.is_changed = False  # since it settled

    # -- life

    def start(self):
        """Returns at the first answer. RuntimeError with its output if there is none within a minute."""
        is_new = not os.path.exists(self.directory)
        with socket.socket() as chosen:
            chosen.bind((load.HOST, 0))
            self.port = chosen.getsockname()[1]
        command = [self.program.python, self.program.script, "--serverdir", self.directory, "--port", str(self.port)]
        is_replica = "--primary-url" in self.options
        command += ["--no-root-pypi", "--root-passwd", PASSWORD] if is_new and not is_replica else []
        command += self.options
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("DEVPI") and not name.lower().endswith("_proxy")
        }
        began = time.perf_counter()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        while True:
            try:
                with socket.create_connection((load.HOST, self.port), timeout=START_SECONDS) as connection:
                    answer = load.exchange(connection, load.get("/", "application/json"))
                    break
            except ConnectionRefusedError:
                is_lost = self.process.poll() is not None or time.perf_counter() > began + START_SECONDS
            except (OSError, load.LoadError):
                is_lost = True
            if is_lost:
                with open(self.log, errors="replace") as log:
                    raise RuntimeError("the server gave no first answer:\n" + log.read()[-2000:])
            time.sleep(0.002)
        self.start_seconds, self.start_cpu = time.perf_counter() - began, self.cpu()
        if answer.status != 200 and not (answer.status == 503 and b"X-DEVPI-REPLICA-LAG" in answer.head):
            raise RuntimeError("the first answer is %r" % answer.head)      # a new replica has nothing yet
        return self

    def stop(self):
        """SIGTERM, and after ten seconds SIGKILL."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self):
        """SIGKILL for it and its children, if it runs."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)  # a session of its own: nobody else is in the group
            self.process.wait()

    def forget_log(self):
        """Empties the log, which is opened for appending."""
        os.truncate(self.log, 0)

    @property
    def pid(self):
        return self.process.pid

    # -- what the operating system says

    def cpu(self, children=True):
        """CPU seconds so far: all its threads, and with `children` those of its child processes, ended ones too."""
        if not children:
            return load.settled_seconds(self.pid)
        living = self._descendants()
        with open("/proc/%d/stat" % self.pid) as file:
            fields = file.read().rpartition(")")[2].split()
        ended = (int(fields[13]) + int(fields[14])) / TICKS
        total = load.settled_seconds(self.pid) + ended
        for pid in living:
            try:
                total += load.process_seconds(pid)
            except OSError:
                pass  # ended meanwhile
        return total

    def _descendants(self):
        parents = {}
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open("/proc/%s/stat" % name) as file:
                    parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                pass
        found = {self.pid}
        while True:
            more = {pid for pid, parent in parents.items() if parent in found} - found
            if not more:
                return found - {self.pid}
            found |= more

    def memory(self):
        """Its resident memory (VmRSS), without children."""
        return self._status("VmRSS")

    def peak_memory(self):
        """The most that was resident since `forget_peak`."""
        return self._status("VmHWM")

    def forget_peak(self):
        with open("/proc/%d/clear_refs" % self.pid, "w") as file:
            file.write("5")

    def proportional_memory(self):
        """PSS: as VmRSS, but pages shared with other processes count by their share."""
        with open("/proc/%d/smaps_rollup" % self.pid) as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("Pss:"))

    def _status(self, field):
        with open("/proc/%d/status" % self.pid) as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field + ":"))

    def settle(self, seconds=30):
        """Waits until it has used under 2 ms of CPU for a while: for a quarter of a second after changes, whose work in
        the background comes with pauses, else for a twentieth."""
        quiet, self.is_changed = (0.25 if self.is_changed else 0.05), False
        deadline, before = time.monotonic() + seconds, self.cpu()
        while time.monotonic() < deadline:
            time.sleep(quiet)
            now = self.cpu()
            if now - before < 0.002:
                return
            before = now

    # -- requests that prepare it

    def request(self, method, path, body=None, authorized=True, content_type="application/json"):
        """The answer's JSON; RuntimeError unless it is 200 or 201."""
        headers = {"Accept": "application/json", "Content-Type": content_type}
        if authorized:
            headers["Authorization"] = self.authorization()
        connection = http.client.HTTPConnection(load.HOST, self.port, timeout=120)
        try:
            connection.request(method, path, json.dumps(body) if isinstance(body, (dict, list)) else body, headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status not in (200, 201):
            raise RuntimeError("%s %s: %d %r" % (method, path, answer.status, content[:500]))
        return json.loads(content)

    def authorization(self, password=False):
        """The header for root: with the token of one login, or with the password."""
        if password:
            return "Basic " + base64.b64encode(("root:" + PASSWORD).encode()).decode()
        if self.token is None:
            answer = self.request("POST", "/+login", {"user": "root", "password": PASSWORD}, authorized=False)
            self.token = answer["result"]["password"]
        return "Basic " + base64.b64encode(("root:" + self.token).encode()).decode()

    def add_stage(self, name, *bases, **config):
        self.request("PUT", "/root/" + name, dict(config, type="stage", volatile=True, bases=list(bases)))

    def add_mirror(self, name, upstream):
        self.request("PUT", "/root/" + name, {"type": "mirror", "mirror_url": upstream.url})

    def upload_request(self, archive, index="priv", password=False):
        """The bytes of an upload, as twine sends it, which counts as one."""
        self.is_changed = True
        self.files += 1
        fields = dict(archive.fields, md5_digest=archive.md5, sha256_digest=archive.sha256)
        fields.update({":action": "file_upload", "protocol_version": "1"})
        body, content_type = archives.multipart(fields, {"content": (archive.filename, archive.content)})
        head = (
            "POST /root/%s/ HTTP/1.1\r\nHost: %s\r\nUser-Agent: bench\r\nAuthorization: %s\r\nContent-Type: %s\r\n"
            "Content-Length: %d\r\n\r\n"
            % (index, load.HOST, self.authorization(password), content_type, len(body))
        )
        return head.encode() + body

    def upload(self, archive, index="priv"):
        """RuntimeError unless it is taken."""
        with load.connect(self.port) as connection:
            answer = load.exchange(connection, self.upload_request(archive, index))
        if answer.status != 200:
            raise RuntimeError("upload of %s: %r %r" % (archive.filename, answer.head, answer.body[:500]))

    def fill(self, generator, releases, index="priv"):
        """Uploads a small wheel for each (project, version)."""
        releases, running = list(releases), False
        for start in range(0, len(releases), 500):
            tasks = [
                load.Task(self.upload_request(small_wheel(project, version), index))
                for project, version in releases[start : start + 500]
            ]
            if running:
                generator.result().checked()
            generator.begin(load.each, self.port, self.pid, tasks, FILL_AT_ONCE)
            running = True
        if running:
            generator.result().checked()


def small_wheel(project, version):
    return archives.wheel(project, version, requires_python=">=3.6")
