"""Pushing a release to another index of this server, or to an index elsewhere [W19]."""

import contextlib
import dataclasses
import hashlib
import http
import json
import os
import re
import socket
import sqlite3
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import pytest

from harness import (
    Archive, OWNER, Server, around, blobs, documentation, eventually, get, links, memory,
    multipart, page, patched, path_of, rels, sdist, serial, timed, upload, upload_docs, user_pass, wheel)
from receiver import Receiver

import replay

PUSH_TIMEOUT = 4        # in which every target that does not stall gets on, even on a busy machine
PASSWORD = "s3cret:of-the-target-ü"
BIG = 30 << 20
ABSENT = "(no such key)"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """`pu/dev` (volatile) and `pu/prod` (not), for pu and mate; `pu/other` for pu; a mirror; `foreign/own`."""
    server = Server(tmp_path_factory.mktemp("push") / "server", "--push-timeout", PUSH_TIMEOUT).start()
    for name in ("pu", "mate", "foreign"):
        server.add_user(name)
        server.login(name, "pw")
    server.login("root")
    server.add_index("pu/dev", acl_upload=["pu", "mate"])
    server.add_index("pu/prod", volatile=False, acl_upload=["pu", "mate"])
    server.add_index("pu/other")
    server.add_index("foreign/own")
    server.add_mirror("pu/mirrored", "http://127.0.0.1:9/simple/")
    yield server
    if server.running:
        server.kill()


@pytest.fixture(scope="module")
def elsewhere():
    receiver = Receiver().start()
    yield receiver
    receiver.stop()


@pytest.fixture
def receiver(elsewhere):
    """An index elsewhere that takes every upload and has seen none yet."""
    elsewhere.reset()
    return elsewhere


@pytest.fixture(scope="module")
def demo(site):
    """A release `demo` 1.0 of pu/dev, one wheel, for the tests that leave it as it is."""
    return external(site, "demo")


@pytest.fixture(scope="module")
def documented(site):
    """The same with documentation."""
    return external(site, "documented", docs=documentation("documented", "1.0"))


def push(server, source, name, version, target=None, user=OWNER, method="PUSH", **options):
    body = dict({"name": name, "version": version}, **options)
    if target is not None:
        body["targetindex"] = target
    return server.request(method, "/" + source, body, user=source.partition("/")[0] if user is OWNER else user)


def send(server, source, name, version, posturl, user=OWNER, **options):
    """An external push."""
    credentials = {"username": "ext", "password": PASSWORD}
    return push(server, source, name, version, user=user, posturl=posturl, **dict(credentials, **options))


def answer_of(reply):
    """(status, result) of a push that was carried out, in whatever way it ended."""
    assert (reply.json()["type"], reply.headers["Content-Type"]) == ("actionlog", "application/json"), reply
    return reply.status, reply.result


def refusal(reply):
    """(status, message); the message says something."""
    assert reply.headers["Content-Type"] == "application/json", reply
    message = reply.json()["message"]
    assert isinstance(message, str) and message.strip()
    return reply.status, message


def upload_result(server, index, archive, content):
    """Posts a test result; returns its path."""
    reply = server.post(path_of(archive, index), content, user=index.partition("/")[0])
    assert reply.status == 200, reply
    return "/" + reply.result.partition("#")[0]


def entry_of(archive, index, status=200):
    return [status, "store_releasefile", path_of(archive, index)[1:]]


def undated(value):
    """The JSON value with the time in each test result's name replaced, as that is the server's choice."""
    return json.loads(re.sub(r"\.toxresult-\d{14}-", ".toxresult-TIME-", json.dumps(value)))


def metadata(server, index, name, version):
    return {key: value for key, value in server.get("/%s/%s/%s" % (index, name, version)).result.items() if key != "+links"}


def log_of(link):
    """The history without its times, each of which is one."""
    for entry in link["log"]:
        assert len(entry["when"]) == 6 and entry["when"] <= list(time.gmtime()[:6])
    return [{key: value for key, value in entry.items() if key != "when"} for entry in link["log"]]


def files(server, index, name):
    """What the simple page says of each file, by file name."""
    return sorted(server.simple(index, name)["files"], key=lambda file: file["filename"])


def left_over(server):
    folder = server.directory / "tmp"
    return os.listdir(str(folder)) if folder.is_dir() else []


@contextlib.contextmanager
def unchanged(server):
    before = serial(server), blobs(server)
    yield
    assert (serial(server), blobs(server)) == before
    assert eventually(lambda: not left_over(server))


# -- to another index: what travels --------------------------------------------------------------


def test_a_push_copies_metadata_files_test_results_and_documentation(site):
    source, binary = sdist("carried", "1.0"), wheel("carried", "1.0", requires_python=">=3.8")
    upload(site, "pu/dev", source, user="mate")
    upload(site, "pu/dev", binary, fields={"author": "Ann", "classifiers": ["A :: B", "C"], "keywords": "ü"})
    results = [b'{"run": 1}', b'{ "run":2 }', b"[3]"]
    for archive, content in zip((binary, source, binary), results):
        upload_result(site, "pu/dev", archive, content)
    docs = documentation("carried", "1.0", "of carried")
    upload_docs(site, "pu/dev", docs)
    before, at = links(site, "pu/dev/carried/1.0"), serial(site)

    status, result = answer_of(push(site, "pu/dev", "carried", "1.0", "pu/prod", user="mate"))

    binary_path, source_path = path_of(binary, "pu/prod"), path_of(source, "pu/prod")
    assert (status, undated(result)) == (200, [
        [200, "register", "carried", "1.0", "->", "pu/prod"],
        [200, "store_releasefile", binary_path[1:]],
        [200, "store_toxresult", binary_path[1:] + ".toxresult-TIME-0"],
        [200, "store_toxresult", binary_path[1:] + ".toxresult-TIME-1"],
        [200, "store_releasefile", source_path[1:]],
        [200, "store_toxresult", source_path[1:] + ".toxresult-TIME-0"],
        [200, "store_doczip", "carried", "1.0", "->", "pu/prod"]])
    assert serial(site) == at + 1
    assert metadata(site, "pu/prod", "carried", "1.0") == metadata(site, "pu/dev", "carried", "1.0")
    assert metadata(site, "pu/prod", "carried", "1.0")["classifiers"] == ["A :: B", "C"]
    assert links(site, "pu/dev/carried/1.0") == before

    after = links(site, "pu/prod/carried/1.0")
    contents = [binary.content, results[0], results[2], source.content, results[1], docs.content]
    assert [get(site, link["href"][len(site.url):]).body for link in after] == contents
    assert [link["hash_spec"] for link in after] == ["sha256=" + hashlib.sha256(content).hexdigest() for content in contents]
    assert [link["rel"] for link in after] == [
        "releasefile", "toxresult", "toxresult", "releasefile", "toxresult", "doczip"]
    assert [link.get("for_href") for link in after] == [
        None, site.url + binary_path, site.url + binary_path, None, site.url + source_path, None]
    assert [site.url + "/" + entry[2] for entry in result if entry[1].endswith(("file", "result"))] == [
        link["href"] for link in after if link["rel"] != "doczip"]
    assert after[-1]["href"].startswith(site.url + "/pu/prod/+f/") and after[-1]["href"].endswith("/carried-1.0.doc.zip")


def test_the_history_of_each_copy_is_that_of_its_source_and_the_push(site):
    archive = wheel("remembered", "1.0")
    upload(site, "pu/dev", wheel("remembered", "1.0", size=9), archive)
    upload_result(site, "pu/dev", archive, b"{}")
    upload_docs(site, "pu/dev", documentation("remembered", "1.0"))
    before = {link["rel"]: link["log"] for link in links(site, "pu/dev/remembered/1.0")}
    assert [entry["what"] for entry in before["releasefile"]] == ["overwrite", "upload"]
    push(site, "pu/dev", "remembered", "1.0", "pu/prod", user="mate")
    after = {link["rel"]: link for link in links(site, "pu/prod/remembered/1.0")}
    assert set(after) == {"releasefile", "toxresult", "doczip"}
    pushed = {"what": "push", "who": "mate", "src": "pu/dev", "dst": "pu/prod"}
    for rel, link in after.items():
        assert log_of(link) == [{"what": "upload", "who": "pu", "dst": "pu/dev"}, pushed]
        assert link["log"][0] == before[rel][-1]
    push(site, "pu/prod", "remembered", "1.0", "pu/other")
    again = {"what": "push", "who": "pu", "src": "pu/prod", "dst": "pu/other"}
    for link in links(site, "pu/other/remembered/1.0"):
        assert log_of(link)[1:] == [pushed, again]


