"""`status`: how a server is, on one screen, as JSON, and in a line for monitoring; read from its directory, or asked of it."""

import base64
import contextlib
import http.server
import json
import os
import pathlib
import sqlite3
import threading
import time
import urllib.parse

import pytest

import devpi_lite
from harness import Server, documentation, eventually, run_command, upload, upload_docs, wheel


def status(*arguments, **options):
    """Its standard output; AssertionError unless it ends well."""
    result = run_command("status", *arguments, **options)
    assert (result.returncode, result.stderr) == (0, ""), result
    return result.stdout


def facts(*arguments):
    return json.loads(status(*arguments, "--json"))


def plugin(*arguments):
    """(exit status, first word, figures) of --nagios; it prints one line."""
    result = run_command("status", "--nagios", *arguments)
    assert "Traceback" not in result.stderr
    (line,) = result.stdout.splitlines()
    text, _, data = line.partition(" | ")
    program, word, rest = text.split(" ", 2)
    assert program == "DEVPI_LITE" and rest.startswith("- ")
    return result.returncode, word, dict(each.split("=") for each in data.split())


def assert_fits(text):
    lines = text.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80, text


@pytest.fixture(scope="module")
def served(shared_server):
    """A server with an index of three releases, one of them with documentation."""
    shared_server.add_index("root/dev")
    upload(shared_server, "root/dev", wheel("demo", "1.0"), wheel("demo", "2.0"), wheel("other", "1.0"))
    upload_docs(shared_server, "root/dev", documentation("demo", "1.0"))
    return shared_server


def changed(server, folder, change):
    """A copy of a stopped server's directory, after some SQL."""
    copy = pathlib.Path(folder) / "copy"
    with contextlib.closing(sqlite3.connect(str(server.directory / "devpi_lite.db"))) as source:
        copy.mkdir()
        with contextlib.closing(sqlite3.connect(str(copy / "devpi_lite.db"))) as target:
            source.backup(target)
            target.executescript(change)
            target.commit()
    return str(copy)


# -- read from the directory


def test_the_directory_of_a_running_server(served):
    found = facts("--serverdir", str(served.directory))
    theirs = served.get("/+status", user="root", headers={"Accept": "application/json"}).result
    for name in ("serverdir", "uuid", "versioninfo", "serial", "last-commit-timestamp", "role", "read-only", "status", "messages",
                 "outbox"):
        assert found[name] == theirs[name], name
    assert set(found["trash"]) == set(theirs["trash"])
    assert {name for name, _, _ in found["metrics"]} <= {name for name, _, _ in theirs["metrics"]}

    assert found["server"]["running"] is True and found["server"]["pid"] == served.pid
    assert 0 <= time.time() - found["server"]["since"] < 600
    assert found["last-commit-by"] == "root"
    assert (found["users"], found["releases"]) == (1, 3)
    assert found["indexes"] == {"stages": 1, "mirrors": 0}
    assert found["projects"] == {"stages": 2, "mirrors": 0}
    assert found["files"]["stages"]["files"] == 4 and found["files"]["stages"]["bytes"] > 1000
    assert found["attached"] == {"documentation": 1, "test-results": 0}
    assert found["changelog"]["entries"] == found["serial"] + 1


def test_the_screen_fits_a_terminal(served):
    text = status("--serverdir", str(served.directory))
    assert_fits(text)
    assert text.startswith("%s: ok\n" % served.directory)
    for word in ("runs, process %d, since" % served.pid, "by root", "files here", "documentation 1"):
        assert word in text, text


def test_the_screen_fits_however_much_is_wrong(served, tmp_path):
    config = json.dumps({"type": "stage", "bases": ["no/%s%d" % ("where" * 30, each) for each in range(50)]})
    copy = changed(served, tmp_path, "UPDATE indexes SET config = '%s'; UPDATE search_queue SET since = 0;"
                   "INSERT INTO search_queue VALUES (99, 'x', 0);" % config)
    text = status("--serverdir", copy)
    assert_fits(text)
    assert "more: --json shows all" in text and "minutes behind" in text
    assert len(facts("--serverdir", copy)["messages"]) == 52


