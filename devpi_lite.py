#!/usr/bin/env python3
"""devpi_lite: a private Python package index in one file.

    python devpi_lite.py --serverdir x

serves private indexes, a caching mirror of pypi.org (`root/pypi`), and indexes that inherit from both, to pip, uv, twine,
Poetry, the devpi client and curl.  It needs Python 3.9 or newer and nothing else: no packages, no internet.

The chapters, each of which uses only those above it:

     1  Names and versions       pure functions over the packaging standards' words
     2  Errors, settings, limits, threads   exceptions that carry a status; what the operator chose; bounds; crews
     3  Store                    SQLite: schema, readers, the writer, serials, changelog, what caches hold
     4  Blobs and archives       files on disk, named by their SHA-256; what they hold
     5  Users and permissions    passwords, session tokens, who may do what
     6  Indexes                  configuration, resolution order
     7  Upstream                 the HTTP client and the parsing of other indexes' pages
     8  Projects                 stages, mirrors, and an index with its bases: what a project has to offer
     9  Releases                 uploads and removal
    10  Simple API               a project as HTML or JSON for installers
    11  HTTP                     the front, the workers, requests, answers, routes
    12  Endpoints                devpi's JSON contract, uploads, files, status
    13  Commands                 the argument parser and `main`
"""
from __future__ import annotations

import argparse
import base64
import binascii
import bz2
import collections
import contextlib
import dataclasses
import datetime
import email.header
import email.parser
import email.policy
import email.utils
import errno
import functools
import gc
import getpass
import gzip
import hashlib
import hmac
import html
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import mmap
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
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import typing
import urllib.parse
import urllib.request
import zipfile
import zlib

__version__ = "0.1.0"
PROTOCOL_VERSION = "6.20.3"                 # the devpi-server release whose wire protocol we speak
API_VERSION = "1.4"                         # of the simple API that we speak (PEP 629)
log = logging.getLogger("devpi_lite")

# ======================================================================================================================
# 1  Names and versions
#
# Pure functions: normal names, versions and their order, file names, core metadata, hashes, times.  Nothing here
# touches a disk, a socket or a clock that was not handed in.
# ======================================================================================================================


def normalize(name):
    """The normal form of a project name: `Foo._Bar` -> `foo-bar` (PEP 503, for any run of non-alphanumerics)."""
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
    """A PEP 440 version as a tuple of its parts: (epoch, release, pre, post, dev, local), None for what is absent.

    Returns None if `text` is no PEP 440 version.  Numbers of absurd length are refused: int() of them is quadratic."""
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
        local = tuple(int(p) if p.isdigit() else p for p in re.split(r"[-_.]", part["local"].lower()))
    release = tuple(int(p) for p in part["release"].split("."))
    return int(part["epoch"] or 0), release, pre, post, dev, local


def canonical_version(text):
    """PEP 440's normal spelling of a version (`1.0-RC1` -> `1.0rc1`); the text itself if it is no such version."""
    parsed = parse_version(text)
    if parsed is None:
        return text
    epoch, release, pre, post, dev, local = parsed
    return "".join((
        f"{epoch}!" if epoch else "", ".".join(map(str, release)), "%s%d" % pre if pre else "",
        f".post{post}" if post is not None else "", f".dev{dev}" if dev is not None else "",
        "+" + ".".join(map(str, local)) if local else ""))


@functools.lru_cache(maxsize=20000)
def version_key(text):
    """Sorts versions as PEP 440 orders them; texts that are no versions sort below all of them, by their text."""
    parsed = parse_version(text)
    if parsed is None:
        return (0, text)
    epoch, release, pre, post, dev, local = parsed
    while len(release) > 1 and release[-1] == 0:
        release = release[:-1]
    if pre is None:     # 1.0.dev1 < 1.0a1 < 1.0
        pre = ("", 0) if post is None and dev is not None else ("z", 0)
    return (1, epoch, release, pre, -1 if post is None else post, float("inf") if dev is None else dev,
            () if local is None else tuple((1, p, "") if isinstance(p, int) else (0, 0, p) for p in local))


def same_version(one, other):
    """Whether two texts name the same version (PEP 440): `1.0` and `1.0.0` do."""
    one, other = one.strip(), other.strip()
    return one == other or max(len(one), len(other)) <= 200 and version_key(one) == version_key(other)


UPLOAD_EXTENSIONS = ("exe", "tar.gz", "bz2", "rpm", "deb", "zip", "tgz", "egg", "dmg", "msi", "whl")
MIRROR_EXTENSIONS = (".doc.zip", ".tar.bz2", ".tar.gz", ".tar.xz", ".tar.Z", ".tar", ".deb", ".dmg", ".egg", ".exe",
                     ".msi", ".rpm", ".tgz", ".whl", ".zip")


def strip_archive_extension(filename):
    """(stem, extension) of an archive's name; the extension is "" if it is none that indexes hold."""
    for extension in MIRROR_EXTENSIONS:
        if filename.lower().endswith(extension.lower()) and len(filename) > len(extension):
            return filename[:-len(extension)], filename[-len(extension):]
    return filename, ""


_PLATFORM_TAIL = re.compile(r"[-.](py[23](\.\d+)?.*|win32|win-amd64.*|linux-.*|macosx-.*)$", re.IGNORECASE)


@functools.lru_cache(maxsize=20000)
def version_of_file(filename, project=""):
    """The version that a file name states (PEP 427, PEP 625, and the looser names of old); "" if it states none.

    Where a source archive's name can be cut in several places, the cut that leaves the project's own name wins."""
    stem, extension = strip_archive_extension(filename)
    parts = stem.split("-")
    if extension == ".whl":
        return parts[1].replace("_", "-") if len(parts) >= 5 else ""
    stem = _PLATFORM_TAIL.sub("", stem)
    cuts = [i for i, c in enumerate(stem) if c == "-" and i]
    for cut in cuts:
        if project and normalize(stem[:cut]) == project and stem[cut + 1:cut + 2].isdigit():
            return stem[cut + 1:]
    for cut in cuts:
        if parse_version(stem[cut + 1:]):
            return stem[cut + 1:]
    return stem[cuts[-1] + 1:] if cuts else ""


# The fields of a release's metadata in devpi's JSON, in devpi's spelling (http-api 8).
TEXT_FIELDS = ("name", "version", "metadata_version", "summary", "home_page", "author", "author_email", "maintainer",
               "maintainer_email", "license", "description", "keywords", "download_url", "comment", "requires_python",
               "description_content_type", "license_expression")
LIST_FIELDS = ("platform", "classifiers", "supported_platform", "provides", "requires", "obsoletes", "project_urls",
               "provides_dist", "obsoletes_dist", "requires_dist", "requires_external", "provides_extras", "dynamic",
               "license_file")
# Fields of newer metadata: kept, and shown only where they are set.
NEWER_LIST_FIELDS = ("import_name", "import_namespace")
FIELD_SPELLINGS = {"classifier": "classifiers", "provides_extra": "provides_extras", "project_url": "project_urls",
                   "platforms": "platform", "supported_platforms": "supported_platform", "license_files": "license_file",
                   "import_names": "import_name", "import_namespaces": "import_namespace"}


def parse_core_metadata(data):
    """The fields of a METADATA or PKG-INFO file (bytes), in the spelling of `TEXT_FIELDS` and `LIST_FIELDS`.

    A body becomes the description where no Description field stands (core metadata 2.1)."""
    message = email.parser.BytesParser(policy=email.policy.compat32).parsebytes(data)
    fields = {}
    for key, value in message.items():
        field = key.lower().replace("-", "_")
        field = FIELD_SPELLINGS.get(field, field)
        value = _header_text(value)
        if field in LIST_FIELDS or field in NEWER_LIST_FIELDS:
            fields.setdefault(field, []).append(value)
        else:
            fields.setdefault(field, "" if value == "UNKNOWN" else value)
    body = message.get_payload(decode=True) if not message.is_multipart() else b""
    if body and body.strip() and not fields.get("description"):
        fields["description"] = body.decode("utf-8", "replace")
    return fields


def _header_text(value):
    """A header of `email`'s as text: raw UTF-8 comes out of it as surrogates, or as a Header object that holds such."""
    if isinstance(value, email.header.Header):
        value = "".join(part if isinstance(part, str) else part.decode("latin-1") for part, _ in value._chunks)
    return str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def best_hash(hashes):
    """The hash spec `algorithm=hex` to keep of a page's {algorithm: hex}: sha256 if there, else the first sound one; or ""."""
    sound = {a.lower(): h.lower() for a, h in hashes.items() if isinstance(h, str) and is_digest(a.lower(), h)}
    for algorithm in sorted(sound, key=lambda a: a != "sha256"):
        return f"{algorithm}={sound[algorithm]}"
    return ""


@functools.lru_cache(maxsize=64)
def _digest_length(algorithm):
    if algorithm not in hashlib.algorithms_available or not re.fullmatch(r"[a-z0-9_-]{1,20}", algorithm):
        return 0
    return hashlib.new(algorithm).digest_size * 2


def is_digest(algorithm, text):
    """Whether `text` can be a hex digest of that algorithm, and the algorithm is one that can be checked here."""
    return bool(_digest_length(algorithm)) and len(text) == _digest_length(algorithm) and \
        re.fullmatch(r"[0-9a-fA-F]+", text) is not None


def file_path(hash_spec, filename):
    """Where a file with this hash lies below its index: `+f/{hex[:3]}/{hex[3:16]}/{filename}` (devpi's form)."""
    digest = hash_spec.partition("=")[2]
    return f"+f/{digest[:3]}/{digest[3:16]}/{filename}"


def hashless_path(url, filename):
    """Where a mirror's file without any known hash lies: `+e/{scheme_host_port_path}/{filename}` (devpi's form)."""
    parts = urllib.parse.urlsplit(url)
    folder = f"{parts.scheme}/{parts.netloc.rpartition('@')[2]}{parts.path.rpartition('/')[0]}"
    return f"+e/{re.sub(r'[^A-Za-z0-9_.-]', '_', folder.replace('/', '_'))}/{filename}"


def is_safe_filename(filename):
    """Whether a name from a client or from upstream can be the last part of a URL path and of a header."""
    return bool(filename) and len(filename.encode("utf-8", "replace")) <= 255 and filename not in (".", "..") and \
        re.search(r"[/\\\x00-\x1f\x7f\u2028\u2029\ud800-\udfff]", filename) is None


def iso_time(seconds):
    """A POSIX time as PEP 700 writes it: `2026-11-22T06:58:17.000000Z`."""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="microseconds")[:-6] + "Z"


def seconds_of(iso):
    """The POSIX time of a text like `iso_time` makes, with or without fractions."""
    whole, _, fraction = iso[:-1].partition(".")
    return datetime.datetime.fromisoformat(f"{whole}.{fraction:0<6}+00:00").timestamp()


def http_date(seconds):
    """A POSIX time as an HTTP-date (RFC 9110)."""
    return email.utils.formatdate(seconds, usegmt=True)


def plain_time(seconds):
    """A POSIX time as devpi's JSON shows it: `2026-11-22T06:59:13Z`."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def one_line(text, limit=300):
    """Text as one printable ASCII line, for a reason phrase or a log line."""
    text = re.sub(r"[^\x20-\x7e]+", " ", text.encode("ascii", "backslashreplace").decode("ascii")).strip()
    return text if len(text) <= limit else text[:limit - 3] + "..."


def reason_of(error):
    """A failure as a few words."""
    if isinstance(error, (TimeoutError, socket.timeout)):
        return "timed out"
    return one_line(str(error) or type(error).__name__, 200)


# ======================================================================================================================
# 2  Errors, settings, limits, threads
#
# An error is raised where it is known, with the HTTP status it deserves and a sentence for its reader; chapter 11 turns
# it into the answer in one place.  Nothing grows without a bound: those that matter stand in `Limits`.  Work in the
# background is done by crews of threads that are bounded too.
# ======================================================================================================================


class Problem(Exception):
    """What went wrong, as a sentence for the person who reads it.  Becomes an answer with `status`."""
    status = 500

    def __init__(self, message, status=None, headers=()):
        super().__init__(message)
        self.message = message
        self.status = status or self.status
        self.headers = list(headers)


class BadRequest(Problem):
    status = 400


class Unauthorized(Problem):
    """No credentials, or wrong ones, where some are asked for (RFC 9110); `challenge` makes clients send theirs."""
    status = 401

    def __init__(self, message, challenge=True):
        super().__init__(message, headers=[("WWW-Authenticate", 'Basic realm="pypi"')] if challenge else [])


class Forbidden(Problem):
    status = 403


class NotFound(Problem):
    status = 404


class Conflict(Problem):
    status = 409


class Gone(Problem):
    status = 410


class TooLarge(Problem):
    status = 413


class UnsupportedType(Problem):
    status = 415


class UpstreamTrouble(Problem):
    """Upstream did not give what was asked for: unreachable, too slow, an error, garbage."""
    status = 502


class Busy(Problem):
    """Not now; the same request may well succeed after `Retry-After` seconds."""
    status = 503

    def __init__(self, message, retry_after=1):
        super().__init__(message, headers=[("Retry-After", str(retry_after))])


class TooManyLogins(Problem):
    """Too many wrong passwords: for `wait` seconds not even the right one is looked at."""
    status = 429

    def __init__(self, wait):
        super().__init__(f"too many failed logins for this account from this address, try again in {wait} seconds",
                         headers=[("Retry-After", str(wait))])


class NoSpace(Problem):
    status = 507


class FatalError(Exception):
    """The program cannot start or go on; printed as `fatal: ...`, exit status 1."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the operator chose: command line first, then DEVPISERVER_* variables, then these defaults."""
    serverdir: str
    listen: tuple = (("127.0.0.1", 3141),)      # (host, port) pairs
    outside_url: str = ""                       # without final slash
    absolute_urls: bool = False
    trusted_proxies: tuple = ()                 # ipaddress networks, besides loopback
    restrict_modify: tuple | None = None        # names and :groups; None = no restriction
    mirror_cache_expiry: int = 1800             # seconds
    request_timeout: float = 5                  # seconds a request waits for upstream
    offline_mode: bool = False
    max_request_body_size: int = 1 << 30        # bytes
    connections: int = 4096
    threads: int = 64
    secretfile: str = ""
    access_log: bool = True
    debug: bool = False


class Limits:
    """Every bound that is not a setting.  Times in seconds, sizes in bytes."""
    head = 64 << 10                 # a request's head
    headers = 200                   # lines in it
    keep_alive = 75                 # between two requests on a connection
    evictable = 1                   # idle for so long, it has to make room if there are too many
    head_time = 30                  # from the first byte of a head to its last
    stall = 60                      # without one byte sent or received inside a request
    slow_client = 0.2               # seconds that a worker waits for a client to take more; the front goes on then
    gathered_body = 64 << 10        # a body up to this size is gathered by the front
    slowest_body = 1024             # bytes a second that a body must average after the first minute
    json_body = 4 << 20
    json_depth = 50
    attributes = 256 << 10          # of a user or of an index
    form_field = 10 << 20
    form_fields = 20 << 20          # all fields of an upload together, the file apart
    form_parts = 20000
    part_head = 8192
    drained_body = 64 << 20         # of a refused request, read so that its sender sees the answer
    drain_time = 10
    waiting_requests = 512          # handed to workers and not begun
    longest_queue = 20              # seconds that they may wait for a worker
    idle_thread = 30                # seconds after which a thread without work ends
    answer_cache = 64 << 20
    page_cache = 64 << 20
    ready_answer = 1 << 20          # the largest answer that the front keeps ready
    ready_head = 4 << 10            # the largest head of a request that it is kept under
    small_file = 256 << 10          # a file up to this size leaves in one send, from memory
    upstream_page = 100 << 20
    upstream_list = 200 << 20
    upstream_file = 20 << 30        # where upstream does not say how large it is
    upstream_page_time = 60         # also for the head of a file's answer
    upstream_stall = 30             # seconds without a byte from upstream
    upstream_list_time = 300
    upstream_redirects = 5
    upstream_idle = 20              # seconds that an unused connection to upstream is kept
    upstream_pause = 10             # seconds for which a host that failed is not waited for again
    fetches = 64                    # pages and metadata files at a time
    fetches_of_one = 16             # of them, from one host
    downloads = 128                 # files at a time
    downloads_of_one = 64           # of them, from one host
    waiting_flights = 1000          # for one host
    missing_projects = 10000        # remembered "not found" answers
    metadata_file = 10 << 20
    metadata_lines = 20000          # before its body
    archive_members = 100000
    archive_bytes = 2 << 30         # unpacked, while an archive is looked through
    archive_read = 16 << 20         # at once, while a tar is looked through
    remembered_passwords = 1000
    password_memory = 300           # seconds for which a checked password need not be hashed again
    session = 36000                 # life of a session token
    failed_logins = 5               # of one account from one address, before waiting begins
    longest_login_wait = 60
    failure_memory = 900            # seconds after which failed logins are forgotten
    remembered_failures = 10000
    busy = 10                       # seconds a writer waits for another process
    shutdown = 30                   # seconds that running requests may take to end


class Workers:
    """A bounded crew of daemon threads for one kind of work; grows on demand, to `limit` threads that are busy.

    Threads that wait for a slow client or for upstream (see `outside_wait`) are not counted as busy, so that a few dozen
    of those can't keep everybody else waiting; with them the crew has four times `limit` threads at most."""

    def __init__(self, name, limit, work):
        self.name, self.limit, self.work = name, limit, work
        self.waiting = collections.deque()
        self.ready = threading.Condition()
        self.count = self.idle = self.outside = 0       # threads: all, waiting for work, waiting for the outside

    def submit(self, item):
        with self.ready:
            self.waiting.append(item)
            if self.idle >= len(self.waiting):
                self.ready.notify()
            else:
                self._grow()

    def _grow(self):
        if self.count < self.limit + self.outside:
            self.count += 1
            threading.Thread(target=self._run, name=self.name, daemon=True).start()

    def _run(self):
        threading.current_thread().crew = self
        while True:
            with self.ready:
                self.idle += 1
                while not self.waiting:
                    if not self.ready.wait(Limits.idle_thread) and not self.waiting:
                        self.idle -= 1
                        self.count -= 1
                        return
                self.idle -= 1
                item = self.waiting.popleft()
            try:
                self.work(item)
            except Exception:
                log.exception("%s failed", self.name)

    @contextlib.contextmanager
    def away(self):
        """While one of the crew waits for the outside; gives whether there was room for one more such."""
        with self.ready:
            room = self.outside < 3 * self.limit
            self.outside += room
            if self.waiting:
                self._grow()
        try:
            yield room
        finally:
            with self.ready:
                self.outside -= room


def outside_wait():
    """A context for waiting on what may take long: a slow client, upstream.  False where too many do that already."""
    crew = getattr(threading.current_thread(), "crew", None)
    return crew.away() if crew else contextlib.nullcontext(True)


class Flight:
    """Work under way that any number may wait for; `error` is what ended it, if something did."""

    def __init__(self, function):
        self.function = function
        self.created = time.monotonic()
        self.ended = threading.Event()
        self.error = None

    def wait(self, seconds):
        """Whether it ended within so many seconds."""
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
            self.error = error
        except Exception as error:
            log.exception("background work failed")
            self.error = UpstreamTrouble(reason_of(error))


class SingleFlight:
    """Runs one thing at a time for one key: who asks while it is under way waits for the same flight.

    Each lane (an upstream host) has `lane_limit` flights at a time, so that one that hangs can't hold up the others."""

    def __init__(self, name, limit, lane_limit):
        self.workers = Workers(name, limit, self._run)
        self.lane_limit = lane_limit
        self.flights = {}
        self.lanes = {}             # lane -> [flights under way, those that wait]
        self.lock = threading.Lock()

    def start(self, key, lane, flight):
        """The flight under way for `key`, which is `flight` itself if there was none; Busy if the lane is full."""
        with self.lock:
            current = self.flights.get(key)
            if current is not None:
                return current
            running = self.lanes.setdefault(lane, [0, collections.deque()])
            if len(running[1]) >= Limits.waiting_flights:
                raise Busy("too much is being asked of one upstream server just now, try again")
            flight.key, flight.lane = key, lane
            self.flights[key] = flight
            if running[0] < self.lane_limit:
                running[0] += 1
                self.workers.submit(flight)
            else:
                running[1].append(flight)
        return flight

    def settle(self, seconds):
        """Wait, for a bounded time, until nothing is under way."""
        until = time.monotonic() + seconds
        for flight in list(self.flights.values()):
            flight.ended.wait(max(0, until - time.monotonic()))

    def _run(self, flight):
        try:
            flight.run()
        finally:
            with self.lock:
                del self.flights[flight.key]
                running = self.lanes[flight.lane]
                if running[1]:
                    self.workers.submit(running[1].popleft())
                else:
                    running[0] -= 1
                    if not running[0]:
                        del self.lanes[flight.lane]
            flight.ended.set()


# ======================================================================================================================
# 3  Store
#
# The one door to the database.  Readers see one committed state each and never wait; changes are functions that one
# thread runs, each in a savepoint with a serial and a changelog entry of its own, and commits in groups.  A change's
# caller is woken after the commit is on disk and after every cache has dropped what the change touched.
# ======================================================================================================================

SCHEMA = """
-- one row: one fact about this server (uuid, epoch)
CREATE TABLE node (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

-- ids are never used again (AUTOINCREMENT): a value read before a change can't name another row after it

-- one row: an account; `generation` changes with the password, and old session tokens die with it
CREATE TABLE users (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, pwhash TEXT, generation TEXT NOT NULL,
    created TEXT NOT NULL, modified TEXT, attributes TEXT NOT NULL);

-- one row: an index, a stage or a mirror; `config` is JSON, its values coerced
CREATE TABLE indexes (
    id INTEGER PRIMARY KEY AUTOINCREMENT, user_id INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
    name TEXT NOT NULL, config TEXT NOT NULL, UNIQUE (user_id, name));

-- one row: a project of an index; on a mirror, also what upstream said last and when
CREATE TABLE projects (
    id INTEGER PRIMARY KEY AUTOINCREMENT, index_id INTEGER NOT NULL REFERENCES indexes ON DELETE CASCADE, name TEXT NOT NULL,
    fetched REAL, etag TEXT, upstream TEXT, upstream_serial INTEGER, status TEXT, versions TEXT,
    UNIQUE (index_id, name));

-- one row: a version of a project on a stage; `metadata` is JSON
CREATE TABLE releases (
    id INTEGER PRIMARY KEY AUTOINCREMENT, project_id INTEGER NOT NULL REFERENCES projects ON DELETE CASCADE,
    version TEXT NOT NULL, metadata TEXT NOT NULL, UNIQUE (project_id, version));

-- one row: a file of a release (stage), or a file that upstream offers (mirror: no release, sha256 once it is here);
-- position: its place on the page, NULL once upstream stopped listing it
CREATE TABLE files (
    id INTEGER PRIMARY KEY AUTOINCREMENT, index_id INTEGER NOT NULL REFERENCES indexes ON DELETE CASCADE,
    project_id INTEGER NOT NULL REFERENCES projects ON DELETE CASCADE,
    release_id INTEGER REFERENCES releases ON DELETE CASCADE,
    position INTEGER, version TEXT NOT NULL, filename TEXT NOT NULL, path TEXT NOT NULL, hash_spec TEXT NOT NULL,
    sha256 TEXT, size INTEGER, uploaded TEXT NOT NULL, first_seen INTEGER NOT NULL DEFAULT 0,
    requires_python TEXT, yanked TEXT, core_metadata TEXT, metadata_sha256 TEXT, provenance TEXT,
    url TEXT, last_modified TEXT, history TEXT, UNIQUE (index_id, path));
CREATE INDEX files_of_project ON files (project_id, position, id);
CREATE INDEX files_of_release ON files (release_id);
CREATE INDEX files_of_blob ON files (sha256);
CREATE INDEX files_of_metadata ON files (metadata_sha256);

-- one row: a path user/index/+f/... that once was a file
CREATE TABLE gone (path TEXT PRIMARY KEY) WITHOUT ROWID;

-- one row: one committed change; ops = zlib(JSON list of {t, k, v}), hash = SHA-256(prev, serial as 8 bytes, ops)
CREATE TABLE changelog (
    serial INTEGER PRIMARY KEY, ts REAL NOT NULL, who TEXT, ops BLOB NOT NULL, prev BLOB NOT NULL, hash BLOB NOT NULL);
"""

# From schema version N to N+1: MIGRATIONS[N - 1] is a function of the connection.
MIGRATIONS = ()
SCHEMA_VERSION = 1 + len(MIGRATIONS)
EVERYTHING = "everything"       # the tag of changes to users and index configurations: all caches start anew


class Cache:
    """Values made from the database, kept in memory until a commit touches one of their tags or they expire.

    Bounded in bytes; the oldest goes first.  `get` costs one dictionary look-up and, for what expires, one clock."""

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
            # in place: the front and its hot path hold this very dictionary
            self.entries.clear()
            self.keys_of.clear()
            self.size = 0
        for tag in tags:
            for key in tuple(self.keys_of.get(tag, ())):
                self._remove(key)


class Freshness:
    """Keeps the caches true: drops what a commit touched, and refuses values whose making began before that commit.

    A maker notes `moment()` before it reads and hands it back to `keep`; a value that a later commit may have
    overtaken is simply not kept."""

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
            self.now += 1
            self.recent.append((self.now, tags))
            for cache in self.caches:
                cache._drop(tags)

    def keep(self, cache, key, value, size, tags, since, expires=0):
        with self.lock:
            if since < self.now:
                if not self.recent or self.recent[0][0] > since + 1:
                    return
                for moment, touched in self.recent:
                    if moment > since and (EVERYTHING in touched or not touched.isdisjoint(tags)):
                        return
            cache._put(key, value, size, tags, expires)


class Change:
    """What a change function works with: SQL, and a record of what it did."""

    def __init__(self, db, who):
        self.db, self.who = db, who
        self.execute, self.executemany = db.execute, db.executemany
        self.ops, self.tags = [], set()

    def record(self, kind, key, value):
        """Enter a final row value (None: deleted) into the changelog, under the row's natural key."""
        self.ops.append({"t": kind, "k": list(key), "v": value})

    def touch(self, *tags):
        """Name what caches must drop; see `EVERYTHING`, `project_tag`, `names_tag`."""
        self.tags.update(tags)


def project_tag(index_id, project):
    """Touched by whatever changes the page of one project of one index."""
    return (index_id, project)


def names_tag(index_id):
    """Touched when an index gains or loses a project."""
    return ("names", index_id)


