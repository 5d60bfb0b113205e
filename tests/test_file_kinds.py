"""What the files of an index are and say of themselves: versions, hashes, times, addresses, and files that are no archives."""

import hashlib
import itertools
import json
import sqlite3
from urllib.parse import quote, urljoin

import pytest

import harness
import scripted
from harness import SIMPLE_JSON, Server, links, new_index, wheel
from scripted import Scripted


class Listing(Scripted):
    """An upstream of pages as a test writes them, in JSON or HTML, and of files."""

    def file(self, filename, data=b"bytes"):
        """Publishes bytes; returns the fields of a page's entry for them."""
        self.answers["/files/" + filename] = data
        return {"filename": filename, "url": self.host_url + "/files/" + quote(filename),
                "hashes": {"sha256": hashlib.sha256(data).hexdigest()}}

    json = Scripted.page

    def html(self, project, *entries):
        links = "".join('<a href="%s#%s">%s</a>' % (
            each["url"], "&amp;".join("%s=%s" % pair for pair in each["hashes"].items()), each["filename"])
            for each in entries)
        self.answers["/simple/%s/" % project] = ("<!DOCTYPE html><html><body>%s</body></html>" % links).encode()


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """One server for this file."""
    server = Server(tmp_path_factory.mktemp("kinds") / "data", "--request-timeout", 3).start()
    server.add_user("mia")
    yield server
    server.stop()


@pytest.fixture
def listing():
    listing = Listing()
    yield listing
    listing.stop()


@pytest.fixture
def mirror(here, listing):
    return scripted.mirror(here, listing.url)


@pytest.fixture
def stage(here):
    return new_index(here, "mia")


def page(server, index, project="demo", accept=SIMPLE_JSON):
    reply = harness.page(server, index, project, accept)
    assert reply.status == 200, reply.text
    return reply.json() if accept == SIMPLE_JSON else reply.text


def only_file(server, index, project="demo"):
    file, = page(server, index, project)["files"]
    return file


def fetch(server, index, url, project="demo", accept="*/*"):
    return server.get(urljoin("/%s/+simple/%s/" % (index, project), url), headers={"Accept": accept})


# -- versions


@pytest.mark.parametrize("form", ["json", "html"])
def test_a_mirror_states_the_versions_that_old_file_names_have(here, listing, mirror, form):
    filenames = ["suds-py3-1.0.zip", "suds-py3-1.1.win32-py2.5.exe", "suds_py3-1.2-py2.6-macosx-10.3-fat.egg",
                 "suds-py3-1.3-1.src.rpm", "suds_py3-1.4-py3-none-any.whl"]
    getattr(listing, form)("suds-py3", *map(listing.file, filenames))
    assert sorted(page(here, mirror, "suds-py3")["versions"]) == ["1.0", "1.1", "1.2", "1.3", "1.4"]
    assert sorted(here.get("/%s/suds-py3" % mirror).result) == ["1.0", "1.1", "1.2", "1.3", "1.4"]
    for version in ("1.0", "1.3"):
        assert here.get("/%s/suds-py3/%s" % (mirror, version)).result["version"] == version
    assert sorted(here.get("/%s/+pypi/suds-py3/json" % mirror).json()["releases"]) == ["1.0", "1.1", "1.2", "1.3", "1.4"]


def test_an_old_release_can_be_pushed_from_a_mirror(here, listing, mirror, stage):
    listing.json("suds-py3", listing.file("suds-py3-1.0.zip"))
    pushed = here.post("/" + mirror, {"name": "suds-py3", "version": "1.0", "targetindex": stage}, user="mia")
    assert pushed.status == 200
    assert here.versions(stage, "suds-py3") == ["1.0"]


def test_upstreams_spelling_of_a_version_makes_no_second_one(here, listing, mirror):
    listing.json("demo", listing.file("demo-3.3-rc.tar.gz"), versions=["3.3rc0", "2.0"])
    assert page(here, mirror)["versions"] == ["2.0", "3.3rc0"]
    assert sorted(here.get("/%s/+pypi/demo/json" % mirror).json()["releases"]) == ["2.0", "3.3-rc"]


