"""Triggers: Jenkins jobs and signed webhooks, told of changes by an outbox that outlives the process [W22]."""

import ast
import contextlib
import datetime
import hashlib
import hmac
import json
import re
import socket
import sqlite3
import subprocess
import sys
import time
import uuid

import pytest

import devpi_lite
from harness import (
    Server, documentation, eventually, new_index, patched, path_of, sdist, serial, serial_of,
    upload_docs, wheel)
from receiver import Receiver

BODY_KEYS = {"id", "event", "index", "project", "version", "file", "sha256", "url", "user", "serial", "ts"}
SECRET = "the-secret-of-the-hook"
TRIES = 10
QUICK = 5  # seconds that an upload may take whatever its targets do; a target has 10



# Helpers


def module_server(*options):
    """A fixture: a server with these options; `tri` owns all indexes, `other` nothing."""

    @pytest.fixture(scope="module")
    def server(tmp_path_factory):
        server = Server(tmp_path_factory.mktemp("triggers") / "server", *options).start()
        for name in ("tri", "other"):
            server.add_user(name)
            server.login(name)
        server.login("root")
        yield server
        if server.running:
            server.kill()

    return server


# Ten tries take half a second.
site = module_server("--webhook-retry", "0.001")
# One whose pauses can be measured, which knows where it is and whom it may talk to, and which is stopped and killed.
guarded = module_server(
    "--webhook-retry", "0.1", "--outside-url", "https://pypi.example.org/sub", "--webhook-allow", "127.0.0.1,*.example.com"
)


@pytest.fixture
def make_receiver():
    made = []

    def make():
        made.append(Receiver().start())
        return made[-1]

    yield make
    for receiver in made:
        receiver.stop()


@pytest.fixture
def receiver(make_receiver):
    return make_receiver()


def hooked(server, *urls, **config):
    return new_index(server, "tri", webhook_url=list(urls), **config)


def submit(server, index, name, version):
    return server.post_form(index, {":action": "submit", "name": name, "version": version}, user="tri")


def assert_queued(reply):
    assert (reply.status, reply.headers.get_all("X-Devpi-Trigger")) == (200, ["queued"])


def outbox(server, receiver):
    """The entries of the status about a receiver, by kind, as root sees them."""
    entries = [entry for entry in server.get("/+status", user="root").result["outbox"] if entry["target"] == receiver.url]
    assert len({entry["kind"] for entry in entries}) == len(entries)
    return {entry["kind"]: entry for entry in entries}


def count(server, receiver, key):
    return sum(entry[key] for entry in outbox(server, receiver).values())


def delivered(server, receiver, n, path="*"):
    """The n messages that arrived, and no others: nothing is left to send either."""
    receiver.wait_for(n, path)
    eventually(lambda: count(server, receiver, "waiting") == 0)
    assert count(server, receiver, "dead") == 0
    requests = list(receiver.requests)
    assert len(requests) == n, requests
    return requests


def only_one(server, receiver):
    (request,) = delivered(server, receiver, 1)
    return request.json()


def assert_now(text):
    moment = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.timezone.utc)
    assert abs(time.time() - moment.timestamp()) < 60, text


def signature(body, secret):
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


# The Jenkins trigger


def test_jenkins_gets_the_form_that_starts_a_job(site, receiver):
    index = new_index(site, "tri", uploadtrigger_jenkins=receiver.url + "/job/tests/build")
    assert_queued(site.post_file(index, wheel("jenkinsform", "1.0")))
    (request,) = delivered(site, receiver, 1)
    assert (request.method, request.path) == ("POST", "/job/tests/build")
    submit, name, parameters, (field, filename, script) = request.parts
    assert (submit, name) == (("Submit", None, b"Build"), ("name", None, b"jobscript.py"))
    assert parameters[:2] == ("json", None)
    assert json.loads(parameters[2]) == {"parameter": {"name": "jobscript.py", "file": "file0"}}
    assert (field, filename) == ("file0", "file0")
    assert script
    assert b'Content-Disposition: form-data; name="file0"; filename="file0"\r\n\r\n' in request.body, "it has no type"
    assert int(request.headers["Content-Length"]) == len(request.body)


def test_script_for_jenkins_tests_the_release_with_the_standard_library_alone(site, receiver):
    index = new_index(site, "tri", uploadtrigger_jenkins=receiver.url + "/build")
    site.post_file(index, sdist("jenkinsscript", "1.0"))
    (request,) = delivered(site, receiver, 1)
    script = request.files["file0"][1].decode()
    tree = ast.parse(script)
    compile(tree, "jobscript.py", "exec")
    assert "jenkinsscript==1.0" in script
    assert re.search(r"%s/%s\b" % (re.escape(site.url), index), script)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported
    bare = subprocess.run([sys.executable, "-ISc", "import " + ", ".join(sorted(imported))], timeout=30)
    assert bare.returncode == 0, imported


@pytest.mark.parametrize("template, path", [
    ("/job/{pkgname}/build?version={pkgversion}", "/job/quoted/build?version=1.0%2Blocal.1"),
    ("/{pkgname}/{pkgname}-{pkgversion}", "/quoted/quoted-1.0%2Blocal.1"),
    ("/job/fixed/buildWithParameters?token=T", "/job/fixed/buildWithParameters?token=T")])
