"""Who is told what of indexes that are not for everybody: one table of states, callers and routes decides every answer.

The same question about a name that a protected index has, and about one that it does not have, gets the same answer.
"""

import itertools
import re

import pytest

from harness import SIMPLE_JSON, Server, Upstream, links, wheel

INSTALLER = {"User-Agent": "pip/26.3", "Accept": "*/*"}
ROUTES = {
    "simple, JSON": ("/{index}/+simple/{project}/", {"Accept": SIMPLE_JSON}),
    "simple, HTML": ("/{index}/+simple/{project}/", {"Accept": "text/html"}),
    "simple, installer": ("/{index}/+simple/{project}", INSTALLER),
    "project, installer": ("/{index}/{project}/", INSTALLER),
    "project": ("/{index}/{project}", {}),
    "version": ("/{index}/{project}/1.0", {}),
    "PyPI's JSON": ("/{index}/+pypi/{project}/json", {}),
    "PyPI's JSON of a version": ("/{index}/pypi/{project}/1.0/json", {}),
}
CALLERS = {     # name, user, password (None: by token), headers
    "nobody": (None, None, {}),
    "wrong password": ("reader", "wrong", {}),
    "devpi-client": (None, None, {"User-Agent": "devpi-client/7.3.0"}),
    "stranger": ("stranger", None, {}),
    "reader": ("reader", None, {}),
    "owner": ("owner", None, {}),
    "root": ("root", None, {}),
}
REFUSED = {"nobody": 401, "wrong password": 401, "devpi-client": 403, "stranger": 403}
ALL, NONE = dict.fromkeys(CALLERS, 200), dict.fromkeys(CALLERS, 404)
PRIVATE, NOT_THERE = {**ALL, **REFUSED}, {**NONE, **REFUSED}
TABLE = [       # state, index, project, statuses
    ("missing index", "owner/none", "merger", NONE),
    ("open", "owner/plain", "public", ALL),
    ("open, unknown name", "owner/plain", "unknown", NONE),
    ("protected", "owner/secret", "merger", PRIVATE),
    ("protected, unknown name", "owner/secret", "unknown", NOT_THERE),
    ("protected mirror", "owner/paid", "bought", PRIVATE),
    ("protected mirror, unknown name", "owner/paid", "unknown", NOT_THERE),
    ("protected base", "owner/above", "merger", PRIVATE),
    ("protected base, unknown name", "owner/above", "unknown", NOT_THERE),
    ("protected base, name of the mirror beside it", "owner/above", "upstreams", PRIVATE),
    ("protected base, own name", "owner/above", "mine", ALL),
    ("protected base, own name that the base has too", "owner/above", "both", ALL),
    ("protected base of a base", "owner/higher", "merger", PRIVATE),
    ("protected base of a base, unknown name", "owner/higher", "unknown", NOT_THERE),
    ("protected base of a base, name below", "owner/higher", "mine", ALL),
    ("protected base, name that the whitelist admits", "owner/admits", "upstreams", ALL),
    ("protected base, unknown name that the whitelist admits", "owner/admits", "unknown", NOT_THERE),
    ("protected mirror as a base", "owner/overpaid", "bought", PRIVATE),
    ("protected mirror as a base, unknown name", "owner/overpaid", "unknown", NOT_THERE),
    ("quarantined", "owner/plain", "jailed", ALL),
    ("protected and quarantined", "owner/secret", "jailed", PRIVATE),
    ("protected base, quarantined there", "owner/above", "jailed", PRIVATE),
]
EMPTY_IF_QUARANTINED = {"PyPI's JSON of a version", "version"}
numbers = itertools.count(1)


@pytest.fixture(scope="module")
def upstreams():
    public, paid = Upstream().start(), Upstream().start()
    public.publish(wheel("upstreams", "1.0"))
    paid.publish(wheel("bought", "1.0"))
    yield public, paid
    public.stop()
    paid.stop()


