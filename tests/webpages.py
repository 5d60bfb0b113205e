"""Web pages as their tests see them: parsed, and held to what every page keeps."""

import base64
import hashlib
import html.parser
import re
import urllib.parse

from harness import BROWSER

VOID = {"area", "br", "col", "hr", "img", "input", "link", "meta", "wbr"}
INLINE = {"a", "b", "code", "mark", "small", "span", "time"}
# a test result, as tox reports it
RESULT = {
    "host": "ci-1", "platform": "linux", "toxversion": "4.2",
    "testenvs": {
        "py311": {"python": {"version": "3.11.7 (main)"},
                  "setup": [{"command": ["pip", "install", "."], "retcode": "0", "output": "\x1b[32mdone\x1b[0m"}],
                  "test": [{"command": ["pytest", "-q"], "retcode": "0", "output": "1 passed " + "=" * 120}]},
        "py312": {"python": {"version": "3.12.1"}, "setup": [],
                  "test": [{"command": ["pytest"], "retcode": "1", "output": "E assert <b>0</b>"}]}}}
HEADERS = {
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin", "Vary": "Accept, Accept-Encoding, Cookie",
    "Cache-Control": "private, no-cache"}


class Page(html.parser.HTMLParser):
    """A page: its `text`, `links`, `headings`; AssertionError if its tags are not balanced.

    HTML lets some end tags be left out; our pages have them all. `elements` are
    (tag, {attribute: value}) in their order.
    """

    def __init__(self, reply):
        super().__init__()
        self.reply, self.source = reply, reply.body.decode()
        self.open = []              # (tag, attributes, the texts in it)
        self.closed = []            # (tag, attributes, its whole text)
        self.elements, self.texts, self.links, self._rows = [], [], [], []
        self.raw = {"style": "", "script": ""}
        self.feed(self.source)
        self.close()
        assert not self.open, "left open: %s" % self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append((tag, attributes, []))
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        elif tag == "tr":
            self._rows.append([])

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, "</%s> closes %s" % (tag, self.open[-3:])
        _, attributes, pieces = self.open.pop()
        text = " ".join("".join(pieces).split())
        self.closed.append((tag, attributes, text))
        if self.open:
            self.open[-1][2].append(text if tag in INLINE else " %s " % text)
        if tag == "td" or tag == "th" and attributes.get("scope") != "col":
            self._rows[-1].append(text)

    def handle_data(self, data):
        if self.open and self.open[-1][0] in self.raw:
            self.raw[self.open[-1][0]] += data
            return
        self.texts.append(data)
        if self.open:
            self.open[-1][2].append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    @property
    def title(self):
        return self.with_text("title")[0][1]

    @property
    def main(self):
        """The text of the page itself, without the frame around it."""
        return self.with_text("main")[0][1]

    @property
    def headings(self):
        return [text for tag, _, text in self.closed if tag in ("h1", "h2", "h3")]

    @property
    def hrefs(self):
        """{text of a link: where it leads}"""
        return {text: attributes["href"] for attributes, text in self.with_text("a")
                if "href" in attributes}

    @property
    def facts(self):
        """{term: description} of the lists of facts."""
        terms, values = ([text for _, text in self.with_text(tag)] for tag in ("dt", "dd"))
        return dict(zip(terms, values))

    def rows(self):
        """The texts of the cells of each table row, heads left out."""
        return [row for row in self._rows if row]

    def of(self, tag, **attributes):
        """The attributes of each element with this tag, and with these attributes."""
        return [found for name, found in self.elements
                if name == tag and attributes.items() <= found.items()]

    def with_text(self, tag, **attributes):
        """(attributes, the text below it) of each element with this tag and these attributes."""
        return [(found, text) for name, found, text in self.closed
                if name == tag and attributes.items() <= found.items()]


def source_hash(text):
    return "'sha256-%s'" % base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def page(server, path, status=200, **options):
    """The page at a path, as a browser gets it; checked for what every page keeps."""
    headers = dict({"Accept": BROWSER}, **options.pop("headers", {}))
    reply = server.get(path, headers=headers, **options)
    assert reply.status == status, reply
    return check_page(reply)


def check_page(reply):
    """A reply as a `Page`; AssertionError unless it keeps what every page keeps."""
    assert reply.headers["Content-Type"].lower() == "text/html; charset=utf-8"
    for name, value in HEADERS.items():
        assert reply.headers[name] == value, name
    found = Page(reply)
    _check_policy(found)
    _check_frame(found)
    for tag, attributes in found.elements:
        _check_element(tag, attributes)
    _check_labels(found)
    return found


