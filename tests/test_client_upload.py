"""The client's uploads: of given archives and directories, of a project it builds, of documentation, of what is very large."""

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from client import Client, POSIX, clean_environment, manual
from harness import documentation, memory, new_index, rels, sdist, wheel

MIB = 1 << 20


def uploads(printed):
    """The lines on what was sent, or would have been."""
    return [line for line in printed.lines if "_upload of " in line]


# -- archives that are there


def test_given_archives_are_uploaded_with_the_metadata_that_they_hold(devpi, site, index):
    text = ("Metadata-Version: 2.1\nName: Given.Name\nVersion: 1.0\nSummary: What it is\nKeywords: one,two\n"
            "Home-page: https://example.org/\nAuthor: \u00c5sa\nLicense: MIT\nRequires-Python: >=3.6\nClassifier: A :: B\n"
            "Classifier: C :: D\nRequires-Dist: six\nProject-URL: Docs, https://example.org/docs\n"
            "Description-Content-Type: text/markdown\n\n# Long\n\nd\u00e9scription\n").encode()
    archives = [wheel("Given.Name", "1.0", metadata=text), sdist("Given.Name", "1.0", metadata=text)]
    printed = devpi("upload", *[devpi.save(archive) for archive in archives])
    assert uploads(printed) == ["file_upload of %s to %s/%s/" % (archive.filename, site.url, index) for archive in archives]
    for archive in archives:
        assert site.fetch(index, archive.filename, "given-name") == archive.content
    stored = site.get("/%s/given-name/1.0" % index).result
    assert {name: stored.get(name) for name in (
        "name", "version", "summary", "author", "home_page", "license", "requires_python", "classifiers", "project_urls",
        "description_content_type")} == {
        "name": "Given.Name", "version": "1.0", "summary": "What it is", "author": "\u00c5sa",
        "home_page": "https://example.org/", "license": "MIT", "requires_python": ">=3.6", "classifiers": ["A :: B", "C :: D"],
        "project_urls": ["Docs, https://example.org/docs"], "description_content_type": "text/markdown"}
    assert stored["description"].strip() == "# Long\n\nd\u00e9scription"
    assert stored["keywords"] in ("one,two", ["one", "two"])


def test_the_form_is_what_package_indexes_take(devpi, site, index, gate):
    """As receivers of the legacy upload form read it: one part per value, the digest, the file last and unchanged."""
    from receiver import Receiver
    sink = Receiver().start()
    try:
        devpi.sign_in(site, "alice", "alice/dev", url=sink.url)
        archives = [wheel("form", "1.0", tag="cp311-cp311-manylinux_2_17_x86_64", requires_dist=["a", "b"]),
                    sdist("form", "1.0"), wheel("form", "2.0", tag="py2.py3-none-any")]
        devpi("upload", *[devpi.save(archive) for archive in archives])
        requests = {request.files["content"][0]: request for request in sink.requests if request.method == "POST"}
        for archive, filetype, pyversion in zip(archives, ("bdist_wheel", "sdist", "bdist_wheel"), ("3.11", "source", "2.7")):
            request = requests[archive.filename]
            assert request.path == "/alice/dev/" and request.files == {"content": (archive.filename, archive.content)}
            for name, value in [(":action", "file_upload"), ("protocol_version", "1"), ("filetype", filetype),
                                ("pyversion", pyversion), ("name", "form"), ("version", archive.version),
                                ("sha256_digest", archive.sha256), ("summary", "A test package")]:
                assert request.field(name) == value
            assert request.parts[-1][0] == "content" and "None" not in sum(request.fields.values(), [])
            assert int(request.headers["Content-Length"]) == len(request.body)
        assert requests[archives[0].filename].fields["requires_dist"] == ["a", "b"]
    finally:
        sink.stop()


