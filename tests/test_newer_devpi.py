"""The words of devpi 7 on the wire: rules, project configuration, version 2 of results [W8.8, W8.10, W12.6, W12.7, W12.8]."""

import email.utils
import itertools
import re

import pytest

from harness import (
    SIMPLE_JSON, Upstream, audited, documentation, links, path_of, project_list, sdist, serial, serial_of, submit, upload_docs, wheel)

RULES, TRUST = "project_inheritance_rules", "trust_inheritance_rules_from"
BLOCK = "block type:remote if local_exists"
NO_CHANGES = "The requested modifications resulted in no changes"
DEAD = "http://127.0.0.1:9/simple/"

numbers = itertools.count(1)


@pytest.fixture(scope="module")
def public():
    """An upstream that has `p` 9.0 and `quiet` 9.0."""
    upstream = Upstream().start()
    upstream.publish("p", "9.0")
    upstream.publish("quiet", "9.0")
    yield upstream
    upstream.stop()


@pytest.fixture(scope="module")
def site(shared_server, public):
    """The shared server with users and the mirrors R, R2, N (without project list), X (has not p), D (is dead)."""
    shared_server.login("root", "secret")
    for name in ("alice", "bob", "carol"):
        shared_server.add_user(name, "pw")
        shared_server.login(name, "pw")
    lacking = Upstream().start()
    for name, url in (("R", public.url), ("R2", public.url), ("X", lacking.url), ("D", DEAD)):
        shared_server.add_mirror("alice/" + name, url)
    shared_server.add_mirror("alice/N", public.url, mirror_no_project_list=True)
    yield shared_server
    lacking.stop()


def fresh(site, word="dev", **config):
    """The path of a fresh stage of alice's."""
    index = "alice/%s%d" % (word, next(numbers))
    site.add_index(index, **config)
    return index


def message(reply):
    return reply.status, reply.json()["message"]


def configure(site, index, project, body, query="", method="PATCH", user="alice"):
    return site.request(method, "/%s/%s%s" % (index, project, query), body, user=user)


def release(site, index, name="p", version="1.0"):
    archive = wheel(name, version)
    assert site.upload(index, archive).status == 200
    return archive


# The rule: who sees what


TRUTH = {     # number: (the stages, the asked one first, with what they hold and their bases; what is seen of p)
    1: ("L(u1) R", "1.0"), 2: ("L R", "9.0"), 3: ("L(u1 A) R", "1.0 9.0"), 4: ("L(u1 P) R", "1.0 9.0"),
    5: ("L(registered) R", ""), 6: ("L B; B(u2) R", "2.0"), 7: ("L B; B(u2 A) R", "2.0"),
    8: ("L(T) B; B(u2 A) R", "2.0 9.0"), 9: ("L B; B(u2 P) R", "2.0"), 10: ("L(T) B; B(u2 P) R", "2.0 9.0"),
    11: ("L(u1 T) B; B(A) R", "1.0 9.0"), 12: ("L(u1 T) B; B(P) R", "1.0 9.0"), 13: ("L(u1) B; B(A) R", "1.0"),
    14: ("L(A) B; B(u2) R", "2.0 9.0"), 15: ("L(P) B; B(u2) R", "2.0 9.0"), 16: ("L B R; B(u2)", "2.0"),
    17: ("L R B; B(u2)", "2.0"), 18: ("L R R2", "9.0"), 19: ("L(u1) R R2", "1.0"), 20: ("L(u1 P) R R2", "1.0 9.0"),
    21: ("L B C; B(u2) R; C R2", "2.0"), 22: ("L(T) B C; B(u2) R; C(A) R2", "2.0 9.0"),
    23: ("L(T) B C; B(u2 P) R; C(u3)", "2.0 3.0 9.0"), 24: ("L(T) C B; C(u3); B(u2 P) R", "2.0 3.0 9.0"),
    25: ("L N", "9.0"), 26: ("L(u1) N", "1.0"), 27: ("L(u1 P) N", "1.0 9.0"), 28: ("L(u1 A) X", "1.0"),
    29: ("L(P) R", "9.0"), 30: ("L(u1 A T) B; B(u2) R", "1.0 2.0 9.0"), 31: ("L(T) B; B(T) C; C(u3 A) R", "3.0 9.0"),
    32: ("L(T) B; B C; C(u3 A) R", "3.0 9.0"), 33: ("L B; B(T) C; C(u3 A) R", "3.0"),
    34: ("L(P) B N; B(u2)", "2.0 9.0"), 35: ("L(A) B; B R", "9.0")}
