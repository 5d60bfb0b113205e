"""PyPI's JSON API, for stages, mirrors and indexes with bases [W12.5]."""

import dataclasses
import datetime
import hashlib
import itertools
import urllib.parse

import pytest

from harness import path_of, sdist, upload, wheel

TOP_KEYS = {"info", "last_serial", "ownership", "releases", "urls", "vulnerabilities"}
INFO_KEYS = set(
    "author author_email bugtrack_url classifiers description description_content_type docs_url download_url downloads dynamic "
    "home_page keywords license license_expression license_files maintainer maintainer_email name package_url platform project_url "
    "project_urls provides_extra release_url requires_dist requires_python summary version yanked yanked_reason".split())
FILE_KEYS = set(
    "comment_text core-metadata digests downloads filename has_sig md5_digest packagetype python_version requires_python size "
    "upload_time upload_time_iso_8601 url yanked yanked_reason".split())
FIELDS = {
    "author": "Ann Author",
    "author_email": "ann@example.org",
    "maintainer": "Max Maintainer",
    "maintainer_email": "max@example.org",
    "summary": "Does it all",
    "description": "# Title\n\nText with \u00fcml\u00e4uts.\n",
    "description_content_type": "text/markdown; charset=UTF-8; variant=GFM",
    "keywords": "one,two",
    "license": "MIT",
    "home_page": "https://example.org/home",
    "download_url": "https://example.org/get",
    "classifiers": ["Framework :: Pytest", "Programming Language :: Python :: 3"],
    "requires_dist": ["pluggy>=1.0", 'rich; extra == "fancy"'],
    "provides_extra": ["fancy"],
    "project_urls": ["Source, https://example.org/source", "Issues, https://example.org/issues"],
    "requires_python": ">=3.8",
}
SAME = (
    "author author_email maintainer maintainer_email summary description description_content_type keywords license home_page "
    "download_url classifiers requires_dist provides_extra requires_python".split())
numbers = itertools.count(1)


@pytest.fixture(scope="module")
def site(shared_server):
    """A server with `json/dev`, and the user `stranger`."""
    shared_server.add_user("json")
    shared_server.add_user("stranger")
    shared_server.add_index("json/dev")
    return shared_server


@pytest.fixture
def index(site):
    """A stage of the test's own."""
    name = "json/own%d" % next(numbers)
    site.add_index(name)
    return name


def url_of(index, project, version=None, form="+pypi"):
    return "/".join(["", index, form, project] + ([version] if version else []) + ["json"])


def document(server, index, project, version=None, **options):
    reply = server.get(url_of(index, project, version), **options)
    assert (reply.status, reply.headers["Content-Type"]) == (200, "application/json"), reply
    return reply.json()


def filenames(files):
    return sorted(file["filename"] for file in files)


def content_of(server, file, **options):
    assert file["url"].startswith(server.url + "/"), file["url"]
    reply = server.get(urllib.parse.urlsplit(file["url"]).path, headers={"Accept": "*/*"}, **options)
    assert reply.status == 200, reply
    return reply.body


def yank(server, index, project, version, value=True):
    reply = server.patch("/%s/%s/%s" % (index, project, version), {"yanked": value}, user=index.partition("/")[0])
    assert reply.status == 200, reply


def missing(reply):
    """Whether it is a 404 with a sentence."""
    assert reply.status == 404, reply
    return isinstance(reply.json()["message"], str) and reply.json()["message"] != ""


# What is in it


def test_every_key_of_a_project(site):
    upload(site, "json/dev", wheel("Every.Key", "1.0"))
    for accept in ("application/json", "*/*", None):
        reply = site.get(url_of("json/dev", "every-key"), headers={"Accept": accept})
        assert (reply.status, reply.headers["Content-Type"]) == (200, "application/json")
        assert set(reply.json()) == TOP_KEYS
    result = reply.json()
    assert set(result["info"]) == INFO_KEYS
    assert result["vulnerabilities"] == []
    assert isinstance(result["last_serial"], int) and not isinstance(result["last_serial"], bool)
    assert list(result["releases"]) == ["1.0"]
    assert result["releases"]["1.0"] == result["urls"]
    [file] = result["urls"]
    assert set(file) - {"core-metadata"} == FILE_KEYS - {"core-metadata"}


