"""Passwords that come from devpi, and go back to it: argon2 in pure Python and by libraries, salted SHA-256."""

import contextlib
import hashlib
import json
import subprocess
import sys

import pytest

import devpi_lite as d

from harness import PROGRAM, audited, eventually, patched, run_command

SHA256 = "5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8"


def argon2(kind="argon2id", version=19, memory=8, passes=1, lanes=1, salt=b"saltsalt", size=32, password=b"right"):
    shape = d.Argon2(kind, version, memory, passes, lanes, salt, bytes(size))
    return shape._replace(digest=d.compute_argon2(shape, password)).text


def row(pwhash, kept=None):
    return {"pwhash": pwhash, "attributes": {d.FROM_DEVPI: {"pwhash": kept}} if kept else {"title": "x"}}


# -- argon2 in pure Python


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("kind, digest", [
    ("argon2i", "c814d9d1dc7f37aa13f0d77f2494bda1c8de6b016dd388d29952a4c4672b6ce8"),
    ("argon2id", "0d640df58d78766c08c037a34a8b53c9d01ef0452d75b65eb52520e96b01e659")])
def test_the_vectors_of_rfc_9106(kind, digest, processes):
    shape = d.Argon2(kind, 19, 32, 3, 4, b"\2" * 16, bytes(32))
    assert d.compute_argon2(shape, b"\1" * 32, b"\3" * 8, b"\4" * 12, processes).hex() == digest


def test_where_processes_are_not_forked_one_does_it_all(monkeypatch):
    monkeypatch.delattr(d.os, "fork", raising=False)
    shape = d.argon2_of(argon2(memory=32, lanes=4))
    assert d.compute_argon2(shape, b"right", processes=4) == shape.digest


# -- what a dump says, and what a dump gets


@pytest.mark.parametrize("text", [
    argon2(), argon2("argon2i", lanes=2, memory=16), argon2(version=16), argon2(salt=b"s" * 16, size=16)])
def test_an_argon2_hash_is_taken_as_it_is(text):
    assert d.imported_hash(text) == text == d.imported_hash(text, "ignored")
    assert d.argon2_of(text).text == text


def test_an_argon2_hash_of_old_names_no_version():
    assert d.argon2_of(argon2(version=16).replace("$v=16", "")) == d.argon2_of(argon2(version=16))


def test_a_salted_sha256_is_taken_with_its_salt():
    assert d.imported_hash(SHA256, "c2FsdA==") == "devpi_sha256:c2FsdA==:" + SHA256
    assert d.imported_hash(SHA256.upper(), "a:b") == "devpi_sha256:a:b:" + SHA256


def test_who_has_no_hash_cannot_log_in():
    assert d.imported_hash(None) is d.imported_hash("", "salt") is d.imported_hash(None, None) is None


@pytest.mark.parametrize("pwhash, pwsalt", [
    ("right", None), ("right", "salt"), (SHA256, None), (SHA256, ""), (SHA256, "a b"), (SHA256, "s" * 101),
    (SHA256, "\u00e4"), (SHA256[1:], "salt"), (5, None), (SHA256, 5), ([], None), (True, None), ("\ud800", None),
    ("scrypt:n=16,r=8,p=1:00:00", None), ("devpi_sha256:salt:" + SHA256, None), ("$2b$12$abc", None),
    *[(argon2().replace(*pair), None) for pair in [
        ("m=8", "m=7"), ("m=8", "m=1048577"), ("m=8", "m=9999999999999"), ("m=8", "m=08"), ("m=8", "m=-8"),
        ("m=8", "m=\u0668"), ("t=1", "t=0"), ("t=1", "t=524289"), ("p=1", "p=2"), ("p=1", "p=0"), ("v=19", "v=20"),
        ("argon2id", "argon2d"), ("argon2id", "argon2"), ("$c2FsdHNhbHQ", "$c2FsdHNhbHR=="), ("$c2FsdHNhbHQ", "$c2Fs"),
        ("$c2FsdHNhbHQ", "$"), ("$c2FsdHNhbHQ", "$" + "c2Fs" * 22), ("$c2FsdHNhbHQ", "$c2Fsd"), ("$argon2id", " $argon2id")]],
    (argon2() + "A" * 86, None), (argon2() + "\n", None), (argon2(memory=512, lanes=64).replace("p=64", "p=65"), None)])
