"""One long day with the real devpi-client, from an empty server to an index that is gone.

Each test goes on where the one before it has left off; they run in the order in which they stand here.
"""

import json
import re
import stat

import pytest

from clients import Clients, Devpi
from projects import git_add, sphinx_build, write_files, write_project
from receiver import Receiver

WHEEL, SDIST, DOCS = "hello_pkg-1.0-py3-none-any.whl", "hello_pkg-1.0.tar.gz", "hello-pkg-1.0.doc.zip"
FILE_URL = "%s/alice/%s/\\+f/[0-9a-f]{3}/[0-9a-f]{13}/%s"
TOX_INI = """\
    [tox]
    env_list = py
    [testenv]
    commands = python -c "import hello_pkg, iniconfig; assert hello_pkg.version == '1.0'"
    """


class Day:
    """The person's clients, the server, and the project hello-pkg under version control."""

    def __init__(self, server, home):
        self.server, self.url = server, server.url
        self.clients = Clients(home / "home")
        self.clients.environment["PATH"] = "%s:%s" % (
            sphinx_build(home / "bin"), self.clients.environment["PATH"])
        self.devpi = Devpi(self.clients, home / "client")
        self.project = home / "project"
        self.write_project("1.0")
        write_files(self.project, {"tox.ini": TOX_INI, ".gitignore": "dist/\n"})
        git_add(self.project)
        (self.project / "untracked.txt").write_text("not for others")

    def write_project(self, version):
        write_project(self.project, "hello-pkg", version,
                      metadata="Requires-Python: >=3.8\nRequires-Dist: iniconfig\n")

    def simple_url(self, index):
        return "%s/%s/+simple/" % (self.url, index)

    def matches(self, line, index, filename):
        """Whether the line is the URL of that file of alice/INDEX."""
        return re.fullmatch(FILE_URL % (re.escape(self.url), index, re.escape(filename)), line)

    def mode(self, name):
        return stat.S_IMODE((self.devpi.directory / name).stat().st_mode)


@pytest.fixture(scope="module")
def day(pypi_server, tmp_path_factory):
    home = tmp_path_factory.mktemp("day")
    return Day(pypi_server(home / "server", root_pypi=False, root_password="rootpw"), home)


@pytest.fixture(scope="module")
def devpi(day):
    return day.devpi


@pytest.fixture(scope="module")
def sink(day):
    """The section `ext` of ~/.pypirc: it takes everything."""
    sink = Receiver().start()
    write_files(day.clients.home, {
        ".pypirc": "[ext]\nrepository = %s/legacy/\nusername = u\npassword = p\n" % sink.url})
    yield sink
    sink.stop()


def test_01_use_of_an_empty_server(day, devpi):
    assert "using server: %s/ (not logged in)" % day.url in devpi("use", day.url).splitlines()
    assert devpi.state()["login"] == day.url + "/+login" and not devpi.state().get("index")
    assert day.mode("current.json") == 0o600
    assert devpi("use", "-l") == ""


def test_03_login_as_root(day, devpi):
    printed = devpi("login", "root", "--password", "bad", expect=1)
    assert "401 Unauthorized: user 'root' could not be authenticated" in printed.splitlines()
    assert not (devpi.directory / "auth.json").exists()
    assert devpi("login", "root", "--password", "rootpw") == "logged in 'root', credentials valid for 10.00 hours\n"
    assert day.mode("auth.json") == 0o600


def test_05_root_makes_the_mirror_and_a_user(devpi):
    printed = devpi("index", "-c", "root/pypi", "type=mirror", "mirror_url=https://pypi.org/simple/")
    assert "  type=mirror" in printed.splitlines()
    user = ["user", "-c", "alice", "password=alicepw1", "email=a@example.com"]
    assert devpi(*user) == "user created: alice\n"
    assert "409 Conflict: user already exists" in devpi(*user, expect=1).splitlines()


def test_07_alice_makes_her_indexes(day, devpi):
    devpi("login", "alice", "--password", "alicepw1")
    assert [user for user, _ in devpi.state("auth.json")["auth"][day.url + "/"]] == ["alice", "root"]
    shown = devpi("index", "-c", "dev", "bases=root/pypi").splitlines()
    assert {"  bases=root/pypi", "  volatile=True", "  acl_upload=alice"} <= set(shown)
    assert "  volatile=False" in devpi("index", "-c", "staging", "bases=alice/dev", "volatile=False").splitlines()
    assert "  title=Stage" in devpi("index", "staging", "title=Stage").splitlines()
    assert "  title=Stage" not in devpi("index", "staging", "title-=").splitlines()
    assert "400 Bad Request: base index 'alice/nope' does not exist" in \
        devpi("index", "staging", "bases+=alice/nope", expect=1).splitlines()


