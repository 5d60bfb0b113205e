"""How files come to a replica: small ones together, large ones by themselves and from where they broke off."""

import contextlib
import hashlib
import json
import re
import threading
import time
import types

import pytest

import devpi_lite
from harness import documentation, eventually, patched, path_of, submit, upload_docs, wheel
from replicas import ANY, SOON, Between, primary_at, replica_at, same, signed, status, unsound


class Pair:
    """A primary with a stage of some files, and replicas of it behind `between`."""

    def __init__(self, folder):
        self.folder, self.replicas = folder, []
        self.primary = primary_at(folder / "p").start()
        self.primary.login("root")
        self.primary.add_user("ann")
        self.primary.add_index("ann/dev")
        self.between = Between(self.primary.port)

    def upload(self, *sizes):
        archives = [wheel("demo", "%d.%d" % (size, at), size=size) for at, size in enumerate(sizes)]
        for archive in archives:
            assert self.primary.upload("ann/dev", archive).status == 200
        return archives

    def replica(self, *options, code=""):
        server = replica_at(self.folder / ("r%d" % len(self.replicas)), self.primary, *options,
                            url=self.between.url, script=patched(self.folder, SOON + code))
        self.replicas.append(server)
        return server.start()

    def asked(self, pattern):
        """The lines of the primary's access log that have this."""
        return [line for line in self.primary.whole_output().splitlines() if re.search(pattern, line)]

    def end(self):
        for server in (*self.replicas, self.primary):
            if server.running:
                server.kill()
        self.between.close()


@pytest.fixture
def pair(tmp_path):
    pair = Pair(tmp_path)
    yield pair
    pair.end()


def test_small_files_come_together_and_large_ones_by_themselves(pair):
    archives = pair.upload(*[2000] * 30, 1500000)
    replica = pair.replica()
    same(pair.primary, replica)
    assert unsound(replica) == []
    assert len(pair.asked("POST /.repl/v1/blobs 200")) <= 5
    (large,) = pair.asked("GET /.repl/v1/blob/")
    assert archives[-1].sha256 in large
    for archive in archives[::10]:
        assert replica.get(path_of(archive, "ann/dev"), headers=ANY).body == archive.content


@pytest.mark.parametrize("size", [2000, 1500000])
def test_a_file_that_has_no_place_on_disk_stops_no_other(pair, size):
    replica = pair.replica()
    same(pair.primary, replica)
    pair.between.change = lambda data, sent: None       # the files are named all at once
    archives = pair.upload(*[size] * 4)
    folders = [replica.directory / "files" / archive.sha256[:2] for archive in archives]
    blocked = next(at for at in (1, 2, 0, 3) if folders.count(folders[at]) == 1)
    folders[blocked].rmdir()
    folders[blocked].write_bytes(b"")
    pair.between.change = None
    eventually(lambda: status(replica)["wanted"]["files"] == 1)
    for at in {0, 1, 2, 3} - {blocked}:
        assert replica.get(path_of(archives[at], "ann/dev"), headers=ANY).body == archives[at].content


def test_a_large_file_goes_on_where_it_broke_off(pair):
    (archive,) = pair.upload(1500000)
    pair.between.change = lambda data, sent: data if sent < 400000 else None
    replica = pair.replica()
    same(pair.primary, replica)
    assert pair.between.changed >= 2
    eventually(lambda: len(pair.asked("GET /.repl/v1/blob/.* 206 ")) >= 2)      # logged after it was sent
    assert replica.get(path_of(archive, "ann/dev"), headers=ANY).body == archive.content
    assert unsound(replica) == []


def test_a_large_file_goes_on_after_the_primary_was_away(pair):
    (archive,) = pair.upload(1500000)
    was_cut = threading.Event()

    def cut_all(data, sent):
        if sent > 500000:
            pair.between.is_open = False
            was_cut.set()
            return None
        return data

    pair.between.change = cut_all
    replica = pair.replica(code="devpi_lite.Limits.resumptions = 0\n")
    assert was_cut.wait(10)
    time.sleep(0.3)
    assert len(unsound(replica)) == 1       # what came so far
    pair.between.change, pair.between.is_open = None, True
    same(pair.primary, replica)
    assert len(pair.asked("GET /.repl/v1/blob/.* 206 ")) == 1
    assert replica.get(path_of(archive, "ann/dev"), headers=ANY).body == archive.content
    assert unsound(replica) == []


