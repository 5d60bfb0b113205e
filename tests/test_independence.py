"""No index's configuration, traffic or upstream changes what another index answers, or when."""

import os
import threading
import time

import pytest

import devpi_lite as d
from harness import Server, eventually, get, page, patched, sdist, wheel
from scripted import Gate, Scripted, asked, begin, entry, is_stale, link_to, mirror, publish_at, raw

# One who asks waits for long; upstream is given up soon.
BOUNDS = "devpi_lite.Limits.upstream_stall = 0.3"


@pytest.fixture(scope="module")
def indexes(tmp_path_factory):
    """A server with users mia and eve."""
    folder = tmp_path_factory.mktemp("independence")
    server = Server(folder / "data", "--request-timeout", 20)
    server.script = patched(folder, BOUNDS)
    server.start()
    server.add_user("mia")
    server.add_user("eve")
    yield server
    server.stop()


def hangs(upstream):
    """An answer that does not come before the test is over."""
    return lambda handler: upstream.gate.wait(30)


def behind(function, *arguments):
    """Runs it in a thread, whatever comes of it."""
    def run():
        try:
            function(*arguments)
        except OSError:
            pass        # the server may be gone by then
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def lib(upstream, *versions):
    upstream.page("lib", *({"filename": "lib-%s.tar.gz" % version, "url": "/f", "hashes": {}}
                           for version in versions))


# -- one host behind several mirrors


@pytest.mark.parametrize("bad", ("unsendable", "garbage", "reset", "hang", "error", "loop"))
def test_what_a_mirror_asks_for_in_vain_pauses_no_other_one_of_the_host(indexes, scripted, bad):
    answers = {"garbage": raw(b"\x00garbage\r\n\r\n"), "reset": raw(b""), "hang": hangs(scripted),
               "error": lambda handler: handler.reply(b"", status=500),
               "loop": lambda handler: handler.reply(b"", status=302, Location="/bad/x/")}
    lib(scripted, "1.0")
    scripted.answers["/bad/x/"] = answers.get(bad)
    good = mirror(indexes, scripted.url, mirror_cache_expiry=0)
    assert indexes.filenames(good, "lib") == ["lib-1.0.tar.gz"]
    evil = mirror(indexes, scripted.host_url + ("/\u00e9 " if bad == "unsendable" else "/bad/").strip())
    assert page(indexes, evil, "x").status == (404 if bad == "unsendable" else 502)
    lib(scripted, "1.0", "1.1")
    reply = page(indexes, good, "lib")
    assert not is_stale(reply) and len(reply.json()["files"]) == 2


def test_a_host_that_can_not_be_reached_is_paused_for_all_who_ask_it(indexes, upstream):
    upstream.publish("lib", "1.0")
    first, second = (mirror(indexes, upstream.url, mirror_cache_expiry=0) for _ in range(2))
    for index in (first, second):
        assert indexes.versions(index, "lib") == ["1.0"]
    upstream.stop()
    assert is_stale(page(indexes, first, "lib"))
    upstream.start()
    assert is_stale(page(indexes, second, "lib"))       # though it would answer again


def test_own_trouble_says_nothing_of_a_host(monkeypatch):
    client = d.UpstreamClient(d.Settings(""))

    class Connection:
        error = OSError(24, "Too many open files")

        def connect(self):
            raise self.error
    with pytest.raises(OSError):
        client._connect(("http", "h", 80), Connection())
    assert not client.is_paused("http://h/")
    Connection.error = ConnectionRefusedError(111, "refused")
    with pytest.raises(OSError):
        client._connect(("http", "h", 80), Connection())
    assert client.is_paused("http://h/") and not client.is_paused("https://h/")


@pytest.mark.parametrize("url, sent", (
    ("http://ex.org/\u00e9/?\u00fc=1", "http://ex.org/%C3%A9/?%C3%BC=1"),
    ("http://b\u00fccher.example:8080/a%20b/", "http://xn--bcher-kva.example:8080/a%20b/"),
    ("http://j\u00f6rg:p\u00e4ss@ex.org/", "http://j%C3%B6rg:p%C3%A4ss@ex.org/"),
    ("http://ex.org/\ud800/", None), ("http://\u00e9..example/", None)))
def test_a_url_is_kept_as_it_can_be_sent(url, sent):
    if sent is None:
        with pytest.raises(d.BadRequest):
            d.to_url("mirror_url", url)
    else:
        assert d.to_url("mirror_url", url) == sent


# -- one file behind several mirrors


@pytest.mark.parametrize("other", ("hang", "missing", "wrong"))
def test_a_file_is_waited_for_at_the_own_upstream_alone(indexes, scripted, other):
    archive = sdist("popular", "2.0", summary=os.urandom(8).hex())
    path = publish_at(scripted, archive)
    theirs = Scripted()
    theirs.gate = scripted.gate
    try:
        publish_at(theirs, archive)
        theirs.answers[path] = {"hang": hangs(theirs), "missing": None, "wrong": b"other bytes"}[other]
        good, evil = mirror(indexes, scripted.url), mirror(indexes, theirs.url)
        link, evil_link = (link_to(indexes, index, archive.filename, "popular") for index in (good, evil))
        behind(get, indexes, evil_link)
        eventually(lambda: asked(theirs, path))
        began = time.monotonic()
        reply = get(indexes, link)
        assert (reply.status, reply.body) == (200, archive.content)
        assert time.monotonic() - began < 15
    finally:
        scripted.gate.set()
        theirs.stop()


