"""The forms of the web pages: what each says, does, refuses and how it is undone; and who may send it."""

import concurrent.futures
import itertools
import re
import threading
import urllib.parse

import pytest

from forms import FORM, Browser, logged_in
from harness import (
    BROWSER, Server, audited, documentation, eventually, new_index, path_of, rels, sdist, upload, upload_docs, wheel,
    zipped)
from replicas import in_sync, primary_at, replica_at

numbers = itertools.count(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("actions") / "server", "--offline-mode").start()
    for name in ("alice", "bob"):
        server.add_user(name)
    server.add_index("alice/secret", bases=[], acl_pkg_read=["alice"])
    yield server
    server.kill()


@pytest.fixture
def index(server):
    """A stage of alice's with demo 1.0: a wheel and a sdist, documentation and a test result."""
    path = new_index(server, "alice", bases=[])
    upload(server, path, wheel("demo", "1.0"), sdist("demo", "1.0"))
    upload_docs(server, path, documentation("demo", "1.0"))
    tested = path_of(wheel("demo", "1.0"), path)
    assert server.post(tested, {"testenvs": {}}, user="alice").status == 200
    return path


@pytest.fixture(scope="module")
def alice(server):
    return logged_in(server, "alice")


@pytest.fixture(scope="module")
def bob(server):
    return logged_in(server, "bob")


@pytest.fixture(scope="module")
def root(server):
    return logged_in(server, "root")


def yanked(server, index):
    return sorted(file["filename"] for file in server.simple(index, "demo")["files"] if file.get("yanked"))


def undo(browser, page, **fields):
    """Go where the notice on a page leads, and send the form there."""
    notice = re.search(r'role="status">.*?<a href="([^"]+)">', page.reply.text, re.DOTALL)
    return browser.do(notice[1].replace("&amp;", "&"), **fields)


# -- files, versions, projects


def test_a_yank_says_what_it_concerns_and_can_be_taken_back(server, index, alice):
    home = "/%s/demo/1.0" % index
    page = alice.get(alice.get(home).hrefs["Yank"])
    assert "2 files, 1 documentation, 1 test result" in page.text
    page = alice.submit(page.form("+yank"), reason="broken")
    assert (page.path, "Yanked: 2 files of demo 1.0." in page.text) == (home, True)
    assert {file["yanked"] for file in server.simple(index, "demo")["files"]} == {"broken"}
    entry = audited(server, action="yank", index=index)[0]
    assert (entry["who"], entry["address"], entry["detail"]) == ("alice", "127.0.0.1", "broken")
    page = undo(alice, page)
    assert "was taken back" in page.text and yanked(server, index) == []


def test_it_says_how_many_projects_that_one_may_read_depend_on_it(server, index, alice):
    name = "needed%d" % next(numbers)
    hidden = new_index(server, "bob", bases=[], acl_pkg_read=["bob"])
    upload(server, index, wheel(name, "1.0"))
    for place in (index, hidden):
        upload(server, place, wheel("user-of-" + name, "1.0", requires_dist=[name]))
    eventually(lambda: "; 1 project here depends on %s." % name
               in alice.get("/%s/%s/1.0/+delete" % (index, name)).text)


def test_one_file_is_yanked_and_taken_back(server, index, alice):
    name = wheel("demo", "1.0").filename
    page = alice.get("/%s/demo/1.0/+yank?file=%s" % (index, name))
    assert "1 file, 1 test result." in page.text
    page = alice.submit(page.form("+yank"))
    assert yanked(server, index) == [name]
    assert "1 file" in undo(alice, page).text and yanked(server, index) == []
    assert "None of these files was yanked." in undo(alice, page).text


def test_a_reason_that_is_refused_comes_again_with_what_was_entered(server, index, alice):
    page = alice.do("/%s/demo/1.0/+yank" % index, reason="x" * 2000)
    assert page.status == 400 and "a reason is one line" in page.text
    assert page.form("+yank").fields["reason"] == "x" * 2000 and yanked(server, index) == []


