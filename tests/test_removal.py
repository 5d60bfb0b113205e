"""Projects and versions as JSON, and what deleting them leaves behind."""

import time

import pytest

from harness import links, page, path_of, sdist, serial, submit, wheel

STRINGS = (
    "name version metadata_version summary home_page author author_email maintainer maintainer_email license description keywords "
    "download_url comment requires_python description_content_type license_expression").split()
LISTS = (
    "platform classifiers supported_platform provides requires obsoletes project_urls provides_dist obsoletes_dist requires_dist "
    "requires_external provides_extras dynamic license_file").split()


@pytest.fixture(scope="module")
def site(shared_server):
    """`rem/dev` (volatile), `rem/stable` (not), `rem/child` with both as bases; `rem2` may do nothing there."""
    for name in ("rem", "rem2", "uploader"):
        shared_server.add_user(name)
        shared_server.login(name, "pw")
    shared_server.login("root", "secret")
    shared_server.add_index("rem/dev", volatile=True, acl_upload=["rem", "uploader"])
    shared_server.add_index("rem/stable", volatile=False, acl_upload=["rem", "uploader"])
    shared_server.add_index("rem/child", bases=["rem/dev", "rem/stable"])
    return shared_server


def file_status(server, archive, index):
    return server.get(path_of(archive, index), headers={"Accept": "*/*"}).status


# Projects and versions as JSON


def test_version_data_has_every_key_of_the_metadata(site):
    submit(site, "rem/dev", "Keys.Project", "1.0")
    reply = site.get("/rem/dev/keys-project/1.0")
    assert (reply.status, reply.json()["type"], reply.headers.get("Content-Type")) == (200, "versiondata", "application/json")
    expected = {key: "" for key in STRINGS}
    expected.update({key: [] for key in LISTS})
    expected.update(name="Keys.Project", version="1.0")
    shown = dict(reply.result)
    shown["metadata_version"] = ""
    assert shown == expected


def test_links_and_history_of_a_version(site):
    archives = [wheel("linked", "1.0"), sdist("linked", "1.0")]
    start = time.gmtime(time.time() - 2)[:6]
    site.upload("rem/dev", archives[0])
    site.upload("rem/dev", archives[1], user="uploader")
    found = links(site, "rem/dev/linked/1.0")
    assert [link["href"] for link in found] == [site.url + path_of(archive, "rem/dev") for archive in archives]
    for link, archive, who in zip(found, archives, ("rem", "uploader")):
        [entry] = link.pop("log")
        when = entry.pop("when")
        assert tuple(start) <= tuple(when) <= tuple(time.gmtime()[:6])
        assert entry == {"what": "upload", "who": who, "dst": "rem/dev"}
        assert link == {
            "rel": "releasefile", "hash_spec": "sha256=" + archive.sha256, "hashes": {"sha256": archive.sha256},
            "href": site.url + path_of(archive, "rem/dev")}


def test_links_of_scripts_follow_the_outside_url(site):
    site.upload("rem/dev", wheel("outside", "1.0"))
    for path in ("/rem/dev/outside/1.0", "/rem/dev/outside"):
        result = site.get(path, headers={"X-Outside-URL": "https://pypi.org/sub"}).result
        [link] = result.get("1.0", result)["+links"]
        assert link["href"] == "https://pypi.org/sub" + path_of(wheel("outside", "1.0"), "rem/dev")


def test_project_data_unites_the_bases_and_shadows_the_later_ones(site):
    site.add_index("rem/top", bases=["rem/dev", "rem/stable"])
    submit(site, "rem/top", "shadow", "1.0", summary="top")
    submit(site, "rem/dev", "shadow", "1.0", summary="dev")
    submit(site, "rem/stable", "shadow", "1.0", summary="stable")
    submit(site, "rem/stable", "shadow", "2.0", summary="only stable")
    reply = site.get("/rem/top/shadow")
    assert reply.json()["type"] == "projectconfig"
    assert set(reply.result) == {"1.0", "2.0"}
    first = reply.result["1.0"]
    assert first["summary"] == "top"
    assert [other["summary"] for other in first["+shadowing"]] == ["dev", "stable"]
    assert "+shadowing" not in reply.result["2.0"]
    assert site.get("/rem/top/shadow/1.0").result == first


