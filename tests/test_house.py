"""What a reader of the two modules relies on: chapters in order, private names, widths, no doubles.

Where the code does not keep a rule yet, the exceptions are listed here. The lists and figures only
shrink: an exception that is not listed fails, and so does one that is listed and gone.
"""

import ast
import collections
import functools
import pathlib
import re
import symtable

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SERVER, CLIENT = MODULES = ("devpi_lite.py", "devpi_lite_client.py")

# {chapter: names of chapters below it that it uses}
FROM_BELOW = {SERVER: {}, CLIENT: {}}

# {chapter: private names of other chapters that it uses}
PRIVATE_ELSEWHERE = {SERVER: {}, CLIENT: {"Upload": "_in_quotes"}}

# how often the server asks an index for its type, in place of calling a method that each type has
TYPE_QUESTIONS = 10


# -- the modules


class Module:
    """A module as text.

    `chapters` are the titles under its banners, `statements` what stands at its top level.
    """

    BANNER = re.compile(r"(?m)^# =+\n# +[0-9]+  (\S.*)$")

    def __init__(self, text):
        self.lines, self.tree = text.split("\n"), ast.parse(text)
        banners = [(text.count("\n", 0, found.start()) + 1, found[1])
                   for found in self.BANNER.finditer(text)]
        self.starts = [line for line, _ in banners]
        self.chapters = ["(above the first)"] + [title for _, title in banners]
        self.statements = [Statement(self, node) for node in self.tree.body]
        self.homes = {}         # {name at the top level: number of its chapter}
        for statement in self.statements:
            for name in statement.made:
                self.homes.setdefault(name, statement.chapter)

    def chapter_at(self, line):
        """The number of the chapter that a line stands in; 0 above the first."""
        return sum(start <= line for start in self.starts)


class Statement:
    """A statement at a module's top level: its `node`, its `chapter`, what it `made` and `used`."""

    def __init__(self, module, node):
        first = min([node.lineno] + [each.lineno for each in getattr(node, "decorator_list", ())])
        self.node, self.chapter = node, module.chapter_at(first)
        text = "\n".join(module.lines[first - 1:node.end_lineno])
        table = symtable.symtable(text, "a statement", "exec")
        self.made = {symbol.get_name() for symbol in table.get_symbols()
                     if symbol.is_assigned() or symbol.is_imported()}
        self.used = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced()}
        self.used.update(self._global_in(table))

    def _global_in(self, table):
        """What functions and classes use and do not make themselves."""
        for inner in table.get_children():
            yield from (symbol.get_name() for symbol in inner.get_symbols() if symbol.is_global())
            yield from self._global_in(inner)