@pytest.mark.parametrize("where", ("open stage", "protected stage", "protected mirror", "quarantined",
                                   "open mirror", "own"))
def test_to_know_a_hash_is_no_right_to_a_file(indexes, scripted, where):
    """Only what everybody may fetch anyway, or what is the mirror's own already, is not fetched again."""
    archive = wheel("secret", "1.0", summary=os.urandom(8).hex())
    theirs = Scripted()
    try:
        theirs.page("other", {"filename": "other-1.0-py3-none-any.whl", "url": "/gone",
                              "hashes": {"sha256": archive.sha256}})
        evil = mirror(indexes, theirs.url)
        if "stage" in where:
            private = {"acl_pkg_read": ["mia"]} if "protected" in where else {}
            indexes.add_index("mia/" + "-".join(where.split()), **private)
            assert indexes.upload("mia/" + "-".join(where.split()), archive).status == 200
        else:
            upstream = theirs if where == "own" else scripted
            path = publish_at(upstream, archive)
            index = evil if where == "own" else mirror(indexes, upstream.url, **(
                {"acl_pkg_read": ["mia"]} if "protected" in where else {}))
            indexes.fetch(index, archive.filename, "secret", user="mia")
            if where == "quarantined":
                upstream.answers["/simple/secret/"]["project-status"] = {"status": "quarantined"}
                assert indexes.post("/%s/+simple/secret/refresh" % index, user="mia").status == 302
            upstream.answers.pop(path)
        link = link_to(indexes, evil, "other-1.0-py3-none-any.whl", "other")
        reply = get(indexes, link)
        if where in ("open mirror", "own"):
            assert (reply.status, reply.body) == (200, archive.content)
            assert get(indexes, link + ".metadata").body == archive.metadata
        else:
            assert reply.status == 404 and asked(theirs, "/gone")
            assert get(indexes, link + ".metadata").status == 404
    finally:
        theirs.stop()


# -- places at a host, and in all


class Holding:
    """Flights that last until they are let go."""

    def __init__(self, places, lane_limit):
        self.flights = d.SingleFlight("test", places, lane_limit)
        self.gate, self.begun = threading.Event(), []
        self.numbers = iter(range(10 ** 6))

    def start(self, index, lane="host"):
        def hold():
            self.begun.append(index)
            self.gate.wait(30)
        return self.flights.start(next(self.numbers), lane, index, d.Flight(hold))

    def under_way(self):
        return self.flights.under_way[None]

    def end(self):
        self.gate.set()
        self.flights.settle(30)
        assert self.flights.flights == self.flights.under_way == self.flights.waiting == {}
        assert self.flights.waiting_of == {}


def index_of(user, number):
    return d.Index(number, user, "m%d" % number, {})


def test_an_index_leaves_places_of_a_host_to_others():
    held = Holding(100, 24)
    greedy, modest = index_of("eve", 1), index_of("mia", 2)
    for _ in range(100):
        held.start(greedy)
    assert held.under_way() == 16
    for _ in range(3):
        held.start(modest)
    assert held.under_way() == 19
    eventually(lambda: held.begun.count(modest) == 3)
    held.end()
    assert len(held.begun) == 103


def test_an_owner_leaves_places_to_others_over_all_hosts_and_indexes():
    held = Holding(10, 24)
    for number in range(60):
        held.start(index_of("eve", number), "host %d" % number)
    assert held.under_way() == 20
    held.start(index_of("mia", 99), "another")
    assert held.under_way() == 21
    held.end()


def test_indexes_that_wait_for_one_host_take_turns():
    held = Holding(1, 1)
    many, few = index_of("eve", 1), index_of("mia", 2)
    for _ in range(5):
        held.start(many)
    last = held.start(few)
    held.gate.set()
    assert last.wait(30)
    held.end()
    assert held.begun.index(few) <= 2


def test_one_index_that_may_wait_no_more_does_not_keep_another_from_it(monkeypatch):
    monkeypatch.setattr(d.Limits, "waiting_flights", 2)
    held = Holding(1, 1)
    many, few = index_of("eve", 1), index_of("mia", 2)
    for _ in range(3):
        held.start(many)
    with pytest.raises(d.Busy):
        held.start(many)
    held.start(few)
    held.end()


