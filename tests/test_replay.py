"""The changelog is the whole truth about what people did: replayed into an empty directory it gives
the same rows, and a server that shows the same.

`DEVPI_LITE_ROUNDS=50` lets that many crowds loose in place of one, other ones each time;
`DEVPI_LITE_SEED=7` begins with that one.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import sqlite3
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest

import devpi_lite
import replay
from harness import (
    Server, Upstream, eventually, multipart, patched, run_command, sdist, wheel)
from replay import MIRRORS, Crowd, differences, log_of, rows_of

ROUNDS = int(os.environ.get("DEVPI_LITE_ROUNDS", 0))
FIRST = int(os.environ.get("DEVPI_LITE_SEED", time.time() if ROUNDS else 1))
SEEDS = range(FIRST, FIRST + (ROUNDS or 1))

# The program, to which passwords cost little: most of the time would go there.
HASTY = "devpi_lite._SCRYPT['n'] = 1 << 10"
# Which also cleans all the time, and at once.
CLEANING = "devpi_lite.Limits.cleaning = 0.1\ndevpi_lite.Blobs.sweep.__defaults__ = (-1,)"


class Played:
    """A server on which a crowd has been; nobody writes to it any more."""

    def __init__(self, folder, seed):
        self.seed, self.folder = seed, folder
        self.copies, self.whole = 0, None
        self.upstream = Upstream().start()
        self.server = Server(folder / "old", script=patched(folder, HASTY)).start()
        self.crowd = Crowd(self.server, self.upstream, seed)

    def play(self):
        self.crowd.settle().tour()
        self.crowd.alone(120, looks=4)
        self.crowd.together(4, 30)
        self.crowd.look()
        self.crowd.close()
        self.rows = rows_of(self.server.directory, MIRRORS)
        self.log = log_of(self.server.directory)

    def new(self):
        """The path of a directory that is not there yet."""
        self.copies += 1
        return self.folder / ("new%d" % self.copies)

    def replayed(self):
        """A directory into which all is replayed."""
        if self.whole is None:
            self.whole = self.new()
            self.said = replay_into(self.whole, self.server.directory, run=run_command)
        return self.whole

    def end(self):
        if self.server.running:
            self.server.kill()
        self.upstream.stop()


@pytest.fixture(scope="module", params=SEEDS)
def played(request, tmp_path_factory):
    played = Played(tmp_path_factory.mktemp("seed"), request.param)
    try:
        played.play()
        yield played
    finally:
        played.end()


def replay_into(new, old, *options, run=replay.run):
    """Replays; returns what is written to standard output."""
    done = run("_replay", "--serverdir", new, old, *options)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def no_difference(old, new, **options):
    none_of(differences(old, new, **options))


def none_of(found):
    assert not found, "\n".join(found[:50])


# -- the crowd and what it leaves


def test_the_crowd_does_everything_and_is_refused_some(played):
    counts = played.crowd.counts
    assert [act for act in replay.Player.acts if not counts[act][200] + counts[act][201]] == []
    refused = sum(counts.values(), type(counts["upload"])())
    assert min(refused[400], refused[403], refused[404], refused[409]) > 0, refused
    assert refused[503] == 0, refused
    assert "Traceback" not in played.server.whole_output()
    empty = [table for table, rows in played.rows.tables.items() if not rows]
    assert empty == []


def test_the_rows_fit_together_at_all_times(played):
    assert [(rows.serial, found) for rows in [*played.crowd.seen, played.rows]
            for found in replay.misfits(rows)] == []


def test_each_entry_of_the_changelog_holds_the_hash_of_the_one_before(played):
    assert replay.breaks(played.log) == []
    assert len(played.log) == played.rows.serial + 1


def test_a_break_of_the_chain_is_found(played):
    log, at = list(played.log), random.Random(played.seed).randrange(1, len(played.log) - 1)
    for change in ({"ops": log[at].ops + b"x"}, {"hash": b"x" * 32}, {"prev": b"x" * 32},
                   {"serial": 9999}):
        assert replay.breaks(log[:at] + [log[at]._replace(**change)] + log[at + 1:]), change
    assert replay.breaks(log[:at] + log[at + 1:])


def test_a_copy_has_the_same_rows_and_any_damage_shows(played):
    copy = replay.copied(played.server.directory, played.new())
    assert differences(played.rows, rows_of(copy, MIRRORS)) == []
    silent = []
    path = str(copy / "devpi_lite.db")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.row_factory = sqlite3.Row
        for table, what in replay.damages(db, played.seed):
            if not differences(played.rows, replay.read_rows(db, MIRRORS)):
                silent.append((table, what))
    assert silent == []


def test_a_check_finds_nothing_in_a_directory_and_its_replay(played):
    for directory in (played.server.directory, played.replayed()):
        done = replay.run("fsck", "--serverdir", directory)
        assert (done.returncode, done.stderr) == (0, ""), done
        *findings, last = done.stdout.splitlines()
        # people may delete bases, and let them lead in a circle
        assert [line for line in findings if ": its base" not in line] == []
        assert last.startswith("checked "), done


# what the check of a directory can't tell from what is whole: columns of mirrors alone, the order
# of rows, and blanks after JSON
HARMLESS = {"fetched", "etag", "upstream", "upstream_serial", "versions", "position", "url", "order",
            "attributes", "config", "metadata", "history", "status"}


def test_a_check_finds_each_damage_of_a_row(played):
    copy, missed = replay.copied(played.server.directory, played.new()), []
    path = str(copy / "devpi_lite.db")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db, \
            contextlib.redirect_stdout(io.StringIO()):
        db.row_factory = sqlite3.Row
        for table, what in replay.damages(db, played.seed):
            findings = devpi_lite.CheckReport(as_json=False, whole=False)
            with devpi_lite.Scratch(str(copy)) as scratch:
                check = devpi_lite.DatabaseCheck(db, scratch, findings)
                for step in (check.log, check.people, check.indexes, check.projects, check.files,
                             check.blobs, check.metadata):
                    step()
                lacking, = scratch.execute("SELECT count(*) FROM lacking").fetchone()
            if not findings.counts["error"] + lacking and what not in HARMLESS:
                missed.append((table, what))
    assert missed == []


def test_a_damaged_copy_shows_something_else_there_and_nowhere_else(played, make_server):
    copy = replay.copied(played.server.directory, played.new())
    file = random.Random(played.seed).choice(sorted(
        (key, values) for key, values in played.rows.tables["files"].items()
        if values["kind"] == "releasefile" and values["project_id"][2] == "alpha"))
    with contextlib.closing(sqlite3.connect(str(copy / "devpi_lite.db"))) as db:
        db.execute("UPDATE files SET requires_python = '>=2.9' WHERE path = ?", (file[0][2],))
        db.commit()
    server = make_server(directory=copy)
    found = replay.served_otherwise(played.server, server, played.rows, ["root"], "/+simple/")
    assert any("+simple/alpha" in line for line in found)
    assert [line for line in found if "alpha" not in line] == []


def test_the_rules_of_the_changelog_are_kept_up():
    """Logs that keep the rules, and some that break one each."""
    def entries(*ops):
        return [replay.Entry(serial, 0, None, zlib.compress(json.dumps(
            [{"t": kind, "k": key.split(), "v": value} for kind, key, value in op]).encode()),
            b"", b"") for serial, op in enumerate(ops)]
    user = ("user", "ada", {"pwhash": "x"})
    stage, mirror = (("index", "ada dev", {"config": {"type": type_}}) for type_ in
                     ("stage", "mirror"))
    project = ("project", "ada dev p", {"status": None})
    release = ("release", "ada dev p 1", {"a": 1})
    of = {"kind": "releasefile", "project": "p", "version": "1", "metadata_sha256": None}
    file = ("file", "ada dev +f/p", of)
    result = ("file", "ada dev +f/r", {**of, "kind": "toxresult", "for": "+f/p"})
    whole = [user, stage, project, release, file, result]
    gone = [(kind, key, None) for kind, key, _ in reversed(whole)]
    fine = [entries(whole), entries(whole, gone), entries(*([op] for op in whole + gone)),
            entries(whole, gone + whole), entries([user, mirror], [gone[4]], [stage, project]),
            entries(whole, [("file", "ada dev +f/w", {**of, "metadata_sha256": "5a"}),
                            ("metadata", "5a", {"packed": "x"})])]
    assert [replay.faults(log)[0] for log in fine] == [[]] * len(fine)
    assert replay.faults(fine[1])[1] == {kind: {} for kind in replay.KINDS}
    wrong = [
        entries(whole, gone[1:], gone[:1]), entries(whole, gone[1:]), entries(whole, [gone[-1]]),
        entries(whole, gone[:3] + gone[4:]), entries(whole, [gone[1]]),
        entries(whole[1:]), entries(whole[:1] + whole[2:]), entries(whole[:3] + whole[4:]),
        entries(whole[:4] + whole[5:]), entries([user, mirror, project]),
        entries(whole, [("user", "bob", {"name": "bob"})]), entries([("user", "ada", {"id": 1})]),
        entries([("yank", "ada dev +f/p", {})]), entries([("user", "ada bob", {})]),
        entries(whole, [("file", "ada dev +f/w", {**of, "metadata_sha256": "5a"})]),
        entries(whole, [("metadata", "5a", {"packed": "x"})]),
        entries(whole[:5], [("file", "ada dev +f/r", {**of, "kind": "toxresult"})]),
        entries([("user", "ada", "x")])]
    assert [number for number, log in enumerate(wrong) if not replay.faults(log)[0]] == []


# -- the log by itself


def test_the_changelog_has_whole_rows_and_nothing_that_a_mirror_caches(played):
    found, live, mirrors = replay.faults(played.log)
    none_of(found)
    assert mirrors <= set(MIRRORS)
    passed_over = tuple(path + "/" for path in MIRRORS)
    for kind, table in replay.TABLES.items():
        left = {key for key in live[kind] if kind != "gone" or not key[0].startswith(passed_over)}
        there = set(played.rows.tables[table])
        if kind == "metadata":      # the server lets go of what no file names when it cleans
            left &= there
        assert left == there, kind


# -- replayed


def test_all_rows_are_the_same(played):
    old, new = played.server.directory, played.replayed()
    assert "snapshot" not in played.said
    no_difference(played.rows, rows_of(new, MIRRORS))
    assert log_of(new) == played.log
    with replay.database(new) as db:        # nobody is told again, nothing is kept for mirrors
        for table, condition in (("outbox", "1"), ("files", "release_id IS NULL"),
                                 ("projects", "fetched IS NOT NULL")):
            found = db.execute("SELECT * FROM %s WHERE %s" % (table, condition)).fetchall()
            assert [tuple(row) for row in found] == [], table
    blobs = replay.blobs_of(new)
    assert set(blobs) == replay.blobs_named(played.rows)
    assert [name for name, path in blobs.items()
            if hashlib.sha256(path.read_bytes()).hexdigest() != name] == []
    no_difference(played.rows, rows_of(old, MIRRORS))
    assert log_of(old) == played.log
    replay_into(new, old)                   # there is nothing more
    no_difference(played.rows, rows_of(new, MIRRORS))
    assert log_of(new) == played.log


def test_what_can_not_be_replayed_is_told_in_a_line_and_changes_nothing(tmp_path, shared_server):
    """A directory that is not there; one that another server has gone on in."""
    new, other, there = tmp_path / "new", tmp_path / "other", shared_server.directory
    assert replay.run("init", "--serverdir", other, "--root-passwd", "x").returncode == 0
    before = rows_of(other), log_of(other)
    for target, source in ((new, tmp_path / "nowhere"), (other, there)):
        done = replay.run("_replay", "--serverdir", target, source)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1), done
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "nowhere").exists()
    assert not (new / "devpi_lite.db").exists()
    assert (rows_of(other), log_of(other)) == before


def test_a_server_on_it_shows_the_same_and_goes_on(played, make_server, tmp_path):
    """Also if it has shown an earlier state, with what its mirrors had then, and has cleaned."""
    old, new = played.server, played.new()
    replay_into(new, old.directory, "--until", played.crowd.seen[-2].serial)
    replay.take_secret(old.directory, new)
    server = make_server(directory=new, script=patched(tmp_path, CLEANING))
    for path in (*MIRRORS, "bob/dev"):
        for name in replay.MIRRORED:
            server.get("/%s/+simple/%s/" % (path, name), headers={"Accept": replay.SIMPLE_JSON})
    eventually(lambda: replay.is_settled(server))
    server.stop()
    replay_into(new, old.directory)
    no_difference(played.rows, rows_of(new, MIRRORS))

    server.start()
    none_of(replay.served_otherwise(old, server, played.rows))
    for user, in played.rows.tables["users"]:
        assert server.login(user, "pw" if user in replay.GUESTS else old.passwords[user])
    no_difference(played.rows, rows_of(new, MIRRORS))
    log = log_of(new)
    assert log == played.log
    assert server.patch("/ada", {"title": "goes on"}, user="ada").status == 200
    assert replay.breaks(log_of(new)) == [] and len(log_of(new)) == len(log) + 1


def test_what_was_cleaned_away_on_either_side_comes_again(make_server, tmp_path):
    server = make_server(script=patched(tmp_path, HASTY))
    server.add_user("ada")
    server.add_index("ada/dev")
    archive, other, new = wheel("again", "1.0"), sdist("never", "1.0"), tmp_path / "new"
    docs, type_ = multipart({":action": "doc_upload", "name": "again", "version": "1.0"},
                            {"content": ("docs.zip", replay.documentation("again"))})

    def upload():
        assert server.upload("ada/dev", archive).status == 200
        reply = server.post("/ada/dev/", docs, user="ada", headers={"Content-Type": type_})
        assert reply.status == 200

    def cleaned(directory):
        """A server there, which has cleaned."""
        cleaner = make_server(directory=directory, script=patched(tmp_path, CLEANING))
        named = replay.blobs_named(rows_of(directory))
        eventually(lambda: set(replay.blobs_of(directory)) == named)
        return cleaner
    upload()
    assert server.upload("ada/dev", other).status == 200
    for project in ("again", "never"):
        assert server.delete("/ada/dev/" + project, user="ada").status == 200
    replay_into(new, server.directory)
    replay.take_secret(server.directory, new)
    cleaned(new).stop()
    upload()
    replay_into(new, server.directory)
    no_difference(rows_of(server.directory), rows_of(new))

    server.stop()
    cleaner = cleaned(server.directory)
    shutil.rmtree(str(server.directory / "trash"))      # as a week later
    replay_into(tmp_path / "fresh", server.directory)
    replay_into(new, server.directory)
    for directory in (new, tmp_path / "fresh"):
        no_difference(rows_of(server.directory), rows_of(directory))
    cleaner.login("ada", "pw")
    none_of(replay.served_otherwise(cleaner, make_server(directory=new), rows_of(new), ["ada"]))


def test_stopped_in_between_it_has_the_rows_of_then(played):
    old, new = played.server.directory, played.new()
    stops = played.crowd.seen if ROUNDS else random.Random(played.seed).sample(played.crowd.seen, 2)
    for rows in sorted(stops, key=lambda rows: rows.serial):
        replay_into(new, old, "--until", rows.serial)
        no_difference(rows, rows_of(new, MIRRORS))
        assert log_of(new) == played.log[:rows.serial + 1]
    replay_into(new, old)
    no_difference(played.rows, rows_of(new, MIRRORS))
    assert log_of(new) == played.log


def test_entries_that_are_applied_twice_change_nothing(played):
    """But for the order of what went and came again, among what came between."""
    old, new, chance = played.server.directory, played.new(), random.Random(played.seed)
    stop = chance.randrange(1, played.rows.serial)
    replay_into(new, old, "--until", stop)
    for again in (chance.randint(1, stop), played.rows.serial + 1):
        replay_into(new, old, "--again", again)
        no_difference(played.rows, rows_of(new, MIRRORS), order=False)
        assert log_of(new) == played.log


# -- a log that does not reach back


def test_where_the_log_was_cut_a_snapshot_comes_first(tmp_path, make_server, upstream):
    server = make_server("--keep-log", "20K", script=patched(tmp_path, HASTY))
    crowd = Crowd(server, upstream, FIRST).settle()
    old, behind, fresh = server.directory, tmp_path / "behind", tmp_path / "fresh"
    assert "snapshot" not in replay_into(behind, old)
    no_difference(rows_of(old, MIRRORS), rows_of(behind, MIRRORS))
    known = log_of(behind)[-1].serial
    crowd.close()
    while log_of(old)[0].serial <= known + 1:
        crowd.alone(50)

    rows, log = rows_of(old, MIRRORS), log_of(old)
    assert replay.breaks(log, log[0].serial, log[0].prev) == []
    for new in (behind, fresh):
        lines = replay_into(new, old).splitlines()
        assert len([line for line in lines if line.startswith("snapshot")]) == 1, lines
        no_difference(rows, rows_of(new, MIRRORS))
        assert log_of(new)[-1] == log[-1]
        assert replay.blobs_named(rows) <= set(replay.blobs_of(new))

    # and on from there, while there are changes
    with ThreadPoolExecutor(1) as pool:
        crowding = pool.submit(crowd.together, 2, 10)
        replay_into(behind, old)
        crowding.result()
    for new in (behind, fresh):
        assert "snapshot" not in replay_into(new, old)
        no_difference(rows_of(old, MIRRORS), rows_of(new, MIRRORS))
        assert log_of(new)[-1] == log_of(old)[-1]


# -- carried to another directory by the operator's commands


def carried(*arguments):
    """Runs a command to its end; returns what it said."""
    done = run_command(*arguments)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done
    return done.stdout + done.stderr


def of_another_login(rows):
    """The rows without what a new server makes anew: whose sessions go on, the order of a user's attributes."""
    users = {key: {**values, "generation": None,
                   "attributes": json.dumps(json.loads(values["attributes"]), sort_keys=True)}
             for key, values in rows.tables["users"].items()}
    return rows._replace(tables={**rows.tables, "users": users})