@pytest.mark.parametrize("method, path, headers", [
    ("PUSH", "/pu/dev", {}), ("PUSH", "/pu/dev/", {}), ("POST", "/pu/dev", {}), ("POST", "/pu/dev/", {}),
    ("PUSH", "/pu/dev", {"Content-Type": None}), ("POST", "/pu/dev/", {"Content-Type": None, "Accept": "*/*"})])
def test_a_push_is_asked_for_by_either_method_and_path(site, method, path, headers):
    archive = wheel("asked", "1.0")
    upload(site, "pu/dev", archive)
    body = {"name": "asked", "version": "1.0", "targetindex": "pu/other"}
    assert answer_of(site.request(method, path, body, headers, user="pu")) == (200, [
        [200, "register", "asked", "1.0", "->", "pu/other"], entry_of(archive, "pu/other")])
    assert site.fetch("pu/other", archive.filename, "asked") == archive.content
    assert site.delete("/pu/other/asked", user="pu").status == 200


@pytest.mark.parametrize("spelling", ["Spelt.Name", "spelt-name", "SPELT_name", "spelt.-_name"])
def test_the_name_may_be_spelt_in_any_way_and_the_copy_keeps_the_source_s_own(site, spelling):
    archive = wheel("Spelt.Name", "1.0")
    upload(site, "pu/dev", archive)
    status, result = answer_of(push(site, "pu/dev", spelling, "1.0", "pu/other"))
    assert (status, result[1:]) == (200, [entry_of(archive, "pu/other")])
    assert re.sub("[-_.]+", "-", result[0][2]).lower() == "spelt-name"
    assert metadata(site, "pu/other", "spelt-name", "1.0")["name"] == "Spelt.Name"
    assert site.delete("/pu/other/spelt-name", user="pu").status == 200


def test_only_that_version_is_pushed_where_trailing_zeros_count(site):
    first, second = wheel("exact", "1.0"), wheel("exact", "1.0.0")
    upload(site, "pu/dev", first, second)
    for version in ("1", "1.0.0.0", "1.0rc1"):
        reply = push(site, "pu/dev", "exact", version, "pu/prod")
        assert refusal(reply) == (400, "there are no files for exact %s on stage pu/dev" % version)
    assert push(site, "pu/dev", "exact", "1.0.0", "pu/prod").status == 200
    assert site.filenames("pu/prod", "exact") == [second.filename]


def test_a_local_version_is_pushed(site):
    archive = wheel("localized", "1.0+abc.1")
    upload(site, "pu/dev", archive)
    assert push(site, "pu/dev", "localized", "1.0+abc.1", "pu/prod").status == 200
    assert site.fetch("pu/prod", archive.filename, "localized") == archive.content


def test_the_copy_looks_the_same_to_installers_its_time_and_metadata_file_included(site):
    archives = [wheel("samelook", "1.0", requires_python=">=3.8", requires_dist=["six"]), sdist("samelook", "1.0")]
    upload(site, "pu/dev", *archives)
    assert push(site, "pu/dev", "samelook", "1.0", "pu/prod").status == 200
    shown = files(site, "pu/prod", "samelook")
    assert shown == files(site, "pu/dev", "samelook")
    assert all("upload-time" in file for file in shown)
    assert get(site, path_of(archives[0], "pu/prod") + ".metadata").body == archives[0].metadata
    times = [get(site, path_of(archives[0], index)).headers["Last-Modified"] for index in ("pu/dev", "pu/prod")]
    assert times[0] == times[1] is not None


def test_no_blob_is_made_and_each_index_keeps_its_own_hold_on_it(site):
    archive, kept = wheel("sharedblob", "1.0", size=5000), wheel("sharedblob", "2.0", size=5001)
    upload(site, "pu/dev", archive, kept)
    upload_result(site, "pu/dev", archive, b'{"of": "sharedblob"}')
    upload_docs(site, "pu/dev", documentation("sharedblob", "1.0", "of sharedblob"))
    before = blobs(site)
    assert archive.sha256 in "".join(before)
    for version in ("1.0", "2.0"):
        assert push(site, "pu/dev", "sharedblob", version, "pu/prod").status == 200
    assert blobs(site) == before
    assert site.delete("/pu/dev/sharedblob", user="pu").status == 200
    assert site.fetch("pu/prod", archive.filename, "sharedblob") == archive.content
    assert get(site, path_of(archive, "pu/dev")).status == 410
    assert site.delete("/pu/prod/sharedblob/1.0?force=", user="pu").status == 200
    assert site.fetch("pu/prod", kept.filename, "sharedblob") == kept.content


def test_no_docs_leaves_the_documentation_out(site):
    archive = wheel("nodocs", "1.0")
    upload(site, "pu/dev", archive)
    upload_docs(site, "pu/dev", documentation("nodocs", "1.0"))
    assert answer_of(push(site, "pu/dev", "nodocs", "1.0", "pu/prod", no_docs=True, only_docs=False)) == (200, [
        [200, "register", "nodocs", "1.0", "->", "pu/prod"], entry_of(archive, "pu/prod")])
    assert rels(site, "pu/prod/nodocs/1.0") == ["releasefile"]


def test_only_docs_pushes_nothing_but_the_documentation(site):
    archive = wheel("onlydocs", "1.0")
    upload(site, "pu/dev", archive)
    upload_result(site, "pu/dev", archive, b"{}")
    upload_docs(site, "pu/dev", documentation("onlydocs", "1.0"))
    assert answer_of(push(site, "pu/dev", "onlydocs", "1.0", "pu/prod", only_docs=True, no_docs=False)) == (200, [
        [200, "register", "onlydocs", "1.0", "->", "pu/prod"], [200, "store_doczip", "onlydocs", "1.0", "->", "pu/prod"]])
    assert rels(site, "pu/prod/onlydocs/1.0") == ["doczip"]
    assert site.filenames("pu/prod", "onlydocs") == []
    assert get(site, "/pu/prod/onlydocs/1.0/+doc/index.html?raw").body == b"<h1>The manual</h1>"


def test_a_yanked_file_stays_yanked(site):
    broken, sound = wheel("yankedalong", "1.0"), sdist("yankedalong", "1.0")
    upload(site, "pu/dev", broken, sound)
    assert site.patch(path_of(broken, "pu/dev") + "?yank=bad%20build", user="mate").status == 200
    assert push(site, "pu/dev", "yankedalong", "1.0", "pu/prod").status == 200
    assert [file.get("yanked") for file in files(site, "pu/prod", "yankedalong")] == ["bad build", None]
    assert [[entry["what"] for entry in link["log"]] for link in links(site, "pu/prod/yankedalong/1.0")] == [
        ["upload", "yank", "push"], ["upload", "push"]]


def test_a_push_is_allowed_from_any_index_one_may_read_and_never_asks_for_rights_on_it(site):
    archive = wheel("takenaway", "1.0")
    upload(site, "pu/prod", archive)
    assert answer_of(push(site, "pu/prod", "takenaway", "1.0", "foreign/own", user="foreign"))[0] == 200
    assert site.fetch("foreign/own", archive.filename, "takenaway") == archive.content


def test_anybody_may_push_to_an_index_where_anybody_may_upload(site):
    site.add_index("pu/open", acl_upload=[":ANONYMOUS:"])
    upload(site, "pu/dev", wheel("byanybody", "1.0"))
    assert push(site, "pu/dev", "byanybody", "1.0", "pu/open", user=None).status == 200
    (link,) = links(site, "pu/open/byanybody/1.0")
    assert log_of(link)[-1] == {"what": "push", "who": None, "src": "pu/dev", "dst": "pu/open"}


# -- to another index: what is there already ---------------------------------------------------------


def test_a_volatile_target_is_overwritten_together_with_its_test_results(site):
    old, new = wheel("replaced", "1.0", size=10), wheel("replaced", "1.0", size=20)
    upload(site, "pu/other", old, fields={"summary": "old"})
    result = upload_result(site, "pu/other", old, b"{}")
    upload(site, "pu/dev", new, fields={"summary": "new"})
    upload_docs(site, "pu/other", documentation("replaced", "1.0", "old"))
    upload_docs(site, "pu/dev", documentation("replaced", "1.0", "new"))
    assert push(site, "pu/dev", "replaced", "1.0", "pu/other").status == 200
    assert site.fetch("pu/other", new.filename, "replaced") == new.content
    assert [get(site, path).status for path in (path_of(old, "pu/other"), result)] == [410, 410]
    assert rels(site, "pu/other/replaced/1.0") == ["releasefile", "doczip"]
    (link, _) = links(site, "pu/other/replaced/1.0")
    assert [entry["what"] for entry in link["log"] if entry["what"] != "overwrite"] == ["upload", "push"]
    assert metadata(site, "pu/other", "replaced", "1.0")["summary"] == "new"
    assert get(site, "/pu/other/replaced/1.0/+doc/index.html?raw").body == b"new"


