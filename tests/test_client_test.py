"""The client's `devpi test`: releases are fetched, verified, unpacked with care, tested by tox, and the results posted.

A program of ours stands in the place of tox: it notes how it was called, and writes the report that it is told to.
"""

import io
import json
import os
import re
import tarfile

import pytest

from client import Client, Gate, POSIX, file_url
from harness import Archive, new_index, rels, sdist, wheel, zipped

pytestmark = pytest.mark.skipif(not POSIX, reason="its tox is an executable script")

TOX_INI = b"[tox]\nenv_list = py\n"
TOX = """if True:
    import json, os, sys
    here = os.path.dirname(os.path.abspath(__file__))
    def option(name):
        return sys.argv[sys.argv.index(name) + 1]
    archive = option("--installpkg")
    config = option("-c")
    with open(os.path.join(here, "calls"), "a") as calls:
        calls.write(json.dumps({
            "arguments": sys.argv[1:], "directory": os.getcwd(), "files": sorted(os.listdir(".")),
            "config": open(config).read(), "archive": os.path.basename(archive), "size": os.path.getsize(archive),
            "indexes": [os.environ.get(name) for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")],
            "secrets": [name for name in os.environ if name in ("DEVPI_PASSWORD", "DEVPI_TOKEN")]}) + "\\n")
    print("tox runs")
    plan = json.load(open(os.path.join(here, "plan"))).get(os.path.basename(archive), {})
    code = plan.get("code", 0)
    if plan.get("report", True):
        test = [{"command": ["pytest"], "output": "of the tests", "retcode": code}]
        with open(option("--result-json"), "w") as report:
            json.dump({"reportversion": "1", "toxversion": "4.0", "platform": sys.platform, "host": "here", "testenvs": {
                "py": {"python": {"version": "3.11.7 (main)"}, "setup": [dict(test[0], retcode=0)], "test": test}}}, report)
    sys.exit(code)"""


class ToxUser(Client):
    """A client with alice logged in, and the stand-in for tox on its PATH."""

    def prepare(self, site, index):
        self.environment["PATH"] = self.add_command("tox", TOX)
        self.plan()
        return self.sign_in(site, "alice", index)

    def plan(self, **archives):
        """What becomes of the tests of which file: {"file name": {"code": exit code, "report": whether it is written}}."""
        self.write("bin/plan", json.dumps(archives))

    def calls(self):
        """How tox was called since the last time that this was asked."""
        path = self.home / "bin" / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        self.write("bin/calls", "")
        return [json.loads(line) for line in lines]


@pytest.fixture
def devpi(tmp_path, site, index):
    return ToxUser(tmp_path / "home").prepare(site, index)


def upload(site, index, *archives):
    for archive in archives:
        assert site.upload(index, archive).status == 200
    return [file_url(site, index, archive) for archive in archives]


def source(name, version, **members):
    """An sdist with a tox.ini, unless `members` say otherwise."""
    members = {path.replace("__", "."): text for path, text in members.items()} or {"tox.ini": TOX_INI}
    return sdist(name, version, extra_members=members)


def assert_posted(printed, url):
    lines = printed.lines
    assert lines[lines.index("posting tox result data to " + url) + 1] == "success"


def test_an_sdist_is_tested_and_the_result_posted(devpi, site, index):
    archive = source("tested", "1.0")
    upload(site, index, source("tested", "0.9"))
    (url,) = upload(site, index, archive)
    printed = devpi("test", "-e", "py311", "tested")
    (call,) = devpi.calls()
    arguments = call["arguments"]
    assert call["archive"] == archive.filename and call["size"] == len(archive.content)
    assert "--recreate" in arguments and "-epy311" in arguments and call["config"] == TOX_INI.decode()
    assert {"tox.ini", "PKG-INFO", "pyproject.toml"} <= set(call["files"]) and call["directory"].endswith("tested-1.0")
    assert call["indexes"] == ["%s/%s/+simple/" % (site.url, index)] * 3, "the tests need no login to read it"
    assert not call["secrets"]
    assert "tox runs" in printed.lines and any(line.startswith("received http://") for line in printed.lines)
    assert any(line.startswith("unpacking ") for line in printed.lines)
    assert_posted(printed, url)
    token = site.tokens["alice"]
    assert token not in printed + printed.errors and not any(token in argument for argument in arguments)
    assert rels(site, index + "/tested/1.0") == ["releasefile", "toxresult"]
    assert devpi("list", "-t", "tested").lines[1].endswith("3.11.7 tests passed")
    assert not os.path.exists(call["directory"])


