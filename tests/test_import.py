"""Dumps of devpi, taken in: what is served afterwards is what devpi served."""

import contextlib
import hashlib
import json
import os
import sqlite3
import stat

import pytest
from dumps import WHEN, Dump, rows, run_import, small, unpacked
from harness import ANY, HTML, Server, audited, documentation, eventually, patched, sdist, upload

# -- the sample of a real devpi-server 7: the facts of a small site ------------------------------


class Sample:
    """The sample, imported, and a server on it."""

    def __init__(self, folder):
        self.dump = unpacked("dump_of_devpi_7.zip", folder / "dump")
        self.data = json.loads((self.dump / "dataindex.json").read_text())
        self.result = run_import(self.dump, folder / "server")
        assert self.result.returncode == 0, self.result
        self.server = Server(folder / "server").start()


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    sample = Sample(tmp_path_factory.mktemp("sample"))
    yield sample
    sample.server.kill()


def test_the_users_of_the_sample_are_there(sample):
    users = sample.server.get("/").result
    assert set(users) == {"root", "mira", "noel"}
    mira = sample.server.get("/mira").result
    assert (mira["email"], mira["title"], mira["custom_data"], mira["created"], mira["modified"]) == (
        "mira@example.org", "Mira", {"desk": 4}, "2026-11-28T12:59:57Z", "2026-11-28T13:00:02Z")
    assert "tokens" not in mira and not [key for key in mira if key.startswith("+")]
    assert users["noel"]["created"] == "2026-11-28T12:59:57Z"


@pytest.mark.parametrize("path, config", [
    ("root/sea", {
        "type": "mirror", "mirror_url": "http://127.0.0.1:31932/simple/", "mirror_cache_expiry": 900,
        "mirror_web_url_fmt": "https://example.org/p/{name}", "mirror_use_external_urls": False, "volatile": False,
        "title": "the outside"}),
    ("mira/stable", {
        "type": "stage", "bases": ["root/sea"], "volatile": False, "title": "released", "acl_upload": ["mira"],
        "acl_toxresult_upload": [":ANONYMOUS:"], "mirror_whitelist": [],
        "mirror_whitelist_inheritance": "intersection"}),
    ("mira/dev", {
        "type": "stage", "bases": ["mira/stable", "root/sea"], "volatile": True, "acl_upload": ["mira", "noel"],
        "acl_toxresult_upload": [":AUTHENTICATED:"], "custom_data": {"ticket": "SEA-1"},
        "mirror_whitelist": ["ruleonly", "sealib"], "mirror_whitelist_inheritance": "union"}),
    ("noel/open", {
        "type": "stage", "bases": ["mira/dev"], "mirror_whitelist": ["*"], "volatile": True, "acl_upload": ["noel"],
        "acl_toxresult_upload": [":ANONYMOUS:"], "mirror_whitelist_inheritance": "intersection",
        "description": "everything merges"})])
def test_the_indexes_of_the_sample_speak_the_older_words(sample, path, config):
    result = sample.server.get("/" + path).result
    result.pop("projects", None)
    assert result == config


def test_the_projects_of_the_sample_are_there(sample):
    server = sample.server
    assert set(server.get("/mira/dev").result["projects"]) == {
        "tide-table", "sea-lib", "sealib", "ruleonly", "paper-boat"}
    versions = server.get("/mira/dev/tide-table?ignore_bases").result
    assert set(versions) == {"1.0", "2.0"}
    release = versions["2.0"]
    assert (release["summary"], release["requires_python"], release["license_expression"], release["keywords"]) == (
        "counts tides", ">=3.8", "MIT", "sea,moon")
    assert (len(release["classifiers"]), release["requires_dist"], release["project_urls"]) == (
        2, ["sealib>=1"], ["Source, https://example.org/tides"])
    assert len(server.get("/mira/dev/tide-table/2.0").result["description"]) == 8478
    assert server.get("/mira/dev/sea-lib/1.5").result["name"] == "Sea.Lib"
    assert server.get("/mira/dev/paper-boat/0.5").result["version"] == "0.5"
    assert server.get("/noel/open").result["projects"] == []
    (link,) = [link for link in versions["1.0"]["+links"] if link["href"].endswith("1.0.tar.gz")]
    assert [(entry["what"], entry["who"], entry.get("count")) for entry in link["log"]] == [
        ("overwrite", None, 1), ("upload", "mira", None)]