def test_files_of_the_target_that_the_source_has_not_stay(site):
    there, pushed = sdist("joined", "1.0"), wheel("joined", "1.0")
    upload(site, "pu/prod", there)
    upload(site, "pu/dev", pushed)
    assert push(site, "pu/dev", "joined", "1.0", "pu/prod").status == 200
    assert sorted(site.filenames("pu/prod", "joined")) == [pushed.filename, there.filename]


def test_all_spellings_of_a_version_come_where_the_target_has_one_under_another(server, tmp_path):
    """The file that is replaced was the last of a release into which another one goes."""
    server.add_user("ada")
    for name in ("ada/src", "ada/dst", "ada/third"):
        server.add_index(name)
    built, source, old = wheel("p", "2.0rc1"), sdist("p", "2.0rc1"), wheel("p", "2.0rc1", summary="other")
    upload(server, "ada/src", built, fields={"version": "2.0-RC1", "description": "of the wheel"})
    upload(server, "ada/src", source, fields={"description": "of the source"})
    upload(server, "ada/dst", old)
    upload(server, "ada/third", source, fields={"version": "2.0-RC1"})
    upload(server, "ada/third", old, fields={"version": "2.0.RC.1"})
    for target in ("ada/dst", "ada/third", "ada/dst"):
        status, result = answer_of(push(server, "ada/src", "p", "2.0rc1", target))
        assert status == 200, result
        assert {entry[0] for entry in result} == {200}
        assert server.get("/%s/p" % target).result.keys() == {"2.0rc1", "2.0-RC1"}
        for archive in (built, source):
            assert get(server, path_of(archive, target)).body == archive.content
        assert get(server, path_of(old, target)).status == 410

    new = tmp_path / "new"
    done = replay.run("_replay", "--serverdir", new, server.directory)
    assert (done.returncode, done.stderr) == (0, "")
    rows = replay.rows_of(server.directory)
    assert replay.misfits(rows) == replay.differences(rows, replay.rows_of(new)) == []
    assert sorted((*key[:2], values["version"], values["filename"])
                  for key, values in rows.tables["files"].items()) == sorted(
        ("ada", index, *file) for index in ("src", "dst", "third")
        for file in (("2.0-RC1", built.filename), ("2.0rc1", source.filename)))


def test_a_release_that_is_deleted_while_it_is_read_is_not_pushed(make_server, tmp_path):
    armed, deleted = tmp_path / "armed", tmp_path / "deleted"
    server = make_server(script=patched(tmp_path, """
import os, time
read = devpi_lite.releases_of
def slow(*arguments):
    found = read(*arguments)
    if os.path.exists(%r):
        os.unlink(%r)
        while not os.path.exists(%r):
            time.sleep(0.005)
    return found
devpi_lite.releases_of = slow""" % (str(armed), str(armed), str(deleted))))
    server.add_user("ada")
    server.add_index("ada/src")
    server.add_index("ada/dst")
    upload(server, "ada/src", wheel("p", "1"), fields={"description": "a readme"})
    armed.touch()
    with ThreadPoolExecutor(1) as pool:
        pushing = pool.submit(push, server, "ada/src", "p", "1", "ada/dst")
        try:
            eventually(lambda: not armed.exists())
            assert server.delete("/ada/src/p/1", user="ada").status == 200
        finally:
            deleted.touch()
        assert refusal(pushing.result())[0] == 400
    assert server.get("/ada/dst").result["projects"] == []
    assert "Traceback" not in server.whole_output()


@pytest.mark.parametrize("size", [0, 30])
def test_one_file_that_a_non_volatile_target_has_even_the_same_refuses_the_whole_push(site, size):
    """The first file would fit; it must not be there afterwards, nor any metadata."""
    name = "conflict%d" % size
    first, second, there = wheel(name, "1.0"), sdist(name, "1.0"), sdist(name, "1.0", size=size)
    upload(site, "pu/prod", there, fields={"summary": "of the target"})
    upload(site, "pu/dev", first, second, fields={"summary": "of the source"})
    upload_result(site, "pu/dev", first, b"{}")
    upload_docs(site, "pu/dev", documentation(name, "1.0"))
    before = site.get("/pu/prod/%s/1.0" % name).result
    with unchanged(site):
        reply = push(site, "pu/dev", name, "1.0", "pu/prod")
        assert refusal(reply) == (409, "%s already exists in non-volatile index, with %s content" % (
            second.filename, "other" if size else "the same"))
    assert site.get("/pu/prod/%s/1.0" % name).result == before
    assert site.fetch("pu/prod", there.filename, name) == there.content
    assert get(site, path_of(first, "pu/prod")).status == 404


def test_documentation_that_a_non_volatile_target_has_refuses_the_whole_push(site):
    archive = wheel("docconflict", "1.0")
    upload(site, "pu/dev", archive)
    for index, text in (("pu/dev", "new"), ("pu/prod", "old")):
        upload_docs(site, index, documentation("docconflict", "1.0", text))
    for options in ({}, {"only_docs": True}):
        with unchanged(site):
            status, message = refusal(push(site, "pu/dev", "docconflict", "1.0", "pu/prod", **options))
            assert status == 409 and message.endswith(" already exists in non-volatile index, with other content")
    assert site.filenames("pu/prod", "docconflict") == []
    assert get(site, "/pu/prod/docconflict/1.0/+doc/index.html?raw").body == b"old"
    assert push(site, "pu/dev", "docconflict", "1.0", "pu/prod", no_docs=True).status == 200


def test_of_two_pushes_at_once_one_is_refused(site):
    archives = [wheel("raced", "1.0"), sdist("raced", "1.0")]
    upload(site, "pu/dev", *archives)
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: push(site, "pu/dev", "raced", "1.0", "pu/prod"), range(4)))
    assert sorted(reply.status for reply in replies) == [200, 409, 409, 409]
    assert sorted(site.filenames("pu/prod", "raced")) == [archive.filename for archive in archives]


def test_an_index_is_never_pushed_onto_itself(site):
    archives = [sdist("itself", "1.0"), wheel("itself", "1.0")]
    upload(site, "pu/dev", *archives)
    upload(site, "pu/prod", *archives)
    upload_result(site, "pu/dev", archives[0], b"{}")
    before = links(site, "pu/dev/itself/1.0")
    with unchanged(site):
        assert refusal(push(site, "pu/dev", "itself", "1.0", "pu/dev"))[0] == 400
        assert refusal(push(site, "pu/prod", "itself", "1.0", "pu/prod")) == (
            409, "%s already exists in non-volatile index, with the same content" % archives[1].filename)
    assert links(site, "pu/dev/itself/1.0") == before


# -- to another index: what is refused ----------------------------------------------------------------


@pytest.fixture(scope="module")
def ordered(site):
    """A wheel `ordered` 1.0 on pu/dev that pu/prod has already."""
    for index in ("pu/dev", "pu/prod"):
        upload(site, index, wheel("ordered", "1.0"))


DOES_NOT_FIT = {"no_docs": True, "only_docs": True, "foo": 1, "targetindex": "nowhere"}


@pytest.mark.parametrize("path, version, options, error", [
    ("pu/none", "2.0", DOES_NOT_FIT, (404, "The stage pu/none could not be found.")),
    ("pu/dev", "2.0", DOES_NOT_FIT, (400, "there are no files for ordered 2.0 on stage pu/dev")),
    ("pu/dev", "1.0", DOES_NOT_FIT, (400, "can't use 'no_docs' and 'only_docs' together")),
    ("pu/dev", "1.0", dict(DOES_NOT_FIT, no_docs=False), (404, "no release/files found for ordered 1.0")),
    ("pu/dev", "1.0", {"foo": 1, "targetindex": "nowhere"}, (400, "unknown additional options: foo")),
    ("pu/dev", "1.0", {"foo": 1, "bar": 2, "targetindex": "pu/none"}, (400, "unknown additional options: bar, foo")),
    ("pu/dev", "1.0", {"targetindex": "nowhere"}, (400, "targetindex not in format user/index")),
    ("pu/dev", "1.0", {"targetindex": "pu/prod/x"}, (400, "targetindex not in format user/index")),
    ("pu/dev", "1.0", {"targetindex": ""}, (400, "targetindex not in format user/index")),
    ("pu/dev", "1.0", {"targetindex": "pu/none"}, (404, "The stage pu/none could not be found.")),
    ("pu/dev", "1.0", {"targetindex": "none/dev"}, (404, "The stage none/dev could not be found.")),
    ("pu/dev", "1.0", {"targetindex": "pu/prod"}, (401, "user None cannot upload to 'pu/prod': pushing takes a login"))])
