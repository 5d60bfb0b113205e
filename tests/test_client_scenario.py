"""One long day with the client, from an empty server to an index that is gone; what needs other packages stands in.

Each test goes on where the one before it has left off; they run in the order in which they stand here.
"""

import json
import re
import shutil
import sys
import tarfile

import pytest

from client import POSIX, Client
from harness import Server, Upstream
from receiver import Receiver
from test_client_install import PIP
from test_client_test import TOX
from test_client_upload import BUILD, DOCS, SDIST, SPHINX, WHEEL, git_add, uploads, write_project

pytestmark = pytest.mark.skipif(not POSIX or not shutil.which("git"), reason="needs git, and executable scripts")


class Day:
    """The person, the server, a stand-in for PyPI, and the project hello-pkg under version control."""

    def __init__(self, server, upstream, home):
        self.server, self.upstream, self.url = server, upstream, server.url
        self.devpi = Client(home / "home")
        for name, program in [("tox", TOX), ("pip", PIP), ("sphinx-build", SPHINX)]:
            self.devpi.environment["PATH"] = self.devpi.add_command(name, program)
        self.devpi.write("bin/plan", "{}")
        self.project = write_project(home / "project")
        (self.project / "tox.ini").write_text("[tox]\nenv_list = py\n")
        (self.project / ".gitignore").write_text("dist/\n")
        git_add(self.project)
        (self.project / "untracked.txt").write_text("not for others")

    def matches(self, line, index, filename):
        """Whether the line is the URL of that file of alice/INDEX."""
        pattern = "%s/alice/%s/\\+f/[0-9a-f]{3}/[0-9a-f]{13}/%s"
        return re.fullmatch(pattern % (re.escape(self.url), index, re.escape(filename)), line) is not None


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    home = tmp_path_factory.mktemp("day")
    upstream = Upstream().start()
    server = Server(home / "server", root_password="rootpw").start()
    yield Day(server, upstream, home)
    server.stop()
    upstream.stop()


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


def test_03_login_as_root(day, devpi):
    printed = devpi("login", "root", "--password", "bad", expect=1)
    assert "401 Unauthorized: user 'root' could not be authenticated" in printed.lines
    assert not (devpi.directory / "auth.json").exists()
    assert devpi("login", "root", "--password", "rootpw") == "logged in 'root', credentials valid for 10.00 hours\n"
    assert devpi.mode("auth.json") == 0o600


def test_05_root_makes_the_mirror_and_a_user(day, devpi):
    assert "  type=mirror" in devpi("index", "-c", "root/pypi", "type=mirror", "mirror_url=" + day.upstream.url).lines
    user = ["user", "-c", "alice", "password=alicepw1", "email=a@example.com"]
    assert devpi(*user) == "user created: alice\n"
    assert "409 Conflict: user already exists" in devpi(*user, expect=1).lines


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


def test_12_alice_uses_her_index(day, devpi):
    assert devpi("use", "alice/dev").lines[0] == "current devpi index: %s/alice/dev (logged in as alice)" % day.url
    assert devpi("use", "-l").lines == [
        "alice/dev       bases=root/pypi       volatile=True", "alice/staging   bases=alice/dev       volatile=False",
        "root/pypi       bases=                volatile=True"]


def test_14_a_dry_run(day, devpi):
    printed = devpi(*BUILD, "--dry-run", cwd=day.project)
    assert [line for line in printed.lines if line.startswith("skipped")] == [
        "skipped: file_upload of %s to %s/alice/dev/" % (name, day.url) for name in (WHEEL, SDIST)]
    assert devpi("list") == "" and not (day.project / "dist").exists()


def test_15_upload_of_the_project_and_its_documentation(day, devpi):
    printed = devpi(*BUILD, "--with-docs", cwd=day.project)
    assert uploads(printed) == ["%s of %s to %s/alice/dev/" % (action, name, day.url) for action, name in [
        ("file_upload", WHEEL), ("file_upload", SDIST), ("doc_upload", DOCS)]]
    assert sorted(path.name for path in (day.project / "dist").iterdir()) == [DOCS, WHEEL, SDIST]
    with tarfile.open(str(day.project / "dist" / SDIST)) as archive:
        assert "untracked.txt" not in " ".join(archive.getnames())


def test_16_list_and_getjson_of_what_was_uploaded(day, devpi):
    assert devpi("list") == "hello-pkg\n" and devpi("list", "-v") == "hello-pkg==1.0\n"
    wheel_url, sdist_url = devpi("list", "hello-pkg").lines
    assert day.matches(wheel_url, "dev", WHEEL) and day.matches(sdist_url, "dev", SDIST)
    assert "404 Not Found: no project 'nosuch-zzz'" in devpi("list", "nosuch-zzz", expect=1).lines
    answer = devpi("getjson", "hello-pkg/1.0").json()
    assert answer["type"] == "versiondata"
    assert [link["rel"] for link in answer["result"]["+links"]] == ["releasefile", "releasefile", "doczip"]
    assert (answer["result"]["summary"], answer["result"]["requires_python"]) == ("A project", ">=3.8")


def test_22_install(day, devpi):
    """Steps 20 and 21, pip and uv themselves, are for `make interop`."""
    printed = devpi("install", "hello-pkg", PYTHONPATH=devpi.write("none/pip.py", "raise ImportError").parent)
    assert re.search(r"--> .*bin/pip install -U hello-pkg .*PIP_INDEX_URL='%s/alice/dev/\+simple/'" % day.server.url, printed)


def test_23_the_release_is_tested(day, devpi):
    printed = devpi("test", "hello-pkg")
    assert printed.lines.count("success") == 2 and "posting tox result data to " + day.url in printed


