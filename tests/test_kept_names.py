"""What a name stands for once its files went: on a non-volatile index, and between a private project and the mirrors."""

import itertools

import pytest

from harness import SIMPLE_JSON, Upstream, audited, eventually, links, path_of, sdist, wheel

numbers = itertools.count(1)


@pytest.fixture(scope="module")
def site(shared_server):
    """`kim` owns the indexes of the tests, `eve` may upload to `kim/rel` (not volatile) and `kim/dev`; `lou` owns bases."""
    for name in ("kim", "eve", "lou"):
        shared_server.add_user(name)
        shared_server.login(name, "pw")
    shared_server.login("root", "secret")
    shared_server.add_index("kim/rel", volatile=False, acl_upload=["kim", "eve"])
    shared_server.add_index("kim/dev", acl_upload=["kim", "eve"])
    return shared_server


def fresh(prefix):
    """A name that no test had before."""
    return "%s%d" % (prefix, next(numbers))


def newest(site, action):
    """(who, target, detail) of the newest entry of that action."""
    [row] = audited(site, action=action, limit=1)
    return row["who"], row["target"], row["detail"]


def documentation(site, index, user, name, content):
    docs = wheel(name, "1.0", size=content)
    return site.upload(index, docs, user=user, fields={":action": "doc_upload", "filetype": None})


# What was released on a non-volatile index


PLACES = {"file": lambda archive: path_of(archive, "kim/rel"), "version": lambda archive: "/kim/rel/%s/1.0" % archive.name,
          "project": lambda archive: "/kim/rel/%s" % archive.name}


@pytest.mark.parametrize("what", PLACES)
def test_what_was_deleted_by_force_gives_its_name_to_nobody_else(site, what):
    name = fresh("kept")
    first, other = wheel(name, "1.0"), wheel(name, "1.0", size=10)
    assert site.upload("kim/rel", first, user="eve").status == 200
    path = PLACES[what](first)
    reply = site.delete(path + "?force", user="eve")
    assert (reply.status, reply.json()["message"]) == (
        403, "index kim/rel is non-volatile: only kim and root may delete from it, by ?force")
    assert site.fetch("kim/rel", first.filename, name) == first.content
    assert site.delete(path + "?force", user="kim").status == 200
    reply = site.upload("kim/rel", other, user="eve")
    assert (reply.status, reply.json()["message"]) == (
        409, "%s was deleted from the non-volatile index kim/rel, where this name stands for sha256=%s: "
             "only kim and root may give it to other content" % (first.filename, first.sha256))
    assert site.get(path_of(other, "kim/rel")).status == 404
    assert site.upload("kim/rel", first, user="eve").status == 200
    assert site.fetch("kim/rel", first.filename, name) == first.content


@pytest.mark.parametrize("user", ["kim", "root"])
def test_owner_and_root_may_replace_what_they_deleted_and_the_audit_says_so(site, user):
    name = fresh("replaced")
    first, other, third = (wheel(name, "1.0", size=size) for size in (1, 10, 20))
    site.patch("/kim/rel", ["acl_upload+=root"], user="kim")
    site.upload("kim/rel", first)
    assert site.delete(path_of(first, "kim/rel") + "?force", user=user).status == 200
    assert site.upload("kim/rel", other, user=user).status == 200
    assert newest(site, "replaced") == (user, first.filename, "sha256=%s by sha256=%s" % (first.sha256, other.sha256))
    assert site.delete(path_of(other, "kim/rel") + "?force", user=user).status == 200
    for archive, status in ((first, 409), (third, 409), (other, 200)):      # the name stands for what went last
        assert site.upload("kim/rel", archive, user="eve").status == status


def test_a_push_is_no_way_around(site):
    name = fresh("pushed")
    first, other = wheel(name, "1.0"), wheel(name, "1.0", size=10)
    site.upload("kim/rel", first)
    site.delete(path_of(first, "kim/rel") + "?force", user="kim")
    site.upload("kim/dev", other)
    body = {"name": name, "version": "1.0", "targetindex": "kim/rel"}
    reply = site.request("PUSH", "/kim/dev", body, user="eve")
    assert reply.status == 409 and "stands for sha256=%s" % first.sha256 in reply.json()["message"]
    assert name not in site.get("/kim/rel").result["projects"] or site.filenames("kim/rel", name) == []
    assert site.request("PUSH", "/kim/dev", body, user="kim").status == 200
    assert newest(site, "replaced")[1] == first.filename
    assert site.filenames("kim/rel", name) == [other.filename]


