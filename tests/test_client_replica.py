"""The client at a primary and its replica: what it has changed through one it finds through the other."""

import json
import time

import pytest

from client import POSIX, Client, Gate
from harness import serial, wheel
from replicas import HeldPair, in_sync, status

SERIALS = "devpi_lite_serials.json"
# in place of pip: prints the names on the page of the project
PIP = """if True:
    import os, re, sys, urllib.request
    if sys.argv[1:] == ["--version"]:
        print("pip 24.0 from x (python 3.11)")
        sys.exit()
    url = os.environ["PIP_INDEX_URL"] + sys.argv[-1] + "/"
    try:
        print("pip sees", re.findall("[^/>]+[.]whl", urllib.request.urlopen(url).read().decode())[:1])
    except OSError as error:
        print("pip sees", error)"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = HeldPair(tmp_path_factory.mktemp("clients"))
    yield pair
    pair.end()


@pytest.fixture
def devpi(tmp_path, pair):
    """The client of ann, who has logged in at both servers, and works on the replica's index."""
    devpi = Client(tmp_path / "home").sign_in(pair.primary, "ann", "ann/dev")
    tokens = devpi.state("auth.json")["auth"]
    pair.replica.tokens.update(pair.primary.tokens)
    devpi.sign_in(pair.replica, "ann", "ann/dev")
    devpi.write_state("auth.json", {"auth": dict(devpi.state("auth.json")["auth"], **tokens)})
    return devpi


def upload(devpi, server, archive):
    return devpi("upload", "--index", server.url + "/ann/dev", devpi.save(archive))


def uuid(pair):
    return status(pair.primary)["uuid"]


def test_what_went_to_the_primary_is_listed_and_got_through_the_replica(pair, devpi):
    archive = wheel("fresh", "1.0")
    with pair.mark("hold"):
        upload(devpi, pair.primary, archive)
        entry = devpi.state(SERIALS)[uuid(pair)]
        assert entry["serial"] == serial(pair.primary) and abs(entry["time"] - time.time()) < 60
        assert pair.replica.get("/ann/dev/fresh").status == 404
        assert archive.filename in devpi("list", "fresh")
        assert "1.0" in devpi("getjson", "/ann/dev/fresh").json()["result"]
        assert set(devpi.state(SERIALS)[uuid(pair)]["servers"]) == {pair.primary.url, pair.replica.url}
        # of another who has changed nothing, a replica is asked for what it has
        other = Client(devpi.home / "other").sign_in(pair.replica, None, "ann/dev")
        assert archive.filename not in other("list", "fresh", expect=None)
        assert not (other.directory / SERIALS).exists()
    in_sync(pair.primary, pair.replica)
    if POSIX:
        assert devpi.mode(SERIALS) == 0o600
    assert "pw" not in (devpi.directory / SERIALS).read_text()


@pytest.mark.skipif(not POSIX, reason="its pip is an executable script")
def test_pip_is_started_when_the_replica_has_what_was_uploaded(pair, devpi):
    archive = wheel("install-me", "1.0")
    devpi.write("venv/pyvenv.cfg", "home = /usr/bin\n")
    devpi.add_command("pip", PIP, "venv/bin")
    with pair.mark("hold"):
        upload(devpi, pair.primary, archive)
        printed = devpi("install", "--venv", devpi.home / "venv", "install-me")
        assert "pip sees HTTP Error 404" in printed
        assert "is a replica that lacks the last 1 changes" in printed + printed.errors
    printed = devpi("install", "--venv", devpi.home / "venv", "install-me")
    assert "pip sees ['install" in printed and "lacks" not in printed + printed.errors


def test_one_command_that_changes_and_reads_sees_its_change(pair, devpi):
    """Through the replica alone, whose changes come back late."""
    gate = Gate(pair.replica)
    try:
        devpi("use", gate.url + "/ann/dev")
        devpi.write_state("auth.json", {"auth": {gate.url + "/": [["ann", pair.primary.tokens["ann"]]],
                                                 pair.replica.url + "/": [["ann", pair.primary.tokens["ann"]]]}})
        gate.clear()
        devpi("index", "-c", "made", "volatile=True")
        needed = str(serial(pair.primary))
        assert not any("x-devpi-min-serial" in each.headers for each in gate.passed if each.method == "PUT")
        devpi("list")
        (first, *_) = [each for each in gate.passed[1:] if each.method == "GET"][-1:]
        assert first.headers.get("x-devpi-min-serial") == needed
    finally:
        gate.close()