class Store:
    """The database of one server directory.  `read()` gives a connection for reading, `write()` runs a change."""

    def __init__(self, serverdir, create=False):
        self.path = os.path.join(serverdir, "devpi_lite.db")
        if not create and not os.path.exists(self.path):
            raise FatalError(f"no devpi_lite database in {serverdir}")
        self.freshness = Freshness()
        self.tasks = queue.SimpleQueue()
        self.idle_readers = []
        self.closed = False
        self.writer = self._connect()
        self._upgrade(create)
        self.commits = CommitCounter(os.path.join(serverdir, ".commits"))
        self.serial = self._last_serial(self.writer)
        self.thread = threading.Thread(target=self._write_loop, name="writer", daemon=True)
        self.thread.start()
        self.node = self._node_facts()

    def _node_facts(self):
        with self.read() as db:
            return dict(map(tuple, db.execute("SELECT key, value FROM node")))

    def _connect(self, read_only=False):
        db = sqlite3.connect(self.path, timeout=Limits.busy, isolation_level=None, check_same_thread=False,
                             cached_statements=200)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA foreign_keys = ON")
        if read_only:
            db.execute("PRAGMA query_only = ON")
        else:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
        return db

    def _upgrade(self, create):
        """Make the schema, or bring an older one up, one transaction a step, after a copy has been put aside."""
        db = self.writer
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise FatalError(f"{self.path} has schema version {version}; this program knows versions up to "
                             f"{SCHEMA_VERSION}: use a newer devpi_lite.py")
        if version == 0:
            db.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA.split(";\n"):
                if statement.strip():
                    db.execute(statement)
            for key in ("uuid", "epoch"):
                db.execute("INSERT INTO node VALUES (?, ?)", (key, secrets.token_hex(16)))
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            db.execute("COMMIT")
        elif version < SCHEMA_VERSION and not create:
            raise FatalError(f"{self.path} was made by an older devpi_lite.py: start the server once, it brings it up")
        elif version < SCHEMA_VERSION:
            with contextlib.closing(sqlite3.connect(f"{self.path}.bak-{version}")) as aside:
                db.backup(aside)
            for step in range(version, SCHEMA_VERSION):
                db.execute("BEGIN IMMEDIATE")
                MIGRATIONS[step - 1](db)
                db.execute(f"PRAGMA user_version = {step + 1}")
                db.execute("COMMIT")

    @staticmethod
    def _last_serial(db):
        return db.execute("SELECT coalesce(max(serial), -1) FROM changelog").fetchone()[0]

    @contextlib.contextmanager
    def read(self):
        """A connection that sees one committed state until the `with` ends."""
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

    def write(self, function, *args, who=None, durable=True):
        """Run `function(change, *args)` as one change and return its value once it is on disk.

        Not `durable`: once it is committed; a power cut may take it back (what a mirror caches can be fetched again).
        Whatever it raises is raised here, with the change undone.  `Busy` if another process holds the database."""
        if self.closed:
            raise Busy("the server is shutting down, try again", 5)
        task = WriteTask(function, args, who, durable)
        self.tasks.put(task)
        task.done.acquire()
        if task.error is not None:
            raise task.error
        return task.value

    def _write_loop(self):
        while True:
            group = [self.tasks.get()]
            while len(group) < 64:
                try:
                    group.append(self.tasks.get_nowait())
                except queue.Empty:
                    break
            stop = None in group
            group = [task for task in group if task is not None]
            try:
                self._commit(group)
            except Exception as error:
                self._give_up(group, error)
            for task in group:
                task.done.release()
            if stop:
                return

    def _commit(self, group):
        """Run each change of the group in a savepoint of its own, commit once, then tell the caches."""
        db = self.writer
        db.execute(f"PRAGMA synchronous = {'FULL' if any(task.durable for task in group) else 'NORMAL'}")
        db.execute("BEGIN IMMEDIATE")
        self.serial = serial = self._last_serial(db)
        tags = set()
        for task in group:
            change = Change(db, task.who)
            db.execute("SAVEPOINT change")
            try:
                task.value = task.function(change, *task.args)
                if change.ops:
                    serial = self._log(change)
            except sqlite3.OperationalError:
                raise       # the disk, not the change: the whole group fails
            except Exception as error:
                task.error = error
                db.execute("ROLLBACK TO change")
            else:
                tags |= change.tags
            db.execute("RELEASE change")
        db.execute("COMMIT")
        self.serial = serial
        if tags:
            self.freshness.touch(frozenset(tags))
        if not self.commits.is_server:
            self.commits.raise_counter()

    @staticmethod
    def _log(change):
        """Append the change to the hash-chained changelog; returns its serial."""
        row = change.execute("SELECT serial, hash FROM changelog ORDER BY serial DESC LIMIT 1").fetchone()
        serial, prev = (row["serial"] + 1, row["hash"]) if row else (0, b"")
        ops = zlib.compress(json.dumps(change.ops, separators=(",", ":")).encode(), 1)
        digest = hashlib.sha256(prev + struct.pack(">Q", serial) + ops).digest()
        change.execute("INSERT INTO changelog VALUES (?, ?, ?, ?, ?, ?)",
                       (serial, time.time(), change.who, ops, prev, digest))
        return serial

    def _give_up(self, group, error):
        """The commit itself failed: nothing of the group happened, and each caller hears why."""
        if self.writer.in_transaction:
            try:
                self.writer.execute("ROLLBACK")
            except sqlite3.Error as second:
                log.error("rollback failed: %s", second)
        text = str(error)
        if "locked" in text or "busy" in text:
            told = Busy("the database is held by another process, try again", 5)
        elif "full" in text or "disk I/O" in text:
            told = NoSpace(f"nothing was stored: {text}")
        else:
            told = error
        log.error("commit failed: %s", text)
        for task in group:
            task.error = told

    def refresh_serial(self):
        """Another process committed: nothing that is in memory can be trusted."""
        with self.read() as db:
            self.serial = max(self.serial, self._last_serial(db))
        self.freshness.touch(frozenset((EVERYTHING,)))

    def close(self):
        """Let waiting changes finish, fold the write-ahead log into the database, close."""
        if self.closed:
            return
        self.closed = True
        self.tasks.put(None)
        self.thread.join(Limits.shutdown)
        while self.idle_readers:
            self.idle_readers.pop().close()
        self.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.writer.close()
        self.commits.close()


class WriteTask:
    """One change on its way to the writer thread."""
    __slots__ = ("function", "args", "who", "durable", "done", "value", "error")

    def __init__(self, function, args, who, durable=True):
        self.function, self.args, self.who, self.durable = function, args, who, durable
        self.done = threading.Lock()    # a bare lock wakes its waiter three times faster than an Event
        self.done.acquire()
        self.value = self.error = None


class CommitCounter:
    """A number in a small mapped file, raised after each commit by a process that is not the server.

    The server compares it with what it saw last (a memory read; SQLite's `data_version` would cost 7 us a request)."""

    def __init__(self, path):
        self.file = open(path, "a+b")
        if os.fstat(self.file.fileno()).st_size < 8:
            self.file.write(bytes(8))
            self.file.flush()
        self.map = mmap.mmap(self.file.fileno(), 8)
        self.numbers = memoryview(self.map).cast("Q")
        self.is_server = False
        self.seen = self.numbers[0]

    def changed(self):
        """Whether another process committed since the last call that said so."""
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
        self.file.close()


@contextlib.contextmanager
def locked(file):
    """Hold the operating system's exclusive lock on an open file; waits for it."""
    lock_file(file, wait=True)
    try:
        yield
    finally:
        unlock_file(file)


try:
    import fcntl

    def lock_file(file, wait=False):
        """Take an exclusive lock; OSError if it is taken and `wait` is false.  It ends with the process."""
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

    def unlock_file(file):
        fcntl.flock(file.fileno(), fcntl.LOCK_UN)
except ImportError:     # Windows
    import msvcrt

    def lock_file(file, wait=False):
        """Take an exclusive lock; OSError if it is taken and `wait` is false.  It ends with the process."""
        file.seek(1 << 30)      # a byte far past the content, which stays readable
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)

    def unlock_file(file):
        file.seek(1 << 30)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)


# ======================================================================================================================
# 4  Blobs and archives
#
# The bytes of files, named by their SHA-256, once each.  The one place that puts a file on disk: written in `tmp/`,
# synced, renamed into `files/`, directory synced; only then may a commit name it.  And what is read out of archives:
# their metadata file, after a look for members that no honest tool writes.
# ======================================================================================================================


class Blobs:
    """The content-addressed files of one server directory."""

    def __init__(self, serverdir):
        self.files = os.path.join(serverdir, "files")
        self.tmp = os.path.join(serverdir, "tmp")
        self.lock = threading.Lock()        # between claiming a blob that is there and collecting it
        os.makedirs(self.tmp, mode=0o700, exist_ok=True)
        if not os.path.isdir(os.path.join(self.files, "ff")):
            for number in range(256):       # all at once, so that keeping a blob syncs one directory, not two
                os.makedirs(os.path.join(self.files, "%02x" % number), mode=0o700, exist_ok=True)
            sync_directory(self.files)

    def clear_tmp(self):
        """Remove what a crash left half-done.  Only the server does this, at its start."""
        for name in os.listdir(self.tmp):
            path = os.path.join(self.tmp, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)

    def path(self, sha256):
        return os.path.join(self.files, sha256[:2], sha256)

    def has(self, sha256, size=None):
        """Whether the blob is there, and has that size."""
        try:
            return os.stat(self.path(sha256)).st_size == size or size is None
        except FileNotFoundError:
            return False

    def claim(self, sha256):
        """Whether the blob is there; if so it will not be collected before the caller had time to refer to it."""
        with self.lock:
            try:
                os.utime(self.path(sha256))
            except FileNotFoundError:
                return False
            return True

    def collect(self, is_referred_to, older_than=3600):
        """Remove blobs that nothing has referred to for so many seconds; returns how many."""
        count, limit = 0, time.time() - older_than
        for folder in os.scandir(self.files):
            for entry in os.scandir(folder.path):
                if entry.stat().st_mtime < limit and not is_referred_to(entry.name):
                    with self.lock:
                        if os.path.getmtime(entry.path) < limit:
                            os.unlink(entry.path)
                            count += 1
        return count

    def open(self, sha256, size=None):
        """The blob as an open binary file; NotFound if it is lost, or has another size than it should."""
        try:
            file = open(self.path(sha256), "rb")
            found = os.fstat(file.fileno()).st_size
            if size is None or found == size:
                return file
            file.close()
            log.error("the file %s is damaged: it has %d bytes, should have %d", self.path(sha256), found, size)
        except FileNotFoundError:
            log.error("the file %s is lost", self.path(sha256))
        raise NotFound("no such file")

    def incoming(self):
        """A new blob, to be written piece by piece."""
        return IncomingBlob(self)

    def add(self, data):
        """Keep these bytes; returns their SHA-256."""
        with self.incoming() as incoming:
            incoming.write(data)
            return incoming.keep()


@dataclasses.dataclass
class FilePart:
    """A stretch of an open file, to be sent as part of an answer; who sends it closes the file."""
    file: io.IOBase
    offset: int
    length: int


class IncomingBlob:
    """A blob in the making: write to it, then `keep()` it under its SHA-256, or leave the `with` and it is gone."""

    def __init__(self, blobs):
        self.blobs = blobs
        try:
            self.file = tempfile.NamedTemporaryFile(dir=blobs.tmp, delete=False, buffering=0)
        except OSError as error:
            raise _disk_problem(error) from error
        self.path = self.file.name
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data):
        left = memoryview(data)
        try:
            while left:
                left = left[self.file.write(left):]
        except OSError as error:
            raise _disk_problem(error) from error
        self.sha256.update(data)
        self.size += len(data)

    def keep(self, durable=True):
        """Sync and rename into place; returns the SHA-256.  Safe if another thread keeps the same bytes.

        Not `durable`: a power cut may take the name back, but never leave other bytes under it."""
        digest = self.sha256.hexdigest()
        target = self.blobs.path(digest)
        try:
            os.fsync(self.file.fileno())
            self.file.close()
            if not self.blobs.claim(digest) or os.path.getsize(target) != self.size:
                os.replace(self.path, target)
            if durable:     # also where the blob was there: a mirror may have left its name unsynced
                sync_directory(os.path.dirname(target))
        except OSError as error:
            raise _disk_problem(error) from error
        return digest

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.discard()

    def discard(self):
        """Remove what was not kept."""
        self.file.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def _disk_problem(error):
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpace(f"nothing was stored: {os.strerror(error.errno)}")
    return error


def sync_directory(path):
    """Make a rename in this directory survive a power cut (there is no such call on Windows)."""
    if os.name != "nt":
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


# What reading a broken archive may raise; such an archive is kept, without metadata.
_UNREADABLE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, ValueError, NotImplementedError,
               RuntimeError, struct.error, LookupError)


def archive_metadata(file, filename):
    """The METADATA of a wheel or the PKG-INFO of an sdist (bytes), from an open binary file.

    None if the archive can't be read as what its name says, or has no such member.  BadRequest if it can, but holds what
    no honest tool writes: members that leave it, duplicates, a second archive before or behind it."""
    lower = filename.lower()
    try:
        if lower.endswith((".whl", ".zip", ".egg")):
            return _zip_metadata(file, filename)
        if lower.endswith((".tar.gz", ".tgz", ".tar.bz2")):
            return _tar_metadata(file, filename)
    except Problem:
        raise
    except _UNREADABLE as error:
        log.info("%s can't be read: %s", one_line(filename), reason_of(error))
    return None


def _zip_metadata(file, filename):
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        check = MemberCheck(filename)
        for member in members:
            check(member.filename, member.file_size)
            if check.names[member.filename] > 1:
                raise BadRequest(f"'{filename}' holds '{one_line(member.filename)}' twice")
        _check_zip_ends(file, filename, members)
        if filename.lower().endswith(".whl"):
            wanted = [m for m in members if re.fullmatch(r"[^/]+\.dist-info/METADATA", m.filename)]
            if len(wanted) > 1:
                raise BadRequest(f"'{filename}' holds more than one .dist-info")
        else:
            wanted = [m for m in members if re.fullmatch(r"[^/]+/PKG-INFO", m.filename)]
        if not wanted:
            return None
        with archive.open(wanted[0]) as member:
            return _bounded_metadata(member, filename)


def _check_zip_ends(file, filename, members):
    """One archive from the first byte to the last: readers differ on which one they see where there are two."""
    size = file.seek(0, io.SEEK_END)
    start = max(0, size - 22 - 65535 - 20)
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    _, _, _, _, _, directory_size, directory_at, comment = struct.unpack("<4s4H2LH", tail[at:at + 22])
    end = start + at
    if tail[max(0, at - 20):at][:4] == b"PK\6\7":       # zip64
        end = struct.unpack("<Q", tail[at - 12:at - 4])[0]
        file.seek(end)
        directory_size, directory_at = struct.unpack("<2Q", file.read(56)[40:56])
    if start + at + 22 + comment != size or directory_at + directory_size != end \
            or members and min(m.header_offset for m in members) != 0:
        raise BadRequest(f"'{filename}' holds data outside its zip archive, or more than one")


def _tar_metadata(file, filename):
    found = None
    unpacked = bz2.BZ2File(file) if filename.lower().endswith("bz2") else gzip.GzipFile(fileobj=file)
    with tarfile.open(fileobj=BoundedReads(unpacked, filename), mode="r:") as archive:
        check = MemberCheck(filename)
        for member in archive:
            check(member.name, member.size)
            if found is None and member.isfile() and re.fullmatch(r"(\./)?[^/]+/PKG-INFO", member.name):
                found = _bounded_metadata(archive.extractfile(member), filename)
            archive.members = []        # tarfile would keep them all
    return found


class BoundedReads:
    """An unpacked tar as `tarfile` reads it, refusing what a bomb needs: extension headers of a gigabyte, read at once, and
    endless data."""

    def __init__(self, file, filename):
        self.file, self.filename, self.tell = file, filename, file.tell

    def read(self, size):
        if size > Limits.archive_read or self.tell() > Limits.archive_bytes:
            raise too_much_in(self.filename)
        return self.file.read(size)

    def seek(self, position, whence=io.SEEK_SET):
        if position > Limits.archive_bytes:
            raise too_much_in(self.filename)
        return self.file.seek(position, whence)


def too_much_in(filename):
    return BadRequest(f"'{filename}' holds too much: over {Limits.archive_members} members "
                      f"or {Limits.archive_bytes} bytes")


class MemberCheck:
    """Refuses an archive, member by member, that unpacks to too much or to outside of it."""

    def __init__(self, filename):
        self.filename, self.unpacked, self.count, self.names = filename, 0, 0, collections.Counter()

    def __call__(self, name, size):
        self.unpacked += size
        self.count += 1
        self.names[name] += 1
        if self.count > Limits.archive_members or self.unpacked > Limits.archive_bytes:
            raise too_much_in(self.filename)
        if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name) or "\0" in name \
                or ".." in re.split(r"[/\\]", name):
            raise BadRequest(f"'{self.filename}' holds the member '{one_line(name)}', which leaves the archive")


def _bounded_metadata(member, filename):
    data = member.read(Limits.metadata_file + 1)
    if len(data) > Limits.metadata_file:
        raise BadRequest(f"the metadata in '{filename}' is larger than {Limits.metadata_file} bytes")
    if data.partition(b"\n\n")[0].replace(b"\r\n", b"\n").count(b"\n") > Limits.metadata_lines:
        raise BadRequest(f"the metadata in '{filename}' has more than {Limits.metadata_lines} header lines")
    return data


# ======================================================================================================================
# 5  Users and permissions
#
# Accounts, password hashes, session tokens, and the one table of who may do what.  Secrets are compared in constant
# time; a password change ends every session of its user.
# ======================================================================================================================

ANONYMOUS, AUTHENTICATED = ":ANONYMOUS:", ":AUTHENTICATED:"
_SCRYPT = {"n": 1 << 15, "r": 8, "p": 1, "maxmem": 64 << 20}
_PBKDF2_ROUNDS = 600000
_hashing = threading.BoundedSemaphore(4)        # scrypt takes 32 MiB a piece


def hash_password(password):
    """`scrypt:n=...,r=...,p=...:salt:hash` (RFC 7914), or `pbkdf2_sha256:rounds:salt:hash` where scrypt is missing."""
    salt = secrets.token_bytes(16)
    if hasattr(hashlib, "scrypt"):
        prefix = f"scrypt:n={_SCRYPT['n']},r={_SCRYPT['r']},p={_SCRYPT['p']}"
    else:
        prefix = f"pbkdf2_sha256:{_PBKDF2_ROUNDS}"
    return f"{prefix}:{salt.hex()}:{_derive(prefix, password, salt).hex()}"


def check_password(stored, password):
    """Whether a password fits a hash that `hash_password` made."""
    prefix, salt, digest = stored.rsplit(":", 2)
    return hmac.compare_digest(_derive(prefix, password, bytes.fromhex(salt)).hex(), digest)


def _derive(prefix, password, salt):
    method, _, parameters = prefix.partition(":")
    data = password.encode("utf-8", "surrogatepass")
    with _hashing:
        if method == "scrypt":
            cost = dict(part.split("=") for part in parameters.split(","))
            return hashlib.scrypt(data, salt=salt, maxmem=_SCRYPT["maxmem"], dklen=32,
                                  **{k: int(v) for k, v in cost.items()})
        return hashlib.pbkdf2_hmac("sha256", data, salt, int(parameters))


@dataclasses.dataclass(frozen=True)
class Identity:
    """Who is asking.  `user` is None for anybody; `wait`: seconds until credentials are looked at again."""
    user: str | None = None
    groups: tuple = ()
    wait: int = 0
    expires: float = 0          # time.monotonic() at which these credentials stop counting

    @property
    def principals(self):
        """The names that stand in ACLs for this identity."""
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


def check_name(kind, name):
    """Refuse a user or index name that devpi refuses (http-api 4.1)."""
    if not name or re.search(r"""[\x00-\x20\x7f-\x9f!"#$%&'()*+,/:;<=>?\[\\\]^`{|}~\ud800-\udfff]""", name):
        raise BadRequest(f"{kind} '{name}' contains characters that aren't allowed. "
                         "Any ascii symbol besides -.@_ is blocked.")


class Users:
    """The accounts of a store."""

    def __init__(self, store):
        self.store = store
        self.cache = store.freshness.cache(4 << 20)

    def find(self, name):
        """The account of that name, or None."""
        account = self.cache.get(name)
        if account is None:
            since = self.store.freshness.moment()
            with self.store.read() as db:
                row = db.execute("SELECT * FROM users WHERE name = ?", (name,)).fetchone()
            if row is None:
                return None
            account = _account(row)
            self.store.freshness.keep(self.cache, name, account, 1000, frozenset((EVERYTHING,)), since)
        return account

    def get(self, name):
        account = self.find(name)
        if account is None:
            raise NotFound(f"no user '{name}'")
        return account

    def create(self, name, body, who=None):
        """devpi: PUT /user.  `body` as its JSON object."""
        if self.find(name):
            raise Conflict("user already exists")
        check_name("username", name)
        unknown = set(body) - {"password", "created", "modified", "indexes", "username", *USER_ATTRIBUTES}
        if unknown:
            raise BadRequest(f"Unknown keys in user config: {', '.join(sorted(map(str, unknown)))}")
        if "password" not in body:
            raise BadRequest("password needs to be set")
        pwhash = _new_hash(body["password"])
        attributes = {k: body[k] for k in USER_ATTRIBUTES if body.get(k) not in (None, "", {}, [])}
        check_size("user", attributes)
        return self.store.write(_insert_user, name, pwhash, attributes, who=who)

    def modify(self, name, body, who=None):
        """devpi: PATCH /user.  Keys that are no attributes are ignored; an empty value removes one."""
        self.get(name)
        changes = {k: body[k] for k in USER_ATTRIBUTES if k in body}
        check_size("user", changes)
        if body.get("password") is not None:
            changes["pwhash"] = _new_hash(body["password"])
        return self.store.write(_update_user, name, changes, who=who)


def check_size(kind, attributes):
    """Refuse attributes that would make every listing huge."""
    if len(json.dumps(attributes)) > Limits.attributes:
        raise TooLarge(f"the attributes of a {kind} may take {Limits.attributes} bytes at most")


def _new_hash(password):
    if password is None:
        return None
    if not isinstance(password, str):
        raise BadRequest("the password must be a string")
    return hash_password(password)


def _account(row):
    return Account(row["id"], row["name"], row["pwhash"], row["generation"], row["created"], row["modified"],
                   json.loads(row["attributes"]))


def _insert_user(change, name, pwhash, attributes):
    if change.execute("SELECT 1 FROM users WHERE name = ?", (name,)).fetchone():
        raise Conflict("user already exists")
    change.execute("INSERT INTO users (name, pwhash, generation, created, attributes) VALUES (?, ?, ?, ?, ?)",
                   (name, pwhash, secrets.token_hex(8), plain_time(time.time()), json.dumps(attributes)))
    return _record_user(change, name)


def _update_user(change, name, changes):
    row = change.execute("SELECT * FROM users WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise NotFound(f"no user '{name}'")
    old = _account(row)
    attributes = dict(old.attributes)
    for key, value in changes.items():
        if key != "pwhash":
            attributes[key] = value
            if value in (None, "", {}, []):
                del attributes[key]
    if attributes == old.attributes and "pwhash" not in changes:
        return old
    change.execute("UPDATE users SET attributes = ?, modified = ? WHERE id = ?",
                   (json.dumps(attributes), plain_time(time.time()), old.id))
    if "pwhash" in changes:
        change.execute("UPDATE users SET pwhash = ?, generation = ? WHERE id = ?",
                       (changes["pwhash"], secrets.token_hex(8), old.id))
    return _record_user(change, name)


def _record_user(change, name):
    row = change.execute("SELECT * FROM users WHERE name = ?", (name,)).fetchone()
    change.record("user", [name], {k: row[k] for k in row.keys() if k != "id"})
    change.touch(EVERYTHING)
    return _account(row)


class Logins:
    """Turns credentials into an `Identity`: session tokens, passwords, and the patience with wrong ones."""

    def __init__(self, users, secret):
        self.users = users
        self.key = hmac.new(secret, b"devpi_lite session", "sha256").digest()
        self.memory_key = secrets.token_bytes(32)
        self.remembered = collections.OrderedDict()     # keyed digest of user, hash and password -> (fits, until)
        self.checking = {}                              # such a digest -> [lock, how many hold or want it]
        self.failures = collections.OrderedDict()       # (account, address) -> (count, wait until, last failure)
        self.lock = threading.Lock()

    # -- session tokens

    def issue(self, account):
        """A session token: base64url of [user, generation, end], a dot, base64url of an HMAC-SHA256 over it."""
        payload = json.dumps([account.name, account.generation, int(time.time()) + Limits.session]).encode()
        return f"{_base64url(payload)}.{_base64url(self._mac(payload))}"

    def _mac(self, payload):
        return hmac.new(self.key, payload, "sha256").digest()

    def check_token(self, user, token):
        """The identity behind a session token of that user, or None."""
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
        if name != user or account is None or account.generation != generation or not 0 < left <= Limits.session:
            return None
        return Identity(user, expires=time.monotonic() + left)

    # -- passwords

    def check(self, user, secret, address, is_login=False):
        """The identity for a user name with a session token or a password; anonymous if neither fits.

        The answer for a password is remembered for some minutes under a keyed digest, for the slow hash costs 50 ms.
        The same wrong password once more counts as an attempt only where somebody logs in: an installer with an old
        password in its URL sends it with every request."""
        if len(user) > 200:
            return NOBODY       # nobody has such a name, and it need not be remembered
        identity = self.check_token(user, secret)
        if identity:
            return identity
        wait = self.wait_for(user, address)
        if wait:        # not even for a remembered password: guessing must not get faster by its being in use
            return Identity(wait=wait)
        account = self.users.find(user)
        pwhash = account.pwhash if account and account.pwhash is not None else ""
        digest = hmac.new(self.memory_key, f"{user}\n{pwhash}\n{secret}".encode("utf-8", "surrogatepass"), "sha256").digest()
        with self._alone(digest):
            fits, until = self.remembered.get(digest, (False, 0))
            known = until >= time.monotonic()
            if not known or is_login and not fits:
                wait = self._count_attempt(user, address)
                if wait:
                    return Identity(wait=wait)
                if not known:
                    fits = bool(pwhash) and check_password(pwhash, secret)
                    self._remember(digest, fits)
            if not fits:
                wait = self.wait_for(user, address)
                return Identity(wait=wait) if wait else NOBODY
        self._succeeded(user, address)
        return Identity(user, expires=time.monotonic() + Limits.password_memory)

    @contextlib.contextmanager
    def _alone(self, digest):
        """One thread at a time for the same credentials: fifty parallel requests cost one slow hash."""
        with self.lock:
            entry = self.checking.setdefault(digest, [threading.Lock(), 0])
            entry[1] += 1
        try:
            with entry[0]:
                yield
        finally:
            with self.lock:
                entry[1] -= 1
                if not entry[1]:
                    del self.checking[digest]

    def _remember(self, digest, fits):
        with self.lock:
            self.remembered[digest] = (fits, time.monotonic() + Limits.password_memory)
            while len(self.remembered) > Limits.remembered_passwords:
                self.remembered.popitem(last=False)

    def wait_for(self, user, address):
        """Seconds for which this account is not looked at from this address, after too many wrong passwords."""
        until = self.failures.get((user, address), (0, 0, 0))[1]
        return max(0, int(until - time.monotonic() + 0.999))

    def _count_attempt(self, user, address):
        """Count an attempt as failed until it succeeds; returns the seconds to wait if there were too many."""
        now = time.monotonic()
        with self.lock:
            count, until, last = self.failures.pop((user, address), (0, 0, 0))
            if now - last > Limits.failure_memory:
                count = 0
            wait = max(0, int(until - now + 0.999))
            if not wait:
                count += 1
                extra = count - Limits.failed_logins
                until = now + min(2 ** extra, Limits.longest_login_wait) if extra >= 0 else 0
                last = now
            self.failures[user, address] = (count, until, last)
            while len(self.failures) > Limits.remembered_failures:
                self.failures.popitem(last=False)
        if wait:
            log.warning("%d failed logins as %s from %s: the next is looked at in %d s",
                        count, one_line(user, 60), address, wait)
        return wait

    def _succeeded(self, user, address):
        if (user, address) in self.failures:
            with self.lock:
                self.failures.pop((user, address), None)


def _base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _from_base64url(text):
    if not re.fullmatch(r"[A-Za-z0-9_-]*", text):
        raise ValueError("not base64url")
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def decode_credentials(text):
    """(user, secret) out of the base64 of `user:secret`, or None if it is no such thing."""
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
    """The one table of who may do what (http-api 3.5), with and without `--restrict-modify`."""

    def __init__(self, settings):
        self.listed = None if settings.restrict_modify is None else set(settings.restrict_modify)

    def _modifier(self, identity, owner):
        """Root and the owner; or, under --restrict-modify, exactly those who are listed."""
        if self.listed is None:
            return identity.user is not None and identity.user in ("root", owner)
        return not self.listed.isdisjoint(identity.principals)

    def user_create(self, identity):
        return self.listed is None or self._modifier(identity, None)

    def user_modify(self, identity, name):
        return self._modifier(identity, name)

    def user_modify_password(self, identity, name):
        return identity.user == name or self._modifier(identity, name)

    def user_delete(self, identity, name):
        if name == "root" or self.listed is not None and identity.user == name:
            return False
        return self._modifier(identity, name)

    def index_modify(self, identity, owner):
        """Create, change or delete an index of that owner."""
        return self._modifier(identity, owner)

    def upload(self, identity, index):
        return not identity.principals.isdisjoint(index.config.get("acl_upload", ()))

    def delete_files(self, identity, index):
        return self.upload(identity, index) or self._modifier(identity, index.user)

    def read(self, identity, index):
        acl = index.config.get("acl_pkg_read")
        return acl is None or identity.user is not None and identity.user in ("root", index.user) \
            or not identity.principals.isdisjoint(acl)


# ======================================================================================================================
# 6  Indexes
#
# What an index is configured to be, and the order in which an index and its bases are asked.  Values are coerced and
# checked on the way in, so that everything after this chapter can trust them.
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class Index:
    """A stage or a mirror; `config` holds the coerced values, absent keys are absent."""
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
    def is_mirror(self):
        return self.config["type"] == "mirror"

    @property
    def volatile(self):
        return self.config["volatile"]

    @property
    def restricted(self):
        """Whether not everybody may read it."""
        return ANONYMOUS not in self.config.get("acl_pkg_read", (ANONYMOUS,))


def _to_bool(key, value):
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "yes", "false", "no"):
        return value.lower() in ("true", "yes")
    raise BadRequest(f"Unknown boolean value {value!r}.")


def _to_list(key, value):
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",")]
        return [item for item in value if item]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise BadRequest(f"Unknown list value {value!r}.")


def _to_acl(key, value):
    return [item.upper() if item.upper() in (ANONYMOUS, AUTHENTICATED) else item for item in _to_list(key, value)]


def _to_whitelist(key, value):
    return [item if item == "*" else normalize(item) for item in _to_list(key, value)]


def _to_inheritance(key, value):
    if isinstance(value, str) and value.lower() in ("intersection", "union"):
        return value.lower()
    raise BadRequest(f"Unknown value {value!r} for mirror_whitelist_inheritance, must be 'intersection' or 'union'.")