def test_a_hash_that_no_login_could_check_is_refused(pwhash, pwsalt):
    with pytest.raises(ValueError, match="pw"):
        d.imported_hash(pwhash, pwsalt)


@pytest.mark.parametrize("text", [argon2(), argon2("argon2i"), argon2(version=16)])
def test_devpi_gets_the_argon2_hash_that_is_known(text):
    assert d.hash_for_devpi(row(text)) == (text, True)
    assert d.hash_for_devpi(row("scrypt:n=16,r=8,p=1:00:00", text)) == (text, True)


@pytest.mark.parametrize("value, survives", [
    (row("scrypt:n=16,r=8,p=1:00:00"), False), (row("devpi_sha256:c2FsdA==:" + SHA256), False),
    (row("scrypt:n=16,r=8,p=1:00:00", SHA256), False), (row("foreign"), False), (row(None), True)])
def test_devpi_gets_the_hash_of_a_random_secret_where_none_is_known(value, survives):
    d._hash_of_a_secret.cache_clear()
    text, told = d.hash_for_devpi(value)
    assert told == survives and text.startswith("$argon2id$v=19$m=8,t=1,p=1$") and d.argon2_of(text)
    assert not any(argon2(salt=d.argon2_of(text).salt, password=word) == text for word in (b"", b"right", text.encode()))


@pytest.mark.parametrize("stored", [
    "", ":", "::", "a:b:c", "scrypt::", "scrypt:n=15,r=8,p=1:" + "00" * 16 + ":" + "00" * 32, "scrypt:n=0,r=0,p=0:" + "00" * 16
    + ":" + "00" * 32, "scrypt:n=9999999,r=999,p=99:" + "00" * 16 + ":" + "00" * 32, "pbkdf2_sha256:0:" + "00" * 16 + ":"
    + "00" * 32, "devpi_sha256::", "devpi_sha256:salt:" + SHA256, "$argon2id$", "$argon2d$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$"
    + "A" * 43, "$2b$12$abc", "right", "\ud800", "{SHA}x", argon2()[:-1], argon2() + "A", argon2() + " ", "\x00"])
def test_what_is_no_hash_of_a_password_fits_none(stored):
    assert not any(d.check_password(stored, password) for password in ("right", "", stored, "\x00", "\ud800"))


@pytest.mark.parametrize("costs, fits", [
    ("m=65536,t=3,p=4", True), ("m=102400,t=2,p=8", True), ("m=262144,t=4,p=8", True), ("m=262145,t=1,p=1", False),
    ("m=1048576,t=1,p=4", False), ("m=262144,t=5,p=8", False), ("m=512,t=8192,p=64", False), ("m=8,t=65,p=1", False)])
def test_a_hash_may_cost_what_those_of_devpi_do_and_not_much_more(costs, fits):
    text = argon2().replace("m=8,t=1,p=1", costs)
    assert (d.argon2_of(text) is not None) == d.is_password_hash(text) == fits
    if not fits:        # else a login with any password would take a minute, or a GB
        with pytest.raises(ValueError, match="costs"):
            d.imported_hash(text)
        assert not d.check_password(text, "right")


# -- libraries


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(d, "_found", [None])


@pytest.fixture(params=["_libargon2", "_libsodium", "_libcrypto"])
def library(request, monkeypatch):
    """Each library that is here, in use."""
    monkeypatch.setattr(d, "_found", [])
    monkeypatch.setattr(d, "ARGON2_LIBRARIES", [getattr(d, request.param)])
    found = d.argon2_library()
    if found is None:
        pytest.skip("not here")
    assert "_" + found.name == request.param
    return found


@pytest.mark.parametrize("text", [
    argon2(), argon2("argon2i", memory=40, passes=3, lanes=4), argon2(salt=b"s" * 24, size=16), argon2(size=64),
    argon2(memory=67, lanes=8, passes=2), argon2("argon2i", version=16, passes=3), argon2(version=16, passes=2)])
