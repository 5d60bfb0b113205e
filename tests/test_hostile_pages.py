"""Web pages under attack: texts that want to be markup, readers who may not read, requests that no browser sends."""

import hashlib
import io
import itertools
import json
import os
import re
import shutil
import stat
import threading
import time
import urllib.parse
import xml.etree.ElementTree

import pytest

from archives import Archive, around, zipped
from forms import Browser
from harness import (
    BROWSER, JSON, SOAK, Server, documentation, eventually, links, patched, path_of, sdist, upload, upload_docs,
    wheel, worked)
from replicas import in_sync, primary_at, replica_at
from scripted import entry
from webpages import Page, below, check_page, crawl, page

# What people may write into one text, each kind for itself: it stays the text that it is.
TEXTS = {
    "tags": "lantern </title></style></script></textarea></pre><script>alert(1)</script><img src=x onerror=alert(2)>"
            "]]> <![CDATA[ <!-- --> <!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]> <?php ?>",
    "quotes": "lantern \" ' ` > onclick=alert(1) style=color:red id=main href=javascript:alert(1) x=\"",
    "formats": "lantern &lt;b&gt; &amp; &#60;i&#62; &lt {0} {} {x.__class__} {title!r} %s %(x)s ${x} }{ {{",
    "controls": "lantern \u0301 \U0001f3ee " + "w" * 900}
HIDDEN = "\x01\x08\x0b\x1b[31m\x7f\x85\xa0\u2028\u202e\u2066\ufeff\ufffe\uffff\r\n\t"          # where a text may have more than one line
WEIRD = [None, 0, -1, 1.5, True, [], {}, "", "x", [[]], {"a": None}, [None], 10 ** 30, "\ud800", [{"a": [1]}], 1e308]
SCHEMES = ["javascript:alert(1)", "JaVaScRiPt:alert(1)", " javascript:alert(1)", "java\tscript:alert(1)",
           "java\nscript:alert(1)",
           "javascript&colon;alert(1)", "&#106;avascript:alert(1)", "\x01javascript:alert(1)", "vbscript:x",
           "data:text/html,<script>alert(1)</script>", "//evil.example/x", "http://", "file:///etc/passwd"]
MEMBERS = ["<script>.py", "a\"b'c`>", "x\ny", "{0}{x.__class__}", "%2e%2e/%00", "?q=1", "#frag", "a?b#c",
           "\u202egnp.exe", "&amp;", " ",
           "\x1b[31m", "javascript:alert(1)", "w" * 3000, "\ufffe", "a//b", "a/./b", "-", "\xe9"]


numbers = itertools.count()


def harmless(text):
    """A text of the same length and lines, without anything that a format gives a meaning."""
    return re.sub(r"[^\w\s@]", "x", text)


def skeleton(found):
    """The elements of a page, without the texts, addresses and values in them."""
    kept = ("class", "id", "type", "rel", "name", "for", "method", "role", "scope")
    return [(tag, sorted(attributes), [attributes[name] for name in kept if name in attributes])
            for tag, attributes in found.elements]


def refuse_difference(one, other, where):
    """Fails at the first element that is not in both pages."""
    for left, right in itertools.zip_longest(skeleton(one), skeleton(other)):
        assert left == right, where


def fill(server, user, write):
    """Puts `write` of each hostile text wherever a user's index takes it."""
    for number, text in enumerate(TEXTS.values()):
        line, lines = write(text), write(text + HIDDEN)
        index = "%s/dev%d" % (user, number)
        assert server.patch("/" + user, {"title": lines, "description": lines, "email": "a@" + line, "x-own": lines},
                            user=user).status == 200
        server.add_index(index, bases=[], title=lines, description=lines, custom_data=lines)
        fields = {field: lines for field in (
            "summary", "author", "license", "home_page", "maintainer", "maintainer_email", "description", "platform",
            "download_url",
            "unknown_field", "license_expression", "keywords", "requires_python", "provides_extra",
            "requires_external", "dynamic",
            "supported_platform", "import_name", "license_file", "classifiers", "obsoletes_dist")}
        fields.update(
            author_email=lines, description_content_type="text/plain; x=" + line,
            project_urls=[write("%s, %s" % (text, url)) for url in SCHEMES] + [write(url) for url in SCHEMES])
        contents = lines.encode()
        for version in ("1.0", "1.1"):
            files = {name: contents + version.encode() for name in MEMBERS if version == "1.0" or name == MEMBERS[0]}
            upload(server, index, wheel("evil", version, extra_members=files), fields=fields)
        egg = around("evil-1.0-py2.7.egg", contents, "evil", "1.0")
        for filename in ("evil-1.0'{0}&amp;.zip", "evil-1.0.win32 <b>.exe"):
            upload(server, index, Archive(filename, egg, "evil", "1.0", b"", {"name": "evil", "version": "1.0",
                "filetype": "sdist"}))
        docs = io.BytesIO(zipped(("index.html", "<title>%s</title><p>%s" % (line, line)),
                                 ("more<b>.html", "<title></title>" + line)))
        upload_docs(server, index, Archive("evil-1.0.doc.zip", docs.getvalue(), "evil", "1.0", b"", {}))
        assert server.patch("/%s/evil/1.0" % index, {"yanked": line}, user=user).status == 200
        assert server.patch("/%s/evil" % index, {"project-status": {"status": "deprecated", "reason": line}},
                            user=user).status == 200
        result = {"host": lines, "platform": lines, "testenvs": {lines: {
            "python": {"version": line}, "setup": [{"command": [lines], "retcode": line, "output": lines}],
            "test": [{"command": lines, "retcode": 1, "output": lines}]}}}
        tested = [link["href"] for link in links(server, index + "/evil/1.0", "releasefile")
                  if link["href"].endswith(".whl")]
        assert server.post(below(server, tested[0]), result, user=user).status == 200


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """mal's indexes hold hostile texts, ben's harmless ones in the same places; amy logs in to see more."""
    server = Server(tmp_path_factory.mktemp("hostile") / "server").start("--offline-mode")
    try:
        for user, write in (("mal", str), ("ben", harmless)):
            server.add_user(user)
            fill(server, user, write)
        server.add_user("amy")
        server.add_index("amy/plain", bases=[])
        upload(server, "amy/plain", wheel("plain", "1.0", summary="lantern", requires_dist=["click"]))
        yield server
    finally:
        server.kill()


def in_step(server, hostile, twin, most=400, **options):
    """Follows the links of two pages alike, as far as they lead to pages of mal and ben: both must have the same elements.

    Returns the paths of the pages of mal."""
    seen, waiting = [], [(hostile, twin)]
    while waiting and len(seen) < most:
        paths = waiting.pop(0)
        if paths[0] in seen:
            continue
        seen.append(paths[0])
        replies = [server.get(path, headers={"Accept": BROWSER}, **options) for path in paths]
        assert replies[0].status == replies[1].status < 500, paths
        if b'id="main"' not in replies[0].body:
            continue
        found = [check_page(reply) for reply in replies]
        refuse_difference(*found, paths)
        pairs = zip(*([below(server, urllib.parse.urljoin(server.url + path, link)) for link in each.links]
                      for path, each in zip(paths, found)))
        waiting += [pair for pair in pairs if pair[0].startswith(("/mal", "/+search"))]
    return seen


