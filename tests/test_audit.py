"""The audit log: who did what, when and from where; for root only, paged, bounded."""

import contextlib
import datetime
import itertools
import time
import urllib.parse

import pytest

from harness import (
    SIMPLE_JSON, Server, audited, documentation, eventually, patched, path_of, sdist, serial,
    upload_docs, wheel)
from receiver import Receiver

KEYS = {"times", "id", "time", "who", "address", "action", "index", "target", "detail", "serial"}

numbers = itertools.count(1)


# Helpers


@pytest.fixture(scope="module")
def site(shared_server):
    """`aud` owns the stages of the tests and the mirror `aud/mirror`; `stranger` may do nothing there."""
    for name in ("aud", "stranger"):
        shared_server.add_user(name)
        shared_server.login(name)
    shared_server.login("root")
    return shared_server


@pytest.fixture
def index(site):
    """The name of a new volatile stage."""
    name = "aud/dev%d" % next(numbers)
    site.add_index(name)
    return name


def audit(server, **query):
    reply = server.get("/+audit?" + urllib.parse.urlencode(query), user="root")
    assert reply.status == 200, reply
    return reply.json()


def newest(server):
    return audited(server, limit=1)[0]["id"]


def since(server, mark):
    """The entries after that one, oldest first."""
    return [row for row in reversed(audited(server)) if row["id"] > mark]


@contextlib.contextmanager
def one_row(server, action, index, *named, who="aud", address="127.0.0.1"):
    """What the block changes is one entry: of this action, on this index, with everything `named` in target or detail."""
    mark, before = newest(server), serial(server)
    yield
    (row,) = since(server, mark)
    assert set(row) == KEYS
    assert (row["action"], row["who"], row["address"]) == (action, who, address)
    assert (row["index"] or None) == index
    text = "%s %s" % (row["target"], row["detail"])
    assert [name for name in named if name not in text] == []
    assert (row["serial"], before + 1) == (serial(server), serial(server))
    assert_now(row["time"])


@contextlib.contextmanager
def no_row(server):
    mark, before = newest(server), serial(server)
    yield
    assert (since(server, mark), serial(server)) == ([], before)


def assert_now(text):
    moment = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.timezone.utc)
    assert abs(time.time() - moment.timestamp()) < 60, text


def push(server, source, body):
    return server.request("PUSH", "/" + source, body, user="aud")


# One entry for each change that a person made


def test_users_are_audited(site):
    with one_row(site, "user.create", None, "audited", who=None):
        assert site.put("/audited", {"password": "pw"}).status == 201
    site.login("audited", "pw")
    with one_row(site, "user.modify", None, "audited", who="audited"):
        assert site.patch("/audited", {"title": "t"}, user="audited").status == 200
    with one_row(site, "user.modify", None, "audited", who="root"):
        assert site.patch("/audited", {"password": "other"}, user="root").status == 200
    with one_row(site, "user.delete", None, "audited", who="root"):
        assert site.delete("/audited", user="root").status == 200


def test_indexes_are_audited(site):
    with one_row(site, "index.create", "aud/made"):
        assert site.put("/aud/made", {}, user="aud").status == 200
    with one_row(site, "index.modify", "aud/made"):
        assert site.patch("/aud/made", {"title": "t"}, user="aud").status == 200
    with one_row(site, "index.modify", "aud/made", who="root"):
        assert site.patch("/aud/made", ["acl_upload+=stranger"], user="root").status == 200
    with one_row(site, "index.delete", "aud/made"):
        assert site.delete("/aud/made", user="aud").status == 201


def test_registering_and_uploading_are_audited(site, index):
    with one_row(site, "register", index, "audited", "1.0"):
        assert site.post_form(index, {":action": "submit", "name": "audited", "version": "1.0"}).status == 200
    archive = wheel("audited", "1.0")
    with one_row(site, "upload", index, archive.filename):
        assert site.post_file(index, archive).status == 200
    other, mark = wheel("audited", "1.0", size=10), newest(site)
    assert site.post_file(index, other).status == 200
    assert [(row["action"], row["index"], row["target"], row["detail"]) for row in since(site, mark)] == [
        ("replaced", index, archive.filename, "sha256=%s by sha256=%s" % (archive.sha256, other.sha256)),
        ("upload", index, archive.filename, "sha256=%s" % other.sha256)]
    with one_row(site, "docs", index, "audited", "1.0"):
        upload_docs(site, index, documentation("audited", "1.0"))


