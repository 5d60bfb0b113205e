"""Mirror indexes: project pages and project lists that come from an upstream [W20]."""

import contextlib
import gzip
import hashlib
import html.parser
import itertools
import json
import re
import sqlite3
import threading
import time
from urllib.parse import urljoin

import pytest

from harness import (
    SCRIPT, SIMPLE_JSON, Server, Upstream, eventually, get, page, patched, path_of, project_list, user_pass,
    wheel)
from scripted import SHA, STALE, WAIT, asked, cache_control, entry, header, is_stale, mirror

numbers = itertools.count(1)


# -- tools


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory):
    """One server for this file."""
    server = Server(tmp_path_factory.mktemp("mirrors") / "data", "--request-timeout", WAIT).start()
    server.add_user("mia")
    yield server
    server.stop()


@pytest.fixture
def own(make_server):
    """A server of the test's own, to restart."""
    server = make_server("--request-timeout", WAIT)
    server.add_user("mia")
    return server


# -- asking upstream


@pytest.mark.parametrize("mode", ["json", "html"])
def test_upstream_page_is_passed_on(mirrors, upstream, mode):
    upstream.mode = mode
    first, second = upstream.publish("demo", "1.0"), upstream.publish("demo", "2.0")
    result = page(mirrors, mirror(mirrors, upstream.url))
    assert result.status == 200
    files = {file["filename"]: file for file in result.json()["files"]}
    assert set(files) == {first.filename, second.filename}
    assert files[first.filename]["hashes"] == {"sha256": first.sha256}
    assert files[first.filename]["url"].startswith("../../+f/%s/%s/" % (first.sha256[:3], first.sha256[3:16]))
    assert sorted(result.json()["versions"]) == ["1.0", "2.0"]
    assert result.json()["name"] == "demo"
    assert result.json()["meta"]["api-version"] == "1.4"


def test_upstream_request_has_devpis_headers(mirrors, upstream):
    upstream.publish("demo", "1.0")
    page(mirrors, mirror(mirrors, upstream.url))
    headers, = asked(upstream, "/simple/demo/")
    assert header(headers, "Accept") == (
        "application/vnd.pypi.simple.v1+html;q=0.2, application/vnd.pypi.simple.v1+json, text/html;q=0.01")
    assert header(headers, "User-Agent").startswith("devpi-server/")
    assert header(headers, "If-None-Match") is None
    assert header(headers, "Authorization") is None


def test_mirror_url_may_lack_the_final_slash(mirrors, upstream):
    upstream.publish("demo", "1.0")
    assert page(mirrors, mirror(mirrors, upstream.url.rstrip("/"))).status == 200
    assert len(asked(upstream, "/simple/demo/")) == 1


def test_upstream_is_asked_for_the_normalised_name(mirrors, scripted):
    scripted.page("zope-interface", entry("zope.interface-5.0.tar.gz"))
    assert mirrors.filenames(mirror(mirrors, scripted.url), "zope-interface") == ["zope.interface-5.0.tar.gz"]
    assert [path for _, path, _ in scripted.requests] == ["/simple/zope-interface/"]


def test_redirected_page_is_followed(mirrors, scripted):
    scripted.page("demo", entry("demo-1.0.tar.gz"))
    scripted.answers["/simple/demo/"], scripted.answers["/other/demo/"] = (
        lambda handler: handler.reply(b"", status=302, Location="/other/demo/"), scripted.answers["/simple/demo/"])
    assert mirrors.filenames(mirror(mirrors, scripted.url), "demo") == ["demo-1.0.tar.gz"]


def test_json_is_recognised_with_a_charset(mirrors, scripted):
    body = json.dumps({"meta": {"api-version": "1.0"}, "name": "demo", "files": [entry("demo-1.0.tar.gz")]}).encode()
    scripted.answers["/simple/demo/"] = lambda handler: handler.reply(body, SIMPLE_JSON + "; charset=utf-8")
    assert mirrors.filenames(mirror(mirrors, scripted.url), "demo") == ["demo-1.0.tar.gz"]


def test_compressed_page_is_understood(mirrors, scripted):
    body = json.dumps({"meta": {"api-version": "1.0"}, "name": "demo", "files": [entry("demo-1.0.tar.gz")]}).encode()

    def answer(handler):
        if "gzip" in (handler.headers["Accept-Encoding"] or ""):
            handler.reply(gzip.compress(body), SIMPLE_JSON, Content_Encoding="gzip")
        else:
            handler.reply(body, SIMPLE_JSON)
    scripted.answers["/simple/demo/"] = answer
    assert mirrors.filenames(mirror(mirrors, scripted.url), "demo") == ["demo-1.0.tar.gz"]


def test_one_project_never_costs_the_full_list(mirrors, upstream):
    archive = upstream.publish("demo", "1.0")
    index = mirror(mirrors, upstream.url)
    assert page(mirrors, index).status == 200
    assert page(mirrors, index, "nothing").status == 404
    assert mirrors.fetch(index, archive.filename, "demo") == archive.content
    assert mirrors.get("/%s/demo" % index).status == 200
    assert asked(upstream, "/simple/") == []


def test_simultaneous_askers_cost_one_upstream_request(mirrors, scripted):
    go, body = threading.Event(), json.dumps({"meta": {"api-version": "1.4"}, "name": "demo", "files": [entry("demo-1.0.tar.gz")]})
    scripted.answers["/simple/demo/"] = lambda handler: (go.wait(30), handler.reply(body.encode(), SIMPLE_JSON))
    index, results = mirror(mirrors, scripted.url), []
    accepted = [SIMPLE_JSON, "text/html"] * 5       # for each form one makes the page, and the others wait for that
    threads = [threading.Thread(target=lambda form=form: results.append(page(mirrors, index, accept=form).status))
               for form in accepted]
    for thread in threads:
        thread.start()
    eventually(lambda: asked(scripted))
    time.sleep(0.2)                     # lets the others arrive while the first one waits
    go.set()
    for thread in threads:
        thread.join(60)
    assert results == [200] * 10
    assert len(asked(scripted)) == 1


# -- freshness


def test_fresh_page_is_served_without_asking(mirrors, upstream):
    upstream.publish("demo", "1.0")
    index = mirror(mirrors, upstream.url)
    first = page(mirrors, index)
    upstream.publish("demo", "2.0")
    again = page(mirrors, index)
    assert again.json() == first.json()
    assert "max-age=60" in cache_control(again)
    assert "no-store" not in cache_control(again)
    assert len(asked(upstream)) == 1


def test_expiry_zero_asks_each_time(mirrors, upstream):
    index = mirror(mirrors, upstream.url, mirror_cache_expiry=0)
    for version in ("1.0", "2.0", "3.0"):
        upstream.publish("demo", version)
        assert version in mirrors.versions(index, "demo")
    assert len(asked(upstream, "/simple/demo/")) == 3


def test_expiry_option_holds_for_mirrors_without_one(make_server, upstream):
    server = make_server("--mirror-cache-expiry", "0")
    server.add_user("mia")
    upstream.publish("demo", "1.0")
    for index, requests in ((mirror(server, upstream.url), 2), (mirror(server, upstream.url, mirror_cache_expiry=1000), 1)):
        upstream.reset()
        assert [page(server, index).status for _ in range(2)] == [200, 200]
        assert len(asked(upstream, "/simple/demo/")) == requests


def test_page_is_asked_for_again_after_its_expiry(mirrors, upstream):
    upstream.publish("demo", "1.0")
    index = mirror(mirrors, upstream.url, mirror_cache_expiry=2)
    began = time.monotonic()
    assert mirrors.versions(index, "demo") == ["1.0"]
    upstream.publish("demo", "2.0")
    assert mirrors.versions(index, "demo") == ["1.0"] or time.monotonic() - began > 2
    eventually(lambda: "2.0" in mirrors.versions(index, "demo"))


def test_revalidation_sends_the_last_etag_and_keeps_links_on_304(mirrors, scripted):
    body = json.dumps({"meta": {"api-version": "1.4"}, "name": "demo", "files": [entry("demo-1.0.tar.gz")]}).encode()

    def answer(handler):
        if handler.headers["If-None-Match"] == '"one"':
            handler.send_response(304)
            handler.end_headers()
        else:
            handler.reply(body, SIMPLE_JSON, ETag='"one"')
    scripted.answers["/simple/demo/"] = answer
    index = mirror(mirrors, scripted.url, mirror_cache_expiry=0)
    replies = [page(mirrors, index) for _ in range(3)]
    assert [header(headers, "If-None-Match") for headers in asked(scripted)] == [None, '"one"', '"one"']
    assert [reply.status for reply in replies] == [200] * 3
    assert [reply.json()["files"] for reply in replies] == [replies[0].json()["files"]] * 3
    assert replies[0].json()["files"][0]["filename"] == "demo-1.0.tar.gz"
    assert not is_stale(replies[2])


