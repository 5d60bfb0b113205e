"""Backups: made while the server takes uploads, complete or not there, and the way back."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading

import pytest

from archives import documentation
from harness import (
    SCRIPT, Server, clean_environment, eventually, path_of, patched, run_command, serial, upload, upload_docs, wheel)

import devpi_lite as d


def filled(directory, **options):
    """A server with alice, an index of hers and some files, one of them in two places."""
    server = Server(directory, **options).start()
    server.add_user("alice")
    server.add_index("alice/dev")
    server.add_index("alice/prod")
    for number in range(6):
        upload(server, "alice/dev", wheel("demo", "1.%d" % number))
    upload_docs(server, "alice/dev", documentation("demo", "1.1"))
    server.push("alice/dev", "demo", "1.1", targetindex="alice/prod")
    server.login("alice")
    return server


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A server that runs, for tests that leave it as it is."""
    server = filled(tmp_path_factory.mktemp("source") / "server")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """A backup of it, for tests that copy it first."""
    folder = tmp_path_factory.mktemp("made") / "backups"
    backup(source, folder)
    return folder


@pytest.fixture
def copied(made, tmp_path):
    """A copy of that backup for the test to spoil."""
    shutil.copytree(str(made), str(tmp_path / "backups"), symlinks=True)
    return tmp_path / "backups"


def backup(server, folder, *options, status=0, **more):
    done = run_command("backup", folder, "--serverdir", getattr(server, "directory", server), *options, **more)
    assert done.returncode == status, done
    assert "Traceback" not in done.stderr
    return done


def verify(folder, *options, status=0):
    done = run_command("backup", "verify", folder, *options)
    assert done.returncode == status and "Traceback" not in done.stderr, done
    return done.stdout + done.stderr


def restore(folder, directory, *options, status=0, **more):
    done = run_command("restore", folder, "--serverdir", directory, *options, **more)
    assert done.returncode == status and "Traceback" not in done.stderr, done
    return done


def generations(folder):
    return sorted(path for path in folder.iterdir() if path.name.startswith("2"))


