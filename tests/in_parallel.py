"""Runs the test files of a folder in pytest processes side by side, for most tests wait more than they work.

A process takes several files, for what it starts with is a second's work; the last ones take a single file each, so that all
are done at about the same time.

    python tests/in_parallel.py [--folder F] [--workers N] [--again] [pytest's arguments]

`--again`: a file that failed runs once more when all others are done, as CPython's own test runner does it for its build
machines; what failed at first is shown all the same.  Exit status 0 if all pass.  What a run says is shown when it is done;
of one that passed, its last line.
"""

import argparse
import os
import pathlib
import py_compile
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading

NOTHING_COLLECTED = 5       # pytest's exit status, for which an argument like -k is enough

TESTS = pathlib.Path(__file__).resolve().parent

# What a file takes on two cores, in seconds, roughly; one that is not named takes USUAL.
SECONDS = dict(re.findall(r"(\w+)=(\d+)", """
    failover=37 replay=35 backup=32 mirror=26 import_refusals=26 commands=26 replica_files=23 replica_faults=22
    simulator=20 resilience=20 replica_hosts=19 contract_resilience=19 shares=16 replica_secrets=16
    replica_digests=15 durability=15 archives=15 client_connection=13 store=12 status=12 replica_status=12
    import=12 client_upload=12 client_resilience=12 additions=12 replica_reads=11 push=11 mirror_files=11 gc=10
    fsck=10 client_listing=10 uploads=9 search=9 replicas=9 replica_medium=9 export=9 devpi_passwords=9
    client_install=9 visibility=8 triggers=8 replay_refusals=8 removal=8 pypi_json=8 project_lists=8 offline=8
    import_dumps=8 http=8 docs=8 cut_off=8 coherence=8 client_test=8 client_errors=8 devpi_dumps=60
    replica_day=60 balancer=60 every_page=60 hostile_pages=18 pages_of_server=14 pages=9 downloads=8 relations=8
    web_actions=7 inside_archives=6 manual=6 doc_viewer=6 descriptions=6
"""))
USUAL = 5
ENOUGH = 40     # for one process
WORKERS = min(2 * (os.cpu_count() or 1), 8)

MEMORY = "/dev/shm"     # where Linux has files without a disk: syncing them takes no time
ROOM = 4 << 30          # that tests may need there


class Run:
    """One pytest process for some files."""

    def __init__(self, paths, arguments, folder):
        self.paths, self.folder = paths, folder
        command = [sys.executable, "-m", "pytest", "-q", "--rootdir=.", "-p", "no:cacheprovider", *map(str, paths), *arguments]
        if folder:
            command.append("--basetemp=%s" % folder)
        self.process = subprocess.Popen(command, cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def finish(self):
        """Waits for its end and shows what it said."""
        self.output = self.process.communicate()[0].decode(errors="replace")
        self.last_line = self.output.rstrip().rpartition("\n")[2]
        names = " ".join(path.stem.replace("test_", "", 1) for path in self.paths)
        print("%s: %s" % (names, "\n" + self.output if self.failed else self.last_line), flush=True)
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def failed(self):
        return self.process.returncode not in (0, NOTHING_COLLECTED)

    @property
    def failed_paths(self):
        """The files in which something failed; all of them if pytest itself did."""
        names = set(re.findall(r"^(?:FAILED|ERROR) (?:.*/)?(test_\w+\.py)", self.output, re.MULTILINE))
        return [path for path in self.paths if path.name in names] or (self.paths if self.failed else [])

    def count(self, *what):
        return sum(int(count) for word in what for count in re.findall(r"(\d+) %s" % word, self.last_line))


def seconds(path):
    return int(SECONDS.get(path.stem.replace("test_", "", 1), USUAL))


def side_by_side(paths, arguments, workers, folder=None, enough=0):
    """The finished runs of these files, `workers` of them at a time, each of files that take `enough` seconds together.

    The longest come first. Their temporary files are in `folder`, if one is given.
    """
    waiting, runs, lock = sorted(paths, key=seconds, reverse=True), [], threading.Lock()

    def some():
        with lock:
            bound, taken = min(enough, sum(map(seconds, waiting)) / (2 * workers)), waiting[:1]
            del waiting[:1]
            while waiting and sum(map(seconds, taken + waiting[:1])) <= bound:
                taken.append(waiting.pop(0))
            if taken:
                runs.append(Run(taken, arguments, folder and os.path.join(tempfile.mkdtemp(dir=folder), "t")))
            return runs[-1] if taken else None

    def work():
        run = some()
        while run:
            run.finish()
            run = some()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        with lock:
            waiting.clear()
        for run in runs:
            if run.process.poll() is None:      # interrupted: pytest stops the servers that it started
                run.process.terminate()
                run.process.wait(30)
    return runs


def compile_modules(folder):
    """Compiles the project's modules, once for all files: harness.compiled() takes them from there."""
    for path in TESTS.parent.glob("*.py"):
        py_compile.compile(str(path), os.path.join(folder, path.stem + ".pyc"), doraise=True)
    os.environ["DEVPI_LITE_BYTECODE"] = folder


def folder_in_memory():
    """A folder for what the tests write that is on no disk; None where there is none, or no room."""
    try:
        if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM:
            folder = tempfile.mkdtemp(prefix="devpi_lite-", dir=MEMORY)
            os.chmod(folder, 0o1777)        # like /tmp: some tests start commands as another user
            return folder
    except OSError:
        pass        # no such place, as on macOS
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--folder", type=pathlib.Path, default=TESTS)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--again", action="store_true", help="run a file that failed once more")
    options, arguments = parser.parse_known_args()
    folder, paths = options.folder.resolve(), sorted(options.folder.resolve().glob("test_*.py"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # as Ctrl-C: what is begun is ended, and cleared away
    place = folder_in_memory() if folder == TESTS else None
    if place:
        os.environ["TMPDIR"] = place
    try:
        with tempfile.TemporaryDirectory(prefix="devpi_lite-") as bytecode:
            compile_modules(bytecode)
            runs = side_by_side(paths, arguments, options.workers, place, ENOUGH if folder == TESTS else 0)
            first = [path for run in runs for path in run.failed_paths]
            again = []
            if first and options.again:
                print("once more: %s" % ", ".join(path.name for path in first), flush=True)
                again = side_by_side(first, arguments, 1, place)
    finally:
        if place:
            shutil.rmtree(place, ignore_errors=True)
    last = [run for run in runs if not run.failed] + again if again else runs
    unsteady = sorted(set(first) - {path for run in last for path in run.failed_paths}) if again else []
    if unsteady:
        print("FAILED AT FIRST, passed when run again: %s" % ", ".join(path.name for path in unsteady))
    total = sum(run.count("passed", "failed", "error") for run in runs)
    failed = sum(run.count("failed", "error") for run in last)
    print("%d passed, %d failed" % (total - failed, failed))
    statuses = {run.process.returncode for run in last}
    return max(statuses - {NOTHING_COLLECTED}, default=NOTHING_COLLECTED)


if __name__ == "__main__":
    sys.exit(main())