def test_304_makes_a_page_fresh_again(mirrors, upstream):
    upstream.publish("demo", "1.0")
    index = mirror(mirrors, upstream.url, mirror_cache_expiry=2)
    page(mirrors, index)
    began = []

    def asked_again():
        began.append(time.monotonic())
        page(mirrors, index)
        return len(asked(upstream)) == 2
    eventually(asked_again)
    for _ in range(3):
        page(mirrors, index)
    assert len(asked(upstream)) == 2 or time.monotonic() - began[-1] > 2


def test_clients_etag_holds_until_upstream_changes(mirrors, upstream):
    upstream.publish("demo", "1.0")
    index = mirror(mirrors, upstream.url, mirror_cache_expiry=0)
    etag = page(mirrors, index).headers.get("ETag")
    conditional = {"Accept": SIMPLE_JSON, "If-None-Match": etag}
    reply = mirrors.get("/%s/+simple/demo/" % index, headers=conditional)
    assert (reply.status, reply.body, reply.headers.get("Content-Type")) == (304, b"", None)
    upstream.publish("demo", "2.0")
    reply = mirrors.get("/%s/+simple/demo/" % index, headers=conditional)
    assert reply.status == 200
    assert reply.headers.get("ETag") != etag


def test_not_found_is_remembered_until_it_expires(mirrors, upstream):
    index = mirror(mirrors, upstream.url, mirror_cache_expiry=2)
    began = time.monotonic()
    for _ in range(3):
        reply = mirrors.get("/%s/+simple/demo/" % index)
        assert reply.status == 404
        assert reply.json()["message"] == "The project demo does not exist."
    assert len(asked(upstream)) == 1 or time.monotonic() - began > 2
    upstream.publish("demo", "1.0")
    eventually(lambda: page(mirrors, index).status == 200)


def test_a_page_from_the_future_is_asked_for_again(own, upstream):
    """The clock was set back since it came."""
    upstream.publish("demo", "1.0")
    index = mirror(own, upstream.url)
    assert own.versions(index, "demo") == ["1.0"]
    own.stop()
    with contextlib.closing(sqlite3.connect(str(own.directory / "devpi_lite.db"))) as db, db:
        db.execute("UPDATE projects SET fetched = fetched + 7200 WHERE name = 'demo'")
    own.start()
    upstream.publish("demo", "2.0")
    assert sorted(own.versions(index, "demo")) == ["1.0", "2.0"]


def test_project_without_files_exists(mirrors, scripted):
    scripted.page("demo")
    reply = page(mirrors, mirror(mirrors, scripted.url))
    assert (reply.status, reply.json()["files"]) == (200, [])


def test_a_long_page_is_entered_in_steps_and_shown_whole(make_server, tmp_path, scripted):
    limits = "devpi_lite.Limits.entries_at_once = 10\n"
    first_step_only = limits + ("def stop(*_): raise devpi_lite.NoSpace('no room')\n"
                                "devpi_lite._store_page = stop")
    server = make_server("--mirror-cache-expiry", "0", script=patched(tmp_path, first_step_only))
    server.add_user("mia")
    index = mirror(server, scripted.url, mirror_no_project_list=True)
    listed = [entry("demo-1.%d.tar.gz" % number, hashes={"sha256": "%064x" % number}) for number in range(95)]
    scripted.page("demo", *listed)
    assert page(server, index).status == 200    # from what upstream gave; to store it is what fails
    assert server.get("/%s/+f/000/%s/demo-1.94.tar.gz" % (index, "%013x" % 0)).status == 507
    scripted.answers["/simple/demo/"] = None
    assert page(server, index).status == 404    # some files are entered, but nothing is shown

    server.script = patched(tmp_path, limits)
    server.restart()
    later = [entry("demo-2.%d.tar.gz" % number, hashes={"sha256": "%064x" % (number + 1000)}) for number in range(40)]
    for expected in (listed, listed[:7] + later[::-1] + listed[12:], later + listed[::-1]):
        scripted.page("demo", *expected)
        found = page(server, index).json()["files"]
        assert [file["filename"] for file in found] == [file["filename"] for file in expected]

    assert server.get("/%s/demo" % index).status == 200     # it is stored
    server.script = patched(tmp_path, first_step_only)
    server.restart()
    scripted.page("demo", *(entry("demo-3.%d.tar.gz" % number, hashes={"sha256": "%064x" % (number + 2000)}) for number in range(95)))
    found = page(server, index)
    assert is_stale(found) and [file["filename"] for file in found.json()["files"]] == [file["filename"] for file in expected]


# Every page of more than one file is a long one, which is given before it is stored.
GIVEN_FIRST = "devpi_lite.Limits.entries_at_once = 1\n"
SLOW_STORE = GIVEN_FIRST + """
import time
store_page = devpi_lite._store_page

def store_later(*args):
    time.sleep(%g)
    return store_page(*args)

devpi_lite._store_page = store_later
"""


def mirrored_with(code, own, tmp_path, upstream, *options):
    """An archive of the two of `demo` upstream, and a mirror on the program changed by `code`."""
    archive, _ = upstream.publish("demo", "1.0"), upstream.publish("demo", "2.0")
    own.stop()
    own.script = patched(tmp_path, code)
    own.start(*options)
    return archive, mirror(own, upstream.url)


def last_path(server, index, project):
    """The path of the last file on a page: those before may be entered already."""
    return "/%s/+f/%s" % (index, page(server, index, project).json()["files"][-1]["url"].partition("/+f/")[2])


def test_a_new_page_is_given_before_it_is_stored(own, tmp_path, upstream):
    archive, index = mirrored_with(SLOW_STORE % 1, own, tmp_path, upstream)
    began = time.monotonic()
    before = [page(own, index), page(own, index)]
    assert time.monotonic() - began < 0.9 and not any(map(is_stale, before))
    assert own.fetch(index, archive.filename, "demo") == archive.content       # it waits
    assert time.monotonic() - began > 1
    assert [reply.json() for reply in before] == 2 * [page(own, index).json()]
    assert upstream.count("/simple/demo/") == 1


def test_a_page_that_was_given_but_not_stored_is_fetched_anew(own, tmp_path, upstream):
    archive, index = mirrored_with(SLOW_STORE % 60, own, tmp_path, upstream)
    assert page(own, index).status == 200
    own.kill()
    own.script = SCRIPT
    own.start()
    assert sorted(own.versions(index, "demo")) == ["1.0", "2.0"] and own.fetch(index, archive.filename, "demo") == archive.content
    assert upstream.count("/simple/demo/") == 2


def test_a_page_that_could_not_be_stored_is_not_kept_in_memory_either(own, tmp_path, upstream):
    archive, index = mirrored_with(GIVEN_FIRST + """
devpi_lite.Limits.upstream_pause = 0
store_page, refusals = devpi_lite._store_page, iter([devpi_lite.NoSpace("no room")])

def store_or_refuse(*args):
    for refusal in refusals:
        raise refusal
    return store_page(*args)

devpi_lite._store_page = store_or_refuse
""", own, tmp_path, upstream)
    assert own.get(last_path(own, index, "demo")).status == 404      # it waits
    assert sorted(own.versions(index, "demo")) == ["1.0", "2.0"] and own.fetch(index, archive.filename, "demo") == archive.content
    assert upstream.count("/simple/demo/") == 2


def test_a_listed_file_is_not_denied_while_its_page_is_being_stored(own, tmp_path, upstream):
    _, index = mirrored_with(SLOW_STORE % 3, own, tmp_path, upstream, "--request-timeout", "1")
    path = last_path(own, index, "demo")
    reply = own.get(path)
    assert reply.status == 503 and "Retry-After" in reply.headers
    assert own.get("/%s/+f/000/0000000000000/other-1.0.zip" % index).status == 404       # it does not wait
    assert eventually(lambda: own.get(path).status == 200)


