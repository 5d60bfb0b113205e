"""Files: whole, in ranges, conditionally, their metadata, and paths that try to be something else."""

import email.utils
import hashlib
import io
import time
import zipfile

import pytest

from harness import around, get, path_of, sdist, wheel


@pytest.fixture(scope="module")
def site(shared_server):
    shared_server.add_user("fil")
    shared_server.login("fil", "pw")
    shared_server.add_index("fil/dev", volatile=True)
    shared_server.add_index("fil/base", volatile=False)
    shared_server.add_index("fil/child", bases=["fil/base"])
    for archive in (SMALL, BIG, SOURCE):
        assert shared_server.upload("fil/base", archive).status == 200
    return shared_server


SMALL = wheel("files", "1.0", requires_dist=("dep>=1",))
BIG = wheel("files", "2.0", size=700000)  # above the size that leaves by sendfile
SOURCE = sdist("files", "1.0")
BOTH = pytest.mark.parametrize("archive", [SMALL, BIG], ids=["small", "big"])


def upload_raw(server, index, name, version, filename, content):
    """Uploads any bytes under a file name."""
    fields = {":action": "file_upload", "name": name, "version": version}
    return server.post_form(index, fields, {"content": (filename, content)}, user="fil")


# Whole files


@BOTH
def test_a_file_comes_whole_with_its_headers(site, archive):
    reply = get(site, path_of(archive, "fil/base"))
    assert (reply.status, reply.body) == (200, archive.content)
    assert reply.headers.get("Content-Length") == str(len(archive.content))
    assert reply.headers.get("Content-Type") == "application/octet-stream"
    assert reply.headers.get("Cache-Control") == "max-age=365000000, immutable, public"
    assert reply.headers.get("ETag") == '"%s"' % archive.sha256
    assert reply.headers.get("Accept-Ranges") == "bytes"
    assert reply.headers.get("Content-Encoding") is None
    assert abs(email.utils.parsedate_to_datetime(reply.headers.get("Last-Modified")).timestamp() - time.time()) < 600
    assert reply.headers.get("X-DEVPI-API-VERSION") == "2"


@BOTH
def test_head_has_the_headers_of_get_and_no_body(site, archive):
    full, bare = get(site, path_of(archive, "fil/base")), get(site, path_of(archive, "fil/base"), "HEAD")
    assert (bare.status, bare.body) == (200, b"")
    for name in ("Content-Length", "Content-Type", "ETag", "Last-Modified", "Cache-Control", "Accept-Ranges"):
        assert bare.headers.get(name) == full.headers.get(name)


@pytest.mark.parametrize("filename, content_type", [
    ("types-1.0.tar.gz", "application/x-tar"), ("types-1.0.tgz", "application/x-tar"),
    ("types-1.0.tar.bz2", "application/x-tar"), ("types-1.0.zip", "application/zip"),
    ("types-1.0-py3-none-any.whl", "application/octet-stream"), ("types-1.0.egg", "application/octet-stream")])
def test_the_content_type_goes_by_the_file_name(site, filename, content_type):
    content = around(filename, filename.encode(), "types", "1.0")
    assert upload_raw(site, "fil/dev", "types", "1.0", filename, content).status == 200
    digest = hashlib.sha256(content).hexdigest()
    reply = get(site, "/fil/dev/+f/%s/%s/%s" % (digest[:3], digest[3:16], filename), Accept_Encoding="gzip")
    assert (reply.status, reply.body) == (200, content)
    assert reply.headers.get("Content-Type") == content_type
    assert reply.headers.get("Content-Encoding") is None


def test_no_file_is_ever_compressed_on_the_way(site):
    content = around("plain-1.0.zip", b"a" * 100000, "plain", "1.0")
    assert upload_raw(site, "fil/dev", "plain", "1.0", "plain-1.0.zip", content).status == 200
    digest = hashlib.sha256(content).hexdigest()
    reply = get(site, "/fil/dev/+f/%s/%s/plain-1.0.zip" % (digest[:3], digest[3:16]), Accept_Encoding="gzip, deflate")
    assert (reply.body, reply.headers.get("Content-Encoding")) == (content, None)


