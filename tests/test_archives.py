"""What is read out of archives (chapter 4): what installers can't use, or no honest tool writes, is
refused at a bounded cost.

The functions alone where a bound or a format is looked at; a server where it matters what an
uploader is told.
"""

import bz2
import dataclasses
import gzip
import io
import itertools
import lzma
import os
import random
import struct
import tarfile
import threading
import time
import tracemalloc
import types
import zipfile
import zlib

import pytest

import devpi_lite as d
from harness import Server, around, eventually, sdist, wheel, zipped

MIB = 1 << 20
INFO = b"Metadata-Version: 2.1\nName: a\nVersion: 1.0\n"
PACKINGS = {
    ".tar.gz": lambda data: gzip.compress(data, 1),
    ".tar.bz2": bz2.compress,
    ".tar.xz": lzma.compress,
    ".tar": bytes,
}


def look(content, filename="a-1.0.tar.gz", **options):
    return d.archive_metadata(io.BytesIO(content), filename, is_whole=True, **options)


def refusal(content, filename="a-1.0.tar.gz", kind=d.BadRequest, **options):
    """What the refusal of an archive says."""
    with pytest.raises(kind) as caught:
        look(content, filename, **options)
    assert type(caught.value) is kind, caught.value
    return caught.value.message


# Tars, made by hand: `tarfile` refuses to write what some tests need


def header(name, size=0, kind=b"0", **changes):
    """A header of a tar; `size` may be the bytes of its field, `changes` name the place of other
    bytes: at345=b"...".
    """
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[156:157], block[257:265] = b"0000644\0", kind, b"ustar\x0000"
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    for place, data in changes.items():
        block[int(place[2:]) : int(place[2:]) + len(data)] = data
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name, data=b"", kind=b"0", **changes):
    return header(name, len(data), kind, **changes) + data + bytes(-len(data) % 512)


def below_zero(number):
    """A size in base 256, as GNU tar writes large ones."""
    return b"\xff" + ((1 << 88) + number).to_bytes(11, "big")


def pax(*fields, kind=b"x"):
    """A pax header; the number before each record is the length of all of it, the number too."""
    records = []
    for key, value in fields:
        rest = b" %s=%s\n" % (key, value)
        length = next(
            length
            for length in itertools.count(len(rest))
            if length == len(rest) + len(str(length))
        )
        records.append(b"%d%s" % (length, rest))
    return member(b"PaxHeaders/a", b"".join(records), kind)


PKG_INFO, END = member(b"a-1.0/PKG-INFO", INFO), bytes(1024)
BACKWARDS = {
    "base 256": lambda size: header(b"a/c", below_zero(-size)),
    "octal": lambda size: header(b"a/c", b"-%010o\0" % min(size, 8**10 - 1)),
    "pax": lambda size: pax((b"size", b"-%d" % size)) + header(b"a/c"),
    "behind a long name": lambda size: member(b"././@LongLink", b"a/" + b"n" * 200 + b"\0", b"L")
    + header(b"a/c", below_zero(-size)),
    "of an extended header": lambda size: header(b"a/c", below_zero(-size), b"x"),
    "of a sparse file": lambda size: header(b"a/c", 0, b"S", at483=below_zero(-size)),
}


@pytest.mark.parametrize("suffix", sorted(PACKINGS))
@pytest.mark.parametrize("how", sorted(BACKWARDS))
def test_a_member_with_a_size_below_zero_is_refused(suffix, how):
    """Readers that believe it go back to a header before, and unpack what lies between again."""
    content = PACKINGS[suffix](
        PKG_INFO + member(b"a/b", bytes(MIB)) + BACKWARDS[how](MIB + 1024) + END
    )
    assert (
        refusal(content, "a-1.0" + suffix)
        == "'a-1.0%s' holds a member with a size below zero" % suffix
    )


@pytest.mark.parametrize("suffix", sorted(PACKINGS))
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_members_of_a_tar_are_those_that_tarfile_sees(suffix, format):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=format) as archive:
        names = [
            "a-1.0",
            "a-1.0/PKG-INFO",
            "a-1.0/" + "d" * 70 + "/" + "n" * 90,
            "a-1.0/link",
            "a-1.0/hard",
        ]
        if format != tarfile.USTAR_FORMAT:
            names += ["a-1.0/" + "very/" * 60 + "long", "a-1.0/caf\u00e9"]
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.type = {0: tarfile.DIRTYPE, 3: tarfile.SYMTYPE, 4: tarfile.LNKTYPE}.get(
                number, tarfile.REGTYPE
            )
            info.linkname = "a-1.0/" + "l" * 90 if number in (3, 4) else ""
            data = INFO if number == 1 else b"x" * (500 * number) if info.isreg() else b""
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    content = PACKINGS[suffix](packed.getvalue())
    assert look(content, "a-1.0" + suffix) == INFO
    effort = d.Effort(io.BytesIO(content), "x")
    stream = d._Forwards(iter([packed.getvalue()]), effort)
    with tarfile.open(fileobj=io.BytesIO(packed.getvalue())) as archive:
        assert (
            [found.name.rstrip("/") for found in d._tar_members(stream, "x", effort)]
            == archive.getnames()
            == names
        )


