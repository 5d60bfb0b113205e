"""What must hold when things go wrong: unreadable documentation, a database that can't be written, targets that hang,
pages of other origins, indexes that some may not read."""

import collections
import contextlib
import hashlib
import itertools
import json
import os
import re
import selectors
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
import xmlrpc.client
from concurrent.futures import ThreadPoolExecutor

import pytest

import devpi_lite
from harness import (
    Archive, JSON, Server, Wire, audited, blobs, eventually, links, memory, multipart, new_index,
    path_of, serial, upload, upload_docs, user_pass, wheel, worked, zipped)
from misbehaving import keep_port

OUTSIDE_URL = "https://pypi.example.org/sub"
SECRET = "a-token-in-an-url"

numbers = itertools.count(1)


# Helpers


def module_server(*options):
    """A fixture: a server with these options; `res` owns the indexes, `other` nothing."""

    @pytest.fixture(scope="module")
    def server(tmp_path_factory):
        server = Server(tmp_path_factory.mktemp("contract") / "server", *options).start()
        for name in ("res", "other"):
            server.add_user(name)
        yield server
        if server.running:
            server.kill()

    return server


site = module_server("--webhook-retry", "0.2")
# One which knows where it is seen from, and whom releases may be pushed to.
guarded = module_server("--outside-url", OUTSIDE_URL, "--push-allow", "127.0.0.1")


def put_docs(server, index, name, version, **members):
    """Uploads documentation; `members` maps a page's name to its bytes. Returns the zip's bytes."""
    content = zipped(("index.html", b"<h1>Start here</h1>"), *members.items())
    upload_docs(server, index, Archive(name + ".zip", content, name, version, b"", {}))
    return content


def blob_of(server, content):
    return blobs(server)[hashlib.sha256(content).hexdigest()]


def push_outside(server, index, name, version, posturl):
    return server.push(index, name, version, posturl=posturl, username="ext", password="pw")


def search_reply(server, query, user=None):
    return server.get("/+search?" + urllib.parse.urlencode({"query": query}), user=user)


def search(server, query, **options):
    reply = search_reply(server, query, **options)
    assert reply.status == 200, reply
    return reply.result


def found(server, query, **options):
    """The names of the projects that a query finds."""
    return {hit["name"] for hit in search(server, query, **options)["hits"]}


def settle(server, index):
    """Waits until all that was uploaded before is in the search index, which works through its queue in order."""
    name = "marker%d" % next(numbers)
    upload(server, index, wheel(name, "1.0"))
    eventually(lambda: found(server, "name:" + name))


def newest_audited(server):
    return max([row["id"] for row in audited(server, limit=1)], default=0)


def assert_refused(reply, *statuses):
    assert reply.status in statuses, reply
    assert reply.json()["message"]


# -- what can't be indexed holds up nothing else


def test_a_lone_surrogate_in_a_title_holds_up_no_other_project(site):
    index = new_index(site, "res")
    page = json.dumps({"title": "half \ud800 a pair", "body": "<p>surrogatedbody</p>"}).encode()
    assert b"\\ud800" in page
    upload(site, index, wheel("surrogated", "1.0"))
    put_docs(site, index, "surrogated", "1.0", **{"a.fjson": page})
    settle(site, index)
    assert found(site, "surrogatedbody") == {"surrogated"}


def test_documentation_whose_blob_is_gone_holds_up_no_other_project(site):
    index = new_index(site, "res")
    upload(site, index, wheel("bloblost", "1.0"), wheel("bloblost", "2.0"))
    lost = put_docs(site, index, "bloblost", "1.0", **{"a.html": b"<p>older page</p>"})
    put_docs(site, index, "bloblost", "2.0", **{"a.html": b"<p>newer page</p>"})
    settle(site, index)
    blob_of(site, lost).unlink()
    assert site.delete("/%s/bloblost/2.0" % index, user="res").status == 200  # now the older pages are wanted
    settle(site, index)
    assert found(site, "name:bloblost") == {"bloblost"}


# -- members that inflate to many times the bytes read at once


SIZES = [(64 << 10) * n + more for n in (1, 2, 3) for more in (-1, 0, 1, 7)]
SIZES += [(256 << 10) * n + more for n in (1, 2, 3) for more in (-1, 0, 1, 7, 100)]


def compressible(size, noise=2):
    """`size` bytes: noise, then what compresses to next to nothing: the last input says more than fits the last piece."""
    return hashlib.shake_128(b"docs").digest(noise) + b"\n" * (size - noise)