def test_ignore_bases_shows_this_index_alone(site):
    submit(site, "rem/stable", "based", "1.0")
    assert set(site.get("/rem/child/based").result) == {"1.0"}
    for query in ("ignore_bases", "ignore_bases=", "ignore_bases=1"):
        reply = site.get("/rem/child/based?" + query)
        assert (reply.status, reply.result) == (200, {})
    assert set(site.get("/rem/stable/based?ignore_bases=").result) == {"1.0"}


def test_versions_are_told_apart_by_their_text(site):
    for version in ("1.0", "1.0.0"):
        submit(site, "rem/dev", "spelledversions", version, summary=version)
    assert set(site.get("/rem/dev/spelledversions").result) == {"1.0", "1.0.0"}
    assert site.get("/rem/dev/spelledversions/1.0.0").result["summary"] == "1.0.0"
    assert site.get("/rem/dev/spelledversions/1").status == 404


def test_index_lists_its_own_projects_by_normal_name(site):
    site.add_index("rem/listing", bases=["rem/dev"])
    assert site.get("/rem/listing").result["projects"] == []
    submit(site, "rem/listing", "Zeta_One", "1")
    submit(site, "rem/listing", "alpha", "1")
    assert site.get("/rem/listing").result["projects"] == ["alpha", "zeta-one"]
    assert "projects" not in site.get("/rem/listing?no_projects=").result


@pytest.mark.parametrize("path, message", [
    ("/rem/dev/unknown", "no project 'unknown'"),
    ("/rem/dev/known/77", "The version 77 of project known does not exist.")])
def test_what_does_not_exist_is_named(site, path, message):
    submit(site, "rem/dev", "known", "1.0")
    reply = site.get(path)
    assert (reply.status, reply.json()["message"]) == (404, message)


@pytest.mark.parametrize("accept, status", [
    ("application/json", 200), ("*/*", 200), (None, 200), ("text/plain", 415), ("image/png", 415)])
@pytest.mark.parametrize("path", ["/rem/dev/accepted", "/rem/dev/accepted/", "/rem/dev/accepted/1.0"])
def test_json_is_given_to_all_who_do_not_ask_for_something_else(site, path, accept, status):
    submit(site, "rem/dev", "accepted", "1.0")
    reply = site.get(path, headers={"Accept": accept})
    assert (reply.status, reply.headers.get("Content-Type")) == (status, "application/json")


# Deleting


def assert_empty(site, index, project):
    """It is there, without a release, as installers, devpi clients and lists see it."""
    assert site.get("/%s/%s" % (index, project)).json() == {"type": "projectconfig", "result": {}}
    page = site.simple(index, project)
    assert (page["files"], page["versions"]) == ([], [])
    assert project in site.get("/" + index).result["projects"]


def test_deleting_a_file_leaves_the_others(site):
    first, second = wheel("onefile", "1.0"), sdist("onefile", "1.0")
    site.upload("rem/dev", first)
    site.upload("rem/dev", second)
    before = serial(site)
    reply = site.delete(path_of(first, "rem/dev"), user="rem")
    assert (reply.status, reply.json()["message"]) == (200, "package '%s' deleted" % path_of(first, "rem/dev")[1:])
    assert serial(site) == before + 1
    assert site.filenames("rem/dev", "onefile") == [second.filename]
    assert file_status(site, first, "rem/dev") == 410
    assert site.fetch("rem/dev", second.filename, "onefile") == second.content


def test_deleting_the_last_file_deletes_the_version_and_leaves_the_project_empty(site):
    first, second = wheel("lastfile", "1.0"), wheel("lastfile", "2.0")
    site.upload("rem/dev", first)
    site.upload("rem/dev", second)
    site.delete(path_of(first, "rem/dev"), user="rem")
    assert site.get("/rem/dev/lastfile/1.0").status == 404
    assert site.simple("rem/dev", "lastfile")["versions"] == ["2.0"]
    site.delete(path_of(second, "rem/dev"), user="rem")
    assert_empty(site, "rem/dev", "lastfile")


