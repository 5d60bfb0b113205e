"""The client's push: the server copies a release to another index, or to an outside one from ~/.pypirc."""

import io
import json
import re
import zipfile

import pytest

from client import Gate, file_path, manual
from harness import documentation, new_index, rels, sdist, upload_docs, wheel
from receiver import Receiver


@pytest.fixture(scope="module")
def release():
    """pushed 1.0: a wheel and an sdist."""
    return [wheel("pushed", "1.0"), sdist("pushed", "1.0")]


@pytest.fixture
def index(site, release):
    """An index of alice's with the release, a test result of its sdist, and its documentation."""
    index = new_index(site, "alice")
    for archive in release:
        assert site.upload(index, archive).status == 200
    report = {"host": "localhost", "platform": "linux", "testenvs": {}}
    assert site.post("/" + file_path(index, release[1]), report, user="alice").status == 200
    upload_docs(site, index, documentation("pushed", "1.0", "the manual"))
    return index


@pytest.fixture
def sink(devpi):
    """An index outside; the section `ext` of ~/.pypirc names it."""
    sink = Receiver().start()
    devpi.write(".pypirc", "[distutils]\nindex-servers = ext\n[ext]\nrepository = %s/legacy/\nusername = u\npassword = p%%w\n"
                % sink.url)
    yield sink
    sink.stop()


def test_a_release_is_pushed_to_another_index(devpi, site, index, release):
    target = new_index(site, "alice", volatile=False)
    printed = devpi("push", "pushed==1.0", target)
    sdist_path = file_path(target, release[1])
    assert printed.lines[:3] + printed.lines[4:] == [
        "   200 register pushed 1.0 -> " + target,
        "   200 store_releasefile " + file_path(target, release[0]), "   200 store_releasefile " + sdist_path,
        "   200 store_doczip pushed 1.0 -> " + target]
    assert re.fullmatch(r"   200 store_toxresult %s\.toxresult-\d{14}-0" % re.escape(sdist_path), printed.lines[3])
    assert sorted(rels(site, target + "/pushed/1.0")) == ["doczip", "releasefile", "releasefile", "toxresult"]
    assert manual(site, target + "/pushed/1.0") == "the manual"
    printed = devpi("push", "pushed==1.0", target, expect=1)
    assert printed.lines[:2] == [
        "PUSH %s/%s" % (site.url, index), "409 Conflict: %s already exists in non-volatile index, with the same content"
        % release[0].filename]


def test_documentation_that_came_later_is_pushed_by_the_command_that_is_named(devpi, site, index):
    target = new_index(site, "alice", volatile=False)
    devpi("push", "--no-docs", "pushed==1.0", target)
    printed = devpi("push", "pushed==1.0", target, expect=1)
    hint = "devpi push --only-docs pushed==1.0 " + target
    assert printed.lines[-1] == "the documentation is not there yet: " + hint
    assert "--only-docs" not in devpi("push", "--no-docs", "pushed==1.0", target, expect=1)
    elsewhere = devpi("push", "--index", index, "pushed==1.0", target.split("/")[1], expect=1)
    assert elsewhere.lines[-1].endswith(
        "devpi push --index %s --only-docs pushed==1.0 %s" % (index, target.split("/")[1]))
    devpi(*hint.split()[1:])
    assert manual(site, target + "/pushed/1.0") == "the manual"
    assert "--only-docs" not in devpi("push", "pushed==1.0", target, expect=1)


@pytest.mark.parametrize("option, kinds", [
    ("--no-docs", ["releasefile", "releasefile", "toxresult"]), ("--only-docs", ["doczip"])])
def test_documentation_is_left_out_or_pushed_alone(devpi, site, index, option, kinds):
    target = new_index(site, "alice")
    devpi.sign_in(site, "alice", "root/pypi")
    devpi("push", "--index", index, option, "Pushed==1.0", target)
    assert sorted(rels(site, target + "/pushed/1.0")) == kinds


