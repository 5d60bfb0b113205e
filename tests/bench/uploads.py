"""w6: uploads."""

import load
from run import MS, generator_note, ratio, releases
from server import small_wheel


def w6(run):
    """Uploads of small wheels: of new projects, one and four at a time; with a password; and many of one project."""
    server, count = run.started_server(), run.size(300, 100)
    kinds = [("one after the other, token", 1, False), ("four at a time, token", 4, False)]
    kinds += [("one after the other, password", 1, True)]
    results = {name: [] for name, _, _ in kinds}
    upload(run, server, [("first", "1.0")], 1, password=True)  # a password is hashed at its first sight
    for at in range(run.rounds):
        for kind, (name, parallel, password) in enumerate(kinds):
            names = [("up%d-%d-%d" % (kind, at, each), "1.0") for each in range(count)]
            results[name].append(upload(run, server, names, parallel, password))
    for name, measured in results.items():
        record_uploads(run, "new projects, " + name, measured)
    rates = {name: [result.rate for result in measured] for name, measured in results.items()}
    compared = ratio(rates["one after the other, password"], rates["one after the other, token"])
    run.record("w6", "new projects, one after the other", "rate, password against token", "x", compared, "high")
    late_uploads(run, server, run.size(2000, 400))
    server.stop()


def late_uploads(run, server, count):
    """The last releases of one project against the first: by CPU and by their median latency."""
    part = count // 10
    first, last = [], []
    for at in range(run.rounds):
        versions = releases("one-%d" % at, count)
        first.append(upload(run, server, versions[:part], 1))
        server.fill(run.generator, versions[part:-part])
        last.append(upload(run, server, versions[-part:], 1))
    record_uploads(run, "one project, the last %d of %d releases" % (part, count), last)
    case = "one project, the last %d of %d releases against the first" % (part, count)
    cpu = ratio([result.cpu_each for result in last], [result.cpu_each for result in first])
    run.record("w6", case, "CPU each", "x", cpu)
    p50 = ratio([result.percentile(0.5) for result in last], [result.percentile(0.5) for result in first])
    run.record("w6", case, "p50", "x", p50)


def upload(run, server, names, parallel, password=False):
    tasks = [
        load.Task(server.upload_request(small_wheel(project, version), password=password))
        for project, version in names
    ]
    server.settle()
    return run.generator.run(load.each, server.port, server.pid, tasks, parallel).checked()


def record_uploads(run, case, results):
    rates = [result.rate for result in results]
    run.record("w6", case, "rate", "uploads/s", rates, "high", note=generator_note(results))
    run.record("w6", case, "CPU each", "ms", [result.cpu_each * MS for result in results])
    run.record_latency("w6", case, results)
