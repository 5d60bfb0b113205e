"""What projects and indexes are to each other: dependents, the state of dependencies, why an index gives what it gives,
how two indexes differ, and what is risky about one."""

import contextlib
import json
import sqlite3
import time
import urllib.parse

import pytest

import devpi_lite
from harness import Server, Upstream, eventually, patched, sdist, upload, upload_docs, documentation, wheel
from replicas import in_sync, primary_at, replica_at

WARNINGS = """
@devpi_lite.route("GET", "/{user}/{index}/+warnings", for_="json", may="read")
def get_warnings(request, index):
    hidden = devpi_lite.hidden_members(request, index)
    return devpi_lite.result_response("warnings", list(devpi_lite.index_warnings(request.app.projects, index, hidden)))
"""


# Helpers


def asked(server, path, user=None, **parameters):
    query = "?" + urllib.parse.urlencode(parameters) if parameters else ""
    reply = server.get("/" + path + query, user=user)
    assert (reply.status, reply.headers["Cache-Control"]) == (200, "private, no-cache"), reply
    return reply.result


def dependents(server, path, user=None):
    """["user/index/project version", ...] of the first page."""
    found = asked(server, path + "/+dependents", user)
    assert found["total"] >= len(found["dependents"])
    return ["%s/%s %s" % (each["index"], each["project"], each["version"]) for each in found["dependents"]]


def states(server, path, user=None):
    """{requirement: (state, index, version)} of a release."""
    return {each["text"]: (each["state"], each["index"], each["version"])
            for each in asked(server, path + "/+dependencies", user)}


def detail(server, path, text, user=None):
    (found,) = [each for each in asked(server, path + "/+dependencies", user) if each["text"] == text]
    return found["detail"]


def steps(server, path, user=None):
    """[(index, verdict, versions that it gives, {rule: versions that are hidden}), ...]."""
    return [(step["index"], step["verdict"], step["versions"]["newest"],
             {hidden["rule"]: hidden["versions"]["newest"] for hidden in step["hidden"]})
            for step in asked(server, path + "/+why", user)["steps"]]


def differences(server, path, user=None, **parameters):
    """{project: [(version, where, names of the files that differ), ...]}."""
    return {each["project"]: [(release["version"], release["where"], [file["filename"] for file in release["files"]])
                              for release in each["releases"]]
            for each in asked(server, path, user, **parameters)["projects"]}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return patched(tmp_path_factory.mktemp("program"), WARNINGS)


@pytest.fixture(scope="module")
def site(program, tmp_path_factory):
    """A server of ann and bob; each test makes indexes of its own. ann/pypi is a mirror of `site.upstream`."""
    upstream = Upstream().start()
    server = Server(tmp_path_factory.mktemp("site") / "server", script=program).start()
    server.upstream = upstream
    for user in ("ann", "bob"):
        server.add_user(user)
    server.add_mirror("ann/pypi", upstream)
    yield server
    if server.running:
        server.kill()
    upstream.stop()


# Requirements


@pytest.mark.parametrize("text, project, specifiers, extras, only_for", [
    ("Click", "click", "", (), ()),
    ("Markdown_It.Py >= 2.2,<3", "markdown-it-py", ">= 2.2,<3", (), ()),
    ("zope.interface (>=4.0)", "zope-interface", ">=4.0", (), ()),
    ("requests[Socks, use_chardet]==2.*,", "requests", "==2.*", ("socks", "use-chardet"), ()),
    ('pygments>=2; python_version < "3.9" and extra == "Code_Style"', "pygments", ">=2", (), ("code-style",)),
    ("tox; 'dev' == extra or extra=='all'", "tox", "", (), ("dev", "all")),
    ("pip @ https://example.org/a;b.zip ; extra == 'x'", "pip", "", (), ("x",)),
    ("a" * 201, None, "", (), ()), ("  ; extra == 'x'", None, "", (), ()), ("", None, "", (), ()),
    ("x " + "(" * 5000, None, "", (), ())])
def test_a_requirement_is_read_leniently(text, project, specifiers, extras, only_for):
    found = devpi_lite.parse_requirement(text)
    if project is None:
        assert found is None
    else:
        assert (found.project, found.specifiers, found.extras, found.only_for) == (project, specifiers, extras, only_for)
        assert found.url == ("https://example.org/a;b.zip" if "@" in text else "")


