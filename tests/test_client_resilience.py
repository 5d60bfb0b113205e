"""Servers, archives and files that mean harm or are broken, and what the command line makes of them."""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time

import pytest

from client import POSIX, SOURCE, end, file_url
from harness import eventually, new_index, sdist, wheel
from misbehaving import Handler, Misbehaving

posix_only = pytest.mark.skipif(not POSIX, reason="needs POSIX signals and links")


class Villain(Misbehaving):
    """A server that answers as the test wants: `answers` maps the end of a path to (status, value or bytes, headers).

    A value may be a function of the handler. `api` changes links of +api; `asked`: (method, path, headers, body)
    of all requests.
    """

    def __init__(self):
        super().__init__()
        self.answers, self.api, self.asked = {}, {}, []
        self.start()
        self.root = self.host_url + "/"
        self.index = self.root + "alice/dev"

    def answer_to(self, path):
        for ending, answer in self.answers.items():
            if path.endswith(ending):
                return answer if len(answer) == 3 else (*answer, {})
        if path.endswith("/+api"):
            return 200, {"type": "apiconfig", "result": {
                "login": self.root + "+login", "authstatus": ["noauth", "", []], "index": self.index,
                "simpleindex": self.index + "/+simple/", "pypisubmit": self.index + "/", "features": [], **self.api}}, {}
        return 200, {"type": "indexconfig", "result": {"type": "stage", "projects": []}}, {}

    def secrets(self):
        """Everything that requests said, with what is base64 in it."""
        words = []
        for _, path, headers, body in self.asked:
            words += [path, body.decode("latin-1")]
            for value in headers.values():
                words.append(value)
                for part in value.split():
                    try:
                        words.append(base64.b64decode(part, validate=True).decode("latin-1"))
                    except ValueError:
                        pass
        return "\n".join(words)


class _Handler(Handler):
    wbufsize = 0        # what a function writes leaves at once

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fake.asked.append((self.command, self.path, dict(self.headers.items()), body))
        status, value, headers = self.fake.answer_to(self.path)
        if callable(value):
            return value(self)
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "X-DEVPI-API-VERSION": "2",
                           "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_PATCH = do_PUSH = do_DELETE = answer


Villain.handler = _Handler


@pytest.fixture
def villain():
    with Villain() as villain:
        yield villain


@pytest.fixture
def other():
    """A second server, for which nothing is meant."""
    with Villain() as other:
        yield other


# -- archives


def tar(path, *members):
    """Writes a tar.gz of (name, bytes), (name, "->", target): a symbolic link, and (name, "=", target): a hard link."""
    with tarfile.open(str(path), "w:gz") as archive:
        for name, content, *target in members:
            info = tarfile.TarInfo(name)
            if target:
                info.type, info.linkname = {"->": tarfile.SYMTYPE, "=": tarfile.LNKTYPE}[content], target[0]
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


OUTWARDS = "d/" * 30 + "../" * 30       # as long as d is not there, this is "inside"


@posix_only
@pytest.mark.parametrize("members", [
    [("payload", b"new"), ("s", "->", OUTWARDS + "{outside}"), ("d", "->", "."), ("s", "=", "payload")],
    [("s", "->", OUTWARDS + "{outside}"), ("d", "->", ".")],
    [("deep/a", "->", "."), ("deep/a/s", "->", "../../{outside}")],
    [("deep/a", "->", ".."), ("deep/a/s", b"new")],
    [("s", "->", "../{outside}")],
    [("s", "->", "/{outside}")],
    [("s", "=", "../{outside}")],
    [("../s", b"new")],
])
def test_no_member_of_a_tar_leaves_its_directory(devpi, site, index, tmp_path, members):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    named = [tuple(part.replace("{outside}", str(outside)[1:]) if isinstance(part, str) else part for part in member)
             for member in members]
    path = tar(tmp_path / "evil-1.0.doc.tar.gz", ("index.html", b"hi"), *named)
    refused = devpi("upload", path, expect=1)
    assert "leaves the archive" in refused
    assert outside.read_text() == "mine"


