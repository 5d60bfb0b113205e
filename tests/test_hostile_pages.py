"""Web pages under attack: texts that want to be markup, readers who may not read, requests that no browser sends."""

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
import zipfile

import pytest

from archives import Archive, around, zipped
from browser import Browser
from harness import (
    BROWSER, JSON, Server, documentation, eventually, links, path_of, sdist, upload, upload_docs, wheel, worked)
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
SCHEMES = ["javascript:alert(1)", "JaVaScRiPt:alert(1)", " javascript:alert(1)", "java\tscript:alert(1)", "java\nscript:alert(1)",
           "javascript&colon;alert(1)", "&#106;avascript:alert(1)", "\x01javascript:alert(1)", "vbscript:x",
           "data:text/html,<script>alert(1)</script>", "//evil.example/x", "http://", "file:///etc/passwd"]
MEMBERS = ["<script>.py", "a\"b'c`>", "x\ny", "{0}{x.__class__}", "%2e%2e/%00", "?q=1", "#frag", "a?b#c", "\u202egnp.exe", "&amp;", " ",
           "\x1b[31m", "javascript:alert(1)", "w" * 3000, "\ufffe", "a//b", "a/./b", "-", "\xe9"]


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
        assert server.patch("/" + user, {"title": lines, "description": lines, "email": "a@" + line, "x-own": lines}, user=user).status == 200
        server.add_index(index, bases=[], title=lines, description=lines, custom_data=lines)
        fields = {field: lines for field in (
            "summary", "author", "license", "home_page", "maintainer", "maintainer_email", "description", "platform", "download_url",
            "unknown_field", "license_expression", "keywords", "requires_python", "provides_extra", "requires_external", "dynamic",
            "supported_platform", "import_name", "license_file", "classifiers", "obsoletes_dist")}
        fields.update(
            author_email=lines, description_content_type="text/plain; x=" + line,
            project_urls=[write("%s, %s" % (text, url)) for url in SCHEMES] + [write(url) for url in SCHEMES])
        contents = lines.encode()
        for version in ("1.0", "1.1"):
            files = {name: contents + version.encode() for name in MEMBERS}
            upload(server, index, wheel("evil", version, extra_members=files), fields=fields)
        egg = around("evil-1.0-py2.7.egg", contents, "evil", "1.0")
        for filename in ("evil-1.0'{0}&amp;.zip", "evil-1.0.win32 <b>.exe"):
            upload(server, index, Archive(filename, egg, "evil", "1.0", b"", {"name": "evil", "version": "1.0", "filetype": "sdist"}))
        docs = io.BytesIO(zipped(("index.html", "<title>%s</title><p>%s" % (line, line)), ("more<b>.html", "<title></title>" + line)))
        upload_docs(server, index, Archive("evil-1.0.doc.zip", docs.getvalue(), "evil", "1.0", b"", {}))
        assert server.patch("/%s/evil/1.0" % index, {"yanked": line}, user=user).status == 200
        assert server.patch("/%s/evil" % index, {"project-status": {"status": "deprecated", "reason": line}}, user=user).status == 200
        result = {"host": lines, "platform": lines, "testenvs": {lines: {
            "python": {"version": line}, "setup": [{"command": [lines], "retcode": line, "output": lines}],
            "test": [{"command": lines, "retcode": 1, "output": lines}]}}}
        tested = [link["href"] for link in links(server, index + "/evil/1.0", "releasefile") if link["href"].endswith(".whl")]
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
    parts = ("show=settings", "/evil/+why", "/+files/", "/+toxresults/", "/evil/+diff/1.0...1.1", "toxresult-", "/+d/index.html")
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


@pytest.mark.parametrize("field, urls", [("project_urls", ["Home, " + url for url in SCHEMES]), ("home_page", SCHEMES[:1]),
                                         ("download_url", SCHEMES[:1])])
