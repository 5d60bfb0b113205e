"""Inheritance: the resolution order, what is merged, and when a private name closes a mirror [W10, W11.7]."""

import hashlib
import itertools
import json
import re
import threading

import pytest

from harness import SIMPLE_JSON, Upstream, page, project_list, sdist, wheel


numbers = itertools.count(1)


@pytest.fixture(scope="module")
def alice(shared_server):
    """The shared server, with alice logged in."""
    shared_server.add_user("alice", "pw")
    shared_server.login("alice", "pw")
    return shared_server


@pytest.fixture
def make(alice):
    """make(*names) -> as many fresh stages of alice's; make.mirror(upstream) -> a fresh mirror."""

    def make(count=1, **config):
        names = ["alice/s%d" % next(numbers) for _ in range(count)]
        for name in names:
            alice.add_index(name, **config)
        return names if count > 1 else names[0]

    def mirror(upstream, **config):
        name = "alice/m%d" % next(numbers)
        alice.add_mirror(name, getattr(upstream, "url", upstream), **config)
        return name

    make.mirror = mirror
    return make


def publish(server, index, name, version, **options):
    archive = wheel(name, version, **options)
    assert server.upload(index, archive).status == 200
    return archive


def rebase(server, index, *bases):
    reply = server.patch("/" + index, {"bases": list(bases)}, user="alice")
    assert (reply.status, reply.result["bases"]) == (200, list(bases))


def versions(server, index, project, **options):
    """The versions on the page, which has them in no promised order."""
    return sorted(server.versions(index, project, **options))


def holder(server, index, project):
    """The indexes that hold the page's files, in the page's order, from the URLs (relative to /U/I/+simple/P/)."""
    holders = []
    for file in server.simple(index, project)["files"]:
        place = file["url"].split("+f/")[0].replace("../", "").rstrip("/")  # "", "I2" or "U2/I2"
        if "/" not in place:
            place = "%s/%s" % (index.split("/")[0], place) if place else index
        holders.append(place)
    return holders


# The resolution order


def test_the_requested_index_comes_first_then_bases_breadth_first(alice, make):
    d, b, c, a = make(4)
    rebase(alice, b, a)
    rebase(alice, d, b, c)
    for index in (a, c, b, d):
        publish(alice, index, "order", "1.%d" % int(index[7:]))
    assert holder(alice, d, "order") == [d, b, c, a]


def test_mirrors_come_last_wherever_they_stand_in_the_bases(alice, make, upstream):
    d, b, c, a = make(4, mirror_whitelist="order")
    upstream.publish("order", "9.0")
    mirror = make.mirror(upstream)
    rebase(alice, a, mirror)
    rebase(alice, b, a)
    rebase(alice, d, mirror, b, c)
    for index in (d, b, c, a):
        publish(alice, index, "order", "1.%d" % int(index[7:]))
    assert holder(alice, d, "order") == [d, b, c, a, mirror]


def test_several_mirrors_keep_the_order_in_which_they_are_met(alice, make):
    first, second = Upstream().start(), Upstream().start()
    try:
        first.publish("order", "1.0")
        second.publish("order", "2.0")
        deep, near = make.mirror(first), make.mirror(second)
        top, base = make(2)
        rebase(alice, base, deep)
        rebase(alice, top, base, near)
        assert holder(alice, top, "order") == [near, deep]
        rebase(alice, top, deep, near)
        assert holder(alice, top, "order") == [deep, near]
    finally:
        first.stop()
        second.stop()


def test_an_index_that_is_met_twice_counts_once(alice, make):
    top, left, right, bottom = make(4)
    rebase(alice, left, bottom)
    rebase(alice, right, bottom)
    rebase(alice, top, left, right, bottom, left)
    for index in (left, right, bottom):
        publish(alice, index, "diamond", "1.%d" % int(index[7:]))
    assert holder(alice, top, "diamond") == [left, right, bottom]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_loops_end(alice, make, length):
    ring = make(length) if length > 1 else [make()]
    for index, base in zip(ring, ring[1:] + ring[:1]):
        rebase(alice, index, base)
    publish(alice, ring[-1], "ringed", "1.0")
    for index in ring:
        assert versions(alice, index, "ringed") == ["1.0"]
        assert project_list(alice, index) == ["ringed"]
        assert page(alice, index, "unknown").status == 404
        assert alice.get("/%s/ringed" % index).status == 200