@posix_only
def test_links_inside_of_an_archive_stay(devpi, site, index, tmp_path):
    site.upload(index, sdist("linked", "1.0"))
    path = tar(tmp_path / "linked-1.0.doc.tar.gz", ("a/index.html", b"the page"), ("b/up.html", "->", "../a/index.html"),
               ("index.html", "->", "./a/index.html"), ("c.html", "=", "a/index.html"), ("c.html", b"written over"))
    assert "doc_upload of linked-1.0.doc.zip" in devpi("upload", path)
    page = site.get("/%s/linked/1.0/+doc/b/up.html?raw" % index, headers={"Accept": "text/html"})
    assert (page.status, page.text) == (200, "the page")


# -- where tokens, passwords and bodies go


def test_the_environments_token_is_for_the_typed_server_alone(nobody, villain, other):
    villain.answers["/+api"] = 302, {}, {"Location": other.root + "alice/dev/+api"}
    for more in ({"DEVPI_TOKEN": "SECRET"}, {"DEVPI_PASSWORD": "SECRET"}):
        nobody("list", DEVPI_USER="alice", DEVPI_INDEX=villain.index, **more)
    nobody("getjson", villain.index + "/+api", DEVPI_USER="alice", DEVPI_TOKEN="SECRET")
    assert "SECRET" in villain.secrets()        # of getjson, which was told this URL
    assert other.asked and "SECRET" not in other.secrets()


def test_a_password_does_not_follow_the_servers_own_address(nobody, villain, other):
    villain.api.update(login=other.root + "+login", index=other.index)
    nobody("list", DEVPI_USER="alice", DEVPI_PASSWORD="SECRET", DEVPI_INDEX=villain.index)
    told = nobody("login", "alice", "--password", "SECRET", expect=1, DEVPI_INDEX=villain.index)
    assert "The server has rewritten the url to: %s" % other.index in told
    assert "wants the password to be sent to %s" % other.root in told
    other.answers["/alice/dev"] = 401, {"message": "who?"}
    told = nobody("list", expect=1, DEVPI_USER="alice", DEVPI_TOKEN="SECRET", DEVPI_INDEX=villain.index)
    assert "set DEVPI_INDEX to an index of %s" % other.root in told
    assert "SECRET" not in other.secrets()


def test_a_body_is_not_sent_on_to_another_server(nobody, villain, other):
    nobody("use", villain.index)
    villain.answers["/+login"] = 307, {}, {"Location": other.root + "steal"}
    told = nobody("login", "alice", "--password", "SECRET", expect=1)
    assert "is redirected to %ssteal" % other.root in told and not other.asked


def test_a_server_ends_no_login_at_another_one(devpi, site, index, villain):
    before = devpi.state("auth.json")
    villain.api["login"] = site.url + "/+login"
    devpi("list", "--index", villain.index)
    villain.answers["/x"] = 401, {}, {"Location": "/+login"}
    devpi("getjson", villain.root + "x", expect=1)
    assert devpi.state("auth.json") == before


@posix_only
def test_a_login_is_not_put_into_the_address_of_another_server(devpi, site, villain):
    """A server may say that its logins are made at one where we are logged in, and that pip is to come to itself."""
    villain.api.update(login=site.url + "/+login")
    path = devpi.add_command("pip", "import os\nprint(os.environ.get('PIP_INDEX_URL'))")
    devpi.environment["PYTHONPATH"] = str(devpi.write("none/pip.py", "raise ImportError").parent)
    shown = devpi("install", "--index", villain.index, "six", PATH=path).lines[-1]
    shown += devpi("env", "--with-credentials", "--index", villain.index)
    assert villain.index + "/+simple/" in shown and site.tokens["alice"] not in shown
    front = {"basic_auth": {site.url + "/": ["front", "SECRET"]}}
    devpi.write_state("auth.json", {**devpi.state("auth.json"), **front})
    devpi("use", "--set-cfg", villain.index)
    assert villain.index in (devpi.home / ".config" / "uv" / "uv.toml").read_text()
    assert not any("SECRET" in path.read_text() for path in (devpi.home / ".config").rglob("*.*"))


