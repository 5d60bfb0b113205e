"""Yanking own releases and files (PEP 592), and the status of a project (PEP 792)."""

import contextlib
import html.parser
import json
import re
import time

import pytest

from harness import OWNER, SIMPLE_JSON, links, path_of, sdist, serial, upload, wheel
from receiver import Receiver


@pytest.fixture(scope="module")
def site(shared_server):
    """`ya/dev` (volatile) and `ya/stable` (not), where `helper` may upload and `ya`, their owner, may not; `ya/child` on both."""
    for name in ("ya", "helper", "foreign"):
        shared_server.add_user(name)
        shared_server.login(name, "pw")
    shared_server.login("root", "secret")
    shared_server.add_index("ya/dev", acl_upload=["helper"])
    shared_server.add_index("ya/stable", volatile=False, acl_upload=["helper"])
    shared_server.add_index("ya/child", bases=["ya/dev", "ya/stable"])
    return shared_server


def patch(server, path, body=None, user=OWNER):
    return server.patch(path, body, user="ya" if user is OWNER else user)


def yank(server, path, yanked, **options):
    return patch(server, path, {"yanked": yanked}, **options)


def set_status(server, path, status, *reason, **options):
    body = {"status": status, "reason": reason[0]} if reason else {"status": status}
    return patch(server, path, {"project-status": body}, **options)


def is_done(reply):
    """Whether the change was made; the answer then says so in a sentence."""
    message = reply.json()["message"]
    assert isinstance(message, str) and message.strip()
    assert reply.headers["Content-Type"] == "application/json"
    return reply.status == 200


def get(server, path, **options):
    return server.get(path, headers={"Accept": "*/*"}, **options)


def yanked(server, index, name):
    """{file name: its "yanked"}; files that say nothing are left out."""
    return {file["filename"]: file["yanked"] for file in server.simple(index, name)["files"] if "yanked" in file}


class Page(html.parser.HTMLParser):
    """A simple page in HTML: `links` has the attributes of each, by file name, `metas` the content of each meta tag, by name."""

    def __init__(self, server, index, name):
        super().__init__()
        self.links, self.metas, self.link = {}, {}, None
        reply = server.get("/%s/+simple/%s/" % (index, name), headers={"Accept": "text/html"})
        assert reply.status == 200, reply
        self.feed(reply.text)

    def handle_starttag(self, tag, attributes):
        if tag == "a":
            self.link = dict(attributes)
        elif tag == "meta":
            self.metas[dict(attributes).get("name")] = dict(attributes).get("content")

    def handle_data(self, text):
        if self.link is not None:
            self.links[text], self.link = self.link, None


def history(server, index, name, version):
    """The entries after the upload of each file."""
    found = links(server, "%s/%s/%s" % (index, name, version))
    return [[dict(entry, when=len(entry["when"])) for entry in link["log"][1:]] for link in found]


@contextlib.contextmanager
def unchanged(server, index=None, name=None):
    """Neither the serial nor the project's page changes."""
    before = serial(server), server.simple(index, name) if index else None
    yield
    assert (serial(server), server.simple(index, name) if index else None) == before


@pytest.fixture(scope="module")
def demo(site):
    """A release `demo` 1.0 of ya/dev, for the tests that leave it as it is."""
    return release(site, "ya/dev", "demo")


def release(server, index, name, version="1.0"):
    """A wheel and an sdist, uploaded."""
    archives = [wheel(name, version), sdist(name, version)]
    upload(server, index, *archives, user="helper")
    return archives


# -- yanking a release --------------------------------------------------------------------------------


@pytest.mark.parametrize("value, in_json, in_html", [
    (True, True, ""), ("broken build", "broken build", "broken build"), ("", True, ""),
    ('a "b" <c> & d, ü', 'a "b" <c> & d, ü', 'a "b" <c> & d, ü')])
