"""One long day with our client and the real pip, uv, tox, twine, build and Sphinx, on our server and on devpi-server.

Each test goes on where the one before it has left off; they run in the order in which they stand here, once a server.
"""

import http.client
import os
import re
import signal
import socket
import subprocess
import textwrap
import urllib.request

import pytest

from client import Client
from clients import ENVIRONMENTS, PYTHON, Clients, in_a_few_tries
from harness import eventually
from projects import git_add, write_files
from receiver import Receiver

DEVPI_SERVER = ENVIRONMENTS / "devpi-server" / "bin"
WHEEL, SDIST, DOCS = "hello_pkg-1.0-py3-none-any.whl", "hello_pkg-1.0.tar.gz", "hello-pkg-1.0.doc.zip"
PROJECT = {
    "pyproject.toml": """\
        [build-system]
        requires = ["setuptools"]
        build-backend = "setuptools.build_meta"
        [project]
        name = "hello-pkg"
        version = "1.0"
        description = "A project of the tests"
        readme = "README.rst"
        requires-python = ">=3.8"
        dependencies = ["iniconfig"]
        [tool.setuptools]
        py-modules = ["hello_pkg"]
        """,
    "MANIFEST.in": "include tox.ini\n",
    "README.rst": "A project.\n",
    "hello_pkg.py": "version = '1.0'\n",
    "tox.ini": """\
        [tox]
        env_list = py
        [testenv]
        commands = python -c "import hello_pkg, iniconfig; assert hello_pkg.version == '1.0'"
        """,
    "docs/conf.py": "project = 'hello-pkg'\n",
    "docs/index.rst": "The manual\n==========\n",
    ".gitignore": "dist/\n",
}


def answers(url):
    """Whether something is there."""
    try:
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=60).status == 200
    except (OSError, http.client.HTTPException):
        return False


class DevpiServer:
    """A real devpi-server on a fresh directory, with the same names as harness.Server: url, start, stop."""

    def __init__(self, directory):
        assert (DEVPI_SERVER / "devpi-server").exists(), "devpi-server is not installed: run `make interop`"
        self.directory, self.process, self.url = directory, None, None

    def start(self):
        """AssertionError if it doesn't answer."""
        data = ["--serverdir", str(self.directory / "data")]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DEVPI")}
        subprocess.run([str(DEVPI_SERVER / "devpi-init")] + data + ["--root-passwd", "rootpw", "--no-root-pypi"], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=str(self.directory), env=environment)
        self.log = open(str(self.directory / "log"), "wb")
        for _ in range(5):      # it wants to be told a port, which somebody else may be given meanwhile
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                port = listener.getsockname()[1]
            self.url = "http://127.0.0.1:%d" % port
            self.process = subprocess.Popen(
                [str(DEVPI_SERVER / "devpi-server")] + data + ["--host", "127.0.0.1", "--port", str(port)],
                stdout=self.log, stderr=self.log, cwd=str(self.directory), env=environment, start_new_session=True)
            eventually(lambda: self.process.poll() is not None or answers(self.url + "/+api"), seconds=180, pause=0.1)
            if self.process.poll() is None:
                return self
        raise AssertionError((self.directory / "log").read_text())

    def stop(self):
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        if self.process:
            self.log.close()


class Ours(Client):
    """Our client with the real tools on its PATH."""

    def __init__(self, home):
        super().__init__(home)
        self.clients = Clients(home)
        self.environment = dict(self.clients.environment, TERM="dumb")


class Day:
    """The person's clients, the server, and the project hello-pkg under version control."""

    def __init__(self, server, home):
        self.server, self.url = server, server.url
        self.devpi = Ours(home / "home")
        self.clients = self.devpi.clients
        self.project = write_files(home / "project", PROJECT)
        git_add(self.project)
        (self.project / "untracked.txt").write_text("not for others")

    def simple_url(self, index):
        return "%s/%s/+simple/" % (self.url, index)

    def matches(self, line, index, filename):
        """Whether the line is the URL of that file of alice/INDEX."""
        pattern = "%s/alice/%s/\\+f/[0-9a-f]{3}/[0-9a-f]{13}/%s"
        return re.fullmatch(pattern % (re.escape(self.url), index, re.escape(filename)), line) is not None


@pytest.fixture(scope="module", params=["devpi_lite", "devpi-server"])
def day(request, pypi_server, tmp_path_factory):
    home = tmp_path_factory.mktemp("day")
    if request.param == "devpi_lite":
        yield Day(pypi_server(home / "server", root_pypi=False, root_password="rootpw"), home)
    else:
        server = DevpiServer(home)
        try:
            yield Day(server.start(), home)
        finally:
            server.stop()


