"""Chapter 1: names, versions, file names, core metadata, hashes, times; the pages of other indexes (chapter 7)."""

import pathlib
import random
import time

import pytest

import devpi_lite as d

ORDER = ("not a version", "zebra", "1.0.dev1", "1.0a1.dev1", "1.0a1", "1.0b2", "1.0rc1", "1.0", "1.0+abc", "1.0+abc.5", "1.0+5",
         "1.0.post1.dev0", "1.0.post1", "1.1", "1.10", "2!0.1")


@pytest.mark.parametrize("name, normal", [("Foo._Bar", "foo-bar"), ("a--b", "a-b"), ("simple", "simple"), ("A.B", "a-b")])
def test_names_have_one_normal_form(name, normal):
    assert d.normalize(name) == normal


def test_versions_sort_as_pep_440_says():
    assert sorted(reversed(ORDER), key=d.version_key) == list(ORDER)


@pytest.mark.parametrize("text, normal", [
    ("1.0", "1.0"), ("v1.0-RC1", "1.0rc1"), ("1.0-1", "1.0.post1"), ("1!2.0.Alpha", "1!2.0a0"), ("1.0+Ubuntu_1", "1.0+ubuntu.1"),
    ("1.0.dev", "1.0.dev0"), ("2020a-x", "2020a-x")])
def test_versions_have_one_normal_spelling(text, normal):
    assert d.canonical_version(text) == normal


@pytest.mark.parametrize("one, other, same", [("1.0", "1.0.0", True), ("1.0", "1.0.post0", False), ("x", "x", True), ("1.0+a-1", "1.0+a.1", True)])
def test_versions_compare_by_pep_440(one, other, same):
    assert d.same_version(one, other) is same


def test_a_version_of_absurd_length_is_no_version():
    assert d.parse_version("1" * 100000) is None


def real_file_names():
    """(project, version, file name) of the corpus; its head says where the versions come from."""
    project = None
    for line in (pathlib.Path(__file__).parent / "data" / "file_names.txt").read_text(encoding="ascii").splitlines():
        if line.startswith("== "):
            project = line[3:]
        elif not line.startswith("#"):
            version, _, filenames = line.partition(":")
            yield from ((project, version, filename) for filename in filenames.split())


def test_the_versions_of_thousands_of_real_file_names():
    rows = list(real_file_names())
    assert len(rows) > 5000 and len({project for project, _, _ in rows}) > 900
    assert [(filename, d.version_of_file(filename, project), version) for project, version, filename in rows
            if d.version_of_file(filename, project) != version] == []


def test_real_file_names_are_read_without_the_project_too():
    """All but one, whose version is of an old form that only the project's name sets apart."""
    wrong = [filename for _, version, filename in real_file_names() if d.version_of_file(filename) != version]
    assert wrong == ["elementtree-1.2.7-20070827-preview.zip"]