def test_a_yanked_release_is_marked_on_its_pages_and_stays_to_be_had(site, value, in_json, in_html):
    first, second = release(site, "ya/dev", "marked")
    (other,) = [wheel("marked", "2.0")]
    upload(site, "ya/dev", other, user="helper")
    before = site.simple("ya/dev", "marked")
    assert is_done(yank(site, "/ya/dev/marked/1.0", value))

    after = site.simple("ya/dev", "marked")
    assert [file.pop("yanked", None) for file in after["files"]] == [in_json, in_json, None]
    assert after == before
    shown = Page(site, "ya/dev", "marked").links
    assert {name: link.get("data-yanked") for name, link in shown.items()} == {
        first.filename: in_html, second.filename: in_html, other.filename: None}
    assert "data-yanked" not in shown[other.filename]
    for archive in (first, second):
        assert site.fetch("ya/dev", archive.filename, "marked") == archive.content
    assert site.delete("/ya/dev/marked", user="ya").status == 200


def test_unyanking_takes_the_mark_away(site):
    release(site, "ya/dev", "pardoned")
    before = site.simple("ya/dev", "pardoned")
    yank(site, "/ya/dev/pardoned/1.0", "by mistake")
    assert len(yanked(site, "ya/dev", "pardoned")) == 2
    assert is_done(yank(site, "/ya/dev/pardoned/1.0", False))
    assert site.simple("ya/dev", "pardoned") == before
    assert all("data-yanked" not in link for link in Page(site, "ya/dev", "pardoned").links.values())


def test_a_new_reason_takes_the_place_of_the_old_one(site):
    names = [archive.filename for archive in release(site, "ya/dev", "reasoned")]
    for value in ("one", "two", True, "three"):
        before = serial(site)
        assert is_done(yank(site, "/ya/dev/reasoned/1.0", value))
        assert yanked(site, "ya/dev", "reasoned") == dict.fromkeys(names, value)
        assert serial(site) == before + 1


def test_only_the_files_that_are_there_are_yanked(site):
    first, later = wheel("present", "1.0"), sdist("present", "1.0")
    upload(site, "ya/dev", first, user="helper")
    yank(site, "/ya/dev/present/1.0", "old")
    assert site.get("/ya/dev/present/1.0").result["yanked"] == "old"
    upload(site, "ya/dev", later, user="helper")
    assert yanked(site, "ya/dev", "present") == {first.filename: "old"}
    assert "yanked" not in site.get("/ya/dev/present/1.0").result


@pytest.mark.parametrize("spelling", ["Yank.Spelt", "yank-spelt", "YANK__spelt"])
def test_the_name_may_be_spelt_in_any_way(site, spelling):
    names = [archive.filename for archive in release(site, "ya/dev", "Yank.Spelt")]
    yank(site, "/ya/dev/yank-spelt/1.0", False)
    assert is_done(yank(site, "/ya/dev/%s/1.0/" % spelling, spelling))
    assert yanked(site, "ya/dev", "yank-spelt") == dict.fromkeys(names, spelling)


def test_a_local_version_is_yanked_and_no_other(site):
    archive, other = wheel("local", "1.0+abc"), wheel("local", "1.0")
    upload(site, "ya/dev", archive, other, user="helper")
    assert is_done(yank(site, "/ya/dev/local/1.0+abc", "x"))
    assert yanked(site, "ya/dev", "local") == {archive.filename: "x"}
    assert is_done(yank(site, "/ya/dev/local/1.0%2Babc", False))
    assert yanked(site, "ya/dev", "local") == {}


@pytest.mark.parametrize("value", [True, "broken build"])
def test_version_data_says_yanked_when_all_its_files_are(site, value):
    first, _ = release(site, "ya/dev", "verdata")
    before = site.get("/ya/dev/verdata/1.0").result
    assert "yanked" not in before
    patch(site, path_of(first, "ya/dev") + "?yank=only%20one")
    assert "yanked" not in site.get("/ya/dev/verdata/1.0").result
    yank(site, "/ya/dev/verdata/1.0", value)
    shown = site.get("/ya/dev/verdata/1.0").result
    assert shown["yanked"] == value
    assert {key for key in shown if key != "yanked"} == set(before)
    assert site.get("/ya/dev/verdata").result["1.0"]["yanked"] == value
    yank(site, "/ya/dev/verdata/1.0", False)
    assert "yanked" not in site.get("/ya/dev/verdata/1.0").result
    assert site.delete("/ya/dev/verdata", user="ya").status == 200