def test_a_missing_base_is_skipped(alice, make):
    top, gone, there = make(3)
    rebase(alice, top, gone, there)
    publish(alice, gone, "lost", "1.0")
    publish(alice, there, "kept", "1.0")
    assert versions(alice, top, "lost") == ["1.0"]
    assert alice.delete("/" + gone, user="alice").status == 201
    assert page(alice, top, "lost").status == 404
    assert versions(alice, top, "kept") == ["1.0"]
    assert project_list(alice, top) == ["kept"]


def test_a_base_of_another_user_counts_like_ones_own(alice, make):
    alice.add_user("other", "pw")
    alice.add_index("other/dev")
    top = make()
    archive = publish(alice, "other/dev", "foreign", "1.0")
    rebase(alice, top, "other/dev")
    assert alice.fetch(top, archive.filename, "foreign") == archive.content


def test_a_chain_of_many_bases_is_followed_to_its_end(alice, make):
    chain = make(20)
    for index, base in zip(chain, chain[1:]):
        rebase(alice, index, base)
    publish(alice, chain[-1], "deep", "1.0")
    assert versions(alice, chain[0], "deep") == ["1.0"]


# A private name closes the mirrors


def pattern(*stages):
    """Stages of a chain, from the requested one down: (has the project, its whitelist)."""
    return stages


HAS, EMPTY = True, False
BLOCKING = [
    # what it shows, mode of the requested index, modes of the others, stages from the requested one down, mirror seen
    ("no stage has it", "intersection", pattern((EMPTY, "")), True),
    ("the requested stage has it", "intersection", pattern((HAS, "")), False),
    ("a base has it", "intersection", pattern((EMPTY, ""), (HAS, "")), False),
    ("a base of a base has it", "intersection", pattern((EMPTY, ""), (EMPTY, ""), (HAS, "")), False),
    ("its name is whitelisted", "intersection", pattern((HAS, "lib")), True),
    ("everything is whitelisted", "intersection", pattern((HAS, "*")), True),
    ("another name is whitelisted", "intersection", pattern((HAS, "lib2,li")), False),
    ("the requested stage alone decides: opened for a base's project", "intersection", pattern((EMPTY, "lib"), (HAS, "")), True),
    ("the requested stage alone decides: a base's * is no use", "intersection", pattern((HAS, ""), (EMPTY, "*")), False),
    ("the requested stage alone decides: a base's own whitelist is no use", "intersection", pattern((EMPTY, ""), (HAS, "lib")), False),
    ("both whitelist it", "intersection", pattern((HAS, "lib"), (HAS, "lib")), True),
    ("* above, name below", "intersection", pattern((HAS, "*"), (HAS, "lib")), True),
    ("union: no whitelist anywhere", "union", pattern((EMPTY, ""), (HAS, "")), False),
    ("union: the requested stage opens", "union", pattern((HAS, "lib"), (EMPTY, "")), True),
    ("union: the base that has it opens", "union", pattern((EMPTY, ""), (HAS, "lib")), True),
    ("union: a base after the one that has it opens", "union", pattern((HAS, ""), (EMPTY, "lib")), True),
    ("union: the last of three opens by *", "union", pattern((HAS, ""), (HAS, ""), (EMPTY, "*")), True),
    ("union: another name opens nothing", "union", pattern((HAS, "x"), (EMPTY, "y")), False),
]


@pytest.fixture(scope="module")
def public():
    """An upstream with `lib` 9.9, which no test changes."""
    upstream = Upstream().start()
    upstream.publish("lib", "9.9")
    upstream.publish("only-upstream", "1.0")
    yield upstream
    upstream.stop()


