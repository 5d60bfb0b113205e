"""Dumps of devpi, taken in: what is served afterwards is what devpi served."""

import collections
import contextlib
import hashlib
import io
import json
import zipfile

import pytest
from dumps import DATA, Dump, rows, run_import, small, unpacked
from harness import ANY, Server, documentation, sdist

import devpi_lite

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


# -- what thirteen real devpi-servers wrote, from 1.1 to 7 ----------------------------------------

REAL = sorted(path.name for path in DATA.glob("dump_of_devpi_*.*.zip"))


class Imported:
    """A dump of a real server, imported, and the facts that were put into that server."""

    def __init__(self, name, folder):
        self.folder = unpacked(name, folder / "dump")
        self.facts = json.loads((self.folder / "facts.json").read_text())
        self.result = run_import(self.folder / "export", folder / "server", "--no-root-pypi")
        assert self.result.returncode == 0, self.result
        self.directory = folder / "server"
        with contextlib.closing(devpi_lite.open_rows(str(self.directory))) as db:
            self.rows = collections.defaultdict(dict)
            for kind, key, value in devpi_lite.all_rows(db):
                self.rows[kind][key] = value
            self.cached = db.execute(
                "SELECT filename, sha256, size FROM files WHERE release_id IS NULL").fetchall()


@pytest.fixture(scope="module", params=REAL)
def real(request, tmp_path_factory):
    return Imported(request.param, tmp_path_factory.mktemp("real"))


def test_users_of_real_servers_keep_what_they_said(real):
    for name, facts in real.facts["users"].items():
        attributes = real.rows["user"][name,]["attributes"]
        assert {key: attributes[key] for key in facts} == facts


def test_users_of_real_servers_keep_their_passwords(real):
    assert set(real.facts["passwords"]) == {name for name, in real.rows["user"]}
    for name, password in real.facts["passwords"].items():
        stored = real.rows["user"][name,]["pwhash"]
        if stored.startswith("devpi_sha256:"):
            _, salt, digest = stored.split(":")
            assert hashlib.sha256(salt.encode() + password.encode()).hexdigest() == digest
        else:       # tests of logins check these
            assert devpi_lite.argon2_of(stored)


def test_indexes_of_real_servers_keep_their_options(real):
    indexes = dict(real.facts["indexes"])
    assert set(indexes) <= {"/".join(key) for key in real.rows["index"]}
    for path, facts in indexes.items():
        config = real.rows["index"][tuple(path.split("/"))]["config"]
        if real.facts["version"] == "2.6.1":
            facts.pop("title", None)        # which that version did not keep
        assert {key: config[key] for key in facts} == facts


def test_releases_and_files_of_real_servers_are_all_there(real):
    files = {key[:2] + (value["filename"],): value for key, value in real.rows["file"].items()}
    cached = {row["filename"]: row for row in real.cached}
    for path, projects in real.facts["releases"].items():
        key = tuple(path.split("/"))
        for project, versions in projects.items():
            for version, facts in versions.items():
                if path == "root/sea":
                    for filename, told in facts["files"].items():
                        assert (cached[filename]["sha256"], cached[filename]["size"]) == (told["sha256"], told["size"])
                    continue
                metadata = real.rows["release"][(*key, project, version)]["metadata"]
                for field, said in facts["metadata"].items():
                    assert metadata[field] == said or field in ("author", "description")
                for filename, told in facts["files"].items():
                    check_file(real, files, key, version, filename, told)
                if facts["docs"]:
                    docs = "%s-%s.doc.zip" % (project, version)
                    assert facts["docs"] == page_of(real.directory, files[key + (docs,)]["sha256"])


def page_of(directory, sha256):
    """The first page of a documentation zip."""
    with zipfile.ZipFile(io.BytesIO(blob(directory, sha256))) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("index.html")]
        return archive.read(name).decode()


def check_file(real, files, key, version, filename, told):
    value = files[key + (filename,)]
    assert (value["sha256"], value["size"], value["version"]) == (told["sha256"], told["size"], version)
    assert hashlib.sha256(blob(real.directory, value["sha256"])).hexdigest() == told["sha256"]
    if [entry["who"] for entry in value["history"]] != ["<import>"]:
        assert [[entry["what"], entry["who"]] for entry in value["history"]] == told["log"]
    (path,) = [each[2] for each, other in real.rows["file"].items() if other is value]
    results = [json.loads(blob(real.directory, other["sha256"])) for each, other in real.rows["file"].items()
               if other["kind"] == "toxresult" and each[:2] == key and other["for"] == path]
    exported = told["results"] if real.facts["version"][0] != "1" else []       # it left them out
    assert sorted(results, key=json.dumps) == sorted(exported, key=json.dumps)


def blob(directory, sha256):
    return (directory / "files" / sha256[:2] / sha256).read_bytes()


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