def test_a_version_that_was_read_wrongly_once_is_mended_by_the_next_page(here, listing, mirror):
    entry = listing.file("demo-1.0.win32-py2.5.exe")
    listing.json("demo", entry)
    assert page(here, mirror)["versions"] == ["1.0"]
    assert list(here.get("/%s/demo" % mirror).result) == ["1.0"]      # it is stored
    with sqlite3.connect(str(here.directory / "devpi_lite.db")) as database:
        assert database.execute("UPDATE files SET version = '1.0.win32' WHERE url = ?", (entry["url"],)).rowcount == 1
    database.close()
    assert here.post("/%s/+simple/demo/refresh" % mirror).status in (200, 302)
    assert page(here, mirror)["versions"] == ["1.0"]
    assert list(here.get("/%s/demo" % mirror).result) == ["1.0"]


# -- variants, new wheels


VARIANTS = json.dumps({"default-priorities": {"namespace": ["x86_64"]}, "variants": {"x86_64_v3": {"x86_64": {"level": ["v3"]}}}}).encode()


class Plain:
    """A file to upload that is no archive."""

    def __init__(self, filename, content, name="demo", version="1.0"):
        self.filename, self.content = filename, content
        self.fields = {"name": name, "version": version, "filetype": "sdist", "pyversion": "source"}
        self.md5, self.sha256 = hashlib.md5(content).hexdigest(), hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("form", ["json", "html"])
def test_a_mirror_passes_lists_of_variants_on(here, listing, mirror, form):
    filenames = ["big_demo-1.1-cp313-cp313-linux_x86_64-x86_64_v3.whl", "big_demo-1.1-variants.json", "big_demo-9.9-variants.json"]
    entries = [dict(listing.file(name, VARIANTS), **({"size": len(VARIANTS)} if form == "json" else {})) for name in filenames]
    getattr(listing, form)("big-demo", *entries)
    shown = page(here, mirror, "big-demo")
    assert shown["versions"] == ["1.1"]
    files = {file["filename"]: file for file in shown["files"]}
    assert set(files) == set(filenames)
    found = files["big_demo-1.1-variants.json"]
    assert found["hashes"] == {"sha256": hashlib.sha256(VARIANTS).hexdigest()} and found.get("size") in (len(VARIANTS), None)
    for accept in ("*/*", "application/json"):      # which asks for the facts about an archive
        reply = fetch(here, mirror, found["url"], "big-demo", accept)
        assert (reply.status, reply.body, reply.headers["Content-Type"]) == (200, VARIANTS, "application/json")
    assert ">big_demo-1.1-variants.json</a>" in page(here, mirror, "big-demo", "text/html")
    assert list(here.get("/%s/big-demo" % mirror).result) == ["1.1"]
    assert [file["filename"] for file in here.get("/%s/+pypi/big-demo/json" % mirror).json()["urls"]] == filenames[:1]


def test_other_files_that_are_no_archives_make_no_versions(here, listing, mirror):
    filenames = ["demo-1.0.tar.gz", "demo-2.0.tar.gz.asc", "demo-3.0.txt", "demo-4.0-variants.json", "demo-5.0.json"]
    listing.json("demo", *map(listing.file, filenames))
    assert page(here, mirror)["versions"] == ["1.0"]
    assert [file["filename"] for file in page(here, mirror)["files"]] == filenames
    assert list(here.get("/%s/demo" % mirror).result) == ["1.0"]
    assert list(here.get("/%s/+pypi/demo/json" % mirror).json()["releases"]) == ["1.0"]


def test_a_push_from_a_mirror_takes_the_list_of_variants_along(here, listing, mirror, stage):
    archive = wheel("demo", "1.0")
    listing.json("demo", listing.file(archive.filename, archive.content), listing.file("demo-1.0-variants.json", VARIANTS))
    assert here.post("/" + mirror, {"name": "demo", "version": "1.0", "targetindex": stage}, user="mia").status == 200
    assert sorted(here.filenames(stage, "demo")) == sorted([archive.filename, "demo-1.0-variants.json"])


def test_a_stage_takes_lists_of_variants(here, stage):
    archive = wheel("demo", "1.0")
    assert here.upload(stage, archive).status == 200
    assert here.upload(stage, Plain("demo-1.0-variants.json", VARIANTS)).status == 200
    assert here.filenames(stage, "demo") == [archive.filename, "demo-1.0-variants.json"]
    assert here.fetch(stage, "demo-1.0-variants.json", "demo") == VARIANTS
    assert here.versions(stage, "demo") == ["1.0"]
    found = links(here, "%s/demo/1.0" % stage)
    assert [link["href"].rpartition("/")[2] for link in found] == [archive.filename, "demo-1.0-variants.json"]


