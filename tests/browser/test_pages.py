"""Every page in a real browser: nothing to scroll sideways, no barriers, no faulty HTML, no complaint of the console, no
request to another host; in narrow and wide windows, by day and by night, with and without scripts.

Pictures of them are in .interop/shots/.
"""

import typing

import pytest

from harness import Server, documentation, sdist, submit, upload, upload_docs, wheel

WIDTHS = (320, 390, 1280, 1920)
PICTURED = (320, 1280)      # the widths at which pictures are taken and barriers are looked for


class Page(typing.NamedTuple):
    name: str       # of its pictures
    path: str
    status: int = 200


PAGES = (
    Page("front", "/"),
    Page("user", "/alice"),
    Page("stage", "/alice/dev"),
    Page("empty-stage", "/alice/empty"),
    Page("project", "/alice/dev/demo"),
    Page("version", "/alice/dev/demo/1.0"),
    Page("search", "/+search?query=demo"),
    Page("nothing-found", "/+search?query=zzzz"),
    Page("status", "/+status"),
    Page("log-in", "/+login"),
    Page("file-list", "/alice/dev/demo/1.0/+files/demo-1.0-py3-none-any.whl/"),
    Page("no-such-index", "/alice/nothing", 404),
    Page("documentation-frame", "/alice/dev/demo/1.0/+d/index.html"),
    Page("documentation", "/alice/dev/demo/1.0/+doc/index.html"),
)

DOCUMENTATION = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>demo</title></head>
<body><main><h1>demo</h1><p>How it is used.</p></main><script>document.title = "demo, scripted"</script></body></html>
"""
SUMMARY = "A summary that is long enough to need more than a single line in a narrow window, as many summaries are"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with all that the pages in PAGES show."""
    server = Server(tmp_path_factory.mktemp("pages") / "server").start()
    server.add_user("alice")
    server.add_index("alice/empty", bases=[])
    server.add_index("alice/dev", bases=["alice/empty"], title="What is being worked on")
    for version in ("1.0", "1.1", "2.0rc1"):
        upload(server, "alice/dev", wheel("demo", version, summary=SUMMARY, requires_dist=["other-lib>=1"]),
               sdist("demo", version))
    upload(server, "alice/dev", wheel("a-project-with-a-name-of-many-words-that-does-not-fit-into-a-narrow-window", "1.0"))
    upload_docs(server, "alice/dev", documentation("demo", "1.0", DOCUMENTATION))
    submit(server, "alice/dev", "without-files", "1.0")
    yield server
    server.kill()


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "plain"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_sound(browser, server, page, dark, scripts):
    seen, faults = browser.visit(server.url + page.path, dark=dark, scripts=scripts, axe=False), []
    assert seen.status == page.status
    for width in WIDTHS:
        is_pictured = width in PICTURED
        shot = "%s-%d-%s" % (page.name, width, "dark" if dark else "light") if is_pictured and scripts else None
        seen = browser.resize(width, shot=shot, axe=is_pictured)
        faults += ["%d pixels wide: %s" % (width, fault) for fault in seen.faults]
    assert faults == []
