"""The web pages of search, status, errors and documentation."""

import contextlib
import json
import re
import urllib.parse
import xml.etree.ElementTree

import pytest

from harness import BROWSER, Upstream, documentation, eventually, patched, upload_docs, wheel
from replicas import primary_at, replica_at
from webpages import page as view

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=y> &amp; {0} %s"


@pytest.fixture(scope="module")
def site(shared_server):
    """`ann/dev`, open to all, and `ann/closed`, which only ann may read; a mirror `ann/mirror`."""
    site = shared_server
    site.add_user("ann")
    site.login("ann", "pw")
    upstream = Upstream().start()
    for name in ("lantern-fish", "lantern-oil", "magic-lantern"):
        upstream.publish(wheel(name, "1.0"))
    site.add_mirror("ann/mirror", upstream)
    site.add_index("ann/dev", bases=["ann/mirror"])
    site.add_index("ann/closed", acl_pkg_read=["ann"])
    assert site.get("/ann/mirror/+simple/", headers={"Accept": "text/html"}).status == 200
    for index, name, summary in (
            ("ann/dev", "lantern", "Light in the dark"), ("ann/dev", "lamp", "Not as a lantern"),
            ("ann/closed", "lantern-secret", "A hidden lantern"), ("ann/dev", "evil", HOSTILE)):
        assert site.upload(index, wheel(name, "1.0", summary=summary)).status == 200
    pages = {"page%d" % number: "<title>Chapter %d</title><p>How a lantern burns" % number
             for number in range(5)}
    upload_docs(site, "ann/dev", documentation("lantern", "1.0", "<title>Start</title>", **pages))
    upload_docs(site, "ann/dev", documentation(
        "evil", "1.0", "<title>&lt;b onclick=x&gt;</title>hostile &lt;script&gt;words&lt;/script&gt;"))
    upload_docs(site, "ann/closed", documentation("lantern-secret", "1.0", "secretword"))
    eventually(lambda: search_json(site, "words")["hits"] and search_json(site, "secretword", "ann")["hits"])
    yield site
    upstream.stop()


def search_json(site, query, user=None):
    return site.get("/+search?" + urllib.parse.urlencode({"query": query}), user=user).result


def search_page(site, query, user=None, **more):
    return view(site, "/+search?" + urllib.parse.urlencode(dict(more, query=query)), user=user)


def hits(page):
    """The headings of the hits."""
    return [text for _, text in page.with_text("h2") if text not in ("Keys", "Names in mirrors")]


# -- search


def test_a_search_shows_projects_with_their_index_summary_and_documentation(site):
    page = search_page(site, "lantern")
    assert hits(page) == ["lantern 1.0", "lamp 1.0"]
    assert page.title == "lantern · Search · devpi_lite"
    assert "2 projects, 3 names in mirrors" in page.main
    assert page.hrefs["lantern 1.0"] == "/ann/dev/lantern/1.0"
    assert "Light in the dark" in page.main
    assert re.search("Chapter [0-4] How a lantern burns", page.main)
    assert ({}, "lantern") in page.with_text("mark")
    assert len([text for text in page.hrefs if text.startswith("Chapter")]) == 3
    chapter = next(href for text, href in page.hrefs.items() if text.startswith("Chapter"))
    assert re.fullmatch("/ann/dev/lantern/1.0/[+]d/page[0-4].html", chapter)


def test_the_json_of_a_search_is_as_it_was(site):
    found = search_json(site, "lantern")
    assert [(hit["name"], hit["index"]) for hit in found["hits"]] == [
        ("lantern", "ann/dev"), ("lamp", "ann/dev")]
    assert (found["total"], found["page"], found["pages"], found["notes"]) == (2, 1, 1, [])
    assert found["names"] == {"total": 3, "hits": [
        {"name": name, "index": "ann/mirror", "url": "%s/ann/mirror/%s" % (site.url, name)}
        for name in ("lantern-fish", "lantern-oil", "magic-lantern")]}
    assert found["hits"][0]["pages"][0]["url"].startswith(site.url + "/ann/dev/lantern/1.0/+doc/page")