def test_a_push_that_can_not_be_is_refused_with_the_reason(devpi, site, index):
    theirs = new_index(site, "bob")
    for arguments, reason in [
            (["pushed==1.0", theirs], "401 Unauthorized: user 'alice' cannot upload to '%s'" % theirs),
            (["pushed==9.9", new_index(site, "alice")], "400 Bad Request: there are no files for pushed 9.9 on stage " + index),
            (["pushed==1.0", "alice/nope"], "404 Not Found: The stage alice/nope could not be found."),
            (["pushed==1.0", "root/pypi"], "401 Unauthorized: user 'alice' cannot upload to 'root/pypi'"),
            (["--no-docs", "--only-docs", "pushed==1.0", theirs], "Can't use '--no-docs' and '--only-docs' together."),
            (["pushed==1.0", "a/b/c"], "target 'a/b/c' not of form USER/NAME, NAME or pypi:REPONAME"),
            (["pushed>=1.0", theirs], "The release specification needs to be of this form: name==version"),
            (["pushed", theirs], "The release specification needs to be of this form: name==version"),
            (["pushed==1.0", "pypi:ext"], "no pypirc file found at: %s" % (devpi.home / ".pypirc"))]:
        assert any(line.startswith(reason) for line in devpi("push", *arguments, expect=1).lines), arguments
    assert site.get("/" + theirs).result["projects"] == []


def test_options_that_the_server_does_not_know_are_not_sent(devpi, site, index, sink):
    devpi.write_state("current.json", dict(devpi.state(), features=[]))
    for option in ("--no-docs", "--only-docs", "--register-project"):
        printed = devpi("push", option, "pushed==1.0", "pypi:ext", expect=1)
        assert "The server doesn't support the '%s' option, 6.14.0 or newer required." % option in printed.lines
    assert sink.requests == []


def test_a_release_is_pushed_to_an_index_outside(devpi, site, index, release, sink):
    printed = devpi("push", "pushed==1.0", "pypi:ext")
    assert [line.rstrip() for line in printed.lines] == [
        "using pypirc ~/.pypirc", "   200 upload " + file_path(index, release[0]),
        "   200 upload " + file_path(index, release[1]), "   200 docfile pushed"]
    assert {(request.method, request.path, request.credentials) for request in sink.requests} == {
        ("POST", "/legacy/", ("u", "p%w"))}
    for request, archive in zip(sink.requests, release):
        assert request.files == {"content": (archive.filename, archive.content)}
        assert (request.field(":action"), request.field("sha256_digest")) == ("file_upload", archive.sha256)
    filename, content = sink.requests[2].files["content"]
    assert zipfile.ZipFile(io.BytesIO(content)).read("index.html") == b"the manual" and filename.endswith(".zip")
    assert "p%w" not in printed + printed.errors


def test_options_choose_what_an_index_outside_gets(devpi, sink, index):
    rc = devpi.home / "rc"
    (devpi.home / ".pypirc").rename(rc)
    devpi("push", "--register-project", "--no-docs", "--pypirc", rc, "pushed==1.0", "pypi:ext")
    devpi("push", "--only-docs", "--pypirc", rc, "pushed==1.0", "pypi:ext")
    assert [request.field(":action") for request in sink.requests] == ["submit", "file_upload", "file_upload", "doc_upload"]


def test_what_an_index_outside_refuses_is_shown(devpi, site, index, release, sink):
    sink.answer(200, times=1)
    sink.answer(400, b"line1: bad\nline2")
    printed = devpi("push", "--no-docs", "pushed==1.0", "pypi:ext", expect=1)
    assert [line.rstrip() for line in printed.lines[1:]] == [
        "PUSH %s/%s" % (site.url, index), "502 Bad Gateway", "   200 upload " + file_path(index, release[0]),
        "   400 upload %s line1: bad line2" % file_path(index, release[1]), "Failure during upload"]
    sink.stop()
    printed = devpi("push", "--no-docs", "pushed==1.0", "pypi:ext", expect=1)
    assert printed.lines[-1] == "Failure during upload"


def test_one_bad_entry_fails_the_push_whatever_the_status(devpi, site, index):
    gate = Gate(site)
    try:
        devpi.sign_in(site, "alice", index, url=gate.url)
        log = {"type": "actionlog", "result": [[200, "upload", "a"], [410, "submit", "b"], [500, "upload", "c"]]}
        gate.fault("PUSH ", "answer", body=json.dumps(log).encode(),
                   headers={"Content-Type": "application/json", "X-DEVPI-API-VERSION": "2"})
        assert devpi("push", "pushed==1.0", "alice/elsewhere", expect=1).lines == [
            "   200 upload a", "   410 submit b", "   500 upload c Internal Server Error",
            "Failure during upload"]
    finally:
        gate.close()


PYPI = """<html>
 <head>
  <title>400 File already exists (&#x27;pushed-1.0.tar.gz&#x27;). See https://pypi.org/help/ for more.</title>
 </head>
 <body>
  <h1>400 File already exists (&#x27;pushed-1.0.tar.gz&#x27;). See https://pypi.org/help/ for more.</h1>
  The server could not comply with the request since it is either malformed or otherwise incorrect.<br/><br/>

 </body>
</html>"""