@pytest.fixture(scope="module")
def devpi(day):
    return day.devpi


@pytest.fixture(scope="module")
def sink(devpi):
    """The section `ext` of ~/.pypirc: it takes everything."""
    sink = Receiver().start()
    devpi.write(".pypirc", "[ext]\nrepository = %s/legacy/\nusername = u\npassword = p\n" % sink.url)
    yield sink
    sink.stop()


def test_01_use_of_an_empty_server(day, devpi):
    assert devpi("use", day.url).lines[0] == "using server: %s/ (not logged in)" % day.url
    assert devpi.state()["login"] == day.url + "/+login" and not devpi.state().get("index") and devpi.mode() == 0o600
    assert devpi("use", "-l") == ""
    lines = devpi("--version").lines
    assert "current devpi server: %s/" % day.url in lines and "    devpi-server " in "\n".join(lines)


def test_03_login_as_root(day, devpi):
    printed = devpi("login", "root", "--password", "bad", expect=1)
    assert "401 Unauthorized: user 'root' could not be authenticated" in printed.lines
    assert not (devpi.directory / "auth.json").exists()
    assert devpi("login", "root", "--password", "rootpw") == "logged in 'root', credentials valid for 10.00 hours\n"
    assert devpi.mode("auth.json") == 0o600


def test_05_root_makes_the_mirror_and_a_user(devpi):
    settings = ["type=mirror", "mirror_url=https://pypi.org/simple/", "mirror_no_project_list=True"]
    shown = devpi("index", "-c", "root/pypi", *settings)
    assert "  type=mirror" in shown.lines
    user = ["user", "-c", "alice", "password=alicepw1", "email=a@example.com"]
    assert devpi(*user) == "user created: alice\n"
    assert "409 Conflict: user already exists" in devpi(*user, expect=1).lines
    shown = devpi("user", "alice").lines
    assert "  email=a@example.com" in shown and devpi("user", "-l").lines == ["alice", "root"]


def test_07_alice_makes_her_indexes(day, devpi):
    devpi("login", "alice", "--password", "alicepw1")
    assert [user for user, _ in devpi.state("auth.json")["auth"][day.url + "/"]] == ["alice", "root"]
    shown = devpi("index", "-c", "dev", "bases=root/pypi").lines
    assert {"  bases=root/pypi", "  volatile=True", "  acl_upload=alice"} <= set(shown)
    assert "  volatile=False" in devpi("index", "-c", "staging", "bases=alice/dev", "volatile=False").lines
    assert "  title=Stage" in devpi("index", "staging", "title=Stage").lines
    assert "  title=Stage" not in devpi("index", "staging", "title-=").lines
    assert "400 Bad Request: base index 'alice/nope' does not exist" in \
        devpi("index", "staging", "bases+=alice/nope", expect=1).lines
    assert devpi("index", "-l").lines == ["alice/dev", "alice/staging"]


def test_12_alice_uses_her_index(day, devpi):
    assert devpi("use", "alice/dev").lines[0] == "current devpi index: %s/alice/dev (logged in as alice)" % day.url
    assert [line.split()[0] for line in devpi("use", "-l").lines] == ["alice/dev", "alice/staging", "root/pypi"]
    for project in ("setuptools", "iniconfig"):     # PyPI may fail for a moment; devpi-server then has no such project
        eventually(lambda: answers(day.simple_url("alice/dev") + project + "/"), seconds=120, pause=1)


def test_14_a_dry_run(day, devpi):
    printed = devpi("upload", "--dry-run", cwd=day.project, PIP_INDEX_URL=day.simple_url("alice/dev"))
    assert [line for line in printed.lines if line.startswith("skipped")] == [
        "skipped: file_upload of %s to %s/alice/dev/" % (name, day.url) for name in (WHEEL, SDIST)]
    assert devpi("list") == ""


def test_15_upload_of_the_project_and_its_documentation(day, devpi):
    """The build tool's requirement, setuptools, comes from PyPI through the index."""
    printed = devpi("upload", "--with-docs", cwd=day.project, PIP_INDEX_URL=day.simple_url("alice/dev"))
    assert [line for line in printed.lines if "_upload of" in line] == [
        "%s of %s to %s/alice/dev/" % (action, name, day.url) for action, name in
        [("file_upload", WHEEL), ("file_upload", SDIST), ("doc_upload", DOCS)]]
    assert sorted(path.name for path in (day.project / "dist").iterdir()) == [DOCS, WHEEL, SDIST]
    assert "untracked.txt" not in day.clients.run("tar", "-tzf", day.project / "dist" / SDIST)


