"""What the client reads of archives, in bounds of its own.

Sizes below 0, what goes back, what never ends, what is made of little.

The client is imported here: `unpack` and `read_archive` are asked themselves."""

import bz2
import gzip
import io
import os
import random
import tarfile
import time
import tracemalloc
import zipfile

import pytest

from client import POSIX, imported

posix_only = pytest.mark.skipif(not POSIX, reason="needs symbolic links")


lite = imported()
METADATA = b"Metadata-Version: 2.1\nName: a\nVersion: 1.0\n"


def head(name, size=0, kind=b"0", octal=None, target=b""):
    """A tar's header; a size below 0 in base 256, as GNU tar writes large ones.

    `octal`: what stands there in place of the size."""
    block = bytearray(512)
    block[:len(name)] = name
    block[100:108], block[156:157], block[257:265] = b"0000644\0", kind, b"ustar\x0000"
    block[157:157 + len(target)] = target
    if size < 0 or size >> 33:
        octal = (b"\xff" if size < 0 else b"\x80") + (size % (1 << 88)).to_bytes(11, "big")
    block[124:136] = octal or b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data):
    return data + bytes(-len(data) % 512)


def record(key, value):
    """A record of an extended header."""
    body = b" %s=%s\n" % (key, value)
    size = len(body) + len(b"%d" % (len(body) + 2))
    return b"%d%s" % (size, body)


def pax(*records, size=None):
    data = b"".join(record(*each) for each in records)
    return head(b"pax", len(data) if size is None else size, b"x") + padded(data)


BIG = 4 << 20
BACK = -(BIG + 1024)
BEFORE = head(b"a/b", BIG) + bytes(BIG)
BELOW_0 = {
    "plain": BEFORE + head(b"a/c", BACK),
    "octal": BEFORE + head(b"a/c", octal=b"-0000002000\0"),
    "pax": BEFORE + pax((b"size", b"%d" % BACK)) + head(b"a/c"),
    "long name": BEFORE + head(b"././@LongLink", 10, b"L") + padded(b"a/" + b"x" * 8) +
                 head(b"a/c", BACK),
    "of a long name": BEFORE + head(b"././@LongLink", BACK, b"L"),
    "of a link's": BEFORE + head(b"././@LongLink", -512, b"K"),
    "of records": BEFORE + head(b"pax", BACK, b"x"),
    "of records for all": BEFORE + head(b"pax", BACK, b"g"),
    "folder": BEFORE + head(b"a/d/", BACK, b"5"),
    "of old": BEFORE + head(b"a/d", BACK, b"S"),
}


def refused(path, function):
    """What the Failure says, which comes soon."""
    started = time.monotonic()
    with pytest.raises(lite.Failure) as failure:
        function(str(path))
    assert time.monotonic() - started < 5 and path.name in failure.value.message
    return failure.value.message


def test_sizes_below_0_end_it_at_once(tmp_path):
    for name, data in BELOW_0.items():
        path = tmp_path / "a-1.0.tar.gz"
        path.write_bytes(gzip.compress(data + bytes(10240), 1))
        for function in (lite.read_archive, lambda path: lite.unpack(path, str(tmp_path / "out"))):
            assert "broken archive" in refused(path, function), name


@pytest.mark.parametrize("data", [
    pax((b"size", b"9" * 30)) + head(b"a/c"), pax((b"size", b"1e3")) + head(b"a/c"),
    pax((b"size", b"")) + head(b"a/c"), head(b"p", 8, b"x") + padded(b"0 a=b\n"),
    head(b"p", 8, b"x") + padded(b"99 a=b\n\n"), head(b"p", 8, b"x") + padded(b"6 a=bc\n"),
    head(b"p", 8, b"x") + padded(b"a=bcdefg"), head(b"a/b", 100) + b"cut off", b"no tar" * 200,
    b"", bytes(3), head(b"a/b", octal=b"8" * 11 + b"\0"), head(b"a/b") + b"half a header",
    head(b"a/b").replace(b"a/b", b"a/c")])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress])
def test_a_tar_that_is_broken_is_refused(tmp_path, data, pack):
    path = tmp_path / "a-1.0.tar.gz"
    path.write_bytes(pack(data))
    for function in (lite.read_archive, lambda path: lite.unpack(path, str(tmp_path / "out"))):
        refused(path, function)


