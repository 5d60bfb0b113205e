"""Test results: posted to a release file, kept byte for byte, and gone with it."""

import calendar
import contextlib
import email.utils
import hashlib
import json
import re
import select
import threading
import time

import pytest

import devpi_lite
from harness import (
    Server, Wire, eventually, get, links, patched, path_of, rels, sdist, serial, submit, wheel)

# Nothing that parses and writes JSON again would give these bytes back.
RESULT = (
    b' {"toxversion": "4.11",\r\n\t"host":"ci-1" , "platform": "linux", "platform": "\\u006cinux", "n": 1.0e+2,\n'
    b'  "testenvs": {"py311": {"python": {"version": "3.11"}, "setup": [], "test": [\n'
    b'    {"command": ["pytest"], "output": "caf\xc3\xa9 \\u00e9", "retcode": 0}]}}}\n\n')
NAME = re.compile(r"(.+)\.toxresult-(\d{14})-(\d+)")
FORBIDDEN = "No permission to upload tox results. You can use the devpi test --no-upload option to skip the upload."
UNDECODABLE = "Bad request: could not decode json"
MIB = 1 << 20


@pytest.fixture(scope="module")
def site(shared_server):
    """`tox/dev` (volatile), `tox/stable` (not), `tox/child` with both as bases, `tox/guarded` that takes results of `tester` only."""
    for name in ("tox", "tester", "stranger"):
        shared_server.add_user(name)
        shared_server.login(name, "pw")
    shared_server.login("root", "secret")
    shared_server.add_index("tox/dev", volatile=True)
    shared_server.add_index("tox/stable", volatile=False)
    shared_server.add_index("tox/child", bases=["tox/dev", "tox/stable"])
    shared_server.add_index("tox/guarded", acl_toxresult_upload=["tester"])
    return shared_server


def uploaded(server, project, version="1.0", index="tox/dev", make=wheel):
    """Uploads a release file; returns its path."""
    archive = make(project, version)
    assert server.upload(index, archive).status == 200
    return path_of(archive, index)


def post(server, path, body=RESULT, user=None, **options):
    return server.post(path, body, user=user, headers={"Content-Type": "application/json"}, **options)


def added(server, path, body=RESULT, **options):
    """Posts a result; returns the path under which it lies."""
    reply = post(server, path, body, **options)
    assert (reply.status, reply.headers.get("Content-Type")) == (200, "application/json"), reply
    return "/" + reply.result.partition("#")[0]


def status(server, path):
    return get(server, path).status


def results(server, project, version="1.0", index="tox/dev"):
    """The paths of the results of a release."""
    found = links(server, "%s/%s/%s" % (index, project, version), "toxresult")
    return [link["href"][len(server.url):] for link in found]


def state(server, project, index="tox/dev"):
    shown = [server.get("/%s/%s" % (index, project)), server.get("/%s/+simple/%s/" % (index, project))]
    return [serial(server)] + [(reply.status, reply.body) for reply in shown]


# Posting


def test_a_result_is_stored_and_its_path_is_the_answer(site):
    path, start = uploaded(site, "posted"), int(time.time())
    before = serial(site)
    reply = post(site, path)
    assert (reply.status, reply.headers.get("Content-Type")) == (200, "application/json")
    assert (serial(site), reply.headers.get("X-DEVPI-SERIAL")) == (before + 1, str(before + 1))
    assert set(reply.json()) == {"type", "result"}      # the client shows a message as a warning
    assert reply.json()["type"] == "toxresultpath"
    stored, _, fragment = reply.result.partition("#")
    assert fragment == "sha256=" + hashlib.sha256(RESULT).hexdigest()
    tested, moment, number = NAME.fullmatch(stored).groups()
    assert ("/" + tested, number) == (path, "0")
    assert start <= calendar.timegm(time.strptime(moment, "%Y%m%d%H%M%S")) <= time.time()