def test_placeholders_of_the_jenkins_url_are_filled_in_and_quoted(site, receiver, template, path):
    index = new_index(site, "tri", uploadtrigger_jenkins=receiver.url + template)
    site.post_file(index, wheel("quoted", "1.0+local.1"))
    (request,) = delivered(site, receiver, 1)
    assert request.path == path


def test_other_braces_in_the_jenkins_url_never_break_an_upload(site, receiver):
    index = new_index(site, "tri")
    if site.patch("/" + index, {"uploadtrigger_jenkins": receiver.url + "/{unknown}/{0}/{/{pkgname}"}, user="tri").status == 200:
        assert_queued(site.post_file(index, wheel("braces", "1.0")))
        assert "braces" in delivered(site, receiver, 1)[0].path
    else:
        assert site.get("/" + index).result.get("uploadtrigger_jenkins") is None


def test_only_uploaded_release_files_start_a_job(site, receiver):
    source = new_index(site, "tri")
    index = new_index(site, "tri", uploadtrigger_jenkins=receiver.url + "/{pkgname}", volatile=False)
    site.post_file(source, wheel("pushed", "1.0"))
    replies = [
        submit(site, index, "registered", "1.0"),
        upload_docs(site, index, documentation("registered", "1.0")),
        site.push(source, "pushed", "1.0", targetindex=index),
        site.post(path_of(wheel("pushed", "1.0"), index), {"testenvs": {}}),
        site.post_file(index, wheel("pushed", "1.0")),
        site.delete(path_of(wheel("pushed", "1.0"), index) + "?force", user="tri")]
    assert [reply.status for reply in replies] == [200] * len(replies)
    assert [reply.headers.get("X-Devpi-Trigger") for reply in replies] == [None] * len(replies)
    assert_queued(site.post_file(index, sdist("uploaded", "1.0")))
    (request,) = delivered(site, receiver, 1)
    assert request.path == "/uploaded"


def test_jenkins_and_webhook_of_one_index_are_told_each_of_its_own(site, receiver):
    source = new_index(site, "tri")
    index = hooked(site, receiver.url + "/hook", webhook_events=["docs", "push"], uploadtrigger_jenkins=receiver.url + "/job")
    site.post_file(source, wheel("both", "2.0"))
    assert_queued(site.post_file(index, wheel("both", "1.0")))
    assert_queued(upload_docs(site, index, documentation("both", "1.0")))
    assert site.push(source, "both", "2.0", targetindex=index).status == 200
    told = [(request.path, request.headers.get("X-Devpi-Event")) for request in delivered(site, receiver, 3)]
    assert sorted(told, key=str) == [("/hook", "docs"), ("/hook", "push"), ("/job", None)]


def test_each_file_of_a_release_starts_a_job(site, receiver):
    index = new_index(site, "tri", uploadtrigger_jenkins=receiver.url + "/build")
    for archive in (wheel("twofiles", "1.0"), sdist("twofiles", "1.0")):
        assert_queued(site.post_file(index, archive))
    delivered(site, receiver, 2)


def test_user_and_password_in_the_jenkins_url_are_sent_as_credentials_and_shown_nowhere(site, receiver):
    receiver.answer(500, times=1)
    address = receiver.url.replace("http://", "http://robot:job-pass%40word@")
    index = new_index(site, "tri", uploadtrigger_jenkins=address + "/job/build-path?token=job-token")
    site.post_file(index, wheel("credentials", "1.0"))
    first, second = delivered(site, receiver, 2)
    assert first.credentials == second.credentials == ("robot", "job-pass@word")
    assert second.path == "/job/build-path?token=job-token"
    assert second.headers["Host"] == receiver.url[len("http://"):]
    shown = site.get("/+status", user="root").text + site.get("/+audit", user="root").text + site.whole_output()
    for secret in ("job-pass", "job-token"):
        assert secret not in shown


# Generic webhooks: what is sent


def test_webhook_tells_of_an_upload(site, receiver):
    index = hooked(site, receiver.url + "/hook?x=1", webhook_secret=SECRET)
    archive = wheel("told", "1.0")
    reply = site.post_file(index, archive)
    assert_queued(reply)
    (request,) = delivered(site, receiver, 1)
    assert (request.method, request.path) == ("POST", "/hook?x=1")
    assert request.headers["Content-Type"].startswith("application/json")
    assert request.headers["X-Devpi-Event"] == "upload"
    assert request.headers["X-Devpi-Signature-256"] == signature(request.body, SECRET)
    assert uuid.UUID(request.headers["X-Devpi-Delivery"])
    body = request.json()
    assert set(body) == BODY_KEYS
    assert body.pop("id")
    assert_now(body.pop("ts"))
    assert body == {
        "event": "upload", "index": index, "project": "told", "version": "1.0", "file": archive.filename,
        "sha256": archive.sha256, "url": path_of(archive, index), "user": "tri", "serial": serial_of(reply)}


def test_webhook_tells_of_documentation(site, receiver):
    index = hooked(site, receiver.url + "/hook")
    docs = documentation("doctold", "1.0")
    reply = upload_docs(site, index, docs)
    assert_queued(reply)
    body = only_one(site, receiver)
    assert set(body) == BODY_KEYS
    assert {key: body[key] for key in BODY_KEYS - {"id", "ts"}} == {
        "event": "docs", "index": index, "project": "doctold", "version": "1.0", "file": docs.filename,
        "sha256": docs.sha256, "url": path_of(docs, index), "user": "tri", "serial": serial_of(reply)}