@pytest.mark.parametrize("spelling", [
    lambda path: path.replace("+f", "%2Bf"), lambda path: path.replace("+f", "%2bf"), lambda path: "/" + path,
    lambda path: path + "/", lambda path: path.replace("files", "%66iles"), lambda path: path + "?x=1"],
    ids=["%2B", "%2b", "double slash", "final slash", "percent", "query"])
def test_other_spellings_of_the_path_are_the_same_file(site, spelling):
    reply = get(site, spelling(path_of(SMALL, "fil/base")))
    assert (reply.status, reply.body) == (200, SMALL.content)


def test_a_file_of_a_base_lies_under_the_base_only(site):
    assert get(site, path_of(SMALL, "fil/child")).status == 404
    assert site.fetch("fil/child", SMALL.filename, "files") == SMALL.content


def test_one_content_under_two_names_shares_the_directory(site):
    for filename in ("twin-1.0.exe", "twin-1.0.msi"):
        assert upload_raw(site, "fil/dev", "twin", "1.0", filename, b"twins").status == 200
    digest = hashlib.sha256(b"twins").hexdigest()
    for filename in ("twin-1.0.exe", "twin-1.0.msi"):
        assert get(site, "/fil/dev/+f/%s/%s/%s" % (digest[:3], digest[3:16], filename)).body == b"twins"
    assert site.delete("/fil/dev/+f/%s/%s/twin-1.0.exe" % (digest[:3], digest[3:16]), user="fil").status == 200
    assert site.fetch("fil/dev", "twin-1.0.msi", "twin") == b"twins"


def test_json_asks_for_the_record_of_the_file(site):
    reply = site.get(path_of(SMALL, "fil/base"), headers={"Accept": "application/json"})
    assert (reply.status, reply.headers.get("Content-Type")) == (200, "application/json")
    assert reply.json()["type"] == "releasefilemeta"
    record = dict(reply.result)
    assert email.utils.parsedate(record.pop("last_modified"))
    assert record == {
        "hash_spec": "sha256=" + SMALL.sha256, "hashes": {"sha256": SMALL.sha256}, "project": "files", "version": "1.0",
        "size": len(SMALL.content)}


# Ranges


SIZE = len(SMALL.content)
RANGES = [
    ("bytes=0-0", 0, 0), ("bytes=0-99", 0, 99), ("bytes=10-19", 10, 19), ("bytes=5-", 5, SIZE - 1), ("bytes=-7", SIZE - 7, SIZE - 1),
    ("bytes=0-", 0, SIZE - 1), ("bytes=0-999999999", 0, SIZE - 1), ("bytes=-999999999", 0, SIZE - 1),
    ("bytes=%d-" % (SIZE - 1), SIZE - 1, SIZE - 1), ("bytes=%d-%d" % (SIZE - 1, SIZE), SIZE - 1, SIZE - 1), ("Bytes=1-2", 1, 2),
    ("bytes=007-010", 7, 10),
]
UNSATISFIABLE = ["bytes=%d-" % SIZE, "bytes=%d-%d" % (SIZE, SIZE + 10), "bytes=-0", "bytes=99999999999999999999999-"]
IGNORED = [
    "bytes=5-2", "bytes=", "bytes", "bytes=-", "bytes=a-b", "bytes=1", "items=0-5", "bytes=0-1,4-5", "bytes=--5", "bytes=+1-2",
    "bytes=0x1-0x2", "bytes=1-2-3", "", "=1-2", "bytes=\u0661-\u0662"]


