"""Documentation in a frame: the page around it, the script in it, tokens, and a host name of its own."""

import base64
import json
import re
import time
import zlib

import pytest

from harness import BROWSER, Server, documentation, patched, run_command, upload, upload_docs, wheel
from test_docs import SCRIPT_OF_OURS, Member, docs_zip, noise
from webpages import page as view, source_hash

SANDBOX = "allow-scripts allow-popups allow-forms"


@pytest.fixture(scope="module")
def site(shared_server):
    """`doc/dev` with `shelf` 1.0, 2.0 and 3.0rc1; `doc/closed`, which only doc may read, with `shelf` and `other`."""
    site = shared_server
    site.add_user("doc")
    site.login("doc", "pw")
    site.add_index("doc/dev")
    site.add_index("doc/closed", acl_pkg_read=["doc"])
    for version, pages in (("1.0", {"old": "old"}), ("2.0", {"new": "new"}), ("3.0rc1", {})):
        assert site.upload("doc/dev", wheel("shelf", version)).status == 200
        upload_docs(site, "doc/dev", documentation("shelf", version, "<h1>Shelf %s</h1>" % version, api="api", **pages))
    for name in ("shelf", "other"):
        upload_docs(site, "doc/closed", documentation(name, "1.0", "<h1>Closed %s</h1>" % name, api="<p>closed api"))
    return site


def add_docs(site, name, *members):
    reply = site.post_form("doc/dev", {":action": "doc_upload", "name": name, "version": "1.0"},
                           {"content": ("x.zip", docs_zip(*members))})
    assert reply.status == 200, reply


def frame(page):
    [attributes] = page.of("iframe")
    return attributes


# -- the page around it


def test_documentation_is_shown_in_a_frame_that_may_run_scripts_but_has_no_origin(site):
    page = view(site, "/doc/dev/shelf/1.0/+d/index.html")
    assert frame(page) == {
        "src": "/doc/dev/shelf/1.0/+doc/index.html", "title": "shelf documentation", "sandbox": SANDBOX}
    assert "frame-src 'self';" in page.reply.headers["Content-Security-Policy"]
    assert page.of("body") == [{"class": "docs"}]
    assert page.title == "shelf 1.0 documentation · doc/dev · devpi_lite"
    assert page.with_text("h1")[0][1] == "Documentation of shelf 1.0"
    assert b"<h1>Shelf 1.0</h1>" in site.get(frame(page)["src"]).body


def test_latest_and_stable_show_what_they_stand_for(site):
    for alias, version in (("latest", "3.0rc1"), ("stable", "2.0")):
        page = view(site, "/doc/dev/shelf/%s/+d/api.html" % alias)
        assert frame(page)["src"] == "/doc/dev/shelf/%s/+doc/api.html" % version
        assert page.with_text("h1")[0][1] == "Documentation of shelf " + version


def test_the_page_leads_to_other_versions_the_zip_and_the_bare_page(site):
    page = view(site, "/doc/dev/shelf/1.0/+d/api.html")
    assert page.hrefs["latest: 3.0rc1"] == "/doc/dev/shelf/1.0/+d/api.html?to=latest"
    assert page.hrefs["stable: 2.0"] == "/doc/dev/shelf/1.0/+d/api.html?to=stable"
    assert page.hrefs["Open without frame"] == "/doc/dev/shelf/1.0/+doc/api.html"
    assert site.get(page.hrefs["Download as a zip"]).status == 200
    assert [text for _, text in page.with_text("option")] == ["3.0rc1", "2.0", "1.0"]
    assert page.with_text("option", selected=None) == [({"selected": None}, "1.0")]
    assert not any(text.startswith("stable") for text in view(site, "/doc/dev/shelf/2.0/+d/api.html").hrefs)


@pytest.mark.parametrize("path, version, there", [
    ("api.html", "2.0", "2.0/+d/api.html"), ("old.html", "2.0", "2.0/+d/index.html"),
    ("index.html", "latest", "3.0rc1/+d/index.html"), ("api.html", "1.0", "1.0/+d/api.html")])