def test_what_old_tars_and_tars_of_git_hold_is_understood():
    old = member(b"a-1.0/", kind=b"\0") + member(b"./a-1.0/PKG-INFO", INFO, b"\0")
    git = pax((b"comment", b"0" * 40), kind=b"g") + PKG_INFO
    volume = (
        member(b"a volume", kind=b"V")
        + member(b"a-1.0/x", b"data of an unknown type", b"Q")
        + PKG_INFO
    )
    sparse = (
        member(
            b"a-1.0/holes",
            b"x" * 512,
            b"S",
            at386=b"%011o\0%011o\0" % (1024, 512),
            at483=b"%011o\0" % 1536,
        )
        + PKG_INFO
    )
    more = (
        header(b"a-1.0/holes", 512, b"S", at482=b"\1", at483=b"%011o\0" % 1536)
        + bytes(504)
        + b"\1"
        + bytes(519)
        + bytes(512)
        + PKG_INFO
    )
    for content in (old, git, volume, sparse, more):
        assert look(content + END, "a-1.0.tar") == INFO
        assert look(content, "a-1.0.tar") == INFO  # without an end mark
        assert (
            look(gzip.compress(content) + gzip.compress(END) + bytes(100)) == INFO
        )  # two streams, the rest of a block
    twice = member(b"a-1.0/PKG-INFO", b"Name: first") + PKG_INFO
    assert look(twice, "a-1.0.tar") == INFO  # the last one is what unpacking leaves


LONG = b"a" * 5000
HOSTILE_TARS = {
    "..": (member(b"a/../../b"), "leaves the archive"),
    "absolute": (member(b"/etc/x"), "leaves the archive"),
    "a prefix of ..": (member(b"x", at345=b"../.."), "leaves the archive"),
    ".. in a long name": (
        member(b"x", b"a/../../b\0", b"L") + member(b"a/b"),
        "leaves the archive",
    ),
    ".. in a pax path": (pax((b"path", b"a/../../b")) + member(b"a/b"), "leaves the archive"),
    ".. in a sparse name": (
        pax((b"GNU.sparse.name", b"../b")) + member(b"a/b"),
        "leaves the archive",
    ),
    "NUL in a pax path": (pax((b"path", b"a/b\0c")) + member(b"a/b"), "leaves the archive"),
    "two pax headers": (
        pax((b"size", b"0")) + pax((b"size", b"512")) + member(b"a/b"),
        "two extended headers that say the same",
    ),
    "two long names": (
        member(b"x", b"a/b\0", b"L") * 2 + member(b"a/b"),
        "two extended headers that say the same",
    ),
    "two kinds of long names": (
        member(b"x", b"a/b\0", b"L") + pax((b"path", b"a/c")) + member(b"a/b"),
        "two extended headers that say the same",
    ),
    "one name for all": (
        pax((b"path", b"a/b"), kind=b"g") + member(b"a/b"),
        "one name or size for all its members",
    ),
    "one size for all": (
        pax((b"size", b"0"), kind=b"g") + member(b"a/b"),
        "one name or size for all its members",
    ),
    "a directory with data": (
        member(b"a/b/", b"x", b"\0"),
        "which some readers take for a directory, some not",
    ),
    "a terabyte": (header(b"a/b", 1 << 32), "holds too much"),
    "a terabyte by pax": (pax((b"size", b"%d" % (1 << 40))) + member(b"a/b"), "holds too much"),
    "a terabyte of holes": (
        header(b"a/b", 0, b"S", at483=b"\x80\0\0\0\0\0\0\1\0\0\0\0"),
        "holds too much",
    ),
    "a terabyte of pax holes": (
        pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"%d" % (1 << 40)))
        + member(b"a/b"),
        "holds too much",
    ),
    "holes without end": (
        header(b"a/b", 0, b"S", at482=b"\1") + (bytes(504) + b"\1" + bytes(7)) * 9000,
        "holds too much",
    ),
    "a large extended header": (
        member(b"x", bytes(d.Limits.tar_header + 1), b"x"),
        "holds too much: extended headers of over",
    ),
    "a gigabyte of an extended header": (
        header(b"x", 1 << 30, b"x"),
        "holds too much: extended headers of over",
    ),
    "many extended headers": (
        (member(b"x", b"%d K=%s\n" % (MIB - 512, b"v" * (MIB - 512 - 11)), b"x") + member(b"a/b"))
        * 4,
        "holds too much: extended headers of over",
    ),
}


@pytest.mark.parametrize("kind", sorted(HOSTILE_TARS))
def test_a_tar_that_no_honest_tool_writes_is_refused(kind, monkeypatch):
    monkeypatch.setattr(d.Limits, "archive_members", 2000)
    monkeypatch.setattr(d.Limits, "tar_headers", 3 * MIB)
    content, words = HOSTILE_TARS[kind]
    began = time.process_time()
    for data in (content + END, PKG_INFO + content + END):
        assert words in refusal(gzip.compress(data, 1))
    assert time.process_time() - began < 5


def test_global_fields_of_a_tar_cost_no_more_the_more_members_it_has():
    fields = pax(*((b"key%d" % number, b"value") for number in range(5000)), kind=b"g")
    began = time.process_time()
    assert look(gzip.compress(fields + PKG_INFO + member(b"a/b") * 5000 + END, 1)) == INFO
    assert time.process_time() - began < 3


BROKEN_TARS = {
    "empty": b"",
    "only an end": END,
    "text": b"no archive at all, whatever its name says" * 40,
    "a damaged header": PKG_INFO
    + member(b"a/b", b"x").replace(b"a/b", b"a/c")
    + member(b"a/d")
    + END,
    "a damaged size": PKG_INFO + header(b"a/b", b"000000009zz\0") + END,
    "a cut header": PKG_INFO + member(b"a/b")[:100],
    "a cut member": PKG_INFO + member(b"a/b", b"x" * 1000)[:1000],
    "an extended header of nothing": PKG_INFO + pax((b"path", b"x")) + END,
    "a damaged extended header": PKG_INFO
    + member(b"x", b"99 path=x\n", b"x")
    + member(b"a/b")
    + END,
    "a size by pax that is none": PKG_INFO + pax((b"size", b"many")) + member(b"a/b") + END,
}