# -- texts


@pytest.mark.parametrize("number", range(len(TEXTS)), ids=list(TEXTS))
def test_no_text_becomes_an_element_or_an_address(site, number):
    home = "dev%d" % number
    seen = in_step(site, "/mal/%s" % home, "/ben/%s" % home)
    parts = ("show=settings", "/evil/+why", "/+files/", "/+toxresults/", "/evil/+diff/1.0...1.1", "toxresult-",
             "/+d/index.html")
    for part in parts:
        assert [path for path in seen if part in path], part
    assert len(seen) > 60


def test_the_pages_that_list_them_stay_the_same(site):
    for user in ("mal", "ben"):
        eventually(lambda: len(page(site, "/+search?query=lantern+user:" + user).of("article")) == len(TEXTS))
    for path in ("/mal", "/+search?query=lantern+user:mal", "/+search?query=lantern+index:mal/dev0"):
        for options in ({}, {"user": "amy"}):
            one, other = (page(site, path.replace("mal", user), **options) for user in ("mal", "ben"))
            refuse_difference(one, other, path)
    front = page(site, "/")
    assert len(front.of("script")) == 1 and not front.of("img") and "lantern </title>" in front.text
    assert "lantern \" '" in page(site, "/mal/dev1/evil/1.0").main


@pytest.mark.parametrize("number", range(len(TEXTS)), ids=list(TEXTS))
def test_feeds_are_xml(site, number):
    for path in ("/mal/dev%d/+feed.atom", "/mal/dev%d/evil/+feed.atom"):
        reply = site.get(path % number)
        tree = xml.etree.ElementTree.fromstring(reply.body)
        titles = [each.text for each in tree.iter("{http://www.w3.org/2005/Atom}summary")]
        assert "evil-1.0.win32 <b>.exe" in titles and len(titles) == 4
    assert xml.etree.ElementTree.fromstring(site.get("/+opensearch.xml").body).tag.endswith("OpenSearchDescription")


@pytest.mark.parametrize("field, urls", [("project_urls", ["Home, " + url for url in SCHEMES]),
                                         ("home_page", SCHEMES[:1]),
                                         ("download_url", SCHEMES[:1])])
def test_only_web_and_mail_addresses_are_links(site, field, urls):
    upload(site, "amy/plain", wheel("linked-" + field, "1.0"), user="amy", fields={field: urls + [
        "Good, https://good.example/?a=1&b=\"2\"", "Odd, https://odd.example/\" onmouseover=\"alert(1)"]
        if field == "project_urls" else urls})
    found = page(site, "/amy/plain/linked-%s/1.0" % field.replace("_", "-"))
    outside = {link for link in found.links if not link.startswith(("/", "#"))}
    assert outside == ({"https://good.example/?a=1&b=%222%22", "https://odd.example/%22%20onmouseover=%22alert(1)"}
                       if field == "project_urls" else set())


@pytest.mark.parametrize("kind, text", [
    ("text/markdown",
     "[a](javascript:alert(1)) [b](java&#10;script:alert(1)) [c](<java\nscript:x>) ![d](x\"onerror=\"alert(1)) <img src=x onerror=alert(1)>"),
    ("text/markdown",
     "<a href=\"java&Tab;script:alert(1)\" onclick=x>a</a> <a href='&#x6A;avascript:x'>b</a> <svg/onload=x> <details open ontoggle=x>"),
    ("text/markdown",
     "<script>alert(1)</script>\n<style>*{}</style>\n<iframe src=x></iframe>\n\n```\"><script>\n</code></pre><script>\n```\n"),
    ("text/markdown",
     "[x]: data:text/html,<script> 'a\" onclick=b'\n\n[x] <javascript:alert(1)> <https://e\"onclick=x>\n\n| a | b |\n|-|-|\n| <b onclick=x> | |"),
    ("text/markdown",
     "</div></main></body><form action=//evil><input name=q></form><base href=//evil><meta http-equiv=refresh content=0>"),
    ("text/markdown", "# main\n\n# q\n\n<h2 id=main>x</h2><a id=q name=cookie>x</a>"),
    ("text/x-rst",
     ".. raw:: html\n\n   <script>alert(1)</script>\n\n`a <javascript:alert(1)>`_ `b <data:text/html,x>`__ |c|\n\n.. |c| image:: javascript:x\n"),
    ("text/x-rst",
     ".. include:: /etc/passwd\n\n.. csv-table::\n   :file: /etc/passwd\n\n.. image:: x\" onerror=\"alert(1)\n   :alt: a\"><b>\n   :target: javascript:x"),
    ("text/x-rst",
     "main\n====\n\n.. _q: javascript:alert(1)\n\nq_\n\n.. class:: x\" onclick=\"y\n\n.. role:: raw-html(raw)\n   :format: html\n\n:raw-html:`<script>`"),
    ("text/plain", "<script>alert(1)</script>"), ("text/html", "<script>alert(1)</script><b onclick=x>"),
    ("text/markdown; variant=\"><script>", "<b>x"), (None, "<script>x\n\n.. raw:: html\n\n  <b onclick=x>"),
    ("", "[x](javascript:x)\n# a")])
def test_a_description_runs_nothing(site, kind, text):
    name = "readme-%08x" % (hash((kind, text)) & 0xffffffff)
    fields = {"description": text} if kind is None else {"description": text, "description_content_type": kind}
    upload(site, "amy/plain", wheel(name, "1.0"), user="amy", fields=fields)
    found = page(site, "/amy/plain/%s/1.0" % name)
    before = page(site, "/amy/plain/plain/1.0")
    for tag in ("script", "style", "form", "input", "base", "iframe", "svg", "object", "embed", "img", "meta",
                "main"):
        assert len(found.of(tag)) == len(before.of(tag)), tag
    known = {"href", "title", "start", "align", "class", "id", "colspan", "rowspan", "open", "rel", "type", "name",
             "value", "for", "tabindex"}
    assert found.of("section", id="description")
    names = {name for tag, attributes in found.elements for name in attributes} - {name for _,
        attributes in before.elements for name in attributes}
    assert names <= known, names
    for link in found.links:
        assert urllib.parse.urlsplit(link).scheme in ("", "http", "https", "mailto")


def test_a_requirement_stays_a_text(site):
    texts = [text for line in TEXTS.values() for text in (
        "click (%s)" % line, "click; extra == '%s'" % line, line, "click @ javascript:" + line,
        "click>=1; python_version < '%s'" % line)]
    upload(site, "amy/plain", wheel("needy", "1.0"), user="amy", fields={"requires_dist": texts + ["plain>=0"]})
    found = page(site, "/amy/plain/needy/1.0")
    (section,) = re.findall(r'<section id="dependencies">(.*?)</section>', found.source, re.DOTALL)
    assert set(re.findall(r"<(\w+)", section)) == {"h2", "ul", "li", "a", "span", "details", "summary"}
    assert "/amy/plain/plain" in found.links and not [link for link in found.links if "script" in link]
    assert not page(site, "/amy/plain/needy/+why").of("b") and not page(site, "/amy/plain/click/+dependents",
        200).of("b")


