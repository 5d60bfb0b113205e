"""The real nginx as balancer in front of a primary and two replicas: what the manual says to type.

Each test goes on where the one before it has left off; they run in the order in which they stand
here.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import threading

import pytest

from client import Client
from clients import Clients, Devpi
from harness import PROGRAM, Server, eventually, path_of, run_command, sdist, wheel
from nginx import NGINX, Outside, free_port, make_certificate, needs_nginx, running_nginx
from replicas import in_sync, status

pytestmark = [needs_nginx, pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")]
MANUAL = run_command("help", "replicas").stdout
# the servers and the address of the example, and where its files lie
SERVERS, OUTSIDE = "10.0.0.1:3141,10.0.0.2:3141,10.0.0.3:3141", "https://packages.example.org"
HAD, MISSED = wheel("had", "1.0"), wheel("missed", "1.0")
FILE = "/etc/nginx/conf.d/devpi_lite.conf"


def typed(beginning):
    """The block of code in the manual that begins so."""
    match = re.search(r"(?ms)^```sh\n(%s.*?)^```$" % re.escape(beginning), MANUAL)
    assert match, beginning
    return match[1]


class Site(Outside):
    """Three servers behind nginx, which reads the file `conf`."""

    def __init__(self, folder, url, certificate):
        super().__init__(url, certificate)
        self.folder, self.conf = folder, folder / "devpi_lite.conf"
        self.primary = self.server("primary", "--role", "primary", root_password="rootpw").start()
        self.primary.add_user("alice")
        self.primary.add_index("alice/dev")
        self.primary.add_index("alice/cold")        # its files come when they are asked for
        self.secret = self.primary.directory / ".secret"
        self.one, self.two = (self.replica(name, self.primary).start() for name in ("one", "two"))
        self.index = url + "/alice/dev"
        self.installs = 0

    def server(self, name, *options, port=None, **keywords):
        return Server(self.folder / name, *options, "--port", str(port or free_port()),
                      **dict({"script": PROGRAM, "root_password": None}, **keywords))

    def replica(self, name, primary, port=None):
        return self.server(name, "--primary-url", primary.url, "--secretfile", self.secret,
                           "--file-replication-skip-indexes", "alice/cold", port=port)

    @property
    def servers(self):
        return self.primary, self.one, self.two

    def configure(self, certificate, key):
        """Write what the command in the manual prints."""
        command = typed("python devpi_lite.py gen-config nginx --servers").partition(">")[0]
        words = shlex.split(command.replace("\\\n", " "))
        addresses = ",".join("127.0.0.1:%d" % server.port for server in self.servers)
        replaced = {SERVERS: addresses, OUTSIDE: self.url}
        printed = run_command(*(replaced.pop(word, word) for word in words[2:]),
                              "--tls-certificate", certificate, "--tls-key", key)
        assert printed.returncode == 0 and not replaced, (printed, replaced)
        self.conf.write_text(printed.stdout)

    def promote_in_nginx(self, server):
        """Change the one line, and have nginx read it."""
        text, changes = re.subn(r"(upstream devpi_lite_primary \{\n    server )[^;]*",
                                r"\g<1>127.0.0.1:%d" % server.port, self.conf.read_text())
        assert changes == 1
        self.conf.write_text(text)
        self.nginx("-s", "reload")

    def nginx(self, *words):
        subprocess.run([NGINX, "-p", str(self.folder), "-c", str(self.folder / "main.conf"), *words],
                       check=True, stderr=subprocess.DEVNULL)

    def check(self):
        """Run the check of the manual once."""
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        command = folder / "nginx"
        command.write_text("#!/bin/sh\nexec %s -p %s -c %s \"$@\" 2>/dev/null\n" % tuple(map(shlex.quote, (
            NGINX, str(self.folder), str(self.folder / "main.conf")))))
        command.chmod(0o755)
        script = typed("#!/bin/sh")
        assert FILE in script
        (folder / "check").write_text(script.replace(FILE, str(self.conf)))
        subprocess.run(["sh", str(folder / "check")], check=True, stdin=subprocess.DEVNULL,
                       env=dict(os.environ, PATH="%s:%s" % (folder, os.environ["PATH"])))

    def down(self):
        """Ports of the servers that nginx was told to pass over."""
        return [int(port) for port in re.findall(r":(\d+) max_fails=0 down;", self.conf.read_text())]

    def readers(self, requests=12):
        """Who answered these requests."""
        return {self.get("/+api")[1]["X-DEVPI-UUID"] for _ in range(requests)}

    def installed(self, *requirements, installer="pip", **options):
        self.installs += 1
        person = Clients(self.folder / ("person-%d" % self.installs))
        return person.install(installer, self.index + "/+simple/", *requirements, **options, **self.trust)

    @contextlib.contextmanager
    def visitors(self, path, count=3):
        """People who read this path without a pause: yields the statuses that they got."""
        statuses, over = [], threading.Event()

        def visit():
            while not over.is_set():
                try:
                    statuses.append(self.get(path)[0])
                except OSError as error:
                    statuses.append(repr(error))

        threads = [threading.Thread(target=visit) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            eventually(lambda: len(statuses) > 20)
            yield statuses
        finally:
            over.set()
            for thread in threads:
                thread.join()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("balancer")
    port = free_port()
    certificate, key = make_certificate(tmp_path_factory.mktemp("tls"))
    site = Site(folder, "https://localhost:%d" % port, certificate)
    try:
        site.configure(certificate, key)
        with running_nginx(folder, port):
            yield site
    finally:
        for server in site.servers:
            if server.running:
                server.kill()


@pytest.fixture
def clients(site, tmp_path):
    clients = Clients(tmp_path / "home")
    clients.environment.update(site.trust)
    return clients


def in_step(site):
    """Returns when the replicas know all changes; files may be missing."""
    eventually(lambda: len({status(server)["serial"] for server in site.servers}) == 1)


def posts(server):
    return server.whole_output().count(" POST /alice/dev/ ")


def test_01_all_are_read_from_and_changes_go_to_the_primary(site, clients):
    in_sync(*site.servers)
    uuids = [status(server)["uuid"] for server in site.servers]
    assert site.readers() == set(uuids)
    clients.publish("twine", site.index + "/", wheel("by-twine", "1.0"), "alice", "pw")
    clients.publish("uv", site.index + "/", sdist("by-uv", "1.0"), "alice", "pw")
    assert [posts(server) for server in site.servers] == [2, 0, 0]
    in_sync(*site.servers)
    for installer in ("pip", "uv"):
        assert site.installed("by-twine", "by-uv", installer=installer) == {
            "by-twine": "1.0", "by-uv": "1.0"}
    for method, body in (("PUT", b"{}"), ("PATCH", b'["title=x"]'), ("DELETE", None)):
        reply = site.request(method, "/alice/other", body, **{"X-Devpi-Auth": "none"})
        assert reply[0] >= 400 and reply[1]["X-DEVPI-UUID"] == uuids[0], method


def test_02_each_server_knows_the_address_outside_and_the_client(site):
    for _ in site.servers * 2:
        assert json.loads(site.get("/+api")[2])["result"]["login"] == site.url + "/+login"
    for number in range(3):
        site.get("/+api?number=%d" % number, source="127.0.0.2")
    lines = [line for server in site.servers for line in server.whole_output().splitlines()
             if "+api?number=" in line]
    assert len(lines) == 3 and all(line.endswith(" 127.0.0.2") for line in lines), lines


def test_03_the_devpi_clients_work_through_it(site, clients, tmp_path):
    theirs = Devpi(clients, tmp_path / "theirs")
    ours = Client(tmp_path / "ours")
    ours.environment["SSL_CERT_FILE"] = str(site.certificate)
    for devpi, archive in ((theirs, wheel("theirs", "1.0")), (ours, wheel("ours", "1.0"))):
        devpi("use", site.index)
        devpi("login", "alice", "--password", "pw")
        devpi("upload", clients.save(archive))
        in_sync(*site.servers)
        assert site.index + "/+f/" in devpi("list", archive.name)


def test_04_our_client_finds_what_it_has_just_changed(site, tmp_path):
    ours = Client(tmp_path / "ours")
    ours.environment["SSL_CERT_FILE"] = str(site.certificate)
    ours("use", site.index)
    ours("login", "alice", "--password", "pw")
    for number in range(6):
        archive = wheel("mine", "%d.0" % number)
        ours("upload", ours.save(archive))
        assert "/" + archive.filename in ours("list", "mine")


def test_05_replication_is_asked_of_the_primary(site):
    """So that a replica may be given this address."""
    for _ in range(4):
        reply = site.get("/+repl/v1/log?after=-1&hash=&wait=0")
        assert (reply[0], reply[1]["X-DEVPI-UUID"]) == (401, status(site.primary)["uuid"])


def test_06_nobody_notices_that_a_replica_dies(site):
    with site.visitors("/alice/dev/+simple/by-twine/") as statuses:
        for number in range(4):
            if number == 1:
                site.two.kill()
            assert site.installed("by-twine", "by-uv", installer=["pip", "uv"][number % 2]) == {
                "by-twine": "1.0", "by-uv": "1.0"}
    assert set(statuses) == {200}, set(statuses)
    print("\n%d pages read while a replica died" % len(statuses))


def test_07_the_check_takes_it_out_and_in_again(site):
    site.check()
    assert site.down() == [site.two.port]
    before = site.conf.stat().st_mtime_ns
    site.check()
    assert site.conf.stat().st_mtime_ns == before, "nothing has changed"
    site.two.start()
    in_sync(*site.servers)
    site.check()
    assert site.down() == []
    eventually(lambda: len(site.readers()) == 3)


def test_08_the_primary_dies_and_reads_go_on(site, clients):
    for archive in (HAD, MISSED):
        assert site.primary.upload("alice/cold", archive).status == 200
    in_step(site)
    assert site.one.get(path_of(HAD, "alice/cold"), headers={"Accept": "*/*"}).status == 200
    with site.visitors("/alice/dev/+simple/by-twine/") as statuses:
        site.primary.kill()
        assert site.installed("by-twine", "by-uv", installer="uv") == {
            "by-twine": "1.0", "by-uv": "1.0"}
    assert set(statuses) == {200}, set(statuses)
    printed = clients.publish("twine", site.index + "/", wheel("later", "1.0"), "alice", "pw",
                              expect=None)
    assert "502 Bad Gateway" in printed


def test_09_a_file_is_had_from_the_one_that_has_it_and_one_that_none_has_harms_nobody(site):
    for _ in range(6):
        assert site.get(path_of(HAD, "alice/cold"))[::2] == (200, HAD.content)
        # the last one that is asked has the word, and that may be the primary, who is not there
        assert site.get(path_of(MISSED, "alice/cold"))[0] in (502, 503)
    assert {site.get("/+api")[0] for _ in range(9)} == {200}
    site.check()
    assert site.down() == [site.primary.port]
    assert len(site.readers()) == 2
    # a moment later nginx has read it
    eventually(lambda: {site.get(path_of(MISSED, "alice/cold"))[0] for _ in range(6)} == {503})
    reply = site.get(path_of(MISSED, "alice/cold"))
    assert reply[1]["Retry-After"] and MISSED.filename in reply[2].decode()


def test_10_one_line_and_changes_go_to_the_promoted_one(site, clients):
    site.one.stop()
    # the file that none of the two has
    refused = run_command("promote", "--force", "--serverdir", site.one.directory)
    assert refused.returncode == 1 and "1 file" in refused.stderr, refused
    promoted = run_command("promote", "--force", "--accept-loss", "--serverdir", site.one.directory)
    assert promoted.returncode == 0, promoted
    site.one = site.server("one", "--secretfile", site.secret, port=site.one.port).start()
    site.two.stop()
    site.two = site.replica("two", site.one, port=site.two.port).start()
    in_sync(site.one, site.two)
    with site.visitors("/alice/dev/+simple/by-twine/") as statuses:
        site.promote_in_nginx(site.one)

        def later():
            clients.publish("twine", site.index + "/", wheel("later", "1.0"), "alice", "pw")
            return True

        eventually(later)
    assert set(statuses) == {200}, set(statuses)
    assert posts(site.one) == 1
    in_sync(site.one, site.two)
    assert site.installed("later") == {"later": "1.0"}
    assert site.readers() == {status(server)["uuid"] for server in (site.one, site.two)}


def test_11_the_old_primary_is_not_read_from_when_it_comes_back(site):
    """It may have changes that nobody else has, so it is not ready."""
    site.primary.start()
    eventually(lambda: status(site.primary)["fenced"], seconds=60)
    site.check()
    assert site.down() == [site.primary.port]
    assert site.readers() == {status(server)["uuid"] for server in (site.one, site.two)}
    site.primary.stop()
    resync = run_command("resync", "--primary-url", site.one.url, "--serverdir", site.primary.directory)
    assert resync.returncode == 0, resync
    site.primary = site.replica("primary", site.one, port=site.primary.port).start()
    in_sync(site.one, site.two, site.primary)
    site.check()
    assert site.down() == []
    eventually(lambda: len(site.readers()) == 3)


def test_12_where_none_is_ready_nginx_goes_on_asking_all(site):
    for server in site.servers:
        server.kill()
    site.check()
    assert site.down() == []
    assert site.get("/+api")[0] == 502
    site.two.start()
    site.check()
    assert sorted(site.down()) == sorted([site.primary.port, site.one.port])
    eventually(lambda: site.get("/+api")[0] == 200)