def test_a_version_has_its_own_files_and_no_list_of_releases(site):
    archives = [wheel("two-versions", "1.0"), wheel("two-versions", "2.0")]
    upload(site, "json/dev", *archives)
    project = document(site, "json/dev", "two-versions")
    assert project["info"]["version"] == "2.0"
    assert filenames(project["urls"]) == [archives[1].filename]
    for archive in archives:
        result = document(site, "json/dev", "two-versions", archive.version)
        assert set(result) == TOP_KEYS - {"releases"}
        assert result["info"]["version"] == archive.version
        assert result["urls"] == project["releases"][archive.version]
        assert filenames(result["urls"]) == [archive.filename]
    assert document(site, "json/dev", "two-versions", "2.0")["info"] == project["info"]


def test_the_metadata_of_the_form_is_the_info(site):
    archive = wheel("Informed_Project", "1.0", requires_python=">=3.8", requires_dist=FIELDS["requires_dist"])
    upload(site, "json/dev", archive, fields=FIELDS)
    info = document(site, "json/dev", "informed-project")["info"]
    assert {key: info[key] for key in SAME} == {key: FIELDS[key] for key in SAME}
    assert info["name"] == "Informed_Project"
    assert info["version"] == "1.0"
    assert info["project_urls"] == {"Source": "https://example.org/source", "Issues": "https://example.org/issues"}
    assert info["downloads"] == {"last_day": -1, "last_week": -1, "last_month": -1}
    assert (info["bugtrack_url"], info["yanked"], info["yanked_reason"]) == (None, False, None)


def test_a_licence_as_an_expression_and_its_files(site):
    archive = wheel("licensed", "1.0", metadata_version="2.4")
    upload(site, "json/dev", archive, fields={"license_expression": "MIT OR Apache-2.0", "license_file": ["LICENSE"]})
    info = document(site, "json/dev", "licensed")["info"]
    assert (info["license_expression"], info["license_files"]) == ("MIT OR Apache-2.0", ["LICENSE"])


def test_what_was_not_given_is_empty(site):
    upload(site, "json/dev", wheel("bare", "1.0"))
    info = document(site, "json/dev", "bare")["info"]
    for key in SAME:
        assert key == "summary" or not info[key], key
    assert info["classifiers"] == []
    assert not (info["project_urls"] or info["license_expression"] or info["license_files"] or info["dynamic"] or info["docs_url"])


def test_the_info_links_to_its_own_pages(site):
    upload(site, "json/dev", wheel("linking", "1.0"))
    info = document(site, "json/dev", "linking")["info"]
    for key, page in (("package_url", "linking"), ("project_url", "linking"), ("release_url", "linking/1.0")):
        assert info[key].rstrip("/") == "%s/json/dev/%s" % (site.url, page)
    proxied = document(site, "json/dev", "linking", headers={"X-Outside-URL": "https://index.example.org/sub"})
    assert proxied["info"]["release_url"].rstrip("/") == "https://index.example.org/sub/json/dev/linking/1.0"
    assert proxied["urls"][0]["url"].startswith("https://index.example.org/sub/json/dev/+f/")