def test_netrc_is_for_the_server_that_was_named(nobody, villain, other):
    """A link, a redirect and what a server says of itself lead to any host that .netrc has."""
    netrc = nobody.write(".netrc", "machine 127.0.0.1 login alice password SECRET\n")
    netrc.chmod(0o600)
    nobody("use", villain.index)
    assert "SECRET" in villain.secrets()
    villain.answers["/alice/dev/demo"] = 200, {"type": "projectconfig", "result": {"1.0": {"+links": [
        {"rel": "releasefile", "href": other.root + "demo-1.0.tar.gz"},
        {"rel": "toxresult", "href": other.root + "result", "for_href": other.root + "demo-1.0.tar.gz"}]}}}
    nobody("list", "-t", "demo")
    assert other.asked
    villain.answers["/x"] = 302, {}, {"Location": other.root + "x"}
    nobody("getjson", villain.root + "x")
    villain.api.update(index=other.index, login=other.root + "+login", simpleindex=other.index + "/+simple/")
    nobody("use", villain.index)
    nobody("list")
    assert nobody.state()["index"] == other.index and "SECRET" not in other.secrets()
    other.answers["/alice/dev"] = 401, {"message": "who?"}
    refused = nobody("list", expect=1)
    assert "if that is where you want to be: devpi use " + other.root in refused
    del other.answers["/alice/dev"]
    nobody("use", other.index)
    assert "SECRET" in other.secrets()


# -- what a server says of itself


@pytest.mark.parametrize("link", ["login", "simpleindex"])
def test_pip_trusts_no_host_that_only_a_server_has_named(nobody, villain, link):
    pip = nobody.home / "pip.conf"
    villain.api[link] = "http://trusted.example.org/alice/dev"
    for more in ([], ["-t", "yes"], ["--always-set-cfg", "yes", "-t", "yes"]):
        nobody("use", "--set-cfg", *more, villain.index, PIP_CONFIG_FILE=pip)
        assert not re.search("(?m)^trusted-host.*example.org", pip.read_text())
    printed = nobody("env", "--json", "--index", villain.index)
    assert "PIP_TRUSTED_HOST" not in printed.json()
    if link == "simpleindex":
        assert "trusted.example.org, which you have not named" in printed.errors


def test_pip_trusts_the_host_that_was_named(nobody, villain):
    """Also by an earlier `use`."""
    pip = nobody.home / "pip.conf"
    gate = villain.root.replace("127.0.0.1", "localhost")       # as a person may write it
    villain.api = {name: gate + path for name, path in {
        "login": "+login", "index": "alice/dev", "simpleindex": "alice/dev/+simple/", "pypisubmit": "alice/dev/"}.items()}
    nobody("use", gate + "alice/dev")
    for words in (["use", "-t", "yes", "--set-cfg"], ["use", "-t", "yes", "--set-cfg", "alice/dev"]):
        nobody(*words, PIP_CONFIG_FILE=pip)
        assert re.findall("(?m)^trusted-host = (.*)", pip.read_text()) == ["localhost"]
        pip.unlink()


@pytest.mark.parametrize("url", ["ftp://x/\nlog = /tmp/x", "http://h/x\n[install]\ntarget = /tmp/x", "http://h/a b",
                                 "http://h/'x", "http://h/\u2019;calc", 'http://h/"', "http://h:99999/",
                                 "http://[h/", "http://h/`id`"])
def test_links_that_are_no_urls_are_refused(nobody, villain, url):
    villain.api["simpleindex"] = url
    for words in (["use", villain.index, "--set-cfg"], ["env", "--index", villain.index]):
        refused = nobody(*words, expect=1)
        assert "is no http or https URL" in refused + refused.errors
    assert not (nobody.home / ".config").exists()