@pytest.fixture(scope="module")
def public_mirror(alice, public):
    alice.add_mirror("alice/public", public.url)
    return "alice/public"


def chain_of(alice, make, stages, mode, others="intersection"):
    """A chain of stages over the mirror alice/public; returns the requested one."""
    base, count = "alice/public", len(stages)
    for number, (has, whitelist) in enumerate(reversed(stages)):
        top = number == count - 1
        index = make(bases=[base], mirror_whitelist=whitelist, mirror_whitelist_inheritance=mode if top else others)
        if has:
            publish(alice, index, "lib", "1.%d" % number)
        base = index
    return base


@pytest.mark.parametrize("mode, stages, seen", [case[1:] for case in BLOCKING], ids=[case[0] for case in BLOCKING])
def test_who_sees_the_mirror(alice, make, public_mirror, mode, stages, seen):
    own = ["1.%d" % number for number, (has, _) in enumerate(reversed(stages)) if has]
    # the mode of the bases must not matter: each pattern is built with either
    index = chain_of(alice, make, stages, mode, others="union" if mode == "intersection" else "intersection")
    assert versions(alice, index, "lib") == own + (["9.9"] if seen else [])
    assert sorted(alice.get("/%s/lib" % index).result) == own + (["9.9"] if seen else [])
    assert alice.get("/%s/lib/9.9" % index).status == (200 if seen else 404)
    assert versions(alice, index, "only-upstream") == ["1.0"]


def test_blocking_compares_normalised_names(alice, make, upstream):
    upstream.publish("some-lib", "9.9")
    index = make(bases=[make.mirror(upstream)])
    publish(alice, index, "Some_Lib", "1.0")
    assert versions(alice, index, "some-lib") == ["1.0"]
    assert alice.patch("/" + index, {"mirror_whitelist": "SOME.LIB"}, user="alice").status == 200
    assert versions(alice, index, "some-lib") == ["1.0", "9.9"]


def test_a_project_without_files_blocks_as_well(alice, make, public_mirror):
    index = make(bases=[public_mirror])
    reply = alice.upload(index, None, fields={":action": "submit", "name": "lib", "version": "0.1"}, raw=True)
    assert reply.status == 200
    page = alice.simple(index, "lib")
    assert page["files"] == []
    assert "9.9" not in page["versions"]


def test_the_mirror_opens_again_when_the_private_project_is_deleted(alice, make, public_mirror):
    index = make(bases=[public_mirror])
    publish(alice, index, "lib", "1.0")
    assert versions(alice, index, "lib") == ["1.0"]
    assert alice.delete("/%s/lib" % index, user="alice").status == 200
    assert versions(alice, index, "lib") == ["9.9"]


def test_blocking_is_by_project_so_a_whole_release_of_another_file_type_is_blocked_too(alice, make, upstream):
    upstream.publish(sdist("kinds", "1.0"))
    index = make(bases=[make.mirror(upstream)])
    archive = publish(alice, index, "kinds", "1.0")
    assert alice.filenames(index, "kinds") == [archive.filename]


def test_the_mirror_itself_is_never_blocked(alice, make, public_mirror):
    index = make(bases=[public_mirror])
    publish(alice, index, "lib", "1.0")
    assert versions(alice, public_mirror, "lib") == ["9.9"]


def test_a_blocked_project_is_not_asked_for_upstream(alice, make, upstream):
    upstream.publish("quiet", "9.9")
    index = make(bases=[make.mirror(upstream)])
    publish(alice, index, "quiet", "1.0")
    upstream.reset()
    assert versions(alice, index, "quiet") == ["1.0"]
    assert alice.get("/%s/quiet" % index).status == 200
    assert upstream.count("*quiet*") == 0


def test_project_lists_are_not_filtered_by_blocking(alice, make, public_mirror):
    index = make(bases=[public_mirror])
    publish(alice, index, "lib", "1.0")
    assert sorted(project_list(alice, index)) == ["lib", "only-upstream"]


