"""Chapters 3 and 4: changes, serials, the changelog's chain, what caches keep, blobs."""
import hashlib
import json
import os
import pathlib
import struct
import sys
import threading
import zlib

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import devpi_lite as d  # noqa: E402


@pytest.fixture
def store(tmp_path):
    store = d.Store(str(tmp_path), create=True)
    yield store
    store.close()


def add_user(change, name):
    d._insert_user(change, name, None, {})


def count_users(store):
    with store.read() as db:
        return db.execute("SELECT count(*) FROM users").fetchone()[0]


def test_each_change_has_its_own_serial_and_the_log_is_a_chain(store):
    for name in ("a", "b", "c"):
        store.write(add_user, name, who="root")
    with store.read() as db:
        rows = db.execute("SELECT * FROM changelog ORDER BY serial").fetchall()
    assert [row["serial"] for row in rows] == [0, 1, 2] and store.serial == 2
    previous = b""
    for row, name in zip(rows, "abc"):
        assert row["prev"] == previous and row["who"] == "root"
        assert row["hash"] == hashlib.sha256(previous + struct.pack(">Q", row["serial"]) + row["ops"]).digest()
        assert json.loads(zlib.decompress(row["ops"]))[0]["k"] == [name]
        previous = row["hash"]


def test_a_change_that_raises_is_undone_alone_and_takes_no_serial(store):
    def half(change, name):
        add_user(change, name)
        raise d.Conflict("no")

    release = threading.Event()
    store.tasks.put(d.WriteTask(lambda change: release.wait(5), (), None))      # so that the three share a commit
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
    store = d.Store(str(tmp_path), create=True)
    store.writer.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(d.FatalError, match="99"):
        d.Store(str(tmp_path), create=True)


def test_an_older_schema_is_brought_up_after_a_copy_was_put_aside(tmp_path, monkeypatch):
    d.Store(str(tmp_path), create=True).close()
    monkeypatch.setattr(d, "MIGRATIONS", (lambda db: db.execute("CREATE TABLE extra (x)"),))
    monkeypatch.setattr(d, "SCHEMA_VERSION", 2)
    store = d.Store(str(tmp_path), create=True)
    store.write(lambda change: change.execute("INSERT INTO extra VALUES (1)"))
    store.close()
    assert os.path.exists(str(tmp_path / "devpi_lite.db.bak-1"))


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
    digest = blobs.add(b"content")
    assert digest == hashlib.sha256(b"content").hexdigest() and blobs.open(digest).read() == b"content"
    with blobs.incoming() as incoming:
        incoming.write(b"never kept")
    assert os.listdir(blobs.tmp) == []


def test_a_damaged_blob_is_not_opened_and_is_mended_by_the_same_bytes(tmp_path):
    blobs = d.Blobs(str(tmp_path))
    digest = blobs.add(b"content")
    with open(blobs.path(digest), "wb") as file:
        file.write(b"cont")
    with pytest.raises(d.NotFound):
        blobs.open(digest, 7)
    assert blobs.add(b"content") == digest and blobs.open(digest, 7).read() == b"content"


def test_only_old_blobs_that_nothing_refers_to_are_collected(tmp_path):
    blobs = d.Blobs(str(tmp_path))
    used, unused, fresh = (blobs.add(data) for data in (b"used", b"unused", b"fresh"))
    for digest in (used, unused):
        os.utime(blobs.path(digest), (1, 1))
    assert blobs.collect(lambda digest: digest == used) == 1
    assert (blobs.has(used), blobs.has(unused), blobs.has(fresh)) == (True, False, True)


def test_an_upload_of_bytes_that_a_mirror_cached_makes_their_name_durable(tmp_path, monkeypatch):
    blobs, synced, sync = d.Blobs(str(tmp_path)), [], d.sync_directory
    monkeypatch.setattr(d, "sync_directory", lambda path: synced.append(path) or sync(path))
    for durable in (False, True):
        with blobs.incoming() as incoming:
            incoming.write(b"content")
            digest = incoming.keep(durable=durable)
        assert synced == [os.path.dirname(blobs.path(digest))] * durable
