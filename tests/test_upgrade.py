"""A directory that an older release left is brought up by a start, and nothing in it is lost.

`tests/data/server_of_schema_N.zip` were made by released programs; how, and what is in them, says
make_server_directory.py beside them.
"""

import contextlib
import json
import pathlib
import re
import signal
import sqlite3
import zipfile

import pytest
from harness import Server, eventually, patched, run_command, sdist, serial, upload, wheel

import devpi_lite as d
import replay
from replay import PEOPLE, Rows, breaks, database, differences, log_of, rows_of

ARCHIVES = {int(path.stem.rpartition("_")[2]): path
            for path in pathlib.Path(__file__).parent.glob("data/server_of_schema_*.zip")}
MIRROR = "root/mirror"
OFFLINE = "--offline-mode"      # the upstream is not there any more

# What an answer may say otherwise after the upgrade.  Headers: of which change and which server it
# is, and by which release.
OTHER_HEADERS = {"x-devpi-serial", "etag", "server", "x-devpi-server-version"}
# Keys of JSON, wherever they stand.
OTHER_KEYS = {"last_serial", "_last-serial"}
# Before schema 6, pages had other headers for caches, ...
OTHER_HEADERS_BEFORE_6 = {"cache-control", "expires", "last-modified", "pragma"}
# ... and in offline mode mirrors listed what is not here, too, or 502 was said of a project that
# upstream might have.
ON_MIRRORS = {"mirrored", "elsewhere", "forgotten", "withheld"}
# Kinds of op that entries of the changelog had until schema 7, in place of whole rows.
OLD_OPS = {"yank", "attestations", "mirrored release"}


@pytest.fixture(scope="module", params=sorted(ARCHIVES), ids="schema {}".format)
def old(request):
    return Old(request.param)


class Old:
    """What the older release left and answered."""

    def __init__(self, schema):
        self.schema = schema
        with zipfile.ZipFile(ARCHIVES[schema]) as archive:
            about, said = (json.loads(archive.read(name), object_hook=bytes_again)
                           for name in ("about.json", "answers.json"))
        assert about["schema"] == schema
        self.passwords, self.tables = about["passwords"], said["tables"]
        self.rows = Rows(
            said["serial"],
            {table: {tuple(key): {column: tuples(value) for column, value in values.items()}
                     for key, values in rows} for table, rows in said["tables"].items()},
            {tuples(place): list(tuples(names)) for place, names in said["orders"]})
        # {user: {(method, path, Accept, body): (status, headers, body)}}
        self.seen = {}
        self.other_headers = OTHER_HEADERS | (OTHER_HEADERS_BEFORE_6 if schema < 6 else set())
        for user, view, status, content in said["seen"]:
            if schema >= 6 or status != 502 and not is_of_mirrors(view[1]):
                headers, body = said["contents"][content]
                headers = list(tuples(headers))
                self.seen.setdefault(user, {})[tuple(view)] = status, headers, body

    def unpack(self, folder):
        with zipfile.ZipFile(ARCHIVES[self.schema]) as archive:
            archive.extractall(str(folder), [
                name for name in archive.namelist() if name.startswith("server/")])
        directory = pathlib.Path(folder, "server")
        directory.chmod(0o700)
        for path in directory.rglob("*"):
            path.chmod(0o700 if path.is_dir() else 0o600)
        return directory


def is_of_mirrors(path):
    """Whether an answer speaks of projects of the mirror, or may; not one that is a file."""
    return "/+f/" not in path and (path.startswith("/" + MIRROR) or path.endswith("/+simple/")
                                   or bool(ON_MIRRORS & set(path.split("/"))))


def bytes_again(value):
    return value["bytes"].encode("latin-1") if set(value) == {"bytes"} else value


def tuples(value):
    return tuple(map(tuples, value)) if isinstance(value, list) else value


class State:
    """What a directory holds, and what its running server shows to those whom `old.seen` names."""

    def __init__(self, server, old, users=("root", "bob", None)):
        server.passwords.update(old.passwords)
        for user in users:
            if user and user not in server.tokens:
                server.login(user)
        eventually(lambda: replay.is_settled(server))
        self.seen = {user: replay.shown_by(server, old.seen[user], user) for user in users}
        self.rows = rows_of(server.directory, [MIRROR])
        self.log, self.node = log_of(server.directory), node_of(server.directory)
        self.schema = schema_of(server.directory / "devpi_lite.db")
        self.copies = copies_in(server.directory)


def schema_of(path):
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        return db.execute("PRAGMA user_version").fetchone()[0]


def node_of(directory):
    with database(directory) as db:
        return dict(map(tuple, db.execute("SELECT key, value FROM node")))


def copies_in(directory):
    """{name: content} of what was put aside."""
    return {path.name: path.read_bytes() for path in directory.glob("*.bak*")}


