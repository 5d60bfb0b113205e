"""w1 to w4: hot pages and files, and the first answers after a change."""

import contextlib
import dataclasses
import hashlib
import io
import json
import urllib.parse
import zipfile

import load
from report import number
from run import MS, US, generator_note, middle, page, ratio, releases
from server import archives, small_wheel
from upstream import JSON

HTML = "text/html"


def w1(run):
    """The page of a project with five files, at 1, 16 and 64 connections, and with 2,000 idle connections beside 16."""
    server, request = run.farm, load.get(page("small"))
    server.fill(run.generator, releases("small", 5))
    run.expect_links(server, page("small"), 5)
    for connections in (1, 16, 64):
        results = [run.hot(server, request, connections) for _ in range(run.rounds)]
        run.record_hot("w1", "small page, c%d" % connections, results)
    against_bare(run, server, request)
    idle = run.size(2000, 500)
    case = "small page, c16, %d idle beside" % idle
    alone, beside = [], []
    for _ in range(run.rounds):
        alone.append(run.hot(server, request, 16))
        with idle_connections(server, idle, request):
            beside.append(run.hot(server, request, 16))
    run.record_hot("w1", case, beside)
    rates = ratio([result.rate for result in beside], [result.rate for result in alone])
    run.record("w1", case, "rate against none idle", "x", rates, "high")
    cpu = ratio([result.cpu_each for result in beside], [result.cpu_each for result in alone])
    run.record("w1", case, "CPU against none idle", "x", cpu)


def against_bare(run, server, request):
    """The CPU of a page at 16 connections against that of a bare loop, as slow as this machine is just now."""
    with load.connect(server.port) as connection:
        answer = load.exchange(connection, request)
    bare = run.bare(len(answer.head) + len(answer.body))
    ours, least = zip(*[run.least_cpu([(server, request), (bare, request)]) for _ in range(run.rounds)])
    note = "the bare loop: %s us" % number(min(least) * US)
    run.record("w1", "small page, c16", "CPU each, of a bare loop", "x", ratio(ours, least), note=note)


@contextlib.contextmanager
def idle_connections(server, count, request):
    """Keep-alive connections that had one answer each. LoadError if the server closed any of them meanwhile."""
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(load.connect(server.port)) for _ in range(count)]
        for connection in idle:
            load.exchange(connection, request)
        yield
        for connection in idle:
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                raise load.LoadError("an idle connection got %r" % connection.recv(100))


def w2(run):
    """A page of 2,000 files: hot, and first after an upload. The same, and the list of versions, of 10,000 releases."""
    server, count = run.farm, run.size(2000, 500)
    server.fill(run.generator, releases("large", count))
    run.expect_links(server, page("large"), count)
    variants = [
        (name, load.get(page("large"), accept, gzip))
        for name, accept, gzip in (("HTML", HTML, 0), ("HTML gzip", HTML, 1), ("JSON", JSON, 0), ("JSON gzip", JSON, 1))
    ]
    for name, request in variants:
        case = "page of %d files, %s, c8" % (count, name)
        results = [run.hot(server, request, 8) for _ in range(run.rounds)]
        run.record_hot("w2", case, results)
        speeds = [result.received / result.seconds / 1e6 for result in results]
        run.record("w2", case, "speed", "MB/s", speeds, "high")
    changes = 0
    for name, request in variants:
        values = []
        for _ in range(run.rounds):
            changes += 1
            change = small_wheel("large", "2.%d" % changes)
            server.upload(change)
            values.append(run.first_cpu(server, request, b"" if "gzip" in name else change.filename.encode()) * MS)
        run.record("w2", "page of %d files, %s" % (count, name), "CPU first after a change", "ms", values)
    many_releases(run, server, run.size(1000, 100), run.size(10000, 1000))