MIRRORS = ("R", "R2", "N", "X", "D")
BY_WORDS_OF = {"7": {"A": {RULES: ["allow all"]}, "T": {TRUST: "type:not remote"}},
               "6": {"A": {"mirror_whitelist": ["*"]}, "T": {"mirror_whitelist_inheritance": "union"}}}


def build(site, stages, words="7"):
    """Makes the stages of a row; returns {letter: path}."""
    paths = {name: "alice/" + name for name in MIRRORS}
    for stage in reversed(stages.split("; ")):
        letter, marks, bases = re.fullmatch(r"(\w)(?:\((.*)\))?((?: \w+)*)", stage).groups()
        marks = (marks or "").split()
        config = {"type": {"7": "local", "6": "stage"}[words], "bases": [paths[base] for base in bases.split()]}
        for mark in {"A", "T"} & set(marks):
            config.update(BY_WORDS_OF[words][mark])
        index = paths[letter] = "alice/%s%d" % (letter, next(numbers))
        assert site.put("/" + index, config, user="alice").status == 200
        for mark in marks:
            if mark[0] == "u":
                release(site, index, version=mark[1] + ".0")
            elif mark == "registered":
                submit(site, index, "p", "1.0")
            elif mark == "P":
                rule = {"inheritance_rules": ["allow all"]} if words == "7" else ["mirror_whitelist+=p"]
                assert site.patch("/" + index + ("/p" if words == "7" else ""), rule, user="alice").status == 200
    return paths


@pytest.mark.parametrize("words", ["7", "6"])
@pytest.mark.parametrize("stages, seen", TRUTH.values(), ids=map(str, TRUTH))
def test_both_vocabularies_say_the_same_rule(site, words, stages, seen):
    index = build(site, stages, words)["L"]
    page = site.get("/%s/+simple/p/" % index, headers={"Accept": SIMPLE_JSON})
    assert page.status == 200
    assert sorted({file["filename"].split("-")[1] for file in page.json()["files"]}) == seen.split()
    found = site.get("/%s/p" % index)
    assert found.status == 200
    assert sorted(version for version in found.result if version != "1.0" or "registered" not in stages) == seen.split()


def test_the_order_is_that_of_devpi_6_whatever_words_an_index_was_made_with(site):
    for words in ("7", "6"):
        paths = build(site, "L B C; B E; C(u1); E(u1)", words)
        assert [link["href"].partition("/+f/")[0].partition("/alice/")[2]
                for link in links(site, paths["L"] + "/p/1.0")] == [paths["C"].partition("/")[2]]
        paths = build(site, "L R R2", words)
        assert "/alice/R/" in links(site, paths["L"] + "/p/9.0")[0]["href"]


# Options of indexes


@pytest.mark.parametrize("key, own, good, stored, bad, error", [
    ("remote_url", "mirror_url", "http://a.example/x", "http://a.example/x", "x", "'{key}' option must be a URL."),
    ("remote_refresh_delay", "mirror_cache_expiry", "60", 60, "soon", "'{key}' option must be an integer"),
    ("remote_no_project_list", "mirror_no_project_list", "yes", True, "maybe", "Unknown boolean value 'maybe'. ({key})"),
    ("remote_use_external_urls", "mirror_use_external_urls", "no", False, "1", "Unknown boolean value '1'. ({key})"),
    ("remote_web_url_fmt", "mirror_web_url_fmt", "http://a/{name}", "http://a/{name}", None, None)])
def test_each_option_of_a_mirror_has_two_names_and_all_operators(site, key, own, good, stored, bad, error):
    mirror = "alice/m%d" % next(numbers)
    site.add_mirror(mirror, DEAD)
    path = "/" + mirror

    def change(body):
        return site.patch(path, body, user="alice")

    for name in (key, own):
        for body in ([name + "=" + good], {name: good}, {key: good, own: good}):
            assert change(body).result[own] == stored
            assert key not in site.get(path).result
            assert site.get(path + "?v=2").result[key] == stored
            assert own not in site.get(path + "?v=2").result
            if own != "mirror_url":
                assert own not in change([name + "-="]).result
                assert change({key: good}).result[own] == stored
                assert own not in change({name: None}).result
        if error:
            for body in ([name + "=" + bad], {name: bad}):
                assert message(change(body)) == (400, error.format(key=name))
        for operator in ("+=", "-="):
            assert message(change([name + operator + good])) == (400, "The '%s' setting is no list" % name)
    if error:
        assert message(change({key: good, own: "http://b/" if own == "mirror_url" else "9" if stored == 60 else "yes"
                                if stored is False else "no"})) == (400, "'%s' and '%s' are the same option" % (own, key))