def test_which_files_are_tested(devpi, site, index):
    """The sdist, and wheels for every platform; with -s what matches, and nothing else. An sdist has the tests in any case."""
    archives = [source("chosen", "1.0"), wheel("chosen", "1.0"), wheel("chosen", "1.0", tag="cp311-cp311-linux_x86_64")]
    urls = upload(site, index, *archives)
    printed = devpi("test", "-l", "--detox", "chosen")
    assert printed.lines[-3:] == ["would test:", "   " + urls[0], "   " + urls[1]] and not devpi.calls()
    assert "only universal wheels supported, found " + archives[2].filename in printed.lines
    printed = devpi("test", "chosen==1.0")
    assert [call["archive"] for call in devpi.calls()] == [archives[0].filename, archives[1].filename]
    for url in urls[:2]:
        assert_posted(printed, url)
    assert "   " + urls[2] == devpi("test", "--list", "--select", "cp311", "chosen").lines[-1]
    devpi("test", "-s", "cp311.*whl$", "--no-upload", "chosen")
    (call,) = devpi.calls()
    assert call["archive"] == archives[2].filename and "tox.ini" in call["files"]
    upload(site, index, wheel("bare", "1.0"))
    assert "need at least one sdist distribution" in devpi("test", "bare", expect=1)
    assert "could not find/receive links for chosen>9" in devpi("test", "chosen>9", expect=1)
    assert "could not find/receive links for nosuch" in devpi("test", "nosuch", expect=1)


def test_files_of_one_version_in_two_spellings_are_tested_together(devpi, site, index):
    archives = [source("spelled", "3.0.0rc1"), wheel("spelled", "3.0.0-rc.1")]
    upload(site, index, *archives)
    devpi("test", "--no-upload", "spelled")
    assert [call["archive"] for call in devpi.calls()] == [archive.filename for archive in archives]


def test_failures_are_posted_and_the_rest_is_still_tested(devpi, site, index):
    archives = [source("fails", "1.0"), wheel("fails", "1.0")]
    urls = upload(site, index, *archives)
    devpi.plan(**{archives[0].filename: {"code": 3}})
    printed = devpi("test", "fails", expect=1)
    assert "tox command failed 3" in printed.lines and len(devpi.calls()) == 2
    for url in urls:
        assert_posted(printed, url)
    shown = devpi("list", "-f", "fails").lines
    assert shown[0] == urls[1] and shown[1].endswith("tests passed") and shown[3].endswith("tests failed")
    assert shown[4:6] == ["    FAIL: pytest", "    of the tests"]


def test_no_report_is_nothing_to_post(devpi, site, index):
    archive = source("silent", "1.0")
    upload(site, index, archive)
    for plan, said in [({"code": 254, "report": False}, "tox wrote no result file, nothing posted"),
                       ({"code": 2}, "tox command failed 2")]:
        devpi.plan(**{archive.filename: plan})
        printed = devpi("test", "silent", expect=1)
        assert said in printed and "posting" not in printed.replace("nothing posted", "")
    devpi.plan()
    assert "posting" not in devpi("test", "--no-upload", "silent")
    assert rels(site, index + "/silent/1.0") == ["releasefile"]


