#!/usr/bin/env python3
"""devpi_lite_client: the command line of private Python package indexes, in one file.

    python devpi_lite_client.py use http://127.0.0.1:3141/alice/dev
    python devpi_lite_client.py login alice
    python devpi_lite_client.py upload

It builds, uploads, lists, tests, stages, releases and installs packages, with a devpi_lite or a
devpi-server (6 or newer) as the server.  It needs Python 3.9 or newer and nothing else.  Its state
files in ~/.devpi/client are those of devpi-client, so people can switch between the two.

In CI the environment replaces `use` and `login`: set DEVPI_INDEX (a full URL), DEVPI_USER, and
DEVPI_PASSWORD or DEVPI_TOKEN.  Without a terminal the client asks no questions.  Exit status 0
means success, 1 failure, 2 a wrong command line, 130 an interruption; `install` returns the exit
status of pip or uv.

The chapters follow.  Each uses only the chapters above it.  References such as [W7.2] name rules of
tests/CONTRACT.md.

     1  Names and versions       pure functions over the terms of the packaging standards
     2  Errors and the console   exceptions with a message; output, questions, progress, JSON
     3  Files and processes      atomic writes of state files; child processes that keep secrets
     4  HTTP                     requests, proxies, certificates, redirects, retries, streams
     5  Credentials              session tokens, passwords and their sources
     6  The client               the current server and index, our login, calls to devpi's API
     7  Installers' settings     configuration files and variables of pip and uv
     8  Declaring commands       commands, arguments and help texts, each declared once
     9  Connection               use, login, logoff, env
    10  Users and indexes        user, passwd, index, project
    11  Reading                  list, getjson, patchjson
    12  Releases                 remove, yank, refresh, push
    13  Archives                 metadata of wheels and sdists; safe unpacking
    14  Building                 version control export, PEP 517, Sphinx
    15  Upload                   upload
    16  Test                     test
    17  Install                  install
    18  API tokens               token create, list, delete, derive, inspect, login
    19  Command line             the argument parser, completion and `main`
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import functools
import http.client
import inspect
import json
import operator
import os
import re
import socket
import string
import sys
import threading
import time
import typing
import urllib.parse

__version__ = "0.1.0"

# ==================================================================================================
# 1  Names and versions
#
# Pure functions: normalized names, versions and their order, requirements, core metadata, URLs.
# None of them touches a disk or a socket.  Functions that devpi_lite.py has too are the same there.
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


@functools.lru_cache(maxsize=1000)
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


_COMPARISONS = {"==": operator.eq, "!=": operator.ne, "<=": operator.le, ">=": operator.ge,
                "<": operator.lt, ">": operator.gt}


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

    return _COMPARISONS[operator](one, other)


_REQUIREMENT = re.compile(
    r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)\s*(?:\[[A-Za-z0-9._,\s-]*\])?\s*(.*)", re.DOTALL)


class Requirement(typing.NamedTuple):
    """A project and the versions of it that a person means (PEP 508 without URLs and markers)."""
    text: str
    name: str
    specifiers: str

    def admits(self, version):
        """Whether the requirement admits a version.

        Pre-releases count as any other version.  A text that is no version of PEP 440 must be
        named literally, by == or ===."""
        if parse_version(version) is not None:
            return admits(self.specifiers, version)

        clauses = [_SPECIFIER.fullmatch(clause.strip())
                   for clause in self.specifiers.split(",") if clause.strip()]
        return all(match and match[1] in ("==", "===") and match[2] == version for match in clauses)


def parse_requirement(text):
    """`name`, `name[extra]>=1,!=1.2` or `name==1.*` as a `Requirement`; None for any other text."""
    match = _REQUIREMENT.fullmatch(text.strip())
    if not match:
        return None

    specifiers = match[2].strip()
    if specifiers.startswith("(") and specifiers.endswith(")"):
        specifiers = specifiers[1:-1].strip()

    loose = [_SPECIFIER.fullmatch(clause.strip()) for clause in specifiers.split(",")]
    literal = all(clause and clause[1] in ("==", "===") and not re.search(r"[;*]", clause[2])
                  for clause in loose)
    if specifiers and not is_specifier(specifiers) and not literal:
        return None
    return Requirement(text, match[1], specifiers)


# The fields of a release's metadata in devpi's spelling.
TEXT_FIELDS = (
    "name", "version", "metadata_version", "summary", "home_page", "author", "author_email",
    "maintainer", "maintainer_email", "license", "description", "keywords", "download_url",
    "comment", "requires_python", "description_content_type", "license_expression")
LIST_FIELDS = (
    "platform", "classifiers", "supported_platform", "provides", "requires", "obsoletes",
    "project_urls", "provides_dist", "obsoletes_dist", "requires_dist", "requires_external",
    "provides_extras", "dynamic", "license_file")
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


def python_tag(filename):
    """The Python tag in a wheel's name: its third field, or the fourth after a build number.

    Counted from the front, because a variant's label may follow the platform (PEP 825)."""
    parts = filename[:-len(".whl")].split("-")
    has_build = len(parts) > 5 and parts[2][:1].isdigit()
    return parts[3] if has_build else parts[2] if len(parts) > 4 else ""


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


@functools.lru_cache(maxsize=64)
def _digest_length(algorithm):
    import hashlib
    if algorithm not in hashlib.algorithms_available or \
            not re.fullmatch(r"[a-z0-9_-]{1,20}", algorithm):
        return 0

    with contextlib.suppress(ValueError):       # OpenSSL may list what its configuration forbids
        return hashlib.new(algorithm).digest_size * 2
    return 0


def is_digest(algorithm, text):
    """Whether `text` can be a hex digest of an algorithm that can be checked here."""
    return 0 < len(text) == _digest_length(algorithm) and not text.strip(string.hexdigits)


def public_url(url):
    """The URL without credentials, for people and logs."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def masked(url):
    """The URL for output and logs: `****` replaces its password.

    A user without a password is replaced too, because it may be a token."""
    if "://" not in url:
        return re.sub(r"^[^/]*:.*@", "****@", url)
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port      # ValueError if a password contains a slash: a part of it reads as the port
    except ValueError:
        return re.sub(r"//.*@", "//****@", url)

    userinfo, at, host = parts.netloc.rpartition("@")
    if not at:
        return url
    user, colon, _ = userinfo.partition(":")
    netloc = f"{user}:****@{host}" if colon else f"****@{host}"
    return urllib.parse.urlunsplit(parts._replace(netloc=netloc))


def with_credentials(url, user, password):
    """The URL with a user and a password in it, for HTTP Basic authentication."""
    parts = urllib.parse.urlsplit(public_url(url))
    pair = f"{urllib.parse.quote(user, safe='')}:{urllib.parse.quote(password, safe='')}"
    return urllib.parse.urlunsplit(parts._replace(netloc=f"{pair}@{parts.netloc}"))


def server_of(url):
    """The URL of a URL's server, without credentials, with a slash at its end."""
    parts = urllib.parse.urlsplit(public_url(url))
    return f"{parts.scheme}://{parts.netloc}/"


def is_same_server(url, other):
    """Whether two URLs have the same origin; https on port 443 also replaces http on port 80."""
    one, other = origin_of(url), origin_of(other)
    return one == other or (one, other) == (("https", other[1], 443), ("http", one[1], 80))


def origin_of(url):
    """(scheme, host, port) of an http or https URL."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def is_below(url, root):
    """Whether a URL has the origin of `root`, and its path is the path of `root` or below it."""
    one, other = urllib.parse.urlsplit(url), urllib.parse.urlsplit(root)
    path = other.path.rstrip("/") + "/"
    return origin_of(url) == origin_of(root) and (one.path.rstrip("/") + "/").startswith(path)


def is_loopback(host):
    """Whether a host name means this machine."""
    is_ipv4_loopback = re.fullmatch(r"127(\.[0-9]{1,3}){3}", host or "") is not None
    return host in ("localhost", "::1") or is_ipv4_loopback


def path_segment(text):
    """A project's name or a version, quoted as one segment of a URL's path; `+` stays `+`."""
    return urllib.parse.quote(text, safe="+@!", errors="surrogateescape")


def index_path(name):
    """An index's name USER/NAME, quoted as the path of a URL."""
    return "/".join(map(path_segment, name.split("/")))


def basename(url):
    """The file name at the end of a URL."""
    return urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])


def credentials_of(url):
    """The Authorization header for the user and password in a URL, or None."""
    parts = urllib.parse.urlsplit(url)
    if parts.username is None:
        return None
    pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def _in_quotes(name):
    """The name of a field or file for the quotes of a Content-Disposition (WHATWG's escapes)."""
    return name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


def one_line(text, limit=300):
    """Text as one printable ASCII line, for a reason phrase or a log line."""
    text = re.sub(r"[^\x20-\x7e]+", " ",
                  text.encode("ascii", "backslashreplace").decode("ascii")).strip()
    return text if len(text) <= limit else text[:limit - 3] + "..."


_REASON_READ = 20000            # characters of a body in which `readable_reason` searches
_REASON_SHOWN = 500             # characters of the reason


def readable_reason(status, text):
    """Why a server refused a request, as one line, from the body of its response.

    The line is JSON's message, HTML's title, or the text itself; "" if it only repeats the
    status."""
    import html
    text = text[:_REASON_READ]
    phrase = http.client.responses.get(status, "")

    candidates = [text]
    if text.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(text)
            candidates = [value[key] for key in ("message", "detail", "error")
                          if isinstance(value.get(key), str)] + [text]
    elif re.search(r"<(html|!doctype|head|title|body|h1|p)\b", text, re.IGNORECASE):
        flags = re.DOTALL | re.IGNORECASE
        text = re.sub(r"<(script|style)\b.*?</\1>|<!--.*?-->", " ", text, flags=flags)
        title = re.search(r"<title\b[^>]*>([^<]*)", text, flags)
        body = re.sub(r"<(head|title)\b.*?</\1\s*>", " ", text, flags=flags)
        candidates = [html.unescape(title[1] if title else ""),
                      html.unescape(re.sub(r"<[^>]*>", " ", body))]

    for candidate in candidates:
        line = " ".join(printable(candidate).split())
        line = re.sub(rf"^(HTTP\S* )?{status}\b[\s:,-]*", "", line)
        if line and line.lower() != phrase.lower():
            return line if len(line) <= _REASON_SHOWN else line[:_REASON_SHOWN - 3] + "..."
    return ""


def reason_of(error):
    """An exception as a few words."""
    if isinstance(error, (TimeoutError, socket.timeout)):
        return "timed out"
    return one_line(str(error) or type(error).__name__, 200)


def byte_size(count):
    """A number of bytes in readable form: `512 bytes`, `1.5 MB`."""
    if count < 1000:
        return f"{count} bytes"
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if count < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if count >= 9.95 else f"{count:.1f} {unit}"


def printable(text):
    """The text without characters that control a terminal; `?` replaces each of them.

    They move the cursor, change colours or turn the writing direction.  Line breaks and tabs
    stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", "?",
                  text.replace("\r\n", "\n"))


def shell_quoted(text):
    """The text as one word of a shell's command line, which people copy from a message."""
    import shlex
    return shlex.quote(text)


# ==================================================================================================
# 2  Errors and the console
#
# An error is an exception that carries a sentence for the person who reads it, and the exit status
# of the program; `main` prints it.  The console is the only place that writes to the terminal or
# asks a question: results, messages, questions, progress, JSON.
# ==================================================================================================


class Failure(Exception):
    """Ends a command.  The message says what was wrong, with which value, and what to do next.

    `hint` is a further line, which is not printed in red; `code` is the exit status."""
    def __init__(self, message, hint="", code=1):
        super().__init__(message)
        self.message, self.hint, self.code = message, hint, code


class UsageError(Failure):
    """A wrong command line; the exit status is 2."""
    def __init__(self, message):
        super().__init__(message, code=2)


class Unreachable(Failure):
    """A server that sent no response.  `sent`: whether the server may have received the request."""
    def __init__(self, url, reason, sent=False, hint=""):
        super().__init__(f"could not connect to '{public_url(url)}':\n{reason}", hint)
        self.sent = sent


class Refused(Failure):
    """A response with an error status.  `text` is the message of the server, or ""."""
    def __init__(self, response, message, hint="", body=""):
        text = f"{response.method} {public_url(response.url)}\n{response.status} {response.reason}"
        text += (f": {message}" if message else "") + (f"\n{body}" if body else "")
        super().__init__(text, hint)
        self.status, self.reason, self.text = response.status, response.reason, message


class OutputClosed(Exception):
    """The reader of the results has gone, as in `devpi list | head -1`."""


_STYLES = {"bold": "\x1b[1m", "warning": "\x1b[1m\x1b[33m", "error": "\x1b[31m"}


class Console:
    """Standard output and standard error.

    With --json, standard output gets one JSON document, and standard error gets all the rest.  A
    message that can't be written is dropped: an upload goes on although the reader of its log has
    gone."""

    def __init__(self, options=None):
        self.as_json = getattr(options, "json", False)
        self.quiet = getattr(options, "quiet", False)
        self.verbose = getattr(options, "verbose", 0)
        self.is_debug = getattr(options, "debug", False)
        self.assume_yes = getattr(options, "yes", False)
        self.color = getattr(options, "color", "auto")
        self.results = sys.stdout
        self.messages = sys.stderr if self.as_json else sys.stdout
        wants_stderr = self.as_json or os.environ.get("DEVPI_LITE_STDERR") == "1"
        self.errors = sys.stderr if wants_stderr else sys.stdout
        chosen = getattr(options, "chosen", None)
        if chosen and chosen.is_for_shells:     # a shell runs all of standard output
            self.messages = self.errors = sys.stderr

        self.shows_progress = not (self.quiet or getattr(options, "no_progress", False))
        self.lock = threading.RLock()
        self.progress_line = None       # the Progress that is drawn in the terminal's last line
        self.json_printed = False

    # -- lines

    def print_result(self, text, style=None):
        """Print a line of the result that was asked for; OutputClosed if its reader has gone."""
        if not self.as_json:
            self._write(self.results, text, style, drop=False)

    def say(self, text, style=None):
        """Print a message about progress; -q suppresses it."""
        if not self.quiet:
            self._write(self.messages, text, style)

    def info(self, text):
        self.say(text, "bold")

    def warn(self, text):
        self._write(self.messages, text, "warning")

    def warn_on_stderr(self, text):
        """Print a warning to standard error, even if messages go to standard output.

        Standard output then holds only the result, for a program that reads it."""
        self._write(sys.stderr, text, "warning")

    def error(self, text):
        self._write(self.errors, text, "error")

    def failure(self, failure):
        """Print a `Failure` and its hint."""
        self.error(failure.message)
        if failure.hint:
            self.hint(failure.hint)

    def hint(self, text):
        """Print what to do next, below an error."""
        self._write(self.errors, text, None)

    def debug(self, text):
        if self.is_debug:
            self._write(self.messages, f"[debug] {text}", None)

    def print_json(self, value):
        """Print the JSON document of a command; without --json do nothing."""
        if self.as_json:
            self.json_printed = True
            self._write(self.results, json.dumps(value, indent=2), None, drop=False)

    def print_names(self, names):
        """Print names, sorted, one on a line; with --json as one document."""
        names = sorted(names)
        for name in names:
            self.print_result(name)
        self.print_json(names)

    def write_bytes(self, data):
        """Write output of a child process unchanged."""
        with self.lock:
            self._clear_progress()
            try:
                self.messages.flush()
                getattr(self.messages, "buffer", self.messages).write(data)
                self.messages.flush()
            except (OSError, ValueError):
                silence(self.messages)      # messages are dropped

    def _write(self, stream, text, style, drop=True):
        """Write a text as lines of a style; `drop`: whether to drop it if it can't be written.

        Otherwise OutputClosed if the reader has gone, or a Failure."""
        text = printable(str(text))
        if style and self._is_colored(stream):
            text = "\n".join(f"{_STYLES[style]}{line}\x1b[0m" for line in text.split("\n"))
        with self.lock:
            self._clear_progress()
            try:
                stream.write(text + "\n")
                stream.flush()
            except (OSError, ValueError) as error:
                silence(stream)
                if not drop and isinstance(error, (BrokenPipeError, ValueError)):
                    raise OutputClosed from None
                if not drop:
                    self.errors = sys.stderr
                    raise Failure(f"the output can't be written: {error.strerror}") from None
            if self.progress_line:
                self.progress_line.draw()

    def _is_colored(self, stream):
        """Whether to colour a stream, by --color, PY_COLORS, NO_COLOR and TERM, in this order."""
        if self.color != "auto":
            return self.color == "yes"
        wanted = os.environ.get("PY_COLORS")
        if wanted in ("0", "1"):
            return wanted == "1"
        if "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb":
            return False
        return _is_terminal(stream)

    def _clear_progress(self):
        if self.progress_line:
            self.progress_line.clear()

    def print_table(self, rows):
        """Print rows of texts in columns; on a terminal, cut lines to its width."""
        import shutil
        widths = [max(map(len, column)) for column in zip(*rows)]
        limit = shutil.get_terminal_size().columns if _is_terminal(self.results) else None
        for row in rows:
            line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
            is_short = limit is None or len(line) <= limit
            self.print_result(line if is_short else line[:limit - 3] + "...")

    # -- questions

    def confirm(self, question):
        """Whether the person answers yes to a question; -y answers yes.

        A Failure at the end of input."""
        prompt = f"{question} (yes/no)? "
        if self.assume_yes:
            self._write(self.messages, f"{prompt}yes (autoset from -y option)", None)
            return True
        if _is_terminal(sys.stdin) and "CI" in os.environ:
            raise Failure("no input available, use -y to confirm")
        while True:
            answer = self._ask(prompt).strip()
            if answer in ("yes", "no"):
                return answer == "yes"
            self.error(f"not a valid choice '{answer}'")

    def confirm_deletion(self, document):
        """Whether the person is sure; if not, print `document` as the command's JSON document."""
        if self.confirm("Are you sure"):
            return True
        self.error("not deleting anything")
        self.print_json(document)
        return False

    def _ask(self, prompt):
        """A line of standard input; a Failure at its end."""
        self.messages.write(prompt)
        self.messages.flush()
        line = sys.stdin.readline() if sys.stdin else ""
        if not line.endswith("\n"):
            self.messages.write("\n")
        if not line:
            raise Failure("no input available, use -y to confirm")
        return line

    def is_interactive(self):
        """Whether a person may be there to type a password."""
        return _is_terminal(sys.stdin) and "CI" not in os.environ

    def ask_password(self, prompt):
        """A password that the person types without echo; only if `is_interactive()`."""
        import getpass
        try:
            return getpass.getpass(prompt)
        except EOFError:
            raise Failure("no input available") from None


def _is_terminal(stream):
    try:
        return stream is not None and stream.isatty()
    except ValueError:      # closed
        return False


def silence(stream):
    """Redirect a standard stream whose reader has gone to nowhere.

    Without that, Python complains when it flushes the stream at exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class Progress:
    """The progress of transfers: a bar on a terminal, elsewhere a line every half minute.

    `total`: the number of bytes, or None if it is unknown."""

    WIDTH, REDRAW_SECONDS, LINE_SECONDS = 24, 0.1, 30

    def __init__(self, console, label, total):
        self.console, self.label, self.total, self.done = console, printable(label), total, 0
        self.started = self.drawn = time.monotonic()
        self.bar = console.shows_progress and _is_terminal(sys.stderr)
        self.is_drawn = False

    def __enter__(self):
        if self.bar:
            self.console.progress_line = self
        return self

    def __exit__(self, *_):
        with self.console.lock:
            self.clear()
            if self.console.progress_line is self:
                self.console.progress_line = None

    def advance(self, count):
        """Count bytes that were transferred; a negative `count` takes bytes back before a retry."""
        with self.console.lock:
            self.done += count
            now = time.monotonic()
            if now - self.drawn < (self.REDRAW_SECONDS if self.bar else self.LINE_SECONDS):
                return
            self.drawn = now
            if self.bar:
                self.draw()
            elif self.console.shows_progress:
                self.console.say(f"  {self.text()}")

    def text(self):
        """The transferred part, the size and the rate, as one line."""
        seconds = max(time.monotonic() - self.started, 0.001)
        rate = f"{byte_size(int(max(self.done, 0) / seconds))}/s"
        if not self.total:
            return f"{self.label} {byte_size(self.done)} {rate}"
        percent = 100 * min(self.done, self.total) // self.total
        return f"{self.label} {percent:3d}% of {byte_size(self.total)} {rate}"

    def draw(self):
        import shutil
        filled = min(self.WIDTH, self.WIDTH * self.done // self.total) if self.total else 0
        line = f"[{'#' * filled}{'.' * (self.WIDTH - filled)}] {self.text()}"
        self._put("\r" + line[:shutil.get_terminal_size().columns - 1] + "\x1b[K")
        self.is_drawn = True

    def clear(self):
        if self.is_drawn:
            self._put("\r\x1b[K")
            self.is_drawn = False

    def _put(self, text):
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()


# ==================================================================================================
# 3  Files and processes
#
# State files are replaced atomically, and only their owner can read them.  Only this chapter starts
# child processes.  A secret reaches a child in its environment or in a private file, never on its
# command line, and is printed as asterisks.
# ==================================================================================================


PIECE = 256 << 10               # bytes read from a disk or a socket at once
_MAX_NUMBER_DIGITS = 400        # of a whole number in JSON: int() takes quadratic time for it


def parse_json(data):
    """The value of a JSON text (str or bytes).

    ValueError if the text is no JSON, nests too deeply, or has a number of too many digits."""
    try:
        return json.loads(data, parse_int=_parse_int)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _parse_int(text):
    if len(text) > _MAX_NUMBER_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


class StateFile:
    """A JSON object on disk, which devpi-client reads and writes too.

    The format is devpi-client's: two spaces of indent, sorted keys.  Unknown keys are kept."""

    def __init__(self, path):
        self.path = path

    def read(self):
        """The object; {} if the file is missing, empty, or holds another JSON value.

        A Failure if it is no JSON: we must not throw away what a person may want to repair."""
        try:
            with open(self.path, "rb") as file:
                text = file.read().decode("utf-8")
            value = parse_json(text) if text.strip() else {}
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise Failure(f"{self.path} is broken: {error}",
                          "mend it or delete it; then 'devpi use URL' and 'devpi login USER'"
                          ) from None
        return value if isinstance(value, dict) else {}

    def change(self, edit):
        """Let `edit` change the object in place, and write the object if it differs.

        `edit` may be called twice, each time with a fresh copy."""
        if self._edited(edit) is None:
            return
        with _locked(self.path):        # another process may have changed it meanwhile
            value = self._edited(edit)
            if value is not None:
                write_private(self.path, json.dumps(value, indent=2, sort_keys=True))

    def _edited(self, edit):
        """The object as `edit` changes it; None if nothing changes."""
        before, after = self.read(), self.read()
        edit(after)
        return after if after != before else None


_LOCK_SECONDS = 20              # how long to wait for another process
_OLD_TEMPORARY_SECONDS = 3600   # the age at which a temporary file counts as left over


@contextlib.contextmanager
def _locked(path):
    """Hold an advisory lock for a file: on its directory, on Windows on `NAME.lock` beside it.

    Deletes temporary files that killed processes have left.  A Failure if another process holds
    the lock for 20 seconds."""
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    with contextlib.ExitStack() as stack:
        try:
            os.makedirs(folder, exist_ok=True)
            if os.name == "nt":
                handle = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
            else:
                handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)        # which releases the lock

            until = time.monotonic() + _LOCK_SECONDS
            while not _try_lock(handle):
                if time.monotonic() > until:
                    raise Failure(f"{path} can't be changed: another process has been at it for "
                                  f"{_LOCK_SECONDS} seconds")
                time.sleep(0.05)
        except OSError as error:
            raise Failure(f"{path} could not be written: {error.strerror or error}") from None

        for entry in os.listdir(folder):
            if entry.startswith(f".{name}-"):
                temporary = os.path.join(folder, entry)
                with contextlib.suppress(OSError):      # another process has deleted it
                    if time.time() - os.stat(temporary).st_mtime > _OLD_TEMPORARY_SECONDS:
                        os.unlink(temporary)
        yield


def _try_lock(handle):
    """Lock an open file or directory; returns whether that worked.

    A file system without locks counts as unlocked."""
    import errno
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        no_locks = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
        if error.errno not in no_locks:
            raise
    return True


def write_private(path, text):
    """Replace a text file atomically; only its owner can read it."""
    write_atomically(path, text, 0o600)