def tree(folder):
    """{path: (mode, content or None)} of all below a folder."""
    return {str(path.relative_to(folder)): (
        path.lstat().st_mode & 0o7777, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*") if path.name != ".lock"}


def pages(server):
    """What clients are shown, without what differs between two servers."""
    shown = []
    for path in ("/alice/dev/+simple/", "/alice/dev/+simple/demo/", "/alice/prod/+simple/demo/", "/alice/dev/demo",
                 "/alice/dev", "/alice"):
        reply = server.get(path)
        assert reply.status == 200, reply
        shown.append(reply.body.replace(server.url.encode(), b""))
    return shown


def test_a_restored_server_is_the_same_one(source, made, tmp_path):
    assert "undamaged" in verify(made)
    done = restore(made, tmp_path / "new")
    assert "start the server" in done.stdout
    server = Server(tmp_path / "new")
    server.passwords, server.tokens = dict(source.passwords), dict(source.tokens)
    server.start()
    try:
        assert pages(server) == pages(source)
        assert server.get("/+api", user="alice").result["authstatus"][0] == "ok"    # the old session
        assert server.login("alice") and server.login("root")
        for number in range(6):
            archive = wheel("demo", "1.%d" % number)
            assert server.get(path_of(archive, "alice/dev"), headers={"Accept": "*/*"}).body == archive.content
        assert server.get("/alice/dev/demo/1.1/+d/index.html", headers={"Accept": "*/*"}).status in (200, 302)
        assert serial(server) == serial(source)
        eventually(lambda: server.get("/+search?query=demo").result["hits"])    # its index is made anew
        assert upload(server, "alice/dev", wheel("demo", "2.0")).status == 200
    finally:
        server.stop()


def node(directory):
    db = sqlite3.connect(str(directory / "devpi_lite.db"))
    try:
        return dict(db.execute("SELECT key, value FROM node"))
    finally:
        db.close()


def test_a_restored_server_has_another_epoch_and_the_same_name_and_log(source, made, tmp_path):
    restore(made, tmp_path / "new")
    old, new = node(source.directory), node(tmp_path / "new")
    assert (new["uuid"] == old["uuid"], new["epoch"] == old["epoch"]) == (True, False)
    (generation,) = generations(made)
    manifest = json.loads((generation / "manifest.json").read_text())
    db = sqlite3.connect(str(tmp_path / "new" / "devpi_lite.db"))
    assert db.execute("SELECT serial, lower(hex(hash)) FROM changelog ORDER BY serial DESC").fetchone() == (
        manifest["serial"], manifest["hash"])
    db.close()


# -- what a backup is


def test_a_backup_holds_one_closed_database_that_only_its_owner_can_read(source, made):
    (generation,) = generations(made)
    assert sorted(path.name for path in generation.iterdir()) == [
        ".secret", "devpi_lite.db", "downloads.db", "manifest.json"]
    for database in generation.glob("*.db"):
        assert database.read_bytes()[18:20] == b"\1\1"      # no write-ahead log
    assert (generation / ".secret").read_bytes() == (source.directory / ".secret").read_bytes()
    modes = {path.lstat().st_mode for path in [made, *made.rglob("*")]}
    assert os.name == "nt" or {mode & 0o7777 for mode in modes} == {0o600, 0o700}
    assert not any(made.glob("tmp/*"))
    blobs = [path for path in made.glob("files/*/*")]
    assert len(blobs) == 7
    for path in blobs:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def test_modes_of_what_is_restored(made, tmp_path):
    restore(made, tmp_path / "new")
    modes = {path.lstat().st_mode & 0o7777 for path in [tmp_path / "new", *(tmp_path / "new").rglob("*")]}
    assert os.name == "nt" or modes == {0o600, 0o700}


def test_the_next_backup_copies_only_what_is_new(make_server, tmp_path):
    server, folder = make_server(), tmp_path / "backups"
    server.add_user("alice")
    server.add_index("alice/dev", volatile=True)
    upload(server, "alice/dev", *[wheel("demo", "1.%d" % number) for number in range(4)])
    assert "4 of them new" in backup(server, folder).stdout
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("files/*/*")}
    upload(server, "alice/dev", wheel("demo", "2.0"))
    assert "5 files" in backup(server, folder).stdout
    after = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("files/*/*")}
    assert {path: after[path] for path in before} == before and len(after) == 5
    assert "0 of them new" in backup(server, folder).stdout
    assert len(generations(folder)) == 3 and "3 backups are undamaged" in verify(folder)

    # the newest backup stays, with what it needs and nothing else
    server.delete("/alice/dev/demo/1.0", user="alice")
    assert "removed the backup" in backup(server, folder, "--keep", 2).stdout
    assert len(generations(folder)) == 2 and len(list(folder.glob("files/*/*"))) == 5
    backup(server, folder, "--keep", 1)
    assert {path.name for path in folder.glob("files/*/*")} == {
        wheel("demo", version).sha256 for version in ("1.1", "1.2", "1.3", "2.0")}
    assert "1 backup is undamaged" in verify(folder)
    for number in ("0", "-1", "x"):
        assert "no number" in backup(server, folder, "--keep", number, status=2).stderr
    assert backup(server, folder, "--keep", 1).returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="needs inodes")
def test_hard_links_take_no_room(source, tmp_path):
    backup(source, tmp_path / "backups", "--hard-links")
    for path in (tmp_path / "backups").glob("files/*/*"):
        assert path.samefile(source.directory / "files" / path.parent.name / path.name)
    assert "undamaged" in verify(tmp_path / "backups")


def test_backups_stay_in_order_when_the_clock_is_put_back(source, copied):
    (generation,) = generations(copied)
    generation.rename(copied / "2998-12-31T23-59-59Z")
    backup(source, copied)
    assert [path.name for path in generations(copied)] == ["2998-12-31T23-59-59Z", "2999-01-01T00-00-00Z"]


