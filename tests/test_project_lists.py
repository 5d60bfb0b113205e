"""The project lists of mirrors: what is read, and what reading a hostile one costs (chapters 7, 8)."""

import gc
import json
import os
import subprocess
import sys
import threading
import time
import weakref

import pytest

import devpi_lite as d
from harness import PROGRAM, SIMPLE_JSON, patched, project_list
from scripted import Scripted, asked

URL = "http://localhost/mirror/simple/"


def listed(*found, **keys):
    return json.dumps(dict({"meta": {"api-version": "1.0"},
                            "projects": [{"name": name} for name in found]}, **keys)).encode()


# -- what a list says


@pytest.mark.parametrize("body, found", [
    (listed("b", "A.b", "a_B", "a-b", "b"), "a-b b"),
    (listed("-x-", "", "a b", "../../etc", '"><script>', "ok", "x" * 201, "\u00e4"), "ok x"),
    (listed("x", **{"meta": None}), "x"),
    (b'\xef\xbb\xbf {"projects": [{"name": "x"}], "meta": {"api-version": 1.0}, "z": [{"name": "no"}]} ', "x"),
    (b'{"projects":[{"name":"a","deep":{"name":"no"},"list":[{},{"x":1}],"n":1e5},null,5,[],'
     b'{"name":null},{"name":"b"}]}', "a b"),
    (b'{"projects":[{"name":"a\\u002db"},{"other":1,"name":"c"}]}', "a-b c"),
    (b'{"projects":[]}', ""),
    ('{"projects":[{"name":"x","n":%s}]}'.__mod__("9" * 5000).encode(), "x"),
    (listed(*["p%05d" % number for number in range(6000)]),
     " ".join("p%05d" % number for number in range(6000))),
    (listed("x").decode().encode("utf-16"), "x"),
])
def test_a_list_in_json(body, found):
    assert d.parse_names(URL, body, SIMPLE_JSON, 10000) == found.split()


@pytest.mark.parametrize("page, found", [
    ("<a href='/simple/Foo_Bar/'>Foo.Bar</a><A HREF=x>X</A>", "foo-bar x"),
    ("<!-- <a href='gone/'>gone</a> --><a href='here/'>here</a>", "here"),
    ("<!-- <a href=x\"> --><a href='here/'>here</a>", "here"),
    ("<script>'<a href=no/>no</a>'</script><p title='<a href=no/>no</a>'></p><a href=a/>a</a>", "a"),
    ("<a href='a/' title=\"the \"new\" one\">a</a><a href='b/'>b</a>", "a b"),
    ("<a name='top'>top</a><a>none</a><a href='#x'>none</a><a href='a/'>a</a>", "a"),
    ("<a href='foo/'><b>foo</b></a><a href='bar/'>  bar\n</a>", "bar foo"),
    ("<a href='baz/'></a><a href='qux/'>The Qux project</a>", "baz qux"),
    ("<a href='a-b/'>a&#45;b</a>", "a-b"),
    # directories as web servers list them
    ("<a href='../'>../</a><a href='a/'>a/</a><a href='long-name-of-one/'>long-name-..&gt;</a>",
     "a long-name-of-one"),
    ("<a href='?C=N;O=D'>Name</a><a href='/mirror/'>Parent Directory</a><a href='a/'>a/</a>", "a"),
    ("\ufeff<a href='a/'>a</a>", "a"),
    ("", ""),
])
def test_a_list_in_html(page, found):
    for text in (page, "<!DOCTYPE html><html><body>\n%s\n</body></html>" % page):
        assert d.parse_names(URL, text.encode(), "text/html", 100) == found.split()
    assert d.parse_names(URL, page.encode("utf-16"), "text/html", 100) == found.split()


