"""Web pages as their tests see them: parsed, and held to what every page keeps."""

import base64
import hashlib
import html.parser
import urllib.parse

from harness import BROWSER

VOID = {"area", "br", "col", "hr", "img", "input", "link", "meta", "wbr"}
INLINE = {"a", "b", "code", "mark", "small", "span", "time"}
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
        super().__init__(convert_charrefs=True)
        self.reply, self.source = reply, reply.body.decode()
        self.open, self.elements, self.texts, self.links, self.headings = [], [], [], [], []
        self.raw = {"style": "", "script": ""}
        self.feed(self.source)
        self.close()
        assert not self.open, "left open: %s" % self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "a" and "href" in dict(attributes):
            self.links.append(dict(attributes)["href"])
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, "</%s> closes %s" % (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]] += data
            return
        self.texts.append(data)
        if {"h1", "h2", "h3"} & set(self.open):
            self.headings[-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def of(self, tag, **attributes):
        """The attributes of each element with this tag, and with these attributes."""
        return [found for name, found in self.elements
                if name == tag and attributes.items() <= found.items()]

    def rows(self):
        """The texts of the cells of each table row, heads left out."""
        return _Rows(self.source).found

    def with_text(self, tag, **attributes):
        """(attributes, the text below it) of each element with this tag and these attributes."""
        return [(found, text) for name, found, text in _Texts(self.source).found
                if name == tag and attributes.items() <= found.items()]

    @property
    def title(self):
        return self.with_text("title")[0][1]

    @property
    def main(self):
        """The text of the page itself, without the frame around it."""
        return self.with_text("main")[0][1]

    @property
    def hrefs(self):
        """{text of a link: where it leads}"""
        return {text: attributes["href"] for attributes, text in self.with_text("a")}

    @property
    def facts(self):
        """{term: description} of the lists of facts."""
        terms, values = ([text for _, text in self.with_text(tag)] for tag in ("dt", "dd"))
        return dict(zip(terms, values))


class _Texts(html.parser.HTMLParser):
    """`found`: (tag, attributes, the text below it) of each element of a page that has an end tag."""

    def __init__(self, source):
        super().__init__()
        self.found, self.open = [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        _, attributes, pieces = self.open.pop()
        text = " ".join("".join(pieces).split())
        self.found.append((tag, attributes, text))
        if self.open:
            self.open[-1][2].append(text if tag in INLINE else " %s " % text)

    def handle_data(self, data):
        if self.open:
            self.open[-1][2].append(data)


class _Rows(html.parser.HTMLParser):
    """`found`: the texts of the cells of a page's table rows."""

    def __init__(self, source):
        super().__init__()
        self.found, self.cell = [], None
        self.feed(source)
        self.found = [row for row in self.found if row]

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.found.append([])
        elif tag in ("td", "th") and dict(attributes).get("scope") != "col":
            self.cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th") and self.cell is not None:
            self.found[-1].append(" ".join(self.cell.split()))
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data


def source_hash(text):
    return "'sha256-%s'" % base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def page(server, path, status=200, **options):
    """The page at a path, as a browser gets it; checked for what every page keeps."""
    headers = dict({"Accept": BROWSER}, **options.pop("headers", {}))
    reply = server.get(path, headers=headers, **options)
    assert reply.status == status, reply
    return check_page(reply)


def check_page(reply):
    assert reply.headers["Content-Type"].lower() == "text/html; charset=utf-8"
    for name, value in HEADERS.items():
        assert reply.headers[name] == value, name
    found = Page(reply)
    policy = dict(part.strip().partition(" ")[::2]
                  for part in reply.headers["Content-Security-Policy"].split(";"))
    assert {policy[name] for name in ("default-src", "frame-ancestors", "base-uri")} == {"'none'"}
    for name in ("style", "script"):
        assert source_hash(found.raw[name]) in policy[name + "-src"]
    assert "unsafe" not in reply.headers["Content-Security-Policy"]

    assert found.of("html", lang="en") and len(found.of("title")) == len(found.of("main")) == len(found.of("h1")) == 1
    assert len(found.of("style")) == len(found.of("script")) == 1
    ids = [attributes["id"] for _, attributes in found.elements if attributes.get("id")]
    assert len(ids) == len(set(ids)), "an id stands twice"
    labels = {attributes["for"] for attributes in found.of("label") if "for" in attributes}
    for tag, attributes in found.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        for name in ("href", "src", "action", "formaction"):
            scheme = urllib.parse.urlsplit((attributes.get(name) or "").strip()).scheme.lower()
            assert scheme in ("", "http", "https", "mailto") or scheme == "data" and tag == "link", attributes
        if tag in ("input", "select", "textarea") and attributes.get("type") not in ("hidden", "submit"):
            assert attributes.get("id") in labels or "aria-label" in attributes or tag == "input" and \
                attributes.get("type") == "checkbox", attributes
    return found


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
