"""Users: discovery, logins, session tokens, credentials, accounts, who may do what to them [W5, W6, W7]."""

import base64
import itertools
import json
import re
import sqlite3
import time
from urllib.parse import quote

import pytest

from harness import Server, Wire, serial_of, user_pass, wheel

FEATURES = ["projectconfig-v2", "push-no-docs", "push-only-docs", "push-register-project", "server-keyvalue-parsing"]
NOBODY = ["noauth", "", []]
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
NOT_ALLOWED = "contains characters that aren't allowed. Any ascii symbol besides -.@_ is blocked."

numbers = itertools.count(1)


@pytest.fixture
def person(shared_server):
    """The name of a fresh user whose password is `pw`."""
    name = "person%d" % next(numbers)
    shared_server.add_user(name, "pw")
    return name


@pytest.fixture(scope="module")
def reader(shared_server):
    """A user that no test changes, logged in; password `pw`."""
    shared_server.add_user("reader", "pw")
    shared_server.login("reader", "pw")
    return "reader"


@pytest.fixture(scope="module")
def restricted(tmp_path_factory):
    """A server on which only root and admin may manage users and indexes; it also has alice and bob."""
    server = Server(tmp_path_factory.mktemp("restricted"), "--restrict-modify=root,admin").start()
    try:
        server.login("root", "secret")
        for name in ("admin", "alice", "bob"):
            assert server.put("/" + name, {"password": "pw"}, user="root").status == 201
            server.login(name, "pw")
        yield server
    finally:
        server.stop()


def basic(user, secret, encoding="utf-8"):
    return {"Authorization": "Basic " + user_pass(user, secret, encoding)}


def devpi_auth(user, secret, encoding="utf-8"):
    return {"X-Devpi-Auth": user_pass(user, secret, encoding)}


def authstatus(server, headers=None):
    reply = server.get("/+api", headers=headers)
    assert reply.status == 200
    return reply.result["authstatus"]


def post_login(server, user, password, headers=None):
    return server.post("/+login", {"user": user, "password": password}, headers=headers)


# +api


def test_api_names_the_login_url_the_features_and_nobody(shared_server):
    reply = shared_server.get("/+api")
    assert reply.status == 200
    assert reply.headers.get("Content-Type") == "application/json"
    assert reply.json() == {
        "type": "apiconfig",
        "result": {"login": shared_server.url + "/+login", "authstatus": NOBODY, "features": FEATURES},
    }


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
def test_api_answers_whatever_the_method(shared_server, method):
    reply = shared_server.request(method, "/+api")
    assert (reply.status, reply.json()["type"]) == (200, "apiconfig")


def test_api_below_an_unknown_user_is_the_plain_one(shared_server):
    assert shared_server.get("/nobody-here/+api").json() == shared_server.get("/+api").json()


def test_api_of_a_stage_names_its_pages_and_where_to_upload(shared_server, reader):
    shared_server.add_index("reader/stage")
    result = shared_server.get("/reader/stage/+api").result
    url = shared_server.url + "/reader/stage"
    assert result == {
        "login": shared_server.url + "/+login",
        "authstatus": NOBODY,
        "features": FEATURES,
        "index": url,
        "simpleindex": url + "/+simple/",
        "pypisubmit": url + "/",
    }


def test_api_of_a_mirror_offers_no_upload(shared_server, reader):
    shared_server.add_mirror("reader/mirror", "http://127.0.0.1:9/simple/")
    result = shared_server.get("/reader/mirror/+api").result
    assert result["simpleindex"] == shared_server.url + "/reader/mirror/+simple/"
    assert "pypisubmit" not in result


def test_api_of_an_unknown_index_is_404(shared_server, reader):
    reply = shared_server.get("/reader/nope/+api")
    assert (reply.status, reply.json()["message"]) == (404, "The stage reader/nope could not be found.")


def test_api_with_a_final_slash_does_not_exist(shared_server):
    assert shared_server.get("/+api/").status == 404


def test_api_tells_who_is_logged_in(shared_server, reader):
    assert shared_server.get("/+api", user="reader").result["authstatus"] == ["ok", "reader", []]


def test_api_urls_follow_the_outside_url(shared_server):
    reply = shared_server.get("/+api", headers={"X-Outside-URL": "https://packages.example.org/sub"})
    assert reply.result["login"] == "https://packages.example.org/sub/+login"


# +login


def test_login_gives_a_token_for_ten_hours(shared_server, reader):
    reply = post_login(shared_server, "reader", "pw")
    assert reply.status == 200
    assert reply.headers.get("Content-Type") == "application/json"
    answer = reply.json()
    token = answer["result"].pop("password")
    assert answer == {"type": "proxyauth", "message": "login successful", "result": {"expiration": 36000}}
    assert re.fullmatch(r"[A-Za-z0-9._~-]+", token)
    assert not token.startswith(("devpi-", "pypi-"))
    assert authstatus(shared_server, devpi_auth("reader", token)) == ["ok", "reader", []]


def test_login_ignores_the_content_type(shared_server, reader):
    body = json.dumps({"user": "reader", "password": "pw"})
    reply = shared_server.post("/+login", body, headers={"Content-Type": "text/plain"})
    assert (reply.status, reply.json()["type"]) == (200, "proxyauth")