def test_a_member_with_a_compressible_end_comes_whole(site):
    index = new_index(site, "res")
    upload(site, index, wheel("inflated", "1.0"))
    members = {
        "m%d-%d.bin" % (size, noise): compressible(size, noise) for size in SIZES for noise in (2, 5, 60000)
    }
    put_docs(site, index, "inflated", "1.0", **members)
    cut = {}
    for name, content in members.items():
        path = "/%s/inflated/1.0/+doc/%s" % (index, name)
        reply = site.get(path)
        assert (reply.status, reply.headers["Content-Length"]) == (200, str(len(content)))
        if reply.body != content:
            cut[name] = len(content) - len(reply.body)
    assert cut == {}


@pytest.mark.parametrize("size", [(256 << 10) + 7, 2 * (256 << 10) + 7, 3 * (256 << 10) + 1])
def test_ranges_of_a_member_with_a_compressible_end_come_whole(site, size):
    index, content = new_index(site, "res"), compressible(size)
    upload(site, index, wheel("ranged", "1.0"))
    put_docs(site, index, "ranged", "1.0", **{"m.bin": content})
    for text, start in (("-9", size - 9), ("%d-" % (256 << 10), 256 << 10), ("%d-%d" % (size - 300, size - 1), size - 300)):
        reply = site.get("/%s/ranged/1.0/+doc/m.bin" % index, headers={"Range": "bytes=" + text})
        assert (reply.status, reply.headers["Content-Range"]) == (206, "bytes %d-%d/%d" % (start, size - 1, size))
        assert reply.body == content[start:]


# -- an outbox that rests, and is fair


