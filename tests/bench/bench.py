#!/usr/bin/env python3
"""The benchmark of devpi_lite: how fast it serves, mirrors, takes uploads and starts on this machine, against nothing but itself.

    python3 tests/bench/bench.py                          everything, three rounds, half an hour
    python3 tests/bench/bench.py --quick                  smaller counts, one round, under two minutes
    python3 tests/bench/bench.py --workloads w1,w6
    python3 tests/bench/bench.py --workloads w12 --devpi .interop/devpi-server     beside the real devpi-export and devpi-import
    python3 tests/bench/bench.py --save tests/bench/baseline.jsonl
    python3 tests/bench/bench.py --compare FILE --strict

Prints a table, a figure a line: its median over the rounds, their least and most, and its target (`targets`). Targets that
are missed are named at the end, and make the exit status 1; --quick leaves out those that smaller counts say nothing of.
"CPU" is the CPU time of the server as the operating system counts it; on a busy machine trust it before
any rate, and look at "machine", the CPU time of a fixed piece of work before each workload: where that is spread, so is
all else. A baseline is compared with if there is one: what is worse than its spread and by over 10 % is named.
Everything runs on 127.0.0.1 under one temporary directory ($TMPDIR), and ends with it; only the replicas that w13 compares uploads
with have theirs in /dev/shm. Linux only (/proc, epoll).

The modules: `load` (the load generators), `server` (the server under test), `upstream` (a fake PyPI),
`run` (what workloads share), `pages`, `mirrors`, `uploads`, `whole`, `shares`, `upkeep`, `followers`, `webpages`,
`million` (the work), `bare` (what a page is measured against), `targets`, `report` (figures, table, comparison).
"""

import argparse
import hashlib
import os
import platform
import resource
import signal
import subprocess
import sys
import time

import report
from load import LoadError
from run import Run, fixed_work, say
from mirrors import w5, w7
from pages import w1, w2, w3, w4
from followers import w13
from million import w15
from peer import w12
from shares import w10
from upkeep import w11
from targets import unmeasured
from uploads import w6
from webpages import w14
from whole import mixed, w9

ALL = {"w1": w1, "w2": w2, "w3": w3, "w4": w4, "w5": w5, "w6": w6, "w7": w7, "w9": w9, "mixed": mixed, "w10": w10, "w11": w11, "w12": w12, "w13": w13,
       "w14": w14, "w15": w15}
HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, os.pardir, os.pardir, "devpi_lite.py")
BASELINE = os.path.join(HERE, "baseline.jsonl")


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(ALL), help="comma-separated; default: %(default)s")
    parser.add_argument("--rounds", type=int, help="how often each is measured; default: 3, with --quick 1")
    parser.add_argument("--quick", action="store_true", help="smaller counts, shorter spans")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON lines")
    parser.add_argument("--save", metavar="FILE", help="write them as a baseline for later runs")
    parser.add_argument("--compare", metavar="FILE", help="the baseline; default: %s, if it is there" % BASELINE)
    parser.add_argument("--strict", action="store_true", help="exit status 1 if anything got worse")
    parser.add_argument("--devpi", metavar="ENV", help="a virtual environment with devpi-server 6, for w12, which is left out without")
    parser.add_argument("--devpi-files", metavar="N", type=int, help="how many files w12 exports and imports; default: 2000")
    parser.add_argument("--script", default=SCRIPT, help="the devpi_lite.py to measure")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that runs it")
    options = parser.parse_args(arguments)
    if options.workloads == "w12" and not options.devpi:
        parser.error("w12 needs --devpi ENV")
    options.workloads = [name for name in options.workloads.split(",") if options.devpi or name != "w12"]
    if options.devpi and not os.path.isfile(os.path.join(options.devpi, "bin", "devpi-export")):
        parser.error("--devpi: no devpi-export in %s" % os.path.join(options.devpi, "bin"))
    unknown = [name for name in options.workloads if name not in ALL]
    if unknown:
        parser.error("no such workload: %s (there are %s)" % (", ".join(unknown), ", ".join(ALL)))
    if options.rounds is None:
        options.rounds = 1 if options.quick else 3
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    if options.compare and not os.path.isfile(options.compare):
        parser.error("--compare: no such file: %s" % options.compare)
    if options.compare is None and os.path.exists(BASELINE):
        options.compare = BASELINE
    return options


def about(options):
    """What was run on what: enough to know whether two runs can be compared."""
    version = subprocess.run(
        [options.python, "-c", "import platform; print(platform.python_version())"], stdout=subprocess.PIPE, check=True
    )
    with open(options.script, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()[:12]
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "python": version.stdout.decode().strip(),
        "script": digest,
        "machine": "%s %s" % (platform.system(), platform.machine()),
        "cpus": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "quick": options.quick,
        "rounds": options.rounds,
    }


def measure(options):
    """(figures, workloads that were done, texts of what went wrong). Whatever happens, nothing that it started is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    troubles, speeds = [], []
    run = Run(options.script, options.python, options.rounds, options.quick)
    run.devpi, run.devpi_files = options.devpi and os.path.abspath(options.devpi), options.devpi_files
    try:
        run.open()
        for name in [name for name in ALL if name in options.workloads]:
            began = time.monotonic()
            speeds.append(fixed_work())
            say("%s: %s" % (name, ALL[name].__doc__.strip().splitlines()[0]))
            try:
                ALL[name](run)
                run.done.append(name)
            except (LoadError, RuntimeError, OSError) as error:
                troubles.append("%s: %s" % (name, error))
                say("FAILED " + troubles[-1])
            say("%s: %.0f s" % (name, time.monotonic() - began))
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # cleaning up is not cut short
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        run.close()
    run.record("machine", "fixed work of the benchmark itself", "CPU", "ms", speeds)
    return run.figures, run.done, troubles


def main():
    options = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    facts = about(options)
    print("devpi_lite %(script)s, Python %(python)s, %(cpus)d CPUs, load %(load)s, %(rounds)d rounds" % facts)
    if facts["load"] > 0.5:
        say("this machine is busy (load %(load)s): trust CPU times before rates and latencies" % facts)
    began = time.monotonic()
    try:
        figures, done, troubles = measure(options)
    except KeyboardInterrupt:
        return 130
    print(report.table([figure.row() for figure in figures]))
    lines, failures = report.missed(figures)
    print("%d figures, %d miss their target, %.0f s" % (len(figures), len(lines), time.monotonic() - began))
    for line in lines + ["  UNMEASURED  " + text for text in unmeasured(figures, done, options.quick)]:
        print(line)
    for path in filter(None, (options.json, options.save)):
        report.write(path, facts, figures)
    worse = 0
    if options.compare and options.compare != options.save:
        lines, worse = report.compare(figures, options.compare, facts)
        print("\n".join(lines))
    for trouble in troubles:
        print("FAILED " + trouble)
    return 2 if troubles else 1 if failures or worse and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
