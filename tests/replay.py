"""What the tests of the changelog use: a crowd that changes all that people can change, the rows
of a server directory by names in place of ids, what a server shows, and what is wrong with a log.

Standard library only, but for the harness.
"""

import atexit
import base64
import collections
import contextlib
import functools
import hashlib
import http.client
import io
import itertools
import json
import os
import pathlib
import random
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile
import typing
import urllib.parse
import xmlrpc.client
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

from harness import (
    PROGRAM, SIMPLE_JSON, clean_environment, eventually, multipart, normal_name, run_command, sdist,
    wheel)

# -- rows -----------------------------------------------------------------------------------------

# Table -> what tells its rows apart: columns, where one that refers to a row stands for the names
# of that.
PEOPLE = {
    "users": ("name",), "indexes": ("user_id", "name"), "projects": ("index_id", "name"),
    "releases": ("project_id", "version"), "readmes": ("release_id",),
    "files": ("index_id", "path"), "attestations": ("file_id",), "metadata_files": ("sha256",),
    "gone": ("path",), "withdrawn": ("index_path", "kind", "filename")}

# Tables of one server alone, or made again from the others and the files.
OWN = {"node", "arrivals", "changelog", "audit", "outbox", "search_queue", "docs", "doc_members", "gone_cached",
       "sqlite_sequence", "wanted", "cut_entries", "history"}

# Table -> the column of what its rows are in, in the order of their ids: pages and JSON show it.
ORDERED = {"users": None, "indexes": "user_id", "projects": "index_id", "releases": "project_id",
           "files": "project_id"}


class Rows(typing.NamedTuple):
    """What people put into a server directory, in one committed state.

    `tables`: {table: {names: {column: value}}}; `orders`: {(table, names of the parent): [names,
    ...]} in the order of ids."""
    serial: int
    tables: dict
    orders: dict

    def paths(self, table="indexes"):
        return ["/".join(key) for key in self.tables[table]]


@contextlib.contextmanager
def database(directory):
    """A connection that reads one committed state of the directory's database."""
    path = pathlib.Path(directory) / "devpi_lite.db"
    assert path.exists(), path
    with contextlib.closing(sqlite3.connect(str(path), isolation_level=None, timeout=30)) as db:
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA query_only = ON")
        db.execute("BEGIN")
        yield db


def rows_of(directory, mirrors=()):
    """The `Rows` of a directory.

    Left out is what a mirror caches, with the paths that are gone from `mirrors`, indexes (paths)
    that were mirrors once; and metadata files that no file of a stage names: the server lets go of
    them when it cleans."""
    with database(directory) as db:
        return read_rows(db, mirrors)


def read_rows(db, mirrors=()):
    there = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    unknown = there - set(PEOPLE) - OWN
    assert not unknown, "is that what people did, to be in the changelog? %s" % sorted(unknown)
    serial = db.execute("SELECT max(serial) FROM changelog").fetchone()[0]
    names, tables, orders = {}, {}, collections.defaultdict(list)

    def named(refers, column, value):
        if column not in refers or value is None:
            return value
        return names[refers[column]].get(value, ("(a row that is not there)",))

    for table in PEOPLE:
        refers = {row["from"]: row["table"] for row in
                  db.execute("PRAGMA foreign_key_list(%s)" % table)}
        names[table], tables[table] = {}, {}
        has_ids = "id" in {row["name"] for row in db.execute("PRAGMA table_info(%s)" % table)}
        for row in db.execute("SELECT * FROM %s%s" % (table, " ORDER BY id" if has_ids else "")):
            if is_cached(table, row, names):
                continue
            values = {column: named(refers, column, row[column]) for column in row.keys()
                      if column != "id"}
            key = tuple(itertools.chain.from_iterable(
                [values[column]] if isinstance(values[column], str) else values[column]
                for column in PEOPLE[table]))
            if "packed" in values:      # how it is packed is up to the server
                values["packed"] = zlib.decompress(values["packed"])
            if table == "readmes":      # in how many pieces is, too
                values["piece"] = tables[table].get(key, {"piece": b""})["piece"] + values["piece"]
            if has_ids:
                names[table][row["id"]] = key
            if table == "indexes":
                names.setdefault("mirrors", set())
                if json.loads(values["config"])["type"] == "mirror":
                    names["mirrors"].add(row["id"])
            if table == "gone" and key[0].startswith(tuple(path + "/" for path in mirrors)):
                continue
            if table in ORDERED:
                parent = values[ORDERED[table]] if ORDERED[table] else ()
                orders[table, parent].append(key)
            tables[table][key] = values
    kept = {values["metadata_sha256"] for values in tables["files"].values()}
    tables["metadata_files"] = {key: values for key, values in tables["metadata_files"].items()
                                if key[0] in kept}
    return Rows(-1 if serial is None else serial, tables, dict(orders))


def is_cached(table, row, names):
    """Whether it is what a mirror caches."""
    if table in ("projects", "files"):
        return row["index_id"] in names["mirrors"]
    places = {"releases": ("project_id", "projects"), "readmes": ("release_id", "releases"),
              "attestations": ("file_id", "files")}
    if table in places:
        column, parents = places[table]
        return row[column] not in names[parents]
    return False