def test_a_result_comes_back_byte_for_byte(site):
    stored = added(site, uploaded(site, "bytes"))
    reply = get(site, stored)
    assert (reply.status, reply.body) == (200, RESULT)
    assert reply.headers.get("Content-Type") == "application/octet-stream"
    assert reply.headers.get("Content-Length") == str(len(RESULT))
    assert reply.headers.get("Cache-Control") == "max-age=365000000, immutable, public"
    assert reply.headers.get("ETag") == '"%s"' % hashlib.sha256(RESULT).hexdigest()
    bare = get(site, stored, "HEAD")
    assert (bare.status, bare.body, bare.headers.get("Content-Length")) == (200, b"", str(len(RESULT)))
    piece = get(site, stored, Range="bytes=3-9")
    assert (piece.status, piece.body) == (206, RESULT[3:10])
    assert get(site, stored, If_None_Match=reply.headers.get("ETag")).status == 304
    assert get(site, stored.replace("+f", "%2Bf")).body == RESULT
    assert status(site, stored + ".metadata") == 404


def test_json_asks_for_the_record_of_the_result(site):
    stored, digest = added(site, uploaded(site, "Record.Ed")), hashlib.sha256(RESULT).hexdigest()
    reply = site.get(stored)
    record = reply.result
    assert email.utils.parsedate(record.pop("last_modified"))
    assert (reply.json()["type"], record) == ("releasefilemeta", {
        "hash_spec": "sha256=" + digest, "hashes": {"sha256": digest}, "project": "record-ed", "version": "1.0",
        "size": len(RESULT)})


def test_a_result_is_linked_with_the_file_that_it_is_for(site):
    path, start = uploaded(site, "linked"), time.gmtime(time.time() - 1)[:6]
    stored = [added(site, path), added(site, path, b"{}", user="tester")]
    file_link, *found = links(site, "tox/dev/linked/1.0")
    assert file_link["rel"] == "releasefile" and "for_href" not in file_link
    for link, where, content, who in zip(found, stored, (RESULT, b"{}"), (None, "tester")):
        [entry] = link.pop("log")
        assert tuple(start) <= tuple(entry.pop("when")) <= tuple(time.gmtime()[:6])
        assert entry == {"what": "upload", "who": who, "dst": "tox/dev"}
        digest = hashlib.sha256(content).hexdigest()
        assert link == {
            "rel": "toxresult", "hash_spec": "sha256=" + digest, "hashes": {"sha256": digest}, "href": site.url + where,
            "for_href": site.url + path}
    assert len(found) == 2
    assert site.get("/tox/dev/linked").result["1.0"]["+links"] == links(site, "tox/dev/linked/1.0")


def test_links_of_results_follow_the_outside_url(site):
    path = uploaded(site, "outside")
    stored = added(site, path)
    for place in ("/tox/dev/outside/1.0", "/tox/dev/outside"):
        shown = site.get(place, headers={"X-Outside-URL": "https://pypi.org/sub"}).result
        link = shown.get("1.0", shown)["+links"][1]
        assert (link["href"], link["for_href"]) == ("https://pypi.org/sub" + stored, "https://pypi.org/sub" + path)
    reply = site.post(path, b"[]", headers={"X-Outside-URL": "https://pypi.org/sub"})
    assert reply.result.startswith(path[1:])