def test_further_pages_of_the_documentation_are_a_search_of_their_own(site):
    [(attributes, _)] = [pair for pair in search_page(site, "lantern").with_text("a") if pair[1] == "2 more pages"]
    assert attributes["href"] == "/+search?query=name%3Alantern+type%3Apage+lantern"
    page = view(site, attributes["href"])
    assert hits(page) == ["lantern 1.0"]
    assert sorted(text for text in page.hrefs if text.startswith("Chapter")) == [
        "Chapter %d" % number for number in range(5)]


def test_each_index_with_hits_is_a_link_that_looks_there_alone(site):
    links = search_page(site, "lantern").hrefs
    assert links["ann/mirror (3)"] == "/+search?query=index%3Aann%2Fmirror+lantern"
    page = view(site, links["ann/mirror (3)"])
    assert hits(page) == [] and "magic-lantern" in page.hrefs
    assert page.hrefs["all readable"] == "/+search?query=lantern"
    assert "lantern-fish" not in view(site, links["ann/dev (2)"]).hrefs


def test_hits_are_sorted_as_the_link_says(site):
    page = view(site, search_page(site, "lantern").hrefs["name"])
    assert hits(page) == ["lamp 1.0", "lantern 1.0"]
    assert ("name" not in page.hrefs) and page.hrefs["relevance"] == "/+search?query=lantern"


def test_a_reader_finds_no_trace_of_what_only_others_may_read(site):
    for query in ("lantern", "secretword", "lantern-secrets", "index:ann/closed lantern", "hidden"):
        page = search_page(site, query)
        assert "lantern-secret 1.0" not in page.reply.text
        assert "ann/closed (" not in page.main and "A hidden" not in page.main
        assert not any("lantern-secret" in href and "query" not in href for href in page.hrefs.values())
    assert hits(search_page(site, "secretword", user="ann")) == ["lantern-secret 1.0"]
    assert "lantern-secret" in search_page(site, "lantern-secrets", user="ann").hrefs
    assert "lantern-secret" not in search_page(site, "lantern-secrets").hrefs


def test_nothing_found_says_what_else_there_is(site):
    page = search_page(site, "index:ann/dev lanternn-")
    assert "Nothing found." in page.main
    assert page.hrefs["lantern"] == "/+search?query=lantern"
    assert page.hrefs["Search all indexes"] == "/+search?query=lanternn-"
    assert page.hrefs["The query syntax"] == "/+searchhelp"


@pytest.mark.parametrize("query", [
    HOSTILE, "\x01lantern\x02", "words", "<mark>", "lantern </title><script>", "'\"", "name:<b>", "((((", "-", "index:",
    "index:<x> lantern", "\u202e lantern", "%00", "a" * 300, "hostile \U0001f600"])
def test_no_query_and_no_text_that_is_found_becomes_markup(site, query):
    page = search_page(site, query)
    assert len(page.of("script")) == 1 and page.of("img") == page.of("b", onclick="x") == []
    assert page.of("input", id="q")[0]["value"] == query.replace("\x01", " ").replace("\x02", " ")


def test_a_hostile_title_is_shown_as_it_is_written(site):
    page = search_page(site, "hostile")
    assert page.hrefs["<b onclick=x>"] == "/ann/dev/evil/1.0/+d/index.html"
    assert "hostile <script>words</script>" in page.main
    assert HOSTILE in page.main


@pytest.mark.parametrize("page", ["0", "-1", "x", "99999", "1e3", ""])
def test_a_page_number_of_any_kind_leads_to_a_page(site, page):
    assert hits(search_page(site, "lantern", page=page)) == ["lantern 1.0", "lamp 1.0"]


def test_an_empty_search_explains_itself(site):
    for query in ("", "  ", "()"):
        assert search_page(site, query).hrefs["The query syntax"] == "/+searchhelp"