def test_results_and_documentation_of_the_sample_came_along(sample):
    release = sample.server.get("/mira/stable/tide-table/2.0").result
    kinds = {}
    for link in release["+links"]:
        kinds.setdefault(link["rel"], []).append(link)
    assert {kind: len(links) for kind, links in kinds.items()} == {"releasefile": 2, "toxresult": 2, "doczip": 1}
    results = [sample.server.get(link["href"], headers={"Accept": ANY}).json() for link in kinds["toxresult"]]
    assert sorted(result["host"].partition(".")[0] for result in results) == ["pier", "quay"]
    assert [entry["what"] for entry in kinds["doczip"][0]["log"]] == ["upload", "push"]
    assert kinds["doczip"][0]["log"][0]["when"] == [2026, 11, 28, 13, 0, 0]
    assert sample.server.get("/mira/stable/tide-table/2.0/+d/index.html", follow=True).status == 200


FOUR = {"tide_table-%s" % ending for ending in (
    "1.0-py3-none-any.whl", "1.0.tar.gz", "2.0-py3-none-any.whl", "2.0.tar.gz")}
CACHED = {"sealib-1.0-py3-none-any.whl", "sealib-1.1.tar.gz"}


@pytest.mark.parametrize("index, project, names", [
    ("root/sea", "tide-table", None), ("root/sea", "sealib", CACHED), ("root/sea", "sea-lib", None),
    ("mira/stable", "tide-table", {"tide_table-2.0-py3-none-any.whl", "tide_table-2.0.tar.gz"}),
    ("mira/stable", "sealib", CACHED),
    ("mira/dev", "tide-table", FOUR), ("mira/dev", "sealib", CACHED | {"sealib-1.9.tar.gz"}),
    ("mira/dev", "sea-lib", {"Sea.Lib-1.5-py3-none-any.whl"}), ("mira/dev", "ruleonly", set()),
    ("mira/dev", "paper-boat", set()),
    ("noel/open", "tide-table", FOUR), ("noel/open", "sealib", CACHED | {"sealib-1.9.tar.gz"}),
    ("noel/open", "sea-lib", {"Sea.Lib-1.5-py3-none-any.whl"}), ("noel/open", "paper-boat", set())])
def test_the_sample_has_these_links_while_its_mirror_is_unreachable(sample, index, project, names):
    if names is None:       # 502: a file may come when upstream can be reached
        assert sample.server.get("/%s/+simple/%s/" % (index, project)).status in (404, 502)
        return
    assert set(sample.server.filenames(index, project)) == names


def test_cached_files_of_the_sample_keep_what_upstream_said(sample):
    files = {file["filename"]: file for file in sample.server.simple("root/sea", "sealib")["files"]}
    assert files["sealib-1.1.tar.gz"]["yanked"] == "leaks"
    assert files["sealib-1.0-py3-none-any.whl"]["requires-python"] == ">=3.7"
    assert files["sealib-1.0-py3-none-any.whl"]["core-metadata"]["sha256"]
    assert sample.server.fetch("root/sea", "sealib-1.1.tar.gz", "sealib")


def test_every_file_of_the_sample_is_at_its_url(sample):
    count = 0
    for path, index in sample.data["indexes"].items():
        for entry in index.get("files", ()):
            digest = sha256 = entry["entrymapping"]["hashes"]["sha256"]
            name = entry["relpath"].rpartition("/")[2]
            if entry["type"] == "toxresult":
                digest = entry["relpath"].split("sha256=")[1].partition("/")[0]
            reply = sample.server.get("/%s/+f/%s/%s/%s" % (path, digest[:3], digest[3:16], name), headers={"Accept": ANY})
            assert hashlib.sha256(reply.body).hexdigest() == sha256
            if entry["type"] == "releasefile" and path == "mira/dev":
                assert reply.headers["Last-Modified"].startswith("Sat, 28 Nov 2026 ")
            count += 1
    assert count == 16


def test_the_order_of_indexes_that_differs_is_told(sample):
    lines = [line for line in sample.result.stderr.splitlines() if "devpi 7" in line]
    assert lines == []      # depth and breadth are the same in the sample


