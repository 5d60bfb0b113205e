"""The load: requests that were made beforehand, sent from processes of their own, and the answers timed.

Run as a program this file is such a process: it reads pickled orders (a function's name, its arguments) from stdin and
writes a pickled result for each to stdout, until stdin ends. `Generator` is the other end. Times are in seconds,
latencies are lists of seconds. Every answer but 200 and 201 is an error.
"""

import collections
import os
import pickle
import re
import select
import socket
import subprocess
import sys
import threading
import time
import typing
import urllib.parse

HOST = "127.0.0.1"
HEAD_END = b"\r\n\r\n"
BUSY = 0.9  # share of a CPU from which a generator may have been the bound


class LoadError(Exception):
    """An answer that makes the measurement worthless."""


class Result(typing.NamedTuple):
    """What one order measured. CPU times are those of its own span: none of connecting or of warming up."""

    count: int  # answers
    seconds: float  # wall
    server_cpu: float  # seconds of the server's own process (not of its children)
    generator_cpu: float  # share of one CPU that this process used, 0 to 1 (and above, with threads)
    latencies: list
    received: int  # bytes of all bodies
    errors: list  # texts
    connections: int

    @property
    def rate(self):
        return self.count / self.seconds

    @property
    def cpu_each(self):
        """Seconds of server CPU an answer."""
        return self.server_cpu / max(1, self.count)

    def percentile(self, share):
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def checked(self):
        """Itself; LoadError if there was any error."""
        if self.errors:
            raise LoadError("%d errors, the first: %s" % (len(self.errors), self.errors[0]))
        return self


class Answer(typing.NamedTuple):
    status: int
    head: bytes
    body: bytearray
    first_byte: float  # seconds after the request was sent
    seconds: float  # to the last byte


class Task(typing.NamedTuple):
    """A request, and perhaps a second one for what the first answer links to."""

    request: bytes
    path: str = ""  # of the request
    link: str = ""  # regular expression; group 1 is fetched next
    suffix: str = ""  # added to the link


def process_seconds(pid):
    """CPU seconds of a process with all its threads, ended ones too: the clock behind utime + stime of /proc/PID/stat.

    That clock counts nanoseconds where stat counts hundredths of a second.
    """
    try:
        return time.clock_gettime((~pid << 3) | 2)  # Linux: MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED)
    except OSError:
        with open("/proc/%d/stat" % pid) as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def settled_seconds(pid):
    """The same once the last answer is over: a running thread's time is added when it leaves its CPU, or at a tick."""
    time.sleep(0.01)
    return process_seconds(pid)


def get(path, accept="text/html", gzip=False, headers=()):
    """The bytes of a GET request."""
    lines = ["GET %s HTTP/1.1" % path, "Host: %s" % HOST, "User-Agent: bench", "Accept: %s" % accept]
    lines += ["Accept-Encoding: gzip"] if gzip else []
    return ("\r\n".join(lines + list(headers)) + "\r\n\r\n").encode()


# -- one connection


def connect(port):
    connection = socket.create_connection((HOST, port), timeout=120)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def exchange(connection, request):
    """Sends one request and reads the whole answer. OSError or LoadError if it does not arrive."""
    began = time.perf_counter()
    connection.sendall(request)
    data = connection.recv(1 << 16)
    first_byte = time.perf_counter() - began
    received = bytearray(data)
    while HEAD_END not in received:
        data = connection.recv(1 << 16)
        if not data:
            raise LoadError("closed after %r" % bytes(received[:200]))
        received += data
    end = received.index(HEAD_END) + 4
    head = bytes(received[:end])
    del received[:end]
    body = received
    length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.I)
    chunked = re.search(rb"\r\ntransfer-encoding: *chunked", head, re.I)
    while len(body) < int(length[1]) if length else not (chunked and body.endswith(b"0" + HEAD_END)):
        data = connection.recv(1 << 20)
        if not data:
            if length or chunked:
                raise LoadError("closed in the middle of a body after %r" % head)
            break
        body += data
    return Answer(int(head[9:12]), head, body, first_byte, time.perf_counter() - began)


# -- orders