def test_long_results_come_in_pages_of_twenty(site):
    site.add_index("ann/many")
    for number in range(45):
        assert site.post_form("ann/many", {
            ":action": "submit", "name": "crowd-%02d" % number, "version": "1"}).status == 200
    eventually(lambda: search_json(site, "crowd")["total"] == 45)
    first = search_page(site, "crowd", sort="name")
    assert hits(first) == ["crowd-%02d 1" % number for number in range(20)]
    last = view(site, first.hrefs["3"])
    assert hits(last) == ["crowd-%02d 1" % number for number in range(40, 45)]
    assert {"1", "2"} <= set(last.hrefs) and "3" not in last.hrefs


def test_the_syntax_is_explained_with_queries_that_work(site):
    reply = site.get("/+searchhelp")
    assert (reply.status, reply.headers.get("Location")) == (302, site.url + "/+help/search")
    typed = [text for _, text in view(site, "/+help/search").with_text("code")]
    filters = [text for text in typed if re.match("[a-z]+:[^ /]", text)]
    assert {"name", "index", "version", "has", "is", "uploaded"} <= {text.partition(":")[0] for text in filters}
    for query in filters + ["parser OR lexer", "(parser OR lexer) fast"]:
        assert search_json(site, query)["notes"] == [], query


def test_a_browser_can_add_the_search_to_its_own(site):
    reply = site.get("/+opensearch.xml", headers={"X-Outside-URL": "https://x.example/pypi"})
    assert reply.headers.get("Content-Type") == "application/opensearchdescription+xml"
    tree = xml.etree.ElementTree.fromstring(reply.body)
    urls = {each.get("type"): each.get("template") for each in tree if each.tag.endswith("}Url")}
    assert urls == {
        "text/html": "https://x.example/pypi/+search?query={searchTerms}",
        "application/x-suggestions+json": "https://x.example/pypi/+suggest?q={searchTerms}"}
    assert json.loads(site.get("/+suggest?q=lante").body) == [
        "lante", ["lantern", "lantern-fish", "lantern-oil"]]


# -- status


def test_the_status_page_says_what_the_json_says(site):
    page, status = view(site, "/+status"), site.get("/+status").result
    shown = page.facts
    assert "All is well." in page.main
    assert shown["UUID"] == status["uuid"] and shown["Role"] == "standalone"
    assert shown["Last change"].endswith("serial {:,}".format(status["serial"]))
    assert shown["Version"] == "devpi_lite %(devpi-lite)s, Python %(python)s" % status["versioninfo"]
    assert shown["Address"] == site.url
    assert re.fullmatch(r"[0-9]+ documents, 0 projects in the queue", shown["Search index"])
    assert re.fullmatch(r"[0-9.]+ [KMG]iB", shown["Free on the disk"])
    assert page.title == "Status · devpi_lite"


def test_the_status_page_counts_the_files_of_the_indexes_that_may_be_read(site):
    site.add_user("count")
    site.login("count", "pw")
    site.add_index("count/dev")
    site.add_index("count/closed", acl_pkg_read=["count"])
    archive = wheel("counted", "1.0", size=5000)
    for index in ("count/dev", "count/closed"):
        assert site.upload(index, archive).status == 200
    size = "%.1f KiB" % (len(archive.content) / 1024)
    assert ["count/dev", "1", size] in view(site, "/+status").rows()
    assert "count/closed" not in view(site, "/+status").reply.text
    assert ["count/closed", "1", size] in view(site, "/+status", user="count").rows()


def test_the_status_page_tells_of_mirrors_and_their_trouble(site, upstream):
    site.add_user("mirrors")
    site.login("mirrors", "pw")
    upstream.publish(wheel("there", "1.0"))
    site.add_mirror("mirrors/good", upstream)
    site.add_mirror("mirrors/bad", "http://user:topsecret@127.0.0.1:9/simple/")
    for index in ("good", "bad"):
        site.get("/mirrors/%s/+simple/" % index, headers={"Accept": "text/html"})
    page = view(site, "/+status")
    rows = {row[0]: row[1:] for row in page.rows() if len(row) == 5}
    assert (rows["mirrors/good"][:2], rows["mirrors/good"][3]) == ([upstream.url, "1"], "ok")
    assert rows["mirrors/bad"][0] == "http://127.0.0.1:9/simple/"
    assert rows["mirrors/bad"][3].startswith("trouble 20")
    assert "topsecret" not in page.reply.text