class Upgraded:
    """A directory before the present program was started on it, after the first start and after the
    second, whose server runs."""

    def __init__(self, old, folder):
        self.directory = old.unpack(folder)
        self.log, self.node = log_of(self.directory), node_of(self.directory)
        self.server = Server(self.directory, OFFLINE).start()
        try:
            self.first = State(self.server, old)
            assert self.server.stop() == 0
            tokens, self.server = self.server.tokens, Server(self.directory, OFFLINE).start()
            self.server.tokens = tokens         # sessions last
            self.second = State(self.server, old, ("bob", None))
        except BaseException:
            self.close()
            raise

    def close(self):
        if self.server.running:
            self.server.kill()


@pytest.fixture(scope="module")
def upgraded(old, tmp_path_factory):
    made = Upgraded(old, tmp_path_factory.mktemp("upgraded"))
    yield made
    made.close()


# -- what people put in ---------------------------------------------------------------------------


def put_in(rows, tables):
    """The `Rows` in a form that no release has changed: of tables and columns those that were there
    when `tables` was read, and a release's metadata as they came."""
    found = {table: {} for table in PEOPLE}
    for table, those in tables.items():
        columns = {column for _, values in those for column in values}
        found[table] = {key: {column: values.get(column) for column in columns}
                        for key, values in rows.tables[table].items()}
    for key, values in found["releases"].items():
        metadata = json.loads(values["metadata"])
        if "readmes" not in tables and key in rows.tables.get("readmes", ()):
            metadata["description"] = json.loads(rows.tables["readmes"][key]["piece"])
        for field in set(metadata.get("other", ())) & d.FORM_ONLY:
            del metadata["other"][field]
        values["metadata"] = metadata
    return rows._replace(tables=found)


def test_no_row_of_peoples_is_lost_or_changed(old, upgraded):
    assert {"users", "indexes", "projects", "releases", "files", "gone", "withdrawn"} <= {
        table for table, rows in old.tables.items() if rows}
    now = put_in(upgraded.first.rows, old.tables)
    assert differences(put_in(old.rows, old.tables), now) == []


def test_the_schema_is_that_of_a_new_server(upgraded):
    with database(upgraded.directory) as db:
        assert not any(d.schema_faults(db))


def test_what_was_read_is_answered_as_before(old, upgraded):
    found = []
    for user, views in old.seen.items():
        for view, answer in views.items():
            for line in unlike(answer, upgraded.first.seen[user][view], old.other_headers):
                found.append("%s as %s: %s" % (" ".join(view[:3]), user, line))
    assert found == []


def unlike(then, now, other_headers):
    """What an answer has lost or says otherwise, a line each; more headers and keys may be."""
    (status, headers, body), (new_status, new_headers, new_body) = then, now
    if status != new_status:
        yield "status %d, not %d: %s" % (new_status, status, replay.shown(new_body))
        return
    for name, value in headers:
        # pages as JSON are the same for all programs
        if (name, value) == ("vary", "Accept, Accept-Encoding, User-Agent") and ("vary", "Accept, Accept-Encoding") in new_headers:
            continue
        if name not in other_headers and (name, value) not in new_headers:
            yield "no header %s: %s in %s" % (name, value, new_headers)
    # simple pages had two names for one thing, and pages of documentation have a script since then
    body = re.sub(rb' data-dist-info-metadata="[^"]*"', b"", body)
    if body in (new_body, re.sub(rb"(?s)<script>for\(const n of.*?</script>", b"", new_body, count=1)):
        return
    if "json" in dict(headers)["content-type"]:
        yield from lost(json.loads(body), json.loads(new_body))
    else:
        yield "%s, not %s" % (replay.shown(new_body), replay.shown(body))


def lost(then, now, place=""):
    if isinstance(then, dict) and isinstance(now, dict):
        for key in set(then) - OTHER_KEYS:
            if key not in now or key == "features" and not set(then[key]) <= set(now[key]):
                yield "no %s/%s" % (place, key)
            elif key == "features":
                pass        # there may be more
            else:
                yield from lost(then[key], now[key], "%s/%s" % (place, key))
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for number, (one, other) in enumerate(zip(then, now)):
            yield from lost(one, other, "%s/%d" % (place, number))
    elif then != now:
        yield "%s is %s, not %s" % (place, replay.shown(now), replay.shown(then))


def test_passwords_are_those_that_people_had_last(old, upgraded):
    for user in ("alice", "carol"):     # root and bob are logged in already
        upgraded.server.login(user, old.passwords[user])
    for password in ("bob's first", old.passwords["alice"]):
        assert upgraded.server.post("/+login", {"user": "bob", "password": password}).status == 401