def with_sorted_links(seen):
    """What a server showed: a dump has test results after what they are about."""
    def sort(result):
        for release in result.values() if isinstance(result, dict) else ():
            if isinstance(release, dict) and "+links" in release:
                release["+links"].sort(key=lambda link: link["href"])
        return result

    def content(view, body):
        if view[2] != replay.JSON or b'"+links"' not in body:
            return body
        answer = json.loads(body)
        sort(answer)                            # of a release
        sort(answer["result"])                  # of a project
        return json.dumps(answer)
    return {view: (status, headers, content(view, body))
            for view, (status, headers, body) in seen.items()}


def test_an_export_and_an_import_lose_nothing(played, make_server):
    old, dump, new, again = played.server, played.new(), played.new(), played.new()
    carried("export", dump, "--serverdir", old.directory)
    carried("import", dump, "--serverdir", new)
    no_difference(of_another_login(played.rows), of_another_login(rows_of(new, MIRRORS)),
                  order=False)          # test results come after what they are about
    blobs = replay.blobs_of(new)
    assert set(blobs) == replay.blobs_named(played.rows)

    server = make_server(directory=new)
    for user, in played.rows.tables["users"]:
        assert server.login(user, "pw" if user in replay.GUESTS else old.passwords[user])
    asked = [view for view in replay.views(played.rows) if view[1].endswith("+api") is False]
    one, other = (with_sorted_links(replay.shown_by(each, asked, "root"))
                  for each in (old, server))
    none_of([line for line in replay.unlike(one, other) if "x-devpi-serial" not in line])
    server.stop()

    replay_into(again, new)                 # the log of an import begins with all its rows
    no_difference(rows_of(new, MIRRORS), rows_of(again, MIRRORS))


def test_a_restored_backup_is_the_same_but_for_its_epoch(played, make_server):
    old, kept, new = played.server, played.new(), played.new()
    carried("backup", kept, "--serverdir", old.directory)
    carried("backup", "verify", kept)
    carried("restore", kept, "--serverdir", new)
    no_difference(played.rows, rows_of(new, MIRRORS))
    assert log_of(new) == played.log
    epochs = []
    for directory in (old.directory, new):
        with replay.database(directory) as db:
            epochs += db.execute("SELECT value FROM node WHERE key = 'epoch'").fetchone()
    assert epochs[0] != epochs[1]
    none_of(replay.served_otherwise(old, make_server(directory=new), played.rows))


def test_nothing_is_wrong_with_what_a_crowd_leaves(played):
    said = carried("fsck", "--serverdir", played.server.directory)
    assert "error" not in said.lower().replace("0 errors", "").replace("no errors", ""), said