@pytest.mark.parametrize("user", ["aud", None])
def test_test_results_are_audited(site, index, user):
    archive = wheel("tested", "1.0")
    site.post_file(index, archive)
    with one_row(site, "toxresult", index, archive.filename, who=user):
        assert site.post(path_of(archive, index), {"testenvs": {}}, user=user).status == 200


def test_push_is_one_entry_that_names_both_indexes(site, index):
    target = "aud/target%d" % next(numbers)
    site.add_index(target)
    for archive in (wheel("pushed", "1.0"), sdist("pushed", "1.0")):
        site.post_file(index, archive)
    upload_docs(site, index, documentation("pushed", "1.0"))
    with one_row(site, "push", target, "pushed", "1.0", index):
        assert push(site, index, {"name": "pushed", "version": "1.0", "targetindex": target}).status == 200


def test_external_push_is_audited_without_its_password(site, index):
    receiver = Receiver().start()
    try:
        site.post_file(index, wheel("external", "1.0"))
        mark = newest(site)
        reply = push(site, index, {
            "name": "external", "version": "1.0", "posturl": receiver.url + "/legacy/", "username": "robot",
            "password": "push-pass-word"})
        assert reply.status == 200
    finally:
        receiver.stop()
    (row,) = since(site, mark)
    assert (row["action"], row["who"], row["address"], row["index"]) == ("push.external", "aud", "127.0.0.1", index)
    text = "%s %s" % (row["target"], row["detail"])
    assert "external" in text and "1.0" in text and str(receiver.port) in text
    assert "push-pass-word" not in text


def test_yanks_and_project_status_are_audited(site, index):
    archive = wheel("yanked", "1.0")
    site.post_file(index, archive)
    with one_row(site, "yank", index, "yanked", "1.0", "broken build"):
        assert site.patch("/%s/yanked/1.0" % index, {"yanked": "broken build"}, user="aud").status == 200
    with one_row(site, "unyank", index, "yanked", "1.0"):
        assert site.patch("/%s/yanked/1.0" % index, {"yanked": False}, user="aud").status == 200
    with one_row(site, "yank", index, archive.filename, "again"):
        assert site.patch(path_of(archive, index) + "?yank=again", user="aud").status == 200
    with one_row(site, "unyank", index, archive.filename):
        assert site.patch(path_of(archive, index) + "?unyank", user="aud").status == 200
    with no_row(site):
        assert site.patch(path_of(archive, index) + "?unyank", user="aud").status == 200
    with one_row(site, "project.status", index, "yanked", "archived"):
        assert site.patch("/%s/yanked" % index, {"project-status": {"status": "archived"}}, user="aud").status == 200


def test_removal_is_one_entry_a_request(site, index):
    archives = [make("removed", "%d.0" % number) for number in range(3) for make in (wheel, sdist)]
    for archive in archives:
        site.post_file(index, archive)
    with one_row(site, "delete.file", index, archives[0].filename):
        assert site.delete(path_of(archives[0], index), user="aud").status == 200
    with one_row(site, "delete.file", index, archives[1].filename):
        assert site.delete(path_of(archives[1], index), user="aud").status == 200
    assert site.get("/%s/removed/0.0" % index).status == 404
    with one_row(site, "delete.version", index, "removed", "1.0"):
        assert site.delete("/%s/removed/1.0" % index, user="aud").status == 200
    with one_row(site, "delete.project", index, "removed", who="root"):
        assert site.delete("/%s/removed" % index, user="root").status == 200