@pytest.fixture(scope="module")
def site(tmp_path_factory, upstreams):
    site = Server(tmp_path_factory.mktemp("visibility") / "server").start()
    site.login("root", "secret")
    for user in ("owner", "reader", "stranger"):
        site.add_user(user)
        site.login(user)
    closed = {"acl_pkg_read": ["reader"]}
    site.add_mirror("owner/pypi", upstreams[0], mirror_cache_expiry=0)
    site.add_mirror("owner/paid", upstreams[1], mirror_cache_expiry=0, **closed)
    for name, config in (("plain", {}), ("secret", closed), ("above", {"bases": ["owner/secret", "owner/pypi"]}),
                         ("higher", {"bases": ["owner/above"]}), ("overpaid", {"bases": ["owner/paid", "owner/pypi"]}),
                         ("admits", {"bases": ["owner/secret", "owner/pypi"], "mirror_whitelist": ["upstreams", "unknown"]})):
        site.add_index("owner/" + name, **config)
    for index, *projects in (("plain", "public", "jailed"), ("secret", "merger", "both", "jailed"), ("above", "mine", "both")):
        for project in projects:
            assert site.upload("owner/" + index, wheel(project, "1.0")).status == 200
            if project == "jailed":
                body = {"project-status": {"status": "quarantined"}}
                assert site.patch("/owner/%s/jailed" % index, body, user="owner").status == 200
    yield site
    site.kill()


def ask(site, caller, path, headers, method="GET"):
    user, password, more = CALLERS[caller]
    headers = {**headers, **more, "X-Number": str(next(numbers))}       # a head of its own: nothing is answered from memory
    return site.request(method, path, headers=headers, user=user, password=password)


@pytest.mark.parametrize("state, index, project, statuses", TABLE, ids=[row[0] for row in TABLE])
def test_every_route_says_what_the_table_says(site, state, index, project, statuses):
    for (name, (path, headers)), (caller, status) in itertools.product(ROUTES.items(), statuses.items()):
        if caller == "devpi-client" and "User-Agent" in headers:
            continue
        if status == 200 and project == "jailed" and name in EMPTY_IF_QUARANTINED:
            continue
        for method in ("GET", "HEAD", "GET"):
            reply = ask(site, caller, path.format(index=index, project=project), headers, method)
            assert (name, caller, reply.status) == (name, caller, status)
        if status == 401:
            assert reply.headers.get("WWW-Authenticate") == 'Basic realm="pypi"'


PAIRS = [("owner/secret", "merger"), ("owner/paid", "bought"), ("owner/above", "merger"), ("owner/above", "jailed"),
         ("owner/above", "upstreams"), ("owner/higher", "merger"), ("owner/overpaid", "bought")]


@pytest.mark.parametrize("index, project", PAIRS)
@pytest.mark.parametrize("caller", REFUSED)
def test_a_known_and_an_unknown_name_get_the_same_words(site, index, project, caller):
    for path, headers in ROUTES.values():
        answers = {ask(site, caller, path.format(index=index, project=each), headers).text.replace(each, "NAME")
                   for each in (project, "unknown")}
        assert len(answers) == 1 and "secret" not in answers.pop().replace(index, "")


def test_no_protected_mirror_and_none_beside_a_protected_base_is_asked_for_strangers(site, upstreams):
    for upstream in upstreams:
        upstream.reset()
    for index, project in itertools.product(("owner/paid", "owner/above", "owner/overpaid"), ("fresh-name", "other-name")):
        for caller, (path, headers) in itertools.product(REFUSED, ROUTES.values()):
            if caller != "devpi-client" or headers != INSTALLER:
                assert ask(site, caller, path.format(index=index, project=project), headers).status in (401, 403)
    assert [upstream.requests for upstream in upstreams] == [[], []]
    for index in ("owner/paid", "owner/overpaid"):
        site.post("/%s/+simple/fresh-name/refresh" % index, user="stranger")
    assert upstreams[1].requests == []
    ask(site, "reader", "/owner/paid/+simple/fresh-name/", {})
    assert upstreams[1].requests


