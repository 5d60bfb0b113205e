"""Chapters 3 and 4: changes, serials, the changelog's chain, what caches keep, blobs."""
import contextlib
import errno
import hashlib
import json
import os
import sqlite3
import struct
import sys
import threading
import time
import zlib

import pytest

import devpi_lite as d
from harness import eventually


@pytest.fixture
def store(tmp_path):
    store = d.Store(d.Settings(str(tmp_path)), create=True)
    yield store
    store.close()


def add_user(change, name, attributes=None):
    d.insert_user(change, name, None, attributes or {})


def keep(blobs, data):
    with blobs.incoming() as incoming:
        incoming.write(data)
        return incoming.keep()


def count_users(store):
    with store.read() as db:
        return db.execute("SELECT count(*) FROM users").fetchone()[0]


def test_each_change_has_its_own_serial_and_the_log_is_a_chain(store):
    for name in ("a", "b", "c"):
        store.write(add_user, name, actor=d.Actor("root"))
    with store.read() as db:
        rows = db.execute("SELECT * FROM changelog ORDER BY serial").fetchall()
    assert [row["serial"] for row in rows] == [0, 1, 2] and store.serial == 2
    previous = b""
    for row, name in zip(rows, "abc"):
        assert row["prev"] == previous and row["who"] == "root"
        assert row["hash"] == hashlib.sha256(previous + struct.pack(">Q", row["serial"]) + row["ops"]).digest()
        assert json.loads(zlib.decompress(row["ops"]))[0]["k"] == [name]
        previous = row["hash"]


def test_the_changelog_is_cut_at_its_oldest_end_and_stays_a_chain(store):
    store.keep_log, store.commits.is_server = d.LogBounds(20000, 9999), True
    for number in range(60):
        store.write(add_user, "u%d" % number, {"title": os.urandom(500).hex()})
    with store.read() as db:
        rows = db.execute("SELECT * FROM changelog ORDER BY serial").fetchall()
    assert 10 < len(rows) < 40 and [row["serial"] for row in rows] == list(range(60 - len(rows), 60))
    assert sum(len(row["ops"]) for row in rows) <= 20000
    for before, row in zip(rows, rows[1:]):
        assert row["prev"] == before["hash"]
    store.keep_log = d.LogBounds(10, 9999)
    store.write(add_user, "last")
    with store.read() as db:
        (row,) = db.execute("SELECT serial, prev FROM changelog")       # the next is chained to it
    assert tuple(row) == (60, rows[-1]["hash"])


def test_a_store_that_was_opened_again_cuts_the_changelog_that_is_there(tmp_path):
    settings = d.Settings(str(tmp_path))
    with contextlib.closing(d.Store(settings, create=True)) as store:
        for number in range(40):
            store.write(add_user, "u%d" % number, {"title": os.urandom(500).hex()})
    with contextlib.closing(d.Store(settings)) as store:
        store.keep_log, store.commits.is_server = d.LogBounds(20000, 9999), True
        store.write(add_user, "the size is counted after it")
        eventually(lambda: store.log_size is not None)
        store.write(add_user, "it counts")
        assert 5 < len(serials(store)) < 25 and serials(store)[-1] == 41


def test_old_entries_of_the_changelog_go(store):
    for number in range(3):
        store.write(add_user, "u%d" % number)
    store.cut_log()
    assert serials(store) == [0, 1, 2]
    store.write(lambda change: change.execute("UPDATE changelog SET ts = ts - 3600 WHERE serial < 2"))
    store.keep_log = d.LogBounds(1 << 20, 3599)
    store.cut_log()
    assert serials(store) == [2]
    store.keep_log = d.LogBounds(1 << 20, -1)       # the newest stays: the next is chained to it
    store.cut_log()
    assert serials(store) == [2]


def test_old_entries_go_from_a_store_that_was_opened_just_now(tmp_path):
    settings = d.Settings(str(tmp_path))
    with contextlib.closing(d.Store(settings, create=True)) as store:
        for number in range(3):
            store.write(add_user, "u%d" % number)
    with contextlib.closing(d.Store(settings)) as store:
        store.keep_log = d.LogBounds(1 << 20, -1)
        store.cut_log()
        assert serials(store) == [2]


def test_what_was_cut_is_no_longer_counted(store):
    store.keep_log = d.LogBounds(1 << 20, 9999)
    for number in range(6):
        store.write(add_user, "u%d" % number, {"title": os.urandom(50 * number).hex()})
    store.write(lambda change: change.execute("UPDATE changelog SET ts = 0 WHERE serial IN (0, 1, 3)"))
    store.cut_log()
    assert serials(store) == [2, 3, 4, 5], "what follows a younger one stays"
    with store.read() as db:
        assert store.log_size == db.execute("SELECT sum(length(ops)) FROM changelog").fetchone()[0]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems sync file by file")
