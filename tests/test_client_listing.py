"""The client's looks at releases, and their removal: list, remove, yank, refresh, and the grammar of requirements."""

import json
import urllib.parse

import pytest

from client import Client, Gate, file_path, file_url
from harness import Upstream, new_index, sdist, wheel


def upload(site, index, *archives):
    """Uploads them; returns their URLs."""
    for archive in archives:
        assert site.upload(index, archive).status == 200
    return [file_url(site, index, archive) for archive in archives]


def report(host="ci-1", **envs):
    """A tox report; each environment is its list of test commands as (command, return code, output)."""
    return {"reportversion": "1", "toxversion": "4.23.2", "platform": "linux", "host": host, "testenvs": {
        env: {"python": {"version": "3.11.7 (main, Nov 1 2026)"},
              "setup": [{"command": ["pip"], "output": "", "retcode": 0}],
              "test": [{"command": command.split(), "output": output, "retcode": code} for command, code, output in tests]}
        for env, tests in envs.items()}}


def post(site, index, archive, result, **options):
    reply = site.post("/" + file_path(index, archive), result, user="alice")
    assert reply.status == 200, reply


# -- list


def test_list_shows_projects_and_their_newest_versions(devpi, site, index):
    assert devpi("list") == devpi("list", "-v") == ""
    base = new_index(site, "alice")
    site.patch("/" + index, ["bases=" + base], user="alice")
    upload(site, index, wheel("zeta", "1.0"), wheel("Alpha.Beta", "1.9"), wheel("Alpha.Beta", "1.10"))
    upload(site, base, wheel("alpha-beta", "2.0"), wheel("inherited", "1.0"))
    assert devpi("list").lines == ["alpha-beta", "zeta"]
    assert devpi("list", "-v").lines == ["alpha-beta==2.0", "zeta==1.0"]
    assert devpi("-v", "list", "--ignore-bases").lines == ["alpha-beta==1.10", "zeta==1.0"]
    assert devpi("list", "-v", "--all").lines == ["alpha-beta==1.9", "alpha-beta==1.10", "alpha-beta==2.0", "zeta==1.0"]
    printed = devpi("list", "--json")
    assert printed.errors == "" and "alpha-beta" in json.dumps(printed.json())


def test_list_shows_the_files_of_the_three_newest_versions_or_of_all(devpi, site, index):
    urls = upload(site, index, wheel("demo", "2.0rc1"), wheel("demo", "1.10"), sdist("demo", "1.10"), wheel("demo", "1.9"),
                  wheel("demo", "1.0"), wheel("demo", "0.9"))
    assert devpi("list", "demo").lines == urls[:4] + ["2 older versions not shown, use --all to see"]
    assert devpi("list", "--all", "demo").lines == devpi("list", "Demo", "--all").lines == urls
    assert "404 Not Found: no project 'nosuch-zzz'" in devpi("list", "nosuch-zzz", expect=1).lines
    listed = json.dumps(devpi("list", "--all", "demo", "--json").json())
    assert all(url in listed for url in urls)


def test_list_tells_own_files_from_inherited_and_shadowed_ones(devpi, site, index):
    base = new_index(site, "alice")
    site.patch("/" + index, ["bases=" + base], user="alice")
    (own,) = upload(site, index, wheel("shadow", "1.0"))
    shadowed, inherited = upload(site, base, sdist("shadow", "1.0"), sdist("shadow", "1.1"))
    assert devpi("list", "shadow").lines == [inherited, own, shadowed]
    assert devpi("list", "--ignore-bases", "shadow").lines == [own]
    assert devpi("list", "shadow", PY_COLORS="1").lines == [
        inherited, "\033[1m%s\033[0m" % own, "\033[31m%s\033[0m" % shadowed]


@pytest.mark.parametrize("requirement, versions", [
    ("demo", "1!1.0 2.0+abc 2.0 2.0rc1 1.10 1.9.post1 1.9 1.0.dev3"),
    ("demo==1.*", "1.10 1.9.post1 1.9 1.0.dev3"),
    ("demo>=1.10,<2", "1.10"),
    ("demo ~= 1.9", "1.10 1.9.post1 1.9"),
    ("Demo!=1.9,!=1.10,<2", "1.9.post1 1.0.dev3"),
    ("demo[extra]>2.0", "1!1.0"),
    ("demo<=1.9", "1.9 1.0.dev3"),
    ("demo==2.0", "2.0+abc 2.0"),
    ("demo===2.0", "2.0"),
    ("demo==2.0+abc", "2.0+abc"),
    ("demo==1!1.0", "1!1.0"),
    ("demo==2.0.0.0rc1", "2.0rc1"),
    ("demo>9!0", ""),
])
def test_requirements_choose_versions(demo, requirement, versions):
    """PEP 508 names and extras with PEP 440 specifiers, pre-releases always among them."""
    printed = demo("list", "--all", requirement)
    assert " ".join(urllib.parse.unquote(url).rpartition("/")[2].split("-")[1] for url in printed.lines) == versions