def test_small_files_come_though_each_response_breaks_off(pair):
    pair.upload(*[30000] * 12, 90000)
    pair.between.change = lambda data, sent: data if sent < 70000 else None
    replica = pair.replica()
    same(pair.primary, replica)
    assert pair.between.changed and unsound(replica) == []


def test_what_is_altered_on_the_way_holds_up_no_other_file(pair):
    """One byte of each response, somewhere in the middle: in a file, or in the line before it."""
    pair.upload(*range(3000, 3040))
    pair.between.change = lambda data, sent: data if len(data) < 5000 or sent > 200000 else (
        data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1:])
    replica = pair.replica()
    eventually(lambda: status(replica)["serial"] == status(pair.primary)["serial"])
    eventually(lambda: status(replica)["wanted"]["files"] <= 30)
    assert [path for path in unsound(replica) if "/files/" in path] == []
    pair.between.change = None
    same(pair.primary, replica)
    assert unsound(replica) == []


def test_a_file_that_is_under_way_with_others_is_not_fetched_twice(pair):
    archives = pair.upload(*[20000] * 8)
    go_on = threading.Event()

    def hold(data, sent):
        if len(data) > 15000:
            go_on.wait(5)
        return data

    pair.between.change = hold
    replica = pair.replica("--file-replication-threads", "1")
    eventually(lambda: pair.asked("POST /.repl/v1/blobs 200"))
    replies = []
    clients = [threading.Thread(target=lambda: replies.append(
        replica.get(path_of(archives[3], "ann/dev"), headers=ANY))) for _ in range(3)]
    for client in clients:
        client.start()
    time.sleep(0.2)
    assert replies == []
    go_on.set()
    for client in clients:
        client.join(10)
    assert [reply.body for reply in replies] == [archives[3].content] * 3
    same(pair.primary, replica)
    assert pair.asked("GET /.repl/v1/blob/") == [] and len(pair.asked("POST /.repl/v1/blobs")) == 1


@pytest.mark.parametrize("error", ["devpi_lite.disk_problem(OSError(28, 'full'))", "MemoryError()"])
def test_files_that_can_not_be_kept_come_again(pair, error):
    archives = pair.upload(*[2000] * 10)
    replica = pair.replica(code="""
keep, full = devpi_lite.Blobs.keep_many, [True]
def keep_many(self, files):
    if full:
        full.pop()
        raise %s
    keep(self, files)
devpi_lite.Blobs.keep_many = keep_many
""" % error)
    same(pair.primary, replica)
    assert "can't be kept" in replica.output() and unsound(replica) == []
    assert replica.get(path_of(archives[3], "ann/dev"), headers=ANY).body == archives[3].content


def test_a_file_that_is_deleted_before_it_came_is_waited_for_no_more(pair):
    (lost, _) = pair.upload(2000, 3000)
    (pair.primary.directory / "files" / lost.sha256[:2] / lost.sha256).unlink()
    replica = pair.replica()
    eventually(lambda: lost.sha256 in status(replica)["replication-errors"])
    assert status(replica)["replica-files-in-sync-at"] is None
    assert pair.primary.delete("/ann/dev/demo/2000.0", user="ann").status == 200
    eventually(lambda: status(replica)["replica-files-in-sync-at"])
    assert status(replica)["wanted"]["files"] == 0


@pytest.mark.parametrize("number", [28, 13])
def test_files_for_which_there_was_no_room_come_soon(pair, number):
    """It was not their fault: no try counts, and none waits for an hour at last."""
    pair.upload(*[2000] * 10)
    full = pair.folder / "full"
    full.touch()
    replica = pair.replica(code="""
import os
aside = devpi_lite.Blobs.put_aside
def put_aside(self, data):
    if os.path.exists(%r):
        raise devpi_lite.disk_problem(OSError(%d, os.strerror(%d)))
    return aside(self, data)
devpi_lite.Blobs.put_aside = put_aside
devpi_lite._note_failure = note
""" % (str(full), number, number))
    eventually(lambda: status(replica)["replication-errors"])
    assert tries(replica) == 0
    full.unlink()
    same(pair.primary, replica)
    assert unsound(replica) == [] and "Traceback" not in replica.whole_output()


def tries(replica):
    """The most tries that one wanted file took."""
    with contextlib.closing(devpi_lite.open_rows(str(replica.directory))) as db:
        return db.execute("SELECT max(tries) FROM wanted").fetchone()[0]


