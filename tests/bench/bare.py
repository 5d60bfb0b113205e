"""The least that a server in Python costs: a loop that answers each request with the same bytes.

    python bare.py PORT SIZE

What a hot page costs is measured against it in the same run: on a slower machine both cost more. `Bare` is the other end.
"""

import os
import select
import socket
import subprocess
import sys
import time


def serve(port, size):
    """Answers whatever comes with `size` bytes, head and body: no parsing, no look-up, no log."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %07d\r\n\r\n"
    answer = head % (size - len(head % 0)) + bytes(size - len(head % 0))
    listener = socket.create_server(("127.0.0.1", port), backlog=128)
    epoll, connections = select.epoll(), {}
    epoll.register(listener, select.EPOLLIN)
    while True:
        for number, _ in epoll.poll():
            connection = connections.get(number)
            if connection is None:
                connection, _ = listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.setblocking(False)
                connections[connection.fileno()] = connection
                epoll.register(connection, select.EPOLLIN)
            else:
                try:
                    if connection.recv(65536):
                        connection.send(answer)
                        continue
                except ConnectionError:
                    pass
                connections.pop(number).close()


class Bare:
    """Such a process, measured as a `Server` is."""

    def __init__(self, python, size):
        with socket.socket() as chosen:
            chosen.bind(("127.0.0.1", 0))
            self.port = chosen.getsockname()[1]
        words = [python, "-S", "-E", os.path.abspath(__file__), str(self.port), str(size)]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)
        self.pid = self.process.pid
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    self.kill()
                    raise RuntimeError("the bare loop does not listen") from None
                time.sleep(0.01)

    def forget_log(self):
        """Nothing: it has no log."""

    def settle(self):
        """Nothing: it does nothing but answer."""

    def kill(self):
        self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