def test_the_archives_of_a_directory_are_uploaded_all_or_the_newest(devpi, site, index):
    for version in ("1.0", "1.9", "1.10"):
        devpi.save(wheel("many", version), "tree/" + version)
        devpi.save(documentation("many", version, "of " + version), "tree")
    devpi.write("tree/notes.txt", "no archive")
    assert "tree: is a directory but --from-dir not specified" in devpi("upload", "tree", expect=1)
    assert "path does not exist: nope.whl" in devpi("upload", "nope.whl", expect=1)
    devpi("upload", "--from-dir", "--only-latest", "tree")
    assert site.versions(index, "many") == ["1.10"] and manual(site, index + "/many/1.10") == "of 1.10"
    sent = uploads(devpi("upload", "--from-dir", "tree"))
    assert [line.split()[0] for line in sent] == ["file_upload"] * 3 + ["doc_upload"] * 3
    assert sorted(site.versions(index, "many")) == ["1.0", "1.10", "1.9"]
    assert manual(site, index + "/many/1.9") == "of 1.9"


def test_documentation_is_recognised_by_its_name(devpi, site, index):
    """Without a version it goes to the newest release; a tar file is packed anew as the zip that servers take."""
    site.upload(index, wheel("docs", "1.0"))
    packed = devpi.home / "docs-1.1.docs.tgz"
    tree = devpi.write("html/index.html", "<p>of 1.1")
    devpi.write("html/sub/page.html", "<p>a page")
    with tarfile.open(str(packed), "w:gz") as archive:
        archive.add(str(tree.parent), arcname=".")
    printed = devpi("upload", packed, devpi.save(documentation("docs", None, "of the newest")))
    assert "repackaged docs-1.1.docs.tgz to docs-1.1.doc.zip" in printed.lines
    assert manual(site, index + "/docs/1.1") == "<p>of 1.1" and rels(site, index + "/docs/1.1") == ["doczip"]
    assert site.get("/%s/docs/1.1/+doc/sub/page.html?raw" % index, headers={"Accept": "text/html"}).text == "<p>a page"
    assert site.filenames(index, "docs") == ["docs-1.0-py3-none-any.whl"]
    devpi("upload", devpi.save(documentation("unreleased", None)), expect=1)


def test_what_can_not_be_an_upload_is_named_and_the_rest_goes_on(devpi, site, index):
    """Broken archives, names that lie, and files that are none."""
    good = devpi.save(wheel("good", "1.0"), "mixed")
    content = wheel("other", "1.0").content
    for name in ("text-1.0.zip", "broken-1.0-py3-none-any.whl", "broken-1.0.tar.gz"):
        (devpi.home / "mixed" / name).write_bytes(b"these are no bytes of an archive")
    (devpi.home / "mixed" / "empty-1.0.tar.gz").write_bytes(b"")
    (devpi.home / "mixed" / "liar-1.0-py3-none-any.whl").write_bytes(content)
    (devpi.home / "mixed" / "other-9.9-py3-none-any.whl").write_bytes(content)
    with zipfile.ZipFile(str(devpi.home / "mixed" / "bare-1.0.zip"), "w") as archive:
        archive.writestr("bare-1.0/readme", "no metadata")
    printed = devpi("upload", *sorted((devpi.home / "mixed").iterdir()), expect=1)
    said = printed + printed.errors
    for name in ("text-1.0.zip", "broken-1.0-py3-none-any.whl", "broken-1.0.tar.gz", "empty-1.0.tar.gz", "bare-1.0.zip",
                 "liar-1.0-py3-none-any.whl", "other-9.9-py3-none-any.whl"):
        assert any(name in line and "_upload of " not in line for line in said.splitlines()), (name, said)
    assert "bare-1.0.zip: does not contain PKGINFO, skipping" in said
    assert site.get("/" + index).result["projects"] == ["good"] and good.exists()


def test_nothing_is_sent_by_a_dry_run(devpi, site, index, gate):
    devpi.sign_in(site, "alice", index, url=gate.url)
    archives = [wheel("dry", "1.0"), sdist("dry", "1.0")]
    printed = devpi("upload", "--dry-run", *[devpi.save(archive) for archive in archives])
    assert uploads(printed) == ["skipped: file_upload of %s to %s/%s/" % (archive.filename, gate.url, index)
                                for archive in archives]
    assert gate.count("POST") == 0 and site.get("/" + index).result["projects"] == []