def test_what_does_not_fit_is_told_in_this_order(site, ordered, path, version, options, error):
    """Each request has all faults that come later, too: among them, that nobody asks, and that the target has the file."""
    with unchanged(site):
        reply = push(site, path, "ordered", version, user=None, **options)
        assert refusal(reply) == error
        assert reply.headers.get("Location") is None


@pytest.mark.parametrize("options", [{}, {"no_docs": True}, {"only_docs": True}])
def test_a_version_without_files_is_not_pushed(site, options):
    body, content_type = multipart({":action": "submit", "name": "fileless", "version": "1.0"}, {})
    site.post("/pu/dev/", body, user="pu", headers={"Content-Type": content_type})
    with unchanged(site):
        assert refusal(push(site, "pu/dev", "fileless", "1.0", "pu/prod", **options)) == (
            404, "no release/files found for fileless 1.0")
    upload_docs(site, "pu/dev", documentation("fileless", "1.0"))
    assert push(site, "pu/dev", "fileless", "1.0", "pu/prod", **options).status == (404 if "no_docs" in options else 200)
    assert site.delete("/pu/dev/fileless", user="pu").status == 200
    site.delete("/pu/prod/fileless?force=", user="pu")


def test_bases_are_no_source(site):
    site.add_index("pu/child", bases=["pu/dev"])
    upload(site, "pu/dev", wheel("inthebase", "1.0"))
    upload(site, "pu/child", wheel("inthebase", "2.0"))
    for name, version in (("inthebase", "1.0"), ("nowhere", "1.0")):
        assert refusal(push(site, "pu/child", name, version, "pu/prod")) == (
            400, "there are no files for %s %s on stage pu/child" % (name, version))


@pytest.mark.parametrize("user", [None, "foreign", "root"])
@pytest.mark.parametrize("target", ["pu/prod", "pu/mirrored"])
def test_only_who_may_upload_to_the_target_may_push_to_it(site, demo, user, target):
    with unchanged(site):
        reply = push(site, "pu/dev", "demo", "1.0", target, user=user)
        status, message = refusal(reply)
        assert status == 401 and message.startswith("user %r cannot upload to '%s'%s" % (
            user, target, ": pushing takes a login" if not user else ": it is a mirror" if target == "pu/mirrored" else ""))
        assert reply.headers.get("Location") is None
    if target == "pu/mirrored":
        status, message = refusal(push(site, "pu/dev", "demo", "1.0", target))
        assert status == 401
        assert message.startswith("user 'pu' cannot upload to 'pu/mirrored': it is a mirror; you may upload to pu/")


def test_wrong_credentials_are_nobody_s(site, demo):
    reply = site.request("PUSH", "/pu/dev", WELL, user="pu", password="wrong")
    status, message = refusal(reply)
    assert status == 401 and message.startswith("user None cannot upload to 'pu/prod'") and "password" in message


def test_who_may_not_read_the_source_may_not_push_from_it(site, receiver):
    archive = wheel("unreadable", "1.0")
    site.add_index("pu/secret", acl_pkg_read=["mate"])
    upload(site, "pu/secret", archive)
    with unchanged(site):
        for target in ("foreign/own", "nowhere", "pu/none"):
            assert refusal(push(site, "pu/secret", "unreadable", "1.0", target, user="foreign"))[0] == 403
        assert push(site, "pu/secret", "unreadable", "1.0", "foreign/own", user=None).status in (401, 403)
        assert refusal(send(site, "pu/secret", "unreadable", "1.0", receiver.url, user="foreign"))[0] == 403
    assert page(site, "foreign/own", "unreadable").status == 404
    assert receiver.connections == 0
    assert push(site, "pu/secret", "unreadable", "1.0", "pu/prod", user="mate").status == 200
    assert answer_of(send(site, "pu/secret", "unreadable", "1.0", receiver.url, user="mate"))[0] == 200


@pytest.mark.parametrize("body", [
    b"", b"{", b"\xff\xfe", b'{"name": "demo",', b"[" * 16000, b"nothing"], ids=lambda body: repr(body[:20]))
@pytest.mark.parametrize("method", ["PUSH", "POST"])
def test_a_body_that_is_no_json_is_refused(site, method, body):
    with unchanged(site):
        reply = site.request(method, "/pu/dev", body, {"Content-Type": "application/json"}, user="pu")
        assert refusal(reply) == (400, "Bad request: could not decode json")


WELL = {"name": "demo", "version": "1.0", "targetindex": "pu/prod"}


@pytest.mark.parametrize("body", [
    [], [WELL], "demo", 5, 1.5, True, None, {},
    {"version": "1.0", "targetindex": "pu/prod"}, {"name": "demo", "targetindex": "pu/prod"},
    {"name": "demo", "version": "1.0"},
    dict(WELL, name=5), dict(WELL, name=None), dict(WELL, name=["demo"]), dict(WELL, name={"name": "demo"}),
    dict(WELL, name=""),
    dict(WELL, version=1.0), dict(WELL, version=None), dict(WELL, version=["1.0"]), dict(WELL, version={}), dict(WELL, version=""),
    dict(WELL, targetindex=5), dict(WELL, targetindex=None), dict(WELL, targetindex=["pu", "prod"]),
    dict(WELL, targetindex={"pu": "prod"}), dict(WELL, no_docs="false"), dict(WELL, only_docs=["x"]), dict(WELL, no_docs={}),
    dict(WELL, name="\ud800"), dict(WELL, targetindex="pu/\ud800"),
    {"name": {"demo": {"version": ["1.0"]}}}], ids=json.dumps)
def test_json_of_another_shape_is_refused(site, demo, body):
    with unchanged(site):
        reply = site.request("PUSH", "/pu/dev", json.dumps(body), {"Content-Type": "application/json"}, user="pu")
        status, _ = refusal(reply)
        # A name of an impossible index is as good as one that does not exist.
        assert status == 400 or (status == 404 and body.get("targetindex") == "pu/\ud800")


def test_a_form_without_an_action_is_refused(site, demo):
    body, content_type = multipart(WELL, {})
    for path in ("/pu/dev", "/pu/dev/"):
        with unchanged(site):
            assert site.post(path, body, user="pu", headers={"Content-Type": content_type}).status == 400


# -- to another index: from a mirror -----------------------------------------------------------------


@pytest.fixture
def mirror(site, upstream):
    """A fresh mirror `pu/mirror` of the fake upstream."""
    site.add_mirror("pu/mirror", upstream.url)
    yield "pu/mirror"
    assert site.delete("/pu/mirror", user="pu").status == 201


def test_files_of_a_mirror_are_downloaded_and_keep_their_time_and_marks(site, upstream, mirror):
    archives = [wheel("frommirror", "1.0", requires_python=">=3.8"), sdist("frommirror", "1.0")]
    upstream.publish(archives[0], yanked="broken build")
    upstream.publish(archives[1], yanked=True, upload_time="2023-05-06T07:08:09.123456Z")
    upstream.publish("frommirror", "2.0")
    assert answer_of(push(site, mirror, "frommirror", "1.0", "pu/prod")) == (200, [
        [200, "register", "frommirror", "1.0", "->", "pu/prod"]] + [entry_of(archive, "pu/prod") for archive in archives])
    wanted = [file for file in files(site, mirror, "frommirror") if "2.0" not in file["filename"]]
    assert files(site, "pu/prod", "frommirror") == wanted
    assert [file["upload-time"] for file in wanted] == ["2024-01-02T03:04:05.678901Z", "2023-05-06T07:08:09.123456Z"]
    assert [file.get("yanked") for file in wanted] == ["broken build", True]
    assert [upstream.count("/files/*/" + archive.filename) for archive in archives] == [1, 1]

    upstream.stop()
    for archive in archives:
        assert site.fetch("pu/prod", archive.filename, "frommirror") == archive.content
        assert get(site, path_of(archive, "pu/prod")).headers["Last-Modified"] == "Tue, 02 Jan 2024 03:04:05 GMT"
    assert get(site, path_of(archives[0], "pu/prod") + ".metadata").body == archives[0].metadata
    shown = metadata(site, "pu/prod", "frommirror", "1.0")
    assert (shown["name"], shown["version"]) == ("frommirror", "1.0")
    for link in links(site, "pu/prod/frommirror/1.0"):
        assert log_of(link) == [{"what": "push", "who": "pu", "src": mirror, "dst": "pu/prod"}]


