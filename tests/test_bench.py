"""`make bench` fails where a target is missed, and says which."""

import os
import subprocess
import sys

import pytest

import harness

BENCH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bench", "bench.py")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the benchmark needs /proc and epoll")
def test_the_benchmark_fails_loudly_where_a_page_has_become_slow(tmp_path):
    program = harness.SOURCE.read_text(encoding="utf-8")
    place = "    def _send_ready(self, connection, ready, now):\n"
    assert program.count(place) == 1
    slow = tmp_path / "devpi_lite.py"
    slow.write_text(program.replace(place, place + "        sum(range(2000))\n"), encoding="utf-8")

    ran = subprocess.run([sys.executable, BENCH, "--quick", "--workloads", "w1", "--script", str(slow)],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=120)

    assert ran.returncode == 1, ran.stderr
    missed = [line for line in ran.stdout.splitlines() if line.startswith("  MISSED  ")]
    assert any(line.startswith("  MISSED  w1, small page, c16, CPU each, of a bare loop: ") and "has to be <= 1.75" in line
               for line in missed), ran.stdout
