"""What a replay refuses, in a line and with nothing changed; and what it takes although much of the
source is amiss.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
import zlib

import pytest
from harness import (
    documentation, patched, path_of, run_command, serial, upload, upload_docs, wheel)
from test_offline import SENTENCE, content, wrapper

import devpi_lite as d
import replay
from replay import log_of, rows_of

USER = {"pwhash": None, "generation": "a", "created": "2020-01-01T00:00:00Z", "modified": None,
        "attributes": {}}
HERE = [wheel("here", version) for version in ("1", "2", "3", "4")]


@pytest.fixture(scope="module")
def told(shared_server, tmp_path_factory):
    """(a server directory with a history; a serial in the middle of it)."""
    server = shared_server
    server.add_user("ada")
    server.add_index("ada/dev")
    upload(server, "ada/dev", *HERE[:2])
    middle = serial(server)
    upload(server, "ada/dev", *HERE[2:])
    upload_docs(server, "ada/dev", documentation("here", "1"))
    server.add_user("bob")
    return replay.copied(server.directory, tmp_path_factory.mktemp("told") / "source"), middle


@pytest.fixture
def source(told, tmp_path):
    """A copy of it for one test alone."""
    return copy_of(told[0], tmp_path / "source")


def copy_of(directory, target):
    shutil.copytree(str(directory), str(target))
    return target


def change(directory, *statements):
    """Runs SQL statements in the database, each with its values or without."""
    path = str(directory / "devpi_lite.db")
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for statement in statements:
            db.execute(*([statement] if isinstance(statement, str) else statement))
    return directory


def cut(directory, first=None):
    """Lets go of the changelog before an entry, by default the newest."""
    first = log_of(directory)[-1].serial if first is None else first
    return change(directory, ("DELETE FROM changelog WHERE serial < ?", (first,)))


def opened(directory):
    """Its `Store`, for what a server or a command would do there."""
    d.prepare_directory(str(directory))
    return contextlib.closing(d.Store(d.Settings(str(directory)), create=True))


def own_change(directory, name="zoe"):
    """Makes a user there, or changes the user's attributes."""
    with opened(directory) as store:
        store.write(lambda change: change.put("user", (name,), {
            **USER, "attributes": {"title": str(store.serial)}}))


def begin_anew(directory):
    """The program of now begins the changelog anew, as of a directory that one of before left."""
    known = log_of(directory)[-1]
    change(directory, *("DROP TABLE IF EXISTS " + table for table in ("gone_cached", "wanted", "cut_entries", "history", "arrivals")),
           "PRAGMA user_version = 6")
    own_change(directory)
    assert (log_of(directory)[0].serial, log_of(directory)[0].prev) == (
        known.serial + 1, known.hash)
    return directory


def facts_of(directory):
    """All that a replay may change."""
    if not (directory / "devpi_lite.db").exists():
        return None
    with replay.database(directory) as db:
        node = sorted(map(tuple, db.execute("SELECT key, value FROM node")))
    return rows_of(directory), log_of(directory), node, sorted(replay.blobs_of(directory))


def is_empty(directory):
    """Whether nothing has been replayed into it."""
    return not (directory / "devpi_lite.db").exists() or (
        log_of(directory) == [] and not any(rows_of(directory).tables.values())
        and replay.blobs_of(directory) == {})


def replayed(new, old, *options):
    """Replays in this process: (exit status, standard output, what stands on standard error)."""
    command = d.COMMANDS["_replay"]
    with contextlib.redirect_stdout(io.StringIO()) as out, \
            contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            code = command.run(d.parse_options(command, [
                "--serverdir", str(new), str(old), *map(str, options)]))
        except d.FatalError as error:
            code, _ = 1, print(error, file=sys.stderr)
    return code or 0, out.getvalue(), errors.getvalue()


def replay_into(new, old, *options):
    """Replays all; returns what is written to standard output."""
    code, said, errors = replayed(new, old, *options)
    assert (code, errors) == (0, "")
    return said


def refused(new, old, *options, because):
    """Replays, which is refused with a sentence (in which the words stand) and changes nothing."""
    before = facts_of(new)
    code, said, errors = replayed(new, old, *options)
    assert (code, said, len(errors.splitlines())) == (1, "", 1), errors
    assert because in errors
    assert is_empty(new) if before is None else facts_of(new) == before


def same(old, new):
    assert replay.differences(rows_of(old), rows_of(new)) == []
    assert log_of(new)[-1] == log_of(old)[-1]


# -- into what a snapshot goes