@pytest.mark.parametrize("user", ["tri", None])
def test_webhook_tells_of_a_test_result(site, receiver, user):
    index = hooked(site, receiver.url + "/hook", webhook_events="toxresult")
    archive = wheel("tested", "1.0")
    site.post_file(index, archive)
    reply = site.post(path_of(archive, index), {"testenvs": {}}, user=user)
    assert reply.status == 200
    body = only_one(site, receiver)
    assert set(body) == BODY_KEYS
    assert (body["event"], body["index"], body["project"], body["version"]) == ("toxresult", index, "tested", "1.0")
    assert (body["user"], body["serial"]) == (user, serial_of(reply))
    assert body["file"].startswith(archive.filename) and body["url"].endswith("/" + body["file"])
    file = site.get(body["url"], headers={"Accept": "*/*"})
    assert (file.status, hashlib.sha256(file.body).hexdigest()) == (200, body["sha256"])


def test_webhook_of_the_target_tells_once_of_a_push(site, make_receiver):
    of_source, of_target = make_receiver(), make_receiver()
    source, target = hooked(site, of_source.url, webhook_events=["push", "delete"]), hooked(site, of_target.url)
    archives = [wheel("pushtold", "1.0"), sdist("pushtold", "1.0")]
    for archive in archives:
        site.post_file(source, archive)
    upload_docs(site, source, documentation("pushtold", "1.0"))
    site.post(path_of(archives[0], source), {"testenvs": {}})
    reply = site.push(source, "pushtold", "1.0", targetindex=target)
    assert reply.status == 200
    body = only_one(site, of_target)
    assert set(body) == BODY_KEYS | {"source"}
    assert (body["event"], body["index"], body["source"]) == ("push", target, source)
    assert (body["project"], body["version"], body["file"]) == ("pushtold", "1.0", None)
    assert (body["user"], body["serial"]) == ("tri", serial_of(reply))
    delivered(site, of_source, 0)


@pytest.mark.parametrize("what, version, file", [
    ("file", "1.0", wheel("deleted", "1.0").filename), ("version", "1.0", None), ("project", None, None)])
def test_webhook_tells_once_of_what_one_request_deleted(site, receiver, what, version, file):
    index = hooked(site, receiver.url, webhook_events=["delete"])
    for archive in (wheel("deleted", "1.0"), sdist("deleted", "1.0"), wheel("deleted", "2.0")):
        assert site.post_file(index, archive).headers.get("X-Devpi-Trigger") is None
    path = {"file": path_of(wheel("deleted", "1.0"), index), "version": "/%s/deleted/1.0" % index, "project": "/%s/deleted" % index}
    reply = site.delete(path[what], user="tri")
    assert reply.status == 200
    body = only_one(site, receiver)
    assert set(body) == BODY_KEYS
    assert {key: body[key] for key in BODY_KEYS - {"id", "ts", "sha256", "url"}} == {
        "event": "delete", "index": index, "project": "deleted", "version": version, "file": file,
        "user": "tri", "serial": serial_of(reply)}


def test_deleting_the_last_file_of_a_project_is_one_event(site, receiver):
    index = hooked(site, receiver.url, webhook_events=["delete"])
    archive = wheel("lastone", "1.0")
    site.post_file(index, archive)
    site.delete(path_of(archive, index), user="tri")
    assert site.get("/%s/lastone" % index).result == {}
    assert only_one(site, receiver)["file"] == archive.filename


def test_replacing_a_file_is_an_upload_and_no_delete(site, receiver):
    index = hooked(site, receiver.url)
    for archive in (wheel("replaced", "1.0"), wheel("replaced", "1.0", size=10)):
        assert_queued(site.post_file(index, archive))
    bodies = [request.json() for request in delivered(site, receiver, 2)]
    assert {body["event"] for body in bodies} == {"upload"}
    assert {body["sha256"] for body in bodies} == {wheel("replaced", "1.0").sha256, wheel("replaced", "1.0", size=10).sha256}


def test_url_is_absolute_where_the_outside_url_is_known(guarded, receiver):
    index = hooked(guarded, receiver.url, uploadtrigger_jenkins=receiver.url + "/jenkins")
    archive = wheel("outsidehook", "1.0")
    guarded.post_file(index, archive)
    delivered(guarded, receiver, 2)
    (hook,), (job,) = receiver.wait_for(1, "/"), receiver.wait_for(1, "/jenkins")
    assert hook.json()["url"] == "https://pypi.example.org/sub" + path_of(archive, index)
    assert "https://pypi.example.org/sub/%s" % index in job.files["file0"][1].decode()


def test_every_url_gets_its_own_delivery_of_every_event(site, make_receiver):
    first, second = make_receiver(), make_receiver()
    index = hooked(site, first.url + "/a", first.url + "/b", second.url + "/c")
    archives = [wheel("many", "%d.0" % number) for number in range(3)]
    for archive in archives:
        site.post_file(index, archive)
    requests = delivered(site, first, 6) + delivered(site, second, 3)
    for path in ("/a", "/b", "/c"):
        files = [request.json()["file"] for request in requests if request.path == path]
        assert sorted(files) == [archive.filename for archive in archives]
    assert len({request.headers["X-Devpi-Delivery"] for request in requests}) == 9
    assert len({request.json()["id"] for request in requests}) in (3, 9), "an id for each event, or for each message"