@pytest.mark.parametrize("text", ['a; extra == "' * 300, "a; extra" + " " * 3900, "a[" * 1900, "a; " + "'" * 3900])
def test_no_requirement_takes_long(text):
    began = time.process_time()
    for _ in range(200):
        devpi_lite.parse_requirement(text)
    assert time.process_time() - began < 2, "a quadratic time would be a minute"


# Dependents


def test_dependents_are_those_whose_latest_version_needs_the_project(site):
    site.add_index("bob/deps")
    upload(site, "bob/deps", wheel("old-user", "1.0", requires_dist=["engine>=1"]),
           wheel("old-user", "2.0", requires_dist=["motor"]),
           wheel("user", "1.0", requires_dist=["motor"]),
           wheel("user", "1.1", requires_dist=["Engine >=1.0", 'engine[fast]; extra == "speed"']),
           sdist("other", "0.1", requires_dist=['engine; extra == "all"']),
           wheel("engine", "1.0", requires_dist=['engine[fast]; extra == "all"']))
    eventually(lambda: dependents(site, "bob/deps/engine") == ["bob/deps/other 0.1", "bob/deps/user 1.1"])
    assert asked(site, "bob/deps/engine/+dependents") == {
        "project": "engine", "total": 2, "next": None, "dependents": [
            {"project": "other", "version": "0.1", "index": "bob/deps",
             "requirements": [{"text": 'engine; extra == "all"', "extras": ["all"]}]},
            {"project": "user", "version": "1.1", "index": "bob/deps",
             "requirements": [{"text": "Engine >=1.0", "extras": []},
                              {"text": 'engine[fast]; extra == "speed"', "extras": ["speed"]}]}]}
    assert dependents(site, "bob/deps/motor") == ["bob/deps/old-user 2.0"]
    assert dependents(site, "ann/pypi/engine") == dependents(site, "bob/deps/engine")      # of all indexes
    assert dependents(site, "bob/deps/nobody-needs-it") == []
    # with the version that needed it, a dependent goes
    assert site.delete("/bob/deps/user/1.1", user="bob").status == 200
    eventually(lambda: dependents(site, "bob/deps/motor") == ["bob/deps/old-user 2.0", "bob/deps/user 1.0"])
    assert site.delete("/bob/deps", user="bob").status == 201
    site.add_index("bob/deps")
    eventually(lambda: asked(site, "bob/deps/motor/+dependents")["total"] == 0)


def test_cached_metadata_of_mirrors_makes_dependents(site):
    site.add_mirror("ann/cache", site.upstream)
    needy = site.upstream.publish(wheel("needy", "2.0", requires_dist=["gadget>=2"]), core_metadata=True)
    site.upstream.publish(wheel("needy", "1.0", requires_dist=["widget"]), core_metadata=True)
    assert site.versions("ann/cache", "needy") and dependents(site, "ann/cache/gadget") == []
    (url,) = [file["url"] for file in site.simple("ann/cache", "needy")["files"] if file["filename"] == needy.filename]
    address = urllib.parse.urljoin("/ann/cache/+simple/needy/", url).partition("#")[0]
    assert site.get(address + ".metadata", headers={"Accept": "*/*"}).status == 200
    eventually(lambda: dependents(site, "ann/cache/gadget") == ["ann/cache/needy 2.0"])
    site.fetch("ann/cache", "needy-1.0-py3-none-any.whl", "needy")       # an older version changes nothing
    site.upstream.remove("needy", needy.filename)
    assert site.post("/ann/cache/+simple/needy/refresh").status == 302
    eventually(lambda: dependents(site, "ann/cache/widget") == ["ann/cache/needy 1.0"])
    assert dependents(site, "ann/cache/gadget") == []
    # another upstream may have something else under the name
    assert site.patch("/ann/cache", {"mirror_url": "http://127.0.0.1:9/"}, user="ann").status == 200
    eventually(lambda: dependents(site, "ann/cache/widget") == [])