@pytest.mark.parametrize("shorten", [cut, begin_anew])
def test_a_snapshot_goes_into_no_directory_with_a_history_of_its_own(
        shorten, source, told, tmp_path):
    """But into one that has followed this source, until it gets a change of its own."""
    own, followed, gone_on = (tmp_path / name for name in ("own", "followed", "gone-on"))
    own_change(own)
    for directory in (followed, gone_on):
        assert "snapshot" not in replay_into(directory, source, "--until", told[1])
    own_change(gone_on)
    for directory in (own, gone_on):
        refused(directory, source, because="another history")
    shorten(source)
    for directory in (own, gone_on):
        refused(directory, source, because="another history")
    for directory in (followed, tmp_path / "fresh"):
        assert replay_into(directory, source).startswith("snapshot: ")
        same(source, directory)

    # whoever has taken a snapshot has followed it, too
    for _ in range(2):
        own_change(source)
    cut(source)
    assert replay_into(followed, source).startswith("snapshot: ")
    same(source, followed)
    own_change(followed)
    for _ in range(3):
        own_change(source)
    cut(source)
    refused(followed, source, because="another history")


def test_a_copy_of_the_source_that_got_a_change_of_its_own_is_not_replaced(source, tmp_path):
    """It has the source's uuid."""
    twin = copy_of(source, tmp_path / "twin")
    for directory in (twin, source, source, source):
        own_change(directory)
    cut(source)
    refused(twin, source, because="another history")


def test_the_last_serial_is_one_to_which_there_is_a_way(source, told, tmp_path):
    """Else the entry of then would stand beside rows of now."""
    middle, last = told[1], log_of(source)[-1].serial
    fresh, behind, there = (tmp_path / name for name in ("fresh", "behind", "there"))
    replay_into(behind, source, "--until", middle - 2)
    replay_into(there, source, "--until", middle)
    for until in (middle - 1, 0, -1):
        refused(there, source, "--until", until, because="to serial %d" % until)

    cut(source, middle)
    for new in (fresh, behind):
        for until in (middle - 1, 0):
            refused(new, source, "--until", until, because="to serial %d" % until)
        for until in (middle, last - 1):
            refused(new, source, "--until", until, because="not at %d" % until)
    refused(there, source, "--until", middle - 1, because="to serial %d" % (middle - 1))
    replay_into(there, source, "--until", middle + 1)
    assert log_of(there)[-1].serial == middle + 1
    for new, until in ((fresh, last), (behind, last + 9)):
        assert replay_into(new, source, "--until", until).startswith("snapshot: ")
        same(source, new)


def test_a_snapshot_takes_any_number_of_mirrors(source, tmp_path):
    config = json.dumps({"type": "mirror", "volatile": True,
                         "mirror_url": "https://pypi.org/simple/"})
    change(cut(source), *(
        ("INSERT INTO indexes (user_id, name, config) SELECT id, ?, ? FROM users "
         "WHERE name = 'ada'", ("m%d" % number, config)) for number in range(1100)))
    assert replay_into(tmp_path / "new", source).startswith("snapshot: ")
    same(source, tmp_path / "new")
    assert len(rows_of(tmp_path / "new").tables["indexes"]) == 1101


# -- who cuts the log


def test_only_a_server_cuts_the_changelog(source, told, tmp_path):
    """Other commands do not know how much of it the server was told to keep."""
    bounded = patched(tmp_path, """
opened = devpi_lite.Store.__init__
def bounded(self, *arguments, **options):
    opened(self, *arguments, **options)
    self.keep_log = devpi_lite.LogBounds(9, 9999)
devpi_lite.Store.__init__ = bounded""")
    before, new = log_of(source), tmp_path / "new"
    done = run_command("passwd", "ada", "--stdin", "--serverdir", source, input="new\n",
                       script=bounded)
    assert done.returncode == 0, done
    assert log_of(source)[:-1] == before
    replay_into(new, source, "--until", told[1])
    done = run_command("_replay", "--serverdir", new, source, script=bounded)
    assert done.returncode == 0, done
    assert log_of(new) == log_of(source)


# -- paths that are gone