@pytest.mark.parametrize("address", ["(" * 5000, "@" * 5000 + "<" * 100, "a@b, " * 3000, "<" * 5000 + "a@b>",
                                     "\"" * 5000, "Ada <ada@example.org>"])
def test_no_address_is_too_odd_for_a_page(site, address):
    upload(site, "amy/plain", wheel("odd-address", "1.0"), user="amy", fields={"author_email": address})
    found = page(site, "/amy/plain/odd-address/1.0")
    assert ("mailto:ada@example.org" in found.links) == address.startswith("Ada")


# -- values of the wrong kind


@pytest.mark.parametrize("value", WEIRD, ids=repr)
def test_results_of_any_form_have_a_page(site, value):
    name = "t%d" % WEIRD.index(value) if value is not True else "true"
    tested = wheel(name, "1.0")
    upload(site, "amy/plain", tested, user="amy")
    for result in (value, {"testenvs": value}, {"testenvs": [value]}, {"testenvs": {"e": value}},
                   {"testenvs": {"e": {"python": value, "setup": value, "test": value}}},
                   {"testenvs": {"e": {"python": {"version": value}, "setup": [value],
                                       "test": [value, {"command": value, "retcode": value, "output": value}]}},
                                       "host": value, "platform": value},
                   {"testenvs": {"e": {"test": [{"command": [value, [value]], "retcode": [value],
                                                 "output": [value]}]}},
                    "host": [value], "platform": {"a": value}}):
        reply = site.post(path_of(tested, "amy/plain"), json.dumps(result), user="amy",
                          headers={"Content-Type": "application/json"})
        assert reply.status in (200, 400), reply
    home = "/amy/plain/%s/1.0/+toxresults/%s" % (name, tested.filename)
    table = page(site, home)
    assert table.rows()
    for path in {link for link in table.links if link.startswith(home + "/")}:
        page(site, path)
    page(site, "/amy/plain/%s/1.0" % name)
    page(site, "/amy/plain")


@pytest.mark.parametrize("value", WEIRD, ids=repr)
def test_attestations_of_any_form_have_a_page(site, value):
    """Those that are refused, too: what they claim is never more than a text."""
    evil = TEXTS["tags"]
    for number, said in enumerate((value, [value], [{"version": value}], [{
            "version": 1, "verification_material": {"certificate": value, "transparency_entries": value},
            "envelope": {"statement": value, "signature": value}}], [{
            "version": 1, "verification_material": {"certificate": evil, "transparency_entries": [value,
                {evil: evil}]},
            "envelope": {"statement": evil, "signature": evil}}])):
        name = "attested-%d-%d" % (next(numbers), number)
        reply = site.upload("amy/plain", wheel(name, "1.0"), user="amy", fields={"attestations": json.dumps(said)})
        assert reply.status in (200, 400), reply
        found = page(site, "/amy/plain/%s/1.0" % name, status=reply.status if reply.status == 200 else 404)
        assert not found.of("img") and len(found.of("script")) == 1


@pytest.mark.parametrize("value", [0, -1, 1.5, True, [], {}, ["<b>"], {"a": ["<b>"]}, 10 ** 30], ids=repr)
def test_titles_of_any_kind_are_refused_or_shown(site, value):
    for path, keys in (("/amy", ("title", "description", "email", "own")), ("/amy/plain", ("title", "description",
        "custom_data", "mirror_whitelist"))):
        for key in keys:
            assert site.patch(path, {key: value}, user="amy").status in (200, 400)
    try:
        for path in ("/", "/amy", "/amy/plain", "/amy/plain?show=settings", "/amy/plain?show=inheritance",
                     "/amy/plain/plain/1.0"):
            assert not page(site, path, user="amy").of("b")
    finally:
        site.patch("/amy", {"title": "", "description": "", "email": "", "own": ""}, user="amy")
        site.patch("/amy/plain", {"title": "", "description": "", "custom_data": "", "mirror_whitelist": []},
                   user="amy")


# -- addresses

HOME = "/mal/dev0/evil/1.0"
FILE = "/evil-1.1-py3-none-any.whl"
ASKED = [       # a page with one of its parameters, the value last
    "/?after=", "/?all=", "/mal?after=", "/mal/dev0?q=", "/mal/dev0?after=", "/mal/dev0?sort=",
    "/mal/dev0?sort=-uploaded&after=",
    "/mal/dev0?show=", "/mal/dev0?show=names&after=", "/mal/dev0/evil?from=", "/mal/dev0/evil?pre=",
    "/mal/dev0/evil?yanked=",
    HOME + "?from=", HOME + "?python=", HOME + "?platform=", HOME + "?from=0&python=",
    "/mal/dev0/evil/1.1/+files" + FILE + "?number=",
    "/mal/dev0/evil/1.1/+files" + FILE + "?from=", HOME + "/+toxresults/evil-1.0-py3-none-any.whl?from=",
    "/mal/dev0/evil/+dependents?after=",
    "/mal/dev0/+compare/ben/dev0?after=", "/mal/dev0/+compare?with=", "/mal/dev0/evil/+diff/1.0...1.1?from=",
    HOME + "/+d/index.html?version=",
    "/+status?after=", "/+status?refresh=", "/+search?query=", "/+search?query=evil&page=",
    "/+search?query=evil&sort=", "/+search?q=",
    "/+help?q=", "/+login?next=", "/?x="]
PATHS = [       # the same with a part of the path
    "/{}", "/mal/{}", "/mal/dev0/{}", "/mal/dev0/evil/{}", "/mal/dev0/evil/1.1/+files/{}",
    "/mal/dev0/evil/1.1/+files" + FILE + "/{}",
    HOME + "/+toxresults/{}", HOME + "/+toxresults/evil-1.0-py3-none-any.whl/{}", "/mal/dev0/evil/+diff/{}",
    "/mal/dev0/evil/+diff/1.0...{}",
    "/mal/dev0/+compare/{}", "/mal/dev0/+compare/{}/dev0", HOME + "/+d/{}", HOME + "/+doc/{}", "/+help/{}", "/+{}",
    "/mal/dev0/evil/+{}",
    "/mal/dev0/{}/+why", "/mal/dev0/{}/+dependents", "/mal/dev0/{}/+feed.atom"]
VALUES = [
    "\"><script>alert(1)</script>", "' onclick=x ", "{0}{x.__class__}%s", "-1", "0", "00", "1e3",
    "99999999999999999999", "\u0661\u0662",
    "\U0001d7d8", "\r\nSet-Cookie: a=b", "\0", "..", ".", "../../etc/passwd", "//evil.example", "javascript:alert(1)",
    "%2e%2e%2f", " ", "",
    "w" * 8000, "(" * 3000, "*" * 3000, "\u202e\ufffe", "a&after=b&after=c&page=2&page=x", "latest", "\"" * 300]