def test_deleting_a_version_deletes_its_files_and_leaves_the_project_empty(site):
    archives = [wheel("version", "1.0"), sdist("version", "1.0"), wheel("version", "2.0")]
    for archive in archives:
        site.upload("rem/dev", archive)
    reply = site.delete("/rem/dev/version/1.0", user="rem")
    assert (reply.status, reply.json()["message"]) == (200, "project 'version' version '1.0' deleted")
    assert [file_status(site, archive, "rem/dev") for archive in archives] == [410, 410, 200]
    assert site.filenames("rem/dev", "version") == [archives[2].filename]
    reply = site.delete("/rem/dev/version/2.0", user="rem")
    assert (reply.status, reply.json()["message"]) == (
        200, "project 'version' version '2.0' deleted; version is empty now and stays private: mirrors are shut out until the "
             "project itself is deleted")
    assert_empty(site, "rem/dev", "version")


def test_deleting_a_version_with_a_local_part(site):
    archive = wheel("localversion", "1.0+abc")
    site.upload("rem/dev", archive)
    assert site.delete("/rem/dev/localversion/1.0%2Babc", user="rem").status == 200
    assert file_status(site, archive, "rem/dev") == 410


def test_deleting_a_project_takes_any_spelling_and_all_it_holds(site):
    archives = [wheel("Whole.Project", "1.0"), wheel("Whole.Project", "2.0")]
    for archive in archives:
        site.upload("rem/dev", archive)
    submit(site, "rem/dev", "whole-project", "3.0")
    reply = site.delete("/rem/dev/Whole_Project", user="rem")
    assert reply.status == 200
    assert reply.json()["message"] == ("project whole-project deleted from stage rem/dev; the name whole-project is free on "
                                       "rem/dev now: mirrors may answer for it")
    assert page(site, "rem/dev", "whole-project").status == 404
    assert [file_status(site, archive, "rem/dev") for archive in archives] == [410, 410]


@pytest.mark.parametrize("path, message", [
    ("/rem/dev/missing", "project not found"),
    ("/rem/dev/present/9.9", "version '9.9' of project 'present' not found on stage 'rem/dev'"),
    ("/rem/dev/+f/000/0000000000000/missing-1.0.zip", "package 'rem/dev/+f/000/0000000000000/missing-1.0.zip' doesn't exist")])
def test_deleting_what_is_not_there_says_so_and_changes_nothing(site, path, message):
    submit(site, "rem/dev", "present", "1.0")
    before = serial(site)
    reply = site.delete(path, user="rem")
    assert (reply.status, reply.json()["message"]) == (404, message)
    assert serial(site) == before


def test_deleting_a_file_twice_is_gone(site):
    archive, other = wheel("twice", "1.0"), wheel("twice", "2.0")
    site.upload("rem/dev", archive)
    site.upload("rem/dev", other)
    assert site.delete(path_of(archive, "rem/dev"), user="rem").status == 200
    assert site.delete(path_of(archive, "rem/dev"), user="rem").status == 410
    assert site.filenames("rem/dev", "twice") == [other.filename]


def test_deleting_never_touches_a_base(site):
    archive = wheel("inthebase", "1.0")
    site.upload("rem/stable", archive)
    for path in ("/rem/child/inthebase", "/rem/child/inthebase/1.0", path_of(archive, "rem/child")):
        assert site.delete(path, user="rem").status == 404
    assert site.fetch("rem/child", archive.filename, "inthebase") == archive.content


# Indexes that are not volatile


@pytest.mark.parametrize("target, message", [
    ("project", "project 'forced' is on non-volatile index rem/stable"),
    ("version", "cannot delete version on non-volatile index"),
    ("file", "cannot delete version on non-volatile index")])
@pytest.mark.parametrize("force", ["?force", "?force=", "?force=0"])
def test_a_non_volatile_index_gives_things_away_by_force_only(site, target, message, force):
    archive = wheel("forced", "1.0")
    site.upload("rem/stable", archive)
    path = {"project": "/rem/stable/forced", "version": "/rem/stable/forced/1.0", "file": path_of(archive, "rem/stable")}[target]
    before = serial(site)
    for query in ("", "?x=force", "?Force="):
        reply = site.delete(path + query, user="rem")
        assert (reply.status, reply.json()["message"]) == (403, message)
    assert serial(site) == before
    assert site.fetch("rem/stable", archive.filename, "forced") == archive.content
    assert site.delete(path + force, user="rem").status == 200
    assert file_status(site, archive, "rem/stable") == 410
    if target == "project":
        assert page(site, "rem/stable", "forced").status == 404
    else:
        assert_empty(site, "rem/stable", "forced")


