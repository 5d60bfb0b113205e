"""Logging in on the web pages: how a session begins, what it counts for, and what ends it."""

import contextlib
import json
import sqlite3
import sys
import threading
import time
import urllib.parse

import pytest

import devpi_lite
from forms import FORM, Browser, logged_in
from harness import BROWSER, Server, Wire, audited, upload, wheel


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """alice/dev with demo 1.0, and alice/shut, which only alice may read."""
    server = Server(tmp_path_factory.mktemp("sessions") / "server", "--offline-mode").start()
    for name in ("alice", "bob"):
        server.add_user(name)
    server.add_index("alice/dev", bases=[])
    server.add_index("alice/shut", bases=[], acl_pkg_read=["alice"])
    for index in ("alice/dev", "alice/shut"):
        upload(server, index, wheel("demo", "1.0"))
    yield server
    server.kill()


@pytest.fixture
def browser(server):
    return Browser(server)


@pytest.fixture
def alice(server):
    return logged_in(server, "alice")


def session_of(browser):
    (found,) = [cookie for cookie in browser.jar if cookie.name not in (
        "devpi_lite_login", "devpi_lite_notice")]
    return found


def with_cookie(server, browser, method, path, body=None, **headers):
    cookie = session_of(browser)
    return server.request(method, path, body, headers={
        "Cookie": "%s=%s" % (cookie.name, cookie.value), **headers})


# -- logging in


def test_a_log_in_leads_back_to_the_page_and_shows_who_it_is(server, browser):
    page = browser.get("/alice/dev?show=settings")
    assert "Log out" not in page.text
    page = browser.log_in("alice", path=page.hrefs["Log in"])
    assert (page.path, page.hrefs["alice"]) == ("/alice/dev?show=settings", "/alice")
    assert "Log out" in page.text


def test_the_cookie_is_for_no_script_no_other_site_and_ten_hours(server, browser):
    form = browser.get("/+login").form("/+login")
    reply = browser.submit(form, user="alice", password="pw", follow=False).reply
    (cookie,) = [each for each in reply.headers.get_all("Set-Cookie") if not each.startswith("devpi_lite_login")]
    assert cookie.split("; ")[1:] == ["Path=/", "Max-Age=36000", "HttpOnly", "SameSite=Strict"]
    assert reply.status == 303


def test_behind_a_proxy_with_tls_the_cookie_is_secure_and_of_its_prefix(server):
    proxied = {"X-Outside-URL": "https://pypi.example/devpi", "Accept": BROWSER}
    page = server.get("/+login", headers=proxied)
    assert 'action="/devpi/+login"' in page.text
    assert page.headers["Set-Cookie"].endswith("; Path=/devpi; Max-Age=3600; HttpOnly; SameSite=Strict; Secure")


def test_a_wrong_password_brings_the_form_again_with_the_name(server, browser):
    page = browser.log_in("alice", "wrong")
    assert (page.status, page.form("/+login").fields["user"]) == (401, "alice")
    assert "could not be authenticated" in page.text and page.form("/+login").fields["password"] == ""
    assert audited(server, action="login.failed")[0]["target"] == "alice"
    assert [each.name for each in browser.jar] == ["devpi_lite_login"]


def test_wrong_passwords_count_together_with_those_of_the_api(make_server):
    server = make_server()
    server.add_user("carl")
    browser = Browser(server)
    for number in range(devpi_lite.Limits.failed_logins - 1):
        assert server.post("/+login", {"user": "carl", "password": "wrong%d" % number}).status == 401
    assert browser.log_in("carl", "wrong").status == 429
    page = browser.log_in("carl", "pw")
    assert (page.status, page.reply.headers["Retry-After"]) == (429, "1")
    assert "1 s" in page.text and page.form("/+login").fields["user"] == "carl"


def test_a_form_to_log_in_needs_the_cookie_that_came_with_it(server, browser):
    form = browser.get("/+login").form("/+login")
    other = Browser(server)
    assert other.submit(form, user="alice", password="pw").status == 403
    other.get("/+login")
    assert other.submit(form, user="alice", password="pw").status == 403
    assert browser.submit(form, user="alice", password="pw", csrf="").status == 403
    assert "Log out" in browser.submit(form, user="alice", password="pw").text


