"""A replica that starts beside files that were carried over (--replica-file-search-path): it fetches
what is not there, believes nothing but hashes, and is not led astray by what else lies there.
"""

import os
import shutil

import pytest

from harness import documentation, eventually, patched, run_command, upload_docs, wheel
from replicas import comes_to_be, in_sync, primary_at, replica_at, same, unsound

VERSIONS = ["1.%d" % number for number in range(6)]


def fetched(primary):
    """How many requests for files the primary had."""
    return sum("/+repl/v1/blob" in line for line in primary.whole_output().splitlines())


class Site:
    """A primary with files, and an empty folder for what is carried over."""

    def __init__(self, folder):
        self.folder, self.medium, self.number = folder, folder / "medium", 0
        self.primary = primary_at(folder / "p").start()
        self.primary.login("root")
        self.primary.add_user("ann")
        self.primary.add_index("ann/dev")
        for version in VERSIONS:
            self.primary.upload("ann/dev", wheel("demo", version, size=1000))
        upload_docs(self.primary, "ann/dev", documentation("demo", "1.0", page="<h1>read me</h1>"))

    def blobs(self):
        return [path for path in (self.primary.directory / "files").rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("site"))
    yield site
    site.primary.kill()


@pytest.fixture
def carried(site, tmp_path):
    """carried(folder): a new replica that took what it could from the folder, and the number of
    requests for files that it made; it is in sync."""
    replicas = []

    def carried(folder, *options, script=None):
        before = fetched(site.primary)
        more = {"script": script} if script else {}
        replica = replica_at(tmp_path / ("r%d" % len(replicas)), site.primary,
                             "--replica-file-search-path", folder, "--debug", *options, **more)
        replicas.append(replica.start())
        in_sync(site.primary, replica)
        assert unsound(replica) == []
        same(site.primary, replica)
        for path in site.blobs():
            there = replica.directory / "files" / path.name[:2] / path.name
            assert there.read_bytes() == path.read_bytes()
            assert there.stat().st_mode & 0o077 == 0 or os.name == "nt"
        return replica, fetched(site.primary) - before
    yield carried
    for replica in replicas:
        replica.kill()


def test_a_backup_saves_fetching(site, tmp_path, carried):
    done = run_command("backup", "--serverdir", site.primary.directory, tmp_path / "backup")
    assert done.returncode == 0, done.stderr
    replica, requests = carried(tmp_path / "backup")
    assert requests == 0
    assert "7 files of" in replica.output() and "were taken from" in replica.output()
    page = replica.get("/ann/dev/demo/1.0/+doc/index.html", headers={"Accept": "*/*"})
    assert b"read me" in page.body


def test_an_export_saves_fetching(site, tmp_path, carried):
    done = run_command("export", "--serverdir", site.primary.directory, tmp_path / "dump")
    assert done.returncode == 0, done.stderr
    _, requests = carried(tmp_path / "dump")
    assert requests == 0


def test_files_of_a_server_save_fetching_and_stay_as_they_are(site, tmp_path, carried):
    folder = shutil.copytree(site.primary.directory, tmp_path / "deep" / "p")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    _, requests = carried(tmp_path / "deep")
    assert requests == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_what_is_not_there_is_fetched(site, tmp_path, carried):
    folder = tmp_path / "some"
    folder.mkdir()
    for number, path in enumerate(site.blobs()[:4]):
        shutil.copy(path, folder / ("file %d" % number))      # found by their size alone
    replica, requests = carried(folder)
    assert 0 < requests <= 3
    assert "4 files of" in replica.output()


@pytest.mark.skipif(os.name == "nt", reason="pipes and links")
def test_nothing_is_believed_but_hashes(site, tmp_path, carried):
    folder = tmp_path / "bad"
    (folder / "a" / "b").mkdir(parents=True)
    for number, path in enumerate(site.blobs()):
        content = path.read_bytes()
        other = content[:-1] + bytes([content[-1] ^ 1])
        (folder / path.name).write_bytes(other)                     # as its name says, but altered
        (folder / "a" / ("x%d" % number)).write_bytes(other)        # of the same size
        (folder / "a" / "b" / path.name).write_bytes(content[:-1])
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "a" / ("0" * 64))
    os.symlink(site.primary.directory / "files", folder / "files")      # leads out of the folder
    os.symlink(folder, folder / "a" / "round")
    for path in site.blobs()[:2]:
        os.symlink(path, folder / "a" / "b" / (path.name + ".whl"))
    (folder / os.fsdecode(b"\xff\xfe")).write_bytes(b"")
    replica, requests = carried(folder)
    assert requests > 0 and "were taken from" not in replica.output()


def test_a_folder_that_changes_meanwhile_does_no_harm(site, tmp_path, carried):
    """It is emptied when the list has been made: nothing of it is there."""
    folder = shutil.copytree(site.primary.directory / "files", tmp_path / "going")
    script = patched(tmp_path, """
listed = devpi_lite.Medium._list
def then_empty(self):
    made = listed(self)
    devpi_lite.shutil.rmtree(self.path)
    return made
devpi_lite.Medium._list = then_empty
""")
    _, requests = carried(folder, script=script)
    assert requests > 0


def test_a_missing_folder_is_named_and_all_is_fetched(site, tmp_path, carried):
    replica, requests = carried(tmp_path / "none")
    assert requests > 0
    assert "%s can't be read" % (tmp_path / "none") in replica.output()


def test_a_file_that_is_asked_for_comes_from_there_too(site, tmp_path):
    """Of an index whose files nobody fetches before they are asked for."""
    folder = shutil.copytree(site.primary.directory / "files", tmp_path / "files")
    before, archive = fetched(site.primary), wheel("demo", VERSIONS[0], size=1000)
    replica = replica_at(
        tmp_path / "r", site.primary, "--replica-file-search-path", folder,
        "--file-replication-skip-indexes", "all").start()
    try:
        comes_to_be(replica, "following")
        eventually(lambda: "files were found below" in replica.output())
        for _ in range(2):
            assert replica.fetch("ann/dev", archive.filename, "demo") == archive.content
        assert fetched(site.primary) == before
        assert unsound(replica) == []
    finally:
        replica.kill()