def test_the_history_tells_who_yanked_why_and_who_took_it_back(site):
    archives = release(site, "ya/dev", "told")
    start = list(time.gmtime(time.time() - 2)[:6])
    yank(site, "/ya/dev/told/1.0", "bad build", user="helper")
    yank(site, "/ya/dev/told/1.0", False, user="root")
    patch(site, path_of(archives[0], "ya/dev") + "?yank")
    entries = history(site, "ya/dev", "told", "1.0")
    both = [{"what": "yank", "who": "helper", "when": 6, "reason": "bad build"}, {"what": "unyank", "who": "root", "when": 6}]
    for entry in [entry for log in entries for entry in log[1:]]:
        assert not entry.pop("reason", None)  # none was given: missing, null or empty
    assert entries == [both + [{"what": "yank", "who": "ya", "when": 6}], both]
    for link in links(site, "ya/dev/told/1.0"):
        assert all(start <= entry["when"] <= list(time.gmtime()[:6]) for entry in link["log"][1:])


def test_the_history_keeps_its_beginning_and_the_newest_of_many_entries(site):
    release(site, "ya/dev", "toggled")
    for number in range(60):
        for reason in ("turn %d" % number, False):
            yank(site, "/ya/dev/toggled/1.0", reason)
    for link in links(site, "ya/dev/toggled/1.0"):
        assert [entry["what"] for entry in link["log"][:1] + link["log"][-2:]] == ["upload", "yank", "unyank"]
        assert (len(link["log"]), link["log"][-2]["reason"]) == (100, "turn 59")


@pytest.mark.parametrize("value", [True, "same", False])
def test_asking_for_what_is_so_already_changes_nothing(site, value):
    release(site, "ya/dev", "already")
    yank(site, "/ya/dev/already/1.0", value)
    before = history(site, "ya/dev", "already", "1.0")
    with unchanged(site, "ya/dev", "already"):
        assert is_done(yank(site, "/ya/dev/already/1.0", value))
    assert history(site, "ya/dev", "already", "1.0") == before


def test_a_non_volatile_index_lets_releases_be_yanked_without_force(site):
    first, second = release(site, "ya/stable", "unforced")
    assert is_done(yank(site, "/ya/stable/unforced/1.0", "x"))
    assert yanked(site, "ya/stable", "unforced") == {first.filename: "x", second.filename: "x"}
    assert is_done(patch(site, path_of(first, "ya/stable") + "?unyank"))
    assert yanked(site, "ya/stable", "unforced") == {second.filename: "x"}


def test_the_identical_upload_to_a_non_volatile_index_does_not_unyank(site):
    archives = release(site, "ya/stable", "again")
    yank(site, "/ya/stable/again/1.0", "x")
    with unchanged(site, "ya/stable", "again"):
        upload(site, "ya/stable", *archives, user="helper")


def test_a_deleted_release_takes_its_mark_with_it(site):
    release(site, "ya/dev", "revived")
    yank(site, "/ya/dev/revived/1.0", "x")
    assert site.delete("/ya/dev/revived/1.0", user="ya").status == 200
    release(site, "ya/dev", "revived")
    assert yanked(site, "ya/dev", "revived") == {}


def test_indexes_built_on_it_show_the_mark_at_once_cached_pages_included(site):
    first, second = release(site, "ya/dev", "inherited")
    seen = {}
    for index in ("ya/dev", "ya/child"):
        path = "/%s/+simple/inherited/" % index
        for accept in (SIMPLE_JSON, "text/html"):
            seen[path, accept] = site.get(path, headers={"Accept": accept}).headers["ETag"]
    yank(site, "/ya/dev/inherited/1.0", "x")
    assert yanked(site, "ya/child", "inherited") == {first.filename: "x", second.filename: "x"}
    assert site.get("/ya/child/inherited/1.0").result["yanked"] == "x"
    for (path, accept), etag in seen.items():
        reply = site.get(path, headers={"Accept": accept, "If-None-Match": etag})
        assert (reply.status, reply.headers["ETag"] == etag) == (200, False)
        assert "yanked" in reply.text


# -- yanking a file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("query, expected", [
    ("yank", True), ("yank=", True), ("yank=broken", "broken"), ("yank=a%20b%26c%3D%C3%BC%2B", "a b&c=ü+"),
    ("yank=%3Cb%3E%22", '<b>"')])
