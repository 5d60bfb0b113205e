"""w12, the peer: export and import beside devpi-export and devpi-import of a real devpi-server, on the same files."""

import os
import shutil

from run import middle
from upkeep import FILE_SIZE, PER_PROJECT, Desk, fill


def w12(run):
    """Export and import against devpi-export and devpi-import on the same files; only with --devpi."""
    count = run.size(2000, 400) if run.devpi_files is None else run.devpi_files
    server = run.started_server()
    fill(run, server, count)
    server.settle()
    server.stop()
    desk = Desk(run, server)
    theirs, their_dump = desk.place("devpi"), desk.place("devpi-dump")
    program = [desk.program.python, desk.program.script]

    def devpi(name, *words):
        return [os.path.join(run.devpi, "bin", "devpi-" + name), "--serverdir", theirs, *words]

    def measured(command, made):
        """(seconds, CPU seconds) in each round, what it makes having been removed before."""
        took = []
        for _ in range(run.rounds):
            shutil.rmtree(made, ignore_errors=True)
            os.sync()
            seconds, _ = desk.took(command)
            took.append((seconds, desk.cpu))
        return took

    case = "%d files of %d KB in %d projects" % (count, FILE_SIZE // 1000, count // PER_PROJECT)
    took = {
        "export": measured(program + ["export", desk.place("dump"), "--serverdir", server.directory], desk.place("dump")),
        "devpi-import": measured(devpi("import", "--no-root-pypi", desk.place("dump")), theirs),
        "devpi-export": measured(devpi("export", their_dump), their_dump),
        "import": measured(program + ["import", their_dump, "--serverdir", desk.place("ours")], desk.place("ours")),
    }
    for name in ("export", "devpi-export", "import", "devpi-import"):
        run.record("w12", case, name, "s", [seconds for seconds, _ in took[name]])
        run.record("w12", case, name + ", CPU", "s", [cpu for _, cpu in took[name]])
        run.record("w12", case, name + ", files in a second", "/s", [count / seconds for seconds, _ in took[name]], "high")
    for name in ("export", "import"):
        for at, what in enumerate(("times as fast as devpi's", "CPU of devpi's to ours")):
            peer = middle([each[at] for each in took["devpi-" + name]])
            run.record("w12", case, "%s, %s" % (name, what), "x", [peer / each[at] for each in took[name]], "high")