def some_of(values, place):
    """A third of the values for each place, so that its neighbours have the others; all of them in a long run."""
    return values if SOAK else values[place % 3::3]


def asked_page(server, path, where):
    """A request for it, as it is, which must lead to a page of ours, an error or another address here."""
    reply = server.get(path, headers={"Accept": BROWSER})
    assert reply.status in (200, 302, 303, 400, 404, 414, 431), (where, reply)
    assert "Set-Cookie" not in reply.headers or where.startswith("/+login")
    if "Location" in reply.headers:
        assert reply.headers["Location"].startswith((server.url + "/",
                                                     "/")) and not reply.headers["Location"].startswith("//")
    elif b'id="main"' in reply.body:
        found = check_page(reply)
        assert len(found.of("script")) == 1 and not found.of("img") and not found.of("b", onclick="x")
        assert all(urllib.parse.urlsplit(link).scheme in ("", "http", "https", "mailto") for link in found.links)
        assert len(reply.body) < 100 << 10, (where, len(reply.body))


@pytest.mark.parametrize("start", ASKED)
def test_a_parameter_may_be_anything(site, start):
    for value in some_of(VALUES, ASKED.index(start)):
        asked_page(site, start + (value if value.startswith("a&") else urllib.parse.quote(value, safe="")), start)
    asked_page(site, start + "%ed%a0%80%ff%zz%", start)


@pytest.mark.parametrize("path", PATHS)
def test_a_part_of_a_path_may_be_anything(site, path):
    for value in some_of(VALUES, PATHS.index(path)):
        asked_page(site, path.format(urllib.parse.quote(value, safe="")), path)
        if "/" in value:
            asked_page(site, path.format(urllib.parse.quote(value)), path)
    for value in ("%ed%a0%80%ff", "%", "a%00b", "a/", "a//b", "%2f", "%5c..%5c", "a;b=c", "%3F"):
        asked_page(site, path.format(value), path)


def test_no_comparison_leads_to_itself(site):
    for value, status in (("", 400), ("/", 400), ("mal", 404), ("mal/none", 404), ("mal/dev0/x", 404),
                          ("%2e%2e/x", 404)):
        assert site.get("/mal/dev1/+compare?with=" + value, headers={"Accept": BROWSER}, follow=True).status == status
    reply = site.get("/mal/dev1/+compare?with=ben/dev0", headers={"Accept": BROWSER})
    assert reply.headers["Location"] == site.url + "/mal/dev1/+compare/ben/dev0"


# -- readers who may not read

# what only eve's secret index has: its title, a project, a version, a file, words of its texts
SECRETS = (b"lascaux", b"aurochs", b"77.7", b"painted", b"stalactite", b"torchlight", b"eve/secret", b"moonmilk")
CALLERS = ("nobody", "pat", "sam in a browser")


@pytest.fixture(scope="module")
def cave(tmp_path_factory):
    """eve/open builds on eve/half, which pat may read, and eve/secret, which only eve may: both have ochre; aurochs needs it."""
    server = Server(tmp_path_factory.mktemp("cave") / "server").start("--offline-mode")
    try:
        for name in ("eve", "pat", "sam"):
            server.add_user(name)
        server.add_index("eve/secret", bases=[], acl_pkg_read=["eve"], title="Lascaux", description="moonmilk")
        server.add_index("eve/half", bases=["eve/secret"], acl_pkg_read=["eve", "pat"])
        server.add_index("eve/open", bases=["eve/half", "eve/secret"])
        server.add_index("eve/other", bases=[])
        upload(server, "eve/open", wheel("ochre", "1.0", requires_dist=["aurochs", "calcite"]), user="eve")
        upload(server, "eve/other", wheel("ochre", "1.1"), user="eve")
        upload(server, "eve/half", wheel("calcite", "1.0", requires_dist=["ochre"]), user="eve")
        upload(server, "eve/secret", wheel("aurochs", "77.7", summary="painted by torchlight",
                                           requires_dist=["ochre"]),
               wheel("ochre", "77.7", summary="painted"), wheel("ochre", "0.9"), user="eve")
        upload_docs(server, "eve/secret", documentation("aurochs", "77.7", page="<h1>stalactite</h1>"), user="eve")
        assert server.push("eve/secret", "ochre", "0.9", user="eve", targetindex="eve/open").status == 200
        for archive in (wheel("aurochs", "77.7"), wheel("ochre", "0.9")):
            (link,) = links(server, "eve/secret/%s/%s" % (archive.name, archive.version), "releasefile", user="eve")
            assert server.post(below(server, link["href"]), {"testenvs": {"stalactite": {}}},
                               user="eve").status == 200
            server.get(below(server, link["href"]), user="eve")
        eventually(lambda: b"painted" in server.get("/+search?query=stalactite", headers={"Accept": BROWSER},
                                                    user="eve").body)
        browser = Browser(server)
        browser.log_in("sam")
        server.callers = {"nobody": {}, "pat": {"user": "pat"}, "sam in a browser": {"headers": {
            "Cookie": "; ".join("%s=%s" % pair for pair in browser.cookies.items())}}}
        yield server
    finally:
        server.kill()


def as_caller(server, caller, path, accept=BROWSER):
    options = dict(server.callers[caller])
    return server.get(path, headers=dict({"Accept": accept}, **options.pop("headers", {})), **options)


def routes():
    """Every path that GET has, with the audiences that it has."""
    import devpi_lite
    for (path, _), known in devpi_lite.ROUTES.items():
        if "GET" in known.choices and "+repl" not in path:
            yield path, {each.for_ for each in known.choices["GET"].routes}


def filled(path, index, project, version, filename):
    """The path of a route with these in its places; `rest` and further ones in some forms."""
    user, _, name = index.partition("/")
    path = path.replace("[/]", "").replace("{user}", user).replace("{index}", name).replace("{name}", name)
    path = path.replace("{project}", project).replace("{version}", version).replace("{other_user}/{other_index}",
        "eve/other")
    rests = ["index.html", filename, filename + "/METADATA", "0.9...1.0", "0.9...77.7",
             "search"] if "{rest}" in path else [""]
    return [path.replace("{rest}", rest).replace("{file}", "+f/abc/0123456789abc/" + filename).replace("{token}",
        "~a.b") for rest in rests]


