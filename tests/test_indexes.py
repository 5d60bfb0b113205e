"""Indexes: their configuration, its changes and checks, and who may read them [W8, W9]."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

import devpi_lite as d
from harness import SIMPLE_JSON, serial_of, user_pass, wheel

STAGE = {
    "type": "stage", "volatile": True, "bases": [], "acl_upload": ["alice"], "acl_toxresult_upload": [":ANONYMOUS:"],
    "mirror_whitelist": [], "mirror_whitelist_inheritance": "intersection",
}
URL = "http://127.0.0.1:9/simple/"
MIRROR = {"type": "mirror", "volatile": True, "mirror_url": URL}
NOT_ALLOWED = "contains characters that aren't allowed. Any ascii symbol besides -.@_ is blocked."
CHALLENGE = 'Basic realm="pypi"'
DEFAULTS_STAY = "Default values can't be removed."
NO_CHANGES = "The requested modifications resulted in no changes"

numbers = itertools.count(1)


@pytest.fixture(scope="module")
def alice(shared_server):
    """The shared server with the users alice, bob and root logged in (passwords `pw`, root `secret`)."""
    for name in ("alice", "bob"):
        shared_server.add_user(name, "pw")
        shared_server.login(name, "pw")
    shared_server.login("root", "secret")
    return shared_server


@pytest.fixture
def index(alice):
    """The name of a fresh stage of alice's."""
    name = "alice/" + fresh("dev")
    alice.add_index(name)
    return name


@pytest.fixture
def mirror(alice):
    """The name of a fresh mirror of alice's, whose upstream does not answer."""
    name = "alice/" + fresh("mirror")
    alice.add_mirror(name, URL)
    return name


def fresh(word):
    return "%s%d" % (word, next(numbers))


def create(server, body, user="alice"):
    return server.put("/alice/" + fresh("new"), body, user=user)


def change(server, index, body, query="", user="alice"):
    return server.patch("/" + index + query, body, user=user)


def config(server, index, user=None):
    reply = server.get("/%s?no_projects=" % index, user=user)
    assert reply.status == 200
    return reply.result


def versions(server, index, project, **options):
    """The versions on the page, which has them in no promised order."""
    return sorted(server.versions(index, project, **options))


def message(reply):
    return reply.status, reply.json()["message"]


# Creating


def test_a_new_stage_has_all_defaults(alice):
    reply = create(alice, {})
    assert reply.status == 200
    assert reply.headers.get("Content-Type") == "application/json"
    assert reply.json() == {"type": "indexconfig", "result": STAGE}


def test_a_new_mirror_has_only_what_was_given_and_volatile(alice):
    reply = create(alice, {"type": "mirror", "mirror_url": URL})
    assert (reply.status, reply.json()) == (200, {"type": "indexconfig", "result": MIRROR})


def test_root_may_create_for_others_and_the_owner_may_upload(alice):
    reply = create(alice, {}, user="root")
    assert (reply.status, reply.result["acl_upload"]) == (200, ["alice"])


def test_others_may_not_create(alice):
    for who in (None, "bob"):
        reply = alice.put("/alice/foreign", {}, user=who)
        assert message(reply) == (403, "no permission to create index alice/foreign")
    assert alice.get("/alice/foreign").status == 404


def test_creating_checks_the_user_then_the_index_then_the_right_then_the_body(alice, index):
    wrong = {"unknown": 1}
    assert message(alice.put("/nobody-here/dev", wrong)) == (404, "no user 'nobody-here'")
    assert message(alice.put("/" + index, wrong)) == (409, "index '%s' exists" % index)
    assert message(alice.put("/alice/foreign", wrong)) == (403, "no permission to create index alice/foreign")
    assert alice.put("/alice/foreign", wrong, user="alice").status == 400


@pytest.mark.parametrize("symbol", list("!\"#$%&'()*,:;<=>?[\\]^`{|}~ \n"))
def test_an_index_name_with_a_blocked_character_is_400(alice, symbol):
    reply = alice.put("/alice/d%%%02xe" % ord(symbol), {}, user="alice")
    assert reply.status == 400
    assert reply.json()["message"].endswith(NOT_ALLOWED)


def test_the_refusal_of_an_index_name_quotes_it(alice):
    assert message(alice.put("/alice/d%20e", {}, user="alice")) == (400, "indexname 'd e' " + NOT_ALLOWED)


def test_an_index_name_with_a_plus_is_never_routed(alice):
    for path in ("/alice/a+b", "/alice/a%2Bb"):
        assert alice.put(path, {}, user="alice").status == 404
        assert alice.get(path).status == 404


def test_creating_with_a_final_slash_is_the_same(alice):
    name = "alice/" + fresh("slash")
    assert alice.put("/%s/" % name, {}, user="alice").status == 200
    assert alice.get("/" + name).status == alice.get("/%s/" % name).status == 200


# Values


@pytest.mark.parametrize("given, stored", [
    ({"volatile": True}, {}),
    ({"volatile": False}, {"volatile": False}),
    ({"volatile": "TRUE"}, {}),
    ({"volatile": "yes"}, {}),
    ({"volatile": "No"}, {"volatile": False}),
    ({"volatile": "false"}, {"volatile": False}),
    ({"acl_upload": "bob, alice,,"}, {"acl_upload": ["bob", "alice"]}),
    ({"acl_upload": ["bob", ":group"]}, {"acl_upload": ["bob", ":group"]}),
    ({"acl_upload": ":anonymous:,:Authenticated:"}, {"acl_upload": [":ANONYMOUS:", ":AUTHENTICATED:"]}),
    ({"acl_upload": ""}, {"acl_upload": []}),
    ({"acl_upload": []}, {"acl_upload": []}),
    ({"acl_upload": "never-made"}, {"acl_upload": ["never-made"]}),
    ({"acl_toxresult_upload": "alice"}, {"acl_toxresult_upload": ["alice"]}),
    ({"mirror_whitelist": "He_llo.World,*"}, {"mirror_whitelist": ["he-llo-world", "*"]}),
    ({"mirror_whitelist": ["A__b"]}, {"mirror_whitelist": ["a-b"]}),
    ({"mirror_whitelist_inheritance": "UNION"}, {"mirror_whitelist_inheritance": "union"}),
    ({"bases": ""}, {}),
    ({"type": "stage", "title": "T", "description": "d", "custom_data": {"a": [1]}},
     {"title": "T", "description": "d", "custom_data": {"a": [1]}}),
    ({"projects": ["ignored"]}, {}),
])
def test_stage_values_are_coerced_as_clients_send_them(alice, given, stored):
    reply = create(alice, given)
    assert reply.status == 200
    assert reply.result == dict(STAGE, **stored)


