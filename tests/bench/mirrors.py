"""w5 and w7: what a mirror fetches, and its list of names."""

import time

import load
from report import number
from run import MS, middle, page, releases
from upstream import JSON

LINK = r'<a [^>]*?href="([^"]+)"'  # of the first file on a page


def w5(run):
    """A mirror of an upstream 20 ms away: the page and one file (or its metadata) of 200 projects, 8 at a time.

    Cold, again, hot (the third time), and with upstream gone. Each round has a new upstream and a new mirror
    on the same server. Then long pages, cold.
    """
    server, count, latency, parallel = run.farm, run.size(200, 100), 20, 8
    case = "%d projects, upstream %d ms away, 8 at a time" % (count, latency)
    cold, again, hot, down, counts = [], [], [], [], []
    for at in range(run.rounds):
        upstream = run.upstream("cold%d" % at, count, latency=latency)
        index = "cold%d" % at
        server.add_mirror(index, upstream)
        tasks = mirror_tasks(upstream.projects, index)
        for results in (cold, again, hot, down):
            if results is down:
                upstream.kill()
            server.settle()
            results.append(run.generator.run(load.each, server.port, server.pid, tasks, parallel))
            if results is cold:
                results[-1].checked()
                counts.append(upstream.counts())
        if at == 0:
            run.memory_after_w5 = server.memory()
    floor = count * 2 * latency / MS / parallel
    seconds = [result.seconds for result in cold]
    run.record("w5", case, "cold, wall", "s", seconds, note="floor %s s" % number(floor))
    run.record("w5", case, "cold, wall against the latency floor", "x", [each / floor for each in seconds])
    run.record("w5", case, "cold, CPU a project", "ms", [result.cpu_each * MS for result in cold])
    requests = [sum(each.values()) - each["connections"] for each in counts]
    note = ", ".join("%d %s" % (each, kind) for kind, each in counts[-1].items() if each and kind != "connections")
    run.record("w5", case, "cold, upstream requests a project", "", [each / count for each in requests], note=note)
    run.record("w5", case, "cold, upstream connections", "", [each["connections"] for each in counts])
    for name, results in (("again", again), ("hot", hot), ("upstream down", down)):
        run.record("w5", case, name + ", CPU for all", "s", [result.server_cpu for result in results])
        run.record("w5", case, name + ", wall", "s", [result.seconds for result in results])
        errors = [len(result.errors) for result in results]
        first = next((result.errors[0] for result in results if result.errors), "")
        run.record("w5", case, name + ", errors", "", errors, note=first[:200])
    measure_long_page(run)


def measure_long_page(run):
    """The page of a project of 2,000 files, the first time, as JSON: one after the other."""
    server, count, files, latency = run.farm, 2 * run.rounds + 2, run.size(2000, 500), 20
    upstream = run.upstream("long", count, files=files, latency=latency)
    server.add_mirror("long", upstream)
    wall = []
    for project in upstream.projects:
        server.settle()
        task = load.Task(load.get(page(project, "long"), JSON))
        result = run.generator.run(load.each, server.port, server.pid, [task], 1).checked()
        server.settle()
        wall.append(result.seconds * MS)
    upstream.kill()
    case = "page of %d files, upstream %d ms away" % (files, latency)
    run.record("w5", case, "cold, wall", "ms", wall[2:])


def mirror_tasks(projects, index):
    """For each project its page, then its first file or, for every second one, the metadata of that."""
    return [
        load.Task(load.get(page(project, index)), page(project, index), LINK, ".metadata" if at % 2 else "")
        for at, project in enumerate(projects)
    ]


def w7(run):
    """A mirror's list of 600,000 names: first, hot, and a small page meanwhile. A new server each round."""
    names = run.size(600000, 150000)
    upstream = run.upstream("some", 20, names=names)
    seen = {name: [] for name in ("first", "first cpu", "hot", "hot cpu", "byte", "json", "grown", "peak")}
    probes = {"first fetch": [], "hot list": []}
    small_cold = []
    for _ in range(run.rounds):
        server = run.started_server()
        server.add_mirror("mirror", upstream)
        server.fill(run.generator, releases("small", 5))
        small, list_request = load.get(page("small")), load.get("/root/mirror/+simple/")
        time.sleep(1.5)  # what start-up freed is given back a little later
        server.settle()
        before, cpu = server.memory(), server.cpu()
        generator = run.generators[1].begin(load.each, server.port, server.pid, [load.Task(list_request)], 1)
        probes["first fetch"].append(load.probe(server.port, server.pid, small, 0.002, until=generator.is_done))
        first = generator.result().checked()
        if first.received < names * 20:
            raise load.LoadError("the first list has %d bytes: not all names" % first.received)
        seen["first"].append(first.seconds)
        seen["first cpu"].append(server.cpu() - cpu)
        measure_hot_list(server, list_request, seen)
        generator = run.generators[1].begin(load.each, server.port, server.pid, [load.Task(list_request)] * 6, 2)
        probes["hot list"].append(load.probe(server.port, server.pid, small, 0.002, until=generator.is_done))
        generator.result().checked()
        generator.begin(load.each, server.port, server.pid, [load.Task(list_request)] * 6, 2)
        tasks = [load.Task(load.get(page(project, "mirror"))) for project in upstream.projects[:5]]
        small_cold.append(run.generator.run(load.each, server.port, server.pid, tasks, 1).checked())
        generator.result().checked()
        seen["grown"].append(server.memory() - before)
        seen["peak"].append(server.peak_memory() - before)
        server.stop()
    upstream.kill()
    case = "list of %d names" % names
    run.record("w7", case, "first, wall", "s", seen["first"])
    run.record("w7", case, "first, CPU with children", "s", seen["first cpu"])
    run.record("w7", case, "hot, wall", "s", seen["hot"])
    run.record("w7", case, "hot, CPU", "s", seen["hot cpu"])
    run.record("w7", case, "hot, first byte", "ms", seen["byte"])
    run.record("w7", case, "hot JSON, wall", "s", seen["json"])
    run.record("w7", case, "memory growth", "MB", seen["grown"], note="server process, without children")
    run.record("w7", case, "memory growth, peak", "MB", seen["peak"])
    for name, results in probes.items():
        slowest = [max(result.latencies) * MS for result in results]
        run.record("w7", case, "small page during the %s, slowest" % name, "ms", slowest)
    slowest = [max(result.latencies) * MS for result in small_cold]
    run.record("w7", case, "cold page of the mirror during the hot list, slowest", "ms", slowest)


def measure_hot_list(server, list_request, seen):
    """The middle of five, HTML and JSON."""
    server.settle()
    with load.connect(server.port) as connection:
        before = server.cpu(children=False)
        answers = [load.exchange(connection, list_request) for _ in range(5)]
        seen["hot cpu"].append((server.cpu(children=False) - before) / 5)
        in_json = [load.exchange(connection, load.get("/root/mirror/+simple/", JSON)) for _ in range(5)]
    seen["hot"].append(middle([answer.seconds for answer in answers]))
    seen["byte"].append(middle([answer.first_byte for answer in answers]) * MS)
    seen["json"].append(middle([answer.seconds for answer in in_json]))
