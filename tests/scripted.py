"""An upstream that says exactly what a test tells it to, and what tests ask of mirrors."""

import http.client
import itertools
import json
import threading
import urllib.parse

from misbehaving import Handler, Misbehaving
from upstream import SIMPLE_JSON

SHA = "0123456789abcdef" * 4
# Seconds that the servers wait for upstream: enough for every answer, even on a busy machine.
WAIT = 3
STALE = {"max-age=0", "must-revalidate", "no-cache", "no-store"}
_numbers = itertools.count(1)


class Scripted(Misbehaving):
    """An upstream that listens once it is made, and answers each path with what `answers` has.

    That is bytes, an object (sent as simple JSON), or a function of the handler; 404 if it has
    nothing.  `requests`: what was asked, as (method, path, headers).  `gate`: an event that
    functions may wait for; it is set when the upstream stops.
    """

    def __init__(self):
        super().__init__()
        self.answers, self.requests, self.gate = {}, [], threading.Event()
        self.start()

    @property
    def url(self):
        return self.host_url + "/simple/"

    def answer_to(self, path):
        return self.answers.get(path, self.answers.get(urllib.parse.unquote(path)))

    def page(self, project, *files, **keys):
        """Publishes a JSON project page."""
        self.answers["/simple/%s/" % project] = dict(
            {"meta": {"api-version": "1.4"}, "name": project, "files": list(files)}, **keys)

    def stop(self):
        self.gate.set()
        super().stop()


class _Handler(Handler):
    wbufsize = 0        # what a function writes leaves at once

    def do_GET(self):
        self.fake.requests.append((self.command, self.path, dict(self.headers)))
        answer = self.fake.answer_to(self.path)
        if answer is None:
            self.reply(b"", status=404)
        elif callable(answer):
            answer(self)
        elif isinstance(answer, bytes):
            is_page = answer.lstrip()[:1] == b"<"
            self.reply(answer, "text/html" if is_page else "application/octet-stream")
        else:
            self.reply(json.dumps(answer).encode(), SIMPLE_JSON)

    do_HEAD = do_GET

    def reply(self, body, content_type="text/html", status=200, **headers):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


Scripted.handler = _Handler


def raw(data):
    """An answer of these bytes, then the end."""
    def answer(handler):
        handler.wfile.write(data)
        handler.close_connection = True
    return answer


class Gate:
    """A file that stops halfway until the test opens it: what came by then came before the end."""

    def __init__(self, upstream, path, content):
        self.content, self.opened, self.halves = content, threading.Event(), 0
        upstream.answers[path] = self

    def __call__(self, handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "application/octet-stream")
        handler.send_header("Content-Length", str(len(self.content)))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        half = len(self.content) // 2
        handler.wfile.write(self.content[:half])
        self.halves += 1
        self.opened.wait(60)
        handler.wfile.write(self.content[half:])


def entry(filename, **keys):
    """A file on a page."""
    file = {"filename": filename, "url": "../../files/" + filename, "hashes": {"sha256": SHA}}
    return dict(file, **keys)


def publish_at(upstream, archive, **keys):
    """Puts an archive on the scripted upstream, page and all."""
    path = "/files/" + archive.filename
    keys.setdefault("hashes", {"sha256": archive.sha256})
    upstream.page(archive.name, entry(archive.filename, **keys))
    upstream.answers[path] = archive.content
    return path


def asked(upstream, path=None):
    """The headers of each request that upstream got (for that path)."""
    return [headers for _, asked_path, headers in list(upstream.requests)
            if path in (None, asked_path)]


def header(headers, name):
    return {key.lower(): value for key, value in headers.items()}.get(name.lower())


def mirror(server, url, **config):
    """The name of a new mirror of mia's."""
    index = "mia/mirror%d" % next(_numbers)
    server.add_mirror(index, url, **config)
    return index


def link_to(server, index, filename, project="demo"):
    """The path of a file on its project's page."""
    files = server.simple(index, project)["files"]
    (file,) = [file for file in files if file["filename"] == filename]
    return urllib.parse.urljoin("/%s/+simple/%s/" % (index, project), file["url"])


def begin(server, path):
    """A download under way: (connection, response), to be read by the test."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", path, headers={"Accept": "*/*"})
    return connection, connection.getresponse()


def cache_control(reply):
    return {token.strip() for token in (reply.headers.get("Cache-Control") or "").split(",")}


def is_stale(reply):
    return reply.status == 200 and cache_control(reply) == STALE