@pytest.mark.parametrize("suffix", sorted(PACKINGS))
@pytest.mark.parametrize("kind", sorted(BROKEN_TARS))
def test_a_tar_that_can_not_be_read_to_its_last_member_is_broken(kind, suffix):
    message = refusal(PACKINGS[suffix](BROKEN_TARS[kind]), "a-1.0" + suffix, d.BrokenArchive)
    assert "built or sent incompletely?" in message and message.startswith(
        "'a-1.0%s' is no tar file" % suffix
    )


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.bz2", ".tar.xz"])
def test_every_packed_tar_that_was_cut_is_broken(suffix):
    content = PACKINGS[suffix](PKG_INFO + member(b"a/b", random.Random(1).randbytes(700)) + END)
    assert look(content, "a-1.0" + suffix) == INFO
    for size in range(len(content)):
        refusal(content[:size], "a-1.0" + suffix, d.BrokenArchive)


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.xz"])
def test_a_packed_tar_with_a_byte_changed_is_broken_or_says_the_same(suffix):
    content = bytearray(
        PACKINGS[suffix](PKG_INFO + member(b"a/b", random.Random(1).randbytes(700)) + END)
    )
    for place in range(0, len(content), 3):
        changed = content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]
        try:
            assert look(bytes(changed), "a-1.0" + suffix) == INFO
        except d.BrokenArchive:
            pass


def test_whatever_stands_in_an_archive_only_refusals_come_out_and_no_more_is_unpacked_than_allowed(
    monkeypatch,
):
    monkeypatch.setattr(d.Limits, "archive_free", 200000)
    spent = []
    spend = d.Effort.spend
    monkeypatch.setattr(
        d.Effort,
        "spend",
        lambda effort, size: (
            spent.append((effort.unpacked + size, effort.limit)),
            spend(effort, size),
        ),
    )
    dice = random.Random(4)
    seeds = [
        (
            "a-1.0.tar",
            PKG_INFO
            + pax((b"size", b"512"))
            + member(b"a/b", b"x" * 512)
            + member(b"a/c", bytes(60000))
            + END,
        )
    ]
    seeds += [("a-1.0-py3-none-any.whl", wheel("a", "1.0", size=3000).content)]
    for _ in range(400):
        filename, content = dice.choice(seeds)
        content = bytearray(content)
        for _ in range(dice.choice((1, 1, 2, 8))):
            place = dice.randrange(len(content))
            content[place : place + 1] = bytes(
                [dice.choice((0, 0x80, 0xFF, 0x2D, dice.randrange(256)))]
            ) * dice.choice((1, 1, 11, 0))
        if filename.endswith(".tar"):
            for at in range(
                0, len(content) - 511, 512
            ):  # so that the checksum is not all that is looked at
                if content[at + 257 : at + 262] == b"ustar":
                    content[at + 148 : at + 156] = b" " * 8
                    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
        packed, name = (
            (gzip.compress(content, 1), "a-1.0.tar.gz")
            if filename.endswith(".tar")
            else (bytes(content), filename)
        )
        try:
            look(packed, name)
        except d.BadRequest:
            pass
    assert all(unpacked <= limit + (256 << 10) for unpacked, limit in spent)


# How much an archive may unpack to


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.bz2", ".tar.xz"])
def test_a_small_archive_that_unpacks_to_much_is_refused_early(suffix):
    pack, name = PACKINGS[suffix], "a-1.0" + suffix
    began = time.process_time()
    stated = pack(PKG_INFO + header(b"a/zeros", 2047 * MIB))
    assert "holds too much: its %d bytes unpack to over " % len(stated) in refusal(stated, name)
    zeros = gzip.compress(bytes(8 * MIB), 9) if suffix == ".tar.gz" else pack(bytes(8 * MIB))
    behind_the_end = pack(PKG_INFO + END) + zeros * 12
    assert "holds too much: its %d bytes unpack to over " % len(behind_the_end) in refusal(
        behind_the_end, name
    )
    assert time.process_time() - began < 3


MANY_MEMBERS = {  # a piece, how often it comes
    "empty ones": (member(b"a/b") * 2000, 20, True),
    "behind extended headers": (
        (member(b"x", b"a/b\0", b"K") + pax((b"path", b"a/b")) + member(b"a/b")) * 1000,
        20,
        True,
    ),
    "few, checked as signed": (member("a/\xe9".encode()) * 990, 10, False),
    "extended headers alone": (pax((b"a", b"b"), kind=b"g") * 2000, 30, True),
    "fields alone": (member(b"x", b"5 a=\n" * 200000, b"g"), 12, True),
}


@pytest.mark.parametrize("suffix", [".tar.xz", ".tar.bz2"])
@pytest.mark.parametrize("kind", sorted(MANY_MEMBERS))
def test_the_members_of_a_small_tar_cost_little(kind, suffix):
    piece, count, is_refused = MANY_MEMBERS[kind]
    pack = PACKINGS[suffix]
    content = pack(PKG_INFO) + pack(piece) * count + pack(END)
    assert len(content) < 60000
    began = time.thread_time()
    if is_refused:
        assert "holds too much: over 1" in refusal(content, "a-1.0" + suffix)
    else:
        assert look(content, "a-1.0" + suffix) == INFO
    assert time.thread_time() - began < 1


