"""Documentation: zips that are uploaded, shown member by member straight out of the zip, and never trusted."""

import bz2
import email.utils
import hashlib
import io
import itertools
import random
import re
import struct
import threading
import time
import typing
import zipfile
import zlib

import pytest

import harness
from harness import BROWSER, links, rels, sdist, serial, submit, wheel

STRINGS = (
    "name version metadata_version summary home_page author author_email maintainer maintainer_email license description keywords "
    "download_url comment requires_python description_content_type license_expression").split()
LISTS = (
    "platform classifiers supported_platform provides requires obsoletes project_urls provides_dist obsoletes_dist requires_dist "
    "requires_external provides_extras dynamic license_file").split()
SANDBOX = (
    "sandbox allow-scripts allow-popups allow-forms; default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "connect-src 'self'")
CHALLENGE = 'Basic realm="pypi"'
MIB = 1 << 20


# Zips, made by hand: `zipfile` refuses to write what some tests need


class Member(typing.NamedTuple):
    """An entry of a zip. What is None follows from the content; `packed` are its bytes as they lie in the zip."""
    name: typing.Union[str, bytes]
    content: bytes = b""
    method: int = 8                 # 0 stored, 8 deflated
    mode: int = 0o100644            # as stat() gives it
    flags: int = 0x800              # the name is UTF-8
    size: typing.Optional[int] = None
    crc: typing.Optional[int] = None
    packed: typing.Optional[bytes] = None
    local_name: typing.Optional[bytes] = None
    offset: typing.Optional[int] = None


def docs_zip(*members, count=None, comment=b""):
    """The bytes of a zip of Members, (name, content) pairs or names. `count`: how many members its end claims."""
    body, directory = bytearray(), bytearray()
    number = 0
    for number, given in enumerate(members, 1):
        member = given if isinstance(given, Member) else Member(*([given] if isinstance(given, str) else given))
        name = member.name.encode() if isinstance(member.name, str) else member.name
        local_name = name if member.local_name is None else member.local_name
        packed = member.packed
        if packed is None:
            packed = deflated(member.content) if member.method == 8 else member.content
        facts = struct.pack(
            "<4H3L", member.flags, member.method, 0x6000, 0x5822,
            zlib.crc32(member.content) if member.crc is None else member.crc, len(packed),
            len(member.content) if member.size is None else member.size)
        offset = len(body) if member.offset is None else member.offset
        body += b"PK\3\4" + struct.pack("<H", 20) + facts + struct.pack("<2H", len(local_name), 0) + local_name + packed
        directory += b"PK\1\2" + struct.pack("<2H", 3 << 8 | 20, 20) + facts
        directory += struct.pack("<5H2L", len(name), 0, 0, 0, 0, member.mode << 16, offset) + name
    claimed = number if count is None else count
    end = struct.pack("<4H2LH", 0, 0, claimed, claimed, len(directory), len(body), len(comment))
    return bytes(body + directory + b"PK\5\6" + end + comment)


def deflated(content):
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    return packer.compress(content) + packer.flush()


def large(name, mebibytes):
    """A member that honestly unpacks to so many MiB, from about a hundredth of that."""
    block = random.Random(1).randbytes(9000) + bytes(MIB - 9000)
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    packed = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    crc = 0
    for _ in range(mebibytes):
        crc = zlib.crc32(block, crc)
    return Member(name, size=mebibytes * MIB, crc=crc, packed=packed * mebibytes + b"\x03\x00")


def renamed(member, count):
    return [member._replace(name="%d-%s" % (number, member.name)) for number in range(count)]


def noise(size, seed=1):
    return random.Random(seed).randbytes(size)


def guide(text="guide"):
    """The zip of a small documentation; another text makes another zip."""
    title = text.encode()
    return docs_zip(("index.html", b"<h1>%s</h1>" % title), ("sub/page.html", b"<h1>%s, page</h1>" % title))


# Helpers


@pytest.fixture(scope="module")
def site(shared_server):
    """`doc/dev` (volatile), `doc/stable` (not), `doc/child` with both as bases, `doc/mirror`; `stranger` may do nothing there."""
    for name in ("doc", "stranger", "reader"):
        shared_server.add_user(name)
        shared_server.login(name, "pw")
    shared_server.login("root", "secret")
    shared_server.add_index("doc/dev", volatile=True)
    shared_server.add_index("doc/stable", volatile=False)
    shared_server.add_index("doc/child", bases=["doc/dev", "doc/stable"])
    shared_server.add_index("doc/mirror", type="mirror", mirror_url="http://127.0.0.1:9/simple/")
    return shared_server


def upload(server, index, name, version, content, user="doc", filename="any.zip", accept="application/json"):
    """A doc_upload; without the field `name` or `version` if it is None, without a file if `content` is."""
    fields = {":action": "doc_upload", "name": name, "version": version}
    fields = {field: value for field, value in fields.items() if value is not None}
    files = {} if content is None else {"content": (filename, content)}
    return server.post_form(index, fields, files, user, {"Accept": accept})


def add_docs(server, index, name, version, content, **options):
    reply = upload(server, index, name, version, content, **options)
    assert (reply.status, reply.reason) == (200, "OK"), reply
    return reply


# what each page of documentation gets before its head's first element
SCRIPT_OF_OURS = re.compile(rb"<script>for[(]const n of.*?</script>", re.S)


def get(server, path, method="GET", accept=BROWSER, **headers):
    return without_script(harness.get(server, path, method, accept, **headers))


def without_script(reply):
    """A page of documentation, which must have our script once, without it; other replies as they are."""
    is_page = reply.headers.get("Content-Type") == "text/html" and reply.status == 200 and reply.body
    if is_page:
        assert reply.headers.get("Content-Length") == str(len(reply.body))
        above, below = SCRIPT_OF_OURS.split(reply.body)
        reply.body = above + below
    return reply


def with_script(server, path, content):
    """A page as it is served: ours stands above all that these pages have."""
    if not path.endswith(".html"):
        return content
    [script] = SCRIPT_OF_OURS.findall(harness.get(server, doc("shelf")).body)
    return script + content


def doc(project, path="index.html", version="1.0", index="doc/dev"):
    return "/%s/%s/%s/+doc/%s" % (index, project, version, path)


def path_of(content, project, version="1.0", index="doc/dev"):
    """Where the zip itself lies."""
    digest = hashlib.sha256(content).hexdigest()
    return "/%s/+f/%s/%s/%s-%s.doc.zip" % (index, digest[:3], digest[3:16], project, version)


def state(server, project, version="1.0", index="doc/dev"):
    """The serial, and all that shows of a project and of its documentation (the words of a 404 do not count)."""
    shown = [server.get("/%s/%s" % (index, project)), server.get("/%s/+simple/%s/" % (index, project)),
             get(server, doc(project, version=version, index=index))]
    return [serial(server)] + [(reply.status, reply.body if reply.status == 200 else None) for reply in shown]


def refused(reply, status, phrase=None):
    """Whether an upload was refused so, with a sentence that is phrase and message; the former has the status in words too."""
    assert reply.status == status, reply
    message = reply.json()["message"]
    word = {401: "Unauthorized: ", 403: "Forbidden: "}.get(status, "")
    assert reply.reason == word + message
    if phrase is None:
        assert len(message) > len("Bad Request") and " " in message
    else:
        assert message == phrase or phrase.endswith("...") and message.startswith(phrase[:-3])
    return True


# Uploading


def test_documentation_attaches_to_a_release(site):
    archive, content = wheel("attached", "1.0"), guide()
    assert site.upload("doc/dev", archive).status == 200
    before, metadata, start = serial(site), site.get("/doc/dev/attached/1.0").result, time.gmtime(time.time() - 1)[:6]
    [file_link] = metadata.pop("+links")
    reply = add_docs(site, "doc/dev", "attached", "1.0", content)
    assert (reply.body, reply.headers.get("Content-Type")) == (b"", "text/html; charset=UTF-8")
    assert (serial(site), reply.headers.get("X-DEVPI-SERIAL")) == (before + 1, str(before + 1))
    shown = site.get("/doc/dev/attached/1.0").result
    first, second = shown.pop("+links")
    assert shown == metadata
    assert first == file_link
    [entry] = second.pop("log")
    assert tuple(start) <= tuple(entry.pop("when")) <= tuple(time.gmtime()[:6])
    assert entry == {"what": "upload", "who": "doc", "dst": "doc/dev"}
    digest = hashlib.sha256(content).hexdigest()
    assert second == {
        "rel": "doczip", "hash_spec": "sha256=" + digest, "hashes": {"sha256": digest},
        "href": site.url + path_of(content, "attached")}
    assert get(site, doc("attached")).body == b"<h1>guide</h1>"


@pytest.mark.parametrize("filename", [
    "attached.zip", "Other-9.9.doc.zip", "no-ending", "docs.tar.gz", "../../evil.zip", "a\\b.zip", "\u00e4.zip"])
def test_the_stored_name_follows_from_project_and_version_alone(site, filename):
    content = guide("name of " + filename)
    add_docs(site, "doc/dev", "Stored.Name_X", "1.0", content, filename=filename)
    [link] = links(site, "doc/dev/stored-name-x/1.0")
    assert link["href"] == site.url + path_of(content, "stored-name-x")
    assert get(site, path_of(content, "stored-name-x")).body == content


def test_an_unknown_version_is_registered(site):
    before = serial(site)
    add_docs(site, "doc/dev", "Only.Docs", "1.0", guide())
    assert serial(site) == before + 1
    shown = site.get("/doc/dev/only-docs/1.0").result
    assert [link["rel"] for link in shown.pop("+links")] == ["doczip"]
    expected = {key: "" for key in STRINGS}
    expected.update({key: [] for key in LISTS})
    expected.update(name="Only.Docs", version="1.0")
    assert dict(shown, metadata_version="") == expected
    assert "only-docs" in site.get("/doc/dev").result["projects"]


def test_a_known_version_keeps_its_metadata(site):
    assert site.upload("doc/dev", sdist("keeper", "1.0"), fields={"author": "Ann", "classifiers": ["A :: B"]}).status == 200
    add_docs(site, "doc/dev", "keeper", "1.0", guide())
    shown = site.get("/doc/dev/keeper/1.0").result
    assert (shown["author"], shown["classifiers"], shown["summary"]) == ("Ann", ["A :: B"], "A test package")


def test_without_a_version_the_latest_release_is_meant(site):
    for version in ("1.9", "1.10", "1.2"):
        submit(site, "doc/dev", "derived", version)
    add_docs(site, "doc/dev", "Derived", None, guide())
    assert [rels(site, "doc/dev/derived/%s" % version) for version in ("1.2", "1.9", "1.10")] == [[], [], ["doczip"]]
    submit(site, "doc/dev", "derived", "2.0rc1")
    add_docs(site, "doc/dev", "derived", None, guide("candidate"))
    assert get(site, doc("derived", version="2.0rc1")).body == b"<h1>candidate</h1>"
    assert get(site, doc("derived", version="1.10")).body == b"<h1>guide</h1>"


@pytest.mark.parametrize("index", ["doc/dev", "doc/child"])
def test_without_a_version_and_a_release_on_this_index_there_is_nothing_to_attach_to(site, index):
    submit(site, "doc/stable", "underived", "1.0")
    before = state(site, "underived", index=index)
    reply = upload(site, index, "underived", None, guide())
    assert refused(reply, 400, "doczip has no version and 'underived' has no releases to derive one from")
    assert state(site, "underived", index=index) == before


def test_an_empty_version_is_no_version(site):
    submit(site, "doc/dev", "emptyversion", "1.0")
    before = state(site, "emptyversion")
    reply = upload(site, "doc/dev", "emptyversion", "", guide())
    assert refused(reply, 400, 'invalid metadata: Missing required field "version"')
    assert state(site, "emptyversion") == before


@pytest.mark.parametrize("index, user, name, version, content, status, phrase", [
    ("doc/none", "doc", "refused", "1.0", guide(), 404, None),
    ("doc/mirror", "doc", "refused", "1.0", guide(), 404, "cannot submit to mirror index doc/mirror, which caches another server..."),
    ("doc/dev", "stranger", "refused", "1.0", guide(), 403, "no permission to submit to doc/dev: doc may"),
    ("doc/dev", "stranger", "refused", "1.0", None, 403, "no permission to submit to doc/dev: doc may"),
    ("doc/dev", "root", "refused", "1.0", guide(), 403, "no permission to submit to doc/dev: doc may"),
    ("doc/dev", None, "refused", "1.0", guide(), 401, None),
    ("doc/dev", "doc", "refused", "1.0", None, 400, "content file field not found"),
    ("doc/dev", "doc", None, "1.0", guide(), 400, 'invalid metadata: Missing required field "name"'),
    ("doc/dev", "doc", "", "1.0", guide(), 400, 'invalid metadata: Missing required field "name"'),
    ("doc/dev", "doc", "-refused", "1.0", guide(), 400, None),
    ("doc/dev", "doc", "refused/..", "1.0", guide(), 400, None),
    ("doc/dev", "doc", "refused", "1#0", guide(), 400, "invalid metadata: Invalid package name or version (URL safety)"),
    ("doc/dev", "doc", "refused", "../1.0", guide(), 400, None),
    ("doc/dev", "doc", "refused", "1\\0", guide(), 400, None),
    ("doc/dev", "doc", "refused", "1.0\r\nX-Evil: 1", guide(), 400, None),
    ("doc/dev", "doc", "refused", "1.0\0", guide(), 400, None),
])
def test_every_refusal_has_its_status_and_changes_nothing(site, index, user, name, version, content, status, phrase):
    before = state(site, "refused")
    reply = upload(site, index, name, version, content, user=user)
    assert refused(reply, status, phrase)
    assert reply.headers.get("WWW-Authenticate") == (CHALLENGE if status == 401 else None)
    assert reply.headers.get("X-Evil") is None
    assert state(site, "refused") == before
    assert [shown[0] for shown in before[1:4]] == [404, 404, 404]


# Again


def test_a_volatile_index_replaces_the_documentation_of_the_version(site):
    archive = wheel("replaced", "1.0")
    assert site.upload("doc/dev", archive).status == 200
    contents = [guide("one"), guide("two"), guide("three")]
    etags = set()
    for count, content in enumerate(contents):
        add_docs(site, "doc/dev", "replaced", "1.0", content)
        file_link, docs_link = links(site, "doc/dev/replaced/1.0")
        assert (file_link["rel"], docs_link["rel"]) == ("releasefile", "doczip")
        assert docs_link["href"] == site.url + path_of(content, "replaced")
        overwrite = [(entry["count"], entry["who"]) for entry in docs_link["log"] if entry["what"] == "overwrite"]
        assert overwrite == ([(count, None)] if count else [])
        assert [entry["what"] for entry in docs_link["log"]] == ["overwrite"] * bool(count) + ["upload"]
        page = get(site, doc("replaced"))
        assert page.body == b"<h1>%s</h1>" % (b"one", b"two", b"three")[count]
        etags.add(page.headers.get("ETag"))
    assert len(etags) == 3
    assert [get(site, path_of(content, "replaced")).status for content in contents] == [410, 410, 200]
    assert site.fetch("doc/dev", archive.filename, "replaced") == archive.content


def test_what_a_newer_zip_does_not_hold_is_not_shown_any_more(site):
    add_docs(site, "doc/dev", "shrunk", "1.0", guide())
    assert get(site, doc("shrunk", "sub/page.html")).status == 200
    add_docs(site, "doc/dev", "shrunk", "1.0", docs_zip(("index.html", b"alone")))
    assert [get(site, doc("shrunk", path)).status for path in ("index.html", "sub/page.html", "sub/")] == [200, 404, 404]


def test_the_same_zip_again_on_a_volatile_index_stays_served(site):
    for what in (["upload"], ["overwrite", "upload"]):
        add_docs(site, "doc/dev", "sameagain", "1.0", guide())
        [link] = links(site, "doc/dev/sameagain/1.0")
        assert [entry["what"] for entry in link["log"]] == what
        assert get(site, path_of(guide(), "sameagain")).body == guide()
        assert get(site, doc("sameagain")).body == b"<h1>guide</h1>"


def test_a_non_volatile_index_takes_the_identical_zip_and_stores_nothing(site):
    add_docs(site, "doc/stable", "kept", "1.0", guide())
    before = state(site, "kept", index="doc/stable")
    for filename in ("any.zip", "other.zip"):
        reply = upload(site, "doc/stable", "Kept", "1.0", guide(), filename=filename)
        assert (reply.status, reply.reason) == (200, "Upload of identical file to non volatile index.")
    assert state(site, "kept", index="doc/stable") == before


def test_a_non_volatile_index_refuses_another_zip(site):
    add_docs(site, "doc/stable", "settled", "1.0", guide())
    before = state(site, "settled", index="doc/stable")
    reply = upload(site, "doc/stable", "settled", "1.0", guide("other"), filename="sent-as.zip")
    assert refused(reply, 409, "sent-as.zip already exists in non-volatile index")
    assert state(site, "settled", index="doc/stable") == before
    add_docs(site, "doc/stable", "settled", "1.1", guide("other"))
    assert get(site, doc("settled", version="1.1", index="doc/stable")).body == b"<h1>other</h1>"


def test_each_version_and_each_index_has_documentation_of_its_own(site):
    for index, version in itertools.product(("doc/stable", "doc/child"), ("1.0", "1.0.0", "2.0")):
        add_docs(site, index, "several", version, guide(index + version))
    for index, version in itertools.product(("doc/stable", "doc/child"), ("1.0", "1.0.0", "2.0")):
        assert get(site, doc("several", version=version, index=index)).text == "<h1>%s%s</h1>" % (index, version)


def test_documentation_of_a_base_is_linked_but_not_shown(site):
    add_docs(site, "doc/dev", "inthebase", "1.0", guide())
    for version in ("1.0", "latest", "stable"):
        assert get(site, doc("inthebase", version=version)).status == 200
        assert get(site, doc("inthebase", version=version, index="doc/child")).status == 404
    [link] = links(site, "doc/child/inthebase/1.0")
    assert (link["rel"], link["href"]) == ("doczip", site.url + path_of(guide(), "inthebase"))


# The zip as a file


def test_the_zip_is_a_file_like_any_other(site):
    content = guide("as a file")
    add_docs(site, "doc/dev", "zipfile", "1.0", content)
    path = path_of(content, "zipfile")
    reply = get(site, path)
    assert (reply.status, reply.body, reply.headers.get("Content-Type")) == (200, content, "application/zip")
    assert reply.headers.get("Cache-Control") == "max-age=365000000, immutable, public"
    piece = get(site, path, Range="bytes=2-9")
    assert (piece.status, piece.body) == (206, content[2:10])
    facts, digest = site.get(path), hashlib.sha256(content).hexdigest()
    record = facts.result
    assert email.utils.parsedate(record.pop("last_modified"))
    assert (facts.json()["type"], record) == ("releasefilemeta", {
        "hash_spec": "sha256=" + digest, "hashes": {"sha256": digest}, "project": "zipfile", "version": "1.0",
        "size": len(content)})
    assert get(site, path + ".metadata").status == 404


def test_installers_never_see_documentation(site):
    archive = wheel("unseen", "1.0")
    assert site.upload("doc/dev", archive).status == 200
    for version in ("1.0", "2.0"):
        add_docs(site, "doc/dev", "unseen", version, guide())
    for index in ("doc/dev", "doc/child"):
        assert site.filenames(index, "unseen") == [archive.filename]
        for agent in (None, "pip/23.1"):
            page = get(site, "/%s/+simple/unseen/" % index, accept="text/html", User_Agent=agent)
            assert page.status == 200
            assert archive.filename in page.text and "doc.zip" not in page.text
    add_docs(site, "doc/dev", "unseendocs", "1.0", guide())
    assert site.filenames("doc/dev", "unseendocs") == []


def test_links_stand_in_the_order_of_their_creation(site):
    add_docs(site, "doc/dev", "ordered", "1.0", guide())
    assert site.upload("doc/dev", wheel("ordered", "1.0")).status == 200
    assert rels(site, "doc/dev/ordered/1.0") == ["doczip", "releasefile"]
    assert [link["rel"] for link in site.get("/doc/dev/ordered").result["1.0"]["+links"]] == ["doczip", "releasefile"]


# Showing it


def numbers(server, content, paths, project="numbered"):
    """The member numbers in the ETags of these paths."""
    found = []
    for path in paths:
        etag = get(server, doc(project, path)).headers.get("ETag")
        digest, number = re.fullmatch(r'"([0-9a-f]{64})-(\d+)-[0-9a-f]{8}"', etag).groups()
        assert digest == hashlib.sha256(content).hexdigest()
        found.append(int(number))
    return found


SCRIPT = b"<script>document.write('guide')</script>"
SHELF = docs_zip(
    ("index.html", SCRIPT), ("packed.html", noise(700000)), Member("stored.html", noise(300000, 2), method=0), ("empty.txt", b""),
    ("repeated.txt", b"".join(b"line %d\n" % number for number in range(150000))), Member("emptystored.txt", b"", method=0))


@pytest.fixture(scope="module")
def shelf(site):
    """`shelf` 1.0 on `doc/dev`: members of several sizes."""
    add_docs(site, "doc/dev", "shelf", "1.0", SHELF)
    return site


def test_a_page_comes_with_headers_that_lock_it_in(shelf):
    reply = get(shelf, doc("shelf"))
    assert (reply.status, reply.body) == (200, SCRIPT)
    assert reply.headers.get("Content-Type").split(";")[0] == "text/html"
    assert reply.headers.get("Content-Length") == str(len(with_script(shelf, "index.html", SCRIPT)))
    assert reply.headers.get_all("Content-Security-Policy") == [SANDBOX]
    assert reply.headers.get("X-Content-Type-Options") == "nosniff"
    assert reply.headers.get("Access-Control-Allow-Origin") == "*"
    assert reply.headers.get("Cache-Control") == "max-age=60"
    assert reply.headers.get("Accept-Ranges") == "bytes"
    assert re.fullmatch(r'"%s-\d+-[0-9a-f]{8}"' % hashlib.sha256(SHELF).hexdigest(), reply.headers.get("ETag"))
    assert reply.headers.get("Content-Disposition") is None
    assert reply.headers.get("Set-Cookie") is None
    assert reply.headers.get("X-DEVPI-API-VERSION") == "2"


@pytest.mark.parametrize("accept", [BROWSER, "text/html", "*/*", "application/json", "image/png", None])
def test_a_page_is_served_whatever_is_accepted(shelf, accept):
    reply = get(shelf, doc("shelf"), accept=accept)
    assert (reply.status, reply.body) == (200, SCRIPT)


@pytest.mark.parametrize("path", ["index.html", "packed.html", "stored.html", "empty.txt", "emptystored.txt", "repeated.txt"])
def test_members_come_whole_and_head_says_the_same(shelf, path):
    content = zipfile.ZipFile(io.BytesIO(SHELF)).read(path)
    full, bare = get(shelf, doc("shelf", path)), get(shelf, doc("shelf", path), "HEAD")
    assert (full.status, full.body == content) == (200, True)
    assert (bare.status, bare.body) == (200, b"")
    assert full.headers.get("Content-Length") == str(len(with_script(shelf, path, content)))
    for name in ("Content-Length", "Content-Type", "ETag", "Cache-Control", "Content-Security-Policy", "X-Content-Type-Options",
                 "Access-Control-Allow-Origin"):
        assert bare.headers.get(name) == full.headers.get(name) is not None


TYPES = [
    ("page.html", {"text/html"}), ("page.htm", {"text/html"}), ("PAGE.HTML", {"text/html"}), ("style.css", {"text/css"}),
    ("search.js", {"text/javascript", "application/javascript"}), ("data.json", {"application/json"}), ("notes.txt", {"text/plain"}),
    ("logo.svg", {"image/svg+xml"}), ("logo.png", {"image/png"}), ("photo.jpg", {"image/jpeg"}), ("anim.gif", {"image/gif"}),
    ("feed.xml", {"text/xml", "application/xml"}), ("book.pdf", {"application/pdf"}), ("font.woff2", {"font/woff2"})]


@pytest.fixture(scope="module")
def types(site):
    names = [name for name, _ in TYPES] + ["data.unknown-type", "noending", "objects.q9z", "archive.tar.gz", "drawing.svgz", "nested.zip"]
    add_docs(site, "doc/dev", "types", "1.0", docs_zip(("index.html", b""), *[(name, name.encode()) for name in names]))
    return site


@pytest.mark.parametrize("name, expected", TYPES)
def test_the_type_goes_by_the_name(types, name, expected):
    reply = get(types, doc("types", name))
    assert (reply.status, reply.text) == (200, name)
    assert reply.headers.get("Content-Type").split(";")[0] in expected
    assert reply.headers.get("X-Content-Type-Options") == "nosniff"
    assert reply.headers.get("Content-Security-Policy") == SANDBOX
    assert not (reply.headers.get("Content-Disposition") or "").startswith("attachment")


@pytest.mark.parametrize("name", ["data.unknown-type", "noending", "objects.q9z"])
def test_what_has_no_known_type_is_handed_out_and_not_shown(types, name):
    reply = get(types, doc("types", name))
    assert (reply.status, reply.text) == (200, name)
    assert reply.headers.get("Content-Type") == "application/octet-stream"
    assert reply.headers.get("Content-Disposition").split(";")[0] == "attachment"
    assert reply.headers.get("Content-Security-Policy") == SANDBOX


@pytest.mark.parametrize("name", ["archive.tar.gz", "drawing.svgz", "nested.zip"])
def test_an_archive_in_the_archive_is_only_bytes(types, name):
    reply = get(types, doc("types", name), Accept_Encoding="gzip")
    assert (reply.status, reply.text, reply.headers.get("Content-Encoding")) == (200, name, None)
    assert get(types, doc("types", name + "/index.html")).status == 404


NAMES = {
    "with space.html": "with%20space.html", "c++.html": "c++.html", "100%.html": "100%25.html", "a%41.html": "a%2541.html",
    "na\u00efve/\u65e5\u672c.html": "na%C3%AFve/%E6%97%A5%E6%9C%AC.html", "what?.html": "what%3F.html", "a#b.html": "a%23b.html",
    "sub/a:b.html": "sub/a:b.html", "...html": "...html", "..a/b..html": "..a/b..html",
    "+doc/+f.html": "+doc/+f.html", "_static/a=b&c;d.css": "_static/a=b&c;d.css", "'\"<b>.html": "'%22%3Cb%3E.html"}


@pytest.fixture(scope="module")
def names(site):
    add_docs(site, "doc/dev", "names", "1.0", docs_zip(("index.html", b""), *[(name, name.encode()) for name in NAMES]))
    return site


@pytest.mark.parametrize("name", sorted(NAMES))
def test_any_harmless_name_is_served(names, name):
    reply = get(names, doc("names", NAMES[name]))
    assert (reply.status, reply.text) == (200, name)


def test_a_path_is_decoded_once(names):
    assert get(names, doc("names", "a%41.html")).status == 404      # that is aA.html
    assert get(names, doc("names", "c%2B%2B.html")).text == "c++.html"
    assert get(names, "/doc/dev/names/1.0/%2Bdoc/c++.html").text == "c++.html"
    assert get(names, doc("names", "c++.html?x=1")).text == "c++.html"


def test_the_etag_numbers_the_members_that_can_be_shown(site):
    content = docs_zip(
        ("index.html", b"a"), Member("sub/", mode=0o040755, method=0), ("sub/b.html", b"b"), ("../c.html", b"c"),
        Member("link.html", b"index.html", mode=0o120777), ("d.html", b"d"))
    add_docs(site, "doc/dev", "numbered", "1.0", content)
    found = numbers(site, content, ["index.html", "sub/b.html", "d.html"])
    assert found in ([0, 1, 2], [1, 2, 3])


def test_a_page_that_the_browser_has_is_not_sent_again(shelf):
    etag = get(shelf, doc("shelf")).headers.get("ETag")
    for value in (etag, "W/" + etag, '"a", %s' % etag, "*"):
        for method in ("GET", "HEAD"):
            reply = get(shelf, doc("shelf"), method, If_None_Match=value)
            assert (reply.status, reply.body) == (304, b"")
            assert (reply.headers.get("ETag"), reply.headers.get("Cache-Control")) == (etag, "max-age=60")
            assert reply.headers.get("Content-Type") is None
    for value in ('"other"', etag.strip('"'), get(shelf, doc("shelf", "packed.html")).headers.get("ETag")):
        assert get(shelf, doc("shelf"), If_None_Match=value).status == 200
    assert get(shelf, doc("shelf"), If_None_Match=etag, Range="bytes=0-1").status == 304


@pytest.mark.parametrize("path", ["packed.html", "stored.html", "repeated.txt"])
def test_a_range_is_answered_with_that_piece(shelf, path):
    content = with_script(shelf, path, zipfile.ZipFile(io.BytesIO(SHELF)).read(path))
    size = len(content)
    for value, first, last in [
            ("bytes=0-0", 0, 0), ("bytes=5-", 5, size - 1), ("bytes=-7", size - 7, size - 1), ("bytes=70000-200000", 70000, 200000),
            ("bytes=65535-65536", 65535, 65536), ("bytes=%d-" % (size - 1), size - 1, size - 1), ("bytes=9-99999999", 9, size - 1)]:
        reply = get(shelf, doc("shelf", path), Range=value)
        assert (reply.status, reply.body == content[first:last + 1]) == (206, True)
        assert reply.headers.get("Content-Range") == "bytes %d-%d/%d" % (first, last, size)
        assert reply.headers.get("Content-Length") == str(last - first + 1)
        assert reply.headers.get("Content-Security-Policy") == SANDBOX
        assert reply.headers.get("X-Content-Type-Options") == "nosniff"


@pytest.mark.parametrize("path, size", [("index.html", len(SCRIPT)), ("packed.html", 700000), ("empty.txt", 0)])
def test_a_range_past_the_end_is_refused_with_the_size(shelf, path, size):
    size = len(with_script(shelf, path, bytes(size)))
    for value in ("bytes=%d-" % size, "bytes=%d-%d" % (size, size + 9), "bytes=-0"):
        reply = get(shelf, doc("shelf", path), Range=value)
        assert (reply.status, reply.headers.get("Content-Range")) == (416, "bytes */%d" % size)


@pytest.mark.parametrize("value", ["bytes=5-2", "bytes=0-1,4-5", "items=0-5", "bytes=a-b", "bytes=", ""])
def test_malformed_and_multiple_ranges_get_the_whole_page(shelf, value):
    reply = get(shelf, doc("shelf"), Range=value)
    assert (reply.status, reply.body) == (200, SCRIPT)


def test_if_range_gives_the_piece_only_of_the_same_page(shelf):
    etag = get(shelf, doc("shelf")).headers.get("ETag")
    assert get(shelf, doc("shelf"), Range="bytes=1-4", If_Range=etag).body == with_script(shelf, ".html", SCRIPT)[1:5]
    for other in ('"other"', "W/" + etag, get(shelf, doc("shelf", "packed.html")).headers.get("ETag")):
        reply = get(shelf, doc("shelf"), Range="bytes=1-4", If_Range=other)
        assert (reply.status, reply.body) == (200, SCRIPT)


def test_many_readers_of_one_zip_do_not_disturb_each_other(shelf):
    contents = {name: zipfile.ZipFile(io.BytesIO(SHELF)).read(name) for name in ("index.html", "packed.html", "stored.html")}
    wrong = []

    def read(turn):
        for name in sorted(contents, reverse=turn % 2)[turn % 3:] + sorted(contents):
            if get(shelf, doc("shelf", name)).body != contents[name]:
                wrong.append(name)
    readers = [threading.Thread(target=read, args=(turn,)) for turn in range(8)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert wrong == []


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "POST", "PUSH"])
def test_pages_can_only_be_read(shelf, method):
    before = state(shelf, "shelf")
    assert shelf.request(method, doc("shelf"), b"evil", user="doc").status == 404
    assert state(shelf, "shelf") == before