def test_failed_logins_are_recorded(site):
    for name in ("aud", "never-heard-of"):
        mark = newest(site)
        reply = site.post("/+login", {"user": name, "password": "wr0ng-pass-word"}, headers={"X-Real-IP": "203.0.113.7"})
        assert reply.status == 401
        (row,) = since(site, mark)
        assert set(row) == KEYS
        assert (row["action"], row["address"]) == ("login.failed", "203.0.113.7")
        assert name in (row["who"], row["target"])
        assert_now(row["time"])
    assert "wr0ng-pass-word" not in site.get("/+audit", user="root").text


def test_address_is_that_of_the_person_behind_the_proxy(site, index):
    headers = {"X-Real-IP": "2001:db8::7"}
    with one_row(site, "upload", index, "proxied", address="2001:db8::7"):
        assert site.post_file(index, wheel("proxied", "1.0"), headers=headers).status == 200
    with one_row(site, "index.modify", index, address="2001:db8::7"):
        assert site.patch("/" + index, {"title": "t"}, user="aud", headers=headers).status == 200


# What is no change leaves no entry, unless somebody may not do it or something stands against it


def test_acts_that_are_refused_to_somebody_or_conflict_are_recorded(site, index):
    stable = "aud/stable%d" % next(numbers)
    site.add_index(stable, volatile=False)
    archive = wheel("refused", "1.0")
    site.post_file(stable, archive)
    file, conflict = path_of(archive, stable), archive.filename + " already exists in non-volatile index"
    acts = [
        (lambda: site.put("/aud", {"password": "pw"}), None, "", "/aud", "PUT: 409 user already exists"),
        (lambda: site.patch("/aud", {"title": "t"}, user="stranger"), "stranger", "", "/aud", "PATCH: 403"),
        (lambda: site.put("/" + stable, {}, user="aud"), "aud", stable, "/" + stable, "PUT: 409 index '%s' exists" % stable),
        (lambda: site.delete("/" + stable, user="aud"), "aud", stable, "/" + stable, "DELETE: 403 index %s non-vol" % stable),
        (lambda: site.post_file(stable, wheel("refused", "1.0", size=9)), "aud", stable, "/%s/" % stable, "POST: 409 " + conflict),
        (lambda: site.post_file(stable, wheel("refused", "2.0"), user="stranger"), "stranger", stable, "/%s/" % stable,
         "POST: 403 no permission to submit"),
        (lambda: push(site, stable, {"name": "refused", "version": "1.0", "targetindex": stable}), "aud", stable, "/" + stable,
         "PUSH: 409 " + conflict),
        (lambda: site.delete(file, user="aud"), "aud", stable, file, "DELETE: 403 cannot delete version on non-vol"),
        (lambda: site.delete(file), None, stable, file, "DELETE: 403 no permission to change")]
    for act, who, index, path, detail in acts:
        mark, before = newest(site), serial(site)
        assert act().status in (401, 403, 409)
        [row] = since(site, mark)
        assert (row["action"], row["who"], row["address"], row["index"], row["target"]) == (
            "refused", who, "127.0.0.1", index, path)
        assert row["detail"].startswith(detail)
        assert (row["serial"], serial(site)) == (None, before)


def test_refusals_do_not_wash_the_audit_log_out(tmp_path):
    script = patched(tmp_path, "devpi_lite.Limits.audited_refusals, devpi_lite.Limits.audited_refusals_of_one = 5, 3")
    server = Server(tmp_path / "server", script=script).start()
    try:
        for name in ("ann", "bob"):
            server.add_user(name)
        for name in ("ann", "bob"):
            for _ in range(4):
                assert server.patch("/root", {"title": "t"}, user=name).status == 403
        assert [(row["who"], row["times"]) for row in audited(server, action="refused")] == [("bob", 2), ("ann", 3)]
    finally:
        server.kill()


def test_a_user_s_failed_logins_are_among_what_the_user_did(site):
    site.add_user("forgetful")
    site.post("/+login", {"user": "forgetful", "password": "wrong"}, headers={"X-Real-IP": "203.0.113.9"})
    site.patch("/forgetful", {"title": "t"}, user="forgetful")
    assert [(row["action"], row["who"], row["target"]) for row in audited(site, who="forgetful")] == [
        ("user.modify", "forgetful", "forgetful"), ("login.failed", None, "forgetful")]
    assert [row["action"] for row in audited(site, who="forgetful", action="login.failed")] == ["login.failed"]