@pytest.mark.parametrize("make, kind, python", [(wheel, "bdist_wheel", "py3"), (sdist, "sdist", "source")])
def test_a_file(site, make, kind, python):
    project = "filed-" + kind.replace("_", "-")
    archive = make(project, "1.0", requires_python=">=3.8")
    before = datetime.datetime.now(datetime.timezone.utc)
    upload(site, "json/dev", archive)
    [file] = document(site, "json/dev", project)["urls"]
    shown = {key: file[key] for key in ("filename", "packagetype", "python_version", "requires_python", "size", "has_sig", "downloads")}
    assert shown == {
        "filename": archive.filename, "packagetype": kind, "python_version": python, "requires_python": ">=3.8",
        "size": len(archive.content), "has_sig": False, "downloads": -1}
    assert (file["comment_text"] or "", file["yanked"], file["yanked_reason"]) == ("", False, None)
    assert content_of(site, file) == archive.content
    uploaded = datetime.datetime.strptime(file["upload_time_iso_8601"], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=datetime.timezone.utc)
    assert before <= uploaded <= datetime.datetime.now(datetime.timezone.utc)
    assert file["upload_time"] == file["upload_time_iso_8601"][:19]
    assert file["upload_time_iso_8601"] == site.simple("json/dev", project)["files"][0]["upload-time"]
    if make is wheel:
        assert file["core-metadata"] == {"sha256": hashlib.sha256(archive.metadata).hexdigest()}
    else:
        assert not file.get("core-metadata")


def test_digests_of_a_file(site):
    """sha256 always; the others are right if they are there."""
    archive = sdist("digested", "1.0")
    upload(site, "json/dev", archive)
    [file] = document(site, "json/dev", "digested")["urls"]
    assert file["digests"]["sha256"] == archive.sha256
    assert set(file["digests"]) <= {"sha256", "md5", "blake2b_256"}
    assert file["digests"].get("md5") in (None, archive.md5)
    assert file["digests"].get("blake2b_256") in (None, hashlib.blake2b(archive.content, digest_size=32).hexdigest())
    assert file["md5_digest"] == file["digests"].get("md5")


def test_documentation_and_test_results_are_no_release_files(site):
    archive = wheel("withothers", "1.0")
    upload(site, "json/dev", archive)
    form = {":action": "doc_upload", "name": "withothers", "version": "1.0"}
    assert site.post_form("json/dev", form, {"content": ("withothers.zip", b"123")}).status == 200
    [file] = document(site, "json/dev", "withothers")["urls"]
    assert site.post(urllib.parse.urlsplit(file["url"]).path, {"testenvs": {}}).status == 200
    assert filenames(document(site, "json/dev", "withothers")["urls"]) == [archive.filename]


# Which version is the latest


@pytest.mark.parametrize("versions, yanked, latest", [
    (["1.0", "10.0", "9.0"], [], "10.0"),
    (["1.0", "2.0rc1", "2.0.dev1"], [], "1.0"),
    (["1.0rc1", "1.0a1", "1.0.dev3"], [], "1.0rc1"),
    (["1.0", "1.0.post1", "0.9+local"], [], "1.0.post1"),
    (["1!0.1", "2024.1"], [], "1!0.1"),
    (["1.0", "2.0"], ["2.0"], "1.0"),
    (["1.0", "2.0rc1"], ["1.0"], "2.0rc1"),
    (["1.0", "2.0", "3.0rc1"], ["1.0", "2.0", "3.0rc1"], "2.0")])
def test_the_latest_version_is_final_if_it_can_be_and_yanked_if_it_must(site, index, versions, yanked, latest):
    archives = {version: sdist("choose", version) for version in versions}
    upload(site, index, *archives.values())
    for version in yanked:
        yank(site, index, "choose", urllib.parse.quote(version))
    result = document(site, index, "choose")
    assert result["info"]["version"] == latest
    assert filenames(result["urls"]) == [archives[latest].filename]
    assert {version: filenames(files) for version, files in result["releases"].items()} == {
        version: [archive.filename] for version, archive in archives.items()}


def test_a_yanked_release_says_so_and_why(site, index):
    upload(site, index, wheel("pulled", "1.0"), wheel("pulled", "2.0"), wheel("pulled", "3.0"))
    yank(site, index, "pulled", "1.0", "breaks things")
    yank(site, index, "pulled", "2.0")
    for version, marks in (("1.0", (True, "breaks things")), ("2.0", (True, None)), ("3.0", (False, None))):
        result = document(site, index, "pulled", version)
        [file] = result["urls"]
        assert (file["yanked"], file["yanked_reason"] or None) == marks
        assert (result["info"]["yanked"], result["info"]["yanked_reason"] or None) == marks
        assert content_of(site, file)
    yank(site, index, "pulled", "1.0", False)
    assert document(site, index, "pulled", "1.0")["info"]["yanked"] is False


