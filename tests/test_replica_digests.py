"""Digests of rows: a primary and a replica can prove that they hold the same, and what differs is
named, by the daily comparison and by `fsck --against`.
"""

import contextlib
import shutil
import sqlite3

import pytest

import devpi_lite as d
from harness import documentation, eventually, patched, upload_docs, wheel
from replicas import comes_to_be, in_sync, primary_at, replica_at, signed, status

DIGESTS = "/+repl/v1/digests"
# rows are compared soon, and counted by a process of their own
SOON = """
devpi_lite.Limits.first_comparison = 0.1
devpi_lite.Limits.comparison_retry = 0.1
devpi_lite.Limits.comparison_pause = 0.2
devpi_lite.Limits.log_wait = 0
until = devpi_lite.RowComparison.until
def paced(self, serial):
    devpi_lite.time.sleep(0.02)
    return until(self, serial)
devpi_lite.RowComparison.until = paced
"""
APART = "devpi_lite.Limits.digest_rows = 0\n"


@contextlib.contextmanager
def changed(directory):
    """A connection that changes the database as nobody should."""
    path = str(directory / "devpi_lite.db")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        yield db


def fill(primary):
    """A row of each kind, and two indexes."""
    primary.login("root")
    for user in "ann", "bob":
        primary.add_user(user)
        primary.add_index(user + "/dev", volatile=True)
        primary.upload(user + "/dev", wheel("demo", "1.0"))
        primary.upload(user + "/dev", wheel("tool", "1.0"))
    upload_docs(primary, "ann/dev", documentation("demo", "1.0", page="<h1>read me</h1>"))
    primary.upload("ann/dev", wheel("old", "1.0"))
    assert primary.delete("/ann/dev/old", user="ann").status == 200
    assert primary.patch("/bob/dev/tool", {"project-status": {"status": "archived"}},
                         user="bob").status == 200


class Pair:
    def __init__(self, folder):
        self.folder = folder
        self.primary = primary_at(folder / "p", script=patched(folder, APART)).start()
        self.replica = replica_at(folder / "r", self.primary)

    def end(self):
        for server in (self.replica, self.primary):
            if server.running:
                server.kill()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A primary with a row of each kind, and a replica that is stopped and has all."""
    pair = Pair(tmp_path_factory.mktemp("pair"))
    try:
        fill(pair.primary)
        pair.replica.start()
        in_sync(pair.primary, pair.replica)
        pair.replica.stop()
        yield pair
    finally:
        pair.end()


@pytest.fixture
def copy(pair, tmp_path):
    """A copy of the replica's directory."""
    return shutil.copytree(pair.replica.directory, tmp_path / "copy")


def digests_in(directory, index=None):
    with contextlib.closing(d.open_rows(str(directory))) as db:
        return d.row_digests(db, index)


def asked(server, more=""):
    target = DIGESTS + more
    return server.get(target, headers=signed(server, target), user=None)


def test_digests_are_those_of_the_rows_at_their_serial(pair):
    begun = asked(pair.primary)
    assert begun.status == 200, begun
    facts = begun.json()
    assert facts["digests"] is None and facts["serial"] == status(pair.primary)["serial"]
    ended = asked(pair.primary, "?serial=%d&wait=20" % facts["serial"]).json()
    assert (ended["serial"], ended["hash"]) == (facts["serial"], facts["hash"])
    assert set(ended["digests"]) == {"", "ann/dev", "bob/dev"}
    assert ended["digests"] == digests_in(pair.primary.directory) \
        == digests_in(pair.replica.directory)
    begun = asked(pair.primary, "?index=ann/dev").json()
    of_one = asked(pair.primary, "?index=ann/dev&wait=20&serial=%d" % begun["serial"]).json()
    assert of_one["digests"] == digests_in(pair.replica.directory, "ann/dev")
    assert {"demo", "tool"} <= set(of_one["digests"])
    assert asked(pair.primary, "?serial=999999&wait=1").status == 404
    assert asked(pair.primary, "?serial=x").status == 400
    assert pair.primary.get(DIGESTS, user=None).status == 401


