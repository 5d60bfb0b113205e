"""w14: the web pages and the search, with many projects on a stage and many names on a mirror."""

import load
from run import MS, page, ratio, releases
from server import small_wheel

PAGES = {"front page": "/", "stage": "/root/priv", "project": "/root/priv/web-7", "version": "/root/priv/web-7/1.0",
         "status": "/+status", "help": "/+help"}
KEPT = ["stage", "project", "version", "help"]     # the others are made anew for each reader
QUERIES = {"a word that all have": "package", "a beginning": "we*", "a name of the mirror": "name-012345"}


def w14(run):
    """Web pages of a stage with 10,000 projects beside a mirror with 900,000 names: first, hot, and the search."""
    count, names = run.size(10000, 500), run.size(900000, 20000)
    server = run.started_server()
    server.add_mirror("mirror", run.upstream("web", 10, names=names))
    with load.connect(server.port) as connection:
        load.exchange(connection, load.get("/root/mirror/+simple/"))
    server.fill(run.generator, [("web-%d" % at, "1.0") for at in range(count)] + releases("small", 5))
    changes = iter(range(1000000))

    def first_cpu(path):
        """CPU ms of a page after a change, which makes the kept one void."""
        server.upload(small_wheel("web-7", "2.%d" % next(changes)))
        return run.first_cpu(server, load.get(path, gzip=True)) * MS

    for name, path in PAGES.items():
        run.record("w14", "%d projects" % count, "CPU first, " + name, "ms", [first_cpu(path) for _ in range(run.rounds)])
    for name, query in QUERIES.items():
        path = "/+search?query=" + query
        values = [first_cpu(path) for _ in range(run.rounds)]
        run.record("w14", "%d projects and %d names" % (count, names), "CPU of a search, " + name, "ms", values)

    simple = load.get(page("small"), gzip=True)
    for name in KEPT:
        asked = [(server, load.get(PAGES[name], gzip=True)), (server, simple)]
        web, plain = zip(*[run.least_cpu(asked) for _ in range(run.rounds)])
        run.record("w14", "%d projects" % count, "CPU each, %s, of a simple page's" % name, "x", ratio(web, plain))
    server.stop()