@pytest.mark.parametrize("headers", [
    {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Origin": None}])
def test_a_page_of_another_server_can_not_log_anybody_in(server, browser, headers):
    form = browser.get("/+login").form("/+login")
    assert browser.submit(form, headers, user="alice", password="pw").status == 403
    assert "devpi_lite_notice" not in browser.cookies and len(browser.cookies) == 1


@pytest.mark.parametrize("path", [
    "//evil.example/", "https://evil.example/", "/\\evil.example", "\\\\evil.example", "javascript:alert(1)",
    "/x\r\nSet-Cookie: a=b", "/x\ty", "/+logout", "/+login?next=/", "alice", "/ä", ""])
def test_nobody_is_led_to_another_site(server, browser, path):
    browser.get("/+login")
    form = browser.get("/+login?" + urllib.parse.urlencode({"next": path})).form("/+login")
    reply = browser.submit(form, user="alice", password="pw", follow=False).reply
    assert (reply.status, reply.headers["Location"]) == (303, "/")
    assert len(reply.headers.get_all("Set-Cookie")) == 2
    again = browser.get("/+login?" + urllib.parse.urlencode({"next": path}), follow=False).reply
    assert (again.status, again.headers["Location"]) == (303, "/")


def test_json_to_log_in_is_devpi_s(server):
    for kind in ("application/json", FORM, None):
        reply = server.post("/+login", json.dumps({"user": "alice", "password": "pw"}), headers={"Content-Type": kind})
        assert (reply.status, reply.json()["type"]) == (200, "proxyauth")


def test_a_token_of_devpi_s_login_is_no_password_and_no_session(server, browser):
    token = server.login("alice")
    assert browser.log_in("alice", token).status == 401
    name = session_cookie_name(server)
    page = server.get("/alice/shut", headers={"Accept": BROWSER, "Cookie": "%s=%s" % (name, token)})
    assert page.status == 404


def session_cookie_name(server):
    browser = Browser(server)
    browser.log_in("alice")
    return session_of(browser).name


def test_over_plain_http_from_elsewhere_the_page_says_why_nobody_can_log_in(server, browser):
    elsewhere = {"X-Forwarded-For": "192.0.2.7"}
    form = browser.get("/+login").form("/+login")
    page = browser.get("/+login", headers=elsewhere)
    assert page.status == 200 and "plain http" in page.text
    assert not [each for each in page.forms if each.action.endswith("+login")]
    refused = browser.submit(form, elsewhere, user="alice", password="pw")
    assert (refused.status, len(browser.cookies)) == (403, 1)
    assert browser.get("/+login", headers={"Host": "pypi.example"}).status == 421


def test_it_can_be_switched_off(server, alice, make_server, tmp_path):
    off = make_server("--no-web-login", "--secretfile", str(server.directory / ".secret"))
    off.add_user("alice")
    page = Browser(off).get("/")
    assert "Log in" not in page.hrefs
    page = Browser(off).get("/+login")
    assert "--no-web-login" in page.text and not [form for form in page.forms if form.method == "post"]
    sent = off.post("/+login", "user=alice&password=pw", headers={"Content-Type": FORM, "Accept": BROWSER})
    assert (sent.status, sent.headers.get("Set-Cookie")) == (403, None)


# -- what a session counts for


def test_pages_files_and_documentation_of_an_index_that_only_its_owner_may_read(server, alice):
    assert Browser(server).get("/alice/shut").status == 404
    assert alice.get("/alice/shut").status == 200
    assert "demo" in alice.get("/alice/shut/+simple/").text
    path = server.get("/alice/shut/demo/1.0", user="alice").result["+links"][0]["href"]
    assert Browser(server).send("HEAD", path).status == 401
    assert alice.send("HEAD", path).status == 200
    assert "no documentation" in alice.get("/alice/shut/demo/1.0/+doc/index.html").text.lower()


@pytest.mark.parametrize("method, path, body", [
    ("PUT", "/alice/new", {}), ("PATCH", "/alice/dev", {"title": "taken"}), ("DELETE", "/alice/dev", None),
    ("PATCH", "/alice", {"title": "taken"}), ("DELETE", "/alice", None),
    ("PATCH", "/alice/dev/demo/1.0", {"yanked": True}), ("DELETE", "/alice/dev/demo/1.0", None),
    ("DELETE", "/alice/dev/demo", None),
    ("POST", "/alice/dev", {"name": "demo", "version": "1.0", "targetindex": "alice/shut"}),
    ("PUSH", "/alice/dev", {"name": "demo", "version": "1.0", "targetindex": "alice/shut"}),
    ("POST", "/alice/dev/demo", {"project-status": {"status": "archived"}}), ("POST", "/+outbox/retry", None)])
def test_a_cookie_alone_changes_nothing_by_the_api(server, alice, method, path, body):
    before = server.get("/").json(), server.get("/alice/dev/demo").json()
    for accept in ("application/json", BROWSER):
        assert with_cookie(server, alice, method, path, body, Accept=accept).status in (401, 403)
    assert (server.get("/").json(), server.get("/alice/dev/demo").json()) == before


def test_a_cookie_alone_uploads_nothing(server, alice):
    for kind in ("multipart/form-data; boundary=x", FORM):
        assert with_cookie(server, alice, "POST", "/alice/dev/", "--x--", **{"Content-Type": kind}).status == 401


def test_json_of_a_private_index_takes_more_than_a_cookie(server, alice):
    assert with_cookie(server, alice, "GET", "/alice/shut").status == 401
    assert with_cookie(server, alice, "GET", "/+api").result["authstatus"][0] == "noauth"


def test_basic_credentials_do_not_open_a_form(server):
    for path in ("/alice/+settings", "/alice/dev/+upload", "/alice/shut/+settings", "/alice/none/+settings"):
        reply = server.get(path, user="alice", password="pw", headers={"Accept": BROWSER})
        assert (reply.status, reply.headers["Location"]) == (303, "/+login?next=" + path.replace("+", "%2B"))
        sent = server.post(path, "title=x", user="alice", password="pw",
                           headers={"Accept": BROWSER, "Content-Type": FORM})
        assert (sent.status, sent.headers["Location"]) == (303, "/+login?next=" + path.replace("+", "%2B"))


def test_pages_of_who_has_logged_in_are_kept_for_nobody_else(server, alice):
    for path in ("/", "/alice/dev", "/alice/shut", "/alice/shut/+simple/", "/alice/shut/demo"):
        page = alice.get(path)
        assert page.status == 200 and "private" in page.reply.headers["Cache-Control"]
        assert "Cookie" in page.reply.headers["Vary"] or "+simple" in path
        assert "alice Log out" not in Browser(server).get(path).text
    assert Browser(server).get("/alice/shut/+simple/").status == 401


# -- what ends it


def test_logging_out_ends_it_for_good(server, alice):
    stolen = session_of(alice)
    old = "%s=%s" % (stolen.name, stolen.value)
    page = alice.submit(alice.get("/alice/shut").form("+logout"))
    assert (page.path, "You have logged out" in page.text, "Log in" in page.hrefs) == ("/", True, True)
    assert alice.get("/alice/shut").status == 404
    for _ in range(2):
        assert server.get("/alice/shut", headers={"Accept": BROWSER, "Cookie": old}).status == 404
        server.restart()
        alice.server = server


def test_a_restart_does_not_end_it(server, alice):
    server.restart()
    assert alice.get("/alice/shut").status == 200


def test_a_page_of_a_session_is_not_kept_beyond_its_end(server, alice):
    cookie = session_of(alice)
    sent = {"Accept": BROWSER, "Cookie": "%s=%s" % (cookie.name, cookie.value)}
    for _ in range(3):
        assert "Log out" in server.get("/alice/shut", headers=sent).text
    alice.submit(alice.get("/").form("+logout"))
    assert server.get("/alice/shut", headers=sent).status == 404


def test_a_form_that_began_in_a_session_that_has_ended_since_is_not_taken(server, alice):
    form = alice.get("/alice/+settings").form("+settings")
    body = urllib.parse.urlencode({**form.fields, "title": "changed"}).encode()
    wire = Wire(server, (
        "POST %s HTTP/1.1\r\nHost: localhost\r\nCookie: %s=%s\r\nContent-Type: %s\r\n"
        "Transfer-Encoding: chunked\r\n\r\n%x\r\n"
        % (form.action, session_of(alice).name, session_of(alice).value, FORM, len(body))).encode() + body[:1])
    time.sleep(0.6)
    alice.submit(alice.get("/").form("+logout"))
    wire.send(body[1:] + b"\r\n0\r\n\r\n")
    assert wire.reply().status == 403
    assert "title" not in server.get("/alice").result


def test_a_log_out_needs_its_token(server, alice):
    form = alice.get("/").form("+logout")
    assert alice.submit(form, csrf="").status == 403
    assert alice.submit(form, {"Origin": "https://evil.example"}).status == 403
    assert alice.get("/alice/shut").status == 200


def test_a_new_password_ends_all_others(server, alice):
    server.add_user("dora")
    first, second = Browser(server), Browser(server)
    first.log_in("dora"), second.log_in("dora")
    assert server.patch("/dora", {"password": "other"}, user="dora").status == 200
    assert "Log out" not in first.get("/").text + second.get("/").text
    first.log_in("dora", "other"), second.log_in("dora", "other")
    old = session_of(first).value
    page = first.do("/dora/+password", before="other", password="third", again="third")
    assert "changed" in page.text and "Log out" in page.text and session_of(first).value != old
    assert "Log out" not in second.get("/").text


def test_a_deleted_user_has_none_also_if_the_name_comes_again(server):
    server.add_user("emil")
    browser = logged_in(server, "emil")
    assert server.delete("/emil", user="root").status == 200
    assert "Log out" not in browser.get("/").text
    server.add_user("emil")
    assert "Log out" not in browser.get("/").text


@pytest.mark.parametrize("value", [
    "", "x", ".", "a.b", "W10.", "W10.AAAA", "%s.x", "x.%s", "%s%s", "%s.", "\u00e9"])
def test_an_altered_cookie_is_none(server, alice, value):
    cookie = session_of(alice)
    altered = value.replace("%s", cookie.value)
    reply = server.get("/alice/shut", headers={"Accept": BROWSER, "Cookie": "%s=%s" % (cookie.name, altered)})
    assert reply.status == 404


def test_it_ends_with_its_time(server, tmp_path):
    users = {"alice": devpi_lite.Account(1, "alice", None, "g", "", None, {})}
    sessions = sessions_of(users)
    alive = sessions.issue(users["alice"])
    assert sessions.check(alive).user == "alice"
    for end in (0, -1, devpi_lite.Limits.session + 60):
        late = sessions.check(alive)._replace(end=int(devpi_lite.time.time()) + end)
        assert sessions.check(sessions.cookies.sign(late)) is None


class Facts:
    read_only = False

    def __init__(self):
        self.node = {"uuid": "u"}

    def set_facts(self, **facts):
        for key, value in facts.items():
            self.node.pop(key, None)
            if value is not None:
                self.node[key] = value


def sessions_of(users, store=None):
    class Known:
        find = staticmethod(users.get)
    return devpi_lite.Sessions(store or Facts(), Known, (b"secret",))


def test_ended_sessions_are_bounded_by_ending_all(monkeypatch):
    monkeypatch.setattr(devpi_lite.Limits, "ended_sessions", 2)
    users = {"alice": devpi_lite.Account(1, "alice", None, "g", "", None, {})}
    store = Facts()
    sessions = sessions_of(users, store)
    texts = [sessions.issue(users["alice"]) for _ in range(4)]
    for text in texts[:2]:
        sessions.log_out(sessions.check(text))
    assert [sessions.check(text) is None for text in texts] == [True, True, False, False]
    sessions.log_out(sessions.check(texts[2]))
    assert [sessions.check(text) for text in texts] == [None] * 4
    assert sorted(store.node) == ["sessions are valid from", "uuid"]
    assert [sessions_of(users, store).check(text) for text in texts] == [None] * 4


def test_ended_sessions_are_cleaned_while_others_log_out(monkeypatch):
    monkeypatch.setattr(devpi_lite.Limits, "ended_sessions", 50000)
    sessions = sessions_of({})
    sessions.ended = {str(number): sys.maxsize for number in range(20000)}
    session = devpi_lite.Session("alice", "g", sys.maxsize, "", "u")
    stop = threading.Event()

    def log_out():
        for number in range(20000):
            sessions.log_out(session._replace(id="new %d" % number))
            if stop.is_set():
                return

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=log_out)
    thread.start()
    try:
        with contextlib.closing(sqlite3.connect(":memory:")) as db:
            db.execute("CREATE TABLE node (key, value)")
            for _ in range(10):
                sessions.clean(db)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(before)


def test_a_page_with_a_notice_is_shown_once(server, alice):
    page = alice.do("/alice/+settings", title="Alice A.")
    assert "Changed: title was empty." in page.text
    assert "Changed:" not in alice.get("/alice").text
    forged = server.get("/alice", headers={"Accept": BROWSER, "Cookie": "devpi_lite_notice=WzFd.AAAA"})
    assert (forged.status, 'role="status"' in forged.text) == (200, False)