def test_a_flood_of_names_that_hang_holds_up_no_other_mirror_of_the_host(indexes, scripted):
    evil, good = mirror(indexes, scripted.host_url + "/slow/"), mirror(indexes, scripted.url)
    indexes.patch("/" + evil, {"title": "slow"}, user="mia")
    lib(scripted, "1.0")
    flood = []
    for number in range(40):
        scripted.answers["/slow/n%d/" % number] = hangs(scripted)
        flood.append(behind(page, indexes, evil, "n%d" % number))
    eventually(lambda: len(scripted.requests) >= 12)
    assert indexes.filenames(good, "lib") == ["lib-1.0.tar.gz"]
    scripted.gate.set()
    for thread in flood:
        thread.join(30)


# -- what is remembered


def test_who_has_most_in_memory_loses_first():
    memory = d.FairMemory(10)
    for number in range(3):
        memory.put("mia", number, "note")
    for number in range(100):
        memory.put("eve", number, "note")
    assert [memory.get("mia", number, None) for number in range(3)] == ["note"] * 3
    assert sorted(memory.notes["eve"]) == list(range(93, 100)) and memory.count == 10
    for number in range(3):
        memory.pop("mia", number)
    memory.pop("mia", 0)
    assert sorted(memory.notes) == ["eve"] and memory.count == 7


def test_a_flood_of_missing_names_makes_no_other_mirror_forget(tmp_path, scripted):
    server = Server(tmp_path / "data")
    server.script = patched(tmp_path, "devpi_lite.Limits.missing_projects = 6")
    server.start()
    try:
        server.add_user("mia")
        good, evil = mirror(server, scripted), mirror(server, scripted.host_url + "/other/")
        for number in range(8):
            assert page(server, good, "missing").status == 404
            assert page(server, evil, "n%d" % number).status == 404
        assert len(asked(scripted, "/simple/missing/")) == 1
    finally:
        server.kill()


# -- threads of requests


def test_places_to_wait_are_shared_out_by_owner(monkeypatch):
    monkeypatch.setattr(d.Limits, "crowded_wait", 0.2)
    patience, held = d.Patience(12), []

    def take(owner):
        place = patience.place(owner)
        held.append(place)
        return place.__enter__()
    assert [take("eve") for _ in range(10)] == [float("inf")] * 10
    assert 0 < take("eve") <= 0.2       # it sees whether upstream is slow
    time.sleep(0.2)
    assert patience.longest("eve") == 0
    assert take("mia") == float("inf")
    for place in held:
        place.__exit__(None, None, None)
    assert patience.longest("eve") == float("inf") and patience.waiting == {} and patience.count == 0


@pytest.fixture
def narrow(tmp_path):
    """A server of few threads: 2 that work, 6 more that wait; so 5 may wait for one owner's mirrors."""
    server = Server(tmp_path / "data", "--threads", 2, "--request-timeout", 20)
    server.script = patched(tmp_path, "devpi_lite.Limits.crowded_wait = 0.2")
    server.start()
    server.add_user("mia")
    server.add_user("eve")
    yield server
    server.kill()       # its crowds may still wait


def test_a_crowd_at_a_mirror_that_hangs_leaves_threads_to_others(narrow, scripted):
    lib(scripted, "1.0")
    narrow.add_mirror("eve/m", scripted.host_url + "/slow/", mirror_cache_expiry=0)
    narrow.add_mirror("mia/m", scripted)
    scripted.page("old", entry("old-1.0.tar.gz"))
    scripted.answers["/slow/old/"] = scripted.answers["/simple/old/"]
    assert page(narrow, "eve/m", "old").status == 200
    for number in range(20):
        scripted.answers["/slow/n%d/" % number] = hangs(scripted)
    scripted.answers["/slow/old/"] = hangs(scripted)
    for number in range(20):
        behind(page, narrow, "eve/m", "n%d" % number)
    eventually(lambda: page(narrow, "eve/m", "late").status == 503)
    # those beyond the bound are about to go
    eventually(lambda: page(narrow, "mia/m", "lib").status == 200, 10)
    assert is_stale(page(narrow, "eve/m", "old"))       # what is here is served


def test_a_crowd_at_files_that_do_not_end_leaves_threads_to_others(narrow, scripted):
    archives = [sdist("lib", "1.%d" % number, summary=os.urandom(8).hex()) for number in range(12)]
    gates = [Gate(scripted, "/files/" + archive.filename, archive.content) for archive in archives]
    try:
        scripted.page("lib", *(entry(archive.filename, hashes={"sha256": archive.sha256})
                               for archive in archives))
        narrow.add_mirror("eve/files", scripted)
        narrow.add_mirror("mia/files", scripted.host_url + "/other/")
        scripted.answers["/other/lib/"] = {"meta": {"api-version": "1.0"}, "files": []}
        links = [link_to(narrow, "eve/files", archive.filename, "lib") for archive in archives]
        for link in links[:-1]:
            behind(get, narrow, link)

        def refused():
            connection, response = begin(narrow, links[-1])
            connection.close()
            return response.status == 503 and response.getheader("Retry-After") == "10"
        eventually(refused)
        eventually(lambda: page(narrow, "mia/files", "lib").status == 200, 10)
    finally:
        for gate in gates:
            gate.opened.set()