def test_a_release_with_one_yanked_file_of_two_is_not_yanked(site, index):
    archives = [wheel("halfpulled", "1.0"), sdist("halfpulled", "1.0")]
    upload(site, index, *archives)
    path = path_of(archives[0], index)
    assert site.patch(path + "?yank=bad+tags", user="json").status == 200
    result = document(site, index, "halfpulled")
    assert result["info"]["yanked"] is False
    assert {file["filename"]: (file["yanked"], file["yanked_reason"]) for file in result["urls"]} == {
        archives[0].filename: (True, "bad tags"), archives[1].filename: (False, None)}


# Addresses


@pytest.mark.parametrize("form", ["+pypi", "pypi"])
def test_both_addresses_give_the_same(site, form):
    upload(site, "json/dev", wheel("twoways", "1.0"))
    for version in (None, "1.0"):
        reply = site.get(url_of("json/dev", "twoways", version, form))
        assert (reply.status, reply.json()) == (200, document(site, "json/dev", "twoways", version))


@pytest.mark.parametrize("form", ["+pypi", "pypi"])
@pytest.mark.parametrize("version", [None, "1.0"])
def test_an_unnormalised_name_is_redirected(site, form, version):
    upload(site, "json/dev", wheel("Spelled.Name", "1.0"))
    for spelling in ("Spelled.Name", "spelled_name", "SPELLED--NAME", "unknown_name"):
        reply = site.get(url_of("json/dev", spelling, version, form))
        norm = "unknown-name" if spelling == "unknown_name" else "spelled-name"
        assert (reply.status, reply.headers["Location"]) == (302, site.url + url_of("json/dev", norm, version, form))
    assert site.get(url_of("json/dev", "Spelled.Name", version, form), follow=True).json()["info"]["name"] == "Spelled.Name"


def test_a_local_version_in_the_address(site):
    archive = wheel("localized", "1.0+abc.1")
    upload(site, "json/dev", archive)
    for version in ("1.0+abc.1", "1.0%2Babc.1"):
        assert filenames(document(site, "json/dev", "localized", version)["urls"]) == [archive.filename]


def test_projects_named_as_the_address_are_still_projects(site, index):
    upload(site, index, wheel("pypi", "1.0"), wheel("json", "1.0"))
    assert site.get("/%s/pypi/1.0" % index).result["name"] == "pypi"
    assert set(site.get("/%s/pypi" % index).result) == {"1.0"}
    assert missing(site.get("/%s/pypi/json" % index))
    for form in ("pypi", "+pypi"):
        for project in ("pypi", "json"):
            assert site.get(url_of(index, project, None, form)).json()["info"]["name"] == project
            assert site.get(url_of(index, project, "1.0", form)).json()["info"]["name"] == project


@pytest.mark.parametrize("path", [
    "/json/dev/+pypi/unknown/json", "/json/dev/+pypi/unknown/1.0/json", "/json/dev/+pypi/known/9.9/json", "/json/dev/+pypi/known/1/json",
    "/json/dev/pypi/unknown/json", "/json/dev/pypi/known/9.9/json", "/json/none/+pypi/known/json", "/nobody/dev/+pypi/known/json",
    "/json/dev/+pypi/known", "/json/dev/+pypi/known/1.0", "/json/dev/+pypi", "/json/dev/+pypi/", "/json/dev/+pypi/known/1.0/json/more",
    "/+pypi/known/json", "/pypi/known/json"])
def test_what_is_not_there_is_404(site, path):
    upload(site, "json/dev", wheel("known", "1.0"))
    assert document(site, "json/dev", "known", "1.0")
    assert missing(site.get(path))