def test_releases_can_be_uploaded_and_refused_as_before(old, upgraded):
    server, before = upgraded.server, upgraded.first.rows.serial
    server.passwords.update(old.passwords)
    archive = wheel("alpha", "3.0")
    upload(server, "alice/dev", archive)
    assert server.fetch("alice/dev", archive.filename, "alpha") == archive.content
    assert serial(server) > before
    archived, released = wheel("beta_two", "0.3"), wheel("alpha", "1.0", summary="other bytes")
    deleted = sdist("epsilon", "1.0", summary="other bytes")        # its name stays alice's
    for user, index, other, status in (
            ("alice", "alice/dev", archived, 403), ("alice", "alice/stable", released, 409),
            ("bob", "alice/stable", deleted, 409),
            ("carol", "alice/dev", wheel("new", "1.0"), 403)):
        reply = server.upload(index, other, user=user)
        assert reply.status == status, (other.filename, reply)
    log = log_of(server.directory)
    assert breaks(log, log[0].serial, log[0].prev) == []


# -- how it is done -------------------------------------------------------------------------------


def test_a_copy_is_put_aside_where_the_schema_rises(old, upgraded, tmp_path):
    assert upgraded.first.schema == d.schema_version()
    if d.schema_version() == old.schema:
        assert upgraded.first.copies == {}
        return
    name = "devpi_lite.db.bak-%d" % old.schema
    assert set(upgraded.first.copies) == {name}
    assert schema_of(upgraded.directory / name) == old.schema
    as_it_was = old.unpack(tmp_path) / "devpi_lite.db"
    assert whole(upgraded.directory / name) == whole(as_it_was)


def whole(path):
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        return list(db.iterdump())


def test_the_changelog_stays_one_chain_and_goes_on(old, upgraded):
    log, known = upgraded.first.log, {entry.serial: entry.hash for entry in upgraded.log}
    assert breaks(upgraded.log) == [] and upgraded.log[-1].serial == old.rows.serial
    assert breaks(log, log[0].serial, known.get(log[0].serial - 1, b"")) == []
    assert log[-1].serial >= upgraded.log[-1].serial


def test_schema_7_begins_the_changelog_anew(old, upgraded):
    """Whoever follows it from before is to start from the rows."""
    last, (first, *more) = upgraded.log[-1], upgraded.first.log
    assert {op["t"] for entry in upgraded.log for op in entry.list} & OLD_OPS
    assert upgraded.first.schema >= 7
    assert (first.serial, first.prev) == (last.serial + 1, last.hash) and not more
    assert not {op["t"] for op in first.list} & OLD_OPS
    assert upgraded.first.node["epoch"] != upgraded.node["epoch"]
    assert upgraded.first.node["uuid"] == upgraded.node["uuid"]


def test_another_start_changes_nothing(upgraded):
    first, second = upgraded.first, upgraded.second
    assert differences(first.rows, second.rows) == []
    assert (second.log, second.node, second.schema) == (first.log, first.node, first.schema)
    assert second.copies == first.copies
    for user, seen in second.seen.items():
        assert replay.unlike(first.seen[user], seen) == []


KILLED = (-signal.SIGKILL,) if hasattr(signal, "SIGKILL") else (signal.SIGTERM,)

# The program, which the power leaves at the moment that the environment names.
DIES = """
import os, signal

def die():
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

def replace(source, target, of_os=os.replace):
    if ".bak-" in str(target) and moment == "before the copy":
        die()
    of_os(source, target)
    if ".bak-" in str(target) and moment == "after the copy":
        die()

def dying(version, sql, step):
    def do(db, sql):
        step(db, sql)
        if moment == "step to %d" % version:
            die()
    return sql, do

moment = os.environ["MOMENT"]
os.replace = replace
for version, step in devpi_lite.MIGRATIONS.items():
    devpi_lite.MIGRATIONS[version] = dying(version, *step)
"""


def test_an_upgrade_that_is_cut_off_is_done_by_the_next_start(old, upgraded, tmp_path):
    directory, script = old.unpack(tmp_path), patched(tmp_path, DIES)
    steps = range(old.schema + 1, d.schema_version() + 1)
    moments = {"before the copy": old.schema, "after the copy": old.schema,
               **{"step to %d" % version: version - 1 for version in steps}} if steps else {}
    for moment, schema in moments.items():
        done = run_command("--serverdir", directory, "--port", "0", OFFLINE, script=script,
                           env={"MOMENT": moment}, timeout=20)
        assert done.returncode in KILLED, (moment, done)
        assert schema_of(directory / "devpi_lite.db") == schema, moment
    server = Server(directory, OFFLINE).start()
    try:
        now, wanted = State(server, old, [None]), upgraded.first
    finally:
        server.kill()
    assert differences(wanted.rows, now.rows) == []
    assert now.schema == wanted.schema and now.node["uuid"] == wanted.node["uuid"]
    assert now.node["epoch"] not in (upgraded.node["epoch"], wanted.node["epoch"])
    for view, answer in wanted.seen[None].items():
        assert list(unlike(answer, now.seen[None][view], OTHER_HEADERS)) == [], view
    assert [entry.serial for entry in now.log] == [entry.serial for entry in wanted.log]
    assert breaks(now.log, now.log[0].serial, now.log[0].prev) == []
    assert not list(directory.glob("*.tmp"))