@pytest.mark.parametrize("filename, content, said", [
    ("demo-1.0-variants.json", b"{", "no JSON object"), ("demo-1.0-variants.json", b"[]", "no JSON object"),
    ("demo-1.0-variants.json", b'{"variants": []}', "no JSON object"), ("demo-1.0-variants.json", b"[" * 100000, "no JSON object"),
    ("demo-1.0-variants.json", b'{"variants": {}, "n": ' + b"1" * 100000 + b"}", None),
    ("demo-1.0-variants.json", b"\xff\xfe", "no JSON object"), ("demo-1.1-variants.json", VARIANTS, "does not contain version"),
    ("other-1.0-variants.json", VARIANTS, "not a valid archive name"), ("demo-1.0.json", VARIANTS, "not a valid archive name"),
    ("demo-1.0-py3-none-any.whlx", b"PK", "not a valid archive name"),      # a draft without a settled format
    ("demo-1.0-variants.json", b" " * (1 << 20) + VARIANTS, "is larger than")])
def test_what_is_no_list_of_variants_is_refused(here, stage, filename, content, said):
    reply = here.upload(stage, Plain(filename, content))
    assert (reply.status in (400, 413) and said in reply.text) if said else reply.status == 200


def test_new_kinds_of_wheels_of_html_pages_are_kept(here, listing, mirror):
    listing.html("demo", listing.file("demo-1.0-py3-none-any.whlx"))
    assert page(here, mirror)["versions"] == ["1.0"]
    assert fetch(here, mirror, only_file(here, mirror)["url"]).body == b"bytes"


def test_the_python_of_a_wheel_with_the_label_of_a_variant_is_stated(here, listing, mirror):
    filenames = ["demo-1.0-cp313-cp313-linux_x86_64-null.whl", "demo-1.0-1-cp313-cp313-linux_x86_64.whl",
                 "demo-1.0-1-cp313-cp313-linux_x86_64-x86_64_v3.whl", "demo-1.0-cp313-cp313-linux_x86_64.whl"]
    listing.json("demo", *(listing.file(name, name.encode()) for name in filenames))
    shown = here.get("/%s/+pypi/demo/json" % mirror).json()["urls"]
    assert [file["python_version"] for file in shown] == ["cp313"] * 4


# -- hashes


def digests(data, *algorithms):
    return {algorithm: hashlib.new(algorithm, data).hexdigest() for algorithm in algorithms}


def test_a_file_that_fits_the_weaker_of_two_hashes_only_is_refused(here, listing, mirror):
    hashes = {**digests(b"bytes", "md5"), "sha512": "0" * 128}
    listing.json("demo", dict(listing.file("demo-1.0.tar.gz"), hashes=hashes))
    shown = only_file(here, mirror)
    assert shown["hashes"] == {"sha512": "0" * 128}
    assert fetch(here, mirror, shown["url"]).status == 502


@pytest.mark.parametrize("algorithm", ["md5", "sha512", None])
def test_pages_state_the_sha256_of_files_that_are_here(here, listing, mirror, algorithm):
    announced = digests(b"bytes", algorithm) if algorithm else {}
    listing.json("demo", dict(listing.file("demo-1.0.tar.gz"), hashes=announced))
    shown = only_file(here, mirror)
    assert shown["hashes"] == announced
    fragment = "#%s=%s" % (algorithm, announced[algorithm]) if algorithm else '"'
    assert "demo-1.0.tar.gz" + fragment in page(here, mirror, accept="text/html")
    assert fetch(here, mirror, shown["url"]).body == b"bytes"
    assert only_file(here, mirror) == {**shown, "hashes": {**announced, **digests(b"bytes", "sha256")}, "size": 5}
    assert "demo-1.0.tar.gz#sha256=%s" % digests(b"bytes", "sha256")["sha256"] in page(here, mirror, accept="text/html")


# -- upload times


