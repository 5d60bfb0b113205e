"""What people see inside archives: members and their text, what two versions differ in, which
platforms have wheels, where a file comes from. What is hostile is shown or refused, at a bounded
cost.
"""

import base64
import io
import json
import random
import struct
import tarfile
import time
import tracemalloc
import types
import zipfile

import pytest

import devpi_lite as d
from archives import around, documentation, sdist, wheel, zipped

KIB, MIB = 1 << 10, 1 << 20


def members(content, filename):
    return d.archive_members(io.BytesIO(content), filename)


def paths(content, filename):
    return [member.path for member in members(content, filename).members]


def text(content, filename, path, **options):
    return d.member_text(io.BytesIO(content), filename, path, **options)


def tarred(*entries, suffix=".tar.gz"):
    """A tar of (name, bytes or a `TarInfo` to change) entries."""
    packed = io.BytesIO()
    mode = {".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".tar": "w"}[suffix]
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        for name, content, *changes in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for change in changes:
                for field, value in change.items():
                    setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture(scope="module")
def app():
    return wheel("acme-app", "1.0", extra_members={
        "acme_app/core.py": b"print('hi')\n",
        "acme_app/logo.png": b"\x89PNG\0\1\2",
        "acme_app-1.0.dist-info/licenses/LICENSE": b"Free.\n"})


# -- members


def test_a_wheel_lists_its_members_with_sizes(app):
    found = members(app.content, app.filename)
    assert found.cut == ""
    assert [(m.number, m.path, m.kind) for m in found.members] == [
        (0, "acme_app/__init__.py", "file"), (1, "acme_app/core.py", "file"),
        (2, "acme_app/logo.png", "file"), (3, "acme_app-1.0.dist-info/licenses/LICENSE", "file"),
        (4, "acme_app-1.0.dist-info/METADATA", "file"), (5, "acme_app-1.0.dist-info/WHEEL", "file"),
        (6, "acme_app-1.0.dist-info/RECORD", "file")]
    assert found.members[1].size == len(b"print('hi')\n")


def test_an_sdist_lists_its_members():
    built = sdist("acme-app", "1.0")
    assert paths(built.content, built.filename) == [
        "acme_app-1.0/" + path
        for path in ("PKG-INFO", "pyproject.toml", "backend.py", "acme_app/__init__.py")]


@pytest.mark.parametrize("filename", [
    "a-1.0.tar.gz", "a-1.0.tgz", "a-1.0.tar.bz2", "a-1.0.zip", "a-1.0-py3.9.egg",
    "a-1.0-py3-none-any.whl"])
def test_each_kind_of_archive_shows_a_member(filename):
    content = around(filename, b"what it holds", "a", "1.0")
    assert "a-1.0/content" in paths(content, filename)
    assert text(content, filename, "a-1.0/content").text == "what it holds"


def test_a_plain_tar_and_documentation_are_archives_too():
    assert text(tarred(("a/b", b"c"), suffix=".tar"), "a-1.0.tar", "a/b").text == "c"
    docs = documentation("a", "1.0")
    assert text(docs.content, docs.filename, "index.html").text == "<h1>The manual</h1>"


@pytest.mark.parametrize("filename", ["a-1.0.exe", "a-1.0.rpm", "README"])
def test_another_kind_of_file_is_not_looked_into(filename):
    with pytest.raises(d.NotFound, match="no archive that can be looked into"):
        members(b"anything", filename)
    with pytest.raises(d.NotFound, match="no archive that can be looked into"):
        text(b"anything", filename, "a")


@pytest.mark.parametrize("filename", ["a-1.0.tar.gz", "a-1.0-py3-none-any.whl", "a-1.0.tar.bz2"])
def test_what_is_no_archive_in_spite_of_its_name_is_broken(filename):
    for content in (b"", b"no archive at all" * 100):
        with pytest.raises(d.BrokenArchive, match="built or sent incompletely"):
            members(content, filename)
        with pytest.raises(d.BrokenArchive, match="built or sent incompletely"):
            text(content, filename, "a")


HOSTILE_NAMES = [
    "../../etc/passwd", "/etc/passwd", "C:\\windows\\x", "a\x1b[31m\nb",
    "<script>alert(1)</script>", "n" * 10000, "a\u202egnp.exe", "..", "", "a//b/./c"]


@pytest.mark.parametrize("filename", ["a-1.0.zip", "a-1.0.tar.gz"])
def test_hostile_names_are_only_data(filename):
    names = [name for name in HOSTILE_NAMES if name or filename.endswith("zip")]
    packed = zipped(*((name, "of " + name) for name in names)) if filename.endswith("zip") else \
        tarred(*((name, ("of " + name).encode()) for name in names))
    assert paths(packed, filename) == names
    for name in names:
        assert text(packed, filename, name).text == d.sound("of " + name)


@pytest.mark.parametrize("path, label", [
    ("a/b c.py", "a/b c.py"), ("caf\u00e9", "caf\u00e9"), ("a\x1b[31m\nb", "a\\x1b[31m\\nb"),
    ("a\u202egnp.exe", "a\\u202egnp.exe"), ("a\u2028b\xa0", "a\\u2028b\\xa0"),
    ("n" * 10000, "n" * 150 + "..." + "n" * 150)])
def test_a_label_shows_what_would_not_be_seen(path, label):
    assert d.Member(path, 0, 0).label == label


def test_names_that_are_no_utf_8_can_stand_in_urls():
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("caf\udce9"))
    name, = paths(packed.getvalue(), "a-1.0.tar")
    assert name == "caf\\udce9" and name.encode()
    content = zipped(("caf\u00e9", "x")).replace("caf\u00e9".encode(), b"caf\xff\xff")
    assert paths(content, "a-1.0.zip") == ["caf\\xff\\xff"]


