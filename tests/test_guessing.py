"""Who guesses passwords is slowed down, finds no faster way, and holds up nobody else for long."""

import socket
import sys
import threading
import time

import pytest

import devpi_lite as d
from harness import user_pass, eventually, patched, wheel

ELSEWHERE = "127.0.0.9"
needs_other_loopback = pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.9 is a local address on Linux only")


@pytest.fixture
def alice(shared_server, request):
    """A fresh user's name, whose password is `right`, with an index that only she may read."""
    name = "alice-%d" % len(shared_server.passwords)
    shared_server.add_user(name, "right")
    token = shared_server.login(name, "right")
    shared_server.add_index(name + "/priv", acl_pkg_read=[name])
    assert token
    return name


def ask(server, user, password, source="127.0.0.1", more=""):
    """The status that a request for the private index gets, under a head that is always the same."""
    with socket.create_connection(("127.0.0.1", server.port), 30, source_address=(source, 0)) as connection:
        connection.sendall(("GET /%s/priv/+simple/ HTTP/1.1\r\nHost: pkg\r\nAuthorization: Basic %s\r\n"
                            "Accept: */*\r\n%s\r\n" % (user, user_pass(user, password), more)).encode())
        return int(connection.recv(1000).split()[1])


def exhaust(server, user, **options):
    """Guess until the answer is 429."""
    for number in range(10):
        if ask(server, user, "wrong%d" % number, **options) == 429:
            return
    pytest.fail("ten wrong passwords and no 429")


@needs_other_loopback
def test_a_throttled_guesser_is_not_told_the_right_password_by_what_is_kept(shared_server, alice):
    for _ in range(3):
        assert ask(shared_server, alice, "right") == 200        # so the answer to this head is kept
    for _ in range(5):
        exhaust(shared_server, alice, source=ELSEWHERE)
        found = [ask(shared_server, alice, "right", ELSEWHERE), ask(shared_server, alice, "right", ELSEWHERE, "X: y\r\n")]
        if ask(shared_server, alice, "wrong", ELSEWHERE) == 429:
            break       # the wait was not over meanwhile
    assert found == [429, 429]
    assert ask(shared_server, alice, "right") == 200            # where it was right before, it goes on


def test_kept_answers_are_for_the_address_that_got_them(shared_server, alice):
    """Both kinds are answered from memory: the access log has the same user each time."""
    shared_server.add_index(alice + "/open")
    for path, user in (("/%s/open/+simple/" % alice, None), ("/%s/priv/+simple/" % alice, alice)):
        replies = [shared_server.get(path, user=user, headers={"X-Same": "1"}) for _ in range(3)]
        assert [reply.status for reply in replies] == [200] * 3


def test_a_remembered_password_goes_on_where_others_have_to_wait(shared_server, alice):
    assert ask(shared_server, alice, "right", more="X: 1\r\n") == 200
    exhaust(shared_server, alice)
    assert ask(shared_server, alice, "right", more="X: 2\r\n") == 200
    assert shared_server.post("/+login", {"user": alice, "password": "right"}).status == 200
    assert shared_server.get("/+api", user=alice).result["authstatus"][:2] == ["ok", alice]
    assert ask(shared_server, alice, "wrong-again") == 429


def test_a_password_that_was_not_used_before_has_to_wait(shared_server):
    shared_server.add_user("fresh", "right")
    assert shared_server.put("/fresh/priv", {"acl_pkg_read": ["fresh"]}, user="root", password="secret").status == 200
    for _ in range(5):
        exhaust(shared_server, "fresh")
        right = shared_server.post("/+login", {"user": "fresh", "password": "right"}).status
        if ask(shared_server, "fresh", "x") == 429:
            break
    assert right == 429


def test_a_remembered_password_is_no_faster_way_to_guess_it(make_server, tmp_path):
    """From the very place where it is in use, only so many are looked for."""
    server = make_server(script=patched(tmp_path, "devpi_lite.Limits.failed_logins = 1"))
    server.add_user("alice", "right")
    server.add_index("alice/priv", acl_pkg_read=["alice"])
    assert ask(server, "alice", "right") == 200
    for number in range(60):
        ask(server, "alice", "other%d" % number, more="X: y\r\n")
    assert ask(server, "alice", "right", more="X: y\r\n") == 429


def login(server, user, password, address):
    return server.post("/+login", {"user": user, "password": password}, headers={"X-Real-IP": address}).status


def test_the_addresses_of_one_ipv6_network_count_as_one(shared_server, alice):
    found = [login(shared_server, alice, "guess%d" % n, "2001:db8::%x:%x" % (n, n)) for n in range(1, 21)]
    assert found[0] == 401 and found[-1] == 429
    assert login(shared_server, alice, "guess", "2001:db8:0:1::1") == 401
    assert login(shared_server, alice, "right", "2001:db8:0:1::1") == 200