def test_control_characters_do_not_reach_the_terminal(served, tmp_path):
    copy = changed(served, tmp_path, "UPDATE changelog SET who = 'r' || char(27) || '[2J' || char(10) || 'x'")
    text = status("--serverdir", copy)
    assert "\x1b" not in text
    assert_fits(text)


def test_the_directory_of_a_stopped_server_stays_as_it_is(make_server):
    server = make_server()
    server.stop()
    before = {path: path.stat().st_mtime_ns for path in server.directory.iterdir()}
    found = facts("--serverdir", str(server.directory))
    assert found["server"] == {"running": False, "pid": None, "since": None}
    assert "not running" in status("--serverdir", str(server.directory))
    assert {path: path.stat().st_mtime_ns for path in server.directory.iterdir()} == before


@pytest.mark.skipif(os.name == "nt", reason="its locks are not shared")
def test_a_look_at_the_lock_stops_no_start(tmp_path):
    """A server that starts while somebody looks waits for an instant."""
    (tmp_path / ".lock").write_text("1\n")
    with open(str(tmp_path / ".lock")) as file:
        devpi_lite.lock_file(file, shared=True)
        threading.Timer(0.02, devpi_lite.unlock_file, [file]).start()
        devpi_lite.take_lock(str(tmp_path)).close()
    assert devpi_lite.lock_holder(str(tmp_path)) is None
    with devpi_lite.take_lock(str(tmp_path)):
        assert devpi_lite.lock_holder(str(tmp_path))[0] == os.getpid()


def test_read_only_media(served, tmp_path):
    """No server takes a lock there, so whether one runs is unknown; a full disk is as it should be."""
    copy = changed(served, tmp_path, "")
    script = tmp_path / "patched.py"
    script.write_text("import sys\nsys.path.insert(0, %r)\nimport devpi_lite\ndevpi_lite.is_read_only = lambda path: True\n"
                      "devpi_lite.Limits.disk_warn = 1 << 60\nsys.exit(devpi_lite.main(sys.argv[1:]))\n"
                      % str(pathlib.Path(devpi_lite.__file__).parent))
    before = sorted(os.listdir(copy))
    found = json.loads(status("--serverdir", copy, "--json", script=script))
    assert found["read-only"] and found["server"]["running"] is None and found["status"] == "ok"
    assert sorted(os.listdir(copy)) == before
    assert "on read-only media" in status("--serverdir", copy, script=script)


@pytest.mark.parametrize("version, level, words", [
    (1, "warn", "the next start of the server brings it up"), (999, "fatal", "use a newer one")])
def test_another_schema(served, tmp_path, version, level, words):
    drop = "DROP TABLE search_queue; DROP TABLE outbox; PRAGMA foreign_keys = OFF;" if version == 1 else ""
    copy = changed(served, tmp_path, drop + "PRAGMA user_version = %d" % version)
    found = facts("--serverdir", copy)
    assert (found["status"], found["schema"], found["releases"]) == (level, version, 3)
    assert words in found["messages"][0]
    assert_fits(status("--serverdir", copy))
    assert plugin("--serverdir", copy)[:2] == (2, "CRITICAL")       # no server runs there


def test_an_unfinished_directory(served, tmp_path):
    copy = changed(served, tmp_path, "")
    pathlib.Path(copy, ".unfinished").write_text("")
    found = facts("--serverdir", copy)
    assert found["status"] == "fatal" and "was cut off" in found["messages"][0]


