"""The real devpi-client: every command of a packager's day."""

import itertools
import json

import pytest

from harness import sdist, wheel

NUMBERS = itertools.count()

PYPROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "hello-project"
version = "1.0"
description = "A project for devpi upload"
[tool.setuptools]
py-modules = ["hello_project"]
"""


@pytest.fixture
def person(world):
    """A new user with the password "pw"."""
    name = "person%d" % next(NUMBERS)
    world.server.add_user(name, "pw")
    return name


@pytest.fixture
def devpi(clients, world, person):
    """devpi-client, logged in as a new person who uses a new index PERSON/dev."""
    client_directory = clients.home / "devpi"

    def devpi(*arguments, **options):
        return clients.devpi(*arguments, DEVPI_CLIENTDIR=str(client_directory), **options)

    devpi("use", world.server.url)
    devpi("login", person, "--password", "pw")
    devpi("index", "-c", "dev")
    devpi("use", person + "/dev")
    return devpi


def getjson(devpi, path):
    """The "result" of what `devpi getjson` prints."""
    printed = devpi("getjson", path)
    return json.loads(printed[printed.index("{"):])["result"]


def test_use_shows_the_server_the_index_and_the_login(devpi, world, person):
    printed = devpi("use")
    assert "current devpi index: %s/%s/dev (logged in as %s)" % (world.server.url, person, person) in printed
    assert "supported features: server-keyvalue-parsing" in printed


def test_use_lists_all_indexes(devpi, person):
    lines = devpi("use", "-l").splitlines()
    for name in ("root/pypi", "alice/inherited", person + "/dev"):
        assert any(line.split()[:1] == [name] for line in lines), lines


@pytest.mark.parametrize("index", ["alice/private", "alice/inherited", "root/pypi"])
def test_use_of_every_kind_of_index(devpi, world, index):
    assert "current devpi index: %s/%s" % (world.server.url, index) in devpi("use", index)


def test_use_warns_of_an_index_that_does_not_exist(devpi):
    assert "The stage root/nothing could not be found." in devpi("use", "root/nothing", expect=None)


def test_login_with_a_wrong_password_is_refused(devpi, person):
    printed = devpi("login", person, "--password", "wrong", expect=1)
    assert "401" in printed and "user '%s' could not be authenticated" % person in printed


def test_logoff_ends_the_right_to_upload(devpi, clients):
    path = clients.save(wheel("hello-logged-off", "1.0"))
    devpi("upload", path)
    devpi("logoff")
    assert "401" in devpi("upload", path, expect=1)


def test_a_user_is_created_modified_listed_and_deleted(devpi, person):
    other = person + "-colleague"
    devpi("user", "-c", other, "password=first", "email=colleague@example.com")
    assert other in devpi("user", "-l").split()
    devpi("login", other, "--password", "first")
    devpi("user", "-m", other, "password=second", "title=Colleague")
    devpi("login", other, "--password", "first", expect=1)
    devpi("login", other, "--password", "second")
    shown = devpi("user", other)
    assert "email=colleague@example.com" in shown and "title=Colleague" in shown
    devpi("user", "-y", "--delete", other)
    assert other not in devpi("user", "-l").split()


def test_creating_a_user_twice_is_refused_with_the_reason(devpi, person):
    printed = devpi("user", "-c", person, "password=pw", expect=1)
    assert "409" in printed and "user already exists" in printed


def test_an_index_is_created_shown_changed_listed_and_deleted(devpi, person):
    printed = devpi("index", "-c", "team", "bases=root/pypi", "volatile=False")
    for line in ("type=stage", "bases=root/pypi", "volatile=False", "acl_upload=" + person):
        assert line in printed
    assert "title=For the team" in devpi("index", "team", "title=For the team")
    assert "bases=root/pypi,%s/dev" % person in devpi("index", "team", "bases+=%s/dev" % person)
    assert "bases=%s/dev\n" % person in devpi("index", "team", "bases-=root/pypi").replace(" ", "")
    assert "acl_upload=%s,bob" % person in devpi("index", "team", "acl_upload+=bob")
    assert {person + "/dev", person + "/team"} <= set(devpi("index", "-l").split())
    devpi("index", "team", "volatile=True")
    devpi("index", "-y", "--delete", "team")
    assert person + "/team" not in devpi("index", "-l").split()


def test_a_wrong_setting_of_an_index_is_refused_with_the_reason(devpi):
    assert "Unknown boolean value 'maybe'." in devpi("index", "dev", "volatile=maybe", expect=1)
    assert "base index 'root/nothing' does not exist" in devpi("index", "dev", "bases=root/nothing", expect=1)


def test_a_project_directory_is_built_uploaded_installed_and_removed(devpi, world, clients, person, tmp_path):
    """Its build requirement comes from PyPI through the server as well."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text(PYPROJECT)
    (project / "hello_project.py").write_text("greeting = 'hello'\n")
    index = person + "/dev"
    devpi("index", "dev", "bases=root/pypi")
    printed = devpi("upload", "--no-vcs", cwd=project, PIP_INDEX_URL=world.simple_url(index))
    for filename in ("hello_project-1.0-py3-none-any.whl", "hello_project-1.0.tar.gz"):
        assert "file_upload of %s to %s" % (filename, world.index_url(index)) in printed
    assert devpi("list").split() == ["hello-project"]
    assert devpi("list", "-v").split() == ["hello-project==1.0"]
    shown = devpi("list", "hello-project").split()
    assert sorted(url.rsplit("/", 1)[1] for url in shown) == \
        ["hello_project-1.0-py3-none-any.whl", "hello_project-1.0.tar.gz"]
    release = getjson(devpi, "/%s/hello-project/1.0" % index)
    assert release["summary"] == "A project for devpi upload"
    assert [link["log"][0]["who"] for link in release["+links"]] == [person, person]
    assert clients.install("pip", world.simple_url(index), "hello-project") == {"hello-project": "1.0"}
    devpi("remove", "-y", "hello-project")
    assert devpi("list").split() == []
    assert "404" in devpi("list", "hello-project", expect=1)