@pytest.mark.parametrize("given, stored", [
    ({"volatile": "no"}, {"volatile": False}),
    ({"mirror_cache_expiry": "60"}, {"mirror_cache_expiry": 60}),
    ({"mirror_cache_expiry": 0}, {"mirror_cache_expiry": 0}),
    ({"mirror_no_project_list": "YES"}, {"mirror_no_project_list": True}),
    ({"mirror_use_external_urls": "false"}, {"mirror_use_external_urls": False}),
    ({"mirror_ignore_serial_header": True}, {"mirror_ignore_serial_header": True}),
    ({"mirror_provides_core_metadata": "true"}, {"mirror_provides_core_metadata": True}),
    ({"mirror_web_url_fmt": "https://pypi.org/project/{name}/"}, {"mirror_web_url_fmt": "https://pypi.org/project/{name}/"}),
    ({"title": "PyPI"}, {"title": "PyPI"}),
    ({"bases": "no/where", "acl_upload": "bob", "mirror_whitelist": "*"}, {}),
])
def test_mirror_values_are_coerced_and_stage_keys_of_old_clients_dropped(alice, given, stored):
    reply = create(alice, dict({"type": "mirror", "mirror_url": URL}, **given))
    assert reply.status == 200
    assert reply.result == dict(MIRROR, **stored)


@pytest.mark.parametrize("key", ["title", "description", "mirror_web_url_fmt"])
@pytest.mark.parametrize("value, kind", [({"a": 1}, "an object"), (["a"], "a list"), (5, "a number"), (True, "true or false")])
def test_a_text_of_the_wrong_type_is_400(alice, index, mirror, key, value, kind):
    expected = (400, "'%s' of an index must be a text, not %s" % (key, kind))
    assert message(change(alice, mirror, {key: value})) == expected
    assert message(create(alice, {"type": "mirror", "mirror_url": URL, key: value})) == expected
    if key != "mirror_web_url_fmt":
        assert message(change(alice, index, {key: value})) == expected
    assert config(alice, mirror) == MIRROR


def test_a_base_may_be_written_with_a_slash_in_front(alice, index, mirror):
    child = "alice/" + fresh("child")
    for written in ("/" + mirror, ["/" + mirror, index], "/%s,/%s" % (index, mirror)):
        assert alice.put("/" + child, {"bases": written}, user="alice").status == 200
        assert config(alice, child)["bases"] in ([mirror], [mirror, index], [index, mirror])
        assert change(alice, child, {"bases": "/" + index}).result["bases"] == [index]
        assert change(alice, child, ["bases=/" + mirror]).result["bases"] == [mirror]
        assert change(alice, child, ["bases+=/" + index, "bases+=" + index]).result["bases"] == [mirror, index]
        assert change(alice, child, ["bases-=/" + mirror]).result["bases"] == [index]
        assert alice.delete("/" + child, user="alice").status == 201
    for wrong in ("//" + mirror, "/a/b/c", "/bad", "/"):
        assert change(alice, index, {"bases": wrong}).status == 400


def test_what_is_mistyped_is_told_with_what_there_is(alice, index):
    user = fresh("typist")
    alice.add_user(user)
    alice.add_index(user + "/dev")
    alice.add_index(user + "/prod")
    alice.add_index(user + "/devil", acl_pkg_read=[user])
    lost = "The stage %s/dve could not be found." % user
    for path in ("/%s/dve", "/%s/dve/+simple/foo/", "/%s/dve/foo/1.0"):
        assert message(alice.get(path % user)) == (404, lost + " (%s has: dev, prod)" % user)
    assert "devil" in message(alice.get("/%s/dve" % user, user=user))[1]
    assert message(alice.get("/%s/something-else" % user))[1].endswith("could not be found.")
    assert message(change(alice, index, {"volitile": "False"})) == (
        400, "indexconfig got unexpected keyword arguments: volitile=False (volatile?)")
    assert message(change(alice, index, ["acl_uplod+=bob"]))[1].endswith("acl_uplod (acl_upload?)")


def test_an_acl_that_names_no_user_is_taken_with_a_message(alice, index):
    reply = change(alice, index, {"acl_upload": ["alice", "bobb", ":group", ":ANONYMOUS:"], "acl_pkg_read": "bobb,alice"})
    assert reply.status == 200 and reply.json()["type"] == "indexconfig" and "bobb" in reply.result["acl_upload"]
    assert reply.json()["message"] == "there is no user 'bobb', named in acl_upload and acl_pkg_read"
    assert "message" not in change(alice, index, {"title": "x"}).json()
    made = alice.put("/alice/" + fresh("typo"), {"acl_upload": "alcie"}, user="alice")
    assert made.json()["message"] == "there is no user 'alcie', named in acl_upload"


def test_bases_are_kept_in_their_order(alice, index, mirror):
    for given in ("%s, %s" % (mirror, index), [mirror, index]):
        assert create(alice, {"bases": given}).result["bases"] == [mirror, index]


