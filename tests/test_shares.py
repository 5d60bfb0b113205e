"""Nobody's account, connection or upstream costs others more than its share of memory and time."""

import base64
import concurrent.futures
import contextlib
import json
import os
import re
import threading
import time

import pytest

import devpi_lite
from harness import SIMPLE_JSON, Wire, user_pass, eventually, memory, multipart, patched, sdist

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")


def at_once(count, function):
    """What `count` calls of function(number), side by side, return."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, range(count)))


class Waits:
    """How long others wait for /+health/live, while the `with` lasts."""

    def __init__(self, server):
        self.server, self.seconds, self.ended = server, [], threading.Event()
        self.thread = threading.Thread(target=self.ask)

    def ask(self):
        while not self.ended.wait(0.02):
            began = time.monotonic()
            assert self.server.get("/+health/live").status == 200
            self.seconds.append(time.monotonic() - began)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()


HOLLOW = b"[]," * 100000        # JSON that takes thirty times its size when it is parsed
JSON_ENDPOINTS = {
    "login": ("POST", "/+login", b'{"user": "a", "password": [%s[]]}'),
    "new user": ("PUT", "/nobody", b'{"password": "x", "custom_data": [%s[]]}'),
    "user": ("PATCH", "/mem", b'{"custom_data": [%s[]]}'),
    "new index": ("PUT", "/mem/new", b'{"custom_data": [%s[]]}'),
    "index": ("PATCH", "/mem/dev", b'{"custom_data": [%s[]]}'),
    "push": ("POST", "/mem/dev", b'{"name": [%s[]]}'),
    "yank": ("PATCH", "/mem/dev/p/1.0", b'{"yanked": [%s[]]}'),
    "status": ("PATCH", "/mem/dev/p", b'{"project-status": [%s[]]}')}


@pytest.fixture(scope="module")
def site(shared_server):
    shared_server.add_user("mem")
    shared_server.login("mem")
    shared_server.add_index("mem/dev")
    assert shared_server.upload("mem/dev", sdist("p", "1.0")).status == 200
    return shared_server


@pytest.mark.parametrize("endpoint", JSON_ENDPOINTS)
def test_large_json_costs_neither_memory_nor_others_their_answers(site, endpoint):
    method, path, template = JSON_ENDPOINTS[endpoint]
    user = None if endpoint in ("login", "new user") else "mem"
    before = memory(site)
    with open("/proc/%d/clear_refs" % site.pid, "w") as peak:
        peak.write("5")             # VmHWM starts anew
    with Waits(site) as waits:
        replies = at_once(48, lambda _: site.request(method, path, template % HOLLOW, user=user))
    assert {reply.status for reply in replies} == {413}
    assert memory(site, peak=True) - before < 100 << 20
    assert sorted(waits.seconds)[-2:][0] < 0.3      # one may fall to the machine


def test_attributes_are_bounded_in_what_they_hold_not_in_bytes_alone(site):
    reply = site.patch("/mem/dev", {"custom_data": [[]] * 12000}, user="mem")
    assert reply.status == 413 and "may hold 10000 values at most" in reply.json()["message"]
    assert site.patch("/mem/dev", {"custom_data": {"a": list(range(5000))}}, user="mem").status == 200
    assert site.patch("/mem/dev", ["custom_data-="], user="mem").status == 200


def test_small_changes_of_a_large_index_do_not_fill_the_disk(make_server):
    server = make_server("--no-access-log", "--keep-log", "8M")
    server.add_user("large")
    server.login("large")
    server.add_index("large/dev", custom_data=base64.b64encode(os.urandom(180000)).decode())
    before = disk(server)
    for number in range(150):
        assert server.patch("/large/dev", {"title": str(number)}, user="large").status == 200
    assert disk(server) - before < 16 << 20     # 30 MB of entries were written; some MB are SQLite's own log


def disk(server):
    return sum(path.stat().st_size for path in server.directory.glob("devpi_lite.db*"))


def test_long_fields_of_forms_that_come_slowly_do_not_lie_in_memory(site):
    body, content_type = multipart({":action": "submit", "name": "slow", "version": "1.0",
                                    "description": "x" * (9 << 20)}, {})
    head = ("POST /mem/dev/ HTTP/1.1\r\nHost: x\r\nX-Devpi-Auth: %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n" % (
        user_pass("mem", site.tokens["mem"]), content_type, len(body))).encode()
    before = memory(site)
    wires = [Wire(site, head + body[:-100]) for _ in range(16)]
    eventually(lambda: len(deleted_files(site)) == 16)
    assert memory(site) - before < 60 << 20       # 144 MB of fields
    for wire in wires:
        wire.send(body[-100:])
    assert [wire.reply().status for wire in wires] == [200] * 16
    assert deleted_files(site) == []
    assert len(site.get("/mem/dev/slow/1.0").result["description"]) == 9 << 20


def test_long_readmes_of_many_releases_are_sent_one_by_one(make_server, tmp_path):
    server = make_server(script=patched(tmp_path, "devpi_lite.Limits.readme_piece = 1000\n"
                                                  "devpi_lite.Limits.streamed = 40000"))
    server.add_user("long")
    server.add_index("long/base", acl_upload=["long"])
    server.add_index("long/dev", bases=["long/base"])
    readmes = {"1.%d" % number: "é\n\"\\ %d" % number * 700 for number in range(8)}
    for index in ("long/base", "long/dev"):
        for version, readme in readmes.items():
            assert server.upload(index, sdist("long", version), fields={"description": readme}).status == 200
    for index, versions in (("long/dev", readmes), ("long/base", readmes)):
        reply = server.get("/%s/long" % index)
        assert int(reply.headers["Content-Length"]) == len(reply.body)
        assert {version: found["description"] for version, found in reply.result.items()} == versions
        assert server.get("/%s/long/1.3" % index).result == reply.result["1.3"]
    assert [shadow["description"] for shadow in server.get("/long/dev/long/1.3").result["+shadowing"]] == [readmes["1.3"]]


def test_a_request_for_much_of_two_indexes_does_not_wait_for_itself(make_server, tmp_path):
    server = make_server(script=patched(tmp_path, "devpi_lite.Limits.unclaimed = 1000\n"
                                                  "devpi_lite.Limits.large_claim = 10000\n"
                                                  "devpi_lite.Limits.claim_time = 5"))
    server.add_user("two")
    server.add_index("two/prod")
    server.add_index("two/dev", bases=["two/prod"])
    for index in ("two/prod", "two/dev"):
        assert server.upload(index, sdist("two", "1.0"), fields={"description": "x" * 20000}).status == 200
    began = time.monotonic()
    assert len(server.get("/two/dev/two").result["1.0"]["+shadowing"]) == 1
    assert time.monotonic() - began < 4


def test_a_large_page_is_fetched_while_it_is_asked_for(make_server, tmp_path, upstream):
    server = make_server(script=patched(tmp_path, "devpi_lite.Limits.unclaimed = 1000\n"
                                                  "devpi_lite.Limits.large_claim = 2000"))
    server.add_user("lp")
    server.add_mirror("lp/m", upstream, mirror_cache_expiry=0)
    for number in range(30):
        upstream.publish("many", "1.%d" % number)
    for _ in range(3):
        began = time.monotonic()
        reply = server.get("/lp/m/+simple/many/", headers={"Accept": SIMPLE_JSON})
        assert len(reply.json()["files"]) == 30 and time.monotonic() - began < 4       # not --request-timeout
        assert "no-store" not in reply.headers["Cache-Control"]


def test_large_work_is_done_one_at_a_time_with_a_rest_between(monkeypatch):
    pool, times = devpi_lite.MemoryPool(100 << 20), []

    def work():
        with pool.claim(devpi_lite.Limits.large_claim + 1):
            began = time.monotonic()
            time.sleep(0.1)
            times.append((began, time.monotonic()))
    began = time.monotonic()
    at_once(3, lambda _: work())
    for (_, ended), (next_began, _) in zip(sorted(times), sorted(times)[1:]):
        assert next_began - ended > 0.09
    assert pool.left == pool.size and sorted(times)[0][0] - began < 0.09


def test_all_indexes_of_an_account_together_are_bounded(make_server):
    server = make_server()
    server.add_user("many")
    statuses = [server.put("/many/i%d" % number, {"custom_data": "x" * 250000}, user="many").status for number in range(6)]
    assert statuses == [200, 200, 200, 200, 413, 413]
    assert server.put("/many/small", {}, user="many").status == 200
    assert server.patch("/many/i0", {"custom_data": "x"}, user="many").status == 200
    assert server.put("/many/i4", {"custom_data": "x" * 250000}, user="many").status == 200
    assert len(server.get("/").body) < 1200000


def deleted_files(server):
    """The open files of the server that have no name any more."""
    found = []
    for number in os.listdir("/proc/%d/fd" % server.pid):
        try:
            path = os.readlink("/proc/%d/fd/%s" % (server.pid, number))
        except OSError:
            continue
        if "/tmp/" in path and (path.endswith("(deleted)") or "#" in path):
            found.append(path)
    return found


def stalled(server, count):
    """Connections whose client reads nothing of a large answer but its first bytes."""
    wires = []
    for _ in range(count):      # one after the other: else some are told to come again later
        wires.append(Wire(server, b"GET /big/dev/big/1.0 HTTP/1.1\r\nHost: x\r\n\r\n", receive_buffer=4096))
        assert wires[-1].input.peek(1).startswith(b"HTTP/1.1 200 ")
    return wires


def with_long_readme(server):
    """Uploads a release with a README of 7 MB, more than the system takes of an unread answer; returns the memory after it."""
    server.add_user("big")
    server.add_index("big/dev")
    assert server.upload("big/dev", sdist("big", "1.0"), fields={"description": "x" * (7 << 20)}).status == 200
    return memory(server)


def test_answers_that_nobody_reads_are_bounded_in_memory(make_server, tmp_path):
    server = make_server("--no-access-log", script=patched(tmp_path, "devpi_lite.Limits.pending_memory = 16 << 20\n"
                                                                      "devpi_lite.Limits.large_claim = 64 << 20"))
    server.add_user("big")
    server.add_index("big/dev")
    text = "x" * (7 << 20)        # more than the system takes of an unread answer
    assert server.upload("big/dev", sdist("big", "1.0"), fields={"license": text}).status == 200
    before = memory(server)
    wires = stalled(server, 16)
    eventually(lambda: sum(map(int, re.findall(r"(\d+) answers are given up", server.output()))) >= 14)
    assert server.get("/big/dev/big/1.0").result["license"] == text
    assert memory(server) - before < 90 << 20     # of 112 MB that lie unread
    for wire in wires:
        wire.socket.close()


def test_a_long_readme_is_read_no_faster_than_clients_take_it(make_server):
    server = make_server("--no-access-log")
    before, readme = with_long_readme(server), "x" * (7 << 20)
    wires = stalled(server, 16)
    assert server.get("/big/dev/big/1.0").result["description"] == readme
    assert memory(server) - before < 40 << 20     # of 112 MB
    for wire in wires:
        wire.socket.close()


def test_a_change_of_other_metadata_lets_a_readme_be_read_to_its_end(make_server):
    server = make_server("--no-access-log")
    server.add_user("read")
    server.add_index("read/dev")
    archive, readme = sdist("read", "1.0"), "y" * (7 << 20)
    for first, second, is_whole in ((readme, readme, True), (readme, "z" + readme, False)):
        assert server.upload("read/dev", archive, fields={"description": first}).status == 200
        wire = Wire(server, b"GET /read/dev/read/1.0 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", receive_buffer=4096)
        assert wire.input.peek(1).startswith(b"HTTP/1.1 200 ")
        fields = {":action": "submit", "name": "read", "version": "1.0", "summary": "other", "description": second}
        assert server.post_form("read/dev", fields).status == 200
        try:
            size = len(wire.input.read())
        except ConnectionError:
            size = 0
        assert (size > len(readme)) == is_whole


def test_readers_that_take_nothing_hold_no_thread(make_server):
    server = make_server("--no-access-log", "--threads", "4")
    with_long_readme(server)
    wires = stalled(server, 40)
    body = json.dumps({"title": "new"}).encode()
    head = "PATCH /big/dev HTTP/1.1\r\nHost: x\r\nX-Devpi-Auth: %s\r\nContent-Length: %d\r\n\r\n" % (
        user_pass("big", server.tokens["big"]), len(body))
    slow = Wire(server, head.encode() + body[:5])
    time.sleep(0.7)
    slow.send(body[5:])
    assert slow.reply().status == 200
    for wire in wires:
        wire.socket.close()


def test_a_long_forwarded_address_costs_the_others_nothing(make_server):
    server = make_server("--no-access-log")
    head = "GET /+api HTTP/1.1\r\nHost: localhost\r\nX-Real-IP: %s,1.2.3.4\r\n\r\n" % ("a" * 15000)
    wires = [Wire(server, head.encode()) for _ in range(8)]
    began = time.monotonic()
    assert server.get("/+api").status == 200
    assert time.monotonic() - began < 2
    for wire in wires:
        wire.socket.close()


def test_who_pipelines_stands_behind_the_others_again(make_server, tmp_path):
    server = make_server("--threads", "4", "--no-access-log")
    requests = b"GET /+search?query=x HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000
    wires = [Wire(server, requests, receive_buffer=1 << 20) for _ in range(6)]
    waits = []
    for _ in range(5):
        began = time.monotonic()
        assert server.get("/+health/live").status == 200
        waits.append(time.monotonic() - began)
    assert sorted(waits)[2] < 1
    for wire in wires:
        wire.socket.close()


def test_an_owner_leaves_places_in_the_line_for_memory_to_others():
    pool, large, begun = devpi_lite.MemoryPool(100 << 20), devpi_lite.Limits.large_claim + 1, threading.Event()

    def wait(owner):
        begun.wait()
        try:
            with pool.claim(large, owner):
                time.sleep(0.001)
                return "done"
        except devpi_lite.Busy:
            return "busy"
    with pool.claim(large, "eve"), concurrent.futures.ThreadPoolExecutor(40) as threads:
        begun.set()
        eves = [threads.submit(wait, "eve") for _ in range(30)]
        eventually(lambda: sum(future.done() for future in eves) >= 22)
        alice = threads.submit(wait, "alice")
        time.sleep(0.05)
        assert not alice.done()
        pool.large.release()        # as if the first had ended
        results = [future.result() for future in eves]
        assert alice.result() == "done" and results.count("done") == 8
        pool.large.acquire()


def test_waits_for_one_owner_leave_places_to_others():
    crew = devpi_lite.Workers("test", 4, None)
    with contextlib.ExitStack() as stack:
        eves = [stack.enter_context(crew.away("eve")) for _ in range(12)]
        assert eves == [True] * 8 + [False] * 4
        assert stack.enter_context(crew.away("alice")) and stack.enter_context(crew.away(None))
    assert crew.outside == 0 and not crew.outside_of
