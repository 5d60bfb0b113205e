"""The fixtures. Each server and upstream is stopped when its test (or module) is done."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import pytest  # noqa: E402

pytest.register_assert_rewrite("harness")

from harness import Server, Upstream  # noqa: E402


@pytest.fixture
def make_server(tmp_path):
    """make_server(*options, **keywords) -> a started Server on a fresh directory (or on `directory=`)."""
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
