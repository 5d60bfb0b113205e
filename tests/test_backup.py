"""Backups: made while the server takes uploads, complete or not there, and the way back."""

import hashlib
import json
import os
import pathlib
import shutil
import sqlite3
import threading

import pytest

from archives import documentation
from harness import Server, eventually, path_of, patched, run_command, serial, upload, upload_docs, wheel


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
