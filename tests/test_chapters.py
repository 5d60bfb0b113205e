"""A chapter that is appended to the program has all that the others have, and edits none of them.

`CHAPTER` has a command with an option, two routes, a part, a follower of events, and a kind of row
with its migration. The copy of the program gets it above its end, and one line in `Settings`.
"""

import json
import sqlite3
import subprocess
import sys
import zlib

import pytest

import devpi_lite
from harness import (
    BROWSER, Server, clean_environment, eventually, extended, submit, upload, wheel)

OPTION = '    pond_size: int = option("pond-size", _positive, 9, "ducks that a pond has room for")\n'

CHAPTER = '''
# ==================================================================================================
# 50  Ponds
#
# Ducks swim on the projects of stages. People put them in, and each upload brings one.
# ==================================================================================================


@migration(12, """
-- one row: a duck on a project of a stage
CREATE TABLE ducks (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    project_id INTEGER NOT NULL REFERENCES projects ON DELETE CASCADE,
    name TEXT NOT NULL, colour TEXT NOT NULL, UNIQUE (project_id, name));
""")
def _migrate_to_12(db, sql):
    run_script(db, sql)


@row("duck")
class DuckRows(RowKind):
    """(user, index, project, name) -> {"colour"}: ducks on projects of stages."""
    table, parent, refers = "ducks", "project", "project_id"
    key, facts, order = (*ProjectRows.key, "ducks.name"), ("ducks.colour",), "ducks.id"
    fields = ("colour",)
    source = ("ducks JOIN projects ON projects.id = ducks.project_id "
              "JOIN indexes ON indexes.id = projects.index_id JOIN users ON users.id = user_id")

    def wrote(self, change, key, value, row_id, is_new):
        change.touch(project_tag(change.id_of("index", key[:2]), key[2]))


event_kind("duck", webhook="duck")


def put_duck(change, index, project, name, colour):
    if change.get("project", (index.user, index.name, project)) is None:
        raise NotFound(f"there is no project {project} on {index.path}")
    change.put("duck", (index.user, index.name, project, name), {"colour": colour})
    change.happened(Event("duck", index, project, detail=f"{name}: {colour}"))


@on_event
def bring_a_duck(change, event):
    if event.name == "upload":
        put_duck(change, event.index, event.project, "mallard", "green")
    if event.name == "duck":
        change.wake("ducks")


@route("GET", "/{user}/{index}/+ducks/{project}[/]", for_="people", may="read")
def get_ducks(request, index, project):
    """A page with the ducks of a project."""
    with request.app.store.read() as db:
        ducks = db.execute(
            "SELECT ducks.name, colour FROM ducks JOIN projects ON projects.id = project_id "
            "WHERE index_id = ? AND projects.name = ? ORDER BY ducks.id",
            (index.id, project)).fetchall()
    if not ducks:
        raise NotFound(f"no ducks on {project}")
    items = "".join(f"<li>{html.escape(name)}: {html.escape(colour)}" for name, colour in ducks)
    return Response(200, [("Content-Type", HTML)], f"<!DOCTYPE html><ul>{items}</ul>".encode(),
                    tags=request.app.projects.tags(index, project))


@route("PUT", "/{user}/{index}/+ducks/{project}[/]", for_="json", may="upload")
def put_ducks(request, index, project):
    body = request.json(dict)
    request.write(put_duck, index, project, body["name"], body["colour"])
    return message_response(f"it swims, with {request.app.part(Pond).size} at most", 201)


@part
class Pond(Part):
    """Counts the ducks, and looks whenever one comes."""

    def __init__(self, app):
        self.store, self.size, self.looks = app.store, app.settings.pond_size, 0

    def count(self):
        with self.store.read() as db:
            return db.execute("SELECT count(*) FROM ducks").fetchone()[0]

    def loops(self):
        yield "pond", self.look

    def look(self):
        came = self.store.signals["ducks"]
        while came.wait():
            came.clear()
            self.looks += 1

    def gauges(self):
        yield Gauge("ducks", "gauge", "Ducks in all.", self.count())
        yield Gauge("pond_looks_total", "counter", "Looks at the pond.", self.looks)

    def complaints(self):
        if self.count() > self.size:
            yield Complaint("warn", "the pond is full", (f"it has room for {self.size}",))


@command("ducks", "Count the ducks of a server directory.",
         argument("--colour", help="of this colour only"), takes=(COMMON, SERVING))
def command_ducks(parsed):
    with contextlib.closing(Store(parsed.settings)) as store, store.read() as db:
        colours = [value["colour"] for kind, _, value in all_rows(db) if kind == "duck"]
    print(sum(parsed.rest.colour in (None, colour) for colour in colours), "of",
          parsed.settings.pond_size)


_SCRYPT["n"] = 16
Limits.cleaning = 0.1


'''


