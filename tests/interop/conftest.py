"""One server for the whole run, with a private index, one that inherits from it and from PyPI, and PyPI's mirror."""

import itertools
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import Server, sdist, wheel  # noqa: E402
from clients import CURRENT, PIP20_PYTHON, Clients  # noqa: E402

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
        server.add_index(self.private, volatile=False)
        server.add_index(self.inherited, volatile=False, bases=[self.private, self.mirror])
        for index, archive in [(self.private, self.library), (self.private, self.future),
                               (self.private, self.source), (self.inherited, self.application)]:
            assert self.upload(index, archive).status == 200
        return self

    def upload(self, index, archive):
        return self.server.upload(index, archive, user="alice", password=PASSWORD)

    def new_index(self, **config):
        """The name of a new index of alice's, for one test alone."""
        name = "alice/" + next(self.names)
        self.server.add_index(name, **config)
        return name

    def index_url(self, index, user=None, password=None):
        """The bare URL of an index: where uploads go, and a valid index URL for installers."""
        credentials = "%s:%s@" % (user, password) if user else ""
        return self.server.url.replace("://", "://" + credentials) + "/" + index + "/"

    def simple_url(self, index, **credentials):
        return self.index_url(index, **credentials) + "+simple/"


@pytest.fixture(scope="session")
def pypi_server():
    """pypi_server(directory) -> a started Server with root/pypi, which reaches PyPI as this machine does."""
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    made = []

    def make(directory):
        made.append(Server(directory, root_pypi=True, env=proxies))
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
