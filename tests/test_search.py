"""Search: the query language, ranking, names of mirrors, suggestions, XML-RPC, and an index that keeps up in the background."""

import concurrent.futures
import contextlib
import dataclasses
import random
import re
import sqlite3
import time
import urllib.parse
import xmlrpc.client

import pytest

import devpi_lite
from harness import (
    Server, Upstream, documentation, eventually, links, normal_name, patched, path_of, sdist,
    serial, submit, upload, upload_docs, wheel)

HIT_KEYS = {"name", "version", "index", "summary", "url", "score"}
HEADERS = {
    "author": "Author",
    "license": "License",
    "license_expression": "License-Expression",
    "keywords": "Keywords",
    "classifiers": "Classifier",
    "requires_dist": "Requires-Dist",
    "requires_python": "Requires-Python",
}


# Helpers


def release(name, version, summary, build=wheel, description="", **fields):
    """An archive that says in its METADATA what its form says."""
    fields.update(metadata_version="2.4", name=name, version=version, summary=summary)
    lines = ["Metadata-Version: 2.4", "Name: " + name, "Version: " + version, "Summary: " + summary]
    for field, header in HEADERS.items():
        values = fields.get(field, [])
        lines += ["%s: %s" % (header, value) for value in ([values] if isinstance(values, str) else values)]
    metadata = ("\n".join(lines) + "\n\n" + description).encode()
    archive = build(name, version, summary=summary, metadata=metadata)
    if description:
        fields.update(description=description, description_content_type="text/plain")
    return dataclasses.replace(archive, fields=dict(archive.fields, **fields))


def put_docs(server, index, name, version, **members):
    """Uploads documentation; `members` maps page names to their text."""
    html = "<html><head><title>%s</title></head><body><p>%s</p></body></html>"
    pages = {page: html % (page, text) for page, text in members.items()}
    upload_docs(server, index, documentation(name, version, html % ("index", "Start here"), **pages))


def search(server, query, user=None, **parameters):
    reply = server.get("/+search?" + urllib.parse.urlencode(dict(parameters, query=query)), user=user)
    assert (reply.status, reply.headers["Content-Type"]) == (200, "application/json"), reply
    assert reply.json()["type"] == "search"
    return reply.result


def ranked(server, query, **options):
    """The hits of a query that fit one page, best first, as "user/index/project"."""
    result = search(server, query, **options)
    hits = ["%s/%s" % (hit["index"], normal_name(hit["name"])) for hit in result["hits"]]
    assert result["total"] == len(set(hits)) == len(hits), result
    return hits


def found(server, query, **options):
    return set(ranked(server, query, **options))


def names_found(server, query, **options):
    names = search(server, query, **options)["names"]
    assert names["total"] >= len(names["hits"])
    return ["%s/%s" % (hit["index"], hit["name"]) for hit in names["hits"]]


def suggested(server, text, user=None):
    reply = server.get("/+suggest?" + urllib.parse.urlencode({"q": text}), user=user)
    assert reply.status == 200, reply
    echo, names = reply.json()
    assert echo == text
    return names


def rpc(server, index, *parameters, method="search", user=None):
    """The XML-RPC call's value; raises xmlrpc.client.Fault."""
    body = xmlrpc.client.dumps(parameters, method, allow_none=True)
    return rpc_value(rpc_post(server, index, body, user=user))


def rpc_post(server, index, body, user=None):
    return server.post("/%s/" % index, body, headers={"Content-Type": "text/xml"}, user=user)


def rpc_value(reply):
    assert reply.status == 200, reply
    assert reply.headers["Content-Type"].partition(";")[0] == "text/xml"
    (value,), _ = xmlrpc.client.loads(reply.body)
    return value


def rpc_names(*call, **options):
    hits = [normal_name(hit["name"]) for hit in rpc(*call, **options)]
    assert len(set(hits)) == len(hits), hits
    return set(hits)


def settle(server, index, word):
    """Waits until all that was uploaded before is in the search index, which works through a queue in order."""
    upload(server, index, release("marker-" + word, "1.0", "the end"))
    eventually(lambda: found(server, "name:marker-" + word, user=index.partition("/")[0]))


# What is searched: 17 projects that everybody may read, two that only cat may, and names of two mirrors


PYTHON_3 = "Programming Language :: Python :: 3"
PYTHON_312 = "Programming Language :: Python :: 3.12"
PYTEST = "Framework :: Pytest"
TESTED = release(
    "click", "8.1.7", "Composable command line interface toolkit", author="Armin", license_expression="BSD-3-Clause",
    keywords="terminal shell")
CORPUS = [
    ("ann/dev", release(
        "PyYAML", "6.0.2", "Parser and emitter", author="Simonov", license="MIT", keywords="serialization,markup",
        classifiers=[PYTHON_3], requires_python=">=3.8")),
    ("ann/dev", release(
        "devpi-web", "5.1", "Browser frontend of an index", build=sdist, author="Florian Schulze",
        classifiers=[PYTHON_312], requires_dist=["pluggy>=1.0", "beautifulsoup4"], requires_python=">=3.9")),
    ("ann/dev", release("pluggy", "1.4.0", "antique hooks", license="Zope")),
    ("ann/dev", release(
        "pluggy", "1.5.0", "plugin and hook calling mechanisms", license="MIT", classifiers=[PYTEST, PYTHON_3],
        requires_python=">=3.8", description="A minimalist production ready system.\n\nSee ratio:golden in the table.\n")),
    ("ann/prod", release("pluggy", "1.3.0", "plugin and hook calling of yore", requires_python=">=3.7")),
    ("ann/prod", release("oldlib", "0.9", "Relic of the past", license="Apache-2.0", requires_python="<3")),
    ("ann/prod", release("betalib", "2.0b1", "Kettle of tomorrow")),
    ("bob/dev", TESTED),
    ("bob/dev", release(
        "click-plugins", "1.1.1", "Registers commands through entry points", requires_dist=["click>=4.0"],
        description="A kettle in the readme.\n")),
    ("bob/dev", release("about-everything", "1.0", "click click click click", build=sdist)),
    ("bob/dev", release(
        "rich", "13.9.4", "Render text for the terminal", keywords="terminal,colour",
        requires_dist=["Markdown_It.Py>=2.2", 'pygments; extra == "code"'])),
    ("bob/dev", release("bayes", "1.0", "Na\u00efve statistics f\u00fcr Z\u00fcrich", author="Jos\u00e9 M\u00fcller")),
    ("bob/docs", release("sphinx-tale", "3.1", "Stories")),
    ("cat/open", release("yaml-lint", "0.4.0", "Checks files")),
    ("cat/open", release("httpx", "0.27.2", "The next generation HTTP client", requires_python=">=3.8")),
    # It would be a hit of nearly every query below, were it not hidden.
    ("cat/secret", release(
        "click-vault", "8.0b1",
        "Parser and emitter, plugin and hook calling, Composable command line interface toolkit, terminal relic past kettle",
        author="Simonov", license="MIT", keywords="terminal,serialization", classifiers=[PYTEST, PYTHON_3, PYTHON_312],
        requires_dist=["pluggy", "click", "markdown-it-py"],
        description="devpi web py yaml minimalist production ratio:golden Z\u00fcrich zzsecret\n")),
    ("cat/secret", release("pluggy", "1.4.0", "plugin and hook calling", license="MIT")),
]