def differences(old, new, order=True):
    """What two `Rows` differ in, a line each."""
    found = []
    for table in PEOPLE:
        one, other = old.tables[table], new.tables[table]
        for key in sorted(set(one) | set(other)):
            name = "%s %s" % (table, "/".join(key))
            if key not in other:
                found.append("%s: missing (%s)" % (name, shown(one[key])))
            elif key not in one:
                found.append("%s: not to be there (%s)" % (name, shown(other[key])))
            else:
                columns = {**one[key], **other[key]}
                found += ["%s: %s is %s, not %s" % (
                    name, column, shown(other[key].get(column)), shown(one[key].get(column)))
                    for column in columns if one[key].get(column) != other[key].get(column)]
    for place in sorted(set(old.orders) | set(new.orders)) if order and not found else ():
        one, other = old.orders.get(place, []), new.orders.get(place, [])
        if one != other:
            found.append("%s of %s: the order is\n    %s\n  not\n    %s" % (
                place[0], "/".join(place[1]) or "the server",
                *("\n    ".join(key[-1] for key in keys) for keys in (other, one))))
    return found


def shown(value):
    text = repr(value)
    return text if len(text) <= 300 else text[:200] + " ... " + text[-100:]


def misfits(rows):
    """What does not fit together in a state, a line each."""
    found, files, releases = [], rows.tables["files"], rows.tables["releases"]
    names = collections.Counter()
    for (user, index, path), values in files.items():
        place = "%s/%s" % (user, index)
        name = "%s/%s" % (place, path)
        project, release = (values[column] for column in ("project_id", "release_id"))
        if release not in releases or release != (user, index, project[2], values["version"]):
            found.append("%s is of the release %s" % (name, shown(release)))
        if (values["kind"] == "toxresult") != (values["for_id"] is not None) or \
                values["for_id"] and files[values["for_id"]]["release_id"] != release:
            found.append("%s is a %s for %s" % (name, values["kind"], shown(values["for_id"])))
        if (name,) in rows.tables["gone"]:
            found.append("%s is there, and gone" % name)
        if (place, values["kind"], values["filename"]) in rows.tables["withdrawn"]:
            found.append("%s is there, and withdrawn" % name)
        if values["metadata_sha256"] and \
                (values["metadata_sha256"],) not in rows.tables["metadata_files"]:
            found.append("%s has no metadata" % name)
        names[project, values["filename"]] += 1
    return found + ["%s is there %d times" % (shown(name), count) for name, count in names.items()
                    if count > 1]


# -- files and changelog --------------------------------------------------------------------------


class Entry(typing.NamedTuple):
    """A row of the changelog; `ops` as it stands there."""
    serial: int
    ts: float
    who: typing.Optional[str]
    ops: bytes
    prev: bytes
    hash: bytes

    @property
    def list(self):
        return json.loads(zlib.decompress(self.ops))


def log_of(directory):
    with database(directory) as db:
        return [Entry(*row) for row in db.execute(
            "SELECT serial, ts, who, ops, prev, hash FROM changelog ORDER BY serial")]


def breaks(entries, first=0, chain=b""):
    """Where a changelog is no chain from the serial `first` on, a line each."""
    found = []
    for number, entry in enumerate(entries, first):
        digest = hashlib.sha256(entry.prev + struct.pack(">Q", entry.serial) + entry.ops).digest()
        if entry.serial != number:
            found.append("serial %d stands in the place of %d" % (entry.serial, number))
        if entry.prev != chain:
            found.append("serial %d: prev is not the hash of the entry before" % entry.serial)
        if entry.hash != digest:
            found.append("serial %d: the hash is not that of the entry" % entry.serial)
        chain = entry.hash
    return found


def blobs_of(directory):
    """{SHA-256: path} of the files in a directory."""
    return {path.name: path for path in (pathlib.Path(directory) / "files").glob("??/*")}


def blobs_named(rows):
    """The SHA-256s of the files that stages name."""
    return {values["sha256"] for values in rows.tables["files"].values()}


# -- the rules of the changelog -------------------------------------------------------------------

# Kind of row -> how many names tell it apart.
KINDS = {"user": 1, "index": 2, "project": 3, "release": 4, "file": 3, "gone": 1, "metadata": 1,
         "withdrawn": 3}
TABLES = {"user": "users", "index": "indexes", "project": "projects", "release": "releases",
          "file": "files", "gone": "gone", "metadata": "metadata_files", "withdrawn": "withdrawn"}