def test_a_version_is_deleted_and_uploaded_again(server, index, alice):
    page = alice.get("/%s/demo/1.0/+delete" % index)
    assert "This deletes 2 files, 1 documentation, 1 test result." in page.text
    page = alice.submit(page.form("+delete"))
    assert page.path == "/%s/demo" % index and "Deleted: demo 1.0" in page.text
    assert server.get("/%s/demo/1.0" % index).status == 404
    form = alice.get(page.hrefs["Upload it again"]).form("+upload", **{":action": "file_upload"})
    archive = wheel("demo", "1.0")
    page = alice.submit(form, files=(archive.filename, archive.content))
    assert server.filenames(index, "demo") == [archive.filename]


def test_one_file_is_deleted(server, index, alice):
    name = sdist("demo", "1.0").filename
    page = alice.do("/%s/demo/1.0/+delete?file=%s" % (index, name))
    assert "Deleted: %s" % name in page.text
    assert server.filenames(index, "demo") == [wheel("demo", "1.0").filename]
    again = alice.get("/%s/demo/1.0/+delete?file=%s" % (index, name))
    assert (again.status, "there is no file" in again.text) == (404, True)


def test_a_project_is_deleted(server, index, alice):
    page = alice.do("/%s/demo/+delete" % index)
    assert page.path == "/" + index and "the name demo is free" in page.text
    assert server.get("/%s/demo" % index).status == 404


def test_a_non_volatile_index_gives_up_nothing_unless_its_owner_ticks_a_box(server, index, alice, bob):
    server.patch("/" + index, {"volatile": False, "acl_upload": ["alice", "bob"]}, user="alice")
    page = alice.do("/%s/demo/1.0/+delete" % index)
    assert page.status == 403 and "tick the box" in page.text
    assert "release" in " ".join(rels(server, index + "/demo/1.0"))
    refused = bob.do("/%s/demo/+delete" % index, force="yes")
    assert refused.status == 403 and "only alice" in refused.text
    assert audited(server, action="refused", index=index)[0]["who"] == "bob"
    assert "Deleted" in alice.do("/%s/demo/1.0/+delete" % index, force="yes").text
    assert server.get("/%s/demo/1.0" % index).status == 404


def test_a_status_is_set_and_set_back(server, index, alice):
    page = alice.do("/%s/demo/+status" % index, status="archived", reason="done")
    assert "demo is archived now; it was active." in page.text
    assert server.simple(index, "demo")["project-status"] == {"status": "archived", "reason": "done"}
    assert undo(alice, page, status="active").status == 200
    assert "project-status" not in server.simple(index, "demo")
    assert alice.do("/%s/demo/+status" % index, status="odd").status == 400


def test_mirrors_are_let_in_and_shut_out(server, index, alice):
    mirror = new_index(server, "alice", type="mirror", mirror_url="https://pypi.example/simple/")
    server.patch("/" + index, {"bases": [mirror]}, user="alice")
    page = alice.get("/%s/demo/+whitelist" % index)
    assert mirror in page.text
    page = alice.submit(page.form("+whitelist"))
    assert server.get("/" + index).result["mirror_whitelist"] == ["demo"]
    undo(alice, page)
    assert server.get("/" + index).result["mirror_whitelist"] == []


def test_of_a_mirror_the_copy_is_deleted(make_server, upstream):
    upstream.publish(wheel("demo", "1.0"))
    server = make_server()
    server.add_user("alice")
    server.add_mirror("alice/mirror", upstream)
    server.fetch("alice/mirror", "demo-1.0-py3-none-any.whl", "demo")
    alice = logged_in(server, "alice")
    page = alice.get("/alice/mirror/demo/1.0")
    assert "Yank" not in page.hrefs
    page = alice.get(page.hrefs["Delete"])
    assert "1 file" in page.text and "only the copy here" in page.text
    assert "Deleted: demo 1.0" in alice.submit(page.form("+delete")).text
    assert "Deleted: demo from" in alice.do("/alice/mirror/demo/+delete").text
    assert server.versions("alice/mirror", "demo") == ["1.0"]       # upstream still has it
    refused = alice.get("/alice/mirror/demo/1.0/+yank")
    assert alice.submit(refused.form("+yank")).status == 400
    assert alice.get("/alice/mirror/+upload").status == 404