@pytest.mark.parametrize("stated, shown", [
    ("2024-01-02T03:04:05.123456Z", "2024-01-02T03:04:05.123456Z"), ("2024-01-02T03:04:05Z", "2024-01-02T03:04:05.000000Z"),
    ("2024-01-02T03:04:05+00:00", "2024-01-02T03:04:05.000000Z"), ("2024-01-02T03:04:05.5-05:30", "2024-01-02T08:34:05.500000Z"),
    ("2024-01-01T00:30:00+0100", "2023-12-31T23:30:00.000000Z"), ("2024-01-02T03:04:05+02", "2024-01-02T01:04:05.000000Z"),
    ("2024-01-02T03:04:05.123456789Z", "2024-01-02T03:04:05.123456Z"), ("2024-01-02T03:04:05.1234567+00:00", "2024-01-02T03:04:05.123456Z"),
    ("2024-01-02t03:04:05z", "2024-01-02T03:04:05.000000Z"), ("2024-01-02 03:04:05.25", "2024-01-02T03:04:05.250000Z"),
    ("2024-01-02T03:04Z", "2024-01-02T03:04:00.000000Z"), ("2024-01-02T03:04:05,5Z", "2024-01-02T03:04:05.500000Z"),
    ("2024-01-02T03:04:05", "2024-01-02T03:04:05.000000Z")])
def test_an_upload_time_is_read_in_every_spelling(here, listing, mirror, stated, shown):
    listing.json("demo", dict(listing.file("demo-1.0.tar.gz"), **{"upload-time": stated}))
    file = only_file(here, mirror)
    assert file["upload-time"] == shown and "_upload-time-source" not in file


@pytest.mark.parametrize("stated", [
    "", "yesterday", 5, 1.5, True, [], "2024-13-02T03:04:05Z", "2024-01-02", "2024-01-02T03:04:61Z", "2024-01-02T03:04:05+99:00",
    "0001-01-01T00:00:00+05:00", "9999-12-31T23:59:59-05:00", "1969-12-31T23:59:59Z", "2024-01-02T03:04:05." + "1" * 200 + "Z",
    "\u0662024-01-02T03:04:05Z"])
def test_what_is_no_upload_time_counts_as_none(here, listing, mirror, stated):
    listing.json("demo", dict(listing.file("demo-1.0.tar.gz"), **{"upload-time": stated}))
    file = only_file(here, mirror)
    assert file["_upload-time-source"] == "first-seen" and file["upload-time"] > "2026"


def test_odd_upload_times_are_logged_once_for_a_host(here, listing, mirror):
    odd = itertools.cycle(["2024-01-02T03:04:05", "soon", "2024-01-02T03:04:05Z"])
    listing.json("demo", *(dict(listing.file("demo-1.%d.tar.gz" % n), **{"upload-time": next(odd)}) for n in range(30)))
    assert len(page(here, mirror)["files"]) == 30
    lines = [line for line in here.whole_output().splitlines() if "states upload times" in line and listing.host_url in line]
    assert len(lines) == 2
    assert "taken for UTC: 2024-01-02T03:04:05" in lines[0] and "taken for absent: 'soon'" in lines[1]


# -- addresses


@pytest.mark.parametrize("kind", ["stage", "mirror"])
def test_epochs_and_local_versions_stand_as_they_are_in_addresses(here, listing, mirror, stage, kind):
    archive, index = wheel("demo", "1!2.0+local.1"), mirror if kind == "mirror" else stage
    if kind == "mirror":
        listing.json("demo", dict(listing.file(archive.filename, archive.content), url="../../files/" + quote(archive.filename)))
    else:
        assert here.upload(index, archive).status == 200
    url = only_file(here, index)["url"]
    assert url.endswith("/demo-1!2.0+local.1-py3-none-any.whl")
    assert "demo-1!2.0+local.1-py3-none-any.whl#sha256=" in page(here, index, accept="text/html")
    for spelling in (url, url.replace("!", "%21"), url.replace("+local", "%2Blocal"), url.replace("!", "%21").replace("+", "%2b")):
        assert fetch(here, index, spelling).body == archive.content
        assert fetch(here, index, spelling + ".metadata").body == archive.metadata
    version = "/%s/demo/1!2.0+local.1" % index
    for spelling in (version, version.replace("!", "%21"), version.replace("+", "%2B")):
        link, = here.get(spelling).result["+links"]
        assert link["href"].endswith("/demo-1!2.0+local.1-py3-none-any.whl")
    assert here.get("/%s/+pypi/demo/json" % index).json()["urls"][0]["url"].endswith("/demo-1!2.0+local.1-py3-none-any.whl")
    assert here.versions(index, "demo") == ["1!2.0+local.1"]
    if kind == "stage":
        assert here.delete(urljoin("/%s/+simple/demo/" % index, url).replace("!", "%21"), user="mia").status == 200