@pytest.fixture(scope="module")
def demo(site, tmp_path_factory):
    """The client on an index with many versions of the project demo."""
    index = new_index(site, "alice")
    upload(site, index, *[wheel("demo", version) for version in (
        "1.0.dev3", "1.9", "1.9.post1", "1.10", "2.0rc1", "2.0", "2.0+abc", "1!1.0")])
    return Client(tmp_path_factory.mktemp("demo") / "home").sign_in(site, "alice", index)


def test_what_is_no_requirement_is_refused(demo):
    for words in (["list"], ["remove", "-y"], ["test"]):
        assert "invalid requirement 'demo>>1'" in demo(*words, "demo>>1", expect=1)


def test_list_shows_test_results_below_their_file(devpi, site, index):
    archives = [wheel("tested", "1.0"), sdist("tested", "1.0")]
    urls = upload(site, index, *archives)
    passing = ("pytest -q", 0, "2 passed")
    post(site, index, archives[1], report(py311=[("pytest -q", 1, "an old failure")]))
    post(site, index, archives[1], report(py311=[passing], **{"py312": [passing], ".pkg": [passing]}))
    post(site, index, archives[1], report(host="ci-2", py311=[passing, ("flake8 src", "1", "src.py:1\nbad style")], lint=[]))
    post(site, index, archives[0], {"no": "report"})
    row = "%-10s %-7s %-10s"
    expected = [
        urls[0], urls[1], row % ("ci-2", "linux", "lint") + " 3.11.7 no tests were run",
        row % ("ci-2", "linux", "py311") + " 3.11.7 tests failed",
        row % ("ci-1", "linux", "py311") + " 3.11.7 tests passed", row % ("ci-1", "linux", "py312") + " 3.11.7 tests passed"]
    printed = devpi("list", "-t", "tested")
    corrupt = [line for line in printed.lines if line.startswith("corrupt toxresult, skipping: ")]
    assert len(corrupt) == 1 and [line for line in printed.lines if line not in corrupt] == expected
    failures = devpi("list", "-f", "tested").lines
    at = failures.index(expected[3])
    assert failures[at + 1:at + 5] == [
        "    OK: pytest -q", "    FAIL: flake8 src", "    src.py:1", "    bad style"]
    results = devpi("list", "-t", "--json", "tested").json()["releases"][0]["files"][1]["test_results"]
    assert [(result["host"], result["environment"], result["passed"]) for result in results] == [
        ("ci-2", "lint", False), ("ci-2", "py311", False), ("ci-1", "py311", True), ("ci-1", "py312", True)]


def test_results_of_a_protected_index_are_shown_to_who_may_read_it(devpi, site):
    index = new_index(site, "alice", acl_pkg_read=["alice"])
    archive = wheel("guarded", "1.0")
    upload(site, index, archive)
    post(site, index, archive, report(py311=[("pytest", 0, "")]))
    assert devpi("list", "--index", index, "-t", "guarded").lines[-1].endswith("tests passed")


@pytest.mark.parametrize("options", [(), ("--all",), ("--ignore-bases",)])
def test_a_mirrors_projects_are_listed_without_asking_for_each(devpi, site, index, upstream, options):
    mirror = index + "m"
    site.add_mirror(mirror, upstream, acl_pkg_read=["alice"])
    for number in range(12):
        upstream.publish("mirrored%d" % number, "1.0")
    printed = devpi("list", "-v", "--index", mirror, *options)
    assert printed.lines == sorted("mirrored%d" % number for number in range(12))
    assert "versions of mirrored projects are not asked for" in printed.errors
    assert upstream.count("/simple/mirrored*") == 0
    listed = devpi("list", "-v", "--json", "--index", mirror, *options).json()["projects"]
    assert listed[0] == {"name": "mirrored0", "versions": None} and len(listed) == 12


