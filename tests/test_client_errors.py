"""What can go wrong on the way, and what the person at the command line is told: one line or two, and never a traceback."""

import json
import re
import signal
import subprocess
import sys
import tarfile

import pytest

from client import Client, POSIX, end
from harness import documentation, eventually, sdist, wheel
from misbehaving import keep_port
from receiver import Receiver

posix_only = pytest.mark.skipif(not POSIX, reason="needs POSIX signals and limits")


@pytest.fixture
def devpi(tmp_path, site, index, gate):
    """The client with alice logged in on an index of her own, through the gate."""
    return Client(tmp_path / "home").sign_in(site, "alice", index, url=gate.url)


def nowhere():
    """The URL of a port that refuses connections."""
    return "http://127.0.0.1:%d" % keep_port(0).getsockname()[1]


# -- the server is not there, or is none


def test_a_server_that_is_gone(devpi, nobody, site, index):
    url = nowhere()
    lines = nobody("use", url, expect=1).lines
    assert lines[0] == "could not connect to '%s/+api':" % url and len(lines) <= 3
    devpi.sign_in(site, "alice", index, url=url)
    archive = devpi.save(wheel("gone", "1.0"))
    for words in (["list"], ["upload", archive], ["login", "alice", "--password", "x"]):
        printed = devpi(*words, expect=1)
        assert "could not connect to '%s/" % url in printed and len(printed.lines) < 8, words
    assert devpi.state()["index"] == url + "/" + index


def test_a_name_that_leads_nowhere(nobody):
    nobody.environment["RES_OPTIONS"] = "timeout:1 attempts:1"      # where the name servers are out of reach
    assert "could not connect to 'http://no.such.host.invalid/+api':" in nobody("use", "http://no.such.host.invalid/", expect=1)
    for url in ("http://", "http://127.0.0.1:notaport/", "ftp://127.0.0.1/x", "http://[::1/"):
        assert nobody("use", url, expect=1).strip(), url
    assert nobody.state() == {}


@pytest.mark.parametrize("status, body, content_type", [
    (200, b"<html>welcome to our router", "text/html"), (200, b"[1, 2]", "application/json"), (404, b"", "text/plain"),
    (200, b'{"type": "apiconfig"', "application/json"), (200, b'{"type": "apiconfig", "result": {}}', "application/json"),
    (200, b'{"type": "apiconfig", "result": {"login": 7}}', "application/json")],
    ids=["html", "list", "404", "cut", "empty", "types"])
def test_a_web_server_that_is_no_index(nobody, status, body, content_type):
    other = Receiver().start()
    try:
        other.answer(status, body, {"Content-Type": content_type, "X-DEVPI-API-VERSION": "2"})
        printed = nobody("use", other.url + "/alice/dev", expect=1)
        assert other.url in printed and len(printed.lines) < 6 and nobody.state() == {}
    finally:
        other.stop()


@pytest.mark.parametrize("fault, arguments", [
    ("answer", {"status": 503}), ("answer", {"status": 502}), ("reset", {}), ("drop", {}),
    ("truncate", {"after": 300})], ids=["503", "502", "reset", "drop", "truncate"])
def test_a_short_trouble_is_ridden_out_when_reading(devpi, site, index, gate, fault, arguments):
    site.upload(index, wheel("steady", "1.0"))
    gate.fault("GET /" + index, fault, times=2, **arguments)
    assert devpi("list") == "steady\n" and gate.count("GET /" + index) == 3


def test_a_long_trouble_is_told(devpi, index, gate):
    gate.fault("GET /" + index, "answer", status=503, body=b"try later")
    printed = devpi("list", expect=1)
    assert {"GET %s/%s" % (gate.url, index), "503 Service Unavailable"} <= set(printed.lines)
    assert gate.count("GET /" + index) == 3
    gate.clear()
    gate.fault("GET /" + index, "hang")
    assert gate.url in devpi("list", "--timeout", "0.5", expect=1)
    gate.clear()
    gate.fault("DELETE ", "reset")
    assert devpi("user", "-y", "--delete", "somebody", expect=1) and gate.count("DELETE") == 1, "only reading is done again"


# -- who one is


