"""Files of mirror indexes: fetched once, streamed through, checked, kept [W20, W14.6]."""

import hashlib
import http.client
import os
import re
import threading
import time
from urllib.parse import quote, urljoin

import pytest

from harness import Server, blobs, eventually, get, page, patched, path_of, sdist, wheel
from scripted import Gate, Scripted, WAIT, asked, begin, header, link_to, mirror, publish_at

BIG = 400000


# -- tools


def file_requests(upstream, archive):
    return [(method, path) for method, path, _ in list(upstream.requests) if path.endswith("/" + quote(archive.filename))]


def is_refused(server, path, length, statuses=(502,)):
    """Never a whole answer: 502 (or what else is said), or a connection that broke before the last piece."""
    connection, response = begin(server, path)
    try:
        if response.status in statuses:
            return True
        assert response.status == 200
        try:
            body = response.read()
        except (http.client.IncompleteRead, ConnectionError):
            return True
        raise AssertionError("%d bytes of %d were passed off as a whole answer" % (len(body), length))
    finally:
        connection.close()


def litter(server):
    """What lies in tmp/."""
    folder = os.path.join(str(server.directory), "tmp")
    return os.listdir(folder) if os.path.isdir(folder) else []


def big(version="1.0"):
    """A wheel whose bytes no other test has: blobs are shared between indexes."""
    return wheel("demo", version, size=BIG, summary=os.urandom(8).hex())


def small(version="1.0", **attributes):
    return wheel("demo", version, summary=os.urandom(8).hex(), **attributes)


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory):
    """One server for this file, more patient than a busy machine is slow."""
    server = Server(tmp_path_factory.mktemp("files") / "data", "--request-timeout", 30).start()
    server.add_user("mia")
    yield server
    server.stop()


@pytest.fixture
def own(make_server):
    """A server of the test's own, to stop and to kill, or with little patience."""
    server = make_server("--request-timeout", WAIT)
    server.add_user("mia")
    return server


# -- the first and the second time


@pytest.mark.parametrize("archive", [small("1.0"), big("2.0"), sdist("demo", "3.0", summary=os.urandom(8).hex())], ids=["small", "big", "sdist"])
def test_file_streams_through_and_is_kept(mirrors, upstream, archive):
    upstream.publish(archive)
    index = mirror(mirrors, upstream.url)
    path = link_to(mirrors, index, archive.filename)
    assert path == path_of(archive, index)
    first = get(mirrors, path)
    eventually(lambda: archive.sha256 in blobs(mirrors) and litter(mirrors) == [])
    second = get(mirrors, path)
    assert (first.status, first.body) == (200, archive.content)
    assert first.headers.get("Content-Length") == str(len(archive.content))
    assert first.headers.get("Last-Modified") == "Tue, 02 Jan 2024 03:04:05 GMT"
    assert first.headers.get("X-Accel-Buffering") == "no"
    assert first.headers.get("Cache-Control") is None
    assert (second.status, second.body) == (200, archive.content)
    assert second.headers.get("Content-Length") == str(len(archive.content))
    assert second.headers.get("Last-Modified") == "Tue, 02 Jan 2024 03:04:05 GMT"
    assert second.headers.get("Cache-Control") == "max-age=365000000, immutable, public"
    assert second.headers.get("ETag") == '"%s"' % archive.sha256
    assert second.headers.get("Content-Type") == ("application/x-tar" if path.endswith(".tar.gz") else "application/octet-stream")
    assert file_requests(upstream, archive) == [("GET", "/files/demo/" + archive.filename)]


def test_escaped_plus_in_the_path_is_the_same_file(mirrors, upstream):
    archive = upstream.publish(small())
    path = link_to(mirrors, mirror(mirrors, upstream.url), archive.filename)
    assert get(mirrors, path.replace("+f", "%2Bf")).body == archive.content


def test_cached_file_is_served_when_upstream_is_gone(mirrors, upstream):
    archive = upstream.publish(small())
    index = mirror(mirrors, upstream.url, mirror_cache_expiry=0)
    mirrors.fetch(index, archive.filename, "demo")
    upstream.stop()
    assert mirrors.fetch(index, archive.filename, "demo") == archive.content


def test_restart_keeps_files(own, upstream):
    archive = upstream.publish(small())
    index = mirror(own, upstream.url)
    own.fetch(index, archive.filename, "demo")
    upstream.stop()
    own.restart()
    assert own.fetch(index, archive.filename, "demo") == archive.content