def faults(entries):
    """(what is wrong with a changelog that begins with the first change, a line each; the rows that
    it leaves: {kind: {key: value}}; the indexes that were mirrors at some time).

    Each op is a whole row; nothing is said of what a mirror caches; a row comes after the one that
    it belongs to, and goes no later than that."""
    found, live, forms = [], {kind: {} for kind in KINDS}, {}
    missing, mirrors = set(), set()
    for entry in entries:
        gone = []
        for op in entry.list:
            where = "serial %d: %s %s" % (entry.serial, op.get("t"), "/".join(map(str, op["k"])))
            if set(op) != {"t", "k", "v"} or op["t"] not in KINDS:
                found.append("%s: an unknown kind of op" % where)
                continue
            kind, key, value = op["t"], tuple(op["k"]), op["v"]
            if len(key) != KINDS[kind] or not all(isinstance(name, str) for name in key):
                found.append("%s: a %s has %d names" % (where, kind, KINDS[kind]))
                continue
            if kind in ("project", "release", "file") and \
                    index_type(live["index"].get(key[:2])) == "mirror":
                found.append("%s: that is on a mirror" % where)
            if value is None:
                live[kind].pop(key, None)
                gone.append((where, kind, key))
                continue
            if not isinstance(value, dict):
                found.append("%s: the value is no object: %s" % (where, shown(value)))
                continue
            form = set(value)
            if kind == "file":
                if (value.get("kind") == "toxresult") != bool(value.get("for")):
                    found.append("%s: kind %r and for %r" % (
                        where, value.get("kind"), value.get("for")))
                form.discard("for")
            if form != forms.setdefault(kind, form):
                found.append("%s: has other keys than those before: %s" % (
                    where, sorted(form ^ forms[kind])))
            ids = [name for name in form if name == "id" or name.endswith("_id")]
            if ids:
                found.append("%s: names ids: %s" % (where, ids))
            if kind == "index" and index_type(value) == "mirror":
                mirrors.add("/".join(key))
            found += ["%s: there is no %s" % (where, " ".join((parent, *map(str, name))))
                      for parent, name in parents(kind, key, value)
                      if name not in live[parent]]
            live[kind][key] = value
        for where, kind, key in gone:
            if key not in live[kind]:       # else it was made anew
                found += ["%s: deleted before its %s" % (where, " ".join((child, *name)))
                          for child, name in children(live, kind, key)]
        packed = {value["metadata_sha256"] for value in live["file"].values()
                  if value.get("metadata_sha256")}
        found += ["serial %d: the metadata file %s of a file is missing" % (entry.serial, sha256)
                  for sha256 in packed - missing if (sha256,) not in live["metadata"]]
        missing = {sha256 for sha256 in packed if (sha256,) not in live["metadata"]}
        found += ["%s: no file of a stage has it" % where for where, kind, (sha256, *_) in (
            ("serial %d: metadata %s" % (entry.serial, op["k"]), op["t"], op["k"])
            for op in entry.list if op["v"] is not None)
            if kind == "metadata" and sha256 not in packed]
    return found, live, mirrors


def index_type(value):
    if not isinstance(value, dict):
        return None
    config = value.get("config", value)
    return (json.loads(config) if isinstance(config, str) else config).get("type")


def parents(kind, key, value):
    """(kind, key) of the rows that a row belongs to."""
    if kind == "index":
        return [("user", key[:1])]
    if kind == "project":
        return [("index", key[:2])]
    if kind == "release":
        return [("project", key[:3])]
    if kind == "file":
        return [("release", (*key[:2], value.get("project"), value.get("version")))] + (
            [("file", (*key[:2], value["for"]))] if value.get("for") else [])
    return []


def children(live, kind, key):
    """(kind, key) of the rows that belong to one of these kinds, directly."""
    return [(child, name) for child in ("index", "project", "release", "file")
            for name, value in live[child].items() if (kind, key) in parents(child, name, value)]


# -- what a server shows --------------------------------------------------------------------------

JSON, HTML, ANY = "application/json", "text/html", "*/*"
# Date: when it was asked; X-Devpi-Uuid and its kin: which server it is, not what it holds;
# Content-Length: the address of a server may be longer than that of the other.
PASSED_OVER = {"date", "x-devpi-uuid", "x-devpi-master-uuid", "x-devpi-primary-uuid",
               "x-devpi-replica-lag", "content-length"}
WORDS = ("alpha", "summary", "documentation", "index:dev", "beta two", "user:ada", "project")


def views(rows):
    """(method, path, Accept, body) of all that can be asked for about these rows, and about files
    that are gone."""
    yield "GET", "/", JSON, None
    for user in rows.paths("users"):
        yield "GET", "/" + user, JSON, None
    names = {key[2] for key in rows.tables["projects"]} | {"mirrored", "elsewhere"}
    for index in rows.paths():
        yield "GET", "/" + index, JSON, None
        yield "GET", "/%s/+api" % index, JSON, None
        for accepted in (HTML, SIMPLE_JSON):
            yield "GET", "/%s/+simple/" % index, accepted, None
        for name in names:
            for accepted in (HTML, SIMPLE_JSON):
                yield "GET", "/%s/+simple/%s/" % (index, name), accepted, None
            yield "GET", "/%s/%s" % (index, name), JSON, None
            yield "GET", "/%s/+pypi/%s/json" % (index, name), JSON, None
    for user, index, name, version in rows.tables["releases"]:
        place = "/%s/%s" % (user, index)
        yield "GET", "%s/%s/%s" % (place, name, version), JSON, None
        yield "GET", "%s/+pypi/%s/%s/json" % (place, name, version), JSON, None
        yield "GET", "%s/%s/%s/+doc/index.html" % (place, name, version), HTML, None
        yield "GET", "%s/%s/%s/+doc/deeper/page.html" % (place, name, version), HTML, None
    for (user, index, path), values in rows.tables["files"].items():
        place = "/%s/%s/%s" % (user, index, path)
        yield "GET", place, ANY, None
        yield "GET", place, JSON, None
        if values["metadata_sha256"]:
            yield "GET", place + ".metadata", ANY, None
    for path, in rows.tables["gone"]:
        yield "GET", "/" + path, ANY, None


def searches(rows):
    for word in WORDS:
        yield "GET", "/+search?query=" + word.replace(" ", "%20"), JSON, None
    for text in ("alpha", "summary"):
        call = xmlrpc.client.dumps(({"name": text, "summary": text}, "or"), "search")
        for index in rows.paths():
            yield "POST", "/%s/" % index, "text/xml", call


