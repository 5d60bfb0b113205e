"""One browser for a file's tests. Without one they are skipped, on a build machine (CI=true) the run fails."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chromium import Browser, lacking  # noqa: E402


def pytest_sessionstart(session):
    if lacking() and os.environ.get("CI") == "true":
        pytest.exit("no page was looked at, %s" % lacking(), returncode=4)


@pytest.fixture(scope="session")
def browser():
    if lacking():
        pytest.skip("no page is looked at, %s" % lacking())
    opened = Browser()
    yield opened
    opened.close()
