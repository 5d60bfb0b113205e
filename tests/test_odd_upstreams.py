"""What odd upstreams send, row by row, and what our page and our file must then be (chapter 7).

The measure is what pip and uv take from such an upstream directly.  The next oddity is one more row
of `ROWS`."""

import bz2
import dataclasses
import functools
import gzip
import hashlib
import http.client
import json
import string
import urllib.parse
import zlib

import pytest

from harness import HTML, SIMPLE_JSON, Server
from scripted import Scripted

OTHER = "a" * 64


# -- what upstream sends
#
# In pages and heads, $N1 is the name of the project's file 1, $F1 its path, $S1, $M1 and $L1 its
# digests, $U1 the first of them in capitals; $P is the project, $UP the address of the upstream.


def sent(body=b"", content_type=HTML, status=200, version="1.1", **headers):
    """A response as bytes, but for its $names.

    `_` in a header's name stands for `-`, None leaves a header out."""
    if isinstance(body, dict):
        body = json.dumps(body)
    if isinstance(body, str):
        body = body.encode()
    headers = {"Content_Type": content_type, "Content_Length": "$LENGTH", **headers}
    lines = ["%s: %s" % (name.replace("_", "-"), value)
             for name, value in headers.items() if value is not None]
    return "\r\n".join(["HTTP/%s %s X" % (version, status), *lines, "", ""]), body


def zipped(body, encoding, squeeze):
    head, body = sent(body, HTML, Content_Encoding=encoding)
    return head, body, squeeze


def chunked(body, *pieces, end="0\r\n\r\n"):
    """The body in chunks of these sizes and the rest."""
    head, body = sent(body, Content_Length=None, Transfer_Encoding="chunked")

    def cut(data):
        found = b""
        for size in (*pieces, None):
            piece, data = data[:size], b"" if size is None else data[size:]
            found += b"%x\r\n%s\r\n" % (len(piece), piece)
        return found + end.encode()
    return head, body, cut


def page(*files, content_type=SIMPLE_JSON, **keys):
    """A JSON page."""
    return sent({"meta": {"api-version": "1.1"}, "name": "$P", "files": list(files), **keys},
                content_type)


def entry(number=1, **keys):
    """A file in a JSON page; `_` in a key stands for `-`, a key that is ... is left out."""
    found = {"filename": "$N%d" % number, "url": "$F%d" % number,
             "hashes": {"sha256": "$S%d" % number}}
    found.update((key.replace("_", "-"), value) for key, value in keys.items())
    return {key: value for key, value in found.items() if value is not ...}


def link(number=1, attributes="", fragment="#sha256=$S{0}"):
    """An anchor of an HTML page."""
    return '<a href="$F%d%s"%s>$N%d</a>\n' % (number, fragment.format(number),
                                              attributes and " " + attributes, number)


def one_html(attributes="", **keys):
    return sent(link(1, attributes), **keys)


def fragment(text):
    return sent(link(1, fragment=text))


# -- what we must make of it


ABSENT = object()


@dataclasses.dataclass
class Row:
    """What upstream answers to a project's page, and what must come of it.

    `files`: {number or name: what its entry must say}, in page order; `status` and `says` of a page
    that is refused.  A file's expectations: `hash` (sha256, md5, None; ...: any), `gets` (the status
    of the file, None: it is not fetched), `metadata` (the text of its metadata file), and keys of
    the JSON form with `_` for `-`.  `elsewhere`: what upstream answers at other paths.
    `versions`: those of the page, where they are of interest."""
    name: str
    response: tuple
    files: dict = dataclasses.field(default_factory=dict)
    status: int = 200
    says: str = ""
    elsewhere: dict = dataclasses.field(default_factory=dict)
    versions: list = None


ONE, TWO = {1: {}}, {1: {}, 2: {}}
HASHLESS = {1: {"hash": None}}


def refused(name, response, says, **keys):
    return Row(name, response, status=502, says=says, **keys)