def shown_by(server, asked, user, token=None):
    """{(method, path, Accept, body): (status, headers, body)}, on one connection; what speaks of
    the server's own address does not."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    pair = base64.b64encode(("%s:%s" % (user, token or server.tokens.get(user))).encode()).decode()
    address = ("127.0.0.1:%d" % server.port).encode()
    seen = {}
    try:
        for view in asked:
            method, path, accepted, body = view
            headers = {"Accept": accepted, **({"X-Devpi-Auth": pair} if user else {})}
            if body is not None:
                headers["Content-Type"] = "text/xml"
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = response.read().replace(address, b"SERVER")
            kept = sorted((name.lower(), value.replace(address.decode(), "SERVER"))
                          for name, value in response.getheaders()
                          if name.lower() not in PASSED_OVER
                          and (name.lower() != "etag" or has_own_tag(path)))
            seen[view] = response.status, kept, content
    finally:
        connection.close()
    return seen


def has_own_tag(path):
    """Whether the ETag of what is there says nothing of the server: not of answers that hold its
    address, or names that it had from upstream some time."""
    return "/+f/" in path or "/+doc/" in path or "/+simple/" in path and path[-9:] != "/+simple/"


def unlike(one, other):
    """What two results of `shown_by` differ in, a line each."""
    found = []
    for view in one:
        for what, old, new in zip(("status", "headers", "body"), one[view], other[view]):
            if what == "headers" and old != new:
                old, new = (sorted(set(a) - set(b)) for a, b in ((old, new), (new, old)))
            if old != new:
                if what == "body":
                    start = next((number for number, (a, b) in enumerate(zip(old, new)) if a != b),
                                 min(len(old), len(new)))
                    old, new = (text[max(0, start - 60):start + 200] for text in (old, new))
                found.append("%s %s (%s): %s\n    old: %s\n    new: %s" % (
                    *view[:3], what, shown(old), shown(new)))
    return found


def is_settled(server):
    """Whether the search index has looked at all that was uploaded."""
    with database(server.directory) as db:
        return db.execute("SELECT 1 FROM search_queue").fetchone() is None


def served_otherwise(old, new, rows, users=("root", None), about=""):
    """What two servers show otherwise, a line each: root sees all, others the pages of indexes.

    The new one takes the tokens of the old.  `about`: what a path has to hold."""
    found = []
    eventually(lambda: is_settled(old) and is_settled(new))
    for user in users:
        asked = [view for view in itertools.chain(views(rows), searches(rows)) if about in view[1]]
        if user != "root":
            asked = [view for view in asked
                     if not any(part in view[1] for part in ("+f/", "+doc/", "+pypi/"))]
        with ThreadPoolExecutor(2) as pool:
            one, other = (pool.submit(shown_by, server, asked, user, old.tokens.get(user))
                          for server in (old, new))
            found += ["as %s: %s" % (user, line) for line in unlike(one.result(), other.result())]
    return found


# -- the crowd ------------------------------------------------------------------------------------

USERS, GUESTS = ("ada", "bob", "mia"), ("guest", "visitor")
STAGES = ("ada/dev", "ada/stable", "bob/dev", "bob/prod", "mia/x")
PASSING = ("guest/own", "guest/more", "visitor/own", "visitor/cache", "ada/turn", "bob/short")
MIRRORS = ("root/mirror", "visitor/cache", "ada/turn")      # the last may also be a stage
PROJECTS = ("alpha", "Beta.Two", "gamma_x", "delta")
MIRRORED = ("mirrored", "delta", "elsewhere")
VERSIONS = ("1.0", "1.0.0", "2.0rc1", "2.1")
WHO_MAY = [*USERS, *GUESTS]
STATUSES = ("active", "active", "deprecated", "archived", "quarantined")
TEXTS = ("", "one", "zw\u00f6lf \U0001f40d \u2028\x00\x7f", '"quoted" \\ and {"a": [1]}',
         "a" * 3000, "\ud800")
DATA = (None, {}, {"a": [1, 2.5, None, True]}, "text", 7, [[]], {"\u00fc": {"deep": ["x"] * 5}},
        {"n": 10 ** 30, "f": [1e-7, -0.0, 1e300], "": "\udc80"})


def documentation(mark):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in ("index.html", "deeper/page.html"):
            archive.writestr(zipfile.ZipInfo(name), "<h1>documentation</h1><p>mark %s" % mark)
    return packed.getvalue()


class Crowd:
    """People who do on one server what people can do, by chance; `counts`: {act: {status: n}}.

    `seen`: `Rows` as they were now and then."""

    def __init__(self, server, upstream, seed):
        self.server, self.upstream, self.seed = server, upstream, seed
        self.counts = collections.defaultdict(collections.Counter)
        self.seen = []
        self.marks = itertools.count()
        for name in MIRRORED:
            for version in ("1.0", "2.1"):
                upstream.publish(wheel(name, version, summary="upstream's"))
            upstream.publish(sdist(name, "1.0", summary="upstream's"))
        upstream.publish(wheel("mirrored", "3.0"), yanked="broken", requires_python=">=3.7")

    def settle(self):
        """The users and indexes that stay; ada/stable and bob/prod are not volatile."""
        server = self.server
        server.login("root")
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(server.add_user, USERS))
            list(pool.map(server.login, USERS))
        server.add_mirror("root/mirror", self.upstream)
        for path in STAGES:
            server.add_index(path, acl_upload=WHO_MAY, bases=["root/mirror"] * (path == "bob/dev"),
                             volatile=path not in ("ada/stable", "bob/prod"))
        return self

    def look(self):
        self.seen.append(rows_of(self.server.directory, MIRRORS))

    def tour(self, acts=None):
        """Each act once with success at least."""
        player = Player(self, self.seed)
        for act in acts or player.acts:
            for _ in range(200):
                if player.play(act) in (200, 201):
                    break
                player.play("upload")       # there may be nothing to do it with,
                player.play()               # or all is archived, or not volatile
            else:
                raise AssertionError("%s never succeeds: %s" % (act, self.counts[act]))

    def alone(self, moves, looks=0):
        player = Player(self, self.seed + 1)
        for number in range(moves):
            player.play()
            if looks and number % (moves // looks) == 0:
                self.look()

    def together(self, players, moves):
        def run(number):
            player = Player(self, (self.seed + 2) * 1000 + number, is_alone=False)
            for _ in range(moves):
                player.play()
        with ThreadPoolExecutor(players) as pool:
            for done in [pool.submit(run, number) for number in range(players)]:
                done.result()

    def close(self):
        """Something of everything is there in the end."""
        self.tour(["upload", "attest", "documents", "result", "yank_file", "withdraw",
                   "push_mirrored", "mark", "configure"])


class Player:
    """One of the crowd.  One who is not alone changes no password: the others would not know it."""

    once = ("password",)
    acts = (
        "make_user", "change_user", "password", "delete_user", "make_index", "change_index",
        "edit_index", "delete_index", "register", "upload", "attest", "documents", "result",
        "result_of_nobody", "yank_file", "unyank_file", "yank_release", "unyank_release", "mark",
        "configure", "push", "push_part", "push_mirrored", "withdraw", "remove_file", "remove_attached",
        "remove_version", "remove_project", "read_mirror", "forget_mirrored", "turn_mirror")
    often = {"upload": 10, "push": 4, "documents": 3, "result": 5, "yank_file": 3, "attest": 2,
             "change_index": 2, "register": 2, "read_mirror": 3, "push_mirrored": 2,
             "password": 0.3, "delete_user": 0.5, "remove_project": 0.7, "delete_index": 0.7}

    def __init__(self, crowd, seed, is_alone=True):
        self.crowd, self.server, self.random = crowd, crowd.server, random.Random(seed)
        self.choices = [act for act in self.acts if is_alone or act not in self.once]
        self.weights = [self.often.get(act, 1) for act in self.choices]

    def play(self, act=None):
        """One act; returns the status, None if there was nothing to do it with."""
        act = act or self.random.choices(self.choices, self.weights)[0]
        self.user = self.pick(*USERS, *USERS, "root", self.pick(*GUESTS))
        self.index, self.project, self.version = self.pick(*STAGES, self.pick(*PASSING)), \
            self.pick(*PROJECTS), self.pick(*VERSIONS)
        reply = getattr(self, act)()
        if reply is None:
            self.crowd.counts[act][None] += 1
            return None
        assert reply.status < 500 or reply.status == 503, (act, reply, self.server.output()[-3000:])
        self.crowd.counts[act][reply.status] += 1
        return reply.status

    # -- by chance

    def pick(self, *choices):
        return self.random.choice(choices)

    def mark_(self):
        """Another text each time."""
        return "summary %d.%d" % (self.crowd.seed, next(self.crowd.marks))

    def row(self, condition, *values):
        """Names of a row of files of a stage that meets the condition: a dict, or None."""
        with database(self.server.directory) as db:
            found = db.execute(
                "SELECT users.name || '/' || indexes.name AS index_path, projects.name AS project, "
                "files.* FROM files JOIN projects ON projects.id = project_id JOIN indexes ON "
                "indexes.id = files.index_id JOIN users ON users.id = user_id "
                "WHERE release_id IS NOT NULL AND " + condition, values).fetchall()
        return dict(self.random.choice(found)) if found else None

    # -- asking

    def ask(self, method, path, body=None, by=None, **options):
        """As the player's user, or as `by`; "": as nobody."""
        user = self.user if by is None else by
        if user in GUESTS:
            options["password"] = "pw"
        return self.server.request(method, "/" + path, body, user=user or None, **options)

    def form(self, index, fields, files):
        body, content_type = multipart(fields, files)
        return self.ask("POST", index + "/", body, headers={"Content-Type": content_type})

    # -- users

    def make_user(self):
        return self.ask("PUT", self.pick(*GUESTS), by="root", body={
            "password": "pw", "email": self.pick("a@example.com", ""), "title": self.pick(*TEXTS),
            "custom_data": self.pick(*DATA)})

    def change_user(self):
        key = self.pick("title", "email", "description", "custom_data")
        value = self.pick(*DATA) if key == "custom_data" else self.pick(*TEXTS)
        return self.ask("PATCH", self.pick(*USERS, *GUESTS), {key: value})

    def password(self):
        user = self.pick(*USERS, "root")
        password = "secret %d" % next(self.crowd.marks)
        reply = self.ask("PATCH", user, {"password": password}, by=self.pick(user, "root"))
        if reply.status == 200:
            self.server.passwords[user] = password
            self.server.login(user)
        return reply

    def delete_user(self):
        name = self.pick(*GUESTS)
        return self.ask("DELETE", name + self.pick("", "?force", "?force"),
                        by=self.pick("root", name))

    # -- indexes

    def config(self):
        """Some of an index's configuration."""
        everything = {
            "title": self.pick(*TEXTS), "description": self.pick(*TEXTS),
            "custom_data": self.pick(*DATA), "volatile": self.pick(*[True] * 7, False),
            "bases": self.random.sample([*STAGES, "root/mirror", "ada/turn"], self.pick(0, 1, 2)),
            "acl_upload": self.pick(WHO_MAY, WHO_MAY, [*USERS], ["ada", "nobody", *GUESTS]),
            "acl_toxresult_upload": self.pick([":ANONYMOUS:"], [":AUTHENTICATED:"], ["bob"]),
            "acl_pkg_read": self.pick(None, [":ANONYMOUS:"], [":AUTHENTICATED:"], ["bob", "guest"]),
            "mirror_whitelist": self.pick([], ["*"], ["delta"]),
            "mirror_whitelist_inheritance": self.pick("union", "intersection"),
            "webhook_url": self.pick(None, ["http://127.0.0.1:9/hook"]),
            "webhook_events": self.pick(None, ["docs", "delete"]),
            "webhook_secret": self.pick(None, "hush"),
            "uploadtrigger_jenkins": self.pick(None, None, "http://127.0.0.1:9/job/{pkgname}")}
        return {key: everything[key] for key in
                self.random.sample(sorted(everything), self.pick(1, 2, 5))}

    def make_index(self):
        path = self.pick(*PASSING, *STAGES)
        owner = path.partition("/")[0]
        body = {"acl_upload": WHO_MAY, **self.config()}
        if path == "visitor/cache" or path == "ada/turn" and self.pick(True, False):
            body = {"type": "mirror", "mirror_url": self.crowd.upstream.url, "title": "turned"}
        body.setdefault("volatile", True)
        body = {key: value for key, value in body.items() if value is not None}
        return self.ask("PUT", path, body, by=self.pick(owner, owner, owner, self.user))

    def change_index(self):
        body, path = self.config(), self.pick(self.index, self.pick(*PASSING))
        if path in STAGES:              # these stay what they are made for
            body.pop("volatile", None)
            body.pop("acl_upload", None)
        return self.ask("PATCH", path, body,
                        by=self.pick(path.partition("/")[0], "root", self.user))

    def edit_index(self):
        edits = self.pick(["bases+=bob/dev"], ["bases-=bob/dev"], ["title=edited", "description-="],
                          ["acl_toxresult_upload=:ANONYMOUS:", "mirror_whitelist+=delta"],
                          ["webhook_url-="], ["custom_data-="])
        path = self.pick(self.index, self.pick(*PASSING))
        if path in PASSING:
            edits = self.pick(edits, ["volatile=True"])
        return self.ask("PATCH", path, edits, by=self.pick(path.partition("/")[0], "root"))

    def delete_index(self):
        path = self.pick(*PASSING)
        return self.ask("DELETE", path + self.pick("", "?force"),
                        by=self.pick(path.partition("/")[0], "root", self.user))

    def turn_mirror(self):
        """Another place of the mirror's upstream, which is the same for all that it says."""
        return self.ask("PATCH", "root/mirror", by="root", body={
            "title": self.mark_(),
            "mirror_url": self.crowd.upstream.url.rstrip("/") + "/" * self.pick(0, 1)})

    # -- releases

    def register(self):
        metadata = {"summary": self.mark_(), "keywords": self.pick("", "one two"),
                    "classifiers": self.pick([], ["A :: B", "C"]), "odd_field": "kept",
                    "description": self.text(), "requires_dist": ["alpha>=1"]}
        return self.form(self.index, {":action": "submit", "name": self.spelled(self.project),
                                      "version": self.version, **metadata}, {})

    def text(self):
        """For a form: also bytes that are no UTF-8."""
        texts = (text.encode("utf-8", "surrogatepass") for text in TEXTS)
        return self.pick(b"caf\xe9 \xff", b"a long README " * 10000, *texts)

    def spelled(self, project):
        return self.pick(project, project, project.upper(), normal_name(project))

    def upload(self, more=None):
        """Some other bytes under a name that may be there; now and then the same; now and then what
        upstream has."""
        make = self.pick(wheel, wheel, sdist)
        if self.random.random() < 0.1:
            archive = make("mirrored", "1.0", summary="upstream's")
        else:
            archive = make(
                self.project, self.version, requires_python=self.pick(None, ">=3.6"),
                requires_dist=self.pick((), ("alpha>=1", "x; python_version<'3'")),
                summary=self.pick("summary", "summary", self.mark_()))
        fields = {":action": "file_upload", **archive.fields, "sha256_digest": archive.sha256,
                  "description": self.pick("", "alpha readme"), **(more or {}),
                  "name": self.spelled(archive.name)}
        if archive.version == "2.0rc1":     # the same file may be of a release that is spelled so
            fields["version"] = self.pick("2.0rc1", "2.0-RC1")
        return self.form(self.index, fields, {"content": (archive.filename, archive.content)})

    def attest(self):
        text = json.dumps([{"version": 1, "mark": self.mark_()}], indent=1)
        self.index = self.pick("ada/dev", "bob/dev", "mia/x")
        return self.upload({"attestations": text})

    def documents(self):
        fields = {":action": "doc_upload", "name": self.spelled(self.project)}
        if self.pick(True, True, False):
            fields["version"] = self.version
        content = documentation(self.pick("alpha", "alpha", self.mark_()))
        return self.form(self.index, fields, {"content": ("docs.zip", content)})

    def result(self, by=None):
        file = self.row("kind = 'releasefile'")
        return file and self.ask("POST", "%(index_path)s/%(path)s" % file, by=by, body=json.dumps(
            {"testenvs": {}, "mark": self.pick("same", self.mark_())}),
            headers={"Content-Type": JSON})

    def result_of_nobody(self):
        return self.result(by="")

    # -- yanks and statuses

    def yank_file(self):
        file = self.row("kind = 'releasefile'")
        return file and self.ask("PATCH", "%(index_path)s/%(path)s?yank=" % file
                                 + self.pick("", "broken", "it%20is%20%22bad%22"))

    def unyank_file(self):
        file = self.row("yanked IS NOT NULL")
        return file and self.ask("PATCH", "%(index_path)s/%(path)s?unyank" % file)

    def yank_release(self, yanked=None):
        file = self.row("kind = 'releasefile'" if yanked is None else "yanked IS NOT NULL")
        reason = self.pick(True, "all of it") if yanked is None else yanked
        return file and self.ask("PATCH", "%(index_path)s/%(project)s/%(version)s" % file,
                                 {"yanked": reason})

    def unyank_release(self):
        return self.yank_release(False)

    def mark(self):
        status = {"status": self.pick(*STATUSES)}
        if self.pick(True, False):
            status["reason"] = self.pick("because", "", "na \u00fc")
        return self.ask("PATCH", "%s/%s" % (self.index, self.project), {"project-status": status})

    def configure(self):
        return self.ask("PATCH", "%s/%s" % (self.index, self.project), self.pick(
            {}, {"inheritance_rules": "allow all"}, ["inheritance_rules-="]))

    # -- pushes

    def push(self, **part):
        file = self.row("kind = 'releasefile'")
        return file and self.ask("PUSH", file["index_path"], {
            "name": file["project"], "version": file["version"], **part,
            "targetindex": self.pick(*STAGES, self.pick(*PASSING))})

    def push_part(self):
        return self.push(**{self.pick("no_docs", "only_docs"): True})

    def push_mirrored(self):
        return self.ask("PUSH", "root/mirror", {
            "name": self.pick(*MIRRORED), "version": self.pick("1.0", "2.1"),
            "targetindex": self.index})

    # -- removal

    def withdraw(self):
        """A file goes whose name people will remember."""
        file = self.row("kind = 'releasefile'")
        if file is None:
            return None
        reply = self.ask("DELETE", "%(index_path)s/%(path)s?force" % file)
        if reply.status == 200:
            self.ask("DELETE", "%(index_path)s/%(path)s?force" % file)      # 410
        return reply

    def remove_file(self):
        file = self.row("kind = 'releasefile'")
        return file and self.ask("DELETE", "%(index_path)s/%(path)s" % file
                                 + self.pick("", "?force"))

    def remove_attached(self):
        file = self.row("kind != 'releasefile'")
        return file and self.ask("DELETE", "%(index_path)s/%(path)s" % file
                                 + self.pick("", "?force"))

    def remove_version(self):
        file = self.row("1")
        return file and self.ask("DELETE", "%(index_path)s/%(project)s/%(version)s" % file
                                 + self.pick("", "?force"))

    def remove_project(self):
        return self.ask("DELETE", "%s/%s" % (self.index, normal_name(self.project))
                        + self.pick("", "?force"))

    # -- the mirror

    def read_mirror(self):
        index, project = self.pick("bob/dev", *MIRRORS), self.pick(*MIRRORED)
        page = "%s/+simple/%s/" % (index, project)
        reply = self.ask("GET", page, headers={"Accept": SIMPLE_JSON}, by="root")
        files = reply.json()["files"] if reply.status == 200 else []
        if files:
            url = urllib.parse.urljoin("/" + page, self.pick(*files)["url"].partition("#")[0])
            self.ask("GET", url[1:] + self.pick("", "", ".metadata"), headers={"Accept": ANY},
                     by="root")
        return reply

    def forget_mirrored(self):
        """A copy that a mirror has is deleted; upstream has it still."""
        project = self.pick(*MIRRORED)
        page = "root/mirror/+simple/%s/" % project
        self.ask("GET", page, headers={"Accept": SIMPLE_JSON}, by="root")
        if self.pick(True, False):
            return self.ask("DELETE", "root/mirror/%s/1.0" % project, by="root")
        return self.ask("DELETE", "root/mirror/%s" % project, by="root")


