"""`fsck`: each kind of damage, made by hand in a directory, is found and named, and `--repair`
brings back what somebody else still has. (tests/test_replay.py has it look at what a crowd leaves.)
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import socketserver
import sqlite3
import sys
import threading
import zlib

import pytest

import devpi_lite as d
import replay
from harness import (
    Server, Upstream, documentation, eventually, patched, path_of, run_command, upload,
    upload_docs, wheel)

HASTY = "devpi_lite._SCRYPT['n'] = 1 << 10"


def fsck(directory, *options, status=None):
    """The lines that it prints; the last one says what was checked."""
    out, before = io.StringIO(), os.umask(0o077)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = d.main(["fsck", "--serverdir", str(directory), *options])
        except SystemExit as end:
            code = end.code
        finally:
            os.umask(before)
    assert "Traceback" not in out.getvalue(), out.getvalue()
    assert status in (None, code), (code, out.getvalue())
    return out.getvalue().strip().splitlines()


@pytest.fixture(autouse=True)
def haste(monkeypatch):
    """The process of the tests does not give way to others for the rest of its time."""
    monkeypatch.setattr(d, "give_way", lambda: None)


def test_a_terminal_shows_at_once_that_it_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with d.StepProgress("fsck") as progress:
        progress.begin("the database")
        assert capsys.readouterr().err == "\rfsck: the database"
        progress.begin("the rows")
        monkeypatch.setattr(progress, "shown", 0)
        progress.add(0)
        assert capsys.readouterr().err == "\rfsck: the rows    \rfsck: the rows, 1 row"
        progress.begin("files")
    assert capsys.readouterr().err == "\rfsck: files          \n"


def clean(directory, *options):
    *findings, last = fsck(directory, *options, status=0)
    assert findings == [] and last.endswith("no errors"), findings + [last]
    return last


def found(directory, *sentences, level="error", options=()):
    """Each sentence is in a finding of that level, and there are no others; returns the lines."""
    *findings, last = fsck(directory, *options, status=int(level == "error"))
    for sentence in sentences:
        assert [line for line in findings if line.startswith(level) and sentence in line], \
            (sentence, findings)
    for line in findings:
        assert any(sentence in line for sentence in sentences), (line, sentences)
    assert level in last
    return findings + [last]


@contextlib.contextmanager
def rows(directory):
    """A connection that changes the database as nobody should."""
    path = str(directory / "devpi_lite.db")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.row_factory = sqlite3.Row
        yield db


class Rich:
    """A directory with a bit of everything, `whole` in the end, and `files` by their paths."""

    def __init__(self, folder):
        self.upstream = Upstream().start()
        self.server = server = Server(folder / "server", script=patched(folder, HASTY)).start()
        self.wheel, self.other = wheel("demo", "1.0"), wheel("other", "1.0")
        self.mirrored = self.upstream.publish("mirrored", "1.0")
        self.docs = documentation("demo", "1.0", more="<p>more</p>")
        server.add_user("ann")
        server.add_index("root/dev", volatile=True)
        server.add_mirror("root/pypi", self.upstream)
        upload(server, "root/dev", self.wheel, self.other)
        upload_docs(server, "root/dev", self.docs)
        result = server.post(path_of(self.wheel, "root/dev"), {"testenvs": {}}, user="root")
        assert result.status == 200
        assert server.fetch("root/pypi", self.mirrored.filename, "mirrored") == \
            self.mirrored.content
        eventually(lambda: replay.is_settled(server))
        server.stop()

    def copy(self, folder):
        shutil.copytree(str(self.server.directory), str(folder))
        return folder


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    rich = Rich(tmp_path_factory.mktemp("rich"))
    yield rich
    rich.upstream.stop()


@pytest.fixture
def directory(rich, tmp_path):
    """A copy that a test may damage."""
    return rich.copy(tmp_path / "copy")


def blob(directory, archive):
    return directory / "files" / archive.sha256[:2] / archive.sha256


def flip(path, position=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 0x55
    path.write_bytes(bytes(data))


# -- what is whole


def test_the_last_line_says_what_was_checked(directory):
    last = clean(directory)
    assert last.startswith("checked 5 files (") and " rows and " in last
    assert "without reading them" in clean(directory, "--no-checksum")
    assert "without" not in clean(directory, "--checksum")
    assert not list(directory.glob("tmp/*")), "what it needs for itself is deleted"


def test_nothing_is_changed_without_repair(directory):
    flip(next(directory.glob("files/??/*")))
    before = {path: path.stat().st_mtime_ns for path in directory.glob("files/*/*")}
    fsck(directory, status=1)
    assert before == {path: path.stat().st_mtime_ns for path in directory.glob("files/*/*")}
    assert not (directory / "trash").exists() or not list((directory / "trash").iterdir())


def test_changes_of_a_running_server_are_no_damage(rich, make_server, tmp_path):
    code = "devpi_lite.Limits.cleaning = 0.05\ndevpi_lite.Blobs.sweep.__defaults__ = (1,)"
    server = make_server(directory=rich.copy(tmp_path / "running"), script=patched(tmp_path, code))
    stop, changed = threading.Event(), []

    def change():
        while not stop.is_set():
            name = "busy%d" % (len(changed) % 5)
            upload(server, "root/dev", wheel(name, "1.0"))
            upload_docs(server, "root/dev", documentation(name, "1.0"))
            assert server.delete("/root/dev/" + name, user="root").status == 200
            changed.append(name)
    changing = threading.Thread(target=change)
    changing.start()
    try:
        for options in itertools.cycle([(), ("--repair",), ()]):
            clean(server.directory, *options)
            if len(changed) > 5 or not changing.is_alive():
                break
    finally:
        stop.set()
        changing.join()
    assert len(changed) > 5


def test_a_log_that_begins_later_is_compared_as_far_as_it_reaches(directory):
    with rows(directory) as db:
        db.execute("DELETE FROM changelog WHERE serial < (SELECT max(serial) FROM changelog)")
    clean(directory)


def test_a_mirror_may_keep_words_of_devpi_about_stages(directory):
    with rows(directory) as db:
        config, = db.execute("SELECT config FROM indexes WHERE name = 'pypi'").fetchone()
        config = dict(json.loads(config), **{d.FROM_DEVPI: {"x": {"type": "stage"}}})
        db.execute("UPDATE indexes SET config = ? WHERE name = 'pypi'", (json.dumps(config),))
        db.execute("DELETE FROM changelog WHERE serial < (SELECT max(serial) FROM changelog)")
    clean(directory)


def test_an_equal_value_with_another_order_of_its_keys_is_equal(directory):
    with rows(directory) as db:
        name, config = db.execute("SELECT name, config FROM indexes WHERE name = 'dev'").fetchone()
        config = dict(reversed(list(json.loads(config).items())))
        db.execute("UPDATE indexes SET config = ? WHERE name = ?", (json.dumps(config), name))
    clean(directory)


# -- files


@pytest.mark.parametrize("how, sentence", [
    (lambda path: path.unlink(), "it is missing"),
    (flip, "it is damaged: its SHA-256 is "),
    (lambda path: path.write_bytes(b"short"), "it is damaged: it has 5 bytes, should have"),
    (lambda path: (path.unlink(), path.symlink_to("/etc/passwd")), "it is missing")])
def test_a_lost_or_damaged_file_of_a_stage_is_an_error(rich, directory, how, sentence):
    how(blob(directory, rich.wheel))
    name = path_of(rich.wheel, "root/dev")[1:]
    *lines, last = fsck(directory, status=1)
    errors = [line for line in lines if line.startswith("error")]
    assert len(errors) == 1 and errors[0].startswith("error: %s: %s" % (name, sentence)), lines
    assert "--repair --from URL" in errors[0]
    assert "1 error" in last


def test_a_lost_file_of_a_mirror_is_a_warning_and_a_damaged_one_an_error(rich, directory):
    name = path_of(rich.mirrored, "root/pypi")[1:]
    flip(blob(directory, rich.mirrored))
    found(directory, name + ": it is damaged")
    blob(directory, rich.mirrored).unlink()
    found(directory, name + ": it is missing", level="warning")


def test_without_checksums_only_sizes_count(rich, directory):
    flip(blob(directory, rich.wheel))
    clean(directory, "--no-checksum")
    blob(directory, rich.wheel).write_bytes(b"short")
    found(directory, "it has 5 bytes", options=("--no-checksum",))


def test_a_file_in_the_trash_is_a_warning(rich, directory):
    (directory / "trash").mkdir(mode=0o700, exist_ok=True)
    os.replace(str(blob(directory, rich.wheel)), str(directory / "trash" / rich.wheel.sha256))
    found(directory, "it lies in trash/", level="warning")
    assert run_command("gc", "--serverdir", directory).returncode == 0
    clean(directory)


def test_ten_of_a_kind_are_shown_and_the_rest_counted(directory):
    with rows(directory) as db:
        row = dict(db.execute("SELECT * FROM files WHERE kind = 'releasefile' "
                              "AND release_id IS NULL").fetchone())
        for number in range(13):
            sha256 = hashlib.sha256(b"%d" % number).hexdigest()
            name = "many-%d.zip" % number
            row.update(id=None, filename=name, sha256=sha256, hash_spec="sha256=" + sha256,
                       path=d.file_path("sha256=" + sha256, name), metadata_sha256=None)
            db.execute("INSERT INTO files VALUES (%s)" % d.marks(row), list(row.values()))
    lines = fsck(directory, status=0)
    assert sum("it is missing" in line for line in lines) == 10
    assert "warning: ... 3 more: files are missing, 13 in all (--debug shows each)" in lines
    assert lines[-1].endswith("13 warnings")
    assert sum("it is missing" in line for line in fsck(directory, "--debug", status=0)) == 13
    found_ = [json.loads(line) for line in fsck(directory, "--json", status=0)]
    assert sum(each.get("kind") == "missing" for each in found_) == 13
    assert (found_[-1]["error"], found_[-1]["warning"], found_[-1]["files"]) == (0, 13, 5)


def test_what_does_not_belong_there_is_named(directory):
    (directory / "files" / "notes").write_bytes(b"")
    (directory / "files" / "00" / "notes").write_bytes(b"")
    (directory / "files" / "01" / ("0" * 64)).write_bytes(b"")
    for name in ("files/notes", "files/00/notes", "files/01/" + "0" * 64):
        (directory / name).chmod(0o600)
    found(directory, "files/notes: this is no file", "files/00/notes: this is no file",
          "files/01/0000", level="warning")


def test_files_that_nothing_names_are_counted(directory):
    name = hashlib.sha256(b"x" * 3000).hexdigest()
    (directory / "files" / name[:2] / name).write_bytes(b"x" * 3000)
    (directory / "files" / name[:2] / name).chmod(0o600)
    assert "; 1 (2.9 KiB) files are named by nothing, `gc` moves" in clean(directory)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("name", [".", "devpi_lite.db", "files", "files/00"])
def test_what_others_may_read_is_a_warning(directory, name):
    (directory / name).chmod(0o644 if name == "devpi_lite.db" else 0o755)
    found(directory, "can be read by others", level="warning")


def test_leftovers_of_killed_processes_are_a_warning(directory):
    (directory / "tmp" / "tmpabc").write_bytes(b"")
    os.utime(str(directory / "tmp" / "tmpabc"), (1, 1))
    found(directory, "1 temporary files of killed processes", level="warning")


# -- the changelog


def entry(serial, prev, *ops):
    made = d.new_entry(serial, "root", [json.dumps(op) for op in ops], prev)
    return made


def test_a_damaged_entry_is_named(directory):
    with rows(directory) as db:
        db.execute("UPDATE changelog SET ops = ops || x'00' WHERE serial = 2")
    lines = fsck(directory, status=1)
    assert any(line.startswith("error: serial 2: the entry of the changelog is damaged")
               for line in lines)


@pytest.mark.parametrize("statement, sentence", [
    ("DELETE FROM changelog WHERE serial = 2", "nothing between the serials 1 and 3"),
    ("DELETE FROM changelog", "the changelog is empty"),
    ("UPDATE changelog SET prev = NULL", None),
    ("UPDATE changelog SET hash = 7 WHERE serial = 1", "serial 1: the entry"),
    ("UPDATE changelog SET ops = 'text' WHERE serial = 1", "serial 1: the entry")])
def test_a_broken_log_is_an_error(directory, statement, sentence):
    with rows(directory) as db:
        db.execute("PRAGMA ignore_check_constraints = ON")
        with contextlib.suppress(sqlite3.IntegrityError):
            db.execute(statement)
    if sentence:
        assert any(sentence in line for line in fsck(directory, status=1))


def test_the_first_entry_has_none_before_it_and_each_follows_the_one_before(directory):
    with rows(directory) as db:
        whole = [d.Entry(*row) for row in db.execute("SELECT * FROM changelog")]
        first, last = whole[0], whole[-1]

        def put(old, prev, ops):
            serial = old.serial
            db.execute("UPDATE changelog SET ops = ?, prev = ?, hash = ? WHERE serial = ?",
                       (ops, prev, d.entry_hash(prev, serial, ops), serial))
        broken = [(b"other", last.ops, "does not follow that of serial"),
                  (last.prev, zlib.compress(b"[{}]"), "can't be read"),
                  (last.prev, zlib.compress(b'[{"t": "frog", "k": [], "v": null}]'),
                   "use the newest devpi_lite.py")]
        for prev, ops, sentence in broken:
            put(last, prev, ops)
            error, warning, _ = fsck(directory, status=1)
            assert sentence in error and "the rows were not compared" in warning
        put(last, last.prev, last.ops)
        clean(directory)
        put(first, b"x" * 32, first.ops)
        lines = "".join(fsck(directory, status=1))
        assert "names one before it" in lines and "does not follow that of serial 0" in lines


@pytest.mark.parametrize("statement, sentences", [
    ("UPDATE files SET uploaded = '2020-01-01T00:00:00.000000Z' WHERE kind = 'doczip'",
     ["file root/dev/+f/", "is another one than was put"]),
    ("DELETE FROM files WHERE kind = 'toxresult'", ["was put, and is missing"]),
    ("INSERT INTO gone VALUES ('root/dev/+f/x')",
     ["gone root/dev/+f/x: the row is here, and the changelog, which is complete"])])
def test_rows_that_the_log_does_not_have_so_are_named(directory, statement, sentences):
    with rows(directory) as db:
        db.execute(statement)
    lines = fsck(directory, status=1)
    assert all(any(sentence in line for line in lines) for sentence in sentences), lines


def test_a_deleted_row_that_is_here_is_named(directory):
    with rows(directory) as db:
        last = d.Entry(*db.execute("SELECT * FROM changelog ORDER BY serial DESC").fetchone())
        made = entry(last.serial + 1, last.hash, {"t": "gone", "k": ["root/dev/+f/y"], "v": None})
        db.execute("INSERT INTO changelog VALUES (?, ?, ?, ?, ?, ?)", made)
        db.execute("INSERT INTO gone VALUES ('root/dev/+f/y')")
    found(directory, "gone root/dev/+f/y: the row was deleted, and is here (serial %d"
          % made.serial)


# -- rows that do not fit together


@pytest.mark.parametrize("statements, sentence", [
    (["DELETE FROM indexes WHERE name = 'dev'"], "of indexes that it belongs to is missing"),
    (["DELETE FROM releases"], "of releases that it belongs to is missing"),
    (["UPDATE files SET path = '+f/aaa/bbb/x.whl' WHERE kind = 'doczip'"],
     "its path does not fit its hash"),
    (["UPDATE files SET path = '../../x' WHERE release_id IS NULL"], "its path does not fit"),
    (["UPDATE files SET sha256 = '../../../etc/passwd' WHERE release_id IS NULL"],
     "its SHA-256 '../../../etc/passwd' can't be one"),
    (["UPDATE files SET filename = '../x' WHERE release_id IS NULL"],
     "its name '../x' is not safe"),
    (["UPDATE files SET size = NULL WHERE release_id IS NULL"], "it has no size"),
    (["UPDATE files SET size = size + 1 WHERE kind = 'doczip'"], "a row states"),
    (["UPDATE files SET release_id = NULL WHERE kind = 'doczip'"], "it has no release"),
    (["UPDATE files SET release_id = (SELECT min(id) FROM releases) WHERE release_id IS NULL"],
     "its release is one of another project"),
    (["UPDATE files SET project_id = (SELECT project_id FROM files WHERE release_id IS NULL) "
      "WHERE kind = 'doczip'"], "its project is one of another index"),
    (["UPDATE files SET for_id = NULL WHERE kind = 'toxresult'"],
     "the file that it is a test result of is missing"),
    (["UPDATE files SET kind = 'other' WHERE kind = 'doczip'"], "its kind is 'other'"),
    (["UPDATE files SET hash_spec = 'sha256=' || '0' WHERE kind = 'doczip'"],
     "its two hashes differ"),
    (["UPDATE releases SET version = '9'"], "its release has the version 9"),
    (["UPDATE releases SET readme_size = 77"], "a part of its README is missing"),
    (["UPDATE projects SET name = 'De..Mo' WHERE name = 'demo'"],
     "root/dev/De..Mo: the project's name is not in its normal form"),
    (["UPDATE users SET name = '..' WHERE name = 'ann'"], "error: ..: user '..' is not allowed"),
    (["UPDATE indexes SET name = '.' WHERE name = 'dev'"], "error: root/.: index '.' is not"),
    (["UPDATE indexes SET name = 'a/b' WHERE name = 'dev'"], "error: root/a/b: index 'a/b'"),
    (["UPDATE indexes SET name = '\u00fc' WHERE name = 'dev'"], "warning: root/\\xfc: index"),
    (["UPDATE indexes SET config = '{' WHERE name = 'dev'"], "its configuration can't be read"),
    (["UPDATE indexes SET config = '[]' WHERE name = 'dev'"], "its configuration can't be read"),
    (["UPDATE indexes SET config = '{\"type\": \"x\"}' WHERE name = 'dev'"], "its type is 'x'"),
    (["UPDATE indexes SET config = json_set(config, '$.bases', json('[\"a/b\"]')) "
      "WHERE name = 'dev'"], "warning: root/dev: its base a/b does not exist"),
    (["UPDATE indexes SET config = json_set(config, '$.bases', json('[\"root/dev\", \"root/pypi\"]'))"],
     "warning: root/dev: its bases lead back to it"),
    (["UPDATE users SET attributes = 'x'"], "the rows of the kind user can't be read"),
    (["UPDATE users SET name = CAST(x'ff41' AS TEXT) WHERE name = 'ann'"],
     "warning: \\ufffdA: user"),
    (["UPDATE files SET path = 7 WHERE release_id IS NULL"], "its path does not fit"),
    (["UPDATE files SET kind = x'00' WHERE kind = 'doczip'"], "error"),
])
def test_rows_that_do_not_fit_are_named(directory, statements, sentence):
    with rows(directory) as db:
        for statement in statements:
            db.execute(statement)
    lines = fsck(directory, "--debug", status=1 if "warning" not in sentence else None)
    assert any(sentence in line for line in lines), lines


# -- the schema


@pytest.mark.parametrize("level, statement, sentences", [
    ("error", "DROP INDEX files_of_stage", ["index files_of_stage"]),
    ("error", "DROP TABLE withdrawn", ["lacks the table withdrawn", "no such table: withdrawn"]),
    ("error", "DELETE FROM node WHERE key = 'uuid'", ["lacks the uuid"]),
    ("error", "CREATE TRIGGER back AFTER UPDATE ON users BEGIN "
              "UPDATE users SET pwhash = 'mine'; END", ["trigger back"]),
    ("error", "CREATE VIEW more AS SELECT 1", ["view more"]),
    ("warning", "ALTER TABLE users ADD COLUMN more", ["column more of users"]),
    ("warning", "CREATE TABLE more (x)", ["table more"])])
def test_the_schema_is_compared_with_that_of_its_version(directory, level, statement, sentences):
    with rows(directory) as db:
        db.execute(statement)
    found(directory, *sentences, level=level)


# -- metadata, documentation, search


def test_metadata_files_are_compared_with_their_hash(rich, directory):
    with rows(directory) as db:
        db.execute("UPDATE metadata_files SET packed = ?", (zlib.compress(b"other"),))
    lines = fsck(directory, status=1)
    assert sum("its metadata file is damaged" in line for line in lines) == 3
    assert any("warning: root/pypi" in line for line in lines)
    lines = fsck(directory, "--repair", status=0)
    assert sum("its metadata file was read from it again" in line for line in lines) == 3
    clean(directory)
    with rows(directory) as db:
        db.execute("DELETE FROM metadata_files")
        db.execute("DELETE FROM changelog WHERE serial < (SELECT max(serial) FROM changelog)")
    lines = fsck(directory, status=1)
    assert sum("its metadata file is missing" in line for line in lines) == 3
    fsck(directory, "--repair", status=0)
    clean(directory)


@pytest.mark.parametrize("statement", [
    "DELETE FROM docs", "DELETE FROM doc_members WHERE path = 'more.html'",
    "UPDATE doc_members SET start = start + 1", "UPDATE doc_members SET path = 'other' "
    "WHERE path = 'index.html'"])
def test_members_of_documentation_are_compared_with_the_zip(directory, statement):
    with rows(directory) as db:
        db.execute("PRAGMA foreign_keys = ON")
        db.execute(statement)
    found(directory, "its members are not those that the database has")
    found(directory, "were entered again", level="repaired", options=("--repair",))
    clean(directory)


def search(directory):
    return contextlib.closing(sqlite3.connect(str(directory / "search.db"), isolation_level=None))


def test_the_search_index_is_compared_with_the_projects(directory):
    with search(directory) as db:
        db.execute("UPDATE sdoc SET norm = 'strange' WHERE norm = 'other'")
    found(directory, "2 projects are missing in the search index", level="warning")
    found(directory, "2 projects were queued", level="repaired", options=("--repair",))
    clean(directory)        # they are undecided now
    server = Server(directory, root_password=None).start()
    try:
        eventually(lambda: replay.is_settled(server))
        clean(directory)
    finally:
        server.kill()


def test_a_damaged_search_index_is_a_warning(directory):
    (directory / "search.db").write_bytes(b"no database" * 1000)
    found(directory, "the search index is damaged", level="warning")
    (directory / "search.db").unlink()
    clean(directory)


# -- whatever is damaged, a sentence says it


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_byte_anywhere_gives_a_sentence(rich, directory, seed):
    chance = random.Random(seed)
    whole = (directory / "devpi_lite.db").read_bytes()
    for _ in range(5):
        (directory / "devpi_lite.db").write_bytes(whole)
        for _ in range(chance.choice((1, 1, 30))):
            flip(directory / "devpi_lite.db", chance.randrange(len(whole)))
        last = fsck(directory, *chance.choice(((), ("--repair",))))[-1]
        assert last.startswith(("checked", "fatal: ")), last
    (directory / "devpi_lite.db").write_bytes(whole)
    path = chance.choice(sorted(directory.glob("files/??/*")))
    if path.stat().st_size:
        flip(path, chance.randrange(path.stat().st_size))
        assert "it is damaged" in fsck(directory, status=1)[0]


@pytest.fixture
def crashed(directory, tmp_path):
    """A copy of a directory whose write-ahead log holds five changes."""
    with rows(directory) as db:     # keeps the log from being folded in
        db.execute("PRAGMA wal_autocheckpoint = 0")
        for number in range(5):
            db.execute("INSERT INTO gone_cached VALUES ('%d')" % number)
        copy = tmp_path / "crashed"
        shutil.copytree(str(directory), str(copy))
    (copy / "devpi_lite.db-shm").unlink()
    return copy


@pytest.mark.parametrize("position, lost", [
    (1, -1), (20, -1), (28, -1), (5000, 4), (-10, 1)])      # in the head, and in pages
def test_a_flipped_byte_in_the_write_ahead_log_gives_a_sentence(crashed, position, lost):
    log = crashed / "devpi_lite.db-wal"
    assert len(log.read_bytes()) == 32 + 5 * (24 + 4096)
    assert d.lost_in_log(str(log)) == 0
    flip(log, position)
    assert d.lost_in_log(str(log)) == lost
    warning, last = fsck(crashed, status=0)
    assert warning.startswith("warning: devpi_lite.db-wal: the newest changes"), warning
    assert last.startswith("checked") and last.endswith("1 warning")
    clean(crashed)          # they are gone


def test_a_change_that_was_cut_off_is_no_damage(crashed):
    log = crashed / "devpi_lite.db-wal"
    whole = log.read_bytes()
    log.write_bytes(whole[:-1000])
    assert d.lost_in_log(str(log)) == 0
    log.write_bytes(whole + whole[32:4152].replace(whole[16:24], b"otherone"))
    assert d.lost_in_log(str(log)) == 0, "left from an older log"
    log.write_bytes(b"")
    assert d.lost_in_log(str(log)) == 0 == d.lost_in_log(str(log) + "x")
    clean(crashed)


def test_the_log_of_a_running_server_is_left_to_it(directory):
    with d.take_lock(str(directory)):
        assert d.is_served(str(directory))
    assert not d.is_served(str(directory))


@pytest.mark.parametrize("error, sentence", [
    (sqlite3.OperationalError("database or disk is full"), "fatal: the changelog could not be"),
    (sqlite3.OperationalError("database is locked"), "fatal: the changelog could not be"),
    (PermissionError(13, "Permission denied"), "run this as the user to whom the directory"),
    (MemoryError(), "the changelog could not be checked to the end: MemoryError; stop the server")])
def test_what_is_no_damage_is_said_so(directory, monkeypatch, error, sentence):
    def fail(_):
        raise error
    monkeypatch.setattr(d.DatabaseCheck, "log", fail)
    assert any(sentence in line for line in fsck(directory, status=1))
    assert not list(directory.glob("tmp/*"))


@pytest.mark.parametrize("make, sentence", [
    (lambda path: (path / "devpi_lite.db").write_bytes(b"x" * 9000), "can't be opened"),
    (lambda path: (path / "devpi_lite.db").write_bytes(b""), "is empty, but the files"),
    (lambda path: (path / "devpi_lite.db").unlink(), "is missing, but the files"),
    (lambda path: (path / ".unfinished").write_bytes(b""), "was cut off")])
def test_a_directory_that_is_none_is_refused(directory, make, sentence):
    make(directory)
    last = fsck(directory, status=1)[-1]
    assert last.startswith("fatal: ") and sentence in last


# -- repair


def test_files_of_mirrors_come_from_upstream_again(rich, directory):
    name = path_of(rich.mirrored, "root/pypi")[1:]
    rich.upstream.reset()
    flip(blob(directory, rich.mirrored))
    found(directory, name + ": it was taken from " + rich.upstream.host_url, level="repaired",
          options=("--repair",))
    assert blob(directory, rich.mirrored).read_bytes() == rich.mirrored.content
    aside, = (directory / "trash").iterdir()
    assert aside.name.startswith(rich.mirrored.sha256 + ".damaged-")
    assert oct(blob(directory, rich.mirrored).stat().st_mode)[-3:] == "600" or os.name == "nt"
    clean(directory)
    blob(directory, rich.mirrored).unlink()
    found(directory, name + ": it was taken from", level="repaired", options=("--repair",))
    clean(directory)


@pytest.mark.parametrize("fault", ["wrong-hash", "404", "500", "truncate", "reset"])
def test_other_bytes_repair_nothing(rich, directory, fault):
    flip(blob(directory, rich.mirrored))
    damaged = blob(directory, rich.mirrored).read_bytes()
    rich.upstream.fault(fault, "*.whl")
    try:
        found(directory, "it is damaged: its SHA-256 is", options=("--repair",))
    finally:
        rich.upstream.clear_faults()
    assert blob(directory, rich.mirrored).read_bytes() == damaged
    assert not list(directory.glob("tmp/*")) and not list(directory.glob("trash/*"))


def test_files_of_stages_come_from_another_server(rich, directory, make_server, tmp_path):
    other = make_server(directory=rich.copy(tmp_path / "other"))
    flip(blob(directory, rich.wheel))
    blob(directory, rich.docs).unlink()
    found(directory, path_of(rich.wheel, "root/dev")[1:], "demo-1.0.doc.zip", options=("--repair",))
    lines = found(directory, path_of(rich.wheel, "root/dev")[1:] + ": it was taken from",
                  "demo-1.0.doc.zip: it was taken from " + other.url, level="repaired",
                  options=("--repair", "--from", other.url + "/"))
    assert "2 repaired" in lines[-1]
    assert blob(directory, rich.wheel).read_bytes() == rich.wheel.content
    clean(directory)


@contextlib.contextmanager
def slow_server(first):
    """A server that sends `first`, and then a byte now and then without end; yields (its URL, the
    connections so far)."""
    met, ended = [], threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            met.append(self.client_address)
            with contextlib.suppress(OSError):
                self.request.sendall(first)
                while first and not ended.wait(0.02):
                    self.request.sendall(b"x")
                ended.wait(20)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield "http://127.0.0.1:%d" % server.server_address[1], met
        finally:
            ended.set()
            server.shutdown()


def test_a_server_that_sends_hardly_anything_is_left(rich, directory, monkeypatch):
    blob(directory, rich.wheel).unlink()
    monkeypatch.setattr(d.Limits, "stall", 0.2)
    with slow_server(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n") as (url, _):
        found(directory, "comes too slowly", options=("--repair", "--from", url))
    assert not blob(directory, rich.wheel).exists() and os.listdir(str(directory / "tmp")) == []


def test_a_server_that_never_answers_is_asked_for_a_few_files(rich, directory, monkeypatch):
    archives = [rich.wheel, rich.other, rich.docs]
    for archive in archives:
        blob(directory, archive).unlink()
    for name, value in (("upstream_stall", 0.1), ("repair_patience", 0.05), ("repair_troubles", 2)):
        monkeypatch.setattr(d.Limits, name, value)
    with slow_server(b"") as (url, met):
        lines = found(directory, *["timed out"] * 2, "is not asked any more",
                      options=("--repair", "--from", url))
    assert len(met) < 6, lines


@pytest.mark.parametrize("is_in_url", [False, True])
def test_a_restricted_index_needs_a_password(rich, directory, make_server, tmp_path, is_in_url):
    other = make_server(directory=rich.copy(tmp_path / "other"))
    assert other.patch("/root/dev", ["acl_pkg_read=root"], user="root").status == 200
    blob(directory, rich.wheel).unlink()
    found(directory, "it is missing (tried: ", options=("--repair", "--from", other.url))
    password = tmp_path / "password"
    password.write_text("secret\n")
    lines = fsck(directory, "--repair", *(
        ["--from", other.url.replace("//", "//root:secret@")] if is_in_url else
        ["--from", other.url, "--user", "root", "--password-file", str(password)]), status=0)
    assert "secret" not in "".join(lines) and "2 repaired" not in lines[-1]
    clean(directory)


def test_what_lies_whole_in_the_trash_comes_back(rich, directory):
    (directory / "trash").mkdir(mode=0o700, exist_ok=True)
    shutil.copy(str(blob(directory, rich.wheel)), str(directory / "trash" / rich.wheel.sha256))
    flip(blob(directory, rich.wheel))
    found(directory, "it was taken from the trash", level="repaired", options=("--repair",))
    clean(directory)


def test_a_running_server_notices_a_repair(rich, make_server, tmp_path):
    server = make_server(directory=rich.copy(tmp_path / "running"))
    path = blob(server.directory, rich.mirrored)
    url = path_of(rich.mirrored, "root/pypi")
    flip(path)
    assert server.get(url, headers={"Accept": "*/*"}).body != rich.mirrored.content
    found(server.directory, "it was taken from", level="repaired", options=("--repair",))
    assert server.get(url, headers={"Accept": "*/*"}).body == rich.mirrored.content
    clean(server.directory)


def as_another_user(directory, *options):
    """(exit status, output) of `fsck` by a user to whom the directory does not belong."""
    # now, because that user may not be allowed to read the library
    import concurrent.futures.thread    # noqa: F401
    import encodings.cp437              # noqa: F401
    came, out = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgid(65534)
            os.setuid(65534)
            told = io.StringIO()
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                code = d.main(["fsck", "--serverdir", str(directory), *options])
            os.write(out, told.getvalue().encode())
            os._exit(code)
        finally:
            os._exit(99)
    os.close(out)
    with open(came) as file:
        text = file.read()
    return os.waitpid(child, 0)[1] >> 8, text


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be others")
def test_what_a_user_may_not_do_is_no_damage(directory, tmp_path):
    for path in (tmp_path, *list(tmp_path.parents)[:2]):
        path.chmod(0o755)
    for path in [directory, *directory.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    code, text = as_another_user(directory)
    assert code == 0 and text.count("warning:") == 1 and "can be read by others" in text, text
    for options, harm, sentence in (
            (("--repair",), None, "can't write to"), ((), "devpi_lite.db", "Permission denied")):
        if harm:
            (directory / harm).chmod(0o600)
        code, text = as_another_user(directory, *options)
        assert code == 1 and sentence in text and "run this as" in text and "restore" not in text


@pytest.mark.parametrize("options, status", [
    (("--from", "http://127.0.0.1:1"), 2), (("--frm",), 2), (("--repair", "--user", "root"), 2),
    (("--repair", "--from", "http://127.0.0.1:1", "--password-file", "x"), 2),
    *[(("--repair", "--from", url), 2) for url in (
        "ftp://x", "http://[::1", "http://127.0.0.1:99999", "http://u:p@", "http://x/?a",
        "http://x/#a", "http://a b/", "http://\x7f/", "http:///x")]])
def test_wrong_options_are_refused(directory, options, status):
    fsck(directory, *options, status=status)