def test_other_refused_requests_leave_no_entry(site, index):
    stable = "aud/stable%d" % next(numbers)
    site.add_index(stable, volatile=False)
    archive = wheel("refused", "1.0")
    site.post_file(stable, archive)
    with no_row(site):
        replies = [
            site.put("/b x", {"password": "pw"}),
            site.put("/nobody/dev", {}, user="root"),
            site.patch("/" + stable, {"unknown": "1"}, user="aud"),
            site.post_file(stable, wheel("refused", "2.0"), user=None),
            site.post_form(stable, {":action": "submit", "name": "-bad", "version": "1"}),
            site.post(path_of(archive, stable), b"{", user="aud"),
            push(site, stable, {"name": "refused", "version": "1.0", "targetindex": "aud/nowhere"}),
            push(site, index, {"name": "refused", "version": "1.0", "targetindex": stable}),
            site.delete("/%s/unknown?force" % stable, user="aud"),
            site.patch("/%s/refused/9.9" % stable, {"yanked": True}, user="aud"),
            site.patch("/%s/refused" % stable, {"project-status": {"status": "nonsense"}}, user="aud")]
    assert [reply.status for reply in replies if reply.status < 400] == []


def test_requests_without_effect_leave_no_entry(site):
    stable = "aud/stable%d" % next(numbers)
    site.add_index(stable, volatile=False)
    archive = wheel("noop", "1.0")
    site.post_file(stable, archive)
    with no_row(site):
        replies = [
            site.post_file(stable, archive),                                  # identical
            site.patch("/" + stable, {}, user="aud"),
            site.patch("/%s/noop/1.0" % stable, {"yanked": False}, user="aud"),
            site.get("/%s/noop" % stable), site.get("/+audit", user="root"),
            site.post("/+login", {"user": "aud", "password": "pw"})]
    assert [reply.status for reply in replies] == [200] * 6


def test_refresh_of_a_mirror_is_no_change(site, upstream):
    mirror = "aud/mirror%d" % next(numbers)
    upstream.publish(wheel("refreshed", "1.0"))
    site.add_mirror(mirror, upstream.url)
    mark = newest(site)
    assert site.get("/%s/+simple/refreshed/" % mirror, headers={"Accept": SIMPLE_JSON}).status == 200
    assert site.post("/%s/+simple/refreshed/refresh" % mirror).status == 302
    assert since(site, mark) == []


# What must never be in it


def test_no_passwords_in_the_audit_log(site):
    secrets = ["first-Pass-1", "second-Pass-2", "mirror-Pass-3", "hook-Pass-4", "basic-Pass-5", "url-Pass-6"]
    site.add_user("careful", secrets[0])
    site.login("careful")
    site.patch("/careful", {"password": secrets[1]}, user="careful")
    site.login("careful", secrets[1])
    site.add_index("careful/mirror", type="mirror", mirror_url="http://robot:%s@127.0.0.1:9/simple/" % secrets[2])
    site.add_index("careful/dev", webhook_secret=secrets[3])
    site.patch("/careful/dev", {"uploadtrigger_jenkins": "http://robot:%s@127.0.0.1:9/" % secrets[5]}, user="careful")
    site.patch("/careful/dev", ["webhook_secret=" + secrets[3] + "x"], user="careful")
    site.upload("careful/dev", wheel("careful", "1.0"), user="careful", password=secrets[4])
    text = site.get("/+audit?limit=1000", user="root").text
    assert "careful/mirror" in text
    assert [secret for secret in secrets + [site.tokens["careful"]] if secret in text] == []


# Reading it


