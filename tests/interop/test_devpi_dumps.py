"""Dumps go to and fro between us and the real devpi-server 6 and 7, and what both show over HTTP is compared.

The servers are filled by devpi_site.py, as those were whose dumps are kept in tests/data.
"""

import functools
import hashlib
import json
import re
import shutil
import time
from email.utils import parsedate_to_datetime

import pytest

import devpi_lite
from clients import ENVIRONMENTS, Devpi
from devpi_server import DevpiServer
from devpi_site import PASSWORDS, Site, fill, outside
from harness import Server, Upstream, path_of, run_command, sdist, upload, wheel

SIX, SEVEN = ENVIRONMENTS / "devpi-server", ENVIRONMENTS / "devpi-server-7"
# Deriving the key of log-ins costs devpi-server 8 s and 512 MiB at each start.
CHEAP = ["--argon2-memory-cost", "64", "--argon2-parallelism", "1", "--argon2-time-cost", "1"]


class Ours(Server):
    """Ours, filled as a devpi-server 6.20 would be."""

    release = (6, 20)

    def __init__(self, directory, *options):
        super().__init__(directory, *options, root_password="root-pw")

    def export(self, folder, *options):
        done = run_command("export", folder, "--serverdir", self.directory, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def load(self, folder, *options):
        done = run_command("import", folder, "--serverdir", self.directory, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr


class Theirs(DevpiServer):
    def __init__(self, directory, environment):
        if not (environment / "bin" / "devpi-server").exists():
            pytest.skip("%s is not there: it needs a newer Python" % environment.name)
        super().__init__(directory, environment, *CHEAP)


def make(kind, directory):
    return Ours(directory) if kind == "ours" else Theirs(directory, {"6": SIX, "7": SEVEN}[kind])


# -- what a server shows


def described(server):
    """All that it shows, in the words of 6.20: {"users", "indexes", "projects", "files"}."""
    found = {"users": {}, "indexes": {}, "releases": {}, "files": {}}
    for name, user in server.get("/").result.items():
        indexes = user.pop("indexes", {})
        found["users"][name] = user
        for index in sorted(indexes):
            describe_index(server, "%s/%s" % (name, index), found)
    return found


def describe_index(server, index, found):
    result = server.get("/" + index).result
    projects = sorted(result.pop("projects", []))
    found["indexes"][index] = in_words_of_6(server, index, projects, result)
    for project in projects:
        releases = server.get("/%s/%s?ignore_bases" % (index, project)).result
        found["releases"]["%s/%s" % (index, project)] = sorted(releases)
        for version, metadata in releases.items():
            for link in metadata.pop("+links", []):
                describe_file(server, index, link, found)
            found["releases"]["%s/%s/%s" % (index, project, version)] = {
                key: value for key, value in metadata.items() if value not in ("", [], None)}


def describe_file(server, index, link, found):
    path = server._path_of(link["href"])
    reply = server.get(path, headers={"Accept": "*/*"})
    assert reply.status == 200, (path, reply)
    tested = server._path_of(link["for_href"]) if "for_href" in link else None
    when = parsedate_to_datetime(reply.headers["Last-Modified"]) if "Last-Modified" in reply.headers else None
    found["files"][path] = {
        "rel": link["rel"], "sha256": hashlib.sha256(reply.body).hexdigest(), "tested": tested,
        "log": [dict(entry, when=as_list(entry["when"])) for entry in link.get("log", [])],
        "modified": when and when.timestamp()}


def as_list(when):
    return when if isinstance(when, list) else list(time.strptime(when, "%Y-%m-%dT%H:%M:%SZ")[:6])


def in_words_of_6(server, index, projects, config):
    names = {"remote_url": "mirror_url", "remote_refresh_delay": "mirror_cache_expiry",
             "remote_web_url_fmt": "mirror_web_url_fmt"}
    config = {names.get(key, key): value for key, value in config.items()}
    if config["type"] == "local":
        whitelist = ["*"] if config.pop("project_inheritance_rules") == ["allow all"] else []
        for project in projects:
            rules = server.get("/%s/%s?v=2" % (index, project)).result["config"].get("inheritance_rules")
            whitelist += [project] if rules else []
        trust = config.pop("trust_inheritance_rules_from", "none")
        config.update(mirror_whitelist=whitelist, mirror_whitelist_inheritance={
            "none": "intersection", "type:not remote": "union"}[trust])
    config["type"] = {"local": "stage", "remote": "mirror"}.get(config["type"], config["type"])
    return config


def differences(one, other):
    """Lines, for people: what the one has and the other not, or has otherwise."""
    return [line for part in one for key in sorted(set(one[part]) | set(other[part]))
            if one[part].get(key) != other[part].get(key)
            for line in ("%s %s:\n   %s\n   %s" % (part, key, one[part].get(key), other[part].get(key)),)]


# -- where dumps go


class Stop:
    """A server on what it was filled with or imported, and what it shows."""

    def __init__(self, kind, folder):
        self.kind, self.folder, self.server = kind, folder, make(kind, folder / "server")
        self.said = ""

    def fill(self):
        upstream = outside()
        try:
            self.server.start()
            fill(Site(self.server, upstream))
            if self.kind == "ours":
                add_what_devpi_has_not(self.server)
        finally:
            upstream.stop()
        self.server.restart("--offline-mode")
        return self

    def load(self, dump):
        self.said = self.server.load(dump, "--no-root-pypi")
        self.server.passwords.update(PASSWORDS, cheap="cheap-pw")
        self.server.start("--offline-mode")
        return self

    @functools.cached_property
    def shown(self):
        return described(self.server)

    @functools.cached_property
    def dump(self):
        self.shown
        self.server.stop()
        self.exported = self.server.export(self.folder / "dump", "--include-mirrored-files")
        self.server.start("--offline-mode")
        return self.folder / "dump"

    @property
    def index(self):
        return json.loads((self.dump / "dataindex.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def stop(tmp_path_factory):
    """stop("6 ours 7") -> the Stop at 7 of a dump that went from a filled devpi-server 6 by ours."""
    made = {}

    def at(way):
        if way not in made:
            *before, kind = way.split()
            new = Stop(kind, tmp_path_factory.mktemp(way.replace(" ", "-")))
            made[way] = new.load(at(" ".join(before)).dump) if before else new.fill()
        return made[way]

    yield at
    for each in made.values():
        if each.server.running:
            each.server.stop()


def add_what_devpi_has_not(server):
    """And what it has, but make_devpi_dump doesn't put in."""
    dev, stable = "mira/dev", "mira/stable"
    for reason in ("", "it%20%22leaks%22"):
        archive = wheel("yanked", "1.%d" % len(reason))
        upload(server, dev, archive)
        reply = server.patch(path_of(archive, dev) + "?yank=" + reason, user="mira")
        assert reply.status == 200, reply
    reply = server.patch("/%s/under-score" % dev, {"project-status": {
        "status": "archived", "reason": "the end"}}, user="mira")
    assert reply.status == 200, reply
    upload(server, stable, wheel("gone", "1.0"), wheel("gone", "2.0"))
    reply = server.delete(path_of(wheel("gone", "1.0"), stable) + "?force", user="mira")
    assert reply.status == 200, reply
    upload(server, dev, wheel("newer", "1.0", metadata_version="2.4"), fields={
        "license_expression": "MIT", "license_file": ["LICENSE", "NOTICE"],
        "import_name": ["newer", "newer.parts"], "dynamic": ["Requires-Dist"],
        "project_urls": ["Source, https://example.org/a,b"], "description": "short \u2028 \U0001f40d",
        "provides_extra": ["one", "two"]})
    upload(server, dev, wheel("epochs", "1!2.0+local.1"), wheel("twice", "1.0rc1"))
    upload(server, dev, sdist("twice", "1.0rc1"), fields={"version": "1.0.RC1"})
    server.add_index("mira/hidden", acl_pkg_read=["mira"], webhook_url="http://127.0.0.1:9/",
                     webhook_secret="of ours alone", volatile=False)
    upload(server, "mira/hidden", wheel("secret", "1.0"))
    server.add_index("noel/trap", bases=[dev], mirror_whitelist=["outside"])


def of_devpi(shown):
    """What of it devpi has a place for: not who may read, no yanks of own files, less in the histories."""
    kept = {part: {key: value for key, value in values.items() if "mira/hidden" not in key}
            for part, values in shown.items()}
    for key, release in kept["releases"].items():
        if isinstance(release, dict):
            kept["releases"][key] = {name: value for name, value in release.items() if name != "yanked"}
    for file in kept["files"].values():
        file["log"] = [{name: value for name, value in entry.items()
                        if name in ("what", "who", "when", "src", "dst", "count")} for entry in file["log"]]
    return kept


WAYS = ["6 ours", "7 ours", "ours ours", "ours 6", "ours 7", "6 ours 6", "7 ours 7", "ours 6 ours", "ours 7 ours"]


@pytest.mark.parametrize("way", WAYS)
def test_a_dump_shows_at_its_end_what_was_shown_where_it_was_made(stop, way):
    first, last = stop(way.split()[0]).shown, stop(way).shown
    if way.startswith("ours") and way != "ours ours":
        first, last = of_devpi(first), of_devpi(last)
    if way.startswith("ours 7"):    # there a name in a whitelist is a rule of a project, which then exists
        assert last["releases"].pop("noel/trap/outside") == []
    assert not differences(first, last)


def test_an_export_says_what_devpi_will_make_of_it(stop):
    stop("ours").dump
    said = stop("ours").exported
    for sentence in ("devpi shows mira/hidden to everybody", "noel/trap whitelists outside",
                     "2 yanked files; 1 project status; 1 index's webhooks; 1 name of a deleted file"):
        assert sentence in said, said
    assert "of ours alone" not in json.dumps(stop("ours 6").index)     # the secret of the webhook


@pytest.mark.parametrize("kind", ["6", "7"])
def test_dumps_before_and_after_us_are_the_same(stop, kind):
    """But for the order of what has none, and what says who wrote it."""
    assert comparable(stop("%s ours %s" % (kind, kind)).index) == comparable(stop(kind).index)


def comparable(index):
    kept = {key: value for key, value in index.items() if key not in ("devpi_server", "pythonversion")}
    for indexdict in kept["indexes"].values():
        indexdict["files"] = {file["relpath"]: file for file in indexdict["files"]}
        for project, releases in indexdict["projects"].items():
            if "config" in releases:        # of 7; it refuses a dump of its own that has another spelling here
                releases["config"]["name"] = project
    return kept


def test_what_we_know_and_devpi_not_comes_back_from_our_own_dump(stop):
    first, last = stop("ours").server, stop("ours ours").server
    for server in (first, last):
        server.login("mira")
    for project in ("yanked", "under-score", "tide-table"):
        pages = [server.simple("mira/dev", project) for server in (first, last)]
        assert pages[0] == pages[1]
    assert pages[0]["files"] and first.get("/mira/hidden").status != 200
    hidden = [server.get("/mira/hidden", user="mira").result for server in (first, last)]
    assert hidden[0] == hidden[1] and hidden[0]["acl_pkg_read"] == ["mira"]


def test_a_whitelisted_name_without_uploads_still_comes_from_outside(stop, tmp_path):
    """In devpi 7 it doesn't: there the name becomes a project of the index, which shuts out the mirror's."""
    shutil.copytree(stop("6").dump, tmp_path / "dump")
    with Upstream().start() as upstream:
        index = stop("6").index
        index["indexes"]["root/sea"]["indexconfig"]["mirror_url"] = upstream.url
        for name, bases, whitelist in (("base", ["root/sea"], ["both"]), ("child", ["mira/base"], [])):
            index["indexes"]["mira/" + name] = {"projects": {}, "files": [], "indexconfig": {
                "type": "stage", "volatile": True, "bases": bases, "acl_upload": ["mira"],
                "mirror_whitelist": whitelist, "mirror_whitelist_inheritance": "intersection"}}
        (tmp_path / "dump" / "dataindex.json").write_text(json.dumps(index))
        archive = upstream.publish("both", "1.0")
        server = Ours(tmp_path / "server")
        server.load(tmp_path / "dump")
        server.start()
        try:
            assert server.filenames("mira/child", "both") == [archive.filename]
        finally:
            server.stop()


@pytest.mark.parametrize("way", ["6 ours", "6 ours 6", "7 ours 7", "ours 6", "ours 7"])
def test_passwords_come_along_and_none_is_empty(stop, way):
    server, first = stop(way).server, stop(way.split()[0])
    for name in first.index["users"]:
        if way == "6 ours" and name != "cheap" and not devpi_lite.argon2_library():
            continue    # it takes minutes
        for password in ("", "wrong") if name == "mira" else ("",):
            assert server.post("/+login", {"user": name, "password": password}).status == 401
        # where no library computes argon2, ours has no hash for devpi, and says so
        said = re.search(r"in devpi, (.*) can't log in", first.exported)
        if said and name in said[1].split(", "):
            reply = server.post("/+login", {"user": name, "password": server.passwords[name]})
            assert reply.status == 401, reply
        else:
            server.login(name)


@pytest.mark.parametrize("way", ["6 ours", "7 ours", "6 ours 6"])
def test_people_go_on_where_their_dump_went(stop, way, clients, tmp_path):
    server = stop(way).server
    assert clients.install("pip", server.url + "/mira/dev/+simple/", "tide-table==1.0") == {"tide-table": "1.0"}
    devpi = Devpi(clients, tmp_path / "client")
    devpi("use", server.url)
    devpi("login", "cheap", "--password", "cheap-pw")
    for index in ("work", "done"):
        devpi("index", "-c", index, "bases=mira/dev")
    archive = wheel("moved", "1.0")
    clients.publish("twine", server.url + "/cheap/work/", archive, "cheap", "cheap-pw")
    devpi("use", "cheap/work")
    devpi("push", "moved==1.0", "cheap/done")
    assert clients.install("pip", server.url + "/cheap/done/+simple/", "moved", "sea-lib") == {
        "moved": "1.0", "sea-lib": "1.5"}