@functools.lru_cache(maxsize=None)
def read(name):
    return Module((ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture(params=MODULES)
def name(request):
    return request.param


@pytest.fixture
def module(name):
    return read(name)


def module_of(**chapters):
    """A small module: {title of a chapter: its code}."""
    width = "=" * 30
    return Module("import os\n\n\n" + "".join(
        "# %s\n# %2d  %s\n#\n# What it owns.\n# %s\n\n\n%s\n" % (width, number, title, width, code)
        for number, (title, code) in enumerate(chapters.items(), 1)))


def assert_as_listed(found, listed):
    """`found` are (chapter, name) pairs."""
    listed = {(chapter, name) for chapter, names in listed.items() for name in names.split()}
    faults = ["'%s' uses %s, against the rule" % pair for pair in sorted(found - listed)]
    faults += ["'%s' uses %s no longer: take it off the list" % pair
               for pair in sorted(listed - found)]
    assert not faults, "\n".join(faults)


# -- a chapter uses only names of the chapters above it


def used_from_below(module):
    return {(module.chapters[statement.chapter], name)
            for statement in module.statements for name in statement.used
            if module.homes.get(name, 0) > statement.chapter}


def test_a_chapter_uses_what_stands_above_it(name, module):
    assert len(set(module.chapters)) == len(module.chapters) > 15
    assert_as_listed(used_from_below(module), FROM_BELOW[name])


@pytest.mark.parametrize("code", [
    "def f():\n    return late()",
    "def f():\n    def g():\n        return [late() for _ in ()]\n    return g",
    "class A:\n    def m(self):\n        return late()",
    "class A(late):\n    pass",
    "class A:\n    x: late = None",
    "@late\ndef f():\n    pass",
    "def f(x=late):\n    pass",
    "def f(x: late):\n    pass",
    "X = [lambda: late]",
    "late()",
    "def f():\n    global late\n    late = 1"])
def test_a_name_from_below_is_found(code):
    late = "def late():\n    pass"
    assert used_from_below(module_of(Early=code, Late=late)) == {("Early", "late")}
    if "global" not in code:
        assert used_from_below(module_of(Early=late, Late=code)) == set()


@pytest.mark.parametrize("code", [
    "def f(late):\n    return late",
    "def f():\n    late = os.name\n    return lambda: late",
    "X = [late for late in ()]",
    "class A:\n    def late(self):\n        return self.late()",
    "def f():\n    for late in os.environ:\n        print(late)"])
def test_a_name_of_its_own_is_none_from_below(code):
    assert used_from_below(module_of(Early=code, Late="def late():\n    pass")) == set()


# -- a private name stays in its chapter


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names_elsewhere(module):
    return {(module.chapters[statement.chapter], name)
            for statement in module.statements for name in statement.used
            if is_private(name) and module.homes.get(name, statement.chapter) != statement.chapter}


def private_attributes_elsewhere(module):
    """Of other objects than `self` and `cls`. What no chapter defines is the standard library's."""
    homes = collections.defaultdict(set)        # {name: numbers of the chapters that define it}
    used = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if isinstance(node.ctx, ast.Store):
                homes[node.attr].add(module.chapter_at(node.lineno))
            if not isinstance(node.value, ast.Name) or node.value.id not in ("self", "cls"):
                used.append((node.attr, module.chapter_at(node.lineno)))
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:         # methods, fields and constants
                for name in _made_by(inner):
                    homes[name].add(module.chapter_at(inner.lineno))
    return {(module.chapters[chapter], name) for name, chapter in used
            if name in homes and chapter not in homes[name]}


def _made_by(node):
    """The names that a statement in a class makes."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = getattr(node, "targets", None) or [getattr(node, "target", ast.Pass())]
    return [inner.id for target in targets for inner in ast.walk(target)
            if isinstance(inner, ast.Name)]


def test_a_private_name_stays_in_its_chapter(name, module):
    found = private_names_elsewhere(module) | private_attributes_elsewhere(module)
    assert_as_listed(found, PRIVATE_ELSEWHERE[name])


def test_a_private_name_elsewhere_is_found():
    early = "_LIMIT = 1\n\n\ndef _ours():\n    return _LIMIT\n\n\nclass _Reader:\n    pass"
    late = "X = _LIMIT\n\n\ndef f():\n    return _ours()\n\n\nclass A(_Reader):\n    pass"
    assert private_names_elsewhere(module_of(Early=early, Late=late)) == {
        ("Late", "_LIMIT"), ("Late", "_ours"), ("Late", "_Reader")}
    assert private_names_elsewhere(module_of(Early=late, Late=early)) == {
        ("Early", "_LIMIT"), ("Early", "_ours"), ("Early", "_Reader")}
    assert private_names_elsewhere(module_of(Only=early + "\n\n\n" + late)) == set()


@pytest.mark.parametrize("definition", [
    "def _there(self):\n        pass",
    "_there = 1",
    "_there: int = 1",
    "def m(self):\n        self._there = 1",
    "def m(self):\n        self._there, self.x = 1, 2"])
def test_a_private_attribute_elsewhere_is_found(definition):
    owner, user = "class A:\n    " + definition, "def f(it):\n    return it._there or f(it)._there"
    others = "def f(it):\n    os._exit(it._replace())"
    assert private_attributes_elsewhere(module_of(Early=owner, Late=user)) == {("Late", "_there")}
    assert private_attributes_elsewhere(module_of(Early=user, Late=owner)) == {("Early", "_there")}
    assert private_attributes_elsewhere(module_of(Only=owner + "\n\n\n" + user)) == set()
    assert private_attributes_elsewhere(module_of(Early=owner, Late=others)) == set()


# -- widths


def long_lines(module):
    return [number for number, line in enumerate(module.lines, 1) if len(line) > 100]


def names_made(node):
    """What a statement defines or assigns, without the variables of comprehensions in it."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    return [each.id for target in getattr(node, "targets", ()) for each in ast.walk(target)
            if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)]


def test_a_name_is_made_in_one_place(module):
    makers = collections.Counter(
        name for statement in module.statements for name in names_made(statement.node))
    assert [name for name, count in makers.items() if count > 1] == []


def test_no_line_has_more_than_100_columns(module):
    assert long_lines(module) == []


def test_a_line_of_101_columns_is_too_long():
    module = module_of(Only="# " + "é" * 98 + "\n# " + "é" * 99)
    assert long_lines(module) == [len(module.lines) - 1]


def assert_not_above(found, known):
    assert found <= known, "more than there were: write it otherwise"
    assert found == known, "fewer than there were: lower the figure in this file"


def test_a_figure_only_falls():
    assert_not_above(2, 2)
    for found, message in [(3, "write it otherwise"), (1, "lower the figure")]:
        with pytest.raises(AssertionError, match=message):
            assert_not_above(found, 2)
    assert_as_listed({("A", "x"), ("A", "y")}, {"A": "x y"})
    for found, message in [({("A", "x"), ("A", "y"), ("B", "y")}, "'B' uses y, against the rule"),
                           ({("A", "x")}, "'A' uses y no longer")]:
        with pytest.raises(AssertionError, match=message):
            assert_as_listed(found, {"A": "x y"})


