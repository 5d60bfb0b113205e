"""What browsers and caches between us and people may do with what we say."""

import concurrent.futures

import pytest

from harness import ANY, HTML, JSON, path_of, sdist, wheel

OPEN, PROTECTED = "safe/open", "safe/protected"


@pytest.fixture(scope="module")
def site(shared_server):
    shared_server.add_user("safe")
    shared_server.login("safe")
    shared_server.add_index(OPEN)
    shared_server.add_index(PROTECTED, acl_pkg_read=["safe"])
    for index in (OPEN, PROTECTED):
        assert shared_server.upload(index, wheel("p", "1.0")).status == 200
        assert shared_server.upload(index, sdist("p", "1.0")).status == 200
    return shared_server


# -- names by which a server is asked that only its own machine can reach


OURS = ("127.0.0.1", "127.0.0.1:3141", "localhost", "localhost:3141", "LOCALHOST.", "[::1]:3141", "10.1.2.3", "devpi.localhost",
        "devpi", "devpi:3141", "")
FOREIGN = ("evil.example", "evil.example:3141", "127.0.0.1.evil.example", "localhost.evil.example", "evil.example.",
           "1.2.3", "0x7f.1", "xn--80ak6aa92e.com", "evil-localhost.com")


def ask(server, host, method="GET", path="/", body="", more=""):
    head = "%s %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n%sContent-Length: %d\r\n\r\n" % (
        method, path, host, more, len(body))
    return server.raw(head.encode() + body.encode())


def status(reply):
    return int(reply.split()[1])


@pytest.mark.parametrize("host", OURS)
def test_a_name_that_only_this_machine_can_mean_is_answered(site, host):
    assert status(ask(site, host, path="/+api")) == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_a_page_whose_name_was_made_to_mean_this_machine_reads_and_changes_nothing(site, host):
    for more in ("", "X-Outside-URL: http://%s\r\n" % host, "X-Forwarded-Host: %s\r\n" % host):
        reply = ask(site, host, path="/safe/open", more=more)
        assert status(reply) == 421 and b"safe" not in reply.partition(b"\r\n\r\n")[2]
    reply = ask(site, host, "PUT", "/rebound", '{"password": "x"}', "Origin: http://%s\r\n" % host)
    assert status(reply) == 421 and b"--outside-url" in reply
    assert "rebound" not in site.get("/").result


def test_the_name_in_outside_url_is_ours_and_a_ready_answer_is_nobody_elses(make_server):
    server = make_server("--outside-url", "https://pkg.example.org/pypi")
    for _ in range(2):
        assert [status(ask(server, host, path="/+api")) for host in ("pkg.example.org", "pkg.example.com")] == [200, 421]


def test_who_listens_for_others_answers_to_any_name(make_server):
    server = make_server("--listen", "0.0.0.0:0")
    assert status(ask(server, "pkg.example.org", path="/+api")) == 200


# -- headers


PERSONAL = "private, no-cache"
ROUTES = [      # path, Accept, and the Cache-Control that it must have
    ("/", JSON, PERSONAL), ("/+api", JSON, PERSONAL), ("/+status", JSON, PERSONAL), ("/safe", JSON, PERSONAL),
    ("/{index}", JSON, PERSONAL), ("/{index}/p", JSON, PERSONAL), ("/{index}/p/1.0", JSON, PERSONAL),
    ("/{index}/+api", JSON, PERSONAL), ("/+search?query=p", JSON, PERSONAL), ("/+suggest?q=p", JSON, PERSONAL),
    ("{wheel}", JSON, PERSONAL), ("{wheel}", ANY, None), ("{wheel}.metadata", ANY, None),
    ("/{index}/missing", JSON, PERSONAL), ("/missing/missing", JSON, PERSONAL), ("/{index}/+simple/missing/", HTML, PERSONAL),
    ("/{index}/+f/000/0000000000000/missing-1.0.tar.gz", ANY, PERSONAL)]


@pytest.mark.parametrize("index", (OPEN, PROTECTED))
@pytest.mark.parametrize("path, accept, cached", ROUTES)
def test_nothing_is_sniffed_and_nothing_personal_is_shared(site, index, path, accept, cached):
    path = path.replace("{wheel}", path_of(wheel("p", "1.0"), index)).format(index=index)
    reply = site.get(path, headers={"Accept": accept}, user="safe")
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    if cached is None:
        cached = "max-age=365000000, immutable, " + ("private" if index == PROTECTED else "public")
    assert reply.headers["Cache-Control"] == cached


@pytest.mark.parametrize("headers, status", [
    ({"X-Real-IP": "127.0.0.1"}, 201),
    ({"X-Real-IP": "127.0.0.1", "X-Forwarded-For": "127.0.0.1"}, 201),
    ({"X-Real-IP": "127.0.0.1", "X-Forwarded-For": "203.0.113.9"}, 403),
    ({"X-Real-IP": "::1", "X-Forwarded-For": "127.0.0.1, 203.0.113.9"}, 403),
    ({"X-Real-IP": "127.0.0.1", "Forwarded": "for=203.0.113.9"}, 403),
    ({"X-Forwarded-For": "127.0.0.1"}, 403)], ids=str)
def test_who_comes_by_a_proxy_is_not_local_by_a_header_of_its_own(site, headers, status):
    name = "byproxy%d" % abs(hash(str(headers)))
    assert site.put("/" + name, {"password": "pw"}, headers=headers).status == status


def test_setting_passwords_leaves_the_line_of_logins_to_others(site):
    with concurrent.futures.ThreadPoolExecutor(30) as threads:
        changes = [threads.submit(site.patch, "/safe", {"password": "pw"}, user="safe", password="pw") for _ in range(30)]
        reply = site.get("/+api", user="root", password="secret")
        statuses = {change.result().status for change in changes}
    assert reply.status == 200 and reply.result["authstatus"][0] == "ok" and statuses <= {200, 503, 403, 401}
    site.login("safe", "pw")