def test_paths_that_mirrors_let_go_of_are_no_people_s_data(server, upstream, tmp_path):
    """Nor is lost what was gone from a stage in whose place there is a mirror."""
    old = server.directory
    server.add_user("ada")
    server.add_index("ada/x")
    own, mirrored = wheel("own", "1.0"), upstream.publish("mirrored", "1.0")
    upload(server, "ada/x", own)
    assert server.delete(path_of(own, "ada/x"), user="ada").status == 200
    assert server.delete("/ada/x", user="ada").status == 201
    server.add_mirror("ada/x", upstream)
    assert server.fetch("ada/x", mirrored.filename, "mirrored") == mirrored.content
    assert server.delete(path_of(mirrored, "ada/x"), user="ada").status == 200

    def statuses():
        return [server.get(path_of(archive, "ada/x"), headers={"Accept": "*/*"}).status
                for archive in (own, mirrored)]

    def gone():
        """The paths that are gone in the source and in directories that follow it."""
        for directory in followers:
            replay_into(directory, old)
        return [sorted(rows_of(directory).tables["gone"]) for directory in (old, *followers)]

    def follow_from_here(name):
        """Lets one more directory follow it, from a snapshot on."""
        source = cut(replay.copied(old, tmp_path / ("cut" + name)))
        assert replay_into(tmp_path / name, source).startswith("snapshot: ")
        followers.append(tmp_path / name)

    followers = [tmp_path / "log"]
    path = (path_of(own, "ada/x")[1:],)
    follow_from_here("mirror")
    assert (statuses(), gone()) == ([410, 410], [[path]] * 3)
    assert server.delete("/ada/x", user="ada").status == 201
    follow_from_here("nothing")
    assert (statuses(), gone()) == ([410, 410], [[path]] * 4)

    # a stage again, with the file that the mirror had
    server.add_index("ada/x")
    upload(server, "ada/x", mirrored)
    assert (statuses(), gone()) == ([410, 200], [[path]] * 4)
    assert server.delete(path_of(mirrored, "ada/x"), user="ada").status == 200
    both = sorted([path, (path_of(mirrored, "ada/x")[1:],)])
    assert (statuses(), gone()) == ([410, 410], [both] * 4)
    upload(server, "ada/x", own, mirrored)
    assert (statuses(), gone()) == ([200, 200], [[]] * 4)


def test_a_migration_tells_paths_that_mirrors_let_go_of_from_others(source):
    """One table had both."""
    config = json.dumps({"type": "mirror", "volatile": True,
                         "mirror_url": "https://pypi.org/simple/"})
    change(source,
           ("INSERT INTO indexes (user_id, name, config) SELECT id, 'm', ? FROM users "
            "WHERE name = 'ada'", (config,)),
           "INSERT INTO gone VALUES ('ada/m/+f/1'), ('ada/m2/+f/2'), ('ada/dev/+f/3')")
    begin_anew(source)
    assert sorted(rows_of(source).tables["gone"]) == [("ada/dev/+f/3",), ("ada/m2/+f/2",)]
    with replay.database(source) as db:
        assert [row[0] for row in db.execute("SELECT path FROM gone_cached")] == ["ada/m/+f/1"]


# -- damage


def test_files_that_are_lost_or_damaged_are_named_and_stop_no_other(source, tmp_path):
    blobs, new = replay.blobs_of(source), tmp_path / "new"
    lost, damaged, zip_ = HERE[0].sha256, HERE[2].sha256, documentation("here", "1").sha256
    whole = blobs[damaged].read_bytes()
    kept = {name: blobs[name].read_bytes() for name in (lost, zip_)}
    for name in kept:
        blobs[name].unlink()
    blobs[damaged].chmod(0o600)
    blobs[damaged].write_bytes(whole[:5] + b"x" + whole[6:])
    for _ in range(2):
        done = replay.run("_replay", "--serverdir", new, source)
        *lines, last = done.stderr.splitlines()
        assert (done.returncode, done.stdout) == (1, ""), done
        assert "Traceback" not in done.stderr and last.startswith("fatal: 3 files"), done
        assert {lost, damaged, zip_} == {line.partition(":")[0] for line in lines
                                         if not line.endswith("is lost")}, done
        assert set(replay.blobs_of(new)) == set(blobs) - {lost, damaged, zip_}
        same(source, new)

    blobs[damaged].write_bytes(whole)
    for name, content_ in kept.items():
        blobs[name].write_bytes(content_)
    replay_into(new, source)
    assert set(replay.blobs_of(new)) == set(blobs)


def test_metadata_files_that_are_files_of_their_own_are_copied(source, tmp_path):
    """As in schema version 1."""
    with replay.database(source) as db:
        packed = {row["sha256"]: row["packed"] for row in db.execute(
            "SELECT sha256, packed FROM metadata_files")}
    for sha256, data in packed.items():
        path = source / "files" / sha256[:2] / sha256
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(zlib.decompress(data))
    cut(change(source, "DELETE FROM metadata_files"))
    replay_into(tmp_path / "new", source)
    assert packed and set(packed) <= set(replay.blobs_of(tmp_path / "new"))