def test_shells_get_no_commands(nobody, villain):
    villain.api["simpleindex"] = "http://h.example.org/x&calc%25"
    for shell, line in (("cmd", 'set "PIP_INDEX_URL=http://h.example.org/x&calc%%25"'),
                        ("powershell", "$env:PIP_INDEX_URL = 'http://h.example.org/x&calc%25'"),
                        ("sh", "export PIP_INDEX_URL='http://h.example.org/x&calc%25'")):
        assert line in nobody("env", "--shell", shell, DEVPI_INDEX=villain.index).lines


def test_errors_are_no_commands_either(nobody, villain):
    villain.answers["/+api"] = 404, {"message": "x\ntouch /tmp/x\n"}
    for words in (["env"], ["env", "--nope"], ["completion", "tcsh"]):
        refused = nobody(*words, expect=None, DEVPI_INDEX=villain.index)
        assert refused == "" and refused.errors
    refused = nobody("list", "--json", "--nope", expect=2)
    assert refused == "" and "usage: devpi" in refused.errors


@pytest.mark.parametrize("body", [b"[" * 200000, b'{"a":' * 100000, b'{"type": "apiconfig", "result": ' + b"9" * 5000 + b"}"])
def test_json_of_any_depth(nobody, villain, body):
    villain.answers["/+api"] = 200, body
    assert villain.root in nobody("use", villain.index, expect=1)


def test_odd_answers_are_the_servers(nobody, villain):
    nobody("use", villain.index)
    for value in (5, [], "x", None, {"projects": 5}):
        villain.answers["/alice/dev"] = 200, {"type": "indexconfig", "result": value}
        assert villain.index in nobody("list", expect=1)