@pytest.mark.parametrize("caller", CALLERS)
def test_what_one_may_not_read_is_named_nowhere(cave, caller):
    paths = [path for route, _ in routes() for index in ("eve/open", "eve/other", "eve") for project in ("ochre",
        "calcite")
             for version in ("0.9", "latest") for path in filled(route, index, project, version,
                 "ochre-0.9-py3-none-any.whl")
             if ("{index}" in route) == ("/" in index)]
    paths += ["/eve/%s/ochre/+%s" % (index, what) for index in ("open", "other") for what in ("why", "dependents",
        "downloads", "feed.atom")]
    paths += ["/+search?query=" + word for word in ("ochre", "auroch", "stalactit", "calcit", "requires:ochre",
                                                    "index:eve/secret", "user:eve", "77")]
    paths += ["/+suggest?q=auro", "/?all=1", "/eve/open?show=inheritance", "/eve/open?show=settings",
              "/eve/open/auroch", "/eve/open/ochrre",
              "/eve/open?q=au", "/eve/secrett", "/eve/secre/ochre", "/eve/other/+compare/eve/open", "/+status"]
    for path in dict.fromkeys(paths):
        for accept in (BROWSER, JSON) if "/+" in path else (BROWSER,):      # devpi's JSON of an index names its bases
            reply = as_caller(cave, caller, path, accept)
            assert reply.status < 500, (path, reply)
            body = urllib.parse.unquote_to_bytes(reply.body.lower().replace(path.lower().encode(), b""))
            for word in SECRETS:
                if word.decode() not in urllib.parse.unquote(path) and not (word == b"aurochs"
                    and is_said_by_ochre(body)):
                    assert word not in body, (path, word)


def is_said_by_ochre(body):
    """Whether aurochs is there as what ochre 1.0, that all may read, says that it needs."""
    return body.count(b"aurochs") == body.count(b">aurochs") + body.count(b'"aurochs"') + body.count(b" aurochs")


@pytest.mark.parametrize("caller", CALLERS)
def test_a_page_of_a_hidden_index_is_that_of_none(cave, caller):
    for path, audiences in routes():
        if "{index}" not in path or not audiences & {"browser", "form"}:
            continue
        for asked in filled(path, "eve/secret", "aurochs", "77.7", "aurochs-77.7-py3-none-any.whl"):
            replies = [as_caller(cave, caller, each) for each in (asked, asked.replace("/secret", "/nosuch"))]
            assert replies[0].status == replies[1].status and replies[0].status in (303, 404), asked
            if replies[0].status == 303:
                assert replies[0].headers["Location"].replace("secret", "nosuch") == replies[1].headers["Location"]
                continue
            there, absent = (Page(reply).main for reply in replies)
            assert there.replace("secret", "nosuch").split(" (")[0] == absent.split(" (")[0], asked
            assert all(word not in there.lower().encode() for word in SECRETS if word.decode() not in asked), asked
    assert cave.get("/eve/secret/aurochs/77.7", headers={"Accept": BROWSER}, user="eve").status == 200
    assert (as_caller(cave, caller, "/eve/half/calcite").status == 200) == ("pat" in caller)


def test_counts_leave_out_what_is_hidden(cave):
    for options, number in (({}, 1), ({"user": "pat"}, 2), ({"user": "eve"}, 3)):
        reply = cave.get("/+search?query=ochre", **options)
        assert reply.result["total"] == 2 + (number == 3), reply
        dependents = cave.get("/eve/open/ochre/+dependents", **options).result
        assert dependents["total"] == len(dependents["dependents"]) == number - 1
        shown = page(cave, "/eve/open/ochre", **options)
        assert ("calcite 1.0" in shown.text) == (number > 1) and ("aurochs 77.7" in shown.text) == (number > 2)
        assert ("pushed" in page(cave, "/eve/open/ochre/0.9").text) and ("from eve/secret" in page(cave,
            "/eve/open/ochre/0.9", **options).text) == (number > 2)


# -- kept pages


def test_a_kept_page_ends_with_the_permission_to_read_it(cave):
    """Each page is asked for until it comes from the cache; then what it may say changes."""
    cave.add_index("eve/turns", bases=[])
    upload(cave, "eve/turns", wheel("needs", "1.0", requires_dist=["turned"]), wheel("turned", "55.66"), user="eve")
    cave.add_index("eve/built", bases=["eve/turns"])
    upload(cave, "eve/built", wheel("turned", "1.0", requires_dist=["needs"]), user="eve")
    cave.push("eve/turns", "turned", "55.66", user="eve", targetindex="eve/other")
    paths = ("/eve/built/turned", "/eve/built/turned/1.0", "/eve/other/turned", "/eve/other/turned/55.66",
             "/eve/turns", "/eve/turns/needs/1.0", "/", "/eve")

    def bodies(**options):
        return {path: cave.get(path, headers={"Accept": BROWSER}, **options).body for path in paths}

    eventually(lambda: cave.get("/eve/other/turned/+dependents").result["total"] == 1)
    for _ in range(3):
        before = bodies()
        assert bodies(user="sam").keys() == before.keys()
    naming = [path for path, body in before.items() if b"eve/turns" in body]
    assert len(naming) == len(paths) - 1 and "/eve/other/turned/55.66" in naming
    assert cave.patch("/eve/turns", {"acl_pkg_read": ["eve"]}, user="eve").status == 200
    for options in ({}, {"user": "sam"}):
        for path, body in bodies(**options).items():
            assert b"eve/turns" not in body or path.startswith("/eve/turns"), path
            assert b"55.66" not in body or "built" not in path, path
    assert [path for path, body in bodies(user="eve").items() if b"eve/turns" in body] == naming
    assert all(b"eve/turns" not in body or path.startswith("/eve/turns") for path, body in bodies().items())

    assert cave.patch("/eve/turns", {"acl_pkg_read": [":ANONYMOUS:"]}, user="eve").status == 200
    assert [path for _ in range(3) for path, body in bodies().items() if b"eve/turns" in body] == 3 * naming
    assert cave.delete("/eve/turns", user="eve").status in (200, 201)
    cave.add_index("eve/turns", bases=[], acl_pkg_read=["eve"], title="anew")
    for path, body in bodies().items():
        assert (b"eve/turns" not in body or path.startswith("/eve/turns")) and b"anew" not in body, path


def test_a_kept_page_is_for_the_one_who_asked(cave):
    """The same page for several users, by password, token and log-in: each gets their own, also after the end of these."""
    cave.add_user("una")
    cave.add_index("una/own", bases=[], acl_pkg_read=["una"], title="Unas things")
    upload(cave, "una/own", wheel("mine", "1.0"), user="una")

    def seen(**options):
        return b"mine" in cave.get("/una/own", headers={"Accept": BROWSER}, **options).body

    basic = {"user": "una", "password": "pw"}
    browser = Browser(cave)
    browser.log_in("una")
    assert all(seen(**basic) and seen(user="una") and not seen() and not seen(user="sam") and not seen(user="una",
        password="no")
               for _ in range(3))
    assert all("mine" in browser.get("/una/own").text for _ in range(3))
    cookie = "; ".join("%s=%s" % pair for pair in browser.cookies.items())
    assert all(b"mine" in cave.get("/una/own", headers={"Accept": BROWSER, "Cookie": cookie}).body for _ in range(2))
    browser.submit(browser.get("/una/own").form("/+logout"))
    assert b"mine" not in cave.get("/una/own", headers={"Accept": BROWSER, "Cookie": cookie}).body
    assert cave.patch("/una", {"password": "new"}, user="una").status == 200
    assert not seen(**basic) and not seen(user="una")
    assert seen(user="una", password="new")


# -- requests that no browser sends