def test_two_thousand_dependents_come_in_pages(make_server):
    server = make_server()
    server.add_user("eve")
    server.add_index("eve/dev")
    server.add_index("eve/own", acl_pkg_read=["eve"])
    upload(server, "eve/dev", wheel("first", "1.0", requires_dist=["core"]))
    upload(server, "eve/own", wheel("first", "1.0", requires_dist=["core"]))
    eventually(lambda: len(dependents(server, "eve/dev/core", user="eve")) == 2)
    with contextlib.closing(sqlite3.connect(str(server.directory / "search.db"))) as db, db:
        ids = {user: index_id for user, index_id in db.execute("SELECT idx, index_id FROM sdoc")}
        db.executemany("INSERT INTO requires VALUES ('core', ?, ?, '1.0', ?)", [
            ("p%04d" % number, ids[name], json.dumps(["core>=%d" % number]))
            for number in range(1000) for name in ("dev", "own")])

    def all_pages(user):
        path, seen, totals = "/eve/dev/core/+dependents", [], set()
        while path:
            found = server.get(path, user=user).result
            seen += [(each["project"], each["index"]) for each in found["dependents"]]
            totals.add(found["total"])
            assert 0 < len(found["dependents"]) <= devpi_lite.Limits.dependents
            path = found["next"] and found["next"][len(server.url):]
        assert totals == {len(seen)} == {len(set(seen))}
        return seen

    readable = all_pages("eve")
    assert len(readable) == 2002 and readable[:3] == [("first", "eve/dev"), ("first", "eve/own"), ("p0000", "eve/dev")]
    assert all_pages(None) == [entry for entry in readable if entry[1] == "eve/dev"]
    for odd in ("", "x", "//", "eve/none/p0500", "\ud800/\0", "a/b/c/d"):
        assert server.get("/eve/dev/core/+dependents?after=" + urllib.parse.quote(odd, errors="surrogatepass")).status == 200
    # an index of another form is made anew, as it is after an upgrade
    assert server.stop() == 0
    with contextlib.closing(sqlite3.connect(str(server.directory / "search.db"))) as db, db:
        db.execute("DROP TABLE requires")
        db.execute("PRAGMA user_version = 2")
    server.start()
    eventually(lambda: dependents(server, "eve/dev/core", user="eve") == ["eve/dev/first 1.0", "eve/own/first 1.0"])
    server.restart()
    assert dependents(server, "eve/dev/core") == ["eve/dev/first 1.0"]


def test_a_replica_has_the_same_dependents(tmp_path):
    with contextlib.ExitStack() as stack:
        primary = primary_at(tmp_path / "primary").start()
        stack.callback(primary.kill)
        primary.add_user("eve")
        primary.add_index("eve/dev")
        upload(primary, "eve/dev", wheel("first", "1.0", requires_dist=["core"]))
        replica = replica_at(tmp_path / "replica", primary).start()
        stack.callback(replica.kill)
        in_sync(primary, replica)
        eventually(lambda: dependents(replica, "eve/dev/core") == ["eve/dev/first 1.0"])


# The state of dependencies


