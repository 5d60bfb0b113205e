"""Dumps that real devpi-servers of all times wrote, imported, and what is then shown of them.

How `tests/data/dump_of_devpi_VERSION.zip` were made, and what is in them, says
tests/data/make_devpi_dump.py.
"""

import hashlib
import io
import json
import pathlib
import zipfile

import pytest

from harness import Server, run_command

DUMPS = {path.stem.rpartition("_")[2]: path for path in sorted(
    (pathlib.Path(__file__).parent / "data").glob("dump_of_devpi_*.*.zip"))}


class Imported:
    """The server on what was imported, and the facts of the dump."""

    def __init__(self, folder, dump):
        with zipfile.ZipFile(dump) as archive:
            archive.extractall(folder)
        self.facts = json.loads((folder / "facts.json").read_text("utf-8"))
        self.release = tuple(int(part) for part in self.facts["version"].split(".")[:2])
        self.index = json.loads((folder / "export" / "dataindex.json").read_text("utf-8"))
        self.done = run_command("import", folder / "export", "--serverdir", folder / "server")
        self.server = Server(folder / "server", "--offline-mode")
        self.server.passwords.update(self.facts["passwords"])

    @property
    def releases(self):
        """(index, project, version, facts) of each."""
        return [(index, project, version, release)
                for index, projects in self.facts["releases"].items()
                for project, versions in projects.items()
                for version, release in versions.items()]

    @property
    def stages(self):
        """The same, but of what was uploaded alone."""
        return [row for row in self.releases if row[0] != "root/sea"]


@pytest.fixture(scope="module", params=list(DUMPS))
def imported(request, tmp_path_factory):
    imported = Imported(tmp_path_factory.mktemp("dump"), DUMPS[request.param])
    assert imported.done.returncode == 0, imported.done.stderr
    imported.server.start()
    yield imported
    assert imported.server.stop() == 0


def links(imported, index, project, version, rel):
    result = imported.server.get("/%s/%s/%s" % (index, project, version)).result
    return [link for link in result.get("+links", []) if link["rel"] == rel]


def content(imported, link):
    reply = imported.server.get(
        imported.server._path_of(link["href"]), headers={"Accept": "*/*"})
    assert reply.status == 200, reply
    return reply.body


def cheap(user):
    """Whether the password is checked at once, whatever libraries are there."""
    return "pwsalt" in user or "$m=8,t=1,p=1$" in user["pwhash"]


def test_who_is_in_there_logs_in_with_the_old_password(imported):
    for name, user in imported.index["users"].items():
        if cheap(user):
            for wrong in ("", "wrong"):
                reply = imported.server.post("/+login", {"user": name, "password": wrong})
                assert reply.status == 401, (name, reply)
            imported.server.login(name)


def test_who_is_in_there_says_of_themselves_what_they_said(imported):
    assert set(imported.server.get("/").result) == set(imported.index["users"])
    for name, facts in imported.facts["users"].items():
        shown = imported.server.get("/" + name).result
        assert facts.items() <= shown.items()
        assert not {"pwhash", "pwsalt", "+devpi"} & set(shown)


def test_indexes_are_configured_as_they_were(imported):
    for name, facts in imported.facts["indexes"].items():
        shown = imported.server.get("/" + name).result
        expected = dict({} if facts["type"] == "mirror" else {
            "mirror_whitelist": [], "mirror_whitelist_inheritance": "intersection"}, **facts)
        assert expected == {key: shown.get(key) for key in expected}, name
        # and nothing of other times is shown
        assert not {"pypi_whitelist", "project_inheritance_rules", "uploadtrigger_jenkins"} & set(shown)
        if facts["type"] == "mirror":
            assert not {"bases", "acl_upload"} & set(shown)


def test_each_index_has_its_projects_and_their_releases(imported):
    for index, projects in imported.facts["releases"].items():
        if index != "root/sea":
            assert set(imported.server.get("/" + index).result["projects"]) == set(projects)
            for project, versions in projects.items():
                reply = imported.server.get("/%s/%s?ignore_bases" % (index, project))
                assert set(reply.result) == set(versions), (index, project)


def test_releases_say_of_themselves_what_they_said(imported):
    for index, project, version, release in imported.stages:
        shown = imported.server.get("/%s/%s/%s" % (index, project, version)).result
        assert release["metadata"].items() <= shown.items(), (index, project, version)


def test_files_have_their_bytes_and_their_history(imported):
    for index, project, version, release in imported.releases:
        if index == "root/sea":
            continue
        found = links(imported, index, project, version, "releasefile")
        assert {link["href"].rpartition("/")[2] for link in found} == set(release["files"])
        for link in found:
            file = release["files"][link["href"].rpartition("/")[2]]
            assert link["hashes"]["sha256"] == file["sha256"]
            assert hashlib.sha256(content(imported, link)).hexdigest() == file["sha256"]
            if imported.release >= (2, 2):
                assert [[entry["what"], entry["who"]] for entry in link["log"]] == file["log"]


def test_documentation_is_there(imported):
    for index, project, version, release in imported.stages:
        found = [content(imported, link)
                 for link in links(imported, index, project, version, "doczip")]
        pages = [zipfile.ZipFile(io.BytesIO(docs)).read("index.html").decode() for docs in found]
        assert pages == ([release["docs"]] if release["docs"] else []), (index, project, version)


def test_results_are_of_the_files_that_were_tested(imported):
    """Before 2.0 devpi kept them apart, in a folder `attach` that no file of the dump names."""
    assert ("test results in attach/" in imported.done.stderr) == (imported.release < (2, 0))
    for index, project, version, release in imported.stages:
        tested = {file["sha256"][:3] + "/" + file["sha256"][3:16] + "/" + name: file["results"]
                  for name, file in release["files"].items() if file["results"]}
        found = {}
        for link in links(imported, index, project, version, "toxresult"):
            assert link["rel"] == "toxresult"
            found.setdefault(link["for_href"].partition("/+f/")[2], []).append(
                json.loads(content(imported, link)))
        if imported.release >= (2, 0):
            assert {path: sorted(results, key=repr) for path, results in found.items()} == {
                path: sorted(results, key=repr) for path, results in tested.items()}


def test_pages_list_what_pip_wants(imported):
    for index, projects in imported.facts["releases"].items():
        for project, versions in projects.items():
            files = {file["filename"]: file for file in imported.server.simple(index, project)["files"]}
            for release in versions.values():
                for name, facts in release["files"].items():
                    assert files[name]["hashes"] == {"sha256": facts["sha256"]}
                    assert files[name]["size"] == facts["size"]
                    assert imported.server.fetch(index, name, project)


def test_what_was_fetched_of_a_mirror_is_served_without_it(imported):
    if "root/sea" in imported.facts["releases"]:
        page = imported.server.simple("root/sea", "sealib")
        assert {file["filename"]: file.get("yanked", False) for file in page["files"]} == {
            "sealib-1.0-py3-none-any.whl": False,
            "sealib-1.1.tar.gz": "leaks" if imported.release >= (6, 0) else False}
        assert page["files"][0].get("requires-python", page["files"][1].get("requires-python")) == ">=2.7"