@posix_only
def test_an_answer_without_end(nobody, villain):
    def endless(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-DEVPI-API-VERSION: 2\r\n\r\n[")
        try:
            while True:
                handler.wfile.write(b"0," * 500000)
        except OSError:
            handler.close_connection = True

    villain.answers["/+api"] = 200, endless
    refused, peak = nobody.with_peak_memory("use", villain.index, expect=1)
    assert "larger than 268 MB" in refused and peak < 700 << 20


def test_a_download_without_end(nobody, villain, tmp_path):
    """It ends at the bound, and so does a number without end in an answer."""
    def endless(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-DEVPI-API-VERSION: 2\r\n\r\n")
        try:
            while True:
                handler.wfile.write(bytes(50000))
        except OSError:
            handler.close_connection = True

    villain.answers["/endless"] = 200, endless
    program = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        import devpi_lite_client as client
        client.DOWNLOAD_LIMIT = 1 << 20
        http = client.Http(client.Console())
        try:
            http.request("GET", sys.argv[2], sink=open(sys.argv[3], "wb"))
        except client.Failure as failure:
            print(failure.message)
        for text in (b"9" * 5000, b'{"a": [-' + b"1" * 401 + b"]}"):
            try:
                client.parse_json(text)
            except ValueError as error:
                print(error)"""
    done = subprocess.run([sys.executable, "-B", "-c", program, str(SOURCE.parent), villain.root + "endless", str(tmp_path / "f")],
                          stdout=subprocess.PIPE, env=nobody.environment, check=True)
    assert done.stdout.decode().splitlines() == [
        "the server's answer is larger than 1.0 MB", "a number of 5000 digits", "a number of 402 digits"]
    assert (tmp_path / "f").stat().st_size <= 1 << 20


def test_nothing_that_is_packed_is_asked_for(nobody, villain):
    nobody("use", villain.index)
    assert {headers.get("Accept-Encoding") for _, _, headers, _ in villain.asked} == {"identity"}


# -- what anybody may post


@pytest.mark.parametrize("report", [
    {"testenvs": {"py": {"setup": 5, "test": []}}}, {"testenvs": {"py": 5}}, {"testenvs": {"py": {"setup": [5], "test": {}}}},
    {"testenvs": [1]},
    {"testenvs": {"py": {"setup": [{"retcode": 0}], "test": [{"retcode": "x", "command": 5, "output": []}]}}}])
def test_one_odd_test_result_ends_nothing(devpi, site, index, report):
    archive = sdist("tested", "1.0")
    site.upload(index, archive)
    url = file_url(site, index, archive)
    for each in ({"host": "h", "platform": "p", **report}, {"host": "fine", "platform": "p", "testenvs": {
            "py": {"setup": [{"retcode": 0}], "test": [{"retcode": 0}]}}}):
        assert site.post(url[len(site.url):], each, user="alice").status == 200
    shown = devpi("list", "-f", "tested")
    assert any(line.startswith("fine ") and line.endswith("tests passed") for line in shown.lines)


# -- the files of the client


def test_state_files_that_are_odd(devpi, site, index):
    path, known = devpi.directory / "current.json", devpi.state("auth.json")
    good = path.read_bytes()
    for data in (b'{"x": "\xff"}', b"[" * 100000):
        path.write_bytes(data)
        assert "current.json is broken" in devpi("list", expect=1)
    path.write_text('{"login": 5, "index": [], "features": 7}')
    assert "not connected to" in devpi("list", expect=1)
    path.write_bytes(good)
    url = site.url + "/"
    for odd in ({"auth": {url: [5, ["alice"], ["alice", 5]]}}, {"auth": 5},
                {**known, "devpi_lite_ends": {url: {"alice": ["x"]}}},
                {**known, "devpi_lite_ends": 5, "basic_auth": {url: [1, 2]}}):
        devpi.write_state("auth.json", odd)
        devpi("use")
        devpi("login", "alice", "--password", "pw-of-alice")
        assert devpi.state("auth.json")["auth"][url][0][0] == "alice"


def test_settings_of_pip_that_are_no_utf8(devpi):
    path = devpi.home / ".config" / "pip" / "pip.conf"
    path.parent.mkdir(parents=True)
    before = b"[global]\r\n# gr\xfc\xdfe\x0cb\r\ntimeout = 5\r\n"
    path.write_bytes(before)
    devpi("use", "--set-cfg")
    assert before.split(b"\r\n")[1] in path.read_bytes().split(b"\r\n")
    devpi("use", "--unset-cfg")
    assert path.read_bytes() == before


def test_settings_set_twice_are_taken_back_at_once(devpi, site, index):
    pip, uv = devpi.home / ".config" / "pip" / "pip.conf", devpi.home / ".config" / "uv" / "uv.toml"
    uv.parent.mkdir(parents=True)
    uv.write_text("  index-url = 'https://pypi.org/simple'  # mine\nnative-tls = true\n")
    before = uv.read_text()
    second = new_index(site, "alice")
    devpi("use", "--set-cfg")
    devpi("use", second, "--set-cfg")
    lines = uv.read_text().splitlines()
    assert lines == ['  index-url = "%s/%s/+simple/"  # mine' % (site.url, second), "native-tls = true"]
    devpi("use", "--unset-cfg")
    assert not pip.exists() and uv.read_text() == before.replace("'", '"')
    assert not list(pip.parent.iterdir()) and list(uv.parent.iterdir()) == [uv]


def test_uvs_default_index_is_left_alone(devpi):
    uv = devpi.write(".config/uv/uv.toml", '[[index]]\nurl = "https://pypi.org/simple"\ndefault = true\n')
    before = uv.read_text()
    shown = devpi("use", "--set-cfg")
    assert "~/.config/uv/uv.toml: https://pypi.org/simple" in shown.lines and "left alone" in shown
    assert uv.read_text() == before


def test_logins_at_the_same_time_are_all_kept(devpi, tmp_path):
    program = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        import devpi_lite_client as client
        print("ready", flush=True)
        sys.stdin.read()
        for number in range(25):
            client.AuthStore(client.StateFile(sys.argv[2])).add_token("http://h/", sys.argv[3] + str(number), "t")"""
    path = tmp_path / "auth.json"
    old = tmp_path / ".auth.json-killed"
    old.write_text("left")
    os.utime(old, (time.time() - 7200,) * 2)
    words = [sys.executable, "-B", "-c", program, str(SOURCE.parent), str(path)]
    running = [subprocess.Popen([*words, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for name in "ab"]
    for process in running:
        assert process.stdout.readline()
    for process in running:
        process.stdin.close()
    assert [process.wait(60) for process in running] == [0, 0]
    assert len(json.loads(path.read_text())["auth"]["http://h/"]) == 50
    assert not old.exists()


@posix_only
def test_a_netrc_that_is_a_pipe_or_wrong(devpi, tmp_path):
    os.mkfifo(str(tmp_path / "pipe"))
    devpi("use", NETRC=tmp_path / "pipe")
    wrong = devpi.write("wrong", "machine h login a password my SECRET\n")
    printed = devpi("use", NETRC=wrong)     # it may be for other programs
    assert "SECRET" not in printed and len(re.findall(r"wrong is not used: line \d+ is not understood", printed)) == 1


def test_a_pypirc_that_is_wrong_or_lacks_a_repository(devpi, site, index):
    for text, words in (("[r]\nusername = u\npassword SECRET\n", "in line 3 of ~/.pypirc"),
                        ("password = SECRET\n[r]\n", "in line 1 of ~/.pypirc"),
                        ("[r]\nusername = u\npassword = SECRET\n", "it has no repository"),
                        ("[a]\nusername = u\n[b]\nusername = u\n", "it has: a, b")):
        devpi.write(".pypirc", text)
        refused = devpi("push", "x==1.0", "pypi:r", expect=1)
        assert words in refused and "SECRET" not in refused


@posix_only
def test_names_that_are_no_utf8(nobody, villain):
    nobody("use", villain.index)
    refused = nobody("login", "u\udcff", "--password", "x", expect=1)
    assert "can't be written in UTF-8" in refused and not nobody.state("auth.json")
    assert "this should not happen" not in nobody("passwd", expect=1, DEVPI_USER="u\udcff", DEVPI_PASSWORD="x")


# -- signals


@posix_only
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_signal_ends_an_upload_to_a_silent_server(nobody, villain, tmp_path, number, jobs):
    stop = threading.Event()
    villain.answers["/alice/dev/"] = 200, lambda handler: stop.wait()
    nobody("use", villain.index)
    names = [nobody.save(sdist(name, "1.0")) for name in ("aa", "bb", "cc")]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    process = nobody.start("upload", "--jobs", jobs, *names, TMPDIR=temporary)
    try:
        eventually(lambda: sum(method == "POST" for method, *_ in villain.asked) == jobs, seconds=60)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert not list(temporary.iterdir())
    finally:
        stop.set()
        end(process)


# -- words that are easily mistaken


def test_a_token_is_a_package_too(devpi, villain):
    devpi("use", villain.index)
    villain.answers["/refresh"] = 200, {}
    assert devpi("refresh", "token", "list").lines == ["Refreshed token", "Refreshed list"]
    assert devpi("token", "-q", "inspect", "--token", "x", expect=1).lines[0].startswith("that is no API token")


def test_no_version_is_taken_for_another_one(devpi, site, index):
    for version in ("1.0", "1.0rc1"):
        site.upload(index, sdist("named", version))
    for spec in ("==1.0rc1.*", ">=0.9.*", "<2.*", "~=1.0.*", ">=1.0+a", "==1.0+a.*"):
        assert "invalid requirement 'named%s'" % spec in devpi("remove", "-y", "named" + spec, expect=1)
    assert site.get("/%s/named" % index).result.keys() == {"1.0", "1.0rc1"}
    assert len(devpi("list", "--all", "named==1.0.*").lines) == 2


def test_a_version_in_two_spellings_is_deleted_once(nobody, villain):
    """The server takes both releases for one; what else can't be found is told."""
    files = {version: {"+links": [{"rel": "releasefile", "href": villain.index + "/+f/two-%s.zip" % version}]}
             for version in ("3.0.0-rc.1", "3.0.0rc1", "4.0")}
    nobody("use", villain.index)
    nobody.write_state("auth.json", {"auth": {villain.root: [["alice", "token"]]}})
    nobody.write_state("current.json", {**nobody.state(), "username": "alice"})
    villain.answers.update({
        "/alice/dev/two?ignore_bases=": (200, {"type": "projectconfig", "result": files}),
        "/two/3.0.0-rc.1": (200, {"message": "project 'two' version '3.0.0-rc.1' deleted"}),
        "/two/3.0.0rc1": (404, {"message": "project 'two' has no release '3.0.0rc1'"}),
        "/two/4.0": (200, {"message": "project 'two' version '4.0' deleted; the name is free: see reserved_names"})})
    printed = nobody("remove", "-y", "--json", "two>=3.0.0rc1")
    assert printed.json()["notes"] == ["the name is free: see reserved_names"]
    assert "the name is free: see reserved_names" in printed.errors.splitlines()
    assert [path.rpartition("/")[2] for method, path, *_ in villain.asked if method == "DELETE"] == [
        "3.0.0-rc.1", "3.0.0rc1", "4.0"]
    villain.answers["/two/3.0.0-rc.1"] = 404, {"message": "gone"}
    assert "404 Not Found: gone" in nobody("remove", "-y", "two<4", expect=1)


@pytest.mark.parametrize("words, told", [
    (["list", "--nope"], "unrecognized arguments: --nope"),
    (["getjson", "x", "y"], "unrecognized arguments: y"),
    (["uplaod"], "there is no command 'uplaod'; is 'upload' meant?"),
    (["--timeout", "abc", "list"], "'abc' is no number of seconds above 0"),
    (["upload", "--jobs", "0"], "'0' is no number from 1 to 9999"),
])
def test_a_wrong_command_line_is_told_by_its_command(nobody, words, told):
    refused = nobody(*words, expect=2)
    command = words[0] if words[0] in ("list", "getjson", "upload") else ""
    assert told in refused.errors and refused.startswith("usage: devpi %s" % command) and "token-create" not in refused


def test_help_of_a_command_in_two_words(nobody):
    assert nobody("token", "create", "--help").startswith("usage: devpi token create ")


def test_addresses_as_people_write_them(devpi, site, index):
    for words in ("127.0.0.1:3141", "localhost:3141/alice"):
        assert "a URL starts with http://" in devpi("use", words, expect=1)
        told = devpi("use", words, expect=1, DEVPI_CLIENTDIR=devpi.home / "new")
        assert "a URL starts with http:// or https://, as in http://" + words in told
    assert "current devpi index: %s/%s " % (site.url, index) in devpi("use", "%s/%s/+simple/" % (site.url, index))
    told = devpi("use", site.url.replace("http:", "https:"), expect=1)
    assert "does not speak TLS there" in told and "verification" not in told


def test_a_release_that_may_not_be_removed_or_is_there(devpi, site):
    index = new_index(site, "alice", volatile=False)
    devpi.sign_in(site, "alice", index)
    path = devpi.save(sdist("kept", "1.0"))
    assert devpi("upload", "--json", path).json()["files"][0]["status"] == "uploaded"
    again = devpi("upload", "--json", path).json()["files"][0]
    assert (again["status"], again["message"]) == ("skipped", "exists")
    assert "-f does it, for the owner of the index and root" in devpi("remove", "-y", "kept", expect=1)
    target = new_index(site, "alice")
    devpi("push", "kept==1.0", target.partition("/")[2])
    assert site.get("/" + target).result["projects"] == ["kept"]


def test_yanked_files_are_marked(devpi, site, index):
    site.upload(index, sdist("marked", "1.0"))
    devpi("yank", "--reason", "loses data", "marked==1.0")
    assert devpi("list", "marked").endswith("/marked-1.0.tar.gz (yanked: loses data)\n")


# -- what is in the way of a build or a test


BACKEND = """import io, os, subprocess, tarfile
def build_sdist(folder, config_settings=None):
    assert os.path.exists(b"gr\\xfcn.txt")
    subprocess.check_call(["git", "rev-parse", "--git-dir"])
    with tarfile.open(os.path.join(folder, "within-1.0.tar.gz"), "w:gz") as archive:
        data = b"Metadata-Version: 2.1\\nName: within\\nVersion: 1.0\\n"
        info = tarfile.TarInfo("within-1.0/PKG-INFO")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return "within-1.0.tar.gz"
"""


@pytest.mark.skipif(not shutil.which("git") or sys.platform != "linux", reason="needs git, and file names of any bytes")
def test_a_checkout_whose_repository_is_elsewhere_and_a_name_that_is_no_utf8(devpi, site, index):
    project = devpi.write("top/within/pyproject.toml", '[build-system]\nrequires = []\nbuild-backend = "backend"\n'
                          'backend-path = ["."]\n').parent
    (project / "backend.py").write_text(BACKEND)
    with open(os.fsencode(str(project)) + b"/gr\xfcn.txt", "wb"):
        pass
    for words in (["init", "-q", "--separate-git-dir", "../repository"], ["add", "-A"]):
        subprocess.run(["git", *words], cwd=str(project), env=devpi.environment, check=True, stderr=subprocess.DEVNULL)
    (project / ".git").write_text("gitdir: ../repository\n")        # as of a submodule
    devpi("upload", "--no-isolation", "--sdist", cwd=project)
    assert site.filenames(index, "within") == ["within-1.0.tar.gz"]


TOX = """import json, sys
with open(sys.argv[sys.argv.index("--result-json") + 1], "w") as file:
    json.dump({"host": "h", "platform": "p", "testenvs": {}}, file)
"""


def test_all_files_are_tested_though_no_result_may_be_posted(devpi, site):
    index = new_index(site, "alice", acl_toxresult_upload=["root"])
    devpi.sign_in(site, "alice", index)
    for archive in (sdist("both", "1.0", extra_members={"tox.ini": b"[tox]\n"}), wheel("both", "1.0")):
        site.upload(index, archive)
    results = devpi("test", "--json", "both", expect=1, PATH=devpi.add_command("tox", TOX)).json()["results"]
    assert [(one["exit_code"], one["posted"], one["url"].rpartition(".")[2]) for one in results] == [
        (0, None, "gz"), (0, None, "whl")]
    assert all("No permission to upload tox results" in one["message"] for one in results)


@posix_only
def test_a_report_is_posted_to_no_other_server(nobody, villain, other):
    archive = sdist("demo", "1.0", extra_members={"tox.ini": b"[tox]\n"})
    nobody("use", villain.index)
    villain.answers["/alice/dev/demo"] = 200, {"type": "projectconfig", "result": {"1.0": {"+links": [
        {"rel": "releasefile", "href": other.root + archive.filename}]}}}
    other.answers[archive.filename] = 200, archive.content
    refused = nobody("test", "demo", expect=1, PATH=nobody.add_command("tox", TOX))
    assert "is on another server, %s: nothing is posted to it" % other.root in refused
    assert {method for method, *_ in other.asked} == {"GET"}


@pytest.mark.parametrize("name, text, told", [
    ("pyproject.toml", "tool = 5", "no tox.ini/pyproject.toml/setup.cfg file found"),
    ("pyproject.toml", "x = " + "[" * 100000, "no"), ("pyproject.toml", "# " + "x" * (5 << 20), "larger than"),
    ("setup.cfg", "#" * (5 << 20) + "\n[tox:tox]\n", "no tox.ini/pyproject.toml/setup.cfg file found")])
def test_odd_settings_of_a_project_are_told(devpi, site, index, name, text, told):
    site.upload(index, sdist("odd", "1.0", extra_members={"pyproject.toml": b"", name: text.encode()}))
    path = devpi.add_command("tox", TOX)
    refused = devpi("test", "--no-upload", "odd", expect=1, PATH=path)
    assert told in refused and len(refused.lines) < 6


def test_passwords_in_addresses_are_not_shown(devpi):
    for words in (["use", "http://u:SEC/RET@127.0.0.1:9/"], ["list", "--index", "u:SECRET@127.0.0.1/a/b"],
                  ["remove", "-y", "http://u:SECRET@127.0.0.1:9/x"]):
        refused = devpi(*words, expect=None)
        assert "RET" not in refused + refused.errors