REFUSED_STAGE = [
    ({"volatile": "maybe"}, "Unknown boolean value 'maybe'. (volatile)"),
    ({"volatile": 1}, "Unknown boolean value 1. (volatile)"),
    ({"bases": 1}, "Unknown list value 1. (bases)"),
    ({"acl_upload": {"a": 1}}, "Unknown list value {'a': 1}. (acl_upload)"),
    ({"mirror_whitelist": {}}, "Unknown list value {}. (mirror_whitelist)"),
    ({"bases": "no/where"}, "base index 'no/where' does not exist"),
    ({"bases": "bad"}, "invalid base index spec: 'bad'"),
    ({"bases": ["bad", "no/where", "a/b/c"]},
     "invalid base index spec: 'bad', base index 'no/where' does not exist, invalid base index spec: 'a/b/c'"),
    ({"mirror_whitelist_inheritance": "foo"},
     "Unknown value 'foo' for mirror_whitelist_inheritance, must be 'intersection' or 'union'."),
    ({"foo": 1, "bar": 2}, "indexconfig got unexpected keyword arguments: foo=1, bar=2"),
    ({"foo": "x"}, "indexconfig got unexpected keyword arguments: foo=x"),
    ({"mirror_url": URL}, "indexconfig got unexpected keyword arguments: mirror_url=" + URL),
]


@pytest.mark.parametrize("body, error", REFUSED_STAGE + [({"type": "foo"}, "unknown index type 'foo'")])
def test_a_wrong_value_is_400_and_nothing_is_created(alice, body, error):
    name = "alice/" + fresh("refused")
    assert message(alice.put("/" + name, body, user="alice")) == (400, error)
    assert alice.get("/" + name).status == 404


@pytest.mark.parametrize("body, error", REFUSED_STAGE)
def test_a_wrong_value_in_a_change_is_400_and_nothing_changes(alice, index, body, error):
    before = alice.get("/" + index)
    assert message(change(alice, index, dict({"title": "half done"}, **body))) == (400, error)
    after = alice.get("/" + index)
    assert (after.json(), serial_of(after)) == (before.json(), serial_of(before))


@pytest.mark.parametrize("body, error", [
    ({"mirror_url": "ftp://example.org/"}, "'mirror_url' option must be a URL."),
    ({"mirror_url": "pypi.org/simple"}, "'mirror_url' option must be a URL."),
    ({"mirror_cache_expiry": "soon"}, "'mirror_cache_expiry' option must be an integer"),
    ({"mirror_use_external_urls": "maybe"},
     "Unknown boolean value 'maybe'. (mirror_use_external_urls)"),
    ({"acl_toxresult_upload": "x"}, "indexconfig got unexpected keyword arguments: acl_toxresult_upload=x"),
    ({"mirror_whitelist_inheritance": "union"},
     "indexconfig got unexpected keyword arguments: mirror_whitelist_inheritance=union"),
])
def test_a_wrong_value_of_a_mirror_is_400(alice, mirror, body, error):
    assert message(create(alice, dict({"type": "mirror", "mirror_url": URL}, **body))) == (400, error)
    assert message(change(alice, mirror, body)) == (400, error)
    assert config(alice, mirror) == MIRROR


def test_a_mirror_may_begin_without_its_url_and_does_not_lose_it(alice, mirror):
    assert create(alice, {"type": "mirror"}).status == 200
    assert create(alice, {"type": "mirror", "mirror_url": ""}).status == 400
    assert change(alice, mirror, ["mirror_url-="]).status == 400
    assert config(alice, mirror) == MIRROR


@pytest.mark.parametrize("body", [
    "[]x", "5", '"text"', "null", "true", "[1]", '[["a"]]', "[null]", '{"bases": [1]}', '{"bases": {"a": 1}}', '{"bases": [["a/b"]]}',
    '{"acl_upload": [1]}', '{"acl_upload": {"a": 1}}', '{"mirror_whitelist": [null]}', '{"mirror_whitelist_inheritance": 1}',
    '{"mirror_whitelist_inheritance": ["union"]}', '{"type": 1}', '{"type": ["stage"]}', '{"volatile": []}', '{"volatile": "' + "x" * 500 + '"}',
    '{"type": "indexconfig", "result": 5}', '{"type": "indexconfig", "result": ["a"]}', "{", "", "\x00",
])
def test_json_of_the_wrong_shape_is_400(alice, index, body):
    headers = {"Content-Type": "application/json"}
    for reply in (alice.patch("/" + index, body, headers=headers, user="alice"),
                  alice.put("/alice/shapeless", body, headers=headers, user="alice")):
        assert reply.status == 400
        assert reply.json()["message"]
    assert config(alice, index) == STAGE
    assert alice.get("/alice/shapeless").status == 404


@pytest.mark.parametrize("body", ['{"mirror_cache_expiry": []}', '{"mirror_cache_expiry": {}}', '{"mirror_url": 5}', '{"mirror_url": ["http://a/"]}'])
def test_mirror_values_of_the_wrong_shape_are_400(alice, mirror, body):
    assert alice.patch("/" + mirror, body, headers={"Content-Type": "application/json"}, user="alice").status == 400
    assert alice.put("/alice/shapeless", dict(MIRROR, **json.loads(body)), user="alice").status == 400
    assert config(alice, mirror) == MIRROR


# The words of devpi 7


BLOCK = "block type:remote if local_exists"
TRUST = "trust_inheritance_rules_from"
RULES = "project_inheritance_rules"


@pytest.mark.parametrize("given, stored", [
    ({"type": "local"}, {}),
    ({"type": "local", RULES: "allow all", TRUST: "type:not remote"},
     {"mirror_whitelist": ["*"], "mirror_whitelist_inheritance": "union"}),
    ({RULES: [BLOCK], TRUST: "None"}, {}),
    ({RULES: ["allow all"], "mirror_whitelist": "a,B_c"}, {"mirror_whitelist": ["a", "b-c", "*"]}),
    ({RULES: BLOCK, "mirror_whitelist": "a,*"}, {"mirror_whitelist": ["a"]}),
    ({TRUST: "type:not remote", "mirror_whitelist_inheritance": "UNION"},
     {"mirror_whitelist_inheritance": "union"}),
])
def test_a_stage_may_be_made_with_the_words_of_devpi_7(alice, given, stored):
    assert create(alice, given).result == dict(STAGE, **stored)