# -- version 2, made by hand ----------------------------------------------------------------------


@pytest.fixture
def dump(tmp_path):
    return Dump(tmp_path / "dump")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "server"


def served(make_server, dump, target, *options):
    """A server on what was imported."""
    result = dump.imported(target, "--no-root-pypi", *options)
    assert result.returncode == 0, result
    server = make_server(directory=target)
    server.passwords["root"] = None
    return server


def test_a_dump_of_version_2_becomes_a_server(make_server, dump, target):
    archive, source = small(requires_python=">=3.8"), sdist("lantern", "1.0")
    dump.add(archive)
    dump.add(source)
    dump.add_result(archive)
    dump.add_file("doczip", "lantern", "1.0", "mira/dev/lantern-1.0.doc.zip", documentation("lantern", "1.0").content)
    server = served(make_server, dump, target)
    assert set(server.filenames("mira/dev", "lantern")) == {archive.filename, source.filename}
    assert server.fetch("mira/dev", archive.filename, "lantern") == archive.content
    file = [file for file in server.simple("mira/dev", "lantern")["files"] if "whl" in file["filename"]][0]
    assert file["requires-python"] == ">=3.8" and file["upload-time"].startswith("2026-11-28T13:00:00")
    assert file["core-metadata"]["sha256"] == hashlib.sha256(archive.metadata).hexdigest()
    assert list(server.get("/root").result["indexes"]) == []


def test_root_pypi_is_made_unless_the_dump_has_it(dump, target, tmp_path):
    assert dump.imported(target).returncode == 0
    assert "https://pypi.org/simple/" in rows(target, "SELECT config FROM indexes WHERE name = 'pypi'")[0][0]

    dump.add_index("root/pypi", {"type": "mirror", "mirror_url": "http://127.0.0.1:1/simple/", "volatile": False})
    assert dump.imported(tmp_path / "own").returncode == 0
    ((config,),) = rows(tmp_path / "own", "SELECT config FROM indexes WHERE name = 'pypi'")
    assert "http://127.0.0.1:1/simple/" in config

    assert dump.imported(tmp_path / "none", "--no-root-pypi").returncode == 0
    assert rows(tmp_path / "none", "SELECT count(*) FROM indexes WHERE name = 'pypi'") == [(0,)]


def config_of(target, path="mira/dev"):
    ((config,),) = rows(target, "SELECT config FROM indexes JOIN users ON users.id = user_id "
                        "WHERE users.name || '/' || indexes.name = ?", path)
    return json.loads(config)


def test_no_password_is_no_empty_password(make_server, dump, target, tmp_path):
    dump.data["users"]["mira"].pop("pwhash")
    dump.data["users"]["noel"] = {"username": "noel", "pwhash": "{MD5}xyz"}
    dump.data["users"]["olaf"] = {"username": "olaf", "pwhash": ""}
    dump.data["users"].pop("root")
    (tmp_path / "passwords").write_bytes("\ufeffolaf:olaf: pw\u2028\x85\r\n# another\r\n\r\n".encode())
    server = served(make_server, dump, target, "--root-passwd", "root-pw", "--set-passwords", tmp_path / "passwords")
    for user, password in [("mira", ""), ("noel", ""), ("noel", "{MD5}xyz"), ("olaf", ""), ("root", "")]:
        assert server.post("/+login", {"user": user, "password": password}).status == 401
    for user, password in [("olaf", "olaf: pw\u2028\x85"), ("root", "root-pw")]:
        assert server.post("/+login", {"user": user, "password": password}).status == 200


def test_users_without_a_password_are_named(dump, target, tmp_path):
    dump.data["users"]["mira"].pop("pwhash")
    result = dump.imported(target)
    assert "mira" in result.stderr and "passwd USER" in result.stderr
    (tmp_path / "passwords").write_text("nobody:x\n")
    result = dump.imported(tmp_path / "b", "--set-passwords", tmp_path / "passwords")
    assert result.returncode == 1 and "no user nobody" in result.stderr
    (tmp_path / "passwords").write_text("mira\n")
    result = dump.imported(tmp_path / "b", "--set-passwords", tmp_path / "passwords")
    assert result.returncode == 1 and "line 1" in result.stderr and "mira" not in result.stderr