def test_the_state_of_each_dependency_is_told_without_asking_upstream(site):
    upstream = site.upstream
    site.add_index("ann/base")
    site.add_index("ann/app", bases=["ann/base", "ann/pypi"])
    for archive in (wheel("cached", "1.0"), wheel("cached", "2.0"), wheel("listed", "1.0"), wheel("private", "9.0"),
                    wheel("withheld", "1.0")):
        upstream.publish(archive)
    upstream.status("withheld", "quarantined", "malware")
    assert site.get("/ann/pypi/+simple/").status == 200
    for name in ("cached", "withheld", "private"):
        assert site.get("/ann/pypi/+simple/%s/" % name).status == 200
    site.fetch("ann/pypi", "cached-1.0-py3-none-any.whl", "cached")
    upload(site, "ann/base", wheel("inherited", "1.5"), wheel("private", "1.0"), wheel("pulled", "1.0"))
    assert site.patch("/ann/base/pulled/1.0", {"yanked": "broken"}, user="ann").status == 200
    linked = "linked @ https://me:secret@example.org/linked.zip"
    expected = {
        "Inherited>=1.2": ("here", "ann/base", "1.5"),
        "inherited>=2": ("no version fits", None, None),
        "cached<2": ("upstream, cached", "ann/pypi", "1.0"),
        "cached>=2": ("upstream, not cached", "ann/pypi", "2.0"),
        "cached": ("upstream, cached", "ann/pypi", "1.0"),
        "cached==3": ("no version fits", None, None),
        "listed>=1": ("upstream, not cached", "ann/pypi", None),
        "private>=2": ("blocked", None, None),
        "private": ("here", "ann/base", "1.0"),
        "withheld": ("blocked", "ann/pypi", None),
        "pulled": ("no version fits", None, None),
        "pulled==1.0": ("here", "ann/base", "1.0"),
        'nowhere; extra == "x"': ("missing", None, None),
        "odd>=x": ("not known", None, None),
        linked: ("elsewhere", None, None)}
    upload(site, "ann/app", wheel("app", "1.0", requires_dist=list(expected)))
    upstream.reset()
    assert states(site, "ann/app/app/1.0") == expected
    assert upstream.requests == []
    assert detail(site, "ann/app/app/1.0", "private>=2") == \
        "the newest is 1.0 on ann/base; ann/base has the name private, and no mirror_whitelist lets mirrors in for it"
    assert detail(site, "ann/app/app/1.0", "pulled") == "1.0 on ann/base is yanked"
    assert detail(site, "ann/app/app/1.0", "cached==3") == "the newest is 2.0 on ann/pypi"
    assert detail(site, "ann/app/app/1.0", linked) == "comes from https://example.org/linked.zip"
    extras = {each["text"]: each["extras"] for each in asked(site, "ann/app/app/1.0/+dependencies")}
    assert extras['nowhere; extra == "x"'] == ["x"] and extras["cached"] == []
    # with the name on a whitelist, the mirror counts
    reply = site.patch("/ann/app", ["mirror_whitelist+=private"], user="ann")
    assert reply.status == 200, reply
    assert states(site, "ann/app/app/1.0")["private>=2"] == ("upstream, not cached", "ann/pypi", "9.0")
    # without mirrors, a version is too old, or yanked
    site.add_index("ann/alone", bases=["ann/base"])
    upload(site, "ann/alone", wheel("app", "1.0", requires_dist=["inherited>=2", "pulled", "private<0.9"]))
    assert set(states(site, "ann/alone/app/1.0").values()) == {("no version fits", None, None)}
    assert detail(site, "ann/alone/app/1.0", "pulled") == "1.0 on ann/base is yanked"
    # a quarantined version fits, and is not offered; the first index with the project has another
    reply = site.patch("/ann/base/private", {"project-status": {"status": "quarantined", "reason": "odd"}}, user="ann")
    assert reply.status == 200, reply
    upload(site, "ann/alone", wheel("private", "0.8"), wheel("private", "0.9"))
    site.add_index("ann/first", bases=["ann/alone", "ann/pypi"])
    upload(site, "ann/first", wheel("app", "1.0", requires_dist=["private>=1"]))
    assert detail(site, "ann/first/app/1.0", "private>=1").startswith("the newest is 0.9 on ann/alone; ")
    # a version of which no metadata is here, and one that is nowhere
    assert asked(site, "ann/app/cached/2.0/+dependencies") is None
    assert asked(site, "ann/app/cached/1.0/+dependencies") == []
    assert site.get("/ann/app/nowhere/1.0/+dependencies").status == 404