def test_16_list_and_getjson_of_what_was_uploaded(day, devpi):
    assert devpi("list") == "hello-pkg\n" and devpi("list", "-v") == "hello-pkg==1.0\n"
    wheel_url, sdist_url = devpi("list", "hello-pkg").lines
    assert day.matches(wheel_url, "dev", WHEEL) and day.matches(sdist_url, "dev", SDIST)
    assert "404 Not Found: no project 'nosuch-zzz'" in devpi("list", "nosuch-zzz", expect=1).lines
    answer = devpi("getjson", "hello-pkg/1.0").json()
    assert answer["type"] == "versiondata"
    assert sorted(link["rel"] for link in answer["result"]["+links"]) == ["doczip", "releasefile", "releasefile"]
    result = answer["result"]
    assert (result["summary"], result["requires_python"]) == ("A project of the tests", ">=3.8")
    assert result["requires_dist"] == ["iniconfig"] and result["description"].strip() == "A project."


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_20_install_with_a_dependency_from_pypi(day, installer):
    found = day.clients.install(installer, day.simple_url("alice/dev"), "hello-pkg")
    assert found["hello-pkg"] == "1.0" and "iniconfig" in found


@pytest.fixture(scope="module")
def environment(day):
    """A virtual environment with pip, of the day's own."""
    day.clients.run(PYTHON, "-m", "virtualenv", "--quiet", day.devpi.home / "venv")
    return day.devpi.home / "venv"


def test_22_install_into_a_virtual_environment(devpi, environment):
    printed = devpi("install", "--venv", environment, "hello-pkg")
    assert re.search(r"--> .*bin/pip install -U hello-pkg .*PIP_INDEX_URL='http://[^@]*/\+simple/'", printed)
    assert list(environment.glob("lib/*/site-packages/hello_pkg.py"))
    assert "hello-pkg" in devpi("install", "-l")


def test_23_the_release_is_tested(day, devpi):
    devpi("use", "--venv", "-")
    printed = devpi("test", "-s", "tar.gz$", "hello-pkg")
    (posted,) = [number for number, line in enumerate(printed.lines) if line.startswith("posting tox result data to ")]
    assert printed.lines[posted + 1] == "success"


def test_24_list_shows_the_result_below_the_sdist(day, devpi):
    shown = devpi("list", "-t", "hello-pkg").lines
    assert day.matches(shown[0], "dev", WHEEL) and day.matches(shown[1], "dev", SDIST)
    assert re.fullmatch(r"\S+ +\w+ +py +3\.\d+\.\d+ tests passed", shown[2]) and len(shown) == 3


def test_25_an_unknown_environment_fails(devpi):
    assert "tox command failed" in devpi("test", "--no-upload", "-e", "nosuchenv", "-s", "tar.gz$", "hello-pkg", expect=1)


def test_26_push_to_staging(day, devpi):
    printed = devpi("push", "hello-pkg==1.0", "alice/staging")
    assert sorted(line.split()[1] for line in printed.lines) == [
        "register", "store_doczip", "store_releasefile", "store_releasefile", "store_toxresult"]
    assert "already exists in non-volatile index" in devpi("push", "hello-pkg==1.0", "alice/staging", expect=1)


def test_28_staging_shows_files_results_and_what_they_shadow(day, devpi):
    shown = devpi("list", "--index", "alice/staging", "-t", "hello-pkg").lines
    urls = [line for line in shown if line.startswith("http")]
    assert [day.matches(url, *file) for url, file in zip(
        urls, [("staging", WHEEL), ("staging", SDIST), ("dev", WHEEL), ("dev", SDIST)])] == [True] * 4
    assert [line.endswith("tests passed") for line in shown] == [False, False, True, False, False, True]


def test_29_staging_gives_things_away_by_force_only(day, devpi):
    remove = ["remove", "-y", "--index", "alice/staging", "hello-pkg==1.0"]
    assert "403 Forbidden" in devpi(*remove, expect=1)
    devpi(*remove, "-f")
    # the name stays private until the project itself is deleted; with devpi-server it is gone with its last release
    assert devpi("list", "--index", "alice/staging") in ("", "hello-pkg\n")


