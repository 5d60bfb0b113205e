"""A fake upstream: a real HTTP/1.1 server in threads of the test process, with a simple index, that can misbehave."""

import base64
import fnmatch
import hashlib
import html
import itertools
import json
import os
import time
import urllib.parse

from archives import Archive, normal_name, wheel
from misbehaving import Handler, Misbehaving

SIMPLE_JSON = "application/vnd.pypi.simple.v1+json"


class Upstream(Misbehaving):
    """`url` is the simple index (what a mirror_url names), `host_url` the server.

    `mode`: which pages it has, "json", "html" or "both" (chosen by Accept).  `etags`: send them and answer 304.
    `serial`: sent as X-PyPI-Last-Serial unless None.
    `credentials`: (user, password) that each request must carry, or None.
    `requests`: what was asked, as (method, path, headers).  `connections`: how many were opened.
    """

    faults = {
        "500", "404", "reset", "truncate", "garbage", "html-as-json", "drip", "delay", "huge", "redirect-loop", "redirect",
        "hang", "wrong-hash", "no-length"}

    def __init__(self):
        super().__init__()
        self.mode, self.etags, self.serial, self.credentials = "both", True, None, None
        self.projects, self.statuses = {}, {}
        self.requests = []

    @property
    def url(self):
        return self.host_url + "/simple/"

    # -- what it holds

    def publish(self, archive_or_name, version=None, **attributes):
        """Adds a file and returns its Archive; a name and a version make a wheel, a name alone a project without files.

        Attributes: `yanked` True or a reason; `requires_python`; `upload_time` (None leaves it out); `size` True (the
        real one), False (left out) or a number to claim; `core_metadata` True (announced by hash, served), False, or
        "unserved" (announced, but 404);
        `provenance` a URL; `hash` "sha256", "md5", None or "wrong"; `url` another place to link to.
        """
        if version is None and not isinstance(archive_or_name, Archive):
            self.projects.setdefault(normal_name(archive_or_name), {})
            return None
        archive = archive_or_name
        if not isinstance(archive, Archive):
            archive = wheel(archive_or_name, version, requires_python=attributes.get("requires_python"))
        attributes.setdefault("requires_python", archive.fields.get("requires_python"))
        with self._lock:
            self.projects.setdefault(normal_name(archive.name), {})[archive.filename] = (archive, attributes)
        return archive

    def status(self, project, status, reason=None):
        """Marks the project archived, quarantined, deprecated or active (PEP 792)."""
        self.statuses[normal_name(project)] = (status, reason)

    def remove(self, project, filename=None):
        """Forgets one file of the project, or the project."""
        with self._lock:
            if filename is None:
                del self.projects[normal_name(project)]
            else:
                del self.projects[normal_name(project)][filename]

    # -- what was asked

    def count(self, pattern):
        """The number of requests whose path matches the pattern ("/simple/*", "*.whl")."""
        with self._lock:
            return sum(1 for _, path, _ in self.requests if fnmatch.fnmatchcase(path, pattern))

    def reset(self):
        """Forgets the requests; files and faults stay."""
        with self._lock:
            self.requests, self.connections = [], 0

    # -- faults

    def fault(self, kind, path="*", times=None, **arguments):
        """From now on (`times` times if given) requests whose path matches are answered with the fault.

        "500" (status=500), "404"; "reset" before any answer; "truncate": half of the body under the full
        Content-Length, then close; "garbage": random bytes under the right type; "html-as-json"; "drip" (delay=0.1,
        piece=1): the body in pieces, `delay` apart; "delay" (seconds=1); "huge": a page without end; "redirect-loop";
        "redirect" (to=URL, status=302); "hang": never answers;
        "wrong-hash": a file with one byte changed; "no-length" (chunked=False): a body without Content-Length.
        """
        super().fault(kind, path, times, **arguments)

    # -- pages

    def _page(self, project, as_json):
        """The body of a project's page; None if there is no such project."""
        with self._lock:
            if project not in self.projects:
                return None
            files = list(self.projects[project].values())
        status, reason = self.statuses.get(project, (None, None))
        if as_json:
            page = {
                "meta": {"api-version": "1.4"},
                "name": project,
                "versions": sorted({archive.version for archive, _ in files}),
                "files": [self._file_json(project, *file) for file in files],
            }
            if self.serial is not None:
                page["meta"]["_last-serial"] = self.serial
            if status:
                page["project-status"] = {"status": status, "reason": reason} if reason else {"status": status}
            return json.dumps(page).encode()
        metas = '<meta name="pypi:repository-version" content="1.4">'
        if status:
            metas += '<meta name="pypi:project-status" content="%s">' % html.escape(status)
        if reason:
            metas += '<meta name="pypi:project-status-reason" content="%s">' % html.escape(reason)
        return (
            "<!DOCTYPE html>\n<html><head>%s<title>Links for %s</title></head>"
            "<body><h1>Links for %s</h1>\n%s\n</body></html>\n"
            % (metas, project, project, "\n".join(self._file_html(project, *file) for file in files))
        ).encode()

    def _file_json(self, project, archive, attributes):
        file = {
            "filename": archive.filename,
            "url": attributes.get("url") or self._file_url(project, archive),
            "hashes": dict(_hashes(archive, attributes)),
        }
        size = attributes.get("size", True)
        if size is not False:
            file["size"] = len(archive.content) if size is True else size
        upload_time = attributes.get("upload_time", "2024-01-02T03:04:05.678901Z")
        if upload_time:
            file["upload-time"] = upload_time
        if attributes["requires_python"]:
            file["requires-python"] = attributes["requires_python"]
        file["yanked"] = attributes.get("yanked", False)
        if _announces_metadata(archive, attributes):
            file["core-metadata"] = file["data-dist-info-metadata"] = {
                "sha256": hashlib.sha256(archive.metadata).hexdigest()
            }
        if attributes.get("provenance"):
            file["provenance"] = attributes["provenance"]
        return file

    def _file_html(self, project, archive, attributes):
        href = attributes.get("url") or self._file_url(project, archive)
        for algorithm, digest in _hashes(archive, attributes):
            href += "#%s=%s" % (algorithm, digest)
        marks = {
            "href": href,
            "data-requires-python": attributes["requires_python"],
            "data-provenance": attributes.get("provenance"),
        }
        if attributes.get("yanked"):
            marks["data-yanked"] = "" if attributes["yanked"] is True else attributes["yanked"]
        if _announces_metadata(archive, attributes):
            marks["data-core-metadata"] = marks["data-dist-info-metadata"] = (
                "sha256=" + hashlib.sha256(archive.metadata).hexdigest()
            )
        return "<a %s>%s</a><br/>" % (
            " ".join('%s="%s"' % (mark, html.escape(value)) for mark, value in marks.items() if value is not None),
            html.escape(archive.filename),
        )

    def _file_url(self, project, archive):
        return "%s/files/%s/%s" % (self.host_url, project, urllib.parse.quote(archive.filename))

    def _project_list(self, as_json):
        with self._lock:
            names = sorted(self.projects)
        if as_json:
            meta = {"api-version": "1.4"}
            if self.serial is not None:
                meta["_last-serial"] = self.serial
            return json.dumps({"meta": meta, "projects": [{"name": name} for name in names]}).encode()
        return (
            "<!DOCTYPE html>\n<html><head><title>Simple index</title></head><body>\n%s\n</body></html>\n"
            % "\n".join('<a href="/simple/%s/">%s</a>' % (name, name) for name in names)
        ).encode()

    def _file(self, project, filename):
        """The bytes of a file or of its .metadata; None if not there."""
        with self._lock:
            files = dict(self.projects.get(project, {}))
        if filename in files:
            return files[filename][0].content
        archive, attributes = files.get(
            filename[: -len(".metadata")] if filename.endswith(".metadata") else "", (None, {})
        )
        if archive and _announces_metadata(archive, attributes) and attributes.get("core_metadata") != "unserved":
            return archive.metadata
        return None