PAGES = ["/", "/mal", "/mal/dev0", "/mal/dev0?show=settings", "/mal/dev0/evil", HOME,
         HOME + "/+toxresults/evil-1.0-py3-none-any.whl",
         HOME + "/+files/evil-1.0-py3-none-any.whl", HOME + "/+files/evil-1.0-py3-none-any.whl/evil/__init__.py",
         HOME + "/+d/index.html",
         "/mal/dev0/evil/+diff/1.0...1.1", "/mal/dev0/evil/+why", "/mal/dev0/evil/+dependents",
         "/mal/dev0/+compare/ben/dev0",
         "/+search?query=lantern", "/+search", "/+help", "/+help/search", "/+login"]


@pytest.mark.parametrize("path", PAGES)
def test_a_page_keeps_to_http(site, path):
    plain = {"Accept": BROWSER}
    reply = site.get(path, headers=plain)
    head = site.request("HEAD", path, headers=plain)
    assert head.status == reply.status == 200 and not head.body
    assert head.headers["Content-Length"] == str(len(reply.body)) and head.headers["Content-Type"] == reply.headers["Content-Type"]
    for refused in ("identity", "gzip;q=0", "*;q=0", "br, deflate", "x" * 3000):
        assert "Content-Encoding" not in site.get(path, headers={**plain, "Accept-Encoding": refused}).headers
    for ranges in ("bytes=0-9", "bytes=-5", "bytes=9-1", "bytes=" + ",".join(["0-1"] * 500), "lines=1"):
        assert site.get(path, headers={**plain, "Range": ranges}).status == 200
    for odd in ('"', "W/", ",,,", '"' * 5000, "\xff", '"x", *x'):
        assert site.get(path, headers={**plain, "If-None-Match": odd}).status == 200
    if path != "/+login":
        again = site.get(path, headers={**plain, "If-None-Match": 'W/"x", ' + reply.headers["ETag"]})
        assert again.status == 304 and not again.body
    for method in ("POST", "PUT", "DELETE", "PATCH", "PUSH", "X" * 50):
        assert site.request(method, path, body=b"x", headers=plain).status in (400, 401, 403, 404, 405, 409, 411, 413,
            415, 501)


def test_slow_readers_do_not_hold_up_others(site):
    """30 readers that stop within a large page; others still get theirs at once."""
    upload(site, "amy/plain", wheel("large", "1.0", extra_members={"a.txt": b"<" * 400_000}), user="amy")
    request = b"GET /amy/plain/large/1.0/+files/large-1.0-py3-none-any.whl/a.txt HTTP/1.1\r\nHost: x\r\nAccept: text/html\r\n\r\n"
    held = [site.connect() for _ in range(30)]
    try:
        for connection in held:
            connection.sendall(request)
        time.sleep(0.3)
        began = time.monotonic()
        for path in PAGES:
            assert site.get(path, headers={"Accept": BROWSER}).status == 200
        assert time.monotonic() - began < 10
    finally:
        for connection in held:
            connection.close()


