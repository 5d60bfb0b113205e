"""The real devpi-client: each of its commands, with its options."""

import io
import itertools
import json
import re
import shutil
import stat
import tarfile
import zipfile

import pytest

from clients import INSTALLERS, PYTHON, Devpi, installed
from harness import sdist, wheel
from projects import documentation, git_add, sphinx_build, write_files, write_project

NUMBERS = itertools.count()
FEATURES = "projectconfig-v2, push-no-docs, push-only-docs, push-register-project, server-keyvalue-parsing"


@pytest.fixture
def person(world):
    """A new user with the password "pw"."""
    name = "person%d" % next(NUMBERS)
    world.server.add_user(name, "pw")
    return name


@pytest.fixture
def index(world):
    """A new, empty, volatile index of dana's."""
    return world.new_index("dana")


@pytest.fixture
def devpi(clients, signed_in, index):
    """devpi-client, with dana logged in, on her new index."""
    signed_in(clients.home / "devpi", index)
    return Devpi(clients, clients.home / "devpi")


@pytest.fixture
def stranger(clients, world):
    """devpi-client, connected to the server, with nobody logged in."""
    devpi = Devpi(clients, clients.home / "stranger")
    devpi("use", world.server.url)
    return devpi


def file_url(world, index, archive):
    digest = archive.sha256
    return "%s/%s/+f/%s/%s/%s" % (world.server.url, index, digest[:3], digest[3:16], archive.filename)


def stored_path(world, index, archive):
    """The path of a file as push names it: without host and leading slash."""
    return file_url(world, index, archive)[len(world.server.url) + 1:]


def rels(world, release):
    """The kinds of all links of "INDEX/PROJECT/VERSION", in their order."""
    reply = world.server.get("/" + release)
    return [link["rel"] for link in reply.result["+links"]] if reply.status == 200 else []


def members(path):
    """The names of what an archive holds."""
    if path.suffix == ".gz":
        with tarfile.open(str(path)) as archive:
            return archive.getnames()
    with zipfile.ZipFile(str(path)) as archive:
        return archive.namelist()


def manual(world, release):
    """The first page of the documentation of "INDEX/PROJECT/VERSION"; None if there is none."""
    reply = world.server.get("/%s/+doc/index.html?raw" % release, headers={"Accept": "text/html"})
    return reply.text if reply.status == 200 else None


# -- use, and the environment variables


def test_use_shows_the_server_the_index_and_the_login(devpi, world, index):
    printed = devpi("use").splitlines()
    assert "current devpi index: %s/%s (logged in as dana)" % (world.server.url, index) in printed
    assert "supported features: " + FEATURES in printed


def test_use_lists_all_indexes(devpi, index):
    lines = devpi("use", "-l").splitlines()
    for name in ("root/pypi", "alice/inherited", index):
        assert any(line.split()[:1] == [name] for line in lines), lines


def test_use_lists_the_indexes_of_a_user(devpi, world, person):
    world.server.add_index(person + "/dev", bases=["root/pypi", "alice/private"])
    world.server.add_index(person + "/stable", volatile=False)
    for arguments in (["-l", "-u", person], ["--list", "--user", person]):
        assert [line.split() for line in devpi("use", *arguments).splitlines()[1:]] == [
            [person + "/dev", "bases=root/pypi,alice/private", "volatile=True"],
            [person + "/stable", "bases=", "volatile=False"]]


@pytest.mark.parametrize("index", ["alice/private", "alice/inherited", "root/pypi"])
def test_use_of_every_kind_of_index(devpi, world, index):
    assert "current devpi index: %s/%s" % (world.server.url, index) in devpi("use", index)


def test_use_shows_the_urls_and_changes_nothing(devpi, world, index):
    url = world.server.url
    before = devpi.state()
    printed = devpi("use", "--urls").splitlines()
    for line in ("              login: %s/+login" % url, "         pypisubmit: %s/%s/" % (url, index),
                 "        simpleindex: %s/%s/+simple/" % (url, index)):
        assert line in printed
    printed = devpi("use", "--urls", "root/pypi").splitlines()
    assert "         pypisubmit: None" in printed and "        simpleindex: %s/root/pypi/+simple/" % url in printed
    assert devpi.state() == before


def test_use_warns_of_an_index_that_does_not_exist(devpi):
    assert "The stage root/nothing could not be found." in devpi("use", "root/nothing", expect=None)


def test_use_of_a_server_or_a_user_forgets_the_index(devpi, world):
    for url in (world.server.url, world.server.url + "/dana"):
        printed = devpi("use", url).splitlines()
        assert "using server: %s/ (logged in as dana)" % world.server.url in printed
        assert "no current index: type 'devpi use -l' to discover indices" in printed
    assert "not connected to an index, see 'devpi use'" in devpi("list", expect=1)


def test_use_delete_forgets_the_server(devpi, world):
    assert "REMOVED configuration at" in devpi("use", "--delete")
    assert devpi("use").startswith("no server: type 'devpi use URL'")
    assert "using server: %s/" % world.server.url in devpi("use", world.server.url)


def test_use_switches_between_users_who_are_logged_in(devpi, person):
    devpi("login", person, "--password", "pw")
    assert "(logged in as dana)" in devpi("use", "-u", "dana")
    assert devpi("user").splitlines()[0].endswith("/dana:")
    assert devpi("user", DEVPI_USER=person).splitlines()[0].endswith("/%s:" % person)
    assert "(not logged in)" in devpi("use", "-u", "nobody-here")


def test_an_index_may_be_named_for_one_command_only(devpi, world, clients, index):
    archive = wheel("hello-elsewhere", "1.0")
    for other, option, variable in [
            (world.new_index("dana"), ["--index"], None), (world.new_index("dana"), [], "DEVPI_INDEX")]:
        named = {variable: other} if variable else {}
        devpi("upload", *option, *([other] if option else []), clients.save(archive), **named)
        assert devpi("list", *option, *([other] if option else []), **named).splitlines()[-1] == "hello-elsewhere"
        assert world.server.get("/" + other).result["projects"] == ["hello-elsewhere"]
    url = "%s/%s" % (world.server.url, index)
    assert devpi("index", DEVPI_INDEX=url).splitlines()[:2] == ["Using DEVPI_INDEX from environment: " + url, url + ":"]
    assert devpi("list") == ""