def test_what_one_project_could_not_store_another_does_not_hide(own, tmp_path, upstream):
    for project, version in (("bad", "1.0"), ("bad", "2.0"), ("good", "1.0"), ("good", "2.0")):
        upstream.publish(project, version)
    own.stop()
    own.script = patched(tmp_path, GIVEN_FIRST + """
store_page = devpi_lite._store_page

def refuse_bad(change, index, name, *args):
    if name == "bad":
        raise ValueError("odd")
    return store_page(change, index, name, *args)

devpi_lite._store_page = refuse_bad
""")
    own.start()
    index = mirror(own, upstream.url)
    path = last_path(own, index, "bad")
    assert own.get(path).status == 502
    assert page(own, index, "good").status == 200 and page(own, index, "bad").status == 502
    assert own.get(path).status == 502


def test_restart_keeps_pages_fresh(own, upstream):
    archive = upstream.publish("demo", "1.0")
    index = mirror(own, upstream.url)
    before = page(own, index).json()
    assert list(own.get("/%s/demo" % index).result) == ["1.0"]      # it is stored
    own.restart()
    upstream.reset()
    assert page(own, index).json() == before
    assert asked(upstream) == []
    assert own.fetch(index, archive.filename, "demo") == archive.content


def test_restart_revalidates_what_has_expired(own, upstream):
    upstream.publish("demo", "1.0")
    index = mirror(own, upstream.url, mirror_cache_expiry=0)
    page(own, index)
    assert list(own.get("/%s/demo" % index).result) == ["1.0"]      # it is stored
    own.restart()
    upstream.reset()
    assert page(own, index).status == 200
    headers, = asked(upstream, "/simple/demo/")
    assert header(headers, "If-None-Match")


# -- trouble upstream


FAULTS = ["500", "reset", "truncate", "garbage", "html-as-json", "redirect-loop", "hang", "huge"]


@pytest.mark.parametrize("fault", FAULTS)
def test_last_good_page_is_served_stale(mirrors, upstream, fault):
    upstream.publish("demo", "1.0")
    index = mirror(mirrors, upstream.url, mirror_cache_expiry=0)
    good = page(mirrors, index)
    assert not is_stale(good)
    upstream.fault(fault, "/simple/demo/*")
    started = time.monotonic()
    reply = page(mirrors, index)
    assert is_stale(reply)
    assert reply.headers.get("Pragma") == "no-cache"
    assert reply.headers.get("Expires") and reply.headers.get("Last-Modified")
    assert reply.json()["files"] == good.json()["files"]
    assert time.monotonic() - started < WAIT + 20       # the fetch behind it may take 30


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "hang"])
def test_nothing_cached_is_502_and_not_remembered(mirrors, upstream, fault):
    upstream.publish("demo", "1.0")
    index = mirror(mirrors, upstream.url)
    upstream.fault(fault, "/simple/demo/*")
    started = time.monotonic()
    reply = page(mirrors, index)
    assert reply.status == 502
    assert reply.body
    assert time.monotonic() - started < WAIT + 20       # the fetch behind it may take 30
    if fault != "huge":                 # there the first fetch still goes on
        upstream.clear_faults()
        assert page(mirrors, index).status == 200


@pytest.mark.parametrize("times, status", [(1, 200), (2, 502)])
def test_one_connection_that_upstream_closes_without_an_answer_is_forgiven(mirrors, upstream, times, status):
    upstream.publish("demo", "1.0")
    index = mirror(mirrors, upstream.url)
    upstream.fault("reset", "/simple/demo/*", times=times)
    assert page(mirrors, index).status == status
    assert upstream.count("/simple/demo/") == 2


def test_unreachable_upstream_is_stale_or_502_and_comes_back(mirrors, upstream):
    upstream.publish("demo", "1.0")
    index = mirror(mirrors, upstream.url, mirror_cache_expiry=0)
    page(mirrors, index)
    upstream.stop()
    assert is_stale(page(mirrors, index))
    assert page(mirrors, index, "other").status == 502
    upstream.start()
    eventually(lambda: page(mirrors, index, "other").status == 404)
    eventually(lambda: not is_stale(page(mirrors, index)))


def test_project_json_is_502_when_upstream_fails(mirrors, upstream):
    upstream.fault("500", "/simple/demo/")
    assert mirrors.get("/%s/demo" % mirror(mirrors, upstream.url)).status == 502


def test_a_project_that_upstream_has_no_more_is_gone_but_for_its_files(mirrors, upstream):
    archive = upstream.publish("demo", "1.0")
    index = mirror(mirrors, upstream.url, mirror_cache_expiry=0, mirror_no_project_list=True)
    mirrors.add_index("mia/over-" + index[4:], bases=[index])
    path, = [file["url"] for file in mirrors.simple(index, "demo")["files"]]
    upstream.fault("404", "/simple/demo/")
    for where in (index, "mia/over-" + index[4:]):
        assert page(mirrors, where).status == 404
        assert mirrors.get("/%s/demo" % where).status == 404
    assert project_list(mirrors, index) == []
    assert "does not have the project demo any more; 1 files stay" in mirrors.whole_output()
    assert mirrors.get("/+status").result["upstream-removed"] >= 1
    counted = 'devpi_lite_upstream_removed_total{index="%s"} 1\n' % index
    assert counted in mirrors.get("/+metrics").text
    reply = mirrors.get(urljoin("/%s/+simple/demo/" % index, path), headers={"Accept": "*/*"})
    assert (reply.status, reply.body) == (200, archive.content)
    upstream.clear_faults()
    assert mirrors.filenames(index, "demo") == [archive.filename]


# -- failures are remembered


def over(server, *bases):
    index = "mia/over%d" % next(numbers)
    server.add_index(index, bases=list(bases))
    return index


@pytest.mark.parametrize("status", (403, 500, None))
def test_a_page_that_failed_is_not_asked_for_again_at_once(mirrors, upstream, scripted, status):
    """But a failure that may have been passing is, where nobody else knows the project."""
    upstream.publish("lib", "1.0")
    broken = (lambda handler: handler.reply(b"no", status=status)) if status else b"no page"
    scripted.answers["/simple/lib/"] = scripted.answers["/simple/rare/"] = broken
    store, main = mirror(mirrors, scripted.url), mirror(mirrors, upstream.url)
    both = over(mirrors, store, main)
    for _ in range(3):
        assert mirrors.versions(both, "lib") == ["1.0"]
    assert len(asked(scripted, "/simple/lib/")) == 1
    for _ in range(2):
        assert page(mirrors, both, "rare").status == page(mirrors, store, "rare").status == 502
    assert len(asked(scripted, "/simple/rare/")) == (1 if status == 403 else 4)
    scripted.page("rare", entry("rare-1.0.tar.gz"))
    assert mirrors.post("/%s/+simple/rare/refresh" % store, b"").status == 302
    assert page(mirrors, both, "rare").status == page(mirrors, store, "rare").status == 200


def test_an_old_page_does_for_a_while_where_a_new_one_failed(mirrors, scripted):
    scripted.page("lib", entry("lib-1.0.tar.gz"))
    index = mirror(mirrors, scripted.url, mirror_cache_expiry=0)
    page(mirrors, index, "lib")
    assert project_list(mirrors, index) == ["lib"]      # it is stored
    scripted.answers["/simple/lib/"] = lambda handler: handler.reply(b"", status=500)
    for _ in range(3):
        assert is_stale(page(mirrors, index, "lib"))
    assert len(asked(scripted, "/simple/lib/")) == 2


def test_a_list_that_does_not_come_pauses_no_pages(mirrors, scripted):
    scripted.page("lib", entry("lib-1.0.tar.gz"))
    scripted.answers["/simple/"] = lambda handler: handler.rfile.close()
    index = mirror(mirrors, scripted.url, mirror_cache_expiry=0)
    page(mirrors, index, "lib")
    assert project_list(mirrors, index) == ["lib"] and asked(scripted, "/simple/")
    assert not is_stale(page(mirrors, index, "lib"))


def test_a_mirror_that_hangs_is_waited_for_once(own, tmp_path, upstream):
    own.stop()
    own.script = patched(tmp_path, "devpi_lite.Limits.upstream_stall = 0.3")
    own.start()
    other = Upstream().start()
    try:
        other.publish("lib", "1.0")
        upstream.fault("hang", "/simple/*")
        both = over(own, mirror(own, upstream.url), mirror(own, other.url))
        for project in ("lib", "lib"):
            assert own.versions(both, project) == ["1.0"]
        assert upstream.count("/simple/lib/") == 1
        upstream.clear_faults()
        upstream.publish("rare", "2.0")
        assert own.versions(both, "rare") == ["2.0"]        # for nobody else has it
    finally:
        other.stop()