def test_documentation_keeps_its_name_too(site):
    name = fresh("docs")
    site.upload("kim/rel", wheel(name, "1.0"))
    assert documentation(site, "kim/rel", "eve", name, 1).status == 200
    [link] = links(site, "kim/rel/%s/1.0" % name, "doczip")
    path = link["href"][len(site.url):]
    assert site.delete(path + "?force", user="eve").status == 403
    assert site.delete(path + "?force", user="kim").status == 200
    assert documentation(site, "kim/rel", "eve", name, 10).status == 409
    assert documentation(site, "kim/rel", "eve", name, 1).status == 200


def test_a_project_of_two_releases_keeps_the_names_of_each(site):
    name = fresh("two")
    archives = [wheel(name, "1.0"), sdist(name, "1.0"), wheel(name, "2.0")]
    for archive in archives:
        site.upload("kim/rel", archive)
    assert site.delete("/kim/rel/%s?force" % name, user="kim").status == 200
    for archive, other in zip(archives, [wheel(name, "1.0", size=9), sdist(name, "1.0", size=9), wheel(name, "2.0", size=9)]):
        assert site.upload("kim/rel", other, user="eve").status == 409
        assert site.upload("kim/rel", archive, user="eve").status == 200


def test_a_volatile_index_gives_names_to_everybody_and_says_what_was_replaced(site):
    name = fresh("volatile")
    first, other, third = (wheel(name, "1.0", size=size) for size in (1, 10, 20))
    site.upload("kim/dev", first, user="eve")
    site.upload("kim/dev", first, user="eve")
    site.upload("kim/dev", other, user="eve")
    said = "sha256=%s by sha256=%s" % (first.sha256, other.sha256)
    assert newest(site, "replaced") == ("eve", first.filename, said)
    [link] = links(site, "kim/dev/%s/1.0" % name)
    entry = link["log"][0]
    assert (entry["what"], entry["count"], "%(replaced)s by %(by)s" % entry) == ("overwrite", 2, said)
    site.delete(path_of(other, "kim/dev"), user="eve")
    assert site.upload("kim/dev", third, user="eve").status == 200
    assert newest(site, "replaced")[2] == "sha256=%s by sha256=%s" % (other.sha256, third.sha256)


def test_an_index_that_was_deleted_and_made_again_says_what_it_replaces(site):
    name, index = fresh("again"), "kim/%s" % fresh("brief")
    first, other = wheel(name, "1.0"), wheel(name, "1.0", size=10)
    site.add_index(index)
    site.upload(index, first)
    site.delete("/" + index, user="kim")
    site.add_index(index, volatile=False)
    assert site.upload(index, other).status == 200
    assert newest(site, "replaced") == ("kim", first.filename, "sha256=%s by sha256=%s" % (first.sha256, other.sha256))


def test_the_names_are_kept_over_a_restart_and_a_time_as_volatile(site):
    name = fresh("restart")
    first, other = wheel(name, "1.0"), wheel(name, "1.0", size=10)
    site.upload("kim/rel", first)
    site.delete(path_of(first, "kim/rel") + "?force", user="kim")
    site.restart()
    assert site.upload("kim/rel", other, user="eve").status == 409
    site.patch("/kim/rel", {"volatile": True}, user="kim")      # the owner's word
    assert site.upload("kim/rel", other, user="eve").status == 200
    site.patch("/kim/rel", {"volatile": False}, user="kim")


# A private project and the mirrors


@pytest.fixture(scope="module")
def above(site):
    """`kim/above`, which builds on a mirror of an upstream that has any project, in version 9.0; and the upstream."""
    upstream = Upstream().start()
    site.add_mirror("kim/mirror", upstream)
    site.add_index("kim/above", bases=["kim/mirror"])
    yield upstream
    upstream.stop()


def published(upstream, name):
    return upstream.publish(name, "9.0").filename


def assert_empty_and_private(site, upstream, index, name):
    """As every reader sees it; and upstream is not asked for the name."""
    assert site.simple(index, name)["files"] == site.simple(index, name)["versions"] == []
    page = site.get("/%s/+simple/%s/" % (index, name), headers={"Accept": "text/html", "User-Agent": "pip/23.0"})
    assert (page.status, "<a" in page.text) == (200, False)
    assert site.get("/%s/%s" % (index, name)).result == {}
    assert site.get("/%s/%s/1.0" % (index, name)).status == 404
    assert site.get("/%s/+pypi/%s/json" % (index, name)).status == 404
    assert upstream.count("/simple/%s/" % name) == 0


