"""w11, upkeep: export, import, backup and fsck, against what copying, hashing and syncing the same files takes, and what hot pages keep beside them."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import archives
import load
from run import joined, middle, page, releases

FILE_SIZE = 50000
PER_PROJECT = 20

# Runs its words, and prints what that took. A process of its own, as what is started from a large one counts that one's memory.
RUNNER = """
import json, os, sys, time
began = time.perf_counter()
pid = os.fork()
if not pid:
    os.execv(sys.argv[1], sys.argv[1:])
_, status, used = os.wait4(pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status) if hasattr(os, "waitstatus_to_exitcode") else status,
                  time.perf_counter() - began, used.ru_maxrss / 1024, used.ru_utime + used.ru_stime]))
"""
COPIED = 'cp -r "$1" "$2" && find "$2" -type f -exec sha256sum {} + > "$3" && sync'


def w11(run):
    """Export, import, backup and fsck: their time against cp, sha256sum and sync, their memory, and hot pages beside them."""
    count = run.size(20000, 2000)
    server = run.started_server()
    server.fill(run.generator, releases("small", 5))
    fill(run, server, count)
    server.settle()
    desk = Desk(run, server)
    case = "%d files of %d KB in %d projects" % (count, FILE_SIZE // 1000, count // PER_PROJECT)
    bare = min(desk.took([run.program.python, "-c", "pass"])[1] for _ in range(3))
    copied = [desk.copied() for _ in range(run.rounds)]
    starts = [desk.took([run.program.python, run.program.script, "--version"])[0] for _ in range(run.rounds)]
    run.record("w11", case, "cp, sha256sum and sync", "s", copied)
    run.record("w11", case, "start of a command, which all figures hold", "s", starts)

    for name in desk.known():
        measured = [desk.run_once(name) for _ in range(run.rounds)]
        took, peaks = [seconds for seconds, _ in measured], [peak - bare for _, peak in measured]
        run.record("w11", case, name, "s", took)
        run.record("w11", case, name + ", of cp, sha256sum, sync", "x", [each / middle(copied) for each in took])
        run.record("w11", case, name + ", peak over the interpreter", "MB", peaks)

    request = load.get(page("small"))
    for name in desk.known():
        kept, p99 = [], []
        for _ in range(run.rounds):
            alone, beside = [], []
            for _ in range(3):      # in turn, so that a busy moment of the machine hits both
                alone.append(run.hot(server, request, 16, desk.span / 3))
                with desk.going_on(name):
                    beside.append(run.hot(server, request, 16, desk.span / 3))
            kept.append(joined(beside).rate / joined(alone).rate)
            p99.append(joined(beside).percentile(0.99) * 1000)
        run.record("w11", case, "hot rate beside %s, of the rate alone" % name, "x", kept, "high")
        run.record("w11", case, "hot p99 beside %s" % name, "ms", p99)
    server.stop()


def fill(run, server, count):
    """Uploads that many wheels that do not compress."""
    for start in range(0, count, 200):
        wheels = [archives.wheel("upkeep-%d" % (at // PER_PROJECT), "1.%d" % (at % PER_PROJECT), size=FILE_SIZE)
                  for at in range(start, min(start + 200, count))]
        tasks = [load.Task(server.upload_request(wheel)) for wheel in wheels]
        run.generator.run(load.each, server.port, server.pid, tasks, 16).checked()


class Desk:
    """Runs commands on the directory of a server, and clears away what they make."""

    def __init__(self, run, server):
        self.program, self.directory, self.span = run.program, server.directory, run.size(6, 1)
        self.folder, self.there = server.directory + "-upkeep", None
        self.cpu = 0    # seconds of the last command, in all its processes
        os.mkdir(self.folder)

    def place(self, name):
        return os.path.join(self.folder, name)

    def clear(self, name):
        shutil.rmtree(self.place(name), ignore_errors=True)

    def known(self):
        """Those of the commands that the program has; an older one may lack some."""
        if self.there is None:
            printed = subprocess.run([self.program.python, self.program.script, "--help"], stdout=subprocess.PIPE, check=True)
            listed = printed.stdout.decode().partition("commands (as first word):")[2]
            self.there = set(re.findall("[a-z-]+", listed))
        return [name for name in ("export", "import", "backup", "second backup", "fsck") if self.words(name)[0] in self.there]

    def words(self, name):
        """The command line of one; an import has a directory of its own, all others the server's."""
        own = ["--serverdir", self.directory]
        return {
            "export": ["export", self.place("dump")] + own,
            "import": ["import", self.place("dump"), "--serverdir", self.place("imported")],
            "backup": ["backup", self.place("backup")] + own,
            "second backup": ["backup", self.place("backup")] + own,
            "fsck": ["fsck"] + own,
        }[name]

    def prepare(self, name):
        """Makes what the command reads, and removes what it makes."""
        made = {"export": "dump", "import": "imported", "backup": "backup"}.get(name)
        if made:
            self.clear(made)
        if name == "import" and not os.path.exists(self.place("dump")):
            self.execute("export")
        if name == "second backup" and not os.path.exists(self.place("backup")):
            self.execute("backup")

    def execute(self, name):
        """(seconds, peak in MB)."""
        return self.took([self.program.python, self.program.script] + self.words(name))

    def run_once(self, name):
        self.prepare(name)
        os.sync()       # what others wrote is not its work
        return self.execute(name)

    def took(self, command):
        """(seconds, peak in MB) of a command. LoadError unless it ends well."""
        runner = subprocess.run([sys.executable, "-S", "-E", "-c", RUNNER] + command, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        lines = runner.stdout.decode().splitlines()
        status, seconds, peak, self.cpu = json.loads(lines[-1]) if lines else (runner.returncode, 0, 0, 0)
        if status != 0:
            raise load.LoadError("%s ends with %s: %s" % (" ".join(command[2:4]), status, runner.stderr.decode()[-500:]))
        return seconds, peak

    def copied(self):
        """The seconds of cp, sha256sum and sync."""
        self.clear("copy")
        os.sync()
        seconds, _ = self.took(["/bin/sh", "-c", COPIED, "sh", os.path.join(self.directory, "files"), self.place("copy"),
                                self.place("sums")])
        self.clear("copy")
        return seconds

    def going_on(self, name):
        """A `with` in which a command runs, again if it ends."""
        return GoingOn(self, name)


class GoingOn:
    def __init__(self, desk, name):
        self.desk, self.name, self.is_over, self.error = desk, name, threading.Event(), None
        self.thread = threading.Thread(target=self.repeat)

    def repeat(self):
        try:
            while not self.is_over.is_set():
                self.desk.run_once(self.name)
        except (load.LoadError, OSError) as error:
            self.error = error

    def __enter__(self):
        self.desk.prepare(self.name)
        self.thread.start()
        time.sleep(0.2)

    def __exit__(self, *_):
        self.is_over.set()
        self.thread.join()
        if self.error:
            raise load.LoadError("%s, repeated: %s" % (self.name, self.error))