def test_given_archives_are_uploaded(devpi, world, clients, person):
    archives = [wheel("hello-given", "1.0"), sdist("hello-given", "1.1")]
    devpi("upload", *[clients.save(archive) for archive in archives])
    assert getjson(devpi, "/%s/dev" % person)["projects"] == ["hello-given"]
    assert devpi("list", "-v").split() == ["hello-given==1.1"]
    assert sorted(devpi("list", "-v", "--all").split()) == ["hello-given==1.0", "hello-given==1.1"]
    for archive in archives:
        assert world.server.fetch(person + "/dev", archive.filename, archive.name) == archive.content


def test_an_upload_to_a_non_volatile_index_shows_why_it_was_refused(devpi, clients):
    first, other = (wheel("hello-fixed", "1.0", summary=summary) for summary in ("first", "other"))
    devpi("index", "dev", "volatile=False")
    devpi("upload", clients.save(first))
    devpi("upload", clients.save(first))
    printed = devpi("upload", clients.save(other), expect=1)
    assert "409" in printed and first.filename + " already exists in non-volatile index" in printed


def test_a_project_of_a_non_volatile_index_is_removed_by_force_only(devpi, clients):
    devpi("index", "dev", "volatile=False")
    devpi("upload", clients.save(wheel("hello-kept", "1.0")))
    assert "403" in devpi("remove", "-y", "hello-kept", expect=1)
    assert devpi("list").split() == ["hello-kept"]
    devpi("remove", "-y", "-f", "hello-kept")
    assert devpi("list").split() == []


def test_somebody_elses_index_is_readable_but_not_writable(devpi, clients):
    devpi("use", "alice/private")
    assert {"hello-lib", "hello-source"} <= set(devpi("list").split())
    assert "403" in devpi("upload", clients.save(wheel("hello-foreign", "1.0")), expect=1)
    assert "403" in devpi("index", "alice/private", "volatile=True", expect=1)


@pytest.mark.parametrize("index", ["root/pypi", "alice/inherited"])
def test_list_shows_the_files_that_pypi_has(devpi, index):
    devpi("use", index)
    assert "six-1.16.0-py2.py3-none-any.whl" in devpi("list", "--all", "six==1.16.0")


def test_a_mirror_takes_no_uploads(devpi, clients):
    devpi("use", "root/pypi")
    printed = devpi("upload", clients.save(wheel("hello-mirror", "1.0")), expect=1)
    assert "does not support upload." in printed and "Most likely, it is a mirror." in printed


def test_getjson_shows_users_and_indexes_as_the_server_sends_them(devpi, person):
    assert list(getjson(devpi, "/" + person)["indexes"]) == ["dev"]
    config = getjson(devpi, "/root/pypi?no_projects=")
    assert config["type"] == "mirror" and config["mirror_url"] == "https://pypi.org/simple/"