def op(kind, *key, **value):
    return {"t": kind, "k": key, "v": value}


UNREADABLE = [
    b"garbage", zlib.compress(b"{nope"), zlib.compress(b"\xff"), zlib.compress(b"[" * 99999),
    b"", zlib.compress(b"[]")[:-1],
    3, ["user"], {"t": "user"}, [{"t": "user", "k": ["zoe"]}], [{"k": ["zoe"], "v": USER}],
    [{"t": "user", "k": None, "v": USER}], [{"t": ["user"], "k": ["zoe"], "v": USER}],
    [op("token", "zoe")], [op("project", "ada", status="active", reason=None)],
    [op("index", "ada", 1, config={})], [{"t": "user", "k": [["zoe"]], "v": USER}],
    [op("project", "ada", "dev", "z")], [op("user", "zoe", **{**USER, "shoe": 1})],
    [{"t": "user", "k": ["zoe"], "v": []}], [{"t": "user", "k": ["zoe"], "v": "x"}],
    [op("user", "zoe", **USER), op("metadata", "5a")],
    [op("user", "zoe", **USER), op("gone", "x", y=1)]]


def with_ops(directory, serial_, packed):
    """Lets an entry say something else, with hashes that fit."""
    chain, changes = b"", []
    for entry in log_of(directory):
        ops = packed if entry.serial == serial_ else entry.ops
        hash_ = hashlib.sha256(chain + struct.pack(">Q", entry.serial) + ops).digest()
        changes.append(("UPDATE changelog SET ops = ?, prev = ?, hash = ? WHERE serial = ?",
                        (ops, chain, hash_, entry.serial)))
        chain = hash_
    change(directory, *changes)


def test_an_entry_that_can_not_be_read_is_named_by_its_serial(source, told, tmp_path):
    """Nothing is applied, also not what stands before it."""
    at, new, other = told[1], tmp_path / "new", tmp_path / "other"
    with opened(new) as store, contextlib.closing(d.open_rows(str(source))) as rows:
        for ops in UNREADABLE:
            packed = ops if isinstance(ops, bytes) else zlib.compress(json.dumps(ops).encode())
            with_ops(source, at, packed)
            with pytest.raises(d.FatalError, match="^serial %d of .*[^\n]$" % at):
                d.replay(store, rows, sys.maxsize, 0)
            assert is_empty(new), ops
    done = replay.run("_replay", "--serverdir", other, source)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1), done
    assert done.stderr.startswith("fatal: serial %d of " % at) and is_empty(other)
    replay_into(other, source, "--until", at - 1)
    refused(other, source, because="serial %d of " % at)
    change(source, ("UPDATE changelog SET hash = x'00' WHERE serial = ?", (at,)))
    refused(other, source, because="serial %d of " % at)
    change(source, ("DELETE FROM changelog WHERE serial = ?", (at,)))
    refused(other, source, because="serial %d of " % (at + 1))


def test_a_snapshot_from_a_source_whose_newest_entry_is_damaged_is_refused(source, tmp_path):
    last = log_of(cut(source))[-1].serial
    change(source, "UPDATE changelog SET hash = x'00'")
    code, _, errors = replayed(tmp_path / "new", source)
    assert (code, len(errors.splitlines())) == (1, 1)
    assert errors.startswith("serial %d of " % last)
    assert is_empty(tmp_path / "new")


def test_a_source_without_a_changelog_is_refused(source, tmp_path):
    change(source, "DELETE FROM changelog")
    refused(tmp_path / "new", source, because="no changelog")


# -- a source that nobody can write to


@pytest.fixture(params=["said to be", "mounted"])
def read_only(request, source, tmp_path):
    """Runs `_replay` from the source on read-only media, which stays as it is."""
    options = {}
    with contextlib.closing(sqlite3.connect(str(source / "devpi_lite.db"))) as db:
        db.execute("PRAGMA journal_mode = WAL")     # as a server leaves it
    if request.param == "mounted":
        options["python"] = wrapper(tmp_path, source)
        if options["python"] is None:
            pytest.skip("directories can't be mounted read-only here")
    else:
        options["script"] = patched(
            tmp_path, "devpi_lite.is_read_only = lambda path: path == %r" % str(source))

    def run(new):
        before = content(source)
        done = run_command("_replay", "--serverdir", new, source, **options)
        assert content(source) == before
        return done

    return run


