"""A real devpi-server, 1.1 to 7, out of a virtual environment of its own: the tests' requests to it, its dumps."""

import os
import pathlib
import signal
import socket
import subprocess
import threading

from harness import STOP_SECONDS, Server, eventually

# Before 3.0 it wants the project list of a PyPI that is no more before it does anything.
WITHOUT_PYPI = """\
import sys
from devpi_server import extpypi, main
for name in ("XMLProxy", "PyPISimpleProxy"):
    proxy = getattr(extpypi, name, None)
    if proxy:
        proxy.list_packages_with_serial = lambda self: {u"nothing": 1}
        proxy.changelog_since_serial = lambda self, serial: []
sys.exit(main.main(["devpi-server"] + sys.argv[1:]))
"""


class DevpiServer(Server):
    """The devpi-server of a virtual environment on its directory; the first start makes it.

    What differs from version to version is here: how one starts, exports and imports, and what an
    index may be told.
    """

    def __init__(self, directory, environment, *options, root_password="root-pw"):
        super().__init__(directory, *options, root_password=root_password)
        self.programs = pathlib.Path(environment) / "bin"
        self.environment["HOME"] = str(self.directory.parent)     # 1.2 puts a log file there
        self.version = self._said([self.programs / "python", "-c", (
            "import devpi_server; print(devpi_server.__version__)")]).strip()
        self.release = tuple(int(part) for part in self.version.split(".")[:2])

    def _said(self, command, expect=0):
        """What the command printed; `expect` is its exit code."""
        done = subprocess.run(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=self.environment, timeout=600, check=False)
        output = done.stdout.decode(errors="replace")
        assert done.returncode == expect, "%s: exit code %s\n%s" % (command, done.returncode, output)
        return output

    def _own(self, name):
        """The command `devpi-NAME`; before 5.0 they were options of devpi-server."""
        if (self.programs / ("devpi-" + name)).exists():
            return [self.programs / ("devpi-" + name), "--serverdir", self.directory]
        return [*self._server(), "--" + name]

    def _server(self):
        """The command that serves, or does what its further options say."""
        command = [self.programs / "python", "-c", WITHOUT_PYPI] if self.release < (3, 0) else [
            self.programs / "devpi-server"]
        return [*command, "--serverdir", self.directory]

    # -- life

    def start(self, *more_options):
        new = not self.directory.exists()
        if new and self.release >= (4, 3):
            known = ["--root-passwd", self.passwords["root"]] if self.release >= (5, 0) else []
            self._said([*self._own("init"), "--no-root-pypi", *known])
        for _ in range(5):      # it wants to be told a port, which somebody else may be given meanwhile
            self._launch(new, more_options)
            if self.running:
                break
        else:
            raise AssertionError(self.output())
        if new and self.release < (5, 0):
            password = self.passwords["root"]
            self.login("root", "")
            reply = self.patch("/root", {"password": password}, user="root")
            assert reply.status == 200, reply
            self.login("root", password)
        return self

    def _launch(self, new, more_options):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.url, self.lines = "http://127.0.0.1:%d" % self.port, []
        options = ["--host", "127.0.0.1", "--port", self.port]
        if new and (3, 0) <= self.release < (5, 0):
            options.append("--no-root-pypi")
        self.process = subprocess.Popen(
            [str(word) for word in (*self._server(), *options, *self.options, *more_options)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=self.environment, start_new_session=True)
        self._reader = threading.Thread(target=self._read_lines, daemon=True)
        self._reader.start()
        eventually(lambda: not self.running or self._answers(), seconds=180, pause=0.1)

    def _read_lines(self):
        for line in self.process.stdout:
            self.lines.append(line.decode(errors="replace"))

    def _answers(self):
        try:
            return self.get("/+api").status == 200
        except OSError:
            return False

    def stop(self):
        self.process.send_signal(signal.SIGINT if self.release < (5, 0) else signal.SIGTERM)
        try:
            return self.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        return self.wait()

    def wait(self, seconds=STOP_SECONDS):
        code = self.process.wait(seconds)
        self._reader.join(5)
        self.process.stdout.close()
        return code

    # -- requests

    def request(self, method, path, body=None, user=None, password=None, **more):
        if self.release < (2, 0) and user and password is None:   # its tokens are sent as passwords
            if user not in self.tokens:
                self.login(user)
            password = self.tokens[user]
        if self.release < (2, 0) and method == "PUSH":
            path += "/"
        return super().request(method, path, body, user=user, password=password, **more)

    # -- dumps

    def export(self, folder, *options, expect=0):
        """Writes a dump with its own command; it must not run."""
        return self._said([*self._own("export"), folder, *options], expect)

    def load(self, folder, *options, expect=0):
        """Reads a dump with its own command into its directory, which must not be there yet."""
        return self._said([*self._own("import"), folder, *options], expect)