def test_a_wrong_password_and_an_expired_login(devpi, site, index, gate):
    before = (devpi.directory / "auth.json").read_bytes()
    assert "401 Unauthorized: user 'alice' could not be authenticated" in \
        devpi("login", "alice", "--password", "wrong", expect=1).lines
    assert (devpi.directory / "auth.json").read_bytes() == before
    devpi.write_state("auth.json", {"auth": {gate.url + "/": [["alice", "expired"]]}})
    path = devpi.save(wheel("late", "1.0"))
    printed = devpi("upload", path, expect=1)
    assert any(line.startswith("401 FAIL file_upload of ") for line in printed.lines) and "devpi login alice" in printed
    assert "devpi login" in devpi("index", "volatile=False", expect=1)
    assert site.get("/" + index).result["projects"] == []


def test_a_password_that_is_wanted_where_nobody_can_type(devpi):
    assert "no password available for user 'alice'" in devpi("login", "alice", expect=1)
    assert devpi("login", "alice", "--password-file", "nope", expect=1).strip()


# -- uploads


@pytest.mark.parametrize("early", [False, True])
def test_an_upload_that_is_too_large_for_a_proxy(devpi, index, gate, early):
    """Said while the client is still sending, perhaps: it is told what the answer was."""
    gate.fault("POST /" + index, "answer", status=413, body=b"<html>too large", early=early)
    printed = devpi("upload", devpi.save(wheel("large", "1.0", size=3_000_000)), expect=1)
    assert "413 FAIL file_upload of large-1.0-py3-none-any.whl to %s/%s/" % (gate.url, index) in printed.lines
    assert "--max-request-body-size" in printed and gate.count("POST") == 1
    assert "too large" in printed.lines, "what a proxy's page says"


def test_a_reason_is_shown_and_what_follows_is_not_sent(devpi, index, gate):
    gate.fault("POST /" + index, "answer", times=1, status=400, body=json.dumps({"message": "that is no name"}).encode(),
               headers={"Content-Type": "application/json"})
    printed = devpi("upload", devpi.save(wheel("a", "1.0")), devpi.save(wheel("b", "1.0")), expect=1)
    assert printed.lines[0] == "400 FAIL file_upload of a-1.0-py3-none-any.whl to %s/%s/" % (gate.url, index)
    assert "that is no name" in printed.lines
    assert gate.count("POST") == 1


def test_an_upload_that_never_gets_through(devpi, site, index, gate):
    gate.fault("POST /" + index, "cut", after=1000)
    printed = devpi("upload", devpi.save(wheel("cut", "1.0", size=100000)), expect=1)
    assert "cut-1.0-py3-none-any.whl" in printed and 2 <= gate.count("POST") <= 6
    assert site.get("/" + index).result["projects"] == []


def test_an_answer_that_breaks_off_after_the_upload(devpi, site, index, gate):
    """The file may be there: on a volatile index, sending it again does no harm."""
    archive = wheel("unsure", "1.0")
    gate.fault("POST /" + index, "truncate", times=1, after=10)
    devpi("upload", devpi.save(archive))
    assert site.fetch(index, archive.filename, "unsure") == archive.content


def test_a_file_that_can_not_be_read(devpi, index, gate):
    directory = devpi.home / "directory-1.0.whl"
    directory.mkdir()
    assert "directory-1.0.whl" in devpi("upload", directory, expect=1)
    assert "path does not exist: " in devpi("upload", devpi.home / "nope-1.0.whl", expect=1)
    assert gate.count("POST") == 0


# -- this machine


LIMITED = """if True:
    import os, resource, sys
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
    os.execv(sys.argv[2], sys.argv[2:])"""