class Endless:
    """A file without an end: the same data again and again.

    `given`: bytes that were read; `most`: at once."""

    def __init__(self, data):
        self.data, self.given, self.most, self.left = data, 0, 0, b""

    def seek(self, position):
        assert position == 0 and self.given <= 3, "a tar is read forwards"
        self.given, self.left = 0, b""

    def read(self, size):
        assert size >= 0
        self.given, self.most = self.given + size, max(self.most, size)
        while len(self.left) < size:
            self.left += self.data * (1 + size // len(self.data))
        piece, self.left = self.left[:size], self.left[size:]
        return piece


@pytest.mark.parametrize("data, words", [
    (head(b"a/b"), "headers"), (head(b"a/b", 1 << 40), "unpacks to more than"),
    (head(b"a/b", 5000) + padded(bytes(5000)), "more"),
    (head(b"x", 1 << 40, b"L"), "header of a member is larger"),
    (head(b"x", 1 << 40, b"x"), "header of a member is larger"),
    (head(b"x", 1 << 40, b"g"), "unpacks to more than"),
    (pax((b"comment", b"x" * 900)), "headers"),
    (head(b"x", 2000, b"L") + padded(bytes(2000)), "more")])
def test_data_without_an_end_is_read_up_to_a_bound(monkeypatch, data, words):
    """None of it is kept."""
    monkeypatch.setattr(lite, "UNPACKED_LIMIT", 16 << 20)
    monkeypatch.setattr(lite, "MEMBERS_LIMIT", 2000)
    source = Endless(data)
    with pytest.raises(ValueError, match=words):
        for _ in lite.TarReader(source).members():
            pass
    assert source.given <= 17 << 20 and source.most <= lite.PIECE


def tree(folder):
    """{path: content, or "-> target"} of what lies in a folder."""
    found = {}
    for top, folders, names in os.walk(str(folder)):
        for name in names + folders:
            path = os.path.join(top, name)
            relative = os.path.relpath(path, str(folder))
            if os.path.islink(path):
                found[relative] = "-> " + os.readlink(path)
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    found[relative] = file.read(), os.access(path, os.X_OK)
            else:
                found[relative] = None
    return found


@posix_only
@pytest.mark.parametrize("compression", ["", "gz", "bz2"])
@pytest.mark.parametrize("kind", ["USTAR", "GNU", "PAX"])
def test_what_others_pack_is_unpacked(tmp_path, kind, compression):
    kind = getattr(tarfile, kind + "_FORMAT")
    path, wanted = tmp_path / "a-1.0.tar.gz", {}
    deep = "a-1.0/" + "deeper/" * 20
    with tarfile.open(str(path), "w:" + compression, format=kind) as archive:
        members = [
            ("a-1.0/PKG-INFO", METADATA, 0o644), ("a-1.0/run", b"#!", 0o755),
            (deep + "far", b"away" * 1000, 0o644), ("a-1.0/gr\u00fcn", b"", 0o644),
            ("a-1.0/exact", bytes(1024), 0o600)]
        if kind != tarfile.USTAR_FORMAT:
            members += [("a-1.0/" + "n" * 150, b"long", 0o644),
                        ("a-1.0/\U0001f40d" * 6, b"x", 0o644)]
        for name, content, mode in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = len(content), mode, 1e9 + 0.5
            info.uid = 5 if kind == tarfile.USTAR_FORMAT else 3000000
            archive.addfile(info, io.BytesIO(content))
            wanted[name] = content, bool(mode & 0o100)
        for name, kind_of_member, target in [
                ("a-1.0/folder", tarfile.DIRTYPE, ""), ("a-1.0/link", tarfile.SYMTYPE, "run"),
                ("a-1.0/same", tarfile.LNKTYPE, "a-1.0/run")]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mode = kind_of_member, target, 0o755
            archive.addfile(info)
        wanted.update({"a-1.0/folder": None, "a-1.0/link": "-> run", "a-1.0/same": (b"#!", False)})
    lite.unpack(str(path), str(tmp_path / "out"))
    found = tree(tmp_path / "out")
    folders = {name for name, value in found.items() if value is None}
    assert {name: found[name] for name in found if name not in folders or name in wanted} == wanted
    assert lite.read_archive(str(path)).fields["name"] == "a"


def test_any_damage_to_an_archive_is_told_or_does_not_matter(tmp_path):
    """Bytes changed at random, in the tar and in its compression, and in a zip."""
    draw, plain, packed = random.Random(1), io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("a-1.0/PKG-INFO", "a-1.0/" + "x" * 120, "a-1.0/gr\u00fcn"):
            info = tarfile.TarInfo(name)
            info.size = len(METADATA)
            archive.addfile(info, io.BytesIO(METADATA))
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a-1.0/PKG-INFO", METADATA)
        archive.writestr("a-1.0/x", b"x" * 1000)
    tar = plain.getvalue()
    kinds = [("a-1.0.tar.gz", tar), ("a-1.0.tar.gz", gzip.compress(tar)),
             ("a-1.0.zip", packed.getvalue())]
    for number in range(200):
        name, data = kinds[number % 3]
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            byte = draw.choice([0, 0x80, 0xff, draw.randrange(256)])
            damaged[draw.randrange(min(len(damaged), 4096))] = byte
        path = tmp_path / name
        path.write_bytes(damaged)
        out = str(tmp_path / str(number))
        for function in (lite.read_archive, lambda path: lite.unpack(path, out)):
            try:
                function(str(path))
            except lite.Failure as failure:
                assert name in failure.message or str(number) in failure.message


@pytest.mark.parametrize("members", [
    head(b"a/b", 5000) + padded(bytes(5000)) + b"".join(
        head(b"a/%d" % number, 0, b"1", target=b"a/b") for number in range(40)),
    b"".join(head(b"a/%d/" % number + b"d/" * 40, 0, b"5") for number in range(40)),
    b"".join(head(b"a/%d" % number) for number in range(1200))])
def test_much_is_not_made_of_little(tmp_path, monkeypatch, members):
    """By links that are copied, by folders within folders, by many files."""
    monkeypatch.setattr(lite, "UNPACKED_LIMIT", 100000)
    monkeypatch.setattr(lite, "MEMBERS_LIMIT", 1000)
    path = tmp_path / "a-1.0.tar.gz"
    path.write_bytes(gzip.compress(members + bytes(1024)))
    assert refused(path, lambda path: lite.unpack(path, str(tmp_path / "out")))
    found = tree(tmp_path / "out")
    sizes = [len(value[0]) for value in found.values() if isinstance(value, tuple)]
    assert len(found) <= 1001 and sum(sizes) <= 100000


# -- zips


def test_the_directory_of_a_zip_is_bounded(tmp_path, monkeypatch):
    path = tmp_path / "a-1.0.zip"
    with zipfile.ZipFile(str(path), "w") as archive:
        archive.writestr("a-1.0/PKG-INFO", METADATA)
        for number in range(200):
            archive.writestr("a-1.0/%d" % number, "")
    assert lite.read_archive(str(path)).name == "a"
    monkeypatch.setattr(lite, "DIRECTORY_LIMIT", 5000)
    for function in (lite.read_archive, lambda path: lite.unpack(path, str(tmp_path / "out"))):
        assert "its directory is larger than" in refused(path, function)


def test_a_member_of_a_zip_is_unpacked_in_pieces(tmp_path):
    path = tmp_path / "a-1.0.zip"
    with zipfile.ZipFile(str(path), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a-1.0/PKG-INFO", bytes(21 << 20))
    assert "metadata is larger" in refused(path, lite.read_archive)
    tracemalloc.start()
    try:
        lite.unpack(str(path), str(tmp_path / "out"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_unpack_all_at_once_are_given_little(tmp_path, monkeypatch, method):
    path, read, asked = tmp_path / "a-1.0.zip", zipfile.ZipExtFile.read, []
    with zipfile.ZipFile(str(path), "w", method) as archive:
        archive.writestr("a-1.0/PKG-INFO", METADATA)

    def noted(file, size=-1):
        asked.append(size)
        return read(file, size)

    monkeypatch.setattr(zipfile.ZipExtFile, "read", noted)
    assert lite.read_archive(str(path)).name == "a" and set(asked) == {lite.SMALL_PIECE}