def test_what_a_stranger_gets_is_kept_apart_from_what_a_reader_gets(site):
    page = "/owner/above/+simple/both/"
    assert site.upload("owner/secret", wheel("both", "2.0")).status == 200
    for _ in range(3):
        assert site.versions("owner/above", "both") == ["1.0"]
        assert site.versions("owner/above", "both", user="stranger") == ["1.0"]
        assert site.versions("owner/above", "both", user="reader") == ["1.0", "2.0"]
    etags = {user: site.get(page, user=user, headers={"Accept": SIMPLE_JSON}).headers["ETag"] for user in (None, "reader")}
    assert etags[None] != etags["reader"]
    reply = site.get(page, headers={"Accept": SIMPLE_JSON, "If-None-Match": etags["reader"]})
    assert reply.status == 200 and "private" in reply.headers["Cache-Control"]


LISTS = [("/owner/above/+simple/", {"Accept": "text/html", "User-Agent": "Mozilla/5.0"}), ("/owner/above/+simple/", {"Accept": SIMPLE_JSON}),
         ("/owner/above/+simple/", INSTALLER), ("/owner/higher/+simple/", {"Accept": "text/html"}), ("/owner", {}), ("/", {}), ("/+search?query=merger", {})]


@pytest.mark.parametrize("path, headers", LISTS)
def test_no_list_names_a_protected_index_or_what_it_has(site, path, headers):
    for caller in CALLERS:
        reply = ask(site, caller, path, headers)
        assert reply.status == 200
        if caller in REFUSED:
            assert "secret" not in reply.text and "merger" not in reply.text.replace('"query": "merger"', "")
    for caller in ("owner", "root"):
        reply = ask(site, caller, path, headers)
        if path in ("/", "/owner"):
            assert '"bases": ["owner/secret", "owner/pypi"]' in reply.text


def test_an_index_itself_tells_all_of_its_bases(site):
    """Clients ask so, without a login, whether they need one for what comes from there."""
    for caller in CALLERS:
        for path in ("/owner/above", "/owner/above?no_projects="):
            result = ask(site, caller, path, {}).result
            assert result["bases"] == ["owner/secret", "owner/pypi"]
            assert "merger" not in result.get("projects", ())


def test_files_of_quarantined_projects_are_for_nobody(site):
    page = "/owner/plain/jailed/1.0"
    (link,) = site.get(page, user="owner").result["+links"]
    secret = links(site, "owner/secret/jailed/1.0", user="owner")[0]["href"]
    for caller in CALLERS:
        assert ask(site, caller, site._path_of(link["href"]), {"Accept": "*/*"}).status == 403
        assert ask(site, caller, site._path_of(secret), {"Accept": "*/*"}).status == REFUSED.get(caller, 403)


def test_a_base_has_to_be_readable_by_who_sets_it(site):
    name = "stranger/probe"
    error = (403, "index owner/secret can't be a base: you have no permission to read it")
    reply = site.put("/" + name, {"bases": ["owner/plain", "owner/secret"]}, user="stranger")
    assert (reply.status, reply.json()["message"]) == error
    assert site.put("/" + name, {"bases": ["owner/plain"]}, user="stranger").status == 200
    for change in ({"bases": "owner/plain,owner/secret"}, ["bases+=owner/secret"], ["bases=owner/secret"], {"bases": "/owner/secret"}):
        reply = site.patch("/" + name, change, user="stranger")
        assert (reply.status, reply.json()["message"]) == error
    assert site.get("/" + name).result["bases"] == ["owner/plain"]
    assert site.patch("/" + name, ["bases+=owner/secret"], user="root").status == 200
    assert site.patch("/" + name, ["title=x"], user="stranger").status == 200        # it was there before
    assert site.patch("/" + name, {"bases": ["owner/secret"]}, user="stranger").status == 200