def test_a_source_on_read_only_media_is_read(read_only, source, tmp_path):
    done = read_only(tmp_path / "new")
    assert (done.returncode, done.stderr) == (0, ""), done
    same(source, tmp_path / "new")
    assert set(replay.blobs_of(tmp_path / "new")) == set(replay.blobs_of(source))


def test_a_source_that_was_not_closed_before_it_was_made_read_only_is_refused(
        read_only, source, tmp_path):
    (source / "devpi_lite.db-wal").write_bytes(b"changes")
    done = read_only(tmp_path / "new")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done
    assert "devpi_lite.db-wal" in done.stderr and SENTENCE in done.stderr
    assert not (tmp_path / "new").exists()
    (source / "devpi_lite.db-wal").unlink()


def without_privileges(folder):
    """An interpreter to which permissions count; None where that can't be had."""
    if os.name != "posix" or os.geteuid():
        return sys.executable if os.name == "posix" else None
    if not shutil.which("setpriv"):
        return None
    script = folder / "python"
    script.write_text("#!/bin/sh\nexec setpriv --bounding-set=-dac_override,-dac_read_search "
                      "'%s' \"$@\"\n" % sys.executable)
    script.chmod(0o755)
    closed = folder / "closed"
    closed.mkdir(0o500)
    done = subprocess.run([str(script), "-c", "open(%r, 'w')" % str(closed / "probe")],
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return script if b"PermissionError" in done.stderr else None


def test_a_source_that_belongs_to_others_is_read(source, tmp_path):
    """Nobody has it open, and no write-ahead log can be made beside its database."""
    python = without_privileges(tmp_path)
    if python is None:
        pytest.skip("who runs this may write everywhere")
    with contextlib.closing(sqlite3.connect(str(source / "devpi_lite.db"))) as db:
        db.execute("PRAGMA journal_mode = WAL")     # as a server leaves it
    for path in (source, source / "devpi_lite.db"):
        path.chmod(path.stat().st_mode & 0o555)
    try:
        done = run_command("_replay", "--serverdir", tmp_path / "new", source, python=python)
    finally:
        source.chmod(0o700)
        (source / "devpi_lite.db").chmod(0o600)
    assert (done.returncode, done.stderr) == (0, ""), done
    same(source, tmp_path / "new")


# -- much at once


def test_the_deletion_of_a_stage_with_thousands_of_files_is_told_file_by_file(source, tmp_path):
    """What goes with them, too: and what is known of them is read at once."""
    count, new = 2000, tmp_path / "new"
    files = rows_of(source).tables["files"]
    (_, _, path), _ = next(item for item in files.items() if item[1]["kind"] == "releasefile")
    statements = []
    with opened(source) as store, opened(new) as other, \
            contextlib.closing(d.open_rows(str(source))) as rows:

        def fill(change):
            value = change.get("file", ("ada", "dev", path))
            for number in range(count):
                name = "%04d" % number
                change.put("file", ("ada", "dev", "+f/" + name), {**value, "filename": name})
                if number % 10 == 0:
                    change.put("file", ("ada", "dev", "+f/result" + name), {
                        **value, "filename": "result" + name, "kind": "toxresult",
                        "for": "+f/" + name, "metadata_sha256": None, "core_metadata": None})

        store.write(fill)
        d.replay(other, rows, sys.maxsize, 0)
        before = rows_of(new)
        assert replay.differences(rows_of(source), before) == []
        store.writer.set_trace_callback(statements.append)
        store.write(lambda change: change.put("index", ("ada", "dev"), None))
        store.writer.set_trace_callback(None)
        d.replay(other, rows, sys.maxsize, 0)

    deleted = log_of(source)[-1]
    assert replay.faults(log_of(source))[0] == []
    done = {(op["t"], *op["k"]): (number, op["v"]) for number, op in enumerate(deleted.list)}
    assert len(done) == len(deleted.list)
    for (user, index, path), values in before.tables["files"].items():
        went, value = done["file", user, index, path]
        assert value is None
        assert done["gone", "ada/dev/" + path][1] == {}
        if values["kind"] == "toxresult":
            assert went < done[("file", *values["for_id"])][0]
        else:
            assert done["withdrawn", "ada/dev", values["kind"], values["filename"]][1] == {
                "sha256": values["sha256"], "kept": 0}
    kinds = [op["t"] for op in deleted.list]
    assert kinds.count("file") == kinds.count("gone") == count * 1.1 + len(files)
    assert kinds.count("withdrawn") == count + len(files)
    assert sum(statement.startswith("SELECT") for statement in statements) < 50
    same(source, new)
    assert rows_of(new).tables["files"] == {}
