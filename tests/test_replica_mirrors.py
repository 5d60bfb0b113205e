"""Mirror indexes on a replica: the primary's index of the same name is their upstream."""

import os
import re
import time
import urllib.parse

import pytest

from harness import Server, eventually, get, patched, serial, user_pass
from replicas import Between
from scripted import link_to, mirror
from archives import wheel


def small(version="1.0"):
    return wheel("demo", version, summary=os.urandom(8).hex())


# a replica that reaches its primary alone, and says so if it tries another server
ALONE = """
import socket
from urllib.parse import urlsplit
connect = socket.create_connection
def to_the_primary(address, *arguments, **options):
    if address[1] != urlsplit(sys.argv[sys.argv.index("--primary-url") + 1]).port:
        print("STRAY CONNECTION to", address, flush=True)
        raise OSError("that is not reached from here")
    return connect(address, *arguments, **options)
socket.create_connection = to_the_primary
"""


def follow(primary, folder, *options, url=None):
    """A running replica of a primary, that has all of its rows, and reaches nobody else."""
    script = folder.parent / (folder.name + "-script")
    script.mkdir()
    replica = Server(
        folder, "--primary-url", url or primary.url.rstrip("/"), "--secretfile", primary.directory / ".secret",
        "--request-timeout", 5, *options, root_password=None, script=patched(script, ALONE)).start()
    replica.passwords.update(primary.passwords)
    return replica


def caught_up(primary, replica):
    eventually(lambda: serial(replica) == serial(primary))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A primary and its replica."""
    folder = tmp_path_factory.mktemp("pair")
    primary = Server(folder / "p", "--role", "primary", "--request-timeout", 5).start()
    primary.add_user("mia")
    replica = follow(primary, folder / "r")
    replica.passwords = primary.passwords
    yield primary, replica
    assert "STRAY" not in replica.whole_output()
    replica.stop()
    primary.stop()


@pytest.fixture
def own(tmp_path):
    """A pair of the test's own, to stop."""
    primary = Server(tmp_path / "p", "--role", "primary", "--request-timeout", 5).start()
    primary.add_user("mia")
    replica = follow(primary, tmp_path / "r")
    yield primary, replica
    assert "STRAY" not in replica.whole_output()
    for server in (replica, primary):
        if server.running:
            server.kill()


def asked(primary, method, path):
    """How often that came to the primary."""
    return len(re.findall(r"(?m)\] %s %s [0-9]{3} " % (method, re.escape(path)), urllib.parse.unquote(primary.whole_output())))


def new_mirror(pair, url, **config):
    index = mirror(pair[0], url, **config)
    caught_up(*pair)
    return index


@pytest.mark.parametrize("kind", ["sha256", None])
def test_file_has_the_same_path_and_bytes_on_both(pair, upstream, kind):
    primary, replica = pair
    archive = upstream.publish(small(), hash=kind)
    index = new_mirror(pair, upstream.url)
    path = link_to(replica, index, archive.filename)
    assert ("/+e/" in path) == (kind is None)
    assert get(replica, path).body == archive.content
    assert path == link_to(primary, index, archive.filename)
    assert get(primary, path).body == archive.content
    assert upstream.count("*.whl") == 1, "the replica asks the primary alone"
    assert link_to(replica, index, archive.filename) == path
    # the page by the replica and by this test; the file likewise
    assert asked(primary, "GET", "/%s/+simple/demo/" % index) == 2
    assert asked(primary, "GET", path) == 2


def test_a_file_of_a_page_that_is_being_stored_needs_no_second_page(own, tmp_path, upstream):
    primary, replica = own
    replica.stop()
    replica.script = patched(tmp_path, ALONE + """
import time
devpi_lite.Limits.entries_at_once = 1       # so that every page of more than one file is a long one
store_page = devpi_lite._store_page

def store_later(*args):
    time.sleep(1)
    return store_page(*args)

devpi_lite._store_page = store_later
""")
    replica.start()
    upstream.publish("demo", "0.9")
    archive = upstream.publish(small())
    index = new_mirror(own, upstream.url)
    assert get(replica, link_to(replica, index, archive.filename)).body == archive.content
    assert asked(primary, "GET", "/%s/+simple/demo/" % index) == 1


def test_path_from_the_primary_is_found_without_a_page(pair, upstream):
    primary, replica = pair
    archive = upstream.publish(small())
    index = new_mirror(pair, upstream.url)
    path = link_to(primary, index, archive.filename)
    pages = asked(primary, "GET", "/%s/+simple/demo/" % index)
    assert get(replica, path).body == archive.content
    assert asked(primary, "GET", "/%s/+simple/demo/" % index) == pages + 1
    assert get(replica, path).body == archive.content
    assert asked(primary, "GET", path) == 1, "it is kept"
    assert get(replica, path.replace("/demo-1.0", "/demo-7.0")).status == 404