def test_every_installer_url_is_blocked_alike(alice, make, public_mirror):
    index = make(bases=[public_mirror])
    publish(alice, index, "lib", "1.0")
    for path, headers in (("/%s/+simple/lib/", {"Accept": "text/html"}), ("/%s/+simple/lib/", {"Accept": SIMPLE_JSON}),
                          ("/%s/lib/", {"User-Agent": "pip/26.3", "Accept": "*/*"}), ("/%s/lib", {"User-Agent": "uv/0.13.9", "Accept": SIMPLE_JSON})):
        reply = alice.get(path % index, headers=headers)
        assert reply.status == 200
        assert b"lib-1.0" in reply.body
        assert b"lib-9.9" not in reply.body


# What is merged


def test_files_of_all_indexes_stand_on_one_page(alice, make):
    top, base = make(2)
    rebase(alice, top, base)
    one = publish(alice, base, "both", "1.0")
    two = publish(alice, top, "both", "2.0")
    assert alice.filenames(top, "both") == [two.filename, one.filename]
    assert alice.filenames(base, "both") == [one.filename]
    for archive in (one, two):
        assert alice.fetch(top, archive.filename, "both") == archive.content


def test_of_two_files_of_one_name_the_first_index_wins(alice, make):
    top, middle, bottom = make(3)
    rebase(alice, top, middle, bottom)
    archives = {index: publish(alice, index, "twice", "1.0", summary="from " + index) for index in (middle, bottom)}
    assert len({archive.sha256 for archive in archives.values()}) == 2
    files = alice.simple(top, "twice")["files"]
    assert [(file["filename"], file["hashes"]["sha256"]) for file in files] == [(archives[middle].filename, archives[middle].sha256)]
    rebase(alice, top, bottom, middle)
    assert [file["hashes"]["sha256"] for file in alice.simple(top, "twice")["files"]] == [archives[bottom].sha256]
    assert hashlib.sha256(alice.fetch(top, archives[bottom].filename, "twice")).hexdigest() == archives[bottom].sha256


def test_an_own_file_hides_the_mirrors_file_of_that_name(alice, make, upstream):
    public = upstream.publish("same", "1.0", summary="public")
    upstream.publish("same", "2.0")
    index = make(bases=[make.mirror(upstream)], mirror_whitelist="*")
    own = publish(alice, index, "same", "1.0", summary="own")
    assert own.sha256 != public.sha256
    hashes = {file["filename"]: file["hashes"]["sha256"] for file in alice.simple(index, "same")["files"]}
    assert len(hashes) == 2
    assert hashes[own.filename] == own.sha256
    assert alice.fetch(index, own.filename, "same") == own.content


def test_links_are_merged_by_file_name_not_by_version(alice, make):
    top, base = make(2)
    rebase(alice, top, base)
    own = publish(alice, top, "formats", "1.0")
    other = sdist("formats", "1.0")
    assert alice.upload(base, other).status == 200
    assert alice.filenames(top, "formats") == [own.filename, other.filename]
    assert versions(alice, top, "formats") == ["1.0"]


def test_the_versions_of_a_project_are_the_union(alice, make):
    top, base = make(2)
    rebase(alice, top, base)
    publish(alice, base, "union", "1.0")
    publish(alice, base, "union", "2.0")
    publish(alice, top, "union", "2.0")
    reply = alice.get("/%s/union" % top)
    assert (reply.json()["type"], sorted(reply.result)) == ("projectconfig", ["1.0", "2.0"])


def test_of_a_version_in_two_indexes_the_later_ones_data_is_shadowed(alice, make):
    top, base = make(2)
    rebase(alice, top, base)
    publish(alice, base, "shadow", "1.0", summary="below")
    publish(alice, top, "shadow", "1.0", summary="above")
    data = alice.get("/%s/shadow/1.0" % top).result
    assert data["summary"] == "above"
    assert [shadowed["summary"] for shadowed in data["+shadowing"]] == ["below"]
    assert ["/%s/+f/" % base in link["href"] for link in data["+shadowing"][0]["+links"]] == [True]
    assert "+shadowing" not in alice.get("/%s/shadow/1.0" % base).result