@pytest.mark.parametrize("status, body, shown", [
    (400, PYPI, "File already exists ('pushed-1.0.tar.gz'). See https://pypi.org/help/ for more."),
    (403, "<!DOCTYPE html><title>403 Forbidden</title><style>p {}</style><p>no such\n<b>token</b>", "no such token"),
    (403, "<html><head><title>Forbidden</title></head><body><h1>403 Forbidden</h1></body></html>", "Forbidden"),
    (400, '{"message": "the\\nname is taken"}', "the name is taken"), (400, "{" * 5000, "{" * 497 + "..."),
    (422, "", "Unprocessable"), (400, "a\n\n  b\x1b[31m\n", "a b [31m"), (401, "HTTP/1.1 401 Unauthorized", "Unauthorized")])
def test_a_refusal_is_one_line_with_the_reason(devpi, index, release, sink, status, body, shown):
    sink.answer(status, body)
    printed = devpi("push", "--no-docs", "pushed==1.0", "pypi:ext", expect=1)
    lines = [line for line in printed.lines if line.startswith("   %d upload " % status)]
    assert len(lines) == 2 and len(printed.lines) == 6
    for line, archive in zip(lines, release):
        assert line.startswith("   %d upload %s %s" % (status, file_path(index, archive), shown))


@pytest.mark.parametrize("status", [410, 404])
def test_a_receiver_without_documentation_has_the_release(devpi, index, release, sink, status):
    """As PyPI is one. It is said, and it is no failure, unless there was nothing else to push."""
    sink.answer(200, times=2)
    sink.answer(status, "<title>410 Gone</title>")
    printed = devpi("push", "--json", "pushed==1.0", "pypi:ext")
    assert [(action["status"], action["action"]) for action in printed.json()["actions"]] == [
        (200, "upload"), (200, "upload"), (status, "docfile")] and printed.json()["ok"]
    assert "the documentation was not taken, the release is there without it" in printed.errors
    assert "Failure" not in printed.errors
    printed = devpi("push", "--only-docs", "pushed==1.0", "pypi:ext", expect=1)
    assert printed.lines[-1] == "Failure during upload"
    sink.reset()
    sink.answer(200, times=1)
    sink.answer(403, times=1)
    sink.answer(status)
    assert devpi("push", "pushed==1.0", "pypi:ext", expect=1).lines[-1] == "Failure during upload"


def test_a_section_of_pypirc_may_leave_things_out(devpi, sink, index):
    """No password: from where passwords are kept. No user name, or no section: an error."""
    rc = devpi.write(".pypirc", "[nopw]\nrepository = %s/legacy/\nusername = u\n[nouser]\nrepository = %s/\n" % (
        sink.url, sink.url))
    devpi("push", "--no-docs", "pushed==1.0", "pypi:nopw", expect=1)
    devpi.write(".netrc", "machine 127.0.0.1 login u password of-netrc\n").chmod(0o600)
    devpi("push", "--no-docs", "pushed==1.0", "pypi:nopw")
    assert {request.credentials for request in sink.requests} == {("u", "of-netrc")}
    assert "Error while trying to read section 'missing'" in devpi("push", "pushed==1.0", "pypi:missing", expect=1)
    devpi("push", "pushed==1.0", "pypi:nouser", expect=1)
    assert len(sink.requests) == 2 and rc.exists()


def test_the_servers_url_gets_the_default_target_and_no_more(devpi, site, index):
    """Without `repository` it is PyPI; the request goes to our server only, as the method PUSH."""
    devpi.write(".pypirc", "[pypi]\nusername = __token__\npassword = pypi-secret\n")
    gate = Gate(site)
    try:
        devpi.sign_in(site, "alice", index, url=gate.url)
        gate.fault("PUSH /%s" % index, "answer", status=200, headers={
            "Content-Type": "application/json", "X-DEVPI-API-VERSION": "2"}, body=b'{"type": "actionlog", "result": []}')
        printed = devpi("push", "pushed==1.0", "pypi:pypi")
        assert "using default pypi url https://upload.pypi.org/legacy/" in printed.lines
        assert gate.count("PUSH /" + index) == 1 and "pypi-secret" not in printed + printed.errors
    finally:
        gate.close()


def test_a_push_as_json_is_the_servers_log(devpi, site, index):
    printed = devpi("push", "--json", "pushed==1.0", new_index(site, "alice"))
    assert "store_releasefile" in json.dumps(printed.json())
    printed = devpi("push", "--json", "pushed==1.0", "alice/nope", expect=1)
    assert "404 Not Found" in printed.errors