def test_projects_that_a_mirror_may_add_to_are_listed_as_the_index_has_them(devpi, site, index, upstream):
    """A mirror behind two bases; only what a whitelist names would get to it."""
    mirror, base, theirs = index + "m", new_index(site, "alice"), new_index(site, "alice")
    site.add_mirror(mirror, upstream)
    for name in ("listed1", "listed2", "private1"):
        upstream.publish(name, "9.0")
        upload(site, index, wheel(name, "1.0"))
    upload(site, base, wheel("private1", "2.0"))
    site.patch("/" + theirs, ["bases=" + mirror], user="alice")
    site.patch("/" + base, ["bases=" + theirs], user="alice")
    site.patch("/" + index, ["bases=" + base, "mirror_whitelist=Listed1,listed2"], user="alice")
    printed = devpi("list", "-v")
    assert printed.lines == ["listed1==1.0", "listed2==1.0", "private1==2.0"]
    assert "versions of mirrored projects are not asked for" in printed.errors
    for name in (index, base, theirs):
        site.patch("/" + name, ["mirror_whitelist=*"], user="alice")
    assert devpi("list", "-v").lines == ["listed1==1.0", "listed2==1.0", "private1==1.0"]
    site.patch("/" + index, ["mirror_whitelist="], user="alice")
    for name in (base, theirs):
        site.patch("/" + name, ["mirror_whitelist="], user="alice")
    assert devpi("list", "-v") == "listed1==1.0\nlisted2==1.0\nprivate1==2.0\n"
    assert devpi("list", "-v").errors == ""
    assert upstream.count("*") == 0


# -- remove


def test_versions_that_match_are_removed(devpi, site, index):
    archives = [wheel("old", "1.0"), sdist("old", "1.0"), wheel("old", "1.1"), wheel("old", "2.0")]
    urls = upload(site, index, *archives)
    printed = devpi("remove", "-y", "old<2")
    assert printed.lines == [
        "About to remove the following releases and distributions",
        "version: 1.0", "  - " + urls[0], "  - " + urls[1], "version: 1.1", "  - " + urls[2],
        "Are you sure (yes/no)? yes (autoset from -y option)",
        "deleting release 1.0 of old", "deleting release 1.1 of old"]
    assert site.versions(index, "old") == ["2.0"]
    assert "No releases or distributions found matching 'old==9'." in devpi("remove", "-y", "old==9", expect=1).lines
    printed = devpi("remove", "old", input="no\n")
    assert printed.lines[-1].endswith("not deleting anything") and site.versions(index, "old") == ["2.0"]
    assert "no input available, use -y to confirm" in devpi("remove", "old", expect=1)
    printed = devpi("remove", "old", input="maybe\nyes\n")
    assert "not a valid choice 'maybe'" in printed and devpi("list") == ""
    assert "404 Not Found: no project 'old'" in devpi("remove", "-y", "old", expect=1)


def test_what_is_inherited_is_not_removed(devpi, site, index):
    base = new_index(site, "alice")
    site.patch("/" + index, ["bases=" + base], user="alice")
    upload(site, base, wheel("theirs", "1.0"))
    refused = devpi("remove", "-y", "theirs", expect=1)
    assert "No releases or distributions found matching 'theirs'." in refused.lines
    upload(site, index, wheel("theirs", "2.0"))
    devpi("remove", "-y", "theirs")
    assert site.versions(base, "theirs") == ["1.0"] and devpi("list") == ""


def test_an_emptied_project_is_removed_and_its_name_is_free(devpi, site, index):
    upload(site, index, wheel("emptied", "1.0"))
    assert "stays private" in devpi("remove", "-y", "emptied==1.0")
    assert devpi("list").lines == ["emptied"]
    assert "No releases or distributions found" in devpi("remove", "-y", "emptied==1.0", expect=1)
    assert "not deleting anything" in devpi("remove", "emptied", input="no\n")
    printed = devpi("remove", "-y", "Emptied")
    assert "the name emptied is free on %s now: mirrors may answer for it" % index in printed
    assert devpi("list") == ""
    upload(site, index, wheel("emptied", "2.0"))
    devpi("remove", "-y", "emptied==2.0")
    document = devpi("remove", "-y", "--json", "emptied").json()
    assert (document["project"], document["removed"]) == ("emptied", [])
    assert "is free" in document["notes"][0]
    assert site.get("/" + index).result["projects"] == []


def test_an_emptied_project_of_a_non_volatile_index_goes_by_force_only(devpi, site):
    index = new_index(site, "alice", volatile=False)
    upload(site, index, wheel("emptied", "1.0"))
    devpi("remove", "-y", "-f", "--index", index, "emptied==1.0")
    assert "-f does it" in devpi("remove", "-y", "--index", index, "emptied", expect=1)
    assert "is free" in devpi("remove", "-y", "-f", "--index", index, "emptied")


