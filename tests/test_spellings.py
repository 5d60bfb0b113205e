"""One version spelled in two ways (PEP 440) is two releases that are handled as one; trailing zeros make two versions."""

import itertools

import pytest

from harness import Upstream, documentation, path_of, rels, sdist, upload_docs, wheel
from receiver import Receiver

OLD, NEW = "3.0.0-rc.1", "3.0.0rc1"
EACH = pytest.mark.parametrize("asked", [OLD, NEW, "v3.0.0.RC1"])
numbers = itertools.count(1)


@pytest.fixture(scope="module")
def site(shared_server):
    shared_server.add_user("spell")
    shared_server.login("spell", "pw")
    shared_server.login("root", "secret")
    for name in ("dev", "prod"):
        shared_server.add_index("spell/" + name)
    return shared_server


@pytest.fixture
def name(site):
    """A project of `spell/dev` with a file under each spelling, documentation and a test result under the old one, and
    another release."""
    name = "two%d" % next(numbers)
    for archive in archives_of(name):
        assert site.upload("spell/dev", archive, fields={"summary": "as " + archive.version}).status == 200
    assert documented(site, name, OLD, "old").status == 200
    assert site.post(path_of(archives_of(name)[0], "spell/dev"), {"testenvs": {}}, user="spell").status == 200
    return name


def archives_of(name):
    return [sdist(name, OLD), wheel(name, NEW), wheel(name, "3.0.0")]


def documented(site, name, version, text, index="spell/dev"):
    return upload_docs(site, index, documentation(name, version, text))


ALL = ["doczip", "releasefile", "releasefile", "toxresult"]


@EACH
def test_a_version_is_looked_up_with_all_that_any_spelling_has(site, name, asked):
    found = site.get("/spell/dev/%s/%s" % (name, asked)).result
    assert sorted(link["rel"] for link in found["+links"]) == ALL
    assert found["version"] == (asked if asked in (OLD, NEW) else OLD)
    assert {version: len(data["+links"]) for version, data in site.get("/spell/dev/" + name).result.items()} == {
        OLD: 3, NEW: 1, "3.0.0": 1}
    assert site.get("/spell/dev/%s/3.0rc1" % name).status == 404
    document = site.get("/spell/dev/+pypi/%s/%s/json" % (name, asked)).json()
    assert [file["filename"] for file in document["urls"]] == [archive.filename for archive in archives_of(name)[:2]]
    assert document["info"]["summary"].startswith("as 3.0.0-rc.1")


@EACH
def test_a_push_takes_all_of_it(site, name, asked):
    body = {"name": name, "version": asked, "targetindex": "spell/prod"}
    reply = site.request("PUSH", "/spell/dev", body, user="spell")
    assert reply.status == 200, reply
    assert sorted(entry[1] for entry in reply.result) == [
        "register", "register", "store_doczip", "store_releasefile", "store_releasefile", "store_toxresult"]
    assert set(site.get("/spell/prod/" + name).result) == {OLD, NEW}
    assert sorted(rels(site, "spell/prod/%s/%s" % (name, NEW))) == ALL
    assert len(site.filenames("spell/prod", name)) == 2
    assert site.versions("spell/prod", name) == [NEW]


def test_a_push_to_another_server_sends_each_file_with_the_form_of_its_own_spelling(site, name):
    receiver = Receiver().start()
    try:
        reply = site.request("PUSH", "/spell/dev", {
            "name": name, "version": NEW, "posturl": receiver.url + "/", "username": "u", "password": "p"}, user="spell")
        assert reply.status == 200, reply
        assert sorted((request.field(":action"), request.field("version"), request.field("summary") if
                       request.field(":action") == "file_upload" else "") for request in receiver.requests) == [
            ("doc_upload", OLD, ""), ("file_upload", OLD, "as " + OLD), ("file_upload", NEW, "as " + NEW)]
    finally:
        receiver.stop()


@EACH
def test_documentation_is_that_of_the_version(site, name, asked):
    assert site.get("/spell/dev/%s/%s/+doc/index.html?raw" % (name, asked)).body == b"old"
    assert documented(site, name, asked, "new").status == 200
    for spelling in (OLD, NEW):
        assert site.get("/spell/dev/%s/%s/+doc/index.html?raw" % (name, spelling)).body == b"new"
    assert sorted(rels(site, "spell/dev/%s/%s" % (name, asked))) == ALL        # replaced, not added
    assert set(site.get("/spell/dev/" + name).result) == {OLD, NEW, "3.0.0"}


@EACH
def test_a_yank_takes_all_files_of_the_version(site, name, asked):
    reply = site.patch("/spell/dev/%s/%s" % (name, asked), {"yanked": "bad"}, user="spell")
    assert (reply.status, reply.json()["message"]) == (200, "2 files yanked")
    yanked = [file["filename"] for file in site.simple("spell/dev", name)["files"] if file.get("yanked")]
    assert yanked == [archive.filename for archive in archives_of(name)[:2]]


@EACH
def test_a_deletion_takes_all_of_the_version(site, name, asked):
    assert site.delete("/spell/dev/%s/%s" % (name, asked), user="spell").status == 200
    assert list(site.get("/spell/dev/" + name).result) == ["3.0.0"]
    assert site.filenames("spell/dev", name) == [archives_of(name)[2].filename]
    assert site.get("/spell/dev/%s/%s/+doc/index.html" % (name, OLD)).status == 404
    assert site.delete("/spell/dev/%s/%s" % (name, asked), user="spell").status == 404


def test_a_file_that_goes_takes_its_own_spelling_only(site, name):
    archives = archives_of(name)
    assert site.delete(path_of(archives[1], "spell/dev"), user="spell").status == 200
    assert set(site.get("/spell/dev/" + name).result) == {OLD, "3.0.0"}
    assert sorted(rels(site, "spell/dev/%s/%s" % (name, NEW))) == ["doczip", "releasefile", "toxresult"]


def test_trailing_zeros_make_another_version(site):
    for version in ("1.0", "1.0.0"):
        site.upload("spell/dev", wheel("zeros", version))
    assert sorted(rels(site, "spell/dev/zeros/1.0")) == ["releasefile"]
    assert site.delete("/spell/dev/zeros/1.0", user="spell").status == 200
    assert set(site.get("/spell/dev/zeros").result) == {"1.0.0"}


def test_a_mirror_s_release_is_pushed_and_forgotten_in_all_spellings(site):
    with_upstream = Upstream().start()
    try:
        site.add_mirror("spell/mirror", with_upstream)
        first, second = sdist("mirrored", OLD), wheel("mirrored", NEW)
        for archive in (first, second):
            with_upstream.publish(archive)
        assert site.fetch("spell/mirror", second.filename, "mirrored") == second.content
        assert sorted(rels(site, "spell/mirror/mirrored/" + OLD)) == ["releasefile", "releasefile"]
        assert site.delete("/spell/mirror/mirrored/" + OLD, user="spell").status == 200
        assert site.fetch("spell/mirror", second.filename, "mirrored") == second.content
        assert with_upstream.count("*/" + second.filename) == 2
        reply = site.request("PUSH", "/spell/mirror", {
            "name": "mirrored", "version": NEW, "targetindex": "spell/prod"}, user="spell")
        assert reply.status == 200, reply
        assert sorted(site.filenames("spell/prod", "mirrored")) == sorted([first.filename, second.filename])
        assert set(site.get("/spell/prod/mirrored").result) == {OLD, NEW}
    finally:
        with_upstream.stop()