def test_each_kind_of_row_is_in_the_digests(pair, copy):
    """All that is in a table of people's data: a changed value of any column shows."""
    before = digests_in(copy)
    changes = {
        "users": ("pwhash = pwhash || 'x' WHERE name = 'ann'", ""),
        "indexes": ("config = json_set(config, '$.title', 'x') WHERE id = "
                    "(SELECT max(id) FROM indexes)", "bob/dev"),
        "projects": ("status = NULL WHERE status IS NOT NULL", "bob/dev"),
        "releases": ("metadata = json_set(metadata, '$.summary', 'x') WHERE id = "
                     "(SELECT min(id) FROM releases)", "ann/dev"),
        "files": ("yanked = '' WHERE id = (SELECT max(id) FROM files)", None),
        "withdrawn": ("kept = 1 - kept", "ann/dev"),
        "gone": ("path = path || 'x'", "ann/dev"),
        "metadata_files": ("packed = x'00'", "")}
    tables = {kind.table for kind in d.ROWS.values()}
    assert tables == set(changes)
    for table, (change, index) in changes.items():
        with changed(copy) as db:
            db.execute("BEGIN")
            assert db.execute("UPDATE %s SET %s" % (table, change)).rowcount, table
            db.row_factory = sqlite3.Row
            differ = d.differing(before, d.row_digests(db))
            db.execute("ROLLBACK")
        assert len(differ) == 1 and (index is None or differ == [index]), (table, differ)
    with changed(copy) as db:
        db.execute("DELETE FROM files WHERE id = (SELECT max(id) FROM files)")
    assert d.differing(before, digests_in(copy)) and \
        d.differing(before, digests_in(pair.replica.directory)) == []


def test_digests_do_not_depend_on_the_order_or_on_what_a_row_is_stored_as(pair, copy):
    with changed(copy) as db:
        db.execute("UPDATE releases SET metadata = json(metadata), id = 1000 - id")
        db.execute("UPDATE files SET release_id = 1000 - release_id")
        db.execute("UPDATE readmes SET release_id = 1000 - release_id")
        sha256, packed = db.execute("SELECT * FROM metadata_files").fetchone()
        again = d.zlib.compress(d.zlib.decompress(packed), 9)
        assert again != packed
        db.execute("UPDATE metadata_files SET packed = ? WHERE sha256 = ?", (again, sha256))
    assert digests_in(copy) == digests_in(pair.replica.directory)


def compared(replica, after=0):
    """The last comparison, if it was made later than `after`."""
    found = status(replica)["replica-rows-compared"]
    return found["at"] and found["at"] > after and found


def test_many_rows_are_counted_by_processes_of_their_own(pair, tmp_path):
    directory = shutil.copytree(pair.replica.directory, tmp_path / "r")
    replica = replica_at(directory, pair.primary, script=patched(tmp_path, SOON + APART)).start()
    try:
        found = eventually(lambda: compared(replica))
        assert found["differ"] == [] and found["serial"] == status(pair.primary)["serial"]
    finally:
        replica.kill()


def test_a_replica_compares_its_rows_with_the_primary_and_says_what_differs(tmp_path):
    script = patched(tmp_path, SOON)
    primary = primary_at(tmp_path / "p", script=script).start()
    replica = replica_at(tmp_path / "r", primary, script=script)
    try:
        fill(primary)
        replica.start()
        in_sync(primary, replica)
        found = eventually(lambda: compared(replica))
        assert found["differ"] == [] and found["trouble"] is None
        assert status(replica)["status"] == "ok"

        # what comes meanwhile is no difference
        for number in range(5):
            primary.upload("ann/dev", wheel("more", "1.%d" % number))
        in_sync(primary, replica)
        again = eventually(lambda: compared(replica, found["at"]))
        assert again["differ"] == [], again

        with changed(replica.directory) as db:
            db.execute("UPDATE files SET yanked = 'x' WHERE filename LIKE 'tool%' AND index_id = "
                       "(SELECT max(id) FROM indexes)")
        found = eventually(lambda: (lambda found: found and found["differ"] and found)(
            compared(replica, again["at"])))
        assert found["differ"] == ["bob/dev"]
        said = status(replica)
        assert said["status"] == "fatal", said
        assert [text for text in said["messages"] if "bob/dev" in text and "resync" in text]
        assert "bob/dev" in replica.output()
        assert replica.get("/+health/ready").status == 200

        # remembered over a start, and healed by the right rows
        replica.stop()
        replica.script = patched(tmp_path, SOON + "devpi_lite.Limits.first_comparison = 0.4")
        replica.start()
        comes_to_be(replica, "following")
        assert status(replica)["replica-rows-compared"]["differ"] == ["bob/dev"]
        with changed(replica.directory) as db:
            db.execute("UPDATE files SET yanked = NULL WHERE yanked = 'x'")
        eventually(lambda: compared(replica, found["at"]) and not compared(replica)["differ"])
        assert status(replica)["status"] == "ok"
    finally:
        for server in (replica, primary):
            if server.running:
                server.kill()