def hot(port, pid, request, connections, seconds):
    """The same request again and again for `seconds`, on keep-alive connections with one request under way on each.

    Bodies must all have the length of the first. Of one over 64 KiB the kernel drops the bytes instead of copying
    them (MSG_TRUNC), so that the receiving side costs next to nothing.
    """
    sockets = [connect(port) for _ in range(connections)]
    for connection in sockets:
        answer = exchange(connection, request)
        if answer.status != 200:
            raise LoadError("%r answers %r" % (request, answer.head))
        connection.setblocking(False)  # with a timeout each recv would poll first
    body, small = len(answer.body), len(answer.body) <= 1 << 16
    size = max(map(socket.socket.fileno, sockets)) + 1
    receive, missing, since = [None] * size, [0] * size, [0.0] * size
    epoll, buffer = select.epoll(), bytearray(1 << 17)
    latencies = []
    poll, write, clock = epoll.poll, os.write, time.perf_counter
    find, starts_with, note = buffer.find, buffer.startswith, latencies.append
    began, generator_began, server_began = clock(), time.process_time(), process_seconds(pid)
    deadline = began + seconds
    for connection in sockets:
        receive[connection.fileno()] = connection.recv_into
        epoll.register(connection, select.EPOLLIN)
        since[connection.fileno()] = clock()
        write(connection.fileno(), request)
    now = began
    while now < deadline:
        for fd, _ in poll(1):
            rest = missing[fd]
            if rest:
                rest -= receive[fd](buffer) if small else receive[fd](buffer, 1 << 17, socket.MSG_TRUNC)
            else:
                count = receive[fd](buffer, 1 << 14)
                end = find(HEAD_END, 0, count)
                if end < 0 or not starts_with(b"HTTP/1.1 200"):
                    raise LoadError("%r answers %r" % (request, bytes(buffer[:count])))
                rest = end + 4 + body - count
            missing[fd] = rest
            if rest <= 0:
                now = clock()
                note(now - since[fd])
                since[fd] = now
                write(fd, request)
        now = clock()
    server, generator = process_seconds(pid) - server_began, time.process_time() - generator_began
    epoll.close()
    for connection in sockets:
        connection.close()
    if not latencies:
        raise LoadError("%r: no answer in %s seconds" % (request, seconds))
    return Result(
        len(latencies),
        now - began,
        server,
        generator / (now - began),
        latencies,
        body * len(latencies),
        [],
        connections,
    )


def each(port, pid, tasks, connections, seconds=None):
    """Every task once, in order, `connections` at a time; with `seconds`, as many as can be begun in them.

    A latency and a count stand for one whole task.
    """
    waiting, lock = collections.deque(tasks), threading.Lock()
    latencies, errors, received = [], [], []
    # Connections are there before the clock starts.
    sockets = [connect(port) for _ in range(connections)]
    began, generator_began, server_began = time.perf_counter(), time.process_time(), process_seconds(pid)

    def work(connection):
        while seconds is None or time.perf_counter() < began + seconds:
            with lock:
                if not waiting or len(errors) > 50:
                    break
                task = waiting.popleft()
            started = time.perf_counter()
            try:
                answers = [exchange(connection, task.request)]
                if task.link and answers[0].status == 200:
                    target = re.search(task.link, answers[0].body.decode()).group(1).partition("#")[0]
                    parts = urllib.parse.urlsplit(urllib.parse.urljoin(task.path, target))
                    answers.append(exchange(connection, get(parts.path + task.suffix, "*/*")))
                latencies.append(time.perf_counter() - started)
                for answer in answers:
                    received.append(len(answer.body))
                    if answer.status not in (200, 201):
                        errors.append("%r answers %r" % (task.request[:200], (answer.head + answer.body)[:600]))
                if re.search(rb"\r\nconnection: *close", answers[-1].head, re.I):
                    connection.close()
                    connection = connect(port)
            except (OSError, LoadError, AttributeError) as error:
                errors.append("%r: %r" % (task.request[:200], error))
                connection.close()
                connection = connect(port)
        connection.close()

    threads = [threading.Thread(target=work, args=(connection,)) for connection in sockets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - began
    server, generator = settled_seconds(pid) - server_began, time.process_time() - generator_began
    return Result(len(latencies), wall, server, generator / wall, latencies, sum(received), errors, connections)


def probe(port, pid, request, pause, seconds=None, until=None):
    """One request every `pause` seconds on one connection, for `seconds` or until `until()` is true (at least one)."""
    latencies, errors, received = [], [], 0
    began, generator_began, server_began = time.perf_counter(), time.process_time(), process_seconds(pid)
    with connect(port) as connection:
        while True:
            answer = exchange(connection, request)
            latencies.append(answer.seconds)
            received += len(answer.body)
            if answer.status != 200:
                errors.append(repr(answer.head))
            if until() if until else time.perf_counter() > began + seconds:
                break
            time.sleep(pause)
    wall = time.perf_counter() - began
    server, generator = settled_seconds(pid) - server_began, time.process_time() - generator_began
    return Result(len(latencies), wall, server, generator / wall, latencies, received, errors, 1)


# -- processes


class Generator:
    """A process that carries out `hot`, `each` or `probe`, one order at a time."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.is_begun = False

    def begin(self, order, *arguments, **options):
        """Returns at once; `result` waits. What an earlier order measured is lost if nobody asked for it."""
        if self.is_begun:
            pickle.load(self.process.stdout)
        self.is_begun = True
        pickle.dump((order.__name__, arguments, options), self.process.stdin)
        self.process.stdin.flush()
        return self

    def is_done(self):
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def result(self):
        """What the order measured; LoadError if it could not be carried out."""
        self.is_begun = False
        try:
            result = pickle.load(self.process.stdout)
        except EOFError:
            raise LoadError("the load generator ended") from None
        if isinstance(result, Exception):
            raise result
        return result

    def run(self, order, *arguments, **options):
        return self.begin(order, *arguments, **options).result()

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def serve_orders():
    while True:
        try:
            name, arguments, options = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result = {"hot": hot, "each": each, "probe": probe}[name](*arguments, **options)
        except Exception as error:  # the other end raises it
            result = LoadError("%s: %s" % (type(error).__name__, error))
        pickle.dump(result, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    # Pickles name the classes of the module, not those of a program.
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import load

    load.serve_orders()