def test_pages_of_what_vanishes_meanwhile(site):
    """Pages of a project while its releases, its index and its files come and go: there or not there, never an error."""
    paths = ["/amy/busy", "/amy/busy/thing", "/amy/busy/thing/1.0", "/amy/busy/thing/latest",
             "/amy/busy/thing/1.0/+files/thing-1.0-py3-none-any.whl",
             "/amy/busy/thing/1.0/+files/thing-1.0-py3-none-any.whl/thing/__init__.py",
             "/amy/busy/thing/+diff/1.0...1.1",
             "/amy/busy/thing/1.0/+toxresults/thing-1.0-py3-none-any.whl", "/amy/busy/thing/+why",
             "/amy/busy/thing/+dependents",
             "/amy/busy/+compare/mal/dev0", "/amy/busy/thing/1.0/+d/index.html",
             "/amy/busy/thing/1.0/+doc/index.html", "/amy", "/",
             "/+search?query=thing", "/amy/busy/+feed.atom", "/amy/busy?sort=-uploaded", "/amy/busy?show=settings"]
    statuses, stop = set(), threading.Event()

    def read(number):
        for path in itertools.islice(itertools.cycle(paths), number, None):
            if stop.is_set():
                return
            reply = site.get(path, headers={"Accept": BROWSER})
            statuses.add(reply.status)
            if reply.status >= 500:
                statuses.add((path, reply.body[:2000]))

    readers = [threading.Thread(target=read, args=(number,)) for number in range(12)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(6):
            site.add_index("amy/busy", bases=[])
            for version in ("1.0", "1.1"):
                upload(site, "amy/busy", wheel("thing", version, requires_dist=["thing"]), user="amy")
            upload_docs(site, "amy/busy", documentation("thing", "1.0"), user="amy")
            site.post(path_of(wheel("thing", "1.0", requires_dist=["thing"]), "amy/busy"), {"testenvs": {"e": {}}},
                      user="amy")
            time.sleep(0.05)
            site.delete("/amy/busy/thing/1.0", user="amy")
            site.delete("/amy/busy/thing", user="amy")
            site.delete("/amy/busy", user="amy")
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert statuses <= {200, 302, 404, 410}, statuses


def test_damaged_and_missing_files_have_pages(site):
    tested = wheel("broken", "1.0", extra_members={"a.txt": b"a\n" * 20000})
    upload(site, "amy/plain", tested, wheel("broken", "1.1"), user="amy")
    upload_docs(site, "amy/plain", documentation("broken", "1.0"), user="amy")
    assert site.post(path_of(tested, "amy/plain"),
                     {"testenvs": {"e": {"test": [{"command": "c", "retcode": 0, "output": "o"}]}}},
                     user="amy").status == 200
    home = "/amy/plain/broken/1.0"
    paths = [home, "/amy/plain/broken", "/amy/plain", home + "/+files/" + tested.filename,
             home + "/+files/%s/a.txt" % tested.filename,
             "/amy/plain/broken/+diff/1.0...1.1", home + "/+toxresults/" + tested.filename, home + "/+d/index.html"]
    paths += [link for link in page(site, paths[-2]).links if "toxresult-" in link]
    digests = [each["hashes"]["sha256"] for each in links(site, home.strip("/"))]
    stored = [each for digest in digests for each in (site.directory / "files").rglob(digest)]
    assert len(stored) == 3
    for spoil in (lambda path: path.write_bytes(b"PK" + os.urandom(path.stat().st_size - 2)),
                  lambda path: path.write_bytes(b""), os.unlink):
        for file in stored:
            file.chmod(stat.S_IRUSR | stat.S_IWUSR)
            spoil(file)
        for path in paths:
            reply = site.get(path, headers={"Accept": BROWSER, "X-Try": str(spoil)[-20:-1]})
            assert reply.status in (200, 400, 404, 500, 503) and b"request id" not in reply.body, (path, reply)
            check_page(reply)


# -- other ways to serve them


def small_site(server):
    """ann/dev and ann/below with releases, documentation and a test result; returns the pages that a crawl finds."""
    server.add_user("ann")
    server.add_index("ann/dev", bases=[])
    server.add_index("ann/below", bases=["ann/dev"])
    upload(server, "ann/dev", wheel("demo", "1.0", requires_dist=["other"]), sdist("demo", "1.1"),
           wheel("other", "1.0"))
    upload_docs(server, "ann/dev", documentation("demo", "1.0"))
    assert server.post(path_of(wheel("demo", "1.0", requires_dist=["other"]), "ann/dev"), {"testenvs": {"e": {}}},
                       user="ann").status == 200


def own_pages(server, **options):
    """The framed pages that a crawl from the front page reaches, the manual left out."""
    return sorted(path for path, found in crawl(server, **options).items() if found and not path.startswith("/+"))


def test_a_replica_and_a_read_only_copy_serve_the_same_pages(tmp_path):
    primary = primary_at(tmp_path / "primary").start()
    replica = replica_at(tmp_path / "replica", primary)
    copy = Server(tmp_path / "copy", root_password=None, script=patched(tmp_path,
        "devpi_lite.is_read_only = lambda path: True"))
    try:
        small_site(primary)
        replica.start()
        in_sync(primary, replica)
        expected = own_pages(primary)
        assert len(expected) > 20
        assert own_pages(replica) == expected
        primary.stop()
        assert own_pages(replica) == expected
        shutil.copytree(primary.directory, copy.directory)
        copy.start()
        assert own_pages(copy) == expected and copy.get("/+status").result["read-only"]
    finally:
        for server in (replica, primary, copy):
            if server.running:
                server.kill()


def test_all_links_stay_below_an_outside_url(make_server):
    server = make_server("--outside-url", "https://outside.example/deep/er")
    small_site(server)
    waiting, seen = ["/"], set()
    while waiting:
        path = waiting.pop()
        if path in seen or path.startswith("/+help/"):
            continue
        seen.add(path)
        reply = server.get(path, headers={"Accept": BROWSER})
        assert reply.status in (200, 302, 303), (path, reply)
        found = [reply.headers["Location"]] if reply.status != 200 else []
        if b'id="main"' in reply.body:
            shown = check_page(reply)
            found = [attributes[name] for tag, attributes in shown.elements for name in ("href", "src")
                     if attributes.get(name) and tag != "link"] + [each["href"] for each in shown.of("link")
                         if each["rel"] != "icon"]
            assert all(form["action"].startswith("/deep/er/") for form in shown.of("form") if "action" in form)
            assert "127.0.0.1" not in shown.text and "/ann/dev/+simple/" not in shown.text.replace("https://outside.example/deep/er/", "")
        elif "xml" in reply.headers["Content-Type"]:
            found = re.findall(r"https?://[^\"<?]+", reply.text.replace("http://www.w3.org/2005/Atom",
                "").replace("http://a9.com/-/spec/opensearch/1.1/", ""))
            assert all(url.startswith("https://outside.example/deep/er/") for url in found)
        for link in found:
            url = urllib.parse.urljoin("https://outside.example/deep/er" + path, link.partition("#")[0])
            if url.startswith("https://outside.example/"):
                assert url.startswith("https://outside.example/deep/er/"), (path, link)
                below_it = url[len("https://outside.example/deep/er"):]
                if not below_it.startswith("/+login"):
                    waiting.append(below_it)
    assert len(seen) > 40


# -- weight and time


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Long lists of everything that a page may list."""
    server = Server(tmp_path_factory.mktemp("full") / "server").start("--offline-mode")
    try:
        fill_up(server)
        yield server
    finally:
        server.kill()


def fill_up(server):
    for name in ["zoe"] + ["u%02d" % number for number in range(40)]:
        assert server.put("/" + name, {"password": "pw"}).status == 201
    server.login("root")
    server.passwords["zoe"] = "pw"
    for number in range(260):
        owner = "zoe" if number < 140 else "u%02d" % (number % 40)
        assert server.put("/%s/i%03d" % (owner, number), {"bases": [], "title": "t" * 5000},
                          user="root").status == 200
    server.add_index("zoe/all", bases=["zoe/i%03d" % number for number in range(50)],
                     mirror_whitelist=["p%d" % number for number in range(1500)],
                     acl_upload=["zoe"] + [":group%d" % number for number in range(500)], description="d" * 50000)
    many = wheel("wide", "1.0")
    for number in range(130):
        upload(server, "zoe/all", wheel("wide", "1.0", tag="cp3%d-cp3%d-manylinux_2_%d_x86_64" % (number % 10,
            number % 10, number // 10)))
    upload(server, "zoe/all", many)
    for number in range(60):
        result = {"host": "h" * 5000, "testenvs": {"e%03d" % each: {"test": [{"command": "c" * 2000, "retcode": 1,
            "output": "o" * 900}] * 3}
                                                  for each in range(5 if number else 150)}}
        assert server.post(path_of(many, "zoe/all"), result, user="zoe").status == 200
    lines = ["line %d <&>" % number for number in range(1200)]
    upload(server, "zoe/all", wheel("wordy", "1.0", extra_members={"a%03d/LICENSE" % number: b"\n"
        for number in range(500)}), fields={
        "classifiers": lines, "requires_dist": ["dep%d>=1; extra == 'x%d'" % (number, number)
                                                for number in range(1000)],
        "project_urls": ["l%d, https://x.example/%d/%s" % (number, number, "x" * 300) for number in range(500)],
        "license_file": lines,
        "keywords": "k " * 50000, "author": "a" * 50000, "summary": "s" * 50000, "odd_field": "o" * 50000,
        "requires_python": ">=3" + ".0" * 20000})
    upload(server, "zoe/all", wheel("wordy", "1.1", extra_members={"lines.txt": b"\n" * 500000}))
    for number in range(130):
        reply = server.post_form("zoe/i001", {":action": "submit", "name": "many", "version": "1.%d" % number})
        assert reply.status == 200


WEIGHED = ["/", "/zoe", "/zoe?after=i050", "/zoe/all", "/zoe/all?show=settings", "/zoe/all?show=inheritance",
           "/zoe/all/wide", "/zoe/all/wide/1.0",
           "/zoe/all/wide/1.0?from=40", "/zoe/all/wide/1.0?python=3.3",
           "/zoe/all/wide/1.0/+toxresults/wide-1.0-py3-none-any.whl", "/zoe/all/wordy",
           "/zoe/all/wordy/1.0", "/zoe/all/wordy/1.0/+files/wordy-1.0-py3-none-any.whl", "/zoe/i001/many",
           "/zoe/i001/many?from=100",
           "/zoe/i001/+compare/zoe/all", "/zoe/all/+compare/zoe/i001", "/zoe/all/wide/+why", "/+status",
           "/+search?query=wide"]


@pytest.mark.parametrize("path", WEIGHED)
def test_a_page_is_light(full, path):
    found = page(full, path)
    assert len(found.source.encode()) <= (120 if "wordy/1.0" in path else 60) << 10, len(found.source)
    zipped_size = len(full.get(path, headers={"Accept": BROWSER, "Accept-Encoding": "gzip"}).body)
    assert zipped_size <= 15 << 10, zipped_size
    before = worked(full)
    for number in range(5):
        full.get(path, headers={"Accept": BROWSER, "X-Number": str(number)})
    assert worked(full) - before < 5 * 0.15, "too slow"


def test_pages_lead_through_all_of_a_long_list(full):
    def all_rows(path, rows):
        found = []
        while path:
            shown = page(full, path)
            found += rows(shown)
            path = next((each["href"] for each in shown.of("a", rel="next")), None)
        return found

    assert len(set(all_rows("/zoe", lambda shown: [row[0] for row in shown.rows()]))) == 141
    users = all_rows("/", lambda shown: [text for text in shown.headings if re.fullmatch(r"zoe|u\d\d|root", text)])
    assert users == ["u%02d" % number for number in range(40)] + ["zoe"]
    files = all_rows("/zoe/all/wide/1.0", lambda shown: [text for _, text in shown.with_text("h3")])
    assert len(set(files)) == len(files) == 131
    results = "/zoe/all/wide/1.0/+toxresults/wide-1.0-py3-none-any.whl"
    paths = all_rows(results, lambda shown: [link for link in dict.fromkeys(shown.links)
                                             if link.startswith(results + "/")])
    assert len(set(paths)) == len(paths) == 60
    whole = page(full, paths[-1])
    assert "There may be more in the result" in whole.text and len(whole.source) < 900 << 10
    assert len(all_rows("/zoe/i001/many", lambda shown: shown.rows())) == 130


def test_a_file_of_many_lines_is_cut(full):
    found = page(full, "/zoe/all/wordy/1.1/+files/wordy-1.1-py3-none-any.whl/lines.txt")
    assert "500,000 lines" in found.text and "Only the beginning is shown" in found.text and len(found.source) < 1 << 20


def test_an_excerpt_costs_little_however_often_a_word_stands_there(full):
    upload(full, "zoe/i002", wheel("echo", "1.0", summary="echo"), fields={
        "description": "echo " * 12000 + "cave " + "echo " * 500, "description_content_type": "text/plain"})
    eventually(lambda: full.get("/+search?query=echo").result["total"] == 1)
    before = worked(full)
    found = page(full, "/+search?query=echo+cave")
    assert [text for _, text in found.with_text("mark")].count("cave") == 1
    assert page(full, "/+search?query=e*+ec*+ech*+echo+cave*+ca*").of("mark")
    assert worked(full) - before < 3


# -- other servers


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory):
    """A server that may ask upstream."""
    server = Server(tmp_path_factory.mktemp("mirrors") / "server").start()
    server.add_user("mia")
    yield server
    server.kill()


def test_what_upstream_says_stays_a_text(mirrors, scripted):
    evil = TEXTS["tags"]
    metadata = ("Metadata-Version: 2.1\nName: evil\nVersion: %%s\nSummary: %s\nAuthor-email: %s\nProject-URL: x, javascript:alert(1)\n"
                "Requires-Dist: a; extra == '%s'\nX-%s: %s\n\n%s" % ((evil,) * 6)).replace("%%", "%")
    wheels = [wheel("evil", version, metadata=metadata.replace("%s", version).encode()) for version in ("1.0", "1.1")]
    for archive in wheels:
        scripted.answers["/files/" + archive.filename] = archive.content
        scripted.answers["/files/" + archive.filename + ".metadata"] = archive.metadata
    scripted.answers["/files/evil-2.0<script>.tar.gz"] = b"x"
    scripted.page("evil", *[
        entry(archive.filename, hashes={"sha256": archive.sha256}, yanked=evil, size=len(archive.content), **{
            "requires-python": evil, "upload-time": evil, "core-metadata": True, "provenance": "javascript:" + evil})
            for archive in wheels],
        entry("evil-2.0<script>.tar.gz", hashes={"sha256": hashlib.sha256(b"x").hexdigest()}),
        entry("../evil-3.tar.gz"), entry("evil-4.tar.gz", url="javascript:alert(1)"),
        versions=["1.0", "1.1", evil, "3<b>{0}"], alternate_locations=[evil], **{"project-status": {"status": evil,
            "reason": evil}})
    scripted.answers["/simple/"] = {"meta": {"api-version": "1.0"}, "projects": [{"name": evil}, {"name": "evil"},
        {"name": "<script>"}]}
    mirrors.add_index("mia/mirror", type="mirror", mirror_url=scripted.url, mirror_web_url_fmt="javascript:{name}",
                      title=evil)
    mirrors.add_index("mia/above", bases=["mia/mirror"])
    mirrors.get("/mia/mirror/+simple/")
    for path in ("/mia/mirror/evil", "/mia/above/evil/1.0"):
        page(mirrors, path)
    mirrors.post("/mia/mirror/evil/1.0/+description", headers={"Accept": BROWSER})
    mirrors.fetch("mia/mirror", wheels[1].filename, "evil")
    seen = crawl(mirrors, "/mia/above/evil/1.0", most=60)
    assert "lantern </title>" in seen["/mia/above/evil/1.0"].main
    for path, found in seen.items():
        if found:
            assert len(found.of("script")) == 1 and not found.of("img") and not [link for link in found.links
                if "javascript" in link[:20]], path


WRONG = [None, 1, True, [], {}, ["<b>"], {"<b>": 1}, "<b>x</b>\n", 1e300, "\ud800"]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_json_of_upstream_may_be_of_any_kind(mirrors, scripted, number):
    wrong, index = WRONG[number], "mia/odd%d" % number
    scripted.answers["/simple/"] = {"meta": wrong, "projects": [wrong, {"name": wrong}]}
    good = wheel("p0", "1.0")
    scripted.page("p0", entry(good.filename, hashes={"sha256": good.sha256}, **{key: wrong for key in (
        "requires-python", "yanked", "size", "upload-time", "core-metadata", "provenance", "gpg-sig")}),
        versions=wrong, **{"project-status": wrong})
    scripted.answers["/simple/p1/"] = {"meta": {"api-version": "1.0"}, "name": wrong, "files": wrong}
    scripted.answers["/simple/p2/"] = {"meta": wrong, "name": "p2", "files": [wrong, {"filename": wrong, "url": wrong,
        "hashes": wrong}]}
    scripted.answers["/simple/p3/"] = [wrong]
    scripted.page("p4", entry("p4-1.0-py3-none-any.whl", hashes={"sha256": wrong, "md5": wrong}),
                  **{"project-status": {"status": wrong, "reason": wrong}})
    mirrors.add_index(index, type="mirror", mirror_url=scripted.url)
    mirrors.get("/%s/+simple/" % index)
    for project in ("p0", "p1", "p2", "p3", "p4"):
        for path in ("", "/1.0", "/+why", "/+dependents", "/+diff/1.0...1.0",
                     "/1.0/+files/%s-1.0-py3-none-any.whl" % project):
            reply = mirrors.get("/%s/%s%s" % (index, project, path), headers={"Accept": BROWSER})
            assert reply.status in (200, 404, 502, 503) and not check_page(reply).of("b"), (path, reply)
    for path in ("", "?show=names", "?q=p"):
        page(mirrors, "/" + index + path)