def test_off_line_it_is_told_what_can_not_be_installed(make_server, upstream):
    upstream.publish(wheel("part", "1.0"))
    upstream.publish(wheel("part", "2.0"))
    upstream.publish(wheel("listed", "1.0"))
    server = make_server()
    server.add_user("eve")
    server.add_mirror("eve/pypi", upstream)
    server.add_index("eve/dev", bases=["eve/pypi"])
    needs = ["part<2", "part>=2", "listed", "unheard"]
    upload(server, "eve/dev", wheel("app", "1.0", requires_dist=needs))
    assert states(server, "eve/dev/app/1.0")["listed"] == ("not known", "eve/pypi", None)
    assert steps(server, "eve/dev/listed")[1][:2] == ("eve/pypi", "not known")
    assert server.get("/eve/pypi/+simple/").status == 200
    server.fetch("eve/pypi", "part-1.0-py3-none-any.whl", "part")
    server.restart("--offline-mode")
    assert states(server, "eve/dev/app/1.0") == {
        "part<2": ("upstream, cached", "eve/pypi", "1.0"), "part>=2": ("off-line", "eve/pypi", "2.0"),
        "listed": ("off-line", "eve/pypi", None), "unheard": ("missing", None, None)}
    assert steps(server, "eve/dev/part") == [
        ("eve/dev", "nothing", [], {}), ("eve/pypi", "gives", ["1.0"], {"off-line": ["2.0"]})]
    (step,) = [step for step in asked(server, "eve/dev/listed/+why")["steps"] if step["index"] == "eve/pypi"]
    assert (step["verdict"], step["reason"], step["setting"]) == (
        "nothing", "nothing of it is here, and this server is off-line", "start the server without --offline-mode")


# Why


def test_why_walks_the_resolution_order(site):
    upstream = site.upstream
    upstream.publish(wheel("walk", "3.0"))
    site.add_index("bob/base")
    site.add_index("bob/walk", bases=["bob/base", "ann/pypi"])
    upload(site, "bob/walk", wheel("walk", "1.0"))
    upload(site, "bob/base", wheel("walk", "1.0", summary="another"), wheel("walk", "1.1"), wheel("walk", "2.0"))
    assert site.patch("/bob/base/walk/1.1", {"yanked": "broken"}, user="bob").status == 200
    upstream.reset()
    assert asked(site, "bob/walk/walk/+why") == {"index": "bob/walk", "project": "walk", "steps": [
        {"index": "bob/walk", "verdict": "gives", "reason": "they were uploaded there", "setting": None,
         "versions": {"total": 1, "newest": ["1.0"]}, "hidden": []},
        {"index": "bob/base", "verdict": "gives", "reason": "they were uploaded there", "setting": None,
         "versions": {"total": 1, "newest": ["2.0"]}, "hidden": [
             {"rule": "shadowed", "reason": "files of the same names come from an index before", "setting": None,
              "versions": {"total": 1, "newest": ["1.0"]}},
             {"rule": "yank", "reason": "they are yanked: installers take them only if they are asked for by number",
              "setting": "devpi yank --undo --index bob/base walk==VERSION", "versions": {"total": 1, "newest": ["1.1"]}}]},
        {"index": "ann/pypi", "verdict": "blocked",
         "reason": "bob/base has the name walk, and no mirror_whitelist lets mirrors in for it",
         "setting": "devpi index bob/walk mirror_whitelist+=walk", "versions": {"total": 0, "newest": []}, "hidden": []}]}
    assert upstream.requests == []
    # the setting that is named does what is said
    assert site.patch("/bob/walk", ["mirror_whitelist+=walk"], user="bob").status == 200
    assert sorted(site.versions("bob/walk", "walk")) == ["1.0", "1.1", "2.0", "3.0"]
    step = asked(site, "bob/walk/walk/+why")["steps"][-1]
    assert (step["verdict"], step["versions"]["newest"]) == ("gives", ["3.0"])
    assert step["reason"].startswith("upstream's page lists them, as of 20")
    assert step["reason"].endswith("; the mirror_whitelist of bob/walk lets it in")
    # the first index's quarantine withholds all
    reply = site.patch("/bob/walk/walk", {"project-status": {"status": "quarantined", "reason": "odd"}}, user="bob")
    assert reply.status == 200, reply
    assert [step[1:] for step in steps(site, "bob/walk/walk")] == [
        ("nothing", [], {"quarantine": ["1.0"]}), ("nothing", [], {"quarantine": ["2.0", "1.1", "1.0"]}),
        ("nothing", [], {"quarantine": ["3.0"]})]
    assert site.filenames("bob/walk", "walk") == []