# -- an index is asked for what it can do, not for its type


def type_questions(module):
    return sum(isinstance(node, ast.Attribute) and node.attr == "is_mirror"
               for node in ast.walk(module.tree))


def test_no_more_places_ask_for_the_type_of_an_index():
    assert_not_above(type_questions(read(SERVER)), TYPE_QUESTIONS)


def test_a_question_for_the_type_is_found():
    asked = "def f(a, b):\n    return a.is_mirror or not b.base.is_mirror    # not is_mirror"
    assert type_questions(module_of(Only=asked)) == 2


# -- what is declared is declared once


def declared(module):
    """{(kind, words): how many times the module declares it}."""
    found = collections.Counter()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.update(_declared_by(module, node, node.func.id))
        elif isinstance(node, ast.Dict):
            kind = "key of the table at %d:%d" % (node.lineno, node.col_offset)
            found.update((kind, ast.dump(key)) for key in node.keys if key is not None)
        elif isinstance(node, (ast.Module, ast.ClassDef)):
            kind = "definition in " + getattr(node, "name", "the module")
            found.update((kind, inner.name) for inner in node.body
                         if isinstance(inner, (ast.FunctionDef, ast.ClassDef))
                         and not _is_setter(inner))
    return found


def _declared_by(module, call, name):
    words = [word.value for word in call.args if isinstance(word, ast.Constant)]
    aliases = [alias for keyword in call.keywords if keyword.arg == "aliases"
               for alias in _texts(keyword.value)]
    if name == "route" and words:
        told = [keyword.value.value for keyword in call.keywords
                if keyword.arg in ("query", "for_")]
        return [("route", method, words[1], *told) for method in words[0].split()]
    if name == "option" and words:
        return [("option", word) for word in ["--" + words[0], *aliases]]
    if name == "command" and words:
        arguments = [word for inner in call.args for word in _arguments(module, inner)]
        return [("command", word) for word in [words[0], *aliases]] + \
            [("argument of " + words[0], word) for word in arguments]
    return []


def _texts(node):
    return [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant)]


def _is_setter(node):
    return any(isinstance(decorator, ast.Attribute) for decorator in node.decorator_list)


def _arguments(module, node):
    """The words of what a command takes, by argument() and action(), there or in a constant."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("argument", "action"):
        return [word.value for word in node.args if isinstance(word, ast.Constant)]
    if isinstance(node, ast.Starred):
        return _arguments(module, node.value)
    if isinstance(node, ast.Tuple):
        return [word for element in node.elts for word in _arguments(module, element)]
    if isinstance(node, ast.Name):
        return [word for made in module.tree.body
                if isinstance(made, ast.Assign) and getattr(made.targets[0], "id", "") == node.id
                for word in _arguments(module, made.value)]
    return []


def more_than_once(module):
    return sorted(what for what, times in declared(module).items() if times > 1)


def test_what_is_declared_is_declared_once(name, module):
    kinds = collections.Counter(what[0].partition(" ")[0] for what in declared(module))
    least = {SERVER: {"route": 50, "option": 30, "command": 6},
             CLIENT: {"command": 25, "argument": 100}}[name]
    assert [kind for kind in least if kinds[kind] < least[kind]] == [], "declared in another way"
    assert more_than_once(module) == []


@pytest.mark.parametrize("code, twice", [
    ("@route('GET PUT', '/a', for_='people')\n@route('PUT', '/a', for_='people')\n"
     "@route('PUT', '/a', for_='json')\ndef f():\n    pass",
     ("route", "PUT", "/a", "people")),
    ("class A:\n    x = option('x', None)\n    y = option('y', None, aliases=('--x',))",
     ("option", "--x")),
    ("@command('a', 'help', aliases=('b',))\n@command('b', 'help')\ndef f():\n    pass",
     ("command", "b")),
    ("A = (argument('--all'),)\n@command('a', 'help', *A, action('-a', '--all'))\ndef f(): pass",
     ("argument of a", "--all")),
    ("A = argument('--all')\n@command('a', 'help', A, argument('--all'))\ndef f():\n    pass",
     ("argument of a", "--all")),
    ("def f():\n    pass\n\n\ndef f():\n    pass",
     ("definition in the module", "f")),
    ("class A:\n    def f(self):\n        pass\n\n    def f(self):\n        pass",
     ("definition in A", "f"))])
def test_a_second_declaration_is_found(code, twice):
    assert more_than_once(module_of(Only=code)) == [twice]


def test_a_key_twice_in_a_table_is_found():
    assert len(more_than_once(module_of(Only="A = {'a': 1, 'b': 2, 'a': 3}"))) == 1
    assert more_than_once(module_of(Only="A, B = {'a': 1, 'b': 2, **{'a': 3}}, {'a': 1}")) == []