def test_what_has_no_meaning_here_is_kept_and_not_shown(make_server, dump, target):
    dump.data["users"]["mira"]["tokens"] = {"abc": {"key": "secret-key"}}
    dump.index()["indexconfig"].update(constraints="x==1", uploadtrigger_jenkins=None, mirror_url=5)
    dump.add(small())
    dump.index()["projects"]["lantern"]["1.0"].update({"colour": "blue", "+doczip": [], ":action": "submit"})
    server = served(make_server, dump, target)
    assert config_of(target)["+devpi"] == {"constraints": "x==1", "mirror_url": 5}
    ((attributes,),) = rows(target, "SELECT attributes FROM users WHERE name = 'mira'")
    assert json.loads(attributes)["+devpi"]["tokens"] == {"abc": {"key": "secret-key"}}
    ((metadata,),) = rows(target, "SELECT metadata FROM releases")
    assert json.loads(metadata)["+devpi"] == {"colour": "blue"} and ":action" not in metadata
    for path in ("/", "/mira", "/mira/dev", "/mira/dev/lantern/1.0"):
        assert "devpi\"" not in server.get(path).text and "secret-key" not in server.get(path).text


def test_words_of_both_versions_mean_the_same_in_every_dump(dump, target):
    dump.data["dumpversion"] = 3
    dump.add_index("mira/old", {"type": "stage", "pypi_whitelist": ["My.Name", "*"], "bases": []})
    dump.add_index("mira/new", {"type": "local", "project_inheritance_rules": "allow all", "bases": [],
                                "trust_inheritance_rules_from": "type:not remote"})
    dump.add_index("mira/far", {"type": "remote", "remote_url": "http://127.0.0.1:1/simple/", "bases": ["x/y"],
                                "mirror_cache_expiry": 5.5, "title": 7, "acl_upload": ["mira"]})
    assert dump.imported(target).returncode == 0
    assert config_of(target, "mira/old")["mirror_whitelist"] == ["my-name", "*"]
    assert config_of(target, "mira/old")["acl_upload"] == ["mira"]      # the default
    new = config_of(target, "mira/new")
    assert (new["mirror_whitelist"], new["mirror_whitelist_inheritance"]) == (["*"], "union")
    assert config_of(target, "mira/far") == {
        "type": "mirror", "volatile": True, "mirror_url": "http://127.0.0.1:1/simple/", "mirror_cache_expiry": 5,
        "title": "7"}


def test_whitelisted_names_of_version_2_are_not_registered(dump, target):
    dump.index()["indexconfig"]["mirror_whitelist"] = ["outside"]
    assert dump.imported(target).returncode == 0
    assert config_of(target)["mirror_whitelist"] == ["outside"]
    assert rows(target, "SELECT * FROM projects") == []


def test_an_index_may_be_its_own_base_and_a_base_may_be_missing(dump, target):
    dump.index()["indexconfig"]["bases"] = ["mira/dev", "mira/gone"]
    result = dump.imported(target)
    assert result.returncode == 0 and "mira/gone of mira/dev does not exist" in result.stderr
    assert config_of(target)["bases"] == ["mira/dev", "mira/gone"]


def test_indexes_of_a_type_can_be_left_out(dump, target):
    dump.add_index("mira/..odd..", type="constrained")["files"].append({"relpath": "../x"})
    dump.add_index("mira/../x", type="constrained")
    dump.index()["indexconfig"]["bases"] = ["mira/..odd.."]
    result = dump.imported(target)
    assert result.returncode == 1 and "constrained" in result.stderr
    result = dump.imported(target, "--skip-import-type", "constrained")
    assert result.returncode == 0, result
    assert rows(target, "SELECT count(*) FROM indexes WHERE name != 'pypi'") == [(1,)]