@pytest.mark.parametrize("filename, project, version", [
    # wheels
    ("foo-1.0-py3-none-any.whl", "foo", "1.0"), ("foo-1.0-1-py3-none-any.whl", "foo", "1.0"),
    ("foo_bar-1.0+local.1-cp312-cp312-win_amd64.whl", "foo-bar", "1.0+local.1"), ("foo-1.0-py3-none-any.whlx", "foo", "1.0"),
    ("foo-1.0-cp313-cp313-linux_x86_64-x86_64_v3.whl", "foo", "1.0"), ("foo-1.0-any.whl", "foo", ""),
    # source archives, in old and new spellings
    ("foo-bar-1.0.tar.gz", "foo-bar", "1.0"), ("Foo.Bar-1.0rc1.zip", "foo-bar", "1.0rc1"), ("foo-latest.zip", "foo", "latest"),
    ("Foo__Bar.-baz-1.0.tar.gz", "foo-bar-baz", "1.0"), ("foo-1.0-beta-2.tar.gz", "foo", "1.0-beta-2"),
    ("foo-2.0-r1.zip", "foo", "2.0-r1"), ("foo-1.0-1.tar.gz", "foo", "1.0-1"), ("foo-1!2.0.tar.gz", "foo", "1!2.0"),
    ("foo-1.0+ubuntu-1.tar.gz", "foo", "1.0+ubuntu-1"), ("foo-1.0+ubuntu_1.tar.gz", "foo", "1.0+ubuntu_1"),
    ("foo-v1.0.zip", "foo", "v1.0"), ("foo-r1234.tar.gz", "foo", "r1234"), ("foo-dev-20080811.tar.gz", "foo", "dev-20080811"),
    ("foo-1.0-src.zip", "foo", "1.0"), ("foo-1.0-SNAPSHOT.tar.gz", "foo", "1.0-SNAPSHOT"), ("foo--1.0.zip", "foo", "1.0"),
    ("foo_1.0.zip", "foo", "1.0"), ("foo-1.0.TAR.GZ", "foo", "1.0"), ("foo-1.0.tar.Z", "foo", "1.0"),
    # names that hold what else is a version, a Python or a platform
    ("foo-2-1.0.tar.gz", "foo-2", "1.0"), ("python-2to3-1.0.tar.gz", "python-2to3", "1.0"), ("pywin32-214.zip", "pywin32", "214"),
    ("suds-py3-1.4.5.0.tar.gz", "suds-py3", "1.4.5.0"), ("foo-py2.7-1.0.zip", "foo-py2-7", "1.0"),
    ("python-linux-procfs-0.6.tar.gz", "python-linux-procfs", "0.6"), ("my-macosx-tool-2.0.tar.gz", "my-macosx-tool", "2.0"),
    ("foo-win-amd64-2.0.zip", "foo-win-amd64", "2.0"), ("win32-foo-1.0.zip", "foo", "1.0"), ("foo-win32-1.0.exe", "foo", "1.0"),
    # eggs, installers, dumb archives, packages of systems
    ("foo-1.0-py2.7.egg", "foo", "1.0"), ("foo-py3-1.0-py3.9.egg", "foo-py3", "1.0"), ("foo_py3-1.0-py3.9.egg", "foo-py3", "1.0"),
    ("foo-0.6a1dev_r5442-py2.5-linux-i686.egg", "foo", "0.6a1dev-r5442"), ("foo-latest-py2.7.egg", "foo", "latest"),
    ("foo-1.0.win32.exe", "foo", "1.0"), ("foo-1.3.0.win32-py2.5.exe", "foo", "1.3.0"), ("foo-1.0.amd64.exe", "foo", "1.0"),
    ("foo-1.0.win-amd64-py2.7.msi", "foo", "1.0"), ("foo-1.0-win32-superpack-python2.7.exe", "foo", "1.0"),
    ("foo-1.0.linux-x86_64.tar.gz", "foo", "1.0"), ("foo-1.0.darwin-9.2.0-Power_Macintosh.tar.gz", "foo", "1.0"),
    ("foo-1.0.macosx-10.9-x86_64.dmg", "foo", "1.0"), ("foo-1.0-py2.5-macosx10.5.mpkg.zip", "foo", "1.0"),
    ("foo-1.0-1.noarch.rpm", "foo", "1.0"), ("foo-1.0-1.src.rpm", "foo", "1.0"), ("foo-1.0-1.fc20.x86_64.rpm", "foo", "1.0"),
    ("foo-1.0_beta_2-1.src.rpm", "foo", "1.0-beta-2"), ("foo-1.0.dev3-1.src.rpm", "foo", "1.0.dev3"),
    ("python-foo_1.0-1_all.deb", "python-foo", "1.0"), ("python-foo_1.0-1_all.deb", "foo", "1.0"),
    ("foo_1.0~rc1-0ubuntu1_amd64.deb", "foo", "1.0rc1"), ("foo-1.0.bz2", "foo", "1.0"),
    ("foo-1.0.tar.gz.zip", "foo", "1.0"), ("foo-1.0.win32.exe.ZIP", "foo", "1.0"),
    # none
    ("nodash.tar.gz", "nodash", ""), ("foo-.tar.gz", "foo", ""), ("---.zip", "", ""), ("libfoo.win32-py2.7.msi", "libfoo", ""),
    ("foo-1.0-variants.json", "foo", ""), ("foo-1.0.tar.gz.asc", "foo", ""), ("foo-1.0.txt", "foo", ""), ("foo-1.0", "foo", "")])
def test_the_version_of_a_file_stands_in_its_name(filename, project, version):
    assert d.version_of_file(filename, project) == version


@pytest.mark.parametrize("filename, python, kind", [
    ("foo-1.0-py2.7.egg", "2.7", "bdist_egg"), ("foo-1.0.win32-py2.5.exe", "2.5", "bdist_wininst"),
    ("suds-py3-1.1.win32-py2.5.exe", "2.5", "bdist_wininst"), ("suds_py3-1.1-py3.9.egg", "3.9", "bdist_egg"),
    ("suds-py3-1.1-py3.9.egg", "3.9", "bdist_egg"), ("suds-py3-1.1.win32.exe", "any", "bdist_dumb"),
    ("suds-py3-1.1.tar.gz", "source", "sdist"), ("foo-1.0-cp312-cp312-win_amd64.whl", "3.12", "bdist_wheel"),
    ("foo-1.0-cp312-cp312-win_amd64-x86_64_v3.whl", "3.12", "bdist_wheel"),
    ("foo-1.0-1-cp312-cp312-win_amd64.whl", "3.12", "bdist_wheel")])