@pytest.mark.parametrize("given, stored", [
    ({"remote_refresh_delay": "60"}, {"mirror_cache_expiry": 60}),
    ({"remote_no_project_list": "YES"}, {"mirror_no_project_list": True}),
    ({"remote_use_external_urls": False}, {"mirror_use_external_urls": False}),
    ({"remote_web_url_fmt": "https://pypi.org/project/{name}/"},
     {"mirror_web_url_fmt": "https://pypi.org/project/{name}/"}),
    ({"mirror_url": URL}, {}),
    ({"bases": "no/where", "acl_upload": "bob", RULES: "allow all"}, {}),
])
def test_a_mirror_may_be_made_with_the_words_of_devpi_7(alice, given, stored):
    assert create(alice, dict({"type": "remote", "remote_url": URL}, **given)).result == dict(MIRROR, **stored)


def test_an_index_may_be_changed_with_the_words_of_devpi_7(alice, index, mirror):
    for body in ({"type": "remote"}, ["type=remote"], {"remote_url": URL}, ["remote_url=" + URL]):
        assert change(alice, mirror, body).result == MIRROR
    for body in ({"type": "local"}, ["type=local"]):
        assert change(alice, mirror, body).status == 400
        assert change(alice, index, body).result == STAGE
    assert change(alice, mirror, ["remote_refresh_delay=5"]).result == dict(MIRROR, mirror_cache_expiry=5)
    assert change(alice, mirror, ["remote_refresh_delay-="]).result == MIRROR
    assert change(alice, index, ["mirror_whitelist=a", RULES + "=allow all", TRUST + "=type:not remote"]).result == \
        dict(STAGE, mirror_whitelist=["a", "*"], mirror_whitelist_inheritance="union")
    assert change(alice, index, {RULES: "allow all"}, "?error_on_noop").status == 400
    assert change(alice, index, [RULES + "=" + BLOCK, TRUST + "-="]).result == dict(STAGE, mirror_whitelist=["a"])


@pytest.mark.parametrize("body, error", [
    ({RULES: "allow some"}, "Unknown value ['allow some'] for %s, must be ['allow all'] or ['%s']." % (RULES, BLOCK)),
    ({RULES: []}, "Unknown value [] for %s, must be ['allow all'] or ['%s']." % (RULES, BLOCK)),
    ({RULES: 5}, "Unknown list value 5. (%s)" % RULES),
    ([RULES + "-="], DEFAULTS_STAY),
    ([RULES + "+=allow all"], "The '%s' setting is no list" % RULES),
    ([RULES + "-=allow all"], "The '%s' setting is no list" % RULES),
    ([TRUST + "+=none"], "The '%s' setting is no list" % TRUST),
    ({TRUST: "foo"}, "Unknown value 'foo' for %s, must be 'none', 'type:not remote' or left unset." % TRUST),
    ({TRUST: ["none"]}, "Unknown value ['none'] for %s, must be 'none', 'type:not remote' or left unset." % TRUST),
    ({TRUST: "none", "mirror_whitelist_inheritance": "union"},
     "'mirror_whitelist_inheritance' and '%s' are the same option" % TRUST),
    ({"remote_url": URL}, "indexconfig got unexpected keyword arguments: remote_url=" + URL),
    (["remote_url+=x"], "indexconfig got unexpected keyword arguments: remote_url"),
])
def test_wrong_values_in_the_words_of_devpi_7_are_400_and_named_as_sent(alice, index, body, error):
    assert message(change(alice, index, body)) == (400, error)
    assert config(alice, index) == STAGE


@pytest.mark.parametrize("body, error", [
    ({"remote_url": "x"}, "'remote_url' option must be a URL."),
    ({"remote_url": URL, "mirror_url": URL + "x/"}, "'mirror_url' and 'remote_url' are the same option"),
    (["remote_url-="], DEFAULTS_STAY),
    ({"remote_refresh_delay": "soon"}, "'remote_refresh_delay' option must be an integer"),
    ({"remote_no_project_list": 1}, "Unknown boolean value 1. (remote_no_project_list)"),
    ({TRUST: "none"}, "indexconfig got unexpected keyword arguments: %s=none" % TRUST),
])
def test_wrong_values_of_a_mirror_in_the_words_of_devpi_7_are_400(alice, mirror, body, error):
    assert message(change(alice, mirror, body)) == (400, error)
    assert config(alice, mirror) == MIRROR


def test_the_first_kib_of_each_index_is_not_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(d.Limits, "account_attributes", 3000)
    store = d.Store(d.Settings(str(tmp_path)), create=True)
    try:
        users = d.Users(store)
        indexes = d.Indexes(store, users, d.Settings(str(tmp_path)))
        users.create("carl", {"password": "pw"})
        bare = len(json.dumps(dict(indexes.create("carl", "bare", {}).config, title="")))
        title = "x" * (1024 + 1500 - bare)              # 1500 bytes are counted
        first = indexes.create("carl", "a", {"title": title})
        second = indexes.create("carl", "b", {"title": title})
        for index in (first, second):
            with pytest.raises(d.TooLarge):
                indexes.modify(index, {"title": title + "y"})
        indexes.modify(first, {"title": "y" * len(title)})
    finally:
        store.close()


# Reading the configuration


def test_an_index_lists_its_own_projects_normalised_and_sorted(alice, index):
    child = "alice/" + fresh("child")
    alice.add_index(child, bases=[index])
    for name in ("Zeta", "Alpha_Beta", "middle"):
        assert alice.upload(index, wheel(name, "1.0")).status == 200
    reply = alice.get("/" + index)
    assert reply.json() == {"type": "indexconfig", "result": dict(STAGE, projects=["alpha-beta", "middle", "zeta"])}
    assert alice.get("/" + child).result["projects"] == []