@pytest.mark.parametrize("what", ["version", "file"])
def test_a_project_whose_last_release_went_stays_private(site, above, what):
    name, archive = fresh("intern"), None
    published(above, name)
    archive = wheel(name, "1.0")
    site.upload("kim/above", archive)
    path = "/kim/above/%s/1.0" % name if what == "version" else path_of(archive, "kim/above")
    reply = site.delete(path, user="kim")
    said = "%s is empty now and stays private: mirrors are shut out until the project itself is deleted" % name
    assert reply.status == 200 and reply.json()["message"].endswith("deleted; " + said)
    assert newest(site, "delete." + what)[2] == said
    assert_empty_and_private(site, above, "kim/above", name)
    names = [entry["name"] for entry in site.get("/kim/above/+simple/", headers={"Accept": SIMPLE_JSON}).json()["projects"]]
    assert name in names
    # the search index follows
    eventually(lambda: "kim/above" not in str(site.get("/+search?query=%s" % name).result))
    body = {"name": name, "version": "1.0", "targetindex": "kim/dev"}
    reply = site.request("PUSH", "/kim/above", body, user="kim")
    assert (reply.status, reply.json()["message"]) == (400, "there are no files for %s 1.0 on stage kim/above" % name)
    site.upload("kim/above", wheel(name, "2.0"))
    assert site.versions("kim/above", name) == ["2.0"]


def test_a_project_that_is_deleted_gives_its_name_to_the_mirrors_and_that_is_said(site, above):
    name = fresh("freed")
    theirs = published(above, name)
    site.upload("kim/above", wheel(name, "1.0"))
    site.delete("/kim/above/%s/1.0" % name, user="kim")
    assert_empty_and_private(site, above, "kim/above", name)
    reply = site.delete("/kim/above/%s" % name, user="kim")
    said = "the name %s is free on kim/above now: mirrors may answer for it" % name
    assert reply.json()["message"] == "project %s deleted from stage kim/above; %s" % (name, said)
    assert newest(site, "delete.project") == ("kim", name, said)
    assert site.filenames("kim/above", name) == [theirs]


def test_only_an_empty_project_of_the_index_itself_counts_and_whitelists_still_open_the_mirror(site, above):
    name = fresh("white")
    theirs = published(above, name)
    site.upload("kim/above", wheel(name, "1.0"))
    site.delete("/kim/above/%s/1.0" % name, user="kim")
    site.patch("/kim/above", ["mirror_whitelist+=" + name], user="kim")
    assert site.filenames("kim/above", name) == [theirs]


def test_a_base_that_does_not_exist_shuts_out_the_mirrors(site, above):
    """What of its names was private is not known any more."""
    name, other, mine = fresh("lost"), fresh("other"), fresh("mine")
    base, index = "kim/%s" % fresh("lib"), "kim/%s" % fresh("top")
    site.add_index(base)
    site.upload(base, wheel(name, "1.0"))
    site.add_index(index, bases=[base, "kim/mirror"])
    site.upload(index, wheel(mine, "1.0"))
    theirs = published(above, name), published(above, other)
    assert site.filenames(index, other) == [theirs[1]]
    assert site.delete("/" + base, user="kim").status == 201
    for path in ("/%s/+simple/%s/", "/%s/%s", "/%s/+pypi/%s/json"):
        for each in (name, other):
            reply = site.get(path % (index, each))
            assert reply.status == 403 and "builds on %s, which does not exist" % base in reply.text, reply
    assert above.count("/simple/%s/" % name) == 0
    assert site.versions(index, mine) == ["1.0"]
    status = site.get("/+status").result
    assert status["status"] == "warn" and "base that does not exist" in str(status["messages"]) and base not in str(status)
    said = "%s builds on %s, which does not exist" % (index, base)
    assert said in site.get("/+status", user="root").result["messages"]
    assert site.patch("/" + index, {"mirror_whitelist": [other]}, user="kim").status == 200
    assert site.filenames(index, other) == [theirs[1]]
    site.patch("/" + index, ["bases=kim/mirror"], user="kim")
    assert site.filenames(index, name) == [theirs[0]]
    assert said not in site.get("/+status", user="root").result["messages"]
