"""What test results say, whatever their JSON holds."""

import json

import pytest

import devpi_lite


def run_of(*environments, **more):
    """The JSON of a test result; an environment is (exit codes of its setup, of its tests)."""
    return dict(more, testenvs={
        "env%d" % number: {part: [{"command": [part], "retcode": code} for code in codes]
                           for part, codes in (("setup", setup), ("test", test))}
        for number, (setup, test) in enumerate(environments)})


@pytest.mark.parametrize("environments, passed", [
    ([("0", "0")], True), ([("", "0")], True), ([("0", "01")], False), ([("1", "0")], False), ([("1", "")], False),
    ([("0", "")], None), ([], None), ([("0", "0"), ("0", "0")], True), ([("0", "0"), ("0", "")], None),
    ([("0", ""), ("0", "2")], False)])
def test_a_run_passed_if_no_command_failed_and_every_environment_has_tests(environments, passed):
    assert devpi_lite.parse_test_run(run_of(*environments)).passed is passed


def test_a_run_tells_its_host_its_environments_and_their_commands():
    run = devpi_lite.parse_test_run({"host": "ci", "platform": "linux", "testenvs": {"py": {
        "python": {"version": "3.11.7 (main, Dec)"},
        "setup": [{"command": ["pip", "install", "."], "retcode": 0, "output": "done"}],
        "test": [{"command": "pytest", "retcode": "1"}]}}})
    (outcome,) = run.outcomes
    assert (run.host, run.platform, outcome.environment, outcome.python) == ("ci", "linux", "py", "3.11.7")
    assert (outcome.setup, outcome.test, outcome.passed) == (True, False, False)
    assert outcome.commands == (("setup", ("pip install .", True, "0", "done")), ("test", ("pytest", False, "1", "")))


def test_what_tox_4_runs_to_build_counts_for_nothing_and_no_exit_code_is_no_failure():
    backend = [{"command": ["_optional_hooks"], "retcode": None}, {"command": ["freeze"]}]
    run = devpi_lite.parse_test_run({"testenvs": {
        "py": {"setup": backend, "test": [{"command": ["pytest"], "retcode": 0}]},
        ".pkg_external": {"setup": [{"command": ["freeze"], "retcode": 1}]}, ".pkg": {}}})
    assert [outcome.environment for outcome in run.outcomes] == ["py"] and run.passed is True
    assert [command.exit_code for _, command in run.outcomes[0].commands] == ["", "", "0"]


@pytest.mark.parametrize("content", [
    None, 5, [], "x", {}, {"testenvs": 5}, {"testenvs": []}, {"testenvs": {"a": 5, "b": None}},
    {"testenvs": None, "host": None}])
def test_what_does_not_fit_is_left_out(content):
    assert devpi_lite.parse_test_run(content) == ("", "", ())


@pytest.mark.parametrize("about", [
    {"python": 5, "setup": 5, "test": {}}, {"python": {"version": None}, "setup": [5, None], "test": "x"}, {}])
def test_an_odd_environment_has_no_commands(about):
    assert devpi_lite.parse_test_run({"testenvs": {"odd": about}}).outcomes == (("odd", "", None, None, ()),)


def test_a_result_that_is_not_here_is_too_large_or_is_no_json_is_not_read(tmp_path):
    blobs = devpi_lite.Blobs(str(tmp_path), False)

    def read(content):
        with blobs.incoming() as incoming:
            incoming.write(content)
            stored = devpi_lite.StoredResult(incoming.keep(), len(content))
        return devpi_lite.read_test_run(blobs, stored)

    assert read(json.dumps(run_of(("0", "0"))).encode()).passed is True
    for content in (b"{", b"\xff", b"[" * 100000, b'{"x": ' + b"9" * 10000 + b"}"):
        assert read(content) is None
    assert read(b" " * devpi_lite.Limits.shown_result + b"{}") is None
    assert devpi_lite.read_test_run(blobs, devpi_lite.StoredResult("0" * 64, 5)) is None
    assert devpi_lite.read_test_run(blobs, devpi_lite.StoredResult(None, 5)) is None
