"""One server for the whole run, with a private index, one that inherits from it and from PyPI, and PyPI's mirror."""

import itertools
import os
import shutil
import sys
import urllib.parse
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import PROGRAM, Server, eventually, sdist, wheel  # noqa: E402
from clients import CURRENT, PIP20_PYTHON, PYTHON, Clients, Devpi  # noqa: E402
from receiver import Receiver  # noqa: E402

PASSWORD = "pw-of-alice"


def pytest_sessionstart(session):
    if not (CURRENT / "uv").exists() or not Path(PIP20_PYTHON).exists():
        pytest.exit("the clients are not installed: run `make interop`", returncode=4)


class World:
    """A server, the archives that it holds, and the URLs of its indexes."""

    private = "alice/private"
    inherited = "alice/inherited"
    mirror = "root/pypi"
    user, password = "alice", PASSWORD

    def __init__(self, server):
        self.server = server
        self.library = wheel("hello-lib", "1.0", requires_python=">=3.6")
        self.future = wheel("hello-lib", "2.0", requires_python=">=99")
        self.source = sdist("hello-source", "1.0")
        self.application = wheel("hello-app", "1.0", requires_dist=["hello-lib", "iniconfig"])
        self.names = ("x%d" % number for number in itertools.count())

    def fill(self):
        server = self.server
        server.add_user("alice", PASSWORD)
        server.add_user("bob", "pw-of-bob")
        server.add_user("dana", "pw-of-dana")
        server.add_index(self.private, volatile=False)
        server.add_index(self.inherited, volatile=False, bases=[self.private, self.mirror])
        for index, archive in [(self.private, self.library), (self.private, self.future),
                               (self.private, self.source), (self.inherited, self.application)]:
            assert self.upload(index, archive).status == 200
        fetch_from_pypi(server)
        return self

    def upload(self, index, archive):
        return self.server.upload(index, archive, user="alice", password=PASSWORD)

    def new_index(self, user="alice", **config):
        """The name of a new index of the user's, for one test alone."""
        name = "%s/%s" % (user, next(self.names))
        self.server.add_index(name, **config)
        return name

    def index_url(self, index, user=None, password=None):
        """The bare URL of an index: where uploads go, and a valid index URL for installers."""
        credentials = "%s:%s@" % (user, password) if user else ""
        return self.server.url.replace("://", "://" + credentials) + "/" + index + "/"

    def simple_url(self, index, **credentials):
        return self.index_url(index, **credentials) + "+simple/"


def fetch_from_pypi(server):
    """Has root/pypi hold what clients need that don't ask again: PyPI may fail for a moment."""
    for project, filename in [("six", "six-1.16.0-py2.py3-none-any.whl"), ("six", "six-1.16.0.tar.gz"),
                              ("iniconfig", "iniconfig-2.0.0-py3-none-any.whl"), ("setuptools", None)]:
        page = "/root/pypi/+simple/%s/" % project
        eventually(lambda: server.get(page).status == 200, seconds=120, pause=1)
        if filename:
            (url,) = [file["url"] for file in server.simple("root/pypi", project)["files"] if file["filename"] == filename]
            path = urllib.parse.urlsplit(urllib.parse.urljoin(server.url + page, url)).path
            eventually(lambda: server.get(path).status == 200, seconds=120, pause=1)


@pytest.fixture(scope="session")
def pypi_server():
    """pypi_server(directory) -> a started Server with root/pypi, which reaches PyPI as this machine does, and waits for it.

    Keywords are those of Server.
    """
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    made = []

    def make(directory, **keywords):
        made.append(Server(directory, "--request-timeout", "60", env=proxies,
                           **dict({"root_pypi": True, "script": PROGRAM}, **keywords)))
        return made[-1].start()

    yield make
    for server in made:
        if server.running:
            server.stop()


@pytest.fixture(scope="session")
def world(pypi_server, tmp_path_factory):
    return World(pypi_server(tmp_path_factory.mktemp("world") / "server")).fill()


@pytest.fixture
def clients(tmp_path):
    return Clients(tmp_path / "home")


@pytest.fixture
def receiver():
    """A server that takes what is sent to it, as another index would."""
    receiver = Receiver().start()
    yield receiver
    receiver.stop()


@pytest.fixture(scope="session")
def venv(tmp_path_factory):
    """A virtual environment with pip; the tests that share it install projects of different names."""
    home = tmp_path_factory.mktemp("venv")
    Clients(home / "home").run(PYTHON, "-m", "virtualenv", "--quiet", home / "venv")
    return home / "venv"


@pytest.fixture(scope="session")
def signed_in(world, tmp_path_factory):
    """signed_in(directory, index): a client directory as devpi-client leaves it when dana has logged in on the index.

    The client does so once; what it has written then says the name of the other index.
    """
    home = tmp_path_factory.mktemp("dana")
    devpi, first = Devpi(Clients(home / "home"), home / "client"), world.new_index("dana")
    devpi("use", "%s/%s" % (world.server.url, first))
    devpi("login", "dana", "--password", world.server.passwords["dana"])

    def sign_in(directory, index):
        shutil.copytree(str(devpi.directory), str(directory))
        state = directory / "current.json"
        state.write_text(state.read_text().replace(first, index))

    return sign_in
