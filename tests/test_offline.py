"""A server that asks nobody and, on read-only media, keeps nothing: it says so, and serves what is
there."""

import pathlib
import shutil
import subprocess
import sys

import pytest

from harness import Server, clean_environment, eventually, patched, run_command, sdist, wheel

SENTENCE = "read-only media"


def content(directory):
    return {str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
            for path in directory.rglob("*")}


def found(server):
    return server.get("/+search?query=needle").result["hits"]


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A stopped server's directory: a stage with a file, a search index, a mirror that has one
    file."""
    from upstream import Upstream

    upstream = Upstream().start()
    upstream.publish("mirrored", "1.0")
    upstream.publish("mirrored", "2.0")
    server = Server(tmp_path_factory.mktemp("filled") / "server").start()
    server.add_user("alice")
    server.add_mirror("root/mirror", upstream)
    server.add_index("alice/dev", bases=["root/mirror"])
    server.add_index("alice/prod")
    assert server.upload("alice/dev", wheel("own", "1.0", summary="a needle")).status == 200
    name = server.filenames("root/mirror", "mirrored")[0]
    server.fetch("root/mirror", name, "mirrored")
    eventually(lambda: found(server))
    server.stop()
    upstream.stop()
    for path in server.directory.glob("*-wal"):
        assert path.stat().st_size == 0
    return server.directory, name


def test_offline_mode_is_said_at_the_start_in_status_and_metrics(make_server):
    server = make_server("--offline-mode")
    assert "offline mode: upstream is not asked" in server.whole_output()
    assert server.get("/+status").result["offline-mode"] is True
    assert "\ndevpi_lite_offline_mode 1\n" in server.get("/+metrics").text
    server.options = ()
    server.restart()
    assert "offline mode" not in server.whole_output()
    assert server.get("/+status").result["offline-mode"] is False
    assert "\ndevpi_lite_offline_mode 0\n" in server.get("/+metrics").text


def wrapper(folder, directory):
    """An interpreter for `Server` which sees the directory mounted read-only; None where that can't
    be had."""
    script = pathlib.Path(folder) / "python"
    script.write_text("""#!/bin/sh
exec unshare -rm sh -c 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"' '%s' '%s' "$@"
""" % (directory, sys.executable))
    script.chmod(0o755)
    if not shutil.which("unshare"):
        return None
    probe = subprocess.run(
        [str(script), "-c", "import os; open(%r, 'w')" % str(directory / "probe")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        env=clean_environment(),
    )
    return script if "Read-only file system" in probe.stderr else None


@pytest.fixture(params=["said to be", "mounted"])
def read_only(request, tmp_path, filled):
    """A server on a copy of the directory without what a careful copy leaves out, that is
    read-only; and the mirror's file."""
    directory = tmp_path / "copy"
    shutil.copytree(str(filled[0]), str(directory))
    for name in (".lock", ".commits", ".secret"):
        (directory / name).unlink()
    shutil.rmtree(str(directory / "tmp"))
    options = {}
    if request.param == "mounted":
        options["python"] = wrapper(tmp_path, directory)
        if options["python"] is None:
            pytest.skip("directories can't be mounted read-only here")
    else:
        options["script"] = patched(tmp_path, "devpi_lite.is_read_only = lambda path: True")
    before = content(directory)
    server = Server(directory, **options)
    server.passwords = {"root": "secret", "alice": "pw"}
    yield server.start(), filled[1]
    server.stop()
    assert content(directory) == before


def test_what_lies_in_the_trash_of_read_only_media_is_served(read_only):
    server, mirrored = read_only
    trash = server.directory / "trash"
    trash.mkdir()
    moved = [(path, trash / path.name) for path in server.directory.glob("files/??/*")]
    for path, place in moved:
        path.rename(place)
    try:
        assert server.fetch("alice/dev", "own-1.0-py3-none-any.whl", "own")
        assert server.fetch("root/mirror", mirrored, "mirrored")
    finally:
        for path, place in moved:
            place.rename(path)
        trash.rmdir()