def test_a_deleted_version_and_a_deleted_project_are_404(site, index):
    upload(site, index, wheel("shrinking", "1.0"), wheel("shrinking", "2.0"))
    assert site.delete("/%s/shrinking/2.0" % index, user="json").status == 200
    assert missing(site.get(url_of(index, "shrinking", "2.0")))
    assert list(document(site, index, "shrinking")["releases"]) == ["1.0"]
    assert site.delete("/%s/shrinking" % index, user="json").status == 200
    assert missing(site.get(url_of(index, "shrinking")))


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("form", ["+pypi", "pypi"])
def test_it_is_for_reading_only(site, method, form):
    upload(site, "json/dev", wheel("readonly", "1.0"))
    before = site.get("/+api").headers["X-DEVPI-SERIAL"]
    for version in (None, "1.0"):
        reply = site.request(method, url_of("json/dev", "readonly", version, form), {}, user="json")
        assert (reply.status, reply.headers["X-DEVPI-SERIAL"]) == (404, before)
    assert filenames(document(site, "json/dev", "readonly")["urls"]) == [wheel("readonly", "1.0").filename]


def test_head_is_get_without_the_body(site):
    upload(site, "json/dev", wheel("headed", "1.0"))
    full, head = [site.request(method, url_of("json/dev", "headed")) for method in ("GET", "HEAD")]
    assert (head.status, head.body) == (200, b"")
    for name in ("Content-Type", "Content-Length", "ETag", "Cache-Control"):
        assert head.headers[name] == full.headers[name]


# Validation by clients and caches


@pytest.mark.parametrize("version", [None, "1.0"])
def test_what_has_not_changed_is_not_sent_again(site, index, version):
    upload(site, index, wheel("cached", "1.0"))
    url = url_of(index, "cached", version)
    tag = site.get(url).headers["ETag"]
    assert tag
    reply = site.get(url, headers={"If-None-Match": tag})
    assert (reply.status, reply.body, reply.headers["ETag"], reply.headers["Content-Type"]) == (304, b"", tag, None)
    upload(site, index, sdist("cached", "1.0"))
    reply = site.get(url, headers={"If-None-Match": tag})
    assert (reply.status, len(reply.json()["urls"])) == (200, 2)
    changed = reply.headers["ETag"]
    assert changed != tag
    yank(site, index, "cached", "1.0")
    reply = site.get(url, headers={"If-None-Match": changed})
    assert (reply.status, reply.json()["info"]["yanked"]) == (200, True)


def test_the_address_that_was_asked_is_part_of_the_tag(site, index):
    """The links differ with the host, so its answers must not be taken for each other's."""
    upload(site, index, wheel("hosted", "1.0"))
    url, there = url_of(index, "hosted"), {"X-Outside-URL": "https://index.example.org"}
    assert site.get(url).headers["ETag"] != site.get(url, headers=there).headers["ETag"]


# Who may read


def test_a_restricted_index(site):
    site.add_index("json/closed", acl_pkg_read=["json"])
    archive = wheel("closed", "1.0")
    upload(site, "json/closed", archive)
    for project, version in (("closed", None), ("closed", "1.0"), ("unknown", None)):
        for form in ("+pypi", "pypi"):
            url = url_of("json/closed", project, version, form)
            reply = site.get(url)
            assert (reply.status, reply.headers["WWW-Authenticate"]) == (401, 'Basic realm="pypi"')
            assert site.get(url, user="stranger").status == 403
    reply = site.get(url_of("json/closed", "closed"), user="json", password="wrong")
    assert (reply.status, reply.headers["WWW-Authenticate"]) == (401, 'Basic realm="pypi"')
    for user in ("json", "root"):
        reply = site.get(url_of("json/closed", "closed"), user=user)
        assert reply.status == 200
        assert "private" in reply.headers["Cache-Control"] and "public" not in reply.headers["Cache-Control"]
        assert content_of(site, reply.json()["urls"][0], user=user) == archive.content


