"""Hostile or unlucky peers: crowds, slow clients, late uploads, bombs, endless upstreams. Others go on being served."""

import contextlib
import dataclasses
import gzip
import http.client
import json
import math
import re
import socket
import tarfile
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import pytest

from harness import (
    ANY, HTML, PROGRAM, SIMPLE_JSON, Server, Wire, blobs, eventually, memory, multipart, patched,
    sdist, timed, user_pass, wheel, worked)
from scripted import Scripted

GONE = (ConnectionError, http.client.HTTPException, socket.timeout)


@pytest.fixture(scope="module")
def site(shared_server):
    """The shared server with the index rock/dev, which holds pkg 1.0."""
    shared_server.add_user("rock")
    shared_server.add_index("rock/dev", bases=[])
    assert shared_server.upload("rock/dev", wheel("pkg", "1.0")).status == 200
    return shared_server


class RawUpstream(Scripted):
    """An upstream that speaks bytes: `answer(path, send)` is called for each request, then the connection is closed."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def answer_to(self, path):
        def send_and_close(handler):
            handler.close_connection = True
            self.answer(path, handler.wfile.write)
        return send_and_close


def head(first, *lines):
    return "".join(line + "\r\n" for line in (first, "Host: localhost") + lines + ("",)).encode()


def answer(body, *lines):
    return ("".join(line + "\r\n" for line in ("HTTP/1.1 200 OK",) + lines + ("",))).encode() + body


def json_page(project, *files):
    return json.dumps({"meta": {"api-version": "1.0"}, "name": project, "files": list(files)}).encode()


def together(count, function):
    """The results of function(0) … function(count - 1), run at the same time."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, range(count)))


def file_path(server, index, project):
    (file,) = server.simple(index, project)["files"]
    url = urllib.parse.urljoin("/%s/+simple/%s/" % (index, project), file["url"])
    return urllib.parse.urlsplit(url).path


# -- crowds and slow clients ----------------------------------------------------------------------


def test_a_crowd_beyond_the_connection_limit_does_not_end_the_server(make_server):
    server = make_server("--connections", 30)
    until, answered = time.monotonic() + 1, []

    def client(number):
        turn = 0
        while time.monotonic() < until:
            turn += 1
            with contextlib.suppress(*GONE):
                answered.append(server.get("/nobody-%d-%d" % (number, turn)).status)

    together(80, client)
    assert server.running
    assert set(answered) <= {404, 503} and 404 in answered

    def served():       # once it has noticed that the crowd is gone
        with contextlib.suppress(*GONE):
            return server.get("/+api").status == 200

    eventually(served)
    assert server.get("/nobody-else").status == 404
    assert "Traceback" not in server.whole_output()


def test_a_header_of_many_spaces_is_read_at_once_and_delays_nobody(site):
    before = worked(site)
    with Wire(site, timeout=60) as wire:
        wire.send(head("GET /+api HTTP/1.1", "X: a" + " " * 60000 + "b"))
        other = site.get("/nobody-here")
        assert (other.status, wire.reply().status) == (404, 200)
    assert worked(site) - before < 1


@pytest.fixture(scope="module")
def four_workers(tmp_path_factory):
    """A server of four worker threads with the index slow/dev, which holds a file of 5 MB: `path`, `content`."""
    server = Server(tmp_path_factory.mktemp("four") / "server", "--threads", 4).start()
    server.add_user("slow")
    server.add_index("slow/dev", bases=[])
    archive = wheel("large", "1.0", size=5 << 20)
    assert server.upload("slow/dev", archive).status == 200
    server.path, server.content = file_path(server, "slow/dev", "large"), archive.content
    yield server
    if server.running:
        server.kill()


def assert_prompt(server):
    time.sleep(0.3)
    for number in range(3):
        reply, seconds = timed(server.get, "/nobody-%d" % number)
        assert reply.status == 404 and seconds < 3