@pytest.mark.parametrize("body, complaint", [
    (listed("x", meta={"api-version": "2.0"}), "API version '2.0'"),
    (b'{"projects": [{"name": "x"}], "meta": {"api-version": "2.0"}}', "API version '2.0'"),
    (b'<html><meta name="pypi:repository-version" content="2.0"><a href=x>x</a>',
     "API version '2.0'"),
    (b'{"message": "please log in"}', "it has no projects"),
    (b'{"projects": {"x": 1}}', "its projects are no array"),
    (b'{"projects": null}', "its projects are no array"),
    (listed("x")[:-2], "no ,"), (listed("x")[:-5], "no value"),
    (b'{"projects": [{"name": "x"}, ', "it ends inside of an array"),
    (b'{"projects": [', "it ends inside of an array"),
    (listed("x") + b"}", "text after its end"),
    (b'{"projects": [' + b"[" * 100000, "not a project list"),
    (b'{"projects": ["' + b"x" * (8 << 20) + b'"]}', "no value at"),
    (b"please log in", "no HTML"), (b"<html><a href=x", "the page ends inside"),
    (listed("a", "b", "c"), "more than 2 projects"),
], ids=lambda value: ascii(value)[:40])
def test_what_is_no_list_is_refused_with_a_reason(body, complaint):
    with pytest.raises(d.UpstreamTrouble) as trouble:
        d.parse_names(URL, body, SIMPLE_JSON if body[:1] == b"{" else "text/html", 2)
    assert complaint in trouble.value.message


@pytest.mark.parametrize("body", [
    b"<a " * 200000, b"<a href=x>" * 30000, b"<html>" + b"<!--" * 300000,
                                  b"<a href='x'>" + b"<" * 500000, b"<script>" * 100000,
    b"<a href=\"x\" y='" + b"<a x='>' " * 100000, b'{"projects":[' + b"{}," * 100000 + b"5]}",
                                  b'{"projects":[' + b"[]," * 30000 + b"5]}",
    b'{"projects":[' + b'{"x":{},"y":5},' * 20000 + b"5]}", b'{"projects":[' + b'"},' * 300000,
                                  b'{"":1' + b',"":1' * 20000],
    ids=lambda value: ascii(value)[:30])
def test_a_hostile_list_is_read_in_linear_time(body):
    began = time.process_time()
    try:
        d.parse_names(URL, body, "", 1000)
    except d.UpstreamTrouble:
        pass
    assert time.process_time() - began < 3


def ends(function, *args):
    """How a call ended: what it returned, or what of it upstream is to blame for.

    It runs in a thread, for one that never ends must not hold up the tests."""
    outcome = []

    def run():
        try:
            outcome.append(function(*args))
        except d.UpstreamTrouble as error:
            outcome.append(error)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert outcome, args
    return outcome[0]


def test_a_list_that_is_cut_anywhere_is_read_to_its_end():
    body = json.dumps(json.loads(listed("a", "b", x=["y", {"z": [1]}])), indent=1).encode()
    for end in range(len(body)):
        for cut in (body[:end], body[:end] + b" "):
            outcome = ends(d.parse_names, URL, cut, SIMPLE_JSON, 9)
            assert isinstance(outcome, d.UpstreamTrouble), cut
    assert ends(d.parse_names, URL, body, SIMPLE_JSON, 9) == ["a", "b"]


def test_a_page_that_is_cut_anywhere_is_read_to_its_end():
    files = [{"filename": "x-%d.tar.gz" % number, "url": "x-%d.tar.gz" % number,
              "hashes": {"sha256": "0" * 64}, "yanked": "[{"} for number in range(2)]
    page = {"meta": {"api-version": "1.1"}, "files": files, "versions": ["0", "1"], "name": "x"}
    for body in (json.dumps(page).encode(), json.dumps(page, indent=1).encode()):
        for end in range(len(body)):
            outcome = ends(d.parse_simple_page, "x", URL, body[:end], True)
            assert isinstance(outcome, d.UpstreamTrouble), body[:end]
        assert len(ends(d.parse_simple_page, "x", URL, body, True).files) == 2


# -- the process that reads it


