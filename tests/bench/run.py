"""What the workloads of one run share: sizes, processes and their end, and the figures."""

import hashlib
import os
import shutil
import socket
import sys
import tempfile
import time

import load
from bare import Bare
from report import Figure
from server import Program, Server
from targets import target_of
from upstream import Upstream

MS, US = 1000, 1000000  # in a second


class Run:
    """`rounds` is how often each thing is measured, `quick` chooses the smaller counts."""

    def __init__(self, script, python, rounds, quick):
        self.rounds, self.quick = rounds, quick
        self.seconds = 0.3 if quick else 1.0  # of one measurement on a hot answer
        self.figures, self.done = [], []  # the latter: names of workloads
        self.memory_after_w5 = None  # of the farm, in MB
        self.devpi = self.devpi_files = None  # the environment of a real devpi-server, and how many files it is given
        self._script, self._python, self._folder = script, python, None
        self._processes, self._farm, self._names = [], None, 0

    def open(self):
        """Makes what `close` takes away."""
        self._folder = tempfile.mkdtemp(prefix="devpi_lite-bench-")
        self.program = Program(self._script, self._python, self._folder)
        self.generators = [self._keep(load.Generator()) for _ in range(4)]

    def close(self):
        """Ends what it started, by process id, and removes its directory."""
        for process in reversed(self._processes):
            process.kill()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _keep(self, process):
        self._processes.append(process)
        return process

    def size(self, full, quick):
        return quick if self.quick else full

    # -- processes

    def server(self, *options):
        """A server on a new directory, not started."""
        self._names += 1
        return self._keep(Server(self.program, os.path.join(self._folder, "server-%d" % self._names), *options))

    def place(self, name):
        """A path of that name in the folder of the run."""
        return os.path.join(self._folder, name)

    def keep(self, process):
        """Has a process, with `kill`, end with the run."""
        return self._keep(process)

    def started_server(self):
        """With the index root/priv."""
        server = self.server().start()
        server.add_stage("priv")
        return server

    def upstream(self, prefix, projects, **options):
        return self._keep(Upstream(prefix, projects, **options))

    def bare(self, size):
        return self._keep(Bare(self._python, size))

    @property
    def generator(self):
        return self.generators[0]

    @property
    def farm(self):
        """The server of w1 to w5.

        root/priv stands alone; root/stage has the bases root/b1, root/b2, root/b3, the last of which has the base
        root/mirror, a mirror of an upstream without latency.
        """
        if self._farm is None:
            self._farm = self.started_server()
            self._farm.add_mirror("mirror", self.upstream("chain", 10, files=2))
            self._farm.add_stage("b1")
            self._farm.add_stage("b2")
            self._farm.add_stage("b3", "root/mirror", mirror_whitelist=["*"])
            self._farm.add_stage("stage", "root/b1", "root/b2", "root/b3", mirror_whitelist=["*"])
        return self._farm

    # -- measuring

    def hot(self, server, request, connections, seconds=None):
        """One `load.Result` of the same request again and again, from as many processes as there are cores to spare."""
        spare = max(1, min((os.cpu_count() or 1) - 1, len(self.generators), connections // 8))
        server.forget_log()
        server.settle()
        share, rest = divmod(connections, spare)
        for at, generator in enumerate(self.generators[:spare]):
            own = share + (at < rest)
            generator.begin(load.hot, server.port, server.pid, request, own, seconds or self.seconds)
        return merged([generator.result() for generator in self.generators[:spare]])

    def side_by_side(self, server, requests, connections):
        """A `load.Result` for each request, from short spans in turn, so that a busy moment of the machine hits all."""
        parts = [[] for _ in requests]
        for _ in range(4):
            for part, request in zip(parts, requests):
                part.append(self.hot(server, request, connections, self.seconds / 2))
        return [joined(part) for part in parts]

    def least_cpu(self, asked):
        """CPU seconds of an answer at 16 connections, of each (server, request): the least of short spans in turn.

        What else runs on the machine only adds to it, and more to a larger program."""
        spans = [[self.hot(*each, 16, self.seconds / 2).cpu_each for each in asked] for _ in range(6)]
        return [min(each) for each in zip(*spans)]

    def first_cpu(self, server, request, text=b""):
        """Server CPU seconds of one answer, once it is idle. LoadError if its body lacks the text."""
        server.settle()
        with load.connect(server.port) as connection:
            before = server.cpu(children=False)
            answer = load.exchange(connection, request)
            cpu = server.cpu(children=False) - before
        if answer.status != 200:
            raise load.LoadError("%r answers %r" % (request, answer.head))
        if text not in answer.body:
            raise load.LoadError("%r answers without %r, which was uploaded just before" % (request, text))
        return cpu

    def expect_links(self, server, path, count):
        """LoadError unless the HTML page has that many files."""
        with load.connect(server.port) as connection:
            found = load.exchange(connection, load.get(path)).body.count(b"<a ")
        if found != count:
            raise load.LoadError("%s lists %d files, not %d" % (path, found, count))

    # -- figures

    def record(self, workload, case, figure, unit, values, better="low", note=""):
        target = target_of(workload, case, figure, unit, self.quick)
        self.figures.append(Figure(workload, case, figure, unit, list(values), better, target, note))

    def record_hot(self, workload, case, results):
        """Rate, CPU an answer and latencies of one Result a round."""
        note = generator_note(results)
        self.record(workload, case, "rate", "req/s", [result.rate for result in results], "high", note=note)
        cpu = [result.cpu_each * US for result in results]
        self.record(workload, case, "CPU each", "us", cpu)
        self.record_latency(workload, case, results)

    def record_latency(self, workload, case, results):
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            values = [result.percentile(share) * MS for result in results]
            self.record(workload, case, name, "ms", values)


def merged(results):
    """One Result of what several generators measured at the same time."""
    parts, whole = len(results), joined(results)
    connections = sum(result.connections for result in results)
    return whole._replace(
        seconds=whole.seconds / parts, server_cpu=whole.server_cpu / parts, connections=connections
    )


def joined(results):
    """One Result of what was measured one after the other."""
    return load.Result(
        sum(result.count for result in results),
        sum(result.seconds for result in results),
        sum(result.server_cpu for result in results),
        max(result.generator_cpu for result in results),
        [latency for result in results for latency in result.latencies],
        sum(result.received for result in results),
        [error for result in results for error in result.errors],
        max(result.connections for result in results),
    )


def generator_note(results):
    """How busy the generator was, and whether it may have been the bound of the rate."""
    busiest = max(results, key=lambda result: result.generator_cpu)
    server = busiest.server_cpu / busiest.seconds
    text = "CPUs: server %.0f %%, generator %.0f %%" % (100 * server, 100 * busiest.generator_cpu)
    if busiest.generator_cpu < load.BUSY:
        crowded = busiest.connections > 8 and server + busiest.generator_cpu < 1.1
        return text + (": OTHERS KEPT THE CPUS BUSY" if crowded else "")
    return text + (": THE GENERATOR'S BOUND" if server < load.BUSY else ": both near their bound")


def fixed_work():
    """CPU milliseconds of the same small work each time: where it takes longer than before, so does everything else."""
    near, far = socket.socketpair()
    began, total = time.process_time(), 0
    for turn in range(10000):
        near.send(b"x")
        total += len(far.recv(1))
        for _ in range(20):
            total += turn & 3
    hashlib.sha256(bytes(20000000)).digest()
    spent = time.process_time() - began
    near.close()
    far.close()
    return spent * MS


def page(project, index="priv"):
    """The path of a simple page."""
    return "/root/%s/+simple/%s/" % (index, project)


def releases(project, count):
    """(project, version) of that many."""
    return [(project, "1.%d" % each) for each in range(count)]


def middle(values):
    return sorted(values)[len(values) // 2]


def ratio(values, others):
    return [value / other for value, other in zip(values, others)]


def say(text):
    print("%s  %s" % (time.strftime("%H:%M:%S"), text), file=sys.stderr, flush=True)