def test_stage_options_in_either_words_are_passed_over_on_a_mirror(site):
    before = site.get("/alice/R").result
    for body in ({"bases": "x/y", "acl_upload": "bob", "mirror_whitelist": "*", RULES: "allow all"}, [RULES + "=allow all"],
                 ["mirror_whitelist=*"], {"type": "remote"}, ["type=mirror"], ["type=remote"]):
        reply = site.patch("/alice/R", body, user="alice")
        assert (reply.status, reply.result) == (200, {key: value for key, value in before.items() if key != "projects"})
    for body in ({"type": "local"}, ["type=stage"]):
        assert message(site.patch("/alice/R", body, user="alice")) == (400, "the 'type' of an index can't be changed")


def test_what_is_mistyped_in_the_words_of_devpi_7_is_told_with_what_there_is(site):
    assert message(site.patch("/alice/R", {"remote_ulr": DEAD}, user="alice"))[1].endswith(" (remote_url?)")
    index = fresh(site)
    assert message(site.patch("/" + index, {"project_inheritance_rule": "x"}, user="alice"))[1].endswith("(%s?)" % RULES)


def test_a_rule_for_all_projects_leaves_the_rules_of_single_ones(site):
    index = fresh(site, mirror_whitelist=["p"])
    for value, listed in (("allow all", ["p", "*"]), (BLOCK, ["p"])):
        assert site.patch("/" + index, {RULES: value}, user="alice").result["mirror_whitelist"] == listed
        assert site.get("/" + index + "?v=2").result[RULES] == [value]


# Version 2 of results


def test_version_2_of_an_index_is_in_the_words_of_devpi_7(site):
    stage = {"type": "local", "volatile": True, "bases": [], "acl_upload": ["alice"], "acl_toxresult_upload": [":ANONYMOUS:"],
             RULES: [BLOCK], TRUST: "none"}
    index = "alice/new%d" % next(numbers)
    assert site.put("/%s?v=2" % index, {}, user="alice").json() == {"type": "indexconfig", "result": stage}
    stage.update({RULES: ["allow all"], TRUST: "type:not remote", "title": "T"})
    assert site.patch("/%s?v=2" % index, {key: stage[key] for key in (RULES, TRUST, "title")}, user="alice").result == stage
    assert site.get("/%s?v=2" % index).result == dict(stage, projects=[])
    name = index.partition("/")[2]
    assert site.get("/alice?v=2").result["indexes"][name] == stage
    assert site.get("/?v=2").result["alice"]["indexes"][name] == stage
    # what was read is taken as it is
    before = serial(site)
    assert site.patch("/%s?v=2" % index, site.get("/%s?v=2" % index).json(), user="alice").result == stage
    assert serial(site) == before
    assert site.get("/" + index).result["mirror_whitelist"] == ["*"]

    mirror = {"type": "remote", "volatile": True, "remote_url": DEAD}
    assert site.get("/alice/D?v=2&no_projects").result == mirror


def test_secrets_are_hidden_in_version_2_as_well(site):
    site.add_mirror("alice/secretive", "http://me:pass@127.0.0.1:9/simple/")
    for path in ("/alice/secretive?v=2&no_projects", "/alice?v=2", "/?v=2"):
        assert "me:pass@" not in site.get(path, user="bob").text
        assert "me:pass@" in site.get(path, user="alice").text


@pytest.mark.parametrize("value, error", [
    ("1", None), ("2", None), ("02", None), ("3", "must be 1 to 2, got 3"), ("0", "must be 1 to 2, got 0"),
    ("-1", "must be 1 to 2, got -1"), ("x", "must be an integer, got 'x'"), ("", "must be an integer, got ''"),
    ("2.0", "must be an integer, got '2.0'"), ("9" * 5000, "must be an integer, got '%s'" % ("9" * 100))])
def test_of_results_there_are_two_versions(site, value, error):
    index, query = fresh(site), "?v=" + value
    archive = release(site, index)
    for path in ("/", "/alice", "/" + index, "/%s/p" % index, "/%s/p/1.0" % index, path_of(archive, index)):
        reply = site.get(path + query)
        assert reply.status == (400 if error else 200)
        if error:
            assert message(reply) == (400, "The requested result version " + error)
    for path in ("/nobody", "/alice/none", "/%s/none" % index, "/%s/p/7" % index):
        assert site.get(path + query).status == 404

    before = serial(site)
    for method, path, body in (("PATCH", "/" + index, {"title": "T" + value[:9]}), ("PATCH", "/%s/new" % index, {}),
                               ("PUT", "/alice/v%d" % next(numbers), {})):
        assert site.request(method, path + query, body, user="alice").status == (400 if error else 200)
    assert serial(site) == before + (0 if error else 3)


