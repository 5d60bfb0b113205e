"""What a primary and its replicas say of themselves, true at each moment: `+status`, its messages, `+metrics`."""

import re
import time

import pytest

from harness import eventually, patched
from replicas import HeldPair, comes_to_be, in_sync, primary_at, replica_at, signed, status

# times are short, and files come only while there is no file `no_files`
SHORT = """
import os
folder = %r
Limits = devpi_lite.Limits
Limits.log_wait, Limits.replica_pause, Limits.replica_retry = 1, 0.1, 1
Limits.replica_warning, Limits.replica_alarm = 0.6, 1.2
Limits.replica_late, Limits.replica_too_late, Limits.replica_known = 0.5, 1.0, 5
Limits.replica_queue, Limits.replica_tries = 1, 2
ask = devpi_lite.Primary.get
def kept_back(self, path, *arguments, **options):
    for name, problem in (("no_files", devpi_lite.NoResponse), ("bad_files", devpi_lite.UpstreamTrouble)):
        if "/blob" in path and os.path.exists(os.path.join(folder, name)):
            devpi_lite.time.sleep(0.05)
            raise problem("kept back")
    return ask(self, path, *arguments, **options)
devpi_lite.Primary.get = kept_back
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("status")
    pair = HeldPair(folder, "--outside-url", "http://replica.example:99/x", more=SHORT % str(folder))
    yield pair
    pair.end()


def messages(server):
    found = status(server)
    return found["status"], [text for text in found["messages"] if "replica" in text]


def says(server, level, pattern):
    """Waits until the server's level is that, and one of its messages fits the pattern."""
    def fits():
        found = messages(server)
        return found[0] == level and [text for text in found[1] if re.search(pattern, text)]
    return eventually(fits, 10)


def sample(server, name, labels=""):
    return float(re.search(r"(?m)^%s%s (\S+)$" % (name, re.escape(labels)), server.get("/+metrics").text)[1])


IN_SYNC = ("replica-in-sync-at", "replica-files-in-sync-at", "replica-metadata-in-sync-at")


def test_the_moments_of_an_idle_replica_move_on(pair):
    in_sync(pair.primary, pair.replica)
    before = status(pair.replica)
    later = eventually(lambda: (lambda found: all(found[key] > before[key] for key in IN_SYNC) and found)(status(pair.replica)), 5)
    assert later["serial"] == before["serial"]
    assert later["replica-init-queue-finished-at"] == before["replica-init-queue-finished-at"]
    assert messages(pair.replica) == ("ok", [])


def test_a_moment_is_one_at_which_serial_hash_and_files_agreed(pair):
    with pair.mark("no_files"):
        archive, needed = pair.new_file("agree")
        eventually(lambda: status(pair.replica)["serial"] == needed)
        before = status(pair.replica)
        time.sleep(0.3)     # the primary responds meanwhile, and no file comes
        pair.primary.patch("/ann", {"title": "agree"}, user="ann")
        later = eventually(lambda: (lambda found: found["serial"] > needed and found)(status(pair.replica)))
        eventually(lambda: status(pair.replica)["replica-metadata-in-sync-at"] > before["replica-metadata-in-sync-at"])
        assert later["wanted"]["files"] == 1
        for key in IN_SYNC[:2]:
            assert status(pair.replica)[key] == before[key], key
        assert sample(pair.replica, "devpi_lite_replica_wanted_files") == 1
        assert sample(pair.replica, "devpi_lite_replica_wanted_bytes") == len(archive.content)
    in_sync(pair.primary, pair.replica)
    eventually(lambda: all(status(pair.replica)[key] > before[key] for key in IN_SYNC))


def test_files_that_do_not_come_are_complained_of(pair):
    with pair.mark("no_files"):
        for number in range(3):
            pair.new_file("queue", "%d.0" % number)
        says(pair.replica, "warn", "files that have not arrived: 3")
        says(pair.replica, "fatal", "no file has arrived for [0-9]+ seconds, and 3 wait")
        assert sample(pair.replica, "devpi_lite_replica_wanted_files") == 3
    says_nothing(pair.replica)
    with pair.mark("bad_files"):
        pair.new_file("queue", "9.0")
        says(pair.replica, "warn", "files that can't be fetched: 1")
        says(pair.replica, "fatal", "files that can't be fetched: 1")
        assert sample(pair.replica, "devpi_lite_replica_failed_files") == 1
        (error,) = status(pair.replica)["replication-errors"].values()
        assert "kept back" in error["message"]
    says_nothing(pair.replica)