@posix_only
def test_a_disk_that_is_full_leaves_the_old_state(devpi, site, index, gate):
    """No file may grow past a few bytes: that fails where a full disk does."""
    before = {name: (devpi.directory / name).read_bytes() for name in ("current.json", "auth.json")}
    limited = Client(devpi.home)
    limited.environment["PYTHONDONTWRITEBYTECODE"] = "1"        # some Pythons take a file that was cut for a whole one
    limited.command = [sys.executable, "-IS", "-c", LIMITED, "40"] + devpi.command
    for words in (["use", gate.url], ["login", "alice", "--password", "pw-of-alice"]):
        printed = limited(*words, expect=1)
        assert str(devpi.directory) in printed and len(printed.lines) < 6, printed
    assert {name: (devpi.directory / name).read_bytes() for name in before} == before
    assert sorted(path.name for path in devpi.directory.iterdir()) == sorted(before), "nothing half-written is left"
    archive = sdist("roomy", "1.0", size=100000, extra_members={"tox.ini": b"[tox]\n"})
    site.upload(index, archive)
    page = documentation("roomy", "1.0", "x" * 200000)
    tar = devpi.home / "roomy-1.0.doc.tgz"
    with tarfile.open(str(tar), "w:gz") as packed:
        packed.add(str(devpi.save(page)), "index.html")
    for size, words, named in [
            (20000, ["test", "roomy"], archive.filename), (len(archive.content) - 1, ["test", "roomy"], archive.filename),
            (100, ["upload", tar], "index.html")]:
        limited.command[4] = str(size)
        printed = limited(*words, expect=1, TMPDIR=devpi.write("tmp/keep", "").parent, PATH=devpi.add_command("tox", ""))
        assert named + " could not be written: " in printed and len(printed.lines) < 4, printed
        assert [path.name for path in (devpi.home / "tmp").iterdir()] == ["keep"]


def test_a_client_directory_that_can_not_be_one(nobody, site):
    nobody.write(".devpi", "a file")
    printed = nobody("use", site.url, expect=1)
    assert str(nobody.home / ".devpi") in printed
    nobody.write("other/current.json", "{ this is no JSON")
    printed = nobody("use", "--clientdir", "other", expect=1)
    assert "other/current.json" in printed and "devpi use" in printed


@posix_only
def test_a_reader_that_goes_away_ends_it_quietly(devpi, site, index):
    """As `devpi list | head -1` does."""
    for version in range(3):
        site.upload(index, wheel("piped", "%d.0" % version))
    for words in (["list", "--all", "piped"], ["getjson", "/" + index], ["--help"]):
        process = devpi.start(*words)
        process.stdout.close()
        errors = process.stderr.read()
        process.stderr.close()
        assert (errors, process.wait(60) in (0, 1, 141, -signal.SIGPIPE)) == (b"", True), words


@posix_only
def test_ctrl_c_ends_it_quietly(devpi, site, index, gate):
    """While an upload is on its way, and at a question."""
    gate.fault("POST /" + index, "hang")
    process = devpi.start("upload", devpi.save(wheel("endless", "1.0", size=100000)))
    try:
        eventually(lambda: gate.count("POST"), seconds=60)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == 130 and b"Traceback" not in printed + errors
    assert site.get("/" + index).result["projects"] == []
    with devpi.terminal("user", "--delete", "alice") as terminal:
        terminal.expect("(yes/no)?")
        terminal.type("\x03")
        assert terminal.wait() == 130
    assert "Traceback" not in terminal.shown and site.get("/alice").status == 200


@posix_only
def test_what_is_stopped_leaves_nothing_behind(devpi, site, index, gate):
    """SIGTERM, as a job that is cancelled gets it, while a download hangs."""
    site.upload(index, sdist("stopped", "1.0", extra_members={"tox.ini": b"[tox]\n"}))
    gate.fault("GET /%s/+f/" % index, "hang")
    temporary = devpi.write("tmp/keep", "").parent
    process = devpi.start("test", "stopped", TMPDIR=temporary, PATH=devpi.add_command("tox", ""))
    try:
        eventually(lambda: gate.count("GET /%s/+f/" % index), seconds=60)
        process.send_signal(signal.SIGTERM)
        printed, errors = process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode not in (0, None) and b"Traceback" not in printed + errors
    assert [path.name for path in temporary.iterdir()] == ["keep"]


def test_a_traceback_is_for_those_who_ask(devpi, site):
    """With --debug an error of any kind says where it came from, or what the server's whole answer was."""
    plain = devpi("list", "nosuch", expect=1)
    shown = subprocess.run(devpi.command + ["--debug", "list", "nosuch"], env=devpi.environment, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, cwd=str(devpi.home)).stdout.decode()
    assert len(shown) > len(plain) and "[debug]" in shown and "404 Not Found: no project 'nosuch'" in shown
    assert site.tokens["alice"] not in shown and not re.search("(?i)x-devpi-auth: *[a-z0-9+/]{12}", shown)
