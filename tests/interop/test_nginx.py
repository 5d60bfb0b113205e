"""The real nginx in front, with TLS and the configuration that `gen-config nginx` prints, under /
and under /pypi/.

`make interop` installs nginx where it may; where there is none these tests are skipped, and the run
says so. """

import hashlib
import json
import os
import re
import urllib.parse
import zipfile

import pytest

from client import Client
from clients import Devpi
from harness import PROGRAM, Server, documentation, eventually, run_command, sdist, wheel
from nginx import Outside, free_port, make_certificate, needs_nginx, running_nginx

pytestmark = needs_nginx
LARGE = 200 << 20


class Site(Outside):
    """A server behind nginx, with alice and her stage `alice/dev`; `url` is what her clients are
    told."""

    def __init__(self, server, url, certificate):
        super().__init__(url, certificate)
        self.server, self.index = server, url + "/alice/dev"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module", params=["/", "/pypi/"], ids=["root", "subpath"])
def site(request, tmp_path_factory, certificate):
    folder = tmp_path_factory.mktemp("nginx")
    server = Server(folder / "server", script=PROGRAM).start()
    server.add_user("alice")
    server.add_user("pypi")             # as the path is called
    server.add_index("alice/dev")
    server.add_index("pypi/dev")
    url = "https://localhost:%d%s" % (free_port(), request.param.rstrip("/"))
    printed = run_command("gen-config", "nginx", "--port", server.port, "--outside-url", url,
                          "--tls-certificate", certificate[0], "--tls-key", certificate[1])
    assert printed.returncode == 0, printed.stderr
    (folder / "devpi_lite.conf").write_text(printed.stdout)
    try:
        with running_nginx(folder, urllib.parse.urlsplit(url).port):
            yield Site(server, url, certificate[0])
    finally:
        server.stop()


@pytest.fixture
def devpi(tmp_path, site):
    """Our client, with alice logged in through nginx on her stage."""
    devpi = Client(tmp_path / "ours")
    devpi.environment["SSL_CERT_FILE"] = str(site.certificate)
    devpi("use", site.index)
    devpi("login", "alice", "--password", "pw")
    return devpi


def test_the_tools_publish_through_it_and_install_what_was_published(site, clients):
    for publisher, archive in (("twine", wheel("by-twine", "1.0")), ("uv", sdist("by-uv", "1.0"))):
        clients.publish(publisher, site.index + "/", archive, "alice", "pw", **site.trust)
    clients.publish("uv", site.index + "/", wheel("by-uv", "1.0"), "alice", "pw", **site.trust)
    for installer in ("pip", "uv"):
        found = clients.install(
            installer, site.index + "/+simple/", "by-twine", "by-uv", **site.trust
        )
        assert found == {"by-twine": "1.0", "by-uv": "1.0"}


def test_without_the_certificate_nothing_is_believed(site, devpi, clients):
    assert "SSL verification failed" in devpi("use", site.url, expect=1, SSL_CERT_FILE=None)
    assert (
        "certificate"
        in clients.install(
            "pip", site.index + "/+simple/", "none", expect=None, PIP_RETRIES="0"
        ).lower()
    )


def test_200_megabytes_go_up_and_come_down(site, devpi, tmp_path):
    path = devpi.save(wheel("large", "1.0"))
    with (
        zipfile.ZipFile(str(path), "a", zipfile.ZIP_STORED) as archive,
        archive.open("large/data.bin", "w") as member,
    ):
        for _ in range(LARGE >> 20):
            member.write(os.urandom(1 << 20))
    devpi("upload", path, timeout=600)
    (file,) = site.server.simple("alice/dev", "large")["files"]
    assert file["size"] == path.stat().st_size > LARGE
    place = urllib.parse.urljoin("%s/+simple/large/" % site.index, file["url"])
    assert place.startswith(site.index + "/+f/")
    status, _, body = site.get(place[len(site.url):])
    assert status == 200 and hashlib.sha256(body).hexdigest() == file["hashes"]["sha256"]


def test_documentation_is_read_under_the_outside_url(site, devpi):
    devpi("upload", devpi.save(sdist("manual", "1.0")))
    devpi("upload", devpi.save(documentation("manual", "1.0", "<p>how to")))
    status, _, body = site.get("/alice/dev/manual/1.0/+doc/index.html?raw", Accept="text/html")
    assert (status, body) == (200, b"<p>how to")
    status, headers, body = site.get("/alice/dev/manual/1.0/+doc/?raw", Accept="text/html")
    if status == 302:
        assert urllib.parse.urljoin(site.index, headers["Location"]).startswith(
            site.index + "/manual/"
        ), headers["Location"]


def test_our_client_works_through_it(site, devpi):
    assert devpi.state()["simpleindex"] == site.index + "/+simple/"
    devpi("upload", devpi.save(wheel("mine", "1.0")))
    assert site.index + "/+f/" in devpi("list", "mine")
    devpi("index", "-c", "prod%d" % len(site.server.get("/alice").result["indexes"]))
    assert devpi("getjson", site.index).json()["result"]["type"] == "stage"


def test_devpis_client_works_through_it(site, clients, tmp_path):
    clients.environment.update(site.trust)
    devpi = Devpi(clients, tmp_path / "theirs")
    devpi("use", site.index)
    devpi("login", "alice", "--password", "pw")
    assert devpi.state()["simpleindex"] == site.index + "/+simple/"
    devpi("upload", clients.save(wheel("theirs", "1.0")))
    assert site.index + "/+f/" in devpi("list", "theirs")


def test_the_clients_address_and_our_links_come_through(site):
    site.get("/+api?from=elsewhere", source="127.0.0.2")
    line = eventually(
        lambda: [
            line for line in site.server.output().splitlines() if "+api?from=elsewhere" in line
        ]
    )[0]
    assert line.endswith(" 127.0.0.2"), line
    for headers in (
        {},
        {"Host": "pypi.example.org"},
    ):  # a server on loopback would not answer to that itself
        assert (
            json.loads(site.get("/+api", **headers)[2])["result"]["login"] == site.url + "/+login"
        )
    status, headers, _ = site.get("/alice/dev/+simple/By_Twine/", Accept="text/html")
    assert (
        status == 302
        and urllib.parse.urljoin(site.url, headers["Location"]) == site.index + "/+simple/by-twine/"
    )


def test_a_user_called_like_the_path_is_found(site):
    assert json.loads(site.get("/pypi/dev")[2])["result"]["type"] == "stage"
    assert json.loads(site.get("/pypi")[2])["result"]["username"] == "pypi"


def test_what_is_not_below_the_path_is_not_ours(site):
    if urllib.parse.urlsplit(site.url).path:
        parts = urllib.parse.urlsplit(site.url)
        assert (
            Site(site.server, "https://%s" % parts.netloc, site.certificate).get("/alice/dev")[0]
            == 404
        )


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="no list of sockets here")
def test_the_server_is_asked_on_connections_that_stay(site):
    """As `proxy_http_version` and the upstream's `keepalive` have it."""
    def to_server():
        with open("/proc/net/tcp") as file:
            return set(re.findall(r": (\S+) \S+:%04X " % site.server.port, file.read()))

    assert site.get("/+api")[0] == 200
    before = to_server()
    for _ in range(10):
        assert site.get("/+api")[0] == 200
    assert len(to_server() - before) < 3
