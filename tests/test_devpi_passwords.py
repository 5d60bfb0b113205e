"""Passwords that come from devpi, and go back to it: argon2 in pure Python and by libraries, salted SHA-256."""

import pytest

import devpi_lite as d

SHA256 = "5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8"


def argon2(kind="argon2id", version=19, memory=8, passes=1, lanes=1, salt=b"saltsalt", size=32, password=b"right"):
    shape = d.Argon2(kind, version, memory, passes, lanes, salt, bytes(size))
    return shape._replace(digest=d.compute_argon2(shape, password)).text


def row(pwhash, kept=None):
    return {"pwhash": pwhash, "attributes": {d.FROM_DEVPI: {"pwhash": kept}} if kept else {"title": "x"}}


# -- argon2 in pure Python


@pytest.mark.parametrize("processes", [1, pytest.param(3, marks=pytest.mark.skipif(
    not hasattr(d.os, "fork"), reason="no fork here"))])
@pytest.mark.parametrize("kind, digest", [
    ("argon2i", "c814d9d1dc7f37aa13f0d77f2494bda1c8de6b016dd388d29952a4c4672b6ce8"),
    ("argon2id", "0d640df58d78766c08c037a34a8b53c9d01ef0452d75b65eb52520e96b01e659")])
def test_the_vectors_of_rfc_9106(kind, digest, processes):
    shape = d.Argon2(kind, 19, 32, 3, 4, b"\2" * 16, bytes(32))
    assert d.compute_argon2(shape, b"\1" * 32, b"\3" * 8, b"\4" * 12, processes).hex() == digest


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
    (text, told), (other, _) = d.hash_for_devpi(value), d.hash_for_devpi(value)
    assert told == survives and text != other and text.startswith("$argon2id$v=19$m=8,t=1,p=1$") and d.argon2_of(text)
    assert not any(argon2(salt=d.argon2_of(text).salt, password=word) == text for word in (b"", b"right", text.encode()))