@contextlib.contextmanager
def unwritable(server):
    """Whatever the server writes to a file fails, as on a full disk."""
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("limits of another process can't be set here")
    soft, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def held(server):
    """Another process writes to the database, and takes its time."""
    with contextlib.closing(sqlite3.connect(str(server.directory / "devpi_lite.db"), isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


def test_a_message_that_cannot_be_written_down_as_sent_is_not_sent_again_and_again(site, receiver):
    index = new_index(site, "res", webhook_url=[receiver.url + "/hook"])
    receiver.fault("delay", seconds=8)      # until it is let go
    upload(site, index, wheel("resent", "1.0"))
    receiver.wait_for(1)
    with unwritable(site):
        receiver.clear_faults()
        time.sleep(0.7)
        sent = len(receiver.requests)
    assert 1 <= sent <= 3
    assert len({request.headers["X-Devpi-Delivery"] for request in receiver.requests}) == 1
    upload(site, new_index(site, "res"), wheel("resent", "1.0"))  # all is well again


class Droppers:
    """Sockets that accept connections, and close each one after `pause` seconds without an answer."""

    def __init__(self, count, pause):
        self.pause, self.selector, self.stopped = pause, selectors.DefaultSelector(), threading.Event()
        self.listeners = [socket.create_server(("127.0.0.1", 0), backlog=20) for _ in range(count)]
        for listener in self.listeners:
            self.selector.register(listener, selectors.EVENT_READ)
        self.ports = [listener.getsockname()[1] for listener in self.listeners]
        self.urls = ["http://127.0.0.1:%d/hook" % port for port in self.ports]
        self.accepted, self.open = 0, collections.deque()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        while not self.stopped.is_set():
            for key, _ in self.selector.select(0.02):
                self.open.append((time.monotonic() + self.pause, key.fileobj.accept()[0]))
                self.accepted += 1
            while self.open and self.open[0][0] <= time.monotonic():
                self.open.popleft()[1].close()

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stopped.set()
        self.thread.join()
        for opened in self.listeners + [connection for _, connection in self.open]:
            opened.close()
        for port in self.ports:     # the server goes on trying
            keep_port(port)
        self.selector.close()


def test_many_targets_that_drop_do_not_keep_a_healthy_one_waiting(site, receiver):
    healthy = new_index(site, "res", webhook_url=[receiver.url + "/hook"])
    messages = [wheel("dropped", "1.%d" % number) for number in range(5)]
    with Droppers(160, 1.2) as droppers:  # more than are tried at a time, those that wait for an answer included
        failing = [new_index(site, "res", webhook_url=droppers.urls[start : start + 20]) for start in range(0, 160, 20)]
        for index in failing:
            upload(site, index, *messages)
        eventually(lambda: droppers.accepted >= 120)
        began = time.monotonic()
        upload(site, healthy, wheel("arrives", "1.0"))
        receiver.wait_for(1)
        waited = time.monotonic() - began
    for index in failing:
        assert site.delete("/" + index, user="res").status == 201
    # A turn or two of all workers; one that stays until all five messages have failed takes 6 s at least.
    assert waited < 5


def test_an_index_has_a_bounded_number_of_webhooks(site):
    index = new_index(site, "res")
    urls = ["http://127.0.0.1:9/%d" % number for number in range(21)]
    before = serial(site)
    assert_refused(site.patch("/" + index, {"webhook_url": urls}, user="res"), 400)
    assert_refused(site.put("/res/hookedtoomuch", {"webhook_url": urls}, user="res"), 400)
    assert serial(site) == before
    assert site.patch("/" + index, {"webhook_url": urls[:20]}, user="res").status == 200


# -- an old database, and a project with many releases


RELEASES = 2000
FILES = 8  # of each release


@pytest.fixture(scope="module")
def migrated(tmp_path_factory):
    """A server that was just started on a database of schema version 1, in which old/dev has a project `many`."""
    directory = tmp_path_factory.mktemp("contract") / "old"
    directory.mkdir()
    columns = " kind TEXT NOT NULL DEFAULT 'releasefile',\n    for_id INTEGER REFERENCES files ON DELETE CASCADE,"
    assert columns in devpi_lite.SCHEMA
    with contextlib.closing(sqlite3.connect(str(directory / "devpi_lite.db"))) as db, db:
        db.executescript(
            devpi_lite.SCHEMA.replace(columns, "")
            + """
            INSERT INTO node VALUES ('uuid', 'u'), ('epoch', 'e');
            INSERT INTO users VALUES (1, 'old', NULL, 'g', '2020-01-01T00:00:00Z', NULL, '{}');
            INSERT INTO indexes VALUES (1, 1, 'dev', '{"type": "stage", "volatile": true, "bases": []}');
            INSERT INTO projects (id, index_id, name) VALUES (1, 1, 'many');
            PRAGMA user_version = 1;"""
        )
        for number in range(1, RELEASES + 1):
            version = "1.%d" % number
            metadata = {"name": "many", "version": version, "summary": "release %d" % number}
            db.execute("INSERT INTO releases (id, project_id, version, metadata) VALUES (?, 1, ?, ?)",
                       (number, version, json.dumps(metadata)))
            for tag in range(FILES):
                digest = "%064x" % (number * FILES + tag)
                filename = "many-%s-py3-none-any%d.whl" % (version, tag)
                db.execute(
                    "INSERT INTO files (index_id, project_id, release_id, version, filename, path, hash_spec, sha256, size, uploaded) "
                    "VALUES (1, 1, ?, ?, ?, ?, ?, ?, 5, '2020-01-01T00:00:00Z')",
                    (number, version, filename, "+f/%s/%s/%s" % (digest[-3:], digest[-16:], filename), "sha256=" + digest, digest))
    server = Server(directory, root_password=None).start()
    yield server
    if server.running:
        server.kill()


def test_a_database_of_an_older_schema_is_well_as_soon_as_it_is_migrated(migrated):
    status = migrated.get("/+status").result
    assert (status["status"], status["messages"]) == ("ok", [])
    assert migrated.get("/+health/ready").status == 200


def got_within(seconds, server, path):
    """The first reply that cost less CPU time than that: it is made anew each time, and the server may do other work meanwhile."""

    def reply_in_time():
        before = worked(server)
        reply = server.get(path)
        return worked(server) - before < seconds and reply

    return eventually(reply_in_time, 60)


def test_json_of_a_project_with_many_releases_comes_soon(migrated):
    eventually(lambda: found(migrated, "name:many"), 60)  # the search index does not take its share of the time any more
    reply = got_within(1.5, migrated, "/old/dev/many")
    assert reply.status == 200 and len(reply.result) == RELEASES
    assert {len(version["+links"]) for version in reply.result.values()} == {FILES}


def test_json_of_one_of_many_releases_comes_soon(migrated):
    eventually(lambda: found(migrated, "name:many"), 60)
    reply = got_within(0.5, migrated, "/old/dev/many/1.777")
    assert (reply.status, reply.result["summary"], len(reply.result["+links"])) == (200, "release 777", FILES)


# -- a search index that is taken away, and queries that go deep


@pytest.mark.parametrize("damage", ["deleted", "overwritten"])
def test_search_comes_back_after_its_database_was_deleted_or_damaged(make_server, damage):
    server = make_server()
    server.add_user("res")
    index = new_index(server, "res")
    upload(server, index, wheel("lostindex-one", "1.0"))
    eventually(lambda: "\ndevpi_lite_search_queue 0\n" in server.get("/+metrics").text)
    for path in server.directory.glob("search.db*"):
        path.unlink()  # before the first search: none goes on with what it has open
    if damage == "overwritten":
        (server.directory / "search.db").write_bytes(b"no database " * 5000)
    upload(server, index, wheel("lostindex-two", "1.0"))

    def right(_):
        reply = search_reply(server, "name:lostindex*")
        assert reply.status in (200, 503), reply
        return reply.status == 200 and {hit["name"] for hit in reply.result["hits"]} == {"lostindex-one", "lostindex-two"}

    eventually(lambda: right(0), pause=0.2)
    with ThreadPoolExecutor(8) as pool:  # some on further connections to the database
        assert all(pool.map(right, range(24)))
    assert (server.directory / "search.db").exists()


@pytest.mark.parametrize("query", [
    "(" * 100 + "deep" + ")" * 100, "(" * 120 + "a OR b" + ")" * 120, "(a " * 60 + ")" * 60, "(" * 250, ")" * 250,
    "NOT " * 60 + "deep", "-" * 200 + "deep", "NOT (" * 40 + "deep" + ")" * 40, "(NOT " * 40 + "a" + ")" * 40,
    "a OR (" * 16 + "b" + ")" * 16, "version:" * 30, '"' * 101, "name:(((((a)))))"])
def test_deep_queries_are_answered(site, query):
    assert search_reply(site, query).status == 200
    body = xmlrpc.client.dumps(({"name": [query], "summary": [query]}, "or"), "search")
    assert site.post("/%s/" % new_index(site, "res"), body, headers={"Content-Type": "text/xml"}).status == 200


def test_a_word_in_a_hundred_brackets_is_found(site):
    index = new_index(site, "res")
    upload(site, index, wheel("bracketed", "1.0"))
    settle(site, index)
    assert found(site, "(" * 100 + "bracketed" + ")" * 100) == {"bracketed"}


# -- upstream is not asked over and over


def test_suggestions_ask_upstream_once_for_a_list_that_does_not_come(site, upstream):
    site.add_mirror("res/names%d" % next(numbers), upstream)
    upstream.fault("500", path="/simple/")
    for letter in "abcdef":
        assert site.get("/+suggest?q=" + letter).status == 200
        asked = [path for _, path, _ in upstream.requests if path == "/simple/"]
        assert len(asked) <= 1
        time.sleep(0.05)
    eventually(lambda: any(path == "/simple/" for _, path, _ in upstream.requests))
    time.sleep(0.1)
    assert site.get("/+suggest?q=g").status == 200
    time.sleep(0.1)
    assert [path for _, path, _ in upstream.requests] == ["/simple/"]


# -- the audit log


def test_only_entries_of_what_changed_the_state_have_a_serial(site, receiver):
    index = new_index(site, "res")
    mark = newest_audited(site)
    uploaded = upload(site, index, wheel("serials", "1.0"))
    assert site.post("/+login", {"user": "res", "password": "wrong for serials"}).status == 401
    assert push_outside(site, index, "serials", "1.0", receiver.url + "/legacy/").status == 200
    assert site.post("/+outbox/retry", user="root").status == 200
    again = upload(site, index, wheel("serials", "2.0"))
    rows = [row for row in audited(site) if row["id"] > mark]
    assert [(row["action"], row["serial"]) for row in reversed(rows)] == [
        ("upload", int(uploaded.headers["X-DEVPI-SERIAL"])), ("login.failed", None), ("push.external", None),
        ("outbox.retry", None), ("upload", int(again.headers["X-DEVPI-SERIAL"]))]


def test_wrong_passwords_of_installers_are_noted_once_each(site):
    mark = newest_audited(site)
    index = new_index(site, "res", acl_pkg_read=["res"])
    for password in ("wrong one", "wrong one", "wrong two", "wrong one", "wrong two"):
        reply = site.get("/%s/+simple/" % index, user="basicuser", password=password)
        assert reply.status in (401, 403), reply
    rows = [row for row in audited(site, action="login.failed") if row["id"] > mark]
    (row,) = rows
    assert (row["target"], row["who"], row["address"], row["times"]) == ("basicuser", None, "127.0.0.1", 2)
    assert "wrong one" not in json.dumps(audited(site))


# -- documentation


def test_links_to_pages_follow_the_version_that_has_them(site):
    index = new_index(site, "res")
    upload(site, index, wheel("twice", "1.0"), wheel("twice", "2.0"))
    put_docs(site, index, "twice", "1.0", **{"a.html": b"<title>A</title><p>twicedocumented</p>"})
    settle(site, index)
    put_docs(site, index, "twice", "2.0", **{"a.html": b"<title>A</title><p>twicedocumented</p>"})
    assert site.delete("/%s/twice/1.0" % index, user="res").status == 200
    settle(site, index)
    (hit,) = search(site, "twicedocumented")["hits"]
    assert [page["url"] for page in hit["pages"]] == ["%s/%s/twice/2.0/+doc/a.html" % (site.url, index)]
    for page in hit["pages"]:
        assert site.get(page["url"][len(site.url):]).status == 200


def quarantine(server, index, project, status="quarantined"):
    return server.patch("/%s/%s" % (index, project), {"project-status": {"status": status}}, user="res")


def test_documentation_of_a_quarantined_project_is_neither_shown_nor_found(site):
    index = new_index(site, "res")
    upload(site, index, wheel("sickdocs", "1.0"))
    put_docs(site, index, "sickdocs", "1.0", **{"a.html": b"<p>contagiousword</p>"})
    settle(site, index)
    page = "/%s/sickdocs/1.0/+doc/a.html" % index
    assert (site.get(page).status, found(site, "contagiousword")) == (200, {"sickdocs"})
    assert quarantine(site, index, "sickdocs").status == 200
    for path in (page, page.replace("1.0", "latest"), page.replace("a.html", "index.html")):
        assert_refused(site.get(path), 403)
    settle(site, index)
    assert found(site, "contagiousword") == set()
    assert quarantine(site, index, "sickdocs", "active").status == 200
    assert site.get(page).status == 200
    eventually(lambda: found(site, "contagiousword") == {"sickdocs"})


def test_what_is_quarantined_while_it_is_pushed_is_not_pushed(site):
    source, target = new_index(site, "res"), new_index(site, "res")
    upload(site, source, wheel("sudden", "1.0"))
    with ThreadPoolExecutor(2) as pool:
        with held(site):
            first = pool.submit(quarantine, site, source, "sudden")
            time.sleep(0.7)  # so that it waits for the database before the push does, which has seen a healthy project
            second = pool.submit(site.push, source, "sudden", "1.0", targetindex=target)
            time.sleep(0.7)
        assert first.result().status == 200
        assert_refused(second.result(), 403)
    assert_refused(site.push(source, "sudden", "1.0", targetindex=target), 403)
    assert site.get("/%s/sudden" % target).status == 404


# -- the JSON of PyPI, XML-RPC


@pytest.mark.parametrize("user, index", [("res", "Foo"), ("Foo", "dev"), ("Foo", "Foo")])
@pytest.mark.parametrize("rest", ["json", "1.0/json"])
@pytest.mark.parametrize("prefix", ["+pypi", "pypi"])
def test_pypi_json_redirects_to_the_normalised_name_of_the_project_only(site, user, index, rest, prefix):
    if user == "Foo" and "Foo" not in site.passwords:
        site.add_user("Foo")
    if site.get("/%s/%s" % (user, index)).status == 404:
        site.add_index("%s/%s" % (user, index), bases=[])
        upload(site, "%s/%s" % (user, index), wheel("Foo", "1.0"), user=user)
    reply = site.get("/%s/%s/%s/Foo/%s" % (user, index, prefix, rest))
    assert reply.status == 302
    assert reply.headers["Location"] == "%s/%s/%s/%s/foo/%s" % (site.url, user, index, prefix, rest)
    assert site.get("/%s/%s/%s/foo/%s" % (user, index, prefix, rest)).json()["info"]["version"] == "1.0"


def test_xmlrpc_answers_parse_whatever_a_summary_holds(site):
    index = new_index(site, "res")
    upload(site, index, wheel("unprintable", "1.0", summary="bell \x07, escape \x1b, \x00 and \uffff end"))
    settle(site, index)
    body = xmlrpc.client.dumps(({"name": ["unprintable"]}, "and"), "search")
    reply = site.post("/%s/" % index, body, headers={"Content-Type": "text/xml"})
    assert reply.status == 200, reply
    (((hit,),), _) = xmlrpc.client.loads(reply.body)
    assert hit["name"] == "unprintable" and re.fullmatch(r"\[%s\] bell +, escape +, +and +end" % index, hit["summary"])
    assert json.loads(search_reply(site, "name:unprintable").body)["result"]["total"] == 1


# -- test results


def test_a_result_is_not_taken_for_a_file_that_one_may_not_read(site):
    index, archive = new_index(site, "res", acl_pkg_read=["res"], acl_toxresult_upload=[":ANONYMOUS:"]), wheel("hiddenfile", "1.0")
    upload(site, index, archive)
    before = serial(site), blobs(site)
    for user in (None, "other"):
        reply = site.post(path_of(archive, index), {"by": user, "for": "hiddenfile"}, user=user)
        assert reply.status in (401, 403), reply
        reply = site.post("/%s/+f/000/none/nothing-1.0.tar.gz" % index, {"by": user, "for": "nothing"}, user=user)
        assert reply.status in (401, 403), "what is not there looks the same"
    assert (serial(site), blobs(site)) == before


def test_a_refused_result_leaves_nothing_behind(site):
    index = new_index(site, "res")
    before = serial(site), blobs(site)
    assert_refused(site.post("/%s/+f/000/none/nothing-1.0.tar.gz" % index, {"left": "behind"}, user="res"), 404)
    assert_refused(site.post(path_of(wheel("hiddenfile", "1.0"), index), b'{"cut": ', headers={"Content-Type": JSON}, user="res"), 404)
    assert (serial(site), blobs(site)) == before
    assert [path for path in (site.directory / "tmp").rglob("*") if path.is_file()] == []


def test_a_large_result_is_taken_without_much_memory(site):
    index, archive = new_index(site, "res"), wheel("largeresult", "1.0")
    upload(site, index, archive)
    before = memory(site, peak=True)
    body = b"[" + b"[]," * (2 << 20) + b"1]"
    reply = site.post(path_of(archive, index), body, headers={"Content-Type": JSON})
    assert reply.status == 200, reply
    assert memory(site, peak=True) - before < 60 << 20      # as many lists take 160 MB
    assert_refused(site.post(path_of(archive, index), b"[" + b" " * (2 << 20), headers={"Content-Type": JSON}), 400)
    (link,) = links(site, "%s/largeresult/1.0" % index, "toxresult")
    assert link["hash_spec"] == "sha256=" + hashlib.sha256(body).hexdigest()


# -- what URLs tell


def test_tokens_in_urls_are_shown_to_who_may_change_the_index_only(site, upstream):
    url = upstream.url.replace("://", "://me:%s@" % SECRET)
    site.add_mirror("res/secretmirror", url)
    index = new_index(
        site, "res",
        webhook_url=["http://me:%s@127.0.0.1:9/a/%s?b=%s" % (SECRET, SECRET, SECRET), "http://localhost:9/" + SECRET],
        uploadtrigger_jenkins="http://127.0.0.1:9/job/%s/build?token=%s" % (SECRET, SECRET))
    for user in (None, "other"):
        config = site.get("/" + index, user=user).result
        assert config["webhook_url"] == ["http://127.0.0.1:9/...", "http://localhost:9/..."]
        assert config["uploadtrigger_jenkins"] == "http://127.0.0.1:9/..."
        assert site.get("/res/secretmirror", user=user).result["mirror_url"] == upstream.url
        for path in ("/", "/res", "/" + index, "/res/secretmirror"):
            assert SECRET not in site.get(path, user=user).text
    config = site.get("/" + index, user="res").result
    assert (len(config["webhook_url"]), config["webhook_url"][1]) == (2, "http://localhost:9/" + SECRET)
    assert config["uploadtrigger_jenkins"].endswith("?token=" + SECRET)
    assert site.get("/res/secretmirror", user="res").result["mirror_url"] == url


def test_the_audit_log_tells_the_server_that_was_pushed_to_and_no_more(site, receiver):
    index = new_index(site, "res")
    upload(site, index, wheel("pushedout", "1.0"))
    url = receiver.url.replace("://", "://me:%s@" % SECRET) + "/path/%s/?q=%s" % (SECRET, SECRET)
    assert push_outside(site, index, "pushedout", "1.0", url).status == 200
    (row,) = audited(site, action="push.external", index=index)
    assert row["detail"] == "to %s: 200" % receiver.url


def jenkins_script(server, receiver, **headers):
    index = new_index(server, "res", uploadtrigger_jenkins=receiver.url + "/build")
    upload(server, index, wheel("jenkinsjob", "1.0"), headers=headers)
    (request,) = receiver.wait_for(1)
    return index, request.files["file0"][1].decode()


def test_the_jenkins_script_names_the_address_of_the_server_not_what_the_uploader_says(site, receiver):
    index, script = jenkins_script(site, receiver, Host="evil:8080")
    assert "evil" not in script and "%s/%s" % (site.url, index) in script


def test_the_jenkins_script_names_the_outside_url(guarded, receiver):
    index, script = jenkins_script(guarded, receiver, Host="evil:8080")
    assert "evil" not in script and guarded.url not in script and "%s/%s" % (OUTSIDE_URL, index) in script


# -- pages of other origins


def changes(index, archive):
    """Requests that change something: (method, path, body, headers)."""
    body, content_type = multipart(dict(archive.fields, **{":action": "file_upload"}),
                                   {"content": (archive.filename, archive.content)})
    yield "POST", "/%s/" % index, body, {"Content-Type": content_type}
    yield "PATCH", "/" + index, {"title": "changed"}, {}
    yield "PUT", "/%s-new" % index, {"bases": []}, {}
    yield "DELETE", "/%s-new" % index, None, {}


@pytest.mark.parametrize("origin", ["null", "http://evil.example.net", "https://127.0.0.1", "http://127.0.0.1:1"])
def test_a_page_of_another_origin_changes_nothing(site, origin):
    index = new_index(site, "res")
    site.add_index(index + "-new")
    before = serial(site)
    for method, path, body, headers in changes(index, wheel("foreign", "1.0")):
        reply = site.request(method, path, body, headers=dict(headers, Origin=origin), user="res")
        assert_refused(reply, 403)
    assert_refused(site.post("/+login", {"user": "res", "password": "pw"}, headers={"Origin": origin}), 403)
    assert (serial(site), site.get("/%s/foreign" % index).status) == (before, 404)
    for path in ("/", "/" + index, "/%s/+simple/" % index, "/+api"):
        assert site.get(path, headers={"Origin": origin}).status == 200


def test_a_page_of_the_own_origin_may_do_all(site):
    index = new_index(site, "res")
    for method, path, body, headers in changes(index, wheel("own", "1.0")):
        reply = site.request(method, path, body, headers=dict(headers, Origin=site.url), user="res")
        assert reply.status in (200, 201), reply
    assert site.filenames(index, "own") == [wheel("own", "1.0").filename]


def test_the_origin_of_the_outside_url_is_the_own_one(guarded):
    index = new_index(guarded, "res")
    for method, path, body, headers in changes(index, wheel("own", "1.0")):
        foreign = guarded.request(method, path, body, headers=dict(headers, Origin="https://evil.example.net"), user="res")
        assert_refused(foreign, 403)
        reply = guarded.request(method, path, body, headers=dict(headers, Origin="https://pypi.example.org"), user="res")
        assert reply.status in (200, 201), reply


# -- whom releases may be pushed to


def test_releases_are_pushed_to_allowed_hosts_only(guarded, receiver):
    index = new_index(guarded, "res")
    upload(guarded, index, wheel("allowed", "1.0"))
    for url in (receiver.url.replace("127.0.0.1", "localhost"), "http://127.0.0.1@localhost:%d" % receiver.port,
                "http://127.0.0.2:%d" % receiver.port):
        assert_refused(push_outside(guarded, index, "allowed", "1.0", url + "/legacy/"), 403)
    assert receiver.connections == 0
    assert push_outside(guarded, index, "allowed", "1.0", receiver.url + "/legacy/").status == 200
    assert [request.path for request in receiver.requests] == ["/legacy/"]


# -- history


def test_the_history_names_a_source_to_who_may_read_it_only(site):
    source, target, archive = new_index(site, "res", acl_pkg_read=["res"]), new_index(site, "res"), wheel("storied", "1.0")
    upload(site, source, archive)
    assert site.push(source, "storied", "1.0", targetindex=target).status == 200
    paths = ["/%s/storied/1.0" % target, "/%s/storied" % target]

    def pushes(path, user):
        shown = site.get(path, user=user).result
        (link,) = (shown if path == paths[0] else shown["1.0"])["+links"]
        return [entry["src"] for entry in link["log"] if entry["what"] == "push"]

    for path in paths:
        assert pushes(path, "res") == [source]
        assert pushes(path, None) == pushes(path, "other") == [None]


def test_the_history_of_a_pushed_file_tells_nothing_of_a_source_one_may_not_read(site):
    source, target = new_index(site, "res", acl_pkg_read=["res"]), new_index(site, "res")
    upload(site, source, wheel("secretive", "1.0"))
    assert site.push(source, "secretive", "1.0", targetindex=target).status == 200
    for user in (None, "other"):
        reply = site.get("/%s/secretive/1.0" % target, user=user)
        assert reply.status == 200 and source not in reply.text


# -- version specifiers


@pytest.fixture(scope="module")
def versions(site):
    """specified-N each have one version."""
    index = new_index(site, "res")
    for name, version in (("rc", "1.0rc1"), ("final", "1.0"), ("post", "1.0.post1"), ("minor", "1.5"), ("old", "0.9"),
                          ("epoch", "1!0.1")):
        upload(site, index, wheel("specified-" + name, version))
    settle(site, index)
    return {"old", "rc", "final", "post", "minor", "epoch"}


@pytest.mark.parametrize("specifier, names", [
    ("<1.0.post1", "old rc final"), ("<1.0", "old"), ("<1", "old"), (">1", "minor epoch"),
    (">=1", "final post minor epoch"), ("<=1", "old rc final"), ("~=1.0", "final post minor"), ("==1.*", "rc final post minor"),
    ("!=1.*", "old epoch"), ("<1!1", "old rc final post minor epoch"), (">0.9,<1!0", "rc final post minor")])
def test_versions_are_found_by_specifiers(site, versions, specifier, names):
    result = search(site, "name:specified* version:" + specifier)
    assert {hit["name"].partition("-")[2] for hit in result["hits"]} == set(names.split())
    assert result["notes"] == []


@pytest.mark.parametrize("specifier, noted", [("~=1", None), (">=banana", True), ("<", True), ("==", True)])
def test_specifiers_that_say_nothing_find_nothing(site, versions, specifier, noted):
    result = search(site, "name:specified* version:" + specifier)
    assert (result["total"], result["hits"]) == (0, [])
    assert result["notes"] or not noted


# -- what a second attack found


@pytest.mark.parametrize("page", [
    b"<" + b"a" * 300000, b"<a" * 400000, b"</" + b"a-" * 100000, b"<p>&#" + b"9" * 5000 + b"; &#x" + b"f" * 5000 + b";"],
    ids=["endless name", "unclosed names", "unclosed end", "absurd numbers"])
def test_an_odd_page_costs_neither_time_nor_its_project(site, page):
    index = new_index(site, "res")
    name = "oddpage%d" % next(numbers)
    put_docs(site, index, name, "1.0", **{"odd.html": page})
    began = time.monotonic()
    eventually(lambda: found(site, "name:%s" % name))
    assert time.monotonic() - began < 20
    assert site.get("/+api").status == 200


@pytest.mark.parametrize("outside, origin", [
    ("https://pypi.example.com:443/devpi", "https://pypi.example.com"), ("http://pypi.example.com:80", "http://pypi.example.com"),
    ("https://pypi.example.com", "https://PyPI.example.com"), ("https://[2001:db8::1]:8443", "https://[2001:db8::1]:8443")])
def test_a_page_of_ones_own_may_post_however_the_proxy_spells_the_address(site, outside, origin):
    headers = {"X-Outside-URL": outside, "Origin": origin}
    assert site.post("/+login", {"user": "res", "password": "pw"}, headers=headers).status == 200
    for foreign in (origin + ".evil.example.net", "https://evil.example.net", "null", "https://x-pypi.example.com"):
        reply = site.post("/+login", {"user": "res", "password": "pw"}, headers=dict(headers, Origin=foreign))
        assert reply.status == 403, foreign


def test_json_under_the_name_of_a_form_is_a_push_however_it_comes(site):
    source, target = new_index(site, "res"), new_index(site, "res")
    upload(site, source, wheel("curled", "1.0"))
    body = json.dumps({"name": "curled", "version": "1.0", "targetindex": target}).encode()
    head = "POST /%s HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\nX-Devpi-Auth: %s\r\n" % (
        source, user_pass("res", site.login("res")))
    for framing, sent in (
            ("Content-Length: %d\r\n\r\n" % len(body), body),
            ("Transfer-Encoding: chunked\r\n\r\n", b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))):
        with Wire(site, (head + framing).encode()) as wire:
            time.sleep(0.1)     # so that the body comes after its head
            wire.send(sent)
            reply = wire.reply("POST")
        assert (reply.status, reply.json()["type"]) == (200, "actionlog"), reply


@pytest.mark.skipif(os.name == "nt", reason="descriptors are closed by a shell")
def test_a_server_without_standard_output_serves(tmp_path):
    port = keep_port(0).getsockname()[1]        # which nobody else is given meanwhile
    process = subprocess.Popen(["/bin/sh", "-c", 'exec "$0" "$@" >&-', sys.executable, str(devpi_lite.__file__), "--serverdir",
                                str(tmp_path / "x"), "--port", str(port), "--root-passwd", "pw", "--no-root-pypi"])
    try:
        def answers():
            try:
                with urllib.request.urlopen("http://127.0.0.1:%d/+api" % port, timeout=20) as reply:
                    return reply.status == 200
            except OSError:
                return False
        eventually(answers)
        process.terminate()
        assert process.wait(25) == 0
    finally:
        process.kill()


def test_a_reader_of_the_log_that_stalls_does_not_hold_up_the_end(tmp_path):
    process = subprocess.Popen([sys.executable, str(devpi_lite.__file__), "--serverdir", str(tmp_path / "x"), "--port", "0",
                                "--root-passwd", "pw", "--no-root-pypi"], stdout=subprocess.PIPE)
    try:
        port = int(re.search(rb":(\d+)/", process.stdout.readline()).group(1))
        with socket.create_connection(("127.0.0.1", port), 60) as client:
            request = b"GET /+api HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n" % (b"y" * 100)
            for _ in range(1500):       # lines for more than a pipe holds
                client.sendall(request)
                reply = b""
                while b"}}" not in reply:
                    reply += client.recv(65536) or pytest.fail("it closed the connection")
        process.terminate()
        assert process.wait(25) == 0    # running requests may take 30 s
    finally:
        process.kill()
        process.stdout.close()