def test_a_non_volatile_index_cannot_be_deleted_not_even_by_force(site):
    for query in ("", "?force="):
        reply = site.delete("/rem/stable" + query, user="rem")
        assert (reply.status, reply.json()["message"]) == (403, "index rem/stable non-volatile, cannot delete")


# Who may


@pytest.mark.parametrize("user, status", [(None, 403), ("rem2", 403), ("uploader", 200), ("rem", 200), ("root", 200)])
@pytest.mark.parametrize("target", ["project", "version", "file"])
def test_uploaders_owner_and_root_may_delete_and_nobody_else(site, user, status, target):
    archive = wheel("guarded", "1.0")
    site.upload("rem/dev", archive)
    path = {"project": "/rem/dev/guarded", "version": "/rem/dev/guarded/1.0", "file": path_of(archive, "rem/dev")}[target]
    before = serial(site)
    reply = site.delete(path, user=user)
    assert reply.status == status
    if status == 403:
        assert reply.headers.get("Location") is None
        assert serial(site) == before
        assert site.fetch("rem/dev", archive.filename, "guarded") == archive.content
    else:
        assert file_status(site, archive, "rem/dev") == 410


@pytest.mark.parametrize("path", [
    "/rem/dev/nothing", "/rem/dev/nothing/1", "/rem/dev/+f/000/0000000000000/x-1.zip", "/rem/none", "/rem/none/x", "/rem/none/x/1"])
def test_the_right_is_checked_before_anything_is_looked_up(site, path):
    for user in (None, "rem2"):
        assert site.delete(path, user=user).status == 403


@pytest.mark.parametrize("path, status", [("/rem/none", 404), ("/rem/none/x", 403), ("/rem/none/x/1", 403)])
def test_on_a_missing_index_nobody_has_the_right_and_its_owner_hears_that_it_is_missing(site, path, status):
    assert site.delete(path, user="rem").status == status
    assert site.delete(path, user="rem2").status == 403


# Afterwards


def test_the_same_upload_revives_a_deleted_path(site):
    archive = wheel("revived", "1.0")
    for _ in range(2):
        assert site.upload("rem/stable", archive).status == 200
        assert (file_status(site, archive, "rem/stable"), site.filenames("rem/stable", "revived")) == (200, [archive.filename])
        assert site.fetch("rem/stable", archive.filename, "revived") == archive.content
        assert site.delete("/rem/stable/revived/1.0?force=", user="rem").status == 200
        assert file_status(site, archive, "rem/stable") == 410


def test_other_content_may_take_the_name_of_a_deleted_file(site):
    first, second = wheel("renewed", "1.0"), wheel("renewed", "1.0", size=10)
    site.upload("rem/stable", first)
    site.delete(path_of(first, "rem/stable") + "?force=", user="rem")
    assert site.upload("rem/stable", second).status == 200
    assert site.fetch("rem/stable", first.filename, "renewed") == second.content
    assert file_status(site, first, "rem/stable") == 410
    [link] = links(site, "rem/stable/renewed/1.0")
    assert [entry["what"] for entry in link["log"]] == ["upload"]


def test_metadata_of_a_deleted_version_does_not_come_back(site):
    archive = wheel("forgotten", "1.0")
    site.upload("rem/dev", archive, fields={"author": "Ann"})
    site.delete("/rem/dev/forgotten", user="rem")
    site.upload("rem/dev", archive)
    assert site.get("/rem/dev/forgotten/1.0").result["author"] == ""