def test_a_push_to_another_index_is_undone_there(server, index, alice):
    target = new_index(server, "alice", bases=[])
    page = alice.get("/%s/demo/1.0/+push" % index)
    assert "This copies 2 files, 1 documentation, 1 test result." in page.text
    page = alice.submit(page.form("+push"), to=target, part="no_docs")
    assert page.path == "/%s/demo/1.0" % target and "was pushed from %s" % index in page.text
    assert sorted(rels(server, target + "/demo/1.0")) == ["releasefile", "releasefile", "toxresult"]
    undo(alice, page)
    assert server.get("/%s/demo/1.0" % target).status == 404


def test_a_push_says_what_it_replaces(server, index, alice):
    target = "alice/prod%d" % next(numbers)
    server.add_index(target, bases=[])
    upload(server, target, wheel("demo", "1.0", summary="other bytes"))
    page = alice.get("/%s/demo/1.0/+push" % index)
    assert "under the same names are replaced on a volatile index, and can't be brought back" in page.text
    page = alice.submit(page.form("+push"), to=target)
    assert "It replaced 1 file, which can't be brought back." in page.text
    assert "It replaced" not in alice.do("/%s/demo/1.0/+push" % index, to=target).text
    page = alice.do("/%s/demo/1.0/+push" % index, to="alice/nosuch")
    assert page.status == 404 and "alice/nosuch" in page.text


def test_a_comparison_has_a_button_for_each_push(server, index, alice):
    target = new_index(server, "alice", bases=[])
    compared = "/%s/+compare/%s" % (index, target)
    push = "/%s/demo/1.0/+push?to=%s" % (index, target.replace("/", "%2F"))
    assert push in alice.get(compared).hrefs.values()
    assert "+push?to=" not in server.get(compared, headers={"Accept": "text/html"}).text
    assert alice.get(push).form("+push").fields["to"] == target


def test_a_push_is_refused_as_by_the_api(server, index, alice, bob):
    assert bob.do("/%s/demo/1.0/+push" % index, to="alice/secret").status == 401
    page = alice.do("/%s/demo/1.0/+push" % index, to="", posturl="ftp://x", username="u")
    assert page.status == 400 and "http or https" in page.text
    assert page.form("+push").fields["posturl"] == "ftp://x"
    assert "URL of the other server is missing" in alice.do("/%s/demo/1.0/+push" % index, to="", posturl=" ").text
    assert server.get("/alice/secret/demo", user="alice").status == 404


def test_a_push_to_an_outside_server(server, index, alice, receiver):
    page = alice.do("/%s/demo/1.0/+push" % index, to="", part="no_docs", posturl=receiver.url + "/legacy/",
                    username="u", password="p")
    assert "was pushed to %s" % receiver.url in page.text, page.text
    assert len(receiver.requests) == 2


def test_a_push_to_a_server_that_is_not_there_says_so_once(server, index, alice):
    page = alice.do("/%s/demo/1.0/+push" % index, to="", part="no_docs", posturl="http://127.0.0.1:9/legacy/",
                    username="u", password="p")
    assert page.status == 502
    assert page.text.count("exception on release upload") == 1, page.text


# -- uploads


def upload_form(browser, index, action="file_upload"):
    return browser.get("/%s/+upload" % index).form("+upload", **{":action": action})


def test_a_file_is_uploaded_with_what_it_says_of_itself_and_deleted_again(server, index, alice):
    archive = wheel("Other_Thing", "2.0rc1", summary="a summary")
    page = alice.submit(upload_form(alice, index), files=(archive.filename, archive.content))
    assert page.path == "/%s/other-thing/2.0rc1" % index and "was uploaded" in page.text
    assert server.get("/%s/other-thing/2.0rc1" % index).result["summary"] == "a summary"
    assert audited(server, action="upload", index=index)[0]["who"] == "alice"
    undo(alice, page)
    assert server.get("/%s/other-thing/2.0rc1" % index).status == 404


def test_an_upload_says_what_it_replaced(server, index, alice):
    for summary, says in (("other bytes", True), ("other bytes", False)):
        archive = wheel("demo", "1.0", summary=summary)
        page = alice.submit(upload_form(alice, index), files=(archive.filename, archive.content))
        assert "was uploaded" in page.text
        assert ("It replaced 1 file, which can't be brought back." in page.text) == says


def test_documentation_is_uploaded(server, index, alice):
    docs = documentation("demo", "1.0", page="<h1>New</h1>")
    page = alice.submit(upload_form(alice, index, "doc_upload"), name="demo", version="",
                        files=(docs.filename, docs.content))
    assert "documentation of demo was uploaded" in page.text
    assert "New" in server.get("/%s/demo/1.0/+doc/index.html" % index, headers={"Accept": "*/*"}).text