def test_only_web_and_mail_addresses_are_links(site, field, urls):
    upload(site, "amy/plain", wheel("linked-" + field, "1.0"), user="amy", fields={field: urls + [
        "Good, https://good.example/?a=1&b=\"2\"", "Odd, https://odd.example/\" onmouseover=\"alert(1)"] if field == "project_urls" else urls})
    found = page(site, "/amy/plain/linked-%s/1.0" % field.replace("_", "-"))
    outside = {link for link in found.links if not link.startswith(("/", "#"))}
    assert outside == ({"https://good.example/?a=1&b=%222%22", "https://odd.example/%22%20onmouseover=%22alert(1)"}
                       if field == "project_urls" else set())


@pytest.mark.parametrize("kind, text", [
    ("text/markdown", "[a](javascript:alert(1)) [b](java&#10;script:alert(1)) [c](<java\nscript:x>) ![d](x\"onerror=\"alert(1)) <img src=x onerror=alert(1)>"),
    ("text/markdown", "<a href=\"java&Tab;script:alert(1)\" onclick=x>a</a> <a href='&#x6A;avascript:x'>b</a> <svg/onload=x> <details open ontoggle=x>"),
    ("text/markdown", "<script>alert(1)</script>\n<style>*{}</style>\n<iframe src=x></iframe>\n\n```\"><script>\n</code></pre><script>\n```\n"),
    ("text/markdown", "[x]: data:text/html,<script> 'a\" onclick=b'\n\n[x] <javascript:alert(1)> <https://e\"onclick=x>\n\n| a | b |\n|-|-|\n| <b onclick=x> | |"),
    ("text/markdown", "</div></main></body><form action=//evil><input name=q></form><base href=//evil><meta http-equiv=refresh content=0>"),
    ("text/markdown", "# main\n\n# q\n\n<h2 id=main>x</h2><a id=q name=cookie>x</a>"),
    ("text/x-rst", ".. raw:: html\n\n   <script>alert(1)</script>\n\n`a <javascript:alert(1)>`_ `b <data:text/html,x>`__ |c|\n\n.. |c| image:: javascript:x\n"),
    ("text/x-rst", ".. include:: /etc/passwd\n\n.. csv-table::\n   :file: /etc/passwd\n\n.. image:: x\" onerror=\"alert(1)\n   :alt: a\"><b>\n   :target: javascript:x"),
    ("text/x-rst", "main\n====\n\n.. _q: javascript:alert(1)\n\nq_\n\n.. class:: x\" onclick=\"y\n\n.. role:: raw-html(raw)\n   :format: html\n\n:raw-html:`<script>`"),
    ("text/plain", "<script>alert(1)</script>"), ("text/html", "<script>alert(1)</script><b onclick=x>"),
    ("text/markdown; variant=\"><script>", "<b>x"), (None, "<script>x\n\n.. raw:: html\n\n  <b onclick=x>"), ("", "[x](javascript:x)\n# a")])
def test_a_description_runs_nothing(site, kind, text):
    name = "readme-%08x" % (hash((kind, text)) & 0xffffffff)
    fields = {"description": text} if kind is None else {"description": text, "description_content_type": kind}
    upload(site, "amy/plain", wheel(name, "1.0"), user="amy", fields=fields)
    found = page(site, "/amy/plain/%s/1.0" % name)
    before = page(site, "/amy/plain/plain/1.0")
    for tag in ("script", "style", "form", "input", "base", "iframe", "svg", "object", "embed", "img", "meta", "main"):
        assert len(found.of(tag)) == len(before.of(tag)), tag
    known = {"href", "title", "start", "align", "class", "id", "colspan", "rowspan", "open", "rel", "type", "name", "value", "for", "tabindex"}
    assert found.of("section", id="description")
    names = {name for tag, attributes in found.elements for name in attributes} - {name for _, attributes in before.elements for name in attributes}
    assert names <= known, names
    for link in found.links:
        assert urllib.parse.urlsplit(link).scheme in ("", "http", "https", "mailto")


