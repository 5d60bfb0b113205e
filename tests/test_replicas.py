"""A replica has all that people did on its primary, shows it as the primary does, takes what
clients change through it to the primary, and lets nobody follow without the secret."""

import json
import time

import pytest

import replay
from harness import (
    SIMPLE_JSON, Upstream, documentation, eventually, page, patched, path_of, run_command,
    sdist, upload_docs, wheel)
from replay import MIRRORS, Crowd, differences, rows_of
from replicas import (
    head, in_sync, primary_at, replica_at, rows, same, signed, status,
    unsound)

LOG = "/+repl/v1/log?after=-1&hash=&wait=0"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(primary, replica), which follows it; each test makes users of its own names."""
    folder = tmp_path_factory.mktemp("pair")
    primary = primary_at(folder / "primary").start()
    replica = replica_at(folder / "replica", primary)
    try:
        primary.login("root")
        primary.add_user("ann")
        primary.add_index("ann/dev")
        replica.start()
        replica.passwords.update(primary.passwords)
        yield primary, replica
    finally:
        for server in (replica, primary):
            if server.running:
                server.kill()


def on_both(pair, path, **options):
    """The replies of the primary and the replica, in sync."""
    in_sync(*pair)
    return [server.get(path, **options) for server in pair]


def new_stage(pair, name, **config):
    primary, replica = pair
    primary.add_user(name)
    replica.passwords[name] = "pw"
    primary.add_index(name + "/dev", **config)
    return name + "/dev"


# -- what people do


def test_all_that_a_crowd_does_arrives(tmp_path):
    upstream = Upstream().start()
    primary = primary_at(tmp_path / "p", script=patched(tmp_path, "")).start()
    replica = replica_at(tmp_path / "r", primary)
    try:
        crowd = Crowd(primary, upstream, 1).settle()
        replica.start()
        crowd.tour()
        in_sync(primary, replica)
        one, other = (rows_of(server.directory, MIRRORS) for server in (primary, replica))
        assert differences(one, other) == []
        same(primary, replica)
        others = [line for line in replay.served_otherwise(primary, replica, one)
                  if not any(path in line for path in (*MIRRORS, "bob/dev"))]
        assert others == []     # pages with a mirror's files are its own matter
        named = replay.blobs_named(other)
        assert named and named <= set(replay.blobs_of(replica.directory))
        assert unsound(replica) == []
    finally:
        for server in (replica, primary):
            if server.running:
                server.kill()
        upstream.stop()


def test_a_changed_password_is_changed_there(pair):
    primary, replica = pair
    new_stage(pair, "pat")
    in_sync(*pair)
    assert replica.post("/+login", {"user": "pat", "password": "pw"}).status == 200
    assert primary.patch("/pat", {"password": "another"}, user="pat").status == 200
    in_sync(*pair)
    assert replica.post("/+login", {"user": "pat", "password": "pw"}).status == 401
    assert replica.post("/+login", {"user": "pat", "password": "another"}).status == 200
    assert primary.delete("/pat", user="root").status == 200
    in_sync(*pair)
    assert replica.post("/+login", {"user": "pat", "password": "another"}).status == 401
    assert replica.get("/pat").status == 404


def test_a_token_of_the_primary_is_good_there_and_the_other_way_round(pair):
    primary, replica = pair
    new_stage(pair, "tom")
    in_sync(*pair)
    for one, other in (pair, pair[::-1]):
        other.tokens["tom"] = one.login("tom")
        assert other.get("/+api", user="tom").result["authstatus"][:2] == ["ok", "tom"]


def test_a_restricted_index_is_restricted_there(pair):
    primary, replica = pair
    index = new_stage(pair, "sue")
    archive = wheel("hush", "1.0")
    primary.upload(index, archive)
    for path in (path_of(archive, index), "/%s/+simple/hush/" % index):
        assert [reply.status for reply in on_both(pair, path)] == [200, 200]
    assert primary.patch("/" + index, ["acl_pkg_read=sue"], user="sue").status == 200
    in_sync(*pair)
    for path in (path_of(archive, index), path_of(archive, index) + ".metadata"):
        refused, there = on_both(pair, path)
        assert refused.status == there.status and there.status in (401, 403, 404), there
    allowed = replica.get(path_of(archive, index), user="sue", password="pw",
                          headers={"Accept": "*/*"})
    assert (allowed.status, allowed.body) == (200, archive.content)
    assert primary.patch("/" + index, ["acl_pkg_read=:ANONYMOUS:"], user="sue").status == 200
    assert [reply.status for reply in on_both(pair, path_of(archive, index))] == [200, 200]


def test_what_is_read_there_is_the_same_byte_for_byte(pair):
    primary, replica = pair
    index = new_stage(pair, "ben")
    archive, source = wheel("tool", "1.0", requires_python=">=3.9"), sdist("tool", "1.0")
    for each in (archive, source):
        assert primary.upload(index, each).status == 200
    upload_docs(primary, index, documentation("tool", "1.0", page="<h1>read me there</h1>"))
    tox = primary.post(path_of(archive, index), {"testenvs": {}, "mark": "tox"}, user="ben")
    assert tox.status == 200
    result = "/" + tox.result.lstrip("/").partition("#")[0]
    paths = [path_of(archive, index), path_of(source, index), path_of(archive, index) + ".metadata",
             "/%s/tool/1.0/+doc/index.html" % index, result]
    for path in paths:
        one, other = on_both(pair, path, headers={"Accept": "*/*"})
        assert (one.status, other.status) == (200, 200), (path, one, other)
        assert one.body == other.body and one.body, path
        assert one.headers["ETag"] == other.headers["ETag"], path
    for accept in (SIMPLE_JSON, "text/html"):
        one, other = on_both(pair, "/%s/+simple/tool/" % index, headers={"Accept": accept})
        assert one.status == 200 and one.body == other.body
        one, other = on_both(pair, "/%s/+simple/" % index, headers={"Accept": accept})
        assert one.status == 200 and one.body == other.body
    assert b"read me there" in replica.get(paths[3], headers={"Accept": "*/*"}).body
    part = replica.get(paths[0], headers={"Range": "bytes=5-20", "Accept": "*/*"})
    assert (part.status, part.body) == (206, archive.content[5:21])


def test_yank_status_push_and_removal_arrive(pair):
    primary, replica = pair
    index = new_stage(pair, "kim")
    primary.add_index("kim/prod")
    for version in ("1.0", "2.0"):
        primary.upload(index, wheel("mill", version))
        primary.upload(index, wheel("wind", version))
    yanked = primary.patch(path_of(wheel("mill", "1.0"), index) + "?yank=broken", user="kim")
    assert yanked.status == 200, yanked
    assert primary.push(index, "mill", "2.0", targetindex="kim/prod").status == 200
    assert primary.patch("/%s/wind" % index, {"project-status": {"status": "deprecated"}},
                         user="kim").status == 200
    in_sync(*pair)
    files = {file["filename"]: file for file in replica.simple(index, "mill")["files"]}
    assert files[wheel("mill", "1.0").filename]["yanked"] == "broken"
    assert replica.simple(index, "wind")["project-status"]["status"] == "deprecated"
    assert replica.versions("kim/prod", "mill") == ["2.0"]
    assert replica.fetch("kim/prod", wheel("mill", "2.0").filename, "mill") == \
        wheel("mill", "2.0").content

    assert primary.delete(path_of(wheel("mill", "1.0"), index), user="kim").status == 200
    assert primary.delete("/%s/wind" % index, user="kim").status == 200
    assert primary.delete("/kim/prod", user="kim").status in (200, 201)
    in_sync(*pair)
    assert replica.versions(index, "mill") == ["2.0"]
    assert replica.get(path_of(wheel("mill", "1.0"), index)).status == \
        primary.get(path_of(wheel("mill", "1.0"), index)).status != 200
    assert page(replica, index, "wind").status == page(primary, index, "wind").status == 404
    assert replica.get("/kim/prod").status == 404
    assert primary.delete("/kim", user="root").status == 200
    in_sync(*pair)
    assert replica.get("/kim").status == 404


def test_a_file_that_is_uploaded_anew_is_the_new_one_there(pair):
    primary, replica = pair
    index = new_stage(pair, "vic")
    for size in (10, 20000, 30):
        archive = wheel("flux", "1.0", size=size)
        assert primary.upload(index, archive).status == 200
        in_sync(*pair)
        assert replica.fetch(index, archive.filename, "flux") == archive.content
        assert len(replica.simple(index, "flux")["files"]) == 1


def test_the_rows_and_the_history_of_both_are_the_same(pair):
    """Behind the tests above, which leave something of everything."""
    primary, replica = pair
    primary.upload("ann/dev", wheel("all", "1.0"))
    same(primary, replica)
    assert unsound(replica) == []
    done = run_command("fsck", "--serverdir", replica.directory)
    assert done.returncode == 0, done


# -- through the replica


def test_changes_through_the_replica_are_there_at_once(pair):
    primary, replica = pair
    assert replica.put("/rex", {"password": "pw"}, user="root").status == 201
    replica.passwords["rex"] = primary.passwords["rex"] = "pw"
    assert replica.get("/rex").status == 200
    assert replica.put("/rex/dev", {}, user="rex").status == 200
    for number in range(5):
        archive = wheel("swift", "%d.0" % number, size=50000)
        assert replica.upload("rex/dev", archive).status == 200
        assert archive.filename in replica.filenames("rex/dev", "swift")
        assert replica.fetch("rex/dev", archive.filename, "swift") == archive.content
    assert replica.patch("/rex", {"password": "newer"}, user="rex").status == 200
    assert replica.post("/+login", {"user": "rex", "password": "pw"}).status == 401
    assert primary.post("/+login", {"user": "rex", "password": "newer"}).status == 200
    same(primary, replica)


def test_monitors_and_clients_find_what_a_replica_of_devpi_says(pair):
    primary, replica = pair
    metrics = {name: (kind, number) for name, kind, number in status(replica)["metrics"]}
    for name in ("devpi_server_replica_file_download_queue_size",
                 "devpi_server_replica_file_download_error_queue_size"):
        assert metrics[name] == ("gauge", 0)
    for server, said in ((replica, ["replica"]), (primary, None)):
        reply = server.put("/ann/dev", {}, user="ann")
        assert reply.headers.get_all("X-DEVPI-PROXY") == said
    assert replica.get("/ann").headers["X-DEVPI-PROXY"] is None


def test_what_is_refused_is_refused_in_the_words_of_the_primary(pair):
    primary, replica = pair
    index = new_stage(pair, "ned", volatile=False)
    archive, other = wheel("still", "1.0"), wheel("still", "1.0", size=100)
    assert primary.upload(index, archive).status == 200
    in_sync(*pair)
    before = head(primary)
    for method, path, body, user in (
            ("PUT", "/ned", {"password": "x"}, "root"), ("PUT", "/ned/dev", {}, "ned"),
            ("PUT", "/ned/more", {}, "ann"), ("DELETE", "/ned", None, "ann"),
            ("PATCH", "/ned/none", ["volatile=False"], "ned")):
        one, two = (server.request(method, path, body, user=user) for server in pair)
        assert one.status >= 400 and (one.status, one.body) == (two.status, two.body), (path, one, two)
    one, two = (server.upload(index, other) for server in pair)
    assert one.status >= 400 and (one.status, one.body) == (two.status, two.body)
    assert head(primary) == before


# -- files that are asked for early


def test_a_file_is_had_before_it_came(tmp_path):
    primary = primary_at(tmp_path / "p").start()
    replica = replica_at(tmp_path / "r", primary, "--file-replication-skip-indexes", "all")
    try:
        primary.add_user("ann")
        primary.add_index("ann/dev")
        replica.start()
        archive, late = wheel("early", "1.0", size=300000), wheel("late", "1.0")
        for each in (archive, late):
            primary.upload("ann/dev", each)
        eventually(lambda: status(replica)["serial"] == status(primary)["serial"])
        assert archive.sha256 not in {path.name for path in (tmp_path / "r/files").rglob("*")}
        part = replica.get(path_of(archive, "ann/dev"), headers={"Range": "bytes=7-", "Accept": "*/*"})
        assert (part.status, part.body) in ((206, archive.content[7:]), (200, archive.content))
        assert replica.fetch("ann/dev", archive.filename, "early") == archive.content
        eventually(lambda: archive.sha256 in {path.name for path in (tmp_path / "r/files").rglob("*")})
        metadata = replica.get(path_of(late, "ann/dev") + ".metadata", headers={"Accept": "*/*"})
        assert metadata.body == primary.get(path_of(late, "ann/dev") + ".metadata").body

        primary.stop()
        gone = replica.get(path_of(late, "ann/dev"), headers={"Accept": "*/*"})
        assert gone.status == 503 and gone.headers["Retry-After"], gone
        assert replica.fetch("ann/dev", archive.filename, "early") == archive.content
        assert unsound(replica) == []
    finally:
        for server in (replica, primary):
            if server.running:
                server.kill()


# -- who may follow


def test_only_who_has_the_secret_follows_and_once(pair):
    primary, _ = pair
    blob = "/+repl/v1/blob/" + wheel("all", "1.0").sha256
    for target in (LOG, "/+repl/v1/snapshot", blob):
        good = signed(primary, target)
        wrong = {
            "none": {}, "secret": signed(primary, target, secret=b"x" * 32),
            "old": signed(primary, target, ts=time.time() - 90),
            "early": signed(primary, target, ts=time.time() + 90),
            "target": signed(primary, target, signed_target="/+repl/v1/log?after=0&hash=&wait=0"),
            "method": signed(primary, target, method="POST"),
            "basic": {"Authorization": "Basic cm9vdDpzZWNyZXQ="},
            "cut": {"Authorization": good["Authorization"][:-1]}}
        for name, headers in wrong.items():
            reply = primary.get(target, headers=headers)
            assert reply.status == 401, (target, name, reply)
            assert b'"ops"' not in reply.body and b"pwhash" not in reply.body
            assert not {"x-devpi-head", "x-devpi-signature"} & {each.lower() for each in reply.headers}
        assert primary.get(target, user="root").status == 401
        first = primary.get(target, headers=good)
        assert first.status in (200, 404, 409), first
        assert primary.get(target, headers=good).status == 401
    assert primary.get("/+simple/", headers=signed(primary, "/+simple/")).status != 200


def test_a_standalone_server_and_a_replica_feed_nobody(pair, shared_server):
    for server in (shared_server, pair[1]):
        for path in (LOG, "/+repl/v1/snapshot", "/+repl/v1/blob/" + "5" * 64):
            secret = (pair[0] if server is pair[1] else server).directory / ".secret"
            reply = server.get(path, headers=signed(server, path, secret=secret.read_bytes().strip()))
            assert reply.status == 404, (path, reply)


@pytest.mark.parametrize("url", ["http://root:secret@127.0.0.1:1", "http://root@127.0.0.1:1",
                                 "ftp://127.0.0.1", "127.0.0.1:3141"])
def test_a_url_with_credentials_or_without_a_scheme_is_refused(tmp_path, url):
    (tmp_path / "secret").write_bytes(b"s" * 40)
    done = run_command("--serverdir", tmp_path / "r", "--primary-url", url, "--secretfile",
                       tmp_path / "secret", "--port", "0", timeout=20)
    assert done.returncode and "--primary-url" in done.stderr, done
    assert "secret@" not in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "r" / "devpi_lite.db").exists()


def test_the_status_of_both_tells_of_each_other(pair):
    primary, replica = pair
    in_sync(*pair)
    found = status(replica)
    assert (found["role"], found["primary-url"], found["replication-errors"]) == (
        "REPLICA", primary.url, {})
    for name in ("uuid", "serial", "serial-timestamp", "contacted-at"):
        assert found["primary-" + name] == found["master-" + name] is not None, name
    assert found["update-from-primary-at"] == found["update-from-master-at"] is not None
    assert found["primary-serial"] == found["serial"]
    for name in ("started-at", "metadata-in-sync-at", "files-in-sync-at",
                 "init-queue-finished-at", "in-sync-at"):
        assert abs(time.time() - found["replica-" + name]) < 60, name
    (polling,) = [each for each in status(primary)["polling_replicas"].values()
                  if each["remote-ip"] == "127.0.0.1" and each["serial"] >= 0]
    assert polling["serial"] <= found["serial"]