def test_members_of_the_same_name_are_kept_and_told_apart_by_number():
    for filename, content in (
            ("a-1.0.zip", zipped(("x", "first"), ("y", ""), ("x", "last"))),
            ("a-1.0.tar.gz", tarred(("x", b"first"), ("y", b""), ("x", b"last")))):
        assert [(m.path, m.number) for m in members(content, filename).members] == [
            ("x", 0), ("y", 1), ("x", 2)]
        assert text(content, filename, "x").text == "last", "unpacking would leave it"
        assert text(content, filename, "x", number=0).text == "first"
        with pytest.raises(d.NotFound):
            text(content, filename, "x", number=1)


def test_where_the_last_of_a_name_is_damaged_an_earlier_one_is_not_shown_for_it():
    content = bytearray(zipped(("x", "harmless"), ("x", "harmful"), compression=0))
    content[content.index(b"harmful")] ^= 1
    with pytest.raises(d.BrokenArchive, match="checksum is wrong"):
        text(bytes(content), "a-1.0.zip", "x")
    assert text(bytes(content), "a-1.0.zip", "x", number=0).text == "harmless"


def test_links_and_devices_are_marked_and_not_followed():
    content = tarred(
        ("a/etc", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("a/long", b"", {"type": tarfile.SYMTYPE, "linkname": "/" + "l" * 300}),
        ("a/hard", b"", {"type": tarfile.LNKTYPE, "linkname": "a/etc"}),
        ("a/null", b"", {"type": tarfile.CHRTYPE}), ("a/fifo", b"", {"type": tarfile.FIFOTYPE}),
        ("a/d", b"", {"type": tarfile.DIRTYPE}))
    assert [m.kind for m in members(content, "a-1.0.tar.gz").members] == [
        "link", "link", "link", "special", "special", "directory"]
    assert text(content, "a-1.0.tar.gz", "a/etc").text == "/etc/passwd"
    assert text(content, "a-1.0.tar.gz", "a/long").text == "/" + "l" * 300
    assert text(content, "a-1.0.tar.gz", "a/null").text is None
    assert text(content, "a-1.0.tar.gz", "a/null").size == 0


def test_a_link_in_a_zip_is_marked():
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, mode in (("a/link", 0o120777), ("a/folder/", 0o040755), ("a/fifo", 0o010644)):
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, mode << 16
            archive.writestr(info, "/etc/passwd")
    assert [m.kind for m in members(packed.getvalue(), "a-1.0.zip").members] == [
        "link", "directory", "special"]
    assert text(packed.getvalue(), "a-1.0.zip", "a/link").text is None


# -- the text of a member


@pytest.mark.parametrize("content, shown", [
    (b"plain\n", "plain\n"), (b"", ""), ("na\u00efve \u2713".encode(), "na\u00efve \u2713"),
    (b"\xef\xbb\xbfwith a mark", "with a mark"),
    ("sechzehn \u2713".encode("utf-16"), "sechzehn \u2713"),
    (b"\xfe\xff" + "gro\u00df".encode("utf-16-be"), "gro\u00df"),
    (b"a\x1b[31mb\r\n", "a [31mb\r\n")])
def test_text_is_shown(content, shown):
    packed = zipped(("a", content))
    assert text(packed, "a-1.0.zip", "a") == (
        d.Member("a", 0, len(content), "file", zipfile.crc32(content)), shown, len(content), False)


@pytest.mark.parametrize("content", [
    b"\x89PNG\0", b"caf\xe9", b"\xff\xfe\0\xd8\0", b"text\0with a zero", b"\xc3"])
def test_other_bytes_are_binary_with_their_size(content):
    found = text(zipped(("a", content)), "a-1.0.zip", "a")
    assert (found.text, found.size, found.is_cut) == (None, len(content), False)


@pytest.mark.parametrize("filename", ["a-1.0.zip", "a-1.0.tar.gz"])
def test_a_large_text_is_cut(filename):
    limit = d.Limits.viewed_member
    data = ("\u2713" * limit).encode()                 # the limit falls into a character
    packed = zipped(("a", data)) if filename.endswith("zip") else tarred(("a", data))
    found = text(packed, filename, "a")
    assert (found.text, found.size, found.is_cut) == ("\u2713" * (limit // 3), limit, True)
    exact = zipped(("a", b"x" * limit)) if filename.endswith("zip") else tarred(("a", b"x" * limit))
    found = text(exact, filename, "a")
    assert (found.text, found.size, found.is_cut) == ("x" * limit, limit, False)


@pytest.mark.parametrize("path", ["acme_app/none.py", "acme_app", "", "/acme_app/core.py",
                                  "acme_app/../acme_app/core.py", "ACME_APP/core.py"])
def test_only_an_exact_name_is_found(app, path):
    with pytest.raises(d.NotFound, match="has no member"):
        text(app.content, app.filename, path)


def test_an_archive_in_an_archive_is_not_opened():
    inner = zipped(("x", "y"))
    packed = zipped(("inner.zip", inner))
    assert paths(packed, "a-1.0.zip") == ["inner.zip"]
    assert text(packed, "a-1.0.zip", "inner.zip").text is None


# -- hostile archives


def restated(content, name, **stated):
    """A zip whose directory states something else of a member."""
    at = content.index(b"PK\1\2")
    while content[at + 46:at + 46 + len(name)] != name:
        at = content.index(b"PK\1\2", at + 1)
    data = bytearray(content)
    for field, value in stated.items():
        place, form = {"size": (24, "<L"), "packed": (20, "<L"), "crc": (16, "<L"),
                       "flags": (8, "<H"), "offset": (42, "<L"), "method": (10, "<H")}[field]
        struct.pack_into(form, data, at + place, value)
    return bytes(data)


@pytest.mark.parametrize("stated, words", [
    ({"size": 10}, "over the 10 bytes"), ({"size": 1 << 31}, "the archive says 2147483648"),
    ({"crc": 7}, "checksum is wrong"), ({"offset": 1 << 30}, "none at its place"),
    ({"packed": 3}, "it was cut|ends early|incomplete"), ({"method": 14}, "packed by method")])
def test_a_member_that_is_not_as_stated_is_refused_and_others_are_shown(stated, words):
    content = restated(zipped(("lies", "x" * 100 * KIB), ("honest", "yes")), b"lies", **stated)
    assert paths(content, "a-1.0.zip") == ["lies", "honest"]
    with pytest.raises(d.BrokenArchive, match=words):
        text(content, "a-1.0.zip", "lies")
    assert text(content, "a-1.0.zip", "honest").text == "yes"


def test_an_encrypted_member_is_marked():
    content = restated(zipped(("secret", "x"), ("open", "y")), b"secret", flags=1)
    assert [m.kind for m in members(content, "a-1.0.zip").members] == ["encrypted", "file"]
    assert text(content, "a-1.0.zip", "secret").text is None
    assert text(content, "a-1.0.zip", "open").text == "y"


def test_a_bomb_costs_what_is_shown():
    content = zipped(("bomb", bytes(200 * MIB)))
    lying = restated(content, b"bomb", size=100)
    began = time.process_time()
    tracemalloc.start()
    found = text(content, "a-1.0.zip", "bomb")
    with pytest.raises(d.BrokenArchive):
        text(lying, "a-1.0.zip", "bomb")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.text, found.size, found.is_cut) == (None, d.Limits.viewed_member, True)
    assert time.process_time() - began < 1 and peak < 8 * MIB


def test_a_bomb_in_a_tar_ends_the_look(monkeypatch):
    monkeypatch.setattr(d.Limits, "viewed_scan", 20 * MIB)
    content = tarred(("first", b"1"), ("bomb", bytes(30 * MIB)), ("last", b"3"))
    found = members(content, "a-1.0.tar.gz")
    assert [member.path for member in found.members] == ["first", "bomb"]
    assert "5 seconds and 20971520 unpacked bytes at most" in found.cut
    assert text(content, "a-1.0.tar.gz", "first").text == "1"
    with pytest.raises(d.NotViewed, match="it has more"):
        text(content, "a-1.0.tar.gz", "last")


def test_a_look_has_a_deadline(monkeypatch):
    content = tarred(*((str(number), b"x" * 10000) for number in range(100)))
    monkeypatch.setattr(d.Limits, "viewed_time", 0)
    with pytest.raises(d.NotViewed, match="looked through for 0 seconds"):
        members(content, "a-1.0.tar.gz")
    with pytest.raises(d.NotViewed, match="looked through for 0 seconds"):
        text(content, "a-1.0.tar.gz", "99")


@pytest.mark.parametrize("filename", ["a-1.0.zip", "a-1.0.tar"])
def test_of_100_000_members_the_first_are_listed(filename):
    if filename.endswith("zip"):
        head = struct.pack("<4s6H3L2H", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 6, 0) + \
            struct.pack("<3H2L", 0, 0, 0, 0, 0)
        directory = b"".join(head + b"%06d" % number for number in range(100000))
        content = directory + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535,
                                          len(directory), 0, 0)
    else:
        info = tarfile.TarInfo("000000")
        info.type = tarfile.DIRTYPE
        content = info.tobuf(tarfile.GNU_FORMAT) * 100000
    began = time.process_time()
    found = members(content, filename)
    spent = time.process_time() - began
    assert len(found.members) == d.Limits.listed_members == 20000
    assert "20000 with 4194304 characters in their paths are listed" in found.cut
    with pytest.raises(d.NotViewed, match="has further members"):
        text(content, filename, "099999")
    assert spent < 3


def test_long_names_are_listed_up_to_a_sum(monkeypatch):
    monkeypatch.setattr(d.Limits, "listed_paths", 25000)
    content = zipped(*(("%04d" % number + "n" * 9996, "") for number in range(5)))
    assert len(members(content, "a-1.0.zip").members) == 2


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.bz2"])
def test_a_tar_that_was_cut_is_listed_as_far_as_it_goes(suffix):
    noise = random.Random(1).randbytes
    whole = tarred(*((str(number), noise(300 * KIB)) for number in range(8)), suffix=suffix)
    found = members(whole[:len(whole) // 2], "a-1.0" + suffix)
    assert [member.path for member in found.members][:3] == ["0", "1", "2"]
    assert len(found.members) < 8 and "built or sent incompletely" in found.cut
    assert text(whole[:len(whole) // 2], "a-1.0" + suffix, "1").size == 300 * KIB
    with pytest.raises(d.BrokenArchive):
        text(whole[:len(whole) // 2], "a-1.0" + suffix, "7")


def test_a_zip_that_was_cut_is_broken(app):
    with pytest.raises(d.BrokenArchive, match="is no zip file"):
        members(app.content[:-30], app.filename)


def test_whatever_stands_in_an_archive_only_problems_come_out(app):
    built, chance = sdist("acme-app", "1.0"), random.Random(3)
    for archive in (app, built):
        listed = paths(archive.content, archive.filename)
        for _ in range(150):
            data = bytearray(archive.content)
            for _ in range(chance.randint(1, 4)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            for path in (None, listed[1]):
                try:
                    if path is None:
                        members(bytes(data), archive.filename)
                    else:
                        text(bytes(data), archive.filename, path)
                    d.compare_archives((io.BytesIO(archive.content), archive.filename),
                                       (io.BytesIO(bytes(data)), archive.filename))
                except d.Problem as problem:
                    assert problem.status in (400, 404) and problem.message


def test_sizes_and_places_beyond_32_bits_are_read():
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive, archive.open("a", "w", force_zip64=True) as file:
        file.write(b"text")
    content = packed.getvalue()
    at = content.index(b"PK\1\2")
    extra = struct.pack("<2H3Q", 1, 24, 4, 4, 0)
    directory = bytearray(content[at:at + 47] + extra)
    struct.pack_into("<2L", directory, 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<L", directory, 42, 0xFFFFFFFF)
    struct.pack_into("<2H", directory, 28, 1, len(extra))
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(directory), at, 0)
    content = content[:at] + bytes(directory) + end
    assert members(content, "a-1.0.zip").members[0].size == 4
    assert text(content, "a-1.0.zip", "a").text == "text"
    assert text(b"#!/bin/sh\n" + content, "a-1.0.zip", "a").text == "text", "it is moved"


# -- two versions: their metadata


def test_what_differs_in_the_metadata_is_named():
    found = d.compare_metadata(
        {"name": "a", "version": "1.0", "requires_python": ">=3.8", "license": "MIT",
         "requires_dist": ["click (>=7)", "Six>=1.0", "attrs", "tomli>=1 ; python_version<'3.11'"],
         "summary": "Old", "classifiers": ["A", "B"], "description": "x"},
        {"name": "a", "version": "2.0", "requires_python": ">=3.9", "license_expression": "MIT-0",
         "requires_dist": ["click>=8", "six >= 1.0", "rich", 'tomli>=1; python_version < "3.11"'],
         "summary": "New", "classifiers": ["B", "C"], "description": "y"})
    assert found == d.MetadataComparison(
        requires_added=("rich",), requires_gone=("attrs",),
        requires_changed=(("click (>=7)", "click>=8"),),
        python=("requires_python", (">=3.8",), (">=3.9",)),
        licence=("license", ("MIT",), ("MIT-0",)),
        fields=(("summary", ("Old",), ("New",)), ("classifiers", ("A",), ("C",))),
        readme_changed=True)


def test_the_same_metadata_differs_in_nothing():
    one = {"requires_dist": ["a>=1"], "summary": "S", "license": "MIT", "keywords": "x"}
    assert d.compare_metadata(one, {**one, "version": "2"}) == d.MetadataComparison()
    assert d.compare_metadata({}, {"requires_dist": [], "summary": "", "license": None}) == \
        d.MetadataComparison()


def test_several_requirements_of_one_project_are_paired_in_their_order():
    found = d.compare_metadata(
        {"requires_dist": ["a>=1; x", "a>=2; y", "a>=3; z"]},
        {"requires_dist": ["a>=1; x", "a>=4; y"]})
    assert found.requires_changed == (("a>=2; y", "a>=4; y"),)
    assert (found.requires_gone, found.requires_added) == (("a>=3; z",), ())


def test_metadata_of_the_largest_size_is_compared_at_once():
    old = {"requires_dist": ["a>=%d" % number for number in range(20000)]}
    new = {"requires_dist": ["a>=%d" % number for number in range(10000, 30000)]}
    began = time.process_time()
    assert len(d.compare_metadata(old, new).requires_changed) == 10000
    assert time.process_time() - began < 1


# -- two versions: their archives


def files(*names):
    return [types.SimpleNamespace(filename=name) for name in names]


@pytest.mark.parametrize("old, new, pair", [
    (["a-1.0.tar.gz", "a-1.0-py3-none-any.whl"], ["a-2.0-py3-none-any.whl", "a-2.0.tar.gz"],
     ("a-1.0.tar.gz", "a-2.0.tar.gz")),
    (["a-1.0.zip", "a-1.0.tar.gz"], ["a-2.0.zip"], ("a-1.0.tar.gz", "a-2.0.zip")),
    (["a-1.0.linux-x86_64.tar.gz", "a-1.0.tar.gz"], ["a-2.0.tar.gz"],
     ("a-1.0.tar.gz", "a-2.0.tar.gz")),
    (["a-1.0-cp39-cp39-win32.whl", "a-1.0-py3-none-any.whl"],
     ["a-2.0-cp39-cp39-win32.whl", "a-2.0-py3-none-any.whl", "a-2.0.tar.gz"],
     ("a-1.0-py3-none-any.whl", "a-2.0-py3-none-any.whl")),
    (["a-1.0-cp39-cp39-win32.whl", "a-1.0-cp313-cp313-win32.whl"],
     ["a-2.0-1-cp39-cp39-win32.whl", "a-2.0-cp313-cp313-win32.whl"],
     ("a-1.0-cp313-cp313-win32.whl", "a-2.0-cp313-cp313-win32.whl"))])
def test_an_sdist_is_compared_with_an_sdist_or_else_a_wheel_with_the_same_tags(old, new, pair):
    found = d.file_pair(files(*old), files(*new))
    assert (found.old.filename, found.new.filename, found.reason) == (*pair, "")


@pytest.mark.parametrize("old, new, reason", [
    ([], ["a-2.0.tar.gz"], "no file of both versions is here"),
    (["a-1.0.tar.gz"], ["a-2.0-py3-none-any.whl"], "neither an sdist each nor wheels"),
    (["a-1.0.doc.zip"], ["a-2.0.doc.zip"], "neither an sdist each nor wheels"),
    (["a-1.0-py2-none-any.whl"], ["a-2.0-py3-none-any.whl"], "neither an sdist each nor wheels")])
def test_where_nothing_can_be_compared_the_reason_is_told(old, new, reason):
    found = d.file_pair(files(*old), files(*new))
    assert (found.old, found.new) == (None, None) and reason in found.reason


def compare(old, new, filename="a-%s.zip"):
    """Two archives' bytes, or two `Archive`s."""
    sides = [(old, filename % "1.0"), (new, filename % "2.0")] if isinstance(old, bytes) else \
        [(archive.content, archive.filename) for archive in (old, new)]
    return d.compare_archives(*((io.BytesIO(content), name) for content, name in sides))


@pytest.mark.parametrize("make", [wheel, sdist])
def test_members_are_matched_without_the_version(make):
    def release(version, **others):
        return make("acme-app", version, summary="A text", extra_members={
            "acme_app/same.py": b"same\n",
            "acme_app/core.py": b"one\ntwo\nv%s\n" % version.encode(),
            **{"acme_app/" + name: data for name, data in others.items()}})
    found = compare(release("1.0", gone=b"x"), release("2.0", added=b"y", more=b"z"))
    assert [path for path, _ in found.added] == ["acme_app/added", "acme_app/more"]
    assert [path for path, _ in found.gone] == ["acme_app/gone"]
    assert found.gone[0][1].path.endswith("acme_app/gone") and found.gone[0][1].size == 1
    changed = {change.path: change for change in found.changed}
    assert changed["acme_app/core.py"].hunks == (
        (1, 1, (" one\n", " two\n", "-v1.0\n", "+v2.0\n")),)
    assert changed["acme_app/core.py"].new.size == len("one\ntwo\nv2.0\n")
    assert "acme_app/same.py" not in changed and not found.is_cut
    metadata, = [path for path in changed if path.endswith(("METADATA", "PKG-INFO"))]
    assert "+Version: 2.0\n" in changed[metadata].hunks[0].lines
    if make is wheel:
        assert changed["acme_app.dist-info/RECORD"].reason == "a list of hashes"


def test_the_same_archives_differ_in_nothing():
    for archive in (wheel("a", "1.0"), sdist("a", "1.0")):
        assert compare(archive, archive) == d.ArchiveComparison()


def test_a_zip_and_a_tar_are_compared():
    old = zipped(("a-1.0/x", "one\n"), ("a-1.0/y", "same"))
    new = tarred(("a-2.0/x", b"two\n"), ("a-2.0/y", b"same"))
    found = d.compare_archives((io.BytesIO(old), "a-1.0.zip"), (io.BytesIO(new), "a-2.0.tar.gz"))
    assert [(change.path, change.hunks) for change in found.changed] == [
        ("x", ((1, 1, ("-one\n", "+two\n")),))]


def test_a_change_under_the_same_checksum_is_seen():
    """CRC-32 is no protection: four bytes give a member any checksum."""
    def forged(prefix, target):
        table = [zipfile.crc32(bytes([n])) ^ zipfile.crc32(b"\0") for n in range(256)]
        high = {(entry >> 24): number for number, entry in enumerate(table)}
        state, wanted, order = zipfile.crc32(prefix) ^ 0xFFFFFFFF, target ^ 0xFFFFFFFF, []
        for _ in range(4):
            order.append(high[wanted >> 24])
            wanted = ((wanted ^ table[order[-1]]) << 8) & 0xFFFFFFFF
        tail = b""
        for number in reversed(order):
            tail += bytes([(state ^ number) & 0xFF])
            state = (state >> 8) ^ table[number]
        return prefix + tail
    honest = b"import os  # 12345678\n"
    evil = forged(b"import evil  #    ", zipfile.crc32(honest))
    assert zipfile.crc32(evil) == zipfile.crc32(honest) and len(evil) == len(honest)
    found = compare(zipped(("x", honest)), zipped(("x", evil)))
    assert [change.path for change in found.changed] == ["x"]


def test_what_there_is_no_time_to_hash_is_counted(monkeypatch):
    monkeypatch.setattr(d.Limits, "compared_hashing", -1)
    found = compare(zipped(("x", "same"), ("y", "one")), zipped(("x", "same"), ("y", "two")))
    assert [change.path for change in found.changed] == ["y"] and found.unchecked == 1


def test_entry_points_are_compared():
    def release(version, points):
        return wheel("a", version, extra_members={
            "a-%s.dist-info/entry_points.txt" % version: points})
    found = compare(release("1.0", b"[console_scripts]\na = a:main\nb=a:b\n"),
                    release("2.0", b"[console_scripts]\na=a:main\n; no\n[gui_scripts]\nb = a:b\n"))
    assert found.entry_points == (
        "entry_points", ("console_scripts: b = a:b",), ("gui_scripts: b = a:b",))


@pytest.mark.parametrize("old, new, reason", [
    (b"\x89PNG\0a", b"\x89PNG\0b", "binary"), (b"text", b"\0", "binary"),
    (b"x" * (256 * KIB + 1), b"y", "too large"), (b"a\x01", b"a\x02", "shown alike")])
def test_what_is_not_compared_line_by_line_has_a_reason(old, new, reason):
    for sides in ((zipped(("a", old)), zipped(("a", new)), "a-%s.zip"),
                  (tarred(("a", old)), tarred(("a", new)), "a-%s.tar.gz")):
        change, = compare(*sides).changed
        assert (change.hunks, change.reason) == ((), reason)
        assert not compare(*sides).is_cut


def test_what_is_damaged_counts_as_changed():
    content = zipped(("a", "x"), ("b", "y"))
    found = compare(content, restated(content, b"a", flags=8))
    assert found.changed == ()
    found = compare(content, restated(content, b"a", crc=1))
    assert [(change.path, change.reason) for change in found.changed] == [("a", "damaged")]


def test_a_link_that_leads_elsewhere_is_a_change():
    def link(target):
        return tarred(("a/x", b"", {"type": tarfile.SYMTYPE, "linkname": target}))
    change, = compare(link("y"), link("/etc/passwd"), "a-%s.tar.gz").changed
    assert (change.old.target, change.new.target, change.reason) == ("y", "/etc/passwd", "no file")


def test_a_last_line_without_its_end_differs():
    change, = compare(zipped(("a", "x\ny")), zipped(("a", "x\ny\n"))).changed
    assert change.hunks == ((1, 1, (" x\n", "-y", "+y\n")),)


def test_hunks_say_at_which_lines_they_begin():
    old = ["%d\n" % number for number in range(1, 1001)]
    new = old[:99] + ["new\n"] + old[99:899] + old[900:]
    assert list(d.line_hunks(old, new, float("inf"))) == [
        (97, 97, (" 97\n", " 98\n", " 99\n", "+new\n", " 100\n", " 101\n", " 102\n")),
        (897, 898, (" 897\n", " 898\n", " 899\n", "-900\n", " 901\n", " 902\n", " 903\n"))]


def test_after_so_many_members_the_rest_is_listed(monkeypatch):
    monkeypatch.setattr(d.Limits, "compared_members", 3)
    old, new = (zipped(*(("%d" % number, text) for number in range(5))) for text in ("x", "y"))
    found = compare(old, new)
    assert (found.is_cut, found.rest) == (True, ("3", "4"))
    assert [bool(change.hunks) for change in found.changed] == [True] * 3 + [False] * 2


def test_differences_take_so_much_room(monkeypatch):
    monkeypatch.setattr(d.Limits, "compared_size", 1000)
    old, new = (zipped(("1", text * 50), ("2", text)) for text in ("x\n", "y\n"))
    assert compare(old, new).rest == ("1",)


def test_the_members_of_a_tar_that_are_kept_take_so_much_room(monkeypatch):
    monkeypatch.setattr(d.Limits, "compared_kept", 10)
    old, new = (tarred(("1", text), ("2", text * 20)) for text in (b"x", b"y"))
    assert compare(old, new, "a-%s.tar.gz").rest == ("2",)


def test_an_archive_that_is_not_seen_whole_is_not_compared(monkeypatch):
    content = tarred(*((str(number), b"x") for number in range(20)))
    monkeypatch.setattr(d.Limits, "listed_members", 10)
    with pytest.raises(d.NotViewed, match="has further members"):
        compare(content, content, "a-%s.tar.gz")


def cycling(count, step):
    """256 KiB of `count` different lines, in an order that `step` gives."""
    return ["%03d\n" % (number * step % count) for number in range(65536)]


CHANCE = random.Random(5)
HOSTILE_TEXTS = {
    "identical lines": (["x\n"] * 131072, ["y\n"] + ["x\n"] * 131000 + ["z\n"]),
    "100 lines in another order": (cycling(100, 1), cycling(100, 37)),
    "997 lines in another order": (cycling(997, 1), cycling(997, 401)),
    "the same few lines shuffled": tuple(
        CHANCE.sample(["%d\n" % (number % 700) for number in range(50000)], 50000)
        for _ in range(2)),
    "all lines reversed": (["%d\n" % n for n in range(40000)],
                           ["%d\n" % n for n in reversed(range(40000))]),
    "one line each": (["a" * 250000], ["b" * 250000]),
    "empty lines": (["\n"] * 200000, ["x\n"] * 100000)}


@pytest.mark.parametrize("kind", sorted(HOSTILE_TEXTS))
def test_lines_made_to_take_long_do_not(kind):
    old, new = ("".join(lines) for lines in HOSTILE_TEXTS[kind])
    archives = zipped(*(("%d" % number, old) for number in range(8))), \
        zipped(*(("%d" % number, new) for number in range(8)))
    began = time.process_time()
    found = compare(*archives)
    assert time.process_time() - began < 2.5
    assert len(found.changed) == 8


def test_small_members_are_compared_before_those_that_may_take_all_the_time(monkeypatch):
    monkeypatch.setattr(d.Limits, "compared_members", 2)
    sizes = {"a": 3000, "b": 10, "c": 2000, "d": 20}
    old, new = (zipped(*((name, text * size) for name, size in sizes.items()))
                for text in ("x\n", "y\n"))
    found = compare(old, new)
    assert [change.path for change in found.changed] == ["a", "b", "c", "d"]
    assert found.rest == ("a", "c")


# -- the wheels of a release


def shown(matrix):
    """{(interpreter, ABI): {platform: [file name, ...]}}"""
    return {(row.python, row.abi): {column.tag: [file.filename for file in cell]
                                    for column, cell in zip(matrix.columns, row.cells) if cell}
            for row in matrix.rows}


NUMBERS = files(
    "n-1.0.tar.gz", "n-1.0-cp39-cp39-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    "n-1.0-cp313-cp313-win_amd64.whl", "n-1.0-cp313-cp313-macosx_11_0_arm64.whl",
    "n-1.0-cp313-cp313t-win_amd64.whl", "n-1.0-cp38-abi3-musllinux_1_2_x86_64.whl",
    "n-1.0-pp310-pypy310_pp73-win_amd64.whl", "n-1.0-py2.py3-none-any.whl",
    "n-1.0-cp39-cp39-macosx_10_9_x86_64.whl", "n-1.0-py3.9.egg", "n-1.0-1-py3-none-any.whl")


def test_wheels_stand_in_rows_of_interpreters_and_columns_of_platforms():
    matrix = d.wheel_matrix(NUMBERS)
    assert [(row.python, row.abi) for row in matrix.rows] == [
        ("cp313", "cp313"), ("cp313", "cp313t"), ("cp39", "cp39"), ("cp38", "abi3"),
        ("pp310", "pypy310_pp73"), ("py3", "none"), ("py2", "none")]
    assert matrix.columns == (
        ("manylinux_2_17_x86_64", "linux"), ("musllinux_1_2_x86_64", "linux"),
        ("macosx_10_9_x86_64", "macos"), ("macosx_11_0_arm64", "macos"), ("win_amd64", "windows"),
        ("any", "any"))
    assert shown(matrix)["py3", "none"] == {
        "any": ["n-1.0-py2.py3-none-any.whl", "n-1.0-1-py3-none-any.whl"]}
    assert shown(matrix)["cp39", "cp39"] == {
        "manylinux_2_17_x86_64": [NUMBERS[1].filename],
        "macosx_10_9_x86_64": ["n-1.0-cp39-cp39-macosx_10_9_x86_64.whl"]}
    assert matrix.sdists == (NUMBERS[0],) and matrix.others == (NUMBERS[9],)
    assert not matrix.is_cut


@pytest.mark.parametrize("python, rows", [
    ("cp313", ["cp313", "cp313"]), ("3.13", ["cp313", "cp313", "cp38", "py3"]),
    ("3.9", ["cp39", "cp38", "py3"]), ("3.10", ["cp38", "pp310", "py3"]), ("3.7", ["py3"]),
    ("2.7", ["py2"]), ("3", ["cp313", "cp313", "cp39", "cp38", "pp310", "py3"]), ("nonsense", [])])
def test_rows_are_chosen_by_a_tag_or_a_version(python, rows):
    assert [row.python for row in d.wheel_matrix(NUMBERS, python=python).rows] == rows


@pytest.mark.parametrize("platform, columns", [
    ("linux", ["manylinux_2_17_x86_64", "musllinux_1_2_x86_64", "any"]),
    ("windows", ["win_amd64", "any"]), ("manylinux2014_x86_64", ["manylinux_2_17_x86_64", "any"]),
    ("any", ["any"]), ("nonsense", ["any"])])
def test_columns_are_chosen_by_a_group_or_a_tag(platform, columns):
    assert [column.tag for column in d.wheel_matrix(NUMBERS, platform=platform).columns] == columns


def test_a_name_with_thousands_of_tags_is_no_place_in_the_matrix():
    tags = ".".join("t%d" % number for number in range(20))
    odd = files("n-1.0-%s-%s-%s.whl" % (tags, tags, tags), "n-1.0-.whl", "n.whl")
    matrix = d.wheel_matrix(odd)
    assert (matrix.rows, matrix.columns, matrix.others) == ((), (), tuple(odd))


def test_a_matrix_has_so_many_rows_and_columns():
    wide = files(*("n-1.0-cp3%d-none-linux_p%d.whl" % (number, number) for number in range(150)))
    matrix = d.wheel_matrix(wide)
    assert (len(matrix.rows), len(matrix.columns), matrix.is_cut) == (4, 40, True)


# -- where a release comes from, and its licences


def certificate(identity, tag=0x86, critical=False):
    """What matters of a certificate in DER: the names of its subject."""
    def value(tag, data):
        size = bytes([len(data)]) if len(data) < 128 else b"\x82" + struct.pack(">H", len(data))
        return bytes([tag]) + size + data
    names = value(0x30, value(tag, identity.encode()))
    return b"\x30\x82\x01\0 before " + value(0x30, b"\x06\x03\x55\x1d\x11" + (
        b"\1\1\xff" if critical else b"") + value(4, names)) + b" behind"


WORKFLOW = "https://github.com/acme/app/.github/workflows/release.yml@refs/tags/v1.0"


def attestation(archive, identity=WORKFLOW, sha256=None, **options):
    statement = {"_type": "https://in-toto.io/Statement/v1", "subject": [
        {"name": archive.filename, "digest": {"sha256": sha256 or archive.sha256}}],
        "predicateType": "https://docs.pypi.org/attestations/publish/v1", "predicate": None}
    return {"version": 1, "verification_material": {
        "certificate": base64.b64encode(certificate(identity, **options)).decode()},
        "envelope": {"statement": base64.b64encode(json.dumps(statement).encode()).decode()}}


def stored(archive, provenance=None):
    return types.SimpleNamespace(filename=archive.filename, provenance=provenance,
                                 hashes={"sha256": archive.sha256})


def test_it_is_told_who_claims_to_have_attested_a_file(app):
    found = d.provenance_facts(stored(app), json.dumps([
        attestation(app), attestation(app, "me@acme.example", tag=0x81, critical=True),
        attestation(app, sha256="0" * 64)]))
    assert [(each.claimed_by, each.names_file) for each in found.attestations] == [
        (WORKFLOW, True), ("me@acme.example", True), (WORKFLOW, False)]
    assert found.attestations[0].kind == "https://docs.pypi.org/attestations/publish/v1"
    assert found.is_claimed and found.link is None


def test_a_file_without_attestations_claims_nothing(app):
    assert d.provenance_facts(stored(app)) == d.Provenance()
    assert not d.provenance_facts(stored(app)).is_claimed
    linked = d.provenance_facts(stored(app, "https://pypi.example/p"))
    assert linked.is_claimed and linked.link == "https://pypi.example/p"


@pytest.mark.parametrize("item", [
    None, 1, [], {}, {"envelope": 1}, {"envelope": {"statement": "no base64!"}},
    {"envelope": {"statement": base64.b64encode(b"[" * 100000).decode()}},
    {"envelope": {"statement": base64.b64encode(b'{"subject": [1, {"digest": 2}]}').decode()}},
    {"verification_material": {"certificate": base64.b64encode(
        b"\x06\x03\x55\x1d\x11\x04\x84\xff\xff\xff\xff").decode()}}])
def test_unreadable_attestations_are_shown_as_such(app, item):
    assert d.provenance_facts(stored(app), json.dumps([item])).attestations == (("", "", False),)


def test_an_identity_is_shown_without_tricks(app):
    found = d.provenance_facts(stored(app), json.dumps([attestation(app, "https://a/\x1b[31m")]))
    assert found.attestations[0].claimed_by == "https://a/\\x1b[31m"
    assert d.provenance_facts(stored(app), "no JSON") == d.Provenance()
    many = json.dumps([attestation(app)] * 50)
    assert len(d.provenance_facts(stored(app), many).attestations) == d.Limits.shown_attestations


def test_bills_of_materials_are_found():
    built = wheel("a", "1.0", extra_members={
        "a-1.0.dist-info/sboms/a.cdx.json": b"{}", "a/sboms/no.json": b"{}"})
    found = d.sbom_members(members(built.content, built.filename).members)
    assert [member.path for member in found] == ["a-1.0.dist-info/sboms/a.cdx.json"]


def test_licence_files_are_found(app):
    listed = members(app.content, app.filename).members
    found = d.licence_files(listed, {"license_file": ["LICENSE", "gone/COPYING"]})
    assert found == (("LICENSE", listed[3], True), ("gone/COPYING", None, True))
    assert d.licence_files(listed, {}) == (("licenses/LICENSE", listed[3], False),)


def test_licence_files_of_an_sdist_and_of_an_older_wheel_are_found():
    built = sdist("a", "1.0", extra_members={"LICENSE.txt": b"", "vendor/COPYING": b""})
    listed = members(built.content, built.filename).members
    found = d.licence_files(listed, {"license_file": ["vendor/COPYING"]})
    assert [(licence.path, licence.member.path, licence.declared) for licence in found] == [
        ("vendor/COPYING", "a-1.0/vendor/COPYING", True),
        ("LICENSE.txt", "a-1.0/LICENSE.txt", False)]
    old = wheel("a", "1.0", extra_members={"a-1.0.dist-info/LICENSE": b""})
    listed = members(old.content, old.filename).members
    assert d.licence_files(listed, {"license_file": ["LICENSE"]})[0].member.path == \
        "a-1.0.dist-info/LICENSE"


@pytest.mark.parametrize("filename, tags", [
    ("a-1.0-py3-none-any.whl", ("py3", "none", "any")),
    ("a-1.0-1build-cp39-abi3-win32.whl", ("cp39", "abi3", "win32")),
    ("a-1.0-cp39-cp39-win32-variant.whl", ("cp39", "cp39", "win32")),
    ("a-1.0-py2.py3-none-any.WHL", ("py2.py3", "none", "any")),
    ("a-1.0-py3-none.whl", None), ("a-1.0--none-any.whl", None), ("a-1.0.tar.gz", None)])
def test_the_tags_of_a_wheel_are_read_from_its_name(filename, tags):
    assert d.wheel_tags(filename) == tags