@pytest.mark.parametrize("content, version, status, said", [
    (b"abc", "1.0", 400, "demo.zip is no zip archive"),
    (zipped(("about.html", "x")), "1.0", 400, "demo.zip has no index.html at its top"),
    (zipped(("index.html", "x")), "7", 404, "version '7' of project 'demo' is not on")])
def test_what_is_no_documentation_of_a_release_is_refused_with_the_form(server, index, alice, content, version, status, said):
    page = alice.submit(upload_form(alice, index, "doc_upload"), name="demo", version=version, files=("demo.zip", content))
    assert page.status == status and said in page.text and upload_form(alice, index, "doc_upload")
    assert server.versions(index, "demo") == ["1.0"]
    assert "manual" in server.get("/%s/demo/1.0/+doc/index.html" % index, headers={"Accept": "*/*"}).text


@pytest.mark.parametrize("filename, content, said", [
    ("demo-1.0-py3-none-any.whl", b"no archive", "demo-1.0-py3-none-any.whl"),
    ("demo.txt", b"x", "demo.txt is no wheel or source distribution"),
    ("../demo-1.0.tar.gz", b"x", "name"), ("<b>.whl", b"x", "<b>.whl")])
def test_what_is_no_distribution_file_is_refused_with_the_form(server, index, alice, filename, content, said):
    page = alice.submit(upload_form(alice, index), files=(filename, content))
    assert page.status == 400 and said in page.text and upload_form(alice, index)
    assert server.versions(index, "demo") == ["1.0"]


def test_an_upload_needs_its_token_and_a_permission(server, index, alice, bob):
    archive = wheel("demo", "3.0")
    form = upload_form(alice, index)
    for browser, fields in ((alice, {"csrf": ""}), (alice, {"csrf": None}), (bob, {}), (Browser(server), {})):
        page = browser.submit(form, files=(archive.filename, archive.content), **fields)
        assert page.status == 403 or page.path.startswith("/+login")
    assert server.versions(index, "demo") == ["1.0"]


def test_a_script_gets_json_to_show_progress(server, index, alice):
    archive = wheel("demo", "4.0")
    wanted = {"Accept": "application/json"}
    reply = alice.submit(upload_form(alice, index), wanted, files=(archive.filename, archive.content)).reply
    assert (reply.status, reply.json()["location"]) == (200, "/%s/demo/4.0" % index)
    reply = alice.submit(upload_form(alice, index), wanted, files=("x.txt", b"x")).reply
    assert reply.status == 400 and "x.txt" in reply.json()["message"]


def test_only_the_page_of_uploads_may_send_requests_by_script(server, index, alice):
    policy = alice.get("/%s/+upload" % index).reply.headers["Content-Security-Policy"]
    assert "connect-src 'self'" in policy
    assert "connect-src 'none'" in alice.get("/%s/+settings" % index).reply.headers["Content-Security-Policy"]


# -- indexes


def test_an_index_is_made_and_deleted_again(server, alice):
    name = "made%d" % next(numbers)
    page = alice.get(alice.get("/alice").hrefs["New index"])
    page = alice.submit(page.form("+new-index"), name=name, title="Mine", bases="alice/secret", volatile=None)
    assert page.path == "/alice/" + name
    config = server.get("/alice/" + name, user="alice").result
    assert (config["title"], config["bases"], config["volatile"]) == ("Mine", ["alice/secret"], False)
    server.patch("/alice/" + name, {"volatile": True}, user="alice")
    assert alice.do("/alice/%s/+delete" % name, name="other").status == 400
    page = undo(alice, page, name="alice/" + name)
    assert (page.path, server.get("/alice/" + name).status) == ("/alice", 404)


def test_a_mirror_is_made(server, alice):
    name = "mirror%d" % next(numbers)
    form = dict(name=name, type="mirror", mirror_url="")
    assert alice.do("/alice/+new-index", **dict(form, mirror_url="odd")).status == 400
    assert "needs the URL" in alice.do("/alice/+new-index", **form).text
    alice.do("/alice/+new-index", **dict(form, mirror_url="https://pypi.example/simple/", acl_pkg_read="alice"))
    config = server.get("/alice/" + name, user="alice").result
    assert (config["type"], config["mirror_url"], config["acl_pkg_read"]) == (
        "mirror", "https://pypi.example/simple/", ["alice"])
    assert "mirror restricted" in alice.get("/alice/" + name).text
    assert "alice/%s mirror restricted" % name in alice.get("/alice").text


