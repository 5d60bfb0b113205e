"""A day with a primary and two replicas in other buildings: the real clients work through any of
them, the primary is lost, a replica takes over, and the old primary comes back.

Each test goes on where the one before it has left off; they run in the order in which they stand
here.
"""

import json
import re
import shutil
import time

import pytest

from client import Client
from clients import Clients, Devpi
from harness import (
    PROGRAM, Server, Upstream, documentation, eventually, path_of, run_command, sdist, user_pass,
    wheel)
from nginx import free_port
from replicas import in_sync, rows, same, status, unsound

TOX = {"toxversion": "4.11", "host": "ci-1", "platform": "linux", "testenvs": {"py": {
    "python": {"version": "3.13.0"},
    **{step: [{"command": [step], "output": "", "retcode": 0}] for step in ("setup", "test")}}}}

ALONE = wheel("alone", "1.0")      # what only the old primary took


class Day:
    """`primary`, `one` and `two`, each with its port for the day.

    Alice sits near `one`, with devpi-client; Bob near `two`, with ours."""

    def __init__(self, home):
        self.home, self.upstream = home, Upstream().start()
        self.secret = home / "secret"
        self.primary = self.server("primary", "--role", "primary", root_password="rootpw").start()
        shutil.copy(str(self.primary.directory / ".secret"), str(self.secret))
        self.secret.chmod(0o600)
        self.primary_url = self.primary.url
        self.one, self.two = (self.replica(name, self.primary_url).start() for name in ("one", "two"))
        self.clients = Clients(home / "alice")
        self.alice = Devpi(self.clients, home / "alice" / "client")
        self.bob = Client(home / "bob")
        self.installs = 0

    def server(self, name, *options, port=None, **keywords):
        return Server(self.home / name, *options, "--port", str(port or free_port()),
                      **dict({"script": PROGRAM, "root_password": None}, **keywords))

    def replica(self, name, url, port=None):
        return self.server(name, "--primary-url", url, "--secretfile", self.secret, port=port)

    @property
    def servers(self):
        return self.primary, self.one, self.two

    def installed(self, server, *requirements, installer="pip", index="alice/dev", **options):
        """What one installs from the server, with caches that are empty."""
        self.installs += 1
        person = Clients(self.home / ("person-%d" % self.installs))
        return person.install(installer, "%s/%s/+simple/" % (server.url, index), *requirements,
                              **options)

    def close(self):
        for server in self.servers:
            if server.running:
                server.kill()
        self.upstream.stop()


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    day = Day(tmp_path_factory.mktemp("replicas"))
    yield day
    day.close()


