"""Hostile texts in a real browser: nothing of them runs, shows a dialog, or asks for anything."""

import json

import pytest

from harness import Server, documentation, eventually, links, path_of, upload, upload_docs, wheel
from sample import quoted
from test_descriptions import SCHEMES, VECTORS
from test_descriptions_rst import EVIL, PLACES
from webpages import RESULT

ALERT = "\"'><script>alert(1)</script><img src=/x onerror=alert(2)><svg onload=alert(3)></svg><a href=javascript:alert(4)>x</a>"
MARKDOWN = "\n".join("- " + vector.replace("\n", "\n  ") for vector in (
    *VECTORS,
    *(form % scheme for scheme in SCHEMES for form in ("[x](%s)", "![x](%s)", "<a href='%s'>x</a>", "<%s>"))
)).encode("utf-8", "replace").decode()
RST = "\n\n".join(place.replace("{}", evil) for place in PLACES for evil in EVIL)
MEMBER = "demo/<img src=x onerror=alert(1)>'\"&.py"
# tags, attributes and links that nobody but us may put onto a page
PLANTED = """[...document.querySelectorAll("*")].filter(each =>
    ["SVG", "IMG", "OBJECT", "EMBED", "MATH", "VIDEO"].includes(each.tagName.toUpperCase())
    || each.tagName == "SCRIPT" && each !== document.scripts[0]
    || [...each.attributes].some(({name, value}) => /^(on|style$)/.test(name)
        || ["href", "src", "action", "formaction"].includes(name) && !/^(https?:|mailto:|[/#?]|data:image.svg.xml,%3Csvg)/.test(value))
).map(each => each.outerHTML)"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server in which every text that anybody can enter is hostile."""
    server = Server(tmp_path_factory.mktemp("hostile") / "server", "--offline-mode").start()
    server.add_user("mallory")
    server.add_index("mallory/dev", bases=[], title=ALERT, description=ALERT)
    server.patch("/mallory", {"title": ALERT, "description": ALERT, "email": ALERT}, user="mallory")
    about = {key: ALERT for key in ("summary", "author", "author_email", "license", "keywords", "home_page", "platform")}
    about.update(project_urls="Evil, javascript:alert(1)", requires_dist="other; extra == '%s'" % ALERT, classifiers=ALERT)
    for version, text, form in (("1.0", MARKDOWN, "text/markdown"), ("1.1", RST, "text/x-rst"), ("1.2", ALERT, "text/plain")):
        archive = wheel("demo", version, extra_members={MEMBER: (ALERT + version).encode()})
        upload(server, "mallory/dev", archive, user="mallory",
               fields=dict(about, description=text, description_content_type=form))
    result = json.dumps(RESULT).replace("py312", "py<script>alert(1)").replace("ci-1", "<svg onload=alert(1)>")
    assert server.post(path_of(archive, "mallory/dev"), json.loads(result), user="mallory").status == 200
    server.patch("/mallory/dev/demo/1.1", {"yanked": ALERT}, user="mallory")
    server.patch("/mallory/dev/demo", {"project-status": {"status": "deprecated", "reason": ALERT}}, user="mallory")
    upload_docs(server, "mallory/dev", documentation("demo", "1.0", "<title>&lt;script>alert(1)&lt;/script></title>needle"))
    eventually(lambda: server.get("/+search?query=needle").result["total"])
    yield server
    server.kill()


WHEEL = "demo-1.2-py3-none-any.whl"


@pytest.mark.parametrize("path", [
    "/", "/mallory", "/mallory/dev", "/mallory/dev?show=settings", "/mallory/dev?q=" + quoted(ALERT), "/mallory/dev/demo",
    "/mallory/dev/demo/1.0", "/mallory/dev/demo/1.1", "/mallory/dev/demo/1.2", "/mallory/dev/demo/+why",
    "/mallory/dev/demo/+diff/1.0...1.2", "/mallory/dev/demo/1.2/+files/" + WHEEL,
    "/mallory/dev/demo/1.2/+files/%s/%s" % (WHEEL, quoted(MEMBER)), "/mallory/dev/demo/1.2/+toxresults/" + WHEEL, "(a result)",
    "/+search?query=needle", "/+search?query=demo", "/+search?query=" + quoted(ALERT), "/+help?q=" + quoted(ALERT),
    "/mallory/" + quoted(ALERT), "/" + quoted(ALERT), "/+login?next=" + quoted(ALERT), "/+login?next=javascript:alert(1)"])
def test_hostile_texts_are_texts(browser, server, path):
    if path == "(a result)":
        name = links(server, "mallory/dev/demo/1.2", "toxresult")[0]["href"].rpartition("/")[2]
        path = "/mallory/dev/demo/1.2/+toxresults/%s/%s" % (WHEEL, name)
    seen = browser.visit(server.url + path, axe=False)
    assert [fault for fault in seen.faults if not (fault.startswith("HTML: ") and path.endswith("/demo/1.0"))] == []
    assert seen.requests == [server.url + path]
    assert browser.value(PLANTED) == []
    assert browser.look().messages == []


@pytest.mark.parametrize("version, marks", [("1.0", ("li", "code")), ("1.1", ("pre", "blockquote"))])
def test_hostile_descriptions_are_rendered_and_stay_in_their_place(browser, server, version, marks):
    """The tags of Markdown may stand where HTML has no place for them, but end where the description ends."""
    browser.visit(server.url + "/mallory/dev/demo/" + version, axe=False)
    for mark in marks:
        assert browser.value("document.querySelectorAll('.readme %s').length" % mark) > 1
    assert browser.value("document.querySelector('#description').lastElementChild.className") == "readme"
    assert browser.value("document.querySelector('#description').nextElementSibling.id") == "files"
    assert browser.value("document.querySelectorAll('h1, main, footer').length") == 3