@pytest.mark.parametrize("query", ["no_projects", "no_projects=", "no_projects=0"])
def test_no_projects_leaves_the_projects_out(alice, index, query):
    assert alice.get("/%s?%s" % (index, query)).json() == {"type": "indexconfig", "result": STAGE}


def test_an_unknown_index_is_404(alice):
    for query in ("", "?no_projects="):
        assert message(alice.get("/alice/nope" + query)) == (404, "The stage alice/nope could not be found.")


# Changing: objects


def test_an_object_sets_its_keys_and_leaves_the_others(alice, index):
    assert change(alice, index, {"title": "T", "volatile": "no"}).json() == {
        "type": "indexconfig", "result": dict(STAGE, title="T", volatile=False)}
    assert change(alice, index, {"acl_upload": "bob"}).result == dict(STAGE, title="T", volatile=False, acl_upload=["bob"])
    assert config(alice, index) == dict(STAGE, title="T", volatile=False, acl_upload=["bob"])


def test_an_object_may_come_in_the_envelope_it_was_read_in(alice, index):
    read = alice.get("/" + index).json()
    read["result"]["title"] = "T"
    assert change(alice, index, read).result == dict(STAGE, title="T")


def test_an_empty_object_changes_nothing(alice, index):
    before = serial_of(alice.get("/" + index))
    reply = change(alice, index, {})
    assert (reply.status, reply.result, serial_of(reply)) == (200, STAGE, before)


def test_a_change_to_the_same_value_takes_no_serial(alice, index):
    first = change(alice, index, {"title": "T"})
    again = change(alice, index, {"title": "T"})
    assert (again.status, serial_of(again)) == (200, serial_of(first))


@pytest.mark.parametrize("key", ["title", "description", "custom_data"])
def test_null_removes_a_free_form_key(alice, index, key):
    assert change(alice, index, {key: "text"}).result == dict(STAGE, **{key: "text"})
    assert change(alice, index, {key: None}).result == STAGE


def test_null_does_not_remove_a_default(alice, index):
    for key in ("volatile", "bases", "acl_upload", "mirror_whitelist_inheritance"):
        assert change(alice, index, {key: None}).status == 400
    assert config(alice, index) == STAGE


def test_projects_in_a_change_are_ignored(alice, index):
    assert change(alice, index, {"projects": ["x"], "title": "T"}).result == dict(STAGE, title="T")
    assert alice.get("/" + index).result["projects"] == []


# Changing: lists of operators


def test_set_takes_everything_after_the_first_equals_sign(alice, index):
    assert change(alice, index, ["title=a=b", "volatile=no", "acl_upload=alice, bob"]).result == dict(
        STAGE, title="a=b", volatile=False, acl_upload=["alice", "bob"])


def test_append_adds_one_item_unless_it_is_there(alice, index, mirror):
    assert change(alice, index, ["bases+=" + mirror]).result["bases"] == [mirror]
    again = change(alice, index, ["bases+=" + mirror])
    assert (again.status, again.result["bases"]) == (200, [mirror])


def test_append_does_not_split_at_commas(alice, index):
    assert change(alice, index, ["acl_upload+=a,b"]).result["acl_upload"] == ["alice", "a,b"]


def test_append_coerces_the_item(alice, index):
    assert change(alice, index, ["acl_upload+=:authenticated:"]).result["acl_upload"] == ["alice", ":AUTHENTICATED:"]
    assert change(alice, index, ["mirror_whitelist+=A_B"]).result["mirror_whitelist"] == ["a-b"]


def test_remove_takes_one_item_away(alice, index):
    change(alice, index, {"acl_upload": "alice,bob"})
    assert change(alice, index, ["acl_upload-=alice"]).result["acl_upload"] == ["bob"]


@pytest.mark.parametrize("operator, error", [
    ("bases-=root/none", "The 'bases' setting doesn't have value 'root/none'"),
    ("acl_toxresult_upload-=:anonymous:", "The 'acl_toxresult_upload' setting doesn't have value ':anonymous:'"),
    ("volatile-=", DEFAULTS_STAY),
    ("bases-=", DEFAULTS_STAY),
    ("acl_upload-=", DEFAULTS_STAY),
    ("acl_toxresult_upload-=", DEFAULTS_STAY),
    ("mirror_whitelist-=", DEFAULTS_STAY),
    ("mirror_whitelist_inheritance-=", DEFAULTS_STAY),
    ("bases+=no/where", "base index 'no/where' does not exist"),
    ("volatile=maybe", "Unknown boolean value 'maybe'. (volatile)"),
    ("foo=1", "indexconfig got unexpected keyword arguments: foo=1"),
    ("novalue", "indexconfig got unexpected keyword arguments: novalue="),
    ("type=mirror", "the 'type' of an index can't be changed"),
])
def test_an_operator_that_cannot_apply_is_400_and_nothing_changes(alice, index, operator, error):
    before = serial_of(alice.get("/" + index))
    assert message(change(alice, index, ["title=half done", operator])) == (400, error)
    assert config(alice, index) == STAGE
    assert serial_of(alice.get("/" + index)) == before


@pytest.mark.parametrize("operator", ["foo+=1", "volatile+=x", "volatile-=x", "=x", "+=x", "-=x", "=", ""])
def test_an_operator_on_what_is_no_list_is_400(alice, index, operator):
    assert change(alice, index, [operator]).status == 400
    assert config(alice, index) == STAGE


def test_remove_key_removes_what_has_no_default(alice, index):
    change(alice, index, {"title": "T"})
    assert change(alice, index, ["title-="]).result == STAGE
    for operator in ("title-=", "unknown-="):
        reply = change(alice, index, [operator])
        assert (reply.status, reply.result) == (200, STAGE)


def test_operators_apply_in_their_order_and_are_checked_as_a_whole(alice, index, mirror):
    change(alice, index, {"acl_upload": "alice,bob"})
    result = change(alice, index, ["acl_upload-=alice", "acl_upload+=carl", "acl_upload+=alice", "title=x", "title-=",
                                   "bases+=no/where", "bases-=no/where", "bases+=" + mirror]).result
    assert result == dict(STAGE, acl_upload=["bob", "carl", "alice"], bases=[mirror])