@pytest.fixture(scope="module")
def corpus(shared_server):
    """The corpus, indexed; `cat/both` and `cat/child` inherit from it. Tests that use it change nothing."""
    server, upstream, hidden = shared_server, Upstream().start(), Upstream().start()
    for user in ("ann", "bob", "cat"):
        server.add_user(user)
    for index in ("ann/dev", "ann/prod", "bob/dev", "bob/docs", "cat/open"):
        server.add_index(index)
    server.add_index("cat/secret", acl_pkg_read=["cat"])
    server.add_index("cat/both", bases=["ann/dev", "ann/prod"])
    server.add_index("cat/child", bases=["cat/secret", "ann/dev"])
    for name in ("pluggy", "pluggy-extras", "types-pluggy", "fastpluggy", "unrelated"):
        upstream.publish(name)
    hidden.publish("pluggy-hush")
    server.add_mirror("bob/mirror", upstream)
    server.add_mirror("cat/mirror", hidden, acl_pkg_read=["cat"])
    try:
        for index, archive in CORPUS:
            upload(server, index, archive)
        put_docs(server, "bob/docs", "sphinx-tale", "3.1", chapter="The historic registration of names")
        put_docs(server, "cat/secret", "click-vault", "8.0b1", chapter="The historic registration of names")
        reply = server.post(path_of(TESTED, "bob/dev"), {"host": "ci", "platform": "linux", "testenvs": {}})
        assert reply.status == 200, reply
        reply = server.patch("/ann/prod/oldlib/0.9", {"yanked": "too old"}, user="ann")
        assert reply.status == 200, reply
        for index, user in (("bob/mirror", None), ("cat/mirror", "cat")):
            assert server.get("/%s/+simple/" % index, user=user).status == 200
        settle(server, "cat/secret", "corpus")
        eventually(lambda: names_found(server, "unrelated"))
        yield server
    finally:
        upstream.stop()
        hidden.stop()


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A server for the tests that change things; each uses words of its own."""
    server = Server(tmp_path_factory.mktemp("live") / "server").start()
    server.add_user("eve")
    server.add_index("eve/dev")
    yield server
    if server.running:
        server.kill()


# The query language


PLUGGIES = {"ann/dev/pluggy", "ann/prod/pluggy"}
ANN_DEV = {"ann/dev/pyyaml", "ann/dev/devpi-web", "ann/dev/pluggy"}
ANN = ANN_DEV | {"ann/prod/pluggy", "ann/prod/oldlib", "ann/prod/betalib"}
BOB_DEV = {"bob/dev/click", "bob/dev/click-plugins", "bob/dev/about-everything", "bob/dev/rich", "bob/dev/bayes"}
WORDS = [
    ("emitter", {"ann/dev/pyyaml"}),
    ("plugin calling", PLUGGIES),
    ("CALLING Plugin", PLUGGIES),
    ("emitter toolkit", set()),
    ("nowhere", set()),
    ("minimalist production", {"ann/dev/pluggy"}),
    ("historic", {"bob/docs/sphinx-tale"}),
    ("antique", set()),
    ("plugg", PLUGGIES),
    ("plugg ", set()),
    ("plugg calling", set()),
    ("plug* calling ", PLUGGIES),
    ('"command line interface"', {"bob/dev/click"}),
    ("'command line interface'", {"bob/dev/click"}),
    ('"line command"', set()),
    ("'line command'", set()),
    ("click", {"bob/dev/click", "bob/dev/click-plugins", "bob/dev/about-everything"}),
    ("click NOT registers", {"bob/dev/click", "bob/dev/about-everything"}),
    ("click -registers", {"bob/dev/click", "bob/dev/about-everything"}),
    ("-click terminal", {"bob/dev/rich"}),
    ('click -"entry points"', {"bob/dev/click", "bob/dev/about-everything"}),
    ("click ANDNOT registers", {"bob/dev/click", "bob/dev/about-everything"}),
    ("toolkit AND composable", {"bob/dev/click"}),
    ("toolkit ANDMAYBE composable", {"bob/dev/click"}),
    ("emitter OR toolkit", {"ann/dev/pyyaml", "bob/dev/click"}),
    ("emitter or toolkit", set()),
    ("(emitter OR toolkit) user:bob", {"bob/dev/click"}),
    ("(plugin hook) OR (relic past)", PLUGGIES | {"ann/prod/oldlib"}),
    ("((emitter) OR (toolkit OR relic))", {"ann/dev/pyyaml", "bob/dev/click", "ann/prod/oldlib"}),
    ("ratio:golden", {"ann/dev/pluggy"}),
]
FILTERS = [
    ("name:click", {"bob/dev/click"}),
    ("name:click*", {"bob/dev/click", "bob/dev/click-plugins"}),
    ("name:clic", set()),
    ("name:Click_Plugins", {"bob/dev/click-plugins"}),
    ("name:PyYAML", {"ann/dev/pyyaml"}),
    ("-name:click click ", {"bob/dev/click-plugins", "bob/dev/about-everything"}),
    ("user:bob", BOB_DEV | {"bob/docs/sphinx-tale"}),
    ("user:bo", set()),
    ("user:ann user:bob", set()),
    ("user:ann -name:pluggy", ANN - PLUGGIES),
    ("index:dev", ANN_DEV | BOB_DEV),
    ("index:ann/dev", ANN_DEV),
    ("index:ann/docs", set()),
    ("user:bob -index:dev", {"bob/docs/sphinx-tale"}),
    ("path:/ann/dev/pluggy", {"ann/dev/pluggy"}),
    ("path:/ann/*", ANN),
    ("path:/ann/dev/*", ANN_DEV),
    ("version:1.4.0", {"ann/dev/pluggy"}),
    ("name:pluggy version:1.5.0", {"ann/dev/pluggy"}),
    ("version:>=8", {"bob/dev/click", "bob/dev/rich"}),
    ("name:pluggy version:<1.4", {"ann/prod/pluggy"}),
    ("name:pluggy version:>=1.3", PLUGGIES),
    ("name:pluggy version:>=1.4,<1.5", {"ann/dev/pluggy"}),
    ("name:pluggy version:~=1.4", {"ann/dev/pluggy"}),
    ("name:pluggy version:==1.3.*", {"ann/prod/pluggy"}),
    ("name:pluggy -version:1.4.0", {"ann/prod/pluggy"}),
    ("classifier:'%s'" % PYTHON_3, {"ann/dev/pyyaml", "ann/dev/pluggy"}),
    ('classifiers:"%s"' % PYTEST, {"ann/dev/pluggy"}),
    ("classifier:Framework*", {"ann/dev/pluggy"}),
    ("classifier:Framework", set()),
    ("classifier:'Programming Language :: Python*'", ANN_DEV),
    ("classifier:'%s' -classifier:'%s'" % (PYTHON_3, PYTEST), {"ann/dev/pyyaml"}),
    ("classifier:'%s' classifier:'%s'" % (PYTHON_3, PYTEST), {"ann/dev/pluggy"}),
    ("keyword:serialization", {"ann/dev/pyyaml"}),
    ("keyword:terminal", {"bob/dev/click", "bob/dev/rich"}),
    ("keyword:emitter", set()),
    ("author:Simonov", {"ann/dev/pyyaml"}),
    ("author:simonov", {"ann/dev/pyyaml"}),
    ("author:'Florian Schulze'", {"ann/dev/devpi-web"}),
    ("license:MIT", {"ann/dev/pyyaml", "ann/dev/pluggy"}),
    ("license:mit", {"ann/dev/pyyaml", "ann/dev/pluggy"}),
    ("license:BSD-3-Clause", {"bob/dev/click"}),
    ("requires:pluggy", {"ann/dev/devpi-web"}),
    ("requires:click", {"bob/dev/click-plugins"}),
    ("requires:markdown-it-py", {"bob/dev/rich"}),
    ("requires:Pygments", {"bob/dev/rich"}),
    ("python:3.8 index:ann/dev", {"ann/dev/pyyaml", "ann/dev/pluggy"}),
    ("python:3.9 index:ann/dev", ANN_DEV),
    ("python:2.7 user:ann", {"ann/prod/oldlib", "ann/prod/betalib"}),
    ("-python:3.9 user:ann", {"ann/prod/oldlib"}),
    ("has:docs", {"bob/docs/sphinx-tale"}),
    ("has:tests", {"bob/dev/click"}),
    ("has:wheel index:ann/dev", {"ann/dev/pyyaml", "ann/dev/pluggy"}),
    ("-has:wheel index:bob/dev", {"bob/dev/about-everything"}),
    ("is:yanked", {"ann/prod/oldlib"}),
    ("-is:yanked index:ann/prod", {"ann/prod/pluggy", "ann/prod/betalib"}),
    ("is:prerelease", {"ann/prod/betalib"}),
    ("kettle", {"ann/prod/betalib", "bob/dev/click-plugins"}),
    ("type:summary kettle", {"ann/prod/betalib"}),
    ("type:project kettle", {"ann/prod/betalib", "bob/dev/click-plugins"}),
    ("type:page historic", {"bob/docs/sphinx-tale"}),
    ("type:page kettle", set()),
    ("type:project historic", set()),
    ("uploaded:>2020-01-01 emitter", {"ann/dev/pyyaml"}),
    ("uploaded:>2999-01-01", set()),
    ("uploaded:<2020-01-01", set()),
    ("-uploaded:>2020-01-01", set()),
]
SPELLINGS = [
    ("pyyaml", {"ann/dev/pyyaml"}),
    ("py yaml", {"ann/dev/pyyaml"}),
    ("yaml ", {"ann/dev/pyyaml", "cat/open/yaml-lint"}),
    ("yamllint", {"cat/open/yaml-lint"}),
    ("web", {"ann/dev/devpi-web"}),
    ("devpi web", {"ann/dev/devpi-web"}),
    ("devpi-web", {"ann/dev/devpi-web"}),
    ("DEVPI_Web", {"ann/dev/devpi-web"}),
    ("devpiweb ", {"ann/dev/devpi-web"}),
    ("zurich", {"bob/dev/bayes"}),
    ("Z\u00dcRICH ", {"bob/dev/bayes"}),
    ("zu\u0308rich ", {"bob/dev/bayes"}),
    ("naive statistics", {"bob/dev/bayes"}),
    ("jose muller", {"bob/dev/bayes"}),
]


@pytest.mark.parametrize("query, hits", WORDS + FILTERS + SPELLINGS)
def test_a_query_finds(corpus, query, hits):
    assert found(corpus, query) == hits


def test_few_hits_and_many_are_found_in_two_ways_alike(corpus, monkeypatch):
    queries = [query for query, _ in WORDS + FILTERS + SPELLINGS]
    queries += ["%s %s" % (query, other) for query in ("terminal", "-name:pluggy", "has:wheel") for other, _ in FILTERS]
    with contextlib.closing(sqlite3.connect("file:%s?mode=ro" % (corpus.directory / "search.db"), uri=True)) as db:
        indexes = [devpi_lite.Index(id_, user, name, {}) for id_, user, name in db.execute(
            "SELECT DISTINCT index_id, user, idx FROM sdoc WHERE user != 'cat'")]

        def all_found():
            return [set().union(*(ids for _, ids in devpi_lite.Matcher(
                db, devpi_lite.Query(query), indexes, True).found())) for query in queries]

        monkeypatch.setattr(devpi_lite.Matcher, "few", 1000)
        one_by_one = all_found()
        monkeypatch.setattr(devpi_lite.Matcher, "few", -1)
        assert dict(zip(queries, all_found())) == dict(zip(queries, one_by_one))
    assert sum(map(bool, one_by_one)) > len(queries) / 2


@pytest.mark.parametrize("query, numbers", [
    ("2026-11-29", {2, 3}), ("=2026-11-29", {2, 3}), ("<2026-11-29", {1}), ("<=2026-11-29", {1, 2, 3}), (">2026-11-29", {4}),
    (">=2026-11-29", {2, 3, 4}), ("2026-11", {1, 2, 3}), (">2026-11", {4}), ("<=2026", {1, 2, 3, 4}), ("<2026", set())])
def test_days_and_months_of_uploads_are_compared_whole(query, numbers):
    times = ["2026-11-28T23:59:59.999999Z", "2026-11-29T00:00:00.000000Z", "2026-11-29T23:59:59.999999Z", "2026-12-01T00:00:00.000000Z", ""]
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(devpi_lite.SEARCH_SCHEMA)
        db.executemany("INSERT INTO sdoc VALUES (?, 'project', 1, 'ann', 'dev', 'x', 'x', '1', '', '', '', NULL, ?, NULL)",
                       [(number << 12, uploaded) for number, uploaded in enumerate(times, 1)])
        index = devpi_lite.Index(1, "ann", "dev", {})
        found = devpi_lite.Matcher(db, devpi_lite.Query("uploaded:" + query), [index], True).found()
    assert set().union(*(ids for _, ids in found)) == numbers


@pytest.mark.parametrize("query", [
    "emitter", '"parser and emitter"', "(emitter OR toolkit) user:bob", "click -name:rich NOT registers", "plug* version:>=1.4"])
def test_a_well_formed_query_needs_no_note(corpus, query):
    assert search(corpus, query)["notes"] == []


def test_that_there_were_too_many_projects_is_said_once(monkeypatch):
    monkeypatch.setattr(devpi_lite.Limits, "search_hits", 3)
    monkeypatch.setattr(devpi_lite.Matcher, "few", 7)
    indexes = [devpi_lite.Index(number, "ann", "i%d" % number, {}) for number in range(4)]
    query = devpi_lite.Query("name:x*")
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(devpi_lite.SEARCH_SCHEMA)
        db.executemany("INSERT INTO sdoc VALUES (?, 'project', ?, 'ann', '', 'x', 'x', '1', '', '', '', NULL, '', NULL)",
                       [((number + 1) << 12, number // 2) for number in range(8)])
        assert sum(len(ids) for _, ids in devpi_lite.Matcher(db, query, indexes, True).found()) == 3
        assert query.notes == ["Only 3 projects were looked at."]

        # few hits are all of them, wherever they are
        few = devpi_lite.Query("name:x* path:/ann/i3*")
        db.execute("UPDATE sdoc SET path = '/ann/i' || index_id || '/x'")
        assert devpi_lite.Matcher(db, few, indexes, True).found() == [(indexes[3], {7, 8})]
        assert few.notes == []


@pytest.mark.parametrize("query", [
    "(emitter", "emitter)", ")emitter(", '"parser and emitter', "'parser and emitter", 'emitter "', "emitter AND"])
def test_a_malformed_query_is_read_as_plain_words_and_says_so(corpus, query):
    result = search(corpus, query)
    assert [hit["name"].lower() for hit in result["hits"]] == ["pyyaml"]
    assert result["notes"] and all(isinstance(note, str) and " " in note for note in result["notes"])


def test_what_looks_like_a_filter_and_is_none_is_told(corpus):
    assert search(corpus, "emitter versio:1")["notes"] == ["'versio:' is no filter; it was read as a word."]
    assert search(corpus, "http://example.org 12:30")["notes"] == ["'http:' is no filter; it was read as a word."]


@pytest.mark.parametrize("query", ["emitter " * 17, "emitter " + "(" * 300, "x" * 257])
def test_a_query_over_the_limits_is_cut_and_says_so(corpus, query):
    assert search(corpus, query)["notes"]


FRAGMENTS = (
    "\" ' ( ) - * : ^ + ~ \\ { } [ ] , ; % _ | & ! = < > <= ! NOT AND OR ANDNOT ANDMAYBE NEAR NEAR( NEAR/2 name: user: index: path: "
    "version: version:>= version:=== version:~=1 classifier: classifier:' keyword: author:\" license: requires: python: python:x "
    "python:>=3 has: has:nothing is: is:not type: type:nothing uploaded: uploaded:> uploaded:>2026-13-45 uploaded:x {a}:b a:b:c -- "
    "-( -\" ** *a a* a^2 a^^ \0 \t \n \x1f \x7f \u00fc \u2028 \ufeff \ud7ff \U0001f40d \u0130 rank sfts name emitter click "
    "99999999999999999999 1e999 null None ' ; DROP TABLE sdoc; -- %s %00 ../../etc/passwd <b>"
).split(" ")


def odd_strings():
    """The same 200 on every run: half of them pieces of query languages, half bytes, as they stand in a URL."""
    chance = random.Random(20)
    for _ in range(100):
        pieces = [chance.choice(FRAGMENTS) for _ in range(chance.randint(1, 12))]
        yield urllib.parse.quote(chance.choice(["", " "]).join(pieces), safe="")
    for _ in range(100):
        yield urllib.parse.quote(bytes(chance.randrange(256) for _ in range(chance.randint(1, 90))), safe="")


def test_no_query_makes_an_error(corpus):
    for query in odd_strings():
        reply = corpus.get("/+search?query=" + query)
        assert (reply.status, reply.json()["type"], reply.result["page"]) == (200, "search", 1), query
        assert reply.result["total"] >= len(reply.result["hits"]), query
        assert all(isinstance(note, str) and note for note in reply.result["notes"]), query
        reply = corpus.get("/+suggest?q=" + query)
        assert (reply.status, len(reply.json())) == (200, 2), query
    assert found(corpus, "emitter") == {"ann/dev/pyyaml"}


@pytest.mark.parametrize("query", [
    "", "?", "?query", "?query=", "?query=%20", "?query=%", "?query=%zz", "?query=%ff%fe", "?query=a&query=b", "?QUERY=a", "?page=2",
    "?query=a&sort=", "?query=a&sort=sideways", "?query=a&sort=name&sort=x", "?query=a&unknown=1", "?&&=&"])
def test_no_parameter_makes_an_error(corpus, query):
    reply = corpus.get("/+search" + query)
    assert (reply.status, reply.json()["type"]) == (200, "search")


def test_search_is_read_only(corpus):
    before = serial(corpus)
    for path in ("/+search?query=click", "/+suggest?q=click"):
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            assert corpus.request(method, path, {}, user="root").status == 404
    assert serial(corpus) == before


# Hits


def test_a_hit_says_what_and_where(corpus):
    result = search(corpus, "emitter")
    assert set(result) == {"query", "total", "page", "pages", "hits", "names", "notes"}
    assert (result["query"], result["total"], result["page"], result["pages"]) == ("emitter", 1, 1, 1)
    assert result["names"] == {"total": 0, "hits": []}
    [hit] = result["hits"]
    assert set(hit) >= HIT_KEYS
    assert isinstance(hit["score"], (int, float)) and not isinstance(hit["score"], bool)
    shown = {key: hit[key] for key in ("version", "index", "summary")}
    assert shown == {"version": "6.0.2", "index": "ann/dev", "summary": "Parser and emitter"}
    assert normal_name(hit["name"]) == "pyyaml"
    assert corpus.get(urllib.parse.urlsplit(hit["url"]).path).status == 200


def test_the_exact_name_comes_first_then_names_that_begin_so_then_the_rest(corpus):
    assert ranked(corpus, "click") == ["bob/dev/click", "bob/dev/click-plugins", "bob/dev/about-everything"]
    assert ranked(corpus, "CLICK") == ["bob/dev/click", "bob/dev/click-plugins", "bob/dev/about-everything"]
    assert ranked(corpus, "Yaml_Lint OR yaml")[0] == "cat/open/yaml-lint"


def test_a_hit_in_the_name_outranks_one_in_the_text(corpus):
    assert ranked(corpus, "plugins OR hook")[0] == "bob/dev/click-plugins"


def test_hits_by_name(corpus):
    hits = ranked(corpus, "user:bob", sort="name")
    assert hits == sorted(hits, key=lambda path: path.rpartition("/")[2])


# Names in mirrors


def test_names_of_mirrors_by_prefix_and_then_by_what_they_contain(corpus):
    names = names_found(corpus, "pluggy")
    assert names[:2] == ["bob/mirror/pluggy", "bob/mirror/pluggy-extras"]
    assert sorted(names[2:]) == ["bob/mirror/fastpluggy", "bob/mirror/types-pluggy"]
    assert search(corpus, "pluggy")["names"]["total"] == 4


def test_a_name_in_a_mirror_leads_to_its_project(corpus):
    [name] = search(corpus, "fastpl")["names"]["hits"]
    assert set(name) == {"name", "index", "url"}
    assert (name["name"], name["index"]) == ("fastpluggy", "bob/mirror")
    assert urllib.parse.urlsplit(name["url"]).path.rstrip("/") == "/bob/mirror/fastpluggy"


def test_names_are_found_in_any_spelling(corpus):
    assert names_found(corpus, "Types_Plug") == ["bob/mirror/types-pluggy"]


# Suggestions


@pytest.mark.parametrize("text, names", [
    ("plug", ["pluggy", "pluggy-extras"]), ("pluggy-e", ["pluggy-extras"]), ("PyY", ["pyyaml"]), ("Devpi_W", ["devpi-web"]),
    ("no-such-name", [])])
def test_suggestions_are_names_that_begin_so(corpus, text, names):
    assert sorted(normal_name(name) for name in suggested(corpus, text)) == names


def test_nothing_typed_is_no_error(corpus):
    assert isinstance(suggested(corpus, ""), list)
    assert corpus.get("/+suggest").status == 200


# What may not be read leaves no trace


@pytest.mark.parametrize("user", [None, "bob"])
def test_a_hidden_index_leaves_no_trace(corpus, user):
    for query in (
            "zzsecret", "click-vault", "name:click-vault", "index:cat/secret", "path:/cat/secret/*", "path:/cat/secret/click-vault",
            "is:prerelease user:cat", "has:docs user:cat", "-emitter user:cat index:secret"):
        result = search(corpus, query, user=user)
        assert (result["total"], result["hits"], result["names"]) == (0, [], {"total": 0, "hits": []}), query
    assert found(corpus, "user:cat", user=user) == {"cat/open/yaml-lint", "cat/open/httpx"}
    assert names_found(corpus, "pluggy-hush", user=user) == []
    for start in ("click-v", "pluggy-h", "vault"):
        assert suggested(corpus, start, user=user) == []
    assert "pluggy-hush" not in suggested(corpus, "pluggy", user=user)


@pytest.mark.parametrize("user", ["cat", "root"])
def test_who_may_read_an_index_finds_what_it_holds(corpus, user):
    assert found(corpus, "zzsecret", user=user) == {"cat/secret/click-vault"}
    assert found(corpus, "name:pluggy version:1.4.0", user=user) == {"ann/dev/pluggy", "cat/secret/pluggy"}
    assert found(corpus, "has:docs user:cat", user=user) == {"cat/secret/click-vault"}
    assert names_found(corpus, "pluggy-hush", user=user) == ["cat/mirror/pluggy-hush"]
    assert suggested(corpus, "click-v", user=user) == ["click-vault"]
    assert suggested(corpus, "pluggy-h", user=user) == ["pluggy-hush"]


def test_wrong_credentials_find_what_everybody_finds(corpus):
    reply = corpus.get("/+search?query=zzsecret", user="cat", password="wrong")
    assert (reply.status, reply.result["total"]) == (200, 0)


def test_closing_an_index_hides_it_at_once_and_opening_it_shows_it_at_once(live):
    live.add_index("eve/door")
    upload(live, "eve/door", release("doorbell", "1.0", "xylophone"))
    eventually(lambda: found(live, "xylophone"))
    assert live.patch("/eve/door", {"acl_pkg_read": ["eve"]}, user="eve").status == 200
    assert (found(live, "xylophone"), suggested(live, "doorb")) == (set(), [])
    assert found(live, "xylophone", user="eve") == {"eve/door/doorbell"}
    assert live.patch("/eve/door", {"acl_pkg_read": [":ANONYMOUS:"]}, user="eve").status == 200
    assert (found(live, "xylophone"), suggested(live, "doorb")) == ({"eve/door/doorbell"}, ["doorbell"])


# XML-RPC


@pytest.mark.parametrize("parameters, names", [
    (({"name": ["click"]},), {"click", "click-plugins"}),
    (({"name": "click"},), {"click", "click-plugins"}),
    (({"summary": ["terminal"]},), {"rich"}),
    (({"name": ["click"], "summary": ["click"]}, "or"), {"click", "click-plugins", "about-everything"}),
    (({"name": "click", "summary": "click"}, "or"), {"click", "click-plugins", "about-everything"}),
    (({"name": ["click"], "summary": ["click"]}, "and"), set()),
    (({"name": ["click"], "summary": ["click"]},), set()),
    (({"name": ["click"], "summary": ["commands"]}, "and"), {"click-plugins"}),
    (({"name": ["rich", "bayes"]}, "or"), {"rich", "bayes"}),
    (({"name": ["rich", "bayes"], "summary": ["terminal"]}, "and"), {"rich"}),
    (({"name": ["emitter"], "summary": ["emitter"]}, "or"), set()),
    (({"name": ['"(NEAR*'], "summary": ["AND"]}, "or"), set())])
def test_xmlrpc_search(corpus, parameters, names):
    assert rpc_names(corpus, "bob/dev", *parameters) == names


def test_a_hit_of_xmlrpc_names_its_index_in_the_summary(corpus):
    [hit] = rpc(corpus, "cat/both", {"name": ["devpi-web"], "summary": ["devpi-web"]}, "or")
    assert isinstance(hit.pop("_pypi_ordering"), (int, float))
    assert hit == {"name": "devpi-web", "version": "5.1", "summary": "[ann/dev] Browser frontend of an index"}


def test_xmlrpc_searches_the_index_and_its_bases_and_the_first_of_them_wins(corpus):
    assert rpc(corpus, "ann/prod", {"name": ["devpi-web"]}) == []
    assert rpc_names(corpus, "cat/both", {"name": ["pluggy", "oldlib", "click"]}, "or") == {"pluggy", "oldlib"}
    [hit] = rpc(corpus, "cat/both", {"name": ["pluggy"]})
    assert (hit["version"], hit["summary"]) == ("1.5.0", "[ann/dev] plugin and hook calling mechanisms")


def test_xmlrpc_works_without_the_final_slash_and_with_a_charset(corpus):
    body = xmlrpc.client.dumps(({"name": ["rich"]},), "search")
    for path in ("/bob/dev", "/bob/dev/"):
        for content_type in ("text/xml", "text/xml; charset=utf-8"):
            reply = corpus.post(path, body, headers={"Content-Type": content_type, "Accept": "*/*"})
            assert [hit["version"] for hit in rpc_value(reply)] == ["13.9.4"]


def test_the_standard_library_s_client_searches(corpus):
    with xmlrpc.client.ServerProxy(corpus.url + "/bob/dev/") as client:
        assert [hit["name"] for hit in client.search({"name": "rich", "summary": "rich"}, "or")] == ["rich"]


def test_xmlrpc_of_a_hidden_index_asks_who_it_is(corpus):
    body = xmlrpc.client.dumps(({"name": ["click-vault"]},), "search")
    assert [rpc_post(corpus, "cat/secret", body, user=user).status for user in (None, "bob", "cat")] == [401, 403, 200]
    assert rpc_names(corpus, "cat/secret", {"name": ["click"]}, user="cat") == {"click-vault"}


def test_xmlrpc_leaves_out_bases_that_the_caller_may_not_read(corpus):
    for user, version in ((None, "1.5.0"), ("bob", "1.5.0"), ("cat", "1.4.0")):
        [hit] = rpc(corpus, "cat/child", {"name": ["pluggy"]}, user=user)
        assert hit["version"] == version
    assert rpc(corpus, "cat/child", {"name": ["zzsecret"], "summary": ["kettle"]}, "or") == []


@pytest.mark.parametrize("method", ["package_releases", "system.listMethods", "search.x", "__class__", ""])
def test_every_other_xmlrpc_method_is_a_fault(corpus, method):
    with pytest.raises(xmlrpc.client.Fault) as fault:
        rpc(corpus, "bob/dev", {"name": ["click"]}, method=method)
    assert fault.value.faultString


def refused(reply):
    """Whether an XML-RPC call was answered with a fault or with 400."""
    if reply.status == 400:
        return True
    try:
        rpc_value(reply)
    except xmlrpc.client.Fault:
        return True
    return False


CALL = xmlrpc.client.dumps(({"name": ["rich"]},), "search")
ENTITY = '<!DOCTYPE x [<!ENTITY r "rich">]>'


BAD_CALLS = {
    "nothing": "",
    "no XML": "no xml at all",
    "no end": "<methodCall>",
    "cut off": CALL[:-20],
    "two calls": CALL + CALL,
    "an answer": xmlrpc.client.dumps(("rich",), methodresponse=True),
    "no parameters": xmlrpc.client.dumps((), "search"),
    "fields as text": xmlrpc.client.dumps(("rich",), "search"),
    "fields as number": xmlrpc.client.dumps((7, "and"), "search"),
    "a long text": xmlrpc.client.dumps(({"name": ["x" * 60000]}, "and"), "search"),
    "a value as struct": xmlrpc.client.dumps(({"name": {"x": 1}}, "and"), "search"),
    "unknown operator": xmlrpc.client.dumps(({"name": ["rich"]}, "xor"), "search"),
    "operator as list": xmlrpc.client.dumps(({"name": ["rich"]}, ["and"]), "search"),
    "a parameter too many": xmlrpc.client.dumps(({"name": ["rich"]}, "and", "more"), "search"),
    "a number that is none": CALL.replace("<string>rich</string>", "<int>rich</int>"),
    "deep": CALL.replace("<string>rich</string>", "<array><data><value>" * 900 + "</value></data></array>" * 900),
    "NUL": CALL.replace("rich", "\x00"),
    "no UTF-8": b"\xff\xfe\xfd",
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_a_bad_xmlrpc_call_is_a_fault_or_400(corpus, what):
    before = serial(corpus)
    assert refused(rpc_post(corpus, "bob/dev", BAD_CALLS[what]))
    assert serial(corpus) == before


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("prologue", [ENTITY, '<!DOCTYPE methodCall SYSTEM "file:///etc/passwd">', "<!DOCTYPE methodCall>"])
def test_xmlrpc_takes_no_document_type_and_no_entity(corpus, prologue, encoding):
    """Whatever the encoding: the parser would understand UTF-16, a search for the bytes of `<!DOCTYPE` would not."""
    body = CALL.replace("<?xml version='1.0'?>", "<?xml version='1.0'?>" + prologue)
    assert prologue in body
    assert refused(rpc_post(corpus, "bob/dev", body.encode(encoding)))


def test_an_entity_is_not_put_in_for_its_name(corpus):
    body = CALL.replace("<?xml version='1.0'?>", ENTITY).replace("rich", "&r;")
    assert refused(rpc_post(corpus, "bob/dev", body))


def test_an_xmlrpc_body_is_at_most_64_kib(corpus):
    room = 64 * 1024 - len(CALL)
    assert [hit["name"] for hit in rpc_value(rpc_post(corpus, "bob/dev", CALL + " " * room))] == ["rich"]
    assert rpc_post(corpus, "bob/dev", CALL + " " * (room + 1)).status == 413


def test_xmlrpc_of_an_index_that_is_not_there(corpus):
    assert rpc_post(corpus, "bob/nothing", CALL).status == 404
    assert rpc_post(corpus, "nobody/dev", CALL).status == 404


def test_xmlrpc_of_a_mirror_is_no_error(corpus):
    assert isinstance(rpc(corpus, "bob/mirror", {"name": ["pluggy"], "summary": ["pluggy"]}, "or"), list)


# Keeping up


def test_a_new_version_takes_the_place_of_the_old_one(live):
    upload(live, "eve/dev", release("renewal", "1.0", "quokka"))
    eventually(lambda: found(live, "quokka") == {"eve/dev/renewal"})
    upload(live, "eve/dev", release("renewal", "2.0", "wombat"))
    eventually(lambda: found(live, "wombat") == {"eve/dev/renewal"})
    assert found(live, "quokka") == set()
    [hit] = search(live, "name:renewal")["hits"]
    assert (hit["version"], hit["summary"]) == ("2.0", "wombat")


def test_an_older_version_that_comes_later_does_not(live):
    upload(live, "eve/dev", release("latecomer", "10.0", "aardvark"), release("latecomer", "9.0", "platypus"))
    settle(live, "eve/dev", "latecomer")
    assert (found(live, "aardvark"), found(live, "platypus")) == ({"eve/dev/latecomer"}, set())
    assert found(live, "name:latecomer version:9.0") == {"eve/dev/latecomer"}


def test_newly_submitted_metadata_is_found(live):
    upload(live, "eve/dev", release("resubmit", "1.0", "tapir"))
    eventually(lambda: found(live, "tapir"))
    submit(live, "eve/dev", "resubmit", "1.0", summary="ocelot")
    eventually(lambda: found(live, "ocelot") == {"eve/dev/resubmit"})
    assert found(live, "tapir") == set()


@pytest.mark.parametrize("what", ["file", "version", "project", "index", "user"])
def test_what_is_deleted_is_no_longer_found(live, what):
    user = "adam" if what == "user" else "eve"
    index, archive = "%s/gone-%s" % (user, what), release("vanish-" + what, "1.0", "bandicoot" + what)
    if what == "user":
        live.add_user("adam")
    live.add_index(index)
    upload(live, index, archive)
    eventually(lambda: found(live, archive.fields["summary"]) == {"%s/vanish-%s" % (index, what)})
    assert suggested(live, "vanish-" + what) == ["vanish-" + what]
    path = {
        "file": path_of(archive, index),
        "version": "/%s/%s/1.0" % (index, archive.name),
        "project": "/%s/%s" % (index, archive.name),
        "index": "/" + index,
        "user": "/" + user,
    }[what]
    assert live.delete(path, user=user).status in (200, 201)
    eventually(lambda: found(live, archive.fields["summary"]) == set() and suggested(live, "vanish-" + what) == [])


def test_deleting_the_newest_version_brings_back_the_one_before(live):
    upload(live, "eve/dev", release("comeback", "1.0", "numbat"), release("comeback", "2.0", "dingo"))
    eventually(lambda: found(live, "dingo"))
    assert live.delete("/eve/dev/comeback/2.0", user="eve").status == 200
    eventually(lambda: found(live, "numbat") == {"eve/dev/comeback"} and found(live, "dingo") == set())
    assert search(live, "name:comeback")["hits"][0]["version"] == "1.0"


def test_an_index_made_again_starts_without_its_past(live):
    live.add_index("eve/again")
    upload(live, "eve/again", release("ghost", "1.0", "pangolin"))
    eventually(lambda: found(live, "pangolin"))
    assert live.delete("/eve/again", user="eve").status == 201
    live.add_index("eve/again")
    upload(live, "eve/again", release("ghost", "1.0", "echidna"))
    eventually(lambda: found(live, "echidna") == {"eve/again/ghost"} and found(live, "pangolin") == set())


def test_documentation_is_found_until_it_is_replaced_or_deleted(live):
    upload(live, "eve/dev", release("manual", "1.0", "booklet"))
    put_docs(live, "eve/dev", "manual", "1.0", guide="<script>var numpty;</script> <b>lyre</b>bird &amp; kookaburra")
    eventually(lambda: found(live, "kookaburra") == {"eve/dev/manual"})
    assert found(live, "numpty") == set()
    put_docs(live, "eve/dev", "manual", "1.0", guide="cockatoo")
    eventually(lambda: found(live, "cockatoo") == {"eve/dev/manual"})
    assert found(live, "kookaburra") == set()
    upload(live, "eve/dev", release("manual", "2.0", "booklet"))
    settle(live, "eve/dev", "manual")
    assert found(live, "cockatoo") == {"eve/dev/manual"}     # of the newest version that has any
    [link] = links(live, "eve/dev/manual/1.0", "doczip")
    assert live.delete(urllib.parse.urlsplit(link["href"]).path, user="eve").status == 200
    eventually(lambda: found(live, "cockatoo") == set() and "eve/dev/manual" not in found(live, "has:docs"))
    assert found(live, "booklet") == {"eve/dev/manual"}


def test_yanking_and_test_results_are_seen(live):
    archive = release("flagged", "1.0", "marmot")
    upload(live, "eve/dev", archive)
    eventually(lambda: found(live, "marmot"))
    assert (found(live, "marmot is:yanked"), found(live, "marmot has:tests")) == (set(), set())
    assert live.patch("/eve/dev/flagged/1.0", {"yanked": True}, user="eve").status == 200
    eventually(lambda: found(live, "marmot is:yanked"))
    assert live.patch("/eve/dev/flagged/1.0", {"yanked": False}, user="eve").status == 200
    eventually(lambda: not found(live, "marmot is:yanked"))
    reply = live.post(path_of(archive, "eve/dev"), {"testenvs": {}})
    assert reply.status == 200
    eventually(lambda: found(live, "marmot has:tests") == {"eve/dev/flagged"})
    assert live.delete("/" + reply.result.partition("#")[0], user="eve").status == 200
    eventually(lambda: not found(live, "marmot has:tests"))


def test_what_is_pushed_is_found_in_both_indexes(live):
    live.add_index("eve/target")
    upload(live, "eve/dev", release("travelled", "1.0", "capybara"))
    push = {"name": "travelled", "version": "1.0", "targetindex": "eve/target"}
    assert live.request("PUSH", "/eve/dev", push, user="eve").status == 200
    eventually(lambda: found(live, "capybara") == {"eve/dev/travelled", "eve/target/travelled"})


def test_names_of_a_deleted_mirror_are_forgotten(live, upstream):
    upstream.publish("kinkajou")
    live.add_mirror("eve/mirror", upstream)
    assert live.get("/eve/mirror/+simple/").status == 200
    eventually(lambda: names_found(live, "kinkajou") == ["eve/mirror/kinkajou"])
    assert live.delete("/eve/mirror", user="eve").status == 201
    eventually(lambda: names_found(live, "kinkajou") == [] and suggested(live, "kinka") == [])


def test_a_refused_upload_is_not_found(live):
    before = serial(live)
    assert live.upload("eve/dev", release("refused", "1.0", "jackalope"), user=None).status == 401
    assert serial(live) == before
    settle(live, "eve/dev", "refused")
    assert found(live, "jackalope") == set()


def test_the_queue_is_a_metric_and_empties(live):
    upload(live, "eve/dev", release("queued", "1.0", "okapi"))
    eventually(lambda: re.search(r"^devpi_lite_search_queue 0(\.0)?$", live.get("/+metrics", headers={"Accept": "*/*"}).text, re.M))
    assert found(live, "okapi") == {"eve/dev/queued"}


# Pages


# Import names


def importable(name, *lines, **fields):
    """A wheel of metadata 2.5 with these lines (PEP 794), that its form need not repeat."""
    metadata = "\n".join(("Metadata-Version: 2.5", "Name: " + name, "Version: 1.0", *lines)) + "\n"
    archive = wheel(name, "1.0", metadata=metadata.encode())
    return dataclasses.replace(archive, fields=dict(archive.fields, **fields))


def test_a_project_is_found_by_what_it_is_imported_by(live):
    live.add_index("eve/imports")
    upload(live, "eve/imports", importable("Quokka-Kit", "Import-Name: quokka", "Import-Name: _quokka_speedups ; private"),
        importable("burrow-storage", "Import-Name: burrow.cloud.storage", "Import-Namespace: burrow.cloud"),
        importable("burrow-form", import_names=["hutch"], import_namespaces=["warren"]),
        importable("quokka-plugin", "Import-Name:"))
    settle(live, "eve/imports", "importable")
    for query, projects in (
            ("import:quokka", {"quokka-kit"}), ("import:Quokka", {"quokka-kit"}), ("import:_quokka_speedups", {"quokka-kit"}),
            ("_quokka_speedups", {"quokka-kit"}), ("quokka -name:quokka-plugin", {"quokka-kit"}), ("import:quok", set()),
            ("import:burrow.*", {"burrow-storage"}), ("burrow.cloud.storage", {"burrow-storage"}), ("hutch", {"burrow-form"}),
            ("import:burrow.cloud", {"burrow-storage"}), ("import:warren", {"burrow-form"})):
        assert found(live, query) == {"eve/imports/" + project for project in projects}, query
    assert ranked(live, "quokka")[0] == "eve/imports/quokka-kit"


@pytest.fixture(scope="module")
def crowd(live):
    """41 projects with one word in common; their names in the order of their uploads."""
    live.add_index("eve/crowd")
    names = ["crowd-%02d" % (number * 7 % 41) for number in range(41)]
    upload(live, "eve/crowd", *[release(name, "1.0", "multitude") for name in names])
    eventually(lambda: search(live, "multitude")["total"] == 41)
    return live, names


def page_of(server, page, **parameters):
    result = search(server, "multitude", page=page, **parameters)
    assert (result["total"], result["pages"]) == (41, 3)
    return result["page"], [hit["name"] for hit in result["hits"]]


def test_twenty_a_page(crowd):
    server, names = crowd
    pages = [page_of(server, page) for page in (1, 2, 3)]
    assert [(page, len(hits)) for page, hits in pages] == [(1, 20), (2, 20), (3, 1)]
    assert sorted(name for _, hits in pages for name in hits) == sorted(names)


@pytest.mark.parametrize("page", ["0", "-1", "-99999999999999999999", "x", "", "1.5", "2x", "NaN", "0x2", "\0"])
def test_what_is_no_page_is_the_first(crowd, page):
    server, _ = crowd
    assert page_of(server, page) == page_of(server, "1")


@pytest.mark.parametrize("page", ["51", "99999", "9" * 40])
def test_pages_end_at_fifty(crowd, page):
    server, _ = crowd
    assert page_of(server, page)[0] in (3, 50)
    assert page_of(server, page) == page_of(server, "50")


def test_sorted_by_name_or_newest_first_over_all_pages(crowd):
    server, names = crowd
    for sort, expected in (("name", sorted(names)), ("-uploaded", names[::-1])):
        assert [name for page in (1, 2, 3) for name in page_of(server, page, sort=sort)[1]] == expected


TREES = ("oak", "elm", "ash", "fir", "yew")


@pytest.fixture(scope="module")
def forest(live):
    """{project: (words of its name, summary, keywords, README)} of 160 projects in eve/forest."""
    live.add_index("eve/forest")
    chosen, projects = random.Random(4), {}
    for name in ("oak", "elm-ash", "oakum", *("%s-%s-%03d" % (*chosen.sample(TREES, 2), number) for number in range(157))):
        projects[name] = [{*name.split("-"), name.replace("-", "")}, *({chosen.choice(TREES)} for _ in range(3))]
    upload(live, "eve/forest", *[
        release(name, "1.0", *summary, keywords=[*keywords][0], description=[*readme][0] + "\n")
        for name, (_, summary, keywords, readme) in projects.items()])
    settle(live, "eve/forest", "forest")
    return live, projects


def in_order(projects, words):
    """The projects with one of some words in the documented order; a word that ends in a star is a beginning."""
    plain = [word.rstrip("*") for word in words]
    names = {*plain, "-".join(plain)}

    def has(texts):
        return any(text.startswith(word[:-1]) if word.endswith("*") else text == word for text in texts for word in words)

    def rank(name):
        in_name, *others = projects[name]
        relevance = sum(weight for weight, texts in zip((20, 6, 5), (in_name, *others)) if has(texts))
        tier = 2 if name in names else 1 if name.startswith(tuple(names)) else 0
        return -tier, -relevance, name

    return sorted((name for name, texts in projects.items() if any(map(has, texts))), key=rank)


@pytest.mark.parametrize("words", [["oak"], ["elm", "ash"], ["yew", "oak*"], ["a*"], ["elm", "fir", "oakum"]], ids=" ".join)
def test_the_order_of_many_hits_over_all_pages(forest, words):
    """By name, then by the columns that a word stands in, then by the alphabet."""
    server, projects = forest
    query = "(%s) index:eve/forest -name:marker-forest" % " OR ".join(words)
    pages = [search(server, query, page=number) for number in range(1, search(server, query)["pages"] + 1)]
    expected = in_order(projects, words)
    assert [hit["name"] for page in pages for hit in page["hits"]] == expected
    assert {page["total"] for page in pages} == {len(expected)} and len(expected) > 40


# Losing power, losing the search index


def test_what_changed_just_before_a_crash_is_known_after_it(make_server):
    server = make_server()
    server.add_user("eve")
    server.add_index("eve/dev")
    upload(server, "eve/dev", release("crash-before", "1.0", "thylacine"))
    eventually(lambda: found(server, "thylacine") == {"eve/dev/crash-before"})
    archives = [release("crash-%d" % number, "1.0", "thylacine") for number in range(8)]
    upload(server, "eve/dev", *archives)
    assert server.delete("/eve/dev/crash-before", user="eve").status == 200
    server.kill()
    server.start()
    eventually(lambda: found(server, "thylacine") == {"eve/dev/" + archive.name for archive in archives})

SLOW_RANKING = """
scores = devpi_lite.Matcher.scores
def slowly(self, found):
    result = scores(self, found)
    if "gazelle" in self.query.text:
        devpi_lite.time.sleep(1)
    return result
