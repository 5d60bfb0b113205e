"""What stands in both modules, since each works alone, is the same in both."""
import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TWINS = (
    "__version__ normalize _VERSION _PRE_RELEASE parse_version canonical_version version_key same_version is_final "
    "_SPECIFIER is_specifier _specifier_parts admits _fits TEXT_FIELDS LIST_FIELDS NEWER_LIST_FIELDS FIELD_SPELLINGS "
    "_METADATA_FIELD METADATA_FIELDS parse_core_metadata _line_end is_digest public_url one_line reason_of origin_of "
    "credentials_of _in_quotes python_tag upload_kind").split()


def definitions(module):
    """{name: its definition, without comments and layout} of a module's functions and constants."""
    found = {}
    for node in ast.parse((ROOT / module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = ast.dump(node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.dump(node)
    return found


@pytest.fixture(scope="module")
def both():
    return definitions("devpi_lite.py"), definitions("devpi_lite_client.py")


@pytest.mark.parametrize("name", TWINS)
def test_what_stands_twice_is_the_same(both, name):
    server, client = both
    assert server[name] == client[name]


def test_every_twin_is_watched(both):
    server, client = both
    assert {name for name in server.keys() & client.keys() if server[name] == client[name]} == set(TWINS)