def test_what_the_mirror_has_already_is_not_fetched_again(site, upstream, mirror):
    archive = upstream.publish("cachedbefore", "1.0")
    site.fetch(mirror, archive.filename, "cachedbefore")
    before = blobs(site)
    assert push(site, mirror, "cachedbefore", "1.0", "pu/prod").status == 200
    assert upstream.count("*/" + archive.filename) == 1
    # A stage reads the metadata file out of the wheel, which the mirror need not have had.
    assert blobs(site).keys() - before.keys() <= {hashlib.sha256(archive.metadata).hexdigest()}
    assert site.delete("/pu/mirror/cachedbefore", user="pu").status == 200
    assert site.fetch("pu/prod", archive.filename, "cachedbefore") == archive.content


def test_what_the_mirror_has_already_is_safe_from_collection_as_soon_as_it_is_pushed(site, upstream, mirror):
    archive = upstream.publish("oldblob", "1.0")
    site.fetch(mirror, archive.filename, "oldblob")
    blob = site.directory / "files" / archive.sha256[:2] / archive.sha256
    os.utime(str(blob), (0, 0))
    assert push(site, mirror, "oldblob", "1.0", "pu/prod").status == 200
    assert blob.stat().st_mtime > time.time() - 600      # collected is what nothing refers to for an hour


def test_the_name_of_what_a_mirror_has_is_on_the_disk_once_it_is_pushed(make_server, upstream, tmp_path):
    server = make_server(script=patched(tmp_path, """
really = devpi_lite.sync_files
def sync_files(paths, folder):
    really(paths, folder)
    print("synced:", *paths, flush=True)
devpi_lite.sync_files = sync_files
"""))
    server.add_user("pu")
    server.add_mirror("pu/mirror", upstream.url)
    server.add_index("pu/prod")
    server.login("pu", "pw")
    archive = upstream.publish("demo", "1.0")
    server.fetch("pu/mirror", archive.filename, "demo")
    assert "synced:" not in server.whole_output()
    assert push(server, "pu/mirror", "demo", "1.0", "pu/prod").status == 200
    assert "synced: %s\n" % blobs(server)[archive.sha256].parent in server.whole_output()


def test_headers_that_no_standard_knows_do_not_come_along_from_a_mirror(site, upstream, mirror, receiver):
    odd = (b"Metadata-Version: 2.1\nName: oddheaders\nVersion: 1.0\nOther: one\nOther: two\n"
           b"+shadowing: 7\n+links: 8\nSummary: said\n")
    upstream.publish(wheel("oddheaders", "1.0", metadata=odd))
    assert push(site, mirror, "oddheaders", "1.0", "pu/dev").status == 200
    shown = metadata(site, "pu/dev", "oddheaders", "1.0")
    assert shown["summary"] == "said" and not {"other", "+shadowing"} & set(shown)
    assert sorted(site.get("/pu/dev/oddheaders").result) == ["1.0"]
    assert send(site, "pu/dev", "oddheaders", "1.0", receiver.url).status == 200


def test_odd_keys_that_were_stored_once_do_no_harm(make_server, receiver):
    server = make_server()
    server.add_user("pu")
    server.add_index("pu/dev", bases=[])
    upload(server, "pu/dev", wheel("oddkeys", "1.0"))
    server.stop()
    with contextlib.closing(sqlite3.connect(str(server.directory / "devpi_lite.db"))) as db, db:
        db.execute("UPDATE releases SET metadata = json_set(metadata, '$.other', json('[\"x\"]'), '$.+shadowing', 7)")
    server.start()
    assert "+shadowing" not in metadata(server, "pu/dev", "oddkeys", "1.0")
    assert sorted(server.get("/pu/dev/oddkeys").result) == ["1.0"]
    assert send(server, "pu/dev", "oddkeys", "1.0", receiver.url).status == 200


def test_a_file_without_a_hash_upstream_has_one_in_the_target(site, upstream, mirror):
    archive = upstream.publish("hashless", "1.0", hash=None)
    assert answer_of(push(site, mirror, "hashless", "1.0", "pu/prod"))[1][1:] == [entry_of(archive, "pu/prod")]
    (file,) = files(site, "pu/prod", "hashless")
    assert file["hashes"] == {"sha256": archive.sha256}


@pytest.mark.parametrize("kind", ["500", "reset", "truncate", "wrong-hash"])
def test_a_download_that_fails_is_502_and_the_target_stays_as_it_was(site, upstream, mirror, kind):
    """The first file arrives; it must not be in the target, nor the release."""
    name = "fails-" + kind
    first, second = upstream.publish(wheel(name, "1.0")), upstream.publish(sdist(name, "1.0"))
    upstream.fault(kind, path="*/" + second.filename)
    assert refusal(push(site, mirror, name, "1.0", "pu/prod"))[0] == 502
    assert page(site, "pu/prod", name).status == 404
    assert site.get("/pu/prod/%s/1.0" % name).status == 404
    assert name not in site.get("/pu/prod").result["projects"]
    assert [get(site, path_of(archive, "pu/prod")).status for archive in (first, second)] == [404, 404]
    assert eventually(lambda: not left_over(site))
    upstream.clear_faults()
    assert push(site, mirror, name, "1.0", "pu/prod").status == 200
    assert site.fetch("pu/prod", second.filename, name) == second.content


def test_what_upstream_does_not_have_or_cannot_say(site, upstream, mirror):
    upstream.publish("hasone", "1.0")
    for name, version in (("hasone", "2.0"), ("hasnone", "1.0")):
        assert refusal(push(site, mirror, name, version, "pu/prod")) == (
            400, "there are no files for %s %s on stage pu/mirror" % (name, version))
    upstream.stop()
    with unchanged(site):
        assert refusal(push(site, mirror, "askednever", "1.0", "pu/prod"))[0] == 502


def test_a_refused_push_downloads_nothing(site, upstream, mirror):
    archive = upstream.publish("notfetched", "1.0")
    for user, target, status in ((None, "pu/prod", 401), ("foreign", "pu/prod", 401), ("pu", "pu/none", 404)):
        assert refusal(push(site, mirror, "notfetched", "1.0", target, user=user))[0] == status
    assert upstream.count("*/" + archive.filename) == 0


def test_others_write_while_a_push_downloads(site, upstream, mirror):
    archive = upstream.publish("slowfile", "1.0")
    upstream.fault("drip", path="*/" + archive.filename, times=1, delay=2)
    with ThreadPoolExecutor(1) as pool:
        pushed = pool.submit(push, site, mirror, "slowfile", "1.0", "pu/prod")
        eventually(lambda: upstream.count("*/" + archive.filename))
        upload(site, "pu/dev", wheel("meanwhile", "1.0"))
        assert not pushed.done()
        upstream.clear_faults()
        assert pushed.result().status == 200


# -- to an index elsewhere: what is sent ----------------------------------------------------------------


def external(server, name, *archives, docs=None, **fields):
    """Uploads a release to pu/dev."""
    archives = archives or (wheel(name, "1.0"),)
    upload(server, "pu/dev", *archives, fields=fields)
    if docs:
        upload_docs(server, "pu/dev", docs)
    return archives[0] if len(archives) == 1 else archives


def fields_of(server, name, version, action, **more):
    """The form that describes the release: its metadata, empty lists left out, and what the upload adds."""
    form = {key: value if isinstance(value, list) else [value] for key, value in metadata(server, "pu/dev", name, version).items()}
    form.update({":action": [action]}, **{key: [value] for key, value in more.items()})
    return {key: value for key, value in form.items() if value}