def test_several_projects_are_tested_each_by_itself(devpi, site, index):
    """One that fails, in whatever place, fails the whole."""
    archives = [source("first", "1.0"), source("second", "1.0"), source("third", "1.0")]
    upload(site, index, *archives)
    devpi.plan(**{archives[1].filename: {"code": 1}})
    printed = devpi("test", "first", "second", "third", expect=1)
    calls = devpi.calls()
    assert [call["archive"] for call in calls] == [archive.filename for archive in archives]
    assert len({call["directory"] for call in calls}) == 3 and printed.lines.count("success") == 3
    devpi("test", "first", "nosuch", "third", "--no-upload", expect=1)
    report = devpi("test", "--json", "first", "second", expect=1)
    assert "second" in json.dumps(report.json())


def test_the_configuration_is_found_or_given(devpi, site, index):
    upload(site, index, source("by-pyproject", "1.0", pyproject__toml=b"[tool.tox]\nin = 'pyproject'\n"),
           source("by-setup", "1.0", setup__cfg=b"[tox:tox]\nin = setup.cfg\n"),
           source("by-nothing", "1.0", setup__cfg=b"[metadata]\n"))
    devpi("test", "--no-upload", "by-pyproject", "by-setup")
    assert ["pyproject" in call["config"] or "in = setup.cfg" in call["config"] for call in devpi.calls()] == [True, True]
    printed = devpi("test", "--no-upload", "by-nothing", expect=1)
    assert "no tox.ini/pyproject.toml/setup.cfg file found in " in printed and not devpi.calls()
    devpi.write("other.ini", "[tox]\nmine = 1\n")
    devpi("test", "--no-upload", "--fallback-ini", devpi.home / "other.ini", "by-nothing", "by-setup")
    assert [("mine" in call["config"]) for call in devpi.calls()] == [True, False]
    devpi("test", "--no-upload", "-c", "other.ini", "--tox-args", "-x 'a b=1' --workdir=w", "by-setup")
    (call,) = devpi.calls()
    assert "mine" in call["config"] and call["arguments"][-3:] == ["-x", "a b=1", "--workdir=w"]
    assert "file does not exist: " in devpi("test", "-c", "nope.ini", "by-setup", expect=1)


def test_without_tox_it_says_so(devpi, site, index):
    upload(site, index, source("alone", "1.0"))
    (devpi.home / "bin" / "tox").unlink()
    printed = devpi("test", "alone", expect=1, PATH=str(devpi.home / "bin"))
    assert "no tox binary found" in printed or "No module named tox" in printed


def test_tox_comes_from_the_virtual_environment_or_is_a_module(devpi, site, index):
    upload(site, index, source("placed", "1.0"))
    devpi.add_command("tox", TOX, "venv/bin")
    devpi.write("venv/bin/plan", "{}")
    devpi("test", "--no-upload", "placed", VIRTUAL_ENV=devpi.home / "venv")
    assert not devpi.calls() and (devpi.home / "venv" / "bin" / "calls").exists()
    devpi.write("modules/tox/__init__.py", "")
    devpi.write("modules/tox/__main__.py", TOX.replace("if True:", "if __name__ == '__main__':", 1))
    devpi.write("modules/tox/plan", "{}")
    process = devpi.start("test", "--no-upload", "placed", PATH="/nonexistent", PYTHONPATH=devpi.home / "modules")
    process.communicate()
    assert process.returncode == 0 and (devpi.home / "modules" / "tox" / "calls").exists()


def test_a_download_that_breaks_off_is_begun_again(devpi, site, index):
    gate = Gate(site)
    try:
        upload(site, index, source("broken-off", "1.0"))
        devpi.sign_in(site, "alice", index, url=gate.url)
        gate.fault("GET /%s/+f/" % index, "truncate", times=1, after=600)
        devpi("test", "--no-upload", "broken-off")
        assert gate.count("GET /%s/+f/" % index) == 2 and len(devpi.calls()) == 1
    finally:
        gate.close()