def reader(folder, body=None, **job):
    """A started child process that reads the list in the folder."""
    if body is not None:
        (folder / "body").write_bytes(body)
    child = subprocess.Popen([sys.executable, str(PROGRAM), "_read-names"], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    job = dict({"url": URL, "folder": str(folder), "type": SIMPLE_JSON, "names": 1000000,
                "memory": 1 << 30, "cpu": 60}, **job)
    child.stdin.write(json.dumps(job).encode() + b"\n")
    child.stdin.flush()
    return child


def outcome(child):
    """(return code, standard output, standard error) of a child whose input stays open."""
    with child:
        said, complaint = child.stdout.read().decode(), child.stderr.read().decode()
    return child.returncode, said, complaint


def test_the_forms_of_a_list(tmp_path):
    many = ["p%05d" % number for number in range(25000)]
    assert outcome(reader(tmp_path, listed(*many))) == (0, '{"count": 25000}', "")
    assert (tmp_path / "names").read_text().split("\n") == many + [""]
    assert json.loads("[%s]" % (tmp_path / "names.json").read_text()) == many
    assert (tmp_path / "projects.html").read_text() == "".join('<a href="%s/">%s</a>\n' % (name,
        name) for name in many)
    entries = json.loads("[%s]" % (tmp_path / "projects.json").read_text())
    assert [entry["name"] for entry in entries] == many
    whole = json.loads(d.gzip.decompress((tmp_path / "projects.json.gz").read_bytes()))
    assert [entry["name"] for entry in whole["projects"]] == many
    whole = d.gzip.decompress((tmp_path / "projects.html.gz").read_bytes())
    assert whole.endswith(b'<a href="p24999/">p24999</a>\n</body></html>\n')
    assert not (tmp_path / "body").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems know no bound on memory")
def test_a_list_that_takes_too_much_memory_ends_its_reader_alone(tmp_path):
    code, said, complaint = outcome(reader(tmp_path,
                                           '{"projects":["\U0001f600'.encode() + b"x" * (40 << 20),
                                           memory=160 << 20))
    assert (code, said) == (1, "")
    assert "reading the project list takes more than 160 MiB of memory" in complaint


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_the_reader_ends_when_its_server_has_gone(tmp_path):
    os.mkfifo(tmp_path / "body")        # which nobody writes: it waits for ever
    child = reader(tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.3)
    child.stdin.close()
    assert child.wait(20) == 1
    child.stdout.close(), child.stderr.close()


# The program with small bounds; while it reads a list, a file in `cache` names the list's user.
FEW_READERS = """
import os, time
limits = devpi_lite.Limits
limits.listed_names, limits.list_memory, limits.upstream_list = 50, 300 << 20, 5000

def read_slowly(self, url, folder, content_type):
    cache = os.path.join(os.path.dirname(os.path.dirname(folder)), "cache")
    mark = os.path.join(cache, "going-" + url.split("/")[-2] + "-" + str(time.time_ns()))
    open(mark, "w").close()
    time.sleep(0.15)
    try:
        return read(self, url, folder, content_type)
    finally:
        os.unlink(mark)

read, devpi_lite.MirrorLists._read_list = devpi_lite.MirrorLists._read_list, read_slowly
popen = devpi_lite.subprocess.Popen

def logged(command, **keywords):
    os.write(1, ("child: %s\\n" % command[-1]).encode())
    return popen(command, **keywords)

devpi_lite.subprocess.Popen = logged
"""


def test_few_lists_are_read_at_a_time_and_large_ones_refused(make_server, tmp_path):
    server, scripted = make_server(script=patched(tmp_path, FEW_READERS)), Scripted()
    try:
        for user in ("mia", "bob"):
            server.add_user(user)
        indexes = ["mia/a", "mia/b", "bob/c"]
        for index in indexes:
            user = index[:3]
            body = listed(user, index[-1])
            body = d.gzip.compress(body[:60]) + d.gzip.compress(body[60:])      # of two members
            scripted.answers["/%s/%s/" % (index, user)] = lambda handler, body=body: handler.reply(
                body, SIMPLE_JSON, Content_Encoding="gzip")
            server.add_mirror(index, scripted.host_url + "/%s/%s/" % (index, user))
        seen, found, cache = [], {}, os.path.join(str(server.directory), "cache")
        askers = [threading.Thread(target=lambda index=index: found.update({index: project_list(server,
            index)})) for index in indexes]
        for asker in askers:
            asker.start()
        while any(asker.is_alive() for asker in askers):
            going = [name for name in os.listdir(cache) if name.startswith("going")]
            seen.append([name.split("-")[1] for name in going])
            time.sleep(0.01)
        assert found == {index: sorted([index[:3], index[-1]]) for index in indexes}
        assert max(map(len, seen)) <= 2
        assert all(len(users) == len(set(users)) for users in seen)     # each user's take turns
        assert server.whole_output().count("child: _read-names") == 3

        for name, body, complaint in (("many", listed(*["p%d" % number for number in range(51)]),
                                       "more than 50 projects"),
                                      ("long", listed("x" * 5000), "larger than 5000 bytes")):
            path = "/bob/%s/" % name
            scripted.answers[path] = lambda handler, body=body: handler.reply(body, SIMPLE_JSON)
            server.add_mirror("bob/" + name, scripted.host_url + path)
            for _ in range(2):          # what can't be read is not fetched again at once
                reply = server.get("/bob/%s/+simple/" % name, headers={"Accept": SIMPLE_JSON})
                assert reply.status == 502 and complaint in reply.text
            assert len(asked(scripted, path)) == 1
        assert server.whole_output().count("child: _read-names") == 4
        assert not os.listdir(os.path.join(str(server.directory), "tmp"))
    finally:
        scripted.stop()


def test_who_waits_for_a_share_waits_for_his_own(tmp_path):
    shares = d.Shares("lists", 2, 1, 7)
    with shares.one("mia", 1):
        with pytest.raises(d.Busy) as caught:
            with shares.one("mia", 0.01):
                pass
        assert caught.value.headers == [("Retry-After", "7")]
        assert caught.value.message == "too many lists just now, try again in 7 s"
        with shares.one("bob", 1):
            with pytest.raises(d.Busy):
                with shares.one("eve", 0.01):
                    pass
        with shares.one("eve", 1):
            pass
    with shares.one("mia", 1):
        pass
    assert not shares.taken


# -- what a page may cost


@pytest.mark.parametrize("body, complaint", [
    (b'{"files":[' + b"{}," * 1000 + b"{}]}", "more than 1000 values"),
    (b'{"files":[' + b"[]," * 1000 + b"[]]}", "more than 1000 values"),
    (b'{"files":[]' + b',"":1' * 600 + b"}", "more than 1000 values"),
    (b"<a href=x>" * 1001, "more than 1000 links"), (b"<html>" + b"<p>" * 6000, "too many tags"),
    (b"<html>" + b"<!---->" * 10001, "too many tags"), (b"<html" + b" x" * 11000, "too many tags"),
], ids=lambda value: ascii(value)[:20])
def test_a_page_of_too_much_is_refused(monkeypatch, body, complaint):
    monkeypatch.setattr(d.Limits, "page_files", 1000)
    with pytest.raises(d.UpstreamTrouble) as trouble:
        d.parse_simple_page("x", URL, body, body[:1] == b"{")
    assert complaint in trouble.value.message


def test_the_log_names_the_first_of_many_unusable_files(caplog):
    caplog.set_level("INFO")
    d.parse_simple_page("x", URL, b'{"files":[' + b"{}," * 1000 + b"{}]}", True)
    d.parse_simple_page("x", URL, b"<a href='x-1.zip#sha256=1'>" * 1000, False)
    assert len(caplog.messages) == 22


class Body:
    """An upstream's response whose body is at hand."""

    def __init__(self, data, encoding):
        self.file, self.size, self.encoding, self.url = d.io.BytesIO(data), len(data), encoding, URL

    def read(self, size):
        return self.file.read(size)

    def header(self, name):
        return self.encoding

    def length(self):
        return self.size


@pytest.mark.parametrize("encoding, squeeze", [("gzip", d.gzip.compress), ("deflate", d.zlib.compress)])
def test_a_small_body_that_becomes_a_large_one_comes_in_pieces(encoding, squeeze):
    large = bytes(5 << 20) + os.urandom(300000) + bytes(1 << 20)
    pieces = list(d.page_pieces(Body(squeeze(large), encoding), len(large), time.monotonic() + 60))
    assert b"".join(pieces) == large
    assert max(map(len, pieces)) <= 256 << 10
    with pytest.raises(d.UnreadablePage):
        d.read_page(Body(squeeze(large), encoding), len(large) - 1, time.monotonic() + 60)


def test_a_failure_does_not_keep_the_page_that_it_came_from():
    class Page:
        data = b"not JSON"
    watched = []

    def work():
        page = Page()
        watched.append(weakref.ref(page))
        try:
            d.parse_simple_page("x", URL, page.data, True)
        except d.UpstreamTrouble as trouble:
            raise d.UnreadablePage("again: " + trouble.message) from trouble
    gc.disable()        # which would find it, some time
    try:
        flight = d.Flight(work)
        flight.run()
        assert watched[0]() is None
    finally:
        gc.enable()
    assert flight.error.message.startswith("again: http://localhost/mirror/simple/: not a simple page")
