"""What fake servers have in common: HTTP/1.1 in threads, faults on demand, a port that stays."""

import fnmatch
import http.server
import socket
import struct
import threading

kept_ports = []


def keep_port(port):
    """A socket that holds a closed port of 127.0.0.1 until it is closed itself.

    Nobody is given the port, and connecting is refused.
    """
    kept = socket.socket()
    # for the connections that the port had
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", port))
    kept_ports.append(kept)
    return kept


class Misbehaving:
    """A server to derive from.

    `handler`: its Handler class.  `faults`: the kinds that `fault` takes.  `connections`: how many
    were opened.
    """

    handler, faults = None, ()

    def __init__(self):
        self._http, self._port, self._kept, self._sockets = None, 0, None, set()
        self._lock, self._released = threading.Condition(), threading.Event()
        self._faults, self.connections = [], 0

    # -- life

    def start(self):
        """Listens; on the port that it had before if it had one."""
        if self._kept:
            self._kept.close()
        self._http = _Listener(("127.0.0.1", self._port), self)
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02},
                         name="fake server", daemon=True).start()
        return self

    def stop(self):
        """Closes the listening socket and every connection: afterwards, connecting is refused.

        The port stays taken while this process lives: a server that still asks or sends there must
        find nobody, and the next fake server must not be taken for one that failed.
        """
        self._release()
        if self._http is None:
            return
        self._http.shutdown()
        self._http.server_close()
        self._http = None
        self._kept = keep_port(self._port)
        with self._lock:
            sockets = list(self._sockets)
        for connection in sockets:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stop()

    def restart(self):
        """Stops and starts on the same port."""
        self.stop()
        return self.start()

    @property
    def port(self):
        return self._port

    @property
    def host_url(self):
        return "http://127.0.0.1:%d" % self._port

    # -- faults

    def fault(self, kind, path="*", times=None, **arguments):
        """From now on (`times` times if given) requests whose path matches meet the fault.

        The first one given wins.
        """
        if kind not in self.faults:
            raise ValueError("no such fault: %r" % kind)
        with self._lock:
            self._faults.append({"what": (kind, arguments), "left": times, "path": path})

    def clear_faults(self):
        """Healthy again; what hangs, drips or waits is let go (hanging connections break)."""
        with self._lock:
            self._faults = []
        self._release()

    def fault_for(self, path):
        """(kind, arguments) of the fault that the path meets, counted down; or (None, {})."""
        return self._next(self._faults, path) or (None, {})

    def _release(self):
        self._released.set()
        self._released = threading.Event()

    def _next(self, rules, path):
        """What the first rule that applies says, counted down; None if there is none."""
        with self._lock:
            for rule in rules:
                if rule["left"] != 0 and fnmatch.fnmatchcase(path, rule["path"]):
                    if rule["left"] is not None:
                        rule["left"] -= 1
                    return rule["what"]
        return None


class _Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address, fake):
        self.fake = fake
        super().__init__(address, fake.handler)

    def server_bind(self):
        """With a small buffer what is unread stays with the sender, who notices at once."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        super().server_bind()

    def handle_error(self, request, client_address):
        """Broken connections are what the tests are about: silence."""


class Handler(http.server.BaseHTTPRequestHandler):
    """Of a Misbehaving server, which is its `fake`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def setup(self):
        super().setup()
        self.fake = self.server.fake
        with self.fake._lock:
            self.fake._sockets.add(self.connection)
            self.fake.connections += 1

    def finish(self):
        with self.fake._lock:
            self.fake._sockets.discard(self.connection)
        super().finish()

    def log_message(self, *arguments):
        pass

    def abandon(self):
        """Ends the connection without a further byte."""
        self.close_connection = True
        try:
            self.wfile.flush()
        except OSError:
            pass

    def reset_connection(self):
        """Ends it by RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.abandon()
        self.connection.close()     # before the server's orderly shutdown(): the client sees RST
