"""Runs real packaging clients, each as its user would, in a home of its own.

`make interop` installs them: pip 20.3 under .interop/pip20; the current pip, uv, twine,
devpi-client and tox under .interop/clients.
"""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

ENVIRONMENTS = Path(__file__).resolve().parents[2] / ".interop"
CURRENT = ENVIRONMENTS / "clients" / "bin"
PYTHON = str(CURRENT / "python")
PIP20_PYTHON = str(ENVIRONMENTS / "pip20" / "bin" / "python")

INSTALLERS = ["pip20", "pip", "uv"]
PUBLISHERS = ["twine", "uv"]

# What the user of this machine has configured for a client must not send a request past our server.
# Nor may a git hook that the tests run in name its repository, or a job ask for colours.
CONFIGURATION = ("PIP_", "UV_", "TWINE_", "DEVPI_", "TOX_", "VIRTUAL", "PYTHONPATH", "PYTHONHOME", "GIT_", "FORCE_COLOR",
                 "CLICOLOR", "PY_COLORS")
TIMEOUT = 600  # seconds for one command


def clean_environment(home):
    """The caller's environment (TLS trust and proxies stay) without configuration of any client."""
    environment = {name: value for name, value in os.environ.items()
                   if name == "PIP_CERT" or not name.startswith(CONFIGURATION)}
    environment.update(
        HOME=str(home),
        COLUMNS="200",
        NO_PROXY="127.0.0.1",
        no_proxy="127.0.0.1",
        NO_COLOR="1",
        PATH=os.pathsep.join([str(CURRENT), os.environ["PATH"]]),
        PIP_CONFIG_FILE=os.devnull,
        PIP_DISABLE_PIP_VERSION_CHECK="1",
        PIP_NO_INPUT="1",
        # PyPI, behind our server, may fail for a moment.
        PIP_RETRIES="8",
        PIP_DEFAULT_TIMEOUT="90",
        UV_HTTP_RETRIES="6",
        UV_HTTP_TIMEOUT="90",
        PYTHON_KEYRING_BACKEND="keyring.backends.null.Keyring",
        UV_NO_CONFIG="1",
        UV_PYTHON=PYTHON,
        UV_PYTHON_DOWNLOADS="never",
        # Environments that tox makes share the unpacked pip: unpacking and compiling it takes most of a test's time.
        VIRTUALENV_OVERRIDE_APP_DATA=str(ENVIRONMENTS / "virtualenv"),
        VIRTUALENV_SYMLINK_APP_DATA="1",
        VIRTUALENV_NO_PERIODIC_UPDATE="1",
        XDG_CACHE_HOME=str(home / "cache"),
        XDG_CONFIG_HOME=str(home / "config"),
    )
    return environment


class Clients:
    """The clients of one person with an empty home: no cache, no configuration."""

    def __init__(self, home):
        self.home = Path(home)
        self.home.mkdir(parents=True, exist_ok=True)
        self.environment = clean_environment(self.home)

    def run(self, *command, expect=0, cwd=None, input=None, **environment):
        """What the command printed, errors included; `expect` is its exit code, None for any failure.

        `input` is what is typed, passwords too; without it nobody answers. `environment` adds variables, or with None
        as the value takes one away.
        """
        variables = {name: value for name, value in dict(self.environment, **environment).items() if value is not None}
        with subprocess.Popen(
                [str(word) for word in command], cwd=str(cwd or self.home), env=variables,
                stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True,
                start_new_session=True,  # without a terminal, a question for a password reads stdin
        ) as process:
            try:
                printed = process.communicate(input, timeout=TIMEOUT)[0]
            except BaseException:  # interrupted as well: what the client has started ends with it
                os.killpg(process.pid, signal.SIGKILL)
                raise
        code = process.returncode
        succeeded = code != 0 if expect is None else code == expect
        assert succeeded, "%s: exit code %s\n%s" % (" ".join(map(str, command)), code, printed)
        return printed

    def pip(self, *arguments, **options):
        return self.run(PYTHON, "-m", "pip", *arguments, **options)

    def pip20(self, *arguments, **options):
        return self.run(PIP20_PYTHON, "-m", "pip", *arguments, **options)

    def uv(self, *arguments, **options):
        return self.run(CURRENT / "uv", *arguments, **options)

    def twine(self, *arguments, **options):
        return self.run(PYTHON, "-m", "twine", *arguments, **options)

    def devpi(self, *arguments, **options):
        return self.run(CURRENT / "devpi", *arguments, **options)

    def tox(self, *arguments, **options):
        return self.run(PYTHON, "-m", "tox", *arguments, **options)

    def install(self, installer, index_url, *requirements, **options):
        """Installs with one of INSTALLERS into a fresh directory; returns {project: version} of what is there.

        With expect=None, installing must fail and what was printed is returned.
        """
        target = self.home / ("target-%d" % len(list(self.home.glob("target-*"))))
        arguments = ["install", "--index-url", index_url, "--target", target] + list(requirements)
        printed = self.uv("pip", *arguments, **options) if installer == "uv" \
            else getattr(self, installer)(*arguments, **options)
        return installed(target) if options.get("expect", 0) == 0 else printed

    def publish(self, publisher, index_url, archive, user, password, **options):
        """Uploads one file with one of PUBLISHERS; returns what was printed."""
        path = self.save(archive)
        if publisher == "uv":
            return self.uv("publish", "--trusted-publishing", "never", "--publish-url", index_url,
                           "--username", user, "--password", password, path, **options)
        return self.twine("upload", "--non-interactive", "--disable-progress-bar", "--repository-url", index_url,
                          "--username", user, "--password", password, path, **options)

    def save(self, archive, directory="archives"):
        """Writes the archive into a directory below the home, under its own file name; returns the path."""
        directory = self.home / directory
        directory.mkdir(exist_ok=True)
        path = directory / archive.filename
        path.write_bytes(archive.content)
        return path


def in_a_few_tries(call):
    """What it returns, in the end: PyPI may fail for a moment, and not every client asks again."""
    for pause in (1, 5, 15):
        try:
            return call()
        except AssertionError:
            time.sleep(pause)
    return call()


class Devpi:
    """devpi-client with a client directory: `devpi("list", "-v")` returns what it printed."""

    def __init__(self, clients, directory):
        self.clients, self.directory = clients, Path(directory)

    def __call__(self, *arguments, **options):
        return self.clients.devpi(*arguments, DEVPI_CLIENTDIR=str(self.directory), **options)

    def getjson(self, path):
        """The "result" of what `devpi getjson` prints."""
        return json.loads(self("getjson", path))["result"]

    def state(self, name="current.json"):
        """A file of the client directory."""
        return json.loads((self.directory / name).read_text())


def installed(directory):
    """{normal project name: version} of the distributions in a directory of packages."""
    pairs = (path.name[:-len(".dist-info")].rsplit("-", 1) for path in Path(directory).glob("*.dist-info"))
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}