# Which events are sent


@pytest.mark.parametrize("events, expected", [
    (["upload"], ["upload"]),
    ("docs, delete", ["docs", "delete"]),
    (["toxresult", "push"], ["push", "toxresult"]),
    (["upload", "docs", "toxresult", "push", "delete"], ["upload", "docs", "push", "toxresult", "delete"])])
def test_webhook_events_chooses_what_is_told(site, receiver, events, expected):
    source, index = new_index(site, "tri"), hooked(site, receiver.url, webhook_events=events)
    archive = wheel("chosen", "2.0")
    site.post_file(source, archive)
    replies = {
        "upload": site.post_file(index, wheel("chosen", "1.0")),
        "docs": upload_docs(site, index, documentation("chosen", "1.0")),
        "push": site.push(source, "chosen", "2.0", targetindex=index),
        "toxresult": site.post(path_of(archive, index), {"testenvs": {}}),
        "delete": site.delete("/%s/chosen/1.0" % index, user="tri")}
    assert {reply.status for reply in replies.values()} == {200}
    for event in ("upload", "docs"):
        assert replies[event].headers.get("X-Devpi-Trigger") == ("queued" if event in expected else None)
    told = [request.json()["event"] for request in delivered(site, receiver, len(expected))]
    assert sorted(told) == sorted(expected)


def test_nothing_is_told_of_what_changed_nothing_or_happened_elsewhere(site, receiver):
    base = new_index(site, "tri")
    index = hooked(site, receiver.url, bases=[base], volatile=False)
    archive = wheel("quiet", "1.0")
    site.post_file(base, wheel("quiet", "0.1"))
    assert_queued(site.post_file(index, archive))
    delivered(site, receiver, 1)
    before = serial(site)
    refused = {
        "identical": (site.post_file(index, archive), 200),
        "other bytes": (site.post_file(index, wheel("quiet", "1.0", size=9)), 409),
        "bad name": (submit(site, index, "-bad", "1"), 400),
        "stranger": (site.delete(path_of(archive, index) + "?force", user="other"), 403),
        "not forced": (site.delete(path_of(archive, index), user="tri"), 403),
        "unknown": (site.delete("/%s/nothing?force" % index, user="tri"), 404),
        "no JSON": (site.post(path_of(archive, index), b"{", user="tri"), 400),
        "push of nothing": (site.push(base, "nothing", "1.0", targetindex=index), 400)}
    assert {name: reply.status for name, (reply, _) in refused.items()} == {name: code for name, (_, code) in refused.items()}
    assert {reply.headers.get("X-Devpi-Trigger") for reply, _ in refused.values()} == {None}
    assert serial(site) == before
    for reply in (submit(site, index, "quiet", "3.0"), site.post_file(base, wheel("quiet", "0.2"))):
        assert (reply.status, reply.headers.get("X-Devpi-Trigger")) == (200, None)
    delivered(site, receiver, 1)
    assert_queued(site.post_file(index, wheel("quiet", "4.0")))
    assert [request.json()["version"] for request in delivered(site, receiver, 2)] == ["1.0", "4.0"]


# The keys of an index


def test_keys_are_absent_until_set_and_can_be_removed(site, receiver):
    index = new_index(site, "tri")
    plain = site.get("/" + index).result
    assert not [key for key in plain if key.startswith(("webhook", "uploadtrigger"))]
    config = {"uploadtrigger_jenkins": receiver.url + "/j/{pkgname}", "webhook_url": receiver.url + "/a," + receiver.url + "/b",
              "webhook_events": "upload,push", "webhook_secret": SECRET}
    expected = dict(plain, uploadtrigger_jenkins=receiver.url + "/j/{pkgname}", webhook_url=[receiver.url + "/a", receiver.url + "/b"],
                    webhook_events=["upload", "push"])
    del expected["projects"]
    assert site.patch("/" + index, config, user="tri").result == expected
    removed = site.patch("/" + index, ["webhook_url-=" + receiver.url + "/a", "webhook_events+=docs"], user="tri").result
    assert (removed["webhook_url"], removed["webhook_events"]) == ([receiver.url + "/b"], ["upload", "push", "docs"])
    reply = site.patch("/" + index, [key + "-=" for key in config], user="tri")
    assert (reply.status, site.get("/" + index).result) == (200, plain)
    assert site.post_file(index, wheel("unhooked", "1.0")).headers.get("X-Devpi-Trigger") is None
    delivered(site, receiver, 0)


def test_empty_value_unsets_the_jenkins_trigger(site, receiver):
    index = new_index(site, "tri", uploadtrigger_jenkins=receiver.url)
    assert site.patch("/" + index, ["uploadtrigger_jenkins="], user="tri").status == 200
    assert "uploadtrigger_jenkins" not in site.get("/" + index).result
    assert site.post_file(index, wheel("unset", "1.0")).headers.get("X-Devpi-Trigger") is None
    delivered(site, receiver, 0)


