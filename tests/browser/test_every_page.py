"""Every page in a real browser: nothing to scroll sideways, no barriers, no faulty HTML, no complaint of the console, no
request to another host; in narrow and wide windows, by day and by night, with and without scripts.

Pictures of them are in .interop/shots/.
"""

import re
import typing

import pytest

import devpi_lite
from forms import logged_in
from harness import Server
from sample import quoted, sample, wheel_of


class Page(typing.NamedTuple):
    name: str       # of its pictures
    path: str
    status: int = 200
    user: str = ""  # who has logged in
    opens: str = ""     # a CSS selector of `details` to be opened


WHEEL = "/alice/dev/demo/1.0/+files/" + wheel_of("demo", "1.0").filename
PAGES = (
    Page("front", "/"),
    Page("front-of-root", "/?all=1", user="root"),
    Page("user", "/alice"),
    Page("user-without-indexes", "/bob"),
    Page("own-user", "/alice", user="alice"),
    Page("stage", "/alice/dev"),
    Page("stage-newest", "/alice/dev?sort=-uploaded"),
    Page("stage-filtered", "/alice/dev?q=need"),
    Page("stage-filter-without-hits", "/alice/dev?q=zzz"),
    Page("stage-settings", "/alice/dev?show=settings"),
    Page("stage-inheritance", "/alice/dev?show=inheritance"),
    Page("stage-empty", "/alice/empty"),
    Page("own-stage", "/alice/dev", user="alice"),
    Page("mirror", "/alice/mirror"),
    Page("mirror-names", "/alice/mirror?show=names"),
    Page("mirror-filtered", "/alice/mirror?q=upstream-00"),
    Page("mirror-settings", "/alice/mirror?show=settings"),
    Page("project", "/alice/dev/demo"),
    Page("project-filtered", "/alice/dev/demo?pre=0&yanked=0"),
    Page("project-yanked", "/alice/dev/withdrawn"),
    Page("project-quarantined", "/alice/dev/harmful"),
    Page("project-long", "/alice/dev/a-project-with-a-name-of-many-words-that-does-not-fit-into-a-narrow-window"),
    Page("project-mirrored", "/alice/mirror/mirrored"),
    Page("own-project", "/alice/dev/demo", user="alice"),
    Page("version", "/alice/dev/demo/1.0", opens="main details"),
    Page("version-rst", "/alice/dev/demo/1.1?python=3.13&platform=linux"),
    Page("version-wheels", "/alice/dev/demo/1.1", opens="main details"),
    Page("version-pre", "/alice/dev/demo/2.0rc1"),
    Page("version-yanked", "/alice/dev/withdrawn/1.0"),
    Page("version-inherited", "/alice/dev/demo/0.9"),
    Page("version-without-files", "/alice/dev/without-files/1.0"),
    Page("version-mirrored", "/alice/mirror/mirrored/1.0"),
    Page("own-version", "/alice/dev/demo/1.0", user="alice"),
    Page("why", "/alice/dev/demo/+why"),
    Page("why-mirrored", "/alice/dev/mirrored/+why"),
    Page("dependents", "/alice/dev/demo/+dependents"),
    Page("dependents-none", "/alice/dev/withdrawn/+dependents"),
    Page("compare", "/alice/dev/+compare/alice/prod"),
    Page("compare-equal", "/alice/dev/+compare/alice/dev"),
    Page("own-compare", "/alice/dev/+compare/alice/prod", user="alice"),
    Page("diff", "/alice/dev/demo/+diff/0.9...1.0"),
    Page("diff-nothing", "/alice/dev/demo/+diff/1.0...1.0"),
    Page("members", WHEEL),
    Page("member", WHEEL + "/demo/code.py"),
    Page("member-binary", WHEEL + "/demo/data.bin"),
    Page("results", "/alice/dev/demo/1.0/+toxresults/" + wheel_of("demo", "1.0").filename),
    Page("results-none", "/alice/dev/demo/1.1/+toxresults/demo-1.1-py3-none-any.whl"),
    Page("result", "(of the sample)", opens="main details"),
    Page("search-empty", "/+search"),
    Page("search", "/+search?query=demo"),
    Page("search-names", "/+search?query=upstream"),
    Page("search-nothing", "/+search?query=demmo"),
    Page("search-odd", "/+search?query=%s" % quoted('"<b> AND ( zzzz:')),
    Page("manual", "/+help"),
    Page("manual-search", "/+help?q=mirror+whitelist"),
    Page("manual-nothing", "/+help?q=zzzz"),
    Page("manual-topic", "/+help/web"),
    Page("status", "/+status"),
    Page("documentation-frame", "/alice/dev/demo/1.0/+d/index.html"),
    Page("documentation", "/alice/dev/demo/1.0/+doc/index.html"),
    Page("no-such-user", "/nobody", 404),
    Page("no-such-index", "/alice/nothing", 404),
    Page("no-such-project", "/alice/dev/demmo", 404),
    Page("no-such-version", "/alice/dev/demo/9.9", 404),
    Page("not-allowed", "/alice/dev/+settings", 403, user="bob"),
    Page("log-in", "/+login"),
    Page("form-upload", "/alice/dev/+upload", user="alice"),
    Page("form-yank", "/alice/dev/demo/1.0/+yank", user="alice"),
    Page("form-unyank", "/alice/dev/withdrawn/1.0/+unyank", user="alice"),
    Page("form-delete-version", "/alice/dev/demo/1.0/+delete", user="alice"),
    Page("form-delete-project", "/alice/dev/demo/+delete", user="alice"),
    Page("form-delete-index", "/alice/dev/+delete", user="alice"),
    Page("form-delete-user", "/alice/+delete", user="alice"),
    Page("form-status", "/alice/dev/demo/+status", user="alice"),
    Page("form-whitelist", "/alice/dev/demo/+whitelist", user="alice"),
    Page("form-push", "/alice/dev/demo/1.0/+push", user="alice"),
    Page("form-new-index", "/alice/+new-index", user="alice"),
    Page("form-settings", "/alice/dev/+settings", user="alice"),
    Page("form-settings-of-mirror", "/alice/mirror/+settings", user="alice"),
    Page("form-profile", "/alice/+settings", user="alice"),
    Page("form-password", "/alice/+password", user="alice"),
    Page("form-new-user", "/+new-user", user="root"),
    Page("form-outbox", "/+outbox", user="root"),
)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    with sample(tmp_path_factory.mktemp("pages")) as made:
        yield made