# Redirects and directories


@pytest.mark.parametrize("version", ["1.0", "latest", "stable"])
def test_the_bare_path_leads_to_the_index_page(shelf, version):
    for ending in ("+doc", "+doc/"):
        for method in ("GET", "HEAD"):
            reply = get(shelf, "/doc/dev/shelf/%s/%s" % (version, ending), method)
            assert reply.status == 302
            assert reply.headers.get("Location") == shelf.url + doc("shelf", version=version)
    outside = get(shelf, doc("shelf", "", version), X_Outside_URL="https://pypi.org/sub")
    assert outside.headers.get("Location") == "https://pypi.org/sub" + doc("shelf", version=version)


@pytest.mark.parametrize("path", ["index.html", "sub/page.html", "with%20space.html", "c++.html", "100%25.html", "na%C3%AFve.html"])
def test_the_framed_pages_lead_programs_to_the_plain_ones(shelf, path):
    for version in ("1.0", "latest"):
        reply = get(shelf, "/doc/dev/shelf/%s/+d/%s" % (version, path), accept="*/*")
        assert (reply.status, reply.headers.get("Location")) == (302, shelf.url + doc("shelf", path, version))


def test_the_bare_framed_path_ends_at_the_index_page(shelf):
    for ending in ("+d", "+d/"):
        reply = shelf.get("/doc/dev/shelf/1.0/" + ending, headers={"Accept": "*/*"}, follow=True)
        assert (reply.status, without_script(reply).body) == (200, SCRIPT)
        reply = shelf.get("/doc/dev/shelf/1.0/" + ending, headers={"Accept": BROWSER})
        assert (reply.status, reply.headers.get("Location")) == (302, shelf.url + "/doc/dev/shelf/1.0/+d/index.html")