def test_the_order_of_devpi_7_is_compared(dump, target):
    dump.data["dumpversion"] = "3"
    for name, bases in [("d", ["mira/b", "mira/c"]), ("b", ["mira/a"]), ("c", []), ("a", [])]:
        dump.add_index("mira/" + name, bases=bases)
    dump.add(small(), "mira/c")
    dump.add(small(summary="other"), "mira/a")
    dump.add(small("2.0"), "mira/a")
    result = dump.imported(target)
    (line,) = [line for line in result.stderr.splitlines() if "devpi 7" in line]
    assert "mira/d" in line and "mira/d, mira/b, mira/c, mira/a" in line and "mira/d, mira/b, mira/a, mira/c" in line
    assert line.endswith("lantern-1.0-py3-none-any.whl")


def test_files_without_a_history_get_one_and_old_times_count(dump, target):
    archive = small()
    dump.add(archive, log=None)
    mapping = dump.add(small("2.0"))["entrymapping"]
    del mapping["last_modified"]
    assert dump.imported(target).returncode == 0
    ((history, uploaded),) = rows(target, "SELECT history, uploaded FROM files WHERE version = '1.0'")
    (entry,) = json.loads(history)
    assert (entry["what"], entry["who"], entry["dst"]) == ("upload", "<import>", "mira/dev")
    assert uploaded == "2026-11-28T13:00:00.000000Z"
    assert rows(target, "SELECT uploaded FROM files WHERE version = '2.0'") == [("2026-11-28T13:00:00.000000Z",)]


def test_a_history_may_lack_what_later_servers_write(make_server, dump, target):
    dump.add(small(), log=[
        {"what": "overwrite", "when": WHEN}, {"what": "push", "who": None, "src": None, "dst": None, "when": "once"}])
    assert dump.imported(target).returncode == 0
    server = make_server(directory=target)
    for version in "12":
        (link,) = server.get("/mira/dev/lantern/1.0?v=" + version).result["+links"]
        assert [set(entry) for entry in link["log"]] == [{"what", "when", "count"}, {"what", "when", "who"}]
    server.passwords["mira"] = "mira-pw"
    upload(server, "mira/dev", small(summary="another"))
    (link,) = server.get("/mira/dev/lantern/1.0").result["+links"]
    assert [(entry["what"], entry.get("count")) for entry in link["log"]] == [("overwrite", 2), ("upload", None)]


def test_results_with_the_hash_of_what_was_tested_are_taken(dump, target):
    archive = small()
    dump.add(archive)
    result = dump.add_result(archive)
    result["entrymapping"].update(hashes={"sha256": archive.sha256}, hash_spec="sha256=" + archive.sha256)
    dump.add_result(archive, b"[2]", log=None, entrymapping=None)["relpath"]
    assert dump.imported(target).returncode == 1        # of one path
    dump.index()["files"].pop()
    assert dump.imported(target).returncode == 0
    assert rows(target, "SELECT count(*) FROM files WHERE kind = 'toxresult' AND for_id IS NOT NULL") == [(1,)]


def test_archives_that_are_none_are_taken_with_a_warning(dump, target):
    archive = small()
    dump.add(archive)
    path = dump.folder / dump.index()["files"][0]["relpath"]
    path.write_bytes(b"no zip")
    digest = hashlib.sha256(b"no zip").hexdigest()
    dump.index()["files"][0]["entrymapping"].update(hashes={"sha256": digest}, hash_spec="sha256=" + digest)
    dump.add_file("doczip", "lantern", "1.0", "mira/dev/lantern-1.0.doc.zip", b"no zip at all")
    result = dump.imported(target)
    assert result.returncode == 0 and archive.filename in result.stderr
    assert rows(target, "SELECT count(*), count(core_metadata) FROM files") == [(2, 0)]


def test_a_file_can_be_linked(dump, target):
    path = dump.folder / dump.add(small())["relpath"]
    assert dump.imported(target, "--hard-links").returncode == 0
    ((sha256,),) = rows(target, "SELECT sha256 FROM files")
    assert path.samefile(target / "files" / sha256[:2] / sha256)


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_nobody_else_can_read_what_an_import_writes(dump, target, umask):
    dump.add(small())
    before = os.umask(umask)
    try:
        assert dump.imported(target).returncode == 0
    finally:
        os.umask(before)
    for path in [target, *target.rglob("*")]:
        assert stat.S_IMODE(path.lstat().st_mode) == (0o700 if path.is_dir() else 0o600)


def blob(directory, sha256):
    return (directory / "files" / sha256[:2] / sha256).read_bytes()


