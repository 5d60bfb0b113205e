"""`gc` and what it shares with a server's hourly cleaning: which files go to the trash, which come
back from it, and which are never touched.

A running server uploads and deletes beside it, and a command that copies files holds a lease.
"""

import contextlib
import hashlib
import os
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

import devpi_lite as d
from harness import blobs, new_index, run_command, upload, wheel


def gc(server, *options):
    result = run_command("gc", "--serverdir", server.directory, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def keep(place, data):
    with place.incoming() as incoming:
        incoming.write(data)
        return incoming.keep()


def age(path, seconds=100000):
    os.utime(str(path), (time.time() - seconds,) * 2)


def listing(directory):
    return sorted(str(path) for path in directory.rglob("*"))


@pytest.fixture
def place(shared_server):
    """The blobs of the server's directory, as another process has them."""
    return d.Blobs(str(shared_server.directory))


def test_what_nothing_names_goes_to_the_trash_and_later_away(server):
    upload(server, new_index(server, "root"), wheel("demo", "1.0"))
    place = d.Blobs(str(server.directory))
    old, young = keep(place, b"old"), keep(place, b"young")
    for path in server.directory.glob("files/??/*"):
        age(path, 0 if path.name == young else 100000)

    before = listing(server.directory)
    assert "files: 1 (3 bytes) would be moved to trash/, 2 stay" in gc(server, "--dry-run")
    assert listing(server.directory) == before
    assert "files: 0 (0 bytes) moved" in gc(server, "--older-than", "2d")
    assert "files: 1 (3 bytes) moved to trash/, 2 stay" in gc(server)
    assert os.listdir(place.trash) == [old] and "trash: 0" in gc(server, "--empty-trash")
    age(server.directory / "trash" / old, 3700)
    assert "trash: 0" in gc(server)
    assert "trash: 1 (3 bytes) would be deleted" in gc(server, "--empty-trash", "--dry-run")
    assert "trash: 1 (3 bytes) deleted" in gc(server, "--empty-trash")
    assert os.listdir(place.trash) == [] and set(blobs(server)) > {young}


def test_a_folder_in_the_trash_is_deleted_in_time(place):
    """It lay in the place of a file, which was repaired."""
    folder = os.path.join(place.trash, "00" * 32 + ".damaged-1")
    os.makedirs(folder)
    with open(os.path.join(folder, "notes"), "w"):
        pass
    age(folder)
    place.empty_trash(trash_time=3600)
    assert not os.path.exists(folder)


def test_what_a_row_names_is_taken_back_from_the_trash(server):
    upload(server, new_index(server, "root"), wheel("demo", "1.0"))
    name, = blobs(server)
    trash = server.directory / "trash"
    trash.mkdir(exist_ok=True)
    os.replace(str(server.directory / "files" / name[:2] / name), str(trash / name))
    age(trash / name, 10 ** 7)
    assert "1 would be taken back" in gc(server, "--dry-run") and (trash / name).exists()
    assert "1 taken back" in gc(server, "--empty-trash")
    assert set(blobs(server)) == {name} and not (trash / name).exists()


def test_a_claim_by_another_process_undoes_the_move(tmp_path, monkeypatch):
    ours, theirs = d.Blobs(str(tmp_path)), d.Blobs(str(tmp_path))
    digest = keep(ours, b"content")
    age(ours.path(digest))
    replace = os.replace

    def claim_first(source, target):
        monkeypatch.undo()
        assert theirs.claim(digest)
        replace(source, target)
    monkeypatch.setattr(os, "replace", claim_first)
    swept = ours.collect(lambda digest: False, 3600)
    assert (swept.moved, swept.kept) == (0, 1) and os.path.exists(ours.path(digest))
    assert ours.collect(lambda digest: False, 3600).moved == 0, "it is young now"


def test_an_upload_whose_blob_is_moved_away_at_that_moment_finds_it_again(tmp_path, monkeypatch):
    place = d.Blobs(str(tmp_path))
    digest = keep(place, b"content")
    claim = place.claim

    def claim_and_lose(sha256):
        found = claim(sha256)
        os.makedirs(place.trash, exist_ok=True)
        os.replace(place.path(sha256), os.path.join(place.trash, sha256))
        return found
    monkeypatch.setattr(place, "claim", claim_and_lose)
    assert keep(place, b"content") == digest and place.open(digest, 7).read() == b"content"


def test_two_may_sweep_at_a_time(tmp_path):
    place, other = d.Blobs(str(tmp_path)), d.Blobs(str(tmp_path))
    digests = [keep(place, b"%d" % number) for number in range(20)]
    for digest in digests:
        age(place.path(digest))

    def slower(digest):
        other.collect(lambda _: False, 3600)
        return False
    assert place.collect(slower, 3600).moved == 0
    assert sorted(os.listdir(place.trash)) == sorted(digests)


def test_what_a_list_names_is_not_asked_for_file_by_file(tmp_path):
    place, asked = d.Blobs(str(tmp_path)), []
    listed, late, loose = (keep(place, data) for data in (b"listed", b"committed later", b"loose"))
    for digest in (listed, late, loose):
        age(place.path(digest))

    def is_named(digest):
        asked.append(digest)
        return digest == late
    swept = place.collect(is_named, 3600, named_in=lambda prefix: {listed})
    assert (swept.kept, swept.moved) == (2, 1) and os.listdir(place.trash) == [loose]
    assert late in asked and listed not in asked


def test_the_lists_have_all_files_of_rows(server):
    index = new_index(server, "root")
    for version in ("1.0", "1.1", "1.2", "1.3"):
        upload(server, index, wheel("demo", version))
    with contextlib.closing(sqlite3.connect(str(server.directory / "devpi_lite.db"))) as db:
        lists = {prefix: d.named_in(db, prefix) for prefix in d.BLOB_FOLDERS}
    assert all(digest.startswith(prefix) for prefix, names in lists.items() for digest in names)
    assert sum(map(len, lists.values())) == 4
    assert set().union(*lists.values()) == {path.name for path in server.directory.glob("files/??/*")}


def test_metadata_files_of_deleted_wheels_go_and_others_stay(server):
    index = new_index(server, "root")
    for name in ("kept", "dropped"):
        upload(server, index, wheel(name, "1.0"))
    assert server.delete(f"/{index}/dropped/1.0", user="root").status == 200
    assert server.stop() == 0
    settings = d.Settings(str(server.directory))
    with contextlib.closing(d.Store(settings)) as store:
        assert len(metadata_files(store, "metadata_files")) == 2
        d.Releases(store, d.Blobs(settings.serverdir), settings).tidy()
        assert metadata_files(store, "metadata_files") == metadata_files(store, "files") != []
        store.write(d._delete_unused_metadata, [(used,) for used in metadata_files(store, "files")])      # named meanwhile
        assert metadata_files(store, "metadata_files") == metadata_files(store, "files")


def metadata_files(store, table):
    with store.read() as db:
        column = "metadata_sha256" if table == "files" else "sha256"
        return [row[0] for row in db.execute(f"SELECT {column} FROM {table}")]


def test_a_file_among_the_folders_is_no_blob(tmp_path):
    place = d.Blobs(str(tmp_path))
    (tmp_path / "files" / "notes.txt").write_bytes(b"")
    age(tmp_path / "files" / "notes.txt")
    assert place.collect(lambda digest: False, 3600).moved == 0


def test_nothing_moves_while_a_command_holds_a_lease(shared_server, place):
    with place.lease():
        result = run_command("gc", "--serverdir", shared_server.directory)
        assert (result.returncode, result.stdout) == (1, "")
        assert "a command copies files" in result.stderr and str(os.getpid()) in result.stderr
        with pytest.raises(d.Busy):
            place.collect(lambda digest: False, 3600)
    gc(shared_server)
    assert not list(shared_server.directory.glob("tmp/*.lease"))


@pytest.mark.parametrize("command", ["export", "backup"])
def test_commands_that_copy_files_hold_a_lease(server, tmp_path, monkeypatch, command):
    upload(server, new_index(server, "root"), wheel("demo", "1.0"))
    place, seen = d.Blobs(str(server.directory)), []
    monkeypatch.setattr(d, "give_way", lambda: None)
    copy = d.copy_checked

    def look_and_copy(*arguments, **options):
        seen.append(place.lessees())
        return copy(*arguments, **options)
    monkeypatch.setattr(d, "copy_checked", look_and_copy)
    before = os.umask(0o077)
    try:
        assert d.main([command, "--serverdir", str(server.directory), str(tmp_path / "copy")]) == 0
    finally:
        os.umask(before)
    assert seen and seen[0] == {str(os.getpid())} and place.lessees() == set()


def test_a_killed_command_holds_no_lease(tmp_path):
    place = d.Blobs(str(tmp_path))
    code = ("import os, sys, devpi_lite\n"
            "with devpi_lite.Blobs(sys.argv[1]).lease():\n"
            "    print('has it', flush=True)\n    sys.stdin.read()")
    command = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        cwd=os.path.dirname(d.__file__))
    command.stdout.readline()
    own = tmp_path / "tmp" / ("%d-copy" % command.pid)
    own.write_bytes(b"")
    place.recover()
    assert place.lessees() == {str(command.pid)} and own.exists()
    command.kill()
    command.communicate()
    assert place.lessees() == set() and list(tmp_path.glob("tmp/*.lease"))
    place.recover()
    assert os.listdir(place.tmp) == []