@pytest.mark.parametrize("path", ["x%0d%0aX-Evil:%201", "%0aX-Evil:1", "x%0d", "x%00", "x%7f", "x%c2%85"])
def test_a_redirect_never_carries_control_characters(shelf, path):
    for project, route in itertools.product(("shelf", "Shelf"), ("+d", "+doc")):
        head = shelf.raw(b"GET /doc/dev/%s/1.0/%s/%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                         % (project.encode(), route.encode(), path.encode())).partition(b"\r\n\r\n")[0]
        assert int(head.split()[1]) in (302, 400, 404)
        lines = head.lower().split(b"\r\n")
        assert not any(line.startswith(b"x-evil") for line in lines)
        assert not re.search(rb"[\x00-\x08\x0a-\x1f\x7f-\xff]", b"".join(lines))


def test_other_spellings_of_the_name_lead_to_the_normal_one(site):
    add_docs(site, "doc/dev", "Spelled.Name", "1.0+local.1", guide())
    for spelling, version, path in itertools.product(
            ("Spelled.Name", "spelled_name", "SPELLED--NAME"), ("1.0+local.1", "latest"), ("index.html", "sub/page.html", "sub/")):
        reply = get(site, doc(spelling, path, version))
        assert (reply.status, reply.headers.get("Location")) == (302, site.url + doc("spelled-name", path, version))
    for version in ("1.0+local.1", "1.0%2Blocal.1", "latest", "stable"):
        assert get(site, doc("spelled-name", version=version)).body == b"<h1>guide</h1>"


def test_a_directory_shows_its_index_page(site):
    add_docs(site, "doc/dev", "folders", "1.0", docs_zip(
        ("index.html", b"top"), ("a/index.html", b"a"), ("a/b/index.html", b"b"), ("c/page.html", b"c"),
        Member("e/", mode=0o040755, method=0)))
    for path, body in (("a/", b"a"), ("a/b/", b"b")):
        shown, plain = get(site, doc("folders", path)), get(site, doc("folders", path + "index.html"))
        assert (shown.status, shown.body) == (200, body)
        assert shown.headers.get("Content-Type") == plain.headers.get("Content-Type")
        assert shown.headers.get("Content-Security-Policy") == SANDBOX
        assert get(site, doc("folders", path) + "?raw", "HEAD").headers.get("Content-Length") == "1"
    for path in ("c/", "e/", "none/", "c", "e", "none", "a//", "a/b//", "index.html/", "a/index.html/"):
        assert (path, get(site, doc("folders", path)).status) == (path, 404)
    bare = get(site, doc("folders", "a"))       # shown under this path, the page's own links would lead astray
    assert (bare.status, bare.headers.get("Location")) in ((404, None), (302, site.url + doc("folders", "a/")))


# Latest and stable


def test_latest_and_stable_name_the_newest_documentation(site):
    def shown(alias):
        reply = without_script(site.get(doc("aliased", version=alias)))
        return reply.text if reply.status == 200 else (reply.status, reply.json()["message"])

    none, unstable = (404, "No documentation available."), (404, "No stable documentation available.")
    submit(site, "doc/dev", "aliased", "9.0")
    assert (shown("latest"), shown("stable")) == (none, unstable)
    for version, latest, stable in [
            ("1.0.dev1", "1.0.dev1", None), ("1.0rc1", "1.0rc1", None), ("1.0a5", "1.0rc1", None), ("1.9", "1.9", "1.9"),
            ("1.10", "1.10", "1.10"), ("1.10.post1", "1.10.post1", "1.10.post1"), ("1.2", "1.10.post1", "1.10.post1"),
            ("2.0b1", "2.0b1", "1.10.post1"), ("1!0.1", "1!0.1", "1!0.1")]:
        add_docs(site, "doc/dev", "aliased", version, guide(version))
        assert shown("latest") == "<h1>%s</h1>" % latest
        assert shown("stable") == ("<h1>%s</h1>" % stable if stable else unstable)
    for version, latest, stable in [
            ("1!0.1", "2.0b1", "1.10.post1"), ("1.10.post1", "2.0b1", "1.10"), ("2.0b1", "1.10", "1.10"), ("1.10", "1.9", "1.9"),
            ("1.9", "1.2", "1.2"), ("1.2", "1.0rc1", None)]:
        assert site.delete("/doc/dev/aliased/" + version, user="doc").status == 200
        assert shown("latest") == "<h1>%s</h1>" % latest
        assert shown("stable") == ("<h1>%s</h1>" % stable if stable else unstable)


def test_an_alias_is_answered_at_once(site):
    add_docs(site, "doc/dev", "atonce", "1.0", guide())
    number, alias = get(site, doc("atonce")), get(site, doc("atonce", version="latest"))
    assert (alias.status, alias.body, alias.headers.get("ETag")) == (200, number.body, number.headers.get("ETag"))
    assert get(site, doc("atonce", "sub/page.html", "stable")).body == b"<h1>guide, page</h1>"
    assert get(site, doc("atonce", "none.html", "latest")).status == 404


@pytest.mark.parametrize("version, message", [
    ("1.0", "No documentation available."), ("latest", "No documentation available."), ("stable", "No stable documentation available.")])
def test_what_has_no_documentation_says_so(site, version, message):
    assert site.upload("doc/dev", wheel("undocumented", "1.0")).status == 200
    for path in ("index.html", "sub/page.html"):
        reply = site.get(doc("undocumented", path, version))
        assert (reply.status, reply.json()["message"]) == (404, message)


@pytest.mark.parametrize("path", [
    "/doc/dev/undocumented2/1.0/+doc/index.html", "/doc/dev/undocumented2/latest/+doc/index.html", "/doc/none/x/1.0/+doc/index.html",
    "/nobody/none/x/latest/+doc/index.html", "/doc/mirror/x/1.0/+doc/index.html", "/doc/mirror/x/latest/+doc/index.html",
    "/doc/dev/shelf/7.7/+doc/index.html", "/doc/dev/shelf/1.0.0/+doc/index.html", "/doc/dev/shelf/Latest/+doc/index.html",
    "/doc/dev/shelf/1.0/+doc/none.html", "/doc/dev/shelf/1.0/+docs/index.html", "/doc/dev/shelf/+doc/index.html"])
def test_what_is_not_there_is_not_found(shelf, path):
    reply = shelf.get(path)
    assert (reply.status, bool(reply.json()["message"])) == (404, True)


def test_an_error_page_does_not_repeat_markup(shelf):
    reply = get(shelf, doc("shelf", "%3Cscript%3Ealert(1)%3C/script%3E"))
    assert reply.status == 404
    assert b"<script>alert" not in reply.body


# Restricted indexes


@pytest.fixture(scope="module")
def hidden(site):
    """`doc/hidden`, which `reader` may read, with the documentation of `hidden` 1.0."""
    site.add_index("doc/hidden")
    add_docs(site, "doc/hidden", "hidden", "1.0", guide("secret"))
    assert site.patch("/doc/hidden", {"acl_pkg_read": ["reader"]}, user="doc").status == 200
    return site


@pytest.mark.parametrize("version, path, status", [
    ("1.0", "index.html", 200), ("latest", "index.html", 200), ("stable", "sub/page.html", 200), ("1.0", "none.html", 404), ("1.0", "", 302)])
def test_documentation_of_a_restricted_index_is_for_its_readers(hidden, version, path, status):
    path = doc("hidden", path, version, "doc/hidden")
    for method in ("GET", "HEAD"):
        reply = hidden.request(method, path, headers={"Accept": "*/*"})
        assert (reply.status, reply.headers.get("WWW-Authenticate")) == (401, CHALLENGE)
        assert b"secret" not in reply.body
        assert hidden.request(method, path, headers={"Accept": "*/*"}, user="stranger").status == 403
        for user in ("reader", "doc", "root"):
            assert hidden.request(method, path, headers={"Accept": "*/*"}, user=user).status == status


def test_documentation_of_a_restricted_index_stays_private(hidden):
    path = doc("hidden", index="doc/hidden")
    reply = hidden.get(path, headers={"Accept": "*/*"}, user="reader")
    assert (reply.status, reply.headers.get("Cache-Control")) == (200, "private, max-age=60")
    assert reply.headers.get("Access-Control-Allow-Origin") is None
    assert reply.headers.get("Content-Security-Policy") == SANDBOX
    conditional = {"Accept": "*/*", "If-None-Match": reply.headers.get("ETag")}
    assert hidden.get(path, headers=conditional, user="reader").status == 304
    assert hidden.get(path, headers=conditional).status == 401
    zip_path = path_of(guide("secret"), "hidden", index="doc/hidden")
    assert [hidden.get(zip_path, headers={"Accept": "*/*"}, user=user).status for user in (None, "stranger", "reader")] == [401, 403, 200]


def test_a_change_of_the_readers_counts_at_once(site):
    site.add_index("doc/changing")
    add_docs(site, "doc/changing", "changing", "1.0", guide())
    page = doc("changing", index="doc/changing")
    for acl, status in ((["reader"], 401), ([":ANONYMOUS:"], 200), ([], 401)):
        assert get(site, page, accept="*/*").status == (401 if status == 200 else 200)
        assert site.patch("/doc/changing", {"acl_pkg_read": acl}, user="doc").status == 200
        assert get(site, page, accept="*/*").status == status


def test_a_list_that_names_everybody_restricts_nothing(site):
    site.add_index("doc/open", acl_pkg_read=[":ANONYMOUS:"])
    add_docs(site, "doc/open", "open", "1.0", guide())
    reply = get(site, doc("open", index="doc/open"))
    assert (reply.status, reply.headers.get("Cache-Control")) == (200, "max-age=60")
    assert reply.headers.get("Access-Control-Allow-Origin") == "*"


# Evil members, evil requests


EVIL_NAMES = [
    "../index.html", "../../../../etc/evil", "sub/../climb.html", "sub/./dot.html", "sub//double.html", "/root.html",
    "//host/x.html", "C:/drive.html", "c:drive.html", "C:\\drive.html", "scheme:page.html", "sub\\page2.html", "..\\climb.html",
    "\\\\host\\share.html", "..", ".", "sub/..", "sub/.", "nul.html\0.txt", "sub/\0", "\0"]
EVIL_ZIP = docs_zip(
    ("index.html", b"good"), *[Member(name, b"EVIL " + name.encode(), method=0) for name in EVIL_NAMES], ("sub/page.html", b"good page"),
    Member("link.html", b"index.html", mode=0o120777), Member("passwd.html", b"/etc/passwd", mode=0o120777),
    Member("sub/up.html", b"../index.html", mode=0o120755, method=0), ("last.html", b"last"))


@pytest.fixture(scope="module")
def evil(site):
    """`numbered-evil` 1.0: good members among evil ones."""
    add_docs(site, "doc/dev", "numbered-evil", "1.0", EVIL_ZIP)
    return site


def raw_get(server, path):
    """(status, whole answer) of a path that goes out byte for byte."""
    answer = server.raw(b"GET %s HTTP/1.1\r\nHost: x\r\nAccept: */*\r\nConnection: close\r\n\r\n" % path)
    return int(answer.split(None, 2)[1]), answer


def percent(text, safe=b"/"):
    """Every byte but those in `safe` percent-encoded."""
    return b"".join(bytes([byte]) if byte in safe else b"%%%02x" % byte for byte in text.encode())


def test_the_good_members_beside_evil_ones_are_served(evil):
    assert [get(evil, doc("numbered-evil", path)).body for path in ("index.html", "sub/page.html", "last.html")] == [
        b"good", b"good page", b"last"]
    found = numbers(evil, EVIL_ZIP, ["index.html", "sub/page.html", "last.html"], "numbered-evil")
    assert found in ([0, 1, 2], [1, 2, 3])


@pytest.mark.parametrize("name", EVIL_NAMES + ["link.html", "passwd.html", "sub/up.html"])
def test_evil_members_are_not_served_by_any_spelling(evil, name):
    base = doc("numbered-evil", "").encode()
    spelled = [percent(name), percent(name, b""), percent(name.replace("\\", "/"))]
    if not re.search("[\0-\x20]", name):
        spelled.append(name.encode())
    for path in spelled:
        status, answer = raw_get(evil, base + path)
        assert (path, status) == (path, 404)
        assert b"EVIL" not in answer and b"good" not in answer and b"root:" not in answer


def test_a_nul_in_a_members_name_does_not_shorten_it(evil):
    assert get(evil, doc("numbered-evil", "nul.html")).status == 404
    assert get(evil, doc("numbered-evil", "nul.html%00.txt")).status == 404


EVIL_PATHS = [
    "../index.html", "../+doc/index.html", "./index.html", "sub/../index.html", "sub/./page.html", "/index.html", "//index.html",
    "sub//page.html", "%2e%2e/index.html", "%2e%2e/%2bdoc/index.html", "%2e/index.html", "%2E%2E/%2E%2E/index.html",
    ".%2e/index.html", "sub/%2e%2e/index.html", "sub%2f..%2findex.html", "sub/..%2findex.html", "sub%2F%2Fpage.html",
    "sub%5cpage.html", "sub\\page.html", "..%5cindex.html", "..\\index.html", "sub%5c..%5cindex.html", "%2findex.html",
    "%2fetc%2fpasswd", "/etc/passwd", "C:/index.html", "C:%2findex.html", "c%3a/index.html", "c%3aindex.html", "index.html%00",
    "index.html%00.png", "%00", "%00index.html", "sub%00/page.html", "index.html/", "index.html%2f", "index.html/..",
    "index.html/../index.html", "%252e%252e/index.html", "%252findex.html", "..;/index.html", "index.html%20", "index.html.",
    "INDEX.HTML", "sub", "index%2ehtml%2f%2e", "%2e%2e%2f" * 12 + "etc/passwd", "../" * 12 + "etc/passwd",
    "../../../../../.secret", "%2e%2e/" * 5 + "devpi_lite.db", "index.html%0a", "index.html%0d%0aX-Evil:%201", "x" * 3000,
    "a/" * 1000]


@pytest.mark.parametrize("path", EVIL_PATHS, ids=lambda path: path[:40])
def test_evil_paths_lead_nowhere(evil, path):
    for version in ("1.0", "latest"):
        status, answer = raw_get(evil, doc("numbered-evil", path, version).encode())
        assert status == 404
        assert b"\r\nX-Evil" not in answer
        assert b"good" not in answer and b"EVIL" not in answer and b"root:" not in answer and b"SQLite" not in answer


@pytest.mark.parametrize("path", [
    b"index.html\0", b"\0", b"index.html\1", b"sub/\xff\xfe", b"%ff%fe/index.html", b"%c0%ae%c0%ae/index.html",
    b"%c0%afindex.html", b"sub\tpage.html", b"index.html%zz", b"%", b"index.html%", b"%e2%80%ae"])
def test_paths_that_are_no_text_are_refused(evil, path):
    status, answer = raw_get(evil, doc("numbered-evil", "").encode() + path)
    assert status in (400, 404)
    assert b"good" not in answer and b"EVIL" not in answer
    assert get(evil, doc("numbered-evil")).body == b"good"


@pytest.mark.parametrize("version", ["..", ".", "%2e%2e", "1.0%2f..", "..%2f1.0", "1.0%00", "1.0%5c..", "latest%00", "%2e%2e%2flatest"])
def test_the_version_in_the_path_cannot_climb(evil, version):
    status, answer = raw_get(evil, doc("numbered-evil", version=version).encode())
    assert status in (400, 404)
    assert b"good" not in answer


# Names as other zip tools write them


@pytest.mark.parametrize("names", [
    ("./index.html", "./_static/a.css"), ("index.html", "_static\\a.css"), (".\\index.html", ".\\_static\\a.css"),
    ("html\\index.html", "html\\_static\\a.css"), ("././index.html", "_static/a.css"), ("./html/index.html", "./html/_static/a.css")])
def test_names_with_a_leading_dot_or_backslashes_are_shown_as_what_they_mean(site, names):
    reply = upload(site, "doc/dev", "spelled-by-tools", "1.0", docs_zip((names[0], b"index"), (names[1], b"style")))
    assert (reply.status, reply.reason, reply.body) == (200, "OK", b"")
    for path, body in (("index.html", b"index"), ("_static/a.css", b"style")):
        assert get(site, doc("spelled-by-tools", path)).body == body
    assert site.delete("/doc/dev/spelled-by-tools", user="doc").status == 200


def test_a_backslash_beside_slashes_is_part_of_a_name_and_not_shown(site):
    reply = upload(site, "doc/dev", "mixed", "1.0", docs_zip(("index.html", b"index"), ("a/b.html", b"b"), ("a\\c.html", b"c")))
    assert (reply.status, reply.headers.get("Content-Type")) == (200, "text/plain; charset=utf-8")
    assert reply.text.startswith("1 of the documentation's members are not shown: ")
    assert [get(site, doc("mixed", path)).status for path in ("a/b.html", "a/c.html", "a%5Cc.html")] == [200, 404, 404]


def test_the_answer_says_how_many_members_are_not_shown(site):
    content = docs_zip(
        Member("html/", mode=0o040755, method=0), ("html/index.html", b"index"), ("html/../../x", b"x"), ("beside.html", b"x"),
        Member("html/link", b"index.html", mode=0o120777), Member("html/torn.html", b"x" * 40, crc=5))
    reply = upload(site, "doc/dev", "leftout", "1.0", content)
    assert (reply.status, reply.reason) == (200, "OK")
    assert reply.text.startswith("4 of the documentation's members are not shown: ")
    assert get(site, doc("leftout")).body == b"index"
    assert upload(site, "doc/dev", "leftout", "1.0", b"no zip").body == b""     # of which nothing is shown anyway


# Evil zips


def test_one_of_two_members_with_the_same_name_is_served(site):
    content = docs_zip(("index.html", b"index"), ("twice.html", b"first"), ("twice.html", b"second one"), ("after.html", b"after"))
    add_docs(site, "doc/dev", "duplicates", "1.0", content)
    shown = get(site, doc("duplicates", "twice.html"))
    assert shown.status == 200 and shown.body in (b"first", b"second one")
    again = get(site, doc("duplicates", "twice.html"), "HEAD")
    assert again.headers.get("Content-Length") == shown.headers.get("Content-Length")
    assert again.headers.get("ETag") == shown.headers.get("ETag")
    assert get(site, doc("duplicates", "after.html")).body == b"after"


def test_names_that_differ_in_case_are_two_pages(site):
    add_docs(site, "doc/dev", "cases", "1.0", docs_zip(("index.html", b"lower"), ("Index.html", b"upper"), ("A/x", b"A"), ("a/x", b"a")))
    assert [get(site, doc("cases", path)).body for path in ("index.html", "Index.html", "A/x", "a/x")] == [b"lower", b"upper", b"A", b"a"]


# Limits


ENCRYPTED = Member("secret.html", b"x" * 40, flags=0x801)
REFUSED = {
    "an encrypted member": lambda: docs_zip(("index.html", b"x"), ENCRYPTED),
    "only an encrypted member": lambda: docs_zip(ENCRYPTED._replace(name="index.html")),
    "strong encryption": lambda: docs_zip(("index.html", b"x"), ENCRYPTED._replace(flags=0x841)),
    "no member": docs_zip,
    "no member but a comment": lambda: docs_zip(comment=b"x" * 1000),
    "only directories": lambda: docs_zip(Member("a/", mode=0o040755, method=0), Member("a/b/", mode=0o040755, method=0)),
    "a bomb": lambda: docs_zip(("index.html", bytes(8 * MIB))),
    "a bomb behind pages": lambda: docs_zip(("index.html", b"x"), ("page.html", b"x"), ("bomb.bin", bytes(8 * MIB))),
    "a bomb of just over a MiB": lambda: docs_zip(("index.html", bytes(MIB + 65536))),
    "a member over 200 MB": lambda: docs_zip(("index.html", b"x"), large("large.bin", 201)),
    "over 1 GB in all": lambda: docs_zip(*renamed(large("large.bin", 180), 6)),
    "more than 20,000 members": lambda: docs_zip(*[Member("%d.html" % number, method=0) for number in range(20001)]),
}


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_a_zip_that_breaks_a_limit_is_refused_and_changes_nothing(site, kind):
    project = "limits-%d" % sorted(REFUSED).index(kind)
    before = state(site, project)
    assert before[1][0] == 404
    assert refused(upload(site, "doc/dev", project, "1.0", REFUSED[kind]()), 400)
    assert state(site, project) == before


@pytest.mark.parametrize("index, statuses", [("doc/dev", {400}), ("doc/stable", {400, 409})])
def test_a_refused_zip_leaves_the_documentation_that_was_there(site, index, statuses):
    add_docs(site, index, "unharmed", "1.0", guide())
    before = state(site, "unharmed", index=index)
    for kind in ("an encrypted member", "a bomb", "no member"):
        assert upload(site, index, "unharmed", "1.0", REFUSED[kind]()).status in statuses
    assert state(site, "unharmed", index=index) == before


ACCEPTED = {
    "a MiB of nothing": (lambda: docs_zip(("index.html", bytes(MIB))), "index.html", bytes(MIB)),
    "many small bombs": (
        lambda: docs_zip(*[("%d.html" % number, bytes(MIB // 2)) for number in range(20)]), "19.html", bytes(MIB // 2)),
    "a hundredth": (lambda: docs_zip(("index.html", b"x"), large("large.bin", 8)), "index.html", b"x"),
    "a bomb in an archive in it": (
        lambda: docs_zip(("index.html", b"x"), ("nested.zip", docs_zip(("bomb", bytes(8 * MIB))))), "nested.zip",
        docs_zip(("bomb", bytes(8 * MIB)))),
    "20,000 members": (
        lambda: docs_zip(*[Member("%d.html" % number, b"%d" % number, 0) for number in range(20000)]), "19999.html", b"19999"),
}


@pytest.mark.parametrize("kind", sorted(ACCEPTED))
def test_a_zip_within_the_limits_is_shown(site, kind):
    make, path, body = ACCEPTED[kind]
    add_docs(site, "doc/dev", "within", "1.0", make())
    reply = get(site, doc("within", path))
    assert (reply.status, reply.body == body) == (200, True)


def test_the_size_of_a_zip_is_bounded_by_an_option(make_server):
    def zip_of(size):
        return docs_zip(Member("index.html", noise(size - len(docs_zip(Member("index.html", method=0)))), method=0))

    server = make_server("--max-doc-size", "20000")
    server.add_user("doc")
    server.login("doc", "pw")
    server.add_index("doc/dev")
    for content in (zip_of(20001), b"x" * 20001, zip_of(300000)):
        before = state(server, "bounded")
        assert refused(upload(server, "doc/dev", "bounded", "1.0", content), 413)
        assert state(server, "bounded") == before
    assert len(zip_of(20000)) == 20000
    add_docs(server, "doc/dev", "bounded", "1.0", zip_of(20000))
    assert get(server, doc("bounded")).status == 200
    archive = wheel("bounded", "1.0", size=30000)
    assert server.upload("doc/dev", archive).status == 200
    assert server.fetch("doc/dev", archive.filename, "bounded") == archive.content


# Zips without an index page, zips that are none


def test_a_single_top_directory_with_an_index_page_is_the_root(site):
    add_docs(site, "doc/dev", "nested", "1.0", docs_zip(
        Member("html/", mode=0o040755, method=0), ("html/index.html", b"index"), ("html/sub/page.html", b"page"),
        ("extra/page.html", b"extra")))
    assert [get(site, doc("nested", path)).body for path in ("index.html", "sub/page.html")] == [b"index", b"page"]
    reply = site.get("/doc/dev/nested/1.0/+doc/", headers={"Accept": BROWSER}, follow=True)
    assert without_script(reply).body == b"index"


@pytest.mark.parametrize("members", [
    [("a/index.html", b"a"), ("b/index.html", b"b")], [("a/b/index.html", b"deep"), ("a/page.html", b"page")],
    [("page.html", b"page"), ("a/page.html", b"page")], [("a/INDEX.HTML", b"upper"), ("page.html", b"page")]])
def test_a_zip_without_one_index_page_is_served_under_its_own_names(site, members):
    add_docs(site, "doc/dev", "unindexed", "1.0", docs_zip(*members))
    for name, content in members:
        assert get(site, doc("unindexed", name)).body == content
    assert get(site, doc("unindexed")).status == 404
    assert site.get("/doc/dev/unindexed/1.0/+doc/", headers={"Accept": BROWSER}, follow=True).status == 404


@pytest.mark.parametrize("name", ["../index.html", "/index.html", "C:/index.html", "..\\index.html", "./../index.html"])
def test_an_evil_directory_never_becomes_the_root(site, name):
    content = docs_zip(("page.html", b"page"), (name, b"EVIL"))
    add_docs(site, "doc/dev", "evilroot", "1.0", content)
    assert get(site, doc("evilroot", "page.html")).body == b"page"
    assert get(site, doc("evilroot")).status == 404


def test_a_linked_index_page_makes_no_root(site):
    add_docs(site, "doc/dev", "linkedroot", "1.0", docs_zip(
        ("a/page.html", b"page"), Member("a/index.html", b"page.html", mode=0o120777)))
    for path in ("index.html", "page.html", "a/index.html"):
        assert (path, get(site, doc("linkedroot", path)).status) == (path, 404)
    assert get(site, doc("linkedroot", "a/page.html")).body == b"page"


@pytest.mark.parametrize("content", [
    b"123", b"", b"PK", b"PK\3\4" + bytes(100), b"\x1f\x8b" + noise(500), guide()[:-30], guide()[:len(guide()) // 2], noise(100000)],
    ids=["123", "empty", "PK", "head", "gzip", "cut", "half", "noise"])
@pytest.mark.parametrize("index", ["doc/dev", "doc/stable"])
def test_bytes_that_are_no_zip_are_stored_and_not_shown(site, index, content):
    project = "nozip-" + hashlib.sha256(content).hexdigest()[:8]
    add_docs(site, index, project, "1.0", content)
    [link] = links(site, "%s/%s/1.0" % (index, project))
    assert (link["rel"], link["href"]) == ("doczip", site.url + path_of(content, project, index=index))
    assert get(site, path_of(content, project, index=index)).body == content
    for version in ("1.0", "latest", "stable"):
        reply = site.get(doc(project, version=version, index=index))
        assert (reply.status, bool(reply.json()["message"])) == (404, True)


GOOD = Member("index.html", b"index")
ODD = Member("odd.html", b"odd content")
SECOND = len(docs_zip(GOOD)) - len(docs_zip()) - 46 - len("index.html")       # where a member behind GOOD begins
DAMAGED = {
    "a name that is no UTF-8": docs_zip(GOOD, ODD._replace(name=b"\xff\xfe.html")),
    "a name in an old code page": docs_zip(GOOD, ODD._replace(name=b"caf\x82.html", flags=0)),
    "no name": docs_zip(GOOD, ODD._replace(name="")),
    "a very long name": docs_zip(GOOD, ODD._replace(name="x" * 65000)),
    "another name in its own head": docs_zip(GOOD, ODD._replace(local_name=b"evil.html!"[:8])),
    "a longer name in its own head": docs_zip(GOOD, ODD._replace(local_name=b"evil.html" * 50)),
    "a wrong checksum": docs_zip(GOOD, ODD._replace(crc=1)),
    "a stored member with a wrong checksum": docs_zip(GOOD, ODD._replace(crc=1, method=0)),
    "a size too small": docs_zip(GOOD, ODD._replace(size=3)),
    "a size too large": docs_zip(GOOD, ODD._replace(size=300)),
    "a huge size": docs_zip(GOOD, ODD._replace(size=0xfffffffe)),
    "a stored size too small": docs_zip(GOOD, ODD._replace(size=3, method=0)),
    "a bomb that calls itself small": docs_zip(GOOD, ODD._replace(packed=deflated(bytes(8 * MIB)))),
    "an offset outside": docs_zip(GOOD, ODD._replace(offset=10 ** 6)),
    "an offset into the directory": docs_zip(GOOD, ODD._replace(offset=SECOND + 60)),
    "two names for one member": docs_zip(GOOD, ODD._replace(offset=0)),
    "one member twice": docs_zip(GOOD, GOOD._replace(offset=0)),
    "one member a thousand times": docs_zip(GOOD, large("bomb.bin", 8), *[Member("bomb.bin", size=8 * MIB, offset=SECOND)] * 1000),
    "damaged deflate": docs_zip(GOOD, ODD._replace(packed=b"\xff" * 20)),
    "deflate that ends early": docs_zip(GOOD, ODD._replace(packed=deflated(ODD.content)[:-5])),
    "data behind the deflate": docs_zip(GOOD, ODD._replace(packed=deflated(ODD.content) + b"more")),
    "an unknown method": docs_zip(GOOD, ODD._replace(method=99)),
    "bzip2": docs_zip(GOOD, ODD._replace(method=12, packed=bz2.compress(ODD.content))),
    "a data descriptor": docs_zip(GOOD, ODD._replace(flags=0x808)),
    "patch data": docs_zip(GOOD, ODD._replace(flags=0x820)),
    "a device": docs_zip(GOOD, ODD._replace(mode=0o020666)),
    "more members claimed": docs_zip(GOOD, ODD, count=50),
    "fewer members claimed": docs_zip(GOOD, ODD, count=1),
    "a comment": docs_zip(GOOD, ODD, comment=b"a comment"),
    "a comment that looks like an end": docs_zip(GOOD, ODD, comment=docs_zip()),
    "a script before it": b"#!/bin/sh\n" * 20 + docs_zip(GOOD, ODD),
    "data behind it": docs_zip(GOOD, ODD) + b"x" * 10,
    "another zip before it": docs_zip(("index.html", b"other"), ("page.html", b"other")) + docs_zip(GOOD, ODD),
    "no beginning": docs_zip(GOOD, ODD)[9:],
    "only an end": docs_zip(GOOD, ODD)[-22:],
    "a damaged directory": docs_zip(GOOD, ODD).replace(b"PK\1\2", b"PK\1\3"),
    "a damaged member head": docs_zip(GOOD, ODD).replace(b"PK\3\4", b"PK\3\5"),
    "a missing middle": docs_zip(GOOD, ODD)[:40] + docs_zip(GOOD, ODD)[60:],
}


@pytest.mark.parametrize("kind", sorted(DAMAGED))
def test_a_damaged_zip_shows_nothing_wrong(site, kind):
    """It may be refused, or shown in part: but no member is ever served with other bytes than its own."""
    content = DAMAGED[kind]
    before = serial(site)
    reply = upload(site, "doc/dev", "damaged", "1.0", content)
    if reply.status == 400:
        assert refused(reply, 400)
        assert (serial(site), site.get("/doc/dev/damaged").status) == (before, 404)
        return
    assert reply.status == 200
    assert get(site, path_of(content, "damaged")).body == content
    for path, bodies in (
            ("index.html", {b"index"}), ("odd.html", {b"odd content"}), ("evil.htm", ()), ("caf%C3%A9.html", {b"odd content"})):
        shown = get(site, doc("damaged", path))
        assert shown.status == 404 or (shown.status == 200 and shown.body in bodies)
    assert site.delete("/doc/dev/damaged", user="doc").status == 200


# Deleting


def test_deleting_the_zip_leaves_the_release(site):
    archive = wheel("undocced", "1.0")
    assert site.upload("doc/dev", archive).status == 200
    add_docs(site, "doc/dev", "undocced", "1.0", guide())
    path, before = path_of(guide(), "undocced"), serial(site)
    reply = site.delete(path, user="doc")
    assert (reply.status, reply.json()["message"]) == (200, "package '%s' deleted" % path[1:])
    assert serial(site) == before + 1
    assert get(site, path).status == 410
    assert site.get(path).json()["message"] == "file existed, deleted in later serial"
    assert rels(site, "doc/dev/undocced/1.0") == ["releasefile"]
    for version, message in (("1.0", "No documentation available."), ("latest", "No documentation available."),
                             ("stable", "No stable documentation available.")):
        shown = site.get(doc("undocced", version=version))
        assert (shown.status, shown.json()["message"]) == (404, message)
    assert site.fetch("doc/dev", archive.filename, "undocced") == archive.content
    assert site.delete(path, user="doc").status == 410
    add_docs(site, "doc/dev", "undocced", "1.0", guide())
    assert (get(site, path).body, get(site, doc("undocced")).status) == (guide(), 200)


def test_deleting_the_release_file_leaves_the_documentation(site):
    archive = wheel("unfiled", "1.0")
    assert site.upload("doc/dev", archive).status == 200
    add_docs(site, "doc/dev", "unfiled", "1.0", guide())
    [file_link, _] = links(site, "doc/dev/unfiled/1.0")
    assert site.delete(file_link["href"][len(site.url):], user="doc").status == 200
    assert rels(site, "doc/dev/unfiled/1.0") == ["doczip"]
    assert get(site, doc("unfiled")).status == 200


def test_a_version_goes_with_its_last_file_even_if_that_was_documentation(site):
    for version in ("1.0", "2.0"):
        add_docs(site, "doc/dev", "lastzip", version, guide())
        path = path_of(guide(), "lastzip", version)
    assert site.delete(path, user="doc").status == 200
    assert list(site.get("/doc/dev/lastzip").result) == ["1.0"]
    assert site.delete(path_of(guide(), "lastzip"), user="doc").status == 200
    assert site.get("/doc/dev/lastzip").result == {}
    assert "lastzip" in site.get("/doc/dev").result["projects"]


@pytest.mark.parametrize("path", ["/doc/dev/goner/1.0", "/doc/dev/goner"])
def test_documentation_goes_with_its_version_and_its_project(site, path):
    assert site.upload("doc/dev", wheel("goner", "1.0")).status == 200
    add_docs(site, "doc/dev", "goner", "1.0", guide())
    assert site.delete(path, user="doc").status == 200
    assert (get(site, path_of(guide(), "goner")).status, get(site, doc("goner")).status) == (410, 404)
    assert get(site, doc("goner", version="latest")).status == 404
    submit(site, "doc/dev", "goner", "1.0")
    assert get(site, doc("goner")).status == 404


def test_documentation_goes_with_its_index_and_does_not_come_back(site):
    site.add_index("doc/brief")
    add_docs(site, "doc/brief", "goner", "1.0", guide())
    path, page = path_of(guide(), "goner", index="doc/brief"), doc("goner", index="doc/brief")
    assert (get(site, path).status, get(site, page).status) == (200, 200)
    assert site.delete("/doc/brief", user="doc").status == 201
    assert (get(site, path).status, get(site, page).status) == (410, 404)
    site.add_index("doc/brief")
    assert (get(site, path).status, get(site, page).status) == (410, 404)
    add_docs(site, "doc/brief", "goner", "1.0", guide())
    assert (get(site, path).status, get(site, page).status) == (200, 200)


def test_on_a_non_volatile_index_documentation_is_deleted_by_force_only(site):
    add_docs(site, "doc/stable", "forced", "1.0", guide())
    path, before = path_of(guide(), "forced", index="doc/stable"), state(site, "forced", index="doc/stable")
    reply = site.delete(path, user="doc")
    assert (reply.status, reply.json()["message"]) == (403, "cannot delete version on non-volatile index")
    assert state(site, "forced", index="doc/stable") == before
    assert site.delete(path + "?force=", user="doc").status == 200
    assert get(site, path).status == 410


@pytest.mark.parametrize("user", [None, "stranger"])
def test_who_may_not_upload_may_not_delete_documentation(site, user):
    add_docs(site, "doc/dev", "guarded", "1.0", guide())
    before = state(site, "guarded")
    assert site.delete(path_of(guide(), "guarded"), user=user).status == 403
    assert state(site, "guarded") == before


def test_one_zip_in_two_places_lives_until_the_last_is_deleted(site):
    for project, index in (("shared-a", "doc/dev"), ("shared-b", "doc/dev"), ("shared-a", "doc/stable")):
        add_docs(site, index, project, "1.0", guide("shared"))
    assert site.delete("/doc/dev/shared-a", user="doc").status == 200
    assert get(site, doc("shared-a")).status == 404
    assert get(site, doc("shared-b")).body == b"<h1>shared</h1>"
    assert site.delete("/doc/dev/shared-b", user="doc").status == 200
    assert get(site, doc("shared-a", index="doc/stable")).body == b"<h1>shared</h1>"
    assert get(site, path_of(guide("shared"), "shared-a", index="doc/stable")).body == guide("shared")


# Afterwards


def test_documentation_survives_a_restart(site):
    add_docs(site, "doc/dev", "lasting", "1.0", guide())
    add_docs(site, "doc/dev", "lasting", "2.0rc1", guide("candidate"))
    paths = [doc("lasting"), doc("lasting", "sub/page.html", "latest"), doc("lasting", version="stable"), path_of(guide(), "lasting")]
    before = [(reply.status, reply.body, reply.headers.get("ETag")) for reply in (get(site, path) for path in paths)]
    assert [status for status, _, _ in before] == [200] * 4
    site.restart()
    assert [(reply.status, reply.body, reply.headers.get("ETag")) for reply in (get(site, path) for path in paths)] == before
    assert rels(site, "doc/dev/lasting/1.0") == ["doczip"]