def test_a_directory_on_read_only_media_is_served(read_only):
    server, mirrored = read_only
    assert server.versions("alice/dev", "own") == ["1.0"]
    assert server.fetch("alice/dev", "own-1.0-py3-none-any.whl", "own")
    assert server.filenames("alice/dev", "mirrored") == [mirrored] and server.fetch(
        "root/mirror", mirrored, "mirrored"
    )
    assert found(server)
    assert (
        server.login("alice") and server.get("/+api", user="alice").result["authstatus"][0] == "ok"
    )
    assert server.post("/+login", {"user": "alice", "password": "wrong"}).status == 401
    assert server.get("/+health/ready").status == 200
    status = server.get("/+status").result
    assert (status["read-only"], status["offline-mode"], status["status"]) == (
        True,
        True,
        "ok",
    ), status["messages"]
    assert SENTENCE in server.whole_output()

    package = wheel("own", "2.0")
    for refused in (
        server.upload("alice/dev", package),
        server.upload("alice/dev", package, fields={"description": "x" * 200000}),
        server.upload("alice/dev", sdist("new", "1.0")),
        server.put("/alice/new", {}, user="alice"),
        server.patch("/alice/dev", ["volatile=False"], user="alice"),
        server.delete("/alice/dev/own/1.0", user="alice"),
        server.delete("/alice", user="alice"),
        server.put("/bob", {"password": "pw"}),
        server.patch("/alice", {"password": "new"}, user="alice"),
        server.post(
            "/alice/dev",
            {"name": "own", "version": "1.0", "targetindex": "alice/prod"},
            user="alice",
        ),
        server.post(
            "/alice/dev",
            {
                "name": "own",
                "version": "1.0",
                "posturl": "http://127.0.0.1:9/",
                "username": "x",
                "password": "y",
            },
            user="alice",
        ),
        server.patch("/alice/dev/own/1.0", {"yanked": True}, user="alice"),
        server.post("/+outbox/retry", {}, user="root"),
    ):
        assert refused.status == 403 and SENTENCE in refused.json()["message"], refused


def test_without_a_search_index_nothing_is_found_and_the_status_says_so(tmp_path, filled):
    directory = tmp_path / "copy"
    shutil.copytree(str(filled[0]), str(directory))
    for path in directory.glob("search.db*"):
        path.unlink()
    server = Server(directory, script=patched(tmp_path, "devpi_lite.is_read_only = lambda path: "
                                                        "True")).start()
    try:
        assert found(server) == []
        assert server.get("/+status").result["status"] == "warn"
    finally:
        server.stop()
    assert not list(directory.glob("search.db*"))


def test_a_search_index_whose_newest_changes_are_in_its_log_is_said_to_be_so(filled, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(str(filled[0]), str(directory))
    (directory / "search.db-wal").write_bytes(b"changes")
    server = Server(directory, script=patched(tmp_path, "devpi_lite.is_read_only = lambda path: "
                                                        "True")).start()
    try:
        assert server.get("/+status").result["messages"] == ["the search index failed, see the log"]
        output = server.whole_output()
    finally:
        server.stop()
    said, = [line for line in output.splitlines() if "no search index" in line]
    assert "search.db-wal.  Stop the server" in said and "made anew" not in output


def test_a_database_that_was_not_closed_is_not_served_without_its_newest_changes(tmp_path, filled):
    directory = tmp_path / "copy"
    shutil.copytree(str(filled[0]), str(directory))
    (directory / "devpi_lite.db-wal").write_bytes(b"changes")
    script = patched(tmp_path, "devpi_lite.is_read_only = lambda path: True")
    result = run_command("--serverdir", directory, "--port", "0", script=script)
    assert (
        result.returncode == 1
        and "devpi_lite.db-wal" in result.stderr
        and len(result.stderr.splitlines()) == 1
    )
    for command in ("init", "passwd"):
        result = run_command(command, "--serverdir", directory, script=script)
        assert result.returncode == 1 and SENTENCE in result.stderr, result