def test_ignore_bases_shows_this_index_alone(alice, make):
    top, base = make(2)
    rebase(alice, top, base)
    publish(alice, base, "alone", "1.0")
    assert sorted(alice.get("/%s/alone" % top).result) == ["1.0"]
    reply = alice.get("/%s/alone?ignore_bases" % top)
    assert (reply.status, reply.result) == (200, {})
    publish(alice, top, "alone", "2.0")
    assert sorted(alice.get("/%s/alone?ignore_bases=" % top).result) == ["2.0"]


def test_with_ignore_bases_no_mirror_is_asked(alice, make, upstream):
    top = make(mirror_whitelist=["*"])
    rebase(alice, top, make.mirror(upstream))
    publish(alice, top, "alone", "1.0")
    assert sorted(alice.get("/%s/alone?ignore_bases" % top).result) == ["1.0"]
    for path in ("secret", "secret/1.0"):       # nor for a name that the stage does not have
        assert alice.get("/%s/%s?ignore_bases" % (top, path)).status == 404
    assert upstream.count("*") == 0
    assert sorted(alice.get("/%s/alone" % top).result) == ["1.0"]
    assert upstream.count("/simple/alone/") == 1
    upstream.publish("known", "1.0")
    assert alice.get("/%s/known" % top).status == 200
    assert alice.get("/%s/known?ignore_bases" % top).result == {}


def test_deleting_touches_this_index_alone(alice, make):
    top, base = make(2)
    rebase(alice, top, base)
    publish(alice, base, "below", "1.0")
    assert alice.delete("/%s/below" % top, user="alice").status == 404
    assert alice.delete("/%s/below/1.0" % top, user="alice").status == 404
    publish(alice, top, "below", "2.0")
    assert alice.delete("/%s/below" % top, user="alice").status == 200
    assert versions(alice, top, "below") == ["1.0"]


def test_an_upload_of_a_name_that_a_base_holds_is_no_conflict(alice, make):
    base = make(volatile=False)
    top = make(volatile=False, bases=[base])
    publish(alice, base, "again", "1.0", summary="below")
    publish(alice, top, "again", "1.0", summary="above")
    assert len(alice.filenames(top, "again")) == 1


def test_a_project_known_without_files_is_an_empty_page_and_an_unknown_one_404(alice, make):
    top, base = make(2)
    rebase(alice, top, base)
    assert alice.upload(base, None, fields={":action": "submit", "name": "bare", "version": "1.0"}, raw=True).status == 200
    assert alice.simple(top, "bare")["files"] == []
    reply = alice.get("/%s/+simple/unknown/" % top)
    assert reply.status == 404
    assert "The project unknown does not exist." in reply.text


# Project lists


def test_a_project_list_names_the_projects_of_all_indexes_once(alice, make, public_mirror):
    top, base = make(2)
    rebase(alice, top, base, public_mirror)
    for index, name in ((top, "zz"), (top, "Shared_Name"), (base, "shared.name"), (base, "aa"), (base, "only-upstream")):
        publish(alice, index, name, "1.0")
    assert sorted(project_list(alice, top)) == ["aa", "lib", "only-upstream", "shared-name", "zz"]
    assert sorted(project_list(alice, base)) == ["aa", "only-upstream", "shared-name"]


def test_the_html_list_for_installers_is_bare(alice, make):
    top, base = make(2)
    rebase(alice, top, base)
    publish(alice, top, "Foo", "1.0")
    publish(alice, base, "bar", "1.0")
    for path in ("/%s/+simple/", "/%s/+simple", "/%s", "/%s/"):
        reply = alice.get(path % top, headers={"User-Agent": "pip/20.3", "Accept": "text/html"})
        assert (reply.status, reply.headers.get("Content-Type").lower()) == (200, "text/html; charset=utf-8")
        assert sorted(re.findall(r'<a href="[^"]*?(foo|bar)/">(foo|bar)</a>', reply.text)) == [("bar", "bar"), ("foo", "foo")]
        assert "<h2>" not in reply.text


