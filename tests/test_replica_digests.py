"""Digests of rows: a primary and a replica can prove that they hold the same, and what differs is
named, by the daily comparison and by `fsck --against`.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import threading

import pytest

import devpi_lite as d
from harness import documentation, eventually, patched, run_command, upload_docs, wheel
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
        self.primary = primary_at(folder / "p").start()
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
        pair.replica.start()
        fill(pair.primary)
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
    facts = asked(pair.primary).json()
    assert facts["serial"] == status(pair.primary)["serial"]
    assert set(facts["digests"]) == {"", "ann/dev", "bob/dev"}
    assert facts["digests"] == digests_in(pair.primary.directory) \
        == digests_in(pair.replica.directory)
    of_one = asked(pair.primary, "?index=ann/dev").json()
    assert of_one["digests"] == digests_in(pair.replica.directory, "ann/dev")
    assert {"demo", "tool"} <= set(of_one["digests"])
    assert asked(pair.primary, "?serial=999999&wait=1").status == 404
    assert asked(pair.primary, "?serial=x").status == 400
    assert pair.primary.get(DIGESTS, user=None).status == 401


def test_many_rows_are_counted_by_processes_of_their_own(pair, tmp_path):
    folders = [shutil.copytree(server.directory, tmp_path / name)
               for name, server in (("p", pair.primary), ("r", pair.replica))]
    primary = primary_at(folders[0], script=patched(tmp_path, APART)).start()
    replica = replica_at(folders[1], primary, script=patched(tmp_path, SOON + APART))
    try:
        begun = asked(primary).json()
        assert begun["digests"] is None
        ended = asked(primary, "?serial=%d&wait=20" % begun["serial"]).json()
        assert ended == dict(begun, digests=digests_in(folders[0]))
        replica.start()
        found = eventually(lambda: compared(replica))
        assert found["differ"] == [] and found["serial"] == begun["serial"]
    finally:
        for server in (replica, primary):
            if server.running:
                server.kill()


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
        assert [text for text in said["messages"] if "bob/dev" in text]
        shown = replica.get("/+status", user="root", password="secret").result["messages"]
        assert [text for text in shown if "fsck --against" in text and "resync" in text]
        eventually(lambda: "bob/dev" in replica.output())
        assert replica.get("/+health/ready").status == 200

        metrics = replica.get("/+metrics", user=None).text
        assert "devpi_lite_replica_differing_indexes 1" in metrics

        # remembered over a start, and healed by the right rows
        replica.stop()
        assert "bob/dev" in run_command("status", "--serverdir", replica.directory).stdout
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


# -- fsck --against


def checked(directory, url, *options, status=0):
    """The lines that `fsck --against` prints; the last one sums up."""
    done = run_command("fsck", "--serverdir", directory, "--against", url, *options)
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return (done.stdout + done.stderr).strip().splitlines()


@pytest.fixture
def check(pair, copy):
    """check(*options, status=0): compares the copy of the replica's directory with the primary."""
    return lambda *options, status=0: checked(
        copy, pair.primary.url, "--secretfile", pair.primary.directory / ".secret", *options,
        status=status)


def test_fsck_finds_a_replica_equal_to_its_primary(pair, check):
    *findings, last = check()
    assert findings == [] and last.endswith("no errors")
    assert "compared with %s at serial" % pair.primary.url in last
    facts = json.loads(check("--json", "--no-checksum")[-1])
    assert facts["against"] == {
        "url": pair.primary.url, "serial": status(pair.primary)["serial"], "diverged": False,
        "differing_indexes": 0}


def test_fsck_names_the_projects_and_users_whose_rows_differ(pair, check, copy):
    with changed(copy) as db:
        db.execute("UPDATE files SET size = size + 1 WHERE filename LIKE 'tool%' AND index_id = "
                   "(SELECT max(id) FROM indexes)")
        db.execute("UPDATE users SET modified = 'x' WHERE name = 'ann'")
    lines = check("--no-checksum", status=1)
    (of_users,), (of_index,) = ([line for line in lines if line.startswith("error: " + name)
                                 and "its rows are not those" in line]
                                for name in ("the users", "bob/dev"))
    assert "user ann:" in of_users and "project tool:" in of_index and "resync" in of_index
    found = [json.loads(line) for line in check("--no-checksum", "--json", status=1)]
    assert [line["subject"] for line in found if line.get("kind") == "differs"] == \
        ["the users", "bob/dev"]
    assert found[-1]["against"]["differing_indexes"] == 2


@pytest.mark.skipif(os.name == "nt", reason="no SIGSTOP")
def test_fsck_waits_until_a_replica_that_runs_has_the_same_serial(tmp_path):
    primary = primary_at(tmp_path / "p").start()
    replica = replica_at(tmp_path / "r", primary)
    try:
        fill(primary)
        replica.start()
        in_sync(primary, replica)
        checked(replica.directory, primary.url, "--secretfile", primary.directory / ".secret")
        replica.process.send_signal(signal.SIGSTOP)
        primary.upload("ann/dev", wheel("late", "1.0"))
        threading.Timer(1, replica.process.send_signal, (signal.SIGCONT,)).start()
        *_, last = checked(replica.directory, primary.url, "--no-checksum", "--secretfile",
                           primary.directory / ".secret")
        assert "at serial %d" % status(primary)["serial"] in last
    finally:
        for server in (replica, primary):
            if server.running:
                server.kill()