def test_a_non_volatile_index_refuses_other_content(devpi, site):
    index = new_index(site, "alice", volatile=False)
    first, other = (wheel("fixed", "1.0", summary=summary) for summary in ("first", "other"))
    devpi("upload", "--index", index, devpi.save(first))
    devpi("upload", "--index", index, devpi.save(first))
    url = "%s/%s/" % (site.url, index)
    printed = devpi("upload", "--index", index, devpi.save(other, "other"), expect=1)
    assert printed.lines[:3] == [
        "409 FAIL file_upload of %s to %s" % (first.filename, url), first.filename + " already exists in non-volatile index",
        "POST to %s FAILED" % url]


def test_what_is_there_already_can_be_skipped(devpi, site):
    """A job that is run again: the same files, a file of the same name that a new build made, and new ones."""
    index = new_index(site, "alice", volatile=False)
    same, rebuilt, fresh = wheel("again", "1.0"), sdist("again", "1.0"), wheel("again", "1.1")
    for archive in (same, sdist("again", "1.0", summary="built before")):
        site.upload(index, archive)
    paths = [devpi.save(archive) for archive in (same, rebuilt, fresh)]
    printed = devpi("upload", "--index", index, "--skip-existing", *paths)
    assert "skipped, exists: " + same.filename in printed.lines
    (told,) = [line for line in printed.lines if "skipped, exists with other content: " + rebuilt.filename in line]
    assert "needs a new version" in told and rebuilt.sha256[:12] in told
    assert "1 uploaded, 2 skipped (1 with other content)" in printed.lines
    assert sorted(site.versions(index, "again")) == ["1.0", "1.1"]
    assert site.fetch(index, rebuilt.filename, "again") != rebuilt.content
    printed = devpi("upload", "--index", index, "--skip-existing", "--json", *paths)
    assert {file["file"]: (file["message"], "sha256_there" in file) for file in printed.json()["files"]} == {
        same.filename: ("exists", False), fresh.filename: ("exists", False),
        rebuilt.filename: ("exists with other content", True)}


def test_what_another_job_has_sent_meanwhile_is_skipped_too(devpi, site, index, gate):
    """The index had nothing when it was asked, and refuses the file all the same."""
    devpi.sign_in(site, "alice", index, url=gate.url)
    first, second = wheel("racing", "1.0"), wheel("racing", "1.1")
    gate.fault("POST /" + index, "answer", times=1, status=409)
    printed = devpi("upload", "--skip-existing", devpi.save(first), devpi.save(second))
    assert any(first.filename in line and "skipped, exists" in line for line in printed.lines), printed
    assert site.versions(index, "racing") == ["1.1"]


def test_a_mirror_takes_no_uploads_and_a_stranger_may_not(devpi, site, index):
    path = devpi.save(wheel("refused", "1.0"))
    printed = devpi("upload", "--index", "root/pypi", path, expect=1)
    assert {"The current index URL does not support upload.", "Most likely, it is a mirror."} <= set(printed.lines)
    stranger = "stranger-to-" + index.partition("/")[2]
    site.add_user(stranger)
    devpi.sign_in(site, stranger, index)
    printed = devpi("upload", path, expect=1)
    assert printed.lines[0] == "403 FAIL file_upload of refused-1.0-py3-none-any.whl to %s/%s/" % (site.url, index)


def test_several_uploads_go_side_by_side(devpi, site, index):
    """And the documentation last."""
    names = ["side%d" % number for number in range(6)]
    paths = [devpi.save(wheel(name, "1.0")) for name in names] + [devpi.save(documentation("side0", "1.0"))]
    printed = devpi("upload", "--jobs", "4", *paths)
    assert len(uploads(printed)) == 7 and uploads(printed)[-1].startswith("doc_upload")
    assert site.get("/" + index).result["projects"] == names and rels(site, index + "/side0/1.0")[-1] == "doczip"