def test_project_list_and_metadata_come_from_the_primary(pair, upstream):
    primary, replica = pair
    archive = upstream.publish(small())
    index = new_mirror(pair, upstream.url)
    assert [p["name"] for p in replica.get(
        "/%s/+simple/" % index, headers={"Accept": "application/vnd.pypi.simple.v1+json"}).json()["projects"]] == ["demo"]
    path = link_to(replica, index, archive.filename) + ".metadata"
    assert get(replica, path).body != b""
    assert asked(primary, "GET", "/%s/+simple/" % index) == 1
    assert asked(primary, "GET", path) == 1
    assert get(replica, path).body == get(primary, path).body


def test_restricted_mirror_is_read_by_the_replica_and_by_nobody_else(pair, upstream):
    primary, replica = pair
    archive = upstream.publish(small())
    index = new_mirror(pair, upstream.url, acl_pkg_read=["mia"])
    page = replica.get("/%s/+simple/demo/" % index, user="mia", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    path = urllib.parse.urljoin("/%s/+simple/demo/" % index, page.json()["files"][0]["url"])
    assert replica.get(path, user="mia", headers={"Accept": "*/*"}).body == archive.content
    for each in (path, "/%s/+simple/demo/" % index):
        assert asked(primary, "GET", each) == 1
    for server in pair:
        for place in (path, "/%s/+simple/demo/" % index):
            assert get(server, place).status in (401, 403)
            forged = "Devpi-Replica id=%s,term=1,ts=1,nonce=%s,mac=%s" % ("0" * 32, "0" * 32, "0" * 64)
            assert get(server, place, Authorization=forged).status in (401, 403)


def test_credentials_of_mirror_url_stay_with_upstream(pair, upstream):
    primary, replica = pair
    archive = upstream.publish(small())
    upstream.credentials = ("joe", "pass")
    index = new_mirror(pair, upstream.url.replace("://", "://joe:pass@"))
    path = link_to(replica, index, archive.filename)
    assert get(replica, path).body == archive.content
    authorizations = {headers.get("Authorization") for _, _, headers in upstream.requests}
    assert authorizations == {"Basic " + user_pass("joe", "pass")}, "all came from the primary"
    assert asked(primary, "GET", path) == 1


def test_quarantine_and_yank_show_on_the_replica(pair, upstream):
    primary, replica = pair
    upstream.publish(small("1.0"), yanked="bad")
    upstream.publish("held", "1.0")
    upstream.status("held", "quarantined", "looked into")
    index = new_mirror(pair, upstream.url)
    for project in ("demo", "held"):
        here, there = (server.simple(index, project) for server in (replica, primary))
        assert here.get("project-status") == there.get("project-status")
        assert [(f["filename"], f.get("yanked")) for f in here["files"]] == \
            [(f["filename"], f.get("yanked")) for f in there["files"]]
    assert replica.simple(index, "held")["project-status"]["status"] == "quarantined"
    assert upstream.count("/simple/held/") == 1


def test_an_altered_page_of_the_primary_is_not_taken(own, upstream, tmp_path):
    """A line that changes links and hashes, or takes the signature away."""
    primary, _ = own
    archive = upstream.publish(small())
    index = mirror(primary, upstream.url)
    between = Between(primary.port)
    replica = follow(primary, tmp_path / "other", url=between.url)
    try:
        caught_up(primary, replica)
        page = "/%s/+simple/demo/" % index
        for old, new in ((b"X-Devpi-Signature: ", b"X-Devpi-Signatory: "), (b"HTTP/1.1 200 OK", b"HTTP/1.1 404 No")):
            between.change = lambda data, sent: data.replace(old, new) if b"X-PyPI" in data or b"application/vnd" in data else data
            reply = replica.get(page)
            assert (reply.status, b"something between" in reply.body) == (503, True), reply
            time.sleep(0.3)
        between.change = lambda data, sent: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:] if b"application/vnd" in data else data
        assert replica.get(page).status in (502, 503)
        between.change = None
        eventually(lambda: replica.get(page).status == 200, 15)
        assert get(replica, link_to(replica, index, archive.filename)).body == archive.content
    finally:
        replica.kill()
        between.close()


