"""The upstream of the benchmark: a deterministic fake of PyPI, in a process of its own.

    GET /simple/                    the list of names (HTML, or JSON by Accept), with ETag
    GET /simple/{project}/          a page of wheels
    GET /files/{project}/{file}     a wheel, or its `.metadata` (PEP 658)
    GET /+counts                    JSON: requests by kind, and connections; not delayed and not counted

Run as a program it makes all its answers first, then prints its port, and ends when stdin ends. Projects are called
`{prefix}-0`, `{prefix}-1`, ...; the list has `names` further names that lead nowhere. `Upstream` is the other end.
"""

import asyncio
import hashlib
import http.client
import json
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
JSON = "application/vnd.pypi.simple.v1+json"


class Upstream:
    """The process. `latency` in milliseconds passes before each answer."""

    def __init__(self, prefix, projects, files=2, names=0, latency=0):
        order = {"prefix": prefix, "projects": projects, "files": files, "names": names, "latency": latency}
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.port = int(self.process.stdout.readline())
        self.url = "http://127.0.0.1:%d/simple/" % self.port
        self.projects = ["%s-%d" % (prefix, number) for number in range(projects)]

    def counts(self):
        """Since it started: {"list", "page", "file", "metadata", "other", "connections"}."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", "/+counts")
        counts = json.loads(connection.getresponse().read())
        connection.close()
        return counts

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Pages:
    """All answers by path: (kind, content type, body, etag); pages by (path, whether JSON)."""

    def __init__(self, base, order):
        self.answers = {}
        projects = ["%s-%d" % (order["prefix"], number) for number in range(order["projects"])]
        for project in projects:
            self._add_project(base, project, order["files"])
        names = projects + ["name-%06d" % number for number in range(order["names"])]
        self._add_page("/simple/", "list", self._list_html(names), self._list_json(names))

    def _add(self, path, kind, content_type, body):
        self.answers[path] = (kind, content_type, body, '"%s"' % hashlib.md5(body).hexdigest())

    def _add_page(self, path, kind, page_html, page_json):
        self._add((path, False), kind, "text/html; charset=utf-8", page_html)
        self._add((path, True), kind, JSON, page_json)

    def _add_project(self, base, project, files):
        links, entries = [], []
        for number in range(files):
            archive = archives.wheel(project, "1.%d" % number, requires_python=">=3.6")
            path = "/files/%s/%s" % (project, archive.filename)
            self._add(path, "file", "application/octet-stream", archive.content)
            self._add(path + ".metadata", "metadata", "application/octet-stream", archive.metadata)
            metadata_hash = hashlib.sha256(archive.metadata).hexdigest()
            marks = 'data-requires-python="&gt;=3.6" data-core-metadata="sha256=%s"' % metadata_hash
            links.append('<a href="%s%s#sha256=%s" %s>%s</a>' % (base, path, archive.sha256, marks, archive.filename))
            entries.append(
                {
                    "filename": archive.filename,
                    "url": base + path,
                    "hashes": {"sha256": archive.sha256},
                    "size": len(archive.content),
                    "requires-python": ">=3.6",
                    "upload-time": "2024-01-02T03:04:05.678901Z",
                    "core-metadata": {"sha256": metadata_hash},
                }
            )
        page = {"meta": {"api-version": "1.1"}, "name": project, "files": entries}
        page["versions"] = ["1.%d" % number for number in range(files)]
        head = "<!DOCTYPE html>\n<html>\n  <head><title>Links for %s</title></head>\n  <body>\n%s\n  </body>\n</html>\n"
        page_html = head % (project, "\n".join(links))
        self._add_page("/simple/%s/" % project, "page", page_html.encode(), json.dumps(page).encode())

    @staticmethod
    def _list_html(names):
        links = "\n".join('    <a href="/simple/%s/">%s</a>' % (name, name) for name in names)
        return (
            "<!DOCTYPE html>\n<html>\n  <head><title>Simple index</title></head>\n  <body>\n%s\n  </body>\n</html>\n"
            % links
        ).encode()

    @staticmethod
    def _list_json(names):
        return json.dumps({"meta": {"api-version": "1.1"}, "projects": [{"name": name} for name in names]}).encode()


class Protocol(asyncio.Protocol):
    """One connection."""

    pages, latency, counts = None, 0.0, {}

    def connection_made(self, transport):
        self.transport, self.buffer, self.is_counted = transport, b"", False

    def data_received(self, data):
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            method, path, _ = first.split(" ")
            if path == "/+counts":
                body = json.dumps(self.counts).encode()
                self.send(method, "200 OK", {"Content-Type": "application/json"}, body)
                continue
            if not self.is_counted:
                self.is_counted = True
                self.counts["connections"] += 1
            asyncio.get_running_loop().call_later(self.latency, self.answer, method, path, headers)

    def answer(self, method, path, headers):
        as_json = JSON in headers.get("accept", "")
        found = self.pages.answers.get(path) or self.pages.answers.get((path, as_json))
        self.counts[found[0] if found else "other"] += 1
        if found is None:
            return self.send(method, "404 Not Found", {"Content-Type": "text/plain"}, b"not found")
        _, content_type, body, etag = found
        fields = {"Content-Type": content_type, "ETag": etag, "Vary": "Accept"}
        if headers.get("if-none-match") == etag:
            return self.send(method, "304 Not Modified", fields, None)
        self.send(method, "200 OK", fields, body)

    def send(self, method, status, fields, body):
        if body is not None:
            fields["Content-Length"] = str(len(body))
        head = "HTTP/1.1 %s\r\n%s\r\n" % (status, "".join("%s: %s\r\n" % field for field in fields.items()))
        self.transport.write(head.encode())
        if body and method != "HEAD":
            self.transport.write(body)


async def main(order):
    loop = asyncio.get_running_loop()
    Protocol.counts = dict.fromkeys(["list", "page", "file", "metadata", "other", "connections"], 0)
    Protocol.latency = order["latency"] / 1000
    server = await loop.create_server(Protocol, "127.0.0.1", 0, backlog=1024)
    port = server.sockets[0].getsockname()[1]
    Protocol.pages = Pages("http://127.0.0.1:%d" % port, order)
    print(port, flush=True)
    await loop.run_in_executor(None, sys.stdin.buffer.read)  # until the benchmark ends


if __name__ == "__main__":
    sys.path.insert(1, os.path.dirname(HERE))
    import archives

    asyncio.run(main(json.loads(sys.argv[1])))