def _to_integer(key, value):
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10 ** 9:
        return value
    raise BadRequest(f"'{key}' option must be an integer")


def _to_url(key, value):
    if isinstance(value, str) and re.fullmatch(r"https?://[^\s/?#\x00-\x1f\x7f]+[^\s\x00-\x1f\x7f]*", value):
        with contextlib.suppress(ValueError):
            parts = urllib.parse.urlsplit(value)
            if parts.hostname and (parts.port is None or parts.port):
                return value
    raise BadRequest(f"'{key}' option must be a URL.")


def _to_anything(key, value):
    return value


# key -> (coercion, value at creation); None: absent until set
STAGE_KEYS = {
    "volatile": (_to_bool, True), "bases": (_to_list, []), "acl_upload": (_to_acl, None),
    "acl_toxresult_upload": (_to_acl, [ANONYMOUS]), "mirror_whitelist": (_to_whitelist, []),
    "mirror_whitelist_inheritance": (_to_inheritance, "intersection"), "acl_pkg_read": (_to_acl, None),
    "title": (_to_anything, None), "description": (_to_anything, None), "custom_data": (_to_anything, None)}
MIRROR_KEYS = {
    "volatile": (_to_bool, True), "mirror_url": (_to_url, None), "mirror_web_url_fmt": (_to_anything, None),
    "mirror_cache_expiry": (_to_integer, None), "mirror_ignore_serial_header": (_to_bool, None),
    "mirror_no_project_list": (_to_bool, None), "mirror_provides_core_metadata": (_to_bool, None),
    "mirror_use_external_urls": (_to_bool, None), "acl_pkg_read": (_to_acl, None),
    "title": (_to_anything, None), "description": (_to_anything, None), "custom_data": (_to_anything, None)}
_IGNORED_ON_MIRRORS = ("bases", "acl_upload", "mirror_whitelist")      # old clients and dumps send them


class ConfigEdit:
    """An index configuration in the making: what a PUT or PATCH body says, applied to what is stored."""

    def __init__(self, type_, config, defaults):
        self.keys = MIRROR_KEYS if type_ == "mirror" else STAGE_KEYS
        self.config = dict(config)
        self.defaults = defaults        # the values at creation: these keys can't be removed
        self.set_keys = set()

    def apply_object(self, body):
        """Set what a JSON object names; null removes."""
        unknown = {}
        for key, value in body.items():
            if key in ("projects", "type") or self.config["type"] == "mirror" and key in _IGNORED_ON_MIRRORS:
                continue
            if key not in self.keys:
                unknown[key] = value
            elif value is None:
                self.remove(key)
            else:
                self.set(key, value)
        if unknown:
            raise BadRequest("indexconfig got unexpected keyword arguments: "
                             + ", ".join(f"{key}={value}" for key, value in unknown.items()))

    def apply_operators(self, items):
        """Apply `key=value`, `key+=value`, `key-=value` and `key-=` one after the other (devpi's list form)."""
        for item in items:
            if not isinstance(item, str):
                raise BadRequest(f"expected 'key=value', 'key+=value' or 'key-=value', got {item!r}")
            key, _, value = item.partition("=")
            if key.endswith("+"):
                self.add(key[:-1].strip(), value)
            elif key.endswith("-") and value:
                self.take(key[:-1].strip(), value)
            elif key.endswith("-"):
                self.remove(key[:-1].strip())
            elif key.strip() == "type" and value != self.config["type"]:
                raise BadRequest("the 'type' of an index can't be changed")
            else:
                self.apply_object({key.strip(): value})

    def set(self, key, value):
        self.config[key] = self.keys[key][0](key, value)
        self.set_keys.add(key)

    def add(self, key, value):
        old = self._list_at(key)
        value, = self.keys[key][0](key, [value])
        if value not in old:
            self.set(key, old + [value])

    def take(self, key, value):
        old = self._list_at(key)
        if value not in old:
            raise BadRequest(f"The '{key}' setting doesn't have value '{value}'")
        self.config[key] = [item for item in old if item != value]

    def _list_at(self, key):
        if key not in self.keys:
            raise BadRequest(f"indexconfig got unexpected keyword arguments: {key}")
        if self.keys[key][0] not in (_to_list, _to_acl, _to_whitelist):
            raise BadRequest(f"The '{key}' setting is no list")
        return self.config.get(key, [])

    def remove(self, key):
        if key == "type" or key in self.defaults or key == "mirror_url":
            raise BadRequest("Default values can't be removed.")
        self.config.pop(key, None)


def index_defaults(type_, user):
    """The configuration of a new index of this type."""
    keys = {"stage": STAGE_KEYS, "mirror": MIRROR_KEYS}.get(type_) if isinstance(type_, str) else None
    if keys is None:
        raise BadRequest(f"unknown index type {type_!r}")
    config = {"type": type_}
    config.update((key, default) for key, (_, default) in keys.items() if default is not None)
    if type_ == "stage":
        config["acl_upload"] = [user]
    return config


class Indexes:
    """The indexes of a store, as values."""

    def __init__(self, store, users):
        self.store, self.users = store, users
        self.cache = store.freshness.cache(8 << 20)

    def find(self, path):
        """The index `user/name`, or None."""
        index = self.cache.get(path)
        if index is None:
            since = self.store.freshness.moment()
            user, _, name = path.partition("/")
            with self.store.read() as db:
                row = db.execute("SELECT indexes.*, users.name AS user FROM indexes JOIN users ON users.id = user_id "
                                 "WHERE users.name = ? AND indexes.name = ?", (user, name)).fetchone()
            if row is None:
                return None
            index = _index(row)
            self.store.freshness.keep(self.cache, path, index, len(row["config"]) + 500, frozenset((EVERYTHING,)), since)
        return index

    def get(self, path):
        index = self.find(path)
        if index is None:
            raise NotFound(f"The stage {path} could not be found.")
        return index

    def all(self, user=None):
        """All indexes, or those of one user, by user and name."""
        with self.store.read() as db:
            rows = db.execute("SELECT indexes.*, users.name AS user FROM indexes JOIN users ON users.id = user_id "
                              "WHERE ?1 IS NULL OR users.name = ?1 ORDER BY users.name, indexes.name", (user,)).fetchall()
        return [_index(row) for row in rows]

    def order(self, index):
        """The resolution order: breadth-first over bases, each once, mirrors last (http-api 6.1)."""
        key = ("order", index.path)
        order = self.cache.get(key)
        if order is None:
            since = self.store.freshness.moment()
            first, mirrors, seen, queue_ = [], [], {index.path}, collections.deque([index])
            while queue_:
                current = queue_.popleft()
                (mirrors if current.is_mirror else first).append(current)
                for base in current.config.get("bases", ()):
                    if base not in seen:
                        seen.add(base)
                        found = self.find(base)
                        if found:
                            queue_.append(found)
            order = tuple(first + mirrors)
            self.store.freshness.keep(self.cache, key, order, 500 * len(order), frozenset((EVERYTHING,)), since)
        return order

    def refuse_existing(self, user, name):
        """NotFound if there is no such user, Conflict if the index is there."""
        self.users.get(user)
        if self.find(f"{user}/{name}"):
            raise Conflict(f"index '{user}/{name}' exists")

    def create(self, user, name, body, who=None):
        """devpi: PUT /user/index.  Returns the new `Index`."""
        self.refuse_existing(user, name)
        check_name("indexname", name)
        body = _unwrapped(body)
        type_ = body.get("type")
        defaults = index_defaults("stage" if type_ is None else type_, user)
        edit = ConfigEdit(defaults["type"], defaults, ())
        edit.apply_object({key: value for key, value in body.items() if value is not None})
        self._check_config(edit.config, "bases")
        return self.store.write(_insert_index, user, name, edit.config, who=who)

    def modify(self, index, body, error_on_noop=False, who=None):
        """devpi: PATCH /user/index with an object or a list of operators.  Returns the `Index` as it is then."""
        edit = ConfigEdit(index.type, index.config, index_defaults(index.type, index.user))
        if isinstance(body, list):
            edit.apply_operators(body)
            self._check_config(edit.config, "bases")
        else:
            body = _unwrapped(body)
            if body.get("type", index.type) != index.type:
                raise BadRequest("the 'type' of an index can't be changed")
            edit.apply_object(body)
            self._check_config(edit.config, *edit.set_keys)
        if edit.config == index.config:
            if error_on_noop:
                raise BadRequest("The requested modifications resulted in no changes")
            return index
        return self.store.write(_update_index, index, edit.config, who=who)

    def _check_config(self, config, *keys):
        check_size("index", config)
        if config["type"] == "mirror" and "mirror_url" not in config:
            raise BadRequest("'mirror_url' option must be a URL.")
        if "bases" in keys:
            wrong = []
            for base in config.get("bases", ()):
                if not re.fullmatch(r"[^/]+/[^/]+", base):
                    wrong.append(f"invalid base index spec: '{base}'")
                elif not self.find(base):
                    wrong.append(f"base index '{base}' does not exist")
            if wrong:
                raise BadRequest(", ".join(wrong))

    def delete(self, index, who=None):
        """devpi: DELETE /user/index."""
        _refuse_non_volatile(index)
        self.store.write(_delete_index, index, who=who)

    def delete_user(self, name, who=None):
        """devpi: DELETE /user, with all that the user has."""
        self.store.write(_delete_user, name, who=who)


def _index(row):
    return Index(row["id"], row["user"], row["name"], json.loads(row["config"]))


def _unwrapped(body):
    """The configuration in a body, which may be wrapped as devpi's answers are."""
    if isinstance(body, dict) and body.get("type") == "indexconfig" and isinstance(body.get("result"), dict):
        body = body["result"]
    if not isinstance(body, dict):
        raise BadRequest("expected a JSON object with the index configuration")
    return body


def _insert_index(change, user, name, config):
    row = change.execute("SELECT id FROM users WHERE name = ?", (user,)).fetchone()
    if row is None:
        raise NotFound(f"no user '{user}'")
    try:
        cursor = change.execute("INSERT INTO indexes (user_id, name, config) VALUES (?, ?, ?)",
                                (row["id"], name, json.dumps(config)))
    except sqlite3.IntegrityError:
        raise Conflict(f"index '{user}/{name}' exists") from None
    return _record_index(change, Index(cursor.lastrowid, user, name, config))


def _current(change, index):
    """The index as it is now: what a request read before its body came may be out of date."""
    row = change.execute("SELECT config FROM indexes WHERE id = ?", (index.id,)).fetchone()
    if row is None:
        raise NotFound(f"The stage {index.path} could not be found.")
    return dataclasses.replace(index, config=json.loads(row["config"]))


def _update_index(change, index, config):
    if _current(change, index).config != index.config:
        raise Conflict(f"index {index.path} was changed by someone else meanwhile, try again")
    if index.is_mirror and config["mirror_url"] != index.config["mirror_url"]:
        # another upstream: what the old one said is no longer on the pages, and nothing is asked "if changed"
        change.execute("UPDATE files SET position = NULL WHERE index_id = ?", (index.id,))
        change.execute("UPDATE projects SET fetched = NULL, etag = NULL, upstream = NULL, upstream_serial = NULL, "
                       "status = NULL WHERE index_id = ?", (index.id,))
    change.execute("UPDATE indexes SET config = ? WHERE id = ?", (json.dumps(config), index.id))
    return _record_index(change, dataclasses.replace(index, config=config))


def _record_index(change, index):
    change.record("index", [index.user, index.name], index.config)
    change.touch(EVERYTHING)
    return index


def _delete_index(change, index):
    _refuse_non_volatile(_current(change, index))
    _bury_files(change, index)
    change.execute("DELETE FROM indexes WHERE id = ?", (index.id,))
    change.record("index", [index.user, index.name], None)
    change.touch(EVERYTHING)


def _refuse_non_volatile(index):
    if not index.volatile:
        raise Forbidden(f"index {index.path} non-volatile, cannot delete")


def _delete_user(change, name):
    row = change.execute("SELECT id FROM users WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise NotFound(f"no user '{name}'")
    rows = change.execute("SELECT indexes.*, ? AS user FROM indexes WHERE user_id = ?", (name, row["id"])).fetchall()
    for index in map(_index, rows):
        if not index.volatile:
            raise Forbidden(f"user '{name}' has non-volatile index: {index.name}")
        _bury_files(change, index)
    change.execute("DELETE FROM users WHERE id = ?", (row["id"],))
    change.record("user", [name], None)
    change.touch(EVERYTHING)


def _bury_files(change, index, condition="1", *values):
    """Remember the paths of files about to be deleted: they answer 410 from now on.

    A mirror's links that were never followed are not remembered."""
    change.execute("INSERT OR IGNORE INTO gone SELECT ? || '/' || path FROM files WHERE index_id = ? "
                   f"AND sha256 IS NOT NULL AND {condition}", (index.path, index.id, *values))


# ======================================================================================================================
# 7  Upstream
#
# The one place that talks to other servers: pooled keep-alive connections, redirects, credentials that never follow one
# to another host, time limits; and the parsing of simple pages, JSON and HTML, into values.
# ======================================================================================================================

SIMPLE_JSON = "application/vnd.pypi.simple.v1+json"
SIMPLE_HTML = "application/vnd.pypi.simple.v1+html"


class StaleConnection(Exception):
    """A kept connection that upstream had closed meanwhile; the request may be sent again on a new one."""


class UpstreamResponse:
    """An answer of upstream's: `status`, `headers`, `url` (after redirects); `read` its body, then `close`."""

    def __init__(self, client, key, connection, response, url):
        self.client, self.key, self.connection, self.response, self.url = client, key, connection, response, url
        self.status, self.headers = response.status, response.headers

    def header(self, name):
        return self.headers.get(name, "")

    def read(self, size):
        """Up to `size` bytes as soon as there are some; b"" at the end."""
        try:
            with outside_wait():
                return self.response.read1(size)
        except (OSError, http.client.HTTPException) as error:
            raise UpstreamTrouble(f"{public_url(self.url)}: {reason_of(error)}") from error

    def length(self):
        """The announced Content-Length, or None."""
        text = self.header("Content-Length")
        return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None

    def close(self):
        """Give the connection back if the body was read to its end, else close it."""
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


class UpstreamClient:
    """Keep-alive connections to other servers, with proxies as `urllib.request` reads them from the environment."""

    def __init__(self, settings):
        self.timeout = settings.request_timeout
        self.offline = settings.offline_mode
        self.lock = threading.Lock()
        self.asking = {}            # connection that waits for an answer's head -> time.monotonic() to give up
        self.idle = {}              # (scheme, host, port) -> [(connection, since)]
        self.paused = {}            # (scheme, host, port) -> time.monotonic() until which it counts as down
        self.proxies = urllib.request.getproxies()

    @functools.cached_property
    def tls(self):
        return ssl.create_default_context()     # 47 ms of CPU, so only once and only if needed

    def get(self, url, headers, method="GET"):
        """Ask for a URL and follow redirects.  `UserInfo` in the URL becomes Basic credentials for that origin alone.

        Raises UpstreamTrouble if there is no answer.  The caller closes the response."""
        if self.offline:
            raise UpstreamTrouble("offline mode: upstream is not asked")
        authority = origin_of(url)
        credentials = credentials_of(url)
        for _ in range(Limits.upstream_redirects + 1):
            sent = dict(headers)
            if credentials and origin_of(url) == authority:
                sent["Authorization"] = credentials
            response = self._ask(method, url, sent)
            if response.status not in (301, 302, 303, 307, 308) or not response.header("Location"):
                return response
            response.close()
            url = joined_url(response.url, response.header("Location"))
            if url is None:
                raise UpstreamTrouble(f"{public_url(response.url)} redirects to something that is no http URL")
        raise UpstreamTrouble(f"{public_url(url)}: too many redirects")

    def _ask(self, method, url, headers):
        key = origin_of(url)
        try:
            while True:
                connection, kept = self._connection(key, url)
                try:
                    return self._send(key, connection, kept, method, url, headers)
                except StaleConnection:
                    log.debug("a kept connection to %s was closed, using a new one", key[1])
        except (OSError, http.client.HTTPException, ValueError) as error:
            with self.lock:
                now = time.monotonic()
                self.paused = {origin: until for origin, until in self.paused.items() if until > now}
                self.paused[key] = now + Limits.upstream_pause
            raise UpstreamTrouble(f"{public_url(url)}: {reason_of(error)}") from error

    def _send(self, key, connection, kept, method, url, headers):
        parts = urllib.parse.urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        proxy = self._proxy(parts)
        if proxy and parts.scheme == "http":
            target = f"http://{parts.netloc.rpartition('@')[2]}{target}"
            if credentials_of(proxy):
                headers = {**headers, "Proxy-Authorization": credentials_of(proxy)}
        try:
            if connection.sock is None:
                with outside_wait():
                    connection.connect()
            connection.sock.settimeout(Limits.upstream_stall)
            with self.lock:
                self.asking[connection] = time.monotonic() + Limits.upstream_page_time
            with outside_wait():
                connection.request(method, target, headers=headers)
                response = connection.getresponse()
        except (ConnectionError, http.client.BadStatusLine) as error:
            connection.close()
            if kept:
                raise StaleConnection from error
            raise
        except BaseException:
            connection.close()
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
        scheme, host, port = key
        proxy = self._proxy(urllib.parse.urlsplit(url))
        kind = http.client.HTTPConnection
        arguments = {"timeout": self.timeout}
        if scheme == "https":
            kind = http.client.HTTPSConnection
            arguments["context"] = self.tls
        if not proxy:
            return kind(host, port, **arguments), False
        through = urllib.parse.urlsplit(proxy)
        connection = kind(through.hostname, through.port or 80, **arguments)
        if scheme == "https":
            credentials = credentials_of(proxy)
            connection.set_tunnel(host, port, {"Proxy-Authorization": credentials} if credentials else {})
        return connection, False

    def _proxy(self, parts):
        """The URL of the proxy for a URL, or None."""
        proxy = self.proxies.get(parts.scheme)
        if not proxy or urllib.request.proxy_bypass(parts.hostname):
            return None
        return proxy if "//" in proxy else "http://" + proxy

    def give_back(self, key, connection):
        """Keep a connection for the next request; those that nobody used for long are closed."""
        now = time.monotonic()
        with self.lock:
            self.idle.setdefault(key, []).append((connection, now))
            for origin in list(self.idle):
                for old, since in self.idle[origin]:
                    if now - since >= Limits.upstream_idle:
                        old.close()
                self.idle[origin] = [pair for pair in self.idle[origin] if now - pair[1] < Limits.upstream_idle]
                if not self.idle[origin]:
                    del self.idle[origin]

    def watch(self):
        """A loop for a thread: break off answers whose head does not come to an end (slow lines, 100 Continue for ever)."""
        while True:
            time.sleep(1)
            now = time.monotonic()
            with self.lock:
                late = [connection for connection, until in self.asking.items() if until < now]
            for connection in late:
                with contextlib.suppress(OSError, AttributeError):      # it may be over by now
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def is_paused(self, url):
        """Whether this host failed within the last seconds, so that it is not worth waiting for it."""
        return self.paused.get(origin_of(url), 0) > time.monotonic()


def origin_of(url):
    """(scheme, host, port) of an http or https URL."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def credentials_of(url):
    """The Authorization value for the user and password in a URL, or None."""
    parts = urllib.parse.urlsplit(url)
    if parts.username is None:
        return None
    pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def public_url(url):
    """The URL without credentials, for eyes and logs."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def joined_url(base, link):
    """`link` as found on the page `base`, made absolute, without fragment and credentials; None unless http(s)."""
    try:
        url = urllib.parse.urljoin(public_url(base), link.strip())
        parts = urllib.parse.urlsplit(urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]"))
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            return None
    except ValueError:
        return None
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))


@dataclasses.dataclass(frozen=True)
class UpstreamFile:
    """One file of an upstream page.  `yanked`: None, or the reason ("" without one); `core_metadata`: None (not offered),
    "true" (offered without a hash) or the SHA-256 of the metadata file (PEP 714); `uploaded`: ISO time or ""."""
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
    """A project's page: files in page order, the project's status (PEP 792) as (status, reason) or None, and versions
    that have no files (PEP 700)."""
    files: tuple
    status: tuple | None = None
    versions: tuple = ()


PROJECT_STATUSES = ("active", "archived", "quarantined", "deprecated")


def parse_simple_page(project, url, body, is_json):
    """An upstream page (bytes) as an `UpstreamPage`; UpstreamTrouble if it is no simple page (PEP 503, 691, 700)."""
    try:
        return _parse_json_page(project, url, body) if is_json else _parse_html_page(project, url, body)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UpstreamTrouble(f"{public_url(url)}: not a simple page: {reason_of(error)}") from error


def _parse_json_page(project, url, body):
    page = json.loads(body)
    check_api_version(page["meta"]["api-version"])
    files = {}
    for entry in page["files"]:
        try:
            file = _json_file(url, entry)
        except (ValueError, TypeError, KeyError, AttributeError):
            file = None
        if file is None:
            log.info("%s lists an unusable file: %s", public_url(url), one_line(repr(entry), 200))
        else:
            files.setdefault(file.filename, file)
    known = {version_of_file(filename, project) for filename in files}
    versions = tuple(v for v in page.get("versions") or () if isinstance(v, str) and 0 < len(v) <= 200 and v.isprintable())
    status = page.get("project-status") or page["meta"].get("project-status") or {}
    if isinstance(status, str):
        status = {"status": status, "reason": page["meta"].get("project-status-reason")}
    return UpstreamPage(tuple(files.values()), _sound_status(status.get("status"), status.get("reason")),
                        tuple(v for v in versions if v not in known))


def _json_file(url, entry):
    """The file that a page's entry describes, None if it is unusable (PEP 691, 700)."""
    file_url = joined_url(url, entry["url"])
    filename = entry["filename"]
    if file_url is None or not isinstance(filename, str) or not is_safe_filename(filename):
        return None
    size, yanked = entry.get("size"), entry.get("yanked", False)
    metadata = entry.get("core-metadata")
    if metadata is None:
        metadata = entry.get("dist-info-metadata")
    return UpstreamFile(
        filename, file_url, best_hash(entry.get("hashes") or {}),
        size=size if isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 60 else None,
        uploaded=_sound_time(entry.get("upload-time")),
        requires_python=_sound_text(entry.get("requires-python")) or None,
        yanked=None if yanked is False or yanked is None else _sound_text(yanked),
        core_metadata=_offered_metadata(metadata), provenance=_sound_link(entry.get("provenance")))


_TAG = re.compile(r"<(a|base|meta)(?=[\s>/])", re.IGNORECASE)
_ATTRIBUTE = re.compile(r"""[\s/]*(?:(?P<end>>)|([^\s=<>"'/]+)(?:\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'<>]+)))?)""")


def _tags(text):
    """The anchors, bases and metas of a page as (name, {attribute: value}).

    By regular expression, tens of times faster than `html.parser`, and linear: a tag that is damaged ends the reading."""
    position = 0
    while True:
        tag = _TAG.search(text, position)
        if tag is None:
            return
        attributes, position = {}, tag.end()
        while True:
            match = _ATTRIBUTE.match(text, position)
            if match is None:
                raise ValueError(f"damaged tag {text[tag.start():tag.start() + 60]!r}")
            position = match.end()
            if match["end"]:
                break
            name, *values = match.group(2, 3, 4, 5)
            attributes.setdefault(name.lower(), html.unescape(next(filter(None, values), "")))
        yield tag[1].lower(), attributes


def _parse_html_page(project, url, body):
    """A page in the HTML form (PEP 503, 592, 658, 714, 740, 792)."""
    text = body.decode("utf-8", "replace")
    if text.strip() and not re.search(r"<(!doctype html|html|head|body|a)\b", text[:10000], re.IGNORECASE):
        raise ValueError("no HTML")
    files, base, meta = {}, url, {}
    for tag, attributes in _tags(text):
        if tag == "base" and attributes.get("href"):
            base = joined_url(url, attributes["href"]) or url
        elif tag == "meta":
            meta[attributes.get("name", "").lower()] = attributes.get("content", "")
        elif tag == "a" and attributes.get("href"):
            file = _html_file(project, base, attributes)
            if file and (file.filename not in files or file.hash_spec and not files[file.filename].hash_spec):
                files[file.filename] = file
    check_api_version(meta.get("pypi:repository-version", "1.0"))
    return UpstreamPage(tuple(files.values()), _sound_status(meta.get("pypi:project-status"),
                                                             meta.get("pypi:project-status-reason")))


def _html_file(project, base, attributes):
    """The file that an anchor links to, or None if it links to something else (http-api 14.6)."""
    link, _, fragment = attributes["href"].partition("#")
    url = joined_url(base, link)
    if url is None:
        return None
    filename = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
    stem, extension = strip_archive_extension(filename)
    if not extension or not normalize(stem).startswith(project) or not is_safe_filename(filename):
        return None
    algorithm, _, digest = fragment.partition("=")
    metadata = attributes.get("data-core-metadata", attributes.get("data-dist-info-metadata"))
    if metadata is not None:
        name, _, value = metadata.partition("=")
        metadata = {name: value} if value else True
    return UpstreamFile(
        filename, url, best_hash({algorithm: digest}),
        requires_python=_sound_text(attributes.get("data-requires-python")) or None,
        yanked=_sound_text(attributes["data-yanked"]) if "data-yanked" in attributes else None,
        core_metadata=_offered_metadata(metadata), provenance=_sound_link(attributes.get("data-provenance")))


def check_api_version(text):
    """Refuse a page of another major version than 1 (PEP 629)."""
    if not re.fullmatch(r"1\.[0-9]{1,5}", text):
        raise ValueError(f"API version {text[:20]!r}, expected 1.x")


def _sound_text(value):
    """Upstream's text without control characters; "" for what is no text (`true` means: without a reason)."""
    return re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]+", " ", value).strip()[:2000] if isinstance(value, str) else ""


def _sound_time(value):
    """An ISO time if `value` is one, normalised to microseconds; else ""."""
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z", value):
        with contextlib.suppress(ValueError, OverflowError, OSError):
            return iso_time(seconds_of(value))
    return ""


def _sound_link(value):
    return value if isinstance(value, str) and re.fullmatch(r"https://[!-;=?-~]{1,2000}", value) else None


def _sound_status(status, reason):
    return (status, _sound_text(reason)) if status in PROJECT_STATUSES and status != "active" else None


def _offered_metadata(value):
    if isinstance(value, dict):
        digest = value.get("sha256")
        return digest.lower() if isinstance(digest, str) and is_digest("sha256", digest) else "true" if value else None
    return "true" if value is True else None


def is_json_page(content_type, body):
    """Whether a page is JSON: by its type, but a list or page that starts with `{` is JSON whatever was said."""
    return body[:100].lstrip()[:1] == b"{" or "json" in content_type.partition(";")[0]


def read_page(response, limit, deadline):
    """The body of a page, unzipped; UpstreamTrouble if it is too large or takes past `deadline` (time.monotonic())."""
    pieces, size = [], 0
    unzip = zlib.decompressobj(31) if response.header("Content-Encoding").strip().lower() == "gzip" else None
    while True:
        piece = response.read(64 << 10)
        if not piece:
            break
        try:
            data = unzip.decompress(piece, limit - size + 1) if unzip else piece
        except zlib.error as error:
            raise UpstreamTrouble(f"{public_url(response.url)}: damaged gzip: {error}") from error
        pieces.append(data)
        size += len(data)
        if size > limit:
            raise UpstreamTrouble(f"{public_url(response.url)}: the page is larger than {limit} bytes")
        if time.monotonic() > deadline:
            raise UpstreamTrouble(f"{public_url(response.url)}: the page takes too long")
        if unzip and unzip.eof:
            break
    expected = response.length()
    if expected is not None and not unzip and size != expected or unzip and not unzip.eof:
        raise UpstreamTrouble(f"{public_url(response.url)}: the page ended early")
    return b"".join(pieces)


# ======================================================================================================================
# 8  Projects
#
# What an index has to offer of a project.  A stage answers from the database; a mirror from its last good copy of
# upstream's page, refreshed when it is old; an index with bases merges what they answer.  A private name shuts out
# the same name on mirrors, and trouble upstream never turns into "no such project".
# ======================================================================================================================


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
    first_seen: int                 # 1: `uploaded` is only when we saw it first
    requires_python: str | None
    yanked: str | None              # None: not yanked; "": without a reason
    core_metadata: str | None       # None: not offered; "true"; or the SHA-256 of the metadata file
    metadata_sha256: str | None     # the blob of the metadata file, once it is here
    provenance: str | None
    url: str | None                 # upstream's, without credentials
    last_modified: str | None       # upstream's HTTP-date
    history: str | None             # JSON list of devpi's log entries

    @property
    def hashes(self):
        """{algorithm: hex} of all that is known, the announced one first."""
        algorithm, _, digest = self.hash_spec.partition("=")
        hashes = {algorithm: digest} if digest else {}
        if self.sha256:
            hashes.setdefault("sha256", self.sha256)
        return hashes


_FILE_COLUMNS = ", ".join("files." + field for field in File._fields)