@pytest.mark.parametrize("key, value", [
    ("uploadtrigger_jenkins", "ftp://127.0.0.1/x"), ("uploadtrigger_jenkins", "127.0.0.1/x"),
    ("uploadtrigger_jenkins", "http://"), ("uploadtrigger_jenkins", "file:///etc/passwd"), ("uploadtrigger_jenkins", 5),
    ("uploadtrigger_jenkins", {"url": "http://127.0.0.1"}), ("uploadtrigger_jenkins", "http://127.0.0.1/\r\nX-Evil: 1"),
    ("webhook_url", "ftp://127.0.0.1/x"), ("webhook_url", ["http://127.0.0.1/x", "nothing"]), ("webhook_url", ["http:///x"]),
    ("webhook_url", ["file:///etc/passwd"]), ("webhook_url", [5]), ("webhook_url", 5), ("webhook_url", {"a": "http://127.0.0.1"}),
    ("webhook_url", ["http://127.0.0.1/\r\nX-Evil: 1"]), ("webhook_url", ["http://127.0.0.1:99999/"]),
    ("webhook_events", ["uplaod"]), ("webhook_events", "upload,everything"), ("webhook_events", 5), ("webhook_events", [5]),
    ("webhook_secret", 5), ("webhook_secret", ["a"]), ("webhook_secret", {"a": "b"})])
def test_bad_values_are_refused(site, key, value):
    index = new_index(site, "tri")
    before, config = serial(site), site.get("/" + index).body
    for reply in (
        site.patch("/" + index, {key: value}, user="tri"),
        site.put("/tri/bad", {key: value}, user="tri"),
    ):
        assert reply.status == 400, reply
        assert reply.json()["message"]
    assert (serial(site), site.get("/" + index).body, site.get("/tri/bad").status) == (before, config, 404)


def test_only_who_may_change_the_index_sets_its_triggers(site, receiver):
    index = new_index(site, "tri")
    before = serial(site)
    assert site.patch("/" + index, {"webhook_url": receiver.url}, user="other").status == 403
    assert site.patch("/" + index, {"webhook_url": receiver.url}).status == 403
    assert (serial(site), "webhook_url" in site.get("/" + index).result) == (before, False)


# The signature and its secret


def test_signature_follows_the_secret(site, receiver):
    index = hooked(site, receiver.url)
    for number, change in enumerate([None, {"webhook_secret": "one"}, {"volatile": True}, {"webhook_secret": "zw\u00f6lf"},
                                     ["webhook_secret-="]]):
        if change is not None:
            assert site.patch("/" + index, change, user="tri").status == 200
        site.post_file(index, wheel("signed", "%d.0" % number))
        delivered(site, receiver, number + 1)
    signatures = [request.headers.get("X-Devpi-Signature-256") for request in receiver.requests]
    assert signatures == [
        None, signature(receiver.requests[1].body, "one"), signature(receiver.requests[2].body, "one"),
        signature(receiver.requests[3].body, "zw\u00f6lf"), None]


def test_secret_is_never_shown(site, receiver):
    index = "tri/secretive"
    secret = "nobody-reads-this-secret"
    receiver.answer(500, times=1)
    replies = [site.put("/" + index, {"webhook_url": [receiver.url], "webhook_secret": secret}, user="tri")]
    replies.append(site.patch("/" + index, {"webhook_secret": secret, "title": "t"}, user="tri"))
    replies.append(site.patch("/" + index, ["webhook_secret=" + secret, "title=u"], user="tri"))
    replies.append(site.patch("/" + index, dict(site.get("/" + index, user="tri").result, title="v"), user="tri"))
    replies.append(site.patch("/%s" % index, {"webhook_secret": secret, "webhook_events": ["no"]}, user="tri"))
    assert [reply.status for reply in replies] == [200, 200, 200, 200, 400]
    site.post_file(index, wheel("secretive", "1.0"))
    requests = delivered(site, receiver, 2)
    assert {request.headers["X-Devpi-Signature-256"] for request in requests} == {signature(requests[0].body, secret)}
    for user in ("tri", "root", None):
        replies += [site.get(path, user=user) for path in ("/", "/tri", "/" + index, "/+status", "/+audit", "/+metrics")]
    shown = [reply.text for reply in replies] + [site.whole_output()] + [
        "%s %s" % (request.headers, request.body) for request in requests]
    assert [text for text in shown if secret in text] == []
    assert "webhook_secret" not in site.get("/" + index, user="tri").result
    assert "webhook_secret" not in site.get("/tri", user="tri").result["indexes"]["secretive"]


# Delivery


def test_hanging_target_slows_neither_uploads_nor_other_targets(site, make_receiver):
    hanging, healthy = make_receiver(), make_receiver()
    hanging.fault("hang")
    index = hooked(site, hanging.url, healthy.url, uploadtrigger_jenkins=hanging.url)
    for number in range(4):
        began = time.monotonic()
        assert_queued(site.post_file(index, wheel("slowtarget", "%d.0" % number)))
        assert time.monotonic() - began < QUICK
        healthy.wait_for(number + 1, seconds=8)
    delivered(site, healthy, 4)
    assert count(site, hanging, "waiting") == 8
    assert hanging.connections == 1, "one worker for a target"


def test_dead_target_slows_neither_uploads_nor_other_targets(site, make_receiver):
    closed, healthy = make_receiver(), make_receiver()
    closed.stop()
    index = hooked(site, closed.url, healthy.url)
    began = time.monotonic()
    for number in range(4):
        assert_queued(site.post_file(index, wheel("deadtarget", "%d.0" % number)))
    delivered(site, healthy, 4)
    assert time.monotonic() - began < QUICK