def test_another_version_opens_at_the_same_page_if_it_has_it(site, path, version, there):
    reply = site.get("/doc/dev/shelf/1.0/+d/%s?to=%s" % (path, version), headers={"Accept": BROWSER})
    assert (reply.status, reply.headers.get("Location")) == (302, site.url + "/doc/dev/shelf/" + there)


def test_what_is_not_there_is_404_in_the_frame_of_all_pages(site):
    for path in ("shelf/1.0/+d/none.html", "shelf/9.9/+d/index.html", "none/1.0/+d/index.html", "shelf/1.0/+d/%2E%2E/x",
                 "shelf/1.0/+d/index.html?to=9.9", "shelf/1.0/+d/%3Cb%3E"):
        assert view(site, "/doc/dev/" + path, status=404).of("iframe") == []


def test_a_hidden_index_looks_like_one_that_does_not_exist(site):
    texts = [view(site, "/doc/%s/shelf/1.0/+d/index.html" % name, status=404).main for name in ("closed", "cloned")]
    assert texts[0] == texts[1].replace("cloned", "closed")


def test_a_folder_leads_to_its_index_page(site):
    add_docs(site, "folders", ("index.html", b"top"), ("a/index.html", b"a"))
    reply = site.get("/doc/dev/folders/1.0/+d/a", headers={"Accept": BROWSER})
    assert (reply.status, reply.headers.get("Location")) == (302, site.url + "/doc/dev/folders/1.0/+d/a/")
    assert frame(view(site, "/doc/dev/folders/1.0/+d/a/"))["src"] == "/doc/dev/folders/1.0/+doc/a/"


def test_hostile_names_of_pages_stay_names(site):
    name = "\"><script>x<&'.html"
    add_docs(site, "hostile", ("index.html", b""), (name, b"hostile"))
    page = view(site, "/doc/dev/hostile/1.0/+d/%22%3E%3Cscript%3Ex%3C&'.html")
    assert len(page.of("script")) == len(page.of("iframe")) == 1
    assert site.get(frame(page)["src"]).body.endswith(b"hostile")


# -- the script in it


@pytest.mark.parametrize("above, below", [
    (b"", b"<h1>x</h1>"), (b"<!DOCTYPE html>\n<html><head>\n", b"<meta charset='utf-8'><title>x</title></head>"),
    (b"\xef\xbb\xbf<!doctype HTML PUBLIC \"a\">\r\n<HTML lang='en'>\n<!-- <title> --> <Head id=x>", b"<TITLE>x</TITLE>"),
    (b"<html>", b"<body><head></head>"), (b"", b""), (b"  ", b"<!-- never closed <head>"), (b"", b"text <head>"),
    (b"<!DOCTYPE html><html>", b"<header>x</header>")])
def test_the_script_stands_before_the_first_element_of_the_head(site, above, below):
    name = "place-%08x" % zlib.crc32(above + b"|" + below)
    for method in (0, 8):
        add_docs(site, name, Member("index.html", above + below, method=method))
        reply = site.get("/doc/dev/%s/1.0/+doc/index.html" % name)
        [script] = SCRIPT_OF_OURS.findall(reply.body)
        assert reply.body == above + script + below
        assert reply.headers.get("Content-Length") == str(len(reply.body))
        assert len(above + script) < 1024       # a charset that the page states must stand that early
        bare = site.get("/doc/dev/%s/1.0/+doc/index.html?raw" % name)
        assert bare.body == above + below and bare.headers.get("ETag") != reply.headers.get("ETag")


def test_only_pages_that_scripts_can_read_get_the_script(site):
    wide = "<html><head><title>x".encode("utf-16")
    members = {"wide.html": wide, "style.css": b"<head>", "code.js": b"<head>", "drawing.svg": b"<svg/>",
               "notes.txt": b"<head>"}
    add_docs(site, "bare", ("index.html", b""), *members.items())
    for path, content in members.items():
        reply = site.get("/doc/dev/bare/1.0/+doc/" + path)
        assert (reply.body, reply.headers.get("Content-Length")) == (content, str(len(content)))


