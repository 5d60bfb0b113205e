"""Runs the test files in pytest processes side by side, WORKERS at a time, for most tests wait more than they work.

Arguments go to each of them, after the file. Exit status 0 if all pass. What a run says is shown when it is done; of one
that passed, its last line.
"""

import pathlib
import queue
import re
import subprocess
import sys
import threading

WORKERS = 3
NOTHING_COLLECTED = 5       # pytest's exit status, for which an argument like -k is enough

TESTS = pathlib.Path(__file__).resolve().parent


def main(arguments):
    files = queue.SimpleQueue()
    for path in sorted(TESTS.glob("test_*.py"), key=lambda path: path.stat().st_size, reverse=True):
        files.put(path)     # the large ones first: they take longest, roughly
    runs, statuses, counts, lock = set(), [], {"passed": 0, "failed": 0, "error": 0}, threading.Lock()

    def work():
        while True:
            try:
                path = files.get_nowait()
            except queue.Empty:
                return
            command = [sys.executable, "-m", "pytest", "-q", "--rootdir=.", "-p", "no:cacheprovider", str(path), *arguments]
            run = subprocess.Popen(command, cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            runs.add(run)
            output = run.communicate()[0].decode(errors="replace")
            with lock:
                statuses.append(run.returncode)
                last = output.rstrip().rpartition("\n")[2]
                for count, what in re.findall(r"(\d+) (passed|failed|error)", last):
                    counts[what] += int(count)
                print("%s: %s" % (path.name, last if run.returncode in (0, NOTHING_COLLECTED) else "\n" + output), flush=True)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    finally:
        for run in runs:
            if run.poll() is None:      # interrupted: pytest stops the servers that it started
                run.terminate()
                run.wait(30)
    print("%d passed, %d failed" % (counts["passed"], counts["failed"] + counts["error"]))
    if set(statuses) == {NOTHING_COLLECTED}:
        return NOTHING_COLLECTED
    return max(status for status in statuses if status != NOTHING_COLLECTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