@pytest.mark.parametrize("misbehave", [
    lambda receiver: receiver.answer(503, path="/broken"), lambda receiver: receiver.fault("drop", path="/broken")], ids=["503", "drop"])
def test_failing_path_does_not_hold_up_the_others_of_its_host(site, receiver, misbehave):
    """A proxy in front of several services: one of them is broken."""
    misbehave(receiver)
    index = hooked(site, receiver.url + "/broken", receiver.url + "/healthy", uploadtrigger_jenkins=receiver.url + "/job")
    for number in range(2):
        site.post_file(index, wheel("brokenpath", "%d.0" % number))
    for path in ("/healthy", "/job"):
        receiver.wait_for(2, path)
    eventually(lambda: count(site, receiver, "dead") == 2)
    assert count(site, receiver, "waiting") == 0
    assert sorted(request.path for request in receiver.requests if request.path != "/broken") == ["/healthy"] * 2 + ["/job"] * 2


@pytest.mark.parametrize("fault", ["drop", "reset", "garbage"])
def test_message_is_sent_again_after_a_broken_connection(site, receiver, fault):
    receiver.fault(fault, times=1)
    index = hooked(site, receiver.url, webhook_secret=SECRET)
    archive = wheel("broken", "1.0")
    site.post_file(index, archive)
    requests = delivered(site, receiver, 1 if fault == "reset" else 2)  # a reset comes before the body is read
    assert receiver.connections == 2
    assert {request.json()["file"] for request in requests} == {archive.filename}


@pytest.mark.parametrize("status", [400, 404, 410, 500, 503])
def test_any_answer_but_2xx_is_a_failure(site, receiver, status):
    receiver.answer(status, b"no", times=1)
    receiver.answer(204)
    site.post_file(hooked(site, receiver.url), wheel("failing", "1.0"))
    delivered(site, receiver, 2)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_failures_and_not_followed(site, make_receiver, status):
    receiver, elsewhere = make_receiver(), make_receiver()
    receiver.answer(status, headers={"Location": elsewhere.url + "/elsewhere"}, times=1)
    index = hooked(site, receiver.url + "/hook")
    site.post_file(index, wheel("redirected", "1.0"))
    assert [request.path for request in delivered(site, receiver, 2)] == ["/hook", "/hook"]
    assert elsewhere.connections == 0


def test_answers_without_end_are_cut_off(site, receiver):
    receiver.fault("endless", times=1)
    index = hooked(site, receiver.url)
    site.post_file(index, wheel("endless", "1.0"))
    site.post_file(index, wheel("endless", "2.0"))
    eventually(lambda: {request.json()["version"] for request in receiver.requests} == {"1.0", "2.0"})
    eventually(lambda: count(site, receiver, "waiting") == 0)
    assert receiver.sent < 64 << 20, "what fits into the buffers on the way, at most"


def test_tries_are_apart_by_pauses_that_double_and_carry_the_same_message(guarded, receiver):
    for _ in range(5):      # a busy machine may make a pause longer, but not every time
        receiver.reset()
        receiver.answer(500, times=3)
        guarded.post_file(hooked(guarded, receiver.url, webhook_secret=SECRET), wheel("patient", "1.0"))
        requests = delivered(guarded, receiver, 4)
        pauses = [later.at - earlier.at for earlier, later in zip(requests, requests[1:])]
        late = [pause - expected for pause, expected in zip(pauses, (0.1, 0.2, 0.4))]
        assert all(over > -0.01 for over in late), pauses
        if all(over < 0.6 for over in late):
            break
    assert all(over < 0.6 for over in late), pauses
    assert len({request.body for request in requests}) == 1
    for header in ("X-Devpi-Delivery", "X-Devpi-Event", "X-Devpi-Signature-256"):
        assert len({request.headers[header] for request in requests}) == 1


def test_message_is_dead_after_ten_tries_until_root_revives_it(site, receiver):
    receiver.answer(503, b"down-text")
    index = hooked(site, receiver.url + "/hook-path", uploadtrigger_jenkins=receiver.url + "/job-path")
    assert_queued(site.post_file(index, wheel("hopeless", "1.0")))
    eventually(lambda: count(site, receiver, "dead") == 2)
    assert sorted(request.path for request in receiver.requests) == ["/hook-path"] * TRIES + ["/job-path"] * TRIES
    entries = outbox(site, receiver)
    for kind in ("webhook", "jenkins"):
        error = entries[kind].pop("last-error")
        assert error and "503" in error and "-path" not in error
        assert entries[kind] == {"target": receiver.url, "kind": kind, "waiting": 0, "dead": 1}

    for user in (None, "tri"):
        reply = site.post("/+outbox/retry", user=user)
        assert (reply.status, bool(reply.json()["message"])) == (403, True)
    assert site.get("/+outbox/retry", user="root").status == 404
    assert count(site, receiver, "dead") == 2

    receiver.reset()
    reply = site.post("/+outbox/retry", user="root")
    assert (reply.status, bool(reply.json()["message"])) == (200, True)
    requests = delivered(site, receiver, 2)
    assert sorted(request.path for request in requests) == ["/hook-path", "/job-path"]