@dataclasses.dataclass(frozen=True)
class ProjectPage:
    """What an index has to offer of a project: the files of each index that knows it, first index first.

    `expires`: time.monotonic() after which upstream must be asked again; `stale`: upstream failed and this is its last
    good answer; `blocked`: the mirror that a private name shuts out."""
    name: str
    parts: tuple = ()               # ((Index, (File, ...)), ...): the indexes that know the project
    versions: tuple = ()            # of releases, with or without files
    stale: bool = False
    expires: float = 0
    upstream_serial: int | None = None
    status: tuple | None = None     # (status, reason), PEP 792
    blocked: Index | None = None

    @property
    def known(self):
        return bool(self.parts)

    @property
    def files(self):
        return [file for _, files in self.parts for file in files]


class Contributions(typing.NamedTuple):
    """What the indexes of a resolution order say of a project, before it is merged."""
    pages: list
    blocked: Index | None
    trouble: UpstreamTrouble | None
    expires: float              # of the answer as a whole, "not found" included; 0: never


class MirrorBlocking:
    """The rule that a private name is private (http-api 6.2): fed with the stages of the order, it says whether mirrors
    may still be asked for the project."""

    def __init__(self, project, requested):
        self.project = project
        self.union = requested.config.get("mirror_whitelist_inheritance", "union") == "union"
        self.whitelist = None
        self.hit = self.allowed = False

    def saw_stage(self, index, has_project):
        own = set(index.config.get("mirror_whitelist", ()))
        if self.whitelist is None:
            self.whitelist = own
        elif self.union:
            self.whitelist = self.whitelist | own
        else:
            self.whitelist = self.whitelist & own
        if "*" in self.whitelist or self.project in self.whitelist:
            self.allowed = True
        elif has_project:
            self.hit = True

    @property
    def blocks(self):
        return self.hit and not self.allowed


class Projects:
    """The projects of all indexes; composes stages and mirrors into an index with its bases."""

    def __init__(self, store, indexes, mirrors):
        self.store, self.indexes, self.mirrors = store, indexes, mirrors

    def own(self, index, name, deadline=None):
        """The page of this index alone.  UpstreamTrouble if a mirror has nothing to show and upstream fails."""
        return self.mirrors.project(index, name, deadline) if index.is_mirror else self.stage_project(index, name)

    def stage_project(self, index, name):
        """A stage's page: three indexed queries, however many releases there are."""
        with self.store.read() as db:
            row = db.execute("SELECT id FROM projects WHERE index_id = ? AND name = ?", (index.id, name)).fetchone()
            if row is None:
                return ProjectPage(name)
            files = tuple(map(File._make, db.execute(
                f"SELECT {_FILE_COLUMNS} FROM files WHERE project_id = ? ORDER BY id", (row["id"],))))
            versions = tuple(r["version"] for r in db.execute(
                "SELECT version FROM releases WHERE project_id = ? ORDER BY id", (row["id"],)))
        return ProjectPage(name, ((index, files),), versions)

    def contributions(self, index, name):
        """What each index of the resolution order has to offer, as `Contributions`.

        A mirror that a private name shuts out is not asked; one that fails is `trouble`, an UpstreamTrouble, which is
        raised if nobody else knows the project."""
        blocking = MirrorBlocking(name, index)
        pages, blocked, trouble, expires = [], None, None, []
        order, deadline = self.indexes.order(index), None
        for member in order:
            if member.is_mirror and blocking.blocks:
                blocked = blocked or member
                continue
            if member.is_mirror and deadline is None:
                deadline = self._ask_mirrors(order, name)
            try:
                page = self.own(member, name, deadline)
            except UpstreamTrouble as error:
                trouble = error
                continue
            if not member.is_mirror:
                blocking.saw_stage(member, page.known)
            if page.expires:
                expires.append(page.expires)
            if page.known:
                pages.append(page)
        if trouble and not pages:
            raise trouble
        return Contributions(pages, blocked, trouble, min(expires, default=0))

    def _ask_mirrors(self, order, name):
        """Have all mirrors of an order asked at once; returns the time.monotonic() until which the request waits for them."""
        mirrors = [member for member in order if member.is_mirror]
        for mirror in mirrors if len(mirrors) > 1 else ():
            with contextlib.suppress(UpstreamTrouble, Busy):        # told when its turn comes
                self.mirrors.ask(mirror, name)
        return time.monotonic() + self.mirrors.settings.request_timeout

    def page(self, index, name):
        """The page of an index with its bases: merged, the first index with a file name wins (http-api 6.3).

        A mirror that fails is passed over if the project is known elsewhere, else its UpstreamTrouble is raised."""
        found = self.contributions(index, name)
        if len(found.pages) == 1:
            only = found.pages[0]
            return dataclasses.replace(only, blocked=found.blocked, stale=only.stale or bool(found.trouble),
                                       expires=found.expires)
        parts, seen = [], set()
        for page in found.pages:
            for origin, files in page.parts:
                parts.append((origin, tuple(f for f in files if f.filename not in seen)))
                seen.update(f.filename for f in files)
        return ProjectPage(
            name, tuple(parts), tuple(dict.fromkeys(v for page in found.pages for v in page.versions)),
            blocked=found.blocked, stale=bool(found.trouble) or any(page.stale for page in found.pages),
            expires=found.expires)

    def tags(self, index, name):
        """What an answer about this project depends on (see `Freshness`)."""
        return frozenset(project_tag(member.id, name) for member in self.indexes.order(index))

    def names(self, index):
        """The names that this index alone knows: a sorted list, or a `MirrorNames`."""
        if index.is_mirror:
            return self.mirrors.names(index)
        with self.store.read() as db:
            return [row["name"] for row in
                    db.execute("SELECT name FROM projects WHERE index_id = ? ORDER BY name", (index.id,))]

    def file(self, index, path):
        """(File, project name, project status) of the file at `path` below an index; Gone or NotFound."""
        with self.store.read() as db:
            row = db.execute(f"SELECT {_FILE_COLUMNS}, projects.name AS project, projects.status FROM files "
                             "JOIN projects ON projects.id = project_id WHERE files.index_id = ? AND path = ?",
                             (index.id, path)).fetchone()
        if row is None:
            self.refuse_gone(f"{index.path}/{path}")
            raise NotFound("no such file")
        status = tuple(json.loads(row["status"])) if row["status"] else None
        return File._make(tuple(row)[:-2]), row["project"], status

    def refuse_gone(self, path):
        """Gone if user/index/+f/... once was a file."""
        with self.store.read() as db:
            if db.execute("SELECT 1 FROM gone WHERE path = ?", (path,)).fetchone():
                raise Gone("file existed, deleted in later serial")


class Mirrors:
    """Caching mirrors: pages, metadata files, files and project lists of upstream indexes, one fetch at a time for one
    thing, and the last good answer where upstream fails."""

    def __init__(self, store, blobs, client, settings):
        self.store, self.blobs, self.client, self.settings = store, blobs, client, settings
        self.fetches = SingleFlight("fetch", Limits.fetches, Limits.fetches_of_one)
        self.downloads = SingleFlight("download", Limits.downloads, Limits.downloads_of_one)
        self.not_found = collections.OrderedDict()      # (index id, mirror_url, project) -> until
        self.lock = threading.Lock()
        self.cache = os.path.join(os.path.dirname(blobs.files), "cache")
        os.makedirs(self.cache, mode=0o700, exist_ok=True)

    # -- pages

    def expiry(self, index):
        """Seconds for which what upstream said is not asked again."""
        return index.config.get("mirror_cache_expiry", self.settings.mirror_cache_expiry)

    def ask(self, index, name):
        """(what is known of a project without asking upstream, or None; the flight that asks, if that is due)."""
        if len(name) > 200:
            return ProjectPage(name), None      # no index has such a name, and "not found" need not be remembered
        page = self.cached(index, name)
        if self.settings.offline_mode:
            return self._local_only(index, page), None
        if page and page.expires > time.monotonic():
            return page, None
        missing_until = self.not_found.get((index.id, index.config["mirror_url"], name), 0)
        if page is None and missing_until > time.monotonic():
            return ProjectPage(name, expires=missing_until), None
        if page and self.client.is_paused(index.config["mirror_url"]):
            return dataclasses.replace(page, stale=True), None
        return page, self._start(index, "page", name, functools.partial(self._fetch_page, index, name))

    def project(self, index, name, deadline=None):
        """The page of a project (http-api 14.2).

        A request waits for `request_timeout`, or until `deadline` (time.monotonic()); the fetch goes on behind it."""
        page, flight = self.ask(index, name)
        if flight is None:
            return page
        trouble = UpstreamTrouble(f"{public_url(index.config['mirror_url'])} did not answer for {name} "
                                  f"within {self.settings.request_timeout:g} seconds")
        if flight.wait(self.settings.request_timeout if deadline is None else max(0, deadline - time.monotonic())):
            trouble = flight.error
        page = self.cached(index, name)
        if trouble is None:
            return page or ProjectPage(name, expires=time.monotonic() + self.expiry(index))
        log.warning("mirror %s: %s", index.path, trouble.message)
        if page is None:
            raise trouble
        return dataclasses.replace(page, stale=True)

    def _start(self, index, what, name, function):
        """The flight that fetches this from the mirror's upstream, which may be under way already."""
        url = index.config["mirror_url"]
        return self.fetches.start((what, index.id, url, name), origin_of(url), Flight(function))

    def refresh(self, index, name):
        """Ask upstream for a project's page now; if that fails, the old one stays (devpi: POST .../refresh)."""
        if self.settings.offline_mode:
            return
        with self.lock:
            self.not_found.pop((index.id, index.config["mirror_url"], name), None)
        flight = self._start(index, "page", name, functools.partial(self._fetch_page, index, name, True))
        if flight.wait(self.settings.request_timeout) and flight.error:
            log.warning("mirror %s: %s", index.path, flight.error.message)

    def cached(self, index, name):
        """What upstream said last, or None if it was never asked or never knew the project."""
        with self.store.read() as db:
            row = db.execute("SELECT * FROM projects WHERE index_id = ? AND name = ?", (index.id, name)).fetchone()
            if row is None or row["fetched"] is None:
                return None
            files = tuple(map(File._make, db.execute(
                f"SELECT {_FILE_COLUMNS} FROM files WHERE project_id = ? AND position IS NOT NULL ORDER BY position",
                (row["id"],))))
        status = tuple(json.loads(row["status"])) if row["status"] else None
        if status and status[0] == "quarantined":
            files = ()
        age = time.time() - row["fetched"]
        fresh_for = self.expiry(index) - age if age > -60 else 0       # a clock that was set back
        return ProjectPage(
            name, ((index, files),), tuple(json.loads(row["versions"] or "[]")),
            expires=time.monotonic() + fresh_for, upstream_serial=row["upstream_serial"], status=status)

    def _local_only(self, index, page):
        """In offline mode: the files that are here, their metadata offered where it is here too."""
        if page is None:
            raise UpstreamTrouble("offline mode: upstream is not asked, and nothing of this project is here")
        files = tuple(f if f.metadata_sha256 else f._replace(core_metadata=None)
                      for f in page.files if self.is_local(f))
        return dataclasses.replace(page, parts=((index, files),), expires=0)

    def _fetch_page(self, index, name, unconditionally=False):
        mirror_url = index.config["mirror_url"]
        with self.store.read() as db:
            row = db.execute("SELECT * FROM projects WHERE index_id = ? AND name = ?", (index.id, name)).fetchone()
        headers = {"Accept": f"{SIMPLE_HTML};q=0.2, {SIMPLE_JSON}, text/html;q=0.01", "Accept-Encoding": "gzip",
                   "User-Agent": user_agent()}
        if row and row["etag"] and not unconditionally:
            headers["If-None-Match"] = row["etag"]
        deadline = time.monotonic() + Limits.upstream_page_time
        with self.client.get(f"{mirror_url.rstrip('/')}/{name}/", headers) as response:
            if response.status not in (200, 304, 404) or response.status == 304 and "If-None-Match" not in headers:
                raise UpstreamTrouble(f"{public_url(response.url)} answered {response.status}")
            body = read_page(response, Limits.upstream_page, deadline)
        if response.status == 404:
            return self._remember_missing(index, name, row)
        serial = response.header("X-PyPI-Last-Serial")
        serial = int(serial) if re.fullmatch(r"[0-9]{1,18}", serial) else None
        origin = "%s://%s:%d" % origin_of(response.url)
        if row and serial is not None and row["upstream"] == origin and serial < (row["upstream_serial"] or 0) \
                and not index.config.get("mirror_ignore_serial_header"):
            raise UpstreamTrouble(f"{public_url(response.url)} answered with serial {serial}, "
                                  f"older than {row['upstream_serial']} that it gave before")
        if response.status == 304:
            return self.store.write(_page_checked, index, name, durable=False)
        page = parse_simple_page(name, response.url, body, is_json_page(response.header("Content-Type"), body))
        self.store.write(_store_page, index, name, page, response.header("ETag")[:1000], origin, serial, durable=False)

    def _remember_missing(self, index, name, row):
        """Upstream has no such project; links that it once gave are kept (http-api 14.2)."""
        if row and row["fetched"] is not None:
            return self.store.write(_page_checked, index, name, durable=False)
        with self.lock:
            self.not_found[index.id, index.config["mirror_url"], name] = time.monotonic() + self.expiry(index)
            while len(self.not_found) > Limits.missing_projects:
                self.not_found.popitem(last=False)

    # -- files

    def is_local(self, file):
        return bool(file.sha256) and self.blobs.has(file.sha256, file.size)

    def local(self, index, file):
        """The file with its blob at hand, or None.  Bytes that another index holds already count."""
        if self.is_local(file):
            return file
        algorithm, _, digest = file.hash_spec.partition("=")
        if algorithm != "sha256":
            return None
        with self.store.read() as db:
            row = db.execute("SELECT sha256, size FROM files WHERE sha256 = ? LIMIT 1", (digest,)).fetchone()
        if row is None or not self.blobs.has(digest, row["size"]) or not self.blobs.claim(digest):
            return None
        metadata = None if file.core_metadata else self._metadata_of_blob(file, digest)
        self.store.write(_file_arrived, index, file, digest, row["size"], None, metadata, durable=False)
        return file._replace(sha256=digest, size=row["size"], last_modified=http_date(time.time()))

    def download(self, index, file):
        """The `Download` under way of a file that is not here; its head has arrived.  UpstreamTrouble, NotFound."""
        if self.settings.offline_mode:
            raise UpstreamTrouble(f"offline mode: {file.filename} is not here")
        key = file.hash_spec if file.hash_spec.startswith("sha256=") else (index.id, file.path)
        download = self.downloads.start(key, origin_of(file.url), Download(self, index, file))
        with outside_wait():
            download.started.wait(Limits.longest_queue)
            begun = download.begun.wait(self.settings.request_timeout)
        if not begun:
            raise UpstreamTrouble(f"{public_url(file.url)} did not answer within "
                                  f"{self.settings.request_timeout:g} seconds")
        if download.error and not download.finished:
            raise download.error
        return download

    def upstream_url(self, index, file):
        """The file's URL, with the mirror's credentials where it lies on the mirror's own host."""
        mirror = urllib.parse.urlsplit(index.config["mirror_url"])
        if mirror.username is None or origin_of(file.url) != origin_of(index.config["mirror_url"]):
            return file.url
        parts = urllib.parse.urlsplit(file.url)
        return urllib.parse.urlunsplit(parts._replace(netloc=f"{mirror.netloc.rpartition('@')[0]}@{parts.netloc}"))

    def upstream_size(self, index, file):
        """The size that upstream states for a file that is not here, or None."""
        sizes = []

        def ask():
            with self._get_file(index, file, "", "HEAD") as head:
                sizes.append(head.length())
        flight = self._start(index, "size", file.path, ask)
        if not flight.wait(self.settings.request_timeout):
            raise UpstreamTrouble(f"{public_url(file.url)} did not answer within {self.settings.request_timeout:g} seconds")
        if flight.error:
            raise flight.error
        return sizes[0] if sizes else None      # None: it was somebody else's flight

    def _get_file(self, index, file, ending="", method="GET"):
        """Upstream's answer with a file, or with what lies beside it; NotFound or UpstreamTrouble unless that is 200."""
        url = self.upstream_url(index, file) + ending
        response = self.client.get(url, {"User-Agent": user_agent(), "Accept-Encoding": "identity"}, method)
        if response.status == 200:
            return response
        response.close()
        raise (NotFound if response.status == 404 else UpstreamTrouble)(
            f"error {response.status} getting {public_url(url)}")

    def metadata_blob(self, index, file):
        """The SHA-256 of the blob with the metadata file of a mirrored wheel (PEP 658); NotFound if there is none.

        Fetched from upstream and checked against the announced hash, or read out of the wheel if that is here."""
        if file.metadata_sha256 and self.blobs.has(file.metadata_sha256):
            return file.metadata_sha256
        if self.is_local(file):
            found = self._metadata_of_blob(file, file.sha256)
            if found:
                self.store.write(_metadata_arrived, index, file, found, durable=False)
                return found
        if not file.core_metadata:
            raise NotFound(f"no metadata found in {index.path}/{file.path}")
        found = []
        flight = self._start(index, "metadata", file.path, lambda: found.append(self._fetch_metadata(index, file)))
        if not flight.wait(self.settings.request_timeout):
            raise UpstreamTrouble(f"{public_url(file.url)}.metadata did not arrive in time")
        if flight.error:
            raise flight.error
        if found:
            return found[0]
        with self.store.read() as db:       # somebody else's flight
            row = db.execute("SELECT metadata_sha256 FROM files WHERE id = ?", (file.id,)).fetchone()
        if row is None or not row["metadata_sha256"]:
            raise NotFound(f"no metadata found in {index.path}/{file.path}")
        return row["metadata_sha256"]

    def _fetch_metadata(self, index, file):
        with self._get_file(index, file, ".metadata") as response:
            data = read_page(response, Limits.metadata_file, time.monotonic() + Limits.upstream_page_time)
        digest = hashlib.sha256(data).hexdigest()
        if file.core_metadata not in ("true", digest):
            raise UpstreamTrouble(f"{public_url(file.url)}.metadata has SHA-256 {digest}, announced was {file.core_metadata}")
        self.blobs.add(data)
        self.store.write(_metadata_arrived, index, file, digest, durable=False)
        return digest

    def _metadata_of_blob(self, file, sha256):
        """Keep the METADATA of a wheel that is here, unless upstream announced another; its SHA-256 or None."""
        if not file.filename.endswith(".whl"):
            return None
        try:
            with self.blobs.open(sha256) as blob:
                data = archive_metadata(blob, file.filename)
        except Problem as error:
            log.warning("mirrored file: %s", error.message)
            return None
        if data is None or file.core_metadata not in (None, "true", hashlib.sha256(data).hexdigest()):
            return None
        return self.blobs.add(data)

    # -- project lists

    def names(self, index):
        """All names that upstream has, as `MirrorNames`; the known ones as a list where it offers none (http-api 14.3)."""
        if self.settings.offline_mode or index.config.get("mirror_no_project_list"):
            return self.cached_names(index)
        names = MirrorNames.load(self.cache, index)
        if names and 0 <= time.time() - names.fetched < self.expiry(index):
            return names
        if names and self.client.is_paused(index.config["mirror_url"]):
            return names
        flight = self._start(index, "names", "", functools.partial(self._fetch_names, index, names))
        patience = self.settings.request_timeout if names else max(30, self.settings.request_timeout)
        if flight.wait(patience) and flight.error is None:
            names = MirrorNames.load(self.cache, index)
        elif flight.error:
            log.warning("mirror %s: %s", index.path, flight.error.message)
        if names:
            return names
        cached = self.cached_names(index)
        if not cached:
            raise flight.error or UpstreamTrouble(f"the project list of {public_url(index.config['mirror_url'])} is on its "
                                                  "way, try again in a minute")
        return cached

    def cached_names(self, index):
        """The projects whose pages are kept here."""
        with self.store.read() as db:
            return [row["name"] for row in db.execute(
                "SELECT name FROM projects WHERE index_id = ? AND fetched IS NOT NULL ORDER BY name", (index.id,))]

    def _fetch_names(self, index, old):
        """Have a child process fetch, parse and write the list: one busy thread here would slow every answer."""
        job = {"url": index.config["mirror_url"].rstrip("/") + "/", "folder": tempfile.mkdtemp(dir=self.blobs.tmp),
               "etag": old.etag if old else "", "timeout": max(30, self.settings.request_timeout)}
        try:
            child = subprocess.run([sys.executable, os.path.abspath(__file__), "_fetch-names"], text=True,
                                   input=json.dumps(job), capture_output=True, timeout=Limits.upstream_list_time)
            if child.returncode != 0:
                raise UpstreamTrouble(f"{public_url(job['url'])}: {one_line(child.stderr.strip()[-300:])}")
            MirrorNames.install(self.cache, index, job["folder"], json.loads(child.stdout))
        except subprocess.TimeoutExpired:
            raise UpstreamTrouble(f"{public_url(job['url'])}: the list took over "
                                  f"{Limits.upstream_list_time} seconds") from None
        finally:
            shutil.rmtree(job["folder"], ignore_errors=True)
        self.store.freshness.touch(frozenset((names_tag(index.id),)))


def user_agent():
    return f"devpi-server/{PROTOCOL_VERSION} (devpi_lite {__version__})"


def _current_mirror(change, index):
    """Whether the index still mirrors what it did when the fetch began."""
    row = change.execute("SELECT config FROM indexes WHERE id = ?", (index.id,)).fetchone()
    return row is not None and json.loads(row["config"]).get("mirror_url") == index.config["mirror_url"]


def _page_checked(change, index, name):
    """Upstream says that nothing changed."""
    if _current_mirror(change, index):
        change.execute("UPDATE projects SET fetched = ? WHERE index_id = ? AND name = ?", (time.time(), index.id, name))


def _store_page(change, index, name, page, etag, origin, serial):
    """Keep what upstream lists now.  Files that it no longer lists lose their place on the page, not their path."""
    if not _current_mirror(change, index):
        return
    status = json.dumps(page.status) if page.status else None
    row = change.execute("SELECT id FROM projects WHERE index_id = ? AND name = ?", (index.id, name)).fetchone()
    if row is None:
        project_id = change.execute("INSERT INTO projects (index_id, name) VALUES (?, ?)", (index.id, name)).lastrowid
        change.touch(names_tag(index.id))
    else:
        project_id = row["id"]
    change.execute("UPDATE projects SET fetched = ?, etag = ?, upstream = ?, upstream_serial = coalesce(?, "
                   "CASE WHEN upstream = ? THEN upstream_serial END), status = ?, versions = ? WHERE id = ?",
                   (time.time(), etag or None, origin, serial, origin, status, json.dumps(page.versions), project_id))
    old = {file.path: file for file in map(File._make, change.execute(
        f"SELECT {_FILE_COLUMNS} FROM files WHERE project_id = ?", (project_id,)))}
    now = iso_time(time.time())
    for position, new in enumerate(page.files):
        path = file_path(new.hash_spec, new.filename) if new.hash_spec else hashless_path(new.url, new.filename)
        before = old.pop(path, None)
        if before is None:
            _insert_mirror_file(change, index, project_id, name, position, path, new, now)
        else:
            _update_mirror_file(change, before, position, new)
    listed = {new.filename for new in page.files}
    for file in old.values():
        if file.position is not None:
            change.execute("UPDATE files SET position = NULL WHERE id = ?", (file.id,))
            if file.filename in listed:
                log.warning("mirror %s: upstream changed the bytes of %s", index.path, one_line(file.filename))
    change.touch(project_tag(index.id, name))


def _insert_mirror_file(change, index, project_id, name, position, path, new, now):
    change.execute(
        "INSERT INTO files (index_id, project_id, position, version, filename, path, hash_spec, size, uploaded, first_seen, "
        "requires_python, yanked, core_metadata, provenance, url) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT DO NOTHING",       # a path that upstream lists under two projects stays with the first
        (index.id, project_id, position, version_of_file(new.filename, name), new.filename, path, new.hash_spec, new.size,
         new.uploaded or now, not new.uploaded, new.requires_python, new.yanked, new.core_metadata, new.provenance, new.url))
    change.execute("DELETE FROM gone WHERE path = ?", (f"{index.path}/{path}",))


def _update_mirror_file(change, before, position, new):
    after = before._replace(position=position, requires_python=new.requires_python, yanked=new.yanked, url=new.url,
                            provenance=new.provenance, size=new.size if new.size is not None else before.size,
                            core_metadata=new.core_metadata or before.metadata_sha256)
    if new.uploaded:
        after = after._replace(uploaded=new.uploaded, first_seen=0)
    if new.hash_spec != before.hash_spec:
        after = after._replace(hash_spec=new.hash_spec, sha256=None, metadata_sha256=None)
    if after.metadata_sha256 and after.core_metadata not in ("true", after.metadata_sha256):
        after = after._replace(metadata_sha256=None)
    if after != before:
        change.execute(f"UPDATE files SET ({', '.join(File._fields)}) = ({', '.join('?' * len(File._fields))}) "
                       "WHERE id = ?", (*after, before.id))


def _file_arrived(change, index, file, sha256, size, last_modified, metadata):
    """The bytes of a mirrored file are here: enter what is known now and was not before."""
    uploaded, first_seen = file.uploaded, file.first_seen
    if first_seen and last_modified:
        with contextlib.suppress(ValueError, TypeError, OverflowError):     # upstream's header may be anything
            moment = email.utils.parsedate_to_datetime(last_modified).timestamp()
            if moment < seconds_of(uploaded):
                uploaded, first_seen = iso_time(moment), 0
    change.execute(
        "UPDATE files SET sha256 = ?, size = ?, last_modified = ?, uploaded = ?, first_seen = ?, "
        "core_metadata = coalesce(core_metadata, ?), metadata_sha256 = coalesce(?, metadata_sha256) "
        "WHERE index_id = ? AND path = ?",
        (sha256, size, last_modified or http_date(time.time()), uploaded, first_seen, metadata, metadata,
         index.id, file.path))
    _touch_project_of(change, file)


def _metadata_arrived(change, index, file, sha256):
    change.execute("UPDATE files SET metadata_sha256 = ?, core_metadata = coalesce(core_metadata, ?) WHERE index_id = ? "
                   "AND path = ?", (sha256, sha256, index.id, file.path))
    _touch_project_of(change, file)


def _touch_project_of(change, file):
    row = change.execute("SELECT name FROM projects WHERE id = ?", (file.project_id,)).fetchone()
    if row:
        change.touch(project_tag(file.index_id, row["name"]))


class Download(Flight):
    """A file on its way from upstream to disk, which any number of askers may read as it grows.

    The newest piece is held back until length and hash have been checked, so nobody ever gets a wrong file whole."""

    def __init__(self, mirrors, index, file):
        super().__init__(self._fetch)
        self.mirrors, self.index, self.file = mirrors, index, file
        self.started = threading.Event()    # upstream is being asked
        self.begun = threading.Event()      # its head is here, or the end
        self.grown = threading.Condition()
        self.available = 0                  # bytes that may be sent
        self.finished = False               # checked, kept, entered, and all of it available
        self.length = None                  # if upstream said it
        self.last_modified = ""
        self.opened = None                  # path of the growing file
        self.sha256 = None                  # set once all is checked

    def run(self):
        self.started.set()
        super().run()
        with self.grown:
            self.begun.set()
            self.grown.notify_all()

    def _fetch(self):
        file, mirrors = self.file, self.mirrors
        with mirrors._get_file(self.index, file) as response:
            self.length = response.length()
            self._check_announced()
            self.last_modified = one_line(response.header("Last-Modified"), 100)
            with mirrors.blobs.incoming() as incoming:
                self.opened = incoming.path
                check = hashlib.new(file.hash_spec.partition("=")[0]) if file.hash_spec else hashlib.sha256()
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
        metadata = None if file.core_metadata else mirrors._metadata_of_blob(file, self.sha256)
        mirrors.store.write(_file_arrived, self.index, file, self.sha256, incoming.size, self.last_modified, metadata,
                            durable=False)
        self._grow(incoming.size, finished=True)

    @property
    def _expected(self):
        """The size that was announced, or None."""
        return self.length if self.length is not None else self.file.size

    def _check_announced(self):
        """Refuse what can't turn out right, before anything is sent on."""
        if None not in (self.length, self.file.size) and self.length != self.file.size:
            raise UpstreamTrouble(f"{public_url(self.file.url)} has {self.length} bytes, announced were {self.file.size}")
        if (self._expected or 0) > shutil.disk_usage(self.mirrors.blobs.tmp).free:
            raise NoSpace(f"{self.file.filename} has {self._expected} bytes, more than this server's disk has free")

    def _check_pace(self, size):
        """Stop what is longer than announced, endless, or hardly moving."""
        if size > (Limits.upstream_file if self._expected is None else self._expected):
            raise UpstreamTrouble(f"{public_url(self.file.url)} gives more than {self._expected or size} bytes")
        spent = time.monotonic() - self.created
        if spent > Limits.stall and size < (spent - Limits.stall) * Limits.slowest_body:
            raise UpstreamTrouble(f"{public_url(self.file.url)} comes too slowly")

    def _check(self, size, check):
        url = self.file.url
        if self._expected not in (None, size):
            raise UpstreamTrouble(f"{public_url(url)} gave {size} bytes, announced were {self._expected}")
        digest = self.file.hash_spec.partition("=")[2]
        if digest and not hmac.compare_digest(check.hexdigest(), digest):
            raise UpstreamTrouble(f"{public_url(url)} has another hash than announced: "
                                  f"{check.name}={check.hexdigest()}, not {self.file.hash_spec}")

    def _grow(self, available, finished=False):
        with self.grown:
            self.available, self.finished = available, finished
            self.grown.notify_all()

    def pieces(self):
        """The file's bytes as they arrive, and once all of it is here the rest as a FilePart.

        Raises what ended the download early."""
        sent = 0
        self._wait_for(0 if os.name != "nt" else float("inf"))     # Windows can't rename a file that is being read
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
        except FileNotFoundError:       # it was renamed since
            if self.sha256 is None:
                raise self.error or UpstreamTrouble("the download broke off") from None
            return self.mirrors.blobs.open(self.sha256)

    def _wait_for(self, sent):
        """Wait until there is more than `sent`, or the end; returns whether it ended."""
        with outside_wait(), self.grown:
            while self.available <= sent and not self.finished and not self.error:
                if not self.grown.wait(Limits.stall):
                    raise UpstreamTrouble("upstream stopped sending")
            return self.finished or bool(self.error)