def test_no_such_directory(tmp_path):
    for path, words in ((tmp_path / "none", "there is no directory"), (tmp_path, "no devpi_lite database")):
        result = run_command("status", "--serverdir", str(path))
        assert result.returncode == 1 and words in result.stderr
        assert plugin("--serverdir", str(path))[:2] == (3, "UNKNOWN")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_database_is_an_alarm(tmp_path):
    (tmp_path / "devpi_lite.db").write_bytes(b"no database" * 1000)
    assert run_command("status", "--serverdir", str(tmp_path)).returncode == 1
    assert plugin("--serverdir", str(tmp_path))[:2] == (2, "CRITICAL")


def test_users_with_a_hash_of_devpi(served, tmp_path):
    """They are counted until they log in."""
    copy = changed(served, tmp_path, "INSERT INTO users (name, pwhash, generation, created, attributes) VALUES "
                   "('mira', '$argon2id$v=19$m=65536,t=3,p=4$c2FsdHNhbHQ$ZGlnZXN0ZGlnZXN0', '', '', '{}')")
    assert facts("--serverdir", copy)["unconverted-users"] == ["mira"]
    assert "2, 1 with a password hash of devpi, not logged in yet" in status("--serverdir", copy)


# -- asked of a server


def test_a_server_is_asked(served, tmp_path):
    found = facts("--url", served.url)
    assert found["url"] == served.url and found["ready"] is True and found["serverdir"] is None
    assert found["response-seconds"] < 10
    text = status("--url", served.url)
    assert_fits(text)
    for word in ("runs for", "ready", "GiB free", "up to date"):
        assert word in text, text

    (tmp_path / "password").write_text("secret\nmore\n")
    found = facts("--url", served.url + "/", "--user", "root", "--password-file", str(tmp_path / "password"))
    assert found["serverdir"] == str(served.directory)
    (tmp_path / "password").write_text("wrong\n")
    result = run_command("status", "--url", served.url, "--user", "root", "--password-file", str(tmp_path / "password"))
    assert result.returncode == 1 and "does not accept the password of root" in result.stderr


