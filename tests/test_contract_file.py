"""CONTRACT.md: the tests that it names exist, its numbers are in order, and what code and tests cite of it is there."""

import ast
import pathlib
import re

TESTS = pathlib.Path(__file__).resolve().parent
CONTRACT = (TESTS / "CONTRACT.md").read_text(encoding="utf-8")
HEADING = re.compile(r"## W([1-9][0-9]*) \S")
RULE = re.compile(r"- \*\*W([1-9][0-9]*)\.([1-9][0-9]*)\*\* \S")
NAMED_TEST = re.compile(r"`(test_\w+\.py)::(test_\w+)`")
CITATION = re.compile(r"\[(W[0-9][^\]\n]*)\]")      # one number or more, with commas between


def sections():
    """[(number of a section, its text)], in the order of the file."""
    pieces = re.split(r"(?m)^(?=## )", CONTRACT)[1:]
    assert all(HEADING.match(piece) for piece in pieces), [piece.partition("\n")[0] for piece in pieces]
    return [(int(HEADING.match(piece)[1]), piece) for piece in pieces]


def rules():
    """[((section, number), the rule's text)] of all rules, in the order of the file."""
    found = []
    for section, text in sections():
        for piece in re.split(r"(?m)^(?=- )", text)[1:]:
            rule = RULE.match(piece)
            assert rule and int(rule[1]) == section, piece.partition("\n")[0]
            found.append(((section, int(rule[2])), piece))
    return found


def functions_of(path):
    """The names of the functions of a test file."""
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def test_every_rule_names_tests_that_exist():
    assert [number for number, text in rules() if not NAMED_TEST.search(text)] == []
    named = NAMED_TEST.findall(CONTRACT)
    there = {name: functions_of(TESTS / name) if (TESTS / name).exists() else set() for name in {name for name, _ in named}}
    assert sorted({"%s::%s" % pair for pair in named if pair[1] not in there[pair[0]]}) == []
    assert len(named) == CONTRACT.count("::test_"), "one is not in backquotes, or on two lines"


def test_numbers_are_unique_and_in_order():
    numbers = [number for number, _ in sections()]
    assert numbers == sorted(set(numbers))
    numbers = [number for number, _ in rules()]
    assert numbers == sorted(set(numbers))


def test_every_citation_names_a_rule_or_a_section():
    known = {"W%d" % number for number, _ in sections()} | {"W%d.%d" % number for number, _ in rules()}
    root, wrong = TESTS.parent, []
    for path in [root / "devpi_lite.py", root / "devpi_lite_client.py", TESTS / "CONTRACT.md", *TESTS.rglob("*.py")]:
        for cited in CITATION.findall(path.read_text(encoding="utf-8")):
            wrong += ["%s: [%s]" % (path.name, cited) for one in cited.split(", ") if one not in known]
    assert wrong == []


def test_no_line_is_too_long():
    assert [line for line in CONTRACT.splitlines() if len(line) > 120] == []