def test_a_restricted_base_with_the_project_closes_the_page(site, index):
    site.add_index("json/hiddenbase", acl_pkg_read=["json"])
    site.add_index("json/overhidden", bases=["json/hiddenbase"])
    upload(site, "json/hiddenbase", wheel("inhidden", "1.0"))
    upload(site, "json/overhidden", wheel("inopen", "1.0"))
    assert [site.get(url_of("json/overhidden", "inhidden"), user=user).status for user in (None, "stranger", "json")] == [401, 403, 200]
    assert document(site, "json/overhidden", "inopen")["info"]["version"] == "1.0"


# Mirrors


@pytest.fixture
def mirror(site, upstream):
    name = "json/mirror%d" % next(numbers)
    site.add_mirror(name, upstream)
    return name


@pytest.mark.parametrize("mode", ["json", "html"])
def test_a_project_of_a_mirror(site, mirror, upstream, mode):
    upstream.mode = mode
    old = upstream.publish("mirrored", "1.0", yanked="too old")
    new = upstream.publish(wheel("mirrored", "2.0"), requires_python=">=3.8")
    upstream.publish(sdist("mirrored", "3.0b1"))
    result = document(site, mirror, "mirrored")
    assert (set(result), set(result["info"])) == (TOP_KEYS, INFO_KEYS)
    assert (result["info"]["name"], result["info"]["version"], result["info"]["requires_python"]) == ("mirrored", "2.0", ">=3.8")
    assert set(result["releases"]) == {"1.0", "2.0", "3.0b1"}
    [file] = result["urls"]
    assert result["releases"]["2.0"] == [file]
    assert set(file) - {"core-metadata"} == FILE_KEYS - {"core-metadata"}
    assert (file["filename"], file["requires_python"], file["packagetype"]) == (new.filename, ">=3.8", "bdist_wheel")
    assert (file["digests"]["sha256"], file["yanked"], file["yanked_reason"]) == (new.sha256, False, None)
    if mode == "json":
        assert (file["size"], file["upload_time_iso_8601"]) == (len(new.content), "2024-01-02T03:04:05.678901Z")
        assert file["upload_time"] == "2024-01-02T03:04:05"
    assert file["url"].startswith("%s/%s/+f/" % (site.url, mirror))
    assert content_of(site, file) == new.content
    yanked = document(site, mirror, "mirrored", "1.0")
    assert [(file["filename"], file["yanked"], file["yanked_reason"]) for file in yanked["urls"]] == [(old.filename, True, "too old")]
    assert (yanked["info"]["yanked"], yanked["info"]["yanked_reason"]) == (True, "too old")


def test_what_upstream_does_not_have_is_404(site, mirror, upstream):
    upstream.publish("elsewhere", "1.0")
    assert document(site, mirror, "elsewhere")
    assert missing(site.get(url_of(mirror, "elsewhere", "9.9")))
    assert missing(site.get(url_of(mirror, "unheard-of")))


def test_an_upstream_that_fails_is_no_404(site, mirror, upstream):
    upstream.publish("unlucky", "1.0")
    upstream.fault("500")
    assert [site.get(url_of(mirror, "unlucky", version)).status for version in (None, "1.0")] == [502, 502]
    upstream.clear_faults()


def test_what_a_mirror_knows_survives_its_upstream(site, upstream):
    site.add_mirror("json/lasting", upstream, mirror_cache_expiry=0)
    archive = upstream.publish("remembered", "1.0")
    assert filenames(document(site, "json/lasting", "remembered")["urls"]) == [archive.filename]
    upstream.stop()
    assert filenames(document(site, "json/lasting", "remembered")["urls"]) == [archive.filename]


# Bases