def test_file_of_a_page_never_fetched_is_not_found(mirrors, upstream):
    archive = upstream.publish(small())
    path = path_of(archive, mirror(mirrors, upstream.url))
    reply = mirrors.get(path, headers={"Accept": "application/json"})
    assert (reply.status, reply.json()["message"]) == (404, "no such file")
    assert upstream.requests == []


def test_file_of_a_base_is_fetched_through_the_stage(mirrors, upstream):
    archive = upstream.publish(small())
    index = mirror(mirrors, upstream.url)
    mirrors.add_index("mia/dev", bases=[index])
    assert mirrors.fetch("mia/dev", archive.filename, "demo") == archive.content
    assert link_to(mirrors, "mia/dev", archive.filename).startswith("/%s/+f/" % index)


def test_same_content_in_two_indexes_is_downloaded_once(mirrors, upstream):
    archive = upstream.publish(small())
    first, second = mirror(mirrors, upstream.url), mirror(mirrors, upstream.url)
    assert mirrors.fetch(first, archive.filename, "demo") == mirrors.fetch(second, archive.filename, "demo") == archive.content
    assert len(file_requests(upstream, archive)) == 1


def test_size_becomes_known_with_the_first_download(mirrors, upstream):
    upstream.mode = "html"
    archive = upstream.publish(small())
    index = mirror(mirrors, upstream.url)
    assert "size" not in mirrors.simple(index, "demo")["files"][0]
    mirrors.fetch(index, archive.filename, "demo")
    eventually(lambda: mirrors.simple(index, "demo")["files"][0].get("size") == len(archive.content))


def test_file_metadata_names_its_upstream_url(mirrors, upstream):
    archive = upstream.publish(small())
    path = link_to(mirrors, mirror(mirrors, upstream.url), archive.filename)
    before = mirrors.get(path, headers={"Accept": "application/json"})
    assert before.json()["type"] == "releasefilemeta"
    assert before.result["url"] == "%s/files/demo/%s" % (upstream.host_url, archive.filename)
    assert (before.result["project"], before.result["version"]) == ("demo", "1.0")
    assert before.result["hash_spec"] == "sha256=" + archive.sha256
    assert "last_modified" not in before.result
    assert file_requests(upstream, archive) == []
    get(mirrors, path)
    assert "last_modified" in mirrors.get(path, headers={"Accept": "application/json"}).result


# -- while it is on its way


def test_twenty_askers_cost_one_download_and_each_gets_bytes_at_once(mirrors, scripted):
    archive = big()
    gate = Gate(scripted, publish_at(scripted, archive), archive.content)
    path = link_to(mirrors, mirror(mirrors, scripted.url), archive.filename)
    arrived, bodies = threading.Semaphore(0), []

    def ask():
        connection, response = begin(mirrors, path)
        first = response.read(1)
        arrived.release()
        bodies.append(first + response.read())
        connection.close()

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(20)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert arrived.acquire(timeout=30), "a first piece came only with the end"
    gate.opened.set()
    for thread in threads:
        thread.join(60)
    assert bodies == [archive.content] * 20
    assert len(file_requests(scripted, archive)) == 1


def test_one_who_comes_late_gets_the_whole_file(mirrors, scripted):
    archive = big()
    gate = Gate(scripted, publish_at(scripted, archive), archive.content)
    path = link_to(mirrors, mirror(mirrors, scripted.url), archive.filename)
    first, first_response = begin(mirrors, path)
    start = first_response.read(BIG // 4)
    late, late_response = begin(mirrors, path)
    late_start = late_response.read(1)
    gate.opened.set()
    assert start + first_response.read() == late_start + late_response.read() == archive.content
    assert len(file_requests(scripted, archive)) == 1
    first.close(), late.close()


def test_last_piece_waits_for_the_end(mirrors, scripted):
    archive = big()
    path, content = publish_at(scripted, archive), archive.content
    checked = threading.Event()

    def all_but_one_byte(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:-1])
        checked.wait(60)
        handler.wfile.write(bytes([content[-1] ^ 1]))
    scripted.answers[path] = all_but_one_byte
    connection, response = begin(mirrors, link_to(mirrors, mirror(mirrors, scripted.url), archive.filename))
    assert response.read(1) == content[:1]
    checked.set()
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        response.read()
    connection.close()
    assert archive.sha256 not in blobs(mirrors)