def test_a_restricted_index_opens_with_a_login(stranger, world):
    index = world.new_index("dana", acl_pkg_read="dana")
    world.server.upload(index, wheel("hello-hidden", "1.0"))
    printed = stranger("use", index).splitlines()
    assert "You might have to login first to access this index." in printed
    assert any(line.startswith("403 Forbidden") for line in printed)
    assert "403 Forbidden" in stranger("list", expect=1)
    assert index not in stranger("use", "-l")
    stranger("login", "bob", "--password", "pw-of-bob")
    assert "You don't have permission to access this index." in stranger("use")
    stranger("login", "dana", "--password", "pw-of-dana")
    assert stranger("list") == "hello-hidden\n"
    assert index in stranger("use", "-l")


def test_credentials_in_the_url_are_sent_with_each_request(stranger, world):
    index = world.new_index("dana", acl_pkg_read="dana")
    world.server.upload(index, wheel("hello-basic", "1.0"))
    printed = stranger("use", world.index_url(index, user="dana", password="pw-of-dana"))
    assert "(not logged in)" in printed and "403 Forbidden" not in printed
    assert stranger("list") == "hello-basic\n"


def test_use_configures_pip_and_uv(devpi, world, clients, index):
    """In a home where nothing else is configured, both then install from the index."""
    world.server.upload(index, wheel("hello-configured", "1.0"))
    simple_url = world.simple_url(index)
    configuration = {"PIP_CONFIG_FILE": None, "UV_NO_CONFIG": None}
    pip, uv = clients.home / "config" / "pip" / "pip.conf", clients.home / "config" / "uv" / "uv.toml"
    for _ in range(2):
        printed = devpi("use", "--set-cfg", "--pip-set-trusted", "yes", **configuration).splitlines()
        assert {"%s: %s" % (pip, simple_url), "%s: %s" % (uv, simple_url), "always-set-cfg: no"} <= set(printed)
    assert pip.read_text().count(simple_url) == uv.read_text().count(simple_url) == 1
    assert "trusted-host = 127.0.0.1" in pip.read_text()
    clients.pip("install", "--target", "by-pip", "hello-configured", **configuration)
    clients.uv("pip", "install", "--target", "by-uv", "hello-configured", **configuration)
    assert installed(clients.home / "by-pip") == installed(clients.home / "by-uv") == {"hello-configured": "1.0"}
    devpi("use", "--always-set-cfg", "yes", **configuration)
    devpi("use", "root/pypi", "-t", "no", **configuration)
    assert world.simple_url("root/pypi") in uv.read_text()
    assert "always-set-cfg: no" in devpi("use", "--always-set-cfg=no", **configuration)


def test_use_configures_a_virtual_environment_alone(devpi, world, clients, index, tmp_path):
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    printed = devpi("use", "--venv", environment, "--set-cfg").splitlines()
    assert "venv for install/set commands: %s" % environment in printed
    for name in ("pip.conf", "uv.toml"):
        assert world.simple_url(index) in (environment / name).read_text()
    assert not list(clients.home.rglob("*.conf"))
    assert devpi.state()["venvdir"] == str(environment)
    assert "venv for install" not in devpi("use", "--venv", "-")


def test_a_virtual_environment_may_have_an_index_of_its_own(devpi, world, index, tmp_path):
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    assert "Creating local configuration at" in devpi("use", "--local", VIRTUAL_ENV=str(environment))
    devpi("use", "alice/private", VIRTUAL_ENV=str(environment))
    assert json.loads((environment / "devpi.json").read_text())["index"] == world.server.url + "/alice/private"
    assert "current devpi index: %s/%s (" % (world.server.url, index) in devpi("use")


def test_a_client_certificate_is_remembered_and_forgotten(devpi, world, clients, index):
    (clients.home / "cert.pem").write_text("")
    url = "%s/%s" % (world.server.url, index)
    devpi("use", "--client-cert", clients.home / "cert.pem", url)
    assert "Using existing client cert for '%s/'." % url in devpi("use", url)
    devpi("use", "--client-cert=", url)
    assert "Using existing client cert" not in devpi("use", url)


def test_version_names_the_servers_parts(devpi, world):
    lines = devpi("--version").splitlines()
    assert "current devpi server: %s/" % world.server.url in lines
    assert "    devpi-server 6.20.3" in lines


def test_debug_shows_the_state_file_and_the_client_directory_may_be_named(clients, world, tmp_path):
    printed = clients.devpi("use", "--debug", "--clientdir", tmp_path / "other", world.server.url)
    assert "[debug]" in printed
    assert (tmp_path / "other" / "current.json").exists()


# -- login, logoff, logout


def test_login_with_a_wrong_password_is_refused(devpi, world, person):
    assert devpi("login", person, "--password", "wrong", expect=1).splitlines() == [
        "POST %s/+login" % world.server.url, "401 Unauthorized: user '%s' could not be authenticated" % person]
    assert "(logged in as dana)" in devpi("use")