def test_a_new_stage_builds_on_root_s_mirror(server, alice):
    for path in ("alice/aaa", "root/upstream"):
        server.put("/" + path, {"type": "mirror", "mirror_url": "https://pypi.example/simple/"}, user="root")
    assert alice.get("/alice/+new-index").form("+new-index").fields["bases"] == "root/upstream"


def test_an_index_that_exists_or_has_an_odd_name_is_refused(server, index, alice):
    assert alice.do("/alice/+new-index", name=index.partition("/")[2]).status == 409
    page = alice.do("/alice/+new-index", name="a b<i>", title="kept")
    assert (page.status, page.form("+new-index").fields["title"]) == (400, "kept")


def test_settings_change_only_what_was_changed(server, index, alice):
    before = server.get("/" + index, user="alice").result
    page = alice.do("/%s/+settings" % index, title="New", volatile="no", acl_upload="alice\nbob, :devs",
                    mirror_whitelist="x", webhook_secret="s")
    assert "volatile was yes" in page.text and "title was not set" in page.text
    after = server.get("/" + index, user="alice").result
    assert after == {**before, "title": "New", "volatile": False, "acl_upload": ["alice", "bob", ":devs"],
                     "mirror_whitelist": ["x"]}
    undo(alice, page, volatile="yes", acl_upload="alice", mirror_whitelist="", title="")
    assert server.get("/" + index, user="alice").result == before
    assert "Nothing was changed" in alice.do("/%s/+settings" % index).text


def test_settings_that_somebody_else_changed_meanwhile_are_not_lost(server, index, alice):
    form = alice.get("/%s/+settings" % index).form("+settings")
    server.patch("/" + index, {"title": "theirs"}, user="alice")
    page = alice.submit(form, volatile="no")
    assert page.status == 409 and "by somebody else" in page.text
    config = server.get("/" + index).result
    assert (config["title"], config["volatile"]) == ("theirs", True)


def test_of_two_browsers_that_send_settings_at_once_one_wins(server, index, alice):
    for round_ in range(6):
        form = alice.get("/%s/+settings" % index).form("+settings")
        titles = ["%d of round %d" % (number, round_) for number in range(2)]
        both = threading.Barrier(2)

        def send(title, browser):
            both.wait()
            return browser.submit(form, follow=False, title=title).status

        browsers = [Browser(server), Browser(server)]
        for browser in browsers:
            for cookie in alice.jar:
                browser.jar.set_cookie(cookie)
        with concurrent.futures.ThreadPoolExecutor() as threads:
            statuses = list(threads.map(send, titles, browsers))
        assert sorted(statuses) == [303, 409]
        assert server.get("/" + index).result["title"] == titles[statuses.index(303)]


def test_a_setting_that_is_refused_comes_again(server, index, alice):
    page = alice.do("/%s/+settings" % index, bases="alice/none", title="kept")
    assert page.status == 400 and "base index 'alice/none' does not exist" in page.text
    assert page.form("+settings").fields["title"] == "kept"


def test_an_index_goes_with_its_content_also_as_a_base(server, index, alice):
    built = new_index(server, "bob", bases=[index])
    page = alice.get("/%s/+delete" % index)
    assert "1 project, 2 files, 1 documentation, 1 test result" in page.text and "It is a base of %s." % built in page.text
    assert alice.submit(page.form("+delete"), name=index).status == 409
    assert alice.submit(page.form("+delete"), name=index, force="yes").path == "/alice"
    assert server.get("/" + index).status == 404


# -- users