def test_one_file_is_yanked_by_a_query(site, query, expected):
    first, second = release(site, "ya/dev", "onefile")
    patch(site, path_of(first, "ya/dev") + "?unyank")
    assert is_done(patch(site, path_of(first, "ya/dev") + "?" + query))
    assert yanked(site, "ya/dev", "onefile") == {first.filename: expected}
    shown = Page(site, "ya/dev", "onefile").links
    assert shown[first.filename]["data-yanked"] == ("" if expected is True else expected)
    assert "data-yanked" not in shown[second.filename]
    for unyank in ("unyank", "unyank="):
        assert is_done(patch(site, path_of(first, "ya/dev") + "?" + unyank))
        assert yanked(site, "ya/dev", "onefile") == {}


def test_the_path_of_a_file_may_be_escaped(site):
    first, _ = release(site, "ya/dev", "escaped")
    assert is_done(patch(site, path_of(first, "ya/dev").replace("+f", "%2Bf") + "?yank"))
    assert yanked(site, "ya/dev", "escaped") == {first.filename: True}


def test_yanking_a_file_twice_changes_nothing(site):
    first, _ = release(site, "ya/dev", "twice")
    for query in ("yank=x", "unyank"):
        assert is_done(patch(site, "%s?%s" % (path_of(first, "ya/dev"), query)))
        with unchanged(site, "ya/dev", "twice"):
            assert is_done(patch(site, "%s?%s" % (path_of(first, "ya/dev"), query)))
    assert [[entry["what"] for entry in log] for log in history(site, "ya/dev", "twice", "1.0")] == [["yank", "unyank"], []]


@pytest.mark.parametrize("query", ["", "?", "?yank&unyank", "?yanked=true", "?delete"])
def test_a_query_that_says_nothing_clear_changes_nothing(site, demo, query):
    with unchanged(site, "ya/dev", "demo"):
        reply = patch(site, path_of(demo[0], "ya/dev") + query)
    if "unyank" in query:
        assert reply.status == 400


# -- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("user, status", [(None, 403), ("foreign", 403), ("helper", 200), ("ya", 200), ("root", 200)])
@pytest.mark.parametrize("what", ["release", "file", "file again", "status"])
def test_who_may_delete_may_yank_and_nobody_else(site, user, status, what):
    """The owner and root may without being named in acl_upload."""
    first, _ = release(site, "ya/stable", "guarded")
    yank(site, "/ya/stable/guarded/1.0", "before")
    set_status(site, "/ya/stable/guarded", "deprecated", "before")
    path, body = {
        "release": ("/ya/stable/guarded/1.0", {"yanked": False}),
        "file": (path_of(first, "ya/stable") + "?yank=after", None),
        "file again": (path_of(first, "ya/stable") + "?unyank", None),
        "status": ("/ya/stable/guarded", {"project-status": {"status": "active"}}),
    }[what]
    before = serial(site), site.simple("ya/stable", "guarded")
    reply = patch(site, path, body, user=user)
    assert reply.status == status
    assert reply.headers.get("Location") is None
    after = serial(site), site.simple("ya/stable", "guarded")
    assert after == before if status == 403 else after[0] == before[0] + 1 and after[1] != before[1]


@pytest.mark.parametrize("path, body", [
    ("/ya/dev/nothing/1.0", {"yanked": True}), ("/ya/dev/+f/000/0000000000000/nothing-1.0.zip?yank", None),
    ("/ya/dev/nothing", {"project-status": {"status": "archived"}}), ("/ya/none/x/1", {"yanked": True}),
    ("/ya/none/x", {"project-status": {"status": "archived"}}), ("/ya/dev/nothing/1.0", ["?"]), ("/ya/dev/nothing", ["?"])])
def test_the_right_is_checked_before_anything_is_looked_up(site, path, body):
    for user in (None, "foreign"):
        assert patch(site, path, body, user=user).status == 403


