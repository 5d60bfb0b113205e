"""Descriptions as PyPI renders them, by cmark and docutils, and as devpi_lite does.

The descriptions are those of the packages that `make interop` has installed for its clients and for
devpi-server: about a hundred, old ones and new ones. Compared is what a reader finds in them.
"""

import collections
import email
import html.parser
import re
import urllib.parse

import pytest

import devpi_lite as d
from clients import ENVIRONMENTS

cmarkgfm = pytest.importorskip("cmarkgfm")
readme_rst = pytest.importorskip("readme_renderer.rst")

DESCRIPTIONS = 80       # that must be there at least, both formats together
# what docutils makes of quotes and dashes, and the directives that make lists and numbers out of headings
PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "--", "—": "---", "…": "..."})
GENERATED = re.compile(r"^\.\. (?:contents|sectnum|section-numbering)::.*\n(?: +\S.*\n)*", re.MULTILINE)
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")


def descriptions(form):
    """{name of a project: its description} of those in a format."""
    found = {}
    for path in sorted(ENVIRONMENTS.glob("*/lib/python*/site-packages/*.dist-info/METADATA")):
        metadata = email.message_from_string(path.read_text(encoding="utf-8", errors="replace"))
        text = metadata.get_payload()
        if len(text) > 100 and d.description_format(text, metadata["Description-Content-Type"]) == form:
            found[d.normalize(metadata["Name"])] = GENERATED.sub("", text) if form == "rst" else text
    return found


class Facts(html.parser.HTMLParser):
    """Counts what a page has: (kind, text) of headings, list items, code and cells, (kind, text, URL) of links.

    The text of an item ends where a block in it begins."""

    KINDS = {**dict.fromkeys(HEADINGS, "heading"), "li": "item", "pre": "code", "td": "cell", "th": "cell", "a": "link"}
    BLOCKS = ("ul", "ol", "li", "table", "blockquote", "pre", "dl")

    def __init__(self, page):
        super().__init__()
        self.open, self.counts = [], collections.Counter()      # open: [tag, text, URL, whether it has ended]
        self.feed(page)
        self.close()
        while self.open:
            self.end(self.open.pop())

    def handle_starttag(self, tag, attributes):
        if tag in self.BLOCKS:
            for element in self.open:
                element[3] = element[3] or element[0] == "li"
        if tag == "a":
            self.handle_endtag("a")
        if tag in ("p", "br", "div"):
            self.handle_data(" ")
        if tag in self.KINDS:
            self.open.append([tag, "", dict(attributes).get("href"), False])

    def handle_endtag(self, tag):
        if tag in ("p", "div", "summary", "li"):
            self.handle_data(" ")
        for place in range(len(self.open) - 1, -1, -1):
            if self.open[place][0] == tag:
                self.end(self.open.pop(place))
                return

    def handle_data(self, text):
        for element in self.open:
            if not element[3]:
                element[1] += text

    def end(self, element):
        tag, text, url, _ = element
        kind, text = self.KINDS[tag], text.translate(PLAIN)
        text = re.sub(r"</?[A-Za-z!][^<>]*>|\[image: [^\]]*\]", "", text)      # tags that are shown as text; images
        text = text.strip("\n") if kind == "code" else " ".join(text.split())
        if kind == "link" and re.match("https?://.|mailto:", url or ""):
            self.counts[kind, text, urllib.parse.unquote(re.sub("[\t\r\n]", "", url))] += 1
        elif kind != "link" and text:
            self.counts[kind, text] += 1


def cmark(text):
    return cmarkgfm.github_flavored_markdown_to_html(text, cmarkgfm.cmark.Options.CMARK_OPT_UNSAFE)


@pytest.mark.parametrize("form, reference, render, share", [
    ("markdown", cmark, d.render_markdown, 0.97), ("rst", readme_rst.render, d.render_rst, 0.93)])
def test_a_description_has_what_pypi_shows(form, reference, render, share):
    equal = every = 0
    differing = []
    for name, text in descriptions(form).items():
        page = reference(text)
        if page is None:        # PyPI refuses it
            continue
        theirs, ours = Facts(page).counts, Facts(render(text, True)).counts
        both, either = sum((theirs & ours).values()), sum((theirs | ours).values())
        equal, every = equal + both, every + either
        if both < either:
            differing.append((either - both, name, list((theirs - ours) | (ours - theirs))[:4]))
    assert every > 500
    assert equal / every >= share, "%.2f %%; the worst:\n%s" % (
        100 * equal / every, "\n".join("%d %s %s" % each for each in sorted(differing, reverse=True)[:10]))


def test_there_are_enough_descriptions():
    assert len(descriptions("markdown")) + len(descriptions("rst")) >= DESCRIPTIONS