@pytest.mark.parametrize("fault, arguments", [("reset", {}), ("drop", {}), ("cut", {"after": 20000})])
def test_a_connection_that_breaks_is_tried_again(devpi, site, index, gate, fault, arguments):
    devpi.sign_in(site, "alice", index, url=gate.url)
    archive = wheel("again", "1.0", size=200000)
    gate.fault("POST /%s/" % index, fault, times=1, **arguments)
    devpi("upload", devpi.save(archive))
    assert site.fetch(index, archive.filename, "again") == archive.content and gate.count("POST") == 2


@pytest.mark.skipif(not POSIX, reason="needs a pseudo terminal")
def test_progress_is_shown_on_a_terminal_alone(devpi, index, gate):
    """While the file is on its way, not only at the end: it is held up for longer than until the bar is drawn again."""
    devpi.sign_in(gate.server, "alice", index, url=gate.url)
    gate.fault("POST ", "late", times=1, seconds=0.5)
    path = devpi.save(wheel("progress", "1.0", size=20 * MIB))
    with devpi.terminal("upload", path) as terminal:
        assert terminal.wait() == 0
    assert re.search(r"\r\[#*\.+\] uploading +[1-9]\d?% of 21 MB", terminal.shown)
    for options in (["--no-progress"], ["-q"]):
        with devpi.terminal("upload", *options, path) as terminal:
            assert terminal.wait() == 0
        assert "%" not in terminal.shown
    assert "\r" not in devpi("upload", path)


# -- a project that is built


BACKEND = '''
import io, os, tarfile, zipfile
def build_sdist(directory, config_settings=None):
    with tarfile.open(os.path.join(directory, "%(stem)s.tar.gz"), "w:gz") as archive:
        for name in sorted(set(os.listdir(".")) - {"dist", "build", ".git"}):
            archive.add(name, "%(stem)s/" + name)
        entry = tarfile.TarInfo("%(stem)s/PKG-INFO")
        entry.size = len(METADATA)
        archive.addfile(entry, io.BytesIO(METADATA.encode()))
    return "%(stem)s.tar.gz"
def build_wheel(directory, config_settings=None, metadata_directory=None):
    if os.path.exists("broken"):
        raise SystemExit("this project does not build")
    info = "%(stem)s.dist-info/"
    with zipfile.ZipFile(os.path.join(directory, "%(stem)s-py3-none-any.whl"), "w") as wheel:
        wheel.write("hello_pkg.py")
        wheel.writestr(info + "METADATA", METADATA)
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "")
    return "%(stem)s-py3-none-any.whl"
METADATA = "Metadata-Version: 2.1\\nName: hello-pkg\\nVersion: %(version)s\\nSummary: A project\\nRequires-Python: >=3.8\\n"
'''


def write_project(directory, version="1.0", settings=""):
    """A project that needs nothing to build: its backend lies beside it."""
    shutil.rmtree(str(directory / "__pycache__"), ignore_errors=True)       # of a backend of the same second and size
    (directory / "docs").mkdir(parents=True, exist_ok=True)
    for name, text in {
            "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n' + settings,
            "backend.py": BACKEND % {"stem": "hello_pkg-" + version, "version": version},
            "hello_pkg.py": "version = %r\n" % version,
            "docs/conf.py": "", "docs/index.rst": "The manual"}.items():
        (directory / name).write_text(text)
    return directory


@pytest.fixture
def project(devpi):
    return write_project(devpi.home / "project")


# Stands in the place of Sphinx: `sphinx-build ... SOURCE OUTPUT` makes one page.
SPHINX = """import pathlib, sys
source, output = map(pathlib.Path, sys.argv[-2:])
output.mkdir(parents=True, exist_ok=True)
(output / "index.html").write_text("<p>" + (source / "index.rst").read_text())
"""

