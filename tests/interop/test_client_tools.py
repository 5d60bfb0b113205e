"""Our client with what it calls: builds without `build`, tox by uvx, installs by uv, an API token, a shell's variables."""

import json
import os
import re
import subprocess

import pytest

from client import Client
from clients import CURRENT, PYTHON, Clients
from harness import eventually, sdist, wheel
from projects import git_add, write_files, write_project
from test_client_day import DevpiServer

SETUPTOOLS = """\
    [build-system]
    requires = ["setuptools"]
    build-backend = "setuptools.build_meta"
    [project]
    name = "hello-tools"
    version = "%s"
    description = "A project of the tests"
    [tool.setuptools]
    py-modules = ["hello_tools"]
    """


@pytest.fixture
def index(world):
    """An index of dana's that inherits from PyPI."""
    return world.new_index("dana", bases=[world.mirror])


@pytest.fixture
def devpi(tmp_path, world, index):
    """Our client with dana logged in, and the real tools on its PATH."""
    devpi = Client(tmp_path / "home")
    devpi.environment = dict(Clients(devpi.home).environment, TERM="dumb")
    return devpi.sign_in(world.server, "dana", index)


@pytest.fixture
def project(devpi):
    project = write_files(devpi.home / "project", {
        "pyproject.toml": SETUPTOOLS % "1.0", "hello_tools.py": "answer = 42\n", ".gitignore": "dist/\n*.egg-info\n"})
    git_add(project)
    return project


@pytest.fixture
def bare(tmp_path, devpi):
    """The interpreter of a virtual environment in which nothing is installed, not even pip."""
    devpi.environment.pop("UV_PYTHON")
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    return tmp_path / "bare" / "bin" / "python"


PLAIN_PATH = os.pathsep.join(["/usr/local/bin", "/usr/bin", "/bin"])          # without the tools of `make interop`


def built(project):
    return sorted(path.name for path in (project / "dist").iterdir())


FILES = ["hello_tools-1.0-py3-none-any.whl", "hello_tools-1.0.tar.gz"]


def test_a_project_is_built_without_build_from_the_index(devpi, world, project, index, bare):
    """No `build`, no uv on the PATH: a throw-away environment gets what the project requires, through our index."""
    before = len(world.server.lines)
    printed = devpi("upload", "-p", bare, cwd=project, PATH=PLAIN_PATH)
    assert [line.split()[2] for line in printed.lines if line.startswith("file_upload of ")] == FILES == built(project)
    eventually(lambda: re.search(r"GET /\S+/setuptools-\S+\.whl 200 ", "".join(world.server.lines[before:])))


def test_what_a_build_needs_may_lie_on_a_restricted_index(devpi, world, project, bare):
    """Which the throw-away environment reads with our login, that nobody sees."""
    index = world.new_index("dana", bases=[world.mirror], acl_pkg_read="dana")
    devpi.sign_in(world.server, "dana", index)
    printed = devpi("upload", "--sdist", "-v", "-p", bare, cwd=project)
    assert built(project) == FILES[1:] and world.server.tokens["dana"] not in printed + printed.errors


def test_a_project_that_requires_nothing_is_built_without_isolation(devpi, world, index, bare):
    project = write_project(devpi.home / "plain", "hello-plain", "1.0")
    devpi("upload", "--no-vcs", "--no-isolation", "-p", bare, cwd=project)
    assert world.server.versions(index, "hello-plain") == ["1.0"]


def test_tox_comes_by_uvx_when_there_is_none(devpi, world, index):
    ini = b"[tox]\nenv_list = py\n[testenv]\nskip_install = true\ncommands = python -c 'print(1)'\n"
    world.server.upload(index, sdist("hello-uvx", "1.0", extra_members={"tox.ini": ini}))
    world.server.upload(index, wheel("hello-uvx", "1.0"))
    path = devpi.home / "bin"
    path.mkdir()
    (path / "uvx").symlink_to(CURRENT / "uvx")
    (path / "uv").symlink_to(CURRENT / "uv")
    devpi.command = [os.path.realpath(PYTHON)] + devpi.command[1:]         # whose environment has no tox
    printed = devpi("test", "hello-uvx", PATH=os.pathsep.join([str(path), PLAIN_PATH]),
                    UV_INDEX_URL=world.simple_url(world.mirror))
    assert printed.lines.count("success") == 2
    shown = devpi("list", "-t", "hello-uvx").lines
    assert [line.endswith("tests passed") for line in shown] == [False, True, False, True]