def test_the_python_of_an_upload_stands_behind_the_name(filename, python, kind):
    assert d.upload_kind(filename) == (python, kind)


def test_hostile_file_names_are_read_in_no_time():
    began = time.process_time()
    for hostile in ("-_." * 80, "a-" * 120, "-1" * 120, ".win32" * 40, "-py3" * 60, "linux" * 50, "1.0-" * 60):
        for number in range(20):
            for project in ("", "a", "a-" * 100 + "a"):
                d.version_of_file(f"{hostile}{number}.tar.gz", project)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("name, safe", [
    ("foo-1.0.tar.gz", True), ("..", False), ("a/b", False), ("a\\b", False), ("a\nb", False), ("", False), ("x" * 256, False), ("\u00e4.whl", True)])
def test_a_file_name_is_safe_or_refused(name, safe):
    assert d.is_safe_filename(name) is safe


def test_core_metadata_is_read_in_devpis_spelling():
    data = ("Metadata-Version: 2.4\nName: Foo\nVersion: 1.0\nClassifier: A\nClassifier: B\nProvides-Extra: x\nLicense-File: L\n"
            "Project-URL: Home, https://x\nAuthor: \u00c4rger\nSummary: UNKNOWN\nImport-Name: foo\n\nThe body.\n").encode()
    fields = d.parse_core_metadata(data)
    assert (fields["classifiers"], fields["provides_extras"], fields["license_file"]) == (["A", "B"], ["x"], ["L"])
    assert (fields["author"], fields["summary"], fields["import_name"]) == ("\u00c4rger", "", ["foo"])
    assert fields["project_urls"] == ["Home, https://x"] and fields["description"].strip() == "The body."


@pytest.mark.parametrize("hashes, spec", [
    ({"md5": "0" * 32, "sha256": "a" * 64}, "sha256=" + "a" * 64), ({"md5": "F" * 32}, "md5=" + "f" * 32), ({"sha256": "zz"}, ""),
    ({"../../x": "a" * 64}, ""), ({}, ""), ({"md5": "0" * 32, "sha512": "A" * 128}, "sha512=" + "a" * 128),
    ({"sha512": "0" * 128, "sha256": "a" * 64}, "sha256=" + "a" * 64), ({"md5": "0" * 32, "sha512": "a" * 127}, "md5=" + "0" * 32)])
def test_the_best_sound_hash_is_kept(hashes, spec):
    assert d.best_hash(hashes) == spec


def test_of_several_hashes_the_strongest_is_kept():
    order = ["sha256", "sha512", "sha384", "blake2b", "sha3_512", "sha3_256", "blake2s", "sha224", "sha1", "md5"]
    hashes = {algorithm: "0" * (d.hashlib.new(algorithm).digest_size * 2) for algorithm in order}
    for position, algorithm in enumerate(order):
        for others in (order[position:], order[:position - 1 if position else None:-1]):     # in any order of the page
            assert d.best_hash({other: hashes[other] for other in others}).partition("=")[0] == algorithm


def test_times_survive_being_written_and_read():
    now = time.time()
    assert abs(d.seconds_of(d.iso_time(now)) - now) < 0.001
    assert d.seconds_of("2026-11-22T06:58:17Z") == d.seconds_of("2026-11-22T06:58:17.000000Z") == 1795330697
    assert d.iso_time(1795330697).endswith("T06:58:17.000000Z")


@pytest.mark.parametrize("page", [
    b'<a href="' + b'<a "' * 50000, b"<a " * 200000, b"<a " + b"x" * 2000000, b"<a " + b"x '" * 100000, b"<a x = " * 200000,
    b"<!-- " * 300000, b"<a href=x" + b" y" * 500000])
def test_a_hostile_page_is_read_in_linear_time(page):
    began = time.process_time()     # what others on this machine take does not count
    try:
        d.parse_simple_page("x", "http://localhost/x/", page, False)
    except d.UpstreamTrouble:
        pass
    assert time.process_time() - began < 3


def test_a_page_that_ends_inside_a_tag_is_no_page():
    with pytest.raises(d.UpstreamTrouble):
        d.parse_simple_page("demo", "http://localhost/demo/", b"<html><a href='demo-1.0.tar.gz'>x</a><a hre", False)