def test_why_there_is_nothing(site):
    site.add_index("bob/gone")
    site.add_index("bob/kept", bases=["bob/gone", "ann/pypi"])
    upload(site, "bob/kept", wheel("kept", "1.0"))
    assert site.delete("/bob/kept/kept/1.0", user="bob").status == 200
    why = asked(site, "bob/kept/kept/+why")["steps"]
    assert [(step["index"], step["verdict"]) for step in why] == [
        ("bob/kept", "nothing"), ("bob/gone", "nothing"), ("ann/pypi", "blocked")]
    assert why[0]["reason"] == "it has the project without files, and keeps the name private"
    assert site.get("/ann/pypi/+simple/").status == 200
    why = asked(site, "bob/kept/never-heard/+why")["steps"]
    assert (why[-1]["verdict"], why[-1]["reason"]) == ("nothing", "upstream's project list does not have the name")
    assert site.delete("/bob/gone?force", user="bob").status == 201
    why = asked(site, "bob/kept/never-heard/+why")["steps"]
    assert [(step["index"], step["verdict"], step["setting"]) for step in why] == [
        ("bob/kept", "nothing", None), ("bob/gone", "no index", "devpi index bob/kept bases-=bob/gone"),
        ("ann/pypi", "blocked", "devpi index bob/kept mirror_whitelist+=never-heard")]
    assert asked(site, "bob/kept/+warnings") == [
        "bob/kept has bob/gone among its bases, which does not exist: mirrors are shut out for names that no whitelist "
        "lets in."]
    upload(site, "bob/kept", wheel("kept-app", "1.0", requires_dist=["never-heard"]))
    assert detail(site, "bob/kept/kept-app/1.0", "never-heard") == \
        "bob/gone does not exist, and may have had the name never-heard"


# What one may not read leaves no trace


def test_an_unreadable_index_leaves_no_trace(site):
    site.add_index("bob/secret", acl_pkg_read=["bob"])
    site.add_index("bob/above", bases=["bob/secret", "ann/pypi"], volatile=False)
    upload(site, "bob/secret", wheel("known", "1.0", requires_dist=["hushed"]))
    upload(site, "bob/above", wheel("plain", "1.0", requires_dist=["known", "unknown"]))
    eventually(lambda: dependents(site, "bob/above/hushed", user="bob") == ["bob/secret/known 1.0"])
    assert asked(site, "bob/above/hushed/+dependents")["total"] == 0
    assert states(site, "bob/above/plain/1.0", user="bob")["known"] == ("here", "bob/secret", "1.0")
    for user in (None, "ann"):
        words = [json.dumps(asked(site, "bob/above/%s/+why" % name, user)).replace(name, "NAME")
                 for name in ("known", "unknown")]
        assert words[0] == words[1] and "secret" not in words[0]
        assert "an index that you may not read may have the name" in words[0]
        assert set(states(site, "bob/above/plain/1.0", user).values()) == {("blocked", None, None)}
        assert "secret" not in json.dumps(asked(site, "bob/above/plain/1.0/+dependencies", user))
        assert "secret" not in json.dumps(asked(site, "bob/above/+warnings", user))
        known, unknown = (site.get("/bob/above/%s/1.0/+dependencies" % name, user=user) for name in ("known", "unknown"))
        assert (known.status, known.text) == (unknown.status, unknown.text.replace("unknown", "known"))
        assert known.status == (401 if user is None else 403)
        for path in ("bob/secret/known/+why", "bob/secret/known/+dependents", "bob/secret/known/1.0/+dependencies",
                     "bob/secret/+compare/bob/above", "bob/above/+compare/bob/secret"):
            reply = site.get("/" + path, user=user)
            assert reply.status == known.status and "known" not in reply.text, path
    assert "bob/secret" in json.dumps(asked(site, "bob/above/+warnings", "bob"))
    assert "known" in differences(site, "bob/secret/+compare/bob/above", user="bob")


# Comparison