def test_an_sdist_of_many_small_files_passes():
    dice = random.Random(5)
    files = b"".join(
        member(b"a-1.0/data/%d.txt" % number, dice.randbytes(150)) for number in range(12000)
    )
    assert look(tar_gz(PKG_INFO, files)) == INFO


def test_tars_of_very_many_members_are_looked_through_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(d.Limits, "large_directory", 20)
    monkeypatch.setattr(d.Limits, "large_wait", 0.1)
    many = tar_gz(PKG_INFO, member(b"a/b") * 20)
    efforts = [d.Effort(io.BytesIO(many), WHEEL) for _ in range(d.Limits.large_checks)]
    for effort in efforts:
        effort.wait_for_turn()
    with pytest.raises(d.Busy):
        look(many)
    for effort in efforts:
        effort.__exit__()
    assert look(many) == INFO


def test_nobody_who_reads_a_mirrored_wheel_waits_for_others_to_be_looked_through(
    monkeypatch, tmp_path
):
    """It is kept without metadata; the next one who asks for them finds out."""
    monkeypatch.setattr(d.Limits, "large_directory", 2)
    monkeypatch.setattr(d.Limits, "large_wait", 20)
    blobs, content = d.Blobs(str(tmp_path)), zipped(*PARTS)
    with blobs.incoming() as incoming:
        incoming.write(content)
        sha256 = incoming.keep()
    mirrors, file = types.SimpleNamespace(blobs=blobs), types.SimpleNamespace(filename=WHEEL)
    efforts = [d.Effort(io.BytesIO(content), WHEEL) for _ in range(d.Limits.large_checks)]
    for effort in efforts:
        effort.wait_for_turn()
    began = time.monotonic()
    assert d.MirrorFiles.metadata_of_blob(mirrors, file, sha256) is None
    assert time.monotonic() - began < 5
    for effort in efforts:
        effort.__exit__()
    assert d.MirrorFiles.metadata_of_blob(mirrors, file, sha256) == d.MetadataFile.of(INFO)


def test_an_honest_sdist_with_a_text_of_a_hundred_megabytes_passes():
    text = b"".join(
        b"%d,measured at the %d. place,%d\n" % (n, n * n % 1000003, n**3 % 99991)
        for n in range(2500)
    )
    block = text + bytes(-len(text) % 512)
    count = 100 * MIB // len(block) + 1
    content = (
        gzip.compress(PKG_INFO + header(b"a/data.csv", count * len(block)), 1)
        + gzip.compress(block, 1) * count
        + gzip.compress(END)
    )
    assert look(content) == INFO


WHEEL, META = "a-1.0-py3-none-any.whl", ("a-1.0.dist-info/METADATA", INFO)
FORMAT = ("a-1.0.dist-info/WHEEL", b"Wheel-Version: 1.0\nTag: py3-none-any\n")
PARTS = (META, FORMAT, ("a-1.0.dist-info/RECORD", b""))


def test_how_much_a_zip_may_unpack_to_follows_from_its_size(monkeypatch):
    """Here in kilobytes what stands for gigabytes."""
    monkeypatch.setattr(d.Limits, "archive_free", 60000)
    monkeypatch.setattr(d.Limits, "archive_bytes", 400000)
    noise = random.Random(1).randbytes
    small, large = zipped(*PARTS, ("a/zeros", bytes(390000))), zipped(
        *PARTS, ("a/lib.so", noise(300000) + bytes(400000))
    )
    assert "holds too much: its %d bytes unpack to over %d" % (
        len(small),
        60000 + 300 * len(small),
    ) in refusal(small, WHEEL)
    assert look(large, WHEEL) == INFO  # half of it libraries, more than archive_bytes in all
    many = zipped(
        *PARTS, *(("a/%d" % n, bytes(20000)) for n in range(100)), ("a/lib.so", noise(1000))
    )
    assert "unpack to over 400000" in refusal(many, WHEEL)


def test_of_a_mirrored_wheel_only_the_metadata_is_read_however_large_it_is():
    content = zipped(*PARTS, ("a/lib.so", b"lib"))
    size = struct.pack("<L", 3)
    at = content.rindex(b"PK\1\2") + 24
    assert content[at : at + 4] == size
    huge = content[:at] + struct.pack("<L", 0xFFFFFFFE) + content[at + 4 :]
    assert d.archive_metadata(io.BytesIO(huge), WHEEL) == INFO
    assert "holds too much" in refusal(huge, WHEEL)


def test_large_archives_are_looked_through_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(d.Limits, "large_archive", 100000)
    monkeypatch.setattr(d.Limits, "large_wait", 0.1)
    content = zipped(*PARTS, ("a/text", random.Random(1).randbytes(200000)))
    efforts = [d.Effort(io.BytesIO(content), WHEEL) for _ in range(d.Limits.large_checks)]
    for effort in efforts:
        effort.spend(150000)
    with pytest.raises(d.Busy):
        look(content, WHEEL)
    assert look(zipped(*PARTS), WHEEL) == INFO  # what is small waits for nobody
    efforts[0].__exit__()
    assert look(content, WHEEL) == look(content, WHEEL) == INFO  # and gives the turn back
    refused = zipped(*PARTS, ("a/text", random.Random(1).randbytes(200000)), ("a/../../b", b""))
    for _ in range(3):
        refusal(refused, WHEEL)
    for effort in efforts[1:]:
        effort.__exit__()