def test_root_makes_a_user_gives_a_password_and_deletes_it(server, root):
    form = dict(name="carol", password="pw", again="pw", email="c@example.org")
    page = root.get(root.get("/").hrefs["New user"])
    assert root.submit(page.form("+new-user"), **dict(form, again="other")).status == 400
    page = root.submit(page.form("+new-user"), **form)
    assert page.path == "/carol" and server.login("carol", "pw")
    assert root.do("/+new-user", **form).status == 409
    root.do("/carol/+password", password="other", again="other")
    assert server.post("/+login", {"user": "carol", "password": "pw"}).status == 401
    page = undo(root, page, name="carol")
    assert (page.path, server.get("/carol").status) == ("/", 404)
    assert audited(server, action="user.delete")[0]["who"] == "root"


def test_the_own_password_takes_the_one_before(server):
    server.add_user("dan")
    dan = logged_in(server, "dan")
    page = dan.do("/dan/+password", before="wrong", password="new", again="new")
    assert page.status == 401 and 'value="new"' not in page.reply.text
    assert dan.do("/dan/+password", before="pw", password="", again="").status == 400
    page = dan.do("/dan/+password", before="pw", password="new", again="new")
    assert page.path == "/dan" and "Log out" in page.text and server.login("dan", "new")
    assert "You have no index yet." in page.text and page.hrefs["Change it again"] == "/dan/+password"


def test_a_profile_is_changed(server, alice):
    page = alice.do("/alice/+settings", title="A <b>", email="a@example.org", description="x\ny")
    assert "A <b>" in page.text
    user = server.get("/alice", user="alice").result
    assert (user["title"], user["email"]) == ("A <b>", "a@example.org")
    undo(alice, page, title="", email="", description="")
    assert "title" not in server.get("/alice").result


def test_who_deletes_the_own_user_is_logged_out(server):
    server.add_user("eve")
    eve = logged_in(server, "eve")
    page = eve.do("/eve/+delete", name="eve")
    assert "The user eve was deleted." in page.text and "Log in" in page.hrefs
    assert server.get("/eve").status == 404


def test_the_outbox_is_for_root(server, root, alice):
    assert alice.get("/+outbox").status == 403
    assert "0 messages will be tried now" in root.do("/+outbox").text


# -- who may send a form


def forms(index):
    home, name = "/" + index, index.partition("/")[2]
    return {
        home + "/demo/1.0/+yank": {"reason": ""}, home + "/demo/1.0/+unyank": {}, home + "/demo/1.0/+delete": {},
        home + "/demo/+delete": {}, home + "/demo/+status": {"status": "archived"}, home + "/demo/+whitelist": {},
        home + "/+settings": {"title": "x"}, home + "/+delete": {"name": index},
        "/alice/+new-index": {"name": name + "x"}, "/alice/+settings": {"title": "x"},
        "/alice/+password": {"password": "x", "again": "x"}, "/alice/+delete": {"name": "alice"}}


def state(server, index):
    return (server.get("/?", user="root").json(), server.get("/%s/demo" % index, user="alice").json(),
            server.simple(index, "demo"))


def tokens(browser, path):
    return browser.get(path).form(path.partition("?")[0]).fields["csrf"]


@pytest.mark.parametrize("why", [
    "missing", "empty", "another's", "of the form to log in", "foreign", "null", "cross", "nobody"])
def test_a_form_of_others_does_nothing(server, index, alice, bob, why):
    before = state(server, index)
    token = tokens(alice, "/alice/+settings")
    headers, browser = {}, alice
    if why == "missing":
        token = None
    elif why == "empty":
        token = ""
    elif why == "another's":
        token = tokens(bob, "/bob/+settings")
    elif why == "of the form to log in":
        token = Browser(server).get("/+login").form("/+login").fields["csrf"]
    elif why == "nobody":
        browser = Browser(server)
    else:
        headers = {"foreign": {"Origin": "https://evil.example"}, "null": {"Origin": "null"},
                   "cross": {"Sec-Fetch-Site": "cross-site", "Origin": None}}[why]
    for path, fields in forms(index).items():
        fields = dict(fields, csrf=token) if token is not None else fields
        page = browser.send("POST", path, urllib.parse.urlencode(fields).encode(), {"Content-Type": FORM, **headers})
        assert page.status == 403 or why == "nobody" and page.path.startswith("/+login?next="), (path, page.text)
    assert state(server, index) == before