def test_operators_on_a_mirror(alice, mirror):
    assert change(alice, mirror, ["mirror_cache_expiry=9", "title=T"]).result == dict(MIRROR, mirror_cache_expiry=9, title="T")
    assert change(alice, mirror, ["mirror_cache_expiry-=", "title-="]).result == MIRROR
    assert message(change(alice, mirror, ["volatile-="])) == (400, DEFAULTS_STAY)


# Changing: the rest


def test_error_on_noop_refuses_operators_that_change_nothing(alice, index):
    change(alice, index, {"title": "T"})
    for query in ("?error_on_noop", "?error_on_noop="):
        for operators in (["title=T"], ["acl_upload+=alice"], []):
            assert message(change(alice, index, operators, query)) == (400, NO_CHANGES)
    assert change(alice, index, ["title=T"]).status == 200


def test_error_on_noop_lets_real_changes_pass(alice, index):
    assert change(alice, index, ["title=T"], "?error_on_noop").result == dict(STAGE, title="T")
    assert change(alice, index, {"title": "U"}, "?error_on_noop").result == dict(STAGE, title="U")


def test_the_type_cannot_be_changed(alice, index, mirror):
    error = (400, "the 'type' of an index can't be changed")
    assert message(change(alice, index, {"type": "mirror"})) == error
    assert message(change(alice, mirror, {"type": "stage"})) == error
    assert change(alice, index, {"type": "stage"}).status == 200


def test_only_owner_and_root_may_change_or_delete(alice, index):
    for who in (None, "bob"):
        assert change(alice, index, {"title": "x"}, user=who).status == 403
        assert alice.delete("/" + index, user=who).status == 403
    assert config(alice, index) == STAGE
    assert change(alice, index, {"title": "x"}, user="root").status == 200


def test_the_right_to_upload_is_no_right_to_change(alice, index):
    change(alice, index, {"acl_upload": ":ANONYMOUS:"})
    assert change(alice, index, {"title": "x"}, user="bob").status == 403


def test_a_change_of_a_missing_index_is_403_and_a_deletion_where_it_is_anothers(alice):
    for who in (None, "alice", "root"):
        assert change(alice, "alice/nope", {"title": "x"}, user=who).status == 403
        assert alice.delete("/alice/nope", user=who).status == (403 if who is None else 404)
    assert alice.delete("/alice/nope", user="bob").status == 403


def test_an_index_may_be_its_own_base(alice, index):
    assert change(alice, index, {"bases": index}).result["bases"] == [index]


# Deleting


def test_deleting_a_volatile_index_answers_201(alice, index):
    assert message(alice.delete("/" + index, user="alice")) == (201, "index %s deleted" % index)
    assert alice.get("/" + index).status == 404
    assert index.split("/")[1] not in alice.get("/alice").result["indexes"]


def test_root_may_delete_and_a_deleted_index_comes_back_empty(alice, index):
    assert alice.upload(index, wheel("gone", "1.0")).status == 200
    assert alice.delete("/" + index, user="root").status == 201
    alice.add_index(index)
    assert alice.get("/" + index).result == dict(STAGE, projects=[])
    assert alice.get("/%s/+simple/gone/" % index).status == 404


@pytest.mark.parametrize("query", ["", "?force"])
def test_a_non_volatile_index_cannot_be_deleted(alice, index, query):
    change(alice, index, {"volatile": False})
    for who in ("alice", "root"):
        assert message(alice.delete("/" + index + query, user=who)) == (403, "index %s non-volatile, cannot delete" % index)
    assert alice.get("/" + index).status == 200


def test_a_deleted_base_stays_listed_and_is_skipped(alice, index):
    child = "alice/" + fresh("child")
    alice.add_index(child, bases=[index])
    assert alice.upload(index, wheel("below", "1.0")).status == 200
    assert alice.upload(child, wheel("mine", "1.0")).status == 200
    assert alice.delete("/" + index, user="alice").status == 201
    assert config(alice, child)["bases"] == [index]
    assert versions(alice, child, "mine") == ["1.0"]
    assert alice.get("/%s/+simple/below/" % child).status == 404


def test_with_a_missing_base_only_changes_of_other_keys_pass(alice, index):
    child = "alice/" + fresh("child")
    alice.add_index(child, bases=[index])
    assert alice.delete("/" + index, user="alice").status == 201
    error = (400, "base index '%s' does not exist" % index)
    assert change(alice, child, {"title": "x"}).status == 200
    assert message(change(alice, child, ["title=y"])) == error
    assert message(change(alice, child, {"bases": [index]})) == error
    assert change(alice, child, ["bases-=" + index]).result["bases"] == []


# Who may read: acl_pkg_read


class Secret:
    """A stage of alice's that only bob, besides its owner and root, may read; it holds `hidden-lib` 1.0."""

    def __init__(self, server, acl="bob"):
        self.index = "alice/" + fresh("secret")
        server.add_index(self.index)
        assert server.upload(self.index, wheel("hidden-lib", "1.0")).status == 200
        url = server.simple(self.index, "hidden-lib")["files"][0]["url"]
        self.file = "/%s/+f/%s" % (self.index, url.split("+f/")[1].split("#")[0])
        self.page = "/%s/+simple/hidden-lib/" % self.index
        assert server.patch("/" + self.index, {"acl_pkg_read": acl}, user="alice").status == 200

    def paths(self):
        """(path, Accept) of everything that shows something of it."""
        simple = "/%s/+simple/" % self.index
        return [(simple, SIMPLE_JSON), (simple, "text/html"), (self.page, SIMPLE_JSON), (self.page, "text/html"), (simple + "nothing-here/", SIMPLE_JSON),
                (self.file, None), (self.file, "application/json"), (self.file + ".metadata", None),
                ("/" + self.index, "application/json"), ("/%s?no_projects=" % self.index, "application/json"),
                ("/%s/hidden-lib" % self.index, "application/json"), ("/%s/hidden-lib/1.0" % self.index, "application/json")]