def test_few_files_are_synced_without_those_of_others(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "sync", lambda: asked.append("all"))
    monkeypatch.setattr(os, "fsync", lambda fd: asked.append(os.readlink(f"/proc/self/fd/{fd}")))
    (tmp_path / "folder").mkdir()
    for name in ("a", "folder/b"):
        (tmp_path / name).write_bytes(b"")
    d.sync_tree(str(tmp_path))
    assert sorted(asked) == sorted(str(tmp_path / name) for name in ("", "a", "folder", "folder/b"))
    for number in range(d.Limits.synced_alone):
        (tmp_path / str(number)).write_bytes(b"")
    folders = [str(tmp_path), str(tmp_path / "folder")]
    for synced, call, argument in (
            (["all"], d.sync_tree, folders[0]), (folders, d.sync_directories, folders),
            (["all"], d.sync_directories, folders * d.Limits.synced_alone)):
        del asked[:]
        call(argument)
        assert asked == synced


def serials(store):
    with store.read() as db:
        return [entry.serial for entry in d.read_log(db)]


# -- the audit log


def act(store, who, action, target, ts=1000.0, address="192.0.2.1"):
    def change_(change):
        change.audits.append((ts, who, address, action, "", target, ""))
    store.write(change_, actor=d.Actor(who, address))


def audited(store):
    with store.read() as db:
        return [tuple(row) for row in db.execute("SELECT who, target, times FROM audit ORDER BY id")]


def test_what_is_done_again_within_a_minute_counts_in_the_row_that_is_there(store):
    for ts in (1000.0, 1030.0, 1059.0, 1061.0):
        act(store, "eve", "modify", "x", ts)
    act(store, "eve", "modify", "y", 1062.0)
    act(store, "eve", "modify", "x", 1063.0)
    act(store, "bob", "modify", "x", 1064.0)
    act(store, "eve", "modify", "x", 1065.0)        # not before what bob did
    assert audited(store) == [("eve", "x", 3), ("eve", "x", 2), ("eve", "y", 1), ("bob", "x", 1), ("eve", "x", 1)]


def test_a_row_that_was_undone_is_not_counted_in_another_ones(store):
    def fails(change):
        change.audits.append((1000.0, "eve", "192.0.2.1", "modify", "", "x", ""))
        store.audit_log.enter(change, None)
        raise d.Conflict("no")
    with pytest.raises(d.Conflict):
        store.write(fails)
    act(store, "bob", "modify", "z", 1001.0)            # takes the id of the row that is gone
    act(store, "eve", "modify", "x", 1002.0)
    assert audited(store) == [("bob", "z", 1), ("eve", "x", 1)]


def test_nobody_can_wash_what_others_did_out_of_the_audit_log(store):
    store.audit_log.rows = 100
    for number in range(20):
        act(store, "alice", "upload", "a%d" % number)
    for number in range(500):
        act(store, "eve", "modify", "e%d" % number)
    for number in range(300):
        act(store, None, "login.failed", "n%d" % number, address="192.0.2.9")
    rows = audited(store)
    assert len(rows) <= 100 and [target for who, target, _ in rows if who == "alice"] == ["a%d" % n for n in range(20)]
    of_eve, of_nobody = [[target for who_, target, _ in rows if who_ == who] for who in ("eve", None)]
    assert of_eve[-1] == "e499" and of_nobody[-1] == "n299"      # the newest of each stay
    assert abs(len(of_eve) - len(of_nobody)) <= 2


def test_a_change_that_raises_is_undone_alone_and_takes_no_serial(store):
    def half(change, name):
        add_user(change, name)
        raise d.Conflict("no")

    release = threading.Event()
    store.tasks.put(d.WriteTask(lambda change: release.wait(5), (), d.NO_ACTOR, True))      # so that the three share a commit
    outcomes = []

    def run(function, name):
        try:
            outcomes.append(store.write(function, name) and None)
        except d.Conflict as error:
            outcomes.append(error.message)

    threads = [threading.Thread(target=run, args=work) for work in ((add_user, "a"), (half, "b"), (add_user, "c"))]
    for thread in threads:
        thread.start()
    release.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes, key=str) == [None, None, "no"] and count_users(store) == 2 and store.serial == 1