def test_audit_is_for_root_alone(site):
    for options in ({}, {"user": "aud"}, {"user": "root", "password": "wrong"}):
        reply = site.get("/+audit", headers={"X-Real-IP": "203.0.113.8"}, **options)
        assert reply.status == 403, reply
        assert reply.json()["message"] and "result" not in reply.json()
    reply = site.get("/+audit", user="root")
    assert (reply.status, reply.headers["Content-Type"]) == (200, "application/json")
    assert set(reply.json()) == {"type", "result", "next"} and reply.json()["type"] == "audit"
    for method in ("POST", "DELETE", "PUT", "PATCH"):
        assert site.request(method, "/+audit", user="root").status == 404


def test_pages_hold_every_entry_once_newest_first(site):
    for number in range(105):
        assert site.patch("/aud", {("title", "description")[number % 2]: "number %d" % number}, user="aud").status == 200
    everything = audited(site, limit=1000)
    assert audit(site, limit=1000)["next"] is None
    ids = [row["id"] for row in everything]
    assert ids == sorted(set(ids), reverse=True) and len(ids) > 105
    assert [row["time"] for row in everything] == sorted((row["time"] for row in everything), reverse=True)
    assert audited(site) == everything[:100], "100 is the default"

    paged, query = [], {"limit": 40}
    while True:
        page = audit(site, **query)
        paged += page["result"]
        assert len(page["result"]) == 40 or page["next"] is None
        if page["next"] is None:
            break
        query["before"] = page["next"]
    assert paged == everything
    assert audited(site, before=ids[4], limit=3) == everything[5:8]
    assert (audited(site, before=ids[-1]), audit(site, before=ids[-1])["next"]) == ([], None)
    exactly = audit(site, before=ids[-5], limit=4)
    assert (exactly["result"], exactly["next"]) == (everything[-4:], None)


def test_filters_choose_and_combine(site, index):
    site.post_file(index, wheel("filtered", "1.0"))
    site.post_file(index, wheel("filtered", "2.0"))
    site.delete("/%s/filtered/1.0" % index, user="root")
    everything = audited(site, limit=1000)
    for filters in (
        {"who": "root"}, {"who": "aud"}, {"index": index}, {"action": "upload"}, {"action": "delete.version", "who": "root"},
        {"index": index, "action": "upload"}, {"index": index, "who": "aud", "action": "index.create"},
    ):
        expected = [row for row in everything if all(
            row[key] == value or key == "who" and (row["action"], row["target"]) == ("login.failed", value)
            for key, value in filters.items())]
        assert expected and expected != everything
        assert audited(site, limit=1000, **filters) == expected
    assert [row["action"] for row in audited(site, index=index)] == ["delete.version", "upload", "upload", "index.create"]
    first = audit(site, index=index, limit=3)
    assert first["next"] is not None
    assert [row["action"] for row in audited(site, index=index, limit=3, before=first["next"])] == ["index.create"]
    for nothing in ({"who": "nobody"}, {"index": "aud/de"}, {"index": "%"}, {"action": "uploa_"}):
        assert audit(site, **nothing) == {"type": "audit", "result": [], "next": None}


@pytest.mark.parametrize("query", ["limit=x", "limit=-1", "limit=1.5", "limit=", "before=x", "before=1.5", "before="])
def test_numbers_of_the_query_are_checked(site, query):
    reply = site.get("/+audit?" + query, user="root")
    assert (reply.status, bool(reply.json()["message"])) == (400, True)


# How much of it is kept


def test_newest_entries_are_kept_and_survive_kill_9(make_server):
    server = make_server("--audit-rows", "20")
    server.add_user("aud")
    server.login("aud")
    server.login("root")
    for number in range(30):
        server.patch("/aud", {("title", "description")[number % 2]: "number %d" % number}, user="aud")
    kept = eventually(lambda: (lambda found: len(found) == 20 and found)(audited(server, limit=1000)))
    changes = [row["serial"] for row in kept if row["who"] == "aud"]
    assert [row["action"] for row in kept if row["who"] != "aud"] == ["user.create"] * (20 - len(changes))
    assert changes == list(range(serial(server), serial(server) - len(changes), -1)) and len(changes) > 17
    server.kill()
    server.start()
    assert audited(server, limit=1000) == kept