class MirrorNames:
    """The project list of a mirror, on disk in the forms in which it is asked for; made by a child process.

    Files: `names` (sorted, one a line), and without brackets around them `names.json`, `projects.json`,
    `projects.html`; the last two also as whole pages, gzipped."""

    def __init__(self, folder, facts):
        self.folder = folder
        self.etag, self.fetched, self.count, self.serial = facts["etag"], facts["fetched"], facts["count"], facts["serial"]
        self.before = facts["before"]       # the folder of the list before this one

    @staticmethod
    def _pointer(cache, index):
        return os.path.join(cache, f"names-{index.id}.json")

    @classmethod
    def load(cls, cache, index):
        """The list kept for this index, or None.  The cache may be deleted at any time."""
        try:
            with open(cls._pointer(cache, index), encoding="utf-8") as file:
                facts = json.load(file)
            folder = os.path.join(cache, facts["folder"])
            if facts["url"] == index.config["mirror_url"] and os.path.exists(os.path.join(folder, "names")):
                return cls(folder, facts)
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            log.warning("the cached project list of %s is unusable: %s", index.path, error)
        return None

    @classmethod
    def install(cls, cache, index, folder, facts):
        """Put a list that the child wrote in place of the old one; `facts` without a count mean "not modified"."""
        old = cls.load(cache, index)
        facts.update(url=index.config["mirror_url"], fetched=time.time())
        if facts["count"] is None:
            if old is None:
                raise UpstreamTrouble("upstream said 304 for a list that is not here")
            facts.update(folder=os.path.basename(old.folder), count=old.count, serial=old.serial, etag=old.etag,
                         before=old.before)
        else:
            facts["folder"] = f"names-{index.id}-{secrets.token_hex(4)}"
            facts["before"] = os.path.basename(old.folder) if old else ""
            os.replace(folder, os.path.join(cache, facts["folder"]))
        temporary = cls._pointer(cache, index) + ".tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(facts, file)
        os.replace(temporary, cls._pointer(cache, index))
        if old is not None and old.before and facts["before"] != old.before:
            # the one before is kept: a request may have loaded it and not opened its files yet
            shutil.rmtree(os.path.join(cache, old.before), ignore_errors=True)

    @staticmethod
    def clear_leftovers(cache, index_ids):
        """Remove lists of indexes that are gone, and folders that no list names (a crash, or a file that was open)."""
        named = set()
        for name in os.listdir(cache):
            match = re.fullmatch(r"names-([0-9]+)\.json", name)
            if match and int(match[1]) not in index_ids:
                os.unlink(os.path.join(cache, name))
            elif match:
                with contextlib.suppress(ValueError, KeyError, TypeError), open(os.path.join(cache, name)) as file:
                    facts = json.load(file)
                    named.update((facts["folder"], facts["before"]))
        for name in os.listdir(cache):
            path = os.path.join(cache, name)
            if os.path.isdir(path) and name not in named:
                shutil.rmtree(path, ignore_errors=True)

    def part(self, name):
        """One of the files."""
        return os.path.join(self.folder, name)

    def without(self, names):
        """Those of `names` that the list does not hold."""
        with open(self.part("names"), "rb") as file:
            if self.count == 0:
                return list(names)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
                return [name for name in names if not self._holds(lines, name.encode())]

    @staticmethod
    def _holds(lines, name):
        """Binary search over sorted lines."""
        low, high = 0, len(lines)
        while low < high:
            middle = lines.rfind(b"\n", 0, (low + high) // 2) + 1
            middle = max(middle, low)
            end = lines.find(b"\n", middle)
            line = lines[middle:end]
            if line == name:
                return True
            if line < name:
                low = end + 1
            else:
                high = middle
        return False

    def __iter__(self):
        with open(self.part("names"), encoding="ascii") as file:
            for line in file:
                yield line[:-1]


_LIST_ANCHOR = re.compile(rb"<a(?:\s[^>]{0,2000})?>([^<]{1,300})</a", re.IGNORECASE)
_NORMAL_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
LIST_PAGE = {"projects.json": (f'{{"meta":{{"api-version":"{API_VERSION}"}},"projects":[', ",", "]}"),
             "projects.html": ('<!DOCTYPE html><html lang="en"><head>'
                               f'<meta name="pypi:repository-version" content="{API_VERSION}"><style>a {{ display: block }}'
                               "</style><title>Simple index</title></head><body>\n", "", "</body></html>\n")}


def list_entries(form, names):
    """The entries of a project list in one of its two forms, without what stands around them."""
    if form == "projects.json":
        return ",".join([f'{{"name":"{name}"}}' for name in names])
    return "".join([f'<a href="{name}/">{name}</a>\n' for name in names])


def fetch_names(job):
    """What the child process does: fetch a project list, write its forms into `job["folder"]`, return the facts."""
    client = UpstreamClient(Settings("", request_timeout=job["timeout"]))
    headers = {"Accept": f"{SIMPLE_JSON}, {SIMPLE_HTML};q=0.2, text/html;q=0.01", "Accept-Encoding": "gzip",
               "User-Agent": user_agent()}
    if job["etag"]:
        headers["If-None-Match"] = job["etag"]
    with client.get(job["url"], headers) as response:
        if response.status == 304 and job["etag"]:
            return {"count": None}
        if response.status != 200:
            raise UpstreamTrouble(f"{public_url(job['url'])} answered {response.status}")
        body = read_page(response, Limits.upstream_list, time.monotonic() + Limits.upstream_list_time)
    serial = response.header("X-PyPI-Last-Serial")
    names = parse_names(job["url"], body, is_json_page(response.header("Content-Type"), body))
    with open(os.path.join(job["folder"], "names"), "w", encoding="ascii") as file:
        file.writelines([name + "\n" for name in names])
    with open(os.path.join(job["folder"], "names.json"), "w", encoding="ascii") as file:
        file.write(",".join([f'"{name}"' for name in names]))
    for form, (head, _, tail) in LIST_PAGE.items():
        entries = list_entries(form, names)
        with open(os.path.join(job["folder"], form), "w", encoding="ascii") as file:
            file.write(entries)
        with gzip.GzipFile(os.path.join(job["folder"], form + ".gz"), "wb", 4, mtime=0) as file:
            file.write((head + entries + tail).encode())
    return {"count": len(names), "etag": response.header("ETag")[:1000],
            "serial": int(serial) if re.fullmatch(r"[0-9]{1,18}", serial) else None}


def parse_names(url, body, is_json):
    """The normalised names of a project list (bytes), sorted, each once; UpstreamTrouble if it is none."""
    try:
        if is_json:
            page = json.loads(body)
            check_api_version(page["meta"]["api-version"])
            raw = [entry["name"] for entry in page["projects"]
                   if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
        else:
            if not re.search(rb"<(!doctype html|html|head|body|a)\b", body[:10000], re.IGNORECASE):
                raise ValueError("no HTML")
            raw = html.unescape("\n".join(map(bytes.decode, _LIST_ANCHOR.findall(body)))).split("\n")
        return sorted({name for name in (n if _NORMAL_NAME.fullmatch(n) else normalize(n.strip()).strip("-") for n in raw)
                       if name and len(name) <= 200})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UpstreamTrouble(f"{public_url(url)}: not a project list: {reason_of(error)}") from error


# ======================================================================================================================
# 9  Releases
#
# What people put into stages and take out of indexes.  An upload is checked from its form to the members of its archive
# before anything is stored; then its blob is kept and one change enters project, release and file.
# ======================================================================================================================

# Fields of an upload form that describe the upload, not the release.
_FORM_ONLY = {":action", "protocol_version", "filetype", "pyversion", "md5_digest", "sha256_digest", "blake2_256_digest",
              "gpg_signature", "content"}


def check_form_names(form):
    """The (name, version) of an upload form; BadRequest in devpi's words if they are missing or unfit (http-api 9.2)."""
    for field in ("name", "version"):
        if not form.get(field, [""])[0].strip():
            raise BadRequest(f'invalid metadata: Missing required field "{field}"')
    name, version = form["name"][0], form["version"][0]
    if re.search(r"""[<>%#"/\\\x00-\x20\x7f-\x9f]""", version) or re.search(r'[<>%#"]', name):
        raise BadRequest("invalid metadata: Invalid package name or version (URL safety)")
    for pattern, rule in ((r"[A-Za-z0-9._-]+", "contain only ASCII letters, digits, underscores, hyphens, and periods"),
                          (r"[A-Za-z0-9].*", "start with an ASCII letter or digit"),
                          (r".*[A-Za-z0-9]", "end with an ASCII letter or digit")):
        if not re.fullmatch(pattern, name):
            raise BadRequest(f"invalid metadata: Invalid package name. Names must {rule}")
    if len(name) > 200 or len(version) > 200:
        raise BadRequest("invalid metadata: name and version may have 200 characters at most")
    return name, version


def check_form_filename(filename, name, version):
    """Refuse a file name that is unsafe or does not fit the form's name and version."""
    if not is_safe_filename(filename):
        raise BadRequest(f"{one_line(filename)!r} is not a valid archive name")
    spelled = re.sub(r"[^A-Za-z0-9_.]+", "_", version)
    if version not in filename and spelled not in filename and \
            not same_version(version_of_file(filename, normalize(name)), version):
        raise BadRequest(f"filename '{filename}' does not contain version '{version}'")
    if not re.fullmatch(r".+\.(%s)" % "|".join(map(re.escape, UPLOAD_EXTENSIONS)), filename, re.IGNORECASE):
        raise BadRequest(f"'{filename}' is not a valid archive name")
    if not normalize(filename).startswith(normalize(name)):
        raise BadRequest(f"filename '{filename}' does not match project name '{name}'")


def form_metadata(form):
    """The metadata that an upload form states, in devpi's spelling; other fields are kept under "other"."""
    metadata, other = {}, {}
    for field, values in form.items():
        field = FIELD_SPELLINGS.get(field, field)
        if field in _FORM_ONLY:
            continue
        values = ["" if value == "UNKNOWN" else value for value in values]
        if field in TEXT_FIELDS:
            metadata[field] = values[0]
        elif field in LIST_FIELDS or field in NEWER_LIST_FIELDS:
            metadata[field] = metadata.get(field, []) + [value for value in values if value]
        else:
            other[field] = values
    if other:
        metadata["other"] = other
    return metadata


def with_defaults(metadata):
    """All keys that devpi's JSON shows, absent ones as "" or []."""
    return {**{field: "" for field in TEXT_FIELDS}, **{field: [] for field in LIST_FIELDS}, **metadata}


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
    metadata_sha256: str | None


class Releases:
    """Puts releases into stages, and takes files, releases and projects out of indexes."""

    def __init__(self, store, blobs):
        self.store, self.blobs = store, blobs

    def register(self, index, form, who):
        """devpi: `:action=submit`.  The release's metadata becomes what the form states."""
        name, version = check_form_names(form)
        self.store.write(_register, index, name, version, form_metadata(form), who=who)

    def upload(self, index, form, filename, incoming, who):
        """devpi: `:action=file_upload`.  Keep an incoming file as a file of a release.

        Returns False if the very same file was there already on a non-volatile index."""
        name, version = check_form_names(form)
        check_form_filename(filename, name, version)
        self._check_digests(form, incoming)
        with open(incoming.path, "rb") as file:
            data = archive_metadata(file, filename)
        archive = parse_core_metadata(data) if data is not None else {}
        self._check_archive(filename, name, version, archive)
        wheel = filename.lower().endswith(".whl")
        upload = Upload(name, version, filename, incoming.sha256.hexdigest(), incoming.size, form_metadata(form), archive,
                        hashlib.sha256(data).hexdigest() if data is not None and wheel else None)
        self._refuse_early(index, upload)
        incoming.keep()
        if upload.metadata_sha256:
            self.blobs.add(data)
        return self.store.write(_store_upload, index, upload, who=who)

    @staticmethod
    def _check_digests(form, incoming):
        for field, make in (("sha256_digest", None), ("md5_digest", functools.partial(hashlib.md5, usedforsecurity=False)),
                            ("blake2_256_digest", functools.partial(hashlib.blake2b, digest_size=32))):
            stated = form.get(field, [""])[0].strip().lower()
            if not stated:
                continue
            if make is None:
                found = incoming.sha256.hexdigest()
            else:
                digest = make()
                with open(incoming.path, "rb") as file:
                    for piece in iter(lambda: file.read(1 << 20), b""):
                        digest.update(piece)
                found = digest.hexdigest()
            if found != stated:
                raise BadRequest(f"{field} {one_line(stated, 140)} does not match the uploaded content, which has {found}")

    @staticmethod
    def _check_archive(filename, name, version, archive):
        if not archive:
            return
        if re.match(r"\s*[3-9]\.", archive.get("metadata_version", "")):
            raise BadRequest(f"'{filename}' has metadata version {one_line(archive['metadata_version'], 20)}; "
                             "versions up to 2.x are known")
        found = archive.get("name", ""), archive.get("version", "")
        if normalize(found[0]) != normalize(name):
            raise BadRequest(f"'{filename}' holds metadata of the project '{one_line(found[0], 80)}', not '{name}'")
        if not same_version(found[1], version):
            raise BadRequest(f"'{filename}' holds metadata of version '{one_line(found[1], 80)}', not '{version}'")

    def _refuse_early(self, index, upload):
        """What the change will refuse is refused before bytes are kept for it."""
        if index.volatile:
            return
        with self.store.read() as db:
            row = db.execute("SELECT sha256 FROM files JOIN projects ON projects.id = project_id WHERE projects.index_id = ? "
                             "AND name = ? AND filename = ?", (index.id, normalize(upload.name), upload.filename)).fetchone()
        if row and row["sha256"] != upload.sha256:
            raise _already_exists(upload.filename)

    # -- removal

    @staticmethod
    def _check_volatile(index, force, message):
        if not (index.volatile or force):
            raise Forbidden(message)

    def remove_project(self, index, name, force, who):
        """devpi: DELETE /user/index/project."""
        self._check_volatile(index, force, f"project '{name}' is on non-volatile index {index.path}")
        self.store.write(_remove_project, index, name, who=who)

    def remove_version(self, index, name, version, force, who):
        """devpi: DELETE /user/index/project/version."""
        self._check_volatile(index, force, "cannot delete version on non-volatile index")
        self.store.write(_forget_version if index.is_mirror else _remove_version, index, name, version, who=who)

    def remove_file(self, index, path, force, who):
        """devpi: DELETE of a file's path."""
        self._check_volatile(index, force, "cannot delete version on non-volatile index")
        self.store.write(_remove_file, index, path, who=who)


def _already_exists(filename):
    return Conflict(f"{filename} already exists in non-volatile index")


def _register(change, index, name, version, metadata):
    index = _current(change, index)
    project_id = _project_for(change, index, name)
    row = change.execute("SELECT id, metadata FROM releases WHERE project_id = ? AND version = ?",
                         (project_id, version)).fetchone()
    if row and json.loads(row["metadata"]) == with_defaults(metadata):
        return
    _put_release(change, index, name, version, project_id, with_defaults(metadata))


def _project_for(change, index, name):
    """The id of the stage's project, which is made if it is new."""
    project = normalize(name)
    change.touch(project_tag(index.id, project))
    row = change.execute("SELECT id FROM projects WHERE index_id = ? AND name = ?", (index.id, project)).fetchone()
    if row:
        return row["id"]
    change.touch(names_tag(index.id))
    change.record("project", [index.user, index.name, project], {})
    return change.execute("INSERT INTO projects (index_id, name) VALUES (?, ?)", (index.id, project)).lastrowid


def _put_release(change, index, name, version, project_id, metadata):
    """Insert or replace a release; returns its id."""
    change.execute("INSERT INTO releases (project_id, version, metadata) VALUES (?, ?, ?) "
                   "ON CONFLICT (project_id, version) DO UPDATE SET metadata = excluded.metadata",
                   (project_id, version, json.dumps(metadata)))
    change.record("release", [index.user, index.name, normalize(name), version], metadata)
    return change.execute("SELECT id FROM releases WHERE project_id = ? AND version = ?",
                          (project_id, version)).fetchone()["id"]


def _store_upload(change, index, upload):
    """Enter an uploaded file; False if the same bytes are there already on a non-volatile index."""
    index = _current(change, index)
    project_id = _project_for(change, index, upload.name)
    old = change.execute(f"SELECT {_FILE_COLUMNS} FROM files WHERE project_id = ? AND filename = ?",
                         (project_id, upload.filename)).fetchone()
    history = []
    if old:
        old = File._make(old)
        if not index.volatile:
            if old.sha256 != upload.sha256:
                raise _already_exists(upload.filename)
            return False
        history = [{"what": "overwrite", "who": None, "when": list(time.gmtime()[:6]), "count": _overwrites(old) + 1}]
        _bury_files(change, index, "id = ?", old.id)
        change.execute("DELETE FROM files WHERE id = ?", (old.id,))
        change.record("file", [index.user, index.name, old.path], None)
    history.append({"what": "upload", "who": change.who, "when": list(time.gmtime()[:6]), "dst": index.path})
    release_id = _merge_release(change, index, project_id, upload)
    if old and old.release_id != release_id:
        _remove_if_empty(change, index, normalize(upload.name), old)
    _insert_file(change, index, project_id, release_id, upload, history)
    return True


def _overwrites(file):
    """How often a file was overwritten, by its history."""
    return next((entry["count"] for entry in json.loads(file.history or "[]") if entry["what"] == "overwrite"), 0)


def _merge_release(change, index, project_id, upload):
    """Bring a release's metadata up to what form and archive say: the form first, gaps filled from the archive."""
    row = change.execute("SELECT id, metadata FROM releases WHERE project_id = ? AND version = ?",
                         (project_id, upload.version)).fetchone()
    before = json.loads(row["metadata"]) if row else with_defaults({})
    metadata = {**before, **upload.metadata}
    for field in TEXT_FIELDS + LIST_FIELDS + NEWER_LIST_FIELDS:
        if not metadata.get(field) and upload.archive.get(field):
            metadata[field] = upload.archive[field]
    if row and metadata == before:
        return row["id"]
    return _put_release(change, index, upload.name, upload.version, project_id, metadata)


def _insert_file(change, index, project_id, release_id, upload, history):
    hash_spec = f"sha256={upload.sha256}"
    path = file_path(hash_spec, upload.filename)
    stated = upload.archive if upload.archive else upload.metadata      # installers get the archive's own word
    values = {
        "index_id": index.id, "project_id": project_id, "release_id": release_id, "version": upload.version,
        "filename": upload.filename, "path": path, "hash_spec": hash_spec, "sha256": upload.sha256, "size": upload.size,
        "uploaded": iso_time(time.time()), "requires_python": stated.get("requires_python") or None,
        "core_metadata": upload.metadata_sha256, "metadata_sha256": upload.metadata_sha256,
        "history": json.dumps(history)}
    try:
        change.execute(f"INSERT INTO files ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})",
                       tuple(values.values()))
    except sqlite3.IntegrityError:
        raise Conflict(f"{upload.filename} is there already as a file of another project") from None
    change.execute("DELETE FROM gone WHERE path = ?", (f"{index.path}/{path}",))
    change.record("file", [index.user, index.name, path], {
        **{k: v for k, v in values.items() if not k.endswith("_id")}, "project": normalize(upload.name)})


def _remove_project(change, index, name):
    row = change.execute("SELECT id, fetched FROM projects WHERE index_id = ? AND name = ?", (index.id, name)).fetchone()
    if row is None or index.is_mirror and row["fetched"] is None:
        raise NotFound("project not found")
    _bury_files(change, index, "project_id = ?", row["id"])
    change.execute("DELETE FROM projects WHERE id = ?", (row["id"],))
    change.record("project", [index.user, index.name, name], None)
    change.touch(project_tag(index.id, name), names_tag(index.id))


def _remove_version(change, index, name, version):
    row = change.execute(
        "SELECT releases.id, project_id FROM releases JOIN projects ON projects.id = project_id "
        "WHERE index_id = ? AND name = ? AND version = ?", (index.id, name, version)).fetchone()
    if row is None:
        raise _no_version(index, name, version)
    _bury_files(change, index, "release_id = ?", row["id"])
    change.execute("DELETE FROM releases WHERE id = ?", (row["id"],))
    change.record("release", [index.user, index.name, name, version], None)
    change.touch(project_tag(index.id, name))
    if change.execute("SELECT 1 FROM releases WHERE project_id = ?", (row["project_id"],)).fetchone() is None:
        _remove_project(change, index, name)


def _forget_version(change, index, name, version):
    """On a mirror: let go of the bytes; the links stay."""
    found = change.execute("SELECT files.id FROM files JOIN projects ON projects.id = project_id WHERE files.index_id = ? "
                           "AND name = ? AND version = ?", (index.id, name, version)).fetchall()
    if not found:
        raise _no_version(index, name, version)
    change.executemany("UPDATE files SET sha256 = NULL WHERE id = ?", [(row["id"],) for row in found])
    change.record("mirrored release", [index.user, index.name, name, version], None)
    change.touch(project_tag(index.id, name))


def _no_version(index, name, version):
    return NotFound(f"version '{version}' of project '{name}' not found on stage '{index.path}'")


def _remove_file(change, index, path):
    row = change.execute(f"SELECT {_FILE_COLUMNS} FROM files WHERE index_id = ? AND path = ?", (index.id, path)).fetchone()
    full = f"{index.path}/{path}"
    if row is None:
        if change.execute("SELECT 1 FROM gone WHERE path = ?", (full,)).fetchone():
            raise Gone(f"package '{full}' was deleted already")
        raise NotFound(f"package '{full}' doesn't exist")
    file = File._make(row)
    name = change.execute("SELECT name FROM projects WHERE id = ?", (file.project_id,)).fetchone()["name"]
    change.execute("INSERT OR IGNORE INTO gone VALUES (?)", (full,))
    change.execute("DELETE FROM files WHERE id = ?", (file.id,))
    change.record("file", [index.user, index.name, path], None)
    change.touch(project_tag(index.id, name))
    if index.is_mirror:     # so that the link comes back when upstream is asked again
        change.execute("UPDATE projects SET etag = NULL WHERE id = ?", (file.project_id,))
    else:
        _remove_if_empty(change, index, name, file)


def _remove_if_empty(change, index, name, file):
    """The release of a file that went goes with its last file, the project with its last release."""
    if change.execute("SELECT 1 FROM files WHERE release_id = ?", (file.release_id,)).fetchone() is None:
        _remove_version(change, index, name, file.version)


# ======================================================================================================================
# 10  Simple API
#
# A project's page as HTML (PEP 503, frozen at 1.4 by PEP 833) and JSON (PEP 691, 700), made from the same value, once
# per change.  Links are relative to the request, so they hold behind any prefix and on any host name.
# ======================================================================================================================

HTML = "text/html; charset=UTF-8"


class Rendered:
    """A page ready to be sent: its bytes, their ETag, and the same gzipped once somebody asks for that."""

    def __init__(self, body, label, page):
        self.body = body
        self.origins = tuple(origin for origin, _ in page.parts)
        self.stale, self.expires, self.upstream_serial = page.stale, page.expires, page.upstream_serial
        self.etag = f"{hashlib.sha256(body).hexdigest()[:32]}-{label}"
        self.zipped = None

    def gzip(self):
        if self.zipped is None:
            self.zipped = gzip.compress(self.body, 6, mtime=0)
        return self.zipped


def link_prefix(requested, origin, depth, absolute):
    """What stands before `+f/...` in links to files of `origin` on a page `depth` folders below the requested index."""
    if absolute:
        return f"{absolute}/{quoted(origin.path)}/"
    if origin.path == requested.path:
        return "../" * depth
    if origin.user == requested.user:
        return "../" * (depth + 1) + quoted(origin.name) + "/"
    return "../" * (depth + 2) + quoted(origin.path) + "/"


def quoted(path):
    """A path as it stands in URLs; a plus stays a plus."""
    return urllib.parse.quote(path, safe="/+@")


def page_versions(page):
    """All versions of a page, normalised, each once (PEP 700)."""
    files = (file.version for _, files in page.parts for file in files if file.version)
    return list(dict.fromkeys(canonical_version(version) for version in (*page.versions, *files)))


def json_page(page, prefix, serial):
    """PEP 691, 700, 714, 740, 792; `prefix(index)` is what stands before an index's file paths, `serial` upstream's."""
    entries = []
    for origin, files in page.parts:
        before = prefix(origin)
        for file in files:
            entry = {"filename": file.filename, "url": before + quoted(file.path), "hashes": _page_hash(file)}
            if file.requires_python:
                entry["requires-python"] = file.requires_python
            if file.core_metadata:
                entry["core-metadata"] = True if file.core_metadata == "true" else {"sha256": file.core_metadata}
            if file.yanked is not None:
                entry["yanked"] = file.yanked or True
            if file.size is not None:
                entry["size"] = file.size
            entry["upload-time"] = file.uploaded
            if file.first_seen:
                entry["_upload-time-source"] = "first-seen"
            if file.provenance:
                entry["provenance"] = file.provenance
            entries.append(entry)
    meta = {"api-version": API_VERSION, **({"_last-serial": serial} if serial else {})}
    content = {"meta": meta, "name": page.name, "versions": page_versions(page), "files": entries}
    if page.status:
        status, reason = page.status
        content["project-status"] = {"status": status, "reason": reason} if reason else {"status": status}
    return json.dumps(content, separators=(",", ":")).encode()


def _page_hash(file):
    """The one hash that a page states: the announced one, else the one that was computed when the file arrived."""
    algorithm, _, digest = file.hash_spec.partition("=")
    return {algorithm: digest} if digest else {"sha256": file.sha256} if file.sha256 else {}


def html_page(index, page, prefix, for_people):
    """PEP 503, 592, 658, 714, 740, 792.  People see the newest version first, and what is hidden from them."""
    rows = [(origin, file) for origin, files in page.parts for file in files]
    if for_people:
        rows.sort(key=lambda row: (version_key(row[1].version), row[1].filename), reverse=True)
    prefixes = {origin.path: prefix(origin) for origin, _ in page.parts}
    title = html.escape(f"{index.path}: links for {page.name}")
    lines = ['<!DOCTYPE html><html lang="en"><head>'
             f'<meta name="pypi:repository-version" content="{API_VERSION}">']
    if page.status:
        lines.append(f'<meta name="pypi:project-status" content="{page.status[0]}">')
        if page.status[1]:
            lines.append(f'<meta name="pypi:project-status-reason" content="{html.escape(page.status[1])}">')
    lines.append(f"<title>{title}</title></head><body><h1>{title}</h1>\n")
    if for_people and page.blocked:
        lines.append(f"<p>The project exists on a private index, so files of the mirror {html.escape(page.blocked.path)} "
                     "are not shown (<code>mirror_whitelist</code> would allow them).</p>\n")
    for origin, file in rows:
        lines.append(f"{html.escape(origin.path)} {_anchor(prefixes[origin.path], file)}<br>\n")
    lines.append("</body></html>\n")
    return "".join(lines).encode()


def _anchor(prefix, file):
    fragment = "".join(f"#{algorithm}={digest}" for algorithm, digest in _page_hash(file).items())
    attributes = [f'href="{html.escape(prefix + quoted(file.path) + fragment)}"']
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


_INSTALLER = re.compile(r"([^ ]* )*(distribute|setuptools|pip|pex|uv)/.*")


def is_installer(user_agent_text):
    """Whether a User-Agent is an installer's: such get the simple page on an index's or project's own URL."""
    return _INSTALLER.match(user_agent_text[:500]) is not None


# What is offered, in the order that decides ties; aliases are answered as what they stand for.
_SIMPLE_OFFERS = (("text/html", "text/html"), (SIMPLE_HTML, SIMPLE_HTML), (SIMPLE_JSON, SIMPLE_JSON),
                  ("application/vnd.pypi.simple.latest+html", SIMPLE_HTML),
                  ("application/vnd.pypi.simple.latest+json", SIMPLE_JSON))


@functools.lru_cache(maxsize=1000)
def simple_format(accept, query_format=""):
    """Which of text/html, SIMPLE_HTML and SIMPLE_JSON to answer with (PEP 691); HTML where nothing fits or all is equal."""
    for offer, answer in _SIMPLE_OFFERS:
        if query_format == offer:
            return answer
    ranges = accept_ranges(accept)
    best = max(_SIMPLE_OFFERS, key=lambda offer: _quality(offer[0], ranges))       # the first of equals
    return best[1] if _quality(best[0], ranges) > 0 else "text/html"


def accept_ranges(accept):
    """An Accept header as {media range: quality}; malformed items are left out (RFC 9110)."""
    ranges = {}
    for item in accept.split(",")[:100]:
        media, *parameters = [part.strip().lower() for part in item.split(";")]
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                quality = float(parameter[2:]) if re.fullmatch(r"(0(\.\d{0,3})?|1(\.0{0,3})?)", parameter[2:]) else None
        if re.fullmatch(r"[a-z0-9!#$&^_.+*-]+/[a-z0-9!#$&^_.+*-]+", media) and quality is not None:
            ranges.setdefault(media, quality)
    return ranges


def _quality(offer, ranges):
    for candidate in (offer, offer.partition("/")[0] + "/*", "*/*"):
        if candidate in ranges:
            return ranges[candidate]
    return 0


# ======================================================================================================================
# 11  HTTP
#
# The front owns connections between requests: one `selectors` loop gathers heads and answers at once what is ready.
# Everything else goes to a bounded crew of worker threads, which read the body, run the endpoint, send the answer in one
# piece and give the connection back.  An idle or slow client so costs a file descriptor, not a thread.
# ======================================================================================================================

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROLS = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,40}) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])")
_HOST = r"(?:[A-Za-z0-9._~%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
_BASE_URL = re.compile(r"https?://" + _HOST + r"(/[A-Za-z0-9._~:@!$&'()*+,;=%/-]*)?")
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,6})[ \t]*\r\n", re.IGNORECASE)
_BLANK_LINES = re.compile(rb"(?:\r\n)*")
_BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")
_ONCE = {"host", "content-length", "transfer-encoding", "authorization", "x-devpi-auth", "content-type", "range"}