def when(moment):
    """Whether a time is as devpi 7 writes it."""
    return bool(re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", moment))


def test_both_forms_of_links_and_history(site):
    source, target = fresh(site), fresh(site)
    archive = release(site, source)
    upload_docs(site, source, documentation("p", "1.0"))
    assert site.post(path_of(archive, source), {"a": 1}, user="alice").status == 200
    assert site.push(source, "p", "1.0", targetindex=target).status == 200
    for index in (source, target):
        older = links(site, index + "/p/1.0")
        versions = site.get("/%s/p?v=2" % index).result["versions"]
        newer = site.get("/%s/p/1.0?v=2" % index).result["+links"]
        assert versions["1.0"]["+links"] == newer
        assert sorted(link["rel"] for link in newer) == ["doczip", "releasefile", "toxresult"]
        for old, new in zip(older, newer):
            assert set(old) == {"rel", "hash_spec", "hashes", "href", "log"} | ({"for_href"} if old["rel"] == "toxresult" else set())
            assert set(new) == set(old) - {"hash_spec"} | {"relpath"} | ({"for_relpath"} if "for_href" in old else set())
            assert new["href"].endswith("/%s/%s" % (index, new["relpath"])) and new["relpath"].startswith("+f/")
            assert [old[key] for key in ("rel", "hashes", "href")] == [new[key] for key in ("rel", "hashes", "href")]
            if "for_href" in new:
                assert new["for_href"] == old["for_href"] and new["for_href"].endswith("/%s/%s" % (index, new["for_relpath"]))
            for was, now in zip(old["log"], new["log"]):
                assert when(now["when"]) and "%04d-%02d-%02dT%02d:%02d:%02dZ" % tuple(was["when"]) == now["when"]
                assert {**was, "when": 0} == {**now, "when": 0}


def test_both_forms_of_the_links_and_facts_of_a_mirrors_file(site, public):
    link, = links(site, "alice/R/p/9.0")
    newer, = site.get("/alice/R/p/9.0?v=2").result["+links"]
    assert set(link) == {"rel", "hash_spec", "hashes", "href"}
    assert set(newer) == {"rel", "relpath", "hashes", "href"}
    path = "/alice/R/" + newer["relpath"]
    assert site.get(path, headers={"Accept": "*/*"}).status == 200
    older, newer = site.get(path).result, site.get(path + "?v=2").result
    assert set(older) == {"hash_spec", "hashes", "project", "version", "size", "url", "last_modified"}
    assert email.utils.parsedate(older["last_modified"]) and when(newer["last_modified"])
    assert dict(newer, hash_spec=older["hash_spec"], last_modified="") == dict(older, last_modified="")


def test_both_forms_of_the_facts_of_a_stages_file(site):
    index = fresh(site)
    archive = release(site, index)
    older, newer = (site.get(path_of(archive, index) + query).result for query in ("", "?v=2"))
    assert (older["size"], older["hash_spec"]) == (len(archive.content), "sha256=" + archive.sha256)
    assert email.utils.parsedate(older["last_modified"]) and when(newer["last_modified"])
    assert newer == {"hashes": {"sha256": archive.sha256}, "project": "p", "version": "1.0", "size": len(archive.content),
                     "last_modified": newer["last_modified"]}


# How a project was come by


def info(site, index, project="p", query="", **options):
    reply = site.get("/%s/%s?v=2%s" % (index, project, query), **options)
    assert (reply.status, reply.json()["type"]) == (200, "projectconfig_v2"), reply
    assert set(reply.result) == {"config", "inheritance_info", "versions"}
    return reply.result["inheritance_info"]


def told(paths, found):
    """The steps as texts, with the letters of the row in place of paths."""
    letters = {path: letter for letter, path in paths.items()}
    lines = []
    for step in found["traversal_infos"]:
        line = "%s %s %s" % (step["action"], letters[step["name"]], step["has_project"])
        assert set(step) - {"reason"} == {"action", "name", "has_project"}
        if "reason" in step:
            line += ": " + re.sub(r"alice/\w+", lambda path: letters[path[0]], step["reason"])
        lines.append(line)
    return lines


LET_IN = "package 'p' {} rule 'allow all' from {} allows merging releases from index {}"
SHUT_OUT = "package 'p' located in {} blocks releases from index {}"
CYCLE = "skipped {} due to an inheritance cycle"


@pytest.mark.parametrize("stages, has, steps", [
    ("L(u1) R", "unknown", ["traversed L true", "postponed R notset", "blocked R notset: " + SHUT_OUT.format("L", "R")]),
    ("L R", "true", ["traversed L false", "postponed R notset", "untrusted R true"]),
    ("L(u1 P) R", "true", ["traversed L true", "postponed R notset", "allowed R true: " + LET_IN.format("project", "L", "R")]),
    ("L(u1 A) R", "true", ["traversed L true", "postponed R notset", "allowed R true: " + LET_IN.format("index", "L", "R")]),
    ("L(T) B; B(u2 A) R", "true", ["traversed L false", "traversed B true", "postponed R notset",
                                   "allowed R true: " + LET_IN.format("index", "B", "R")]),
    ("L(T) B; B(u2 P A) R", "true", ["traversed L false", "traversed B true", "postponed R notset",
                                     "allowed R true: " + LET_IN.format("project", "B", "R")]),
    # devpi 7 names B here, which has no rule
    ("L(A) B; B(u2) R", "true", ["traversed L false", "traversed B true", "postponed R notset",
                                 "allowed R true: " + LET_IN.format("index", "L", "R")]),
    ("L R B; B(u2)", "unknown", ["traversed L false", "postponed R notset", "traversed B true",
                                 "blocked R notset: " + SHUT_OUT.format("B", "R")]),
    ("L(u1) B; B(u2) R", "unknown", ["traversed L true", "traversed B true", "postponed R notset",
                                     "blocked R notset: " + SHUT_OUT.format("B", "R")]),
    ("L B C; B(u2) R; C R2", "unknown", [
        "traversed L false", "traversed B true", "traversed C false", "postponed R notset", "postponed R2 notset",
        "blocked R notset: " + SHUT_OUT.format("B", "R"), "blocked R2 notset: " + SHUT_OUT.format("B", "R2")]),
    ("L(u1 A) X", "false", ["traversed L true", "postponed X notset", "untrusted X false"]),
    ("L(u1 P) D", "unknown", ["traversed L true", "postponed D notset", "untrusted D unknown"]),
    ("L(u1) D", "unknown", ["traversed L true", "postponed D notset", "blocked D notset: " + SHUT_OUT.format("L", "D")]),
    ("L D R", "unknown", ["traversed L false", "postponed D notset", "postponed R notset", "untrusted D unknown",
                          "untrusted R true"]),
    ("L(u1)", "false", ["traversed L true"]),
    ("L R B; B(u2 A) R; C", "unknown", [
        "traversed L false", "postponed R notset", "traversed B true", "blocked R notset: " + SHUT_OUT.format("B", "R")]),
    ("L B C; B E; C(u1) E; E", "false", [
        "traversed L false", "traversed B false", "traversed C true", "traversed E false", "skipped E notset: " + CYCLE.format("E")]),
])
def test_the_way_to_a_project_is_told_step_by_step(site, stages, has, steps):
    paths = build(site, stages)
    found = info(site, paths["L"])
    assert told(paths, found) == steps
    assert found["has_project_from_remote"] == has
    bases = {stage.split("(")[0].split()[0]: stage.partition(")")[2].split() or stage.split()[1:] for stage in stages.split("; ")}
    for letter in {base for each in bases.values() for base in each} & set(MIRRORS):
        bases[letter] = []
    reachable = {step["name"] for step in found["traversal_infos"]}
    assert found["index_bases"] == {paths[letter]: [paths[base] for base in each] for letter, each in bases.items()
                                    if paths[letter] in reachable}


def test_a_mirror_that_is_asked_itself_is_one_step(site):
    found = site.get("/alice/R/p?v=2").result
    assert found["config"] == {"name": "p"}
    assert found["inheritance_info"] == {
        "has_project_from_remote": "true", "index_bases": {"alice/R": []},
        "traversal_infos": [{"action": "untrusted", "name": "alice/R", "has_project": "true"}]}


def test_a_base_that_is_gone_and_one_that_was_met_before_are_skipped(site):
    paths = build(site, "L(u1) B C R; B; C")
    assert site.delete("/" + paths["B"], user="alice").status == 201
    assert site.patch("/" + paths["C"], {"bases": [paths["L"], paths["C"]]}, user="alice").status == 200
    found = info(site, paths["L"])
    assert told(paths, found) == [
        "traversed L true", "skipped B notset: skipped B because it does not exist", "traversed C false", "postponed R notset",
        "skipped L notset: " + CYCLE.format("L"), "skipped C notset: " + CYCLE.format("C"),
        "blocked R notset: " + SHUT_OUT.format("L", "R")]
    assert found["index_bases"] == {paths["L"]: [paths["B"], paths["C"], "alice/R"], paths["B"]: None,
                                    paths["C"]: [paths["L"], paths["C"]], "alice/R": []}


def test_a_missing_base_is_a_reason_of_its_own(site):
    paths = build(site, "L B R; B")
    assert site.delete("/" + paths["B"], user="alice").status == 201
    assert site.get("/alice/R/p").status == 200     # it is known from now on, without being asked
    assert site.get("/%s/p?v=2" % paths["L"]).status == 403
    assert told(paths, info(site, paths["L"], query="&ignore_bases"))[-1] == (
        "blocked R notset: package 'p' may have been located in B, which does not exist, and blocks releases from index R")


def test_who_asks_for_an_unknown_project_gets_no_version_2(site):
    index = build(site, "L R")["L"]
    assert message(site.get("/%s/nope?v=2" % index)) == (404, "no project 'nope'")
    assert site.get("/%s/p?v=2" % build(site, "L D")["L"]).status == 502


def test_the_way_names_no_index_that_the_caller_may_not_read(site):
    gone, below = fresh(site, "gone"), fresh(site, "below")
    hidden = fresh(site, "hidden", bases=[gone, below, "alice/R"], acl_pkg_read=["carol"])
    asked = fresh(site, "asked", bases=[hidden])
    assert site.delete("/" + gone, user="alice").status == 201
    release(site, asked)
    release(site, below, "quiet", "2.0")

    for user in (None, "bob"):
        found = info(site, asked, user=user)
        assert hidden not in str(found) and gone not in str(found)
        assert found["index_bases"] == {asked: [], below: [], "alice/R": []}
        assert [step["name"] for step in found["traversal_infos"]] == [asked, below, "alice/R", "alice/R"]
    for user in ("alice", "carol", "root"):
        found = info(site, asked, user=user)
        assert found["index_bases"] == {asked: [hidden], hidden: [gone, below, "alice/R"], gone: None, below: [], "alice/R": []}
        assert [step["name"] for step in found["traversal_infos"]] == [asked, hidden, gone, below, "alice/R", "alice/R"]


def test_what_may_be_in_an_unreadable_base_shuts_out_mirrors_without_its_name(site):
    hidden = fresh(site, "hidden", acl_pkg_read=["carol"])
    index = fresh(site, bases=[hidden, "alice/R"])
    assert site.get("/alice/R/p").status == 200
    assert info(site, index, query="&ignore_bases", user="bob")["traversal_infos"][-1] == {
        "action": "blocked", "name": "alice/R", "has_project": "notset",
        "reason": "package 'p' may be located in an index that you may not read, and blocks releases from index alice/R"}
    assert info(site, index, query="&ignore_bases", user="carol")["traversal_infos"][-1]["action"] == "untrusted"
    assert hidden in str(info(site, index, user="carol"))
    assert site.get("/%s/p?v=2" % index, user="bob").status == 403


def test_with_ignore_bases_no_mirror_is_asked_for_version_2_either(site, public):
    index = fresh(site, bases=["alice/N"], mirror_whitelist=["quiet"])
    release(site, index, "quiet", "1.0")
    public.reset()
    reply = site.get("/%s/quiet?v=2&ignore_bases" % index).result
    assert list(reply["versions"]) == ["1.0"]
    assert reply["inheritance_info"]["has_project_from_remote"] == "unknown"
    assert [(step["action"], step["has_project"]) for step in reply["inheritance_info"]["traversal_infos"]] == [
        ("traversed", "true"), ("postponed", "notset"), ("untrusted", "unknown")]
    assert public.count("*quiet*") == 0
    assert info(site, index, "quiet")["has_project_from_remote"] == "true"
    assert info(site, index, "quiet", "&ignore_bases")["has_project_from_remote"] == "true"


# Configuration of projects


@pytest.mark.parametrize("method", ["PATCH", "POST"])
def test_a_project_gets_and_loses_its_rule(site, method):
    index = fresh(site, mirror_whitelist=["other"])
    release(site, index)
    for body, rules in (({"inheritance_rules": "allow all"}, ["allow all"]), (["inheritance_rules-="], None),
                        ({"type": "projectconfig", "result": {"inheritance_rules": ["allow all"], "name": "P"}}, ["allow all"]),
                        (["inheritance_rules-="], None), (["name=p", "inheritance_rules=allow all"], ["allow all"])):
        config = dict({"name": "p"}, **({"inheritance_rules": rules} if rules else {}))
        for slash in ("", "/"):
            before = serial(site)
            reply = configure(site, index, "p" + slash, body, method=method)
            assert (reply.status, reply.json()) == (200, {"type": "projectconfig", "result": config})
            assert serial_of(reply) == before + (not slash)
            assert site.get("/%s/p?v=2" % index).result["config"] == config
        assert site.get("/" + index).result["mirror_whitelist"] == ["other"] + (["p"] if rules else [])


@pytest.mark.parametrize("body", [{}, [], {"type": "projectconfig", "result": {}}, {"name": "p"}, {"name": "P"}, ["name=p"],
                                  ["inheritance_rules-="]])
def test_what_changes_nothing_takes_no_serial(site, body):
    index = fresh(site)
    release(site, index)
    before = serial(site)
    reply = configure(site, index, "p", body)
    assert (reply.status, reply.result, serial_of(reply)) == (200, {"name": "p"}, before)
    assert message(configure(site, index, "p", body, "?error_on_noop")) == (400, NO_CHANGES)
    assert configure(site, index, "p", {"inheritance_rules": "allow all"}, "?error_on_noop").status == 200


UNKNOWN = "projectconfig got unexpected keyword arguments: "


@pytest.mark.parametrize("body, error", [
    ({"inheritance_rules": "x"}, "Unknown value ['x'] for inheritance_rules, must be ['allow all'] or left unset."),
    ({"inheritance_rules": ""}, "Unknown value [] for inheritance_rules, must be ['allow all'] or left unset."),
    ({"inheritance_rules": []}, "Unknown value [] for inheritance_rules, must be ['allow all'] or left unset."),
    ({"inheritance_rules": [BLOCK]}, "Unknown value ['%s'] for inheritance_rules, must be ['allow all'] or left unset." % BLOCK),
    ({"inheritance_rules": "Allow all"}, "Unknown value ['Allow all'] for inheritance_rules, must be ['allow all'] or left unset."),
    ({"inheritance_rules": ["allow all"] * 2},
     "Unknown value ['allow all', 'allow all'] for inheritance_rules, must be ['allow all'] or left unset."),
    (["inheritance_rules=x"], "Unknown value ['x'] for inheritance_rules, must be ['allow all'] or left unset."),
    ({"inheritance_rules": None}, "Unknown list value None. (inheritance_rules)"),
    (["inheritance_rules+=allow all"], "The 'inheritance_rules' setting is no list"),
    (["inheritance_rules-=allow all"], "The 'inheritance_rules' setting is no list"),
    ({"name": "q"}, "the 'name' of a project can't be changed"), ({"name": 5}, "the 'name' of a project can't be changed"),
    (["name=q"], "the 'name' of a project can't be changed"),
    ({"foo": 1, "bar": "x"}, UNKNOWN + "foo=1, bar=x"), (["foo=1"], UNKNOWN + "foo=1"), (["foo+=1"], UNKNOWN + "foo=1"),
    (["foo-="], UNKNOWN + "foo="), ({"inheritance_rule": "x"}, UNKNOWN + "inheritance_rule=x (inheritance_rules?)"),
    ({"type": "projectconfig"}, UNKNOWN + "type=projectconfig"), ([5], "expected 'key=value', 'key+=value' or 'key-=value', got 5"),
])
def test_wrong_configurations_are_refused_in_words(site, body, error):
    index = fresh(site)
    release(site, index)
    before = serial(site)
    for method, project in itertools.product(("PATCH", "POST"), ("p", "unknown" if "name" not in str(body) else "p")):
        assert message(configure(site, index, project, body, method=method)) == (400, error)
    assert serial(site) == before
    assert site.get("/" + index).result["projects"] == ["p"]


def test_a_mirrors_projects_have_no_rules(site):
    for body, error in (({"inheritance_rules": "allow all"}, "inheritance_rules=allow all"), (["inheritance_rules-="], "inheritance_rules=")):
        assert message(configure(site, "alice/R", "p", body)) == (400, UNKNOWN + error)
    before = serial(site)
    assert configure(site, "alice/R", "p", {}).result == {"name": "p"}
    assert serial(site) == before


@pytest.mark.parametrize("body", [{}, {"inheritance_rules": "allow all"}, ["inheritance_rules-="]])
def test_an_unknown_project_is_registered_and_private_from_then_on(site, body):
    index = fresh(site, bases=["alice/R"])
    before = serial(site)
    assert configure(site, index, "Sea.Lib", body).result["name"] == "sea-lib"
    assert serial(site) == before + 1
    assert site.get("/" + index).result["projects"] == ["sea-lib"]
    assert "sea-lib" in project_list(site, index)
    page = site.get("/%s/+simple/sea-lib/" % index, headers={"Accept": SIMPLE_JSON})
    assert (page.status, page.json()["files"]) == (200, [])
    assert configure(site, index, "p", []).status == 200
    assert site.filenames(index, "p") == []


def test_a_name_that_no_project_can_have_is_not_registered(site):
    index = fresh(site)
    for name in ("x" * 201, "%C3%A4", "-x", "x%20", "%40"):
        status, sentence = message(configure(site, index, name, {"inheritance_rules": "allow all"}))
        assert status == 400 and sentence.startswith("invalid metadata: ")
    assert site.get("/" + index).result["projects"] == []


def test_the_name_of_a_project_is_that_of_its_newest_release(site):
    index = fresh(site)
    for name, version in (("sea_lib", "1.0"), ("Sea.Lib", "2.0")):
        assert site.upload(index, sdist(name, version)).status == 200
        assert configure(site, index, "SEA-lib", {}).result == {"name": name}
        assert site.get("/%s/sea-lib?v=2" % index).result["config"] == {"name": name}


@pytest.mark.parametrize("user, config, status", [
    ("alice", {}, 200), ("root", {}, 200), ("bob", {}, 403), (None, {}, 403), ("bob", {"acl_upload": ["bob"]}, 403)])
def test_who_may_change_an_index_may_configure_its_projects(site, user, config, status):
    index = fresh(site, **config)
    for method, body in itertools.product(("PATCH", "POST"), ({}, {"inheritance_rules": "allow all"}, ["inheritance_rules=x"])):
        wanted = 400 if status == 200 and "inheritance_rules=x" in body else status
        assert configure(site, index, "p", body, user=user, method=method).status == wanted
    for project in ("p", "none"):
        assert configure(site, "alice/none", project, {}, user=user).status == 403
    if status == 403:
        assert site.get("/" + index).result == {**site.get("/" + index).result, "projects": [], "mirror_whitelist": []}


def test_the_audit_log_says_who_configured_what(site):
    index = fresh(site)
    for body in ({"inheritance_rules": "allow all"}, ["inheritance_rules-="]):
        assert configure(site, index, "audited", body).status == 200
    entries = [(entry["action"], entry["who"], entry["target"], entry["detail"] or "") for entry in audited(site, index=index)]
    assert entries[:3] == [("index.modify", "alice", "", "mirror_whitelist: audited removed"),
                           ("index.modify", "alice", "", "mirror_whitelist: audited added"), ("register", "alice", "audited", "")]


def test_a_status_and_a_configuration_are_told_apart_by_their_keys(site):
    index = fresh(site)
    release(site, index)
    assert configure(site, index, "p", {"project-status": {"status": "archived"}}).json() == {
        "message": "project p on %s is archived" % index}
    assert configure(site, index, "p", {"inheritance_rules": "allow all"}).result["inheritance_rules"] == ["allow all"]
    assert site.simple(index, "p")["project-status"] == {"status": "archived"}
    assert configure(site, index, "p", {"project-status": {"status": "active"}, "inheritance_rules": "allow all"}).status == 400


def test_a_whitelisted_name_is_no_project_and_outlives_one(site):
    index = fresh(site, bases=["alice/R"])
    assert site.patch("/" + index, ["mirror_whitelist+=p"], user="alice").status == 200
    assert site.get("/" + index).result["projects"] == []
    assert site.get("/%s/p?v=2" % index).result["config"] == {"name": "p", "inheritance_rules": ["allow all"]}
    for _ in range(2):
        release(site, index)
        assert sorted(site.versions(index, "p")) == ["1.0", "9.0"]
        assert site.delete("/%s/p" % index, user="alice").status == 200
    assert site.get("/" + index).result["mirror_whitelist"] == ["p"]
    assert configure(site, index, "p", ["inheritance_rules-="]).status == 200
    assert site.get("/%s/quiet?v=2" % index).result["config"] == {}


def test_a_form_that_is_posted_to_a_project_is_told_where_to_go(site):
    index = fresh(site)
    for body, headers in ((b"", {}), (b"x=1", {"Content-Type": "application/x-www-form-urlencoded"}), (b"\x00", {"Content-Type": "text/plain"})):
        reply = site.post("/%s/p" % index, body, headers=headers, user="alice")
        assert (reply.status, reply.reason) == (
            404, "nothing is uploaded here: the address to upload to is %s/%s/" % (site.url, index))
    for kind in ("application/x-www-form-urlencoded", "application/json"):        # as curl -d sends it
        assert site.post("/%s/p" % index, b"{}", headers={"Content-Type": kind}, user="alice").status == 200