@pytest.fixture
def files_to_undo_from(store):
    """A function that writes over 500 KB in a change; the number of files that SQLite needs to undo that."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("only Linux lists a process's open files")
    for number in range(200):
        store.write(add_user, "u%d" % number, {"title": "t" * 3000})

    def overwrite(change):
        change.execute("UPDATE users SET modified = ?", (time.time(),))
        paths = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
        return sum("etilqs_" in os.readlink(path) for path in paths if os.path.islink(path))

    return overwrite


def run_in_groups(store, first, changes):
    """What changes return, by their names, that come while a change goes on.

    `first`: whether that one is bounded; `changes`: {name: (function, whether it is bounded)}."""
    began, release, found = threading.Event(), threading.Event(), {}

    def hold(change):
        began.set()
        release.wait(5)

    def run(name, function, bounded):
        found[name] = store.write(function, bounded=bounded, party=name)

    threads = [threading.Thread(target=store.write, args=(hold,), kwargs={"bounded": first})]
    threads[0].start()
    began.wait(5)
    for count, (name, work) in enumerate(changes.items(), 1):
        threads.append(threading.Thread(target=run, args=(name, *work)))
        threads[-1].start()
        while len(store.tasks) < count:
            time.sleep(0.001)
    release.set()
    for thread in threads:
        thread.join()
    return found


def test_only_what_is_written_over_by_a_bounded_change_is_kept_in_memory(store, files_to_undo_from):
    counts = [run_in_groups(store, bounded, {"a": (files_to_undo_from, bounded)})["a"]
              for bounded in (False, True, True, False)]
    assert counts == [1, 0, 0, 1]


def test_an_unbounded_change_waits_for_the_end_of_a_bounded_group(store, files_to_undo_from):
    overwrite = files_to_undo_from
    assert run_in_groups(store, True, {
        "unbounded": (lambda change: None, False), "bounded": (overwrite, True),
        "unbounded too": (overwrite, False)}) == {"unbounded": None, "bounded": 0, "unbounded too": 1}


def test_the_first_change_of_a_group_is_undone_without_the_others(store):
    began, release, failures = threading.Event(), threading.Event(), []

    def half(change):
        add_user(change, "half")
        began.set()
        release.wait(5)
        raise d.Conflict("no")

    def run():
        try:
            store.write(half)
        except d.Conflict as error:
            failures.append(error.message)

    others = [threading.Thread(target=store.write, args=(add_user, name)) for name in "ab"]
    threads = [threading.Thread(target=run), *others]
    threads[0].start()
    began.wait(5)
    for thread in others:
        thread.start()
    while len(store.tasks) < 2:
        time.sleep(0.001)
    release.set()
    for thread in threads:
        thread.join()
    assert failures == ["no"] and count_users(store) == 2 and store.serial == 1


def test_a_thread_that_is_interrupted_in_its_change_lets_others_go_on(store):
    def interrupted(change):
        add_user(change, "half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write(interrupted)
    store.write(add_user, "a")
    assert count_users(store) == 1 and store.serial == 0


def test_a_change_without_effect_takes_no_serial(store):
    store.write(lambda change: None)
    assert store.serial == -1


def test_readers_see_one_state_while_changes_go_on(store):
    store.write(add_user, "a")
    with store.read() as db:
        before = db.execute("SELECT count(*) FROM users").fetchone()[0]
        store.write(add_user, "b")
        assert db.execute("SELECT count(*) FROM users").fetchone()[0] == before == 1
    assert count_users(store) == 2


def test_a_newer_schema_is_refused(tmp_path):
    store = d.Store(d.Settings(str(tmp_path)), create=True)
    store.writer.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(d.FatalError, match="99"):
        d.Store(d.Settings(str(tmp_path)), create=True)


UNIQUE_PATH = ("UNIQUE (index_id, path, project_id)", "UNIQUE (index_id, path)")      # since schema 4, and before


def tables_of(db):
    """{table: its columns}, and the names of the indexes."""
    names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
    columns = {name: sorted(tuple(row)[1:] for row in db.execute("PRAGMA table_info(%s)" % name)) for name in names}
    return columns, sorted(row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'index'"))


def test_an_older_schema_is_brought_up_after_a_copy_was_put_aside(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    columns = (" kind TEXT NOT NULL DEFAULT 'releasefile',\n    for_id INTEGER REFERENCES files ON DELETE CASCADE,")
    assert columns in d.SCHEMA
    with sqlite3.connect(str(old / "devpi_lite.db")) as db:
        db.executescript(d.SCHEMA.replace(columns, "").replace(*UNIQUE_PATH) + """
            INSERT INTO node VALUES ('uuid', 'u'), ('epoch', 'e');
            INSERT INTO users VALUES (1, 'u', NULL, 'g', 'c', NULL, '{}');
            INSERT INTO indexes VALUES (1, 1, 'i', '{"type": "stage"}');
            INSERT INTO projects (id, index_id, name) VALUES (1, 1, 'p');
            INSERT INTO files (index_id, project_id, version, filename, path, hash_spec, uploaded)
                VALUES (1, 1, '1', 'p-1.zip', '+f/x', '', '');
            PRAGMA user_version = 1;""")
    db.close()
    migrated = d.Store(d.Settings(str(old)), create=True)
    fresh = d.Store(d.Settings(str(new)), create=True)
    with migrated.read() as one, fresh.read() as other:
        one_found, one_indexes = tables_of(one)
        other_found, other_indexes = tables_of(other)
        assert [tuple(row) for row in one.execute("SELECT kind, for_id FROM files")] == [("releasefile", None)]
        assert [tuple(row)[:2] for row in one.execute("SELECT * FROM search_queue")] == [(1, "p")]
    assert {name: [column[:4] for column in columns] for name, columns in one_found.items()} \
        == {name: [column[:4] for column in columns] for name, columns in other_found.items()}
    assert one_indexes == other_indexes
    migrated.close()
    fresh.close()
    assert os.path.exists(str(old / "devpi_lite.db.bak-1"))


def test_messages_that_wait_in_an_older_schema_are_their_accounts(tmp_path):
    with sqlite3.connect(str(tmp_path / "devpi_lite.db")) as db:
        db.executescript(d.SCHEMA + d.SCHEMA_SINCE_2 + """
            INSERT INTO node VALUES ('uuid', 'u'), ('epoch', 'e');
            INSERT INTO users VALUES (7, 'u', NULL, 'g', 'c', NULL, '{}');
            INSERT INTO indexes VALUES (3, 7, 'i', '{"type": "stage"}');
            INSERT INTO outbox (delivery, index_id, target, kind, url, headers, body, due)
                VALUES ('d', 3, 't', 'webhook', 'u', '{}', '', 1), ('e', 99, 't', 'webhook', 'u', '{}', '', 1);
            PRAGMA user_version = 2;""")
    db.close()
    store = d.Store(d.Settings(str(tmp_path)), create=True)
    with store.read() as db:
        assert [tuple(row) for row in db.execute("SELECT delivery, account FROM outbox")] == [("d", 7), ("e", 0)]
    store.close()


def test_schema_4_lets_two_projects_list_one_file_and_loses_nothing(tmp_path):
    assert d.SCHEMA.count(UNIQUE_PATH[0]) == 1
    with sqlite3.connect(str(tmp_path / "devpi_lite.db")) as db:
        db.executescript((d.SCHEMA + d.SCHEMA_SINCE_2 + d.SCHEMA_SINCE_3).replace(*UNIQUE_PATH) + """
            INSERT INTO users VALUES (1, 'u', NULL, 'g', 'c', NULL, '{}');
            INSERT INTO indexes VALUES (1, 1, 's', '{"type": "stage"}'), (2, 1, 'm', '{"type": "mirror"}');
            INSERT INTO projects (id, index_id, name, fetched, etag)
                VALUES (1, 1, 'p', NULL, NULL), (2, 2, 'old', 1, 'e'), (3, 2, 'new', 1, 'e');
            INSERT INTO releases VALUES (1, 1, '1', '{}');
            INSERT INTO files (id, index_id, project_id, release_id, version, filename, path, hash_spec, uploaded, kind,
                    for_id, sha256, metadata_sha256)
                VALUES (1, 1, 1, 1, '1', 'p-1.whl', '+f/a', 'h', 't', 'releasefile', NULL, 'aa', 'mm'),
                       (2, 1, 1, 1, '1', 'p-1.whl.toxresult', '+f/b', 'h', 't', 'toxresult', 1, 'bb', NULL),
                       (3, 2, 2, NULL, '1', 'q-1.whl', '+f/c', 'h', 't', 'releasefile', NULL, 'cc', 'mm'),
                       (9, 2, 2, NULL, '1', 'q-2.whl', '+f/d', 'h', 't', 'releasefile', NULL, NULL, NULL);
            DELETE FROM files WHERE id = 9;
            INSERT INTO attestations VALUES (1, '[]');
            PRAGMA user_version = 3;""")
    db.close()
    store = d.Store(d.Settings(str(tmp_path)), create=True)
    add = "INSERT INTO files (index_id, project_id, release_id, version, filename, path, hash_spec, uploaded) " \
          "VALUES (?, ?, ?, '1', 'f', ?, 'h', 't')"
    try:
        with store.read() as db:
            columns = "id, path, kind, for_id, sha256, metadata_sha256"
            assert [tuple(row) for row in db.execute("SELECT %s FROM files" % columns)] \
                == [(1, "+f/a", "releasefile", None, "aa", "mm"), (2, "+f/b", "toxresult", 1, "bb", None),
                    (3, "+f/c", "releasefile", None, "cc", None)]
            assert db.execute("SELECT count(*) FROM attestations").fetchone()[0] == 1
            assert db.execute("PRAGMA foreign_key_check").fetchall() == []
            assert {row["etag"] for row in db.execute("SELECT etag FROM projects")} == {None}
        assert store.write(lambda change: change.execute(add, (2, 3, None, "+f/c")).lastrowid) == 10
        with pytest.raises(sqlite3.IntegrityError):
            store.write(lambda change: change.execute(add, (2, 3, None, "+f/c")))
        with pytest.raises(sqlite3.IntegrityError):     # a stage's path stays one file's
            store.write(lambda change: change.execute(add, (1, 2, 1, "+f/a")))
        store.write(lambda change: change.execute("DELETE FROM files WHERE id = 1"))
        with store.read() as db:        # a test result goes with the file that was tested
            assert [row["id"] for row in db.execute("SELECT id FROM files")] == [3, 10]
            assert db.execute("SELECT count(*) FROM attestations").fetchone()[0] == 0
    finally:
        store.close()


def test_schema_6_keeps_readmes_apart_and_drops_what_describes_one_file(tmp_path):
    metadata = {"name": "p", "description": 'A "long" text\n\u00e9\ud800', "summary": "s",
                "other": {"attestations": ["[1]"], "unknown_field": ["kept"]}}
    with contextlib.closing(sqlite3.connect(str(tmp_path / "devpi_lite.db"))) as db, db:
        db.executescript(d.SCHEMA + d.SCHEMA_SINCE_2 + d.SCHEMA_SINCE_3 + d.SCHEMA_SINCE_4 + d.SCHEMA_SINCE_5 + """
            INSERT INTO users VALUES (1, 'u', NULL, 'g', 'c', NULL, '{}');
            INSERT INTO indexes VALUES (1, 1, 's', '{"type": "stage"}');
            INSERT INTO projects (id, index_id, name) VALUES (1, 1, 'p');
            INSERT INTO releases VALUES (1, 1, '1', 'long'), (2, 1, '2', '{"name": "p", "other": ["odd"]}');
            PRAGMA user_version = 5;""")
        db.execute("UPDATE releases SET metadata = ? WHERE id = 1", (json.dumps(metadata),))
    store = d.Store(d.Settings(str(tmp_path)), create=True)
    with contextlib.closing(store), store.read() as db:
        rows = db.execute("SELECT * FROM releases ORDER BY id").fetchall()
        del metadata["other"]["attestations"]
        assert d.stored_metadata(db, rows[0]) == metadata
        assert b"".join(row[0] for row in db.execute("SELECT piece FROM readmes WHERE release_id = 1 ORDER BY id")) \
            == json.dumps(metadata["description"]).encode()
        assert json.loads(rows[0]["metadata"])["description"] == ""
        assert (d.stored_metadata(db, rows[1]), rows[1]["readme_size"]) == ({"name": "p", "other": ["odd"]}, 0)


def test_a_cache_drops_what_a_commit_touches_and_nothing_else():
    freshness = d.Freshness()
    cache = freshness.cache(1000)
    freshness.keep(cache, "one", 1, 10, frozenset("a"), freshness.moment())
    freshness.keep(cache, "two", 2, 10, frozenset("b"), freshness.moment())
    freshness.touch(frozenset("a"))
    assert (cache.get("one"), cache.get("two")) == (None, 2)
    freshness.touch(frozenset((d.EVERYTHING,)))
    assert cache.get("two") is None and cache.size == 0 and not cache.keys_of


def test_a_value_that_a_commit_may_have_overtaken_is_not_kept():
    freshness = d.Freshness()
    cache = freshness.cache(1000)
    since = freshness.moment()
    freshness.touch(frozenset("a"))
    freshness.keep(cache, "old", 1, 10, frozenset("a"), since)
    freshness.keep(cache, "other", 2, 10, frozenset("b"), since)
    assert (cache.get("old"), cache.get("other")) == (None, 2)
    for _ in range(1000):
        freshness.touch(frozenset("z"))
    freshness.keep(cache, "too long ago", 3, 10, frozenset("b"), since)
    assert cache.get("too long ago") is None


def test_a_cache_is_bounded_and_the_oldest_goes_first():
    freshness = d.Freshness()
    cache = freshness.cache(100)
    for number in range(20):
        freshness.keep(cache, number, number, 10, frozenset((number,)), freshness.moment())
    assert cache.size <= 100 and cache.get(0) is None and cache.get(19) == 19 and len(cache.keys_of) == len(cache.entries)


def test_a_value_expires():
    freshness = d.Freshness()
    cache = freshness.cache(100)
    freshness.keep(cache, "x", 1, 1, frozenset("a"), freshness.moment(), expires=1)
    assert cache.get("x") is None


def test_another_process_is_seen_to_have_committed(tmp_path):
    server, other = (d.CommitCounter(str(tmp_path / ".commits")) for _ in range(2))
    assert not server.changed()
    other.raise_counter()
    assert server.changed() and not server.changed()
    server.close()
    other.close()


def test_a_blob_is_kept_under_its_hash_or_not_at_all(tmp_path):
    blobs = d.Blobs(str(tmp_path))
    digest = keep(blobs, b"content")
    assert digest == hashlib.sha256(b"content").hexdigest() and blobs.open(digest).read() == b"content"
    with blobs.incoming() as incoming:
        incoming.write(b"never kept")
    assert os.listdir(blobs.tmp) == []


def test_a_damaged_blob_is_not_opened_and_is_mended_by_the_same_bytes(tmp_path):
    blobs = d.Blobs(str(tmp_path))
    digest = keep(blobs, b"content")
    with open(blobs.path(digest), "wb") as file:
        file.write(b"cont")
    with pytest.raises(d.NotFound):
        blobs.open(digest, 7)
    assert keep(blobs, b"content") == digest and blobs.open(digest, 7).read() == b"content"


@pytest.mark.parametrize("size", [0, d.Limits.spooled, d.Limits.spooled + 1])
def test_a_spooled_blob_gets_its_file_once_it_is_large_or_kept(tmp_path, size):
    blobs, data = d.Blobs(str(tmp_path)), os.urandom(size)
    with blobs.incoming(spooled=True) as incoming:
        for start in range(0, size, 1000):
            incoming.write(data[start:start + 1000])
        with incoming.reader() as file:
            assert file.read() == data
        assert os.path.exists(incoming.path) == (size > d.Limits.spooled)
        digest = incoming.keep()
    assert blobs.open(digest, size).read() == data and os.listdir(blobs.tmp) == []


def test_a_spooled_blob_that_is_discarded_leaves_nothing(tmp_path):
    blobs = d.Blobs(str(tmp_path))
    for size in (1, d.Limits.spooled + 1):
        with blobs.incoming(spooled=True) as incoming:
            incoming.write(bytes(size))
    assert os.listdir(blobs.tmp) == [] and not any(names for *_, names in os.walk(blobs.files))


def test_only_old_blobs_that_nothing_refers_to_go_to_the_trash(tmp_path):
    blobs = d.Blobs(str(tmp_path))
    used, unused, fresh = (keep(blobs, data) for data in (b"used", b"unused", b"fresh"))
    for digest in (used, unused):
        os.utime(blobs.path(digest), (1, 1))
    assert blobs.sweep(lambda digest: digest == used) == 1
    in_place = [os.path.exists(blobs.path(digest)) for digest in (used, unused, fresh)]
    assert (in_place, blobs.trashed) == ([True, False, True], (1, len(b"unused")))


@pytest.mark.parametrize("ask", ("open", "has", "claim", "keep"))
def test_what_lies_in_the_trash_comes_back_when_it_is_asked_for(tmp_path, ask):
    blobs = d.Blobs(str(tmp_path))
    digest = keep(blobs, b"content")
    os.utime(blobs.path(digest), (1, 1))
    blobs.sweep(lambda digest: False)
    if ask == "keep":
        keep(blobs, b"content")
    else:
        assert getattr(blobs, ask)(digest)
    assert blobs.open(digest).read() == b"content"
    assert blobs.sweep(lambda digest: False) == 0       # it is young again
    assert ask == "keep" or os.listdir(blobs.trash) == []


def in_trash(tmp_path, data=b"content"):
    """(Blobs, the digest of one that lies in the trash)."""
    blobs = d.Blobs(str(tmp_path))
    digest = keep(blobs, data)
    os.utime(blobs.path(digest), (1, 1))
    assert blobs.sweep(lambda digest: False) == 1
    return blobs, digest


def fail(error):
    def call(*_, **__):
        raise OSError(error, os.strerror(error))
    return call


@pytest.mark.parametrize("name, error", [("utime", errno.EROFS), ("replace", errno.EACCES)])
@pytest.mark.parametrize("read_only", [True, False])
def test_what_cannot_be_moved_is_read_from_the_trash(tmp_path, monkeypatch, name, error, read_only):
    _, digest = in_trash(tmp_path)
    blobs = d.Blobs(str(tmp_path), read_only)
    function = getattr(os, name)

    def fail_in_trash(path, *args):
        (fail(error) if path.startswith(blobs.trash) else function)(path, *args)
    monkeypatch.setattr(os, name, fail_in_trash)
    with blobs.open(digest, 7) as file:
        assert file.read() == b"content"
    assert blobs.has(digest, 7) and not blobs.has(digest, 8)
    assert os.listdir(blobs.trash) == [digest]
    # nothing may refer to what the trash deletes after its time
    assert blobs.claim(digest) is read_only
    assert not blobs.has("0" * 64) and not blobs.claim("0" * 64)


@pytest.mark.parametrize("ask", ("open", "has", "claim"))
def test_what_lies_in_the_trash_comes_back_where_its_folder_is_missing(tmp_path, ask):
    blobs, digest = in_trash(tmp_path)
    os.rmdir(os.path.dirname(blobs.path(digest)))
    assert getattr(blobs, ask)(digest)
    assert os.path.exists(blobs.path(digest))


@pytest.mark.parametrize("ask", ("open", "has", "claim"))
def test_nothing_comes_back_while_the_trash_is_emptied(tmp_path, ask):
    blobs, digest = in_trash(tmp_path)
    found = []
    with blobs.lock:
        thread = threading.Thread(target=lambda: found.append(getattr(blobs, ask)(digest)))
        thread.start()
        thread.join(0.1)
        assert thread.is_alive() and os.listdir(blobs.trash) == [digest]
    thread.join(10)
    assert found and os.listdir(blobs.trash) == []


def test_many_find_at_once_what_lies_in_the_trash(tmp_path):
    blobs, digest = in_trash(tmp_path)
    found = []
    threads = [threading.Thread(target=lambda: found.append(blobs.has(digest))) for _ in range(20)]
    with blobs.lock:        # all see that it is not in place
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20


def test_what_a_crash_left_in_the_trash_stays_its_whole_time(tmp_path, monkeypatch):
    blobs, digest = d.Blobs(str(tmp_path)), keep(d.Blobs(str(tmp_path)), b"content")
    os.utime(blobs.path(digest), (1, 1))
    replace = os.replace

    def replace_and_crash(*paths):
        replace(*paths)
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", replace_and_crash)
    with pytest.raises(KeyboardInterrupt):
        blobs.sweep(lambda digest: False)
    monkeypatch.undo()
    blobs = d.Blobs(str(tmp_path))
    blobs.sweep(lambda digest: False)
    assert blobs.trashed == (1, 7) and blobs.has(digest)


def test_what_cannot_be_deleted_stays_in_the_trash_and_counts(tmp_path, monkeypatch):
    blobs, digest = in_trash(tmp_path)
    monkeypatch.setattr(d.Limits, "trash", -1)
    monkeypatch.setattr(os, "unlink", fail(errno.EACCES))
    blobs.empty_trash()
    assert blobs.trashed == (1, 7) and os.listdir(blobs.trash) == [digest]


def test_the_folder_of_what_comes_in_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(d.Limits, "spooled", 5)
    blobs = d.Blobs(str(tmp_path))
    os.rmdir(blobs.tmp)
    assert blobs.has(keep(blobs, b"content"))
    os.rmdir(blobs.tmp)
    with d.Spool(blobs) as spool:
        spool.write(b"abcdefgh")
        assert spool.value() == b"abcdefgh"


def test_the_trash_is_emptied_after_its_time_and_not_before(tmp_path, monkeypatch):
    blobs = d.Blobs(str(tmp_path))
    digest = keep(blobs, b"content")
    os.utime(blobs.path(digest), (1, 1))
    blobs.sweep(lambda digest: False)
    blobs.empty_trash()
    assert blobs.trashed == (1, len(b"content"))
    monkeypatch.setattr(d.Limits, "trash", -1)
    blobs.empty_trash()
    assert (blobs.trashed, blobs.has(digest)) == ((0, 0), False)


def test_an_upload_of_bytes_that_a_mirror_cached_makes_their_name_durable(tmp_path, monkeypatch):
    blobs, synced, sync = d.Blobs(str(tmp_path)), [], d.sync_directory
    monkeypatch.setattr(d, "sync_directory", lambda path: synced.append(path) or sync(path))
    for durable in (False, True):
        with blobs.incoming() as incoming:
            incoming.write(b"content")
            digest = incoming.keep(durable=durable)
        assert synced == [os.path.dirname(blobs.path(digest))] * durable


# -- one at a time


def test_nobody_joins_a_flight_that_has_failed_though_its_worker_has_not_left_it():
    flights, failed, leave = d.SingleFlight("test", 2, 3), threading.Event(), threading.Event()
    index = d.Index(1, "mia", "m", {})

    class Slow(d.Flight):
        def run(self):
            super().run()
            failed.set()
            leave.wait(30)

    def fail():
        raise d.UpstreamTrouble("the first attempt")
    first = flights.start("key", "lane", index, Slow(fail))
    assert failed.wait(30)
    gate = threading.Event()
    second = flights.start("key", "lane", index, d.Flight(lambda: gate.wait(30)))
    assert second is not first and flights.start("key", "lane", index, d.Flight(fail)) is second
    leave.set()
    assert first.wait(30) and first.error is not None
    assert flights.start("key", "lane", index, d.Flight(fail)) is second       # the first has taken only itself out
    gate.set()
    assert second.wait(30) and second.error is None and flights.flights == flights.under_way == {}


def test_who_leaves_a_line_and_asks_again_stands_behind_the_others():
    line, order = d.Line(1), []

    def often(name):
        for _ in range(5):
            with line:
                order.append(name)
                time.sleep(0.02)        # the others ask meanwhile

    threads = [threading.Thread(target=often, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert line.free == 1 and not line.waiting
    assert all(set(order[at:at + 3]) == set("abc") for at in range(2, 10))


def test_those_who_want_the_same_value_take_turns_and_find_it_made():
    turns, values, made, gate = d.Turns(), {}, [], threading.Barrier(8)

    def want():
        gate.wait()
        with turns.turn("page", 10):
            if "page" not in values:
                made.append(threading.current_thread())
                time.sleep(0.05)        # so long that all would make it if they were let
                values["page"] = "made"

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and turns.turns == {}


def test_a_turn_is_not_waited_for_longer_than_said_nor_by_those_who_want_something_else():
    turns, entered = d.Turns(), []
    with turns.turn("slow", 0):
        with turns.turn("other", 0), turns.turn("slow", 0.01):
            entered.append("without a turn")
        with pytest.raises(ValueError), turns.turn("slow", 0.01):
            raise ValueError
        # whoever went on without leaves the turn with the one that has it
        assert turns.turns["slow"][0].locked()
    assert entered and turns.turns == {}


def test_a_turn_may_be_waited_for_for_ever():
    turns, entered = d.Turns(), []

    def want():
        with turns.turn("slow", -1):
            entered.append(turns.turns["slow"][0].locked())
    thread = threading.Thread(target=want)
    with turns.turn("slow", -1):
        thread.start()
        time.sleep(0.05)
        assert not entered
    thread.join(10)
    assert entered == [True] and turns.turns == {}


@pytest.mark.parametrize("text, bounds", [
    ("20K", (20 << 10, 90 * 86400)), ("1G", (1 << 30, 90 * 86400)), ("5d", (64 << 20, 5 * 86400)),
    ("8M,5d", (8 << 20, 5 * 86400)), ("", None), ("0M", None), ("5", None), (",5d", None),
    ("8M,", None), ("8M5d", None), ("5d,8M", None), ("8M,5d\n", None)])
def test_how_much_of_the_changelog_is_kept_is_a_size_an_age_or_both(text, bounds):
    if bounds:
        assert d._log_bounds(text) == bounds
    else:
        with pytest.raises(ValueError):
            d._log_bounds(text)


@pytest.mark.parametrize("function", ["stat", "access"])
def test_a_database_that_is_closed_to_us_is_not_called_missing(tmp_path, monkeypatch, function):
    database = tmp_path / "devpi_lite.db"
    database.write_bytes(b"")
    real = getattr(os, function)

    def closed(path, *arguments, **keywords):
        if path != str(database):
            return real(path, *arguments, **keywords)
        if function == "stat":
            raise PermissionError(errno.EACCES, "Permission denied")
        return False
    monkeypatch.setattr(os, function, closed)
    with pytest.raises(d.FatalError) as caught:
        d.refuse_no_database(str(tmp_path))
    assert str(caught.value) == f"can't read {database}: Permission denied; run this as the user who owns it"


def test_a_database_that_is_missing_is_told_from_a_directory_of_another_kind(tmp_path):
    def said(path):
        with pytest.raises(d.FatalError) as caught:
            d.open_rows(str(path))
        return str(caught.value)
    assert said(tmp_path) == f"no devpi_lite database in {tmp_path}"
    assert said(tmp_path / "none") == f"no devpi_lite database in {tmp_path / 'none'}: there is no such directory"
    (tmp_path / ".nodeinfo").write_text("{}")
    assert said(tmp_path) == f"no devpi_lite database in {tmp_path}: it belongs to a devpi-server"