def test_a_backup_while_uploads_come_in_is_of_one_moment(make_server, tmp_path):
    server = make_server()
    server.add_user("alice")
    server.add_index("alice/dev", volatile=True)
    acknowledged, is_over = [], threading.Event()

    def run(worker):
        for number in range(10000):
            if is_over.is_set():
                return
            archive = wheel("p%d" % worker, "1.%d" % number, size=20000)
            if server.upload("alice/dev", archive).status == 200:
                acknowledged.append(archive)
            if number % 4 == 3:     # a name that goes while the backup is on its way
                server.delete("/alice/dev/p%d/1.%d" % (worker, number), user="alice")
    server.login("alice")
    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(2):
            eventually(lambda: len(acknowledged) > 10 * (number + 1))
            sure = [archive for archive in acknowledged if int(archive.version.split(".")[1]) % 4 != 3]
            backup(server, tmp_path / "backups")
    finally:
        is_over.set()
        for thread in threads:
            thread.join(60)
    assert "2 backups are undamaged" in verify(tmp_path / "backups")
    restore(tmp_path / "backups", tmp_path / "new")
    restored = make_server(directory=tmp_path / "new")
    for archive in sure:
        assert restored.fetch("alice/dev", archive.filename, archive.name) == archive.content


def test_files_in_the_trash_are_backed_up(make_server, tmp_path):
    server = make_server()
    server.add_user("alice")
    server.add_index("alice/dev")
    upload(server, "alice/dev", wheel("demo", "1.0"))
    server.stop()
    (server.directory / "trash").mkdir(exist_ok=True)
    (path,) = server.directory.glob("files/*/*")
    path.rename(server.directory / "trash" / path.name)
    assert "1 file " in backup(server, tmp_path / "backups").stdout
    assert (server.directory / "trash" / path.name).exists()


# -- who may back up what, and where to


def test_directories_that_are_no_place_for_a_backup(source, made, tmp_path):
    inside = source.directory / "backups"
    assert "in each other" in backup(source, inside, status=1).stderr and not inside.exists()
    assert "in each other" in backup(source, source.directory, status=1).stderr
    assert "in each other" in backup(source, source.directory.parent, status=1).stderr
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "mine").write_text("mine")
    assert "neither empty nor" in backup(source, tmp_path, status=1).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["files"]
    (tmp_path / "file").write_text("")
    assert "was not made" in backup(source, tmp_path / "file", status=1).stderr
    assert "no devpi_lite database" in backup(tmp_path / "none", tmp_path / "new", status=1).stderr
    assert not (tmp_path / "new").exists() and not (tmp_path / "none").exists()
    assert "in each other" in restore(made, made / "new", status=1).stderr
    assert "no backups" in restore(tmp_path / "files", tmp_path / "new", status=1).stderr
    assert not (tmp_path / "new").exists()


def test_backups_of_two_servers_are_not_mixed(make_server, copied):
    other = make_server()
    before = tree(copied)
    assert "of another server" in backup(other, copied, status=1).stderr
    assert tree(copied) == before


def test_a_link_of_the_operators_own_is_no_part_of_a_backup(source, copied):
    (copied / "latest").symlink_to(generations(copied)[0])
    assert "undamaged" in verify(copied)
    backup(source, copied)
    assert (copied / "latest").is_symlink()


