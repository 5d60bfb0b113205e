"""The browser that test_every_page.py relies on finds the faults that a page can have, and none in a good page."""

import base64
import hashlib
import http.server
import pathlib
import re
import threading

import pytest

SCRIPT = "document.querySelector('p').textContent = 'scripted'"
POLICY = ("default-src 'none'; style-src 'unsafe-inline'; img-src 'self'; form-action 'self'; script-src 'sha256-%s'"
          % base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode())
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>A page</title>
<style>
:root { color-scheme: light dark; --paper: #fff; --ink: #222 }
@media (prefers-color-scheme: dark) { :root { --paper: #111; --ink: #eee } }
body { background: var(--paper); color: var(--ink) }
</style>
</head><body><main><h1>A page</h1><p>plain</p>
%s
<script>""" + SCRIPT + """</script></main></body></html>
"""
FORM = '<form action="/sent"><label>Name <input name="name"></label> <button type="submit">Send</button></form>'
BODIES = {
    "good": FORM,
    "sent": "<p>%s</p>",
    "handler": '<button type="button" onclick="alert(1)">x</button>',
    "script": "<script>document.title = 'evil'</script>",
    "foreign": '<img src="https://example.com/x.png" alt="x">',
    "error": '<img src="/missing.png" alt="x">',
    "wide": '<div style="width: 700px">wide</div>',
    "faint": '<p style="color: #ccc; background: #fff">hardly to be read</p>',
    "faint-in-the-dark": '<p style="color: #333">hardly to be read</p>',
    "unlabelled": '<form action="/sent"><input name="name"> <button type="submit">Send</button></form>',
    "invalid": "<ul><div>no item</div></ul>",
    "unclosed": "<p>one<section>",
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name, _, query = self.path.strip("/").partition("?")
        body = BODIES.get(name, "")
        if name == "sent":
            body %= "%s, %s" % (query, self.headers.get("Cookie"))
        page = (PAGE % body).encode()
        self.send_response(200 if name in BODIES else 404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *texts):
        pass


@pytest.fixture(scope="module")
def site():
    """The URL of a server of those pages."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield "http://127.0.0.1:%d/" % server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_a_good_page_has_no_faults(browser, site, dark, scripts):
    seen = browser.visit(site + "good", width=320, dark=dark, scripts=scripts)
    assert seen.faults == []
    assert (seen.status, seen.title, seen.width) == (200, "A page", 320)
    assert ("scripted" if scripts else "plain") in seen.text


@pytest.mark.parametrize("name, fault, options", [
    ("handler", "console: .*Content Security Policy", {}),
    ("script", "console: .*Content Security Policy", {}),
    ("foreign", "asks elsewhere: https://example.com/x.png", {}),
    ("error", "console: .*404", {}),
    ("wide", "scrolled sideways by 3[0-9][0-9] pixels", {"width": 390}),
    ("faint", "barrier: color-contrast", {}),
    ("faint", "barrier: color-contrast", {"scripts": False}),
    ("faint-in-the-dark", "barrier: color-contrast", {"dark": True}),
    ("unlabelled", "barrier: label", {}),
    ("invalid", "HTML: .*element-permitted-content", {}),
    ("unclosed", "HTML: .*close", {})])
def test_a_fault_is_found(browser, site, name, fault, options):
    faults = browser.visit(site + name, **options).faults
    assert any(re.search(fault, each) for each in faults), faults


@pytest.mark.parametrize("name, options", [("wide", {"width": 1280}), ("faint-in-the-dark", {})])
def test_what_is_a_fault_elsewhere_is_none_here(browser, site, name, options):
    assert browser.visit(site + name, **options).faults == []


def test_a_window_is_resized(browser, site):
    assert browser.visit(site + "wide", width=1280, axe=False).faults == []
    assert browser.resize(690, axe=False).excess >= 10


def test_a_missing_page_has_its_status_and_no_other_fault(browser, site):
    seen = browser.visit(site + "nothing")
    assert (seen.status, seen.faults) == (404, [])


def test_a_form_is_filled_and_sent(browser, site):
    browser.visit(site + "good", cookies={"session": "abc"}, scripts=False)
    browser.fill("[name=name]", "Ann Lee")
    seen = browser.click("text=Send")
    assert seen.url == site + "sent?name=Ann+Lee"
    assert "name=Ann+Lee, session=abc" in seen.text and seen.faults == []
    assert "None" in browser.visit(site + "sent").text      # a fresh profile


def test_what_is_not_there_is_said(browser, site):
    with pytest.raises(AssertionError, match="visit http://127.0.0.1:1/: "):
        browser.visit("http://127.0.0.1:1/")
    assert browser.visit(site + "good").status == 200


def test_a_picture_is_taken(browser, site):
    shot = pathlib.Path(browser.visit(site + "good", shot="a-good-page").shot)
    assert shot.read_bytes().startswith(b"\x89PNG") and shot.parent.name == "shots"
    shot.unlink()