def many_releases(run, server, few, many):
    """How page and list of `many` releases of one project compare with `few`: with the files, or worse."""
    costs = {}
    for count in (few, many):
        project = "releases-%d" % count
        server.fill(run.generator, releases(project, count))
        rendering, listing = [], []
        for at in range(run.rounds):
            samples = []
            for each in range(3):
                server.upload(small_wheel(project, "2.%d.%d" % (at, each)))
                page_cpu = run.first_cpu(server, load.get(page(project)))
                samples.append((page_cpu, run.first_cpu(server, load.get("/root/priv/" + project, "application/json"))))
            rendering.append(middle([page_cpu for page_cpu, _ in samples]) * MS)
            listing.append(middle([list_cpu for _, list_cpu in samples]) * MS)
        case = "%d releases" % count
        run.record("w2", case, "page, CPU first after a change", "ms", rendering)
        run.record("w2", case, "list of versions, CPU after a change", "ms", listing)
        hot = [run.hot(server, load.get(page(project)), 1).cpu_each * MS for _ in range(run.rounds)]
        run.record("w2", case, "page, CPU each", "ms", hot)
        costs[count] = rendering, listing
    growth = many / few
    for at, name in enumerate(("page", "list of versions")):
        values = [value / growth for value in ratio(costs[many][at], costs[few][at])]
        case = "%d releases against %d" % (many, few)
        run.record("w2", case, name + ": CPU a release", "x", values)


def w3(run):
    """An index with three bases and a mirror: hot pages against a small page of w1, and the first after a change."""
    server = run.farm
    server.fill(run.generator, releases("plain", 2))
    for at, base in enumerate(("b1", "b2", "b3")):
        server.fill(run.generator, [("chain-1", "2.%d" % at)], base)
    run.expect_links(server, page("chain-0", "stage"), 2)
    run.expect_links(server, page("chain-1", "stage"), 5)
    small = load.get(page("plain"))
    for name, project in (("of the mirror", "chain-0"), ("of all four", "chain-1")):
        case = "project %s, c16" % name
        requests = (small, load.get(page(project, "stage")))
        plain, chained = zip(*[run.side_by_side(server, requests, 16) for _ in range(run.rounds)])
        run.record_hot("w3", case, chained)
        cpu = ratio([result.cpu_each for result in chained], [result.cpu_each for result in plain])
        run.record("w3", case, "CPU against a page without bases", "x", cpu)
    values = []
    for at in range(run.rounds * run.size(5, 2)):
        change = small_wheel("chain-1", "3.%d" % at)
        server.upload(change, "b1")
        values.append(run.first_cpu(server, load.get(page("chain-1", "stage")), change.filename.encode()) * MS)
    run.record("w3", "project of all four", "CPU first after a change", "ms", values)


def w4(run):
    """A file of 100 KB at 1 and 16 connections, and one of 200 MB to one client."""
    server = run.farm
    server.upload(archives.wheel("middle", "1.0", size=100000))
    request = load.get(file_path(server, "middle"), "*/*")
    for connections in (1, 16):
        results = [run.hot(server, request, connections) for _ in range(run.rounds)]
        run.record_hot("w4", "100 KB file, c%d" % connections, results)
    megabytes = run.size(200, 50)
    server.upload(large_wheel(megabytes * 1000000))
    request = load.get(file_path(server, "huge"), "*/*")
    results, growth = [], []
    for _ in range(run.rounds):
        server.settle()
        before = server.memory()
        server.forget_peak()
        results.append(run.hot(server, request, 1, max(run.seconds, 0.5)))
        growth.append(server.peak_memory() - before)
    case = "%d MB file, c1" % megabytes
    speeds = [result.received / result.seconds / 1e6 for result in results]
    run.record("w4", case, "speed", "MB/s", speeds, "high", note=generator_note(results))
    cpu = [result.server_cpu / result.received * 1e9 for result in results]
    run.record("w4", case, "CPU a GB", "s", cpu)
    run.record("w4", case, "memory growth, peak", "MB", growth)


def file_path(server, project):
    """Of the first file on the project's page."""
    with load.connect(server.port) as connection:
        body = load.exchange(connection, load.get(page(project), JSON)).body
    (url,) = [file["url"] for file in json.loads(body)["files"]]
    return urllib.parse.urljoin(page(project), url.partition("#")[0])


def large_wheel(size):
    """A small wheel with one more member, stored as it is: deflating 200 MB takes seconds."""
    small = small_wheel("huge", "1.0")
    packed = io.BytesIO(small.content)
    with zipfile.ZipFile(packed, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr("huge/padding.bin", hashlib.shake_128(b"padding").digest(size))
    return dataclasses.replace(small, content=packed.getvalue())
