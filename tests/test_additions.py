"""An option, a command, and a part of the server are each added to the program in one place.

A copy of the program gets one line in `Settings` and some above its end, and is asked everywhere.
"""

import importlib.machinery
import importlib.util
import os
import subprocess
import sys

import pytest

from harness import Server, clean_environment, eventually, extended

OPTION = '    ducks: int = option("ducks", _positive, 3, "ducks on the pond")\n'

DECLARED = '''
@command(
    "quack", "Say what ducks say.",
    argument("times", nargs="?", type=int, default=1, help="how often"),
    argument("--loud", action="store_true", help="in capitals"),
    takes=(COMMON, SERVING))
def command_quack(parsed):
    said = " ".join(["quack"] * parsed.rest.times) + f" of {parsed.settings.ducks}"
    print(said.upper() if parsed.rest.loud else said)


@command("_moult", "Internal: nobody needs to know.")
def command_moult(parsed):
    print(os.environ["DEVPISERVER_NOTHING"])
    return 7


@part
class Pond(Part):
    """What `App` has to ask for all that it does."""

    def __init__(self, app):
        self.settings, self.done = app.settings, dict.fromkeys(("recover", "clean", "tidy"), 0)
        self.swum = 0

    def loops(self):
        yield "pond", self.swim

    def swim(self):
        self.swum = 1 + (threading.current_thread().name == "pond")

    def gauges(self):
        yield Gauge("ducks", "gauge", "On the pond.", self.settings.ducks)
        yield Gauge("ducks_swum", "counter", "At all.", self.swum)
        yield Gauge("ducks_did_total", "counter", "What for.",
                    (("", {"what": f'"{name}"'}, count) for name, count in self.done.items()))

    def complaints(self):
        if self.settings.ducks > 8:
            yield Complaint("fatal", "the pond is full", ("Donald is on it",))

    def recover(self):
        self.done["recover"] += 1

    def clean(self, change):
        self.done["clean"] += isinstance(change, Change)
        raise BadRequest("it froze")

    def tidy(self):
        self.done["tidy"] += 1

    def close(self):
        print("the pond is dry")


Limits.cleaning = 0.05
_SCRYPT["n"] = 16


'''


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The path of the copy, compiled."""
    return extended(tmp_path_factory.mktemp("copy"), OPTION, DECLARED)


@pytest.fixture(scope="module")
def ponds(program):
    """The copy as a module."""
    loader = importlib.machinery.SourcelessFileLoader("ponds", program)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("ponds", loader))
    sys.modules["ponds"] = module       # dataclasses look for it there
    loader.exec_module(module)
    yield module
    del sys.modules["ponds"]


@pytest.fixture
def parse(ponds, monkeypatch):
    """parse(name of a command, *words): a Parsed."""
    for name in [name for name in os.environ if name.startswith("DEVPI")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["ponds.py"])
    return lambda name, *words: ponds.parse_options(ponds.COMMANDS[name], list(words))


@pytest.fixture(scope="module")
def server(program, tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("server"), "--ducks", "9", script=program).start()
    yield running
    if running.running:
        running.stop()


# -- an option


def test_an_option_is_known_wherever_options_come_from(parse, monkeypatch, tmp_path):
    assert [parse(name).settings.ducks for name in ("serve", "quack")] == [3, 3]
    assert parse("serve", "--ducks", "5").settings.ducks == 5
    for name, text in (("a.json", '{"devpi-server": {"ducks": 6}}'),
                       ("a.ini", "[devpi-server]\nducks = 6\n")):
        (tmp_path / name).write_text(text)
        assert parse("serve", "-c", str(tmp_path / name)).settings.ducks == 6
    monkeypatch.setenv("DEVPISERVER_DUCKS", "7")
    assert parse("serve").settings.ducks == 7
    monkeypatch.setenv("DEVPISERVER_DUKS", "7")
    with pytest.raises(SystemExit):
        parse("serve")


@pytest.mark.parametrize("words, said", [
    (("serve", "--ducks", "none"), "--ducks: "),
    (("serve", "--duks", "5"), "there is no option --duks; did you mean --ducks?"),
    (("init", "--ducks", "5"), "--ducks is an option of other commands")])
def test_a_mistake_in_an_option_is_explained(parse, capsys, words, said):
    with pytest.raises(SystemExit):
        parse(*words)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "gen-config", "quack"])
def test_an_option_is_in_the_help_of_the_commands_that_take_it(parse, capsys, command):
    with pytest.raises(SystemExit):
        parse(command, "--help")
    shown = capsys.readouterr().out
    assert "--ducks DUCKS" in shown and "ducks on the pond (default: 3)" in shown


def test_an_option_goes_into_files_for_what_runs_the_server(parse, ponds, capsys):
    for kind in ("systemd", "docker"):
        ponds.command_gen_config(parse("gen-config", kind, "--ducks", "4"))
        assert "--ducks" in capsys.readouterr().out


# -- a command


def run(program, *words, **variables):
    return subprocess.run([sys.executable, program, *words], env=clean_environment(variables),
                          capture_output=True, text=True, timeout=60)


def test_a_command_runs(program):
    done = run(program, "quack", "2", "--loud", "--ducks", "5")
    assert (done.returncode, done.stdout) == (0, "QUACK QUACK OF 5\n"), done.stderr


def test_a_hidden_command_runs_and_looks_at_no_options(program):
    done = run(program, "_moult", DEVPISERVER_NOTHING="there is no such option")
    assert (done.returncode, done.stdout) == (7, "there is no such option\n"), done.stderr


def test_a_command_is_in_the_help_and_a_hidden_one_is_not(parse, capsys):
    with pytest.raises(SystemExit):
        parse("serve", "--help")
    listed = " ".join(capsys.readouterr().out.split())
    assert "serve, promote, resync, init, passwd, gen-config, quack; without one: serve" in listed
    with pytest.raises(SystemExit):
        parse("quack", "--help")
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ponds.py quack [TIMES] [--OPTION ...]\n")
    assert all(text in shown for text in ("Say what ducks say.", "how often", "--loud"))


@pytest.mark.parametrize("words, said", [
    (("serve", "quak"), "there is no command 'quak'; did you mean quack?"),
    (("serve", "_molt"), "serve, promote, resync, init, passwd, gen-config, quack\n"),
    (("serve", "--port", "0", "quack"), "the command comes first: ponds.py quack ..."),
    (("quack", "1", "2"), "'2' is one word too many"),
    (("quack", "--lowd"), "there is no option --lowd; did you mean --loud?")])
def test_a_mistake_in_a_command_is_explained(parse, capsys, words, said):
    with pytest.raises(SystemExit):
        parse(*words)
    assert said in capsys.readouterr().err


# -- a part


def samples(server):
    return dict(line.rsplit(" ", 1) for line in server.get("/+metrics").text.splitlines()
                if line.startswith("ducks"))


def test_a_part_runs_and_is_measured(server):
    eventually(lambda: samples(server)["ducks_swum"] == "2")
    assert samples(server)["ducks"] == "9"
    assert ["ducks", "gauge", 9] in server.get("/+status").result["metrics"]
    assert "# HELP ducks On the pond.\n# TYPE ducks gauge\nducks 9\n" in server.get("/+metrics").text


def test_a_part_complains(server):
    shown = server.get("/+status").result
    assert (shown["status"], shown["messages"]) == ("fatal", ["the pond is full"])
    shown = server.get("/+status", user="root").result
    assert shown["messages"] == ["the pond is full", "Donald is on it"]


def test_a_part_is_asked_to_clean_up_whatever_fails(server):
    def counts():
        return {what: int(samples(server)['ducks_did_total{what="\\"%s\\""}' % what])
                for what in ("recover", "clean", "tidy")}
    eventually(lambda: min(counts()["clean"], counts()["tidy"]) >= 2)
    assert counts()["recover"] == 1
    assert "it froze" in server.output()


def test_a_part_is_closed_at_the_end(server):
    assert server.stop() == 0
    assert server.output().count("the pond is dry") == 1