def test_offline_mode_of_a_replica_is_no_reason_to_not_ask_the_primary(tmp_path, own, upstream):
    primary, _ = own
    archive = upstream.publish(small())
    index = mirror(primary, upstream.url)
    replica = follow(primary, tmp_path / "offline", "--offline-mode")
    try:
        caught_up(primary, replica)
        assert get(replica, link_to(replica, index, archive.filename)).body == archive.content
        assert replica.get("/%s/+simple/none/" % index).status == 404
        assert replica.post("/%s/+simple/demo/refresh" % index).status == 302
        assert "STRAY" not in replica.whole_output()
    finally:
        replica.kill()


def test_replica_without_upstream_access_is_not_refused_by_upstream_allow(tmp_path, upstream):
    primary = Server(tmp_path / "p", "--role", "primary").start()
    replica = None
    try:
        primary.add_user("mia")
        archive = upstream.publish(small())
        index = mirror(primary, upstream.url)
        replica = follow(primary, tmp_path / "r", "--upstream-allow", "example.org")
        caught_up(primary, replica)
        assert get(replica, link_to(replica, index, archive.filename)).body == archive.content
    finally:
        for server in (replica, primary):
            if server:
                server.kill()


def test_primary_away_keeps_what_is_here_and_says_503_for_the_rest(own, upstream):
    primary, replica = own
    here, missing = upstream.publish(small("1.0")), upstream.publish(small("2.0"))
    index = new_mirror(own, upstream.url)
    paths = [link_to(replica, index, archive.filename) for archive in (here, missing)]
    get(replica, paths[0])
    unknown = paths[1].replace("demo-2.0", "other-2.0")
    primary.stop()
    assert len(replica.simple(index, "demo")["files"]) == 2
    assert get(replica, paths[0]).body == here.content
    for path in (paths[1], unknown):
        reply = get(replica, path)
        assert reply.status == 503 and int(reply.headers["Retry-After"]) > 0


def test_page_that_was_never_fetched_is_503_while_the_primary_is_away(own, upstream):
    primary, replica = own
    upstream.publish(small())
    index = new_mirror(own, upstream.url)
    stage = index + "-stage"
    primary.add_index(stage, bases=[index])
    caught_up(primary, replica)
    primary.stop()
    paths = [path % each for path in ("/%s/+simple/demo/", "/%s/demo", "/%s/demo/1.0") for each in (index, stage)]
    for path in ["/%s/+simple/" % index, *paths]:
        reply = replica.get(path)
        assert reply.status == 503 and int(reply.headers["Retry-After"]) > 0, (path, reply)
    assert replica.get("/%s" % index).status == 200


def test_stale_page_of_the_primary_is_stale_here(own, upstream):
    primary, replica = own
    upstream.publish(small())
    index = new_mirror(own, upstream.url, mirror_cache_expiry=0)
    primary.simple(index, "demo")
    upstream.stop()
    reply = replica.get("/%s/+simple/demo/" % index)
    assert reply.status == 200 and "no-store" in reply.headers["Cache-Control"]
    assert "no-store" in replica.get("/%s/+simple/demo/" % index).headers["Cache-Control"]


def test_mirror_without_upstream_shows_what_the_primary_has(pair, upstream):
    primary, replica = pair
    archive = upstream.publish(small())
    index = new_mirror(pair, upstream.url)
    primary.fetch(index, archive.filename, "demo")
    primary.patch("/" + index, ["mirror_url-="], user="mia")
    caught_up(*pair)
    assert primary.filenames(index, "demo") == replica.filenames(index, "demo") == [archive.filename]
    assert get(replica, link_to(replica, index, archive.filename)).body == archive.content


def test_external_urls_are_those_of_upstream(pair, upstream):
    _, replica = pair
    archive = upstream.publish(small())
    index = new_mirror(pair, upstream.url, mirror_use_external_urls=True)
    reply = get(replica, link_to(replica, index, archive.filename))
    assert (reply.status, reply.headers["Location"].startswith(upstream.host_url)) == (302, True)


def test_blocking_by_a_private_project_works_on_the_replica(pair, upstream):
    primary, replica = pair
    upstream.publish(small("9.0"))
    index = new_mirror(pair, upstream.url)
    stage = index + "-stage"
    primary.add_index(stage, bases=[index])
    own = small("1.0")
    primary.upload(stage, own, user="mia")
    caught_up(*pair)
    assert replica.filenames(stage, "demo") == [own.filename]
    primary.patch("/" + stage, ["mirror_whitelist=demo"], user="mia")
    caught_up(*pair)
    assert len(replica.filenames(stage, "demo")) == 2