def test_results_are_numbered_file_by_file(site):
    files = [uploaded(site, "several"), uploaded(site, "several", make=sdist), uploaded(site, "several", "2.0")]
    stored = [added(site, path, json.dumps([number, path]).encode()) for number in range(3) for path in files]
    assert [NAME.fullmatch(path).group(1, 3) for path in stored] == [(path, str(number)) for number in range(3) for path in files]
    for number, path in enumerate(stored):
        assert json.loads(get(site, path).body) == [number // 3, files[number % 3]]
    assert results(site, "several") == [path for path in stored if NAME.fullmatch(path)[1] in files[:2]]
    assert results(site, "several", "2.0") == [path for path in stored if NAME.fullmatch(path)[1] == files[2]]
    for link in links(site, "tox/dev/several/1.0"):
        if link["rel"] == "toxresult":
            assert site.url + NAME.fullmatch(link["href"][len(site.url):])[1] == link["for_href"]


def test_the_same_result_may_come_twice(site):
    path = uploaded(site, "equal")
    stored = [added(site, path), added(site, path)]
    assert stored[0] != stored[1] and results(site, "equal") == stored
    assert [get(site, where).body for where in stored] == [RESULT, RESULT]


def test_one_result_for_two_files_is_kept_for_each(site):
    files = [uploaded(site, "sharing"), uploaded(site, "sharing", "2.0")]
    stored = [added(site, path) for path in files]
    assert site.delete(stored[0], user="tox").status == 200
    assert (status(site, stored[0]), get(site, stored[1]).body) == (410, RESULT)


def test_simultaneous_results_all_find_a_name(site):
    path, replies = uploaded(site, "simultaneous"), []
    posts = [threading.Thread(target=lambda n=n: replies.append((n, post(site, path, b"[%d]" % n)))) for n in range(8)]
    for thread in posts:
        thread.start()
    for thread in posts:
        thread.join()
    assert [reply.status for _, reply in replies] == [200] * 8
    assert len({reply.result.partition("#")[0] for _, reply in replies}) == 8
    for n, reply in replies:
        assert get(site, "/" + reply.result.partition("#")[0]).body == b"[%d]" % n
    assert sorted(int(NAME.fullmatch(where)[3]) for where in results(site, "simultaneous")) == list(range(8))


def test_a_result_after_a_deleted_one_takes_no_name_that_is_in_use(site):
    path = uploaded(site, "holes")
    stored = [added(site, path, b"[%d]" % number) for number in range(3)]
    assert site.delete(stored[0], user="tox").status == 200
    newest = added(site, path, b"[3]")
    assert newest not in stored[1:]
    assert [get(site, where).body for where in (stored[1], stored[2], newest)] == [b"[1]", b"[2]", b"[3]"]
    assert results(site, "holes") == [stored[1], stored[2], newest]


@pytest.mark.parametrize("make, version", [(wheel, "1.0+local.1"), (sdist, "1.0+local.1"), (sdist, "2.0")])
def test_a_result_hangs_on_any_release_file(site, make, version):
    path = uploaded(site, "Any.File", version, make=make)
    stored = added(site, path)
    assert NAME.fullmatch(stored).group(1, 3) == (path, "0")
    assert get(site, stored).body == RESULT
    assert stored in results(site, "any-file", version.replace("+", "%2B"))


@pytest.mark.parametrize("spelling", [
    lambda path: path.replace("+f", "%2Bf"), lambda path: "/" + path, lambda path: path + "/", lambda path: path + "?x=1"],
    ids=["%2B", "double slash", "final slash", "query"])
def test_other_spellings_of_the_path_are_the_same_file(site, spelling):
    path = uploaded(site, "spellings")
    assert NAME.fullmatch(added(site, spelling(path)))[1] == path


@pytest.mark.parametrize("body", [
    b"{}", b"[]", b"null", b"0", b"-1.5e3", b'"text"', b"true", b" \n{}\n ", b'"\xe2\x82\xac\\u0000"', b"1" * 9000],
    ids=lambda body: repr(body[:20]))
def test_any_json_is_a_result(site, body):
    path = uploaded(site, "anyjson")
    assert get(site, added(site, path, body)).body == body


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/octet-stream", "application/json; charset=utf-8"])
def test_the_content_type_does_not_matter(site, content_type):
    path = uploaded(site, "anytype")
    reply = site.post(path, RESULT, headers={"Content-Type": content_type, "Accept": "*/*"})
    assert (reply.status, reply.json()["type"]) == (200, "toxresultpath")


@pytest.mark.parametrize("size", [3 * MIB, 16 * MIB])
def test_a_large_result_is_stored_whole(site, size):
    body = b'"%s"' % (b"x" * (size - 2))
    assert len(body) == size
    assert get(site, added(site, uploaded(site, "large"), body)).body == body


def test_a_non_volatile_index_takes_any_number_of_results(site):
    path = uploaded(site, "steady", index="tox/stable")
    stored = [added(site, path, body) for body in (b"[1]", b"[2]", b"[2]")]
    assert results(site, "steady", index="tox/stable") == stored
    assert [get(site, where).body for where in stored] == [b"[1]", b"[2]", b"[2]"]


def test_installers_never_see_results(site):
    archive = wheel("unseen", "1.0")
    path = uploaded(site, "unseen")
    added(site, path)
    for index in ("tox/dev", "tox/child"):
        assert site.filenames(index, "unseen") == [archive.filename]
        page = get(site, "/%s/+simple/unseen/" % index, accept="text/html")
        assert archive.filename in page.text and "toxresult" not in page.text


def test_results_of_a_base_show_through_and_are_posted_there(site):
    path = uploaded(site, "based")
    stored = added(site, path)
    link = links(site, "tox/child/based/1.0")[1]
    assert (link["rel"], link["href"], link["for_href"]) == ("toxresult", site.url + stored, site.url + path)
    before, below_child = serial(site), path.replace("tox/dev", "tox/child")
    reply = post(site, below_child)
    assert (reply.status, reply.json()["message"]) == (404, "no release file found at " + below_child[1:])
    assert serial(site) == before


# Refusals


def test_only_a_release_file_can_have_results(site):
    path = uploaded(site, "targets")
    stored = added(site, path)
    fields = {":action": "doc_upload", "name": "targets", "version": "1.0"}
    assert site.post_form("tox/dev", fields, {"content": ("docs.zip", b"123")}).status == 200
    docs = [link["href"][len(site.url):] for link in links(site, "tox/dev/targets/1.0", "doczip")]
    gone = uploaded(site, "targets", "2.0")
    assert site.delete(gone, user="tox").status == 200
    before = state(site, "targets")
    for target in [stored, gone, path + ".metadata", path + "x", path.rpartition("/")[0], path_of(wheel("targets", "3.0"), "tox/dev"),
                   "/tox/dev/+f/000/0000000000000/none-1.0.zip", "/tox/dev/+f/x"] + docs:
        reply = post(site, target)
        assert (target, reply.status, reply.json()["message"]) == (target, 404, "no release file found at " + target[1:])
        assert reply.headers.get("Content-Type") == "application/json"
    assert len(docs) == 1 and state(site, "targets") == before


@pytest.mark.parametrize("path", [
    "/tox/none/+f/000/0000000000000/x-1.0.zip", "/nobody/none/+f/000/0000000000000/x-1.0.zip", "/tox/dev/+f/", "/tox/dev/+f",
    "/tox/dev/+f/../+f/x-1.0.zip", "/tox/dev/+f/%2e%2e/%2e%2e/x-1.0.zip", "/tox/dev/+f/000/%00", "/tox/dev/+f/%2fetc%2fpasswd"])
def test_no_other_path_takes_a_result(site, path):
    before = serial(site)
    reply = post(site, path, user="tox")
    assert reply.status in (400, 403, 404)
    assert reply.json()["message"]
    assert serial(site) == before


@pytest.mark.parametrize("body", [
    None, b"", b" ", b"text", b"{", b'{"a": 1', b"{}{}", b"{} x", b"{'a': 1}", b"[1,]", b'{"a" 1}', b'"\xe9"', b"\xff\xfe", b"\0", b"NaN",
    b'{"a": Infinity}', b"<html></html>", RESULT[:-40]], ids=repr)
def test_what_is_no_json_is_refused(site, body):
    path = uploaded(site, "nojson")
    before = state(site, "nojson")
    for accept in ("application/json", "*/*", "text/html"):
        reply = site.post(path, body, headers={"Accept": accept})
        assert (reply.status, reply.headers.get("Content-Type")) == (400, "application/json")
        assert reply.json()["message"] == UNDECODABLE
    assert state(site, "nojson") == before


@pytest.mark.parametrize("opening, closing", [(b"[", b"]"), (b'{"a":', b"}"), (b"[", b"")])
def test_deep_nesting_breaks_nothing(site, opening, closing):
    path = uploaded(site, "nested")
    before = state(site, "nested")
    reply = post(site, path, opening * 200000 + b"0" + closing * 200000)
    assert reply.status == 400 or closing and reply.status == 200
    assert reply.status == 200 or state(site, "nested") == before
    assert status(site, path) == 200


@pytest.mark.parametrize("user", [None, "stranger", "tox", "root"])
def test_only_the_list_of_the_index_says_who_may(site, user):
    """Owner and root are not implied; and nobody is asked for a login."""
    path = uploaded(site, "guarded", index="tox/guarded")
    before = state(site, "guarded", "tox/guarded")
    # The permission comes before the target and the body.
    for target, body in ((path, RESULT), (path, b"no json"), (path_of(wheel("guarded", "9.9"), "tox/guarded"), RESULT)):
        for accept in ("application/json", "*/*", None):
            reply = site.post(target, body, user=user, headers={"Accept": accept})
            assert (reply.status, reply.headers.get("Content-Type")) == (403, "application/json")
            assert reply.json()["message"] == FORBIDDEN
            assert reply.headers.get("WWW-Authenticate") is None and reply.headers.get("Location") is None
    assert state(site, "guarded", "tox/guarded") == before


def test_who_is_on_the_list_may(site):
    path = uploaded(site, "allowed", index="tox/guarded")
    stored = added(site, path, user="tester")
    assert get(site, stored).body == RESULT
    assert links(site, "tox/guarded/allowed/1.0")[1]["log"][0]["who"] == "tester"
    assert added(site, path, user="tester", password="pw") != stored


def test_a_change_of_the_list_counts_at_once(site):
    site.add_index("tox/changing")
    path = uploaded(site, "changing", index="tox/changing")
    for acl, statuses in ((":AUTHENTICATED:", [403, 200]), ([], [403, 403]), (["stranger"], [403, 200]), (":ANONYMOUS:", [200, 200])):
        assert site.patch("/tox/changing", {"acl_toxresult_upload": acl}, user="tox").status == 200
        assert [post(site, path, user=user).status for user in (None, "stranger")] == statuses


def test_results_of_a_restricted_index_are_for_its_readers(site):
    site.add_index("tox/hidden")
    path = uploaded(site, "hidden", index="tox/hidden")
    stored = added(site, path)
    assert site.patch("/tox/hidden", {"acl_pkg_read": ["tester"]}, user="tox").status == 200
    for user, expected in ((None, 401), ("stranger", 403), ("tester", 200), ("tox", 200), ("root", 200)):
        reply = site.get(stored, user=user, headers={"Accept": "*/*"})
        assert (user, reply.status, RESULT in reply.body) == (user, expected, expected == 200)
        if expected == 200:
            assert reply.headers.get("Cache-Control") == "max-age=365000000, immutable, private"


def test_a_mirrors_file_takes_no_results(site, upstream):
    archive = upstream.publish("mirrored", "1.0")
    site.add_mirror("tox/mirror", upstream.url)
    path = path_of(archive, "tox/mirror")
    assert site.filenames("tox/mirror", "mirrored") == [archive.filename]
    for fetched in (False, True):
        if fetched:
            assert site.fetch("tox/mirror", archive.filename, "mirrored") == archive.content
        before = serial(site)
        for user in (None, "tox"):
            reply = post(site, path, user=user)
            assert (reply.status, reply.json()["message"]) == (404, "no release file found at " + path[1:])
        assert serial(site) == before
    assert get(site, path).body == archive.content


# Sizes


def announced(path, framing):
    """The head of a post whose body is framed like this."""
    return ("POST %s HTTP/1.1\r\nHost: x\r\nAccept: application/json\r\n%s\r\n" % (path, framing)).encode()


@pytest.mark.parametrize("framing", ["Expect: 100-continue\r\n", ""], ids=["expect", "at once"])
@pytest.mark.parametrize("size", [16 * MIB + 1, 10 ** 9])
def test_a_result_that_is_too_large_is_refused_before_it_is_read(site, framing, size):
    path = uploaded(site, "huge")
    before = state(site, "huge")
    with Wire(site, announced(path, "Content-Length: %d\r\n%s" % (size, framing)), timeout=20) as wire:
        reply = wire.reply("POST")
    assert (reply.status, bool(reply.json()["message"])) == (413, True)
    assert state(site, "huge") == before


def test_a_result_without_a_length_is_counted(site):
    path = uploaded(site, "endless")
    before = state(site, "endless")
    piece = b"%x\r\n%s\r\n" % (MIB, b" " * MIB)
    with Wire(site, announced(path, "Transfer-Encoding: chunked\r\n")) as wire:
        sent = 0
        while sent < 80 and not select.select([wire.socket], [], [], 0)[0]:
            wire.send(piece)
            sent += 1
        assert wire.reply("POST").status == 413     # though the last chunk never came
    assert sent >= 16
    assert state(site, "endless") == before


def test_a_result_that_ends_early_leaves_nothing(site):
    path = uploaded(site, "early")
    before = state(site, "early")
    with Wire(site, announced(path, "Content-Length: 1000\r\n") + RESULT[:100]):
        pass
    assert status(site, path) == 200
    assert state(site, "early") == before


# Deleting


def test_a_result_is_deleted_by_its_own_path(site):
    path = uploaded(site, "single")
    stored = [added(site, path, b"[%d]" % number) for number in range(3)]
    before = serial(site)
    reply = site.delete(stored[1], user="tox")
    assert (reply.status, reply.json()["message"]) == (200, "package '%s' deleted" % stored[1][1:])
    assert serial(site) == before + 1
    assert [status(site, where) for where in [path] + stored] == [200, 200, 410, 200]
    assert site.get(stored[1]).json()["message"] == "file existed, deleted in later serial"
    assert results(site, "single") == [stored[0], stored[2]]
    assert site.delete(stored[1], user="tox").status == 410
    for where in (stored[0], stored[2]):
        assert site.delete(where, user="tox").status == 200
    assert rels(site, "tox/dev/single/1.0") == ["releasefile"]
    assert status(site, path) == 200


@pytest.mark.parametrize("user", [None, "tester", "stranger"])
def test_who_may_post_a_result_may_not_delete_it(site, user):
    path = uploaded(site, "undeletable")
    stored = added(site, path, user=user)
    before = state(site, "undeletable")
    assert site.delete(stored, user=user).status == 403
    assert state(site, "undeletable") == before
    assert get(site, stored).body == RESULT


def test_a_result_on_a_non_volatile_index_is_deleted_by_force_only(site):
    path = uploaded(site, "forced", index="tox/stable")
    stored = added(site, path)
    before = state(site, "forced", "tox/stable")
    reply = site.delete(stored, user="tox")
    assert (reply.status, reply.json()["message"]) == (403, "cannot delete version on non-volatile index")
    assert state(site, "forced", "tox/stable") == before
    assert site.delete(stored + "?force=", user="tox").status == 200
    assert (status(site, stored), status(site, path)) == (410, 200)


def test_results_go_with_their_file_and_no_other(site):
    files = [uploaded(site, "leaving"), uploaded(site, "leaving", make=sdist)]
    stored = [[added(site, path) for _ in range(2)] for path in files]
    before = serial(site)
    assert site.delete(files[0], user="tox").status == 200
    assert serial(site) == before + 1
    assert [status(site, where) for where in stored[0]] == [410, 410]
    assert results(site, "leaving") == stored[1]
    assert [get(site, where).body for where in stored[1]] == [RESULT, RESULT]


def test_a_version_does_not_live_on_by_its_results(site):
    path = uploaded(site, "onlyresults")
    stored = added(site, path)
    assert site.delete(path, user="tox").status == 200
    assert (status(site, path), status(site, stored)) == (410, 410)
    assert site.get("/tox/dev/onlyresults").result == {}


@pytest.mark.parametrize("target", ["/tox/dev/goner/1.0", "/tox/dev/goner"])
def test_results_go_with_their_version_and_project(site, target):
    stored = added(site, uploaded(site, "goner"))
    assert site.delete(target, user="tox").status == 200
    assert status(site, stored) == 410
    uploaded(site, "goner")
    assert results(site, "goner") == []
    assert status(site, stored) == 410


def test_results_go_with_their_index_and_do_not_come_back(site):
    site.add_index("tox/brief")
    stored = added(site, uploaded(site, "goner", index="tox/brief"))
    assert site.delete("/tox/brief", user="tox").status == 201
    assert status(site, stored) == 410
    site.add_index("tox/brief")
    uploaded(site, "goner", index="tox/brief")
    assert (status(site, stored), results(site, "goner", index="tox/brief")) == (410, [])


def test_an_overwritten_file_loses_its_results(site):
    path = uploaded(site, "overwritten")
    kept = added(site, uploaded(site, "overwritten", make=sdist))
    stored = [added(site, path), added(site, path)]
    other = wheel("overwritten", "1.0", size=10)
    assert site.upload("tox/dev", other).status == 200
    assert [status(site, where) for where in [path] + stored] == [410, 410, 410]
    assert results(site, "overwritten") == [kept]
    assert NAME.fullmatch(added(site, path_of(other, "tox/dev"))).group(1, 3) == (path_of(other, "tox/dev"), "0")


def test_a_release_registered_anew_keeps_its_results(site):
    path = uploaded(site, "resubmitted")
    stored = added(site, path)
    submit(site, "tox/dev", "resubmitted", "1.0", summary="new")
    assert results(site, "resubmitted") == [stored]
    assert get(site, stored).body == RESULT


def test_results_survive_a_restart(site):
    path = uploaded(site, "lasting")
    stored = added(site, path, user="tester")
    before = links(site, "tox/dev/lasting/1.0")
    port = site.port
    site.restart()
    assert get(site, stored).body == RESULT
    after = json.loads(json.dumps(links(site, "tox/dev/lasting/1.0")).replace(":%d/" % site.port, ":%d/" % port))
    assert after == before
    eventually(lambda: time.time() > calendar.timegm(time.strptime(NAME.fullmatch(stored)[2], "%Y%m%d%H%M%S")) + 1)
    assert NAME.fullmatch(added(site, path))[3] == "1"      # though nothing else has this time in its name


# Who is not logged in


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A server that takes 3 results of 2,000 bytes in all for a file from the anonymous, 4 of one address an hour."""
    folder = tmp_path_factory.mktemp("narrow")
    script = patched(folder, """\
limits = devpi_lite.Limits
limits.anonymous_results, limits.anonymous_result_bytes = 3, 2000
limits.anonymous_of_one, limits.anonymous_bytes_of_one = 4, 2500""")
    server = Server(folder / "server", script=script).start()
    server.add_user("tox")
    server.login("tox")
    server.add_index("tox/dev")
    yield server
    server.kill()


def posted(server, path, size, address, user=None):
    """(status, message) of a result of that size."""
    reply = server.post(path, b'"%s"' % (b"x" * (size - 2)), user=user, headers={"X-Real-IP": address})
    return reply.status, reply.json().get("message", ""), reply.headers.get("Retry-After")


def test_results_of_the_anonymous_are_bounded_for_a_file_and_those_of_others_are_not(narrow):
    path = uploaded(narrow, "bounded")
    said = "%s has %d test results of %d bytes from users who are not logged in; it takes 3 of 2000 bytes in all: log in, or delete some"
    name = path.rpartition("/")[2]
    assert posted(narrow, path, 1500, "192.0.2.1")[0] == 200
    assert posted(narrow, path, 600, "192.0.2.1")[:2] == (403, said % (name, 1, 1500))
    for _ in range(2):
        assert posted(narrow, path, 100, "192.0.2.2")[0] == 200
    assert posted(narrow, path, 2, "192.0.2.2")[:2] == (403, said % (name, 3, 1700))
    for _ in range(4):
        assert posted(narrow, path, 1500, "192.0.2.2", user="tox")[0] == 200
    assert posted(narrow, uploaded(narrow, "another"), 2, "192.0.2.2")[0] == 200


def test_results_of_the_anonymous_are_bounded_in_rate(narrow):
    paths = [uploaded(narrow, "rate%d" % number) for number in range(3)]
    answers = [posted(narrow, paths[number // 2], 900, "198.51.100.1") for number in range(5)]
    assert [status for status, _, _ in answers] == [200, 200, 429, 429, 429]       # bytes, then how many
    assert all("users who are not logged in: try again in" in message and int(wait) > 0 for _, message, wait in answers[2:])
    assert all(3000 < int(wait) <= 3600 for _, _, wait in answers[2:])
    assert posted(narrow, paths[2], 900, "198.51.100.1", user="tox")[0] == 200
    assert posted(narrow, paths[2], 2, "198.51.100.2")[0] == 200


def test_a_rate_forgets_and_counts_by_key():
    rate = devpi_lite.Rate(0.05, 2, 3)
    assert [rate.take(key) for key in "aaabc"] == [0, 0, 1, 0, 1]
    time.sleep(0.06)
    assert [rate.take("a"), rate.take("b", 2), rate.total, dict(rate.sums)] == [0, 0, 3, {"a": 1, "b": 2}]
    assert rate.take("c", 4) == 1


def test_who_is_over_a_rate_is_told_when_there_is_room_for_him(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(devpi_lite.time, "monotonic", lambda: clock[0])
    rate = devpi_lite.Rate(100, 10, 25)
    for key, amount in (("a", 5), ("b", 2), ("b", 8), ("c", 5)):
        assert rate.take(key, amount) == 0
        clock[0] += 10
    # now 1040: a of 1000, b of 1010 and 1020, c of 1030; b has no room, and 5 are left for all
    assert [rate.take("b"), rate.take("b", 2), rate.take("b", 3)] == [70, 70, 80]
    assert [rate.take("c", 6), rate.take("a", 6), rate.take("d", 8)] == [90, 60, 60]
    assert rate.take("d", 11) == 90             # never: when all of today is over
    monkeypatch.setattr(devpi_lite.Limits, "counted_events", 5)
    assert [rate.take("e", 0), rate.take("e", 0), len(rate.events)] == [0, 60, 5]


@pytest.mark.parametrize("who", [None, "null", "alice"])
def test_a_stored_history_says_who_uploaded_in_the_way_that_is_searched(who):
    stored = json.dumps([devpi_lite.history_entry("upload", who=who, dst="alice/dev")])
    searched = devpi_lite._anonymous_upload()
    assert not set("%_") & set(searched[:-1]) and searched[-1] == "%"
    assert stored.startswith(searched[:-1]) is (who is None)


def test_a_large_result_that_is_checked_is_no_busy_worker(tmp_path, monkeypatch):
    shares, away = devpi_lite._large_jsons, []

    @contextlib.contextmanager
    def outside_wait():
        away.append(None)
        yield True
        away.pop()

    def run(*_, **__):
        assert away
        assert shares.taken == {"192.0.2.1": 1}     # there is room for another address
        raise OSError("seen")
    monkeypatch.setattr(devpi_lite, "outside_wait", outside_wait)
    monkeypatch.setattr(devpi_lite.subprocess, "run", run)
    with pytest.raises(devpi_lite.Busy, match="seen"):
        devpi_lite._fits_in_child(str(tmp_path / "result"), "192.0.2.1")
    assert not shares.taken
    assert shares.limit_of_one < shares.limit
