"""Our client and devpi-client take turns in one client directory: what one has written, the other goes on with."""

import json
import stat

import pytest

from client import CERTIFICATE, Client
from clients import Clients, Devpi
from harness import sdist, wheel


class Person:
    """One home and one client directory: `ours` and `theirs` are the two clients in it."""

    def __init__(self, home):
        clients = Clients(home)
        self.directory = home / ".devpi" / "client"
        self.theirs = Devpi(clients, self.directory)
        self.ours = Client(home)
        self.ours.environment = dict(clients.environment, TERM="dumb")
        self.home, self.save = home, clients.save

    def both(self):
        """(a client that writes, a client that reads) in both roles."""
        return [(self.ours, self.theirs), (self.theirs, self.ours)]

    def files(self):
        return {path.name: path.read_bytes() for path in self.directory.iterdir()}


@pytest.fixture
def person(tmp_path):
    return Person(tmp_path / "home")


@pytest.fixture
def index(world):
    return world.new_index("dana")


def current(printed):
    """The line on the server or index and the login, of what `use` prints."""
    (line,) = [line for line in printed.splitlines() if line.startswith(("using server: ", "current devpi index: "))]
    return line


def test_server_index_and_login_are_the_same_for_both(person, world, index):
    other = world.new_index("dana")
    for writer, reader in person.both():
        writer("use", world.server.url)
        assert current(reader("use")) == current(writer("use"))
        writer("login", "dana", "--password", "pw-of-dana")
        assert current(reader("use")) == "using server: %s/ (logged in as dana)" % world.server.url
        reader("use", index)
        assert current(writer("use")) == "current devpi index: %s/%s (logged in as dana)" % (world.server.url, index)
        writer("use", other)
        assert current(reader("use")).endswith("%s (logged in as dana)" % other)
        assert stat.S_IMODE((person.directory / "auth.json").stat().st_mode) == 0o600
        assert writer("logoff") == "login information deleted\n"
        assert current(reader("use")).endswith("%s (not logged in)" % other) and reader("logoff") == "not logged in\n"


def test_several_logins_keep_their_order(person, world, index):
    passwords = {"alice": world.password, "bob": "pw-of-bob", "dana": "pw-of-dana"}
    person.ours("use", "%s/%s" % (world.server.url, index))
    for number, (user, password) in enumerate(passwords.items()):
        client = [person.ours, person.theirs][number % 2]
        client("login", user, "--password", password)
    auth = json.loads((person.directory / "auth.json").read_text())["auth"]
    assert [user for user, _ in auth[world.server.url + "/"]] == ["dana", "alice", "bob"]
    for client, other in person.both():
        client("use", "-u", "bob")
        assert current(other("use")).endswith("(logged in as bob)")
        other("use", "-u", "dana")
        assert current(client("use")).endswith("(logged in as dana)")


def test_neither_rewrites_what_the_other_has_written_without_a_reason(person, world, index):
    """Layout, order of keys and line ends are the same, to the byte."""
    for client, other in person.both():
        client("use", "%s/%s" % (world.server.url, index))
        client("login", "dana", "--password", "pw-of-dana")
        client("use", index)
        before = person.files()
        for words in (["use"], ["list"], ["index"], ["user"], ["use", "-l"]):
            other(*words)
        assert person.files() == before
        other("use", index)
        assert json.loads(person.files()["current.json"]) == json.loads(before["current.json"])


def test_what_one_uploads_the_other_lists_tests_and_removes(person, world, index):
    person.theirs("use", "%s/%s" % (world.server.url, index))
    person.theirs("login", "dana", "--password", "pw-of-dana")
    for client, other in person.both():
        archives = [wheel("turns", "1.0"), sdist("turns", "1.0"), wheel("turns", "1.1")]
        client("upload", *[person.save(archive) for archive in archives])
        for words in (["list", "turns"], ["list", "-v", "--all"]):
            assert client(*words) == other(*words)
        assert json.loads(client("getjson", "turns/1.0")) == json.loads(other("getjson", "turns/1.0"))
        assert other("remove", "-y", "turns==1.1").splitlines()[-1] == "deleting release 1.1 of turns"
        other("remove", "-y", "turns")
        assert client("list") == other("list") == ""
    assert person.ours("index").splitlines()[1:] == person.theirs("index").splitlines()[1:]
    assert person.ours("user") == person.theirs("user")


def test_settings_stay_where_the_other_looks_for_them(person, world, index):
    """The virtual environment, its own index, credentials for a front proxy, a client certificate, always-set-cfg."""
    url = world.server.url
    environment = person.home / "venv"
    (environment / "bin").mkdir(parents=True)
    (person.home / "cert.pem").write_text(CERTIFICATE)
    for client, other in person.both():
        client("use", "%s/%s" % (url, index))
        client("use", "--venv", environment)
        assert "venv for install/set commands: %s" % environment in other("use").splitlines()
        other("use", "--venv", "-")
        assert "venv for install" not in client("use")
        client("use", "--local", VIRTUAL_ENV=str(environment))
        other("use", "alice/private", VIRTUAL_ENV=str(environment))
        assert current(client("use", VIRTUAL_ENV=str(environment))).endswith("/alice/private (not logged in)")
        assert current(client("use")).endswith("/%s (not logged in)" % index)
        (environment / "devpi.json").unlink()
        client("use", "--client-cert", person.home / "cert.pem", "%s/%s" % (url, index))
        assert "Using existing client cert for '" in other("use", "%s/%s" % (url, index))
        other("use", "--client-cert=", "%s/%s" % (url, index))
        assert "Using existing client cert" not in client("use", "%s/%s" % (url, index))


def test_credentials_in_a_url_work_for_the_other(person, world):
    index = world.new_index("dana", acl_pkg_read="dana")
    world.server.upload(index, wheel("hidden", "1.0"))
    for client, other in person.both():
        client("use", world.index_url(index, user="dana", password="pw-of-dana"))
        assert other("list") == "hidden\n"
        client("use", "--delete")
        (person.directory / "auth.json").unlink()


def test_files_that_one_configured_are_changed_by_the_other(person, world, index):
    places = {"PIP_CONFIG_FILE": None, "UV_NO_CONFIG": None}
    files = [person.home / "config" / name for name in ("pip/pip.conf", "uv/uv.toml")]
    person.ours("use", "%s/%s" % (world.server.url, index))
    for client, other in person.both():
        client("use", "--set-cfg", index, **places)
        other("use", "--set-cfg", "alice/private", **places)
        texts = [file.read_text() for file in files]
        assert all(text.count("/alice/private/+simple/") == 1 and index not in text for text in texts), texts
        assert world.simple_url("alice/private") in client("use", **places)
