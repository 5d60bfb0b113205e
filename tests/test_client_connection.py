"""The client's connection: use, login, env, its state files, variables, credentials, proxies, TLS, colours, completion."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from client import CERTIFICATE, Client, FEATURES, Gate, POSIX, SOURCE, file_url, imported
from harness import new_index, user_pass, wheel

posix_only = pytest.mark.skipif(not POSIX, reason="needs a pseudo terminal, or a POSIX shell")


@pytest.fixture(scope="module")
def site(shared_server):
    """alice with `alice/dev` and `alice/staging`, bob, and the mirror `root/pypi` of nothing."""
    for name in ("alice", "bob"):
        shared_server.add_user(name, "pw-of-" + name)
    shared_server.add_index("alice/dev")
    shared_server.add_index("alice/staging", bases=["alice/dev"], volatile=False)
    shared_server.add_mirror("root/pypi", "http://127.0.0.1:9/simple/")
    return shared_server


@pytest.fixture
def devpi(tmp_path):
    return Client(tmp_path / "home")


@pytest.fixture
def alice(devpi, site):
    """The client with alice logged in, on alice/dev."""
    return devpi.sign_in(site, "alice", "alice/dev")


# -- use


def test_use_connects_to_a_server_and_to_an_index(devpi, site):
    printed = devpi("use", site.url)
    assert "using server: %s/ (not logged in)" % site.url in printed.lines
    assert "no current index: type 'devpi use -l' to discover indices" in printed.lines
    state = devpi.state()
    assert (state["login"], state["features"]) == (site.url + "/+login", FEATURES)
    assert [state.get(name) for name in ("index", "simpleindex", "pypisubmit")] == [None] * 3
    assert devpi("use", "alice/dev").lines[:2] == [
        "current devpi index: %s/alice/dev (not logged in)" % site.url, "supported features: " + ", ".join(FEATURES)]
    state = devpi.state()
    assert [state[name] for name in ("index", "simpleindex", "pypisubmit")] == [
        site.url + path for path in ("/alice/dev", "/alice/dev/+simple/", "/alice/dev/")]
    before = (devpi.directory / "current.json").read_bytes()
    assert "current devpi index: %s/alice/dev (not logged in)" % site.url in devpi("use").lines
    assert (devpi.directory / "current.json").read_bytes() == before
    assert before == json.dumps(json.loads(before), indent=2, sort_keys=True).encode()
    if POSIX:
        assert devpi.mode() == 0o600
    assert "always-set-cfg: no" in devpi("use").lines


def test_an_index_is_named_in_several_ways(alice, site):
    for spec in ("staging", "/alice/staging", site.url + "/alice/staging", site.url + "/alice/staging/"):
        alice("use", "alice/dev")
        assert "current devpi index: %s/alice/staging (logged in as alice)" % site.url in alice("use", spec).lines, spec
    assert alice.state()["index"] == site.url + "/alice/staging"
    alice("use", "root/pypi")
    assert not alice.state().get("pypisubmit") and alice.state()["simpleindex"].endswith("root/pypi/+simple/")
    assert "using server: %s/ (logged in as alice)" % site.url in alice("use", site.url + "/alice").lines
    assert alice.state().get("index") is None
    assert "index 'a/b/c' not of form USER/NAME or NAME" in alice("use", "a/b/c", expect=1)


def test_without_a_server_it_says_how_to_get_one(devpi):
    assert devpi("use").lines[0] == "no server: type 'devpi use URL' with a URL pointing to a server or directly to an index."
    assert "not connected to any server" in devpi("use", "-l", expect=1)
    assert "not connected to a server, see 'devpi use'" in devpi("login", "alice", "--password", "x", expect=1)
    assert "not connected to an index, see 'devpi use'" in devpi("list", expect=1)
    assert "no configuration found" in devpi("use", "--delete", expect=1)
    assert "No server set and DEVPI_INDEX from environment is not a full valid URL: alice/dev" in \
        devpi("list", expect=1, DEVPI_INDEX="alice/dev")


def test_a_short_index_name_needs_a_login(devpi, site):
    devpi.sign_in(site)
    assert "you need to be logged in to use the short index name 'dev'" in devpi("use", "dev", expect=1)
    assert "you need to be logged in" in devpi("index", "-c", "dev", expect=1)


def test_use_lists_indexes(devpi, site):
    devpi.sign_in(site)
    shown = [line for line in devpi("use", "-l").lines if not re.match(r"(alice|bob)/x\d", line)]     # of other tests
    assert shown == [
        "%-15s bases=%-15s volatile=%s" % row for row in [
            ("alice/dev", "", True), ("alice/staging", "alice/dev", False), ("root/pypi", "", True)]]
    assert [line.split()[0] for line in devpi("use", "-l", "-u", "root").lines] == ["root/pypi"]


def test_showing_urls_or_lists_of_another_server_changes_nothing(alice, site):
    before = alice.state()
    printed = alice("use", "--urls").lines
    for name, url in [("login", "/+login"), ("pypisubmit", "/alice/dev/"), ("simpleindex", "/alice/dev/+simple/")]:
        assert "%19s: %s%s" % (name, site.url, url) in printed
    assert "%19s: None" % "pypisubmit" in alice("use", "--urls", "root/pypi").lines
    alice("use", "--list", site.url)
    assert alice.state() == before


def test_an_index_that_is_not_there_is_named(alice, site):
    printed = alice("use", "alice/nope", expect=1)
    assert "404 Not Found: The stage alice/nope could not be found." in printed
    assert alice.state()["index"] == site.url + "/alice/dev"


def test_a_listing_survives_the_deletion_of_the_current_index(devpi, site):
    gone = new_index(site, "bob")
    devpi.sign_in(site, "bob", gone)
    assert site.delete("/" + gone, user="bob").status in (200, 201)
    assert "alice/dev" in devpi("use", "-l")
    assert devpi("list", expect=1)


def test_use_switches_between_users_who_are_logged_in(alice, site):
    alice("login", "bob", "--password", "pw-of-bob")
    assert [user for user, _ in alice.state("auth.json")["auth"][site.url + "/"]] == ["bob", "alice"]
    assert "(logged in as alice)" in alice("use", "-u", "alice")
    assert alice("user").lines[0] == site.url + "/alice:"
    assert alice("user", DEVPI_USER="bob").lines[0] == site.url + "/bob:"
    assert "(not logged in)" in alice("use", "-u", "nobody-here")


def test_use_delete_forgets_the_server_but_not_the_sessions(alice, site):
    assert alice("use", "--delete").lines == ["REMOVED configuration at %s" % (alice.directory / "current.json")]
    assert alice("use").startswith("no server: ")
    assert "(logged in as alice)" in alice("use", site.url)


def test_a_restricted_index_opens_with_a_login(devpi, site):
    index = new_index(site, "bob", acl_pkg_read=["bob"])
    site.upload(index, wheel("hidden", "1.0"))
    printed = devpi("use", site.url + "/" + index)
    assert "You might have to login first to access this index." in printed.lines
    assert "403 Forbidden" in printed
    devpi("login", "alice", "--password", "pw-of-alice")
    assert "You don't have permission to access this index." in devpi("use").lines
    devpi("login", "bob", "--password", "pw-of-bob")
    assert devpi("list") == "hidden\n"


def test_a_virtual_environment_may_have_an_index_of_its_own(alice, site):
    environment = alice.home / "venv"
    (environment / ("bin" if POSIX else "Scripts")).mkdir(parents=True)
    assert "Using --local is only valid in an active virtualenv." in alice("use", "--local", expect=1)
    printed = alice("use", "--local", "alice/staging", VIRTUAL_ENV=environment)
    assert "Creating local configuration at %s" % (environment / "devpi.json") in printed.lines
    assert json.loads((environment / "devpi.json").read_text())["index"] == site.url + "/alice/staging"
    assert "alice/staging (logged in as alice)" in alice("use", VIRTUAL_ENV=environment)
    assert "alice/dev (logged in as alice)" in alice("use")


def test_debug_and_the_client_directory_are_taken_before_and_after_the_command(devpi, site, tmp_path):
    printed = devpi("--debug", "--clientdir", tmp_path / "before", "use", site.url)
    assert "[debug]" in printed + printed.errors and (tmp_path / "before" / "current.json").exists()
    printed = devpi("use", "--debug", "--clientdir", tmp_path / "after", site.url)
    assert "[debug]" in printed + printed.errors and (tmp_path / "after" / "current.json").exists()
    devpi("use", site.url, DEVPI_CLIENTDIR="~/by-variable")
    assert (devpi.home / "by-variable" / "current.json").exists() and not devpi.directory.exists()


# -- pip and uv


def test_use_configures_pip_and_uv_and_takes_it_back(alice, site):
    pip, uv = (alice.home / ".config" / name for name in ("pip/pip.conf", "uv/uv.toml"))
    url = site.url + "/alice/dev/+simple/"
    if sys.platform != "linux":
        pip, uv = alice.home / "pip.conf", alice.home / "uv.toml"
    places = {} if sys.platform == "linux" else {"PIP_CONFIG_FILE": pip, "UV_CONFIG_FILE": uv}
    alice.write(pip, "[global]\ntimeout = 7\nindex-url = https://old.example.org/simple/\n")
    assert "%s: https://old.example.org/simple/" % alice.shown(pip) in alice("use", **places).lines
    for _ in range(2):
        printed = alice("use", "--set-cfg", "-t", "yes", **places)
        assert {"%s: %s" % (alice.shown(path), url) for path in (pip, uv)} <= set(printed.lines)
    text = pip.read_text()
    assert text.count(url) == 1 and "index-url = " + url in text and "timeout = 7" in text and "old.example" not in text
    assert text.count("trusted-host = 127.0.0.1") == 1
    assert 'index-url = "%s"' % url in uv.read_text().splitlines()
    assert pip.with_name(pip.name + "-bak").read_text().count("old.example.org") == 1
    assert not (alice.home / ".pydistutils.cfg").exists()
    alice("use", "--unset-cfg", **places)
    assert url not in pip.read_text() and "timeout = 7" in pip.read_text()
    assert not uv.exists() or url not in uv.read_text()


def test_always_set_cfg_follows_every_use(alice, site):
    places = {"PIP_CONFIG_FILE": alice.home / "p.conf", "UV_CONFIG_FILE": alice.home / "u.toml"}
    assert "always-set-cfg: yes" in alice("use", "--always-set-cfg", "yes", "-t", "no", **places).lines
    assert (alice.state()["always_setcfg"], "/alice/dev/" in (alice.home / "u.toml").read_text()) == (True, True)
    alice("use", "alice/staging", **places)
    assert all("/alice/staging/+simple/" in (alice.home / name).read_text() for name in ("p.conf", "u.toml"))
    assert "always-set-cfg: no" in alice("use", "--always-set-cfg=no", **places).lines
    alice("use", site.url, **places)
    assert "no index configured: cannot set pip/easy_install index" in alice("use", "--set-cfg", **places)


def test_a_virtual_environment_is_configured_alone(alice, site):
    environment = alice.home / "venv"
    assert "No virtualenv found at: '" in alice("use", "--venv", environment, expect=1)
    (environment / ("bin" if POSIX else "Scripts")).mkdir(parents=True)
    printed = alice("use", "--venv", environment, "--set-cfg")
    assert "venv for install/set commands: %s" % environment in printed.lines
    assert "only setting venv pip/uv config, no global configuration changed" in printed.lines
    for name in ("pip.conf" if POSIX else "pip.ini", "uv.toml"):
        assert site.url + "/alice/dev/+simple/" in (environment / name).read_text()
    assert not (alice.home / ".config").exists() and alice.state()["venvdir"] == str(environment)
    assert "venv for install" not in alice("use", "--venv", "-") and not alice.state().get("venvdir")


@posix_only
def test_env_prints_what_a_shell_evaluates(alice, site):
    printed = alice("env")
    assert printed.errors == ""
    script = printed + '\nprintf "%s\\n" "$PIP_INDEX_URL" "$UV_DEFAULT_INDEX"'
    shown = subprocess.run(["sh", "-e", "-c", script], stdout=subprocess.PIPE, check=True).stdout.decode().split()
    assert shown == [site.url + "/alice/dev/+simple/"] * 2 and site.tokens["alice"] not in printed
    assert "http://alice:%s@" % site.tokens["alice"] in alice("env", "--with-credentials")
    assert [line.split()[0] for line in alice("env", "--unset").lines] == ["unset"] * len(printed.lines)
    assert "set -gx PIP_INDEX_URL " in alice("env", "--shell", "fish")
    assert alice("env", "--json", "--index", "staging").json()["PIP_INDEX_URL"] == site.url + "/alice/staging/+simple/"


# -- login and logoff


def test_login_and_logoff(devpi, site):
    devpi.sign_in(site)
    assert devpi("login", "alice", "--password", "wrong", expect=1).lines[:2] == [
        "POST %s/+login" % site.url, "401 Unauthorized: user 'alice' could not be authenticated"]
    assert devpi.state("auth.json") == {"auth": {}}
    assert devpi("login", "alice", "--password", "pw-of-alice") == \
        "logged in 'alice', credentials valid for 10.00 hours\n"
    ((user, token),) = devpi.state("auth.json")["auth"][site.url + "/"]
    assert user == "alice" and devpi.state()["username"] == "alice"
    assert site.get("/+api", headers={"X-Devpi-Auth": user_pass("alice", token)}).result["authstatus"][:2] == ["ok", "alice"]
    assert "pw-of-alice" not in (devpi.directory / "auth.json").read_text() + (devpi.directory / "current.json").read_text()
    if POSIX:
        assert devpi.mode("auth.json") == 0o600
    devpi("use", "alice/dev")
    assert devpi("login", "alice", "--password", "pw-of-alice") == \
        "logged in 'alice' at '%s/alice/dev', credentials valid for 10.00 hours\n" % site.url
    assert devpi("logoff") == "login information deleted\n"
    assert devpi("logout") == "not logged in\n"
    assert "alice/dev (not logged in)" in devpi("use")


def test_login_takes_the_password_from_where_a_job_keeps_it(devpi, site):
    devpi.sign_in(site)
    done = "logged in 'alice', credentials valid for 10.00 hours\n"
    assert devpi("login", "alice", "--password-file", devpi.write("pw", "pw-of-alice\n")) == done
    assert devpi("login", "alice", "--password-file", "-", input="pw-of-alice\n") == done
    assert devpi("login", "alice", DEVPI_PASSWORD="pw-of-alice") == done
    path = devpi.add_command("keyring", "import sys\nassert sys.argv[1:3] == ['get', %r]\nprint('pw-of-' + sys.argv[3])\n" % (
        site.url + "/"))
    if POSIX:
        assert devpi("login", "alice", PATH=path) == done
    modules = devpi.write("modules/keyring.py", "def get_password(url, user):\n    return url == %r and 'pw-of-' + user\n" % (
        site.url + "/")).parent
    printed = devpi.start("login", "alice", PYTHONPATH=modules).communicate()[0]
    assert printed.decode().splitlines() == done.splitlines()
    devpi.write(".netrc", "machine 127.0.0.1 login alice password pw-of-alice\n").chmod(0o600)
    assert devpi("login", "alice") == done
    (devpi.home / ".netrc").unlink()
    printed = devpi("login", "alice", expect=1)
    assert "no password available for user 'alice' (use --password, DEVPI_PASSWORD or keyring)" in printed


def test_login_check_is_for_scripts(alice):
    assert alice("login", "--check") == "logged in as alice\n"
    alice("login", "--check", expect=1, DEVPI_USER="bob")
    alice("logoff")
    assert alice("login", "--check", expect=1) == "not logged in\n"


def test_tokens_are_offered_by_some_servers_only(alice):
    assert "this server offers no API tokens" in alice("token", "create", expect=1)
    assert "this server offers no API tokens" in alice("token-list", expect=1)


@posix_only
def test_login_asks_on_a_terminal_without_an_echo(devpi, site):
    devpi.sign_in(site)
    with devpi.terminal("login", "alice") as terminal:
        terminal.expect("password for user alice at %s/: " % site.url)
        terminal.type("pw-of-alice\r")
        assert terminal.wait() == 0
    assert "logged in 'alice'" in terminal.shown and "pw-of-alice" not in terminal.shown


def test_a_session_that_the_server_does_not_know_is_forgotten(devpi, site):
    devpi.sign_in(site, "alice", "alice/dev")
    devpi.write_state("auth.json", {"auth": {site.url + "/": [["alice", "garbage"], ["bob", "kept"]]}})
    printed = devpi("upload", devpi.save(wheel("garbled", "1.0")), expect=1)
    assert any(line.startswith("401 FAIL file_upload of garbled-1.0-py3-none-any.whl to ") for line in printed.lines)
    assert "devpi login" in printed
    assert "current devpi index: %s/alice/dev (not logged in)" % site.url in devpi("use").lines
    assert [user for user, _ in devpi.state("auth.json")["auth"][site.url + "/"]] == ["bob"]


# -- the state files


def test_state_of_another_client_is_kept(devpi, site):
    """Keys that we don't know stay, an old one goes, and sessions on other servers are not touched."""
    devpi.sign_in(site, "alice", "alice/dev")
    state = dict(devpi.state(), somebodys={"own": [1]}, auth="of old", always_setcfg=False, venvdir=None)
    devpi.write_state("current.json", state)
    other = {"http://devpi.example.org:3141/": [["carol", "c"]]}
    auth = {"auth": dict(devpi.state("auth.json")["auth"], **other), "basic_auth": {"http://h:80/": ["u", "p"]}, "more": 1}
    devpi.write_state("auth.json", auth)
    devpi("use", "alice/staging")
    devpi("login", "bob", "--password", "pw-of-bob")
    after = devpi.state()
    assert after["somebodys"] == {"own": [1]} and "auth" not in after and after["index"].endswith("/alice/staging")
    after = devpi.state("auth.json")
    assert after["auth"]["http://devpi.example.org:3141/"] == [["carol", "c"]]
    assert (after["basic_auth"], after["more"]) == ({"http://h:80/": ["u", "p"]}, 1)
    text = (devpi.directory / "auth.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)


@pytest.mark.parametrize("text", ["", "[]", "null"])
def test_a_state_file_without_an_object_counts_as_empty(devpi, site, text):
    devpi.write(".devpi/client/current.json", text)
    devpi.write(".devpi/client/auth.json", text)
    assert devpi("use").startswith("no server: ") and "(not logged in)" in devpi("use", site.url)


def test_the_root_is_where_the_login_is_even_below_a_path(devpi, site):
    """The server root is not stored; sessions are looked up by the longest stored URL above it."""
    devpi.sign_in(site, "alice", "alice/dev")
    devpi.write_state("auth.json", {"auth": {
        site.url + "/elsewhere/": [["alice", "wrong"]], site.url + "/": [["alice", site.tokens["alice"]]]}})
    assert "(logged in as alice)" in devpi("use")


# -- variables and precedence


def test_the_index_comes_from_the_option_then_the_variable_then_the_state(alice, site):
    current, named, other = (new_index(site, "alice") for _ in range(3))
    for index, name in [(current, "in-current"), (named, "in-named")]:
        site.upload(index, wheel(name, "1.0"))
    alice("use", current)
    assert alice("list").lines == ["in-current"]
    printed = alice("list", DEVPI_INDEX=named)
    assert printed.lines == ["Using DEVPI_INDEX from environment: " + named, "in-named"]
    assert alice("list", DEVPI_INDEX=site.url + "/" + named).lines[-1] == "in-named"
    assert alice("list", DEVPI_INDEX=named.partition("/")[2]).lines[-1] == "in-named"
    assert alice("list", "--index", other, DEVPI_INDEX=named).lines == []
    printed = alice("use", other, DEVPI_INDEX=named)
    assert "Using index URL from command line instead of DEVPI_INDEX (%s) from environment." % named in printed.lines
    for secret in ("SECRET", "alice:SECRET", "alice:SECRET@part"):      # the first may be a token
        printed = alice("list", DEVPI_INDEX="%s/%s" % (site.url.replace("://", "://%s@" % secret), named))
        assert "SECRET" not in printed and "in-named" in printed
    alice("use", current)
    assert "404 Not Found: The stage alice/nope could not be found." in alice("list", "--index", "alice/nope", expect=1)
    assert alice("list").lines == ["in-current"]


def test_variables_are_enough_for_a_job_with_an_empty_home(devpi, site):
    index = new_index(site, "alice", acl_pkg_read=["alice"])
    job = {"DEVPI_USER": "alice", "DEVPI_PASSWORD": "pw-of-alice", "DEVPI_INDEX": site.url + "/" + index, "CI": "1"}
    archive = wheel("by-variables", "1.0")
    printed = devpi("upload", devpi.save(archive), **job)
    assert "file_upload of %s to %s/%s/" % (archive.filename, site.url, index) in printed.lines
    assert devpi("list", **job).lines[-1] == "by-variables"
    assert "pw-of-alice" not in printed + printed.errors
    kept = "".join(path.read_text() for path in devpi.home.rglob("*.json"))
    assert "pw-of-alice" not in kept
    job["DEVPI_PASSWORD"] = "wrong"
    refused = devpi("upload", devpi.save(archive), expect=1, **job)
    assert "401 Unauthorized: user 'alice' could not be authenticated" in refused.lines


def test_netrc_stands_in_for_a_login(devpi, site):
    devpi.sign_in(site, None, "alice/dev")
    devpi.write(".netrc", "machine 127.0.0.1\nlogin alice\npassword pw-of-alice\n").chmod(0o600)
    archive = wheel("by-netrc", "1.0")
    devpi("upload", devpi.save(archive))
    assert site.versions("alice/dev", "by-netrc") == ["1.0"]
    assert "(logged in as alice via netrc)" in devpi("use")
    elsewhere = devpi.write("elsewhere", "machine 127.0.0.1 login alice password wrong\n")
    elsewhere.chmod(0o600)
    refused = devpi("upload", devpi.save(archive), expect=1, NETRC=elsewhere)
    assert "401 FAIL file_upload of %s to %s/alice/dev/" % (archive.filename, site.url) in refused.lines


# -- what is sent, and to whom


def test_each_request_carries_the_session_and_says_who_asks(devpi, site, gate):
    devpi.sign_in(site, "alice", "alice/dev", url=gate.url)
    devpi("list")
    devpi("getjson", "/alice/dev")
    assert gate.passed and gate.url != site.url
    for request in gate.passed:
        assert request.headers["X-Devpi-Auth"] == user_pass("alice", site.tokens["alice"])
        assert "devpi-client" in request.headers["User-Agent"] and request.headers["Accept"] == "application/json"
        assert "Authorization" not in request.headers


def test_credentials_of_a_front_proxy_come_with_the_url(devpi, site, gate):
    printed = devpi("use", gate.url.replace("://", "://front:of-front@") + "/alice/dev")
    assert "of-front" not in printed + printed.errors
    assert devpi.state("auth.json")["basic_auth"] == {gate.url + "/": ["front", "of-front"]}
    assert devpi.state()["index"] == gate.url + "/alice/dev"
    gate.clear()
    devpi("list")
    assert [request.headers["Authorization"] for request in gate.passed] == \
        ["Basic " + user_pass("front", "of-front")] * len(gate.passed) != []
    assert "When using basic auth, you have to provide username and password." in \
        devpi("use", gate.url.replace("://", "://front@"), expect=1)


def test_a_redirect_is_followed_but_gives_no_credentials_away(devpi, site, gate):
    """To another origin, that is: another port is one."""
    devpi.sign_in(site, "alice", "alice/dev", url=gate.url)
    other = Gate(site)
    try:
        gate.fault("GET /alice/dev", "answer", times=1, status=302, headers={"Location": gate.url + "/alice/staging"})
        assert json.loads(devpi("getjson", "/alice/dev"))["result"]["bases"] == ["alice/dev"]
        assert "X-Devpi-Auth" in gate.passed[-1].headers
        gate.fault("GET /alice/dev", "answer", status=302, headers={"Location": other.url + "/alice/dev"})
        devpi("getjson", "/alice/dev")
        assert other.passed and not {"X-Devpi-Auth", "Authorization"} & set(other.passed[-1].headers)
        gate.clear()
        gate.fault("GET ", "answer", status=302, headers={"Location": "/round"})
        assert "more than 10 redirects" in devpi("getjson", "/alice/dev", expect=1)
    finally:
        other.close()


def test_proxies_are_used_and_passed_over_as_the_variables_say(devpi, site, gate):
    """127.0.0.2: a server on loopback answers to no name."""
    devpi.sign_in(site, "alice", "alice/dev", url="http://127.0.0.2")
    proxy = gate.url.replace("://", "://me:pw-of-proxy@")
    printed = devpi("getjson", "http://127.0.0.2/alice/dev", HTTP_PROXY=proxy, http_proxy=proxy)
    assert printed.json()["type"] == "indexconfig"
    assert gate.passed[-1].path == "http://127.0.0.2/alice/dev"
    assert gate.passed[-1].headers["Proxy-Authorization"] == "Basic " + user_pass("me", "pw-of-proxy")
    devpi.sign_in(site, "alice", "alice/dev")
    devpi("getjson", "/alice/dev", http_proxy="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9", NO_PROXY="127.0.0.1",
          no_proxy="127.0.0.1")


@pytest.mark.parametrize("exempt, is_direct", [
    ("", False), ("127.0.0.1:{port}", True), ("127.0.0.1:1", False), ("127.0.0.0/8", True), ("10.0.0.0/8,127.0.0.1/32", True),
    ("128.0.0.0/8", False), ("::1/128 , example.org\t127.0.0.1", True), ("*", True), ("127.0.0.0/99,nonsense/8", False)])
def test_what_is_exempt_from_a_proxy(devpi, site, gate, exempt, is_direct):
    devpi.sign_in(site, "alice", "alice/dev")
    devpi("getjson", "/alice/dev", ALL_PROXY=gate.url, no_proxy=exempt.format(port=site.port))
    assert bool(gate.passed) != is_direct


@pytest.mark.parametrize("url, exempt, is_direct", [
    ("http://host.example.org/", "example.org", True), ("http://host.example.org/", ".example.org", True),
    ("http://host.example.org/", "*.example.org", True), ("http://badexample.org/", "example.org", False),
    ("http://host.example.org/", "HOST.example.org:80", True), ("https://host.example.org/", "host.example.org:80", False),
    ("https://host.example.org/", "host.example.org:443", True), ("http://[fd00::5]:3141/", "fd00::/8", True),
    ("http://[fd00::5]:3141/", "[fd00::5]:3141", True), ("http://[fd00::5]:3141/", "fd00::5", True),
    ("http://[fd00::5]/", "[fd00::6]", False), ("http://10.1.2.3/", "10.1.0.0/16", True), ("http://10.1.2.3/", "10.1.2", False)])
def test_how_exempt_hosts_are_written(monkeypatch, url, exempt, is_direct):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in (("http_proxy", "p:1"), ("https_proxy", "p:1"), ("no_proxy", exempt)):
        monkeypatch.setenv(name, value)
    assert imported().proxy_for.__wrapped__(url) == (None if is_direct else "http://p:1")


def test_a_socks_proxy_is_told_that_it_is_not_spoken_to(devpi, site):
    devpi.sign_in(site, "alice", "alice/dev")
    for proxy, word in (("socks5://127.0.0.1:9", "not SOCKS"), ("https://u:SECRET@127.0.0.1:9", "not https://")):
        refused = devpi("getjson", "/alice/dev", expect=1, ALL_PROXY=proxy)
        assert word in refused and "HTTP_PROXY" in refused and "NO_PROXY" in refused and "SECRET" not in refused


@pytest.fixture
def secure(site, tmp_path):
    """A gate with a certificate that nobody knows: `secure.pem` is the file."""
    pem = tmp_path / "server.pem"
    pem.write_text(CERTIFICATE)
    gate = Gate(site, certificate=pem)
    gate.pem = pem
    yield gate
    gate.close()


def test_a_certificate_is_verified_against_the_named_bundle(devpi, site, secure):
    printed = devpi("use", secure.url + "/alice/dev", expect=1)
    assert "SSL_CERT_FILE" in printed and not secure.passed and not devpi.state()
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT"):
        printed = devpi("use", secure.url + "/alice/dev", **{name: secure.pem})
        assert "current devpi index: %s/alice/dev (not logged in)" % secure.url in printed.lines, name
    assert devpi.state()["login"] == secure.url + "/+login"


def test_a_tunnel_through_a_proxy_is_verified_too(devpi, site, secure, gate):
    """CONNECT: the proxy's credentials stay with the proxy."""
    gate.server = secure
    proxy = {"HTTPS_PROXY": gate.url.replace("://", "://me:pw@"), "SSL_CERT_FILE": secure.pem}
    assert "/alice/dev (not logged in)" in devpi("use", secure.url + "/alice/dev", **proxy)
    assert {(request.method, request.path) for request in gate.passed} == {("CONNECT", secure.host)}
    assert gate.passed[0].headers["Proxy-Authorization"] == "Basic " + user_pass("me", "pw")
    assert not any("Proxy-Authorization" in request.headers for request in secure.passed)
    del proxy["SSL_CERT_FILE"]
    devpi("use", secure.url + "/alice/dev", expect=1, **proxy)


def test_a_client_certificate_is_remembered_and_forgotten(devpi, site):
    pem = devpi.write("cert.pem", CERTIFICATE)
    url = site.url + "/alice/dev"
    missing = devpi.home / "nope.pem"
    assert "The client certificate at '%s' doesn't exist." % missing in devpi("use", "--client-cert", missing, url, expect=1)
    devpi("use", "--client-cert", "cert.pem", url, cwd=devpi.home)
    assert list(devpi.state("auth.json")["client_cert"].values()) == [str(pem)]
    assert "Using existing client cert for '" in devpi("use", url)
    devpi("use", "--client-cert=", url)
    assert "Using existing client cert" not in devpi("use", url)


def test_a_server_of_another_protocol_version_is_refused(devpi, site, gate):
    devpi.sign_in(site, "alice", "alice/dev", url=gate.url)
    body = json.dumps({"type": "stage", "result": {"projects": []}}).encode()
    gate.fault("GET /alice/dev", "answer", times=1, body=body, headers={
        "Content-Type": "application/json", "X-DEVPI-API-VERSION": "3"})
    assert "got a reply with API-VERSION 3, acceptable are: 2" in devpi("list", expect=1)
    gate.fault("GET /alice/dev", "answer", times=1, body=body.replace(b"stage", b"other"), headers={
        "Content-Type": "application/json", "X-DEVPI-API-VERSION": "2"})
    assert "got result type 'other'" in devpi("list", expect=1)
    gate.fault("GET /alice/dev", "answer", times=1, body=body.replace(b"stage", b"indexconfig"), headers={
        "Content-Type": "application/json"})
    assert "got an unversioned reply, assuming API-VERSION 2" in devpi("list")


def test_a_server_below_a_path(devpi, site):
    gate = Gate(site, prefix="/some/where")
    try:
        assert "current devpi index: %s/alice/dev (not logged in)" % gate.url in devpi("use", gate.url + "/alice/dev").lines
        devpi("login", "alice", "--password", "pw-of-alice")
        assert list(devpi.state("auth.json")["auth"]) == [gate.url + "/"]
        assert "%s/alice/staging (logged in as alice)" % gate.url in devpi("use", "staging")
        archive = wheel("below", "1.0")
        devpi("upload", "--index", "alice/dev", devpi.save(archive))
        (line,) = devpi("list", "--index", "/alice/dev", "below").lines
        assert line == file_url(gate, "alice/dev", archive)
        assert devpi("getjson", "/alice/dev").json()["type"] == "indexconfig"
        devpi("remove", "-y", line)
        assert "alice/dev" in devpi("use", "-l") and devpi("user").lines[0] == gate.url + "/alice:"
    finally:
        gate.close()


# -- the command line


def test_version_names_the_servers_parts_and_never_fails(devpi, site):
    assert len(devpi("--version").lines) == 1
    devpi.sign_in(site)
    lines = devpi("--version").lines
    assert "current devpi server: %s/" % site.url in lines and "    devpi-server 6.20.3" in lines
    devpi.write_state("current.json", {"login": "http://127.0.0.1:9/+login"})
    assert devpi("--version")


def test_misuse_shows_the_usage_of_the_command(devpi):
    printed = devpi("push", "only-one", expect=2)
    assert printed.startswith("usage: ") and "push" in printed.lines[0] and "error: " in printed.errors
    assert devpi("nosuchcommand", expect=2).errors
    help = devpi()
    for command in ("use", "login", "logoff", "user", "passwd", "index", "upload", "list", "test", "push", "remove", "install",
                    "refresh", "getjson", "patchjson", "yank", "env", "completion"):
        assert re.search(r"(?m)^ +%s\b" % command, help), command
    assert "--skip-existing" in devpi("upload", "--help")


def test_json_goes_to_stdout_alone(alice, site):
    assert alice("use", "--json").json()["index"] == site.url + "/alice/dev"
    printed = alice("list", "--json", "nosuch", expect=1)
    assert "404 Not Found: no project 'nosuch'" in printed.errors and printed.json()["error"]["status"] == 404
    assert "alice/staging" in json.dumps(alice("use", "-l", "--json").json())


@posix_only
def test_colours_are_for_terminals_unless_somebody_says_otherwise(devpi):
    """The order: PY_COLORS, NO_COLOR, TERM=dumb, whether it is a terminal."""
    assert "\033" not in devpi("list", expect=1)
    red = "\033[31mnot connected to an index, see 'devpi use'\033[0m"
    assert red in devpi("list", expect=1, PY_COLORS="1", NO_COLOR="1")
    for variables, coloured in [({}, True), ({"NO_COLOR": ""}, False), ({"TERM": "dumb"}, False), ({"PY_COLORS": "0"}, False)]:
        with devpi.terminal("list", **variables) as terminal:
            assert terminal.wait() == 1
        assert (red in terminal.shown, "\033" in terminal.shown) == (coloured, coloured), variables


@posix_only
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_of_the_shell(devpi, shell):
    script = devpi("completion", shell)
    assert "devpi" in script and script.errors == ""
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(devpi.write("script", script))], check=True)