ROWS = [
    # -- how it travels
    Row("plain", one_html(), ONE),
    Row("plain-json", page(entry()), ONE),
    Row("chunks", chunked(link(1) + link(2), 1, 2, 30), TWO),
    Row("chunk-extensions", chunked(link(1), end="0;x=y\r\nX-Trailer: 1\r\n\r\n"), ONE),
    refused("chunks-cut", chunked(link(1), 5, end=""), "/simple/chunks-cut/: "),
    Row("until-the-end", one_html(Content_Length=None, Connection="close"), ONE),
    Row("http-1-0", one_html(version="1.0"), ONE),
    Row("http-1-0-until-the-end", one_html(version="1.0", Content_Length=None), ONE),
    refused("ended-early", one_html(Content_Length="5000", Connection="close"), "ended early"),
    Row("chunks-in-capitals",
        ("HTTP/1.1 200\r\nTRANSFER-ENCODING: CHUNKED\r\ncontent-type:text/html\r\n\r\n",
                               *chunked(link(1), 9)[1:]), ONE),
    Row("after-continue", ("HTTP/1.1 100 Continue\r\n\r\n" + one_html()[0], one_html()[1]), ONE),
    Row("lines-without-return", (one_html()[0].replace("\r", ""), one_html()[1]), ONE),
    Row("folded-header", one_html(X_Long="a\r\n b"), ONE),
    Row("length-0", sent(link(1), Content_Length="0", Connection="close"), {}),
    refused("no-answer", ("", b""), "no-answer/: "),
    refused("garbage-head", ("SSH-2.0-OpenSSH\r\n", b""), "garbage-head/: "),
    Row("very-long-lines",
        sent("<!-- %s -->%s<p title='%s'>" % ("x" * 300000, link(1) + " " * 300000, "y" * 300000)), ONE),
    Row("gzip", zipped(link(1), "gzip", gzip.compress), ONE),
    Row("gzip-in-capitals", zipped(link(1), " GZIP ", gzip.compress), ONE),
    Row("x-gzip", zipped(link(1), "x-gzip", gzip.compress), ONE),
    Row("gzip-of-two-members", zipped(
        link(1) + link(2), "gzip", lambda body: gzip.compress(body[:80]) + gzip.compress(body[80:])), TWO),
    Row("gzip-of-many-members", zipped(link(1) + link(2), "gzip", lambda body: b"".join(
        gzip.compress(body[at:at + 1]) for at in range(len(body)))), TWO),
    Row("gzip-and-an-empty-member", zipped(link(1), "gzip",
                                           lambda body: gzip.compress(b"") + gzip.compress(body)),
        ONE),
    Row("gzip-and-zeros", zipped(link(1), "gzip", lambda body: gzip.compress(body) + bytes(500)),
        ONE),
    Row("gzip-and-garbage", zipped(link(1), "gzip", lambda body: gzip.compress(body) + b"garbage"),
        ONE),
    refused("gzip-cut", zipped(link(1), "gzip", lambda body: gzip.compress(body)[:-9]),
            "ended early"),
    refused("gzip-cut-in-member-two", zipped(
        link(1), "gzip", lambda body: gzip.compress(body) + gzip.compress(body)[:30]), "ended early"),
    refused("gzip-damaged", zipped(link(1), "gzip",
                                   lambda body: gzip.compress(body)[:20] + b"\xff" * 50),
            "damaged gzip"),
    refused("gzip-that-is-none", zipped(link(1), "gzip", lambda body: body), "damaged gzip"),
    refused("gzip-not-announced", zipped(link(1), None, gzip.compress), "no HTML"),
    Row("deflate", zipped(link(1), "deflate", zlib.compress), ONE),
    Row("deflate-without-a-head", zipped(link(1), "deflate",
                                         lambda body: zlib.compress(body)[2:-4]), ONE),
    Row("identity", zipped(link(1), "identity", bytes), ONE),
    Row("a-charset-as-encoding", zipped(link(1), "utf-8", bytes), ONE),
    refused("an-unknown-encoding", zipped(link(1), "br", bz2.compress), "encoded as 'br'"),
    Row("aws-chunked-as-encoding", zipped(" \n" + link(1), "aws-chunked", bytes), ONE),
    Row("another-encoding-of-the-metadata", page(entry(filename="$W1", url="/f/$W1", hashes={},
                                                       core_metadata=True)),
        {"$W1": {"hash": None, "metadata": "Metadata-Version: 2.1\nName: x\nVersion: 1.0\n"}},
        elsewhere={
            "/f/another_encoding_of_the_metadata-1.0-py3-none-any.whl.metadata": sent(
                "Metadata-Version: 2.1\nName: x\nVersion: 1.0\n", Content_Encoding="aws-chunked")}),
    refused("two-encodings", zipped(link(1), "gzip, br", bz2.compress), "encoded as 'gzip, br'"),
    # -- statuses and redirects
    Row("status-404", sent("no", status=404), status=404),
    Row("status-404-encoded", sent(b"\x0b\x02\x80no\x03", status=404, Content_Encoding="br"),
        status=404),
    refused("status-403", sent("no", status=403), "answered 403"),
    refused("status-410", sent("no", status=410), "answered 410"),
    refused("status-500", sent("no", status=500), "answered 500"),
    refused("status-304-unasked", sent(status=304), "answered 304"),
    Row("redirect-301", sent(status=301, Location="/moved/"), ONE,
        elsewhere={"/moved/": one_html()}),
    Row("redirect-308", sent(status=308, Location="$UP/moved/308/"), ONE,
        elsewhere={"/moved/308/": one_html()}),
    Row("redirect-303-relative", sent(status=303, Location="../other/page?x=1"), ONE,
        elsewhere={"/simple/other/page?x=1": one_html()}),
    Row("redirected-base", sent(status=302, Location="/far/away/"), ONE, elsewhere={
        "/far/away/": sent('<a href="../../f/$N1#sha256=$S1">x</a>')}),
    refused("redirect-nowhere", sent(status=302), "answered 302"),
    refused("redirect-to-itself", sent(status=302, Location="/simple/redirect-to-itself/"),
            "too many redirects"),
    # -- types, charsets, byte order marks
    Row("no-type", one_html(content_type=None), ONE),
    Row("no-type-json", page(entry(), content_type=None), ONE),
    Row("text-plain", one_html(content_type="text/plain"), ONE),
    Row("json-as-html", page(entry(), content_type=HTML), ONE),
    Row("json-as-text", page(entry(), content_type="text/plain; charset=utf-8"), ONE),
    Row("application-json", page(entry(), content_type="application/json"), ONE),
    Row("json-in-capitals",
        page(entry(), content_type="Application/VND.PyPI.Simple.v1+JSON;Charset=UTF-8"), ONE),
    refused("html-as-json", one_html(content_type=SIMPLE_JSON), "not a simple page"),
    Row("latin-1", sent(link(1, 'data-yanked="caf\u00e9"').encode("latin-1"),
                        "text/html; charset=latin-1"), {1: {"yanked": "caf\u00e9"}}),
    Row("charset-in-quotes", sent(link(1, 'data-yanked="\u2020"').encode("cp1252"),
                                  "text/html;charset='Windows-1252'"),
        {1: {"yanked": "\u2020"}}),
    Row("utf-8-by-default", sent(link(1, 'data-yanked="caf\u00e9"')), {1: {"yanked": "caf\u00e9"}}),
    Row("no-utf-8", sent(link(1, 'data-yanked="caf\u00e9"').encode("latin-1")),
        {1: {"yanked": "caf\ufffd"}}),
    Row("an-unknown-charset", one_html(content_type="text/html; charset=x-none"), ONE),
    refused("an-unknown-charset-that-matters", sent(link(1, 'title="\u00e9"'),
                                                    "text/html; charset=x-none"),
            "charset 'x-none' is unknown"),
    refused("a-codec-that-is-no-charset", sent(link(1, 'title="\u00e9"'),
                                               "text/html; charset=punycode"),
            "charset 'punycode' is unknown"),
    Row("bom", sent("\ufeff" + link(1)), ONE),
    Row("bom-and-latin-1", sent("\ufeff" + link(1, 'data-yanked="\u00e9"'),
                                "text/html; charset=latin-1"), {1: {"yanked": "\u00e9"}}),
    Row("bom-json", sent("\ufeff" + page(entry())[1].decode(), SIMPLE_JSON), ONE),
    Row("bom-json-as-html", sent("\ufeff" + page(entry())[1].decode(), HTML), ONE),
    Row("empty", sent(""), {}),
    refused("empty-json", sent("", SIMPLE_JSON), "not a simple page"),
    refused("text", sent("please log in"), "no HTML"),
    # -- the markup
    Row("capitals", sent('<A HREF="$F1#sha256=$S1" DATA-YANKED="x">x</A><BASE HREF="/none">'),
        {1: {"yanked": "x"}}),
    Row("single-quotes", sent("<a href='$F1#sha256=$S1' data-yanked='\"'>x</a>"),
        {1: {"yanked": '"'}}),
    Row("no-quotes", sent("<a data-yanked=x href=$F1#sha256=$S1>x</a>"), {1: {"yanked": "x"}}),
    Row("spaces-around-equals", sent("<a\n\thref =\n '$F1#sha256=$S1'data-yanked>x</a>"),
        {1: {"yanked": True}}),
    Row("slash-at-the-end", sent("<a href='$F1#sha256=$S1'/><a href='$F2#sha256=$S2' />"), TWO),
    Row("the-first-of-two-attributes",
        sent("<a href='$F1#sha256=$S1' href='$F2' data-yanked='a' data-yanked='b'>x</a>"),
        {1: {"yanked": "a"}}),
    Row("no-end-tags", sent("<p><a href='$F1#sha256=$S1'>x<a href='$F2#sha256=$S2'>y"), TWO),
    Row("a-tag-in-a-tag", sent("<a href='$F1#sha256=$S1' <a href='$F2'>x</a>" + link(2)), TWO),
    Row("other-elements-that-begin-with-a",
        sent("<abbr href='$F2'>x</abbr><a1 href='$F2'>" + link(1)), ONE),
    Row("link-in-an-attribute", sent("<div title=\"<a href='$F2'>\">%s</div>" % link(1)), ONE),
    Row("quotes-in-quotes", sent(link(1, 'data-yanked="the "new" one"') + link(2)),
        {1: {"yanked": "the"}, 2: {}}),
    Row("a-quote-too-many", sent('<a href="$F1#sha256=$S1"">x</a>' + link(2)), TWO),
    Row("a-quote-too-few", sent('<a href="$F1>x</a>\n' + link(2) + link(1)), ONE),
    Row("a-quote-that-never-ends", sent(link(1) + "<a href='$F2' title='x>x</a></body></html>"),
        ONE),
    Row("an-equals-too-many", sent("<a = href=='x' ==href='$F1#sha256=$S1' =>x</a>" + link(1)),
        ONE),
    Row("nul", sent(link(1, '\0 data-yanked="x\0y"')), {1: {"yanked": "x y"}}),
    Row("comment", sent("<!-- withdrawn: %s -->%s" % (link(2), link(1))), ONE),
    Row("damaged-tag-in-a-comment", sent('<!-- <a href=x"> -->' + link(1)), ONE),
    Row("comment-in-a-comment", sent("<!-- <!-- --> %s <!-- x --!>%s" % (link(1), link(2))), TWO),
    Row("empty-comments", sent("<!-->%s<!--->%s<!---->" % (link(1), link(2))), TWO),
    Row("comment-that-never-ends", sent(link(1) + "<!-- " + link(2)), ONE),
    Row("other-declarations",
        sent("<?xml version='1.0'?><!DOCTYPE html><![CDATA[ %s ]]>%s" % ("<a href='$F2' x='",
            link(1))), ONE),
    Row("script",
        sent("<script>x = \"<a href='$F2'>\"</script >%s<STYLE><a href='$F2'></style>" % link(1)),
        ONE),
    Row("title-and-textarea",
        sent("<title><a href='$F2'>x</title><textarea><a href='$F2'></textarea>" + link(1)), ONE),
    Row("noscript-and-template", sent("<noscript>%s</noscript><template>%s</template>" % (link(1),
        link(2))), TWO),
    Row("trailing-garbage", sent(link(1).encode() + b"</body></html>\0\xff\xfe garbage > < \" '"),
        ONE),
    refused("ends-inside-a-tag", sent(link(1) + "<a href='$F2"), "ends inside"),
    Row("no-links", sent("<html><body>nothing</body></html>"), {}),
    Row("api-version-1-99",
        sent('<META NAME="pypi:repository-version" CONTENT=" 1.99 ">' + link(1)), ONE),
    refused("api-version-2", sent('<meta name="pypi:repository-version" content="2.0">' + link(1)),
            "API version '2.0'"),
    refused("api-version-2-at-the-end",
            sent(link(1) + "<meta content=2.0 name=PyPI:repository-version>"), "API version '2.0'"),
    Row("api-version-2-in-a-comment",
        sent('<!-- <meta name="pypi:repository-version" content="2.0"> -->' + link(1)), ONE),
    # -- links
    Row("relative", sent("<a href='../../f/$N1#sha256=$S1'>x</a>"), ONE),
    Row("too-many-dots", sent("<a href='../../../../f/$N1#sha256=$S1'>x</a>"), ONE),
    Row("with-host", sent("<a href='$UP$F1#sha256=$S1'>x</a>"), ONE),
    Row("without-scheme", sent("<a href='//$HOST$F1#sha256=$S1'>x</a>"), ONE),
    Row("host-in-capitals", sent("<a href='HTTP://LOCALHOST:$PORT$F1#sha256=$S1'>x</a>"),
        {1: {"gets": None}}),
    Row("user-in-the-link", sent("<a href='http://bob:secret@$HOST$F1#sha256=$S1'>x</a>"), ONE),
    Row("port-without-number", sent("<a href='http://127.0.0.1:/f/$N2#sha256=$S2'>x</a>" + link(1)),
        {2: {"gets": None}, 1: {}}),
    Row("bad-ports",
        sent("<a href='http://127.0.0.1:0/f/$N2'>x</a><a href='http://127.0.0.1:x/f/$N2'></a>"
                          "<a href='http://127.0.0.1:99999/f/$N2'></a>" + link(1)), ONE),
    Row("other-schemes", sent("".join("<a href='%s$N2'>x</a>" % scheme for scheme in (
        "ftp://127.0.0.1/", "file:///", "data:,", "javascript:1//", "mailto:",
        "git+https://x/")) + link(1)), ONE),
    Row("spaces-and-lines-in-href", sent("<a href=' \n/f/$P-\n1.0.tar\t.gz#sha256=$S1 \n'>x</a>"),
        ONE),
    Row("space-in-the-name", sent("<a href='/f/$P 1.0.zip'>x</a>"), {"$P 1.0.zip": {"hash": None}}),
    Row("escaped-name", sent("<a href='/f/$P-1.0%2Blocal.zip'>x</a>"),
        {"$P-1.0+local.zip": {"hash": None}}),
    Row("query", sent("<a href='$F1?a=1&amp;b=2&copy=3&reg=4#sha256=$S1'>x</a>"), ONE,
        elsewhere={"/f/query-1.0.tar.gz?a=1&b=2&copy=3&reg=4": sent("bytes of query-1.0.tar.gz")}),
    Row("entities",
        sent("<a href='&#47;f&#x2F;$P&#45;1.0.tar&period;gz#sha256&equals;$S1'"
             " data-yanked='&lt;&copy;&notit;&#0;&#9999999999;&'>"),
        {1: {"yanked": "<\u00a9&notit;\ufffd\ufffd&"}}),
    Row("base", sent("<base href='/f/'><a href='$N1#sha256=$S1'>x</a>"), ONE),
    Row("base-with-host", sent("<base target=x href='$UP/f/x/y'><a href='../$N1#sha256=$S1'>x</a>"),
        ONE),
    Row("base-after-the-links", sent("<a href='$N1#sha256=$S1'>x</a><base href='/f/'>"), ONE),
    Row("the-first-of-two-bases",
        sent("<base href='/f/'><base href='/none/'><a href='$N1#sha256=$S1'>x</a>"), ONE),
    Row("empty-base", sent("<base href=''><base>" + link(1)), ONE),
    Row("base-that-is-no-url", sent("<base href='http://[/'>" + link(1)), ONE),
    Row("no-href",
        sent("<a name=top>x</a><a href>x</a><a href=''>x</a><a href='#top'>x</a><a href='?C=M'>x</a>"
             "<a href='../'>x</a>" + link(1)), ONE),
    Row("extension-in-capitals", sent("<a href='/f/$P-1.0.ZIP'>x</a>"),
        {"$P-1.0.ZIP": {"hash": None}}),
    Row("letters-of-the-world", sent("<a href='/f/$P-1.0.caf\u00e9.zip'>x</a>"),
        {"$P-1.0.caf\u00e9.zip": {"hash": None}}),
    Row("another-project",
        sent("<a href='/f/other-1.0.tar.gz'>x</a><a href='/f/$P.txt'>x</a>" + link(1)), ONE),
    Row("name-in-another-spelling", sent("<a href='/f/Name.In_Another__Spelling-1.0.zip'>x</a>"),
        {"Name.In_Another__Spelling-1.0.zip": {"hash": None}}),
    Row("twice", sent(link(1, fragment="") + link(1) + link(1, fragment="#sha256=" + OTHER)), ONE),
    # -- hashes
    Row("no-hash", fragment(""), HASHLESS),
    Row("md5", fragment("#md5=$M1"), {1: {"hash": "md5"}}),
    Row("wrong-md5", fragment("#md5=" + "b" * 32), {1: {"gets": 502, "hash": ...}}),
    Row("wrong-sha256", fragment("#sha256=" + OTHER), {1: {"gets": 502, "hash": ...}}),
    Row("egg-and-hash", fragment("#egg=x&amp;sha256=$S1"), ONE),
    Row("egg-and-wrong-hash", fragment("#egg=x&amp;sha256=" + OTHER),
        {1: {"gets": 502, "hash": ...}}),
    Row("hash-and-subdirectory", fragment("#sha256=$S1&subdirectory=x"), ONE),
    Row("hash-semicolon-egg", fragment("#sha256=$S1;egg=x"), ONE),
    Row("wrong-hash-and-subdirectory", fragment("#subdirectory=a%26b&egg=x&sha256=" + OTHER + "&x"),
        {1: {"gets": 502, "hash": ...}}),
    Row("two-hashes", fragment("#md5=" + "b" * 32 + "&sha256=$S1"), ONE),
    Row("egg-alone", fragment("#egg=x"), HASHLESS),
    Row("empty-hash", fragment("#sha256="), HASHLESS),
    Row("hash-in-capitals", fragment("#sha256=$U1"), ONE),
    Row("algorithm-in-capitals", fragment("#SHA256=$S1"), ONE),
    Row("wrong-hash-in-capitals", fragment("#SHA256=" + OTHER.upper()),
        {1: {"gets": 502, "hash": ...}}),
    Row("spaces-around-the-hash", fragment("# sha256 = $S1 "), ONE),
    Row("escaped-hash", fragment("#sha256%3D$S1%20"), ONE),
    Row("sha512", fragment("#sha512=$L1"), {1: {"hash": "sha512"}}),
    Row("an-unknown-algorithm", fragment("#crc32=abcd"), HASHLESS),
    Row("sha-256", fragment("#sha-256=" + OTHER), HASHLESS),
    Row("a-damaged-hash", sent(link(2, fragment="#sha256=abc") + link(1)), ONE),
    Row("a-hash-of-other-letters", sent(link(2, fragment="#sha256=" + "z" * 64) + link(1)), ONE),
    Row("a-damaged-and-a-sound-hash", fragment("#sha256=abc&md5=$M1"), {1: {"hash": "md5"}}),
    # -- what a link says of its file
    Row("requires-python", one_html('data-requires-python="&gt;=3.6"'),
        {1: {"requires_python": ">=3.6"}}),
    Row("requires-python-not-escaped", one_html('data-requires-python=">=3.6,<4"'),
        {1: {"requires_python": ">=3.6,<4"}}),
    Row("requires-python-escaped-twice", one_html('data-requires-python="&amp;gt;=3.6"'),
        {1: {"requires_python": ">=3.6"}}),
    Row("requires-python-odd", one_html('data-requires-python=" >= 3.6.*,\n< 4 "'),
        {1: {"requires_python": ">= 3.6.*, < 4"}}),
    Row("requires-python-empty", one_html('data-requires-python="" data-gpg-sig'),
        {1: {"requires_python": ABSENT}}),
    Row("yanked", one_html('data-yanked="a &quot;bug&quot;"'), {1: {"yanked": 'a "bug"'}}),
    Row("yanked-without-reason", one_html('data-yanked=""'), {1: {"yanked": True}}),
    Row("yanked-without-value", one_html("data-yanked"), {1: {"yanked": True}}),
    Row("not-yanked", one_html(), {1: {"yanked": ABSENT}}),
    Row("metadata-not-offered", one_html('data-core-metadata="false"'),
        {1: {"core_metadata": ABSENT}}),
    # -- JSON
    Row("json-without-meta", sent({"files": [entry()]}, SIMPLE_JSON), ONE),
    Row("json-meta-null", page(entry(), meta=None), ONE),
    Row("json-version-null", page(entry(), meta={"api-version": None}), ONE),
    Row("json-version-number", page(entry(), meta={"api-version": 1.0}), ONE),
    refused("json-version-2", page(entry(), meta={"api-version": "2.0"}), "API version '2.0'"),
    refused("json-version-number-2", page(entry(), meta={"api-version": 2}), "API version '2'"),
    refused("json-version-odd", page(entry(), meta={"api-version": ["1.0"]}), "not a simple page"),
    refused("json-without-files", sent({"meta": {"api-version": "1.0"}, "name": "x"}, SIMPLE_JSON),
            "no files"),
    refused("json-files-null", page(files=None), "its files are no array"),
    refused("json-files-object", page(files={"1": entry()}), "its files are no array"),
    refused("json-error", sent({"message": "please log in"}, SIMPLE_JSON), "no files"),
    refused("json-trailing-garbage", sent(json.dumps(page(entry())[1].decode()) + "x", SIMPLE_JSON),
            "not a simple page"),
    refused("json-cut", sent(page(entry())[1][:-3], SIMPLE_JSON), "not a simple page"),
    refused("json-ends-behind-a-comma", sent('{"files":[{"a":1},', SIMPLE_JSON),
            "it ends inside of an array"),
    refused("json-ends-behind-a-comma-and-blanks", sent('{"files":[1, \n', SIMPLE_JSON),
            "it ends inside of an array"),
    refused("json-ends-behind-a-bracket", sent('{"files":[', SIMPLE_JSON),
            "it ends inside of an array"),
    refused("json-list", sent("[]", SIMPLE_JSON), "not a simple page"),
    Row("json-unknown-keys", page(entry(x={"y": [1, None]}, gpg_sig=True), x=1, name=None,
                                  versions=None, **{"project-status": None}), ONE),
    Row("json-versions-a-text", page(entry(), versions="12"), {1: {}}, versions=["1.0"]),
    Row("json-versions-a-number", page(entry(), versions=5), {1: {}}, versions=["1.0"]),
    Row("json-versions-odd", page(entry(), versions=[None, 5, "", "2.0", ["3.0"], "a\nb"]), {1: {}},
        versions=["2.0", "1.0"]),
    Row("json-status-odd", page(entry(), **{"project-status": 5, "meta": {"project-status": [1]}}), ONE),
    Row("json-status-unknown", page(entry(), **{"project-status": {"status": ["x"]}}), ONE),
    Row("json-entries-that-are-none", page(None, 5, "x", [], {}, entry()), ONE),
    Row("json-all-keys-null", page(entry(size=None, yanked=None, requires_python=None,
                                         upload_time=None, core_metadata=None, provenance=None)),
        {1: {"yanked": ABSENT, "requires_python": ABSENT, "size": ABSENT, "core_metadata": ABSENT,
             "provenance": ABSENT}}),
    Row("json-all-keys-odd", page(entry(size="5", yanked=[], requires_python=3, upload_time=5,
                                        core_metadata="x", provenance=1)),
        {1: {"yanked": ABSENT, "requires_python": ABSENT, "size": ABSENT, "core_metadata": ABSENT,
             "provenance": ABSENT}}),
    Row("json-hashes-null", page(entry(hashes=None)), HASHLESS),
    Row("json-hashes-missing", page(entry(hashes=...)), HASHLESS),
    Row("json-hashes-list", page(entry(hashes=[])), HASHLESS),
    Row("json-hash-null", page(entry(hashes={"sha256": None, "md5": "$M1"})), {1: {"hash": "md5"}}),
    Row("json-hash-in-capitals", page(entry(hashes={"SHA256": " $U1 "})), ONE),
    Row("json-hash-damaged", page(entry(2, hashes={"sha256": "zz"}), entry(2, hashes={"sha256": 5}),
                                  entry()), ONE),
    Row("json-hash-in-the-fragment", page(entry(hashes={}, url="$F1#egg=x&sha256=" + OTHER)),
        {1: {"gets": 502, "hash": ...}}),
    Row("json-hash-twice", page(entry(url="$F1#sha256=" + OTHER)), ONE),
    Row("json-twice", page(entry(hashes={}), entry()), ONE),
    Row("json-no-filename", page(entry(filename=...), entry(2, filename=None)), TWO),
    Row("json-filename-odd", page(entry(2, filename=5), entry(2, filename=""),
                                  entry(2, filename="a/b"), entry()), ONE),
    Row("json-url-odd", page(entry(2, url=None), entry(2, url=5), entry(2, url="ftp://x/y"),
                             entry(url=" $UP$F1\n")), ONE),
    Row("json-url-without-scheme", page(entry(url="//$HOST$F1")), ONE),
    Row("json-another-name-than-the-url", page(entry(url="/g/blob", hashes={"sha256": "$S1"})), ONE,
        elsewhere={"/g/blob": sent("bytes of json-another-name-than-the-url-1.0.tar.gz")}),
    Row("json-yanked-false", page(entry(yanked=False)), {1: {"yanked": ABSENT}}),
    Row("json-yanked-0", page(entry(yanked=0)), {1: {"yanked": ABSENT}}),
    Row("json-yanked-true", page(entry(yanked=True)), {1: {"yanked": True}}),
    Row("json-yanked-empty", page(entry(yanked="")), {1: {"yanked": True}}),
    Row("json-yanked-reason", page(entry(yanked="a\nbug")), {1: {"yanked": "a bug"}}),
    Row("json-requires-python-escaped", page(entry(requires_python="&gt;=3.6")),
        {1: {"requires_python": ">=3.6"}}),
    Row("json-time", page(entry(upload_time="2024-01-02T03:04:05+01:00")),
        {1: {"upload_time": "2024-01-02T02:04:05.000000Z"}}),
    Row("json-large-number", page(entry(size=10 ** 400)), {1: {"size": ABSENT}}),
    # -- sizes: with a hash they are hints
    Row("size", page(entry(size=len("bytes of size-1.0.tar.gz"))),
        {1: {"size": len("bytes of size-1.0.tar.gz")}}),
    Row("size-0", page(entry(size=0)), {1: {"size": ABSENT}}),
    Row("size-negative", page(entry(size=-1)), {1: {"size": ABSENT}}),
    Row("size-too-small", page(entry(size=5)), ONE),
    Row("size-too-large", page(entry(size=1 << 50)), ONE),
    Row("size-too-small-md5", page(entry(size=5, hashes={"md5": "$M1"})), {1: {"hash": "md5"}}),
    Row("size-0-without-hash", page(entry(size=0, hashes={})), HASHLESS),
    Row("size-wrong-without-hash", page(entry(size=5, hashes={})),
        {1: {"hash": None, "gets": 502}}),
    Row("size-wrong-and-hash-wrong", page(entry(size=5, hashes={"sha256": OTHER})),
        {1: {"hash": ..., "gets": 502}}),
    Row("size-wrong-chunked", page(entry(size=5)), ONE, elsewhere={
        "/f/size-wrong-chunked-1.0.tar.gz": chunked("bytes of size-wrong-chunked-1.0.tar.gz", 3,
                                                    10)}),
    Row("file-encoded", page(entry()), ONE, elsewhere={
        "/f/file-encoded-1.0.tar.gz": sent("bytes of file-encoded-1.0.tar.gz",
                                           Content_Encoding="x-gzip")}),
    Row("file-redirected", page(entry()), ONE, elsewhere={
        "/f/file-redirected-1.0.tar.gz": sent(status=302, Location="/g/x?y=z"),
                                                          "/g/x?y=z": sent("bytes of file-redirected-1.0.tar.gz")}),
    Row("file-until-the-end", page(entry(size=5, hashes={"md5": "$M1"})), {1: {"hash": "md5"}},
        elsewhere={
        "/f/file-until-the-end-1.0.tar.gz": sent("bytes of file-until-the-end-1.0.tar.gz",
                                                 version="1.0", Content_Length=None)}),
    Row("file-gone", page(entry()), {1: {"gets": 404}},
        elsewhere={"/f/file-gone-1.0.tar.gz": sent("no", status=404)}),
    Row("file-forbidden", page(entry()), {1: {"gets": 502}},
        elsewhere={"/f/file-forbidden-1.0.tar.gz": sent("no", status=403)}),
    Row("file-cut", page(entry()), {1: {"gets": 502}}, elsewhere={
        "/f/file-cut-1.0.tar.gz": sent("bytes of fil", Content_Length="38", Connection="close")}),
]