@pytest.fixture(scope="module")
def cookies(full):
    """{user: cookies of a browser in which the user has logged in}"""
    return {"": {}, **{user: logged_in(full.server, user).cookies for user in ("root", "alice", "bob")}}


def faults_of(seen, way):
    return ["%s, %d pixels wide: %s" % (way, seen.width, fault) for fault in seen.faults]


def look(browser, url, name, status=200, cookies=None, opens=""):
    """All faults of a page: loaded twice, with scripts and without, and then looked at in other windows."""
    seen = browser.visit(url, width=1280, cookies=cookies, axe=False)
    assert seen.status == status, seen.text
    if opens:
        browser.value("document.querySelectorAll(%r).forEach(each => each.open = true)" % opens)
    faults = faults_of(seen, "light")
    faults += faults_of(browser.resize(1280, shot=name + "-1280-light"), "light")
    for width in (1920, 390):
        faults += faults_of(browser.resize(width, axe=False), "light")
    faults += faults_of(browser.resize(320, dark=True, shot=name + "-320-dark"), "dark")
    faults += faults_of(browser.visit(url, width=320, cookies=cookies, scripts=False, axe=False), "without scripts")
    return faults


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_sound(browser, full, cookies, page):
    path = full.result if page.name == "result" else page.path
    assert look(browser, full.server.url + path, page.name, page.status, cookies[page.user], page.opens) == []


def test_no_kind_of_page_is_left_out():
    pages = {path for (path, _), found in devpi_lite.ROUTES.items() if "GET" in found.choices
             and {"browser", "form", "login form"} & {route.for_ for route in found.choices["GET"].routes}}
    seen = {path for (path, _), found in devpi_lite.ROUTES.items() for page in PAGES
            if found.pattern.fullmatch(page.path.partition("?")[0])}
    assert pages - seen == {"/{user}/{index}/+compare[/]"}      # which leads elsewhere
    assert len(pages) > 30


def test_every_topic_of_the_manual_is_sound(browser, full):
    topics = re.findall(r'href="(/\+help/[a-z]+)"', full.server.get("/+help", headers={"Accept": "text/html"}).text)
    assert len(topics) > 15
    faults = []
    for number, path in enumerate(topics):
        seen = browser.visit(full.server.url + path, width=320, dark=number % 2 == 1)
        faults += faults_of(seen, path)
    assert faults == []


def test_the_guide_of_a_fresh_server_is_sound(browser, tmp_path):
    server = Server(tmp_path / "server", root_pypi=True, root_password="secret").start("--offline-mode")
    try:
        assert look(browser, server.url, "guide") == []
    finally:
        server.kill()