@pytest.mark.parametrize("query, content", [
    ("", None), ("?refresh=10", "10"), ("?refresh=0", None), ("?refresh=1", "2"), ("?refresh=x", None),
    ("?refresh=10;url=http://x.example", None), ("?refresh=99999", None)])
def test_the_status_page_is_loaded_again_only_if_that_is_asked_for(site, query, content):
    found = view(site, "/+status" + query).of("meta", **{"http-equiv": "refresh"})
    assert [attributes["content"] for attributes in found] == ([content] if content else [])


def test_scripts_and_monitors_still_get_the_json_of_the_status(site):
    for accept in ("application/json", "*/*"):
        reply = site.get("/+status", headers={"Accept": accept})
        assert reply.headers.get("Content-Type") == "application/json" and reply.json()["type"] == "status"


def test_what_is_wrong_stands_on_the_status_page(make_server, scripted):
    server = make_server("--offline-mode")
    server.add_user("off")
    server.login("off", "pw")
    server.add_mirror("off/mirror", scripted.url + "/simple/")
    page = view(server, "/+status")
    assert page.facts["Mode"] == "offline: no upstream is asked"
    assert ["off/mirror", scripted.url + "/simple/", "", "", "not asked"] in page.rows()


# -- errors


@pytest.fixture(scope="module")
def library(site):
    """`lib/dev` has `pluggy`, `lib/closed` has `pluggy-secret`, `lib/other` has `plugin`; `lib/empty` is empty."""
    site.add_user("lib")
    site.login("lib", "pw")
    for name, config in (("dev", {}), ("other", {}), ("empty", {}), ("closed", {"acl_pkg_read": ["lib"]})):
        site.add_index("lib/" + name, **config)
    for index, project in (("dev", "pluggy"), ("other", "plugin"), ("closed", "pluggy-secret"),
                           ("closed", "hidden-thing")):
        assert site.upload("lib/" + index, wheel(project, "1.0")).status == 200
    return site


def test_a_project_that_is_elsewhere_is_linked_there(library):
    page = view(library, "/lib/empty/pluggy", status=404)
    assert page.hrefs["lib/dev/pluggy"] == "/lib/dev/pluggy"
    assert "Did you mean" not in page.main


def test_a_mistyped_project_is_guessed(library):
    page = view(library, "/lib/dev/pluggi", status=404)
    assert "404 Not Found" in page.main and "The project pluggi does not exist." in page.main
    assert "Did you mean plugin (lib/other) or pluggy (lib/dev)?" in page.main
    assert (page.hrefs["lib/dev"], page.hrefs["lib/other"]) == ("/lib/dev/pluggy", "/lib/other/plugin")
    assert "Did you mean lantern" in view(library, "/lib/dev/latnern", status=404).main
    # what is here comes before what an upstream has, however near that is
    near = view(library, "/lib/dev/lantern-oi", status=404).main
    assert "Did you mean lantern (ann/dev) or lantern-oil (ann/mirror)" in near
    assert "magic-lantern (ann/mirror)" in view(library, "/lib/dev/magic-lanterns", status=404).main


def test_a_missing_project_is_not_linked_to_its_own_address(make_server, upstream):
    upstream.publish("ghost", "1.0")
    server = make_server()
    server.add_user("ann")
    server.add_mirror("ann/mirror", upstream)
    assert server.get("/ann/mirror/+simple/", headers={"Accept": "text/html"}).status == 200
    server.restart("--offline-mode")
    assert "ann/mirror/ghost" not in view(server, "/ann/mirror/ghost", status=404).main