def test_a_large_page_comes_whole_with_its_script(site):
    content = b"<html><head><title>x</title>" + noise(3000000)
    for method in (0, 8):
        add_docs(site, "large%d" % method, ("index.html", b""), Member("page.html", content, method=method))
        reply = site.get("/doc/dev/large%d/1.0/+doc/page.html" % method)
        assert SCRIPT_OF_OURS.sub(b"", reply.body, 1) == content
        piece = site.get("/doc/dev/large%d/1.0/+doc/page.html" % method, headers={"Range": "bytes=10-1000009"})
        assert (piece.status, piece.body == reply.body[10:1000010]) == (206, True)


# -- tokens


def inner(site, path="/doc/closed/shelf/1.0/+d/index.html"):
    return frame(view(site, path, user="doc"))["src"]


def test_the_frame_of_a_closed_index_has_a_token_that_stands_for_the_reader(site):
    path = inner(site)
    assert re.fullmatch("/doc/closed/shelf/1.0/[+]doc/~[A-Za-z0-9_-]+[.][A-Za-z0-9_-]{43}/index.html", path)
    reply = site.get(path)
    assert reply.status == 200 and b"<h1>Closed shelf</h1>" in reply.body
    assert reply.headers.get("Content-Security-Policy").startswith("sandbox %s;" % SANDBOX)
    assert reply.headers.get("Access-Control-Allow-Origin") == "*"
    assert reply.headers.get("Cache-Control") == "private, max-age=60"
    assert reply.headers.get("Referrer-Policy") == "no-referrer"
    assert b"closed api" in site.get(path.replace("index.html", "api.html")).body
    assert site.get(path.replace("index.html", "none.html")).status == 404


def test_a_token_opens_the_documentation_of_its_project_alone(site):
    path = inner(site)
    assert site.get(path.replace("/shelf/", "/other/")).status == 403
    assert site.get(path.replace("/doc/closed/", "/doc/dev/")).status == 200         # everybody may read that
    for other in ("/doc/closed/shelf", "/doc/closed/shelf/1.0", "/doc/closed/+simple/shelf/"):
        assert site.get(other).status in (401, 404)
    assert site.get(re.sub("~[^/]*/", "", path)).status == 401


def test_a_changed_token_is_refused_and_says_what_to_do(site):
    path = inner(site)
    token, facts, mac = re.search("(~([A-Za-z0-9_-]+)[.]([A-Za-z0-9_-]{43}))/", path).groups()
    said = json.loads(base64.urlsafe_b64decode(facts + "=="))
    assert said[:2] == ["doc/closed", "shelf"] and 500 < said[2] - time.time() <= 600
    later = base64.urlsafe_b64encode(json.dumps(said[:2] + [said[2] + 60]).encode()).decode().rstrip("=")
    session = site.tokens["doc"]
    for wrong in (
            "~%s.%s" % (later, mac), "~%s.%s" % (facts, "0" * 43), "~%s.%s" % (facts, mac[::-1]), "~." + mac,
            "~W10." + mac, "~%s.%s0" % (facts, mac), "~" + facts, "~-", "~" + session, "~e30." + mac,
            "~%s.%s" % (mac, facts)):
        reply = site.get(path.replace(token, wrong))
        assert reply.status in (401, 403), wrong
        assert b"Closed" not in reply.body
    reply = site.get(path.replace(mac, "0" * 43))
    assert (reply.status, "has expired: load the whole page again" in reply.text) == (403, True)


