#!/usr/bin/env python3
"""w15, a server with many files against one with few; and what makes the dump of such a server, by itself:

    python3 tests/bench/million.py DIR                      a million files in 100,000 projects, and 20,000 releases of one project
    python3 tests/bench/million.py DIR --files 1000 --releases 0
    python3 devpi_lite.py import DIR --serverdir NEW --hard-links --root-passwd PASSWORD

All is in root/priv; root/prod is there, and empty. Each file is a wheel of a few hundred bytes that differs from all others.
The projects are `small-000000` and on, ten releases each of one wheel; the large one is `wide`. Summaries and READMEs are made of
words that are as unevenly frequent as those of a language: word 0 is in nearly all of them, word 3000 in few. Each of the
words rare0 to rare9 is in ten of the first 100 projects, however many follow.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import struct
import subprocess
import time
import urllib.parse
import zlib

import load
from run import MS, page, ratio, say
from server import PASSWORD, small_wheel

PER_PROJECT = 10
WORDS = 4000
STAGE = {"type": "stage", "bases": [], "volatile": True, "acl_upload": ["root"], "acl_toxresult_upload": [":ANONYMOUS:"],
         "mirror_whitelist": [], "mirror_whitelist_inheritance": "intersection"}
WHEN, MODIFIED = [2026, 11, 28, 13, 0, 0], "Sat, 28 Nov 2026 13:00:00 GMT"
AT_ONCE = 10    # requests of a kind, one after the other: their middle counts


def w15(run):
    """What people and installers ask for, of a server with 1,000 files and of one with many."""
    count = run.size(100000, 10000)
    few, many = imported(run, 1000, 0), imported(run, count, count // 50)
    case = "%d files, of 1000" % (count + count // 50)
    starts = [[started(server) for server in (few, many)] for _ in range(run.rounds)]
    run.record("w15", case, "start, CPU beyond", "s", [after[0] - before[0] for before, after in starts])
    run.record("w15", case, "idle memory, PSS", "x", [after[1] / before[1] for before, after in starts])
    for server in (few, many):
        server.start()
    for name, request in requests().items():
        spent = {few: [], many: []}
        for at in range(run.rounds):
            for server in (few, many):
                spent[server].append(middle_cpu(run, server, request, at))
        run.record("w15", case, name + ", CPU", "x", ratio(spent[many], spent[few]))
        run.record("w15", "1000 files", name + ", CPU", "ms", [each * MS for each in spent[few]])
    wide = [run.first_cpu(many, load.get(page("wide"))) * MS]
    run.record("w15", case, "first simple page of a project of %d releases, CPU" % (count // 50), "ms", wide)
    for server in (few, many):
        server.stop()


def imported(run, files, releases):
    """A server, not started, with that many files, whose search index is ready."""
    server = run.server()
    folder = server.directory + "-dump"
    os.mkdir(folder)
    write_dump(folder, files, releases)
    subprocess.run([run.program.python, run.program.script, "import", folder, "--serverdir", server.directory, "--hard-links",
                    "--root-passwd", PASSWORD], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shutil.rmtree(folder)
    server.start()
    while any(name == "devpi_lite_search_queue" and value for name, _, value in server.request("GET", "/+status")["result"]["metrics"]):
        time.sleep(0.2)
    server.stop()
    say("%d files are imported and indexed" % (files + releases))
    return server


def started(server):
    """(CPU seconds to the first answer, PSS a little later) of a start."""
    server.start()
    time.sleep(2)
    found = server.start_cpu, server.proportional_memory()
    server.stop()
    return found


def requests():
    """{what: function of a server and a number that makes a request}; the number is a small project's."""
    return {
        "simple page, first": lambda server, number: load.get(page(small(number))),
        "upload": lambda server, number: server.upload_request(small_wheel("new-%d" % number, "1.0")),
        "push": push_request,
        "search for a rare word": lambda server, number: search_request("rare%d" % (number % 10)),
        "search for a name": lambda server, number: search_request(small(number)),
        "search by filters": lambda server, number: search_request("has:wheel uploaded:>2026 path:/root/priv/" + small(number)),
        "front page": lambda server, number: load.get("/"),
        "page of the index": lambda server, number: load.get("/root/priv?q=" + small(number)[:-1]),
        "page of a project": lambda server, number: load.get("/root/priv/" + small(number)),
        "page of a version": lambda server, number: load.get("/root/priv/%s/1.3" % small(number)),
    }