def test_a_missing_version_leads_to_its_project(library):
    assert view(library, "/lib/dev/pluggy/9.9", status=404).hrefs["lib/dev/pluggy"] == "/lib/dev/pluggy"


def test_no_guess_names_what_the_reader_may_not_read(library):
    for project in ("pluggy-secret", "pluggy-secrets", "hidden-thing", "hidden-things"):
        page = view(library, "/lib/empty/" + project, status=404)
        assert "closed" not in page.main and "hidden-thing (" not in page.main and "secret (" not in page.main
    assert "pluggy-secret (lib/closed)" in view(library, "/lib/empty/pluggy-secrets", status=404, user="lib").main
    assert "lib/closed/hidden-thing" in view(library, "/lib/empty/hidden-thing", status=404, user="lib").hrefs


def test_a_hidden_index_looks_like_one_that_does_not_exist(library):
    for path in ("", "/pluggy", "/pluggy-secret", "/Pluggy_Secret", "/pluggy-secret/1.0"):
        hidden, missing = (view(library, "/lib/%s%s" % (name, path), status=404).main for name in ("closed", "cloned"))
        assert hidden == missing.replace("cloned", "closed")
    reply = library.get("/lib/closed/Pluggy_Secret", headers={"Accept": BROWSER}, user="lib")
    assert (reply.status, reply.headers.get("Location")) == (302, library.url + "/lib/closed/pluggy-secret")


@pytest.mark.parametrize("path", [
    "/lib/dev/" + "x" * 300, "/lib/%3Cb%3E/pluggy",
    "/%3Cimg%20src%3Dx%3E", "/+nothing/%22%3E%3Cscript%3E", "/lib/dev/pluggi/%F0%9F%98%80", "/lib/dev/pluggy/%3Ci%3E"])
def test_no_address_becomes_markup_on_the_page_of_its_error(library, path):
    page = view(library, path, status=404)
    assert page.of("img") == page.of("i") == page.of("b") == [] and len(page.of("script")) == 1


def test_programs_get_no_page_of_an_error(library):
    for accept, type_ in (("application/json", "application/json"), ("*/*", "application/json")):
        reply = library.get("/lib/dev/pluggi", headers={"Accept": accept})
        assert (reply.status, reply.headers.get("Content-Type")) == (404, type_)
    reply = library.get("/lib/dev/pluggi", headers={"Accept": "text/html", "User-Agent": "pip/24.0"})
    assert reply.status == 404 and b"Did you mean" not in reply.body


def test_who_wants_json_more_than_html_gets_it(library):
    for accept, type_ in (("application/json, text/html;q=0.1", "application/json"), ("text/html;q=0", "application/json"),
                          ("application/json;q=0.1, text/html", "text/html"), (BROWSER, "text/html")):
        reply = library.get("/lib/dev/pluggy", headers={"Accept": accept})
        assert reply.headers["Content-Type"].partition(";")[0] == type_, accept


@pytest.mark.parametrize("path", ["/lib/nosuch/+feed.atom", "/lib/dev/nosuch/+feed.atom", "/lib/dev/pluggy/1.0/+doc/nope",
                                  "/lib/dev/+f/000/0000000000000/x.whl", "/lib/nosuch/+simple/"])
def test_an_error_without_the_frame_may_load_nothing_and_be_shown_in_one(library, path):
    reply = library.get(path, headers={"Accept": BROWSER})
    assert (reply.status, reply.headers["Content-Security-Policy"]) == (404, "default-src 'none'")
    assert reply.headers["X-Content-Type-Options"] == "nosniff" and "<h1>404 Not Found</h1>" in reply.text


def test_a_long_query_is_cut_also_on_its_page(library):
    found = view(library, "/+search?query=" + "a" * 30000)
    assert "Only the first 256 characters were used." in found.main and len(found.reply.body) < 20000