def test_status_shows_the_target_without_path_and_credentials(site, receiver):
    receiver.answer(500, b"upstream-says")
    address = receiver.url.replace("http://", "http://robot:hook-password@")
    index = hooked(site, address + "/hook-path?token=hook-token")
    site.post_file(index, wheel("shown", "1.0"))
    eventually(lambda: (outbox(site, receiver).get("webhook") or {}).get("last-error"))
    words = ("robot", "hook-password", "hook-path", "hook-token")
    for user in (None, "tri", "root"):
        entries = site.get("/+status", user=user).result["outbox"]
        assert entries and {tuple(sorted(entry)) for entry in entries} == {("dead", "kind", "last-error", "target", "waiting")}
        assert [word for word in words if word in json.dumps(entries)] == []
    assert [word for word in ("hook-password", "hook-token") if word in site.whole_output()] == []


def test_the_last_error_is_that_of_the_newest_message(guarded, receiver):
    receiver.answer(500, path="/older")
    receiver.answer(404, path="/newer")
    guarded.post_file(hooked(guarded, receiver.url + "/older", receiver.url + "/newer"), wheel("lasterror", "1.0"))
    receiver.wait_for(2)
    eventually(lambda: outbox(guarded, receiver)["webhook"]["last-error"] == "answered 404")    # not the greatest text
    receiver.reset()
    assert guarded.post("/+outbox/retry", user="root").status == 200
    delivered(guarded, receiver, 2)


# Turns


@contextlib.contextmanager
def hanging_targets(count):
    """URLs of servers that let us connect and say nothing."""
    with contextlib.ExitStack() as stack:
        yield ["http://127.0.0.1:%d/" % stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=9)).getsockname()[1]
               for _ in range(count)]


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """A server of eve, all of whose targets hang, and of alice."""
    server = Server(tmp_path_factory.mktemp("crowded") / "server").start()
    for name in ("alice", "eve"):
        server.add_user(name)
        server.login(name)
    server.login("root")
    with hanging_targets(140) as urls:
        for number in range(7):
            server.add_index("eve/dev%d" % number, webhook_url=urls[20 * number:20 * number + 20])
            assert server.upload("eve/dev%d" % number, wheel("many", "1.0"), user="eve").status == 200
        yield server
    server.kill()


def test_one_account_s_hanging_targets_hold_up_nobody_else_s(crowded, receiver):
    crowded.add_index("alice/dev", webhook_url=[receiver.url])
    for version in ("1.0", "2.0"):
        assert crowded.upload("alice/dev", wheel("prompt", version), user="alice").status == 200
        receiver.wait_for(int(version[0]), seconds=2)


def test_a_target_that_two_accounts_name_serves_each_in_a_lane_of_its_own(crowded, receiver):
    receiver.fault("hang", path="/eve")
    crowded.add_index("eve/same", webhook_url=[receiver.url + "/eve"])
    crowded.add_index("alice/same", webhook_url=[receiver.url + "/alice"])
    # before eve's other targets, which hang
    for user in ("eve", "alice"):
        assert crowded.upload(user + "/same", wheel("same", "1.0"), user=user).status == 200
    receiver.wait_for(1, "/alice", seconds=2)


def started(outbox, *waiting):
    """The lanes that the outbox starts out of those waiting, each given as (is it slow, when it was due, target, account)."""
    outbox.workers = devpi_lite.Workers("test", 0, None)        # which keeps what it is given
    for is_slow, _, target, account in waiting:
        if is_slow:
            outbox.slow[target, account] = True
    outbox._start([(is_slow, due, (target, account)) for is_slow, due, target, account in waiting])
    begun = outbox.workers.waiting
    return [begun.get() for _ in range(len(begun))]


def test_accounts_take_turns_and_slow_targets_wait_for_the_others(monkeypatch):
    for name, value in (("targets", 6), ("slow_targets", 1)):
        monkeypatch.setattr(devpi_lite.Limits, name, value)
    outbox = devpi_lite.Outbox(None, None, None)
    eves = [(False, number, "e%d" % number, 1) for number in range(9)]
    assert started(outbox, *eves, (False, 99, "a", 2), (True, 0, "slow", 3)) == [
        ("e0", 1), ("a", 2), ("e1", 1), ("e2", 1), ("e3", 1), ("slow", 3)]
    outbox.busy.discard(("a", 2))           # eve has twice as many as are free, and more
    assert started(outbox, *eves[4:], (True, 1, "other slow", 4), (False, 100, "b", 4)) == [("b", 4)]
    outbox.busy -= {("e0", 1), ("e1", 1)}
    assert started(outbox, (True, 1, "other slow", 4), *eves[4:]) == [("e4", 1)]
    outbox.busy.clear()
    assert started(outbox, (True, 1, "slow", 3), (True, 2, "other slow", 4)) == [("slow", 3)]


def test_a_target_that_had_its_turn_waits_for_those_that_had_none():
    outbox = devpi_lite.Outbox(None, None, None)
    assert started(outbox, (False, (5.0, 1), "old", 1), (False, (4.0, 2), "older", 1), (False, (0, 3), "new", 1)) == [
        ("new", 1), ("older", 1), ("old", 1)]


def test_a_target_is_slow_until_it_is_not():
    outbox = devpi_lite.Outbox(None, None, None)
    outbox._note_speed(("t", 1), True)
    assert list(outbox.slow) == [("t", 1)]
    outbox._note_speed(("t", 1), False)
    assert not outbox.slow