def test_a_missing_base_of_an_unreadable_index_is_not_named(site):
    """It is named to who may read the index that builds on it, as the reason why mirrors are shut out."""
    for name, config in (("gone", {}), ("secretive", {"bases": ["owner/gone"], "acl_pkg_read": ["reader"]}),
                         ("atop", {"bases": ["owner/secretive", "owner/pypi"]})):
        site.add_index("owner/" + name, **config)
    assert site.delete("/owner/gone", user="owner").status == 201
    for (path, headers), caller in itertools.product(ROUTES.values(), ("nobody", "stranger")):
        reply = ask(site, caller, path.format(index="owner/atop", project="upstreams"), headers)
        assert reply.status in (401, 403)
        said = re.sub("<style>.*?</style>", "", reply.text, flags=re.S)
        assert "gone" not in said and "secretive" not in said
    reply = site.get("/owner/atop/+simple/upstreams/", user="reader")
    assert reply.status == 403 and "owner/atop builds on owner/gone, which does not exist" in reply.text


OTHERS = [      # method, path below the index, body, headers: what else can be asked about a project or one of its files
    ("GET", "{project}/1.0/+doc/index.html", None, {"Accept": "text/html"}),
    ("GET", "{project}/latest/+doc/", None, {"Accept": "text/html"}),
    ("GET", "{file}", None, {"Accept": "*/*"}),
    ("GET", "{file}", None, {}),
    ("HEAD", "{file}.metadata", None, {"Accept": "*/*"}),
    ("POST", "{file}", {"a": 1}, {}),
    ("DELETE", "{file}", None, {}),
    ("DELETE", "{project}", None, {}),
    ("DELETE", "{project}/1.0?force", None, {}),
    ("PATCH", "{project}", {"project-status": {"status": "archived"}}, {}),
    ("PATCH", "{project}/1.0", {"yanked": True}, {}),
    ("PATCH", "{file}?yank", None, {}),
    ("PUSH", "", {"name": "{project}", "version": "1.0", "targetindex": "stranger/own"}, {}),
    ("PUSH", "", {"name": "{project}", "version": "1.0", "posturl": "http://127.0.0.1:9/", "username": "a", "password": "b"}, {}),
    ("POST", "+simple/{project}/refresh", None, {}),
    ("GET", "{project}?ignore_bases", None, {}),
    ("GET", "+simple/{project}/?format=application/vnd.pypi.simple.v1+json", None, {"If-None-Match": "*"}),
]


@pytest.mark.parametrize("caller", REFUSED)
@pytest.mark.parametrize("index", ["owner/secret", "owner/above"])
def test_all_that_can_be_asked_is_answered_alike_for_known_and_unknown_names(site, index, caller):
    if site.get("/stranger/own").status == 404:
        site.add_index("stranger/own")
    there = links(site, "owner/secret/merger/1.0", user="owner")[0]["href"].partition("/owner/secret/")[2]
    for method, path, body, headers in OTHERS:
        said = set()
        for project, file in (("merger", there), ("unknown", "+f/abc/0123456789abc/unknown-1.0-py3-none-any.whl")):
            sent = body and {key: project if value == "{project}" else value for key, value in body.items()}
            user, password, more = CALLERS[caller]
            reply = site.request(method, "/%s/%s" % (index, path.format(project=project, file=file)), sent,
                                 headers={**headers, **more}, user=user, password=password)
            text = reply.text.replace(file, "FILE").replace(project, "NAME").replace(file.rpartition("/")[2], "FILE")
            location = (reply.headers.get("Location") or "").replace(project, "NAME")
            said.add((reply.status, text, location))
        assert len(said) == 1, (method, path, said)
        assert index == "owner/above" or said.pop()[0] in (401, 403), (method, path)
    assert links(site, "owner/secret/merger/1.0", user="owner")[0]["href"].endswith(there)
