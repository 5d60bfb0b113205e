"""A primary learns from its replicas, by their signature, which clients they pass requests on for."""

import hashlib
import hmac
import secrets
import time

import pytest

from harness import SIMPLE_JSON, Wire, audited, eventually, patched, wheel
from replicas import in_sync, primary_at, replica_at

# to this primary everybody comes from another machine
FAR = "devpi_lite.App.trusts = lambda self, address: False\n"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("far")
    primary = primary_at(folder / "primary", "--outside-url", "http://primary.example/pre", "--open-registration",
                         script=patched(folder, FAR)).start()
    (folder / "r").mkdir()
    replica = replica_at(folder / "replica", primary,
                         script=patched(folder / "r", "devpi_lite.Limits.min_serial_time = 0.05\n")).start()
    try:
        primary.add_user("ann")
        primary.add_index("ann/dev")
        in_sync(primary, replica)
        replica.passwords.update(primary.passwords)
        yield primary, replica
    finally:
        replica.kill()
        primary.kill()


def signed_relay(server, method, target, address, outside="", ts=None, covered="body not covered", secret=None):
    """The headers by which a replica passes a request on."""
    secret = secret or (server.directory / ".secret").read_bytes().strip()
    key = hmac.new(secret, b"devpi-lite-replica", "sha256").digest()
    uuid, now, nonce = "5" * 32, str(int(ts or time.time())), secrets.token_hex(16)
    texts = (method, target, uuid, "1", now, nonce, covered, address, outside)
    mac = hmac.new(key, "\n".join(texts).encode(), "sha256").hexdigest()
    headers = {"X-Devpi-Replica": "Devpi-Replica id=%s,term=1,ts=%s,nonce=%s,mac=%s" % (uuid, now, nonce, mac),
               "X-Real-IP": address}
    return dict(headers, **{"X-Outside-URL": outside} if outside else {})


def address_of(primary, name):
    """Where the user came from who made that user, as the primary noted it."""
    return next(entry["address"] for entry in audited(primary) if entry["target"] == name)


def test_the_primary_sees_the_clients_of_its_replica(pair):
    primary, replica = pair
    for name, headers, address in (("far", {"X-Real-IP": "192.0.2.7"}, "192.0.2.7"), ("six", {"X-Real-IP": "2001:db8::7"}, "2001:db8::7"),
                                   ("near", {}, "127.0.0.1")):
        assert replica.put("/" + name, {"password": "pw"}, headers=headers).status == 201
        assert address_of(primary, name) == address
    assert primary.put("/own", {"password": "pw"}, headers={"X-Real-IP": "192.0.2.8"}).status == 201
    assert address_of(primary, "own") == "127.0.0.1"


def test_wrong_passwords_through_a_replica_lock_out_their_own_address_alone(pair):
    primary, replica = pair
    archive = wheel("lock", "1.0")

    def tried(address, password):
        return replica.upload("ann/dev", archive, password=password, headers={"X-Real-IP": address}).status

    statuses = [tried("192.0.2.66", "no%d" % number) for number in range(12)]
    assert statuses[0] == 401 and statuses[-1] == 429
    assert tried("192.0.2.66", "pw") == 429
    assert tried("192.0.2.67", "pw") == 200


def test_links_are_those_of_the_server_that_the_client_asked(pair):
    primary, replica = pair
    headers = {"X-Outside-URL": "https://replica.example/x", "X-DEVPI-MIN-SERIAL": "1" + "0" * 9}
    for path in ("/ann/dev/+api", "/x/ann/dev/+api"):
        reply = replica.get(path, headers=headers)
        assert reply.result["index"] == "https://replica.example/x/ann/dev", reply
    assert primary.get("/ann/dev/+api").result["index"] == "http://primary.example/pre/ann/dev"
    assert primary.get("/ann/dev/+api", headers=headers).result["index"] == "http://primary.example/pre/ann/dev"
    assert primary.get("/pre/ann/dev/+api").status == 200


def test_only_a_fresh_signature_of_just_this_request_counts(pair):
    primary, _ = pair
    number = 0

    def address(headers):
        nonlocal number
        number += 1
        target = "/user%d" % number
        reply = primary.put(target, {"password": "pw"}, headers=headers(target))
        assert reply.status == 201, reply
        return address_of(primary, target[1:])

    def good(target, **options):
        return signed_relay(primary, "PUT", target, "192.0.2.9", **options)

    first = []
    assert address(lambda target: first.append(good(target)) or first[0]) == "192.0.2.9"
    assert primary.delete("/user1", user="root").status in (200, 201)
    assert primary.put("/user1", {"password": "pw"}, headers=first[0]).status == 201
    assert address_of(primary, "user1") == "127.0.0.1", "it was used before"
    for change in (
            lambda target: dict(good(target), **{"X-Real-IP": "192.0.2.10"}),
            lambda target: dict(good(target), **{"X-Outside-URL": "http://evil.example"}),
            lambda target: good(target + "x"), lambda target: good(target, ts=time.time() - 90),
            lambda target: good(target, ts=time.time() + 90), lambda target: good(target, secret=b"x" * 40),
            lambda target: signed_relay(primary, "POST", target, "192.0.2.9"),
            lambda target: good(target, covered=hashlib.sha256(b"").hexdigest()),
            lambda target: dict(good(target), **{"X-Devpi-Replica": "Devpi-Replica id=x"})):
        assert address(change) == "127.0.0.1"
    # and it is no permission to follow
    target = "/+repl/v1/log?after=-1&hash="
    headers = signed_relay(primary, "GET", target, "192.0.2.9")
    assert primary.get(target, headers=headers).status == 401
    assert primary.get(target, headers={"Authorization": headers["X-Devpi-Replica"]}).status == 401


def test_a_client_of_the_replica_can_not_sign_for_it(pair):
    primary, replica = pair
    headers = signed_relay(primary, "PUT", "/sly", "192.0.2.11")
    headers["X-Real-IP"] = "192.0.2.12"
    assert replica.put("/sly", {"password": "pw"}, headers=headers).status == 201
    assert address_of(primary, "sly") == "192.0.2.12"


def test_what_was_made_for_a_relayed_reader_is_served_to_nobody_else(pair):
    primary, _ = pair
    path = "/ann/dev/+simple/"
    headers = signed_relay(primary, "GET", path, "192.0.2.13", "http://replica.example")
    request = b"GET %s HTTP/1.1\r\nHost: a\r\nAccept: %s\r\n%s\r\n\r\n" % (path.encode(), SIMPLE_JSON.encode(), "\r\n".join(
        "%s: %s" % pair for pair in headers.items()).encode())
    wire = Wire(primary)
    for _ in range(3):
        wire.send(request)
        assert wire.reply().status == 200
    lines = eventually(lambda: (lambda found: len(found) == 3 and found)(
        [line for line in primary.output().splitlines() if "GET %s 200" % path in line]))
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["192.0.2.13", "127.0.0.1", "127.0.0.1"]


def test_a_replica_whose_clock_is_off_is_served_as_one_address(pair):
    primary, _ = pair
    headers = signed_relay(primary, "PUT", "/clock", "192.0.2.14", ts=time.time() - 86400)
    assert primary.put("/clock", {"password": "pw"}, headers=headers).status == 201
    assert address_of(primary, "clock") == "127.0.0.1"