def test_results_may_be_refused(devpi, site):
    index = new_index(site, "alice", acl_toxresult_upload=["root"])
    upload(site, index, source("refused", "1.0"))
    printed = devpi("test", "--index", index, "refused", expect=1)
    assert "No permission to upload tox results. You can use the devpi test --no-upload option to skip the upload." in printed
    devpi("test", "--index", "%s/%s" % (site.url, index), "--no-upload", "refused")
    assert [call["indexes"][0].endswith(index + "/+simple/") for call in devpi.calls()] == [True, True]


def test_a_restricted_release_is_fetched_with_the_session(devpi, site):
    index = new_index(site, "alice", acl_pkg_read=["alice"])
    (url,) = upload(site, index, source("closed", "1.0"))
    printed = devpi("test", "--index", index, "closed")
    assert_posted(printed, url)
    assert "received " + url.replace("://", "://alice:****@") in printed.lines or "received " + url in printed.lines
    (call,) = devpi.calls()
    for index_url in call["indexes"]:
        assert re.fullmatch(r"http://alice:[^@]+@127\.0\.0\.1:\d+/%s/\+simple/" % index, index_url)


# -- what could do harm


def packed(name, *members):
    """A .tar.gz of (name, content or TarInfo attributes); a str as content is a text."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w:gz") as archive:
        for path, what in members:
            entry = tarfile.TarInfo(path)
            if isinstance(what, dict):
                for attribute, value in what.items():
                    setattr(entry, attribute, value)
                header = entry.tobuf(archive.format)        # addfile() wants the content of what says that it has some
                archive.fileobj.write(header)
                archive.offset += len(header)
            else:
                entry.size = len(what)
                archive.addfile(entry, io.BytesIO(what.encode()))
    return Archive(name + "-1.0.tar.gz", plain.getvalue(), name, "1.0", b"", {})


FORM = {"name": "hostile", "version": "1.0", "filetype": "sdist", "pyversion": "source", "metadata_version": "2.1"}
PKG_INFO = "Metadata-Version: 2.1\nName: hostile\nVersion: 1.0\n"
SYMLINK, HARDLINK = {"type": tarfile.SYMTYPE}, {"type": tarfile.LNKTYPE}
HOSTILE = {
    "parent": [("../outside.txt", "x")],
    "deep": [("hostile-1.0/a/../../../outside.txt", "x")],
    "absolute": [("%(outside)s/outside.txt", "x")],
    "symlink": [("hostile-1.0/link", dict(SYMLINK, linkname="%(outside)s")), ("hostile-1.0/link/outside.txt", "x")],
    "relative-symlink": [("hostile-1.0/link", dict(SYMLINK, linkname="../..")), ("hostile-1.0/link/outside.txt", "x")],
    "hardlink": [("hostile-1.0/link", dict(HARDLINK, linkname="%(outside)s/victim")), ("hostile-1.0/link", "x")],
    "device": [("hostile-1.0/device", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})],
    "pipe": [("hostile-1.0/tox.ini", {"type": tarfile.FIFOTYPE})],
}


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_an_archive_that_reaches_out_of_its_directory_is_refused(devpi, site, index, kind):
    """A server that we trust would not have taken it: another one stands before it here."""
    outside = devpi.home / "outside"
    devpi.write("outside/victim", "untouched")
    members = [("hostile-1.0/tox.ini", TOX_INI.decode())] if kind != "pipe" else []
    for path, what in HOSTILE[kind]:
        what = {name: value % {"outside": outside} if name == "linkname" else value
                for name, value in what.items()} if isinstance(what, dict) else what
        members.append((path % {"outside": outside}, what))
    printed = offer(devpi, site, index, packed("hostile", *members))
    assert "hostile-1.0.tar.gz" in printed or "outside" in printed or "hostile-1.0/" in printed
    assert sorted(path.name for path in outside.iterdir()) == ["victim"]
    assert (outside / "victim").read_text() == "untouched" and not list(devpi.home.rglob("outside.txt"))
    assert not devpi.calls(), "tox was started in it"


def offer(devpi, site, index, archive, claimed=None, good=None):
    """Has the client test the archive in place of `good`; the server says that it has the hash of `claimed` (else its own)."""
    good = good or source("hostile", "1.0")
    assert site.upload(index, good, fields=FORM).status == 200
    gate = Gate(site)
    try:
        devpi.sign_in(site, "alice", index, url=gate.url)
        reply = site.get("/%s/hostile" % index)
        project = reply.text.replace(good.sha256, (claimed or archive).sha256).replace(site.url, gate.url).replace(
            good.md5, (claimed or archive).md5)
        for path in ("/%s/hostile" % index, "/%s/hostile/" % index):
            gate.fault("GET %s" % path, "answer", body=project.encode(), headers={
                "Content-Type": "application/json", "X-DEVPI-API-VERSION": "2"})
        gate.fault("GET /%s/+f/" % index, "answer", body=archive.content, headers={"Content-Type": "application/x-gzip"})
        return devpi("test", "--no-upload", "hostile", expect=1, TMPDIR=devpi.write("tmp/keep", "").parent)
    finally:
        gate.close()


def test_a_zip_that_reaches_out_of_its_directory_is_refused(devpi, site, index):
    members = ("hostile-1.0/PKG-INFO", PKG_INFO), ("hostile-1.0/tox.ini", TOX_INI)
    good, hostile = (
        Archive("hostile-1.0.zip", zipped(*members, (other, "x")), "hostile", "1.0", b"", {})
        for other in ("hostile-1.0/inside.txt", "../outside.txt"))
    offer(devpi, site, index, hostile, good=good)
    assert not list(devpi.home.rglob("outside.txt")) and not devpi.calls()
    devpi.sign_in(site, "alice", index)
    devpi("test", "--no-upload", "hostile")
    (call,) = devpi.calls()
    assert {"tox.ini", "inside.txt"} <= set(call["files"]) and call["archive"] == "hostile-1.0.zip"


def test_an_archive_that_would_fill_the_disk_is_refused(devpi, site, index):
    """By the sizes that it states, before any of it is written."""
    bomb = packed("hostile", ("hostile-1.0/tox.ini", TOX_INI.decode()), ("hostile-1.0/zeros", {"size": 1 << 42}))
    assert "hostile-1.0.tar.gz unpacks to too much" in offer(devpi, site, index, bomb) and not devpi.calls()


def test_a_file_that_is_not_what_its_hash_says_is_not_touched(devpi, site, index):
    printed = offer(devpi, site, index, source("other", "1.0"), claimed=source("hostile", "1.0"))
    assert re.search("(?i)sha256|hash|checksum", printed) and not devpi.calls()
    assert [path.name for path in (devpi.home / "tmp").iterdir()] == ["keep"]


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"\x1f\x8b\x08\x00cut off"], ids=["empty", "text", "cut"])
def test_a_broken_archive_is_named(devpi, site, index, content):
    archive = Archive("hostile-1.0.tar.gz", content, "hostile", "1.0", b"", {})
    assert "hostile-1.0.tar.gz" in offer(devpi, site, index, archive)
    assert not devpi.calls() and [path.name for path in (devpi.home / "tmp").iterdir()] == ["keep"]


def test_links_inside_an_archive_are_fine(devpi, site, index):
    """And so is a directory that spells the name in its own way."""
    archive = packed("hostile", ("Hostile-1.0/tox.ini", TOX_INI.decode()), ("Hostile-1.0/deep/file", "x"),
                     ("Hostile-1.0/link", dict(SYMLINK, linkname="deep/file")), ("Hostile-1.0/PKG-INFO", PKG_INFO))
    assert site.upload(index, archive, fields=FORM).status == 200
    devpi("test", "--no-upload", "hostile")
    (call,) = devpi.calls()
    assert {"deep", "link", "tox.ini"} <= set(call["files"])
