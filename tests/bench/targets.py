"""The targets: what each figure may be at most, or has to be at least, in one table.

Times and rates depend on the machine, so most targets compare with something measured in the same run, or count CPU with
much room; the page's own CPU is bounded by that of a bare loop (`bare`).
"""

import fnmatch
import typing


class Target(typing.NamedTuple):
    """`case` and `figure` are patterns; `bound` is in `unit`, at least if the figure's better is "high", else at most.

    `is_full`: smaller counts say nothing of it, so --quick leaves it out. `open_`: why it is not reached yet; then it is
    named, but is no failure.
    """

    workload: str
    case: str
    figure: str
    unit: str
    bound: float
    is_full: bool = False
    open_: str = ""


FULL = {"is_full": True}

TARGETS = (
    # 10 us where a bare loop takes 5.7; 1.63 before what a log line says was kept with the page, 1.36 to 1.54 now
    Target("w1", "small page, c16", "CPU each, of a bare loop", "x", 1.75),
    Target("w1", "small page, c16, * idle beside", "rate against none idle", "x", 0.9, **FULL),
    Target("w1", "small page, c16, * idle beside", "CPU against none idle", "x", 1.1, **FULL),
    Target("w2", "page of * files, *", "CPU first after a change", "ms", 20),
    Target("w2", "* releases against *", "*: CPU a release", "x", 1.2),
    Target("w3", "project *, c16", "CPU against a page without bases", "x", 1.1),
    Target("w3", "project of all four", "CPU first after a change", "ms", 2),
    Target("w4", "* MB file, c1", "CPU a GB", "s", 0.2),
    Target("w4", "* MB file, c1", "memory growth, peak", "MB", 5),
    Target("w5", "page of * files, *", "cold, wall", "ms", 55, **FULL),
    Target("w5", "*", "cold, wall against the latency floor", "x", 1.6, **FULL),
    Target("w5", "*", "cold, upstream requests a project", "", 2.01),
    Target("w5", "*", "cold, upstream connections", "", 9),
    Target("w5", "*", "hot, CPU for all", "s", 0.05),
    Target("w5", "*", "upstream down, CPU for all", "s", 0.05),
    Target("w5", "*", "*, errors", "", 0),
    Target("w6", "new projects, one after the other", "rate, password against token", "x", 0.9, **FULL),
    Target("w6", "one project, the last * against the first", "*", "x", 1.2, **FULL),
    Target("w7", "list of * names", "first, wall", "s", 3),
    Target("w7", "list of * names", "hot, wall", "s", 0.1),
    Target("w7", "list of * names", "hot, first byte", "ms", 10),
    Target("w7", "list of * names", "memory growth", "MB", 80),
    Target("w7", "list of * names", "*, slowest", "ms", 30, **FULL),
    Target("w9", "after w1 to w5", "memory", "MB", 60, open_="110 MB: kept pages, some of 10,000 releases"),
    Target("w9", "*", "start, CPU to the first answer", "s", 0.25, open_="Python compiles the file: 0.5 to 0.7 s"),
    Target("w9", "*", "idle memory", "MB", 20, open_="30 to 35 MB: the code of all pages"),
    Target("mixed", "64 connections beside *", "p99", "ms", 5, open_="two processors for seven processes: 6 to 13 ms"),
    Target("w10", "beside eight abusive accounts", "hot pages, of the rate alone", "x", 0.8, open_="0.5 on two processors"),
    Target("w10", "beside eight abusive accounts", "*, p99", "ms", 300),
    Target("w10", "beside eight abusive accounts", "memory of all processes, at most", "MB", 700),
    # of the time that cp, sha256sum and sync take for the same files; a second backup mostly starts Python
    Target("w11", "*", "export, of cp, sha256sum, sync", "x", 1.25, True, "1.1 to 1.4"),
    Target("w11", "*", "import, of cp, sha256sum, sync", "x", 1.25, True, "1.3 to 1.7: three rows a file are written"),
    Target("w11", "*", "backup, of cp, sha256sum, sync", "x", 1.25, **FULL),
    Target("w11", "*", "fsck, of cp, sha256sum, sync", "x", 1.25, **FULL),
    Target("w11", "*", "*, peak over the interpreter", "MB", 100, open_="Python compiles the file: 120 MB"),
    # an import goes into another directory: nobody has to do that beside a server
    Target("w11", "*", "hot rate beside [!i]*, of the rate alone", "x", 0.7, True, "0.5 to 0.9 on two processors"),
    Target("w12", "*", "*, times as fast as devpi's", "x", 10, **FULL),
    Target("w13", "fresh replica, *", "CPU of the *, a file", "ms", 2),
    Target("w13", "fresh replica, *", "of rsync and sync", "x", 1.5, **FULL),
    Target("w13", "* uploads, one after the other", "readable on the replica, p50", "ms", 50),
    Target("w13", "idle replica, *", "CPU, of a core", "%", 0.5),
    Target("w13", "hot page of the replica", "CPU each, of the primary's", "x", 1.1),
    Target("w13", "uploads, four at a time, with four replicas", "rate, of the rate alone", "x", 0.9),
    Target("w13", "*", "files a second of ours, of devpi's", "x", 20, True, "13: the replica's syncs are the bound"),
    Target("w14", "* projects", "CPU first, *", "ms", 50, **FULL),
    Target("w14", "* projects", "CPU each, *, of a simple page's", "x", 1.11),
    Target("w14", "* projects and * names", "CPU of a search, *", "ms", 20, **FULL),
    Target("w15", "* files, of 1000", "start, CPU beyond", "s", 0.5),
    Target("w15", "* files, of 1000", "idle memory, PSS", "x", 1.15),
    Target("w15", "* files, of 1000", "*, CPU", "x", 1.15, **FULL),
)


def target_of(workload, case, figure, unit, is_quick):
    """The Target of a figure, or None."""
    for target in TARGETS:
        if (target.workload, target.unit) == (workload, unit) and not (is_quick and target.is_full) \
                and fnmatch.fnmatchcase(case, target.case) and fnmatch.fnmatchcase(figure, target.figure):
            return target
    return None


def unmeasured(figures, workloads, is_quick):
    """Texts of the targets of these workloads that no figure has: something was not there, or a name was changed."""
    met = {figure.target for figure in figures}
    return [
        ", ".join(target[:3])
        for target in TARGETS
        if target.workload in workloads and target not in met and not (is_quick and target.is_full)
    ]