def test_statuses_that_mean_that_nothing_is_there_are_the_owners_to_say(mirrors, upstream, scripted):
    upstream.publish("lib", "1.0")
    scripted.answers["/simple/lib/"] = scripted.answers["/files/x"] = lambda handler: handler.reply(b"", status=403)
    scripted.page("own", entry("own-1.0.tar.gz", url="/files/x"))
    store, main = mirror(mirrors, scripted.url), mirror(mirrors, upstream.url)
    both = over(mirrors, store, main)
    assert page(mirrors, store, "lib").status == 502
    assert is_stale(page(mirrors, both, "lib"))
    for value, kept in ((403, ["403"]), ("403, 451", ["403", "451"]), (["401", 403], ["401", "403"])):
        reply = mirrors.patch("/" + store, {"mirror_missing_statuses": value}, user="mia")
        assert (reply.status, reply.result["mirror_missing_statuses"]) == (200, kept)
    assert page(mirrors, store, "lib").status == 404        # the failure was remembered for other settings
    assert not is_stale(page(mirrors, both, "lib")) and mirrors.versions(both, "lib") == ["1.0"]
    assert len(asked(scripted, "/simple/lib/")) == 2        # it is remembered as a 404 is
    link, = mirrors.simple(store, "own")["files"]
    assert mirrors.get(urljoin("/%s/+simple/own/" % store, link["url"]), headers={"Accept": "*/*"}).status == 404
    reply = mirrors.patch("/" + store, ["mirror_missing_statuses-=401", "mirror_missing_statuses+=410"], user="mia")
    assert reply.result["mirror_missing_statuses"] == ["403", "410"]
    for value in (200, "500", "4xx", [429], {"a": 1}, True):
        reply = mirrors.patch("/" + store, {"mirror_missing_statuses": value}, user="mia")
        assert reply.status == 400, value
    mirrors.patch("/" + store, {"mirror_missing_statuses": None}, user="mia")
    assert page(mirrors, store, "lib").status == 502


# -- refreshes, missing upstreams


def test_a_project_is_refreshed_once_a_second_at_most(mirrors, upstream):
    upstream.publish("lib", "1.0")
    index = mirror(mirrors, upstream.url)
    above = over(mirrors, index)
    began = time.monotonic()
    for where in (index, above) * 4:
        assert mirrors.post("/%s/+simple/lib/refresh" % where, b"").status == 302
    assert upstream.count("/simple/lib/") <= 1 + int(time.monotonic() - began)
    assert mirrors.post("/%s/+simple/other/refresh" % above, b"").status == 302
    assert upstream.count("/simple/other/") == 1


def test_a_mirror_that_may_not_be_read_is_not_refreshed(mirrors, upstream):
    protected = mirror(mirrors, upstream.url, acl_pkg_read=["mia"])
    above = over(mirrors, protected)
    assert mirrors.post("/%s/+simple/lib/refresh" % above, b"").status == 302
    assert asked(upstream) == []
    assert mirrors.post("/%s/+simple/lib/refresh" % above, b"", user="mia").status == 302
    assert upstream.count("/simple/lib/") == 1


def test_a_mirror_without_an_upstream_answers(mirrors, upstream):
    index = "mia/m%d" % next(numbers)
    assert mirrors.put("/" + index, {"type": "mirror"}, user="mia").status == 200
    assert "mirror_url" not in mirrors.get("/" + index).result
    assert page(mirrors, index).status == mirrors.get("/%s/demo" % index).status == 404
    assert project_list(mirrors, index) == [] == mirrors.get("/" + index).result["projects"]
    assert mirrors.post("/%s/+simple/demo/refresh" % index, b"").status == 302
    assert page(mirrors, over(mirrors, index)).status == 404
    archive = upstream.publish("demo", "1.0")
    assert mirrors.patch("/" + index, {"mirror_url": upstream.url}, user="mia").status == 200
    assert mirrors.fetch(index, archive.filename, "demo") == archive.content


def test_an_index_has_a_bounded_number_of_bases(mirrors, upstream):
    index, base = over(mirrors), mirror(mirrors, upstream.url)
    many = ["mia/none%d" % number for number in range(100)]
    for body in ({"bases": [base, *many]}, ["bases=" + ",".join([base, *many])]):
        reply = mirrors.patch("/" + index, body, user="mia")
        assert reply.status == 400 and "100 bases at most, not 101" in reply.json()["message"]


def test_wait_is_bounded_and_the_fetch_goes_on_behind_it(mirrors, upstream):
    upstream.publish("demo", "1.0")
    index = mirror(mirrors, upstream.url)
    upstream.fault("delay", "/simple/demo/", seconds=WAIT + 25)     # until it is let go
    started = time.monotonic()
    assert page(mirrors, index).status == 502
    assert WAIT * 0.9 < time.monotonic() - started < WAIT + 20
    upstream.clear_faults()
    eventually(lambda: page(mirrors, index).status == 200)
    assert len(asked(upstream, "/simple/demo/")) == 1


def test_expired_page_is_stale_at_the_bound_and_new_afterwards(mirrors, upstream):
    upstream.publish("demo", "1.0")
    index = mirror(mirrors, upstream.url, mirror_cache_expiry=0)
    page(mirrors, index)
    upstream.publish("demo", "2.0")
    upstream.fault("delay", "/simple/demo/", times=1, seconds=WAIT + 25)        # until it is let go
    started = time.monotonic()
    reply = page(mirrors, index)
    assert is_stale(reply)
    assert reply.json()["versions"] == ["1.0"]
    assert WAIT * 0.9 < time.monotonic() - started < WAIT + 20
    upstream.clear_faults()
    eventually(lambda: "2.0" in mirrors.versions(index, "demo"))


def test_slow_upstream_does_not_slow_other_projects(mirrors, upstream):
    upstream.publish("demo", "1.0")
    upstream.publish("slow", "1.0")
    index = mirror(mirrors, upstream.url)
    upstream.fault("delay", "/simple/slow/", seconds=WAIT + 25)     # until it is let go
    waiting = threading.Thread(target=page, args=(mirrors, index, "slow"))
    waiting.start()
    eventually(lambda: asked(upstream, "/simple/slow/"))
    started = time.monotonic()
    assert page(mirrors, index).status == 200       # and not 502 after WAIT, as for one that waits
    assert time.monotonic() - started < WAIT + 20
    upstream.clear_faults()
    waiting.join(30)


@pytest.mark.parametrize("document", [
    b"", b"[]", b"null", b'"files"', b'{"meta": {"api-version": "1.0"}, "name": "demo", "files": 5}',
    b'{"meta": {"api-version": "2.0"}, "name": "demo", "files": []}', b"[" * 200000, b'{"files": [\xff\xfe]}',
], ids=["empty", "list", "null", "text", "files-no-list", "api-version-2", "deep", "not-utf-8"])
def test_wrong_documents_are_failures_not_empty_pages(mirrors, scripted, document):
    scripted.answers["/simple/demo/"] = lambda handler: handler.reply(document, SIMPLE_JSON)
    assert page(mirrors, mirror(mirrors, scripted.url)).status == 502


@pytest.mark.parametrize("status", [201, 204, 401, 403, 410, 429, 503])
def test_only_404_means_not_found(mirrors, scripted, status):
    scripted.answers["/simple/demo/"] = lambda handler: handler.reply(b"" if status == 204 else b"no", status=status)
    assert page(mirrors, mirror(mirrors, scripted.url)).status == 502


def test_redirect_to_a_local_file_is_refused(mirrors, scripted):
    scripted.answers["/simple/demo/"] = lambda handler: handler.reply(b"", status=302, Location="file:///etc/passwd")
    reply = page(mirrors, mirror(mirrors, scripted.url))
    assert reply.status == 502
    assert b"root:" not in reply.body


# -- a mirror as a base


def stage_on(server, index, **config):
    stage = "mia/s%d" % next(numbers)
    server.add_index(stage, bases=[index], acl_upload=["mia"], **config)
    return stage


