"""Runs the test files of a folder in pytest processes side by side, for most tests wait more than they work.

    python tests/in_parallel.py [--folder F] [--workers N] [--again] [pytest's arguments]

`--again`: a file that failed runs once more when all others are done, as CPython's own test runner does it for its build
machines; what failed at first is shown all the same.  Exit status 0 if all pass.  What a run says is shown when it is done;
of one that passed, its last line.
"""

import argparse
import collections
import os
import pathlib
import py_compile
import queue
import re
import subprocess
import sys
import tempfile
import threading

NOTHING_COLLECTED = 5       # pytest's exit status, for which an argument like -k is enough

TESTS = pathlib.Path(__file__).resolve().parent

# These take more than 10 s, so they start before the others.
SLOW = ("test_mirror test_contract_resilience test_resilience test_shares test_mirror_files test_commands test_client_resilience "
        "test_client_upload test_client_connection test_archives test_push test_durability test_triggers test_import_dumps "
        "test_devpi_dumps test_replica_day test_balancer").split()


class Run:
    """One pytest process for one file."""

    def __init__(self, path, arguments):
        self.path = path
        command = [sys.executable, "-m", "pytest", "-q", "--rootdir=.", "-p", "no:cacheprovider", str(path), *arguments]
        self.process = subprocess.Popen(command, cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def finish(self):
        """Waits for its end and shows what it said."""
        output = self.process.communicate()[0].decode(errors="replace")
        self.last_line = output.rstrip().rpartition("\n")[2]
        print("%s: %s" % (self.path.name, "\n" + output if self.failed else self.last_line), flush=True)

    @property
    def failed(self):
        return self.process.returncode not in (0, NOTHING_COLLECTED)


def side_by_side(paths, arguments, workers):
    """The finished runs of these files, `workers` of them at a time."""
    waiting, runs = queue.SimpleQueue(), []
    for path in paths:
        waiting.put(path)

    def work():
        while True:
            try:
                path = waiting.get_nowait()
            except queue.Empty:
                return
            run = Run(path, arguments)
            runs.append(run)
            run.finish()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--folder", type=pathlib.Path, default=TESTS)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="run a file that failed once more")
    options, arguments = parser.parse_known_args()
    paths = sorted(options.folder.resolve().glob("test_*.py"), reverse=True,
                   key=lambda path: (path.stem in SLOW, path.stat().st_size))      # the large ones take longer, roughly
    with tempfile.TemporaryDirectory(prefix="devpi_lite-") as folder:
        compile_modules(folder)
        runs = {run.path: run for run in side_by_side(paths, arguments, options.workers)}
        unsteady = [path for path, run in runs.items() if run.failed] if options.again else []
        if unsteady:
            print("once more: %s" % ", ".join(path.name for path in unsteady), flush=True)
            runs.update((run.path, run) for run in side_by_side(unsteady, arguments, 1))
            unsteady = [path for path in unsteady if not runs[path].failed]
    counts = collections.Counter()
    for run in runs.values():
        for count, what in re.findall(r"(\d+) (passed|failed|error)", run.last_line):
            counts[what] += int(count)
    if unsteady:
        print("FAILED AT FIRST, passed when run again: %s" % ", ".join(path.name for path in unsteady))
    print("%d passed, %d failed" % (counts["passed"], counts["failed"] + counts["error"]))
    statuses = {run.process.returncode for run in runs.values()}
    return max(statuses - {NOTHING_COLLECTED}, default=NOTHING_COLLECTED)


if __name__ == "__main__":
    sys.exit(main())
