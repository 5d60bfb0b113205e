#!/usr/bin/env python3
"""devpi_lite: a private Python package index in one file.

    python devpi_lite.py --serverdir x

serves private indexes, a caching mirror of pypi.org (`root/pypi`), and indexes that inherit from
both, to pip, uv, twine, Poetry, the devpi client and curl. It needs Python 3.9 or newer and nothing
else: no packages, no internet.

The chapters, each of which uses only those above it; [W7.2] and the like are rules of
tests/CONTRACT.md:

    I Ground
     1  Names and versions       pure functions over the packaging standards' words
     2  Errors, settings, limits     errors and their status; options; every bound
     3  Threads and memory       crews of threads, and fair shares of what is bounded
    II Keeping
     4  Store                    SQLite: schema, rows, changelog, events, caches, readers, writer
     5  Blobs                    files on disk, named by their SHA-256
     6  Archives                 what wheels, sdists and documentation zips contain
    III The model
     7  Users and permissions    passwords, session tokens, who may do what
     8  Indexes                  configuration, resolution order
     9  Releases                 files and releases; uploads, documentation, results, yanks, removal
    10  Upstream                 the HTTP client and the parsing of other indexes' pages
    11  Mirrors                  pages, files and project lists of upstream, cached
    12  Projects and policies    the projects of stages, of mirrors, and of an index with its bases
    13  Staging                  releases pushed to other indexes and to outside servers
    14  Outbox                   messages to outside servers: Jenkins jobs, webhooks
    15  Search                   the query language, the search index, the thread that updates it
    IV Speaking
    16  HTTP messages            heads, bodies, forms, requests, responses, negotiation, ranges
    17  The front                connections, workers, the access log
    18  Application, routes, audiences      the parts of a server; from a request to its endpoint
    19  For people               documentation and search
    20  For installers           simple pages, project lists, files, PyPI's JSON
    21  For devpi clients        devpi's JSON contract: users, indexes, uploads, pushes, removal
    22  For operators            status, health, metrics, the audit log
    V The directory
    23  The server directory     how it is made, locked and refused
    24  Export                   devpi's dump, written
    25  Import                   devpi's dump, read
    26  Backups                  backup and restore
    27  Checks                   fsck, gc, status
    VI
    28  Commands                 the argument parser and `main`
"""
from __future__ import annotations

import argparse
import base64
import binascii
import bz2
import codecs
import collections
import contextlib
import copy
import dataclasses
import datetime
import email.utils
import errno
import fnmatch
import functools
import gc
import getpass
import gzip
import hashlib
import hmac
import html
import html.entities
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import mimetypes
import mmap
import operator
import os
import queue
import re
import secrets
import selectors
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import typing
import unicodedata
import urllib.parse
import urllib.request
import uuid
import zipfile
import zlib

__version__ = "0.1.0"
PROTOCOL_VERSION = "6.20.3"     # the devpi-server release whose wire protocol this program speaks
API_VERSION = "1.4"             # of the simple API (PEP 629)
PROGRAM = os.path.abspath(__file__)     # while main runs there is no __file__, see after_the_script
log = logging.getLogger("devpi_lite")


# ==================================================================================================
# 1  Names and versions
#
# Pure functions: normal names, versions and their order, file names, core metadata, hashes, times.
# They touch no disk and no socket, and no clock that is not an argument.
# ==================================================================================================


def normalize(name):
    """The normal form of a project name: `Foo._Bar` -> `foo-bar` (PEP 503).

    Every run of characters other than ASCII letters and digits becomes one dash."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).lower()


_VERSION = re.compile(r"""
    \s* v?
    (?:(?P<epoch>[0-9]+)!)?
    (?P<release>[0-9]+(?:\.[0-9]+)*)
    (?:[-_.]?(?P<pre>alpha|beta|preview|pre|rc|a|b|c)[-_.]?(?P<pre_n>[0-9]*))?
    (?P<post>-(?P<post_implicit>[0-9]+) | [-_.]?(?:post|rev|r)[-_.]?(?P<post_n>[0-9]*))?
    (?P<dev>[-_.]?dev[-_.]?(?P<dev_n>[0-9]*))?
    (?:\+(?P<local>[a-z0-9]+(?:[-_.][a-z0-9]+)*))?
    \s*""", re.VERBOSE | re.IGNORECASE | re.ASCII)
_PRE_RELEASE = {"alpha": "a", "beta": "b", "c": "rc", "pre": "rc", "preview": "rc"}


@functools.lru_cache(maxsize=20000)
def parse_version(text):
    """A PEP 440 version as (epoch, release, pre, post, dev, local); absent parts are None.

    Returns None for other texts, and for those over 200 characters: int() of a long number takes
    quadratic time."""
    match = _VERSION.fullmatch(text) if len(text) <= 200 else None
    if not match:
        return None

    part = match.groupdict()
    pre = post = dev = local = None
    if part["pre"]:
        letter = part["pre"].lower()
        pre = (_PRE_RELEASE.get(letter, letter), int(part["pre_n"] or 0))
    if part["post"]:
        post = int(part["post_implicit"] or part["post_n"] or 0)
    if part["dev"]:
        dev = int(part["dev_n"] or 0)
    if part["local"]:
        local = tuple(int(p) if p.isdigit() else p
                      for p in re.split(r"[-_.]", part["local"].lower()))
    release = tuple(int(p) for p in part["release"].split("."))

    return int(part["epoch"] or 0), release, pre, post, dev, local


@functools.lru_cache(maxsize=20000)
def canonical_version(text):
    """PEP 440's normal spelling of a version: `1.0-RC1` -> `1.0rc1`; other texts as they are."""
    parsed = parse_version(text)
    if parsed is None:
        return text
    epoch, release, pre, post, dev, local = parsed
    return "".join((
        f"{epoch}!" if epoch else "", ".".join(map(str, release)), "%s%d" % pre if pre else "",
        f".post{post}" if post is not None else "", f".dev{dev}" if dev is not None else "",
        "+" + ".".join(map(str, local)) if local else ""))


def spellings(version, among):
    """The texts in `among` that spell the same version (PEP 440: `1.0-RC1`, `1.0rc1`).

    An identical text comes first. `1.0` and `1.0.0` are two versions here: each can be a release
    of its own."""
    wanted = canonical_version(version)
    same = (text for text in among if canonical_version(text) == wanted)
    return sorted(same, key=lambda text: text != version)


@functools.lru_cache(maxsize=20000)
def version_key(text):
    """A sort key: versions in the order of PEP 440, below them all other texts by their letters."""
    parsed = parse_version(text)
    if parsed is None:
        return (0, text)

    epoch, release, pre, post, dev, local = parsed
    while len(release) > 1 and release[-1] == 0:
        release = release[:-1]
    if pre is None:     # 1.0.dev1 < 1.0a1 < 1.0
        pre = ("", 0) if post is None and dev is not None else ("z", 0)

    return (
        1, epoch, release, pre, -1 if post is None else post,
        float("inf") if dev is None else dev,
        () if local is None
        else tuple((1, p, "") if isinstance(p, int) else (0, 0, p) for p in local))


def same_version(one, other):
    """Whether two texts name the same version (PEP 440): `1.0` and `1.0.0` do."""
    one, other = one.strip(), other.strip()
    return one == other or \
        max(len(one), len(other)) <= 200 and version_key(one) == version_key(other)


def is_final(text):
    """Whether a text is a PEP 440 version, and neither a pre-release nor a development release."""
    parsed = parse_version(text)
    return parsed is not None and parsed[2] is None and parsed[4] is None


_SPECIFIER = re.compile(r"(~=|===|==|!=|<=|>=|<|>)\s*(\S+)")


def is_specifier(text):
    """Whether a text is a list of version specifiers (PEP 440)."""
    return all(_specifier_parts(clause.strip()) for clause in text.split(","))


def _specifier_parts(clause):
    """(operator, version, whether `.*` followed) of one PEP 440 specifier; None for other texts."""
    match = _SPECIFIER.fullmatch(clause)
    if not match or match[1] == "===":
        return match and (match[1], match[2], False)

    operator, wanted = match.groups()
    is_prefix = wanted.endswith(".*")
    wanted = wanted[:-2] if is_prefix else wanted
    parsed = parse_version(wanted)
    if parsed is None or operator == "~=" and len(parsed[1]) < 2:
        return None
    if operator not in ("==", "!=") and (is_prefix or parsed[5] is not None):   # 5: local version
        return None
    if is_prefix and parsed[2:] != (None, None, None, None):
        return None
    return operator, wanted, is_prefix


def admits(specifiers, version):
    """Whether a version fits a comma-separated list of version specifiers (PEP 440).

    An empty list admits every version, an unreadable specifier none."""
    return all(_fits(clause.strip(), version)
               for clause in (specifiers or "").split(",") if clause.strip())


def _fits(clause, version):
    parts, found = _specifier_parts(clause), parse_version(version)
    if parts and parts[0] == "===":
        return parts[1] == version
    if parts is None or found is None:
        return False

    operator, wanted, is_prefix = parts
    parsed, public = parse_version(wanted), version_key(version.partition("+")[0])
    if is_prefix or operator == "~=":
        release = parsed[1][:-1] if operator == "~=" else parsed[1]
        series = found[0] == parsed[0] and \
            (found[1] + (0,) * len(release))[:len(release)] == release
        return not series if operator == "!=" else \
            series and (operator == "==" or public >= version_key(wanted))

    one, other = version_key(version), version_key(wanted)
    if parsed[5] is None and operator not in ("<", ">"):    # a local version counts as public
        one = public
    same = 3 if parsed[3] is None else 5        # epoch and release, or also pre and post
    # 1.0rc1 is not below 1.0, nor 1.0.post1.dev1 below 1.0.post1
    if operator == "<" and one[1:same] == other[1:same] and \
            is_final(wanted) and not is_final(version):
        return False
    # 1.0+local and 1.0.post1 are not above 1.0
    if operator == ">" and (
            public == other or
            found[3] is not None and parsed[3:5] == (None, None) and one[1:4] == other[1:4]):
        return False

    return {"==": one == other, "!=": one != other, "<=": one <= other, ">=": one >= other,
            "<": one < other, ">": one > other}[operator]


def admits_python(specifiers, version):
    """Whether a Requires-Python admits a version of Python.

    Reads `>=3.6.*`, which old metadata has, as `>=3.6`, like pip."""
    return admits(re.sub(r"([<>]=?\s*[0-9.]*[0-9])\.\*", r"\1", specifiers or ""), version)


UPLOAD_EXTENSIONS = ("exe", "tar.gz", "bz2", "rpm", "deb", "zip", "tgz", "egg", "dmg", "msi", "whl")
MIRROR_EXTENSIONS = (
    ".doc.zip", ".tar.bz2", ".tar.gz", ".tar.xz", ".tar.Z", ".tar", ".deb", ".dmg", ".egg", ".exe",
    ".msi", ".rpm", ".tgz", ".whl", ".whlx", ".zip")


def strip_archive_extension(filename):
    """(stem, extension) of an archive's name; the extension is "" if no index holds such files."""
    for extension in MIRROR_EXTENSIONS:
        if filename.lower().endswith(extension.lower()) and len(filename) > len(extension):
            return filename[:-len(extension)], filename[-len(extension):]
    return filename, ""


# Where a platform or a Python begins after a version: `.win32-py2.5`, `-py2.6-macosx-10.3-fat`.
_PLATFORM_TAIL = re.compile(r"""
    [-._\ ] (?: py[23](?:\.?[0-9]+)*k? | python-?[23][0-9.]*
        | (?:win|mac|osx|darwin|linux|manylinux)\w* | cygwin | mingw(?:32|64)?
        | freebsd\d* | openbsd | netbsd | solaris | sunos | aix | irix | hp-ux
        | noarch | i[3-6]86 | amd64 | x86_64 | x86 | x64 | ia64 | ppc64 | armv?[67]l | aarch64
        | universal2? | superpack )
    (?=[-._\ ]|[0-9.]*$) .*""", re.VERBOSE | re.IGNORECASE | re.DOTALL)
# What follows the version of an rpm or deb package: the package's revision, and the machine.
_PACKAGE_TAILS = {
    ".rpm": re.compile(
        r"(?:-[^-]+)?\.(?:src|nosrc|noarch|x86_64|i[3-6]86|athlon|aarch64|arm\w*|ppc\w*|"
        r"s390x?|ia64|sparc\w*|alpha|riscv64|loongarch64)$", re.IGNORECASE),
    ".deb": re.compile(r"(?:-[^-_]+)?_[a-z0-9-]+$", re.IGNORECASE)}
# Other words after a version; `-11g` and `-12c` name an Oracle release that an installer is for.
_KIND_TAIL = re.compile(
    r"[-._ ](?:src|sources?|sdist|dist|bin|all|full|setup|install(?:er)?|1[0-9][cg])$",
    re.IGNORECASE)
# How old versions begin that do not begin with a digit.
_VERSION_WORD = re.compile(r"""
    (?:v|r|rev|rel|release|version|build|alpha|beta|a|b|c|rc|pre|preview|dev|devel
        |svn|git|hg|trunk|head|master|main|snapshot|nightly|latest|test|final|stable|unstable)
    [-._\ ]? (?:r?[0-9]|$)""", re.VERBOSE | re.IGNORECASE)


@functools.lru_cache(maxsize=20000)
def version_of_file(filename, project=""):
    """The version that a file name states (PEP 427, PEP 625, older forms), or "".

    `project` is a normal name. Where the file name begins with it, it is removed first: it may
    contain what looks like a version, a Python or a platform (`suds-py3`, `python-2to3`,
    `python-linux-procfs`)."""
    stem, extension = _archive_stem(filename)
    if not extension:
        return ""

    if extension in (".whl", ".whlx"):
        parts = stem.split("-")
        return parts[1].replace("_", "-") if len(parts) >= 5 else ""

    rest = _behind_name(stem, project)
    if rest is not None:
        version = _version_of_rest(rest, extension)
        if version[:1].isdigit() or _VERSION_WORD.match(version):
            return version

    # Another name, or a word between name and version: the first cut that leaves a version,
    # else the first that leaves something like one, else the last.
    separator = "[-_]" if extension == ".deb" else "-"
    cuts = [cut.start() for cut in re.finditer(separator, stem) if cut.start()]
    found = ""
    for cut in cuts[-20:]:      # real names have a dozen at most
        version = _version_of_rest(stem[cut:], extension)
        if parse_version(version):
            return version
        if version and not found[:1].isdigit():
            found = version
    return found


def _archive_stem(filename):
    """(stem, inner extension in lower case) of a file name; `foo-1.0.exe.zip` is packed twice."""
    stem, extension = strip_archive_extension(filename)
    if not extension and stem.lower().endswith(".bz2"):
        return stem[:-4], ".bz2"
    stem, inner = strip_archive_extension(stem)
    return stem, (inner or extension).lower()


@functools.lru_cache(maxsize=1000)
def _name_pattern(project):
    """Matches the front of a project's file names: any spelling of the name, and separators."""
    name = "[^a-z0-9]+".join(map(re.escape, project.split("-")))
    return re.compile(name + r"[-_. ]+(?=[^-_. ])", re.IGNORECASE | re.ASCII)


def _behind_name(stem, project):
    """What follows the project's name and the separators; None if the name is not in front."""
    match = _name_pattern(project).match(stem) if project else None
    return match and stem[match.end():]


def _version_of_rest(rest, extension):
    """The version in what follows a project's name."""
    if extension in _PACKAGE_TAILS:
        rest = _PACKAGE_TAILS[extension].sub("", rest)
    version = _PLATFORM_TAIL.sub("", rest).lstrip("-_. ")
    if not parse_version(version):
        shorter = _KIND_TAIL.sub("", version)
        version = shorter if parse_version(shorter) else version

    if extension in (".egg", ".rpm"):       # these write a version's dashes as underscores
        return version.replace("_", "-")
    if extension == ".deb":                 # these write 1.0~rc1, to sort it before 1.0
        return version.replace("~", "")
    return version


# How a file ends that lists a release's variant wheels (PEP 825, a draft).
VARIANTS = "-variants.json"


def version_of_variants(filename, project):
    """The version of a file `{name}-{version}-variants.json` of the project (PEP 825), or "".

    `project` is a normal name."""
    if not filename.lower().endswith(VARIANTS):
        return ""
    name, _, version = filename[:-len(VARIANTS)].rpartition("-")
    return version.replace("_", "-") if normalize(name) == project else ""


def python_tag(filename):
    """The Python tag in a wheel's name: its third field, or the fourth after a build number.

    Counted from the front, because a variant's label may follow the platform (PEP 825)."""
    parts = filename[:-len(".whl")].split("-")
    has_build = len(parts) > 5 and parts[2][:1].isdigit()
    return parts[3] if has_build else parts[2] if len(parts) > 4 else ""


def project_of_wheel(filename):
    """The normal name of the project in a wheel's file name (PEP 427), or ""."""
    parts = filename[:-len(".whl")].split("-") if filename.lower().endswith(".whl") else ()
    if not 5 <= len(parts) <= 7 or not parse_version(parts[1].replace("_", "-")):
        return ""
    return normalize(parts[0])


# The fields of a release's metadata in devpi's JSON, in devpi's spelling [W12.2].
TEXT_FIELDS = (
    "name", "version", "metadata_version", "summary", "home_page", "author", "author_email",
    "maintainer", "maintainer_email", "license", "description", "keywords", "download_url",
    "comment", "requires_python", "description_content_type", "license_expression")
LIST_FIELDS = (
    "platform", "classifiers", "supported_platform", "provides", "requires", "obsoletes",
    "project_urls", "provides_dist", "obsoletes_dist", "requires_dist", "requires_external",
    "provides_extras", "dynamic", "license_file")
# Fields of newer metadata, shown only where they are set.
NEWER_LIST_FIELDS = ("import_name", "import_namespace")
FIELD_SPELLINGS = {
    "classifier": "classifiers", "provides_extra": "provides_extras", "project_url": "project_urls",
    "platforms": "platform", "supported_platforms": "supported_platform",
    "license_files": "license_file", "import_names": "import_name",
    "import_namespaces": "import_namespace"}


_METADATA_FIELD = re.compile(r"([!-9;-~]+):[ \t]*")
METADATA_FIELDS = 20000     # further ones are not read


def parse_core_metadata(data):
    """The fields of a METADATA or PKG-INFO file (bytes), named as in TEXT_FIELDS and LIST_FIELDS.

    The format is that of e-mail (RFC 822) in UTF-8: header lines, and continuation lines that
    begin with a blank. The body is the description if no field is (core metadata 2.1)."""
    text = data.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
    fields, end = {}, 0
    for _ in range(METADATA_FIELDS):
        match = _METADATA_FIELD.match(text, end)
        if not match:
            break
        start, end = match.end(), _line_end(text, match.end())
        while text.startswith((" ", "\t"), end):
            end = _line_end(text, end)
        field = match[1].lower().replace("-", "_")
        field = FIELD_SPELLINGS.get(field, field)
        value = text[start:end].removesuffix("\n")
        if field in LIST_FIELDS or field in NEWER_LIST_FIELDS:
            fields.setdefault(field, []).append(value)
        else:
            fields.setdefault(field, "" if value == "UNKNOWN" else value)

    body = text[end:].removeprefix("\n")
    if body.strip() and not fields.get("description"):
        fields["description"] = body
    return fields


def _line_end(text, position):
    """Where the next line begins."""
    newline = text.find("\n", position)
    return len(text) if newline < 0 else newline + 1


_STRONG_HASHES = (
    "sha256", "sha512", "sha384", "blake2b", "sha3_512", "sha3_384", "sha3_256", "sha3_224")
_BROKEN_HASHES = ("sha1", "md5-sha1", "md5", "md4")


def best_hash(hashes):
    """`algorithm=hex` of the strongest hash that can be checked here, or "".

    `hashes`: {algorithm: hex}, as a page has them."""
    sound = {a.lower(): h.lower() for a, h in hashes.items()
             if isinstance(h, str) and is_digest(a.lower(), h)}
    for order in (_STRONG_HASHES, sorted(sound.keys() - _BROKEN_HASHES), _BROKEN_HASHES):
        for algorithm in order:
            if algorithm in sound:
                return f"{algorithm}={sound[algorithm]}"
    return ""


@functools.lru_cache(maxsize=64)
def _digest_length(algorithm):
    if algorithm not in hashlib.algorithms_available or \
            not re.fullmatch(r"[a-z0-9_-]{1,20}", algorithm):
        return 0

    with contextlib.suppress(ValueError):       # OpenSSL may list what its configuration forbids
        return hashlib.new(algorithm).digest_size * 2
    return 0


def is_digest(algorithm, text):
    """Whether `text` can be a hex digest of an algorithm that can be checked here."""
    return bool(_digest_length(algorithm)) and len(text) == _digest_length(algorithm) and \
        re.fullmatch(r"[0-9a-fA-F]+", text) is not None


def file_path(hash_spec, filename):
    """A file's path below its index: `+f/{hex[:3]}/{hex[3:16]}/{filename}` (devpi's form)."""
    digest = hash_spec.partition("=")[2]
    return f"+f/{digest[:3]}/{digest[3:16]}/{filename}"


def hashless_path(url, filename):
    """The path below its index of a mirror's file that has no hash (devpi's form).

    `+e/{scheme_host_port_path}/{filename}`, the URL's other characters replaced by `_`."""
    parts = urllib.parse.urlsplit(url)
    folder = f"{parts.scheme}/{parts.netloc.rpartition('@')[2]}{parts.path.rpartition('/')[0]}"
    return f"+e/{re.sub(r'[^A-Za-z0-9_.-]', '_', folder.replace('/', '_'))}/{filename}"


def is_safe_filename(filename):
    """Whether a name from outside can be the last part of a URL path, and part of a header."""
    return bool(filename) and \
        len(filename.encode("utf-8", "replace")) <= 255 and \
        filename not in (".", "..") and \
        re.search(r"[/\\\x00-\x1f\x7f\u2028\u2029\ud800-\udfff]", filename) is None


def iso_time(seconds):
    """A POSIX time as PEP 700 writes it: `2026-11-22T06:58:17.000000Z`."""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc) \
        .isoformat(timespec="microseconds")[:-6] + "Z"


def seconds_of(iso):
    """The POSIX time of what `iso_time` returns, with or without fractions."""
    whole, _, fraction = iso[:-1].partition(".")
    return datetime.datetime.fromisoformat(f"{whole}.{fraction:0<6}+00:00").timestamp()


def http_date(seconds):
    """A POSIX time as an HTTP-date (RFC 9110)."""
    return email.utils.formatdate(seconds, usegmt=True)


def plain_time(seconds):
    """A POSIX time as devpi's JSON shows it: `2026-11-22T06:59:13Z`."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def plain_date(date):
    """An HTTP-date in the form of `plain_time`; other texts, which upstreams may send, as they
    are."""
    try:
        moment = email.utils.parsedate_to_datetime(date)
        if moment.tzinfo is not None:
            moment = moment.astimezone(datetime.timezone.utc)
    except (TypeError, ValueError, IndexError, OverflowError):
        return date
    return moment.replace(tzinfo=None).isoformat(timespec="seconds") + "Z"


_PLAIN_PATH = re.compile(r"[A-Za-z0-9_.~/+!@-]*")


def quoted(path):
    """A path as URLs have it (RFC 3986); the `+` of local versions and the `!` of epochs stay."""
    return path if _PLAIN_PATH.fullmatch(path) else urllib.parse.quote(path, safe="/+!@")


def public_url(url):
    """The URL without credentials, for people and logs."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


SENT_AS_IT_IS = "".join(map(chr, range(33, 127)))       # the characters of a URL


def ascii_url(url):
    """An http URL as it can be sent: the host by IDNA, the rest percent-encoded.

    Raises ValueError if that is not possible."""
    if url.isascii():
        return url

    parts = urllib.parse.urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    host = parts.hostname.encode("idna").decode()
    netloc = f"{user}{at}{host}" + (f":{parts.port}" if parts.port else "")
    url = urllib.parse.urlunsplit(parts._replace(netloc=netloc))
    return urllib.parse.quote(url, safe=SENT_AS_IT_IS)


def url_origin(url):
    """Scheme, host and port of a URL: drops credentials, path and query, where tokens may be."""
    return "/".join(public_url(url).split("/")[:3])


def unescaped(text):
    """Text with HTML's character references resolved; unchanged if one has an absurd number."""
    try:
        return html.unescape(text)
    except ValueError:
        return text


def sound(text):
    """Text with blanks for what SQLite or XML refuse: lone surrogates, control characters."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]", " ", text)


def ip_of(text):
    """The IP address (`ipaddress`) in a text, without its zone; None for other texts.

    An IPv4 address that is mapped into IPv6 comes back as IPv4."""
    try:
        ip = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(ip, "ipv4_mapped", None) or ip


def forwarded_ip(said):
    """The address (`ipaddress`) in a proxy's header: its last one, or None. A port may follow."""
    last = said.rpartition(",")[2].strip()
    port = re.fullmatch(r"\[(.*)\](?::[0-9]+)?|([0-9.]+):[0-9]+", last)
    return ip_of((port[1] or port[2]) if port else last)


def one_line(text, limit=300):
    """Text as one printable ASCII line, for a reason phrase or a log line."""
    text = re.sub(r"[^\x20-\x7e]+", " ",
                  text.encode("ascii", "backslashreplace").decode("ascii")).strip()
    return text if len(text) <= limit else text[:limit - 3] + "..."


def bounded_int(text):
    """An integer of JSON from outside; ValueError over 1000 digits.

    int() of millions of digits would block the interpreter for minutes; only newer Pythons have
    a bound (CVE-2020-10735)."""
    if len(text) > 1000:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def nearest(word, known, count=3):
    """Up to `count` known words that are spelled most like this one."""
    import difflib      # not at the top: needed for mistyped words only
    return difflib.get_close_matches(word[:100], list(known)[:1000], count, 0.6)


def reason_of(error):
    """An exception as a few words."""
    if isinstance(error, (TimeoutError, socket.timeout)):
        return "timed out"
    return one_line(str(error) or type(error).__name__, 200)


# ==================================================================================================
# 2  Errors, settings, limits
#
# An error is raised where it is known, with the HTTP status it deserves and a sentence for its
# reader; the chapter on HTTP messages turns it into the response in one place. A setting is
# declared once, with its option. Nothing grows without a bound: the bounds that matter stand in
# `Limits`.
# ==================================================================================================


class Problem(Exception):
    """An error with a sentence for the person who reads it, and the `status` of the response."""
    status = 500
    form = None         # the form of the response, if not the route's: see `problem_response`

    def __init__(self, message, status=None, headers=()):
        super().__init__(message)
        self.message = message
        self.status = status or self.status
        self.headers = list(headers)


class BadRequest(Problem):
    status = 400


class Unauthorized(Problem):
    """Credentials are missing or wrong (RFC 9110); `challenge` asks the client to send some."""
    status = 401

    def __init__(self, message, challenge=True):
        super().__init__(
            message,
            headers=[("WWW-Authenticate", 'Basic realm="pypi"')] if challenge else [])


class Forbidden(Problem):
    status = 403


class NotFound(Problem):
    status = 404


class NoIndex(NotFound):
    """No index has this path, user/name."""

    def __init__(self, path):
        super().__init__(f"The stage {path} could not be found.")
        self.path = path


class Conflict(Problem):
    status = 409


class Gone(Problem):
    status = 410


class TooLarge(Problem):
    status = 413


class UnsupportedType(Problem):
    status = 415


class Misdirected(Problem):
    """The Host header names another server (RFC 9110)."""
    status = 421


class UpstreamTrouble(Problem):
    """Upstream failed: it is unreachable or too slow, or its response is an error or unreadable."""
    status = 502
    noted = float("inf")    # time.monotonic() of a remembered failure; inf: a new one


class UnreadablePage(UpstreamTrouble):
    """Upstream's page is too large, costs too much to read, or has no known form."""


class Unreachable(UpstreamTrouble):
    """No connection could be opened."""


class Refused(UpstreamTrouble):
    """Upstream's status says that a retry would not help."""


class NoResponse(UpstreamTrouble):
    """The connection was open and gave no response: a time-out, a reset."""


class Busy(Problem):
    """The server is busy; the same request may succeed after `retry_after` seconds."""
    status = 503

    def __init__(self, message, retry_after=1):
        super().__init__(message, headers=[("Retry-After", str(retry_after))])


class TooManyLogins(Problem):
    """Too many failed logins or new users: for `wait` seconds no password is looked at."""
    status = 429

    def __init__(self, wait, what="failed logins for this account or from this address"):
        super().__init__(f"too many {what}, try again in {wait} seconds",
                         headers=[("Retry-After", str(wait))])


class TooMany(Problem):
    """Too many requests of one kind; the same request may succeed after `wait` seconds."""
    status = 429

    def __init__(self, message, wait):
        super().__init__(f"{message}: try again in {wait} seconds",
                         headers=[("Retry-After", str(wait))])


class NoSpace(Problem):
    status = 507


class ReadOnly(Problem):
    """A change was requested, and the server directory is on read-only media."""
    status = 403

    def __init__(self):
        super().__init__("this server's directory is on read-only media: what is there is served, "
                         "nothing can be changed")


class FatalError(Exception):
    """The program cannot start or go on; printed as `fatal: ...`."""

    def __init__(self, message, exit_status=1):
        super().__init__(message)
        self.exit_status = exit_status


# -- settings: each option is declared once; the parser, the environment variables and the
# configuration file follow from that


def to_boolean(text):
    if text.lower() in ("y", "yes", "t", "true", "on", "1"):
        return True
    if text.lower() in ("n", "no", "f", "false", "off", "0"):
        return False
    raise ValueError(f"{text!r} is neither yes nor no")


def _positive(text):
    number = int(text)
    if number < 1:
        raise ValueError("must be at least 1")
    return number


def _not_negative(text):
    number = int(text)
    if number < 0:
        raise ValueError("must not be negative")
    return number


def _seconds(text):
    number = float(text)
    if not 0 < number < 1e6:
        raise ValueError("must be a number of seconds above 0")
    return number


def _port(text):
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError(f"{text!r} is no port: a number from 0 to 65535")
    return int(text)


def _listen_address(text):
    """(host, port) of `HOST:PORT`, `*:PORT` or `[::1]:PORT`."""
    host, colon, port = text.rpartition(":")
    if not colon:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return ("0.0.0.0" if host == "*" else host.strip("[]")), _port(port)


def _outside_url(text):
    if not re.fullmatch(r"https?://[A-Za-z0-9._~:%\[\]-]+(/[^\s\"'<>?#]*)?", text):
        raise ValueError(f"{text!r} is not an http or https URL")
    return text.rstrip("/")


def to_names(text):
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _networks(text):
    return tuple(ipaddress.ip_network(name, strict=False) for name in to_names(text))


def absolute_path(text):
    """The absolute path; `~` is the home directory."""
    return os.path.abspath(os.path.expanduser(text))


def _header_name(text):
    if not re.fullmatch(r"[A-Za-z0-9-]+", text):
        raise ValueError(f"{text!r} is no name of a header")
    return text.lower()


class LogBounds(typing.NamedTuple):
    """How much of the changelog is kept: `size` in bytes, `age` in seconds."""
    size: int
    age: int

    def __str__(self):
        return f"{self.size >> 20}M,{self.age // 86400}d"


def _log_bounds(text):
    """`64M`, `90d` or `64M,90d`; the default for what is missing."""
    match = re.fullmatch("(?:([1-9][0-9]{0,5})([KMG]))?(?:(?:^|(?!^),)([1-9][0-9]{0,4})d)?", text)
    if not text or not match:
        raise ValueError(f"{text!r} is no size, age or both, as 64M,90d")

    size, unit, days = match.groups()
    size = int(size) << {"K": 10, "M": 20, "G": 30}[unit] if size else Settings.keep_log.size
    return LogBounds(size, int(days) * 86400 if days else Settings.keep_log.age)


class Mode(int):
    """The mode of a file, shown in octal."""

    def __str__(self):
        return f"{self:o}"


def _mode(text):
    if not re.fullmatch("[0-7]{3,4}", text):
        raise ValueError(f"{text!r} is no file mode: three octal digits, as 660")
    return Mode(text, 8)


# the kinds of options; a command names those that it takes (see `command`)
COMMON, FIRST_START, SERVING = "common", "first start", "serving"


class Option(typing.NamedTuple):
    """An option: `--name` on the command line, DEVPISERVER_<NAME> in the environment, `name` in
    the configuration file.

    `convert` makes the setting from the text, or raises ValueError; None for a flag, which inverts
    its default. Only one of an option and its `rivals` may be given."""
    name: str
    convert: typing.Callable | None
    help: str
    about: str = SERVING
    aliases: tuple = ()
    rivals: tuple = ()
    repeats: bool = False


def option(name, convert, default, text, **more):
    """A field of `Settings` with the option that sets it."""
    setter = Option(name, convert, text, **more)
    return dataclasses.field(default=default, metadata={"option": setter})


@dataclasses.dataclass(frozen=True)
class Settings:
    """The operator's choices: from the command line, else from DEVPISERVER_* variables, else from
    the configuration file, else these defaults."""
    serverdir: str = option(
        "serverdir", absolute_path, os.path.join("~", ".devpi", "server"),
        "directory of all data; made if missing or empty",
        about=COMMON)
    configfile: str = option(
        "configfile", absolute_path, "",
        "file with options: JSON, or INI with a section [devpi-server]",
        about=COMMON, aliases=("-c",))
    debug: bool = option("debug", None, False, "log more", about=COMMON)
    logger_cfg: str = option(
        "logger-cfg", absolute_path, "",
        "JSON file for logging.config.dictConfig: where the log goes, in place of standard error")
    root_passwd: str | None = option(
        "root-passwd", str, None,
        "root's password, at the first start only; random if not given. The list of processes "
        "shows it: better a file, or DEVPISERVER_ROOT_PASSWD",
        about=FIRST_START, rivals=("root-passwd-file",))
    root_passwd_file: str = option(
        "root-passwd-file", absolute_path, "",
        "file whose first line is root's password, at the first start only",
        about=FIRST_START)
    root_pypi: bool = option(
        "no-root-pypi", None, True, "don't make the mirror root/pypi at the first start",
        about=FIRST_START)
    host: str = option("host", str, "127.0.0.1", "address to listen on")
    port: int = option("port", _port, 3141, "port to listen on; 0: any free one")
    listen: tuple = option(     # (host, port) pairs; once the server listens, of its open sockets
        "listen", _listen_address, (),
        "HOST:PORT to listen on, in place of --host and --port; may be repeated",
        repeats=True, rivals=("host", "port"))
    unix_socket: str = option(
        "unix-socket", absolute_path, "",
        "listen on this unix socket; on TCP too only if an address is given")
    unix_socket_perms: int = option(
        "unix-socket-perms", _mode, Mode(0o600), "mode of the unix socket, as 660")
    outside_url: str = option(                  # without final slash
        "outside-url", _outside_url, "", "start of absolute links, where a proxy stands in front")
    absolute_urls: bool = option(
        "absolute-urls", None, False, "absolute file links on simple pages")
    trusted_proxies: tuple = option(            # ipaddress networks, without loopback
        "trusted-proxy", _networks, (),
        "addresses or networks of proxies, besides loopback: what they say of their clients "
        "counts, by X-Outside-URL, X-Forwarded-Proto, -Host and -Prefix, and the header of "
        "--real-ip-header")
    real_ip_header: str = option(               # in lower case
        "real-ip-header", _header_name, "x-real-ip",
        "the one header in which a proxy names its client's address; of several addresses in it "
        "the last counts")
    restrict_modify: tuple | None = option(     # None: no restriction
        "restrict-modify", to_names, None,
        "the only users and :groups who may create and change users and indexes")
    open_registration: bool = option(
        "open-registration", None, False,
        "anybody may create users from everywhere, as in devpi; "
        "else only from this machine, and root")
    mirror_cache_expiry: int = option(
        "mirror-cache-expiry", _not_negative, 1800,
        "seconds for which a mirrored page is not asked for again; devpi 7 calls it the other way",
        aliases=("--remote-refresh-delay",))
    request_timeout: float = option(
        "request-timeout", _seconds, 5.0, "seconds for which a request waits for upstream")
    offline_mode: bool = option(
        "offline-mode", None, False, "never open a connection to upstream; serve what is here")
    max_request_body_size: int = option(
        "max-request-body-size", _positive, 1 << 30, "bytes; larger bodies get 413")
    max_doc_size: int = option(
        "max-doc-size", _positive, 100 << 20, "bytes of a documentation zip; larger ones get 413")
    accept_broken_archives: bool = option(
        "accept-broken-archives", None, False,
        "take uploads that installers can't read or that lack metadata, as devpi does")
    push_timeout: float = option(
        "push-timeout", _seconds, 60.0,
        "seconds without progress, when a release is pushed to an outside server")
    webhook_allow: tuple | None = option(       # None: all
        "webhook-allow", to_names, None,
        "the only hosts that webhooks and Jenkins triggers may name, with * and ?")
    upstream_allow: tuple | None = option(      # None: all but those near this machine
        "upstream-allow", to_names, None,
        "the only hosts that mirrors may ask, with * and ?; files and redirects may then be on "
        "loopback addresses and plain http, too")
    push_allow: tuple | None = option(          # None: all
        "push-allow", to_names, None,
        "the only hosts that releases may be pushed to from here, with * and ?")
    webhook_retry: float = option(
        "webhook-retry", _seconds, 10.0,
        "seconds before a webhook is tried again; doubled each time")
    full_text: bool = option(
        "no-full-text", None, True, "search by simple comparison, as where SQLite has no FTS5")
    audit_rows: int = option("audit-rows", _positive, 100000, "rows that the audit log keeps")
    keep_log: LogBounds = option(
        "keep-log", _log_bounds, LogBounds(64 << 20, 90 * 86400),
        "how much of the changelog is kept for those who follow it, as 64M, 90d or 64M,90d: "
        "its oldest entries go")
    connections: int = option(
        "connections", _positive, 4096, "connections at a time", aliases=("--connection-limit",))
    threads: int = option("threads", _positive, 64, "worker threads at most")
    secretfile: str = option(
        "secretfile", absolute_path, "",
        "file with the secret behind logins; default: .secret in the server directory")
    access_log: bool = option("no-access-log", None, True, "no line per request on standard output")
    read_only: bool = False     # no option: detected at the start


OPTIONS = {field.name: (field.metadata["option"], field.default)
           for field in dataclasses.fields(Settings) if field.metadata}


# -- commands: each is declared once, by a decorator of its function


class Argument(typing.NamedTuple):
    """A word or an option of one command; `settings` are arguments of argparse's add_argument."""
    names: tuple
    settings: dict

    @property
    def usage(self):
        """The argument in a line of usage, and a blank; "" for an option."""
        if self.names[0].startswith("-"):
            return ""
        shown = "|".join(self.settings.get("choices", ())) or self.names[0].upper()
        return f"[{shown}] " if self.settings.get("nargs") == "?" else f"{shown} "


class Command(typing.NamedTuple):
    """A command: the first word of the command line, or the first two.

    `run` gets the command line as a `Parsed` and returns the exit status, or None for 0."""
    name: str
    help: str
    arguments: tuple
    takes: tuple        # kinds of options
    run: typing.Callable
    is_plugin: bool     # whether it has --nagios

    @property
    def is_hidden(self):
        """Whether only this program itself uses it."""
        return self.name.startswith("_")

    @property
    def options(self):
        """(field of `Settings`, its `Option`, its default) of each option that it takes."""
        return [(field, option_, default) for field, (option_, default) in OPTIONS.items()
                if option_.about in self.takes]


COMMANDS = {}


def command(name, help, *arguments, takes=(), is_plugin=False):
    """Decorator: declares a function as a command; `takes` are kinds of the server's options.

    A command whose name begins with an underscore is hidden. One that takes no options reads
    neither the environment nor the configuration file. `is_plugin`: with --nagios, whatever is
    wrong with its words ends with the status 3, unknown: 2 would be an alarm."""
    def register(function):
        COMMANDS[name] = Command(name, help, arguments, takes, function, is_plugin)
        return function
    return register


def argument(*names, **settings):
    """Declare an `Argument` of a command."""
    return Argument(names, settings)


def command_names():
    """The commands that people may type."""
    return [command_.name for command_ in COMMANDS.values() if not command_.is_hidden]


# -- parts of a running server


class Gauge(typing.NamedTuple):
    """A measurement of a part, for monitoring.

    `value`: a number; or, shown by +metrics only, samples (end of the name, {label: text},
    number)."""
    name: str
    kind: str           # as Prometheus calls it: gauge, counter, summary
    help: str
    value: int | float | typing.Iterable


class Complaint(typing.NamedTuple):
    """Why the server is not healthy; `details` are sentences that only root is shown."""
    level: str          # warn, fatal
    sentence: str
    details: tuple = ()


class Part:
    """A part of a running server; the `App` calls these methods of all its parts."""

    def loops(self):
        """(name, function) for each background thread that runs until the server ends."""
        return ()

    def gauges(self):
        """The part's `Gauge`s."""
        return ()

    def complaints(self):
        """The part's `Complaint`s; none if it is healthy."""
        return ()

    def recover(self):
        """Remove what a crash left half-done.

        Called once, before the first request, unless the directory is on read-only media."""

    def clean(self, change):
        """Delete rows of deleted objects; called every hour, in a change that is not durable."""

    def tidy(self):
        """Remove what nothing needs any more; called every hour, with no change open."""

    def close(self):
        """Release files and connections; called once, after the last request."""


class Limits:
    """Every bound that is not a setting. Times are in seconds, sizes in bytes."""
    head = 64 << 10                 # a request's head
    headers = 200                   # header lines of a request
    keep_alive = 75                 # seconds between two requests on a connection
    evictable = 1                   # seconds idle, before a full server closes a connection
    head_time = 30                  # seconds from the first byte of a head to its last
    stall = 60                      # seconds without a byte sent or received inside a request
    slow_client = 0.2               # seconds that a worker waits for a client; then the front does
    pending_memory = 32 << 20       # of responses that the front sends on, in all
    pending_grace = 5               # seconds for which none of these counts as slow
    slowest_response = 1024           # bytes a second of a response, after its first minute
    gathered_body = 64 << 10        # the largest body that the front receives itself
    slowest_body = 1024             # bytes a second of a body, after its first minute
    json_body = 16 << 10            # of a login, a push, a yank, a status
    config_body = 320 << 10         # of a user or an index: their `attributes` and a little more
    json_cost = 30                  # bytes of memory for a byte of JSON, parsed: "[[],[],..."
    file_cost = 1500                # bytes of memory for a file of a page that is being made
    response_cost = 5                 # bytes of memory for a byte of stored JSON in a response
    json_marks = 40000              # brackets and commas in a body, those in strings included
    variants_file = 1 << 20         # an uploaded list of a release's variant wheels
    json_depth = 50
    spooled = 64 << 10              # of a stream, kept in memory before a file on disk is used
    unclaimed = 1 << 20             # memory that each request may take without a claim
    claimed = 192 << 20             # memory that all claims together may take
    claim_time = 20                 # seconds that a claim waits for others
    claimers = 16                   # claims that wait
    large_claim = 16 << 20          # larger claims are served one at a time
    longest_rest = 1                # seconds between two of these
    lazy_time = 2                   # seconds for which a worker sends what the front could send
    readme_piece = 64 << 10         # a README is stored in pieces of this size
    copied = 256 << 10              # bytes that a command reads at a time
    dump_piece = 1 << 20            # characters of a dump's JSON that are read at a time
    dump_value = 64 << 20           # of one value in it: a release's metadata, a file's record
    dump_values = 500_000           # in one of these
    dump_errors = 100               # that are listed
    dump_warnings = 20              # of one kind, that are listed
    streamed = 1 << 20              # of READMEs; a larger response is sent in pieces
    reason = 1000                   # characters of a yank's or a project's reason
    attributes = 256 << 10          # of a user or an index
    account_attributes = 1 << 20    # of all indexes of a user, without 1 KiB of each
    attribute_values = 10000        # in them, at all depths: each takes 100 bytes of memory
    user_name = 200                 # characters, as of an index
    edits = 100                     # tries of an edit of an index, if others edit it meanwhile
    form_field = 10 << 20
    large_forms = 3                 # uploads at a time whose fields exceed `unclaimed` bytes
    large_forms_of_one = 2          # of these, by one user
    form_fields = 20 << 20          # all fields of an upload together, without the file
    form_parts = 20000
    part_head = 8192
    project_name = 200              # characters; applies to every index
    drained_body = 64 << 20         # of a refused request: read, for the client to see the response
    drain_time = 10
    pipelined = 0.05                # seconds for which a worker serves a connection's next requests
    waiting_requests = 512          # that no worker has begun
    longest_queue = 20              # seconds that these may wait
    unlined = 512 << 10             # unpacked bytes, from which on unpacking takes turns
    entries_at_once = 500           # files of a mirrored page that one change inserts
    group_time = 0.02               # seconds within which changes are committed together
    workers_at_ease = max(2, os.cpu_count() or 1)   # requests worked on at a time
    no_progress = 0.02              # seconds after which a crew of threads may grow by one
    idle_thread = 30                # seconds without work, after which a thread ends
    response_cache = 64 << 20
    page_cache = 64 << 20
    turn = 0.5                      # seconds that a request waits for another to make the same page
    ready_response = 1 << 20          # the largest response that the front keeps ready
    ready_head = 4 << 10            # the largest request head that it keeps one for
    small_file = 256 << 10          # the largest file that is sent from memory, in one send
    upstream_page = 100 << 20
    page_cost = 8                   # bytes of memory for a byte of a page, to read and store it
    gzip_members = 10000            # of one page
    page_files = 100_000            # the largest pages of pypi.org have some 20,000
    upstream_list = 128 << 20       # unzipped; the list of pypi.org has some 60 MB
    listed_names = 3_000_000
    upstream_file = 20 << 30        # if upstream does not state a size
    size_slack = 64 << 20           # bytes by which a file with a hash may exceed its stated size
    upstream_page_time = 60         # also for the head of the response with a file
    upstream_stall = 30             # seconds without a byte from upstream
    upstream_list_time = 300
    list_readers = 2                # child processes that read project lists
    list_readers_of_one = 1         # of these, for mirrors of one user
    list_turn = 120                 # seconds that a list on disk waits for such a process
    list_reading = 300              # seconds that one may run
    list_cpu = 60                   # seconds of processor time that one may take
    list_memory = 1 << 30
    list_pause = 60                 # seconds before an unreadable list is fetched again
    first_list = 30                 # seconds that a request waits for a mirror's first project list
    upstream_redirects = 5
    upstream_idle = 20              # seconds that an unused connection to upstream is kept
    upstream_pause = 10             # seconds without requests to a host or for a page that failed
    refresh_pause = 1               # seconds between two refreshes of a project of a mirror
    metadata_wait = 12              # seconds for a wheel fetched for its metadata; pip waits 15
    bases = 100                     # of one index
    fetches = 64                    # busy with pages and metadata files; thrice as many in all
    fetches_of_one = 24             # from one host; one index alone gets two thirds of them
    downloads = 128                 # busy with files; thrice as many in all
    downloads_of_one = 96           # from one host; one index alone gets two thirds of them
    waiting_flights = 1000          # of one index
    crowded_wait = 1                # seconds that a request waits whose owner has no place
    crowded_retry = 10              # seconds after which such a request for a file may be retried
    missing_projects = 10000        # remembered "not found" responses
    metadata_file = 10 << 20
    metadata_lines = METADATA_FIELDS    # header lines before the body
    archive_members = 100000
    small_archive_members = 10000   # of a tar, whatever its size
    tar_member = 16                 # bytes of a tar for each further one; small files take 50
    archive_free = 64 << 20         # unpacked bytes of an archive, whatever its size
    archive_ratio = 300             # further ones for each packed byte; tables reach 100
    archive_bytes = 4 << 30         # the most that these two allow
    large_archive_ratio = 20        # always allowed for each packed byte; libraries take 2 to 5
    large_archive = 64 << 20        # unpacked; `large_checks` of larger ones are read at a time
    large_directory = 10000         # members of a zip, which take 6 MB; more count as large too
    large_checks = 2                # large archives read at a time
    large_wait = 300                # seconds that one of them waits for its turn
    tar_header = 1 << 20            # an extended header of a tar
    tar_headers = 32 << 20          # all extended headers of a tar
    xz_memory = 128 << 20           # for unpacking; `xz -9` needs 65 MiB
    remembered_passwords = 1000
    password_memory = 300           # seconds for which a checked password is not hashed again
    session = 36000                 # seconds that a session token is valid
    failed_logins = 5               # of one account from one address, before waits begin
    longest_login_wait = 60
    # to all accounts; then one in `address_pause` seconds
    failed_logins_at_address, address_pause = 100, 6
    # from addresses without an earlier login to it; then one in `account_pause` seconds
    failed_logins_to_account, account_pause = 50, 20
    looks, look_pause = 20, 30      # at a remembered password, while its address has to wait
    new_users, new_user_pause = 20, 30      # registered from one address, without a login
    waiting_hashes = 32             # passwords that wait for their hash
    argon2_memory = 1 << 20         # KiB that computing one of devpi's hashes may take
    argon2_blocks = 4 << 20         # KiB that it may write
    argon2_lanes = 64
    failure_memory = 900            # seconds after which failed logins are forgotten
    remembered_failures = 10000
    audited_failures = 60           # failed logins a minute
    audited_refusals = 1000         # an hour, of forbidden and conflicting requests
    audited_refusals_of_one = 100   # of these, by one user and address
    counted_events = 10000          # that one `Rate` remembers
    audit_repeat = 60               # seconds within which a repeated act is counted in the same row
    audit_repeats = 10000           # indexes and users whose last act is remembered for that
    history = 100                   # log entries of one file
    doc_members = 20000             # of a documentation zip
    doc_bytes = 1 << 30             # unpacked
    doc_member = 200 << 20          # of one member, unpacked
    ranged_member = 8 << 20         # the largest deflated member of which ranges are sent
    doc_ratio = 200                 # unpacked to packed size of a member over 1 MiB
    test_result = 16 << 20
    parsed_here = 1 << 20           # a larger test result is parsed in a child process
    test_results = 1000             # of one file
    large_jsons = 2                 # test results parsed in child processes at a time
    large_jsons_of_one = 1          # of these, from one address
    anonymous_results = 100          # test results of one file, from clients without login
    anonymous_result_bytes = 64 << 20    # these in all
    anonymous_an_hour = 3000         # test results without login, on all indexes
    anonymous_of_one = 1000          # of these, from one address
    anonymous_bytes = 256 << 20      # an hour, of test results without login
    anonymous_bytes_of_one = 128 << 20   # of these, from one address
    cleaning = 3600                 # seconds between two searches for files without a row
    write_ahead_log = 64 << 20      # bytes that it keeps after a checkpoint
    trash = 7 * 86400               # seconds that a file without a row is kept
    outbox = 10000                  # messages of one index; the oldest are deleted
    outbox_of_all = 50000           # messages; the oldest of the account with most are deleted
    outbox_rest = 30                # seconds, if a target's last message is not recorded as sent
    webhooks = 20                   # URLs of one index
    dead_messages = 1000
    query = 256                     # characters
    query_terms = 16
    search_hits = 5000              # projects that one query examines
    search_time = 2
    search_pause = 30               # seconds between two looks at an empty queue
    indexed_text = 64 << 10         # characters of a README or a page
    indexed_page = 1 << 20          # bytes of a page that are read
    indexed_pages = 2000            # of one documentation zip
    found_names = 10000             # of one mirror
    names_pause = 600               # seconds before a search asks again for a missing list
    xml_body = 64 << 10
    status_body = 4 << 20           # of a server that the command `status` asks
    search_warn, search_fatal = 300, 3600   # seconds that the search index may lag behind
    disk_warn, disk_fatal = 1 << 30, 100 << 20  # bytes free
    targets = 128                   # of the outbox, served at a time
    slow_targets = 32               # of these, that were slow last time
    slow_delivery = 2               # seconds after which a target counts as slow
    delivery_turn = 2               # seconds for which a target is served before others
    webhook_connect = 3             # seconds to connect to a target
    webhook_time = 10
    longest_retry = 3600
    delivery_tries = 10
    pushes = 32                     # that wait for other servers
    pushes_of_one = 8               # of these, by one user
    push_time = 1800                # seconds for one push to an outside server
    attestations = 256 << 10        # characters, of one file
    refusal_reason = 1000              # characters of another server's refusal that are passed on
    named_stages = 5                # that a refusal suggests in place of an index
    posted_response = 64 << 10        # bytes of the response to a POST that are read
    slowest_post = 16 << 10         # bytes a second
    busy = 10                       # seconds that a writer waits for another process
    shutdown = 30                   # seconds in which running requests may finish


def reason_phrase(status):
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


# ==================================================================================================
# 3  Threads and memory
#
# Work in the background is done by crews of threads. They are bounded, and shared fairly between
# those who wait. The memory that a load took goes back to the system when the load is over.
# ==================================================================================================


def tell_malloc(function, *arguments):
    """Call a function of glibc's malloc, where it exists."""
    if sys.platform == "linux":
        # Python may lack ctypes, and the C library may be another one
        with contextlib.suppress(ImportError, OSError, AttributeError):
            import ctypes       # not at the top: nothing else needs it
            getattr(ctypes.CDLL(None), function)(*arguments)


def spare_memory():
    """Make all threads share two pools of memory, in place of one or more for each processor.

    Saves 16 MB after eight threads made pages of 2,000 files, and is no slower: one thread at a
    time runs Python."""
    # M_TRIM_THRESHOLD and the others of <malloc.h>
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8
    tell_malloc("mallopt", arena_max, 2)
    # Larger blocks go back to the system when they are freed. By default this bound grows to
    # 32 MiB, and 16 responses of 7 MB leave 180 MB behind.
    tell_malloc("mallopt", mmap_threshold, 1 << 20)
    # The default, 128 KiB, gives memory back and takes it again all the time.
    tell_malloc("mallopt", trim_threshold, 8 << 20)


def give_back_memory():
    """Return freed memory, which glibc keeps, to the system; compiling this file leaves 20 MB."""
    tell_malloc("malloc_trim", 0)


class Recruiter:
    """Starts threads for crews of `Workers`, in a thread of its own.

    `Thread.start` waits until the new thread runs, which is late on busy processors; the front
    must not wait for that.

    A crew whose work waits and that has begun nothing for `Limits.no_progress` may have one more
    busy thread: its threads wait for something, and not in an `outside_wait` or `disk_wait`."""

    def __init__(self):
        self.wanted = queue.SimpleQueue()       # crews whose work waits
        self.thread = None

    def start(self):
        """Start the thread, when the first crew is made."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="recruiter", daemon=True)
            self.thread.start()

    def _run(self):
        behind, looked = {}, 0          # crew -> what it had begun at the last look
        while True:
            crew = None
            with contextlib.suppress(queue.Empty):
                crew = self.wanted.get(timeout=Limits.no_progress if behind else None)
            now = time.monotonic()
            if crew is not None:
                looked = looked if behind else now
                behind.setdefault(crew, crew.begun)
                self._recruit(crew)

            if now - looked < Limits.no_progress:
                continue
            looked = now
            for crew in list(behind):
                if crew.look_again(behind[crew]):
                    behind[crew] = crew.begun
                    self._recruit(crew)
                else:
                    del behind[crew]

    @staticmethod
    def _recruit(crew):
        try:
            crew.recruit()
        except Exception as error:      # the system has no more threads, or no memory for one
            log.error("%s: %s", crew.name, reason_of(error))
            time.sleep(1)


recruiter = Recruiter()


class FairQueue:
    """Waiting items; each party gets its turn.

    A party is (first, second), for example an address and the user that it claims to be. A `first`
    with many `second` has one turn all the same. Not thread-safe: the owner has a lock."""

    def __init__(self):
        self.count = 0
        self.parties = {}       # first -> {second -> items}, the last served at the end

    def __len__(self):
        return self.count

    def put(self, item, party=(None, None)):
        first, second = party
        self.parties.setdefault(first, {}).setdefault(second, collections.deque()).append(item)
        self.count += 1

    def get(self, is_wanted=None):
        """The next item, or the next that is first of its party and `is_wanted`; else None."""
        for first, seconds in self.parties.items():
            for second, items in seconds.items():
                if is_wanted is None or is_wanted(items[0]):
                    item = items.popleft()
                    self._had_its_turn(seconds, second)
                    self._had_its_turn(self.parties, first)
                    self.count -= 1
                    return item
        return None

    @staticmethod
    def _had_its_turn(places, key):
        left = places.pop(key)
        if left:
            places[key] = left

    def take_from_the_largest(self):
        """The newest item of the party with most items; of several, of the one served last."""
        seconds = max(reversed(list(self.parties.values())),
                      key=lambda seconds: sum(map(len, seconds.values())))
        items = max(reversed(list(seconds.values())), key=len)
        item = items.pop()
        self.count -= 1

        for places in (seconds, self.parties):
            for key in [key for key, left in places.items() if not left]:
                del places[key]
        return item


class _Place:
    """Where a thread of a crew waits for work: `turn` is held until `item` is there."""
    __slots__ = ("turn", "item")

    def __init__(self):
        self.turn, self.item = threading.Lock(), None
        self.turn.acquire()


class Workers:
    """A bounded crew of daemon threads for one kind of work, which grows on demand.

    While work makes progress, `at_ease` threads are busy at a time: more would slow each other
    down and keep the front from a processor. Without progress (see `Recruiter`) up to `limit`
    threads are busy.

    Threads in an `outside_wait`, for a slow client or for upstream, do not count as busy, up to
    three times `limit`: some dozens of them hold up nobody else. An owner (a user, an address) gets
    at most twice as many of these places as are free then. Nor do threads in a `disk_wait` count,
    up to `limit`."""

    def __init__(self, name, limit, work, at_ease=None):
        recruiter.start()
        self.name, self.limit, self.work = name, limit, work
        self.at_ease = self.allowed = min(at_ease or limit, limit)
        self.lock = threading.Lock()
        self.waiting = FairQueue()                      # work
        self.parked = []                                # a _Place for each thread without work
        # numbers of threads: all, those starting, those at work
        self.count = self.starting = self.busy = 0
        self.outside = self.storing = 0                 # threads in an outside_wait, a disk_wait
        self.outside_of = collections.Counter()         # owner -> threads in an outside_wait
        self.begun = 0                                  # pieces of work so far
        # what the recruiter was told: threads lack, work waits
        self.is_short = self.is_watched = False

    def submit(self, item, party=(None, None)):
        """Have a thread do the work; parties take turns, item by item."""
        with self.lock:
            self.waiting.put(item, party)
            self._hand_out()

    def take_back(self):
        """The newest item of the party with most items that wait; None if no item waits."""
        with self.lock:
            return self.waiting.take_from_the_largest() if self.waiting else None

    def _hand_out(self):
        """Give waiting work to parked threads, as far as allowed; the rest to the recruiter."""
        while self.waiting and self.busy < self.allowed and self.parked:
            place = self.parked.pop()       # the last parked: the others end if work is scarce
            place.item = self.waiting.get()
            self.busy += 1
            self.begun += 1
            place.turn.release()

        is_short = bool(self.waiting) and self.busy < self.allowed
        if is_short and not self.is_short or self.waiting and not self.is_watched:
            self.is_short |= is_short
            self.is_watched = True
            recruiter.wanted.put(self)

    def look_again(self, begun):
        """Allow one more busy thread if no work has begun since `self.begun` was `begun`, else
        one less.

        Returns whether work waits; if none waits, `at_ease` threads are allowed again."""
        with self.lock:
            if not self.waiting:
                self.allowed, self.is_watched = self.at_ease, False
                return False
            if self.begun != begun:
                self.allowed = max(self.allowed - 1, self.at_ease)
            else:
                self.allowed = min(self.allowed + 1, self.limit)
                self._hand_out()
            return True

    def recruit(self):
        """Start threads for the work that waits, within the limits."""
        while True:
            with self.lock:
                self.is_short = False

                ready = len(self.parked) + self.starting
                if ready >= min(len(self.waiting), self.allowed - self.busy) \
                        or self.count >= 5 * self.limit:
                    return
                self.count += 1
                self.starting += 1
            try:
                threading.Thread(target=self._run, name=self.name, daemon=True).start()
            except BaseException:
                with self.lock:
                    self.count -= 1
                    self.starting -= 1
                raise

    def _run(self):
        threading.current_thread().crew = self
        place = _Place()
        with self.lock:
            self.starting -= 1
            self._park(place)
        while self._has_work(place):
            item, place.item = place.item, None
            try:
                self.work(item)
            except Exception:
                log.exception("%s failed", self.name)
            del item
            with self.lock:
                self.busy -= 1
                self._park(place)

    def _park(self, place):
        self.parked.append(place)
        self._hand_out()

    def _has_work(self, place):
        """Wait for work; False if none came for a while: the thread is to end."""
        if place.turn.acquire(timeout=Limits.idle_thread):
            return True
        with self.lock:
            if place in self.parked:
                self.parked.remove(place)
                self.count -= 1
                is_last = not self.count
            else:
                is_last = None
        if is_last is None:             # work has just arrived
            return place.turn.acquire()
        if is_last:
            give_back_memory()          # the load is over
        return False

    @contextlib.contextmanager
    def away(self, owner):
        """For the time that a thread waits outside; gives whether a place was free for it."""
        with self.lock:
            free = 3 * self.limit - self.outside
            room = free > 0 and (owner is None or self.outside_of[owner] < 2 * free)
            self.outside += room
            self.outside_of[owner] += room
            self.busy -= room
            self._hand_out()
        try:
            yield room
        finally:
            with self.lock:
                self.busy += room
                self.outside -= room
                self.outside_of[owner] -= room
                if not self.outside_of[owner]:
                    del self.outside_of[owner]

    @contextlib.contextmanager
    def storing_something(self):
        """For the time that a thread waits for the disk."""
        with self.lock:
            room = self.storing < self.limit
            self.storing += room
            self.busy -= room
            self._hand_out()
        try:
            yield
        finally:
            with self.lock:
                self.busy += room
                self.storing -= room


def outside_wait(owner=None):
    """A context for a wait that may be long: for a slow client, for upstream.

    Gives False if too many threads wait like that already."""
    crew = getattr(threading.current_thread(), "crew", None)
    return crew.away(owner) if crew else contextlib.nullcontext(True)


def disk_wait():
    """A context for a wait until something is on disk."""
    crew = getattr(threading.current_thread(), "crew", None)
    return crew.storing_something() if crew else contextlib.nullcontext()


class Flight:
    """Work that any number of threads may wait for; `error` is how it failed, or None."""

    def __init__(self, function):
        self.function = function
        self.created = time.monotonic()
        self.ended = threading.Event()
        self.error = None

    def wait(self, seconds):
        """Whether it ended within `seconds`."""
        if self.ended.is_set():
            return True
        with outside_wait():
            return self.ended.wait(seconds)

    def run(self):
        try:
            if time.monotonic() - self.created > Limits.longest_queue:
                raise UpstreamTrouble("upstream is too busy: nothing was asked of it in time")
            self.function()
        except Problem as error:
            # The traceback would keep the objects of the work, a page of 100 MB, until the garbage
            # collector runs.
            self.error = error.with_traceback(None)
            error.__cause__ = error.__context__ = None
        except Exception as error:
            log.exception("background work failed")
            self.error = UpstreamTrouble(reason_of(error))


class SingleFlight:
    """Runs one flight at a time for each key; later requests for the key wait for that flight.

    A flight belongs to an index and goes to an upstream host, its lane. A lane has `lane_limit`
    flights at a time, so that a host that hangs can't hold up the others. An index gets at most
    twice as many places of a lane as are free then, and its owner twice as many of all places as
    are free then, so that others always find some."""

    def __init__(self, name, limit, lane_limit):
        self.workers = Workers(name, limit, self._run)
        self.places, self.lane_limit = 3 * limit, lane_limit
        self.flights = {}
        # None (all), lane, (lane, index id), owner -> number of flights
        self.under_way = collections.Counter()
        self.waiting = {}           # (lane, index id) -> flights, the last served at the end
        self.waiting_of = collections.Counter()     # index id -> number of its waiting flights
        self.lock = threading.Lock()

    def start(self, key, lane, index, flight):
        """Start a flight, unless one for `key` is under way; return the one that is.

        Busy if too many flights of this index wait."""
        with self.lock:
            current = self.flights.get(key)
            # a failed flight is over, even if its worker has not removed it yet
            if current is not None and current.error is None:
                return current

            flight.key = key
            flight.parties = (None, lane, (lane, index.id), index.user)
            if self._has_place(flight):
                self._begin(flight)
            elif self.waiting_of[index.id] < Limits.waiting_flights:
                self.waiting_of[index.id] += 1
                self.waiting.setdefault((lane, index.id), collections.deque()).append(flight)
            else:
                raise Busy("too much is being asked of one upstream server just now, try again")
            self.flights[key] = flight
        return flight

    def _has_place(self, flight):
        everything, lane, of_lane, owner = flight.parties
        return self.under_way[owner] < 2 * (self.places - self.under_way[everything]) and \
            self.under_way[of_lane] < 2 * (self.lane_limit - self.under_way[lane])

    def _begin(self, flight):
        self.under_way.update(flight.parties)
        self.workers.submit(flight)

    def settle(self, seconds):
        """Wait up to `seconds` until nothing is under way."""
        until = time.monotonic() + seconds
        for flight in list(self.flights.values()):
            flight.ended.wait(max(0, until - time.monotonic()))

    def _run(self, flight):
        try:
            flight.run()
        finally:
            with self.lock:
                if self.flights.get(flight.key) is flight:
                    del self.flights[flight.key]
                for party in flight.parties:
                    self.under_way[party] -= 1
                    if not self.under_way[party]:
                        del self.under_way[party]
                self._begin_waiting()
            flight.ended.set()

    def _begin_waiting(self):
        """Begin flights that have a place now, one of each index in turn."""
        for party in list(self.waiting):
            queue_ = self.waiting[party]
            if self._has_place(queue_[0]):
                self._begin(queue_.popleft())
                del self.waiting[party]
                if queue_:
                    self.waiting[party] = queue_
                self.waiting_of[party[1]] -= 1
                if not self.waiting_of[party[1]]:
                    del self.waiting_of[party[1]]


class Line:
    """A few places, given in the order of asking.

    A thread that leaves a place and asks again stands at the end. (A semaphore goes to the thread
    that asks first after a release: mostly the one that had it.)"""

    def __init__(self, places):
        self.free, self.lock, self.waiting = places, threading.Lock(), collections.deque()

    def __enter__(self):
        with self.lock:
            if self.free:
                self.free -= 1
                return
            turn = threading.Lock()
            turn.acquire()
            self.waiting.append(turn)
        with outside_wait():
            turn.acquire()

    def __exit__(self, *_):
        with self.lock:
            if self.waiting:
                self.waiting.popleft().release()        # the place is handed over
            else:
                self.free += 1


# Unpacking and hashing of passwords run without the interpreter's lock: without a bound, as many
# threads would compute as requests come, and the front would compete with them for a processor.
# Each of the two leaves it one processor, and takes turns piece by piece.
PROCESSORS = max(1, min(4, (os.cpu_count() or 1) - 1))
unpacking = Line(PROCESSORS)


def turn_to_unpack(size):
    """A context to unpack a piece of what has given `size` bytes; small ones need no turn."""
    return unpacking if size > Limits.unlined else contextlib.nullcontext()


class MemoryPool:
    """Memory that large work shares; a claim for more than is left waits until others are done.

    For work that only computes: a claim that waits for a client, for upstream or for more memory
    would keep others waiting. Very large work is done one at a time, with a rest between: writing
    10 MB as JSON keeps the interpreter's lock, and so all other threads, for a tenth of a
    second."""

    def __init__(self, size):
        self.size = self.left = size
        self.freed = threading.Condition()
        self.queue = threading.Lock()       # one thread waits for memory, the others for this
        self.large = threading.Lock()
        self.rested = 0                     # time.monotonic() when the next large work may begin
        self.standing = collections.Counter()       # owner -> number of its waiting claims

    @contextlib.contextmanager
    def claim(self, size, owner=None):
        """`size` bytes, or half of the pool if that is less, within the `with`.

        Busy after `Limits.claim_time`, or at once if many wait: an `owner` (a user, an address)
        gets at most as many places in the line as are free then."""
        size = min(size, self.size // 2) if size > Limits.unclaimed else 0
        with self._turn_of_large(owner) if size > Limits.large_claim \
                else contextlib.nullcontext():
            if not self._take(size):
                with self._standing_in_line(owner):
                    self._wait(size)
            try:
                yield
            finally:
                with self.freed:
                    self.left += size
                    self.freed.notify()

    @contextlib.contextmanager
    def _standing_in_line(self, owner):
        with self.freed:
            if self.standing[owner] >= Limits.claimers - sum(self.standing.values()):
                raise _too_much_memory()
            self.standing[owner] += 1
        try:
            with outside_wait(owner):
                yield
        finally:
            with self.freed:
                self.standing[owner] -= 1
                if not self.standing[owner]:
                    del self.standing[owner]

    @contextlib.contextmanager
    def _turn_of_large(self, owner):
        with self._standing_in_line(owner):
            if not self.large.acquire(timeout=Limits.claim_time):
                raise _too_much_memory()
            time.sleep(max(0, self.rested - time.monotonic()))

        began = time.monotonic()
        try:
            yield
        finally:
            now = time.monotonic()
            self.rested = now + min(now - began, Limits.longest_rest)
            self.large.release()

    def _take(self, size):
        with self.freed:
            fits = self.left >= size and not self.queue.locked() or not size
            self.left -= size if fits else 0
        return fits

    def _wait(self, size):
        until = time.monotonic() + Limits.claim_time
        if self.queue.acquire(timeout=Limits.claim_time):
            try:
                with self.freed:
                    if self.freed.wait_for(lambda: self.left >= size,
                                           max(0, until - time.monotonic())):
                        self.left -= size
                        return
            finally:
                self.queue.release()
        raise _too_much_memory()


def _too_much_memory():
    return Busy("too much that takes much memory is asked for just now, try again", 5)


bulk = MemoryPool(Limits.claimed)


class FairMemory:
    """Notes about parties, `limit` in all; beyond it the party with most loses its oldest."""

    def __init__(self, limit):
        self.limit, self.count = limit, 0
        self.notes = {}             # party -> {key: note}, the oldest first
        self.lock = threading.Lock()

    def get(self, party, key, default):
        return self.notes.get(party, {}).get(key, default)

    def put(self, party, key, note):
        with self.lock:
            self._pop(party, key)
            self.notes.setdefault(party, {})[key] = note
            self.count += 1
            if self.count > self.limit:
                most = max(self.notes, key=lambda party: len(self.notes[party]))
                self._pop(most, next(iter(self.notes[most])))

    def pop(self, party, key):
        with self.lock:
            self._pop(party, key)

    def _pop(self, party, key):
        notes = self.notes.get(party)
        if notes and key in notes:
            del notes[key]
            self.count -= 1
            if not notes:
                del self.notes[party]


class Patience:
    """Places, shared out by owner, for requests that wait for upstream, each with a thread.

    An owner gets at most five times as many as are free then. Further requests wait only long
    enough to see that upstream is slow: a crowd at a fast upstream notices nothing, and a crowd at
    an upstream that hangs leaves threads to others."""

    def __init__(self, places):
        self.places, self.count = places, 0
        self.waiting = {}           # owner -> {token of a request: since when}, the oldest first
        self.lock = threading.Lock()

    def longest(self, owner):
        """Seconds that a request which comes now may wait."""
        with self.lock:
            return self._longest(owner)

    def _longest(self, owner):
        mine = self.waiting.get(owner, {})
        if len(mine) < 5 * (self.places - self.count):
            return float("inf")
        oldest = next(iter(mine.values()), time.monotonic())
        return max(0, oldest + Limits.crowded_wait - time.monotonic())

    @contextlib.contextmanager
    def place(self, owner):
        """For the time that a request waits; gives `longest`. Takes a place only if it is inf."""
        token = object()
        with self.lock:
            longest = self._longest(owner)
            is_placed = longest == float("inf")
            if is_placed:
                self.waiting.setdefault(owner, {})[token] = time.monotonic()
                self.count += 1

        try:
            yield longest
        finally:
            if is_placed:
                with self.lock:
                    self.count -= 1
                    del self.waiting[owner][token]
                    if not self.waiting[owner]:
                        del self.waiting[owner]


class Shares:
    """Room for a few expensive tasks at a time, of which each owner has a part.

    So nobody waits for the second task of a stranger."""

    def __init__(self, what, limit, limit_of_one, retry_after):
        self.what, self.limit, self.limit_of_one = what, limit, limit_of_one
        self.retry_after = retry_after
        self.taken = collections.Counter()      # owner -> number of tasks
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def one(self, owner, seconds):
        """Room for one task of this owner; Busy if there is none within `seconds`."""
        def has_room():
            return sum(self.taken.values()) < self.limit and self.taken[owner] < self.limit_of_one

        with outside_wait(), self.changed:
            if not self.changed.wait_for(has_room, seconds):
                raise Busy(f"too many {self.what} just now, try again in {self.retry_after} s",
                           self.retry_after)
            self.taken[owner] += 1
        try:
            yield
        finally:
            with self.changed:

                self.taken[owner] -= 1
                self.taken += collections.Counter()     # drops owners without tasks
                self.changed.notify_all()


class Rate:
    """Sums of what happened within the last `seconds`, by key and in all.

    Amounts may be bytes, so the number of events has its own bound, `Limits.counted_events`."""

    def __init__(self, seconds, of_one, of_all):
        self.seconds, self.of_one, self.of_all = seconds, of_one, of_all
        self.events = collections.deque()           # (time.monotonic(), key, amount)
        self.sums = collections.Counter()
        self.total = 0
        self.lock = threading.Lock()

    def take(self, key, amount=1):
        """Count the amount and return 0; if it would pass a bound, count nothing and return the
        seconds until it fits."""
        now = time.monotonic()
        with self.lock:
            while self.events and self.events[0][0] < now - self.seconds:
                _, old, taken = self.events.popleft()
                self.total -= taken
                self.sums[old] -= taken
                if not self.sums[old]:
                    del self.sums[old]

            if self.total + amount > self.of_all or self.sums[key] + amount > self.of_one \
                    or len(self.events) >= Limits.counted_events:
                return max(1, int(self._room_from(key, amount, now) - now + 0.999))
            self.events.append((now, key, amount))
            self.total += amount
            self.sums[key] += amount
        return 0

    def _room_from(self, key, amount, now):
        """When enough of what is counted now has expired for the amount to fit each bound."""
        in_all = self.total + amount - self.of_all
        of_key = self.sums[key] + amount - self.of_one
        number = len(self.events) + 1 - Limits.counted_events

        since = now
        for since, owner, taken in self.events:
            in_all -= taken
            of_key -= taken if owner == key else 0
            number -= 1
            if in_all <= 0 and of_key <= 0 and number <= 0:
                break
        return since + self.seconds


class Turns:
    """Serialises makers of the same value: the second finds what the first has made."""

    def __init__(self):
        self.lock, self.turns = threading.Lock(), {}        # key -> [Lock, number of makers]

    @contextlib.contextmanager
    def turn(self, key, seconds):
        """A turn at this key. After `seconds` of waiting (-1: no bound), goes on without one."""
        with self.lock:
            entry = self.turns.setdefault(key, [threading.Lock(), 0])
            entry[1] += 1
        mine = entry[0].acquire(blocking=False)
        if not mine:
            with outside_wait():
                mine = entry[0].acquire(timeout=seconds)

        try:
            yield
        finally:
            if mine:
                entry[0].release()
            with self.lock:
                entry[1] -= 1
                if not entry[1]:
                    del self.turns[key]


class Budget:
    """Bounds how often each key acts: `burst` times at once, then once every `pause` seconds.

    For each key it stores one number: the time.monotonic() by which all its acts are paid for."""

    def __init__(self, burst, pause):
        self.pause, self.credit = pause, (burst - 1) * pause
        self.paid = collections.OrderedDict()

    def wait(self, key):
        """Seconds until the key may act; 0: now."""
        return max(0, self.paid.get(key, 0) - time.monotonic() - self.credit)

    def take(self, key):
        self.paid[key] = max(self.paid.pop(key, 0), time.monotonic()) + self.pause
        while len(self.paid) > Limits.remembered_failures:
            self.paid.popitem(last=False)

    def give_back(self, key):
        if key in self.paid:
            self.paid[key] -= self.pause


# ==================================================================================================
# 4  Store
#
# The only way to the database. A reader sees one committed state and never waits. Changes are
# functions; one thread runs each in a savepoint, with a serial and a changelog entry of its own,
# and commits them in groups. A change returns when it is on disk and every cache has dropped what
# it touched.
# ==================================================================================================


SCHEMA = """
-- one row: one fact about this server (uuid, epoch)
CREATE TABLE node (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

-- AUTOINCREMENT: no id is used twice, so an id that was read before a change can't name another row

-- one row: an account; `generation` changes with the password, and ends old session tokens
CREATE TABLE users (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE, pwhash TEXT, generation TEXT NOT NULL,
    created TEXT NOT NULL, modified TEXT, attributes TEXT NOT NULL);

-- one row: an index, a stage or a mirror; `config` is JSON, its values coerced
CREATE TABLE indexes (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
    name TEXT NOT NULL, config TEXT NOT NULL, UNIQUE (user_id, name));

-- one row: a project of an index; on a mirror, also upstream's last response and its time
CREATE TABLE projects (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    index_id INTEGER NOT NULL REFERENCES indexes ON DELETE CASCADE,
    name TEXT NOT NULL, fetched REAL, etag TEXT, upstream TEXT, upstream_serial INTEGER,
    status TEXT, versions TEXT, UNIQUE (index_id, name));

-- one row: a version of a project on a stage; `metadata` is JSON
CREATE TABLE releases (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    project_id INTEGER NOT NULL REFERENCES projects ON DELETE CASCADE,
    version TEXT NOT NULL, metadata TEXT NOT NULL, UNIQUE (project_id, version));

-- one row: a file of a release (stage), or of an upstream's page (mirror: release_id is NULL, and
-- so is sha256 until the file is fetched)
-- position: its place on the page; NULL if upstream no longer lists it
-- kind: releasefile, doczip (documentation), or toxresult (a test result of the file for_id)
-- if several projects of a mirror list a file, its path has a row for each of them
CREATE TABLE files (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    index_id INTEGER NOT NULL REFERENCES indexes ON DELETE CASCADE,
    project_id INTEGER NOT NULL REFERENCES projects ON DELETE CASCADE,
    release_id INTEGER REFERENCES releases ON DELETE CASCADE,
    position INTEGER, version TEXT NOT NULL, filename TEXT NOT NULL, path TEXT NOT NULL,
    hash_spec TEXT NOT NULL, sha256 TEXT, size INTEGER,
    uploaded TEXT NOT NULL, first_seen INTEGER NOT NULL DEFAULT 0,
    requires_python TEXT, yanked TEXT, core_metadata TEXT, metadata_sha256 TEXT, provenance TEXT,
    url TEXT, last_modified TEXT, history TEXT, kind TEXT NOT NULL DEFAULT 'releasefile',
    for_id INTEGER REFERENCES files ON DELETE CASCADE, UNIQUE (index_id, path, project_id));
CREATE INDEX files_of_project ON files (project_id, position, id);
CREATE INDEX files_of_release ON files (release_id);
CREATE INDEX files_of_blob ON files (sha256);
CREATE INDEX files_of_metadata ON files (metadata_sha256);

-- one row: a path user/index/+f/... that once was a file
CREATE TABLE gone (path TEXT PRIMARY KEY) WITHOUT ROWID;

-- one row: one committed change
-- ops: zlib(JSON list of {t, k, v}); hash: SHA-256(prev, serial as 8 bytes, ops)
CREATE TABLE changelog (
    serial INTEGER PRIMARY KEY, ts REAL NOT NULL, who TEXT,
    ops BLOB NOT NULL, prev BLOB NOT NULL, hash BLOB NOT NULL);
"""

SCHEMA_SINCE_2 = """
CREATE INDEX files_of_tested ON files (for_id) WHERE for_id IS NOT NULL;
CREATE INDEX files_named ON files (project_id, filename);
CREATE INDEX files_attached ON files (kind, project_id, sha256) WHERE kind != 'releasefile';

-- one row: the deflated metadata file of a wheel, by its SHA-256
-- it is small: in the file system it would cost two syncs
CREATE TABLE metadata_files (sha256 TEXT NOT NULL UNIQUE, packed BLOB NOT NULL);

-- one row: a documentation zip that can be shown, by its SHA-256
CREATE TABLE docs (id INTEGER PRIMARY KEY, sha256 TEXT NOT NULL UNIQUE);

-- one row: a member of a documentation zip, by its path
CREATE TABLE doc_members (
    doc_id INTEGER NOT NULL REFERENCES docs ON DELETE CASCADE, path TEXT NOT NULL,
    number INTEGER NOT NULL, start INTEGER NOT NULL, packed INTEGER NOT NULL,
    size INTEGER NOT NULL, deflated INTEGER NOT NULL,
    PRIMARY KEY (doc_id, path)) WITHOUT ROWID;

-- one row: a user's action or login attempt; the newest are kept
CREATE TABLE audit (
    id INTEGER PRIMARY KEY AUTOINCREMENT, ts REAL NOT NULL, who TEXT, address TEXT NOT NULL,
    action TEXT NOT NULL, index_path TEXT NOT NULL, target TEXT NOT NULL, detail TEXT NOT NULL,
    serial INTEGER);

-- one row: a message for an outside server, not delivered yet
-- dead: 1 if it was given up after the last try
CREATE TABLE outbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT, delivery TEXT NOT NULL, index_id INTEGER NOT NULL,
    target TEXT NOT NULL, kind TEXT NOT NULL,
    url TEXT NOT NULL, headers TEXT NOT NULL, body BLOB NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0, due REAL NOT NULL,
    dead INTEGER NOT NULL DEFAULT 0, error TEXT);
CREATE INDEX outbox_due ON outbox (dead, target, due);
CREATE INDEX outbox_of_index ON outbox (index_id);

-- one row: a stage's project that the search index has to read again
CREATE TABLE search_queue (
    index_id INTEGER NOT NULL, project TEXT NOT NULL, since REAL NOT NULL,
    PRIMARY KEY (index_id, project)) WITHOUT ROWID;
CREATE INDEX search_queue_order ON search_queue (since);
"""

SCHEMA_SINCE_3 = """
-- one row: the name of a deleted file of a stage, and its hash
-- kept: 1 if the index was not volatile then
CREATE TABLE withdrawn (
    index_path TEXT NOT NULL, kind TEXT NOT NULL, filename TEXT NOT NULL, sha256 TEXT NOT NULL,
    kept INTEGER NOT NULL, PRIMARY KEY (index_path, kind, filename)) WITHOUT ROWID;

-- one row: the attestations that a file was uploaded with (PEP 740), unchanged
CREATE TABLE attestations (
    file_id INTEGER PRIMARY KEY REFERENCES files ON DELETE CASCADE, content TEXT NOT NULL);

-- account: the owner of the message's index
ALTER TABLE outbox ADD COLUMN account INTEGER NOT NULL DEFAULT 0;
DROP INDEX outbox_due;
CREATE INDEX outbox_due ON outbox (dead, target, account, due);
"""

SCHEMA_SINCE_4 = """
CREATE UNIQUE INDEX files_of_stage ON files (index_id, path) WHERE release_id IS NOT NULL;
"""

SCHEMA_SINCE_5 = """
-- times: number of equal actions within a minute
ALTER TABLE audit ADD COLUMN times INTEGER NOT NULL DEFAULT 1;
CREATE INDEX audit_of_account ON audit (who);
"""

SCHEMA_SINCE_6 = """
-- one row: a piece of a release's README, which is JSON (UTF-8); `metadata` has "" in its place
CREATE TABLE readmes (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    release_id INTEGER NOT NULL REFERENCES releases ON DELETE CASCADE,
    piece BLOB NOT NULL);
CREATE INDEX readmes_of_release ON readmes (release_id);

-- readme_size: bytes of the README; 0 without one
ALTER TABLE releases ADD COLUMN readme_size INTEGER NOT NULL DEFAULT 0;
"""


def run_script(db, script):
    """Run SQL statements inside the open transaction; the end of a line ends each one."""
    for statement in script.split(";\n"):
        if statement.strip():
            db.execute(statement)


MIGRATIONS = {}     # schema version -> (SQL, function): the step to it


def migration(version, sql=""):
    """Decorator: registers the step to a schema version; `sql` is run for new databases.

    Old ones are migrated by `function(db, sql)`, which runs the SQL and changes existing rows."""
    def register(function):
        if version in MIGRATIONS:
            raise ValueError(f"there is a step to schema version {version} already")
        MIGRATIONS[version] = sql, function
        return function
    return register


def schema_version():
    """The schema version of databases that this program writes."""
    return max(MIGRATIONS)


@migration(2, SCHEMA_SINCE_2)
def _migrate_to_2(db, sql):
    db.execute("ALTER TABLE files ADD COLUMN kind TEXT NOT NULL DEFAULT 'releasefile'")
    db.execute("ALTER TABLE files ADD COLUMN for_id INTEGER REFERENCES files ON DELETE CASCADE")
    run_script(db, sql)
    db.execute("INSERT INTO search_queue SELECT index_id, name, ? FROM projects", (time.time(),))


@migration(3, SCHEMA_SINCE_3)
def _migrate_to_3(db, sql):
    run_script(db, sql)
    db.execute("UPDATE outbox SET account = "
               "coalesce((SELECT user_id FROM indexes WHERE indexes.id = index_id), 0)")


@migration(4, SCHEMA_SINCE_4)
def _migrate_to_4(db, sql):
    """Let a mirror's file have a row for each project that lists it.

    Makes a new table, because SQLite can't drop a constraint. Pages are fetched again: a project
    may lack a file that another one listed first. Metadata is read again from the wheels that are
    here: it may differ from what upstream announced."""
    made = "SELECT sql FROM sqlite_master WHERE type = ? AND tbl_name = 'files' AND sql IS NOT NULL"
    (table,), = db.execute(made, ("table",)).fetchall()
    indexes = [row[0] for row in db.execute(made, ("index",))]
    table = re.sub(r"UNIQUE \(index_id, path\)", "UNIQUE (index_id, path, project_id)", table)
    db.execute(re.sub(r'TABLE "?files"?(?!\w)', "TABLE files_new", table))
    columns = ", ".join(row["name"] for row in db.execute("PRAGMA table_info(files)"))
    db.execute(f"INSERT INTO files_new ({columns}) SELECT {columns} FROM files ORDER BY id")

    # ids of deleted files are not used again either
    db.execute("DELETE FROM sqlite_sequence WHERE name = 'files_new'")
    db.execute("INSERT INTO sqlite_sequence "
               "SELECT 'files_new', seq FROM sqlite_sequence WHERE name = 'files'")
    db.execute("DROP TABLE files")
    db.execute("ALTER TABLE files_new RENAME TO files")
    for index in indexes:
        db.execute(index)
    run_script(db, sql)

    db.execute("UPDATE projects SET etag = NULL WHERE fetched IS NOT NULL")
    db.execute("UPDATE files SET metadata_sha256 = NULL "
               "WHERE release_id IS NULL AND sha256 IS NOT NULL")


migration(5, SCHEMA_SINCE_5)(run_script)


@migration(6, SCHEMA_SINCE_6)
def _migrate_to_6(db, sql):
    """Store READMEs apart from the other metadata; drop fields that describe a single file, which
    older programs stored with the release."""
    run_script(db, sql)
    for release_id, in db.execute("SELECT id FROM releases ORDER BY id").fetchall():
        text, = db.execute("SELECT metadata FROM releases WHERE id = ?", (release_id,)).fetchone()
        metadata = json.loads(text)
        if isinstance(metadata.get("other"), dict):
            metadata["other"] = {field: values for field, values in metadata["other"].items()
                                 if field not in FORM_ONLY}
        put_metadata(db, release_id, metadata)


# Fields of an upload form that describe the upload or its file, not the release.
FORM_ONLY = {":action", "protocol_version", "filetype", "pyversion", "md5_digest", "sha256_digest",
             "blake2_256_digest", "gpg_signature", "content", "attestations"}


def put_metadata(db, release_id, metadata):
    """Write a release's metadata, with the README apart from the rest."""
    readme = readme_of(metadata)
    db.execute("UPDATE releases SET metadata = ?, readme_size = ? WHERE id = ?",
               (without_readme(metadata), len(readme), release_id))
    put_readme(db, release_id, readme)


def without_readme(metadata):
    """A release's metadata as JSON without the README, which most requests do not need."""
    return json.dumps({**metadata, "description": ""} if metadata.get("description") else metadata)


def readme_of(metadata):
    """The README in a release's metadata as JSON (bytes), or b""."""
    return json.dumps(metadata["description"]).encode() if metadata.get("description") else b""


def put_readme(db, release_id, readme):
    """Write a release's README in pieces: a large one is read no faster than a client takes it."""
    if _stored_readme(db, release_id) == readme:        # a request that reads it can go on
        return
    db.execute("DELETE FROM readmes WHERE release_id = ?", (release_id,))
    for start in range(0, len(readme), Limits.readme_piece):
        db.execute("INSERT INTO readmes (release_id, piece) VALUES (?, ?)",
                   (release_id, readme[start:start + Limits.readme_piece]))


def stored_metadata(db, row):
    """A release's metadata as given to `put_metadata`.

    `row` has the columns id, metadata and readme_size."""
    metadata = json.loads(row["metadata"])
    if row["readme_size"]:
        metadata["description"] = stored_readme(db, row["id"])
    return metadata


def stored_readme(db, release_id):
    """The README, a text, of a release whose readme_size is not 0."""
    return json.loads(_stored_readme(db, release_id))


def _stored_readme(db, release_id):
    return b"".join(piece for piece, in db.execute(
        "SELECT piece FROM readmes WHERE release_id = ? ORDER BY id", (release_id,)))


SCHEMA_SINCE_7 = """
-- one row: a path user/index/+f/... that once was a file of a mirror
CREATE TABLE gone_cached (path TEXT PRIMARY KEY) WITHOUT ROWID;
"""


@migration(7, SCHEMA_SINCE_7)
def _migrate_to_7(db, sql):
    """Start a new changelog, under a new epoch.

    Older programs did not record everything that people did, nor in one form. Followers start from
    the present rows."""
    run_script(db, sql)
    for user, name, config in db.execute("SELECT users.name, indexes.name, config FROM indexes "
                                         "JOIN users ON users.id = user_id").fetchall():
        if json.loads(config)["type"] == "mirror":
            place = f"{user}/{name}/"
            own = "FROM gone WHERE substr(path, 1, ?) = ?", (len(place), place)
            db.execute(f"INSERT INTO gone_cached SELECT path {own[0]}", own[1])
            db.execute(f"DELETE {own[0]}", own[1])
    last = db.execute("SELECT serial, hash FROM changelog ORDER BY serial DESC LIMIT 1").fetchone()
    if last:
        entry = new_entry(last["serial"] + 1, None, [], last["hash"])
        db.execute("DELETE FROM changelog")
        db.execute("INSERT INTO changelog VALUES (?, ?, ?, ?, ?, ?)", entry)
    db.execute("UPDATE node SET value = ? WHERE key = 'epoch'", (secrets.token_hex(16),))


class Entry(typing.NamedTuple):
    """An entry of the changelog: what one change wrote.

    `ops`: zlib(JSON [{"t": kind, "k": key, "v": value}, ...]), see `Change.put`; `prev`: the hash
    of the entry before, b"" for the first; `hash`: SHA-256(prev, serial as 8 bytes, ops)."""
    serial: int
    ts: float               # time.time()
    who: str | None
    ops: bytes
    prev: bytes
    hash: bytes

    @property
    def is_sound(self):
        return self.hash == entry_hash(self.prev, self.serial, self.ops)

    def ops_for_replay(self):
        """[(kind, key, value), ...]; FatalError for what this program can't put."""
        try:
            ops = [(str(op["t"]), tuple(op["k"]), op["v"])
                   for op in json.loads(zlib.decompress(self.ops))]
        except (zlib.error, ValueError, RecursionError, TypeError, KeyError) as error:
            raise FatalError(f"serial {self.serial} of the other changelog can't be read "
                             f"({reason_of(error)})") from None
        for kind, key, value in ops:
            if kind not in ROWS or not ROWS[kind].accepts(key, value):
                raise FatalError(f"serial {self.serial} of the other changelog has a row that this "
                                 f"program does not know, {one_line(repr((kind, *key)))}: was it "
                                 "written by a newer devpi_lite.py?")
        return ops


def entry_hash(prev, serial, ops):
    return hashlib.sha256(prev + struct.pack(">Q", serial) + ops).digest()


def new_entry(serial, who, ops, prev):
    """The `Entry`, made now, of a change that wrote `ops`, JSON texts."""
    packed = zlib.compress(f"[{','.join(ops)}]".encode(), 1)
    return Entry(serial, time.time(), who, packed, prev, entry_hash(prev, serial, packed))


def read_log(db, after=-1):
    """Yield the entries of the changelog after the serial `after`."""
    return map(Entry._make, db.execute("SELECT serial, ts, who, ops, prev, hash FROM changelog "
                                       "WHERE serial > ? ORDER BY serial", (after,)))


EVERYTHING = "everything"       # the tag of all values: another process may have changed anything
INDEXES = "indexes"             # the tag of every index's configuration


class Cache:
    """Values made from the database, kept until they expire or a commit touches one of their tags.

    Bounded in bytes; the oldest value is dropped first. `get` costs a dictionary look-up, and for
    a value that expires a look at the clock."""

    def __init__(self, limit):
        self.limit, self.size = limit, 0
        self.entries = {}       # key -> (value, expires or 0, size, tags)
        self.keys_of = {}       # tag -> set of keys

    def get(self, key):
        entry = self.entries.get(key)
        if entry is None or entry[1] and entry[1] < time.monotonic():
            return None
        return entry[0]

    def _put(self, key, value, size, tags, expires):
        self._remove(key)
        if size > self.limit // 4:
            return
        self.entries[key] = (value, expires, size, tags)
        self.size += size
        for tag in tags:
            self.keys_of.setdefault(tag, set()).add(key)
        while self.size > self.limit:
            self._remove(next(iter(self.entries)))

    def _remove(self, key):
        entry = self.entries.pop(key, None)
        if entry:
            self.size -= entry[2]
            for tag in entry[3]:
                keys = self.keys_of[tag]
                keys.discard(key)
                if not keys:
                    del self.keys_of[tag]

    def _drop(self, tags):
        if EVERYTHING in tags:
            # in place: the front's hot path refers to this dictionary
            self.entries.clear()
            self.keys_of.clear()
            self.size = 0
        for tag in tags:
            for key in tuple(self.keys_of.get(tag, ())):
                self._remove(key)


class Freshness:
    """Keeps caches true: drops values that a commit touched, refuses those made before it.

    A maker of a value notes `moment()` before it reads, and passes it to `keep`, which does not
    keep a value that a later commit may have changed."""

    def __init__(self):
        self.lock = threading.Lock()
        self.caches = []
        self.now = 0
        self.recent = collections.deque(maxlen=512)     # (moment, tags)

    def cache(self, limit):
        cache = Cache(limit)
        self.caches.append(cache)
        return cache

    def moment(self):
        return self.now

    def touch(self, tags):
        with self.lock:
            self.recent.append((self.now + 1, tags))
            for cache in self.caches:
                cache._drop(tags)
            # last, because it is read without the lock: at the new moment no old value is left
            self.now += 1

    def keep(self, cache, key, value, size, tags, since, expires=0):
        with self.lock:
            if since < self.now:
                if not self.recent or self.recent[0][0] > since + 1:
                    return
                for moment, touched in self.recent:
                    if moment > since and (EVERYTHING in touched or not touched.isdisjoint(tags)):
                        return
            cache._put(key, value, size, tags, expires)


class Actor(typing.NamedTuple):
    """The user behind a change, and its address.

    Links in messages about the change start with `outside_url` (--outside-url, or "") or with
    `own_url` (that, or the address listened on), never with what a Host header says."""
    user: str | None = None
    address: str = ""           # "" for the server itself, whose changes are not audited
    outside_url: str = ""
    own_url: str = ""


NO_ACTOR = Actor()


_compact_json = json.JSONEncoder(separators=(",", ":")).encode


class Change:
    """What a change function works with: SQL, and a record of its effects.

    `serial`: the serial that it gets if it puts rows. `is_replay`: it repeats entries of a
    changelog, and makes none."""

    def __init__(self, db, actor, serial):
        self.db, self.actor, self.who, self.serial = db, actor, actor.user, serial
        self.execute, self.executemany = db.execute, db.executemany
        self.ops, self.audits, self.tags, self.signals, self.looked_at = [], [], set(), set(), set()
        self.head = None        # (serial, hash) of the changelog entry that it makes
        self.is_replay = False
        self.ids = {}           # (kind, key) -> id of a row

    def put(self, kind, key, value):
        """Write a whole row of people's data, or with None delete it with all that belongs to it.

        `kind`: one of `ROWS`; `key`: the names that lead to the row, a tuple; `value`: see the
        class registered for the kind. Returns the row's id, if it has one.

        Such rows are written in no other way: the changelog, the caches and the search index
        follow by themselves."""
        rows, key = ROWS[kind], tuple(key)
        if not self.is_replay:
            rows.before(self, key, value)
            if value is None:
                self._delete_children(kind, key)
        row_id = rows.write(self, key, value)
        self.know_id(kind, key, row_id)
        self._log([(kind, key, value)])
        return row_id

    def _delete_children(self, kind, key):
        row_id = self.id_of(kind, key)
        for child in reversed(list(ROWS.values())):
            if child.parent == kind and row_id is not None:
                child.delete_of(self, key, row_id)

    def delete_many(self, kind, keys):
        """Delete rows of one kind, to which no others belong: thousands take a fifth of the time of
        as many calls of `put`."""
        ROWS[kind].delete_many(self, keys)
        self._log((kind, key, None) for key in keys)

    def insert_many(self, kind, rows):
        """Insert or replace rows of a kind without ids, [(key, value), ...]; as fast."""
        ROWS[kind].insert_many(self, rows)
        self._log((kind, key, value) for key, value in rows)

    def _log(self, rows):
        if not self.is_replay:      # as a text, a row takes a fifth of the memory
            self.ops += [_compact_json({"t": kind, "k": key, "v": value})
                         for kind, key, value in rows]

    def get(self, kind, key):
        """The value of a row as `put` takes it, or None."""
        return ROWS[kind].get(self, key)

    def id_of(self, kind, key):
        """The id of a row, or None."""
        if (kind, key) not in self.ids:
            self.know_id(kind, key, ROWS[kind].find(self, key))
        return self.ids[kind, key]

    def know_id(self, kind, key, row_id):
        """Spare `id_of` a look-up."""
        self.ids[kind, key] = row_id

    def touch(self, *tags):
        """Name tags whose values the caches must drop: `EVERYTHING`, `INDEXES`, and those of
        `user_tag`, `index_tag`, `project_tag`, `names_tag`."""
        self.tags.update(tags)

    def wake(self, name):
        """Set a signal of the store after the commit."""
        self.signals.add(name)

    def happened(self, event):
        """Pass an `Event`, which this change makes happen, to all `FOLLOWERS`."""
        if event.name not in EVENTS:
            raise ValueError(f"the event {event.name} is not declared")
        for follow in FOLLOWERS:
            follow(self, event)

    def queue_for_search(self, index_id, project):
        """Queue a project for the search index; (0, "") for all deleted projects."""
        if (index_id, project) in self.looked_at:
            return

        self.looked_at.add((index_id, project))
        self.execute("INSERT OR REPLACE INTO search_queue VALUES (?, ?, ?)",
                     (index_id, project, time.time()))
        self.wake("search")


# Name of an `Event` -> its name for webhooks, or None.
EVENTS = {
    "user.create": None, "user.modify": None, "user.delete": None, "login.failed": None,
    "index.create": None, "index.modify": None, "index.delete": None, "refused": None,
    "register": None, "upload": "upload", "replaced": None, "docs": "docs",
    "toxresult": "toxresult", "yank": None, "unyank": None, "project.status": None,
    "push": "push", "push.external": None, "outbox.retry": None,
    "delete.file": "delete", "delete.version": "delete", "delete.project": "delete"}


def event_kind(name, webhook=None):
    """Add an event to `EVENTS`, from whatever chapter announces it."""
    if name in EVENTS:
        raise ValueError(f"there is an event {name} already")
    EVENTS[name] = webhook


def webhook_events():
    """The events that a webhook may want, in the order of their declaration."""
    return tuple(dict.fromkeys(filter(None, EVENTS.values())))


FOLLOWERS = []      # functions of a change and an `Event`


def on_event(function):
    """Decorator: has `function(change, event)` called for each `Event`, inside its change."""
    FOLLOWERS.append(function)
    return function


@dataclasses.dataclass(frozen=True)
class Event:
    """An action and its objects, as far as there are any."""
    name: str                       # one of `EVENTS`
    index: typing.Any = None        # an Index, or None
    project: str = ""               # normalised
    version: str | None = None
    file: typing.Any = None         # a File, or None
    target: str = ""                # the object, if it is none of those
    detail: str = ""
    source: str | None = None       # the path of the index that a push copies from

    @property
    def subject(self):
        """The name of the object."""
        if self.file:
            return self.file.filename
        return f"{self.project}=={self.version}" if self.version else self.project or self.target


class RowKind:
    """How rows of one kind of people's data are read and written, so that the changelog has them.

    A subclass is registered with `@row`, in the chapter that knows what the rows mean. A row's key
    is the names that lead to it. Its value is a JSON object, with the same keys in all rows of the
    kind, and without ids, which differ between servers.

    Rows that a mirror caches are in the same tables, but are written by the chapter on mirrors:
    they can be fetched again."""
    kind = ""               # set by `row`
    table = ""              # with an id, and the key's last name in the column `name`
    name = "name"
    parent = ""             # the kind of the row that a row belongs to: its key lacks the last name
    refers = ""             # the column with the parent's id
    key = ()                # the columns of the key in `source`
    facts = ()              # the columns that `value` takes
    source = ""             # the tables that have them all
    order = ""              # the columns that sort rows by their creation

    fields = ()             # the keys of a value

    def accepts(self, key, value):
        """Whether a row of another server has the form of this kind."""
        return len(key) == len(self.key) and all(isinstance(name, str) for name in key) and (
            value is None or isinstance(value, dict) and value.keys() == set(self.fields))

    def scope(self, db):
        """The SQL condition of rows that are people's data."""
        return "1"

    def all(self, db):
        """Yield (key, value) of all rows, the oldest first."""
        for row in db.execute(f"SELECT {', '.join(self.key + self.facts)} FROM {self.source} "
                              f"WHERE {self.scope(db)} ORDER BY {self.order}"):
            yield tuple(row)[:len(self.key)], self.value(db, row)

    def get(self, change, key):
        """The value of the row under a key, or None."""
        row_id = change.id_of(self.kind, key)
        if row_id is None:
            return None
        row = change.execute(f"SELECT {', '.join(self.facts)} FROM {self.source} "
                             f"WHERE {self.table}.id = ?", (row_id,)).fetchone()
        return self.value(change.db, row)

    def value(self, db, row):
        """The value of a row that has the `facts`."""
        return {name: row[name] for name in self.fields}

    def find(self, change, key):
        """The id of the row under a key, or None."""
        condition, names = f"{self.name} = ?", key[-1:]
        if self.parent:
            condition, names = f"{condition} AND {self.refers} = ?", (
                key[-1], change.id_of(self.parent, key[:-1]))

        row = change.execute(f"SELECT id FROM {self.table} WHERE {condition}", names).fetchone()
        return row["id"] if row else None

    def before(self, change, key, value):
        """Put the rows that must be put before this one."""

    def delete_of(self, change, parent, parent_id):
        """Delete the rows that belong to a parent, which is about to be deleted."""
        rows = change.execute(f"SELECT id, {self.name} AS name FROM {self.table} "
                              f"WHERE {self.refers} = ? ORDER BY id", (parent_id,)).fetchall()
        keys = [(*parent, row["name"]) for row in rows]
        for key, row in zip(keys, rows):
            change.know_id(self.kind, key, row["id"])
        if any(other.parent == self.kind for other in ROWS.values()):
            for key in keys:
                change.put(self.kind, key, None)
        else:
            change.delete_many(self.kind, keys)

    def delete_many(self, change, keys):
        """Delete rows to which no others belong."""
        change.executemany(f"DELETE FROM {self.table} WHERE id = ?",
                           [(change.id_of(self.kind, key),) for key in keys])
        for key in keys:
            self.wrote(change, key, None, change.id_of(self.kind, key), False)
            change.know_id(self.kind, key, None)

    def columns(self, change, key, value):
        """{column: what it holds for this value}, without the name and the parent."""
        return value

    def write(self, change, key, value):
        """Insert, update or delete a row; return its id."""
        row_id = change.id_of(self.kind, key)
        is_new = row_id is None
        if value is None:
            change.execute(f"DELETE FROM {self.table} WHERE id = ?", (row_id,))
        elif is_new:
            row_id = self._insert(change, key, value)
            change.know_id(self.kind, key, row_id)
        else:
            columns = self.columns(change, key, value)
            change.execute(f"UPDATE {self.table} SET ({', '.join(columns)}) = ({marks(columns)}) "
                           "WHERE id = ?", (*columns.values(), row_id))
        self.wrote(change, key, value, row_id, is_new)
        return None if value is None else row_id

    def _insert(self, change, key, value):
        columns = {self.name: key[-1], **self.columns(change, key, value)}
        if self.parent:
            columns[self.refers] = change.id_of(self.parent, key[:-1])
            if columns[self.refers] is None:
                raise NoParent(f"there is no {self.parent} {'/'.join(key[:-1])} "
                               f"for the {self.kind} {key[-1]}")
        return change.execute(
            f"INSERT INTO {self.table} ({', '.join(columns)}) VALUES ({marks(columns)})",
            tuple(columns.values())).lastrowid

    def wrote(self, change, key, value, row_id, is_new):
        """Update what depends on a row that was written; `value` None: deleted."""


class NoParent(FatalError):
    """The row that a row belongs to does not exist."""


class NamedRows(RowKind):
    """Rows without an id, identified by the columns of their key."""

    def find(self, change, key):
        return None

    def get(self, change, key):
        condition = " AND ".join(f"{column} = ?" for column in self.key)
        row = change.execute(f"SELECT {', '.join(self.key + self.facts)} FROM {self.source} "
                             f"WHERE {condition}", key).fetchone()
        return self.value(change.db, row) if row else None

    def write(self, change, key, value):
        if value is None:
            condition = " AND ".join(f"{column} = ?" for column in self.key)
            change.execute(f"DELETE FROM {self.table} WHERE {condition}", key)
            return
        self.insert_many(change, [(key, value)])

    def insert_many(self, change, rows):
        """Insert or replace rows, [(key, value), ...]."""
        rows = [{**dict(zip(self.key, key)), **self.columns(change, key, value)}
                for key, value in rows]
        for columns in rows[:1]:
            change.executemany(
                f"INSERT OR REPLACE INTO {self.table} ({', '.join(columns)}) "
                f"VALUES ({marks(columns)})", [tuple(columns.values()) for columns in rows])


ROWS = {}       # kind -> its `RowKind`; a kind stands after the kinds that its rows belong to


def row(kind):
    """Decorator: registers a class as the `RowKind` of a kind."""
    def register(class_):
        if kind in ROWS:
            raise ValueError(f"the kind {kind} is registered already")
        class_.kind = kind
        ROWS[kind] = class_()
        return class_
    return register


def all_rows(db):
    """Yield (kind, key, value) of all of people's data: put in this order, they make the same."""
    for kind, rows in ROWS.items():
        for key, value in rows.all(db):
            yield kind, key, value


def project_tag(index_id, project):
    """Touched when the page of a project of an index changes."""
    return (index_id, project)


def user_tag(name):
    """Touched when an account changes."""
    return ("user", name)


def index_tag(path):
    """Touched when the index at this path is made, configured or deleted.

    A value that depends on an index also depends on its bases, even on missing ones:
    `Indexes.reach`."""
    return ("index", path)


def names_tag(index_id):
    """Touched when an index gains or loses a project."""
    return ("names", index_id)


class Store(Part):
    """The database of a server directory: `read()` gives a connection, `write()` runs a change.

    `read_only`: the directory is on read-only media; the store makes no file there."""

    def __init__(self, settings, create=False):
        self.path = os.path.join(settings.serverdir, "devpi_lite.db")
        self.read_only = settings.read_only
        if not create and not os.path.exists(self.path):
            raise FatalError(f"no devpi_lite database in {settings.serverdir}")

        self.freshness = Freshness()
        self.tasks = FairQueue()        # of changes, by their party
        self.task_came = threading.Condition()
        self.idle_readers = []
        self.closed = False
        self.durable = True         # how the writer commits at present
        self.audit_log = AuditLog(settings.audit_rows)
        self.keep_log = settings.keep_log
        # set when there is work
        self.signals = collections.defaultdict(threading.Event)     # by name: see `Change.wake`

        self.writer = self._connect()
        self._upgrade(create)
        self.commits = CommitCounter(
            None if self.read_only else os.path.join(settings.serverdir, ".commits"))
        self.serial = self._last_serial(self.writer)
        self.log_size = self._log_size(self.writer)

        self.thread = threading.Thread(target=self._write_loop, name="writer", daemon=True)
        if not self.read_only:
            self.thread.start()
        self.node = self._node_facts()

    def gauges(self):
        yield Gauge("devpi_lite_serial", "gauge", "Serial of the last change.", self.serial)
        yield Gauge("devpi_lite_database_bytes", "gauge", "Size of the database.",
                    os.path.getsize(self.path))

    def tidy(self):
        self.cut_log()

    def _node_facts(self):
        with self.read() as db:
            return dict(map(tuple, db.execute("SELECT key, value FROM node")))

    def _connect(self, read_only=False):
        if self.read_only:
            refuse_unfolded(self.path)
        place = read_only_uri(self.path, immutable=True) if self.read_only else self.path
        db = sqlite3.connect(place, timeout=Limits.busy, isolation_level=None, uri=self.read_only,
                             check_same_thread=False, cached_statements=200)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA foreign_keys = ON")
        if read_only or self.read_only:
            db.execute("PRAGMA query_only = ON")
        else:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute(f"PRAGMA journal_size_limit = {Limits.write_ahead_log}")
        return db

    def _upgrade(self, create):
        """Make the schema, or migrate an older one step by step, after a copy was put aside.

        Each step is a transaction of its own."""
        db = self.writer
        version = db.execute("PRAGMA user_version").fetchone()[0]
        newest = schema_version()
        if version > newest:
            raise FatalError(
                f"{self.path} has schema version {version}; this program knows versions up to "
                f"{newest}: use a newer devpi_lite.py")

        if version == 0:
            db.execute("BEGIN IMMEDIATE")
            for script in (SCHEMA, *(MIGRATIONS[step][0] for step in sorted(MIGRATIONS))):
                run_script(db, script)
            for key in ("uuid", "epoch"):
                db.execute("INSERT INTO node VALUES (?, ?)", (key, secrets.token_hex(16)))
            db.execute(f"PRAGMA user_version = {newest}")
            db.execute("COMMIT")
        elif version < newest and self.read_only:
            raise FatalError(f"{self.path} was made by an older devpi_lite.py: start the server "
                             "once on a copy that can be written to, it brings it up")
        elif version < newest and not create:
            raise FatalError(f"{self.path} was made by an older devpi_lite.py: "
                             "start the server once, it brings it up")
        elif version < newest:
            aside = f"{self.path}.bak-{version}"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside + ".tmp")
            with contextlib.closing(sqlite3.connect(aside + ".tmp")) as copy_:
                db.backup(copy_)
            os.replace(aside + ".tmp", aside)

            # a step may replace a table: rows that refer to the old one must not be deleted with it
            db.execute("PRAGMA foreign_keys = OFF")
            for step in range(version + 1, newest + 1):
                sql, migrate = MIGRATIONS[step]
                db.execute("BEGIN IMMEDIATE")
                migrate(db, sql)
                db.execute(f"PRAGMA user_version = {step}")
                db.execute("COMMIT")
            db.execute("PRAGMA foreign_keys = ON")

    @staticmethod
    def _log_size(db):
        """Bytes of the changelog's entries."""
        return db.execute("SELECT coalesce(sum(length(ops)), 0) FROM changelog").fetchone()[0]

    @staticmethod
    def _last_serial(db):
        return db.execute("SELECT coalesce(max(serial), -1) FROM changelog").fetchone()[0]

    @contextlib.contextmanager
    def read(self):
        """A connection that sees one committed state for the length of the `with`."""
        try:
            db = self.idle_readers.pop()
        except IndexError:
            db = self._connect(read_only=True)
        try:
            db.execute("BEGIN")
            yield db
        finally:
            db.execute("COMMIT")
            if self.closed or len(self.idle_readers) >= 64:
                db.close()
            else:
                self.idle_readers.append(db)

    def write(self, function, *args, actor=NO_ACTOR, durable=True, party=None):
        """Run `function(change, *args)` as one change; return its value once it is on disk.

        If not `durable`, once it is committed: a power cut may undo it. What a mirror caches can
        be fetched again.

        An exception of the function is raised here, and its change undone. Raises `Busy` if
        another process holds the database. On read-only media raises `ReadOnly`, or does nothing
        if not `durable`. Changes of one `party`, by default the actor, wait for each other, not
        for those of others."""
        if self.read_only:
            if durable:
                raise ReadOnly()
            return None

        task = WriteTask(function, args, actor, durable)
        party = party or actor.user or actor.address
        with self.task_came:
            if self.closed:
                raise Busy("the server is shutting down, try again", 5)
            self.tasks.put(task, (party, None))
            self.task_came.notify()

        with disk_wait():
            task.done.acquire()

        if task.error is not None:
            raise task.error
        return task.value

    def _write_loop(self):
        while True:
            with self.task_came:
                self.task_came.wait_for(lambda: self.tasks or self.closed)
                task = self.tasks.get()
            if task is None:
                return
            group = [task]
            try:
                self._commit(group)
            except Exception as error:
                self._give_up(group, error)
            for task in group:
                task.done.release()

    def _take_task(self, is_wanted=None):
        with self.task_came:
            return self.tasks.get(is_wanted)

    def _next_tasks(self, group):
        """Yield the task in `group`, then waiting ones, and add these to it.

        Ends after 64 tasks or `Limits.group_time`, because all later tasks wait for this commit. A
        commit that need not be durable takes no task that must be."""
        until = time.monotonic() + Limits.group_time
        yield group[0]
        while len(group) < 64 and time.monotonic() < until:
            task = self._take_task(lambda task: task.durable <= group[0].durable)
            if task is None:
                return
            group.append(task)
            yield task

    def _begin(self, group):
        """Begin a transaction. If another process holds the database for too long, all waiting
        tasks fail together, not one after the other."""
        try:
            self.writer.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            group.extend(iter(self._take_task, None))
            raise

    def _commit(self, group):
        """Run changes, each in a savepoint of its own, commit once, then notify the caches.

        `group` holds the first task; waiting ones are added to it."""
        db = self.writer
        durable = group[0].durable
        if durable != self.durable:
            db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self.durable = durable
        self._begin(group)
        serial, chain = self.head(db)
        self.serial = serial
        tags, signals = set(), set()

        for task in self._next_tasks(group):
            change = Change(db, task.actor, serial + 1)
            db.execute("SAVEPOINT change")
            try:
                task.value = task.function(change, *task.args)
                if change.ops:
                    self._enter(change, new_entry(change.serial, change.who, change.ops, chain))
                if change.audits:
                    self.audit_log.enter(change, change.serial if change.ops else None)
            except sqlite3.OperationalError:
                raise       # the disk failed, not the change: so does the whole group
            except Exception as error:
                task.error = error
                db.execute("ROLLBACK TO change")
            else:
                if change.head:
                    serial, chain = change.head
                tags |= change.tags
                signals |= change.signals
            db.execute("RELEASE change")

        if self.log_size > self.keep_log.size and self.commits.is_server:
            self._cut_log(db)

        db.execute("COMMIT")
        self.serial = serial

        if tags:
            self.freshness.touch(frozenset(tags))
        for name in signals:
            self.signals[name].set()
        if not self.commits.is_server:
            self.commits.raise_counter()

    @staticmethod
    def head(db):
        """(serial, hash) of the newest entry of the changelog; (-1, b"") if there is none."""
        return db.execute("SELECT serial, hash FROM changelog ORDER BY serial DESC LIMIT 1"
                          ).fetchone() or (-1, b"")

    def _enter(self, change, entry):
        """Append an entry to the changelog, as part of the change."""
        change.execute("INSERT INTO changelog VALUES (?, ?, ?, ?, ?, ?)", entry)
        change.head = entry.serial, entry.hash
        self.log_size += len(entry.ops)

    def cut_log(self):
        """Delete entries of the changelog that are older than `keep_log.age`."""
        with self.read() as db:
            oldest = db.execute("SELECT ts FROM changelog ORDER BY serial LIMIT 1").fetchone()
        if oldest and oldest["ts"] < time.time() - self.keep_log.age:
            self.write(lambda change: self._cut_log(change.db))

    def _cut_log(self, db):
        """Delete old entries of the changelog, and the older half of it if it is too large.

        So a large row that is often written can't fill the disk. The newest entry stays: the next
        one is chained to it."""
        is_large, left = self._log_size(db) > self.keep_log.size, self.keep_log.size // 2
        oldest, first = time.time() - self.keep_log.age, None
        for serial, ts, size in db.execute("SELECT serial, ts, length(ops) FROM changelog "
                                           "ORDER BY serial DESC"):
            left -= size
            if first is not None and (ts < oldest or is_large and left < 0):
                break
            first = serial

        db.execute("DELETE FROM changelog WHERE serial < ?", (first,))
        self.log_size = self._log_size(db)

    def restart_log(self, change):
        """Begin the changelog anew, in a change whose rows it does not have: whoever follows it
        must start from the present rows.

        Two empty entries, of which the first is deleted again: a follower that has the entry before
        sees that one is missing."""
        serial, chain = self.head(change.db)
        for _ in range(2):
            serial += 1
            self._enter(change, new_entry(serial, change.who, [], chain))
            _, chain = change.head
        change.execute("DELETE FROM changelog WHERE serial < ?", (serial,))

    def follow(self, entries, uuid_):
        """Enter the next entries of another server's changelog, with the rows that they put; all or
        nothing.  FatalError if they do not come next here, or can't be read.

        `uuid_`: that server's."""
        self.write(self._follow, entries, uuid_)

    def _follow(self, change, entries, uuid_):
        change.is_replay = True
        serial, chain = self.head(change.db)
        for entry in entries:
            if (entry.serial, entry.prev) != (serial + 1, chain) or not entry.is_sound:
                raise FatalError(f"serial {entry.serial} of the other changelog does not follow "
                                 f"serial {serial} of this one")
            for op in entry.ops_for_replay():
                try:
                    change.put(*op)
                except (FatalError, sqlite3.IntegrityError, sqlite3.InterfaceError, zlib.error,
                        ValueError, TypeError, LookupError, AttributeError) as error:
                    raise FatalError(f"serial {entry.serial} of the other changelog can't be put: "
                                     f"{reason_of(error)}") from None
            self._enter(change, entry)
            serial, chain = change.head
        if change.head:
            self._note_source(change, uuid_)

    def start_from(self, rows, entry, uuid_):
        """Replace all of people's data by another server's.

        `rows`: as its `all_rows` yields them after the entry `entry` of its changelog; `uuid_`:
        that server's."""
        self.write(self._start_from, rows, entry, uuid_)

    def _start_from(self, change, rows, entry, uuid_):
        if not entry.is_sound:
            raise FatalError(f"serial {entry.serial} of the other changelog is damaged")
        change.is_replay = True
        for kind in reversed(list(ROWS.values())):
            change.execute(f"DELETE FROM {kind.table}")
        change.touch(EVERYTHING)
        change.queue_for_search(0, "")
        for kind, key, value in rows:
            change.put(kind, key, value)

        change.execute("DELETE FROM changelog")
        self._enter(change, entry)
        self._note_source(change, uuid_)

    @staticmethod
    def _note_source(change, uuid_):
        """Remember whom this directory follows, and up to where."""
        _, chain = change.head
        for key, value in (("source_uuid", uuid_), ("source_hash", chain.hex())):
            change.execute("INSERT OR REPLACE INTO node VALUES (?, ?)", (key, value))

    def follows(self, uuid_):
        """Whether all that is here came from this server: it may be replaced by newer rows."""
        with self.read() as db:
            facts = dict(map(tuple, db.execute("SELECT key, value FROM node")))
            serial, chain = self.head(db)
        return serial < 0 or (facts.get("source_uuid"), facts.get("source_hash")) == (
            uuid_, chain.hex())

    def _give_up(self, group, error):
        """Undo the whole group, as its commit failed, and tell each caller why."""
        try:
            if self.writer.in_transaction:
                self.writer.execute("ROLLBACK")
            self.log_size = self._log_size(self.writer)
        except sqlite3.Error as second:
            log.error("rollback failed: %s", second)

        text = str(error)
        if "locked" in text or "busy" in text:
            error = Busy("the database is held by another process, try again", 5)
        elif "full" in text or "disk I/O" in text:
            error = NoSpace(f"nothing was stored: {text}")
        log.error("commit failed: %s", text)

        for task in group:
            task.error = copy.copy(error)       # each copy is raised in another thread

    def refresh_serial(self):
        """Drop all cached values: another process has committed."""
        with self.read() as db:
            self.serial = max(self.serial, self._last_serial(db))
        self.freshness.touch(frozenset((EVERYTHING,)))

    def close(self):
        """Finish waiting changes, checkpoint the write-ahead log, close the database."""
        with self.task_came:
            if self.closed:
                return
            self.closed = True
            self.task_came.notify()

        if not self.read_only:
            self.thread.join(Limits.shutdown)
            if self.thread.is_alive():
                log.error("changes are still waiting for the database; they are given up")
                return

        while self.idle_readers:
            self.idle_readers.pop().close()
        try:
            if not self.read_only:
                self.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as error:      # nothing is lost: the next start reads the log
            log.warning("the write-ahead log was not folded in: %s", error)
        self.writer.close()
        self.commits.close()


@on_event
def enter_for_audit(change, event):
    """Record in the audit log what people do, not what the server does by itself."""
    if change.actor.address:
        change.audits.append((time.time(), change.who, change.actor.address, event.name,
                              event.index.path if event.index else "", event.subject,
                              event.detail))


class AuditLog:
    """Who did what, in at most `rows` rows.

    An action that is repeated within `Limits.audit_repeat`, with no other action on the index or
    user between, is counted in the same row. Beyond `rows`, the oldest rows of the account with
    most rows are deleted: nobody can push out other people's. Anonymous actions count for their
    address."""

    def __init__(self, rows):
        self.rows = rows
        self.total = None       # number of rows; None: not counted yet
        # index or user -> (its last action, the id of that row, its time)
        self.recent = collections.OrderedDict()

    def enter(self, change, serial):
        """Record what a change did, as part of it."""
        if self.total is None:
            self.total = change.execute("SELECT count(*) FROM audit").fetchone()[0]
        for ts, *what in change.audits:
            if not self._count_again(change, ts, tuple(what)):
                row = change.execute(
                    "INSERT INTO audit "
                    "(ts, who, address, action, index_path, target, detail, serial) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (ts, *what, serial))
                self._remember(tuple(what), row.lastrowid, ts)
                self.total += 1
        if self.total > self.rows:
            self._cut(change)

    def _count_again(self, change, ts, what):
        last, row_id, since = self.recent.get(self._object(what), (None, None, 0))
        if last != what or not since <= ts < since + Limits.audit_repeat:
            return False
        # a row of a change that was undone may have left its id to another row
        counted = change.execute(
            "UPDATE audit SET times = times + 1 WHERE id = ? "
            "AND (who, address, action, index_path, target, detail) "
            "IS (?, ?, ?, ?, ?, ?)", (row_id, *what))
        return counted.rowcount == 1

    @staticmethod
    def _object(what):
        _, _, _, index_path, target, _ = what
        return index_path or target

    def _remember(self, what, row_id, ts):
        self.recent[self._object(what)] = (what, row_id, ts)
        self.recent.move_to_end(self._object(what))
        while len(self.recent) > Limits.audit_repeats:
            self.recent.popitem(last=False)

    def _cut(self, change):
        """Delete the excess, and 1% more, so that not every new row needs this."""
        counts = collections.Counter(dict(change.execute(       # no name begins with a blank
            "SELECT coalesce(who, ' ' || address), count(*) FROM audit GROUP BY 1").fetchall()))
        self.total = sum(counts.values())
        left = self.total - self.rows + self.rows // 100 if self.total > self.rows else 0
        self.total -= left

        while left > 0:
            (account, most), *others = counts.most_common(2)
            count = min(left, max(1, most - (others[0][1] if others else 0)))
            condition = ("who IS NULL AND address = ?", account[1:]) \
                if account.startswith(" ") else ("who = ?", account)
            change.execute(
                f"DELETE FROM audit WHERE id IN "
                f"(SELECT id FROM audit WHERE {condition[0]} ORDER BY id LIMIT ?)",
                (condition[1], count))
            counts[account] -= count
            left -= count


def marks(values):
    """Placeholders for values in SQL."""
    return ", ".join("?" * len(values))


class WriteTask:
    """A change on its way to the writer thread; `done` is released when it has ended."""
    __slots__ = ("function", "args", "actor", "durable", "done", "value", "error")

    def __init__(self, function, args, actor, durable):
        self.function, self.args, self.actor, self.durable = function, args, actor, durable
        self.done = threading.Lock()    # wakes its waiter three times faster than an Event
        self.done.acquire()
        self.value = self.error = None


class CommitCounter:
    """A number in a small mapped file; a process that is not the server raises it by each commit.

    The server compares it with the number it saw last, which costs a memory read; SQLite's
    `data_version` would cost 7 us a request. Without a path the number never changes."""

    def __init__(self, path):
        self.file = open(path, "a+b") if path else None
        if self.file and os.fstat(self.file.fileno()).st_size < 8:
            self.file.write(bytes(8))
            self.file.flush()
        self.map = mmap.mmap(self.file.fileno() if self.file else -1, 8)
        self.numbers = memoryview(self.map).cast("Q")
        self.is_server = False
        self.seen = self.numbers[0]

    def changed(self):
        """Whether another process has committed since the last call that returned True."""
        if self.numbers[0] == self.seen:
            return False
        self.seen = self.numbers[0]
        return True

    def raise_counter(self):
        with locked(self.file):
            self.numbers[0] += 1

    def close(self):
        self.numbers.release()
        self.map.close()
        if self.file:
            self.file.close()


def read_only_uri(path, immutable=False):
    """The URI with which SQLite opens a database for reading only.

    `immutable`: nobody can change it, so SQLite neither locks it nor makes files beside it."""
    return f"file:{urllib.request.pathname2url(path)}?mode=ro{'&immutable=1' if immutable else ''}"


def refuse_unfolded(path):
    """FatalError if a database on read-only media has changes in its write-ahead log."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.getsize(path + "-wal"):
            raise FatalError(f"{path} was not closed before it was copied to read-only media: its "
                             f"newest changes are in {os.path.basename(path)}-wal.  Stop the "
                             "server and copy its directory again")


@contextlib.contextmanager
def locked(file):
    """Hold the operating system's exclusive lock on an open file, after waiting for it."""
    lock_file(file, wait=True)
    try:
        yield
    finally:
        unlock_file(file)


try:
    import fcntl

    def lock_file(file, wait=False, shared=False):
        """Take a lock until the process ends; OSError if it is taken and not `wait`.

        It is exclusive unless `shared`."""
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(file.fileno(), kind | (0 if wait else fcntl.LOCK_NB))

    def unlock_file(file):
        fcntl.flock(file.fileno(), fcntl.LOCK_UN)
except ImportError:     # Windows
    import msvcrt

    def lock_file(file, wait=False, shared=False):
        """Take a lock until the process ends; OSError if it is taken and not `wait`.

        It is exclusive, here also if `shared`."""
        file.seek(1 << 30)      # a byte far past the content, which stays readable
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)

    def unlock_file(file):
        file.seek(1 << 30)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)


# ==================================================================================================
# 5  Blobs
#
# The bytes of files, named by their SHA-256, once each. The one place that puts a file on disk:
# written in `tmp/`, synced, renamed into `files/`, directory synced; only then may a commit name
# it.
# ==================================================================================================


class Blobs(Part):
    """The files of a server directory, named by their SHA-256; `read_only` as in `Store`."""

    def __init__(self, serverdir, read_only=False):
        self.serverdir, self.read_only = serverdir, read_only
        self.files = os.path.join(serverdir, "files")
        self.tmp = tempfile.gettempdir() if read_only else os.path.join(serverdir, "tmp")
        self.trash = os.path.join(serverdir, "trash")
        self.trashed = (0, 0)               # files in the trash and their bytes, at the last sweep
        self.swept_much = 0                 # files that the last large sweep moved: see `sweep`
        self.numbers = itertools.count()    # for names in tmp, which only one process uses
        self.lock = threading.Lock()        # between claiming a blob and collecting it
        if read_only:
            return

        os.makedirs(self.tmp, mode=0o700, exist_ok=True)
        if not os.path.isdir(os.path.join(self.files, "ff")):
            for number in range(256):       # all now, so that `keep` syncs one directory, not two
                os.makedirs(os.path.join(self.files, "%02x" % number), mode=0o700, exist_ok=True)
            sync_directory(self.files)

    def recover(self):
        lessees = self.lessees()
        for name in os.listdir(self.tmp):
            if name.partition("-")[0] not in lessees:
                path = os.path.join(self.tmp, name)
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)

    @contextlib.contextmanager
    def lease(self):
        """For a command that copies blobs: while the `with` lasts, no process moves or deletes
        blobs of this directory, and a server that starts leaves alone what this process has in
        `tmp/` under names that begin with its process id and a dash."""
        folder = os.path.join(self.serverdir, "tmp")
        path = os.path.join(folder, f"{os.getpid()}-{next(self.numbers)}.lease")
        try:
            file = made_in(folder, lambda: open(path, "xb"))
        except OSError as error:        # then nobody can move or delete anything either
            log.debug("no lease of %s: %s", self.serverdir, reason_of(error))
            yield
            return
        try:
            with locked(file):
                yield
        finally:
            file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def lessees(self):
        """The process ids, as texts, of the commands that hold a `lease`. A killed one holds
        none."""
        folder, found = os.path.join(self.serverdir, "tmp"), set()
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            match = re.fullmatch(r"([0-9]+)-[0-9]+\.lease", name)
            if match:
                try:
                    with open(os.path.join(folder, name), "r+b") as file:
                        lock_file(file)
                except FileNotFoundError:
                    pass
                except OSError:
                    found.add(match[1])
        return found

    def gauges(self):
        yield Gauge("devpi_lite_disk_free_bytes", "gauge", "Of the disk with the server directory.",
                    self._free_bytes())
        files, size = self.trashed
        yield Gauge("devpi_lite_trash_files", "gauge", "Files that nothing names, kept for a week.",
                    files)
        yield Gauge("devpi_lite_trash_bytes", "gauge", "Their size.", size)

    def complaints(self):
        if not self.read_only:
            yield from disk_complaints(self._free_bytes())
        if self.swept_much:
            yield Complaint("warn", f"{self.swept_much} files were named by nothing in the "
                                    "database, and lie in trash/ for a week: was an older database "
                                    "put back?")

    def _free_bytes(self):
        return shutil.disk_usage(self.serverdir).free

    def path(self, sha256):
        return os.path.join(self.files, sha256[:2], sha256)

    def has(self, sha256, size=None):
        """Whether the blob exists, with this size."""
        try:
            found = os.stat(self.path(sha256)).st_size
        except FileNotFoundError:
            try:
                found = os.stat(self._found_again(sha256)).st_size
            except FileNotFoundError:
                return False
        return size is None or found == size

    def claim(self, sha256):
        """Whether the blob exists; if so, it is not collected before the caller can refer to it."""
        if self.read_only:
            return self.has(sha256)
        with self.lock:
            try:
                os.utime(self.path(sha256))
            except FileNotFoundError:
                return self._take_back(sha256)
            return True

    def _found_again(self, sha256):
        """The path of a blob that was missing in its place.

        It is moved back from the trash, or read there if that is not possible. If it does not
        exist, the path of its place."""
        target, trashed = self.path(sha256), os.path.join(self.trash, sha256)
        if not self.read_only:
            with self.lock:             # `empty_trash` and other threads wait for this one
                self._take_back(sha256)
        return trashed if os.path.exists(trashed) and not os.path.exists(target) else target

    def _take_back(self, sha256):
        """Move a blob from the trash to its place; whether that worked. The caller holds the
        lock."""
        target, trashed = self.path(sha256), os.path.join(self.trash, sha256)
        try:
            os.utime(trashed)           # or the next sweep would move it to the trash again
            move_into_folder(trashed, target)
        except FileNotFoundError:
            return False
        except OSError as error:        # Windows: another process has it open
            log.warning("the file %s was not taken back from the trash: %s", sha256,
                        reason_of(error))
            return False
        sync_directory(os.path.dirname(target))
        log.info("the file %s was taken back from the trash", sha256)
        return True

    def sweep(self, is_referred_to, older_than=3600):
        """Move the blobs to the trash that nothing has referred to for `older_than` seconds, and
        delete what has been there for `Limits.trash`; returns how many were moved.

        Blobs come back from the trash when they are requested: a restored older database does not
        name newer files, and if the newer database is restored in turn, nothing is lost."""
        swept = self.collect(is_referred_to, older_than)
        if swept.moved > max(10, swept.kept // 9):
            self.swept_much = swept.moved
            log.warning("%d of %d files are named by nothing in the database, and lie in %s now: "
                        "was an older database put back?", swept.moved, swept.kept + swept.moved,
                        self.trash)
        return swept.moved

    def collect(self, is_referred_to, older_than, trash_time=None, dry_run=False):
        """The same; returns what was done as `Swept`. Busy while a command holds a `lease`.

        Other processes may put blobs in meanwhile, and commit rows that name them.

        `trash_time`: in place of `Limits.trash`; `dry_run`: nothing is changed, but the result is
        the same."""
        lessees = self.lessees()
        if lessees:
            raise Busy("a command copies files of this directory, nothing is moved or deleted "
                       f"before it ends: process {', '.join(sorted(lessees))}")
        limit = time.time() - older_than
        kept = moved = size = 0
        if not dry_run:
            os.makedirs(self.trash, mode=0o700, exist_ok=True)
        for entry in self.entries():
            try:
                facts = entry.stat()
            except FileNotFoundError:       # another process was faster
                continue
            if facts.st_mtime < limit and not is_referred_to(entry.name) \
                    and (dry_run or self._discard(entry, limit)):
                moved, size = moved + 1, size + facts.st_size
            else:
                kept += 1

        deleted = self.empty_trash(is_referred_to, trash_time, dry_run)
        return Swept(kept, moved, size, *deleted)

    def entries(self):
        """Yield an os.DirEntry for each blob, folder by folder."""
        for folder in sorted(os.scandir(self.files), key=operator.attrgetter("name")):
            if folder.is_dir(follow_symlinks=False):
                yield from os.scandir(folder.path)

    def _discard(self, entry, limit):
        """Move a blob to the trash; False if it was claimed meanwhile, or can't be moved now."""
        target = os.path.join(self.trash, entry.name)
        try:
            with self.lock:
                if os.path.getmtime(entry.path) >= limit:
                    return False
                # The age in the trash begins now. First, because a crash after the move would
                # otherwise leave an old file there, which is deleted at once. Some seconds ago, on
                # every file system, so that a claim by another process shows.
                begin = int(time.time()) - 4 & ~1
                os.utime(entry.path, (begin, begin))
                os.replace(entry.path, target)
                if os.path.getmtime(target) != begin:
                    self._take_back(entry.name)
                    return False
        except FileNotFoundError:       # another process was faster
            return False
        except OSError as error:        # Windows: another process has it open
            log.warning("%s was not moved to the trash: %s", entry.path, reason_of(error))
            return False
        return True

    def empty_trash(self, is_referred_to=None, trash_time=None, dry_run=False):
        """Delete what has been in the trash for `trash_time` seconds; count the rest. Returns
        (deleted files, their bytes, files taken back).

        What rows name is taken back: it was claimed just when another process moved it."""
        count = size = deleted = freed = back = 0
        limit = time.time() - (Limits.trash if trash_time is None else trash_time)
        for entry in os.scandir(self.trash) if os.path.isdir(self.trash) else ():
            with self.lock:             # not while another thread takes it back
                try:
                    facts = os.stat(entry.path)     # entry.stat() may be outdated
                    if is_referred_to and not os.path.exists(self.path(entry.name)) \
                            and is_referred_to(entry.name):
                        if dry_run or self._take_back(entry.name):
                            back += 1
                            continue
                    elif facts.st_mtime < limit:
                        if not dry_run:
                            os.unlink(entry.path)
                        deleted, freed = deleted + 1, freed + facts.st_size
                        continue
                except FileNotFoundError:
                    continue
                except OSError as error:            # Windows: another process has it open
                    log.warning("%s stays in the trash: %s", entry.path, reason_of(error))
            count, size = count + 1, size + facts.st_size
        self.trashed = (count, size)
        self.swept_much = self.swept_much if count else 0
        return deleted, freed, back

    def leftovers(self, older_than=3600):
        """Yield the paths of temporary files and folders that are older, and that no living process
        owns: a command or a server was killed."""
        tmp = os.path.join(self.serverdir, "tmp")
        for folder, pattern in ((tmp, ".*"), (self.serverdir, r".*\.tmp")):
            for entry in os.scandir(folder) if os.path.isdir(folder) else ():
                if re.fullmatch(pattern, entry.name, re.DOTALL):
                    owner = re.search(r"^[0-9]+(?=-)|(?<=\.)[0-9]+(?=\.tmp$)", entry.name)
                    if not (owner and is_alive(int(owner[0]))) \
                            and newest_time(entry.path) < time.time() - older_than:
                        yield entry.path

    def open(self, sha256, size=None):
        """The blob as an open binary file; NotFound if it is lost or has another size."""
        try:
            file = self._open(sha256)
            found = os.fstat(file.fileno()).st_size
            if size is None or found == size:
                return file
            file.close()
            log.error("the file %s is damaged: it has %d bytes, should have %d",
                      self.path(sha256), found, size)
        except FileNotFoundError:
            log.error("the file %s is lost", self.path(sha256))
        raise NotFound("no such file")

    def _open(self, sha256):
        try:
            return open(self.path(sha256), "rb")
        except FileNotFoundError:
            return open(self._found_again(sha256), "rb")

    def find(self, sha256):
        """The path of the blob, which may be in the trash; if it is nowhere, that of its place."""
        path = self.path(sha256)
        return path if os.path.exists(path) else self._found_again(sha256)

    def incoming(self):
        """An `IncomingBlob`, to be written piece by piece."""
        if self.read_only:
            raise ReadOnly()
        return IncomingBlob(self)


class Swept(typing.NamedTuple):
    """What `Blobs.collect` did: numbers of blobs, and their bytes."""
    kept: int
    moved: int          # to the trash
    moved_size: int
    deleted: int        # from the trash
    deleted_size: int
    taken_back: int     # from the trash


def is_alive(pid):
    """Whether there may be a process with this id. On Windows False: there nobody can delete what
    another process has open."""
    if os.name == "nt":
        return False        # os.kill would end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def newest_time(path):
    """When a file, or one in a folder, was last written; now if it just went away."""
    try:
        times = [os.lstat(path).st_mtime]
        for folder, _, names in os.walk(path):
            times += [os.lstat(os.path.join(folder, name)).st_mtime for name in ("", *names)]
        return max(times)
    except FileNotFoundError:
        return time.time()


def size_on_disk(path):
    """Bytes of a file, or of all files in a folder."""
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names] \
        if os.path.isdir(path) else [path]
    size = 0
    for each in paths:
        with contextlib.suppress(FileNotFoundError):
            size += os.lstat(each).st_size
    return size


def disk_complaints(free):
    """The `Complaint`s about a disk with so many bytes free."""
    if free < Limits.disk_warn:
        yield Complaint("fatal" if free < Limits.disk_fatal else "warn",
                        f"the disk has {free >> 20} MiB free")


def move_into_folder(path, target):
    """Rename a file; make its folder if a copy of the server directory lacks empty folders."""
    try:
        os.replace(path, target)
    except FileNotFoundError:
        folder = os.path.dirname(target)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        sync_directory(os.path.dirname(folder))
        os.replace(path, target)


def remove(path):
    """Delete a file or a folder, as far as it is there and can be deleted."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:        # Windows: another process has it open
        log.warning("%s was not deleted: %s", path, reason_of(error))


def made_in(folder, make):
    """What `make()` makes in this folder; the folder is made again if it was removed."""
    try:
        return make()
    except FileNotFoundError:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        return make()


def holds_blobs(serverdir):
    """Whether a server directory has a blob, in place or in the trash."""
    files = os.path.join(serverdir, "files")
    folders = [entry.path for entry in os.scandir(files)] if os.path.isdir(files) else []
    for folder in (*folders, os.path.join(serverdir, "trash")):
        if os.path.isdir(folder) and os.listdir(folder):
            return True
    return False


@dataclasses.dataclass
class FilePart:
    """A part of an open file, to be sent in a response; the sender closes the file."""
    file: io.IOBase
    offset: int
    length: int


class IncomingBlob:
    """A new blob: write to it, then `keep()` it under its SHA-256; discarded by the `with`."""

    def __init__(self, blobs):
        self.blobs = blobs
        try:
            self.path = os.path.join(blobs.tmp, f"{os.getpid()}-{next(blobs.numbers)}")
            self.file = made_in(blobs.tmp, lambda: open(self.path, "x+b", buffering=0))
        except OSError as error:
            raise disk_problem(error) from error
        self.sha256 = hashlib.sha256()
        self.size, self.is_kept = 0, False

    @contextlib.contextmanager
    def reader(self):
        """What was written so far, as an open binary file."""
        self.file.seek(0)
        reader = io.BufferedReader(self.file)
        try:
            yield reader
        finally:
            reader.detach()

    def write(self, data):
        left = memoryview(data)
        try:
            while left:
                left = left[self.file.write(left):]
        except OSError as error:
            raise disk_problem(error) from error
        self.sha256.update(data)
        self.size += len(data)

    def keep(self, durable=True):
        """Sync the file and rename it into place; return its SHA-256.

        Several threads may keep the same bytes. If not `durable`, a power cut may remove the
        name, but never leave other bytes under it."""
        digest = self.sha256.hexdigest()
        target = self.blobs.path(digest)
        try:
            with disk_wait():
                os.fsync(self.file.fileno())
            self.file.close()
            if not (self.blobs.claim(digest) and self.blobs.has(digest, self.size)):
                move_into_folder(self.path, target)
                self.is_kept = True
            if durable:     # even if the blob existed: a mirror may not have synced its name
                with disk_wait():
                    sync_directory(os.path.dirname(target))
        except OSError as error:
            raise disk_problem(error) from error
        return digest

    def replace(self, aside):
        """Put the file into its place, durably, and what is there into the trash under the name
        `aside`; for a blob that is damaged or lost."""
        target = self.blobs.path(self.sha256.hexdigest())
        try:
            os.fsync(self.file.fileno())
            self.file.close()
            if os.path.lexists(target):
                os.makedirs(self.blobs.trash, mode=0o700, exist_ok=True)
                if not os.path.islink(target):
                    os.utime(target)        # its age in the trash begins now
                os.replace(target, os.path.join(self.blobs.trash, aside))
            move_into_folder(self.path, target)
            self.is_kept = True
            sync_directory(os.path.dirname(target))
        except OSError as error:
            raise disk_problem(error) from error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.discard()

    def discard(self):
        """Remove the file if it was not kept, or existed already."""
        self.file.close()
        if not self.is_kept:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)


class Damaged(Problem):
    """A file is not what its hash says."""


def read_pieces(file):
    """Yield the rest of an open binary file in pieces."""
    return iter(lambda: file.read(Limits.copied), b"")


def hash_file(path):
    """(SHA-256, size) of a file."""
    sha256, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        for piece in read_pieces(file):
            sha256.update(piece)
            size += len(piece)
    return sha256.hexdigest(), size


def copy_checked(source, target, sha256=None):
    """Copy the rest of an open binary file into a new file, which only its owner can read.

    Returns (SHA-256, size). Damaged, and nothing is left at `target`, if the bytes are not those
    of `sha256`. The copy is not synced: see `sync_tree`."""
    digest, size = hashlib.sha256(), 0
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    try:
        with open(fd, "wb", buffering=0) as file:
            for piece in read_pieces(source):
                digest.update(piece)
                size += len(piece)
                left = memoryview(piece)
                while left:
                    left = left[file.write(left):]
        if sha256 not in (None, digest.hexdigest()):
            raise Damaged(f"sha256 mismatch, got {digest.hexdigest()}, expected {sha256}")
    except OSError as error:
        os.unlink(target)
        raise disk_problem(error) from error
    except BaseException:
        os.unlink(target)
        raise
    return digest.hexdigest(), size


def sync_tree(folder):
    """Make all that was written below a folder survive a power cut, in bulk where that is possible:
    20,000 files take a second, not one after the other a minute."""
    if sys.platform.startswith("linux"):
        os.sync()       # waits for the disks, as POSIX does not promise
        return
    for path, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(path, name), "r+b") as file:
                os.fsync(file.fileno())
        sync_directory(path)


def sync_directories(folders):
    """Make renames in these directories survive a power cut."""
    if sys.platform.startswith("linux"):
        os.sync()
        return
    for folder in folders:
        sync_directory(folder)


class Intake:
    """Many blobs on their way in at once, for a command that has the directory to itself.

    They are copied without syncs, several at a time if the caller has threads; `keep` syncs them
    in bulk and puts them in their places. `in_place`: at once in their places; only where the whole
    directory is dropped unless all goes well."""

    def __init__(self, blobs, in_place=False):
        self.blobs, self.in_place = blobs, in_place
        self.folder = blobs.files if in_place else os.path.join(blobs.tmp, "intake")
        for number in range(0 if in_place else 256):
            os.makedirs(os.path.join(self.folder, "%02x" % number), mode=0o700, exist_ok=True)

    def path(self, sha256):
        """Where a blob is now."""
        path = os.path.join(self.folder, sha256[:2], sha256)
        return path if os.path.exists(path) else self.blobs.path(sha256)

    def take(self, path, sha256=None, link=False):
        """Take a file in; returns (SHA-256, size). Damaged if it is not what `sha256` says.

        `link`: as a hard link if that is possible; both are then one file."""
        digest = sha256
        if link or digest is None or os.path.exists(self.path(digest)):
            digest, size = hash_file(path)
            if sha256 not in (None, digest):
                raise Damaged(f"sha256 mismatch, got {digest}, expected {sha256}")
            if os.path.exists(self.path(digest)) or self.blobs.claim(digest):
                return digest, size

        target = os.path.join(self.folder, digest[:2], digest)
        if link:
            try:
                os.link(path, target)
                os.chmod(target, 0o600)
                return digest, size
            except FileExistsError:
                return digest, size
            except OSError as error:
                log.debug("%s is copied, not linked: %s", path, reason_of(error))

        # a name of its own: two threads or processes may take the same bytes
        part = f"{target}.{os.getpid()}-{threading.get_ident()}"
        with open(path, "rb", buffering=0) as source:
            taken = copy_checked(source, part, digest)
        os.replace(part, target)
        return taken

    def keep(self):
        """Sync the blobs and put them in their places; a commit may name them now."""
        sync_tree(self.folder)
        if self.in_place:
            return
        changed = set()
        for folder in os.scandir(self.folder):
            for entry in os.scandir(folder.path):
                move_into_folder(entry.path, self.blobs.path(entry.name))
                changed.add(os.path.dirname(self.blobs.path(entry.name)))
        sync_directories(changed)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if not self.in_place:
            shutil.rmtree(self.folder, ignore_errors=True)


class Spool:
    """Bytes that arrive slowly, for many requests at a time: in memory, or if many in a file."""
    __slots__ = ("folder", "data", "file", "size")

    def __init__(self, blobs):
        self.folder, self.data, self.file, self.size = blobs.tmp, bytearray(), None, 0

    def write(self, data):
        self.size += len(data)
        if self.size <= Limits.spooled:
            self.data += data
            return
        try:
            if self.file is None:
                self.file = made_in(self.folder, lambda: tempfile.TemporaryFile(dir=self.folder))
                self.file.write(self.data)
                self.data = bytearray()
            self.file.write(data)
            self.file.flush()
        except OSError as error:
            raise disk_problem(error) from error

    def value(self):
        """All bytes, in memory."""
        if self.file is None:
            return bytes(self.data)
        self.file.seek(0)
        return self.file.read()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.file is not None:
            self.file.close()


def disk_problem(error):
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpace(f"nothing was stored: {os.strerror(error.errno)}")
    return error


def sync_directory(path):
    """Make a rename in this directory survive a power cut (Windows has no such call)."""
    if os.name != "nt":
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


# ==================================================================================================
# 6  Archives
#
# What is read out of archives: their metadata file, and the members of documentation zips.
# Strangers send them, so they are read within bounds of our own: nothing below rests on which
# exception a library raises, or on what it makes of a damaged header.
# ==================================================================================================


class BrokenArchive(BadRequest):
    """An archive that installers can't use: unreadable, cut, without its metadata file.

    Uploads of such are refused unless --accept-broken-archives is set. A mirror keeps them, without
    metadata."""


# Archives in which a metadata file is looked for, and how they are packed.
_ZIPS = (".whl", ".zip", ".egg")
_TARS = ((".tar.gz", "gzip"), (".tgz", "gzip"), (".tar.bz2", "bzip2"), (".tar.xz", "xz"),
         (".tar", ""))
_WHEEL_NAME = re.compile(r"[\w.]+-[\w.!+]+(-[0-9][\w.]*)?(-[\w.]+){3,4}\.whl", re.IGNORECASE)


def check_archive_name(filename):
    """Refuse (BrokenArchive) the name of a wheel that installers ignore or can't read (PEP 427;
    PEP 825 for the label of a variant at its end)."""
    if filename.lower().endswith(".whl") and not _WHEEL_NAME.fullmatch(filename):
        raise BrokenArchive(f"'{filename}' is no file name of a wheel, such as "
                            "name-1.0-py3-none-any.whl: renamed by a browser?")


def archive_metadata(file, filename, is_whole=False, is_needed=True, patience=None):
    """The METADATA of a wheel or the PKG-INFO of an sdist (bytes), from an open binary file.

    None for other files; and if not `is_needed`, for archives without such a file, or with one that
    lacks the name or version.

    `is_whole`: also read every member of a zip, and check that a wheel has its other required
    files. (The members of a tar are always read.)

    BrokenArchive if the archive is not what its name says, or lacks what is needed. BadRequest for
    what no honest tool writes: members outside of it, duplicates, a second archive before or after
    it, too much. Busy if a large archive waits longer than `patience` for its turn (see
    `Effort`)."""
    lower = filename.lower()
    packing = next((packing for ending, packing in _TARS if lower.endswith(ending)), None)
    if not lower.endswith(_ZIPS) and packing is None:
        return None
    with Effort(file, filename, patience=patience) as effort:
        if packing is None:
            found, wanted = _zip_metadata(file, filename, effort, is_whole)
        else:
            found, wanted = _tar_metadata(file, filename, effort, packing), "PKG-INFO"

    missing = f"no {wanted}" if found is None else _missing_fields(found, wanted)
    if not missing:
        return found
    if is_needed:
        raise BrokenArchive(f"'{filename}' has {missing}: built or sent incompletely?")
    return None


def _missing_fields(data, wanted):
    """The required fields that metadata lacks, in words; "" if it has them all."""
    fields = parse_core_metadata(data)
    missing = [field.title() for field in ("name", "version") if not fields.get(field, "").strip()]
    return f"a {wanted} without {' and '.join(missing)}" if missing else ""


# -- bounds on the cost of reading an archive

_large_checks = threading.BoundedSemaphore(Limits.large_checks)


class Effort:
    """Bounds the cost of reading one archive: counts the bytes that it unpacks to, and those that
    it claims to unpack to.

    From `Limits.large_archive` unpacked bytes on, an archive waits up to `patience` seconds (by
    default `Limits.large_wait`) for its turn: `Limits.large_checks` large ones are read at a time,
    or a few accounts could keep all processors busy."""

    def __init__(self, file, filename, limit=None, patience=None):
        self.filename, self.packed = filename, file.seek(0, io.SEEK_END)
        self.limit = limit or unpacked_limit(self.packed)
        self.patience = Limits.large_wait if patience is None else patience
        self.unpacked = self.announced = 0
        self.has_turn = False

    def announce(self, size):
        """Count bytes that the archive says will come."""
        self.announced += size
        if self.announced > self.limit:
            raise self._too_much()

    def spend(self, size):
        """Count bytes that have been unpacked."""
        self.unpacked += size
        if self.unpacked > self.limit:
            raise self._too_much()
        if self.unpacked > Limits.large_archive:
            self.wait_for_turn()

    def wait_for_turn(self):
        """Wait for a turn among large archives; Busy after `patience` seconds."""
        if self.has_turn:
            return
        with outside_wait() as room:
            self.has_turn = _large_checks.acquire(timeout=self.patience if room else 0)
        if not self.has_turn:
            raise Busy("too many large archives are being looked through just now, try again", 10)

    def _too_much(self):
        return BadRequest(f"'{self.filename}' holds too much: its {self.packed} bytes unpack to "
                          f"over {self.limit}, which is the limit for an archive of that size")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.has_turn:
            _large_checks.release()


def unpacked_limit(packed):
    """The bytes that an archive of `packed` bytes may unpack to.

    Text is more repetitive than programs are, but not by gigabytes."""
    return max(min(Limits.archive_free + Limits.archive_ratio * packed, Limits.archive_bytes),
               Limits.large_archive_ratio * packed)


def tar_members_limit(packed):
    """The number of members that a tar of `packed` bytes may have.

    (In a zip each member takes at least 76 bytes; in a packed tar, 100,000 may take 1,000.)"""
    return min(Limits.small_archive_members + packed // Limits.tar_member, Limits.archive_members)


class MemberCheck:
    """Called with each member's name: refuses more than `limit` members, or one that leads out."""

    def __init__(self, filename, limit):
        self.filename, self.limit, self.count = filename, limit, 0

    def __call__(self, name):
        self.count += 1
        if self.count > self.limit:
            raise too_many_members(self.filename, self.limit)
        self.check_name(name)

    def check_name(self, name):
        if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name) or "\0" in name \
                or re.search(r"(?:^|[/\\])\.\.(?:$|[/\\])", name):
            raise BadRequest(f"'{self.filename}' holds the member '{one_line(name)}', "
                             "which leaves the archive")


def too_many_members(filename, limit):
    return BadRequest(f"'{filename}' holds too much: over {limit} members")


def _check_metadata(data, filename):
    if len(data) > Limits.metadata_file:
        raise BadRequest(f"the metadata in '{filename}' is larger than "
                         f"{Limits.metadata_file} bytes")
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if lines.partition(b"\n\n")[0].count(b"\n") > Limits.metadata_lines:
        raise BadRequest(f"the metadata in '{filename}' has more than "
                         f"{Limits.metadata_lines} header lines")


# -- zips


def _zip_metadata(file, filename, effort, is_whole):
    """(the bytes of the metadata file of a zip or None, the name that it should have)."""
    members = _zip_members(file, filename, Limits.archive_members, effort)
    check, names = MemberCheck(filename, Limits.archive_members), set()
    for member in members:
        check(member.filename)
        check.check_name(member.orig_filename)        # the same, and what follows a NUL
        if member.filename in names:
            raise BadRequest(f"'{filename}' holds '{one_line(member.filename)}' twice")
        names.add(member.filename)
        if is_whole:
            effort.announce(member.file_size)
    _check_zip_ends(file, filename, members)

    if filename.lower().endswith(".whl"):
        wanted, pattern = ".dist-info/METADATA", r"[^/]+\.dist-info/METADATA"
    else:
        wanted, pattern = "PKG-INFO", r"[^/]+/PKG-INFO"
    matching = [member for member in members if re.fullmatch(pattern, member.filename)]
    if len(matching) > 1 and wanted != "PKG-INFO":
        raise BadRequest(f"'{filename}' holds more than one .dist-info")

    found = None
    if matching:
        found = _small_member(file, filename, matching[0], effort)
        _check_metadata(found, filename)
    if is_whole and found is not None and filename.lower().endswith(".whl"):
        _check_wheel_parts(filename, names)
    if is_whole:
        _check_zip_members(file, filename, members, effort)
    return found, wanted


def _check_wheel_parts(filename, names):
    """Refuse a wheel without the files that installers need besides METADATA (PEP 427)."""
    infos = {name.partition("/")[0] for name in names}
    infos = sorted(info for info in infos if info.endswith(".dist-info"))
    if len(infos) > 1:
        raise BrokenArchive(f"'{filename}' holds more than one .dist-info: "
                            f"{one_line(' and '.join(infos))}")
    if not normalize(infos[0]).startswith(normalize(filename.partition("-")[0])):
        raise BrokenArchive(f"'{filename}' holds '{one_line(infos[0], 80)}', the .dist-info of "
                            "another project")
    for part in ("WHEEL", "RECORD"):
        if f"{infos[0]}/{part}" not in names:
            raise BrokenArchive(f"'{filename}' has no .dist-info/{part}: "
                                "built or sent incompletely?")


def _zip_members(file, filename, limit, effort):
    """The members that a zip's directory lists, `limit` at most."""
    if check_zip_directory(file, filename, limit) > Limits.large_directory:
        effort.wait_for_turn()
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()
    except Exception as error:      # after the checks above, any error means that it is unreadable
        raise BrokenArchive(f"'{filename}' is no zip file: built or sent incompletely? "
                            f"({reason_of(error)})") from None


def _check_zip_members(file, filename, members, effort):
    """Read every member: the archive unpacks to what its directory says, and no two members share
    bytes.

    zlib takes three quarters of the time, and lets other threads run: 2.4 ms for a wheel of 100 KB,
    0.2 s for 10 MB."""
    end, scripts = 0, re.compile(r"([^/]+\.dist-info|EGG-INFO)/entry_points\.txt")
    formats = re.compile(r"[^/]+\.dist-info/WHEEL")
    for member in sorted(members, key=lambda member: member.header_offset):
        if member.header_offset < end:
            raise BadRequest(f"'{filename}' holds members that lie in one another")
        if scripts.fullmatch(member.filename):
            _check_entry_points(_small_member(file, filename, member, effort), filename)
        elif formats.fullmatch(member.filename):
            _check_wheel_file(_small_member(file, filename, member, effort), filename)
        else:
            for _ in _member_pieces(file, filename, member, effort):
                pass
        end = file.tell()


def _small_member(file, filename, member, effort):
    """All bytes of a zip's member; BadRequest if it is large."""
    if member.file_size > Limits.metadata_file:
        raise BadRequest(f"'{one_line(member.filename)}' in '{filename}' is larger than "
                         f"{Limits.metadata_file} bytes")
    return b"".join(_member_pieces(file, filename, member, effort))


def _member_pieces(file, filename, member, effort):
    """The bytes of a zip's member, in pieces; BrokenArchive if they are not what the directory
    says."""
    try:
        for piece in zip_member_pieces(file, member, effort.packed):
            effort.spend(len(piece))
            yield piece
    except (ValueError, OverflowError, zlib.error) as error:
        raise BrokenArchive(f"'{filename}' is damaged: its member '{one_line(member.filename)}' "
                            f"can't be unpacked ({reason_of(error)}); built or sent incompletely?"
                            ) from None


def zip_member_pieces(file, member, file_size):
    """The bytes of a zip's member, in pieces; leaves the file at the member's end.

    ValueError or zlib.error if it differs from the directory in name, size or checksum, is
    encrypted, or is packed in a way that some installers can't unpack."""
    # below zero if the beginning is missing; no file system can seek to every 64-bit number
    is_inside = 0 <= member.header_offset < file_size
    file.seek(member.header_offset if is_inside else 0)
    head = file.read(30)
    if not is_inside or len(head) < 30 or head[:4] != b"PK\3\4":
        raise ValueError("there is none at its place")
    flags, method = struct.unpack("<2H", head[6:10])
    name_size, extra_size = struct.unpack("<2H", head[26:30])
    encoding = "utf-8" if member.flag_bits & 0x800 else "cp437"
    if file.read(name_size).decode(encoding) != member.orig_filename:
        raise ValueError("another one is at its place")
    if (flags | member.flag_bits) & 0x61:       # 1 and 0x40: encrypted; 0x20: patch data
        raise ValueError("it is encrypted or patch data")
    if method != member.compress_type or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"it is packed by method {method}, not stored or deflated")

    file.seek(extra_size, io.SEEK_CUR)
    pieces = _stored_pieces(file, member.compress_size) if method == zipfile.ZIP_STORED else \
        _deflated_pieces(file, member.compress_size)

    size = crc = 0
    for piece in pieces:
        size, crc = size + len(piece), zlib.crc32(piece, crc)
        if size > member.file_size:
            raise ValueError(f"it has over the {member.file_size} bytes that the archive says")
        yield piece
    if size != member.file_size:
        raise ValueError(f"it has {size} bytes, the archive says {member.file_size}")
    if crc != member.CRC:
        raise ValueError("its checksum is wrong")


def _stored_pieces(file, left):
    while left:
        data = file.read(min(left, 256 << 10))
        if not data:
            raise ValueError("it was cut")
        left -= len(data)
        yield data


def _deflated_pieces(file, left):
    """What `left` bytes of deflated data unpack to; both must end together."""
    unzip, data, size = zlib.decompressobj(-15), b"", 0
    while not unzip.eof:
        if not data and left:
            data = file.read(min(left, 64 << 10))
            if not data:
                raise ValueError("it was cut")
            left -= len(data)
        with turn_to_unpack(size):
            piece, data = unzip.decompress(data, 256 << 10), unzip.unconsumed_tail
        size += len(piece)
        if piece:
            yield piece
        elif not (data or left or unzip.eof):
            raise ValueError("it ends early")
    if left or unzip.unused_data:
        raise ValueError("it ends before its place does")


def _check_wheel_file(data, filename):
    """Refuse a WHEEL file that does not state the version of its format."""
    if not _WHEEL_VERSION.search(_info_text(data, "WHEEL", filename)):
        raise BrokenArchive(f"'{filename}' has a .dist-info/WHEEL without Wheel-Version: "
                            "built or sent incompletely?")


def _info_text(data, part, filename):
    """The text of a file that describes the archive; BrokenArchive if it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise BrokenArchive(f"'{filename}' has an unreadable {part}: it is not UTF-8") from None


_WHEEL_VERSION = re.compile(r"^wheel-version:[ \t]*[0-9]+(\.[0-9]+)*[ \t]*\r?$",
                            re.IGNORECASE | re.MULTILINE)
_SCRIPT_NAME = re.compile(r"(?!\.\.?$)[^/\\:;\x00-\x1f\x7f]+")
_SCRIPT_VALUE = re.compile(r"[\w.]+\s*:\s*[\w.]")


def _check_entry_points(data, filename):
    """Refuse entry points that readers take differently (some of them reject the wheel).

    Also names of scripts that lead to another folder, or are more than a command to a shell."""
    section, seen, least = None, set(), sys.maxsize
    for line in _info_text(data, "entry_points.txt", filename).splitlines():
        text = line.strip()
        if not text or text.startswith("#"):
            continue

        name, equals, value = (part.strip() for part in text.partition("="))
        indent, is_section = len(line) - len(line.lstrip()), text[0] == "[" and text[-1] == "]"
        if is_section:
            section = name = text.strip("[] \t")
            equals = indent <= least        # deeper, some readers add it to the value before
        least = sys.maxsize if is_section else min(indent, least)

        if section is None or not (name and equals) or text[0] == "[" and not is_section:
            raise BrokenArchive(f"'{filename}' has an entry_points.txt that can't be read: "
                                f"'{one_line(text, 80)}' is neither a [section] nor name = value "
                                "in one")
        if (section, is_section or name) in seen:
            raise BrokenArchive(f"'{filename}' has an entry_points.txt that holds "
                                f"'{one_line(name, 80)}' twice")
        seen.add((section, is_section or name))
        if not is_section and section in ("console_scripts", "gui_scripts"):
            _check_script(name, value, filename)


def _check_script(name, value, filename):
    if not _SCRIPT_NAME.fullmatch(name):
        raise BrokenArchive(f"'{filename}' has the entry point '{one_line(name, 80)}': the name of "
                            "a script holds no slash, backslash, colon or semicolon")
    if not _SCRIPT_VALUE.match(value):
        raise BrokenArchive(f"'{filename}' has the entry point '{one_line(name, 80)}' for "
                            f"'{one_line(value, 80)}', which is no module:function")


def _check_zip_ends(file, filename, members):
    """Refuse data outside of the archive: if there are two archives, readers differ on which one
    they see."""
    found = _zip_end(file)
    if found is None or found.end != file.seek(0, io.SEEK_END) or found.members != len(members) \
            or found.directory_at + found.directory_size != found.at \
            or members and min(m.header_offset for m in members) != 0:
        raise BadRequest(f"'{filename}' holds data outside its zip archive, or more than one")


class _ZipEnd(typing.NamedTuple):
    """A zip's end record: its own place (`at`), what it says of the directory and the number of
    members, and where the archive ends."""
    at: int
    directory_at: int
    directory_size: int
    members: int
    end: int


def _zip_end(file):
    """The last end record of an open file, as `zipfile` finds it, or None."""
    size = file.seek(0, io.SEEK_END)
    start = max(0, size - 22 - 65535 - 20)
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) < at + 22:
        return None
    members, directory_size, directory_at, comment = struct.unpack("<H2LH", tail[at + 10:at + 22])
    record = start + at

    if tail[max(0, at - 20):at][:4] == b"PK\6\7":       # zip64
        record = struct.unpack("<Q", tail[at - 12:at - 4])[0]
        file.seek(min(record, size))
        numbers = file.read(56)
        if len(numbers) < 56 or numbers[:4] != b"PK\6\6":
            return None
        members, directory_size, directory_at = struct.unpack("<3Q", numbers[32:])
    return _ZipEnd(record, directory_at, directory_size, members, start + at + 22 + comment)


def check_zip_directory(file, filename, members):
    """The number of a zip's members, counted before `zipfile` reads the directory into memory.

    Goes by the directory's size, like `zipfile`, not by the number in the end record. BadRequest
    if there are more than `members`, or if the directory is larger than they need."""
    found = _zip_end(file)
    if found is None:
        raise BrokenArchive(f"'{filename}' is no zip file: built or sent incompletely?")
    if found.members > members or found.directory_size > members * 256:
        raise too_many_members(filename, members)

    file.seek(max(0, found.at - found.directory_size))      # where `zipfile` looks for it
    left, count = found.directory_size, 0
    while left > 0 and count <= members:
        head = file.read(46)
        if len(head) < 46:
            break
        rest = sum(struct.unpack("<3H", head[28:34]))
        file.seek(rest, io.SEEK_CUR)
        left, count = left - 46 - rest, count + 1
    if count > members:
        raise too_many_members(filename, members)
    return count


# -- tars


class _TarMember(typing.NamedTuple):
    name: str
    size: int               # of the data that follows
    is_file: bool           # a plain file


def _tar_metadata(file, filename, effort, packing):
    """The PKG-INFO of a tar, or None; of several the last one, which unpacking would leave.

    Reads the tar to its last byte."""
    found, check = None, MemberCheck(filename, tar_members_limit(effort.packed))
    try:
        stream = _Forwards(_unpacked(file, filename, packing), effort)
        for member in _tar_members(stream, filename, effort):
            check(member.name)
            if member.is_file and re.fullmatch(r"(\./)?[^/]+/PKG-INFO", member.name):
                found = stream.read(min(member.size, Limits.metadata_file + 1))
                _check_metadata(found, filename)
        stream.skip_to(sys.maxsize)     # a cut or a wrong checksum shows at the end only
    except (ValueError, EOFError, zlib.error) as error:
        packed = f" packed by {packing}" if packing else ""
        raise BrokenArchive(f"'{filename}' is no tar file{packed}, or damaged: built or sent "
                            f"incompletely? ({reason_of(error)})") from None
    return found


def _unpacked(file, filename, packing):
    """What a packed file unpacks to, in pieces: one stream, or several in a row.

    ValueError, EOFError or zlib.error if it is not packed like that up to its end."""
    file.seek(0)
    if not packing:
        yield from iter(lambda: file.read(256 << 10), b"")
        return

    make, errors = _unpacker(packing)
    unpacker, data, count, size = make(), b"", 1, 0
    while True:
        if not data and getattr(unpacker, "needs_input", True):
            data = file.read(64 << 10)
            if not data:
                raise EOFError("it ends early")

        try:
            with turn_to_unpack(size):
                piece = unpacker.decompress(data, 256 << 10)
        except errors as error:
            raise ValueError(reason_of(error)) from None

        data = getattr(unpacker, "unconsumed_tail", b"")
        size += len(piece)
        if piece:
            yield piece
        if unpacker.eof:
            data = unpacker.unused_data.lstrip(b"\0")       # zeros fill the last block of a tape
            while not data:
                data = file.read(64 << 10)
                if not data:
                    return
                data = data.lstrip(b"\0")
            count += 1
            if count > Limits.archive_members:
                raise BadRequest(f"'{filename}' holds too much: over {Limits.archive_members} "
                                 "packed streams")
            unpacker = make()


def _unpacker(packing):
    """(a function that makes a decompressor, the exception that it raises)."""
    if packing == "gzip":
        return functools.partial(zlib.decompressobj, 31), zlib.error
    if packing == "bzip2":
        return bz2.BZ2Decompressor, OSError
    try:
        import lzma     # not at the top: a Python can be built without it
    except ImportError:
        raise ValueError("this Python has no lzma module") from None
    return (functools.partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, Limits.xz_memory),
            lzma.LZMAError)


class _Forwards:
    """Reads pieces of bytes as one stream: only forwards, each byte once and counted."""

    def __init__(self, pieces, effort):
        self.pieces, self.effort = pieces, effort
        self.piece, self.at = b"", 0        # the present piece, and how much of it was read
        self.position = 0

    def _next(self):
        self.piece, self.at = next(self.pieces, b""), 0
        self.effort.spend(len(self.piece))
        return bool(self.piece)

    def read(self, size):
        """`size` bytes; fewer only at the end."""
        data = self.piece[self.at:self.at + size]
        self.at += len(data)
        if len(data) < size:
            parts, left = [data], size - len(data)
            while left and self._next():
                parts.append(self.piece[:left])
                self.at = len(parts[-1])
                left -= self.at
            data = b"".join(parts)
        self.position += len(data)
        return data

    def skip_to(self, position):
        """Skip the bytes before a position; whether the stream reaches it."""
        left = position - self.position
        step = min(left, len(self.piece) - self.at)
        while True:
            self.at, left = self.at + step, left - step
            self.position += step
            if not left or not self._next():
                return not left
            step = min(left, len(self.piece))


def _tar_members(stream, filename, effort):
    """The members of a tar (ustar, pax, GNU, V7) as `_TarMember`s.

    The caller may read a member's data from the stream before it takes the next one. ValueError if
    the tar is damaged.

    `tarfile` is not made for archives from strangers: it accepts negative sizes, which lead back to
    headers that it has read; it reads extended headers of any size at once; it copies all global
    fields for each member; it lists all holes of a sparse file; it takes a damaged header for the
    end. (It is also slower: 258 ms for 10 MB of libraries, this 190 ms.)"""
    before = _Extended(filename)        # the extended headers before a member
    headers, limit = 0, tar_members_limit(effort.packed)
    while True:
        block = stream.read(512)
        if not block.strip(b"\0"):
            if before.kinds or not headers:
                raise ValueError("it ends behind an extended header" if headers else
                                 "it has no member")
            return
        headers += 1
        if headers > 2 * limit or before.count > 10 * limit:
            raise too_many_members(filename, limit)
        if headers > Limits.large_directory:
            effort.wait_for_turn()

        kind, size = _tar_kind(block), _tar_number(block[124:136], filename)
        if kind in "LKxXg":
            before.add(kind, size, stream)
            continue

        fields, before = before.fields, before.next()
        name = _tar_text(block[:100])
        if kind != "S" and block[345]:
            name = f"{_tar_text(block[345:500])}/{name}"
        name = fields.get("GNU.sparse.name", fields.get("path", name))
        size = _tar_number(fields.get("size", size), filename)
        if kind == "\0" and name.endswith("/") and size:
            raise BadRequest(f"'{filename}' holds '{one_line(name)}', which some readers take "
                             "for a directory, some not")

        if kind in "123456":    # links, devices, directories, pipes: no data, whatever they state
            size = 0
        is_sparse = kind == "S" or any(field.startswith("GNU.sparse.") for field in fields)
        real = (_tar_number(fields[field], filename) for field in _REAL_SIZES if field in fields)
        effort.announce(max((size, *real)))
        if kind == "S":
            effort.announce(_tar_number(block[483:495], filename))
            more = block[482]
            while more and headers <= 2 * limit:        # its list of holes continues
                more, headers = _whole(stream, 512)[504], headers + 1

        end = stream.position + size + -size % 512
        yield _TarMember(name, size, kind in "\x0007" and not name.endswith("/") and not is_sparse)
        if not stream.skip_to(end):
            raise ValueError(f"its member '{one_line(name)}' was cut")


_REAL_SIZES = ("GNU.sparse.size", "GNU.sparse.realsize")        # pax fields of sparse files
_PAX_OF_ONE = ("path", "linkpath", "size")      # fields that can't apply to all members
_PAX_RECORD = re.compile(rb"([1-9][0-9]{0,7}) ([^=\n]+)=")


class _Extended:
    """The extended headers before a tar's member: its long name, its pax fields."""

    def __init__(self, filename, sum_=0, count=0):
        self.filename = filename
        self.sum, self.count = sum_, count      # size and fields of these headers in the archive
        self.kinds, self.fields = set(), {}

    def next(self):
        """The `_Extended` for the next member."""
        if self.kinds:
            return _Extended(self.filename, self.sum, self.count)
        return self

    def add(self, kind, size, stream):
        """Read an extended header of `size` bytes."""
        self.sum += size
        if size > Limits.tar_header or self.sum > Limits.tar_headers:
            raise BadRequest(f"'{self.filename}' holds too much: extended headers of over "
                             f"{Limits.tar_header} bytes or {Limits.tar_headers} in all")

        data = _whole(stream, size + -size % 512)[:size]
        found = {}
        if kind in "xXg":
            self.count += data.count(b"\n")     # each field has at least one
            found = _pax_fields(data)
        elif kind == "L":
            found["path"] = _tar_text(data)

        if kind == "g":
            if any(field in _PAX_OF_ONE or field.startswith("GNU.sparse.") for field in found):
                raise BadRequest(f"'{self.filename}' holds one name or size for all its members")
            return

        if kind.lower() in self.kinds or found.keys() & self.fields.keys():
            raise BadRequest(f"'{self.filename}' holds a member with two extended headers that "
                             "say the same")
        self.kinds.add(kind.lower())
        self.fields.update(found)


def _pax_fields(data):
    """The fields of a pax header; `20 path=some/where\\n`, where 20 is the length of all this."""
    fields, at = {}, 0
    while at < len(data):
        match = _PAX_RECORD.match(data, at)
        end = at + int(match[1]) if match else 0
        if not match or match.end() >= end or data[end - 1:end] != b"\n":
            raise ValueError("an extended header is damaged")
        field, value = match[2], data[match.end():end - 1]
        fields[field.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at = end
    return fields


_BELOW_128 = bytes(range(128))


def _tar_kind(block):
    """The type of a tar's header, one character; ValueError if the header is damaged."""
    if len(block) < 512:
        raise ValueError("it was cut")
    stated = re.match(rb"[ \0]*([0-7]{1,8})", block[148:156])
    rest = block[:148] + block[156:]
    found = sum(rest) + 8 * 32      # the checksum's own field counts as spaces
    # some tools add up signed bytes
    if not stated or int(stated[1], 8) != found and \
            int(stated[1], 8) != found - 256 * len(rest.translate(None, _BELOW_128)):
        raise ValueError("a header is damaged")
    return chr(block[156])


def _tar_number(field, filename):
    """The number in a header (octal, or GNU tar's base 256 for large ones) or a pax field
    (text)."""
    if isinstance(field, int):
        return field
    if isinstance(field, str):
        text, base = field, 10
    elif field[0] in (0x80, 0xff):
        below = 256 ** (len(field) - 1) if field[0] == 0xff else 0
        text, base = str(int.from_bytes(field[1:], "big") - below), 10
    else:
        text, base = field.partition(b"\0")[0].decode("latin-1").strip() or "0", 8
    if re.fullmatch(r"-[0-9]{1,40}", text):
        raise BadRequest(f"'{filename}' holds a member with a size below zero")
    if not re.fullmatch(r"[0-7]{1,12}" if base == 8 else r"[0-9]{1,40}", text):
        raise ValueError("a number in a header is damaged")
    return int(text, base)


def _tar_text(data):
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _whole(stream, size):
    data = stream.read(size)
    if len(data) < size:
        raise ValueError("it was cut")
    return data


# -- documentation zips


class DocMember(typing.NamedTuple):
    """A member of a documentation zip that can be served.

    It has `packed` bytes from `start` on, deflated or not; `number` counts such members."""
    path: str
    number: int
    start: int
    packed: int
    size: int
    deflated: bool


def doc_members(file, filename):
    """(the servable members of a documentation zip, the number of others); None if it is no zip.

    Reads every member, so that serving it later can't fail. BadRequest for a zip that is encrypted,
    has no readable member, or unpacks to too much."""
    with Effort(file, filename, Limits.doc_bytes) as effort:
        try:
            infos = _zip_members(file, filename, Limits.doc_members, effort)
        except BrokenArchive as problem:
            log.info("documentation: %s", problem.message)
            return None
        return _readable_members(file, filename, infos, effort)


def _readable_members(file, filename, infos, effort):
    # some tools write only backslashes, and programs that unpack zips take them for separators
    has_slashes = any("/" in info.orig_filename for info in infos)
    infos = [info for info in infos if not info.orig_filename.endswith(("/", "\\"))]
    _check_doc_sizes(infos, filename)

    readable = {}
    for info in infos:
        name = _doc_name(info.orig_filename, has_slashes)
        if _is_servable(name, info) and _reads_well(file, info, filename, effort):
            readable[name] = info
    if not readable:
        raise BadRequest(f"'{filename}' has no member that can be read")

    root = _doc_root(readable)
    members = []
    for name, info in readable.items():
        if name.startswith(root):
            file.seek(info.header_offset + 26)
            start = info.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))
            members.append(DocMember(name[len(root):], len(members), start, info.compress_size,
                                     info.file_size, info.compress_type == zipfile.ZIP_DEFLATED))
    return members, len(infos) - len(members)


def _doc_name(name, has_slashes):
    """A member's name as a path of the documentation."""
    if not has_slashes:
        name = name.replace("\\", "/")
    while name.startswith("./"):
        name = name[2:]
    return name


def _check_doc_sizes(infos, filename):
    if len(infos) > Limits.doc_members:
        raise BadRequest(f"'{filename}' has {len(infos)} members, {Limits.doc_members} are allowed")
    if sum(info.file_size for info in infos) > Limits.doc_bytes:
        raise BadRequest(f"'{filename}' unpacks to more than {Limits.doc_bytes} bytes")
    for info in infos:
        if info.flag_bits & 1:
            raise BadRequest(f"'{filename}' is encrypted")
        if info.file_size > Limits.doc_member:
            raise BadRequest(f"'{filename}' has a member of {info.file_size} bytes, "
                             f"{Limits.doc_member} are allowed")
        if info.file_size > 1 << 20 and info.file_size > Limits.doc_ratio * info.compress_size:
            raise BadRequest(f"'{filename}' has a member that unpacks to more than "
                             f"{Limits.doc_ratio} times its size")


def is_doc_path(path):
    """Whether a path may name a member: on no system does a segment lead elsewhere [W15.4]."""
    first, *_ = segments = path.split("/")
    return not {"", ".", ".."}.intersection(segments) and ":" not in first and \
        re.search(r"[\\\x00-\x1f\x7f\ud800-\udfff]", path) is None and len(path) <= 1000


def _is_servable(name, info):
    """Whether a zip's member is a plain file with a safe name."""
    is_link = info.create_system == 3 and info.external_attr >> 28 == 0o12
    return not is_link and is_doc_path(name)


def _reads_well(file, info, filename, effort):
    """Whether a member unpacks to what the directory says."""
    try:
        for _ in _member_pieces(file, filename, info, effort):
            pass
    except BrokenArchive as problem:
        log.info("documentation: %s", problem.message)
        return False
    return True


def _doc_root(names):
    """The folder of the documentation, with a slash at its end.

    "" if index.html is at the top; else the only folder at the top that has one, or ""."""
    tops = {name.partition("/")[0] + "/" for name in names
            if name.endswith("/index.html") and name.count("/") == 1}
    return tops.pop() if len(tops) == 1 and "index.html" not in names else ""


def inflated(file, member, start=0):
    """The bytes of a deflated member from byte `start` on, in pieces."""
    file.seek(member.start)
    unzip, left, skip, data = zlib.decompressobj(-15), member.packed, start, b""
    while not unzip.eof:
        if not data and left:
            data = file.read(min(left, 64 << 10))
            if not data:
                raise OSError("the documentation zip was cut")
            left -= len(data)
        piece, data = unzip.decompress(data, 256 << 10), unzip.unconsumed_tail
        if not (piece or data or left):
            return
        if len(piece) > skip:
            yield piece[skip:]
        skip = max(0, skip - len(piece))


def member_bytes(file, member):
    """The bytes of a member, in pieces."""
    if member.deflated:
        yield from inflated(file, member)
    else:
        file.seek(member.start)
        yield file.read(member.size)


# ==================================================================================================
# 7  Users and permissions
#
# Accounts, password hashes, session tokens, and one table of who may do what. Secrets are compared
# in constant time; a new password ends all sessions of its user.
# ==================================================================================================


ANONYMOUS, AUTHENTICATED = ":ANONYMOUS:", ":AUTHENTICATED:"
_SCRYPT = {"n": 1 << 15, "r": 8, "p": 1, "maxmem": 64 << 20}
_PBKDF2_ROUNDS = 600000
_hashing = threading.BoundedSemaphore(PROCESSORS)       # scrypt takes 32 MiB for each
_new_hashes = threading.BoundedSemaphore(4)             # they share `_hash_line` with logins
_hash_line = threading.BoundedSemaphore(PROCESSORS + Limits.waiting_hashes)


def hash_password(password):
    """`scrypt:n=...,r=...,p=...:salt:hash` (RFC 7914); without scrypt,
    `pbkdf2_sha256:rounds:salt:hash`."""
    if not _new_hashes.acquire(timeout=0.1):
        raise Busy("too many passwords are being set just now, try again", 2)
    try:
        return _new_hash_of(password)
    finally:
        _new_hashes.release()


def _new_hash_of(password):
    salt = secrets.token_bytes(16)
    if hasattr(hashlib, "scrypt"):
        prefix = f"scrypt:n={_SCRYPT['n']},r={_SCRYPT['r']},p={_SCRYPT['p']}"
    else:
        prefix = f"pbkdf2_sha256:{_PBKDF2_ROUNDS}"
    return f"{prefix}:{salt.hex()}:{_derive(prefix, password, salt).hex()}"


def check_password(stored, password):
    """Whether a password fits a hash of `hash_password`."""
    prefix, salt, digest = stored.rsplit(":", 2)
    return hmac.compare_digest(_derive(prefix, password, bytes.fromhex(salt)).hex(), digest)


def _derive(prefix, password, salt):
    method, _, parameters = prefix.partition(":")
    data = password.encode("utf-8", "surrogatepass")
    with _turn_to_hash():
        if method == "scrypt":
            cost = dict(part.split("=") for part in parameters.split(","))
            return hashlib.scrypt(data, salt=salt, maxmem=_SCRYPT["maxmem"], dklen=32,
                                  **{k: int(v) for k, v in cost.items()})
        return hashlib.pbkdf2_hmac("sha256", data, salt, int(parameters))


@contextlib.contextmanager
def _turn_to_hash():
    """Wait for a turn to hash, outside of the crew of workers; Busy if too many wait."""
    busy = Busy("too many passwords are being checked just now, try again", 2)
    if not _hash_line.acquire(blocking=False):
        raise busy
    try:
        if not _hashing.acquire(blocking=False):
            with outside_wait() as room:
                if not room:
                    raise busy
                _hashing.acquire()
        try:
            yield
        finally:
            _hashing.release()
    finally:
        _hash_line.release()


# -- devpi's passwords: argon2 (RFC 9106), and a salted SHA-256 before devpi 4.2


class Argon2(typing.NamedTuple):
    """A hash as devpi stores it, `$argon2id$v=19$m=65536,t=3,p=4$salt$digest`."""
    kind: str           # argon2i or argon2id
    version: int        # 19; 16 is the one before the RFC
    memory: int         # KiB
    passes: int
    lanes: int
    salt: bytes
    digest: bytes

    @property
    def text(self):
        salt, digest = (base64.b64encode(data).rstrip(b"=").decode()
                        for data in (self.salt, self.digest))
        return (f"${self.kind}$v={self.version}$m={self.memory},t={self.passes},p={self.lanes}"
                f"${salt}${digest}")

    @property
    def blocks(self):
        """What computing it costs, in KiB that are written."""
        return self.memory * self.passes


_ARGON2 = re.compile(
    r"\$(argon2id?)(?:\$v=(16|19))?\$m=([1-9][0-9]{0,6}),t=([1-9][0-9]{0,6}),p=([1-9][0-9]?)"
    r"\$([A-Za-z0-9+/]+)\$([A-Za-z0-9+/]+)")


def argon2_of(text):
    """The `Argon2` that a text is; None if it is none, or costs more than `Limits` allow."""
    match = _ARGON2.fullmatch(text) if len(text) < 500 else None
    if not match:
        return None
    kind, version, memory, passes, lanes, *data = match.groups()
    try:
        salt, digest = (base64.b64decode(part + "=" * (-len(part) % 4)) for part in data)
    except ValueError:
        return None
    found = Argon2(kind, int(version or 16), int(memory), int(passes), int(lanes), salt, digest)
    fits = 8 * found.lanes <= found.memory <= Limits.argon2_memory \
        and found.blocks <= Limits.argon2_blocks and found.lanes <= Limits.argon2_lanes \
        and 8 <= len(salt) <= 64 and 16 <= len(digest) <= 64
    return found if fits else None


_DEVPI_SHA256 = "devpi_sha256"


def imported_hash(pwhash, pwsalt=None):
    """What to store as an account's `pwhash`, from `pwhash` and `pwsalt` of a user in a dump of
    devpi; None if there is none: nobody can log in as such a user.

    ValueError with a sentence for texts that no login could check."""
    if pwhash is None or pwhash == "":
        return None
    if not isinstance(pwhash, str) or not isinstance(pwsalt, (str, type(None))):
        raise ValueError("pwhash and pwsalt have to be texts")
    if argon2_of(pwhash):
        return pwhash
    if pwhash.startswith("$argon2"):
        raise ValueError("pwhash is an argon2 hash of a form or with costs that are not taken "
                         f"here: {ascii(pwhash[:60])}")
    if pwsalt:
        stored = f"{_DEVPI_SHA256}:{pwsalt}:{pwhash.lower()}"
        if _salted_sha256(stored):
            return stored
        raise ValueError("pwhash is no SHA-256, or pwsalt no text of at most 100 letters of ASCII")
    raise ValueError("pwhash is neither an argon2 hash nor a SHA-256 with its pwsalt")


def _salted_sha256(stored):
    """(salt, digest) of `devpi_sha256:salt:digest`; None for other texts."""
    match = re.fullmatch(_DEVPI_SHA256 + r":([!-~]{1,100}):([0-9a-f]{64})", stored)
    return match.groups() if match else None


def is_password_hash(text):
    """Whether a text has the form of what an account's `pwhash` can be."""
    return isinstance(text, str) and bool(
        _OWN_HASH.fullmatch(text) or _salted_sha256(text) or argon2_of(text))


_OWN_HASH = re.compile("(scrypt:n=[0-9]{1,7},r=[0-9]{1,3},p=[0-9]{1,3}|pbkdf2_sha256:[0-9]{1,8})"
                       ":[0-9a-f]{16,128}:[0-9a-f]{16,128}")


def hash_for_devpi(value):
    """(the `pwhash` that a dump for devpi gives a user, whether the password survives), from the
    value of the user's row.

    That is always an argon2 hash: devpi takes any password of none, or the empty one, for right if
    there is no hash, and fails with 500 for other texts, among them its own salted SHA-256 of old.
    Where no argon2 hash of the password is known, it is that of a random secret: logins fail until
    root sets a password. A dump never has a `pwsalt`."""
    kept = value["attributes"].get(FROM_DEVPI, {}).get("pwhash")
    for text in (value["pwhash"], kept):
        if isinstance(text, str) and argon2_of(text):
            return text, True
    nobody = Argon2("argon2id", 19, 8, 1, 1, secrets.token_bytes(16), bytes(32))
    digest = compute_argon2(nobody, secrets.token_bytes(32))
    return nobody._replace(digest=digest).text, value["pwhash"] is None


def compute_argon2(shape, password, secret=b"", data=b"", processes=1, when_forked=None):
    """The digest of a password, of the length of that of `shape`, an `Argon2`; in pure Python.

    It takes some 0.25 ms for each of `shape.blocks`, divided by `processes` if there are as many
    lanes. `when_forked` is called when no process will be forked any more."""
    kind = {"argon2i": 1, "argon2id": 2}[shape.kind]
    columns = shape.memory // (4 * shape.lanes) * 4
    words = (shape.lanes, len(shape.digest), shape.memory, shape.passes, shape.version, kind)
    seed = struct.pack("<6I", *words)
    for text in (password, shape.salt, secret, data):
        seed += struct.pack("<I", len(text)) + text
    seed = hashlib.blake2b(seed).digest()

    with mmap.mmap(-1, 1024 * shape.lanes * columns) as memory:
        for lane in range(shape.lanes):
            for column in (0, 1):
                at = 1024 * (lane * columns + column)
                memory[at:at + 1024] = _to_sides(
                    _long_blake2b(seed + struct.pack("<2I", column, lane), 1024))

        processes = min(processes, shape.lanes)

        def fill(turn, process):
            for lane in range(process, shape.lanes, processes):
                _fill_segment(shape, kind, memory, columns, lane, *divmod(turn, 4))
        with _side_by_side(fill, processes) as fill_in_all:
            if when_forked:
                when_forked()
            for turn in range(4 * shape.passes):
                fill_in_all(turn)

        last = 0
        for lane in range(1, shape.lanes + 1):
            end = 1024 * lane * columns
            last ^= int.from_bytes(memory[end - 1024:end], "little")
    return _long_blake2b(_from_sides(last.to_bytes(1024, "little")), len(shape.digest))


def _long_blake2b(data, size):
    """`size` bytes of BLAKE2b, chained if they are more than 64 (RFC 9106, 3.3)."""
    data = struct.pack("<I", size) + data
    whole = b""
    while size > 64:
        data = hashlib.blake2b(data).digest()
        whole += data[:32]
        size -= 32
    return whole + hashlib.blake2b(data, digest_size=size).digest()


def _fill_segment(shape, kind, memory, columns, lane, pass_, slice_):
    """Compute a lane's blocks of one slice (RFC 9106, 3.4); only blocks of other slices, and of
    the lane itself, are read."""
    size = columns // 4
    begin, first = slice_ * size, 2 if not (pass_ or slice_) else 0
    is_overwritten = pass_ and shape.version != 16
    is_blind = kind == 1 or not pass_ and slice_ < 2    # the password does not say what is read
    start = (slice_ + 1) * size % columns if pass_ else 0
    # of the blocks that may be read: those of the lane itself up to `column`, and of other lanes
    own, others = (columns - size - 1, columns - size) if pass_ else (begin - 1, begin)
    home = 1024 * lane * columns
    before = home + 1024 * ((begin + first - 1) % columns)
    block = int.from_bytes(memory[before:before + 1024], "little")

    for column in range(first, size):
        if is_blind:
            if column % 128 == 0 or column == first:
                where = struct.pack("<7Q", pass_, lane, slice_, shape.lanes * columns,
                                    shape.passes, kind, column // 128 + 1).ljust(1024, b"\0")
                number = _compress(_compress(int.from_bytes(_to_sides(where), "little")))
                places = struct.unpack("<256I", _from_sides(number.to_bytes(1024, "little")))
            low, high = places[column % 128 * 2:column % 128 * 2 + 2]
        else:
            low, high = block & 0xFFFFFFFF, block >> 32 & 0xFFFFFFFF

        other = high % shape.lanes if pass_ or slice_ else lane
        area = own + column if other == lane else others - (column == 0)
        distance = area - 1 - (area * (low * low >> 32) >> 32)
        read = 1024 * (other * columns + (start + distance) % columns)
        block = _compress(block ^ int.from_bytes(memory[read:read + 1024], "little"))
        at = home + 1024 * (begin + column)
        if is_overwritten:
            block ^= int.from_bytes(memory[at:at + 1024], "little")
        memory[at:at + 1024] = block.to_bytes(1024, "little")


# A block of argon2 is a matrix of 8 rows of 16 words of 64 bits, and is mixed row by row, then by
# pairs of columns.  Here it is one large integer, its columns one after the other, four of which
# are a side: so the same step is taken for 32 words at once by the few operations that an integer
# needs for all of them.  That takes a third of the time of a step for each word.

_SIDE = (1 << 2048) - 1


def _words(bits):
    """An integer with these bits in each of 32 words."""
    return sum(bits << at for at in range(0, 2048, 64))


_BELOW_TOP, _TOP, _EVEN = _words((1 << 63) - 1), _words(1 << 63), _words((1 << 64) - 2)
# (bits by which words are turned right, the bits of a word that stay within it, the others)
_TURNS = [(bits, _words((1 << 64 - bits) - 1), _words((1 << bits) - 1))
          for bits in (32, 24, 16, 63)]
_low_halves, _pack_words = struct.Struct("<" + "I4x" * 32).unpack, struct.Struct("<32Q").pack


def _to_sides(block):
    return struct.pack("<128Q", *(word for column in range(16)
                                  for word in struct.unpack("<128Q", block)[column::16]))


def _from_sides(block):
    return struct.pack("<128Q", *(word for row in range(8)
                                  for word in struct.unpack("<128Q", block)[row::8]))


def _swaps():
    """(shift, mask) of the steps that swap the rows of a block with its pairs of columns."""
    for weight in (1, 2, 4):
        mask = sum((1 << 64) - 1 << 64 * at for at in range(128)
                   if at & weight and not at & 16 * weight)
        yield 64 * 15 * weight, mask


_SWAPS = list(_swaps())


def _compress(block):
    """The function G of RFC 9106, 3.5, of two blocks whose XOR is given."""
    mixed = block
    for _ in range(2):
        a, b, c, d = (mixed >> at & _SIDE for at in range(0, 8192, 2048))
        a, b, c, d = _mix(a, b, c, d)
        a, b, c, d = _mix(a, _turned(b, 512), _turned(c, 1024), _turned(d, 1536))
        mixed = a | _turned(b, 1536) << 2048 | _turned(c, 1024) << 4096 | _turned(d, 512) << 6144
        for shift, mask in _SWAPS:
            differing = (mixed ^ mixed >> shift) & mask
            mixed ^= differing ^ differing << shift
    return block ^ mixed


def _turned(side, bits):
    """A side with its columns turned: diagonals become rows, or the other way around."""
    return side >> bits | side << 2048 - bits & _SIDE


def _mix(a, b, c, d):
    """The function GB of RFC 9106, 3.6, of the words of four sides."""
    for bits, staying, leaving in _TURNS:
        # a, d = a + b + 2 * (low half of a) * (low half of b), d ^ a turned right by `bits`
        product = int.from_bytes(_pack_words(*map(
            operator.mul, _low_halves(a.to_bytes(256, "little")),
            _low_halves(b.to_bytes(256, "little")))), "little") << 1 & _EVEN
        total = (a & _BELOW_TOP) + (b & _BELOW_TOP) ^ (a ^ b) & _TOP
        total = (total & _BELOW_TOP) + (product & _BELOW_TOP) ^ (total ^ product) & _TOP
        d ^= total
        d = d >> bits & staying | (d & leaving) << 64 - bits
        a, b, c, d = c, d, total, b         # then the same with c, d and b
    return a, b, c, d


@contextlib.contextmanager
def _side_by_side(work, processes):
    """A function that runs `work(turn, n)` for each n below `processes` at the same time, and
    returns when all have ended. This process does it for 0, forked ones for the others.

    They end with this process."""
    pipes = []
    try:
        for number in range(1, processes):
            orders, order = os.pipe()
            ends, end = os.pipe()
            if not os.fork():
                _obey(work, number, orders, end, (order, ends))
            os.close(orders)
            os.close(end)
            pipes.append((order, ends))

        def run(turn):
            for order, _ in pipes:
                os.write(order, struct.pack("<I", turn))
            work(turn, 0)
            for _, ends in pipes:
                if not os.read(ends, 1):
                    raise OSError(errno.ECHILD, "a process that computes a hash was killed")
        yield run
    finally:
        for pipe in pipes:
            for end in pipe:
                os.close(end)


def _obey(work, number, orders, end, of_the_other):
    """In a forked process: do the work for each turn that is ordered; never returns."""
    try:
        for descriptor in of_the_other:
            os.close(descriptor)        # or it would keep the pipe of its own orders open
        while True:
            order = os.read(orders, 4)
            if not order:
                break
            work(struct.unpack("<I", order)[0], number)
            os.write(end, b".")
    finally:
        os._exit(0)


# -- who


@dataclasses.dataclass(frozen=True)
class Identity:
    """Who makes a request; `user` is None for anonymous ones.

    `wait`: seconds until credentials are looked at again."""
    user: str | None = None
    groups: tuple = ()
    wait: int = 0
    expires: float = 0          # time.monotonic() when these credentials expire

    @property
    def principals(self):
        """The names for this identity in ACLs."""
        if self.user is None:
            return {ANONYMOUS}
        return {ANONYMOUS, AUTHENTICATED, self.user, *(":" + group for group in self.groups)}


NOBODY = Identity()


@dataclasses.dataclass(frozen=True)
class Account:
    """A user's row."""
    id: int
    name: str
    pwhash: str | None
    generation: str
    created: str
    modified: str | None
    attributes: dict


USER_ATTRIBUTES = ("email", "title", "description", "custom_data")
# the attribute of a user, and the option of an index, with what a dump of devpi says of them and
# what has no meaning here: kept for an export, never shown
FROM_DEVPI = "+devpi"


def check_name(kind, name):
    """Refuse a new user or index name that devpi refuses [W7.1], or that looks like another one.

    Only ASCII's letters and digits are allowed: many others look like them, or are invisible. A
    name that begins with a dot could lead up in a path."""
    check_devpi_name(kind, name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]*", name):
        raise BadRequest(f"{kind} {ascii(name)} is not allowed: a new name has ASCII letters, "
                         "digits and -.@_ only, and begins with a letter or digit.")


def check_devpi_name(kind, name):
    """Refuse a user or index name that devpi refuses [W7.1], or that leads up in a path."""
    if not name or re.search(
            r"""[\x00-\x20\x7f-\x9f!"#$%&'()*+,/:;<=>?\[\\\]^`{|}~\ud800-\udfff]""", name):
        raise BadRequest(f"{kind} '{name}' contains characters that aren't allowed. "
                         "Any ascii symbol besides -.@_ is blocked.")
    if name in (".", ".."):
        raise BadRequest(f"{kind} '{name}' is not allowed: it leads to another place in a path.")
    if len(name) > Limits.user_name:
        raise BadRequest(f"a {kind} has at most {Limits.user_name} characters")


def announce_event(change, event):
    """A change that only announces an event."""
    change.happened(event)


class Users:
    """The accounts of a store; `open_root`: the operator lets root's password be empty."""

    def __init__(self, store, open_root=False):
        self.store, self.open_root = store, open_root
        self.cache = store.freshness.cache(4 << 20)

    def find(self, name):
        """The account of that name, or None."""
        account = self.cache.get(name)
        if account is None:
            since = self.store.freshness.moment()
            with self.store.read() as db:
                account = _account_named(db, name)
            if account is None:
                return None
            self.store.freshness.keep(self.cache, name, account, 1000,
                                      frozenset((user_tag(name),)), since)
        return account

    def get(self, name):
        account = self.find(name)
        if account is None:
            raise NotFound(f"no user '{name}'")
        return account

    def create(self, name, body, actor=NO_ACTOR, may_inherit=True):
        """devpi: PUT /user. `body`: its JSON object.

        `may_inherit`: even if indexes still give rights to this name."""
        if self.find(name):
            raise Conflict("user already exists")
        check_name("username", name)
        unknown = set(body) - {"password", "created", "modified", "indexes", "username",
                               *USER_ATTRIBUTES}
        if unknown:
            raise BadRequest(f"Unknown keys in user config: {', '.join(sorted(map(str, unknown)))}")
        if "password" not in body:
            raise BadRequest("password needs to be set")

        check_attributes(body, {})
        attributes = {k: body[k] for k in USER_ATTRIBUTES if body.get(k) not in (None, "", {}, [])}
        check_size("user", attributes)
        pwhash = _new_hash(body["password"])
        return self.store.write(insert_user, name, pwhash, attributes, may_inherit, actor=actor)

    def modify(self, name, body, actor=NO_ACTOR):
        """devpi: PATCH /user. Ignores unknown keys; an empty value removes an attribute."""
        account = self.get(name)
        check_attributes(body, account.attributes)
        changes = {k: body[k] for k in USER_ATTRIBUTES if k in body}
        check_size("user", changes)
        if body.get("password") is not None:
            changes["pwhash"] = _new_hash(body["password"], name == "root" and self.open_root)
        return self.store.write(_update_user, name, changes, actor=actor)


def check_size(kind, attributes):
    """Refuse attributes that would make every list of them huge."""
    if len(json.dumps(attributes)) > Limits.attributes:
        raise TooLarge(f"the attributes of a {kind} may take {Limits.attributes} bytes at most")

    level, count = [attributes], 0
    while level:
        count += len(level)
        level = inner_values(level)
    if count > Limits.attribute_values:
        raise TooLarge(f"the attributes of a {kind} may hold {Limits.attribute_values} "
                       "values at most")


def inner_values(values):
    """The values inside the lists and objects among some JSON values."""
    return [inner for value in values if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)]


def json_kind(value):
    """The type of a JSON value, in words."""
    return {bool: "true or false", dict: "an object", list: "a list", str: "a text",
            type(None): "null"}.get(type(value), "a number")


def check_attributes(body, before):
    """Refuse attributes of a wrong type, except stored ones, which the devpi client sends back as
    they are."""
    for key in USER_ATTRIBUTES:
        value = body.get(key)
        if key != "custom_data" and value not in (None, "", {}, []) and not isinstance(value, str) \
                and value != before.get(key):
            raise BadRequest(f"'{key}' of a user must be a text, not {json_kind(value)}")


def _new_hash(password, may_be_empty=False):
    if password is None:
        return None
    if not isinstance(password, str):
        raise BadRequest(f"the password must be a string, not {json_kind(password)}")
    if not password and not may_be_empty:
        raise BadRequest("the password must have at least one character")
    return hash_password(password)


def account_of(row):
    return Account(row["id"], row["name"], row["pwhash"], row["generation"],
                   row["created"], row["modified"], json.loads(row["attributes"]))


@row("user")
class UserRows(RowKind):
    """(name,) -> {"pwhash", "generation", "created", "modified", "attributes": {...}}: accounts."""
    table = source = "users"
    key, order = ("name",), "id"
    facts = fields = ("pwhash", "generation", "created", "modified", "attributes")

    def value(self, db, row):
        return {**super().value(db, row), "attributes": json.loads(row["attributes"])}

    def columns(self, change, key, value):
        return {**value, "attributes": json.dumps(value["attributes"])}

    def wrote(self, change, key, value, row_id, is_new):
        change.touch(user_tag(key[0]))
        if value is None:
            change.touch(INDEXES)
            change.queue_for_search(0, "")


def insert_user(change, name, pwhash, attributes, may_inherit=True):
    if change.id_of("user", (name,)):
        raise Conflict("user already exists")
    if not may_inherit:
        refuse_inheritance(change.db, name)
    change.put("user", (name,), {
        "pwhash": pwhash, "generation": secrets.token_hex(8), "created": plain_time(time.time()),
        "modified": None, "attributes": attributes})
    change.happened(Event("user.create", target=name))
    return _account_named(change.db, name)


ACL_KEYS = ("acl_upload", "acl_toxresult_upload", "acl_pkg_read")


def configs_naming(db, user):
    """[(user, index name, configuration)] of the indexes with a user in their ACLs or bases."""
    word = json.dumps(user)[:-1]        # as in the JSON, without the final quote
    rows = db.execute(
        "SELECT users.name AS user, indexes.name, config FROM indexes "
        "JOIN users ON users.id = user_id "
        "WHERE instr(config, ?) OR instr(config, ?) ORDER BY users.name, indexes.name",
        (word + '"', word + "/")).fetchall()
    found = [(row["user"], row["name"], json.loads(row["config"])) for row in rows]
    return [(owner, name, config) for owner, name, config in found
            if any(user in config.get(key, ()) for key in ACL_KEYS)
            or any(base.startswith(user + "/") for base in config.get("bases", ()))]


def refuse_inheritance(db, user):
    """Refuse a new user whose name indexes give rights to: the new user would get them.

    Does not name the indexes, because the caller may not be allowed to read them."""
    if configs_naming(db, user):
        raise Forbidden(f"the name '{user}' still stands in the ACLs or bases of indexes: "
                        "only root may make this user")


def _update_user(change, name, changes):
    before = change.get("user", (name,))
    if before is None:
        raise NotFound(f"no user '{name}'")

    attributes = dict(before["attributes"])
    for key, value in changes.items():
        if key != "pwhash":
            attributes[key] = value
            if value in (None, "", {}, []):
                del attributes[key]

    if attributes != before["attributes"] or "pwhash" in changes:
        after = {**before, "attributes": attributes, "modified": plain_time(time.time())}
        changed = {key for key in USER_ATTRIBUTES
                   if attributes.get(key) != before["attributes"].get(key)}
        if "pwhash" in changes:
            after.update(pwhash=changes["pwhash"], generation=secrets.token_hex(8))
            changed.add("password")
        change.put("user", (name,), after)
        change.happened(Event("user.modify", target=name, detail=", ".join(sorted(changed))))
    return _account_named(change.db, name)


def _account_named(db, name):
    """The account of that name, or None."""
    row = db.execute("SELECT * FROM users WHERE name = ?", (name,)).fetchone()
    return account_of(row) if row else None


@functools.lru_cache(maxsize=10000)
def place_of(address):
    """The place that a login comes from: an IPv4 address, or the /64 network of an IPv6 address,
    because one customer has all its addresses."""
    ip = ip_of(address)
    if ip is None:
        return address
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))


class Tokens:
    """Session tokens: devpi's POST /+login gives one for a password."""

    def __init__(self, users, secret):
        self.users, self.key = users, hmac.new(secret, b"devpi_lite session", "sha256").digest()

    def issue(self, account):
        """A token: base64url of JSON [user, generation, end], a dot, base64url of an HMAC-SHA256
        of that JSON."""
        end = int(time.time()) + Limits.session
        payload = json.dumps([account.name, account.generation, end]).encode()
        return f"{_base64url(payload)}.{_base64url(self._mac(payload))}"

    def _mac(self, payload):
        return hmac.new(self.key, payload, "sha256").digest()

    def check(self, user, token):
        """The identity of a token of that user, or None."""
        payload, dot, mac = token.partition(".")
        if not dot:
            return None
        try:
            payload, mac = _from_base64url(payload), _from_base64url(mac)
        except ValueError:
            return None
        if not hmac.compare_digest(mac, self._mac(payload)):
            return None
        name, generation, end = json.loads(payload)
        account = self.users.find(name)
        left = end - time.time()
        if name != user or account is None or account.generation != generation \
                or not 0 < left <= Limits.session:
            return None
        return Identity(user, expires=time.monotonic() + left)


class PasswordMemory:
    """Remembers for some minutes whether a password fits, because its hash takes 50 ms.

    Keeps keyed digests, which disclose no password."""

    def __init__(self):
        self.key = secrets.token_bytes(32)
        self.remembered = collections.OrderedDict()     # digest -> (fits, until)
        self.lock = threading.Lock()

    def digest(self, user, pwhash, password):
        """What a password is remembered under while the account has this hash."""
        text = f"{user}\n{pwhash}\n{password}".encode("utf-8", "surrogatepass")
        return hmac.new(self.key, text, "sha256").digest()

    def recall(self, digest):
        """(whether the password fits, whether that is remembered)."""
        fits, until = self.remembered.get(digest, (False, 0))
        known = until >= time.monotonic()
        return fits and known, known

    def remember(self, digest, fits):
        with self.lock:
            self.remembered[digest] = (fits, time.monotonic() + Limits.password_memory)
            self.remembered.move_to_end(digest)
            while len(self.remembered) > Limits.remembered_passwords:
                self.remembered.popitem(last=False)

    def renew(self, digest):
        """Remember a password that fits for another while.

        Each request calls this, so it acts only in the second half of the time."""
        until = self.remembered.get(digest, (True, 0))[1]
        if until - time.monotonic() < Limits.password_memory / 2:
            self.remember(digest, True)


class Throttle:
    """Slows down wrong passwords: by account and place, by place, and by account."""

    def __init__(self):
        # (account, place) -> (count, time.monotonic() of the end of the wait, of the last failure)
        self.failures = collections.OrderedDict()
        self.fitted = collections.OrderedDict()     # (account, place) -> digest that last fitted
        self.at_place = Budget(Limits.failed_logins_at_address, Limits.address_pause)
        self.to_account = Budget(Limits.failed_logins_to_account, Limits.account_pause)
        self.looks = Budget(Limits.looks, Limits.look_pause)
        self.new_users = Budget(Limits.new_users, Limits.new_user_pause)
        self.lock = threading.Lock()

    def wait_for(self, user, place):
        """Seconds for which no password for this account is looked at from this place."""
        _, until, _ = self.failures.get((user, place), (0, 0, 0))
        is_known = (user, place) in self.fitted
        wait = max(until - time.monotonic(), self.at_place.wait(place),
                   0 if is_known else self.to_account.wait(user))
        return max(0, int(wait + 0.999))

    def is_exempt(self, user, place, digest, is_known):
        """Whether a password is accepted while its place, or its account, has to wait.

        Only one that last fitted from the same place: otherwise a guesser could find out at full
        speed which one another place uses. `Limits.looks` bounds guesses from the same place that
        are not `is_known`."""
        with self.lock:
            if self.looks.wait((user, place)):
                return False
            if not is_known:
                self.looks.take((user, place))
            return self.fitted.get((user, place)) == digest

    def count_attempt(self, user, place):
        """Count an attempt as failed until it succeeds; return the seconds to wait, or 0."""
        now = time.monotonic()
        with self.lock:
            wait = self.wait_for(user, place)
            count, until, last = self.failures.pop((user, place), (0, 0, 0))
            if now - last > Limits.failure_memory:
                count = 0
            if not wait:
                count += 1
                extra = count - Limits.failed_logins
                until = now + min(2 ** extra, Limits.longest_login_wait) if extra >= 0 else 0
                last = now
                self.at_place.take(place)
                if (user, place) not in self.fitted:
                    self.to_account.take(user)
            self.failures[user, place] = (count, until, last)
            while len(self.failures) > Limits.remembered_failures:
                self.failures.popitem(last=False)

        if wait:
            log.warning("%d failed logins as %s from %s: the next is looked at in %d s",
                        count, one_line(user, 60), place, wait)
        return wait

    def record_fit(self, user, place, digest):
        """After a password fitted: undo `count_attempt`, and end the wait at its place."""
        with self.lock:
            self._take_back(user, place)
            self._note_fit((user, place), digest)

    def undo_attempt(self, user, place):
        """Undo `count_attempt`: the password was not looked at."""
        with self.lock:
            count, last = self._take_back(user, place)
            if count > 1:
                self.failures[user, place] = (count - 1, 0, last)

    def _take_back(self, user, place):
        count, _, last = self.failures.pop((user, place), (0, 0, 0))
        if count:
            self.at_place.give_back(place)
            if (user, place) not in self.fitted:
                self.to_account.give_back(user)
        return count, last

    def record_known_fit(self, user, place, digest):
        """After a known password fitted again: programs send theirs all the time, so that does not
        clear what others tried meanwhile."""
        if self.fitted.get((user, place)) != digest:
            with self.lock:
                self._note_fit((user, place), digest)

    def _note_fit(self, key, digest):
        self.fitted[key] = digest
        self.fitted.move_to_end(key)
        while len(self.fitted) > Limits.remembered_failures:
            self.fitted.popitem(last=False)

    def count_new_user(self, address):
        """TooManyLogins if too many users were registered from this address: each costs a slow
        hash."""
        place = place_of(address)
        with self.lock:
            wait = self.new_users.wait(place)
            if wait:
                raise TooManyLogins(int(wait + 0.999), "new users from this address")
            self.new_users.take(place)


class Logins:
    """Turns session tokens and passwords into an `Identity`."""

    def __init__(self, users, secret):
        self.users, self.tokens = users, Tokens(users, secret)
        self.passwords, self.throttle = PasswordMemory(), Throttle()
        self.turns = Turns()    # by digest: fifty parallel requests cost one slow hash
        # failed logins in the audit log: bounded, or they could push out everything else
        self.noted = Rate(60, Limits.audited_failures, Limits.audited_failures)

    def check(self, user, secret, address, is_login=False):
        """The identity of a user with a session token or a password; anonymous if neither fits.

        A repeated wrong password counts as an attempt only if `is_login`: an installer with an
        old password in its URL sends it with every request. Busy if too many passwords wait for
        their hash."""
        if len(user) > Limits.user_name:
            return NOBODY       # no user has such a name
        identity = self.tokens.check(user, secret)
        if identity:
            return identity

        place, account = place_of(address), self.users.find(user)
        pwhash = account.pwhash if account and account.pwhash is not None else ""
        digest = self.passwords.digest(user, pwhash, secret)
        wait = self.throttle.wait_for(user, place)
        if wait:
            fits, known = self.passwords.recall(digest)
            passes = self.throttle.is_exempt(user, place, digest, known) and fits
            return self._identity(user) if passes else Identity(wait=wait)

        with self.turns.turn(digest, -1):
            fits, known = self.passwords.recall(digest)
            if not known or is_login and not fits:
                wait = self.throttle.count_attempt(user, place)
                if wait:
                    return Identity(wait=wait)
                if not known:
                    fits = self._hash(user, place, pwhash, secret)
                    self.passwords.remember(digest, fits)
            if not fits:
                if not known or is_login:
                    self._note_failure(user, address)
                wait = self.throttle.wait_for(user, place)
                return Identity(wait=wait) if wait else NOBODY
            if known and not is_login:
                self.passwords.renew(digest)
                self.throttle.record_known_fit(user, place, digest)
            else:
                self.throttle.record_fit(user, place, digest)
        return self._identity(user)

    def _hash(self, user, place, pwhash, password):
        """Whether a password fits its slow hash."""
        try:
            return bool(pwhash) and check_password(pwhash, password)
        except Busy:
            self.throttle.undo_attempt(user, place)
            raise

    @staticmethod
    def _identity(user):
        return Identity(user, expires=time.monotonic() + Limits.password_memory)

    def _note_failure(self, user, address):
        """Announce a failed login, for the audit log."""
        if self.noted.take(""):
            return
        with contextlib.suppress(Problem):      # the caller hears of the failed login in any case
            self.users.store.write(announce_event, Event("login.failed", target=sound(user)),
                                   actor=Actor(address=address), durable=False)


def _base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _from_base64url(text):
    if not re.fullmatch(r"[A-Za-z0-9_-]*", text):
        raise ValueError("not base64url")
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def decode_credentials(text):
    """(user, secret) from the base64 of `user:secret`; None for other texts."""
    try:
        data = base64.b64decode(text.strip(), validate=True)
    except (ValueError, binascii.Error):
        return None
    try:
        decoded = data.decode("utf-8")
    except UnicodeDecodeError:
        decoded = data.decode("latin-1")
    user, colon, secret = decoded.partition(":")
    return (user, secret) if colon else None


class Permissions:
    """The table of who may do what [W6], with and without --restrict-modify."""

    def __init__(self, settings):
        self.listed = None if settings.restrict_modify is None else set(settings.restrict_modify)
        self.open_registration = settings.open_registration

    def _may_modify(self, identity, owner):
        """Root and the owner; with --restrict-modify, only those listed."""
        if self.listed is None:
            return identity.user is not None and identity.user in ("root", owner)
        return not self.listed.isdisjoint(identity.principals)

    def user_create(self, identity, is_local):
        """Everybody on this machine (`is_local`), or with --open-registration everywhere; else
        root."""
        if self.listed is None and (is_local or self.open_registration):
            return True
        return self._may_modify(identity, None)

    def user_create_named(self, identity):
        """Create a user whose name is in ACLs or bases: root and those listed, who could put it
        there."""
        if identity.user is None:
            return False
        listed = self.listed or ()
        return identity.user == "root" or identity.user in listed \
            or any(":" + group in listed for group in identity.groups)

    def user_modify(self, identity, name):
        return self._may_modify(identity, name)

    def user_modify_password(self, identity, name):
        return identity.user == name or self._may_modify(identity, name)

    def user_delete(self, identity, name):
        if name == "root" or self.listed is not None and identity.user == name:
            return False
        return self._may_modify(identity, name)

    def index_modify(self, identity, owner):
        """Create, change or delete an index of this owner."""
        return self._may_modify(identity, owner)

    def upload(self, identity, index):
        return not identity.principals.isdisjoint(index.config.get("acl_upload", ()))

    def upload_test_results(self, identity, index):
        return not identity.principals.isdisjoint(index.config.get("acl_toxresult_upload", ()))

    def delete_files(self, identity, index):
        return self.upload(identity, index) or self._may_modify(identity, index.user)

    def read(self, identity, index):
        acl = index.config.get("acl_pkg_read")
        return acl is None or identity.user is not None and identity.user in ("root", index.user) \
            or not identity.principals.isdisjoint(acl)


# ==================================================================================================
# 8  Indexes
#
# The configuration of an index, and the order in which an index and its bases are asked. Values are
# coerced and checked here, so that the later chapters can trust them.
# ==================================================================================================


@dataclasses.dataclass(frozen=True)
class Index:
    """A stage or a mirror; `config` holds coerced values, and lacks keys that are not set."""
    id: int
    user: str
    name: str
    config: dict

    @property
    def path(self):
        return f"{self.user}/{self.name}"

    @property
    def type(self):
        return self.config["type"]

    @property
    def mirror_url(self):
        """Upstream's URL, with or without a final slash; "" if there is none."""
        return self.config.get("mirror_url", "")

    @property
    def is_mirror(self):
        return self.config["type"] == "mirror"

    @property
    def volatile(self):
        return self.config["volatile"]

    @property
    def restricted(self):
        """Whether not everybody may read the index."""
        return ANONYMOUS not in self.config.get("acl_pkg_read", (ANONYMOUS,))


def _to_bool(key, value):
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "yes", "false", "no"):
        return value.lower() in ("true", "yes")
    raise BadRequest(f"Unknown boolean value {value!r}. ({key})")


def _to_list(key, value):
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",")]
        return [item for item in value if item]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise BadRequest(f"Unknown list value {value!r}. ({key})")


def _to_acl(key, value):
    return [item.upper() if item.upper() in (ANONYMOUS, AUTHENTICATED) else item
            for item in _to_list(key, value)]


def _to_whitelist(key, value):
    return [item if item == "*" else normalize(item) for item in _to_list(key, value)]


def _to_inheritance(key, value):
    if isinstance(value, str) and value.lower() in ("intersection", "union"):
        return value.lower()
    raise BadRequest(f"Unknown value {value!r} for mirror_whitelist_inheritance, "
                     "must be 'intersection' or 'union'.")


def _to_integer(key, value):
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10 ** 9:
        return value
    raise BadRequest(f"'{key}' option must be an integer")


def to_url(key, value):
    if isinstance(value, str) and \
            re.fullmatch(r"https?://[^\s/?#\x00-\x1f\x7f]+[^\s\x00-\x1f\x7f]*", value):
        with contextlib.suppress(ValueError):
            parts = urllib.parse.urlsplit(value)
            if parts.hostname and (parts.port is None or parts.port):
                return ascii_url(value)
    raise BadRequest(f"'{key}' option must be a URL.")


def _to_urls(key, value):
    urls = [to_url(key, item) for item in _to_list(key, value)]
    if len(urls) > Limits.webhooks:
        raise BadRequest(f"'{key}' may name {Limits.webhooks} URLs at most")
    return urls


def _to_template(key, value):
    """A URL that may have {pkgname} and {pkgversion} after its host."""
    if isinstance(value, str) and "{" in url_origin(value):
        raise BadRequest(f"'{key}' option must be a URL, "
                         "with placeholders in its path or query only.")
    to_url(key, value.replace("{pkgname}", "x").replace("{pkgversion}", "1")
           if isinstance(value, str) else value)
    return value


def _to_events(key, value):
    events = _to_list(key, value)
    unknown = [event for event in events if event not in webhook_events()]
    if unknown:
        raise BadRequest(f"unknown event '{unknown[0]}' in {key}, "
                         f"known are {', '.join(webhook_events())}")
    return events


def _to_secret(key, value):
    if isinstance(value, str) and 0 < len(value) <= 1000:
        return value
    raise BadRequest(f"'{key}' must be a text of 1 to 1000 characters")


def _to_statuses(key, value):
    """HTTP statuses, as texts."""
    items = [value] if isinstance(value, int) else value
    statuses = _to_list(key, [str(item) for item in items] if isinstance(items, list) else items)
    for status in statuses:
        if not re.fullmatch(r"4[0-9][0-9]", status) or status in PASSING_STATUSES:
            raise BadRequest(f"'{key}' may name statuses from 400 to 499 which say that there is "
                             f"nothing, such as 403, not {status!r}")
    return statuses


PASSING_STATUSES = ("408", "425", "429")        # statuses after which a retry may succeed


def _to_anything(key, value):
    return value


def _to_text(key, value):
    if isinstance(value, str):
        return value
    raise BadRequest(f"'{key}' of an index must be a text, not {json_kind(value)}")


def _to_bases(key, value):
    """Paths of indexes; old scripts write them with a slash in front."""
    return [item[1:] if item.startswith("/") else item for item in _to_list(key, value)]


ALLOW_ALL, BLOCK_REMOTE = ["allow all"], ["block type:remote if local_exists"]


def _to_rules(key, value):
    """devpi 7: which projects may come from both stages and mirrors, all or none."""
    rules = _to_list(key, value)
    if rules not in (ALLOW_ALL, BLOCK_REMOTE):
        raise BadRequest(f"Unknown value {rules!r} for {key}, "
                         f"must be {ALLOW_ALL!r} or {BLOCK_REMOTE!r}.")
    return rules


def _to_trust(key, value):
    """devpi 7's words for `mirror_whitelist_inheritance`."""
    trust = NEWER_TRUST.get(value.lower() if isinstance(value, str) else None)
    if trust is None:
        raise BadRequest(f"Unknown value {value!r} for {key}, "
                         "must be 'none', 'type:not remote' or left unset.")
    return trust


# key -> (coercion, value of a new index); None: absent until set
STAGE_KEYS = {
    "volatile": (_to_bool, True), "bases": (_to_bases, []), "acl_upload": (_to_acl, None),
    "acl_toxresult_upload": (_to_acl, [ANONYMOUS]), "mirror_whitelist": (_to_whitelist, []),
    "mirror_whitelist_inheritance": (_to_inheritance, "intersection"),
    "acl_pkg_read": (_to_acl, None),
    "uploadtrigger_jenkins": (_to_template, None), "webhook_url": (_to_urls, None),
    "webhook_events": (_to_events, None), "webhook_secret": (_to_secret, None),
    "title": (_to_text, None), "description": (_to_text, None), "custom_data": (_to_anything, None)}
MIRROR_KEYS = {
    "volatile": (_to_bool, True), "mirror_url": (to_url, None),
    "mirror_web_url_fmt": (_to_text, None),
    "mirror_cache_expiry": (_to_integer, None), "mirror_ignore_serial_header": (_to_bool, None),
    "mirror_missing_statuses": (_to_statuses, None),
    "mirror_no_project_list": (_to_bool, None), "mirror_provides_core_metadata": (_to_bool, None),
    "mirror_use_external_urls": (_to_bool, None), "acl_pkg_read": (_to_acl, None),
    "title": (_to_text, None), "description": (_to_text, None), "custom_data": (_to_anything, None)}
# devpi 7's words, which are accepted, and shown to who asks for version 2 of a result: types, and
# key -> (the same option here, coercion of its value; None: as here)
NEWER_TYPES = {"local": "stage", "remote": "mirror"}
NEWER_KEYS = {
    "remote_url": ("mirror_url", None), "remote_refresh_delay": ("mirror_cache_expiry", None),
    "remote_no_project_list": ("mirror_no_project_list", None),
    "remote_use_external_urls": ("mirror_use_external_urls", None),
    "remote_web_url_fmt": ("mirror_web_url_fmt", None),
    "project_inheritance_rules": ("mirror_whitelist", _to_rules),
    "trust_inheritance_rules_from": ("mirror_whitelist_inheritance", _to_trust)}
NEWER_TRUST = {"none": "intersection", "type:not remote": "union"}
# Old clients and dumps have these keys.
_IGNORED_ON_MIRRORS = ("bases", "acl_upload", "mirror_whitelist")


def is_allowed_target(url, allowed):
    """Whether --webhook-allow, --push-allow or --upstream-allow admits the host of a URL.

    `allowed`: globs of hosts; None admits all."""
    host = urllib.parse.urlsplit(url).hostname or ""
    return allowed is None or any(
        fnmatch.fnmatchcase(host, pattern.lower()) for pattern in allowed)


def index_type(word):
    """The type for a word, ours or devpi 7's; other values unchanged."""
    return NEWER_TYPES.get(word, word) if isinstance(word, str) else word


def option_key(key):
    """The key under which an option is stored, for both of its names."""
    return NEWER_KEYS.get(key, (key,))[0]


def in_newer_words(config):
    """A configuration as devpi 7 shows it; options that are not in its vocabulary stay.

    Projects in the whitelist are left out: they are rules of the projects there."""
    names = {own: key for key, (own, _) in NEWER_KEYS.items()}
    shown = {names.get(key, key): value for key, value in config.items()}
    shown["type"] = {own: word for word, own in NEWER_TYPES.items()}[config["type"]]
    if config["type"] == "stage":
        words = {own: word for word, own in NEWER_TRUST.items()}
        shown["project_inheritance_rules"] = list(
            ALLOW_ALL if "*" in config.get("mirror_whitelist", ()) else BLOCK_REMOTE)
        shown["trust_inheritance_rules_from"] = words[
            config.get("mirror_whitelist_inheritance", "union")]
    return shown


class ConfigEdit:
    """An edit of an index configuration: applies a PUT or PATCH body to the stored values."""

    def __init__(self, type_, config, defaults):
        self.keys = MIRROR_KEYS if type_ == "mirror" else STAGE_KEYS
        self.config = dict(config)
        self.defaults = defaults        # the values of a new index: these keys can't be removed
        self.set_keys = set()

    def apply_object(self, body):
        """Set the options of a JSON object; null removes one."""
        unknown = {}
        # devpi 7's keys last: its rules change a list that the same body may set
        for key, value in sorted(body.items(), key=lambda item: item[0] in NEWER_KEYS):
            own = option_key(key)
            if key in ("projects", "type") or \
                    self.config["type"] == "mirror" and own in _IGNORED_ON_MIRRORS:
                continue
            if own not in self.keys:
                unknown[key] = value
                continue
            if own != key and own != "mirror_whitelist" and own in body \
                    and self._differ(own, body[own], key, value):
                raise BadRequest(f"'{own}' and '{key}' are the same option")
            if value is None or value == "" and self.keys[own][0] in (_to_template, _to_secret):
                self.remove(key)
            else:
                self.set(key, value)

        if unknown:
            near = [word for key in unknown for word in self._meant(key)]
            raise BadRequest("indexconfig got unexpected keyword arguments: "
                             + ", ".join(f"{key}={value}" for key, value in unknown.items())
                             + (f" ({', '.join(near)}?)" if near else ""))

    def _differ(self, key, value, other, other_value):
        """Whether two values, under two names of one option, differ in meaning."""
        if value is None or other_value is None:
            return value is not other_value
        return self._coerced(key, value) != self._coerced(other, other_value)

    def _coerced(self, key, value):
        """A value as it is stored; errors name the key that was sent."""
        own, coerce = NEWER_KEYS.get(key, (key, None))
        return (coerce or self.keys[own][0])(key, value)

    def _meant(self, key):
        """[the key that an unknown one may misspell], or []; [] for keys of the other type."""
        if option_key(key) in (*STAGE_KEYS, *MIRROR_KEYS):
            return []
        newer = [newer for newer, (own, _) in NEWER_KEYS.items() if own in self.keys]
        return nearest(key, [*self.keys, *newer], 1)

    def apply_operators(self, items):
        """Apply `key=value`, `key+=value`, `key-=value` and `key-=` in turn (devpi's list form)."""
        for item in items:
            key, operator, value = operator_of(item)
            if operator == "+=":
                self.add(key, value)
            elif operator == "-=" and value:
                self.take(key, value)
            elif operator == "-=":
                self.remove(key)
            elif key == "type" and index_type(value) != self.config["type"]:
                raise BadRequest("the 'type' of an index can't be changed")
            else:
                self.apply_object({key: value})

    def set(self, key, value):
        own = option_key(key)
        if self.keys[own][0] is _to_text and own in self.config and self.config[own] == value:
            return      # older programs stored other types, and clients send back what they get
        value = self._coerced(key, value)

        if key == "project_inheritance_rules":      # names in the list are rules for projects
            listed = self.config.get(own, [])
            if value == BLOCK_REMOTE:
                value = [name for name in listed if name != "*"]
            else:
                value = listed if "*" in listed else listed + ["*"]
        self.config[own] = value
        self.set_keys.add(own)

    def add(self, key, value):
        old = self._list_at(key)
        value, = self.keys[key][0](key, [value])
        if value not in old:
            self.set(key, old + [value])

    def take(self, key, value):
        old = self._list_at(key)
        if self.keys[key][0] is _to_bases:
            value, = _to_bases(key, [value])
        if value not in old:
            raise BadRequest(f"The '{key}' setting doesn't have value '{value}'")
        self.config[key] = [item for item in old if item != value]
        if not self.config[key] and self.keys[key][0] is _to_urls:
            del self.config[key]

    def _list_at(self, key):
        if option_key(key) not in self.keys:
            near = self._meant(key)
            raise BadRequest(f"indexconfig got unexpected keyword arguments: {key}"
                             + (f" ({near[0]}?)" if near else ""))
        if key in NEWER_KEYS or self.keys[key][0] not in (
                _to_bases, _to_acl, _to_whitelist, _to_urls, _to_events, _to_statuses):
            raise BadRequest(f"The '{key}' setting is no list")
        return self.config.get(key, [])

    def remove(self, key):
        own = option_key(key)
        if key == "trust_inheritance_rules_from" and own in self.keys:  # devpi 7: absent by default
            self.set(key, "none")
            return
        if key == "type" or own in self.defaults or own == "mirror_url":
            raise BadRequest("Default values can't be removed.")
        self.config.pop(own, None)


PROJECT_KEYS = {"stage": ("inheritance_rules",), "mirror": ()}      # beside the name


class ProjectEdit:
    """An edit of a project's configuration (devpi 7), by an object or a list of operators.

    `keys`: that such a project has. `allows`: whether it may come from both stages and mirrors
    afterwards; None: as before."""

    def __init__(self, index, project, body):
        self.keys, self.project, self.allows = PROJECT_KEYS[index.type], project, None
        if isinstance(body, list):
            self._apply_operators(body)
        else:
            self._apply_object(_unwrapped(body, "project"))

    def _apply_object(self, body):
        unknown = {}
        for key, value in body.items():
            if key == "name":
                self._check_name(value)
            elif key not in self.keys:
                unknown[key] = value
            else:
                rules = _to_list(key, value)
                if rules != ALLOW_ALL:
                    raise BadRequest(f"Unknown value {rules!r} for {key}, "
                                     f"must be {ALLOW_ALL!r} or left unset.")
                self.allows = True

        if unknown:
            near = [word for key in unknown if key not in PROJECT_KEYS["stage"]
                    for word in nearest(key, ("project-status", *self.keys), 1)]
            raise BadRequest("projectconfig got unexpected keyword arguments: "
                             + ", ".join(f"{key}={value}" for key, value in unknown.items())
                             + (f" ({', '.join(near)}?)" if near else ""))

    def _apply_operators(self, items):
        for item in items:
            key, operator, value = operator_of(item)
            if operator == "=" or key not in self.keys:
                self._apply_object({key: value})
            elif operator == "-=" and not value:
                self.allows = False
            else:
                raise BadRequest(f"The '{key}' setting is no list")

    def _check_name(self, name):
        """Refuse another name; each spelling of the project's own will do."""
        if not isinstance(name, str) or normalize(name) != self.project:
            raise BadRequest("the 'name' of a project can't be changed")


def operator_of(item):
    """(key, operator, value) of `key=value`, `key+=value` or `key-=value` (devpi's list form)."""
    if not isinstance(item, str):
        raise BadRequest(f"expected 'key=value', 'key+=value' or 'key-=value', got {item!r}")
    key, _, value = item.partition("=")
    sign = key[-1:] if key.endswith(("+", "-")) else ""
    return key[:len(key) - len(sign)].strip(), sign + "=", value


def index_defaults(type_, user):
    """The configuration of a new index of this type and user."""
    said, type_ = type_, index_type(type_)
    keys = {"stage": STAGE_KEYS, "mirror": MIRROR_KEYS}.get(type_) \
        if isinstance(type_, str) else None
    if keys is None:
        raise BadRequest(f"unknown index type {said!r}")

    config = {"type": type_}
    config.update((key, default) for key, (_, default) in keys.items() if default is not None)
    if type_ == "stage":
        config["acl_upload"] = [user]
    return config


def base_complaints(incomplete):
    """The `Complaint`s about bases that do not exist: [(path of an index, its base), ...]."""
    if incomplete:
        count = len({path for path, _ in incomplete})
        yield Complaint(
            "warn", f"indexes that name a base that does not exist: {count}; what builds on "
                    "them gets nothing from mirrors",
            tuple(f"{path} builds on {base}, which does not exist"
                  for path, base in incomplete[:100]))


class Met(typing.NamedTuple):
    """An index that the walk over the bases meets."""
    path: str
    index: Index | None         # None if it does not exist
    via: str | None             # the path of the index that has it as a base
    is_first: bool              # False: it was met before, and is not followed again


def walk_bases(index, find):
    """Yield `Met` for an index, its bases, and theirs: breadth-first [W10.1].

    `find`: a function from a path to the Index, or None."""
    met = {}
    queue_ = collections.deque([(index.path, None)])
    while queue_:
        path, via = queue_.popleft()
        is_first = path not in met
        if is_first:        # found anew, as the caller's index may be older
            met[path] = find(path) or (index if path == index.path else None)
        current = met[path]
        yield Met(path, current, via, is_first)
        if current and is_first:
            queue_.extend((base, path) for base in current.config.get("bases", ()))


class Indexes(Part):
    """The indexes of a store, as values."""

    def __init__(self, store, users, settings):
        self.store, self.users, self.settings = store, users, settings
        self.cache = store.freshness.cache(8 << 20)

    def complaints(self):
        return base_complaints([(index.path, base) for index, base in self.incomplete()])

    def find(self, path):
        """The index `user/name`, or None."""
        index = self.cache.get(path)
        if index is None:
            since = self.store.freshness.moment()
            user, _, name = path.partition("/")
            with self.store.read() as db:
                row = db.execute(
                    "SELECT indexes.*, users.name AS user FROM indexes "
                    "JOIN users ON users.id = user_id "
                    "WHERE users.name = ? AND indexes.name = ?", (user, name)).fetchone()
            if row is None:
                return None
            index = _index(row)
            tags = frozenset((index_tag(path),))
            self.store.freshness.keep(self.cache, path, index, len(row["config"]) + 500, tags,
                                      since)
        return index

    def get(self, path):
        index = self.find(path)
        if index is None:
            raise NoIndex(path)
        return index

    def all(self, user=None):
        """All indexes, or those of one user, sorted by user and name."""
        found = self.cache.get(("all", user))
        if found is None:
            since = self.store.freshness.moment()
            with self.store.read() as db:
                rows = db.execute(
                    "SELECT indexes.*, users.name AS user FROM indexes "
                    "JOIN users ON users.id = user_id WHERE "
                    ":user IS NULL OR users.name = :user ORDER BY users.name, indexes.name",
                    {"user": user}).fetchall()
            found = tuple(_index(row) for row in rows)
            size = 500 + sum(len(row["config"]) + 500 for row in rows)
            self.store.freshness.keep(self.cache, ("all", user), found, size,
                                      frozenset((INDEXES,)), since)
        return found

    def order(self, index):
        """The resolution order: breadth-first over the bases, each once, mirrors last [W10.1]."""
        return self._resolved(index)[0]

    def missing_bases(self, index):
        """The paths of bases, of an index or of its bases, that do not exist."""
        return self._resolved(index)[1]

    def reach(self, index):
        """The tags that a response about an index depends on: its own and those of all its
        bases."""
        return self._resolved(index)[2]

    def _resolved(self, index):
        """(resolution order, missing bases, `reach`) of an index."""
        key = ("order", index.path)
        resolved = self.cache.get(key)
        if resolved is None:
            since = self.store.freshness.moment()
            first, mirrors, missing, seen = [], [], [], set()
            for met in walk_bases(index, self.find):
                if met.is_first:
                    seen.add(met.path)
                    if met.index is None:
                        missing.append(met.path)
                    else:
                        (mirrors if met.index.is_mirror else first).append(met.index)

            tags = frozenset(map(index_tag, seen))
            resolved = tuple(first + mirrors), tuple(missing), tags
            self.store.freshness.keep(self.cache, key, resolved, 1000 * len(seen), tags, since)
        return resolved

    def incomplete(self):
        """[(index, path of a base of it that does not exist)]."""
        there = {index.path for index in self.all()}
        return [(index, base) for index in self.all() for base in index.config.get("bases", ())
                if base not in there]

    def unknown_users(self, index, before):
        """Sentences about names in an index's ACLs that are no users, for example misspelt.

        Skips names in `before`, an older configuration."""
        names = {}
        for key in ACL_KEYS:
            for name in index.config.get(key, ()):
                if not name.startswith(":") and name not in before.get(key, ()) \
                        and self.users.find(name) is None:
                    names.setdefault(name, []).append(key)
        return [f"there is no user '{one_line(name, 60)}', named in {' and '.join(keys)}"
                for name, keys in names.items()]

    def refuse_existing(self, user, name):
        """NotFound if the user does not exist, Conflict if the index exists."""
        self.users.get(user)
        if self.find(f"{user}/{name}"):
            raise Conflict(f"index '{user}/{name}' exists")

    def create(self, user, name, body, actor=NO_ACTOR, may_inherit=True, may_read=None):
        """devpi: PUT /user/index. Returns the new `Index`.

        `may_inherit`: even if other users' indexes still have it as a base; `may_read`: see
        `_require_readable`."""
        self.refuse_existing(user, name)
        check_name("indexname", name)
        body = _unwrapped(body)
        type_ = body.get("type")
        defaults = index_defaults("stage" if type_ is None else type_, user)
        edit = ConfigEdit(defaults["type"], defaults, ())
        edit.apply_object({key: value for key, value in body.items() if value is not None})
        self._check_config(edit.config, "bases")
        self._require_readable(edit.config, (), may_read)
        return self.store.write(insert_index, user, name, edit.config, may_inherit, actor=actor)

    def modify(self, index, body, error_on_noop=False, actor=NO_ACTOR, may_read=None):
        """devpi: PATCH /user/index, with an object or a list of operators. Returns the new `Index`.

        Of simultaneous edits, each is made on the result of the one before."""
        for _ in range(Limits.edits):
            config = self._edited(index, body)
            if config == index.config:
                if error_on_noop:
                    raise BadRequest("The requested modifications resulted in no changes")
                return index
            self._require_readable(config, index.config.get("bases", ()), may_read)
            modified = self.store.write(_update_index, index, config, actor=actor)
            if modified:
                return modified
            before, index = index, self.get(index.path)
            if index.id != before.id:       # another index, made anew
                raise NoIndex(index.path)
        raise Busy(f"index {index.path} is being changed by many others just now, try again")

    def _edited(self, index, body):
        """The configuration of an index after the edit in a body."""
        edit = ConfigEdit(index.type, index.config, index_defaults(index.type, index.user))
        if isinstance(body, list):
            edit.apply_operators(body)
            self._check_config(edit.config, "bases")
        else:
            body = _unwrapped(body)
            if index_type(body.get("type", index.type)) != index.type:
                raise BadRequest("the 'type' of an index can't be changed")
            edit.apply_object(body)
            self._check_config(edit.config, *edit.set_keys)
        return edit.config

    def _require_readable(self, config, before, may_read):
        """Refuse new bases that the caller may not read.

        `may_read`: a function of an Index; None admits all."""
        for base in config.get("bases", ()):
            found = self.find(base) if may_read and base not in before else None
            if found and not may_read(found):
                raise Forbidden(f"index {base} can't be a base: you have no permission to read it")

    def _check_config(self, config, *keys):
        check_size("index", config)
        for url in (*config.get("webhook_url", ()), config.get("uploadtrigger_jenkins")):
            if url and not is_allowed_target(url, self.settings.webhook_allow):
                raise BadRequest(f"the host of {public_url(url)} is not among those "
                                 "that --webhook-allow names")
        url = config.get("mirror_url")
        if url and not is_allowed_target(url, self.settings.upstream_allow):
            raise BadRequest(f"the host of {public_url(url)} is not among those "
                             "that --upstream-allow names")
        if len(config.get("bases", ())) > Limits.bases:
            raise BadRequest(f"an index may have {Limits.bases} bases at most, "
                             f"not {len(config['bases'])}")

        if "bases" in keys:
            wrong = []
            for base in config.get("bases", ()):
                if not re.fullmatch(r"[^/]+/[^/]+", base):
                    wrong.append(f"invalid base index spec: '{base}'")
                elif not self.find(base):
                    wrong.append(f"base index '{base}' does not exist")
            if wrong:
                raise BadRequest(", ".join(wrong))


def _index(row):
    return Index(row["id"], row["user"], row["name"], json.loads(row["config"]))


def _unwrapped(body, what="index"):
    """The configuration in a body, which may be wrapped like devpi's responses."""
    if isinstance(body, dict) and body.get("type") == what + "config" \
            and isinstance(body.get("result"), dict):
        body = body["result"]
    if not isinstance(body, dict):
        raise BadRequest(f"expected a JSON object with the {what} configuration")
    return body


@row("index")
class IndexRows(RowKind):
    """(user, name) -> {"config": {...}}: indexes, both stages and mirrors."""
    table, parent, refers = "indexes", "user", "user_id"
    key, facts, order = ("users.name", "indexes.name"), ("config",), "indexes.id"
    fields = facts
    source = "indexes JOIN users ON users.id = user_id"

    def value(self, db, row):
        return {"config": json.loads(row["config"])}

    def columns(self, change, key, value):
        return {"config": json.dumps(value["config"])}

    def write(self, change, key, value):
        index_id, before = change.id_of("index", key), change.get("index", key)
        if before and before["config"]["type"] == "mirror":
            if value is None:
                note_gone_paths(change, index_id, "/".join(key))
            elif value["config"].get("mirror_url") != before["config"].get("mirror_url"):
                _clear_pages(change, index_id)
        return super().write(change, key, value)

    def wrote(self, change, key, value, row_id, is_new):
        change.touch(index_tag("/".join(key)), INDEXES)
        if value is None:
            change.queue_for_search(0, "")


def _clear_pages(change, index_id):
    """Take all files off a mirror's pages and drop the pages' validators, before it gets another
    upstream."""
    change.execute("UPDATE files SET position = NULL WHERE index_id = ? AND position IS NOT NULL",
                   (index_id,))
    change.execute("UPDATE projects SET fetched = NULL, etag = NULL, upstream = NULL, "
                   "upstream_serial = NULL, status = NULL WHERE index_id = ?", (index_id,))


def note_gone_paths(change, index_id, path, condition="1", *values):
    """Remember the paths of a mirror's files that will be deleted: they get 410 from now on.

    Links that were never followed are not remembered."""
    change.execute("INSERT OR IGNORE INTO gone_cached SELECT ? || '/' || path FROM files "
                   f"WHERE index_id = ? AND sha256 IS NOT NULL AND {condition}",
                   (path, index_id, *values))


def insert_index(change, user, name, config, may_inherit=True):
    user_id = change.id_of("user", (user,))
    if user_id is None:
        raise NotFound(f"no user '{user}'")
    if not may_inherit and _built_on(change, user, f"{user}/{name}"):
        raise Forbidden(f"{user}/{name} still stands in the bases of other users' indexes: "
                        "only root may make it again")

    _require_bases(change, config, ())
    _require_room(change, user_id, 0, config)
    if change.id_of("index", (user, name)):
        raise Conflict(f"index '{user}/{name}' exists")
    index_id = change.put("index", (user, name), {"config": config})
    index = Index(index_id, user, name, config)
    change.happened(Event("index.create", index, detail=config["type"]))
    return index


def current_index(change, index):
    """The present index: it may have changed since the request began."""
    row = change.execute("SELECT config FROM indexes WHERE id = ?", (index.id,)).fetchone()
    if row is None:
        raise NoIndex(index.path)
    change.know_id("index", (index.user, index.name), index.id)
    return dataclasses.replace(index, config=json.loads(row["config"]))


def _require_bases(change, config, before):
    """Refuse new bases that have been deleted: whoever made such an index later would serve files
    to this one."""
    for base in config.get("bases", ()):
        user, _, name = base.partition("/")
        if base not in before and not change.execute(
                "SELECT 1 FROM indexes JOIN users ON users.id = user_id "
                "WHERE users.name = ? AND indexes.name = ?", (user, name)).fetchone():
            raise BadRequest(f"base index '{base}' does not exist")


def _require_room(change, user_id, index_id, config):
    """Refuse attributes that would make lists of all indexes huge."""
    others = change.execute("SELECT coalesce(sum(max(0, length(config) - 1024)), 0) FROM indexes "
                            "WHERE user_id = ? AND id != ?", (user_id, index_id)).fetchone()[0]
    size = len(json.dumps(config))
    if size > 1024 and others + size - 1024 > Limits.account_attributes:
        raise TooLarge("the attributes of all indexes of a user may take "
                       f"{Limits.account_attributes} bytes at most")


def _update_index(change, index, config):
    """The updated index; None if another change came first."""
    if current_index(change, index).config != index.config:
        return None
    _require_bases(change, config, index.config.get("bases", ()))
    _require_room(change, change.id_of("user", (index.user,)), index.id, config)
    change.put("index", (index.user, index.name), {"config": config})
    changed = sorted(key for key in {*config, *index.config}
                     if config.get(key) != index.config.get(key))
    change.happened(Event("index.modify", index, detail=", ".join(changed)))
    return dataclasses.replace(index, config=config)


def set_whitelisted(change, index, name, is_listed):
    """Put a project on the whitelist of a stage, or take it off; returns whether that changed it.

    `index`: as it is now."""
    config = dict(index.config)
    listed = config.get("mirror_whitelist", [])
    if (name in listed) == is_listed:
        return False
    config["mirror_whitelist"] = [*listed, name] if is_listed else \
        [item for item in listed if item != name]

    check_size("index", config)
    _require_room(change, change.id_of("user", (index.user,)), index.id, config)
    change.put("index", (index.user, index.name), {"config": config})
    detail = f"mirror_whitelist: {name} {'added' if is_listed else 'removed'}"
    change.happened(Event("index.modify", index, detail=detail))
    return True


def _built_on(change, user, path=None):
    """The indexes of other users that have this one, or any of this user, among their bases."""
    return [Index(0, owner, name, config) for owner, name, config in configs_naming(change.db, user)
            if owner != user and any(base == path if path else base.startswith(user + "/")
                                     for base in config.get("bases", ()))]


def _remove_from_bases(change, user, path, force, may_read):
    """Take an index, or all of a user, out of the bases of other users' indexes.

    Conflict if there are any, unless `force`."""
    above = _built_on(change, user, path)
    if above and not force:
        named = [index.path for index in above if may_read is None or may_read(index)]
        hidden = len(above) - len(named)
        if hidden:
            named.append(f"{hidden} more that you may not read" if named else
                         f"{hidden} index{'' if hidden == 1 else 'es'} that you may not read")
        shown = ", ".join(named[:20]) + (f" and {len(named) - 20} more" if len(named) > 20 else "")
        raise Conflict(
            f"{path or f'indexes of {user}'} can't be deleted: in use as a base by {shown}; "
            "?force deletes it all the same and takes it out of their bases")

    for index in above:
        _remove_items(change, index, "bases",
                      lambda base: base == path if path else base.startswith(user + "/"))


def _remove_items(change, index, key, is_gone):
    """Take deleted items out of a list in an index's configuration; audited for that index."""
    config = change.get("index", (index.user, index.name))["config"]
    gone = sorted({item for item in config.get(key, ()) if is_gone(item)})
    if gone:
        config[key] = [item for item in config[key] if not is_gone(item)]
        change.put("index", (index.user, index.name), {"config": config})
        change.happened(Event("index.modify", index, detail=f"{key}: {', '.join(gone)} deleted"))


def remove_index(change, index, force, may_read):
    """devpi: DELETE /user/index.

    Conflict if it is a base of other users' indexes; the message names those that `may_read`, a
    function of an Index, admits. `force` takes the index out of their bases."""
    _refuse_non_volatile(current_index(change, index))
    _remove_from_bases(change, index.user, index.path, force, may_read)
    change.put("index", (index.user, index.name), None)
    change.happened(Event("index.delete", index))


def _refuse_non_volatile(index):
    if not index.volatile:
        raise Forbidden(f"index {index.path} non-volatile, cannot delete")


def remove_user(change, name, force, may_read):
    """devpi: DELETE /user, with all that belongs to it and all rights of this name.

    `force`, `may_read`: see `remove_index`."""
    user_id = change.id_of("user", (name,))
    if user_id is None:
        raise NotFound(f"no user '{name}'")
    rows = change.execute("SELECT indexes.*, ? AS user FROM indexes WHERE user_id = ?",
                          (name, user_id)).fetchall()
    for index in map(_index, rows):
        if not index.volatile:
            raise Forbidden(f"user '{name}' has non-volatile index: {index.name}")

    _remove_from_bases(change, name, None, force, may_read)
    change.put("user", (name,), None)
    change.happened(Event("user.delete", target=name))

    for owner, index_name, config in configs_naming(change.db, name):
        for key in ACL_KEYS:
            _remove_items(change, Index(0, owner, index_name, config), key,
                          lambda item: item == name)


# ==================================================================================================
# 9  Releases
#
# The values of the model, File, Status, Release and ProjectPage; and what people upload to stages
# and remove from indexes. An upload is checked from its form to the members of its archive before
# anything is stored; then its blob is kept, and one change enters project, release and file.
# ==================================================================================================


PROJECT_STATUSES = ("active", "archived", "quarantined", "deprecated")


class Status(typing.NamedTuple):
    """The status of a project (PEP 792): one of `PROJECT_STATUSES`, and a reason or None."""
    word: str = "active"
    reason: str | None = None

    @classmethod
    def of(cls, text):
        """A status as the table `projects` has it: JSON [word, reason], NULL for active."""
        return cls(*json.loads(text)) if text else ACTIVE

    @property
    def stored(self):
        return None if self.word == "active" else json.dumps(self)

    @property
    def takes_uploads(self):
        return self.word not in ("archived", "quarantined")

    @property
    def withholds_files(self):
        return self.word == "quarantined"

    def refuse_withheld(self, what):
        """Forbidden if files are withheld; `what` was asked for."""
        if self.withholds_files:
            raise Forbidden(f"{what} is quarantined: {self.reason or 'no reason given'}")


ACTIVE = Status()


class File(typing.NamedTuple):
    """A distribution file of a project: a row of the table `files`, in the order of its columns."""
    id: int
    index_id: int
    project_id: int
    release_id: int | None
    position: int | None
    version: str
    filename: str
    path: str                       # +f/... or +e/..., below its index
    hash_spec: str                  # algorithm=hex, or ""
    sha256: str | None              # of the blob, once it is here
    size: int | None
    uploaded: str                   # ISO time (PEP 700)
    first_seen: int                 # 1: `uploaded` is the time when we first saw it
    requires_python: str | None
    yanked: str | None              # None: not yanked; "": without a reason
    core_metadata: str | None       # None: not offered; "true"; or the SHA-256 of the metadata file
    metadata_sha256: str | None     # of the metadata file, once it is here
    provenance: str | None
    url: str | None                 # upstream's, without credentials
    last_modified: str | None       # upstream's HTTP-date
    history: str | None             # JSON list of devpi's log entries
    kind: str                       # releasefile, doczip (documentation) or toxresult (test result)
    for_id: int | None              # of a test result: the file that was tested

    @property
    def hashes(self):
        """{algorithm: hex} of all that is known, the announced one first."""
        algorithm, _, digest = self.hash_spec.partition("=")
        hashes = {algorithm: digest} if digest else {}
        if self.sha256:
            hashes.setdefault("sha256", self.sha256)
        return hashes


class PageFile(typing.NamedTuple):
    """The columns of a `File` that pages show: half of them, read in half the time (2.4 of 20 ms
    saved on a page of 2,000 files)."""
    version: str
    filename: str
    path: str
    hash_spec: str
    sha256: str | None
    size: int | None
    uploaded: str
    first_seen: int
    requires_python: str | None
    yanked: str | None
    core_metadata: str | None
    provenance: str | None
    hashes = File.hashes


FILE_COLUMNS = ", ".join("files." + field for field in File._fields)


def select_files(db, rest, *values, kind=File):
    """The rows of `files` that `rest`, the end of a SELECT, names, as a tuple.

    `kind`: their type, `File` or `PageFile`."""
    cursor = db.cursor()
    cursor.row_factory = None       # plain tuples: half the time of making a sqlite3.Row of each
    columns = ", ".join("files." + field for field in kind._fields)
    return tuple(map(kind._make, cursor.execute(f"SELECT {columns} FROM files {rest}", values)))


@dataclasses.dataclass(frozen=True)
class ProjectPage:
    """What an index offers of a project: the files of each index that knows it, first index first.

    `expires`: time.monotonic() after which upstream must be asked again; `stale`: upstream failed,
    and this is its last good page; `blocked`: the mirror that a private name shuts out."""
    name: str
    parts: tuple = ()               # ((Index, (File or PageFile, ...)), ...): that know the project
    versions: tuple = ()            # of releases, with or without files
    stale: bool = False
    expires: float = 0
    upstream_serial: int | None = None
    status: Status = ACTIVE
    blocked: Index | None = None

    @property
    def known(self):
        return bool(self.parts)

    @property
    def files(self):
        return [file for _, files in self.parts for file in files]

    def serial_for(self, index):
        """Upstream's serial if the page came from this very index, else None."""
        return self.upstream_serial if self.parts and self.parts[0][0].path == index.path else None


class Readme(typing.NamedTuple):
    """A README that is stored apart from its release's other metadata: as JSON, in pieces.

    `last_piece`: the id of the last piece."""
    release_id: int
    size: int
    last_piece: int

    def pieces(self, store):
        """Yield its JSON, piece by piece; Busy if it was replaced or deleted meanwhile."""
        left, last = self.size, 0
        while left:
            with store.read() as db:
                found = db.execute("SELECT id, piece FROM readmes WHERE release_id = ? "
                                   "AND id > ? AND id <= ? ORDER BY id LIMIT 1",
                                   (self.release_id, last, self.last_piece)).fetchone()
            if found is None:
                raise Busy("the release was changed while it was read, try again")
            last, piece = found
            left -= len(piece)
            yield piece


@dataclasses.dataclass(frozen=True)
class Release:
    """A version of a project in one index, with its files, documentation and test results.

    `version`: as the index spells it; `metadata`: as devpi's JSON has it, without a README that is
    stored apart."""
    index: Index
    project: str                    # normalised
    version: str
    metadata: dict
    files: tuple = ()               # (File, ...), as they came
    attached: tuple = ()            # documentation and test results: (File, ...), as they came
    readme: Readme | None = None
    status: Status = ACTIVE         # of the project

    @property
    def shown(self):
        """The metadata that clients see: without `other`, which holds a form's other fields, and
        without keys to which devpi's JSON gives another meaning."""
        return {key: value for key, value in self.metadata.items()
                if key != "other" and key[:1] != "+"}

    @property
    def docs(self):
        """The documentation zips: one, or several if releases were merged."""
        return tuple(file for file in self.attached if file.kind == "doczip")

    @property
    def yanked(self):
        """The first file's reason ("" for none given) if all files are yanked; else None."""
        reasons = [file.yanked for file in self.files]
        return reasons[0] if reasons and None not in reasons else None

    def results(self, file):
        """The test results of one of the files."""
        return tuple(result for result in self.attached if result.for_id == file.id)

    def whole_metadata(self, db):
        """The metadata with the README."""
        if self.readme is None:
            return self.metadata
        return {**self.metadata, "description": stored_readme(db, self.readme.release_id)}


def releases_of(db, index, name, version=None):
    """The releases of a stage's project, as a list of `Release`, oldest first.

    With a `version`: only those that spell it, the text itself first."""
    project = db.execute("SELECT id, status FROM projects WHERE index_id = ? AND name = ?",
                         (index.id, name)).fetchone()
    if project is None:
        return []

    ids = {row["version"]: row["id"] for row in db.execute(
        "SELECT id, version FROM releases WHERE project_id = ? ORDER BY id", (project["id"],))}
    condition, values = "project_id = ?", [project["id"]]
    if version is not None:
        ids = {text: ids[text] for text in spellings(version, ids)}
        condition, values = f"release_id IN ({marks(ids)})", list(ids.values())

    files = collections.defaultdict(list)
    # a stage's files have no position: so `files_of_project`, an index, holds them in this order
    for file in select_files(db, f"WHERE {condition} AND position IS NULL ORDER BY id", *values):
        files[file.release_id, file.kind == "releasefile"].append(file)

    rows = {row["id"]: row for row in db.execute(
        "SELECT id, metadata, readme_size, (SELECT max(id) FROM readmes "
        "WHERE release_id = releases.id) AS last_piece FROM releases "
        f"WHERE {condition.replace('release_id', 'id')}", values)}

    status, found = Status.of(project["status"]), []
    for text, id_ in ids.items():
        row = rows[id_]
        readme = Readme(id_, row["readme_size"], row["last_piece"]) if row["readme_size"] else None
        found.append(Release(index, name, text, json.loads(row["metadata"]),
                             tuple(files[id_, True]), tuple(files[id_, False]), readme, status))
    return found


def spelling_of(db, index, name):
    """A stage's project as its newest release spells it; its normal name if it has none."""
    row = db.execute("SELECT metadata FROM releases JOIN projects ON projects.id = project_id "
                     "WHERE index_id = ? AND name = ? ORDER BY releases.id DESC LIMIT 1",
                     (index.id, name)).fetchone()
    spelling = json.loads(row["metadata"]).get("name") if row else None
    return spelling if isinstance(spelling, str) and normalize(spelling) == name else name


def merged(releases):
    """Releases of one index that spell the same version, as one: with the first's metadata, and the
    files and attachments of all. None if there are no releases."""
    def together(files):
        return tuple(sorted(itertools.chain.from_iterable(files), key=lambda file: file.id))

    if len(releases) < 2:
        return releases[0] if releases else None
    return dataclasses.replace(releases[0], files=together(each.files for each in releases),
                               attached=together(each.attached for each in releases))


class Content(typing.NamedTuple):
    """The bytes of a file: here (`sha256` names the blob), elsewhere (`url`), or arriving
    (`pieces`, which can be read as they come)."""
    last_modified: str | None = None        # HTTP-date
    size: int | None = None
    sha256: str | None = None
    url: str | None = None
    pieces: typing.Iterator | None = None


class Place(typing.NamedTuple):
    """A file, and the project that lists it."""
    file: File
    project: str
    status: Status          # of the project


def files_by_version(page):
    """{version: [(Index, File), ...]} of a page, in the order of versions.

    All spellings of a version are under the first one."""
    first, found = {}, {}
    for version in page.versions:
        found.setdefault(first.setdefault(canonical_version(version), version), [])
    for origin, files in page.parts:
        for file in files:
            if file.version:
                version = first.setdefault(canonical_version(file.version), file.version)
                found.setdefault(version, []).append((origin, file))
    return {version: found[version] for version in sorted(found, key=version_key)}


def latest_version(releases):
    """The version that a project is shown by: with files before without, unyanked before yanked,
    final before pre-releases, then the newest."""
    def rank(version):
        files = [file for _, file in releases[version]]
        return (bool(files), any(file.yanked is None for file in files), is_final(version),
                version_key(version))
    return max(releases, key=rank)


class MetadataFile(typing.NamedTuple):
    """A wheel's metadata file, to be stored: its SHA-256, and its bytes deflated."""
    sha256: str
    packed: bytes

    @classmethod
    def of(cls, data):
        return cls(hashlib.sha256(data).hexdigest(), zlib.compress(data, 1))


@row("metadata")
class MetadataRows(NamedRows):
    """(SHA-256,) -> {"packed": base64}: the metadata file of a stage's wheels, deflated.

    Each server deletes unused ones by itself. The changelog does not record that: it has the
    metadata again with each file that is put."""
    table = source = "metadata_files"
    key, facts, order = ("sha256",), ("packed",), "rowid"
    fields = facts

    def scope(self, db):
        return "sha256 IN (SELECT metadata_sha256 FROM files WHERE release_id IS NOT NULL)"

    def value(self, db, row):
        return {"packed": base64.b64encode(row["packed"]).decode()}

    def columns(self, change, key, value):
        return {"packed": base64.b64decode(value["packed"])}


def keep_metadata(change, metadata):
    """Store a `MetadataFile`, or None, of a mirror's file in a change; return its SHA-256 or
    None."""
    if metadata is None:
        return None
    change.execute("INSERT OR IGNORE INTO metadata_files VALUES (?, ?)", metadata)
    return metadata.sha256


def metadata_bytes(store, blobs, sha256):
    """The bytes of a metadata file, or None. Schema version 1 stored them as blobs."""
    with store.read() as db:
        row = db.execute("SELECT packed FROM metadata_files WHERE sha256 = ?", (sha256,)).fetchone()
    if row:
        return zlib.decompress(row["packed"])
    if not blobs.has(sha256):
        return None
    with blobs.open(sha256) as file:
        return file.read()


# -- rows


@row("project")
class ProjectRows(RowKind):
    """(user, index, name) -> {"status", "reason"}: projects of stages; the status as in PEP 792."""
    table, parent, refers = "projects", "index", "index_id"
    key, facts = (*IndexRows.key, "projects.name"), ("projects.status",)
    fields = ("status", "reason")
    source = ("projects JOIN indexes ON indexes.id = projects.index_id "
              "JOIN users ON users.id = user_id")
    order = "projects.id"

    def scope(self, db):
        stages = [str(row["id"]) for row in db.execute("SELECT id, config FROM indexes")
                  if json.loads(row["config"])["type"] == "stage"]
        return f"index_id IN ({', '.join(stages)})"

    def value(self, db, row):
        status = Status.of(row["status"])
        return {"status": status.word, "reason": status.reason}

    def delete_of(self, change, parent, parent_id):
        if change.get("index", parent)["config"]["type"] == "stage":
            super().delete_of(change, parent, parent_id)

    def before(self, change, key, value):
        if value is None:
            _delete_files(change, key[:2], "project_id = ?", change.id_of("project", key))

    def columns(self, change, key, value):
        return {"status": Status(value["status"], value["reason"]).stored}

    def write(self, change, key, value):
        if (value is None) != (change.id_of("project", key) is None):       # made, or deleted
            change.touch(names_tag(change.id_of("index", key[:2])))
        return super().write(change, key, value)

    def wrote(self, change, key, value, row_id, is_new):
        _stage_changed(change, key)


def _stage_changed(change, key):
    """Invalidate the caches of a stage's project, and queue it for the search index."""
    index_id = change.id_of("index", key[:2])
    change.touch(project_tag(index_id, key[2]))
    if index_id is not None:
        change.queue_for_search(index_id, key[2])


@row("release")
class ReleaseRows(RowKind):
    """(user, index, project, version) -> {"metadata": {...}}: releases of stages."""
    table, parent, refers, name = "releases", "project", "project_id", "version"
    key = (*ProjectRows.key, "releases.version")
    facts = ("releases.id", "releases.metadata", "releases.readme_size")
    fields = ("metadata",)
    source = ("releases JOIN projects ON projects.id = releases.project_id "
              "JOIN indexes ON indexes.id = projects.index_id JOIN users ON users.id = user_id")
    order = "releases.id"

    def value(self, db, row):
        return {"metadata": stored_metadata(db, row)}

    def before(self, change, key, value):
        if value is None:
            _delete_files(change, key[:2], "release_id = ?", change.id_of("release", key))

    def columns(self, change, key, value):
        metadata = value["metadata"]
        return {"metadata": without_readme(metadata), "readme_size": len(readme_of(metadata))}

    def wrote(self, change, key, value, row_id, is_new):
        if value is not None:
            put_readme(change, row_id, readme_of(value["metadata"]))
        _stage_changed(change, key)


@row("file")
class FileRows(RowKind):
    """(user, index, path) -> {"project", "version", "filename", "kind", "sha256", "size", ...}:
    files of stages, documentation and test results included.

    The keys are columns of `files`, but for `history` (a list), `attestations` (a text or null) and
    `for` (of a test result: the path of the file that was tested)."""
    table, parent, refers, name = "files", "index", "index_id", "path"
    plain = ("version", "filename", "kind", "sha256", "size", "uploaded", "first_seen",
             "requires_python", "yanked", "core_metadata", "metadata_sha256", "provenance",
             "last_modified")
    key, order = (*IndexRows.key, "files.path"), "files.id"
    facts = ("projects.name AS project", *map("files.{}".format, plain), "files.history",
             "attestations.content AS attestations", "tested.path AS \"for\"")
    fields = ("project", *plain, "history", "attestations", "for")
    source = ("files JOIN projects ON projects.id = files.project_id "
              "JOIN indexes ON indexes.id = files.index_id JOIN users ON users.id = user_id "
              "LEFT JOIN attestations ON file_id = files.id "
              "LEFT JOIN files AS tested ON tested.id = files.for_id")

    def scope(self, db):
        return "files.release_id IS NOT NULL"

    def delete_of(self, change, parent, parent_id):
        """They go with their projects."""

    def value(self, db, row):
        return {**super().value(db, row), "history": json.loads(row["history"] or "[]")}

    def before(self, change, key, value):
        if value is None:
            file_id = change.id_of("file", key)
            _delete_files(change, key[:2], "for_id = ?", file_id)
            _keep_names(change, key[:2], _files_where(change, "files.id = ?", file_id))
        elif is_gone(change, "/".join(key)):
            change.put("gone", ("/".join(key),), None)

    def columns(self, change, key, value):
        project = (*key[:2], value["project"])
        release = (*project, value["version"])
        ids = {"project_id": change.id_of("project", project),
               "release_id": change.id_of("release", release)}
        if value["for"]:
            ids["for_id"] = change.id_of("file", (*key[:2], value["for"]))
        if None in ids.values():
            raise NoParent(f"there is no release {'/'.join(release)} or no file {value['for']} "
                           f"for the file {'/'.join(key)}")
        return {**{column: value[column] for column in self.plain}, **ids,
                "hash_spec": f"sha256={value['sha256']}", "history": json.dumps(value["history"])}

    def write(self, change, key, value):
        file_id = change.id_of("file", key)
        if file_id is not None:
            for file in _files_where(change, "files.id = ?", file_id):
                _stage_changed(change, (*key[:2], file["project"]))
        return super().write(change, key, value)

    def wrote(self, change, key, value, row_id, is_new):
        if value is None:
            return
        if not is_new:
            change.execute("DELETE FROM attestations WHERE file_id = ?", (row_id,))
        if value["attestations"]:
            change.execute("INSERT INTO attestations VALUES (?, ?)",
                           (row_id, value["attestations"]))
        _stage_changed(change, (*key[:2], value["project"]))


def _files_where(change, condition, value):
    """What the deletion of a stage's files needs to know of those that meet an SQL condition, test
    results before the files that they are about."""
    return change.execute(
        "SELECT files.id, path, kind, filename, sha256, projects.name AS project FROM files "
        f"JOIN projects ON projects.id = project_id WHERE {condition} "
        "ORDER BY for_id IS NULL, files.id", (value,)).fetchall()


def _delete_files(change, index, condition, value):
    """Delete the files of a stage, given as (user, name), that meet an SQL condition."""
    files = _files_where(change, condition, value)
    _keep_names(change, index, files)
    for file in files:
        change.know_id("file", (*index, file["path"]), file["id"])
    change.delete_many("file", [(*index, file["path"]) for file in files])
    for project in {file["project"] for file in files}:
        _stage_changed(change, (*index, project))


def _keep_names(change, index, files):
    """Remember the paths of files about to be deleted, and what their names stood for."""
    if not files:
        return
    place, is_volatile = "/".join(index), change.get("index", index)["config"]["volatile"]
    change.insert_many("withdrawn", [
        ((place, file["kind"], file["filename"]),
         {"sha256": file["sha256"], "kept": int(not is_volatile)})
        for file in files if file["kind"] != "toxresult"])
    change.insert_many("gone", [((f"{place}/{file['path']}",), {}) for file in files])


def is_gone(db, path):
    """Whether there once was a file at `path` (user/index/+f/...)."""
    found = db.execute("SELECT 1 FROM gone WHERE path = ? UNION ALL "
                       "SELECT 1 FROM gone_cached WHERE path = ?", (path, path))
    return found.fetchone() is not None


@row("gone")
class GoneRows(NamedRows):
    """(path,) -> {}: the paths user/index/+f/... of deleted files of stages."""
    table = source = "gone"
    key, order = ("path",), "path"


@row("withdrawn")
class WithdrawnRows(NamedRows):
    """(user/index, kind, filename) -> {"sha256", "kept"}: what the name of a deleted file of a
    stage stood for last; `kept`: 1 if the index was not volatile then."""
    table = source = "withdrawn"
    key, facts = ("index_path", "kind", "filename"), ("sha256", "kept")
    fields = facts
    order = "index_path, kind, filename"


def check_form_names(form):
    """The (name, version) of an upload form.

    BadRequest in devpi's words if one is missing or invalid [W13.3]."""
    for field in ("name", "version"):
        if not form.get(field, [""])[0].strip():
            raise BadRequest(f'invalid metadata: Missing required field "{field}"')

    name, version = form["name"][0], form["version"][0]
    if re.search(r"""[<>%#"/\\\x00-\x20\x7f-\x9f]""", version) or re.search(r'[<>%#"]', name):
        raise BadRequest("invalid metadata: Invalid package name or version (URL safety)")
    check_project_name(name)
    if len(version) > 200:
        raise BadRequest("invalid metadata: name and version may have 200 characters at most")
    return name, version


def check_project_name(name):
    """Refuse the name of a new project if it is invalid."""
    for pattern, rule in (
            (r"[A-Za-z0-9._-]+",
             "contain only ASCII letters, digits, underscores, hyphens, and periods"),
            (r"[A-Za-z0-9].*", "start with an ASCII letter or digit"),
            (r".*[A-Za-z0-9]", "end with an ASCII letter or digit")):
        if not re.fullmatch(pattern, name):
            raise BadRequest(f"invalid metadata: Invalid package name. Names must {rule}")
    if len(name) > 200:
        raise BadRequest("invalid metadata: name and version may have 200 characters at most")


_UPLOAD_NAME = re.compile(r".+\.(%s)" % "|".join(map(re.escape, UPLOAD_EXTENSIONS)), re.IGNORECASE)


def check_form_filename(filename, name, version):
    """Refuse a file name that is unsafe or does not fit the form's name and version."""
    if not is_safe_filename(filename):
        raise BadRequest(f"{one_line(filename)!r} is not a valid archive name")
    variants = version_of_variants(filename, normalize(name))
    if variants and same_version(variants, version):
        return
    spelled = re.sub(r"[^A-Za-z0-9_.]+", "_", version)
    if version not in filename and spelled not in filename and \
            not same_version(version_of_file(filename, normalize(name)), version):
        raise BadRequest(f"filename '{filename}' does not contain version '{version}'")
    if not _UPLOAD_NAME.fullmatch(filename):
        raise BadRequest(f"'{filename}' is not a valid archive name")
    if not normalize(filename).startswith(normalize(name)):
        raise BadRequest(f"filename '{filename}' does not match project name '{name}'")


def check_variants(file, filename):
    """Refuse a variants file (PEP 825) that is no JSON object with an object `variants`.

    Other files pass."""
    if not filename.lower().endswith(VARIANTS):
        return
    data = file.read(Limits.variants_file + 1)
    if len(data) > Limits.variants_file:
        raise TooLarge(f"'{filename}' is larger than {Limits.variants_file} bytes")
    try:
        content = json.loads(data.decode("utf-8"), parse_int=len, parse_float=len)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("variants"), dict):
        raise BadRequest(f"'{filename}' is no JSON object with an object 'variants', as the list "
                         "of a release's variant wheels is (PEP 825)")


def form_metadata(form):
    """The metadata that an upload form states, by devpi's field names; other fields in "other"."""
    metadata, other = {}, {}
    for field, values in form.items():
        field = FIELD_SPELLINGS.get(field, field)
        if field in FORM_ONLY:
            continue

        values = ["" if value == "UNKNOWN" else value for value in values]
        if field in TEXT_FIELDS:
            metadata[field] = values[0]
        elif field in LIST_FIELDS:
            metadata[field] = metadata.get(field, []) + [value for value in values if value]
        elif field in NEWER_LIST_FIELDS:
            # an empty import name states that there is none (PEP 794): it is kept
            names = metadata.get(field, []) + [value for value in values if value]
            if names or field == "import_name":
                metadata[field] = names or [""]
        else:
            other[field] = values

    if other:
        metadata["other"] = other
    return metadata


def form_attestations(form):
    """The attestations of a file in its upload form (PEP 740): a JSON list as text, or ""."""
    text = form.get("attestations", [""])[0].strip()
    if len(text) > Limits.attestations:
        raise TooLarge(f"the field 'attestations' is longer than {Limits.attestations} characters")
    try:
        if not text or isinstance(json.loads(text, parse_int=len, parse_float=len), list):
            return text
    except (ValueError, RecursionError):
        pass
    raise BadRequest("the field 'attestations' is no JSON list")


def with_defaults(metadata):
    """All keys that devpi's JSON shows, absent ones as "" or []."""
    return {**{field: "" for field in TEXT_FIELDS}, **{field: [] for field in LIST_FIELDS},
            **metadata}


@dataclasses.dataclass(frozen=True)
class Upload:
    """A checked release file on its way in."""
    name: str
    version: str
    filename: str
    sha256: str
    size: int
    metadata: dict              # what the form states
    archive: dict               # what the archive's own metadata file states; {} if there is none
    metadata_file: MetadataFile | None
    attestations: str = ""      # see `form_attestations`


def is_named(db, sha256):
    """Whether a row names the blob."""
    return db.execute("SELECT 1 FROM files WHERE sha256 = ? UNION ALL SELECT 1 FROM files "
                      "WHERE metadata_sha256 = ? LIMIT 1", (sha256, sha256)).fetchone() is not None


class Releases(Part):
    """Puts releases into stages, with their files, documentation and test results."""

    def __init__(self, store, blobs, settings):
        self.store, self.blobs, self.settings = store, blobs, settings

    def clean(self, change):
        """Delete metadata files and documentation rows of files that are gone."""
        change.execute("DELETE FROM metadata_files WHERE NOT EXISTS "
                       "(SELECT 1 FROM files WHERE metadata_sha256 = metadata_files.sha256)")
        change.execute("DELETE FROM docs WHERE sha256 NOT IN (SELECT sha256 FROM files "
                       "WHERE kind = 'doczip' AND kind != 'releasefile')")     # its partial index

    def tidy(self):
        """Move the blobs to the trash that no file names any more."""
        try:
            count = self.blobs.sweep(self._is_named)
        except Busy as problem:
            log.info("%s", problem.message)
            return
        if count:
            log.info("moved %d files that nothing refers to any more to %s", count,
                     self.blobs.trash)

    def _is_named(self, sha256):
        with self.store.read() as db:
            return is_named(db, sha256)

    def register(self, index, form, actor):
        """devpi: `:action=submit`. The release's metadata becomes what the form states."""
        name, version = check_form_names(form)
        self.store.write(_register, index, name, version, form_metadata(form), actor=actor)

    def upload(self, index, form, filename, incoming, may_replace, actor):
        """devpi: `:action=file_upload`. Keep an incoming file as a file of a release.

        `may_replace`: whether the actor may give other bytes to a name that was deleted from a
        non-volatile index. Returns False if a non-volatile index has the very same file already."""
        name, version = check_form_names(form)
        check_form_filename(filename, name, version)
        self._check_digests(form, incoming)
        data = self._look_through(incoming, filename, form.get("filetype") == ["bdist_dumb"])
        archive = parse_core_metadata(data) if data is not None else {}
        self._check_archive(filename, name, version, archive)
        offered = data is not None and filename.lower().endswith(".whl")

        upload = Upload(name, version, filename, incoming.sha256.hexdigest(), incoming.size,
                        form_metadata(form), archive, MetadataFile.of(data) if offered else None,
                        form_attestations(form))
        self._refuse_early(index, upload, may_replace)
        incoming.keep()
        return self.store.write(_store_upload, index, upload, may_replace, actor=actor)

    def _look_through(self, incoming, filename, is_dumb):
        """The metadata file of an incoming archive (bytes), or None; BadRequest if the archive is
        not fit to be kept.

        A dumb binary (distutils' bdist_dumb) is an image of the files to unpack at `/`, and needs
        no metadata. A wheel is no dumb binary, whatever the form says."""
        with incoming.reader() as file:
            check_variants(file, filename)
            if not self.settings.accept_broken_archives:
                check_archive_name(filename)
                is_needed = not is_dumb or filename.lower().endswith(".whl")
                return archive_metadata(file, filename, is_whole=True, is_needed=is_needed)
            try:
                return archive_metadata(file, filename)
            except BrokenArchive as problem:
                log.info("kept without metadata: %s", problem.message)
                return None

    def upload_docs(self, index, form, filename, incoming, may_replace, actor):
        """devpi: `:action=doc_upload`. Keep an incoming zip as the documentation of a release.

        By default of the latest. `may_replace`: as for `upload`. Returns (False if a non-volatile
        index has the very same zip already, the number of its members that can't be shown)."""
        if "version" not in form:
            name, _ = check_form_names({**form, "version": ["0"]})
            form = {**form, "version": [self._newest_version(index, name)]}
        name, version = check_form_names(form)
        if incoming.size > self.settings.max_doc_size:
            raise TooLarge(f"the documentation is larger than {self.settings.max_doc_size} bytes "
                           "(--max-doc-size)")
        with incoming.reader() as file:
            members, left_out = doc_members(file, filename) or (None, 0)

        docs = Attachment("doczip", f"{normalize(name)}-{version}.doc.zip",
                          incoming.sha256.hexdigest(), incoming.size)
        incoming.keep()
        is_new = self.store.write(_store_docs, index, name, version, docs, filename, members,
                                  may_replace, actor=actor)
        return is_new, left_out

    def _newest_version(self, index, name):
        with self.store.read() as db:
            rows = db.execute(
                "SELECT version FROM releases JOIN projects ON projects.id = project_id "
                "WHERE index_id = ? AND name = ?", (index.id, normalize(name))).fetchall()
        if not rows:
            raise BadRequest(
                f"doczip has no version and '{name}' has no releases to derive one from")
        return max((row["version"] for row in rows), key=version_key)

    def add_test_result(self, index, path, incoming, actor):
        """devpi: POST to a file. Keep a test result, any JSON, of the file at `path`.

        Returns its `File`."""
        sha256 = incoming.sha256.hexdigest()
        incoming.keep()
        return self.store.write(_store_test_result, index, path, sha256, incoming.size,
                                actor=actor)

    def check_tested(self, index, path, user):
        """Refuse a test result before it is received: NotFound, Forbidden if there are too many."""
        with self.store.read() as db:
            tested, _ = _tested_file(db, index, path)
            if user is None:
                _bound_anonymous(db, tested, 0)

    def docs_of(self, index, name):
        """{version: File}, the documentation zips of a stage's project.

        Forbidden if the project is quarantined (PEP 792)."""
        with self.store.read() as db:
            row = db.execute("SELECT status FROM projects WHERE index_id = ? AND name = ?",
                             (index.id, name)).fetchone()
            status = Status.of(row["status"]) if row else ACTIVE
            status.refuse_withheld(f"the documentation of {name}")
            # `kind` twice: SQLite uses the partial index only if the query states its condition
            return {file.version: file for file in select_files(
                db, "JOIN projects ON projects.id = project_id "
                "WHERE projects.index_id = ? AND name = ? "
                "AND kind = 'doczip' AND kind != 'releasefile'", index.id, name)}

    def can_be_shown(self, sha256):
        """Whether the members of a documentation zip can be served."""
        with self.store.read() as db:
            return db.execute("SELECT 1 FROM docs WHERE sha256 = ?",
                              (sha256,)).fetchone() is not None

    def doc_member(self, sha256, path):
        """The `DocMember` at a path of a documentation zip, or None."""
        return next(iter(self.doc_members(sha256, "path = ?", path)), None)

    def doc_members(self, sha256, condition, *values):
        """The members of a documentation zip that meet an SQL condition."""
        with self.store.read() as db:
            return [DocMember(*row) for row in db.execute(
                "SELECT path, number, start, packed, size, deflated FROM doc_members "
                f"JOIN docs ON docs.id = doc_id WHERE sha256 = ? AND {condition}",
                (sha256, *values))]

    @staticmethod
    def _check_digests(form, incoming):
        for field, make in (
                ("sha256_digest", None),
                ("md5_digest", functools.partial(hashlib.md5, usedforsecurity=False)),
                ("blake2_256_digest", functools.partial(hashlib.blake2b, digest_size=32))):
            stated = form.get(field, [""])[0].strip().lower()
            if not stated:
                continue

            if make is None:
                found = incoming.sha256.hexdigest()
            else:
                digest = make()
                with incoming.reader() as file:
                    for piece in iter(lambda: file.read(1 << 20), b""):
                        digest.update(piece)
                found = digest.hexdigest()
            if found != stated:
                raise BadRequest(f"{field} {one_line(stated, 140)} does not match the uploaded "
                                 f"content, which has {found}")

    @staticmethod
    def _check_archive(filename, name, version, archive):
        if not archive:
            return
        if re.match(r"\s*[3-9]\.", archive.get("metadata_version", "")):
            raise BadRequest(f"'{filename}' has metadata version "
                             f"{one_line(archive['metadata_version'], 20)}; "
                             "versions up to 2.x are known")
        found = archive.get("name", ""), archive.get("version", "")
        if normalize(found[0]) != normalize(name):
            raise BadRequest(f"'{filename}' holds metadata of the project "
                             f"'{one_line(found[0], 80)}', not '{name}'")
        if not same_version(found[1], version):
            raise BadRequest(f"'{filename}' holds metadata of version "
                             f"'{one_line(found[1], 80)}', not '{version}'")

    def _refuse_early(self, index, upload, may_replace):
        """Refuse what the change would refuse, before bytes are kept for it."""
        if index.volatile:
            return
        with self.store.read() as db:
            row = db.execute("SELECT sha256 FROM files JOIN projects ON projects.id = project_id "
                             "WHERE projects.index_id = ? AND name = ? AND filename = ? "
                             "AND kind = 'releasefile'",
                             (index.id, normalize(upload.name), upload.filename)).fetchone()
            before = _withdrawn(db, index, "releasefile", upload.filename)
        if row and row["sha256"] != upload.sha256:
            raise already_exists(upload.filename)
        _refuse_other_bytes(index, before, upload.filename, upload.sha256, may_replace)


def already_exists(filename, more=""):
    return Conflict(f"{filename} already exists in non-volatile index{more}")


def _withdrawn(db, index, kind, filename):
    """What the name of a deleted file of the stage stood for last: (sha256, kept), or None."""
    return db.execute("SELECT sha256, kept FROM withdrawn "
                      "WHERE index_path = ? AND kind = ? AND filename = ?",
                      (index.path, kind, filename)).fetchone()


def _refuse_other_bytes(index, before, filename, sha256, may_replace):
    """Conflict for a name that a non-volatile index once gave to other bytes: only its owner and
    root may give it again."""
    is_taken = before and before["kept"] and before["sha256"] != sha256
    if is_taken and not index.volatile and not may_replace:
        raise Conflict(f"{filename} was deleted from the non-volatile index {index.path}, where "
                       f"this name stands for sha256={before['sha256']}: only {index.user} and "
                       "root may give it to other content")


# -- changes


def _register(change, index, name, version, metadata):
    index = current_index(change, index)
    require_project(change, index, name)
    if put_release(change, index, name, version, with_defaults(metadata)):
        change.happened(Event("register", index, normalize(name), version))


def require_project(change, index, name):
    """The id of the stage's project, which is created if it is new. Forbidden if its status takes
    no uploads (PEP 792)."""
    key = (index.user, index.name, normalize(name))
    project = change.get("project", key)
    if project is None:
        return change.put("project", key, {"status": "active", "reason": None})
    status = Status(project["status"], project["reason"])
    if not status.takes_uploads:
        reason = f": {status.reason}" if status.reason else ""
        raise Forbidden(f"the project {key[2]} on {index.path} is {status.word}{reason}; "
                        "it takes no uploads")
    return change.id_of("project", key)


def put_release(change, index, name, version, metadata):
    """Insert or replace a release; False if nothing changes."""
    key = (index.user, index.name, normalize(name), version)
    if change.get("release", key) == {"metadata": metadata}:
        return False
    change.put("release", key, {"metadata": metadata})
    return True


def _store_upload(change, index, upload, may_replace):
    """Enter an uploaded file; False if a non-volatile index has the same bytes already."""
    index = current_index(change, index)
    project_id = require_project(change, index, upload.name)
    old = file_named(change, project_id, upload.filename, "releasefile")
    if old and not index.volatile:
        if old.sha256 != upload.sha256:
            raise already_exists(upload.filename)
        return False

    history = make_room(change, index, old, "releasefile", upload.filename, upload.sha256,
                        may_replace)
    history.append(history_entry("upload", who=change.who, dst=index.path))
    _merge_release(change, index, upload)
    if old and old.version != upload.version:
        remove_if_empty(change, index, upload.name, old)

    # installers get the archive's own metadata
    stated = upload.archive if upload.archive else upload.metadata
    file = put_file(
        change, index, upload.name, history, version=upload.version, filename=upload.filename,
        sha256=upload.sha256, size=upload.size,
        requires_python=stated.get("requires_python") or None, metadata=upload.metadata_file,
        attestations=upload.attestations or None)
    change.happened(Event("upload", index, normalize(upload.name), upload.version, file,
                          detail=f"sha256={file.sha256}"))
    return True


def attestations_of(db, file):
    """The attestations of a file, or ""."""
    row = db.execute("SELECT content FROM attestations WHERE file_id = ?", (file.id,)).fetchone()
    return row["content"] if row else ""


def file_named(change, project_id, filename, kind):
    """The project's file of that name and kind, or None."""
    row = change.execute(
        f"SELECT {FILE_COLUMNS} FROM files WHERE project_id = ? AND filename = ? AND kind = ?",
        (project_id, filename, kind)).fetchone()
    return File._make(row) if row else None


def history_entry(what, **facts):
    """An entry of a file's history, as devpi's JSON shows it."""
    return {"what": what, **facts, "when": list(time.gmtime()[:6])}


def _anonymous_upload():
    """How the stored history of an upload without login begins, as a pattern for SQL's LIKE."""
    text = json.dumps([history_entry("upload", who=None)])
    return text[:text.index("null") + len("null")] + "%"


def as_history(entries):
    """A file's history as stored: how the file came (two entries), and the newest later entries."""
    return entries[:2] + entries[2:][2 - Limits.history:]


def make_room(change, index, old, kind, filename, sha256, may_replace):
    """Free a name for new bytes: `old`, the file that has it, is deleted with its test results.

    Conflict if the name was kept for other bytes (see `_refuse_other_bytes`). Returns the beginning
    of the new file's history, which says like the audit log what replaced which content."""
    if old:
        change.put("file", (index.user, index.name, old.path), None)

    before = _withdrawn(change, index, kind, filename)
    replaced = {}
    if before:
        _refuse_other_bytes(index, before, filename, sha256, may_replace)
        change.put("withdrawn", (index.path, kind, filename), None)
        if before["sha256"] != sha256:
            replaced = {"replaced": f"sha256={before['sha256']}", "by": f"sha256={sha256}"}
            change.happened(Event("replaced", index, target=filename,
                                  detail=f"{replaced['replaced']} by {replaced['by']}"))

    if old is None:
        return []
    count = next((entry["count"] for entry in json.loads(old.history or "[]")
                  if entry["what"] == "overwrite"), 0)
    return [history_entry("overwrite", who=None, count=count + 1, **replaced)]


def _merge_release(change, index, upload):
    """Update a release's metadata by the form; the archive fills gaps."""
    key = (index.user, index.name, normalize(upload.name), upload.version)
    before = change.get("release", key)
    metadata = {**(before["metadata"] if before else with_defaults({})), **upload.metadata}
    for field in TEXT_FIELDS + LIST_FIELDS + NEWER_LIST_FIELDS:
        if not metadata.get(field) and upload.archive.get(field):
            metadata[field] = upload.archive[field]
    if before is None or before["metadata"] != metadata:
        change.put("release", key, {"metadata": metadata})


def put_file(change, index, project, history, metadata=None, path=None, **facts):
    """Enter a file of a stage's project, whose bytes are here; returns its `File`.

    `metadata`: the `MetadataFile` of a wheel; `facts`: see `FileRows`."""
    value = {**dict.fromkeys(FileRows.plain), "kind": "releasefile", "first_seen": 0,
             "attestations": None, "for": None, "uploaded": iso_time(time.time()), **facts,
             "project": normalize(project), "history": as_history(history)}
    if metadata:
        value["core_metadata"] = value["metadata_sha256"] = metadata.sha256
        change.put("metadata", (metadata.sha256,),
                   {"packed": base64.b64encode(metadata.packed).decode()})

    path = path or file_path(f"sha256={value['sha256']}", value["filename"])
    key = (index.user, index.name, path)
    if change.id_of("file", key):
        raise Conflict(f"{value['filename']} is there already as a file of another project")
    file_id = change.put("file", key, value)
    project = (index.user, index.name, value["project"])
    return File(
        id=file_id, index_id=index.id, position=None, url=None, path=path,
        project_id=change.id_of("project", project),
        release_id=change.id_of("release", (*project, value["version"])),
        for_id=change.id_of("file", (*key[:2], value["for"])) if value["for"] else None,
        hash_spec=f"sha256={value['sha256']}", history=json.dumps(value["history"]),
        **{column: value[column] for column in FileRows.plain})


# -- documentation and test results


class Attachment(typing.NamedTuple):
    """A file attached to a release, on its way in; its bytes are kept already."""
    kind: str
    filename: str
    sha256: str
    size: int


def _store_docs(change, index, name, version, docs, uploaded_name, members, may_replace):
    """Enter a documentation zip, and its release if that is new; False as in `_store_upload`.

    Of several spellings of the version, the zip goes to the one that has documentation, else to the
    one that has a release."""
    index = current_index(change, index)
    project_id = require_project(change, index, name)
    # `kind` twice: SQLite uses the partial index only if the query states its condition
    for table in ("releases WHERE", "files WHERE kind = 'doczip' AND kind != 'releasefile' AND"):
        rows = change.execute(f"SELECT version FROM {table} project_id = ?", (project_id,))
        found = spellings(version, [row["version"] for row in rows])
        version = found[0] if found else version

    docs = docs._replace(filename=f"{normalize(name)}-{version}.doc.zip")
    old = file_named(change, project_id, docs.filename, "doczip")
    if old and not index.volatile:
        if old.sha256 != docs.sha256:
            raise already_exists(uploaded_name)
        return False
    if change.id_of("release", (index.user, index.name, normalize(name), version)) is None:
        put_release(change, index, name, version,
                    with_defaults({"name": name, "version": version}))

    history = make_room(change, index, old, "doczip", docs.filename, docs.sha256, may_replace)
    history.append(history_entry("upload", who=change.who, dst=index.path))
    file = put_file(change, index, name, history, version=version, **docs._asdict())
    enter_doc_members(change, docs.sha256, members)
    change.happened(Event("docs", index, normalize(name), version, file,
                          detail=f"sha256={file.sha256}"))
    return True


def enter_doc_members(change, sha256, members):
    """Enter the members of a documentation zip; None: it is no zip, and shows nothing."""
    if members is None or \
            change.execute("SELECT 1 FROM docs WHERE sha256 = ?", (sha256,)).fetchone():
        return
    doc_id = change.execute("INSERT INTO docs (sha256) VALUES (?)", (sha256,)).lastrowid
    change.executemany(
        "INSERT INTO doc_members (doc_id, path, number, start, packed, size, deflated) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)", [(doc_id, *member) for member in members])


def enter_docs(store, blobs, sha256):
    """Enter the members of a stored documentation zip, if they are not entered yet."""
    with store.read() as db:
        if db.execute("SELECT 1 FROM docs WHERE sha256 = ?", (sha256,)).fetchone():
            return
    with blobs.open(sha256) as file:
        members, _ = doc_members(file, sha256) or (None, 0)
    store.write(enter_doc_members, sha256, members)


def _tested_file(db, index, path):
    """(File, name of its project) that a test result may be about; NotFound."""
    row = db.execute(f"SELECT {FILE_COLUMNS}, projects.name AS project FROM files "
                     "JOIN projects ON projects.id = project_id "
                     "WHERE files.index_id = ? AND path = ? AND kind = 'releasefile' "
                     "AND release_id IS NOT NULL", (index.id, path)).fetchone()
    if row is None:
        raise NotFound(f"no release file found at {index.path}/{path}")
    return File._make(tuple(row)[:-1]), row["project"]


def _store_test_result(change, index, path, sha256, size):
    index = current_index(change, index)
    tested, project = _tested_file(change, index, path)
    if change.who is None:
        _bound_anonymous(change, tested, size)
    result = put_test_result(change, index, project, tested, sha256, size,
                             [history_entry("upload", who=change.who, dst=index.path)])
    change.happened(Event("toxresult", index, project, tested.version, result))
    return result


def _bound_anonymous(db, tested, size):
    """Forbidden if a file has too many test results from users who are not logged in.

    The bounds are on their number, and on their bytes with `size` more."""
    count, total = db.execute("SELECT count(*), coalesce(sum(size), 0) FROM files "
                              "WHERE for_id = ? AND history LIKE ?",
                              (tested.id, _anonymous_upload())).fetchone()
    if count >= Limits.anonymous_results or total + size > Limits.anonymous_result_bytes:
        raise Forbidden(
            f"{tested.filename} has {count} test results of {total} bytes from users who are not "
            f"logged in; it takes {Limits.anonymous_results} of {Limits.anonymous_result_bytes} "
            "bytes in all: log in, or delete some")


def put_test_result(change, index, project, tested, sha256, size, history):
    """Enter a test result beside the file that it is about; Forbidden if that has too many."""
    count = change.execute("SELECT count(*) FROM files WHERE for_id = ?",
                           (tested.id,)).fetchone()[0]
    if count >= Limits.test_results:
        raise Forbidden(f"{tested.filename} has {count} test results already: delete some")

    folder, stamp = tested.path.rpartition("/")[0], time.strftime("%Y%m%d%H%M%S", time.gmtime())
    while True:
        filename = f"{tested.filename}.toxresult-{stamp}-{count}"
        if not change.execute("SELECT 1 FROM files WHERE index_id = ? AND path = ?",
                              (index.id, f"{folder}/{filename}")).fetchone():
            break
        count += 1
    return put_file(change, index, project, history, path=f"{folder}/{filename}",
                    version=tested.version, filename=filename, sha256=sha256, size=size,
                    kind="toxresult", **{"for": tested.path})


# -- yanks and statuses


def _require_stage(change, index, sentence):
    """The index as it is now; BadRequest with this sentence if it is a mirror."""
    if index.is_mirror:
        raise BadRequest(f"{index.path} is a mirror: {sentence}")
    return current_index(change, index)


def yank_files(change, index, name, version, path, reason):
    """Yank (PEP 592) the file at `path` of a stage, or all files of a release if that is None;
    returns the number of files that it changed.

    `reason`: "" without one; None takes the yank back."""
    index = _require_stage(change, index, "what is yanked there is said by its upstream")
    condition, values = "files.index_id = ? AND path = ?", (path,)
    if not path:
        there = change.execute(
            "SELECT DISTINCT version FROM files JOIN projects ON projects.id = project_id "
            "WHERE projects.index_id = ? AND name = ?", (index.id, name))
        texts = spellings(version, [row["version"] for row in there])
        condition = ("projects.index_id = ? AND projects.name = ? "
                     f"AND files.version IN ({marks(texts)})")
        values = (name, *texts)

    rows = change.execute(
        f"SELECT {FILE_COLUMNS}, projects.name AS project FROM files JOIN projects "
        f"ON projects.id = project_id WHERE kind = 'releasefile' AND {condition}",
        (index.id, *values)).fetchall()
    if not rows and path and is_gone(change, f"{index.path}/{path}"):
        raise Gone(f"package '{index.path}/{path}' was deleted already")
    if not rows:
        raise NotFound(f"package '{index.path}/{path}' doesn't exist" if path else
                       f"version '{version}' of project '{name}' has no files on {index.path}")

    project, count = rows[0]["project"], 0
    for file in (File._make(tuple(row)[:-1]) for row in rows):
        if file.yanked == reason:
            continue
        count += 1
        entry = history_entry("unyank", who=change.who) if reason is None \
            else history_entry("yank", who=change.who, reason=reason)
        key = (index.user, index.name, file.path)
        value = change.get("file", key)
        change.put("file", key, {**value, "yanked": reason,
                                 "history": as_history(value["history"] + [entry])})
        change.happened(Event(entry["what"], index, project, file.version, file,
                              detail=reason or ""))
    return count


def set_status(change, index, name, status):
    """Set the `Status` of a stage's project."""
    index = _require_stage(
        change, index, "the status of its projects is said by its upstream")
    key = (index.user, index.name, name)
    before = change.get("project", key)
    if before is None:
        raise NotFound(f"no project '{name}'")
    after = {"status": status.word,
             "reason": None if status.word == "active" else status.reason}
    if after != before:
        change.put("project", key, after)
        change.happened(Event("project.status", index, name,
                              detail=": ".join(filter(None, status))))


def configure_project(change, index, name, allows):
    """Make a `ProjectEdit` of a stage's project, which is created if it is new; returns whether
    that changed anything."""
    index, key = current_index(change, index), (index.user, index.name, name)
    is_new = change.get("project", key) is None
    if is_new:
        check_project_name(name)
        change.put("project", key, {"status": "active", "reason": None})
        change.happened(Event("register", index, name))
    is_other = allows is not None and set_whitelisted(change, index, name, allows)
    return is_new or is_other


# -- removal


class Removed(typing.NamedTuple):
    """What a removal deleted: a file, else a version, else a project."""
    project: str
    version: str | None = None
    file: File | None = None

    @property
    def what(self):
        return "file" if self.file else "version" if self.version else "project"


def remove_project(change, index, name, refusal=None):
    """devpi: DELETE of a project.

    Forbidden on a non-volatile index, with this `refusal`, unless that is None. Returns what is to
    be said about the project's name: see `StageRemoval.note`."""
    return _remove(change, index, refusal, lambda removal: removal.project(name))


def remove_version(change, index, name, version, refusal=None):
    """devpi: DELETE of a version, in all its spellings; as `remove_project`."""
    return _remove(change, index, refusal, lambda removal: removal.version(name, version))


def remove_file(change, index, path, refusal=None):
    """devpi: DELETE of a file; as `remove_project`."""
    return _remove(change, index, refusal, lambda removal: removal.file(path))


def _remove(change, index, refusal, take):
    index = current_index(change, index)
    if refusal and not index.volatile:
        raise Forbidden(refusal)
    removal = _REMOVALS[index.config["type"]](change, index)
    removed = take(removal)
    note = removal.note(removed.project)
    change.happened(Event(f"delete.{removed.what}", index, removed.project, removed.version,
                          removed.file, detail=note))
    return note


class StageRemoval:
    """Deletes what users put into a stage."""

    def __init__(self, change, index):
        self.change, self.index, self.key = change, index, (index.user, index.name)

    def project(self, name):
        if self.change.id_of("project", (*self.key, name)) is None:
            raise NotFound("project not found")
        self.change.put("project", (*self.key, name), None)
        return Removed(name)

    def version(self, name, version):
        there = [row["version"] for row in self.change.execute(
            "SELECT version FROM releases WHERE project_id = ? ORDER BY id",
            (self.change.id_of("project", (*self.key, name)),))]
        texts = spellings(version, there)
        if not texts:
            raise _no_version(self.index, name, version)
        for text in texts:
            self.change.put("release", (*self.key, name, text), None)
        return Removed(name, texts[0])

    def file(self, path):
        file, name = _files_at(self.change, self.index, path)[0]
        self.change.put("file", (*self.key, path), None)
        remove_if_empty(self.change, self.index, name, file)
        return Removed(name, file.version, file)

    def note(self, project):
        """A sentence on what a removal means for the project's name, or "".

        A project that has lost its last release keeps the name; a deleted project frees it."""
        left = self.change.execute(
            "SELECT releases.id AS release_id FROM projects "
            "LEFT JOIN releases ON project_id = projects.id "
            "WHERE index_id = ? AND name = ? LIMIT 1", (self.index.id, project)).fetchone()
        if left is None:
            return f"the name {project} is free on {self.index.path} now: mirrors may answer for it"
        if left["release_id"] is None:
            return (f"{project} is empty now and stays private: mirrors are shut out until the "
                    "project itself is deleted")
        return ""


class MirrorRemoval:
    """Deletes what a mirror has cached; what upstream still lists comes back."""

    def __init__(self, change, index):
        self.change, self.index = change, index

    def project(self, name):
        row = self.change.execute("SELECT id FROM projects WHERE index_id = ? AND name = ? "
                                  "AND fetched IS NOT NULL", (self.index.id, name)).fetchone()
        if row is None:
            raise NotFound("project not found")
        note_gone_paths(self.change, self.index.id, self.index.path, "project_id = ?", row["id"])
        self.change.execute("DELETE FROM projects WHERE id = ?", (row["id"],))
        self.change.touch(project_tag(self.index.id, name), names_tag(self.index.id))
        return Removed(name)

    def version(self, name, version):
        """Deletes the bytes; the links stay."""
        rows = self.change.execute(
            "SELECT path, version FROM files JOIN projects ON projects.id = project_id "
            "WHERE projects.index_id = ? AND name = ?", (self.index.id, name)).fetchall()
        texts = spellings(version, {row["version"] for row in rows})
        found = [row for row in rows if row["version"] in texts]
        if not found:
            raise _no_version(self.index, name, version)
        self.change.executemany("UPDATE files SET sha256 = NULL WHERE index_id = ? AND path = ?",
                                [(self.index.id, row["path"]) for row in found])
        self.change.touch(project_tag(self.index.id, name))
        return Removed(name, version)

    def file(self, path):
        self.change.execute("INSERT OR IGNORE INTO gone_cached SELECT ? WHERE EXISTS "
                            "(SELECT 1 FROM files WHERE index_id = ? AND path = ?)",
                            (f"{self.index.path}/{path}", self.index.id, path))
        for file, name in _files_at(self.change, self.index, path):
            self.change.execute("DELETE FROM files WHERE id = ?", (file.id,))
            # so that the link comes back when upstream is asked again
            self.change.execute("UPDATE projects SET etag = NULL WHERE id = ?", (file.project_id,))
            self.change.touch(project_tag(self.index.id, name))
        return Removed(name, file.version, file)

    def note(self, project):
        return ""


_REMOVALS = {"stage": StageRemoval, "mirror": MirrorRemoval}


def _no_version(index, name, version):
    return NotFound(f"version '{version}' of project '{name}' not found on stage '{index.path}'")


def _files_at(change, index, path):
    """[(File, project), ...] at a path of an index, one for each project of a mirror that lists it;
    else Gone or NotFound."""
    rows = change.execute(
        f"SELECT {FILE_COLUMNS}, (SELECT name FROM projects WHERE projects.id = project_id) "
        "FROM files WHERE index_id = ? AND path = ?", (index.id, path)).fetchall()
    full = f"{index.path}/{path}"
    if not rows:
        if is_gone(change, full):
            raise Gone(f"package '{full}' was deleted already")
        raise NotFound(f"package '{full}' doesn't exist")
    return [(File._make(tuple(row)[:-1]), row[-1]) for row in rows]


def remove_if_empty(change, index, name, file):
    """Delete the release of a deleted file if that was its last one.

    The project stays, as its name is still private."""
    if change.execute("SELECT 1 FROM files WHERE release_id = ?",
                      (file.release_id,)).fetchone() is None:
        change.put("release", (index.user, index.name, normalize(name), file.version), None)


# ==================================================================================================
# 10  Upstream
#
# Requests to other servers are made here and nowhere else: pooled keep-alive connections, redirects
# that never take credentials to another host, time limits. Also the parsing of simple pages, JSON
# and HTML, into values.
# ==================================================================================================


SIMPLE_JSON = "application/vnd.pypi.simple.v1+json"
SIMPLE_HTML = "application/vnd.pypi.simple.v1+html"


class ConnectionDropped(Exception):
    """Upstream closed the connection without a response; a retry needs another connection."""


class UpstreamResponse:
    """Upstream's response: `status`, `headers`, final `url`; `read` the body, then `close`."""

    def __init__(self, client, key, connection, response, url):
        self.client, self.key, self.connection, self.response, self.url = \
            client, key, connection, response, url
        self.status, self.headers = response.status, response.headers

    def header(self, name):
        return self.headers.get(name, "")

    def read(self, size):
        """Up to `size` bytes, as soon as any arrive; b"" at the end."""
        try:
            with outside_wait():
                return self.response.read1(size)
        except (OSError, http.client.HTTPException) as error:
            raise UpstreamTrouble(f"{public_url(self.url)}: {reason_of(error)}") from error

    def length(self):
        """The stated Content-Length, or None."""
        text = self.header("Content-Length")
        return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None

    def close(self):
        """Keep the connection if the body was read to its end, else close it."""
        if self.response.length == 0:
            self.response.close()       # read1() leaves it open after the last byte
        if self.response.isclosed() and not self.response.will_close:
            self.client.give_back(self.key, self.connection)
        else:
            self.connection.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class PostResponse(typing.NamedTuple):
    """The response to a POST; `text`: the beginning of its body."""
    status: int
    reason: str
    text: str


def is_near(address):
    """Whether an IP address is loopback, link-local or unspecified: on this machine or its link."""
    ip = ip_of(address)
    return ip.is_loopback or ip.is_link_local or ip.is_unspecified


def is_link_local(address):
    """Whether an IP address is link-local, like a cloud's metadata service."""
    return ip_of(address).is_link_local


def _fixed_place(host):
    """What a host is without a look-up: "loopback" or an IP address; None for other hosts."""
    if host == "localhost" or host.endswith(".localhost") or host == socket.gethostname().lower():
        return "loopback"
    ip = ip_of(host)
    if ip is None:
        return None
    return "loopback" if ip.is_loopback else str(ip)


def is_near_host(host):
    """Whether a host in a URL is near, known without a look-up."""
    place = _fixed_place(host)
    return place == "loopback" or place is not None and is_near(place)


def is_same_place(url, other):
    """Whether two URLs are certainly on the same server: same address, same port."""
    (_, host, port), (_, other_host, other_port) = origin_of(url), origin_of(other)
    place = _fixed_place(host)
    return place is not None and place == _fixed_place(other_host) and port == other_port


_TOO_NEAR = ("is on this machine or its link, not where the mirror_url is; "
             "--upstream-allow could name its host")
_LINK_LOCAL = "is on this machine's link; --webhook-allow or --push-allow could name its host"


class UpstreamConnection(http.client.HTTPConnection):
    """An HTTP connection that checks addresses before it connects."""
    has_proxy = False
    is_near = False         # known once it is connected
    refused = None          # (function: whether an address is refused, the sentence that says so)

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._create_connection = self._open

    def _open(self, address, timeout, source_address=None):
        """Like socket.create_connection, to the first address of the host that is not refused."""
        if self.refused is None or self.has_proxy:
            return socket.create_connection(address, timeout)
        is_refused, sentence = self.refused
        found = [place[0] for *_, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM)]
        allowed = [place for place in found if not is_refused(place)]
        if not allowed:
            raise UpstreamTrouble(sentence)

        for place in allowed:
            try:
                return socket.create_connection((place, address[1]), timeout)
            except OSError as problem:
                error = problem
        raise error


class UpstreamTLSConnection(http.client.HTTPSConnection, UpstreamConnection):
    """An UpstreamConnection with TLS."""


# Errors of opening a connection that are no fault of the other host.
_OWN_TROUBLE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL)


class UpstreamClient(Part):
    """Keep-alive connections to other servers, through the proxies of the environment, as
    `urllib.request` reads them.

    A URL from a mirror's page or an upstream's redirect was not chosen by an operator: it may
    lead neither to this machine, where services trust local clients, nor from https to http."""

    def __init__(self, settings):
        self.upstream_allow = settings.upstream_allow
        self.post_allow = (*(settings.webhook_allow or ()), *(settings.push_allow or ()))
        self.timeout = settings.request_timeout
        self.offline, self.read_only = settings.offline_mode, settings.read_only
        self.lock = threading.Lock()
        # connection that waits for a response's head -> time.monotonic() of its time-out
        self.asking = {}
        self.idle = {}              # (scheme, host, port) -> [(connection, since)]
        self.paused = {}            # (scheme, host, port) -> time.monotonic(): down until then
        self.proxies = urllib.request.getproxies()
        if os.environ.get("ALL_PROXY"):     # urllib ignores it if all_proxy is empty
            self.proxies.setdefault("all", os.environ["ALL_PROXY"])

    def loops(self):
        if not self.read_only:
            yield "upstream watch", self.watch

    @functools.cached_property
    def tls(self):
        return ssl.create_default_context()     # takes 47 ms of CPU: made once, when needed

    def get(self, url, headers, method="GET", mirror_url=None):
        """Request a URL and follow redirects.

        The user and password of the URL become Basic credentials for its origin alone.

        `mirror_url`: of the mirror whose page names the URL; None if the URL is below it. Raises
        UpstreamTrouble if there is no response, or the URL may not be requested. The caller closes
        the response."""
        if self.offline:
            raise UpstreamTrouble("offline mode: upstream is not asked")
        authority = origin_of(url)
        credentials = credentials_of(url)
        before, home = mirror_url, mirror_url or url

        for _ in range(Limits.upstream_redirects + 1):
            may_be_near = self._check_step(before, url, home)
            sent = dict(headers)
            if credentials and origin_of(url) == authority:
                sent["Authorization"] = credentials
            response = self._ask(method, url, sent, may_be_near)
            if response.status not in (301, 302, 303, 307, 308) or not response.header("Location"):
                return response
            response.close()
            before, url = url, joined_url(response.url, response.header("Location"))
            if url is None:
                raise UpstreamTrouble(
                    f"{public_url(response.url)} redirects to something that is no http URL")
        raise UpstreamTrouble(f"{public_url(url)}: too many redirects")

    def _check_step(self, before, url, home):
        """Whether a URL may lead to this machine; UpstreamTrouble if it may not be requested.

        `before`: the URL of the page or redirect that names it, None for a mirror's own URL;
        `home`: the mirror's own URL."""
        if not is_allowed_target(url, self.upstream_allow):
            raise UpstreamTrouble(f"--upstream-allow does not name the host of {public_url(url)}")
        if before is None or self.upstream_allow is not None:
            return True
        if before.startswith("https:") and url.startswith("http:"):
            raise UpstreamTrouble(
                f"{public_url(url)} is plain http, and {public_url(before)}, "
                "which names it, is not; --upstream-allow could name its host")
        return is_same_place(url, home)

    def _ask(self, method, url, headers, may_be_near):
        key, began, new = origin_of(url), time.monotonic(), 0
        try:
            while True:
                connection, kept = self._connection(key, url)
                new += not kept
                try:
                    return self._send(key, connection, method, url, headers, may_be_near)
                except ConnectionDropped as error:
                    # a kept connection may have been idle for too long; a new one gets a second try
                    if new > 1 or time.monotonic() - began > Limits.upstream_stall:
                        raise error.__cause__
                    log.debug("%s closed a connection without an answer, using a new one", key[1])
        except (OSError, http.client.HTTPException, ValueError) as error:
            kind = NoResponse if isinstance(error, OSError) else UpstreamTrouble
            raise kind(f"{public_url(url)}: {reason_of(error)}") from error

    def _connect(self, key, connection):
        """Open a connection. If that fails, the host counts as down, for all requests.

        Other failures may be the fault of a single request, and pause nothing."""
        try:
            with outside_wait():
                connection.connect()
            if not connection.has_proxy:        # a proxy decides itself where it connects to
                connection.is_near = is_near(connection.sock.getpeername()[0])
        except OSError as error:
            if error.errno not in _OWN_TROUBLE or isinstance(error, socket.gaierror):
                with self.lock:
                    now = time.monotonic()
                    over = [other for other, until in self.paused.items() if until < now]
                    for other in over:
                        del self.paused[other]
                    self.paused[key] = now + Limits.upstream_pause
            raise

    def _target(self, url, headers):
        """(request target, headers) for a URL, as its server or its proxy needs them."""
        parts = urllib.parse.urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        target = urllib.parse.quote(target, safe=SENT_AS_IT_IS)
        proxy = self._proxy(parts)
        if proxy and parts.scheme == "http":
            target = f"http://{parts.netloc.rpartition('@')[2]}{target}"
            if credentials_of(proxy):
                headers = {**headers, "Proxy-Authorization": credentials_of(proxy)}
        return target, headers

    def post(self, url, headers, pieces, length, timeout, connect_time=None):
        """Send a POST whose body is `length` bytes in byte strings; return its `PostResponse`.

        Follows no redirects. `timeout`: seconds for connecting (unless `connect_time` is given),
        for each step of sending, and for the response; the whole body has the time that
        `Limits.slowest_post` allows. UpstreamTrouble if there is no response."""
        try:
            connection = self._new_connection(origin_of(url), url, connect_time or timeout)
            if not is_allowed_target(url, self.post_allow):
                connection.refused = (is_link_local, f"{public_url(url)} {_LINK_LOCAL}")
            try:
                return self._post(connection, url, headers, pieces, length, timeout)
            finally:
                connection.close()
                with self.lock:
                    self.asking.pop(connection, None)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UpstreamTrouble(f"{url_origin(url)}: {reason_of(error)}") from error

    def _post(self, connection, url, headers, pieces, length, timeout):
        target, headers = self._target(url, {**headers, "Content-Length": str(length)})

        def until(seconds):
            with self.lock:
                self.asking[connection] = time.monotonic() + seconds

        with outside_wait():
            try:
                connection.connect()
            except OSError as error:
                raise Unreachable(f"{url_origin(url)}: {reason_of(error)}") from error
            connection.sock.settimeout(timeout)
            until(timeout + length / Limits.slowest_post)
            connection.request("POST", target, pieces, headers)
            until(timeout)
            response = connection.getresponse()

            text = b""
            while len(text) < Limits.posted_response:
                piece = response.read1(Limits.posted_response - len(text))
                if not piece:
                    break
                text += piece
        return PostResponse(response.status, response.reason, text.decode("utf-8", "replace"))

    def _send(self, key, connection, method, url, headers, may_be_near):
        target, headers = self._target(url, headers)
        try:
            if connection.sock is None:
                if not may_be_near:
                    connection.refused = is_near, f"{public_url(url)} {_TOO_NEAR}"
                self._connect(key, connection)
            if connection.is_near and not may_be_near:      # kept by a mirror that may be near
                raise UpstreamTrouble(f"{public_url(url)} {_TOO_NEAR}")

            connection.sock.settimeout(Limits.upstream_stall)
            with self.lock:
                self.asking[connection] = time.monotonic() + Limits.upstream_page_time
            with outside_wait():
                connection.request(method, target, headers=headers)
                response = connection.getresponse()
        except BaseException as error:
            connection.close()
            if isinstance(error, (ConnectionError, http.client.BadStatusLine, ssl.SSLEOFError)) \
                    and not isinstance(error, ConnectionRefusedError):
                raise ConnectionDropped from error
            raise
        finally:
            with self.lock:
                self.asking.pop(connection, None)

        with self.lock:
            self.paused.pop(key, None)
        return UpstreamResponse(self, key, connection, response, url)

    def _connection(self, key, url):
        """(connection, whether it was used before)."""
        now = time.monotonic()
        with self.lock:
            idle = self.idle.get(key, [])
            while idle:
                connection, since = idle.pop()
                if now - since < Limits.upstream_idle:
                    return connection, True
                connection.close()
        return self._new_connection(key, url, self.timeout), False

    def _new_connection(self, key, url, timeout):
        """A connection that is not open yet, to a host or its proxy."""
        scheme, host, port = key
        proxy = self._proxy(urllib.parse.urlsplit(url))
        kind = UpstreamConnection
        arguments = {"timeout": timeout}
        if scheme == "https":
            kind = UpstreamTLSConnection
            arguments["context"] = self.tls
        if not proxy:
            return kind(host, port, **arguments)

        through = urllib.parse.urlsplit(proxy)
        connection = kind(through.hostname, through.port or 80, **arguments)
        connection.has_proxy, connection.is_near = True, is_near_host(host)
        if scheme == "https":
            credentials = credentials_of(proxy)
            connection.set_tunnel(
                host, port, {"Proxy-Authorization": credentials} if credentials else {})
        return connection

    def _proxy(self, parts):
        """The URL of the proxy for a URL, or None; UpstreamTrouble for a proxy without HTTP."""
        proxy = self.proxies.get(parts.scheme) or self.proxies.get("all")
        if not proxy or self._goes_without_proxy(parts):
            return None
        if "//" not in proxy:
            return "http://" + proxy
        if proxy.lower().startswith("socks"):
            raise UpstreamTrouble(f"the proxy {public_url(proxy)} of the environment speaks SOCKS, "
                                  "which is not supported: name one that speaks HTTP, or put "
                                  f"{parts.hostname} into no_proxy")
        return proxy

    def _goes_without_proxy(self, parts):
        """Whether no_proxy excepts the host of a URL.

        By its name or domain, with or without a port (`urllib.request`), or by its address or a
        network of addresses (curl)."""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        address = ip_of(parts.hostname or "")
        if address is None:
            return urllib.request.proxy_bypass(f"{parts.hostname}:{port}")
        for entry in self.proxies.get("no", "").split(","):
            with contextlib.suppress(ValueError):       # a name
                if address in ipaddress.ip_network(entry.strip().strip("[]"), strict=False):
                    return True
        host = f"[{address}]" if address.version == 6 else parts.hostname
        return urllib.request.proxy_bypass(f"{host}:{port}")

    def give_back(self, key, connection):
        """Keep a connection for the next request; close those that were idle for too long."""
        now = time.monotonic()
        with self.lock:
            self.idle.setdefault(key, []).append((connection, now))
            for origin in list(self.idle):
                for old, since in self.idle[origin]:
                    if now - since >= Limits.upstream_idle:
                        old.close()
                self.idle[origin] = [pair for pair in self.idle[origin]
                                     if now - pair[1] < Limits.upstream_idle]
                if not self.idle[origin]:
                    del self.idle[origin]

    def watch(self):
        """A loop for a thread: aborts requests whose response has no complete head in time.

        For example slow lines, or an endless series of 100 Continue."""
        while True:
            time.sleep(1)
            now = time.monotonic()
            with self.lock:
                late = [connection for connection, until in self.asking.items() if until < now]
            for connection in late:
                with contextlib.suppress(OSError, AttributeError):      # it may have ended
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def is_paused(self, url):
        """Whether a host is down: it could not be reached within the last seconds."""
        return self.paused.get(origin_of(url), 0) > time.monotonic()


def origin_of(url):
    """(scheme, host, port) of an http or https URL."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def credentials_of(url):
    """The Authorization header for the user and password in a URL, or None."""
    parts = urllib.parse.urlsplit(url)
    if parts.username is None:
        return None
    pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def joined_url(base, link):
    """A link on the page `base` as an absolute URL without fragment and credentials.

    None if it is not http or https."""
    try:
        url = urllib.parse.urljoin(public_url(base), link.strip())
        parts = urllib.parse.urlsplit(urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]"))
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            return None
    except ValueError:
        return None
    return urllib.parse.urlunsplit(
        parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))


@dataclasses.dataclass(frozen=True)
class UpstreamFile:
    """A file of an upstream page.

    `yanked`: None, or the reason, "" without one. `core_metadata`: None (not offered), "true"
    (offered without a hash) or the SHA-256 of the metadata file (PEP 714). `uploaded`: an ISO time
    or ""."""
    filename: str
    url: str
    hash_spec: str = ""
    size: int | None = None
    uploaded: str = ""
    requires_python: str | None = None
    yanked: str | None = None
    core_metadata: str | None = None
    provenance: str | None = None


@dataclasses.dataclass(frozen=True)
class UpstreamPage:
    """A project's page: files in its order, status, and versions without files (PEP 700)."""
    files: tuple
    status: Status = ACTIVE
    versions: tuple = ()


class JsonReader:
    """Reads the values of a JSON text one by one.

    The objects of a whole page or list would take ten times the memory of the text. ValueError if
    the text is not JSON, has a value of more than 8 MiB, or has more than `most` values. An integer
    of 20 digits or more is read as None."""

    space = re.compile(r"[ \t\r\n]*")
    decoder = json.JSONDecoder(parse_int=lambda text: int(text) if len(text) < 20 else None)

    def __init__(self, text, most):
        self.text, self.left, self.most = text, most, most
        self.position = self.space.match(text).end()

    def _count(self, values):
        self.left -= values
        if self.left < 0:
            raise ValueError(f"more than {self.most} values")

    def members(self, long):
        """Yield (key, value) of the object that the text is.

        The value of the key `long`, an array, is an iterator, to be used up before the next key."""
        self.take("{")
        while not self.takes("}"):
            key = self.value()
            self.take(":")
            if key == long and not self.at_end("["):
                raise ValueError(f"its {long} are no array")
            yield key, self.items() if key == long else self.value()
            if not self.at_end("}"):
                self.take(",")
        if self.position < len(self.text):
            raise ValueError(f"text after its end: {self.around()}")

    def around(self):
        return repr(self.text[self.position:self.position + 40])

    def at_end(self, mark):
        """Whether this mark comes next."""
        return self.text.startswith(mark, self.position)

    def takes(self, mark):
        """Whether this mark comes next; if so, the reader moves past it."""
        if not self.at_end(mark):
            return False
        self.position = self.space.match(self.text, self.position + len(mark)).end()
        return True

    def take(self, mark):
        if not self.takes(mark):
            raise ValueError(f"no {mark} at {self.around()}")

    def value(self):
        self._count(1)
        for size in (1 << 10, 64 << 10, 1 << 20, 8 << 20):
            piece = self.text[self.position:self.position + size]
            try:
                value, end = self.decoder.raw_decode(piece)
            except ValueError:
                continue
            end_of_all = self.position + end == len(self.text)
            if end < len(piece) or end_of_all:      # else a number might continue
                self.position = self.space.match(self.text, self.position + end).end()
                return value
        raise ValueError(f"no value at {self.around()}")

    def items(self):
        """Yield the items of an array."""
        self.take("[")
        while not self.takes("]"):
            if self.position == len(self.text):
                raise ValueError("it ends inside of an array")

            # a stretch up to the end of an object holds whole items, nearly always
            stretch = self.text[self.position:self.position + (64 << 10)]
            past = self.position + len(stretch)
            stretch = stretch[:stretch.rfind("},") + 1]
            try:
                items = self.decoder.decode(f"[{stretch}]") if stretch else []
            except ValueError:
                items = []

            if items:
                self._count(len(items))
                yield from items
                self.position = self.space.match(self.text, self.position + len(stretch)).end()
                self.take(",")
                continue
            while not self.at_end("]") and self.position < past:
                yield self.value()
                if not self.at_end("]"):
                    self.take(",")


def parse_simple_page(project, url, body, is_json, content_type=""):
    """An upstream page (bytes) as an `UpstreamPage`.

    UpstreamTrouble if it is no simple page (PEP 503, 691, 700)."""
    try:
        return _parse_json_page(project, url, body) if is_json else \
            _parse_html_page(project, url, html_text(content_type, body))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UpstreamTrouble(
            f"{public_url(url)}: not a simple page: {reason_of(error)}") from error


def _parse_json_page(project, url, body):
    page, files, unusable = {}, None, 0
    reader = JsonReader(body.decode(json.detect_encoding(body)), Limits.page_files)
    for key, value in reader.members("files"):
        if key != "files":
            page[key] = value
            continue
        files = {}
        for entry in value:
            try:
                file = _json_file(url, entry)
            except (ValueError, TypeError, KeyError, AttributeError):
                file = None
            if file is None:
                unusable += 1
                _log_unusable(url, unusable, repr(entry))
            else:
                _add_file(files, file)

    meta = check_json_version(page.get("meta"))
    if files is None:
        raise ValueError("it has no files")

    known = {canonical_version(version_of_file(filename, project)) for filename in files}
    versions = page.get("versions")
    versions = [v for v in versions
                if isinstance(v, str) and 0 < len(v) <= 200 and v.isprintable()] \
        if isinstance(versions, list) else ()

    status = page.get("project-status") or meta.get("project-status")
    if isinstance(status, str):
        status = {"status": status, "reason": meta.get("project-status-reason")}
    elif not isinstance(status, dict):
        status = {}
    return UpstreamPage(
        tuple(files.values()), _sound_status(status.get("status"), status.get("reason")),
        tuple(v for v in versions if canonical_version(v) not in known))


def _log_unusable(url, number, what):
    """Log an unusable file of a page; at most ten: there may be any number of them."""
    if number <= 10:
        log.info("%s lists an unusable file: %s", public_url(url), one_line(what, 200))
    elif number == 11:
        log.info("%s lists more unusable files", public_url(url))


def _json_file(url, entry):
    """The file of an entry of a page (PEP 691, 700); None if it is unusable."""
    file_url, filename = joined_url(url, entry["url"]), entry.get("filename")
    if file_url and filename is None:
        filename = _last_part(file_url)
    if file_url is None or not isinstance(filename, str) or not is_safe_filename(filename):
        return None

    size, yanked = entry.get("size"), entry.get("yanked")
    metadata = entry.get("core-metadata")
    if metadata is None:
        metadata = entry.get("dist-info-metadata")

    return UpstreamFile(
        filename, file_url,
        _stated_hash({**_fragment_pairs(entry["url"]), **(entry.get("hashes") or {})}),
        # indexes that do not know the size state 0; True is an int, too
        size=size if type(size) is int and 0 < size < 1 << 60 else None,
        uploaded=_sound_time(entry.get("upload-time"), url),
        requires_python=_sound_specifiers(entry.get("requires-python")),
        yanked=_sound_text(yanked) if yanked or yanked == "" else None,
        core_metadata=_offered_metadata(metadata), provenance=_sound_link(entry.get("provenance")))


def _last_part(url):
    """The file name at the end of a URL."""
    return urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])


def _fragment_pairs(link):
    """The {key: value} pairs of a link's fragment: hashes, pip's `egg` and `subdirectory`."""
    pairs = {}
    for pair in re.split("[&;]", urllib.parse.unquote(link.partition("#")[2])):
        key, _, value = pair.partition("=")
        pairs.setdefault(key, value)
    return pairs


def _stated_hash(hashes):
    """The hash spec of the best of {algorithm: hex digest}, "" if there is none.

    ValueError if all of them are damaged: installers would refuse the file, so it must not pass as
    one without a hash."""
    hashes = {algorithm.strip().lower(): digest.strip() if isinstance(digest, str) else digest
              for algorithm, digest in hashes.items()}
    spec = best_hash(hashes)
    damaged = {algorithm: digest for algorithm, digest in hashes.items()
               if digest not in (None, "") and algorithm in hashlib.algorithms_guaranteed}
    if damaged and not spec:
        raise ValueError(f"no digest: {one_line(repr(damaged), 100)}")
    return spec


# What begins markup: a comment, something else up to the next `>`, a tag.
_MARKUP = re.compile(r"<(?:(!--)|([!?])|([a-zA-Z][^\s/>]*))")
_ATTRIBUTE = re.compile(r"""[\s/]*(?:(>)|([^\s/>][^\s/>=]*)"""
                        r"""(?:\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s>"'][^\s>]*)|(?=>)|(["'])))?)""")
_COMMENT_END = re.compile(r"--!?>")
# Elements whose content is only text.
_RAW_TEXT = {name: re.compile(rf"</{name}(?=[\s/>])", re.IGNORECASE)
             for name in ("script", "style", "textarea", "title")}
_REFERENCE = re.compile(r"&(?:#[0-9]+;?|#[xX][0-9a-fA-F]+;?|"
                        r"[a-zA-Z][a-zA-Z0-9]*(?:;|(?![=a-zA-Z0-9])))")


def html_tags(text, wanted, most):
    """The wanted start tags of an HTML page, as (name, {attribute: value}, where the tag ends).

    By regular expression: tens of times faster than `html.parser`, and linear for every text.

    Follows the HTML standard: comments and scripts have no tags, the first of two attributes with
    one name counts, and what does not fit belongs to a name or a value. A quote without end spoils
    its own tag alone. ValueError for a page that ends inside a tag, or has more than `most` tags,
    attributes and comments."""
    position = 0
    while True:
        most -= 1
        markup = _MARKUP.search(text, position)
        if markup is None:
            return
        if most < 0:
            raise ValueError("too many tags")
        if markup[1]:
            end = _COMMENT_END.search(text, markup.end() - 2)
            if end is None:
                return          # the rest is a comment, as for pip, uv and browsers
            position = end.end()
            continue
        if markup[2]:
            position = _behind(">", text, markup.end())
            continue

        name, attributes, position = markup[3].lower(), {}, markup.end()
        is_wanted = name in wanted
        while True:
            match = _ATTRIBUTE.match(text, position)
            most -= 1
            if most < 0:
                raise ValueError("too many tags")
            if match is None:
                begun = text[markup.start():markup.start() + 60]
                raise ValueError(f"the page ends inside of {begun!r}")
            position = match.end()
            closing, attribute, double, single, bare, quote = match.groups()
            if closing:
                break
            if quote:
                position, is_wanted = _behind(">", text, position), False
                break
            if is_wanted and attribute.lower() not in attributes:
                attributes[attribute.lower()] = _attribute_text(double or single or bare or "")

        if is_wanted:
            yield name, attributes, position
        if name in _RAW_TEXT:
            end = _RAW_TEXT[name].search(text, position)
            if end is None:
                return
            position = end.end()


def _behind(mark, text, position):
    """The position after the next mark."""
    found = text.find(mark, position)
    if found < 0:
        raise ValueError(f"the page ends inside of {text[position - 60:position]!r}")
    return found + len(mark)


def _attribute_text(value):
    """An attribute's value with character references resolved."""
    return _REFERENCE.sub(_resolved, value) if "&" in value else value


def _resolved(reference):
    """The text of a character reference; unknown names stay, such as `&copy=1` in a query."""
    name = reference[0][1:]
    if name[0] == "#":
        return unescaped(reference[0])
    return html.entities.html5.get(name, reference[0])


def _parse_html_page(project, url, text):
    """An HTML page as an `UpstreamPage` (PEP 503, 592, 658, 714, 740, 792)."""
    check_html(text)
    anchors, base, meta = [], None, {}
    for tag, attributes, _ in html_tags(text, ("a", "base", "meta"), 10 * Limits.page_files):
        if tag == "base":
            base = base or attributes.get("href")
        elif tag == "meta":
            name = attributes.get("name", "").strip().lower()
            meta.setdefault(name, attributes.get("content", ""))
        elif attributes.get("href"):
            anchors.append(attributes)
            if len(anchors) > Limits.page_files:
                raise ValueError(f"more than {Limits.page_files} links")
    check_api_version(meta.get("pypi:repository-version", "1.0"))

    base = base and joined_url(url, base) or url        # also for links before it
    files, unusable = {}, 0
    for attributes in anchors:
        try:
            file = _html_file(project, base, attributes)
        except ValueError as error:
            unusable += 1
            _log_unusable(url, unusable, f"{attributes['href']}: {reason_of(error)}")
            continue
        if file:
            _add_file(files, file)
    return UpstreamPage(tuple(files.values()), _sound_status(
        meta.get("pypi:project-status"), meta.get("pypi:project-status-reason")))


def _add_file(files, file):
    """Add a file to {file name: file}: of each name the first with a hash, else the first."""
    if file.filename not in files or file.hash_spec and not files[file.filename].hash_spec:
        files[file.filename] = file


def _html_file(project, base, attributes):
    """The file that an anchor links to; None for other links [W20.5]."""
    url = joined_url(base, attributes["href"])
    if url is None:
        return None
    filename = _last_part(url)
    stem, extension = strip_archive_extension(filename)
    if not extension and not version_of_variants(filename, project) or \
            not normalize(stem).startswith(project) or not is_safe_filename(filename):
        return None

    metadata = attributes.get("data-core-metadata", attributes.get("data-dist-info-metadata"))
    if metadata is not None:
        name, _, value = metadata.partition("=")
        metadata = {name.strip(): value.strip()} if value else metadata.strip().lower() != "false"
    return UpstreamFile(
        filename, url, _stated_hash(_fragment_pairs(attributes["href"])),
        requires_python=_sound_specifiers(attributes.get("data-requires-python")),
        yanked=_sound_text(attributes["data-yanked"]) if "data-yanked" in attributes else None,
        core_metadata=_offered_metadata(metadata),
        provenance=_sound_link(attributes.get("data-provenance")))


def check_api_version(text):
    """ValueError for a page of another major version than 1 (PEP 629)."""
    if not re.fullmatch(r"1(\.[0-9]{1,5})?", text.strip()):
        raise ValueError(f"API version {text[:20]!r}, expected 1.x")


def check_json_version(meta):
    """The `meta` of a JSON page; no version means version 1, as in HTML (PEP 629)."""
    meta = {} if meta is None else meta
    version = meta.get("api-version")
    check_api_version("1.0" if version is None else str(version))
    return meta


def _sound_text(value):
    """Upstream's text without control characters; "" for other values (`true`: no reason)."""
    return re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]+", " ", value).strip()[:2000] \
        if isinstance(value, str) else ""


def _sound_specifiers(value):
    """A Requires-Python, or None. Some are escaped twice, or in JSON; no specifier has an `&`."""
    text = _sound_text(value)
    return (unescaped(text) if "&" in text else text) or None


_ISO_TIME = re.compile(
    r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d)(:\d\d)?(?:[.,](\d+))? ?(Z|[+-]\d\d(?::?\d\d)?)?",
    re.ASCII | re.IGNORECASE)


def _sound_time(value, url):
    """An upload time on the page at `url`, as `iso_time` writes it; "" for no time since 1970.

    Reads every ISO 8601 form that installers read: with an offset, with any number of digits. A
    time without a zone counts as UTC."""
    match = _ISO_TIME.fullmatch(value.strip()) \
        if isinstance(value, str) and len(value) <= 100 else None
    if match:
        day, minute, second, fraction, zone = match.groups()
        zone = (zone or "").upper().replace("Z", "").replace(":", "")
        offset = f"{zone[:3]}:{zone[3:] or '00'}" if zone else "+00:00"
        if not match[5]:
            _say_of_times(url_origin(url), "without a zone, taken for UTC", value)
        with contextlib.suppress(ValueError, OverflowError):
            text = f"{day}T{minute}{second or ':00'}.{(fraction or '')[:6]:0<6}{offset}"
            moment = datetime.datetime.fromisoformat(text).astimezone(datetime.timezone.utc)
            if moment.year >= 1970:
                return moment.isoformat(timespec="microseconds")[:-6] + "Z"

    if value is not None:
        _say_of_times(url_origin(url), "that can't be read, taken for absent", repr(value))
    return ""


@functools.lru_cache(maxsize=1000)
def _first_of_kind(origin, trouble):
    """A list that is empty until this trouble of this host was logged."""
    return []


def _say_of_times(origin, trouble, example):
    """Log a kind of trouble of a host once: a page may have thousands of such times."""
    said = _first_of_kind(origin, trouble)
    if not said:
        said.append(True)
        log.warning("%s states upload times %s: %s", origin, trouble, one_line(example, 60))


def _sound_link(value):
    return value if isinstance(value, str) and \
        re.fullmatch(r"https://[!-;=?-~]{1,2000}", value) else None


def _sound_status(word, reason):
    known = word in PROJECT_STATUSES and word != "active"
    return Status(word, _sound_text(reason)) if known else ACTIVE


def _offered_metadata(value):
    if isinstance(value, dict):
        digest = value.get("sha256")
        return digest.lower() if isinstance(digest, str) and is_digest("sha256", digest) \
            else "true" if value else None
    return "true" if value is True else None


def is_json_page(content_type, body):
    """Whether a page is JSON: by its type, or because it starts with `{`."""
    begins = body[:100].lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    return begins == b"{" or "json" in content_type.partition(";")[0].lower()


_CHARSET = re.compile(r"""charset\s*=\s*["']?([^\s;"']{1,40})""", re.IGNORECASE)
# The codecs that are charsets, each with linear cost; Python has others.
_KNOWN_CODEC = re.compile(r"utf-8|utf-16(-[lb]e)?|ascii|iso8859-[0-9]+|cp[0-9]+|koi8-[rtu]|"
                          r"gbk|gb2312|gb18030|big5|shift_jis|euc_jp|euc_kr")
_BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"),
                     (codecs.BOM_UTF16_BE, "utf-16-be"))


def html_text(content_type, body):
    """The text of an HTML page, by its byte order mark, else by the charset of its type, else
    UTF-8."""
    for mark, charset in _BYTE_ORDER_MARKS:
        if body.startswith(mark):
            return body[len(mark):].decode(charset, "replace")

    stated = _CHARSET.search(content_type)
    if stated is None or body.isascii():
        return body.decode("utf-8", "replace")
    try:
        codec = codecs.lookup(stated[1]).name
    except (LookupError, ValueError):
        codec = ""
    if not _KNOWN_CODEC.fullmatch(codec):
        raise ValueError(f"the charset {stated[1]!r} is unknown")
    return body.decode(codec, "replace")


def check_html(text):
    """ValueError for a text that is no HTML page; an empty text is one."""
    text = text[:10000].lstrip()
    if text and not text.startswith("<!--") and \
            not re.search(r"<(!doctype html|html|head|body|a)\b", text, re.IGNORECASE):
        raise ValueError(f"no HTML, it begins with {text[:40]!r}")


class _Decoder:
    """Undoes the Content-Encoding of a body as it arrives, up to one byte more than `limit`."""

    step = 256 << 10

    def __init__(self, encoding, limit):
        self.encoding, self.left, self.limit = encoding, limit + 1, limit + 1
        self.unzip, self.members, self.ended = None, 0, False

    def decode(self, data):
        """Yield what the next bytes of the body unpack to, in pieces of at most `step` bytes.

        64 KiB may unpack to 64 MiB."""
        more = True
        while more and not self.ended and self.left > 0:
            if self.unzip is None and not (data and self._begin(data)):
                return
            room = min(self.left, self.step)
            with turn_to_unpack(self.limit - self.left):
                found = self.unzip.decompress(data, room)
            self.left -= len(found)
            yield found
            if self.unzip.eof:
                data, self.unzip = self.unzip.unused_data, None
                self.ended = self.encoding == "deflate"
            else:
                data = self.unzip.unconsumed_tail
                more = bool(data) or len(found) == room     # the decompressor may hold some back

    def _begin(self, data):
        """Begin a member at these bytes; ignore zeros or garbage after the last one."""
        self.members += 1
        if self.members > Limits.gzip_members:
            raise zlib.error(f"more than {Limits.gzip_members} members")
        if self.encoding == "deflate":
            # RFC 9110 requires a zlib head, some servers send none
            has_head = data[0] & 15 == 8 and (len(data) < 2 or (data[0] << 8 | data[1]) % 31 == 0)
            self.unzip = zlib.decompressobj(15 if has_head else -15)
        elif self.members == 1 or data[:1] == b"\x1f" and data[1:2] in (b"\x8b", b""):
            self.unzip = zlib.decompressobj(31)
        else:
            self.ended = True
        return not self.ended

    def is_whole(self):
        """Whether the body may end here."""
        return self.unzip is None and self.members > 0


# How uncompressed text begins, whatever its Content-Encoding (utf-8, aws-chunked) says.
_LOOKS_PLAIN = re.compile(rb"(\xef\xbb\xbf)?(\s*[<{]|[\t\n\r -~]{64}|[\t\n\r -~]{0,63}\Z)")
_ENCODINGS = {"": None, "identity": None, "gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate"}


def page_pieces(response, limit, deadline):
    """Yield the body of a page in pieces, unpacked.

    Raises UpstreamTrouble if it breaks off, is damaged, or goes on past `deadline`
    (time.monotonic()), UnreadablePage if it is larger than `limit` bytes or has an encoding that
    was not requested."""
    url, stated = public_url(response.url), response.header("Content-Encoding").strip().lower()
    size = received = 0
    encoding, is_odd = _ENCODINGS.get(stated), stated not in _ENCODINGS
    decoder = _Decoder(encoding, limit) if encoding else None

    while True:
        piece = response.read(64 << 10)
        if not piece:
            break
        if is_odd and not received and not _LOOKS_PLAIN.match(piece):
            raise UnreadablePage(f"{url} is encoded as {one_line(stated, 40)!r}, "
                                 "which was not asked for")
        received += len(piece)
        try:
            for data in decoder.decode(piece) if decoder else (piece,):
                size += len(data)
                yield data
        except zlib.error as error:
            raise UpstreamTrouble(f"{url}: damaged {encoding}: {error}") from error
        if max(size, received) > limit:
            raise UnreadablePage(f"{url}: the page is larger than {limit} bytes")
        if time.monotonic() > deadline:
            raise UpstreamTrouble(f"{url}: the page takes too long")

    if response.length() not in (None, received) or \
            decoder and received and not decoder.is_whole():
        raise UpstreamTrouble(f"{url}: the page ended early")


def read_page(response, limit, deadline):
    """The body of a page, as `page_pieces` yields it."""
    return b"".join(page_pieces(response, limit, deadline))


def stated_serial(response):
    """The serial that an `UpstreamResponse` states, as PyPI does, or None."""
    text = response.header("X-PyPI-Last-Serial")
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def user_agent():
    return f"devpi-server/{PROTOCOL_VERSION} (devpi_lite {__version__})"


# ==================================================================================================
# 11  Mirrors
#
# What a mirror has of its upstream: pages, files and project lists, with one fetch at a time for
# one thing, and the last good copy where upstream fails. All of it can be fetched again, so the
# changelog never holds it.
# ==================================================================================================


class Upstreams(Part):
    """How mirrors ask their upstreams: one fetch at a time for one thing, with a share of the
    waiting requests for each owner. Remembers failures for some seconds."""

    def __init__(self, store, indexes, blobs, client, settings):
        self.store, self.indexes, self.blobs = store, indexes, blobs
        self.client, self.settings = client, settings
        self.fetches = SingleFlight("fetch", Limits.fetches, Limits.fetches_of_one)
        self.patience = Patience(3 * settings.threads)
        # _source(index), project -> (until, kind, message)
        self.failed = FairMemory(Limits.missing_projects)
        # (_source(index), is the project list) -> as in `failed`: upstream did not respond
        self.silent = {}
        self.failures = collections.Counter()   # index id -> number of failed fetches and downloads
        self.lock = threading.Lock()

    def gauges(self):
        yield Gauge("devpi_lite_upstream_errors_total", "counter",
                    "Failures of upstream, by the mirror that asked.",
                    self.by_mirror(self.failures))

    def by_mirror(self, counts):
        """The samples of a counter by index id, of mirrors that everybody may read."""
        for index in self.indexes.all():
            if index.is_mirror and not index.restricted:
                yield "", {"index": index.path}, counts.get(index.id, 0)

    def expiry(self, index):
        """Seconds for which upstream is not asked again."""
        return index.config.get("mirror_cache_expiry", self.settings.mirror_cache_expiry)

    def is_cut_off(self, index):
        """Whether the mirror has only what is here: in offline mode, or without a mirror_url."""
        return self.settings.offline_mode or not index.mirror_url

    def refuse_cut_off(self, index, file):
        """NotFound for a file that is not here, if the mirror is cut off."""
        if self.settings.offline_mode:
            raise NotFound(f"{file.filename} is not here, and in offline mode nobody else is asked "
                           "for it")
        if not index.mirror_url:
            raise NotFound(f"{file.filename} is not here, and {index.path} has no mirror_url")

    def is_missing(self, index, status):
        """Whether a status means that upstream does not have what was requested.

        Object stores that may not be listed say 403: whether they do is the index's setting."""
        return status == 404 or str(status) in index.config.get("mirror_missing_statuses", ())

    def start(self, index, what, name, function):
        """The flight that fetches this from the mirror's upstream: a new one that calls `function`,
        or the one that is under way. Busy if too many of this index wait.

        `what`: "page", "names", "metadata" or "size"; `name`: of the project, or the path of the
        file."""
        url = index.mirror_url

        def counted():
            try:
                function()
            except UpstreamTrouble as error:
                self.failures[index.id] += 1
                if what in ("page", "names"):
                    self._remember_failure(index, name if what == "page" else None, error)
                raise
            if what == "page":
                self.failed.pop(_source(index), name)
                with self.lock:
                    self.silent.pop((_source(index), False), None)

        key = (what, index.id, url, name)
        return self.fetches.start(key, origin_of(url), index, Flight(counted))

    def wait(self, index, wait, seconds):
        """Whether `wait`, called with at most `seconds`, says that it happened.

        Busy if it did not happen because too many requests wait for this owner's mirrors."""
        with self.patience.place(index.user) as longest:
            if wait(max(0, min(seconds, longest))):
                return True
        if longest < seconds:
            raise self.crowded(index)
        return False

    @staticmethod
    def crowded(index, retry_after=1):
        return Busy(f"too many requests wait for the mirrors of {index.user} just now, try again",
                    retry_after)

    def _remember_failure(self, index, name, error):
        """Note upstream's error for a page, or that it did not respond to this mirror at all.

        The note holds for this mirror alone: upstream may respond to another one."""
        now = time.monotonic()
        note = now + Limits.upstream_pause, type(error), error.message
        if isinstance(error, NoResponse):
            with self.lock:
                self.silent = {key: other for key, other in self.silent.items() if other[0] > now}
                self.silent[_source(index), name is None] = note
        elif name is not None:
            self.failed.put(_source(index), name, note)

    def failure(self, index, name):
        """The trouble that asking upstream for a page has met within the last seconds, or None."""
        source, none = _source(index), (0, None, "")
        for note in (self.failed.get(source, name, none), self.silent.get((source, False), none)):
            until, kind, message = note
            if until > time.monotonic():
                trouble = kind(message)
                trouble.noted = until - Limits.upstream_pause
                return trouble
        return None

    def is_paused(self, index, for_list=False):
        """Whether this mirror's upstream was not reached within the last seconds.

        A project list that did not come does not pause the pages."""
        return self.client.is_paused(index.mirror_url) or any(
            self.silent.get((_source(index), of_list), (0,))[0] > time.monotonic()
            for of_list in {False, for_list})

    def keep(self, function, index, *args):
        """Write what a mirror caches, not durably. All mirrors of one owner take turns as one
        party, so that other changes do not wait for them."""
        return self.store.write(function, index, *args, durable=False,
                                party=("mirror", index.user))


class PartOfMirrors(Part):
    """What pages, files and lists of mirrors build on."""

    def __init__(self, upstreams):
        self.upstreams, self.store, self.blobs = upstreams, upstreams.store, upstreams.blobs
        self.client, self.settings = upstreams.client, upstreams.settings


class MirrorFiles(PartOfMirrors):
    """The files of mirrors and their metadata files, and downloads under way."""

    def __init__(self, upstreams):
        super().__init__(upstreams)
        self.downloads = SingleFlight("download", Limits.downloads, Limits.downloads_of_one)

    def is_local(self, file):
        return bool(file.sha256) and self.blobs.has(file.sha256, file.size)

    def local(self, index, file):
        """The file with its blob here, or None.

        A blob with its hash counts if this mirror has it under another name, or if a mirror has it
        that everybody may read: to know a hash is no right to a restricted index's files."""
        if self.is_local(file):
            return file
        algorithm, _, digest = file.hash_spec.partition("=")
        if algorithm != "sha256":
            return None
        size = self._shared_size(index, digest)
        if size is None or not self.blobs.has(digest, size) or not self.blobs.claim(digest):
            return None
        metadata = self.metadata_of_blob(file, digest)
        self.upstreams.keep(_file_arrived, index, file, digest, size, None, metadata)
        return file._replace(sha256=digest, size=size, last_modified=http_date(time.time()))

    def _shared_size(self, index, sha256):
        """The size of a blob that this mirror may serve although it did not fetch it, or None."""
        with self.store.read() as db:
            rows = db.execute(
                "SELECT size, files.index_id, config, status FROM files "
                "JOIN indexes ON indexes.id = files.index_id "
                "JOIN projects ON projects.id = project_id "
                "WHERE sha256 = ? AND release_id IS NULL", (sha256,)).fetchall()
        for row in rows:
            theirs = Index(row["index_id"], "", "", json.loads(row["config"]))
            if (theirs.id == index.id or theirs.is_mirror and not theirs.restricted) \
                    and not Status.of(row["status"]).withholds_files:
                return row["size"]
        return None

    def download(self, index, file):
        """The `Download` of a file that is not here, under way or new, once its head has arrived.

        UpstreamTrouble, NotFound, Busy."""
        self.upstreams.refuse_cut_off(index, file)
        # not the hash alone: another index's upstream may be slow, or have other bytes for it
        key = (index.id, file.path, file.hash_spec, file.url)
        download = Download(self, index, file)
        download = self.downloads.start(key, origin_of(file.url), index, download)

        def begins(seconds):
            until = time.monotonic() + seconds
            with outside_wait():
                download.started.wait(min(seconds, Limits.longest_queue))
                return download.begun.wait(
                    min(self.settings.request_timeout, max(0, until - time.monotonic())))

        if not self.upstreams.wait(
                index, begins, Limits.longest_queue + self.settings.request_timeout):
            raise UpstreamTrouble(f"{public_url(file.url)} did not answer within "
                                  f"{self.settings.request_timeout:g} seconds")
        if download.error and not download.finished:
            raise download.error
        return download

    def pieces(self, index, download):
        """`Download.pieces` for a request that reads along; Busy as in `Upstreams.wait`."""
        longest = self.upstreams.patience.longest(index.user)
        if longest < float("inf"):
            download.wait(longest)
            if not download.finished:
                raise self.upstreams.crowded(index, Limits.crowded_retry)

        def patiently():
            with self.upstreams.patience.place(index.user):
                yield from download.pieces()

        return patiently()

    def upstream_url(self, index, file):
        """The file's URL, with the mirror's credentials if it lies on the mirror's own host."""
        mirror = urllib.parse.urlsplit(index.mirror_url)
        if mirror.username is None or origin_of(file.url) != origin_of(index.mirror_url):
            return file.url
        parts = urllib.parse.urlsplit(file.url)
        return urllib.parse.urlunsplit(
            parts._replace(netloc=f"{mirror.netloc.rpartition('@')[0]}@{parts.netloc}"))

    def upstream_size(self, index, file):
        """The size that upstream states for a file that is not here, or None."""
        sizes = []

        def ask():
            with self.get_file(index, file, "", "HEAD") as head:
                sizes.append(head.length())

        flight = self.upstreams.start(index, "size", file.path, ask)
        if not self.upstreams.wait(index, flight.wait, self.settings.request_timeout):
            raise UpstreamTrouble(f"{public_url(file.url)} did not answer within "
                                  f"{self.settings.request_timeout:g} seconds")
        if flight.error:
            raise flight.error
        return sizes[0] if sizes else None      # None: another request's flight

    def get_file(self, index, file, ending="", method="GET"):
        """Upstream's response with a file, or with the file beside it whose name has this `ending`;
        NotFound or UpstreamTrouble unless its status is 200."""
        parts = urllib.parse.urlsplit(self.upstream_url(index, file))
        url = urllib.parse.urlunsplit(parts._replace(path=parts.path + ending))
        headers = {"User-Agent": user_agent(), "Accept-Encoding": "identity"}
        response = self.client.get(url, headers, method, index.mirror_url)
        if response.status == 200:
            return response
        response.close()
        raise (NotFound if self.upstreams.is_missing(index, response.status) else UpstreamTrouble)(
            f"error {response.status} getting {public_url(url)}")

    def metadata_hash(self, index, file, by_wheel=True):
        """The SHA-256 of the metadata file of a mirrored wheel (PEP 658), whose bytes are here
        then; NotFound if it has none.

        It is read from the wheel if that is here, else fetched from upstream and checked against
        the announced hash. Installers fail if announced metadata can't be had: so if upstream fails
        to give it, the wheel is fetched and read, unless `by_wheel` is false."""
        if file.metadata_sha256 and \
                metadata_bytes(self.store, self.blobs, file.metadata_sha256) is not None:
            return file.metadata_sha256
        if self.is_local(file):
            found = self.metadata_of_wheel(index, file)
            if found:
                return found
        if not file.core_metadata:
            raise NotFound(f"no metadata found in {index.path}/{file.path}")
        self.upstreams.refuse_cut_off(index, file)

        began = time.monotonic()
        fetch = functools.partial(self._fetch_metadata, index, file)
        flight = self.upstreams.start(index, "metadata", file.path, fetch)
        trouble = UpstreamTrouble(f"{public_url(file.url)}.metadata did not arrive in time")
        if self.upstreams.wait(index, flight.wait, self.settings.request_timeout):
            trouble = flight.error
        if trouble is None:
            return self._metadata_here(index, file)

        # a wheel whose bytes can't be checked does not prove that another announcement is wrong
        is_checked = file.hash_spec or file.core_metadata == "true"
        if not by_wheel or not is_checked or not file.filename.endswith(".whl"):
            raise trouble
        log.warning("mirror %s: %s; it is read out of the wheel", index.path, trouble.message)
        return self._metadata_by_wheel(index, file, began + Limits.metadata_wait)

    def _metadata_by_wheel(self, index, file, deadline):
        """Fetch a wheel and read its metadata file; if it has none, pages no longer announce it."""
        here = self.local(index, file)
        if here is None:
            download = self.download(index, file)
            if not self.upstreams.wait(index, download.wait, deadline - time.monotonic()):
                raise UpstreamTrouble(f"{file.filename} is on its way, for its metadata: try again")
            if download.error:
                raise download.error
        try:
            return self._metadata_here(index, file)
        except NotFound:
            self.upstreams.keep(_no_metadata, index, file)
            raise

    def _metadata_here(self, index, file):
        with self.store.read() as db:
            row = db.execute(
                "SELECT metadata_sha256 FROM files WHERE id = ?", (file.id,)).fetchone()
        if row is None or not row["metadata_sha256"]:
            raise NotFound(f"no metadata found in {index.path}/{file.path}")
        return row["metadata_sha256"]

    def _fetch_metadata(self, index, file):
        with self.get_file(index, file, ".metadata") as response:
            data = read_page(response, Limits.metadata_file,
                             time.monotonic() + Limits.upstream_page_time)
        found = MetadataFile.of(data)
        if file.core_metadata not in ("true", found.sha256):
            raise UpstreamTrouble(f"{public_url(file.url)}.metadata has SHA-256 {found.sha256}, "
                                  f"announced was {file.core_metadata}")
        self.upstreams.keep(_metadata_arrived, index, file, found, False)

    def metadata_of_wheel(self, index, file):
        """Enter the metadata file of a wheel that is here; its SHA-256, None if it has none."""
        found = self.metadata_of_blob(file, file.sha256)
        if found is None:
            return None
        self.upstreams.keep(_metadata_arrived, index, file, found, True)
        return found.sha256

    def metadata_of_blob(self, file, sha256):
        """The `MetadataFile` of a wheel that is here; None if it has none, or if reading it would
        have to wait: readers of a download wait for this."""
        if not file.filename.endswith(".whl"):
            return None
        try:
            with self.blobs.open(sha256) as blob:
                data = archive_metadata(blob, file.filename, patience=0)
        except Problem as error:
            log.warning("mirrored file: %s", error.message)
            return None
        return None if data is None else MetadataFile.of(data)


class MirrorPages(PartOfMirrors):
    """The project pages of mirrors; if upstream fails, the last good ones."""

    def __init__(self, upstreams, files):
        super().__init__(upstreams)
        self.files = files
        self.not_found = FairMemory(Limits.missing_projects)    # _source(index), project -> until
        self.refreshed = FairMemory(Limits.missing_projects)    # _source(index), project -> when
        # index id -> number of files and projects that upstream removed
        self.removed = collections.Counter()

    def gauges(self):
        yield Gauge("devpi_lite_upstream_removed_total", "counter",
                    "Files and projects that upstream removed, by mirror.",
                    self.upstreams.by_mirror(self.removed))

    def ask(self, index, name, again=True):
        """(the known page or None, the flight that fetches a new one or None).

        If upstream failed within the last seconds, an old page is given as stale. Without an old
        page that failure is raised, unless `again` has upstream asked once more; a refusal is
        raised in any case. Busy if too many fetches wait for that upstream and no page is here."""
        if len(name) > Limits.project_name:
            return ProjectPage(name), None      # "not found" need not be remembered

        looked = time.time()
        page = self.cached(index, name)
        if self.upstreams.is_cut_off(index):
            return self._local_only(index, name, page), None
        if page and page.expires > time.monotonic():
            return page, None
        missing_until = self.not_found.get(_source(index), name, 0)
        if page is None and missing_until > time.monotonic():
            return ProjectPage(name, expires=missing_until), None

        failure = self.upstreams.failure(index, name)
        if page and (failure or self.upstreams.is_paused(index)):
            return dataclasses.replace(page, stale=True), None
        if failure and (isinstance(failure, Refused) or not again):
            raise failure

        try:
            return page, self.upstreams.start(index, "page", name, functools.partial(
                self._fetch_page, index, name, looked))
        except Busy:
            if page is None:
                raise
            return dataclasses.replace(page, stale=True), None

    def project(self, index, name, deadline=None, again=True):
        """The page of a project [W20.2, W20.3]; `again`: see `ask`.

        Waits for `request_timeout` seconds, or until `deadline` (time.monotonic()); the fetch goes
        on after that."""
        page, flight = self.ask(index, name, again)
        if flight is None:
            return page

        trouble = UpstreamTrouble(f"{public_url(index.mirror_url)} did not answer for {name} "
                                  f"within {self.settings.request_timeout:g} seconds")
        patience = self.settings.request_timeout
        if deadline is not None:
            patience = deadline - time.monotonic()
        try:
            if self.upstreams.wait(index, flight.wait, patience):
                trouble = flight.error
        except Busy as busy:
            trouble = busy

        page = self.cached(index, name)
        if trouble is None:
            return page or ProjectPage(
                name, expires=time.monotonic() + self.upstreams.expiry(index))
        if not isinstance(trouble, Busy):
            log.warning("mirror %s: %s", index.path, trouble.message)
        if page is None:
            raise trouble
        return dataclasses.replace(page, stale=True)

    def refresh(self, indexes, name):
        """Have mirrors fetch a project's page now (devpi: POST .../refresh).

        If that fails, the old page stays. A page that any request refreshed within the last second
        is not fetched again. Waits for `request_timeout` seconds, for all mirrors together."""
        if len(name) > Limits.project_name:
            return
        flights = []
        for index in indexes:
            if self.upstreams.is_cut_off(index):
                continue
            source, now = _source(index), time.monotonic()
            if now - self.refreshed.get(source, name, -Limits.refresh_pause) < Limits.refresh_pause:
                continue
            self.refreshed.put(source, name, now)
            self.not_found.pop(source, name)
            try:
                flights.append((index, self.upstreams.start(
                    index, "page", name, functools.partial(self._fetch_page, index, name))))
            except Busy as problem:
                log.warning("mirror %s is not refreshed: %s", index.path, problem.message)

        deadline = time.monotonic() + self.settings.request_timeout
        for index, flight in flights:
            with contextlib.suppress(Busy):         # the fetch goes on after this request
                if self.upstreams.wait(index, flight.wait, deadline - time.monotonic()) \
                        and flight.error:
                    log.warning("mirror %s: %s", index.path, flight.error.message)

    def cached(self, index, name):
        """Upstream's last page; None if it was never asked or does not have the project."""
        with self.store.read() as db:
            row = db.execute("SELECT * FROM projects WHERE index_id = ? AND name = ?",
                             (index.id, name)).fetchone()
            if row is None or row["fetched"] is None:
                return None
            files = select_files(
                db, "WHERE project_id = ? AND position IS NOT NULL ORDER BY position", row["id"])
        age = time.time() - row["fetched"]
        # far below 0: the clock was set back
        fresh_for = self.upstreams.expiry(index) - age if age > -60 else 0
        return ProjectPage(
            name, ((index, files),), tuple(json.loads(row["versions"] or "[]")),
            expires=time.monotonic() + fresh_for, upstream_serial=row["upstream_serial"],
            status=Status.of(row["status"]))

    def _local_only(self, index, name, page):
        """The page of a mirror that is cut off: with the files that are here, and their metadata
        files that are here."""
        files = tuple(f if f.metadata_sha256 else f._replace(core_metadata=None)
                      for f in page.files if self.files.is_local(f)) if page else ()
        if not files:
            return ProjectPage(name)
        here = {file.version for file in files}
        versions = tuple(version for version in page.versions if version in here)
        return dataclasses.replace(page, parts=((index, files),), versions=versions, expires=0)

    def _fetch_page(self, index, name, looked=None):
        with Spool(self.blobs) as body:
            self._take_page(index, name, looked, body)

    def _take_page(self, index, name, looked, body):
        """Fetch a project's page into `body`, and enter it.

        `looked`: time.time() when no page, or an old one, was here: a page that came since then
        will do. None: upstream is asked in any case."""
        with self.store.read() as db:
            row = db.execute("SELECT * FROM projects WHERE index_id = ? AND name = ?",
                             (index.id, name)).fetchone()
        if looked is not None and row and looked < (row["fetched"] or 0) <= time.time():
            return None

        etag = row["etag"] if row and looked is not None else None
        response = self._request_page(index, name, etag, body)
        if self.upstreams.is_missing(index, response.status):
            return self._remember_missing(index, name, row)

        serial, origin = stated_serial(response), "%s://%s:%d" % origin_of(response.url)
        self._refuse_older(index, row, origin, serial, response.url)
        if response.status == 304:
            return self.upstreams.keep(_page_checked, index, name)

        content_type = response.header("Content-Type")
        with bulk.claim(Limits.page_cost * body.size):
            data = body.value()
            page = parse_simple_page(name, response.url, data, is_json_page(content_type, data),
                                     content_type)

        entries = _page_entries(index, name, page)
        self._enter_ahead(index, name, page.status.stored, entries)
        self.removed[index.id] += self.upstreams.keep(
            _store_page, index, name, page, entries, response.header("ETag")[:1000], origin, serial)

    def _request_page(self, index, name, etag, body):
        """Ask upstream for a page, which comes into `body`; returns the `UpstreamResponse`, closed.

        Its status is 200, 304 if there is an `etag`, or one that `Upstreams.is_missing` knows;
        UpstreamTrouble for others."""
        headers = {"Accept": f"{SIMPLE_HTML};q=0.2, {SIMPLE_JSON}, text/html;q=0.01",
                   "Accept-Encoding": "gzip", "User-Agent": user_agent()}
        if etag:
            headers["If-None-Match"] = etag

        deadline = time.monotonic() + Limits.upstream_page_time
        with self.client.get(f"{index.mirror_url.rstrip('/')}/{name}/", headers) as response:
            status = response.status
            if not self.upstreams.is_missing(index, status) and (
                    status not in (200, 304) or status == 304 and not etag):
                refused = 400 <= status < 500 and str(status) not in PASSING_STATUSES
                kind = Refused if refused else UpstreamTrouble
                raise kind(f"{public_url(response.url)} answered {status}")
            if status == 200:
                for piece in page_pieces(response, Limits.upstream_page, deadline):
                    body.write(piece)
            else:
                with contextlib.suppress(UpstreamTrouble):      # the status says all that counts
                    response.read(64 << 10)
        return response

    @staticmethod
    def _refuse_older(index, row, origin, serial, url):
        """UpstreamTrouble if this upstream stated a higher serial before; `row`: of the project."""
        if row and serial is not None and row["upstream"] == origin \
                and serial < (row["upstream_serial"] or 0) \
                and not index.config.get("mirror_ignore_serial_header"):
            raise UpstreamTrouble(f"{public_url(url)} answered with serial {serial}, "
                                  f"older than {row['upstream_serial']} that it gave before")

    def _enter_ahead(self, index, name, status, entries):
        """Enter the files of a page in several changes before it is stored: one change with a page
        of 60,000 files would keep all other changes waiting for seconds."""
        if len(entries) <= Limits.entries_at_once:
            return
        with self.store.read() as db:
            known = {row["path"] for row in db.execute(
                "SELECT path FROM files JOIN projects ON projects.id = project_id "
                "WHERE projects.index_id = ? AND projects.name = ?", (index.id, name))}
        new = [entry for entry in entries if entry.path not in known]
        for start in range(0, len(new) - Limits.entries_at_once, Limits.entries_at_once):
            self.upstreams.keep(_enter_unplaced, index, name, status,
                                new[start:start + Limits.entries_at_once])

    def _remember_missing(self, index, name, row):
        """Upstream does not have the project, or no longer; its files stay at their URLs."""
        if row and row["fetched"] is not None:
            count = self.upstreams.keep(_page_gone, index, name)
            self.removed[index.id] += 1
            log.warning("mirror %s: upstream does not have the project %s any more; "
                        "%d files stay at their URLs", index.path, name, count)
        self.not_found.put(_source(index), name, time.monotonic() + self.upstreams.expiry(index))


class MirrorLists(PartOfMirrors):
    """The project lists of mirrors."""

    def __init__(self, upstreams):
        super().__init__(upstreams)
        self.asked = {}         # index id -> time.monotonic() when a search asked for its list
        self.readers = Shares("project lists are being read", Limits.list_readers,
                              Limits.list_readers_of_one, 60)
        self.unreadable = {}    # index id -> (mirror_url, until, why its list could not be read)
        self.cache = os.path.join(os.path.dirname(self.blobs.files), "cache")
        if not self.store.read_only:
            os.makedirs(self.cache, mode=0o700, exist_ok=True)

    def recover(self):
        self.tidy()

    def tidy(self):
        known = {index.id for index in self.upstreams.indexes.all()}
        MirrorNames.clear_leftovers(self.cache, known)

    def ask_names(self, index):
        """(the known names or None, the flight that fetches the list or None).

        Busy if too many fetches wait for that upstream and no list is here."""
        if self.upstreams.is_cut_off(index) or index.config.get("mirror_no_project_list"):
            return self.cached_names(index), None
        names = MirrorNames.load(self.cache, index)
        if names and (0 <= time.time() - names.fetched < self.upstreams.expiry(index)
                      or self.upstreams.is_paused(index, True)):
            return names, None
        try:
            return names, self.upstreams.start(
                index, "names", "", functools.partial(self._fetch_names, index, names))
        except Busy:
            if names is None:
                raise
            return names, None

    def names(self, index, began=None):
        """All names that upstream has, as `MirrorNames`; without a list, the known ones [W20.4].

        Waits for `request_timeout` seconds, or `Limits.first_list` if no list is here, counted from
        `began` (time.monotonic()). The known names are a list."""
        names, flight = self.ask_names(index)
        if flight is None:
            return names

        patience = self.settings.request_timeout if names \
            else max(Limits.first_list, self.settings.request_timeout)
        if began is not None:
            patience = max(0, began + patience - time.monotonic())

        crowd = None
        try:
            if self.upstreams.wait(index, flight.wait, patience) and flight.error is None:
                names = MirrorNames.load(self.cache, index)
            elif flight.error:
                log.warning("mirror %s: %s", index.path, flight.error.message)
        except Busy as busy:
            crowd = busy

        if names:
            return names
        cached = self.cached_names(index)
        if not cached:
            raise flight.error or crowd or UpstreamTrouble(
                f"the project list of {public_url(index.mirror_url)} is on its "
                "way, try again in a minute")
        return cached

    def names_at_hand(self, index):
        """The known names: `MirrorNames`, or a list of the projects whose pages are kept.

        If the whole list was never fetched, a fetch begins in the background."""
        names = MirrorNames.load(self.cache, index)
        if names:
            return names
        if self.wants_names(index) and \
                self.asked.get(index.id, 0) < time.monotonic() - Limits.names_pause:
            self.asked[index.id] = time.monotonic()
            with contextlib.suppress(Busy):
                self.upstreams.start(
                    index, "names", "", functools.partial(self._fetch_names, index, None))
        return self.cached_names(index)

    def wants_names(self, index):
        """Whether upstream may be asked for its project list now."""
        return not (self.upstreams.is_cut_off(index) or index.config.get("mirror_no_project_list")
                    or self.upstreams.is_paused(index, True))

    def cached_names(self, index):
        """The projects whose pages are kept; of a mirror that is cut off, those with files here."""
        here = "AND EXISTS (SELECT 1 FROM files WHERE project_id = projects.id " \
            "AND position IS NOT NULL AND sha256 IS NOT NULL)" \
            if self.upstreams.is_cut_off(index) else ""
        with self.store.read() as db:
            return [row["name"] for row in db.execute(
                f"SELECT name FROM projects WHERE index_id = ? AND fetched IS NOT NULL {here} "
                "ORDER BY name", (index.id,))]

    def _fetch_names(self, index, old):
        """Fetch the list; a child process makes the files of `MirrorNames` from it."""
        mirror_url = index.mirror_url
        url, until, trouble = self.unreadable.get(index.id, ("", 0, ""))
        if url == mirror_url and until > time.monotonic():
            raise UnreadablePage(trouble)

        folder = made_in(self.blobs.tmp, lambda: tempfile.mkdtemp(dir=self.blobs.tmp))
        try:
            facts, content_type = self._download_list(
                mirror_url.rstrip("/") + "/", folder, old.etag if old else "")
            if content_type is not None:
                with self.readers.one(index.user, Limits.list_turn):
                    facts["count"] = self._read_list(public_url(mirror_url), folder, content_type)
            MirrorNames.install(self.cache, index, folder, facts)
        except UnreadablePage as error:
            now = time.monotonic()
            self.unreadable = {id: entry for id, entry in self.unreadable.items() if entry[1] > now}
            self.unreadable[index.id] = mirror_url, now + Limits.list_pause, error.message
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.store.freshness.touch(frozenset((names_tag(index.id),)))

    def _download_list(self, url, folder, etag):
        """Put the list into `folder`, unzipped; returns (facts, its Content-Type).

        The type is None if upstream says that the list with this ETag is still the newest."""
        headers = {"Accept": f"{SIMPLE_JSON}, {SIMPLE_HTML};q=0.2, text/html;q=0.01",
                   "Accept-Encoding": "gzip", "User-Agent": user_agent()}
        if etag:
            headers["If-None-Match"] = etag

        deadline = time.monotonic() + Limits.upstream_list_time
        with self.client.get(url, headers) as response:
            if response.status == 304 and etag:
                return {"count": None}, None
            if response.status != 200:
                raise UpstreamTrouble(f"{public_url(response.url)} answered {response.status}")
            try:
                with open(os.path.join(folder, LIST_BODY), "wb") as file:
                    for piece in page_pieces(response, Limits.upstream_list, deadline):
                        file.write(piece)
            except OSError as error:
                raise disk_problem(error) from error
            facts = {"count": None, "etag": response.header("ETag")[:1000],
                     "serial": stated_serial(response)}
            return facts, response.header("Content-Type")

    def _read_list(self, url, folder, content_type):
        """Make the files of `MirrorNames` from the list in `folder`; returns the number of names.

        A child process does it: a busy thread here would slow every response, and a hostile list
        takes only the child's memory and time. The child ends with its standard input, so it also
        ends if this server is killed."""
        job = {"url": url, "folder": folder, "type": content_type, "names": Limits.listed_names,
               "memory": Limits.list_memory, "cpu": Limits.list_cpu}

        command, pipe = [sys.executable, PROGRAM, "_read-names"], subprocess.PIPE
        with subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe) as child:
            held_open, child.stdin = child.stdin, None          # communicate() would close it
            try:
                with contextlib.suppress(OSError):      # the child has ended: its code says why
                    held_open.write(json.dumps(job) + "\n")
                    held_open.flush()
                with outside_wait():
                    said, complaint = child.communicate(timeout=Limits.list_reading)
            except subprocess.TimeoutExpired:
                raise UnreadablePage(f"{url}: reading the project list took over "
                                     f"{Limits.list_reading} seconds") from None
            finally:
                child.kill()
                with contextlib.suppress(OSError):
                    held_open.close()

        if child.returncode == 0:
            return json.loads(said)["count"]
        if hasattr(signal, "SIGXCPU") and child.returncode == -signal.SIGXCPU:
            complaint = f"reading the project list took over {Limits.list_cpu} s of processor time"
        complaint = one_line(complaint.strip()[-300:]) or "the project list could not be read"
        raise UnreadablePage(complaint if url in complaint else f"{url}: {complaint}")


class Mirrors:
    """Caching mirrors: their pages, files and project lists."""

    def __init__(self, store, indexes, blobs, client, settings):
        self.upstreams = Upstreams(store, indexes, blobs, client, settings)
        self.files = MirrorFiles(self.upstreams)
        self.pages = MirrorPages(self.upstreams, self.files)
        self.lists = MirrorLists(self.upstreams)


def _current_mirror(change, index):
    """Whether the index still mirrors what it did when the fetch began."""
    row = change.execute("SELECT config FROM indexes WHERE id = ?", (index.id,)).fetchone()
    return row is not None and json.loads(row["config"]).get("mirror_url", "") == index.mirror_url


def _source(index):
    """What upstream's responses depend on: after a change of it, no remembered one counts."""
    return index.id, index.mirror_url, tuple(index.config.get("mirror_missing_statuses", ()))


def _page_gone(change, index, name):
    """Upstream no longer has the project: returns the number of its files that stay."""
    row = change.execute("SELECT id FROM projects WHERE index_id = ? AND name = ?",
                         (index.id, name)).fetchone()
    if row is None or not _current_mirror(change, index):
        return 0
    found = change.execute("UPDATE files SET position = NULL WHERE project_id = ?", (row["id"],))
    change.execute("UPDATE projects SET fetched = NULL, etag = NULL, versions = NULL WHERE id = ?",
                   (row["id"],))
    change.touch(project_tag(index.id, name), names_tag(index.id))
    return found.rowcount


def _page_checked(change, index, name):
    """Upstream says that nothing changed."""
    if _current_mirror(change, index):
        change.execute("UPDATE projects SET fetched = ? WHERE index_id = ? AND name = ?",
                       (time.time(), index.id, name))


class PageEntry(typing.NamedTuple):
    """A file that upstream's page lists, its version, and the path that it has here."""
    file: PageFile
    version: str
    path: str


def _page_entries(index, name, page):
    """What is kept of a project's page: a list of `PageEntry`."""
    own = [file for file in page.files if project_of_wheel(file.filename) in ("", name)]
    if len(own) < len(page.files):      # installers skip them, too
        log.info("mirror %s: the page of %s lists %d wheels of other projects, which are left out",
                 index.path, name, len(page.files) - len(own))

    versions = [version_of_file(file.filename, name) for file in own]
    released, entries = set(versions), []
    for file, version in zip(own, versions):
        version = version or version_of_variants(file.filename, name)
        if version not in released:     # a list of variants makes no release of its own
            version = ""
        path = file_path(file.hash_spec, file.filename) if file.hash_spec else \
            hashless_path(file.url, file.filename)
        entries.append(PageEntry(file, version, path))
    return entries


def _enter_unplaced(change, index, name, status, entries):
    """Enter files of a page that is about to be stored; without a position they are not shown."""
    if _current_mirror(change, index):
        project_id = _mirrored_project(change, index, name)
        change.execute("UPDATE projects SET status = ? WHERE id = ? AND fetched IS NULL",
                       (status, project_id))        # files of a quarantined project are withheld
        now = iso_time(time.time())
        for entry in entries:
            _insert_mirror_file(change, index, project_id, None, entry, now)


def _mirrored_project(change, index, name):
    """The id of a mirror's project, which is created if it is new."""
    row = change.execute("SELECT id FROM projects WHERE index_id = ? AND name = ?",
                         (index.id, name)).fetchone()
    return row["id"] if row else change.execute(
        "INSERT INTO projects (index_id, name) VALUES (?, ?)", (index.id, name)).lastrowid


def _store_page(change, index, name, page, entries, etag, origin, serial):
    """Store what upstream lists now; returns the number of files that it no longer lists.

    They lose their position on the page, not their path."""
    if not _current_mirror(change, index):
        return 0
    status = page.status.stored
    project_id = _mirrored_project(change, index, name)
    before = change.execute("SELECT fetched FROM projects WHERE id = ?", (project_id,)).fetchone()
    if before["fetched"] is None:
        change.touch(names_tag(index.id))
    change.execute(
        "UPDATE projects SET fetched = ?, etag = ?, upstream = ?, upstream_serial = coalesce(?, "
        "CASE WHEN upstream = ? THEN upstream_serial END), status = ?, versions = ? WHERE id = ?",
        (time.time(), etag or None, origin, serial, origin, status, json.dumps(page.versions),
         project_id))

    old = {file.path: file for file in map(File._make, change.execute(
        f"SELECT {FILE_COLUMNS} FROM files WHERE project_id = ?", (project_id,)))}

    now = iso_time(time.time())
    inserted = any(file.position is None for file in old.values())      # entered ahead

    moved = []                                                          # (position, id)
    for position, entry in enumerate(entries):
        known = old.pop(entry.path, None)
        if known is None:
            inserted = True
            _insert_mirror_file(change, index, project_id, position, entry, now)
        else:
            _update_mirror_file(change, known, entry)
            if known.position != position:
                moved.append((position, known.id))
    change.executemany("UPDATE files SET position = ? WHERE id = ?", moved)
    if inserted:
        _share_arrived(change, project_id)

    listed, gone = {entry.file.filename for entry in entries}, []
    for file in old.values():
        if file.position is not None:
            change.execute("UPDATE files SET position = NULL WHERE id = ?", (file.id,))
            if file.filename in listed:
                log.warning("mirror %s: upstream changed the bytes of %s", index.path,
                            one_line(file.filename))
            else:
                gone.append(one_line(file.filename))
    if gone:
        log.warning("mirror %s: upstream does not list %s of %s any more; "
                    "what it gave before stays at its URL",
                    index.path, gone[0] if len(gone) == 1 else f"{len(gone)} files", name)
    change.touch(project_tag(index.id, name))
    return len(gone)


def _insert_mirror_file(change, index, project_id, position, entry, now):
    file = entry.file
    change.execute(
        "INSERT INTO files (index_id, project_id, position, version, filename, path, hash_spec, "
        "size, uploaded, first_seen, requires_python, yanked, core_metadata, provenance, url) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT DO NOTHING",       # a path that the page lists twice
        (index.id, project_id, position, entry.version, file.filename, entry.path, file.hash_spec,
         file.size, file.uploaded or now, not file.uploaded, file.requires_python, file.yanked,
         file.core_metadata, file.provenance, file.url))


def _share_arrived(change, project_id):
    """Enter for a project's files what has arrived of them for another project."""
    arrived = change.execute(
        "SELECT theirs.sha256, theirs.size, theirs.last_modified, theirs.metadata_sha256, "
        "coalesce(mine.core_metadata, theirs.metadata_sha256), mine.id FROM files AS mine "
        "JOIN files AS theirs ON theirs.index_id = mine.index_id AND theirs.path = mine.path "
        "AND theirs.hash_spec = mine.hash_spec AND theirs.url = mine.url "
        "AND theirs.project_id != mine.project_id "
        "WHERE mine.project_id = ? AND mine.sha256 IS NULL AND theirs.sha256 IS NOT NULL",
        (project_id,)).fetchall()
    change.executemany("UPDATE files SET sha256 = ?, size = ?, last_modified = ?, "
                       "metadata_sha256 = ?, core_metadata = ? WHERE id = ?", map(tuple, arrived))


def _update_mirror_file(change, before, entry):
    """Enter what upstream says of a file that is known; its position stays."""
    new = entry.file
    after = before._replace(
        version=entry.version, url=new.url, requires_python=new.requires_python,
        yanked=new.yanked, provenance=new.provenance,
        size=before.size if before.sha256 and new.hash_spec else new.size or before.size,
        core_metadata=new.core_metadata or before.metadata_sha256)

    if new.uploaded:
        after = after._replace(uploaded=new.uploaded, first_seen=0)
    if new.hash_spec != before.hash_spec:
        after = after._replace(hash_spec=new.hash_spec, sha256=None, metadata_sha256=None,
                               size=new.size)
    if after.sha256 and after.filename.endswith(".whl"):    # the wheel's own metadata counts
        after = after._replace(core_metadata=after.metadata_sha256 or before.core_metadata)
    elif after.metadata_sha256 and after.core_metadata not in ("true", after.metadata_sha256):
        after = after._replace(metadata_sha256=None)
    if after != before:
        change.execute(
            f"UPDATE files SET ({', '.join(File._fields)}) = "
            f"({', '.join('?' * len(File._fields))}) WHERE id = ?", (*after, before.id))


def _file_arrived(change, index, file, sha256, size, last_modified, metadata):
    """Enter the bytes of a mirrored file, and what is known only now.

    `metadata`: what the wheel itself holds; it counts whatever upstream announced or gave."""
    metadata = keep_metadata(change, metadata)
    for row in _rows_of(change, file):
        uploaded, first_seen = row["uploaded"], row["first_seen"]
        if first_seen and last_modified:
            # upstream's header may be anything
            with contextlib.suppress(ValueError, TypeError, OverflowError):
                moment = email.utils.parsedate_to_datetime(last_modified).timestamp()
                if moment < seconds_of(uploaded):
                    uploaded, first_seen = iso_time(moment), 0

        change.execute(
            "UPDATE files SET sha256 = ?, size = ?, last_modified = ?, uploaded = ?, "
            "first_seen = ?, core_metadata = coalesce(?, core_metadata), "
            "metadata_sha256 = coalesce(?, metadata_sha256) WHERE id = ?",
            (sha256, size, last_modified or http_date(time.time()), uploaded, first_seen,
             metadata, metadata, row["id"]))

        if metadata:
            _warn_of_other_metadata(index, file, row, metadata)
        change.touch(project_tag(file.index_id, row["project"]))


def enter_cached(change, index, project, version, file, sha256, last_modified, metadata, own):
    """Enter a file of a mirror that is here although it was not fetched, and list it: on an expired
    page, which is shown if upstream fails.

    `file`: an `UpstreamFile`; `own`: {column: value} of what is known better."""
    project_id = _mirrored_project(change, index, project)
    listed = change.execute("SELECT count(*) FROM files WHERE project_id = ? "
                            "AND position IS NOT NULL", (project_id,)).fetchone()[0]
    change.execute("UPDATE projects SET fetched = coalesce(fetched, 0) WHERE id = ?", (project_id,))
    path = file_path(file.hash_spec, file.filename)
    _insert_mirror_file(change, index, project_id, listed, PageEntry(file, version, path),
                        iso_time(time.time()))
    entered, = select_files(change.db, "WHERE project_id = ? AND path = ?", project_id, path)
    _file_arrived(change, index, entered, sha256, file.size, last_modified, metadata)

    columns = {"position", "version", "path", "hash_spec", "uploaded", "first_seen",
               "requires_python", "yanked", "core_metadata", "provenance", "url", "last_modified"}
    own = {column: value for column, value in own.items() if column in columns}
    if own:
        change.execute(f"UPDATE files SET ({', '.join(own)}) = ({marks(own)}) WHERE id = ?",
                       (*own.values(), entered.id))


def _warn_of_other_metadata(index, file, row, sha256):
    announced, arrived = row["core_metadata"], row["metadata_sha256"]
    if announced not in (None, "true", sha256) or arrived not in (None, sha256):
        log.warning("mirror %s: upstream's metadata of %s is not what the wheel holds, which "
                    "counts", index.path, one_line(file.filename))


def _metadata_arrived(change, index, file, metadata, from_wheel):
    """Enter a metadata file. Upstream's does not count if the wheel's own is here."""
    sha256 = keep_metadata(change, metadata)
    for row in _rows_of(change, file):
        if from_wheel:
            _warn_of_other_metadata(index, file, row, sha256)
            change.execute("UPDATE files SET metadata_sha256 = ?, core_metadata = ? WHERE id = ?",
                           (sha256, sha256, row["id"]))
        else:
            change.execute(
                "UPDATE files SET metadata_sha256 = ?, core_metadata = coalesce(core_metadata, ?) "
                "WHERE id = ? AND (sha256 IS NULL OR metadata_sha256 IS NULL)",
                (sha256, sha256, row["id"]))
        change.touch(project_tag(file.index_id, row["project"]))


def _no_metadata(change, index, file):
    """Neither upstream nor the wheel has the metadata that was announced."""
    for row in _rows_of(change, file):
        change.execute("UPDATE files SET core_metadata = NULL WHERE id = ?", (row["id"],))
        change.touch(project_tag(file.index_id, row["project"]))


def _rows_of(change, file):
    """The rows of a file: one for each project of the mirror that lists it."""
    return change.execute(
        "SELECT files.id, uploaded, first_seen, core_metadata, metadata_sha256, "
        "projects.name AS project FROM files JOIN projects ON projects.id = project_id "
        "WHERE files.index_id = ? AND path = ? AND hash_spec = ?",
        (file.index_id, file.path, file.hash_spec)).fetchall()


class Download(Flight):
    """A file on its way from upstream to disk, which any number of requests may read as it grows.

    The newest piece is held back until length and hash are checked: nobody ever gets a wrong file
    whole."""

    def __init__(self, files, index, file):
        super().__init__(self._fetch)
        self.files, self.index, self.file = files, index, file
        self.started = threading.Event()    # upstream is being asked
        self.begun = threading.Event()      # the response's head is here, or the download ended
        self.grown = threading.Condition()
        self.available = 0                  # bytes that may be sent
        self.finished = False               # the file is checked, kept, entered, and all available
        self.length = None                  # as upstream states it, or None
        self.last_modified = ""
        self.opened = None                  # path of the growing file
        self.sha256 = None                  # set once all is checked

    def run(self):
        self.started.set()
        super().run()
        self.files.upstreams.failures[self.index.id] += self.error is not None
        with self.grown:
            self.begun.set()
            self.grown.notify_all()

    def _fetch(self):
        file, files = self.file, self.files
        with files.get_file(self.index, file) as response:
            self.length = response.length()
            self._check_announced()
            self.last_modified = one_line(response.header("Last-Modified"), 100)
            with files.blobs.incoming() as incoming:
                self.opened = incoming.path
                check = hashlib.new(file.hash_spec.partition("=")[0]) if file.hash_spec \
                    else hashlib.sha256()
                self.begun.set()

                while True:
                    piece = response.read(256 << 10)
                    if not piece:
                        break
                    ready = incoming.size
                    incoming.write(piece)
                    self._check_pace(incoming.size)
                    check.update(piece)
                    self._grow(ready)
                self._check(incoming.size, check)
                self.sha256 = incoming.sha256.hexdigest()
                incoming.keep(durable=False)

        metadata = files.metadata_of_blob(file, self.sha256)
        files.upstreams.keep(_file_arrived, self.index, file, self.sha256, incoming.size,
                             self.last_modified, metadata)
        self._grow(incoming.size, finished=True)

    @property
    def _expected(self):
        """The size that the file must have, or None; the page's only if no hash decides."""
        return self.length if self.length is not None or self.file.hash_spec else self.file.size

    @property
    def _most(self):
        """The number of bytes that may come. If a hash decides, the size on the page may be wrong
        by as much again; but an endless file is refused."""
        if self._expected is not None:
            return self._expected
        return self.file.size + max(self.file.size, Limits.size_slack) if self.file.size \
            else Limits.upstream_file

    def _check_announced(self):
        """Refuse what can't turn out right, before any byte is sent on."""
        if None not in (self.length, self.file.size) and self.length != self.file.size:
            trouble = (f"{public_url(self.file.url)} has {self.length} bytes, "
                       f"announced were {self.file.size}")
            if not self.file.hash_spec:
                raise UpstreamTrouble(trouble)
            log.warning("mirror %s: %s", self.index.path, trouble)
        if (self._expected or 0) > shutil.disk_usage(self.files.blobs.files).free:
            raise NoSpace(f"{self.file.filename} has {self._expected} bytes, "
                          "more than this server's disk has free")

    def _check_pace(self, size):
        """Stop what is longer than announced, endless, or hardly moving."""
        if size > self._most:
            raise UpstreamTrouble(f"{public_url(self.file.url)} gives more than {self._most} bytes")
        spent = time.monotonic() - self.created
        if spent > Limits.stall and size < (spent - Limits.stall) * Limits.slowest_body:
            raise UpstreamTrouble(f"{public_url(self.file.url)} comes too slowly")

    def _check(self, size, check):
        url = self.file.url
        if self._expected not in (None, size):
            raise UpstreamTrouble(f"{public_url(url)} gave {size} bytes, "
                                  f"announced were {self._expected}")
        digest = self.file.hash_spec.partition("=")[2]
        if digest and not hmac.compare_digest(check.hexdigest(), digest):
            raise UpstreamTrouble(f"{public_url(url)} has another hash than announced: "
                                  f"{check.name}={check.hexdigest()}, not {self.file.hash_spec}")

    def _grow(self, available, finished=False):
        with self.grown:
            self.available, self.finished = available, finished
            self.grown.notify_all()

    def pieces(self):
        """The file's bytes as they arrive, and once all are here the rest as a FilePart.

        Raises what ended the download early."""
        sent = 0
        # Windows can't rename a file that is being read: there, wait for the end
        self._wait_for(0 if os.name != "nt" else float("inf"))

        file = self._open()
        try:
            while True:
                ended = self._wait_for(sent)
                if self.finished:
                    if sent < self.available:
                        rest, file = FilePart(file, sent, self.available - sent), None
                        yield rest
                    return
                while sent < self.available and not self.finished:
                    piece = file.read(min(self.available - sent, 64 << 10))
                    sent += len(piece)
                    yield piece
                if ended and sent >= self.available and not self.finished:
                    raise self.error
        finally:
            if file:
                file.close()

    def _open(self):
        try:
            return open(self.opened, "rb")
        except FileNotFoundError:       # kept or deleted since: the end, which is near, says which
            self._wait_for(float("inf"))
            if not self.finished:
                raise self.error from None
            return self.files.blobs.open(self.sha256)

    def _wait_for(self, sent):
        """Wait until more than `sent` bytes are available, or the end; returns whether it ended."""
        with outside_wait(), self.grown:
            while self.available <= sent and not self.finished and not self.error:
                if not self.grown.wait(Limits.stall):
                    raise UpstreamTrouble("upstream stopped sending")
            return self.finished or bool(self.error)


class MirrorNames:
    """The project list of a mirror on disk, in the forms that requests need.

    A child process makes the files: `names` (sorted, one a line), and without brackets around them
    `names.json`, `projects.json`, `projects.html`; the last two also as whole pages, gzipped."""

    def __init__(self, folder, facts):
        self.folder = folder
        self.etag, self.fetched, self.count, self.serial = (
            facts["etag"], facts["fetched"], facts["count"], facts["serial"])
        self.before = facts["before"]       # the folder of the list before this one

    @staticmethod
    def _pointer(cache, index):
        return os.path.join(cache, f"names-{index.id}.json")

    @classmethod
    def load(cls, cache, index):
        """The list kept for this index, or None. The cache may be deleted at any time."""
        try:
            with open(cls._pointer(cache, index), encoding="utf-8") as file:
                facts = json.load(file)
            folder = os.path.join(cache, facts["folder"])
            if facts["url"] == index.mirror_url and os.path.exists(os.path.join(folder, "names")):
                return cls(folder, facts)
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            log.warning("the cached project list of %s is unusable: %s", index.path, error)
        return None

    @classmethod
    def install(cls, cache, index, folder, facts):
        """Put a list that the child wrote in place of the old one; facts["count"] of None means
        that upstream's list is the old one (304)."""
        old = cls.load(cache, index)
        facts.update(url=index.mirror_url, fetched=time.time())
        if facts["count"] is None:
            if old is None:
                raise UpstreamTrouble("upstream said 304 for a list that is not here")
            facts.update(folder=os.path.basename(old.folder), count=old.count, serial=old.serial,
                         etag=old.etag, before=old.before)
        else:
            facts["folder"] = f"names-{index.id}-{secrets.token_hex(4)}"
            facts["before"] = os.path.basename(old.folder) if old else ""
            os.replace(folder, os.path.join(cache, facts["folder"]))

        temporary = cls._pointer(cache, index) + ".tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(facts, file)
        os.replace(temporary, cls._pointer(cache, index))

        if old is not None and old.before and facts["before"] != old.before:
            # the previous list is kept: a request may have loaded it and not opened its files yet
            shutil.rmtree(os.path.join(cache, old.before), ignore_errors=True)

    @classmethod
    def clear_leftovers(cls, cache, index_ids):
        """Remove the `leftovers`."""
        for path in cls.leftovers(cache, index_ids):
            remove(path)

    @staticmethod
    def leftovers(cache, index_ids):
        """Yield the paths of lists of deleted indexes, and of folders that no list names (after a
        crash, or because a file was open)."""
        named = set()
        for name in os.listdir(cache):
            match = re.fullmatch(r"names-([0-9]+)\.json", name)
            if match and int(match[1]) not in index_ids:
                yield os.path.join(cache, name)
            elif match:
                with contextlib.suppress(ValueError, KeyError, TypeError), \
                        open(os.path.join(cache, name)) as file:
                    facts = json.load(file)
                    named.update((facts["folder"], facts["before"]))
        for name in os.listdir(cache):
            path = os.path.join(cache, name)
            if os.path.isdir(path) and name not in named:
                yield path

    def part(self, name):
        """The path of one of the files."""
        return os.path.join(self.folder, name)

    def without(self, names):
        """Those of `names` that the list does not hold."""
        with open(self.part("names"), "rb") as file:
            if self.count == 0:
                return list(names)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
                return [name for name in names if not self._holds(lines, name.encode())]

    def only_in(self, other):
        """Yield the names that another list does not hold."""
        theirs = iter(other)
        lowest = next(theirs, None)
        for name in self:
            while lowest is not None and lowest < name:
                lowest = next(theirs, None)
            if name != lowest:
                yield name

    @staticmethod
    def _holds(lines, name):
        """Whether one of the sorted lines is this name."""
        start = MirrorNames._first_from(lines, name)
        return lines[start:start + len(name) + 1] == name + b"\n"

    def __iter__(self):
        with open(self.part("names"), encoding="ascii") as file:
            for line in file:
                yield line[:-1]

    def matching(self, needle, prefix_only):
        """(names that begin with `needle`, then others that hold it; whether there may be more)."""
        if not self.count:
            return [], False
        wanted, found = needle.encode(), []
        with open(self.part("names"), "rb") as file, \
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
            start = at = self._first_from(lines, wanted)
            while lines[at:at + len(wanted)] == wanted and len(found) < Limits.found_names:
                end = lines.find(b"\n", at)
                found.append(lines[at:end].decode("ascii"))
                at = end + 1

            past, at = at, 0
            while not prefix_only and len(needle) > 2 and len(found) < Limits.found_names:
                hit = lines.find(wanted, at)
                if hit < 0:
                    break
                at = lines.find(b"\n", hit) + 1
                if not start <= hit < past:
                    found.append(lines[lines.rfind(b"\n", 0, hit) + 1:at - 1].decode("ascii"))
        return found, len(found) == Limits.found_names

    @staticmethod
    def _first_from(lines, name):
        """The offset of the first line that is not below `name`."""
        low, high = 0, len(lines)
        while low < high:
            middle = max(lines.rfind(b"\n", 0, (low + high) // 2) + 1, low)
            end = lines.find(b"\n", middle)
            if lines[middle:end] < name:
                low = end + 1
            else:
                high = middle
        return low


def matching_names(names, needle, prefix_only=False):
    """(names of a mirror that begin with `needle`, then others that hold it; whether there may be
    more).

    Of a short needle, or with `prefix_only`, only names that begin with it."""
    if isinstance(names, MirrorNames):
        return names.matching(needle, prefix_only)
    found = [name for name in names if name.startswith(needle)]
    if not prefix_only and len(needle) > 2:
        found += [name for name in names if needle in name and not name.startswith(needle)]
    return found, False


LIST_PAGE = {
    "projects.json": (f'{{"meta":{{"api-version":"{API_VERSION}"}},"projects":[', ",", "]}"),
    "projects.html": ('<!DOCTYPE html><html lang="en"><head>'
                      f'<meta name="pypi:repository-version" content="{API_VERSION}">'
                      "<style>a { display: block }</style><title>Simple index</title>"
                      "</head><body>\n", "", "</body></html>\n")}


def list_entries(form, names):
    """The entries of a project list in one of its two forms, without the page around them."""
    if form == "projects.json":
        return ",".join([f'{{"name":"{name}"}}' for name in names])
    return "".join([f'<a href="{name}/">{name}</a>\n' for name in names])


LIST_BODY = "body"      # the file with a list as upstream sent it


def read_names(job):
    """What the child process does: reads the list in `job["folder"]`, writes its forms beside it.

    Returns {"count": number of names}."""
    folder = job["folder"]
    with open(os.path.join(folder, LIST_BODY), "rb") as file:
        body = file.read()
    os.unlink(os.path.join(folder, LIST_BODY))
    names = parse_names(job["url"], body, job["type"], job["names"])
    del body
    parts = [names[start:start + 10000] for start in range(0, len(names), 10000)]

    with open(os.path.join(folder, "names"), "w", encoding="ascii") as file, \
            open(os.path.join(folder, "names.json"), "w", encoding="ascii") as as_json:
        for number, part in enumerate(parts):
            file.write("\n".join(part) + "\n")
            as_json.write(("," if number else "") + ",".join([f'"{name}"' for name in part]))

    for form, (head, between, tail) in LIST_PAGE.items():
        with open(os.path.join(folder, form), "w", encoding="ascii") as plain, \
                gzip.GzipFile(os.path.join(folder, form + ".gz"), "wb", 4, mtime=0) as zipped:
            zipped.write(head.encode())
            for number, part in enumerate(parts):
                entries = (between if number else "") + list_entries(form, part)
                plain.write(entries)
                zipped.write(entries.encode())
            zipped.write(tail.encode())
    return {"count": len(names)}


def limit_process(memory, cpu):
    """Bound this process's memory (bytes) and processor time (seconds), if the system can.

    The process leaves no core file."""
    try:
        import resource         # not on Windows: there, bytes and names alone are bounded
    except ImportError:
        return
    bounds = {"RLIMIT_AS": memory, "RLIMIT_CPU": cpu, "RLIMIT_CORE": 0}
    for name, bound in bounds.items():
        which = getattr(resource, name, None)
        if which is None:       # OpenBSD has no RLIMIT_AS
            continue
        _, hard = resource.getrlimit(which)
        if hard != resource.RLIM_INFINITY:
            bound = min(bound, hard)
        try:
            resource.setrlimit(which, (bound, hard))
        except (ValueError, OSError) as error:      # macOS knows no bound on memory
            log.debug("no bound %s: %s", name, error)


def parse_names(url, body, content_type, most):
    """The normalised names of a project list (bytes), sorted, each once.

    UpstreamTrouble if `body` is no project list, or has more than `most` names."""
    names = set()
    try:
        if is_json_page(content_type, body):
            listed = _names_in_json(body.decode(json.detect_encoding(body)))
        else:
            listed = _names_in_html(url, html_text(content_type, body))
        for name in listed:
            if not _NORMAL_NAME.fullmatch(name):
                name = normalize(name).strip("-") if _NAME_TEXT.fullmatch(name) else ""
            if name and len(name) <= Limits.project_name:
                names.add(name)
                if len(names) > most:
                    raise ValueError(f"more than {most} projects")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UpstreamTrouble(
            f"{public_url(url)}: not a project list: {reason_of(error)}") from error
    return sorted(names)


_NORMAL_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_NAME_TEXT = re.compile(r"[A-Za-z0-9._-]+")


def _names_in_html(url, text):
    """Yield the names in a list of anchors: their texts (PEP 503), or the ends of their links.

    The link counts if a text is no name, as in directory listings, where long names are cut. Links
    that lead up or sort are skipped."""
    check_html(text)
    for tag, attributes, end in html_tags(text, ("a", "meta"), len(text)):
        if tag == "meta":
            if attributes.get("name", "").lower() == "pypi:repository-version":
                check_api_version(attributes.get("content", ""))
            continue
        path = attributes.get("href", "").partition("#")[0].partition("?")[0].strip()
        if not path.strip("./"):
            continue

        name, last = text[end:end + 300].partition("<")[0], path.rstrip("/").rpartition("/")[2]
        name = (unescaped(name) if "&" in name else name).strip().rstrip("/")
        if name == last:
            yield name
            continue

        if path.startswith("/") or ".." in path or ":" in path:
            target = joined_url(url, path)
            if target and f"{url.rstrip('/')}/".startswith(target.rstrip("/") + "/"):
                continue

        last = urllib.parse.unquote(last)
        is_cut = name.endswith(("..", "..>")) and last.startswith(name.rstrip(".>"))
        yield last if is_cut or not _NAME_TEXT.fullmatch(name) else name


def _names_in_json(text):
    """Yield the names in a project list in JSON (PEP 691)."""
    has_list = False
    for key, value in JsonReader(text, len(text)).members("projects"):
        if key == "projects":
            has_list = True
            for entry in value:
                if isinstance(entry, dict) and isinstance(entry.get("name"), str):
                    yield entry["name"].strip()
        elif key == "meta":
            check_json_version(value)
    if not has_list:
        raise ValueError("it has no projects")


# ==================================================================================================
# 12  Projects and policies
#
# The projects of an index. A stage reads them from the database, a mirror from its last good copy
# of upstream's page; an index with bases merges what they have. A private name shuts out the same
# name on mirrors, and trouble upstream never turns into "no such project".
# ==================================================================================================


class Cause(typing.NamedTuple):
    """Why a step of a walk was taken, and the index that caused it, if there is one.

    `word`: "project rule" or "index rule" of a stage that lets mirrors in; "project" of a stage
    that shuts them out; "missing": an index that does not exist, or "unreadable": one that the
    caller may not read (`path` is None), which may have the project; "met before"."""
    word: str
    path: str | None = None


class Step(typing.NamedTuple):
    """What was done with an index on the walk along a resolution order for a project.

    `action`: a stage or mirror was "asked"; a mirror was "postponed" until the stages have been
    asked, or "blocked"; a base was "skipped"."""
    action: str
    path: str
    asks_upstream: bool = False
    has_project: bool | None = None     # None: not known
    cause: Cause | None = None


class Contributions(typing.NamedTuple):
    """What the indexes of a resolution order offer of a project, before it is merged."""
    pages: list
    blocked: Index | None
    trouble: UpstreamTrouble | None
    expires: float              # of the merged page, "not found" included; 0: never
    order: tuple                # the resolution order
    hidden: tuple               # members that the caller may not read
    mirrors: tuple              # members that ask an upstream, without hidden ones
    failed: list                # mirrors among them of which it is not known what they have
    blocking: MirrorBlocking

    def index_bases(self):
        """{path of an index: its bases; None if it does not exist}, without what is hidden."""
        hidden, bases = {index.path for index in self.hidden}, {}
        for met in self._walk():
            if met.index is None:
                if met.via not in hidden:
                    bases[met.path] = None
            elif met.path not in hidden:
                bases[met.path] = [base for base in met.index.config.get("bases", ())
                                   if base not in hidden]
        return bases

    def steps(self):
        """[Step, ...] of the walk that found this: each index once, and once more where it was
        skipped. Nothing in them comes from a hidden member."""
        hidden, mirrors = {index.path for index in self.hidden}, {i.path for i in self.mirrors}
        known = {page.parts[0][0].path for page in self.pages}
        steps, skipped = [], {}
        for met in self._walk():
            is_mirror = met.path in mirrors
            if met.index is None or not met.is_first and not is_mirror:
                if met.path not in hidden and met.path not in skipped and met.via not in hidden:
                    skipped[met.path] = met.index
                    steps.append(Step("skipped", met.path, cause=Cause(
                        "met before" if met.index else "missing", met.path)))
            elif met.is_first and met.path not in hidden:
                if not is_mirror:
                    steps.append(Step("asked", met.path, False, met.path in known))
                elif met.via is not None:
                    steps.append(Step("postponed", met.path, True))

        missing = [path for path, index in skipped.items() if index is None]
        failed = {index.path for index in self.failed}
        return steps + [self._step_at_mirror(index.path, known, failed, missing)
                        for index in self.mirrors]

    def _step_at_mirror(self, path, known, failed, missing):
        blocking = self.blocking
        if self.blocked is None:
            has_project = None if path in failed else path in known
            return Step("asked", path, True, has_project,
                        blocking.allowed_by if has_project else None)
        cause = blocking.hit_by or (Cause("missing", missing[0]) if missing
                                    else Cause("unreadable"))
        return Step("blocked", path, True, cause=cause)

    def _walk(self):
        return walk_bases(self.order[0], {index.path: index for index in self.order}.get)


class Policy:
    """Decides what is shown of a project.

    Policies are asked in `Projects.page` and when a file is opened, and nowhere else."""

    def shown(self, index, page, first, files):
        """Those of `files`, of one index's page of a project, that `index` shows.

        `first`: the page of the first index that knows the project."""
        return files

    def refuse(self, index, place):
        """Refuse to open a file, by an exception."""


class Quarantine(Policy):
    """The files of a quarantined project are withheld (PEP 792)."""

    def shown(self, index, page, first, files):
        return () if page.status.withholds_files or first.status.withholds_files else files

    def refuse(self, index, place):
        place.status.refuse_withheld(place.file.filename)


POLICIES = (Quarantine(),)


class MirrorBlocking:
    """The rule that a private name is private [W10.2]: sees the stages of the resolution order,
    then says whether mirrors may be asked for the project."""

    def __init__(self, project, requested):
        self.project = project
        self.union = requested.config.get("mirror_whitelist_inheritance", "union") == "union"
        self.whitelist = None
        self.hit = self.allowed = False
        # the `Cause` of either, the last of several; no cause of a hit by `misses_stage`
        self.hit_by = self.allowed_by = None

    def saw_stage(self, index, has_project):
        own = set(index.config.get("mirror_whitelist", ()))
        if self.whitelist is None or self.union:
            rule = "project rule" if self.project in own else "index rule" if "*" in own else ""
            if rule:
                self.allowed_by = Cause(rule, index.path)
        if self.whitelist is None:
            self.whitelist = own
        elif self.union:
            self.whitelist = self.whitelist | own
        else:
            self.whitelist = self.whitelist & own
        if "*" in self.whitelist or self.project in self.whitelist:
            self.allowed = True
        elif has_project:
            self.hit, self.hit_by = True, Cause("project", index.path)

    def misses_stage(self):
        """A base does not exist, or the caller may not read it: it may have the project."""
        self.hit = True

    @property
    def blocks(self):
        return self.hit and not self.allowed


class Stage:
    """The uploads of one stage, without its bases. `Mirror` has the same methods."""
    page_age = None         # seconds for which clients may use a page without asking again
    asks_upstream = False

    def __init__(self, projects, index):
        self.store, self.index = projects.store, index

    def page(self, name, deadline=None, kind=File, again=True):
        """The `ProjectPage` of a project: three indexed queries, whatever the number of releases.

        `kind`: the type of the files, `File` or `PageFile`; None: no files. A mirror raises
        UpstreamTrouble or Busy if it has no page and upstream fails, or does not respond by
        `deadline` (time.monotonic()); `again`: see `MirrorPages.ask`."""
        with self.store.read() as db:
            row = db.execute("SELECT id, status FROM projects WHERE index_id = ? AND name = ?",
                             (self.index.id, name)).fetchone()
            if row is None:
                return ProjectPage(name)
            # a stage's files have no position: so `files_of_project` holds them in this order
            files = () if kind is None else select_files(
                db, "WHERE project_id = ? AND position IS NULL AND kind = 'releasefile' "
                "ORDER BY id", row["id"], kind=kind)
            versions = tuple(r["version"] for r in db.execute(
                "SELECT version FROM releases WHERE project_id = ? ORDER BY id", (row["id"],)))
        return ProjectPage(name, ((self.index, files),), versions, status=Status.of(row["status"]))

    def names(self, began=None):
        """The names of its projects: a sorted list, or a `MirrorNames`.

        `began`: see `MirrorLists.names`."""
        with self.store.read() as db:
            return [row["name"] for row in db.execute(
                "SELECT name FROM projects WHERE index_id = ? ORDER BY name", (self.index.id,))]

    def names_at_hand(self):
        """Upstream's project names that are known here: a list, or a `MirrorNames`."""
        return []

    def has(self, name):
        """Whether it has a project, as far as is known without asking upstream."""
        with self.store.read() as db:
            return db.execute("SELECT 1 FROM projects WHERE index_id = ? AND name = ?",
                              (self.index.id, name)).fetchone() is not None

    def releases(self, page, version=None, claim=None):
        """The releases of a page's project: see `releases_of`.

        `claim`: called with the number of bytes of their metadata, before these are read."""
        if claim:
            claim(self._metadata_size(page.name, version, "length(metadata)"))
        with self.store.read() as db:
            return releases_of(db, self.index, page.name, version)

    def _metadata_size(self, name, version, size):
        condition, values = "1", ()
        with self.store.read() as db:
            if version is not None:
                texts = [row["version"] for row in db.execute(
                    "SELECT version FROM releases JOIN projects ON projects.id = project_id "
                    "WHERE index_id = ? AND name = ?", (self.index.id, name))]
                values = spellings(version, texts)
                condition = f"version IN ({marks(values)})"
            return db.execute(
                f"SELECT coalesce(sum({size}), 0) FROM releases "
                "JOIN projects ON projects.id = project_id "
                f"WHERE index_id = ? AND name = ? AND {condition}",
                (self.index.id, name, *values)).fetchone()[0]

    def metadata(self, name, version, files, claim):
        """(the metadata of a version with its README, or None; whether nothing failed).

        `files`: those of the index's page; `claim`: see `releases`."""
        claim(self._metadata_size(name, version, "length(metadata) + readme_size"))
        with self.store.read() as db:
            for release in releases_of(db, self.index, name, version):
                readme = {} if release.readme is None else \
                    {"description": stored_readme(db, release.readme.release_id)}
                return {**release.shown, **readme}, True
        return None, True

    def open(self, file, for_head=False):
        """The `Content` of a file; `for_head`: without its bytes."""
        return Content(file.last_modified or http_date(seconds_of(file.uploaded)), file.size,
                       file.sha256)

    def metadata_file(self, file):
        """The SHA-256 of a wheel's metadata file, whose bytes are here then; None or NotFound."""
        return file.metadata_sha256


class Mirror:
    """What one mirror has of its upstream. `Stage` says what the methods do."""
    asks_upstream = True

    def __init__(self, projects, index):
        self.mirrors, self.index = projects.mirrors, index
        self.page_age = min(60, self.mirrors.upstreams.expiry(index))

    def page(self, name, deadline=None, kind=File, again=True):
        return self.mirrors.pages.project(self.index, name, deadline, again)

    def names(self, began=None):
        return self.mirrors.lists.names(self.index, began)

    def names_at_hand(self):
        return self.mirrors.lists.names_at_hand(self.index)

    def has(self, name):
        with self.mirrors.pages.store.read() as db:
            row = db.execute("SELECT fetched FROM projects WHERE index_id = ? AND name = ?",
                             (self.index.id, name)).fetchone()
        return row is not None and row["fetched"] is not None

    def releases(self, page, version=None, claim=None):
        """The releases with what is known of them: their versions, and what their files say."""
        files = collections.defaultdict(list)
        for file in page.files:
            if file.version:
                files[file.version].append(file)
        texts = files if version is None else spellings(version, files)
        return [self._release(page, text, files[text]) for text in texts]

    def _release(self, page, version, files):
        metadata = {"name": page.name, "version": version}
        for file in files:
            if file.requires_python:
                metadata.setdefault("requires_python", file.requires_python)
            if file.yanked is not None:
                metadata.setdefault("yanked", file.yanked or True)
        return Release(self.index, page.name, version, metadata, tuple(files), status=page.status)

    def metadata(self, name, version, files, claim):
        """Read from the metadata file of a wheel that is here, or that upstream offers."""
        texts = spellings(version, {file.version for file in files})
        for file in files:
            if file.version in texts and file.core_metadata:
                try:
                    sha256 = self.mirrors.files.metadata_hash(self.index, file, by_wheel=False)
                    data = metadata_bytes(
                        self.mirrors.files.store, self.mirrors.files.blobs, sha256)
                    return parse_core_metadata(data), True
                except Problem as problem:
                    log.warning("mirror %s: %s", self.index.path, problem.message)
                    return None, False
        return None, True

    def open(self, file, for_head=False):
        here = self.mirrors.files.local(self.index, file)
        if here:
            return Content(here.last_modified, here.size, here.sha256)
        if self.index.config.get("mirror_use_external_urls"):
            return Content(url=file.url)
        if for_head:        # the size as known here, else as upstream states it; nothing is kept
            self.mirrors.upstreams.refuse_cut_off(self.index, file)
            size = self.mirrors.files.upstream_size(self.index, file) if file.size is None \
                else file.size
            return Content(size=size, pieces=iter(()))

        download = self.mirrors.files.download(self.index, file)
        return Content(download.last_modified, download.length,
                       pieces=self.mirrors.files.pieces(self.index, download))

    def metadata_file(self, file):
        return self.mirrors.files.metadata_hash(self.index, file)


class Projects:
    """The projects of all indexes: composes stages and mirrors into an index with its bases."""

    def __init__(self, store, indexes, mirrors):
        self.store, self.indexes, self.mirrors = store, indexes, mirrors

    def at(self, index):
        """The `Stage` or `Mirror` of an index, without its bases."""
        return (Mirror if index.is_mirror else Stage)(self, index)

    def contributions(self, index, name, kind=File, again=False, hidden=(), asks=True):
        """What each index of the resolution order offers, as `Contributions`.

        `kind`: see `Stage.page`. `hidden`: members that the caller may not read. They are not
        asked. Any name may be private there, so mirrors are shut out unless a whitelist admits the
        name: the response reveals nothing of what the hidden members have. `asks`: whether mirrors
        are asked; if not, they offer no files, and are known to have what was fetched before.

        A mirror that a private name shuts out is not asked. The UpstreamTrouble or Busy of a mirror
        that fails is `trouble`, and is raised if no index knows the project; only in that case a
        mirror that failed just before is asked `again`. A base that is missing may have had any
        name: mirrors are shut out unless a whitelist admits the name, and Forbidden is raised if no
        index knows the project."""
        blocking, failed = MirrorBlocking(name, index), []
        missing = self.indexes.missing_bases(index)
        if missing or hidden:
            blocking.misses_stage()

        order = self.indexes.order(index)
        members = [self.at(member) for member in order if member not in hidden]
        pages, mirrors = [], [member for member in members if member.asks_upstream]
        facts = order, hidden, tuple(mirror.index for mirror in mirrors), failed, blocking
        for stage in members[:len(members) - len(mirrors)]:     # mirrors come last
            page = stage.page(name, kind=kind)
            blocking.saw_stage(stage.index, page.known)
            if page.known:
                pages.append(page)

        blocked, trouble, expires, remembered = None, None, [], False
        if mirrors and blocking.blocks:
            blocked, mirrors = mirrors[0].index, []

        if not asks:
            for mirror in mirrors:
                if mirror.has(name):
                    pages.append(ProjectPage(name, ((mirror.index, ()),)))
                else:
                    failed.append(mirror.index)
            return Contributions(pages, blocked, None, 0, *facts)

        began = time.monotonic()
        if not again:       # else a mirror that fails at once would be asked twice
            self._ask_at_once(mirrors, lambda mirror: self.mirrors.pages.ask(mirror, name, False))

        deadline = time.monotonic() + self.mirrors.upstreams.settings.request_timeout
        for mirror in mirrors:
            try:
                page = mirror.page(name, deadline, again=again)
            except (UpstreamTrouble, Busy) as error:
                trouble = error
                failed.append(mirror.index)
                remembered = remembered or getattr(error, "noted", began) < began
                continue
            if page.expires:
                expires.append(page.expires)
            if page.known:
                pages.append(page)

        if trouble and not pages:
            if remembered and not again:
                return self.contributions(index, name, kind, True, hidden)
            raise trouble
        if missing and blocked and not pages:
            raise Forbidden(
                f"index {index.path} builds on {missing[0]}, which does not exist and may have had "
                f"{name}: mirrors are shut out until the bases of {index.path} are mended")
        return Contributions(pages, blocked, trouble, min(expires, default=0), *facts)

    @staticmethod
    def _ask_at_once(members, ask):
        """Has all mirrors among `members` asked before the first of them is waited for."""
        mirrors = [member.index for member in members if member.asks_upstream]
        for mirror in mirrors if len(mirrors) > 1 else ():
            with contextlib.suppress(UpstreamTrouble, Busy):    # raised at the mirror's turn
                ask(mirror)

    def page(self, index, name, hidden=()):
        """The page of an index with its bases, merged.

        The first index with a file name wins [W10.4]. The status is that of the first index that
        knows the project; files of a quarantined project are left out (PEP 792). The
        UpstreamTrouble or Busy of a mirror is raised if no index knows the project. `hidden`: see
        `contributions`."""
        found = self.contributions(index, name, PageFile, hidden=hidden)
        parts, seen = [], set()
        for page in found.pages:
            for origin, files in page.parts:
                shown = files
                for policy in POLICIES:
                    shown = policy.shown(index, page, found.pages[0], shown)
                if seen:
                    shown = tuple(file for file in shown if file.filename not in seen)
                parts.append((origin, shown))
                if len(found.pages) > 1:
                    seen.update(file.filename for file in files)

        only = found.pages[0] if len(found.pages) == 1 else None
        return ProjectPage(
            name, tuple(parts),
            tuple(dict.fromkeys(v for page in found.pages for v in page.versions)),
            blocked=found.blocked,
            stale=bool(found.trouble) or any(page.stale for page in found.pages),
            expires=found.expires, status=found.pages[0].status if found.pages else ACTIVE,
            upstream_serial=only.upstream_serial if only else None)

    def releases(self, index, name, version=None, found=None, claim=None):
        """[Release, ...] of a project in an index and its bases, the first index first; None if no
        index knows the project.

        `version`: only this one, with each index's other spellings of it merged into one release.
        `found`: the project's `Contributions`; None: without the bases, so that their upstreams do
        not learn the name. `claim`: see `Stage.releases`."""
        page = self.at(index).page(name) if found is None else None
        pages = found.pages if found else [page] if page.known else []

        releases = []
        for page in pages:
            found = self.at(page.parts[0][0]).releases(page, version, claim)
            releases += found if version is None else filter(None, [merged(found)])
        return releases if pages else None

    def metadata(self, page, version, claim):
        """(metadata of a version on a page, whether nothing failed), of the first index that has
        any.

        `claim`: see `Stage.releases`."""
        texts = spellings(version, dict.fromkeys((*page.versions,
                                                  *(file.version for file in page.files))))
        stated = {"requires_python": next((file.requires_python for file in page.files
                                           if file.version in texts and file.requires_python), "")}
        for index, files in page.parts:
            found, is_complete = self.at(index).metadata(page.name, version, files, claim)
            if found is not None or not is_complete:
                return {**stated, **(found or {})}, is_complete
        return stated, True

    def mirrors_in(self, index):
        """The mirrors in the resolution order of an index."""
        return [member for member in self.indexes.order(index) if self.at(member).asks_upstream]

    def unknown(self, index, name, sentence=""):
        """The NotFound for a project that neither an index nor its bases have.

        `sentence`: its text."""
        if self.mirrors.upstreams.settings.offline_mode and self.mirrors_in(index):
            return NotFound(f"The project {name} is not here, and in offline mode nobody else is "
                            "asked for it.")
        return NotFound(sentence or f"The project {name} does not exist.")

    def tags(self, index, name):
        """The tags (see `Freshness`) of all that a response about this project depends on."""
        return frozenset(project_tag(member.id, name) for member in self.indexes.order(index))

    def lists(self, indexes):
        """Yield for each index (index, its names), with the UpstreamTrouble or Busy in place of
        names that could not be had."""
        began = time.monotonic()
        members = [self.at(index) for index in indexes]
        self._ask_at_once(members, self.mirrors.lists.ask_names)
        for member in members:
            try:
                yield member.index, member.names(began)
            except (UpstreamTrouble, Busy) as problem:
                yield member.index, problem

    def find_file(self, index, path):
        """The `Place` of the file at `path` below an index; Gone or NotFound.

        If several projects of a mirror list the file: a quarantined one, else one whose page still
        has it."""
        with self.store.read() as db:
            rows = db.execute(
                f"SELECT {FILE_COLUMNS}, projects.name AS project, projects.status FROM files "
                "JOIN projects ON projects.id = project_id "
                "WHERE files.index_id = ? AND path = ?", (index.id, path)).fetchall()
        if not rows:
            self.refuse_gone(f"{index.path}/{path}")
            raise NotFound("no such file")

        def rank(row):
            is_withheld = Status.of(row["status"]).withholds_files
            return not is_withheld, row["position"] is None, row["id"]

        row = min(rows, key=rank) if len(rows) > 1 else rows[0]
        return Place(File._make(tuple(row)[:-2]), row["project"], Status.of(row["status"]))

    def open(self, index, place, for_head=False):
        """The `Content` of a file; what a policy raises if it withholds the file."""
        for policy in POLICIES:
            policy.refuse(index, place)
        return self.at(index).open(place.file, for_head)

    def open_metadata(self, index, place):
        """(SHA-256, bytes) of a file's metadata file (PEP 658); NotFound if it has none."""
        for policy in POLICIES:
            policy.refuse(index, place)
        sha256 = self.at(index).metadata_file(place.file)
        data = metadata_bytes(self.store, self.mirrors.files.blobs, sha256) if sha256 else None
        if data is None:
            raise NotFound(f"no metadata found in {index.path}/{place.file.path}")
        return sha256, data

    def refuse_gone(self, path):
        """Gone if there once was a file at `path` (user/index/+f/...)."""
        with self.store.read() as db:
            if is_gone(db, path):
                raise Gone("file existed, deleted in later serial")


# ==================================================================================================
# 13  Staging
#
# Pushing a release to another index, or to an outside server that takes uploads as PyPI does.
# Between indexes a push is one change, all or nothing, and copies rows, not bytes.
# ==================================================================================================


@dataclasses.dataclass(frozen=True)
class StagedRelease:
    """A release of an index with all that may be pushed: files, test results, documentation.

    It holds all that the index has under any spelling of the version (`1.0-RC1`, `1.0rc1`)."""
    name: str                       # normalised
    version: str                    # as in the request, or the first spelling
    metadata: dict                  # {spelling of the version: metadata of that release}
    files: tuple = ()               # ((File, (File, ...)), ...), by file name
    docs: tuple = ()                # (File, ...): at most one for each spelling
    status: Status = ACTIVE         # of the project

    @classmethod
    def of(cls, releases, metadata):
        """From the releases of an index that spell a version; `metadata`: by spelling."""
        whole = merged(releases)
        files = sorted(whole.files, key=lambda file: file.filename)
        return cls(whole.project, whole.version, metadata,
                   tuple((file, whole.results(file)) for file in files),
                   tuple(sorted(whole.docs, key=lambda file: file.filename)), whole.status)

    def refuse_quarantined(self, index):
        if self.status.withholds_files:
            raise Forbidden(f"the project {self.name} on {index.path} is quarantined")

    def only(self, no_docs, only_docs):
        """The part of it that is to be pushed; NotFound if that is empty."""
        part = dataclasses.replace(self, files=() if only_docs else self.files,
                                   docs=() if no_docs else self.docs)
        if not part.files and not part.docs:
            raise NotFound(f"no release/files found for {self.name} {self.version}")
        return part


def _released(db, index, name, version):
    """A stage's release as it is now, as `StagedRelease`.

    BadRequest if the index itself does not have it."""
    releases = releases_of(db, index, name, version)
    if not releases:
        raise _nothing_to_push(index, name, version)
    return StagedRelease.of(releases, {release.version: release.whole_metadata(db)
                                       for release in releases})


def _nothing_to_push(index, name, version):
    return BadRequest(f"there are no files for {name} {version} on stage {index.path}")


class Staging:
    """Pushes releases: to other indexes, and to outside servers."""

    def __init__(self, store, blobs, projects, settings):
        self.store, self.blobs, self.projects, self.settings = store, blobs, projects, settings
        self.mirrors = projects.mirrors
        self.upstream, self.outside = (
            Shares("pushes wait for other servers", Limits.pushes, Limits.pushes_of_one, 10)
            for _ in range(2))

    def release(self, index, name, version):
        """The release of an index without its bases, as `StagedRelease`; BadRequest without one."""
        member = self.projects.at(index)
        page = member.page(name, kind=None)
        if not member.asks_upstream:
            with self.store.read() as db:
                return _released(db, index, name, version)
        releases = member.releases(page, version)
        if not releases:
            raise _nothing_to_push(index, name, version)
        return StagedRelease.of(releases, {release.version: release.metadata
                                           for release in releases})

    def complete(self, index, pushed, user):
        """The release with all bytes here: a mirror's files are fetched, their metadata is read.

        UpstreamTrouble if upstream fails."""
        asks_upstream = self.projects.at(index).asks_upstream
        files = [file for file, _ in pushed.files]
        if asks_upstream:
            with self.upstream.one(user, 0):
                files = [self._fetched(index, file) for file in files]
        for file in files:      # so that no blob is swept before the change refers to it
            if not self.blobs.claim(file.sha256):
                raise NotFound(f"{file.filename} is lost")

        if not asks_upstream:
            return pushed

        metadata = {text: {"name": pushed.name, "version": text} for text in pushed.metadata}
        read = set()
        for file in files:
            if file.version in read:
                continue
            with self.blobs.open(file.sha256) as blob:
                try:
                    data = archive_metadata(blob, file.filename)
                except BrokenArchive as problem:        # as upstream has it, so it is pushed
                    log.warning("pushed from the mirror %s as it is: %s", index.path,
                                problem.message)
                    data = None
                except BadRequest as problem:
                    raise UpstreamTrouble(
                        f"upstream's file is refused: {problem.message}") from None

            if data is not None:
                # upstream may write any header
                known = {*TEXT_FIELDS, *LIST_FIELDS, *NEWER_LIST_FIELDS}
                stated = {key: value for key, value in parse_core_metadata(data).items()
                          if key in known}
                metadata[file.version] = with_defaults({**stated, **metadata[file.version]})
                read.add(file.version)
        return dataclasses.replace(pushed, metadata=metadata,
                                   files=tuple((file, ()) for file in files))

    def _fetched(self, index, file):
        """A mirror's file, with its bytes and its metadata file here."""
        try:
            here = self.mirrors.files.local(index, file)
            if here is None:
                download = self.mirrors.files.download(index, file)
                while not download.wait(Limits.stall):      # the download's own bounds end it
                    pass
                if download.error:
                    raise download.error
                here = file._replace(sha256=download.sha256, size=download.available,
                                     last_modified=download.last_modified or http_date(time.time()))
        except NotFound as problem:
            raise UpstreamTrouble(problem.message) from None
        found = self.mirrors.files.metadata_of_wheel(index, here)
        return here._replace(core_metadata=found, metadata_sha256=found)

    def push_outside(self, index, pushed, url, username, password, register, actor):
        """devpi: PUSH to a server that takes uploads as PyPI does, one request a file.

        Returns devpi's action log, with failures per file; the files after a failure are tried all
        the same, within `Limits.push_time`."""
        if self.store.read_only:
            raise ReadOnly()        # before anything is sent: the audit log could not record it
        server = OutsideServer(self.mirrors.upstreams.client, url, username, password,
                               self.settings.push_timeout)
        log_ = []
        with self.outside.one(actor.user, 0):
            if register:
                log_ += map(server.register, pushed.metadata.values())
            if all(entry[0] in (200, 201, 410) for entry in log_):
                with self.store.read() as db:
                    attested = {file.id: attestations_of(db, file) for file, _ in pushed.files}
                log_ += [server.upload(self.blobs, index, pushed.metadata[file.version], file,
                                       attested[file.id]) for file, _ in pushed.files]
                log_ += [server.upload_docs(self.blobs, pushed.metadata[docs.version], docs)
                         for docs in pushed.docs]

        said = f"to {url_origin(url)}: {', '.join(str(entry[0]) for entry in log_)}"
        self.store.write(
            announce_event,
            Event("push.external", index, pushed.name, pushed.version, detail=said), actor=actor)
        return log_


def push_release(change, source, pushed, target, project_name, part, may_replace):
    """devpi: PUSH to another index. Enter a release into a stage, with its files, test results and
    documentation; returns devpi's action log.

    `part`: (no_docs, only_docs); `may_replace`: see `Releases.upload`."""
    target = current_index(change, target)
    if not source.is_mirror:        # as it is now
        pushed = _released(change.db, source, pushed.name, pushed.version)
        pushed.refuse_quarantined(source)
    pushed = pushed.only(*part)

    project_id, log_ = require_project(change, target, project_name), []
    for version, metadata in pushed.metadata.items():
        before = change.get("release", (target.user, target.name, normalize(project_name), version))
        metadata = {**(before["metadata"] if before else {}), **metadata}
        put_release(change, target, project_name, version, metadata)
        log_.append([200, "register", project_name, version, "->", target.path])

    replaced = []       # files
    put = functools.partial(_push_file, change, source, target, project_id, pushed.name,
                            may_replace, replaced)
    for file, results in pushed.files:
        new = put(file)
        log_.append([200, "store_releasefile", f"{target.path}/{new.path}"])
        for result in results:
            stored = put_test_result(change, target, pushed.name, new, result.sha256, result.size,
                                     _pushed_history(change, source, target, result))
            log_.append([200, "store_toxresult", f"{target.path}/{stored.path}"])

    for docs in pushed.docs:
        put(docs)
        log_.append([200, "store_doczip", project_name, docs.version, "->", target.path])

    for old in replaced:        # last: the push may bring other files of their releases
        if old.version not in pushed.metadata:
            remove_if_empty(change, target, pushed.name, old)

    change.happened(Event("push", target, pushed.name, pushed.version,
                          detail=f"from {source.path}", source=source.path))
    return log_


def _push_file(change, source, target, project_id, project, may_replace, replaced, file):
    """Copy a file's row to another stage; Conflict if it is there and may not be overwritten.

    The file that it replaces is appended to `replaced`."""
    old = file_named(change, project_id, file.filename, file.kind)
    if old and not target.volatile:
        content = "the same" if old.sha256 == file.sha256 else "other"
        raise already_exists(file.filename, f", with {content} content")
    history = make_room(change, target, old, file.kind, file.filename, file.sha256, may_replace)
    history += _pushed_history(change, source, target, file)
    if old:
        replaced.append(old)

    if file.metadata_sha256:        # followers of the changelog may have deleted it
        kept = change.get("metadata", (file.metadata_sha256,))
        if kept:                    # else it is a blob, as in schema version 1
            change.put("metadata", (file.metadata_sha256,), kept)

    return put_file(change, target, project, history,
                    attestations=attestations_of(change, file) or None,
                    **{column: getattr(file, column) for column in FileRows.plain})


def _pushed_history(change, source, target, file):
    history = [entry for entry in json.loads(file.history or "[]") if entry["what"] != "overwrite"]
    return history + [history_entry("push", who=change.who, src=source.path, dst=target.path)]


_HTML = re.compile(r"<(?:!doctype html|html|head|title|body|h1|p|div)\b", re.IGNORECASE)
_HTML_UNSEEN = re.compile(r"<(script|style)\b[^>]*>.*?</\1\s*>|<!--.*?-->",
                          re.IGNORECASE | re.DOTALL)


def refusal_reason(answer):
    """Why a server refused a POST (a `PostResponse`), in one line: its body or its status line."""
    phrase, text = reason_phrase(answer.status), answer.text.strip()
    if text.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(text, parse_int=len, parse_float=len)
            text = next((content[key] for key in ("message", "detail", "error")
                         if isinstance(content.get(key), str)), text)
    elif _HTML.search(text[:1000]):
        own_phrase = "" if answer.reason in ("", phrase) else answer.reason
        text = _reason_in_html(text[:8 << 10], answer.status, own_phrase)
    text = " ".join(sound(text).split()) or " ".join(sound(answer.reason).split()) or phrase
    return text if len(text) <= Limits.refusal_reason else text[:Limits.refusal_reason] + "..."


def _reason_in_html(page, status, own_phrase):
    """What an error page says: its title, unless that is only the name of the status; then the
    status line, then the page's text."""
    page = _HTML_UNSEEN.sub(" ", page)
    title = re.search(r"<title\b[^>]*>([^<]*)", page, re.IGNORECASE)
    title = " ".join(unescaped(title[1]).split()) if title else ""
    title = re.sub(r"^(?:HTTP\s+)?(?:Error\s+)?%d\b[\s:-]*" % status, "", title)
    if title and title.lower() not in (reason_phrase(status).lower(), "error"):
        return title
    body = re.split(r"</title\s*>|</head\s*>|<body\b[^>]*>", page, flags=re.IGNORECASE)[-1]
    return own_phrase or unescaped(re.sub(r"<[^>]*>", " ", body)) or title


class OutsideServer:
    """A server that takes uploads as PyPI does (multipart/form-data, Basic credentials)."""

    def __init__(self, client, url, username, password, timeout):
        self.client, self.url, self.timeout = client, public_url(url), timeout
        pair = base64.b64encode(f"{username}:{password}".encode()).decode()
        self.headers = {"User-Agent": user_agent(), "Accept": "*/*",
                        "Authorization": f"Basic {pair}"}
        self.until = time.monotonic() + Limits.push_time

    def register(self, metadata):
        fields = [(":action", "submit"), *_form_fields(metadata)]
        body = urllib.parse.urlencode(fields).encode()
        headers = {**self.headers, "Content-Type": "application/x-www-form-urlencoded"}
        return self._attempt("register",
                             lambda: self.client.post(self.url, headers, [body], len(body),
                                                      self.timeout),
                             lambda answer: [answer.status, "register", metadata["name"],
                                             metadata["version"], *_refusal(answer)])

    def upload(self, blobs, index, metadata, file, attestations):
        """Send a file with its attestations. PyPI takes those with a Trusted Publisher's token
        only: if a refusal mentions them, the file is sent once more without them."""
        python, kind = upload_kind(file.filename)
        fields = [(":action", "file_upload"), ("filetype", kind), ("pyversion", python),
                  ("sha256_digest", file.sha256), *_form_fields(metadata)]

        def send():
            if attestations:
                answer = self._send(blobs, [*fields, ("attestations", attestations)], file,
                                    file.filename)
                said = f"{answer.reason} {answer.text}".lower()
                if answer.status not in (400, 403, 422) or "attestation" not in said:
                    return answer
                log.info("%s takes %s without its attestations only", url_origin(self.url),
                         file.filename)
            return self._send(blobs, fields, file, file.filename)
        return self._attempt("release upload", send, lambda answer: [
            answer.status, "upload", f"{index.path}/{file.path}", *(_refusal(answer) or [""])])

    def upload_docs(self, blobs, metadata, docs):
        name = metadata["name"]
        fields = [(":action", "doc_upload"), ("name", name), ("version", docs.version)]
        return self._attempt("documentation upload",
                             lambda: self._send(blobs, fields, docs, f"{name}.zip"),
                             lambda answer: [answer.status, "docfile", name, *_refusal(answer)])

    def _attempt(self, what, send, entry):
        """Send a request; returns its entry in the action log."""
        try:
            if time.monotonic() > self.until:
                raise UpstreamTrouble(
                    f"not tried: pushing took over {Limits.push_time} seconds already")
            return entry(send())
        except (Problem, OSError) as problem:
            return [-1, f"exception on {what}:", reason_of(problem)]

    def _send(self, blobs, fields, file, filename):
        boundary = secrets.token_hex(16)
        head = "".join(f"--{boundary}\r\nContent-Disposition: form-data; "
                       f'name="{_in_quotes(name)}"\r\n\r\n{value}\r\n'
                       for name, value in fields)
        head += (f'--{boundary}\r\nContent-Disposition: form-data; name="content"; '
                 f'filename="{_in_quotes(filename)}"\r\n'
                 "Content-Type: application/octet-stream\r\n\r\n")
        head, tail = head.encode(), f"\r\n--{boundary}--\r\n".encode()
        headers = {**self.headers, "Content-Type": f"multipart/form-data; boundary={boundary}"}
        with blobs.open(file.sha256, file.size) as blob:
            pieces = itertools.chain([head], iter(lambda: blob.read(256 << 10), b""), [tail])
            return self.client.post(self.url, headers, pieces, len(head) + file.size + len(tail),
                                    self.timeout)


def _refusal(answer):
    """The end of an entry of the action log: the reason, if the request was refused."""
    return [] if answer.status in (200, 201) else [refusal_reason(answer)]


def is_released(log_):
    """Whether a push to an outside server succeeded, by its action log: all files have arrived.

    Documentation that is refused with 404 or 410, as by PyPI, is no failure unless only
    documentation was sent; a register may get 410."""
    kinds = {entry[1] for entry in log_}
    return not kinds.isdisjoint(("upload", "docfile")) and all(
        entry[0] in (200, 201) or entry[0] == 410 and entry[1] == "register"
        or entry[0] in (404, 410) and entry[1] == "docfile" and "upload" in kinds for entry in log_)


def _in_quotes(name):
    """The name of a field or file for the quotes of a Content-Disposition (WHATWG's escapes)."""
    return name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


def _form_fields(metadata):
    """Metadata as the fields of an upload form: lists repeated."""
    other = metadata.get("other")
    for field, value in {**metadata, **(other if isinstance(other, dict) else {})}.items():
        if field != "other":
            for item in value if isinstance(value, list) else [value]:
                yield field, item


def upload_kind(filename):
    """(pyversion, filetype) that an upload form states for a file of this name [W19.6]."""
    lower = filename.lower()
    if lower.endswith((".zip", ".tar.gz", ".tgz")) \
            and not re.search(r"-[0-9][^-]*[.-](linux|macosx|win)[-_0-9]", lower):
        return "source", "sdist"
    if lower.endswith(".whl"):
        tag = python_tag(filename)
        if tag == "py2.py3":
            return "2.7", "bdist_wheel"
        found = re.match(r"[a-z]+([0-9])_?([0-9]*)", tag)
        return (found[1] + (f".{found[2]}" if found[2] else "") if found else "any"), "bdist_wheel"

    behind_name = re.sub(r"^.*?-(?=[0-9])", "-", lower, count=1)      # the name may be suds-py3
    found = re.search(r"-(?:py|cp)([0-9])\.?([0-9]*)", behind_name)
    kind = {"egg": "bdist_egg", "exe": "bdist_wininst", "msi": "bdist_msi"}.get(
        lower.rpartition(".")[2])
    if kind and found:
        return found[1] + (f".{found[2]}" if found[2] else ""), kind
    return "any", "bdist_dumb"


# ==================================================================================================
# 14  Outbox
#
# Messages that tell outside servers of events on an index: a Jenkins job to start, webhooks. The
# change that makes the event enters them. A thread for each target and account delivers them later,
# until they arrive or are given up. Accounts take turns, and slow targets come last: a target that
# is down or slow costs other accounts nothing. A crash loses no message; a message may come twice,
# with the same delivery number.
# ==================================================================================================


def wants_event(index, event_name):
    """Whether the index's configuration has an event sent to any server."""
    wanted = EVENTS[event_name]
    hooked = index.config.get("webhook_url") and \
        wanted in index.config.get("webhook_events", webhook_events())
    return bool(hooked or wanted == "upload" and index.config.get("uploadtrigger_jenkins"))


@on_event
def enter_messages(change, event):
    """Enter an index's messages about an event into the outbox, in the event's own change."""
    index = event.index
    if index is None or not wants_event(index, event.name):
        return

    config = index.config
    if event.name == "upload" and config.get("uploadtrigger_jenkins"):
        url = config["uploadtrigger_jenkins"]
        for place, value in (("{pkgname}", event.project), ("{pkgversion}", event.version)):
            url = url.replace(place, urllib.parse.quote(value, safe=""))
        headers, body = _jenkins_form(f"{change.actor.own_url}/{quoted(index.path)}",
                                      f"{event.project}=={event.version}")
        _post_later(change, index, "jenkins", url, headers, body)
    if EVENTS[event.name] in config.get("webhook_events", webhook_events()):
        body = json.dumps(_webhook_content(change, index, event)).encode()
        headers = {"Content-Type": "application/json", "X-Devpi-Event": EVENTS[event.name]}
        if config.get("webhook_secret"):
            mac = hmac.new(config["webhook_secret"].encode(), body, "sha256").hexdigest()
            headers["X-Devpi-Signature-256"] = f"sha256={mac}"
        for url in config.get("webhook_url", ()):
            _post_later(change, index, "webhook", url, headers, body)

    _bound_outbox(change)


def _webhook_content(change, index, event):
    path = f"/{quoted(index.path)}/"
    if event.file:
        path += quoted(event.file.path)
    elif event.version:
        path += f"{event.project}/{quoted(event.version)}"
    else:
        path += event.project

    content = {
        "id": secrets.token_hex(16), "event": EVENTS[event.name], "index": index.path,
        "project": event.project, "version": event.version,
        "file": event.file.filename if event.file else None,
        "sha256": event.file.sha256 if event.file else None, "url": change.actor.outside_url + path,
        "user": change.who, "serial": change.serial, "ts": iso_time(time.time())}
    return {**content, "source": event.source} if event.source else content


def _post_later(change, index, kind, url, headers, body):
    """Enter a message; an index with too many waiting messages loses its oldest."""
    target = "%s://%s:%d" % origin_of(url)
    change.execute("INSERT INTO outbox "
                   "(delivery, index_id, target, kind, url, headers, body, due, account) "
                   "VALUES (?, ?, ?, ?, ?, ?, ?, ?, "
                   "coalesce((SELECT user_id FROM indexes WHERE id = ?), 0))",
                   (str(uuid.uuid4()), index.id, target, kind, url, json.dumps(headers), body,
                    time.time(), index.id))
    change.execute("DELETE FROM outbox WHERE index_id = ? AND id <= "
                   "(SELECT id FROM outbox WHERE index_id = ? ORDER BY id DESC LIMIT 1 OFFSET ?)",
                   (index.id, index.id, Limits.outbox))
    change.wake("outbox")


def _bound_outbox(change):
    """If too many messages wait in all, the account with the most loses its oldest."""
    first, last = change.execute("SELECT min(id), max(id) FROM outbox").fetchone()
    if first is None or last - first < Limits.outbox_of_all:    # ids only grow: not too many
        return
    excess = change.execute("SELECT count(*) FROM outbox").fetchone()[0] - Limits.outbox_of_all
    if excess > 0:
        account = change.execute("SELECT account FROM outbox GROUP BY account "
                                 "ORDER BY count(*) DESC LIMIT 1").fetchone()[0]
        excess += Limits.outbox_of_all // 100       # so that not every message gets here
        change.execute("DELETE FROM outbox WHERE id IN "
                       "(SELECT id FROM outbox WHERE account = ? ORDER BY id LIMIT ?)",
                       (account, excess))
        log.warning("too many messages in the outbox: the oldest %d of one account are dropped",
                    excess)


_JENKINS_SCRIPT = '''\
"""Tests {spec} from {index} with tox and posts the result there.

Runs in a Jenkins job, on Python 3.3 or newer."""
import os
import subprocess
import venv

INDEX = {index!r}
SPEC = {spec!r}
WORKSPACE = os.environ.get("WORKSPACE") or os.getcwd()
HOME = os.path.join(WORKSPACE, "_devpi")
CLIENTDIR = os.path.join(HOME, "client")
PROGRAMS = os.path.join(HOME, "Scripts" if os.name == "nt" else "bin")


def run(program, *arguments):
    """Run a program of the environment; the job fails if it does."""
    command = [os.path.join(PROGRAMS, program)] + list(arguments)
    print("running " + " ".join(command), flush=True)
    subprocess.check_call(command, cwd=WORKSPACE)


venv.create(HOME, with_pip=True)
run("python", "-m", "pip", "install", "--quiet", "--upgrade", "--index-url", INDEX + "/+simple/",
    "devpi-client", "tox")
run("devpi", "use", "--clientdir", CLIENTDIR, INDEX)
run("devpi", "test", "--clientdir", CLIENTDIR, SPEC)
'''


def _jenkins_form(index_url, spec):
    """(headers, body) of the form with which devpi-jenkins starts a parameterised job.

    `file0` is the script that the job runs."""
    boundary = secrets.token_hex(16)
    fields = {"Submit": "Build", "name": "jobscript.py",
              "json": json.dumps({"parameter": {"name": "jobscript.py", "file": "file0"}})}
    parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
             for name, value in fields.items()]
    script = _JENKINS_SCRIPT.format(index=index_url, spec=spec)
    parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="file0"; '
                 f'filename="file0"\r\n\r\n{script}\r\n--{boundary}--\r\n')
    return {"Content-Type": f"multipart/form-data; boundary={boundary}"}, "".join(parts).encode()


class Outbox(Part):
    """Delivers the messages in the outbox.

    A lane is (target, account); a target is (scheme, host, port). A lane delivers one message at a
    time. An account has at most twice as many lanes under way as are free then, so that some stay
    free for others. The account with the fewest lanes under way comes first, and of its lanes the
    one whose last turn was longest ago. A lane whose target was slow last time comes after all
    others, and only `Limits.slow_targets` of those are under way at a time."""

    def __init__(self, store, client, settings):
        self.store, self.client, self.settings = store, client, settings
        self.workers = Workers("outbox", Limits.targets // 4, self._deliver_to)
        self.busy = set()       # lanes that a worker has
        self.resting = {}       # lane -> time.time() until which it is left alone
        self.slow = collections.OrderedDict()       # lanes whose target was slow last time
        self.served = collections.OrderedDict()     # lane -> time.monotonic() of its last turn

    def loops(self):
        if not self.store.read_only:
            yield "outbox", self.run

    def gauges(self):
        waiting, dead = self._counts()
        yield Gauge("devpi_lite_outbox_waiting", "gauge", "Messages that wait for their delivery.",
                    waiting)
        yield Gauge("devpi_lite_outbox_dead", "gauge", "Messages that were given up.", dead)

    def complaints(self):
        _, dead = self._counts()
        return outbox_complaints(dead)

    def _counts(self):
        with self.store.read() as db:
            return count_messages(db)

    def clean(self, change):
        """Delete all messages that were given up but the newest."""
        change.execute("DELETE FROM outbox WHERE dead = 1 AND id NOT IN "
                       "(SELECT id FROM outbox WHERE dead = 1 ORDER BY id DESC LIMIT ?)",
                       (Limits.dead_messages,))

    def run(self):
        """A loop for a thread: starts workers for lanes with due messages."""
        ready = self.store.signals["outbox"]
        while True:
            ready.clear()
            try:
                pause = self._dispatch()
            except Exception:       # this thread has to live on
                log.exception("the outbox failed")
                pause = 5
            ready.wait(pause)

    def _dispatch(self):
        """Start workers for lanes with due messages; the seconds until the next one is due."""
        pause, now = 60, time.time()
        for lane, until in tuple(self.resting.items()):
            if until <= now:
                self.resting.pop(lane, None)
        if len(self.busy) >= Limits.targets:
            return pause        # the end of a turn wakes this loop

        with self.store.read() as db:
            rows = db.execute("SELECT target, account, min(due) AS due FROM outbox WHERE dead = 0 "
                              "GROUP BY target, account").fetchall()

        waiting = []
        for row in rows:
            lane = row["target"], row["account"]
            due = max(row["due"], self.resting.get(lane, 0))
            if lane in self.busy:
                continue
            if due <= now:
                waiting.append((lane in self.slow, (self.served.get(lane, 0), due), lane))
            else:
                pause = min(pause, due - now)
        self._start(waiting)
        return pause

    def _start(self, waiting):
        """Start workers for lanes, within the bounds.

        `waiting`: [(is slow, (time of its last turn, time when it is due), lane), ...]."""
        busy = tuple(self.busy)
        running = collections.Counter(account for _, account in busy)
        free, slow = Limits.targets - len(busy), sum(lane in self.slow for lane in busy)
        queues = {}                 # (is slow, account) -> its lanes
        for is_slow, _, lane in sorted(waiting):
            queues.setdefault((is_slow, lane[1]), collections.deque()).append(lane)

        while free > 0:
            fitting = [
                (is_slow, running[account], account) for is_slow, account in queues
                if running[account] < 2 * free and not (is_slow and slow >= Limits.slow_targets)]
            if not fitting:
                return
            is_slow, _, account = min(fitting)
            lane = queues[is_slow, account].popleft()
            if not queues[is_slow, account]:
                del queues[is_slow, account]
            running[account] += 1
            slow += is_slow
            free -= 1
            self.busy.add(lane)
            self.workers.submit(lane)

    def _deliver_to(self, lane):
        """Deliver a lane's due messages, oldest first, until one fails or the turn is over."""
        until = time.monotonic() + Limits.delivery_turn
        try:
            while self._deliver_one(lane) and not self.store.closed and time.monotonic() < until:
                pass
        except Exception as error:
            # no room, or the database is held: what was sent may be sent again, but not at once
            log.error("outbox: %s", error)
            self.resting[lane] = time.time() + Limits.outbox_rest
        finally:
            self._note(self.served, lane, time.monotonic())
            self.busy.discard(lane)
            self.store.signals["outbox"].set()

    def _deliver_one(self, lane):
        """Deliver a lane's next message; False if there was none, or it did not arrive."""
        target, account = lane
        with self.store.read() as db:
            row = db.execute("SELECT * FROM outbox WHERE dead = 0 AND target = ? AND account = ? "
                             "AND due <= ? ORDER BY due, id LIMIT 1",
                             (target, account, time.time())).fetchone()
        if row is None:
            return False

        began = time.monotonic()
        error, unreachable = self._send(row)
        self._note_speed(lane, time.monotonic() - began > Limits.slow_delivery)
        if error is None:
            self.store.write(_delivered, row["id"], durable=False)
            return True
        log.warning("%s to %s failed (try %d of %d): %s", row["kind"], target, row["tries"] + 1,
                    Limits.delivery_tries, error)
        self.store.write(_not_delivered, row, error, unreachable, self.settings.webhook_retry,
                         durable=False)
        return False

    def _note_speed(self, lane, is_slow):
        """Remember whether a lane's target was slow."""
        self.slow.pop(lane, None)
        if is_slow:
            self._note(self.slow, lane, True)

    @staticmethod
    def _note(memory, lane, value):
        """Remember a value of a lane; the oldest lanes are forgotten beyond a bound."""
        memory[lane] = value
        memory.move_to_end(lane)
        while len(memory) > Limits.outbox_of_all:
            memory.popitem(last=False)

    def _send(self, row):
        """(None, False) if the message arrived, else (reason, whether the target is
        unreachable)."""
        if not is_allowed_target(row["url"], self.settings.webhook_allow):
            return "--webhook-allow does not name the host", False
        headers = {"User-Agent": user_agent(), "X-Devpi-Delivery": row["delivery"],
                   **json.loads(row["headers"])}
        credentials = credentials_of(row["url"])
        if credentials:
            headers["Authorization"] = credentials
        try:
            answer = self.client.post(row["url"], headers, [row["body"]], len(row["body"]),
                                      Limits.webhook_time, Limits.webhook_connect)
        except UpstreamTrouble as problem:
            return problem.message, isinstance(problem, Unreachable)
        return (None if 200 <= answer.status < 300 else f"answered {answer.status}"), False

    def summary(self, by_target):
        """See `outbox_summary`."""
        with self.store.read() as db:
            return outbox_summary(db, by_target)

    def retry(self, actor):
        """Make all messages due now, also those given up; returns their number."""
        self.resting.clear()
        self.slow.clear()
        return self.store.write(_retry_all, actor=actor)


def count_messages(db):
    """How many messages wait, and how many were given up."""
    return [db.execute("SELECT count(*) FROM outbox WHERE dead = ?", (is_dead,)).fetchone()[0]
            for is_dead in (0, 1)]


def outbox_complaints(dead):
    """The `Complaint`s about so many messages that were given up."""
    if dead:
        yield Complaint("warn", f"{dead} messages to outside servers were given up")


def outbox_summary(db, by_target):
    """The messages that wait or were given up, counted by kind, and by target if `by_target`: dicts
    as in +status."""
    target, error = ("target", "error") if by_target else ("NULL", "NULL")
    # SQLite takes a bare column from the row of max(): the error of the newest that has one
    return [{"target": row["target"], "kind": row["kind"], "waiting": row["waiting"],
             "dead": row["dead"], "last-error": row["error"]} for row in db.execute(
        f"SELECT {target} AS target, kind, sum(dead = 0) AS waiting, sum(dead) AS dead, "
        f"{error} AS error, max(CASE WHEN error IS NOT NULL THEN id END) FROM outbox "
        "GROUP BY 1, kind ORDER BY 1, kind LIMIT 1000")]


def _delivered(change, row_id):
    change.execute("DELETE FROM outbox WHERE id = ?", (row_id,))


def _not_delivered(change, row, error, unreachable, first_pause):
    """Count a failed try: of one message, or of all due messages of an unreachable target."""
    now = time.time()
    which, values = ("dead = 0 AND target = ? AND due <= ?", (row["target"], now)) \
        if unreachable else ("id = ?", (row["id"],))
    change.execute(
        "UPDATE outbox SET tries = tries + 1, due = ? + min(? * (1 << tries), ?), "
        f"dead = tries + 1 >= ?, error = ? WHERE {which}",
        (now, first_pause, Limits.longest_retry, Limits.delivery_tries, error, *values))


def _retry_all(change):
    count = change.execute("UPDATE outbox SET dead = 0, tries = 0, due = ?",
                           (time.time(),)).rowcount
    change.happened(Event("outbox.retry", detail=str(count)))
    change.wake("outbox")
    return count


# ==================================================================================================
# 15  Search
#
# Finds uploaded projects by their metadata, README and documentation, in a database of its own that
# can be deleted at any time (full text by SQLite's FTS5, or LIKE if the interpreter has none); and
# the names of mirrors, in their sorted lists on disk. A thread works through a durable queue; an
# upload never waits for it.
# ==================================================================================================


SEARCH_SCHEMA = """
-- one row: a project of a stage (kind project), or a page of its documentation (kind page)
-- project: the id of the project's row
-- docs: version and SHA-256 of the documentation that was read
CREATE TABLE sdoc (
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, project INTEGER NOT NULL,
    index_id INTEGER NOT NULL, user TEXT NOT NULL, idx TEXT NOT NULL,
    norm TEXT NOT NULL, name TEXT NOT NULL, version TEXT NOT NULL,
    path TEXT NOT NULL, title TEXT NOT NULL, summary TEXT NOT NULL,
    requires_python TEXT, uploaded TEXT NOT NULL, docs TEXT);
CREATE INDEX sdoc_of_project ON sdoc (index_id, norm);
CREATE INDEX sdoc_by_name ON sdoc (kind, norm);
CREATE INDEX sdoc_pages ON sdoc (project, kind);

-- one row: a property of a project that a query can ask for
CREATE TABLE sfacet (
    key TEXT NOT NULL, value TEXT NOT NULL, doc INTEGER NOT NULL,
    PRIMARY KEY (key, value, doc)) WITHOUT ROWID;
CREATE INDEX sfacet_of_doc ON sfacet (doc);
"""
_TEXT_COLUMNS = ("name", "title", "summary", "keywords", "author", "classifiers", "body")
_WEIGHTS = {"name": 20, "title": 8, "summary": 6, "keywords": 5}    # for ranking; other columns: 1


class QueryError(Exception):
    """A query that is not well-formed; it is then read as plain words."""


class QueryTimeout(Busy):
    """A search that takes too long."""

    def __init__(self):
        super().__init__("the search took too long and was given up", 5)


@dataclasses.dataclass(frozen=True)
class Word:
    """A word or phrase to be found in the text."""
    text: str
    prefix: bool = False


@dataclasses.dataclass(frozen=True)
class Filter:
    """`key:value`; `prefix`: the value ends in a star."""
    key: str
    value: str
    prefix: bool = False


@dataclasses.dataclass(frozen=True)
class Group:
    """Parts of which all ("AND"), at least one ("OR") or none ("NOT") must hold."""
    operator: str
    parts: tuple


_FILTERS = {"name", "user", "index", "path", "version", "classifier", "keyword", "author",
            "license", "requires", "python", "import", "has", "is", "type", "uploaded"}
_FILTER_SPELLINGS = {"classifiers": "classifier", "keywords": "keyword"}
_QUERY_TOKEN = re.compile(r"""
    \s+ | (?P<bracket>[()])
    | (?P<not>-)(?=[^\s)*-])
    | (?:(?P<key>[A-Za-z]+):)? (?: "(?P<double>[^"]*)" | '(?P<single>[^']*)' )
      (?P<star>\*?) (?=[\s()]|$)
    | (?P<word>[^\s()]+)""", re.VERBOSE)
# What `type:` asks for, as (kind, text columns): the words of devpi's web pages.
_TYPES = {
    "page": ("page", _TEXT_COLUMNS), "title": ("page", ("title",)),
    "project": ("project", _TEXT_COLUMNS), "name": ("project", ("name",)),
    "summary": ("project", ("summary",)), "description": ("project", ("body",)),
    "keywords": ("project", ("keywords",)), "classifiers": ("project", ("classifiers",)),
    **dict.fromkeys(("author", "author_email", "maintainer", "maintainer_email"),
                    ("project", ("author",)))}


class Query:
    """A search query [W21.2] as a tree. Any text is a query; `notes` say how it was understood."""

    def __init__(self, text):
        self.notes = []
        self.text = text
        text = text.replace("\0", " ")
        if len(text) > Limits.query:
            text = text[:Limits.query]
            self.notes.append(f"Only the first {Limits.query} characters were used.")

        text = unicodedata.normalize("NFC", text)
        self.open_end = text[-1:] not in ("", " ")      # the last word may go on
        try:
            self.tree = self._parse(text)
        except (QueryError, RecursionError):
            self.notes.append("The query is not well-formed; it was read as plain words.")
            words = re.findall(r"\w+", text)
            self.tree = Group("AND", tuple(Word(word, self.open_end and word is words[-1])
                                           for word in words[:Limits.query_terms]))

    def _parse(self, text):
        if text.count("(") > Limits.query_terms:
            raise QueryError("too many brackets")
        tokens = collections.deque(self._tokens(text))
        parts = self._alternatives(tokens)
        if tokens:
            raise QueryError("unbalanced brackets")
        return parts

    def _tokens(self, text):
        """Yield brackets and operators as strings, words and filters as values."""
        count = 0
        for match in _QUERY_TOKEN.finditer(text):
            if match["bracket"] or match["not"]:
                yield match["bracket"] or "NOT"
                continue
            token = self._term(match, match.end() == len(text))
            if token is None:
                continue
            if not isinstance(token, str):
                count += 1
                if count == Limits.query_terms + 1:
                    self.notes.append(f"Only the first {Limits.query_terms} terms were used.")
                if count > Limits.query_terms:
                    continue
            yield token

    def _term(self, match, is_last):
        """A word, filter or operator; None if it means nothing."""
        key, quoted_ = match["key"], match["double"] if match["single"] is None \
            else match["single"]
        if quoted_ is not None:
            known = self._filter_key(key)
            star = match["star"] or ("*" if known and quoted_.endswith("*") else "")
            if known:
                return Filter(known, quoted_.rstrip("*") if star else quoted_, bool(star))
            return Word(f"{key or ''} {quoted_}".strip(), bool(star)) if quoted_.strip() else None

        word = match["word"]
        if word is None:
            return None
        if word in ("AND", "OR", "NOT", "ANDNOT", "ANDMAYBE"):
            return word
        if word[0] in "\"'" or re.match(r"[A-Za-z]+:[\"']", word):
            raise QueryError("a quote is not closed")
        key, colon, value = word.partition(":")
        known = self._filter_key(key) if colon and value else None
        if known:
            return Filter(known, value.rstrip("*"), True) if value.endswith("*") \
                else Filter(known, value)
        if colon and value and key.isidentifier():
            self.notes.append(f"'{key}:' is no filter; it was read as a word.")

        word = re.sub(r"\^[0-9.]*$", "", word)
        return Word(word.rstrip("*"), word.endswith("*") or is_last and self.open_end) \
            if re.search(r"\w", word) else None

    @staticmethod
    def _filter_key(key):
        key = _FILTER_SPELLINGS.get((key or "").lower(), (key or "").lower())
        return key if key in _FILTERS else None

    def _alternatives(self, tokens):
        parts = [self._all(tokens)]
        while tokens and tokens[0] == "OR":
            tokens.popleft()
            parts.append(self._all(tokens))
        if len(parts) > 1 and any(not part.parts for part in parts):
            raise QueryError("OR needs something on both sides")
        return Group("OR", tuple(parts)) if len(parts) > 1 else parts[0]

    def _all(self, tokens):
        parts, due = [], False
        while tokens and tokens[0] not in ("OR", ")"):
            token = tokens.popleft()
            if token in ("AND", "ANDNOT", "ANDMAYBE"):
                if due or not parts:
                    raise QueryError(f"{token} needs something on both sides")
                due = True
                if token == "ANDNOT":
                    parts.append(Group("NOT", (self._one(tokens),)))
                    due = False
                continue
            tokens.appendleft(token)
            parts.append(self._one(tokens))
            due = False
        if due:
            raise QueryError("the query ends too early")
        return Group("AND", tuple(parts))

    def _one(self, tokens):
        negated = False
        while tokens and tokens[0] == "NOT":
            tokens.popleft()
            negated = not negated
        if negated:
            return Group("NOT", (self._one(tokens),))
        if not tokens:
            raise QueryError("the query ends too early")
        token = tokens.popleft()
        if token == "(":
            inner = self._alternatives(tokens)
            if not tokens or tokens.popleft() != ")":
                raise QueryError("unbalanced brackets")
            return inner
        if isinstance(token, str):
            raise QueryError(f"{token} stands in a wrong place")
        return token

    def terms(self, kind, part=None, positive=True):
        """Yield the parts of a `kind` (Word or Filter) that must hold; not `positive`: must not."""
        part = self.tree if part is None else part
        if isinstance(part, Group):
            for inner in part.parts:
                yield from self.terms(kind, inner, positive != (part.operator == "NOT"))
        elif positive and isinstance(part, kind):
            yield part

    @property
    def is_empty(self):
        """Whether it has neither words nor filters."""
        return not any(True for kind in (Word, Filter) for wanted in (True, False)
                       for _ in self.terms(kind, positive=wanted))

    @property
    def name_parts(self):
        """The words and filters by which names can be looked up, if the query is nothing but a list
        of them; else None."""
        parts = self.tree.parts if self.tree.operator == "AND" else ()
        if not parts or any(
                isinstance(part, Group) or isinstance(part, Filter)
                and part.key not in ("name", "user", "index", "path") for part in parts):
            return None
        return parts


class Conditions:
    """A query's tree as an SQL condition on `p`, a project's row in `sdoc`, with its values."""

    def __init__(self, query, full_text):
        self.query, self.full_text, self.values = query, full_text, []
        self.kind, self.columns = None, _TEXT_COLUMNS
        types = [part.value.lower() for part in query.terms(Filter) if part.key == "type"]
        if types and types[-1] in _TYPES:
            self.kind, self.columns = _TYPES[types[-1]]
        self.sql = self._condition(query.tree)

    def _condition(self, part):
        if isinstance(part, Word):
            return self._word(part.text, part.prefix, self.columns, self.kind)
        if isinstance(part, Filter):
            return getattr(self, "_by_" + part.key)(part)
        inner = [self._condition(each) for each in part.parts]
        if len(inner) == 1 and part.operator != "NOT":
            return inner[0]
        if part.operator == "NOT":
            return f"NOT ({inner[0]})"
        return f" {part.operator} ".join(f"({each})" for each in inner) or "1"

    def _is(self, sql, *values):
        self.values += values
        return sql

    def _nothing(self, part):
        self.query.notes.append(f"{part.key}:{part.value} says nothing that is known here.")
        return "0"

    def _word(self, text, prefix, columns, kind):
        sql, values = text_match(text, prefix, columns, self.full_text)
        return self._is("p.id IN (SELECT sdoc.project FROM sfts JOIN sdoc ON sdoc.id = sfts.rowid "
                        f"WHERE {sql} AND coalesce(sdoc.kind = ?, 1))", *values, kind)

    def _facet(self, key, part, value):
        if part.prefix:
            return self._is("p.id IN (SELECT doc FROM sfacet "
                            "WHERE key = ? AND value >= ? AND value < ?)",
                            key, value, value + "\U0010ffff")
        return self._is("p.id IN (SELECT doc FROM sfacet WHERE key = ? AND value = ?)",
                        key, value)

    def _by_name(self, part):
        name = normalize(part.value)
        if part.prefix:
            return self._is("p.norm >= ? AND p.norm < ?", name, name + "\U0010ffff")
        return self._is("p.norm = ?", name)

    def _by_user(self, part):
        return self._is("p.user = ?", part.value)

    def _by_index(self, part):
        user, slash, name = part.value.rpartition("/")
        return self._is("p.user = ? AND p.idx = ?", user, name) if slash \
            else self._is("p.idx = ?", name)

    def _by_path(self, part):
        if part.prefix:
            return self._is("substr(p.path, 1, ?) = ?", len(part.value), part.value)
        return self._is("p.path = ?", part.value)

    def _by_version(self, part):
        if re.match(r"[<>=!~]", part.value):
            if not is_specifier(part.value + ("*" if part.prefix else "")):
                return self._nothing(part)
            return self._is("p.id IN (SELECT doc FROM sfacet "
                            "WHERE key = 'version' AND admits(?, value))",
                            part.value + ("*" if part.prefix else ""))
        return self._facet("version", part, part.value)

    def _by_classifier(self, part):
        return self._facet("classifier", part, part.value.casefold())

    def _by_keyword(self, part):
        return self._facet("keyword", part, part.value.casefold())

    def _by_import(self, part):
        return self._facet("import", part, part.value.casefold())

    def _by_license(self, part):
        return self._facet("license", part, part.value.casefold())

    def _by_requires(self, part):
        return self._facet("requires", part, normalize(part.value))

    def _by_author(self, part):
        return self._word(part.value, part.prefix, ("author",), "project") \
            if re.search(r"\w", part.value) else self._nothing(part)

    def _by_python(self, part):
        if parse_version(part.value) is None:
            return self._nothing(part)
        return self._is("admits_python(p.requires_python, ?)", part.value)

    def _by_has(self, part):
        return self._facet("has", part, part.value.lower()) \
            if part.value.lower() in ("docs", "tests", "wheel", "sdist") else self._nothing(part)

    def _by_is(self, part):
        return self._facet("is", part, part.value.lower()) \
            if part.value.lower() in ("yanked", "prerelease") else self._nothing(part)

    def _by_type(self, part):
        if part.value.lower() not in _TYPES:
            return self._nothing(part)
        return "p.id IN (SELECT project FROM sdoc WHERE kind = 'page')" if self.kind == "page" \
            else "1"

    def _by_uploaded(self, part):
        match = re.fullmatch(r"(<=|>=|<|>|=|)([0-9]{4}(-[0-9]{2}){0,2})", part.value)
        if not match:
            return self._nothing(part)
        return self._is(f"p.uploaded != '' AND substr(p.uploaded, 1, ?) {match[1] or '='} ?",
                        len(match[2]), match[2])


def text_match(text, prefix, columns, full_text):
    """(SQL condition on `sfts`, its values) for a word or phrase in some of its columns.

    The text never reaches FTS5's own grammar: it stands in double quotes, as one string."""
    if full_text:
        quoted_ = '"{}"{}'.format(text.replace('"', '""'), "*" if prefix else "")
        return "sfts MATCH ?", [f"{{{' '.join(columns)}}} : {quoted_}"]
    pattern = "%" + re.sub(r"([%_\\])", r"\\\1", text) + "%"
    return "(" + " OR ".join(f"sfts.{column} LIKE ? ESCAPE '\\'" for column in columns) + ")", \
        [pattern] * len(columns)


def search_backlog(db):
    """(number of projects in the queue, seconds for which the oldest has waited)."""
    count, since = db.execute("SELECT count(*), min(since) FROM search_queue").fetchone()
    return count, time.time() - since if count else 0


def search_complaints(seconds):
    """The `Complaint`s about a search index that is so many seconds behind."""
    if seconds > Limits.search_warn:
        yield Complaint("fatal" if seconds > Limits.search_fatal else "warn",
                        f"the search index is {seconds / 60:.0f} minutes behind")


class SearchIndex(Part):
    """The search database, and the thread that works through the queue."""

    def __init__(self, store, indexes, releases, blobs, settings):
        self.store, self.indexes, self.releases, self.blobs = store, indexes, releases, blobs
        self.path = os.path.join(settings.serverdir, "search.db")
        self.place = read_only_uri(self.path, immutable=True)       # on read-only media
        self.full_text = settings.full_text and self._has_fts5()
        self.error = ""
        self.lost = False           # the database file was deleted or damaged while we run
        self.idle_readers = []
        self.writer = self._open()

    def loops(self):
        if not self.store.read_only:
            yield "search index", self.run

    def gauges(self):
        projects, seconds = self._backlog()
        yield Gauge("devpi_lite_search_queue", "gauge",
                    "Projects that the search index has to look at.", projects)
        yield Gauge("devpi_lite_search_queue_seconds", "gauge",
                    "For how long the oldest of them waits.", round(seconds, 3))

    def complaints(self):
        _, seconds = self._backlog()
        yield from search_complaints(seconds)
        if self.error:
            yield Complaint("warn", "the search index failed, see the log")

    def _backlog(self):
        with self.store.read() as db:
            return search_backlog(db)

    @staticmethod
    def _has_fts5():
        with contextlib.closing(sqlite3.connect(":memory:")) as db:
            try:
                db.execute("CREATE VIRTUAL TABLE probe USING fts5(x)")
            except sqlite3.OperationalError:
                log.warning("this Python's SQLite has no FTS5: search is by LIKE, without ranking")
                return False
        return True

    def _connect(self):
        read_only = self.store.read_only
        db = sqlite3.connect(self.place if read_only else self.path, timeout=Limits.busy,
                             isolation_level=None, check_same_thread=False, uri=read_only)
        db.row_factory = sqlite3.Row
        if not read_only:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = OFF")      # what a power cut takes can be made again
        db.create_function("admits_python", 2, admits_python, deterministic=True)
        db.create_function("admits", 2, admits, deterministic=True)
        return db

    def _open(self):
        """The database; made anew if missing, damaged, another server's, or of another form."""
        form = 2 if self.full_text else 102
        db, reason = None, ""

        try:
            if self.store.read_only:
                refuse_unfolded(self.path)
            db = self._connect()
            if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'owner'").fetchone() \
                    and db.execute("SELECT value FROM owner").fetchone()["value"] \
                    == self.store.node["uuid"] \
                    and db.execute("PRAGMA user_version").fetchone()[0] == form:
                return db
        except (sqlite3.DatabaseError, FatalError) as error:
            reason = f": {error}"
            if not self.store.read_only:
                log.warning("the search database is made anew%s", reason)
        if db is not None:
            db.close()
        if self.store.read_only:
            self.error = ("nothing is found, for there is no search index in the read-only "
                          f"directory{reason}")
            log.warning("%s", self.error)
            self.place = f"file:devpi_lite-{secrets.token_hex(8)}?mode=memory&cache=shared"
        else:
            for ending in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path + ending)
        db = self._connect()
        db.execute("BEGIN")
        run_script(db, SEARCH_SCHEMA)
        columns = ", ".join(_TEXT_COLUMNS)
        db.execute(f"CREATE VIRTUAL TABLE sfts USING fts5({columns}, "
                   "tokenize = 'unicode61 remove_diacritics 2', prefix = '2 3')"
                   if self.full_text else f"CREATE TABLE sfts ({columns})")
        db.execute("CREATE TABLE owner (value TEXT NOT NULL)")
        db.execute("INSERT INTO owner VALUES (?)", (self.store.node["uuid"],))
        db.execute(f"PRAGMA user_version = {form}")
        db.execute("COMMIT")
        self.store.write(_queue_everything, durable=False)
        return db

    @contextlib.contextmanager
    def read(self):
        """A connection for reading. QueryTimeout if a query takes longer than `Limits.search_time`;
        Busy if the database was deleted or damaged: it is then made anew."""
        db = None
        try:
            try:
                db = self.idle_readers.pop()
            except IndexError:
                db = self._connect()

            until = time.monotonic() + Limits.search_time
            db.set_progress_handler(lambda: time.monotonic() > until, 10000)
            yield db
        except sqlite3.DatabaseError as error:
            if "interrupted" in str(error):
                raise QueryTimeout from error
            if self._is_lost(error):
                self._lose(error)
                raise Busy("the search index is being made anew", 5) from error
            raise
        finally:
            if db is not None:
                db.set_progress_handler(None, 0)
                if self.lost:
                    db.close()
                else:
                    self.idle_readers.append(db)

    @staticmethod
    def _is_lost(error):
        """Whether the error means that the database was deleted or damaged.

        It is DatabaseError itself then, no subclass of it, or is about a missing table."""
        return type(error) is sqlite3.DatabaseError or "no such table" in str(error)

    def _lose(self, error):
        log.error("the search database is unusable: %s", error)
        self.lost = True
        self.store.signals["search"].set()

    def _reopen(self):
        """Make the database anew after it was deleted or damaged."""
        self.writer.close()
        while self.idle_readers:
            self.idle_readers.pop().close()
        self.writer = self._open()
        self.lost = False

    def close(self):
        """Fold the write-ahead log into the database, so that a copy of the file is whole."""
        if self.lost or self.store.read_only:
            return
        try:
            with contextlib.closing(self._connect()) as db:
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as error:      # nothing is lost: the next start reads the log
            log.warning("the search index's write-ahead log was not folded in: %s", error)

    # -- keeping up

    def run(self):
        """A loop for a thread: works through the queue."""
        ready = self.store.signals["search"]
        while not self.store.closed:
            try:
                if self.lost:
                    self._reopen()
                while self._work():
                    pass
            except Busy as problem:
                log.info("search index: %s", problem.message)
            except Exception as error:      # this thread has to live on
                log.exception("the search index failed")
                self.error = reason_of(error)

            ready.wait(Limits.search_pause)
            until = time.monotonic() + 3
            while ready.is_set() and time.monotonic() < until:      # more comes: take it together
                ready.clear()
                ready.wait(0.05)

    def _work(self):
        """Bring a batch of the queue into the index; returns whether any of it is done."""
        with self.store.read() as db:
            batch = db.execute("SELECT * FROM search_queue ORDER BY since LIMIT 200").fetchall()
        if not batch or self.lost or self.store.closed:
            return False
        done = []
        for row in batch:
            began = time.thread_time()
            try:
                if self._write_entry(row["index_id"], row["project"]):
                    done.append(tuple(row))
            except NoSpace:
                break
            if self.lost:
                break
            time.sleep(min(1, time.thread_time() - began))      # half a core: requests come first
        self.store.write(_dequeue, done, durable=False)
        return bool(done)

    def _write_entry(self, index_id, project):
        """Index one project, in a transaction of its own: its failure must not hold up others.

        Returns whether the project is done with, or must be tried again; NoSpace if the disk is
        full."""
        try:
            self.writer.execute("BEGIN IMMEDIATE")
            self._update_project(index_id, project)
            self.writer.execute("COMMIT")
            self.error = ""
        except Exception as error:
            if self.writer.in_transaction:
                self.writer.execute("ROLLBACK")
            if self._is_lost(error):
                self._lose(error)
                return False

            self.error = reason_of(error)
            if isinstance(error, sqlite3.OperationalError):
                if "full" in self.error or "disk I/O" in self.error:
                    log.error("the search index waits for room on the disk: %s", self.error)
                    raise NoSpace(self.error) from error
                log.error("project %s of index %d can't be indexed yet: %s",
                          one_line(project, 200), index_id, self.error)
                return False
            log.exception("project %s of index %d can't be indexed",
                          one_line(project, 200), index_id)
        return True

    def _update_project(self, index_id, project):
        """Make the rows of one project of an index say what is there now; without a project, delete
        the rows of deleted indexes."""
        if not project:
            known = json.dumps([index.id for index in self.indexes.all()])
            gone = self.writer.execute(
                "SELECT id FROM sdoc WHERE index_id NOT IN (SELECT value FROM json_each(?))",
                (known,))
            self._forget([row["id"] for row in gone])
            return

        with self.store.read() as db:
            found = _project_to_index(db, index_id, project)
        rows = self.writer.execute(
            "SELECT id, kind, version, docs FROM sdoc WHERE index_id = ? AND norm = ?",
            (index_id, project)).fetchall()
        before = next((row for row in rows if row["kind"] == "project"), None)
        docs = found.docs if found else None
        same_docs = before is not None and docs is not None \
            and before["docs"] == f"{docs.version} {docs.sha256}"
        self._forget([row["id"] for row in rows if not (same_docs and row["kind"] == "page")])
        if found is None:
            return

        row_id = self._enter(found, "project", f"/{found.user}/{found.index}/{project}",
                             found.texts, before["id"] if before else None)
        self.writer.executemany("INSERT OR IGNORE INTO sfacet VALUES (?, ?, ?)",
                                [(key, value, row_id) for key, value in found.facets])
        if docs and not same_docs:
            self._enter_pages(
                found, f"/{found.user}/{found.index}/{project}/{docs.version}/+doc", row_id)

    def _enter_pages(self, found, address, project_row):
        """Enter the pages of a project's documentation, as far as they can be read."""
        try:
            for path, title, body in doc_pages(self.blobs, self.releases, found.docs):
                self._enter(found, "page", f"{address}/{path}", {"title": title, "body": body},
                            project_row=project_row)
        except (Problem, OSError, ValueError, zlib.error) as error:
            log.error("the documentation at %s can't be read: %s", one_line(address), error)

    def _enter(self, found, kind, path, texts, row_id=None, project_row=None):
        """Insert a row and its texts; returns its id."""
        cursor = self.writer.execute(
            "INSERT INTO sdoc (id, kind, project, index_id, user, idx, norm, name, version, path, "
            "title, summary, requires_python, uploaded, docs) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (row_id, kind, project_row or 0, found.index_id, found.user, found.index, found.norm,
             found.name, found.version, path, sound(texts.get("title", "")),
             sound(texts.get("summary", "")), found.requires_python, found.uploaded,
             f"{found.docs.version} {found.docs.sha256}" if found.docs else None))
        if project_row is None:
            self.writer.execute("UPDATE sdoc SET project = id WHERE id = ?", (cursor.lastrowid,))
        self.writer.execute(
            f"INSERT INTO sfts (rowid, {', '.join(_TEXT_COLUMNS)}) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (cursor.lastrowid, *(sound(texts.get(column, "")) for column in _TEXT_COLUMNS)))
        return cursor.lastrowid

    def _forget(self, ids):
        for row_id in ids:
            self.writer.execute("DELETE FROM sfts WHERE rowid = ?", (row_id,))
            self.writer.execute("DELETE FROM sfacet WHERE doc = ?", (row_id,))
            self.writer.execute("DELETE FROM sdoc WHERE id = ?", (row_id,))

    # -- finding

    def find(self, query, index_ids, sort="relevance"):
        """The projects that a `Query` finds in some indexes, as [(row of `sdoc`, score), ...].

        Best first, unless `sort` says otherwise. Adds to the query's notes."""
        conditions = Conditions(query, self.full_text)
        sql = ("SELECT p.* FROM sdoc AS p WHERE p.kind = 'project' "
               "AND p.index_id IN (SELECT value FROM json_each(?)) "
               f"AND ({conditions.sql}) LIMIT ?")
        words = list(query.terms(Word))
        try:
            with self.read() as db:
                rows = db.execute(sql, (json.dumps(index_ids), *conditions.values,
                                        Limits.search_hits)).fetchall()
                scores = self._scores(db, words, conditions) if rows and words else {}
        except QueryTimeout as problem:
            query.notes.append(f"{problem.message[0].upper()}{problem.message[1:]}.")
            return []
        if len(rows) == Limits.search_hits:
            query.notes.append(f"Only {Limits.search_hits} projects were looked at.")

        names = {normalize(word.text) for word in words} \
            | {normalize(" ".join(word.text for word in words))}
        ranked = [(row, self._score(row["norm"], names, scores.get(row["id"], 0)))
                  for row in rows]
        if sort == "name":
            ranked.sort(key=lambda pair: (pair[0]["norm"], pair[0]["path"]))
        elif sort == "-uploaded":
            ranked.sort(key=lambda pair: pair[0]["uploaded"], reverse=True)
        else:
            ranked.sort(key=lambda pair: (-pair[1], pair[0]["norm"], pair[0]["path"]))
        return ranked

    @staticmethod
    def _score(norm, names, relevance):
        """Ranks the exact name first, then names that begin with one of `names`, then by relevance,
        which is below 1000."""
        if norm in names:
            return 2000 + relevance
        return 1000 * any(name and norm.startswith(name) for name in names) + relevance

    def _scores(self, db, words, conditions):
        """{project row: relevance}, by the columns in which one of the words stands.

        Not FTS5's bm25: its figures show how often a word occurs in all that is indexed, in hidden
        indexes too."""
        scores = collections.Counter()
        for column in set(_WEIGHTS).intersection(conditions.columns):
            matches = [text_match(word.text, word.prefix, (column,), self.full_text)
                       for word in words]
            condition = " OR ".join(f"sfts.rowid IN (SELECT rowid FROM sfts WHERE {sql})"
                                    for sql, _ in matches)
            values = [value for _, found in matches for value in found]
            scores.update({row["project"]: _WEIGHTS[column] for row in db.execute(
                "SELECT DISTINCT sdoc.project FROM sfts JOIN sdoc ON sdoc.id = sfts.rowid "
                f"WHERE {condition} LIMIT ?", (*values, 10 * Limits.search_hits))})
        return scores

    def pages(self, query, project_ids):
        """{project row: [(title, path), ...]} of documentation with one of a query's words."""
        words = [text_match(word.text, word.prefix, _TEXT_COLUMNS, True)[1][0]
                 for word in query.terms(Word)]
        found = {}
        if words and self.full_text:
            with self.read() as db:
                for row in db.execute(
                        "SELECT sdoc.project, sdoc.title, sdoc.path FROM sfts "
                        "JOIN sdoc ON sdoc.id = sfts.rowid "
                        "WHERE sfts MATCH ? AND sdoc.kind = 'page' "
                        "AND sdoc.project IN (SELECT value FROM json_each(?)) "
                        "ORDER BY rank LIMIT 200",
                        (" OR ".join(f"({word})" for word in words), json.dumps(project_ids))):
                    found.setdefault(row["project"], []).append((row["title"], row["path"]))
        return found

    def names(self, start, index_ids, limit):
        """Names of projects that begin with `start`, each once."""
        with self.read() as db:
            return [row["name"] for row in db.execute(
                "SELECT min(name) AS name FROM sdoc "
                "WHERE kind = 'project' AND norm >= ? AND norm < ? "
                "AND index_id IN (SELECT value FROM json_each(?)) "
                "GROUP BY norm ORDER BY norm LIMIT ?",
                (start, start + "\U0010ffff", json.dumps(index_ids), limit))]

    def by_fields(self, fields, operator, index_ids):
        """The hits of XML-RPC's `search`, as rows of `sdoc`.

        `fields`: {name: [value, ...]}; a field matches if one of its values does."""
        parts, values = [], []
        for field, wanted in fields.items():
            one = []
            for value in wanted:
                if field == "name":
                    one.append("instr(p.norm, ?) > 0")
                    values.append(normalize(value.strip()).strip("-") or "\0")
                else:
                    sql, found = text_match(value, True, RPC_COLUMNS[field], self.full_text)
                    one.append(f"p.id IN (SELECT sfts.rowid FROM sfts WHERE {sql})")
                    values += found
            if one:
                parts.append(f"({' OR '.join(one)})")

        if not parts:
            return []
        with self.read() as db:
            return db.execute(
                "SELECT p.* FROM sdoc AS p WHERE p.kind = 'project' "
                "AND p.index_id IN (SELECT value FROM json_each(?)) "
                f"AND ({f' {operator.upper()} '.join(parts)}) LIMIT ?",
                (json.dumps(index_ids), *values, Limits.search_hits)).fetchall()


# Fields of XML-RPC's `search`, and the columns that they search; other fields are ignored.
RPC_COLUMNS = {
    "name": ("name",), "summary": ("summary",), "description": ("body",),
    "keywords": ("keywords",), "classifiers": ("classifiers",),
    **dict.fromkeys(("author", "author_email", "maintainer", "maintainer_email"), ("author",))}


def _queue_everything(change):
    change.execute("INSERT OR IGNORE INTO search_queue SELECT index_id, name, ? FROM projects",
                   (time.time(),))
    change.wake("search")


def _dequeue(change, batch):
    """Take a batch off the queue, but not projects that were queued again at a later time."""
    change.executemany(
        "DELETE FROM search_queue WHERE index_id = ? AND project = ? AND since = ?", batch)


@dataclasses.dataclass(frozen=True)
class SearchEntry:
    """What the search index holds of a project."""
    index_id: int
    user: str
    index: str
    norm: str
    name: str
    version: str
    requires_python: str | None
    uploaded: str
    texts: dict
    facets: list
    docs: File | None


def _project_to_index(db, index_id, project):
    """The `SearchEntry` of a stage's project; None if it no longer exists, or has no releases."""
    row = db.execute(
        "SELECT projects.id, status, users.name AS user, indexes.name AS idx, config FROM projects "
        "JOIN indexes ON indexes.id = index_id JOIN users ON users.id = user_id "
        "WHERE index_id = ? AND projects.name = ?", (index_id, project)).fetchone()
    if row is None or json.loads(row["config"])["type"] == "mirror":
        return None
    versions = [r["version"] for r in db.execute(
        "SELECT version FROM releases WHERE project_id = ?", (row["id"],))]
    if not versions:
        return None

    files = select_files(db, "WHERE project_id = ?", row["id"])
    own = {version: [] for version in versions}
    for file in files:
        if file.kind == "releasefile":
            own.setdefault(file.version, []).append((None, file))
    version = latest_version(own)

    index = Index(index_id, row["user"], row["idx"], json.loads(row["config"]))
    metadata = {}
    for release in releases_of(db, index, project, version)[:1]:
        metadata = release.whole_metadata(db)
    docs = max((file for file in files if file.kind == "doczip"),
               key=lambda file: version_key(file.version), default=None)
    if Status.of(row["status"]).withholds_files:
        docs = None
    python = metadata.get("requires_python") or next(
        (file.requires_python for _, file in own.get(version, ()) if file.requires_python), "")

    return SearchEntry(
        index_id, row["user"], row["idx"], project, metadata.get("name") or project, version,
        python[:200] or None, max((file.uploaded for file in files), default=""),
        _texts_of(project, metadata), _facets_of(metadata, versions, version, files), docs)


def _texts_of(project, metadata):
    """The texts of a release's metadata by column, each cut to what a person would read."""
    name = (metadata.get("name") or project)[:200]
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", name)
    spellings = dict.fromkeys((name, project, project.replace("-", " "), project.replace("-", ""),
                               " ".join(words)))
    people = ((metadata.get(field) or "")[:1000]
              for field in ("author", "author_email", "maintainer", "maintainer_email"))
    return {"name": " ".join((*spellings, *_import_names(metadata))),
            "summary": (metadata.get("summary") or "")[:1000],
            "keywords": (metadata.get("keywords") or "")[:1000], "author": " ".join(people),
            "classifiers": " ".join(metadata.get("classifiers") or ())[:10000],
            "body": (metadata.get("description") or "")[:Limits.indexed_text]}


def _import_names(metadata):
    """The names under which a release is imported (PEP 794), without the mark of private names."""
    names = (*(metadata.get("import_name") or ()), *(metadata.get("import_namespace") or ()))[:100]
    plain = (name.partition(";")[0].strip()[:200] for name in names)
    return list(dict.fromkeys(filter(None, plain)))


def _facets_of(metadata, versions, version, files):
    """Yield (key, value) of all that filters can match in a project.

    The bounds are above what an honest project has."""
    for each in versions:
        yield "version", each
    for classifier in (metadata.get("classifiers") or ())[:500]:
        yield "classifier", classifier[:200].casefold()
    for name in _import_names(metadata):
        yield "import", name.casefold()

    keywords = (metadata.get("keywords") or "")[:10000]
    for keyword in keywords.split("," if "," in keywords else None)[:200]:
        yield "keyword", keyword.strip()[:200].casefold()
    for text in (metadata.get("license") or "", metadata.get("license_expression") or ""):
        text = text[:200].casefold()
        for part in (text, *re.split(r"[^a-z0-9.+-]+", text)):
            if part and part not in ("or", "and", "with"):
                yield "license", part

    for requirement in (metadata.get("requires_dist") or ())[:1000]:
        match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]{0,199})", requirement)
        if match:
            yield "requires", normalize(match[1])

    flags = {"doczip": "docs", "toxresult": "tests"}
    for file in files:
        kind = flags.get(file.kind) or {"whl": "wheel", "gz": "sdist"}.get(
            file.filename.rpartition(".")[2].lower())
        if kind:
            yield "has", kind
        if file.yanked is not None:
            yield "is", "yanked"

    if version and not is_final(version):
        yield "is", "prerelease"


# -- documentation pages


_SKIPPED = {"script", "style", "nav", "header", "footer", "template"}
_INLINE = {"a", "abbr", "b", "code", "em", "i", "kbd", "mark", "s", "small", "span", "strong",
           "sub", "sup", "tt", "u", "wbr"}
_PAGE_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9-]{0,30})(?![A-Za-z0-9-])[^<>]*>")
_CLOSING = {name: re.compile(f"</{name}", re.IGNORECASE) for name in (*_SKIPPED, "title")}


def page_text(page):
    """(title, text) of an HTML page, without what repeats on every page.

    Takes linear time for any page: `html.parser` takes hours over a megabyte of unclosed tags. A
    skipped element that is never closed ends the reading."""
    pieces, title, at = [], "", 0
    while at is not None:
        start = page.find("<", at)
        if start < 0:
            pieces.append(page[at:])
            break
        pieces.append(page[at:start])

        tag = _PAGE_TAG.match(page, start)
        if page.startswith("<!--", start):
            end = page.find("-->", start)
            at = end + 3 if end >= 0 else None
        elif tag is None:
            pieces.append("<")
            at = start + 1
        else:
            name, at = tag[2].lower(), tag.end()
            if name not in _INLINE:
                pieces.append(" ")
            if name in _CLOSING and not tag[1]:
                closing = _CLOSING[name].search(page, at)
                if name == "title" and closing and not title:
                    title = page[at:closing.start()][:1000]
                at = closing.start() if closing else None
    return tuple(re.sub(r"\s+", " ", unescaped(text)).strip() for text in (title, "".join(pieces)))


_UNINDEXED = re.compile(r"(.*/)?(genindex[^/]*|search|py-modindex|np-modindex)\.(html|fjson)"
                        r"|(.*/)?(_modules|_sources|_static)/.*")


def doc_pages(blobs, releases, docs):
    """Yield (path, title, text) of the pages of a documentation zip that are worth finding."""
    members = releases.doc_members(
        docs.sha256, "(path LIKE '%.html' OR path LIKE '%.fjson') ORDER BY number")
    wanted = [member for member in members
              if not _UNINDEXED.fullmatch(member.path)][:Limits.indexed_pages]
    with blobs.open(docs.sha256, docs.size) as file:
        for member in wanted:
            began = time.thread_time()
            title, text = _page_text(file, member)
            yield member.path, title, text
            time.sleep(min(1, time.thread_time() - began))


def _page_text(file, member):
    """(title, text) of a page; of a large page only the beginning is read."""
    data = b""
    for piece in member_bytes(file, member):
        data += piece
        if len(data) > Limits.indexed_page:
            break
    text, title = data[:Limits.indexed_page].decode("utf-8", "replace"), ""
    if member.path.endswith(".fjson"):
        try:
            content = json.loads(text, parse_int=bounded_int)
            title, text = str(content.get("title", "")), str(content.get("body", ""))
        except (ValueError, AttributeError, RecursionError):
            return "", ""
    found_title, text = page_text(text)
    return unescaped(title or found_title)[:300], text[:Limits.indexed_text]


# ==================================================================================================
# 16  HTTP messages
#
# Requests and responses as bytes: heads and their framing, bodies, forms, content negotiation,
# ranges, and the form of errors for each kind of client. What a client sends is checked here before
# anything else uses it.
# ==================================================================================================


HTML = "text/html; charset=UTF-8"


_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROLS = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,40}) ([!-~\x80-\xff]+) "
                           rb"HTTP/([0-9])\.([0-9])")
_HOST = r"(?:[A-Za-z0-9._~%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
_HOST_HEADER, _SCHEME = re.compile(_HOST), re.compile("https?", re.IGNORECASE)
_BASE_URL = re.compile(r"https?://" + _HOST + r"(/[A-Za-z0-9._~:@!$&'()*+,;=%/-]*)?")
_PREFIX = re.compile(r"/[A-Za-z0-9._~:@!$&'()*+,;=%/-]*")
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,6})[ \t]*\r\n", re.IGNORECASE)
BLANK_LINES = re.compile(rb"(?:\r\n)*")
BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")
_ONCE = {"host", "content-length", "transfer-encoding", "authorization", "x-devpi-auth",
         "content-type", "range"}


class BadHead(Problem):
    """A request whose framing can't be trusted; the connection is closed after the response."""
    status = 400


def header_title(name):
    """A header's name in its usual capitals."""
    return re.sub("(?<=-)(Ip|Url)(?=-|$)", lambda match: match[0].upper(), name.title())


def parse_header(line):
    """A header or trailer line as (lower-case name, value), both bytes; BadHead if malformed."""
    name, colon, value = line.partition(b":")
    if not colon or not _TOKEN.fullmatch(name) or _CONTROLS.search(value):
        raise BadHead(f"malformed header line {one_line(line[:80].decode('latin-1'))!r}")
    return name.lower(), value.strip(b" \t")


def parse_head(data):
    """(method, target, (major, minor), {lower-case name: value}) of a request's head.

    `data`: the bytes up to the blank line. Strict (RFC 9112): BadHead for a head that two parsers
    might frame differently."""
    first, *lines = data.split(b"\r\n")
    match = _REQUEST_LINE.fullmatch(first)
    if not match:
        raise BadHead(f"malformed request line {one_line(first[:80].decode('latin-1'))!r}")
    method, target, major, minor = match.groups()
    if major != b"1":
        raise BadHead("only HTTP/1.0 and HTTP/1.1 are spoken here", 505)
    if len(lines) > Limits.headers:
        raise BadHead(f"more than {Limits.headers} header lines", 431)

    headers = {}
    for line in lines:
        name, value = parse_header(line)
        name, value = name.decode("ascii"), value.decode("latin-1")
        if name in headers:
            if name in _ONCE:
                raise BadHead(f"more than one {name} header")
            value = f"{headers[name]}, {value}"
        headers[name] = value

    version = (1, int(minor))
    _check_framing(version, headers)
    return method.decode("ascii"), target.decode("latin-1"), version, headers


def _check_framing(version, headers):
    """BadHead for a head from which two parsers might read different bodies or hosts."""
    if "transfer-encoding" in headers:
        if "content-length" in headers:
            raise BadHead("both Content-Length and Transfer-Encoding")
        coding = headers["transfer-encoding"].lower()
        if coding != "chunked" or version == (1, 0):
            raise BadHead(f"can't read Transfer-Encoding {one_line(coding, 60)!r} here",
                          501 if re.fullmatch(r"[a-z]+", coding) and coding != "chunked" else 400)
    if not re.fullmatch(r"[0-9]{1,18}", headers.get("content-length", "0")):
        raise BadHead(f"malformed Content-Length {one_line(headers['content-length'], 60)!r}")
    if not re.fullmatch(_HOST + "|", headers.get("host", "")) \
            or version >= (1, 1) and "host" not in headers:
        raise BadHead("missing or malformed Host header")


# -- negotiation

_INSTALLER = re.compile(r"([^ ]* )*(distribute|setuptools|pip|pex|uv)/.*")


def is_installer(user_agent_text):
    """Whether a User-Agent is an installer's.

    Installers get the simple page on an index's or project's own URL."""
    return _INSTALLER.match(user_agent_text[:500]) is not None


# (media type on offer, format of the response), in the order that decides ties
_SIMPLE_OFFERS = (("text/html", "text/html"), (SIMPLE_HTML, SIMPLE_HTML),
                  (SIMPLE_JSON, SIMPLE_JSON),
                  ("application/vnd.pypi.simple.latest+html", SIMPLE_HTML),
                  ("application/vnd.pypi.simple.latest+json", SIMPLE_JSON))


@functools.lru_cache(maxsize=1000)
def simple_format(accept, query_format=""):
    """The format of the response (PEP 691): text/html, SIMPLE_HTML or SIMPLE_JSON.

    text/html if no format fits, or all fit equally."""
    for offer, answer in _SIMPLE_OFFERS:
        if query_format == offer:
            return answer
    ranges = accept_ranges(accept)
    # max() gives the first of equals
    best = max(_SIMPLE_OFFERS, key=lambda offer: _quality(offer[0], ranges))
    return best[1] if _quality(best[0], ranges) > 0 else "text/html"


def accept_ranges(accept):
    """An Accept header (RFC 9110, section 12.5.1) as {media range: quality}.

    Malformed items are left out."""
    ranges = {}
    for item in accept.split(",")[:100]:
        media, *parameters = [part.strip().lower() for part in item.split(";")]
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                quality = float(parameter[2:]) if re.fullmatch(
                    r"(0(\.\d{0,3})?|1(\.0{0,3})?)", parameter[2:]) else None
        if re.fullmatch(r"[a-z0-9!#$&^_.+*-]+/[a-z0-9!#$&^_.+*-]+", media) and quality is not None:
            ranges.setdefault(media, quality)
    return ranges


def _quality(offer, ranges):
    for candidate in (offer, offer.partition("/")[0] + "/*", "*/*"):
        if candidate in ranges:
            return ranges[candidate]
    return 0


# -- sending

_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)
UNIX_FAMILY = getattr(socket, "AF_UNIX", None)
UNIX_PEER = "127.0.0.1"     # the address of all clients of the unix socket


def wait_for(sock, event, seconds, owner):
    """Whether a socket becomes readable or writable within `seconds`.

    If too many workers wait already, in all or for this owner, the wait is at most
    `Limits.slow_client` seconds."""
    with _Selector() as selector, outside_wait(owner) as room:
        selector.register(sock, event)
        return bool(selector.select(seconds if room else min(seconds, Limits.slow_client)))


class LazyPart:
    """A part of a response, `length` bytes, which `read()` yields in pieces.

    Each piece is read when the client has received the one before it."""

    def __init__(self, length, read):
        self.length, self.read, self.pieces = length, read, None

    def next(self):
        """The next piece; None at the end; OSError if it can't be read."""
        if self.pieces is None:
            self.pieces = self.read()
        try:
            return next(self.pieces, None)
        except (Problem, sqlite3.Error) as error:
            log.warning("a response broke off: %s", reason_of(error))
            raise OSError("a response broke off") from error


class Outgoing:
    """Byte strings, FileParts and LazyParts to send in order on a non-blocking socket.

    A worker sends while the client keeps up; the front sends the rest to a slow client."""

    def __init__(self, pieces):
        self.pieces = collections.deque()
        self.sent = 0               # number of bytes
        self.is_lazy = any(isinstance(piece, LazyPart) for piece in pieces)
        self.since = time.monotonic()
        for piece in pieces:
            if isinstance(piece, FilePart):
                if piece.length:
                    self.pieces.append(piece)
                else:
                    piece.file.close()
            elif isinstance(piece, LazyPart):
                self.pieces.append(piece)
            elif piece:
                self.pieces.append(memoryview(piece))

    def send_some(self, sock):
        """Make one system call to send; returns whether something is left.

        BlockingIOError if the socket takes nothing now."""
        while self.pieces and isinstance(self.pieces[0], LazyPart):
            piece = self.pieces[0].next()
            if piece is None:
                self.pieces.popleft()
            else:
                self.pieces.appendleft(memoryview(piece))
        if self.pieces:
            if isinstance(self.pieces[0], FilePart):
                self._send_file(sock, self.pieces[0])
            else:
                self._send_bytes(sock)
        return bool(self.pieces)

    def _send_bytes(self, sock):
        pieces = list(itertools.takewhile(lambda piece: isinstance(piece, memoryview), self.pieces))
        self.advance(sock.sendmsg(pieces) if hasattr(sock, "sendmsg") else sock.send(pieces[0]))

    def advance(self, sent):
        """Drop the first `sent` bytes of the byte strings at the head: they are sent."""
        self.sent += sent
        while sent:
            piece = self.pieces.popleft()
            if sent < len(piece):
                self.pieces.appendleft(piece[sent:])
                return
            sent -= len(piece)

    def _send_file(self, sock, part):
        if hasattr(os, "sendfile"):
            sent = os.sendfile(sock.fileno(), part.file.fileno(), part.offset,
                               min(part.length, 1 << 20))
        else:
            part.file.seek(part.offset)
            sent = sock.send(part.file.read(min(part.length, 256 << 10)))
        if not sent and part.length:
            raise OSError("a file became shorter while it was sent")

        self.sent += sent
        part.offset += sent
        part.length -= sent
        if not part.length:
            part.file.close()
            self.pieces.popleft()

    def send(self, sock, patience, time_limit=None, owner=None):
        """Send all that is left; returns whether the client took it.

        False if it takes nothing for `patience` seconds, or not all within `time_limit` seconds."""
        until = time.monotonic() + time_limit if time_limit else float("inf")
        while self.pieces:
            if time.monotonic() > until:
                return False
            try:
                self.send_some(sock)
            except (BlockingIOError, InterruptedError):
                if not wait_for(sock, selectors.EVENT_WRITE, patience, owner):
                    return False
        return True

    @property
    def in_memory(self):
        """The byte strings still to send, each whole even if partly sent.

        A cache may hold the same ones."""
        return [piece.obj for piece in self.pieces if isinstance(piece, memoryview)]

    @property
    def is_too_slow(self):
        """Whether the client takes less than `Limits.slowest_response` bytes a second.

        False for the first `Limits.stall` seconds."""
        late = time.monotonic() - self.since - Limits.stall
        return late > 0 and self.sent < late * Limits.slowest_response

    def slowness(self, now):
        """A sort key: the response to drop first, when memory is short, comes first.

        First those older than `Limits.pending_grace`, the slowest client first; then the others,
        the largest first."""
        age = now - self.since
        is_young = age < Limits.pending_grace
        return is_young, 0 if is_young else self.sent / age, -sum(map(len, self.in_memory))

    def close(self):
        for piece in self.pieces:
            if isinstance(piece, FilePart):
                piece.file.close()
        self.pieces.clear()


class Body:
    """A request's body, read in pieces, by Content-Length or chunked (RFC 9112, section 7.1).

    TooLarge if it has more than `limit` bytes, BadHead if it is malformed or too slow."""

    def __init__(self, connection, version, headers, limit):
        self.connection, self.limit = connection, limit
        self.chunked = "transfer-encoding" in headers
        self.left = None if self.chunked else int(headers.get("content-length", "0"))
        self.announced = self.left
        self.received = 0
        self.began = time.monotonic()
        self.ended = self.left == 0
        self.expects = (headers.get("expect", "").lower() == "100-continue"
                        and not self.ended and version >= (1, 1))
        self.chunk_left = 0
        self.peeked = b""           # bytes already read, which `read` returns again
        self.patience = Limits.stall

    def check_limit(self):
        if (self.announced or self.received) > self.limit:
            raise TooLarge(f"the body is larger than {self.limit} bytes")

    def narrow(self, limit):
        """Lower the limit to `limit` bytes; TooLarge if the body has more."""
        self.limit = min(self.limit, limit)
        self.check_limit()

    def read(self, size=256 << 10):
        """Up to `size` bytes; b"" at the end of the body."""
        if self.peeked:
            data, self.peeked = self.peeked, b""
            return data
        if self.ended:
            return b""
        self.check_limit()
        if self.expects:
            self.expects = False
            self.connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")

        data = self._read_chunk(size) if self.chunked else self._take(min(size, self.left))
        self.received += len(data)
        if not self.chunked:
            self.left -= len(data)
            self.ended = self.left == 0
        self.check_limit()
        return data

    def begins_with(self, start):
        """Whether the body begins with `start`, after white space; consumes nothing."""
        if not self.peeked:
            self.peeked = self.read()
        return self.peeked.lstrip().startswith(start)

    def _take(self, size):
        """The next bytes: at least one, at most `size`."""
        connection = self.connection
        if not connection.buffer:
            self._receive()
        data, connection.buffer = connection.buffer[:size], connection.buffer[size:]
        return data

    def _receive(self):
        """Receive more bytes into the connection's buffer."""
        spent = time.monotonic() - self.began
        if spent > Limits.stall and self.received < (spent - Limits.stall) * Limits.slowest_body:
            raise BadHead("the request's body comes too slowly", 408)
        data = self.connection.receive(self.patience)
        if not data:
            raise BadHead("the connection was closed inside the request's body")
        self.connection.buffer += data

    def _line(self):
        """The next line of the chunked framing, without its CRLF."""
        connection = self.connection
        while True:
            line, found, rest = connection.buffer.partition(b"\n")
            if found:
                if not line.endswith(b"\r"):
                    raise BadHead("malformed chunk")
                connection.buffer = rest
                return line[:-1]
            if len(line) > 4096:
                raise BadHead("malformed chunk")
            self._receive()

    def _read_chunk(self, size):
        if not self.chunk_left:
            match = re.fullmatch(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[\t\x20-\x7e\x80-\xff]*)?",
                                 self._line())
            if not match:
                raise BadHead("malformed chunk")
            self.chunk_left = int(match[1], 16)
            if not self.chunk_left:
                for _ in range(Limits.headers):
                    trailer = self._line()
                    if not trailer:
                        self.ended = True
                        return b""
                    parse_header(trailer)
                raise BadHead("malformed trailer")

        data = self._take(min(size, self.chunk_left))
        self.chunk_left -= len(data)
        if not self.chunk_left and self._line():
            raise BadHead("malformed chunk")
        return data

    def read_all(self, limit):
        """The whole body; TooLarge if it has more than `limit` bytes."""
        pieces, size = [], 0
        while True:
            piece = self.read()
            if not piece and self.ended:
                return b"".join(pieces)
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise TooLarge(f"the body is larger than {limit} bytes")
            if time.monotonic() - self.began > Limits.stall:
                raise BadHead("the request's body comes too slowly", 408)

    def drain(self):
        """Read the rest, so that the next request can follow; returns whether it is all read.

        A large or slow rest is not worth it: see `Limits.drained_body`, `Limits.drain_time`."""
        if self.expects:
            return self.ended

        self.limit = max(self.limit, Limits.drained_body)
        began = time.monotonic()
        self.patience = 2
        left = Limits.drained_body
        if (self.left or 0) > left:
            return False

        try:
            while not self.ended and left > 0 and time.monotonic() - began < Limits.drain_time:
                left -= len(self.read())
        except Problem as problem:      # the response that follows says more
            log.debug("drained no further: %s", problem.message)
            return False
        return self.ended


@dataclasses.dataclass
class Response:
    """A response. Its body is one of three:

    - `body`: bytes;
    - `parts`: a list of byte strings, FileParts and LazyParts;
    - `stream`: yields byte strings, perhaps a FilePart at the end; `length` bytes in all, sent in
      chunks if that is None.

    A response with `tags` may be kept and sent again until `expires` (time.monotonic(); 0: without
    end): see `Freshness`."""
    status: int = 200
    headers: list = dataclasses.field(default_factory=list)
    body: bytes = b""
    reason: str = ""
    parts: list | None = None
    stream: typing.Iterable | None = None
    length: int | None = None
    tags: frozenset | None = None
    expires: float = 0

    def content_length(self):
        """The size of the body in bytes; None if it is known only at the end."""
        if self.stream is not None:
            return self.length
        if self.parts is not None:
            return sum(len(part) if isinstance(part, bytes) else part.length for part in self.parts)
        return len(self.body)


# browsers must take an upload's type as we state it (Fetch standard)
NOSNIFF = ("X-Content-Type-Options", "nosniff")
# of responses that may depend on the user
PERSONAL = [("Cache-Control", "private, no-cache"), NOSNIFF]


def json_response(content, status=200, headers=()):
    """Any JSON as a response. A LazyPart in it stands for a value that is JSON already.

    The type has no charset: the devpi client compares it as a whole. Caches must ask again: the
    content may depend on X-Devpi-Auth, which they don't know."""
    raws = []
    text = json.dumps(content, separators=(", ", ": "), default=functools.partial(_put_aside, raws))
    headers = [("Content-Type", "application/json"), *PERSONAL, *headers]
    if not raws:
        return Response(status, headers, text.encode() + b"\n")
    parts = _with_raw_parts(text, raws)
    if sum(raw.length for raw in raws) > Limits.streamed:
        return Response(status, headers, parts=parts)
    return Response(status, headers, b"".join(
        part if isinstance(part, bytes) else b"".join(part.read()) for part in parts))


_RAW_MARK = secrets.token_hex(16)       # no client knows it, so no text can hold it


def _put_aside(raws, value):
    raws.append(value)
    return f"{_RAW_MARK}{len(raws) - 1}"


def _with_raw_parts(text, raws):
    """A JSON text as parts of a response, with the LazyParts in place of their marks."""
    parts = []
    for part, raw in itertools.zip_longest(re.split(f'"{_RAW_MARK}[0-9]+"', text), raws):
        parts.append(part.encode())
        if raw is not None:
            parts.append(raw)
    return [*parts, b"\n"]


def result_response(type_, result, status=200, message=None):
    """devpi's envelope [W2.3]."""
    content = {"type": type_, "result": result}
    if message:
        content["message"] = message
    return json_response(content, status)


def message_response(message, status=200):
    return json_response({"message": message}, status)


def redirect(location):
    return Response(302, [("Location", location), ("Content-Type", "text/plain; charset=utf-8")],
                    b"")


def problem_response(problem, accept, kind):
    """A Problem as a response; the route's kind and the client's Accept decide its form [W3].

    `kind`: "json" is always the envelope; "page" is HTML unless Accept names JSON; "upload" is
    plain text unless Accept names HTML or JSON, with the message as the reason phrase, where twine
    and devpi look for it."""
    status, message, kind = problem.status, problem.message, problem.form or kind
    reason = reason_phrase(status)
    if kind == "upload" and message:
        # scripts look for the reason phrase of 401 and 403
        reason = one_line(f"{reason}: {message}" if status in (401, 403) else message)
    if kind == "json" or "application/json" in accept:
        content = {"message": message, "code": f"{status} {reason}", "title": reason}
        response = json_response(content, status)
    elif kind == "page" or "text/html" in accept:
        title = html.escape(f"{status} {reason_phrase(status)}")
        response = Response(status, [("Content-Type", HTML)], (
            f"<!DOCTYPE html><html><head><title>{title}</title></head><body><h1>{title}</h1>"
            f"<p>{html.escape(message)}</p></body></html>\n").encode("utf-8", "replace"))
    else:
        response = Response(status, [("Content-Type", "text/plain; charset=utf-8")],
                            (message + "\n").encode("utf-8", "replace"))

    if kind != "json" and "application/json" not in accept:
        response.headers += PERSONAL
    response.reason = reason
    response.headers += problem.headers
    return response


@contextlib.contextmanager
def problems_as_json():
    """Problems inside have the form JSON, whatever the route's kind: devpi has it so for the files
    that a mirror fetches."""
    try:
        yield
    except Problem as problem:
        problem.form = "json"
        raise


@functools.lru_cache(maxsize=256)
def _is_own_host(host, outside_name):
    """Whether a Host header names this machine or --outside-url's host, or has no dot.

    A stranger can't own a name without a dot."""
    name = re.sub(r":[0-9]*$", "", host).strip("[]").rstrip(".").lower()
    return "." not in name or name.endswith(".localhost") or name == outside_name \
        or ip_of(name) is not None


class kept_property:
    """A property that is computed once for each object.

    functools.cached_property holds one lock for all objects up to Python 3.11: while one password
    was hashed, all other requests waited for their user."""

    def __init__(self, function):
        self.function, self.name, self.__doc__ = function, function.__name__, function.__doc__

    def __get__(self, instance, owner=None):
        if instance is None:
            return self
        value = instance.__dict__[self.name] = self.function(instance)
        return value


def authority(host, port):
    """`host:port` as it stands in URLs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(text):
    """Whether a text is a loopback address."""
    ip = ip_of(text)
    return ip is not None and ip.is_loopback


class Request:
    """A request as endpoints see it."""

    def __init__(self, app, connection, method, target, version, headers, raw_head):
        self.app, self.connection, self.method, self.headers = app, connection, method, headers
        self.version, self.raw_head, self.target = version, raw_head, target
        self.body = Body(connection, version, headers, app.settings.max_request_body_size)
        self.began = time.monotonic()
        self.moment = app.store.freshness.moment()      # before anything is read: see Freshness
        self.serial = app.store.serial
        self.errors = "json"
        self.path, self.query = "/", {}
        self.claimed = 0            # bytes of memory: see `claim`
        connection.owner = connection.address
        self.index_path = ""        # user/name of what the path names as an index, see `dispatch`

    def path_in(self, uri):
        """The path below our root that another URI names, decoded as this request's own."""
        inner = copy.copy(self)
        inner.target = uri
        inner.resolve_target()
        return inner.path

    def resolve_target(self):
        """Decode the target to `path`, without the outside URL's path prefix, and `query`."""
        target = self.target
        if not target.startswith("/"):
            match = re.match(r"https?://[^/?#]*", target, re.IGNORECASE)
            if not match:
                raise BadHead(f"unknown request target {one_line(target, 80)!r}")
            target = target[match.end():] or "/"

        path, _, query = target.partition("?")
        if path.startswith("//"):
            path = "/" + path.lstrip("/")
        try:
            self.path = urllib.parse.unquote_to_bytes(path.encode("latin-1")).decode("utf-8")
        except UnicodeDecodeError:
            raise BadRequest("the path is not UTF-8") from None

        prefix = urllib.parse.urlsplit(self.base_url).path
        if prefix and (self.path == prefix or self.path.startswith(prefix + "/")):
            self.path = self.path[len(prefix):] or "/"

        if query:
            try:
                pairs = urllib.parse.parse_qsl(query, keep_blank_values=True, max_num_fields=100)
            except ValueError as error:
                raise BadRequest(f"malformed query: {reason_of(error)}") from None
            self.query = {key: value for key, value in reversed(pairs)}

    def refuse_foreign_host(self):
        """Refuse a foreign Host, if only this machine can reach the server (DNS rebinding).

        A web page may let its own name mean 127.0.0.1: its origin is then the server's, and it can
        send any header. Nobody can do that with an address, or with a name without a dot, which
        strangers can't own."""
        if self.app.is_private and not _is_own_host(self.header("host"), self.app.outside_name) \
                and self.connection.sock.family != UNIX_FAMILY:
            name = one_line(self.header("host"), 100)
            raise Misdirected(
                f"this server, which only this machine can reach, is not called {name}: "
                f"--outside-url http://{name} would give it that name")

    def refuse_foreign_page(self):
        """Refuse changes by a web page of another origin, with its reader's credentials.

        Uploaded documentation is such a page. Only browsers send Origin, and they always do (Fetch
        standard)."""
        origin = self.headers.get("origin")
        if origin is None or self.method in ("GET", "HEAD"):
            return

        host = self.header("host")
        # a proxy may speak TLS
        own = [origin_of(url) for url in (self.base_url, f"http://{host}", f"https://{host}")]
        try:
            if origin_of(origin) in own:
                return
        except ValueError:
            pass
        raise Forbidden(f"a page of {one_line(origin, 100)} may not do this here")

    def header(self, name):
        return self.headers.get(name, "")

    @property
    def accept(self):
        return self.headers.get("accept", "")

    @kept_property
    def address(self):
        """The client's address: that of the connection, or from a trusted proxy's header.

        Only --real-ip-header counts: a proxy passes other headers on as the client sent them."""
        name = self.app.settings.real_ip_header
        said = self.header(name)
        if not said:
            if "x-forwarded-for" in self.headers and self.connection.trusted:
                self.app.warn_once(
                    self.connection.address, "X-Forwarded-For from %s is not looked at: "
                    "--real-ip-header X-Forwarded-For would make it the client's address",
                    self.connection.address)
            return self.connection.address

        if not self.connection.trusted:
            self.app.ignored_header(self.connection.address, name, said)
            return self.connection.address

        ip = forwarded_ip(said)
        if ip is None:
            self.app.ignored_header(self.connection.address, name, said, "it is no address")
            return self.connection.address
        return str(ip)

    @kept_property
    def is_local(self):
        """Whether the client is on this machine, as far as proxies tell.

        A proxy that names the client in a header that does not count hides another machine."""
        counts = self.app.settings.real_ip_header
        hidden = any(
            name in self.headers and name != counts
            and (counts not in self.headers
                 or not is_loopback(self.header(name).rpartition(",")[2].strip()))
            for name in ("x-real-ip", "x-forwarded-for", "forwarded"))
        return is_loopback(self.address) and not hidden

    @kept_property
    def base_url(self):
        """The start of absolute links, without final slash.

        It comes from the first of: X-Outside-URL of a trusted peer; --outside-url;
        X-Forwarded-Proto, -Host and -Prefix of a trusted peer; Host."""
        outside = self._forwarded("x-outside-url", _BASE_URL)
        if outside or self.app.settings.outside_url:
            return outside.rstrip("/") or self.app.settings.outside_url

        scheme = self._forwarded("x-forwarded-proto", _SCHEME).lower() or "http"
        host = (self._forwarded("x-forwarded-host", _HOST_HEADER) or self.header("host")
                or self.app.address_text)
        prefix = self._forwarded("x-forwarded-prefix", _PREFIX).rstrip("/")
        return f"{scheme}://{re.sub(':443$' if scheme == 'https' else ':80$', '', host)}{prefix}"

    def _forwarded(self, name, pattern):
        """The value of a trusted peer's header; "" if there is none, or if it does not fit.

        Of several values in an X-Forwarded header the last is the peer's own."""
        said = self.header(name)
        if not said:
            return ""
        if not self.connection.trusted:
            self.app.ignored_header(self.connection.address, name, said)
            return ""

        value = said.rpartition(",")[2].strip() if name.startswith("x-forwarded-") else said
        if not pattern.fullmatch(value):
            self.app.ignored_header(self.connection.address, name, said, "it is malformed")
            return ""
        return value

    @kept_property
    def identity(self):
        """The user, from X-Devpi-Auth if it can be read, else from Basic credentials [W5.4, W5.5].

        Busy if the password can't be checked now."""
        credentials = (decode_credentials(self.header("x-devpi-auth"))
                       if "x-devpi-auth" in self.headers else None)
        if credentials is None:
            scheme, _, text = self.header("authorization").partition(" ")
            credentials = decode_credentials(text) if scheme.lower() == "basic" else None
        if credentials is None:
            return NOBODY

        try:
            identity = self.app.logins.check(*credentials, self.address)
            self.connection.owner = identity.user or self.connection.owner
            return identity
        except Busy:
            # for the response that says so, and for its line in the access log
            self.__dict__["identity"] = NOBODY
            raise

    def recheck_identity(self):
        """After half a second, forget the identity: its next use checks it again.

        The user may be deleted by then, or the password changed."""
        if time.monotonic() - self.began > 0.5:
            self.__dict__.pop("identity", None)

    @property
    def known_user(self):
        """The name for the access log; None for nobody, or if no password can be checked now."""
        with contextlib.suppress(Busy):
            return self.identity.user if self.has_credentials else None

    @property
    def actor(self):
        """The user and the address, as a change records and announces them."""
        outside_url = self.app.settings.outside_url
        return Actor(self.identity.user, self.address, outside_url,
                     outside_url or f"http://{self.app.address_text}")

    def write(self, function, *args):
        """Run a change as this request's actor: see `Store.write`."""
        return self.app.store.write(function, *args, actor=self.actor)

    @property
    def has_credentials(self):
        return "authorization" in self.headers or "x-devpi-auth" in self.headers

    def refuse(self, problem):
        """Raise `problem`; TooManyLogins (429) if the credentials were not checked at all."""
        if self.identity.wait:
            raise TooManyLogins(self.identity.wait)
        if self.has_credentials and self.identity.user is None:
            problem.message += (" (the user name or password that came along is wrong, "
                                "or the login has ended)")
            # the devpi client takes this as a sign that its login has ended, and says so
            if "devpi-client" in self.header("user-agent"):
                problem.status = 401
                problem.headers.append(("Location", self.url("+login")))
        raise problem

    @kept_property
    def claims(self):
        return contextlib.ExitStack()

    def claim(self, size):
        """Claim `size` more bytes of the memory that large work shares; Busy if none come free.

        The claim ends when the response is sent, or left to the front."""
        if size > Limits.unclaimed:
            self.claims.close()             # a request that waits for more holds nothing meanwhile
            self.claimed += size
            self.claims.enter_context(bulk.claim(self.claimed, self.identity.user or self.address))

    def release_claims(self):
        if "claims" in self.__dict__:
            self.claims.close()

    def json(self, *shapes, limit=Limits.json_body):
        """The body as JSON, of one of the types in `shapes`.

        BadRequest if it is of another, TooLarge over `limit` bytes or `Limits.json_marks`."""
        self.body.narrow(limit)
        data = self.body.read_all(limit)
        # each of these may take 100 bytes when parsed
        if sum(map(data.count, (b",", b"[", b"{"))) > Limits.json_marks:
            raise TooLarge("the JSON in the body holds too many values")

        try:
            content = json.loads(data.decode("utf-8"), parse_int=bounded_int)
            _check_json(content)
        except (ValueError, RecursionError):
            raise BadRequest("Bad request: could not decode json") from None

        if not isinstance(content, shapes):
            expected = " or ".join({dict: "an object", list: "a list"}[shape] for shape in shapes)
            raise BadRequest(f"Bad request: expected {expected} as JSON body, "
                             f"got {type(content).__name__}")
        return content

    @property
    def is_installer(self):
        return is_installer(self.header("user-agent"))

    @property
    def simple_format(self):
        """The format of the simple API that the client prefers (PEP 691)."""
        query_format = self.query.get("format", "").replace(" ", "+")
        return simple_format(self.accept[:1000], query_format)

    def result_version(self):
        """The version of a result that the caller wants: 1, or 2 for devpi 7's words [W8.10]."""
        text = self.query.get("v", "1")
        if not re.fullmatch(r"\s*[+-]?[0-9]{1,9}\s*", text, re.ASCII):
            raise BadRequest("The requested result version must be an integer, "
                             f"got {text[:100]!r}")
        if int(text) not in (1, 2):
            raise BadRequest(f"The requested result version must be 1 to 2, got {int(text)}")
        return int(text)

    @property
    def content_type(self):
        return self.header("content-type").partition(";")[0].strip().lower()

    @property
    def is_browser(self):
        return "text/html" in self.accept

    def url(self, path):
        """The absolute URL of a path below our root; `path` has no leading slash."""
        return f"{self.base_url}/{quoted(path)}"


def _check_json(content):
    """ValueError for deep nesting, NaN, infinity and lone surrogates: they can't be stored."""
    level = [content]
    for _ in range(Limits.json_depth):
        level = inner_values(level)
        if not level:
            break
    else:
        raise ValueError("nested too deeply")
    json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8")


def blob_response(request, index, content, type_, tags):
    """A blob, or one range of it, as an immutable response with validators (RFC 9110)."""
    etag, validators = blob_validators(index, content.sha256)
    if none_match(request.header("if-none-match"), etag):
        return Response(304, validators, tags=tags)

    file = request.app.blobs.open(content.sha256, content.size)
    size = os.fstat(file.fileno()).st_size
    headers = [("Content-Type", type_), NOSNIFF, ("Last-Modified", content.last_modified),
               *validators, ("Accept-Ranges", "bytes")]
    return ranged_response(request, headers, etag, file, 0, size, tags)


def blob_validators(index, sha256):
    """(ETag, headers) of a blob, whose bytes never change."""
    etag = f'"{sha256}"'
    cache = f"max-age=365000000, immutable, {'private' if index.restricted else 'public'}"
    return etag, [("ETag", etag), ("Cache-Control", cache)]


def ranged_response(request, headers, etag, file, offset, size, tags):
    """`size` bytes of an open file from `offset` on, or the range of them that a request names.

    The response closes the file."""
    status, start, end = chosen_range(request, headers, etag, size)
    if end - start <= Limits.small_file and request.method != "HEAD":
        with file:
            file.seek(offset + start)
            return Response(status, headers, file.read(end - start),
                            tags=tags if status != 416 else None)
    return Response(status, headers, parts=[FilePart(file, offset + start, end - start)])


def chosen_range(request, headers, etag, size):
    """(status, start, end) of what to send of `size` bytes (RFC 9110, section 14).

    `headers` is changed: it gets Content-Range; for 416 only the headers of that response stay."""
    wanted = None
    last_modified = dict(headers).get("Last-Modified")
    if request.method in ("GET", "HEAD") \
            and request.header("if-range") in ("", etag, last_modified):
        wanted = parse_range(request.header("range"), size)

    if wanted == "unsatisfiable":
        headers[:] = [("Content-Range", f"bytes */{size}"), ("Accept-Ranges", "bytes"),
                      ("Content-Type", "text/plain; charset=utf-8")]
        return 416, 0, 0
    if wanted is None:
        return 200, 0, size
    headers.append(("Content-Range", f"bytes {wanted[0]}-{wanted[1] - 1}/{size}"))
    return 206, *wanted


def none_match(header, etag):
    """Whether If-None-Match names this ETag (weak comparison)."""
    return header.strip() == "*" \
        or etag in (tag.strip().removeprefix("W/") for tag in header.split(","))


def parse_range(header, size):
    """(start, end) of a Range header with one range; "unsatisfiable"; None to send the whole."""
    match = re.fullmatch(r"(?i:bytes)=\s*(\d{0,100})-(\d{0,100})\s*", header)
    if not match or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first and last and int(last) < int(first):
        return None

    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    return (start, end) if start < end else "unsatisfiable"


def parts_response(request, headers, etag, parts):
    """Byte strings and whole files (given by path), one after the other, as one response."""
    headers.append(("ETag", etag))
    if none_match(request.header("if-none-match"), etag):
        return Response(304, [(n, v) for n, v in headers if n in ("ETag", "Cache-Control", "Vary")])

    for position, part in enumerate(parts):
        if isinstance(part, str):
            file = open(part, "rb")
            parts[position] = FilePart(file, 0, os.fstat(file.fileno()).st_size)
    return Response(200, headers, parts=parts)


def form_boundary(parameters):
    """The boundary (bytes) of a multipart form's Content-Type; BadRequest without one."""
    match = re.search(r"""(?:^|;)\s*boundary=(?:"([^"]{1,200})"|([^\s;"]{1,200}))""",
                      parameters, re.IGNORECASE)
    if not match:
        raise BadRequest("the multipart form names no boundary")
    return (match[1] or match[2]).encode("latin-1")


class UploadForm:
    """Reads a multipart form in pieces (RFC 7578): the part `content` goes to an incoming blob.

    `fields()` has the other fields once the form is read; `size` is their size in bytes."""

    def __init__(self, incoming):
        self.incoming = incoming
        self.filename = None
        self.taken = []             # (name, Spool)
        self.size = self.parts = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for _, field in self.taken:
            field.__exit__()

    def fields(self):
        """{name: [value, ...]}; BadRequest for what is not UTF-8."""
        fields = {}
        for name, field in self.taken:
            try:
                fields.setdefault(name, []).append(field.value().decode("utf-8"))
            except UnicodeDecodeError:
                raise BadRequest(f"the field {one_line(name, 60)!r} is not UTF-8") from None
        return fields

    def read(self, body, boundary):
        """Read all parts. BadRequest if the form is malformed, TooLarge over its limits."""
        delimiter = b"\r\n--" + boundary
        buffer = b"\r\n" + body.read()      # no line stands before the first boundary
        while True:                         # skip the preamble
            start = buffer.find(delimiter)
            if start >= 0:
                buffer = buffer[start + len(delimiter):]
                break
            buffer = self._more(body, buffer[-len(delimiter):])

        while True:
            while len(buffer) < 2:
                buffer = self._more(body, buffer)
            if buffer.startswith(b"--"):
                break

            while b"\r\n\r\n" not in buffer:
                if len(buffer) > Limits.part_head:
                    raise BadRequest("a part of the form has too long a head")
                buffer = self._more(body, buffer)
            head, _, buffer = buffer.partition(b"\r\n\r\n")
            if len(head) > Limits.part_head:
                raise BadRequest("a part of the form has too long a head")

            self.size += len(head)
            if self.size > Limits.form_fields:
                raise TooLarge(f"the form's fields are larger than {Limits.form_fields} bytes")
            buffer = self._part(head, buffer, body, delimiter)

        while body.read():
            pass        # skip the epilogue

    @staticmethod
    def _more(body, buffer):
        piece = body.read()
        if not piece:
            raise BadRequest("the multipart form ends before its last boundary")
        return buffer + piece

    def _part(self, head, buffer, body, delimiter):
        """Read one part; returns the bytes received after its delimiter."""
        name, filename = _disposition(head)
        self.parts += 1
        if self.parts > Limits.form_parts:
            raise BadRequest(f"the form has more than {Limits.form_parts} parts")

        if name == "content":
            if filename is None:
                raise BadRequest("content file field not found")
            if self.filename is not None:
                raise BadRequest("the form has two parts named 'content'")
            self.filename = filename
            take = self.incoming.write
        elif filename is not None:      # gpg_signature
            take = len
        else:
            self.taken.append((name, Spool(self.incoming.blobs)))
            take = self._take_field

        while True:
            start = buffer.find(delimiter)
            if start >= 0:
                take(buffer[:start])
                return buffer[start + len(delimiter):]
            if len(buffer) > len(delimiter):        # the buffer may end inside a delimiter
                take(buffer[:-len(delimiter)])
                buffer = buffer[-len(delimiter):]
            buffer = self._more(body, buffer)

    def _take_field(self, data):
        name, field = self.taken[-1]
        field.write(data)
        self.size += len(data)
        if field.size > Limits.form_field:
            raise TooLarge(
                f"the field {one_line(name, 60)!r} is larger than {Limits.form_field} bytes")
        if self.size > Limits.form_fields:
            raise TooLarge(f"the form's fields are larger than {Limits.form_fields} bytes")


@functools.lru_cache(maxsize=256)       # all forms have the same fields
def _disposition(head):
    """(name, filename or None) of a part's Content-Disposition; BadRequest without a name."""
    lines = head.lstrip(b" \t").split(b"\r\n")
    if lines[0]:
        raise BadRequest("malformed boundary in the multipart form")

    for line in lines[1:]:
        field, _, value = line.partition(b":")
        if field.strip().lower() == b"content-disposition":
            try:
                text = value.decode("utf-8")
            except UnicodeDecodeError:
                raise BadRequest("a part's Content-Disposition is not UTF-8") from None
            if text.partition(";")[0].strip().lower() != "form-data":
                break

            found = {key.lower(): re.sub(r'\\(["\\])', r"\1", quoted_) or plain
                     for key, quoted_, plain in re.findall(
                         r';\s*([A-Za-z*]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))', text)}
            if "filename*" in found:
                charset, _, encoded = found["filename*"].partition("''")
                if charset.lower() == "utf-8":
                    found["filename"] = urllib.parse.unquote(encoded)
            if found.get("name"):
                return found["name"], found.get("filename")
    raise BadRequest("a part of the multipart form has no name")


# ==================================================================================================
# 17  The front
#
# Connections and their workers. The main thread runs one loop over all connections that are between
# requests: it gathers a head, sends a ready response, or else hands the connection to a worker. An
# idle or slow client costs a file descriptor, not a thread.
# ==================================================================================================


class Connection:
    """A client's connection, owned by the front or by one worker; its socket never blocks."""
    __slots__ = ("sock", "address", "owner", "trusted", "ready_responses", "buffer", "scanned",
                 "pending", "held", "closing", "broken", "draining", "allowance", "since",
                 "deadline")

    def __init__(self, sock, address, trusted, answers):
        self.sock, self.address, self.trusted, self.ready_responses = \
            sock, address, trusted, answers
        self.owner = address        # for the count of waits: the user, once known
        self.buffer = b""           # bytes received and not used yet
        self.scanned = 0            # length of its start in which the front found no end of a head
        self.pending = None         # an Outgoing that the front has still to send
        self.held = ()              # the byte strings of `pending` that are in memory
        self.closing = False        # close once `pending` is sent
        self.broken = False         # a response broke off: reset, so that nobody takes it for whole
        self.draining = None        # our side is closed: number of bytes that may still come
        self.allowance = Limits.drained_body    # the first value of `draining`
        self.since = time.monotonic()
        self.deadline = self.since + Limits.keep_alive

    def receive(self, patience):
        """More bytes, in a worker; b"" at the end. BadHead (408) after `patience` seconds."""
        while True:
            try:
                return self.sock.recv(256 << 10)
            except (BlockingIOError, InterruptedError):
                if not wait_for(self.sock, selectors.EVENT_READ, patience, self.owner):
                    raise BadHead("the request comes too slowly", 408) from None

    def send(self, *pieces):
        """Send byte strings; OSError if the client does not take them."""
        if not Outgoing(pieces).send(self.sock, Limits.stall, Limits.stall, self.owner):
            raise TimeoutError("the client takes nothing")


# -- the access log


_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "PUSH", "OPTIONS"}


class AccessLog(Part):
    """Writes one line a request to standard output, and counts requests.

    A line has time, level, [req<n>], method and path, status, ms, bytes, user, address. The thread
    that sends a response makes its line; another thread only writes lines. If that one made them,
    40,000 at a time, the front would wait for the interpreter's lock (p99 of the hot path: 31 ms
    against 4)."""

    def __init__(self, enabled):
        self.enabled = enabled
        self.lines = collections.deque(maxlen=200000)
        self.numbers = itertools.count(1)
        self.stamp = (0, "")                    # (second, its text)
        self.counts = {}            # of workers: {(method, status): [requests, seconds]}
        self.front_counts = {}      # of the front, which needs no lock
        self.complained = -60                   # time.monotonic() of the last logged failure
        self.lock = threading.Lock()

    def loops(self):
        yield "access log", self.run

    def gauges(self):
        totals = self.totals()
        yield Gauge("devpi_lite_requests_total", "counter", "Requests answered.",
                    [("", {"method": method, "code": code}, count)
                     for (method, code), (count, _) in sorted(totals.items())])
        yield Gauge("devpi_lite_request_seconds", "summary",
                    "Time from a request's head to its answer.",
                    [("_sum", {}, round(sum(seconds for _, seconds in totals.values()), 6)),
                     ("_count", {}, sum(count for count, _ in totals.values()))])

    def add(self, what, status, began, size, user, address):
        """Log and count a response that a worker sent."""
        seconds = time.monotonic() - began
        if self.enabled:
            self.lines.append(self._line(what, status, seconds, size, user, address))
        with self.lock:
            self._count(self.counts, what, status, seconds)

    def add_ready(self, what, status, began, size, user, address):
        """Log and count a response that the front sent."""
        seconds = time.monotonic() - began
        if self.enabled:
            self.lines.append(self._line(what, status, seconds, size, user, address))
        self._count(self.front_counts, what, status, seconds)

    def _line(self, what, status, seconds, size, user, address):
        now = int(time.time())
        second, stamp = self.stamp
        if second != now:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
            self.stamp = (now, stamp)
        return (f"{stamp} INFO  [req{next(self.numbers)}] {what} {status} {seconds * 1000:.1f}ms "
                f"{size} {user or '-'} {address}\n")

    @staticmethod
    def _count(counts, what, status, seconds):
        """Count a response; all unknown methods count as one, so that `counts` is bounded."""
        method = what[:what.index(" ")]
        key = (method, status) if method in _METHODS else ("other", status)
        entry = counts.get(key)
        if entry is None:
            entry = counts[key] = [0, 0.0]
        entry[0] += 1
        entry[1] += seconds

    def totals(self):
        """{(method, status): (requests, seconds)}."""
        totals = {}
        for counts in (self.counts, self.front_counts):
            for key, (count, seconds) in tuple(counts.items()):
                before = totals.get(key, (0, 0.0))
                totals[key] = (before[0] + count, before[1] + seconds)
        return totals

    def flush(self):
        """Write the lines made so far."""
        lines = []
        with contextlib.suppress(IndexError):
            while True:
                lines.append(self.lines.popleft())

        text = "".join(lines)
        if text:
            try:
                sys.stdout.write(text)
                sys.stdout.flush()
            except Exception as error:
                # a full disk may have room again; a reader that is gone or a closed file
                # (ValueError) does not come back
                number = getattr(error, "errno", None)
                is_gone = number in (errno.EPIPE, errno.EBADF) or sys.stdout.closed
                self.enabled = not is_gone
                if is_gone or time.monotonic() - self.complained > 60:
                    self.complained = time.monotonic()
                    log.error("standard output %s: %s", "is gone, no more access log" if is_gone
                              else "takes no access log now", reason_of(error))

    def run(self):
        while True:
            time.sleep(0.25)
            self.flush()


def visible(target):
    """A request target for a log line: bounded, without control characters and credentials."""
    return one_line(re.sub(r"//[^/@?]*@", "//", target), 500)


def without_blank_lines(buffer):
    """Received bytes without the blank lines before a request (RFC 9112, section 2.2)."""
    return buffer[BLANK_LINES.match(buffer).end():]


def _small_body(head):
    """The size of a body that is small enough for the front to gather; 0 for any other.

    A guess: errors of the head are found when it is parsed."""
    lengths = CONTENT_LENGTH.findall(head)
    if len(lengths) != 1 or int(lengths[0]) > Limits.gathered_body:
        return 0
    head = head.lower()
    return 0 if b"100-continue" in head or b"transfer-encoding" in head else int(lengths[0])


class ReadyResponse(typing.NamedTuple):
    """A kept response, ready to send but for Date and serial, which go between head and body."""
    head: bytes
    body: bytes
    what: str
    status: int
    user: str | None
    address: str


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the requests in a connection's buffer, in a worker thread; then gives it back."""

    protocol_version = "HTTP/1.1"

    def setup(self):
        self.connection = self.request      # socketserver's request is a Connection here
        self.keep = False
        self.until = time.monotonic() + Limits.pipelined

    def finish(self):
        self.server.give_back(self.connection, self.keep)

    def handle_one_request(self):
        """Respond to the request whose head is in the buffer.

        `handle` calls this again while `close_connection` is false: for `Limits.pipelined` seconds,
        if the next request is already in the buffer (pipelining). Then the connection goes back to
        the front, open if `keep` is true."""
        connection, app = self.connection, self.server.app
        self.close_connection = True
        raw, blank, rest = connection.buffer.partition(b"\r\n\r\n")

        request = None
        try:
            if not blank or len(raw) > Limits.head:
                if len(raw) > Limits.head:
                    raise BadHead(f"the request's head is larger than {Limits.head} bytes", 431)
                if raw.startswith(b"\x16\x03"):
                    app.warn_once(
                        connection.address, "%s speaks TLS to this port, which speaks plain HTTP: "
                        "its URL has to begin with http://, or a proxy with TLS has to stand in "
                        "front (gen-config nginx)",
                        connection.address)
                    raise BadHead("this port speaks plain HTTP: the URL has to begin with "
                                  "http://, not https://")
                raise BadHead("malformed request head")

            connection.buffer = rest
            request = Request(app, connection, *parse_head(raw), raw + blank)
            response = app.respond(request)
            complete = request.body.ended \
                or response.status != TooLarge.status and request.body.drain()
            persistent = complete and self._wants_keep_alive(request) \
                and not self.server.stopping
            self.keep = self._send(request, response, persistent)
        except BadHead as problem:
            self._refuse(request, problem)
        except OSError as error:
            log.debug("connection to %s broke: %s", connection.address, error)
            self.keep = False
        finally:
            if request is not None:
                request.release_claims()

        if self.keep and connection.pending is None:
            connection.buffer = without_blank_lines(connection.buffer)
            if b"\r\n\r\n" in connection.buffer and time.monotonic() < self.until:
                self.close_connection = self.keep = False

    def _refuse(self, request, problem):
        """Respond to a malformed request, and close: where the next one begins is unknown."""
        self.connection.allowance = Limits.head
        try:
            self._send(request, problem_response(problem, "", "upload"), False)
        except OSError as error:
            log.debug("connection to %s broke: %s", self.connection.address, error)

    @staticmethod
    def _wants_keep_alive(request):
        wish = request.header("connection").lower()
        return "close" not in wish if request.version >= (1, 1) else "keep-alive" in wish

    def _send(self, request, response, persistent):
        """Send a response; returns whether the connection may serve another request after it.

        If the client is slow, the front sends the rest: `connection.pending`."""
        app = self.server.app
        silent = response.status in (204, 304) or request is not None and request.method == "HEAD"
        length = response.content_length()
        chunked = length is None and request is not None and request.version >= (1, 1)
        persistent = persistent and (length is not None or chunked)
        head = self._head(request, response, persistent, length, chunked) + app.constant_headers
        variable = app.variable_headers(request.serial if request else app.store.serial)

        if silent:
            Outgoing(response.parts or ()).close()
            self._send_or_leave(Outgoing([head, variable]))
        elif response.stream is None:
            outgoing = Outgoing([head, variable, *(response.parts or [response.body])])
            if outgoing.is_lazy:
                request.release_claims()
            self._send_or_leave(outgoing)
        else:
            request.release_claims()    # a stream is produced only as fast as the client reads
            try:
                persistent = self._send_stream(
                    response.stream, head + variable, length, chunked) and persistent
            except Problem as problem:      # before the first byte: respond with the problem
                return self._send(request, problem_response(problem, request.accept,
                                                            request.errors), persistent)

        if request is not None:
            ready = ReadyResponse(head, b"" if silent else response.body,
                                  f"{request.method} {visible(request.target)}", response.status,
                                  request.known_user, request.address)
            app.access_log.add(ready.what, ready.status, request.began, length or 0, ready.user,
                               ready.address)
            if response.tags is not None and persistent and response.parts is None \
                    and response.stream is None:
                self._keep_ready(request, response, ready)
        return persistent

    @staticmethod
    def _head(request, response, persistent, length, chunked):
        """Status line and headers, without those that all responses have and those that vary."""
        lines = [f"HTTP/1.1 {response.status} {response.reason or reason_phrase(response.status)}"]
        lines += [f"{name}: {value}" for name, value in response.headers]
        if response.status != 304:
            lines.append(f"Server: devpi_lite/{__version__}")
        if response.status not in (204, 304):
            if length is not None:
                lines.append(f"Content-Length: {length}")
            elif chunked:
                lines.append("Transfer-Encoding: chunked")
        if not persistent:
            lines.append("Connection: close")
        elif request.version < (1, 1):
            lines.append("Connection: keep-alive")
        return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n"

    def _send_or_leave(self, outgoing):
        """Send while the client keeps up; leave the rest to the front."""
        if not outgoing.send(self.connection.sock, Limits.slow_client,
                             Limits.lazy_time if outgoing.is_lazy else None):
            self.connection.pending = outgoing

    def _send_stream(self, stream, head, length, chunked):
        """Send head and pieces, a FilePart last; returns whether the response is complete.

        A Problem before the first piece is raised; a later one is logged, and breaks the
        connection."""
        connection, sent = self.connection, 0
        with contextlib.closing(stream):
            try:
                for piece in stream:
                    if isinstance(piece, FilePart):
                        sent += piece.length
                        self._send_or_leave(Outgoing(
                            [head, b"%x\r\n" % piece.length, piece, b"\r\n0\r\n\r\n"]
                            if chunked else [head, piece]))
                        return chunked or sent == length

                    if chunked:
                        connection.send(head, b"%x\r\n" % len(piece), piece, b"\r\n")
                    else:
                        connection.send(head, piece)
                        sent += len(piece)
                    head = b""
            except Problem as problem:
                if head:
                    raise
                log.warning("an answer to %s broke off: %s", connection.address, problem.message)
                connection.broken = True
                return False

            if head or chunked:
                connection.send(head, b"0\r\n\r\n" if chunked else b"")
        return chunked or sent == length

    def _keep_ready(self, request, response, ready):
        """Put a small response to a GET or HEAD without a body into the cache of ready ones."""
        size = len(ready.head) + len(ready.body) + 2 * len(request.raw_head) + 500
        if request.method not in ("GET", "HEAD") or len(request.raw_head) > Limits.ready_head \
                or size > Limits.ready_response \
                or "content-length" in request.headers or "transfer-encoding" in request.headers:
            return

        expires = response.expires
        if request.has_credentials:
            if request.identity.user is None:
                return
            if request.identity.expires:
                expires = min(expires or request.identity.expires, request.identity.expires)
        self.server.app.keep_ready(request, ready, size, response.tags, expires)


_CREDENTIALS = re.compile(rb"\n(?:Authorization|X-Devpi-Auth):[ \t]*([^\r\n]+)", re.I)


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """The front: one loop over connections between requests, and a bounded number of workers."""

    def __init__(self, app, listeners):
        self.app, self.listeners = app, listeners
        socketserver.BaseServer.__init__(self, listeners[0].getsockname(), Handler)
        self.socket = listeners[0]
        self.selector = selectors.DefaultSelector()
        self.workers = Workers("worker", app.settings.threads, self._work,
                               at_ease=Limits.workers_at_ease)

        self.returned = collections.deque()
        self.waker, self.wake_end = socket.socketpair()
        self.waker.setblocking(False)
        self.wake_end.setblocking(False)

        self.connections = set()
        self.working = 0            # connections that workers have
        self.held = 0               # bytes of memory of responses to slow clients
        self.holders = collections.Counter()    # {id of such a byte string: number of responses}
        self.stopping = False
        self.limit = connection_limit(app.settings.connections)
        self.real_ip = re.compile(
            rb"\n%b:([^\r\n]*)" % re.escape(app.settings.real_ip_header.encode()), re.I)

    # -- steps of socketserver

    def process_request(self, request, client_address):
        """Hand a connection to a worker, which serves the request in its buffer."""
        self.workers.submit((request, client_address, time.monotonic()), self._party(request))
        self.working += 1

    def _party(self, connection):
        """(address, credentials) of the request in the buffer, from its unparsed head.

        The credentials are not checked yet: they only get a share of their address's turns."""
        head = connection.buffer[:connection.buffer.find(b"\r\n\r\n") + 2]
        said = self.real_ip.findall(head) if connection.trusted else ()
        ip = forwarded_ip(said[-1].decode("latin-1")) if said else None
        credentials = _CREDENTIALS.search(head)
        return str(ip) if ip else connection.address, credentials and credentials[1]

    def _work(self, item):
        """Serve a request, or respond 503 if it waited for more than `Limits.longest_queue`."""
        connection, client_address, since = item
        if time.monotonic() - since <= Limits.longest_queue:
            self.process_request_thread(connection, client_address)
            return
        with contextlib.suppress(OSError):      # the client may be gone
            connection.send(self._busy_response())
        self.give_back(connection, False)

    def shutdown_request(self, request):
        """Nothing: `Handler.finish` has given the connection back."""

    def handle_error(self, request, client_address):
        """Log an error; `Handler.finish` has given the connection back."""
        log.exception("a request from %s failed", client_address)

    # -- for workers

    def give_back(self, connection, keep):
        """Return a connection to the front, from a worker; `keep`: leave it open."""
        self.returned.append((connection, keep))
        self.wake()

    def wake(self):
        """End the front's wait for events."""
        with contextlib.suppress(BlockingIOError):      # the front is awake already
            self.wake_end.send(b".")

    # -- the loop

    def serve_forever(self, poll_interval=1.0):
        """Wait for bytes, send ready responses, hand other requests to workers, until `stop`."""
        for listener in self.listeners:
            self.selector.register(listener, selectors.EVENT_READ, listener)
        self.selector.register(self.waker, selectors.EVENT_READ, self.waker)

        swept = time.monotonic()
        while not self.stopping:
            events = self.selector.select(poll_interval)
            if self.app.store.commits.changed():
                self.app.store.refresh_serial()

            now = time.monotonic()
            for key, _ in events:
                target = key.data
                if type(target) is Connection and target not in self.connections:
                    continue            # closed in this round
                try:
                    if type(target) is not Connection:
                        self._take_back(now) if target is self.waker else self._accept(target)
                    elif target.pending is None:
                        self._readable(target, now)
                    else:
                        self._send_pending(target)
                except Exception:       # one connection must not end the service for the others
                    log.exception("the front failed with %r", target)
                    if type(target) is Connection:
                        self._close(target)

            if now - swept > 1:
                swept = now
                self._sweep(now)
        self._wind_down()

    def stop(self):
        """End `serve_forever`; may be called from a signal handler."""
        self.stopping = True
        self.wake()

    def _accept(self, listener):
        """Accept up to 64 connections that wait at a listener."""
        for _ in range(64):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:        # out of file descriptors
                log.error("can't accept connections: %s", error)
                if not self._evict():
                    time.sleep(0.1)
                return
            sock.setblocking(False)
            with contextlib.suppress(OSError):      # macOS, if the peer is gone already
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            if len(self.connections) >= self.limit and not self._evict():
                self._refuse_connection(sock)
                continue
            address = UNIX_PEER if listener.family == UNIX_FAMILY else address[0]
            connection = Connection(sock, address, self.app.trusts(address),
                                    self.app.ready_responses(address).entries)
            self.connections.add(connection)
            self.selector.register(sock, selectors.EVENT_READ, connection)

    def _evict(self):
        """Close a connection to make room: a closing one, or else that idle for longest.

        False if none is idle."""
        # a younger connection may have sent a request that is not read yet
        before = time.monotonic() - Limits.evictable
        idle = [key.data for key in self.selector.get_map().values() if type(key.data) is Connection
                and key.data.since < before and key.data.pending is None and not key.data.buffer]
        if not idle:
            return False
        self._close(min(idle, key=lambda connection: (connection.draining is None,
                                                      connection.since)))
        return True

    def _busy_response(self):
        return self._plain_response("503 Service Unavailable\r\nRetry-After: 1",
                                    b"too much to do just now, try again\n")

    def _plain_response(self, status, body):
        head = (f"HTTP/1.1 {status}\r\nConnection: close\r\n"
                "Content-Type: text/plain; charset=utf-8\r\n"
                f"Content-Length: {len(body)}\r\n")
        return head.encode() + self.app.constant_headers \
            + self.app.variable_headers(self.app.store.serial) + body

    def _refuse_connection(self, sock):
        with contextlib.suppress(OSError):
            sock.send(self._busy_response())
        sock.close()

    def _readable(self, connection, now):
        """Handle bytes that a client sent. The hot path: one recv, one look-up, one send."""
        try:
            data = connection.sock.recv(65536)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if connection.draining is not None:
            connection.draining -= len(data)
            if not data or connection.draining < 0:
                self._close(connection)
            return

        connection.since = now
        if not data:
            if connection.buffer:       # half a request; the client may wait for a response
                self._hand_over(connection)
            else:
                self._close(connection)
            return

        if connection.buffer:
            connection.buffer += data
        else:
            entry = connection.ready_responses.get(data) \
                or connection.ready_responses.get((connection.address, data))
            if entry is not None and (not entry[1] or entry[1] > now):
                self._send_ready(connection, entry[0], now)
                return
            connection.buffer = data
            connection.deadline = now + Limits.head_time
        self._dispatch(connection)

    def _send_ready(self, connection, ready, now):
        """Send a ready response; the rest, if any, becomes `pending`."""
        app = self.app
        head, body, what, status, user, address = ready
        if address == connection.address or not connection.trusted:
            address = connection.address
        head += app.variable_headers(app.store.serial)

        data = head + body
        try:
            sent = connection.sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self._close(connection)
            return

        connection.since = now
        connection.deadline = now + Limits.keep_alive
        if sent < len(data):
            connection.pending = Outgoing([head, body])     # not `data`: the cache holds `body`
            connection.pending.advance(sent)
            connection.deadline = now + Limits.stall
            self.selector.modify(connection.sock, selectors.EVENT_WRITE, connection)
            self._count_memory(connection, now)

        app.access_log.add_ready(what, status, now, len(body), user, address)

    def _count_memory(self, connection, now):
        """Count the memory of a pending response.

        Over `Limits.pending_memory` the slowest clients lose their connections."""
        connection.held = connection.pending.in_memory
        for data in connection.held:
            self.held += 0 if self.holders[id(data)] else len(data)
            self.holders[id(data)] += 1
        if self.held <= Limits.pending_memory:
            return

        slow = [other for other in self.connections if other.pending is not None and other.held]
        count = 0
        for count, other in enumerate(sorted(slow, key=lambda other: other.pending.slowness(now))):
            if self.held <= Limits.pending_memory:
                break
            self._close(other)
        log.warning("%d answers are given up, to %s for one: answers that nobody takes fill %d MiB",
                    count, connection.address, Limits.pending_memory >> 20)

    def _drop_pending(self, connection):
        """Forget the pending response, when it is sent or given up."""
        self._uncount_memory(connection)
        connection.pending = None

    def _uncount_memory(self, connection):
        for data in connection.held:
            self.holders[id(data)] -= 1
            if not self.holders[id(data)]:
                del self.holders[id(data)]
                self.held -= len(data)
        connection.held = ()

    def _send_pending(self, connection):
        """Send more of the pending response to a slow client."""
        try:
            more = connection.pending.send_some(connection.sock)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._close(connection)
            return

        now = time.monotonic()
        connection.since = now
        connection.deadline = now + Limits.stall
        if more and connection.pending.is_lazy:
            self._uncount_memory(connection)       # other pieces are in memory now
            self._count_memory(connection, now)
        if not more:
            self._drop_pending(connection)
            self.selector.unregister(connection.sock)
            self._resume(connection, now)

    def _resume(self, connection, now):
        """Wait for the next request, part of which may be in the buffer; or close."""
        if connection.closing or self.stopping:
            self._close_gently(connection, now)
            return

        connection.since = now
        connection.deadline = now + Limits.keep_alive
        self.selector.register(connection.sock, selectors.EVENT_READ, connection)
        if connection.buffer:
            connection.deadline = now + Limits.head_time
            self._dispatch(connection)

    def _close_gently(self, connection, now):
        """Close our side and read on for a while: otherwise the client could lose the response."""
        sock = connection.sock
        if connection.broken:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            with contextlib.suppress(OSError):      # the client has closed its side as well
                sock.shutdown(socket.SHUT_WR)
                connection.buffer = b""
                connection.draining = connection.allowance
                connection.deadline = now + (1 if self.stopping else Limits.drain_time)
                self.selector.register(sock, selectors.EVENT_READ, connection)
                return
        self.connections.discard(connection)
        sock.close()

    def _dispatch(self, connection):
        """Hand the connection to a worker if its buffer holds a head, or can't become one."""
        buffer = connection.buffer
        if buffer.startswith(b"\r\n"):
            buffer = connection.buffer = without_blank_lines(buffer)

        start = max(0, connection.scanned - 3)
        end = buffer.find(b"\r\n\r\n", start)
        if end < 0 and len(buffer) <= Limits.head and not BARE_LINE_FEED.search(buffer, start) \
                and buffer.find(b"\0", start) < 0:
            connection.scanned = len(buffer)
            return

        if end >= 0 and len(buffer) < end + 4 + _small_body(buffer[:end + 2]):
            connection.deadline = time.monotonic() + Limits.stall
            return
        self._hand_over(connection)

    def _hand_over(self, connection):
        """Hand the connection to a worker.

        If too many requests wait, the party with the most of them loses its last: 503."""
        self._unregister(connection)
        connection.scanned = 0
        self.process_request(connection, connection.address)
        if len(self.workers.waiting) > Limits.waiting_requests:
            item = self.workers.take_back()
            if item is not None:
                self.working -= 1
                self.connections.discard(item[0])
                self._refuse_connection(item[0].sock)

    def _unregister(self, connection):
        try:
            self.selector.unregister(connection.sock)
        except KeyError:        # a worker gave it back, and it is not registered again yet
            pass

    def _take_back(self, now):
        """Take the connections that workers gave back; notice signals to stop."""
        with contextlib.suppress(BlockingIOError):
            if {signal.SIGTERM, signal.SIGINT} & set(self.waker.recv(4096)):
                self.stopping = True        # see stop_on_signals

        while self.returned:
            connection, keep = self.returned.popleft()
            self.working -= 1
            connection.closing = not keep
            if connection.pending is None:
                self._resume(connection, now)
            else:
                connection.deadline = now + Limits.stall
                self.selector.register(connection.sock, selectors.EVENT_WRITE, connection)
                self._count_memory(connection, now)

    def _sweep(self, now):
        """Close connections that are idle past their deadline, or too slow."""
        waiting = self.selector.get_map()
        for connection in [c for c in self.connections
                           if c.deadline < now or c.pending is not None and c.pending.is_too_slow]:
            if connection.sock.fileno() in waiting:
                if connection.buffer and connection.pending is None:
                    with contextlib.suppress(OSError):
                        connection.sock.send(self._plain_response(
                            "408 Request Timeout", b"the request comes too slowly\n"))
                self._close(connection)

    def _close(self, connection):
        """Close a connection of the front, unless it was closed already in this round of events."""
        if connection not in self.connections:
            return
        self._unregister(connection)
        self.connections.discard(connection)
        if connection.pending is not None:
            connection.pending.close()
            self._drop_pending(connection)
        connection.sock.close()

    def _wind_down(self):
        """Stop accepting, close idle connections, wait `Limits.shutdown` seconds for requests."""
        for listener in self.listeners:
            self.selector.unregister(listener)
            if listener.family == UNIX_FAMILY:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(listener.getsockname())
            listener.close()

        for connection in [key.data for key in list(self.selector.get_map().values())
                           if type(key.data) is Connection]:
            if connection.pending is None and connection.draining is None:
                self._close(connection)

        until = time.monotonic() + Limits.shutdown
        while (self.working > 0 or len(self.connections) > 0) and time.monotonic() < until:
            for key, _ in self.selector.select(0.1):
                if key.data is self.waker:
                    self._take_back(time.monotonic())
                elif key.data.pending is not None:
                    self._send_pending(key.data)
                else:
                    self._readable(key.data, time.monotonic())
            self._sweep(time.monotonic())
        if self.working:
            log.warning("%d requests did not end within %d seconds", self.working, Limits.shutdown)


def connection_limit(wanted):
    """The number of connections: `wanted`, or fewer if file descriptors don't suffice.

    Raises the soft limit of file descriptors as far as needed and allowed."""
    try:
        import resource
    except ImportError:     # Windows, where select() takes 512 sockets
        return min(wanted, 480)

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * wanted + 400       # a file that is being sent takes a second descriptor
    if soft != resource.RLIM_INFINITY and soft < needed:
        goal = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (goal, hard))
            soft = goal
    return wanted if soft == resource.RLIM_INFINITY else max(16, min(wanted, (soft - 400) // 2))


# ==================================================================================================
# 18  Application, routes, audiences
#
# The parts of a running server, and the way from a request to its endpoint. A route names its
# audience and its permission; the dispatcher finds index and project, checks the permission, and
# gives errors the form that the audience understands.
# ==================================================================================================


# -- permissions


def may_read(request, index):
    return request.app.permissions.read(request.identity, index)


def refuse_reading(request, message):
    """Raise 401 without valid credentials, 403 with them, never 404 [W9.2].

    The devpi client gets 403, as it goes on after that, but not after 401."""
    if request.identity.user is None and "devpi-client" not in request.header("user-agent"):
        request.refuse(Unauthorized(message))
    request.refuse(Forbidden(message))


def who_may_upload(request, index):
    """` to alice/dev: alice, bob may`; "" for callers who may not read the index and its ACL."""
    acl = index.config.get("acl_upload", ())
    if not may_read(request, index):
        return ""
    more = f" and {len(acl) - 10} more" if len(acl) > 10 else ""
    return f" to {index.path}: {', '.join(acl[:10])}{more} may" if acl \
        else f" to {index.path}: its acl_upload is empty"


def other_stages(request):
    """`; you may upload to alice/dev, ...`, the caller's own stages first; "" if there are none."""
    app, user = request.app, request.identity.user
    if user is None:
        return ""
    stages = [index for index in app.indexes.all()
              if app.permissions.upload(request.identity, index)
              and app.permissions.read(request.identity, index)]
    if not stages:
        return ""
    stages.sort(key=lambda index: index.user != user)
    named = [index.path for index in stages[:Limits.named_stages]]
    more = ["..."] if len(stages) > len(named) else []
    return f"; you may upload to {', '.join(named + more)}"


def _is_root(request, _):
    return request.identity.user == "root"


def _may_create_user(request, _):
    return request.app.permissions.user_create(request.identity, request.is_local)


def _may_delete_user(request, user):
    request.app.users.get(user)
    return request.app.permissions.user_delete(request.identity, user)


def _may_create_index(request, user):
    """Whether the caller may create indexes of a user; 409, if the index exists, comes first."""
    request.app.indexes.refuse_existing(*request.index_path.split("/"))
    return request.app.permissions.index_modify(request.identity, user)


def _may_modify_index(request, index):
    return index and request.app.permissions.index_modify(request.identity, index.user)


def _may_delete_index(request, index):
    """Whether the caller may delete the index; only callers who may get 404 for a missing one."""
    user = request.index_path.partition("/")[0]
    allowed = request.app.permissions.index_modify(request.identity, user)
    if allowed and index is None:
        raise NoIndex(request.index_path)
    return allowed


def _may_delete_files(request, index):
    return index and request.app.permissions.delete_files(request.identity, index)


def _may_upload(request, index):
    if index.is_mirror:
        raise NotFound(f"cannot submit to mirror index {index.path}, which caches another server"
                       + other_stages(request))
    return request.app.permissions.upload(request.identity, index)


def _may_send_results(request, index):
    require(request, "read", index)
    return index.is_mirror \
        or request.app.permissions.upload_test_results(request.identity, index)


def _forbidden(message):
    """A `Permission.refuse` with status 403, for anonymous requests too, as in devpi.

    The message may contain `{path}`, of the index, and `{user}`."""
    def refuse(request, subject):
        request.refuse(Forbidden(message.format(path=request.index_path, user=subject)))
    return refuse


def _refuse_to_read(request, index):
    refuse_reading(request, f"reading {index.path} takes a login" if request.identity.user is None
                   else f"no permission to read index {index.path}")


def _refuse_upload(request, index):
    request.refuse(Unauthorized(f"uploading to {index.path} takes a login")
                   if request.identity.user is None
                   else Forbidden("no permission to submit" + who_may_upload(request, index)))


def _refuse_new_user(request, user):
    who = "from other machines only root may; --restrict-modify names others, " \
          "--open-registration lets everybody do it"
    if request.app.settings.restrict_modify is not None:
        who = "--restrict-modify says who may"
    request.refuse(Forbidden(f"no permission to create user {user}: {who}"))


def _nothing_to_read(request, places):
    """Raise 410 for a deleted file, even if its index was deleted later; otherwise 404."""
    if "file" in places:
        request.app.projects.refuse_gone(f"{request.index_path}/{places['file']}")
    raise NoIndex(request.index_path)


def _no_such_index(request, _):
    raise NoIndex(request.index_path)


class Permission(typing.NamedTuple):
    """Something that a caller may do to a subject: the index that the path names, or else the user,
    or else None.

    `allows(request, subject)` decides; `refuse(request, subject)` raises; `missing(request,
    places)` raises if the index does not exist. If `missing` is None, the subject is None then, so
    that callers without the permission do not learn whether the index exists."""
    allows: typing.Callable
    refuse: typing.Callable | None = None
    missing: typing.Callable | None = _no_such_index


PERMISSIONS = {
    "anybody": Permission(lambda request, subject: True),
    # the endpoint calls `require` itself, after it has read the body
    "as the body says": Permission(lambda request, subject: True),
    "root": Permission(_is_root, _forbidden("only root may do this")),
    "read the audit log": Permission(_is_root, _forbidden("only root may read the audit log")),
    "create user": Permission(_may_create_user, _refuse_new_user),
    "modify user": Permission(
        lambda request, user: request.app.permissions.user_modify(request.identity, user),
        _forbidden("no permission to modify user {user}")),
    "change password": Permission(
        lambda request, user: request.app.permissions.user_modify_password(request.identity, user),
        _forbidden("no permission to change password for user {user}")),
    "delete user": Permission(
        _may_delete_user, _forbidden("no permission to delete user {user}")),
    "create index": Permission(
        _may_create_index, _forbidden("no permission to create index {path}")),
    "modify index": Permission(
        _may_modify_index, _forbidden("no permission to modify index {path}"), missing=None),
    "delete index": Permission(
        _may_delete_index, _forbidden("no permission to modify index {path}"), missing=None),
    "read": Permission(may_read, _refuse_to_read, _nothing_to_read),
    "upload": Permission(_may_upload, _refuse_upload),
    "test results": Permission(_may_send_results, _forbidden(
        "No permission to upload tox results. "
        "You can use the devpi test --no-upload option to skip the upload.")),
    "delete files": Permission(
        _may_delete_files, _forbidden("no permission to change files of index {path}"),
        missing=None)}


def require(request, may, subject):
    """Raise unless the caller has the permission with this name for a subject: see `Permission`."""
    permission = PERMISSIONS[may]
    if not permission.allows(request, subject):
        permission.refuse(request, subject)


def require_still(request, may, index):
    """`require` again, after a long body or wait, with the login and the index as they are now.

    Returns that index."""
    request.recheck_identity()
    index = request.app.indexes.get(index.path)
    require(request, may, index)
    return index


def json_still(request, may, subject, *shapes, **limits):
    """The JSON body, as `Request.json` returns it; refused if the caller may no longer do this when
    the body has come."""
    body = request.json(*shapes, **limits)
    if isinstance(subject, Index):
        require_still(request, may, subject)
    else:
        request.recheck_identity()
        require(request, may, subject)
    return body


# -- audiences


class Audience(typing.NamedTuple):
    """A kind of client that an endpoint is for.

    `errors`: the form of its errors, see `problem_response`. `fits(request)`: whether a request
    comes from this audience, if several share a path. `is_default`: gets requests that fit none."""
    errors: str
    fits: typing.Callable = lambda request: False
    is_default: bool = False


def _sends_json(request):
    """Whether the body is JSON, even if its type is a form's, as with `curl -d '{...}'`."""
    if request.content_type == "application/x-www-form-urlencoded":
        return request.body.begins_with(b"{")
    return request.content_type != "multipart/form-data"


# in the order in which they are tried: an installer's User-Agent comes before its Accept
AUDIENCES = {
    "xml-rpc": Audience(
        "upload", lambda request: request.content_type in ("text/xml", "application/xml")),
    "pusher": Audience("json", _sends_json),
    "uploader": Audience("upload", is_default=True),
    "installer": Audience("page", lambda request: request.is_installer),
    # readers of devpi's JSON; others may get 415, see `refuse_other_types`
    "json": Audience("json", lambda request: "application/json" in request.accept, True),
    # readers of PEP 691's JSON, by Accept or ?format
    "simple json": Audience("page", lambda request: request.simple_format == SIMPLE_JSON),
    "people": Audience("page", is_default=True),
    # supervisors, proxies, scripts: they take any type
    "program": Audience("json", is_default=True)}


def refuse_other_types(request):
    """Raise 415 if Accept names only other types than JSON.

    Browsers get JSON too, as they have no pages here."""
    ranges = accept_ranges(request.accept)
    if ranges and not {"application/json", "application/*", "*/*", "text/html"} & set(ranges):
        raise UnsupportedType("this is served as application/json only: say so in Accept")


# -- routes


class Route(typing.NamedTuple):
    """An endpoint under one of its paths; `for_` names its audience, `may` its permission."""
    endpoint: typing.Callable
    for_: str
    may: str
    audience: Audience
    permission: Permission
    other_names: str            # see `route`
    is_json: bool               # GET of JSON alone
    drops_slash: bool


class Choice:
    """The routes of one path and method, one for each audience, in the order of AUDIENCES.

    `default`: the route for requests that fit no audience."""

    def __init__(self):
        self.routes, self.default = [], None

    def add(self, added):
        audiences = list(AUDIENCES)
        self.routes.append(added)
        self.routes.sort(key=lambda each: audiences.index(each.for_))
        self.default = next((each for each in self.routes if each.audience.is_default),
                            self.routes[-1])

    def of(self, request):
        for each in self.routes:
            if each.audience.fits(request):
                return each
        return self.default


class Path(typing.NamedTuple):
    """A path with its routes."""
    pattern: re.Pattern
    query: frozenset            # the request's query must have one of these keys; empty: any query
    choices: dict               # {method: Choice}


# {(path as it is written, query): Path}: those with a query first, then in the order of their
# first definition.  A request gets the first Path that matches and has its method; no others match
# the same path.
ROUTES = {}
_PLACES = {"user": "[^/+]+", "index": "[^/+]+", "name": "[^/+]+", "project": "[^/+]+",
           "version": "[^/+][^/]*", "rest": ".+", "file": r"\+[ef]/.*[^/]"}


def route(methods, path, *, for_, may, query="", other_names=None):
    """Decorator: registers an endpoint. `for_`, `may`: names in AUDIENCES and PERMISSIONS;
    `query`: see `Path`.

    Places in a path: `{user}`, `{index}`, `{name}` and `{project}` match one segment without a
    plus, `{version}` any segment, `{rest}` the rest of the path, `{file}` a file's path below its
    index; `[/]` an optional final slash.

    The endpoint is called with the request and the values of the places by name. `{user}/{index}`
    becomes one value, `index`, an `Index`; `{user}/{name}`, which need not be an index, stays two
    strings. `project` is a normal name.

    `other_names` says what happens if the path has another spelling of the project's name:
    - "redirect": a redirect to the normal name, before the permission is checked (default for GET)
    - "redirect ASCII": the same, but 400 for a name that is not ASCII
    - "redirect readers": a redirect after the permission is checked
    - "take": the endpoint is called with the normal name (default for other methods)"""
    audience, permission = AUDIENCES[for_], PERMISSIONS[may]

    def register(endpoint):
        key = path, query
        if key not in ROUTES:
            ROUTES[key] = Path(_path_pattern(path), frozenset(query.split()), {})
            for later in [other for other in ROUTES if not other[1]] if query else ():
                ROUTES[later] = ROUTES.pop(later)
        for method in methods.split():
            is_json = method == "GET" and for_ == "json"
            spelling = other_names or ("redirect" if method == "GET" else "take")
            ROUTES[key].choices.setdefault(method, Choice()).add(Route(
                endpoint, for_, may, audience, permission, spelling,
                is_json, drops_slash=is_json and path.endswith("[/]")))
        return endpoint
    return register


def _path_pattern(path):
    """A route's path as a pattern with one group for each place."""
    slash = "/*" if "{file}" in path else "/?"
    pattern = re.escape(path).replace(r"\[/\]", slash).replace(r"\{", "{").replace(r"\}", "}")
    for place, expression in _PLACES.items():
        pattern = pattern.replace("{%s}" % place, f"(?P<{place}>{expression})")
    return re.compile(pattern)


def dispatch(request):
    """Find a request's endpoint, check what its route demands, and return its response.

    Clients rely on the order of the checks:
    1. the index exists (404, 410; 403 if the caller must not learn that)
    2. the project's name is normal (302)
    3. the client accepts JSON, if the path has nothing else (415)
    4. permission (401, 403)
    5. no final slash, for browsers (302)

    The audience is chosen after 1, so errors of 1 have the default audience's form."""
    choice, match = _matching(request)
    chosen, places = choice.default, match.groupdict()
    request.errors = chosen.audience.errors

    subject = places.get("user")
    if "index" in places:
        request.index_path = f"{places.pop('user')}/{places['index']}"
        subject = places["index"] = request.app.indexes.find(request.index_path)
        if subject is None and chosen.permission.missing:
            chosen.permission.missing(request, places)
    elif "name" in places:
        request.index_path = f"{subject}/{places['name']}"

    if len(choice.routes) > 1:
        chosen = choice.of(request)
        request.errors = chosen.audience.errors

    moved = None
    if "project" in places:
        moved = _normal_name(request, chosen, match, places)
        if moved and chosen.other_names != "redirect readers":
            return moved
    if chosen.drops_slash:
        moved = _without_final_slash(request)
        if moved and chosen.may == "anybody":       # a user's JSON: 5 comes before 3 there
            return moved

    if chosen.is_json:
        refuse_other_types(request)
    require(request, chosen.may, subject)
    return moved or chosen.endpoint(request, **places)


def _matching(request):
    """(Choice, match) of the first Path that fits a request; NotFound if none does."""
    method = "GET" if request.method == "HEAD" else request.method
    for pattern, query, choices in ROUTES.values():
        match = pattern.fullmatch(request.path)
        if match:
            choice = choices.get(method) or choices.get("ANY")
            if choice and (not query or not query.isdisjoint(request.query)):
                return choice, match
    raise NotFound(f"there is nothing at {one_line(request.path, 100)} "
                   f"for {one_line(request.method, 20)}")


def _normal_name(request, chosen, match, places):
    """Put the project's normal name into `places`.

    Returns a redirect if the path has another spelling and the route redirects, else None."""
    project = places["project"]
    if chosen.other_names == "redirect ASCII" and not project.isascii():
        raise BadRequest("unicode project names not allowed")

    name = places["project"] = normalize(project)
    if name == project or chosen.other_names == "take":
        return None

    start, end = match.span("project")
    return redirect(request.url(request.path[1:start] + name + request.path[end:]))


def _without_final_slash(request):
    """A redirect to the path without its final slash for browsers, None for other clients."""
    if request.is_browser and request.path.endswith("/") and not request.is_installer:
        query = request.target.partition("?")[2]
        return redirect(request.url(request.path.strip("/")) + (f"?{query}" if query else ""))
    return None


def readers_of(path):
    """The path of the index whose readers may see what is at `path`, for any method.

    "" if everybody may; None if nothing is there."""
    for pattern, _, choices in ROUTES.values():
        match = pattern.fullmatch(path)
        if match:
            places = match.groupdict()
            name = places.get("index") or places.get("name")
            is_open = all(each.may == "anybody" for choice in choices.values()
                          for each in choice.routes)
            return "" if is_open or not name else f"{places['user']}/{name}"
    return None


PARTS = []


def part(make):
    """Decorator for classes of the chapters below: the `App` makes each, with itself, a part."""
    PARTS.append(make)
    return make


class App(Part):
    """All parts of a running server, itself among them, and what its requests share."""

    def __init__(self, settings, store, secret):
        self.settings, self.store = settings, store
        self.blobs = Blobs(settings.serverdir, settings.read_only)
        self.users = Users(store, settings.root_passwd == "")
        self.indexes = Indexes(store, self.users, settings)
        self.logins = Logins(self.users, secret)
        self.permissions = Permissions(settings)
        self.client = UpstreamClient(settings)
        self.mirrors = Mirrors(store, self.indexes, self.blobs, self.client, settings)
        self.projects = Projects(store, self.indexes, self.mirrors)
        self.releases = Releases(store, self.blobs, settings)
        self.staging = Staging(store, self.blobs, self.projects, settings)
        self.outbox = Outbox(store, self.client, settings)
        self.search = SearchIndex(store, self.indexes, self.releases, self.blobs, settings)

        self.pages = store.freshness.cache(Limits.page_cache)
        self.turns = Turns()
        self.ready = {trusted: store.freshness.cache(Limits.response_cache // 2)
                      for trusted in (False, True)}
        self.access_log = AccessLog(settings.access_log)
        self.noted = set()          # (address, text) of warnings that were logged
        self.anonymous_results = Rate(3600, Limits.anonymous_of_one, Limits.anonymous_an_hour)
        self.anonymous_bytes = Rate(3600, Limits.anonymous_bytes_of_one, Limits.anonymous_bytes)
        self.refusals = Rate(3600, Limits.audited_refusals_of_one, Limits.audited_refusals)
        self.started = time.time()

        node = store.node["uuid"]
        self.address_text = authority(*settings.listen[0]) if settings.listen else "localhost"
        # whether only processes of this machine can reach the server by an address
        self.is_private = all(ip is not None and ip.is_loopback
                              for ip in (ip_of(host) for host, _ in settings.listen))
        self.outside_name = (urllib.parse.urlsplit(settings.outside_url).hostname or "").lower()
        self.constant_headers = (
            "X-DEVPI-API-VERSION: 2\r\n"
            f"X-DEVPI-SERVER-VERSION: {PROTOCOL_VERSION}\r\n"
            f"X-DEVPI-UUID: {node}\r\n"
            f"X-DEVPI-PRIMARY-UUID: {node}\r\n"
            f"X-DEVPI-MASTER-UUID: {node}\r\n").encode()
        self._variable = (0, -2, b"")       # (second, serial, the headers)

        held = [*vars(self).values(), *vars(self.mirrors).values()]
        self.parts = (self, *[each for each in held if isinstance(each, Part)],
                      *[make(self) for make in PARTS])

    def variable_headers(self, serial):
        """The end of every response's head: Date, serial and the blank line."""
        second = int(time.time())
        if self._variable[:2] != (second, serial):
            self._variable = (
                second, serial,
                f"Date: {http_date(second)}\r\nX-DEVPI-SERIAL: {serial}\r\n\r\n".encode())
        return self._variable[2]

    @functools.lru_cache(maxsize=10000)
    def trusts(self, address):
        """Whether a peer may name clients and URLs: loopback, --trusted-proxy [W4.2]."""
        ip = ip_of(address)
        return ip.is_loopback or any(ip in network for network in self.settings.trusted_proxies)

    def ready_responses(self, address):
        """The cache of ready responses for a peer: trusted peers, whose X-Outside-URL counts, have
        their own."""
        return self.ready[self.trusts(address)]

    def keep_ready(self, request, ready, size, tags, expires):
        """Keep a response under its request's raw head; a user's response under the address, too.

        Otherwise an address that is locked out after wrong passwords could go on guessing: the
        right password would get the kept response."""
        address = request.connection.address
        key = request.raw_head if ready.user is None else (address, request.raw_head)
        tags |= self.reach(request)
        if ready.user is not None:
            tags |= {user_tag(ready.user)}
        self.store.freshness.keep(self.ready_responses(address), key, ready,
                                  size + 100 * len(tags), tags, request.moment, expires)

    def reach(self, request):
        """The tags of all index configurations that a response to this request may depend on.

        They are found after the response is made, which is safe: if a configuration changed
        meanwhile, the first changed one on the way from the path's index to its bases is still
        among them, so that the response is not kept."""
        index = self.indexes.find(request.index_path)
        return self.indexes.reach(index) if index \
            else frozenset((index_tag(request.index_path), INDEXES))

    def ignored_header(self, address, name, value, why=""):
        """Log, once for an address, why a header that only proxies send does not count."""
        self.warn_once(address, "%s %r from %s is ignored: %s", header_title(name),
                       one_line(value, 100), address,
                       why or f"--trusted-proxy {address} would make it count")

    def warn_once(self, address, text, *values):
        """Log a warning, once for an address and text; at most 1000 in all."""
        if (address, text) not in self.noted and len(self.noted) < 1000:
            self.noted.add((address, text))
            log.warning(text, *values)

    def respond(self, request):
        """The response of a request's endpoint; what that raises becomes a response.

        BadHead goes on to the caller, which closes the connection."""
        try:
            request.resolve_target()
            request.refuse_foreign_host()
            request.refuse_foreign_page()
            request.body.check_limit()
            response = dispatch(request)
        except BadHead:
            raise
        except Problem as problem:
            if isinstance(problem, NoIndex):
                problem.message += near_indexes(request, problem.path)
            if problem.status in (401, 403, 409):
                self.note_refusal(request, problem)
            response = problem_response(problem, request.accept, request.errors)
        except Exception:
            name = secrets.token_hex(4)
            log.exception("request %s failed: %s %s", name, request.method, visible(request.target))
            response = problem_response(Problem(f"internal error, request id {name}"),
                                        request.accept, request.errors)

        if request.method not in ("GET", "HEAD"):
            request.serial = self.store.serial
        return response

    def note_refusal(self, request, problem):
        """Enter a refused change into the audit log: `Limits.audited_refusals` an hour, so that
        they can't displace the rest.

        401 without a login is no refusal: it asks the client for credentials."""
        if request.method in ("GET", "HEAD"):
            return
        try:
            user = request.identity.user
        except Problem:     # the password can't be checked now
            user = None
        if problem.status == 401 and user is None or self.refusals.take((user, request.address)):
            return

        path = sound(request.path)[:1000]
        index = self.indexes.find("/".join(path.split("/")[1:3]))
        actor = Actor(user, request.address)
        detail = f"{request.method}: {problem.status} {sound(problem.message)[:1000]}"
        with contextlib.suppress(Problem):      # the response matters more than this entry
            self.store.write(announce_event, Event("refused", index, target=path, detail=detail),
                             actor=actor, durable=False)

    def rendered(self, request, key, tags, render):
        """The kept `Rendered` of a key, or what `render()` returns, which is kept unless stale.

        One request at a time renders a page. 2,000 files take 20 ms: eight clients that each
        rendered them at once would wait 0.2 s. After `Limits.turn` seconds, as when upstream is
        slow, the others no longer wait for the first."""
        found = self.pages.get(key)
        if found is None:
            with self.turns.turn(key, Limits.turn):
                found = self.pages.get(key)
                if found is None:
                    found = render()
                    if not found.stale:
                        tags |= self.reach(request)
                        size = 2 * len(found.body) + 1000 + 100 * len(tags)
                        self.store.freshness.keep(
                            self.pages, key, found, size, tags, request.moment, found.expires)
        return found

    # -- what the parts report and do

    def all_loops(self):
        return [loop for part_ in self.parts for loop in part_.loops()]

    def loops(self):
        if not self.settings.read_only:
            yield "cleaner", self.clean_regularly

    def all_gauges(self):
        return [gauge for part_ in self.parts for gauge in part_.gauges()]

    def gauges(self):
        yield Gauge("devpi_lite_uptime_seconds", "gauge", "Since the start.",
                    round(time.time() - self.started, 3))
        yield Gauge("devpi_lite_offline_mode", "gauge", "1 if upstream is never asked.",
                    int(self.settings.offline_mode))
        yield Gauge("devpi_lite_read_only", "gauge",
                    "1 if the server directory is on read-only media.",
                    int(self.settings.read_only))
        yield Gauge("devpi_lite_page_cache_bytes", "gauge", "Rendered pages kept.", self.pages.size)
        yield Gauge("devpi_lite_answer_cache_bytes", "gauge", "Ready answers kept.",
                    sum(cache.size for cache in self.ready.values()))

    def health(self):
        """(level, sentences, details for root); the level is "ok", "warn" or "fatal"."""
        found = [complaint for part_ in self.parts for complaint in part_.complaints()]
        level = max((complaint.level for complaint in found),
                    key=("ok", "warn", "fatal").index, default="ok")
        return (level, [complaint.sentence for complaint in found],
                [text for complaint in found for text in complaint.details])

    def recover_all(self):
        for part_ in self.parts:
            part_.recover()

    def clean_all(self):
        """Have each part delete what it no longer needs; a failure does not stop the others."""
        for part_ in self.parts:
            self._try(self.store.write, part_.clean, durable=False)
            self._try(part_.tidy)

    def part(self, kind):
        """The part of that class."""
        return next(part_ for part_ in self.parts if isinstance(part_, kind))

    def close_all(self):
        for part_ in self.parts:
            part_.close()

    @staticmethod
    def _try(function, *arguments, **keywords):
        try:
            function(*arguments, **keywords)
        except Exception:       # the thread must go on
            log.exception("cleaning failed")

    def clean_regularly(self):
        """Run `clean_all` every `Limits.cleaning` seconds."""
        while True:
            time.sleep(Limits.cleaning)
            give_back_memory()
            self.clean_all()


# -- what a caller may see


def hidden_members(request, index):
    """The other members of an index's resolution order that the caller may not read."""
    return tuple(member for member in request.app.indexes.order(index)
                 if member.restricted and member.path != index.path
                 and not may_read(request, member))


def refuse_unknown(request, index, project, hidden, sentence=""):
    """Refuse a project that the caller finds nowhere, in the same way if a `hidden` base has it."""
    if hidden:
        refuse_reading(request, f"{index.path} builds on an index that is not open to all, "
                                f"and nothing else there has {project}")
    raise request.app.projects.unknown(index, project, sentence)


def near_indexes(request, path):
    """` (alice has: dev, prod)` for alice/dve: indexes of that user that the caller may read.

    "" if no such index has a similar name."""
    user, _, name = path.partition("/")
    indexes = request.app.indexes.all(user)
    if not nearest(name, [index.name for index in indexes]):
        return ""
    try:
        names = [index.name for index in indexes if may_read(request, index)]
    except Busy:        # the password can't be checked now
        return ""
    near = nearest(name, names)
    if not near:
        return ""

    others = [each for each in names if each not in near]
    more = len(near + others) - 10
    return (f" ({user} has: {', '.join((near + others)[:10])}"
            f"{f' and {more} more' if more > 0 else ''})")


def shown_bases(request, index):
    """The bases of an index, without those that the caller may not read."""
    found = ((base, request.app.indexes.find(base)) for base in index.config.get("bases", ()))
    return [base for base, member in found if member is None or may_read(request, member)]


# ==================================================================================================
# 19  For people
#
# Documentation and search.
# ==================================================================================================


# -- documentation


@route("GET", "/{user}/{index}/{project}/{version}/+doc[/]",
       for_="people", may="read", other_names="take")
@route("GET", "/{user}/{index}/{project}/{version}/+d[/]",
       for_="people", may="read", other_names="take")
@route("GET", "/{user}/{index}/{project}/{version}/+d/{rest}",
       for_="people", may="read", other_names="take")
def redirect_to_docs(request, index, project, version, rest="index.html"):
    """Redirect to the page itself, also from `+d`, where devpi-web shows it in a frame."""
    return redirect(request.url(f"{index.path}/{project}/{version}/+doc/{rest}"))


@route("GET", "/{user}/{index}/{project}/{version}/+doc/{rest}",
       for_="people", may="read", other_names="redirect readers")
def get_docs(request, index, project, version, rest):
    """A file of a release's documentation, straight out of its zip [W15].

    The version may be `latest` or `stable`: the newest, or newest final one, with
    documentation."""
    app = request.app
    zip_file = _documentation(app.releases.docs_of(index, project), version)
    path = rest + "index.html" if rest.endswith("/") else rest
    member = app.releases.doc_member(zip_file.sha256, path) if is_doc_path(path) else None

    if member is None and not app.releases.can_be_shown(zip_file.sha256):
        raise NotFound(f"the documentation of {project} {zip_file.version} is no zip archive: "
                       "it can only be downloaded")
    if member is None:
        if is_doc_path(path) and app.releases.doc_member(zip_file.sha256, path + "/index.html"):
            return redirect_to_docs(request, index, project, version, path + "/")
        raise NotFound(f"the documentation of {project} {zip_file.version} "
                       f"has no file {one_line(path, 200)}")
    tags = frozenset((project_tag(index.id, project),))
    return _doc_response(request, index, zip_file, member, tags)


def _documentation(docs_by_version, version):
    """The documentation zip of a version, `latest` or `stable`; NotFound without one."""
    candidates = docs_by_version
    if version == "stable":
        candidates = {v: file for v, file in docs_by_version.items() if is_final(v)}
    if version in ("latest", "stable") and candidates:
        return candidates[max(candidates, key=version_key)]
    for text in spellings(version, candidates):
        return candidates[text]
    raise NotFound("No stable documentation available." if version == "stable"
                   else "No documentation available.")


# An uploader's page may run scripts, but anonymously and outside our origin.
_DOC_POLICY = ("sandbox allow-scripts allow-popups allow-forms; "
               "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
               "connect-src 'self'")
_DOC_TYPES = mimetypes.MimeTypes(filenames=())
for _ending, _type in (
        (".js", "text/javascript"), (".mjs", "text/javascript"),
        (".md", "text/plain"), (".rst", "text/plain"),
        (".woff", "font/woff"), (".woff2", "font/woff2"), (".ttf", "font/ttf"),
        (".webp", "image/webp"), (".ico", "image/x-icon"),
        (".inv", "application/octet-stream"), (".wasm", "application/wasm")):
    _DOC_TYPES.add_type(_type, _ending)


def _doc_response(request, index, zip_file, member, tags):
    """A member of a documentation zip, or one range of it, in a sandbox."""
    etag = f'"{zip_file.sha256}-{member.number}"'
    validators = [("ETag", etag),
                  ("Cache-Control", f"{'private, ' if index.restricted else ''}max-age=60")]
    safety = [("Content-Security-Policy", _DOC_POLICY), NOSNIFF]
    if not index.restricted:
        # a sandboxed page has no origin: its own fonts need this
        safety.append(("Access-Control-Allow-Origin", "*"))
    if none_match(request.header("if-none-match"), etag):
        return Response(304, validators, tags=tags)

    type_, encoding = _DOC_TYPES.guess_type(member.path, strict=False)
    if type_ is None or encoding:
        type_ = "application/octet-stream"
        safety.append(("Content-Disposition", "attachment"))
    elif type_ == "text/plain":
        type_ = "text/plain; charset=utf-8"
    headers = [("Content-Type", type_),
               ("Last-Modified", http_date(seconds_of(zip_file.uploaded))),
               *validators, *safety, ("Accept-Ranges", "bytes")]

    file = request.app.blobs.open(zip_file.sha256, zip_file.size)
    if not member.deflated:
        return ranged_response(request, headers, etag, file, member.start, member.size, tags)

    # a range costs unpacking all bytes before it
    whole = member.size > Limits.ranged_member
    status, start, end = (200, 0, member.size) if whole \
        else chosen_range(request, headers, etag, member.size)
    if status == 416 or request.method == "HEAD":
        file.close()
        return Response(status, headers, stream=iter(()), length=end - start)
    pieces = _inflated_range(file, member, start, end)
    if end - start <= Limits.small_file:
        return Response(status, headers, b"".join(pieces), tags=tags if status == 200 else None)
    return Response(status, headers, stream=pieces, length=end - start)


def _inflated_range(file, member, start, end):
    """The bytes of a deflated member from `start` to `end`, in pieces; closes the file."""
    with file:
        left = end - start
        for piece in inflated(file, member, start):
            piece = piece[:left]
            left -= len(piece)
            yield piece
            if not left:
                return


# -- search


def readable_indexes(request):
    return [index for index in request.app.indexes.all()
            if request.app.permissions.read(request.identity, index)]


@route("GET", "/+search", for_="program", may="anybody")
def get_hits(request):
    """The projects that match `query`, and names of mirrors [W21.1]; with `page` and `sort`."""
    app = request.app
    query = Query(request.query.get("query", request.query.get("q", "")))
    readable = readable_indexes(request)
    hits = [] if query.is_empty else app.search.find(
        query, [index.id for index in readable], request.query.get("sort", ""))

    pages = max(1, min(50, -(-len(hits) // 20)))
    number = request.query.get("page", "1")
    page = min(pages, max(1, int(number))) if re.fullmatch(r"[0-9]{1,100}", number) else 1
    shown = hits[20 * (page - 1):20 * page]
    try:
        in_docs = app.search.pages(query, [row["id"] for row, _ in shown])
    except QueryTimeout:
        in_docs = {}
        query.notes.append(
            "Pages of the documentation were left out: looking for them took too long.")

    return result_response("search", {
        "query": query.text, "total": len(hits), "page": page, "pages": pages,
        "hits": [{"name": row["name"], "version": row["version"],
                  "index": f"{row['user']}/{row['idx']}",
                  "summary": row["summary"], "url": request.url(row["path"].strip("/")),
                  "score": round(score, 3), "uploaded": row["uploaded"],
                  "pages": [{"title": title, "url": request.url(path.strip("/"))}
                            for title, path in in_docs.get(row["id"], ())[:3]]}
                 for row, score in shown],
        "names": names_in_mirrors(request, query, readable), "notes": query.notes})


def names_in_mirrors(request, query, readable):
    """The mirrored projects whose names contain a query's words; those that begin so come first.

    No hits for a query that is more than a list of words, names and places."""
    app, parts = request.app, query.name_parts
    if parts is None:
        return {"total": 0, "hits": []}
    words = [part.text if isinstance(part, Word) else part.value for part in parts
             if isinstance(part, Word) or part.key == "name"]
    needle = normalize(" ".join(words)).strip("-")
    places = [part for part in parts if isinstance(part, Filter) and part.key != "name"]

    hits, total = [], 0
    for index in readable if needle else ():
        member = app.projects.at(index)
        if not member.asks_upstream or not all(_lies_at(index, place) for place in places):
            continue
        names = member.names_at_hand()
        found, partial = matching_names(names, needle)
        if partial:
            query.notes.append(f"Not all names of {index.path} were looked at.")
        if isinstance(names, list) and app.mirrors.lists.wants_names(index):
            query.notes.append(f"The list of all names of {index.path} is not here yet; "
                               "upstream was asked for it.")
        total += len(found)
        hits += [(not name.startswith(needle), name, index) for name in found[:20]]

    hits.sort(key=lambda hit: hit[:2])
    return {"total": total, "hits": [
        {"name": name, "index": index.path, "url": request.url(f"{index.path}/{name}")}
        for _, name, index in hits[:20]]}


def _lies_at(index, place):
    """Whether a filter by user, index or path admits an index."""
    if place.key == "user":
        return index.user == place.value
    if place.key == "index":
        return place.value in (index.path, index.name)
    return place.prefix and f"/{index.path}/".startswith(place.value)


@route("GET", "/+suggest", for_="program", may="anybody")
def get_suggestions(request):
    """Names that begin with `q`, for the search boxes of browsers (OpenSearch): [q, [names]]."""
    app = request.app
    text = request.query.get("q", "")
    start = normalize(text[:Limits.query].strip()).lstrip("-")
    readable = readable_indexes(request)

    names = app.search.names(start, [index.id for index in readable], 10) if start else []
    seen = {normalize(name) for name in names}
    for index in readable if start else ():
        if len(names) < 10:
            found, _ = matching_names(app.projects.at(index).names_at_hand(), start,
                                      prefix_only=True)
            more = [name for name in found[:20] if name not in seen][:10 - len(names)]
            names += more
            seen.update(more)
    return json_response([text, names])


@route("POST", "/{user}/{index}[/]", for_="xml-rpc", may="read")
def search_by_xmlrpc(request, index):
    """devpi-web: XML-RPC's `search(fields, operator)` of `pip search`, over an index and its
    bases."""
    # not at the top: it takes longer to load than all else, and few ever call this
    import xmlrpc.client
    request.body.narrow(Limits.xml_body)
    body = request.body.read_all(Limits.xml_body)
    try:
        fields, operator = _xmlrpc_call(xmlrpc.client, body)
        hits = _xmlrpc_hits(request, index, fields, operator)
        answer = sound(xmlrpc.client.dumps((hits,), methodresponse=True))
    except xmlrpc.client.Fault as fault:
        answer = xmlrpc.client.dumps(fault)
    return Response(200, [("Content-Type", "text/xml; charset=utf-8")],
                    answer.encode("utf-8", "xmlcharrefreplace"))


def _xmlrpc_call(client, body):
    """({field: [text, ...]}, operator) of a call of `search`; Fault for anything else."""
    try:
        text = body.decode("utf-8")
        if "\0" in text or re.search(r"<!(DOCTYPE|ENTITY)", text, re.IGNORECASE):
            raise ValueError("document types are not taken")
        parameters, method = client.loads(text)
    except Exception as error:      # expat and the unmarshaller raise errors of many classes
        raise client.Fault(-32700, f"not an XML-RPC call: {reason_of(error)}") from None
    if method != "search":
        raise client.Fault(-32601, f"unknown method {one_line(str(method), 60)!r}: "
                                   "there is search(fields, operator)")

    fields, operator = (*parameters, "and")[:2] if parameters else (None, "and")
    if not isinstance(fields, dict) or operator not in ("and", "or") or len(parameters) > 2:
        raise client.Fault(-32602, "expected search({field: [text, ...]}, 'and' or 'or')")
    fields = {field: [value] if isinstance(value, str) else value
              for field, value in fields.items()}
    if not all(isinstance(values, list) and all(isinstance(value, str) for value in values)
               for values in fields.values()):
        raise client.Fault(-32602, "a field of a search is a text or a list of texts")
    if sum(map(len, fields.values())) > Limits.query_terms:
        raise client.Fault(-32602, f"a search has {Limits.query_terms} texts at most")
    if any(len(value) > Limits.query for values in fields.values() for value in values):
        raise client.Fault(-32602, f"a text of a search has {Limits.query} characters at most")
    return fields, operator


def _xmlrpc_hits(request, index, fields, operator):
    """Hits as PyPI's `search` returned them, projects of the exact name first."""
    app = request.app
    order = [member for member in app.indexes.order(index)
             if app.permissions.read(request.identity, member)]
    place = {member.id: number for number, member in enumerate(order)}
    known = {field: values for field, values in fields.items() if field in RPC_COLUMNS}
    rows = app.search.by_fields(known, operator, list(place))
    wanted = [normalize(value) for value in known.get("name", ())]

    hits = {}
    for row in sorted(rows, key=lambda row: place[row["index_id"]]):
        hits.setdefault(row["norm"], {
            "name": row["name"], "version": row["version"],
            "summary": f"[{row['user']}/{row['idx']}] {row['summary']}",
            "_pypi_ordering": 2 if row["norm"] in wanted else 1})
    return sorted(hits.values(), key=lambda hit: (-hit["_pypi_ordering"], hit["name"]))


# ==================================================================================================
# 20  For installers
#
# Simple pages as HTML and JSON, project lists, files and their metadata, and PyPI's JSON: each
# renderer beside its endpoint.
# ==================================================================================================


class Rendered:
    """A page ready to send: its bytes, their ETag, and the gzipped bytes, made on first use."""

    def __init__(self, body, label, page, index):
        self.body = body
        self.stale, self.expires, self.serial = page.stale, page.expires, page.serial_for(index)
        self.etag = f"{hashlib.sha256(body).hexdigest()[:32]}-{label}"
        self.zipped, self.lock = None, threading.Lock()

    def gzip(self):
        with self.lock:
            if self.zipped is None:
                # level 3: half the time of level 6, for 6 % more bytes
                self.zipped = gzip.compress(self.body, 3, mtime=0)
        return self.zipped


def link_prefix(requested, origin, depth, absolute):
    """The start of links to files of `origin`, before `+f/...`.

    The page is `depth` folders below the index `requested`. `absolute`: the URL of our root, or ""
    for relative links."""
    if absolute:
        return f"{absolute}/{quoted(origin.path)}/"
    if origin.path == requested.path:
        return "../" * depth
    if origin.user == requested.user:
        return "../" * (depth + 1) + quoted(origin.name) + "/"
    return "../" * (depth + 2) + quoted(origin.path) + "/"


def page_versions(page):
    """All versions of a page, normalised, each once (PEP 700)."""
    files = (file.version for _, files in page.parts for file in files if file.version)
    return list(dict.fromkeys(canonical_version(version) for version in (*page.versions, *files)))


def json_page(page, prefix, serial):
    """The page as JSON (PEP 691, 700, 714, 740, 792).

    `prefix(index)`: the start of links, see `link_prefix`; `serial`: upstream's."""
    meta = {"api-version": API_VERSION, **({"_last-serial": serial} if serial else {})}
    content = {"meta": meta, "name": page.name, "versions": page_versions(page)}
    if page.status != ACTIVE:
        word, reason = page.status
        content["project-status"] = {"status": word, **({"reason": reason} if reason else {})}
    entries = []
    for origin, files in page.parts:
        before = prefix(origin)
        entries += [_json_entry(before, file) for file in files]
    head = json.dumps(content, separators=(",", ":"))
    return f'{head[:-1]},"files":[{",".join(entries)}]}}'.encode()


_json_text = json.encoder.encode_basestring_ascii


def _json_entry(before, file):
    """A file of a JSON page. json.dumps would take 4 of the 18 ms of rendering 2,000 files."""
    hashes = ",".join(f'"{algorithm}":"{digest}"' for algorithm, digest in file.hashes.items())
    text = (f'{{"filename":{_json_text(file.filename)},'
            f'"url":{_json_text(before + quoted(file.path))},"hashes":{{{hashes}}}')

    if file.requires_python:
        text += f',"requires-python":{_json_text(file.requires_python)}'
    if file.core_metadata:
        text += ',"core-metadata":' + ("true" if file.core_metadata == "true"
                                       else f'{{"sha256":"{file.core_metadata}"}}')
    if file.yanked is not None:
        text += f',"yanked":{_json_text(file.yanked) if file.yanked else "true"}'
    if file.size is not None:
        text += f',"size":{file.size}'
    text += f',"upload-time":{_json_text(file.uploaded)}'
    if file.first_seen:
        text += ',"_upload-time-source":"first-seen"'
    if file.provenance:
        text += f',"provenance":{_json_text(file.provenance)}'
    return text + "}"


def html_page(index, page, prefix, for_people):
    """The page as HTML (PEP 503, 592, 658, 714, 740, 792).

    `for_people`: the newest version first, and a note on files that are not shown."""
    rows = [(origin, file) for origin, files in page.parts for file in files]
    if for_people:
        rows.sort(key=lambda row: (version_key(row[1].version), row[1].filename), reverse=True)

    prefixes = {origin.path: html.escape(prefix(origin)) for origin, _ in page.parts}
    title = html.escape(f"{index.path}: links for {page.name}")
    lines = ['<!DOCTYPE html><html lang="en"><head>'
             f'<meta name="pypi:repository-version" content="{API_VERSION}">']
    if page.status != ACTIVE:
        word, reason = page.status
        lines.append(f'<meta name="pypi:project-status" content="{word}">')
        if reason:
            lines.append('<meta name="pypi:project-status-reason" '
                         f'content="{html.escape(reason)}">')
    lines.append(f"<title>{title}</title></head><body><h1>{title}</h1>\n")
    if for_people and page.blocked:
        lines.append("<p>The project exists on a private index, so files of the mirror "
                     f"{html.escape(page.blocked.path)} "
                     "are not shown (<code>mirror_whitelist</code> would allow them).</p>\n")

    for origin, file in rows:
        lines.append(f"{html.escape(origin.path)} {_anchor(prefixes[origin.path], file)}<br>\n")
    lines.append("</body></html>\n")
    return "".join(lines).encode()


def _anchor(prefix, file):
    spec = f"sha256={file.sha256}" if file.sha256 else file.hash_spec       # a link holds one hash
    link = f"{prefix}{quoted(file.path)}#{spec}".rstrip("#")
    attributes = [f'href="{link}"']     # `quoted` leaves nothing for HTML to escape
    if file.requires_python:
        attributes.append(f'data-requires-python="{html.escape(file.requires_python)}"')
    if file.yanked is not None:
        attributes.append(f'data-yanked="{html.escape(file.yanked)}"')
    if file.core_metadata:
        value = "true" if file.core_metadata == "true" else f"sha256={file.core_metadata}"
        attributes.append(f'data-core-metadata="{value}" data-dist-info-metadata="{value}"')
    if file.provenance:
        attributes.append(f'data-provenance="{html.escape(file.provenance)}"')
    return f"<a {' '.join(attributes)}>{html.escape(file.filename)}</a>"


# -- PyPI's JSON API


def pypi_json(page, releases, version, metadata, root, with_releases):
    """PyPI's JSON document of a project, or of one version.

    `version` and `metadata`: of the version shown; `releases`: see `files_by_version`;
    `root(index)`: the absolute URL of an index."""
    files = {each: [_pypi_file(root(origin), file) for origin, file in rows
                    if not file.filename.lower().endswith(VARIANTS)]
             for each, rows in releases.items() if with_releases or each == version}
    home = f"{root(page.parts[0][0])}/{page.name}"
    content = {"info": _pypi_info(metadata, page.name, version, files[version], home),
               "last_serial": page.upstream_serial or 0,
               "ownership": {"organization": None, "roles": []},
               **({"releases": files} if with_releases else {}),
               "urls": files[version], "vulnerabilities": []}
    return json.dumps(content, separators=(",", ":")).encode()


def _pypi_info(metadata, name, version, files, home):
    info = {field: metadata.get(field) or "" for field in (
        "author", "author_email", "description", "description_content_type", "download_url",
        "home_page", "keywords", "license", "maintainer", "maintainer_email", "requires_python",
        "summary")}
    urls = (entry.partition(",")[::2] for entry in metadata.get("project_urls") or ())
    yanked = [file["yanked_reason"] for file in files] \
        if files and all(file["yanked"] for file in files) else None

    return {
        **info, "name": metadata.get("name") or name, "version": version,
        "bugtrack_url": None, "docs_url": None,
        "classifiers": metadata.get("classifiers") or [], "dynamic": metadata.get("dynamic") or [],
        "downloads": {"last_day": -1, "last_month": -1, "last_week": -1},
        "license_expression": metadata.get("license_expression") or None,
        "license_files": metadata.get("license_file") or [],
        "package_url": f"{home}/", "project_url": f"{home}/",
        "release_url": f"{home}/{quoted(version)}/",
        "platform": ",".join(metadata.get("platform") or ()),
        "project_urls": {label.strip(): url.strip() for label, url in urls
                         if label.strip() and url.strip()},
        "provides_extra": metadata.get("provides_extras") or [],
        "requires_dist": metadata.get("requires_dist") or None,
        "yanked": yanked is not None, "yanked_reason": next(iter(yanked or ()), None)}


def _pypi_file(root, file):
    python, kind = upload_kind(file.filename)
    if kind == "bdist_wheel":
        python = python_tag(file.filename)
    digests = {name: digest for name, digest in file.hashes.items() if name in ("md5", "sha256")}
    return {
        "comment_text": "", "digests": digests, "downloads": -1, "filename": file.filename,
        "has_sig": False, "md5_digest": digests.get("md5"), "packagetype": kind,
        "python_version": python, "requires_python": file.requires_python, "size": file.size,
        "upload_time": file.uploaded[:19], "upload_time_iso_8601": file.uploaded,
        "url": f"{root}/{quoted(file.path)}", "yanked": file.yanked is not None,
        "yanked_reason": file.yanked or None,
        **({"core-metadata": True if file.core_metadata == "true"
            else {"sha256": file.core_metadata}} if file.core_metadata else {})}


# -- files


_CONTENT_TYPES = ((".tar.gz", "application/x-tar"), (".tgz", "application/x-tar"),
                  (".tar.bz2", "application/x-tar"), (".zip", "application/zip"),
                  (VARIANTS, "application/json"))


def content_type(filename):
    return next((type_ for ending, type_ in _CONTENT_TYPES if filename.endswith(ending)),
                "application/octet-stream")


@route("GET PUT PUSH PATCH", "/{user}/{index}/{file}[/]", for_="installer", may="read")
def get_file(request, index, file):
    """A distribution file, its facts as JSON, or its metadata file [W14]."""
    app, path = request.app, file
    if path.endswith(".metadata"):
        return serve_metadata_file(request, index, path[:-len(".metadata")])

    place = app.projects.find_file(index, path)
    file = place.file
    is_json = path.lower().endswith(VARIANTS)       # accepting JSON then means the file itself
    if "application/json" in request.accept and not is_json:
        return file_facts(request, file, place.project)

    with problems_as_json() if file.url else contextlib.nullcontext():
        content = app.projects.open(index, place, for_head=request.method == "HEAD")
        if content.url:
            return redirect(content.url)
        type_ = content_type(file.filename)
        if content.sha256:
            tags = frozenset((project_tag(index.id, place.project),))
            return blob_response(request, index, content, type_, tags)

    headers = [("Content-Type", type_), NOSNIFF]
    if request.method != "HEAD":
        headers.append(("X-Accel-Buffering", "no"))
    if content.last_modified:
        headers.append(("Last-Modified", content.last_modified))
    return Response(200, headers, stream=_with_json_problems(content.pieces), length=content.size)


def _with_json_problems(pieces):
    with problems_as_json():
        yield from pieces


def file_facts(request, file, project):
    """devpi's JSON of a file."""
    facts = {"hash_spec": file.hash_spec, "hashes": file.hashes, "project": project,
             "version": file.version}
    if file.size is not None:
        facts["size"] = file.size
    if file.url:
        facts["url"] = file.url
    if file.url is None:
        facts["last_modified"] = file.last_modified or http_date(seconds_of(file.uploaded))
    elif file.last_modified:
        facts["last_modified"] = file.last_modified

    if request.result_version() == 2:
        del facts["hash_spec"]
        if "last_modified" in facts:
            facts["last_modified"] = plain_date(facts["last_modified"])
    return result_response("releasefilemeta", facts)


def serve_metadata_file(request, index, path):
    """The metadata file of a wheel (PEP 658), byte for byte as in the wheel."""
    app = request.app
    place = app.projects.find_file(index, path)
    sha256, data = app.projects.open_metadata(index, place)
    tags = frozenset((project_tag(index.id, place.project),))
    etag, validators = blob_validators(index, sha256)
    if none_match(request.header("if-none-match"), etag):
        return Response(304, validators, tags=tags)

    headers = [("Content-Type", "application/octet-stream"), NOSNIFF,
               ("Last-Modified", http_date(seconds_of(place.file.uploaded))),
               *validators, ("Accept-Ranges", "bytes")]
    status, start, end = chosen_range(request, headers, etag, len(data))
    return Response(status, headers, data[start:end], tags=tags if status != 416 else None)


# -- simple pages


@route("GET", "/{user}/{index}/+simple", for_="people", may="anybody")
@route("GET", "/{user}/{index}/+simple/{project}", for_="people", may="anybody",
       other_names="redirect ASCII")
def redirect_to_slash(request, index, project=None):
    """Redirect to the URL with a final slash, which checks the permission."""
    response = redirect(request.url(request.path[1:] + "/"))
    response.headers.append(("Vary", "Accept, User-Agent" if project else "User-Agent"))
    return response


@route("POST", "/{user}/{index}/+simple/{project}/refresh", for_="json", may="read")
def refresh_project(request, index, project):
    """devpi: have each readable mirror in the resolution order fetch the project's page again."""
    app = request.app
    if app.settings.offline_mode:
        raise Conflict(f"The project {project} is not refreshed: "
                       "in offline mode upstream is not asked.")
    mirrors = [member for member in app.projects.mirrors_in(index)
               if member is index or app.permissions.read(request.identity, member)]
    app.mirrors.pages.refresh(mirrors, project)
    return redirect(request.url(f"{index.path}/+simple/{project}/"))


@route("GET", "/{user}/{index}/+simple/{project}/", for_="installer", may="read",
       other_names="redirect ASCII")
@route("GET", "/{user}/{index}/+simple/{project}", for_="installer", may="read",
       other_names="redirect ASCII")
@route("GET", "/{user}/{index}/+simple/{project}", for_="simple json", may="read",
       other_names="redirect ASCII")
@route("GET", "/{user}/{index}/{project}[/]", for_="installer", may="read",
       other_names="redirect ASCII")
def get_simple_project(request, index, project):
    """A project's files for installers (PEP 503, 691, 700)."""
    app, form = request.app, request.simple_format
    depth = request.path.count("/") - 3     # in folders below the index's URL
    for_people = form == "text/html" and not request.is_installer
    absolute = ""
    if app.settings.absolute_urls or "x-devpi-absolute-urls" in request.headers:
        absolute = request.base_url
    tags, hidden = app.projects.tags(index, project), hidden_members(request, index)

    def render():
        page = app.projects.page(index, project, hidden)
        if not page.known:
            refuse_unknown(request, index, project, hidden)
        request.claim(Limits.file_cost * sum(len(files) for _, files in page.parts))
        prefix = functools.partial(link_prefix, index, depth=depth, absolute=absolute)
        if form == SIMPLE_JSON:
            return Rendered(json_page(page, prefix, page.serial_for(index)), "json", page, index)
        label = "html" if form == "text/html" else "v1html"
        return Rendered(html_page(index, page, prefix, for_people), label, page, index)

    key = (index.id, project, form, for_people, depth, absolute,
           tuple(member.id for member in hidden))
    return _page_response(request, index, app.rendered(request, key, tags, render), form, tags)


def _page_response(request, index, rendered, form, tags):
    """A rendered page with its validators; gzipped if the client accepts that; or 304."""
    headers = _simple_headers(form)
    etag, body = f'"{rendered.etag}"', rendered.body
    zipped = len(body) > 1024 and _quality_of_gzip(request.header("accept-encoding")) > 0
    if zipped:
        etag = f'"{rendered.etag}-gzip"'

    # if a member is restricted, the page depends on the user
    private = any(member.restricted for member in request.app.indexes.order(index))
    if rendered.stale:
        now = http_date(time.time())
        headers += [("Cache-Control", "max-age=0, must-revalidate, no-cache, no-store"),
                    ("Pragma", "no-cache"), ("Expires", now), ("Last-Modified", now)]
        tags = None
    else:
        page_age = request.app.projects.at(index).page_age
        age = "no-cache" if page_age is None else f"max-age={page_age}"
        headers.append(("Cache-Control", f"private, {age}" if private else age))
    headers.append(("ETag", etag))
    if rendered.serial:
        headers.append(("X-PYPI-LAST-SERIAL", str(rendered.serial)))

    if none_match(request.header("if-none-match"), etag):
        kept = [(name, value) for name, value in headers
                if name in ("ETag", "Cache-Control", "Vary")]
        return Response(304, kept, tags=tags, expires=rendered.expires)
    if zipped:
        headers.append(("Content-Encoding", "gzip"))
        body = rendered.gzip()
    return Response(200, headers, body, tags=tags, expires=rendered.expires)


def _simple_headers(form):
    return [("Content-Type", HTML if form == "text/html" else form),
            ("Vary", "Accept, Accept-Encoding, User-Agent")]


def _quality_of_gzip(header):
    ranges = accept_ranges(",".join("x/" + coding.strip() for coding in header.split(",")))
    return ranges.get("x/gzip", ranges.get("x/*", 0))


@route("GET", "/{user}/{index}/+simple/", for_="installer", may="read")
@route("GET", "/{user}/{index}/+simple", for_="installer", may="read")
@route("GET", "/{user}/{index}/+simple", for_="simple json", may="read")
@route("GET", "/{user}/{index}[/]", for_="installer", may="read")
@route("GET", "/{user}/{index}[/]", for_="simple json", may="read")
def get_simple_list(request, index):
    """All project names of an index and its bases, each once (PEP 503, 691)."""
    app = request.app
    members = [member for member in app.indexes.order(index)
               if member is index or app.permissions.read(request.identity, member)]

    lists, stale = [], False
    for member, names in app.projects.lists(members):
        if not isinstance(names, Problem):
            lists.append((member, names))
        elif member.path == index.path:
            raise names
        else:
            log.warning("the project list of %s is left out: %s", member.path, names.message)
            stale = True

    whole = max((names for _, names in lists if isinstance(names, MirrorNames)),
                key=lambda names: names.count, default=None)
    lists = _each_name_once(app, lists, whole)
    if whole is None:
        return _small_list(request, index, lists, stale)
    private = any(member.restricted for member in members)
    return _large_list(request, index, lists, whole,
                       "private, no-cache" if private else "no-cache")


def _small_list(request, index, lists, stale):
    """A project list without a mirror's list on disk; kept if no mirror is in the order."""
    form = request.simple_format
    names = [name for _, names in lists for name in names]
    if form == SIMPLE_JSON:
        label, body = "json", _list_in_one("projects.json", names)
    elif form == SIMPLE_HTML or request.is_installer:
        label, body = ("v1html" if form == SIMPLE_HTML else "html",
                       _list_in_one("projects.html", names))
    else:
        label, body = "people", b"".join(_list_for_people(request, index, lists, None))

    page = ProjectPage("", tuple((member, ()) for member, _ in lists), stale=stale)
    order = request.app.indexes.order(index)
    tags = frozenset(names_tag(member.id) for member in order)
    keep = len(lists) == len(order) and not request.app.projects.mirrors_in(index)
    return _page_response(request, index, Rendered(body, label, page, index), form,
                          tags if keep else None)


def _list_in_one(form, names):
    """A project list as one page; `form`: a key of LIST_PAGE."""
    head, _, tail = LIST_PAGE[form]
    return (head + list_entries(form, names) + tail).encode()


def _large_list(request, index, lists, whole, caching):
    """A project list most of which is a file on disk: `whole`, the largest mirror's list."""
    form = request.simple_format
    entries = "projects.json" if form == SIMPLE_JSON else "projects.html"
    headers = [*_simple_headers(form), ("Cache-Control", caching)]
    own = [name for _, names in lists if names is not whole for name in names]
    is_own = any(names is whole and member.path == index.path for member, names in lists)
    if whole.serial and is_own:
        headers.append(("X-PYPI-LAST-SERIAL", str(whole.serial)))
    for_people = form == "text/html" and not request.is_installer and not is_own

    etag = f'"{hashlib.sha256(repr(own).encode()).hexdigest()[:16]}-' \
           f'{os.path.basename(whole.folder)}-{"people" if for_people else form[-4:]}'
    if not own and not for_people and _quality_of_gzip(request.header("accept-encoding")) > 0:
        headers.append(("Content-Encoding", "gzip"))
        return parts_response(request, headers, etag + '-gzip"', [whole.part(entries + ".gz")])
    if for_people:
        return parts_response(request, headers, etag + '"',
                              list(_list_for_people(request, index, lists, whole)))

    head, separator, tail = LIST_PAGE[entries]
    before = head + list_entries(entries, own) + (separator if own and whole.count else "")
    return parts_response(request, headers, etag + '"',
                          [before.encode(), whole.part(entries), tail.encode()])


def _each_name_once(app, lists, whole):
    """The lists, without names of an earlier list or of `whole`, which is sent as it is."""
    result, seen = [], set()
    for member, names in lists:
        if names is not whole:
            if isinstance(names, MirrorNames):
                names = _only_in(app, names, whole)
            elif whole is not None:
                names = whole.without(names)
            names = [name for name in names if name not in seen]
            seen.update(names)
        result.append((member, names))
    return result


def _only_in(app, names, whole):
    """`MirrorNames.only_in`, kept: it compares lists of a million names."""
    key = ("only in", names.folder, whole.folder)
    kept = app.pages.get(key)
    if kept is None:
        kept = "\n".join(names.only_in(whole))        # much smaller than a list of strings
        freshness = app.store.freshness
        freshness.keep(app.pages, key, kept, len(kept), frozenset(), freshness.moment())
    return kept.split("\n") if kept else []


def _list_for_people(request, index, lists, whole):
    """The project list for people, by index: byte strings, and the path of `whole`'s file."""
    title = html.escape(f"{index.path}: simple list (including inherited indices)")
    head = LIST_PAGE["projects.html"][0].replace("Simple index", title)
    yield f"{head}<h1>{title}</h1>\n".encode()
    for member, names in lists:
        bases = ",".join(shown_bases(request, member))
        yield (f"<h2>{html.escape(member.path)}"
               f"{html.escape(f' (bases: {bases})') if bases else ''}</h2>\n").encode()
        if names is whole:
            yield whole.part("projects.html")
        else:
            yield "".join([f'<a href="{name}/">{name}</a><br>\n' for name in names]).encode()
    yield b"</body></html>\n"


@route("GET", "/{user}/{index}/+pypi/{project}/json", for_="json", may="read")
@route("GET", "/{user}/{index}/pypi/{project}/json", for_="json", may="read")
@route("GET", "/{user}/{index}/+pypi/{project}/{version}/json", for_="json", may="read")
@route("GET", "/{user}/{index}/pypi/{project}/{version}/json", for_="json", may="read")
def get_pypi_json(request, index, project, version=None):
    """PyPI's JSON API [W12.5], over an index and its bases."""
    app = request.app
    tags, hidden = app.projects.tags(index, project), hidden_members(request, index)

    def render():
        page = app.projects.page(index, project, hidden)
        releases = files_by_version(page)
        shown = latest_version(releases) if releases and version is None else version
        shown = shown and next(iter(spellings(shown, releases)), shown)
        if shown not in releases:
            if not page.known:
                refuse_unknown(request, index, project, hidden, f"no project '{project}'")
            raise NotFound(f"The project {project} has no releases." if shown is None else
                           f"The version {shown} of project {project} does not exist.")

        metadata, complete = app.projects.metadata(
            page, shown, lambda size: request.claim(Limits.response_cost * size))
        body = pypi_json(page, releases, shown, metadata,
                         lambda origin: request.url(origin.path), version is None)
        rendered = Rendered(body, "pypi", page, index)
        rendered.stale |= not complete
        return rendered

    key = (index.id, project, version, "pypi", request.base_url,
           tuple(member.id for member in hidden))
    return _page_response(request, index, app.rendered(request, key, tags, render),
                          "application/json", tags)


# ==================================================================================================
# 21  For devpi clients
#
# devpi's JSON contract: users, indexes, projects, uploads, pushes, test results, removal. Words of
# the wire are translated here to the model's.
# ==================================================================================================


# -- discovery and login


@route("ANY", "/+api", for_="program", may="anybody")
@route("ANY", "/{user}/+api", for_="program", may="anybody")
@route("ANY", "/{user}/{index}/+api", for_="program", may="anybody")
def get_api(request, user=None, index=None):
    """devpi: the URLs that the devpi client needs, and its login [W5.1, W5.2]."""
    identity = request.identity
    known = identity.user is not None
    result = {"login": request.url("+login"),
              "authstatus": (["ok", identity.user, list(identity.groups)] if known
                             else ["noauth", "", []]),
              "features": ["projectconfig-v2", "push-no-docs", "push-only-docs",
                           "push-register-project", "server-keyvalue-parsing"]}
    if index is not None:
        result["index"] = request.url(index.path)
        result["simpleindex"] = request.url(f"{index.path}/+simple/")
        if not index.is_mirror:
            result["pypisubmit"] = request.url(index.path + "/")
    return result_response("apiconfig", result)


@route("POST", "/+login", for_="program", may="anybody")
def log_in(request):
    """devpi: a session token for a name and a password."""
    body = request.json(dict)
    user, password = body.get("user"), body.get("password")
    if user is None or password is None:
        raise BadRequest("Bad request: no user/password specified")
    if not isinstance(user, str) or not isinstance(password, str):
        raise BadRequest("Bad request: user and password must be strings")

    logins = request.app.logins
    identity = logins.check(user, password, request.address, is_login=True)
    if identity.wait:
        raise TooManyLogins(identity.wait)
    if identity.user is None or logins.tokens.check(user, password):
        raise Unauthorized(f"user '{user}' could not be authenticated", challenge=False)
    return result_response("proxyauth", _fresh_token(request, user), message="login successful")


def _fresh_token(request, user):
    return {"password": request.app.logins.tokens.issue(request.app.users.get(user)),
            "expiration": Limits.session}


# -- users


@route("GET", "/{user}[/]", for_="json", may="anybody")
def get_user(request, user):
    """devpi: a user and its indexes."""
    account = request.app.users.get(user)
    request.result_version()
    return result_response("userconfig",
                           shown_user(request, account, request.app.indexes.all(user)))


def shown_user(request, account, indexes):
    """devpi's user object, with the indexes that the caller may read.

    The e-mail address is for callers who are logged in or on this machine."""
    shown = {"username": account.name, "created": account.created, **account.attributes}
    shown.pop(FROM_DEVPI, None)
    if request.identity.user is None and not request.is_local:
        shown.pop("email", None)
    if account.modified:
        shown["modified"] = account.modified
    shown["indexes"] = {index.name: shown_config(request, index, in_list=True) for index in indexes
                        if request.app.permissions.read(request.identity, index)}
    return shown


@route("PUT", "/{user}[/]", for_="json", may="create user")
def create_user(request, user):
    """devpi: make a user."""
    app = request.app
    if app.users.find(user):
        raise Conflict("user already exists")
    if request.identity.user is None and not request.is_local:
        app.logins.throttle.count_new_user(request.address)

    may_inherit = app.permissions.user_create_named(request.identity)
    if not may_inherit:
        # before the password is hashed; the change checks it again
        with app.store.read() as db:
            refuse_inheritance(db, user)
    body = json_still(request, "create user", user, dict, limit=Limits.config_body)
    account = app.users.create(user, body, actor=request.actor, may_inherit=may_inherit)
    return result_response("userconfig", shown_user(request, account, ()), 201)


@route("PATCH", "/{user}[/]", for_="json", may="as the body says")
def modify_user(request, user):
    """devpi: change a user; a new password comes with a new session token."""
    app = request.app
    account, body = app.users.get(user), request.json(dict, limit=Limits.config_body)
    request.recheck_identity()
    # devpi's client sends all keys that it has read, not only the new ones
    changed = {key for key, value in body.items()
               if key not in ("username", "created", "modified", "indexes")
               and account.attributes.get(key) != value}
    may = "change password" if changed == {"password"} else "modify user"
    require(request, may, user)

    account = app.users.modify(user, body, actor=request.actor)
    if body.get("password") is None:
        return message_response("user updated")
    if user == "root":
        forget_root_password(app.settings.serverdir)
    token = {"password": app.logins.tokens.issue(account), "expiration": Limits.session}
    return result_response("userpassword", token, message="user updated, new proxy auth")


@route("DELETE", "/{user}[/]", for_="json", may="delete user")
def delete_user(request, user):
    """devpi: delete a user with all indexes."""
    request.write(remove_user, user, "force" in request.query,
                  functools.partial(may_read, request))
    return message_response(f"user '{user}' deleted")


@route("GET", "/", for_="json", may="anybody")
def get_root(request):
    """devpi: all users with their indexes."""
    app = request.app
    request.result_version()
    with app.store.read() as db:
        size = db.execute("SELECT (SELECT sum(length(attributes)) FROM users) + "
                          "(SELECT coalesce(sum(length(config)), 0) FROM indexes)").fetchone()[0]
    request.claim(Limits.response_cost * size)

    with app.store.read() as db:
        accounts = [account_of(row) for row in db.execute("SELECT * FROM users ORDER BY name")]
    indexes = collections.defaultdict(list)
    for index in app.indexes.all():
        indexes[index.user].append(index)
    return result_response("list:userconfig", {
        account.name: shown_user(request, account, indexes[account.name]) for account in accounts})


def forget_root_password(serverdir):
    """Delete the file with root's first password, which holds no longer."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(serverdir, "root-password"))


# -- indexes


@route("GET", "/{user}/{index}[/]", for_="json", may="read")
def get_index(request, index):
    """devpi: an index's configuration and projects."""
    app = request.app
    config = shown_config(request, index)
    if "no_projects" in request.query:
        return result_response("indexconfig", config)

    try:
        names = app.projects.at(index).names()
    except (UpstreamTrouble, Busy) as problem:      # the configuration is useful without them
        log.warning("mirror %s: %s", index.path, problem.message)
        names = ()
    if not isinstance(names, MirrorNames):
        return result_response("indexconfig", {**config, "projects": sorted(names)})

    before = json.dumps(
        {"type": "indexconfig", "result": {**config, "projects": []}})[:-len("]}}")]
    return parts_response(request, [("Content-Type", "application/json"), *PERSONAL],
                          f'"{secrets.token_hex(8)}"',
                          [before.encode(), names.part("names.json"), b"]}}\n"])


def shown_config(request, index, in_list=False):
    """An index's configuration as the caller may see it.

    Only callers who may modify the index see credentials in URLs; nobody sees the webhook's secret.

    `in_list`: without bases that the caller may not read. Otherwise all bases are named, so that a
    client knows whether it needs a login for their files. `?v=2` asks for devpi 7's words."""
    config = {key: value for key, value in index.config.items()
              if key not in ("webhook_secret", FROM_DEVPI)}
    if not request.app.permissions.index_modify(request.identity, index.user):
        if in_list and "bases" in config:
            config["bases"] = shown_bases(request, index)
        if "mirror_url" in config:
            config["mirror_url"] = public_url(config["mirror_url"])
        if "uploadtrigger_jenkins" in config:
            config["uploadtrigger_jenkins"] = url_origin(config["uploadtrigger_jenkins"]) + "/..."
        if "webhook_url" in config:
            config["webhook_url"] = [url_origin(url) + "/..." for url in config["webhook_url"]]
    return in_newer_words(config) if request.result_version() == 2 else config


@route("PUT", "/{user}/{name}[/]", for_="json", may="create index")
def create_index(request, user, name):
    """devpi: make an index."""
    app = request.app
    body = json_still(request, "create index", user, dict, limit=Limits.config_body)
    request.result_version()        # before anything changes
    created = app.indexes.create(user, name, body, actor=request.actor,
                                 may_inherit=app.permissions.user_create_named(request.identity),
                                 may_read=functools.partial(may_read, request))
    return _config_response(request, created, {})


@route("PATCH", "/{user}/{index}[/]", for_="json", may="modify index")
def modify_index(request, index):
    """devpi: change an index's configuration."""
    body = json_still(request, "modify index", index, dict, list, limit=Limits.config_body)
    request.result_version()        # before anything changes
    modified = request.app.indexes.modify(
        index, body, "error_on_noop" in request.query, actor=request.actor,
        may_read=functools.partial(may_read, request))
    return _config_response(request, modified, index.config)


def _config_response(request, index, before):
    """An index's configuration after a change, with a message on users that do not exist.

    Clients print the message."""
    strange = request.app.indexes.unknown_users(index, before)[:10]
    for sentence in strange:
        log.warning("index %s: %s", index.path, sentence)
    return result_response("indexconfig", shown_config(request, index),
                           message="; ".join(strange) or None)


@route("DELETE", "/{user}/{index}[/]", for_="json", may="delete index")
def delete_index(request, index):
    """devpi: delete an index."""
    request.write(remove_index, index, "force" in request.query,
                  functools.partial(may_read, request))
    return message_response(f"index {index.path} deleted", 201)


# -- projects and versions


@route("GET", "/{user}/{index}/{project}[/]", for_="json", may="read")
def get_project(request, index, project):
    """devpi: all versions of a project with their metadata and files."""
    ignore_bases = "ignore_bases" in request.query
    known, versions, found = version_objects(request, index, project, ignore_bases)
    if not known:
        raise request.app.projects.unknown(index, project, f"no project '{project}'")
    if request.result_version() == 1:
        return result_response("projectconfig", versions)

    if ignore_bases:
        found = request.app.projects.contributions(
            index, project, None, hidden=hidden_members(request, index), asks=False)
    config = project_config(request, index, project)
    if not (request.app.projects.at(index).has(project) or "inheritance_rules" in config):
        config = {}
    return result_response("projectconfig_v2", {
        "config": config, "inheritance_info": inheritance_info(found, project),
        "versions": versions})


def project_config(request, index, project):
    """devpi 7's configuration of a project: its name and its own rule."""
    with request.app.store.read() as db:
        config = {"name": spelling_of(db, index, project)}
    if project in index.config.get("mirror_whitelist", ()):
        config["inheritance_rules"] = list(ALLOW_ALL)
    return config


_HAS_PROJECT = {True: "true", False: "false", None: "unknown"}


def inheritance_info(found, project):
    """devpi 7's account of how `Contributions` were found: whom the walk met, and what it did."""
    steps = found.steps()
    at_mirrors = [step for step in steps if step.asks_upstream and step.action != "postponed"]
    from_mirror = at_mirrors[0].has_project if at_mirrors else False
    return {"has_project_from_remote": _HAS_PROJECT[from_mirror],
            "index_bases": found.index_bases(),
            "traversal_infos": [_traversal_info(step, project) for step in steps]}


def _traversal_info(step, project):
    """A `Step` in devpi 7's words."""
    path, cause, action, reason = step.path, step.cause, step.action, None
    package = f"package {project!r}"
    if action == "asked":
        action = "allowed" if cause else "untrusted" if step.asks_upstream else "traversed"
        if cause:
            reason = (f"{package} {cause.word} 'allow all' from {cause.path} "
                      f"allows merging releases from index {path}")
    elif action == "blocked":
        where = {"project": f"located in {cause.path}",
                 "missing": f"may have been located in {cause.path}, which does not exist, and",
                 "unreadable": "may be located in an index that you may not read, and"}[cause.word]
        reason = f"{package} {where} blocks releases from index {path}"
    elif action == "skipped":
        reason = f"skipped {path} " + ("because it does not exist" if cause.word == "missing"
                                       else "due to an inheritance cycle")

    has_project = _HAS_PROJECT[step.has_project] if step.action == "asked" else "notset"
    return {"action": action, "name": path, **({"reason": reason} if reason else {}),
            "has_project": has_project}


@route("GET", "/{user}/{index}/{project}/{version}[/]", for_="json", may="read")
def get_version(request, index, project, version):
    """devpi: one version of a project."""
    ignore_bases = "ignore_bases" in request.query
    known, versions, _ = version_objects(request, index, project, ignore_bases, version)
    if not known:
        raise request.app.projects.unknown(index, project, f"no project '{project}'")
    if version not in versions:
        raise NotFound(f"The version {version} of project {project} does not exist.")
    request.result_version()
    return result_response("versiondata", versions[version])


def version_objects(request, index, project, ignore_bases, only=None):
    """(whether the project is known, {version: devpi's version object}, `Contributions`) of an
    index and its bases [W12.1].

    `ignore_bases`: of the index alone, without contributions. `only`: a version; each index's
    releases under other spellings of it are merged with it."""
    app = request.app
    hidden = () if ignore_bases else hidden_members(request, index)
    found = None if ignore_bases else app.projects.contributions(index, project, None,
                                                                 hidden=hidden)
    releases = app.projects.releases(
        index, project, only, found, lambda size: request.claim(Limits.response_cost * size))
    known = releases is not None
    if not known and ignore_bases:
        known = any(app.projects.at(member).has(project) for member in app.indexes.order(index)
                    if app.permissions.read(request.identity, member))
    elif not known and hidden:
        refuse_unknown(request, index, project, hidden)

    versions = {}
    for release in releases or ():
        content, version = _version_object(request, release), only or release.version
        if version in versions:
            versions[version].setdefault("+shadowing", []).append(content)
        else:
            versions[version] = content
    return known, versions, found


def _version_object(request, release):
    """devpi's version object of a release; its README is a `LazyPart`."""
    shown = release.shown
    if release.readme:
        read = functools.partial(release.readme.pieces, request.app.store)
        shown["description"] = LazyPart(release.readme.size, read)
    if release.yanked is not None:
        shown.setdefault("yanked", release.yanked or True)
    links = _links(request, release)
    return {**shown, "+links": links} if links else shown


def _links(request, release):
    """devpi's `+links` of a release: its files, documentation and test results."""
    index, links, newer = release.index, [], request.result_version() == 2
    paths = {file.id: file.path for file in release.files}
    files = sorted((*release.files, *release.attached), key=lambda file: file.id) \
        if release.attached else release.files      # a mirror's: in upstream's order
    for file in files:
        link = {"rel": file.kind,
                **({"relpath": file.path} if newer else {"hash_spec": file.hash_spec}),
                "hashes": file.hashes, "href": request.url(f"{index.path}/{file.path}")}
        if file.for_id:
            tested = paths[file.for_id]
            link["for_href"] = request.url(f"{index.path}/{tested}")
            if newer:
                link["for_relpath"] = tested
        if file.history:
            link["log"] = [_shown_entry(request, entry, newer)
                           for entry in json.loads(file.history)]
        links.append(link)
    return links


def _shown_entry(request, entry, newer):
    """An entry of a file's history, without the names of indexes that the caller may not read.

    `newer`: with the time as devpi 7 writes it."""
    shown = dict(entry)
    if newer and isinstance(entry["when"], list):
        shown["when"] = "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z".format(*entry["when"])
    for end in ("src", "dst"):
        index = request.app.indexes.find(entry[end]) if end in entry else None
        if index and not request.app.permissions.read(request.identity, index):
            shown[end] = None
    return shown


@route("PATCH", "/{user}/{index}/{project}/{version}[/]", for_="json", may="delete files")
def modify_version(request, index, project, version):
    """`{"yanked": true | "reason" | false}`: yank or unyank all files of a release (PEP 592)."""
    body = json_still(request, "delete files", index, dict)
    yanked = body.get("yanked")
    if set(body) != {"yanked"} or not isinstance(yanked, (bool, str)):
        raise BadRequest('expected {"yanked": true}, {"yanked": "the reason"} or {"yanked": false}')
    reason = None if yanked is False else yank_reason("" if yanked is True else yanked)
    count = request.write(yank_files, index, project, version, None, reason)
    return _yank_response(count, reason)


@route("PATCH", "/{user}/{index}/{project}[/]", for_="json", may="delete files")
def modify_project(request, index, project):
    """`{"project-status": {"status": "archived", "reason": "..."}}`: set a project's status
    (PEP 792). Other objects, and lists, change its configuration, as in devpi 7 [W12.6]."""
    body = json_still(request, "delete files", index, dict, list)
    if "project-status" in body and isinstance(body, dict):
        return _modify_status(request, index, project, body)

    require(request, "modify index", index)
    edit = ProjectEdit(index, project, body)
    request.result_version()
    is_changed = bool(edit.keys) and request.write(configure_project, index, project, edit.allows)
    if not is_changed and "error_on_noop" in request.query:
        raise BadRequest("The requested modifications resulted in no changes")
    index = request.app.indexes.get(index.path)
    return result_response("projectconfig", project_config(request, index, project))


@route("POST", "/{user}/{name}/{project}[/]", for_="pusher", may="as the body says")
def post_project(request, user, name, project):
    """Change a project's configuration by POST of JSON, as devpi 7 has announced it."""
    if request.content_type != "application/json" and not request.body.begins_with((b"{", b"[")):
        return refuse_upload(request, user, name, project)
    index = request.app.indexes.find(request.index_path)
    require(request, "delete files", index)
    return modify_project(request, index, project)


def _modify_status(request, index, project, body):
    wanted = body["project-status"]
    if set(body) != {"project-status"} or not isinstance(wanted, dict) \
            or set(wanted) - {"status", "reason"}:
        raise BadRequest('expected {"project-status": {"status": "...", "reason": "..."}}')

    status, reason = wanted.get("status"), wanted.get("reason")
    if status not in PROJECT_STATUSES:
        raise BadRequest(f"the status of a project is one of {', '.join(PROJECT_STATUSES)}")
    if not isinstance(reason, (str, type(None))):
        raise BadRequest("the reason of a status is a text")
    reason = yank_reason(reason or "") or None
    request.write(set_status, index, project, Status(status, reason))
    return message_response(f"project {project} on {index.path} is {status}")


_NO_DELETION = "cannot delete version on non-volatile index"


def refusal_to_delete(request, index, usual):
    """The message with which a non-volatile index refuses a deletion: `usual`.

    With `?force` it is None, no refusal, for those who may modify the index."""
    if "force" not in request.query:
        return usual
    if request.app.permissions.index_modify(request.identity, index.user):
        return None
    return (f"index {index.path} is non-volatile: only {index.user} and root may delete from it, "
            "by ?force")


@route("DELETE", "/{user}/{index}/{project}/{version}[/]", for_="json", may="delete files")
def delete_version(request, index, project, version):
    """devpi: delete a release."""
    refusal = refusal_to_delete(request, index, _NO_DELETION)
    note = request.write(remove_version, index, project, version, refusal)
    return _deleted(f"project '{project}' version '{version}' deleted", note)


@route("DELETE", "/{user}/{index}/{project}[/]", for_="json", may="delete files")
def delete_project(request, index, project):
    """devpi: delete a project from an index."""
    refusal = refusal_to_delete(request, index,
                                f"project '{project}' is on non-volatile index {index.path}")
    note = request.write(remove_project, index, project, refusal)
    return _deleted(f"project {project} deleted from stage {index.path}", note)


# -- files and test results


@route("PATCH", "/{user}/{index}/{file}[/]", query="yank unyank", for_="json", may="delete files")
def yank_file(request, index, file):
    """`?yank`, `?yank=reason`, `?unyank` for one file (PEP 592)."""
    query = request.query
    if {"yank", "unyank"} <= set(query):
        raise BadRequest("either ?yank or ?unyank")
    reason = None if "unyank" in query else yank_reason(query["yank"])
    return _yank_response(request.write(yank_files, index, None, None, file, reason), reason)


def yank_reason(value):
    """The reason of a yank, "" for none; BadRequest if it is too long or not one line."""
    if len(value) > Limits.reason or not value.isprintable():
        raise BadRequest(f"a reason is one line of at most {Limits.reason} characters")
    return value.strip()


def _yank_response(count, reason):
    return message_response(f"{count} file{'' if count == 1 else 's'} "
                            f"{'unyanked' if reason is None else 'yanked'}")


@route("POST", "/{user}/{index}/{file}[/]", for_="json", may="test results")
def add_test_result(request, index, file):
    """devpi: a test result of a file, any JSON [W16]."""
    app, user = request.app, request.identity.user
    app.releases.check_tested(index, file, user)
    if user is None:
        refuse_beyond(app.anonymous_results, request, 1)

    request.body.narrow(Limits.test_result)
    with app.blobs.incoming() as incoming:
        for piece in iter(request.body.read, b""):
            incoming.write(piece)
        if user is None:
            refuse_beyond(app.anonymous_bytes, request, incoming.size)
        _check_is_json(incoming, request.address)
        index = require_still(request, "test results", index)
        result = app.releases.add_test_result(index, file, incoming, request.actor)
    return result_response("toxresultpath", f"{index.path}/{result.path}#{result.hash_spec}")


def refuse_beyond(rate, request, amount):
    """TooMany if `amount` passes a `Rate` of test results without a login."""
    wait = rate.take(request.address, amount)
    if wait:
        raise TooMany("too many test results from users who are not logged in", wait)


_CHECK_JSON = """
import json, sys
try:
    import os, resource
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))
except (ImportError, OSError, ValueError):
    pass        # no such bound here
def refuse(name): raise ValueError(name)
with open(sys.argv[1], "rb") as file:
    json.loads(file.read().decode("utf-8"), parse_constant=refuse, parse_int=len, parse_float=len)
"""
_large_jsons = Shares("large test results are coming in", Limits.large_jsons,
                      Limits.large_jsons_of_one, 10)


def _check_is_json(incoming, address):
    """BadRequest unless a test result, from a client at `address`, is JSON.

    A child process parses large ones: 16 MiB can take 400 MB meanwhile."""
    if incoming.size > Limits.parsed_here:
        fits = _fits_in_child(incoming.path, address)
    else:
        try:
            with bulk.claim(Limits.json_cost * incoming.size), incoming.reader() as file:
                json.loads(file.read().decode("utf-8"), parse_constant=_refuse_constant,
                           parse_int=len, parse_float=len)
            fits = True
        except (ValueError, RecursionError):
            fits = False
    if not fits:
        raise BadRequest("Bad request: could not decode json")


def _fits_in_child(path, address):
    """Whether a file is JSON, checked in a child process; Busy if that fails."""
    try:
        with _large_jsons.one(address, 5), outside_wait():
            status = subprocess.run(
                [sys.executable, "-I", "-c", _CHECK_JSON, path], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                timeout=Limits.stall).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Busy(f"the test result could not be checked: {reason_of(error)}", 10) from error
    if status not in (0, 1):
        raise Busy("the test result could not be checked, try again", 10)
    return status == 0


def _refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


@route("DELETE", "/{user}/{index}/{file}[/]", for_="json", may="delete files")
def delete_file(request, index, file):
    """devpi: delete a file."""
    refusal = refusal_to_delete(request, index, _NO_DELETION)
    note = request.write(remove_file, index, file, refusal)
    return _deleted(f"package '{index.path}/{file}' deleted", note)


def _deleted(message, note):
    return message_response(f"{message}; {note}" if note else message)


# -- uploads


@route("POST", "/{user}/{index}[/]", for_="uploader", may="upload")
def take_upload(request, index):
    """devpi and PyPI: a form that registers a release or uploads a file [W13]."""
    app = request.app
    if request.content_type == "application/x-www-form-urlencoded":
        return _take_urlencoded(request, index)

    parameters = request.header("content-type").partition(";")[2]
    with app.blobs.incoming() as incoming, UploadForm(incoming) as form:
        form.read(request.body, form_boundary(parameters))
        with _turn_of_form(request, form.size):
            return _take_form(request, index, form, form.fields())


_large_forms = Shares("forms with long fields", Limits.large_forms, Limits.large_forms_of_one, 60)


def _turn_of_form(request, size):
    """A turn at processing a form whose fields have `size` bytes; small ones need none."""
    if size <= Limits.unclaimed:
        return contextlib.nullcontext()
    return _large_forms.one(request.identity.user, Limits.claim_time)


def _take_form(request, index, form, fields):
    """Do the `:action` of a form: submit, file_upload or doc_upload."""
    index = require_still(request, "upload", index)
    action = fields.get(":action", [None])[0]
    if action is None:
        raise BadRequest("the form has no field ':action'")

    releases = request.app.releases
    if action == "submit":
        releases.register(index, fields, request.actor)
        return Response(200, [("Content-Type", HTML)])
    if action not in ("file_upload", "doc_upload"):
        raise BadRequest(f"action '{one_line(action, 60)}' not supported")
    if form.filename is None:
        raise BadRequest("content file field not found")

    may_replace = request.app.permissions.index_modify(request.identity, index.user)
    parts, left_out = (index, fields, form.filename, form.incoming, may_replace, request.actor), 0
    if action == "file_upload":
        is_new, event = releases.upload(*parts), "upload"
    else:
        (is_new, left_out), event = releases.upload_docs(*parts), "docs"
    if not is_new:
        return Response(200, [("Content-Type", HTML)],
                        reason="Upload of identical file to non volatile index.")

    headers = [("X-Devpi-Trigger", "queued")] if wants_event(index, event) else []
    if left_out:
        note = (f"{left_out} of the documentation's members are not shown: damaged, links, under "
                "names that lead out of it, or beside the folder that holds its index.html\n")
        headers.insert(0, ("Content-Type", "text/plain; charset=utf-8"))
        return Response(200, headers, note.encode())
    return Response(200, [("Content-Type", HTML), *headers])


@route("PUSH", "/{user}/{index}[/]", for_="pusher", may="read")
@route("POST", "/{user}/{index}[/]", for_="pusher", may="read")
def push(request, index):
    """devpi: PUSH, or POST of JSON, of a release to another index or an outside server [W19]."""
    app = request.app
    body = request.json(dict)
    outside = "posturl" in body and "targetindex" not in body
    texts = ("name", "version",
             *(("posturl", "username", "password") if outside else ("targetindex",)))
    flags = ("no_docs", "only_docs", *(("register_project",) if outside else ()))
    for key in ("name", "version"):
        _check_push_value(body, key, str)
    name, version = body["name"], body["version"]
    part = [_check_push_value(body, key, bool, False) for key in ("no_docs", "only_docs")]

    pushed = app.staging.release(index, normalize(name), version)
    pushed.refuse_quarantined(index)
    if all(part):
        raise BadRequest("can't use 'no_docs' and 'only_docs' together")
    pushed = pushed.only(*part)

    unknown = sorted(set(body) - {*texts, *flags})
    if unknown:
        raise BadRequest(f"unknown additional options: {', '.join(map(one_line, unknown))}")
    for key in texts:
        _check_push_value(body, key, str)

    if outside:
        log_ = _push_outside(request, index, pushed, body)
        return result_response("actionlog", log_, 200 if is_released(log_) else 502)

    _push_target(request, index, body["targetindex"])
    pushed = app.staging.complete(index, pushed, request.identity.user)
    require_still(request, "read", index)
    target = _push_target(request, index, body["targetindex"])
    may_replace = app.permissions.index_modify(request.identity, target.user)
    log_ = request.write(push_release, index, pushed, target, name, part, may_replace)
    return result_response("actionlog", log_)


def _check_push_value(body, key, kind, default=None):
    """A value of a push's JSON; BadRequest unless it is of this type."""
    value = body.get(key, default)
    if not isinstance(value, kind):
        raise BadRequest(
            f"the value of '{key}' must be {'true or false' if kind is bool else 'a text'}"
            if key in body else f"'{key}' is missing")
    return value


def _push_target(request, index, path):
    """The index that a push names; an error unless the caller may upload to it."""
    app = request.app
    if not re.fullmatch(r"[^/]+/[^/]+", path):
        raise BadRequest("targetindex not in format user/index")
    target = app.indexes.get(path)
    if not app.permissions.upload(request.identity, target):
        who = f"'{request.identity.user}'" if request.identity.user else "None"
        hint = "" if request.has_credentials else ": pushing takes a login"
        if request.identity.user:
            hint = (": it is a mirror" if target.is_mirror else "") + other_stages(request)
        request.refuse(Unauthorized(f"user {who} cannot upload to '{path}'{hint}"))
    # a non-volatile index refuses the files that it has, by name
    if target.path == index.path and target.volatile:
        raise BadRequest(f"{path} is the index that is pushed from")
    return target


def _push_outside(request, index, pushed, body):
    """Push a release to the server at `posturl`; returns devpi's action log."""
    if request.identity.user is None:
        request.refuse(Unauthorized("pushing to an outside server takes a login"))
    register = _check_push_value(body, "register_project", bool, False)
    try:
        url = to_url("posturl", body["posturl"])
    except BadRequest:
        raise BadRequest("the posturl must be an http or https URL") from None
    if not is_allowed_target(url, request.app.settings.push_allow):
        raise Forbidden(f"--push-allow does not name the host of {public_url(url)}")

    staging = request.app.staging
    pushed = staging.complete(index, pushed, request.identity.user)
    require_still(request, "read", index)
    if request.identity.user is None:
        request.refuse(Unauthorized("pushing to an outside server takes a login"))
    return staging.push_outside(index, pushed, url, body["username"], body["password"], register,
                                request.actor)


@route("POST", "/", for_="uploader", may="anybody")
@route("POST", "/{user}[/]", for_="uploader", may="anybody")
@route("POST", "/{user}/{name}/+simple[/]", for_="uploader", may="anybody")
@route("POST", "/{user}/{name}/+simple/{project}[/]", for_="uploader", may="anybody")
@route("POST", "/{user}/{name}/{project}[/]", for_="uploader", may="anybody")
@route("POST", "/{user}/{name}/{project}/{version}[/]", for_="uploader", may="anybody")
def refuse_upload(request, user="USER", name="INDEX", project=None, version=None):
    """Name the right URL to those who upload to a wrong one."""
    raise NotFound("nothing is uploaded here: "
                   f"the address to upload to is {request.url(f'{user}/{name}/')}")


def _take_urlencoded(request, index):
    """Take an urlencoded form; it can't hold a file."""
    with Spool(request.app.blobs) as whole:
        for piece in iter(request.body.read, b""):
            whole.write(piece)
            if whole.size > Limits.form_fields:
                raise TooLarge(f"the form is larger than {Limits.form_fields} bytes")

        with _turn_of_form(request, whole.size):
            try:
                fields = urllib.parse.parse_qs(
                    whole.value().decode("utf-8"), keep_blank_values=True, errors="strict",
                    max_num_fields=Limits.form_parts)
            except ValueError as error:
                raise BadRequest(f"malformed form: {reason_of(error)}") from None
            return _take_form(request, index, UploadForm(None), fields)


# ==================================================================================================
# 22  For operators
#
# Status, health, metrics, the audit log, and the check for proxies that serve files themselves.
# ==================================================================================================


@route("GET", "/+status", for_="json", may="anybody")
def get_status(request):
    """devpi: the server's status [W23.1]. Only root sees paths and webhook targets."""
    app = request.app
    is_root = request.identity.user == "root"
    with app.store.read() as db:
        row = db.execute("SELECT serial, ts FROM changelog ORDER BY serial DESC LIMIT 1").fetchone()
    serial, timestamp = tuple(row) if row else (-1, app.started)
    host, port = app.settings.listen[0] if app.settings.listen else (None, None)
    level, messages, details = app.health()
    if is_root:
        messages += details

    return result_response("status", {
        "serverdir": app.settings.serverdir if is_root else None, "uuid": app.store.node["uuid"],
        "versioninfo": {"devpi-server": PROTOCOL_VERSION, "devpi-lite": __version__,
                        "python": "%d.%d.%d" % sys.version_info[:3]},
        "server-code": PROGRAM if is_root else None, "host": host, "port": port,
        "outside-url": app.settings.outside_url or None,
        "serial": serial, "last-commit-timestamp": timestamp,
        "event-serial": serial, "event-serial-timestamp": timestamp,
        "event-serial-in-sync-at": timestamp,
        "metrics": [[gauge.name, gauge.kind, gauge.value] for gauge in app.all_gauges()
                    if isinstance(gauge.value, (int, float))],
        "offline-mode": app.settings.offline_mode, "read-only": app.settings.read_only,
        "role": "PRIMARY" if request.query.get("v") == "2" else "MASTER",     # as devpi 7 and 6
        "polling_replicas": {}, "status": level, "messages": messages,
        "upstream-removed": sum(list(app.mirrors.pages.removed.values())),
        "trash": {"files": app.blobs.trashed[0], "bytes": app.blobs.trashed[1],
                  "days": Limits.trash // 86400},
        "outbox": app.outbox.summary(by_target=is_root)})


@route("GET", "/+health/live", for_="program", may="anybody")
def get_liveness(request):
    """For a supervisor: this process responds."""
    return json_response({"status": "ok"})


@route("GET", "/+health/ready", for_="program", may="anybody")
def get_readiness(request):
    """For a load balancer: the database can be read and the disk written; otherwise 503."""
    app = request.app
    try:
        with app.store.read() as db:
            db.execute("SELECT 1 FROM node").fetchone()
        if not app.settings.read_only:
            with app.blobs.incoming() as probe:
                probe.write(b"x")
    except (Problem, OSError, sqlite3.Error) as error:
        log.error("not ready: %s", error)
        raise Busy(f"not ready: {getattr(error, 'strerror', None) or reason_of(error)}",
                   5) from error
    return json_response({"status": "ok"})


@route("GET", "/+metrics", for_="program", may="anybody")
def get_metrics(request):
    """Metrics for Prometheus, in its text format 0.0.4."""
    lines = []
    for name, kind, text, value in request.app.all_gauges():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        samples = [("", {}, value)] if isinstance(value, (int, float)) else value
        lines += [f"{name}{ending}{_labels(labels)} {number}" for ending, labels, number in samples]
    body = "\n".join(lines) + "\n"
    return Response(200, [("Content-Type", "text/plain; version=0.0.4; charset=utf-8")],
                    body.encode())


def _labels(labels):
    """A metric's labels in Prometheus' text format."""
    if not labels:
        return ""
    quoted = {name: str(text).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
              for name, text in labels.items()}
    return "{" + ",".join(f'{name}="{text}"' for name, text in quoted.items()) + "}"


@route("GET", "/+audit", for_="program", may="read the audit log")
def get_audit(request):
    """For root: the audit log, newest first; with `before`, `limit`, `who`, `index`, `action`."""
    query = request.query
    for name in ("before", "limit"):
        if not re.fullmatch(r"[0-9]{1,15}", query.get(name, "1")):
            raise BadRequest(f"'{name}' must be a number")
    limit = min(max(1, int(query.get("limit", 100))), 1000)
    conditions, values = ["id < ?"], [int(query.get("before", 1 << 60))]
    for name, condition in (("who", "(who = ? OR action = 'login.failed' AND target = ?)"),
                            ("index", "index_path = ?"), ("action", "action = ?")):
        if name in query:
            conditions.append(condition)
            values += [query[name]] * condition.count("?")

    with request.app.store.read() as db:
        rows = db.execute(
            f"SELECT * FROM audit WHERE {' AND '.join(conditions)} ORDER BY id DESC LIMIT ?",
            (*values, limit + 1)).fetchall()
    entries = [{"id": row["id"], "time": iso_time(row["ts"]), "who": row["who"],
                "address": row["address"], "action": row["action"], "index": row["index_path"],
                "target": row["target"], "detail": row["detail"], "times": row["times"],
                "serial": row["serial"]} for row in rows[:limit]]
    return json_response({"type": "audit", "result": entries,
                          "next": entries[-1]["id"] if len(rows) > limit else None})


@route("POST", "/+outbox/retry", for_="program", may="root")
def retry_outbox(request):
    """For root: send now all messages that wait for their next try or were given up."""
    count = request.app.outbox.retry(request.actor)
    return message_response(f"{count} message{'' if count == 1 else 's'} will be tried now")


@route("ANY", "/+changelog", for_="program", may="anybody")
@route("ANY", "/+changelog/{rest}", for_="program", may="anybody")
def refuse_changelog(request, rest=""):
    """Refuse devpi's replicas: their protocol carries another database."""
    raise Forbidden("there is no replication protocol of devpi here")


@route("ANY", "/+authcheck", for_="program", may="anybody")
def check_for_proxy(request):
    """devpi: whether a proxy may serve the URL in X-Original-URI itself: 200 or 403 [W23.3]."""
    uri = request.header("x-original-uri")
    if not uri:
        raise BadRequest("the header X-Original-URI is missing")

    path = request.path_in(uri)
    readers = readers_of(path)
    # the proxy may resolve dots to another path
    if readers is None or {".", ".."} & set(path.split("/")):
        raise Forbidden(f"there is nothing at {one_line(path, 100)}")
    index = request.app.indexes.find(readers) if readers else None
    if index and not may_read(request, index):
        request.refuse(Forbidden(f"no permission to read index {readers}"))
    return Response(200, [("Content-Type", "text/plain; charset=utf-8")])


# ==================================================================================================
# 23  The server directory
#
# What a server directory holds, how it is made, locked and refused; and what the commands that work
# on a whole directory share: progress, copying in bulk, taking in rows that have no changelog.
# ==================================================================================================


PYPI = {"type": "mirror", "volatile": False, "title": "PyPI",
        "mirror_url": "https://pypi.org/simple/",
        "mirror_web_url_fmt": "https://pypi.org/project/{name}/"}
# all that a server directory may hold
OWN_NAMES = {"devpi_lite.db", "devpi_lite.db-wal", "devpi_lite.db-shm",
             "files", "tmp", "cache", "trash", ".secret", ".lock", ".commits", "root-password",
             "search.db", "search.db-wal", "search.db-shm", "lost+found"}


def is_read_only(path):
    """Whether a directory lies on read-only media: a disc, an image, a volume mounted read-only."""
    try:
        if hasattr(os, "statvfs"):
            return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
        with tempfile.TemporaryFile(dir=path):
            return False
    except OSError as error:
        write_protected = 19        # ERROR_WRITE_PROTECT of Windows
        return error.errno == errno.EROFS or getattr(error, "winerror", None) == write_protected


def prepare_directory(path):
    """Make the server directory if it is missing; returns whether it is on read-only media.

    FatalError if it can't be used, or holds something else."""
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        names = set(os.listdir(path))
    except FileExistsError:
        raise FatalError(f"{path} is a file, not a directory") from None
    except OSError as error:
        raise FatalError(f"can't use {path}: {error.strerror}; "
                         "choose another directory with --serverdir") from None

    if "devpi_lite.db" in names and is_read_only(path):
        return True
    if not os.access(path, os.W_OK | os.X_OK):
        raise FatalError(f"can't write to {path}; choose another directory with --serverdir")
    if ".nodeinfo" in names and "devpi_lite.db" not in names:
        raise FatalError(f"{path} belongs to a devpi-server: copy its data out with devpi-export "
                         "and import that into another, empty directory")
    if UNFINISHED in names:
        raise FatalError(f"an import or a restore into {path} was cut off: run it again, or remove "
                         "the directory")
    refuse_lost_database(path)
    # without a database: a first start was cut off
    ours = "devpi_lite.db" in names or ".lock" in names and names <= OWN_NAMES
    foreign = sorted(names - {"lost+found"})
    if foreign and not ours:
        raise FatalError(f"{path} is neither empty nor a devpi_lite directory: "
                         f"it holds {', '.join(foreign[:3])}"
                         f"{' and more' if len(foreign) > 3 else ''}; "
                         "choose another with --serverdir")

    if not names:
        # another user's directory: the warning below follows
        with contextlib.suppress(PermissionError):
            os.chmod(path, 0o700)
    if os.name != "nt" and os.stat(path).st_mode & 0o077:
        log.warning("%s can be read by others: chmod 700 would stop that", path)
    return False


def refuse_lost_database(serverdir):
    """FatalError if there are files, but not the database that names them.

    With a new database the cleaner would delete all files as garbage, and SQLite deletes the
    write-ahead log (the newest changes) of an empty database. This function writes nothing."""
    database = os.path.join(serverdir, "devpi_lite.db")
    if not os.path.exists(database):
        state = "missing"
    elif not os.path.getsize(database):
        state = "empty"
    elif holds_blobs(serverdir) and not _has_accounts(database):
        state = "without a single account"
    else:
        return

    write_ahead_log = database + "-wal"
    if os.path.exists(write_ahead_log) and os.path.getsize(write_ahead_log) \
            or holds_blobs(serverdir):
        raise FatalError(f"the database {database} is {state}, but the files that it named are "
                         "here: restore it from a backup, or move "
                         f"{os.path.join(serverdir, 'files')} away to begin anew")


def _has_accounts(database):
    """Whether a database has the user root; it is only read."""
    with contextlib.closing(sqlite3.connect(read_only_uri(database), uri=True)) as db:
        try:
            return db.execute("SELECT 1 FROM users WHERE name = 'root'").fetchone() is not None
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return False
            raise


def take_lock(serverdir, taken="another server runs"):
    """Lock the directory as long as the returned file is open.

    FatalError with the process id of whoever has the lock; `taken` says what that is."""
    file = open(os.path.join(serverdir, ".lock"), "a+")
    try:
        try:
            lock_file(file)
        except OSError:
            time.sleep(0.05)        # `lock_holder` may have it, for an instant
            lock_file(file)
    except OSError:
        file.seek(0)
        pid = file.read().strip() or "unknown"
        file.close()
        raise FatalError(f"{taken} on {serverdir}, its process id is {pid}") from None

    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def lock_holder(serverdir):
    """(process id or None, time of its start) of the server that runs on a directory, or None.

    Does not disturb it, nor one that starts at this moment: see `take_lock`."""
    try:
        with open(os.path.join(serverdir, ".lock")) as file:
            since = os.fstat(file.fileno()).st_mtime
            try:
                lock_file(file, shared=True)
            except OSError:
                file.seek(0)
                pid = file.read(20).strip()
                return int(pid) if pid.isdigit() else None, since
            unlock_file(file)
    except FileNotFoundError:
        pass
    return None


def read_secret(serverdir, secretfile):
    """The secret for session tokens, at least 32 bytes, from `secretfile` or the directory.

    The directory's is made at the first start."""
    path = secretfile or os.path.join(serverdir, ".secret")
    if not secretfile and not os.path.exists(path):
        write_private(path, base64.b64encode(secrets.token_bytes(32)) + b"\n")
    try:
        with open(path, "rb") as file:
            secret = file.read().strip()
            mode = os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise FatalError(f"can't read the secret file {path}: {error.strerror}") from None

    folder = os.path.dirname(os.path.abspath(path))
    if os.name != "nt" and os.stat(folder).st_mode & 0o022:
        raise FatalError(f"the directory of the secret file, {folder}, can be written by others: "
                         "chmod 700 would stop that")
    if os.name != "nt" and mode & 0o077:
        raise FatalError(f"the secret file {path} can be read or changed by others: "
                         "chmod 600 would stop that")
    if len(secret) < 32:
        raise FatalError(f"the secret in {path} must have at least 32 bytes, it has {len(secret)}")
    if len(set(secret)) < 6:
        raise FatalError(f"the secret in {path} is too simple: it has fewer than 6 different bytes")
    return secret


def secret_for_read_only(settings):
    """The secret of a server on read-only media: from --secretfile, or a new one at each start.

    The directory's secret may be readable by everybody there, and belongs to another server, which
    may still run."""
    if settings.secretfile:
        return read_secret(settings.serverdir, settings.secretfile)
    return secrets.token_bytes(32)


def write_private(path, data):
    """Write a file that only its owner can read, atomically."""
    temporary = f"{path}.{os.getpid()}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    os.replace(temporary, path)


def is_initialised(store):
    with store.read() as db:
        return db.execute("SELECT 1 FROM users WHERE name = 'root'").fetchone() is not None


def initialise(store, settings):
    """Make root, and root/pypi if `root_pypi` is set, as the first change (serial 0)."""
    store.write(_initialise, hash_password(first_password(settings)), settings.root_pypi)


def first_password(settings):
    """Root's password in a new directory: from an option, or random.

    A random one is printed to a terminal; a journal, which would keep it, gets the name of the file
    that holds it."""
    password = settings.root_passwd
    if settings.root_passwd_file:
        try:
            with open(settings.root_passwd_file, encoding="utf-8") as file:
                password = file.readline().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise FatalError(f"can't read root's password from {settings.root_passwd_file}: "
                             f"{reason_of(error)}") from None
        if not password:
            raise FatalError(f"the first line of {settings.root_passwd_file} is empty: it has to "
                             "be root's password")

    if password is None:
        password = secrets.token_urlsafe(12)
        path = os.path.join(settings.serverdir, "root-password")
        write_private(path, password.encode() + b"\n")
        if sys.stdout.isatty():
            print(f"root's password: {password}   (kept in {path} until it is changed)")
        else:
            print(f"root's password is in {path} until it is changed")
    elif password == "":
        print("warning: root has an empty password: anybody who reaches this server can do "
              "everything", file=sys.stderr)
    return password


def _initialise(change, pwhash, with_pypi):
    insert_user(change, "root", pwhash, {})
    if with_pypi:
        insert_index(change, "root", "pypi", PYPI)


def open_rows(serverdir, may_be_older=False, may_be_newer=False):
    """A connection that only reads the database of another server directory.

    FatalError if it is missing or has another schema version; an older one is read if it
    `may_be_older`, a newer one if it `may_be_newer`."""
    path = os.path.join(serverdir, "devpi_lite.db")
    if not os.path.exists(path):
        raise FatalError(f"no devpi_lite database in {serverdir}")

    # nobody writes to a database that has no write-ahead log, in a directory where none can be made
    is_fixed = is_read_only(serverdir) or not (
        os.access(serverdir, os.W_OK) or os.path.exists(path + "-wal"))
    if is_fixed:
        refuse_unfolded(path)

    db = sqlite3.connect(read_only_uri(path, immutable=True) if is_fixed else path, uri=is_fixed,
                         timeout=Limits.busy, isolation_level=None,
                         check_same_thread=False)       # the writer's thread reads it
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA query_only = ON")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    newest = schema_version()
    if version != newest and not (may_be_older and 0 < version < newest) \
            and not (may_be_newer and version > newest):
        db.close()
        raise FatalError(f"{path} has schema version {version}, not {schema_version()}")
    return db


UNFINISHED = ".unfinished"      # in a directory that a command fills, until it is whole


@contextlib.contextmanager
def new_directory(serverdir):
    """A missing or empty server directory that the caller fills as a whole, and locks.

    If the caller fails, it is empty or missing again. What a killed command left in it is removed.
    FatalError if it holds anything else."""
    is_new = not os.path.exists(serverdir)
    try:
        os.makedirs(serverdir, mode=0o700, exist_ok=True)
        names = set(os.listdir(serverdir)) - {"lost+found", ".lock"}
    except OSError as error:
        raise FatalError(f"can't use {serverdir}: {error.strerror}; "
                         "choose another directory with --serverdir") from None
    if names and UNFINISHED not in names:
        raise FatalError(f"{serverdir} is not empty: choose an empty or missing directory with "
                         "--serverdir")

    with take_lock(serverdir) as lock:
        _clear(serverdir)
        os.chmod(serverdir, 0o700)
        marker = os.path.join(serverdir, UNFINISHED)
        write_private(marker, b"")
        sync_directory(serverdir)
        try:
            yield
            sync_tree(serverdir)
        except BaseException:
            _clear(serverdir)
            if is_new:
                lock.close()        # Windows deletes no open file
                shutil.rmtree(serverdir, ignore_errors=True)
            raise
        os.unlink(marker)
        sync_directory(serverdir)


def _clear(serverdir):
    """Remove all from an unfinished directory, the mark that says so last."""
    for name in sorted(os.listdir(serverdir), key=UNFINISHED.__eq__):
        path = os.path.join(serverdir, name)
        if name in ("lost+found", ".lock"):
            continue
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)


def give_way():
    """Let a server on this machine go first: for commands that read and write much."""
    if hasattr(os, "nice"):
        os.nice(10)


def in_threads(function, items, threads=4):
    """Yield (item, `function(item)`) in order, several computed at a time, few ahead; an error is
    raised in its turn."""
    from concurrent.futures import ThreadPoolExecutor       # not at the top: the server needs none
    with ThreadPoolExecutor(threads) as pool:
        ahead = collections.deque()
        try:
            for item in items:
                ahead.append((item, pool.submit(function, item)))
                if len(ahead) > 8 * threads:
                    item, future = ahead.popleft()
                    yield item, future.result()
            for item, future in ahead:
                yield item, future.result()
        finally:
            for _, future in ahead:
                future.cancel()


class Progress:
    """How much of a long job is done and how long the rest will take, on standard error: a line
    that is rewritten on a terminal, else a new line every ten seconds."""

    def __init__(self, what, files, size):
        self.what, self.files, self.size = what, files, size
        self.done_files = self.done_size = 0
        self.began = self.shown = time.monotonic()
        self.is_terminal = sys.stderr.isatty()
        self.width = 0

    def add(self, size, files=1):
        """Count what was done."""
        self.done_files += files
        self.done_size += size
        now = time.monotonic()
        if now - self.shown >= (0.2 if self.is_terminal else 10):
            self.shown = now
            self._show(f", {self._left(now)} left")

    def _left(self, now):
        """The time that the rest will take, as minutes:seconds."""
        # a file costs something, however small it is
        whole, done = (size + 4096 * files for size, files in
                       ((self.size, self.files), (self.done_size, self.done_files)))
        left = int((now - self.began) * max(0, whole - done) / max(1, done))
        return f"{left // 60}:{left % 60:02}"

    def _show(self, more, end=None):
        text = (f"{self.what}: {self.done_files:,} of {self.files:,} files, "
                f"{size_text(self.done_size)} of {size_text(self.size)}{more}")
        start = "\r" if self.is_terminal else ""
        end = ("" if self.is_terminal else "\n") if end is None else end
        print(start + text.ljust(self.width), end=end, file=sys.stderr, flush=True)
        self.width = len(text)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.is_terminal and self.width:
            print(file=sys.stderr)


def size_text(size):
    """A number of bytes for a person: `0.0 KB`, `1.4 GB`."""
    for unit in ("KB", "MB"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} GB"


# ==================================================================================================
# 24  Export
#
# devpi's dump, version 2: what devpi-import reads. It is written while the server runs, from one
# state of the database. What devpi has no place for is under the key `devpi_lite`, which its
# importers ignore and ours reads.
# ==================================================================================================


# The top-level key `devpi_lite` of dataindex.json:
#   format, program, serial     1, the version of this program, the last serial of the changelog
#   users       {name: {"pwhash": text or null}}
#   indexes     {user/index: {option: value}}: options that devpi does not know; and "bases" of
#               indexes whose `indexconfig` lacks some
#   projects    {user/index: {project: {"status", "reason"}}}: those that are not active, or have
#               no release
#   releases    {user/index: {project: {version: {"name", "version"}}}}: what metadata really has
#               where devpi would not take it
#   rows        [[kind, key, value], ...]: rows of all kinds that are not in `DUMPED_KINDS`
# A file's key `devpi_lite` has those keys of its value (see `FileRows`) that are not in
# `DERIVED_OF_FILE` and neither null nor 0, `requires_python` always, and "history" if `log` lacks
# something of it. A mirror's file: those columns of the table `files` that are not null.
DUMP_INDEX = "dataindex.json"       # the dump's list of everything; a dump that has it is whole
UNFINISHED_DUMP = DUMP_INDEX + ".part"
DUMP_BEGINNING = '{\n  "devpi_server": "devpi_lite '
OWN_KEY = "devpi_lite"

# the options of devpi's indexes; others are ours alone
DEVPI_OPTIONS = {
    "type", "volatile", "bases", "acl_upload", "acl_toxresult_upload", "mirror_whitelist",
    "mirror_whitelist_inheritance", "uploadtrigger_jenkins", "mirror_url", "mirror_web_url_fmt",
    "mirror_cache_expiry", "mirror_ignore_serial_header", "mirror_no_project_list",
    "mirror_provides_core_metadata", "mirror_use_external_urls", "title", "description",
    "custom_data"}
# the keys of an entry of a file's history that devpi 7 takes
DEVPI_HISTORY = {"what", "who", "when", "count", "dst", "message", "src"}
# keys of a file's value (see `FileRows`) that an import derives from devpi's part of the dump and
# from the file itself
DERIVED_OF_FILE = {"project", "version", "filename", "kind", "sha256", "size", "history", "for",
                   "core_metadata", "metadata_sha256"}
# kinds of rows that have a place of their own in a dump, or that an import makes again
DUMPED_KINDS = {"user", "index", "metadata", "project", "release", "file"}


@command(
    "export", "Write everything that people have put into a server directory into a new directory, "
              "as a dump that devpi-import (devpi-server 6 and 7) and the command `import` read.  "
              "The server may run and take uploads meanwhile: the dump is its state at the start "
              "of the export.  The SHA-256 of each file is checked on the way.  A directory with a "
              "dataindex.json holds a whole dump; what a killed export leaves behind is removed by "
              "the next one into the same directory.  Exit status: 0 done, 1 nothing was written, "
              "5 done, but something is missing.",
    argument("dir", metavar="DIR", type=absolute_path,
             help="the directory to write to: missing or empty, on a disk with enough room"),
    argument("--include-mirrored-files", action="store_true",
             help="also the files that mirrors keep; without them only the mirrors' settings"),
    argument("--hard-links", action="store_true",
             help="link the files, in place of copying them, where both directories are on one "
                  "disk: takes hardly any room or time; but a file that is changed in the dump is "
                  "then changed in the server directory, too"),
    argument("--skip-broken", action="store_true",
             help="leave out files that are missing or damaged, and name them; without this they "
                  "end the export"),
    takes=(COMMON,))
def command_export(parsed):
    settings, told = parsed.settings, parsed.rest
    if (told.dir + os.sep).startswith(settings.serverdir + os.sep):
        raise FatalError(f"{told.dir} is inside of the server directory: choose another directory")

    give_way()
    spare_memory()
    with contextlib.closing(open_rows(settings.serverdir)) as db:
        db.execute("BEGIN")     # from now on one state, whatever the server writes
        export = Export(db, Blobs(settings.serverdir, read_only=True), told)
        export.check_names()
        with new_dump(told.dir) as file:
            export.write(file)
        for line in export.warnings():
            print(f"warning: {line}", file=sys.stderr)
    print(export.summary())
    return 5 if export.skipped else 0


@contextlib.contextmanager
def new_dump(folder):
    """A missing or empty directory that the caller fills; yields an open text file, which becomes
    its dataindex.json once all is on disk. It has the beginning of a JSON object already.

    If the caller fails, the directory is empty or missing again."""
    made = _make_folders(folder)
    part = os.path.join(folder, UNFINISHED_DUMP)
    try:
        with _claim_dump(folder) as file:
            try:
                yield file
                file.write("\n}\n")
                file.flush()
                sync_tree(folder)
                os.fsync(file.fileno())
                if os.name == "nt":
                    file.close()        # Windows renames no open file
                os.replace(part, os.path.join(folder, DUMP_INDEX))
                for path in (folder, *map(os.path.dirname, made)):
                    sync_directory(path)
            except BaseException:
                _empty_dump(folder)
                file.close()
                os.unlink(part)
                raise
    except BaseException as error:
        for path in reversed(made):
            with contextlib.suppress(OSError):      # another export claimed it
                os.rmdir(path)
        if isinstance(error, OSError):
            raise FatalError(f"nothing was written: {reason_of(error)}") from error
        raise


def _make_folders(folder):
    """Make a directory that only its owner can read; returns those made, outermost first."""
    missing = []
    try:
        while not os.path.lexists(folder):
            missing.insert(0, folder)
            folder = os.path.dirname(folder)
        for path in missing:
            os.mkdir(path, 0o700)
        if not missing and not os.listdir(folder):
            os.chmod(folder, 0o700)
    except OSError as error:
        raise FatalError(f"can't make a dump in {missing[-1] if missing else folder}: "
                         f"{error.strerror}; choose another directory") from None
    return missing


@contextlib.contextmanager
def _claim_dump(folder):
    """Lock a directory for a dump, and remove what a killed export left there.

    Yields its `UNFINISHED_DUMP`, which says whose the directory is, as an open text file."""
    part = os.path.join(folder, UNFINISHED_DUMP)
    names = set(os.listdir(folder)) - {"lost+found"}
    if DUMP_INDEX in names:
        raise FatalError(f"{folder} holds a dump already: choose another directory")
    if names and (UNFINISHED_DUMP not in names or os.path.islink(part)):
        raise FatalError(f"{folder} is not empty: choose a missing or an empty directory")

    with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="ascii",
              buffering=1 << 20) as file:
        try:
            lock_file(file)
        except OSError:
            raise FatalError(f"another export writes to {folder} at this moment") from None
        if not os.path.exists(part) or not os.path.samestat(os.fstat(file.fileno()),
                                                            os.stat(part)):
            raise FatalError(f"another export wrote to {folder} just now: choose another directory")

        file.seek(0)
        beginning = file.read(len(DUMP_BEGINNING))
        foreign = [name for name in names - {UNFINISHED_DUMP}
                   if not os.path.isdir(os.path.join(folder, name))
                   or os.path.islink(os.path.join(folder, name))]
        if beginning not in ("", DUMP_BEGINNING) or foreign:
            raise FatalError(f"{folder} is not empty: choose a missing or an empty directory")
        if names:
            print(f"an export to {folder} was cut off: what it left there is removed",
                  file=sys.stderr)
            _empty_dump(folder)

        file.seek(0)
        file.truncate()
        file.write(f'{DUMP_BEGINNING}{__version__}"')
        file.flush()
        os.fsync(file.fileno())
        sync_directory(folder)
        yield file


def _empty_dump(folder):
    """Remove all from an unfinished dump but the mark that says so."""
    for entry in os.scandir(folder):
        if entry.name not in (UNFINISHED_DUMP, "lost+found"):
            shutil.rmtree(entry.path)


class JsonStream:
    """JSON written piece by piece, a line for each value: of objects and lists that do not fit into
    memory. Begins inside of an object that has `count` keys already."""

    def __init__(self, file, count):
        self.write, self.counts = file.write, [count]

    def _begin(self, key):
        self.write((",\n" if self.counts[-1] else "\n") + "  " * len(self.counts))
        self.counts[-1] += 1
        if key is not None:
            self.write(json.dumps(key) + ": ")

    def put(self, key, value):
        """Write a value under a key, or in a list, where the key is None."""
        self._begin(key)
        self.write(json.dumps(value))

    def object(self, key=None):
        """Have what is written in the `with` be in an object."""
        return self._inside(key, "{}")

    def list(self, key=None):
        return self._inside(key, "[]")

    @contextlib.contextmanager
    def _inside(self, key, ends):
        self._begin(key)
        self.write(ends[0])
        self.counts.append(0)
        yield
        if self.counts.pop():
            self.write("\n" + "  " * len(self.counts))
        self.write(ends[1])


class DumpedFile(typing.NamedTuple):
    """A file on its way into a dump: its blob, its place in the dump, and what is said of it."""
    id: int
    index: str              # user/name
    filename: str
    sha256: str
    size: int
    folder: str             # in the dump, "/" between the parts
    tested: int | None      # of a test result: the id of the file that was tested
    entry: dict             # in dataindex.json, without the relpath


class Export:
    """What goes into a dump. `db`: a connection that sees one state of the database; `told`: the
    arguments of the command."""

    def __init__(self, db, blobs, told):
        self.db, self.blobs, self.told = db, blobs, told
        self.began = time.monotonic()
        self.left_out = set()           # ids of files
        self.skipped = []               # sentences about what is left out
        self.folders = set()            # made for the present project
        self.cut = {}       # {path of an index: its bases} where the dump lacks some
        # {path of an index: {project: {version: {"name", "version"}}}} that devpi would not take
        self.odd_releases = collections.defaultdict(dict)
        self.locked_out = []            # names of users whose passwords devpi can't have
        self.not_linked = 0
        self.files = self.size = self.projects = 0
        self.users = list(ROWS["user"].all(db))
        self.indexes = [(row["id"], row["user"], row["name"], json.loads(row["config"]))
                        for row in db.execute("SELECT indexes.id, users.name AS user, "
                                              "indexes.name, config FROM indexes "
                                              "JOIN users ON users.id = user_id "
                                              "ORDER BY indexes.id")]

    def check_names(self):
        """Leave out users and indexes that no importer takes, or FatalError."""
        bad = {name for (name,), _ in self.users if not _is_plain(name)}
        for _, user, name, _ in self.indexes:
            if user in bad or not _is_plain(name):
                self._skip(f"the index {ascii(user + '/' + name)}",
                           "no importer takes this name: copy what it has to another index")
        for name in sorted(bad):
            self._skip(f"the user {ascii(name)}", "no importer takes this name: make another user")
        self.users = [row for row in self.users if row[0][0] not in bad]
        self.indexes = [row for row in self.indexes if row[1] not in bad and _is_plain(row[2])]

    def _skip(self, what, why):
        """Note that something is left out; FatalError without --skip-broken."""
        if not self.told.skip_broken:
            raise FatalError(f"{what}: {why}, or leave it out of the dump by --skip-broken")
        self.skipped.append(what)
        print(f"left out: {what}: {why}", file=sys.stderr)

    def write(self, file):
        """Write all files, and dataindex.json to an open file, whose object has one key."""
        self.folder = self.told.dir
        files, size = self.db.execute(
            "SELECT count(*), coalesce(sum(size), 0) FROM files WHERE sha256 IS NOT NULL "
            "AND (release_id IS NOT NULL OR ?)", (self.told.include_mirrored_files,)).fetchone()
        free = shutil.disk_usage(self.folder).free
        if size > free and not self.told.hard_links:
            print(f"warning: the dump takes {size_text(size)}, and the disk of {self.folder} has "
                  f"{size_text(free)} free", file=sys.stderr)

        out = JsonStream(file, 1)
        out.put("dumpversion", "2")
        out.put("pythonversion", list(sys.version_info))
        with out.object("users"):
            for (name,), value in self.users:
                pwhash, survives = hash_for_devpi(value)
                out.put(name, _user_for_devpi(name, value, pwhash))
                if not survives:
                    self.locked_out.append(name)

        bases = bases_without_cycles({f"{user}/{name}": config.get("bases", [])
                                      for _, user, name, config in self.indexes})
        with Progress("export", files, size) as progress, out.object("indexes"):
            for index_id, user, name, config in self.indexes:
                path = f"{user}/{name}"
                if bases[path] != config.get("bases", []):
                    self.cut[path] = config["bases"]
                    config = {**config, "bases": bases[path]}
                with out.object(path):
                    out.put("indexconfig", _config_for_devpi(config))
                    if config["type"] == "stage":
                        self._write_stage(out, progress, index_id, path)
                    elif self.told.include_mirrored_files:
                        self._write_mirror(out, progress, index_id, path)
        self._write_own(out)

    # -- stages

    def _projects(self, index_id, condition="1"):
        """Yield (id, name) of the projects of an index, the oldest first."""
        return map(tuple, self.db.execute(
            f"SELECT id, name FROM projects WHERE index_id = ? AND {condition} ORDER BY id",
            (index_id,)))

    def _write_stage(self, out, progress, index_id, path):
        with out.object("projects"):
            for project_id, name in self._projects(index_id):
                self.projects += 1
                with out.object(name):
                    for row in self.db.execute(
                            "SELECT id, version, metadata, readme_size FROM releases "
                            "WHERE project_id = ? ORDER BY id", (project_id,)):
                        version, stored = row["version"], stored_metadata(self.db, row)
                        metadata = _metadata_for_devpi(stored, name, version)
                        out.put(version, metadata)
                        odd = {key: stored[key] for key in ("name", "version")
                               if key in stored and stored[key] != metadata[key]}
                        if odd:
                            self.odd_releases[path].setdefault(name, {})[version] = odd
        with out.list("files"):
            self._write_files(out, progress, self._files_of_stage(index_id, path))

    def _files_of_stage(self, index_id, path):
        """Yield a stage's files as `DumpedFile`, test results after the files that they are of."""
        rows = ROWS["file"]
        query = (f"SELECT files.id, files.for_id, files.path, tested.sha256 AS tested_sha256, "
                 f"{', '.join(rows.facts)} FROM {rows.source} WHERE files.project_id = ? "
                 "AND files.position IS NULL AND files.release_id IS NOT NULL "
                 "ORDER BY files.for_id IS NOT NULL, files.id")
        for project_id, name in self._projects(index_id):
            self.folders.clear()
            for row in self.db.execute(query, (project_id,)):
                value = rows.value(self.db, row)
                folder, entry = _entry_of_stage(path, name, value, row["tested_sha256"])
                yield DumpedFile(row["id"], path, value["filename"], value["sha256"],
                                 value["size"], folder, row["for_id"], entry)

    # -- mirrors

    def _cached_projects(self, index_id):
        return self._projects(index_id, "EXISTS (SELECT 1 FROM files "
                              "WHERE project_id = projects.id AND sha256 IS NOT NULL)")

    def _cached_files(self, project_id):
        return select_files(self.db, "WHERE project_id = ? AND sha256 IS NOT NULL AND url != '' "
                            "AND version != '' ORDER BY position IS NULL, position, id", project_id)

    def _write_mirror(self, out, progress, index_id, path):
        with out.object("projects"):
            for project_id, name in self._cached_projects(index_id):
                self.projects += 1
                versions = {}
                for file in self._cached_files(project_id):
                    versions.setdefault(file.version, []).append(file)
                with out.object(name):
                    for version, files in versions.items():
                        out.put(version, _metadata_of_cached(name, version, files))
        with out.list("files"):
            self._write_files(out, progress, self._files_of_mirror(index_id, path))

    def _files_of_mirror(self, index_id, path):
        for project_id, name in self._cached_projects(index_id):
            self.folders.clear()
            for file in self._cached_files(project_id):
                folder, entry = _entry_of_mirror(path, name, file)
                yield DumpedFile(file.id, path, file.filename, file.sha256, file.size, folder,
                                 None, entry)

    # -- files

    def _write_files(self, out, progress, files):
        """Put files into the dump, and what is said of them into dataindex.json."""
        for file, (relpath, why) in in_threads(self._copy, self._in_folders(files)):
            progress.add(file.size)
            if file.tested in self.left_out and relpath:
                os.unlink(os.path.join(self.folder, *relpath.split("/")))
                why = "the file that it is a test result of is left out"
            if why:
                self.left_out.add(file.id)
                self._skip(f"{file.filename} of {file.index}", why)
                continue
            self.files += 1
            self.size += file.size
            out.put(None, {**file.entry, "relpath": relpath})

    def _in_folders(self, files):
        """Make the folders of files."""
        for file in files:
            if file.folder not in self.folders:
                os.makedirs(os.path.join(self.folder, *file.folder.split("/")), 0o700, True)
                self.folders.add(file.folder)
            yield file

    def _copy(self, file):
        """Copy or link a file's blob into the dump, and check it; runs in several threads.

        Returns (its path in the dump, None) or (None, why that is impossible)."""
        advice = "run fsck, which says more, and get it back from a backup"
        try:
            source = self.blobs.open(file.sha256)
        except NotFound:
            return None, f"its bytes ({file.sha256}) are lost: {advice}"

        with source:
            for relpath in self._places(file):
                target = os.path.join(self.folder, *relpath.split("/"))
                try:
                    self._copy_to(source, target, file)
                    return relpath, None
                except FileExistsError:
                    continue
                except Damaged as damage:
                    return None, f"its bytes are damaged ({damage}): {advice}"
                except Problem as problem:
                    raise FatalError(f"{self.folder}: {problem}: free some room, or choose another "
                                     "directory") from None
                except OSError as error:
                    if self._is_sound(file):
                        raise FatalError(f"can't write {target}: {reason_of(error)}") from None
                    return None, f"its bytes can't be read ({reason_of(error)}): {advice}"

    def _is_sound(self, file):
        """Whether a blob can be read: an error was then one of writing."""
        try:
            with self.blobs.open(file.sha256) as source:
                return hash_file(source.name)[0] == file.sha256
        except (OSError, NotFound):
            return False

    @staticmethod
    def _places(file):
        """Yield the paths that a file may have in the dump; the first one is nearly always free:
        documentation of a-1 2.0 and of a 1-2.0 would be at one path."""
        yield f"{file.folder}/{file.filename}"
        for number in itertools.count(2):
            yield f"{file.folder}/+{number}/{file.filename}"

    def _copy_to(self, source, target, file):
        """Raises FileExistsError, Damaged, NoSpace or OSError; nothing is left at `target` then."""
        folder = os.path.dirname(target)
        if os.path.basename(folder)[:1] == "+":
            os.makedirs(folder, 0o700, True)
        if self.told.hard_links:
            digest, _ = hash_file(source.name)
            if digest != file.sha256:
                raise Damaged(f"sha256 mismatch, got {digest}, expected {file.sha256}")
            try:
                return os.link(source.name, target)
            except FileExistsError:
                raise
            except OSError as error:
                log.debug("%s is copied, not linked: %s", target, reason_of(error))
                self.not_linked += 1
        return copy_checked(source, target, file.sha256)

    # -- what devpi has no place for

    def _write_own(self, out):
        with out.object(OWN_KEY):
            out.put("format", 1)
            out.put("program", __version__)
            out.put("serial", self.db.execute(
                "SELECT coalesce(max(serial), -1) FROM changelog").fetchone()[0])
            with out.object("users"):
                for (name,), value in self.users:
                    out.put(name, {"pwhash": value["pwhash"]})
            with out.object("indexes"):
                for _, user, name, config in self.indexes:
                    path = f"{user}/{name}"
                    own = {key: value for key, value in config.items()
                           if key not in DEVPI_OPTIONS and key != FROM_DEVPI}
                    if path in self.cut:
                        own["bases"] = self.cut[path]
                    if own:
                        out.put(path, own)
            with out.object("projects"):
                for index_id, user, name, config in self.indexes:
                    if config["type"] == "stage":
                        self._write_odd_projects(out, index_id, f"{user}/{name}")
            out.put("releases", self.odd_releases)
            with out.list("rows"):
                for kind, rows in ROWS.items():
                    if kind not in DUMPED_KINDS:
                        for key, value in rows.all(self.db):
                            out.put(None, [kind, key, value])

    def _write_odd_projects(self, out, index_id, path):
        """Write the projects that have no release, or are not active."""
        rows = self.db.execute(
            "SELECT name, status FROM projects WHERE index_id = ? AND (status IS NOT NULL OR "
            "NOT EXISTS (SELECT 1 FROM releases WHERE project_id = projects.id)) ORDER BY id",
            (index_id,))
        first = rows.fetchone()
        if first is None:
            return
        with out.object(path):
            for row in itertools.chain([first], rows):
                status = Status.of(row["status"])
                out.put(row["name"], {"status": status.word, "reason": status.reason})

    # -- for the person who exports

    def warnings(self):
        """Yield sentences about what does not come along to devpi."""
        if self.locked_out:
            yield (f"in devpi, {_some(self.locked_out)} can't log in before `devpi-passwd NAME` "
                   "there: its hashes can't be made from ours (`import` keeps passwords)")
        for path, bases in self.cut.items():
            yield (f"the bases of {path} ({', '.join(bases)}) lead back to it, which devpi-import "
                   "does not survive: the one that does is left out for devpi")

        for index_id, user, name, config in self.indexes:
            listed = [each for each in config.get("mirror_whitelist", ()) if each != "*"]
            unknown = [each for each in listed if not self.db.execute(
                "SELECT 1 FROM projects WHERE index_id = ? AND name = ?",
                (index_id, each)).fetchone()]
            if unknown:
                yield (f"{user}/{name} whitelists {_some(unknown)}, no projects there: devpi 7 "
                       "makes them, which shuts upstream's out of indexes that build on it")
            if config.get("acl_pkg_read", [ANONYMOUS]) != [ANONYMOUS]:
                yield f"devpi shows {user}/{name} to everybody: it has no acl_pkg_read"

        lost = [f"{count:,} {what if count == 1 else many}" for what, many, query in _UNKNOWN
                for count, in self.db.execute(query) if count]
        if lost:
            yield f"devpi has no place for these, the command `import` has: {'; '.join(lost)}"
        if self.not_linked:
            yield f"{self.not_linked:,} files are copied, for they can't be linked to this disk"
        if self.skipped:
            yield f"the dump lacks what is broken: {len(self.skipped):,} named above"

    def summary(self):
        seconds = int(time.monotonic() - self.began)
        return (f"{self.folder} has {len(self.users):,} users, {len(self.indexes):,} indexes, "
                f"{self.projects:,} projects and {self.files:,} files ({size_text(self.size)}), "
                f"written in {seconds // 60}:{seconds % 60:02}")


# what devpi has no place for: a word, its plural, and how to count it
_UNKNOWN = (
    ("yanked file", "yanked files", "SELECT count(*) FROM files "
     "WHERE release_id IS NOT NULL AND yanked IS NOT NULL"),
    ("project status", "project statuses", "SELECT count(*) FROM projects "
     "WHERE status IS NOT NULL AND index_id IN "
     "(SELECT id FROM indexes WHERE instr(config, '\"type\": \"stage\"'))"),
    ("file's attestations", "files' attestations", "SELECT count(*) FROM attestations"),
    ("index's webhooks", "indexes' webhooks", "SELECT count(*) FROM indexes "
     "WHERE instr(config, '\"webhook_url\"')"),
    ("name of a deleted file", "names of deleted files", "SELECT count(*) FROM withdrawn"))


def _some(names):
    """Names in a sentence: ten at most."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def _is_plain(name):
    """Whether a user or an index can have this name in other servers."""
    return name not in (".", "..") and re.search(r"[/\\\x00-\x1f\x7f\ud800-\udfff]",
                                                 name) is None


def _part(text):
    """A text as a part of a path: itself, nearly always, or one that is made of its hash."""
    if is_safe_filename(text) and text[:1] != "+" and text == text.strip(" ") \
            and not text.lower().startswith(DUMP_INDEX):
        return text
    return "+" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _user_for_devpi(name, value, pwhash):
    """What devpi's dump says of a user."""
    attributes = dict(value["attributes"])
    user = {**attributes.pop(FROM_DEVPI, {}), **attributes, "username": name,
            "created": value["created"], "pwhash": pwhash}
    user.pop("pwsalt", None)
    if value["modified"]:
        user["modified"] = value["modified"]
    return user


def _config_for_devpi(config):
    """The configuration of an index, without what devpi does not know."""
    known = {key: value for key, value in config.items() if key in DEVPI_OPTIONS}
    unknown = {key: value for key, value in config.get(FROM_DEVPI, {}).items()
               if key not in config}
    for key, convert in (("mirror_whitelist_inheritance", str.lower),
                         ("mirror_whitelist", lambda names: [
                             name if name == "*" else normalize(name) for name in names])):
        if key in known:
            known[key] = convert(known[key])
    return {**unknown, **known}


def _metadata_for_devpi(metadata, project, version):
    """The metadata of a release, without what would stop devpi's importer."""
    known = {**metadata.get(FROM_DEVPI, {}), **metadata}
    known = {key: value for key, value in known.items() if key[:1] not in ("+", ":")}
    if normalize(str(known.get("name", ""))) != project:
        known["name"] = project
    return {**known, "version": version}


def _mapping(project, version, sha256, last_modified):
    """The `entrymapping` of a file."""
    return {"project": project, "version": version, "hashes": {"sha256": sha256},
            "hash_spec": f"sha256={sha256}", "last_modified": last_modified}


def _entry_of_stage(path, project, value, tested_sha256):
    """(folder in the dump, entry in dataindex.json) of a stage's file; `value`: see `FileRows`."""
    kind, version = value["kind"], value["version"]
    parts = [*path.split("/"), project]
    if kind == "toxresult":
        parts.append(f"sha256={tested_sha256}")
    elif kind == "doczip":
        parts.pop()
    else:
        parts.append(version)

    date = value["last_modified"] or http_date(seconds_of(value["uploaded"]))
    entry = {"type": kind, "projectname": project, "version": version,
             "entrymapping": _mapping(project, version, value["sha256"], date),
             "log": [_history_for_devpi(each) for each in value["history"]]}
    if value["for"]:
        entry["for_entrypath"] = f"{path}/{value['for']}"
    own = {key: each for key, each in value.items()
           if key not in DERIVED_OF_FILE and each is not None and each != 0}
    own["requires_python"] = value["requires_python"]       # null, too: the archive may have one
    if entry["log"] != value["history"]:
        own["history"] = value["history"]
    entry[OWN_KEY] = own
    return "/".join(map(_part, parts)), entry


def _history_for_devpi(entry):
    """An entry of a file's history, with the keys that devpi 7 takes."""
    known = {"who": None, **entry}
    if "reason" in entry:
        known["message"] = entry["reason"]
    return {key: value for key, value in known.items() if key in DEVPI_HISTORY}


def _metadata_of_cached(project, version, files):
    """The metadata of a mirror's release, as devpi has it."""
    metadata = {"name": project, "version": version}
    requires = next((file.requires_python for file in files if file.requires_python), None)
    if requires:
        metadata["requires_python"] = requires
    if all(file.yanked is not None for file in files):
        metadata["yanked"] = files[0].yanked or True
    return metadata


def _entry_of_mirror(path, project, file):
    """(folder in the dump, entry in dataindex.json) of a file that a mirror keeps."""
    date = file.last_modified or http_date(seconds_of(file.uploaded))
    mapping = _mapping(project, file.version, file.sha256, date)
    own = {key: getattr(file, key) for key in (
        "path", "hash_spec", "position", "uploaded", "first_seen", "requires_python", "yanked",
        "core_metadata", "provenance", "last_modified")}
    entry = {"type": "releasefile", "projectname": project, "version": file.version,
             "entrymapping": {**mapping, "url": file.url}, "log": [],
             OWN_KEY: {key: each for key, each in own.items() if each is not None}}
    return "/".join(map(_part, (*path.split("/"), project, file.version))), entry


def bases_without_cycles(bases):
    """{path: [path of a base, ...]} without those bases that lead back to an index that leads to
    them; an index may be a base of itself."""
    acyclic, state = {}, {}         # state: 1 while the bases of a path are followed, then 2
    for start in bases:
        stack = [(start, iter(bases[start]))] if start not in state else []
        while stack:
            path, rest = stack[-1]
            if path not in state:
                state[path], acyclic[path] = 1, []
            for base in rest:
                if base != path and state.get(base) == 1:
                    continue
                acyclic[path].append(base)
                if base in bases and base not in state:
                    stack.append((base, iter(bases[base])))
                    break
            else:
                state[path] = 2
                stack.pop()
    return acyclic


# ==================================================================================================
# 25  Import
#
# Dumps of devpi-server 2 to 7 and of this program. A dump is checked as a whole before anything is
# changed, and taken in as one change, or not at all. It may be of any size, and hostile: what is
# read of it at a time is bounded, and nothing outside of its directory is looked at.
# ==================================================================================================


# -- dataindex.json, which may have gigabytes


def _finite(text):
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {one_line(text, 40)} is too large")
    return number


def _no_constant(text):
    raise ValueError(f"{text} is no JSON")


class JsonFile:
    """A JSON file of any size: its outer objects and arrays are walked, and what is in them is read
    one value at a time.

    FatalError with the place if it is no JSON, or holds a value over `Limits.dump_value`."""

    blanks = re.compile(r"[ \t\r\n]*")
    tokens = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\Z)|[\[\]{},]', re.DOTALL)
    decoder = json.JSONDecoder(parse_int=bounded_int, parse_float=_finite,
                               parse_constant=_no_constant)

    def __init__(self, file, name):
        self.file = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        self.name = name
        self.text, self.position = "", 0        # what was read, and how far it is used up

    def error(self, place, sentence):
        return FatalError(f"{self.name}{', ' + one_line(place) if place else ''}: {sentence}")

    def _read_on(self, place):
        """Read more; whether there was more.

        Each time twice as much for the same value: so a large one takes linear time."""
        left = self.text[self.position:]
        try:
            piece = self.file.read(max(Limits.dump_piece, len(left)))
        except UnicodeDecodeError:
            raise self.error(place, "it is not UTF-8") from None
        self.text, self.position = left + piece, 0
        return bool(piece)

    def mark(self, place):
        """The next character that is no blank, or "" at the end."""
        while True:
            self.position = self.blanks.match(self.text, self.position).end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self._read_on(place):
                return ""

    def _take(self, mark, place):
        found = self.mark(place)
        if found not in mark or not found:
            raise self.error(place, f"{' or '.join(mark)} was expected, not {found!r}" if found
                             else "the file ends here: it was cut")
        self.position += 1
        return found

    def members(self, place):
        """Yield the keys of the object that comes next; the caller reads each one's value."""
        self._take("{", place)
        if self.mark(place) == "}":
            self.position += 1
            return
        while True:
            if self.mark(place) not in ('"', ""):
                raise self.error(place, "a key was expected")
            key = self.value(place)
            self._take(":", place)
            yield key
            if self._take(",}", place) == "}":
                return

    def items(self, place):
        """Yield the numbers of the items of the array that comes next; the caller reads each."""
        self._take("[", place)
        if self.mark(place) == "]":
            self.position += 1
            return
        for number in itertools.count():
            yield number
            if self._take(",]", place) == "]":
                return

    def value(self, place):
        """The value that comes next."""
        self.mark(place)
        while True:
            if len(self.text) - self.position > 4 * Limits.dump_piece:
                self._bound(place)
            reason = "the file ends here: it was cut"
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
                if end < len(self.text) or self.text[end - 1] in '"]}' or not self._read_on(place):
                    break               # else a number might go on
                continue
            except RecursionError:
                raise self.error(place, "it is nested too deeply") from None
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 20
                if not is_cut:
                    reason = f"no JSON: {error.msg}"
            except ValueError as error:
                raise self.error(place, reason_of(error)) from None
            if not reason.startswith("the file") or not self._read_on(place):
                raise self.error(place, reason)

        raw = self.text[self.position:end]
        self.position = end
        self._refuse_odd(value, raw, place)
        return value

    def _bound(self, place):
        """Refuse a value that is larger, or holds more values, than `Limits` allow, before all of
        them are made."""
        if len(self.text) - self.position > 2 * Limits.dump_value:
            raise self.error(place, f"a value of more than {Limits.dump_value >> 20} MiB")
        depth = 0
        for count, match in enumerate(self.tokens.finditer(self.text, self.position)):
            if count > Limits.dump_values:
                raise self.error(place, f"more than {Limits.dump_values} values in one")
            first = self.text[match.start()]
            depth += (first in "[{") - (first in "]}")
            if depth <= 0:
                return

    def _refuse_odd(self, value, raw, place):
        if raw.count("[") + raw.count("{") > Limits.json_depth:
            level = [value]
            for _ in range(Limits.json_depth):
                level = inner_values(level)
            if level:
                raise self.error(place, "it is nested too deeply")
        if "\\ud" in raw or "\\uD" in raw:
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise self.error(place, "half a surrogate pair, which is no character") from None

    def end(self):
        """Check that nothing follows."""
        if self.mark(""):
            raise self.error("", "more text after its end")


class Findings:
    """What is wrong in a dump: errors, of which the first are kept, and warnings.

    Those of an index that is left out do not count."""

    def __init__(self):
        self.errors = {}        # id of an index, or None -> [sentences]
        self.counts = collections.Counter()
        self.warnings, self.more_warnings = [], collections.Counter()

    def error(self, place, sentence, index=None):
        self.counts[index] += 1
        kept = self.errors.setdefault(index, [])
        if len(kept) < Limits.dump_errors:
            kept.append(f"{one_line(place)}: {sentence}")

    def warn(self, sentence, kind=""):
        """Add a warning; of one `kind`, the first are kept, and the others counted."""
        if kind and sum(each == kind for each, _ in self.warnings) >= Limits.dump_warnings:
            self.more_warnings[kind] += 1
        else:
            self.warnings.append((kind, sentence))

    def leave_out(self, index):
        self.errors.pop(index, None)
        self.counts.pop(index, None)

    def refuse(self):
        """FatalError if there are errors; they are printed."""
        count = sum(self.counts.values())
        if not count:
            return
        found = list(itertools.chain.from_iterable(self.errors.values()))[:Limits.dump_errors]
        for sentence in found:
            print(f"error: {sentence}", file=sys.stderr)
        if count > len(found):
            print(f"and {count - len(found)} more", file=sys.stderr)
        raise FatalError(f"{count} error{'' if count == 1 else 's'} in the dump, see above; "
                         "nothing was imported")

    def show_warnings(self):
        for _, sentence in self.warnings:
            print(f"warning: {one_line(sentence, 1000)}", file=sys.stderr)
        for kind, count in self.more_warnings.items():
            print(f"warning: {count} more: {kind}", file=sys.stderr)


_DUMP_TABLES = """
CREATE TABLE users (name TEXT PRIMARY KEY, facts TEXT) WITHOUT ROWID;
CREATE TABLE indexes (id INTEGER PRIMARY KEY, path TEXT UNIQUE, facts TEXT,
    is_left_out INTEGER DEFAULT 0);
-- ruled: 1 if devpi 7's rule for the project admits mirrors
CREATE TABLE projects (id INTEGER PRIMARY KEY, index_id INTEGER, name TEXT, ruled INTEGER,
    UNIQUE (index_id, name));
CREATE TABLE releases (id INTEGER PRIMARY KEY, project_id INTEGER, version TEXT, metadata TEXT,
    requires_python TEXT, UNIQUE (project_id, version));
CREATE TABLE files (id INTEGER PRIMARY KEY, index_id INTEGER, number INTEGER, kind TEXT,
    project TEXT, version TEXT, filename TEXT, relpath TEXT, facts TEXT, path TEXT,
    UNIQUE (index_id, relpath));
CREATE INDEX files_by_name ON files (filename);
CREATE INDEX files_in_order ON files (index_id, kind);
CREATE TABLE own (kind TEXT, place TEXT, key TEXT, value TEXT);
CREATE INDEX own_by_place ON own (kind, place);
"""
# kinds of files in a dump, in the order in which they are taken in: results after what was tested
_DUMP_KINDS = ("releasefile", "doczip", "toxresult")


class DumpReader:
    """Reads dataindex.json into a temporary database, and checks what can be checked without the
    rest of it."""

    def __init__(self, text, db, findings):
        self.text, self.db, self.findings = text, db, findings
        self.version = None
        self.index, self.place = None, ""       # what is read now: id of an index, and where it is
        self.index_ids = {}

    def read(self):
        readers = {"users": self._read_users, "indexes": self._read_indexes,
                   "devpi_lite": self._read_own}
        seen = set()
        for key in self.text.members(""):
            if key in seen:
                raise self.text.error(key, "it is there twice")
            seen.add(key)
            if key in readers:
                readers[key]()
            else:
                value = self.text.value(key)    # `uuid` and `secret` belong to the old server
                if key == "dumpversion":
                    self.version = value
        self.text.end()
        if str(self.version) not in ("1", "2", "3") or isinstance(self.version, bool):
            said = "missing" if "dumpversion" not in seen else one_line(repr(self.version), 40)
            raise FatalError(f"the version of the dump, dumpversion in {self.text.name}, is {said}:"
                             " 1, 2 and 3 are known")
        self.version = int(self.version)
        for key in ("users", "indexes"):
            if key not in seen:
                self.findings.error(key, f"{self.text.name} has no {key}: was it cut?")

    def _error(self, place, sentence):
        self.findings.error(f"{self.place}{place}", sentence, self.index)

    def _object(self, place):
        """The object that comes next; None, and an error is noted, if it is none."""
        value = self.text.value(f"{self.place}{place}")
        if isinstance(value, dict):
            return value
        self._error(place, f"an object was expected, not {json_kind(value)}")
        return None

    def _members(self, place, empty_list=False):
        """Yield the keys of the object that comes next; another value is an error, that is noted.

        `empty_list`: that will do, too."""
        where, mark = f"{self.place}{place}", self.text.mark(f"{self.place}{place}")
        if mark != "{":
            value = self.text.value(where)
            if not (empty_list and value == []):
                self._error(place, f"an object was expected, not {json_kind(value)}")
            return
        yield from self.text.members(where)

    def _items(self, place):
        where, mark = f"{self.place}{place}", self.text.mark(f"{self.place}{place}")
        if mark != "[":
            self._error(place, "a list was expected, not "
                        + json_kind(self.text.value(where)))
            return
        yield from self.text.items(where)

    def _read_users(self):
        for name in self._members("users"):
            facts = self._object(f"users/{name}")
            if facts is not None and self._is_new(
                    "INSERT OR IGNORE INTO users VALUES (?, ?)", name, json.dumps(facts)) is None:
                self._error(f"users/{name}", "the user is there twice")

    def _is_new(self, insert, *values):
        """The id of a row that is inserted; None if it was there."""
        cursor = self.db.execute(insert, values)
        return cursor.lastrowid if cursor.rowcount else None

    def _read_indexes(self):
        for path in self._members("indexes"):
            self.index, self.place = None, f"indexes/{path}/"
            self.index = self._is_new("INSERT OR IGNORE INTO indexes (path) VALUES (?)", path)
            if self.index is None:
                self._error("", "the index is there twice")
            self._read_index()
            self.index, self.place = None, ""

    def _read_index(self):
        readers = {"projects": self._read_projects, "files": self._read_files}
        seen = set()
        for key in self._members(""):
            if key in seen:
                self._error(key, "it is there twice")
            seen.add(key)
            if key in readers:
                readers[key]()
            elif key == "indexconfig":
                facts = self._object(key)
                self.db.execute("UPDATE indexes SET facts = ? WHERE id = ?",
                                (json.dumps(facts or {}), self.index))
            else:
                self.text.value(f"{self.place}{key}")
        if "indexconfig" not in seen:
            self._error("indexconfig", "it is missing")

    def _read_projects(self):
        for name in self._members("projects", empty_list=True):
            place = f"projects/{name}"
            project = normalize(name)
            if not re.search("[a-z0-9]", project) or len(name) > 200 or sound(name) != name:
                self._error(place, "no name of a project")
            self.db.execute("INSERT OR IGNORE INTO projects (index_id, name, ruled) "
                            "VALUES (?, ?, 0)", (self.index, project))
            project_id, = self.db.execute("SELECT id FROM projects WHERE index_id = ? AND name = ?",
                                          (self.index, project)).fetchone()
            for key in self._members(place):
                # devpi 7 puts the versions one level deeper, beside the project's configuration
                if key == "versions":
                    for version in self._members(f"{place}/versions"):
                        self._read_release(project_id, name, version, f"{place}/versions/{version}")
                elif key == "config":
                    self._read_project_config(project_id, project, f"{place}/config")
                else:
                    self._read_release(project_id, name, key, f"{place}/{key}")

    def _read_project_config(self, project_id, project, place):
        facts = self._object(place) or {}
        name = facts.pop("name", project)
        if not isinstance(name, str) or normalize(name) != project:
            self._error(f"{place}/name", f"another project than {project}")
        rules = facts.pop("inheritance_rules", None)
        if rules in (ALLOW_ALL, "allow all"):
            self.db.execute("UPDATE projects SET ruled = 1 WHERE id = ?", (project_id,))
        elif rules not in (None, [], ""):
            self._error(f"{place}/inheritance_rules",
                        f"{one_line(repr(rules))}: {ALLOW_ALL} is the only rule that is known")
        if facts:
            self.findings.warn(f"{self.place}{place}: {', '.join(sorted(facts))} has no meaning "
                               "here, and is left out", "unknown configuration of projects")

    def _read_release(self, project_id, name, version, place):
        metadata = self._object(place)
        if metadata is None:
            return
        if not is_safe_filename(version) or len(version) > 200 or version.strip() != version:
            self._error(place, "no version of a release")
        metadata = self._sound_metadata(metadata, name, version, place)
        if self._is_new("INSERT OR IGNORE INTO releases (project_id, version, metadata, "
                        "requires_python) VALUES (?, ?, ?, ?)", project_id, version,
                        json.dumps(metadata), metadata["requires_python"] or None) is None:
            self._error(place, "the release is there twice")

    def _sound_metadata(self, metadata, name, version, place):
        """A release's metadata as it is stored."""
        found, unknown = {}, {}
        for key, value in metadata.items():
            if key in TEXT_FIELDS:
                found[key] = self._text(f"{place}/{key}", value, key)
            elif key in LIST_FIELDS or key in NEWER_LIST_FIELDS:
                found[key] = self._texts(f"{place}/{key}", value)
            elif key == "other" and isinstance(value, dict):
                found[key] = value
            elif key in ("+doczip", ":action"):
                continue
            elif key.startswith("+"):
                self._error(f"{place}/{key}", "a key of devpi's store, not of metadata")
            else:
                unknown[key] = value
        if not found.get("name"):
            found["name"] = name
        elif normalize(found["name"]) != normalize(name):
            self._error(f"{place}/name", f"{one_line(found['name'], 80)} is another project")
        found["version"] = version
        if unknown:
            found[FROM_DEVPI] = unknown
        return with_defaults(found)

    def _text(self, place, value, key):
        if isinstance(value, str):
            return value
        if key == "description" and isinstance(value, dict):
            self.findings.warn(f"{self.place}{place} is no text, and is left empty",
                               "descriptions that are no texts")
            return ""
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return ", ".join(value)
        if isinstance(value, (dict, list)):
            self._error(place, f"a text was expected, not {json_kind(value)}")
        return "" if value is None or isinstance(value, (dict, list)) else str(value)

    def _texts(self, place, value):
        if isinstance(value, str):
            return [line for line in value.split("\n") if line]
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return value
        if value is not None:
            self._error(place, "a list of texts was expected")
        return []

    def _read_files(self):
        for number in self._items("files"):
            place = f"files/{number}"
            entry = self._object(place)
            if entry is not None:
                self._read_file(entry, number, place)

    def _read_file(self, entry, number, place):
        """Note a file; only what the dump says of it is checked here."""
        relpath, kind = entry.get("relpath"), entry.get("type")
        if not isinstance(relpath, str) or not _is_inside(relpath):
            self._error(f"{place}/relpath", f"{one_line(repr(relpath))} is no path below the dump")
            return
        place = f"{place} ({relpath})"
        if kind not in _DUMP_KINDS:
            self._error(place, f"its type, {one_line(repr(kind))}, is none of "
                        + ", ".join(_DUMP_KINDS))
            return
        project, version = entry.get("projectname"), entry.get("version")
        if not isinstance(project, str) or not isinstance(version, (str, type(None))):
            self._error(place, "projectname and version have to be texts")
            return

        facts = self._file_facts(entry, kind, place)
        if self._is_new(
                "INSERT OR IGNORE INTO files (index_id, number, kind, project, version, filename, "
                "relpath, facts) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", self.index, number, kind,
                normalize(project), version or "", relpath.rpartition("/")[2], relpath,
                json.dumps(facts)) is None:
            self._error(place, "the file is there twice")

    def _file_facts(self, entry, kind, place):
        """{"hashes", "size", "modified", "history", "url", "tested", "own"} of a file."""
        mapping = entry.get("entrymapping")
        if mapping is None:
            mapping = {}
            if kind == "releasefile":
                self._error(f"{place}/entrymapping", "it is missing")
        if not isinstance(mapping, dict):
            self._error(f"{place}/entrymapping", "an object was expected")
            mapping = {}
        facts = {"hashes": self._hashes(mapping, f"{place}/entrymapping")}

        size = mapping.get("size")
        if isinstance(size, str) and re.fullmatch("[0-9]{1,18}", size):     # devpi-server 1.x
            size = int(size)
        if size is not None and (type(size) is not int or size < 0):
            self._error(f"{place}/entrymapping/size", "no number of bytes")
        facts["size"] = size
        url = mapping.get("url")
        facts["url"] = url if isinstance(url, str) else None
        facts["history"] = self._history(entry.get("log"), f"{place}/log")
        facts["modified"] = self._modified(mapping.get("last_modified"), facts["history"],
                                           f"{place}/entrymapping/last_modified")

        if kind == "toxresult":
            tested = entry.get("for_entrypath")
            if not isinstance(tested, str) or not tested.rpartition("/")[2]:
                self._error(f"{place}/for_entrypath", "it does not name the file that was tested")
                tested = ""
            facts["tested"] = tested.rpartition("/")[2]
        own = entry.get("devpi_lite")
        if own is not None and not isinstance(own, dict):
            self._error(f"{place}/devpi_lite", "an object was expected")
        facts["own"] = own if isinstance(own, dict) else {}
        return facts

    def _hashes(self, mapping, place):
        """{algorithm: hex} of all that a file's record states."""
        found = mapping.get("hashes")
        if found is not None and not isinstance(found, dict):
            self._error(f"{place}/hashes", "an object was expected")
            found = None
        found = dict(found or {})
        spec = mapping.get("hash_spec")
        if spec:
            algorithm, _, digest = spec.partition("=") if isinstance(spec, str) else ("", "", "")
            if found.setdefault(algorithm, digest) != digest:
                self._error(f"{place}/hash_spec", "it differs from hashes")
        if mapping.get("md5"):
            found.setdefault("md5", mapping["md5"])
        for algorithm, digest in found.items():
            if not isinstance(digest, str) or not is_digest(algorithm, digest):
                self._error(f"{place}/hashes", f"{one_line(f'{algorithm}={digest}', 100)} is no "
                            "hash that can be checked here")
        return {algorithm: str(digest).lower() for algorithm, digest in found.items()}

    def _history(self, entries, place):
        """A file's history as it is stored; None if there is none."""
        if entries is None:
            return None
        if not isinstance(entries, list) or not all(
                isinstance(entry, dict) and isinstance(entry.get("what"), str)
                for entry in entries):
            self._error(place, "a list of objects with `what` was expected")
            return None
        for entry in entries:
            when = entry.get("when")
            if isinstance(when, str):
                with contextlib.suppress(ValueError, OverflowError):
                    entry["when"] = list(time.gmtime(_seconds_of_text(when))[:6])
            elif not isinstance(when, list) or len(when) != 6 or not all(
                    type(number) is int and 0 <= number < 10000 for number in when):
                self._error(f"{place}/when", "six numbers or a time were expected")
        return entries

    def _modified(self, text, history, place):
        """When a file was uploaded, in seconds; None for now."""
        if text is not None:
            try:
                return _seconds_of_text(text)
            except (ValueError, TypeError, OverflowError, AttributeError, IndexError):
                self._error(place, f"{one_line(repr(text), 60)} is no time, as an HTTP-date or "
                            "2026-11-28T13:00:00Z are")
                return None
        times = [entry["when"] for entry in history or () if isinstance(entry.get("when"), list)]
        with contextlib.suppress(ValueError, OverflowError):
            return max(datetime.datetime(*when, tzinfo=datetime.timezone.utc).timestamp()
                       for when in times) if times else None
        return None

    # -- what devpi's dump has no place for

    def _read_own(self):
        """Note what an export of this program says besides devpi's dump."""
        for key in self._members("devpi_lite"):
            place = f"devpi_lite/{key}"
            if key == "rows":
                for number in self._items(place):
                    self._note_own("row", "", "", self.text.value(f"{place}/{number}"))
            elif key in ("users", "indexes"):
                for name in self._members(place):
                    self._note_own(key, name, "", self._object(f"{place}/{name}"))
            elif key == "projects":
                for path in self._members(place):
                    for name in self._members(f"{place}/{path}"):
                        self._note_own(key, path, name, self._object(f"{place}/{path}/{name}"))
            elif key == "releases":
                for path in self._members(place):
                    for name in self._members(f"{place}/{path}"):
                        where = f"{place}/{path}/{name}"
                        for version in self._members(where):
                            self._note_own(key, f"{path}/{name}", version,
                                           self._object(f"{where}/{version}"))
            else:
                self.text.value(place)

    def _note_own(self, kind, place, key, value):
        self.db.execute("INSERT INTO own VALUES (?, ?, ?, ?)",
                        (kind, place, key, json.dumps(value)))


def _is_inside(relpath):
    """Whether a path of a dump leads to something below it, on every system."""
    parts = relpath.split("/")
    return not {"", ".", ".."}.intersection(parts) and len(relpath) <= 4000 and \
        re.search(r"[\\\x00-\x1f\x7f\ud800-\udfff]", relpath) is None and \
        (os.name != "nt" or ":" not in relpath)


def _seconds_of_text(text):
    """The POSIX time of an ISO text in UTC or an HTTP-date; ValueError or TypeError for others."""
    if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}(\.[0-9]{1,6})?Z", text):
        return seconds_of(text)
    return email.utils.parsedate_to_datetime(text).timestamp()


# -- what a dump says, checked as a whole


class Dump:
    """A dump: its folder, and what it says, in a temporary database that goes with `close`.

    `skipped_types`: of indexes that are left out; `with_pypi`: root/pypi is not left out."""

    def __init__(self, folder, tmp, skipped_types=(), with_pypi=True):
        self.folder = os.path.realpath(folder)
        self.skipped, self.with_pypi = {index_type(word) for word in skipped_types}, with_pypi
        self.findings = Findings()
        self.path = os.path.join(tmp, "dump.db")
        self.db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        self.db.row_factory = sqlite3.Row
        self.db.execute("PRAGMA journal_mode = OFF")
        self.db.execute("PRAGMA synchronous = OFF")
        run_script(self.db, _DUMP_TABLES)
        self.version = None
        self.bases = {}
        self.without_password = []      # users who can't log in
        self.sound_folders = set()
        self.files = self.size = 0

    def close(self):
        self.db.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def read(self):
        """Read dataindex.json; FatalError if it is unreadable."""
        path = os.path.join(self.folder, "dataindex.json")
        try:
            if not stat.S_ISREG(os.lstat(path).st_mode):
                raise FatalError(f"{path} is no plain file")
            file = open(path, "rb")
        except OSError as error:
            raise FatalError(f"{self.folder} is no dump of devpi: can't read dataindex.json in it "
                             f"({error.strerror})") from None
        with file:
            self.db.execute("BEGIN")
            reader = DumpReader(JsonFile(file, "dataindex.json"), self.db, self.findings)
            reader.read()
            self.version = reader.version
            self.db.execute("COMMIT")

    def check(self, users_here, bases_here):
        """Check all that was read; FatalError after all errors were printed.

        `users_here`: names of users that are in the directory already; `bases_here`: {path of an
        index there: its bases}."""
        self.db.execute("BEGIN")
        self._check_indexes(users_here, bases_here)
        self._check_users(users_here)
        self._check_files()
        if self.version == 3:
            self._warn_of_order()
        self.db.execute("COMMIT")
        self.findings.refuse()

    def set_passwords(self, passwords):
        """Let these count, {user: password}, in place of those of the dump."""
        for name, password in passwords.items():
            row = self.db.execute("SELECT facts FROM users WHERE name = ?", (name,)).fetchone()
            if row is None:
                raise FatalError(f"--set-passwords: there is no user {one_line(name)} in the dump")
            value = json.loads(row["facts"])
            value["pwhash"] = hash_password(password)
            for key in ("pwhash", "pwsalt"):
                value["attributes"].get(FROM_DEVPI, {}).pop(key, None)
            if not value["attributes"].get(FROM_DEVPI, True):
                del value["attributes"][FROM_DEVPI]
            self.db.execute("UPDATE users SET facts = ? WHERE name = ?", (json.dumps(value), name))
        self.without_password = [name for name in self.without_password if name not in passwords]

    def has_password(self, name):
        row = self.db.execute("SELECT facts FROM users WHERE name = ?", (name,)).fetchone()
        return row is not None and json.loads(row["facts"])["pwhash"] is not None

    def has_index(self, path):
        return self.db.execute("SELECT 1 FROM indexes WHERE path = ? AND NOT is_left_out",
                               (path,)).fetchone() is not None

    def own(self, kind, place):
        """{key: value} of what our own export says besides of a place."""
        return {row["key"]: json.loads(row["value"]) for row in self.db.execute(
            "SELECT key, value FROM own WHERE kind = ? AND place = ?", (kind, place))}

    # -- users

    def _check_users(self, here):
        owners = {path.partition("/")[0] for path, in self.db.execute(
            "SELECT path FROM indexes WHERE NOT is_left_out")}
        names = {name for name, in self.db.execute("SELECT name FROM users")}
        for owner in sorted(owners - names - set(here)):
            self.findings.error(f"indexes/{owner}/...", f"there is no user {owner!r} in the dump")
        nobody = []
        for name in sorted(names):
            try:
                check_devpi_name("username", name)
            except BadRequest as problem:
                self.findings.error(f"users/{name}", problem.message)
            if name in here and name != "root":
                self.findings.error(f"users/{name}", "there is a user of that name here already")
            facts, = self.db.execute("SELECT facts FROM users WHERE name = ?", (name,)).fetchone()
            value = self._account(name, json.loads(facts))
            self.db.execute("UPDATE users SET facts = ? WHERE name = ?", (json.dumps(value), name))
            if value["pwhash"] is None and name != "root":
                nobody.append(name)
        self.without_password = nobody

    def _account(self, name, facts):
        """A user's row."""
        attributes, kept = {}, {}
        for key, value in facts.items():
            if key in USER_ATTRIBUTES:
                if key != "custom_data" and value is not None:
                    value = value if isinstance(value, str) else json.dumps(value)
                if value not in (None, "", {}, []):
                    attributes[key] = value
            elif key not in ("username", "created", "modified", "indexes"):
                kept[key] = value

        try:
            pwhash = imported_hash(facts.get("pwhash"), facts.get("pwsalt"))
        except ValueError as error:
            self.findings.warn(f"user {name}: {error}", "passwords that can't be taken over")
            pwhash = None
        own = self.own("users", name).get("", {})
        if "pwhash" in own:
            pwhash = own["pwhash"]
            if pwhash is not None and not is_password_hash(pwhash):
                self.findings.error(f"devpi_lite/users/{name}/pwhash", "no hash of this program")
        if pwhash is None or "pwhash" in own and not own.get("devpi_hash_counts"):
            kept.pop("pwhash", None)
            kept.pop("pwsalt", None)
        if kept:
            attributes[FROM_DEVPI] = kept
        return {"pwhash": pwhash, "generation": secrets.token_hex(8), "attributes": attributes,
                "created": self._time(name, facts, "created") or "1970-01-01T00:00:00Z",
                "modified": self._time(name, facts, "modified")}

    def _time(self, name, facts, key):
        value = facts.get(key)
        if value is not None and (not isinstance(value, str) or len(value) > 100
                                  or sound(value) != value):
            self.findings.error(f"users/{name}/{key}", "no time")
        return value or None

    # -- indexes

    def _check_indexes(self, users_here, bases_here):
        bases = dict(bases_here)
        for row in self.db.execute("SELECT id, path, facts FROM indexes").fetchall():
            facts = json.loads(row["facts"] or "{}")
            type_ = index_type(facts.get("type", "stage"))
            is_pypi = row["path"] == "root/pypi"
            if isinstance(type_, str) and type_ in self.skipped or \
                    is_pypi and not self.with_pypi or is_pypi and "root/pypi" in bases_here:
                self.findings.leave_out(row["id"])
                self.db.execute("UPDATE indexes SET is_left_out = 1 WHERE id = ?", (row["id"],))
                continue
            config = self._index_config(row, type_, facts)
            if row["path"] in bases_here:
                self.findings.error(f"indexes/{row['path']}", "there is such an index here already")
            if config is not None:
                bases[row["path"]] = config.get("bases", [])
                self.db.execute("UPDATE indexes SET facts = ? WHERE id = ?",
                                (json.dumps(config), row["id"]))
        self._check_bases(bases, bases_here)
        self.bases = bases

    def _index_config(self, row, type_, facts):
        """An index's configuration as it is stored; None if that is not possible."""
        index_id, path, place = row["id"], row["path"], f"indexes/{row['path']}"
        user, slash, name = path.partition("/")
        try:
            if not slash:
                raise BadRequest("an index is named user/index")
            check_devpi_name("indexname", name)
            edit = ConfigEdit(type_, index_defaults(type_, user), ())
        except BadRequest as problem:
            hint = "; --skip-import-type leaves indexes of a type out" \
                if "unknown index type" in problem.message else ""
            self.findings.error(place, problem.message + hint, index_id)
            return None

        if "pypi_whitelist" in facts:
            facts.setdefault("mirror_whitelist", facts.pop("pypi_whitelist"))
        kept = {}
        # devpi 7's words last: one of them adds to a list
        for key, value in sorted(facts.items(), key=lambda item: item[0] in NEWER_KEYS):
            if key == "type" or value is None:
                continue
            if option_key(key) in edit.keys:
                self._apply(edit, key, _as_option(option_key(key), value), place, index_id)
            elif option_key(key) not in STAGE_KEYS:
                kept[key] = value
        for key, value in self.own("indexes", path).get("", {}).items():
            if key in edit.keys:
                self._apply(edit, key, value, f"devpi_lite/{place}", index_id)

        config = edit.config
        if "mirror_whitelist" in config:
            ruled = [name for name, in self.db.execute(
                "SELECT name FROM projects WHERE index_id = ? AND ruled ORDER BY name",
                (index_id,))]
            listed = config["mirror_whitelist"]
            config["mirror_whitelist"] = listed + [name for name in ruled if name not in listed]
        if len(config.get("bases", ())) > Limits.bases:
            self.findings.error(place, f"it has more than {Limits.bases} bases", index_id)
        if kept:
            config[FROM_DEVPI] = kept
        return config

    def _apply(self, edit, key, value, place, index_id):
        if value in ("", [""]) and key != "description" and key != "title":
            return
        try:
            edit.apply_object({key: value})
        except BadRequest as problem:
            self.findings.error(f"{place}/indexconfig/{key}", problem.message, index_id)

    def _check_bases(self, bases, bases_here):
        for path, named in bases.items():
            for base in named if path not in bases_here else ():
                if not re.fullmatch(r"[^/\s]+/[^/\s]+", base):
                    self.findings.error(f"indexes/{path}/indexconfig/bases",
                                        f"{one_line(repr(base), 100)} is not user/index")
                elif base not in bases:
                    self.findings.warn(f"the base {base} of {path} does not exist; it is kept",
                                       "missing bases")
        for cycle in _cycles(bases):
            if not set(cycle) <= set(bases_here):
                self.findings.error(f"indexes/{cycle[0]}/indexconfig/bases",
                                    f"a circle of bases: {' -> '.join(cycle[:20])}")

    # -- files

    def _check_files(self):
        last = -1
        while True:
            rows = self.db.execute(
                "SELECT files.*, indexes.path AS place, indexes.facts AS config, "
                "projects.id AS project_id, releases.id AS release_id FROM files "
                "JOIN indexes ON indexes.id = files.index_id "
                "LEFT JOIN projects ON projects.index_id = files.index_id "
                "AND projects.name = files.project "
                "LEFT JOIN releases ON releases.project_id = projects.id "
                "AND releases.version = files.version "
                "WHERE files.id > ? AND NOT is_left_out ORDER BY files.id LIMIT 1000",
                (last,)).fetchall()
            if not rows:
                return
            config = {}
            for row in rows:
                if row["index_id"] not in config:
                    config[row["index_id"]] = json.loads(row["config"])
                self._check_file(row, config[row["index_id"]])
            last = rows[-1]["id"]

    def _check_file(self, row, config):
        place = f"indexes/{row['place']}/files/{row['number']} ({row['relpath']})"

        def error(sentence):
            self.findings.error(place, sentence, row["index_id"])

        if not is_safe_filename(row["filename"]):
            error("no name of a file")
        facts = json.loads(row["facts"])
        if config.get("type") == "mirror":
            if row["kind"] != "releasefile":
                self.findings.warn(f"{row['relpath']} is left out: mirrors have no documentation "
                                   "and no test results", "files of mirrors that are left out")
                self.db.execute("DELETE FROM files WHERE id = ?", (row["id"],))
                return
            try:
                to_url("url", facts["url"])
            except BadRequest:
                error("it has no url, from which the mirror got it")

        if row["project_id"] is None:
            error(f"the project {row['project']} is not among the projects of the index")
        elif row["release_id"] is None:
            version = self._version_of(row, facts)
            if version is None:
                error(f"the project {row['project']} has no release "
                      f"{row['version'] or 'for it'}")
            else:
                self.db.execute("UPDATE files SET version = ? WHERE id = ?", (version, row["id"]))
        if row["kind"] == "toxresult" and facts["tested"] and self.tested(row, facts) is None:
            error(f"there is no file {one_line(facts['tested'], 200)}, which it says was tested")
        self._check_bytes(row, facts, error)

    def _check_bytes(self, row, facts, error):
        try:
            self._refuse_links(row["relpath"])
            found = os.lstat(os.path.join(self.folder, row["relpath"]))
            if not stat.S_ISREG(found.st_mode):
                raise FatalError("it is no plain file")
        except FatalError as problem:
            error(str(problem))
        except OSError as problem:
            error("the file is missing" if isinstance(problem, FileNotFoundError)
                  else f"the file can't be read: {problem.strerror}")
        else:
            if facts["size"] not in (None, found.st_size):
                error(f"the file has {found.st_size} bytes, not {facts['size']}")
            self.files += 1
            self.size += found.st_size

    def _refuse_links(self, relpath):
        """FatalError if a folder on the way is a symbolic link."""
        folder = relpath.rpartition("/")[0]
        if not folder or folder in self.sound_folders:
            return
        self._refuse_links(folder)
        if os.path.islink(os.path.join(self.folder, folder)):
            raise FatalError(f"{folder} is a symbolic link, which is not followed")
        if len(self.sound_folders) > 10000:
            self.sound_folders.clear()
        self.sound_folders.add(folder)

    def _version_of(self, row, facts):
        """The version of its project that a file belongs to, where the dump does not spell it so;
        None if there is none."""
        known = [version for version, in self.db.execute(
            "SELECT version FROM releases WHERE project_id = ?", (row["project_id"],))]
        if row["version"]:
            found = spellings(row["version"], known)
        elif row["kind"] == "releasefile":
            found = spellings(version_of_file(row["filename"], row["project"]), known)
        elif row["kind"] == "doczip":
            found = sorted((version for version in known
                            if row["filename"].endswith(f"-{version}.doc.zip")), key=len)[-1:]
            if not found and row["filename"].endswith(".zip") \
                    and normalize(row["filename"][:-len(".zip")]) == row["project"]:
                found = sorted(known, key=version_key)[-1:]     # in 1.1 they were a project's
        else:
            tested = self.tested(row, facts)
            found = [tested["version"]] if tested and tested["version"] in known else []
        return found[0] if found else None

    def tested(self, row, facts):
        """The row of the file that a test result is about, by the last part of its path; None."""
        return self.db.execute(
            "SELECT * FROM files WHERE index_id = ? AND filename = ? AND kind = 'releasefile' "
            "ORDER BY project != ?, version != ? LIMIT 1",
            (row["index_id"], facts["tested"], row["project"], row["version"])).fetchone()

    # -- the order in which devpi 7 asks indexes

    def _warn_of_order(self):
        """Say for which indexes another file than in devpi 7 may be given."""
        kinds = {row["path"]: json.loads(row["facts"]).get("type") for row in self.db.execute(
            "SELECT path, facts FROM indexes WHERE NOT is_left_out")}
        self.db.execute("CREATE TEMP TABLE shared AS SELECT filename FROM files "
                        "WHERE kind = 'releasefile' GROUP BY filename "
                        "HAVING count(DISTINCT index_id) > 1")
        for path in sorted(kinds):
            ours, theirs = _orders(path, self.bases, kinds)
            if ours == theirs:
                continue
            rank = {each: (ours.index(each), theirs.index(each)) for each in ours}
            found = collections.defaultdict(set)
            for row in self.db.execute(
                    "SELECT project, filename, indexes.path FROM files "
                    "JOIN indexes ON indexes.id = index_id WHERE kind = 'releasefile' "
                    "AND filename IN shared"):
                if row["path"] in rank:
                    found[row["project"], row["filename"]].add(row["path"])
            changed = sorted(filename for (_, filename), places in found.items()
                             if min(places, key=lambda each: rank[each][0])
                             != min(places, key=lambda each: rank[each][1]))
            self.findings.warn(
                f"{path} asks its bases in the order {', '.join(ours)} (devpi 6), not "
                f"{', '.join(theirs)} (devpi 7); files of another index are given for: "
                + (", ".join(changed[:20]) or "none")
                + (f" and {len(changed) - 20} more" if len(changed) > 20 else ""))


def _as_option(key, value):
    """The value of an option as devpi stores it, in a type that it has here."""
    if key in ("title", "description", "mirror_web_url_fmt") and not isinstance(value, str):
        return json.dumps(value)
    if key == "mirror_cache_expiry" and isinstance(value, (int, float)):
        return max(0, int(value))
    return value


def _cycles(bases):
    """Yield circles of bases as lists of paths; an index may be its own base."""
    done, current = set(), set()
    for start in bases:
        if start in done:
            continue
        trail, left = [start], [iter(bases[start])]
        current.add(start)
        while trail:
            for base in left[-1]:
                if base in current and base != trail[-1]:
                    yield trail[trail.index(base):] + [base]
                elif base in bases and base not in done and base not in current:
                    trail.append(base)
                    left.append(iter(bases[base]))
                    current.add(base)
                    break
            else:
                left.pop()
                done.add(trail[-1])
                current.discard(trail.pop())


def _orders(path, bases, kinds):
    """The order in which an index and its bases are asked: (devpi 6's, devpi 7's)."""
    def split(found):
        there = [each for each in found if each in kinds]
        return ([each for each in there if kinds[each] != "mirror"],
                [each for each in there if kinds[each] == "mirror"])

    wide, seen = [path], {path}
    for each in wide:
        fresh = [base for base in dict.fromkeys(bases.get(each, ())) if base not in seen]
        seen.update(fresh)
        wide += fresh
    deep, seen, left = [], set(), [path]
    while left:
        each = left.pop()
        if each not in seen:
            seen.add(each)
            deep.append(each)
            left += reversed(bases.get(each, ()))
    (stages, mirrors), (deep_stages, deep_mirrors) = split(wide), split(deep)
    return stages + mirrors, deep_stages + deep_mirrors[::-1]


# -- the bytes of files


def take_dumped(intake, job):
    """Take a file of a dump in; what is known of it then, or {"error": sentence}.

    `job`: {"path", "hashes", "filename", "kind", "link"}."""
    hashes = dict(job["hashes"])
    try:
        sha256, size = intake.take(job["path"], hashes.pop("sha256", None), job["link"])
        found = {"sha256": sha256, "size": size}
        with open(intake.path(sha256), "rb") as file:
            for algorithm, digest in hashes.items():
                _check_other_hash(file, algorithm, digest)
            if job["kind"] == "releasefile" and job["filename"].lower().endswith(".whl"):
                found.update(_wheel_facts(file, job["filename"]))
            elif job["kind"] == "doczip":
                found.update(_doc_facts(file, job["filename"]))
        return found
    except Damaged as problem:
        return {"error": problem.message}
    except OSError as error:
        return {"error": f"the file can't be read: {reason_of(error)}"}


def _check_other_hash(file, algorithm, digest):
    found = hashlib.new(algorithm)
    file.seek(0)
    for piece in read_pieces(file):
        found.update(piece)
    if found.hexdigest() != digest:
        raise Damaged(f"{algorithm} mismatch, got {found.hexdigest()}, expected {digest}")


def _wheel_facts(file, filename):
    try:
        data = archive_metadata(file, filename, is_needed=False)
    except Problem as problem:
        return {"note": f"taken without metadata: {problem.message}"}
    if data is None:
        return {}
    metadata = MetadataFile.of(data)
    return {"metadata": [metadata.sha256, base64.b64encode(metadata.packed).decode()],
            "requires_python": parse_core_metadata(data).get("requires_python") or None}


def _doc_facts(file, filename):
    try:
        found = doc_members(file, filename)
    except Problem as problem:
        return {"note": f"taken, but can't be shown: {problem.message}"}
    return {"members": found[0]} if found else {}


class Importer:
    """Puts a checked dump into a store, as one change.

    `link`: files are hard-linked where that is possible; `prepare`: a function of the change that
    puts what is not in the dump."""

    def __init__(self, dump, store, intake, link, prepare, progress):
        self.dump, self.store, self.intake, self.link = dump, store, intake, link
        self.prepare, self.progress = prepare, progress
        self.counts = collections.Counter()
        self.is_stopped = False

    def run(self, change):
        """The change."""
        change.is_replay = True
        change.execute("PRAGMA cache_size = -32000")
        self.dump.db.execute("BEGIN")
        for name, facts in self.dump.db.execute("SELECT name, facts FROM users ORDER BY name"):
            if change.id_of("user", (name,)) is None:
                change.put("user", (name,), json.loads(facts))
                self.counts["user"] += 1
        self.prepare(change)
        for row in self.dump.db.execute("SELECT id, path, facts FROM indexes "
                                        "WHERE NOT is_left_out ORDER BY id").fetchall():
            self._put_index(change, row)
        self._put_own_rows(change)
        self.dump.findings.refuse()

        self.intake.keep()
        change.tags.clear()
        change.touch(EVERYTHING)
        self.store.restart_log(change)

    def counted(self):
        """What was imported, in words."""
        words = {"user": "users", "index": "indexes", "project": "projects",
                 "release": "releases", "file": "files"}
        return ", ".join(f"{self.counts[one]:,} {one if self.counts[one] == 1 else many}"
                         for one, many in words.items())

    def _go_on(self, change):
        """Bound what the change remembers; end here if the import was stopped."""
        if self.is_stopped:
            raise FatalError("the import was stopped")
        if len(change.ids) > 5000:
            change.ids.clear()
            change.tags.clear()

    def _put_index(self, change, row):
        key, config = tuple(row["path"].split("/")), json.loads(row["facts"])
        index = Index(change.put("index", key, {"config": config}), *key, config)
        self.counts["index"] += 1
        if config["type"] == "stage":
            self._put_projects(change, row["id"], key)
        for kind in _DUMP_KINDS:
            self._put_files(change, row["id"], index, kind)

    def _put_projects(self, change, dump_id, key):
        path = "/".join(key)
        own = self.dump.own("projects", path)
        for project_id, name in self.dump.db.execute(
                "SELECT id, name FROM projects WHERE index_id = ? ORDER BY id", (dump_id,)):
            status = {"status": "active", "reason": None, **own.get(name, {})}
            if status["status"] not in PROJECT_STATUSES:
                self.dump.findings.error(f"devpi_lite/projects/{path}/{name}", "no known status")
                continue
            change.put("project", (*key, name), status)
            self.counts["project"] += 1
            releases = self.dump.own("releases", f"{path}/{name}")
            for version, metadata in self.dump.db.execute(
                    "SELECT version, metadata FROM releases WHERE project_id = ? ORDER BY id",
                    (project_id,)):
                metadata = {**json.loads(metadata), **releases.get(version, {})}
                change.put("release", (*key, name, version), {"metadata": metadata})
                self.counts["release"] += 1
                self._go_on(change)

    def _put_files(self, change, dump_id, index, kind):
        rows = self.dump.db.execute(
            "SELECT files.*, metadata, requires_python FROM files "
            "JOIN projects ON projects.index_id = files.index_id AND projects.name = project "
            "JOIN releases ON project_id = projects.id AND releases.version = files.version "
            "WHERE files.index_id = ? AND kind = ? ORDER BY files.id", (dump_id, kind))
        put = self._put_cached if index.config["type"] == "mirror" else self._put_file
        for (row, facts, _), found in in_threads(self._take, map(self._job, rows)):
            self._go_on(change)
            place = f"indexes/{index.path}/files/{row['number']} ({row['relpath']})"
            if "error" in found:
                self.dump.findings.error(place, found["error"])
                continue
            if "note" in found:
                self.dump.findings.warn(f"{index.path}: {found['note']}",
                                        "files that are not what their name says")
            put(change, index, row, facts, found, place)
            self.counts["file"] += 1
            self.progress.add(found["size"])

    def _job(self, row):
        """(row, what it says, job for `take_dumped`) of a file."""
        facts = json.loads(row["facts"])
        hashes = facts["hashes"]
        if row["kind"] == "toxresult":      # devpi 6.5 to 6.9 noted the hashes of what was tested
            tested = self.dump.tested(row, facts)
            theirs = json.loads(tested["facts"])["hashes"] if tested else {}
            hashes = {algorithm: digest for algorithm, digest in hashes.items()
                      if theirs.get(algorithm) != digest}
        return row, facts, {
            "path": os.path.join(self.dump.folder, row["relpath"]), "link": self.link,
            "hashes": hashes, "filename": row["filename"], "kind": row["kind"]}

    def _take(self, told):
        if self.is_stopped:
            raise FatalError("the import was stopped")
        return take_dumped(self.intake, told[-1])

    def _put_file(self, change, index, row, facts, found, place):
        """Put a file of a stage."""
        key = (index.user, index.name)
        modified = time.time() if facts["modified"] is None else facts["modified"]
        history = facts["history"]
        if history is None:
            history = [history_entry("upload", who="<import>", dst=index.path)]
        value = {**dict.fromkeys(FileRows.plain), "first_seen": 0, "attestations": None,
                 "for": None, "project": row["project"], "version": row["version"],
                 "filename": row["filename"], "kind": row["kind"], "sha256": found["sha256"],
                 "size": found["size"], "uploaded": iso_time(modified),
                 "history": as_history(history)}
        folder = file_path(f"sha256={found['sha256']}", "")
        if row["kind"] == "releasefile":
            value["requires_python"] = found.get("requires_python", row["requires_python"])
        elif row["kind"] == "doczip":
            value["filename"] = f"{row['project']}-{row['version']}.doc.zip"
        else:
            tested = self.dump.tested(row, facts)
            if not tested["path"]:
                return      # it has an error of its own
            value["for"], folder = tested["path"], tested["path"].rpartition("/")[0] + "/"

        if found.get("metadata"):
            sha256, packed = found["metadata"]
            value["core_metadata"] = value["metadata_sha256"] = sha256
            change.put("metadata", (sha256,), {"packed": packed})
        enter_doc_members(change, found["sha256"], found.get("members"))
        value.update((name, own) for name, own in facts["own"].items() if name in value)
        path = folder + value["filename"]
        if change.id_of("file", (*key, path)) is not None:
            self.dump.findings.error(place, "the same bytes are there under this name already")
            return
        change.put("file", (*key, path), value)
        if row["kind"] == "releasefile":
            self.dump.db.execute("UPDATE files SET path = ? WHERE id = ?", (path, row["id"]))

    def _put_cached(self, change, index, row, facts, found, place):
        """Put a file that a mirror fetched."""
        yanked = json.loads(row["metadata"]).get(FROM_DEVPI, {}).get("yanked")
        file = UpstreamFile(
            row["filename"], facts["url"].partition("#")[0],
            best_hash(facts["hashes"]) or f"sha256={found['sha256']}", found["size"], "",
            row["requires_python"],
            yanked if isinstance(yanked, str) else "" if yanked else None)
        modified = facts["modified"]
        enter_cached(change, index, row["project"], row["version"], file, found["sha256"],
                     None if modified is None else http_date(modified),
                     MetadataFile(found["metadata"][0], base64.b64decode(found["metadata"][1]))
                     if found.get("metadata") else None, facts["own"])

    def _put_own_rows(self, change):
        """Put the rows of kinds that a dump of devpi has no place for."""
        in_devpi = ("user", "index", "project", "release", "file", "metadata")
        unknown = collections.Counter()
        for text, in self.dump.db.execute("SELECT value FROM own WHERE kind = 'row' "
                                          "ORDER BY rowid"):
            row = json.loads(text)
            try:
                kind, key, value = row
                key = tuple(key)
                if kind in ROWS and kind not in in_devpi:
                    if value is None or not ROWS[kind].accepts(key, value):
                        raise ValueError("it has another form than such rows have")
                    change.put(kind, key, value)
                else:
                    unknown[one_line(str(kind), 40)] += 1
            except (ValueError, TypeError, sqlite3.Error) as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                self.dump.findings.error("devpi_lite/rows", f"{one_line(repr(row), 200)}: "
                                         f"{reason_of(error)}")
            self._go_on(change)
        for kind, count in unknown.items():
            self.dump.findings.warn(f"{count} rows of the kind {kind} are left out: this program "
                                    "does not know it")


def _read_passwords(path):
    """{user: password} of a file with lines user:password."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FatalError(f"can't read the passwords in {path}: {reason_of(error)}") from None
    passwords = {}
    for number, line in enumerate(lines, 1):
        name, colon, password = line.partition(":")
        if not line.strip() or line.startswith("#"):
            continue
        if not colon or not password or name in passwords:
            raise FatalError(f"{path}, line {number}: user:password was expected, each user once")
        passwords[name] = password
    return passwords


@command(
    "import",
    "Read a dump that devpi-export or `export` wrote (devpi-server 2 to 7) into a missing or empty "
    "server directory; with --add into one that is in use, while no server runs on it. All of it "
    "is checked first; what is wrong is listed, and nothing is changed then.",
    argument("dir", help="the directory of the dump, with dataindex.json"),
    argument("--add", action="store_true",
             help="add the users and indexes of the dump to what the directory has"),
    argument("--set-passwords", metavar="FILE",
             help="file with lines user:password, which count in place of the dump's"),
    argument("--skip-import-type", metavar="TYPE", action="append", default=[],
             help="leave indexes of this type out; may be repeated"),
    argument("--hard-links", action="store_true",
             help="link the dump's files where that is possible, in place of copying them: nobody "
                  "may write to them any more"),
    argument("--no-events", action="store_true",
             help="accepted, as of devpi-import: the next start makes the search index anyway"),
    takes=(COMMON, FIRST_START))
def command_import(parsed):
    settings, told = parsed.settings, parsed.rest
    passwords = _read_passwords(told.set_passwords) if told.set_passwords else {}
    if not os.path.isfile(os.path.join(told.dir, "dataindex.json")):
        raise FatalError(f"{told.dir} is no dump of devpi: it has no dataindex.json")
    if not told.add:
        with new_directory(settings.serverdir):
            summary = _import(settings, told, passwords)
            read_secret(settings.serverdir, "")
    else:
        if not os.path.exists(os.path.join(settings.serverdir, "devpi_lite.db")):
            raise FatalError(f"there is no devpi_lite database in {settings.serverdir} to add to")
        if prepare_directory(settings.serverdir):
            raise FatalError(f"{settings.serverdir} is on read-only media")
        with take_lock(settings.serverdir):
            summary = _import(settings, told, passwords)
    print(summary)


def _import(settings, told, passwords):
    """Import a dump into a locked directory; returns what is to be said about it."""
    began = time.monotonic()
    blobs = Blobs(settings.serverdir)
    with contextlib.closing(Dump(told.dir, blobs.tmp, told.skip_import_type,
                                 settings.root_pypi and not told.add)) as dump, \
            contextlib.closing(Store(settings, create=not told.add)) as store, \
            Intake(blobs, in_place=not told.add) as intake:
        users_here, bases_here = set(), {}
        with store.read() as db:
            users_here.update(name for name, in db.execute("SELECT name FROM users"))
            bases_here.update((f"{user}/{name}", json.loads(config).get("bases", []))
                              for user, name, config in db.execute(
                                  "SELECT users.name, indexes.name, config FROM indexes "
                                  "JOIN users ON users.id = user_id"))
        dump.read()
        dump.check(users_here, bases_here)
        dump.set_passwords(passwords)
        root_hash = None if told.add or dump.has_password("root") else \
            hash_password(first_password(settings))

        def prepare(change):
            if root_hash:
                _put_root(change, root_hash)
            if not told.add and settings.root_pypi and not dump.has_index("root/pypi"):
                change.put("index", ("root", "pypi"), {"config": PYPI})

        with Progress("import", dump.files, dump.size) as progress:
            importer = Importer(dump, store, intake, told.hard_links, prepare, progress)
            try:
                store.write(importer.run)
            except BaseException:
                importer.is_stopped = True      # the writer's thread ends soon
                raise

        dump.findings.show_warnings()
        if dump.without_password:
            names = ", ".join(dump.without_password[:20])
            print(f"warning: nobody can log in as {names}"
                  f"{' and others' if len(dump.without_password) > 20 else ''}, for whom the dump "
                  "has no password that can be checked: `passwd USER` sets one", file=sys.stderr)
        return (f"imported {importer.counted()}, {size_text(progress.done_size)}, in "
                f"{time.monotonic() - began:.1f} seconds into {settings.serverdir}; "
                "the server can be started on it now")


def _put_root(change, pwhash):
    before = change.get("user", ("root",))
    change.put("user", ("root",), {
        "generation": secrets.token_hex(8), "created": plain_time(time.time()), "modified": None,
        "attributes": {}, **(before or {}), "pwhash": pwhash})


# ==================================================================================================
# 26  Backups
#
# Copies of a whole server directory, made while the server runs, in generations that share their
# files; and the way back.
# ==================================================================================================


# ==================================================================================================
# 27  Checks
#
# Whether all that the database names is here and undamaged; what nothing names any more; and how a
# server is, on one screen.
# ==================================================================================================


# -- gc


def period(text):
    """The seconds of `30m`, `24h` or `7d`."""
    match = re.fullmatch(r"([0-9]{1,6})([smhd])", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: a number with m, h or d, as 24h")
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


@command(
    "gc", "Move files that nothing in the database names to trash/, from where they come back if "
          "they are requested; delete what has been there for a week, and temporary files of "
          "killed processes.  A running server does the same every hour.",
    argument("--dry-run", action="store_true", help="only say what would be done"),
    argument("--older-than", type=period, default="24h", metavar="TIME",
             help="only files that are older, as 30m, 24h or 7d (default: 24h)"),
    argument("--empty-trash", action="store_true",
             help="delete all that has been in trash/ for an hour, not for a week"),
    takes=(COMMON,))
def command_gc(parsed):
    serverdir, told = parsed.settings.serverdir, parsed.rest
    give_way()
    if not told.dry_run:
        refuse_changes(serverdir)
    with contextlib.closing(open_rows(serverdir)) as db:
        refuse_lost_database(serverdir)
        blobs = Blobs(serverdir, read_only=told.dry_run)
        # not less than an hour: a server may be about to commit a row that names the file
        swept = blobs.collect(functools.partial(is_named, db), told.older_than,
                              3600 if told.empty_trash else None, told.dry_run)
        indexes = {row["id"] for row in db.execute("SELECT id FROM indexes")}

    old, cache = list(blobs.leftovers()), os.path.join(serverdir, "cache")
    if os.path.isdir(cache):        # a young one may be a list that a server just puts in place
        old += [path for path in MirrorNames.leftovers(cache, indexes)
                if newest_time(path) < time.time() - 3600]
    freed = sum(map(size_on_disk, old))
    for path in () if told.dry_run else old:
        remove(path)

    would = "would be " if told.dry_run else ""
    print(f"files: {_counted(swept.moved, swept.moved_size)} {would}moved to trash/, "
          f"{swept.kept:,} stay")
    print(f"trash: {_counted(swept.deleted, swept.deleted_size)} {would}deleted, "
          f"{_counted(*blobs.trashed)} stay" +
          (f", {swept.taken_back:,} {would}taken back" if swept.taken_back else ""))
    print(f"temporary files and folders: {_counted(len(old), freed)} {would}deleted")


def _counted(count, size):
    return f"{count:,} ({size_text(size)})"


def refuse_changes(serverdir):
    """FatalError if a command can't repair or clean this directory."""
    if not os.path.isdir(serverdir):
        raise FatalError(f"there is no directory {serverdir}: name one with --serverdir")
    if is_read_only(serverdir):
        raise FatalError(f"{serverdir} is on read-only media: nothing can be changed there")
    if os.path.exists(os.path.join(serverdir, UNFINISHED)):
        raise FatalError(f"an import or a restore into {serverdir} was cut off or is under way: "
                         "run it again, or remove the directory")
    owner = os.stat(serverdir).st_uid
    if hasattr(os, "geteuid") and os.geteuid() == 0 and owner != 0:
        raise FatalError(f"{serverdir} belongs to the user with the number {owner}, and the server "
                         f"could not use what root makes there: run this as that user (sudo -u "
                         f"'#{owner}' ...)")


# -- status


PLUGIN = "DEVPI_LITE"       # how its line for monitoring begins
PLUGIN_STATUS = {"ok": 0, "warn": 1, "fatal": 2, "unknown": 3}
PLUGIN_WORDS = {"ok": "OK", "warn": "WARNING", "fatal": "CRITICAL", "unknown": "UNKNOWN"}


class NoAnswer(FatalError):
    """A server does not answer: it is down, or too busy."""


def facts_of_directory(serverdir):
    """What `status` says of a server directory, as JSON; the names are those of +status where that
    has the fact, too.

    Takes no lock and writes nothing. A fact that the database of an older program does not have is
    None. FatalError if there is no database."""
    try:
        if "devpi_lite.db" not in os.listdir(serverdir):
            refuse_lost_database(serverdir)
    except (FileNotFoundError, NotADirectoryError):
        raise FatalError(f"there is no directory {serverdir}") from None
    with contextlib.closing(open_rows(serverdir, may_be_older=True, may_be_newer=True)) as db:
        db.execute("BEGIN")
        facts = {name: _fact(db, find) for name, find in _FACTS.items()}
        complaints = _complaints_of_rows(db, facts)
        db.execute("COMMIT")

    read_only = is_read_only(serverdir)
    files, size = _in_folder(os.path.join(serverdir, "trash"))
    free = shutil.disk_usage(serverdir).free
    database = os.path.join(serverdir, "devpi_lite.db")
    sizes = {"database": _size_of(database), "write-ahead-log": _size_of(database + "-wal"),
             "search": _size_of(os.path.join(serverdir, "search.db"))}
    if not read_only:
        complaints += disk_complaints(free)
    waiting, dead = facts["messages-of-outbox"] or (0, 0)
    projects, seconds = facts["search-queue"] or (0, 0)

    return {
        "serverdir": serverdir, "uuid": facts["node"].get("uuid"),
        "epoch": facts["node"].get("epoch"),
        "versioninfo": {"devpi-server": PROTOCOL_VERSION, "devpi-lite": __version__,
                        "python": "%d.%d.%d" % sys.version_info[:3]},
        "schema": facts["schema"], "schema-of-program": schema_version(),
        "server": _server_on(serverdir, read_only), "read-only": read_only, "role": "MASTER",
        **facts["last change"], "changelog": facts["changelog"],
        "users": facts["users"], "indexes": facts["indexes"], "projects": facts["projects"],
        "releases": facts["releases"], "files": facts["files"], "attached": facts["attached"],
        "trash": {"files": files, "bytes": size, "days": Limits.trash // 86400},
        "sizes": sizes, "outbox": facts["outbox"],
        "status": worst(complaint.level for complaint in complaints),
        "messages": [text for complaint in complaints
                     for text in (complaint.sentence, *complaint.details)],
        "metrics": [["devpi_lite_serial", "gauge", facts["last change"]["serial"]],
                    ["devpi_lite_database_bytes", "gauge", sizes["database"]],
                    ["devpi_lite_disk_free_bytes", "gauge", free],
                    ["devpi_lite_trash_files", "gauge", files],
                    ["devpi_lite_trash_bytes", "gauge", size],
                    ["devpi_lite_outbox_waiting", "gauge", waiting],
                    ["devpi_lite_outbox_dead", "gauge", dead],
                    ["devpi_lite_search_queue", "gauge", projects],
                    ["devpi_lite_search_queue_seconds", "gauge", round(seconds, 3)],
                    ["devpi_lite_read_only", "gauge", int(read_only)]]}


def _fact(db, find):
    try:
        return find(db)
    except sqlite3.OperationalError as error:
        if "no such" in str(error):     # a table or column that came later
            return None
        raise


def _last_change(db):
    row = db.execute("SELECT serial, ts, who FROM changelog ORDER BY serial DESC LIMIT 1"
                     ).fetchone()
    return dict(zip(("serial", "last-commit-timestamp", "last-commit-by"), row or (-1, None, None)))


def _changelog(db):
    entries, size, oldest = db.execute("SELECT count(*), coalesce(sum(length(ops)), 0), min(ts) "
                                       "FROM changelog").fetchone()
    return {"entries": entries, "bytes": size, "oldest": oldest}


def _mirror_ids(db):
    return {row["id"] for row in db.execute("SELECT id, config FROM indexes")
            if json.loads(row["config"])["type"] == "mirror"}


def _count_indexes(db):
    mirrors = len(_mirror_ids(db))
    return {"stages": _count(db, "indexes") - mirrors, "mirrors": mirrors}


def _count_projects(db):
    mirrors, counts = _mirror_ids(db), {"stages": 0, "mirrors": 0}
    for index_id, count in db.execute("SELECT index_id, count(*) FROM projects GROUP BY index_id"):
        counts["mirrors" if index_id in mirrors else "stages"] += count
    return counts


def _count_files(db):
    """The files that are here, by the kind of their index, and their bytes.

    One pass over the table: 330,000 files take 0.3 s, but 1 to 2 s along an index of it."""
    counts = {kind: {"files": 0, "bytes": 0} for kind in ("stages", "mirrors")}
    for is_cached, files, size in db.execute(
            "SELECT release_id IS NULL, count(*), coalesce(sum(size), 0) FROM files NOT INDEXED "
            "WHERE sha256 IS NOT NULL GROUP BY 1"):
        counts["mirrors" if is_cached else "stages"] = {"files": files, "bytes": size}
    return counts


def _count_attached(db):
    counts = dict(map(tuple, db.execute("SELECT kind, count(*) FROM files "
                                        "WHERE kind != 'releasefile' GROUP BY kind")))
    return {"documentation": counts.get("doczip", 0), "test-results": counts.get("toxresult", 0)}


def _count(db, table):
    return db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


_FACTS = {
    "schema": lambda db: db.execute("PRAGMA user_version").fetchone()[0],
    "node": lambda db: dict(map(tuple, db.execute("SELECT key, value FROM node"))),
    "last change": _last_change,
    "changelog": _changelog,
    "users": lambda db: _count(db, "users"),
    "indexes": _count_indexes,
    "projects": _count_projects,
    "releases": lambda db: _count(db, "releases"),
    "files": _count_files,
    "attached": _count_attached,
    "messages-of-outbox": count_messages,
    "outbox": lambda db: outbox_summary(db, by_target=True),
    "search-queue": search_backlog}


def _complaints_of_rows(db, facts):
    """The `Complaint`s that the database alone gives reason to."""
    found, newest = [], schema_version()
    if facts["schema"] > newest:
        found.append(Complaint("fatal", f"the database has schema version {facts['schema']}, this "
                                        f"program knows versions up to {newest}: use a newer one"))
    elif facts["schema"] < newest:
        found.append(Complaint("warn", f"the database has schema version {facts['schema']}, an "
                                       f"older one than {newest}: the next start of the server "
                                       "brings it up"))
    if facts["messages-of-outbox"]:
        found += outbox_complaints(facts["messages-of-outbox"][1])
    if facts["search-queue"]:
        found += search_complaints(facts["search-queue"][1])

    paths, bases = set(), []
    for user, name, config in db.execute("SELECT users.name, indexes.name, config FROM indexes "
                                         "JOIN users ON users.id = user_id ORDER BY 1, 2"):
        paths.add(f"{user}/{name}")
        bases += [(f"{user}/{name}", base) for base in json.loads(config).get("bases", ())]
    found += base_complaints([pair for pair in bases if pair[1] not in paths])
    return found


def worst(levels):
    """The worst of levels; "ok" if there are none."""
    return max(levels, key=("ok", "warn", "fatal").index, default="ok")


def _server_on(serverdir, read_only):
    """Whether a server runs; None: unknown, as it takes no lock on read-only media."""
    holder = lock_holder(serverdir)
    if holder:
        return {"running": True, "pid": holder[0], "since": holder[1]}
    return {"running": None if read_only else False, "pid": None, "since": None}


def _size_of(path):
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return 0


def _in_folder(path):
    """(number of files in a folder, their bytes)."""
    count = size = 0
    for entry in os.scandir(path) if os.path.isdir(path) else ():
        with contextlib.suppress(FileNotFoundError):
            size += entry.stat().st_size
            count += 1
    return count, size


def _server_url(text):
    try:
        parts = urllib.parse.urlsplit(text)
        parts.port      # checks it
    except ValueError:
        parts = None
    if not parts or parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError(f"{text!r} is not the URL of a server, as "
                                         "http://localhost:3141")
    if "@" in parts.netloc:
        raise argparse.ArgumentTypeError("a password in a URL is seen by everybody on this "
                                         "machine: --user and --password-file name it")
    return parts


def facts_of_server(url, credentials):
    """What a server says of itself, as +status has it, with "url", "ready" and "response-seconds".

    `url` is split; `credentials`: (user, password), or None. NoAnswer if it can't be reached,
    FatalError if what it says is no status."""
    began = time.monotonic()
    status, body = _ask_server(url, "/+status", credentials)
    seconds = time.monotonic() - began
    if status in (429, 502, 503, 504):
        raise NoAnswer(f"{_shown(url)} answers {status}: {one_line(_message(body), 200)}")
    facts = body.get("result") if isinstance(body, dict) and status == 200 else None
    if not isinstance(facts, dict) or not isinstance(facts.get("serial"), int):
        raise FatalError(f"{_shown(url)}/+status answers {status}, and no status: is that the "
                         "address of a devpi_lite or devpi server?")

    if credentials:
        _, body = _ask_server(url, "/+api", credentials)
        said = body.get("result") if isinstance(body, dict) else None
        said = said.get("authstatus") if isinstance(said, dict) else None
        if not isinstance(said, list) or said[:1] != ["ok"]:
            raise FatalError(f"{_shown(url)} does not accept the password of {credentials[0]}")

    # of these, as of "metrics", devpi may have none, and another server anything
    facts = {"url": _shown(url), **facts, "ready": None, "response-seconds": round(seconds, 4)}
    facts["status"] = str(facts.get("status", "ok"))
    messages = facts.get("messages")
    facts["messages"] = list(map(str, messages)) if isinstance(messages, list) else []
    status, body = _ask_server(url, "/+health/ready", None)
    if status != 404:       # devpi has no such page
        facts["ready"] = status == 200
    if facts["ready"] is False:
        facts["status"] = "fatal"
        facts["messages"].append(one_line(_message(body), 200))
    return facts


def _ask_server(url, path, credentials):
    """(status, JSON or None) of a GET; NoAnswer if there is no response."""
    headers = {"Accept": "application/json", "User-Agent": f"devpi_lite/{__version__}"}
    if credentials:
        pair = base64.b64encode(":".join(credentials).encode()).decode()
        headers["Authorization"] = f"Basic {pair}"
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    with contextlib.closing(kind(url.hostname, url.port, timeout=Limits.busy)) as connection:
        try:
            connection.request("GET", url.path.rstrip("/") + path, headers=headers)
            response = connection.getresponse()
            body = response.read(Limits.status_body)
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswer(f"{_shown(url)} does not answer: {reason_of(error)}") from None
    try:
        return response.status, json.loads(body)
    except (ValueError, RecursionError):
        return response.status, None


def _shown(url):
    return one_line(f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}")


def _message(body):
    return str(body.get("message") or body.get("status") or "") if isinstance(body, dict) else ""


def gauges_in(facts):
    """{name: number} of the "metrics" in what `status` found."""
    metrics = facts.get("metrics")
    return {str(metric[0]): metric[2] for metric in (metrics if isinstance(metrics, list) else ())
            if isinstance(metric, list) and len(metric) == 3
            and isinstance(metric[2], (int, float))}


def status_line(facts, monitored):
    """(exit status, line) for monitoring, in the form of Nagios' plugins.

    `monitored`: whether it is bad if no server runs on the directory."""
    level, messages = facts["status"], facts["messages"]
    if monitored and facts["server"]["running"] is False:
        level, messages = "fatal", ["no server runs", *messages]

    gauges = gauges_in(facts)
    data = [("serial", facts["serial"], "c", "")]
    for label, name, unit, bounds in (
            ("free", "devpi_lite_disk_free_bytes", "B",
             f"{Limits.disk_warn}:;{Limits.disk_fatal}:"),
            ("database", "devpi_lite_database_bytes", "B", ""),
            ("trash", "devpi_lite_trash_bytes", "B", ""),
            ("outbox_waiting", "devpi_lite_outbox_waiting", "", ""),
            ("outbox_dead", "devpi_lite_outbox_dead", "", "0"),
            ("search_queue", "devpi_lite_search_queue", "", ""),
            ("search_seconds", "devpi_lite_search_queue_seconds", "s",
             f"{Limits.search_warn};{Limits.search_fatal}")):
        if name in gauges:
            data.append((label, gauges[name], unit, bounds))
    if "response-seconds" in facts:
        data.append(("response", facts["response-seconds"], "s", ""))

    text = "; ".join(messages) or f"serial {facts['serial']}"
    return plugin_line(level, text, " ".join(
        f"{label}={number}{unit}{';' + bounds if bounds else ''}"
        for label, number, unit, bounds in data))


def plugin_line(level, text, data=""):
    """(exit status, line) of a plugin."""
    text = one_line(text, 1000).replace("|", "/")       # a bar begins the figures
    level = level if level in PLUGIN_STATUS else "unknown"
    return PLUGIN_STATUS[level], f"{PLUGIN} {PLUGIN_WORDS[level]} - {text}" \
        + (f" | {data}" if data else "")


SCREEN_LINES, SCREEN_COLUMNS = 24, 80


def screen(facts, now):
    """What `status` found, as lines for a terminal of 24 lines of 80 columns."""
    where = facts.get("url") or facts["serverdir"]
    level, where = one_line(facts["status"], 20), one_line(where, 1000)
    room = SCREEN_COLUMNS - len(f": {level}")
    if len(where) > room:
        where = "..." + where[3 - room:]
    lines = [f"{where}: {level}", ""]
    for name, text in _screen_facts(facts, now):
        lines += [line for line in _wrapped(f"{name:<14}{text}", " " * 14)]
    table = _screen_table(facts)
    lines += ["", *table] if table else []

    messages = [_wrapped(one_line(f"- {text}", 1000), "  ") for text in facts["messages"]]
    room = SCREEN_LINES - len(lines) - 1
    if messages:
        lines.append("")
    for number, wrapped in enumerate(messages):
        rest = len(messages) - number
        if len(wrapped) + (rest > 1) > room:
            lines.append(f"and {rest} more: --json shows all")
            break
        lines += wrapped
        room -= len(wrapped)
    return lines[:SCREEN_LINES]


def _wrapped(text, indent):
    import textwrap     # not at the top: the server needs none
    return textwrap.wrap(text, SCREEN_COLUMNS, subsequent_indent=indent) or [""]


def _screen_facts(facts, now):
    """Yield (name, text) of each line above the table."""
    gauges = gauges_in(facts)
    yield "version", _version_text(facts)
    if "server" in facts:
        yield "server", _server_text(facts["server"], now)
    elif "devpi_lite_uptime_seconds" in gauges:
        ready = {True: ", ready", False: ", NOT ready"}.get(facts.get("ready"), "")
        yield "server", f"runs for {age_text(gauges['devpi_lite_uptime_seconds'])}{ready}"
    modes = [text for key, text in (("read-only", "on read-only media"),
                                    ("offline-mode", "off-line: upstream is never asked"))
             if facts.get(key)]
    if modes:
        yield "mode", ", ".join(modes)

    epoch = f", epoch {one_line(facts['epoch'], 40)}" if facts.get("epoch") else ""
    yield "serial", f"{facts['serial']:,}{epoch}"
    if isinstance(facts.get("last-commit-timestamp"), (int, float)):
        who = f", by {one_line(facts['last-commit-by'], 30)}" if facts.get("last-commit-by") else ""
        yield "last change", _moment_text(facts["last-commit-timestamp"], now) + who
    changelog = facts.get("changelog")
    if changelog:
        since = f", since {_moment_text(changelog['oldest'], now)}" if changelog["entries"] else ""
        yield "changelog", (f"{number_of(changelog['entries'], 'entry', 'entries')}, "
                            f"{size_text(changelog['bytes'])}{since}")

    yield from _screen_sizes(facts, gauges)


def _screen_sizes(facts, gauges):
    sizes = facts.get("sizes", {"database": gauges.get("devpi_lite_database_bytes")})
    texts = [f"{called} {size_text(sizes[key])}" for key, called in
             (("database", "database"), ("write-ahead-log", "its log"), ("search", "search"))
             if sizes.get(key)]
    if "devpi_lite_disk_free_bytes" in gauges:
        texts.append(f"{size_text(gauges['devpi_lite_disk_free_bytes'])} free")
    if texts:
        yield "disk", ", ".join(texts)
    if "devpi_lite_trash_files" in gauges:
        files = gauges["devpi_lite_trash_files"]
        size = f", {size_text(gauges.get('devpi_lite_trash_bytes', 0))}" if files else ""
        yield "trash", number_of(files, "file", "files") + size
    if "devpi_lite_outbox_waiting" in gauges:
        yield "outbox", (f"{gauges['devpi_lite_outbox_waiting']:,} waiting, "
                         f"{gauges.get('devpi_lite_outbox_dead', 0):,} given up")
    if "devpi_lite_search_queue" in gauges:
        count, seconds = (gauges["devpi_lite_search_queue"],
                          gauges.get("devpi_lite_search_queue_seconds", 0))
        yield "search index", (f"{number_of(count, 'project', 'projects')} waiting, for up to "
                               f"{age_text(seconds)}" if count else "up to date")
    if facts.get("users") is not None:
        yield "users", f"{facts['users']:,}"


def _screen_table(facts):
    """What there is, on stages and on mirrors."""
    if not facts.get("indexes"):
        return []
    rows = [("", "stages", "mirrors")]
    for name in ("indexes", "projects"):
        rows.append((name, f"{facts[name]['stages']:,}", f"{facts[name]['mirrors']:,}"))
    rows.append(("releases", f"{facts['releases']:,}", ""))
    files = facts.get("files")
    if files:
        kinds = files["stages"], files["mirrors"]
        rows.append(("files here", *(f"{kind['files']:,}" for kind in kinds)))
        rows.append(("their size", *(size_text(kind["bytes"]) for kind in kinds)))
    lines = [f"{name:<14}{stages:>14}{mirrors:>14}".rstrip() for name, stages, mirrors in rows]
    attached = facts.get("attached")
    if attached and any(attached.values()):
        lines.append(f"              (of these, documentation {attached['documentation']:,}, test "
                     f"results {attached['test-results']:,})")
    return lines


def _version_text(facts):
    versions = facts.get("versioninfo")
    versions = versions if isinstance(versions, dict) else {}
    ours, theirs = versions.get("devpi-lite"), versions.get("devpi-server")
    text = f"{ours}, speaks as devpi-server {theirs}" if ours else f"devpi-server {theirs}"
    if facts.get("schema") is not None:
        text += f", schema {facts['schema']}"
        if facts["schema"] != facts["schema-of-program"]:
            text += f" (this program: {facts['schema-of-program']})"
    return one_line(text)


def _server_text(server, now):
    if server["running"]:
        process = f", process {server['pid']}" if server["pid"] else ""
        return f"runs{process}, since {_moment_text(server['since'], now)}"
    if server["running"] is None:
        return "unknown: on read-only media it leaves no trace"
    return "not running"


def _moment_text(moment, now):
    """A time for a person: `2026-11-29 00:52, 3 h ago`, in the zone of this machine."""
    return (f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(moment))}, "
            f"{age_text(max(0, now - moment))} ago")


def number_of(number, one, many):
    """A number with its noun: `1 file`, `2,000 files`."""
    return f"{number:,} {one if number == 1 else many}"


def age_text(seconds):
    """A number of seconds for a person: `12 s`, `5 min`, `3 h`, `12 days`."""
    for unit, size, until in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < until:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


@command(
    "status", "Show on one screen how a server is: whether it runs, what it holds, what waits, and "
              "what is wrong.  Without --url it reads --serverdir, where a server may run or not, "
              "and neither changes nor locks anything.  With --url it asks a running server, and "
              "--serverdir does not count.",
    argument("--url", metavar="URL", type=_server_url,
             help="the server to ask, as http://localhost:3141"),
    argument("--user", help="log in to it: root sees more than others"),
    argument("--password-file", metavar="FILE",
             help="file whose first line is the user's password; else it is asked for"),
    argument("--json", action="store_true", help="one JSON object in place of the screen"),
    argument("--nagios", action="store_true",
             help="one line for Nagios, Icinga and the like; the exit status is 0 if all is well, "
                  "1 for a warning, 2 if something is wrong, no server runs or none answers, and "
                  "3 if that can't be found out"),
    takes=(COMMON,), is_plugin=True)
def command_status(parsed):
    told = parsed.rest
    try:
        if told.json and told.nagios:
            raise FatalError("--json can't be combined with --nagios", 2)
        if told.url:
            facts = facts_of_server(told.url, _credentials(told))
        elif told.user or told.password_file:
            raise FatalError("--user and --password-file are for a server: name it by --url", 2)
        else:
            facts = facts_of_directory(parsed.settings.serverdir)
    except (FatalError, OSError, sqlite3.Error) as error:
        if not told.nagios:
            raise
        # a database that can't be read is the server's trouble, a wrong word is the caller's
        is_trouble = isinstance(error, (NoAnswer, sqlite3.DatabaseError))
        status, line = plugin_line("fatal" if is_trouble else "unknown", str(error))
        print(line)
        return status

    if told.nagios:
        status, line = status_line(facts, monitored=not told.url)
        print(line)
        return status
    print(json.dumps(facts, indent=2) if told.json else "\n".join(screen(facts, time.time())))
    return 0


def _credentials(told):
    """(user, password) of the options, or None."""
    if not told.user:
        if told.password_file:
            raise FatalError("--password-file needs --user", 2)
        return None
    if not told.password_file:
        if not sys.stdin.isatty():
            raise FatalError("nobody is there to answer: give the password with --password-file", 2)
        return told.user, getpass.getpass(f"password of {told.user}: ")
    try:
        with open(told.password_file, encoding="utf-8") as file:
            return told.user, file.readline().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FatalError(f"can't read {told.password_file}: {reason_of(error)}") from None


# ==================================================================================================
# 28  Commands
#
# The argument parser, one function for each command, and `main`. An option's value comes from the
# first of: the command line; the environment variable DEVPISERVER_<NAME>; the file that -c names;
# its default (see `Settings`).
# ==================================================================================================


# -- options


class Foreign(typing.NamedTuple):
    """An option of devpi-server that this program does not have.

    If it makes no difference, it is ignored and logged; otherwise it is refused with advice."""
    harmless: str | None        # pattern of the values to ignore; "": all, None: none
    advice: str
    is_flag: bool = False


_OF_REPLICAS = Foreign("", "it counts on replicas only, and there are none")
_NO_REPLICAS = ("there are no replicas: an index of type=mirror on another server keeps copies of "
                "what this one has")
FOREIGN = {
    "role": Foreign("standalone|auto", _NO_REPLICAS),
    "primary-url": Foreign(None, _NO_REPLICAS),
    "master-url": Foreign(None, _NO_REPLICAS),
    "replica-file-search-path": _OF_REPLICAS,
    "replica-max-retries": _OF_REPLICAS,
    "replica-cert": _OF_REPLICAS,
    "file-replication-threads": _OF_REPLICAS,
    "file-replication-skip-indexes": _OF_REPLICAS,
    "proxy-timeout": _OF_REPLICAS,
    "no-replica-streaming": _OF_REPLICAS._replace(is_flag=True),
    "storage": Foreign("sqlite", "there is one kind of storage, SQLite and files in --serverdir: "
                       "leave it out"),
    "keyfs-cache-size": Foreign("", "the caches have sizes of their own"),
    "requests-only": Foreign(
        "", "one process serves all; --threads bounds its workers", is_flag=True),
    "hard-links": Foreign("", "a file is kept once, however many indexes have it", is_flag=True),
    "enable-core-metadata": Foreign("", "it is always on", is_flag=True),
    "argon2-memory-cost": Foreign("", "the secret is used without argon2"),
    "argon2-parallelism": Foreign("", "the secret is used without argon2"),
    "argon2-time-cost": Foreign("", "the secret is used without argon2"),
    "documentation-path": Foreign("", "documentation is served out of its zip"),
    "keep-docs-packed": Foreign("", "documentation is served out of its zip", is_flag=True),
    "indexer-backend": Foreign("whoosh", "there is one search index, search.db in --serverdir: "
                               "leave it out"),
    "debug-macros": Foreign("", "there are no page templates", is_flag=True),
    "theme": Foreign(None, "there are no page templates: leave it out"),
    "profile-requests": Foreign("0", "there is no profiler inside: leave it out"),
    "trusted-proxy-count": Foreign("1", "the nearest proxy counts: name it by --trusted-proxy "
                                   "ADDRESS"),
    "trusted-proxy-headers": Foreign(None, "the headers that count are fixed: name the proxy by "
                                     "--trusted-proxy ADDRESS"),
    "autocreate-users": Foreign(None, "no plugin has accounts of its own here: root makes the "
                                "users", is_flag=True),
    "root-passwd-hash": Foreign(None, "devpi's hashes can't be set: --root-passwd-file FILE sets "
                                "the password"),
    "passwd": Foreign(None, "a command does that: passwd USER"),
    "init": Foreign(None, "a command does that: init; a start does it too", is_flag=True),
    "start": Foreign(
        None, "a supervisor does that: gen-config systemd prints a unit for it", is_flag=True),
    "stop": Foreign(
        None, "a supervisor does that: gen-config systemd prints a unit for it", is_flag=True),
}


class Parsed(typing.NamedTuple):
    """What a command was given: options and its own arguments."""
    settings: Settings
    # {option name: text, list of texts, or True} from the command line and the environment
    said: dict
    in_file: dict                   # the same from the configuration file
    rest: argparse.Namespace        # the command's own arguments


DEFAULT = "serve"       # if the first word is no command


def make_parser(command):
    """The argument parser of a `Command`. It leaves texts as they are: `_settle` converts them."""
    name = os.path.basename(sys.argv[0] or "devpi_lite.py")
    is_default = command.name == DEFAULT
    words = "[COMMAND] " if is_default else "".join(each.usage for each in command.arguments)
    parser = argparse.ArgumentParser(
        prog=name if is_default else f"{name} {command.name}",
        usage=f"%(prog)s {words}[--OPTION ...]",
        description=command.help, allow_abbrev=False,
        epilog=f"commands (as first word): {', '.join(command_names())}; without one: {DEFAULT}"
        if is_default else None)

    for each in command.arguments:
        parser.add_argument(*each.names, **each.settings)

    for _, option_, default in command.options:
        shown = f" (default: {default})"
        if default in (None, "", ()) or isinstance(default, bool):
            shown = ""
        arguments = {"help": option_.help.replace("%", "%%") + shown, "default": argparse.SUPPRESS,
                     "dest": option_.name}
        if option_.convert is None:
            arguments["action"] = "store_true"
        else:
            arguments["metavar"] = option_.name.rpartition("-")[2].upper()
        if option_.repeats:
            arguments["action"] = "append"
        parser.add_argument(f"--{option_.name}", *option_.aliases, **arguments)

    own = {spelling for each in command.arguments for spelling in each.names}
    for name, foreign in FOREIGN.items() if command.takes else ():
        if f"--{name}" in own:
            continue
        parser.add_argument(f"--{name}", dest=name, help=argparse.SUPPRESS,
                            default=argparse.SUPPRESS,
                            action="store_true" if foreign.is_flag else "store")
    return parser


def parse_options(command, arguments):
    """`Parsed` from a `Command`'s arguments, the environment and the configuration file.

    Exits with status 2 on errors; FatalError (status 4) for errors in the file."""
    parser = make_parser(command)
    rest, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse_word(parser, command, unknown[0])
    if not command.takes:
        return Parsed(Settings(), {}, {}, rest)

    names = {option_.name for _, option_, _ in command.options} | set(FOREIGN)
    line = {name: vars(rest).pop(name) for name in tuple(vars(rest)) if name in names}
    sources = [(line, lambda name: f"--{name}", parser.error),
               (_from_environment(parser), variable_of, parser.error)]
    file = next((texts["configfile"] for texts, _, _ in sources if "configfile" in texts), None)
    if file is not None:
        def refuse_file(message):
            raise FatalError(f"{file}: {message}", 4)
        sources.append((_from_file(file), str, refuse_file))

    values = _settle(command, parser, sources)
    line, variables, in_file = [texts for texts, _, _ in sources] + ([{}] if file is None else [])
    return Parsed(Settings(**values), {**variables, **line}, in_file, rest)


_SPELLINGS = {spelling.lstrip("-"): option_.name for option_, _ in OPTIONS.values()
              for spelling in (option_.name, *option_.aliases) if len(spelling) > 2}


def variable_of(name):
    """The environment variable of an option."""
    return "DEVPISERVER_" + name.upper().replace("-", "_")


def _refuse_word(parser, command, word):
    """Exit because of an unknown word, with the nearest known one."""
    if word.startswith("-"):
        own = word.partition("=")[0]
        if own.lstrip("-") in _SPELLINGS:
            parser.error(f"{own} is an option of other commands")
        known = [spelling for action in parser._actions for spelling in action.option_strings
                 if action.help != argparse.SUPPRESS]
        parser.error(f"there is no option {own}{_nearest(own, known)}")

    if command.name == DEFAULT:
        known = command_names()
        if word in known:
            parser.error(f"the command comes first: {parser.prog} {word} ...")
        hint = _nearest(word.replace("devpi-", ""), known)
        parser.error(f"there is no command {word!r}{hint or '; there are ' + ', '.join(known)}")
    parser.error(f"{word!r} is one word too many")


def _nearest(word, known):
    """`; did you mean --port?` for `--prot`; "" if no known word is near."""
    near = nearest(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _from_environment(parser):
    """{option name: text} of the variables that are set and not empty."""
    known = {variable_of(spelling): name
             for spelling, name in [*_SPELLINGS.items(), *zip(FOREIGN, FOREIGN)]}
    texts = {}
    for variable, text in os.environ.items():
        if not variable.startswith("DEVPISERVER_"):
            continue

        if variable not in known:
            hint = _nearest(variable, known)
            if re.search("_SERVICE_|_PORT_", variable):
                hint = ("; if it comes from a Kubernetes service named devpiserver: "
                        "enableServiceLinks: false")
            parser.error(f"there is no option behind the variable {variable}{hint}")
        if text:
            texts[known[variable]] = text
    return texts


def _from_file(path):
    """{option name: text} of a configuration file: JSON {"devpi-server": {...}}, or INI with a
    section [devpi-server].

    FatalError (exit status 4) if it is malformed or has unknown options."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise FatalError(f"can't read the configuration file {path}: {reason_of(error)}",
                         4) from None

    is_yaml = re.match(r"(?:\s*#.*\n|\s)*(?:---|devpi-server\s*:)", text)
    if is_yaml or path.endswith((".yml", ".yaml")):
        raise FatalError(f"{path} is YAML, which can't be read here: write [devpi-server] in place "
                         "of `devpi-server:`, and `port = 3141` in place of `port: 3141`", 4)

    if text.lstrip().startswith("{"):
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FatalError(f"{path} is not JSON: {reason_of(error)}", 4) from None
        options = content.get("devpi-server")
        if not isinstance(options, dict) or len(content) > 1:
            form = '{"devpi-server": {"port": 3141, ...}}'
            raise FatalError(f"{path} must be of the form {form}", 4)
        pairs = options.items()
    else:
        import configparser     # not at the top: nothing else needs it
        parser = configparser.ConfigParser(interpolation=None, allow_no_value=True)
        try:
            parser.read_string(text)
        except configparser.Error as error:
            raise FatalError(f"{path} is not INI: {one_line(str(error))}", 4) from None
        if parser.sections() != ["devpi-server"]:
            raise FatalError(f"{path} must have one section, [devpi-server]", 4)
        pairs = parser.items("devpi-server")

    texts = {}
    for name, value in pairs:
        if name not in _SPELLINGS and name not in FOREIGN or name == "configfile":
            raise FatalError(f"{path}: there is no option {name}{_nearest(name, _SPELLINGS)}", 4)
        name = _SPELLINGS.get(name, name)
        if value is not None or text.lstrip()[0] != "{":
            texts[name] = _as_text(path, name, value)
    return texts


def _as_text(path, name, value):
    """A configuration file's value as a text of the command line; None: an INI line without `=`."""
    if value is None or isinstance(value, bool):
        return "no" if value is False else "yes"
    if isinstance(value, list) and all(isinstance(each, (str, int)) for each in value):
        return ",".join(map(str, value))
    if isinstance(value, (str, int, float)):
        return str(value)
    raise FatalError(f"{path}: {name} must be a text, a number, true, false or a list of texts", 4)


def _settle(command, parser, sources):
    """The values of `Settings`, by field name.

    `sources`: [({option name: text}, function from that name to the source's own, function that
    refuses with a message)]; the first source with an option wins. An option removes its rivals
    from later sources."""
    rivals = [(option_.name, rival) for option_, _ in OPTIONS.values() for rival in option_.rivals]
    for place, (texts, called, refuse) in enumerate(sources):
        for one, other in rivals:
            if one in texts and other in texts:
                refuse(f"{called(one)} can't be combined with {called(other)}")
            for worse, _, _ in sources[place + 1:]:
                for name, rival in ((one, other), (other, one)):
                    if name in texts:
                        worse.pop(rival, None)

    values = {}
    for texts, called, refuse in sources:
        for name in FOREIGN.keys() & texts.keys():
            try:
                _judge_foreign(command, parser, called(name), FOREIGN[name], texts[name])
            except ValueError as error:
                refuse(f"{called(name)}: {error}")

    for field, (option_, default) in OPTIONS.items():
        for texts, called, refuse in sources:
            if option_.name in texts:
                try:
                    values[field] = _value(option_, default, texts[option_.name])
                except ValueError as error:
                    refuse(f"{called(option_.name)}: {error}")
                break

    values.setdefault("serverdir", absolute_path(Settings.serverdir))
    by_address = "unix_socket" not in values or {"host", "port"} & values.keys()
    if by_address and not values.get("listen"):
        values["listen"] = ((values.get("host", Settings.host), values.get("port", Settings.port)),)
    return values


def _value(option_, default, text):
    """An option's text as a setting; ValueError if it is malformed."""
    if option_.convert is None:
        return default if text is not True and not to_boolean(text) else not default
    if option_.repeats:
        texts = text if isinstance(text, list) else to_names(text)
        return tuple(option_.convert(each) for each in texts)
    return option_.convert(text)


def _judge_foreign(command, parser, called, foreign, text):
    """Ignore an option of devpi-server, with a line in the log, or exit with its advice."""
    if foreign.is_flag and text is not True and not to_boolean(text):
        return
    harmless = foreign.harmless
    if harmless is None or harmless and not re.fullmatch(harmless, str(text)):
        shown = "" if text is True else f" {text!r}"
        parser.exit(2, f"{parser.prog}: error: {called}{shown} has no meaning here: "
                       f"{foreign.advice}\n")
    if command.name == DEFAULT:
        log.info("%s changes nothing here: %s", called, foreign.advice)


# -- files for supervisors and proxies, made from the options of the server

GENERATORS = {}


def generator(kind):
    """Decorator: registers a function that returns this kind of file, as text, for a `Parsed`."""
    def register(function):
        GENERATORS[kind] = function
        return function
    return register


def _server_options(texts, without):
    """The server's options in `texts`, {name: text}, as words of a command line."""
    words = []
    for _, option_, default in COMMANDS[DEFAULT].options:
        text = texts.get(option_.name)
        if text is None or option_.name in without:
            continue
        if option_.convert is None:
            words += [f"--{option_.name}"] if _value(option_, default, text) != default else []
        elif option_.convert is absolute_path:
            words += [f"--{option_.name}", absolute_path(text)]
        else:
            for each in text if isinstance(text, list) else [text]:
                words += [f"--{option_.name}", each]
    return words


def _listening(settings):
    """The server's address for a proxy on this machine: HOST:PORT or unix:PATH."""
    if settings.unix_socket:
        return f"unix:{settings.unix_socket}"
    host, port = settings.listen[0]
    return authority({"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host), port)


def _service_user(settings):
    """The user to run as: the owner of the server directory, or if it is missing the current user;
    `devpi` in place of root."""
    if os.name == "nt":
        return getpass.getuser()
    import pwd      # not at the top: POSIX only
    uid = os.stat(settings.serverdir).st_uid if os.path.exists(settings.serverdir) else os.getuid()
    if uid == 0:
        return "devpi"
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _systemd_word(word):
    """A word of ExecStart: escaped, and quoted if needed (systemd.service, "Command lines")."""
    word = word.replace("%", "%%").replace("$", "$$")
    return word if re.fullmatch(r"[A-Za-z0-9_@%+=:,./*$-]+", word) else _double_quoted(word)


def _double_quoted(word):
    return '"{}"'.format(re.sub(r'(["\\])', r"\\\1", word))


@generator("systemd")
def systemd_unit(parsed):
    """A unit for systemd."""
    settings = parsed.settings
    user, directory = _service_user(settings), settings.serverdir
    privilege, folders = "", [directory]
    if any(port < 1024 for _, port in settings.listen):
        privilege = "AmbientCapabilities=CAP_NET_BIND_SERVICE\n"
    if settings.unix_socket:
        folders.append(os.path.dirname(settings.unix_socket))
    command = [sys.executable, PROGRAM,
               *_server_options(parsed.said, ("serverdir", "root-passwd")),
               "--serverdir", directory]
    return f"""\
# /etc/systemd/system/devpi_lite.service.  The user and the directory have to be there:
#     useradd --system --shell /usr/sbin/nologin {user}
#     install -d -m 700 -o {user} {_shell_word(directory)}
#     systemctl daemon-reload && systemctl enable --now devpi_lite
[Unit]
Description=devpi_lite, a Python package index
Wants=network-online.target
After=network-online.target

[Service]
User={user}
UMask=0077
ExecStart={' '.join(map(_systemd_word, command))}
Restart=on-failure
TimeoutStopSec=45
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ReadWritePaths={' '.join(map(_systemd_word, folders))}
{privilege}
[Install]
WantedBy=multi-user.target
"""


def _shell_word(word):
    if re.fullmatch(r"[A-Za-z0-9_@%+=:,./-]+", word):
        return word
    return "'" + word.replace("'", "'\\''") + "'"


def _nginx_word(word):
    """A parameter in nginx's configuration; FatalError for a dollar sign, which has no escape."""
    if "$" in word:
        raise FatalError(f"nginx can't be told {word!r}: there must be no dollar sign in it")
    return word if re.fullmatch(r"[A-Za-z0-9_@%+=:,./\[\]-]+", word) else _double_quoted(word)


@generator("nginx")
def nginx_configuration(parsed):
    """A proxy with TLS for nginx, under the name, port and path of --outside-url.

    nginx leaves the path as it is, and the server removes the prefix: otherwise a user with the
    prefix's name could not be found."""
    settings, rest = parsed.settings, parsed.rest
    outside = settings.outside_url or f"https://{socket.gethostname() or 'localhost'}"
    parts = urllib.parse.urlsplit(outside)
    if parts.scheme != "https":
        raise FatalError(f"--outside-url {outside}: nginx speaks TLS here, so it begins with "
                         "https://")
    port = parts.port or 443
    certificate = rest.tls_certificate or f"/etc/letsencrypt/live/{parts.hostname}/fullchain.pem"
    key = rest.tls_key or f"/etc/letsencrypt/live/{parts.hostname}/privkey.pem"
    plain = f"""
server {{
    listen 80;
    server_name {parts.hostname};
    return 308 https://$host$request_uri;
}}
""" if port == 443 else ""
    return f"""\
# /etc/nginx/conf.d/devpi_lite.conf, for {outside}/
upstream devpi_lite {{
    server {_nginx_word(_listening(settings))};
    keepalive 32;
}}

server {{
    listen {port} ssl;
    server_name {parts.hostname};
    ssl_certificate {_nginx_word(certificate)};
    ssl_certificate_key {_nginx_word(key)};

    location {_nginx_word(parts.path + '/')} {{
        proxy_pass http://devpi_lite;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header X-Outside-URL {_nginx_word(outside)};
        proxy_set_header {header_title(settings.real_ip_header)} $remote_addr;

        # files of any size, which go through as they come
        # the server has a limit of its own, --max-request-body-size
        client_max_body_size 0;
        proxy_request_buffering off;
        proxy_max_temp_file_size 0;
        proxy_read_timeout 300s;
    }}
}}
{plain}"""


@generator("docker")
def dockerfile(parsed):
    """An image of the server; its data is a volume."""
    without = {"host", "port", "listen", "unix-socket-perms", "root-passwd",
               # paths of this machine
               *(option_.name for option_, _ in OPTIONS.values()
                 if option_.convert is absolute_path)}

    host, port = (parsed.settings.listen or ((Settings.host, Settings.port),))[0]
    command = ["python", "/devpi_lite.py", "--serverdir", "/data", "--host", "0.0.0.0",
               *_server_options({**parsed.in_file, **parsed.said}, without)]
    return f"""\
# docker build -t devpi_lite .      (beside devpi_lite.py)
# docker run -d --restart unless-stopped -v devpi:/data -p {authority(host, port)}:3141 devpi_lite
FROM python:{sys.version_info[0]}.{sys.version_info[1]}-slim
RUN useradd --system devpi && install -d -m 700 -o devpi /data
COPY devpi_lite.py /devpi_lite.py
USER devpi
CMD {json.dumps(command)}
"""


# -- commands


@command(
    "serve", "Serve Python package indexes until SIGTERM or SIGINT: "
             "python devpi_lite.py --serverdir x",
    argument("--version", action="version", version=__version__),
    takes=(COMMON, FIRST_START, SERVING))
def command_serve(parsed):
    settings = parsed.settings
    configure_logging(settings)
    if prepare_directory(settings.serverdir):
        settings = dataclasses.replace(settings, read_only=True, offline_mode=True)
    spare_memory()

    lock = contextlib.nullcontext() if settings.read_only else take_lock(settings.serverdir)
    listeners = [listen(host, port) for host, port in settings.listen]
    if settings.unix_socket:
        listeners.append(listen_on_path(settings.unix_socket, settings.unix_socket_perms))

    if settings.read_only:
        secret = secret_for_read_only(settings)
    else:
        secret = read_secret(settings.serverdir, settings.secretfile)
    store = Store(settings, create=True)
    store.commits.is_server = True
    settings = dataclasses.replace(settings, listen=tuple(
        listener.getsockname()[:2] for listener in listeners if listener.family != UNIX_FAMILY))

    require_root(store, settings)
    app = App(settings, store, secret)
    if not settings.read_only:
        app.recover_all()
    server = Server(app, listeners)
    stop_on_signals(server)

    tune_interpreter()
    warn_of_unknown_users(settings, app)
    start_loops(app)
    announce(settings, app)
    give_back_memory()
    return serve_to_the_end(server, app, lock)


def require_root(store, settings):
    """Initialise a new directory; FatalError if that can't be written to."""
    if not is_initialised(store):
        if settings.read_only:
            raise FatalError(f"{settings.serverdir} is on read-only media, and was never "
                             "initialised")
        initialise(store, settings)
    elif settings.root_passwd is not None or settings.root_passwd_file:
        log.info("root's password is set by option at the first start only; `passwd root` changes "
                 "it")


def tune_interpreter():
    """Set how the interpreter switches threads and collects garbage."""
    # while pages of 2,000 files are made, the p99 of a small one is 4 ms (Python 3.11) or 8 (3.13),
    # not 25
    sys.setswitchinterval(0.0005)
    # full collections pass over what start-up made, and are 5 (3.9) to 9 ms (3.13) shorter for it
    gc.freeze()
    # making 24 such pages takes 2 collections, not 400 (3.9), 300 (3.11) or 70 (3.13), and so for
    # each page 4 to 10 ms of CPU less; memory stays the same
    gc.set_threshold(20000, 20, 100)


@command("init", "Initialise a server directory without serving it.",
         takes=(COMMON, FIRST_START))
def command_init(parsed):
    settings = parsed.settings
    if prepare_directory(settings.serverdir):
        raise FatalError(f"{settings.serverdir} is initialised already, and on read-only media")
    with take_lock(settings.serverdir):
        with contextlib.closing(Store(settings, create=True)) as store:
            if is_initialised(store):
                raise FatalError(f"{settings.serverdir} is initialised already")
            read_secret(settings.serverdir, "")
            initialise(store, settings)
    print(f"initialised {settings.serverdir}")


@command(
    "passwd", "Set a user's password; the user's sessions end.",
    argument("user", nargs="?", help="the user's name; asked for if not given"),
    argument("--stdin", action="store_true",
             help="read the password from standard input, one line"),
    takes=(COMMON,))
def command_passwd(parsed):
    settings, rest = parsed.settings, parsed.rest
    if is_read_only(settings.serverdir):
        raise FatalError(f"{settings.serverdir} is on read-only media: its passwords can't be "
                         "changed")

    with contextlib.closing(Store(settings)) as store:
        users = Users(store)
        name = rest.user or _ask(input, "user: ").strip()
        if users.find(name) is None:
            raise FatalError(f"user not found: {name}")

        password = sys.stdin.readline().rstrip("\r\n") if rest.stdin else _ask_twice(name)
        if not password:
            raise FatalError("the password is empty; nothing was changed")

        users.modify(name, {"password": password}, Actor(address="command line"))
        if name == "root":
            forget_root_password(settings.serverdir)
    print(f"password of {name} changed")


def _ask(how, question):
    try:
        return how(question)
    except EOFError:
        raise FatalError("nobody is there to answer: name the user, and give the password "
                         "with --stdin") from None


def _ask_twice(name):
    for _ in range(3):
        password = _ask(getpass.getpass, f"new password for {name}: ")
        if password == _ask(getpass.getpass, "once more: "):
            return password
        print("the two differ", file=sys.stderr)
    raise FatalError("the passwords did not agree")


@command(
    "gen-config", "Print a systemd unit, an nginx configuration or a Dockerfile for a server with "
                  "the options that are given.",
    argument("kind", choices=GENERATORS, help="what to print"),
    argument("--tls-certificate", metavar="FILE",
             help="of nginx; default: where certbot puts it"),
    argument("--tls-key", metavar="FILE", help="its key"),
    takes=(COMMON, FIRST_START, SERVING))
def command_gen_config(parsed):
    print(GENERATORS[parsed.rest.kind](parsed), end="")


@command("_read-names", "Internal: read a project list for the server, which reads the facts from "
                        "standard output.")
def command_read_names(parsed):
    job = b""
    while not job.endswith(b"\n"):
        piece = os.read(0, 64 << 10)
        if not piece:
            return 1
        job += piece
    job = json.loads(job)
    limit_process(job["memory"], job["cpu"])
    if hasattr(os, "nice"):
        os.nice(10)         # the server's requests come first

    def end_with_server():
        # not sys.stdin: no thread may hold its lock when the process ends
        os.read(0, 1)
        os._exit(1)
    threading.Thread(target=end_with_server, daemon=True).start()

    try:
        facts = read_names(job)
    except MemoryError:
        print(f"reading the project list takes more than {job['memory'] >> 20} MiB of memory",
              file=sys.stderr)
        return 1
    except Problem as problem:
        print(problem.message, file=sys.stderr)
        return 1
    json.dump(facts, sys.stdout)
    return 0


@command(
    "_replay", "Internal: apply the changelog of another server directory to this one, which is "
               "made if it is not there; what has been applied already stays.  Where that "
               "changelog does not reach back far enough, all rows are taken as they are.",
    argument("source", type=absolute_path, help="the other server directory"),
    argument("--until", type=int, default=sys.maxsize, help="the last serial to apply"),
    argument("--again", type=int, default=0, help="apply as many old entries once more"),
    takes=(COMMON,))
def command_replay(parsed):
    settings, told = parsed.settings, parsed.rest
    serverdir = settings.serverdir
    with contextlib.closing(open_rows(told.source)) as source:
        prepare_directory(serverdir)
        with take_lock(serverdir), contextlib.closing(Store(settings, create=True)) as store:
            source.execute("BEGIN")         # reads one state of the source
            replay(store, source, told.until, told.again)
            # before files are copied: until then the source's write-ahead log only grows
            source.execute("COMMIT")
            lost = fetch_blobs(store, Blobs(serverdir), Blobs(told.source, read_only=True))
    if lost:
        raise FatalError(f"{lost} files of the source are lost or damaged: see above")


def replay(store, source, until, again):
    """Apply the entries of the changelog of `source`, a connection, that follow our last one.

    If that changelog begins later, all rows are taken as they are; but only if that loses nothing:
    into an empty directory, or one that has followed this source. FatalError otherwise."""
    with store.read() as db:
        serial, hash_ = store.head(db)
        old = list(read_log(db))[-again:] if again else []
    uuid_, = source.execute("SELECT value FROM node WHERE key = 'uuid'").fetchone()
    first, last = source.execute("SELECT min(serial), max(serial) FROM changelog").fetchone()
    if last is None:
        raise FatalError("the source has no changelog")

    same = source.execute("SELECT hash FROM changelog WHERE serial = ?", (serial,)).fetchone()
    if serial > last or same and same["hash"] != hash_ or not same and not store.follows(uuid_):
        raise FatalError("this directory has another history than the source")
    if until < min(last, max(first, serial)):
        raise FatalError(f"there is no way to serial {until}: this directory has {serial}, and the "
                         f"changelog of the source begins at {first}")

    if old:
        store.write(_apply_again, old)
    if first > serial + 1:
        if until < last:
            raise FatalError(f"the changelog of the source begins at serial {first}: its rows can "
                             f"be taken as they are at {last}, not at {until}")
        print("snapshot: the changelog begins at serial", first)
        store.start_from(all_rows(source), next(read_log(source, last - 1)), uuid_)
    else:
        entries = itertools.takewhile(lambda entry: entry.serial <= until, read_log(source, serial))
        store.follow(entries, uuid_)


def _apply_again(change, entries):
    """Apply old changelog entries again, without rows whose parent is missing."""
    change.is_replay = True
    for op in itertools.chain.from_iterable(entry.ops_for_replay() for entry in entries):
        with contextlib.suppress(NoParent):
            change.put(*op)


def fetch_blobs(store, blobs, source):
    """Copy missing blobs of stages, and enter the members of documentation zips.

    Prints each blob that the source lacks or that is damaged; returns their number."""
    with store.read() as db:
        files = db.execute(
            "SELECT sha256, size, max(kind) = 'doczip' AS is_docs FROM files "
            "WHERE release_id IS NOT NULL GROUP BY sha256 "
            # metadata files of schema version 1
            "UNION SELECT metadata_sha256, NULL, 0 FROM files WHERE release_id IS NOT NULL "
            "AND metadata_sha256 IS NOT NULL "
            "AND metadata_sha256 NOT IN (SELECT sha256 FROM metadata_files)").fetchall()

    lost = 0
    for sha256, size, is_docs in files:
        try:
            if not blobs.claim(sha256):
                _copy_blob(blobs, source, sha256, size)
            if is_docs:
                enter_docs(store, blobs, sha256)
        except (NotFound, BadRequest) as problem:
            print(f"{sha256}: {problem.message}", file=sys.stderr)
            lost += 1
    return lost


def _copy_blob(blobs, source, sha256, size):
    with source.open(sha256, size) as theirs, blobs.incoming() as incoming:
        for piece in iter(lambda: theirs.read(1 << 20), b""):
            incoming.write(piece)
        if incoming.sha256.hexdigest() != sha256:
            raise BadRequest("the file is damaged")
        incoming.keep()


def warn_of_unknown_users(settings, app):
    """Log users in --restrict-modify that do not exist: a typing error would keep everybody out."""
    unknown = [name for name in settings.restrict_modify or ()
               if not name.startswith(":") and app.users.find(name) is None]
    if unknown:
        with app.store.read() as db:
            known = [row["name"] for row in db.execute("SELECT name FROM users LIMIT 10000")]
        for name in unknown:
            log.warning("--restrict-modify %s: there is no such user%s", name,
                        _nearest(name, known))


def configure_logging(settings):
    """Set up logging by --debug and --logger-cfg; the access log always goes to standard output."""
    logging.getLogger().setLevel(logging.DEBUG if settings.debug else logging.INFO)
    if not settings.logger_cfg:
        return
    from logging import config      # not at the top: nothing else needs it
    try:
        with open(settings.logger_cfg, encoding="utf-8") as file:
            content = json.load(file)
        config.dictConfig({"disable_existing_loggers": False, **content})
    except (OSError, ValueError, TypeError, AttributeError, KeyError, ImportError,
            RecursionError) as error:
        raise FatalError(f"{settings.logger_cfg} does not configure logging: it has to be the "
                         f"JSON that logging.config.dictConfig takes ({reason_of(error)})",
                         4) from None


def start_loops(app):
    """Start each part's loops, each in a daemon thread of its own."""
    for name, loop in app.all_loops():
        threading.Thread(target=loop, name=name, daemon=True).start()


def serve_to_the_end(server, app, lock):
    """Serve requests until the server is stopped; then close all parts and the lock.

    Returns the exit status."""
    status = 0
    try:
        server.serve_forever()
        app.mirrors.files.downloads.settle(2)
        with lock:
            app.close_all()
    except Exception:
        log.exception("the server ends")
        status = 1

    last_lines = threading.Thread(target=app.access_log.flush, daemon=True)
    last_lines.start()
    last_lines.join(2)
    if last_lines.is_alive():       # nobody reads standard output any more
        os._exit(status)
    return status


def listen(host, port):
    """A listening TCP socket; FatalError with the reason if it can't be opened."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM,
                                                      flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        if os.name != "nt":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        raise FatalError(f"can't listen on {host}:{port}: {error.strerror or error}; "
                         "--host and --port choose another address") from None
    listener.setblocking(False)
    return listener


def listen_on_path(path, mode):
    """A listening unix socket, in place of one that a server left behind; FatalError on failure."""
    if os.name == "nt" or not hasattr(socket, "AF_UNIX"):
        raise FatalError("--unix-socket: there are no unix sockets here, use --listen HOST:PORT")

    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(path) == 0:
                    raise FatalError(f"can't listen on {path}: another server does")
            os.unlink(path)
    except FileNotFoundError:
        pass

    try:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)     # our umask gives it to its owner alone
        os.chmod(path, mode)
        listener.listen(1024)
    except OSError as error:
        raise FatalError(f"can't listen on {path}: {error.strerror or error}; --unix-socket names "
                         "another") from None
    listener.setblocking(False)
    return listener


def announce(settings, app):
    """Print where the server listens, and a first command to try."""
    base, places = settings.outside_url, [f"http://{authority(*pair)}/" for pair in settings.listen]
    if settings.listen:
        host, port = settings.listen[0]
        host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        base = base or f"http://{authority(host, port)}"
    if settings.unix_socket:
        places.append(f"unix:{settings.unix_socket}")
        base = base or "the address of the proxy in front"

    for place in places:
        print(f"devpi_lite {__version__} listens on {place} and keeps its data in "
              f"{settings.serverdir}")
    if settings.read_only:
        print("the directory is on read-only media: what is there is served, every change is "
              "refused, upstream is not asked")
    elif settings.offline_mode:
        print("offline mode: upstream is not asked, of mirrors only what is here is served")
    if app.indexes.find("root/pypi"):
        print(f"try: pip install --index-url {base}/root/pypi/+simple/ PACKAGE")
    else:
        print(f"indexes are served at {base}/USER/INDEX/+simple/")
    if settings.restrict_modify is None and settings.open_registration and not app.is_private:
        print("warning: anybody who reaches this address may create users, "
              "as --open-registration says")
    sys.stdout.flush()


def stop_on_signals(server):
    """Stop at the first SIGTERM or SIGINT; exit at once at the second.

    The interpreter also writes the signal's number to the front's socket. Otherwise a signal just
    before the main thread begins to wait would not wake it to run the handler."""
    came = []

    def stop(number, frame):
        if came:
            os._exit(1)
        came.append(number)
        server.stop()
    signal.set_wakeup_fd(server.wake_end.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def main(arguments):
    """Run the command that the arguments name; returns the exit status."""
    os.umask(0o077)
    sys.stdout = sys.stdout or open(os.devnull, "w")        # some services start without
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # escape characters that it can't encode
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr,
                        format="%(asctime)s %(levelname)s %(message)s")

    command = COMMANDS[DEFAULT]
    for words in (2, 1):
        if " ".join(arguments[:words]) in COMMANDS:
            command, arguments = COMMANDS[" ".join(arguments[:words])], arguments[words:]
            break
    try:
        return command.run(_parsed(command, arguments)) or 0
    except (FatalError, Problem) as error:
        print(f"fatal: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 1)
    except (OSError, sqlite3.Error) as error:
        log.debug("where it happened", exc_info=True)
        print(f"fatal: {'the database: ' if isinstance(error, sqlite3.Error) else ''}{error}",
              file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1


def _parsed(command, arguments):
    """As `parse_options`; the exit status of a plugin is its own."""
    try:
        return parse_options(command, arguments)
    except (SystemExit, FatalError) as error:
        is_wrong = not isinstance(error, SystemExit) or error.code == 2
        if not (command.is_plugin and "--nagios" in arguments and is_wrong):
            raise
        status, line = plugin_line("unknown", "wrong usage: see standard error"
                                   if isinstance(error, SystemExit) else str(error))
        print(line)
        sys.exit(status)


class ScriptEnds(Exception):
    """Ends the script, for `after_the_script`."""


def after_the_script(function, *arguments):
    """Call a function when this script has ended, and exit with what it returns.

    The interpreter keeps a script's syntax tree while the script runs. The tree is freed before
    `sys.excepthook` is called for the exception that ended the script; the main thread can still do
    all that it could before. So an idle server takes 23 MB, not 57 (Python 3.9 to 3.11), 28, not 62
    (3.12 and 3.13), or 38, not 73 (3.14 and 3.15), and starts as fast. If another module runs the
    script (`python -m`, a debugger), the function is called at once."""
    if sys._getframe(1).f_back is not None or sys.flags.inspect:
        sys.exit(function(*arguments))
    before = sys.excepthook

    def call(kind, error, trace):
        try:
            sys.excepthook = before
            if kind is not ScriptEnds:
                return before(kind, error, trace)
            sys.exit(function(*arguments))
        except KeyboardInterrupt:       # ends the process as Python itself does it
            before(*sys.exc_info())
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        except Exception:
            before(*sys.exc_info())
            sys.exit(1)
    sys.excepthook = call
    raise ScriptEnds


if __name__ == "__main__":
    after_the_script(main, sys.argv[1:])