class Said:
    """A response of a primary, a piece at a time."""

    def __init__(self, *pieces):
        self.url, self.pieces = "http://primary", list(pieces)

    def read(self, size):
        return self.pieces.pop(0) if self.pieces else b""

    def length(self):
        return None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_why_a_file_did_not_come_is_noted_before_it_can_be_tried_again():
    name, noted = "5" * 64, []
    under_way = devpi_lite.UnderWay(None)
    primary = types.SimpleNamespace(
        url="http://primary", get=lambda path, body: Said(b"%s damaged\n" % name.encode()))
    assert under_way.reserve(name)
    devpi_lite.BlobBatch(
        types.SimpleNamespace(primary=primary, blobs=None, under_way=under_way), [{"sha256": name, "size": 5}],
        lambda row, error: noted.append((row["sha256"], under_way.reserve(name)))).run()
    assert noted == [(name, False)] and under_way.reserve(name)


def test_files_before_one_that_has_no_place_are_durable(tmp_path, monkeypatch):
    """Whoever finds them in their places takes them for kept."""
    blobs = devpi_lite.Blobs(str(tmp_path))
    contents = [b"one", b"two", b"three"]
    names = [hashlib.sha256(content).hexdigest() for content in contents]
    (tmp_path / "files" / names[1][:2]).rmdir()
    (tmp_path / "files" / names[1][:2]).write_bytes(b"")
    synced = []
    monkeypatch.setattr(devpi_lite, "sync_files", lambda paths, folder: synced.append(list(paths)))
    with pytest.raises(OSError):
        blobs.keep_many([(name, blobs.put_aside(content)) for name, content in zip(names, contents)])
    assert [blobs.has(name) for name in (names[0], names[2])] == [True, False]
    assert synced[1:] == [[str(tmp_path / "files" / names[0][:2])]]


def test_documentation_that_can_not_be_read_holds_up_no_other_file(pair):
    pair.upload(2000)
    upload_docs(pair.primary, "ann/dev", documentation("demo", "1.0"))
    replica = pair.replica(code="""
def enter_docs(*_):
    raise PermissionError(13, "not yours")
devpi_lite.enter_docs = enter_docs
""")
    same(pair.primary, replica)
    assert "can't be shown: [Errno 13] not yours" in replica.output()


def test_documentation_that_comes_after_its_row_is_found_by_search(pair):
    pair.upload(2000)
    upload_docs(pair.primary, "ann/dev", documentation("demo", "1.0", page="<h1>The cormorant</h1>"))
    replica = pair.replica(code="""
import time
get = devpi_lite.Primary.get
def late(self, path, *args, **keywords):
    while path.startswith("/+repl/v1/blob") and not search.rounds:
        time.sleep(0.01)
    return get(self, path, *args, **keywords)
devpi_lite.Primary.get = late
search = devpi_lite.SearchIndex
search.rounds, work = 0, search._work
def counted(self):
    done = work(self)
    search.rounds += done
    return done
search._work = counted
""")
    same(pair.primary, replica)
    eventually(lambda: replica.get("/+search?query=cormorant", user=None).json()["result"]["hits"])


def test_a_primary_that_can_not_be_reached_is_no_fault_of_its_files(pair):
    pair.upload(*[2000] * 10)
    replica = pair.replica(code="""
get, left = devpi_lite.Primary.get, [1, 2]
def away(self, path, *args, **keywords):
    if left and path.startswith("/+repl/v1/blob"):
        left.pop()
        raise devpi_lite.Unreachable("connection refused")
    return get(self, path, *args, **keywords)
devpi_lite.Primary.get = away
""")
    same(pair.primary, replica)
    assert pair.asked("GET /.repl/v1/blob/") == []      # all came together, once it could be reached


def test_a_file_that_has_failed_for_months_is_tried_every_hour(tmp_path):
    with contextlib.closing(devpi_lite.Store(devpi_lite.Settings(serverdir=str(tmp_path)), create=True)) as store:
        store.write(devpi_lite._note_failure, {"sha256": "5" * 64, "tries": 5000}, "away")