def test_fsck_says_that_rows_were_not_compared_if_nobody_follows(pair, copy, tmp_path):
    script = patched(tmp_path, "devpi_lite.Limits.against_wait = 0.3")
    with changed(copy) as db:
        db.execute("DELETE FROM changelog WHERE serial = (SELECT max(serial) FROM changelog)")
    done = run_command("fsck", "--serverdir", copy, "--against", pair.primary.url, "--secretfile",
                       pair.primary.directory / ".secret", script=script)
    assert done.returncode == 1 and "the rows were not compared" in done.stdout and "follow it?" in done.stdout, done
    assert "not compared with %s" % pair.primary.url in done.stdout


@pytest.mark.parametrize("ahead", [0, 2])
def test_fsck_tells_parted_histories_by_its_status(pair, check, copy, ahead):
    serial = status(pair.primary)["serial"]
    with contextlib.closing(d.Store(d.Settings(serverdir=str(copy)))) as store:
        store.closed_to_rows = None
        with changed(copy) as db:
            db.execute("DELETE FROM changelog WHERE serial > ?", (serial - 1,))
        for number in range(1 + ahead):
            store.write(lambda change: change.put("gone", ("ann/dev/+f/%d" % number,), {}))
    lines = check("--no-checksum", status=3)
    parted, = [line for line in lines if "histories have parted" in line]
    assert "after serial %d: %d change" % (serial - 1, 1 + ahead) in parted
    assert json.loads(check("--json", "--no-checksum", status=3)[-1])["against"]["diverged"] is True
    # a check does not fence: a later term here ends no primary
    assert status(pair.primary)["fenced"] is None


def test_fsck_against_a_server_that_gives_nothing_says_why(pair, copy, tmp_path):
    secret = pair.primary.directory / ".secret"
    other = tmp_path / "other"
    other.write_text("another secret, that nobody else has\n")
    other.chmod(0o600)
    for options, url, code, sentence in (
            (("--secretfile", other), pair.primary.url, 1, "--secretfile"),
            (("--secretfile", secret), "http://127.0.0.1:9", 1, "does not answer"),
            (("--secretfile", secret), "http://ann:pw@127.0.0.1:9", 2, "without user and password"),
            (("--secretfile", tmp_path / "none"), pair.primary.url, 1, "can't read the secret"),
            ((), pair.primary.url, 2, "there is no .secret")):
        lines = checked(copy, url, *options, status=code)
        assert len(lines) == 1 and sentence in lines[0], lines
    done = run_command("fsck", "--serverdir", copy, "--secretfile", secret)
    assert done.returncode == 2 and "--against" in done.stderr


def test_fsck_against_a_replica_or_a_standalone_server_says_what_to_do(pair, copy, shared_server):
    secret = pair.primary.directory / ".secret"
    pair.replica.start()
    try:
        line, = checked(copy, pair.replica.url, "--secretfile", secret, status=1)
        assert "is a replica: run this on its directory" in line
    finally:
        pair.replica.stop()
    line, = checked(copy, shared_server.url, "--secretfile", secret, status=1)
    assert "--role primary" in line


# -- fsck on a replica's directory


def blob_of(directory, archive):
    sha256 = hashlib.sha256(archive.content).hexdigest()
    return directory / "files" / sha256[:2] / sha256


@pytest.mark.parametrize("runs", [False, True])
def test_fsck_has_a_replica_fetch_damaged_and_missing_files_again(pair, copy, runs):
    damaged, missing = (blob_of(copy, wheel(name, "1.0")) for name in ("demo", "tool"))
    content = damaged.read_bytes()
    replica = replica_at(copy, pair.primary)
    try:
        if runs:
            replica.start()
            comes_to_be(replica, "following")
        damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        missing.unlink()
        done = run_command("fsck", "--serverdir", copy)
        assert done.returncode == 1
        assert done.stdout.count("error: ") == done.stdout.count("it is damaged") == 2, done.stdout
        assert "warning: ann/dev" in done.stdout and "it is missing" in done.stdout
        assert "has this replica fetch it from its primary again" in done.stdout

        done = run_command("fsck", "--serverdir", copy, "--repair")
        assert done.returncode == 0, done.stdout
        assert done.stdout.count("repaired: ") == 4 and pair.primary.url in done.stdout
        if not runs:
            assert not damaged.exists() and not missing.exists()
            again = run_command("fsck", "--serverdir", copy)
            assert again.returncode == 0 and "it has not arrived from" in again.stdout
            replica.start()
        eventually(lambda: status(replica)["wanted"]["files"] == 0 and missing.exists()
                   and damaged.exists())
        assert damaged.read_bytes() == content
        assert [path.name.startswith(damaged.name + ".damaged")
                for path in (copy / "trash").iterdir()] == [True]
        done = run_command("fsck", "--serverdir", copy)
        assert done.returncode == 0 and done.stdout.strip().endswith("no errors"), done.stdout
    finally:
        if replica.running:
            replica.kill()


def test_damaged_documentation_of_a_replica_is_shown_again(pair, copy):
    docs = documentation("demo", "1.0", page="<h1>read me</h1>")
    damaged = blob_of(copy, docs)
    damaged.write_bytes(b"x" * len(docs.content))
    done = run_command("fsck", "--serverdir", copy, "--repair")
    assert done.returncode == 0 and "repaired: ann/dev" in done.stdout, done.stdout
    replica = replica_at(copy, pair.primary).start()
    try:
        eventually(lambda: status(replica)["wanted"]["files"] == 0 and damaged.exists())
        page = replica.get("/ann/dev/demo/1.0/+doc/index.html", headers={"Accept": "*/*"})
        assert b"read me" in page.body
        done = run_command("fsck", "--serverdir", copy)
        assert done.stdout.strip().endswith("no errors"), done.stdout
    finally:
        replica.kill()