WHEEL, SDIST, DOCS = "hello_pkg-1.0-py3-none-any.whl", "hello_pkg-1.0.tar.gz", "hello-pkg-1.0.doc.zip"
# Builds in this interpreter, which has no `build`: nothing is installed, nothing fetched.
BUILD = ["upload", "--no-isolation", "-p", sys.executable]


def git_add(directory):
    for words in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git"] + words, cwd=str(directory), env=clean_environment(directory), check=True)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_project_is_built_from_what_is_under_version_control(devpi, site, index, project):
    """In a copy, so that nothing else gets in; also from a directory below the root of the checkout."""
    devpi.write("top.txt", "beside the project")
    (project / ".gitignore").write_text("dist/\n")
    git_add(devpi.home)
    (project / "untracked.txt").write_text("not for others")
    path = devpi.add_command("sphinx-build", SPHINX)
    printed = devpi(*BUILD, "--with-docs", cwd=project, PATH=path)
    url = "%s/%s/" % (site.url, index)
    assert uploads(printed) == ["file_upload of %s to %s" % (WHEEL, url), "file_upload of %s to %s" % (SDIST, url),
                                "doc_upload of %s to %s" % (DOCS, url)]
    assert sorted(path.name for path in (project / "dist").iterdir()) == [DOCS, WHEEL, SDIST]
    with tarfile.open(str(project / "dist" / SDIST)) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert "hello_pkg.py" in names and not {"untracked.txt", "top.txt"} & set(names)
    assert "not under version control, so left out: untracked.txt" in printed.lines
    assert manual(site, index + "/hello-pkg/1.0") == "<p>The manual"
    assert site.get("/%s/hello-pkg/1.0" % index).result["requires_python"] == ">=3.8"


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_copy_is_faithful(devpi, site, index, project):
    """Modes and links of files, and the repository's own data, by which some projects find their version."""
    (project / "tool").write_text("#!/bin/sh")
    (project / "tool").chmod(0o755)
    (project / "link").symlink_to("tool")
    (project / "deleted.txt").write_text("gone before the upload")
    (project / "\u00e9 name.txt").write_text("odd")
    git_add(project)
    (project / "deleted.txt").unlink()
    backend = (project / "backend.py").read_text()
    (project / "backend.py").write_text("import os\nassert os.path.isdir('.git')\n" + backend)
    printed = devpi(*BUILD, "--sdist", cwd=project)
    assert "left out" not in printed
    assert any(line.startswith("copied repo .git to ") for line in printed.lines)
    with tarfile.open(str(project / "dist" / SDIST)) as archive:
        members = {member.name.partition("/")[2]: member for member in archive}
    assert members["tool"].mode & 0o111 and members["link"].linkname == "tool" and "\u00e9 name.txt" in members
    (project / "backend.py").write_text("import os\nassert not os.path.isdir('.git')\n" + backend)
    devpi(*BUILD, "--sdist", "--setupdir-only", cwd=project)


def test_settings_in_setup_cfg(devpi, site, index, project):
    devpi.write("project/setup.cfg", "[devpi:upload]\nformats = bdist_wheel\nno-vcs = 1\n")
    devpi(*BUILD, cwd=project)
    assert site.filenames(index, "hello-pkg") == [WHEEL]
    devpi.write("project/setup.cfg", "[devpi:upload]\nwheel = perhaps\n")
    assert "perhaps" in devpi(*BUILD, cwd=project, expect=1)


def test_a_dry_run_builds_and_leaves_dist_alone(devpi, site, index, project):
    kept = devpi.write("project/dist/kept.txt", "of before")
    printed = devpi(*BUILD, "--no-vcs", "--dry-run", cwd=project)
    assert uploads(printed) == ["skipped: file_upload of %s to %s/%s/" % (name, site.url, index) for name in (WHEEL, SDIST)]
    assert kept.exists() and devpi("list") == ""


