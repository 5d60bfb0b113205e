"""What lists are made of: pages of rows, and numbers in words. More of them is in tests of the pages."""

import contextlib
import sqlite3

import pytest

import devpi_lite


@pytest.mark.parametrize("count, shown, last", [(0, 0, None), (99, 99, None), (100, 100, None), (101, 100, "r099")])
def test_a_page_has_a_hundred_rows_and_knows_whether_more_follow(count, shown, last):
    rows = [("r%03d" % number, number) for number in range(count)]
    assert devpi_lite.first_page(rows) == (rows[:shown], last)
    assert devpi_lite.first_page([name for name, _ in rows], str)[1] == last


@pytest.mark.parametrize("numbers, text", [
    ((0, 0, 0), "no files"), ((1, 0, 0), "1 file"), ((2000, 1, 3), "2,000 files, 1 documentation, 3 test results"),
    ((0, 0, 1), "1 test result")])
def test_numbers_of_files_are_told_in_words(numbers, text):
    assert devpi_lite.FileNumbers(*numbers).text == text


def test_a_count_that_was_cut_says_so():
    assert devpi_lite.FileCount(0, True, 0, 0).texts == ("0", "")
    assert devpi_lite.FileCount(0, True, 4, 3 << 20).texts == ("4", "3.0 MiB")
    assert devpi_lite.FileCount(0, False, 9, 1 << 20).texts == ("more than 9", "more than 1.0 MiB")


def test_files_are_counted_as_far_as_the_time_of_a_page_suffices(tmp_path, monkeypatch):
    with contextlib.closing(devpi_lite.Store(devpi_lite.Settings(str(tmp_path)), create=True)) as store:
        def fill(change):
            change.execute("INSERT INTO users (id, name, generation, created, attributes) VALUES (1, 'a', '', '', '')")
            change.execute("INSERT INTO indexes (id, user_id, name, config) VALUES (1, 1, 'dev', '{}')")
            change.execute("INSERT INTO projects (id, index_id, name) VALUES (1, 1, 'p')")
            change.executemany(
                "INSERT INTO files (index_id, project_id, version, filename, path, hash_spec, uploaded, sha256, size) "
                "VALUES (1, 1, '', '', ?, '', '', ?, 10)", [("%04d" % number, number % 2 or None) for number in range(2500)])
        store.write(fill)

        def counted():
            found = devpi_lite.IndexCounts(store).files([STAGE]).get(1)
            return found.files, found.size, found.is_whole
        assert counted() == (1250, 12500, True)
        monkeypatch.setattr(devpi_lite.Limits, "counted", 100)
        assert counted() == (50, 500, False)
        monkeypatch.undo()
        monkeypatch.setattr(devpi_lite.Limits, "counting", -1)
        assert counted() == (500, 5000, False)


STAGE = devpi_lite.Index(1, "alice", "dev", {"type": "stage"})


@contextlib.contextmanager
def stage(projects, old_files=0):
    """The database of a stage whose projects have a file each, and `old_files` more in a release that was not the last."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.row_factory = sqlite3.Row
        devpi_lite.make_schema(db)
        db.execute("INSERT INTO users VALUES (1, 'alice', NULL, '', '', NULL, '{}')")
        db.execute("INSERT INTO indexes VALUES (1, 1, 'dev', '{}')")
        for number in range(projects):
            project_id = db.execute("INSERT INTO projects (index_id, name) VALUES (1, ?)", ("p%04d" % number,)).lastrowid
            for version, count in (("0.1", old_files), ("1.0", 1), ("1.1", 1), ("1.2", 1)):
                release_id = db.execute("INSERT INTO releases (project_id, version, metadata) VALUES (?, ?, '{}')",
                                        (project_id, version)).lastrowid
                db.executemany(
                    "INSERT INTO files (index_id, project_id, release_id, version, filename, path, hash_spec, uploaded) "
                    "VALUES (1, ?, ?, ?, ?, ?, '', '2026-11-29T00:00:00Z')",
                    [(project_id, release_id, version, "%s-%d.whl" % (version, each),
                      "+f/%d/%s-%d.whl" % (number, version, each)) for each in range(count)])
        yield db


def steps(db, read, *arguments):
    """The number of instructions that SQLite takes for a function."""
    taken = []
    db.set_progress_handler(lambda: taken.append(None), 1)
    try:
        assert read(db, *arguments)
    finally:
        db.set_progress_handler(None, 0)
    return len(taken)


def test_the_newest_uploads_to_a_project_are_found_without_those_to_others():
    def wanted(db):
        return steps(db, devpi_lite.newest_uploads, STAGE, 50, "p0001")

    with stage(3) as small, stage(1000) as large:
        assert wanted(large) < 2 * wanted(small)
        assert [upload.version for upload in devpi_lite.newest_uploads(large, STAGE, 50, "p0001")] == ["1.2", "1.1", "1.0"]


@pytest.mark.parametrize("read, arguments", [
    (devpi_lite.project_lines, [[("p0000", 1), ("p0001", 2)]]), (devpi_lite.attached_to, [STAGE, "p0001"])])
def test_the_files_of_old_releases_cost_a_list_nothing(read, arguments):
    with stage(2) as small, stage(2, old_files=1000) as large:
        assert steps(large, read, *arguments) < 2 * steps(small, read, *arguments)