@pytest.mark.parametrize("user", ["reader", "nobody-here"])
def test_login_with_a_wrong_password_is_401_without_challenge(shared_server, reader, user):
    reply = post_login(shared_server, user, "wrong")
    assert reply.status == 401
    assert reply.json()["message"] == "user '%s' could not be authenticated" % user
    assert reply.headers.get("WWW-Authenticate") is None
    assert reply.headers.get("Location") is None
    assert reply.headers.get("X-DEVPI-API-VERSION") == "2"


@pytest.mark.parametrize("body", [{}, {"user": "reader"}, {"password": "pw"}, {"user": "reader", "password": None}])
def test_login_without_user_or_password_is_400(shared_server, reader, body):
    reply = shared_server.post("/+login", body)
    assert (reply.status, reply.json()["message"]) == (400, "Bad request: no user/password specified")


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE"])
def test_login_is_only_there_for_post(shared_server, method):
    assert shared_server.request(method, "/+login").status == 404


# Session tokens


def test_a_token_works_in_both_headers(shared_server, reader):
    token = shared_server.login("reader", "pw")
    for headers in (basic("reader", token), devpi_auth("reader", token)):
        assert authstatus(shared_server, headers) == ["ok", "reader", []]


def test_a_tampered_token_is_nobody(shared_server, person):
    token = shared_server.login(person, "pw")
    for position in (0, len(token) // 2, len(token) - 3):
        other = "A" if token[position] != "A" else "B"
        changed = token[:position] + other + token[position + 1:]
        assert authstatus(shared_server, devpi_auth(person, changed)) == NOBODY
    for changed in (token[:-4], token + "AAAA", token[:len(token) // 2], "." * 30):
        assert authstatus(shared_server, devpi_auth(person, changed)) == NOBODY


def test_a_token_is_only_good_for_its_user(shared_server, reader, person):
    token = shared_server.login("reader", "pw")
    for other in (person, "root", "Reader"):
        assert authstatus(shared_server, devpi_auth(other, token)) == NOBODY


def test_a_token_is_no_password_for_another_login(shared_server, person):
    token = shared_server.login(person, "pw")
    assert post_login(shared_server, "root", token).status == 401


def test_tokens_and_old_passwords_die_with_a_password_change(shared_server, person):
    token = shared_server.login(person, "pw")
    assert authstatus(shared_server, basic(person, "pw")) == ["ok", person, []]  # the server may remember it now
    reply = shared_server.patch("/" + person, {"password": "new"}, headers=devpi_auth(person, token))
    assert reply.status == 200
    assert authstatus(shared_server, devpi_auth(person, token)) == NOBODY
    assert authstatus(shared_server, basic(person, "pw")) == NOBODY
    assert post_login(shared_server, person, "pw").status == 401
    assert authstatus(shared_server, basic(person, "new")) == ["ok", person, []]


def test_a_password_change_answers_with_a_fresh_token(shared_server, person):
    reply = shared_server.patch("/" + person, {"password": "new"}, user=person, password="pw")
    answer = reply.json()
    assert (reply.status, answer["type"], answer["message"]) == (200, "userpassword", "user updated, new proxy auth")
    assert answer["result"]["expiration"] == 36000
    assert authstatus(shared_server, devpi_auth(person, answer["result"]["password"])) == ["ok", person, []]


def test_tokens_survive_changes_other_than_the_password(shared_server, person):
    token = shared_server.login(person, "pw")
    assert shared_server.patch("/" + person, {"email": "a@example.org", "password": None}, user=person).status == 200
    assert authstatus(shared_server, devpi_auth(person, token)) == ["ok", person, []]
    assert post_login(shared_server, person, "pw").status == 200


def test_tokens_die_with_their_user_even_if_the_name_comes_back(shared_server, person):
    token = shared_server.login(person, "pw")
    assert shared_server.delete("/" + person, user=person).status == 200
    assert authstatus(shared_server, devpi_auth(person, token)) == NOBODY
    assert authstatus(shared_server, basic(person, "pw")) == NOBODY
    shared_server.add_user(person, "pw")
    assert authstatus(shared_server, devpi_auth(person, token)) == NOBODY
    assert authstatus(shared_server, basic(person, "pw")) == ["ok", person, []]


def test_a_remembered_password_dies_with_its_user(shared_server, person):
    assert authstatus(shared_server, basic(person, "pw")) == ["ok", person, []]
    assert shared_server.delete("/" + person, user=person, password="pw").status == 200
    shared_server.add_user(person, "another")
    assert authstatus(shared_server, basic(person, "pw")) == NOBODY


def test_tokens_survive_a_restart(server):
    server.add_user("alice", "pw")
    token = server.login("alice", "pw")
    server.restart()
    assert authstatus(server, devpi_auth("alice", token)) == ["ok", "alice", []]
    assert authstatus(server, basic("alice", "pw")) == ["ok", "alice", []]


# Credentials on a request


def test_a_password_works_in_both_headers(shared_server, reader):
    for headers in (basic("reader", "pw"), devpi_auth("reader", "pw")):
        assert authstatus(shared_server, headers) == ["ok", "reader", []]


def test_the_scheme_word_may_be_in_lower_case(shared_server, reader):
    assert authstatus(shared_server, {"Authorization": "basic " + user_pass("reader", "pw")}) == ["ok", "reader", []]


@pytest.mark.parametrize("devpi", [user_pass("reader", "wrong"), user_pass("nobody-here", "pw"), user_pass("reader", "")])
def test_a_wrong_devpi_header_beats_a_right_basic_one(shared_server, reader, devpi):
    headers = dict(basic("reader", "pw"), **{"X-Devpi-Auth": devpi})
    assert authstatus(shared_server, headers) == NOBODY


def test_a_right_devpi_header_beats_another_basic_one(shared_server, reader, person):
    headers = dict(basic(person, "pw"), **devpi_auth("reader", "pw"))
    assert authstatus(shared_server, headers) == ["ok", "reader", []]


@pytest.mark.parametrize("undecodable", ["###", "", "a", base64.b64encode(b"no colon").decode()])
def test_an_undecodable_devpi_header_is_ignored(shared_server, reader, undecodable):
    assert authstatus(shared_server, {"X-Devpi-Auth": undecodable}) == NOBODY
    headers = dict(basic("reader", "pw"), **{"X-Devpi-Auth": undecodable})
    assert authstatus(shared_server, headers) == ["ok", "reader", []]


@pytest.mark.parametrize("value", [
    "Basic ###", "Basic", "", "Basic a", "Basic " + base64.b64encode(b"no colon").decode(), "Bearer abc",
    "Digest username=reader", user_pass("reader", "pw"), "Basic " + base64.b64encode(b"\xff\xfe:\x80").decode(),
])
def test_an_unusable_authorization_header_is_nobody(shared_server, reader, value):
    assert authstatus(shared_server, {"Authorization": value}) == NOBODY


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_credentials_may_be_utf8_or_latin1(shared_server, encoding):
    name, password = "eleve-" + encoding, "pässwörd"
    path = "/" + quote(name)
    assert shared_server.put(path, {"password": password}).status == 201
    for headers in (basic(name, password, encoding), devpi_auth(name, password, encoding)):
        assert authstatus(shared_server, headers) == ["ok", name, []]
    assert shared_server.get(path).result["username"] == name


def test_credentials_are_split_at_the_first_colon(shared_server):
    assert shared_server.put("/colon", {"password": "a:b::c"}).status == 201
    assert authstatus(shared_server, basic("colon", "a:b::c")) == ["ok", "colon", []]


def test_bad_credentials_are_no_error_where_nothing_is_guarded(shared_server, person):
    assert shared_server.get("/" + person, headers=basic(person, "wrong")).status == 200


def test_bad_credentials_are_403_where_a_right_is_needed(shared_server, person):
    for headers in (None, basic(person, "wrong"), devpi_auth(person, "wrong")):
        assert shared_server.delete("/" + person, headers=headers).status == 403


# Failed logins slow down


def exhaust(server, user, headers=None):
    """Fails to log in until the server answers 429; returns that reply."""
    for _ in range(30):
        reply = post_login(server, user, "wrong", headers)
        if reply.status == 429:
            return reply
        assert reply.status == 401
    pytest.fail("30 quick failures in a row and no 429")


def test_failed_logins_slow_down_for_that_account_only(shared_server, reader, person):
    token = shared_server.login(person, "pw")
    elsewhere = {"X-Real-IP": "192.0.2.77"}     # where this password was not used yet
    for _ in range(5):
        refused = exhaust(shared_server, person, elsewhere)
        assert int(refused.headers.get("Retry-After")) >= 1
        assert refused.json()["message"]
        right = post_login(shared_server, person, "pw", elsewhere)
        if right.status == 429:
            break       # else the wait of a second was over when it came, on a busy machine
    assert right.status == 429
    assert int(right.headers.get("Retry-After")) >= 1
    assert post_login(shared_server, "reader", "pw").status == 200
    assert authstatus(shared_server, devpi_auth(person, token)) == ["ok", person, []]  # nobody is locked out of a session


def test_a_few_typing_errors_do_not_close_an_account(shared_server, person):
    for _ in range(3):
        assert post_login(shared_server, person, "wrong").status == 401
    assert post_login(shared_server, person, "pw").status == 200


def test_an_account_opens_again_when_the_wait_is_over(shared_server, person):
    wait = int(exhaust(shared_server, person).headers.get("Retry-After"))
    deadline = time.monotonic() + wait + 20
    while True:
        reply = post_login(shared_server, person, "pw")
        if reply.status == 200:
            break
        assert reply.status == 429
        assert time.monotonic() < deadline, "still refused after Retry-After"
        time.sleep(0.1)


# Names


@pytest.mark.parametrize("symbol", list("!\"#$%&'()*,:;<=>?[\\]^`{|}~ \t\n\x01"))
def test_a_user_name_with_a_blocked_character_is_400(shared_server, symbol):
    reply = shared_server.put("/" + quote("b%sx" % symbol, safe=""), {"password": "pw"})
    assert reply.status == 400
    assert reply.json()["message"].endswith(NOT_ALLOWED)


def test_the_refusal_of_a_user_name_quotes_it(shared_server):
    reply = shared_server.put("/b%20x", {"password": "pw"})
    assert (reply.status, reply.json()["message"]) == (400, "username 'b x' " + NOT_ALLOWED)


@pytest.mark.parametrize("path", ["/a+b", "/a%2Bb"])
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_a_user_name_with_a_plus_is_never_routed(shared_server, method, path):
    assert shared_server.request(method, path, {"password": "pw"}).status == 404


@pytest.mark.parametrize("name", ["o-o.o@o_o", "0", "foo.bar42", "foo@bar42", "x-", "n" * 200])
def test_other_user_names_are_allowed(shared_server, name):
    reply = shared_server.put("/" + quote(name, safe="@"), {"password": "x"})
    assert (reply.status, reply.result["username"]) == (201, name)
    assert shared_server.get("/" + quote(name, safe="")).result["username"] == name


ODD_NAMES = [".", "..", ".x", "-x", "_x", "@x", "root\u200b", "\u202etoor", "r\u043e\u043et", "\u00fcn\u00efcode", "\uff52oot", "\u4eba", "n" * 201]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_that_look_like_others_or_like_paths_are_refused(shared_server, reader, name):
    for path in ("/" + quote(name, safe=""), "/reader/" + quote(name, safe="")):
        reply = shared_server.put(path, {"password": "x"} if path.count("/") == 1 else {}, user="reader")
        assert reply.status == 400 and "name" in reply.json()["message"]
        assert reply.json()["message"].isascii()
    assert name not in shared_server.get("/").result


def test_names_that_an_older_program_let_in_go_on(server):
    server.add_user("cafe", "pw")
    server.add_index("cafe/dev")
    server.add_index("cafe/above", bases=["cafe/dev"])
    server.stop()
    with sqlite3.connect(str(server.directory / "devpi_lite.db")) as db:
        db.execute("UPDATE users SET name = 'caf\u00e9' WHERE name = 'cafe'")
        db.execute("UPDATE indexes SET name = '_d\u00e9v' WHERE name = 'dev'")
    db.close()
    server.start()
    user, index = quote("caf\u00e9"), quote("caf\u00e9/_d\u00e9v")
    credentials = basic("caf\u00e9", "pw")
    assert authstatus(server, credentials) == ["ok", "caf\u00e9", []]
    assert server.patch("/" + index, {"title": "x", "acl_upload": "caf\u00e9"}, headers=credentials).status == 200
    assert server.patch("/%s/above" % user, {"bases": "caf\u00e9/_d\u00e9v"}, headers=credentials).status == 200
    assert server.get("/%s/+simple/" % index).status == 200
    assert server.delete("/" + index, headers=credentials).status == 201
    assert server.put("/" + index, {}, headers=credentials).status == 400
    assert server.patch("/" + user, {"password": "new"}, headers=credentials).status == 200
    assert server.delete("/" + user, headers=basic("caf\u00e9", "new")).status == 200


def test_user_names_are_case_sensitive(shared_server, person):
    assert shared_server.get("/" + person.upper()).status == 404
    assert shared_server.put("/" + person.upper(), {"password": "other"}).status == 201
    assert authstatus(shared_server, basic(person.upper(), "pw")) == NOBODY


# Creating


def test_a_new_user_has_a_name_a_date_and_no_indexes(shared_server):
    reply = shared_server.put("/fresh", {"password": "pw"})
    answer = reply.json()
    assert (reply.status, answer["type"]) == (201, "userconfig")
    assert TIMESTAMP.fullmatch(answer["result"].pop("created"))
    assert answer["result"] == {"username": "fresh", "indexes": {}}
    assert shared_server.get("/fresh").json()["type"] == "userconfig"


def test_attributes_given_at_creation_are_kept_as_sent(shared_server):
    attributes = {"email": "a@example.org", "title": "Ms.", "description": "d <b>",
                  "custom_data": {"a": [1, None, {"b": "ü"}]}}
    assert shared_server.put("/attributes", dict(attributes, password="pw")).status == 201
    result = shared_server.get("/attributes").result
    assert {key: result[key] for key in attributes} == attributes


def test_a_user_never_shows_the_password_or_its_hash(shared_server, person):
    for path in ("/" + person, "/"):
        text = shared_server.get(path, user=person, password="pw").text
        for word in ("pwhash", "pwsalt", "password", "scrypt", "pbkdf2"):
            assert word not in text


def test_what_the_server_decides_cannot_be_sent_at_creation(shared_server):
    body = {"password": "pw", "created": "never", "modified": "never", "username": "other", "indexes": {"a": {}}}
    assert shared_server.put("/decided", body).status == 201
    result = shared_server.get("/decided").result
    assert TIMESTAMP.fullmatch(result["created"])
    assert result.get("modified") != "never"
    assert (result["username"], result["indexes"]) == ("decided", {})
    assert shared_server.get("/decided/a").status == 404
    assert shared_server.get("/other").status == 404


def test_an_existing_user_is_409_before_the_body_is_looked_at(shared_server, reader):
    for body in ({"password": "x"}, {"unknown": 1}, {}):
        reply = shared_server.put("/reader", body)
        assert (reply.status, reply.json()["message"]) == (409, "user already exists")
    assert authstatus(shared_server, basic("reader", "pw")) == ["ok", "reader", []]


@pytest.mark.parametrize("body, message", [
    ({}, "password needs to be set"),
    ({"email": "a@example.org"}, "password needs to be set"),
    ({"password": "pw", "foo": 1}, "Unknown keys in user config: foo"),
    ({"password": "pw", "pwhash": "x"}, "Unknown keys in user config: pwhash"),
])
def test_a_user_that_cannot_be_made_is_400(shared_server, body, message):
    reply = shared_server.put("/unmade", body)
    assert (reply.status, reply.json()["message"]) == (400, message)
    assert shared_server.get("/unmade").status == 404


def test_several_unknown_keys_are_all_named(shared_server):
    message = shared_server.put("/unmade", {"password": "pw", "foo": 1, "bar": 2}).json()["message"]
    assert message.startswith("Unknown keys in user config: ")
    assert set(message.split(": ")[1].split(", ")) == {"foo", "bar"}


def test_a_password_has_a_character_at_least(shared_server, person):
    for reply in (shared_server.put("/empty", {"password": ""}),
                  shared_server.patch("/" + person, {"password": ""}, user=person, password="pw"),
                  shared_server.patch("/root", {"password": ""}, user="root", password="secret")):
        assert (reply.status, reply.json()["message"]) == (400, "the password must have at least one character")
    assert shared_server.get("/empty").status == 404
    assert post_login(shared_server, person, "pw").status == 200


def test_root_may_have_an_empty_password_where_the_operator_says_so(make_server):
    server = make_server("--root-passwd", "", root_password=None)
    assert server.patch("/root", {"password": "x"}, user="root", password="").status == 200
    assert post_login(server, "root", "").status == 401
    assert server.patch("/root", {"password": ""}, user="root", password="x").status == 200
    assert post_login(server, "root", "").status == 200
    assert server.put("/other", {"password": ""}).status == 400


def test_a_null_password_matches_nothing(shared_server):
    assert shared_server.put("/locked", {"password": None}).status == 201
    assert [post_login(shared_server, "locked", text).status for text in ("", "None", "null")] == [401, 401, 401]
    assert authstatus(shared_server, basic("locked", "")) == NOBODY


# Wrong shapes


WRONG_SHAPES = ["[]", "5", '"text"', "null", "true", "[1]", '{"password": 5}', '{"password": ["pw"]}',
                '{"password": {"a": 1}}', '{"password": true}']


@pytest.mark.parametrize("body", WRONG_SHAPES)
@pytest.mark.parametrize("method, path", [("PUT", "/shapeless"), ("PATCH", "/reader"), ("POST", "/+login")])
def test_json_of_the_wrong_shape_is_400(shared_server, reader, method, path, body):
    reply = shared_server.request(method, path, body, headers={"Content-Type": "application/json"}, user="reader")
    assert reply.status == 400
    assert reply.json()["message"]


@pytest.mark.parametrize("body", ['{"user": 1, "password": "x"}', '{"user": ["reader"], "password": "pw"}',
                                  '{"user": {"a": 1}, "password": {}}'])
def test_a_login_with_a_user_that_is_no_text_is_400(shared_server, body):
    assert shared_server.post("/+login", body).status == 400


@pytest.mark.parametrize("body", ["", "{", '{"password": "pw"', "password=pw", "\x00", b"\xff\xfe"])
@pytest.mark.parametrize("method, path", [("PUT", "/shapeless"), ("PATCH", "/reader"), ("POST", "/+login")])
def test_what_is_no_json_is_400(shared_server, reader, method, path, body):
    reply = shared_server.request(method, path, body, headers={"Content-Type": "application/json"}, user="reader")
    assert (reply.status, reply.json()["message"]) == (400, "Bad request: could not decode json")


def test_json_nested_without_end_is_400(shared_server, reader):
    body = '{"custom_data": ' + "[" * 30000
    reply = shared_server.patch("/reader", body, headers={"Content-Type": "application/json"}, user="reader")
    assert reply.status == 400


# Listing


def test_the_list_of_users_shows_all_indexes_without_projects(shared_server, person):
    shared_server.login(person, "pw")
    config = shared_server.add_index(person + "/dev")
    assert shared_server.upload(person + "/dev", wheel("listed", "1.0")).status == 200
    everybody = shared_server.get("/").json()
    assert everybody["type"] == "list:userconfig"
    assert everybody["result"][person]["username"] == person
    assert everybody["result"][person]["indexes"] == {"dev": config}
    assert shared_server.get("/" + person).result["indexes"] == {"dev": config}
    assert "projects" not in config


def test_the_list_of_users_may_be_asked_with_a_body(shared_server):
    assert shared_server.get("/", body="{}").json()["type"] == "list:userconfig"


def test_an_unknown_user_is_404(shared_server):
    reply = shared_server.get("/nobody-here")
    assert (reply.status, reply.json()["message"]) == (404, "no user 'nobody-here'")


def test_a_final_slash_after_a_user_is_accepted(shared_server, reader):
    assert shared_server.get("/reader/").json() == shared_server.get("/reader").json()


def test_post_to_a_user_is_404(shared_server, reader):
    assert shared_server.post("/reader", {}, user="reader").status == 404


# Changing


def test_a_change_answers_that_the_user_was_updated(shared_server, person):
    reply = shared_server.patch("/" + person, {"email": "a@example.org"}, user=person, password="pw")
    assert (reply.status, reply.json()) == (200, {"message": "user updated"})
    result = shared_server.get("/" + person).result
    assert result["email"] == "a@example.org"
    assert TIMESTAMP.fullmatch(result["modified"])


def test_a_change_leaves_other_attributes_alone(shared_server, person):
    shared_server.patch("/" + person, {"email": "a@example.org", "title": "t"}, user=person, password="pw")
    shared_server.patch("/" + person, {"title": "u"}, user=person, password="pw")
    result = shared_server.get("/" + person).result
    assert (result["email"], result["title"]) == ("a@example.org", "u")


@pytest.mark.parametrize("empty", ["", None, {}])
def test_an_empty_value_removes_an_attribute(shared_server, person, empty):
    attributes = {"email": "a@example.org", "title": "t", "description": "d", "custom_data": {"a": 1}}
    shared_server.patch("/" + person, attributes, user=person, password="pw")
    assert set(attributes) <= set(shared_server.get("/" + person).result)
    assert shared_server.patch("/" + person, dict.fromkeys(attributes, empty), user=person, password="pw").status == 200
    assert not set(attributes) & set(shared_server.get("/" + person).result)


@pytest.mark.parametrize("key", ["email", "title", "description"])
@pytest.mark.parametrize("value, kind", [({"a": 1}, "an object"), (["a"], "a list"), (5, "a number"), (True, "true or false")])
def test_an_attribute_of_the_wrong_type_is_400(shared_server, person, key, value, kind):
    expected = (400, "'%s' of a user must be a text, not %s" % (key, kind))
    reply = shared_server.patch("/" + person, {key: value}, user=person, password="pw")
    assert (reply.status, reply.json()["message"]) == expected
    reply = shared_server.put("/mistyped", {"password": "x", key: value})
    assert (reply.status, reply.json()["message"]) == expected
    assert key not in shared_server.get("/" + person).result


def test_foreign_keys_in_a_change_are_ignored(shared_server, person):
    before = shared_server.get("/" + person)
    foreign = {"created": "x", "modified": "x", "username": "root", "indexes": {"a": {}}, "pwhash": "x", "pwsalt": "x", "foo": 1}
    reply = shared_server.patch("/" + person, foreign, user=person, password="pw")
    assert (reply.status, reply.json()) == (200, {"message": "user updated"})
    after = shared_server.get("/" + person)
    assert after.json() == before.json()
    assert serial_of(after) == serial_of(before)
    assert authstatus(shared_server, basic(person, "pw")) == ["ok", person, []]


def test_the_whole_object_can_be_sent_back_with_a_change(shared_server, person):
    shared_server.patch("/" + person, {"email": "a@example.org"}, user=person, password="pw")
    whole = dict(shared_server.get("/" + person).result, title="t")
    assert shared_server.patch("/" + person, whole, user=person, password="pw").status == 200
    result = shared_server.get("/" + person).result
    assert (result["email"], result["title"], result["created"]) == ("a@example.org", "t", whole["created"])


def test_a_change_to_the_same_value_takes_no_serial(shared_server, person):
    first = shared_server.patch("/" + person, {"title": "t"}, user=person, password="pw")
    again = shared_server.patch("/" + person, {"title": "t"}, user=person, password="pw")
    assert (again.status, serial_of(again)) == (200, serial_of(first))


def test_a_change_raises_the_serial_by_one(shared_server, person):
    before = serial_of(shared_server.get("/" + person))
    assert serial_of(shared_server.patch("/" + person, {"title": "t"}, user=person, password="pw")) == before + 1
    assert serial_of(shared_server.get("/" + person)) == before + 1


def test_others_may_not_change_a_user(shared_server, reader, person):
    modify = "no permission to modify user " + person
    change = "no permission to change password for user " + person
    cases = [({"email": "x"}, modify), ({"password": "x", "email": "x"}, modify), ({"password": "x"}, change)]
    for body, message in cases:
        for who in ({}, {"user": "reader"}):
            reply = shared_server.patch("/" + person, body, **who)
            assert (reply.status, reply.json()["message"]) == (403, message)
    assert "email" not in shared_server.get("/" + person).result
    assert authstatus(shared_server, basic(person, "pw")) == ["ok", person, []]


def test_root_may_change_every_user(shared_server, person):
    shared_server.login("root", "secret")
    assert shared_server.patch("/" + person, {"email": "a@example.org"}, user="root").status == 200
    reply = shared_server.patch("/" + person, {"password": "new"}, user="root")
    assert (reply.status, reply.json()["type"]) == (200, "userpassword")
    assert authstatus(shared_server, basic(person, "new")) == ["ok", person, []]


def test_changing_an_unknown_user_is_404(shared_server):
    shared_server.login("root", "secret")
    reply = shared_server.patch("/nobody-here", {"email": "x"}, user="root")
    assert (reply.status, reply.json()["message"]) == (404, "no user 'nobody-here'")


# Deleting


def test_deleting_a_user_deletes_indexes_and_files(shared_server, person):
    shared_server.login(person, "pw")
    shared_server.add_index(person + "/dev")
    assert shared_server.upload(person + "/dev", wheel("gone", "1.0")).status == 200
    url = shared_server.simple(person + "/dev", "gone")["files"][0]["url"]
    path = "/%s/dev/+f/%s" % (person, url.split("#")[0].split("+f/")[1])
    assert shared_server.get(path, headers={"Accept": None}).status == 200
    reply = shared_server.delete("/" + person, user=person)
    assert (reply.status, reply.json()) == (200, {"message": "user '%s' deleted" % person})
    assert shared_server.get("/" + person).status == 404
    assert person not in shared_server.get("/").result
    assert shared_server.get("/%s/dev" % person).status == 404
    assert shared_server.get("/%s/dev/+simple/gone/" % person).status == 404
    assert shared_server.get(path, headers={"Accept": None}).status == 410


def test_a_user_with_a_non_volatile_index_cannot_be_deleted(shared_server, person):
    shared_server.login(person, "pw")
    shared_server.add_index(person + "/dev")
    shared_server.add_index(person + "/prod", volatile=False)
    reply = shared_server.delete("/" + person, user=person)
    assert (reply.status, reply.json()["message"]) == (403, "user '%s' has non-volatile index: prod" % person)
    assert shared_server.get("/%s/dev" % person).status == 200
    assert shared_server.patch("/%s/prod" % person, {"volatile": True}, user=person).status == 200
    assert shared_server.delete("/" + person, user=person).status == 200


def test_others_may_not_delete_a_user(shared_server, reader, person):
    assert shared_server.delete("/" + person).status == 403
    assert shared_server.delete("/" + person, user="reader").status == 403
    assert shared_server.get("/" + person).status == 200


def test_root_may_delete_others_but_never_root(shared_server, person):
    shared_server.login("root", "secret")
    assert shared_server.delete("/" + person, user="root").status == 200
    assert shared_server.delete("/root", user="root").status == 403
    assert shared_server.get("/root").status == 200


def test_deleting_an_unknown_user_is_404_for_root(shared_server):
    shared_server.login("root", "secret")
    reply = shared_server.delete("/nobody-here", user="root")
    assert (reply.status, reply.json()["message"]) == (404, "no user 'nobody-here'")


# --restrict-modify


def test_restricted_only_the_list_may_create_users(restricted):
    for who in ({}, {"user": "alice"}):
        assert restricted.put("/made", {"password": "pw"}, **who).status == 403
    assert restricted.put("/made", {"password": "pw"}, user="admin").status == 201


def test_restricted_a_user_may_change_only_the_own_password(restricted):
    reply = restricted.patch("/bob", {"email": "x"}, user="bob")
    assert (reply.status, reply.json()["message"]) == (403, "no permission to modify user bob")
    reply = restricted.patch("/bob", {"password": "pw", "email": "x"}, user="bob")
    assert (reply.status, reply.json()["message"]) == (403, "no permission to modify user bob")
    reply = restricted.patch("/bob", {"password": "pw"}, user="alice")
    assert (reply.status, reply.json()["message"]) == (403, "no permission to change password for user bob")
    assert restricted.patch("/bob", {"password": "new"}, user="bob").json()["type"] == "userpassword"
    restricted.login("bob", "new")
    shown = {**restricted.get("/bob").result, "password": "newer"}      # as devpi's client sends it: all that it was shown
    assert restricted.patch("/bob", shown, user="bob").json()["type"] == "userpassword"
    restricted.login("bob", "newer")
    assert restricted.patch("/bob", {**shown, "email": "other"}, user="bob").status == 403
    assert restricted.patch("/bob", {"password": "pw"}, user="admin").json()["type"] == "userpassword"
    assert restricted.patch("/bob", {"email": "x"}, user="admin").status == 200
    restricted.login("bob", "pw")


def test_restricted_only_the_list_may_manage_indexes(restricted):
    reply = restricted.put("/alice/dev", {}, user="alice")
    assert (reply.status, reply.json()["message"]) == (403, "no permission to create index alice/dev")
    assert restricted.put("/alice/dev", {}, user="admin").status == 200
    assert restricted.patch("/alice/dev", {"title": "x"}, user="alice").status == 403
    assert restricted.patch("/alice/dev", {"title": "x"}, user="admin").status == 200
    assert restricted.delete("/alice/dev", user="alice").status == 403
    assert restricted.delete("/alice/dev", user="admin").status == 201


def test_restricted_uploads_stay_with_the_upload_list(restricted):
    assert restricted.put("/alice/up", {}, user="root").status == 200
    assert restricted.upload("alice/up", wheel("mine", "1.0"), user="alice", password="pw").status == 200
    assert restricted.upload("alice/up", wheel("mine", "2.0"), user="admin", password="pw").status == 403
    assert restricted.delete("/alice/up/mine", user="bob").status == 403
    assert restricted.delete("/alice/up/mine", user="admin").status == 200
    assert restricted.upload("alice/up", wheel("mine", "3.0"), user="alice", password="pw").status == 200
    assert restricted.delete("/alice/up/mine", user="alice").status == 200


def test_restricted_nobody_on_the_list_may_delete_himself_or_root(restricted):
    restricted.put("/leaving", {"password": "pw"}, user="admin")
    assert restricted.delete("/leaving", user="leaving", password="pw").status == 403
    assert restricted.delete("/leaving", user="admin").status == 200
    assert restricted.delete("/admin", user="admin").status == 403
    for who in ("admin", "root"):
        assert restricted.delete("/root", user=who).status == 403
    assert restricted.get("/root").status == 200


def test_an_empty_restrict_list_means_nobody(tmp_path):
    server = Server(tmp_path / "nobody", "--restrict-modify=").start()
    try:
        server.login("root", "secret")
        assert server.put("/alice", {"password": "pw"}).status == 403
        assert server.put("/alice", {"password": "pw"}, user="root").status == 403
        assert server.put("/root/dev", {}, user="root").status == 403
        assert server.patch("/root", {"password": "new"}, user="root").status == 200
    finally:
        server.stop()


# Who may make users, and see their addresses, from where


ELSEWHERE = {"X-Real-IP": "192.0.2.9"}
HIDDEN = {"X-Forwarded-For": "192.0.2.9, 127.0.0.1"}     # a proxy that does not say it in the header that counts


@pytest.mark.parametrize("headers, status", [
    ({}, 201), ({"X-Real-IP": "127.0.0.1"}, 201), ({"X-Real-IP": "::1"}, 201), ({"X-Real-IP": "::ffff:127.0.0.1"}, 201),
    ({"X-Real-IP": "127.0.0.1", "X-Forwarded-For": "127.0.0.1"}, 201), (ELSEWHERE, 403), (HIDDEN, 403),
    ({"X-Real-IP": "2001:db8::1"}, 403), ({"Forwarded": "for=127.0.0.1"}, 403)])
def test_users_are_made_by_anybody_on_this_machine_only(shared_server, reader, headers, status):
    name = "local%d" % next(numbers)
    assert shared_server.put("/" + name, {"password": "x"}, headers=headers).status == status
    assert shared_server.get("/" + name).status == (200 if status == 201 else 404)


def test_from_elsewhere_root_makes_users(shared_server, reader):
    shared_server.login("root", "secret")
    for user, status in ((None, 403), ("reader", 403), ("root", 201)):
        reply = shared_server.put("/distant", {"password": "x"}, user=user, headers=ELSEWHERE)
        assert reply.status == status
        if status == 403:
            assert "--open-registration" in reply.json()["message"] and "--restrict-modify" in reply.json()["message"]


def test_restrict_modify_counts_from_everywhere(restricted):
    for headers in ({}, ELSEWHERE):
        assert restricted.put("/distant", {"password": "x"}, headers=headers).status == 403
    assert restricted.put("/distant", {"password": "x"}, headers=ELSEWHERE, user="admin").status == 201


def test_open_registration_lets_everybody_make_a_few_users(make_server):
    server = make_server("--open-registration")
    statuses = [server.put("/user%d" % n, {"password": "x"}, headers=ELSEWHERE).status for n in range(22)]
    assert statuses[0] == 201 and statuses[-1] == 429 and set(statuses) == {201, 429}
    assert server.put("/other", {"password": "x"}, headers={"X-Real-IP": "192.0.2.10"}).status == 201
    assert server.put("/root-made", {"password": "x"}, headers=ELSEWHERE, user="root", password="secret").status == 201


def test_email_addresses_are_for_who_is_logged_in_or_on_this_machine(shared_server, reader, person):
    assert shared_server.patch("/" + person, {"email": "a@b.example"}, user=person, password="pw").status == 200
    for headers, user, seen in (({}, None, True), (ELSEWHERE, None, False), (HIDDEN, None, False), (ELSEWHERE, "reader", True)):
        one = shared_server.get("/" + person, headers=headers, user=user).result
        every = shared_server.get("/", headers=headers, user=user).result
        assert ("email" in one, "email" in every[person]) == (seen, seen)


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize("path", ["/+changelog", "/+changelog/5", "/+changelog/5-"])
def test_there_is_no_feed_for_replicas_of_devpi(shared_server, method, path):
    assert shared_server.request(method, path).status == 403


# -- a login that ends while a body arrives


def test_what_a_login_began_that_has_ended_since_is_not_done(shared_server):
    server = shared_server
    server.add_user("late", password="pw")
    server.add_index("late/dev", bases=[])
    assert server.upload("late/dev", wheel("demo", "1.0")).status == 200
    credentials = base64.b64encode(b"late:pw").decode()
    changes = [("PATCH", "/late/dev", {"acl_upload": ["mallory"]}), ("PUT", "/late/new", {}),
               ("PATCH", "/late/dev/demo/1.0", {"yanked": True}),
               ("PATCH", "/late/dev/demo", {"project-status": {"status": "archived"}}),
               ("PATCH", "/late", {"title": "changed"})]
    wires = []
    for method, path, body in changes:
        wires.append(Wire(server, (
            "%s %s HTTP/1.1\r\nHost: localhost\r\nAuthorization: Basic %s\r\n"
            "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"
            % (method, path, credentials)).encode()))
    before = server.get("/late", user="root").result, server.get("/late/dev/demo/1.0").result
    time.sleep(0.3)
    assert server.patch("/late", {"password": "other"}, user="root").status == 200
    time.sleep(0.5)
    for wire, (_, _, body) in zip(wires, changes):
        rest = json.dumps(body)[1:].encode()
        wire.send(b"%x\r\n%s\r\n0\r\n\r\n" % (len(rest), rest))
        assert wire.reply().status in (401, 403)
    after = server.get("/late", user="root").result, server.get("/late/dev/demo/1.0").result
    assert [dict(shown, modified=0) for shown in after] == [dict(shown, modified=0) for shown in before]