def push_request(server, number):
    body = json.dumps({"name": small(number), "version": "1.3", "targetindex": "root/prod"})
    head = ("PUSH /root/priv HTTP/1.1\r\nHost: %s\r\nAuthorization: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % (load.HOST, server.authorization(), len(body)))
    server.is_changed = True
    return (head + body).encode()


def search_request(query):
    return load.get("/+search?query=" + urllib.parse.quote(query))


def middle_cpu(run, server, request, at):
    """The middle of the CPU seconds of some answers."""
    return statistics.median(run.first_cpu(server, request(server, number)) for number in range(at * AT_ONCE, (at + 1) * AT_ONCE))


def small(number):
    return "small-%06d" % number


def word(number):
    """A word of that rank, of letters only."""
    return "w" + ("%04x" % (number * 7919 % 65521)).translate(str.maketrans("0123456789", "ghijklmnop"))


def some_words(chooser, count):
    """The words of lower ranks more often: 1/rank, as Zipf found."""
    return " ".join(word(int(WORDS ** chooser.random()) - 1) for _ in range(count))


def wheel(name, version, summary):
    """(file name, bytes) of a wheel that holds its metadata alone: a tenth of the time that zipfile takes."""
    stem = "%s-%s" % (name.replace("-", "_"), version)
    member = (stem + ".dist-info/METADATA").encode()
    content = ("Metadata-Version: 2.1\nName: %s\nVersion: %s\nSummary: %s\n" % (name, version, summary)).encode()
    common = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 33, zlib.crc32(content), len(content), len(content), len(member), 0)
    local = b"PK\3\4" + common + member + content
    central = b"PK\1\2" + struct.pack("<H", 20) + common + struct.pack("<HHHII", 0, 0, 0, 0o100644 << 16, 0) + member
    return stem + "-py3-none-any.whl", local + central + b"PK\5\6" + struct.pack(
        "<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)


class Release:
    """A release of a project, with the one wheel of it."""

    def __init__(self, project, version, is_last, rare=""):
        chooser = random.Random("%s %s" % (project, version if is_last else ""))
        self.project, self.version = project, version
        self.summary = some_words(chooser, 6) + rare
        self.readme = some_words(chooser, 30) if is_last else ""

    @property
    def metadata(self):
        return {"name": self.project, "version": self.version, "summary": self.summary, "description": self.readme}

    def written(self, folder, part):
        """Writes the wheel into a folder of the dump; its entry there."""
        filename, content = wheel(self.project, self.version, self.summary)
        relpath = "root/priv/%s/%s" % (part, filename)
        with open(os.path.join(folder, relpath), "wb", buffering=0) as file:
            file.write(content)
        sha256 = hashlib.sha256(content).hexdigest()
        return {"type": "releasefile", "projectname": self.project, "version": self.version, "relpath": relpath,
                "entrymapping": {"hashes": {"sha256": sha256}, "hash_spec": "sha256=" + sha256, "last_modified": MODIFIED,
                                 "project": self.project, "version": self.version},
                "log": [{"what": "upload", "who": "root", "when": WHEN, "dst": "root/priv"}]}


def projects(files, releases):
    """Yields lists of `Release`s."""
    for number in range(files // PER_PROJECT):
        rare = " rare%d" % (number % 10) if number < 100 else ""
        yield [Release(small(number), "1.%d" % at, at == PER_PROJECT - 1, rare) for at in range(PER_PROJECT)]
    if releases:
        yield [Release("wide", "1.%d.%d" % divmod(at, 100), at == releases - 1) for at in range(releases)]


def write_dump(folder, files, releases):
    """A dump with `files` in small projects, and a project of `releases`."""
    with open(os.path.join(folder, "dataindex.json"), "w", encoding="utf-8") as out:
        users = {"root": {"username": "root", "created": "2026-11-28T12:59:49Z"}}
        out.write('{"dumpversion": "2", "users": %s, "indexes": {"root/prod": %s, "root/priv": {"indexconfig": %s, "projects": {' % (
            json.dumps(users), json.dumps({"indexconfig": STAGE, "projects": {}, "files": []}), json.dumps(STAGE)))
        for number, project in enumerate(projects(files, releases)):
            out.write("%s\n%s: %s" % ("," if number else "", json.dumps(project[0].project),
                                      json.dumps({each.version: each.metadata for each in project})))
        out.write('}, "files": [')
        mark = ""
        for number, project in enumerate(projects(files, releases)):
            part = "%d" % (number // 100)      # a folder for each project would take most of the time
            if number % 100 == 0:
                os.makedirs(os.path.join(folder, "root", "priv", part))
            for each in project:
                out.write("%s\n%s" % (mark, json.dumps(each.written(folder, part))))
                mark = ","
        out.write("]}}}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", help="a missing or empty directory")
    parser.add_argument("--files", type=int, default=1000000, help="in projects of %d; default: %%(default)s" % PER_PROJECT)
    parser.add_argument("--releases", type=int, default=20000, help="of the large project; default: %(default)s")
    options = parser.parse_args()
    os.makedirs(options.folder, exist_ok=True)
    write_dump(options.folder, options.files, options.releases)


if __name__ == "__main__":
    main()