@pytest.mark.parametrize("value, first, last", RANGES)
def test_a_range_is_answered_with_that_piece(site, value, first, last):
    reply = get(site, path_of(SMALL, "fil/base"), Range=value)
    assert (reply.status, reply.body) == (206, SMALL.content[first:last + 1])
    assert reply.headers.get("Content-Range") == "bytes %d-%d/%d" % (first, last, SIZE)
    assert reply.headers.get("Content-Length") == str(last - first + 1)
    assert reply.headers.get("ETag") == '"%s"' % SMALL.sha256
    assert reply.headers.get("Content-Type") == "application/octet-stream"


@pytest.mark.parametrize("value", UNSATISFIABLE)
def test_a_range_past_the_end_is_refused_with_the_size(site, value):
    reply = get(site, path_of(SMALL, "fil/base"), Range=value)
    assert reply.status == 416
    assert reply.headers.get("Content-Range") == "bytes */%d" % SIZE


@pytest.mark.parametrize("value", IGNORED)
def test_malformed_and_multiple_ranges_get_the_whole_file(site, value):
    reply = get(site, path_of(SMALL, "fil/base"), Range=value.encode("utf-8").decode("latin-1"))
    assert (reply.status, reply.body) == (200, SMALL.content)


def test_pieces_of_a_big_file_put_together_are_the_file(site):
    step, pieces = 100003, []
    for first in range(0, len(BIG.content), step):
        reply = get(site, path_of(BIG, "fil/base"), Range="bytes=%d-%d" % (first, first + step - 1))
        assert reply.status == 206
        pieces.append(reply.body)
    assert b"".join(pieces) == BIG.content
    assert get(site, path_of(BIG, "fil/base"), Range="bytes=-16384").body == BIG.content[-16384:]


def test_head_with_a_range_announces_and_sends_nothing(site):
    reply = get(site, path_of(SMALL, "fil/base"), "HEAD", Range="bytes=0-9")
    assert reply.body == b""
    assert (reply.status, reply.headers.get("Content-Length")) in ((206, "10"), (200, str(SIZE)))


@pytest.mark.parametrize("template, status", [
    ('"{sha256}"', 206), ('"other"', 200), ('W/"{sha256}"', 200), ("Thu, 01 Jan 1970 00:00:00 GMT", 200),
    ("garbage", 200)])
def test_if_range_gives_the_piece_only_of_the_same_file(site, template, status):
    reply = get(site, path_of(SMALL, "fil/base"), Range="bytes=1-4", If_Range=template.format(sha256=SMALL.sha256))
    assert (reply.status, reply.body) == (status, SMALL.content[1:5] if status == 206 else SMALL.content)


def test_an_empty_file_has_no_ranges(site):
    assert upload_raw(site, "fil/dev", "nothing", "1.0", "nothing-1.0.exe", b"").status == 200
    digest = hashlib.sha256(b"").hexdigest()
    path = "/fil/dev/+f/%s/%s/nothing-1.0.exe" % (digest[:3], digest[3:16])
    assert (get(site, path).status, get(site, path).headers.get("Content-Length")) == (200, "0")
    reply = get(site, path, Range="bytes=0-0")
    assert (reply.status, reply.headers.get("Content-Range")) == (416, "bytes */0")


# Conditional requests


@pytest.mark.parametrize("template, status", [
    ('"{sha256}"', 304), ('W/"{sha256}"', 304), ('"a", "{sha256}"', 304), ("*", 304), ('"other"', 200), ("{sha256}", 200)])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_if_none_match(site, template, status, method):
    reply = get(site, path_of(SMALL, "fil/base"), method, If_None_Match=template.format(sha256=SMALL.sha256))
    assert reply.status == status
    if status == 304:
        assert (reply.body, reply.headers.get("Content-Type")) == (b"", None)
        assert reply.headers.get("ETag") == '"%s"' % SMALL.sha256


def test_if_none_match_wins_over_a_range(site):
    reply = get(site, path_of(SMALL, "fil/base"), If_None_Match='"%s"' % SMALL.sha256, Range="bytes=0-1")
    assert (reply.status, reply.body) == (304, b"")