# -- the upstream


class Odd(Scripted):
    """Sends what `ROWS` say, byte by byte, and files whose bytes are "bytes of " and their name."""

    def __init__(self):
        super().__init__()
        self.host = "127.0.0.1:%d" % self.port
        for row in ROWS:
            for path, response in {"/simple/%s/" % row.name: row.response, **row.elsewhere}.items():
                self.answers[path] = self.filled(row.name, response)

    def words(self, project):
        words = {"P": project, "UP": "http://" + self.host, "HOST": self.host,
                 "PORT": self.host.partition(":")[2]}
        words["W1"] = project.replace("-", "_") + "-1.0-py3-none-any.whl"
        for number in (1, 2):
            name = "%s-%d.0.tar.gz" % (project, number)
            data = content(name)
            words.update({"N%d" % number: name, "F%d" % number: "/f/" + name,
                          "S%d" % number: hashlib.sha256(data).hexdigest(),
                          "U%d" % number: hashlib.sha256(data).hexdigest().upper(),
                          "M%d" % number: hashlib.md5(data).hexdigest(),
                          "L%d" % number: hashlib.sha512(data).hexdigest()})
        return words

    def filled(self, project, response):
        """The bytes of a response, its $names replaced."""
        head, body, travel = (*response, bytes)[:3]
        words = self.words(project)
        body = string.Template(body.decode("latin-1")).safe_substitute(words)
        body = travel(body.encode("latin-1"))
        head = string.Template(head).safe_substitute(words, LENGTH=len(body))
        return head.encode("latin-1") + body

    def answer_to(self, path):
        data = self.answers.get(path)
        if data is None and path.startswith("/f/"):
            return content(urllib.parse.unquote(path[3:]))
        return None if data is None else functools.partial(self.send, data)

    def send(self, data, handler):
        handler.wfile.write(data)
        head = data.partition(b"\r\n\r\n")[0].lower()
        handler.close_connection = (
            b"http/1.1" not in head or b"connection: close" in head or b"chunked" in head)


