"""Web pages as tests see them: fetched as a browser does, checked, and taken apart."""

import base64
import hashlib
import html.parser
import re

from harness import BROWSER

VOID = {"area", "br", "col", "hr", "img", "input", "link", "meta", "wbr"}


class Page(html.parser.HTMLParser):
    """A page that is well-formed: each element is closed, and no attribute is a script."""

    def __init__(self, reply):
        super().__init__()
        self.reply, self.text, self.title = reply, "", ""
        self.elements = []      # (tag, attributes, text below it), in the order of their ends
        self._open = []
        self.feed(reply.text)
        self.close()
        assert self._open == [], "not closed: %s" % self._open
        assert len(self.of("h1")) == 1, self.of("h1")
        assert len(self.of("main")) == 1 and self.of("html")[0][0]["lang"] == "en" and self.title

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            assert not name.startswith("on") and name != "style", (tag, name)
            assert not (value or "").strip().lower().startswith("javascript:"), (tag, value)
        if tag in VOID:
            self.elements.append((tag, dict(attributes), ""))
        else:
            self._open.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self._open and self._open[-1][0] == tag, "</%s> closes %s" % (tag, self._open[-1:])
        _, attributes, pieces = self._open.pop()
        text = "".join(pieces)
        self.elements.append((tag, attributes, text))
        if self._open:
            self._open[-1][2].append(text if tag not in ("style", "script") else "")
        self.title = self.title or (text if tag == "title" else "")
        self.text = text if tag == "main" else self.text

    def handle_data(self, data):
        if self._open:
            self._open[-1][2].append(data)

    def of(self, tag, **wanted):
        """(attributes, text) of the elements with that tag and those attributes."""
        return [(attributes, text) for name, attributes, text in self.elements if name == tag
                and all(attributes.get(key.rstrip("_")) == value for key, value in wanted.items())]

    def links(self):
        """{text: href}"""
        return {text: attributes.get("href") for attributes, text in self.of("a")}

    def rows(self):
        """The cells of each row of the tables."""
        cells, rows = [], []
        for name, _, text in self.elements:
            if name in ("td", "th"):
                cells.append(text)
            elif name == "tr":
                rows.append(cells)
                cells = []
        return rows


def view(server, path, status=200, **options):
    """The `Page` at a path, with the headers that each page has."""
    headers = dict({"Accept": BROWSER}, **options.pop("headers", {}))
    reply = server.get(path, headers=headers, **options)
    assert reply.status == status, reply
    assert reply.headers.get("Content-Type") == "text/html; charset=UTF-8"
    assert reply.headers.get("X-Content-Type-Options") == "nosniff"
    assert reply.headers.get("Cache-Control") == "private, no-cache"
    page = Page(reply)
    policy = reply.headers.get("Content-Security-Policy")
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        [(_, text)] = page.of(tag)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert re.search(r"%s 'sha256-%s'(;|$)" % (directive, re.escape(digest)), policy)
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    return page