def test_the_bases_are_part_of_it(site, index):
    archives = [wheel("inherited", "1.0"), wheel("inherited", "2.0"), sdist("inherited", "2.0")]
    for name in ("json/child", "json/grandchild"):
        site.add_index(name, bases=[index if name == "json/child" else "json/child"])
    upload(site, index, archives[0], archives[1])
    upload(site, "json/child", archives[2], fields={"summary": "of the child"})
    result = document(site, "json/grandchild", "inherited")
    assert set(result["releases"]) == {"1.0", "2.0"}
    assert (result["info"]["version"], result["info"]["summary"]) == ("2.0", "of the child")
    assert filenames(result["urls"]) == sorted(archive.filename for archive in archives[1:])
    for file in result["urls"]:
        owner = "json/child" if file["filename"].endswith(".gz") else index
        assert file["url"].startswith("%s/%s/+f/" % (site.url, owner))
        assert hashlib.sha256(content_of(site, file)).hexdigest() == file["digests"]["sha256"]
    assert filenames(document(site, "json/grandchild", "inherited", "1.0")["urls"]) == [archives[0].filename]
    assert filenames(document(site, index, "inherited", "2.0")["urls"]) == [archives[1].filename]


def test_the_same_file_name_counts_once_and_the_first_index_wins(site, index):
    site.add_index("json/upper", bases=[index])
    mine, theirs = wheel("shadowed", "1.0", summary="mine"), wheel("shadowed", "1.0", summary="theirs")
    upload(site, "json/upper", mine)
    upload(site, index, theirs)
    [file] = document(site, "json/upper", "shadowed")["urls"]
    assert file["digests"]["sha256"] == mine.sha256


def test_a_private_project_blocks_the_mirror(site, index, mirror, upstream):
    site.add_index("json/guarded", bases=[index, mirror])
    own, public = wheel("acme", "1.0"), upstream.publish("acme", "9.9")
    upload(site, index, own)
    result = document(site, "json/guarded", "acme")
    assert (result["info"]["version"], list(result["releases"]), filenames(result["urls"])) == ("1.0", ["1.0"], [own.filename])
    assert missing(site.get(url_of("json/guarded", "acme", "9.9")))
    assert upstream.count("/simple/acme*") == 0
    assert site.patch("/json/guarded", {"mirror_whitelist": ["acme"]}, user="json").status == 200
    result = document(site, "json/guarded", "acme")
    assert (result["info"]["version"], set(result["releases"])) == ("9.9", {"1.0", "9.9"})
    assert filenames(document(site, "json/guarded", "acme", "9.9")["urls"]) == [public.filename]
    assert site.delete("/json/guarded", user="json").status == 201


def test_a_project_that_only_the_mirror_has_comes_through(site, mirror, upstream):
    site.add_index("json/through", bases=[mirror])
    archive = upstream.publish("publiconly", "1.0")
    [file] = document(site, "json/through", "publiconly")["urls"]
    assert (file["filename"], content_of(site, file)) == (archive.filename, archive.content)
    assert missing(site.get(url_of("json/through", "neither")))


# Awkward contents


@pytest.mark.parametrize("fields", [
    {"project_urls": ["no comma", ", https://example.org/nameless", "Name,", "A, https://a.example", "A, https://b.example"]},
    {"description": "x" * 200000 + "\u2028</script>\x7f"},
    {"keywords": '"quoted" \\ {json}'},
    {"author_email": "Ann <ann@example.org>, Bob <bob@example.org>"},
    {"requires_dist": ["not a requirement !!", "also;;not"]},
    {"requires_python": "whatever"},
    {"classifiers": ["", "One"]}])
def test_any_metadata_makes_valid_json(site, index, fields):
    archive = wheel("awkward", "1.0")
    upload(site, index, archive, fields=fields)
    result = document(site, index, "awkward")
    [key] = fields
    if key == "project_urls":
        assert isinstance(result["info"][key], dict)
    elif key == "classifiers":
        assert result["info"][key] == ["One"]
    else:
        assert result["info"][key] == fields[key]
    assert filenames(result["urls"]) == [archive.filename]


def test_a_file_whose_contents_cannot_be_read_is_listed_all_the_same(site, index):
    content = b"no archive at all"
    archive = dataclasses.replace(sdist("opaque", "1.0"), filename="opaque-1.0.exe", content=content)
    upload(site, index, archive)
    [file] = document(site, index, "opaque")["urls"]
    assert (file["packagetype"], file["size"], file["digests"]["sha256"]) == ("bdist_dumb", len(content), archive.sha256)
