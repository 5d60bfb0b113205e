"""What people do on the pages, in a real browser: buttons and forms, with scripts and without; keys, and what is copied."""

import itertools
from urllib.parse import quote

import pytest

from forms import logged_in
from harness import Server, new_index, sdist, upload, wheel
from webpages import below

SCRIPTS = pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
numbers = itertools.count(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("actions") / "server", "--offline-mode").start()
    server.add_user("alice")
    yield server
    server.kill()


@pytest.fixture
def index(server):
    """A stage of alice's with demo 1.0, for one test alone."""
    path = new_index(server, "alice", bases=[])
    upload(server, path, wheel("demo", "1.0"), sdist("demo", "1.0"))
    return path


def log_in(browser, server, path, scripts=True, user="alice"):
    """Opens a page, in a fresh profile, by way of the page to log in."""
    browser.visit(server.url + "/+login?next=" + quote(path), scripts=scripts, axe=False)
    browser.fill("#field-user", user)
    browser.fill("#field-password", server.passwords[user])
    return sound(browser.click("button.main"))


def send(browser, kind="main", **fields):
    """Fills the form of the page, and sends it."""
    for name, text in fields.items():
        browser.fill("main [name=%s]" % name, text)
    return sound(browser.click("main form button." + kind))


def sound(seen):
    assert seen.faults == []
    return seen


# -- logging in and out


@SCRIPTS
def test_people_log_in_where_they_were_and_log_out(browser, server, index, scripts):
    browser.visit(server.url + "/" + index, scripts=scripts, axe=False)
    browser.click("text=Log in")
    refused = send(browser, user="alice", password="wrong")
    assert refused.status == 401 and "could not be authenticated" in refused.text
    assert browser.value("document.querySelector('#field-user').value") == "alice"
    entered = send(browser, password="pw")
    assert below(server, entered.url) == "/" + index and "Log out" in entered.text
    left = sound(browser.click("text=Log out"))
    assert "You have logged out." in left.text and "Log in" in left.text
    assert "/+login?next=" in browser.go(server.url + "/%s/+settings" % index).url


@SCRIPTS
def test_a_new_password_ends_all_other_logins(browser, server, scripts):
    name = "user%d" % next(numbers)
    server.add_user(name, "old")
    other = logged_in(server, name)
    log_in(browser, server, "/" + name, scripts, name)
    browser.click("text=Change password")
    refused = send(browser, before="old", password="new", again="knew")
    assert "the two passwords differ" in refused.text
    done = send(browser, before="old", password="new", again="new")
    assert "was changed" in done.text and "Log out" in done.text
    assert "Log out" not in other.get("/" + name).text
    assert server.post("/+login", {"user": name, "password": "new"}).status == 200


# -- files, versions and indexes


@SCRIPTS
def test_a_file_is_uploaded_and_deleted_again(browser, server, index, scripts, tmp_path):
    archives = [wheel("parcel", "1.0"), wheel("parcel", "1.1")][:2 if scripts else 1]
    for archive in archives:
        (tmp_path / archive.filename).write_bytes(archive.content)
    home = "/%s/parcel/%s" % (index, archives[-1].version)
    log_in(browser, server, "/%s" % index, scripts)
    browser.click("text=Upload a file")
    browser.attach("#file", *(tmp_path / archive.filename for archive in archives))
    browser.value("""{
        const bar = document.querySelector("progress");
        new MutationObserver(() => sessionStorage.bar = `${bar.hidden} ${bar.value}`).observe(bar, {attributes: true});
    }""")
    browser.click("form.upload button.main")
    browser.wait("[role=status]")
    done = sound(browser.look())
    assert below(server, done.url) == home and "%s was uploaded." % archives[-1].filename in done.text
    assert (browser.value("sessionStorage.bar") == "false 1") == scripts
    assert server.versions(index, "parcel") == [archive.version for archive in archives]

    asked = sound(browser.click("text=Delete it again"))
    assert "This deletes 1 file." in asked.text and "Cancel" in asked.text
    gone = send(browser, "bad")
    assert "Deleted: %s" % archives[-1].filename in gone.text
    assert server.filenames(index, "parcel") == [archive.filename for archive in archives[:-1]]


@SCRIPTS
def test_a_file_that_is_refused_is_named_with_the_reason(browser, server, index, scripts, tmp_path):
    path = tmp_path / "demo-2.0-py3-none-any.whl"
    path.write_bytes(b"no wheel")
    log_in(browser, server, "/%s/+upload" % index, scripts)
    browser.attach("#file", path)
    browser.click("form.upload button.main")
    browser.wait("form.upload output:has-text('is no zip file')" if scripts else "[role=alert]")
    assert "'demo-2.0-py3-none-any.whl' is no zip file" in browser.look().text
    assert browser.value("document.querySelector('form.upload button').disabled") is False
    assert server.versions(index, "demo") == ["1.0"]