def test_each_file_is_uploaded_with_all_its_metadata(site, receiver):
    source, binary = sdist("Sent.Out", "1.0+x.1"), wheel("Sent.Out", "1.0+x.1")
    upload(site, "pu/dev", source)
    upload(site, "pu/dev", binary, fields={
        "author": "Änn \"Quote\" O'Hara", "description": "first\r\n--boundary\r\n\r\nlast\n", "keywords": "",
        "classifiers": ["A :: B", "C"], "requires_dist": ["six", "attrs; extra == 'x'"]})
    upload_result(site, "pu/dev", binary, b"{}")
    with unchanged(site):
        assert answer_of(send(site, "pu/dev", "sent-out", "1.0+x.1", receiver.url + "/legacy/?a=b")) == (200, [
            [200, "upload", path_of(binary, "pu/dev")[1:], ""], [200, "upload", path_of(source, "pu/dev")[1:], ""]])
    assert [(request.method, request.path) for request in receiver.requests] == [("POST", "/legacy/?a=b")] * 2
    for request, archive, filetype, pyversion in zip(receiver.requests, (binary, source), ("bdist_wheel", "sdist"), ("3", "source")):
        assert request.credentials == ("ext", PASSWORD)
        assert request.files == {"content": (archive.filename, archive.content)}
        assert request.fields == fields_of(
            site, "sent-out", "1.0+x.1", "file_upload", filetype=filetype, pyversion=pyversion, sha256_digest=archive.sha256)
        assert int(request.headers["Content-Length"]) == len(request.body)
        assert request.headers.get("X-Devpi-Auth") is None
    fields = receiver.requests[0].fields
    assert fields["name"] == ["Sent.Out"] and fields["classifiers"] == ["A :: B", "C"]
    assert fields["description"] == ["first\r\n--boundary\r\n\r\nlast\n"] and fields["keywords"] == [""]