# -- the command ----------------------------------------------------------------------------------


class _Nursery:
    """A process that has imported the program; each run is a fork of it, which is most of the time
    that a start takes."""

    _PROGRAM = """if True:
        import importlib.machinery, importlib.util, json, os, sys
        loader = importlib.machinery.SourcelessFileLoader("devpi_lite", sys.argv[1])
        spec = importlib.util.spec_from_file_location("devpi_lite", sys.argv[1], loader=loader)
        program = sys.modules["devpi_lite"] = importlib.util.module_from_spec(spec)
        loader.exec_module(program)
        for line in sys.stdin:
            arguments, *files = json.loads(line)
            pid = os.fork()
            if pid == 0:
                sys.argv[1:] = arguments
                for number, file in enumerate((os.devnull, *files)):
                    os.dup2(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), number)
                sys.exit(program.main(arguments))
            print(os.waitpid(pid, 0)[1], flush=True)"""

    def __init__(self):
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix="devpi_lite-"))
        atexit.register(shutil.rmtree, str(self._folder), True)
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._PROGRAM, str(PROGRAM)], env=clean_environment(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True)
        self._numbers = itertools.count()

    def run(self, *arguments):
        files = [self._folder / ("%d.%s" % (next(self._numbers), name)) for name in ("out", "err")]
        job = [[str(argument) for argument in arguments], *map(str, files)]
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        return subprocess.CompletedProcess(arguments, code, *(file.read_text() for file in files))