def test_guesses_from_everywhere_count_for_the_account(shared_server, alice):
    home = "198.51.100.7"
    assert login(shared_server, alice, "right", home) == 200
    found = [login(shared_server, alice, "guess%d" % n, "203.0.113.%d" % n) for n in range(1, 80)]
    assert found[0] == 401 and found[-1] == 429 and found.count(401) < 60
    assert login(shared_server, alice, "right", "203.0.113.200") == 429         # not even the right one
    assert login(shared_server, alice, "wrong", home) == 401                    # but where she logged in before, as ever
    assert login(shared_server, alice, "right", home) == 200
    assert shared_server.get("/+api", user=alice).result["authstatus"][:2] == ["ok", alice]


def test_guesses_at_many_accounts_count_for_the_address(shared_server, alice):
    found = [login(shared_server, "nobody%d" % n, "x", "192.0.2.1") for n in range(130)]
    assert found[0] == 401 and found[-1] == 429 and found.count(401) < 125
    assert login(shared_server, alice, "right", "192.0.2.1") == 429
    assert login(shared_server, alice, "right", "192.0.2.2") == 200


def test_passwords_that_wait_to_be_hashed_hold_up_nobody(make_server, tmp_path):
    """While four are hashed and others wait, all else is answered at once, and the next password has to come later."""
    gate = tmp_path / "gate"
    server = make_server("--threads", "8", script=patched(tmp_path, """
import hashlib, os, time
scrypt = hashlib.scrypt
def slow(*args, **more):
    while os.path.exists(%r):
        time.sleep(0.01)
    return scrypt(*args, **more)
hashlib.scrypt = slow""" % str(gate)))
    server.add_user("alice")
    server.add_index("alice/dev")
    server.add_index("alice/priv", acl_pkg_read=["alice"])
    assert server.upload("alice/dev", wheel("foo", "1.0")).status == 200
    gate.touch()
    statuses = []

    def guess(number):
        statuses.append(ask(server, "alice", "guess%d" % number, more="X-Real-IP: 192.0.2.%d\r\n" % number))
    threads = [threading.Thread(target=guess, args=(number,)) for number in range(1, 26)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    began = time.monotonic()
    try:
        for number in range(5):
            assert server.get("/alice/dev/foo?%d" % number).status == 200
        assert time.monotonic() - began < 2
        more = [threading.Thread(target=guess, args=(number,)) for number in range(26, 60)]
        for thread in more:
            thread.start()
        eventually(lambda: 503 in statuses)
        assert server.get("/alice/dev/foo?again").status == 200
    finally:
        gate.unlink()
    for thread in threads + more:
        thread.join()
    assert set(statuses) <= {401, 404, 429, 503}
    assert statuses.count(503) >= len(threads + more) - 36
    reply = server.get("/alice/dev/foo", user="alice", password="pw")
    assert reply.status == 200


# -- what is kept of passwords


@pytest.fixture
def logins(tmp_path, monkeypatch):
    """The `Logins` of a store whose user alice has the password `right`."""
    monkeypatch.setitem(d._SCRYPT, "n", 16)
    store = d.Store(d.Settings(str(tmp_path)), create=True)
    users = d.Users(store)
    users.create("alice", {"password": "right"})
    yield d.Logins(users, (b"secret",))
    store.close()


def test_where_a_password_fitted_is_kept_of_a_bounded_number_of_addresses(logins, monkeypatch):
    monkeypatch.setattr(d.Limits, "remembered_failures", 5)
    for number in range(20):
        assert logins.check("alice", "right", "192.0.2.%d" % number).user == "alice"
    assert [place for _, place in logins.throttle.fitted] == ["192.0.2.%d" % number for number in range(15, 20)]
    assert set(logins.throttle.fitted.values()) == set(logins.passwords.remembered)


class CountingLock:
    """A lock that counts how often it was taken."""

    def __init__(self):
        self.lock, self.count = threading.Lock(), 0

    def __enter__(self):
        self.count += 1
        return self.lock.__enter__()

    def __exit__(self, *error):
        return self.lock.__exit__(*error)


def test_a_password_in_use_is_remembered_on_without_the_lock_of_all_logins(logins, monkeypatch):
    logins.passwords.lock = logins.throttle.lock = CountingLock()
    assert logins.check("alice", "right", "192.0.2.1").user == "alice"
    (digest, (_, until)), taken = logins.passwords.remembered.copy().popitem(), logins.passwords.lock.count
    for _ in range(5):
        assert logins.check("alice", "right", "192.0.2.1").user == "alice"
    assert logins.passwords.remembered[digest] == (True, until) and logins.passwords.lock.count == taken
    logins.passwords.remembered[digest] = True, until - 0.6 * d.Limits.password_memory
    assert logins.check("alice", "right", "192.0.2.1").user == "alice"
    assert logins.passwords.remembered[digest][1] >= until and logins.passwords.lock.count == taken + 1


def test_a_wrong_password_is_not_remembered_longer_for_being_sent_again(logins):
    assert logins.check("alice", "wrong", "192.0.2.1").user is None
    (digest, (fits, until)), = logins.passwords.remembered.items()
    logins.passwords.remembered[digest] = fits, until - 0.6 * d.Limits.password_memory
    assert logins.check("alice", "wrong", "192.0.2.1").user is None
    assert logins.passwords.remembered[digest] == (False, until - 0.6 * d.Limits.password_memory)
