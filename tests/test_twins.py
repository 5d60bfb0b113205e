"""What stands in both modules, since each works alone, is the same in both."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SERVER, CLIENT = "devpi_lite.py", "devpi_lite_client.py"

TWINS = (
    # versions and specifiers
    "__version__ normalize _VERSION _PRE_RELEASE parse_version canonical_version version_key "
    "same_version is_final _SPECIFIER is_specifier _specifier_parts _COMPARISONS admits _fits "
    # core metadata
    "TEXT_FIELDS LIST_FIELDS NEWER_LIST_FIELDS FIELD_SPELLINGS _METADATA_FIELD METADATA_FIELDS "
    "parse_core_metadata _line_end "
    # digests, URLs, texts, kinds of files
    "_digest_length is_digest public_url origin_of credentials_of one_line reason_of _in_quotes "
    "python_tag upload_kind").split()

# The same word for what each module does in its own way; an empty table may look alike.
NAMESAKES = (
    "Argument Command Identity Progress Refused Release Requirement Response Unreachable UploadForm action argument command "
    "is_loopback log_in main parse_requirement push_release releases_of write_private _TOKEN _form_fields _is_inside "
    "_push_target _tar_metadata _tar_number _tar_text _zip_metadata").split()


def definitions(text):
    """{name: its definition, without comments and layout} of a module's functions and constants.

    A function may import what it needs itself: a module that starts often puts that off.
    """
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            node.body = [inner for inner in node.body if not isinstance(inner, ast.Import)]
            found[node.name] = ast.dump(node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.dump(node)
    return found


@pytest.fixture(scope="module")
def both():
    return [definitions((ROOT / name).read_text(encoding="utf-8")) for name in (SERVER, CLIENT)]


@pytest.mark.parametrize("name", TWINS)
def test_what_stands_twice_is_the_same(both, name):
    server, client = both
    assert server[name] == client[name]


def test_every_twin_is_watched(both):
    server, client = both
    same = {name for name in server.keys() & client.keys() if server[name] == client[name]}
    assert same - set(NAMESAKES) == set(TWINS)


def test_a_name_that_both_define_is_a_twin_or_known_to_differ(both):
    server, client = both
    assert server.keys() & client.keys() == set(TWINS) | set(NAMESAKES)


def test_layout_and_a_late_import_make_no_difference_and_all_else_does():
    text = "import re\ndef f(x):\n    '''Says it.'''\n    return [x,\n  1]  # why\n\n\nN = (1, 2)"
    late = "def f(x):\n  '''Says it.'''\n  import re\n  return [x, 1]\nN = (1,\n     2)"
    assert definitions(text) == definitions(late) and set(definitions(text)) == {"f", "N"}
    for old, new in [("it.", "that."), ("[x", "[-x"), ("(1, 2)", "(1, 3)")]:
        assert definitions(text.replace(old, new)) != definitions(text)
