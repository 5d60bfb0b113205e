"""The client's `project`: the settings of a project on an index, in the words of devpi 7."""

import http.server
import json
import threading

import pytest

from client import Client

FEATURE = "projectconfig-v2"
RULE = "package 'demo' located in root/dev blocks releases from index root/pypi"
STEPS = [("traversed", "root/dev", "true", None), ("postponed", "root/pypi", "notset", None),
         ("traversed", "root/dev", "true", None), ("blocked", "root/pypi", "unknown", RULE)]


class Devpi(http.server.BaseHTTPRequestHandler):
    """As much of devpi-server 7 as the command needs; `asked` are the changes that it gets."""

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if path.endswith("/+api"):
            return self.say("apiconfig", {"login": self.server.url + "/+login", "authstatus": ["ok", "root", []],
                                          "features": self.server.features})
        assert (path, query) == ("/root/dev/demo", "v=2")
        steps = [dict({"action": action, "name": name, "has_project": has}, **({"reason": why} if why else {}))
                 for action, name, has, why in STEPS]
        self.say("projectconfig_v2", {"config": self.server.config, "versions": {"2.0": {}, "1.0": {}},
                                      "inheritance_info": {"traversal_infos": steps}})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.say("proxyauth", {"password": "token", "expiration": 36000})

    def do_PATCH(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, asked))
        if "nonsense" in asked:
            return self.say(None, None, 400, "projectconfig got unexpected keyword arguments: nonsense")
        self.say("projectconfig", self.server.config)

    def say(self, type_, result, code=200, message=None):
        body = json.dumps({"type": type_, "result": result, "message": message}).encode()
        self.send_response(code)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(body))),
                            ("X-DEVPI-API-VERSION", "2"), ("X-DEVPI-SERVER-VERSION", "7.0.0")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def seven():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Devpi)
    server.url = "http://127.0.0.1:%d" % server.server_port
    server.features, server.asked = [FEATURE], []
    server.config = {"name": "demo", "inheritance_rules": ["allow all"]}
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def logged_in(seven, tmp_path):
    client = Client(tmp_path / "home")
    client("use", seven.url)
    client("login", "root", "--password", "secret")
    return client


def test_a_project_is_shown_with_the_way_to_its_files(seven, logged_in):
    shown = logged_in("project", "root/dev/Demo")
    assert shown.lines == [
        seven.url + "/root/dev/demo:", "  inheritance_rules=allow all", "  name=demo", "  versions=2.0,1.0",
        "  root/dev: traversed, has it", "  root/pypi: blocked (%s)" % RULE]
    found = logged_in("project", "--json", "root/dev/demo").json()
    assert found["config"] == seven.config and len(found["inheritance_info"]["traversal_infos"]) == 4
    assert found["url"] == seven.url + "/root/dev/demo"
    assert seven.asked == []


@pytest.mark.parametrize("name", ["dev/demo", "/root/dev/demo", "root/dev/demo/"])
def test_how_a_project_is_named(seven, logged_in, name):
    assert logged_in("project", name).lines[0] == seven.url + "/root/dev/demo:"


def test_a_project_by_its_url(seven, logged_in, nobody):
    assert logged_in("project", seven.url + "/root/dev/demo").lines[1:] == logged_in("project", "root/dev/demo").lines[1:]


def test_settings_are_passed_on(seven, logged_in):
    """As an object where that is possible: devpi-server 7.0.0b4 takes a list only under the first spelling of a project."""
    printed = logged_in("project", "root/dev/demo", "inheritance_rules=allow all")
    assert printed.lines[0] == "/root/dev/demo inheritance_rules=allow all"
    assert "  inheritance_rules=allow all" in printed.lines
    logged_in("project", "root/dev/demo", "inheritance_rules-=")
    assert seven.asked == [("/root/dev/demo", {"inheritance_rules": "allow all"}), ("/root/dev/demo", ["inheritance_rules-="])]
    assert "400 Bad Request: projectconfig got unexpected" in logged_in("project", "root/dev/demo", "nonsense=1", expect=1)


def test_a_server_without_settings_of_projects(seven, logged_in):
    """Its features are asked for again: the server may have become newer than at the time of `use`."""
    seven.features = ["server-keyvalue-parsing"]
    logged_in("use", seven.url)
    printed = logged_in("project", "root/dev/demo", "inheritance_rules=allow all", expect=1)
    assert "this server has no settings of projects" in printed and "mirror_whitelist+=demo" in printed
    assert seven.asked == []
    seven.features = [FEATURE]
    assert logged_in("project", "root/dev/demo").lines[0] == seven.url + "/root/dev/demo:"


@pytest.mark.parametrize("arguments, words", [
    (["root/dev/demo", "noequals"], "noequals"), (["a/b/c/d"], "not of form"), (["/"], "not of the form"),
    (["inheritance_rules=allow all"], "not of the form"), (["demo"], "not connected to an index")])
def test_what_is_no_project(logged_in, arguments, words):
    printed = logged_in("project", *arguments, expect=1)
    assert words in printed, printed


def test_a_project_of_our_own_server(devpi, site, index):
    """A rule for one project is its name in mirror_whitelist."""
    shown = devpi("project", "Demo", "inheritance_rules=allow all").lines
    assert shown[0] == "/%s/demo inheritance_rules=allow all" % index
    assert "  inheritance_rules=allow all" in shown and "  name=demo" in shown
    assert "  mirror_whitelist=demo" in devpi("index").lines
    assert "  inheritance_rules=allow all" not in devpi("project", "demo", "inheritance_rules-=").lines
    assert "  mirror_whitelist=" in devpi("index").lines
    assert "400 Bad Request" in devpi("project", "demo", "nonsense=1", expect=1)


def test_an_index_takes_the_words_of_devpi_7(devpi, site, index):
    devpi("index", index, "project_inheritance_rules=allow all", "trust_inheritance_rules_from=type:not remote")
    shown = devpi("index", index).lines
    assert "  mirror_whitelist=*" in shown and "  mirror_whitelist_inheritance=union" in shown