class BadHead(Problem):
    """A request that can't be trusted to be framed as it says; the connection is closed after the answer."""
    status = 400


def parse_header(line):
    """A header or trailer line as (lower-case name, value), both bytes; BadHead if it is none."""
    name, colon, value = line.partition(b":")
    if not colon or not _TOKEN.fullmatch(name) or _CONTROLS.search(value):
        raise BadHead(f"malformed header line {one_line(line[:80].decode('latin-1'))!r}")
    return name.lower(), value.strip(b" \t")


def parse_head(data):
    """A request's head (bytes up to the blank line) as (method, target, (major, minor), {lower-case name: value}).

    Strict (RFC 9112): whatever two readers might frame differently is refused."""
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
    """Refuse a head from which two readers might read two different bodies, or two hosts."""
    if "transfer-encoding" in headers:
        if "content-length" in headers:
            raise BadHead("both Content-Length and Transfer-Encoding")
        coding = headers["transfer-encoding"].lower()
        if coding != "chunked" or version == (1, 0):
            raise BadHead(f"can't read Transfer-Encoding {one_line(coding, 60)!r} here",
                          501 if re.fullmatch(r"[a-z]+", coding) and coding != "chunked" else 400)
    if not re.fullmatch(r"[0-9]{1,18}", headers.get("content-length", "0")):
        raise BadHead(f"malformed Content-Length {one_line(headers['content-length'], 60)!r}")
    if not re.fullmatch(_HOST + "|", headers.get("host", "")) or version >= (1, 1) and "host" not in headers:
        raise BadHead("missing or malformed Host header")


_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


def wait_for(sock, event, seconds):
    """Whether a socket becomes readable or writable within so many seconds; fewer where too many workers wait already."""
    with _Selector() as selector, outside_wait() as room:
        selector.register(sock, event)
        return bool(selector.select(seconds if room else min(seconds, Limits.slow_client)))


class Outgoing:
    """What is still to be sent on a non-blocking socket: byte strings and FileParts, in order.

    A worker sends for as long as the client takes it; what a slow client leaves goes on from the front."""

    def __init__(self, pieces):
        self.pieces = collections.deque()
        for piece in pieces:
            if isinstance(piece, FilePart):
                if piece.length:
                    self.pieces.append(piece)
                else:
                    piece.file.close()
            elif piece:
                self.pieces.append(memoryview(piece))

    def send_some(self, sock):
        """One system call's worth; returns whether something is left.  BlockingIOError if the socket takes nothing now."""
        if isinstance(self.pieces[0], FilePart):
            self._send_file(sock, self.pieces[0])
        else:
            self._send_bytes(sock)
        return bool(self.pieces)

    def _send_bytes(self, sock):
        pieces = list(itertools.takewhile(lambda piece: not isinstance(piece, FilePart), self.pieces))
        sent = sock.sendmsg(pieces) if hasattr(sock, "sendmsg") else sock.send(pieces[0])
        for piece in pieces:
            if sent < len(piece):
                self.pieces[0] = piece[sent:]
                return
            sent -= len(piece)
            self.pieces.popleft()

    def _send_file(self, sock, part):
        if hasattr(os, "sendfile"):
            sent = os.sendfile(sock.fileno(), part.file.fileno(), part.offset, min(part.length, 1 << 20))
        else:
            part.file.seek(part.offset)
            sent = sock.send(part.file.read(min(part.length, 256 << 10)))
        if not sent and part.length:
            raise OSError("a file became shorter while it was sent")
        part.offset += sent
        part.length -= sent
        if not part.length:
            part.file.close()
            self.pieces.popleft()

    def send(self, sock, patience, time_limit=None):
        """Send until all is gone (True), or the client has taken nothing for `patience` seconds, or not all within
        `time_limit` seconds (False)."""
        until = time.monotonic() + time_limit if time_limit else float("inf")
        while self.pieces:
            if time.monotonic() > until:
                return False
            try:
                self.send_some(sock)
            except (BlockingIOError, InterruptedError):
                if not wait_for(sock, selectors.EVENT_WRITE, patience):
                    return False
        return True

    def close(self):
        for piece in self.pieces:
            if isinstance(piece, FilePart):
                piece.file.close()
        self.pieces.clear()


class Connection:
    """A client's connection, owned by the front or by one worker; its socket never blocks."""
    __slots__ = ("sock", "address", "trusted", "answers", "buffer", "scanned", "pending", "closing", "broken", "draining",
                 "allowance", "since", "deadline")

    def __init__(self, sock, address, trusted, answers):
        self.sock, self.address, self.trusted, self.answers = sock, address, trusted, answers
        self.buffer = b""           # bytes received and not used yet
        self.scanned = 0            # how many of them the front looked through for the end of a head, in vain
        self.pending = None         # an Outgoing: what the front has still to send
        self.closing = False        # close once that is sent
        self.broken = False         # an answer broke off: reset, so that nobody takes it for whole
        self.draining = None        # our side is closed; so many bytes may still come
        self.allowance = Limits.drained_body    # what `draining` will begin with
        self.since = time.monotonic()
        self.deadline = self.since + Limits.keep_alive

    def receive(self, patience):
        """More bytes, in a worker; b"" at the end.  BadHead if none come within `patience` seconds."""
        while True:
            try:
                return self.sock.recv(256 << 10)
            except (BlockingIOError, InterruptedError):
                if not wait_for(self.sock, selectors.EVENT_READ, patience):
                    raise BadHead("the request comes too slowly", 408) from None

    def send(self, *pieces):
        """Send all of these byte strings; OSError if the client does not take them."""
        if not Outgoing(pieces).send(self.sock, Limits.stall, Limits.stall):
            raise TimeoutError("the client takes nothing")


class Body:
    """A request's body, read piece by piece: by Content-Length or chunked, within `limit` bytes and in bearable time."""

    def __init__(self, connection, version, headers, limit):
        self.connection, self.limit = connection, limit
        self.chunked = "transfer-encoding" in headers
        self.left = None if self.chunked else int(headers.get("content-length", "0"))
        self.announced = self.left
        self.received = 0
        self.began = time.monotonic()
        self.ended = self.left == 0
        self.expects = headers.get("expect", "").lower() == "100-continue" and not self.ended and version >= (1, 1)
        self.chunk_left = 0
        self.patience = Limits.stall

    def check_limit(self):
        if (self.announced or self.received) > self.limit:
            raise TooLarge(f"the body is larger than {self.limit} bytes (--max-request-body-size)")

    def read(self, size=256 << 10):
        """Up to `size` bytes, b"" at the end of the body."""
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

    def _take(self, size):
        """Some of the next `size` bytes, at least one."""
        connection = self.connection
        if not connection.buffer:
            self._receive()
        data, connection.buffer = connection.buffer[:size], connection.buffer[size:]
        return data

    def _receive(self):
        """Have more bytes in the connection's buffer."""
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
            match = re.fullmatch(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[\t\x20-\x7e\x80-\xff]*)?", self._line())
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
        """The whole body, `limit` bytes at most."""
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
        """Read what nobody asked for, so that the next request begins where it begins; False if that is not worth it."""
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
        except Problem as problem:      # the answer that is about to be sent says more
            log.debug("drained no further: %s", problem.message)
            return False
        return self.ended


@dataclasses.dataclass
class Response:
    """An answer.  Its body is `body`; or `parts`, a list of byte strings and FileParts; or `stream`, byte strings as they
    come (and perhaps a FilePart as the last), of `length` bytes in all, sent in chunks if that is None.

    `tags` names what it depends on, if it may be kept and sent again until `expires`."""
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
        """The size of the body in bytes; None if that shows only at its end."""
        if self.stream is not None:
            return self.length
        if self.parts is not None:
            return sum(part.length if isinstance(part, FilePart) else len(part) for part in self.parts)
        return len(self.body)


def json_response(content, status=200, headers=()):
    """Any JSON; the type without a charset, which the devpi client compares as a whole."""
    return Response(status, [("Content-Type", "application/json"), *headers],
                    json.dumps(content, separators=(", ", ": ")).encode() + b"\n")


def result_response(type_, result, status=200, message=None):
    """devpi's envelope (http-api 1.3)."""
    content = {"type": type_, "result": result}
    if message:
        content["message"] = message
    return json_response(content, status)


def message_response(message, status=200):
    return json_response({"message": message}, status)


def redirect(location):
    return Response(302, [("Location", location), ("Content-Type", "text/plain; charset=utf-8")], b"")


def reason_phrase(status):
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


def problem_response(problem, accept, kind):
    """A Problem as an answer; the form depends on the kind of route and on what the client says it reads (http-api 1.4).

    json: always the envelope.  page: HTML unless JSON is named.  upload: plain text unless one of the two is named, and
    the message as the reason phrase, which is where twine and devpi look for it."""
    status, message = problem.status, problem.message
    reason = one_line(message) if kind == "upload" and message else reason_phrase(status)
    if kind == "json" or "application/json" in accept:
        content = {"message": message, "code": f"{status} {reason}", "title": reason}
        response = Response(status, [("Content-Type", "application/json")], json.dumps(content).encode() + b"\n")
    elif kind == "page" or "text/html" in accept:
        title = html.escape(f"{status} {reason_phrase(status)}")
        response = Response(status, [("Content-Type", HTML)], (
            f"<!DOCTYPE html><html><head><title>{title}</title></head><body><h1>{title}</h1>"
            f"<p>{html.escape(message)}</p></body></html>\n").encode("utf-8", "replace"))
    else:
        response = Response(status, [("Content-Type", "text/plain; charset=utf-8")],
                            (message + "\n").encode("utf-8", "replace"))
    response.reason = reason
    response.headers += problem.headers
    return response


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

    def resolve_target(self):
        """Decode path and query; the path prefix of the outside URL is taken off."""
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

    def header(self, name):
        return self.headers.get(name, "")

    @property
    def accept(self):
        return self.headers.get("accept", "")

    @functools.cached_property
    def address(self):
        """The client's address; a trusted proxy's word for it counts."""
        if self.connection.trusted:
            for value in (self.header("x-real-ip"), self.header("x-forwarded-for").rpartition(",")[2]):
                with contextlib.suppress(ValueError):
                    return str(ipaddress.ip_address(value.strip()))
        return self.connection.address

    @functools.cached_property
    def base_url(self):
        """The start of absolute links, without final slash: X-Outside-URL of a trusted peer, --outside-url, or Host."""
        outside = self.header("x-outside-url")
        if outside:
            if self.connection.trusted and _BASE_URL.fullmatch(outside):
                return outside.rstrip("/")
            self.app.ignored_header(self.connection.address, outside, self.connection.trusted)
        if self.app.settings.outside_url:
            return self.app.settings.outside_url
        host = self.header("host") or self.app.address_text
        return "http://" + re.sub(r":80$", "", host)

    @functools.cached_property
    def identity(self):
        """Who is asking (http-api 3.1): X-Devpi-Auth if it is there and readable, else Basic credentials."""
        credentials = decode_credentials(self.header("x-devpi-auth")) if "x-devpi-auth" in self.headers else None
        if credentials is None:
            scheme, _, text = self.header("authorization").partition(" ")
            credentials = decode_credentials(text) if scheme.lower() == "basic" else None
        if credentials is None:
            return NOBODY
        return self.app.logins.check(*credentials, self.address)

    @property
    def has_credentials(self):
        return "authorization" in self.headers or "x-devpi-auth" in self.headers

    def refuse(self, problem):
        """Raise `problem`, or rather 429 if the credentials were not even looked at."""
        if self.identity.wait:
            raise TooManyLogins(self.identity.wait)
        if self.has_credentials and self.identity.user is None:
            problem.message += " (the user name or password that came along is wrong, or the login has ended)"
            if "devpi-client" in self.header("user-agent"):     # this makes it forget its dead login and say so
                problem.status = 401
                problem.headers.append(("Location", self.url("+login")))
        raise problem

    def json(self, *shapes):
        """The body as JSON; BadRequest unless it is one of these types."""
        data = self.body.read_all(Limits.json_body)
        try:
            content = json.loads(data.decode("utf-8"))
            _check_json(content)
        except (ValueError, RecursionError):
            raise BadRequest("Bad request: could not decode json") from None
        if not isinstance(content, shapes):
            expected = " or ".join({dict: "an object", list: "a list"}[shape] for shape in shapes)
            raise BadRequest(f"Bad request: expected {expected} as JSON body, got {type(content).__name__}")
        return content

    @property
    def is_installer(self):
        return is_installer(self.header("user-agent"))

    @property
    def is_browser(self):
        return "text/html" in self.accept

    def url(self, path):
        """The absolute URL of a path below our root, which is given without leading slash."""
        return f"{self.base_url}/{quoted(path)}"


def _check_json(content):
    """ValueError for what could not be stored and sent back: deep nesting, NaN and infinity, lone surrogates."""
    level = [content]
    for _ in range(Limits.json_depth):
        level = [inner for value in level if isinstance(value, (dict, list))
                 for inner in (value.values() if isinstance(value, dict) else value)]
        if not level:
            break
    else:
        raise ValueError("nested too deeply")
    json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8")




class Route(typing.NamedTuple):
    """One endpoint: its methods, its path as a regular expression, and the form of its errors."""
    methods: tuple
    pattern: re.Pattern
    endpoint: typing.Callable
    errors: str


ROUTES = []
_PLACES = {"user": "[^/+]+", "index": "[^/+]+", "project": "[^/+]+", "version": "[^/]+", "rest": ".+"}


def route(methods, path, errors="json"):
    """Register an endpoint.  `{user}`, `{index}` and `{project}` match one segment without a plus, `{version}` any segment,
    `{rest}` the rest of the path; `[/]` an optional final slash.  Routes are tried in the order of their definition."""
    def register(endpoint):
        pattern = re.escape(path).replace(r"\[/\]", "/?").replace(r"\{", "{").replace(r"\}", "}")
        for place, expression in _PLACES.items():
            pattern = pattern.replace("{%s}" % place, f"(?P<{place}>{expression})")
        ROUTES.append(Route(tuple(methods.split()), re.compile(pattern), endpoint, errors))
        return endpoint
    return register


class AccessLog:
    """One line a request on standard output: time, level, [req<n>], method and path, status, ms, bytes, user, address.

    Lines are gathered and written by a thread, so that the hot path pays for a tuple and nothing else."""

    def __init__(self, enabled):
        self.enabled = enabled
        self.lines = collections.deque(maxlen=200000)
        self.number = 0
        self.lock = threading.Lock()

    def add(self, what, status, began, size, user, address):
        if self.enabled:
            self.lines.append((time.time(), what, status, time.monotonic() - began, size, user, address))

    def flush(self):
        with self.lock:
            count, text = len(self.lines), []
            for _ in range(count):
                moment, what, status, seconds, size, user, address = self.lines.popleft()
                self.number += 1
                stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
                text.append(f"{stamp} INFO  [req{self.number}] {what} {status} {seconds * 1000:.1f}ms {size} "
                            f"{user or '-'} {address}\n")
            if text:
                try:
                    sys.stdout.write("".join(text))
                    sys.stdout.flush()
                except OSError as error:
                    self.enabled = False
                    log.error("standard output is gone, no more access log: %s", error)

    def run(self):
        while True:
            time.sleep(0.5)
            self.flush()


def visible(target):
    """A request target for a log line: no control characters, no credentials, bounded."""
    return one_line(re.sub(r"//[^/@?]*@", "//", target), 500)


def without_blank_lines(buffer):
    """What is received, without the blank lines before a request, which are passed over (RFC 9112 2.2)."""
    return buffer[_BLANK_LINES.match(buffer).end():]


def _small_body(head):
    """The size of a body that is small enough for the front to gather, by a look at the head; else 0.

    Only a guess: what is wrong with the head is found by who parses it."""
    lengths = _CONTENT_LENGTH.findall(head)
    if len(lengths) != 1 or int(lengths[0]) > Limits.gathered_body:
        return 0
    head = head.lower()
    return 0 if b"100-continue" in head or b"transfer-encoding" in head else int(lengths[0])