def test_a_token_ends_after_ten_minutes(tmp_path, make_server):
    server = make_server(script=patched(tmp_path, (
        "import time; real = time.time\n"
        "devpi_lite.DocTokens.issue = (lambda self, *of, issue=devpi_lite.DocTokens.issue: (\n"
        "    setattr(time, 'time', lambda: real() - 700), issue(self, *of), setattr(time, 'time', real))[1])\n")))
    server.add_user("doc")
    server.login("doc", "pw")
    server.add_index("doc/closed", acl_pkg_read=["doc"])
    upload_docs(server, "doc/closed", documentation("shelf", "1.0", "late"))
    assert server.get(inner(server)).status == 403


def test_what_a_token_was_good_for_is_not_kept_beyond_its_end(tmp_path, make_server):
    server = make_server(script=patched(tmp_path, (      # each token ends after its first use
        "devpi_lite.DocTokens.fits = (lambda self, *of, fits=devpi_lite.DocTokens.fits, first=iter([True]):\n"
        "    next(first, False) and fits(self, *of))\n")))
    server.add_user("doc")
    server.login("doc", "pw")
    server.add_index("doc/closed", acl_pkg_read=["doc"])
    upload_docs(server, "doc/closed", documentation("shelf", "1.0", "late"))
    path = inner(server)
    assert [server.get(path).status for _ in range(2)] == [200, 403]


def test_a_reader_needs_no_token(site):
    credentials = base64.b64encode(b"doc:pw").decode()
    path = re.sub("~[A-Za-z0-9_-]+", "~e30", inner(site))
    assert site.get(path, headers={"Authorization": "Basic " + credentials}).status == 200


# -- a host name of its own


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("apart") / "server", "--docs-url", "https://Docs.example/").start()
    server.add_user("doc")
    server.login("doc", "pw")
    server.add_index("doc/dev")
    server.add_index("doc/closed", acl_pkg_read=["doc"])
    for index in ("dev", "closed"):
        upload_docs(server, "doc/" + index, documentation("shelf", "1.0", "<h1>Shelf</h1>"))
    yield server
    server.kill()


DOCS_HOST = {"Host": "docs.example", "Accept": BROWSER}


def test_the_frame_shows_documentation_at_its_own_address(apart):
    page = view(apart, "/doc/dev/shelf/1.0/+d/index.html")
    assert frame(page)["src"] == "https://docs.example/doc/dev/shelf/1.0/+doc/index.html"
    assert frame(page)["sandbox"] == SANDBOX + " allow-same-origin"
    assert "frame-src https://docs.example;" in page.reply.headers["Content-Security-Policy"]
    assert frame(view(apart, "/doc/closed/shelf/1.0/+d/index.html", user="doc"))["src"].startswith(
        "https://docs.example/doc/closed/shelf/1.0/+doc/~")


def test_under_its_own_name_documentation_has_an_origin(apart):
    path = "/doc/dev/shelf/1.0/+doc/index.html"
    for host, more in (("docs.example", " allow-same-origin"), ("DOCS.example:443", " allow-same-origin"),
                       ("localhost", "")):
        reply = apart.get(path, headers={"Host": host})
        assert reply.status == 200
        assert reply.headers.get("Content-Security-Policy").startswith("sandbox %s%s; default-src" % (SANDBOX, more))


def test_under_that_name_there_is_nothing_but_documentation(apart):
    for path in ("/", "/doc", "/doc/dev", "/doc/dev/shelf", "/doc/dev/shelf/1.0", "/+status", "/+search?query=x",
                 "/+login", "/+api", "/doc/dev/+simple/", "/doc/dev/shelf/1.0/+d/index.html",
                 "/doc/dev/+f/a/+doc/x", "/+help", "/+metrics"):
        for method in ("GET", "POST", "PUT", "DELETE"):
            reply = apart.request(method, path, headers=DOCS_HOST, user="doc", password="pw")
            assert reply.status == 404, (method, path)
    assert apart.request("POST", "/doc/dev/shelf/1.0/+doc/index.html", headers=DOCS_HOST).status == 404
    for header in ("X-Forwarded-Host", "X-Outside-URL"):
        value = "docs.example" if header == "X-Forwarded-Host" else "https://docs.example"
        assert apart.get("/+status", headers={header: value}).status == 404