def test_a_dump_with_many_files_is_taken_in_by_child_processes(dump, target, tmp_path):
    archives = [small("1.%d" % number) for number in range(40)]
    for archive in archives:
        dump.add(archive)
    script = patched(tmp_path, "devpi_lite.Limits.taken_here = 3\ndevpi_lite.PROGRAM = sys.argv[0]")
    assert dump.imported(target, script=script).returncode == 0
    assert rows(target, "SELECT count(*), count(metadata_sha256), count(DISTINCT sha256) FROM files") == [(40, 40, 40)]
    for archive in archives:
        assert blob(target, archive.sha256) == archive.content


def mirror_dump(dump, upstream, archive):
    dump.add_index("root/up", {"type": "mirror", "mirror_url": upstream.url, "volatile": False})
    dump.register(archive.name, archive.version, "root/up", requires_python=">=3.6")
    entry = dump.add_file("releasefile", archive.name, archive.version,
                          "root/up/%s/%s/%s" % (archive.name, archive.version, archive.filename), archive.content,
                          "root/up", log=None)
    entry["entrymapping"]["url"] = "%s/files/%s/%s" % (upstream.host_url, archive.name, archive.filename)
    return entry


def test_files_of_a_mirror_are_not_fetched_again(make_server, dump, target, upstream):
    archive, newer = small(), small("2.0")
    for each in (archive, newer):
        upstream.publish(each)
    mirror_dump(dump, upstream, archive)
    server = served(make_server, dump, target)
    assert server.filenames("root/up", "lantern") == [archive.filename, newer.filename]
    assert server.fetch("root/up", archive.filename, "lantern") == archive.content
    assert upstream.count("*" + archive.filename) == 0
    assert server.fetch("root/up", newer.filename, "lantern") == newer.content
    assert upstream.count("*" + newer.filename) == 1


@pytest.mark.parametrize("url", [None, "", 5, "file:///etc/passwd", "mira/x.whl"])
def test_files_of_a_mirror_need_an_url(dump, target, upstream, url):
    mirror_dump(dump, upstream, small())["entrymapping"]["url"] = url
    result = dump.imported_here(target)
    assert result.returncode == 1 and "it has no url" in result.stderr


# -- beside what is there --------------------------------------------------------------------------


@pytest.fixture
def present(make_server, tmp_path):
    """A server directory in which alice/dev has a file, and indexes build on mira/dev; no server runs."""
    server = make_server(directory=tmp_path / "server")
    server.add_user("alice")
    server.add_index("alice/dev", bases=[])
    server.upload("alice/dev", small(name="candle"))
    server.stop()
    return server


def test_a_dump_is_added_to_what_is_there(present, dump, target):
    dump.add(small())
    before = rows(target, "SELECT max(serial) FROM changelog")[0][0]
    result = dump.imported(target, "--add")
    assert result.returncode == 0, result
    assert rows(target, "SELECT min(serial) > ?, count(*) FROM changelog", before + 1) == [(1, 1)]
    present.start()
    assert present.versions("alice/dev", "candle") == ["1.0"]
    assert present.versions("mira/dev", "lantern") == ["1.0"]
    assert present.fetch("mira/dev", small().filename, "lantern") == small().content
    assert present.post("/+login", {"user": "root", "password": "secret"}).status == 200
    (event,) = [each for each in audited(present) if each["action"] == "import"]
    assert event["target"] == str(dump.folder) and "1 index, 1 project, 1 release, 1 file" in event["detail"]
    eventually(lambda: "lantern" in present.get("/+search?query=lantern", headers={"Accept": HTML}).text)


def test_what_a_killed_import_left_is_not_in_the_way(present, dump, target):
    dump.add(small())
    folder = target / "tmp" / "intake" / small().sha256[:2]
    folder.mkdir(parents=True)
    (folder / ("%s.1-1" % small().sha256)).write_bytes(small().content[:50])     # in the middle of a copy
    (folder / small().sha256).write_bytes(b"cut by a crash")
    with contextlib.closing(sqlite3.connect(str(target / "tmp" / "dump.db"))) as db:
        db.execute("CREATE TABLE users (name)")
    result = dump.imported(target, "--add")
    assert result.returncode == 0, result
    assert [path.name for path in (target / "tmp").iterdir()] == []
    kept = target / "files" / small().sha256[:2]
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == {small().sha256: small().content}