@pytest.fixture
def carl(alice):
    """A logged-in user without any right."""
    if "carl" not in alice.tokens:
        alice.add_user("carl", "pw", by="root")      # the name stands in ACLs by then
        alice.login("carl", "pw")
    return "carl"


@pytest.fixture(scope="module")
def secret(alice):
    return Secret(alice)


def test_acl_pkg_read_is_absent_until_set_and_can_be_removed(alice, index):
    assert "acl_pkg_read" not in config(alice, index)
    assert change(alice, index, {"acl_pkg_read": "bob,:authenticated:"}).result["acl_pkg_read"] == ["bob", ":AUTHENTICATED:"]
    assert alice.get("/" + index).status == 401
    assert change(alice, index, ["acl_pkg_read-="]).result == STAGE
    assert alice.get("/" + index).status == 200


def test_reading_without_credentials_is_401_with_a_challenge(alice, secret):
    for path, accept in secret.paths():
        for method in ("GET", "HEAD"):
            reply = alice.request(method, path, headers={"Accept": accept})
            assert (method, path, reply.status) == (method, path, 401)
            assert reply.headers.get("WWW-Authenticate") == CHALLENGE
            assert reply.headers.get("Location") is None
            assert b"1.0-py3" not in reply.body


def test_reading_with_wrong_credentials_is_401(alice, secret):
    for path, accept in secret.paths()[::3]:
        reply = alice.get(path, headers={"Accept": accept}, user="nobody-here", password="pw")
        assert (path, reply.status) == (path, 401)
        assert reply.headers.get("WWW-Authenticate") == CHALLENGE
    assert alice.get(secret.page, user="bob", password="wrong").status == 401


def test_reading_with_valid_credentials_but_no_right_is_403(alice, secret, carl):
    for path, accept in secret.paths():
        assert (path, alice.get(path, headers={"Accept": accept}, user="carl").status) == (path, 403)


@pytest.mark.parametrize("who, password", [("bob", "pw"), ("alice", "pw"), ("root", "secret")])
def test_readers_owner_and_root_may_read_by_token_and_by_password(alice, secret, who, password):
    for path, accept in secret.paths():
        expected = 404 if "nothing-here" in path else 200
        for credentials in ({"user": who}, {"user": who, "password": password}):
            assert (path, alice.get(path, headers={"Accept": accept}, **credentials).status) == (path, expected)


def test_an_installer_on_the_bare_index_url_is_refused_as_well(alice, secret):
    for path in ("/" + secret.index, "/%s/hidden-lib/" % secret.index):
        assert alice.get(path, headers={"User-Agent": "pip/26.3", "Accept": "*/*"}).status == 401


def test_devpi_client_gets_403_in_place_of_401(alice, secret):
    agent = {"User-Agent": "devpi-client/7.3.0 (py3)"}
    for path, accept in secret.paths():
        reply = alice.get(path, headers=dict(agent, Accept=accept))
        assert (path, reply.status) == (path, 403)
    assert alice.get("/" + secret.index, headers=agent, user="bob").status == 200


def test_api_and_login_stay_open(alice, secret):
    reply = alice.get("/%s/+api" % secret.index)
    assert (reply.status, reply.result["index"]) == (200, "%s/%s" % (alice.url, secret.index))
    assert alice.post("/+login", {"user": "bob", "password": "pw"}).status == 200


@pytest.mark.parametrize("acl, nobody, carls", [
    (":AUTHENTICATED:", 401, 200),
    (":ANONYMOUS:", 200, 200),
    ("carl", 401, 200),
    ("carla,Carl,:carl", 401, 403),
    ([], 401, 403),
])
def test_the_list_decides_who_reads(alice, carl, acl, nobody, carls):
    secret = Secret(alice, acl)
    assert (alice.get(secret.page).status, alice.get(secret.page, user="carl").status) == (nobody, carls)
    assert alice.get(secret.page, user="alice").status == 200


def test_the_owner_is_not_locked_out_by_a_list_of_others(alice):
    secret = Secret(alice, "bob")
    assert alice.upload(secret.index, wheel("hidden-lib", "2.0")).status == 200
    assert versions(alice, secret.index, "hidden-lib", user="alice") == ["1.0", "2.0"]


def test_a_hidden_index_is_in_no_list_of_who_may_not_read_it(alice, carl):
    secret = Secret(alice)      # no index has it as a base
    name = secret.index.split("/")[1]
    for who in (None, "carl"):
        assert name not in alice.get("/alice", user=who).text
        assert secret.index.split("/")[1] not in alice.get("/", user=who).result["alice"]["indexes"]
    for who in ("bob", "alice", "root"):
        assert name in alice.get("/alice", user=who).result["indexes"]
        assert name in alice.get("/", user=who).result["alice"]["indexes"]


def test_of_many_who_change_an_index_at_once_each_is_heard(alice, index):
    names = ["name%d" % number for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda name: alice.patch("/" + index, ["mirror_whitelist+=" + name], user="alice"), names))
    assert [reply.status for reply in replies] == [200] * len(names)
    assert sorted(alice.get("/" + index).result["mirror_whitelist"]) == sorted(names)


def test_a_change_of_the_readers_counts_at_once(alice, carl):
    secret = Secret(alice, ":ANONYMOUS:")
    for acl, status in (("bob", 401), (":ANONYMOUS:", 200), ("alice", 401)):
        assert alice.patch("/" + secret.index, {"acl_pkg_read": acl}, user="alice").status == 200
        for path in (secret.page, secret.file, "/%s/+simple/" % secret.index):
            assert alice.get(path, headers={"Accept": None}).status == status


