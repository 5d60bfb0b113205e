"""The manual in the file: it names all that there is, what it says is true, and `help` finds it."""

import functools
import os
import pathlib
import re
import shlex
import subprocess
import sys
import types
import urllib.parse

import pytest

import devpi_lite
from client import imported
from devpi_lite import COMMANDS, OPTIONS, Limits, manual_hits, manual_topic, manual_topics
from harness import PROGRAM, Server, Upstream, clean_environment, documentation, run_command, wheel

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOPICS = ("start install upload indexes search web clients ci airgap team proxies triggers migration backup replicas "
          "operation limits options commands api").split()

OF_OTHER_PROGRAMS = set(
    "--index-url --extra-index-url --trusted-host --dest --default-index --publish-url --check-url --frozen "
    "--priority --repository-url --build --index --system --shell --name --restart --now --export".split())

ADDRESS = "http://127.0.0.1:3141"

UNITS = {"": 1, "s": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def table(text, head):
    """The rows of the table with this head, as lists of cells without their backquotes."""
    _, _, rest = text.partition("| %s |\n" % " | ".join(head))
    assert rest, head
    lines = [line for line in re.match(r"(\|.*\n)+", rest)[0].splitlines()[1:]]
    return [[cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def figure(text):
    """The number that a figure with its unit means: `64 KiB`, `10,000`, `30 s`."""
    number, unit = re.fullmatch(r"([0-9,]+) ?(|s|[KMG]iB)", text).groups()
    return int(number.replace(",", "")) * UNITS[unit]


# -- what is in it


def test_the_topics_have_a_name_a_title_and_one_line():
    assert [topic.name for topic in manual_topics()] == TOPICS
    for topic in manual_topics():
        assert manual_topic(topic.name) == topic
        assert topic.title and "\n" not in topic.title and topic.summary.endswith(".") and "\n" not in topic.summary
        assert topic.text.endswith("\n") and len(topic.text) > 500


def test_there_is_no_other_topic():
    with pytest.raises(devpi_lite.NotFound, match="no topic 'cooking'"):
        manual_topic("cooking")


def test_an_ascii_terminal_shows_every_character():
    assert [topic.name for topic in manual_topics() if not (topic.title + topic.summary + topic.text).isascii()] == []


def test_blocks_of_code_are_closed_and_headings_are_below_the_title():
    for topic in manual_topics():
        parts = re.split(r"(?m)^```.*\n", topic.text)
        assert len(parts) % 2, topic.name
        headings = re.findall(r"(?m)^(#+) (.*)$", "\n".join(parts[::2]))
        assert {level for level, _ in headings} <= {"##"}, topic.name
        assert len(set(headings)) == len(headings), topic.name


def test_the_rows_of_a_table_are_as_wide_as_its_head():
    for topic in manual_topics():
        for found in re.findall(r"(?m)(?:^\|.*\n)+", topic.text):
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in found.splitlines()}
            assert len(widths) == 1, (topic.name, found)


@pytest.mark.parametrize("name", TOPICS)
def test_links_lead_to_topics(name):
    links = re.findall(r"\]\(([^)]*)\)", re.sub("`[^`]*`", "", manual_topic(name).text))
    assert [link for link in links if link not in TOPICS or link == name] == []


def test_every_topic_is_linked_to_from_the_first():
    assert set(re.findall(r"\]\(([^)]*)\)", manual_topic("start").text)) == set(TOPICS) - {"start"}


def test_every_option_has_its_variable_default_and_effect():
    text = manual_topic("options").text
    for option, default in OPTIONS.values():
        variable = "DEVPISERVER_" + option.name.upper().replace("-", "_")
        shown = "" if isinstance(default, bool) or not default and default != 0 else "`%s`" % str(default)
        spellings = ", ".join("`%s`" % spelling for spelling in ("--" + option.name, *option.aliases))
        assert "\n| %s | `%s` | %s | %s |\n" % (spellings, variable, shown, option.help) in text, option.name


def test_every_command_is_there_with_its_words():
    parts = dict(re.findall(r"(?ms)^## (.*?)\n(.*?)(?=^## |\Z)", manual_topic("commands").text))
    shown = [name for name in COMMANDS if not name.startswith("_")]
    assert list(parts) == shown and "serve" in shown and "help" in shown
    for name in shown:
        assert " ".join(COMMANDS[name].help.split()) in parts[name]
        for argument in COMMANDS[name].arguments:
            usage = argument.usage.strip().replace("|", r"\|") or argument.names[0]
            assert "\n| `%s" % usage in parts[name], (name, argument.names)
    assert "It takes [all options](options)." in parts["serve"]
    assert "It takes the [options](options) `--serverdir`, `--configfile`, `--debug`." in parts["gc"]
    assert "It takes" not in parts["help"]


DEFAULTS = {True: "yes", "intersection": "intersection", (): "none", (":ANONYMOUS:",): ":ANONYMOUS:"}


def test_every_setting_of_a_stage_is_there_with_its_default():
    text = manual_topic("indexes").text.partition("## Settings of a mirror")[0]
    rows = {name: default for name, _, default, _ in table(text, ("setting", "type", "default", "effect"))}
    assert rows.keys() == devpi_lite.STAGE_KEYS.keys()
    made = devpi_lite.index_defaults("stage", "alice")
    for name, default in rows.items():
        if name in made and name != "acl_upload":
            value = made[name]
            assert default == DEFAULTS[tuple(value) if isinstance(value, list) else value], name
        else:
            assert default == {"acl_upload": "the owner", "acl_pkg_read": "everybody", "webhook_events": "all"}.get(
                name, "none"), name


def test_every_setting_of_a_mirror_is_there_with_its_default():
    text = manual_topic("indexes").text.partition("## Settings of a mirror")[2]
    rows = {name: default for names, _, default, _ in table(text, ("setting", "type", "default", "effect"))
            for name in re.split("`, `", names)}
    assert rows.keys() == devpi_lite.MIRROR_KEYS.keys()
    assert rows["volatile"] == "yes" and devpi_lite.index_defaults("mirror", "alice")["volatile"] is True
    assert rows["mirror_cache_expiry"] == str(devpi_lite.Settings.mirror_cache_expiry)


def test_devpi_7_s_words_for_settings_are_there():
    text = manual_topic("indexes").text
    assert [key for key in devpi_lite.NEWER_KEYS if "`%s`" % key not in text] == []


def test_every_bound_is_as_it_says():
    rows = table(manual_topic("limits").text, ("what", "bound", "name"))
    assert {name: figure(bound) for _, bound, name in rows} == {name: getattr(Limits, name) for _, _, name in rows}
    assert len(rows) == 30
    defaults = {"--" + option.name: default for option, default in OPTIONS.values()}
    for _, bound, option in table(manual_topic("limits").text, ("what", "bound", "option")):
        if option == "--keep-log":
            assert (bound, str(defaults[option])) == ("64 MiB, 90 days", "64M,90d")
        else:
            assert figure(bound) == defaults[option], option


def test_every_filter_of_the_search_is_there_and_understood(site):
    rows = table(manual_topic("search").text, ("filter", "example"))
    named = [name for cell, _ in rows for name in re.findall("([a-z]+):", cell)]
    assert sorted(named) == sorted(devpi_lite._FILTERS)
    examples = [example for _, cell in rows for example in re.findall(r"(?:^|`)([a-z]+:[^`]+)(?:`|$)", cell)]
    assert len(examples) > 20
    for example in examples:
        query = devpi_lite.Query(example)
        assert query.notes == [] and isinstance(query.tree.parts[0], devpi_lite.Filter), example
        notes = site.get("/+search?query=" + urllib.parse.quote(example)).result["notes"]
        assert "says nothing" not in " ".join(notes), example
    types = set(re.findall("type:([a-z]+)", manual_topic("search").text))
    assert types == devpi_lite._TYPES.keys() - {"author_email", "maintainer", "maintainer_email"}


def test_every_event_and_key_of_webhooks_is_there():
    text = manual_topic("triggers").text
    events = [event for event, _ in table(text, ("event", "when"))]
    assert events == list(devpi_lite.webhook_events())
    keys = re.findall("[a-z0-9]+", " ".join(keys for keys, _ in table(text, ("key", "value"))))
    change = types.SimpleNamespace(actor=devpi_lite.Actor("alice"), who="alice", serial=1)
    index = devpi_lite.Index(1, "alice", "dev", {"type": "stage"})
    event = devpi_lite.Event("push", index, "thing", version="1.0", source="alice/test")
    assert set(keys) == set(devpi_lite._webhook_content(change, index, event))


def test_every_variable_of_the_client_is_there():
    text = (ROOT / "devpi_lite_client.py").read_text(encoding="utf-8")
    named = set(re.findall(r"\bDEVPI_(?:INDEX|USER|PASSWORD|CLIENTDIR)\b", text))
    assert {variable for variable, _ in table(manual_topic("ci").text, ("variable", "meaning"))} == named


# -- what it says to type


def every_text():
    """(where, text) of the README and each topic."""
    yield "README", README
    yield from ((topic.name, topic.text) for topic in manual_topics())


def lines_of_code(text):
    """The lines of blocks of shell code, those that go on joined, and code in tables."""
    blocks = re.findall(r"(?m)^    (\S.*)$", re.sub(r"(?ms)^```.*?^```$", "", text))
    blocks += [code for language, code in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", text) if language in ("", "sh")]
    for row in re.findall(r"(?m)^\|.*$", text):
        blocks += re.findall("`([^`]+)`", row)
    for block in blocks:
        yield from block.replace("\\\n", " ").splitlines()


def commands_in(line):
    """The words of each command in a line of shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    words, commands = [], []
    for word in lexer:
        if re.fullmatch("[();<>|&]+", word):
            commands.append(words)
            words = []
        elif re.match(r"\$\(.*\)$", word):
            commands += commands_in(word[2:-1])
        else:
            words.append(word)
    return [words for words in commands + [words] if words]


def shell_commands():
    """(where, words) of all commands that the README and the manual say to type, each once."""
    found = {}
    for where, text in every_text():
        for line in lines_of_code(text):
            for words in commands_in(line):
                found.setdefault(tuple(words), where)
    return [(where, words) for words, where in found.items()]


def words_after(*programs):
    """(where, words) of the commands that one of these programs runs."""
    for where, words in shell_commands():
        words = words[1:] if words[0] in ("python", "python3") else words
        if words and os.path.basename(words[0]) in programs and len(words) > 1:
            yield where, [re.sub(r"^URL\b", ADDRESS, word) for word in words[1:]]


@pytest.fixture
def no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("DEVPI")]:
        monkeypatch.delenv(name)


def test_commands_of_the_server_are_understood(no_variables):
    names = set()
    for where, words in words_after("devpi_lite.py"):
        if where == "commands":     # what a command takes is tested above
            continue
        name = next((" ".join(words[:count]) for count in (2, 1) if " ".join(words[:count]) in COMMANDS), "serve")
        parsed = devpi_lite.parse_options(COMMANDS[name], words[0 if name == "serve" else len(name.split()):])
        assert parsed.settings.serverdir, (where, words)
        names.add(name)
    assert names >= {"serve", "backup", "backup verify", "restore", "fsck", "gc", "status", "promote", "resync",
                     "import", "export", "passwd", "gen-config"}


def test_commands_of_the_client_are_understood():
    names = set()
    for where, words in words_after("devpi", "devpi_lite_client.py"):
        try:
            imported()._parse_arguments(words)
        except SystemExit as ended:
            assert ended.code == 0, (where, words)
        names.add(words[0])
    assert names >= set("use user login index upload test list push yank remove project install env completion".split())


def options_named():
    """{option: where} of all words with two dashes."""
    return {option: where for where, text in every_text()
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)}


def test_options_that_are_named_exist():
    client = imported()
    known = {"--help", *OF_OTHER_PROGRAMS}
    for option, _ in OPTIONS.values():
        known.update(("--" + option.name, *option.aliases))
    for command in [*COMMANDS.values(), *client.COMMANDS.values()]:
        known.update(name for argument in command.arguments for name in argument.names)
    known.update(name for declared in client.GENERIC for name in declared.names)
    unknown = {option: where for option, where in options_named().items() if option not in known}
    assert unknown == {}


# -- what it says to type with curl, typed


class Curl:
    """A command with curl, as a request to a server."""

    def __init__(self, words):
        self.method, self.user, self.data, self.form, self.headers, self.path = None, None, None, {}, {}, None
        words = iter(words)
        for word in words:
            if word in ("-X", "-u", "-d", "-F", "-H"):
                self.take(word, next(words))
            else:
                assert word.startswith(ADDRESS + "/"), word
                self.path = word[len(ADDRESS):]
        self.method = self.method or ("GET" if self.data is None and not self.form else "POST")

    def take(self, option, value):
        if option == "-X":
            self.method = value
        elif option == "-u":
            self.user = value.replace("PASSWORD", "secret").split(":")
        elif option == "-d":
            self.data = value
        elif option == "-F":
            name, _, text = value.partition("=")
            self.form[name] = text
        else:
            name, _, text = value.partition(": ")
            self.headers[name] = text

    def send(self, server):
        login = dict(zip(("user", "password"), self.user or ()))
        if not self.form:
            return server.request(self.method, self.path, self.data, headers=self.headers, **login)
        archives = {"@docs.zip": documentation("your-package", "1.0"),
                    "@your_package-1.0-py3-none-any.whl": wheel("your-package", "1.0")}
        archive = archives[self.form.pop("content")]
        return server.post_form(self.path.strip("/"), self.form, {"content": (archive.filename, archive.content)},
                                user=self.user[0])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A server with alice, her indexes, and root/pypi, a mirror of an upstream of its own."""
    upstream = Upstream().start()
    server = Server(tmp_path_factory.mktemp("manual") / "server").start()
    upstream.publish(wheel("your-package", "0.9"))
    server.login("root")
    server.add_mirror("root/pypi", upstream)
    server.add_user("alice", "secret")
    server.login("alice")
    yield server
    server.kill()
    upstream.stop()


def prepare(server, curl):
    """Make what a command needs, and nothing that it makes itself."""
    path = curl.path.partition("?")[0]
    if curl.method == "GET" and server.get("/alice/dev/your-package/1.0").status == 200:
        return
    if server.get("/alice").status == 404:
        server.add_user("alice", "secret")
    server.login("alice")
    for name in ("/alice/dev", "/alice/prod"):
        server.patch(name, {"volatile": True}, user="alice")
        server.delete(name, user="alice")
    server.add_index("alice/dev", bases=["root/pypi"])
    server.add_index("alice/prod", volatile=False)
    assert server.upload("alice/dev", wheel("your-package", "1.0")).status == 200
    if "/alice/prod/" in path:
        assert server.upload("alice/prod", wheel("your-package", "1.0")).status == 200
    if path == "/bob":
        server.delete("/bob", user="root")
        if curl.method != "PUT":
            server.add_user("bob")
    elif curl.method == "PUT":
        server.patch("/alice/prod", {"volatile": True}, user="alice")
        assert server.delete(path, user="alice").status < 300


def test_requests_that_are_to_be_typed_with_curl_are_taken(site):
    sent = 0
    for where, words in words_after("curl"):
        words = [word.replace("http://SERVER:3141", ADDRESS) for word in words]
        if not any(word.startswith(ADDRESS) for word in words):
            continue        # the check of the balancer
        curl = Curl(words)
        prepare(site, curl)
        taken = curl.send(site)
        assert taken.status < 400, (where, words, taken)
        sent += 1
    assert sent > 35


# -- help


@functools.lru_cache(maxsize=None)
def helped(*words):
    return run_command("help", *words)


def test_help_lists_the_topics():
    done = helped()
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall("(?m)^([a-z]+) +[A-Z]", done.stdout) == TOPICS


def test_help_prints_a_topic_as_it_is():
    done = helped("backup")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "# Backups\n\n" + manual_topic("backup").text


def test_help_shows_the_lines_with_a_word_that_is_no_topic():
    done = helped("DVD")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("airgap: On an air-gapped site\n"
                           "    A directory on read-only media (a DVD, a snapshot) is served like that by itself, and takes no\n")


def test_help_on_nonsense_lists_the_topics_and_fails():
    done = helped("nonsense", "words")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("nothing about nonsense words; the topics are\n\nstart ")
    assert re.findall("(?m)^([a-z]+) +[A-Z]", done.stderr) == TOPICS


def test_help_ends_quietly_when_its_reader_does():
    for words in ((), ("replicas",), ("the",)):
        process = subprocess.Popen([sys.executable, PROGRAM, "help", *words],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment(None))
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == (b"", 0)
        process.stderr.close()


def test_help_prints_what_an_ascii_terminal_can_show():
    done = run_command("help", "gef\u00e4hrlich", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 1 and done.stderr.startswith(r"nothing about gef\xe4hrlich; ")
    assert run_command("help", "options", env={"PYTHONIOENCODING": "ascii"}).returncode == 0


def test_help_reads_neither_the_environment_nor_a_directory(tmp_path):
    done = run_command("help", "start", env={"DEVPISERVER_NONSENSE": "1", "HOME": str(tmp_path)})
    assert done.returncode == 0 and not list(tmp_path.iterdir())


# -- search in it


def test_a_search_finds_sections_with_all_words():
    hits = manual_hits("quarantine STALENESS")
    assert [(hit.topic.name, hit.heading) for hit in hits] == [("replicas", "Replicas")]
    assert "yank or a quarantine must not come late" in hits[0].excerpt
    assert "`--max-staleness 600`" in hits[0].excerpt


def test_a_heading_counts_more_than_a_line():
    first, *others = manual_hits("upgrade")
    assert (first.topic.name, first.heading) == ("operation", "Upgrade")
    assert manual_hits("yank")[0].heading == "Yank" and len(manual_hits("yank")) > 3
    first, second, *_ = manual_hits("volatile")
    assert (first.heading, second.topic.name) == ("Volatile or not", "upload")      # which stands above it


def test_what_begins_with_a_hash_in_a_block_of_code_is_no_heading():
    hits = manual_hits("devpi-check")
    assert [(hit.topic.name, hit.heading) for hit in hits] == [("replicas", "One address for all of them")]


def test_a_search_is_bounded():
    assert manual_hits("") == manual_hits("  ") == []
    assert manual_hits("e " * 100_000) and manual_hits("x" * 100_000) == []
    assert manual_hits("e " * Limits.query_terms + "xyzzy") and manual_hits("e".ljust(Limits.query) + "xyzzy")
    assert max(hit.excerpt.count("\n") for hit in manual_hits("e")) == Limits.excerpt - 1


# -- the README


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 130 and max(map(len, lines)) <= 130


def test_the_readme_names_topics_that_exist():
    named = set(re.findall("`help ([a-z]+)`", README))
    assert named <= set(TOPICS) and len(named) > 6
    assert [path for path in re.findall(r"\]\(([^)h][^)]*)\)", README) if not (ROOT / path).exists()] == []


def test_the_readme_s_figures_are_those_of_the_table():
    whole = (ROOT / "tests" / "bench" / "README.md").read_text(encoding="utf-8")
    figures = re.findall(r"[0-9][0-9,.]*[0-9]", "".join(re.findall(r"(?m)^- .* (?:second|memory).*$", README)))
    assert len(figures) > 9
    for figure_ in figures:
        assert re.search(r"(?<![0-9,.])%s(?![0-9])" % re.escape(figure_), whole), figure_