def test_a_form_of_somebody_without_the_permission_does_nothing(server, index, bob):
    before, token = state(server, index), tokens(bob, "/bob/+settings")
    for path, fields in forms(index).items():
        assert bob.get(path).status == 403, path
        body = urllib.parse.urlencode(dict(fields, csrf=token)).encode()
        assert bob.send("POST", path, body, {"Content-Type": FORM}).status == 403, path
    assert state(server, index) == before
    page = bob.get("/%s/demo/1.0" % index)
    assert "Push" in page.hrefs and not {"Yank", "Delete"} & set(page.hrefs)
    assert not {"Upload a file", "Change settings", "Delete index"} & set(bob.get("/" + index).hrefs)


def test_an_index_that_one_may_not_read_has_the_forms_of_one_that_is_not_there(server, bob):
    for ending in ("+settings", "+delete", "+upload", "demo/+delete", "demo/1.0/+yank", "demo/1.0/+push"):
        texts = [bob.get("/alice/%s/%s" % (name, ending)) for name in ("secret", "absent")]
        assert [page.status for page in texts] == [404, 404]
        assert texts[0].text.replace("secret", "absent") == texts[1].text


def test_other_content_types_are_no_forms(server, index, alice):
    for kind in ("application/json", "text/plain", "multipart/form-data; boundary=x"):
        page = alice.send("POST", "/alice/+settings", b'{"title": "x"}', {"Content-Type": kind})
        assert page.status == 415, kind


def test_a_form_needs_no_scripts_and_has_labels(server, index, alice):
    for path in forms(index):
        text = alice.get(path).reply.text
        assert not re.search(r"\son[a-z]+=|javascript:|style=", text)
        ids = set(re.findall(r'for="(field-[^"]+)"', text))
        assert ids == set(re.findall(r'id="(field-[^"]+)"', text))


def test_hostile_texts_do_not_break_out_of_a_form(server, index, alice):
    evil = '"><script>alert(1)</script>'
    server.patch("/" + index, {"title": evil}, user="alice")
    for page in (alice.get("/%s/+settings" % index), alice.do("/%s/+settings" % index, bases=evil),
                 alice.do("/%s/demo/1.0/+yank" % index, reason=evil + "x" * 2000),
                 alice.get("/%s/demo/1.0/+yank?file=%s" % (index, urllib.parse.quote(evil))),
                 alice.do("/%s/+settings" % index, title="mended")):
        assert "<script>alert" not in page.reply.text and page.status in (200, 400, 404)


# -- on a replica


def test_a_replica_passes_forms_on_with_who_sent_them(tmp_path):
    primary = primary_at(tmp_path / "primary").start()
    primary.add_user("ann")
    primary.add_index("ann/dev", bases=[])
    upload(primary, "ann/dev", wheel("demo", "1.0"))
    replica = replica_at(tmp_path / "replica", primary).start()
    try:
        in_sync(primary, replica)
        ann = Browser(replica)
        assert "Log out" in ann.log_in("ann").text
        page = ann.do("/ann/dev/demo/1.0/+yank", reason="broken")
        assert page.url.startswith(replica.url) and "Yanked: 1 file" in page.text
        assert yanked(primary, "ann/dev") == yanked(replica, "ann/dev") == ["demo-1.0-py3-none-any.whl"]
        entry = audited(primary, action="yank")[0]
        assert (entry["who"], entry["address"]) == ("ann", "127.0.0.1")

        archive = wheel("demo", "2.0")
        page = ann.submit(upload_form(ann, "ann/dev"), files=(archive.filename, archive.content))
        assert page.path == "/ann/dev/demo/2.0" and primary.versions("ann/dev", "demo") == ["1.0", "2.0"]

        page = ann.do("/ann/+password", before="pw", password="new", again="new")
        assert "Log out" in page.text       # the new session holds here, too
        cookie = "; ".join("%s=%s" % pair for pair in ann.cookies.items())
        mine = {"Accept": BROWSER, "Cookie": cookie}
        assert primary.get("/ann/+settings", headers=mine).status == 303        # it is the replica's alone
        form = ann.get("/ann/+settings").form("+settings")
        ann.submit(ann.get("/").form("+logout"))
        body = urllib.parse.urlencode(dict(form.fields, title="stolen"))
        reply = replica.post("/ann/+settings", body, headers={**mine, "Content-Type": FORM})
        assert (reply.status, reply.headers["Location"][:8]) == (303, "/+login?")
        assert "title" not in primary.get("/ann").result
    finally:
        replica.kill()
        primary.kill()