@pytest.mark.parametrize("header, answer", [
    ("bytes=0-9", (0, 10)), ("bytes=90-", (90, 100)), ("bytes=-10", (90, 100)), ("bytes=-1000", (0, 100)), ("bytes=95-200", (95, 100)),
    ("bytes=100-", "unsatisfiable"), ("bytes=-0", "unsatisfiable"), ("bytes=0-1,5-6", None), ("lines=0-1", None), ("", None), ("bytes=9-3", None)])
def test_a_range_is_one_stretch_or_ignored(header, answer):
    assert d.parse_range(header, 100) == answer


@pytest.mark.parametrize("text, is_one", [
    (">=1.0", True), ("==1.0.*", True), ("!=1.*,>=0.5", True), ("~=1.4", True), ("===anything", True), ("==1.0+local", True),
    ("~=1", False), ("==1.0rc1.*", False), (">=1.0.*", False), ("~=1.0.*", False), (">1.0+local", False), ("1.0", False),
    (">=1.0,", False), ("==1.0+local.*", False), (">=abc", False)])
def test_specifiers(text, is_one):
    assert d.is_specifier(text) is is_one


@pytest.mark.parametrize("specifier, admitted, refused", [
    ("==1.0.*", "1.0 1.0rc1 1.0.5 1.0.post1", "1.1 1.10"), ("!=1.0.*", "1.1", "1.0 1.0.3"), ("~=1.4.2", "1.4.2 1.4.9", "1.5 1.4.1"),
    ("<1.0", "0.9 0.9.post1", "1.0 1.0rc1 1.0.dev1"), (">1.0", "1.0.1 1.1rc1", "1.0 1.0.post1 1.0+local"),
    ("==1.0", "1.0 1.0.0 1.0+local", "1.0.1"), (">1.0.post1", "1.0.post2", "1.0.post1 1.0.post1+local"), ("<=1.0", "1.0 1.0+local", "1.0.1")])
def test_what_specifiers_admit(specifier, admitted, refused):
    assert [version for version in admitted.split() if not d.admits(specifier, version)] == []
    assert [version for version in refused.split() if d.admits(specifier, version)] == []


def test_old_requires_python_with_stars_is_read_as_pip_reads_it():
    assert d.admits_python(">=3.6.*, !=3.7.*", "3.8") and not d.admits_python(">=3.6.*, !=3.7.*", "3.7.2")
    assert not d.admits_python(">=3.6.*", "3.5") and d.admits_python("", "3.5") and d.admits_python(None, "3.5")


@pytest.mark.parametrize("text, ip", [
    ("10.1.2.3", "10.1.2.3"), ("::ffff:10.1.2.3", "10.1.2.3"), ("fe80::1%eth0", "fe80::1"), ("2001:DB8::1", "2001:db8::1"),
    ("localhost", None), ("", None), ("1.2.3", None), ("[::1]", None), ("%eth0", None)])
def test_an_address_is_read_without_its_zone_and_as_ipv4_where_it_is_one(text, ip):
    assert str(d.ip_of(text)) == str(ip)


BASES = ("https://pypi.org/simple/demo/", "https://bob:secret@h:8/a/b", "http://h", "http://h/a/c?d=/e/f#g", "https://h/../a/./b/")
PIECES = ("http://", "https://", "HTTP://", "//", "/", "../", "./", "..", ".", "a", "b.c", ":", ":0", ":443", ":65536", "@", "bob:secret@", "?", "#", "#x=y/z",
          "%41", "%2e", "%", "é", " ", "\n", "+", "~", "=", ";", ",", "-", "..a", "a..", "demo-1.0.tar.gz", "[", "host.")


def test_links_are_joined_as_the_standard_library_joins_them():
    """Most links of a page take a short cut."""
    some, short = random.Random(3), 0
    for _ in range(20000):
        base, link = some.choice(BASES), "".join(some.choice(PIECES) for _ in range(some.randint(1, 7)))
        short += d._PLAIN_LINK.fullmatch(link) is not None
        assert d.joined_url(base, link) == d._joined_url(base, link), (base, link)
    assert short > 1000


@pytest.mark.parametrize("link, url", [
    ("https://files.example.org/p/demo-1.0.tar.gz#sha256=00", "https://files.example.org/p/demo-1.0.tar.gz"),
    ("../../p/demo-1.0.tar.gz#sha256=00", "https://pypi.org/p/demo-1.0.tar.gz"), ("/p/a+b", "https://pypi.org/p/a+b"), ("a b", "https://pypi.org/simple/demo/a%20b"),
    ("../../../../p", "https://pypi.org/p"), ("https://h:0/p", None), ("https://h:65536/p", None), ("ftp://h/p", None)])
def test_a_link_has_an_absolute_url(link, url):
    assert d.joined_url(BASES[0], link) == url