@pytest.mark.parametrize("path, body", [
    ("/ya/dev/demo/2.0", {"yanked": True}), ("/ya/dev/demo/1.0.0", {"yanked": True}), ("/ya/dev/absent/1.0", {"yanked": True}),
    ("/ya/child/demo/1.0", {"yanked": True}), ("/ya/dev/+f/000/0000000000000/demo-1.0.zip?yank=x", None),
    ("/ya/dev/absent", {"project-status": {"status": "archived"}}), ("/ya/child/demo", {"project-status": {"status": "archived"}})])
def test_what_is_not_there_on_this_index_itself_is_not_found(site, demo, path, body):
    with unchanged(site, "ya/dev", "demo"):
        reply = patch(site, path, body)
        assert reply.status == 404 and reply.json()["message"].strip()


def test_a_file_of_a_base_and_one_that_was_deleted_are_not_yanked(site):
    first, second = release(site, "ya/dev", "filegone")
    assert patch(site, path_of(first, "ya/child") + "?yank").status == 404
    assert site.delete(path_of(first, "ya/dev"), user="ya").status == 200
    with unchanged(site, "ya/dev", "filegone"):
        assert patch(site, path_of(first, "ya/dev") + "?yank").status in (404, 410)
    assert site.filenames("ya/dev", "filegone") == [second.filename]


NOT_JSON = [b"", b"{", b"\xff", b"yanked", b'{"yanked": true', b"[" * 16000]


@pytest.mark.parametrize("path", ["/ya/dev/demo/1.0", "/ya/dev/demo"])
@pytest.mark.parametrize("body", NOT_JSON, ids=lambda body: repr(body[:20]))
def test_a_body_that_is_no_json_is_refused(site, demo, path, body):
    with unchanged(site, "ya/dev", "demo"):
        reply = site.patch(path, body, user="ya", headers={"Content-Type": "application/json"})
        assert (reply.status, reply.json()["message"]) == (400, "Bad request: could not decode json")


@pytest.mark.parametrize("body", [
    [], ["yanked=true"], "yanked", 1, True, None, {}, {"yank": True}, {"yanked": None}, {"yanked": 1}, {"yanked": 0},
    {"yanked": ["x"]}, {"yanked": {"reason": "x"}}, {"yanked": True, "reason": "x"},
    {"project-status": {"status": "archived"}}], ids=json.dumps)
def test_yanking_with_json_of_another_shape_is_refused(site, demo, body):
    with unchanged(site, "ya/dev", "demo"):
        reply = site.patch("/ya/dev/demo/1.0", json.dumps(body), user="ya", headers={"Content-Type": "application/json"})
        assert reply.status == 400 and reply.json()["message"].strip()


@pytest.mark.parametrize("reason", [
    "\ud800", "a\r\nX-Evil: 1", "\x00\x1b[31m", "x" * 100000, "</a><script>alert(1)</script>"], ids=lambda text: ascii(text[:30]))
def test_no_reason_breaks_the_pages(site, reason):
    """It may be refused; if it is not, every page can show it."""
    archives = release(site, "ya/dev", "oddreason")
    reply = yank(site, "/ya/dev/oddreason/1.0", reason)
    assert reply.status in (200, 400, 413)
    assert sorted(site.filenames("ya/dev", "oddreason")) == sorted(archive.filename for archive in archives)
    assert set(Page(site, "ya/dev", "oddreason").links) == {archive.filename for archive in archives}
    assert set(yanked(site, "ya/dev", "oddreason")) == ({archive.filename for archive in archives} if reply.status == 200 else set())
    assert "<script" not in site.get("/ya/dev/+simple/oddreason/", headers={"Accept": "text/html"}).text
    assert site.delete("/ya/dev/oddreason", user="ya").status == 200


def test_files_of_a_mirror_are_not_yanked_here(site, upstream):
    site.add_mirror("ya/mirror", upstream.url)
    archive = upstream.publish("mirrored", "1.0")
    site.fetch("ya/mirror", archive.filename, "mirrored")
    with unchanged(site, "ya/mirror", "mirrored"):
        assert patch(site, path_of(archive, "ya/mirror") + "?yank").status == 400
        assert yank(site, "/ya/mirror/mirrored/1.0", True).status == 400
        assert 400 <= set_status(site, "/ya/mirror/mirrored", "archived").status < 500
    assert site.delete("/ya/mirror", user="ya").status == 201