def test_zips_of_very_many_members_are_looked_through_a_few_at_a_time(monkeypatch):
    """Their directories take much memory, however little they unpack to."""
    monkeypatch.setattr(d.Limits, "large_directory", 20)
    monkeypatch.setattr(d.Limits, "large_wait", 0.1)
    many = zipped(*PARTS, *(("a/%d" % number, b"") for number in range(20)))
    efforts = [d.Effort(io.BytesIO(many), WHEEL) for _ in range(d.Limits.large_checks)]
    for effort in efforts:
        effort.wait_for_turn()
    for look_at in (look, d.doc_members):
        with pytest.raises(d.Busy):
            look_at(io.BytesIO(many) if look_at is d.doc_members else many, WHEEL)
    for effort in efforts:
        effort.__exit__()
    assert look(many, WHEEL) == INFO
    assert len(d.doc_members(io.BytesIO(many), WHEEL)[0]) == 23


@pytest.mark.parametrize("method, damage", [
    (zipfile.ZIP_STORED, lambda content, place: content[:place + 1000]),
    (zipfile.ZIP_DEFLATED, lambda content, place: content[:place + 1000]),
    (zipfile.ZIP_DEFLATED, lambda content, place: content[:place] + b"\xff" * 9 + content[place + 9:])],
    ids=["stored, cut", "deflated, cut", "deflated, overwritten"])
def test_documentation_that_was_damaged_on_the_disk_is_an_error_of_the_disk(method, damage):
    page = b"".join(b"<p>%d</p>" % number for number in range(9000))
    content = zipped(("index.html", page), compression=method)
    (member,), _ = d.doc_members(io.BytesIO(content), "docs.zip")
    assert b"".join(d.member_bytes(io.BytesIO(content), member)) == page

    with pytest.raises(OSError, match="the documentation zip is damaged"):
        b"".join(d.member_bytes(io.BytesIO(damage(content, member.start)), member))


def test_those_who_wait_for_a_turn_are_not_counted_as_busy(monkeypatch):
    monkeypatch.setattr(d.Limits, "large_archive", 1000)
    monkeypatch.setattr(d.Limits, "large_wait", 20)
    content, done = zipped(*PARTS, ("a/text", random.Random(1).randbytes(20000))), []
    crew = d.Workers(
        "lookers", 2, lambda item: done.append(look(content, WHEEL) if item else "small")
    )
    efforts = [d.Effort(io.BytesIO(content), WHEEL) for _ in range(d.Limits.large_checks)]
    for effort in efforts:
        effort.spend(2000)
    for item in (1, 1, 1, 1, 0):
        crew.submit(item)
    eventually(lambda: done == ["small"])
    for effort in efforts:
        effort.__exit__()
    eventually(lambda: len(done) == 5)


@pytest.mark.parametrize("stated", [70000, 12000, 1])
def test_a_zip_of_many_members_is_refused_before_its_directory_is_in_memory(stated, monkeypatch):
    monkeypatch.setattr(d.Limits, "archive_members", 10000)
    entry = b"PK\1\2" + bytes(24) + struct.pack("<5H2L", 1, 0, 0, 0, 0, 0, 0) + b"x"
    count = 12000
    directory = entry * count
    content = directory + struct.pack(
        "<4s4H2LH", b"PK\5\6", 0, 0, stated & 0xFFFF, stated & 0xFFFF, len(directory), 0, 0
    )
    if stated > 0xFFFF:
        content = (
            directory
            + struct.pack(
                "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, stated, stated, len(directory), 0
            )
            + struct.pack("<4sLQL", b"PK\6\7", 0, len(directory), 1)
            + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
        )
    file = io.BytesIO(content)
    tracemalloc.start()
    try:
        with pytest.raises(d.BadRequest, match="holds too much: over 10000 members"):
            d.archive_metadata(file, WHEEL)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


# What installers can't use


def changed(content, what, signature=b"PK\1\2", place=0, last=True):
    """A zip with some bytes of its last (or first) entry's directory head or own head replaced."""
    at = (content.rindex if last else content.index)(signature) + place
    return content[:at] + what + content[at + len(what) :]


def by_zip64(content, place, number):
    """A zip with a number of its last entry in the directory written with 64 bits."""
    content = changed(content, b"\xff" * 4, place=place)
    content = changed(content, struct.pack("<H", 12), place=30)
    at = content.rindex(b"PK\5\6")
    size = struct.unpack("<L", content[at + 12 : at + 16])[0] + 12
    content = changed(content, struct.pack("<L", size), b"PK\5\6", 12)
    return content[:at] + struct.pack("<2HQ", 1, 8, number) + content[at:]