def test_a_build_that_fails_shows_why_and_keeps_what_was_built_before(devpi, site, index, project):
    kept = devpi.write("project/dist/kept.txt", "of before")
    (project / "broken").write_text("")
    printed = devpi(*BUILD, "--no-vcs", "--wheel", cwd=project, expect=1)
    assert "this project does not build" in printed + printed.errors and kept.exists()
    empty = devpi.home / "empty"
    empty.mkdir()
    assert devpi(*BUILD, "--no-vcs", cwd=empty, expect=1)
    assert devpi("list") == ""


def test_the_command_line_and_the_project_choose_what_is_built(devpi, site, index, project):
    devpi(*BUILD, "--no-vcs", "--sdist", cwd=project)
    assert site.filenames(index, "hello-pkg") == [SDIST]
    assert [path.name for path in (project / "dist").iterdir()] == [SDIST]
    write_project(project, "1.1", settings="[tool.devpi.upload]\nwheel = true\nno-vcs = true\n")
    printed = devpi(*BUILD, cwd=project)
    assert "Got wheel=True from pyproject.toml [tool.devpi.upload]." in printed.lines
    assert [path.name for path in (project / "dist").iterdir()] == ["hello_pkg-1.1-py3-none-any.whl"]
    write_project(project, "1.1", settings="[tool.devpi.upload]\nwheel = 'yes'\n")
    assert "Got non-boolean 'yes' for 'wheel', use true or false." in devpi(*BUILD, cwd=project, expect=1)
    devpi.write("project/setup.cfg", "[devpi:upload]\nwheel = 1\n")
    assert "Got configuration in pyproject.toml and setup.cfg, choose one." in devpi(*BUILD, cwd=project, expect=1)


def test_documentation_alone(devpi, site, index, project):
    assert "command not found: sphinx-build" in devpi(*BUILD, "--no-vcs", "--only-docs", cwd=project, expect=1,
                                                      PATH="/nonexistent")
    path = devpi.add_command("sphinx-build", SPHINX)
    devpi(*BUILD, "--no-vcs", "--only-docs", cwd=project, PATH=path)
    assert rels(site, index + "/hello-pkg/1.0") == ["doczip"] and manual(site, index + "/hello-pkg/1.0") == "<p>The manual"


# -- very large files


def large_wheel(path, size):
    """Writes a wheel of about that many bytes."""
    name, version = path.name.split("-")[:2]
    small = wheel(name, version)
    info = "%s-%s.dist-info/" % (name, version)
    piece = hashlib.sha256(b"piece").digest() * (MIB // 32)
    with zipfile.ZipFile(str(path), "w", zipfile.ZIP_STORED) as archive:
        with archive.open(name + "/data.bin", "w", force_zip64=True) as member:
            for _ in range(size // MIB + 1):
                member.write(piece)
        archive.writestr(info + "METADATA", small.metadata)
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")


def forget_peak(pid):
    """The most memory that the process had counts from now on."""
    Path("/proc/%d/clear_refs" % pid).write_text("5")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux shows it")
def test_memory_does_not_grow_with_the_file(tmp_path, site):
    upload_large(tmp_path, site, 300 * MIB)


def upload_large(tmp_path, server, size):
    """Uploads a wheel of that size and reads it back, watching the memory of the client and of the server."""
    index = new_index(server, "alice")
    devpi = Client(tmp_path / "home").sign_in(server, "alice", index)
    devpi("upload", devpi.save(wheel("warm", "1.0", size=12 * MIB)))         # what a server of any age has allocated
    path = devpi.home / "large-1.0-py3-none-any.whl"
    large_wheel(path, size)
    forget_peak(server.pid)
    before = memory(server)
    printed, peak = devpi.with_peak_memory("upload", path)
    assert uploads(printed) == ["file_upload of %s to %s/%s/" % (path.name, server.url, index)]
    (file,) = server.simple(index, "large")["files"]
    assert file["size"] == path.stat().st_size > size
    path.unlink()
    assert peak < 60 * MIB, "the client's peak: %.1f MiB" % (peak / MIB)
    growth = memory(server, peak=True) - before
    assert growth < 5 * MIB, "the server's growth: %.1f MiB" % (growth / MIB)
    devpi("remove", "-y", "large")