@SCRIPTS
def test_a_version_is_yanked_and_taken_back(browser, server, index, scripts):
    log_in(browser, server, "/%s/demo/1.0" % index, scripts)
    asked = sound(browser.click("a:text-is('Yank')"))
    assert "2 files" in asked.text
    done = send(browser, reason="loses data")
    assert "Yanked: 2 files of demo 1.0." in done.text and "This version is yanked: loses data" in done.text
    assert {file["yanked"] for file in server.simple(index, "demo")["files"]} == {"loses data"}
    browser.click("[role=status] a")
    assert "was taken back" in send(browser).text
    assert not any(file.get("yanked") for file in server.simple(index, "demo")["files"])


@SCRIPTS
def test_a_version_is_pushed(browser, server, index, scripts):
    target = new_index(server, "alice", bases=[])
    log_in(browser, server, "/%s/demo/1.0" % index, scripts)
    browser.click("a:text-is('Push')")
    browser.choose("main [name=to]", target)
    done = send(browser)
    assert below(server, done.url) == "/%s/demo/1.0" % target
    assert "demo 1.0 was pushed from %s to %s." % (index, target) in done.text
    assert len(server.filenames(target, "demo")) == 2


@SCRIPTS
def test_an_index_is_made_changed_and_deleted(browser, server, scripts):
    name = "made%d" % next(numbers)
    log_in(browser, server, "/alice", scripts)
    browser.click("text=New index")
    done = send(browser, name=name)
    assert below(server, done.url) == "/alice/" + name and "alice/%s was made." % name in done.text
    browser.click("text=Change settings")
    browser.choose("main [name=volatile]", "no")
    done = send(browser, title="A title")
    assert "A title" in done.text and "non-volatile" in done.text
    browser.go(server.url + "/alice/%s/+settings" % name)
    browser.choose("main [name=volatile]", "yes")
    send(browser)
    browser.click("text=Delete index")
    refused = send(browser, "bad", name="alice")
    assert refused.status == 400 and "nothing was deleted" in refused.text
    assert "was deleted" in send(browser, "bad", name="alice/" + name).text
    assert server.get("/alice/" + name).status == 404


# -- keys, and what is copied


def test_keys_lead_to_the_search_and_home(browser, server, index):
    browser.visit(server.url + "/" + index, axe=False)
    browser.press("/", "d", "e", "/")
    assert browser.value("document.activeElement.id") == "q"
    assert browser.value("document.activeElement.value") == "de/"
    browser.press("Escape", "Tab", "h")
    assert browser.look().url == server.url + "/" + index
    browser.press("g", "h")
    browser.wait("h1:text-is('Package indexes')")
    assert browser.look().url == server.url + "/"


def test_a_question_mark_shows_the_keys(browser, server, index):
    browser.visit(server.url + "/" + index, axe=False)
    is_open = "document.querySelector('#keys').open"
    assert "these keys" not in browser.look().text and browser.value(is_open) is False
    browser.press("?")
    assert "these keys" in browser.look().text and browser.value(is_open) is True
    sound(browser.resize(320, shot="keys"))
    browser.press("Escape")
    assert browser.value(is_open) is False
    browser.press("?")
    browser.click("dialog button")
    assert browser.value(is_open) is False


def test_a_command_is_copied(browser, server, index):
    browser.visit(server.url + "/" + index, axe=False)
    command = "pip install --index-url %s/%s/+simple/ NAME" % (server.url, index)
    browser.click(".copyable button")
    browser.wait("button:text-is('Copied')")
    assert browser.value("navigator.clipboard.readText()") == command
    browser.wait("button.copy:text-is('Copy')")


def test_a_command_is_copied_where_there_is_no_clipboard(browser, server, index):
    """As on plain http from another machine."""
    browser.visit(server.url + "/" + index, axe=False)
    browser.value("navigator.clipboard.writeText('something else')")
    browser.value("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    browser.click(".copyable button")
    browser.wait("button:text-is('Copied')")
    command = "pip install --index-url %s/%s/+simple/ NAME" % (server.url, index)
    assert browser.value("getSelection().toString()") == command
    assert browser.go(server.url + "/").status == 200
    assert browser.value("navigator.clipboard.readText()") == command


def test_nothing_to_copy_with_is_shown_without_scripts(browser, server, index):
    seen = browser.visit(server.url + "/" + index, scripts=False, axe=False)
    assert "pip install --index-url" in seen.text and "Copy" not in seen.text


def test_lines_of_a_file_are_marked(browser, server, index):
    code = "".join("line = %d\n" % number for number in range(1, 201))
    upload(server, index, wheel("lines", "1.0", extra_members={"lines/code.py": code.encode()}))
    page = "%s/%s/lines/1.0/+files/lines-1.0-py3-none-any.whl/lines/code.py" % (server.url, index)
    marked = "[...document.querySelectorAll('.source .lit')].map(line => line.textContent.match(/= (.*)/)[1]).join(' ')"
    sound(browser.visit(page + "#L150-L152", width=320))
    assert browser.value(marked) == "150 151 152" and browser.value("scrollY") > 1000
    browser.value("location.hash = '#L3-L4'")
    assert browser.value(marked) == "3 4"
    browser.value("location.hash = '#L9'")
    assert browser.value(marked) == "" and browser.value("document.querySelector(':target').textContent.trim()")[0] == "9"
