"""w10, what eight abusive accounts take from honest ones."""

import os
import subprocess
import sys
import threading
import time

import load
from run import MS, page, releases
from server import small_wheel

ABUSE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "abuse.py")
PACE = 0.002        # seconds between two requests of an honest reader


def w10(run):
    """Honest readers and uploaders alone, then beside eight accounts that abuse the server: rates, waits, memory, disk."""
    seconds = run.size(12, 5)
    server = run.started_server()
    server.fill(run.generator, releases("small", 5))
    alone = honest(run, server, seconds, 0)
    before = disk(server.directory)
    abusers = subprocess.Popen([sys.executable, ABUSE, str(server.port), str(seconds + 4)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, start_new_session=True)
    run._keep(abusers)
    if abusers.stdout.readline() != b"ready\n":
        raise load.LoadError("the abusive accounts could not begin")
    memory = Memory(server)
    abusers.stdin.write(b"go\n")
    abusers.stdin.flush()
    time.sleep(2)
    beside = honest(run, server, seconds, 1000)
    memory.stop()
    note = abusers.stdout.readline().decode().strip()
    abusers.wait()
    pages, uploads, uncached = beside
    kept = pages.rate / alone[0].rate
    run.record("w10", "beside eight abusive accounts", "hot pages, of the rate alone", "x", [kept], "high", note=note)
    for name, result in (("hot pages", pages), ("uploads", uploads), ("other requests", uncached)):
        run.record("w10", "beside eight abusive accounts", name + ", p99", "ms", [result.percentile(0.99) * MS])
    run.record("w10", "beside eight abusive accounts", "memory of all processes, at most", "MB", [memory.most])
    run.record("w10", "beside eight abusive accounts", "disk", "MB", [(disk(server.directory) - before) / 1e6])
    server.kill()


def honest(run, server, seconds, first):
    """Results of a reader of one page, of one uploader, and of one who asks for what is not kept ready."""
    uploads = [load.Task(server.upload_request(small_wheel("honest-%d" % (first + at), "1.0"))) for at in range(200)]
    others = [load.Task(load.get("/root/priv/small?%d" % (first + at), "application/json")) for at in range(20 * seconds)]
    reader, uploader, other = run.generators[:3]
    reader.begin(load.probe, server.port, server.pid, load.get(page("small")), PACE, seconds)
    uploader.begin(load.each, server.port, server.pid, uploads, 1, seconds)
    other.begin(load.each, server.port, server.pid, others, 1, seconds)
    return [generator.result().checked() for generator in (reader, uploader, other)]


class Memory:
    """The most that the server and its children had resident together, looked at ten times a second."""

    def __init__(self, server):
        self.server, self.most, self.ended = server, 0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self):
        while not self.ended.wait(0.1):
            self.most = max(self.most, sum(map(resident, {self.server.pid, *self.server._descendants()})))

    def stop(self):
        self.ended.set()
        self.thread.join()


def resident(pid):
    """MB of a process; 0 if it has ended."""
    try:
        with open("/proc/%d/status" % pid) as file:
            return next((int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS:")), 0)
    except OSError:
        return 0


def disk(directory):
    """Bytes of all files below a directory."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(folder, name))
            except OSError:
                pass
    return total
