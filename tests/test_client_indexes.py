"""The client's accounts and indexes: user, passwd, index, getjson, patchjson."""

import itertools
import json

import pytest

from client import Client, POSIX
from harness import new_index, wheel

NUMBERS = itertools.count()
STAGE = ["  type=stage", "  bases=", "  volatile=True", "  acl_upload=alice", "  acl_toxresult_upload=:ANONYMOUS:",
         "  mirror_whitelist=", "  mirror_whitelist_inheritance=intersection"]


@pytest.fixture
def name():
    """Of a user that there isn't yet."""
    return "person%d" % next(NUMBERS)


def can_log_in(site, name, password):
    return site.post("/+login", {"user": name, "password": password}).status == 200


# -- users


def test_a_user_is_created_shown_changed_and_deleted(devpi, site, name):
    create = ["user", "-c", name, "password=first-password", "email=a@example.com"]
    assert devpi(*create) == "user created: %s\n" % name
    assert "409 Conflict: user already exists" in devpi(*create, expect=1).lines
    assert {name, "alice", "root"} <= set(devpi("user", "-l").lines) and devpi("user", "-l").lines == \
        sorted(devpi("user", "-l").lines)
    devpi("login", name, "--password", "first-password")
    printed = devpi("user", "-m", name, "password=second-password", "title=A Person")
    assert sorted(printed.lines) == [
        "/%s changing password: ********" % name, "/%s changing title: A Person" % name, "user modified: " + name]
    assert can_log_in(site, name, "second-password") and not can_log_in(site, name, "first-password")
    shown = devpi("user").lines
    assert shown[0] == "%s/%s:" % (site.url, name)
    assert [line.partition("=")[0] for line in shown[1:]] == ["  created", "  email", "  modified", "  title"]
    assert {"  email=a@example.com", "  title=A Person"} <= set(shown)
    devpi("user", name, "title=")
    assert "title" not in devpi("user", name)
    printed = devpi("user", "--delete", name, input="no\n")
    assert "About to remove: %s/%s" % (site.url, name) in printed.lines and "not deleting anything" in printed
    assert devpi("user", "-y", "--delete", name).lines[-1] == "user deleted: " + name
    assert name not in devpi("user", "-l").lines


def test_a_new_password_of_ones_own_keeps_the_login(devpi, site, name):
    """Our server ends the old sessions; the fresh one comes with the answer."""
    site.add_user(name, "first-password")
    devpi.sign_in(site, name)
    devpi("user", "-m", name, "password=second-password")
    assert "(logged in as %s)" % name in devpi("use")
    assert devpi("index", "-c", "dev").lines[0] == "%s/%s/dev:" % (site.url, name)


def test_what_a_user_may_not_do_is_refused_with_the_reason(devpi, site, name):
    for arguments, reason in [
            (["-m", "bob", "title=Mine"], "403 Forbidden: no permission to modify user bob"),
            (["-y", "--delete", "bob"], "403 Forbidden"),
            (["ghost"], "404 Not Found: no user 'ghost'"),
            (["-c"], "need to specify a username"),
            (["--delete"], "need to specify a username"),
            (["-c", "a/b", "password=12345678"], "a/b"),
            (["bob", "noequals"], "noequals"),
            (["-c", name, "nonsense=1", "password=12345678"], "400 Bad Request")]:
        assert reason in devpi("user", *arguments, expect=1), arguments
    devpi.sign_in(site)
    assert "no user specified and no user currently active" in devpi("user", expect=1)
    assert "no user specified and no user currently active" in devpi("passwd", expect=1)


@pytest.mark.skipif(not POSIX, reason="needs a pseudo terminal")
def test_a_password_is_asked_for_twice_and_never_shown(devpi, site, name):
    with devpi.terminal("user", "-c", name) as terminal:
        for typed in ("one", "another"):
            terminal.expect("new password for user %s:" % name)
            terminal.type("a-long-%s\r" % typed)
            terminal.expect("repeat new password for user %s:" % name)
            terminal.type("a-long-password\r")
            terminal.expect("passwords did not match")
        for question in ("new password for user %s:" % name, "repeat new password"):
            terminal.expect(question)
            terminal.type("a-long-password\r")
        assert terminal.wait() == 0
    assert can_log_in(site, name, "a-long-password") and "a-long-password" not in terminal.shown
    devpi.sign_in(site, "root")
    with devpi.terminal("passwd", name) as terminal:
        for question in ("new password for user %s:" % name, "repeat new password"):
            terminal.expect(question)
            terminal.type("short\r")
        terminal.expect("(yes/no)?")
        terminal.type("yes\r")
        assert terminal.wait() == 0
    assert can_log_in(site, name, "short")