def says_nothing(server):
    eventually(lambda: messages(server) == ("ok", []), 20)


def test_a_replica_that_stays_behind_or_hears_nothing_is_complained_of(tmp_path):
    pair = HeldPair(tmp_path, more=SHORT % str(tmp_path))
    try:
        says_nothing(pair.replica)
        assert sample(pair.replica, "devpi_lite_replica_state", '{state="following"}') == 1
        with pair.mark("cut"):
            pair.primary.patch("/ann", {"title": "cut"}, user="ann")
            comes_to_be(pair.replica, "unreachable")
            says(pair.replica, "fatal", "nothing has come of the primary")
            assert sample(pair.replica, "devpi_lite_replica_contact_seconds") > 1
            before = [status(pair.replica)[key] for key in IN_SYNC]
            time.sleep(0.3)
            assert [status(pair.replica)[key] for key in IN_SYNC] == before, "the primary is away"
            assert sample(pair.replica, "devpi_lite_replica_state", '{state="unreachable"}') == 1
            assert sample(pair.replica, "devpi_lite_replica_state", '{state="following"}') == 0
        says_nothing(pair.replica)
    finally:
        pair.end()


def test_the_primary_knows_what_its_replicas_said_last(pair):
    in_sync(pair.primary, pair.replica)
    uuid = status(pair.replica)["uuid"]

    def known():
        return status(pair.primary)["polling_replicas"][uuid]

    with pair.mark("no_files"):
        _, needed = pair.new_file("known")
        found = eventually(lambda: (lambda facts: facts["missing-files"] == 1 and facts)(known()))
        assert (found["outside-url"], found["serial"], found["remote-ip"]) == (
            "http://replica.example:99/x", needed, "127.0.0.1")
        assert sample(pair.primary, "devpi_lite_replica_missing_files", '{uuid="%s"}' % uuid) == 1
    eventually(lambda: known()["missing-files"] == 0)
    assert sample(pair.primary, "devpi_lite_replica_behind_serials", '{uuid="%s"}' % uuid) == 0
    # what a replica does not say is as it was
    stranger = "5" * 32
    for query, facts in (("missing=7&outside=http%3A%2F%2Fa.example", (7, "http://a.example")), ("wait=0", (7, "http://a.example")),
                         ("missing=2", (2, "http://a.example")), ("outside=", (2, None))):
        target = "/+repl/v1/log?after=-1&hash=&" + query
        assert pair.primary.get(target, headers=signed(pair.primary, target)).status in (200, 409)
        found = status(pair.primary)["polling_replicas"][stranger]
        assert (found["missing-files"], found["outside-url"]) == facts, query
    for query in ("outside=ftp%3A%2F%2Fa", "outside=http%3A%2F%2Fa%0Ab", "outside=http%3A%2F%2F" + "a" * 600, "missing=x"):
        target = "/+repl/v1/log?after=-1&hash=&" + query
        assert pair.primary.get(target, headers=signed(pair.primary, target)).status == 400, query


def test_a_replica_that_does_not_ask_any_more_is_complained_of_for_a_while(tmp_path):
    primary = primary_at(tmp_path / "p", script=patched(tmp_path, SHORT % str(tmp_path) + "Limits.replica_known = 1.6\n")).start()
    replica = replica_at(tmp_path / "r", primary).start()
    try:
        in_sync(primary, replica)
        uuid = status(replica)["uuid"]
        assert messages(primary) == ("ok", [])
        assert sample(primary, "devpi_lite_replicas") == 1
        replica.kill()
        primary.patch("/root", {"title": "x"}, user="root")         # ends what it waited for
        says(primary, "warn", "the replica %s at 127.0.0.1 has not asked for changes for [0-9]+ seconds" % uuid)
        assert sample(primary, "devpi_lite_replica_silent_seconds", '{uuid="%s"}' % uuid) > 0.5
        says_nothing(primary)
        assert uuid in status(primary)["polling_replicas"]
    finally:
        for server in (replica, primary):
            if server.running:
                server.kill()