def test_an_error_of_the_program_has_an_id_that_the_log_has_too(tmp_path, make_server):
    server = make_server(script=patched(tmp_path, "devpi_lite.facts = None"))
    page = view(server, "/+status", status=500)
    found = re.search("internal error, request id ([0-9a-f]{8})", page.main)
    eventually(lambda: "request %s failed" % found[1] in server.output())


def test_an_error_whose_page_fails_is_shown_without_it(tmp_path, make_server):
    server = make_server(script=patched(tmp_path, "devpi_lite.framed = None"))
    reply = server.get("/+status", headers={"Accept": BROWSER})
    assert reply.status == 500 and re.search("internal error, request id [0-9a-f]{8}", reply.text)


# -- the manual


def test_the_manual_lists_its_topics_and_each_is_a_page(site):
    listed = {text: href for text, href in view(site, "/+help").hrefs.items() if href.startswith("/+help/")}
    assert len(listed) > 15 and listed["Backups"] == "/+help/backup"
    for title, href in listed.items():
        page = view(site, href)
        assert [text for _, text in page.with_text("h1")] == [title]
        for link in page.hrefs.values():
            if link.startswith(site.url + "/+help/"):
                assert link[len(site.url):] in listed.values(), (href, link)
    assert site.get("/+help/", headers={"Accept": BROWSER}).headers.get("Location") == site.url + "/+help"


def test_pages_of_the_manual_are_kept_ready_but_no_search_of_it(site):
    def kept():
        return int(re.search(r"(?m)^devpi_lite_answer_cache_bytes (\d+)$", site.get("/+metrics").text)[1])

    headers = {"Accept": BROWSER, "X-Asked-By": "this test"}      # another request than those of others
    for path in ("/+help", "/+help/search"):
        before = kept()
        page = site.get(path, headers=headers)
        assert kept() > before + len(page.text), path
        assert site.get(path, headers=headers).text == page.text
    size = kept()
    assert site.get("/+help?q=backup", headers=headers).status == 200
    assert kept() == size


def test_the_examples_of_the_manual_name_this_server(site):
    outside = {"X-Outside-URL": "https://x.example/pypi"}
    page = view(site, "/+help/upload", headers=outside)
    assert "devpi use https://x.example/pypi" in page.main
    assert "URL/alice" not in page.main and "devpi use URL" not in page.main
    assert "https://x.example/pypi/+help/team" in page.hrefs.values()
    assert "x.example" not in view(site, "/+help/upload").main
    assert "X-Outside-URL" in view(site, "/+help/proxies").main


def test_the_manual_can_be_searched(site):
    page = view(site, "/+help?q=promote+replica")
    assert "/+help/replicas" in page.hrefs.values()
    assert "python devpi_lite.py promote" in page.main and "](" not in page.main
    assert "a balancer names the primary" in view(site, "/+help?q=balancer").main       # a link in its topic
    assert "The manual says nothing about that." in view(site, "/+help?q=xyzzy").main
    assert view(site, "/+help?q=" + urllib.parse.quote(HOSTILE)).of("img") == []


def test_a_topic_that_is_not_there_is_404(site):
    for path in ("/+help/nothing", "/+help/..%2Fx", "/+help/backup/x", "/+help/%3Cb%3E"):
        assert view(site, path, status=404).of("b") == []


def test_a_primary_and_its_replica_tell_of_each_other(tmp_path):
    with contextlib.ExitStack() as stack:
        primary = primary_at(tmp_path / "primary").start()
        stack.callback(primary.kill)
        replica = replica_at(tmp_path / "replica", primary).start()
        stack.callback(replica.kill)
        eventually(lambda: "Replicas" in view(primary, "/+status").headings)
        page = view(primary, "/+status")
        assert page.facts["Role"] == "primary"
        assert [row[0] for row in page.rows()] == ["127.0.0.1"]
        shown = eventually(lambda: (lambda facts: facts.get("Its serial") and facts)(view(replica, "/+status").facts))
        assert (shown["Role"], shown["URL"], shown["State"]) == ("replica", primary.url, "following")