def test_a_requirement_stays_a_text(site):
    texts = [text for line in TEXTS.values() for text in (
        "click (%s)" % line, "click; extra == '%s'" % line, line, "click @ javascript:" + line, "click>=1; python_version < '%s'" % line)]
    upload(site, "amy/plain", wheel("needy", "1.0"), user="amy", fields={"requires_dist": texts + ["plain>=0"]})
    found = page(site, "/amy/plain/needy/1.0")
    (section,) = re.findall(r'<section id="dependencies">(.*?)</section>', found.source, re.DOTALL)
    assert set(re.findall(r"<(\w+)", section)) == {"h2", "ul", "li", "a", "span", "details", "summary"}
    assert "/amy/plain/plain" in found.links and not [link for link in found.links if "script" in link]
    assert not page(site, "/amy/plain/needy/+why").of("b") and not page(site, "/amy/plain/click/+dependents", 200).of("b")


@pytest.mark.parametrize("address", ["(" * 5000, "@" * 5000 + "<" * 100, "a@b, " * 3000, "<" * 5000 + "a@b>", "\"" * 5000, "Ada <ada@example.org>"])
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
                                       "test": [value, {"command": value, "retcode": value, "output": value}]}}, "host": value, "platform": value},
                   {"testenvs": {"e": {"test": [{"command": [value, [value]], "retcode": [value], "output": [value]}]}},
                    "host": [value], "platform": {"a": value}}):
        reply = site.post(path_of(tested, "amy/plain"), json.dumps(result), user="amy", headers={"Content-Type": "application/json"})
        assert reply.status in (200, 400), reply
    home = "/amy/plain/%s/1.0/+toxresults/%s" % (name, tested.filename)
    table = page(site, home)
    assert table.rows()
    for path in {link for link in table.links if link.startswith(home + "/")}:
        page(site, path)
    page(site, "/amy/plain/%s/1.0" % name)
    page(site, "/amy/plain")


@pytest.mark.parametrize("value", [0, -1, 1.5, True, [], {}, ["<b>"], {"a": ["<b>"]}, 10 ** 30], ids=repr)
def test_titles_of_any_kind_are_refused_or_shown(site, value):
    for path, keys in (("/amy", ("title", "description", "email", "own")), ("/amy/plain", ("title", "description", "custom_data", "mirror_whitelist"))):
        for key in keys:
            assert site.patch(path, {key: value}, user="amy").status in (200, 400)
    try:
        for path in ("/", "/amy", "/amy/plain", "/amy/plain?show=settings", "/amy/plain?show=inheritance", "/amy/plain/plain/1.0"):
            assert not page(site, path, user="amy").of("b")
    finally:
        site.patch("/amy", {"title": "", "description": "", "email": "", "own": ""}, user="amy")
        site.patch("/amy/plain", {"title": "", "description": "", "custom_data": "", "mirror_whitelist": []}, user="amy")


# -- addresses

HOME = "/mal/dev0/evil/1.0"
FILE = "/evil-1.1-py3-none-any.whl"
ASKED = [       # a page with one of its parameters, the value last
    "/?after=", "/?all=", "/mal?after=", "/mal/dev0?q=", "/mal/dev0?after=", "/mal/dev0?sort=", "/mal/dev0?sort=-uploaded&after=",
    "/mal/dev0?show=", "/mal/dev0?show=names&after=", "/mal/dev0/evil?from=", "/mal/dev0/evil?pre=", "/mal/dev0/evil?yanked=",
    HOME + "?from=", HOME + "?python=", HOME + "?platform=", HOME + "?from=0&python=", "/mal/dev0/evil/1.1/+files" + FILE + "?number=",
    "/mal/dev0/evil/1.1/+files" + FILE + "?from=", HOME + "/+toxresults/evil-1.0-py3-none-any.whl?from=", "/mal/dev0/evil/+dependents?after=",
    "/mal/dev0/+compare/ben/dev0?after=", "/mal/dev0/+compare?with=", "/mal/dev0/evil/+diff/1.0...1.1?from=", HOME + "/+d/index.html?version=",
    "/+status?after=", "/+status?refresh=", "/+search?query=", "/+search?query=evil&page=", "/+search?query=evil&sort=", "/+search?q=",
    "/+help?q=", "/+login?next=", "/?x="]