def test_a_test_result_is_not_yanked(site):
    first, _ = release(site, "ya/dev", "resulted")
    path = "/" + site.post(path_of(first, "ya/dev"), b"{}").result.partition("#")[0]
    with unchanged(site, "ya/dev", "resulted"):
        assert 400 <= patch(site, path + "?yank").status < 500


# -- the status of a project ------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["archived", "deprecated", "quarantined"])
@pytest.mark.parametrize("reason", [(), ("moved & \"gone\" <to> ü",)])
def test_the_status_is_shown_on_the_pages_and_goes_away_when_active(site, status, reason):
    release(site, "ya/dev", "shown")
    before = site.simple("ya/dev", "shown")
    assert "project-status" not in before
    assert "pypi:project-status" not in Page(site, "ya/dev", "shown").metas
    assert is_done(set_status(site, "/ya/dev/shown", status, *reason))
    expected = {"status": status, "reason": reason[0]} if reason else {"status": status}
    for index in ("ya/dev", "ya/child"):
        assert site.simple(index, "shown")["project-status"] == expected
        metas = Page(site, index, "shown").metas
        assert metas["pypi:project-status"] == status
        assert metas.get("pypi:project-status-reason") == expected.get("reason")
    assert is_done(set_status(site, "/ya/dev/shown", "active", "well again"))
    assert site.simple("ya/dev", "shown") == before
    assert not {"pypi:project-status", "pypi:project-status-reason"} & set(Page(site, "ya/dev", "shown").metas)


def test_a_new_status_takes_the_place_of_the_old_one_reason_and_all(site):
    release(site, "ya/dev", "restated")
    set_status(site, "/ya/dev/restated", "archived", "finished")
    before = serial(site)
    assert is_done(set_status(site, "/ya/dev/restated", "deprecated"))
    assert site.simple("ya/dev", "restated")["project-status"] == {"status": "deprecated"}
    assert serial(site) == before + 1


@pytest.mark.parametrize("status, reason", [("active", ()), ("archived", ()), ("archived", ("x",))])
def test_the_same_status_again_changes_nothing(site, status, reason):
    release(site, "ya/dev", "samestatus")
    set_status(site, "/ya/dev/samestatus", status, *reason)
    with unchanged(site, "ya/dev", "samestatus"):
        assert is_done(set_status(site, "/ya/dev/samestatus", status, *reason))
    set_status(site, "/ya/dev/samestatus", "active")


@pytest.mark.parametrize("status", ["archived", "quarantined"])
def test_nothing_is_uploaded_to_a_closed_project(site, status):
    name = "closed-" + status
    archives = release(site, "ya/dev", name)
    set_status(site, "/ya/dev/" + name, status, "see the new one")
    with unchanged(site, "ya/dev", name):
        for archive in (wheel(name, "2.0"), wheel(name, "1.0", size=5), archives[0], wheel(name.replace("-", "_").upper(), "3.0")):
            reply = site.upload("ya/dev", archive, user="helper")
            assert reply.status == 403
            assert re.search(r"\w+ \w+", reply.reason)
    assert set(site.get("/ya/dev/" + name).result) == {"1.0"}
    upload(site, "ya/stable", wheel(name, "2.0"), user="helper")  # the status is that of the project on one index
    set_status(site, "/ya/dev/" + name, "active")
    upload(site, "ya/dev", wheel(name, "2.0"), user="helper")
    assert site.versions("ya/dev", name) == ["1.0", "2.0"]


@pytest.mark.parametrize("status", ["archived", "quarantined"])
def test_nothing_is_pushed_to_a_closed_project(site, status):
    name = "pushclosed-" + status
    site.add_index("ya/source-" + status)
    site.upload("ya/source-" + status, wheel(name, "2.0"), user="ya")
    release(site, "ya/dev", name)
    set_status(site, "/ya/dev/" + name, status)
    body = {"name": name, "version": "2.0", "targetindex": "ya/dev"}
    with unchanged(site, "ya/dev", name):
        assert site.request("PUSH", "/ya/source-" + status, body, user="helper").status == 403
    set_status(site, "/ya/dev/" + name, "active")
    assert site.request("PUSH", "/ya/source-" + status, body, user="helper").status == 200