def test_no_field_of_the_upload_breaks_the_form(site, receiver):
    """Unknown fields are kept [W13.5], whatever their names are made of."""
    evil = {"x; filename=b": "1", 'x"; filename="y': "2", "x\r\nX-Evil: 1\r\n\r\n": "3", "ü%22": "4", "author": 'a"\r\n\r\n--b--\r\n'}
    form = urllib.parse.urlencode(dict({":action": "submit", "name": "oddfields", "version": "1.0"}, **evil))
    reply = site.post("/pu/dev/", form, user="pu", headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert reply.status == 200, reply
    archive = external(site, "oddfields")
    for options in ({}, {"register_project": True}):
        receiver.reset()
        assert answer_of(send(site, "pu/dev", "oddfields", "1.0", receiver.url, **options))[0] == 200
        request = receiver.requests[-1]
        assert request.files == {"content": (archive.filename, archive.content)}
        assert (request.field("author"), request.field(":action")) == (evil["author"], "file_upload")
        assert b"\r\nX-Evil" not in request.body
        assert receiver.requests[0].field("author") == evil["author"]


TABLE = [
    ("table-1.0.zip", "source", "sdist"),
    ("table-1.0.tar.gz", "source", "sdist"),
    ("table-1.0.tgz", "source", "sdist"),
    ("table-1.0-py2.py3-none-any.whl", "2.7", "bdist_wheel"),
    ("table-1.0-cp312-cp312-linux_x86_64.whl", "3.12", "bdist_wheel"),
    ("table-1.0-pp310-pypy310_pp73-linux_x86_64.whl", "3.10", "bdist_wheel"),
    ("table-1.0-cp39-abi3-linux_x86_64.whl", "3.9", "bdist_wheel"),
    ("table-1.0-py3-none-any.whl", "3", "bdist_wheel"),
    ("table-1.0-py38-none-any.whl", "3.8", "bdist_wheel"),
    ("table-1.0-cp27-cp27mu-linux_x86_64.whl", "2.7", "bdist_wheel"),
    ("table-1.0-py2.7.egg", "2.7", "bdist_egg"),
    ("table-1.0-py3.10.egg", "3.10", "bdist_egg"),
    ("table-1.0.win32-py2.7.exe", "2.7", "bdist_wininst"),
    ("table-1.0.win-amd64-py3.4.msi", "3.4", "bdist_msi"),
    ("table-1.0.tar.bz2", "any", "bdist_dumb"),
    ("table-1.0.dmg", "any", "bdist_dumb"),
    ("table-1.0.msi", "any", "bdist_dumb"),
    ("table-1.0.linux-x86_64.tar.gz", "any", "bdist_dumb"),
]


def test_filetype_and_pyversion_follow_from_the_file_name(site, receiver):
    for filename, _, _ in TABLE:
        content = around(filename, b"content of " + filename.encode(), "table", "1.0")
        upload(site, "pu/dev", Archive(filename, content, "table", "1.0", b"", {"name": "table", "version": "1.0"}))
    status, result = answer_of(send(site, "pu/dev", "table", "1.0", receiver.url))
    assert (status, len(result)) == (200, len(TABLE))
    sent = [(request.files["content"][0], request.field("pyversion"), request.field("filetype")) for request in receiver.requests]
    assert sent == sorted(TABLE)


def test_documentation_is_uploaded_last_under_the_name_of_the_project(site, receiver):
    docs = documentation("docsent", "1.0")
    archive = external(site, "docsent", docs=docs)
    assert answer_of(send(site, "pu/dev", "docsent", "1.0", receiver.url)) == (200, [
        [200, "upload", path_of(archive, "pu/dev")[1:], ""], [200, "docfile", "docsent"]])
    first, second = receiver.requests
    assert first.field(":action") == "file_upload"
    assert second.files == {"content": ("docsent.zip", docs.content)}
    assert (second.field(":action"), second.field("name"), second.credentials) == ("doc_upload", "docsent", ("ext", PASSWORD))


@pytest.mark.parametrize("options, actions", [
    ({"no_docs": True}, ["file_upload"]), ({"only_docs": True}, ["doc_upload"]),
    ({"no_docs": False, "only_docs": False, "register_project": False}, ["file_upload", "doc_upload"]),
    ({"only_docs": True, "register_project": True}, ["submit", "doc_upload"])])
def test_what_is_left_out_and_what_goes_first(site, receiver, documented, options, actions):
    assert answer_of(send(site, "pu/dev", "documented", "1.0", receiver.url, **options))[0] == 200
    assert [request.field(":action") for request in receiver.requests] == actions


@pytest.mark.parametrize("status", [200, 201, 410])
def test_registering_goes_first_as_a_plain_form(site, receiver, status):
    archive = external(site, "registered", author="Änn & Co", classifiers=["A :: B", "C"])
    receiver.answer(status, b"as you like", times=1)
    assert answer_of(send(site, "pu/dev", "registered", "1.0", receiver.url + "/x", register_project=True)) == (200, [
        [status, "register", "registered", "1.0"] + ["as you like"] * (status == 410), [200, "upload", path_of(archive, "pu/dev")[1:], ""]])
    submit, file_upload = receiver.requests
    assert (submit.method, submit.path, submit.credentials) == ("POST", "/x", ("ext", PASSWORD))
    assert submit.headers["Content-Type"].partition(";")[0] == "application/x-www-form-urlencoded"
    assert submit.fields == fields_of(site, "registered", "1.0", "submit")
    assert file_upload.field(":action") == "file_upload"


@pytest.mark.parametrize("status", [204, 302, 400, 401, 403, 404, 500])
def test_registering_that_is_refused_ends_the_push(site, receiver, documented, status):
    receiver.answer(status, b"")
    assert answer_of(send(site, "pu/dev", "documented", "1.0", receiver.url, register_project=True)) == (
        502, [[status, "register", "documented", "1.0", http.HTTPStatus(status).phrase]])
    assert len(receiver.requests) == 1


def test_files_of_a_mirror_are_sent_too(site, upstream, mirror, receiver):
    archive = upstream.publish("mirrorsent", "1.0")
    assert answer_of(send(site, mirror, "mirrorsent", "1.0", receiver.url)) == (
        200, [[200, "upload", path_of(archive, mirror)[1:], ""]])
    (request,) = receiver.requests
    assert request.files == {"content": (archive.filename, archive.content)}
    assert (request.field("name"), request.field("version"), request.field("sha256_digest")) == ("mirrorsent", "1.0", archive.sha256)


# -- to an index elsewhere: what comes back --------------------------------------------------------------


@pytest.mark.parametrize("statuses, overall", [
    ((200, 200), 200), ((201, 201), 200), ((200, 201), 200), ((400, 200), 502), ((500, 201), 502),
    ((200, 400), 502), ((200, 410), 502), ((403, 403), 502)])
def test_every_answer_decides_and_is_told_in_one_line(site, receiver, statuses, overall):
    archives = external(site, "answered", wheel("answered", "1.0"), sdist("answered", "1.0"))
    for status in statuses:
        receiver.answer(status, "line1: %d ü\nline2" % status, times=1)
    texts = ["" if status in (200, 201) else "line1: %d ü line2" % status for status in statuses]
    assert answer_of(send(site, "pu/dev", "answered", "1.0", receiver.url)) == (overall, [
        [status, "upload", path_of(archive, "pu/dev")[1:], text] for status, archive, text in zip(statuses, archives, texts)])


@pytest.mark.parametrize("status, overall", [(200, 200), (201, 200), (404, 200), (410, 200), (400, 502), (500, 502)])
def test_the_answer_to_the_documentation_is_the_last_and_a_server_without_any_is_no_failure(
        site, receiver, documented, status, overall):
    receiver.answer(200, times=1)
    receiver.answer(status, b"why")
    told = [] if status in (200, 201) else ["why"]
    assert answer_of(send(site, "pu/dev", "documented", "1.0", receiver.url)) == (overall, [
        [200, "upload", path_of(documented, "pu/dev")[1:], ""], [status, "docfile", "documented"] + told])
    receiver.reset()
    receiver.answer(status, b"why")     # nothing else is sent
    assert answer_of(send(site, "pu/dev", "documented", "1.0", receiver.url, only_docs=True)) == (
        200 if status in (200, 201) else 502, [[status, "docfile", "documented"] + told])


_LONG = "See https://pypi.org/help/#file-name-reuse for more information."
_PAGE = "<html>\n <head>\n  <title>%s</title>\n </head>\n <body>\n  <h1>%s</h1>\n  The server says:<br/><br/>\n%s\n\n </body>\n</html>"


@pytest.mark.parametrize("phrase, body, told", [
    ("File already exists", _PAGE % (("400 File already exists. " + _LONG,) * 3), "File already exists. " + _LONG),
    ("Bad Request", _PAGE % ("400 Bad Request", "400 Bad Request", "unknown &lt;field&gt;\n x"),
     "400 Bad Request The server says: unknown <field> x"),
    ("Only wheels, please", _PAGE % ("400 Bad Request", "Bad Request", ""), "Only wheels, please"),
    ("Only wheels, please", "", "Only wheels, please"), ("", "", "Bad Request"),
    ("Bad Request", '{"message": "no such\\nproject", "code": 7}', "no such project"),
    ("Bad Request", '{"errors": []}', '{"errors": []}'), ("Bad Request", "{" * 5000, "{" * 1000 + "..."),
    ("Bad Request", "<script>x</script>" + "<script" * 8000, None), ("Bad Request", "<p>" + "<!--" * 8000, None)],
    ids=lambda text: ascii(text)[:25])
def test_a_refusal_comes_as_one_line_of_text(site, demo, phrase, body, told):
    """As PyPI says it: twelve lines of HTML, or in the status line."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve():
            connection = listener.accept()[0]
            with connection, connection.makefile("rb") as incoming:
                length = 0
                for line in iter(incoming.readline, b"\r\n"):
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                incoming.read(length)
                connection.sendall(("HTTP/1.1 400 %s\r\nConnection: close\r\n\r\n%s" % (phrase, body)).encode())
        thread = threading.Thread(target=serve)
        thread.start()
        status, [(_, _, _, text)] = answer_of(send(site, "pu/dev", "demo", "1.0", "http://127.0.0.1:%d/" % listener.getsockname()[1]))
        thread.join()
    assert status == 502 and "\n" not in text and text == (told or text)


@pytest.mark.parametrize("fault", ["refuse", "reset", "drop", "garbage"])
@pytest.mark.parametrize("options, what", [
    ({"no_docs": True}, "exception on release upload:"), ({"only_docs": True}, "exception on documentation upload:"),
    ({"register_project": True}, "exception on register:")])
def test_a_target_that_cannot_be_reached_is_an_entry_not_an_error(site, receiver, documented, fault, options, what):
    """What is not answered is not sent a second time either: the target may have taken it."""
    receiver.fault(fault)
    with unchanged(site):
        status, result = answer_of(send(site, "pu/dev", "documented", "1.0", receiver.url, **options))
    assert (status, [entry[:2] for entry in result]) == (502, [[-1, what]])
    assert isinstance(result[0][2], str) and result[0][2].strip() and PASSWORD not in result[0][2]
    assert len(receiver.requests) == (1 if fault in ("drop", "garbage") else 0)
    assert receiver.connections == (0 if fault == "refuse" else 1)


def test_every_file_is_tried_although_one_was_not_answered(site, receiver):
    archives = external(site, "secondtry", wheel("secondtry", "1.0"), sdist("secondtry", "1.0"))
    receiver.fault("drop", times=1)
    status, result = answer_of(send(site, "pu/dev", "secondtry", "1.0", receiver.url))
    assert (status, result[0][:2], result[1:]) == (
        502, [-1, "exception on release upload:"], [[200, "upload", path_of(archives[1], "pu/dev")[1:], ""]])


def test_a_plain_target_named_https_is_an_entry(site, receiver, demo):
    status, result = answer_of(send(site, "pu/dev", "demo", "1.0", receiver.url.replace("http:", "https:")))
    assert (status, [entry[:2] for entry in result]) == (502, [[-1, "exception on release upload:"]])
    assert receiver.requests == []


@pytest.mark.parametrize("body", [b"\xff\xfe\x00 bytes", b"<h1>\x1b[31mno</h1>", b""])
def test_any_bytes_may_come_back(site, receiver, demo, body):
    receiver.answer(400, body)
    status, [(entry_status, what, _, text)] = answer_of(send(site, "pu/dev", "demo", "1.0", receiver.url))
    assert (status, entry_status, what, isinstance(text, str)) == (502, 400, "upload", True)


def test_a_long_answer_is_cut(site, receiver, demo):
    receiver.answer(400, b"x" * 3000000)
    status, [(_, _, _, text)] = answer_of(send(site, "pu/dev", "demo", "1.0", receiver.url))
    assert status == 502
    assert text.startswith("x" * 1000) and len(text) <= 65536 + 100  # room for a note that it was cut


@pytest.mark.parametrize("status, overall", [(400, 502), (200, 200)])
def test_an_endless_answer_is_not_read_to_the_end(site, receiver, demo, status, overall):
    receiver.fault("endless", status=status)
    began = time.monotonic()
    reply = send(site, "pu/dev", "demo", "1.0", receiver.url)
    assert time.monotonic() - began < PUSH_TIMEOUT + 15
    entry_status, [(first, _, _, text)] = answer_of(reply)
    assert (entry_status, first) == (overall, status)
    assert len(text) <= 65536 + 100
    assert receiver.sent < 32 << 20  # all that fits into the buffers between


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_answer_and_nothing_goes_where_it_points(site, receiver, demo, status):
    other = Receiver().start()
    try:
        receiver.answer(status, b"over there", headers={"Location": other.url + "/steal"})
        assert answer_of(send(site, "pu/dev", "demo", "1.0", receiver.url)) == (
            502, [[status, "upload", path_of(demo, "pu/dev")[1:], "over there"]])
        assert (other.connections, len(receiver.requests)) == (0, 1)
    finally:
        other.stop()


# -- to an index elsewhere: slow targets and large files ----------------------------------------------------


@dataclasses.dataclass
class Slow:
    """What became of three pushes at once, to targets that hang or read slowly: (reply, seconds) each.

    `received`: whether each body that the slow one got is the file.  `grown`: the memory that the server took meanwhile.
    """

    hanging: tuple
    not_reading: tuple
    slow: tuple
    upload_seconds: float
    grown: int
    received: list


@pytest.fixture(scope="module")
def slow(site):
    """Of a large file to a target that reads a piece now and then, or none, and of a small one that is not answered."""
    content = around("streamed-1.0.zip", hashlib.shake_128(b"streamed").digest(BIG), "streamed", "1.0")
    upload(site, "pu/dev", Archive("streamed-1.0.zip", content, "streamed", "1.0", b"", {"name": "streamed", "version": "1.0"}))
    external(site, "hanging")
    receiver = Receiver().start()
    receiver.fault("hang", path="/hang")
    receiver.fault("hang-reading", path="/reading")
    receiver.fault("slow-read", path="/slow", piece=BIG // 20, delay=PUSH_TIMEOUT * 1.3 / 20)
    before = memory(site)
    with ThreadPoolExecutor(4) as pool:
        try:
            pushes = [
                pool.submit(timed, send, site, "pu/dev", name, "1.0", receiver.url + path)
                for name, path in (("hanging", "/hang"), ("streamed", "/reading"), ("streamed", "/slow"))
            ]
            peak = pool.submit(most_memory, site, pushes)
            receiver.wait_for(1, path="/hang")
            receiver.wait_for(1, path="/reading")
            _, upload_seconds = timed(upload, site, "pu/dev", wheel("notheldup", "1.0"), password=site.tokens["pu"])
            results = [push.result() for push in pushes]
            received = [request.files["content"][1] == content for request in receiver.requests if request.path == "/slow"]
            return Slow(*results, upload_seconds, peak.result() - before, received)
        finally:
            receiver.stop()


def most_memory(server, pushes):
    """The most memory that the server has while the pushes go on."""
    most = 0
    while not all(push.done() for push in pushes):
        most = max(most, memory(server))
        time.sleep(0.02)
    return most


@pytest.mark.parametrize("which", ["hanging", "not_reading"])
def test_a_target_that_hangs_is_given_up(slow, which):
    reply, seconds = getattr(slow, which)
    status, result = answer_of(reply)
    assert (status, [entry[:2] for entry in result]) == (502, [[-1, "exception on release upload:"]])
    assert PUSH_TIMEOUT * 0.9 < seconds < PUSH_TIMEOUT + 15


def test_a_target_that_is_slow_but_goes_on_is_not_given_up(slow):
    reply, seconds = slow.slow
    status, result = answer_of(reply)
    assert (status, [entry[:2] for entry in result]) == (200, [[200, "upload"]])
    assert seconds > PUSH_TIMEOUT
    assert slow.received == [True]


def test_a_large_file_is_streamed(slow):
    """Two pushes of it at once stay far below one file in memory."""
    assert slow.grown < BIG // 2


def test_a_slow_target_holds_nobody_up(slow):
    assert slow.upload_seconds < PUSH_TIMEOUT / 2


# -- to an index elsewhere: what is refused --------------------------------------------------------------


@pytest.mark.parametrize("headers", [
    {}, {"X-Devpi-Auth": user_pass("pu", "wrong")}, {"Authorization": "Basic " + user_pass("none", "pw")}])
def test_nobody_makes_the_server_post_without_logging_in(site, receiver, demo, headers):
    body = {"name": "demo", "version": "1.0", "posturl": receiver.url, "username": "ext", "password": PASSWORD}
    with unchanged(site):
        reply = site.request("PUSH", "/pu/dev", body, headers)
        assert refusal(reply)[0] == 401
        assert reply.headers.get("Location") is None
    assert receiver.connections == 0


def test_whoever_is_logged_in_and_may_read_may_push_elsewhere(site, receiver, demo):
    assert answer_of(send(site, "pu/dev", "demo", "1.0", receiver.url, user="foreign"))[0] == 200
    body = {"name": "demo", "version": "1.0", "posturl": receiver.url, "username": "ext", "password": ""}
    assert answer_of(site.request("PUSH", "/pu/dev", body, user="foreign", password="pw"))[0] == 200
    assert [request.credentials for request in receiver.requests] == [("ext", PASSWORD), ("ext", "")]


@pytest.mark.parametrize("posturl", [
    "", "/", "nonsense", "//127.0.0.1:PORT/", "127.0.0.1:PORT", "ftp://127.0.0.1:PORT/", "file:///etc/passwd",
    "gopher://127.0.0.1:PORT/", "unix:/run/x", "javascript:alert(1)", "http:", "http://",
    "http:///path", "http://:PORT/", "http://[::1", "http://127.0.0.1:x/",
    "http://127.0.0.1:99999/", "http://127.0.0.1:PORT/\r\nX-Evil: 1", "http://127.0.0.1:PORT/ HTTP/1.1\r\n\r\n",
    "http://127.0.0.1:PORT/\x00"])
def test_only_an_http_address_is_posted_to(site, receiver, demo, posturl):
    with unchanged(site):
        assert refusal(send(site, "pu/dev", "demo", "1.0", posturl.replace("PORT", str(receiver.port))))[0] == 400
    assert receiver.connections == 0


@pytest.mark.parametrize("key, value", [
    ("posturl", ABSENT), ("username", ABSENT), ("password", ABSENT), ("posturl", None), ("username", None), ("password", None),
    ("posturl", 5), ("posturl", ["http://127.0.0.1/"]), ("posturl", {}), ("username", 5), ("username", ["ext"]),
    ("password", 5), ("password", {"p": "w"}), ("password", False), ("register_project", "no"), ("targetindex", "pu/prod")])
def test_an_external_push_with_a_key_missing_too_many_or_of_another_type_is_refused(site, receiver, demo, key, value):
    body = {"name": "demo", "version": "1.0", "posturl": receiver.url, "username": "ext", "password": PASSWORD, key: value}
    body = {key: value for key, value in body.items() if value is not ABSENT}
    with unchanged(site):
        assert refusal(site.request("PUSH", "/pu/dev", body, user="pu"))[0] == 400
    assert receiver.connections == 0


@pytest.mark.parametrize("path, version, options, error", [
    ("pu/none", "2.0", {"no_docs": True, "only_docs": True}, (404, "The stage pu/none could not be found.")),
    ("pu/dev", "2.0", {"no_docs": True, "only_docs": True}, (400, "there are no files for ordered 2.0 on stage pu/dev")),
    ("pu/dev", "1.0", {"no_docs": True, "only_docs": True}, (400, "can't use 'no_docs' and 'only_docs' together")),
    ("pu/dev", "1.0", {"only_docs": True}, (404, "no release/files found for ordered 1.0"))])
def test_what_does_not_fit_an_external_push_is_told_in_the_same_order(site, receiver, ordered, path, version, options, error):
    assert refusal(send(site, path, "ordered", version, "ftp://nowhere", user="pu", **options)) == error
    assert receiver.connections == 0


# -- to an index elsewhere: secrets ---------------------------------------------------------------------


def test_credentials_of_the_target_are_never_logged_or_shown(site, receiver, documented):
    secret = "never-to-be-seen-0451"
    where = receiver.url.replace("http://", "http://inurl:%s@" % secret)
    replies = [send(site, "pu/dev", "documented", "1.0", url, password=secret, register_project=True) for url in (receiver.url, where)]
    receiver.answer(403, b"forbidden")
    replies.append(send(site, "pu/dev", "documented", "1.0", receiver.url + "/403", password=secret))
    replies.append(send(site, "pu/dev", "documented", "1.0", "ftp://ext:%s@127.0.0.1/" % secret, password=secret))
    receiver.fault("drop")
    replies.append(send(site, "pu/dev", "documented", "1.0", receiver.url, password=secret))
    receiver.fault("refuse")
    replies.append(send(site, "pu/dev", "documented", "1.0", where, password=secret))
    said = site.whole_output() + "".join(reply.text for reply in replies)
    assert len(replies[0].result) == 3
    assert secret not in said and user_pass("ext", secret) not in said and PASSWORD not in site.output()


def test_what_was_pushed_stays_pushed(site):
    """After the server was killed, and with the index it came from gone."""
    archive = wheel("lasting", "1.0")
    site.add_index("pu/gone")
    upload(site, "pu/gone", archive)
    assert push(site, "pu/gone", "lasting", "1.0", "pu/prod").status == 200
    before = links(site, "pu/prod/lasting/1.0")
    assert site.delete("/pu/gone", user="pu").status == 201
    site.kill()
    site.start()
    after = links(site, "pu/prod/lasting/1.0")
    assert [(link["hash_spec"], link["log"]) for link in after] == [(link["hash_spec"], link["log"]) for link in before]
    assert site.fetch("pu/prod", archive.filename, "lasting") == archive.content


# -- what is attested of files (PEP 740) ---------------------------------------------------------------


def attested(name, tag):
    archive = wheel(name, "1.0", tag=tag)
    return archive, json.dumps([{"version": 1, "for": archive.filename}])


def sent_attestations(receiver):
    """{file name: its attestations} of what a receiver was sent, in the order of arrival."""
    return {filename: request.fields.get("attestations") for request in receiver.requests
            for filename, _ in [request.files["content"]]}


def test_attestations_go_with_their_own_file_only(site, receiver):
    pairs = [attested("attest", tag) for tag in ("py3-none-any", "py2-none-any")]
    for archive, text in pairs:
        upload(site, "pu/dev", archive, fields={"attestations": text})
    bare = sdist("attest", "1.0")
    upload(site, "pu/dev", bare)
    wanted = dict({archive.filename: [text] for archive, text in pairs}, **{bare.filename: None})
    assert send(site, "pu/dev", "attest", "1.0", receiver.url + "/").status == 200
    assert sent_attestations(receiver) == wanted
    receiver.reset()
    assert push(site, "pu/dev", "attest", "1.0", "pu/other").status == 200
    assert send(site, "pu/other", "attest", "1.0", receiver.url + "/").status == 200
    assert sent_attestations(receiver) == wanted
    receiver.reset()
    upload(site, "pu/other", pairs[0][0])       # once more, and nothing is attested now
    send(site, "pu/other", "attest", "1.0", receiver.url + "/")
    assert sent_attestations(receiver)[pairs[0][0].filename] is None
    assert "attestations" not in json.dumps(site.get("/pu/other/attest").json())