def test_files_of_a_deleted_index_are_gone_also_after_it_is_made_again(site):
    archive, never = wheel("ofindex", "1.0"), wheel("never", "1.0")
    site.add_index("rem/brief", volatile=True)
    site.upload("rem/brief", archive)
    reply = site.delete("/rem/brief", user="rem")
    assert (reply.status, reply.json()["message"]) == (201, "index rem/brief deleted")
    assert file_status(site, archive, "rem/brief") == 410
    reply = site.get(path_of(never, "rem/brief"))
    assert (reply.status, reply.json()["message"]) == (404, "The stage rem/brief could not be found.")
    assert page(site, "rem/brief", "ofindex").status == 404
    site.add_index("rem/brief", volatile=True)
    assert file_status(site, archive, "rem/brief") == 410
    assert file_status(site, never, "rem/brief") == 404
    assert site.get("/rem/brief").result["projects"] == []
    site.upload("rem/brief", archive)
    assert site.fetch("rem/brief", archive.filename, "ofindex") == archive.content


def test_files_of_a_deleted_user_are_gone(site):
    site.add_user("shortlived")
    site.add_index("shortlived/dev", volatile=True)
    archive = wheel("ofuser", "1.0")
    site.upload("shortlived/dev", archive)
    assert site.delete("/shortlived", user="shortlived").status == 200
    assert file_status(site, archive, "shortlived/dev") == 410
    assert site.get("/shortlived").status == 404


def test_a_shared_content_lives_as_long_as_one_index_holds_it(site):
    archive = wheel("sharedcontent", "1.0")
    site.upload("rem/dev", archive)
    site.upload("rem/stable", archive)
    site.delete("/rem/dev/sharedcontent", user="rem")
    assert file_status(site, archive, "rem/dev") == 410
    assert site.fetch("rem/stable", archive.filename, "sharedcontent") == archive.content


# Mirrors


@pytest.fixture
def mirror(site, upstream):
    """A fresh mirror `rem/mirror` (volatile, as an index is by default) of the fake upstream."""
    site.add_mirror("rem/mirror", upstream.url)
    yield site
    site.delete("/rem/mirror", user="rem")


def test_deleting_a_project_of_a_mirror_forgets_what_was_cached(mirror, upstream):
    archive = upstream.publish("cached", "1.0")
    assert mirror.delete("/rem/mirror/cached", user="rem").status == 404
    assert mirror.fetch("rem/mirror", archive.filename, "cached") == archive.content
    assert mirror.delete("/rem/mirror/cached", user="rem").status == 200
    fetched = upstream.count("/simple/cached/*")
    assert mirror.fetch("rem/mirror", archive.filename, "cached") == archive.content
    assert upstream.count("/simple/cached/*") > fetched


def test_deleting_a_version_of_a_mirror_drops_the_bytes_only(mirror, upstream):
    archive = upstream.publish("cachedversion", "1.0")
    mirror.fetch("rem/mirror", archive.filename, "cachedversion")
    assert mirror.delete("/rem/mirror/cachedversion/1.0", user="rem").status == 200
    assert mirror.filenames("rem/mirror", "cachedversion") == [archive.filename]
    before = upstream.count("*/" + archive.filename)
    assert mirror.fetch("rem/mirror", archive.filename, "cachedversion") == archive.content
    assert upstream.count("*/" + archive.filename) > before


def test_a_deleted_file_of_a_mirror_is_gone_until_it_is_asked_for_upstream_again(mirror, upstream):
    archive = upstream.publish("cachedfile", "1.0")
    mirror.fetch("rem/mirror", archive.filename, "cachedfile")
    assert mirror.delete(path_of(archive, "rem/mirror"), user="rem").status == 200
    assert file_status(mirror, archive, "rem/mirror") == 410
    assert mirror.post("/rem/mirror/+simple/cachedfile/refresh", follow=True).status == 200
    assert mirror.fetch("rem/mirror", archive.filename, "cachedfile") == archive.content


def test_a_non_volatile_mirror_gives_things_away_by_force_only(site, upstream):
    site.add_mirror("rem/keeper", upstream.url, volatile=False)
    archive = upstream.publish("kept", "1.0")
    site.fetch("rem/keeper", archive.filename, "kept")
    paths = ["/rem/keeper/kept/1.0", path_of(archive, "rem/keeper"), "/rem/keeper/kept"]
    for path in paths:
        assert site.delete(path, user="rem").status == 403
    assert file_status(site, archive, "rem/keeper") == 200
    assert site.delete(paths[-1] + "?force=", user="rem").status == 200