def _check_policy(page):
    """Only the style and the script of the page itself are allowed."""
    text = page.reply.headers["Content-Security-Policy"]
    policy = dict(part.strip().partition(" ")[::2] for part in text.split(";"))
    assert {policy[name] for name in ("default-src", "frame-ancestors", "base-uri")} == {"'none'"}
    for name in ("style", "script"):
        assert source_hash(page.raw[name]) in policy[name + "-src"]
    assert "unsafe" not in text


def _check_frame(page):
    assert page.of("html", lang="en")
    tags = [tag for tag, _ in page.elements]
    assert tags[:tags.index("body")].count("title") == 1        # charts have titles, too
    for tag in ("main", "h1", "style", "script"):
        assert tags.count(tag) == 1, tag
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids)), "an id stands twice"


def _check_element(tag, attributes):
    """No script and no style in attributes, and links of harmless schemes."""
    assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
    for name in ("href", "src", "action", "formaction"):
        scheme = urllib.parse.urlsplit((attributes.get(name) or "").strip()).scheme.lower()
        assert scheme in ("", "http", "https", "mailto") or scheme == "data" and tag == "link", attributes


def _check_labels(page):
    """Each input has a label; that of a checkbox may stand around it."""
    labels = {attributes["for"] for attributes in page.of("label") if "for" in attributes}
    for tag in ("input", "select", "textarea"):
        for attributes in page.of(tag):
            assert attributes.get("type") in ("hidden", "submit", "checkbox") \
                or attributes.get("id") in labels or "aria-label" in attributes, attributes


def crawl(server, start="/", most=400, **options):
    """{path: Page} of all pages of this server that links from `start` lead to.

    Each link has to lead to something; what is no page is None.
    """
    found, waiting = {}, [start]
    while waiting and len(found) < most:
        path = waiting.pop(0)
        if path in found:
            continue
        reply = server.get(path, headers={"Accept": BROWSER}, **options)
        assert reply.status < 400, (path, reply)
        is_page = reply.headers.get("Content-Type", "").lower() == "text/html; charset=utf-8" and reply.status == 200
        framed = is_page and b'id="main"' in reply.body
        found[path] = check_page(reply) if framed else None
        if reply.status in (301, 302, 303):
            waiting.append(below(server, reply.headers["Location"]))
        for link in found[path].links if framed else ():
            target = below(server, urllib.parse.urljoin(server.url + path, link))
            if target and not target.startswith("/+login?next="):       # each page has its own
                waiting.append(target)
    return found


def below(server, url):
    """The path and query of a URL of this server, "" for others."""
    url = url.partition("#")[0]
    return url[len(server.url):] or "/" if url.startswith(server.url) else ""


class Description(html.parser.HTMLParser):
    """Checks a description as a page has it: listed tags, attributes and schemes, all balanced."""

    TAGS = set("h2 h3 h4 h5 h6 p a em strong del code pre blockquote ul ol li hr br table thead tbody "
               "tr th td img details summary dl dt dd sup sub kbd span input".split())
    VOID = {"hr", "br", "img", "input"}
    VALUES = {
        "href": r"(https?://|mailto:)[!-~]+|#readme-[!-~]*", "src": r"https://[!-~]+",
        "rel": "nofollow noopener ugc", "id": "readme-.*", "align": "left|center|right",
        "class": r"lang-[\w.+#-]+", "start": "[0-9]+", "colspan": "[0-9]+", "rowspan": "[0-9]+",
        "type": "checkbox", "title": "(?s).*", "alt": "(?s).*", "tabindex": "0",
        "aria-label": "Task"}

    def __init__(self, page):
        super().__init__()
        self.open = []
        self.feed(page)
        self.close()
        assert self.open == [], page

    def handle_starttag(self, tag, attributes):
        assert tag in self.TAGS, tag
        assert len(dict(attributes)) == len(attributes), attributes
        for name, value in attributes:
            if tag == "input" and name in ("disabled", "checked"):
                assert value is None
            else:
                assert re.fullmatch(self.VALUES[name], value), (tag, name, value)
        assert ("tabindex" in dict(attributes)) == (tag in ("pre", "table"))
        assert ("rel" in dict(attributes)) == (not dict(attributes).get("href", "#").startswith("#"))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def refuse(self, found):
        raise AssertionError(found)

    handle_startendtag = handle_comment = handle_decl = handle_pi = unknown_decl = refuse