@pytest.mark.parametrize("number", [1 << 31, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("place", [20, 24, 42], ids=["packed", "size", "offset"])
def test_whatever_number_a_zip_states_by_64_bits_only_refusals_come_out(place, number, tmp_path):
    """Of a file on disk, whose system may refuse to go there."""
    content = by_zip64(zipped(("a/index.html", b"x"), *PARTS[1:], META), place, number)
    (tmp_path / WHEEL).write_bytes(content)
    with open(str(tmp_path / WHEEL), "rb") as file:
        for is_whole in (False, True):
            with pytest.raises(d.BadRequest):
                d.archive_metadata(file, WHEEL, is_whole)
        try:
            assert [member.path for member in d.doc_members(file, "docs.zip")[0]] == ["index.html"]
        except d.BadRequest:
            assert place == 24  # it would unpack to too much


GOOD = zipped(("a/__init__.py", b"x = 1\n" * 100), *PARTS, ("a/data", b"some data " * 50))
DATA_AT = GOOD.rindex(b"a/data", 0, GOOD.index(b"PK\1\2")) + 6


def doctored(content, **values):
    """The archive with a member's facts changed in both its heads."""
    places = {
        "method": ("<H", 10, 8),
        "flags": ("<H", 8, 6),
        "crc": ("<L", 16, 14),
        "packed": ("<L", 20, 18),
        "size": ("<L", 24, 22),
    }
    for name, value in values.items():
        form, central, local = places[name]
        content = changed(content, struct.pack(form, value), b"PK\1\2", central)
        content = changed(content, struct.pack(form, value), b"PK\3\4", local)
    return content


def bomb_of_two_hundred_mebibytes():
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = b"".join(packer.compress(bytes(MIB)) for _ in range(200)) + packer.flush()
    stored = zipped(*PARTS, ("a/data", packed), compression=zipfile.ZIP_STORED)
    return doctored(stored, method=8, size=10)


def scripts(*lines, section="console_scripts"):
    return zipped(
        *PARTS, ("a-1.0.dist-info/entry_points.txt", "\n".join(("[%s]" % section,) + lines))
    )


def without(*parts, **others):
    """A wheel without some of its .dist-info, or with other bytes there."""
    info = "a-1.0.dist-info/"
    return zipped(
        ("a/__init__.py", b""),
        *((name, data) for name, data in PARTS if name[len(info) :] not in {*parts, *others}),
        *((info + name, data) for name, data in others.items()),
    )


def tar_gz(*members):
    return gzip.compress(b"".join(members) + END, 1)


ENTRY_POINT = "the name of a script holds no slash, backslash, colon or semicolon"
UNREADABLE = "has an entry_points.txt that can't be read"
BROKEN = {
    "bytes": (WHEEL, b"123", "is no zip file: built or sent incompletely?"),
    "nothing": (WHEEL, b"", "is no zip file: built or sent incompletely?"),
    "a cut wheel": (WHEEL, GOOD[:-40], "is no zip file: built or sent incompletely?"),
    "an egg of text": ("a-1.0-py3.9.egg", b"text", "is no zip file: built or sent incompletely?"),
    "a zip of text": ("a-1.0.zip", b"text", "is no zip file: built or sent incompletely?"),
    "no METADATA": (WHEEL, zipped(("a/__init__.py", b"")), "has no .dist-info/METADATA"),
    "an empty wheel": (WHEEL, zipped(), "has no .dist-info/METADATA"),
    "an egg without PKG-INFO": (
        "a-1.0-py3.9.egg",
        zipped(("a/__init__.py", b"")),
        "has no PKG-INFO",
    ),
    "a zip without PKG-INFO": ("a-1.0.zip", zipped(("a-1.0/setup.py", b"")), "has no PKG-INFO"),
    "PKG-INFO at the top": ("a-1.0.zip", zipped(("PKG-INFO", INFO)), "has no PKG-INFO"),
    "an sdist without PKG-INFO": (
        "a-1.0.tar.gz",
        gzip.compress(member(b"a-1.0/setup.py") + END),
        "has no PKG-INFO",
    ),
    "PKG-INFO that is a link": (
        "a-1.0.tar.gz",
        gzip.compress(member(b"a-1.0/PKG-INFO", kind=b"2") + END),
        "has no PKG-INFO",
    ),
    "text as .tar.gz": ("a-1.0.tar.gz", b"text", "is no tar file packed by gzip"),
    "an empty tar": ("a-1.0.tar.gz", gzip.compress(bytes(10240)), "it has no member"),
    "a name with (1)": ("a-1.0 (1)-py2.py3-none-any.whl", GOOD, "is no file name of a wheel"),
    "a name with (1) behind": ("a-1.0-py3-none-any (1).whl", GOOD, "is no file name of a wheel"),
    "a name without tags": ("a-1.0.whl", GOOD, "is no file name of a wheel"),
    "a broken deflate stream": (
        WHEEL,
        GOOD[:DATA_AT] + b"\xff\xff" + GOOD[DATA_AT + 2 :],
        "its member 'a/data' can't be unpacked",
    ),
    "a wrong checksum": (WHEEL, doctored(GOOD, crc=5), "its checksum is wrong"),
    "a size that is too small": (
        WHEEL,
        doctored(GOOD, size=10),
        "it has over the 10 bytes that the archive says",
    ),
    "a size that is too large": (
        WHEEL,
        doctored(GOOD, size=5000),
        "it has 500 bytes, the archive says 5000",
    ),
    "ten bytes of 200 MiB": (
        WHEEL,
        bomb_of_two_hundred_mebibytes(),
        "it has over the 10 bytes that the archive says",
    ),
    "an encrypted member": (WHEEL, doctored(GOOD, flags=1), "it is encrypted or patch data"),
    "patch data": (WHEEL, doctored(GOOD, flags=0x20), "it is encrypted or patch data"),
    "packed by bzip2": (
        WHEEL,
        zipped(*PARTS, ("a/b", b"x"), compression=zipfile.ZIP_BZIP2),
        "packed by method 12",
    ),
    "an unknown method": (WHEEL, doctored(GOOD, method=99), "packed by method 99"),
    "another name at its place": (
        WHEEL,
        changed(GOOD, b"b/data", b"PK\3\4", 30),
        "another one is at its place",
    ),
    "nothing at its place": (
        WHEEL,
        changed(GOOD, b"PK\3\5", b"PK\3\4"),
        "there is none at its place",
    ),
    "a member beyond what any file holds": (
        WHEEL,
        by_zip64(GOOD, 42, 1 << 62),
        "there is none at its place",
    ),
    "METADATA of 0 bytes": (
        WHEEL,
        without(METADATA=b""),
        "has a .dist-info/METADATA without Name and Version: built or sent incompletely?",
    ),
    "METADATA without Name": (WHEEL, without(METADATA=b"Version: 1.0\n"), "METADATA without Name:"),
    "METADATA without Version": (
        WHEEL,
        without(METADATA=b"Name: a\n"),
        "METADATA without Version:",
    ),
    "METADATA with an empty Version": (
        WHEEL,
        without(METADATA=b"Name: a\nVersion: \n"),
        "METADATA without Version:",
    ),
    "PKG-INFO of 0 bytes": (
        "a-1.0.tar.gz",
        tar_gz(PKG_INFO, member(b"a-1.0/PKG-INFO")),  # the last one is what unpacking leaves
        "has a PKG-INFO without Name and Version",
    ),
    "PKG-INFO without Version": (
        "a-1.0.tar.gz",
        tar_gz(member(b"a-1.0/PKG-INFO", b"Name: a\n")),
        "has a PKG-INFO without Version",
    ),
    "PKG-INFO of 0 bytes in a zip": (
        "a-1.0.zip",
        zipped(("a-1.0/PKG-INFO", b"")),
        "has a PKG-INFO without Name and Version",
    ),
    "no WHEEL": (WHEEL, without("WHEEL"), "has no .dist-info/WHEEL"),
    "WHEEL of 0 bytes": (WHEEL, without(WHEEL=b""), "has a .dist-info/WHEEL without Wheel-Version"),
    "WHEEL of no version": (WHEEL, without(WHEEL=b"Wheel-Version: x\n"), "without Wheel-Version"),
    "WHEEL of bytes": (WHEEL, without(WHEEL=b"\xff"), "has an unreadable WHEEL: it is not UTF-8"),
    "no RECORD": (WHEEL, without("RECORD"), "has no .dist-info/RECORD"),
    "parts in another .dist-info": (
        WHEEL,
        zipped(META, *(("b-1.0.dist-info/" + part, b"") for part in ("WHEEL", "RECORD"))),
        "holds more than one .dist-info: a-1.0.dist-info and b-1.0.dist-info",
    ),
    "the .dist-info of another project": (
        WHEEL,
        zipped(*(("b" + name, data) for name, data in PARTS)),
        "holds 'ba-1.0.dist-info', the .dist-info of another project",
    ),
    "entry points that end in a bracket": (WHEEL, scripts("a", " [x = y"), UNREADABLE),
    "entry points without a value": (WHEEL, scripts("a"), UNREADABLE),
    "entry points without a name": (WHEEL, scripts("= a:b", section="plugins"), UNREADABLE),
    "entry points on several lines": (
        WHEEL,
        scripts("a =", "  b:c", section="plugins"),
        UNREADABLE,
    ),
    "entry points before a section": (WHEEL, without(**{"entry_points.txt": b"a=b:c"}), UNREADABLE),
    "entry points twice": (
        WHEEL,
        scripts("a = b:c", "a = b:d"),
        "has an entry_points.txt that holds 'a' twice",
    ),
    "a section twice": (
        WHEEL,
        scripts("a = b:c", "[console_scripts]"),
        "has an entry_points.txt that holds 'console_scripts' twice",
    ),
    "entry points of bytes": (
        WHEEL,
        without(**{"entry_points.txt": b"[x]\na = b:\xff"}),
        "has an unreadable entry_points.txt: it is not UTF-8",
    ),
    "a section that some readers take for a script": (
        WHEEL,
        scripts("[x = y", "../evil = a:b"),
        UNREADABLE,
    ),
    "a section that some readers take for a value": (
        WHEEL,
        scripts("a = b:c", "   d = b:c", "  [x]", "../evil = a:b"),
        UNREADABLE,
    ),
    "a script of no function": (WHEEL, scripts("a = b"), "which is no module:function"),
    "a script of nothing": (WHEEL, scripts("a ="), "for '', which is no module:function"),
    "a script of a drive": (WHEEL, scripts("C:x = a:b"), ENTRY_POINT),
    "a script that is a path": (
        WHEEL,
        scripts("run = a:b", "../../evil = a:b"),
        "has the entry point '../../evil': " + ENTRY_POINT,
    ),
    "a script of Windows": (WHEEL, scripts("..\\evil = a:b"), ENTRY_POINT),
    "a script with a semicolon": (
        WHEEL,
        scripts("a;b=a:b", section="gui_scripts"),
        "has the entry point 'a;b': " + ENTRY_POINT,
    ),
}


@pytest.fixture(scope="module")
def site(shared_server):
    """A server with the volatile index arc/dev."""
    shared_server.add_user("arc")
    shared_server.login("arc", "pw")
    shared_server.add_index("arc/dev", bases=[])
    return shared_server


@pytest.fixture(scope="module")
def lenient(tmp_path_factory):
    """The same, of a server that takes broken archives, told so by the environment."""
    server = Server(
        tmp_path_factory.mktemp("lenient") / "server",
        env={"DEVPISERVER_ACCEPT_BROKEN_ARCHIVES": "1"},
    ).start()
    server.add_user("arc")
    server.login("arc", "pw")
    server.add_index("arc/dev", bases=[])
    yield server
    server.kill()


def post(server, filename, content, name="a", **fields):
    form = dict({":action": "file_upload", "name": name, "version": "1.0"}, **fields)
    return server.post_form("arc/dev", form, {"content": (filename, content)})


def in_tmp(server):
    return os.listdir(str(server.directory / "tmp"))


@pytest.mark.parametrize("kind", sorted(BROKEN))
def test_what_installers_can_not_use_is_refused_in_words_and_leaves_nothing(site, kind):
    filename, content, words = BROKEN[kind]
    before = site.get("/+api").headers["X-DEVPI-SERIAL"]
    reply = post(site, filename, content)
    assert (reply.status, reply.json()["message"]) == (400, reply.reason)
    assert reply.reason.startswith("'%s' " % filename) and words in reply.reason
    assert site.get("/arc/dev/a").status == 404
    assert (site.get("/+api").headers["X-DEVPI-SERIAL"], in_tmp(site)) == (before, [])


@pytest.mark.parametrize("kind", sorted(BROKEN))
def test_where_the_operator_says_so_it_is_taken(lenient, kind):
    filename, content, _ = BROKEN[kind]
    assert post(lenient, filename, content).status == 200
    assert lenient.fetch("arc/dev", filename, "a") == content
    assert lenient.delete("/arc/dev/a", user="arc").status == 200


HOSTILE_ZIPS = {
    "fewer members than stated": changed(GOOD, struct.pack("<2H", 9, 9), b"PK\5\6", 8),
    "more members than stated": changed(GOOD, struct.pack("<2H", 1, 1), b"PK\5\6", 8),
    "NUL in a name": zipped(*PARTS, ("a/bcd", b"")).replace(b"a/bcd", b"a/b\0d"),
    "..": zipped(*PARTS, ("a/../../b", b"")),
    "twice": zipped(*PARTS, ("a/b", b""), ("a/c", b"")).replace(b"a/c", b"a/b"),
}


@pytest.mark.parametrize("kind", sorted(HOSTILE_ZIPS))
def test_a_zip_that_no_honest_tool_writes_is_refused_also_there(site, lenient, kind):
    for server in (site, lenient):
        assert (post(server, WHEEL, HOSTILE_ZIPS[kind]).status, in_tmp(server)) == (400, [])


def test_no_byte_of_a_zip_belongs_to_two_members(site):
    content = changed(
        GOOD, struct.pack("<L", 3), b"PK\1\2", 42
    )  # the last one begins within the first
    assert post(site, WHEEL, content).reason == "'%s' holds members that lie in one another" % WHEEL


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        scripts("run = a:b", "# a/b;c", "", "run2.x-y = a.b:c [extra]", "spaced name=a:b"),
        scripts("text/html;x = a:b", "nothing =", section="plugins"),
        scripts("  run = a:b  # as some write", "  [gui_scripts]", "  run = a:b"),
        zipped(*PARTS, ("a/empty", b""), ("a/", b"")),
        zipped(*PARTS, ("a/b", b"x" * 99999), compression=zipfile.ZIP_STORED),
        wheel("a", "1.0", size=100000).content,
    ],
    ids=["plain", "scripts", "plugins", "indented", "empty", "stored", "built"],
)
def test_sound_wheels_pass(site, content):
    for name in (WHEEL, "A-1.0-1abc-cp39.cp310-abi3-manylinux_2_17_x86_64.whl"):
        reply = post(site, name, content)
        assert reply.status == 200, reply
    assert site.delete("/arc/dev/a", user="arc").status == 200