# The metadata file


def metadata_mark(server, archive):
    [entry] = [entry for entry in server.simple("fil/base", "files")["files"] if entry["filename"] == archive.filename]
    return entry["core-metadata"]


@BOTH
def test_the_metadata_file_is_the_members_exact_bytes_under_the_announced_hash(site, archive):
    reply = get(site, path_of(archive, "fil/base") + ".metadata")
    member = "%s-%s.dist-info/METADATA" % (archive.name, archive.version)
    assert (reply.status, reply.body) == (200, zipfile.ZipFile(io.BytesIO(archive.content)).read(member))
    assert metadata_mark(site, archive) == {"sha256": hashlib.sha256(reply.body).hexdigest()}
    assert reply.headers.get("Content-Type") == "application/octet-stream"
    assert reply.headers.get("Cache-Control") == "max-age=365000000, immutable, public"
    assert reply.headers.get("Content-Length") == str(len(archive.metadata))
    assert reply.headers.get("ETag")


def test_the_metadata_file_keeps_bytes_that_are_no_text(site):
    plain = wheel("binary", "1.0")
    archive = wheel("binary", "1.0", metadata=plain.metadata.replace(b"\n", b"\r\n") + b"\r\n\xff\xfe caf\xe9\r\n")
    assert site.upload("fil/dev", archive).status == 200
    reply = get(site, path_of(archive, "fil/dev") + ".metadata")
    assert reply.body == archive.metadata
    [entry] = site.simple("fil/dev", "binary")["files"]
    assert entry["core-metadata"] == {"sha256": hashlib.sha256(archive.metadata).hexdigest()}


def test_ranges_head_and_conditions_work_on_the_metadata_file(site):
    path = path_of(SMALL, "fil/base") + ".metadata"
    full = get(site, path)
    assert get(site, path, "HEAD").headers.get("Content-Length") == str(len(SMALL.metadata))
    piece = get(site, path, Range="bytes=2-5")
    assert (piece.status, piece.body) == (206, SMALL.metadata[2:6])
    assert get(site, path, If_None_Match=full.headers.get("ETag")).status == 304
    assert full.headers.get("ETag") != get(site, path_of(SMALL, "fil/base")).headers.get("ETag")


def test_there_is_no_metadata_file_of_an_sdist_or_of_nothing(site):
    [entry] = [entry for entry in site.simple("fil/base", "files")["files"] if entry["filename"] == SOURCE.filename]
    assert "core-metadata" not in entry
    assert get(site, path_of(SOURCE, "fil/base") + ".metadata").status == 404
    assert get(site, path_of(wheel("files", "9.9"), "fil/base") + ".metadata").status == 404
    assert get(site, path_of(SMALL, "fil/base") + ".metadata.metadata").status == 404


# Nothing there


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_file_that_never_existed_is_not_found(site, method):
    reply = get(site, path_of(wheel("never", "1.0"), "fil/base"), method)
    assert reply.status == 404
    if method == "GET":
        message = site.get(path_of(wheel("never", "1.0"), "fil/base")).json()["message"]
        assert message == "no such file"


def test_a_file_of_an_unknown_index_is_not_found(site):
    reply = site.get(path_of(SMALL, "fil/none"))
    assert (reply.status, reply.json()["message"]) == (404, "The stage fil/none could not be found.")


def test_a_deleted_file_is_gone(site):
    archive = wheel("gone", "1.0")
    site.upload("fil/dev", archive)
    path = path_of(archive, "fil/dev")
    assert site.delete(path, user="fil").status == 200
    for accept in ("*/*", "application/json"):
        assert get(site, path, accept=accept).status == 410
    assert site.get(path).json()["message"] == "file existed, deleted in later serial"
    assert get(site, path, "HEAD").status == 410
    assert get(site, path + ".metadata").status in (404, 410)
    assert get(site, path, Range="bytes=0-1").status == 410