def files(server, project, index="alice/dev"):
    reply = server.get("/%s/+simple/%s/" % (index, project),
                       headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    return [file["filename"] for file in reply.json()["files"]] if reply.status == 200 else []


def logs_in(server, user, password):
    return server.post("/+login", {"user": user, "password": password}).status == 200


# -- through either


def test_01_two_replicas_follow_the_primary(day):
    in_sync(*day.servers)
    seen = eventually(lambda: (lambda found: len(found) == 2 and found)(
        status(day.primary)["polling_replicas"]))
    assert sorted(seen) == sorted(status(server)["uuid"] for server in (day.one, day.two))
    for replica in (day.one, day.two):
        found = status(replica)
        assert (found["role"], found["replication-state"]) == ("REPLICA", "following")
        assert found["primary-uuid"] == status(day.primary)["uuid"]
        assert replica.get("/+health/ready").status == 200


def test_02_root_makes_users_and_a_mirror_through_a_replica(day):
    root = Devpi(Clients(day.home / "root"), day.home / "root" / "client")
    root("use", day.one.url)
    assert "logged in 'root'" in root("login", "root", "--password", "rootpw")
    root("index", "-c", "root/pypi", "type=mirror", "mirror_url=" + day.upstream.url)
    for name in ("alice", "bob"):
        assert root("user", "-c", name, "password=first-pw") == "user created: %s\n" % name
    assert "409 Conflict" in root("user", "-c", "bob", "password=x", expect=1)


def test_03_alice_and_bob_make_indexes_through_different_replicas(day):
    day.alice("use", day.one.url)
    day.alice("login", "alice", "--password", "first-pw")
    assert "  volatile=True" in day.alice("index", "-c", "dev", "bases=root/pypi").splitlines()
    day.alice("use", "alice/dev")
    in_sync(*day.servers)
    day.bob("use", day.two.url)
    day.bob("login", "bob", "--password", "first-pw")
    shown = day.bob("index", "-c", "prod", "bases=root/pypi", "volatile=False", "acl_upload=bob,alice")
    assert "  volatile=False" in shown.lines
    in_sync(*day.servers)
    for server in day.servers:
        assert server.get("/bob/prod").result["acl_upload"] == ["bob", "alice"]
        assert server.get("/alice/dev").result["bases"] == ["root/pypi"]


@pytest.mark.parametrize("tool, archive", [
    ("twine", wheel("by-twine", "1.0")), ("uv", wheel("by-uv", "1.0")),
    ("devpi", sdist("by-devpi", "1.0")), ("ours", wheel("by-ours", "1.0"))])
def test_04_uploaded_through_one_installed_from_the_others(day, tool, archive):
    if tool in ("twine", "uv"):
        day.clients.publish(tool, day.one.url + "/alice/dev/", archive, "alice", "first-pw")
    elif tool == "devpi":
        day.alice("upload", day.clients.save(archive))
    else:
        ours = Client(day.home / "ours")
        ours("use", day.two.url + "/alice/dev")
        ours("login", "alice", "--password", "first-pw")
        ours("upload", ours.save(archive))
    # the one it went through has it at once, the others a moment later
    near, far = (day.two, day.one) if tool == "ours" else (day.one, day.two)
    assert files(near, archive.name) == [archive.filename]
    eventually(lambda: files(far, archive.name) == [archive.filename], seconds=5)
    url = day.alice("list", archive.name).strip()
    assert url.startswith(day.one.url + "/alice/dev/+f/") and url.endswith(archive.filename)
    if archive.filename.endswith(".whl"):
        for server, installer in ((far, "pip"), (near, "uv"), (day.primary, "pip20")):
            assert day.installed(server, archive.name, installer=installer) == {archive.name: "1.0"}
    else:
        for server in day.servers:
            assert server.fetch("alice/dev", archive.filename, archive.name) == archive.content


def test_05_an_upload_is_seen_at_the_other_replica_within_the_blink_of_an_eye(day):
    day.one.passwords["alice"] = "first-pw"
    took = []
    for number in range(10):
        archive = wheel("quick", "%d.0" % number, size=20000)
        assert day.one.upload("alice/dev", archive).status == 200
        began = time.monotonic()
        while archive.filename not in files(day.two, "quick"):
            pass
        assert day.two.fetch("alice/dev", archive.filename, "quick") == archive.content
        took.append(time.monotonic() - began)
    print("\nuploaded through one, read at two: median %.0f ms, at most %.0f ms" % (
        sorted(took)[5] * 1000, max(took) * 1000))
    assert sorted(took)[5] < 0.5


def test_06_a_changed_password_stops_working_everywhere(day):
    token = day.two.login("bob", "first-pw")
    assert day.one.get("/+api", headers={"X-Devpi-Auth": user_pass("bob", token)}).result[
        "authstatus"][0] == "ok"
    assert "user modified: bob" in day.bob("user", "-m", "bob", "password=second-pw")
    in_sync(*day.servers)
    for server in day.servers:
        assert not logs_in(server, "bob", "first-pw") and logs_in(server, "bob", "second-pw")
        assert server.get("/+api", headers={"X-Devpi-Auth": user_pass("bob", token)}).result[
            "authstatus"][0] != "ok"
    printed = day.clients.publish("twine", day.one.url + "/bob/prod/", wheel("none", "1.0"), "bob",
                                  "first-pw", expect=None)
    assert "401" in printed
    day.bob("login", "bob", "--password", "second-pw")


def test_07_documentation_is_read_at_all(day):
    manual = documentation("by-twine", "1.0", page="<h1>as it is used</h1>")
    day.alice("upload", day.clients.save(manual))
    in_sync(*day.servers)
    for server in day.servers:
        page = server.get("/alice/dev/by-twine/latest/+doc/index.html?raw", headers={"Accept": "*/*"})
        assert (page.status, page.body) == (200, b"<h1>as it is used</h1>"), server
        eventually(lambda: "by-twine" in json.dumps(server.get("/+search?query=used").json()["result"]["hits"]))


def test_08_a_test_result_is_listed_at_all(day):
    posted = day.two.post(path_of(wheel("by-twine", "1.0"), "alice/dev"), TOX, user=None)
    assert posted.status == 200, posted
    in_sync(*day.servers)
    for server in day.servers:
        shown = day.bob("list", "-t", "--index", server.url + "/alice/dev", "by-twine").lines \
            if server is day.two else day.alice("list", "-t", "by-twine").splitlines()
        assert any(re.search(r"ci-1 +linux +py +3\.13\.0 tests passed", line) for line in shown), shown
        result = server.get("/" + posted.result.partition("#")[0], headers={"Accept": "*/*"})
        assert json.loads(result.body) == TOX


def test_09_a_yanked_release_is_passed_over_at_the_other(day):
    ours = Client(day.home / "ours")
    ours("yank", "-r", "loses data", "quick==9.0")
    in_sync(*day.servers)
    for server, installer in ((day.one, "pip"), (day.two, "uv"), (day.primary, "uv")):
        assert day.installed(server, "quick", installer=installer) == {"quick": "8.0"}
    assert day.installed(day.one, "quick==9.0") == {"quick": "9.0"}


def test_10_a_push_through_a_replica_takes_all_along(day):
    printed = day.alice("push", "by-twine==1.0", "bob/prod").splitlines()
    assert [line.split()[:2] for line in printed] == [["200", action] for action in (
        "register", "store_releasefile", "store_toxresult", "store_doczip")]
    assert "409 Conflict" in day.alice("push", "by-twine==1.0", "bob/prod", expect=1)
    in_sync(*day.servers)
    for server in day.servers:
        assert day.installed(server, "by-twine", installer="uv", index="bob/prod") == {"by-twine": "1.0"}
        page = server.get("/bob/prod/by-twine/1.0/+doc/index.html?raw", headers={"Accept": "*/*"})
        assert page.body == b"<h1>as it is used</h1>"


def test_11_what_is_removed_is_gone_at_all(day):
    gone = path_of(wheel("quick", "7.0", size=20000), "alice/dev")
    assert "deleting release 7.0 of quick" in day.alice("remove", "-y", "quick==7.0")
    day.alice("remove", "-y", "by-uv")
    in_sync(*day.servers)
    for server in day.servers:
        assert files(server, "by-uv") == [] and "quick-7.0-py3-none-any.whl" not in files(server, "quick")
        assert server.get(gone, headers={"Accept": "*/*"}).status == 410
    assert "by-uv" in day.installed(day.two, "by-uv", expect=None, PIP_RETRIES="0")


def test_12_the_primary_alone_asks_upstream(day):
    day.upstream.publish("public-lib", "1.0")
    day.upstream.publish("public-app", "2.0")
    application = wheel("app", "1.0", requires_dist=["public-lib"])
    day.alice("upload", day.clients.save(application))
    expected = {"app": "1.0", "public-lib": "1.0"}
    for server, installer in ((day.one, "pip"), (day.two, "uv"), (day.primary, "pip")):
        eventually(lambda: files(server, "app"))
        assert day.installed(server, "app", installer=installer) == expected
    assert day.upstream.count("*/public_lib-1.0-py3-none-any.whl") == 1
    assert day.installed(day.one, "public-app", installer="uv", index="root/pypi") == {"public-app": "2.0"}


def test_13_all_three_are_the_same(day):
    same(*day.servers)
    assert [unsound(server) for server in day.servers] == [[], [], []]


# -- without the primary


def test_14_the_primary_is_stopped_and_what_is_here_goes_on(day):
    day.primary.stop()
    expected = {"app": "1.0", "public-lib": "1.0"}
    for server, installer in ((day.one, "pip"), (day.two, "uv")):
        assert day.installed(server, "app", "by-twine", installer=installer) == dict(
            expected, **{"by-twine": "1.0"})
        assert logs_in(server, "bob", "second-pw")
        assert server.get("/+health/ready").status == 200
    assert day.alice("list").splitlines() == ["app", "by-devpi", "by-ours", "by-twine", "quick"]


def test_15_changes_are_refused_in_a_sentence_meanwhile(day):
    archive = wheel("later", "1.0")
    assert "503 Service Unavailable" in day.clients.publish(
        "twine", day.one.url + "/alice/dev/", archive, "alice", "first-pw", expect=None)
    assert "the primary %s can't be reached, try again" % day.primary_url in day.alice(
        "upload", day.clients.save(archive), expect=1)
    refused = day.two.put("/bob/more", {}, user="bob", password="second-pw")
    assert refused.status == 503 and refused.headers["Retry-After"] == "10"
    assert files(day.one, "later") == []


def test_16_the_primary_is_back_and_takes_them(day):
    day.primary.start()
    eventually(lambda: status(day.one)["replication-state"] == "following", seconds=60)
    day.clients.publish("twine", day.one.url + "/alice/dev/", wheel("later", "1.0"), "alice", "first-pw")
    in_sync(*day.servers, seconds=60)
    assert day.installed(day.two, "later") == {"later": "1.0"}


# -- the primary is lost


def test_17_the_primary_is_killed_and_one_is_promoted(day):
    day.clients.publish("twine", day.two.url + "/alice/dev/", wheel("last", "1.0"), "alice", "first-pw")
    in_sync(*day.servers)
    day.primary.kill()
    assert day.installed(day.one, "last") == {"last": "1.0"}
    day.one.stop()
    # it may be a hiccup of the net
    refused = run_command("promote", "--serverdir", day.one.directory)
    assert refused.returncode == 1 and "--force" in refused.stderr, refused
    promoted = run_command("promote", "--force", "--serverdir", day.one.directory)
    assert (promoted.returncode, promoted.stderr) == (0, "") and "term 2" in promoted.stdout, promoted
    day.one = day.server("one", "--secretfile", day.secret, port=day.one.port).start()
    found = status(day.one)
    assert (found["role"], found["term"], found["fenced"]) == ("MASTER", 2, None)


def test_18_the_other_one_follows_it_without_being_built_anew(day):
    day.two.stop()
    day.two = day.replica("two", day.one.url, port=day.two.port).start()
    in_sync(day.one, day.two)
    assert "snapshot" not in day.two.output()
    for tool, server in (("twine", day.two), ("uv", day.one)):
        archive = wheel("new-by-" + tool, "1.0")
        day.clients.publish(tool, server.url + "/alice/dev/", archive, "alice", "first-pw")
        in_sync(day.one, day.two)
        for each in (day.one, day.two):
            assert day.installed(each, archive.name) == {archive.name: "1.0"}
    assert "user modified: bob" in day.bob("user", "-m", "bob", "password=third-pw")
    in_sync(day.one, day.two)
    assert logs_in(day.one, "bob", "third-pw") and not logs_in(day.one, "bob", "second-pw")
    assert day.installed(day.two, "app", installer="uv") == {"app": "1.0", "public-lib": "1.0"}


def test_19_the_old_one_comes_back_where_nobody_sees_it(day):
    """At another port, as if its building were cut off: it takes changes, which nobody else has."""
    day.old = Server(day.primary.directory, "--port", "0", script=PROGRAM, root_password=None).start()
    alice = Clients(day.home / "cut-off")
    alice.publish("twine", day.old.url + "/alice/dev/", ALONE, "alice", "first-pw")
    assert day.old.put("/carol", {"password": "pw"}).status == 201
    assert day.old.delete(path_of(wheel("last", "1.0"), "alice/dev"), user="alice",
                          password="first-pw").status == 200
    assert logs_in(day.old, "bob", "second-pw")
    assert status(day.old)["fenced"] is None
    day.old.stop()


def test_20_it_is_fenced_when_it_can_be_seen(day):
    day.primary.start()
    reason = eventually(lambda: status(day.primary)["fenced"], seconds=60)
    assert "term" in reason
    found = status(day.primary)
    assert (found["status"], found["messages"]) == ("fatal", ["this primary takes no changes"])
    printed = day.clients.publish("twine", day.primary.url + "/alice/dev/", wheel("refused", "1.0"),
                                  "alice", "first-pw", expect=None)
    assert "503 Service Unavailable" in printed
    assert day.primary.put("/dave", {"password": "pw"}).status == 503
    assert day.primary.get("/+health/ready").status == 503
    shown = run_command("status", "--nagios", "--serverdir", day.primary.directory)
    assert shown.returncode == 2 and "takes no changes" in shown.stdout, shown
    assert day.installed(day.primary, "alone") == {"alone": "1.0"}, "it is still read from"
    day.primary.stop()


def test_21_what_would_be_lost_is_listed_by_serial_user_and_file(day):
    before = rows(day.primary)
    listed = run_command("resync", "--dry-run", "--primary-url", day.one.url,
                         "--serverdir", day.primary.directory)
    assert (listed.returncode, listed.stderr) == (0, ""), listed
    lost = [re.fullmatch(r" *(\d+)  (20\S+)  (\S+) +(.*)", line).groups()
            for line in listed.stdout.splitlines()[1:]]
    assert {(who, what) for _, _, who, what in lost} >= {
        ("alice", "file " + path_of(ALONE, "alice/dev")[1:]), ("-", "user carol"),
        ("alice", "deleted file " + path_of(wheel("last", "1.0"), "alice/dev")[1:])}, listed.stdout
    assert rows(day.primary) == before and not list(day.primary.directory.glob("diverged-*"))
    print("\n" + listed.stdout)


def test_22_resync_makes_it_a_replica(day):
    done = run_command("resync", "--primary-url", day.one.url, "--serverdir", day.primary.directory)
    assert (done.returncode, done.stderr) == (0, ""), done
    (aside,) = day.primary.directory.glob("diverged-*")
    assert "carol" in (aside / "changes.txt").read_text()
    assert ALONE.sha256 in {path.name for path in (aside / "files").rglob("*")}
    day.primary = day.server("primary", "--primary-url", day.one.url, port=day.primary.port).start()
    same(day.one, day.two, day.primary)
    assert [unsound(server) for server in day.servers] == [[], [], []]
    assert status(day.primary)["role"] == "REPLICA"
    assert day.installed(day.primary, "last", "new-by-uv") == {"last": "1.0", "new-by-uv": "1.0"}
    assert files(day.primary, "alone") == []


def test_23_what_was_put_aside_is_uploaded_again(day):
    (aside,) = day.primary.directory.glob("diverged-*/files/*/" + ALONE.sha256)
    assert aside.read_bytes() == ALONE.content
    day.alice("upload", day.clients.save(ALONE))
    in_sync(day.one, day.two, day.primary)
    for server in day.servers:
        assert day.installed(server, "alone", installer="uv") == {"alone": "1.0"}


def test_24_the_first_one_is_the_primary_again_as_planned(day):
    """Nothing is missing, so nobody has to accept a loss."""
    in_sync(day.one, day.two, day.primary)
    day.one.stop()
    day.primary.stop()
    promoted = run_command("promote", "--force", "--serverdir", day.primary.directory)
    assert promoted.returncode == 0 and "term 3" in promoted.stdout, promoted
    day.primary = day.server("primary", port=day.primary.port).start()
    day.two.stop()
    day.two = day.replica("two", day.primary.url, port=day.two.port).start()
    left = run_command("resync", "--primary-url", day.primary.url, "--serverdir", day.one.directory,
                       "--secretfile", day.secret)
    assert left.returncode == 0 and "all changes that are here" in left.stdout, left
    day.one = day.replica("one", day.primary.url, port=day.one.port).start()
    assert "file_upload of " in day.alice("upload", day.clients.save(wheel("evening", "1.0")))
    same(*day.servers)
    assert "snapshot" not in day.two.output()
    for server, installer in zip(day.servers, ("pip", "uv", "pip20")):
        assert day.installed(server, "evening", "app", installer=installer) == {
            "evening": "1.0", "app": "1.0", "public-lib": "1.0"}
