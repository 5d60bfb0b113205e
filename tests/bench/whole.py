"""w9, start and memory, and the mixed load: the server as a whole."""

import time

import load
from mirrors import mirror_tasks
from run import generator_note, page, releases
from server import small_wheel


def w9(run):
    """Start to the first answer, on an initialised directory without files and on one with 20,000; memory."""
    empty = run.server().start()
    empty.stop()
    measure_starts(run, empty, "no files")
    count = run.size(20000, 2000)
    farm = run.farm
    missing = max(0, count - farm.files)
    farm.fill(run.generator, [("many-%d" % (at // 20), "1.%d" % (at % 20)) for at in range(missing)])
    farm.settle()
    run.record("w9", "%d files" % count, "memory before it stops", "MB", [farm.memory()])
    if {"w1", "w2", "w3", "w4", "w5"} <= set(run.done):
        run.record("w9", "after w1 to w5", "memory", "MB", [run.memory_after_w5])
    farm.stop()
    measure_starts(run, farm, "%d files" % count)


def measure_starts(run, server, case):
    cpu, wall, memory, proportional = [], [], [], []
    for _ in range(run.rounds):
        server.start()
        cpu.append(server.start_cpu)
        wall.append(server.start_seconds)
        time.sleep(2)  # what start-up freed is given back a little later
        memory.append(server.memory())
        proportional.append(server.proportional_memory())
        server.stop()
    run.record("w9", case, "start, CPU to the first answer", "s", cpu)
    run.record("w9", case, "start, wall to the first answer", "s", wall)
    run.record("w9", case, "idle memory", "MB", memory)
    run.record("w9", case, "idle memory, PSS", "MB", proportional)


def mixed(run):
    """Hot small pages at 64 connections while uploads, cold mirror fetches and a list request run beside them."""
    names, seconds = run.size(600000, 150000), run.size(3, 1)
    cases = {"first fetch of the list": [], "hot list": []}
    server = run.started_server()
    server.fill(run.generator, releases("small", 5))
    small = load.get(page("small"))
    for at in range(run.rounds):
        upstream = run.upstream("mixed%d" % at, 200 * seconds, names=names, latency=20)
        index = "mirror%d" % at
        server.add_mirror(index, upstream)
        uploads = [
            load.Task(server.upload_request(small_wheel("up%d-%d" % (at, each), "1.0")))
            for each in range(500 * seconds)
        ]
        fetches = mirror_tasks(upstream.projects, index)
        lists = [load.Task(load.get("/root/%s/+simple/" % index))]
        for half, measured in enumerate(cases.values()):
            server.settle()
            work = [(uploads[half::2], 2), (fetches[half::2], 4), (lists, 1)]
            for generator, (tasks, parallel) in zip(run.generators[1:], work):
                generator.begin(load.each, server.port, server.pid, tasks, parallel, seconds)
            result = run.generator.run(load.hot, server.port, server.pid, small, 64, seconds)
            measured.append((result, [generator.result().checked() for generator in run.generators[1:]]))
        upstream.kill()
    for case, measured in cases.items():
        record_mixed(run, "64 connections beside uploads, mirror, " + case, measured)
    server.stop()


def record_mixed(run, case, measured):
    hot = [result for result, _ in measured]
    run.record("mixed", case, "hot rate", "req/s", [result.rate for result in hot], "high", note=generator_note(hot))
    run.record_latency("mixed", case, hot)
    for at, name in enumerate(("uploads", "cold projects")):
        run.record("mixed", case, name, "1/s", [others[at].rate for _, others in measured], "high")
    run.record("mixed", case, "list, wall", "s", [others[2].seconds for _, others in measured])
