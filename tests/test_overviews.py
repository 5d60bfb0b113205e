"""What lists are made of: pages of rows, and numbers in words. More of them is in tests of the pages."""

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
    most = devpi_lite.Limits.counted
    assert devpi_lite.FileCount(0, 5, 0, 0).texts == ("0", "")
    assert devpi_lite.FileCount(0, 5, 4, 3 << 20).texts == ("4", "3.0 MiB")
    assert devpi_lite.FileCount(0, most, 9, 1 << 20).texts == ("more than 9", "more than 1.0 MiB")