def test_30_push_to_an_index_outside(day, devpi, sink):
    printed = devpi("push", "hello-pkg==1.0", "pypi:ext")
    assert [line.split()[:2] for line in printed.lines[1:]] == [["200", "upload"], ["200", "upload"], ["200", "docfile"]]
    uploads = [request for request in sink.requests if request.field(":action") == "file_upload"]
    for request, filename in zip(uploads, (WHEEL, SDIST)):
        assert (request.method, request.path, request.credentials) == ("POST", "/legacy/", ("u", "p"))
        assert re.fullmatch("[0-9a-f]{64}", request.field("sha256_digest"))
        assert request.files["content"] == (filename, (day.project / "dist" / filename).read_bytes())
    sink.answer(400, b"not today")
    assert devpi("push", "hello-pkg==1.0", "pypi:ext", expect=1).lines[-1] == "Failure during upload"


def test_31_the_next_version_and_twine(day, devpi):
    text = textwrap.dedent(PROJECT["pyproject.toml"])
    (day.project / "pyproject.toml").write_text(text.replace('version = "1.0"', 'version = "1.1"'))
    devpi("upload", "--wheel", cwd=day.project, PIP_INDEX_URL=day.simple_url("alice/dev"))
    urls = devpi("list", "hello-pkg").lines
    assert [url.rpartition("/")[2] for url in urls] == ["hello_pkg-1.1-py3-none-any.whl", WHEEL, SDIST]
    day.clients.twine("upload", "--non-interactive", "--repository-url", day.url + "/alice/dev/",
                      "-u", "alice", "-p", "alicepw1", *(day.project / "dist").iterdir())


def test_33_another_index_for_one_command(day, devpi):
    assert "%s/alice/staging:" % day.url in devpi("index", DEVPI_INDEX="alice/staging").lines
    assert devpi("use").lines[0] == "current devpi index: %s/alice/dev (logged in as alice)" % day.url


def test_34_pip_and_uv_are_configured_and_install(day, devpi):
    places = {"PIP_CONFIG_FILE": None, "UV_NO_CONFIG": None}
    files = [devpi.home / "config" / name for name in ("pip/pip.conf", "uv/uv.toml")]
    for _ in range(2):
        devpi("use", "--set-cfg", **places)
        assert [file.read_text().count(day.simple_url("alice/dev")) for file in files] == [1, 1]
    day.clients.pip("install", "--target", "by-pip", "--no-deps", "hello-pkg", **places)
    day.clients.uv("pip", "install", "--target", "by-uv", "--no-deps", "hello-pkg", **places)
    assert [(devpi.home / name / "hello_pkg.py").exists() for name in ("by-pip", "by-uv")] == [True, True]
    devpi("use", "--unset-cfg", **places)
    assert not any(file.exists() and day.url in file.read_text() for file in files)


def test_35_removal(day, devpi):
    assert "deleting release 1.1 of hello-pkg" in devpi("remove", "-y", "hello-pkg==1.1").lines
    assert devpi("remove", "hello-pkg", input="no\n").lines[-1].endswith("not deleting anything")
    assert devpi("list") == "hello-pkg\n"
    devpi("remove", "-y", "hello-pkg")
    assert devpi("list") == ""


def test_37_refresh(devpi):
    assert in_a_few_tries(lambda: devpi("refresh", "six")) == "Refreshed six\n"
    assert any(url.endswith("/six-1.17.0.tar.gz") for url in devpi("list", "--all", "six").lines)


def test_38_a_session_that_is_none(day, devpi):
    auth = devpi.state("auth.json")
    auth["auth"][day.url + "/"] = [["alice", "garbage"]]
    devpi.write_state("auth.json", auth)
    assert devpi("use").lines[0] == "current devpi index: %s/alice/dev (not logged in)" % day.url
    assert not devpi.state("auth.json")["auth"].get(day.url + "/")
    printed = devpi("upload", *(day.project / "dist").iterdir(), expect=1)
    assert any(line.startswith("401 FAIL file_upload") for line in printed.lines)


def test_39_variables_are_enough_and_logoff(day, devpi, tmp_path):
    """A job with an empty home; then alice, who logs off twice."""
    job = Ours(tmp_path / "job")
    job.environment.update(DEVPI_USER="alice", DEVPI_PASSWORD="alicepw1", DEVPI_INDEX=day.url + "/alice/dev")
    files = sorted((day.project / "dist").iterdir())
    job("upload", "--skip-existing", *files)
    assert "hello-pkg" in job("list").lines
    devpi("login", "alice", "--password", "alicepw1")
    assert devpi("logoff") == "login information deleted\n" and devpi("logoff") == "not logged in\n"


def test_40_root_deletes_the_index(day, devpi):
    devpi("login", "root", "--password", "rootpw")
    assert devpi("-y", "index", "--delete", "alice/dev").lines[-1] == "index deleted: %s/alice/dev" % day.url
    assert "404 Not Found" in devpi("getjson", "/alice/dev", expect=1)