def test_a_zip_written_as_a_stream_passes(site):
    class Pipe(io.BytesIO):
        def seekable(self):
            return False

        def tell(self):
            raise OSError("a pipe")

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in (*PARTS, ("a/b", b"x" * 5000)):
            archive.writestr(name, data)
    assert post(site, WHEEL, pipe.getvalue()).status == 200
    assert site.delete("/arc/dev/a", user="arc").status == 200


def test_a_dumb_binary_needs_no_metadata_and_must_be_readable(site):
    filename, content = "a-1.0.linux-x86_64.tar.gz", gzip.compress(
        member(b"./usr/lib/a.py", b"x = 1") + END
    )
    assert post(site, filename, content, filetype="bdist_dumb").status == 200
    assert post(site, filename, content[:-20], filetype="bdist_dumb").status == 400
    assert post(site, filename, content, filetype="sdist").status == 400
    assert post(site, WHEEL, zipped(("a/b", b"")), filetype="bdist_dumb").status == 400
    assert site.delete("/arc/dev/a", user="arc").status == 200


def test_what_a_mirror_brings_is_pushed_as_it_is_with_a_line_in_the_log(site, upstream):
    site.add_mirror("arc/mirror", upstream.url)
    broken = [
        dataclasses.replace(make("torn", "1.0"), content=content)
        for make, content in (
            (sdist, sdist("torn", "1.0").content[:-30]),
            (wheel, doctored(GOOD, crc=5)[:-10]),
        )
    ]
    for archive in broken:
        upstream.publish(archive)
    reply = site.request(
        "PUSH",
        "/arc/mirror",
        {"name": "torn", "version": "1.0", "targetindex": "arc/dev"},
        user="arc",
    )
    assert (reply.status, len(reply.result)) == (200, 3)
    for archive in broken:
        assert site.fetch("arc/dev", archive.filename, "torn") == archive.content
        assert (
            "pushed from the mirror arc/mirror as it is: '%s'" % archive.filename
            in site.whole_output()
        )


def test_uploads_of_bombs_by_many_leave_room_for_others(site):
    """Each is refused after little work, and nothing of it stays."""
    bomb = (
        gzip.compress(PKG_INFO + header(b"a/zeros", 64 * MIB), 1)
        + gzip.compress(bytes(8 * MIB), 9) * 16
    )
    replies = []
    threads = [
        threading.Thread(target=lambda: replies.append(post(site, "a-1.0.tar.gz", bomb).status))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    assert (
        post(site, "other-1.0.zip", around("other-1.0.zip", b"x", "other", "1.0"), "other").status
        == 200
    )
    assert time.monotonic() - began < 10
    for thread in threads:
        thread.join(60)
    assert (replies, in_tmp(site)) == ([400] * 4, [])