def _hashes(archive, attributes):
    """The (algorithm, digest) pairs that a page gives for the file."""
    kind = attributes.get("hash", "sha256")
    if kind is None:
        return []
    if kind == "wrong":
        return [("sha256", hashlib.sha256(b"other bytes than " + archive.content).hexdigest())]
    return [(kind, hashlib.new(kind, archive.content).hexdigest())]


def _announces_metadata(archive, attributes):
    return bool(attributes.get("core_metadata", archive.filename.endswith(".whl")))


class _Handler(Handler):
    def do_GET(self):
        upstream, path = self.fake, self.path
        with upstream._lock:
            upstream.requests.append((self.command, path, self.headers))
        if upstream.credentials and self.headers.get("Authorization") != _basic(*upstream.credentials):
            return self.answer(
                401, b"credentials, please", "text/plain", {"WWW-Authenticate": 'Basic realm="upstream"'}
            )
        kind, arguments = upstream.fault_for(path)
        if kind == "delay":
            upstream._released.wait(arguments.get("seconds", 1))
        elif kind is not None and kind not in (
            "truncate",
            "drip",
            "wrong-hash",
            "no-length",
            "garbage",
            "html-as-json",
            "huge",
        ):
            return self.fail(kind, arguments)
        self.respond(kind, arguments)

    do_HEAD = do_GET

    def fail(self, kind, arguments):
        """The faults that need no answer of ours to spoil."""
        if kind == "reset":
            self.reset_connection()
        elif kind == "hang":
            self.fake._released.wait()
            self.abandon()
        elif kind == "redirect-loop":
            turn = int(self.path.rpartition("?turn=")[2]) if "?turn=" in self.path else 0
            self.answer(
                302,
                b"",
                "text/plain",
                {"Location": "%s%s?turn=%d" % (self.fake.host_url, self.path.partition("?")[0], turn + 1)},
            )
        elif kind == "redirect":
            self.answer(arguments.get("status", 302), b"", "text/plain", {"Location": arguments["to"]})
        else:
            self.answer(arguments.get("status", int(kind)), b"upstream says %s" % kind.encode(), "text/plain")

    def respond(self, kind, arguments):
        """The true answer, spoiled as the fault says."""
        path = urllib.parse.unquote(self.path.partition("?")[0])
        as_json = self.fake.mode == "json" or (
            self.fake.mode == "both" and SIMPLE_JSON in self.headers.get("Accept", "")
        )
        headers = {}
        if path.startswith("/files/"):
            project, _, filename = path[len("/files/") :].partition("/")
            body, content_type = self.fake._file(project, filename), "application/octet-stream"
            headers["Last-Modified"] = "Tue, 02 Jan 2024 03:04:05 GMT"
        elif path == "/simple/":
            body, content_type = self.fake._project_list(as_json), (
                SIMPLE_JSON if as_json else "text/html; charset=utf-8"
            )
        elif path.startswith("/simple/"):
            name = path[len("/simple/") :]
            project = normal_name(name.rstrip("/"))
            if name != project + "/":
                return self.answer(301, b"", "text/plain", {"Location": "/simple/%s/" % project})
            body, content_type = self.fake._page(project, as_json), (
                SIMPLE_JSON if as_json else "text/html; charset=utf-8"
            )
        else:
            body, content_type = None, "text/html; charset=utf-8"
        if body is None and kind not in ("huge", "garbage"):
            return self.answer(404, b"not found", "text/plain")
        body = body or b""
        if not path.startswith("/files/"):
            if self.fake.serial is not None:
                headers["X-PyPI-Last-Serial"] = str(self.fake.serial)
            if self.fake.etags:
                headers["ETag"] = '"%s"' % hashlib.sha256(content_type.encode() + body).hexdigest()[:20]
                if self.headers.get("If-None-Match") == headers["ETag"] and kind in (None, "delay"):
                    return self.answer(304, None, None, headers)
        if kind == "garbage":
            body = os.urandom(max(len(body), 64))
            headers.pop("ETag", None)
        elif kind == "html-as-json":
            content_type = SIMPLE_JSON
            body = b"<!DOCTYPE html>\n<html><body><h1>Please log in</h1></body></html>\n"
            headers.pop("ETag", None)
        elif kind == "wrong-hash":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        elif kind == "huge":
            return self.send_endless(content_type, as_json)
        self.answer(200, body, content_type, headers, kind, arguments)

    def answer(self, status, body, content_type, headers=None, kind=None, arguments=None):
        """Sends it. `kind`: "truncate", "drip" or "no-length" spoil how the body travels."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if body is None:
            self.end_headers()
            return
        self.send_header("Content-Type", content_type)
        chunked = kind == "no-length" and arguments.get("chunked")
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif kind == "no-length":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "truncate":
            self.wfile.write(body[: len(body) // 2])
            self.abandon()
        elif kind == "drip":
            piece, delay, released = arguments.get("piece", 1), arguments.get("delay", 0.1), self.fake._released
            for start in range(0, len(body), piece):
                self.wfile.write(body[start : start + piece])
                self.wfile.flush()
                released.wait(delay)
        elif chunked:
            for start in range(0, len(body), 1000):
                piece = body[start : start + 1000]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.wfile.write(body)

    def send_endless(self, content_type, as_json):
        """A page that begins well and goes on until the client has had enough (or 4 GiB have passed)."""
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(
            b'{"meta": {"api-version": "1.1"}, "name": "endless", "files": ['
            if as_json
            else b"<!DOCTYPE html><html><body>\n"
        )
        released, deadline = self.fake._released, time.monotonic() + 120
        for number in itertools.count():
            entry = (
                '{"filename": "endless-%d.tar.gz", "url": "/e", "hashes": {}},'
                if as_json
                else '<a href="/e-%d.tar.gz">e-%d.tar.gz</a>\n'
            )
            self.wfile.write((entry.replace("%d", str(number)) * 500).encode())
            if released.is_set() or time.monotonic() > deadline or number > 100000:
                return self.abandon()


Upstream.handler = _Handler


def _basic(user, password):
    return "Basic " + base64.b64encode(("%s:%s" % (user, password)).encode()).decode()