def test_what_is_there_already_is_named_and_nothing_changes(present, dump, target):
    dump.data["users"]["alice"] = dict(dump.data["users"]["mira"], username="alice")
    dump.add_index("alice/dev")
    dump.add(small())
    before = rows(target, "SELECT count(*) FROM files")
    result = dump.imported(target, "--add")
    assert result.returncode == 1
    assert "users/alice: there is" in result.stderr and "indexes/alice/dev: there is" in result.stderr
    assert rows(target, "SELECT count(*) FROM files") == before
    assert rows(target, "SELECT count(*) FROM users WHERE name = 'mira'") == [(0,)]
    assert [path.name for path in (target / "tmp").iterdir()] == []
    assert not (target / "files" / small().sha256[:2] / small().sha256).exists()


def test_rows_of_an_index_that_is_here_already_are_left_out(present, dump, target):
    (there,) = {"/".join(row) for row in rows(
        target, "SELECT users.name, indexes.name FROM indexes JOIN users ON users.id = user_id") if row[0] != "root"}
    dump.data["devpi_lite"] = {"rows": [
        [kind, key, value] for place in (there, "mira/dev", "mira/gone") for kind, key, value in (
            ("gone", [place + "/+f/abc/def/x.whl"], {}),
            ("withdrawn", [place, "releasefile", "x.whl"], {"sha256": "0" * 64, "kept": 0}))]}
    result = dump.imported(target, "--add")
    assert result.returncode == 0 and "2 rows of indexes that are here already are left out" in result.stderr, result
    assert {place for place, in rows(target, "SELECT index_path FROM withdrawn")} == {"mira/dev", "mira/gone"}
    assert {path.partition("/+f")[0] for path, in rows(target, "SELECT path FROM gone")} == {"mira/dev", "mira/gone"}


def test_nothing_is_added_while_a_server_runs(present, dump, target):
    present.start()
    result = dump.imported(target, "--add")
    assert result.returncode == 1 and "server runs" in result.stderr


def test_nothing_can_be_added_to_nothing(dump, target):
    result = dump.imported(target, "--add")
    assert result.returncode == 1 and "no devpi_lite database" in result.stderr
    assert not target.exists()


def test_an_addition_says_that_root_and_its_mirror_stay(present, dump, target):
    dump.data["users"]["root"] = {"email": "root@example.org"}
    dump.add_index("root/pypi", {"type": "mirror", "mirror_url": "http://127.0.0.1:1/simple/", "volatile": False})
    result = dump.imported(target, "--add")
    assert result.returncode == 0, result
    assert result.stderr == "warning: root stays as it is here, with its password: the dump's is left out\n"
    assert config_of(target, "root/pypi")["mirror_url"] == "http://127.0.0.1:1/simple/"     # none was here

    dump.write()
    data = json.loads((dump.folder / "dataindex.json").read_text())
    data["users"], data["indexes"] = {"root": {}}, {"root/pypi": data["indexes"]["root/pypi"]}
    data["indexes"]["root/pypi"]["indexconfig"]["mirror_url"] = "http://127.0.0.1:2/simple/"
    (dump.folder / "dataindex.json").write_text(json.dumps(data))
    result = run_import(dump.folder, target, "--add")
    assert result.returncode == 0 and "warning: root/pypi stays as it is here: the dump's is left out" in result.stderr
    assert config_of(target, "root/pypi")["mirror_url"] == "http://127.0.0.1:1/simple/"


def test_a_type_to_leave_out_that_no_index_has_is_named(dump, target):
    result = dump.imported(target, "--skip-import-type", "mirrors", "--skip-import-type", "remote")
    assert result.returncode == 0
    assert "warning: --skip-import-type mirrors: the dump has no index of this type" in result.stderr
    dump.add_index("mira/sea", {"type": "mirror", "mirror_url": "http://127.0.0.1:1/simple/", "volatile": False})
    result = dump.imported(target.parent / "other", "--skip-import-type", "remote")
    assert result.returncode == 0 and "--skip-import-type" not in result.stderr