def test_the_html_list_for_people_has_a_heading_for_each_index(alice, make):
    top, base = make(2)
    rebase(alice, top, base)
    for name in ("zeta", "alpha"):
        publish(alice, top, name, "1.0")
    publish(alice, base, "middle", "1.0")
    text = alice.get("/%s/+simple/" % top, headers={"User-Agent": "Mozilla/5.0", "Accept": "text/html"}).text
    assert "%s: simple list (including inherited indices)" % top in text
    assert text.count("<h2>") == 2
    assert "%s (bases: %s)" % (top, base) in text
    assert text.index(">alpha<") < text.index(">zeta<") < text.index(">middle<")


def test_the_list_of_an_empty_index_is_empty_and_of_an_unknown_one_404(alice, make):
    assert project_list(alice, make()) == []
    assert alice.get("/alice/nope/+simple/").status == 404
    assert alice.get("/alice/nope/+simple/foo/").status == 404


def test_an_unreachable_mirror_does_not_break_the_list(alice, make, upstream):
    index = make(bases=[make.mirror(upstream)])
    publish(alice, index, "own", "1.0")
    upstream.stop()
    assert project_list(alice, index) == ["own"]


# A mirror among the bases fails


FAULTS = [("500", {}), ("reset", {}), ("garbage", {}), ("html-as-json", {}), ("truncate", {}), ("redirect-loop", {})]


@pytest.mark.parametrize("kind, arguments", FAULTS, ids=[kind for kind, _ in FAULTS])
def test_a_project_known_to_nobody_else_is_502_never_404(alice, make, upstream, kind, arguments):
    upstream.publish("pub", "1.0")
    mirror = make.mirror(upstream)
    index = make(bases=[mirror])
    upstream.fault(kind, **arguments)
    for accept in (SIMPLE_JSON, "text/html"):
        assert alice.get("/%s/+simple/pub/" % index, headers={"Accept": accept}).status == 502
    assert page(alice, mirror, "pub").status == 502
    upstream.clear_faults()
    assert versions(alice, index, "pub") == ["1.0"]  # the failure was not remembered as "not found"


def test_an_upstream_that_is_down_is_502(alice, make, upstream):
    upstream.publish("pub", "1.0")
    index = make(bases=[make.mirror(upstream)])
    upstream.stop()
    assert page(alice, index, "pub").status == 502
    assert alice.get("/%s/pub" % index).status == 502


def test_an_unknown_project_is_404_when_upstream_says_so(alice, make, upstream):
    upstream.publish("pub", "1.0")
    index = make(bases=[make.mirror(upstream)])
    assert page(alice, index, "missing").status == 404


def test_files_known_elsewhere_are_served_while_a_mirror_fails(alice, make, upstream):
    upstream.publish("shared", "9.9")
    index = make(bases=[make.mirror(upstream)], mirror_whitelist="*")
    publish(alice, index, "shared", "1.0")
    upstream.fault("500")
    assert versions(alice, index, "shared") == ["1.0"]
    upstream.clear_faults()
    alice.post("/%s/+simple/shared/refresh" % index)        # what failed just now is not asked again by itself
    assert versions(alice, index, "shared") == ["1.0", "9.9"]


def test_a_name_known_elsewhere_without_files_is_served_while_a_mirror_fails(alice, make, upstream):
    index = make(bases=[make.mirror(upstream)], mirror_whitelist="*")
    assert alice.upload(index, None, fields={":action": "submit", "name": "bare", "version": "1.0"}, raw=True).status == 200
    upstream.fault("500")
    assert alice.simple(index, "bare")["files"] == []


def test_another_mirror_answers_while_one_fails(alice, make, upstream, public_mirror):
    index = make(bases=[make.mirror(upstream), public_mirror])
    upstream.fault("reset")
    assert versions(alice, index, "only-upstream") == ["1.0"]