def test_readers_of_nothing_keep_no_worker_and_get_their_file_later(four_workers):
    ask = head("GET %s HTTP/1.1" % four_workers.path)
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(Wire(four_workers, ask, receive_buffer=8192)) for _ in range(40)]
        assert_prompt(four_workers)
        for reader in readers[::13]:
            assert reader.reply().body == four_workers.content
            reader.send(head("GET /+api HTTP/1.1"))
            assert reader.reply().json()["type"] == "apiconfig"


def test_senders_of_a_head_without_its_body_keep_no_worker(four_workers):
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(Wire(four_workers, head("POST /+login HTTP/1.1", "Content-Length: 10")))
        assert_prompt(four_workers)


def test_thrice_as_many_senders_of_a_byte_a_second_as_workers_hold_up_nobody(four_workers):
    begin = head("POST /+login HTTP/1.1", "Transfer-Encoding: chunked") + b"1\r\n{\r\n"
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        senders = [stack.enter_context(Wire(four_workers, begin)) for _ in range(40)]

        def drip():
            while not stop.wait(1):
                for sender in senders:
                    with contextlib.suppress(OSError):
                        sender.send(b"1\r\n \r\n")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            assert_prompt(four_workers)
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize(
    "lines, later",
    [
        (["Expect: 100-continue", "Content-Length: 5"], b""),
        (["Content-Length: 70000000"], b""),
        (["Connection: close"], b"GET /+api HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    ],
    ids=["a body that never comes", "a huge body that never comes", "another request behind the last"],
)
def test_a_slow_reader_gets_all_of_an_answer_after_which_the_connection_is_closed(four_workers, lines, later):
    with Wire(four_workers, head("GET %s HTTP/1.1" % four_workers.path, *lines), receive_buffer=8192) as wire:
        time.sleep(0.5)
        wire.send(later)
        assert wire.reply().body == four_workers.content
        assert wire.closed()


def test_a_stop_lets_a_slow_reader_have_the_whole_answer(make_server):
    server = make_server("--threads", "4")
    server.add_user("rock")
    server.add_index("rock/dev")
    archive = wheel("big", "1.0", size=5_000_000)
    assert server.upload("rock/dev", archive).status == 200
    (file,) = server.simple("rock/dev", "big")["files"]
    path = urllib.parse.urljoin("/rock/dev/+simple/big/", file["url"])
    with Wire(server, head("GET %s HTTP/1.1" % path), receive_buffer=8192) as wire:
        assert wire.input.peek()        # the answer has begun
        time.sleep(0.5)
        wire.send(head("GET /+api HTTP/1.1"))
        server.process.terminate()
        assert wire.reply().body == archive.content
    assert server.wait() == 0


def test_a_crowd_that_had_to_queue_leaves_as_many_workers_as_before(make_server):
    server = make_server("--threads", "4", script=PROGRAM)
    with ThreadPoolExecutor(40) as crowd:       # each takes a slow hash, so that most of them queue
        list(crowd.map(lambda number: server.post("/+login", {"user": "root", "password": str(number)},
                                                  headers={"X-Real-IP": "10.0.0.%d" % number}), range(40)))
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(Wire(server, head("POST /+login HTTP/1.1", "Transfer-Encoding: chunked")))
            time.sleep(0.02)
        began = time.monotonic()
        assert server.get("/+status?x").status == 200
        assert time.monotonic() - began < 15    # and not when those who don't go on are given up


def test_the_connection_limit_closes_idle_connections_before_busy_ones(make_server):
    server = make_server("--connections", "20", "--threads", "4")
    server.add_user("rock")
    body = b'{"user": "rock", "password": "pw"}'
    with contextlib.ExitStack() as stack:
        busy = stack.enter_context(Wire(server, head("POST /+login HTTP/1.1", "Content-Length: %d" % len(body)) + body[:10]))
        for _ in range(25):
            stack.enter_context(Wire(server))
        time.sleep(0.2)
        busy.send(body[10:])
        assert busy.reply("POST").status == 200


def test_blank_lines_between_requests_are_passed_over(site):
    ask = head("GET /+api HTTP/1.1")
    with Wire(site, ask + b"\r\n" + ask + b"\r\n\r\n" + ask) as wire:
        assert [wire.reply().status for _ in range(3)] == [200, 200, 200]


def test_half_a_request_of_a_client_that_closed_its_side_is_answered_400(site):
    with Wire(site, head("POST /+login HTTP/1.1", "Content-Length: 100") + b"{}") as wire:
        wire.socket.shutdown(socket.SHUT_WR)
        assert wire.reply("POST").status == 400


def test_a_get_with_a_chunked_body_is_not_remembered_by_its_head(site):
    ask = head("GET /rock/dev/+simple/pkg/ HTTP/1.1", "Accept: text/html", "Transfer-Encoding: chunked")
    for _ in range(2):
        with Wire(site) as wire:
            for _ in range(2):
                wire.send(ask)
                time.sleep(0.1)
                wire.send(b"0\r\n\r\n")
                reply = wire.reply()
                assert reply.status == 200 and b"pkg-1.0" in reply.body
            wire.send(head("GET /+api HTTP/1.1"))
            assert wire.reply().json()["type"] == "apiconfig"


def test_senders_of_nothing_but_line_ends_slow_nobody(site):
    stop = threading.Event()

    def noise():
        while not stop.is_set():
            with contextlib.suppress(OSError), site.connect() as connection:
                while not stop.is_set():
                    connection.sendall(b"\r\n" * 2000)

    threads = [threading.Thread(target=noise) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.3)
        for _ in range(5):      # others may keep the machine busy for a while
            answers = [timed(site.get, "/rock/dev/+simple/pkg/", headers={"Accept": HTML}) for _ in range(15)]
            assert {reply.status for reply, _ in answers} == {200}
            times = sorted(seconds for _, seconds in answers)
            if times[7] < 0.1:
                break
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert times[7] < 0.1, times


# -- uploads whose body comes late ----------------------------------------------------------------


@contextlib.contextmanager
def held_upload(server, index, archive, user):
    """An upload of which the server waits for the body; yields a function that sends it and returns the answer."""
    form = dict(archive.fields, **{":action": "file_upload"})
    body, content_type = multipart(form, {"content": (archive.filename, archive.content)})
    lines = ["Content-Type: " + content_type, "Content-Length: %d" % len(body), "Expect: 100-continue"]
    server.login(user)
    token = user_pass(user, server.tokens[user])
    with Wire(server, head("POST /%s/ HTTP/1.1" % index, "X-Devpi-Auth: " + token, *lines)) as wire:
        assert wire.input.readline().startswith(b"HTTP/1.1 100 ")
        assert wire.input.readline() == b"\r\n"

        def finish():
            wire.send(body)
            return wire.reply("POST")

        yield finish


def test_an_upload_to_a_deleted_index_does_not_end_up_in_a_new_one(site):
    site.add_user("bob")
    site.add_user("alice")
    site.add_index("bob/dev", bases=[])
    with held_upload(site, "bob/dev", wheel("late", "1.0"), "bob") as finish:
        assert site.delete("/bob/dev", user="bob").status == 201
        site.add_index("alice/prod", bases=[], volatile=False)
        assert finish().status == 404
    assert site.get("/alice/prod").result["projects"] == []
    assert site.get("/alice/prod/+simple/late/", headers={"Accept": HTML}).status == 404


def test_an_upload_is_refused_if_the_file_became_fixed_meanwhile(site):
    site.add_user("fixed")
    site.add_index("fixed/dev", bases=[])
    first, second = wheel("late", "1.0", summary="first"), wheel("late", "1.0", summary="second")
    with held_upload(site, "fixed/dev", second, "fixed") as finish:
        assert site.upload("fixed/dev", first).status == 200
        assert site.patch("/fixed/dev", ["volatile=False"], user="fixed").status == 200
        assert finish().status == 409
    assert site.fetch("fixed/dev", first.filename, "late") == first.content


def test_an_upload_is_refused_if_the_uploader_lost_the_right_meanwhile(site):
    site.add_user("owner")
    site.add_user("guest")
    site.add_index("owner/dev", bases=[], acl_upload=["owner", "guest"])
    with held_upload(site, "owner/dev", wheel("late", "1.0"), "guest") as finish:
        assert site.patch("/owner/dev", ["acl_upload-=guest"], user="owner").status == 200
        assert finish().status == 403
    assert site.get("/owner/dev").result["projects"] == []


# -- JSON -----------------------------------------------------------------------------------------


BAD_VALUES = {
    "60 levels of lists": "[" * 60 + "]" * 60,
    "60 levels of objects": '{"a":' * 60 + "1" + "}" * 60,
    "30,000 levels": "[" * 30000 + "]" * 30000,
    "30,000 levels without end": "[" * 30000,
    "NaN": "NaN",
    "Infinity": "Infinity",
    "minus Infinity": "[-Infinity]",
    "1e999": "1e999",
    "lone surrogate": '"\\ud800"',
    "lone surrogate as a key": '{"a\\udfff": 1}',
}


@pytest.mark.parametrize("value", BAD_VALUES.values(), ids=BAD_VALUES)
def test_json_that_could_not_be_given_back_is_refused(site, value):
    reply = site.put("/json", '{"password": "pw", "custom_data": %s}' % value)
    assert reply.status == 400, reply
    for key in ("custom_data", "title", "description", "bases", "volatile"):
        reply = site.patch("/rock/dev", '{"%s": %s}' % (key, value), user="rock")
        assert reply.status == 400, (key, reply)
    assert site.patch("/rock", '{"custom_data": %s}' % value, user="rock").status == 400
    reply = site.get("/")
    assert reply.status == 200
    assert "json" not in reply.result


def test_attributes_over_256_kib_are_413(site):
    large = "x" * (256 << 10)
    assert site.put("/big", {"password": "pw", "description": large}).status == 413
    assert site.patch("/rock", {"custom_data": [large]}, user="rock").status == 413
    assert site.put("/rock/big", {"bases": [], "title": large}, user="rock").status == 413
    assert site.patch("/rock/dev", {"title": large}, user="rock").status == 413
    users = site.get("/").result
    assert "big" not in users and list(users["rock"]["indexes"]) == ["dev"]


# -- archives -------------------------------------------------------------------------------------


def metadata_with(count):
    lines = ["Metadata-Version: 2.1", "Name: many", "Version: 1.0"]
    return "\n".join(lines + ["X-%d: y" % number for number in range(count - len(lines))] + ["", ""]).encode()


@pytest.mark.parametrize("count, status", [(12000, 200), (30000, 400)])
def test_a_wheel_of_many_metadata_headers_is_judged_at_once(site, count, status):
    archive = wheel("many", "1.0", metadata=metadata_with(count))
    before = worked(site)
    reply = site.upload("rock/dev", archive)
    assert reply.status == status, reply
    assert worked(site) - before < 2
    if status == 400:
        assert reply.reason == "the metadata in 'many-1.0-py3-none-any.whl' has more than 20000 header lines"


@pytest.mark.parametrize("end", [b"\r", b"\r\n"])
def test_header_lines_count_whatever_they_end_with(site, end):
    head = b"Metadata-Version: 2.1\nName: many\nVersion: 2.0\nSummary: b".replace(b"\n", end)
    before = memory(site)
    assert site.upload("rock/dev", wheel("many", "2.0", metadata=head + (end + b" x") * 2000000 + end * 2)).status == 400
    assert memory(site) - before < 100 << 20
    body = b"a line of the README".ljust(60) + end
    assert site.upload("rock/dev", wheel("many", "2.0", metadata=head + end * 2 + body * 30000)).status == 200


def pax_bomb():
    """A PAX header of 1 GiB of zeros, in 1 MB."""
    header = tarfile.TarInfo("bomb-1.0/PaxHeaders/a")
    header.type, header.size = tarfile.XHDTYPE, 1 << 30
    return gzip.compress(header.tobuf(tarfile.USTAR_FORMAT)) + gzip.compress(bytes(1 << 20)) * 1025


def crowded():
    """150,000 empty members."""
    return gzip.compress(tarfile.TarInfo("bomb-1.0/empty").tobuf(tarfile.USTAR_FORMAT) * 1500) * 100 + gzip.compress(
        bytes(1024)
    )


@pytest.mark.parametrize("make", [pax_bomb, crowded])
def test_a_bomb_of_an_sdist_is_refused(site, make):
    archive = dataclasses.replace(sdist("bomb", "1.0"), content=make())
    before, work = memory(site), worked(site)
    reply = site.upload("rock/dev", archive)
    assert reply.status == 400, reply
    assert reply.reason.startswith("'bomb-1.0.tar.gz' holds too much: ")
    assert worked(site) - work < 20     # and not minutes
    assert memory(site) - before < 200 << 20
    assert site.get("/rock/dev/+simple/bomb/", headers={"Accept": HTML}).status == 404


# -- upstream -------------------------------------------------------------------------------------


def continue_for_ever(raw, send):
    while not raw.gate.wait(0.01):
        send(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)


def hang(raw, send):
    raw.gate.wait()


@pytest.mark.parametrize("fault", [continue_for_ever, hang])
def test_an_upstream_that_never_answers_does_not_hold_up_other_mirrors(make_server, upstream, fault):
    server = make_server("--request-timeout", "60", "--threads", "16")
    server.add_user("m")
    upstream.publish("good", "1.0")
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(RawUpstream(lambda path, send: fault(raw, send)))
        server.add_mirror("m/bad", raw)
        server.add_mirror("m/good", upstream)
        server.add_index("m/dev", bases=[])
        assert server.upload("m/dev", wheel("mine", "1.0")).status == 200
        for number in range(40):
            stack.enter_context(Wire(server, head("GET /m/bad/+simple/p%d/ HTTP/1.1" % number, "Accept: text/html")))
        time.sleep(0.5)
        versions, seconds = timed(server.versions, "m/good", "good")
        assert versions == ["1.0"] and seconds < 30
        versions, seconds = timed(server.versions, "m/dev", "mine")
        assert versions == ["1.0"] and seconds < 30
        server.kill()


def test_many_who_wait_for_one_page_of_a_slow_upstream_hold_up_nobody(tmp_path):
    # else a busy machine takes as long as those who wait for the same page
    script = patched(tmp_path, "devpi_lite.Limits.turn = 60")
    server = Server(tmp_path / "data", "--threads", "4", "--request-timeout", "60", script=script).start()
    with contextlib.ExitStack() as stack:
        stack.callback(server.kill)
        server.add_user("m")
        raw = stack.enter_context(RawUpstream(lambda path, send: hang(raw, send)))
        server.add_mirror("m/bad", raw)
        server.add_index("m/dev", bases=[])
        for _ in range(10):
            stack.enter_context(Wire(server, head("GET /m/bad/+simple/same/ HTTP/1.1", "Accept: text/html")))
        time.sleep(0.2)
        reply, seconds = timed(server.get, "/m/dev")
        assert reply.status == 200 and seconds < 15


@pytest.fixture(scope="module")
def mirrors(shared_server):
    """The shared server with the user m, who makes mirrors."""
    shared_server.add_user("m")
    return shared_server


def test_forty_cold_downloads_from_a_slow_upstream_all_arrive(mirrors, upstream):
    archives = [upstream.publish(wheel("p%d" % number, "1.0", size=100000)) for number in range(40)]
    upstream.fault("delay", "/files/*", seconds=0.7)
    mirrors.add_mirror("m/forty", upstream)
    found = together(40, lambda number: mirrors.fetch("m/forty", archives[number].filename, "p%d" % number))
    assert found == [archive.content for archive in archives]


def taken(server, path):
    """(status, bytes of the body that came, whether that was all) of a download that may break off."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", path)
        status, size = None, 0
        try:        # where the server breaks off it resets the connection, which may be seen before what came until then
            response = connection.getresponse()
            status = response.status
            while True:
                piece = response.read(10)
                if not piece:
                    return status, size, not response.length    # what is left of Content-Length
                size += len(piece)
        except http.client.IncompleteRead as broken:
            return status, size + len(broken.partial), False
        except ConnectionError:
            return status, size, False


def assert_not_kept(server, upstream, index, archive):
    assert archive.sha256 not in blobs(server)
    asked = upstream.count("/files/*")
    upstream.clear_faults()
    server.get(file_path(server, index, archive.name), headers={"Accept": ANY})
    assert upstream.count("/files/*") == asked + 1


def test_a_hash_counts_more_than_the_size_that_a_page_says(mirrors, upstream):
    archive = upstream.publish(wheel("liar", "1.0", size=1 << 20), size=10)
    mirrors.add_mirror("m/liar", upstream)
    assert mirrors.get(file_path(mirrors, "m/liar", "liar"), headers={"Accept": ANY}).body == archive.content


def test_a_file_without_a_hash_that_is_larger_than_its_page_says_is_502(mirrors, upstream):
    archive = upstream.publish(wheel("liarless", "1.0", size=1 << 20), size=10, hash=None)
    mirrors.add_mirror("m/liarless", upstream)
    path = file_path(mirrors, "m/liarless", "liarless")
    for _ in range(2):
        reply = mirrors.get(path, headers={"Accept": ANY})
        assert reply.status == 502, reply
        assert archive.content[:10] not in reply.body
    assert_not_kept(mirrors, upstream, "m/liarless", archive)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_file_of_unknown_length_without_a_hash_is_cut_where_its_page_says_it_ends(mirrors, upstream, chunked):
    archive = upstream.publish(wheel("liarcut", "1.0", size=1 << 20), size=10, hash=None)
    index = "m/cut-%d" % chunked
    mirrors.add_mirror(index, upstream)
    upstream.fault("no-length", "/files/*", chunked=chunked)
    status, size, complete = taken(mirrors, file_path(mirrors, index, "liarcut"))
    assert status == 502 or size <= 10 and not complete
    assert_not_kept(mirrors, upstream, index, archive)


def test_an_endless_file_is_cut(make_server, tmp_path, upstream):
    server = make_server(script=patched(tmp_path, "devpi_lite.Limits.size_slack = 1 << 20"))
    archive = upstream.publish(wheel("endless", "1.0", size=100000))
    server.add_user("m")
    server.add_mirror("m/endless", upstream)
    path = file_path(server, "m/endless", "endless")
    upstream.fault("huge", "/files/*")
    (status, size, complete), seconds = timed(taken, server, path)
    assert status == 502 or size <= len(archive.content) + (2 << 20) and not complete
    assert seconds < 50     # and not minutes
    assert_not_kept(server, upstream, "m/endless", archive)


def test_an_upstream_without_projects_gives_an_empty_list(mirrors, upstream):
    mirrors.add_mirror("m/empty", upstream)
    reply = mirrors.get("/m/empty/+simple/", headers={"Accept": SIMPLE_JSON})
    assert (reply.status, reply.json()["projects"]) == (200, [])
    reply = mirrors.get("/m/empty/+simple/", headers={"Accept": HTML})
    assert reply.status == 200 and b"<a " not in reply.body and b"</html>" in reply.body
    assert mirrors.get("/m/empty").result["projects"] == []


@pytest.mark.parametrize("endless", [False, True])
def test_garbage_behind_a_gzipped_page_harms_nobody(mirrors, endless):
    def serve(path, send):
        project = path.split("/")[2]
        file = {"filename": project + "-1.0.tar.gz", "url": "/files/" + project + "-1.0.tar.gz", "hashes": {}}
        body = gzip.compress(json_page(project, file))
        lines = ["Content-Type: " + SIMPLE_JSON, "Content-Encoding: gzip"]
        if project != "bad":
            send(answer(body, "Content-Length: %d" % len(body), *lines))
        elif not endless:
            send(answer(body + b"garbage" * 1000, "Content-Length: %d" % (len(body) + 7000), *lines))
        else:
            send(answer(body, "Connection: close", *lines))
            for _ in range(10000):  # of 100 kB: more than any server keeps
                if raw.gate.is_set():
                    break
                send(b"garbage" * 15000)

    with RawUpstream(serve) as raw:
        index = "m/trailing-%d" % endless
        mirrors.add_mirror(index, raw)
        before = memory(mirrors)
        reply, seconds = timed(mirrors.get, "/%s/+simple/bad/" % index, headers={"Accept": HTML})
        assert reply.status in (200, 502) and seconds < 5
        assert memory(mirrors) - before < 50 << 20
        for project in ("good", "fine"):
            assert mirrors.filenames(index, project) == [project + "-1.0.tar.gz"]


def test_a_folded_header_of_upstream_does_not_reach_our_head(mirrors):
    content = b"content"

    def serve(path, send):
        if path.startswith("/files/"):
            send(answer(content, "Content-Length: 7", "Last-Modified: x\r\n Set-Cookie: a=b"))
        else:
            file = {"filename": "fold-1.0.tar.gz", "url": "/files/fold-1.0.tar.gz", "hashes": {}}
            body = json_page("fold", file)
            send(answer(body, "Content-Type: " + SIMPLE_JSON, "Content-Length: %d" % len(body)))

    with RawUpstream(serve) as raw:
        mirrors.add_mirror("m/fold", raw)
        path = file_path(mirrors, "m/fold", "fold")
        for _ in range(2):  # as it arrives, and from the disk
            received = mirrors.raw(head("GET %s HTTP/1.1" % path, "Connection: close"))
            our_head, _, body = received.partition(b"\r\n\r\n")
            assert our_head.startswith(b"HTTP/1.1 200 ") and body.endswith(content)
            for line in our_head.split(b"\r\n")[1:]:
                assert re.match(rb"[A-Za-z-]+: [ -~]*$", line), our_head
                assert not line.lower().startswith(b"set-cookie")


def test_an_unreachable_mirror_has_no_list_but_shows_its_configuration(mirrors, upstream):
    upstream.stop()
    mirrors.add_mirror("m/down", upstream)
    assert mirrors.get("/m/down/+simple/", headers={"Accept": SIMPLE_JSON}).status == 502
    assert mirrors.get("/m/down/+simple/", headers={"Accept": HTML}).status == 502
    reply = mirrors.get("/m/down")
    assert (reply.status, reply.result["type"], reply.result["projects"]) == (200, "mirror", [])


def test_the_list_of_a_mirror_is_gzipped_and_has_an_etag(mirrors, upstream):
    for number in range(20):
        upstream.publish("project-%d" % number)
    mirrors.add_mirror("m/listed", upstream)
    asked = {"Accept": "text/html", "Accept-Encoding": "gzip"}
    reply = mirrors.get("/m/listed/+simple/", headers=asked)
    assert (reply.status, reply.headers["Content-Encoding"]) == (200, "gzip")
    assert gzip.decompress(reply.body).count(b"<a ") == 20
    again = mirrors.get("/m/listed/+simple/", headers=dict(asked, **{"If-None-Match": reply.headers["ETag"]}))
    assert (again.status, again.body, again.headers["ETag"]) == (304, b"", reply.headers["ETag"])


# -- passwords and the access log -----------------------------------------------------------------


def test_a_right_password_is_right_thirty_times_at_once(make_server):
    server = make_server(script=PROGRAM)
    server.add_user("team")
    server.add_index("team/dev", bases=[], acl_pkg_read=["team"])
    server.restart()  # nothing remembered
    replies = together(30, lambda _: server.get("/team/dev/+simple/", user="team", password="pw"))
    assert {reply.status for reply in replies} == {200}
    assert server.get("/team/dev/+simple/").status == 401


@pytest.fixture(scope="module")
def slow_hashes(tmp_path_factory):
    """A server that hashes passwords as slowly as it should."""
    server = Server(tmp_path_factory.mktemp("slow") / "server", script=PROGRAM).start()
    yield server
    server.kill()


@pytest.mark.parametrize("same", [True, False])
def test_of_thirty_wrong_logins_at_once_some_have_to_wait(slow_hashes, same):
    user = "guessed-%d" % same
    slow_hashes.add_user(user)
    replies, seconds = timed(
        together, 30,
        lambda number: slow_hashes.post("/+login", {"user": user, "password": "wrong-%d" % (0 if same else number)})
    )
    statuses = [reply.status for reply in replies]
    assert set(statuses) <= {401, 429} and 429 in statuses
    assert statuses.count(401) <= 5 + int(math.log2(1 + seconds))       # one more after a second, after three, after seven


def test_a_wrong_password_is_called_so(site):
    site.add_user("typo")
    site.add_index("typo/dev", bases=[], acl_pkg_read=["typo"])

    def messages(**credentials):
        for reply in (
            site.get("/typo/dev/+simple/", **credentials),
            site.upload("typo/dev", wheel("pkg", "1.0"), **dict({"user": None}, **credentials)),
            site.patch("/typo/dev", ["volatile=False"], **credentials),
            site.delete("/typo", **credentials),
        ):
            assert reply.status in (401, 403), reply
            yield reply.json()["message"]

    for message in messages(user="typo", password="wrong"):
        assert "password" in message
    for message in messages():
        assert "password" not in message


def test_the_access_log_has_the_real_address_of_a_ready_answer_too(site):
    for _ in range(4):
        with Wire(site, head("GET /rock/dev/+simple/pkg/?logged HTTP/1.1", "X-Real-IP: 203.0.113.7")) as wire:
            assert wire.reply().status == 200
    lines = eventually(lambda: (lambda found: len(found) == 4 and found)(re.findall(r".*\?logged .*", site.output())))
    assert [line.split()[-1] for line in lines] == ["203.0.113.7"] * 4


def test_three_hanging_mirrors_cost_one_request_timeout(make_server, tmp_path):
    server = make_server("--request-timeout", "3", script=patched(tmp_path, "devpi_lite.Limits.first_list = 0"))
    cases = [("GET", "/+simple/pkg/", 502), ("POST", "/+simple/pkg/refresh", 302), ("GET", "/+simple/", 200)]
    with contextlib.ExitStack() as stack:
        for case in range(len(cases)):
            user = "rock%d" % case
            server.add_user(user)
            for number in range(3):
                listener = stack.enter_context(socket.socket())
                listener.bind(("127.0.0.1", 0))
                listener.listen(10)
                url = "http://127.0.0.1:%d/simple/" % listener.getsockname()[1]
                server.add_mirror("%s/mirror%d" % (user, number), url)
            server.add_index(user + "/dev", bases=["%s/mirror%d" % (user, number) for number in range(3)])
            server.login(user)

        def ask(case):
            method, path, status = cases[case]
            reply, seconds = timed(server.request, method, "/rock%d/dev%s" % (case, path), user="rock%d" % case)
            assert reply.status == status
            assert 2.5 < seconds < 7

        together(len(cases), ask)