def content(name):
    return b"bytes of " + name.encode()


@pytest.fixture(scope="module")
def odd():
    with Odd() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def server(tmp_path_factory, odd):
    """One server with a mirror of all rows."""
    server = Server(tmp_path_factory.mktemp("odd") / "data").start()
    server.add_user("mia")
    server.add_mirror("mia/m", "http://%s/simple/" % odd.host, mirror_cache_expiry=0)
    yield server
    server.kill()


def fetched(server, path):
    """(status, body) of a file; 502 also where the connection broke before its end."""
    try:
        reply = server.get(path, headers={"Accept": "*/*"})
    except (http.client.HTTPException, ConnectionError):
        return 502, b""
    return reply.status, reply.body


# -- the table


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_an_odd_upstream(server, odd, row):
    path = "/mia/m/+simple/%s/" % row.name
    reply = server.get(path, headers={"Accept": SIMPLE_JSON})
    assert reply.status == row.status, reply
    assert row.says in reply.text.replace("&#x27;", "'")
    if row.status != 200:
        return
    words = odd.words(row.name)
    wanted = {words.get("N%s" % name) or string.Template(name).substitute(words): what
              for name, what in row.files.items()}
    found = {file["filename"]: file for file in reply.json()["files"]}
    assert list(found) == list(wanted)
    assert row.versions is None or reply.json()["versions"] == row.versions
    for name, what in wanted.items():
        what, file, path = dict(what), found[name], "/mia/m/" + found[name]["url"].replace("../", "")
        algorithm, gets = what.pop("hash", "sha256"), what.pop("gets", 200)
        metadata = what.pop("metadata", None)
        if algorithm is None:
            assert file["hashes"] == {}
        elif algorithm is not ...:
            digest = hashlib.new(algorithm, content(name)).hexdigest()
            assert file["hashes"] == {algorithm: digest}
        for key, value in what.items():
            assert file.get(key.replace("_", "-"), ABSENT) == value, key
        if metadata:
            assert fetched(server, path + ".metadata") == (200, metadata.encode())
        if gets:
            status, body = fetched(server, path)
            assert status == gets
            assert status != 200 or body == content(name)


def test_the_rows_have_names_of_their_own():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("project", ["size-too-small", "size-0", "size-too-large"])
def test_the_size_that_was_measured_stays(server, odd, project):
    """Upstream goes on to say what is wrong, and the page is fetched anew each time."""
    name = project + "-1.0.tar.gz"
    assert server.fetch("mia/m", name, project) == content(name)
    for _ in range(2):
        file, = server.simple("mia/m", project)["files"]
        assert file["size"] == len(content(name))
    odd.answers["/f/" + name] = odd.filled(project, sent("gone", status=404))
    assert server.fetch("mia/m", name, project) == content(name)        # so it is here