def test_install_by_uv_into_an_environment_without_pip(devpi, world, index, bare):
    world.server.upload(index, wheel("hello-uv", "1.0", requires_dist=["iniconfig"]))
    devpi("index", "acl_pkg_read=dana")
    printed = devpi("install", "--venv", bare.parents[1], "hello-uv")
    (packages,) = bare.parents[1].glob("lib/*/site-packages")
    assert {"hello_uv", "iniconfig"} <= {path.name for path in packages.iterdir()}
    assert world.server.tokens["dana"] not in printed + printed.errors
    assert "hello-uv" in devpi("install", "-l")


def test_a_shell_that_evaluates_env_installs_from_the_index(devpi, world, index):
    world.server.upload(index, wheel("hello-env", "1.0"))
    script = devpi("env") + "pip install -q --target by-pip hello-env\nuv pip install -q --target by-uv hello-env\n"
    devpi.clients = Clients(devpi.home)
    devpi.clients.run("sh", "-e", "-c", script)
    assert [(devpi.home / name / "hello_env").exists() for name in ("by-pip", "by-uv")] == [True, True]


# -- what only devpi-server has


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A client on a real devpi-server with the plugin devpi-tokens; root is logged in, on root/dev."""
    home = tmp_path_factory.mktemp("real")
    server = DevpiServer(home)
    try:
        server.start()
        devpi = Client(home / "home")
        devpi("use", server.url)
        devpi("login", "root", "--password", "rootpw")
        devpi("index", "-c", "dev")
        devpi("use", "root/dev")
        devpi.url = server.url
        yield devpi
    finally:
        server.stop()


def test_a_token_does_the_work_of_a_job(real, tmp_path):
    """Made for one task, restricted further, shown, used, and taken away."""
    made = real("token", "create", "-a", "upload,pkg_read", "-i", "root/dev")
    (token,) = re.findall(r"devpi-[A-Za-z0-9_=-]{20,}", made)
    (identity,) = re.findall(r"(?m)^(\w{8,})", real("token", "list"))
    assert "upload" in real("token", "inspect", "--token", token)
    job = Client(tmp_path / "job")
    job.environment.update(DEVPI_USER="root", DEVPI_TOKEN=token, DEVPI_INDEX="%s/%s" % (real.url, "root/dev"))
    printed = job("upload", job.save(wheel("by-token", "1.0")))
    assert token not in printed + printed.errors and "by-token" in real("list").lines
    assert "403 Forbidden" in job("remove", "-y", "by-token", expect=1)
    real("-y", "token", "delete", identity)
    job("upload", job.save(wheel("by-token", "1.1")), expect=1)
    assert [line for line in real("list", "-v", "--all").lines if line.startswith("by-token")] == ["by-token==1.0"]


def test_a_server_that_can_not_yank_is_told_apart(real):
    path = real.save(wheel("unyanked", "1.0"))
    real("upload", path)
    printed = real("yank", "unyanked==1.0", expect=1)
    assert "yank" in printed and len(printed.lines) <= 4


def test_what_both_servers_answer_is_read_alike(real, world, devpi, index):
    """Listings, JSON and refusals, apart from names and times."""
    archives = [wheel("alike", "1.0"), sdist("alike", "1.0"), wheel("alike", "2.0rc1")]
    for client in (real, devpi):
        client("upload", *[client.save(archive) for archive in archives])
    for words in (["list", "alike"], ["list", "-v", "--all"], ["list", "nosuch-project-here"], ["remove", "-y", "alike==7"],
                  ["index", "nosuch/index"], ["user", "ghost"], ["index", "volatile=maybe"], ["index", "foo=bar"]):
        texts = []
        for client, own in ((real, "root/dev"), (devpi, index)):
            base = client.state()["index"]
            printed = client(*words, expect=None if words[0] != "list" or "nosuch" in words[1] else 0)
            texts.append([line for line in printed.replace(base, "INDEX").replace(own, "INDEX").replace(
                base[:-len(own)], "ROOT/").splitlines() if not line.startswith("by-token") and not line.startswith("unyanked")])
        # ours names the key as well
        assert texts[0] == texts[1] or sorted(text.replace(" (volatile)", "") for text in texts[0]) == sorted(
            text.replace(" (volatile)", "") for text in texts[1]), words
    assert json.loads(real("getjson", "alike/1.0"))["result"]["summary"] == "A test package"
