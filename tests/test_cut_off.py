"""Commands on whole directories that are killed at any moment: nothing is half-done, and the same
command simply can be run again.

`DEVPI_LITE_ROUNDS=50` kills each as often; `DEVPI_LITE_SEED=7` at the same moments again.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from harness import (
    SCRIPT, Server, clean_environment, documentation, run_command, sdist, upload,
    upload_docs, wheel)

import replay
from replay import differences, rows_of

ROUNDS = int(os.environ.get("DEVPI_LITE_ROUNDS", 1))
CHANCE = random.Random(int(os.environ.get("DEVPI_LITE_SEED", time.time())))

pytestmark = pytest.mark.skipif(os.name == "nt", reason="SIGKILL is of POSIX")


class Directory:
    """A server directory that no server runs on, with `rows`; `took`: {command: its seconds}."""

    def __init__(self, folder):
        self.folder, self.took, self.count = folder, {}, 0
        self.path = folder / "server"
        server = Server(self.path).start()
        server.login("root")
        server.add_user("ada")
        server.add_index("ada/dev")
        server.add_index("ada/prod", volatile=False, bases=["ada/dev"])
        for number in range(12):
            archives = [wheel("demo%d" % (number % 4), "1.%d" % number, size=3000),
                        sdist("demo%d" % (number % 4), "1.%d" % number)]
            upload(server, "ada/dev", *archives)
        upload_docs(server, "ada/dev", documentation("demo0", "1.0"))
        assert server.stop() == 0
        self.rows = rows_of(self.path)

    def new(self):
        self.count += 1
        return self.folder / ("new%d" % self.count)

    def kill(self, *arguments):
        """Runs a command, once to its end to see how long it takes, and kills it on the way."""
        command = arguments[0]
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *map(str, arguments)], env=clean_environment(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        # the first half is the start of the interpreter
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.took.get(command, 1) * CHANCE.uniform(0.4, 1))
        with contextlib.suppress(ProcessLookupError):      # it had ended
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def run(self, *arguments):
        began = time.monotonic()
        done = run_command(*arguments)
        self.took.setdefault(arguments[0], time.monotonic() - began)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), done
        return done

    def is_unharmed(self):
        assert differences(self.rows, rows_of(self.path)) == []


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    return Directory(tmp_path_factory.mktemp("there"))


@pytest.fixture(scope="module")
def dump(there):
    path = there.new()
    there.run("export", path, "--serverdir", there.path)
    return path


@pytest.fixture(scope="module")
def kept(there):
    path = there.new()
    there.run("backup", path, "--serverdir", there.path)
    return path


def same(there, directory):
    """Whether it has what `there` has; generations are new in what was imported."""
    one, other = (rows._replace(tables={**rows.tables, "users": {
        key: {**values, "generation": ""} for key, values in rows.tables["users"].items()}})
        for rows in (there.rows, rows_of(directory)))
    assert differences(one, other, order=False) == []
    assert set(replay.blobs_of(directory)) == replay.blobs_named(there.rows)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_killed_export_can_be_run_again(there, dump, number):
    path, new = there.new(), there.new()
    there.kill("export", path, "--serverdir", there.path)
    whole = (path / "dataindex.json").exists()
    if not whole:
        there.run("export", path, "--serverdir", there.path)
    there.run("import", path, "--serverdir", new)
    same(there, new)
    there.is_unharmed()


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_killed_import_can_be_run_again(there, dump, number):
    new = there.new()
    there.run("import", dump, "--serverdir", there.new())
    there.kill("import", dump, "--serverdir", new)
    done = run_command("import", dump, "--serverdir", new)
    if done.returncode:         # it had come to its end
        assert done.returncode == 1 and "not empty" in done.stderr, done
    same(there, new)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_no_server_starts_on_what_a_killed_import_left(there, dump, number):
    new = there.new()
    there.run("import", dump, "--serverdir", there.new())
    there.kill("import", dump, "--serverdir", new)
    if not new.exists() or set(os.listdir(new)) <= {".lock"}:
        return
    done = run_command("init", "--serverdir", new)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done
    assert "cut off" in done.stderr or "initialised already" in done.stderr, done
    if "initialised already" in done.stderr:
        same(there, new)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_killed_import_beside_others_is_whole_or_not_there(there, dump, number):
    new = there.new()
    assert run_command("init", "--serverdir", new, "--root-passwd", "x",
                       "--no-root-pypi").returncode == 0
    other = there.folder / ("part%d" % there.count)
    shutil.copytree(str(dump), str(other))
    text = (other / "dataindex.json").read_text()
    index = json.loads(text)
    del index["users"]["root"]
    index["devpi_lite"]["users"].pop("root", None)
    (other / "dataindex.json").write_text(json.dumps(index))
    before = rows_of(new)
    there.kill("import", other, "--serverdir", new, "--add")
    if differences(before, rows_of(new)) == []:
        there.run("import", other, "--serverdir", new, "--add")
    rows = rows_of(new)
    assert set(rows.tables["files"]) == set(there.rows.tables["files"])
    assert replay.blobs_named(rows) <= set(replay.blobs_of(new))
    there.run("fsck", "--serverdir", new)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_killed_backup_harms_no_other_generation(there, kept, number):
    path, new = there.new(), there.new()
    shutil.copytree(str(kept), str(path))
    there.kill("backup", path, "--serverdir", there.path, "--keep", "1")
    there.run("backup", "verify", path)
    there.run("backup", path, "--serverdir", there.path, "--keep", "1")
    there.run("restore", path, "--serverdir", new)
    same(there, new)
    there.is_unharmed()


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_killed_restore_can_be_run_again(there, kept, number):
    new = there.new()
    there.run("restore", kept, "--serverdir", there.new())
    there.kill("restore", kept, "--serverdir", new)
    done = run_command("restore", kept, "--serverdir", new)
    if done.returncode:
        assert done.returncode == 1 and "not empty" in done.stderr, done
    same(there, new)
    there.run("backup", "verify", kept)
