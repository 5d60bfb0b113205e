"""A primary, its replicas and clients in one process, through faults that a seed draws: see simulator.py.

`DEVPI_LITE_SEEDS=10000` runs that many seeds, other ones each time but for the first.
"""

import os
import random

import pytest

import devpi_lite
import simulator

if not hasattr(os, "memfd_create"):
    pytest.skip("the simulator's sockets are files in memory, which this system lacks", allow_module_level=True)

WANTED = int(os.environ.get("DEVPI_LITE_SEEDS", 0))
SEEDS = 8
# Seeds that have failed, with what was wrong then.
ONCE_FAILED = {101: "negative uptime after the clock was set", 136: "negative age of the search queue",
               20068: "a replica behind a snapshot was refused"}


@pytest.fixture(scope="module", autouse=True)
def prepared():
    with simulator.prepared():
        yield


@pytest.mark.parametrize("seed", sorted(ONCE_FAILED))
def test_a_seed_that_failed_once(seed):
    simulator.simulate(seed)


def test_seeds():
    first = random.randrange(1 << 30) if WANTED else 0
    failures = []
    for seed in [*range(SEEDS), *range(first, first + WANTED - SEEDS)]:
        try:
            simulator.simulate(seed)
        except simulator.Failure as failure:
            failures.append(str(failure))
        assert len(failures) < 5, "\n\n".join(failures)
    assert not failures, "\n\n".join(failures)


def test_a_seed_draws_the_same_steps_each_time():
    assert simulator.steps_of(5) == simulator.steps_of(5) != simulator.steps_of(6)
    one, other = (simulator.simulate(5, simulator.steps_of(5, faults=("line", "kill"))) for _ in range(2))
    assert one.done == other.done


# -- what seeds hardly ever draw


def test_a_snapshot_of_a_history_that_lacks_what_is_here_is_not_taken():
    """Its name leads to another server between the two requests of a replica that is too far behind."""
    def scene(world, dice):
        primary, replica = world.nodes["p"], world.nodes["a"]
        simulator.copy_is_made(world, dice)
        simulator.upload_to(world, primary, "ann/dev", "alpha")
        simulator.follow_once(world, replica)
        simulator.second_primary(world, dice)
        twin = world.nodes["q"]
        for number in range(3):
            simulator.upload_to(world, twin, "bob/dev", "beta", number=number)
        primary.keep_log = primary.app.store.keep_log = devpi_lite.LogBounds(300, simulator.DAY)
        for number in range(3):
            simulator.upload_to(world, primary, "ann/dev", "alpha", number=number)
        before, carry = replica.head(), world.carry

        def turns(client, host, raw):
            answer = carry(client, host, raw)
            if b"/+repl/v1/log" in raw[:40]:
                assert b"pruned" in answer
                world.names["main"] = twin
            return answer
        world.carry = turns
        simulator.follow_once(world, replica)
        world.carry = carry
        assert replica.follower.state == "diverged" and replica.head() == before, replica.follower.trouble
        assert twin.app.store.closed_to_rows        # it is told of what it never had

    simulator.simulate("scene", [(0, scene)])


def test_a_replica_one_entry_behind_the_snapshot_of_the_promoted_one_follows_it():
    def scene(world, dice):
        primary, behind = world.nodes["p"], world.nodes["a"]
        simulator.follow_once(world, behind)
        simulator.upload_to(world, primary, "ann/dev", "alpha")
        heir = world.add("new", "host-new", "main").start()
        simulator.follow_once(world, heir)
        primary.stop()
        heir.stop()
        assert simulator.run_command(world, heir, "promote", "--force", "--accept-loss")
        heir.primary_host = None
        heir.start()
        simulator.upload_to(world, heir, "ann/dev", "beta")
        behind.stop()
        behind.primary_host = heir.host
        behind.start()
        simulator.follow_once(world, behind)
        assert (behind.follower.state, behind.head()) == ("following", heir.head()), behind.follower.trouble
        assert not any("/+repl/v1/snapshot" in path for name, _, path in world.last_answers if name == "a")
        world.files_are_lost = True

    simulator.simulate("scene", [(0, scene)])


# -- it finds what it is to find


def fails(words, *faults, seeds=range(30)):
    """Whether one of the seeds fails with such faults, and says that."""
    for seed in seeds:
        try:
            simulator.simulate(seed, simulator.steps_of(seed, faults=faults))
        except simulator.Failure as failure:
            if words in str(failure):
                return True
    return False


def test_a_replica_that_takes_any_history_is_found(monkeypatch):
    def entries(self, serial, chain):
        with self.store.read() as db:
            if serial >= self.store.serial:
                return None, b""
            return None, b"".join(self._lines(db, serial, chain))

    monkeypatch.setattr(devpi_lite.Replicas, "entries", entries)
    assert fails("follows", "back")


def test_a_file_that_is_not_checked_is_found(monkeypatch):
    def check(self, row, found):
        if isinstance(found, str):
            raise devpi_lite.LeftOut("a word came")

    monkeypatch.setattr(devpi_lite.BlobBatch, "_check", check)
    assert fails("other bytes under", "line", seeds=range(19, 49))       # soon, with the first of them


def test_a_row_that_is_left_out_is_found(monkeypatch):
    put = devpi_lite.Change.put

    def forgets(self, kind, key, value):
        if self.is_replay and kind == "file" and value is None:
            return None
        return put(self, kind, key, value)

    monkeypatch.setattr(devpi_lite.Change, "put", forgets)
    assert fails("other rows", "end")


def test_a_change_that_a_kill_undoes_is_found(monkeypatch):
    monkeypatch.setattr(simulator, "copy_files", lambda source, target, copy=simulator.copy_files: (
        copy(source, target), [path.unlink() for path in simulator.pathlib.Path(target).glob("*.db-wal")]))
    assert fails("went from", "kill")


def test_a_signature_that_counts_twice_is_found(monkeypatch):
    monkeypatch.setattr(devpi_lite.Nonces, "use", lambda self, number, *_: True)
    assert fails("repeated", "line")
    assert fails("old request", "replay")