def test_the_hash_in_the_path_counts(site):
    wrong = path_of(SMALL, "fil/base").replace("/+f/" + SMALL.sha256[:3], "/+f/" + ("000" if SMALL.sha256[:3] != "000" else "111"))
    assert get(site, wrong).status == 404
    assert get(site, path_of(SMALL, "fil/base").replace(SMALL.filename, BIG.filename)).status == 404
    short = "/fil/base/+f/%s/%s" % (SMALL.sha256[:3], SMALL.filename)
    assert get(site, short).status == 404


TRAVERSALS = [
    "/fil/base/+f/../../../devpi_lite.db", "/fil/base/+f/..%2f..%2f..%2fdevpi_lite.db", "/fil/base/+f/%2e%2e/%2e%2e/.secret",
    "/fil/base/+f/{a}/{b}/../../../.secret", "/fil/base/+f/{a}/{b}/..%2f..%2f..%2f.secret", "/fil/base/+f/{a}/{b}/%5c..%5c.secret",
    "/fil/base/+f//etc/passwd", "/fil/base/+f/{a}/{b}//etc/passwd", "/fil/base/+f/%2fetc%2fpasswd", "/fil/base/+f/{a}/{b}/%00",
    "/fil/base/+f/{a}/{b}/x%00.whl", "/fil/base/+f/{a}/{b}/", "/fil/base/+f/{a}/", "/fil/base/+f/", "/fil/base/+f",
    "/fil/base/+f/{a}/{b}/{name}%00", "/fil/base/+f/{a}/{b}/%0d%0aX-Evil:%201", "/fil/base/+f/{a}/{b}/%ff%fe", "/fil/base/+f/{a}/{b}/%zz",
    "/fil/base/+e/..%2f..%2f.secret/x", "/fil/base/+e/../../.secret", "/fil/base/+f/" + "a/" * 300, "/fil/base/+f/" + "x" * 3000,
    "/../.secret", "/fil/../.secret", "/%2e%2e/.secret", "/fil/base/+f/{a}/{b}/{name}/../../../../../.secret",
]


@pytest.mark.parametrize("path", TRAVERSALS)
@pytest.mark.parametrize("suffix", ["", ".metadata"])
def test_paths_that_climb_lead_nowhere(site, path, suffix):
    path = path.format(a=SMALL.sha256[:3], b=SMALL.sha256[3:16], name=SMALL.filename) + suffix
    for accept in ("*/*", "application/json"):
        reply = get(site, path, accept=accept)
        assert reply.status in (400, 404, 414)
        assert reply.headers.get("X-Evil") is None
        assert b"root:" not in reply.body and b"SQLite" not in reply.body


@pytest.mark.parametrize("method", ["PUT", "PATCH", "PUSH"])
def test_other_methods_never_change_a_file(site, method):
    reply = site.request(method, path_of(SMALL, "fil/base"), body=b"evil", user="fil", headers={"Accept": "*/*"})
    assert reply.status in (200, 404)
    assert get(site, path_of(SMALL, "fil/base")).body == SMALL.content


def test_a_client_that_leaves_in_the_middle_harms_nobody(site):
    for _ in range(5):
        with site.connect() as connection:
            connection.sendall(("GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path_of(BIG, "fil/base")).encode())
            assert connection.recv(100)
    assert get(site, path_of(BIG, "fil/base")).body == BIG.content


def test_many_files_over_one_connection(site):
    archives = [SMALL, BIG, SOURCE] * 3
    request = "".join("GET %s HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n" % path_of(archive, "fil/base") for archive in archives)
    with site.connect() as connection:
        connection.settimeout(10)
        connection.sendall(request.encode())
        stream = connection.makefile("rb")
        for archive in archives:
            assert stream.readline().startswith(b"HTTP/1.1 200")
            length = None
            for line in iter(stream.readline, b"\r\n"):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            assert stream.read(length) == archive.content