def test_a_library_finds_what_pure_python_finds(library, text):
    assert d.check_password(text, "right") and not d.check_password(text, "Right") and not d.check_password(text, "")


@pytest.mark.parametrize("password", ["", "\x00", "a\x00b", "\u00e4\u20ac", "x" * 5000, "\ud800"])
def test_each_password_is_taken_whole(library, password):
    text = argon2(password=password.encode("utf-8", "surrogatepass"))
    assert d.check_password(text, password) and not d.check_password(text, password[:-1] + "y")


def test_a_new_password_gets_a_hash_for_devpi_too(library, monkeypatch):
    monkeypatch.setitem(d._SCRYPT, "n", 16)
    own, text = d.new_hashes("right")
    shape = d.argon2_of(text)
    assert (shape.kind, shape.version, shape.memory, shape.passes, shape.lanes) == ("argon2id", 19, 32, 3, library.lanes)
    assert (len(shape.salt), len(shape.digest)) == (16, 32) and d.check_password(own, "right")
    assert d.compute_argon2(shape, b"right") == shape.digest
    assert d.new_hashes("right").for_devpi != text


@pytest.mark.skipif(d.argon2_library() is None, reason="no library here")
def test_a_new_password_takes_what_devpi_takes():
    assert "$m=65536,t=3,p=" in d.new_hashes("right").for_devpi


class Strange:
    """What a library of another kind does: it lacks functions, refuses, or computes something else."""

    def __init__(self, code):
        self.code = code

    def __getattr__(self, name):
        if self.code is None:
            raise AttributeError(name)
        function = lambda *arguments: self.code         # noqa: E731
        setattr(self, name, function)
        return function


@pytest.mark.parametrize("code", [None, 0, 1, -1])
@pytest.mark.parametrize("name", ["_libargon2", "_libsodium", "_libcrypto"])
def test_a_library_of_another_kind_is_left_out(monkeypatch, name, code):
    monkeypatch.setattr(d, "_loaded", lambda *names: Strange(code))
    monkeypatch.setattr(d, "_found", [])
    monkeypatch.setattr(d, "ARGON2_LIBRARIES", [getattr(d, name)])
    assert d.argon2_library() is None
    assert d.check_password(argon2(), "right") and not d.check_password(argon2(), "wrong")


def test_a_library_without_these_functions_is_left_out(monkeypatch):
    ctypes = pytest.importorskip("ctypes")
    monkeypatch.setattr(d, "_loaded", lambda *names: ctypes.CDLL(None))
    for name in ("_libargon2", "_libsodium"):
        monkeypatch.setattr(d, "_found", [])
        monkeypatch.setattr(d, "ARGON2_LIBRARIES", [getattr(d, name)])
        assert d.argon2_library() is None


def test_without_ctypes_there_is_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "ctypes", None)
    monkeypatch.setattr(d, "_found", [])
    assert d.argon2_library() is None and d.check_password(argon2(), "right")


def test_without_memory_the_password_may_come_again(monkeypatch):
    def fail(*arguments):
        raise OSError(12, "no memory")
    monkeypatch.setattr(d, "_found", [d.Argon2Library("short", 4, (16, 19), fail, fail)])
    with pytest.raises(d.Busy):
        d.check_password(argon2(), "right")
    assert d.new_hashes("right").for_devpi is None


def test_without_a_library_no_hash_for_devpi_is_kept_unless_a_weak_one_may_be(no_library, monkeypatch):
    monkeypatch.setitem(d._SCRYPT, "n", 16)
    assert d.new_hashes("right").for_devpi is None
    text = d.new_hashes("right", may_be_weak=True).for_devpi
    assert text.startswith("$argon2id$v=19$m=32,t=1,p=1$") and d.check_password(text, "right")
    monkeypatch.setitem(d._SCRYPT, "n", 1 << 15)
    monkeypatch.setattr(d, "compute_in_child", lambda shape, password: b"\1" * 32)
    assert d.new_hashes("right", may_be_weak=True).for_devpi.startswith("$argon2id$v=19$m=4096,t=1,p=1$")


# -- in a child process