def test_login_asks_for_the_password(stranger, person):
    printed = stranger("login", person, input="pw\n")
    assert "logged in '%s', credentials valid for 10.00 hours" % person in printed
    assert stat.S_IMODE((stranger.directory / "auth.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("command", ["logoff", "logout"])
def test_logoff_ends_the_right_to_upload(devpi, clients, command):
    path = clients.save(wheel("hello-logged-off", "1.0"))
    devpi("upload", path)
    assert devpi(command) == "login information deleted\n"
    assert devpi(command) == "not logged in\n"
    assert "401 FAIL file_upload" in devpi("upload", path, expect=1)


def test_a_session_that_the_server_does_not_know_counts_as_none(devpi, clients):
    auth = devpi.state("auth.json")
    for sessions in auth["auth"].values():
        sessions[:] = [[user, "garbage"] for user, _ in sessions]
    (devpi.directory / "auth.json").write_text(json.dumps(auth))
    assert "(not logged in)" in devpi("use")
    assert "401 FAIL file_upload" in devpi("upload", clients.save(wheel("hello-garbage", "1.0")), expect=1)


# -- user, passwd


def test_a_user_is_created_modified_listed_and_deleted(devpi, world, person):
    other = person + "-colleague"
    assert devpi("user", "-c", other, "password=first", "email=colleague@example.com") == "user created: %s\n" % other
    assert other in devpi("user", "-l").split()
    devpi("login", other, "--password", "first")
    assert devpi("user", "-m", other, "password=second", "title=Colleague").splitlines() == [
        "/%s changing password: ********" % other, "/%s changing title: Colleague" % other, "user modified: " + other]
    devpi("login", other, "--password", "first", expect=1)
    devpi("login", other, "--password", "second")
    shown = devpi("user").splitlines()
    assert shown[0] == "%s/%s:" % (world.server.url, other)
    assert [line.split("=")[0] for line in shown[1:]] == ["  created", "  email", "  modified", "  title"]
    assert {"  email=colleague@example.com", "  title=Colleague"} <= set(shown)
    devpi("user", other, "title=")
    assert "title" not in devpi("user", other)
    assert devpi("user", "-y", "--delete", other).splitlines()[-1] == "user deleted: " + other
    assert other not in devpi("user", "-l").split()


def test_what_a_user_may_not_do_is_refused_with_the_reason(devpi, person):
    assert "409 Conflict: user already exists" in devpi("user", "-c", person, "password=pw", expect=1)
    assert "403 Forbidden" in devpi("user", "-m", person, "title=Mine", expect=1)
    assert "403 Forbidden" in devpi("user", "-y", "--delete", person, expect=1)
    assert "404 Not Found: no user 'ghost'" in devpi("user", "ghost", expect=1)
    assert "400 Bad Request: username 'b x' contains" in devpi("user", "-c", "b x", "password=pw", expect=1)
    assert "400 Bad Request" in devpi("user", "-c", person + "-hash", "pwhash=made-elsewhere", expect=1)


def test_a_password_is_asked_for(stranger, person):
    """Twice, and once more whether so short a one is meant."""
    other = person + "-asked"
    stranger("user", "-c", other, input="a-long-password\na-long-password\n")
    stranger("login", other, "--password", "a-long-password")
    stranger("passwd", input="short\nshort\nyes\n")
    stranger("login", other, "--password", "a-long-password", expect=1)
    stranger("login", other, "--password", "short")
    stranger("login", "root", "--password", "secret")
    stranger("passwd", other, input="set-by-root\nset-by-root\n")
    stranger("login", other, "--password", "set-by-root")


# -- index


def test_an_index_is_created_shown_changed_listed_and_deleted(devpi, world, index, person):
    team = "team-" + person
    shown = devpi("index", "-c", team, "bases=root/pypi", "volatile=False").splitlines()
    assert shown == ["%s/dana/%s?no_projects=:" % (world.server.url, team)] + [
        "  type=stage", "  bases=root/pypi", "  volatile=False", "  acl_upload=dana",
        "  acl_toxresult_upload=:ANONYMOUS:", "  mirror_whitelist=", "  mirror_whitelist_inheritance=intersection"]
    assert devpi("index", "--no-projects", team).splitlines() == shown
    assert "  title=For the team" in devpi("index", team, "title=For the team").splitlines()
    assert "title" not in "".join(devpi("index", team, "title-=").splitlines()[1:])
    assert "  bases=root/pypi,%s" % index in devpi("index", team, "bases+=" + index).splitlines()
    assert "  bases=%s" % index in devpi("index", team, "bases-=root/pypi").splitlines()
    assert "  acl_upload=dana,bob" in devpi("index", team, "acl_upload+=bob").splitlines()
    assert {index, "dana/" + team} <= set(devpi("index", "-l").split())
    assert "403 Forbidden: index dana/%s non-volatile, cannot delete" % team in \
        devpi("index", "-y", "--delete", team, expect=1)
    devpi("index", team, "volatile=True")
    assert devpi("index", "-y", "--delete", team).splitlines()[-1] == \
        "index deleted: %s/dana/%s" % (world.server.url, team)
    assert "dana/" + team not in devpi("index", "-l").split()
    assert set(devpi("index", "-l", "alice").split()) >= {"alice/private", "alice/inherited"}


def test_without_a_name_the_current_index_is_shown_and_changed(devpi, world, index):
    assert "  description=mine" in devpi("index", "description=mine", "volatile=no").splitlines()
    shown = devpi("index").splitlines()
    assert shown[0] == "%s/%s:" % (world.server.url, index)
    assert {"  description=mine", "  volatile=False"} <= set(shown)


def test_a_mirror_is_created_and_serves(devpi, world, person):
    name = "mirror-" + person
    shown = devpi("index", "-c", name, "type=mirror", "mirror_url=%s/root/pypi/+simple/" % world.server.url,
                  "mirror_cache_expiry=60", "mirror_no_project_list=True").splitlines()
    assert shown[1:] == ["  type=mirror", "  volatile=True", "  mirror_cache_expiry=60",
                         "  mirror_no_project_list=True", "  mirror_url=%s/root/pypi/+simple/" % world.server.url]
    assert "/six-1.16.0.tar.gz" in devpi("list", "--index", "dana/" + name, "six==1.16.0")


def test_a_wrong_setting_of_an_index_is_refused_with_the_reason(devpi, index):
    for setting, reason in [("volatile=maybe", "Unknown boolean value 'maybe'."),
                            ("bases=root/nothing", "base index 'root/nothing' does not exist"),
                            ("foo=bar", "indexconfig got unexpected keyword arguments: foo=bar"),
                            ("volatile-=", "Default values can't be removed.")]:
        assert "400 Bad Request: " + reason in devpi("index", setting, expect=1)
    assert "409 Conflict: index '%s' exists" % index in devpi("index", "-c", index, expect=1)
    assert "403 Forbidden: no permission to create index bob/theirs" in devpi("index", "-c", "bob/theirs", expect=1)
    devpi("index", "dana/nothing-here", expect=1)


# -- upload


def test_a_project_directory_is_built_uploaded_installed_and_removed(devpi, world, clients, index, tmp_path):
    """Its build requirement comes from PyPI through the server as well."""
    project = write_files(tmp_path / "project", {
        "pyproject.toml": """\
            [build-system]
            requires = ["setuptools"]
            build-backend = "setuptools.build_meta"
            [project]
            name = "hello-project"
            version = "1.0"
            description = "A project for devpi upload"
            [tool.setuptools]
            py-modules = ["hello_project"]
            """,
        "hello_project.py": "greeting = 'hello'\n"})
    devpi("index", "bases=root/pypi")
    printed = devpi("upload", "--no-vcs", cwd=project, PIP_INDEX_URL=world.simple_url(index)).splitlines()
    for filename in ("hello_project-1.0-py3-none-any.whl", "hello_project-1.0.tar.gz"):
        assert "file_upload of %s to %s" % (filename, world.index_url(index)) in printed
    assert devpi("list").split() == ["hello-project"]
    assert devpi("list", "-v").split() == ["hello-project==1.0"]
    shown = devpi("list", "hello-project").split()
    assert sorted(url.rsplit("/", 1)[1] for url in shown) == \
        ["hello_project-1.0-py3-none-any.whl", "hello_project-1.0.tar.gz"]
    release = devpi.getjson("/%s/hello-project/1.0" % index)
    assert release["summary"] == "A project for devpi upload"
    assert [link["log"][0]["who"] for link in release["+links"]] == ["dana", "dana"]
    assert clients.install("pip", world.simple_url(index), "hello-project") == {"hello-project": "1.0"}
    devpi("remove", "-y", "hello-project")
    assert devpi("list").split() == []
    assert "404 Not Found: no project 'hello-project'" in devpi("list", "hello-project", expect=1)


@pytest.mark.parametrize("options, suffixes", [
    (["--sdist"], [".tar.gz"]),
    (["--wheel", "--setupdir-only"], ["-py3-none-any.whl"]),
    (["--formats", "sdist,bdist_wheel"], ["-py3-none-any.whl", ".tar.gz"]),
], ids=["sdist", "wheel", "formats"])
def test_the_formats_that_are_asked_for_are_built_from_what_is_under_version_control(
        devpi, world, index, tmp_path, options, suffixes):
    project = write_project(tmp_path / "project", "hello-formats", "1.0")
    git_add(project)
    (project / "untracked.txt").write_text("not for others")
    devpi("upload", "--no-isolation", *options, cwd=project)
    filenames = ["hello_formats-1.0" + suffix for suffix in suffixes]
    assert sorted(world.server.filenames(index, "hello-formats")) == filenames
    assert sorted(path.name for path in (project / "dist").iterdir()) == filenames
    for path in (project / "dist").iterdir():
        assert world.server.fetch(index, path.name, "hello-formats") == path.read_bytes()
        assert "untracked.txt" not in str(members(path))


def test_a_project_may_configure_its_uploads(devpi, world, index, tmp_path):
    project = write_project(tmp_path / "project", "hello-settings", "1.0",
                            settings="[tool.devpi.upload]\nwheel = true\nno-vcs = true\n")
    assert "Got wheel=True from pyproject.toml [tool.devpi.upload]." in \
        devpi("upload", "--no-isolation", "-v", "-p", PYTHON, cwd=project).splitlines()
    assert world.server.filenames(index, "hello-settings") == ["hello_settings-1.0-py3-none-any.whl"]


def test_a_dry_run_uploads_nothing(devpi, world, index, tmp_path):
    project = write_project(tmp_path / "project", "hello-dry", "1.0")
    before = world.server.get("/+api").headers["X-DEVPI-SERIAL"]
    printed = devpi("upload", "--no-vcs", "--no-isolation", "--dry-run", cwd=project).splitlines()
    assert printed[-2:] == ["skipped: file_upload of %s to %s" % (filename, world.index_url(index)) for filename in (
        "hello_dry-1.0-py3-none-any.whl", "hello_dry-1.0.tar.gz")]
    assert devpi("list") == ""
    assert world.server.get("/+api").headers["X-DEVPI-SERIAL"] == before


def test_documentation_is_built_and_uploaded_along_or_alone(devpi, world, index, tmp_path):
    path = "%s:%s" % (sphinx_build(tmp_path / "bin"), devpi.clients.environment["PATH"])
    project = write_project(tmp_path / "project", "hello-manual", "1.0")
    printed = devpi("upload", "--no-vcs", "--no-isolation", "--with-docs", cwd=project, PATH=path).splitlines()
    assert [line for line in printed if "_upload of" in line] == [line + world.index_url(index) for line in (
        "file_upload of hello_manual-1.0-py3-none-any.whl to ", "file_upload of hello_manual-1.0.tar.gz to ",
        "doc_upload of hello-manual-1.0.doc.zip to ")]
    assert rels(world, index + "/hello-manual/1.0") == ["releasefile", "releasefile", "doczip"]
    assert manual(world, index + "/hello-manual/1.0") == "<p>The manual of hello-manual 1.0"
    write_project(project, "hello-manual", "1.1")
    devpi("upload", "--no-vcs", "--no-isolation", "--only-docs", cwd=project, PATH=path)
    assert rels(world, index + "/hello-manual/1.1") == ["doczip"]
    assert manual(world, index + "/hello-manual/latest") == "<p>The manual of hello-manual 1.1"


def test_given_archives_are_uploaded(devpi, world, clients, index):
    archives = [wheel("hello-given", "1.0"), sdist("hello-given", "1.1")]
    devpi("upload", *[clients.save(archive) for archive in archives])
    assert devpi.getjson("/" + index)["projects"] == ["hello-given"]
    assert devpi("list", "-v").split() == ["hello-given==1.1"]
    assert sorted(devpi("list", "-v", "--all").split()) == ["hello-given==1.0", "hello-given==1.1"]
    for archive in archives:
        assert world.server.fetch(index, archive.filename, archive.name) == archive.content


def test_given_documentation_is_uploaded(devpi, world, clients, index):
    """A tar file is packed as a zip by the client; without a version in its name the newest release is meant."""
    devpi("upload", clients.save(wheel("hello-docs", "1.0")),
          clients.save(documentation("hello-docs", "1.0", "one")))
    assert manual(world, index + "/hello-docs/1.0") == "one"
    printed = devpi("upload", clients.save(documentation("hello-docs", "1.1", "two", suffix=".docs.tgz")))
    assert "repackaged hello-docs-1.1.docs.tgz to hello-docs-1.1.doc.zip" in printed.splitlines()
    assert [manual(world, index + "/hello-docs/" + version) for version in ("1.0", "1.1")] == ["one", "two"]
    devpi("upload", clients.save(documentation("hello-docs", None, "three")))
    assert [manual(world, index + "/hello-docs/" + version) for version in ("1.0", "1.1")] == ["one", "three"]
    assert world.server.filenames(index, "hello-docs") == ["hello_docs-1.0-py3-none-any.whl"]


def test_documentation_without_any_release_is_refused(devpi, clients):
    printed = devpi("upload", clients.save(documentation("hello-unreleased", None, "nothing")), expect=1)
    assert printed.splitlines()[-2] == \
        "doczip has no version and 'hello-unreleased' has no releases to derive one from"


def test_the_archives_of_a_directory_are_uploaded_all_or_the_newest(devpi, world, clients, index):
    for version in ("1.0", "1.9", "1.10"):
        clients.save(wheel("hello-many", version), "many")
        clients.save(documentation("hello-many", version, "of " + version), "many")
    devpi("upload", "many", expect=1)
    devpi("upload", "--from-dir", "--only-latest", "many")
    assert world.server.versions(index, "hello-many") == ["1.10"]
    devpi("upload", "--from-dir", "many")
    assert sorted(world.server.versions(index, "hello-many")) == ["1.0", "1.10", "1.9"]
    assert manual(world, index + "/hello-many/1.9") == "of 1.9"


def test_an_upload_to_a_non_volatile_index_shows_why_it_was_refused(devpi, world, clients, index):
    first, other = (wheel("hello-fixed", "1.0", summary=summary) for summary in ("first", "other"))
    devpi("index", "volatile=False")
    devpi("upload", clients.save(first))
    devpi("upload", clients.save(first))
    assert devpi("upload", clients.save(other), expect=1).splitlines() == [
        "409 FAIL file_upload of %s to %s" % (first.filename, world.index_url(index)),
        first.filename + " already exists in non-volatile index", "POST to %s FAILED" % world.index_url(index)]


def test_somebody_elses_index_is_readable_but_not_writable(devpi, clients):
    devpi("use", "alice/private")
    assert {"hello-lib", "hello-source"} <= set(devpi("list").split())
    assert "403 FAIL" in devpi("upload", clients.save(wheel("hello-foreign", "1.0")), expect=1)
    assert "403 Forbidden" in devpi("index", "alice/private", "volatile=True", expect=1)


def test_a_mirror_takes_no_uploads(devpi, clients):
    devpi("use", "root/pypi")
    printed = devpi("upload", clients.save(wheel("hello-mirror", "1.0")), expect=1)
    assert "does not support upload." in printed and "Most likely, it is a mirror." in printed


# -- list, remove


@pytest.mark.parametrize("index", ["root/pypi", "alice/inherited"])
def test_list_shows_the_files_that_pypi_has(devpi, index):
    devpi("use", index)
    assert "six-1.16.0-py2.py3-none-any.whl" in devpi("list", "--all", "six==1.16.0")


def test_list_shows_the_newest_versions_or_all(devpi, world, index):
    archives = [wheel("hello-listed", version) for version in ("1.0", "1.9", "1.10", "2.0rc1")]
    for archive in archives:
        world.server.upload(index, archive)
    urls = [file_url(world, index, archive) for archive in reversed(archives)]
    assert devpi("list", "hello-listed").splitlines() == \
        urls[:3] + ["1 older versions not shown, use --all to see"]
    assert devpi("list", "--all", "hello-listed").splitlines() == urls
    assert devpi("list", "--all", "Hello_Listed").splitlines()[1:] == urls, "behind the line on the redirect"
    assert devpi("list", "hello-listed<1.10").splitlines() == urls[2:]
    assert devpi("list", "-v", "--all").split() == ["hello-listed==" + archive.version for archive in archives]
    assert devpi("list", "hello-listed>9") == ""
    assert "404 Not Found: no project 'hello-nosuch'" in devpi("list", "hello-nosuch", expect=1)


def test_list_shows_what_is_inherited_and_what_is_shadowed(devpi, world, index):
    base = world.new_index("dana")
    devpi("index", "bases=" + base)
    own = wheel("hello-shadow", "1.0")
    inherited = [sdist("hello-shadow", "1.0"), sdist("hello-shadow", "1.1")]
    world.server.upload(index, own)
    for archive in inherited:
        world.server.upload(base, archive)
    assert devpi("list", "hello-shadow").splitlines() == [
        file_url(world, base, inherited[1]), file_url(world, index, own), file_url(world, base, inherited[0])]
    assert [url.partition("?")[0] for url in devpi("list", "--ignore-bases", "hello-shadow").split()] == \
        [file_url(world, index, own)]
    assert devpi("list", "-v").split() == ["hello-shadow==1.1"]
    assert devpi("list", "-v", "--ignore-bases").split() == ["hello-shadow==1.0"]


def test_versions_are_removed_that_match(devpi, world, index):
    archives = [wheel("hello-old", version) for version in ("1.0", "1.1", "2.0")]
    for archive in archives:
        world.server.upload(index, archive)
    assert devpi("remove", "-y", "hello-old<2").splitlines() == [
        "About to remove the following releases and distributions",
        "version: 1.0", "  - " + file_url(world, index, archives[0]),
        "version: 1.1", "  - " + file_url(world, index, archives[1]),
        "Are you sure (yes/no)? yes (autoset from -y option)",
        "deleting release 1.0 of hello-old", "deleting release 1.1 of hello-old"]
    assert world.server.versions(index, "hello-old") == ["2.0"]
    assert "No releases or distributions found matching 'hello-old==9'." in \
        devpi("remove", "-y", "hello-old==9", expect=1)
    assert "not deleting anything" in devpi("remove", "hello-old", input="no\n")
    assert world.server.versions(index, "hello-old") == ["2.0"]
    devpi("remove", "hello-old", input="maybe\nyes\n")
    assert devpi("list") == ""
    assert "404 Not Found: no project 'hello-old'" in devpi("remove", "-y", "hello-old", expect=1)


def test_a_file_is_removed_by_its_url(devpi, world, index):
    archives = [wheel("hello-file", "1.0"), sdist("hello-file", "1.0")]
    for archive in archives:
        world.server.upload(index, archive)
    url = file_url(world, index, archives[0])
    assert devpi("remove", "-y", url).splitlines()[:2] == ["About to remove the following file:", url]
    assert world.server.filenames(index, "hello-file") == [archives[1].filename]
    assert "410 Gone" in devpi("remove", "-y", url, expect=1)
    unknown = file_url(world, index, wheel("hello-file", "7.0"))
    assert "404 Not Found: package '%s' doesn't exist" % unknown[len(world.server.url) + 1:] in \
        devpi("remove", "-y", unknown, expect=1)


def test_from_a_non_volatile_index_things_are_removed_by_force_only(devpi, world, index):
    kept = [wheel("hello-kept", "1.0"), wheel("hello-kept", "2.0"), sdist("hello-kept", "2.0")]
    for archive in kept:
        world.server.upload(index, archive)
    devpi("index", "volatile=False")
    url = file_url(world, index, kept[1])
    for target in ("hello-kept", "hello-kept==1.0", url):
        assert "403 Forbidden" in devpi("remove", "-y", target, expect=1)
    assert len(world.server.filenames(index, "hello-kept")) == 3
    devpi("remove", "-y", "-f", url)
    assert len(world.server.filenames(index, "hello-kept")) == 2
    devpi("remove", "-y", "--force", "hello-kept==1.0")
    assert world.server.versions(index, "hello-kept") == ["2.0"]
    devpi("use", "root/pypi")
    devpi("remove", "-y", "-f", "--index", index, "hello-kept")
    assert world.server.get("/" + index).result["projects"] == []


def test_nothing_of_somebody_else_is_removed(devpi):
    for target in (["hello-source"], ["hello-source==1.0"], ["--force", "hello-source"]):
        assert "403 Forbidden" in devpi("remove", "-y", "--index", "alice/private", *target, expect=1)
    assert "hello-source" in devpi("list", "--index", "alice/private").split()


# -- test


# Runs the tests without installing the release, which takes most of the time.
BARE_INI = "[tox]\nenv_list = %s\n[testenv]\nskip_install = true\n"


def outcomes(printed):
    """(environment, what became of it) for each that `devpi list -t` shows, without those for packaging (".pkg...")."""
    found = [re.fullmatch(r"\S+ +\w+ +([a-z]\w*) +(?:3\.\d+\.\d+ )?(tests \w+)", line) for line in printed.splitlines()]
    return [line.groups() for line in found if line]


def assert_posted(printed, url):
    lines = printed.splitlines()
    assert lines[lines.index("posting tox result data to " + url) + 1] == "success"


def test_releases_are_tested_by_tox_and_the_results_shown(devpi, world, index):
    """An sdist and a wheel, which needs an sdist for its tests; a result stays with its file, and goes with it."""
    ini = b"""\
[tox]
env_list = py
[testenv]
commands = python -c "import hello_tox; assert hello_tox.version == '1.0'"
[testenv:bare]
skip_install = true
"""
    files = [sdist("hello-tox", "1.0", extra_members={"tox.ini": ini}), wheel("hello-tox", "1.0")]
    for archive in files:
        world.server.upload(index, archive)
    urls = [file_url(world, index, archive) for archive in files]
    assert devpi("test", "--list", "hello-tox").splitlines()[-2:] == ["would test:", "   " + urls[0]]
    assert devpi("list", "-t", "hello-tox").splitlines() == urls[::-1]
    printed = devpi("test", "-e", "bare", "hello-tox")
    assert "only universal wheels supported, found " + files[1].filename in printed.splitlines()
    assert_posted(printed, urls[0])
    assert_posted(devpi("test", "--select", "whl$", "hello-tox"), urls[1])
    shown = devpi("list", "-t", "hello-tox")
    assert outcomes(shown) == [("py", "tests passed"), ("bare", "tests passed")]
    assert [line for line in shown.splitlines() if line.startswith("http")] == urls[::-1]
    links = devpi.getjson("/%s/hello-tox/1.0" % index)["+links"]
    assert [(link["rel"], link.get("for_href")) for link in links] == [
        ("releasefile", None), ("releasefile", None), ("toxresult", urls[0]), ("toxresult", urls[1])]
    devpi("remove", "-y", urls[1])
    assert outcomes(devpi("list", "-t", "hello-tox")) == [("bare", "tests passed")]
    assert [link["href"] for link in devpi.getjson("/%s/hello-tox/1.0" % index)["+links"]] == \
        [urls[0], links[2]["href"]]


def test_failed_tests_are_reported_with_their_output_until_they_pass(devpi, world, index):
    program = "import os; os.environ.get('FIXED') or exit(print('it is broken') or 1)"
    ini = BARE_INI % "py" + 'commands = python -c "%s"\n' % program
    archive = sdist("hello-fails", "1.0", extra_members={"tox.ini": ini.encode()})
    world.server.upload(index, archive)
    printed = devpi("test", "hello-fails", expect=1)
    assert_posted(printed, file_url(world, index, archive))
    assert "tox command failed 1" in printed.splitlines()
    assert outcomes(devpi("list", "--toxresults", "hello-fails")) == [("py", "tests failed")]
    assert re.search(r"^    FAIL: .*python -c .*\n    it is broken$", devpi("list", "-f", "hello-fails"), re.MULTILINE)
    devpi("test", "--index", index, "--tox-args", "-x testenv.set_env=FIXED=1", "hello-fails")
    assert outcomes(devpi("list", "-t", "hello-fails")) == [("py", "tests passed")]
    assert rels(world, index + "/hello-fails/1.0") == ["releasefile", "toxresult", "toxresult"]


def test_another_tox_configuration_may_be_used(devpi, world, clients, index):
    """`-c` in place of the project's own, `--fallback-ini` if it has none."""
    world.server.upload(index, sdist("hello-ini", "1.0"))
    write_files(clients.home, {name + ".ini": BARE_INI % name + "commands = python -c ''\n" for name in ("a", "b")})
    assert "no tox.ini/pyproject.toml/setup.cfg file found" in devpi("test", "hello-ini", expect=1)
    devpi("test", "-c", clients.home / "a.ini", "--index", "%s/%s" % (world.server.url, index), "hello-ini")
    devpi("test", "--fallback-ini", clients.home / "b.ini", "hello-ini==1.0")
    assert outcomes(devpi("list", "-t", "hello-ini")) == [("b", "tests passed"), ("a", "tests passed")]


def test_results_are_kept_back_or_refused(devpi, world, index):
    ini = BARE_INI % "py" + "commands = python -c ''\n"
    world.server.upload(index, sdist("hello-kept-back", "1.0", extra_members={"tox.ini": ini.encode()}))
    devpi("index", "acl_toxresult_upload=bob")
    refusal = "403 Forbidden: No permission to upload tox results. You can use the devpi test --no-upload option to " \
        "skip the upload."
    assert refusal in devpi("test", "hello-kept-back", expect=1).splitlines()
    assert "posting" not in devpi("test", "--no-upload", "hello-kept-back")
    assert rels(world, index + "/hello-kept-back/1.0") == ["releasefile"]
    assert "could not find/receive links for hello-nosuch" in devpi("test", "hello-nosuch", expect=1)


def test_a_restricted_release_is_tested_with_what_it_needs_from_its_index(devpi, world, index):
    """The client downloads with the session token in the URL, and hands it to tox for what the tests need."""
    ini = BARE_INI % "py" + 'deps = hello-needed\ncommands = python -c "import hello_needed"\n'
    archive = sdist("hello-closed", "1.0", extra_members={"tox.ini": ini.encode()})
    for uploaded in (archive, wheel("hello-needed", "1.0")):
        world.server.upload(index, uploaded)
    devpi("index", "acl_pkg_read=dana")
    assert_posted(devpi("test", "hello-closed"), file_url(world, index, archive))


# -- push


@pytest.fixture
def release(world, index):
    """hello-pushed 1.0 on dana's index: a wheel, a sdist with a test result, documentation. Its two files."""
    files = [wheel("hello-pushed", "1.0"), sdist("hello-pushed", "1.0")]
    for archive in files:
        assert world.server.upload(index, archive).status == 200
    report = {"host": "localhost", "platform": "linux", "testenvs": {}}
    assert world.server.post("/" + stored_path(world, index, files[1]), report).status == 200
    page = documentation("hello-pushed", "1.0", "pushed")
    assert world.server.upload(index, page, fields={
        ":action": "doc_upload", "name": "hello-pushed", "version": "1.0"}).status == 200
    return files


def test_a_release_is_pushed_to_another_index(devpi, world, index, release):
    target = world.new_index("dana", volatile=False)
    lines = devpi("push", "hello-pushed==1.0", target).splitlines()
    source_path = stored_path(world, target, release[1])
    assert lines[:3] + lines[4:] == [
        "   200 register hello-pushed 1.0 -> " + target,
        "   200 store_releasefile " + stored_path(world, target, release[0]),
        "   200 store_releasefile " + source_path,
        "   200 store_doczip hello-pushed 1.0 -> " + target]
    assert re.fullmatch(r"   200 store_toxresult %s\.toxresult-\d{14}-0" % re.escape(source_path), lines[3])
    assert sorted(rels(world, target + "/hello-pushed/1.0")) == ["doczip", "releasefile", "releasefile", "toxresult"]
    for archive in release:
        assert world.server.fetch(target, archive.filename, archive.name) == archive.content
    assert manual(world, target + "/hello-pushed/1.0") == "pushed"
    logs = [link["log"] for link in devpi.getjson("/%s/hello-pushed/1.0" % target)["+links"]]
    assert all([entry["what"] for entry in log] == ["upload", "push"] for log in logs)
    assert all((log[1]["src"], log[1]["dst"], log[1]["who"]) == (index, target, "dana") for log in logs)
    assert "409 Conflict: %s already exists in non-volatile index" % release[0].filename in \
        devpi("push", "hello-pushed==1.0", target, expect=1)


@pytest.mark.parametrize("option, kinds", [
    ("--no-docs", ["releasefile", "releasefile", "toxresult"]), ("--only-docs", ["doczip"])])
def test_documentation_is_left_out_or_pushed_alone(devpi, world, index, release, option, kinds):
    target = world.new_index("dana")
    devpi("use", "root/pypi")
    devpi("push", "--index", index, option, "Hello_Pushed==1.0", target)
    assert sorted(rels(world, target + "/hello-pushed/1.0")) == kinds
    assert manual(world, target + "/hello-pushed/1.0") == ("pushed" if "doczip" in kinds else None)


def test_a_release_of_pypi_is_pushed_to_an_index(devpi, world, index):
    printed = devpi("push", "--index", "root/pypi", "six==1.16.0", index).splitlines()
    assert printed[0] == "   200 register six 1.16.0 -> " + index
    assert sorted(world.server.filenames(index, "six")) == ["six-1.16.0-py2.py3-none-any.whl", "six-1.16.0.tar.gz"]
    assert devpi("list", "-v").split() == ["six==1.16.0"]


def test_a_push_that_cannot_be_is_refused_with_the_reason(devpi, world, index, release):
    serial = world.server.get("/+api").headers["X-DEVPI-SERIAL"]
    for arguments, reason in [
            (["hello-pushed==9.9", "alice/private"],
             "400 Bad Request: there are no files for hello-pushed 9.9 on stage " + index),
            (["hello-pushed==1.0", "dana/nothing-here"],
             "404 Not Found: The stage dana/nothing-here could not be found."),
            (["hello-pushed==1.0", "root/pypi"], "401 Unauthorized: user 'dana' cannot upload to 'root/pypi'"),
            (["hello-pushed==1.0", "alice/private"], "401 Unauthorized: user 'dana' cannot upload to 'alice/private'"),
            (["--no-docs", "--only-docs", "hello-pushed==1.0", "alice/private"],
             "Can't use '--no-docs' and '--only-docs' together."),
            (["hello-pushed", "dana"], "target 'dana' not of form USER/NAME or pypi:REPONAME"),
            (["hello_pushed>=1.0", "alice/private"],
             "The release specification needs to be of this form: name==version")]:
        assert devpi("push", *arguments, expect=1).splitlines()[-1].startswith(reason)
    devpi("logoff")
    assert "401 Unauthorized: " in \
        devpi("push", "hello-pushed==1.0", "alice/private", expect=1)
    assert world.server.get("/+api").headers["X-DEVPI-SERIAL"] == serial


@pytest.fixture
def pypirc(clients, receiver):
    """~/.pypirc with the section `ext`, which is a receiver."""
    return write_files(clients.home, {".pypirc": """\
        [distutils]
        index-servers = ext
        [ext]
        repository = %s/legacy/
        username = uploader
        password = of-the-uploader
        """ % receiver.url}) / ".pypirc"


def test_a_release_is_pushed_to_an_index_outside(devpi, world, receiver, pypirc, index, release):
    lines = devpi("push", "hello-pushed==1.0", "pypi:ext").splitlines()
    assert lines[0] == "using pypirc %s" % pypirc
    assert [line.rstrip() for line in lines[1:]] == [
        "   200 upload " + stored_path(world, index, release[0]),
        "   200 upload " + stored_path(world, index, release[1]),
        "   200 docfile hello-pushed"]
    assert {request.path for request in receiver.requests} == {"/legacy/"}
    assert {request.credentials for request in receiver.requests} == {("uploader", "of-the-uploader")}
    for request, archive, filetype, pyversion in zip(
            receiver.requests, release, ("bdist_wheel", "sdist"), ("3", "source")):
        assert request.files == {"content": (archive.filename, archive.content)}
        for name, value in [
                (":action", "file_upload"), ("name", "hello-pushed"), ("version", "1.0"), ("filetype", filetype),
                ("pyversion", pyversion), ("sha256_digest", archive.sha256), ("summary", "A test package")]:
            assert request.field(name) == value
    documents = receiver.requests[2]
    filename, content = documents.files["content"]
    assert (documents.field(":action"), filename) == ("doc_upload", "hello-pushed.zip")
    assert zipfile.ZipFile(io.BytesIO(content)).read("index.html") == b"pushed"


@pytest.mark.parametrize("options, actions", [
    (["--no-docs"], ["file_upload", "file_upload"]),
    (["--only-docs"], ["doc_upload"]),
    (["--register-project", "--no-docs"], ["submit", "file_upload", "file_upload"])],
    ids=["no-docs", "only-docs", "register"])
def test_options_choose_what_an_index_outside_gets(devpi, receiver, pypirc, index, release, options, actions, tmp_path):
    shutil.move(str(pypirc), str(tmp_path / "rc"))
    devpi("use", "root/pypi")
    devpi("push", *options, "--pypirc", tmp_path / "rc", "--index", index, "hello-pushed==1.0", "pypi:ext")
    assert [request.field(":action") for request in receiver.requests] == actions


def test_what_an_index_outside_refuses_is_shown(devpi, world, receiver, pypirc, index, release):
    receiver.answer(200, times=1)
    receiver.answer(400, b"line1: bad\nline2")
    printed = devpi("push", "--no-docs", "hello-pushed==1.0", "pypi:ext", expect=1).splitlines()
    assert printed[1].rstrip() == "PUSH %s/%s" % (world.server.url, index)
    assert [line.rstrip() for line in printed[2:]] == [
        "502 Bad Gateway", "   200 upload " + stored_path(world, index, release[0]),
        "   400 upload %s line1: bad line2" % stored_path(world, index, release[1]), "Failure during upload"]
    receiver.stop()
    printed = devpi("push", "--no-docs", "hello-pushed==1.0", "pypi:ext", expect=1).splitlines()
    assert printed[2] == "502 Bad Gateway" and printed[3].startswith("   -1 exception on release upload: ")
    assert "Error while trying to read section 'missing'" in \
        devpi("push", "hello-pushed==1.0", "pypi:missing", expect=1)
    devpi("logoff")
    printed = devpi("push", "hello-pushed==1.0", "pypi:ext", expect=1)
    assert "401 Unauthorized" in printed and len(receiver.requests) == 2


# -- install, refresh


def test_install_runs_pip_on_the_index(devpi, world, venv, index, tmp_path):
    world.server.upload(index, wheel("hello-installed", "1.0"))
    world.server.upload(index, wheel("hello-installed", "2.0rc1"))
    world.server.upload(index, wheel("hello-required", "1.0"))
    devpi("index", "acl_pkg_read=dana")
    printed = devpi("install", "--venv", venv, "hello-installed")
    assert "Successfully installed hello-installed-2.0rc1" in printed
    assert "****" in printed and "pw-of-dana" not in printed
    requirements = write_files(tmp_path, {"requirements.txt": "hello-required==1.0\n"}) / "requirements.txt"
    devpi("use", "root/pypi")
    devpi("install", "--index", index, "-r", requirements)
    listed = dict(line.split()[:2] for line in devpi("install", "-l").splitlines() if line.startswith("hello-"))
    assert listed["hello-installed"] == "2.0rc1" and listed["hello-required"] == "1.0"
    printed = devpi("install", "--index", index, "hello-nosuch", expect=1)
    assert "No matching distribution found for hello-nosuch" in printed


def test_a_directory_is_installed_in_editable_mode(devpi, world, venv, index, tmp_path):
    project = write_project(tmp_path / "project", "hello-editable", "1.0", metadata="Requires-Dist: hello-dependency\n")
    world.server.upload(index, wheel("hello-dependency", "1.0"))
    printed = devpi("install", "--venv", venv, "-e", project)
    assert "Successfully installed hello-dependency-1.0 hello-editable-1.0" in printed


def test_refresh_asks_upstream_again(devpi, world, index):
    """A mirror of our own index keeps what it has seen, until it is told to refresh."""
    mirror = world.new_index("dana", type="mirror", mirror_url=world.simple_url(index), mirror_cache_expiry=3600,
                             mirror_no_project_list=True)
    for name in ("hello-fresh", "hello-fresher"):
        world.server.upload(index, wheel(name, "1.0"))
        assert world.server.versions(mirror, name) == ["1.0"]
        world.server.upload(index, wheel(name, "2.0"))
        assert world.server.versions(mirror, name) == ["1.0"]
    printed = devpi("refresh", "--index", mirror, "hello-fresh", "hello_fresher").splitlines()
    assert printed == ["Refreshed hello-fresh", "Refreshed hello_fresher"]
    for name in ("hello-fresh", "hello-fresher"):
        assert sorted(world.server.versions(mirror, name)) == ["1.0", "2.0"]


# -- getjson, patchjson


def test_getjson_shows_what_the_server_sends(devpi, world, index):
    world.server.upload(index, wheel("hello-json", "1.0"))
    assert devpi.getjson("/" + index)["projects"] == devpi.getjson(world.server.url + "/" + index)["projects"]
    assert json.loads(devpi("getjson", "hello-json/1.0"))["type"] == "versiondata"
    config = devpi.getjson("/root/pypi?no_projects=")
    assert config["type"] == "mirror" and config["mirror_url"] == "https://pypi.org/simple/"
    assert index.split("/")[1] in devpi.getjson("/dana")["indexes"]
    assert set(devpi.getjson("/")) >= {"alice", "bob", "dana", "root"}
    headers, _, body = devpi("getjson", "-v", "/" + index).partition("\n\n")
    assert headers.splitlines()[0] == "GET REQUEST sent to %s/%s" % (world.server.url, index)
    assert {"CONTENT-TYPE: application/json", "X-DEVPI-API-VERSION: 2"} <= set(headers.splitlines())
    assert json.loads(body)["result"]["projects"] == ["hello-json"]
    assert "404 Not Found: no user 'ghost'" in devpi("getjson", "/ghost", expect=1)


def test_patchjson_changes_what_the_file_says(devpi, world, clients, index):
    change = clients.home / "change.json"
    change.write_text('{"title": "patched"}')
    first, _, body = devpi("patchjson", "/" + index, change).partition("\n")
    assert first == "PATCH REQUEST sent to %s/%s" % (world.server.url, index)
    assert json.loads(body) == {"type": "indexconfig", "result": dict(devpi.getjson("/%s?no_projects=" % index))}
    assert json.loads(body)["result"]["title"] == "patched"
    devpi("patchjson", "/" + index, "-", input='["title-=", "acl_upload+=bob"]')
    config = devpi.getjson("/" + index)
    assert "title" not in config and config["acl_upload"] == ["dana", "bob"]
    assert "400 Bad Request: Unknown boolean value 'maybe'." in \
        devpi("patchjson", "/" + index, "-", input='{"volatile": "maybe"}', expect=1)


def test_installers_pass_over_what_was_yanked_by_patchjson(devpi, world, clients, index):
    """Unless the very version is asked for; a mirror passes the mark on."""
    mirror = world.new_index("dana", type="mirror", mirror_url=world.simple_url(index), mirror_no_project_list=True)
    for version in ("1.0", "2.0"):
        world.server.upload(index, wheel("hello-yanked", version))
    devpi("patchjson", "/%s/hello-yanked/2.0" % index, "-", input='{"yanked": "broken"}')
    for installer in INSTALLERS:
        assert clients.install(installer, world.simple_url(index), "hello-yanked") == {"hello-yanked": "1.0"}
    for installer in ("pip", "uv"):
        url = world.simple_url(mirror)
        assert clients.install(installer, url, "hello-yanked") == {"hello-yanked": "1.0"}
        assert clients.install(installer, url, "hello-yanked==2.0") == {"hello-yanked": "2.0"}