def test_two_indexes_are_compared_by_versions_and_hashes(site):
    site.add_index("ann/test", bases=["ann/pypi"])
    site.add_index("ann/prod")
    same, docs = wheel("same", "1.0"), documentation("same", "1.0")
    upload(site, "ann/test", same, wheel("mine", "1.0"), wheel("half", "1.0"), sdist("half", "1.1"), wheel("odd", "1.0rc1"))
    upload(site, "ann/prod", same, wheel("theirs", "2.0"), wheel("half", "1.0", summary="other"), wheel("half", "0.9"))
    upload(site, "ann/prod", wheel("odd", "1.0rc1"))
    upload_docs(site, "ann/test", docs)
    assert differences(site, "ann/test/+compare/ann/prod") == {
        "half": [("1.1", "only here", ["half-1.1.tar.gz"]), ("1.0", "both", ["half-1.0-py3-none-any.whl"]),
                 ("0.9", "only there", ["half-0.9-py3-none-any.whl"])],
        "mine": [("1.0", "only here", ["mine-1.0-py3-none-any.whl"])],
        "same": [("1.0", "both", [docs.filename])],
        "theirs": [("2.0", "only there", ["theirs-2.0-py3-none-any.whl"])]}
    found = asked(site, "ann/test/+compare/ann/prod", after="half")
    assert [(each["project"], each["where"], each["releases"][0]["push"]) for each in found["projects"]] == [
        ("mine", "only here", "devpi push --index ann/test mine==1.0 ann/prod"),
        ("same", "both", "devpi push --index ann/test same==1.0 ann/prod"), ("theirs", "only there", None)]
    assert found["next"] is None
    # the command does what is said
    assert site.push("ann/test", "same", "1.0", targetindex="ann/prod").status == 200
    assert "same" not in differences(site, "ann/test/+compare/ann/prod")
    assert differences(site, "ann/test/+compare/ann/test") == {}
    reply = site.get("/ann/test/+compare/ann/pypi")
    assert (reply.status, reply.json()["message"]) == (400, "ann/pypi is a mirror: only stages can be compared")
    assert site.get("/ann/test/+compare/ann/none").status == 404


def test_a_comparison_comes_in_pages(make_server, tmp_path):
    code = "devpi_lite.Limits.compared, devpi_lite.compare_indexes.__defaults__ = 3, ('', 2)"
    server = make_server(script=patched(tmp_path, code))
    server.add_user("eve")
    server.add_index("eve/a")
    server.add_index("eve/b")
    for number in range(9):
        archive = wheel("p%d" % number, "1.0")
        upload(server, "eve/a", archive)
        if number in (1, 2, 3, 4, 5):
            upload(server, "eve/b", archive)
    path, pages = "/eve/a/+compare/eve/b", []
    while path:
        found = server.get(path).result
        pages.append([each["project"] for each in found["projects"]])
        path = found["next"] and found["next"][len(server.url):]
    assert pages == [["p0"], [], ["p6", "p7"], ["p8"]]


# Warnings


def test_what_is_risky_about_an_index_is_said(site, upstream):
    site.add_index("ann/loose", acl_upload=[":ANONYMOUS:"])
    site.add_index("ann/firm", volatile=False, bases=["ann/loose", "ann/pypi"])
    assert asked(site, "ann/loose/+warnings") == ["Anyone may upload to ann/loose: :ANONYMOUS: is in its acl_upload."]
    assert asked(site, "ann/firm/+warnings") == [
        "ann/firm is non-volatile, but its base ann/loose is volatile: files that come from there can change."]
    site.add_mirror("ann/lost", upstream, mirror_cache_expiry=0)
    upstream.publish("thing", "1.0")
    assert site.versions("ann/lost", "thing") == ["1.0"]
    assert asked(site, "ann/lost/+warnings") == []
    upstream.fault("reset", "*")
    site.get("/ann/lost/+simple/thing/")
    (warning,) = asked(site, "ann/lost/+warnings")
    assert warning.startswith("ann/lost has had no contact with its upstream since 20")
    site.add_mirror("ann/none", upstream)
    assert site.patch("/ann/none", {"mirror_url": "http://127.0.0.1:9/"}, user="ann").status == 200
    assert asked(site, "ann/none/+warnings") == []


def test_off_line_is_said(make_server, upstream, program):
    server = make_server("--offline-mode", script=program)
    server.add_user("eve")
    server.add_mirror("eve/pypi", upstream)
    server.add_index("eve/dev", bases=["eve/pypi"])
    assert asked(server, "eve/dev/+warnings") == ["This server is off-line: of eve/pypi it has only what is here."]