devpi_lite.Matcher.scores = slowly
"""


def test_a_search_sees_one_moment(make_server, tmp_path):
    """A hit that leaves the index while it is ranked is in the count and in the list, or in neither."""
    server = make_server(script=patched(tmp_path, SLOW_RANKING))
    server.add_user("eve")
    server.add_index("eve/dev")
    upload(server, "eve/dev", release("leaving", "1.0", "gazelle"), release("staying", "1.0", "gazelle"))
    eventually(lambda: len(server.get("/+search?query=gazelle").result["hits"]) == 2)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        searching = pool.submit(server.get, "/+search?query=gazelle")
        time.sleep(0.2)
        assert server.delete("/eve/dev/leaving", user="eve").status == 200
        found = searching.result().result
    assert found["total"] == len(found["hits"]) == 2


def test_the_search_index_is_made_again_when_it_is_lost_or_broken(make_server, upstream):
    upstream.publish("okapi")
    server = make_server()
    server.add_user("eve")
    server.add_index("eve/dev")
    server.add_index("eve/closed", acl_pkg_read=["eve"])
    server.add_mirror("eve/mirror", upstream)
    upload(server, "eve/dev", release("lasting", "1.0", "coelacanth", keywords="fish"))
    upload(server, "eve/closed", release("closed", "1.0", "coelacanth"))
    put_docs(server, "eve/dev", "lasting", "1.0", guide="nautilus")
    assert server.get("/eve/mirror/+simple/").status == 200

    def all_found():
        return (
            found(server, "coelacanth keyword:fish") == found(server, "nautilus") == {"eve/dev/lasting"}
            and names_found(server, "okapi") == ["eve/mirror/okapi"] and suggested(server, "lasti") == ["lasting"])

    eventually(all_found)
    index = server.directory / "search.db"
    for damage in ("lost", "broken"):
        assert server.stop() == 0
        assert index.exists()
        index.unlink()
        if damage == "broken":
            index.write_bytes(random.Random(1).getrandbits(8 * 8192).to_bytes(8192, "big"))
        server.start()
        eventually(all_found)
        assert found(server, "coelacanth") == {"eve/dev/lasting"}
        assert found(server, "coelacanth", user="eve") == {"eve/dev/lasting", "eve/closed/closed"}


# Where SQLite has no FTS5


def test_without_full_text_words_are_found_by_comparison(make_server):
    server = make_server("--no-full-text")
    server.add_user("eve")
    server.add_index("eve/dev")
    upload(server, "eve/dev", CORPUS[0][1], release("odd", "1.0", "100% a_b \\ done"), release("plain", "1.0", "1000 axb"))
    put_docs(server, "eve/dev", "odd", "1.0", guide="nautilus")
    eventually(lambda: found(server, "plain") and found(server, "nautilus"))
    for query, hits in (
            ("emitter", {"eve/dev/pyyaml"}), ("EMITTER parser", {"eve/dev/pyyaml"}), ('"and emitter"', {"eve/dev/pyyaml"}),
            ("emitter -parser", set()), ("keyword:markup license:MIT", {"eve/dev/pyyaml"}), ("nautilus", {"eve/dev/odd"}),
            ('"100%"', {"eve/dev/odd"}), ('"a_b"', {"eve/dev/odd"}), ("type:summary axb", {"eve/dev/plain"})):
        assert found(server, query) == hits, query
    assert rpc_names(server, "eve/dev", {"name": ["yaml"], "summary": ["done"]}, "or") == {"pyyaml", "odd"}
    server.stop()
    server.options = ()
    server.start()
    eventually(lambda: found(server, "emitter") == {"eve/dev/pyyaml"})     # made anew in the other form