def test_24_list_shows_the_results_below_the_files(day, devpi):
    shown = devpi("list", "-t", "hello-pkg").lines
    assert day.matches(shown[0], "dev", WHEEL) and day.matches(shown[2], "dev", SDIST)
    assert shown[1].endswith("3.11.7 tests passed") and shown[3] == shown[1] and len(shown) == 4


def test_25_tests_that_fail(day, devpi):
    devpi.write("bin/plan", json.dumps({SDIST: {"code": 254, "report": False}}))
    assert "tox command failed" in devpi("test", "--no-upload", "-e", "nosuchenv", "hello-pkg", expect=1)


def test_26_push_to_staging(day, devpi):
    printed = devpi("push", "hello-pkg==1.0", "alice/staging")
    assert sorted(line.split()[1] for line in printed.lines) == [
        "register", "store_doczip", "store_releasefile", "store_releasefile", "store_toxresult", "store_toxresult"]
    assert {line.split()[0] for line in printed.lines} == {"200"}
    assert "409 Conflict: %s already exists in non-volatile index, with the same content" % WHEEL in \
        devpi("push", "hello-pkg==1.0", "alice/staging", expect=1).lines


def test_28_staging_shows_files_results_and_what_they_shadow(day, devpi):
    shown = devpi("list", "--index", "alice/staging", "-t", "hello-pkg").lines
    urls = [line for line in shown if line.startswith("http")]
    assert [day.matches(url, *file) for url, file in zip(
        urls, [("staging", WHEEL), ("staging", SDIST), ("dev", WHEEL), ("dev", SDIST)])] == [True] * 4
    assert [line.endswith("tests passed") for line in shown] == [False, True] * 4


def test_29_staging_gives_things_away_by_force_only(day, devpi):
    remove = ["remove", "-y", "--index", "alice/staging", "hello-pkg==1.0"]
    assert "403 Forbidden: cannot delete version on non-volatile index" in devpi(*remove, expect=1).lines
    devpi(*remove, "-f")
    assert day.server.get("/alice/staging/hello-pkg?ignore_bases").result == {}


def test_30_push_to_an_index_outside(day, devpi, sink):
    printed = devpi("push", "hello-pkg==1.0", "pypi:ext")
    assert [line.split()[:2] for line in printed.lines[1:]] == [["200", "upload"], ["200", "upload"], ["200", "docfile"]]
    for request, filename in zip(sink.requests, (WHEEL, SDIST)):
        assert (request.method, request.path, request.credentials) == ("POST", "/legacy/", ("u", "p"))
        assert request.field(":action") == "file_upload" and re.fullmatch("[0-9a-f]{64}", request.field("sha256_digest"))
        assert request.files["content"] == (filename, (day.project / "dist" / filename).read_bytes())
    sink.answer(400, b"not today")
    assert devpi("push", "hello-pkg==1.0", "pypi:ext", expect=1).lines[-1] == "Failure during upload"


def test_31_the_next_version(day, devpi):
    write_project(day.project, "1.1")
    devpi("upload", "--wheel", "--no-isolation", "-p", sys.executable, cwd=day.project)
    assert [url.rpartition("/")[2] for url in devpi("list", "hello-pkg").lines] == [
        "hello_pkg-1.1-py3-none-any.whl", WHEEL, SDIST]


def test_33_another_index_for_one_command(day, devpi):
    assert "%s/alice/staging:" % day.url in devpi("index", DEVPI_INDEX="alice/staging").lines
    assert devpi("use").lines[0] == "current devpi index: %s/alice/dev (logged in as alice)" % day.url


def test_34_pip_and_uv_are_configured(day, devpi):
    files = {"PIP_CONFIG_FILE": devpi.home / "pip.conf", "UV_CONFIG_FILE": devpi.home / "uv.toml"}
    for _ in range(2):
        devpi("use", "--set-cfg", **files)
        assert [file.read_text().count(day.url + "/alice/dev/+simple/") for file in files.values()] == [1, 1]
    devpi("use", "--set-cfg", "alice/staging", **files)
    assert all(file.with_name(file.name + "-bak").exists() for file in files.values())
    devpi("use", "alice/dev", **files)


def test_35_removal(day, devpi):
    assert "deleting release 1.1 of hello-pkg" in devpi("remove", "-y", "hello-pkg==1.1").lines
    assert devpi("remove", "hello-pkg", input="no\n").lines[-1].endswith("not deleting anything")
    assert devpi("list") == "hello-pkg\n"
    devpi("remove", "-y", "hello-pkg")
    assert devpi("list") == ""


def test_37_refresh(day, devpi):
    day.upstream.publish("six", "1.16.0")
    assert devpi("refresh", "six") == "Refreshed six\n"
    assert devpi("list", "six").lines[0].endswith("/six-1.16.0-py3-none-any.whl")


def test_38_a_session_that_is_none(day, devpi):
    auth = devpi.state("auth.json")
    auth["auth"][day.url + "/"] = [["alice", "garbage"]]
    devpi.write_state("auth.json", auth)
    assert devpi("use").lines[0] == "current devpi index: %s/alice/dev (not logged in)" % day.url
    assert not devpi.state("auth.json")["auth"].get(day.url + "/")
    printed = devpi("upload", *(day.project / "dist").iterdir(), expect=1)
    assert any(line.startswith("401 FAIL file_upload") for line in printed.lines)


def test_39_logoff_twice(devpi):
    devpi("login", "alice", "--password", "alicepw1")
    assert devpi("logoff") == "login information deleted\n" and devpi("logoff") == "not logged in\n"


def test_40_root_deletes_the_index(day, devpi):
    devpi("login", "root", "--password", "rootpw")
    assert devpi("-y", "index", "--delete", "alice/dev").lines[-1] == "index deleted: %s/alice/dev" % day.url
    assert day.server.get("/alice/dev").status == 404