def test_temporary_files_go_when_they_are_old_and_nobody_owns_them(server):
    tmp, cache = server.directory / "tmp", server.directory / "cache"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {"%d-7" % dead.pid: True, "tmpabc": True, "%d-7" % os.getpid(): False, "young": False}
    for name in names:
        (tmp / name).write_bytes(b"x" * 1000)
        age(tmp / name, 10 if name == "young" else 4000)
    (tmp / "folder").mkdir()
    (tmp / "folder" / "file").write_bytes(b"")
    age(tmp / "folder", 4000)
    own = [server.directory / (".secret.%d.tmp" % pid) for pid in (dead.pid, os.getpid())]
    for path in own:
        path.write_bytes(b"")
        age(path, 4000)
    cache.mkdir(exist_ok=True)
    (cache / "names-999.json").write_bytes(b"{}")
    age(cache / "names-999.json", 4000)

    before = listing(server.directory)
    assert "temporary files and folders: 4 (2.0 KiB) would be" in gc(server, "--dry-run")
    assert listing(server.directory) == before
    assert "temporary files and folders: 4 (2.0 KiB) deleted" in gc(server)
    assert sorted(os.listdir(str(tmp))) == sorted(
        [name for name, is_old in names.items() if not is_old] + ["folder"])
    assert [path.exists() for path in own] == [False, True]
    assert not (cache / "names-999.json").exists()