def test_restricted_answers_are_cached_by_nobody_else(alice, secret):
    page = alice.get(secret.page, headers={"Accept": SIMPLE_JSON}, user="bob")
    assert "private" in page.headers.get("Cache-Control")
    assert "public" not in page.headers.get("Cache-Control")
    file = alice.get(secret.file, headers={"Accept": None}, user="bob")
    assert file.headers.get("Cache-Control") == "max-age=365000000, immutable, private"


def test_open_answers_may_be_cached_by_everybody(alice, index):
    assert alice.upload(index, wheel("open", "1.0")).status == 200
    page = alice.get("/%s/+simple/open/" % index, headers={"Accept": SIMPLE_JSON})
    assert "private" not in page.headers.get("Cache-Control")
    path = "/%s/+f/%s" % (index, page.json()["files"][0]["url"].split("+f/")[1].split("#")[0])
    assert alice.get(path, headers={"Accept": None}).headers.get("Cache-Control") == "max-age=365000000, immutable, public"


def test_an_etag_does_not_open_a_restricted_page(alice, secret):
    etag = alice.get(secret.page, headers={"Accept": SIMPLE_JSON}, user="bob").headers.get("ETag")
    assert etag
    assert alice.get(secret.page, headers={"Accept": SIMPLE_JSON, "If-None-Match": etag}, user="bob").status == 304
    assert alice.get(secret.page, headers={"Accept": SIMPLE_JSON, "If-None-Match": etag}).status == 401


def test_a_session_that_has_died_reads_nothing_any_more(alice):
    alice.add_user("dora", "pw")
    token = alice.login("dora", "pw")
    secret = Secret(alice, "dora")
    headers = {"X-Devpi-Auth": user_pass("dora", token)}
    assert alice.get(secret.page, headers=headers).status == 200
    assert alice.patch("/dora", {"password": "new"}, user="dora").status == 200
    assert alice.get(secret.page, headers=headers).status == 401


@pytest.fixture(scope="module")
def child(alice, secret):
    """A stage open to everybody that inherits from the restricted one and holds `open-lib`."""
    name = "alice/" + fresh("child")
    alice.add_index(name, bases=[secret.index])
    assert alice.upload(name, wheel("open-lib", "1.0")).status == 200
    return name


def test_a_page_that_a_restricted_base_contributes_to_is_refused(alice, secret, child, carl):
    page = "/%s/+simple/hidden-lib/" % child
    for accept in (SIMPLE_JSON, "text/html"):
        assert alice.get(page, headers={"Accept": accept}).status == 401
        assert alice.get(page, headers={"Accept": accept}, user="carl").status == 403
        assert alice.get(page, headers={"Accept": accept, "User-Agent": "devpi-client/7.3.0"}).status == 403
    for who in ("bob", "alice", "root"):
        assert versions(alice, child, "hidden-lib", user=who) == ["1.0"]
    assert "private" in alice.get(page, user="bob").headers.get("Cache-Control")
    assert alice.get("/%s/hidden-lib" % child).status == 401


def test_a_page_that_a_restricted_base_has_nothing_for_stays_open(alice, secret, child):
    assert versions(alice, child, "open-lib") == ["1.0"]
    assert alice.get("/%s/+simple/nothing-here/" % child).status == 401     # as for what the base has
    assert alice.get("/%s/+simple/nothing-here/" % child, user="bob").status == 404


def test_a_restricted_base_never_opens_the_mirror_for_its_names(alice, upstream):
    upstream.publish("hidden-lib", "9.9")
    secret, mirror, child = Secret(alice), "alice/" + fresh("pypi"), "alice/" + fresh("child")
    alice.add_mirror(mirror, upstream.url)
    alice.add_index(child, bases=[secret.index, mirror])
    assert alice.get("/%s/+simple/hidden-lib/" % child).status == 401
    assert versions(alice, child, "hidden-lib", user="bob") == ["1.0"]


def test_what_the_child_has_is_shown_alone_whether_the_restricted_base_has_it_or_not(alice, secret, child):
    assert alice.upload(child, wheel("hidden-lib", "3.0")).status == 200
    try:
        assert versions(alice, child, "hidden-lib") == ["3.0"]
        assert versions(alice, child, "hidden-lib", user="bob") == ["1.0", "3.0"]
    finally:
        assert alice.delete("/%s/hidden-lib" % child, user="alice").status == 200


def test_the_project_list_of_the_child_does_not_give_hidden_names_away(alice, secret, child):
    path = "/%s/+simple/" % child
    assert "hidden-lib" not in alice.get(path, headers={"Accept": SIMPLE_JSON}).text
    assert "hidden-lib" in alice.get(path, headers={"Accept": SIMPLE_JSON}, user="bob").text
    assert "hidden-lib" not in alice.get(path, headers={"Accept": SIMPLE_JSON}).text


def test_a_mirror_can_be_restricted_too(alice, upstream, carl):
    upstream.publish("public-lib", "1.0")
    mirror = "alice/" + fresh("pypi")
    alice.add_mirror(mirror, upstream.url, acl_pkg_read="bob")
    page = "/%s/+simple/public-lib/" % mirror
    assert [alice.get(page, user=who).status for who in (None, "carl", "bob", "alice")] == [401, 403, 200, 200]
    assert "private" in alice.get(page, user="bob").headers.get("Cache-Control")


@pytest.mark.parametrize("bases, found", [
    ({}, []),
    ({"a": ["a"]}, []),
    ({"a": ["x", "b"], "b": []}, []),
    ({"a": ["b"], "b": ["a"]}, [["a", "b"]]),
    ({"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}, []),
    ({"a": ["b"], "b": ["c", "b"], "c": ["b", "a"]}, [["b", "c"], ["a", "b", "c"]]),
    ({"d": ["a"], "a": ["b"], "b": ["c", "x"], "c": ["a"]}, [["a", "b", "c"]]),
    ({n: [n + 1] for n in range(5000)}, []),
    ({n: [(n + 1) % 5000] for n in range(5000)}, [list(range(5000))])])
def test_circles_of_bases_are_found_once(bases, found):
    assert [trail[start:] for trail, start in d.circles(bases)] == found