def test_one_at_a_time(source, copied, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with open(str(copied / ".lock"), "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "works on" in backup(source, copied, status=1).stderr
        assert "works on" in verify(copied, status=1)
        assert "works on" in restore(copied, tmp_path / "new", status=1).stderr
    assert len(generations(copied)) == 1


def test_a_directory_without_a_server_and_of_an_older_program_is_backed_up(make_server, tmp_path):
    server = make_server()
    server.add_user("alice")
    server.add_index("alice/dev")
    upload(server, "alice/dev", wheel("demo", "1.0"))
    server.stop()
    db = sqlite3.connect(str(server.directory / "devpi_lite.db"))
    (version,) = db.execute("PRAGMA user_version").fetchone()
    db.execute("DROP TABLE arrivals")       # what the last step added
    db.execute("PRAGMA user_version = %d" % (version - 1))
    db.commit()
    backup(server, tmp_path / "backups")
    restore(tmp_path / "backups", tmp_path / "new")
    assert make_server(directory=tmp_path / "new").versions("alice/dev", "demo") == ["1.0"]

    db.execute("PRAGMA user_version = %d" % (version + 1))
    db.commit()
    db.close()
    assert "schema version" in backup(server, tmp_path / "backups", status=1).stderr
    (generation,) = generations(tmp_path / "backups")
    manifest = json.loads((generation / "manifest.json").read_text())
    sign(generation, dict(manifest, schema=version + 1))
    assert "newer" in restore(tmp_path / "backups", tmp_path / "newer", status=1).stderr
    assert not (tmp_path / "newer").exists()


def sign(generation, manifest):
    """Write a manifest as the program would."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (generation / "manifest.json").write_text(json.dumps(dict(body, sha256=digest)))


@pytest.mark.parametrize("change", [
    {"format": 2}, {"files": {"../x": ["0" * 64, 1]}}, {"files": {}}, {"serial": "1"}, {"missing": 3}, {"more": 1}])
def test_a_manifest_of_another_form_is_refused(copied, tmp_path, change):
    (generation,) = generations(copied)
    sign(generation, dict(json.loads((generation / "manifest.json").read_text()), **change))
    done = restore(copied, tmp_path / "new", status=1)
    assert "manifest.json" in done.stderr and not (tmp_path / "new").exists()
    assert "manifest.json" in verify(copied, status=1)


@pytest.mark.parametrize("name", ["9999-99-99T99-99-99Z", "9999-12-31T23-59-59Z"])
def test_a_folder_that_is_named_after_no_time(source, copied, name):
    generations(copied)[0].rename(copied / name)
    done = backup(source, copied, status=1)
    assert name in done.stderr and "rename" in done.stderr
    assert [path.name for path in generations(copied)] == []


@pytest.mark.skipif(os.name == "nt", reason="pipes in the file system are of POSIX")
@pytest.mark.parametrize("name", ["tmp", "files", ".lock"])
def test_a_pipe_in_place_of_what_belongs_there_is_named(source, copied, name):
    path = copied / name
    shutil.rmtree(str(path)) if path.is_dir() else path.exists() and path.unlink()
    os.mkfifo(str(path))
    assert str(path) in backup(source, copied, status=1, timeout=20).stderr
    assert str(path) in verify(copied, status=1)


def test_what_is_not_of_a_backup_stays(source, copied):
    for name in ("2026-11-29T00-00-01Z", "files/00/notes", "files/00/folder/x"):
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_text("notes")
    (copied / "files" / "00" / ("00" * 32)).mkdir()
    backup(source, copied, "--keep", 1)
    for name in ("2026-11-29T00-00-01Z", "files/00/notes", "files/00/folder/x"):
        assert (copied / name).read_text() == "notes"
    verify(copied)


def test_old_backups_that_can_not_be_removed_do_not_hide_the_new_one(source, copied, tmp_path):
    before = generations(copied)
    script = patched(tmp_path, "def remove(backup): raise OSError('no')\ndevpi_lite.Backup.remove = remove")
    done = backup(source, copied, "--keep", 1, status=1, script=script)
    (new,) = set(generations(copied)) - set(before)
    assert "the backup %s was made" % new.name in done.stderr
    verify(copied)


@pytest.mark.skipif(os.name == "nt", reason="/dev/full is of Linux")
def test_a_backup_whose_last_line_nobody_takes_was_made(source, copied):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-u", str(SCRIPT), "backup", str(copied), "--serverdir", str(source.directory)],
                              env=clean_environment(), stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert b"was made and is whole" in done.stderr and b"Traceback" not in done.stderr, done


# -- databases that somebody else has changed, and signed anew


def changed(folder, *statements):
    """Run SQL in the database of a backup, as whoever made the backup could."""
    (generation,) = generations(folder)
    with contextlib.closing(sqlite3.connect(str(generation / "devpi_lite.db"))) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()
    content = (generation / "devpi_lite.db").read_bytes()
    manifest = json.loads((generation / "manifest.json").read_text())
    files = dict(manifest["files"], **{"devpi_lite.db": [hashlib.sha256(content).hexdigest(), len(content)]})
    sign(generation, dict(manifest, files=files))


@pytest.mark.parametrize("value", ["'../../../../../../etc/passwd'", "'..'", "upper(sha256)", "7", "CAST(x'00' AS BLOB)",
                                   "sha256 || char(0) || '/..'"])
@pytest.mark.parametrize("column", ["sha256", "metadata_sha256"])
def test_what_is_no_hash_leads_nowhere(copied, tmp_path, column, value):
    changed(copied, "UPDATE files SET %s = %s WHERE filename = 'demo-1.3-py3-none-any.whl'" % (column, value))
    told = verify(copied, status=1), restore(copied, tmp_path / "new", "--skip-broken", status=1).stderr
    for text in told:
        assert "demo-1.3-py3-none-any.whl" in text and "no SHA-256" in text
    assert not (tmp_path / "new").exists()


def test_what_is_no_hash_names_no_file_of_a_server(tmp_path):
    (tmp_path / "secret").write_text("secret")
    blobs = d.Blobs(str(tmp_path / "server"))
    for name in ("../../../secret", "../../secret", "../secret", str(tmp_path / "secret")):
        assert not blobs.has(name) and not blobs.claim(name)
        with pytest.raises(d.NotFound):
            blobs.open(name)
    assert (tmp_path / "secret").read_text() == "secret"


@pytest.mark.parametrize("statements, sentence", [
    (["DROP TABLE files", "CREATE VIEW files AS WITH RECURSIVE endless(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM endless)"
      " SELECT x AS id, '00' || x AS sha256, 1 AS size FROM endless"], "lacks the table files"),
    (["DROP TABLE readmes"], "lacks the table readmes"),
    (["ALTER TABLE releases RENAME COLUMN readme_size TO other"], "lacks the column readme_size of releases"),
    (["DELETE FROM node"], "lacks the uuid of the server"),
    (["PRAGMA user_version = 99"], "versions up to")])
def test_a_database_of_another_form_is_refused(copied, tmp_path, statements, sentence):
    changed(copied, *statements)
    assert sentence in restore(copied, tmp_path / "new", status=1, timeout=20).stderr
    assert not (tmp_path / "new").exists()
    if "lacks" in sentence:
        assert sentence in verify(copied, status=1)


def test_triggers_and_views_are_not_restored(copied, tmp_path):
    changed(copied, "CREATE TRIGGER back AFTER UPDATE ON users BEGIN UPDATE users SET pwhash = 'mine'; END",
            "CREATE TRIGGER \"a \"\"b\" AFTER UPDATE ON node BEGIN DELETE FROM users; END", "CREATE VIEW more AS SELECT 1")
    done = restore(copied, tmp_path / "new")
    assert "dropped the trigger back" in done.stdout and "dropped the view more" in done.stdout
    with contextlib.closing(sqlite3.connect(str(tmp_path / "new" / "devpi_lite.db"))) as db:
        assert not any(d.schema_faults(db))
        assert db.execute("SELECT count(*) FROM users").fetchone()[0] == 2


def test_a_server_whose_database_lacks_something_is_not_backed_up(source, made, tmp_path):
    restore(made, tmp_path / "server")
    with contextlib.closing(sqlite3.connect(str(tmp_path / "server" / "devpi_lite.db"))) as db:
        db.execute("DELETE FROM node")
        db.commit()
    assert "lacks the uuid" in backup(tmp_path / "server", tmp_path / "backups", status=1).stderr
    assert generations(tmp_path / "backups") == []


@pytest.mark.skipif(os.name == "nt", reason="pipes in the file system are of POSIX")
@pytest.mark.parametrize("what", ["a pipe", "a device"])
@pytest.mark.parametrize("name", ["blob", ".secret", "root-password", ".lock"])
def test_nobody_waits_for_what_never_ends(made, tmp_path, what, name):
    restore(made, tmp_path / "server")
    path = tmp_path / "server" / name
    if name == "blob":
        path = one_of(tmp_path / "server", "release")[0]
    if path.exists():
        path.unlink()
    os.mkfifo(str(path)) if what == "a pipe" else path.symlink_to("/dev/zero")
    status = {"blob": 5, ".lock": 0}.get(name, 1)
    done = backup(tmp_path / "server", tmp_path / "backups", status=status, timeout=20)
    assert status == 0 or str(path) in done.stderr and "no plain file" in done.stderr
    assert run_command("status", "--serverdir", tmp_path / "server", timeout=20).returncode == 0


def test_read_only_media_are_backed_up_and_restored_from(source, tmp_path):
    pytest.importorskip("fcntl")
    directory = tmp_path / "media"
    shutil.copytree(str(source.directory), str(directory), ignore=shutil.ignore_patterns(".lock", "tmp", "*-wal", "*-shm"))
    backup(source, tmp_path / "live")
    shutil.copy(str(generations(tmp_path / "live")[0] / "devpi_lite.db"), str(directory / "devpi_lite.db"))
    before = tree(directory)
    script = patched(tmp_path, "devpi_lite.is_read_only = lambda path: path in (%r, %r)" % (
        str(directory), str(tmp_path / "backups")))
    backup(directory, tmp_path / "backups", script=script)
    assert tree(directory) == before
    (tmp_path / "backups" / ".lock").unlink()
    restore(tmp_path / "backups", tmp_path / "new", script=script)
    assert not (tmp_path / "backups" / ".lock").exists()


# -- what is lost


def spoil(path):
    """Flip one bit in the middle of a file; its size and its time stay."""
    content, times = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    os.utime(str(path), ns=(times.st_atime_ns, times.st_mtime_ns))


def one_of(folder, kind):
    """(a file of this kind in a backup, what it is called)."""
    if kind == "release":
        path = folder / "files" / wheel("demo", "1.3").sha256[:2] / wheel("demo", "1.3").sha256
        return path, "alice/dev/demo-1.3-py3-none-any.whl"
    if kind == "docs":
        digest = documentation("demo", "1.1").sha256
        return folder / "files" / digest[:2] / digest, "alice/dev/demo-1.1.doc.zip"
    return generations(folder)[0] / kind, kind


KINDS = ["release", "docs", "devpi_lite.db", ".secret", "manifest.json"]


@pytest.mark.parametrize("harm, kind", [
    *[(harm, kind) for harm in ("flipped", "gone") for kind in KINDS], ("emptied", "release"), ("a folder", "release"),
    *[("a link", kind) for kind in ("docs", "devpi_lite.db", "manifest.json")]])
def test_damage_is_named_and_nothing_damaged_is_restored(copied, tmp_path, kind, harm):
    path, name = one_of(copied, kind)
    if harm == "flipped":
        spoil(path)
    else:
        aside = tmp_path / "aside"
        path.rename(aside)
        if harm == "emptied":
            path.touch()
        elif harm == "a link":
            path.symlink_to(aside)
        elif harm == "a folder":
            path.mkdir()
    told, done = verify(copied, status=1), restore(copied, tmp_path / "new", status=1)
    if (kind, harm) == ("manifest.json", "gone"):
        assert "cut off" in told and "cut off" in done.stderr
    else:
        assert name in told and name in done.stderr
    assert not (tmp_path / "new").exists()

    if kind in ("release", "docs"):
        done = restore(copied, tmp_path / "new", "--skip-broken", status=5)
        assert name in done.stderr and len(list((tmp_path / "new").glob("files/*/*"))) == 6


def test_an_undamaged_backup_is_restored_beside_a_damaged_one(source, copied, tmp_path):
    first = generations(copied)[0].name
    backup(source, copied)
    spoil(generations(copied)[1] / "devpi_lite.db")
    done = restore(copied, tmp_path / "new", status=1)
    assert "--generation takes another one: " + first in done.stderr
    restore(copied, tmp_path / "new", "--skip-broken", status=1)      # that is for single files
    assert not (tmp_path / "new").exists()
    restore(copied, tmp_path / "new", "--generation", first)
    assert "undamaged" in verify(copied, "--generation", first)
    assert "there are: " + first in restore(copied, tmp_path / "other", "--generation", "2020", status=1).stderr


def test_folders_that_are_links_are_refused(source, copied, tmp_path):
    for name in ("files", generations(copied)[0].name, "files/" + wheel("demo", "1.3").sha256[:2], ".lock", "tmp"):
        if not (copied / name).exists():
            continue
        (copied / name).rename(tmp_path / "aside")
        (copied / name).symlink_to(tmp_path / "aside")
        before = tree(tmp_path / "aside") if (tmp_path / "aside").is_dir() else (tmp_path / "aside").read_bytes()
        assert "symbolic link" in verify(copied, status=1)
        assert "symbolic link" in restore(copied, tmp_path / "new", status=1).stderr
        assert "symbolic link" in backup(source, copied, status=1).stderr
        assert before == (tree(tmp_path / "aside") if (tmp_path / "aside").is_dir() else (tmp_path / "aside").read_bytes())
        (copied / name).unlink()
        (tmp_path / "aside").rename(copied / name)


@pytest.mark.parametrize("harm", ["flipped", "gone"])
def test_a_backup_goes_on_without_what_the_server_has_lost(make_server, upstream, tmp_path, harm):
    server, folder = make_server(), tmp_path / "backups"
    server.add_user("alice")
    server.add_index("alice/dev")
    upload(server, "alice/dev", *[wheel("demo", "1.%d" % number) for number in range(3)])
    archive = wheel("mirrored", "1.0")
    upstream.publish(archive)
    server.add_mirror("alice/mirror", upstream)
    server.fetch("alice/mirror", archive.filename, "mirrored")
    server.stop()
    lost = [server.directory / "files" / one.sha256[:2] / one.sha256 for one in (wheel("demo", "1.1"), archive)]
    for path in lost:
        spoil(path) if harm == "flipped" else path.unlink()

    done = backup(server, folder, status=5)
    assert "alice/dev/demo-1.1-py3-none-any.whl" in done.stderr and "mirrored" not in done.stderr
    assert "2 files" in done.stdout and "1 file of mirrors" in done.stdout
    manifest = json.loads((generations(folder)[0] / "manifest.json").read_text())
    assert (manifest["missing"], manifest["missing_cached"]) == ([wheel("demo", "1.1").sha256], 1)
    told = verify(folder, status=5)
    assert "undamaged" in told and "alice/dev/demo-1.1" in told
    done = restore(folder, tmp_path / "new", status=5)
    assert "alice/dev/demo-1.1" in done.stderr
    restored = make_server(directory=tmp_path / "new")
    assert restored.fetch("alice/dev", "demo-1.2-py3-none-any.whl", "demo")
    assert restored.fetch("alice/mirror", archive.filename, "mirrored") == archive.content     # fetched again


def test_a_damaged_database_is_not_backed_up(made, source, tmp_path):
    restore(made, tmp_path / "server")
    path = tmp_path / "server" / "devpi_lite.db"
    content = bytearray(path.read_bytes())
    content[4096 * 3:4096 * 6] = bytes(4096 * 3)
    path.write_bytes(bytes(content))
    folder = tmp_path / "backups"
    shutil.copytree(str(made), str(folder))
    done = backup(tmp_path / "server", folder, status=1)
    assert "database" in done.stderr and len(generations(folder)) == 1
    assert "1 backup is undamaged" in verify(folder)


# -- cut off


LIMITED = """if True:
    import os, resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (%d, %d))"""


NO_MANIFEST = """if True:
    import errno
    write = devpi_lite.write_private
    def write_unless(path, data):
        if path.endswith("manifest.json"):
            raise OSError(errno.ENOSPC, "No space left on device", path)
        write(path, data)
    devpi_lite.write_private = write_unless"""


@pytest.mark.parametrize("code", [LIMITED % (100000, 100000), LIMITED % (400000, 400000), NO_MANIFEST],
                         ids=["database", "blob", "manifest"])
def test_a_full_disk(tmp_path, code):
    """What can't be written is first a database, then a blob, then the manifest."""
    pytest.importorskip("resource")
    folder = tmp_path / "backups"
    server = filled(tmp_path / "server")
    try:
        backup(server, folder)
        upload(server, "alice/dev", wheel("big", "1.0", size=500000))
        before = tree(folder)
        script = patched(tmp_path, code)
        done = backup(server, folder, status=1, script=script)
        assert "fatal: " in done.stderr and "as they were" in done.stderr
        assert tree(folder) == before
        backup(server, folder)
        if code != NO_MANIFEST:
            done = restore(folder, tmp_path / "new", status=1, script=script)
            assert "fatal: " in done.stderr and not (tmp_path / "new").exists()
        restore(folder, tmp_path / "new")
        assert "2 backups are undamaged" in verify(folder)
    finally:
        server.kill()


ROUNDS = int(os.environ.get("DEVPI_LITE_ROUNDS", 1))     # test_cut_off.py has more of these, for a soak


def cut_off(seconds, *arguments):
    """Runs a command and kills it after this time; whether it was still running."""
    process = subprocess.Popen([sys.executable, str(SCRIPT), *map(str, arguments)], env=clean_environment(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def test_killed_at_random_moments(make_server, tmp_path):
    server, folder, number, seconds = filled(tmp_path / "server"), tmp_path / "backups", 0, 1.0
    chance = random.Random()
    try:
        backup(server, folder)
        for number in range(ROUNDS):
            upload(server, "alice/dev", *[wheel("p%d" % number, "1.%d" % count, size=30000) for count in range(10)])
            took, before = chance.uniform(0, seconds), len(generations(folder))
            if not cut_off(took, "backup", folder, "--serverdir", server.directory, "--keep", 2):
                seconds = max(0.2, took * 1.1)
            verify(folder)
            assert len(generations(folder)) <= before + 1
        backup(server, folder)
        assert "cut off" not in verify(folder) and not (folder / "tmp").exists()
        for path in folder.glob("files/*/*"):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name

        for number in range(ROUNDS):
            if cut_off(chance.uniform(0, seconds), "restore", folder, "--serverdir", tmp_path / "new"):
                started = run_command("--serverdir", tmp_path / "new", "--port", 0, timeout=20) \
                    if (tmp_path / "new" / ".unfinished").exists() else None
                assert started is None or "run it again" in started.stderr
            else:
                shutil.rmtree(str(tmp_path / "new"), ignore_errors=True)
        if not (tmp_path / "new" / "devpi_lite.db").exists() or (tmp_path / "new" / ".unfinished").exists():
            restore(folder, tmp_path / "new")
        restored = make_server(directory=tmp_path / "new")
        assert restored.versions("alice/dev", "demo") == server.versions("alice/dev", "demo")
    finally:
        server.kill()


def test_ctrl_c_says_what_is_left(server, tmp_path, monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(d, "back_up", stop)
    monkeypatch.setattr(d, "give_way", lambda: None)
    assert d.main(["backup", str(tmp_path / "new"), "--serverdir", str(server.directory)]) == 1
    assert capsys.readouterr().err == "fatal: the backup was stopped: those that were whole are as they were\n"


def test_one_backup_is_told_from_the_directory_of_all(make_server, tmp_path):
    server, folder = make_server(), tmp_path / "backups"
    assert run_command("backup", folder, "--serverdir", server.directory).returncode == 0
    one, = (path for path in folder.iterdir() if path.name.endswith("Z"))
    for words in (("backup", "verify", one), ("restore", one, "--serverdir", tmp_path / "back")):
        done = run_command(*words)
        assert done.returncode == 1
        assert done.stderr == f"fatal: {one} is one backup: name the directory in which it lies, " \
                              f"with --generation {one.name}\n"
    assert run_command("backup", "verify", one.parent, "--generation", one.name).returncode == 0


def test_a_file_that_a_backup_has_already_is_not_looked_at_again(make_server, tmp_path):
    server, folder = make_server(), tmp_path / "backups"
    server.add_user("alice")
    server.add_index("alice/dev")
    demo = wheel("demo", "1.0")
    upload(server, "alice/dev", demo)
    server.stop()
    assert run_command("backup", folder, "--serverdir", server.directory).returncode == 0
    os.unlink(server.directory / "files" / demo.sha256[:2] / demo.sha256)
    done = run_command("backup", folder, "--serverdir", server.directory)
    assert done.returncode == 0 and "0 of them new" in done.stdout      # the backup is whole
    assert run_command("backup", "verify", folder).returncode == 0
    assert "`fsck` tells what the server has lost since" in " ".join(run_command("backup", "--help").stdout.split())
