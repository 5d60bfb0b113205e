"""There and back: what `export` writes and `import` reads is what was there."""

import contextlib

import devpi_lite
import pytest
import replay
from dumps import run_import
from harness import Server, Upstream, run_command

NEW = ("generation",)       # made anew by an import, because old sessions end


def all_rows(directory):
    """{(kind, key): value} of people's data, and what mirrors keep."""
    with contextlib.closing(devpi_lite.open_rows(str(directory))) as db:
        found = {}
        for kind, key, value in devpi_lite.all_rows(db):
            found[(kind, *key)] = {name: each for name, each in value.items() if name not in NEW} \
                if isinstance(value, dict) else value
        for row in db.execute(
                "SELECT users.name AS user, indexes.name AS place, projects.name AS project, files.* FROM files "
                "JOIN projects ON projects.id = project_id JOIN indexes ON indexes.id = files.index_id "
                "JOIN users ON users.id = user_id WHERE release_id IS NULL AND files.sha256 IS NOT NULL"):
            facts = {name: row[name] for name in row.keys() if not name.endswith("id") and name != "position"}
            found["cached", row["user"], row["place"], row["project"], row["path"]] = {
                **facts, "listed": row["position"] is not None}
        return found


@pytest.mark.parametrize("seed", [5])
def test_a_round_trip_loses_nothing(tmp_path, seed):
    with Upstream().start() as upstream:
        server = Server(tmp_path / "old").start()
        crowd = replay.Crowd(server, upstream, seed)
        crowd.settle().tour()
        crowd.alone(100, looks=4)
        crowd.close()
        server.stop()
    result = run_command("export", tmp_path / "dump", "--serverdir", tmp_path / "old", "--include-mirrored-files")
    assert result.returncode == 0, result
    result = run_import(tmp_path / "dump", tmp_path / "new")
    assert result.returncode == 0, result
    old, new = all_rows(tmp_path / "old"), all_rows(tmp_path / "new")
    new.pop(("index", "root", "pypi"), None)
    assert {key for key in old if key not in new} == set()
    assert {key for key in new if key not in old} == set()
    assert [(key, old[key], new[key]) for key in old if old[key] != new[key]] == []
