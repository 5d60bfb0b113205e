"""Crews of worker threads, the queue that they take work from, and the writer's: who waits for whom, and nobody for ever."""

import contextlib
import sqlite3
import threading
import time

import pytest

import devpi_lite as d
from harness import eventually


def taken(queue):
    return [queue.get() for _ in range(len(queue))]


def test_each_address_has_a_turn_whatever_names_it_goes_by():
    queue = d.FairQueue()
    for number in range(6):
        queue.put("made up %d" % number, ("one", number))
    for number in range(3):
        queue.put("honest %d" % number, ("other", None))
    queue.put("proxied", ("one", 0))
    assert taken(queue) == ["made up 0", "honest 0", "made up 1", "honest 1", "made up 2", "honest 2",
                            "made up 3", "made up 4", "made up 5", "proxied"]
    assert (len(queue), queue.get(), queue.parties) == (0, None, {})


def test_what_is_wanted_is_taken_and_the_rest_keeps_its_order():
    queue = d.FairQueue()
    for party, items in (("a", (1, 2, 4)), ("b", (3, 6))):
        for item in items:
            queue.put(item, (party, None))
    assert queue.get(lambda item: item > 2) == 3
    assert queue.get(lambda item: item > 9) is None
    assert taken(queue) == [1, 6, 2, 4]


def test_the_largest_party_loses_what_came_last():
    queue = d.FairQueue()
    for item, party in (("a1", "a"), ("b1", "b"), ("b2", "b"), ("c1", "c")):
        queue.put(item, (party, None))
    assert queue.take_from_the_largest() == "b2"
    assert queue.take_from_the_largest() == "c1"        # of equals the one whose turn is last
    assert taken(queue) == ["a1", "b1"]


class Crew:
    """Workers whose work is to call what they get; `most` is how many ran at a time, outside waits not counted."""

    def __init__(self, limit, at_ease=None):
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.workers = d.Workers("test", limit, self.work, at_ease)

    def work(self, function):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            function()
        finally:
            with self.lock:
                self.now -= 1

    def submit(self, function, count=1):
        for _ in range(count):
            self.workers.submit(function)


def test_few_work_at_a_time_also_after_many_have_waited_outside():
    crew, go, done = Crew(16, 3), threading.Event(), []

    def wait_outside():
        with d.outside_wait():
            go.wait(20)
        done.append(1)
    crew.submit(wait_outside, 40)
    eventually(lambda: crew.workers.outside == 40)
    go.set()
    eventually(lambda: len(done) == 40)
    crew.most = 0
    crew.submit(lambda: time.sleep(0.002), 200)
    eventually(lambda: crew.workers.begun == 240 and crew.now == 0)
    assert crew.most <= 5       # 3, and what a busy machine takes for no progress
    assert (crew.workers.busy, crew.workers.outside, len(crew.workers.waiting)) == (0, 0, 0)


def test_work_that_does_not_go_on_gets_more_threads():
    crew, go, done = Crew(16, 2), threading.Event(), []
    crew.submit(lambda: go.wait(20), 5)
    crew.submit(lambda: done.append(1))
    eventually(lambda: done == [1])
    go.set()
    eventually(lambda: crew.now == 0)
    crew.submit(lambda: done.append(2))
    eventually(lambda: 2 in done and crew.workers.allowed == 2)


def test_work_that_comes_while_all_threads_stand_still_is_done(monkeypatch):
    crew, go, done = Crew(8, 2), threading.Event(), []
    crew.submit(lambda: go.wait(20), 2)
    eventually(lambda: crew.now == 2)
    time.sleep(0.1)             # nothing waits, so nobody looks after the crew
    crew.submit(lambda: done.append(1))
    eventually(lambda: done == [1], seconds=5)
    go.set()


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()], ids=["threads", "memory"])
def test_work_is_done_though_a_thread_could_not_be_started(error, monkeypatch):
    errors, start = [error], threading.Thread.start

    def failing(thread):
        if thread.name == "test" and errors:
            raise errors.pop()
        start(thread)
    monkeypatch.setattr(threading.Thread, "start", failing)
    crew, done = Crew(4), []
    crew.submit(lambda: done.append(1))
    eventually(lambda: done == [1])
    assert (errors, crew.workers.count, crew.workers.starting) == ([], 1, 0)


@pytest.fixture
def held(tmp_path, monkeypatch):
    """(a store, a connection of another process that has begun to write to its database)."""
    monkeypatch.setattr(d.Limits, "busy", 0.5)
    monkeypatch.setattr(d.Limits, "shutdown", 3)
    store = d.Store(d.Settings(str(tmp_path)), create=True)
    with contextlib.closing(sqlite3.connect(str(tmp_path / "devpi_lite.db"))) as other:
        other.execute("BEGIN IMMEDIATE")
        yield store, other
    store.close()


def outcomes(store, count):
    """(threads that write to the store, a list of what came of each and after how many seconds)."""
    found, began = [], time.monotonic()

    def write():
        try:
            store.write(lambda change: change.execute("SELECT 1"))
            found.append(("done", time.monotonic() - began))
        except d.Problem as problem:
            found.append((type(problem).__name__, time.monotonic() - began))
    threads = [threading.Thread(target=write) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, found


def test_all_who_wait_for_a_held_database_hear_it_together(held):
    store, other = held
    threads, found = outcomes(store, 12)
    for thread in threads:
        thread.join(20)
    assert [what for what, _ in found] == ["Busy"] * 12
    assert max(seconds for _, seconds in found) < 2.5       # 6 s one after the other
    other.rollback()
    assert store.write(lambda change: "goes on") == "goes on"


def test_whoever_waits_while_the_store_is_closed_is_answered(held):
    store, _ = held
    threads, found = outcomes(store, 8)
    eventually(lambda: len(store.tasks) + len(found) >= 7)
    store.close()
    for thread in threads:
        thread.join(20)
    assert [what for what, _ in found] == ["Busy"] * 8
    with pytest.raises(d.Busy):
        store.write(lambda change: None)