@functools.lru_cache(maxsize=None)
def _nursery():
    return _Nursery()


def run(*arguments):
    """The same as harness.run_command, faster where processes can fork."""
    return _nursery().run(*arguments) if os.name == "posix" else run_command(*arguments)


# -- copies and damage ----------------------------------------------------------------------------


def copied(source, target):
    """A copy of a server directory whose server may run: database, files, secret."""
    source, target = pathlib.Path(source), pathlib.Path(target)
    target.mkdir(mode=0o700, parents=True)
    with database(source) as db, \
            contextlib.closing(sqlite3.connect(str(target / "devpi_lite.db"))) as other:
        db.backup(other)
    for name, path in blobs_of(source).items():
        copy = target / "files" / name[:2] / name
        copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    take_secret(source, target)
    return target


def take_secret(source, target):
    secret = pathlib.Path(target) / ".secret"
    secret.write_bytes((pathlib.Path(source) / ".secret").read_bytes())
    secret.chmod(0o600)


def damages(db, seed):
    """Yield (table, what) for each kind of damage that one row can have, done to the database while
    the caller looks; then it is undone."""
    chance = random.Random(seed)
    db.execute("PRAGMA foreign_keys = OFF")
    of_stages = {"projects": "index_id IN (%s)", "files": "index_id IN (%s)",
                 "releases": "project_id IN (SELECT id FROM projects WHERE index_id IN (%s))",
                 "attestations": "file_id IN (SELECT id FROM files WHERE index_id IN (%s))",
                 "metadata_files": "sha256 IN (SELECT metadata_sha256 FROM files "
                                   "WHERE index_id IN (%s))"}
    stages = "SELECT id FROM indexes WHERE instr(config, '\"type\": \"stage\"')"

    def do(table, what, *statements):
        db.execute("BEGIN")
        for statement, *values in statements:
            db.execute(statement, values)
        yield table, what
        db.execute("ROLLBACK")
    for table in PEOPLE:
        where = of_stages.get(table, "1").replace("%s", stages)
        if table == "gone":
            where = " AND ".join("path NOT LIKE '%s/%%'" % path for path in MIRRORS)
        key = "id" if table in ORDERED else PEOPLE[table][0]
        found = db.execute("SELECT %s FROM %s WHERE %s" % (key, table, where)).fetchall()
        assert found, "nothing in %s to damage" % table
        keys = [row[0] for row in found]
        yield from do(table, "deleted", (
            "DELETE FROM %s WHERE %s = ?" % (table, key), chance.choice(keys)))
        for column in db.execute("PRAGMA table_info(%s)" % table).fetchall():
            name = column["name"]
            if name == "id":
                continue
            row = chance.choice(keys)
            if name == "packed":
                value = "CAST(x'%s' AS BLOB)" % zlib.compress(b"other").hex()
            elif name == "piece":
                value = "CAST(piece || ' ' AS BLOB)"
            elif table == "files" and name in ("for_id", "release_id"):
                condition, value = " AND %s IS NOT NULL" % name, "NULL"
                row = db.execute("SELECT id FROM files WHERE " + where + condition).fetchone()[0]
            elif name.endswith("_id"):
                continue        # the row would be another's: as if deleted
            else:
                value = "CASE WHEN typeof({0}) IN ('integer', 'real') THEN {0} + 1 ELSE " \
                        "coalesce({0}, '') || ' ' END".format(name)
            yield from do(table, name, ("UPDATE %s SET %s = %s WHERE %s = ?" % (
                table, name, value, key), row))
        if table in ORDERED:
            parent = ORDERED[table] or "NULL"
            pairs = db.execute("SELECT min(id), max(id) FROM {0} WHERE {1} GROUP BY {2} HAVING "
                               "count(*) > 1".format(table, where, parent)).fetchall()
            assert pairs, "nowhere two %s whose order could change" % table
            one, other = chance.choice(pairs)
            users = [(other_table, row["from"]) for other_table in PEOPLE for row in
                     db.execute("PRAGMA foreign_key_list(%s)" % other_table)
                     if row["table"] == table] + [(table, "id")]
            yield from do(table, "order", *(
                ("UPDATE {0} SET {1} = CASE {1} WHEN ? THEN ? ELSE ? END WHERE {1} IN (?, ?)"
                 .format(place, column), one, -other, -one, one, other)
                for place, column in users), *(
                ("UPDATE {0} SET {1} = -{1} WHERE {1} < 0".format(place, column),)
                for place, column in users))