class ReadyAnswer(typing.NamedTuple):
    """An answer in the answer cache: all bytes but the Date and serial headers between head and body."""
    head: bytes
    body: bytes
    what: str
    status: int
    user: str | None
    address: str


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the requests that wait in a connection's buffer, in a worker thread; the front gets the connection back."""

    protocol_version = "HTTP/1.1"

    def setup(self):
        self.connection = self.request      # what socketserver calls the request is a Connection here, not a socket
        self.keep = False

    def finish(self):
        self.server.give_back(self.connection, self.keep)

    def handle_one_request(self):
        """Answer the request whose head is in the buffer.

        `handle` calls this again while `close_connection` is false, that is if the next request is here already
        (pipelining); otherwise `keep` says whether the front gets the connection back open."""
        connection, app = self.connection, self.server.app
        self.close_connection = True
        raw, blank, rest = connection.buffer.partition(b"\r\n\r\n")
        request = None
        try:
            if not blank or len(raw) > Limits.head:
                if len(raw) > Limits.head:
                    raise BadHead(f"the request's head is larger than {Limits.head} bytes", 431)
                raise BadHead("malformed request head")
            connection.buffer = rest
            request = Request(app, connection, *parse_head(raw), raw + blank)
            response = app.respond(request)
            complete = request.body.ended or request.body.drain()
            persistent = complete and self._wants_keep_alive(request) and not self.server.stopping
            self.keep = self._send(request, response, persistent)
        except BadHead as problem:
            self._refuse(request, problem)
        except OSError as error:
            log.debug("connection to %s broke: %s", connection.address, error)
            self.keep = False
        if self.keep and connection.pending is None:
            connection.buffer = without_blank_lines(connection.buffer)
            if b"\r\n\r\n" in connection.buffer:
                self.close_connection = self.keep = False

    def _refuse(self, request, problem):
        """Answer what can't be read as a request, and close: nobody knows where the next one would begin."""
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
        """Send an answer; returns whether the connection may serve another request after it.

        What a slow client does not take at once is left in `connection.pending`, for the front to go on with."""
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
            self._send_or_leave(Outgoing([head, variable, *(response.parts or [response.body])]))
        else:
            try:
                persistent = self._send_stream(response.stream, head + variable, length, chunked) and persistent
            except Problem as problem:      # before a single byte left: say what happened
                return self._send(request, problem_response(problem, request.accept, request.errors), persistent)
        if request is not None:
            ready = ReadyAnswer(head, b"" if silent else response.body, f"{request.method} {visible(request.target)}",
                                response.status, request.identity.user if request.has_credentials else None, request.address)
            app.access_log.add(ready.what, ready.status, request.began, length or 0, ready.user, ready.address)
            if response.tags is not None and persistent and response.parts is None and response.stream is None:
                self._keep_ready(request, response, ready)
        return persistent

    @staticmethod
    def _head(request, response, persistent, length, chunked):
        """Status line and headers, but for those that change from answer to answer."""
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
        if not outgoing.send(self.connection.sock, Limits.slow_client):
            self.connection.pending = outgoing

    def _send_stream(self, stream, head, length, chunked):
        """Send head and pieces as they come, a FilePart last; returns whether it was all.

        A Problem before the first piece is raised; after that it is logged, and the connection has to break."""
        connection, sent = self.connection, 0
        with contextlib.closing(stream):
            try:
                for piece in stream:
                    if isinstance(piece, FilePart):
                        sent += piece.length
                        self._send_or_leave(Outgoing([head, b"%x\r\n" % piece.length, piece, b"\r\n0\r\n\r\n"]
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
        """Enter the answer into the answer cache, under the very bytes of the request's head."""
        size = len(ready.head) + len(ready.body) + 2 * len(request.raw_head) + 500
        if request.method not in ("GET", "HEAD") or len(request.raw_head) > Limits.ready_head or size > Limits.ready_answer \
                or "content-length" in request.headers or "transfer-encoding" in request.headers:
            return
        expires = response.expires
        if request.has_credentials:
            if request.identity.user is None:
                return
            if request.identity.expires:
                expires = min(expires or request.identity.expires, request.identity.expires)
        self.server.app.keep_answer(request, ready, size, response.tags, expires)


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """The front: one loop over all connections that are between requests, and a bounded crew of workers behind it."""

    def __init__(self, app, listeners):
        self.app, self.listeners = app, listeners
        socketserver.BaseServer.__init__(self, listeners[0].getsockname(), Handler)
        self.socket = listeners[0]
        self.selector = selectors.DefaultSelector()
        self.workers = Workers("worker", app.settings.threads, self._work)
        self.returned = collections.deque()
        self.waker, self.wake_end = socket.socketpair()
        self.waker.setblocking(False)
        self.wake_end.setblocking(False)
        self.connections = set()
        self.working = 0            # connections that workers have
        self.stopping = False
        self.limit = connection_limit(app.settings.connections)

    # -- steps of socketserver

    def process_request(self, request, client_address):
        """Hand a connection whose next request can't be answered here to a worker."""
        self.working += 1
        self.workers.submit((request, client_address, time.monotonic()))

    def _work(self, item):
        connection, client_address, since = item
        if time.monotonic() - since <= Limits.longest_queue:
            self.process_request_thread(connection, client_address)
            return
        with contextlib.suppress(OSError):      # nobody may be there any more
            connection.send(self._busy_answer())
        self.give_back(connection, False)

    def shutdown_request(self, request):
        """A worker is done with the connection; `Handler.finish` has said what becomes of it."""

    def handle_error(self, request, client_address):
        """`Handler.finish` ran all the same, so that the connection is back already."""
        log.exception("a request from %s failed", client_address)

    # -- for workers

    def give_back(self, connection, keep):
        """A worker has answered; `keep`: the connection may serve another request."""
        self.returned.append((connection, keep))
        self.wake()

    def wake(self):
        with contextlib.suppress(BlockingIOError):      # it is awake already
            self.wake_end.send(b".")

    # -- the loop

    def serve_forever(self, poll_interval=1.0):
        """Until `stop` is called: wait for bytes, answer what is ready, hand over the rest."""
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
                try:
                    if type(target) is not Connection:
                        self._take_back(now) if target is self.waker else self._accept(target)
                    elif target.pending is None:
                        self._readable(target, now)
                    else:
                        self._send_pending(target)
                except Exception:       # one connection must not end the service for all
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
        for _ in range(64):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:        # out of file descriptors: an idle connection has to go
                log.error("can't accept connections: %s", error)
                if not self._evict():
                    time.sleep(0.1)
                return
            sock.setblocking(False)
            with contextlib.suppress(OSError):      # macOS: the peer is gone already
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if len(self.connections) >= self.limit and not self._evict():
                self._turn_away(sock)
                continue
            connection = Connection(sock, address[0], self.app.trusts(address[0]), self.app.answers(address[0]).entries)
            self.connections.add(connection)
            self.selector.register(sock, selectors.EVENT_READ, connection)

    def _evict(self):
        """Close a connection to make room: one that is closing, else the one that was idle for longest; False if none is."""
        before = time.monotonic() - Limits.evictable        # a young one's request may just not have been read yet
        idle = [key.data for key in self.selector.get_map().values() if type(key.data) is Connection
                and key.data.since < before and key.data.pending is None and not key.data.buffer]
        if not idle:
            return False
        self._close(min(idle, key=lambda connection: (connection.draining is None, connection.since)))
        return True

    def _busy_answer(self):
        return self._plain_answer("503 Service Unavailable\r\nRetry-After: 1", b"too much to do just now, try again\n")

    def _plain_answer(self, status, body):
        head = (f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: text/plain; charset=utf-8\r\n"
                f"Content-Length: {len(body)}\r\n")
        return head.encode() + self.app.constant_headers + self.app.variable_headers(self.app.store.serial) + body

    def _turn_away(self, sock):
        with contextlib.suppress(OSError):
            sock.send(self._busy_answer())
        sock.close()

    def _readable(self, connection, now):
        """Bytes have come.  The hot path: one recv, one look-up, one send."""
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
            if connection.buffer:       # half a request, and the client may still be listening
                self._hand_over(connection)
            else:
                self._close(connection)
            return
        if connection.buffer:
            connection.buffer += data
        else:
            entry = connection.answers.get(data)
            if entry is not None and (not entry[1] or entry[1] > now):
                self._answer(connection, entry[0], now)
                return
            connection.buffer = data
            connection.deadline = now + Limits.head_time
        self._dispatch(connection)

    def _answer(self, connection, ready, now):
        """Send a ready answer; what the socket does not take is sent when it takes more."""
        app = self.app
        head, body, what, status, user, address = ready
        if address == connection.address or not connection.trusted:
            address = connection.address
        data = head + app.variable_headers(app.store.serial) + body
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
            connection.pending = Outgoing([memoryview(data)[sent:]])
            connection.deadline = now + Limits.stall
            self.selector.modify(connection.sock, selectors.EVENT_WRITE, connection)
        app.access_log.add(what, status, now, len(body), user, address)

    def _send_pending(self, connection):
        """A slow client takes more of its answer."""
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
        if not more:
            connection.pending = None
            self.selector.unregister(connection.sock)
            self._resume(connection, now)

    def _resume(self, connection, now):
        """The connection waits for its next request, part of which may be here already; or it is closed."""
        if connection.closing or self.stopping:
            self._say_goodbye(connection, now)
            return
        connection.since = now
        connection.deadline = now + Limits.keep_alive
        self.selector.register(connection.sock, selectors.EVENT_READ, connection)
        if connection.buffer:
            connection.deadline = now + Limits.head_time
            self._dispatch(connection)

    def _say_goodbye(self, connection, now):
        """Close our side, and pass over what still comes for a while: a full stop would make the client lose the answer."""
        sock = connection.sock
        if connection.broken:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            with contextlib.suppress(OSError):      # the client has closed its side, too
                sock.shutdown(socket.SHUT_WR)
                connection.buffer = b""
                connection.draining = connection.allowance
                connection.deadline = now + (1 if self.stopping else Limits.drain_time)
                self.selector.register(sock, selectors.EVENT_READ, connection)
                return
        self.connections.discard(connection)
        sock.close()

    def _dispatch(self, connection):
        """Hand the connection over if its buffer holds a head, or something that will never be one."""
        buffer = connection.buffer
        if buffer.startswith(b"\r\n"):
            buffer = connection.buffer = without_blank_lines(buffer)
        start = max(0, connection.scanned - 3)
        end = buffer.find(b"\r\n\r\n", start)
        if end < 0 and len(buffer) <= Limits.head and not _BARE_LINE_FEED.search(buffer, start) \
                and buffer.find(b"\0", start) < 0:
            connection.scanned = len(buffer)
            return
        if end >= 0 and len(buffer) < end + 4 + _small_body(buffer[:end + 2]):
            connection.deadline = time.monotonic() + Limits.stall
            return
        self._hand_over(connection)

    def _hand_over(self, connection):
        """To a worker, unless too many wait for one already."""
        self._unregister(connection)
        connection.scanned = 0
        if len(self.workers.waiting) >= Limits.waiting_requests:
            self.connections.discard(connection)
            self._turn_away(connection.sock)
            return
        self.process_request(connection, connection.address)

    def _unregister(self, connection):
        try:
            self.selector.unregister(connection.sock)
        except KeyError:        # it comes from a worker and was not registered again yet
            pass

    def _take_back(self, now):
        with contextlib.suppress(BlockingIOError):
            self.waker.recv(4096)
        while self.returned:
            connection, keep = self.returned.popleft()
            self.working -= 1
            connection.closing = not keep
            if connection.pending is None:
                self._resume(connection, now)
            else:
                connection.deadline = now + Limits.stall
                self.selector.register(connection.sock, selectors.EVENT_WRITE, connection)

    def _sweep(self, now):
        """Close what has been silent for too long."""
        waiting = self.selector.get_map()
        for connection in [c for c in self.connections if c.deadline < now]:
            if connection.sock.fileno() in waiting:
                if connection.buffer and connection.pending is None:
                    with contextlib.suppress(OSError):
                        connection.sock.send(self._plain_answer("408 Request Timeout", b"the request comes too slowly\n"))
                self._close(connection)

    def _close(self, connection):
        """Close a connection that the front owns; one that was closed already in this round of events is left alone."""
        if connection not in self.connections:
            return
        self._unregister(connection)
        self.connections.discard(connection)
        if connection.pending is not None:
            connection.pending.close()
            connection.pending = None
        connection.sock.close()

    def _wind_down(self):
        """Stop accepting, close idle connections, let running requests end, for a bounded time."""
        for listener in self.listeners:
            self.selector.unregister(listener)
            listener.close()
        for connection in [key.data for key in list(self.selector.get_map().values()) if type(key.data) is Connection]:
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
    """How many connections can be had: as many as are wanted, or as file descriptors allow."""
    try:
        import resource
    except ImportError:     # Windows, where select() takes 512 sockets
        return min(wanted, 480)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * wanted + 400       # a slow reader's file takes a second one
    if soft != resource.RLIM_INFINITY and soft < needed:
        goal = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (goal, hard))
            soft = goal
    return wanted if soft == resource.RLIM_INFINITY else max(16, min(wanted, (soft - 400) // 2))


# ======================================================================================================================
# 12  Endpoints
#
# devpi's JSON contract, uploads, simple pages, files, status.  Each endpoint checks its permission, calls the chapters
# above, and says what came of it; where the wire has another word than we do, it is translated here.
# ======================================================================================================================


def authority(host, port):
    """`host:port` as it stands in URLs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class App:
    """All parts of a running server, and what is shared by the requests."""

    def __init__(self, settings, store, secret):
        self.settings, self.store = settings, store
        self.blobs = Blobs(settings.serverdir)
        self.users = Users(store)
        self.indexes = Indexes(store, self.users)
        self.logins = Logins(self.users, secret)
        self.permissions = Permissions(settings)
        self.client = UpstreamClient(settings)
        self.mirrors = Mirrors(store, self.blobs, self.client, settings)
        self.projects = Projects(store, self.indexes, self.mirrors)
        self.releases = Releases(store, self.blobs)
        self.pages = store.freshness.cache(Limits.page_cache)
        self.ready = {trusted: store.freshness.cache(Limits.answer_cache // 2) for trusted in (False, True)}
        self.access_log = AccessLog(settings.access_log)
        self.warned_addresses = set()
        self.started = time.time()
        uuid = store.node["uuid"]
        self.address_text = authority(*settings.listen[0])
        self.constant_headers = (
            f"X-DEVPI-API-VERSION: 2\r\nX-DEVPI-SERVER-VERSION: {PROTOCOL_VERSION}\r\nX-DEVPI-UUID: {uuid}\r\n"
            f"X-DEVPI-PRIMARY-UUID: {uuid}\r\nX-DEVPI-MASTER-UUID: {uuid}\r\n").encode()
        self._variable = (0, -2, b"")

    def variable_headers(self, serial):
        """The end of every head: Date and serial; made anew when either changes."""
        second = int(time.time())
        if self._variable[:2] != (second, serial):
            self._variable = (second, serial,
                              f"Date: {http_date(second)}\r\nX-DEVPI-SERIAL: {serial}\r\n\r\n".encode())
        return self._variable[2]

    @functools.lru_cache(maxsize=10000)
    def trusts(self, address):
        """Whether this peer may speak for others: loopback, --trusted-proxy (operations 5.5)."""
        ip = ipaddress.ip_address(address.partition("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip
        return ip.is_loopback or any(ip in network for network in self.settings.trusted_proxies)

    def answers(self, address):
        """The answer cache for this kind of peer: a trusted one's X-Outside-URL counts, another's does not."""
        return self.ready[self.trusts(address)]

    def keep_answer(self, request, ready, size, tags, expires):
        self.store.freshness.keep(self.answers(request.connection.address), request.raw_head, ready, size, tags,
                                  request.moment, expires)

    def ignored_header(self, address, value, trusted):
        """Say once an address why its X-Outside-URL does not count."""
        if address not in self.warned_addresses and len(self.warned_addresses) < 1000:
            self.warned_addresses.add(address)
            why = "it is no http URL" if trusted else f"--trusted-proxy {address} would make it count"
            log.warning("X-Outside-URL %r from %s is ignored: %s", one_line(value, 100), address, why)

    def respond(self, request):
        """Find the endpoint, run it; whatever it raises becomes the answer."""
        try:
            request.resolve_target()
            request.body.check_limit()
            response = self._endpoint(request)
        except BadHead:
            raise
        except Problem as problem:
            response = problem_response(problem, request.accept, request.errors)
        except Exception:
            name = secrets.token_hex(4)
            log.exception("request %s failed: %s %s", name, request.method, visible(request.target))
            response = problem_response(Problem(f"internal error, request id {name}"), request.accept, request.errors)
        if request.method not in ("GET", "HEAD"):
            request.serial = self.store.serial
        return response

    @staticmethod
    def _endpoint(request):
        method = "GET" if request.method == "HEAD" else request.method
        for methods, pattern, endpoint, errors in ROUTES:
            match = pattern.fullmatch(request.path)
            if match and (method in methods or methods == ("ANY",)):
                request.errors = errors
                return endpoint(request, **match.groupdict())
        raise NotFound(f"there is nothing at {one_line(request.path, 100)} for {one_line(request.method, 20)}")

    def clean(self):
        """Remove blobs that nothing refers to any more."""
        def is_referred_to(sha256):
            with self.store.read() as db:
                return db.execute("SELECT 1 FROM files WHERE sha256 = ?1 UNION ALL SELECT 1 FROM files "
                                  "WHERE metadata_sha256 = ?1 LIMIT 1", (sha256,)).fetchone() is not None
        MirrorNames.clear_leftovers(self.mirrors.cache, {index.id for index in self.indexes.all()})
        count = self.blobs.collect(is_referred_to)
        if count:
            log.info("removed %d files that nothing refers to any more", count)

    def clean_regularly(self):
        while True:
            time.sleep(3600)
            try:
                self.clean()
            except Exception:       # this thread has to live on
                log.exception("cleaning failed")


# -- permissions of requests


def require_read(request, index):
    """Refuse who may not read an index: 401 without good credentials, 403 with them, never 404 (standards 13).

    The devpi client goes on after 403 and not after 401, so it gets the former."""
    if request.app.permissions.read(request.identity, index):
        return
    if request.identity.user is None and "devpi-client" not in request.header("user-agent"):
        request.refuse(Unauthorized(f"reading {index.path} takes a login"))
    request.refuse(Forbidden(f"no permission to read index {index.path}"))


def require(request, allowed, message):
    """Refuse with 403 what is not allowed (devpi's answer to anonymous requests too)."""
    if not allowed:
        request.refuse(Forbidden(message))


def require_modify_index(request, user, index):
    """For PATCH and DELETE: permission comes first, and nobody has any on a missing index."""
    found = request.app.indexes.find(f"{user}/{index}")
    require(request, found and request.app.permissions.index_modify(request.identity, user),
            f"no permission to modify index {user}/{index}")
    return found


def require_delete_files(request, user, index):
    found = request.app.indexes.find(f"{user}/{index}")
    require(request, found and request.app.permissions.delete_files(request.identity, found),
            f"no permission to delete from index {user}/{index}")
    return found


def wants_json(request):
    """Whether a JSON route may answer: for application/json, anything, or nothing named; 415 else.

    Browsers get JSON too, as there are no pages for them here."""
    ranges = accept_ranges(request.accept)
    if ranges and not {"application/json", "application/*", "*/*", "text/html"} & set(ranges):
        raise UnsupportedType("this is served as application/json only: say so in Accept")


def without_final_slash(request):
    """A redirect to the path without its final slash, for browsers; None for everybody else."""
    if request.is_browser and request.path.endswith("/") and not request.is_installer:
        query = request.target.partition("?")[2]
        return redirect(request.url(request.path.strip("/")) + (f"?{query}" if query else ""))
    return None


# -- discovery, status, login


@route("GET", "/+status")
def status(request):
    """devpi: GET /+status.  Paths are shown to root only."""
    app = request.app
    is_root = request.identity.user == "root"
    with app.store.read() as db:
        row = db.execute("SELECT serial, ts FROM changelog ORDER BY serial DESC LIMIT 1").fetchone()
    serial, timestamp = tuple(row) if row else (-1, app.started)
    host, port = app.settings.listen[0]
    uuid = app.store.node["uuid"]
    return result_response("status", {
        "serverdir": app.settings.serverdir if is_root else None, "uuid": uuid,
        "versioninfo": {"devpi-server": PROTOCOL_VERSION, "devpi-lite": __version__,
                        "python": "%d.%d.%d" % sys.version_info[:3]},
        "server-code": os.path.abspath(__file__) if is_root else None, "host": host, "port": port,
        "outside-url": app.settings.outside_url or None, "serial": serial, "last-commit-timestamp": timestamp,
        "event-serial": serial, "event-serial-timestamp": timestamp, "event-serial-in-sync-at": timestamp,
        "metrics": [["devpi_lite_page_cache_bytes", "gauge", app.pages.size],
                    ["devpi_lite_answer_cache_bytes", "gauge", sum(cache.size for cache in app.ready.values())]],
        "role": "MASTER", "polling_replicas": {}, "status": "ok", "messages": []})


@route("ANY", "/+api")
@route("ANY", "/{user}/+api")
@route("ANY", "/{user}/{index}/+api")
def api(request, user=None, index=None):
    """devpi: where things are, for the devpi client (http-api 2.2)."""
    identity = request.identity
    known = identity.user is not None
    result = {"login": request.url("+login"),
              "authstatus": ["ok", identity.user, list(identity.groups)] if known else ["noauth", "", []],
              "features": ["server-keyvalue-parsing"]}
    if index is not None:
        found = request.app.indexes.get(f"{user}/{index}")
        result["index"] = request.url(found.path)
        result["simpleindex"] = request.url(f"{found.path}/+simple/")
        if not found.is_mirror:
            result["pypisubmit"] = request.url(found.path + "/")
    return result_response("apiconfig", result)


@route("POST", "/+login")
def login(request):
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
    if identity.user is None or logins.check_token(user, password):
        raise Unauthorized(f"user '{user}' could not be authenticated", challenge=False)
    return result_response("proxyauth", _fresh_token(request, user), message="login successful")


def _fresh_token(request, user):
    return {"password": request.app.logins.issue(request.app.users.get(user)), "expiration": Limits.session}


# -- files


_CONTENT_TYPES = ((".tar.gz", "application/x-tar"), (".tgz", "application/x-tar"), (".tar.bz2", "application/x-tar"),
                  (".zip", "application/zip"))


def content_type(filename):
    return next((type_ for ending, type_ in _CONTENT_TYPES if filename.endswith(ending)), "application/octet-stream")


@route("GET PUT PATCH PUSH", "/{user}/{index}/+f/{rest}", "page")
def hashed_file(request, user, index, rest):
    return serve_file(request, f"{user}/{index}", "+f/" + rest.rstrip("/"))


@route("GET PUT PATCH PUSH", "/{user}/{index}/+e/{rest}", "page")
def hashless_file(request, user, index, rest):
    return serve_file(request, f"{user}/{index}", "+e/" + rest.rstrip("/"))


@route("DELETE", "/{user}/{index}/+f/{rest}")
def delete_hashed_file(request, user, index, rest):
    return delete_file(request, user, index, "+f/" + rest.rstrip("/"))


@route("DELETE", "/{user}/{index}/+e/{rest}")
def delete_hashless_file(request, user, index, rest):
    return delete_file(request, user, index, "+e/" + rest.rstrip("/"))


def delete_file(request, user, index, path):
    found = require_delete_files(request, user, index)
    request.app.releases.remove_file(found, path, "force" in request.query, request.identity.user)
    return message_response(f"package '{found.path}/{path}' deleted")


def serve_file(request, index_path, path):
    """A distribution file, its facts as JSON, or its metadata file (http-api 10)."""
    app = request.app
    index = app.indexes.find(index_path)
    if index is None:
        app.projects.refuse_gone(f"{index_path}/{path}")
        raise NotFound(f"The stage {index_path} could not be found.")
    require_read(request, index)
    if path.endswith(".metadata"):
        return serve_metadata_file(request, index, path[:-len(".metadata")])
    file, project, status = app.projects.file(index, path)
    if "application/json" in request.accept:
        return file_facts(file, project)
    refuse_quarantined(file, status)
    tags = frozenset((project_tag(index.id, project),))
    if not index.is_mirror:
        moment = http_date(seconds_of(file.uploaded))
        return blob_response(request, index, file.sha256, file.size, content_type(file.filename), moment, tags)
    request.errors = "json"
    here = app.mirrors.local(index, file)
    if here:
        return blob_response(request, index, here.sha256, here.size, content_type(file.filename), here.last_modified, tags)
    if index.config.get("mirror_use_external_urls"):
        return redirect(file.url)
    return stream_from_upstream(request, index, file)


def refuse_quarantined(file, status):
    """A quarantined project's files are not handed out (PEP 792)."""
    if status and status[0] == "quarantined":
        raise Forbidden(f"{file.filename} is quarantined upstream: {status[1] or 'no reason given'}")


def file_facts(file, project):
    facts = {"hash_spec": file.hash_spec, "hashes": file.hashes, "project": project, "version": file.version}
    if file.url:
        facts["url"] = file.url
    if file.url is None:
        facts["last_modified"] = http_date(seconds_of(file.uploaded))
    elif file.last_modified:
        facts["last_modified"] = file.last_modified
    return result_response("releasefilemeta", facts)


def serve_metadata_file(request, index, path):
    """The metadata file of a wheel (PEP 658), byte for byte as in the wheel."""
    app = request.app
    file, project, status = app.projects.file(index, path)
    refuse_quarantined(file, status)
    sha256 = app.mirrors.metadata_blob(index, file) if index.is_mirror else file.metadata_sha256
    if not sha256:
        raise NotFound(f"no metadata found in {index.path}/{path}")
    return blob_response(request, index, sha256, None, "application/octet-stream", http_date(seconds_of(file.uploaded)),
                         frozenset((project_tag(index.id, project),)))


def blob_response(request, index, sha256, size, type_, last_modified, tags):
    """A blob as an answer: immutable, with validators, in whole or one range of it (RFC 9110)."""
    etag = f'"{sha256}"'
    cache = f"max-age=365000000, immutable, {'private' if index.restricted else 'public'}"
    validators = [("ETag", etag), ("Cache-Control", cache)]
    if none_match(request.header("if-none-match"), etag):
        return Response(304, validators, tags=tags)
    file = request.app.blobs.open(sha256, size)
    size = os.fstat(file.fileno()).st_size
    headers = [("Content-Type", type_), ("Last-Modified", last_modified), *validators, ("Accept-Ranges", "bytes")]
    start, end, status = 0, size, 200
    wanted = None
    if request.method in ("GET", "HEAD") and request.header("if-range") in ("", etag, last_modified):
        wanted = parse_range(request.header("range"), size)
    if wanted == "unsatisfiable":
        file.close()
        return Response(416, [("Content-Range", f"bytes */{size}"), ("Accept-Ranges", "bytes"),
                              ("Content-Type", "text/plain; charset=utf-8")], b"the range lies outside the file\n")
    if wanted:
        start, end = wanted
        status = 206
        headers.append(("Content-Range", f"bytes {start}-{end - 1}/{size}"))
    if end - start <= Limits.small_file and request.method != "HEAD":
        with file:
            file.seek(start)
            return Response(status, headers, file.read(end - start), tags=tags)
    return Response(status, headers, parts=[FilePart(file, start, end - start)])


def none_match(header, etag):
    """Whether If-None-Match names this ETag (weak comparison)."""
    return header.strip() == "*" or etag in (tag.strip().removeprefix("W/") for tag in header.split(","))


def parse_range(header, size):
    """(start, end) of a Range header with one range; "unsatisfiable"; None where the whole is to be sent."""
    match = re.fullmatch(r"(?i:bytes)=\s*(\d{0,100})-(\d{0,100})\s*", header)
    if not match or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first and last and int(last) < int(first):
        return None
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    return (start, end) if start < end else "unsatisfiable"


def stream_from_upstream(request, index, file):
    """A mirrored file that is not here: sent on as it arrives, and kept."""
    app = request.app
    if request.method == "HEAD":
        return _upstream_head(request, index, file)
    download = app.mirrors.download(index, file)
    headers = [("Content-Type", content_type(file.filename)), ("X-Accel-Buffering", "no")]
    if download.last_modified:
        headers.append(("Last-Modified", download.last_modified))
    return Response(200, headers, stream=download.pieces(), length=download.length)


def _upstream_head(request, index, file):
    """HEAD of a file that is not here: what is known, else what upstream says; nothing is kept."""
    if request.app.settings.offline_mode:
        raise UpstreamTrouble(f"offline mode: {file.filename} is not here")
    headers = [("Content-Type", content_type(file.filename))]
    length = file.size
    if length is None:
        length = request.app.mirrors.upstream_size(index, file)
    return Response(200, headers, stream=iter(()), length=length)


# -- simple pages


@route("GET", "/{user}/{index}/+simple", "page")
def simple_list_without_slash(request, user, index):
    found = request.app.indexes.get(f"{user}/{index}")
    if request.is_installer or _simple_format(request) == SIMPLE_JSON:
        return simple_list(request, found)
    response = redirect(request.url(f"{found.path}/+simple/"))
    response.headers.append(("Vary", "User-Agent"))
    return response


@route("GET", "/{user}/{index}/+simple/", "page")
def simple_list_with_slash(request, user, index):
    return simple_list(request, request.app.indexes.get(f"{user}/{index}"))


@route("GET", "/{user}/{index}/+simple/{project}", "page")
def simple_project_without_slash(request, user, index, project):
    found = request.app.indexes.get(f"{user}/{index}")
    _check_ascii(project)
    if project != normalize(project):
        return redirect(request.url(f"{found.path}/+simple/{normalize(project)}"))
    if request.is_installer or _simple_format(request) == SIMPLE_JSON:
        return simple_project(request, found, project, 1)
    response = redirect(request.url(f"{found.path}/+simple/{project}/"))
    response.headers.append(("Vary", "Accept, User-Agent"))
    return response


@route("GET", "/{user}/{index}/+simple/{project}/", "page")
def simple_project_with_slash(request, user, index, project):
    found = request.app.indexes.get(f"{user}/{index}")
    _check_ascii(project)
    if project != normalize(project):
        return redirect(request.url(f"{found.path}/+simple/{normalize(project)}/"))
    return simple_project(request, found, project, 2)


@route("POST", "/{user}/{index}/+simple/{project}/refresh")
def refresh_project(request, user, index, project):
    """devpi: have every mirror of the order fetch the project's page anew."""
    app = request.app
    found = app.indexes.get(f"{user}/{index}")
    require_read(request, found)
    for member in app.indexes.order(found):
        if member.is_mirror:
            app.mirrors.refresh(member, normalize(project))
    return redirect(request.url(f"{found.path}/+simple/{normalize(project)}/"))


def _check_ascii(project):
    if not project.isascii():
        raise BadRequest("unicode project names not allowed")


def _simple_format(request):
    return simple_format(request.accept[:1000], request.query.get("format", "").replace(" ", "+"))


def simple_project(request, index, project, depth):
    """A project's files for installers, `depth` folders below the index's URL (PEP 503, 691, 700)."""
    app = request.app
    require_read(request, index)
    form = _simple_format(request)
    for_people = form == "text/html" and not request.is_installer
    absolute = ""
    if app.settings.absolute_urls or "x-devpi-absolute-urls" in request.headers:
        absolute = request.base_url
    key = (index.id, project, form, for_people, depth, absolute)
    rendered = app.pages.get(key)
    tags = app.projects.tags(index, project)
    if rendered is None:
        page = app.projects.page(index, project)
        if not page.known:
            raise NotFound(f"The project {project} does not exist.")
        prefix = functools.partial(link_prefix, index, depth=depth, absolute=absolute)
        if form == SIMPLE_JSON:
            rendered = Rendered(json_page(page, prefix, page.upstream_serial if index.is_mirror else None), "json", page)
        else:
            label = "html" if form == "text/html" else "v1html"
            rendered = Rendered(html_page(index, page, prefix, for_people), label, page)
        if not page.stale:
            app.store.freshness.keep(app.pages, key, rendered, 2 * len(rendered.body) + 1000, tags, request.moment,
                                     page.expires)
    for origin in rendered.origins:
        if origin.restricted:
            require_read(request, origin)
    return _page_response(request, index, rendered, form, tags)


def _page_response(request, index, rendered, form, tags):
    """A rendered page with its validators; gzipped, or 304, where the client asks for that."""
    headers = _simple_headers(form)
    etag, body = f'"{rendered.etag}"', rendered.body
    zipped = len(body) > 1024 and _quality_of_gzip(request.header("accept-encoding")) > 0
    if zipped:
        etag = f'"{rendered.etag}-gzip"'
    private = index.restricted or any(origin.restricted for origin in rendered.origins)
    if rendered.stale:
        now = http_date(time.time())
        headers += [("Cache-Control", "max-age=0, must-revalidate, no-cache, no-store"), ("Pragma", "no-cache"),
                    ("Expires", now), ("Last-Modified", now)]
        tags = None
    else:
        age = f"max-age={min(60, request.app.mirrors.expiry(index))}" if index.is_mirror else "no-cache"
        headers.append(("Cache-Control", f"private, {age}" if private else age))
    headers.append(("ETag", etag))
    if index.is_mirror and rendered.upstream_serial:
        headers.append(("X-PYPI-LAST-SERIAL", str(rendered.upstream_serial)))
    if none_match(request.header("if-none-match"), etag):
        kept = [(name, value) for name, value in headers if name in ("ETag", "Cache-Control", "Vary")]
        return Response(304, kept, tags=tags, expires=rendered.expires)
    if zipped:
        headers.append(("Content-Encoding", "gzip"))
        body = rendered.gzip()
    return Response(200, headers, body, tags=tags, expires=rendered.expires)


def _simple_headers(form):
    return [("Content-Type", HTML if form == "text/html" else form), ("Vary", "Accept, Accept-Encoding, User-Agent")]


def _quality_of_gzip(header):
    ranges = accept_ranges(",".join("x/" + coding.strip() for coding in header.split(",")))
    return ranges.get("x/gzip", ranges.get("x/*", 0))


def simple_list(request, index):
    """All project names of an index and its bases, each once (PEP 503, 691)."""
    app = request.app
    require_read(request, index)
    members = [member for member in app.indexes.order(index)
               if member is index or app.permissions.read(request.identity, member)]
    lists, stale = [], False
    for member in members:
        try:
            lists.append((member, app.projects.names(member)))
        except UpstreamTrouble as problem:
            if index.is_mirror:
                raise
            log.warning("the project list of %s is left out: %s", member.path, problem.message)
            stale = True
    whole = max((names for _, names in lists if isinstance(names, MirrorNames)), key=lambda names: names.count, default=None)
    lists = _each_name_once(lists, whole)
    if whole is None:
        return _small_list(request, index, lists, stale)
    private = any(member.restricted for member in members)
    return _large_list(request, index, lists, whole, "private, no-cache" if private else "no-cache")


def _small_list(request, index, lists, stale):
    """A project list that is made here, and kept if no mirror has a part in it."""
    form = _simple_format(request)
    names = [name for _, names in lists for name in names]
    if form == SIMPLE_JSON:
        label, body = "json", _list_in_one("projects.json", names)
    elif form == SIMPLE_HTML or request.is_installer:
        label, body = "v1html" if form == SIMPLE_HTML else "html", _list_in_one("projects.html", names)
    else:
        label, body = "people", b"".join(_list_for_people(index, lists, None))
    page = ProjectPage("", tuple((member, ()) for member, _ in lists), stale=stale)
    order = request.app.indexes.order(index)
    tags = frozenset(names_tag(member.id) for member in order)
    keep = len(lists) == len(order) and not any(member.is_mirror for member in order)
    return _page_response(request, index, Rendered(body, label, page), form, tags if keep else None)


def _list_in_one(form, names):
    head, _, tail = LIST_PAGE[form]
    return (head + list_entries(form, names) + tail).encode()


def _large_list(request, index, lists, whole, caching):
    """A project list of which the most comes from disk, as a mirror's child process wrote it."""
    form = _simple_format(request)
    entries = "projects.json" if form == SIMPLE_JSON else "projects.html"
    headers = [*_simple_headers(form), ("Cache-Control", caching)]
    own = [name for _, names in lists if names is not whole for name in names]
    if whole.serial and index.is_mirror:
        headers.append(("X-PYPI-LAST-SERIAL", str(whole.serial)))
    for_people = form == "text/html" and not request.is_installer and not index.is_mirror
    etag = f'"{hashlib.sha256(repr(own).encode()).hexdigest()[:16]}-{os.path.basename(whole.folder)}-' \
           f'{"people" if for_people else form[-4:]}'
    if not own and not for_people and _quality_of_gzip(request.header("accept-encoding")) > 0:
        headers.append(("Content-Encoding", "gzip"))
        return _parts_response(request, headers, etag + '-gzip"', [whole.part(entries + ".gz")])
    if for_people:
        return _parts_response(request, headers, etag + '"', list(_list_for_people(index, lists, whole)))
    head, separator, tail = LIST_PAGE[entries]
    before = head + list_entries(entries, own) + (separator if own and whole.count else "")
    return _parts_response(request, headers, etag + '"', [before.encode(), whole.part(entries), tail.encode()])


def _each_name_once(lists, whole):
    """The lists without names that stand in an earlier one, or in `whole`, which is sent as it is."""
    result, seen = [], set()
    for member, names in lists:
        if names is not whole:
            names = [name for name in names if name not in seen]
            seen.update(names)
            if whole is not None:
                names = whole.without(names)
        result.append((member, names))
    return result


def _parts_response(request, headers, etag, parts):
    """Byte strings and whole files (given by path), one after the other, as one answer."""
    headers.append(("ETag", etag))
    if none_match(request.header("if-none-match"), etag):
        return Response(304, [(n, v) for n, v in headers if n in ("ETag", "Cache-Control", "Vary")])
    for position, part in enumerate(parts):
        if isinstance(part, str):
            file = open(part, "rb")
            parts[position] = FilePart(file, 0, os.fstat(file.fileno()).st_size)
    return Response(200, headers, parts=parts)


def _list_for_people(index, lists, whole):
    """The project list as people see it, by index: byte strings, and the path of what `whole` has on disk."""
    title = html.escape(f"{index.path}: simple list (including inherited indices)")
    head = LIST_PAGE["projects.html"][0].replace("Simple index", title)
    yield f"{head}<h1>{title}</h1>\n".encode()
    for member, names in lists:
        bases = ",".join(member.config.get("bases", ()))
        yield f"<h2>{html.escape(member.path)}{html.escape(f' (bases: {bases})') if bases else ''}</h2>\n".encode()
        if names is whole:
            yield whole.part("projects.html")
        else:
            yield "".join([f'<a href="{name}/">{name}</a><br>\n' for name in names]).encode()
    yield b"</body></html>\n"


# -- projects and versions


@route("GET", "/{user}/{index}/{project}[/]")
def get_project(request, user, index, project):
    """devpi: all versions of a project with their metadata and files; installers get its simple page instead."""
    found = request.app.indexes.get(f"{user}/{index}")
    slash = "/" if request.path.endswith("/") else ""
    if request.is_installer:
        request.errors = "page"
        _check_ascii(project)
    if project != normalize(project):
        return redirect(request.url(f"{found.path}/{quoted(normalize(project))}{slash}"))
    if request.is_installer:
        return simple_project(request, found, project, 1 if slash else 0)
    wants_json(request)
    require_read(request, found)
    moved = without_final_slash(request)
    if moved:
        return moved
    known, versions = version_objects(request, found, project, "ignore_bases" in request.query)
    if not known:
        raise NotFound(f"no project '{project}'")
    return result_response("projectconfig", versions)


@route("GET", "/{user}/{index}/{project}/{version}[/]")
def get_version(request, user, index, project, version):
    """devpi: one version of a project."""
    found = request.app.indexes.get(f"{user}/{index}")
    if project != normalize(project):
        slash = "/" if request.path.endswith("/") else ""
        return redirect(request.url(f"{found.path}/{quoted(normalize(project))}/{version}{slash}"))
    wants_json(request)
    require_read(request, found)
    moved = without_final_slash(request)
    if moved:
        return moved
    known, versions = version_objects(request, found, project, "ignore_bases" in request.query)
    if not known:
        raise NotFound(f"no project '{project}'")
    if version not in versions:
        raise NotFound(f"The version {version} of project {project} does not exist.")
    return result_response("versiondata", versions[version])


def version_objects(request, index, project, ignore_bases):
    """(whether the project is known, {version: devpi's version object}) over an index and its bases (http-api 8)."""
    app = request.app
    contributions = app.projects.contributions(index, project)
    versions = {}
    for page in contributions.pages:
        origin, files = page.parts[0]
        if ignore_bases and origin.path != index.path:
            continue
        require_read(request, origin)
        metadata = _mirror_metadata(project, files) if origin.is_mirror else _stage_metadata(app.store, origin, project)
        for version, content in metadata.items():
            links = [_link(request, origin, file) for file in files if file.version == version]
            if links:
                content["+links"] = links
            if version in versions:
                versions[version].setdefault("+shadowing", []).append(content)
            else:
                versions[version] = content
    return bool(contributions.pages), versions


def _stage_metadata(store, index, project):
    with store.read() as db:
        rows = db.execute("SELECT version, metadata FROM releases JOIN projects ON projects.id = project_id "
                          "WHERE index_id = ? AND name = ? ORDER BY releases.id", (index.id, project)).fetchall()
    shown = {}
    for row in rows:
        metadata = json.loads(row["metadata"])
        shown[row["version"]] = {key: value for key, value in metadata.items() if key != "other"}
    return shown


def _mirror_metadata(project, files):
    """What a mirror knows of versions: their numbers, and what their files say."""
    metadata = {}
    for file in files:
        content = metadata.setdefault(file.version, {"name": project, "version": file.version})
        if file.requires_python:
            content.setdefault("requires_python", file.requires_python)
        if file.yanked is not None:
            content.setdefault("yanked", file.yanked or True)
    return metadata


def _link(request, index, file):
    link = {"rel": "releasefile", "hash_spec": file.hash_spec, "hashes": file.hashes,
            "href": request.url(f"{index.path}/{file.path}")}
    if file.history:
        link["log"] = json.loads(file.history)
    return link


@route("DELETE", "/{user}/{index}/{project}/{version}[/]")
def delete_version(request, user, index, project, version):
    found = require_delete_files(request, user, index)
    project = normalize(project)
    request.app.releases.remove_version(found, project, version, "force" in request.query, request.identity.user)
    return message_response(f"project '{project}' version '{version}' deleted")


@route("DELETE", "/{user}/{index}/{project}[/]")
def delete_project(request, user, index, project):
    found = require_delete_files(request, user, index)
    project = normalize(project)
    request.app.releases.remove_project(found, project, "force" in request.query, request.identity.user)
    return message_response(f"project {project} deleted from stage {found.path}")


# -- indexes


@route("GET", "/{user}/{index}[/]")
def get_index(request, user, index):
    """devpi: an index's configuration and projects; installers get the project list instead."""
    app = request.app
    found = app.indexes.get(f"{user}/{index}")
    if request.is_installer or _simple_format(request) == SIMPLE_JSON and "application/json" not in request.accept:
        request.errors = "page"
        return simple_list(request, found)
    wants_json(request)
    require_read(request, found)
    moved = without_final_slash(request)
    if moved:
        return moved
    config = shown_config(request, found)
    if "no_projects" in request.query:
        return result_response("indexconfig", config)
    try:
        names = app.projects.names(found)
    except UpstreamTrouble as problem:      # the configuration is worth having all the same
        log.warning("mirror %s: %s", found.path, problem.message)
        names = ()
    if not isinstance(names, MirrorNames):
        return result_response("indexconfig", {**config, "projects": sorted(names)})
    before = json.dumps({"type": "indexconfig", "result": {**config, "projects": []}})[:-len("]}}")]
    return _parts_response(request, [("Content-Type", "application/json")], f'"{secrets.token_hex(8)}"',
                           [before.encode(), names.part("names.json"), b"]}}\n"])


def shown_config(request, index):
    """An index's configuration as this caller may see it: credentials in a mirror_url are for who may change it."""
    if index.is_mirror and not request.app.permissions.index_modify(request.identity, index.user):
        return {**index.config, "mirror_url": public_url(index.config["mirror_url"])}
    return index.config


@route("PUT", "/{user}/{index}[/]")
def create_index(request, user, index):
    app = request.app
    app.indexes.refuse_existing(user, index)
    require(request, app.permissions.index_modify(request.identity, user),
            f"no permission to create index {user}/{index}")
    created = app.indexes.create(user, index, request.json(dict), who=request.identity.user)
    return result_response("indexconfig", created.config)


@route("PATCH", "/{user}/{index}[/]")
def modify_index(request, user, index):
    found = require_modify_index(request, user, index)
    body = request.json(dict, list)
    modified = request.app.indexes.modify(found, body, "error_on_noop" in request.query, who=request.identity.user)
    return result_response("indexconfig", modified.config)


@route("DELETE", "/{user}/{index}[/]")
def delete_index(request, user, index):
    found = require_modify_index(request, user, index)
    request.app.indexes.delete(found, who=request.identity.user)
    return message_response(f"index {found.path} deleted", 201)


# -- uploads


@route("POST", "/{user}/{index}[/]", "upload")
def upload(request, user, index):
    """devpi and PyPI: a form that registers a release or brings a file (http-api 9)."""
    app = request.app
    found = app.indexes.get(f"{user}/{index}")
    type_, _, parameters = request.header("content-type").partition(";")
    type_ = type_.strip().lower()
    if type_ not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise BadRequest(f"expected a form (multipart/form-data) with a field ':action', got {one_line(type_, 60)!r}")
    if found.is_mirror:
        raise NotFound("cannot submit to mirror index")
    require_upload(request, found)
    if type_ == "application/x-www-form-urlencoded":
        return _take_upload(request, found, UploadForm(None), _urlencoded_form(request.body))
    with app.blobs.incoming() as incoming:
        form = UploadForm(incoming)
        fields = form.read(request.body, _boundary(parameters))
        return _take_upload(request, found, form, fields)


def require_upload(request, index):
    if not request.app.permissions.upload(request.identity, index):
        request.refuse(Unauthorized(f"uploading to {index.path} takes a login") if request.identity.user is None
                       else Forbidden("no permission to submit"))


def _take_upload(request, index, form, fields):
    """Do what the form asks for.  Its body may have taken long: the index and the permission are looked at again."""
    index = request.app.indexes.get(index.path)
    require_upload(request, index)
    action = fields.get(":action", [None])[0]
    if action is None:
        raise BadRequest("the form has no field ':action'")
    who = request.identity.user
    if action == "submit":
        request.app.releases.register(index, fields, who)
        stored = True
    elif action == "file_upload":
        if form.filename is None:
            raise BadRequest("content file field not found")
        stored = request.app.releases.upload(index, fields, form.filename, form.incoming, who)
    else:
        raise BadRequest(f"action '{one_line(action, 60)}' not supported")
    return Response(200, [("Content-Type", HTML)], b"",
                    reason="" if stored else "Upload of identical file to non volatile index.")


def _urlencoded_form(body):
    """An urlencoded form as {field: [value, ...]}."""
    data = body.read_all(Limits.form_fields)
    try:
        return urllib.parse.parse_qs(data.decode("utf-8"), keep_blank_values=True, errors="strict",
                                     max_num_fields=Limits.form_parts)
    except ValueError as error:
        raise BadRequest(f"malformed form: {reason_of(error)}") from None


def _boundary(parameters):
    match = re.search(r"""(?:^|;)\s*boundary=(?:"([^"]{1,200})"|([^\s;"]{1,200}))""", parameters, re.IGNORECASE)
    if not match:
        raise BadRequest("the multipart form names no boundary")
    return (match[1] or match[2]).encode("latin-1")


class UploadForm:
    """Reads a multipart form piece by piece (RFC 7578): the part `content` goes to an incoming blob, fields to memory."""

    def __init__(self, incoming):
        self.incoming = incoming
        self.filename = None
        self.fields = {}
        self.size = self.parts = 0

    def read(self, body, boundary):
        """All fields as {name: [value, ...]}.  BadRequest if the form is malformed, TooLarge over its limits."""
        delimiter = b"\r\n--" + boundary
        buffer = b"\r\n" + body.read()      # the first boundary has no line before it
        while True:
            start = buffer.find(delimiter)
            if start >= 0:
                buffer = buffer[start + len(delimiter):]
                break
            buffer = self._more(body, buffer[-len(delimiter):])     # a preamble is passed over
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
            buffer = self._part(head, buffer, body, delimiter)
        while body.read():
            pass        # an epilogue is passed over
        return self.fields

    @staticmethod
    def _more(body, buffer):
        piece = body.read()
        if not piece:
            raise BadRequest("the multipart form ends before its last boundary")
        return buffer + piece

    def _part(self, head, buffer, body, delimiter):
        """Take one part; returns what follows its delimiter."""
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
            take, value = self.incoming.write, None
        elif filename is not None:      # gpg_signature
            take, value = len, None
        else:
            value = bytearray()
            take = functools.partial(self._take_field, name, value)
        while True:
            start = buffer.find(delimiter)
            if start >= 0:
                take(buffer[:start])
                if value is not None:
                    self._keep_field(name, value)
                return buffer[start + len(delimiter):]
            if len(buffer) > len(delimiter):        # its beginning may stand at the end
                take(buffer[:-len(delimiter)])
                buffer = buffer[-len(delimiter):]
            buffer = self._more(body, buffer)

    def _take_field(self, name, value, data):
        value += data
        self.size += len(data)
        if len(value) > Limits.form_field:
            raise TooLarge(f"the field {one_line(name, 60)!r} is larger than {Limits.form_field} bytes")
        if self.size > Limits.form_fields:
            raise TooLarge(f"the form's fields are larger than {Limits.form_fields} bytes")

    def _keep_field(self, name, value):
        try:
            self.fields.setdefault(name, []).append(value.decode("utf-8"))
        except UnicodeDecodeError:
            raise BadRequest(f"the field {one_line(name, 60)!r} is not UTF-8") from None


def _disposition(head):
    """(name, filename or None) of a part's Content-Disposition."""
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
            found = {key.lower(): re.sub(r'\\(["\\])', r"\1", quoted_) or plain for key, quoted_, plain in
                     re.findall(r';\s*([A-Za-z*]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))', text)}
            if "filename*" in found:
                charset, _, encoded = found["filename*"].partition("''")
                if charset.lower() == "utf-8":
                    found["filename"] = urllib.parse.unquote(encoded)
            if found.get("name"):
                return found["name"], found.get("filename")
    raise BadRequest("a part of the multipart form has no name")


# -- users


@route("GET", "/{user}[/]")
def get_user(request, user):
    moved = without_final_slash(request)
    if moved:
        return moved
    wants_json(request)
    account = request.app.users.get(user)
    return result_response("userconfig", shown_user(request, account, request.app.indexes.all(user)))


def shown_user(request, account, indexes):
    """devpi's user object, with the indexes that the caller may read."""
    shown = {"username": account.name, "created": account.created, **account.attributes}
    if account.modified:
        shown["modified"] = account.modified
    shown["indexes"] = {index.name: shown_config(request, index) for index in indexes
                        if request.app.permissions.read(request.identity, index)}
    return shown


@route("PUT", "/{user}[/]")
def create_user(request, user):
    app = request.app
    require(request, app.permissions.user_create(request.identity), f"no permission to create user {user}")
    if app.users.find(user):
        raise Conflict("user already exists")
    account = app.users.create(user, request.json(dict), who=request.identity.user)
    return result_response("userconfig", shown_user(request, account, ()), 201)


@route("PATCH", "/{user}[/]")
def modify_user(request, user):
    app, identity = request.app, request.identity
    app.users.get(user)
    body = request.json(dict)
    if set(body) == {"password"}:
        require(request, app.permissions.user_modify_password(identity, user),
                f"no permission to change password for user {user}")
    else:
        require(request, app.permissions.user_modify(identity, user), f"no permission to modify user {user}")
    account = app.users.modify(user, body, who=identity.user)
    if body.get("password") is None:
        return message_response("user updated")
    if user == "root":
        forget_root_password(app.settings.serverdir)
    token = {"password": app.logins.issue(account), "expiration": Limits.session}
    return result_response("userpassword", token, message="user updated, new proxy auth")


@route("DELETE", "/{user}[/]")
def delete_user(request, user):
    app = request.app
    app.users.get(user)
    require(request, app.permissions.user_delete(request.identity, user), f"no permission to delete user {user}")
    app.indexes.delete_user(user, who=request.identity.user)
    return message_response(f"user '{user}' deleted")


@route("GET", "/")
def get_root(request):
    """devpi: all users with all indexes."""
    wants_json(request)
    app = request.app
    with app.store.read() as db:
        accounts = [_account(row) for row in db.execute("SELECT * FROM users ORDER BY name")]
    indexes = collections.defaultdict(list)
    for index in app.indexes.all():
        indexes[index.user].append(index)
    return result_response("list:userconfig", {
        account.name: shown_user(request, account, indexes[account.name]) for account in accounts})


def forget_root_password(serverdir):
    """The file with root's first password is wrong from now on."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(serverdir, "root-password"))


# ======================================================================================================================
# 13  Commands
#
# The argument parser, one function a command, and `main`.  An option's value comes from the command line, else from the
# environment variable DEVPISERVER_<NAME>, else from its default.
# ======================================================================================================================

PYPI = {"type": "mirror", "volatile": False, "title": "PyPI", "mirror_url": "https://pypi.org/simple/",
        "mirror_web_url_fmt": "https://pypi.org/project/{name}/"}
OWN_NAMES = {"devpi_lite.db", "devpi_lite.db-wal", "devpi_lite.db-shm", "files", "tmp", "cache", ".secret", ".lock",
             ".commits", "root-password", "lost+found"}


def _boolean(text):
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
    if not text.isdigit() or int(text) > 65535:
        raise ValueError(f"{text!r} is no port: a number from 0 to 65535")
    return int(text)


def _listen_address(text):
    """`HOST:PORT`, `*:PORT`, `[::1]:PORT` as (host, port)."""
    host, colon, port = text.rpartition(":")
    if not colon:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return ("0.0.0.0" if host == "*" else host.strip("[]")), _port(port)


def _outside_url(text):
    if not re.fullmatch(r"https?://[A-Za-z0-9._~:%\[\]-]+(/[^\s\"'<>?#]*)?", text):
        raise ValueError(f"{text!r} is not an http or https URL")
    return text.rstrip("/")


def _names(text):
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _networks(text):
    return tuple(ipaddress.ip_network(part.strip(), strict=False) for part in text.split(",") if part.strip())


# name -> (type or None for a flag, default, help)
COMMON_OPTIONS = {
    "serverdir": (str, os.path.join("~", ".devpi", "server"), "directory of all data; made if missing or empty"),
    "debug": (None, False, "log more")}
INIT_OPTIONS = {
    "root-passwd": (str, None, "root's password, at the first start only; random if not given"),
    "no-root-pypi": (None, False, "don't make the mirror root/pypi at the first start")}
SERVE_OPTIONS = {
    "host": (str, "127.0.0.1", "address to listen on"),
    "port": (_port, 3141, "port to listen on; 0: any free one"),
    "listen": (_listen_address, (), "HOST:PORT to listen on, in place of --host and --port; may be repeated"),
    "outside-url": (_outside_url, "", "start of absolute links, where a proxy stands in front"),
    "absolute-urls": (None, False, "absolute file links on simple pages"),
    "trusted-proxy": (_networks, (), "addresses or networks whose X-Outside-URL and X-Real-IP count, besides loopback"),
    "restrict-modify": (_names, None, "the only users and :groups who may create and change users and indexes"),
    "mirror-cache-expiry": (_not_negative, 1800, "seconds for which a mirrored page is not asked for again"),
    "request-timeout": (_seconds, 5.0, "seconds for which a request waits for upstream"),
    "offline-mode": (None, False, "never open a connection to upstream; serve what is here"),
    "max-request-body-size": (_positive, 1 << 30, "bytes; larger bodies get 413"),
    "connections": (_positive, 4096, "connections at a time"),
    "threads": (_positive, 64, "worker threads at most"),
    "secretfile": (str, "", "file with the secret behind logins; default: .secret in the server directory"),
    "no-access-log": (None, False, "no line per request on standard output"),
    "enable-core-metadata": (None, False, "accepted for devpi's sake: always on"),
    "requests-only": (None, False, "accepted for devpi's sake"),
    "keyfs-cache-size": (int, 10000, "accepted for devpi's sake"),
    "storage": (str, "sqlite", "accepted for devpi's sake: there is one kind")}
_ALIASES = {"connections": ["--connection-limit"]}


def make_parser(command):
    """The argument parser of one command; `serve` has no word of its own."""
    name = os.path.basename(sys.argv[0] or "devpi_lite.py")
    about = {"serve": "Serve Python package indexes: python devpi_lite.py --serverdir x",
             "init": "Initialise a server directory without serving it.",
             "passwd": "Set a user's password; works while the server runs."}[command]
    commands = "commands (as first word): init, passwd" if command == "serve" else None
    parser = argparse.ArgumentParser(prog=name if command == "serve" else f"{name} {command}", description=about,
                                     epilog=commands, allow_abbrev=False)
    options = dict(COMMON_OPTIONS)
    if command in ("serve", "init"):
        options.update(INIT_OPTIONS)
    if command == "serve":
        options.update(SERVE_OPTIONS)
        parser.add_argument("--version", action="version", version=__version__)
    if command == "passwd":
        parser.add_argument("user", nargs="?", help="the user's name; asked for if not given")
        parser.add_argument("--stdin", action="store_true", help="read the password from standard input, one line")
    for option, (type_, default, text) in options.items():
        shown = f" (default: {default})" if default not in (None, False, (), "") else ""
        arguments = {"help": text + shown, "default": argparse.SUPPRESS, "dest": option}
        if type_ is None:
            arguments["action"] = "store_true"
        else:
            arguments.update(type=_for_argparse(type_), metavar=option.rpartition("-")[2].upper())
        if option == "listen":
            arguments["action"] = "append"
        parser.add_argument(f"--{option}", *_ALIASES.get(option, ()), **arguments)
    parser.set_defaults(options=options)
    return parser


def _for_argparse(type_):
    def convert(text):
        try:
            return type_(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return convert


def parse_options(command, arguments):
    """The command's options as a dict by option name: command line, environment, default."""
    parser = make_parser(command)
    for word in COMMANDS:
        if command == "serve" and word in arguments:
            parser.error(f"the command comes first: {parser.prog} {word} ...")
    values = vars(parser.parse_args(arguments))
    options = values.pop("options")
    if "listen" in values and ("host" in values or "port" in values):
        parser.error("--listen can't be combined with --host and --port")
    for option, (type_, default, _) in options.items():
        variable = "DEVPISERVER_" + option.upper().replace("-", "_")
        text = os.environ.get(variable, "")
        if option == "listen" and ("host" in values or "port" in values):
            text = ""       # the command line has said where
        if option not in values and text:
            try:
                value = (type_ or _boolean)(text)
            except ValueError as error:
                parser.error(f"{variable}: {error}")
            values[option] = [value] if option == "listen" else value
        values.setdefault(option, default)
    values["serverdir"] = os.path.abspath(os.path.expanduser(values["serverdir"]))
    return values


def make_settings(options):
    return Settings(
        serverdir=options["serverdir"], listen=tuple(options["listen"]) or ((options["host"], options["port"]),),
        outside_url=options["outside-url"], absolute_urls=options["absolute-urls"],
        trusted_proxies=options["trusted-proxy"], restrict_modify=options["restrict-modify"],
        mirror_cache_expiry=options["mirror-cache-expiry"], request_timeout=options["request-timeout"],
        offline_mode=options["offline-mode"], max_request_body_size=options["max-request-body-size"],
        connections=options["connections"], threads=options["threads"], secretfile=options["secretfile"],
        access_log=not options["no-access-log"], debug=options["debug"])


# -- the server directory


def prepare_directory(path):
    """Make the server directory, or refuse one that holds something else."""
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        names = set(os.listdir(path))
    except FileExistsError:
        raise FatalError(f"{path} is a file, not a directory") from None
    except OSError as error:
        raise FatalError(f"can't use {path}: {error.strerror}; choose another directory with --serverdir") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise FatalError(f"can't write to {path}; choose another directory with --serverdir")
    if ".nodeinfo" in names and "devpi_lite.db" not in names:
        raise FatalError(f"{path} belongs to a devpi-server: copy its data out with devpi-export and "
                         "import that into another, empty directory")
    ours = "devpi_lite.db" in names or ".lock" in names and names <= OWN_NAMES     # the latter: a first start was cut off
    foreign = sorted(names - {"lost+found"})
    if foreign and not ours:
        raise FatalError(f"{path} is neither empty nor a devpi_lite directory: it holds {', '.join(foreign[:3])}"
                         f"{' and more' if len(foreign) > 3 else ''}; choose another with --serverdir")
    if not names:
        with contextlib.suppress(PermissionError):      # somebody else's directory: the warning below says it
            os.chmod(path, 0o700)
    if os.name != "nt" and os.stat(path).st_mode & 0o077:
        log.warning("%s can be read by others: chmod 700 would stop that", path)


def take_lock(serverdir):
    """Hold the directory's lock for the life of this process; FatalError naming the process that has it."""
    file = open(os.path.join(serverdir, ".lock"), "a+")
    try:
        lock_file(file)
    except OSError:
        file.seek(0)
        pid = file.read().strip() or "unknown"
        raise FatalError(f"another server runs on {serverdir}, its process id is {pid}") from None
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def read_secret(serverdir, secretfile):
    """The secret behind session tokens, at least 32 bytes; made at the first start unless the operator names a file."""
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
        raise FatalError(f"the directory of the secret file, {folder}, can be written by others: chmod 700 would stop that")
    if os.name != "nt" and mode & 0o077:
        raise FatalError(f"the secret file {path} can be read or changed by others: chmod 600 would stop that")
    if len(secret) < 32:
        raise FatalError(f"the secret in {path} must have at least 32 bytes, it has {len(secret)}")
    if len(set(secret)) < 6:
        raise FatalError(f"the secret in {path} is too simple: it has fewer than 6 different bytes")
    return secret


def write_private(path, data):
    """Write a file that only its owner can read, whole or not at all."""
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


def initialise(store, options):
    """Make root, and root/pypi unless unwanted, as the first change (serial 0); tells root's password."""
    password = options["root-passwd"]
    if password is None:
        password = secrets.token_urlsafe(12)
        path = os.path.join(options["serverdir"], "root-password")
        write_private(path, password.encode() + b"\n")
        print(f"root's password: {password}   (kept in {path} until it is changed)")
    elif password == "":
        print("warning: root has an empty password: anybody who reaches this server can do everything", file=sys.stderr)
    store.write(_initialise, hash_password(password), not options["no-root-pypi"])


def _initialise(change, pwhash, with_pypi):
    _insert_user(change, "root", pwhash, {})
    if with_pypi:
        _insert_index(change, "root", "pypi", PYPI)


# -- commands


def command_init(arguments):
    """Initialise a server directory without serving it."""
    options = parse_options("init", arguments)
    prepare_directory(options["serverdir"])
    with take_lock(options["serverdir"]):
        with contextlib.closing(Store(options["serverdir"], create=True)) as store:
            if is_initialised(store):
                raise FatalError(f"{options['serverdir']} is initialised already")
            read_secret(options["serverdir"], "")
            initialise(store, options)
    print(f"initialised {options['serverdir']}")


def command_passwd(arguments):
    """Set a user's password; the user's sessions end."""
    options = parse_options("passwd", arguments)
    with contextlib.closing(Store(options["serverdir"])) as store:
        users = Users(store)
        name = options["user"] or _ask(input, "user: ").strip()
        if users.find(name) is None:
            raise FatalError(f"user not found: {name}")
        password = sys.stdin.readline().rstrip("\r\n") if options["stdin"] else _ask_twice(name)
        users.modify(name, {"password": password})
        if name == "root":
            forget_root_password(options["serverdir"])
    print(f"password of {name} changed")


def _ask(how, question):
    try:
        return how(question)
    except EOFError:
        raise FatalError("nobody is there to answer: name the user, and give the password with --stdin") from None


def _ask_twice(name):
    for _ in range(3):
        password = _ask(getpass.getpass, f"new password for {name}: ")
        if password == _ask(getpass.getpass, "once more: "):
            return password
        print("the two differ", file=sys.stderr)
    raise FatalError("the passwords did not agree")


def command_fetch_names(arguments):
    """Internal: fetch and parse a project list for the server, which reads the facts from standard output."""
    try:
        facts = fetch_names(json.load(sys.stdin))
    except Problem as problem:
        print(problem.message, file=sys.stderr)
        return 1
    json.dump(facts, sys.stdout)
    return 0


def command_serve(arguments):
    """Serve until SIGTERM or SIGINT."""
    options = parse_options("serve", arguments)
    settings = make_settings(options)
    logging.getLogger().setLevel(logging.DEBUG if settings.debug else logging.INFO)
    prepare_directory(settings.serverdir)
    lock = take_lock(settings.serverdir)
    listeners = [listen(host, port) for host, port in settings.listen]
    secret = read_secret(settings.serverdir, settings.secretfile)
    store = Store(settings.serverdir, create=True)
    store.commits.is_server = True
    settings = dataclasses.replace(settings, listen=tuple(listener.getsockname()[:2] for listener in listeners))
    if not is_initialised(store):
        initialise(store, options)
    elif options["root-passwd"] is not None:
        log.info("--root-passwd counts at the first start only; `passwd root` changes the password")
    app = App(settings, store, secret)
    app.blobs.clear_tmp()
    MirrorNames.clear_leftovers(app.mirrors.cache, {index.id for index in app.indexes.all()})
    server = Server(app, listeners)
    stop_on_signals(server)
    sys.setswitchinterval(0.0005)
    gc.freeze()                             # what start-up made stays, so the collector need not look at it again
    gc.set_threshold(20000, 20, 100)
    threading.Thread(target=app.access_log.run, name="access log", daemon=True).start()
    threading.Thread(target=app.clean_regularly, name="cleaner", daemon=True).start()
    threading.Thread(target=app.client.watch, name="upstream watch", daemon=True).start()
    announce(settings, app)
    server.serve_forever()
    app.mirrors.downloads.settle(2)
    app.access_log.flush()
    store.close()
    lock.close()
    return 0


def listen(host, port):
    """A listening TCP socket; FatalError with the reason if it can't be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM,
                                                      flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        if os.name != "nt":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        raise FatalError(f"can't listen on {host}:{port}: {error.strerror or error}; --host and --port choose another "
                         "address") from None
    listener.setblocking(False)
    return listener


def announce(settings, app):
    """Say where we listen and what to type next."""
    host, port = settings.listen[0]
    base = settings.outside_url or f"http://{authority('127.0.0.1' if host in ('0.0.0.0', '::') else host, port)}"
    for pair in settings.listen:
        print(f"devpi_lite {__version__} listens on http://{authority(*pair)}/ and keeps its data in {settings.serverdir}")
    if app.indexes.find("root/pypi"):
        print(f"try: pip install --index-url {base}/root/pypi/+simple/ PACKAGE")
    else:
        print(f"indexes are served at {base}/USER/INDEX/+simple/")
    if settings.restrict_modify is None and not all(
            ipaddress.ip_address(host.partition("%")[0]).is_loopback for host, _ in settings.listen):
        print("warning: anybody who reaches this address may create users; --restrict-modify root would stop that")
    sys.stdout.flush()


def stop_on_signals(server):
    def stop(number, frame):
        if server.stopping:
            os._exit(1)
        server.stop()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


COMMANDS = {"init": command_init, "passwd": command_passwd, "_fetch-names": command_fetch_names}


def main(arguments):
    """Run the command that the arguments name; returns the exit status."""
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    command = command_serve
    if arguments and arguments[0] in COMMANDS:
        command, arguments = COMMANDS[arguments[0]], arguments[1:]
    try:
        return command(arguments) or 0
    except (FatalError, Problem) as error:
        print(f"fatal: {error}", file=sys.stderr)
        return 1
    except (OSError, sqlite3.Error) as error:
        log.debug("where it happened", exc_info=True)
        print(f"fatal: {'the database: ' if isinstance(error, sqlite3.Error) else ''}{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