def test_beside_uploads_nothing_is_lost(server):
    """The same few wheels come and go on an index, while others sweep as if all were old."""
    server.add_index("root/dev", volatile=True)
    archives = [wheel("demo", "1.%d" % number) for number in range(3)]
    stop, counts = threading.Event(), []

    def sweep():
        place = d.Blobs(str(server.directory))
        path = str(server.directory / "devpi_lite.db")
        with d.contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            while not stop.is_set():
                counts.append(place.collect(lambda sha256: d.is_named(db, sha256), -1).moved)
                place.empty_trash(lambda sha256: d.is_named(db, sha256), 3600)
    sweepers = [threading.Thread(target=sweep) for _ in range(2)]
    for sweeper in sweepers:
        sweeper.start()
    try:
        for number in range(12):
            archive = archives[number % 3]
            assert server.upload("root/dev", archive, user="root").status == 200
            assert server.fetch("root/dev", archive.filename, "demo") == archive.content
            assert server.delete("/root/dev/demo/" + archive.version, user="root").status == 200
            if number % 2:
                assert server.upload("root/dev", archive, user="root").status == 200
    finally:
        stop.set()
        for sweeper in sweepers:
            sweeper.join()
    assert sum(counts) > 0
    for version in server.versions("root/dev", "demo"):
        archive = archives[int(version[-1])]
        assert server.fetch("root/dev", archive.filename, "demo") == archive.content
    gc(server)
    for name in blobs(server):
        path = server.directory / "files" / name[:2] / name
        assert hashlib.sha256(path.read_bytes()).hexdigest() == name


@pytest.mark.parametrize("text, seconds", [("30m", 1800), ("24h", 86400), ("7d", 604800),
                                           ("0s", 0), (" 2D", 172800)])
def test_times_have_units(text, seconds):
    assert d.period(text) == seconds


@pytest.mark.parametrize("text", ["", "3", "1.5h", "-1h", "7w", "h"])
def test_other_times_are_refused(shared_server, text):
    result = run_command("gc", "--serverdir", shared_server.directory, "--older-than=" + text)
    assert result.returncode == 2 and "is no time" in result.stderr


def test_directories_that_are_not_whole_are_left_alone(tmp_path, shared_server):
    for name, sentence in [("missing", "there is no directory"),
                           ("empty", "no devpi_lite database")]:
        if name == "empty":
            (tmp_path / name).mkdir()
        result = run_command("gc", "--serverdir", tmp_path / name)
        assert result.returncode == 1 and sentence in result.stderr
    (shared_server.directory / ".unfinished").write_bytes(b"")
    try:
        result = run_command("gc", "--serverdir", shared_server.directory)
        assert result.returncode == 1 and "was cut off" in result.stderr
    finally:
        (shared_server.directory / ".unfinished").unlink()
