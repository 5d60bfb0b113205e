"""`export DIR`: a dump as devpi-import reads it, written beside a server that runs, whole or not at all."""

import hashlib
import json
import os
import shutil
import sqlite3
import stat
import threading

import pytest
from harness import (
    Server, Upstream, documentation, eventually, patched, path_of, run_command, sdist, submit, upload, upload_docs, wheel)

import devpi_lite

posix = pytest.mark.skipif(os.name == "nt", reason="modes, signals and limits of POSIX")
WHEEL, SDIST, LOCAL = wheel("Tide.Table", "1.0"), sdist("Tide.Table", "1.0"), wheel("tide-table", "2.0+l.1")
DOCS, ATTESTED = documentation("tide-table", "1.0"), wheel("attested", "1.0")
RESULT = {"testenvs": {}, "platform": "linux", "host": "quay"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A server with a bit of everything; it runs on, and nobody writes to it."""
    upstream = Upstream().start()
    upstream.publish("outside", "1.0")
    upstream.publish("outside", "1.1", requires_python=">=3.7", yanked="leaks")
    server = Server(tmp_path_factory.mktemp("export") / "server").start()
    for name in ("mira", "noel"):
        server.add_user(name)
    server.login("root")
    assert server.patch("/mira", {"email": "m@example.org", "custom_data": {"desk": 4}}, user="mira").status == 200
    server.add_mirror("root/sea", upstream, title="outside", mirror_cache_expiry=900, mirror_missing_statuses=["403"])
    server.add_index("mira/stable", bases=["root/sea"], volatile=False)
    server.add_index(
        "mira/dev", bases=["mira/stable"], mirror_whitelist=["outside", "tide-table"], webhook_url="http://127.0.0.1:9/",
        webhook_secret="key", acl_upload=["mira", "noel"], acl_pkg_read=["mira"], mirror_whitelist_inheritance="union")

    upload(server, "mira/dev", WHEEL, SDIST, LOCAL, wheel("arch", "1"), wheel("past", "1"))
    upload(server, "mira/dev", ATTESTED, fields={
        "attestations": "[1]", "description": "R" * 20000, "foo": "bar", "import_names": "attested"})
    upload_docs(server, "mira/dev", DOCS)
    submit(server, "mira/dev", "words-only", "0.5", summary="no file")
    assert server.post(path_of(WHEEL, "mira/dev"), RESULT, user="mira").status == 200
    assert server.push("mira/dev", "tide-table", "1.0", targetindex="mira/stable").status == 200
    assert server.push("root/sea", "outside", "1.0", targetindex="mira/stable", user="mira").status == 200
    assert server.patch("/mira/dev/tide-table/2.0+l.1", {"yanked": "bad"}, user="mira").status == 200
    archived = {"project-status": {"status": "archived", "reason": "old"}}
    assert server.patch("/mira/dev/arch", archived, user="mira").status == 200
    assert server.delete("/mira/dev/past/1", user="mira").status == 200
    for filename in server.filenames("root/sea", "outside"):
        server.fetch("root/sea", filename, "outside")
    yield server
    server.kill()
    upstream.stop()


@pytest.fixture(scope="module")
def dump(site, tmp_path_factory):
    """(directory, dataindex.json, the finished process) of an export of all of it."""
    folder = tmp_path_factory.mktemp("dump") / "new" / "dump"
    done = export(site, folder, "--include-mirrored-files")
    assert done.returncode == 0, done.stderr
    return folder, index_of(folder), done


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The directory of a server that has ended, with one release: a wheel, its test result, an sdist."""
    server = Server(tmp_path_factory.mktemp("release") / "server").start()
    server.add_user("ann")
    server.add_index("ann/dev")
    upload(server, "ann/dev", wheel("demo", "1.0"), sdist("demo", "1.0"))
    assert server.post(path_of(wheel("demo", "1.0"), "ann/dev"), RESULT, user="ann").status == 200
    server.stop()
    return server.directory


@pytest.fixture
def small(release, tmp_path):
    """A stopped server on a copy of that directory."""
    return Server(shutil.copytree(str(release), str(tmp_path / "server")))


def export(server, folder, *options, **more):
    return run_command("export", folder, "--serverdir", server.directory, *options, **more)


def index_of(folder):
    return json.loads((folder / "dataindex.json").read_text(encoding="utf-8"))


def tree(folder):
    """The paths of all files of a dump, but for dataindex.json."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"dataindex.json"}


def entries(content, index):
    """{path in the dump: entry} of an index's files."""
    files = content["indexes"][index]["files"]
    found = {entry["relpath"]: entry for entry in files}
    assert len(found) == len(files)
    return found


def all_entries(content):
    return {path: entry for index in content["indexes"] if "files" in content["indexes"][index]
            for path, entry in entries(content, index).items()}


def change(server, statement, *values):
    """Changes the database of a stopped server."""
    with sqlite3.connect(str(server.directory / "devpi_lite.db")) as db:
        db.execute(statement, values)
    db.close()


def blob(server, archive):
    return server.directory / "files" / archive.sha256[:2] / archive.sha256


# -- what is written


def test_files_lie_where_devpi_puts_them(dump):
    folder, content, _ = dump
    result, = [path for path in tree(folder) if path.startswith("mira/dev/tide-table/sha256=")]
    pushed, = [path for path in tree(folder) if path.startswith("mira/stable/tide-table/sha256=")]
    assert result.startswith("mira/dev/tide-table/sha256=%s/%s.toxresult-" % (WHEEL.sha256, WHEEL.filename))
    assert tree(folder) == {
        "mira/dev/tide-table/1.0/tide_table-1.0-py3-none-any.whl", "mira/dev/tide-table/1.0/tide_table-1.0.tar.gz",
        "mira/dev/tide-table/2.0+l.1/tide_table-2.0+l.1-py3-none-any.whl", "mira/dev/tide-table-1.0.doc.zip", result,
        "mira/dev/arch/1/arch-1-py3-none-any.whl", "mira/dev/attested/1.0/attested-1.0-py3-none-any.whl",
        "mira/stable/tide-table/1.0/tide_table-1.0-py3-none-any.whl",
        "mira/stable/tide-table/1.0/tide_table-1.0.tar.gz", "mira/stable/tide-table-1.0.doc.zip", pushed,
        "mira/stable/outside/1.0/outside-1.0-py3-none-any.whl",
        "root/sea/outside/1.0/outside-1.0-py3-none-any.whl", "root/sea/outside/1.1/outside-1.1-py3-none-any.whl"}
    assert tree(folder) == set(all_entries(content))
    for path, entry in all_entries(content).items():
        digest = hashlib.sha256((folder / path).read_bytes()).hexdigest()
        mapping = entry["entrymapping"]
        assert (mapping["hashes"], mapping["hash_spec"]) == ({"sha256": digest}, "sha256=" + digest)


@posix
def test_only_the_owner_can_read_it(dump):
    folder = dump[0]
    for path in (folder.parent, folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_users_have_what_devpi_says_of_them(dump, site):
    users = dump[1]["users"]
    assert sorted(users) == ["mira", "noel", "root"]
    mira = users["mira"]
    assert mira.pop("pwhash").startswith("$argon2id$v=19$")
    shown = site.get("/mira").result
    assert mira == {"username": "mira", "email": "m@example.org", "custom_data": {"desk": 4},
                    "created": shown["created"], "modified": shown["modified"]}
    assert sorted(users["noel"]) == ["created", "pwhash", "username"]
    assert "scrypt" not in json.dumps(users)


def test_indexes_have_devpis_options_alone(dump):
    indexes = dump[1]["indexes"]
    assert indexes["mira/dev"]["indexconfig"] == {
        "type": "stage", "volatile": True, "bases": ["mira/stable"], "acl_upload": ["mira", "noel"],
        "acl_toxresult_upload": [":ANONYMOUS:"], "mirror_whitelist": ["outside", "tide-table"],
        "mirror_whitelist_inheritance": "union"}
    config = dict(indexes["root/sea"]["indexconfig"])
    assert config.pop("mirror_url").startswith("http://127.0.0.1:")
    assert config == {"type": "mirror", "volatile": True, "title": "outside", "mirror_cache_expiry": 900}


def test_the_list_says_which_format_it_is(dump):
    content = dump[1]
    assert set(content) == {"dumpversion", "pythonversion", "devpi_server", "users", "indexes", "devpi_lite"}
    assert content["dumpversion"] == "2" and len(content["pythonversion"]) == 5
    assert content["devpi_server"] == "devpi_lite " + devpi_lite.__version__


def test_releases_have_all_metadata(dump):
    projects = dump[1]["indexes"]["mira/dev"]["projects"]
    assert {name: list(versions) for name, versions in projects.items()} == {
        "tide-table": ["1.0", "2.0+l.1"], "arch": ["1"], "past": [], "attested": ["1.0"], "words-only": ["0.5"]}
    metadata = projects["tide-table"]["1.0"]
    assert (metadata["name"], metadata["version"], metadata["summary"]) == ("Tide.Table", "1.0", "A test package")
    assert (metadata["author"], metadata["classifiers"], metadata["license_file"]) == ("", [], [])
    attested = projects["attested"]["1.0"]
    assert attested["description"] == "R" * 20000
    assert (attested["other"], attested["import_name"]) == ({"foo": ["bar"]}, ["attested"])


def test_an_entry_of_each_kind_of_file(dump):
    found = entries(dump[1], "mira/stable")
    when = {"upload": found["mira/stable/tide-table-1.0.doc.zip"]["log"][0]["when"]}
    binary = found["mira/stable/tide-table/1.0/" + WHEEL.filename]
    assert {key: binary[key] for key in ("type", "projectname", "version")} == {
        "type": "releasefile", "projectname": "tide-table", "version": "1.0"}
    assert {key: binary["entrymapping"][key] for key in ("project", "version")} == {
        "project": "tide-table", "version": "1.0"}
    assert binary["entrymapping"]["last_modified"].endswith(" GMT")
    assert [dict(entry, when=len(entry["when"])) for entry in binary["log"]] == [
        {"what": "upload", "who": "mira", "dst": "mira/dev", "when": 6},
        {"what": "push", "who": "mira", "src": "mira/dev", "dst": "mira/stable", "when": 6}]
    assert found["mira/stable/tide-table-1.0.doc.zip"]["type"] == "doczip" and len(when["upload"]) == 6
    result, = [entry for entry in found.values() if entry["type"] == "toxresult"]
    assert result["for_entrypath"] == path_of(WHEEL, "mira/stable")[1:]
    assert list(found.values()).index(binary) < list(found.values()).index(result)


def test_a_mirror_has_what_it_fetched(dump):
    content = dump[1]["indexes"]["root/sea"]
    assert content["projects"] == {"outside": {
        "1.0": {"name": "outside", "version": "1.0"},
        "1.1": {"name": "outside", "version": "1.1", "requires_python": ">=3.7", "yanked": "leaks"}}}
    entry = entries(dump[1], "root/sea")["root/sea/outside/1.1/outside-1.1-py3-none-any.whl"]
    url = content["indexconfig"]["mirror_url"].replace("simple/", "files/outside/")
    assert entry["entrymapping"]["url"] == url + "outside-1.1-py3-none-any.whl"
    assert entry["log"] == [] and entry["devpi_lite"]["yanked"] == "leaks" and entry["devpi_lite"]["position"] == 1


def test_without_the_option_a_mirror_has_its_settings_alone(site, tmp_path):
    done = export(site, tmp_path / "dump")
    assert done.returncode == 0, done.stderr
    assert set(index_of(tmp_path / "dump")["indexes"]["root/sea"]) == {"indexconfig"}
    assert not (tmp_path / "dump" / "root").exists()


def test_our_own_key_has_what_devpi_has_no_place_for(dump, site):
    own = dump[1]["devpi_lite"]
    assert (own["format"], own["program"]) == (1, devpi_lite.__version__)
    assert own["serial"] == int(site.get("/+api").headers["X-DEVPI-SERIAL"])
    assert sorted(own["users"]) == ["mira", "noel", "root"]
    assert own["users"]["mira"]["pwhash"].startswith("scrypt:")
    assert own["indexes"] == {
        "root/sea": {"mirror_missing_statuses": ["403"]},
        "mira/dev": {"webhook_url": ["http://127.0.0.1:9/"], "webhook_secret": "key", "acl_pkg_read": ["mira"]}}
    assert own["projects"] == {"mira/dev": {
        "arch": {"status": "archived", "reason": "old"}, "past": {"status": "active", "reason": None}}}
    past = wheel("past", "1")
    assert own["rows"] == [
        ["gone", [path_of(past, "mira/dev")[1:]], {}],
        ["withdrawn", ["mira/dev", "releasefile", past.filename], {"sha256": past.sha256, "kept": 0}]]


def test_a_file_has_its_own_key_too(dump):
    found = entries(dump[1], "mira/dev")
    local = found["mira/dev/tide-table/2.0+l.1/" + LOCAL.filename]
    assert local["devpi_lite"]["yanked"] == "bad" and local["devpi_lite"]["uploaded"].endswith("Z")
    # devpi 7 takes no key that it does not know, there
    yank, = [entry for entry in local["log"] if entry["what"] == "yank"]
    assert yank["message"] == "bad" and "reason" not in yank
    assert local["devpi_lite"]["history"][-1]["reason"] == "bad"
    attested = found["mira/dev/attested/1.0/" + ATTESTED.filename]["devpi_lite"]
    assert attested["attestations"] == "[1]" and "yanked" not in attested and "history" not in attested


def test_what_is_said_at_the_end(dump):
    done = dump[2]
    assert done.stdout.startswith("%s has 3 users, 3 indexes, 8 projects and 14 files (" % dump[0])
    said = done.stderr
    assert "mira/dev whitelists outside without having such a project: devpi 7 makes an empty one" in said
    # its last release was deleted
    assert "mira/dev keeps past private without a release: devpi 6 forgets such a name, and mirrors answer" in said
    assert "devpi shows mira/dev to everybody" in said
    assert ("1 yanked file; 1 project status; 1 file's attestations; 1 index's webhooks; 1 name of a deleted file"
            in said)


def test_help_says_what_happens():
    said = " ".join(run_command("export", "--help").stdout.split())
    for text in ("export DIR", "devpi-import", "The server may run", "SHA-256", "--include-mirrored-files",
                 "--hard-links", "--skip-broken", "5 done"):
        assert text in said


# -- passwords


def test_a_password_from_devpi_goes_back(small, tmp_path):
    kept = "$argon2id$v=19$m=8,t=1,p=1$c29tZXNhbHRzb21lc2FsdA$" + "A" * 43
    attributes = {"+devpi": {"pwhash": kept, "pwsalt": "x", "tokens": {"a": 1}}}
    change(small, "UPDATE users SET attributes = CASE name WHEN 'ann' THEN ? ELSE '{}' END", json.dumps(attributes))
    done = export(small, tmp_path / "dump")
    assert done.returncode == 0, done.stderr
    # root's is known in our form only
    assert "in devpi, root can't log in before `devpi-passwd NAME` there" in done.stderr
    user = index_of(tmp_path / "dump")["users"]["ann"]
    assert user == {"username": "ann", "created": user["created"], "pwhash": kept, "tokens": {"a": 1}}


def test_unknown_keys_from_devpi_go_back(small, tmp_path):
    for table, column, where in (("indexes", "config", "name = 'dev'"), ("releases", "metadata", "1")):
        change(small, "UPDATE %s SET %s = replace(%s, '{', '{\"+devpi\": {\"odd_key\": [1]}, ')  WHERE %s"
               % (table, column, column, where))
    assert export(small, tmp_path / "dump").returncode == 0
    index = index_of(tmp_path / "dump")["indexes"]["ann/dev"]
    assert index["indexconfig"]["odd_key"] == index["projects"]["demo"]["1.0"]["odd_key"] == [1]
    assert "+devpi" not in json.dumps(index)


# -- beside a server


PAUSED = """
check = devpi_lite.Export.check_names
def pause(self):
    check(self)
    open(%r, "w").close()
    while not os.path.exists(%r):
        time.sleep(0.01)
devpi_lite.Export.check_names = pause
import os, time
"""


def test_uploads_go_on_and_do_not_get_in(server, tmp_path):
    server.add_user("ann")
    server.add_index("ann/dev")
    first, dropped = wheel("first", "1"), wheel("dropped", "1")
    upload(server, "ann/dev", first, dropped)
    begun, go = tmp_path / "begun", tmp_path / "go"
    script = patched(tmp_path, PAUSED % (str(begun), str(go)))
    done = []
    thread = threading.Thread(target=lambda: done.append(export(server, tmp_path / "dump", script=script)))
    thread.start()
    eventually(begun.exists)

    upload(server, "ann/dev", wheel("late", "1"))
    assert server.delete("/ann/dev/dropped", user="ann").status == 200
    # its bytes may be in the trash by now
    (server.directory / "trash").mkdir(exist_ok=True)
    blob(server, dropped).rename(server.directory / "trash" / dropped.sha256)
    go.touch()
    thread.join()

    assert done[0].returncode == 0, done[0].stderr
    content = index_of(tmp_path / "dump")
    assert sorted(content["indexes"]["ann/dev"]["projects"]) == ["dropped", "first"]
    assert tree(tmp_path / "dump") == set(all_entries(content)) == {
        "ann/dev/first/1/" + first.filename, "ann/dev/dropped/1/" + dropped.filename}
    assert (tmp_path / "dump" / "ann/dev/dropped/1" / dropped.filename).read_bytes() == dropped.content


def test_a_directory_on_read_only_media_is_left_as_it_is(small, tmp_path):
    def state():
        # the lease of an export lies in tmp/, where that can be written to
        return sorted((str(path), path.name == "tmp" or path.stat().st_mtime_ns)
                      for path in small.directory.rglob("*"))
    before = state()
    script = patched(tmp_path, "devpi_lite.is_read_only = lambda path: True")
    done = export(small, tmp_path / "dump", script=script)
    assert done.returncode == 0, done.stderr
    assert len(tree(tmp_path / "dump")) == 3 and state() == before


def test_without_a_database_it_says_so(tmp_path):
    done = run_command("export", tmp_path / "dump", "--serverdir", tmp_path / "none")
    assert done.returncode == 1 and "no devpi_lite database in" in done.stderr
    assert not (tmp_path / "dump").exists() and not (tmp_path / "none").exists()


# -- what is broken


@pytest.mark.parametrize("links", [(), ("--hard-links",)])
@pytest.mark.parametrize("damage", ["lost", "flipped", "shorter"])
def test_a_broken_file_ends_the_export_by_name(small, tmp_path, damage, links):
    path = blob(small, wheel("demo", "1.0"))
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage != "lost":
        content[40] ^= 1
        path.write_bytes(bytes(content[:len(content) - (damage == "shorter")]))

    done = export(small, tmp_path / "dump", *links)
    assert done.returncode == 1
    fatal, = [line for line in done.stderr.splitlines() if line.startswith("fatal:")]
    assert "demo-1.0-py3-none-any.whl of ann/dev" in fatal and "--skip-broken" in fatal and "backup" in fatal
    assert ("lost" if damage == "lost" else "damaged") in fatal
    assert not (tmp_path / "dump").exists()

    # the test result of that wheel has nothing that it could be of
    done = export(small, tmp_path / "dump", "--skip-broken", *links)
    assert done.returncode == 5
    assert "left out: demo-1.0-py3-none-any.whl of ann/dev: its bytes" in done.stderr
    assert "the file that it is a test result of is left out" in done.stderr
    content = index_of(tmp_path / "dump")
    assert tree(tmp_path / "dump") == set(all_entries(content)) == {"ann/dev/demo/1.0/demo-1.0.tar.gz"}
    assert list(content["indexes"]["ann/dev"]["projects"]["demo"]) == ["1.0"]


def test_names_that_lead_elsewhere(small, tmp_path):
    change(small, "UPDATE indexes SET name = '..' WHERE name = 'dev'")
    done = export(small, tmp_path / "dump")
    assert done.returncode == 1 and "'ann/..'" in done.stderr and not (tmp_path / "dump").exists()

    done = export(small, tmp_path / "dump", "--skip-broken")
    assert done.returncode == 5 and list(index_of(tmp_path / "dump")["indexes"]) == []
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "server") == ["dump"]


@pytest.mark.parametrize("statement", [
    "UPDATE releases SET version = '..'", "UPDATE releases SET version = '../../../up'",
    "UPDATE releases SET version = 'a/b'", "UPDATE releases SET version = '.'",
    "UPDATE projects SET name = '..'", "UPDATE releases SET version = ?1 || ?1"])
def test_odd_names_from_old_directories_stay_inside(small, tmp_path, statement):
    change(small, statement, *["x" * 150] * ("?1" in statement))
    change(small, "UPDATE files SET version = (SELECT version FROM releases)")
    done = export(small, tmp_path / "a" / "dump")
    assert done.returncode == 0, done.stderr
    content, folder = index_of(tmp_path / "a" / "dump"), tmp_path / "a" / "dump"
    assert len(tree(folder)) == 3 and tree(folder) == set(all_entries(content))
    assert list((tmp_path / "a").iterdir()) == [folder]
    for path, entry in all_entries(content).items():
        assert ".." not in path.split("/") and path.count("/") == 4
        assert entry["version"] in content["indexes"]["ann/dev"]["projects"][entry["projectname"]]


def test_a_file_name_that_leads_elsewhere(small, tmp_path):
    change(small, "UPDATE files SET filename = '../../../../x.whl' WHERE filename LIKE '%.whl'")
    done = export(small, tmp_path / "dump")
    assert done.returncode == 1 and "no file can have this name" in done.stderr
    assert not (tmp_path / "x.whl").exists() and not (tmp_path / "dump").exists()


def test_two_files_at_one_place(server, tmp_path):
    for name in ("ann", "dataindex.json"):
        server.add_user(name)
        server.add_index(name + "/dev")
    one, other = documentation("a", "1-2", "one"), documentation("a-1", "2", "other")
    upload(server, "ann/dev", wheel("a", "1-2"), wheel("a-1", "2"))
    upload_docs(server, "ann/dev", one)
    upload_docs(server, "ann/dev", other)
    upload(server, "dataindex.json/dev", wheel("demo", "1"))
    server.add_index("ann/nowhere", type="mirror")
    done = export(server, tmp_path / "dump")
    assert done.returncode == 0 and "ann/nowhere has no mirror_url" in done.stderr, done.stderr
    found = all_entries(index_of(tmp_path / "dump"))
    assert tree(tmp_path / "dump") == set(found)
    docs = {(entry["projectname"], entry["version"]): path for path, entry in found.items() if entry["type"] == "doczip"}
    assert {docs["a", "1-2"], docs["a-1", "2"]} == {"ann/dev/a-1-2.doc.zip", "ann/dev/+2/a-1-2.doc.zip"}
    for docs_, path in ((one, docs["a", "1-2"]), (other, docs["a-1", "2"])):
        assert (tmp_path / "dump" / path).read_bytes() == docs_.content


def test_a_circle_of_bases_is_cut_for_devpi(server, tmp_path):
    server.add_user("ann")
    for name in ("out", "a", "b", "c"):
        server.add_index("ann/" + name)
    circle = {"a": ["ann/a", "ann/b"], "b": ["ann/out", "ann/c"], "c": ["ann/a", "ann/out"]}
    for name, bases in circle.items():
        assert server.patch("/ann/" + name, {"bases": bases}, user="ann").status == 200
    done = export(server, tmp_path / "dump")
    assert done.returncode == 0 and "the bases of ann/c (ann/a, ann/out) lead back to it" in done.stderr
    content = index_of(tmp_path / "dump")
    bases = {path: index["indexconfig"]["bases"] for path, index in content["indexes"].items()}
    assert bases == {"ann/out": [], "ann/a": ["ann/a", "ann/b"], "ann/b": ["ann/out", "ann/c"], "ann/c": ["ann/out"]}
    assert content["devpi_lite"]["indexes"] == {"ann/c": {"bases": ["ann/a", "ann/out"]}}


# -- where it is written


@pytest.mark.parametrize("name", ["a dump", "a file", "a folder", "a stranger's mark"])
def test_a_directory_that_holds_something_is_refused(small, tmp_path, name):
    folder = tmp_path / "dump"
    folder.mkdir()
    if name == "a dump":
        (folder / "dataindex.json").write_text("{}")
    elif name == "a folder":
        (folder / "x").mkdir()
    elif name == "a stranger's mark":
        (folder / "dataindex.json.part").write_text("{ whatever")
    else:
        (folder / "x").write_text("")
    before = sorted(folder.iterdir())
    done = export(small, folder)
    assert done.returncode == 1 and str(folder) in done.stderr and "choose" in done.stderr
    assert sorted(folder.iterdir()) == before


def test_an_empty_directory_is_taken_and_one_inside_is_not(small, tmp_path):
    folder = tmp_path / "dump"
    folder.mkdir(mode=0o755)
    assert export(small, folder).returncode == 0
    if os.name != "nt":
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    inside = small.directory / "tmp" / "dump"
    done = export(small, inside)
    assert done.returncode == 1 and "must not lie in each other" in done.stderr and not inside.exists()


@posix
def test_hard_links(small, tmp_path):
    folder = tmp_path / "dump"
    assert export(small, folder, "--hard-links").returncode == 0
    archive = wheel("demo", "1.0")
    linked = folder / "ann/dev/demo/1.0" / archive.filename
    assert linked.stat().st_ino == blob(small, archive).stat().st_ino
    assert stat.S_IMODE(linked.stat().st_mode) == 0o600
    assert len(tree(folder)) == 3


@posix
def test_hard_links_that_are_impossible_are_copies(small, tmp_path):
    script = patched(tmp_path, """
import errno, os
def link(source, target):
    raise OSError(errno.EXDEV, "Invalid cross-device link")
os.link = link
""")
    done = export(small, tmp_path / "dump", "--hard-links", script=script)
    assert done.returncode == 0 and "3 files are copied" in done.stderr
    archive = wheel("demo", "1.0")
    assert (tmp_path / "dump" / "ann/dev/demo/1.0" / archive.filename).read_bytes() == archive.content


# -- cut off


KILLED = """
import os, signal, time
enter = devpi_lite.Export._enter
def die(self, out, file, relpath, why):
    enter(self, out, file, relpath, why)
    out.write.__self__.flush()
    if self.files == 2:
        %s
devpi_lite.Export._enter = die
"""


@posix
def test_a_killed_export_leaves_no_list_and_the_next_one_cleans_up(small, tmp_path):
    folder = tmp_path / "dump"
    done = export(small, folder, script=patched(tmp_path, KILLED % "os.kill(os.getpid(), signal.SIGKILL)"))
    assert done.returncode == -9 and tree(folder) and not (folder / "dataindex.json").exists()
    done = export(small, folder)
    assert done.returncode == 0 and "was cut off: what it left there is removed" in done.stderr
    assert len(tree(folder)) == 3 and tree(folder) == set(all_entries(index_of(folder)))

    done = export(small, folder)
    assert done.returncode == 1 and "holds a dump already" in done.stderr and len(tree(folder)) == 3


@posix
def test_what_somebody_put_beside_the_rest_of_a_killed_export_stays(small, tmp_path):
    folder = tmp_path / "dump"
    export(small, folder, script=patched(tmp_path, KILLED % "os.kill(os.getpid(), signal.SIGKILL)"))
    (folder / "notes.txt").write_text("mine")
    before = tree(folder)
    done = export(small, folder)
    assert done.returncode == 1 and "notes.txt" in done.stderr and tree(folder) == before


@posix
def test_ctrl_c_leaves_nothing(small, tmp_path):
    folder = tmp_path / "more" / "dump"
    done = export(small, folder, script=patched(tmp_path, KILLED % "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"))
    assert done.returncode == 1 and "the export was stopped: nothing of it is left" in done.stderr
    assert not folder.parent.exists()


@posix
def test_two_exports_do_not_share_a_directory(small, tmp_path):
    folder, go = tmp_path / "dump", tmp_path / "go"
    pause = "\n        while not os.path.exists(%r): time.sleep(0.01)" % str(go)
    script = patched(tmp_path, KILLED % pause)
    done = []
    thread = threading.Thread(target=lambda: done.append(export(small, folder, script=script)))
    thread.start()
    eventually(lambda: folder.exists() and len(tree(folder)) > 1)
    other = export(small, folder)
    go.touch()
    thread.join()
    assert other.returncode == 1 and "another export writes to %s" % folder in other.stderr
    assert done[0].returncode == 0 and len(tree(folder)) == 3


@posix
@pytest.mark.parametrize("size, bound", [(40000, 20000), (0, 3000)])
def test_a_full_disk_leaves_nothing(make_server, tmp_path, size, bound):
    """A limit on the size of a file gives the same errors as a full disk; the second one hits the list."""
    server = make_server()
    server.add_user("ann")
    server.add_index("ann/dev")
    upload(server, "ann/dev", wheel("small", "1"), wheel("demo", "1", size=size), wheel("third", "1"))
    script = patched(tmp_path, "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (%d, %d))" % (bound, bound))
    folder = tmp_path / "dump"
    done = export(server, folder, script=script)
    assert done.returncode == 1 and not folder.exists(), done.stderr
    assert "the dump does not fit into %s" % folder in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("is_header", [True, False])
def test_a_damaged_database_is_named_with_what_to_do(tmp_path, is_header):
    (tmp_path / "server").mkdir()
    devpi_lite.Store(devpi_lite.Settings(str(tmp_path / "server")), create=True).close()
    path = tmp_path / "server" / "devpi_lite.db"
    db = sqlite3.connect(path)
    size, = db.execute("PRAGMA page_size").fetchone()
    page, = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'users'").fetchone()
    db.close()
    with open(path, "r+b") as file:
        file.seek(0 if is_header else (page - 1) * size)
        file.write(b"\xff" * size)
    done = run_command("export", tmp_path / "dump", "--serverdir", path.parent)
    assert done.returncode == 1
    assert done.stderr.startswith(f"fatal: the database of {path.parent} is damaged ("), done.stderr
    assert done.stderr.endswith("; stop the server, move the directory aside, and restore a backup in its place\n")
    assert not (tmp_path / "dump").exists()