def test_failing_base_is_502_never_not_found(mirrors, upstream):
    upstream.publish("demo", "1.0")
    stage = stage_on(mirrors, mirror(mirrors, upstream.url))
    upstream.fault("500", "/simple/demo/")
    assert page(mirrors, stage).status == 502
    upstream.clear_faults()
    assert page(mirrors, stage).status == 200


@pytest.mark.parametrize("whitelist", [[], ["*"]], ids=["blocked", "let-through"])
def test_own_files_are_served_when_the_base_fails(mirrors, upstream, whitelist):
    stage, archive = stage_on(mirrors, mirror(mirrors, upstream.url), mirror_whitelist=whitelist), wheel("demo", "0.1")
    assert mirrors.upload(stage, archive, user="mia").status == 200
    upstream.fault("500")
    assert mirrors.filenames(stage, "demo") == [archive.filename]
    assert bool(asked(upstream, "/simple/demo/")) == bool(whitelist)


# -- the project list


def test_list_is_fetched_when_asked_for_and_normalised(mirrors, scripted):
    scripted.answers["/simple/"] = {"meta": {"api-version": "1.0"}, "projects": [
        {"name": name} for name in ("Zope.Interface", "abc", "zope-interface", "A_B.C", "abc")]}
    index = mirror(mirrors, scripted.url)
    assert sorted(project_list(mirrors, index)) == ["a-b-c", "abc", "zope-interface"]
    assert [path for _, path, _ in scripted.requests] == ["/simple/"]
    assert mirrors.get("/" + index).result["projects"] == ["a-b-c", "abc", "zope-interface"]
    text = mirrors.get("/%s/+simple/" % index, headers={"Accept": "text/html"}).text
    assert sorted(re.findall(r'<a href="([^"]*)/"', text)) == ["a-b-c", "abc", "zope-interface"]


def test_list_in_html(mirrors, scripted):
    scripted.answers["/simple/"] = b'<!DOCTYPE html><html><body><a href="/simple/b/">B</a><br>\n<A HREF=\'a-x/\'>A_x</A></body></html>'
    assert sorted(project_list(mirrors, mirror(mirrors, scripted.url))) == ["a-x", "b"]


def test_list_that_starts_with_a_brace_is_json(mirrors, scripted):
    body = b'{"meta": {"api-version": "1.0"}, "projects": [{"name": "demo"}]}'
    scripted.answers["/simple/"] = lambda handler: handler.reply(body, "text/html")
    assert project_list(mirrors, mirror(mirrors, scripted.url)) == ["demo"]


def test_fresh_list_is_not_fetched_again(mirrors, upstream):
    upstream.publish("demo", "1.0")
    index = mirror(mirrors, upstream.url)
    assert project_list(mirrors, index) == project_list(mirrors, index) == ["demo"]
    assert len(asked(upstream, "/simple/")) == 1


def test_list_is_revalidated_and_kept_on_304(mirrors, scripted):
    body = b'{"meta": {"api-version": "1.0"}, "projects": [{"name": "one"}, {"name": "two"}]}'

    def answer(handler):
        known = handler.headers["If-None-Match"] == '"list"'
        handler.reply(b"" if known else body, SIMPLE_JSON, status=304 if known else 200, ETag='"list"')
    scripted.answers["/simple/"] = answer
    index = mirror(mirrors, scripted.url, mirror_cache_expiry=0)
    assert sorted(project_list(mirrors, index)) == sorted(project_list(mirrors, index)) == ["one", "two"]
    assert [header(headers, "If-None-Match") for headers in asked(scripted)] == [None, '"list"']


@pytest.mark.parametrize("fault", ["500", "reset", "truncate", "garbage", "404"])
def test_last_good_list_is_served_when_upstream_fails(mirrors, upstream, fault):
    upstream.publish("demo", "1.0")
    upstream.publish("other", "1.0")
    index = mirror(mirrors, upstream.url, mirror_cache_expiry=0)
    assert sorted(project_list(mirrors, index)) == ["demo", "other"]
    upstream.fault(fault, "/simple/")
    assert sorted(project_list(mirrors, index)) == ["demo", "other"]


def test_only_cached_projects_are_listed_when_no_list_ever_came(mirrors, upstream):
    for name in ("demo", "other"):
        upstream.publish(name, "1.0")
    upstream.fault("500", "/simple/")
    index = mirror(mirrors, upstream.url)
    page(mirrors, index)
    page(mirrors, index, "nothing")
    assert project_list(mirrors, index) == ["demo"]


def test_while_too_much_is_asked_of_upstream_what_is_here_is_served(make_server, tmp_path, upstream):
    upstream.publish("demo", "1.0")
    server = make_server()
    server.add_user("mia")
    index = mirror(server, upstream.url, mirror_cache_expiry=0)
    server.add_index("mia/dev", bases=[index], mirror_whitelist=["*"])
    assert server.upload("mia/dev", wheel("mine", "1.0")).status == 200
    assert (page(server, index).status, project_list(server, index)) == (200, ["demo"])
    assert list(server.get("/%s/demo" % index).result) == ["1.0"]      # it is stored
    server.stop()
    server.script = patched(tmp_path, "limits = devpi_lite.Limits; limits.waiting_flights = limits.fetches_of_one = 0")
    server.start()
    for where, project, status in ((index, "demo", 200), ("mia/dev", "mine", 200), (index, "new", 503), ("mia/dev", "new", 503)):
        reply = page(server, where, project)
        assert reply.status == status, reply
        if status == 200:
            assert STALE <= set(reply.headers["Cache-Control"].split(", "))
    assert (project_list(server, index), sorted(project_list(server, "mia/dev"))) == (["demo"], ["demo", "mine"])
    assert server.post("/%s/+simple/demo/refresh" % index, b"").status == 302
    unlisted = mirror(server, upstream.url)
    assert server.get("/%s/+simple/" % unlisted).status == 503
    assert server.get("/%s/" % unlisted).result["projects"] == []
    assert sorted(project_list(server, "mia/dev")) == ["demo", "mine"]


def test_a_name_that_is_too_long_is_not_asked_for(mirrors, upstream):
    index, name = mirror(mirrors, upstream.url), "x" * 201
    assert mirrors.post("/%s/+simple/%s/refresh" % (index, name), b"").status == 302
    assert page(mirrors, index, name).status == 404
    assert asked(upstream) == []


# The program, in which two lists may be compared once.
COMPARE_ONCE = """
compare = devpi_lite.MirrorNames.only_in
def once(self, other):
    del devpi_lite.MirrorNames.only_in
    return compare(self, other)
devpi_lite.MirrorNames.only_in = once
"""


def test_two_full_lists_are_compared_once(make_server, tmp_path, scripted):
    lists = [["both-%d" % number for number in range(200)] + more for more in (["only-a", "z"], ["aa", "only-b", "own"])]
    server = make_server(script=patched(tmp_path, COMPARE_ONCE))
    server.add_user("mia")
    for place, found in zip("ab", lists):
        scripted.answers["/%s/" % place] = {"meta": {"api-version": "1.0"}, "projects": [{"name": name} for name in found]}
        server.add_mirror("mia/" + place, "%s/%s/" % (scripted.host_url, place))
    server.add_index("mia/dev", bases=["mia/a", "mia/b"])
    for name in ("own", "z"):
        assert server.upload("mia/dev", wheel(name, "1.0")).status == 200
    for _ in range(2):
        assert sorted(project_list(server, "mia/dev")) == sorted({*lists[0], *lists[1]})


def test_no_project_list_never_asks_for_it(mirrors, upstream):
    for name in ("demo", "other"):
        upstream.publish(name, "1.0")
    index = mirror(mirrors, upstream.url, mirror_no_project_list=True)
    assert project_list(mirrors, index) == []
    assert page(mirrors, index).status == 200
    assert project_list(mirrors, index) == ["demo"]
    assert mirrors.get("/" + index).result["projects"] == ["demo"]
    assert asked(upstream, "/simple/") == []


def test_list_survives_a_restart(own, upstream):
    upstream.publish("demo", "1.0")
    index = mirror(own, upstream.url)
    assert project_list(own, index) == ["demo"]
    own.restart()
    upstream.stop()
    assert project_list(own, index) == ["demo"]