def compiled(folder, chapter=CHAPTER):
    return extended(folder, OPTION, chapter)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("copy"))


def started(directory, program):
    """A server with a stage, alice/dev, that has a project, lake."""
    server = Server(directory, "--pond-size", "4", script=program).start()
    server.add_user("alice")
    server.add_index("alice/dev", bases=[])
    submit(server, "alice/dev", "lake", "1.0")
    return server


@pytest.fixture(scope="module")
def server(program, tmp_path_factory):
    running = started(tmp_path_factory.mktemp("server"), program)
    yield running
    running.kill()


def swim(server, project, *names):
    for name in names:
        made = server.put(f"/alice/dev/+ducks/{project}", {"name": name, "colour": "white"}, user="alice")
        assert (made.status, made.json()["message"]) == (201, "it swims, with 4 at most"), made


def page(server, path="/alice/dev/+ducks/lake", **options):
    return server.get(path, headers={"Accept": BROWSER}, **options)


def run(program, *words):
    done = subprocess.run([sys.executable, program, *map(str, words)], env=clean_environment({}),
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def rows_of(directory):
    with sqlite3.connect(str(directory / "devpi_lite.db")) as db:
        return db.execute("SELECT projects.name, ducks.name, colour FROM ducks JOIN projects "
                          "ON projects.id = project_id ORDER BY ducks.id").fetchall()


def log_of(directory):
    with sqlite3.connect(str(directory / "devpi_lite.db")) as db:
        return [[(op["t"], op["k"], op["v"]) for op in json.loads(zlib.decompress(ops))]
                for ops, in db.execute("SELECT ops FROM changelog ORDER BY serial")]


# -- routes


def test_a_page_follows_its_rows(server):
    swim(server, "lake", "daisy")
    assert "<li>daisy: white" in page(server).text
    swim(server, "lake", "donald")
    assert "<li>donald: white" in page(server).text         # the response was kept


def test_a_page_for_people_has_errors_redirects_and_permissions_for_people(server):
    assert page(server, "/alice/dev/+ducks/LAKE").headers["Location"].endswith("/+ducks/lake")
    missing = page(server, "/alice/dev/+ducks/sea")
    assert (missing.status, "<h1>404" in missing.text) == (404, True)
    assert page(server, "/alice/none/+ducks/lake").status == 404
    assert server.put("/alice/dev/+ducks/lake", {"name": "x", "colour": "y"}).status == 401
    server.add_index("alice/shut", bases=[], acl_pkg_read=["alice"])
    assert page(server, "/alice/shut/+ducks/lake").status == 401
    asked = {"X-Original-URI": "/alice/shut/+ducks/lake"}
    assert server.get("/+authcheck", headers=asked).status == 403
    assert server.get("/+authcheck", headers=asked, user="alice").status == 200


# -- events


def test_an_event_is_followed_in_its_change_and_audited(server):
    upload(server, "alice/dev", wheel("river", "1.0"))
    assert "<li>mallard: green" in page(server, "/alice/dev/+ducks/river").text
    assert ["file", "duck"] == [kind for kind, _, _ in log_of(server.directory)[-1]][-2:]
    newest = server.get("/+audit?action=duck", user="root").result[0]
    assert (newest["index"], newest["target"], newest["detail"]) == ("alice/dev", "river", "mallard: green")


# -- rows


def test_a_replay_and_a_snapshot_make_the_same_rows(server, program, tmp_path):
    swim(server, "lake", "tick", "trick", "track")
    assert len(rows_of(server.directory)) >= 3
    run(program, "_replay", server.directory, "--serverdir", tmp_path / "replayed")
    assert rows_of(tmp_path / "replayed") == rows_of(server.directory)
    with sqlite3.connect(str(tmp_path / "replayed" / "devpi_lite.db")) as db:
        db.execute("DELETE FROM changelog WHERE serial < 5")
    said = run(program, "_replay", tmp_path / "replayed", "--serverdir", tmp_path / "taken")
    assert said.startswith("snapshot: ")
    assert rows_of(tmp_path / "taken") == rows_of(server.directory)


def test_the_deletion_of_a_parent_puts_each_child_s(server):
    submit(server, "alice/dev", "puddle", "1.0")
    swim(server, "puddle", "a", "b")
    assert server.delete("/alice/dev/puddle", user="alice").status == 200
    deleted = [kind for kind, _, value in log_of(server.directory)[-1] if value is None]
    assert deleted == ["duck", "duck", "release", "project"]


def test_a_replay_of_rows_whose_parent_came_again_makes_the_same(server, program, tmp_path):
    for _ in range(2):
        submit(server, "alice/dev", "pool", "1.0")
        swim(server, "pool", "a")
        assert server.delete("/alice/dev/pool", user="alice").status == 200
    submit(server, "alice/dev", "pool", "1.0")
    swim(server, "pool", "a")
    run(program, "_replay", server.directory, "--serverdir", tmp_path / "replayed")
    assert rows_of(tmp_path / "replayed") == rows_of(server.directory)


def test_an_old_directory_is_brought_up(program, tmp_path):
    Server(tmp_path / "old").start().stop()
    server = started(tmp_path / "old", program)
    swim(server, "lake", "daisy")
    server.stop()
    assert (tmp_path / "old" / "devpi_lite.db.bak-11").exists()


# -- a part, a command, an option


def test_a_part_is_woken_measured_and_heard(server):
    def sample(name):
        return [int(line.split()[1]) for line in server.get("/+metrics").text.splitlines()
                if line.startswith(name + " ")][0]
    before = sample("pond_looks_total")
    swim(server, "lake", "1", "2", "3", "4", "5")
    eventually(lambda: sample("pond_looks_total") > before)
    assert sample("ducks") == len(rows_of(server.directory))
    assert server.get("/+status", user="root").result["messages"] == [
        "the pond is full", "it has room for 4"]


def test_a_command_reads_the_rows_and_the_option(server, program):
    count = len(rows_of(server.directory))
    assert run(program, "ducks", "--serverdir", server.directory) == f"{count} of 9"
    assert run(program, "ducks", "--serverdir", server.directory, "--colour", "blue",
               "--pond-size", "7") == "0 of 7"


# -- what is declared is checked when it is declared, not when a change is on disk


def test_a_signal_that_nobody_made_does_not_fail_a_change_on_disk(tmp_path):
    chapter = "".join(line for line in CHAPTER.splitlines(True) if "# SIGNAL" not in line)
    chapter = chapter.replace('yield "pond", self.look', "return ()")
    server = started(tmp_path / "server", compiled(tmp_path, chapter))
    made = server.put("/alice/dev/+ducks/lake", {"name": "daisy", "colour": "white"}, user="alice")
    server.kill()
    assert (made.status == 201) == bool(rows_of(tmp_path / "server"))


def test_an_event_of_a_later_chapter_can_be_named_by_webhooks(server):
    server.add_index("alice/hooked", bases=[], webhook_url="http://127.0.0.1:9/", webhook_events="duck")


@pytest.mark.parametrize("declared", [
    '@migration(7, "")\ndef again(db, sql): pass\n',
    '@row("file")\nclass Again(RowKind): pass\n',
    'event_kind("upload")\n',
    'Change(sqlite3.connect(":memory:"), NO_ACTOR, 1).happened(Event("no such event"))\n'])
def test_what_is_declared_twice_or_not_at_all_is_refused_at_once(declared):
    with pytest.raises(ValueError):
        exec(declared, dict(vars(devpi_lite)))


def test_a_path_below_a_project_is_not_a_version(tmp_path):
    chapter = CHAPTER.replace("/{user}/{index}/+ducks/{project}", "/{user}/{index}/{project}/+ducks")
    server = started(tmp_path / "server", compiled(tmp_path, chapter))
    try:
        made = server.put("/alice/dev/lake/+ducks", {"name": "daisy", "colour": "white"}, user="alice")
        assert made.status == 201
        assert page(server, "/alice/dev/lake/+ducks").status == 200
    finally:
        server.kill()


def test_a_part_that_fails_to_clean_keeps_no_other_from_it(tmp_path):
    chapter = CHAPTER.replace("    def loops(self):", "    def clean(self, change):\n"
        "        self.looks += 1\n        raise BadRequest('it froze')\n\n    def loops(self):", 1)
    server = started(tmp_path / "server", compiled(tmp_path, chapter))
    try:
        with sqlite3.connect(str(tmp_path / "server" / "devpi_lite.db")) as db:
            db.execute("INSERT INTO docs (sha256) VALUES ('of a zip that is gone')")
        before = server.output().count("it froze")
        eventually(lambda: server.output().count("it froze") > before + 2)
        with sqlite3.connect(str(tmp_path / "server" / "devpi_lite.db")) as db:
            assert db.execute("SELECT count(*) FROM docs").fetchone()[0] == 0
    finally:
        server.kill()