def test_a_file_is_removed_by_its_url(devpi, site, index):
    archives = [wheel("parts", "1.0"), sdist("parts", "1.0")]
    urls = upload(site, index, *archives)
    assert devpi("remove", "-y", urls[0]).lines[:2] == ["About to remove the following file:", urls[0]]
    assert site.filenames(index, "parts") == [archives[1].filename]
    unknown = file_url(site, index, wheel("parts", "7.0"))
    assert "404 Not Found: package '%s' doesn't exist" % unknown[len(site.url) + 1:] in devpi("remove", "-y", unknown, expect=1)


def test_from_a_non_volatile_index_things_go_by_force_only(devpi, site):
    index = new_index(site, "alice", volatile=False)
    kept = [wheel("kept", "1.0"), wheel("kept", "2.0"), sdist("kept", "2.0")]
    urls = upload(site, index, *kept)
    for target in ("kept", "kept==1.0", urls[1]):
        assert "403 Forbidden" in devpi("remove", "-y", "--index", index, target, expect=1)
    assert len(site.filenames(index, "kept")) == 3
    devpi("remove", "-y", "-f", "--index", index, urls[1])
    devpi("remove", "-y", "--force", "--index", index, "kept==1.0")
    assert site.filenames(index, "kept") == [kept[2].filename]


def test_removal_needs_a_login_before_it_asks(devpi, site):
    other = new_index(site, "bob")
    upload(site, other, wheel("bobs", "1.0"))
    assert "403 Forbidden" in devpi("remove", "-y", "--index", other, "bobs", expect=1)
    devpi.sign_in(site, None, other)
    printed = devpi("remove", "bobs", expect=1)
    assert "you need to be logged in" in printed and "About to remove" not in printed
    assert site.versions(other, "bobs") == ["1.0"]


def test_removal_as_json_says_what_went(devpi, site, index):
    upload(site, index, wheel("gone", "1.0"))
    printed = devpi("remove", "-y", "--json", "gone==1.0")
    assert "1.0" in json.dumps(printed.json()) and devpi("list", "gone") == ""


# -- yank


def test_a_release_is_yanked_with_a_reason_and_taken_back(devpi, site, index):
    upload(site, index, wheel("bad", "1.0"), sdist("bad", "1.0"), wheel("bad", "2.0"))

    def yanked():
        return {file["filename"]: file.get("yanked", False) for file in site.simple(index, "bad")["files"]}

    devpi("yank", "--reason", "loses data", "bad==1.0")
    assert yanked() == {
        "bad-1.0-py3-none-any.whl": "loses data", "bad-1.0.tar.gz": "loses data", "bad-2.0-py3-none-any.whl": False}
    devpi("yank", "--undo", "bad==1.0")
    assert not any(yanked().values())
    devpi("yank", "bad==2.0")
    assert yanked()["bad-2.0-py3-none-any.whl"] is True
    assert "'bad==9.9'" in devpi("yank", "bad==9.9", expect=1)
    devpi("yank", "bad", expect=None)
    for missing in (file_url(site, index, wheel("bad", "7.0")), "%s/%s/nosuch/1.0" % (site.url, index)):
        refused = devpi("yank", missing, expect=1)
        assert "PATCH %s?yank=" % missing in refused.lines and "does not support" not in refused
    devpi("yank", "-r", "only this", file_url(site, index, sdist("bad", "1.0")))
    assert yanked() == {"bad-1.0-py3-none-any.whl": False, "bad-1.0.tar.gz": "only this", "bad-2.0-py3-none-any.whl": True}


# -- refresh


def test_refresh_asks_upstream_again(devpi, site):
    upstream = Upstream().start()
    try:
        mirror = "alice/" + new_index(site, "alice").partition("/")[2] + "m"
        site.add_mirror(mirror, upstream, mirror_cache_expiry=3600, acl_pkg_read=["alice"])
        for name in ("fresh", "fresher"):
            upstream.publish(name, "1.0")
            assert site.versions(mirror, name, user="alice") == ["1.0"]
            upstream.publish(name, "2.0")
        assert devpi("refresh", "--index", mirror, "fresh", "Fresher").lines == ["Refreshed fresh", "Refreshed Fresher"]
        for name in ("fresh", "fresher"):
            assert sorted(site.versions(mirror, name, user="alice")) == ["1.0", "2.0"]
    finally:
        upstream.stop()


def test_a_refresh_that_fails_says_so(devpi, site, index):
    gate = Gate(site)
    try:
        devpi.sign_in(site, "alice", index, url=gate.url)
        gate.fault("POST /%s/+simple/" % index, "answer", status=500)
        url = "%s/%s/+simple/six/refresh" % (gate.url, index)
        assert "Couldn't refresh six via %s: 500 Internal Server Error" % url in devpi("refresh", "six", expect=1).lines
    finally:
        gate.close()
