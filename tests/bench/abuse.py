"""Eight accounts that take what they can get, as a process of its own:  python abuse.py PORT SECONDS

Each is one kind of abuse that the server has to bear.  Prints a JSON object {kind: requests that were answered}; a kind
that could not begin ends the process with its reason.  Only 127.0.0.1, for the given seconds.
"""

import base64
import bz2
import collections
import gzip
import http.client
import http.server
import json
import os
import socket
import sys
import tarfile
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import archives  # noqa: E402

HOST = "127.0.0.1"
ANSWERED = collections.Counter()


class Account:
    """A user with an index of the same name, on a machine of its own (all of 127.0.0.0/8 is this one); `ask` sends one
    request as this user."""

    def __init__(self, port, kind):
        self.port, self.kind = port, kind
        self.source = "127.0.0.%d" % (10 + list(KINDS).index(kind)), 0
        self.login = "Basic " + base64.b64encode(("%s:secret" % kind).encode()).decode()
        self.must("PUT", "/" + kind, {"password": "secret"})

    def ask(self, method, path, body=None, headers=(), login=True):
        """The status; 0 if the connection broke."""
        sent = dict({"Authorization": self.login} if login else {}, **dict(headers))
        connection = http.client.HTTPConnection(HOST, self.port, timeout=60, source_address=self.source)
        try:
            connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body, sent)
            answer = connection.getresponse()
            answer.read()
            ANSWERED[self.kind] += 1
            return answer.status
        except OSError:
            return 0
        finally:
            connection.close()

    def must(self, method, path, body=None, headers=()):
        status = self.ask(method, path, body, headers)
        if status not in (200, 201):
            sys.exit("%s: %s %s: %d" % (self.kind, method, path, status))

    def stage(self, **config):
        self.must("PUT", "/%s/dev" % self.kind, config)

    def mirror(self, url, name="m"):
        self.must("PUT", "/%s/%s" % (self.kind, name), {"type": "mirror", "mirror_url": url})

    def upload(self, filename, content, name, version, **fields):
        body, content_type = archives.multipart(
            dict({":action": "file_upload", "name": name, "version": version}, **fields), {"content": (filename, content)})
        return self.ask("POST", "/%s/dev/" % self.kind, body, {"Content-Type": content_type})


def deaf():
    """The address of a socket that takes connections and never answers."""
    listener = socket.socket()
    listener.bind((HOST, 0))
    listener.listen(100)
    HELD.append(listener)
    return "http://%s:%d/" % listener.getsockname()


HELD = []


def upstream(body):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "application/vnd.pypi.simple.v1+json")
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass
    server = http.server.ThreadingHTTPServer((HOST, 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return "http://%s:%d/" % server.server_address[:2]


# -- the kinds: each returns a function to call again and again


def large_json(account):
    account.stage()
    hollow = b'{"custom_data": [' + b"[]," * 100000 + b"[]]}"
    return lambda number: (account.ask("PATCH", "/large_json/dev", hollow), account.ask("POST", "/+login", hollow, login=False))


def hashing(account):
    def turn(number):
        guess = "Basic " + base64.b64encode(b"hashing:guess%d" % number).decode()
        address = "2001:db8:%x:%x::1" % (number >> 16, number & 0xffff)
        account.ask("GET", "/hashing", headers={"Authorization": guess, "X-Real-IP": address}, login=False)
        account.ask("PUT", "/made-%d" % number, {"password": "x"}, {"X-Real-IP": address}, login=False)
    return turn


def hanging_upstream(account):
    for number in range(8):
        account.mirror(deaf(), "m%d" % number)
    return lambda number: account.ask("GET", "/hanging_upstream/m%d/+simple/x%d/" % (number % 8, number))


def hanging_webhooks(account):
    account.stage(webhook_url=[deaf() for _ in range(20)])
    return lambda number: account.upload("p-1.%d.tar.gz" % number, archives.sdist("p", "1.%d" % number).content, "p",
                                         "1.%d" % number)


def title_changes(account):
    account.stage(custom_data=base64.b64encode(os.urandom(180000)).decode())

    def turn(number):
        account.ask("PATCH", "/title_changes/dev", {"title": str(number)})
        time.sleep(0.005)       # some 150 a second
    return turn


def slow_readers(account):
    account.stage()
    archive = archives.sdist("big", "1.0")
    if account.upload(archive.filename, archive.content, "big", "1.0", description="x" * (9 << 20)) != 200:
        sys.exit("slow_readers: the upload failed")

    def turn(number):
        connection = socket.create_connection((HOST, account.port), 60, account.source)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(b"GET /slow_readers/dev/big/1.0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        HELD.append(connection)
        if len(HELD) > 300:
            HELD.pop(0).close()
        ANSWERED[account.kind] += 1
        time.sleep(0.1)
    return turn


def huge_lists(account):
    body = gzip.compress(b'{"meta":{"api-version":"1.0"},"projects":['
                         + b",".join(b'{"name":"p%d"}' % number for number in range(1500000)) + b"]}", 1)
    for number in range(4):
        account.mirror(upstream(body), "m%d" % number)
    return lambda number: account.ask("GET", "/huge_lists/m%d/+simple/" % (number % 4))


def bombs(account):
    account.stage()
    member = tarfile.TarInfo("a-1/zeros")
    member.size = 600 << 20
    pack = bz2.BZ2Compressor()
    pieces = [pack.compress(member.tobuf())] + [pack.compress(bytes(1 << 20)) for _ in range(600)]
    bomb = b"".join(pieces) + pack.compress(bytes(10240)) + pack.flush()
    return lambda number: account.upload("a-1.tar.bz2", bomb, "a", "1")


KINDS = {kind.__name__: kind for kind in (
    large_json, hashing, hanging_upstream, hanging_webhooks, title_changes, slow_readers, huge_lists, bombs)}


def main(port, seconds):
    turns = {name: kind(Account(port, name)) for name, kind in KINDS.items()}
    print("ready", flush=True)
    sys.stdin.readline()
    until = time.monotonic() + seconds

    def work(name, first):
        number = first
        while time.monotonic() < until:
            turns[name](number)
            number += 4
    for name in turns:
        for first in range(4):
            threading.Thread(target=work, args=(name, first), daemon=True).start()
    time.sleep(seconds)
    print(json.dumps(ANSWERED), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