def test_a_replica_that_is_killed_among_its_first_files_goes_on(pair):
    pair.upload(*[40000] * 40)
    code = """
import time
put_aside = devpi_lite.Blobs.put_aside
devpi_lite.Blobs.put_aside = lambda self, data: time.sleep(0.01) or put_aside(self, data)
"""
    replica = pair.replica(code=code)
    for rounds in range(2):
        eventually(lambda: status(replica)["wanted"]["files"] not in (0, 40 - 10 * rounds))
        replica.kill()
        assert [path for path in unsound(replica) if "/files/" in path] == []
        replica.start()
    same(pair.primary, replica)
    assert unsound(replica) == []


def test_a_replica_that_has_nothing_yet_has_no_users(pair):
    pair.between.cut()
    replica = pair.replica()
    reply = replica.get("/", user=None)
    assert reply.status == 503 or (reply.status, reply.result) == (200, {}), reply


# -- what the primary answers


def ask(pair, names, **how):
    body = json.dumps(names).encode()
    target = "/+repl/v1/blobs"
    return pair.primary.request("POST", target, body=body, headers={
        "Content-Type": "application/json", **signed(pair.primary, target, "POST", body=body, **how)}, user=None)


def test_files_are_asked_for_by_a_signed_list(pair):
    one, large, damaged = pair.upload(1000, 1500000, 3000)
    (blob,) = (pair.primary.directory / "files").rglob(damaged.sha256)
    blob.chmod(0o600)
    blob.write_bytes(b"something else")
    names = ["5" * 64, one.sha256, large.sha256, damaged.sha256, one.sha256]
    reply = ask(pair, names)
    framed = ("%s %d\n" % (one.sha256, len(one.content))).encode() + one.content
    assert reply.status == 200 and reply.body == (
        b"5" * 64 + b" missing\n" + framed + b"%s large\n%s 14\nsomething else" % (
            large.sha256.encode(), damaged.sha256.encode()) + framed)
    blob_path = "/+repl/v1/blob/" + damaged.sha256        # who checks it asks for it by itself, and is told
    reply = pair.primary.get(blob_path, headers=signed(pair.primary, blob_path), user=None)
    assert reply.status != 200 and "damaged" in reply.text
    assert ask(pair, ["5" * 64] * 201).status == 400
    assert ask(pair, ["../secret"]).status == 400
    assert ask(pair, [["5" * 64]]).status == 400

    # the signature covers the list
    headers = signed(pair.primary, "/+repl/v1/blobs", "POST", body=b"[]")
    for body in (json.dumps(names).encode(), b"x" * 30000):
        assert pair.primary.request("POST", "/+repl/v1/blobs", body=body, headers=headers, user=None).status \
            in (401, 413)
    assert pair.primary.request("POST", "/+repl/v1/blobs", body=b"[]", user=None).status == 401


def test_what_is_too_much_for_one_response_is_left_out(pair):
    archives = pair.upload(*[900000] * 4)
    reply = ask(pair, [archive.sha256 for archive in archives])
    assert re.findall(rb"([0-9a-f]{64}) [0-9]+\n", reply.body) == [archive.sha256.encode() for archive in archives[:2]]


# -- snapshots of many rows


MANY = """
devpi_lite.Limits.snapshot_here = 3
devpi_lite.Limits.snapshot_wait = 0.02
"""


def test_a_snapshot_of_many_rows_is_made_once_by_another_process(pair):
    pair.primary.stop()
    pair.primary.script = patched(pair.folder, MANY)
    pair.primary.start("--keep-log", "2K")
    pair.between.target = pair.primary.port
    pair.upload(*range(2000, 2005))
    first = pair.replica()
    same(pair.primary, first)
    assert pair.asked("GET /.repl/v1/snapshot 503")        # it was being made
    second = pair.replica()
    same(pair.primary, second)
    assert len(snapshots(pair)) == 1

    made = snapshots(pair)
    pair.upload(*range(3000, 3008))                          # the log is cut: it is of no use
    third = pair.replica()
    same(pair.primary, third)
    assert len(snapshots(pair)) == 1 and snapshots(pair) != made
    pair.primary.stop()
    assert snapshots(pair) == []


def test_a_snapshot_with_long_readmes_has_no_endless_line(pair):
    """A line of 200 of the longest READMEs would be longer than any that a replica takes."""
    for number in range(20):
        submit(pair.primary, "ann/dev", "demo", "1.%d" % number, description="long " * 50000)
    replica = pair.replica(code="devpi_lite.Limits.log_response = 2 << 20\n")
    same(pair.primary, replica)


def snapshots(pair):
    return list((pair.primary.directory / "tmp").glob("*.snapshot"))