@posix_only
@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_commands_options_and_indexes(alice, site):
    """What stands in COMPREPLY after the tab, with `devpi` on the PATH."""
    path = alice.add_command("devpi", "import os, sys\nos.execv(%r, %r + sys.argv[1:])\n" % (
        alice.command[0], alice.command))
    script = alice.write("completion.bash", alice("completion", "bash"))
    asked = [("devpi upl", "upload"), ("devpi upload --skip", "--skip-existing"), ("devpi use alice/s", "alice/staging")]
    lines = ["source " + shlex.quote(str(script))]
    for line, _ in asked:
        words = line.split()
        lines += ["COMP_WORDS=(%s) COMP_CWORD=%d COMP_LINE=%s COMP_POINT=%d COMPREPLY=()" % (
            " ".join(map(shlex.quote, words)), len(words) - 1, shlex.quote(line), len(line)),
            "$(complete -p devpi | sed -n 's/.*-F \\([^ ]*\\).*/\\1/p') devpi %s %s" % (words[-1], words[-2]),
            'echo "${COMPREPLY[*]}"']
    for _ in range(5):      # names are there only if the server tells them within two seconds
        done = subprocess.run(["bash", "--norc", "-c", "\n".join(lines)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env=alice.environment_with({"PATH": path}))
        answers = [answer.split() for answer in done.stdout.decode().splitlines()]
        assert len(answers) == len(asked), done
        found = [expected in answer for (_, expected), answer in zip(asked, answers)]
        if all(found):
            break
    assert found == [True] * len(asked), done


ODD_NAMES = ["foo;touch${IFS}PWNED;", "/etc/host*", "$(id)", "`id`", "a b", "-f", "--force", "x=y", "~root", "na\u00efve", "<x", ""]


@posix_only
@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize("odd", [ODD_NAMES, ["good"] + ODD_NAMES], ids=["alone", "among others"])
def test_odd_names_of_a_server_get_into_no_command_line(alice, gate, odd):
    """A shell inserts a word as it is, and people press Enter."""
    alice.sign_in(gate.server, "alice", "alice/dev", url=gate.url)
    gate.fault("GET /alice/dev", "answer", body=json.dumps(
        {"type": "indexconfig", "result": {"projects": odd}}).encode(), headers={"Content-Type": "application/json"})
    gate.fault("GET / ", "answer")
    gate.fault("GET /", "answer", body=json.dumps({"type": "list:userconfig", "result": {
        "good": {"indexes": {"index": {}}}, "x;id;": {"indexes": {"y": {}}}, "z": {"indexes": {"$(id)": {}}}}}).encode(),
        headers={"Content-Type": "application/json"})
    good = ["good"] if "good" in odd else []
    assert alice("__complete", "list", "").lines == good
    assert alice("__complete", "use", "").lines == ["good/index"]
    script = alice.write("completion.bash", alice("completion", "bash"))
    shown = subprocess.run(["bash", "--norc", "-c", "cd /; source %s; COMP_WORDS=(devpi list '') COMP_CWORD=2; _devpi_complete; "
                            'printf "<%%s>" "${COMPREPLY[@]}"' % shlex.quote(str(script))],
                           stdout=subprocess.PIPE, env=alice.environment, check=True).stdout.decode()
    assert shown == "<%s>" % "".join(good)


@posix_only
@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_a_word_that_a_shell_would_expand_stays_as_it_is(alice):
    """Whatever may come out of the program one day: bash takes each line for a word."""
    script = alice("completion", "bash")
    program = re.search(r"\(([^(]*) __complete", script)[1]
    script = alice.write("script", script.replace(program, alice.write("fake", "#!/bin/sh\nprintf '/etc/host*\\na b\\n'", True)
                                                  .as_posix()))
    shown = subprocess.run(["bash", "--norc", "-c", "source %s; COMP_WORDS=(devpi x) COMP_CWORD=1; _devpi_complete; "
                            'printf "<%%s>" "${COMPREPLY[@]}"' % shlex.quote(str(script))],
                           stdout=subprocess.PIPE, env=alice.environment, check=True).stdout.decode()
    assert shown == "</etc/host*><a b>"


def test_it_runs_alone_from_one_file(tmp_path, site):
    """Copied away from everything else, in the interpreter's isolated mode."""
    shutil.copy(str(SOURCE), str(tmp_path / "devpi.py"))
    devpi = Client(tmp_path / "home")
    devpi.command = [sys.executable, "-I", str(tmp_path / "devpi.py")]
    assert "alice/dev" in devpi("use", site.url + "/alice/dev") and os.listdir(str(tmp_path)) != []