@pytest.mark.parametrize("status", ["archived", "deprecated"])
def test_files_are_still_to_be_had(site, status):
    name = "had-" + status
    first, second = release(site, "ya/dev", name)
    before = site.simple("ya/dev", name)["files"]
    set_status(site, "/ya/dev/" + name, status)
    assert site.simple("ya/dev", name)["files"] == before
    assert set(Page(site, "ya/child", name).links) == {first.filename, second.filename}
    assert site.fetch("ya/child", first.filename, name) == first.content
    if status == "deprecated":
        upload(site, "ya/dev", wheel(name, "2.0"), user="helper")
        assert site.versions("ya/dev", name) == ["1.0", "2.0"]


def test_a_quarantined_project_is_there_but_gives_no_file(site):
    first, second = release(site, "ya/dev", "quarantine")
    upload(site, "ya/stable", wheel("beside", "1.0"), user="helper")
    etags = {index: site.get("/%s/+simple/quarantine/" % index).headers["ETag"] for index in ("ya/dev", "ya/child")}
    set_status(site, "/ya/dev/quarantine", "quarantined", "malware")
    for index in ("ya/dev", "ya/child"):
        assert site.simple(index, "quarantine")["files"] == []
        assert Page(site, index, "quarantine").links == {}
        reply = site.get("/%s/+simple/quarantine/" % index, headers={"If-None-Match": etags[index]})
        assert reply.status == 200
        reply = site.get("/%s/quarantine/" % index, headers={"User-Agent": "pip/23.0", "Accept": "*/*"})
        assert (reply.status, "+f/" in reply.text) == (200, False)
    for archive in (first, second):
        for user in (None, "helper", "ya"):
            assert get(site, path_of(archive, "ya/dev"), user=user).status == 403
        assert site.request("HEAD", path_of(archive, "ya/dev"), headers={"Accept": "*/*"}).status == 403
        reply = site.get(path_of(archive, "ya/dev"), headers={"Accept": "*/*", "Range": "bytes=0-1"})
        assert reply.status == 403 and archive.content[:2] not in reply.body[:2]
    assert get(site, path_of(first, "ya/dev") + ".metadata").status == 403
    assert "quarantine" in site.get("/ya/dev").result["projects"]

    set_status(site, "/ya/dev/quarantine", "active")
    assert site.fetch("ya/child", first.filename, "quarantine") == first.content
    assert get(site, path_of(first, "ya/dev") + ".metadata").body == first.metadata


def test_a_quarantined_project_cannot_be_pushed_out(site):
    release(site, "ya/dev", "leaking")
    set_status(site, "/ya/dev/leaking", "quarantined")
    site.add_index("foreign/own")
    receiver = Receiver().start()
    try:
        with unchanged(site):
            for target in ({"targetindex": "foreign/own"}, {"posturl": receiver.url, "username": "u", "password": "p"}):
                reply = site.request("PUSH", "/ya/dev", dict({"name": "leaking", "version": "1.0"}, **target), user="foreign")
                assert reply.status == 403
        assert receiver.connections == 0
    finally:
        receiver.stop()
    assert site.get("/foreign/own/leaking").status == 404


def test_the_same_bytes_in_another_project_are_not_quarantined(site):
    first, _ = release(site, "ya/dev", "samebytes")
    upload(site, "ya/stable", first, user="helper")
    set_status(site, "/ya/dev/samebytes", "quarantined")
    assert get(site, path_of(first, "ya/dev")).status == 403
    assert get(site, path_of(first, "ya/stable")).body == first.content


def test_a_quarantined_project_closes_the_mirror_as_any_private_one_does(site, upstream):
    site.add_mirror("ya/pypi", upstream.url)
    site.add_index("ya/both", bases=["ya/dev", "ya/pypi"])
    upstream.publish("shadowing", "9.9")
    release(site, "ya/dev", "shadowing")
    set_status(site, "/ya/dev/shadowing", "quarantined")
    assert site.simple("ya/both", "shadowing")["files"] == []
    assert upstream.count("/simple/shadowing/*") == 0


