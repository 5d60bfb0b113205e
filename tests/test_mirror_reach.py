"""Where mirrors may go: their pages and redirects lead neither to this machine nor from https to http."""

import os
import urllib.parse

import pytest

import devpi_lite as d
from harness import Server, get, page, patched, wheel
from scripted import Scripted, asked, link_to, mirror, publish_at

# Names that lead to this machine, as anybody's name server may say.
NAMES = """
import socket
real = socket.getaddrinfo

def look_up(host, *arguments, **options):
    return real("127.0.0.1" if str(host).endswith(".example") else host, *arguments, **options)
socket.getaddrinfo = look_up
"""
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


def made_server(folder, *options):
    server = Server(folder / "data", "--request-timeout", 30, *options)
    server.script = patched(folder, NAMES)
    server.start()
    server.add_user("mia")
    return server


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory):
    server = made_server(tmp_path_factory.mktemp("reach"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def allowing(tmp_path_factory):
    """A server whose operator named the hosts that mirrors may ask."""
    server = made_server(tmp_path_factory.mktemp("allowing"), "--upstream-allow", "127.0.0.1,good*.example")
    yield server
    server.stop()


@pytest.fixture
def inner():
    """A service of this machine that nobody from outside should reach."""
    inner = Scripted()
    inner.answers["/secret"] = b"a key"
    yield inner
    inner.stop()


def at(url, host):
    return url.replace("127.0.0.1", host)


SPELLINGS = ("127.0.0.1", "localhost", "127.1", "0.0.0.0", "[::ffff:127.0.0.1]", "evil.example")


def named_file(upstream, url, project="demo"):
    """Puts a page on upstream that names this URL for a file; returns the file's name."""
    upstream.page(project, {"filename": "demo-1.0.tar.gz", "url": url, "hashes": {}})
    return "demo-1.0.tar.gz"


@pytest.mark.parametrize("host", SPELLINGS)
def test_a_page_does_not_lead_to_this_machine(mirrors, scripted, inner, host):
    filename = named_file(scripted, at(inner.host_url, host) + "/secret")
    index = mirror(mirrors, scripted.url)
    reply = get(mirrors, link_to(mirrors, index, filename))
    assert reply.status == 502 and "--upstream-allow" in reply.text and "/secret" in reply.text
    head = mirrors.request("HEAD", link_to(mirrors, index, filename), headers={"Accept": "*/*"})
    assert (head.status, inner.requests) == (502, [])


@pytest.mark.parametrize("host", ("127.0.0.1", "evil.example"))
@pytest.mark.parametrize("what", ("file", "page", "metadata", "list"))
def test_a_redirect_does_not_lead_to_this_machine(mirrors, scripted, inner, what, host):
    archive = wheel("demo", "1.0", summary=os.urandom(8).hex())
    path = publish_at(scripted, archive, **{"core-metadata": True} if what == "metadata" else {})
    index = mirror(mirrors, scripted.url)
    redirected = {"file": path, "page": "/simple/other/", "metadata": path + ".metadata", "list": "/simple/"}[what]
    scripted.answers[redirected] = lambda handler: handler.reply(
        b"", status=302, Location=at(inner.host_url, host) + "/secret")
    if what == "metadata":
        get(mirrors, link_to(mirrors, index, archive.filename) + ".metadata")
    elif what == "file":
        assert get(mirrors, link_to(mirrors, index, archive.filename)).status == 502
    else:
        path = "/%s/+simple/" % index + ("other/" if what == "page" else "")
        assert get(mirrors, path).status == 502
    assert asked(scripted, redirected) and inner.requests == []


def test_a_name_that_is_turned_to_this_machine_does_not_help(mirrors, scripted):
    """The mirror_url has the same name: but it may have led elsewhere when the page came."""
    scripted.answers["/secret"] = b"a key"
    filename = named_file(scripted, at(scripted.host_url, "evil.example") + "/secret")
    index = mirror(mirrors, at(scripted.url, "evil.example"))
    assert get(mirrors, link_to(mirrors, index, filename)).status == 502
    assert asked(scripted, "/secret") == []


def test_a_connection_that_another_mirror_left_open_is_not_gone_through(mirrors, scripted, inner):
    inner.page("own", {"filename": "own-1.0.tar.gz", "url": "/secret", "hashes": {}})
    theirs = mirror(mirrors, inner.url)
    assert get(mirrors, link_to(mirrors, theirs, "own-1.0.tar.gz", "own")).body == b"a key"
    before = len(inner.requests)
    filename = named_file(scripted, inner.host_url + "/secret")
    assert get(mirrors, link_to(mirrors, mirror(mirrors, scripted.url), filename)).status == 502
    assert len(inner.requests) == before


@pytest.mark.parametrize("host", ("127.0.0.1", "localhost"))
def test_a_mirror_of_this_machine_has_its_files_there(mirrors, scripted, host):
    scripted.answers["/files/x"] = lambda handler: handler.reply(b"", status=302, Location="/files/y")
    scripted.answers["/files/y"] = b"content"
    filename = named_file(scripted, at(scripted.host_url, "127.0.0.1") + "/files/x")
    index = mirror(mirrors, at(scripted.url, host))
    assert get(mirrors, link_to(mirrors, index, filename)).body == b"content"


# -- named hosts


@pytest.mark.parametrize("redirected", (False, True))
def test_files_of_other_hosts_that_are_named_are_served(allowing, scripted, inner, redirected):
    secret = inner.host_url + "/secret"
    scripted.answers["/files/x"] = lambda handler: handler.reply(b"", status=302, Location=secret)
    filename = named_file(scripted, "/files/x" if redirected else secret)
    for host in ("127.0.0.1", "good1.example"):
        index = mirror(allowing, at(scripted.url, host))
        reply = get(allowing, link_to(allowing, index, filename))
        assert reply.body == b"a key", reply


def test_only_named_hosts_are_asked(allowing, scripted, inner):
    elsewhere = {"mirror_url": at(scripted.url, "evil.example")}
    reply = allowing.put("/mia/no", dict(elsewhere, type="mirror"), user="mia")
    assert reply.status == 400 and "--upstream-allow" in reply.json()["message"]
    index = mirror(allowing, scripted.url)
    reply = allowing.patch("/" + index, elsewhere, user="mia")
    assert reply.status == 400
    filename = named_file(scripted, at(inner.host_url, "evil.example") + "/secret")
    scripted.answers["/simple/other/"] = scripted.answers["/simple/"] = lambda handler: handler.reply(
        b"", status=302, Location=at(inner.host_url, "evil.example") + "/")
    assert get(allowing, link_to(allowing, index, filename)).status == 502
    assert page(allowing, index, "other").status == 502
    get(allowing, "/%s/+simple/" % index)
    assert asked(scripted, "/simple/")
    assert inner.requests == []


# -- the client alone


def made(**settings):
    return d.UpstreamClient(d.Settings("", **settings))


def test_nothing_leads_from_https_to_http():
    home = "https://ex.org/simple/"
    for before in (home, "https://cdn.ex.org/a"):
        with pytest.raises(d.UpstreamTrouble, match="plain http"):
            made()._check_step(before, "http://cdn.ex.org/file", home)
    made()._check_step(home, "https://cdn.ex.org/file", home)
    made()._check_step("http://ex.org/simple/", "http://cdn.ex.org/file", "http://ex.org/simple/")
    made(upstream_allow=("*.ex.org",))._check_step(home, "http://cdn.ex.org/file", home)


@pytest.mark.parametrize("address, near", (
    ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True),
    ("0.0.0.0", True), ("::", True), ("169.254.169.254", True), ("fe80::1%eth0", True),
    ("::ffff:169.254.169.254", True), ("10.0.0.1", False), ("192.168.1.1", False),
    ("172.16.0.1", False), ("fd00::1", False), ("93.184.216.34", False), ("2001:db8::1", False)))
def test_near_addresses(address, near):
    assert d.is_near(address) is near


@pytest.mark.parametrize("url, other, same", (
    ("http://127.0.0.1:81/x", "http://127.0.0.1:81/", True),
    ("http://127.0.0.1:81/x", "http://localhost:81/", True),
    ("http://127.0.0.1:82/x", "http://127.0.0.1:81/", False),
    ("http://169.254.1.1/x", "http://169.254.1.1/", True),
    ("http://169.254.1.1/x", "http://127.0.0.1/", False),
    ("http://a.org/x", "http://a.org/", False)))
def test_the_same_place(url, other, same):
    assert d.is_same_place(url, other) is same


@pytest.mark.parametrize("allowed", (None, ("169.254.*",)))
def test_posts_go_to_no_link_local_address_unless_it_is_named(monkeypatch, allowed):
    went = []

    def connect(address, timeout, *_):
        went.append(address[0])
        raise ConnectionRefusedError("nobody there")
    monkeypatch.setattr(d.socket, "create_connection", connect)
    for settings in ({"webhook_allow": allowed}, {"push_allow": allowed}):
        for url in ("http://169.254.169.254/latest/", "http://127.0.0.1:9/"):
            with pytest.raises(d.UpstreamTrouble):
                made(**settings).post(url, {}, [b""], 0, 1)
    assert went == (["127.0.0.1"] * 2 if allowed is None else ["169.254.169.254", "127.0.0.1"] * 2)


@pytest.mark.parametrize("environment, url, proxy", (
    ({"all_proxy": "http://p:1"}, "http://ex.org/", "http://p:1"),
    ({"all_proxy": "http://p:1"}, "https://ex.org/", "http://p:1"),
    ({"ALL_PROXY": "http://p:1", "all_proxy": ""}, "http://ex.org/", "http://p:1"),
    ({"ALL_PROXY": "http://p:1", "all_proxy": "http://p:2"}, "http://ex.org/", "http://p:2"),
    ({"all_proxy": "http://p:1", "https_proxy": "p:2"}, "https://ex.org/", "http://p:2"),
    ({"all_proxy": "http://p:1", "no_proxy": "ex.org"}, "http://ex.org/", None),
    ({"http_proxy": "http://p:1", "no_proxy": "ex.org:8080"}, "http://ex.org:8080/", None),
    ({"http_proxy": "http://p:1", "no_proxy": "ex.org:8080"}, "http://ex.org/", "http://p:1"),
    ({"http_proxy": "http://p:1", "no_proxy": "ex.org:80"}, "http://ex.org/", None),
    ({"http_proxy": "http://p:1", "no_proxy": ".ex.org"}, "http://a.ex.org/", None),
    ({"http_proxy": "http://p:1", "no_proxy": "a, 10.1.0.0/16"}, "http://10.1.2.3/", None),
    ({"http_proxy": "http://p:1", "no_proxy": "a, 10.1.0.0/16"}, "http://10.2.2.3/", "http://p:1"),
    ({"http_proxy": "http://p:1", "no_proxy": "10.1.2.3:81"}, "http://10.1.2.3:81/", None),
    ({"http_proxy": "http://p:1", "no_proxy": "fd00::/8"}, "http://[fd00::1]:80/", None),
    ({"http_proxy": "http://p:1", "no_proxy": "[::1]"}, "http://[::1]/", None),
    ({"http_proxy": "http://p:1", "no_proxy": "*"}, "http://[::1]/", None)))
def test_proxies_of_the_environment(monkeypatch, environment, url, proxy):
    for name in PROXIES:
        for spelling in (name, name.upper()):
            monkeypatch.delenv(spelling, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(d.urllib.request, "getproxies", d.urllib.request.getproxies_environment)
    assert made()._proxy(urllib.parse.urlsplit(url)) == proxy


@pytest.mark.parametrize("kind", ("socks5", "SOCKS5H", "socks4a"))
def test_a_socks_proxy_is_named_in_the_error(monkeypatch, kind):
    monkeypatch.setenv("all_proxy", kind + "://me:secret@p:1")
    for name in ("http_proxy", "no_proxy", "HTTP_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    client = made()
    with pytest.raises(d.UpstreamTrouble, match="SOCKS") as error:
        client.get("http://ex.org/", {})
    assert "ex.org" in error.value.message and "secret" not in error.value.message
    assert not client.is_paused("http://ex.org/")


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch):
    """It may run here, too."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    client = made()
    for host in ("127.0.0.1", "localhost", "169.254.169.254", "[::1]"):
        with pytest.raises(d.UpstreamTrouble):
            client.get("http://%s/x" % host, {}, mirror_url="http://ex.org/simple/")
