"""The fixtures. Each server and upstream is stopped when its test (or module) is done."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import pytest  # noqa: E402

pytest.register_assert_rewrite("harness")

from harness import Server, Upstream, new_index  # noqa: E402
from receiver import Receiver  # noqa: E402
from scripted import Scripted  # noqa: E402


@pytest.fixture
def make_server(tmp_path):
    """make_server(*options, **keywords): a started Server, on a fresh directory or `directory=`."""
    made = []

    def make(*options, directory=None, start=True, **keywords):
        server = Server(directory or tmp_path / ("server%d" % len(made)), *options, **keywords)
        made.append(server)
        return server.start() if start else server

    yield make
    for server in made:
        if server.running:
            server.kill()


@pytest.fixture
def server(make_server):
    """A server of the test's own: fresh directory, no root/pypi, root's password is "secret"."""
    return make_server()


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory):
    """One server for the tests of a module: each makes users of its own names."""
    server = Server(tmp_path_factory.mktemp("shared") / "server").start()
    yield server
    if server.running:
        server.kill()


@pytest.fixture
def upstream():
    """A fake PyPI of the test's own."""
    upstream = Upstream().start()
    yield upstream
    upstream.stop()


@pytest.fixture
def scripted():
    """An upstream that says what the test tells it to."""
    scripted = Scripted()
    yield scripted
    scripted.stop()


@pytest.fixture
def receiver():
    """A server that takes all that is sent to it."""
    receiver = Receiver().start()
    yield receiver
    receiver.stop()


# -- of the command line client's tests: importing `client` compiles it, so only they do


@pytest.fixture(scope="module")
def site():
    """One server for all of them, with alice, bob and root/pypi, a mirror of nothing."""
    from client import shared_site
    return shared_site()


@pytest.fixture
def index(site):
    """An index of alice's, for one test alone."""
    return new_index(site, "alice")


@pytest.fixture
def devpi(tmp_path, site, index):
    """The client with alice logged in on the index."""
    from client import Client
    return Client(tmp_path / "home").sign_in(site, "alice", index)


@pytest.fixture
def nobody(tmp_path):
    """The client in an empty home."""
    from client import Client
    return Client(tmp_path / "nobody")


@pytest.fixture
def gate(site):
    """A port that leads to the server, at which requests may meet a fault."""
    from client import Gate
    gate = Gate(site)
    yield gate
    gate.close()


def pytest_make_parametrize_id(val, argname):
    """A long text is named, not shown: the name of a test is in the environment of all that it starts."""
    return argname if isinstance(val, (str, bytes)) and len(val) > 200 else None