def write_atomically(path, text, mode=None):
    """Replace a text file: readers see the old content or the new content, never a mixture.

    `mode`: the permissions; None keeps those of the file, or takes those of new files.  A Failure
    if the file can't be written."""
    import tempfile
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):       # never replace /dev/null
        raise Failure(f"{path} could not be written: it is no regular file")
    os.makedirs(os.path.dirname(path), exist_ok=True)

    if mode is None and os.path.exists(path):
        mode = os.stat(path).st_mode & 0o7777
    elif mode is None:
        mode = 0o666 & ~_current_umask()

    handle, temporary = tempfile.mkstemp(
        prefix=f".{os.path.basename(path)}-", dir=os.path.dirname(path))
    try:
        with open(handle, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as error:
        raise Failure(f"{path} could not be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)        # fails after os.replace, which is fine


@contextlib.contextmanager
def writing(path):
    """Turns an OSError of code that writes a file into a Failure that names the file."""
    try:
        yield
    except OSError as error:
        other = f" ({error.filename})" if error.filename not in (None, path) else ""
        reason = error.strerror or error
        raise Failure(f"{path} could not be written: {reason}{other}") from None


class OutputFile:
    """A new binary file.

    It is unbuffered: a full disk raises the Failure in `write`, not when the file is closed."""

    def __init__(self, path):
        self.name = path
        with writing(path):
            self.file = open(path, "wb", buffering=0)
        self.tell, self.seek, self.truncate = self.file.tell, self.file.seek, self.file.truncate

    def write(self, data):
        left = memoryview(data)
        with writing(self.name):
            while left:
                left = left[self.file.write(left):]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with writing(self.name):
            self.file.close()


def _current_umask():
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def temporary_directory():
    """A directory that only its owner can enter; it is removed with its content."""
    import shutil
    import tempfile
    path = os.path.realpath(tempfile.mkdtemp(prefix="devpi-"))
    try:
        yield path
    finally:
        def make_writable(function, name, _):
            with contextlib.suppress(OSError):
                os.chmod(os.path.dirname(name), 0o700)
                os.chmod(name, 0o700)
                function(name)
        option = "onexc" if sys.version_info >= (3, 12) else "onerror"
        shutil.rmtree(path, **{option: make_writable})


def display_path(path):
    """The path with `~` for the home directory."""
    home = os.path.expanduser("~")
    return "~" + path[len(home):] if len(home) > 1 and path.startswith(home + os.sep) else path


def scripts_directory(venv):
    return os.path.join(venv, "Scripts" if os.name == "nt" else "bin")


def venv_python(venv):
    """The path of a virtual environment's Python."""
    return os.path.join(scripts_directory(venv), "python.exe" if os.name == "nt" else "python")


def find_program(name, venv=None):
    """The path of a program in a virtual environment, or without `venv` in PATH, or None."""
    import shutil
    return shutil.which(name, path=scripts_directory(venv) if venv else None)


class CompletedChild(typing.NamedTuple):
    """A child process that has ended; `output` is "" unless it was captured."""
    code: int
    output: str


def run_child(console, command, *, cwd=None, env=None, unset=(), show=None, capture=False,
              errors="replace"):
    """Run a program to its end; returns a `CompletedChild`.  A Failure if it can't be started.

    `env` adds variables to our environment, `unset` removes variables; DEVPI_PASSWORD and
    DEVPI_TOKEN are never passed on.  `show` prints the command as
    `--> DIRECTORY$ COMMAND  [NAME='value',...]` with the variables that it names; credentials in
    URLs are masked.  `capture` returns the output, decoded with `errors`, and prints nothing."""
    import shlex
    import subprocess
    private = {"DEVPI_PASSWORD", "DEVPI_TOKEN", *unset}
    environment = {name: value for name, value in os.environ.items() if name not in private}
    environment.update(env or {})

    words = " ".join(map(shlex.quote, command))
    if show is not None:
        pairs = ",".join(f"{name}='{_mask_credentials(environment[name])}'"
                         for name in show if name in environment)
        console.say(f"--> {display_path(cwd or '.')}$ {words}" + (f"  [{pairs}]" if pairs else ""))
    else:
        console.debug(f"--> {cwd or '.'}$ {words}")
    sys.stdout.flush()

    output_pipe = None if not console.as_json and not capture else subprocess.PIPE
    try:
        child = subprocess.Popen(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL if capture else None,
            stdout=output_pipe, stderr=subprocess.STDOUT if output_pipe is not None else None)
    except OSError as error:
        raise Failure(f"could not run {command[0]}: {error.strerror or error}") from None

    try:
        if capture:
            output = child.communicate()[0]
            return CompletedChild(child.returncode, output.decode("utf-8", errors))
        if output_pipe is not None:
            # Read pieces, not lines: a line may have no end.
            for piece in iter(lambda: child.stdout.read1(PIECE), b""):
                console.write_bytes(piece)
        return CompletedChild(child.wait(), "")
    except BaseException:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        raise


def _mask_credentials(url):
    """The text with `****:****` for user and password of a URL.  (`masked` shows the user.)"""
    return re.sub(r"(://)[^/@]*@", r"\1****:****@", url)


# ==================================================================================================
# 4  HTTP
#
# All requests go through this chapter.  Certificates are always verified.  Proxies and CA bundles
# come from the usual variables.  Credentials are computed for the URL of each request, so that a
# redirect never carries them to another server.  Bodies are streams.
# ==================================================================================================

_USER_AGENT = (f"devpi-lite-client/{__version__} devpi-client-compatible "
               f"(py{'.'.join(map(str, sys.version_info[:3]))}; {sys.platform})")
_CONNECT_SECONDS = 30
_RESPONSE_SECONDS = 120         # of silence; --timeout changes it, `may_take_long` ignores it
RETRY_PAUSES = (0.3, 1.0)       # seconds before the second and the third attempt
RESPONSE_LIMIT = 256 << 20      # bytes of a response that is read into memory
DOWNLOAD_LIMIT = 8 << 30        # bytes of a response that is written into a file
_MAX_REDIRECTS = 10
CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT", "SSL_CERT_FILE", "SSL_CERT_DIR")


def checked_url(text):
    """The URL; a Failure if it is no http or https URL, or has characters outside RFC 3986."""
    try:
        parts = urllib.parse.urlsplit(text)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 \
                and not re.search(r"""[^!-~]|["'<>\\^`{|}]""", text):
            return text
    except ValueError:
        pass
    raise Failure(f"'{masked(text)}' is no http or https URL")


def resolve_link(base, link):
    """The URL of a link in a response from the URL `base`; Failures as in `checked_url`."""
    try:
        return checked_url(urllib.parse.urljoin(base, link))
    except ValueError:
        raise Failure(f"'{masked(link)}' is no http or https URL") from None


class Response(typing.NamedTuple):
    """An HTTP response; `url` is that of the last request, after redirects."""
    method: str
    url: str
    status: int
    reason: str
    headers: typing.Any
    body: bytes

    def json(self):
        """The value of a body of the type application/json, or None."""
        if self.headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
            return None
        try:
            return parse_json(self.body)
        except ValueError:
            return None

    def message(self):
        """The `message` of a JSON object, without blank lines, or ""."""
        value = self.json()
        text = str(value.get("message") or "") if isinstance(value, dict) else ""
        return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


class Stream:
    """A request body of `length` bytes.  `pieces()` starts anew for each attempt."""
    length = 0

    def pieces(self):
        raise NotImplementedError


_SERIAL_SECONDS = 3600          # how long a replica may take to catch up with what we changed


class Serials:
    """What we have changed lately: reads ask a replica for it, so that they see it.

    A change has a serial, which counts for the server that made it, the primary, and for all its
    replicas.  `file` keeps the serials for the next commands, with the servers that name this
    primary: {uuid of the primary: {"serial": ..., "time": ..., "servers": [...]}}; None keeps
    nothing."""

    def __init__(self, file=None):
        self.file, self.lock = file, threading.Lock()
        self.serials = {}       # {uuid: (serial, time.time() of the change)}
        self.primaries = {}     # {server: uuid of its primary}
        self.forgotten = {}     # {uuid: serial that the primary no longer has}
        self.is_changed = False
        for uuid, entry in self._valid(self._read()):
            self.serials[uuid] = entry["serial"], entry["time"]
            self.primaries.update(dict.fromkeys(entry["servers"], uuid))

    def _read(self):
        with contextlib.suppress(Failure, OSError):     # nothing of worth is in a broken file
            return self.file.read() if self.file else {}
        return {}

    @staticmethod
    def _valid(data):
        """[(uuid, entry), ...] of the file's object, without old and malformed entries."""
        for uuid, entry in data.items():
            if isinstance(entry, dict) and type(entry.get("serial")) is int \
                    and 0 <= entry["serial"] < 10 ** 18 and type(entry.get("time")) is int \
                    and abs(time.time() - entry["time"]) < _SERIAL_SECONDS \
                    and isinstance(entry.get("servers"), list):
                yield uuid, {**entry, "servers": [each for each in entry["servers"]
                                                  if isinstance(each, str)]}

    def headers(self, url):
        """The header by which a read at a URL asks for what we have changed."""
        known = self.serials.get(self.primaries.get(self._server(url)))
        return {"X-DEVPI-MIN-SERIAL": str(known[0])} if known else {}

    def note(self, response, sent):
        """Note what a response says; returns whether it is older than what we have changed, so that
        it is worth asking again.  `sent`: the headers of its request."""
        uuid = response.headers.get("X-DEVPI-PRIMARY-UUID") or ""
        serial = response.headers.get("X-DEVPI-SERIAL") or ""
        if not re.fullmatch("[0-9a-f]{32}", uuid) or not re.fullmatch("[0-9]{1,18}", serial):
            return False
        serial, server = int(serial), self._server(response.url)
        with self.lock:
            is_new, self.primaries[server] = self.primaries.get(server) != uuid, uuid
            known = self.serials.get(uuid)
            if response.method not in ("GET", "HEAD"):
                if response.status < 400 and not response.url.endswith("/+login") \
                        and (known is None or serial >= known[0]):
                    self.serials[uuid] = serial, int(time.time())
                    self.is_changed = True
                return False
            if known is None:
                return False
            self.is_changed = self.is_changed or is_new
            if serial >= known[0] or response.status >= 500:
                return False
            if sent.get("X-DEVPI-MIN-SERIAL") != str(known[0]):
                return True
            # the primary does not have it: it was restored from an older backup
            self.forgotten[uuid] = self.serials.pop(uuid)[0]
            self.is_changed = True
            return False

    @staticmethod
    def _server(url):
        return "%s://%s:%d" % origin_of(url)

    def save(self):
        """Keep the serials for the next commands; where nothing can be written, nothing is kept."""
        if not self.is_changed or self.file is None:
            return
        self.is_changed = False
        with contextlib.suppress(Failure, OSError):
            try:
                self.file.change(self._merge)
            except Failure:
                write_private(self.file.path, "{}")
                self.file.change(self._merge)

    def _merge(self, data):
        """Put our serials among those of other processes."""
        entries = {uuid: entry for uuid, entry in self._valid(data)
                   if entry["serial"] > self.forgotten.get(uuid, -1)}
        for uuid, (serial, moment) in self.serials.items():
            other = entries.get(uuid, {"serial": -1, "time": 0, "servers": []})
            if other["serial"] < serial:
                other.update(serial=serial, time=moment)
            here = {server for server, primary in self.primaries.items() if primary == uuid}
            entries[uuid] = {**other, "servers": sorted({*other["servers"], *here})[:20]}
        data.clear()
        data.update(entries)


class Http:
    """Sends requests over keep-alive connections, one for each thread and server."""

    def __init__(self, console, timeout=None, client_cert=lambda url: None, serials=None):
        self.console, self.timeout, self.client_cert = console, timeout, client_cert
        self.serials = serials or Serials()
        self.local = threading.local()
        self.last_url = None            # the URL of the last response

    def request(self, method, url, headers=None, body=None, *, credentials=lambda url: {},
                may_take_long=False, may_retry=None, follow_redirects=True, sink=None):
        """Send a request and follow redirects; returns the `Response`, whatever its status.

        `credentials(url)`: the headers that authenticate us at that URL.  `may_take_long`: wait
        for the response without a limit, unless --timeout sets one.  `may_retry`: send the
        request again after a broken connection; None allows that for GET and HEAD.  `sink`: an
        `OutputFile` that takes the body of a response with status 200.

        Unreachable if no response came, a Failure for other errors."""
        may_retry = method in ("GET", "HEAD") if may_retry is None else may_retry
        for _ in range(_MAX_REDIRECTS):
            response = self._send_for_new_enough(
                method, url, {"User-Agent": _USER_AGENT, **(headers or {}), **credentials(url)},
                body, may_take_long, may_retry, sink)
            self.last_url = public_url(url)
            self.console.debug(f"{method} {self.last_url} -> {response.status} {response.reason}")

            is_redirect = response.status in (301, 302, 303, 307, 308) \
                and response.headers.get("Location")
            if not is_redirect or not follow_redirects:
                return response
            url = self._redirect_target(method, url, response)
        raise Failure(f"{public_url(url)}: more than {_MAX_REDIRECTS} redirects")

    @staticmethod
    def _redirect_target(method, url, response):
        """The URL that a redirect leads to; a Failure if we must not follow it.

        A request with a body, which may hold a password, never goes to another server."""
        location = urllib.parse.quote(
            response.headers.get("Location"), safe="%/:=&?~#+!$,;@()*[]", encoding="latin-1")
        try:
            target = resolve_link(public_url(url), location)
        except Failure:
            raise Failure(f"{public_url(url)} redirects to '{masked(location)}', "
                          "which is no http URL") from None

        keeps_method = response.status in (307, 308)
        if method not in ("GET", "HEAD") and \
                (not keeps_method or origin_of(target) != origin_of(url)):
            raise Failure(f"{method} {public_url(url)}\nis redirected to {public_url(target)}",
                          "type 'devpi use' with the address that the server goes by: "
                          + shell_quoted(server_of(target)))
        return target

    def _send_for_new_enough(self, method, url, headers, body, may_take_long, may_retry, sink):
        """Send the request; once more if a replica responds from before what we have changed."""
        while True:
            sent = {**self.serials.headers(url), **headers}
            start = sink.tell() if sink else 0
            response = self._send_with_retries(
                method, url, sent, body, may_take_long, may_retry, sink)
            if not self.serials.note(response, sent) or "X-DEVPI-MIN-SERIAL" in headers \
                    or sink and sink.tell() > start:
                return response         # a file has one content only
            self.console.debug(f"{method} {public_url(url)}: older than what was changed; "
                               "asking again")

    def _send_with_retries(self, method, url, headers, body, may_take_long, may_retry, sink):
        """Send the request; pause and send it again after errors that may be temporary."""
        for pause in (*RETRY_PAUSES, None):
            start = sink.tell() if sink else 0
            try:
                response = self._send_once(method, url, headers, body, may_take_long, sink)
                is_temporary = response.status in (502, 503, 504) and method in ("GET", "HEAD")
                if not is_temporary or pause is None:
                    return response
                reason = f"{response.status} {response.reason}"
            except Unreachable as failure:
                if pause is None or not may_retry and failure.sent:
                    raise
                reason = failure.message.rpartition("\n")[2]

            if sink:
                sink.seek(start)
                sink.truncate()
            self.console.debug(f"{method} {public_url(url)}: {reason}; trying again")
            time.sleep(pause)

    def _send_once(self, method, url, headers, body, may_take_long, sink):
        """Send the request once, over a kept connection if it is still open."""
        key, connections = self._connection_key(url), self._kept_connections()
        connection = connections.pop(key, None)
        if connection is not None and self._has_input(connection):
            connection.close()      # the server has closed it
            connection = None

        sent = False
        try:
            if connection is None:
                connection = self._connect(url)
            connection.sock.settimeout(self.timeout or _RESPONSE_SECONDS)
            sent = True
            self._write_request(connection, method, url, headers, body)
            if may_take_long:
                connection.sock.settimeout(self.timeout)
            response = connection.getresponse()
            content = self._read_body(response, sink if response.status == 200 else None)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if connection is not None:
                connection.close()
            raise self._connection_failure(url, error, sent) from error
        except BaseException:
            if connection is not None:
                connection.close()
            raise

        if response.will_close or getattr(connection, "cut_short", False):
            connection.close()
        else:
            connections[key] = connection
        return Response(method, url, response.status, response.reason, response.headers, content)

    def _write_request(self, connection, method, url, headers, body):
        """Write the request; stop early if the server responds before it has read the body.

        `connection.cut_short` then says that the connection can't be used again."""
        parts = urllib.parse.urlsplit(public_url(url))
        path = urllib.parse.quote(parts.path or "/", safe="/%+@!:=,;~$&'()*")
        target = path + (f"?{parts.query}" if parts.query else "")
        proxy = proxy_for(url)
        if proxy and parts.scheme == "http":
            target = f"http://{parts.netloc}{target}"
            if credentials_of(proxy):
                headers = {**headers, "Proxy-Authorization": credentials_of(proxy)}

        connection.putrequest(method, target)       # adds "Accept-Encoding: identity"
        for name, value in headers.items():
            connection.putheader(name, value)
        if body is not None or method not in ("GET", "HEAD", "DELETE"):
            length = body.length if isinstance(body, Stream) else len(body or b"")
            connection.putheader("Content-Length", str(length))

        try:
            connection.endheaders()
            for piece in body.pieces() if isinstance(body, Stream) else [body] if body else []:
                # Over TLS, input may be a session ticket.  Over TCP it is an early response,
                # which refuses the request.
                if parts.scheme == "http" and self._has_input(connection):
                    connection.cut_short = True
                    break
                connection.send(piece)
        except (BrokenPipeError, ConnectionResetError):
            # The response may have arrived; if it has not, getresponse() raises the error.
            connection.cut_short = True

    def _read_body(self, response, sink):
        """The body, or b"" if the sink has taken it."""
        length, count, pieces = response.headers.get("Content-Length"), 0, []
        limit = RESPONSE_LIMIT if sink is None else DOWNLOAD_LIMIT
        while True:
            piece = response.read(PIECE)
            if not piece:
                break
            count += len(piece)
            if count > limit:
                raise Failure(f"the server's answer is larger than {byte_size(limit)}")
            if sink is None:
                pieces.append(piece)
            else:
                sink.write(piece)

        if length is not None and count != int(length):
            raise http.client.IncompleteRead(b"", int(length) - count)
        return b"".join(pieces)

    def _kept_connections(self):
        if not hasattr(self.local, "connections"):
            self.local.connections = {}
        return self.local.connections

    @staticmethod
    def _has_input(connection):
        """Whether bytes, or the end of the stream, can be read from a connection."""
        import select
        if hasattr(select, "poll"):     # select() can't watch file descriptors above 1023
            poll = select.poll()
            poll.register(connection.sock, select.POLLIN)
            return bool(poll.poll(0))
        return bool(select.select([connection.sock], [], [], 0)[0])

    def _connection_key(self, url):
        return origin_of(url) + (self.client_cert(url),)

    def _connect(self, url):
        """A new open connection to the URL's server, through a proxy if one is configured."""
        scheme, host, port = origin_of(url)
        proxy, arguments = proxy_for(url), {"timeout": self.timeout or _CONNECT_SECONDS}
        connection_class = http.client.HTTPConnection
        if scheme == "https":
            connection_class = http.client.HTTPSConnection
            arguments["context"] = _tls_context(self.client_cert(url))

        if proxy:
            proxy_parts = urllib.parse.urlsplit(proxy)
            if proxy_parts.scheme != "http":
                is_socks = proxy_parts.scheme.startswith("socks")
                kind = "SOCKS" if is_socks else f"{proxy_parts.scheme}://"
                raise Failure(
                    f"the proxy {masked(proxy)} can't be used: only http:// is spoken, not {kind}",
                    f"name an http:// proxy in {scheme.upper()}_PROXY, "
                    f"or in NO_PROXY the host that is reached without one: {host}")
            connection = connection_class(
                proxy_parts.hostname, proxy_parts.port or 80, **arguments)
            if scheme == "https":
                credentials = credentials_of(proxy)
                connection.set_tunnel(
                    host, port, {"Proxy-Authorization": credentials} if credentials else {})
        else:
            connection = connection_class(host, port, **arguments)

        connection.connect()
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return connection

    def _connection_failure(self, url, error, sent):
        """The Failure for an error of a connection; Unreachable if a retry may succeed."""
        import ssl
        if isinstance(error, ssl.SSLCertVerificationError):
            reason = one_line(error.verify_message or str(error))
            return Failure(f"SSL verification failed '{public_url(url)}':\n{reason}",
                           "if the server's certificate comes from an authority of your own, "
                           "name that authority's file in the variable SSL_CERT_FILE or "
                           "REQUESTS_CA_BUNDLE")

        if isinstance(error, ssl.SSLError):
            no_tls = "WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|HTTP_REQUEST"
            if re.search(no_tls, str(error)):
                return Unreachable(url, "the server does not speak TLS there", sent,
                                   "try http:// in place of https://")
            return Failure(
                f"SSL verification failed '{public_url(url)}':\n{reason_of(error)}")

        if isinstance(error, http.client.InvalidURL):
            return Failure(f"'{public_url(url)}' is no usable URL: {error}")

        reason = getattr(error, "strerror", None) or reason_of(error)
        if isinstance(error, http.client.RemoteDisconnected):
            reason = "the server closed the connection without an answer"
        proxy = proxy_for(url)
        hint = f"the proxy {masked(proxy)} was asked, as the environment says" if proxy else ""
        return Unreachable(url, reason, sent, hint)


def json_headers():
    """The headers of a request that sends and expects JSON."""
    return {"Accept": "application/json", "Content-Type": "application/json"}


def json_body(value):
    """A JSON value as a request's body."""
    return json.dumps(value).encode()


@functools.lru_cache(maxsize=None)
def proxy_for(url):
    """The URL of the proxy for a URL, or None.

    The variables HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY set it, or macOS or Windows."""
    import urllib.request
    parts, proxies = urllib.parse.urlsplit(url), urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or _is_exempt(url, proxies.get("no")):
        return None
    return proxy if "://" in proxy else "http://" + proxy


def _is_exempt(url, exempt):
    """Whether requests to a URL go without the proxy; `exempt` is the value of NO_PROXY or None.

    An entry of NO_PROXY is a host, which includes all hosts below it, with or without a port; a
    network such as 10.0.0.0/8; or `*` for all hosts."""
    import ipaddress
    import urllib.request
    _, host, port = origin_of(url)
    if exempt is None and not urllib.request.getproxies_environment():
        return bool(urllib.request.proxy_bypass(host))      # the settings of macOS or Windows

    for entry in re.split(r"[,\s]+", (exempt or "").lower()):
        if entry == "*":
            return True
        with contextlib.suppress(ValueError):       # no network, or the host is no address
            network = ipaddress.ip_network(entry.strip("[]"), strict=False)
            if ipaddress.ip_address(host) in network:
                return True
        name, number = re.fullmatch(r"(?:\*?\.)?(.*?)(?::([0-9]+))?", entry).groups()
        is_named = host == name.strip("[]") or host.endswith("." + name)
        if name and is_named and number in (None, str(port)):
            return True
    return False


@functools.lru_cache(maxsize=None)
def _tls_context(client_cert):
    """The TLS settings.  A Failure if a file of certificates can't be read.

    Certificates are verified against the bundles that `CA_VARIABLES` name, or else against those
    of the system."""
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)       # verifies certificates and host names

    variables = [name for name in CA_VARIABLES if os.environ.get(name)]
    for name in variables:
        bundle = os.environ[name]
        kind = "capath" if os.path.isdir(bundle) else "cafile"
        try:
            context.load_verify_locations(**{kind: bundle})
        except OSError as error:
            raise Failure(f"the certificates in {bundle} ({name}) can't be read: "
                          f"{error.strerror or error}") from None
    if not variables:
        context.load_default_certs()

    if client_cert:
        try:
            context.load_cert_chain(client_cert)
        except OSError as error:
            raise Failure(f"the client certificate {client_cert} can't be used: "
                          f"{error.strerror or error}") from None
    return context


# ==================================================================================================
# 5  Credentials
#
# Which user we are at a server, and the sources of passwords: the command line, a file, the
# environment, keyring, .netrc, a person.  auth.json stores session tokens, never passwords.
# ==================================================================================================


class Identity(typing.NamedTuple):
    """A user, a token or password, and its source: login, DEVPI_TOKEN, DEVPI_PASSWORD or netrc."""
    user: str
    secret: str
    source: str

    def headers(self):
        """The headers that authenticate the user; X-Devpi-Auth takes tokens and passwords."""
        if self.source == "netrc":
            return {"Authorization": basic_authorization(self.user, self.secret)}
        pair = f"{self.user}:{self.secret}".encode("utf-8", "replace")
        return {"X-Devpi-Auth": base64.b64encode(pair).decode()}


def check_secret(*texts):
    """A Failure if a user name or a password can't be encoded in UTF-8."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise Failure("the user name or the password can't be written in UTF-8",
                      "is the locale's encoding UTF-8? (LC_ALL, PYTHONUTF8=1)") from None


def basic_authorization(user, password):
    """The Authorization header's value for HTTP Basic authentication (RFC 7617)."""
    pair = f"{user}:{password}".encode("utf-8", "replace")
    return "Basic " + base64.b64encode(pair).decode()


class AuthStore:
    """auth.json, in the format of devpi-client.

    For each server URL it holds session tokens, HTTP Basic credentials for a proxy in front of the
    server, and the path of a client certificate."""

    def __init__(self, file):
        self.file = file
        self.data = file.read()

    def _change(self, edit):
        self.file.change(edit)
        self.data = self.file.read()

    def tokens(self, url):
        """[(user, token), ...] of the URL's server; the last login comes first."""
        pairs = _entry_for_url(self.data.get("auth"), url)
        return _valid_logins(pairs)

    def token(self, url, user):
        return dict(reversed(self.tokens(url))).get(user)

    def add_token(self, root, user, token, seconds=None):
        """Store a login as the latest.  `seconds`: its lifetime, if the server has stated one."""
        def edit(data):
            servers = _subobject(data, "auth")
            others = sorted([name, other] for name, other in _valid_logins(servers.get(root))
                            if name != user)
            servers[root] = [[user, token], *others]
            ends = _subobject(_subobject(data, "devpi_lite_ends"), root)
            ends.pop(user, None)
            if isinstance(seconds, (int, float)):
                ends[user] = [token[-8:], int(time.time() + seconds)]
        self._change(edit)

    def seconds_left(self, root, user):
        """How many seconds a login still lasts; None if unknown, as for logins by devpi-client."""
        entry = _subobject(_subobject(self.data, "devpi_lite_ends"), root).get(user)
        is_valid = isinstance(entry, list) and [type(value) for value in entry] == [str, int]
        if not is_valid:
            return None
        tail, end = entry[0], min(entry[1], 1 << 40)
        is_same_token = tail and (self.token(root, user) or "").endswith(tail)
        return end - time.time() if is_same_token else None

    def delete_token(self, root, user):
        """Delete a login; returns whether it existed."""
        exists = self.token(root, user) is not None

        def edit(data):
            servers = _subobject(data, "auth")
            servers[root] = [[name, token] for name, token in _valid_logins(servers.get(root))
                             if name != user]
            _subobject(_subobject(data, "devpi_lite_ends"), root).pop(user, None)
        if exists:
            self._change(edit)
        return exists

    def basic_auth(self, url):
        """(user, password) for the proxy in front of a server, or None."""
        pair = _entry_for_url(self.data.get("basic_auth"), _with_port(url))
        return _valid_logins([pair])[0] if _valid_logins([pair]) else None

    def client_cert(self, url):
        """The path of the client certificate for a server, or None."""
        path = _entry_for_url(self.data.get("client_cert"), _with_port(url))
        return path if isinstance(path, str) else None

    def set_basic_auth(self, root, user, password):
        """Store credentials for the proxy in front of a server."""
        def edit(data):
            _subobject(data, "basic_auth")[_with_port(root)] = [user, password]
        self._change(edit)

    def set_client_cert(self, root, path):
        """Store the path of a server's client certificate; None deletes it."""
        def edit(data):
            paths = _subobject(data, "client_cert")
            if path is None:
                paths.pop(_with_port(root), None)
            else:
                paths[_with_port(root)] = path
        self._change(edit)


def _valid_logins(pairs):
    """[(user, token), ...] from the entry of a server in auth.json, without malformed pairs."""
    if not isinstance(pairs, list):
        return []
    return [tuple(pair) for pair in pairs
            if isinstance(pair, list) and [type(part) for part in pair] == [str, str]]


def _subobject(data, key):
    """data[key]; if it is no JSON object, an empty one replaces it."""
    if not isinstance(data.get(key), dict):
        data[key] = {}
    return data[key]


def _entry_for_url(entries, url):
    """The entry of the longest stored URL whose path contains the URL's path; None without one."""
    if not isinstance(entries, dict):
        return None
    parts = urllib.parse.urlsplit(url)
    path = parts.path.rstrip("/")
    while True:
        for ending in (path + "/", path):
            entry = entries.get(f"{parts.scheme}://{parts.netloc}{ending}")
            if entry is not None:
                return entry
        if not path:
            return None
        path = path.rpartition("/")[0]


def _with_port(url):
    """The URL with an explicit port, without credentials, query and fragment."""
    parts = urllib.parse.urlsplit(public_url(url))
    netloc = parts.netloc if parts.port else f"{parts.netloc}:{origin_of(url)[2]}"
    return urllib.parse.urlunsplit(parts._replace(netloc=netloc, query="", fragment=""))


def netrc_entry(console, url):
    """(user, password) of ~/.netrc ($NETRC) for the URL's host, or None.

    `default` entries don't count.  A URL that a server has sent needs `Client.netrc_entry`."""
    hosts, parts = _netrc_hosts(console), urllib.parse.urlsplit(url)
    entry = hosts.get(parts.netloc.rpartition("@")[2]) or hosts.get(parts.hostname)
    return (entry[0] or "", entry[2] or "") if entry else None


@functools.lru_cache(maxsize=None)
def _netrc_hosts(console):
    """The entries of ~/.netrc by host.

    A file that can't be read causes a warning and counts as empty: it may serve other programs."""
    path = os.environ.get("NETRC") or os.path.join(os.path.expanduser("~"), ".netrc")
    if not os.environ.get("NETRC") and os.name == "nt" and not os.path.exists(path):
        path = os.path.join(os.path.expanduser("~"), "_netrc")
    if not os.path.isfile(path):        # reading a pipe would block
        return {}
    import netrc
    try:
        return netrc.netrc(path).hosts
    except netrc.NetrcParseError as error:      # its text may contain a password
        reason = f"line {error.lineno} is not understood"
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8"
    except Exception as error:      # some Pythons raise other errors for malformed files
        reason = f"it is not understood ({type(error).__name__})"
    console.warn(f"{display_path(path)} is not used: {reason}")
    return {}


def _keyring_password(console, service, user):
    """A password from keyring's module or program; None without an entry or without keyring."""
    try:
        import keyring
    except ImportError:
        program = find_program("keyring")
        if not program:
            return None
        child = run_child(console, [program, "get", service, user], capture=True)
        has_password = child.code == 0 and child.output.strip()
        return child.output.rstrip("\r\n") if has_password else None
    try:
        return keyring.get_password(service, user)
    except Exception as error:      # backends raise anything; other sources remain
        console.debug(f"keyring failed: {reason_of(error)}")
        return None


def read_text(name, kind, only_line=False):
    """The text of a file, or of standard input for `-`; with `only_line` its first line.

    A Failure, which calls the file `kind`, if it can't be read."""
    try:
        with contextlib.ExitStack() as stack:
            file = sys.stdin if name == "-" else stack.enter_context(open(name, encoding="utf-8"))
            if file is None:
                return ""
            return file.readline() if only_line else file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8"
        raise Failure(f"the {kind} {name} can't be read: {reason}") from None


def read_password_file(name):
    """The first line of a file, or of standard input for `-`; a Failure if it is missing."""
    line = read_text(name, "password file", only_line=True)
    if not line:
        raise Failure("there is no password on standard input" if name == "-" else
                      f"the password file {name} is empty")
    return line.rstrip("\r\n")


def password_without_prompt(console, root, user):
    """(password, source) of a password that no person has to type, or None."""
    if os.environ.get("DEVPI_PASSWORD") and os.environ.get("DEVPI_USER", user) == user:
        return os.environ["DEVPI_PASSWORD"], "DEVPI_PASSWORD"
    return stored_password(console, root, user)


def stored_password(console, url, user):
    """(password, "keyring" or "netrc") that this machine stores for a user at a URL, or None."""
    stored = _keyring_password(console, url, user)
    if stored is not None:
        return stored, "keyring"
    entry = netrc_entry(console, url)
    return (entry[1], "netrc") if entry and entry[0] == user else None


def ask_new_password(console, user, otherwise=""):
    """A new password, which the person types twice.

    A Failure after three attempts, or if nobody can type; `otherwise` is the part of its hint that
    names other ways to give the password."""
    if not console.is_interactive():
        raise Failure(f"no new password for user '{user}', and nobody to ask",
                      f"give it {otherwise}with --password-file FILE (- for standard input)")
    for _ in range(3):
        password = console.ask_password(f"new password for user {user}: ")
        repeated = console.ask_password(f"repeat new password for user {user}: ")
        if password != repeated:
            console.error("passwords did not match")
            continue

        question = f"the password has only {len(password)} characters, use it" if password else \
            "the password is empty, use it"
        if len(password) >= 8 or console.confirm(question):
            return password
    raise Failure("password not changed")


# -- API tokens: "devpi-" and a macaroon in the binary format of version 2, in base64


class Token(typing.NamedTuple):
    """An API token: the identifier names its user, the caveats restrict it."""
    location: str
    identifier: str
    caveats: tuple
    signature: bytes


def parse_token(text):
    """The `Token` of a text that devpi-tokens has issued; a Failure for any other text."""
    prefix, dash, payload = text.strip().partition("-")
    try:
        data = base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
        if prefix not in ("devpi", "pypi") or not dash or data[:1] != b"\2":
            raise ValueError("no macaroon")
        fields = list(_macaroon_fields(data[1:]))
        location = fields.pop(0)[1].decode() if fields[0][0] == 1 else ""
        identifier = fields.pop(0)[1].decode()
        caveats = tuple(value.decode() for kind, value in fields[1:] if kind == 2)
        signature = next(value for kind, value in fields if kind == 6)
        return Token(location, identifier, caveats, signature)
    except (ValueError, IndexError, StopIteration):
        raise Failure("that is no API token of a devpi server (they start with devpi-)") from None


def _macaroon_fields(data):
    """Yield (type, content) of each field; type 0 ends a section."""
    position = 0

    def number():
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
    while position < len(data):
        kind = number()
        size = number() if kind else 0
        if position + size > len(data):
            raise ValueError("cut off")
        yield kind, data[position:position + size]
        position += size


def format_token(token):
    """The text of a `Token`, as `parse_token` reads it."""
    def field(kind, value):
        size, number = len(value), b""
        while size > 127:
            number += bytes([size & 127 | 128])
            size >>= 7
        return bytes([kind]) + number + bytes([size]) + value

    data = b"\2"
    if token.location:
        data += field(1, token.location.encode())
    data += field(2, token.identifier.encode()) + b"\0"
    data += b"".join(field(2, caveat.encode()) + b"\0" for caveat in token.caveats)
    data += b"\0" + field(6, token.signature)
    return "devpi-" + base64.urlsafe_b64encode(data).decode().rstrip("=")


def token_user(token):
    """The user of an API token, as devpi-tokens has written it there; a Failure without one."""
    try:
        return parse_token(token).identifier.rpartition("-")[0]
    except Failure:
        raise Failure("DEVPI_TOKEN does not say whose it is", "set DEVPI_USER too") from None


# ==================================================================================================
# 6  The client
#
# The server and index in use (`Remote`), the JSON objects of devpi's API (`Envelope`), and
# `Client`, which is all that a command needs.  A command works on the index of --index, else of
# DEVPI_INDEX, else of the last `use`.  Only `use` and the commands for logins and settings store
# anything, but for the serials of changes.
# ==================================================================================================

_API_VERSION = "2"
# The types of envelopes whose result is a JSON object.
_OBJECT_TYPES = ("apiconfig", "indexconfig", "list:userconfig", "projectconfig", "proxyauth",
                 "status", "token-info", "tokens-info", "userconfig")


@dataclasses.dataclass(frozen=True)
class Remote:
    """A server, and one of its indexes or none, as the server's `+api` describes them.

    `root` ends with a slash, `index` does not."""
    login: str = ""
    index: str | None = None
    simpleindex: str | None = None
    pypisubmit: str | None = None
    features: tuple = ()

    @property
    def root(self):
        return self.login.rpartition("/")[0] + "/" if self.login else ""

    @property
    def index_name(self):
        """The index as USER/NAME; "" without an index."""
        return "/".join(self.index.split("/")[-2:]) if self.index else ""

    @classmethod
    def of_state(cls, state):
        """The remote that a state file names; invalid values count as missing."""
        def url(key):
            try:
                return checked_url(state[key]) if isinstance(state.get(key), str) else None
            except Failure:
                return None
        features = state.get("features")
        features = tuple(map(str, features)) if isinstance(features, list) else ()
        return cls(url("login") or "", url("index"), url("simpleindex"), url("pypisubmit"),
                   features)

    def write_to(self, state):
        """Put the remote into the state; what it lacks is removed there."""
        state["login"] = self.login
        state["features"] = list(self.features)
        for key in ("index", "simpleindex", "pypisubmit"):
            state.pop(key, None)
            if getattr(self, key):
                state[key] = getattr(self, key)
        state.pop("auth", None)         # old versions of devpi-client kept logins there


class Envelope(typing.NamedTuple):
    """The JSON object with type, result and message that devpi's API responds with."""
    type: str
    result: typing.Any
    message: str
    response: Response


class Client:
    """The client as one command uses it: options, console, stored state, calls to the server."""

    def __init__(self, options, console):
        self.options, self.console = options, console

        directory = getattr(options, "clientdir", None) or os.environ.get("DEVPI_CLIENTDIR") \
            or os.path.join("~", ".devpi", "client")
        self.directory = os.path.abspath(os.path.expanduser(directory))
        venv = os.environ.get("VIRTUAL_ENV")
        self.venv_state = os.path.join(venv, "devpi.json") if venv else None
        is_local = self.venv_state is not None and os.path.exists(self.venv_state)
        self.state_file = StateFile(
            self.venv_state if is_local else os.path.join(self.directory, "current.json"))
        self.state = self.state_file.read()
        self.auth = AuthStore(StateFile(os.path.join(self.directory, "auth.json")))

        self.http = Http(
            console, getattr(options, "timeout", None), self.auth.client_cert,
            Serials(StateFile(os.path.join(self.directory, "devpi_lite_serials.json"))))
        self.logins = {}                # {(user, root): session token} from DEVPI_PASSWORD
        self._remote = None             # see `remote`
        self.given_url = None           # the URL in --index, DEVPI_INDEX or an argument, if any
        self.is_version_checked = False
        self.lock = threading.RLock()

    @property
    def stored_user(self):
        """The user of the last login, from the state, or None."""
        user = self.state.get("username")
        return user if isinstance(user, str) and user else None

    def change_state(self, **changes):
        """Store values in the state; None becomes null."""
        self.edit_state(lambda state: state.update(changes))

    def edit_state(self, edit):
        """Let `edit` change the state in place, and store it."""
        def edit_and_clean(state):
            edit(state)
            state.pop("auth", None)     # old versions of devpi-client kept logins there
        self.state_file.change(edit_and_clean)
        self.state = self.state_file.read()

    # -- the server and index in use

    @property
    def remote(self):
        """The server and index that this command works on.

        Asks the server, once, if --index or DEVPI_INDEX differ from the state."""
        if self._remote is None:
            self._remote = self._find_remote()
        return self._remote

    def set_remote(self, remote):
        """Work on another server or index from now on."""
        self._remote = remote

    def _find_remote(self):
        """The remote of --index, else of DEVPI_INDEX, else of the state."""
        stored, wanted = Remote.of_state(self.state), getattr(self.options, "index", None)
        from_environment = os.environ.get("DEVPI_INDEX")
        if from_environment and not wanted:
            self.console.say(f"Using DEVPI_INDEX from environment: {masked(from_environment)}")
            return self._remote_at(from_environment, stored)
        if not wanted:
            return stored

        # A relative --index belongs to the server of DEVPI_INDEX, if that is a URL.
        if from_environment and "://" in from_environment and "://" not in wanted:
            root = "/".join(from_environment.rstrip("/").split("/")[:-2]) + "/"
            stored = self._remote_at(root, stored)
        return self._remote_at(wanted, stored)

    def _remote_at(self, text, base):
        """The remote of a URL, or of an index name on the server of the remote `base`."""
        self.note_given_url(text)
        if "://" not in text and not base.root:
            if text == os.environ.get("DEVPI_INDEX"):
                raise Failure("No server set and DEVPI_INDEX from environment is not a full valid "
                              f"URL: {text}")
            raise Failure("not connected to a server, see 'devpi use'",
                          "type 'devpi use URL', or give the index as a full URL")

        remote = self.get_api(self.index_url(text, base.root))[0]
        if "://" in text and not self.is_given_server(remote.root):
            self.console.warn(
                f"The server has rewritten the url to: {remote.index or remote.root}")
        return remote

    def note_given_url(self, text):
        """Remember the URL that the person typed.

        The token and the password in our environment are sent to the server of this URL only."""
        if "://" in text:
            self.given_url = checked_url(text)

    def is_given_server(self, url):
        """Whether a URL is on the server that the person typed, as in `is_same_server`.

        True if the person typed no URL: `use` has then stored the server and printed it."""
        return self.given_url is None or is_same_server(url, self.given_url)

    @property
    def named_url(self):
        """The URL by which the person has named the server, in this command or in the stored `use`.

        "" without a server.  The server's own statement of its URL does not count.  devpi-client
        does not store what the person typed: the server that it stored counts as named."""
        if self.given_url is not None:
            return self.given_url
        known, root = self.state.get("devpi_lite_named"), Remote.of_state(self.state).root
        if isinstance(known, dict) and known.get("root") == root:
            with contextlib.suppress(Failure):
                return checked_url(str(known.get("url")))
        return root

    def index_url(self, text, root):
        """The URL of an index at the server `root`: of NAME, USER/NAME, /USER/NAME or a URL.

        NAME alone is an index of the current user."""
        if "://" in text:       # people also copy the URL that ends with +simple
            return re.sub(r"/\+simple$", "", checked_url(text).rstrip("/"))

        parts = text.strip("/").split("/")
        if text == "/":
            return root.rstrip("/")
        if len(parts) > 2 or not all(parts) or ":" in text:
            hint = f"a URL starts with http:// or https://, as in http://{masked(text)}"
            raise Failure(f"index '{masked(text)}' not of form USER/NAME or NAME",
                          hint if ":" in text else "")

        if len(parts) == 1:
            user = self.user_at(root)
            if user is None:
                raise Failure(
                    f"you need to be logged in to use the short index name '{parts[0]}' "
                    f"(use USER/{parts[0]} or 'devpi login USER')")
            parts = [user, *parts]
        return root + "/".join(map(path_segment, parts))

    @property
    def root(self):
        """The URL of the server, with a slash at its end; a Failure without a server."""
        if not self.remote.root:
            raise Failure("not connected to a server, see 'devpi use'",
                          "type 'devpi use URL' first, or set DEVPI_INDEX")
        return self.remote.root

    @property
    def index(self):
        """The URL of the index, without a slash at its end; a Failure without an index."""
        if not self.remote.index:
            raise Failure("not connected to an index, see 'devpi use'",
                          "type 'devpi use USER/NAME', or give --index USER/NAME")
        return self.remote.index

    @property
    def _known_remote(self):
        """The remote as far as it is known without a request."""
        return self._remote or Remote.of_state(self.state)

    def require_server(self):
        """A Failure without a server."""
        return self.root

    def require_index(self):
        """A Failure without an index."""
        return self.index

    def project_url(self, project, *parts):
        """The URL of a project of the index, or with a version that of a release."""
        return "/".join([self.index, path_segment(normalize(project)), *map(path_segment, parts)])

    # -- our identity and our login

    def identity(self, url, may_login=True):
        """Our `Identity` for the server of a URL, or None.

        The environment comes first, then stored logins, then .netrc.  DEVPI_PASSWORD causes a
        login request, once for each command, unless `may_login` is false."""
        identity = self._identity_from_environment(url, may_login)
        if identity is not None:
            return identity

        stored = self.auth.tokens(url)
        first = stored[0][0] if stored else None
        user = os.environ.get("DEVPI_USER") or self.stored_user or first
        if user in dict(stored):
            return Identity(user, self.auth.token(url, user), "login")

        entry = self.netrc_entry(url)
        if entry and os.environ.get("DEVPI_USER", entry[0]) == entry[0] != "" \
                and self.auth.basic_auth(url) is None:
            return Identity(*entry, "netrc")
        return None

    def _identity_from_environment(self, url, may_login):
        """Our `Identity` by DEVPI_TOKEN or DEVPI_PASSWORD for the server of a URL, or None.

        They are only for the server that the person has given."""
        user, token, password = (
            os.environ.get(f"DEVPI_{name}") for name in ("USER", "TOKEN", "PASSWORD"))
        token = token and token.strip()
        root = self._known_remote.root
        is_ours = is_below(url, root) if root else self.given_url is not None
        if not self.is_given_server(url) or not is_ours:
            return None

        if token:
            check_secret(user or "", token)
            return Identity(user or token_user(token), token, "DEVPI_TOKEN")
        if not user or not password:
            return None
        if (user, root) not in self.logins:
            if not may_login or not root:
                return None
            with self.lock:
                if (user, root) not in self.logins:
                    self.logins[user, root] = self._log_in_from_environment(user, password)
        return Identity(user, self.logins[user, root], "DEVPI_PASSWORD")

    def netrc_entry(self, url):
        """(user, password) of .netrc for a URL, or None.

        Only for the server that the person has named: a server can link or redirect to any other
        host, for which .netrc may hold the password of another program."""
        if not self.named_url or not is_same_server(url, self.named_url):
            return None
        return netrc_entry(self.console, url)

    def _log_in_from_environment(self, user, password):
        """A session token for the user and password of our environment."""
        try:
            return self.request_token(self._known_remote, user, password)["password"]
        except Refused as refusal:
            refusal.hint = refusal.hint or \
                "user and password are those of the variables DEVPI_USER and DEVPI_PASSWORD"
            raise

    def user_at(self, url):
        """Our user name at the server of a URL, or None."""
        identity = self.identity(url, may_login=False)
        if identity is None and os.environ.get("DEVPI_PASSWORD"):
            return os.environ.get("DEVPI_USER")
        return identity.user if identity else None

    @property
    def user(self):
        """Our user name at the server, or None."""
        return self.user_at(self.root)

    def require_login(self):
        """Our user name at the server; a Failure if we are not logged in."""
        user = self.user
        if user is None:
            raise Failure("you need to be logged in (use 'devpi login USER')")
        return user

    def credentials(self, url, may_login=True):
        """The headers that authenticate us at a URL's server, and at a proxy in front of it."""
        headers, identity = {}, self.identity(url, may_login)
        if identity:
            headers.update(identity.headers())
        pair = self.auth.basic_auth(url)
        entry = self.netrc_entry(url)
        if pair or entry:
            headers["Authorization"] = basic_authorization(*(pair or entry))
        return headers

    def basic_credentials(self, url):
        """(user, token or password) for a tool that takes credentials in a URL, or None."""
        identity = self.identity(url)
        return (identity.user, identity.secret) if identity else self.auth.basic_auth(url)

    def request_token(self, remote, user, password):
        """Log in; returns {"password": session token, "expiration": seconds}.

        A Failure if the server wants the password to be sent elsewhere."""
        check_secret(user, password)
        if not self.is_given_server(remote.login):
            raise Failure(f"the server at {masked(self.given_url)} wants the password to be sent "
                          f"to {remote.root}",
                          "if that is right, type 'devpi use "
                          f"{shell_quoted(remote.index or remote.root)}' first, or name that URL")
        response = self.http.request(
            "POST", remote.login, json_headers(), json_body({"user": user, "password": password}),
            credentials=self._proxy_headers)
        envelope = self.unwrap(response, "proxyauth")
        if not isinstance(envelope.result.get("password"), str):
            raise Failure(f"{remote.login}: the answer holds no token")
        return envelope.result

    def _proxy_headers(self, url):
        """The headers that authenticate us at a proxy in front of the server."""
        pair = self.auth.basic_auth(url)
        return {"Authorization": basic_authorization(*pair)} if pair else {}

    def _renew_login(self, url):
        """After a refusal: replace an expired login, if a password needs no person.

        Returns whether the request is worth another attempt."""
        identity = self.identity(url, may_login=False)
        if identity is None or identity.source != "login" or self._remote is None \
                or not is_below(url, self.remote.root):
            return False

        root = self.remote.root
        with self.lock:
            current = self.auth.token(url, identity.user)
            if current != identity.secret:      # another thread has renewed it
                return current is not None
            if self.get_api(root.rstrip("/"))[1] == "ok":
                return False
            password = password_without_prompt(self.console, root, identity.user)
            if password is None:
                return False

            login = self.request_token(self.remote, identity.user, password[0])
            self.auth.add_token(root, identity.user, login["password"], login.get("expiration"))
            self.console.say(
                f"logged in '{identity.user}' again, with the password from {password[1]}")
            return True

    # -- calls

    def get_api(self, url):
        """GET +api at a URL; returns (Remote, login status, user).

        The login status is "ok" or "noauth".  A stored login that the server refuses is deleted."""
        target = url.rstrip("/") + "/+api"
        response = self.http.request(
            "GET", target, json_headers(),
            credentials=lambda url: self.credentials(url, may_login=False))
        if response.status == 403:
            response = self.http.request(
                "GET", target, json_headers(), credentials=self._proxy_headers)

        if response.json() is None and response.status != 401:
            hint = "is that the URL of a devpi server, or of one of its indexes?"
            if response.status in (200, 201):
                raise Failure(f"{public_url(response.url)}: the answer is no JSON", hint)
            raise Refused(response, "", self.refusal_hint(response) or hint)

        result = self.unwrap(response, "apiconfig").result
        remote = self._remote_of_api(url, response.url, result)
        status, user, *_ = [*(result.get("authstatus") or ()), "noauth", ""]
        identity = self.identity(remote.root, may_login=False)
        if status == "noauth" and identity and identity.source == "login" \
                and is_below(response.url, remote.root):
            self.auth.delete_token(remote.root, identity.user)
        return remote, status, user

    @staticmethod
    def _remote_of_api(url, response_url, result):
        """The `Remote` of an apiconfig; a Failure if it is malformed or leaves TLS."""
        if not isinstance(result.get("login"), str):
            raise Failure(
                f"{public_url(response_url)}: the answer does not describe a devpi server")
        links = {key: resolve_link(response_url, str(result[key]))
                 for key in ("login", "index", "simpleindex", "pypisubmit") if result.get(key)}
        if "index" in links:
            links["index"] = links["index"].rstrip("/")

        remote = Remote(features=tuple(map(str, result.get("features") or ())), **links)
        if url.startswith("https:") and not remote.root.startswith("https:"):
            raise Failure(f"the server at {masked(url)} says that its address is {remote.root}, "
                          "which is not encrypted",
                          "its administrator should tell it its address (--outside-url, or its "
                          "proxy's header X-Outside-URL)")
        return remote

    def call(self, method, url, body=None, expect=None, *, may_take_long=False):
        """Call devpi's API with a JSON value; returns the `Envelope`.

        `expect`: the type that it must have.  `may_take_long`: as for `Http.request`.  Refused for
        an error status, a Failure for an unexpected response."""
        data = None if body is None else json_body(body)
        response = self.send(method, url, json_headers(), data, may_take_long=may_take_long)
        return self.unwrap(response, expect)

    def index_config(self, url, with_projects=False):
        """The settings of the index at a URL; `with_projects`: and the names of its projects."""
        query = "" if with_projects else "?no_projects="
        return self.call("GET", url + query, expect="indexconfig").result

    def delete(self, url, force=False):
        """DELETE a URL; prints and returns the consequences that the server states, or "".

        devpi_lite adds them to its message after a semicolon."""
        envelope = self.call("DELETE", url + ("?force=" if force else ""))
        note = envelope.message.partition("; ")[2]
        if note:
            self.console.warn(note)
        return note

    def send(self, method, url, headers=None, body=None, **options):
        """Send a request with our credentials; returns the `Response`, whatever its status.

        If our login had expired, it is renewed and the request is sent again."""
        def attempt():
            return self.http.request(
                method, url, headers, body, credentials=self.credentials, **options)

        response = attempt()
        if response.status in (401, 403) and self._renew_login(url):
            response = attempt()
        self._check_api_version(response)
        self._delete_refused_login(response)
        return response

    def catch_up(self):
        """Have a replica catch up with what we have changed, for tools that can't ask for it."""
        if not self.http.serials.serials:
            return
        url = self.index + "/+api"
        try:
            self.send("GET", url, json_headers())
            needed = self.http.serials.headers(url).get("X-DEVPI-MIN-SERIAL")
            if needed is None:
                return
            # what the server itself has
            response = self.send("GET", url, {**json_headers(), "X-DEVPI-MIN-SERIAL": "0"})
        except Failure as failure:      # the tool may need nothing of the server
            self.console.debug(f"{url}: {failure.message}")
            return
        serial = response.headers.get("X-DEVPI-SERIAL") or ""
        if serial.isdecimal() and int(serial) < int(needed):
            self.console.warn(f"{server_of(url)} is a replica that lacks the last "
                              f"{int(needed) - int(serial)} changes: what was changed just now may "
                              "not be found there")

    def unwrap(self, response, expect):
        """The `Envelope` in a response; Refused for an error status.

        A Failure if it is not of the type `expect`, unless that is None."""
        self._check_api_version(response)
        value, url = response.json(), public_url(response.url)
        if response.status not in (200, 201):
            raise self.refusal_of(response)

        if not isinstance(value, dict):
            raise Failure(f"{url}: the answer is no JSON object", "is that a devpi server?")
        if expect is not None and value.get("type") != expect:
            raise Failure(f"{url}: got result type '{value.get('type')}', expected '{expect}'")
        if expect in _OBJECT_TYPES and not isinstance(value.get("result"), dict):
            raise Failure(f"{url}: the result of type '{expect}' is no JSON object")
        return Envelope(
            value.get("type"), value.get("result"), str(value.get("message") or ""), response)

    def refusal_of(self, response):
        """The `Refused` for a response with an error status, with a hint."""
        message, body = response.message(), ""
        if self.console.is_debug and not message:
            body = response.body.decode("utf-8", "replace").strip()
        return Refused(response, message, self.refusal_hint(response), body)

    def refusal_hint(self, response):
        """What a person can do about a response with an error status, or ""."""
        if response.status in (401, 403) and not response.url.endswith("/+login") \
                and self.user_at(response.url) is None:
            return self._login_hint(response.url)
        if response.status == 413:
            return ("the server, or a proxy in front of it, limits the size of requests: "
                    "devpi-server and devpi_lite by --max-request-body-size, "
                    "nginx by client_max_body_size")
        if response.status in (502, 503, 504):
            return ("the server, or what it needs behind it, can't be reached at the moment; "
                    "try again later")
        return ""

    def _login_hint(self, url):
        """Why the request was sent without a login, and how to log in."""
        server = shell_quoted(server_of(url))
        has_login = os.environ.get("DEVPI_TOKEN") or os.environ.get("DEVPI_PASSWORD")
        if not self.is_given_server(url) and has_login:
            return (f"the variables' login is for {masked(self.given_url)}, not for what that "
                    f"server calls itself: set DEVPI_INDEX to an index of {server}")
        if os.environ.get("DEVPI_PASSWORD") and not os.environ.get("DEVPI_USER"):
            return ("the variable DEVPI_PASSWORD is set, but not DEVPI_USER, "
                    "which says whose password it is")
        if netrc_entry(self.console, url) and not self.netrc_entry(url):
            return (f"what .netrc has for {origin_of(url)[1]} is not sent, because "
                    "another server has led there; if that is where you want to be: "
                    f"devpi use {server}")
        user = os.environ.get("DEVPI_USER") or self.stored_user or "USER"
        return f"not logged in, or the login has expired (one lasts 10 hours): devpi login {user}"

    def _check_api_version(self, response):
        """A Failure for an unknown version of devpi's API; warns once if it is missing."""
        if self.is_version_checked:
            return
        version = response.headers.get("X-DEVPI-API-VERSION")
        if version is None:
            if response.status in (200, 201):
                self.is_version_checked = True
                self.console.error(f"WARN: devpi-lite-client-{__version__} got an unversioned "
                                   "reply, assuming API-VERSION 2 (as implemented by "
                                   "devpi-server-2.0)")
        elif version != _API_VERSION:
            raise Failure(f"devpi-lite-client-{__version__} got a reply with API-VERSION "
                          f"{version}, acceptable are: {_API_VERSION}")

    def _delete_refused_login(self, response):
        """Delete the stored token after a 401 with a Location: devpi rejects the token so."""
        if response.status != 401 or not response.headers.get("Location"):
            return
        identity = self.identity(response.url, may_login=False)
        root = self._known_remote.root
        if identity and identity.source == "login" and root and is_below(response.url, root):
            if self.auth.delete_token(root, identity.user):
                self.console.error("removed expired authentication information")


# ==================================================================================================
# 7  Installers' settings
#
# How pip and uv learn about the index: their configuration files, edited line by line so that all
# other settings stay, with a backup from which the change can be undone; and the variables for
# shells and child processes.
# ==================================================================================================


class SettingsFile(typing.NamedTuple):
    """A configuration file of an installer, and the keys in it that name the index.

    `settings`: (section or None, key, "simpleindex" or "index" for the URL that is its value), ...
    `quote` surrounds values.  `is_ours`: write the file even if it does not exist."""
    path: str
    settings: tuple
    quote: str = ""
    is_ours: bool = True


def settings_files(venv=None):
    """The files that `use` shows and --set-cfg changes: a virtual environment's, or the user's."""
    pip = (("global", "index_url", "simpleindex"), ("search", "index", "index"))
    uv = ((None, "index-url", "simpleindex"),)
    distutils = (("easy_install", "index_url", "simpleindex"),)
    buildout = (("buildout", "index", "simpleindex"),)
    if venv:
        name = "pip.ini" if os.name == "nt" else "pip.conf"
        return [SettingsFile(os.path.join(venv, name), pip),
                SettingsFile(os.path.join(venv, "uv.toml"), uv, '"')]

    home = os.path.expanduser("~")
    roaming = os.environ.get("APPDATA") if os.name == "nt" else None
    config = roaming or os.environ.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    uv_file = os.environ.get("UV_CONFIG_FILE") or os.path.join(config, "uv", "uv.toml")
    files = [
        SettingsFile(_pip_file(home, config), pip),
        SettingsFile(uv_file, uv, '"'),
        SettingsFile(os.path.join(home, ".pydistutils.cfg"), distutils, is_ours=False),
        SettingsFile(os.path.join(home, ".buildout", "default.cfg"), buildout, is_ours=False)]
    # PIP_CONFIG_FILE=/dev/null tells pip to read no file.
    return [file for file in files if file.path != os.devnull]


def _pip_file(home, config):
    """The path of the user's pip.conf, in the order in which pip looks for it."""
    if os.environ.get("PIP_CONFIG_FILE"):
        return os.environ["PIP_CONFIG_FILE"]
    name = "pip.ini" if os.name == "nt" else "pip.conf"
    legacy = os.path.join(home, "pip" if os.name == "nt" else ".pip", name)
    if os.path.exists(legacy):
        return legacy
    library = os.path.join(home, "Library", "Application Support", "pip")
    if sys.platform == "darwin" and os.path.isdir(library):
        return os.path.join(library, name)
    return os.path.join(config, "pip", name)


def configured_index(file):
    """The index's URL in a configuration file, with its password masked; None without a URL."""
    text, (section, key, _) = read_settings(file.path) or "", file.settings[0]
    url = uv_default_index(text) if section is None else None
    url = url or _get_setting(text, section, key)
    return masked(url) if url else None


def settings_status(file):
    """The index's URL in a configuration file, or a phrase that says why it has none."""
    missing = "no index server configured" if os.path.isfile(file.path) else "no config file exists"
    return configured_index(file) or missing


def read_settings(path):
    """The text of a file, or None.  Bytes that are no UTF-8 become surrogate escapes."""
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return file.read()


def _lines_of(text):
    """The lines of a text without LF.  The CR of a CRLF stays in its line."""
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _find_setting(lines, section, key):
    """(start, end, first, last): two half-open ranges of line numbers.

    start and end enclose the section; start is None if it is missing.  first and last enclose the
    key's line and its continuation lines; first is None if the key is missing."""
    start = 0 if section is None else next(
        (number + 1 for number, line in enumerate(lines)
         if re.match(rf"\s*\[{re.escape(section)}\]", line)), None)
    if start is None:
        return None, None, None, None
    end = next((number for number in range(start, len(lines))
                if re.match(r"\s*\[", lines[number])), len(lines))

    spelling = "[-_]".join(map(re.escape, re.split("[-_]", key)))
    # In an INI file, an indented line continues the line before it.
    indent = "[ \t]*" if section is None else ""
    first = next((number for number in range(start, end)
                  if re.match(rf"{indent}{spelling}\s*[=:]", lines[number])), None)
    if first is None:
        return start, end, None, None
    last = first + 1
    while section is not None and last < end and re.match(r"[ \t]+\S", lines[last]):
        last += 1
    return start, end, first, last


def _get_setting(text, section, key):
    """The value of a key in INI or TOML text, without quotes and comment, or None."""
    lines = _lines_of(text)
    _, _, first, last = _find_setting(lines, section, key)
    if first is None:
        return None
    value = re.split("[=:]", lines[first], maxsplit=1)[1]
    quoted = re.match(r"""\s*("[^"]*"|'[^']*')""", value)
    if quoted:
        return quoted[1][1:-1]
    return " ".join([value, *lines[first + 1:last]]).strip().strip("\"'")


def _with_setting(text, section, key, value, quote=""):
    """The text with a key set; None removes the key.

    An existing line is replaced; a new line goes below the header of the section."""
    lines = _lines_of(text)
    ending = "\r" if lines and lines[0].endswith("\r") else ""
    start, end, first, last = _find_setting(lines, section, key)

    if value is None:
        if first is None:
            return text
        del lines[first:last]
        end -= last - first
        if section is not None and not any(line.strip() for line in lines[start:end]):
            del lines[start - 1:end]
            while lines and not lines[-1].strip():
                lines.pop()
    elif first is not None:
        spelling = re.match(r"\s*[^\s=:]+", lines[first])[0]
        comment = re.search(r"""["'](\s*#.*?)\r?$""", lines[first]) if quote else None
        comment = comment[1] if comment else ""
        lines[first:last] = [f"{spelling} = {quote}{value}{quote}{comment}{ending}"]
    else:
        if start is None:
            lines += [ending] if lines and lines[-1].strip() else []
            lines.append(f"[{section}]{ending}")
            start = len(lines)
        lines.insert(start, f"{key} = {quote}{value}{quote}{ending}")
    return "".join(line + "\n" for line in lines)


def uv_default_index(text):
    """The URL of the default `[[index]]` in uv's settings, which overrides index-url, or None."""
    for table in re.split(r"^[ \t]*(?=\[)", text, flags=re.MULTILINE):
        is_index = re.match(r"\[\[[ \t]*index[ \t]*\]\]", table)
        if is_index and re.search(r"^[ \t]*default[ \t]*=[ \t]*true", table, re.MULTILINE):
            return _get_setting(table.partition("\n")[2], None, "url") or ""
    return None


def write_settings(file, urls, host, trusted):
    """Write the index into a configuration file.

    Before the first change it is copied to `NAME-bak`; the copy of a missing file is empty.
    `urls`: {"simpleindex": URL, "index": URL}.  `trusted`: whether pip may use the host without
    verified TLS."""
    before = read_settings(file.path)
    text = before or ""
    for section, key, which in file.settings[::-1]:
        text = _with_setting(text, section, key, urls[which], file.quote)

    if file.settings[0][0] == "global":
        hosts = (_get_setting(text, "global", "trusted-host") or "").split()
        old_url = _get_setting(before or "", "global", "index_url") or ""
        old_host = urllib.parse.urlsplit(old_url).hostname
        hosts = [name for name in hosts if name not in (host, old_host)]
        hosts += [host] if trusted else []
        text = _with_setting(text, "global", "trusted-host", None)
        text = _with_trusted_hosts(text, hosts)

    if text == before:
        return
    backup = file.path + "-bak"
    if not os.path.exists(backup):
        mode = os.stat(file.path).st_mode & 0o777 if before is not None else None
        write_atomically(backup, before or "", mode)
    write_atomically(file.path, text, 0o600 if "@" in urls["simpleindex"] else None)


def _with_trusted_hosts(text, hosts):
    """pip's settings with a line trusted-host for all hosts, below the line of the index."""
    if not hosts:
        return text
    lines = _lines_of(text)
    ending = "\r" if lines[0].endswith("\r") else ""
    _, _, _, last = _find_setting(lines, "global", "index_url")
    lines.insert(last, f"trusted-host = {' '.join(hosts)}{ending}")
    return "".join(line + "\n" for line in lines)


def undo_settings(file):
    """Undo `write_settings`; returns whether that changed the file.

    Each key gets its value in the backup, or is removed."""
    text, backup = read_settings(file.path), read_settings(file.path + "-bak")
    if text is None or _get_setting(text, *file.settings[0][:2]) is None:
        return False

    keys = [(section, key) for section, key, _ in file.settings]
    if file.settings[0][0] == "global":
        keys.append(("global", "trusted-host"))
    changed = text
    for section, key in keys:
        value = _get_setting(backup or "", section, key)
        changed = _with_setting(changed, section, key, value, file.quote)

    if not (backup or "").strip() and not changed.strip():
        os.unlink(file.path)
    else:
        write_atomically(file.path, changed)
    if backup is not None:
        os.unlink(file.path + "-bak")
    return changed != text


def installer_variables(client, url=None):
    """{variable: value} that make pip and uv use the index.

    `url`: the URL of the simple index, if it needs credentials."""
    url = url or client.remote.simpleindex
    variables = {"PIP_INDEX_URL": url, "UV_DEFAULT_INDEX": url, "UV_INDEX_URL": url}
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "http" and not is_loopback(parts.hostname) and may_trust_host(client, url):
        variables["PIP_TRUSTED_HOST"] = parts.hostname
    return variables


def may_trust_host(client, url):
    """Whether pip may trust the host of a URL without verified TLS; warns if not.

    The person must have named this host: pip then accepts anything from it, on any port and with
    any certificate, so a server must not choose such a host."""
    host = origin_of(url)[1]
    named_host = origin_of(client.named_url)[1] if client.named_url else None
    if host == named_host:
        return True
    client.console.warn(f"the server says that its index is at {host}, which you have not named: "
                        "pip is not told to trust that host "
                        f"(if it is right: devpi use {shell_quoted(server_of(url))})")
    return False


# Variables that would add indexes to ours, or disable it.
INSTALLER_EXTRAS = ("PIP_EXTRA_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_INDEX", "PIP_NO_INDEX")
_MAX_BASES = 50                 # indexes that `_is_readable_by_all` asks for


def index_with_credentials(client, remote):
    """The URL of the simple index with our login, for tools that don't send X-Devpi-Auth."""
    pair = client.basic_credentials(remote.simpleindex)
    return with_credentials(remote.simpleindex, *pair) if pair else remote.simpleindex


def _index_for_tools(client):
    """The URL of the simple index for child processes, with our login only if reading needs it.

    The code that is built, tested or installed can read this URL, and a login allows more than
    reading."""
    remote = client.remote
    pair = client.basic_credentials(remote.simpleindex)
    if pair is None or _is_readable_by_all(client, remote):
        return remote.simpleindex
    return with_credentials(remote.simpleindex, *pair)


def tool_variables(client):
    """{variable: value} for child processes: the index, and the certificates that verify it.

    The index has what we have changed by then."""
    client.catch_up()
    url = _index_for_tools(client)
    variables = installer_variables(client, url)
    if urllib.parse.urlsplit(url).scheme == "https":
        variables.update(_certificate_variables(client, url))
    return variables


def _certificate_variables(client, url):
    """{variable: path} that pass the person's CA bundle and client certificate to every tool.

    The paths are absolute: a build or a test runs in another directory."""
    variables = {name: os.path.abspath(os.environ[name])
                 for name in CA_VARIABLES if os.environ.get(name)}
    if variables:
        bundle = next(iter(variables.values()))
        system = "SSL_CERT_DIR" if os.path.isdir(bundle) else "SSL_CERT_FILE"
        variables = {"PIP_CERT": bundle, "REQUESTS_CA_BUNDLE": bundle, system: bundle, **variables}

    certificate = client.auth.client_cert(url)
    for name in ("PIP_CLIENT_CERT", "SSL_CLIENT_CERT"):     # for pip, for uv
        if certificate and not os.environ.get(name):
            variables[name] = certificate
    return variables


def _is_readable_by_all(client, remote):
    """Whether the index and all its bases can be read without a login."""
    if not remote.index:
        return False
    waiting, seen = [remote.index], set()
    while waiting:
        url = waiting.pop()
        if url in seen:
            continue
        seen.add(url)

        try:
            response = client.http.request("GET", url + "?no_projects=", json_headers())
        except Unreachable as failure:
            client.console.debug(failure.message)
            return False
        value = response.json()
        config = value.get("result") if isinstance(value, dict) else None
        if response.status != 200 or not isinstance(config, dict) or len(seen) > _MAX_BASES:
            return False

        bases = config.get("bases") or ()
        waiting += [remote.root + index_path(str(base)) for base in bases]
    return True


# -- virtual environments


def remember_venv(client):
    """Store the virtual environment of --venv for later commands; `-` deletes it."""
    if client.options.venv == "-":
        client.edit_state(lambda state: state.pop("venvdir", None))
    else:
        client.change_state(venvdir=_find_venv(client.options.venv))


def _find_venv(name, is_stored=False):
    """The path of a virtual environment, from its path or from its name below $WORKON_HOME.

    A Failure if it is missing."""
    paths = [os.path.abspath(os.path.expanduser(name))]
    if os.environ.get("WORKON_HOME"):
        paths.append(os.path.join(os.environ["WORKON_HOME"], name))
    for path in paths:
        if os.path.isdir(scripts_directory(path)):
            return path
    raise Failure(f"No virtualenv found at: '{name}'",
                  "You can unset it with 'devpi use --venv -'." if is_stored else "")


def effective_venv(client):
    """The virtual environment to install into: --venv, the stored one, the active one, or None."""
    given = getattr(client.options, "venv", None)
    if given and given != "-":
        return _find_venv(given)
    if client.state.get("venvdir"):
        return _find_venv(client.state["venvdir"], is_stored=True)
    return os.environ.get("VIRTUAL_ENV") or None


# ==================================================================================================
# 8  Declaring commands
#
# A command is declared once, above its function: its name, its help and its arguments.  The parser,
# the help texts and shell completion are all made from this declaration.
# ==================================================================================================


class Argument(typing.NamedTuple):
    """A positional argument or an option of a command."""
    names: tuple                    # ("-f", "--force"), or ("spec",) for a positional argument
    settings: dict                  # what argparse's add_argument takes besides
    one_of: str | None              # of all arguments with the same `one_of`, only one may be given
    completes: str | None           # what its values name, for completion: index, project or user
    takes_dashes: bool              # whether its value may begin with a dash

    @property
    def is_option(self):
        return self.names[0].startswith("-")

    @property
    def takes_value(self):
        return "action" not in self.settings

    @property
    def dest(self):
        """The name of its value among the options."""
        return self.settings.get("dest") or self.names[-1].lstrip("-").replace("-", "_")


class Command(typing.NamedTuple):
    """A command; `run(client)` returns the exit status, or None for 0.

    The name of a subcommand has two words: `token create`.  People can type `token-create` too."""
    name: str
    help: str
    arguments: tuple
    run: typing.Callable | None     # None: it has subcommands
    aliases: tuple
    description: str
    is_for_shells: bool             # a shell runs what it prints: eval "$(devpi env)"


COMMANDS: dict[str, Command] = {}


def command(name, help, *arguments, aliases=(), description="", is_for_shells=False):
    """Decorator: declares the function as the command `name`.

    The function's docstring becomes the description, unless one is given."""
    def register(function):
        COMMANDS[name] = Command(name, help, arguments, function, aliases,
                                 description or function.__doc__, is_for_shells)
        return function
    return register


def argument(*names, one_of=None, completes=None, takes_dashes=False, **settings):
    """Declares an `Argument`; `settings` are those of argparse's add_argument."""
    return Argument(names, settings, one_of, completes, takes_dashes)


def action(*names, help):
    """Declares an option that names what the command does; only one of them can be given.

    `options.action` is its long name without dashes."""
    return argument(*names, help=help, dest="action", action="store_const",
                    const=names[-1].lstrip("-"), one_of="action")


def positive_count(text):
    """Argument type: a whole number from 1 to 9999."""
    if re.fullmatch("0*[1-9][0-9]{0,3}", text, re.ASCII):
        return int(text)
    raise argparse.ArgumentTypeError(f"'{text}' is no number from 1 to 9999")


def positive_seconds(text):
    """Argument type: a number of seconds, below a million."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e6:
            return float(text)
    raise argparse.ArgumentTypeError(f"'{text}' is no number of seconds above 0")


# Options of all commands, which count before the command and behind it.
GENERIC = (
    argument("--debug", action="store_true", default=False,
             help="debug lines, full bodies of errors, tracebacks"),
    argument("-y", dest="yes", action="store_true", default=False,
             help="answer yes to every question"),
    argument("-v", "--verbose", action="count", default=0, help="say more; may be given twice"),
    argument("-q", "--quiet", action="store_true", default=False, help="results and errors only"),
    argument("--no-progress", action="store_true", default=False, help="no progress bar"),
    argument("--color", choices=("auto", "yes", "no"), default="auto",
             help="colours (default: on a terminal)"),
    argument("--timeout", metavar="SECONDS", type=positive_seconds,
             help="how long to wait for a silent server"),
    argument("--clientdir", metavar="DIR",
             help="directory of the state files (default: $DEVPI_CLIENTDIR or ~/.devpi/client)"))

# Options of several commands.
JSON = argument("--json", action="store_true",
                help="print one JSON document, and messages to standard error")
INDEX = argument("--index", metavar="INDEX", completes="index",
                 help="the index to work on: NAME, USER/NAME or a URL (default: the current one)")


# ==================================================================================================
# 9  Connection
#
# The commands use, login, logoff and env: the server, the index and the user that we work with.
# ==================================================================================================


@command(
    "use", "show or change the server and index to work with",
    argument("--set-cfg", action="store_true", one_of="cfg",
             help="write the index into the configuration files of pip and uv"),
    argument("--unset-cfg", action="store_true", one_of="cfg", help="take that back"),
    argument("-t", "--pip-set-trusted", choices=("yes", "no", "auto"), default="auto",
             help="write trusted-host for pip (auto: for http URLs that are not on this machine)"),
    argument("--always-set-cfg", choices=("yes", "no"),
             help="from now on, let every 'use' do --set-cfg"),
    argument("--venv", metavar="DIR",
             help="virtual environment for install and --set-cfg; - forgets it"),
    argument("--urls", action="store_true", help="show the URLs"),
    argument("-l", "--list", action="store_true", help="list the indexes of the server"),
    argument("-u", "--user", metavar="USER",
             help="with -l: only this user's indexes; else: be this user, who has logged in"),
    argument("--local", action="store_true",
             help="keep the state in the active virtual environment"),
    argument("--delete", action="store_true", help="forget the server and the index"),
    argument("--client-cert", metavar="PEM",
             help="file with a client certificate and its key; empty: forget it"),
    argument("url", metavar="URL", nargs="?", completes="index",
             help="URL of a server or an index; or USER/INDEX or INDEX on the current server"),
    JSON)
def use_server(client):
    """Show and change the server and index to work with.

    Without a URL it shows the current connection."""
    options = client.options
    if options.delete:
        return _delete_state(client)
    if options.local:
        _create_local_state(client)
    if options.venv is not None:
        remember_venv(client)
    if options.always_set_cfg is not None:
        client.change_state(always_setcfg=options.always_set_cfg == "yes",
                            settrusted=options.pip_set_trusted == "yes")

    target, pair = _find_target(client)
    if target:
        remote, status, user = _connect(client, target, pair)
    elif options.list:
        raise Failure("not connected to any server", "type 'devpi use URL' first")
    else:
        remote, status, user = Remote(), "noauth", ""

    if options.list:
        return _list_indexes(client, remote)
    if options.user:
        client.change_state(username=options.user)
        if remote.root:
            remote, status, user = client.get_api(remote.index or remote.root.rstrip("/"))
    _configure_installers(client, remote)
    _show_connection(client, remote, user if status == "ok" else None)
    return 0


def _delete_state(client):
    """Delete the state file in use; auth.json stays."""
    path = client.state_file.path
    if not os.path.exists(path):
        raise Failure("no configuration found")
    os.unlink(path)
    client.console.info(f"REMOVED configuration at {path}")
    client.console.print_json({"removed": path})
    return 0


def _create_local_state(client):
    """Keep the state in the active virtual environment; it starts as a copy."""
    if not client.venv_state:
        raise Failure("Using --local is only valid in an active virtualenv.")
    if not os.path.exists(client.venv_state):
        client.console.info(f"Creating local configuration at {client.venv_state}")
        write_private(client.venv_state, json.dumps(client.state, indent=2, sort_keys=True))
    client.state_file = StateFile(client.venv_state)


def _find_target(client):
    """(URL to connect to, (user, password) from it or None); the URL is "" without a server.

    The argument overrides DEVPI_INDEX, which overrides the stored state."""
    url, environment = client.options.url, os.environ.get("DEVPI_INDEX")
    stored = Remote.of_state(client.state)
    if not url:
        remote = client.remote if environment else stored
        return remote.index or remote.root, None

    if environment:
        client.console.say("Using index URL from command line instead of DEVPI_INDEX "
                           f"({masked(environment)}) from environment.")
    url, pair = _split_basic_auth(url)
    client.note_given_url(url)
    return client.index_url(url, _root_for(client, url, stored, environment)), pair


def _connect(client, target, pair):
    """Connect to a URL; returns (Remote, login status, user) as the server states them.

    The remote is stored, unless the options say that it is for this command only.  `pair`:
    credentials for the proxy in front of the server, or None."""
    stored = Remote.of_state(client.state)
    certificate = _client_certificate(client, target)
    if pair:
        client.auth.set_basic_auth("/".join(target.split("/")[:3]) + "/", *pair)
    remote, status, user = _get_api_or_root(client, target, stored)
    if origin_of(remote.root) != origin_of(target):
        client.console.warn(f"The server has rewritten the url to: {remote.index or remote.root}")

    client.set_remote(remote)
    if certificate is not None:
        client.auth.set_client_cert(remote.root, certificate or None)
    options = client.options
    is_for_once = options.urls or options.list if options.url else os.environ.get("DEVPI_INDEX")
    if not is_for_once:
        _store_remote(client, remote, stored)

    # DEVPI_PASSWORD can log in only after the server is known.
    if status != "ok" and client.identity(remote.root):
        remote, status, user = client.get_api(remote.index or remote.root.rstrip("/"))
    return remote, status, user


def _get_api_or_root(client, target, stored):
    """The result of `get_api`; for `use -l`, the server replaces a stored index that is gone."""
    options = client.options
    try:
        return client.get_api(target)
    except Refused as refusal:
        if refusal.status == 404 and not refusal.hint:
            refusal.hint = "'devpi use -l' lists the indexes of the server" if stored.root else ""
        if refusal.status != 404 or options.url or not stored.index or not options.list:
            raise
        return client.get_api(stored.root.rstrip("/"))


def _store_remote(client, remote, stored):
    """Store the remote; on a new server, the last login there becomes the current user."""
    client.edit_state(remote.write_to)
    if client.given_url:
        named = {"url": server_of(client.given_url), "root": remote.root}
        client.change_state(devpi_lite_named=named)
    logins = client.auth.tokens(remote.root)
    if remote.root != stored.root and logins and client.stored_user not in dict(logins):
        client.change_state(username=logins[0][0])


def _root_for(client, url, stored, environment):
    """The server of a relative index name; a Failure without a server."""
    if "://" in url:
        return ""
    if environment and "://" in environment:
        return client.remote.root
    if not stored.root:
        hint = f"'{url}' is relative to one; type 'devpi use URL' first"
        if re.search("[:.]", url):
            hint = f"a URL starts with http:// or https://, as in http://{masked(url)}"
        raise Failure("not connected to a server, see 'devpi use'", hint)
    return stored.root


def _split_basic_auth(url):
    """(URL without credentials, (user, password) or None)."""
    parts = urllib.parse.urlsplit(url)
    if "@" not in parts.netloc:
        return url, None
    if not parts.username or not parts.password:
        raise Failure("When using basic auth, you have to provide username and password.")
    pair = urllib.parse.unquote(parts.username), urllib.parse.unquote(parts.password)
    return public_url(url), pair


def _client_certificate(client, target):
    """The path of --client-cert, "" to delete the stored one, or None for no change.

    This command already uses it; it is stored after the server has responded."""
    given, stored = client.options.client_cert, client.auth.client_cert(target)
    if given is None:
        if stored:
            client.console.info(f"Using existing client cert for '{target}'.")
        return None

    if not given:
        client.console.info(f"Removing stored client cert for '{target}'.")
        path = ""
    else:
        path = os.path.abspath(os.path.expanduser(given))
        if not os.path.exists(path):
            raise Failure(f"The client certificate at '{given}' doesn't exist.")

    def certificate_for(url):
        is_target = origin_of(url) == origin_of(target)
        return (path or None) if is_target else client.auth.client_cert(url)
    client.http.client_cert = certificate_for
    return path


def _list_indexes(client, remote):
    """`use --list`: print the indexes of the server, or of the user of -u."""
    user = client.options.user
    if user:
        config = client.call("GET", remote.root + path_segment(user), expect="userconfig").result
        users = {user: config}
    else:
        users = client.call("GET", remote.root, expect="list:userconfig").result

    indexes = []
    for name, user_config in users.items():
        for index, config in (user_config.get("indexes") or {}).items():
            indexes.append({
                "index": f"{name}/{index}", "type": config.get("type"),
                "bases": list(config.get("bases") or ()), "volatile": config.get("volatile")})
    indexes.sort(key=lambda index: index["index"])

    name_width = max([15, *(len(index["index"]) for index in indexes)])
    bases_width = max([15, *(len(",".join(index["bases"])) for index in indexes)])
    for index in indexes:
        bases = ",".join(index["bases"])
        client.console.print_result(f"{index['index']:{name_width}} bases={bases:{bases_width}} "
                                    f"volatile={index['volatile']}")
    client.console.print_json({"server": remote.root, "indexes": indexes})
    return 0


def _show_connection(client, remote, user):
    """Print the connection.  `user`: our name as the server knows it, or None."""
    console = client.console
    identity = client.identity(remote.root) if remote.root else None
    accessible = _check_index_access(client, remote, user)
    _show_remote(client, remote, user, identity)
    if user and identity and identity.source == "login":
        _warn_before_expiry(client, remote, user)

    venv = effective_venv(client)
    if venv:
        console.say(f"venv for install/set commands: {venv}")
        console.say("only setting venv pip/uv config, no global configuration changed")
    files = _present_settings(venv)
    for file in files:
        console.say(f"{display_path(file.path)}: {settings_status(file)}")
    console.say(f"always-set-cfg: {'yes' if client.state.get('always_setcfg') else 'no'}")

    console.print_json({
        "server": remote.root or None, "index": remote.index,
        "user": user, "logged_in": user is not None,
        "login_source": identity.source if identity and user else None, "accessible": accessible,
        "simpleindex": remote.simpleindex, "pypisubmit": remote.pypisubmit,
        "features": list(remote.features), "venv": venv,
        "settings": {file.path: configured_index(file) for file in files}})


def _show_remote(client, remote, user, identity):
    """Print the server, the index, and our login there."""
    console = client.console
    if user:
        is_stored = not identity or identity.source == "login"
        login = f"(logged in as {user}{'' if is_stored else f' via {identity.source}'})"
    else:
        login = "(not logged in)"

    if remote.index:
        console.info(f"current devpi index: {remote.index} {login}")
    elif remote.root:
        console.info(f"using server: {remote.root} {login}")
        console.error("no current index: type 'devpi use -l' to discover indices")
    else:
        console.error("no server: type 'devpi use URL' with a URL pointing to a server "
                      "or directly to an index.")

    if remote.features and remote.index:
        console.say(f"supported features: {', '.join(sorted(remote.features))}")
    if client.options.urls or console.is_debug:
        for key in ("login", "pypisubmit", "simpleindex"):
            console.say(f"{key:>19}: {getattr(remote, key) or None}")


def _check_index_access(client, remote, user):
    """Whether the index can be read; None without an index.  Prints the reason if it can't."""
    if not remote.index:
        return None
    try:
        client.index_config(remote.index)
        return True
    except Refused as refusal:
        if refusal.status == 404:
            client.console.error("Connected index does not exist.")
        elif refusal.status == 403:
            client.console.error(refusal.message)
            client.console.error("You don't have permission to access this index." if user else
                                 "You might have to login first to access this index.")
        else:
            raise
        return False


def _should_trust_host(client, remote):
    """Whether to tell pip to use the host of the index without verified TLS."""
    if not remote.simpleindex or client.options.pip_set_trusted == "no":
        return False
    parts = urllib.parse.urlsplit(remote.simpleindex)
    is_insecure = parts.scheme == "http" and not is_loopback(parts.hostname)
    is_wanted = client.options.pip_set_trusted == "yes" or bool(client.state.get("settrusted"))
    return (is_wanted or is_insecure) and may_trust_host(client, remote.simpleindex)


def _present_settings(venv):
    """The configuration files that exist, or that we create."""
    return [file for file in settings_files(venv) if file.is_ours or os.path.exists(file.path)]


def _configure_installers(client, remote):
    """Write or remove the index in the files of pip and uv, as --set-cfg and others ask."""
    console, trusted = client.console, _should_trust_host(client, remote)
    files = _present_settings(effective_venv(client))
    is_automatic = client.options.pip_set_trusted == "auto" and not client.state.get("settrusted")
    if remote.index and trusted and is_automatic:
        console.warn("Warning: insecure http host, trusted-host will be set for pip")

    if client.options.unset_cfg:
        for file in files:
            if undo_settings(file):
                console.say(f"{display_path(file.path)}: settings of the index taken out")
    elif client.options.set_cfg or client.state.get("always_setcfg"):
        if not remote.index:
            console.error("no index configured: cannot set pip/easy_install index")
        for file in files if remote.index else ():
            _write_configuration(client, remote, file, trusted)


def _write_configuration(client, remote, file, trusted):
    """Write the index into a configuration file."""
    urls = {"simpleindex": remote.simpleindex, "index": remote.index + "/"}
    for key, url in urls.items():
        # Look up each URL: a server may state a URL on another server.
        pair = client.auth.basic_auth(url)
        urls[key] = with_credentials(url, *pair) if pair else url

    path = display_path(file.path)
    has_default_index = file.settings[0][0] is None and \
        uv_default_index(read_settings(file.path) or "") is not None
    if has_default_index:
        client.console.error(
            f"{path} has a default [[index]], which goes before index-url: left alone")
    else:
        write_settings(file, urls, origin_of(remote.simpleindex)[1], trusted)
    if os.path.dirname(file.path) == os.path.join(os.path.expanduser("~"), ".pip"):
        client.console.warn(f"{path} is an old place: better move it to ~/.config/pip/pip.conf")


def _warn_before_expiry(client, remote, user):
    """Warn if our login expires within an hour: a long upload would fail."""
    seconds = client.auth.seconds_left(remote.root, user)
    if seconds is not None and 0 < seconds < 3600:
        minutes = int(seconds // 60) + 1
        client.console.warn(f"this login ends in {minutes} minutes: devpi login {user}")


# -- login, logoff


@command(
    "login", "log in to the server as a user",
    argument("--password", metavar="PW",
             help="the password; other users of this machine may see it there"),
    argument("--password-file", metavar="FILE",
             help="file whose first line is the password; - for standard input"),
    argument("--token", metavar="TOKEN",
             help="log in with an API token (devpi-...); better in DEVPI_TOKEN"),
    argument("--check", action="store_true",
             help="only tell whether we are logged in: exit status 0 or 1"),
    argument("user", metavar="USER", nargs="?", completes="user",
             help="user name (default: DEVPI_USER)"))
def log_in(client):
    """Log in to the server.  The login's token is kept in auth.json; the password is not.

    The password comes from --password, --password-file, DEVPI_PASSWORD, keyring, .netrc,
    or is asked for on a terminal."""
    options, console = client.options, client.console
    if options.check:
        return _check_login(client)
    token = options.token or os.environ.get("DEVPI_TOKEN")
    user = options.user or os.environ.get("DEVPI_USER") or (token_user(token) if token else None)
    if not user:
        raise UsageError("the name of the user is missing: devpi login USER, or set DEVPI_USER")
    client.require_server()        # fail before we ask for the password

    password = options.password
    if password is None and options.password_file:
        password = read_password_file(options.password_file)
    if password is None and token and (options.token or not os.environ.get("DEVPI_PASSWORD")):
        return log_in_with_token(client, user, token)
    if password is None:
        password = _find_password(client, user)

    login = client.request_token(client.remote, user, password)
    seconds = login.get("expiration")
    store_login(client, user, login["password"], seconds)
    where = f" at '{client.remote.index}'" if client.remote.index else ""
    has_end = isinstance(seconds, (int, float))
    valid = f", credentials valid for {seconds / 3600:.2f} hours" if has_end else ""
    console.info(f"logged in '{user}'{where}{valid}")
    if os.environ.get("DEVPI_USER", user) == user:
        _check_index_access(client, client.remote, user)
    return 0


def _find_password(client, user):
    """A user's password, from a source that needs no person, or else from the person."""
    stored = password_without_prompt(client.console, client.root, user)
    if stored is not None:
        client.console.debug(f"the password is from {stored[1]}")
        return stored[0]
    if not client.console.is_interactive():
        raise Failure(f"no password available for user '{user}' "
                      "(use --password, DEVPI_PASSWORD or keyring)")
    return client.console.ask_password(f"password for user {user} at {client.root}: ")


def store_login(client, user, token, seconds):
    """Store a session token, and make its user the current one.  `seconds`: its lifetime."""
    client.auth.add_token(client.remote.root, user, token, seconds)
    client.change_state(username=user)


def log_in_with_token(client, user, token):
    """Store an API token as login, if the server accepts it; returns the exit status."""
    check_secret(user, token)
    if not client.is_given_server(client.root):
        raise Failure(f"the server at {masked(client.given_url)} calls itself {client.root}",
                      f"type 'devpi use {shell_quoted(client.root)}' first")

    headers = Identity(user, token, "login").headers()
    response = client.http.request(
        "GET", client.root + "+api", json_headers(),
        credentials=lambda url: headers if is_below(url, client.root) else {})
    envelope = client.unwrap(response, "apiconfig")
    if (envelope.result.get("authstatus") or [""])[0] != "ok":
        raise Failure(f"the server does not take this token for user '{user}'")
    store_login(client, user, token, None)
    client.console.info(f"logged in '{user}' with a token")
    return 0


def _check_login(client):
    """`login --check`: the exit status is 0 if we are logged in as the given user."""
    wanted = client.options.user
    _, status, user = client.get_api(client.root.rstrip("/"))
    if status != "ok" and client.identity(client.root):     # DEVPI_PASSWORD has logged in now
        _, status, user = client.get_api(client.root.rstrip("/"))

    if status == "ok" and wanted in (None, user):
        client.console.print_result(f"logged in as {user}")
        return 0
    is_other_user = status == "ok"
    client.console.error(f"logged in as {user}, not as {wanted}" if is_other_user else
                         "not logged in")
    return 1


@command("logoff", "forget the login of the current user", aliases=("logout",))
def log_off(client):
    """Forget the login of the current user for this server."""
    stored = Remote.of_state(client.state)
    root = client.remote.root if os.environ.get("DEVPI_INDEX") else stored.root
    user = os.environ.get("DEVPI_USER") or client.stored_user
    logins = client.auth.tokens(root) if root else []
    if not user and logins:
        user = logins[0][0]
    if root and client.auth.delete_token(root, user):
        client.console.info("login information deleted")
    else:
        client.console.error("not logged in")
    return 0


# -- env


@command(
    "env", "print the variables that make pip and uv use the index",
    argument("--shell", choices=("sh", "fish", "powershell", "cmd"),
             default="powershell" if os.name == "nt" else "sh",
             help="for which shell (default: %(default)s)"),
    argument("--with-credentials", action="store_true",
             help="with our login in the URL, for indexes with restricted reading"),
    argument("--unset", action="store_true", help="print what takes them back"),
    INDEX, JSON, is_for_shells=True)
def print_variables(client):
    """Print the variables that make pip and uv use the index: eval "$(devpi env)"."""
    options = client.options
    if not client.remote.simpleindex:
        client.require_index()
        raise Failure(f"{client.index} has no simple index")

    url = client.remote.simpleindex
    if options.with_credentials:
        url = index_with_credentials(client, client.remote)
    variables = installer_variables(client, url)
    client.console.print_json(variables)
    for name, value in variables.items():
        value = None if options.unset else value
        client.console.print_result(_shell_line(options.shell, name, value))
    return 0


def _shell_line(shell, name, value):
    """A line of a shell's language that sets a variable; a value of None unsets it."""
    import shlex
    if shell == "cmd":
        # Inside quotes, & and similar characters are no commands; a URL contains no quotes.
        return f'set "{name}=' + (value or "").replace("%", "%%").replace('"', "") + '"'

    if shell == "powershell":
        if value is None:
            return f"Remove-Item Env:{name} -ErrorAction SilentlyContinue"
        # PowerShell treats each of these characters as a quote.
        escaped = re.sub("['\u2018-\u201b]", r"\g<0>\g<0>", value)
        return f"$env:{name} = '{escaped}'"

    if shell == "fish":
        escaped = (value or "").replace("\\", "\\\\").replace("'", "\\'")
        return f"set -e {name}" if value is None else f"set -gx {name} '{escaped}'"

    return f"unset {name}" if value is None else f"export {name}={shlex.quote(value)}"


# ==================================================================================================
# 10  Users and indexes
#
# The commands user, passwd, index and project: the users, indexes and projects of a server, and
# their settings.
# ==================================================================================================

_HIDDEN_KEYS = ("password", "pwhash", "webhook_secret")     # settings that are never printed
_FORCE = argument("-f", "--force", action="store_true",
                  help="with --delete: although other users' indexes build on it")


def _delete_in_use(client, url):
    """Delete a user or an index, even if others use it as a base, given --force.

    Returns the consequences that the server states, as `Client.delete`."""
    try:
        return client.delete(url, client.options.force)
    except Refused as refusal:
        if refusal.status == 409 and not client.options.force:
            refusal.hint = "--force does it, and takes it out of their bases"
        raise


def _parse_settings(words):
    """[(key, value), ...] of `KEY=VALUE` arguments; a Failure that names all malformed ones."""
    malformed = [word for word in words if not re.match(r"[^=]+=", word)]
    if malformed:
        raise Failure(f"arguments must be format NAME=VALUE: {malformed}")
    return [tuple(word.split("=", 1)) for word in words]


def _format_value(value):
    """A setting's value as `index` and `user` print it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)


def _user_url(client, name):
    """The URL of a user; a Failure for a name that can't be one."""
    if "/" in name or not name:
        raise Failure(f"'{name}' is no user name: a slash can't be in one")
    return client.root + path_segment(name)


@command(
    "user", "show, make, change or delete users",
    action("-c", "--create", help="make the user"),
    action("--delete", help="delete the user with all indexes"),
    _FORCE,
    action("-m", "--modify",
           help="change the user (also without this option, if settings are given)"),
    action("-l", "--list", help="list the names of all users"),
    argument("--password-file", metavar="FILE",
             help="with -c or -m: file with the new password; - for standard input"),
    argument("words", metavar="USER KEY=VALUE", nargs="*", completes="user",
             help="user (default: the current one) and settings: "
                  "password, email, title, description, custom_data"),
    JSON)
def manage_users(client):
    """Show, make, change or delete users."""
    action, words = client.options.action, list(client.options.words)
    name = words.pop(0) if words and "=" not in words[0] else None
    settings = dict(_parse_settings(words))
    if client.options.password_file:
        settings["password"] = read_password_file(client.options.password_file)

    if action == "list":
        users = client.call("GET", client.root, expect="list:userconfig").result
        client.console.print_names(users)
    elif action == "create":
        _create_user(client, _require_name(name), settings)
    elif action == "delete":
        _delete_user(client, _require_name(name))
    elif settings or action == "modify":
        _modify_user(client, _name_or_current(client, name), settings)
    else:
        _show_user(client, _name_or_current(client, name))


def _require_name(name):
    if name is None:
        raise Failure("need to specify a username")
    return name


def _name_or_current(client, name):
    name = name or client.user
    if name is None:
        raise Failure("no user specified and no user currently active")
    return name


def _show_user(client, name):
    url = _user_url(client, name)
    config = client.call("GET", url, expect="userconfig").result
    client.console.print_result(f"{url}:")
    for key in sorted(set(config) - {"indexes", "username", "pwhash", "pwsalt"}):
        client.console.print_result(f"  {key}={_format_value(config[key])}")
    client.console.print_json(config)


def _create_user(client, name, settings):
    url = _user_url(client, name)
    if not {"password", "pwhash"} & set(settings):
        settings["password"] = ask_new_password(client.console, name, "as password=..., or ")
    envelope = client.call("PUT", url, settings, expect="userconfig")
    client.console.info(f"user created: {name}")
    client.console.print_json(envelope.result)


def _modify_user(client, name, settings):
    """Change settings of a user; a new password renews our own login."""
    url = _user_url(client, name)
    client.call("GET", url, expect="userconfig")       # fails without such a user
    for key, value in settings.items():
        shown = "********" if key in _HIDDEN_KEYS else value
        client.console.say(f"/{name} changing {key}: {shown}")
    envelope = client.call("PATCH", url, settings)

    # A new password ends the sessions; the response contains a fresh token.
    has_token = envelope.type == "userpassword" and isinstance(envelope.result, dict)
    login = envelope.result if has_token else {}
    identity = client.identity(url, may_login=False)
    is_our_login = identity and (identity.user, identity.source) == (name, "login")
    if login.get("password") and is_our_login:
        store_login(client, name, login["password"], login.get("expiration"))

    client.console.info(f"user modified: {name}")
    client.console.print_json({"user": name, "changed": sorted(settings)})


def _delete_user(client, name):
    url = _user_url(client, name)
    client.console.say(f"About to remove: {url}")
    if not client.console.confirm_deletion({"deleted": None}):
        return
    note = _delete_in_use(client, url)
    client.auth.delete_token(client.root, name)
    client.console.info(f"user deleted: {name}")
    client.console.print_json({"deleted": name, **({"note": note} if note else {})})


@command(
    "passwd", "change a password",
    argument("--password-file", metavar="FILE",
             help="file with the new password; - for standard input"),
    argument("user", metavar="USER", nargs="?", completes="user",
             help="user name (default: the current user)"))
def change_password(client):
    """Change the password of the current user, or as root that of another one.
    It is asked for twice."""
    name = _name_or_current(client, client.options.user)
    if "=" in name:
        raise UsageError("passwd takes the name of a user; the password is asked for, "
                         "or comes from --password-file")
    _user_url(client, name)     # check the name before we ask
    file = client.options.password_file
    password = read_password_file(file) if file else ask_new_password(client.console, name)
    _modify_user(client, name, {"password": password})


# -- indexes


@command(
    "index", "show, make, change or delete indexes",
    action("-c", "--create", help="make the index"),
    action("--delete", help="delete the index with all that is in it"),
    _FORCE,
    action("-l", "--list", help="list the indexes of the current or the given user"),
    argument("--no-projects", action="store_true",
             help="ask the server to leave out the names of projects"),
    argument("words", metavar="INDEX KEY=VALUE", nargs="*", completes="index",
             help="index (default: the current one) and settings: "
                  "KEY=VALUE, KEY+=VALUE, KEY-=VALUE, KEY-= (take out)"),
    JSON)
def manage_indexes(client):
    """Show, make, change or delete indexes.

    Settings: type, bases, volatile, acl_upload, mirror_url, title and more;
    lists are written with commas.  Names of devpi 6 and 7 go to the server as
    they are; devpi_lite takes both."""
    action, words = client.options.action, list(client.options.words)
    name = words.pop(0) if words and "=" not in words[0] else None
    if action == "list":
        return _list_indexes_of_user(client, name)

    if action in ("create", "delete") and name is None:
        raise Failure("need to explicitly specify index for deletion/creation")
    if action == "delete" and words:
        raise Failure("cannot delete if you specify key=values")
    pairs = _parse_settings(words)
    url = client.index_url(name, client.root) if name else client.index
    if action == "delete":
        return _delete_index(client, url)

    note = ""
    if action == "create":
        note = _create_index(client, url, pairs)
    elif words:
        client.require_login()
        note = _modify_index(client, url, words, pairs)
    if note:        # print it first: showing the index may fail
        client.console.warn_on_stderr(note)
    with_projects = not (client.options.no_projects or action == "create" or words)
    _show_index(client, url, with_projects, note)


def _create_index(client, url, pairs):
    """Create an index; returns the note that the server adds, or ""."""
    settings = dict(pairs)
    operations = [key for key, _ in pairs if key.endswith(("+", "-"))]
    if operations:
        raise Failure("a new index has nothing to add to or take from: "
                      f"{operations[0]}={settings[operations[0]]}")
    return client.call("PUT", url, settings, expect="indexconfig").message


def _modify_index(client, url, words, pairs):
    """Change the settings of an index; returns the note that the server adds, or ""."""
    path = "/" + "/".join(url.split("/")[-2:])
    config = client.index_config(url)
    if "server-keyvalue-parsing" in client.remote.features:
        for word in words:
            left = word.partition("=")[0]
            is_hidden = left.rstrip("+-") in _HIDDEN_KEYS
            client.console.say(f"{path} {left}=********" if is_hidden else f"{path} {word}")
        return client.call("PATCH", url, words, expect="indexconfig").message

    for key, value in pairs:
        if key.endswith(("+", "-")):
            raise Failure(f"this server only takes KEY=VALUE, not {key}={value}")
        shown = "********" if key in _HIDDEN_KEYS else value
        client.console.say(f"{path} changing {key}: {shown}")
    return client.call("PATCH", url, {**config, **dict(pairs)}, expect="indexconfig").message


def _show_index(client, url, with_projects, note):
    """Print the settings of an index; `note` goes into the JSON document."""
    try:
        config = client.index_config(url, with_projects)
    except Refused as refusal:
        if refusal.status == 403 and client.user is None:
            raise Failure(refusal.message,
                          "you need to be logged in (use 'devpi login USER')") from None
        raise

    client.console.print_result(f"{url}:")
    first = [key for key in ("type", "bases", "volatile", "acl_upload") if key in config]
    for key in first + sorted(set(config) - set(first) - {"projects"}):
        client.console.print_result(f"  {key}={_format_value(config[key])}")
    client.console.print_json({"url": url, **config, **({"note": note} if note else {})})


def _list_indexes_of_user(client, name):
    name = name or client.require_login()
    config = client.call("GET", _user_url(client, name), expect="userconfig").result
    client.console.print_names(f"{name}/{index}" for index in config.get("indexes") or ())


def _delete_index(client, url):
    client.console.say(f"About to remove: {url}")
    if not client.console.confirm_deletion({"deleted": None}):
        return
    note = _delete_in_use(client, url)
    client.console.info(f"index deleted: {url}")
    client.console.print_json({"deleted": url, **({"note": note} if note else {})})


# -- projects


@command(
    "project", "show or change the settings of a project on an index",
    argument("name", metavar="PROJECT", completes="project",
             help="PROJECT of the current index, or USER/INDEX/PROJECT"),
    argument("words", metavar="KEY=VALUE", nargs="*",
             help="settings: KEY=VALUE, KEY-= (take out)"),
    JSON)
def manage_project(client):
    """Show or change the settings of a project on an index, and show which of
    its bases the project comes from, and why.

    Setting: inheritance_rules="allow all", to let mirrors answer for the
    project beside the index's own files.  The server has to be devpi_lite, or
    devpi-server 7 or newer."""
    words = client.options.words
    settings = _parse_settings(words)
    url, index, name = _project_url(client, client.options.name)
    _require_project_settings(client, url, index, name)
    if words:
        client.require_login()
        for word in words:
            client.console.say(f"/{index}/{name} {word}")
        # devpi-server 7.0.0b4 takes a list only under the project's first spelling
        takes_out = any(key.endswith(("+", "-")) for key, _ in settings)
        client.call("PATCH", url, words if takes_out else dict(settings), expect="projectconfig")
    _show_project(client, url)


def _project_url(client, text):
    """(URL, user/index, project) of PROJECT, INDEX/PROJECT, USER/INDEX/PROJECT or a URL."""
    place, _, name = text.rstrip("/").rpartition("/")
    if not name or "=" in name:
        raise Failure(f"'{masked(text)}' is not of the form PROJECT or USER/INDEX/PROJECT")
    index = client.index_url(place, client.root) if place else client.index
    name = normalize(name)
    return f"{index}/{path_segment(name)}", "/".join(index.split("/")[-2:]), name


def _require_project_settings(client, url, index, name):
    """A Failure if the server has no settings of projects."""
    feature = "projectconfig-v2"
    if url.startswith(client.root) and feature in client.remote.features:
        return
    remote, _, _ = client.get_api(url.rsplit("/", 3)[0])    # the server may be newer than `use`
    if feature not in remote.features:
        raise Failure(
            "this server has no settings of projects: devpi-server 7 and devpi_lite have",
            f"'devpi index {index} mirror_whitelist+={name}' lets mirrors answer for it, too")


def _show_project(client, url):
    """Print the settings of a project, its versions, and the way to them."""
    project = client.call("GET", url + "?v=2", expect="projectconfig_v2").result
    config, versions = project.get("config") or {}, project.get("versions") or {}
    client.console.print_result(f"{url}:")
    for key in sorted(config):
        client.console.print_result(f"  {key}={_format_value(config[key])}")
    client.console.print_result(f"  versions={','.join(versions)}")

    steps = (project.get("inheritance_info") or {}).get("traversal_infos") or ()
    shown = []
    for step in steps:
        if step.get("action") == "postponed":       # what became of it follows
            continue
        text = f"  {step.get('name')}: {step.get('action')}"
        if step.get("has_project") in ("true", "false"):
            text += ", has it" if step["has_project"] == "true" else ", does not have it"
        text += f" ({step['reason']})" if step.get("reason") else ""
        if text not in shown:       # devpi-server 7 repeats an index for each of its bases
            shown.append(text)
    for text in shown:
        client.console.print_result(text)
    client.console.print_json({"url": url, **project})


# ==================================================================================================
# 11  Reading
#
# The commands list, getjson and patchjson: the content of an index, and JSON of any path.  Only
# patchjson changes anything.
# ==================================================================================================

_SHOWN_VERSIONS = 3              # without --all
_PARALLEL_READS = 8


@dataclasses.dataclass(frozen=True)
class Link:
    """A file of a release.

    `rel` is devpi's: `releasefile` (an archive), `doczip` (documentation) or `toxresult`."""
    rel: str
    url: str
    hashes: tuple                   # ((algorithm, hex), ...)
    for_url: str = ""               # of a test result: the URL of the archive that was tested
    yanked: typing.Any = None

    @property
    def filename(self):
        return basename(self.url)

    @property
    def best_hash(self):
        """(algorithm, hex digest) of the strongest hash that hashlib can verify, or None."""
        valid = [pair for pair in self.hashes if is_digest(*pair)]
        order = ("sha512", "sha384", "sha256", "blake2b", "sha3_256")

        def rank(pair):
            return order.index(pair[0]) if pair[0] in order else len(order)
        return min(valid, key=rank, default=None)


@dataclasses.dataclass(frozen=True)
class Release:
    """A version of a project on one index."""
    version: str
    links: tuple = ()
    is_shadowed: bool = False       # an index earlier in the order of bases has the version too
    yanked: typing.Any = None

    @property
    def files(self):
        """The archives, sorted by name."""
        return sorted((link for link in self.links if link.rel == "releasefile"),
                      key=lambda link: link.filename)

    def results_of(self, file):
        """The test results of an archive, newest first."""
        plain = urllib.parse.unquote(public_url(file.url).partition("#")[0])
        return [link for link in reversed(self.links)
                if link.rel == "toxresult" and urllib.parse.unquote(link.for_url) == plain]


def releases_of(client, project, ignore_bases=False):
    """The releases of a project in ascending order, each followed by those that it shadows."""
    query = "?ignore_bases=" if ignore_bases else ""
    envelope = client.call("GET", client.project_url(project) + query, expect="projectconfig")
    base = envelope.response.url.partition("?")[0]
    releases = []
    for version in sorted(envelope.result or {}, key=version_key):
        data = envelope.result[version]
        releases.append(_parse_release(version, data, base, False))
        releases.extend(_parse_release(version, shadowed, base, True)
                        for shadowed in data.get("+shadowing") or ())
    return releases


def _parse_release(version, data, base, is_shadowed):
    """The `Release` of devpi's version data; its links are relative to the URL `base`."""
    links = []
    for link in data.get("+links") or ():
        url, _, fragment = urllib.parse.urljoin(base, str(link.get("href", ""))).partition("#")
        hashes = dict(link.get("hashes") or {})
        for spec in (fragment, link.get("hash_spec") or ""):
            algorithm, _, digest = spec.partition("=")
            if digest:
                hashes.setdefault(algorithm, digest)
        for_url = ""
        if link.get("for_href"):
            for_url = urllib.parse.urljoin(base, link["for_href"]).partition("#")[0]
        links.append(Link(
            str(link.get("rel")), url, tuple(hashes.items()), for_url, link.get("yanked")))
    return Release(version, tuple(links), is_shadowed, data.get("yanked"))


def requirement_of(text):
    """The `Requirement` of an argument; a Failure if it is malformed."""
    requirement = parse_requirement(text)
    if requirement is None:
        raise Failure(f"invalid requirement '{text}'")
    return requirement


def map_in_parallel(function, items, jobs):
    """Yield function(item) for each item, in order; `jobs` calls run at the same time.

    The first exception ends it."""
    items = list(items)
    if jobs <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    import concurrent.futures
    pool = concurrent.futures.ThreadPoolExecutor(min(jobs, len(items)))
    try:
        for future in [pool.submit(function, item) for item in items]:
            yield future.result()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        # Don't wait for running calls: `main` ends the process.
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


@command(
    "list", "list the projects of the index, or the files of a project",
    argument("--all", action="store_true", help="all versions, not only the newest"),
    argument("-t", "--toxresults", action="store_true", help="show test results"),
    argument("-f", "--failures", action="store_true",
             help="show test results, and the output of those that failed"),
    argument("--ignore-bases", action="store_true", help="only what is on the index itself"),
    INDEX,
    argument("spec", metavar="SPEC", nargs="?", completes="project",
             help="a project, perhaps with versions: 'hello>=1.2,!=1.4'"),
    JSON)
def list_index(client):
    """List the projects of the index; with -v also their newest version, but for mirrored projects.

    With a project: its files, newest version first.  Bold: of this index; plain: of a base;
    red: shadowed."""
    if client.options.spec:
        return _list_files(client, requirement_of(client.options.spec))

    config = client.index_config(client.index, with_projects=True)
    projects = sorted(config.get("projects") or ())
    if not client.console.verbose:
        for project in projects:
            client.console.print_result(project)
        return client.console.print_json({"index": client.index, "projects": projects})

    if _is_mirror(config):
        for project in projects:
            client.console.print_result(project)
        shown = dict.fromkeys(projects)
        is_mirrored = True
    else:
        shown, is_mirrored = _list_versions(client, config, projects)

    if is_mirrored:
        client.console.warn_on_stderr("versions of mirrored projects are not asked for without "
                                      "naming a project: devpi list NAME")
    client.console.print_json({"index": client.index, "projects": [
        {"name": project, "versions": shown[project]} for project in shown]})


def _list_versions(client, config, projects):
    """Print the versions of a stage's own projects.

    Returns ({project: versions}, whether a mirror may have more versions).  Those of the mirror
    are left out: it would have to ask upstream for each project."""
    shown, mirrored = {}, set()
    if not client.options.ignore_bases:
        mirrored = _mirrored_projects(client, config, projects)

    def versions_of(project):
        ignore_bases = client.options.ignore_bases or project in mirrored
        releases = releases_of(client, project, ignore_bases)
        return [release.version for release in releases if not release.is_shadowed]

    all_versions = map_in_parallel(versions_of, projects, _PARALLEL_READS)
    for project, versions in zip(projects, all_versions):
        shown[project] = versions if client.options.all else versions[-1:]
        for version in shown[project]:
            client.console.print_result(f"{project}=={version}")
    return shown, bool(mirrored)


def _is_mirror(config):
    return config.get("type") == "mirror" or "mirror_url" in config


def _mirrored_projects(client, config, projects):
    """The projects of a stage to which a mirror among its bases may add versions.

    These are the projects that a mirror_whitelist on the way to the mirror names.  The mirror
    itself is not asked for them."""
    configs, seen, has_mirror = [config], set(), False
    for each in configs:        # the loop appends the bases
        has_mirror = has_mirror or _is_mirror(each)
        for base in map(str, each.get("bases") or ()):
            if base in seen:
                continue
            seen.add(base)
            try:
                configs.append(client.index_config(client.root + index_path(base)))
            except Refused as refusal:
                if refusal.status not in (401, 403, 404):
                    raise
                has_mirror = True       # we can't read the base, so it may be a mirror

    listed = {str(name) for each in configs for name in each.get("mirror_whitelist") or ()}
    normal = set(map(normalize, listed))
    return {project for project in projects
            if has_mirror and ("*" in listed or normalize(project) in normal)}


def _list_files(client, requirement):
    """Print the files of the releases that a requirement admits."""
    releases = _newest_first(
        release for release in releases_of(client, requirement.name, client.options.ignore_bases)
        if requirement.admits(release.version))
    releases = [release for release in releases if release.files]
    shown = releases if client.options.all else releases[:_SHOWN_VERSIONS]

    document = [
        {"version": release.version, "shadowed": release.is_shadowed,
         "files": [_list_file(client, release, file) for file in release.files]}
        for release in shown]
    hidden = len(releases) - len(shown)
    if hidden:
        client.console.print_result(f"{hidden} older versions not shown, use --all to see")
    client.console.print_json({
        "index": client.index, "project": normalize(requirement.name), "releases": document,
        "not_shown": hidden})


def _newest_first(releases):
    """The releases in descending order; those that a release shadows stay behind it."""
    def rank(pair):
        position, release = pair
        return version_key(release.version), not release.is_shadowed, -position
    return [release for _, release in sorted(enumerate(releases), key=rank, reverse=True)]


def _list_file(client, release, file):
    """Print a file, and with -t or -f its test results; returns its entry of the JSON document."""
    is_own = is_below(file.url, client.index)
    entry = {"filename": file.filename, "url": file.url, "hashes": dict(file.hashes),
             "inherited": not is_own}
    yanked = file.yanked if file.yanked is not None else release.yanked
    if yanked is not None:
        entry["yanked"] = yanked

    mark = ""
    if yanked not in (None, False):
        has_reason = isinstance(yanked, str) and yanked
        mark = f" (yanked: {one_line(yanked)})" if has_reason else " (yanked)"
    style = "error" if release.is_shadowed else "bold" if is_own else None
    client.console.print_result(file.url + mark, style)
    if client.options.toxresults or client.options.failures:
        entry["test_results"] = _show_results(client, release, file)
    return entry


# -- test results


def _show_results(client, release, file):
    """Print the test results of an archive; returns their entries of the JSON document.

    Only the newest result for each host, platform and environment counts."""
    seen, entries = set(), []
    for link in release.results_of(file):
        try:        # anybody may have posted the report, so it may be malformed
            response = client.http.request("GET", link.url, credentials=client.credentials)
            report = parse_json(response.body)
            host, platform = str(report["host"]), str(report["platform"])
            environments = dict(report["testenvs"])
        except (ValueError, KeyError, TypeError, Failure):
            client.console.print_result(f"corrupt toxresult, skipping: {link.url}", "error")
            continue

        for name in sorted(environments):
            # tox 4 builds packages in the environment .pkg.
            if name.startswith(".pkg") or (host, platform, name) in seen:
                continue
            seen.add((host, platform, name))
            environment = environments[name] if isinstance(environments[name], dict) else {}
            result = _result_of(name, host, platform, environment)
            entries.append({**result, "url": link.url})
            _show_result(client.console, result, environment, client.options.failures)
    return entries


def _steps(environment, kind):
    """The commands in the phase `setup` or `test` of a test environment's report."""
    return environment[kind] if isinstance(environment.get(kind), list) else []


def _result_of(name, host, platform, environment):
    """The outcome of one test environment; its `problem` is None if all tests passed."""
    setup, test = _steps(environment, "setup"), _steps(environment, "test")
    python = environment.get("python")
    python = python.get("version") if isinstance(python, dict) else None

    problem = None
    if not setup:
        problem = "no setup was performed"
    elif any(map(_failed, setup)):
        problem = "setup failed"
    elif not test:
        problem = "no tests were run"
    elif any(map(_failed, test)):
        problem = "tests failed"
    return {"host": host, "platform": platform, "environment": name,
            "python": str(python or "").split(" ")[0], "passed": problem is None,
            "problem": problem}


def _failed(command):
    """Whether a command in a test report failed; its exit code is a number or a text."""
    code = command.get("retcode") if isinstance(command, dict) else 1
    return str(code) not in ("0", "None", "null", "")


def _show_result(console, result, environment, with_output):
    """Print one line for a test environment; with -f also its commands up to the failed one."""
    line = f"{result['host']:<10} {result['platform']:<7} {result['environment']:<10} "
    in_tests = result["problem"] in (None, "tests failed", "no tests were run")
    if result["python"] and in_tests:
        line += result["python"] + " "
    console.print_result(line + (result["problem"] or "tests passed"),
                         None if result["passed"] else "error")

    failed_phase = {"setup failed": "setup", "tests failed": "test"}.get(result["problem"])
    for step in _steps(environment, failed_phase) if with_output and failed_phase else ():
        step = step if isinstance(step, dict) else {}
        words = step.get("command") or []
        text = " ".join(map(str, words)) if isinstance(words, list) else str(words)
        if not _failed(step):
            console.print_result(f"    OK: {text}")
            continue
        console.print_result(f"    FAIL: {text}", "error")
        for output in str(step.get("output") or "").splitlines():
            console.print_result(f"    {output}")
        break


# -- JSON


def _json_url(client, path):
    """The URL of an argument: `/x` is below the server's root, `x` below the index, or a URL."""
    if "://" in path:
        client.note_given_url(path)
        return path
    if path.startswith("/"):
        if not client.remote.root:
            raise Failure("no server currently selected", "type 'devpi use URL' first")
        return client.root.rstrip("/") + path
    if not client.remote.index:
        raise Failure("cannot use relative path without an active index" if client.remote.root else
                      "no server currently selected",
                      "type 'devpi use USER/NAME' first, or begin the path with a slash")
    return f"{client.index}/{path}"


@command(
    "getjson", "print the JSON of a path on the server",
    argument("path", metavar="PATH",
             help="/x: below the server's root; x: below the index; or a URL"))
def get_json(client):
    """Print the JSON that the server gives for a path; with -v also the headers of the response."""
    client.console.quiet = client.is_version_checked = True      # it may be no devpi server
    response = client.send("GET", _json_url(client, client.options.path), json_headers())
    if client.console.verbose:
        client.console.print_result(f"GET REQUEST sent to {public_url(response.url)}")
        headers = sorted((name.upper(), value) for name, value in response.headers.items())
        for name, value in headers:
            client.console.print_result(f"{name}: {value}")
        client.console.print_result("")
    _print_response(client, response)


@command(
    "patchjson", "send a JSON file as PATCH to a path on the server",
    argument("path", metavar="PATH",
             help="/x: below the server's root; x: below the index; or a URL"),
    argument("file", metavar="FILE", help="the JSON file; - for standard input"))
def patch_json(client):
    """Send a JSON file as PATCH to a path on the server, and print the response."""
    client.console.quiet = client.is_version_checked = True
    url, name = _json_url(client, client.options.path), client.options.file
    try:
        value = parse_json(read_text(name, "file"))
    except ValueError as error:
        raise Failure(f"{'standard input' if name == '-' else name} is no JSON: {error}") from None
    response = client.send("PATCH", url, json_headers(), json_body(value))
    client.console.print_result(f"PATCH REQUEST sent to {public_url(response.url)}")
    _print_response(client, response)


def _print_response(client, response):
    """Print the JSON of a response; Refused for an error status, a Failure without JSON."""
    if response.status not in (200, 201):
        raise client.refusal_of(response)
    value = response.json()
    if value is None:
        raise Failure(f"{public_url(response.url)}: the answer is no JSON")
    client.console.print_result(json.dumps(value, indent=4, sort_keys=True))


# ==================================================================================================
# 12  Releases
#
# The commands remove, yank, refresh and push, which change or copy the releases of an index.
# ==================================================================================================


@command(
    "remove", "remove a project, releases or a file from the index",
    argument("-f", "--force", action="store_true",
             help="also from a non-volatile index, of which you are the owner, or root"),
    INDEX,
    argument("spec", metavar="SPEC_OR_URL", completes="project",
             help="a project, perhaps with versions ('hello==1.0'), or the URL of a file"),
    JSON)
def remove_releases(client):
    """Remove a project, releases or a file from the index (never from its bases)."""
    if "://" in client.options.spec:
        # Find the remote first: DEVPI_PASSWORD is for the server of DEVPI_INDEX.
        client.set_remote(client.remote)
        client.note_given_url(client.options.spec)
        return _remove_file(client, client.options.spec.partition("#")[0])

    client.require_index()
    requirement = requirement_of(client.options.spec)
    client.require_login()
    removable = _find_removable(client, requirement)
    if not removable:
        if requirement.specifiers:
            raise _nothing_matches(requirement)
        return _remove_empty(client, requirement)

    client.console.say("About to remove the following releases and distributions")
    for release, links in removable:
        client.console.say(f"version: {release.version}")
        for link in links:
            client.console.say(f"  - {link.url}")
    if not client.console.confirm_deletion({"removed": []}):
        return

    if requirement.specifiers:
        versions = [release.version for release, _ in removable]
        notes = _delete_releases(client, requirement.name, versions)
    else:
        client.console.say(f"deleting project {requirement.name}")
        notes = [_delete(client, client.project_url(requirement.name))]
    client.console.print_json({
        "index": client.index, "project": normalize(requirement.name),
        "removed": [{"version": release.version, "files": [link.url for link in links]}
                    for release, links in removable],
        "notes": [note for note in notes if note]})


def _nothing_matches(requirement):
    return Failure(f"No releases or distributions found matching '{requirement.text}'.")


def _remove_empty(client, requirement):
    """Remove a project without files, whose name the index still keeps private."""
    name = requirement.name
    client.console.say(
        f"About to remove the project {name}, which has no files on {client.index}")
    if not client.console.confirm_deletion({"removed": []}):
        return
    try:
        note = _delete(client, client.project_url(name))
    except Refused as refusal:
        if refusal.status == 404:       # the project is on a base only
            raise _nothing_matches(requirement) from None
        raise
    client.console.say(f"deleted project {name}")
    client.console.print_json({"index": client.index, "project": normalize(name), "removed": [],
                               "notes": [note] if note else []})


def _delete_releases(client, project, versions):
    """Delete releases; returns the notes of the server.

    The server deletes all spellings of a version (3.0.0-rc.1, 3.0.0rc1) together."""
    notes, deleted = [], set()
    for version in versions:
        client.console.say(f"deleting release {version} of {project}")
        try:
            notes.append(_delete(client, client.project_url(project, version)))
        except Refused as refusal:
            if refusal.status != 404 or canonical_version(version) not in deleted:
                raise
        deleted.add(canonical_version(version))
    return notes


def _delete(client, url):
    """DELETE a URL of an index, with --force even of a non-volatile one; returns the note."""
    try:
        return client.delete(url, client.options.force)
    except Refused as refusal:
        if "non-volatile" in refusal.text and not client.options.force:
            refusal.hint = "-f does it, for the owner of the index and root"
        raise


def _find_removable(client, requirement):
    """[(release, its links on this index by name), ...] that a requirement admits, ascending."""
    removable = []
    for release in releases_of(client, requirement.name, ignore_bases=True):
        links = sorted((link for link in release.links if is_below(link.url, client.index)),
                       key=lambda link: link.filename)
        if links and not release.is_shadowed and requirement.admits(release.version):
            removable.append((release, links))
    return removable


def _remove_file(client, url):
    client.console.say(f"About to remove the following file:\n{masked(url)}")
    if client.console.confirm_deletion({"removed": []}):
        note = _delete(client, url)
        client.console.print_json({"removed": [{"files": [masked(url)]}],
                                   "notes": [note] if note else []})


@command(
    "yank", "yank releases or a file, or take that back",
    argument("-r", "--reason", metavar="TEXT", default="",
             help="what installers and people are told"),
    argument("--undo", action="store_true", help="no longer yanked"),
    INDEX,
    argument("spec", metavar="SPEC_OR_URL", completes="project",
             help="a project with versions ('hello==1.0'), or the URL of a file"),
    JSON)
def yank_releases(client):
    """Yank releases or a file (PEP 592): installers pass them over
    unless they are asked for by number."""
    options = client.options
    if "://" in options.spec:
        # Find the remote first: DEVPI_PASSWORD is for the server of DEVPI_INDEX.
        client.set_remote(client.remote)
        client.note_given_url(options.spec)
        reason = urllib.parse.quote(options.reason, safe="")
        query = "unyank" if options.undo else f"yank={reason}"
        _patch_yanked(client, f"{options.spec.partition('#')[0]}?{query}", None)
        return client.console.print_json({"yanked": not options.undo, "url": masked(options.spec)})

    requirement = requirement_of(options.spec)
    name = requirement.name
    if not requirement.specifiers:
        raise Failure(f"which versions of {name}? yank works on releases: {name}==VERSION")
    client.require_index()
    client.require_login()
    versions = [release.version for release, _ in _find_removable(client, requirement)]
    if not versions:
        raise _nothing_matches(requirement)

    yanked = False if options.undo else options.reason or True
    for version in versions:
        _patch_yanked(client, client.project_url(name, version), {"yanked": yanked})
        client.console.info(f"{'no longer yanked' if options.undo else 'yanked'}: {name} {version}")
    client.console.print_json({"index": client.index, "project": normalize(name),
                               "yanked": not options.undo, "versions": versions})


def _patch_yanked(client, url, body):
    """PATCH a release or a file to be yanked or not; a Failure if the server can't do that.

    devpi-server knows no yanks.  It responds with 404, or for a file as to a GET."""
    unknown = Failure("this server does not support yanking (devpi_lite does)",
                      "'devpi remove' takes a release away for good; that it can do")
    try:
        envelope = client.call("PATCH", url, body)
    except Refused as refusal:
        plain = url.partition("?")[0]
        if refusal.status in (405, 415) or refusal.status == 404 and \
                client.send("GET", plain, json_headers()).status == 200:
            raise unknown from None
        raise
    if envelope.type == "releasefilemeta":
        raise unknown


@command(
    "refresh", "let mirrors forget what they know of projects, and ask upstream again",
    INDEX,
    argument("projects", metavar="PKG", nargs="+", completes="project", help="a project"))
def refresh_projects(client):
    """Let the mirrors behind the index forget what they know of projects,
    and ask upstream again."""
    code = 0
    for project in client.options.projects:
        name = requirement_of(project).name
        url = f"{client.index}/+simple/{path_segment(normalize(name))}/refresh"
        response = client.send(
            "POST", url, {"Accept": "*/*"}, may_take_long=True, follow_redirects=False)
        target = urllib.parse.urlsplit(response.headers.get("Location") or "").path
        is_to_project = response.status in (302, 303) and "/+simple/" in target
        if response.status in (200, 201) or is_to_project:
            client.console.info(f"Refreshed {project}")
        else:
            client.console.error(f"Couldn't refresh {project} via {url}: "
                                 f"{response.status} {response.reason}")
            code = 1
    return code


# -- push

# The repositories of the sections in .pypirc that need not name one.
_DEFAULT_REPOSITORIES = {"pypi": "https://upload.pypi.org/legacy/",
                         "testpypi": "https://test.pypi.org/legacy/"}
# The statuses by which servers such as PyPI refuse documentation.
_NO_DOCS_STATUSES = (404, 410)


@command(
    "push", "push a release to another index, or to an outside server such as PyPI",
    INDEX,
    argument("--no-docs", action="store_true", help="without the documentation"),
    argument("--only-docs", action="store_true", help="only the documentation"),
    argument("--pypirc", metavar="FILE",
             help="where outside servers are described (default: ~/.pypirc)"),
    argument("--register-project", action="store_true",
             help="register the project on the outside server first"),
    argument("spec", metavar="NAME==VERSION", completes="project", help="the release"),
    argument("target", metavar="TARGET", completes="index",
             help="USER/INDEX or INDEX, or pypi:REPO for the section REPO of .pypirc"),
    JSON)
def push_release(client):
    """Push a release with all its files, documentation and test results
    to another index of the server.

    Or its files to an outside server, with the account that .pypirc has.  The server does it;
    nothing is sent from here."""
    options = client.options
    name, version = _parse_release_spec(client, options.spec)
    if options.no_docs and options.only_docs:
        raise Failure("Can't use '--no-docs' and '--only-docs' together.")
    body = {"name": name, "version": version, **_push_target(client, options.target)}
    for key in ("no_docs", "only_docs", "register_project"):
        option = key.replace("_", "-")
        if getattr(options, key):
            client.require_index()
            if f"push-{option}" not in client.remote.features:
                raise Failure(f"The server doesn't support the '--{option}' option, "
                              "6.14.0 or newer required.")
            body[key] = True

    response = client.send(
        "PUSH", client.index, json_headers(), json_body(body), may_take_long=True)
    if response.status == 500 and "posturl" in body:
        raise Refused(response, response.message(),
                      "so a devpi-server says that it can't reach "
                      f"{public_url(body['posturl'])}")
    value = response.json()
    if not isinstance(value, dict) or value.get("type") != "actionlog":
        try:
            client.unwrap(response, "actionlog")
        except Refused as refusal:
            if _lacks_only_docs(client, refusal, body):
                index = ["--index", options.index] if options.index else []
                words = ["devpi", "push", *index, "--only-docs", f"{name}=={version}",
                         options.target]
                line = " ".join(map(shell_quoted, words))
                refusal.hint = f"the documentation is not there yet: {line}"
            raise
    return _show_actions(client, response, value["result"])


def _push_target(client, target):
    """The part of a push's body that names the target."""
    if target.startswith("pypi:"):
        return _external_target(client, target[len("pypi:"):], client.options.pypirc)
    if re.fullmatch(r"[^/:]+/[^/:]+", target):
        return {"targetindex": target}
    if re.fullmatch(r"[^/:]+", target):
        return {"targetindex": f"{client.require_login()}/{target}"}
    raise Failure(f"target '{target}' not of form USER/NAME, NAME or pypi:REPONAME")


def _lacks_only_docs(client, refusal, body):
    """Whether a push was refused because the target has all but the documentation."""
    if refusal.status != 409 or "with the same content" not in refusal.text or \
            "targetindex" not in body or "no_docs" in body or "only_docs" in body or \
            "push-only-docs" not in client.remote.features:
        return False
    target = client.root + index_path(body["targetindex"])

    def has_docs(index):
        url = f"{index}/{path_segment(normalize(body['name']))}"
        envelope = client.call("GET", url + "?ignore_bases=", expect="projectconfig")
        return any(link.get("rel") == "doczip" for version, release in envelope.result.items()
                   if same_version(version, body["version"])
                   for link in release.get("+links") or ())
    try:
        return has_docs(client.index) and not has_docs(target)
    except Failure:         # the person needs to read the refusal, not this error
        return False


def _parse_release_spec(client, text):
    """(name, version) of `name==version`, or of the deprecated form `name-version`."""
    match = re.fullmatch(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*==\s*([^\s=,*]+)\s*", text)
    if match:
        return match[1], match[2]
    match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*?)-([0-9][^\s=-]*)", text)
    if not match:
        raise Failure("The release specification needs to be of this form: name==version")
    client.console.warn(f"the form {text} is deprecated, write {match[1]}=={match[2]}")
    return match[1], match[2]


def _external_target(client, section, path):
    """The part of a push's body that names an outside server and the account there.

    A Failure if the section of .pypirc is missing or incomplete."""
    path = os.path.expanduser(path or "~/.pypirc")
    if not os.path.exists(path):
        raise Failure(f"no pypirc file found at: {path}")
    shown_path = display_path(path)
    client.console.say(f"using pypirc {shown_path}")
    settings = _read_pypirc(path, section)

    user = settings.get("username")
    problem = f"Error while trying to read section '{section}'"
    if not user:
        raise Failure(f"{problem}: it has no username")
    url = settings.get("repository")
    # No default for other sections: PyPI never deletes what it was sent by mistake.
    if not url and section not in _DEFAULT_REPOSITORIES:
        raise Failure(f"{problem}: it has no repository",
                      f"write 'repository = URL' into the section [{section}] of {shown_path}")
    if not url:
        url = _DEFAULT_REPOSITORIES[section]
        client.console.say(f"using default pypi url {url}")

    password = settings.get("password")
    if password is None:
        password = (stored_password(client.console, url, user) or (None,))[0]
    if password is None and client.console.is_interactive():
        password = client.console.ask_password(f"password for user {user} at {url}: ")
    if password is None:
        raise Failure(f"no password available for user '{user}' at {url}",
                      f"write it into {shown_path}, .netrc or keyring")
    return {"posturl": url, "username": user, "password": password}


def _read_pypirc(path, section):
    """{key: value} of a section of .pypirc; a Failure if the file or the section is unusable."""
    import configparser
    parser = configparser.RawConfigParser()
    problem, shown_path = f"Error while trying to read section '{section}'", display_path(path)
    try:
        parser.read(path, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        # Don't print the error: its text may contain a password.
        lines = [str(line) for line, _ in getattr(error, "errors", ())] or \
            [str(getattr(error, "lineno", "?"))]
        raise Failure(f"{problem}: {type(error).__name__} in line "
                      f"{', '.join(lines)} of {shown_path}") from None
    if not parser.has_section(section):
        known = ", ".join(name for name in parser.sections() if name != "distutils")
        raise Failure(f"{problem}: {shown_path} has no section [{section}]",
                      f"it has: {known}" if known else "")
    return dict(parser.items(section))


def _show_actions(client, response, actions):
    """Print the actions of a push, one on a line; returns exit status 1 if any of them failed.

    A server that refuses documentation, but takes the files, counts as success."""
    shown = [(status, _action_words(status, list(map(str, words)))) for status, *words in actions]
    is_released = any(status in (200, 201) and not _is_docs(words) for status, words in shown)
    is_docless = is_released and any(
        status in _NO_DOCS_STATUSES and _is_docs(words) for status, words in shown)
    fine = [status in (200, 201)
            or status in _NO_DOCS_STATUSES and is_docless and _is_docs(words)
            or status == 410 and not _is_docs(words)
            for status, words in shown]

    is_refused = response.status not in (200, 201)
    failed = not all(fine) or is_refused and not is_docless
    if failed and is_refused:
        client.console.error(f"{response.method} {public_url(response.url)}\n"
                             f"{response.status} {response.reason}")
    for (status, words), is_fine in zip(shown, fine):
        write = client.console.say if is_fine else client.console.error
        write(f"   {' '.join([str(status), *words])}".rstrip())
    if is_docless:
        client.console.say("the documentation was not taken, the release is there without it "
                           "(--no-docs does not try)")
    if failed:
        client.console.error("Failure during upload")
    client.console.print_json({"ok": not failed, "status": response.status, "actions": [
        {"status": status, "action": words[0] if words else "", "details": words[1:]}
        for status, words in shown]})
    return 1 if failed else 0


def _is_docs(words):
    return words[:1] == ["docfile"]


def _action_words(status, words):
    """The words of an action of a push, each on one line.

    For an error, the reason follows the action's name and file; without one the status phrase."""
    if status in (200, 201) or not isinstance(status, int) or status < 0:
        return [" ".join(word.split()) for word in words]
    words, reason = words[:2], readable_reason(status, " ".join(words[2:]))
    if not reason and status not in _NO_DOCS_STATUSES:
        reason = http.client.responses.get(status, "")
    return [*words, reason] if reason else words


# ==================================================================================================
# 13  Archives
#
# The metadata of wheels, sdists, eggs and documentation, and unpacking that never writes outside
# its target directory.
# ==================================================================================================

ARCHIVE_ENDINGS = (".egg", ".tar", ".tar.bz2", ".tar.gz", ".tgz", ".whl", ".zip")
_METADATA_LIMIT = 20 << 20      # bytes of a metadata file
UNPACKED_LIMIT = 8 << 30        # bytes that an archive may unpack to
MEMBERS_LIMIT = 200_000
HEADER_LIMIT = 1 << 20          # bytes of a tar's long name or pax records
DIRECTORY_LIMIT = 20 << 20      # bytes of a zip's directory, which zipfile reads at once
SMALL_PIECE = 4096              # bytes of compressed data that is decompressed at once


@dataclasses.dataclass(frozen=True)
class Archive:
    """A file to upload.  `fields` is its core metadata; it is empty for documentation."""
    path: str
    name: str
    version: str                # "" for documentation whose file name states none
    fields: dict = dataclasses.field(default_factory=dict, repr=False)
    is_docs: bool = False

    @property
    def filename(self):
        return os.path.basename(self.path)

    @property
    def upload_name(self):
        """The file name in the upload form."""
        if not self.is_docs:
            return self.filename
        return f"{self.name}-{self.version}.doc.zip" if self.version else f"{self.name}.doc.zip"


def read_archive(path):
    """The `Archive` at a path; a Failure if it can't be read, or has no metadata."""
    filename = os.path.basename(path)
    docs = re.fullmatch(r"(.+)\.docs?\.(?:zip|tar\.gz|tgz)", filename)
    if docs:
        stem = docs[1]
        cut = next((dash.start() for dash in re.finditer("-", stem)
                    if parse_version(stem[dash.end():])), len(stem))
        return Archive(path, stem[:cut], stem[cut + 1:], is_docs=True)

    if not filename.endswith(ARCHIVE_ENDINGS):
        raise Failure(f"{filename}: does not contain PKGINFO, skipping")
    with _opened_archive(path) as file:
        is_zip = filename.endswith((".whl", ".zip", ".egg"))
        data = _zip_metadata(file, filename) if is_zip else _tar_metadata(file)
    fields = parse_core_metadata(data) if data is not None else {}
    if not fields.get("name") or not fields.get("version"):
        raise Failure(f"{filename}: does not contain PKGINFO, skipping")
    return Archive(path, fields["name"], fields["version"], fields)


@contextlib.contextmanager
def _opened_archive(path):
    """The open file of an archive; any error while it is read becomes a Failure that names it.

    It catches every Exception: zipfile and others raise different ones on each Python."""
    filename = os.path.basename(path)
    try:
        with open(path, "rb") as file:
            yield file
    except Failure:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:      # the disk failed, not the archive
            raise Failure(f"{filename} can't be used: {error.strerror}") from None
        raise Failure(f"{filename}: broken archive: {reason_of(error)}") from error


class _SmallReads:
    """A file that reads at most `DIRECTORY_LIMIT` bytes at once: zipfile has no such bound."""

    def __init__(self, file):
        self.file, self.size = file, os.fstat(file.fileno()).st_size
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self.close = file.close

    def read(self, size=-1):
        left = max(self.size - self.file.tell(), 0)
        size = left if size is None or size < 0 else min(size, left)
        if size > DIRECTORY_LIMIT:
            raise ValueError(f"its directory is larger than {byte_size(DIRECTORY_LIMIT)}")
        return self.file.read(size)


def _open_zip(file):
    """The ZipFile of an open file; its directory is bounded."""
    import zipfile
    return zipfile.ZipFile(_SmallReads(file))


def _zip_pieces(archive, info):
    """Yield the content of a zip's member, no longer than its stated size.

    Methods other than deflate decompress all input at once, so they get small pieces of it."""
    import zipfile
    is_bounded = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    size = PIECE if is_bounded else SMALL_PIECE
    with archive.open(info) as member:
        yield from iter(lambda: member.read(size), b"")


def _zip_metadata(file, filename):
    """The metadata file of a wheel, an egg or a zipped sdist, or None."""
    pattern = {"whl": r"[^/]+\.dist-info/METADATA", "egg": r"EGG-INFO/PKG-INFO"}.get(
        filename.rpartition(".")[2], r"[^/]+/PKG-INFO")
    with _open_zip(file) as archive:
        for info in archive.infolist():
            if re.fullmatch(pattern, info.filename):
                return _metadata(_zip_pieces(archive, info))
    return None


def _tar_metadata(file):
    """The PKG-INFO of an sdist, or None; stops reading the archive there."""
    tar = TarReader(file)
    for member in tar.members():
        if member.kind == "file" and re.fullmatch(r"(\./)?[^/]+/PKG-INFO", member.name):
            return _metadata(tar.pieces())
    return None


def _metadata(pieces):
    """The joined pieces; ValueError if they are too large for a metadata file."""
    data = bytearray()
    for piece in pieces:
        data += piece
        if len(data) > _METADATA_LIMIT:
            raise ValueError(f"its metadata is larger than {byte_size(_METADATA_LIMIT)}")
    return bytes(data)


# -- tars


class TarMember(typing.NamedTuple):
    """A member of a tar.

    `kind`: file, folder, symlink, hardlink, or "" for any other type.  `size`: bytes of content.
    `target`: where a link points to."""
    name: str
    kind: str
    size: int
    mode: int
    target: str


_TAR_KINDS = {b"0": "file", b"\0": "file", b"7": "file", b"1": "hardlink", b"2": "symlink",
              b"5": "folder"}
_TAR_BLOCK = 512


class TarReader:
    """Reads a tar once from start to end: POSIX.1-2001 or GNU's format, also in gzip or bzip2.

    ValueError if it is malformed or exceeds a limit.  We can't use tarfile: some of its versions
    seek backwards for a negative size, or read a long name of gigabytes into memory."""

    def __init__(self, file):
        self.file = _decompressed(file)
        self.count = 0              # bytes that were read
        self.left = 0               # unread bytes of the member's content
        self.padding = 0            # bytes between this content and the next header

    def members(self):
        """Yield each member; `pieces()` yields its content until the next member is requested."""
        name = target = None        # from the headers of the format's extensions,
        records = {}                # which precede the header of their member
        for number in range(4 * MEMBERS_LIMIT):
            for _ in self.pieces():     # skip unread content
                pass
            self._read(self.padding)
            block = self._read(_TAR_BLOCK, may_end=number > 0)
            if not block.strip(b"\0"):
                if not number:
                    raise ValueError("there is nothing in it")
                return

            _check_sum(block)
            kind, size = block[156:157], _tar_number(block[124:136])
            self._start_content(size)
            if kind in (b"L", b"K", b"x", b"X"):
                if size > HEADER_LIMIT:
                    limit = byte_size(HEADER_LIMIT)
                    raise ValueError(f"the header of a member is larger than {limit}")
                data = b"".join(self.pieces())
                if kind == b"L":
                    name = data
                elif kind == b"K":
                    target = data
                else:
                    records = _pax_records(data)
            elif kind != b"g":      # global pax records: packages have only comments there
                yield self._member(block, kind, records, name, target)
                name, target, records = None, None, {}
        raise ValueError(f"it has more than {4 * MEMBERS_LIMIT} headers")

    def _member(self, block, kind, records, name, target):
        """The member of a header block; pax records and GNU's long names override its fields."""
        if name is None:
            name = _until_null(block[:100])
            prefix = _until_null(block[345:500]) if block[257:263] == b"ustar\0" else b""
            name = prefix + b"/" + name if prefix else name
        name = _tar_text(records.get(b"path", name))
        target = _tar_text(records.get(b"linkpath", block[157:257] if target is None else target))
        kind = _TAR_KINDS.get(kind, "")
        if kind == "file" and name.endswith("/"):       # the format before POSIX
            kind = "folder"
        if any(key.startswith(b"GNU.sparse.") for key in records):
            kind = ""
        size = self.left
        if kind not in ("file", ""):        # links and folders have no content
            size = 0
        elif b"size" in records:
            size = _tar_size(records[b"size"])
        self._start_content(size)
        return TarMember(name, kind, size, _tar_number(block[100:108]), target)

    def _start_content(self, size):
        self.left, self.padding = size, -size % _TAR_BLOCK

    def pieces(self):
        """Yield the content of the last member, or the rest of it."""
        while self.left:
            piece = self._read(min(PIECE, self.left))
            self.left -= len(piece)
            yield piece

    def _read(self, size, may_end=False):
        """Read exactly `size` bytes; b"" at the end of the file if `may_end`, else a ValueError."""
        self.count += size
        if self.count > UNPACKED_LIMIT:
            raise ValueError(f"it unpacks to more than {byte_size(UNPACKED_LIMIT)}")
        data = self.file.read(size)
        if len(data) != size and not (may_end and not data):
            raise ValueError("it breaks off")
        return data


def _decompressed(file):
    """The file, or a reader that decompresses it; its first bytes tell gzip and bzip2."""
    magic = file.read(3)
    file.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        import gzip
        return gzip.GzipFile(fileobj=file)
    if magic == b"BZh":
        import bz2
        return bz2.BZ2File(file)
    return file


def _check_sum(block):
    """A ValueError if a block is no tar header: the checksum is the sum of the header's bytes.

    Old programs computed it with signed bytes."""
    rest, stated = block[:148] + b" " * 8 + block[156:], _tar_number(block[148:156])
    if stated != sum(rest) and stated != sum(rest) - 256 * sum(byte > 127 for byte in rest):
        raise ValueError("it is no tar")


def _tar_number(field):
    """A number in a tar header: octal digits, or GNU's binary form for large numbers.

    A ValueError for negative numbers, which GNU's form allows."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = _until_null(field).strip()
    if not re.fullmatch(b"[0-7]*", digits):
        raise ValueError("a header of the tar has a number that is none, or below 0")
    return int(digits or b"0", 8)


def _tar_size(text):
    """The size in a pax record."""
    if not re.fullmatch(b"[0-9]{1,20}", text):
        raise ValueError("a member of the tar has a size that is none, or below 0")
    return int(text)


def _until_null(data):
    return data.partition(b"\0")[0]


def _tar_text(data):
    return _until_null(data).decode("utf-8", "surrogateescape")


def _pax_records(data):
    """{key: value} of the records `LENGTH KEY=VALUE` in an extended header (POSIX.1-2001)."""
    records, start = {}, 0
    while data[start:start + 1] not in (b"", b"\0"):
        length = data[start:start + 20].partition(b" ")[0]
        end = start + (int(length) if length.isdigit() else 0)
        key, equals, value = data[start + len(length) + 1:end].partition(b"=")
        if not equals or not value.endswith(b"\n") or end > len(data):
            raise ValueError("a header of the tar has a record that is none")
        records[key], start = value[:-1], end
    return records


# -- checks


def archive_problems(archive):
    """([reasons not to send it], [remarks]) about an archive's name, size and metadata."""
    wrong, remarks, filename = [], [], archive.filename
    size = os.path.getsize(archive.path)
    if size == 0:
        wrong.append("the file is empty")
    if size > 1 << 30:
        remarks.append(
            "it is larger than 1 GiB, which servers refuse unless they were told otherwise")
    if archive.is_docs:
        return wrong, remarks

    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", archive.name):
        wrong.append(f"'{archive.name}' is no valid project name")
    if parse_version(archive.version) is None:
        remarks.append(f"'{archive.version}' is no version by PEP 440")
    wrong += _filename_problems(filename, archive.name, archive.version)

    if not archive.fields.get("metadata_version"):
        remarks.append("its metadata states no Metadata-Version")
    content_type = archive.fields.get("description_content_type") or ""
    content_type = content_type.partition(";")[0].strip().lower()
    if content_type not in ("", "text/plain", "text/x-rst", "text/markdown"):
        remarks.append(f"the description is of the unknown type '{content_type}'")
    if not (archive.fields.get("description") or "").strip():
        remarks.append("it has no long description")
    return wrong, remarks


def _filename_problems(filename, name, version):
    """[what differs between an archive's file name and the name and version in its metadata]."""
    stem = re.sub(r"(\.tar\.gz|\.tar\.bz2|\.tgz|\.tar|\.zip|\.whl|\.egg)$", "", filename)
    if filename.endswith(".whl"):
        parts = stem.split("-")
        if len(parts) not in (5, 6):
            return ["the name of a wheel is NAME-VERSION[-BUILD]-PYTHON-ABI-PLATFORM.whl"]
        if normalize(parts[0]) != normalize(name) or \
                not same_version(parts[1].replace("_", "-"), version):
            return [f"its name says {parts[0]} {parts[1]}, its metadata {name} {version}"]
        return []

    if not normalize(stem).startswith(normalize(name) + "-"):
        return [f"its name does not begin with that of the project, {name}"]
    if not any(normalize(spelling) in normalize(stem)
               for spelling in (version, canonical_version(version))):
        return [f"its name does not hold the version of its metadata, {version}"]
    return []


def digest_of(path, algorithm="sha256"):
    """The digest of a file, in hex."""
    import hashlib
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(PIECE), b""):
            digest.update(piece)
    return digest.hexdigest()


def zip_directory(source, target):
    """Zip all files below a directory, by their relative paths; returns their number.

    Links that lead out of the directory, or nowhere, are left out: nobody meant to publish their
    targets."""
    import zipfile
    count, source = 0, os.path.realpath(source)
    with writing(target), zipfile.ZipFile(
            target, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for folder, folders, names in os.walk(source):
            folders.sort()
            for name in sorted(names):
                path = os.path.join(folder, name)
                if not os.path.isfile(path) or not _is_inside(path, source):
                    continue
                archive.write(path, os.path.relpath(path, source).replace(os.sep, "/"))
                count += 1
    return count


class _Unpacking:
    """Unpacks one archive below the real path `target`, within limits.

    Nothing is written below a link, and a link's target starts with its `..` parts
    (`_link_stays_inside`).  So every link leads from a real directory to a path inside `target`,
    whatever the links on its way become later."""

    def __init__(self, filename, target):
        self.filename, self.target = filename, target
        self.bytes_left, self.members_left = UNPACKED_LIMIT, MEMBERS_LIMIT

    def charge(self, size, members=0):
        """Count bytes, and files or folders, before they are created."""
        self.bytes_left -= size
        self.members_left -= members
        if min(self.bytes_left, self.members_left) < 0:
            raise Failure(f"{self.filename} unpacks to too much: over {byte_size(UNPACKED_LIMIT)} "
                          f"or {MEMBERS_LIMIT} members")

    def prepare(self, name, size):
        """The path of a member; creates the folder that it needs."""
        self.charge(size, 1)
        separators = r"[/\\]" if os.name == "nt" else "/"
        path = os.path.join(self.target,
                            *[part for part in re.split(separators, name) if part != "."])
        is_absolute = name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name)
        if is_absolute or "\0" in name or ".." in re.split(r"[/\\]", name) \
                or _passes_a_link(os.path.dirname(path), self.target):
            raise Failure(f"{self.filename} holds the member '{name}', which leaves the archive; "
                          "nothing of it is used")

        is_folder = name.endswith("/") or path == self.target
        folder = path if is_folder else os.path.dirname(path)
        if not os.path.isdir(folder):
            self.charge(0, name.count("/"))
            os.makedirs(folder, exist_ok=True)
        return path

    def unpack_zip(self, archive):
        for info in archive.infolist():
            path = self.prepare(info.filename, info.file_size)
            if not info.is_dir():
                with OutputFile(path) as output:
                    for piece in _zip_pieces(archive, info):
                        output.write(piece)

    def unpack_tar(self, tar):
        for member in tar.members():
            path = self.prepare(member.name, member.size)
            if member.kind == "folder":
                os.makedirs(path, exist_ok=True)
            elif member.kind in ("symlink", "hardlink"):
                self._unpack_link(member, path)
            elif member.kind == "file":
                if os.path.islink(path):        # replace the link, don't follow it
                    os.unlink(path)
                with OutputFile(path) as output:
                    for piece in tar.pieces():
                        output.write(piece)
                os.chmod(path, 0o755 if member.mode & 0o100 else 0o644)
            else:
                raise Failure(f"{self.filename} holds '{member.name}', "
                              "which is neither a file nor a directory")

    def _unpack_link(self, member, path):
        """Create a symlink; a hardlink, and on Windows a symlink, becomes a copy."""
        import shutil
        if not _link_stays_inside(member):
            raise Failure(f"{self.filename} holds the link '{member.name}' to '{member.target}', "
                          "which leaves the archive")
        if os.path.islink(path):        # replace the link, don't follow it
            os.unlink(path)
        folder = os.path.dirname(path) if member.kind == "symlink" else self.target
        pointed = os.path.join(folder, member.target)
        if member.kind == "symlink" and os.name != "nt":
            os.symlink(member.target, path)
        elif os.path.isfile(pointed) and os.path.realpath(pointed) != path:
            self.charge(os.path.getsize(pointed))
            with writing(path):
                shutil.copyfile(pointed, path)

    def check_links(self):
        """A Failure if a link leads out of the target directory."""
        for folder, folders, names in os.walk(self.target):
            for name in folders + names:
                path = os.path.join(folder, name)
                if os.path.islink(path) and not _is_inside(path, self.target):
                    raise Failure(f"{self.filename} holds the link '{name}', which leaves the "
                                  "archive; nothing of it is used")


def unpack(path, target):
    """Unpack a zip or a tar below the directory `target`.

    A Failure if it is malformed or too large, or has members or links that lead outside."""
    import zipfile
    filename = os.path.basename(path)
    unpacking = _Unpacking(filename, os.path.realpath(target))
    is_tar = filename.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar"))
    with _opened_archive(path) as file:
        if not is_tar and zipfile.is_zipfile(path):
            with _open_zip(file) as archive:
                unpacking.unpack_zip(archive)
        else:
            unpacking.unpack_tar(TarReader(file))
    unpacking.check_links()


def _is_inside(path, target):
    """Whether a path is below the real path `target` after its links are resolved."""
    return is_same_or_below(os.path.realpath(path), target)


def is_same_or_below(path, folder):
    """Whether a path is a folder or below it; only the texts are compared."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _passes_a_link(folder, target):
    """Whether a link is on the way from `target` down to a folder below it."""
    while is_same_or_below(folder, target) and folder != target:
        if os.path.islink(folder):
            return True
        folder = os.path.dirname(folder)
    return False


def _link_stays_inside(member):
    """Whether a link's target, by its text, stays inside the archive.

    `..` may only stand at its start, no more often than the link's folder is deep."""
    parts = [part for part in re.split(r"[/\\]", member.target) if part not in ("", ".")]
    upwards = next((number for number, part in enumerate(parts) if part != ".."), len(parts))
    depth = 0           # a hardlink's target is relative to the archive's root
    if member.kind == "symlink":
        name_parts = [part for part in re.split(r"[/\\]", member.name) if part not in ("", ".")]
        depth = len(name_parts) - 1
    is_absolute = member.target.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", member.target)
    return not is_absolute and upwards <= depth and ".." not in parts[upwards:]


# ==================================================================================================
# 14  Building
#
# From a checkout to archives: a copy of the versioned files, a PEP 517 build of sdist and wheel,
# documentation by Sphinx.  In the project's own directory only `dist` changes, after the build has
# succeeded.
# ==================================================================================================


class VersionControl(typing.NamedTuple):
    """A version control system.

    `marker` is the directory in a checkout's root.  `command` lists the versioned files, with
    `separator` after each name.  `unknown` lists in the same format the files that are neither
    versioned nor ignored; it is empty where the system can't do that."""
    marker: str
    command: tuple
    separator: str
    unknown: tuple = ()


_VERSION_CONTROLS = (
    VersionControl(".git", ("git", "ls-files", "-z", "--recurse-submodules"), "\0",
                   ("git", "ls-files", "-z", "--others", "--exclude-standard")),
    VersionControl(".hg", ("hg", "files", "--print0"), "\0",
                   ("hg", "status", "--unknown", "--no-status", "--print0")),
    VersionControl(".svn", ("svn", "list", "--recursive"), "\n"),
    VersionControl(".bzr", ("bzr", "ls", "--recursive", "--versioned", "--null"), "\0"))
_UNKNOWN_SHOWN = 5              # names of unversioned files in the warning


@dataclasses.dataclass(frozen=True)
class BuildPlan:
    """What to build, and how.  Neither `sdist` nor `wheel` means both.

    `formats` are those of setup.py; `python` is the path of the Python that builds."""
    sdist: bool = False
    wheel: bool = False
    no_vcs: bool = False
    setupdir_only: bool = False
    no_isolation: bool = False
    formats: tuple = ()
    docs: bool = False
    only_docs: bool = False
    python: str = ""


def make_build_plan(client, directory):
    """The `BuildPlan` of the options and of the project's settings.

    The settings are [tool.devpi.upload] in pyproject.toml or [devpi:upload] in setup.cfg."""
    options, settings = client.options, _upload_settings(client, directory)
    plan = {name: bool(getattr(options, name) or settings.get(name))
            for name in ("sdist", "wheel", "no_vcs", "setupdir_only")}

    formats = []
    for name in (options.formats or settings.get("formats") or "").split(","):
        if name.strip() in ("sdist", "sdist.tgz"):
            plan["sdist"] = True
        elif name.strip() == "bdist_wheel":
            plan["wheel"] = True
        elif name.strip():
            formats.append(name.strip())
    if options.formats or settings.get("formats"):
        client.console.warn("--formats is deprecated, use --sdist and --wheel")

    python = options.python
    if not python and os.environ.get("VIRTUAL_ENV"):
        python = find_program("python")
    python = python or sys.executable
    return BuildPlan(**plan, no_isolation=options.no_isolation, formats=tuple(formats),
                     docs=options.with_docs or options.only_docs, only_docs=options.only_docs,
                     python=find_program(python) or python)


def _upload_settings(client, directory):
    """{name: value} of the project's settings for uploads; a Failure for a malformed file."""
    import configparser
    toml = toml_table(os.path.join(directory, "pyproject.toml"), "tool", "devpi", "upload")
    parser = configparser.RawConfigParser()
    try:
        parser.read(os.path.join(directory, "setup.cfg"), encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        raise Failure(f"setup.cfg can't be read: {one_line(str(error))}") from None
    ini = dict(parser.items("devpi:upload")) if parser.has_section("devpi:upload") else None
    if toml is not None and ini is not None:
        raise Failure("Got configuration in pyproject.toml and setup.cfg, choose one.")

    is_toml = toml is not None
    source, section = "setup.cfg", "devpi:upload"
    if is_toml:
        source, section = "pyproject.toml", "tool.devpi.upload"
    if is_toml or ini is not None:
        client.console.say(f"detected {section} section in {source}")

    settings = {}
    for key, value in (toml or ini or {}).items():
        name = key.replace("-", "_")
        if name in ("sdist", "wheel", "no_vcs", "setupdir_only"):
            value = _parse_flag(client, key, name, value, is_toml)
        elif name != "formats" or is_toml:
            client.console.warn(f"unknown setting '{key}' in {source} [{section}]")
            continue
        settings[name] = value
        client.console.say(f"Got {key}={value} from {source} [{section}].")
    return settings


def _parse_flag(client, key, name, value, is_toml):
    """The boolean value of a setting.

    In setup.cfg, devpi-client takes any text as true for no_vcs and setupdir_only; so do we."""
    if is_toml:
        if not isinstance(value, bool):
            raise Failure(f"Got non-boolean '{value}' for '{key}', use true or false.")
        return value

    is_no = value and value.lower() in ("n", "no", "f", "false", "off", "0")
    if name in ("no_vcs", "setupdir_only"):
        if is_no:
            client.console.warn(f"{key}={value} in setup.cfg counts as true: any text does; "
                                "leave the line out")
        return bool(value)
    if value.lower() in ("y", "yes", "t", "true", "on", "1"):
        return True
    if is_no:
        return False
    raise Failure(f"Got non-boolean '{value}' for '{key}' in setup.cfg, use yes or no.")


SETTINGS_LIMIT = 4 << 20        # bytes of a project's configuration file


def toml_table(path, *names):
    """A table of a TOML file as a dict, or None."""
    table = _read_toml(path)
    for name in names:
        table = table.get(name)
        if not isinstance(table, dict):
            return None
    return table


def _read_toml(path):
    """A TOML file as a dict; {} if it is missing, a Failure if it is malformed.

    Python 3.9 and 3.10 have no tomllib: without tomli and pip, `_simple_toml` reads it."""
    try:
        with open(path, "rb") as file:
            data = file.read(SETTINGS_LIMIT + 1)
            text = data.decode("utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{path} can't be read: {reason_of(error)}") from None
    if len(data) > SETTINGS_LIMIT:
        raise Failure(f"{path} can't be read: it is larger than {byte_size(SETTINGS_LIMIT)}")
    for name in ("tomllib", "tomli", "pip._vendor.tomli"):
        with contextlib.suppress(ImportError):
            import importlib
            try:
                return importlib.import_module(name).loads(text)
            except (ValueError, RecursionError) as error:
                raise Failure(f"{path} is no TOML: {reason_of(error)}") from None
    return _simple_toml(text)


def _simple_toml(text):
    """The tables of a TOML text, with their strings, booleans and arrays of strings."""
    import ast
    result = table = {}
    lines = iter(text.splitlines())
    for line in lines:
        header = re.match(r"\s*\[([^\[\]]+)\]\s*(#.*)?$", line)
        pair = re.match(r"\s*([\w-]+|\"[^\"]*\")\s*=\s*(.*)$", line)
        if header:
            table = result
            for part in header[1].split("."):
                table = table.setdefault(part.strip().strip("\"'"), {})
        elif line.lstrip().startswith("[["):
            table = {}      # ignore arrays of tables
        elif pair:
            value = pair[2].strip()
            while value.startswith("[") and not re.search(r"\]\s*(#.*)?$", value):
                value += "\n" + next(lines, "]")
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                word = value.partition("#")[0].strip()
                literal = {"true": "True", "false": "False"}.get(word, value)
                table[pair[1].strip('"')] = ast.literal_eval(literal)
    return result


# -- version control


def _find_checkout(directory):
    """(VersionControl, root of the checkout) of the checkout that contains a directory, or None."""
    folder = os.path.abspath(directory)
    while True:
        for system in _VERSION_CONTROLS:
            if os.path.exists(os.path.join(folder, system.marker)):
                return system, folder
        if os.path.dirname(folder) == folder:
            return None
        folder = os.path.dirname(folder)


def export_sources(client, directory, temporary, plan):
    """The directory to build in: a copy of the versioned files in the directory `temporary`.

    Without version control it is `directory` itself."""
    checkout = None if plan.no_vcs else _find_checkout(directory)
    if checkout is None:
        return directory
    system, root = checkout
    if not find_program(system.command[0]):
        raise Failure(f"command not found: {system.command[0]}",
                      "it lists the versioned files; --no-vcs builds in place")
    names = _versioned_files(client, system, root)
    paths = [os.path.join(root, *name.split("/")) for name in names]
    if not any(is_same_or_below(path, directory) for path in paths):
        client.console.warn(f"nothing in {display_path(directory)} is under the version control "
                            f"of {display_path(root)}: building in place")
        return directory

    top = directory if plan.setupdir_only else root
    target = os.path.join(temporary, os.path.basename(top) or "project")
    os.makedirs(target)
    for path in paths:
        if is_same_or_below(path, top):
            _copy(path, os.path.join(target, os.path.relpath(path, top)))
    client.console.say(f"using workdir {target}")
    _warn_of_unknown_files(client, system, root, directory)

    # Build backends such as setuptools-scm read the version from the repository.
    if system.marker in (".git", ".hg"):
        if plan.setupdir_only:
            client.console.say(f"not copying vcs repository metadata for {system.marker}")
        else:
            copy = os.path.join(target, system.marker)
            _copy_repository(os.path.join(root, system.marker), copy)
            client.console.say(f"copied repo {system.marker} to {copy}")
    return os.path.join(target, os.path.relpath(directory, top)) if directory != top else target


def _versioned_files(client, system, root):
    """The names of the versioned files, relative to the checkout's root, with slashes."""
    commands = [system.command]
    if system.marker == ".git":     # without --recurse-submodules, which fails on broken submodules
        commands.append(system.command[:-1])
    for command in commands:
        child = run_child(
            client.console, list(command), cwd=root, capture=True, errors="surrogateescape")
        if child.code == 0:
            return [name for name in child.output.split(system.separator)
                    if name and not name.endswith("/")]
    raise Failure(f"{' '.join(system.command)} failed in {root}:\n{child.output.strip()}")


def _warn_of_unknown_files(client, system, root, directory):
    """Warn of files that are left out because nobody has added them to version control."""
    if not system.unknown:
        return
    child = run_child(
        client.console, list(system.unknown), cwd=root, capture=True, errors="backslashreplace")
    names = [os.path.relpath(os.path.join(root, name), directory)
             for name in child.output.split(system.separator) if name]
    ignored = (os.pardir, "dist" + os.sep, "build" + os.sep)
    names = [name for name in names if not name.startswith(ignored)]
    if child.code == 0 and names:
        more = len(names) - _UNKNOWN_SHOWN
        client.console.warn(
            "not under version control, so left out: " + ", ".join(names[:_UNKNOWN_SHOWN])
            + (f" and {more} more" if more > 0 else ""))


def _copy(source, target):
    """Copy a file, a link or a directory with its modes; a missing source is left out.

    Version control may list a file that somebody has deleted on the disk."""
    import shutil
    with writing(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.isdir(source) and not os.path.islink(source):
            shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
        elif os.path.lexists(source):
            shutil.copy2(source, target, follow_symlinks=False)


def _copy_repository(source, target):
    """Copy .git or .hg.

    In a git submodule or worktree, .git is a file that names the repository: the copy names the
    same repository."""
    if os.path.isfile(source):
        with open(source, encoding="utf-8", errors="surrogateescape") as file:
            pointer = re.match(r"gitdir:\s*(.*\S)", file.read())
        if pointer:
            repository = os.path.abspath(os.path.join(os.path.dirname(source), pointer[1]))
            return write_atomically(target, f"gitdir: {repository}\n")
    _copy(source, target)


# -- PEP 517


def build_archives(client, source, temporary, plan):
    """Build what is planned from the directory `source`; returns the archives' paths, sorted."""
    out = os.path.join(temporary, "dist")
    os.makedirs(out, exist_ok=True)
    if not any(os.path.exists(os.path.join(source, name))
               for name in ("pyproject.toml", "setup.py", "setup.cfg")):
        raise Failure(f"no pyproject.toml or setup.py in {display_path(os.getcwd())}",
                      "type this in a project's directory, or name archives to upload: "
                      "devpi upload dist/*")

    for name in plan.formats:
        kind, _, archive = name.partition(".")
        archive = {"tgz": "gztar", "tbz": "bztar"}.get(archive, archive)
        options = ["--formats", archive] if archive else []
        _build_step(client, [plan.python, "setup.py", kind, *options, "--dist-dir", out], source)
    if plan.sdist or plan.wheel or not plan.formats:
        _pep517_build(client, source, out, temporary, plan)
    return [os.path.join(out, name) for name in sorted(os.listdir(out))
            if name.endswith(ARCHIVE_ENDINGS)]


def _pep517_build(client, source, out, temporary, plan):
    """Build with `python -m build`, else with uv, else by calling the backend ourselves."""
    system = toml_table(os.path.join(source, "pyproject.toml"), "build-system") or {}
    requires = system.get("requires") or ["setuptools"]
    if not isinstance(requires, list):
        raise Failure(f"pyproject.toml: 'requires' in [build-system] is no list: {requires}")
    requires = [str(requirement) for requirement in requires]
    kinds = [f"--{kind}" for kind in ("sdist", "wheel") if getattr(plan, kind)]
    environment = {} if plan.no_isolation else _build_variables(client, requires)

    probe = [plan.python, "-c", "import build.__main__"]
    if run_child(client.console, probe, cwd=temporary, capture=True).code == 0:
        isolation = ["--no-isolation"] if plan.no_isolation else []
        command = [plan.python, "-m", "build", *kinds, *isolation, "--outdir", out]
        _build_step(client, command, source, environment)
    elif find_program("uv"):
        isolation = ["--no-build-isolation"] if plan.no_isolation else []
        command = [find_program("uv"), "build", *kinds, *isolation, "--python", plan.python,
                   "--out-dir", out]
        _build_step(client, command, source, environment)
    else:
        python = plan.python
        if not plan.no_isolation:
            python = _create_build_environment(client, temporary, plan)
        backend = _Backend(
            client, python, system, requires, temporary, environment, not plan.no_isolation)
        backend.build(source, out, plan)


def _build_variables(client, requires):
    """{variable: value} that make pip and uv install build requirements from the index.

    If the index has one of the requirements, it is the only source: another index may have a
    stranger's project of the same name.  If it has none, the installer's own index stays.  The
    person's own variables for pip or uv stay too."""
    own = {"PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_NO_INDEX", "UV_OFFLINE"}
    if own & set(os.environ):
        return {}
    if not client.remote.simpleindex:
        return {}

    names = [normalize(re.match(r"[A-Za-z0-9._-]*", text)[0]) for text in requires]
    missing = [name for name in names if name and not _may_have_project(client, name)]
    if len(missing) == len(names):
        client.console.debug(f"{client.index} has nothing of what the build requires: "
                             "using the installer's own index")
        return {}
    if missing:
        client.console.warn(
            f"{client.index} does not have {', '.join(missing)}, which the build requires: "
            "add a mirror to its bases, or build with --no-isolation, or set PIP_INDEX_URL")
    return tool_variables(client)


def _may_have_project(client, name):
    """Whether the index has a project; True if its server can't be reached."""
    url = f"{client.remote.simpleindex}{name}/"
    try:
        return client.send("GET", url, {"Accept": "text/html"}).status != 404
    except Unreachable as failure:
        client.console.debug(failure.message)
        return True


def _build_step(client, command, source, environment=None):
    """Run a step of a build; its output is shown with -v, or if it fails.  A Failure then."""
    console = client.console
    shown = ["PIP_INDEX_URL"] if environment and console.verbose else []
    code, output = run_child(console, command, cwd=source, env=environment, show=shown,
                             capture=not console.verbose)
    if code:
        if output:
            console.error(output.rstrip())
        raise Failure(f"command failed with exit status {code}: "
                      f"{os.path.basename(command[0])} {' '.join(command[1:3])}")


def _create_build_environment(client, temporary, plan):
    """Create a temporary virtual environment with pip; returns the path of its Python."""
    folder = os.path.join(temporary, "environment")
    command = [plan.python, "-m", "venv", folder]
    child = run_child(client.console, command, cwd=temporary, capture=True)
    if child.code:
        client.console.debug(child.output)
        raise Failure(f"the 'build' module is missing in {plan.python}: pip install build")
    return venv_python(folder)


# Runs in the build environment: calls a hook of the backend and writes its result (PEP 517).
_HOOK = """
import importlib, json, sys
hook, backend, paths, argument, result = sys.argv[1:]
sys.path[:0] = json.loads(paths)
module, _, attributes = backend.partition(":")
found = importlib.import_module(module)
for name in filter(None, attributes.split(".")):
    found = getattr(found, name)
function = getattr(found, hook, None)
value = [] if function is None else function(*json.loads(argument))
with open(result, "w") as file:
    json.dump(value, file)
"""


class _Backend:
    """Calls a project's build backend (PEP 517), for Pythons without the module `build`.

    `installs`: whether to install the requirements of the build into `python`'s environment."""

    def __init__(self, client, python, system, requires, temporary, environment, installs):
        self.client, self.python, self.temporary = client, python, temporary
        self.environment, self.installs, self.requires = environment, installs, requires
        self.backend = str(system.get("build-backend") or "setuptools.build_meta:__legacy__")
        self.paths = [str(path) for path in system.get("backend-path") or ()]

    def build(self, source, out, plan):
        """Build the planned archives into the directory `out`."""
        both = not (plan.sdist or plan.wheel)
        self._install(self.requires)
        self.client.console.say(f"--> {display_path(source)}$ {self.backend} (PEP 517)")
        if plan.sdist or both:
            sdist = self._make("sdist", source, out)
        if plan.wheel or both:
            if both:        # from the sdist, as its users will build it
                folder = os.path.join(self.temporary, "from-sdist")
                unpack(os.path.join(out, sdist), folder)
                source = os.path.join(folder, os.listdir(folder)[0])
            self._make("wheel", source, out)

    def _make(self, kind, source, out):
        self._install(self._call(f"get_requires_for_build_{kind}", source, [None]))
        return self._call(f"build_{kind}", source, [out])

    def _install(self, requirements):
        if requirements and self.installs:
            pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                   "--upgrade"]
            _build_step(self.client, [*pip, *requirements], self.temporary, self.environment)

    def _call(self, hook, source, arguments):
        """The result of a backend's hook; [] for a hook that it does not have."""
        console = self.client.console
        result = os.path.join(self.temporary, "result.json")
        paths = [os.path.join(source, path) for path in self.paths]
        command = [self.python, "-I", "-B", "-c", _HOOK, hook, self.backend, json.dumps(paths),
                   json.dumps(arguments), result]
        child = run_child(console, command, cwd=source, capture=not console.verbose)
        if child.code:
            console.error(child.output.rstrip())
            raise Failure(f"the build backend {self.backend} failed in {hook}")
        with open(result, encoding="utf-8") as file:
            return json.load(file)


# -- documentation


def build_docs(client, source, temporary, name, version):
    """Build the documentation with Sphinx; returns the path of its zip."""
    folders = [os.path.join(source, *path.split("/"))
               for path in ("doc", "docs", "source", "doc/source")]
    folder = next((folder for folder in folders
                   if os.path.exists(os.path.join(folder, "conf.py"))), None)
    if folder is None:
        raise Failure("no documentation found: no conf.py in doc, docs, source or doc/source")
    program = find_program("sphinx-build")
    if not program:
        raise Failure("command not found: sphinx-build", "pip install sphinx")
    html = os.path.join(temporary, "html")
    _build_step(client, [program, "-E", folder, html], source)
    target = os.path.join(temporary, "docs", f"{name}-{version}.doc.zip")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if not zip_directory(html, target):
        raise Failure(f"sphinx-build wrote nothing to {html}")
    return target


# ==================================================================================================
# 15  Upload
#
# Archives are found or built, checked, compared with the files of the index, and sent as streams:
# the memory that an upload takes does not depend on the size of the file.
# ==================================================================================================


class UploadForm(Stream):
    """The multipart form of an upload (PyPI's legacy API); the file is read while it is sent.

    `advance(count)` is called after each piece, and with a negative count if the attempt fails."""

    def __init__(self, fields, path, filename, advance=lambda count: None):
        import secrets
        boundary = secrets.token_hex(16)
        parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{_in_quotes(name)}"\r\n'
                 f"\r\n{value}\r\n" for name, value in fields]
        parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="content"; '
                     f'filename="{_in_quotes(filename)}"\r\n'
                     "Content-Type: application/octet-stream\r\n\r\n")
        self.head = "".join(parts).encode("utf-8", "replace")
        self.tail = f"\r\n--{boundary}--\r\n".encode()
        self.type = f"multipart/form-data; boundary={boundary}"
        self.path, self.size, self.advance = path, os.path.getsize(path), advance
        self.length = len(self.head) + self.size + len(self.tail)

    def pieces(self):
        """Yield the form in pieces; a Failure if the file can't be read to its stated end."""
        yield self.head
        sent = 0
        try:
            with open(self.path, "rb") as file:
                while sent < self.size:
                    piece = file.read(min(PIECE, self.size - sent))
                    if not piece:
                        raise Failure(f"{self.path} became shorter while it was sent")
                    yield piece
                    sent += len(piece)
                    self.advance(len(piece))
            yield self.tail
        except BaseException as error:
            self.advance(-sent)
            if isinstance(error, OSError):
                raise Failure(f"{self.path} can't be read: {error.strerror or error}") from None
            raise


def _form_fields(archive, sha256):
    """[(name, value), ...] of an archive's upload form [W19.6]."""
    protocol = ("protocol_version", "1")
    if archive.is_docs:
        version = [("version", archive.version)] if archive.version else []
        return [("name", archive.name), *version, (":action", "doc_upload"), protocol]

    pairs = [(name, archive.fields[name]) for name in TEXT_FIELDS if archive.fields.get(name)]
    for name in (*LIST_FIELDS, *NEWER_LIST_FIELDS):
        pairs += [(name, value) for value in archive.fields.get(name) or ()
                  if value and value != "UNKNOWN"]
    python, kind = upload_kind(archive.filename)
    return [*pairs, ("pyversion", python), ("filetype", kind), (":action", "file_upload"), protocol,
            ("sha256_digest", sha256)]


@command(
    "upload", "build and upload releases, or upload given archives",
    argument("-p", "--python", metavar="PYTHON", help="the Python to build with"),
    argument("--no-vcs", action="store_true",
             help="build in place, not in a copy of the versioned files"),
    argument("--setupdir-only", action="store_true",
             help="copy only this directory, and not .git or .hg"),
    argument("--sdist", action="store_true",
             help="build an sdist (default: an sdist, and a wheel from it)"),
    argument("--wheel", action="store_true", help="build a wheel"),
    argument("--no-isolation", action="store_true", help="build without a throw-away environment"),
    argument("--formats", metavar="FORMATS",
             help="build formats of setup.py, with commas (deprecated)"),
    argument("--with-docs", action="store_true",
             help="also build and upload the documentation, with Sphinx"),
    argument("--only-docs", action="store_true", help="build and upload only the documentation"),
    INDEX,
    argument("--from-dir", action="store_true", help="look for archives in given directories"),
    argument("--only-latest", action="store_true", help="of each project only the newest version"),
    argument("--skip-existing", action="store_true",
             help="pass over files that the index has, and go on after failures"),
    argument("--jobs", metavar="N", type=positive_count, default=1,
             help="how many files to send at once (default: 1)"),
    argument("--dry-run", action="store_true", help="build and check, but send nothing"),
    argument("paths", metavar="PATH", nargs="*",
             help="archives, or with --from-dir directories"),
    JSON)
def upload_releases(client):
    """Upload archives, or build them from the project in this directory first.

    The build takes a copy of the versioned files (git, hg).  What it has made replaces all that
    is in dist."""
    if not client.remote.pypisubmit:
        client.require_index()
        raise Failure("The current index URL does not support upload.\n"
                      "Most likely, it is a mirror.")
    if not client.options.dry_run:
        # A wrong DEVPI_PASSWORD fails before the build, and only once.
        client.identity(client.index)

    with temporary_directory() as temporary:
        if client.options.paths:
            archives, problems = _collect_archives(client, temporary)
        else:
            archives, problems = _build_project(client, temporary), []
        return _send_archives(client, archives, problems)


def _collect_archives(client, temporary):
    """([Archive, ...] of the arguments, [entry of the JSON document for each unusable file])."""
    paths = []
    for path in client.options.paths:
        if os.path.isdir(path):
            if not client.options.from_dir:
                raise Failure(f"{path}: is a directory but --from-dir not specified")
            paths += [os.path.join(folder, name) for folder, _, names in os.walk(path)
                      for name in names if name.endswith(ARCHIVE_ENDINGS)]
        elif not os.path.exists(path):
            raise Failure(f"path does not exist: {path}")
        else:
            paths.append(path)

    archives, problems = [], []
    for path in sorted(dict.fromkeys(paths)):
        try:
            archive = read_archive(path)
            if path.endswith(".tar"):
                raise Failure(f"{archive.filename}: servers take no .tar, skipping")
            if archive.is_docs:
                archive = _repack_docs(client, archive, temporary)
            archives.append(archive)
        except Failure as failure:
            client.console.error(failure.message)
            problems.append({"file": os.path.basename(path), "status": "invalid",
                             "message": failure.message})
    return (_only_latest(archives) if client.options.only_latest else archives), problems


def _repack_docs(client, archive, temporary):
    """Documentation as a zip: servers accept no tar."""
    if archive.path.endswith(".zip"):
        return archive
    folder = os.path.join(temporary, archive.filename + "-unpacked")
    target = os.path.join(temporary, archive.upload_name)
    os.makedirs(folder)
    unpack(archive.path, folder)
    zip_directory(folder, target)
    client.console.say(f"repackaged {archive.filename} to {archive.upload_name}")
    return dataclasses.replace(archive, path=target)


def _only_latest(archives):
    """The archives of each project's newest version; documentation counts as a project."""
    def key(archive):
        return normalize(archive.name), archive.is_docs

    newest = {}
    for archive in archives:
        newest[key(archive)] = max(
            newest.get(key(archive), archive.version), archive.version, key=version_key)
    return [archive for archive in archives
            if version_key(archive.version) == version_key(newest[key(archive)])]


def _build_project(client, temporary):
    """Build the project in this directory, and move the archives into its `dist`."""
    directory = os.path.abspath(os.getcwd())
    plan = make_build_plan(client, directory)
    source = export_sources(client, directory, temporary, plan)
    if plan.only_docs:      # the wheel tells the name and the version
        archive_plan = dataclasses.replace(plan, wheel=True, sdist=False, formats=())
    else:
        archive_plan = plan
    paths = build_archives(client, source, temporary, archive_plan)
    if not paths:
        raise Failure("nothing built!")

    archives, docs = [read_archive(path) for path in paths], []
    if plan.docs:
        name, version = archives[0].name, archives[0].version
        docs = [read_archive(build_docs(client, source, temporary, name, version))]
    built = docs if plan.only_docs else archives + docs
    if client.options.dry_run:
        return built
    return _move_to_dist(client, os.path.join(directory, "dist"), built, plan.only_docs)


def _move_to_dist(client, dist, archives, keep_old):
    """Move archives into the directory `dist`, which is emptied first unless `keep_old`."""
    import shutil
    if os.path.isdir(dist) and not keep_old:
        client.console.say("pre-build: cleaning dist")
        for name in os.listdir(dist):
            path = os.path.join(dist, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
    os.makedirs(dist, exist_ok=True)

    moved = []
    for archive in archives:
        target = os.path.join(dist, archive.filename)
        with writing(target):
            shutil.move(archive.path, target)
        kind = " [sphinx docs]" if archive.is_docs else ""
        kilobytes = max(1, round(os.path.getsize(target) / 1024))
        client.console.say(f"built: {os.path.relpath(target)}{kind} {kilobytes}kb")
        moved.append(dataclasses.replace(archive, path=target))
    return moved


def _send_archives(client, archives, problems):
    """Check and send the archives; returns the exit status."""
    archives, unusable = _check_archives(client, archives)
    problems = problems + unusable
    entries = _send_in_order(client, archives)
    counts = {status: sum(entry["status"] == status for entry in entries)
              for status in ("uploaded", "skipped", "failed")}
    left = len(archives) - len(entries)
    if client.options.skip_existing or left or problems:
        _summarize(client, entries, counts, left, problems)
    if not archives and not problems:
        raise Failure("there is nothing to upload")

    is_ok = not counts["failed"] and not problems and not left
    client.console.print_json({"ok": is_ok, "index": client.index, "files": entries + problems})
    return 0 if is_ok else 1


def _send_in_order(client, archives):
    """Send releases, then documentation, which needs its release; returns their entries.

    After a failure no further archive is sent, unless --skip-existing is given; archives that
    are being sent are completed."""
    releases = [archive for archive in archives if not archive.is_docs]
    docs = [archive for archive in archives if archive.is_docs]
    entries, is_stopped = [], False
    total = sum(os.path.getsize(archive.path) for archive in archives)
    with Progress(client.console, "uploading", total) as progress:
        known = _KnownFiles(client)

        def send(archive):
            return None if is_stopped else _send_archive(client, archive, known, progress)

        for batch in (releases, docs):
            for entry in map_in_parallel(send, batch, client.options.jobs):
                if entry is None:
                    continue
                entries.append(entry)
                if entry["status"] == "failed" and not client.options.skip_existing:
                    is_stopped = True
    return entries


def _summarize(client, entries, counts, left, problems):
    """Print the numbers of uploaded, skipped, failed, untried and unusable files."""
    differing = sum("sha256_there" in entry for entry in entries)
    remarks = {"skipped": f" ({differing} with other content)" if differing else ""}
    parts = [f"{count} {status}{remarks.get(status, '')}"
             for status, count in counts.items() if count]
    if left:
        parts.append(f"{left} not tried")
    if problems:
        parts = parts or ["nothing uploaded"]
        parts.append(f"{len(problems)} not usable")
    client.console.say(", ".join(parts) or "nothing uploaded")


def _check_archives(client, archives):
    """([archives that can be sent], [entry of the JSON document for each other archive])."""
    usable, problems, paths = [], [], {}
    for archive in archives:
        wrong, remarks = archive_problems(archive)
        if archive.upload_name in paths:
            wrong.append(f"it was given twice, as {paths[archive.upload_name]} too")
        paths[archive.upload_name] = archive.path

        for remark in remarks:
            is_minor = "long description" in remark
            write = client.console.debug if is_minor else client.console.warn
            write(f"{archive.filename}: {remark}")
        for reason in wrong:
            client.console.error(f"{archive.filename}: {reason}, skipping")
        if wrong:
            problems.append({"file": archive.filename, "status": "invalid",
                             "message": "; ".join(wrong)})
        else:
            usable.append(archive)
    return usable, problems


class _KnownFiles:
    """The files of the index, for --skip-existing; each project is requested once."""

    def __init__(self, client):
        self.client, self.projects, self.lock = client, {}, threading.Lock()

    def find(self, archive):
        """The `Link` of the index's file with the archive's name, or None."""
        with self.lock:
            name = normalize(archive.name)
            if name not in self.projects:
                try:
                    releases = releases_of(self.client, name, ignore_bases=True)
                except Refused as refusal:
                    if refusal.status != 404:
                        raise
                    releases = []
                self.projects[name] = {
                    link.filename: link for release in releases for link in release.links}
            is_docs = archive.is_docs
            filename = f"{name}-{archive.version}.doc.zip" if is_docs else archive.filename
            return self.projects[name].get(filename)


def _send_archive(client, archive, known, progress):
    """Upload an archive; returns its entry of the JSON document."""
    action = "doc_upload" if archive.is_docs else "file_upload"
    target, size = client.remote.pypisubmit, os.path.getsize(archive.path)
    entry = {"file": archive.upload_name, "name": archive.name, "version": archive.version,
             "action": action, "size": size}
    if client.options.dry_run:
        client.console.say(f"skipped: {action} of {archive.upload_name} to {target}")
        return {**entry, "status": "skipped", "message": "dry run"}

    sha256 = entry["sha256"] = digest_of(archive.path)
    existing = known.find(archive) if client.options.skip_existing else None
    if existing is not None:
        progress.advance(size)
        return _skip(client, entry, dict(existing.hashes).get("sha256"))

    fields = _form_fields(archive, sha256)
    form = UploadForm(fields, archive.path, archive.upload_name, progress.advance)
    headers = {"Accept": "*/*", "Content-Type": form.type}
    try:
        response = client.send("POST", target, headers, form, may_take_long=True, may_retry=True)
    except Failure as failure:
        client.console.error(f"FAIL {action} of {archive.upload_name} to {target}\n"
                             f"{failure.message}\nPOST to {target} FAILED")
        if failure.hint:
            client.console.hint(failure.hint)
        return {**entry, "status": "failed", "message": failure.message}

    if response.status == 200 and "identical" in response.reason:
        return _skip(client, entry)
    if response.status == 200:
        client.console.say(f"{action} of {archive.upload_name} to {target}")
        return {**entry, "status": "uploaded", "message": ""}
    if response.status == 409 and client.options.skip_existing:
        return _skip(client, entry, "")
    return {**entry, **_report_refused_upload(client, response, action, archive, target)}


def _skip(client, entry, sha256=None):
    """Skip a file that the index has; returns its entry of the JSON document.

    `sha256`: of the index's file; "" if we only know that the files differ, None if we know
    nothing.  Different content causes a warning and no failure: a repeated CI job builds anew, and
    few builds are reproducible."""
    if sha256 in (None, entry["sha256"]):
        client.console.say(f"skipped, exists: {entry['file']}")
        return {**entry, "status": "skipped", "message": "exists"}

    digests = f" (sha256 {sha256[:12]}... there, {entry['sha256'][:12]}... here)" if sha256 else ""
    client.console.warn(f"skipped, exists with other content: {entry['file']}{digests}: "
                        "the index keeps what it has; what has changed needs a new version")
    return {**entry, "status": "skipped", "message": "exists with other content",
            "sha256_there": sha256 or None}


def _report_refused_upload(client, response, action, archive, target):
    """Print why an upload was refused; returns the part of its entry that says so.

    The server states the reason in the reason phrase or in a JSON body."""
    value, message = response.json(), response.message()
    lines = [f"{response.status} FAIL {action} of {archive.upload_name} to {target}",
             response.reason or "(no reason given)"]
    if isinstance(value, dict) and value.get("type") == "actionlog":
        lines += ["  " + " ".join(map(str, row)) for row in value.get("result") or ()]
    else:
        text = response.body.decode("utf-8", "replace")
        reason = message or (readable_reason(response.status, text) if value is None else "")
        lines += [reason] if reason not in ("", response.reason) else []
    lines.append(f"POST to {target} FAILED")
    client.console.error("\n".join(lines))

    hint = client.refusal_hint(response)
    if not hint and response.status in (401, 403) \
            and "permission to submit" in f"{response.reason} {message}":
        hint = f"user '{client.user}' may not upload there; its acl_upload says who may: " \
            f"devpi index {shell_quoted(client.remote.index_name)}"
    if response.status == 409:
        hint = "--skip-existing passes over files that are there; " \
            "a changed file needs a new version"
    if hint:
        client.console.hint(hint)
    return {"status": "failed", "code": response.status, "message": message or response.reason}


# ==================================================================================================
# 16  Test
#
# Archives of a release are downloaded, verified, unpacked and tested with tox; tox's report is
# posted to the index.
# ==================================================================================================


class TestResult(typing.NamedTuple):
    """The test of one archive.

    `code` is tox's exit status, None if tox did not run.  `posted` is the path of the report."""
    spec: str
    url: str
    code: int | None
    posted: str | None
    message: str = ""


@command(
    "test", "download releases, test them with tox and post the results",
    argument("-e", "--env", metavar="ENV", help="the tox environment to run"),
    argument("-c", "--config", metavar="INI",
             help="the tox configuration to use with the unpacked sdist"),
    argument("--fallback-ini", metavar="INI",
             help="the configuration for projects that bring none"),
    argument("--tox-args", metavar="ARGS", default="", takes_dashes=True,
             help="further arguments for tox, as one text"),
    argument("--detox", action="store_true", help=argparse.SUPPRESS),
    argument("--no-upload", action="store_true", help="don't post the results"),
    INDEX,
    argument("-s", "--select", metavar="REGEX",
             help="test the archives whose names match, and no others"),
    argument("-l", "--list", action="store_true", help="only list what would be tested"),
    argument("specs", metavar="SPEC", nargs="+", completes="project",
             help="a project, perhaps with versions: of those the newest is tested"),
    JSON)
def test_releases(client):
    """Download releases, test them with tox and post the results, which `devpi list -t` shows.

    Tested are the sdist and wheels that are for every platform; tests and tox's configuration
    come from the sdist."""
    console, options = client.console, client.options
    if options.detox:
        console.warn("--detox is ignored; tox has its own option -p (--tox-args='-p all')")
    try:
        select = re.compile(options.select) if options.select else None
    except re.error as error:
        raise UsageError(
            f"--select: '{options.select}' is no regular expression: {error}") from None

    results = []
    for requirement in [requirement_of(spec) for spec in options.specs]:
        try:
            results += _test_requirement(client, requirement, select)
        except Failure as failure:      # the other projects are tested all the same
            console.failure(failure)
            results.append(TestResult(requirement.text, "", 1, None, failure.message))

    is_ok = all(result.code in (0, None) and not result.message for result in results)
    console.print_json({"ok": is_ok, "index": client.index, "results": [
        {"spec": result.spec, "url": result.url, "exit_code": result.code,
         "posted": result.posted, "message": result.message}
        for result in results]})
    return 0 if is_ok else 1


def _test_requirement(client, requirement, select):
    """Test the newest release that a requirement admits, or list its archives; `TestResult`s."""
    release, files = _files_to_test(client, requirement, select)
    if client.options.list:
        client.console.print_result("would test:")
        for file in files:
            client.console.print_result(f"   {file.url}")
        return [TestResult(requirement.text, file.url, None, None) for file in files]
    with temporary_directory() as temporary:
        return _test_release(client, requirement, release, files, temporary)


def _files_to_test(client, requirement, select):
    """(Release, [Link of each archive to test]) of the newest release that a requirement admits.

    `select`: a compiled regular expression for the names of archives, or None."""
    client.require_index()
    missing = f"could not find/receive links for {requirement.text}"
    try:
        releases = [
            release for release in releases_of(client, requirement.name)
            if release.files and not release.is_shadowed and requirement.admits(release.version)]
    except Refused as refusal:
        raise Failure(missing, refusal.message) from None
    if not releases:
        raise Failure(missing)

    # Join the spellings of one version, such as 3.0.0-rc.1 and 3.0.0rc1.
    newest = releases[-1]
    links = tuple(link for release in releases
                  if canonical_version(release.version) == canonical_version(newest.version)
                  for link in release.links)
    release = dataclasses.replace(newest, links=links)

    sdists = _sdists(release)
    if select:
        chosen = [file for file in release.files if select.search(file.filename)]
    else:
        wheels = [file for file in release.files if file.filename.endswith(".whl")]
        universal = [file for file in wheels if file.filename.endswith(
            ("-py3-none-any.whl", "py2.py3-none-any.whl"))]
        for file in wheels:
            if file not in universal:
                client.console.warn(f"only universal wheels supported, found {file.filename}")
        chosen = sdists[:1] + universal

    name = f"{requirement.name} {release.version}"
    if not sdists:
        raise Failure(f"need at least one sdist distribution, {name} has none")
    if not chosen:
        raise Failure(f"no file of {name} matches --select {client.options.select}")
    return release, chosen


def _sdists(release):
    """The sdists of a release, tars first."""
    return [file for ending in ((".tar.gz", ".tgz"), (".zip",)) for file in release.files
            if file.filename.endswith(ending) and ".doc." not in file.filename]


def _test_release(client, requirement, release, files, temporary):
    """Test the chosen archives of a release; returns a `TestResult` for each."""
    command = _tox_command(client)      # fails before the download
    sdist = next((file for file in _sdists(release) if file in files), _sdists(release)[0])
    paths = {}
    for file in dict.fromkeys([sdist, *files]):
        paths[file] = _download(client, file, os.path.join(temporary, "archives"))

    unpacked = os.path.join(temporary, "unpacked")
    client.console.say(f"unpacking {paths[sdist]} to {unpacked}")
    os.makedirs(unpacked)
    unpack(paths[sdist], unpacked)
    source = _source_directory(unpacked, sdist.filename)
    config = _tox_configuration(client, source)

    results = []
    for number, file in enumerate(files):
        report = os.path.join(temporary, f"toxreport-{number}.json")
        code = _run_tox(client, command, source, config, paths[file], report)
        posted, message = None, ""
        if code:
            client.console.error(f"tox command failed {code}")
        if code != 2 and not client.options.no_upload:
            try:
                posted, message = _post_report(client, file, report)
            except Failure as failure:      # the other files are tested all the same
                client.console.failure(failure)
                message = failure.message
        results.append(TestResult(requirement.text, file.url, code, posted, message))
    return results


def _download(client, file, directory):
    """Download a `Link` with our credentials and verify its hash; returns the path."""
    os.makedirs(directory, exist_ok=True)
    name = file.filename
    if not re.fullmatch(r"[^/\\:\x00-\x1f\x7f]+", name) or name in (".", ".."):
        raise Failure(f"'{name}' is no usable file name")
    path = os.path.join(directory, name)
    progress = Progress(client.console, f"downloading {name}", None)
    with OutputFile(path) as output, progress:
        sink = _CountedSink(output, progress)
        response = client.send("GET", file.url, {"Accept": "*/*"}, sink=sink)
    if response.status != 200:
        raise client.refusal_of(response)

    if file.best_hash is None:
        client.console.warn(f"{name}: the index states no hash, so it is not verified")
    else:
        algorithm, expected = file.best_hash[0], file.best_hash[1].lower()
        digest = digest_of(path, algorithm)
        if digest != expected:
            raise Failure(f"{name}: the {algorithm} of what was received is not the one that the "
                          f"index states:\ngot {digest}, expected {expected}")
    pair = client.basic_credentials(file.url)
    url = masked(with_credentials(file.url, *pair)) if pair else file.url
    client.console.say(f"received {url}")
    return path


class _CountedSink:
    """An `OutputFile` that reports the written bytes to a `Progress`."""

    def __init__(self, file, progress):
        self.file, self.progress = file, progress
        self.tell, self.truncate = file.tell, file.truncate

    def write(self, data):
        self.file.write(data)
        self.progress.advance(len(data))

    def seek(self, position):
        self.progress.advance(position - self.file.tell())
        self.file.seek(position)


def _source_directory(unpacked, filename):
    """The directory NAME-VERSION of an unpacked sdist; spellings of the name count as equal."""
    stem = normalize(re.sub(r"\.(tar\.gz|tgz|zip)$", "", filename))
    names = [name for name in os.listdir(unpacked) if os.path.isdir(os.path.join(unpacked, name))]
    candidates = [name for name in names if normalize(name) == stem]
    candidates = candidates or (names if len(names) == 1 else [])
    if not candidates:
        raise Failure(f"{filename} does not hold the directory NAME-VERSION")
    return os.path.join(unpacked, candidates[0])


def _tox_configuration(client, source):
    """The path of tox's configuration file, by the options or in the sdist."""
    options = client.options
    if options.config:
        path = os.path.abspath(options.config)
        if not os.path.exists(path):
            raise Failure(f"file does not exist: {options.config}")
        return path

    ini = os.path.join(source, "tox.ini")
    if os.path.exists(ini):
        return ini
    if toml_table(os.path.join(source, "pyproject.toml"), "tool", "tox") is not None:
        return os.path.join(source, "pyproject.toml")
    setup = os.path.join(source, "setup.cfg")
    if os.path.isfile(setup):
        with open(setup, encoding="utf-8", errors="replace") as file:
            if re.search(r"^\[tox:tox\]", file.read(SETTINGS_LIMIT), re.MULTILINE):
                return setup

    if options.fallback_ini:
        for path in (os.path.abspath(options.fallback_ini),
                     os.path.join(source, options.fallback_ini)):
            if os.path.exists(path):
                return path
        raise Failure(f"file does not exist: {options.fallback_ini}")
    raise Failure(
        f"no tox.ini/pyproject.toml/setup.cfg file found in {source} that configures tox",
        "the sdist must bring it (MANIFEST.in: include tox.ini); "
        "or --fallback-ini names one to use")


def _tox_command(client):
    """The command line that starts tox: its program, its module, or uvx."""
    venv = effective_venv(client)
    tox = (find_program("tox", venv) if venv else None) or find_program("tox")
    if tox:
        return [tox]
    python = (find_program("python", venv) if venv else None) or sys.executable
    probe = [python, "-c", "import tox.__main__"]
    if run_child(client.console, probe, capture=True).code == 0:
        return [python, "-m", "tox"]
    if find_program("uvx"):
        return [find_program("uvx"), "tox"]
    raise Failure("no tox binary found", "pip install tox")


def _run_tox(client, command, source, config, archive, report):
    """Run tox in the directory `source`; returns its exit status."""
    import shlex
    options = client.options
    words = [*command, "--installpkg", archive, "--recreate", "--result-json", report, "-c", config]
    words += [f"-e{options.env}"] if options.env else []
    try:
        words += shlex.split(options.tox_args)
    except ValueError as error:
        raise UsageError(f"--tox-args: {error}") from None
    child = run_child(client.console, words, cwd=source, env=tool_variables(client),
                      unset=INSTALLER_EXTRAS, show=["PIP_INDEX_URL"])
    return child.code


def _post_report(client, file, report):
    """Post tox's report to its archive; returns (path of the result or None, problem or "")."""
    if not is_same_server(file.url, client.root):
        raise Failure(f"{file.filename} is on another server, {server_of(file.url)}: "
                      "nothing is posted to it")
    try:
        with open(report, encoding="utf-8") as content:
            value = parse_json(content.read(RESPONSE_LIMIT))
    except (OSError, ValueError):
        client.console.error("tox wrote no result file, nothing posted")
        return None, "tox wrote no result file"
    client.console.say(f"posting tox result data to {file.url}")
    response = client.send("POST", file.url, json_headers(), json_body(value), may_take_long=True)
    if response.status == 403:
        raise Failure("No permission to upload tox results. You can use the devpi test "
                      "--no-upload option to skip the upload.",
                      client.refusal_hint(response))
    envelope = client.unwrap(response, "toxresultpath")
    if envelope.message:
        client.console.warn(envelope.message)
    client.console.info("success")
    return str(envelope.result), ""


# ==================================================================================================
# 17  Install
#
# pip or uv install from the index.  They get our login in their environment; it is masked in the
# printed command.
# ==================================================================================================


@command(
    "install", "install packages from the index, with pip or uv",
    INDEX,
    argument("--venv", metavar="DIR",
             help="the virtual environment to install into; it is remembered"),
    argument("-e", "--editable", metavar="ARG", help="install a project in editable mode"),
    argument("-r", "--requirement", action="store_true",
             help="the argument is a requirements file"),
    argument("-l", "--list", action="store_true", help="list what is installed"),
    argument("--uv", action="store_true",
             help="install with uv (also done for environments without pip)"),
    argument("--no-pre", action="store_true", help="no pre-releases"),
    argument("packages", metavar="PKG", nargs="*", completes="project",
             help="what to install, as pip takes it"))
def install_packages(client):
    """Install packages from the index, with the pip of the virtual environment, or with uv.

    Without one it is the pip of the Python that runs this client.  Pre-releases count, unless
    --no-pre says otherwise."""
    options = client.options
    if options.editable and options.packages:
        raise Failure("cannot specify packagespecs and --editable")
    if options.venv:
        remember_venv(client)
        options.venv = None if options.venv == "-" else options.venv

    command, venv_option, is_uv = _installer_command(client, effective_venv(client))
    if options.list:
        return _run_installer(client, [*command, "list", *venv_option], {}, [])
    client.require_index()
    if not (options.packages or options.editable):
        return 0

    variables = tool_variables(client)
    words = [*command, "install", *venv_option, "-U"]
    if not options.no_pre:
        client.console.say("pre-releases count too (--no-pre: final releases only)")
    if is_uv:
        words += [] if options.no_pre else ["--prerelease", "allow"]
        shown = ["UV_DEFAULT_INDEX"]
    else:
        variables.update({} if options.no_pre else {"PIP_PRE": "1"}, PIP_USE_WHEEL="1")
        shown = ["PIP_INDEX_URL", "PIP_PRE", "PIP_USE_WHEEL"]
        _refuse_old_pip(client, command)

    if options.requirement:
        words.append("--requirement")
    words += ["--editable", options.editable] if options.editable else options.packages
    return _run_installer(client, words, variables, shown)


def _installer_command(client, venv):
    """(command line of pip or `uv pip`, options that name the environment, whether it is uv).

    uv is the choice of --uv, and of virtual environments without pip."""
    wants_uv, uv = client.options.uv, find_program("uv")
    pip = None if wants_uv else _pip_command(client, venv)
    if pip:
        return pip, [], False
    if uv and (wants_uv or venv):
        return [uv, "pip"], ["--python", venv_python(venv)] if venv else [], True
    if wants_uv:
        raise Failure("no uv binary found", "pip install uv")
    raise Failure("no pip binary found",
                  "use --venv DIR for an environment that has pip, or install uv")


def _pip_command(client, venv):
    """The command line of the virtual environment's pip, else of the running Python's, or None.

    The running Python only counts if the person has named it or it is in PATH: the client may be
    installed in an environment of its own (pipx).  Then PATH's pip is used."""
    if not venv and _is_named_python():
        probe = [sys.executable, "-c", "import pip.__main__"]
        if run_child(client.console, probe, capture=True).code == 0:
            return [sys.executable, "-m", "pip"]
    program = find_program("pip", venv)
    return [program] if program else None


def _is_named_python():
    """Whether the person has named the running Python (`python devpi_lite_client.py`), or PATH."""
    if not sys.executable:
        return False
    folders = map(os.path.realpath, filter(None, os.environ.get("PATH", "").split(os.pathsep)))
    return sys.argv[0].endswith((".py", ".pyc")) or \
        os.path.realpath(os.path.dirname(sys.executable)) in folders


def _refuse_old_pip(client, pip):
    """A Failure for pip before 19.3, which prints the credentials of an index."""
    child = run_child(client.console, [*pip, "--version"], capture=True)
    version = re.match(r"pip (\d+)\.(\d+)", child.output)
    if child.code or version and (int(version[1]), int(version[2])) < (19, 3):
        reason = child.output.strip() or "it does not run"
        raise Failure(f"{' '.join(pip)} can't be used: {reason}", "pip 19.3 or newer is needed")


def _run_installer(client, words, variables, shown):
    """Run pip or uv; returns its exit status.  `shown`: names of variables to print."""
    unset = (*INSTALLER_EXTRAS, "PYTHONDONTWRITEBYTECODE", "__PYVENV_LAUNCHER__")
    code = run_child(client.console, words, env=variables, show=shown, unset=unset).code
    if code:
        client.console.error("command failed")
    return code


# ==================================================================================================
# 18  API tokens
#
# API tokens of servers with the plugin devpi-tokens.  They last long, and can be restricted to
# permissions, indexes or projects.
# ==================================================================================================

_UNITS = {"y": 365 * 86400, "m": 30 * 86400, "w": 7 * 86400, "d": 86400,
          "h": 3600, "min": 60, "s": 1}     # seconds
_RESTRICTIONS = (
    argument("-a", "--allowed", metavar="PERMISSIONS", action="append",
             help="only these permissions, with commas: upload, pkg_read, toxresult_upload, "
                  "del_entry, del_verdata, del_project, index_create, index_modify, index_delete"),
    argument("-e", "--expires", metavar="WHEN",
             help="when it ends: a time in seconds since 1970, in 8d or 2h30min, or never"),
    argument("-i", "--indexes", metavar="INDEXES", action="append",
             help="only for these indexes, with commas"),
    argument("-p", "--projects", metavar="PROJECTS", action="append",
             help="only for these projects, with commas"))
_OUTPUT = argument("-o", "--output", metavar="FILE",
                   help="write the token into a file that only you can read")
_TOKEN_FILE = argument("-f", "--file", metavar="FILE",
                       help="file that holds the token; - for standard input")
_TOKEN = argument("--token", metavar="TOKEN",
                  help="the token; other users of this machine may see it there")
_OWNER = argument("-u", "--user", metavar="USER", help="whose token (default: the current user)")

command("token", "make, list, delete and use API tokens (of servers that offer them)",
        description="API tokens last long and can be restricted; "
                    "DEVPI_TOKEN is where CI keeps one.")(None)


def _parse_expiry(text):
    """POSIX seconds, from such a number or from a span (`8d`, `2h30min`) that starts now.

    None and "never" are returned as they are."""
    if text is None or text == "never":
        return text
    if text.isdigit():
        return int(text)
    spans = re.findall(r"(\d+)\s*(min|[ymwdhs])[a-z]*\s*", text)
    if not spans or re.sub(r"(\d+)\s*(min|[ymwdhs])[a-z]*\s*", "", text):
        raise UsageError(f"--expires: '{text}' is neither a time nor a span such as 8d or 2h30min")
    return int(time.time()) + sum(int(count) * _UNITS[unit] for count, unit in spans)


def _restrictions(options):
    """{name: value} of the restrictions that the options name; lists are sorted."""
    restrictions = {}
    for name in ("allowed", "indexes", "projects"):
        values = {value.strip() for text in getattr(options, name) or ()
                  for value in text.split(",") if value.strip()}
        if values:
            restrictions[name] = sorted(values)
    if "projects" in restrictions:
        restrictions["projects"] = list(map(normalize, restrictions["projects"]))
    expires = _parse_expiry(options.expires)
    if expires is not None:
        restrictions["expires"] = expires
    return restrictions


def _token_owner(client):
    return client.options.user or client.require_login()


def _call_token_api(client, method, path, body=None, expect=None):
    """Call devpi-tokens' API; a Failure if the server does not have it."""
    try:
        return client.call(method, f"{client.root}{path}", body, expect=expect)
    except Refused as refusal:
        # devpi-tokens' own errors mention tokens.
        if refusal.status in (404, 405, 415) and (
                "+token" in refusal.text or "oken" not in refusal.text):
            raise Failure("this server offers no API tokens",
                          "devpi-server does with the plugin devpi-tokens; a login's token lasts "
                          "some hours, and DEVPI_USER with DEVPI_PASSWORD does without one"
                          ) from None
        raise


def _output_token(client, text):
    """Write a new token into the file of --output, or print it."""
    if client.options.output:
        write_private(os.path.abspath(client.options.output), text + "\n")
        client.console.info(f"token written to {client.options.output}")
    else:
        client.console.print_result(text)
        client.console.print_json({"token": text})


def _read_token(client):
    """The token of --token, --file or DEVPI_TOKEN."""
    options = client.options
    if options.token and options.file:
        raise UsageError("either --token or --file")
    text = options.token
    if not text:
        text = read_password_file(options.file) if options.file else os.environ.get("DEVPI_TOKEN")
    if not text:
        raise Failure("no token given (use --file FILE, or DEVPI_TOKEN)")
    return text.strip()


@command("token create", "make a token for the current user", *_RESTRICTIONS, _OWNER, _OUTPUT, JSON)
def create_token(client):
    """Make an API token for the current user."""
    body = _restrictions(client.options)
    path = f"{path_segment(_token_owner(client))}/+token-create"
    envelope = _call_token_api(client, "POST", path, body, "token-info")
    _output_token(client, envelope.result["token"])


@command("token list", "list the tokens of the current user", _OWNER, JSON)
def list_tokens(client):
    """List the API tokens of the current user."""
    owner = _token_owner(client)
    path = f"{path_segment(owner)}/+tokens"
    envelope = _call_token_api(client, "GET", path, None, "tokens-info")
    tokens = envelope.result.get("tokens") or {}
    if not tokens:
        client.console.say(f"No tokens for '{owner}'")
    else:
        rows = [("ID", "RESTRICTIONS")]
        for name in sorted(tokens):
            restrictions = map(_format_restriction, tokens[name].get("restrictions") or ())
            rows.append((name, ", ".join(restrictions) or "none"))
        client.console.print_table(rows)
    client.console.print_json({"user": owner, "tokens": tokens})


def _format_restriction(restriction):
    """A restriction with its time as a date: `expires=1795412798` -> `expires=2026-11-23 ...`."""
    name, _, value = restriction.partition("=")
    if name in ("expires", "not_before") and value.isdigit():
        return f"{name}={time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(int(value)))} UTC"
    return restriction


@command("token delete", "delete a token",
         _OWNER, argument("token_id", metavar="ID", help="the token's id, as list shows it"), JSON)
def delete_api_token(client):
    """Delete an API token.  Those derived from it end too."""
    owner = _token_owner(client)
    client.console.say(f"About to delete the token {client.options.token_id} of {owner}")
    if not client.console.confirm_deletion({"deleted": None}):
        return
    path = f"{path_segment(owner)}/+tokens/{path_segment(client.options.token_id)}"
    _call_token_api(client, "DELETE", path)
    client.console.info(f"token deleted: {client.options.token_id}")
    client.console.print_json({"deleted": client.options.token_id})


@command(
    "token derive", "make a more restricted token from another one",
    *_RESTRICTIONS, _TOKEN_FILE, _TOKEN, _OUTPUT, JSON)
def derive_token(client):
    """Make a more restricted API token from another one, without asking the server."""
    import hashlib
    import hmac
    token, restrictions = parse_token(_read_token(client)), _restrictions(client.options)
    if not restrictions:
        raise Failure("what should the new token be restricted to? (-a, -e, -i, -p)")

    # A macaroon's signature is the HMAC of each caveat, with the signature before it as the key.
    signature, caveats = token.signature, []
    for name, value in sorted(restrictions.items()):
        caveats.append(f"{name}={','.join(value) if isinstance(value, list) else value}")
        signature = hmac.new(signature, caveats[-1].encode(), hashlib.sha256).digest()
    derived = token._replace(caveats=(*token.caveats, *caveats), signature=signature)
    _output_token(client, format_token(derived))


@command("token inspect", "show what a token says about itself", _TOKEN_FILE, _TOKEN, JSON)
def inspect_token(client):
    """Show what an API token says about itself."""
    token = parse_token(_read_token(client))
    user, _, name = token.identifier.rpartition("-")
    client.console.print_result(f"user: {user}\nid: {name}")
    for caveat in token.caveats:
        client.console.print_result(_format_restriction(caveat))
    client.console.print_json({"user": user, "id": name, "restrictions": list(token.caveats)})


@command("token login", "log in with a token", _TOKEN_FILE, _TOKEN)
def log_in_with_given_token(client):
    """Log in with an API token."""
    text = _read_token(client)
    return log_in_with_token(client, token_user(text), text)


# ==================================================================================================
# 19  Command line
#
# The argument parser, shell completion, and `main`, which prints every failure and chooses the exit
# status.
# ==================================================================================================


class Parser(argparse.ArgumentParser):
    """Prints the usage on standard output and the error on standard error, as devpi-client does.

    With --json, and for commands whose output a shell runs, both go to standard error."""
    usage_to_stderr = False

    def error(self, message):
        self.print_usage(sys.stderr if self.usage_to_stderr else sys.stdout)
        sys.stdout.flush()
        self.exit(2, f"devpi: error: {message}\n")


def _add_arguments(parser, arguments, prefix=""):
    """Add declared arguments and the generic options; `prefix` goes before the names of these."""
    exclusive = {}
    for declared in arguments:
        if declared.one_of and declared.one_of not in exclusive:
            exclusive[declared.one_of] = parser.add_mutually_exclusive_group()
        exclusive.get(declared.one_of, parser).add_argument(*declared.names, **declared.settings)
    group = parser.add_argument_group("generic options")
    for declared in GENERIC:
        group.add_argument(*declared.names, **{
            **declared.settings, "dest": prefix + declared.dest, "default": argparse.SUPPRESS})


def _make_parser(words):
    """The parser for a command line with this set of words.

    Only the commands among the words get their arguments, which saves a third of the client's
    start.  Generic options before the command are stored as `before_NAME`."""
    for_shells = {command.name for command in COMMANDS.values() if command.is_for_shells}
    Parser.usage_to_stderr = bool(words & {"--json", *for_shells})
    parser = Parser(prog="devpi", allow_abbrev=False,
                    description="Work with private Python package indexes.",
                    epilog="Type 'devpi COMMAND --help' to see what a command takes.")
    parser.add_argument("--version", action="store_true",
                        help="show the versions of this client and of the server")
    _add_arguments(parser, (), "before_")
    groups = {"": parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")}

    def add(group, name, command, **settings):
        sub = groups[group].add_parser(name, allow_abbrev=False, **settings)
        if words.intersection((name, *command.aliases)):
            sub.description = inspect.cleandoc(command.description)
            sub.formatter_class = argparse.RawDescriptionHelpFormatter
            _add_arguments(sub, command.arguments)
        sub.set_defaults(chosen=command, parser=sub)
        return sub

    for command in COMMANDS.values():
        group, _, name = command.name.rpartition(" ")
        sub = add(group, name, command, help=command.help, aliases=command.aliases)
        if command.run is None:
            groups[name] = sub.add_subparsers(
                title="actions", metavar="ACTION", dest="sub_command", required=True)
        if group:
            add("", f"{group}-{name}", command)     # without help, so --help does not list it
    return parser


def _commands_by_word():
    """{word: Command} of the words that name a command; `token-create` names `token create`."""
    return {word: command for command in COMMANDS.values()
            for word in (command.name.replace(" ", "-"), *command.aliases)}


def _next_word(words, start=0):
    """The position of the first word from `start` that belongs to no generic option, or None.

    From position 0 this is the command."""
    valued = {name for declared in GENERIC if declared.takes_value for name in declared.names}
    while start < len(words) and words[start].startswith("-"):
        start += 2 if words[start] in valued else 1
    return start if start < len(words) else None


def _parse_arguments(words):
    """(parser, options) of a command line.  Exits with status 2 for a wrong one."""
    words = _joined_values(words)
    parser, position, commands = _make_parser(set(words)), _next_word(words), _commands_by_word()
    if position is not None and words[position] not in commands:
        import difflib
        known = [word for word, command in commands.items() if " " not in command.name]
        close = difflib.get_close_matches(words[position], known, 1)
        hint = f"is '{close[0]}' meant?" if close else f"there are {', '.join(known)}"
        parser.error(f"there is no command '{words[position]}'; {hint}")

    options, rest = parser.parse_known_args(words)
    if rest:
        getattr(options, "parser", parser).error(f"unrecognized arguments: {' '.join(rest)}")
    for declared in GENERIC:
        given = [getattr(options, name) for name in (declared.dest, "before_" + declared.dest)
                 if hasattr(options, name)]
        if declared.settings.get("action") == "count":
            given = [sum(given)]
        value = given[0] if given else declared.settings.get("default")
        setattr(options, declared.dest, value)
    return parser, options


def _joined_values(words):
    """The words, with `--tox-args=-v` for `--tox-args -v`: argparse takes `-v` for an option."""
    names = {name for command in COMMANDS.values() for declared in command.arguments
             if declared.takes_dashes for name in declared.names}
    number = next((number for number, word in enumerate(words[:-1]) if word in names), None)
    if number is None:
        return words
    return [*words[:number], f"{words[number]}={words[number + 1]}", *words[number + 2:]]


# -- completion

_COMPLETION = {
    "bash": """\
_devpi_complete() {{
    local word
    COMPREPLY=()
    while IFS= read -r word; do COMPREPLY+=("$word"); done \\
        < <({program} __complete "${{COMP_WORDS[@]:1:COMP_CWORD}}" 2>/dev/null)
}}
complete -o default -F _devpi_complete devpi devpi_lite_client.py
""",
    "zsh": """\
_devpi_complete() {{
    local -a found
    found=("${{(@f)$({program} __complete "${{(@)words[2,CURRENT]}}" 2>/dev/null)}}")
    if [[ -n "$found" ]]; then compadd -a found; else _files; fi
}}
compdef _devpi_complete devpi devpi_lite_client.py
""",
    "fish": """\
function __devpi_complete
    set -l words (commandline -opc) (commandline -ct)
    {program} __complete $words[2..-1] 2>/dev/null
end
complete -c devpi -a '(__devpi_complete)'
complete -c devpi_lite_client.py -a '(__devpi_complete)'
""",
}
_COMPLETION_SECONDS = 2


@command(
    "completion", "print the completion script of a shell",
    argument("shell", choices=tuple(_COMPLETION), help="for which shell"), is_for_shells=True)
def print_completion(client):
    """Print the completion script of a shell: eval "$(devpi completion bash)",
    or devpi completion fish | source."""
    import shlex
    program = " ".join(map(shlex.quote, [sys.executable, os.path.abspath(__file__)]))
    script = _COMPLETION[client.options.shell].format(program=program)
    client.console.print_result(script.rstrip("\n"))


def _complete(words):
    """Print the completions of the last word.  Errors are ignored: a person is typing."""
    with contextlib.suppress(Exception):
        for word in sorted(set(_completions(words[:-1], words[-1] if words else ""))):
            Console().print_result(word)
    return 0


def _completions(before, word):
    """What a word may become; `before` are the words before it, without the program."""
    commands, position = _commands_by_word(), _next_word(before)
    if position is None or before[position] not in commands:
        names = [name for name, command in commands.items() if " " not in command.name]
        return [name for name in names + ["--version", "--help"] if name.startswith(word)]

    command, after = commands[before[position]], _next_word(before, position + 1)
    if after is not None and f"{before[position]}-{before[after]}" in commands:
        command, position = commands[f"{before[position]}-{before[after]}"], after
    options = {name: declared for declared in (*command.arguments, *GENERIC) if declared.is_option
               for name in declared.names}

    def takes_value(name):
        return name in options and options[name].takes_value

    if takes_value(before[-1]):
        candidates = _values_of(options[before[-1]])
    elif word.startswith("-"):
        candidates = [*options, "--help"]
    elif command.run is None:
        candidates = [name.partition(" ")[2] for name in COMMANDS
                      if name.startswith(command.name + " ")]
    else:
        positional = [declared for declared in command.arguments if not declared.is_option]
        count = sum(not name.startswith("-") and not takes_value(previous)
                    for previous, name in zip(before[position:], before[position + 1:]))
        candidates = ()
        if positional:
            candidates = _values_of(positional[min(count, len(positional) - 1)])
    return [name for name in candidates if name.startswith(word)]


def _values_of(declared):
    """The known values of an argument."""
    if declared.completes:
        return _known_names(declared.completes)
    return declared.settings.get("choices", ())


# A word for every shell, and for the client neither an option nor a setting.  A hostile server
# may have other names.
_HARMLESS_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/@+-]*")


def _known_names(kind):
    """The harmless names of a kind: index (of the server), project (of the index) or user."""
    return [name for name in map(str, _fetch_names(kind)) if _HARMLESS_NAME.fullmatch(name)]


def _fetch_names(kind):
    """The names of a kind, as the server or auth.json has them."""
    console = Console()
    console.messages = console.errors = open(os.devnull, "w", encoding="utf-8")
    client = Client(argparse.Namespace(timeout=_COMPLETION_SECONDS), console)
    if kind == "user":
        return [user for user, _ in client.auth.tokens(client.root)]
    if kind == "project":
        return client.call("GET", client.index).result.get("projects") or ()
    users = client.call("GET", client.root).result
    return [f"{user}/{index}" for user, config in users.items()
            for index in config.get("indexes") or ()]


# -- main


def _show_versions(client):
    """`--version`: print the versions of the client, and of the server if it responds."""
    client.console.print_result(f"devpi-lite-client {__version__}")
    root = Remote.of_state(client.state).root
    if not root:
        return
    try:
        client.console.messages = sys.stderr
        root = client.root if os.environ.get("DEVPI_INDEX") else root
        versions = client.call("GET", root + "+status", expect="status").result.get("versioninfo")
    except Failure as error:
        client.console.debug(f"{error}")
        return
    client.console.print_result(f"\ncurrent devpi server: {root}")
    for name, version in sorted(versions.items()) if isinstance(versions, dict) else ():
        client.console.print_result(f"    {name} {version}")


def main(words=None):
    """Run the command that the arguments name; returns the exit status."""
    words = sys.argv[1:] if words is None else words
    sys.stdout = sys.stdout or open(os.devnull, "w")        # some services start us without them
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    console, client = Console(), None
    try:
        if words[:1] == ["__complete"]:
            return _complete(words[1:])
        parser, options = _parse_arguments(words)
        console = Console(options)
        if os.name == "nt":
            _enable_windows_colors()
        if options.command is None and not options.version:
            parser.print_help()
            return 0

        client = Client(options, console)
        if options.version:
            return _show_versions(client)
        try:
            code = options.chosen.run(client) or 0
        finally:
            client.http.serials.save()
        if console.as_json and not console.json_printed:
            console.print_json({"ok": code == 0})
        return code
    except OutputClosed:
        return 0
    except BrokenPipeError:
        silence(sys.stdout)
        return 0
    except KeyboardInterrupt:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write("\n")
        return _end_with_threads(130)
    except SystemExit as end:       # from a signal or the parser
        return _end_with_threads(end.code if isinstance(end.code, int) else 0)
    except Exception as error:
        return _report_error(console, error, client.http.last_url if client else None)
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                silence(stream)


def _end_with_threads(code):
    """The exit status of an interrupted command.

    If other threads still wait for a server, the process exits here instead of waiting for them."""
    if threading.active_count() > 1:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def _enable_windows_colors():
    import ctypes
    kernel = ctypes.windll.kernel32
    for handle in (-11, -12):       # standard output, standard error
        kernel.SetConsoleMode(kernel.GetStdHandle(handle), 7)       # 7: with escape sequences


def _report_error(console, error, last_url=None):
    """Print an error and return the exit status.  `last_url`: of the last response, if any."""
    if console.is_debug:
        import traceback
        console.error(traceback.format_exc())
    failure = _failure_of(error, last_url)
    if isinstance(failure, UsageError):
        sys.stderr.write(f"devpi: error: {failure.message}\n")
    else:
        console.failure(failure)
    if console.as_json and not console.json_printed:
        status = getattr(failure, "status", None)
        with contextlib.suppress(OutputClosed):
            console.print_json({"error": {"message": failure.message, "status": status}})
    return failure.code


def _failure_of(error, last_url):
    """The `Failure` for any exception.

    An error of these types after a response means that the response was malformed."""
    malformed = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
                 ValueError)
    kind = type(error).__name__
    if isinstance(error, Failure):
        return error
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return Failure(f"{error.strerror or reason_of(error)}{where}")
    if isinstance(error, ValueError) and "URL" in str(error):
        return Failure(str(error))
    if last_url and isinstance(error, malformed):
        return Failure(f"{last_url}: the answer makes no sense ({kind}: {error})",
                       "--debug shows where")
    return Failure(f"this should not happen: {kind}: {error}", "--debug shows where it did")


def _exit_on_signal(number, frame):
    """SIGTERM, or SIGHUP of a closed terminal: exit so that temporary directories are removed."""
    sys.exit(128 + number)


if __name__ == "__main__":
    import signal
    signal.signal(signal.SIGTERM, _exit_on_signal)
    # nohup ignores SIGHUP, and so must we.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _exit_on_signal)
    sys.exit(main())
