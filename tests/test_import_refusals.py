"""Dumps that are wrong, cut or hostile: each is refused by a sentence that says where, and nothing is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import devpi_lite
from dumps import WHEN, Dump, assert_nothing, import_here, rows, run_import, small
from harness import clean_environment, patched, run_command


@pytest.fixture
def dump(tmp_path):
    return Dump(tmp_path / "dump")


@pytest.fixture
def target(tmp_path, monkeypatch):
    monkeypatch.setitem(devpi_lite._SCRYPT, "n", 16)
    return tmp_path / "server"


def assert_refused(result, target, *words):
    assert result.returncode == 1, result
    assert "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("fatal: ")]) == 1, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    assert_nothing(target)


# -- dataindex.json that is none -------------------------------------------------------------------


@pytest.mark.parametrize("text, words", [
    ("", ["cut"]),
    ("[]", ["{ was expected"]),
    ("nothing", ["{ was expected"]),
    ('{"dumpversion": "2"', ["cut"]),
    ('{"dumpversion": "2", "users": {"root": {"pwhash": "x', ["users/root", "cut"]),
    ('{"dumpversion": "2", "users": {}, "indexes": {}} {}', ["more text after its end"]),
    ('{"dumpversion": "2", "dumpversion": "2", "users": {}, "indexes": {}}', ["dumpversion", "twice"]),
    ('{"users": {}, "indexes": {}}', ["dumpversion", "missing"]),
    ('{"dumpversion": "4", "users": {}, "indexes": {}}', ["4", "1, 2 and 3 are known"]),
    ('{"dumpversion": true, "users": {}, "indexes": {}}', ["1, 2 and 3 are known"]),
    ('{"dumpversion": "2", "indexes": {}}', ["no users"]),
    ('{"dumpversion": "2", "users": {"root": {}}}', ["no indexes"]),
    ('{"dumpversion": "2", "users": [], "indexes": {}}', ["users", "an object was expected, not a list"]),
    ('{"dumpversion": "2", "users": {"root": 5}, "indexes": {}}', ["users/root", "not a number"]),
    ('{"dumpversion": "2", "users": {"root": {}, "root": {}}, "indexes": {}}', ["users/root", "twice"]),
    ('{"dumpversion": "2", "users": {"root": {"email": NaN}}, "indexes": {}}', ["users/root", "NaN"]),
    ('{"dumpversion": "2", "users": {"root": {"custom_data": 1e999}}, "indexes": {}}', ["users/root", "too large"]),
    ('{"dumpversion": "2", "users": {"root": {"custom_data": %s}}, "indexes": {}}' % ("9" * 5000),
     ["users/root", "digits"]),
    ('{"dumpversion": "2", "users": {"root": {"title": "\\ud800"}}, "indexes": {}}', ["users/root", "surrogate"]),
    ('{"dumpversion": "2", "users": {"root": {"custom_data": %s1%s}}, "indexes": {}}' % ("[" * 200, "]" * 200),
     ["users/root", "nested too deeply"]),
    ('{"dumpversion": "2", "users": {"root": {"custom_data": %s' % ("[" * 3000000), ["users/root"]),
    (b'{"dumpversion": "2", "users": {"r\xff": {}}, "indexes": {}}', ["not UTF-8"]),
    ('{"dumpversion": "2", "users": {"root": {}}, "indexes": {"root/x" {}}}', ["indexes", ": was expected"]),
    ('{"dumpversion": "2", "users": {"root": {}}, "indexes": {"root/x": {"files": [}}}',
     ["indexes/root/x/files/0"])])
def test_a_dump_that_is_no_json_or_no_dump_is_refused(dump, target, text, words):
    dump.write(text)
    assert_refused(import_here(dump.folder, target), target, *words)


@pytest.mark.parametrize("text, place", [
    ('{\n"users": {,\n"root": {}}}', "line 2, users: a key was expected"),
    ('{\n"users": {\n"root": {}\n"mira": {}}}', "line 4, users: , or } was expected"),
    ('{"users": {\n"root": {"email":\n"x",\n"title": y, "custom_data": "%s"}}}' % ("x" * 40), "line 4, users/root: no JSON"),
    ("{%s5}" % ("\n" * 200000), "line 200,001: a key was expected")])
def test_what_is_no_json_is_found_by_its_line(dump, target, monkeypatch, text, place):
    monkeypatch.setattr(devpi_lite.Limits, "dump_piece", 1000)
    dump.write(text)
    assert_refused(import_here(dump.folder, target), target, f"fatal: dataindex.json, {place}")


def test_a_folder_without_a_dump_is_refused(tmp_path, target):
    assert_refused(run_import(tmp_path / "nowhere", target), target, "dataindex.json")
    (tmp_path / "empty").mkdir()
    assert_refused(run_import(tmp_path / "empty", target), target, "dataindex.json")
    (tmp_path / "empty" / "dataindex.json").symlink_to(tmp_path / "else")
    assert_refused(run_import(tmp_path / "empty", target), target, "dataindex.json")


def test_a_linked_list_is_refused(dump, target, tmp_path):
    dump.write()
    (dump.folder / "dataindex.json").rename(tmp_path / "else.json")
    (dump.folder / "dataindex.json").symlink_to(tmp_path / "else.json")
    assert_refused(run_import(dump.folder, target), target, "no plain file")


def test_a_value_may_be_large_but_not_without_a_bound(dump, target, tmp_path, monkeypatch):
    monkeypatch.setattr(devpi_lite.Limits, "dump_piece", 1 << 10)
    dump.add(small())
    dump.index()["projects"]["lantern"]["1.0"]["description"] = "\u6d77" * 50000
    assert dump.imported_here(target).returncode == 0
    assert rows(target, "SELECT readme_size FROM releases")[0][0] > 300000
    monkeypatch.setattr(devpi_lite.Limits, "dump_value", 1 << 16)
    assert_refused(import_here(dump.folder, tmp_path / "b"), tmp_path / "b",
                   "indexes/mira/dev/projects/lantern/1.0", "a value of more than 0 MiB")
    monkeypatch.setattr(devpi_lite.Limits, "dump_values", 1000)
    dump.data["users"]["mira"]["custom_data"] = [[]] * 5000
    assert_refused(dump.imported_here(tmp_path / "c"), tmp_path / "c", "users/mira", "more than 1000 values")


# -- what it says ----------------------------------------------------------------------------------


def change_user(key, value):
    return lambda dump: dump.data["users"]["mira"].update({key: value})


def rename_user(name):
    def change(dump):
        dump.data["users"][name] = dict(dump.data["users"]["mira"], username=name)
    return change


def add_index(path, **config):
    return lambda dump: dump.add_index(path, **config)


def configure(**config):
    return lambda dump: dump.index()["indexconfig"].update(config)


def change_release(**metadata):
    return lambda dump: dump.index()["projects"]["lantern"]["1.0"].update(metadata)


def change_file(**entry):
    return lambda dump: dump.index()["files"][0].update(entry)


def change_mapping(**mapping):
    return lambda dump: dump.index()["files"][0]["entrymapping"].update(mapping)


def without(*path):
    def change(dump):
        inner = dump.data
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
    return change


def several(*changes):
    def change(dump):
        for each in changes:
            each(dump)
    return change


@pytest.mark.parametrize("change, words", [
    (rename_user(".."), ["users/..", "not allowed"]),
    (rename_user("."), ["users/.", "not allowed"]),
    (rename_user("a/b"), ["users/a/b", "aren't allowed"]),
    (rename_user("a\n"), ["aren't allowed"]),
    (rename_user(""), ["aren't allowed"]),
    (change_user("created", 5), ["users/mira/created", "no time"]),
    (add_index("mira/.."), ["indexes/mira/..", "not allowed"]),
    (add_index("mira/a b"), ["indexes/mira/a b", "aren't allowed"]),
    (add_index("mira"), ["indexes/mira", "user/index"]),
    (add_index("nobody/dev"), ["nobody", "no user"]),
    (add_index("mira/x", type="constrained"), ["indexes/mira/x", "unknown index type 'constrained'", "--skip-import-type"]),
    (add_index("mira/x", type=["stage"]), ["indexes/mira/x", "unknown index type"]),
    (add_index("mira/a", bases=["mira/b"]), []),
    (configure(bases=["mira/dev/x"]), ["indexes/mira/dev/indexconfig/bases", "user/index"]),
    (configure(bases="mira/../x"), ["bases"]),
    (configure(volatile="maybe"), ["indexes/mira/dev/indexconfig/volatile", "maybe"]),
    (configure(acl_upload={"mira": 1}), ["indexes/mira/dev/indexconfig/acl_upload"]),
    (configure(mirror_whitelist_inheritance="Both"), ["mirror_whitelist_inheritance", "Both"]),
    (configure(project_inheritance_rules=["allow some"]), ["project_inheritance_rules", "allow some"]),
    (several(add_index("mira/a", bases=["mira/b"]), add_index("mira/b", bases=["mira/c"]),
             add_index("mira/c", bases=["mira/a", "mira/dev"])), ["circle of bases", "mira/a", "mira/b", "mira/c"]),
    (without("indexes", "mira/dev", "indexconfig"), ["indexes/mira/dev/indexconfig", "missing"]),
    (lambda dump: dump.data["indexes"].update({"mira/x": []}), ["indexes/mira/x", "an object was expected"]),
    (lambda dump: dump.index().update(projects=[1]), ["indexes/mira/dev/projects", "an object was expected"]),
    (lambda dump: dump.index().update(files={}), ["indexes/mira/dev/files", "a list was expected"]),
    (lambda dump: dump.index()["files"].append(7), ["indexes/mira/dev/files/1", "an object was expected"]),
    (lambda dump: dump.index()["projects"].update({"..": {}}), ["projects/..", "no name of a project"]),
    (lambda dump: dump.index()["projects"]["lantern"].update({"../1": {}}), ["no version"]),
    (lambda dump: dump.index()["projects"]["lantern"].update({"2.0": None}), ["lantern/2.0", "not null"]),
    (lambda dump: dump.index()["projects"].update({"Lantern": {"1.0": {}}}), ["projects/Lantern/1.0", "twice"]),
    (change_release(name="other"), ["projects/lantern/1.0/name", "another project"]),
    (change_release(summary={"a": 1}), ["projects/lantern/1.0/summary", "a text was expected"]),
    (change_release(classifiers=[1]), ["projects/lantern/1.0/classifiers", "a list of texts"]),
    (change_release(**{"+elinks": []}), ["projects/lantern/1.0/+elinks"]),
    (change_file(type="else"), ["files/0", "'else'"]),
    (change_file(type=["releasefile"]), ["files/0"]),
    (change_file(projectname=None), ["files/0", "projectname"]),
    (change_file(projectname="else"), ["files/0", "else is not among the projects"]),
    (change_file(version="7.7"), ["files/0", "no release 7.7"]),
    (change_file(entrymapping=None), ["files/0", "entrymapping", "missing"]),
    (change_file(entrymapping=[]), ["files/0", "entrymapping"]),
    (change_file(log="x"), ["files/0", "log"]),
    (change_file(log=[{"what": "upload", "when": [1, 2]}]), ["files/0", "when"]),
    (change_file(type="toxresult"), ["for_entrypath"]),
    (change_file(type="toxresult", for_entrypath="mira/dev/+f/a/b/none.whl"), ["none.whl"]),
    (change_mapping(last_modified="last summer"), ["files/0", "last_modified", "last summer"]),
    (change_mapping(last_modified=5), ["files/0", "last_modified"]),
    (change_mapping(last_modified="2026-13-40T99:00:00Z"), ["files/0", "last_modified"]),
    (change_mapping(hashes={"sha256": "xyz"}), ["files/0", "xyz"]),
    (change_mapping(hashes={"sha256": "0" * 64}), ["files/0", "hash_spec"]),
    (change_mapping(hashes={"sha256": "0" * 64}, hash_spec=None), ["files/0", "sha256 mismatch"]),
    (change_mapping(hashes={}, hash_spec="md5=" + "0" * 32), ["files/0", "md5 mismatch"]),
    (change_mapping(hashes={}, hash_spec="nothing=00"), ["files/0", "nothing=00"]),
    (change_mapping(hashes=[]), ["files/0", "hashes"]),
    (change_mapping(md5="00"), ["files/0", "md5=00"]),
    (change_mapping(size=-1), ["files/0", "size"]),
    (change_mapping(size=7), ["files/0", "bytes, not 7"]),
    (lambda dump: os.unlink(dump.folder / dump.index()["files"][0]["relpath"]), ["files/0", "is missing"]),
    (lambda dump: dump.index()["files"].append(dump.index()["files"][0]), ["files/1", "twice"])])
def test_what_is_wrong_is_named_with_its_place(dump, target, change, words):
    dump.add(small())
    change(dump)
    result = dump.imported_here(target)
    if not words:       # a missing base is only told
        assert result.returncode == 0 and "mira/b of mira/a does not exist" in result.stderr, result
        return
    assert_refused(result, target, *words)


@pytest.mark.parametrize("relpath", [
    "../outside", "mira/../../outside", "/etc/passwd", "", ".", "mira//x", "mira/./x", "mira\\..\\x", "a\0b", "a\nb",
    "x/" * 3000 + "y", None, 5])
def test_paths_that_lead_out_of_the_dump_are_refused(dump, target, relpath):
    dump.add(small())["relpath"] = relpath
    (dump.folder.parent / "outside").write_bytes(small().content)
    assert_refused(dump.imported_here(target), target, "files/0/relpath", "no path below the dump")


@pytest.mark.parametrize("place", ["file", "folder", "folder of folders"])
def test_links_in_a_dump_are_not_followed(dump, target, tmp_path, place):
    entry = dump.add(small())
    path = dump.folder / entry["relpath"]
    moved = path if place == "file" else path.parent if place == "folder" else path.parent.parent
    moved.rename(tmp_path / "elsewhere")
    moved.symlink_to(tmp_path / "elsewhere")
    assert_refused(dump.imported_here(target), target, "files/0", "no plain file" if place == "file" else "symbolic link")


def test_a_path_of_very_many_folders_is_refused(dump, target):
    dump.add(small())["relpath"] = "a/" * 1900 + "x"
    assert_refused(dump.imported_here(target), target, "files/0", "the file is missing")


def test_an_index_that_is_there_twice_is_read_to_its_end(dump, target):
    dump.add(small())
    text = json.dumps(dump.data)
    twice = text.replace('"indexes": {', '"indexes": {"mira/dev": %s, ' % json.dumps(dump.index()))
    dump.write(twice)
    assert_refused(import_here(dump.folder, target), target, "error: indexes/mira/dev/: the index is there twice", "1 error")


@pytest.mark.parametrize("change", [
    lambda dump: dump.index()["indexconfig"].update(title="x" * (257 << 10)),
    lambda dump: dump.index()["indexconfig"].update(unknown=[[]] * 20000),
    lambda dump: dump.data["users"]["mira"].update(title="x" * (257 << 10)),
    lambda dump: dump.data["users"]["mira"].update(tokens=[[]] * 20000)])
def test_what_makes_lists_of_all_huge_is_refused(dump, target, change):
    change(dump)
    assert_refused(dump.imported_here(target), target, "the attributes of a")


@pytest.mark.parametrize("place", ["index", "whole"])
def test_keys_that_nobody_knows_have_a_bound(dump, target, place):
    (dump.index() if place == "index" else dump.data).update(("k%d" % number, 5) for number in range(1100))
    assert_refused(dump.imported_here(target), target, "more unknown keys than any dump has")


def test_kinds_of_rows_that_nobody_knows_are_counted_together(dump, target):
    dump.data["devpi_lite"] = {"rows": [["k%d" % number, [], {}] for number in range(500)]}
    result = dump.imported_here(target)
    assert result.returncode == 0 and "480 rows of the kind others" in result.stderr
    assert len(result.stderr.splitlines()) < 30


def test_orders_of_very_many_bases_are_not_compared_at_all_costs(dump, target, monkeypatch):
    dump.data["dumpversion"] = "3"
    for number in range(60):
        dump.add_index("mira/i%d" % number, bases=["mira/i%d" % base for base in range(number)])
    monkeypatch.setattr(devpi_lite.Limits, "dump_orders", 1000)
    result = dump.imported_here(target)
    assert result.returncode == 0 and "are not compared with devpi 7's" in result.stderr


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_plain_file_is_refused(dump, target, make):
    path = dump.folder / dump.add(small())["relpath"]
    path.unlink()
    make(path)
    assert_refused(dump.imported_here(target), target, "no plain file")


def test_all_errors_are_listed_and_counted(dump, target):
    for number in range(150):
        dump.register("p%d" % number, "1.0", summary={})
    dump.data["users"]["mira"]["created"] = 7
    result = dump.imported(target)
    assert_refused(result, target, "151 errors", "and 51 more")
    assert len(re.findall("(?m)^error: ", result.stderr)) == 100


def test_wrong_bytes_of_several_files_are_all_named(dump, target):
    for number in range(3):
        entry = dump.add(small("1.%d" % number))
        (dump.folder / entry["relpath"]).write_bytes(b"else")
    assert_refused(dump.imported(target), target, "3 errors", "files/0", "files/1", "files/2", "sha256 mismatch")


@pytest.mark.parametrize("own, words", [
    ({"rows": [["user", ["eve"], {"pwhash": None}]]}, None),
    ({"rows": [["gone", [1], {}]]}, ["devpi_lite/rows"]),
    ({"rows": [["withdrawn", ["mira/dev", "releasefile", "x"], {"sha256": [], "kept": {}}]]}, ["devpi_lite/rows"]),
    ({"rows": [["withdrawn", ["mira/dev", "releasefile", "x"], {"sha256": 10 ** 30, "kept": 1}]]}, ["devpi_lite/rows"]),
    ({"rows": [["withdrawn", ["mira/dev", "releasefile", "x"], {"sha256": "0" * 64, "kept": 10 ** 30}]]}, [
        "devpi_lite/rows"]),
    ({"releases": {"mira/dev": {"lantern": {"1.0": {"name": 5}}}}}, ["devpi_lite/releases/mira/dev/lantern/1.0"]),
    ({"releases": {"mira/dev": {"lantern": {"1.0": {"summary": "x"}}}}}, ["devpi_lite/releases/mira/dev/lantern/1.0"]),
    ({"rows": ["x"]}, ["devpi_lite/rows"]),
    ({"rows": {}}, ["devpi_lite/rows", "a list was expected"]),
    ({"users": {"mira": {"pwhash": "plain"}}}, ["devpi_lite/users/mira"]),
    ({"users": {"mira": {"pwhash": ["scrypt"]}}}, ["devpi_lite/users/mira"]),
    *(({"users": {"mira": {"pwhash": cost + ":" + "00" * 16 + ":" + "00" * 32}}}, ["devpi_lite/users/mira"]) for cost in (
        "scrypt:n=9999999,r=8,p=1", "scrypt:n=4194304,r=8,p=1", "scrypt:n=32768,r=8,p=99", "scrypt:n=16,r=0,p=1",
        "scrypt:n=1,r=8,p=1", "scrypt:n=16,r=8,p=0", "pbkdf2_sha256:9999999", "pbkdf2_sha256:0")),
    ({"users": {"mira": 5}}, ["devpi_lite/users/mira"]),
    ({"indexes": {"mira/dev": {"webhook_url": ["ftp://x"]}}}, ["webhook_url"]),
    ({"projects": {"mira/dev": {"lantern": {"status": "odd"}}}}, ["devpi_lite/projects/mira/dev/lantern"]),
    ({"projects": {"mira/dev": {"lantern": {"status": []}}}}, ["devpi_lite/projects/mira/dev/lantern"]),
    ({"projects": []}, ["devpi_lite/projects"]),
    (5, ["devpi_lite"])])
def test_what_an_export_of_ours_adds_is_checked_too(dump, target, own, words):
    dump.add(small())
    dump.data["devpi_lite"] = own
    result = dump.imported_here(target)
    if words is None:       # rows of other kinds are not taken in this way
        assert result.returncode == 0 and "1 rows of the kind user" in result.stderr
        assert rows(target, "SELECT name FROM users WHERE name = 'eve'") == []
        return
    assert_refused(result, target, *words)


@pytest.mark.parametrize("own", [
    [], {"uploaded": "yesterday"}, {"uploaded": 5}, {"yanked": []}, {"yanked": "a\0"}, {"first_seen": "x"},
    {"history": 5}, {"attestations": {}}, {"path": "../../x"}, {"requires_python": 3},
    {"uploaded": "Sat, 28 Nov 2026 13:00:00 Z"}, {"uploaded": "2026-11-28T13:00:00+00:00Z"},
    {"last_modified": "now\r\nSet-Cookie: a=b"}, {"last_modified": "n\u00f4w"}, {"last_modified": "x" * 200},
    {"history": [{"what": "upload", "when": WHEN, "dst": 5}]}])
def test_what_it_adds_to_a_file_is_checked_too(dump, target, own):
    dump.add(small(), devpi_lite=own)
    assert_refused(dump.imported_here(target), target, "files/0", "devpi_lite")


@pytest.mark.parametrize("key, value", [
    ("what", 5), ("who", {"name": "mira"}), ("who", 5), ("dst", 5), ("dst", ["mira/dev"]), ("src", {}), ("src", True),
    ("count", "2"), ("count", -1), ("count", 10 ** 30), ("message", []), ("else", {"a": {}}),
    ("when", [2026, 13, 1, 0, 0, 0]), ("when", [0] * 6), ("when", [2026, 11, 28, 13, 0, 0.5]), ("when", 5)])
def test_an_entry_of_a_history_with_another_form_is_refused(dump, target, key, value):
    dump.add(small(), log=[{"what": "overwrite", "who": None, "when": WHEN, "dst": "mira/dev", **{key: value}}])
    assert_refused(dump.imported_here(target), target, "files/0", "log")


# -- where it goes ---------------------------------------------------------------------------------


def test_a_directory_that_holds_something_is_refused(dump, target):
    target.mkdir()
    (target / "note").write_text("mine")
    result = dump.imported(target)
    assert result.returncode == 1 and "not empty" in result.stderr
    assert os.listdir(target) == ["note"]
    assert dump.imported(target.parent / "new").returncode == 0
    result = dump.imported(target.parent / "new")
    assert result.returncode == 1 and "not empty" in result.stderr


def test_dump_and_server_directory_do_not_lie_in_each_other(dump):
    for target in (dump.folder / "server", dump.folder):
        result = dump.imported_here(target)
        assert result.returncode == 1 and "must not lie in each other" in result.stderr
    assert os.listdir(dump.folder) == ["dataindex.json"]


def test_a_failed_import_can_be_run_again(dump, target):
    path = dump.folder / dump.add(small())["relpath"]
    path.write_bytes(b"else")
    assert_refused(dump.imported(target), target, "mismatch")
    path.write_bytes(small().content)
    assert dump.imported(target).returncode == 0


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("children", [False, True])
def test_an_import_that_is_cut_off_can_be_run_again(dump, target, tmp_path, sign, children):
    for number in range(30):
        dump.add(small("1.%d" % number))
    dump.write()
    mark = tmp_path / "reached"
    script = patched(tmp_path, "\n".join([
        "import time, pathlib",
        "take = devpi_lite.take_dumped",
        "def slow(intake, job):",
        "    pathlib.Path(%r).touch()" % str(mark),
        "    time.sleep(0.05)",
        "    return take(intake, job)",
        "devpi_lite.take_dumped = slow",
        "devpi_lite.PROGRAM = sys.argv[0]",
        "devpi_lite.Limits.taken_here = %d" % (1 if children else 1000)]))
    process = subprocess.Popen(
        [sys.executable, str(script), "import", str(dump.folder), "--serverdir", str(target)], env=clean_environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while not mark.exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(sign)
    assert process.wait(30) != 0
    error = process.stderr.read().decode()
    process.stderr.close()
    assert "Traceback" not in error
    if sign == signal.SIGINT:
        assert "the import was stopped: nothing was imported" in error
        assert_nothing(target)
    else:
        result = run_command("--serverdir", target, "--port", "0")
        assert result.returncode == 1 and "cut off" in result.stderr
    assert run_import(dump.folder, target).returncode == 0
    assert rows(target, "SELECT count(*) FROM files") == [(30,)]
    assert list((target / "tmp").iterdir()) == []


# -- what is no dump at all ------------------------------------------------------------------------


@pytest.mark.parametrize("name, words", [
    (".nodeinfo", "is the directory of a devpi-server: `devpi-export --serverdir "),
    ("devpi_lite.db", "is a server directory: `export DUMP --serverdir "),
    ("else", "it has no dataindex.json")])
def test_what_is_no_dump_is_called_what_it_is(tmp_path, target, name, words):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_text("")
    assert_refused(import_here(folder, target), target, f"{folder} is no dump of devpi: ", words)


def test_the_path_of_a_dump_that_is_a_file_or_missing_is_called_so(dump, tmp_path, target):
    dump.write()
    assert_refused(import_here(dump.folder / "dataindex.json", target), target,
                   "it is a file: name the directory that has dataindex.json in it")
    assert_refused(import_here(tmp_path / "none", target), target, "none is no dump of devpi: there is no such directory")