@pytest.mark.parametrize("value", [
    "docs.example", "ftp://docs.example", "https://docs.example/path", "https://", "https://a b", "https://u@x"])
def test_an_address_for_documentation_is_a_scheme_and_a_host(value):
    done = run_command("--docs-url", value, "--serverdir", "/nonexistent/x")
    assert done.returncode == 2 and "--docs-url" in done.stderr


# -- the theme


LOGO = b"<svg xmlns='http://www.w3.org/2000/svg'/>"


@pytest.fixture
def theme(tmp_path):
    folder = tmp_path / "theme"
    folder.mkdir()
    for name, text in (
            ("style.css", b"h1{color:red}\r\n.own{}\r"), ("logo.svg", LOGO),
            ("root.html", b"<p class='own'>Welcome & {0}</p>"), ("footer.html", "<b>Ours © %s</b>".encode())):
        (folder / name).write_bytes(text)
    return folder


def test_a_theme_adds_style_logo_welcome_and_footer(make_server, theme):
    server = make_server("--theme", theme)
    page = view(server, "/")
    assert page.raw["style"].endswith("h1{color:red}\n.own{}\n")
    assert source_hash(page.raw["style"]) in page.reply.headers["Content-Security-Policy"]
    assert "Welcome & {0}" in page.main and page.with_text("b") == [({}, "Ours © %s")]
    assert page.of("img", src="/+static/logo")
    assert "Welcome" not in view(server, "/+status").main and view(server, "/+status").with_text("b")
    reply = server.get("/+static/logo")
    assert (reply.body, reply.headers.get("Content-Type")) == (LOGO, "image/svg+xml")
    assert reply.headers.get("Content-Security-Policy").startswith("sandbox; default-src 'none'")
    assert server.get("/+static/logo", headers={"If-None-Match": reply.headers.get("ETag")}).status == 304


@pytest.mark.parametrize("name, content, words", [
    ("style.css", b"a{}</STYLE><script>", "</style"), ("style.css", b"\xff\xfe", "not UTF-8"),
    ("root.html", b"\xff", "not UTF-8"), ("logo.svg", bytes(300000), "more than 256.0 KiB"),
    ("style.css", b"<!-- a", "<!--")])
def test_a_theme_that_can_not_be_used_is_refused_at_the_start(make_server, theme, name, content, words):
    (theme / name).write_bytes(content)
    with pytest.raises(AssertionError) as failure:
        make_server("--theme", theme)
    assert "fatal: --theme" in str(failure.value) and words in str(failure.value)


def test_a_folder_without_any_file_of_a_theme_is_refused(make_server, theme, tmp_path):
    for folder, words in ((tmp_path / "none", "no such folder"), (tmp_path, "templates of devpi")):
        with pytest.raises(AssertionError) as failure:
            make_server("--theme", folder)
        assert words in str(failure.value)


def test_images_of_other_servers_are_shown_only_if_the_operator_wants_it(make_server):
    readme = {"description": "![a build](https://x.example/a.svg)", "description_content_type": "text/markdown"}
    for options, sources, images in (
            ((), "'self' data:", []),
            (("--web-remote-images",), "'self' data: https:", [{"src": "https://x.example/a.svg", "alt": "a build"}])):
        server = make_server(*options)
        server.add_user("alice")
        server.add_index("alice/dev")
        upload(server, "alice/dev", wheel("demo", "1.0"), fields=readme)
        page = view(server, "/alice/dev/demo/1.0")
        assert "img-src %s;" % sources in page.reply.headers["Content-Security-Policy"]
        assert page.of("img") == images and ("[image: a build]" in page.text) == (not images)


def test_documentation_gets_no_address_that_the_rest_has(make_server):
    with pytest.raises(AssertionError, match="needs a host name of its own"):
        make_server("--docs-url", "http://x.example:81", "--outside-url", "https://X.example/pypi")