def test_12_alice_uses_her_index(day, devpi):
    assert "current devpi index: %s/alice/dev (logged in as alice)" % day.url in devpi("use", "alice/dev").splitlines()
    assert [line.split()[0] for line in devpi("use", "-l").splitlines()[-3:]] == \
        ["alice/dev", "alice/staging", "root/pypi"]


def test_14_a_dry_run(day, devpi):
    printed = devpi("upload", "--dry-run", cwd=day.project).splitlines()
    assert [line for line in printed if line.startswith("skipped")] == [
        "skipped: file_upload of %s to %s/alice/dev/" % (name, day.url) for name in (WHEEL, SDIST)]
    assert devpi("list") == ""


def test_15_upload_of_the_project_and_its_documentation(day, devpi):
    printed = devpi("upload", "--with-docs", cwd=day.project).splitlines()
    assert [line for line in printed if "_upload of" in line] == [
        "%s of %s to %s/alice/dev/" % (action, name, day.url) for action, name in
        [("file_upload", WHEEL), ("file_upload", SDIST), ("doc_upload", DOCS)]]
    assert sorted(path.name for path in (day.project / "dist").iterdir()) == [DOCS, WHEEL, SDIST]
    assert "untracked.txt" not in day.clients.run("tar", "-tzf", day.project / "dist" / SDIST)


def test_16_list_and_getjson_of_what_was_uploaded(day, devpi):
    assert devpi("list") == "hello-pkg\n"
    assert devpi("list", "-v") == "hello-pkg==1.0\n"
    wheel_url, sdist_url = devpi("list", "hello-pkg").splitlines()
    assert day.matches(wheel_url, "dev", WHEEL) and day.matches(sdist_url, "dev", SDIST)
    assert "404 Not Found: no project 'nosuch-zzz'" in devpi("list", "nosuch-zzz", expect=1).splitlines()
    answer = json.loads(devpi("getjson", "hello-pkg/1.0"))
    assert answer["type"] == "versiondata"
    assert [link["rel"] for link in answer["result"]["+links"]] == ["releasefile", "releasefile", "doczip"]
    assert (answer["result"]["summary"], answer["result"]["requires_python"]) == ("A project of the tests", ">=3.8")


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_20_install_with_a_dependency_from_pypi(day, installer):
    found = day.clients.install(installer, day.simple_url("alice/dev"), "hello-pkg")
    assert found["hello-pkg"] == "1.0" and "iniconfig" in found


def test_22_install_into_a_virtual_environment(devpi, venv):
    printed = devpi("install", "--venv", venv, "hello-pkg")
    assert re.search(r"--> .*bin/pip install -U hello-pkg .*PIP_INDEX_URL=.*//\*+:\*+@", printed)
    assert (venv / "lib").exists() and list(venv.glob("lib/*/site-packages/hello_pkg.py"))


def test_23_the_sdist_is_tested(devpi):
    printed = devpi("test", "hello-pkg").splitlines()
    (posted,) = [number for number, line in enumerate(printed) if line.startswith("posting tox result data to ")]
    assert printed[posted + 1] == "success"


def test_24_list_shows_the_result_below_the_sdist(day, devpi):
    shown = [line for line in devpi("list", "-t", "hello-pkg").splitlines() if ".pkg" not in line]
    assert day.matches(shown[0], "dev", WHEEL) and day.matches(shown[1], "dev", SDIST)
    assert re.fullmatch(r"\S+ +\w+ +py +3\.\d+\.\d+ tests passed", shown[2]) and len(shown) == 3


def test_25_an_unknown_environment_fails(devpi):
    assert "tox command failed" in devpi("test", "--no-upload", "-e", "nosuchenv", "hello-pkg", expect=1)


def test_26_push_to_staging(day, devpi):
    printed = devpi("push", "hello-pkg==1.0", "alice/staging").splitlines()
    assert [line.split()[:2] for line in printed] == [["200", action] for action in (
        "register", "store_releasefile", "store_releasefile", "store_toxresult", "store_doczip")]
    assert "409 Conflict: %s already exists in non-volatile index, with the same content" % WHEEL in \
        devpi("push", "hello-pkg==1.0", "alice/staging", expect=1).splitlines()