def test_a_quarantined_project_can_still_be_deleted_and_then_made_anew(site):
    first, second = release(site, "ya/dev", "cleaned")
    set_status(site, "/ya/dev/cleaned", "quarantined")
    assert site.delete(path_of(first, "ya/dev"), user="ya").status == 200
    assert site.delete("/ya/dev/cleaned", user="ya").status == 200
    upload(site, "ya/dev", second, user="helper")
    assert "project-status" not in site.simple("ya/dev", "cleaned")
    assert site.fetch("ya/dev", second.filename, "cleaned") == second.content


@pytest.mark.parametrize("spelling", ["Status.Spelt", "status_SPELT/"])
def test_the_name_of_the_project_may_be_spelt_in_any_way(site, spelling):
    release(site, "ya/dev", "Status.Spelt")
    set_status(site, "/ya/dev/status-spelt", "active")
    assert is_done(set_status(site, "/ya/dev/" + spelling, "deprecated"))
    assert site.simple("ya/dev", "status-spelt")["project-status"] == {"status": "deprecated"}


def test_a_non_volatile_index_takes_a_status_without_force(site):
    release(site, "ya/stable", "stablestatus")
    assert is_done(set_status(site, "/ya/stable/stablestatus", "archived"))
    assert site.upload("ya/stable", wheel("stablestatus", "2.0"), user="helper").status == 403


@pytest.mark.parametrize("body", [
    ["project-status=archived"], "archived", 5, None, {"status": "archived"}, {"yanked": True}, {"project-status": None},
    {"project-status": "archived"}, {"project-status": ["archived"]}, {"project-status": {}}, {"project-status": {"reason": "x"}},
    {"project-status": {"status": "closed"}}, {"project-status": {"status": "ARCHIVED"}}, {"project-status": {"status": ""}},
    {"project-status": {"status": None}}, {"project-status": {"status": 1}}, {"project-status": {"status": ["archived"]}},
    {"project-status": {"status": {"archived": 1}}}, {"project-status": {"status": "archived", "reason": 1}},
    {"project-status": {"status": "archived", "reason": ["x"]}}, {"project-status": {"status": "archived", "until": "x"}},
    {"project-status": {"status": "archived"}, "title": "x"}], ids=json.dumps)
def test_a_status_in_json_of_another_shape_is_refused(site, demo, body):
    with unchanged(site, "ya/dev", "demo"):
        reply = site.patch("/ya/dev/demo", json.dumps(body), user="ya", headers={"Content-Type": "application/json"})
        assert reply.status == 400 and reply.json()["message"].strip()


@pytest.mark.parametrize("reason", ["\ud800", "a\r\nb", "\x00\x1b[31m", '"><script>alert(1)</script>'], ids=ascii)
def test_no_reason_of_a_status_breaks_the_pages_or_the_refusal(site, reason):
    release(site, "ya/dev", "oddstatus")
    assert set_status(site, "/ya/dev/oddstatus", "archived", reason).status in (200, 400)
    assert len(site.filenames("ya/dev", "oddstatus")) == 2
    assert len(Page(site, "ya/dev", "oddstatus").links) == 2
    assert "<script" not in site.get("/ya/dev/+simple/oddstatus/", headers={"Accept": "text/html"}).text
    reply = site.upload("ya/dev", wheel("oddstatus", "2.0"), user="helper")
    assert reply.status in (200, 403)
    assert reply.reason.isprintable() and reply.headers["X-DEVPI-API-VERSION"] == "2"
    assert site.delete("/ya/dev/oddstatus", user="ya").status == 200


# -- afterwards -------------------------------------------------------------------------------------------


def test_marks_and_status_are_there_after_the_server_was_killed(site):
    names = [archive.filename for archive in release(site, "ya/dev", "lasting")]
    release(site, "ya/dev", "lastingstatus")
    yank(site, "/ya/dev/lasting/1.0", "for good")
    set_status(site, "/ya/dev/lastingstatus", "quarantined", "malware")
    site.kill()
    site.start()
    assert yanked(site, "ya/dev", "lasting") == dict.fromkeys(names, "for good")
    assert [entry["reason"] for log in history(site, "ya/dev", "lasting", "1.0") for entry in log] == ["for good"] * 2
    page = site.simple("ya/dev", "lastingstatus")
    assert (page["project-status"], page["files"]) == ({"status": "quarantined", "reason": "malware"}, [])