def test_what_was_cached_is_served_while_a_mirror_fails(alice, make, upstream):
    archive = upstream.publish("cached", "1.0")
    mirror = make.mirror(upstream, mirror_cache_expiry=0)
    index = make(bases=[mirror])
    assert alice.fetch(index, archive.filename, "cached") == archive.content
    upstream.stop()
    assert versions(alice, index, "cached") == ["1.0"]
    assert alice.fetch(index, archive.filename, "cached") == archive.content


def test_a_blocked_name_stays_blocked_while_upstream_is_down(alice, make, upstream):
    upstream.publish("private", "9.9")
    mirror = make.mirror(upstream, mirror_cache_expiry=0)
    base = make()
    top = make(bases=[base, mirror])
    publish(alice, base, "private", "1.0")
    assert versions(alice, mirror, "private") == ["9.9"]  # the mirror has it in its cache
    for break_it in (lambda: upstream.fault("500"), upstream.clear_faults, upstream.stop):
        break_it()
        assert versions(alice, top, "private") == ["1.0"]
        assert alice.get("/%s/private/9.9" % top).status == 404


def test_an_empty_but_registered_name_stays_blocked_while_upstream_is_down(alice, make, upstream):
    index = make(bases=[make.mirror(upstream)])
    assert alice.upload(index, None, fields={":action": "submit", "name": "bare", "version": "1.0"}, raw=True).status == 200
    upstream.publish("bare", "9.9")
    upstream.stop()
    assert alice.simple(index, "bare")["files"] == []


# Freshness: a change is seen by the very next request


def test_an_upload_to_a_base_is_on_the_next_page_of_all_that_inherit(alice, make):
    base, left, right, top = make(4)
    rebase(alice, left, base)
    rebase(alice, right, base)
    rebase(alice, top, left, right)
    family = (base, left, right, top)
    for number in range(3):
        version = "1.%d" % number
        publish(alice, base, "fresh", version)
        for index in family:
            for _ in range(2):  # the second answer may come from a cache
                assert versions(alice, index, "fresh")[-1] == version
            assert project_list(alice, index) == ["fresh"]


def test_an_unknown_project_is_there_right_after_its_first_upload(alice, make):
    base, top = make(2)
    rebase(alice, top, base)
    for _ in range(2):
        assert page(alice, top, "sudden").status == 404
        assert project_list(alice, top) == []
    publish(alice, base, "sudden", "1.0")
    assert page(alice, top, "sudden").status == 200
    assert project_list(alice, top) == ["sudden"]


def test_a_validator_of_before_the_upload_no_longer_matches(alice, make):
    base, top = make(2)
    rebase(alice, top, base)
    publish(alice, base, "tagged", "1.0")
    path = "/%s/+simple/tagged/" % top
    etag = alice.get(path, headers={"Accept": SIMPLE_JSON}).headers.get("ETag")
    assert alice.get(path, headers={"Accept": SIMPLE_JSON, "If-None-Match": etag}).status == 304
    publish(alice, base, "tagged", "2.0")
    reply = alice.get(path, headers={"Accept": SIMPLE_JSON, "If-None-Match": etag})
    assert (reply.status, reply.json()["versions"]) == (200, ["1.0", "2.0"])


def test_a_deletion_in_a_base_is_seen_at_once(alice, make):
    base, top = make(2)
    rebase(alice, top, base)
    publish(alice, base, "shrinking", "1.0")
    publish(alice, base, "shrinking", "2.0")
    assert versions(alice, top, "shrinking") == ["1.0", "2.0"]
    assert alice.delete("/%s/shrinking/2.0" % base, user="alice").status == 200
    assert versions(alice, top, "shrinking") == ["1.0"]
    assert alice.delete("/%s/shrinking" % base, user="alice").status == 200
    assert page(alice, top, "shrinking").status == 404
    assert project_list(alice, top) == []