@pytest.mark.skipif(not POSIX, reason="needs a pseudo terminal")
def test_three_different_repetitions_change_nothing(devpi, site, name):
    site.add_user(name, "first-password")
    devpi.sign_in(site, name)
    with devpi.terminal("passwd") as terminal:
        for number in range(3):
            for typed in ("a-password-%d", "another-password-%d"):
                terminal.expect("new password for user %s:" % name)
                terminal.type(typed % number + "\r")
            terminal.expect("passwords did not match")
        assert terminal.wait() == 1
    assert "password not changed" in terminal.shown and can_log_in(site, name, "first-password")
    devpi("passwd", expect=1)
    assert can_log_in(site, name, "first-password")
    devpi("passwd", "--password-file", "-", input="next-password\n")
    assert can_log_in(site, name, "next-password")


def test_questions_take_yes_or_no_and_an_end_of_input_is_no_answer(devpi, site, name):
    site.add_user(name)
    devpi.sign_in(site, "root")
    printed = devpi("user", "--delete", name, expect=1)
    assert "no input available, use -y to confirm" in printed
    printed = devpi("-y", "user", "--delete", name)
    assert printed.lines[-2:] == ["Are you sure (yes/no)? yes (autoset from -y option)", "user deleted: " + name]
    site.add_user(name)
    printed = devpi("user", "--delete", name, input="maybe\nyes\n")
    assert "not a valid choice 'maybe'" in printed and printed.lines[-1].endswith("user deleted: " + name)


# -- indexes


def test_an_index_is_created_shown_changed_listed_and_deleted(devpi, site, index):
    name = "team%d" % next(NUMBERS)
    shown = devpi("index", "-c", name, "bases=" + index, "volatile=False").lines
    expected = [site.url + "/alice/%s:" % name] + STAGE
    expected[2:4] = ["  bases=" + index, "  volatile=False"]
    assert shown == expected
    assert devpi("index", "--no-projects", name).lines == devpi("index", "alice/" + name).lines == expected
    assert "409 Conflict: index 'alice/%s' exists" % name in devpi("index", "-c", name, expect=1).lines
    printed = devpi("index", name, "title=For the team", "acl_upload+=bob", "bases=")
    assert printed.lines[:3] == ["/alice/%s %s" % (name, change) for change in (
        "title=For the team", "acl_upload+=bob", "bases=")]
    assert {"  title=For the team", "  acl_upload=alice,bob", "  bases="} <= set(printed.lines)
    assert "  title=" not in devpi("index", name, "title-=", "acl_upload-=bob")
    assert {index, "alice/" + name} <= set(devpi("index", "-l").lines)
    lonely = "lonely%d" % next(NUMBERS)
    site.add_user(lonely)
    assert devpi("index", "-l", lonely).lines == []
    assert "403 Forbidden: index alice/%s non-volatile, cannot delete" % name in \
        devpi("index", "-y", "--delete", name, expect=1).lines
    devpi("index", name, "volatile=True")
    printed = devpi("index", "--delete", name, input="no\n")
    assert "About to remove: %s/alice/%s" % (site.url, name) in printed.lines and "not deleting anything" in printed
    assert devpi("-y", "index", "--delete", name).lines[-1] == "index deleted: %s/alice/%s" % (site.url, name)
    assert "alice/" + name not in devpi("index", "-l").lines


def test_without_a_name_the_current_index_is_shown_and_changed(devpi, site, index):
    assert "  volatile=False" in devpi("index", "description=mine", "volatile=no").lines
    shown = devpi("index").lines
    assert shown[0] == "%s/%s:" % (site.url, index) and "  description=mine" in shown
    other = new_index(site, "alice")
    assert devpi("index", DEVPI_INDEX=other).lines[-8] == "%s/%s:" % (site.url, other)


@pytest.mark.parametrize("kind", ["index", "user"])
def test_what_others_build_on_is_deleted_by_force_only(devpi, site, kind):
    owner = "owner-" + new_index(site, "alice").partition("/")[2]
    site.add_user(owner)
    site.add_index(owner + "/base")
    above = new_index(site, "bob", bases=[owner + "/base"])
    devpi.sign_in(site, owner, owner + "/base")
    name = owner + "/base" if kind == "index" else owner
    refused = devpi(kind, "-y", "--delete", name, expect=1)
    assert "409 Conflict: " in refused and above in refused
    assert refused.lines[-1] == "--force does it, and takes it out of their bases"
    assert "%s deleted" % kind in devpi(kind, "-y", "--delete", "--force", name)
    assert site.get("/" + above).result["bases"] == []


def test_a_mirror_shows_its_own_settings(devpi, site):
    name = "mirror%d" % next(NUMBERS)
    shown = devpi("index", "-c", name, "type=mirror", "mirror_url=https://example.org/simple/", "title=PyPI").lines
    assert shown[1:] == ["  type=mirror", "  volatile=True", "  mirror_url=https://example.org/simple/", "  title=PyPI"]