def test_long_list_is_no_hindrance_to_small_pages(mirrors, scripted):
    go, many = threading.Event(), ["p%d" % number for number in range(50000)]
    body = json.dumps({"meta": {"api-version": "1.0"}, "projects": [{"name": name} for name in many]}).encode()

    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", SIMPLE_JSON)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:len(body) // 2])
        go.wait(30)
        handler.wfile.write(body[len(body) // 2:])
    scripted.answers["/simple/"] = answer
    scripted.page("demo", entry("demo-1.0.tar.gz"))
    index, listed, waits = mirror(mirrors, scripted.url), [], []
    waiting = threading.Thread(target=lambda: listed.extend(project_list(mirrors, index)))
    waiting.start()
    eventually(lambda: asked(scripted, "/simple/"))
    began = time.monotonic()
    while waiting.is_alive() and len(waits) < 2000:
        started = time.monotonic()
        assert page(mirrors, index).status == 200
        waits.append(time.monotonic() - started)
        go.set()                        # the first page was answered while the list was still on its way
        time.sleep(0.01)
    took = time.monotonic() - began
    waiting.join(30)
    assert sorted(listed) == sorted(many)
    assert max(waits) < max(0.5, took / 3)


def test_hostile_names_in_a_list_reach_no_page(mirrors, scripted):
    scripted.answers["/simple/"] = {"meta": {"api-version": "1.0"}, "projects": [
        {"name": "good"}, {"name": '"><script>alert(1)</script>'}, {"name": "../../etc"}, {"name": "a\r\nb"}, {"name": ""}, {"name": 5}, {}, 7]}
    index = mirror(mirrors, scripted.url)
    listed = project_list(mirrors, index)
    assert "good" in listed
    assert all(re.fullmatch("[a-z0-9-]+", name) for name in listed)
    text = mirrors.get("/%s/+simple/" % index, headers={"Accept": "text/html"}).text
    assert "<script" not in text and ".." not in text


# -- credentials, change of upstream


SECRET = re.compile("p@ss|p%40ss|" + re.escape(user_pass("bob", "p@ss")))


def test_credentials_go_upstream_and_nowhere_else(mirrors, upstream):
    upstream.credentials = ("bob", "p@ss")
    archive = upstream.publish("demo", "1.0")
    upstream.publish("broken", "1.0")
    upstream.fault("500", "*broken*")
    index = mirror(mirrors, upstream.url.replace("http://", "http://bob:p%40ss@"))
    replies = [page(mirrors, index), page(mirrors, index, accept="text/html"), mirrors.get("/%s/demo" % index), page(mirrors, index, "broken")]
    assert [reply.status for reply in replies] == [200, 200, 200, 502]
    path = path_of(archive, index)
    replies += [mirrors.get(path), mirrors.get(path, headers={"Accept": "*/*"})]
    assert replies[-1].body == archive.content
    for headers in asked(upstream):
        assert header(headers, "Authorization") == "Basic " + user_pass("bob", "p@ss")
    for reply in replies:
        assert not SECRET.search(reply.body.decode("latin-1"))
        assert not SECRET.search(str(reply.headers))
    assert not SECRET.search(mirrors.whole_output())


def test_without_the_right_credentials_upstream_is_a_failure(mirrors, upstream):
    upstream.credentials = ("bob", "p@ss")
    upstream.publish("demo", "1.0")
    assert page(mirrors, mirror(mirrors, upstream.url)).status == 502


def test_credentials_are_not_sent_to_another_host(mirrors, upstream, scripted):
    upstream.credentials = ("bob", "p@ss")
    content = b"other host's file"
    scripted.answers["/files/demo-1.0.tar.gz"] = content
    scripted.answers["/simple/demo/"] = lambda handler: handler.reply(
        ("<a href='%s/files/demo-1.0.tar.gz'>demo-1.0.tar.gz</a>" % scripted.host_url.replace("127.0.0.1", "localhost")).encode())
    index = mirror(mirrors, scripted.url.replace("http://", "http://bob:p%40ss@"))
    link, = page(mirrors, index).json()["files"]
    reply = mirrors.get(urljoin("/%s/+simple/demo/" % index, link["url"]), headers={"Accept": "*/*"})
    assert (reply.status, reply.body) == (200, content)
    assert header(asked(scripted, "/simple/demo/")[0], "Authorization")
    assert header(asked(scripted, "/files/demo-1.0.tar.gz")[0], "Authorization") is None


def test_change_of_mirror_url_forgets_the_old_upstream(mirrors, upstream, scripted):
    upstream.publish("demo", "1.0")
    index = mirror(mirrors, upstream.url)
    assert mirrors.versions(index, "demo") == ["1.0"]
    assert project_list(mirrors, index) == ["demo"]
    scripted.page("demo", entry("demo-2.0.tar.gz"))
    scripted.answers["/simple/"] = {"meta": {"api-version": "1.0"}, "projects": [{"name": "new"}]}
    assert mirrors.patch("/" + index, {"mirror_url": scripted.url}, user="mia").status == 200
    assert mirrors.filenames(index, "demo") == ["demo-2.0.tar.gz"]
    assert "new" in project_list(mirrors, index)
    assert [header(headers, "If-None-Match") for headers in asked(scripted)] == [None, None]


def test_new_upstream_that_fails_does_not_bring_old_links_back(mirrors, upstream):
    upstream.publish("demo", "1.0")
    index = mirror(mirrors, upstream.url)
    page(mirrors, index)
    mirrors.patch("/" + index, {"mirror_url": upstream.host_url + "/elsewhere/"}, user="mia")
    upstream.fault("500", "/elsewhere/*")
    assert page(mirrors, index).status == 502


# -- upstream serials


def test_upstream_serial_is_passed_on(mirrors, upstream):
    upstream.publish("demo", "1.0")
    index = mirror(mirrors, upstream.url)
    assert page(mirrors, index).headers.get("X-PyPI-Last-Serial") is None
    upstream.serial = 100
    index = mirror(mirrors, upstream.url)
    reply = page(mirrors, index)
    assert reply.headers.get("X-PyPI-Last-Serial") == "100"
    assert reply.json()["meta"]["_last-serial"] == 100


@pytest.mark.parametrize("serial, ignore, versions", [
    (99, False, ["1.0"]), (99, True, ["1.0", "2.0"]), (100, False, ["1.0", "2.0"]), (101, False, ["1.0", "2.0"]), (None, False, ["1.0", "2.0"]),
], ids=["lower-is-stale", "lower-ignored", "equal", "higher", "missing"])
def test_lower_upstream_serial_is_a_failure(mirrors, upstream, serial, ignore, versions):
    upstream.publish("demo", "1.0")
    upstream.serial = 100
    index = mirror(mirrors, upstream.url, mirror_cache_expiry=0, mirror_ignore_serial_header=ignore)
    page(mirrors, index)
    upstream.publish("demo", "2.0")
    upstream.serial = serial
    reply = page(mirrors, index)
    assert sorted(reply.json()["versions"]) == versions
    assert is_stale(reply) == (versions == ["1.0"])


def test_serials_of_different_hosts_are_not_compared(mirrors, upstream, scripted):
    upstream.serial = 100
    upstream.publish("demo", "1.0")
    index = mirror(mirrors, upstream.url, mirror_cache_expiry=0)
    page(mirrors, index)
    body = json.dumps({"meta": {"api-version": "1.4"}, "name": "demo", "files": [entry("demo-2.0.tar.gz")]}).encode()
    scripted.answers["/simple/demo/"] = lambda handler: handler.reply(body, SIMPLE_JSON, X_PyPI_Last_Serial="7")
    mirrors.patch("/" + index, {"mirror_url": scripted.url}, user="mia")
    reply = page(mirrors, index)
    assert reply.json()["versions"] == ["2.0"]
    assert not is_stale(reply)


# -- offline mode


def test_offline_mode_lists_local_files_and_opens_no_connection(own, upstream):
    local, absent = upstream.publish("demo", "1.0"), upstream.publish("demo", "2.0")
    upstream.publish("other", "1.0")
    index = mirror(own, upstream.url, mirror_cache_expiry=0)
    links = {file["filename"]: file["url"] for file in page(own, index).json()["files"]}
    assert own.fetch(index, local.filename, "demo") == local.content
    own.restart("--offline-mode")
    upstream.reset()
    assert own.filenames(index, "demo") == [local.filename]
    assert own.fetch(index, local.filename, "demo") == local.content
    assert project_list(own, index) == ["demo"]
    for path in ("+simple/%s/", "%s", "%s/1.0", "+pypi/%s/json"):
        reply = own.get("/%s/%s" % (index, path % "other"))
        assert reply.status == 404 and "not here, and in offline mode" in reply.text, path
    for method in ("GET", "HEAD"):
        path = urljoin("/%s/+simple/demo/" % index, links[absent.filename])
        assert own.request(method, path, headers={"Accept": "*/*"}).status == 404
    assert own.get(path + ".metadata", headers={"Accept": "*/*"}).status == 404
    assert own.versions(index, "demo") == sorted(own.get("/%s/demo" % index).result) == ["1.0"]
    reply = own.post("/%s/+simple/demo/refresh" % index, b"")
    assert reply.status == 409 and "not refreshed" in reply.json()["message"]
    assert upstream.requests == []


def test_offline_mode_is_a_known_answer_behind_a_stage(own, upstream):
    """Of a project that is not here nothing is hidden: nobody outside can be asked."""
    index = mirror(own, upstream.url)
    above = over(own, index)
    assert own.upload(above, wheel("mine", "1.0")).status == 200
    own.restart("--offline-mode")
    assert own.versions(above, "mine") == ["1.0"]
    reply = page(own, above, "other")
    assert reply.status == 404 and "offline mode" in reply.text
    assert sorted(project_list(own, above)) == ["mine"]


# -- what upstream says about files


def test_attributes_are_passed_on(mirrors, scripted):
    attributes = {"size": 4711, "upload-time": "2024-01-02T03:04:05.678901Z", "requires-python": ">=3.8,<4",
                  "yanked": "broken <on> \"Windows\"", "core-metadata": {"sha256": SHA[::-1]}, "provenance": "https://example.org/demo.provenance"}
    scripted.page("demo", entry("demo-1.0-py3-none-any.whl", **attributes), entry("demo-1.1-py3-none-any.whl", yanked=True))
    index = mirror(mirrors, scripted.url)
    first, second = page(mirrors, index).json()["files"]
    assert {key: first.get(key) for key in attributes} == attributes
    assert second["yanked"] is True
    text = page(mirrors, index, accept="text/html").text
    for wanted in ('data-requires-python="&gt;=3.8,&lt;4"', 'data-core-metadata="sha256=%s"' % SHA[::-1],
                   'data-provenance="https://example.org/demo.provenance"', 'data-yanked=""'):
        assert wanted in text
    assert re.search(r'data-yanked="broken &lt;on&gt; (&quot;|&#34;)Windows(&quot;|&#34;)"', text)


def test_keys_that_say_nothing_are_left_out(mirrors, scripted):
    scripted.page("demo", {"filename": "demo-1.0.tar.gz", "url": "../../files/demo-1.0.tar.gz", "hashes": {}, "yanked": False, "gpg-sig": False,
                           "provenance": None, "requires-python": None, "core-metadata": False}, **{"project-status": {"status": "active"}})
    result = page(mirrors, mirror(mirrors, scripted.url)).json()
    assert sorted(result) == ["files", "meta", "name", "versions"]
    assert sorted(result["files"][0]) == ["_upload-time-source", "filename", "hashes", "upload-time", "url"]
    assert result["files"][0]["hashes"] == {}


@pytest.mark.parametrize("accept", [SIMPLE_JSON, "text/html"])
def test_a_page_of_hashes_is_packed_better_than_gzip_packs_it(mirrors, scripted, accept):
    digests = [hashlib.sha256(b"%d" % number).hexdigest() for number in range(600)]
    scripted.page("demo", *(entry("demo-1.%d-py3-none-any.whl" % number, hashes={"sha256": digest}, **{"core-metadata": {"sha256": other}})
                            for number, (digest, other) in enumerate(zip(digests[::2], digests[1::2]))))
    packed = get(mirrors, "/%s/+simple/demo/" % mirror(mirrors, scripted.url), accept=accept, Accept_Encoding="gzip").body
    plain = gzip.decompress(packed)
    assert plain.count(b"demo-1.299-py3-none-any.whl") == 2
    assert len(packed) < 0.92 * len(gzip.compress(plain, 6))


def test_sha256_is_preferred_among_hashes(mirrors, scripted):
    scripted.page("demo", entry("demo-1.0.tar.gz", hashes={"md5": "0" * 32, "sha256": SHA, "sha512": "1" * 128}))
    file, = page(mirrors, mirror(mirrors, scripted.url)).json()["files"]
    assert file["hashes"] == {"sha256": SHA}


def test_legacy_core_metadata_key_is_understood(mirrors, scripted):
    scripted.page("demo", entry("demo-1.0-py3-none-any.whl", **{"dist-info-metadata": {"sha256": SHA}}))
    file, = page(mirrors, mirror(mirrors, scripted.url)).json()["files"]
    assert file["core-metadata"] == {"sha256": SHA}
    assert "dist-info-metadata" not in file


HTML_PAGE = """<!DOCTYPE html>
<html><head><meta name="pypi:repository-version" content="1.1">
<meta name="pypi:project-status" content="archived"><meta name="pypi:project-status-reason" content="moved &amp; gone">
<base href="/files/"></head><body>
<a href="demo-1.0.tar.gz#sha256={sha}" data-requires-python="&gt;=3.8">demo-1.0.tar.gz</a><br/>
<A DATA-YANKED HREF='demo-1.1.tar.gz#sha256={sha}'>demo-1.1.tar.gz</A>
<a data-yanked="bad &quot;build&quot;" href="demo-1.2.tar.gz?x=1&amp;y=2#md5={md5}">demo-1.2.tar.gz</a>
<a href="demo-1.3-py3-none-any.whl#sha256={sha}" data-dist-info-metadata="sha256={sha}">demo-1.3-py3-none-any.whl</a>
<a href=demo-1.4.tar.xz>no hash</a>
<a href="demo-1.5.zip">twice</a><a href="demo-1.5.zip#sha256={sha}">twice</a>
<a href="other-1.0.tar.gz">another project</a><a href="demo-1.0.txt">no archive</a><a name="x">no link</a>
<a href="ftp://127.0.0.1/demo-2.0.tar.gz">ftp</a>
</body></html>
""".format(sha=SHA, md5="0" * 32)


def test_html_page_is_read_as_browsers_do(mirrors, scripted):
    scripted.answers["/simple/demo/"] = HTML_PAGE.encode()
    index = mirror(mirrors, scripted.url)
    result = page(mirrors, index).json()
    files = {file["filename"]: file for file in result["files"]}
    assert len(files) == len(result["files"])
    assert sorted(files) == ["demo-1.0.tar.gz", "demo-1.1.tar.gz", "demo-1.2.tar.gz", "demo-1.3-py3-none-any.whl", "demo-1.4.tar.xz", "demo-1.5.zip"]
    assert files["demo-1.0.tar.gz"]["requires-python"] == ">=3.8"
    assert files["demo-1.1.tar.gz"]["yanked"] is True
    assert files["demo-1.2.tar.gz"]["yanked"] == 'bad "build"'
    assert files["demo-1.2.tar.gz"]["hashes"] == {"md5": "0" * 32}
    assert files["demo-1.3-py3-none-any.whl"]["core-metadata"] == {"sha256": SHA}
    assert files["demo-1.4.tar.xz"]["hashes"] == {}
    assert files["demo-1.5.zip"]["hashes"] == {"sha256": SHA}
    assert result["project-status"] == {"status": "archived", "reason": "moved & gone"}


def test_versions_are_those_of_upstream_and_of_the_files(mirrors, scripted):
    scripted.page("demo", entry("demo-1.0.tar.gz"), entry("demo-2.0-py3-none-any.whl"), entry("demo-1.0-py3-none-any.whl"), versions=["0.9", "1.0"])
    assert sorted(mirrors.versions(mirror(mirrors, scripted.url), "demo")) == ["0.9", "1.0", "2.0"]


@pytest.mark.parametrize("status", ["archived", "deprecated"])
def test_project_status_is_passed_on(mirrors, scripted, status):
    scripted.page("demo", entry("demo-1.0.tar.gz"), **{"project-status": {"status": status, "reason": "see \"that\" <new>"}})
    index = mirror(mirrors, scripted.url)
    result = page(mirrors, index).json()
    assert result["project-status"] == {"status": status, "reason": "see \"that\" <new>"}
    assert len(result["files"]) == 1
    text = page(mirrors, index, accept="text/html").text
    assert '<meta name="pypi:project-status" content="%s">' % status in text
    assert "<new>" not in text


def test_quarantined_project_offers_no_files(mirrors, scripted):
    archive = wheel("demo", "1.0")
    link = {"filename": archive.filename, "url": "../../files/" + archive.filename, "hashes": {"sha256": archive.sha256}}
    scripted.page("demo", link)
    scripted.answers["/files/" + archive.filename] = archive.content
    index = mirror(mirrors, scripted.url, mirror_cache_expiry=0)
    path = urljoin("/%s/+simple/demo/" % index, page(mirrors, index).json()["files"][0]["url"])
    assert mirrors.fetch(index, archive.filename, "demo") == archive.content
    scripted.page("demo", link, **{"project-status": {"status": "quarantined"}})
    reply = page(mirrors, index)
    assert reply.status == 200
    assert reply.json()["files"] == []
    assert reply.json()["project-status"]["status"] == "quarantined"
    assert archive.filename not in page(mirrors, index, accept="text/html").text
    assert mirrors.get(path, headers={"Accept": "*/*"}).status == 403


# -- hostile upstreams


class Tags(html.parser.HTMLParser):
    """The tags and the links of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [dict(attributes).get("href")] if tag == "a" else []


def assert_harmless(server, index):
    """What may be said of any page, whatever upstream sent: it stays on this server, is well-formed, and its links do no harm."""
    path = "/%s/+simple/demo/" % index
    as_json, as_html = page(server, index), page(server, index, accept="text/html")
    assert (as_json.status, as_html.status) == (200, 200)
    inside = re.compile(r"/%s/\+[ef]/[^\x00-\x20<>\"'\\]+" % index)
    for file in as_json.json()["files"]:
        assert re.fullmatch(r"[^\x00-\x1f\x7f/\\]+", file["filename"])
        assert inside.fullmatch(urljoin(path, file["url"]).split("#")[0])
        assert all(re.fullmatch("[0-9a-f]+", value) for value in file["hashes"].values())
        assert type(file.get("size", 0)) is int and file.get("size", 0) >= 0
        assert isinstance(file.get("yanked", True), (str, bool))
        assert all(isinstance(file.get(key, ""), str) for key in ("requires-python", "upload-time", "provenance"))
        answer = server.get(urljoin(path, file["url"]), headers={"Accept": "*/*"})
        assert answer.headers.get("X-Evil") is None
        assert b"root:" not in answer.body
    page_tags = Tags(as_html.text)
    assert page_tags.tags <= {"html", "head", "meta", "title", "body", "h1", "a", "br", "form", "input", "p"}
    assert all(inside.fullmatch(urljoin(path, link).split("#")[0]) for link in page_tags.links)
    for reply in (as_json, as_html):
        assert reply.headers.get("X-Evil") is None
    return [file["filename"] for file in as_json.json()["files"]]


GOOD = "demo-1.0.tar.gz"


@pytest.mark.parametrize("filename", [
    "../../../../etc/passwd-1.0.tar.gz", "..\\demo-2.0.tar.gz", "/etc/demo-2.0.tar.gz", "..", ".", "", "demo-2.0.tar.gz\r\nX-Evil: 1",
    "demo-2.0\x00.tar.gz", 7, None, ["demo-2.0.tar.gz"],
], ids=lambda value: ascii(value)[:50])
def test_hostile_file_name_is_left_out_or_replaced_by_the_urls(mirrors, scripted, filename):
    scripted.page("demo", dict(entry("demo-2.0.tar.gz"), filename=filename), entry(GOOD))
    listed = assert_harmless(mirrors, mirror(mirrors, scripted.url))
    assert GOOD in listed
    assert set(listed) <= {GOOD, "demo-2.0.tar.gz"}


@pytest.mark.parametrize("unusable", [
    entry("demo-2.0.tar.gz", url="javascript:alert(1)"), entry("demo-2.0.tar.gz", url="file:///etc/passwd"), entry("demo-2.0.tar.gz", url="data:,x"),
    entry("demo-2.0.tar.gz", url="http://[bad/demo-2.0.tar.gz"), entry("demo-2.0.tar.gz", url=5), entry("demo-2.0.tar.gz", url=None),
    {"filename": "demo-2.0.tar.gz", "hashes": {}}, "demo-2.0.tar.gz", None, [],
], ids=lambda value: ascii(value)[:60])
def test_unusable_file_is_left_out_and_the_others_stay(mirrors, scripted, unusable):
    scripted.page("demo", unusable, entry(GOOD))
    assert assert_harmless(mirrors, mirror(mirrors, scripted.url)) == [GOOD]


@pytest.mark.parametrize("odd", [
    entry('demo-2.0"><b>.tar.gz'), entry("demo-2.0'><script>alert(1)<b>.tar.gz"), entry("..%2f..%2fdemo-2.0.tar.gz"), entry("demo 2.0#?&.tar.gz"),
    entry("demo-2.0\u202egz.tar"), entry("d\u00e9mo-2.0.tar.gz"), entry("demo-2.0.tar.gz", url="http://127.0.0.1:99999/demo-2.0.tar.gz"),
    entry("demo-2.0" + "0" * 300 + ".tar.gz"), entry("demo-\ud800.tar.gz"),
], ids=lambda value: ascii(value)[:50])
def test_odd_file_is_escaped_or_left_out(mirrors, scripted, odd):
    scripted.page("demo", odd, entry(GOOD))
    assert GOOD in assert_harmless(mirrors, mirror(mirrors, scripted.url))


@pytest.mark.parametrize("keys", [
    {"hashes": {"sha256": "../../../etc"}}, {"hashes": {"sha256": "zz" * 32}}, {"hashes": {"sha256": "a" * 5000}}, {"hashes": {"sha256": 5}},
    {"hashes": {'"><script>': "ab"}}, {"hashes": {"nosuchhash": "ab"}}, {"hashes": []}, {"hashes": None},
    {"size": "12"}, {"size": -1}, {"size": True}, {"size": 1.5}, {"upload-time": 5}, {"upload-time": '"><script>'},
    {"requires-python": [">=3"]}, {"requires-python": '"><script>alert(1)</script>'}, {"requires-python": ">=3\r\nX-Evil: 1"},
    {"yanked": {"a": 1}}, {"yanked": '"><script>\r\nX-Evil: 1'}, {"core-metadata": "x"}, {"core-metadata": {"sha256": '"><script>'}},
    {"provenance": "javascript:alert(1)"}, {"provenance": '"><script>'}, {"provenance": 5},
], ids=lambda value: repr(value)[:50])
def test_absurd_attributes_do_no_harm(mirrors, scripted, keys):
    scripted.page("demo", entry("demo-2.0-py3-none-any.whl", **keys), entry(GOOD))
    index = mirror(mirrors, scripted.url)
    assert GOOD in assert_harmless(mirrors, index)
    assert "javascript:" not in page(mirrors, index).text


def test_hostile_html_links_are_left_out(mirrors, scripted):
    scripted.answers["/simple/demo/"] = (
        b"<a href='javascript:alert(1)//demo-2.0.tar.gz'>x</a><a href='file:///etc/demo-2.0.tar.gz'>x</a><a href='data:x,demo-2.0.tar.gz'>x</a>"
        b"<a href='/files/..%2f..%2fdemo-2.0.tar.gz'>x</a><a href='/files/demo-2.0%0d%0aX-Evil:1.tar.gz'>x</a><a href='http://[/demo-2.0.tar.gz'>x</a>"
        b"<a href='/files/demo-2.0.tar.gz#sha256=../../x'>x</a>\xff\xfe\x00<a href='/files/" + GOOD.encode() + b"'>\xe9\x80</a>")
    listed = assert_harmless(mirrors, mirror(mirrors, scripted.url))
    assert GOOD in listed
    assert set(listed) <= {GOOD, "demo-2.0.tar.gz"}


def test_hostile_serial_and_etag_reach_no_header(mirrors, scripted):
    body = json.dumps({"meta": {"api-version": "1.4", "_last-serial": "x\r\nX-Evil: 1"}, "name": '"><script>', "files": [entry(GOOD)]}).encode()
    scripted.answers["/simple/demo/"] = lambda handler: handler.reply(body, SIMPLE_JSON, X_PyPI_Last_Serial="12<script>", ETag="x" * 20000)
    index = mirror(mirrors, scripted.url)
    assert assert_harmless(mirrors, index) == [GOOD]
    reply = page(mirrors, index)
    assert "<script>" not in reply.text + (reply.headers.get("X-PyPI-Last-Serial") or "")
    assert reply.json()["name"] == "demo"