PATHS = [       # the same with a part of the path
    "/{}", "/mal/{}", "/mal/dev0/{}", "/mal/dev0/evil/{}", "/mal/dev0/evil/1.1/+files/{}", "/mal/dev0/evil/1.1/+files" + FILE + "/{}",
    HOME + "/+toxresults/{}", HOME + "/+toxresults/evil-1.0-py3-none-any.whl/{}", "/mal/dev0/evil/+diff/{}", "/mal/dev0/evil/+diff/1.0...{}",
    "/mal/dev0/+compare/{}", "/mal/dev0/+compare/{}/dev0", HOME + "/+d/{}", HOME + "/+doc/{}", "/+help/{}", "/+{}", "/mal/dev0/evil/+{}",
    "/mal/dev0/{}/+why", "/mal/dev0/{}/+dependents", "/mal/dev0/{}/+feed.atom"]
VALUES = [
    "\"><script>alert(1)</script>", "' onclick=x ", "{0}{x.__class__}%s", "-1", "0", "00", "1e3", "99999999999999999999", "\u0661\u0662",
    "\U0001d7d8", "\r\nSet-Cookie: a=b", "\0", "..", ".", "../../etc/passwd", "//evil.example", "javascript:alert(1)", "%2e%2e%2f", " ", "",
    "w" * 8000, "(" * 3000, "*" * 3000, "\u202e\ufffe", "a&after=b&after=c&page=2&page=x", "latest", "\"" * 300]


def asked_page(server, path, where):
    """A request for it, as it is, which must lead to a page of ours, an error or another address here."""
    reply = server.get(path, headers={"Accept": BROWSER})
    assert reply.status in (200, 302, 303, 400, 404, 414, 431), (where, reply)
    assert "Set-Cookie" not in reply.headers or where.startswith("/+login")
    if "Location" in reply.headers:
        assert reply.headers["Location"].startswith((server.url + "/", "/")) and not reply.headers["Location"].startswith("//")
    elif b'id="main"' in reply.body:
        found = check_page(reply)
        assert len(found.of("script")) == 1 and not found.of("img") and not found.of("b", onclick="x")
        assert all(urllib.parse.urlsplit(link).scheme in ("", "http", "https", "mailto") for link in found.links)
        assert len(reply.body) < 100 << 10, (where, len(reply.body))


@pytest.mark.parametrize("start", ASKED)
def test_a_parameter_may_be_anything(site, start):
    for value in VALUES:
        asked_page(site, start + (value if value.startswith("a&") else urllib.parse.quote(value, safe="")), start)
    asked_page(site, start + "%ed%a0%80%ff%zz%", start)


@pytest.mark.parametrize("path", PATHS)
def test_a_part_of_a_path_may_be_anything(site, path):
    for value in VALUES:
        asked_page(site, path.format(urllib.parse.quote(value, safe="")), path)
        asked_page(site, path.format(urllib.parse.quote(value)), path)
    for value in ("%ed%a0%80%ff", "%", "a%00b", "a/", "a//b", "%2f", "%5c..%5c", "a;b=c", "%3F"):
        asked_page(site, path.format(value), path)


def test_no_comparison_leads_to_itself(site):
    for value, status in (("", 400), ("/", 400), ("mal", 404), ("mal/none", 404), ("mal/dev0/x", 404), ("%2e%2e/x", 404)):
        assert site.get("/mal/dev1/+compare?with=" + value, headers={"Accept": BROWSER}, follow=True).status == status
    reply = site.get("/mal/dev1/+compare?with=ben/dev0", headers={"Accept": BROWSER})
    assert reply.headers["Location"] == site.url + "/mal/dev1/+compare/ben/dev0"