def test_a_serial_is_dropped_after_an_hour_and_sent_to_its_own_servers_alone(pair, devpi, site):
    gate, elsewhere = Gate(pair.replica), Gate(site)
    try:
        index = gate.url + "/ann/dev"
        entry = {"serial": 1, "time": int(time.time()), "servers": [gate.url]}
        for changes, is_sent in (({}, True), ({"time": int(time.time()) - 3700}, False), ({"time": int(time.time()) + 7200}, False),
                                 ({"serial": "1"}, False), ({"servers": None}, False), ({"serial": -1}, False)):
            devpi.write_state(SERIALS, {uuid(pair): dict(entry, **changes)})
            gate.clear()
            devpi("list", "--index", index)
            assert {each.headers.get("x-devpi-min-serial") for each in gate.passed} == {"1" if is_sent else None}, changes
        devpi.write_state(SERIALS, {uuid(pair): dict(entry, serial=7)})
        elsewhere.clear()
        devpi("list", "--index", elsewhere.url + "/root/pypi")
        assert {each.headers.get("x-devpi-min-serial") for each in elsewhere.passed} == {None}
    finally:
        gate.close()
        elsewhere.close()


def test_a_serial_that_the_primary_does_not_have_any_more_is_forgotten(pair, devpi):
    """It was restored from an older backup."""
    devpi.write_state(SERIALS, {uuid(pair): {"serial": 10 ** 9, "time": int(time.time()), "servers": [pair.replica.url]}})
    devpi("list")
    assert devpi.state(SERIALS) == {}
    devpi.write_state(SERIALS, {uuid(pair): {"serial": 10 ** 9, "time": int(time.time()), "servers": []}})
    devpi("list")
    assert devpi.state(SERIALS) == {}


@pytest.mark.parametrize("text", ["{", "[1]", "null", '{"%s": 5}', '{"%s": {"serial": 1}}', "\0"])
def test_a_broken_file_of_serials_hinders_nothing(pair, devpi, text):
    (devpi.directory / SERIALS).write_text(text.replace("%s", uuid(pair)))
    devpi("list")
    upload(devpi, pair.primary, wheel("broken%d" % len(text), "1.0"))
    assert devpi.state(SERIALS)[uuid(pair)]["serial"] == serial(pair.primary)


def test_a_file_of_serials_that_can_not_be_written_hinders_nothing(pair, devpi):
    (devpi.directory / SERIALS).mkdir()
    upload(devpi, pair.primary, wheel("rigid", "1.0"))
    assert "rigid-1.0" in devpi("list", "rigid")


def test_serials_of_two_processes_are_merged(tmp_path):
    from client import imported
    client = imported()
    path = str(tmp_path / SERIALS)

    class Answer:
        method, status = "POST", 200

        def __init__(self, primary, number, server="http://a:1"):
            self.url = server + "/x/y/"
            self.headers = {"X-DEVPI-PRIMARY-UUID": primary * 32, "X-DEVPI-SERIAL": str(number)}

    one, other = (client.Serials(client.StateFile(path)) for _ in range(2))
    one.note(Answer("a", 5), {})
    other.note(Answer("a", 7, "http://b:1"), {})
    other.note(Answer("b", 3, "http://c:1"), {})
    for each in (other, one):
        each.save()
    found = json.loads((tmp_path / SERIALS).read_text())
    assert {primary[0]: (entry["serial"], entry["servers"]) for primary, entry in found.items()} == {
        "a": (7, ["http://a:1", "http://b:1"]), "b": (3, ["http://c:1"])}
    third = client.Serials(client.StateFile(path))
    assert third.headers("http://a:1/q?x#y") == {"X-DEVPI-MIN-SERIAL": "7"}
    assert third.headers("http://d:1/") == {}
    for primary, number in (("a", "9" * 19), ("a", "x"), ("A", "9"), ("a\n", "9")):
        third.note(Answer(primary, number), {})
    assert third.headers("http://a:1/") == {"X-DEVPI-MIN-SERIAL": "7"}