class Other(http.server.BaseHTTPRequestHandler):
    """A server that answers every request in one way."""
    answer = 200, b""

    def do_GET(self):
        code, body = self.answer
        self.send_response(404 if code == 200 and "health" in self.path else code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def other():
    """A function: the URL of a server that answers so."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def answering(code, body):
        Other.answer = code, body if isinstance(body, bytes) else json.dumps(body).encode()
        return "http://127.0.0.1:%d" % server.server_port

    yield answering
    server.shutdown()
    server.server_close()


def test_a_real_devpi_is_asked(other):
    """It names no level, no messages, and has no page of its health."""
    url = other(200, {"type": "status", "result": {
        "serverdir": "/x", "uuid": "00", "versioninfo": {"devpi-server": "6.20.3"}, "serial": 7, "role": "MASTER",
        "last-commit-timestamp": 1764000000.5, "metrics": [["devpi_server_storage_cache_hits", "counter", 4]]}})
    assert facts("--url", url)["ready"] is None
    text = status("--url", url)
    assert_fits(text)
    assert "devpi-server 6.20.3" in text and "None" not in text
    assert plugin("--url", url)[:2] == (0, "OK")


@pytest.mark.parametrize("code, body, expected", [
    (200, b"<html>", 3), (404, {"message": "no"}, 3), (200, {"result": []}, 3), (200, {"result": {"serial": None}}, 3),
    (200, [], 3), (302, b"", 3), (200, b"[" * 100000, 3), (503, {"message": "busy | now"}, 2), (502, b"bad gateway", 2)])
def test_what_is_no_status(other, code, body, expected):
    url = other(code, body)
    assert plugin("--url", url)[0] == expected
    with pytest.raises(devpi_lite.FatalError, match="^http://127.0.0.1:"):
        devpi_lite.facts_of_server(urllib.parse.urlsplit(url), None)


def test_odd_values_of_another_server(other):
    url = other(200, {"result": {
        "serial": 3, "versioninfo": [], "metrics": [1, ["x"], ["devpi_lite_outbox_waiting", "gauge", 2]], "status": {"a": 1},
        "messages": ["x\x1b[2J", 5, None], "last-commit-timestamp": "now", "trash": 4, "serverdir": "x"}})
    text = status("--url", url)
    assert_fits(text)
    assert "\x1b" not in text
    assert plugin("--url", url)[:2] == (3, "UNKNOWN")


# -- for monitoring


def test_the_line_for_monitoring(served):
    for place in (("--serverdir", str(served.directory)), ("--url", served.url)):
        code, word, figures = plugin(*place)
        assert (code, word) == (0, "OK")
        assert figures["serial"] == "%dc" % served.get("/+status", headers={"Accept": "application/json"}).result["serial"]
        assert figures["outbox_dead"] == "0;0" and figures["search_seconds"].endswith(";300;3600")
        assert figures["free"].endswith("B;1073741824:;104857600:")
        assert ("response" in figures) == (place[0] == "--url")


def test_a_warning_and_a_stopped_server(served, tmp_path):
    copy = changed(served, tmp_path, "INSERT INTO search_queue VALUES (1, 'x', %f)" % (time.time() - 600))
    assert facts("--serverdir", copy)["status"] == "warn"
    assert plugin("--serverdir", copy)[:2] == (2, "CRITICAL")
    with devpi_lite.take_lock(copy):
        assert plugin("--serverdir", copy)[:2] == (1, "WARNING")


def test_nobody_answers():
    assert plugin("--url", "http://127.0.0.1:1")[:2] == (2, "CRITICAL")
    result = run_command("status", "--url", "http://127.0.0.1:1")
    assert result.returncode == 1 and "does not answer" in result.stderr


@pytest.mark.parametrize("words", [
    ["--bla"], ["word"], ["--url", "nonsense"], ["--url", "ftp://x"], ["--url", "http://x:y@z"], ["--url", "http://x:99999"],
    ["--user", "x"], ["--password-file", "x"], ["--json"], ["--url", "http://127.0.0.1:1", "--password-file", "x"],
    ["-c", "/nowhere"], ["--url", "http://127.0.0.1:1", "--user", "x"]])
def test_wrong_usage_is_unknown(words):
    assert plugin(*words)[:2] == (3, "UNKNOWN")
    if words[0] in ("--bla", "--user", "-c"):
        result = run_command("status", *words)
        assert result.returncode == (4 if words[0] == "-c" else 2) and result.stdout == ""


def test_the_password_is_in_no_line(other, tmp_path):
    (tmp_path / "password").write_text("hush\n")
    url = other(503, {"message": "no"})
    result = run_command("status", "--url", url, "--user", "root", "--password-file", str(tmp_path / "password"))
    assert "hush" not in result.stderr + result.stdout
    assert base64.b64encode(b"root:hush").decode() not in result.stderr


# -- what it is made of


def test_many_files_are_counted_in_a_moment(served, tmp_path):
    """60,000 files, in one pass over their table: some 0.05 s."""
    copy = changed(served, tmp_path, "INSERT INTO files (index_id, project_id, release_id, version, filename, path, hash_spec, sha256, size, "
                   "uploaded) WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 60000) "
                   "SELECT index_id, project_id, release_id, version, i, i, '', printf('%064x', i), 10, uploaded FROM n, files "
                   "WHERE files.id = (SELECT min(id) FROM files)")
    began = time.monotonic()
    found = devpi_lite.facts_of_directory(copy)
    assert time.monotonic() - began < 2
    assert found["files"]["stages"]["files"] == 60004


@pytest.mark.parametrize("seconds, text", [
    (0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (172800, "2 days"), (9e6, "104 days")])
def test_ages(seconds, text):
    assert devpi_lite.age_text(seconds) == text


# -- devpi 7's words


def test_the_part_in_replication(tmp_path):
    """By the directory, where a server may run or not, and by the server itself."""
    primary = Server(tmp_path / "p", "--role", "primary").start()
    replica = Server(tmp_path / "r", "--primary-url", primary.url, "--secretfile",
                     primary.directory / ".secret", root_password=None).start()
    try:
        primary.add_user("ann")
        eventually(lambda: replica.get("/ann").status == 200)
        place, url = ("--serverdir", str(replica.directory)), ("--url", replica.url)
        found = facts(*place)
        assert (found["role"], found["term"], found["wanted"]) == (
            "REPLICA", 1, {"files": 0, "bytes": 0})
        assert found["primary-url"] == primary.url
        metrics = {name for name, _, _ in facts(*url)["metrics"]}
        assert {name for name, _, _ in found["metrics"]} <= metrics
        for where in (place, url):
            text = " ".join(status(*where).split())
            assert "role replica of %s, term 1" % primary.url in text
            assert "0 changes behind, 0 files to fetch" in text
            figures = plugin(*where)[2]
            assert (figures["lag"], figures["wanted"]) == ("0", "0")
        assert "primary, term 1, followed by 1 replica" in status("--url", primary.url)

        replica.stop()
        with contextlib.closing(sqlite3.connect(str(replica.directory / "devpi_lite.db"))) as db:
            db.execute("UPDATE node SET value = value - 400 WHERE key = 'heard'")
            db.execute("INSERT OR REPLACE INTO node SELECT 'primary_serial', max(serial) + 7 "
                       "FROM changelog")
            db.execute("INSERT INTO wanted (sha256, size, is_docs, serial, since, error) "
                       "VALUES ('00', 5, 0, 1, 0, 'no')")
            db.commit()
        found = facts(*place)
        assert found["status"] == "fatal" and found["wanted"] == {"files": 1, "bytes": 5}
        assert "no response of the primary for 40" in str(found["messages"])
        assert "files that can't be fetched: 1" in str(found["messages"])
        assert "7 changes behind, 1 file to fetch" in " ".join(status(*place).split())

        primary.stop()
        with contextlib.closing(sqlite3.connect(str(primary.directory / "devpi_lite.db"))) as db:
            db.execute("INSERT INTO node VALUES ('fenced', 'another one was promoted')")
            db.commit()
        found = facts("--serverdir", str(primary.directory))
        assert (found["status"], found["fenced"]) == ("fatal", "another one was promoted")
        assert found["messages"] == ["this primary takes no changes", "another one was promoted"]
        assert plugin("--serverdir", str(primary.directory))[:2] == (2, "CRITICAL")
    finally:
        for server in (replica, primary):
            if server.running:
                server.kill()


def test_the_role_in_the_words_of_devpi_7(served):
    for query, role in (("", "MASTER"), ("?v=2", "PRIMARY"), ("?v=1", "MASTER")):
        assert served.get("/+status" + query, headers={"Accept": "application/json"}).result["role"] == role


def test_the_delay_of_mirrors_has_both_names(tmp_path):
    words = run_command("serve", "--help").stdout
    assert "--mirror-cache-expiry" in words and "--remote-refresh-delay" in words
    (tmp_path / "c.ini").write_text("[devpi-server]\nremote-refresh-delay = soon\n")
    for said, options in ((["--remote-refresh-delay", "soon"], {}), ([], {"env": {"DEVPISERVER_REMOTE_REFRESH_DELAY": "soon"}}),
                          (["-c", str(tmp_path / "c.ini")], {})):
        result = run_command("serve", *said, **options)
        assert result.returncode in (2, 4) and "'soon'" in result.stderr, result


def test_options_that_devpi_7_no_longer_has_are_accepted(make_server):
    server = make_server("--enable-core-metadata", "--keyfs-cache-size", "5", "--profile-requests", "0", "--remote-refresh-delay", "60")
    assert server.get("/+api").status == 200