def test_download_may_take_longer_than_the_request_timeout(own, upstream):
    archive = upstream.publish(small())
    index = mirror(own, upstream.url)
    upstream.fault("drip", "*.whl", delay=WAIT * 0.15, piece=len(archive.content) // 9)
    assert own.fetch(index, archive.filename, "demo") == archive.content


def test_one_who_leaves_does_not_take_the_download_along(mirrors, scripted):
    archive = big()
    gate = Gate(scripted, publish_at(scripted, archive), archive.content)
    path = link_to(mirrors, mirror(mirrors, scripted.url), archive.filename)
    leaving, response = begin(mirrors, path)
    assert response.read(1)
    staying, response_of_other = begin(mirrors, path)
    start = response_of_other.read(1)
    response.close(), leaving.close()
    gate.opened.set()
    assert start + response_of_other.read() == archive.content
    staying.close()
    assert get(mirrors, path).body == archive.content
    assert len(file_requests(scripted, archive)) == 1


def test_aborted_client_leaves_no_partial_file(mirrors, scripted):
    archive = big()
    gate = Gate(scripted, publish_at(scripted, archive), archive.content)
    path = link_to(mirrors, mirror(mirrors, scripted.url), archive.filename)
    connection, response = begin(mirrors, path)
    assert response.read(1)
    response.close(), connection.close()
    gate.opened.set()
    eventually(lambda: litter(mirrors) == [])
    assert get(mirrors, path).body == archive.content


def test_killed_server_leaves_no_litter_and_fetches_again(own, scripted):
    archive = big()
    gate = Gate(scripted, publish_at(scripted, archive), archive.content)
    index = mirror(own, scripted.url)
    path = link_to(own, index, archive.filename)
    connection, response = begin(own, path)
    assert response.read(1)
    assert litter(own) != [] and archive.sha256 not in blobs(own)
    own.kill()
    gate.opened.set()
    connection.close()
    own.start()
    assert litter(own) == []
    assert get(own, path).body == archive.content
    assert len(file_requests(scripted, archive)) == 2


# -- wrong bytes and failures


@pytest.mark.parametrize("fault", ["wrong-hash", "truncate"])
@pytest.mark.parametrize("hash_kind", ["sha256", "md5"])
@pytest.mark.parametrize("size", [0, BIG], ids=["small", "big"])
def test_wrong_bytes_break_the_answer_and_are_not_kept(mirrors, upstream, fault, hash_kind, size):
    archive = wheel("demo", "1.0", size=size, summary=os.urandom(8).hex())
    upstream.publish(archive, hash=hash_kind)
    path = link_to(mirrors, mirror(mirrors, upstream.url), archive.filename)
    eventually(lambda: litter(mirrors) == [])       # what earlier tests began has ended
    kept = blobs(mirrors)
    upstream.fault(fault, "*.whl")
    for tries in (1, 2):
        assert is_refused(mirrors, path, len(archive.content))
        assert len(file_requests(upstream, archive)) == tries
    eventually(lambda: litter(mirrors) == [])
    assert blobs(mirrors) == kept
    upstream.clear_faults()
    assert get(mirrors, path).body == archive.content


LATE_READER = """\
import os, time
discard, open_growing = devpi_lite.IncomingBlob.discard, devpi_lite.Download._open

def slow_discard(self):
    discard(self)
    time.sleep(0.5)

def late_open(self):
    while os.path.exists(self.opened):
        time.sleep(0.01)
    return open_growing(self)

devpi_lite.IncomingBlob.discard, devpi_lite.Download._open = slow_discard, late_open
"""


def test_a_failed_download_is_over_for_all_when_its_first_reader_hears_of_it(tmp_path, upstream):
    server = Server(tmp_path / "data", script=patched(tmp_path, LATE_READER)).start()
    try:
        server.add_user("mia")
        archive = upstream.publish(big())
        path = link_to(server, mirror(server, upstream.url), archive.filename)
        upstream.fault("wrong-hash", "*.whl", times=1)
        assert is_refused(server, path, len(archive.content))
        assert get(server, path).body == archive.content        # asked anew, and not the first one's error
    finally:
        server.kill()


def test_everybody_who_waits_for_wrong_bytes_is_cut_off(mirrors, scripted):
    archive = big()
    wrong = archive.content[:-1] + bytes([archive.content[-1] ^ 1])
    gate = Gate(scripted, publish_at(scripted, archive), wrong)
    path, cut = link_to(mirrors, mirror(mirrors, scripted.url), archive.filename), []
    threads = [threading.Thread(target=lambda: cut.append(is_refused(mirrors, path, len(wrong))), daemon=True) for _ in range(5)]
    for thread in threads:
        thread.start()
    eventually(lambda: gate.halves)
    gate.opened.set()
    for thread in threads:
        thread.join(60)
    assert cut == [True] * 5


def test_length_that_differs_from_the_page_is_refused(mirrors, scripted):
    archive = small()
    path = publish_at(scripted, archive)
    scripted.answers[path] = archive.content + b"more"
    assert is_refused(mirrors, link_to(mirrors, mirror(mirrors, scripted.url), archive.filename), len(archive.content) + 4)


@pytest.mark.parametrize("fault, status", [("404", 404), ("500", 502)])
def test_upstream_error_for_a_file_is_told_and_not_remembered(mirrors, upstream, fault, status):
    archive = upstream.publish(small())
    path = link_to(mirrors, mirror(mirrors, upstream.url), archive.filename)
    upstream.fault(fault, "*.whl")
    for accept in ("*/*", "text/html"):
        reply = mirrors.get(path, headers={"Accept": accept})
        assert reply.status == status
        assert reply.headers.get("Content-Type") == "application/json"
        assert reply.json()["message"] == "error %s getting %s/files/demo/%s" % (fault, upstream.host_url, archive.filename)
    upstream.clear_faults()
    assert get(mirrors, path).body == archive.content


@pytest.mark.parametrize("fault", ["reset", "hang", "redirect-loop"])
def test_upstream_that_gives_no_answer_is_502(own, upstream, fault):
    archive = upstream.publish(small())
    path = link_to(own, mirror(own, upstream.url), archive.filename)
    upstream.fault(fault, "/files/*")
    reply = get(own, path)
    assert reply.status == 502
    assert upstream.host_url in reply.json()["message"]


def test_stopped_upstream_is_502(mirrors, upstream):
    archive = upstream.publish(small())
    path = link_to(mirrors, mirror(mirrors, upstream.url), archive.filename)
    upstream.stop()
    assert get(mirrors, path).status == 502


@pytest.mark.parametrize("chunked", [False, True], ids=["until-close", "chunked"])
@pytest.mark.parametrize("size", [0, BIG], ids=["small", "big"])
def test_upstream_body_without_length_is_served(mirrors, upstream, chunked, size):
    archive = upstream.publish(wheel("demo", "1.0", size=size, summary=os.urandom(8).hex()))
    path = link_to(mirrors, mirror(mirrors, upstream.url), archive.filename)
    upstream.fault("no-length", "*.whl", chunked=chunked)
    assert get(mirrors, path).body == archive.content
    assert get(mirrors, path).headers.get("Content-Length") == str(len(archive.content))
    assert len(file_requests(upstream, archive)) == 1


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://[bad/"])
def test_file_redirected_to_no_http_url_is_502(mirrors, upstream, target):
    archive = upstream.publish(small())
    path = link_to(mirrors, mirror(mirrors, upstream.url), archive.filename)
    upstream.fault("redirect", "*.whl", to=target)
    assert get(mirrors, path).status == 502


# -- HEAD, ranges, conditions


def test_head_on_an_uncached_file_stores_nothing(mirrors, upstream):
    archive = upstream.publish(big())
    path = link_to(mirrors, mirror(mirrors, upstream.url), archive.filename)
    reply = get(mirrors, path, "HEAD")
    assert (reply.status, reply.body) == (200, b"")
    assert reply.headers.get("Content-Length") == str(len(archive.content))
    time.sleep(0.3)                     # in which a download behind the answer would begin
    assert "GET" not in [method for method, _ in file_requests(upstream, archive)]
    assert archive.sha256 not in blobs(mirrors)
    assert eventually(lambda: litter(mirrors) == [])
    assert get(mirrors, path).body == archive.content
    eventually(lambda: archive.sha256 in blobs(mirrors))
    upstream.stop()
    reply = get(mirrors, path, "HEAD")
    assert (reply.status, reply.headers.get("Content-Length"), reply.headers.get("Accept-Ranges")) == (200, str(len(archive.content)), "bytes")


@pytest.fixture(scope="module")
def cached(mirrors):
    """A file that is here: (path, its bytes, its ETag)."""
    upstream = Scripted()
    archive = small()
    publish_at(upstream, archive)
    path = link_to(mirrors, mirror(mirrors, upstream.url), archive.filename)
    assert get(mirrors, path).body == archive.content
    eventually(lambda: archive.sha256 in blobs(mirrors))
    upstream.stop()
    return path, archive.content, '"%s"' % archive.sha256


@pytest.mark.parametrize("wanted, begins, ends", [("bytes=0-9", 0, 10), ("bytes=100-", 100, None), ("bytes=-16", -16, None), ("bytes=5-999999999", 5, None)])
def test_local_copy_answers_ranges(mirrors, cached, wanted, begins, ends):
    path, content, etag = cached
    begins, ends = (begins if begins >= 0 else len(content) + begins), ends or len(content)
    reply = get(mirrors, path, Range=wanted, If_Range=etag)
    assert (reply.status, reply.body) == (206, content[begins:ends])
    assert reply.headers.get("Content-Range") == "bytes %d-%d/%d" % (begins, ends - 1, len(content))


def test_local_copy_refuses_a_range_past_its_end(mirrors, cached):
    path, content, _ = cached
    reply = get(mirrors, path, Range="bytes=%d-" % len(content))
    assert (reply.status, reply.headers.get("Content-Range")) == (416, "bytes */%d" % len(content))


def test_local_copy_answers_conditions(mirrors, cached):
    path, content, etag = cached
    reply = get(mirrors, path, If_None_Match=etag)
    assert (reply.status, reply.body) == (304, b"")
    assert get(mirrors, path, Range="bytes=0-9", If_Range='"another"').body == content


def test_range_of_an_uncached_file_is_right(mirrors, upstream):
    archive = upstream.publish(big())
    path = link_to(mirrors, mirror(mirrors, upstream.url), archive.filename)
    reply = get(mirrors, path, Range="bytes=-1000")
    assert (reply.status, reply.body) in [(200, archive.content), (206, archive.content[-1000:])]
    assert get(mirrors, path).body == archive.content


# -- other hashes, none, external


def test_file_with_md5_only(mirrors, upstream):
    archive = upstream.publish(small(), hash="md5")
    index = mirror(mirrors, upstream.url)
    path = link_to(mirrors, index, archive.filename)
    assert path == "/%s/+f/%s/%s/%s" % (index, archive.md5[:3], archive.md5[3:16], archive.filename)
    assert mirrors.simple(index, "demo")["files"][0]["hashes"] == {"md5": archive.md5}
    assert get(mirrors, path).body == archive.content
    upstream.stop()
    assert get(mirrors, path).body == archive.content
    meta = mirrors.get(path, headers={"Accept": "application/json"}).result
    assert meta["hash_spec"] == "md5=" + archive.md5
    assert meta["hashes"] == {"md5": archive.md5, "sha256": archive.sha256}


def test_file_without_hash(mirrors, upstream):
    archive = upstream.publish(small(), hash=None)
    index = mirror(mirrors, upstream.url)
    path = link_to(mirrors, index, archive.filename)
    folder = re.sub("[^A-Za-z0-9_.-]", "_", "http/" + upstream.host_url[len("http://"):] + "/files/demo")
    assert path == "/%s/+e/%s/%s" % (index, folder, archive.filename)
    assert mirrors.simple(index, "demo")["files"][0]["hashes"] == {}
    assert get(mirrors, path).body == archive.content
    upstream.stop()
    assert get(mirrors, path).body == archive.content
    meta = mirrors.get(path, headers={"Accept": "application/json"}).result
    assert meta["hashes"] == {"sha256": archive.sha256}


def test_truncated_file_without_hash_is_refused(mirrors, upstream):
    archive = upstream.publish(small(), hash=None, size=False)
    path = link_to(mirrors, mirror(mirrors, upstream.url), archive.filename)
    upstream.fault("truncate", "*.whl")
    assert is_refused(mirrors, path, len(archive.content))
    upstream.clear_faults()
    assert get(mirrors, path).body == archive.content


def test_external_urls_are_redirected_to_without_credentials(mirrors, upstream):
    upstream.credentials = ("bob", "s3cret")
    archive = upstream.publish(small())
    index = mirror(mirrors, upstream.url.replace("http://", "http://bob:s3cret@"), mirror_use_external_urls=True)
    reply = get(mirrors, link_to(mirrors, index, archive.filename))
    assert (reply.status, reply.headers.get("Location")) == (302, "%s/files/demo/%s" % (upstream.host_url, archive.filename))
    assert file_requests(upstream, archive) == []
    assert archive.sha256 not in blobs(mirrors)


# -- when upstream changes its mind


def test_file_removed_upstream_stays_at_its_path(mirrors, upstream):
    gone, other = upstream.publish(small("1.0")), upstream.publish(small("2.0"))
    index = mirror(mirrors, upstream.url, mirror_cache_expiry=0)
    path = link_to(mirrors, index, gone.filename)
    assert get(mirrors, path).body == gone.content
    upstream.remove("demo", gone.filename)
    assert mirrors.filenames(index, "demo") == [other.filename]
    assert get(mirrors, path).body == gone.content
    assert "does not list %s of demo any more" % gone.filename in mirrors.whole_output()
    counted = 'devpi_lite_upstream_removed_total{index="%s"} 1\n' % index
    assert counted in mirrors.get("/+metrics").text
    assert mirrors.get("/+status").result["upstream-removed"] >= 1


@pytest.mark.parametrize("downloaded", [True, False], ids=["downloaded", "only-listed"])
def test_changed_content_is_never_served_at_the_old_path(mirrors, upstream, downloaded):
    old, new = small(), small()
    assert old.filename == new.filename and old.sha256 != new.sha256
    upstream.publish(old)
    index = mirror(mirrors, upstream.url, mirror_cache_expiry=0)
    path = link_to(mirrors, index, old.filename)
    if downloaded:
        assert get(mirrors, path).body == old.content
    upstream.publish(new)
    for file in mirrors.simple(index, "demo")["files"]:         # the new one under its own path, or none at all
        if downloaded and file["hashes"]["sha256"] == new.sha256:
            assert urljoin("/%s/+simple/demo/" % index, file["url"]) != path
            assert mirrors.fetch(index, new.filename, "demo") == new.content
    if downloaded:
        assert get(mirrors, path).body == old.content
    else:
        assert is_refused(mirrors, path, len(new.content), statuses=(404, 410, 502))


# -- metadata files


def test_metadata_file_is_proxied_checked_and_kept(mirrors, upstream):
    archive = upstream.publish(small(), core_metadata=True)
    index = mirror(mirrors, upstream.url)
    path = link_to(mirrors, index, archive.filename) + ".metadata"
    assert mirrors.simple(index, "demo")["files"][0]["core-metadata"] == {"sha256": hashlib.sha256(archive.metadata).hexdigest()}
    reply = get(mirrors, path)
    assert (reply.status, reply.body) == (200, archive.metadata)
    assert reply.headers.get("Content-Type") in ("application/octet-stream", "text/plain")
    assert file_requests(upstream, archive) == []       # the wheel was not needed
    upstream.stop()
    assert get(mirrors, path).body == archive.metadata


@pytest.mark.parametrize("fault", ["wrong-hash", "500", "404", "reset", "truncate"])
def test_metadata_that_upstream_fails_to_give_is_read_out_of_the_wheel(mirrors, upstream, fault):
    archive = upstream.publish(small(), core_metadata=True)
    index = mirror(mirrors, upstream.url)
    path = link_to(mirrors, index, archive.filename)
    upstream.fault(fault, "*.metadata")
    assert get(mirrors, path + ".metadata").body == archive.metadata
    assert get(mirrors, path).body == archive.content
    assert len(file_requests(upstream, archive)) == 1


@pytest.mark.parametrize("announced", (True, {"sha256": "ab" * 32}))
def test_announced_metadata_that_is_not_the_wheels_is_mended(mirrors, scripted, announced):
    archive = small()
    publish_at(scripted, archive, **{"core-metadata": announced})
    index = mirror(mirrors, scripted.url, mirror_cache_expiry=0)
    path = link_to(mirrors, index, archive.filename)
    true = {"sha256": hashlib.sha256(archive.metadata).hexdigest()}
    for _ in range(2):
        assert get(mirrors, path + ".metadata").body == archive.metadata
        assert mirrors.simple(index, "demo")["files"][0]["core-metadata"] == true
    scripted.page("demo", {"filename": archive.filename, "url": "../../files/" + archive.filename, "size": 1,
                           "hashes": {"sha256": archive.sha256}, "core-metadata": {"sha256": "cd" * 32}})
    assert mirrors.simple(index, "demo")["files"][0]["core-metadata"] == true       # whatever a newer page says
    assert get(mirrors, path + ".metadata").body == archive.metadata


def test_a_false_announcement_of_a_wheel_that_can_not_be_checked_is_refused(mirrors, scripted):
    archive = small()
    path = publish_at(scripted, archive, **{"core-metadata": {"sha256": "ab" * 32}, "hashes": {}})
    scripted.answers[path + ".metadata"] = archive.metadata
    link = link_to(mirrors, mirror(mirrors, scripted.url), archive.filename)
    assert get(mirrors, link + ".metadata").status == 502
    assert asked(scripted, path) == []


def test_metadata_that_nobody_has_is_announced_no_more(mirrors, scripted):
    archive = sdist("demo", "1.0", summary=os.urandom(8).hex())         # no wheel, whatever its name says
    entry = {"filename": "demo-1.0-py3-none-any.whl", "url": "/files/x", "core-metadata": True,
             "hashes": {"sha256": archive.sha256}}
    scripted.page("demo", entry)
    scripted.answers["/files/x"] = archive.content
    index = mirror(mirrors, scripted.url, mirror_cache_expiry=0)
    path = link_to(mirrors, index, entry["filename"]) + ".metadata"
    assert mirrors.simple(index, "demo")["files"][0]["core-metadata"] is True
    assert get(mirrors, path).status == 404
    assert "core-metadata" not in mirrors.simple(index, "demo")["files"][0]


def test_metadata_lies_behind_the_path_and_not_behind_the_query(mirrors, scripted):
    archive = small()
    publish_at(scripted, archive, url="/signed/x.whl?sig=1&n=2", **{"core-metadata": True})
    scripted.answers["/signed/x.whl.metadata?sig=1&n=2"] = archive.metadata
    index = mirror(mirrors, scripted.url)
    assert get(mirrors, link_to(mirrors, index, archive.filename) + ".metadata").body == archive.metadata


@pytest.mark.parametrize("first", ("metadata", "wheel"))
def test_a_wheels_own_metadata_counts_and_is_what_a_push_takes(mirrors, scripted, first):
    archive = small()
    lie = archive.metadata + b"Requires-Dist: evil\n"
    path = publish_at(scripted, archive, **{"core-metadata": True})
    scripted.answers[path + ".metadata"] = lie
    index, stage = mirror(mirrors, scripted.url), "mia/stage%s" % first
    link = link_to(mirrors, index, archive.filename)
    if first == "metadata":
        assert get(mirrors, link + ".metadata").body == lie
    assert get(mirrors, link).status == 200
    assert get(mirrors, link + ".metadata").body == archive.metadata
    assert ("not what the wheel holds" in mirrors.whole_output()) or first == "wheel"
    mirrors.add_index(stage)
    pushed = {"name": "demo", "version": "1.0", "targetindex": stage}
    assert mirrors.post("/" + index, pushed, user="mia").status == 200
    assert get(mirrors, link_to(mirrors, stage, archive.filename) + ".metadata").body == archive.metadata


def test_metadata_is_read_out_of_a_wheel_that_is_here(mirrors, upstream):
    archive = upstream.publish(small(), core_metadata=False)
    index = mirror(mirrors, upstream.url)
    assert "core-metadata" not in mirrors.simple(index, "demo")["files"][0]
    mirrors.fetch(index, archive.filename, "demo")
    wanted = {"sha256": hashlib.sha256(archive.metadata).hexdigest()}
    eventually(lambda: mirrors.simple(index, "demo")["files"][0].get("core-metadata") == wanted)
    upstream.stop()
    assert get(mirrors, link_to(mirrors, index, archive.filename) + ".metadata").body == archive.metadata


def test_advertised_metadata_of_a_local_wheel_needs_no_upstream(mirrors, upstream):
    archive = upstream.publish(small(), core_metadata=True)
    index = mirror(mirrors, upstream.url)
    mirrors.fetch(index, archive.filename, "demo")
    path = link_to(mirrors, index, archive.filename) + ".metadata"
    upstream.stop()
    assert get(mirrors, path).body == archive.metadata


# -- pages with a file in common


@pytest.mark.parametrize("first", ("old", "new"))
@pytest.mark.parametrize("hashed", (True, False))
def test_a_file_that_two_pages_list_is_on_both(mirrors, scripted, first, hashed):
    archive = sdist("old-new", "1.0", summary=os.urandom(8).hex())
    entry = {"filename": archive.filename, "url": "/files/x", "hashes": {"sha256": archive.sha256} if hashed else {}}
    for project in ("old", "new"):
        scripted.page(project, entry)
    scripted.answers["/files/x"] = archive.content
    name = mirror(mirrors, scripted)
    for project in sorted(("old", "new"), key=lambda project: project != first):
        assert mirrors.filenames(name, project) == [archive.filename]
        assert list(mirrors.get("/%s/%s" % (name, project)).result) == ["1.0"]      # it is stored
        assert mirrors.fetch(name, archive.filename, project) == archive.content
    assert len(asked(scripted, "/files/x")) == 1
    for project in ("old", "new"):      # what arrived for one is known of the other
        file, = mirrors.simple(name, project)["files"]
        assert file["size"] == len(archive.content)


def test_a_file_is_fetched_from_where_the_newest_page_has_it(mirrors, scripted):
    archive = sdist("moved", "1.0", summary=os.urandom(8).hex())
    name = mirror(mirrors, scripted, mirror_cache_expiry=0)
    for place in ("/files/x", "/files/y"):
        scripted.page("moved", {"filename": archive.filename, "url": place, "hashes": {"sha256": archive.sha256},
                                "upload-time": "2024-01-02T03:04:05.678901Z"})
        assert mirrors.filenames(name, "moved") == [archive.filename]
    scripted.answers["/files/y"] = archive.content
    assert mirrors.fetch(name, archive.filename, "moved") == archive.content
    assert asked(scripted, "/files/x") == []


def test_a_wheel_of_another_project_is_left_out_of_a_page(mirrors, scripted):
    """A flat listing that answers for every name, and a page of a project under its old name."""
    ours, other, odd = small(), wheel("demo_tools", "1.0"), "demo-tools-1.0-py3-none-any.whl"
    for project in ("demo", "demo-tools", "gone"):
        scripted.page(project, *({"filename": name, "url": "/files/" + name, "hashes": {}}
                                 for name in (other.filename, ours.filename, odd)))
    name = mirror(mirrors, scripted)
    assert mirrors.filenames(name, "gone") == [odd]         # whose name states no version: nobody's for sure
    assert mirrors.filenames(name, "demo") == [ours.filename, odd]
    assert mirrors.filenames(name, "demo-tools") == [other.filename, odd]
    assert sorted(mirrors.get("/%s/demo" % name).result) == ["1.0", "tools"]


def test_a_file_is_refused_if_one_of_its_projects_is_quarantined(mirrors, scripted):
    archive = sdist("fine", "1.0", summary=os.urandom(8).hex())
    entry = {"filename": archive.filename, "url": "/files/x", "hashes": {"sha256": archive.sha256}}
    scripted.answers["/files/x"] = archive.content
    scripted.page("fine", entry)
    scripted.page("bad", entry, **{"project-status": {"status": "quarantined"}})
    name = mirror(mirrors, scripted)
    path = link_to(mirrors, name, archive.filename, "fine")
    assert get(mirrors, path).status == 200
    assert mirrors.filenames(name, "bad") == []
    assert mirrors.get("/%s/bad" % name).status == 200      # it is stored
    assert get(mirrors, path).status == 403


def test_a_file_of_two_pages_is_deleted_once_for_both(mirrors, scripted):
    archive = sdist("old-new", "1.0", summary=os.urandom(8).hex())
    entry = {"filename": archive.filename, "url": "/files/x", "hashes": {"sha256": archive.sha256}}
    scripted.page("old", entry)
    scripted.page("new", entry)
    scripted.answers["/files/x"] = archive.content
    name = mirror(mirrors, scripted)
    path = link_to(mirrors, name, archive.filename, "old")
    assert link_to(mirrors, name, archive.filename, "new") == path
    assert get(mirrors, path).status == 200
    assert mirrors.delete(path, user="mia").status == 200
    assert get(mirrors, path).status == 410
    assert mirrors.filenames(name, "old") == mirrors.filenames(name, "new") == []


def test_metadata_of_an_unknown_file_is_not_found(mirrors, upstream):
    upstream.publish(small())
    index = mirror(mirrors, upstream.url)
    page(mirrors, index)
    assert get(mirrors, "/%s/+f/abc/0123456789abc/demo-9.9-py3-none-any.whl.metadata" % index).status == 404


def test_credentials_are_sent_for_files_and_their_metadata(mirrors, upstream):
    upstream.credentials = ("bob", "s3cret")
    archive = upstream.publish(small(), core_metadata=True)
    index = mirror(mirrors, upstream.url.replace("http://", "http://bob:s3cret@"))
    path = link_to(mirrors, index, archive.filename)
    assert get(mirrors, path + ".metadata").body == archive.metadata
    assert get(mirrors, path).body == archive.content
    assert all(header(headers, "Authorization") for headers in asked(upstream))
    assert "s3cret" not in mirrors.whole_output()