@pytest.mark.parametrize("features", [None, []])
def test_what_the_server_says_beside_the_settings_is_a_warning(devpi, site, index, features):
    """Also for servers that get the whole configuration."""
    if features is not None:
        devpi.write_state("current.json", dict(devpi.state(), features=features))
    warning = "there is no user 'typo', named in acl_upload"
    for words in (["-c", "warned%d" % next(NUMBERS)], []):
        printed = devpi("index", *words, "acl_upload=alice,typo")
        assert warning in printed.errors and warning not in printed
        assert "  acl_upload=alice,typo" in printed.lines
    printed = devpi("index", "--json", "acl_upload=alice,typing-error")
    assert printed.json()["note"] == "there is no user 'typing-error', named in acl_upload"
    assert printed.json()["note"] in printed.errors
    assert "note" not in devpi("index", "--json", "title=quiet").json()
    assert devpi("index", "title=still").errors == ""


def test_settings_that_can_not_be_are_refused_with_the_reason(devpi, site, index):
    before = site.get("/" + index).result
    for arguments, reason in [
            (["volatile=maybe"], "400 Bad Request: Unknown boolean value 'maybe'."),
            (["bases+=alice/nope"], "400 Bad Request: base index 'alice/nope' does not exist"),
            (["foo=bar"], "400 Bad Request: indexconfig got unexpected keyword arguments: foo=bar"),
            (["volatile-="], "400 Bad Request: Default values can't be removed."),
            ([index, "noequals"], "arguments must be format NAME=VALUE: ['noequals']"),
            (["-c", "root/theirs"], "403 Forbidden: no permission to create index root/theirs"),
            (["-c"], "need to explicitly specify index for deletion/creation"),
            (["-y", "--delete"], "need to explicitly specify index for deletion/creation"),
            (["-y", "--delete", index, "a=b"], "cannot delete if you specify key=values"),
            (["alice/nope"], "404 Not Found")]:
        assert reason in devpi("index", *arguments, expect=1), arguments
    devpi.sign_in(site, None, index)
    assert "you need to be logged in (use 'devpi login USER')" in devpi("index", "volatile=False", expect=1)
    assert site.get("/" + index).result == before


def test_a_server_without_key_value_parsing_gets_the_whole_configuration(devpi, site, index):
    """As servers before 6 want it: the client merges; lists can't be added to."""
    devpi.write_state("current.json", dict(devpi.state(), features=[]))
    printed = devpi("index", "title=Merged")
    assert "/%s changing title: Merged" % index in printed.lines and "  title=Merged" in printed.lines
    assert site.get("/" + index).result["title"] == "Merged"
    devpi("index", "acl_upload+=bob", expect=1)
    assert site.get("/" + index).result["acl_upload"] == ["alice"]


def test_indexes_and_users_as_json(devpi, site, index):
    assert json.dumps(devpi("index", "--json").json()).count('"volatile": true') == 1
    assert index in json.dumps(devpi("index", "-l", "--json").json())
    assert "alice" in json.dumps(devpi("user", "-l", "--json").json())


# -- getjson, patchjson


def test_getjson_shows_what_the_server_sends(devpi, site, index):
    site.upload(index, wheel("shown", "1.0"))
    printed = devpi("getjson", "/" + index)
    assert printed.json()["result"]["projects"] == ["shown"]
    assert printed == json.dumps(printed.json(), indent=4, sort_keys=True) + "\n"
    assert devpi("getjson", site.url + "/" + index) == printed
    assert devpi("getjson", "shown/1.0").json()["type"] == "versiondata"
    assert "projects" not in devpi("getjson", "/%s?no_projects=" % index).json()["result"]
    head, _, body = devpi("getjson", "-v", "/" + index).partition("\n\n")
    lines = head.splitlines()
    assert lines[0] == "GET REQUEST sent to %s/%s" % (site.url, index)
    assert {"CONTENT-TYPE: application/json", "X-DEVPI-API-VERSION: 2"} <= set(lines[1:]) and lines[1:] == sorted(lines[1:])
    assert json.loads(body) == printed.json()
    assert "404 Not Found: no user 'ghost'" in devpi("getjson", "/ghost", expect=1)


def test_patchjson_sends_what_a_file_or_stdin_says(devpi, site, index):
    first, _, body = devpi("patchjson", "/" + index, devpi.write("change.json", '{"title": "patched"}')).partition("\n")
    assert first == "PATCH REQUEST sent to %s/%s" % (site.url, index)
    assert json.loads(body)["result"]["title"] == "patched"
    devpi("patchjson", "/" + index, "-", input='["title-=", "acl_upload+=bob"]')
    config = site.get("/" + index).result
    assert "title" not in config and config["acl_upload"] == ["alice", "bob"]
    assert "400 Bad Request: Unknown boolean value 'maybe'." in \
        devpi("patchjson", "/" + index, "-", input='{"volatile": "maybe"}', expect=1)
    assert "nope.json" in devpi("patchjson", "/" + index, "nope.json", expect=1)
    assert devpi("patchjson", "/" + index, "-", input="{", expect=1)


def test_json_needs_to_know_the_server_and_the_index(tmp_path, site):
    nobody = Client(tmp_path / "nobody")
    assert "no server currently selected" in nobody("getjson", "/", expect=1)
    nobody.sign_in(site)
    assert "cannot use relative path without an active index" in nobody("getjson", "demo", expect=1)