def test_a_private_upload_closes_the_mirror_at_once(alice, make, upstream):
    upstream.publish("claimed", "9.9")
    base = make()
    top = make(bases=[base, make.mirror(upstream)])
    assert versions(alice, top, "claimed") == ["9.9"]
    publish(alice, base, "claimed", "1.0")
    assert versions(alice, top, "claimed") == ["1.0"]


def test_a_change_of_bases_is_seen_at_once_far_up(alice, make):
    top, middle, one, two = make(4)
    rebase(alice, top, middle)
    publish(alice, one, "moved", "1.0")
    publish(alice, two, "moved", "2.0")
    assert page(alice, top, "moved").status == 404
    for bases, expected in (([one], ["1.0"]), ([one, two], ["1.0", "2.0"]), ([two], ["2.0"])):
        rebase(alice, middle, *bases)
        assert versions(alice, top, "moved") == expected
    rebase(alice, middle)
    assert page(alice, top, "moved").status == 404


def test_a_change_of_the_whitelist_is_seen_at_once(alice, make, public_mirror):
    index = make(bases=[public_mirror])
    publish(alice, index, "lib", "1.0")
    for operator, expected in (("mirror_whitelist=*", ["1.0", "9.9"]), ("mirror_whitelist=", ["1.0"]), ("mirror_whitelist+=lib", ["1.0", "9.9"])):
        assert alice.patch("/" + index, [operator], user="alice").status == 200
        assert versions(alice, index, "lib") == expected


def test_a_change_of_the_inheritance_mode_is_seen_at_once(alice, make, public_mirror):
    index = chain_of(alice, make, pattern((EMPTY, ""), (HAS, "lib")), "intersection")
    for mode, expected in (("union", ["1.0", "9.9"]), ("intersection", ["1.0"])):
        assert alice.patch("/" + index, {"mirror_whitelist_inheritance": mode}, user="alice").status == 200
        assert versions(alice, index, "lib") == expected


def test_a_change_of_a_bases_readers_is_seen_at_once_by_all_that_inherit(alice, make):
    base, middle, top = make(3)
    rebase(alice, middle, base)
    rebase(alice, top, middle)
    publish(alice, base, "closing", "1.0")
    for acl, status in ((":ANONYMOUS:", 200), ("alice", 401), (":AUTHENTICATED:", 401), (":ANONYMOUS:", 200)):
        assert alice.patch("/" + base, {"acl_pkg_read": acl}, user="alice").status == 200
        for index in (base, middle, top):
            for _ in range(2):
                assert page(alice, index, "closing").status == status
        assert versions(alice, top, "closing", user="alice") == ["1.0"]


def test_a_deleted_and_recreated_base_starts_empty_for_all_that_inherit(alice, make):
    base, top = make(2)
    rebase(alice, top, base)
    publish(alice, base, "phoenix", "1.0")
    assert versions(alice, top, "phoenix") == ["1.0"]
    assert alice.delete("/" + base, user="alice").status == 201
    assert page(alice, top, "phoenix").status == 404
    alice.add_index(base)
    assert page(alice, top, "phoenix").status == 404
    publish(alice, base, "phoenix", "2.0")
    assert versions(alice, top, "phoenix") == ["2.0"]


def test_every_acknowledged_upload_is_visible_under_concurrent_reading(alice, make):
    base, top = make(2)
    rebase(alice, top, base)
    done, faults = threading.Event(), []

    def read():
        seen = 0
        while not done.is_set():
            reply = alice.get("/%s/+simple/busy/" % top, headers={"Accept": SIMPLE_JSON})
            count = len(json.loads(reply.body)["files"]) if reply.status == 200 else 0
            if reply.status not in (200, 404) or count < seen:
                faults.append((reply.status, count, seen))
            seen = count

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for number in range(10):
            publish(alice, base, "busy", "1.%d" % number)
            assert len(alice.filenames(top, "busy")) == number + 1
    finally:
        done.set()
        for reader in readers:
            reader.join(30)
    assert faults == []