def test_28_staging_shows_files_results_and_what_they_shadow(day, devpi):
    shown = devpi("list", "--index", "alice/staging", "-t", "hello-pkg").splitlines()
    shown = [line for line in shown if ".pkg" not in line and not line.startswith("Warning")]
    urls = [line for line in shown if line.startswith("http")]
    assert [day.matches(url, *file) is not None for url, file in zip(
        urls, [("staging", WHEEL), ("staging", SDIST), ("dev", WHEEL), ("dev", SDIST)])] == [True] * 4
    assert [line.endswith("tests passed") for line in shown] == [False, False, True, False, False, True]


def test_29_staging_gives_things_away_by_force_only(day, devpi):
    remove = ["remove", "-y", "--index", "alice/staging", "hello-pkg==1.0"]
    assert "403 Forbidden: cannot delete version on non-volatile index" in devpi(*remove, expect=1).splitlines()
    devpi(*remove, "-f")
    assert day.server.get("/alice/staging").result["projects"] == ["hello-pkg"]     # empty, and private


def test_30_push_to_an_index_outside(day, devpi, sink):
    printed = devpi("push", "hello-pkg==1.0", "pypi:ext").splitlines()
    assert [line.split()[:2] for line in printed[1:]] == [["200", "upload"], ["200", "upload"], ["200", "docfile"]]
    for request, filename in zip(sink.requests, (WHEEL, SDIST)):
        assert (request.method, request.path, request.credentials) == ("POST", "/legacy/", ("u", "p"))
        assert request.field(":action") == "file_upload"
        assert request.files["content"] == (filename, (day.project / "dist" / filename).read_bytes())
        assert re.fullmatch("[0-9a-f]{64}", request.field("sha256_digest"))
    sink.answer(400, b"not today")
    assert devpi("push", "hello-pkg==1.0", "pypi:ext", expect=1).splitlines()[-1] == "Failure during upload"


def test_31_the_next_version(day, devpi):
    day.write_project("1.1")
    devpi("upload", "--wheel", cwd=day.project)
    urls = devpi("list", "hello-pkg").splitlines()
    assert [url.rpartition("/")[2] for url in urls] == ["hello_pkg-1.1-py3-none-any.whl", WHEEL, SDIST]
    day.clients.twine("upload", "--non-interactive", "--repository-url", day.url + "/alice/dev/",
                      "-u", "alice", "-p", "alicepw1", *(day.project / "dist").iterdir())


def test_33_another_index_for_one_command(day, devpi):
    assert "%s/alice/staging:" % day.url in devpi("index", DEVPI_INDEX="alice/staging").splitlines()
    assert "current devpi index: %s/alice/dev (logged in as alice)" % day.url in devpi("use").splitlines()


def test_34_pip_and_uv_are_configured(day, devpi):
    devpi("use", "--venv", "-")
    files = [day.clients.home / "config" / name for name in ("pip/pip.conf", "uv/uv.toml")]
    for _ in range(2):
        devpi("use", "--set-cfg", PIP_CONFIG_FILE=None)
        assert [file.read_text().count(day.simple_url("alice/dev")) for file in files] == [1, 1]
    assert all(file.with_name(file.name + "-bak").exists() for file in files)


def test_35_removal(day, devpi):
    assert "deleting release 1.1 of hello-pkg" in devpi("remove", "-y", "hello-pkg==1.1").splitlines()
    assert devpi("remove", "hello-pkg", input="no\n").splitlines()[-1].endswith("not deleting anything")
    assert devpi("list") == "hello-pkg\n"
    devpi("remove", "-y", "hello-pkg")
    assert devpi("list") == ""


def test_37_refresh(devpi):
    assert devpi("refresh", "six") == "Refreshed six\n"


def test_38_a_session_that_is_none(day, devpi):
    auth = devpi.state("auth.json")
    auth["auth"][day.url + "/"] = [["alice", "garbage"]]
    (devpi.directory / "auth.json").write_text(json.dumps(auth))
    assert "current devpi index: %s/alice/dev (not logged in)" % day.url in devpi("use").splitlines()
    assert devpi.state("auth.json")["auth"][day.url + "/"] == []
    archives = [path for path in (day.project / "dist").iterdir()]
    assert any(line.startswith("401 FAIL file_upload") for line in devpi("upload", *archives, expect=1).splitlines())


def test_39_logoff_twice(devpi):
    devpi("login", "alice", "--password", "alicepw1")
    assert devpi("logoff") == "login information deleted\n"
    assert devpi("logoff") == "not logged in\n"


def test_40_root_deletes_the_index(day, devpi):
    devpi("login", "root", "--password", "rootpw")
    assert devpi("index", "-y", "--delete", "alice/dev").splitlines()[-1] == "index deleted: %s/alice/dev" % day.url
    assert day.server.get("/alice/dev").status == 404