def test_an_outbox_with_narrow_bounds(tmp_path):
    """Of too many messages the account with the most loses its oldest; who does not finish connecting is soon given up."""
    script = patched(tmp_path, "devpi_lite.Limits.outbox_of_all, devpi_lite.Limits.webhook_connect = 20, 0.2")
    server = Server(tmp_path / "server", "--webhook-retry", "1000", script=script).start()
    try:
        for name in ("alice", "eve"):
            server.add_user(name)
            server.login(name)
        server.login("root")
        with hanging_targets(1) as [url]:
            url = url.replace("http:", "https:")
            server.add_index("alice/dev", webhook_url=[url + str(number) for number in range(3)])
            server.upload("alice/dev", wheel("kept", "1.0"), user="alice")
            began = time.monotonic()
            for number in range(4):
                server.add_index("eve/dev%d" % number, webhook_url=[url + str(number) for number in range(8)])
                server.upload("eve/dev%d" % number, wheel("many", "1.0"), user="eve")
            with contextlib.closing(sqlite3.connect(str(server.directory / "devpi_lite.db"))) as db:
                owners = [name for name, in db.execute("SELECT name FROM outbox JOIN users ON users.id = account")]
            assert owners.count("alice") == 3 and 16 <= owners.count("eve") <= 17
            eventually(lambda: "timed out" in str(server.get("/+status", user="root").result["outbox"]))
            assert time.monotonic() - began < 8
    finally:
        server.kill()


# The outbox outlives the process


def test_what_was_queued_survives_kill_9(guarded, receiver):
    index = hooked(guarded, receiver.url + "/hook", uploadtrigger_jenkins=receiver.url + "/job", webhook_secret=SECRET)
    receiver.stop()
    archives = [wheel("durable", "%d.0" % number) for number in range(3)]
    for archive in archives:
        assert_queued(guarded.post_file(index, archive))
    guarded.kill()
    receiver.start()
    guarded.start()
    requests = delivered(guarded, receiver, 6)
    hooks = [request for request in requests if request.path == "/hook"]
    assert sorted(request.json()["file"] for request in hooks) == [archive.filename for archive in archives]
    assert all(request.headers["X-Devpi-Signature-256"] == signature(request.body, SECRET) for request in hooks)


def test_hanging_target_does_not_hold_up_the_end_of_the_server(guarded, receiver):
    receiver.fault("hang")
    guarded.post_file(hooked(guarded, receiver.url), wheel("stopping", "1.0"))
    receiver.wait_for(1)
    began = time.monotonic()
    assert guarded.stop() == 0
    assert time.monotonic() - began < 9     # and not when the target has had its 10 s
    receiver.reset()
    guarded.start()
    (request,) = delivered(guarded, receiver, 1)
    assert request.json()["version"] == "1.0"


def test_targets_are_checked_again_on_delivery(guarded, receiver):
    index = hooked(guarded, receiver.url)
    receiver.stop()
    guarded.post_file(index, wheel("rechecked", "1.0"))
    unreachable = eventually(lambda: outbox(guarded, receiver)["webhook"]["last-error"])
    guarded.kill()
    receiver.start()
    guarded.start("--webhook-allow", "ci.example.com")
    eventually(lambda: outbox(guarded, receiver)["webhook"]["last-error"] != unreachable)
    assert receiver.requests == []
    assert count(guarded, receiver, "waiting") + count(guarded, receiver, "dead") == 1
    guarded.restart()
    assert guarded.post("/+outbox/retry", user="root").status == 200
    delivered(guarded, receiver, 1)


# Where messages may go


ALLOWED = ["http://127.0.0.1:1/x", "https://127.0.0.1/x", "http://ci.example.com/x", "http://CI.Example.COM:8080/x",
           "http://user:pass@ci.example.com/x"]
FORBIDDEN = ["http://localhost:1/x", "http://example.com/x", "http://ci.example.com.evil.org/x", "http://127.0.0.1.evil.org/x",
             "http://127.0.0.1@evil.org/x", "http://127.0.0.1:80@evil.org/x", "http://evil.org/?x.example.com",
             "http://evil.org#ci.example.com", "http://[::1]/x", "http://{pkgname}/x", "http://{pkgname}.example.org/x"]


@pytest.mark.parametrize("key", ["webhook_url", "uploadtrigger_jenkins"])
@pytest.mark.parametrize("url", ALLOWED)
def test_webhook_allow_lets_hosts_and_globs_pass(guarded, key, url):
    reply = guarded.patch("/" + new_index(guarded, "tri"), {key: url}, user="tri")
    assert (reply.status, reply.result.get(key)) == (200, url if key == "uploadtrigger_jenkins" else [url])


@pytest.mark.parametrize("key", ["webhook_url", "uploadtrigger_jenkins"])
@pytest.mark.parametrize("url", FORBIDDEN)
def test_webhook_allow_refuses_all_other_hosts(guarded, key, url):
    index = new_index(guarded, "tri")
    before, config = serial(guarded), guarded.get("/" + index).body
    value = ["http://127.0.0.1/fine", url] if key == "webhook_url" else url
    reply = guarded.patch("/" + index, {key: value}, user="tri")
    assert (reply.status, bool(reply.json()["message"])) == (400, True)
    assert (serial(guarded), guarded.get("/" + index).body) == (before, config)
