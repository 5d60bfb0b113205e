"""Refreshing what a mirror has of a project, and the same upload twice [W20.10, W13.8]."""

import pytest

from harness import ANY, Upstream, links, wheel


@pytest.fixture(scope="module")
def upstream():
    upstream = Upstream().start()
    yield upstream
    upstream.stop()


@pytest.fixture(scope="module")
def site(shared_server, upstream):
    """`ck/mirror` keeps what it has seen; `ck/child` inherits from it and from another mirror of the same upstream."""
    shared_server.add_user("ck")
    shared_server.add_index("ck/dev")
    for name in ("ck/mirror", "ck/other"):
        shared_server.add_mirror(name, upstream, mirror_cache_expiry=3600)
    shared_server.add_index("ck/child", bases=["ck/dev", "ck/mirror", "ck/other"])
    return shared_server


def refresh(server, index, project):
    """As devpi-client asks, with neither credentials nor a body."""
    return server.post("/%s/+simple/%s/refresh" % (index, project), headers={"Accept": ANY})


# -- refreshing


@pytest.mark.parametrize("name, spelling", [("refresh-me", "refresh-me"), ("refresh-us", "Refresh_Us")])
def test_a_refresh_asks_upstream_and_leads_back_to_the_page(site, upstream, name, spelling):
    upstream.publish(name, "1.0")
    assert site.versions("ck/mirror", name) == ["1.0"]
    upstream.publish(name, "2.0")
    assert site.versions("ck/mirror", name) == ["1.0"]
    reply = refresh(site, "ck/mirror", spelling)
    assert (reply.status, reply.headers["Location"]) == (302, site.url + "/ck/mirror/+simple/%s/" % name)
    assert sorted(site.versions("ck/mirror", name)) == ["1.0", "2.0"]


def test_a_refresh_of_an_index_reaches_every_mirror_among_its_bases(site, upstream):
    mirrors = ["ck/mirror", "ck/other"]
    upstream.publish("refresh-all", "1.0")
    assert [site.versions(mirror, "refresh-all") for mirror in mirrors] == [["1.0"]] * 2
    upstream.publish("refresh-all", "2.0")
    reply = refresh(site, "ck/child", "refresh-all")
    assert (reply.status, reply.headers["Location"]) == (302, site.url + "/ck/child/+simple/refresh-all/")
    assert [sorted(site.versions(mirror, "refresh-all")) for mirror in mirrors] == [["1.0", "2.0"]] * 2


@pytest.mark.parametrize("fault", ["500", "reset", "truncate"])
def test_a_refresh_that_fails_upstream_keeps_the_old_links(site, upstream, fault):
    name = "refresh-" + fault
    archive = upstream.publish(name, "1.0")
    assert site.filenames("ck/mirror", name) == [archive.filename]
    upstream.fault(fault, "/simple/%s/" % name, times=1)
    assert refresh(site, "ck/mirror", name).status == 302
    assert site.filenames("ck/mirror", name) == [archive.filename]
    assert site.fetch("ck/mirror", archive.filename, name) == archive.content


def test_a_refresh_of_a_server_that_is_gone_keeps_the_old_links(make_server):
    upstream = Upstream().start()
    archive = upstream.publish("orphan", "1.0")
    server = make_server()
    server.add_user("ck")
    server.add_mirror("ck/mirror", upstream)
    assert server.filenames("ck/mirror", "orphan") == [archive.filename]
    upstream.stop()
    assert refresh(server, "ck/mirror", "orphan").status == 302
    assert server.filenames("ck/mirror", "orphan") == [archive.filename]


def test_where_there_is_no_mirror_a_refresh_changes_nothing(site):
    site.upload("ck/dev", wheel("own", "1.0"))
    before = site.get("/+api").headers["X-DEVPI-SERIAL"]
    assert refresh(site, "ck/dev", "own").headers["Location"] == site.url + "/ck/dev/+simple/own/"
    assert site.versions("ck/dev", "own") == ["1.0"]
    assert refresh(site, "ck/nothing", "own").status == 404
    assert site.get("/+api").headers["X-DEVPI-SERIAL"] == before


# -- uploading the same again


def test_the_same_file_again_on_a_volatile_index_replaces_itself(site):
    """Its path stays, what hung on the old one goes."""
    archive = wheel("again", "1.0")
    assert site.upload("ck/dev", archive).status == 200
    [link] = links(site, "ck/dev/again/1.0")
    path = link["href"][len(site.url):]
    assert site.post(path, {"testenvs": {}}).status == 200
    reply = site.upload("ck/dev", archive)
    assert (reply.status, reply.reason) == (200, "OK")
    [again] = links(site, "ck/dev/again/1.0")
    assert again["href"] == link["href"]
    assert [(entry["what"], entry.get("count")) for entry in again["log"]] == [("overwrite", 1), ("upload", None)]
    assert site.get(path, headers={"Accept": ANY}).body == archive.content