def test_a_child_process_computes_the_same():
    shape = d.argon2_of(argon2(lanes=2, memory=64))
    assert d.compute_in_child(shape, b"right") == shape.digest


@pytest.mark.skipif(not hasattr(d.os, "fork"), reason="no fork here")
def test_the_processes_of_a_hash_end_with_the_server():
    child = subprocess.Popen([sys.executable, str(PROGRAM), "_argon2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    text = argon2().replace("m=8,t=1,p=1", "m=65536,t=9,p=3")
    child.stdin.write(json.dumps({"hash": text, "password": "", "processes": 3, "cpu": 60}).encode() + b"\n")
    child.stdin.flush()
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.7)
    child.stdin.close()
    assert child.stdout.read() == b"" and child.wait(10) == 1       # the pipe is open as long as one of them lives
    child.stdout.close()


# -- logins


STORED = {"argon2id": argon2(), "argon2i": argon2("argon2i"), "old": argon2(version=16), "sha256": "devpi_sha256:c2FsdA==:"
          + hashlib.sha256(b"c2FsdA==right").hexdigest()}


def put_user(store, name, pwhash, kept=None):
    store.write(lambda change: change.put("user", (name,), {
        **row(pwhash, kept), "generation": "abc", "created": "2020-01-01T00:00:00Z", "modified": None}))


def stored(place, name):
    """The row of a user of a store, or of a server."""
    with contextlib.ExitStack() as stack:
        store = place if isinstance(place, d.Store) else stack.enter_context(
            contextlib.closing(d.Store(d.Settings(str(place.directory)))))
        with store.read() as db:
            account = d.Users(store).find(name)
            assert [account.name] == [found for found, in db.execute("SELECT name FROM users WHERE name = ?", (name,))]
            return account


@pytest.fixture
def people(shared_server):
    """A server with users whose passwords come from devpi."""
    with contextlib.closing(d.Store(d.Settings(str(shared_server.directory)))) as store:
        for name, pwhash in {**STORED, "foreign": "$2b$12$abc", "junk": "a:b:c", "costly": argon2().replace("m=8", "m=2000000"),
                             "own": "scrypt:n=9999999,r=999,p=99:" + "00" * 16 + ":" + "00" * 32, "nobody": None,
                             "changed": argon2(), "titled": argon2(), "reset": argon2()}.items():
            put_user(store, name, pwhash)
    return shared_server


@pytest.mark.parametrize("name", STORED)
def test_a_login_turns_a_hash_of_devpi_into_an_own_one(people, name):
    before, audit = stored(people, name), len(audited(people, target=name))
    assert people.post("/+login", {"user": name, "password": "wrong"}).status == 401
    assert people.get("/+api", user=name, password="Right").result["authstatus"] == ["noauth", "", []]
    assert stored(people, name) == before
    people.login(name, "right")
    after = stored(people, name)
    assert after.pwhash.startswith(("scrypt:", "pbkdf2")) and after.generation == before.generation
    assert (after.created, after.modified) == (before.created, None)
    kept = after.attributes.get(d.FROM_DEVPI, {})
    if name == "sha256":        # guessed in no time, and no devpi of today takes it
        assert "pwsalt" not in kept and "devpi_sha256" not in kept.get("pwhash", "")
    else:
        assert kept == {"pwhash": before.pwhash}
    assert people.get("/+api", user=name).result["authstatus"] == ["ok", name, []]      # the session goes on
    people.login(name, "right")
    assert people.post("/+login", {"user": name, "password": "wrong"}).status == 401
    assert stored(people, name) == after
    assert all(entry["action"] != "user.modify" for entry in audited(people, target=name)[audit:])
    assert "+devpi" not in people.get("/" + name).text


def test_basic_credentials_do_so_too(shared_server, people):
    assert people.get("/+api", user="argon2id", password="right").result["authstatus"] == ["ok", "argon2id", []]
    assert d.is_own_hash(stored(people, "argon2id").pwhash)


@pytest.mark.parametrize("name", ["foreign", "junk", "costly", "own", "nobody"])
def test_what_is_no_hash_fits_no_password(people, name):
    for password in ("right", "", "$2b$12$abc", "None"):
        assert people.post("/+login", {"user": name, "password": password}).status in (401, 429)
        assert people.get("/+api", user=name, password=password).status in (200, 429)


def test_a_new_password_ends_the_hash_of_devpi(people):
    people.login("changed", "right")
    old = stored(people, "changed").attributes[d.FROM_DEVPI]["pwhash"]
    assert people.patch("/changed", {"password": "other"}, user="changed").status == 200
    account = stored(people, "changed")
    text = account.attributes.get(d.FROM_DEVPI, {}).get("pwhash")
    assert text != old and (text is None or d.check_password(text, "other")) and d.check_password(account.pwhash, "other")
    assert people.patch("/changed", {"password": "third"}, user="root").status == 200
    assert stored(people, "changed").attributes.get(d.FROM_DEVPI, {}).get("pwhash") != text or text is None
    assert people.post("/+login", {"user": "changed", "password": "right"}).status == 401


def test_another_change_does_not_end_it(people):
    people.login("titled", "right")
    kept = stored(people, "titled").attributes[d.FROM_DEVPI]
    assert people.patch("/titled", {"title": "Ms."}, user="titled").status == 200
    assert stored(people, "titled").attributes == {"title": "Ms.", d.FROM_DEVPI: kept}


def test_passwd_ends_the_hash_of_devpi(people):
    done = run_command("passwd", "reset", "--stdin", "--serverdir", people.directory, input="fresh\n")
    assert done.returncode == 0, done
    account = stored(people, "reset")
    assert d.is_own_hash(account.pwhash) and account.attributes.get(d.FROM_DEVPI, {}).get("pwhash") != argon2()
    people.login("reset", "fresh")
    assert people.post("/+login", {"user": "reset", "password": "right"}).status == 401


def test_who_has_not_logged_in_yet_is_known(people):
    with contextlib.closing(d.Store(d.Settings(str(people.directory)))) as store, store.read() as db:
        assert {"argon2id", "argon2i", "old", "sha256", "titled"} <= set(d.unconverted_users(db))
        waiting = len(d.unconverted_users(db))
        assert not {"foreign", "root", "nobody", "own"} & set(d.unconverted_users(db))
    assert "devpi_lite_unconverted_passwords %d" % waiting in people.get("/+metrics", user="root").text
    people.login("old", "right")
    assert "devpi_lite_unconverted_passwords %d" % (waiting - 1) in people.get("/+metrics", user="root").text


@pytest.mark.skipif(d.argon2_library() is None, reason="no library here")
def test_the_passwords_set_here_can_go_to_devpi(make_server):
    server = make_server()
    server.add_user("alice", "secret of alice")
    for name, password in [("root", "secret"), ("alice", "secret of alice")]:
        account = stored(server, name)
        text, survives = d.hash_for_devpi({"pwhash": account.pwhash, "attributes": account.attributes})
        assert survives and d.check_password(text, password) and text.startswith("$argon2id$v=19$m=32,t=3,p=")


def test_a_random_first_password_goes_to_devpi_without_a_library(tmp_path):
    script = patched(tmp_path, "devpi_lite.ARGON2_LIBRARIES.clear()")
    assert run_command("init", "--serverdir", tmp_path / "x", script=script).returncode == 0
    password = (tmp_path / "x" / "root-password").read_text().strip()
    with contextlib.closing(d.Store(d.Settings(str(tmp_path / "x")))) as store:
        account = stored(store, "root")
    text, survives = d.hash_for_devpi({"pwhash": account.pwhash, "attributes": account.attributes})
    assert survives and d.check_password(text, password) and not d.check_password(text, "secret")
    assert d.check_password(account.pwhash, password)


def test_on_read_only_media_a_login_works_and_nothing_is_written(tmp_path, monkeypatch):
    with contextlib.closing(d.Store(d.Settings(str(tmp_path)), create=True)) as store:
        put_user(store, "alice", argon2())
    with contextlib.closing(d.Store(d.Settings(str(tmp_path), read_only=True))) as store:
        logins = d.Logins(d.Users(store), (b"secret",))
        assert logins.check("alice", "wrong", "192.0.2.1").user is None
        for _ in range(3):
            assert logins.check("alice", "right", "192.0.2.1", is_login=True).user == "alice"
        assert stored(store, "alice").pwhash == argon2()


# -- slow ones


SLOW = """
import time
devpi_lite.ARGON2_LIBRARIES.clear()
devpi_lite.Limits.argon2_here, devpi_lite.Limits.argon2_wait, devpi_lite.Limits.slow_logins = 4, %s, %s
"""
GATE = """
import os
compute = devpi_lite.compute_argon2
def in_child(shape, password):
    while os.path.exists(%r):
        time.sleep(0.01)
    return compute(shape, password)
devpi_lite.compute_in_child = in_child
"""


def slow_server(make_server, tmp_path, gate, wait=0.05, slow_logins=5):
    server = make_server("--threads", "4", script=patched(tmp_path, SLOW % (wait, slow_logins) + GATE % str(gate)))
    with contextlib.closing(d.Store(d.Settings(str(server.directory)))) as store:
        for name in ("alice", "bob", "carol"):
            put_user(store, name, argon2())
    return server


def login(server, name, password):
    reply = server.post("/+login", {"user": name, "password": password})
    if reply.status == 503:
        assert 1 <= int(reply.headers["Retry-After"]) <= 60
    return reply.status


def test_a_slow_password_is_checked_by_another_process(make_server, tmp_path):
    server = make_server(script=patched(tmp_path, SLOW % (30, 5)))
    with contextlib.closing(d.Store(d.Settings(str(server.directory)))) as store:
        put_user(store, "alice", argon2())
    server.login("alice", "right")
    assert d.is_own_hash(stored(server, "alice").pwhash)
    assert "right" not in server.whole_output()


def test_a_login_comes_back_while_its_password_is_checked(make_server, tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    server = slow_server(make_server, tmp_path, gate)
    assert [login(server, "alice", "right") for _ in range(20)] == [503] * 20      # no attempt counts twice
    assert server.get("/+api", user="alice", password="right").status == 503
    assert login(server, "bob", "right") == 503                     # one at a time
    assert server.get("/alice").status == 200
    gate.unlink()
    eventually(lambda: d.is_own_hash(stored(server, "alice").pwhash))
    assert login(server, "alice", "right") == 200
    assert stored(server, "bob").pwhash == argon2()
    eventually(lambda: login(server, "bob", "right") == 200)


def test_a_wrong_slow_password_is_remembered_and_audited(make_server, tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    server = slow_server(make_server, tmp_path, gate)
    assert login(server, "alice", "wrong") == 503
    gate.unlink()
    eventually(lambda: any(entry["action"] == "login.failed" for entry in audited(server, target="alice")))
    gate.touch()
    assert server.get("/+api", user="alice", password="wrong").result["authstatus"] == ["noauth", "", []]
    assert login(server, "alice", "wrong") == 401
    assert stored(server, "alice").pwhash == argon2()


def test_wrong_slow_passwords_are_counted(make_server, tmp_path):
    server = slow_server(make_server, tmp_path, tmp_path / "no gate", wait=10, slow_logins=2)
    assert [login(server, "alice", "wrong%d" % n) for n in range(2)] == [401, 401]
    assert login(server, "alice", "right") == 503
    assert server.post("/+login", {"user": "bob", "password": "right"}, headers={"X-Real-IP": "192.0.2.1"}).status == 200
    assert server.post("/+login", {"user": "carol", "password": "right"}, headers={"X-Real-IP": "192.0.2.1"}).status == 200
    assert stored(server, "alice").pwhash == argon2()


def test_a_slow_check_that_fails_counts_as_no_attempt(make_server, tmp_path):
    server = slow_server(make_server, tmp_path, tmp_path / "no gate", wait=10)
    server.stop()
    server.script = patched(tmp_path, SLOW % (10, 5) + """
def fail(shape, password):
    raise OSError(12, "no memory")
devpi_lite.compute_in_child = fail
""")
    server.start()
    assert [login(server, "alice", "right") for _ in range(12)] == [503] * 12
    assert "no memory" in server.output()
