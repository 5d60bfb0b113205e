"""One browser for a file's tests. Where none can be had they are skipped, and the end of the run says so."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chromium import Browser, lacking  # noqa: E402


def pytest_terminal_summary(terminalreporter):
    if lacking():
        terminalreporter.write_line("NO PAGE WAS LOOKED AT: %s" % lacking())


@pytest.fixture(scope="session")
def browser():
    if lacking():
        pytest.skip("no page is looked at, %s" % lacking())
    opened = Browser()
    yield opened
    opened.close()
