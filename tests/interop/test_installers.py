"""pip 20.3, the current pip, and uv install from each kind of index."""

import hashlib
import re

import pytest

from clients import INSTALLERS
from harness import eventually, wheel

URL_FORMS = {"simple URL": "+simple/", "bare index URL": ""}


@pytest.fixture(params=sorted(URL_FORMS))
def url_form(request):
    return URL_FORMS[request.param]


@pytest.mark.parametrize("installer", INSTALLERS)
class TestEveryInstaller:
    def test_installs_a_private_project(self, clients, world, installer, url_form):
        url = world.index_url(world.private) + url_form
        assert clients.install(installer, url, "hello-lib") == {"hello-lib": "1.0"}

    def test_installs_what_an_index_has_itself_inherits_and_mirrors(self, clients, world, installer, url_form):
        url = world.index_url(world.inherited) + url_form
        found = clients.install(installer, url, "hello-app", "iniconfig==2.0.0")
        assert found == {"hello-app": "1.0", "hello-lib": "1.0", "iniconfig": "2.0.0"}

    def test_installs_from_pypi_through_the_mirror(self, clients, world, installer, url_form):
        url = world.index_url(world.mirror) + url_form
        assert clients.install(installer, url, "six==1.16.0") == {"six": "1.16.0"}

    def test_finds_a_project_under_another_spelling(self, clients, world, installer):
        assert clients.install(installer, world.simple_url(world.private), "Hello_Lib") == {"hello-lib": "1.0"}

    def test_builds_from_an_sdist(self, clients, world, installer):
        assert clients.install(installer, world.simple_url(world.private), "hello-source") == {"hello-source": "1.0"}

    def test_refuses_a_release_for_another_python(self, clients, world, installer):
        printed = clients.install(installer, world.simple_url(world.private), "hello-lib==2.0", expect=None)
        assert "hello-lib==2.0" in printed

    def test_finds_no_unknown_project(self, clients, world, installer):
        for index in (world.private, world.inherited):
            printed = clients.install(installer, world.simple_url(index), "hello-nobody-has-this", expect=None)
            assert "hello-nobody-has-this" in printed

    def test_gets_the_private_project_and_never_its_namesake_on_pypi(self, clients, world, installer):
        index = world.new_index(bases=["root/pypi"])
        world.upload(index, wheel("iniconfig", "0.0.1"))
        assert clients.install(installer, world.simple_url(index), "iniconfig") == {"iniconfig": "0.0.1"}

    def test_reads_a_restricted_index_with_credentials_in_the_url(self, clients, world, installer):
        index = world.new_index(acl_pkg_read=["alice"])
        world.upload(index, wheel("hello-secret", "1.0"))
        url = world.simple_url(index, user=world.user, password=world.password)
        assert clients.install(installer, url, "hello-secret") == {"hello-secret": "1.0"}
        for refused in (world.simple_url(index), world.simple_url(index, user="alice", password="wrong"),
                        world.simple_url(index, user="bob", password="pw-of-bob")):
            clients.install(installer, refused, "hello-secret", expect=None)

    def test_installs_with_credentials_in_the_url_of_a_public_index(self, clients, world, installer):
        url = world.simple_url(world.inherited, user=world.user, password=world.password)
        assert clients.install(installer, url, "hello-lib", "six==1.16.0") == {"hello-lib": "1.0", "six": "1.16.0"}

    def test_installs_with_hashes_required(self, clients, world, installer, tmp_path):
        """The hash on the page and the bytes of the file are those of the upload."""
        requirements = tmp_path / "requirements.txt"
        requirements.write_text("hello-lib==1.0 --hash=sha256:%s\n" % world.library.sha256)
        url = world.simple_url(world.inherited)
        assert clients.install(installer, url, "--require-hashes", "-r", requirements) == {"hello-lib": "1.0"}


@pytest.mark.parametrize("pip", ["pip20", "pip"])
def test_pip_downloads_the_very_bytes_that_were_uploaded(clients, world, pip, tmp_path):
    getattr(clients, pip)("download", "--index-url", world.simple_url(world.private), "--dest", tmp_path,
                          "hello-lib")
    assert (tmp_path / world.library.filename).read_bytes() == world.library.content


@pytest.mark.parametrize("pip", ["pip20", "pip"])
@pytest.mark.parametrize("index", ["root/pypi", "alice/inherited"])
def test_pip_downloads_the_very_bytes_that_pypi_has(clients, world, pip, index, tmp_path):
    getattr(clients, pip)("download", "--index-url", world.simple_url(index), "--dest", tmp_path, "six==1.16.0")
    content = (tmp_path / "six-1.16.0-py2.py3-none-any.whl").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "8abb2f1d86890a2dfb989f9a77cfcfd3e47c2a354b01111771326f8aa26e0254"


def available_versions(clients, index_url, project):
    """The versions that `pip index versions` lists, newest first."""
    printed = clients.pip("index", "versions", "--index-url", index_url, project)
    line = next(line for line in printed.splitlines() if line.startswith("Available versions: "))
    return line[len("Available versions: "):].split(", ")


def test_pip_index_versions_lists_the_versions_that_this_python_can_use(clients, world):
    for index in (world.private, world.inherited):
        assert available_versions(clients, world.simple_url(index), "hello-lib") == ["1.0"]


def test_pip_index_versions_lists_what_pypi_has(clients, world):
    versions = available_versions(clients, world.simple_url(world.mirror), "six")
    assert versions == available_versions(clients, world.simple_url(world.inherited), "six")
    assert {"1.15.0", "1.16.0", "1.17.0"} <= set(versions)


def test_pip_says_which_releases_another_python_could_use(clients, world):
    printed = clients.install("pip", world.simple_url(world.private), "hello-lib==2.0", expect=None)
    assert "2.0 Requires-Python >=99" in printed


@pytest.mark.parametrize("index", ["root/pypi", "alice/inherited"])
def test_pip_sees_only_what_was_uploaded_prior_to_a_day(clients, world, index):
    """six 1.15.0 is of May 2020, 1.16.0 of May 2021: upstream's upload times are passed on."""
    found = clients.install("pip", world.simple_url(index), "--uploaded-prior-to", "2021-01-01T00:00:00Z", "six")
    assert found == {"six": "1.15.0"}


@pytest.mark.parametrize("index", ["root/pypi", "alice/inherited"])
def test_uv_excludes_what_is_newer_than_a_day(clients, world, index):
    found = clients.install("uv", world.simple_url(index), "--exclude-newer", "2021-01-01T00:00:00Z", "six")
    assert found == {"six": "1.15.0"}


@pytest.mark.parametrize("installer, option", [("pip", "--uploaded-prior-to"), ("uv", "--exclude-newer")])
def test_a_private_file_has_its_upload_time(clients, world, installer, option):
    url = world.simple_url(world.private)
    clients.install(installer, url, option, "2021-01-01T00:00:00Z", "hello-lib", expect=None)
    assert clients.install(installer, url, option, "2999-01-01T00:00:00Z", "hello-lib") == {"hello-lib": "1.0"}


def test_pip_resolves_from_ranges_of_a_wheel(clients, world):
    found = clients.install("pip", world.simple_url(world.inherited), "--use-feature=fast-deps", "hello-app")
    assert set(found) >= {"hello-app", "hello-lib", "iniconfig"}


def test_uv_compile_pins_every_dependency_with_the_hashes_of_the_pages(clients, world, tmp_path):
    (tmp_path / "requirements.in").write_text("hello-app\niniconfig==2.0.0\n")
    printed = clients.uv("pip", "compile", "--quiet", "--no-annotate", "--no-header", "--generate-hashes",
                         "--default-index", world.simple_url(world.inherited), tmp_path / "requirements.in")
    pinned = [line.split(" ")[0] for line in printed.splitlines() if "==" in line]
    assert pinned == ["hello-app==1.0", "hello-lib==1.0", "iniconfig==2.0.0"]
    assert "--hash=sha256:" + world.application.sha256 in printed
    assert "--hash=sha256:b6a85871a79d2e3b22d2d1b94ac2824226a63c6b741c88f7ae975f18b6778374" in printed


def test_uv_resolves_from_metadata_files_alone(clients, world, tmp_path):
    """Two private wheels cost two pages and two metadata files: no HEAD, no wheel."""
    index = world.new_index()
    world.upload(index, wheel("hello-top", "1.0", requires_dist=["hello-base"]))
    world.upload(index, wheel("hello-base", "1.0"))
    (tmp_path / "requirements.in").write_text("hello-top\n")
    before = len(world.server.output())
    clients.uv("pip", "compile", "--default-index", world.simple_url(index), tmp_path / "requirements.in")

    def log():
        return world.server.output()[before:].replace("%2B", "+")

    needed = ["GET /%s/+simple/hello-top/" % index, "GET /%s/+simple/hello-base/" % index,
              "hello_top-1.0-py3-none-any.whl.metadata", "hello_base-1.0-py3-none-any.whl.metadata"]
    eventually(lambda: all(request in log() for request in needed), seconds=60)
    assert len(re.findall(r" (GET|HEAD) /%s/" % index, log())) == len(needed), log()


def test_uv_locks_and_syncs_a_project(clients, world, tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "user-of-hello"\nversion = "1"\nrequires-python = ">=3.9"\n'
        'dependencies = ["hello-app", "six==1.16.0"]\n')
    index = ["--default-index", world.simple_url(world.inherited)]
    clients.uv("lock", *index, cwd=tmp_path)
    assert world.library.sha256 in (tmp_path / "uv.lock").read_text()
    clients.uv("sync", "--frozen", *index, cwd=tmp_path)
    printed = clients.uv("pip", "list", "--format", "freeze", "--python", tmp_path / ".venv")
    assert {"hello-app==1.0", "hello-lib==1.0", "six==1.16.0"} <= set(printed.split())


def test_tox_takes_the_dependencies_of_its_environments_from_the_index(clients, world, tmp_path):
    (tmp_path / "tox.ini").write_text(
        "[tox]\nno_package = true\nenv_list = py\n"
        "[testenv]\npass_env = PIP_*\ndeps = hello-app\n"
        "commands = python -c 'import hello_app, hello_lib, iniconfig; print(\"all imported\")'\n")
    printed = clients.tox("run", cwd=tmp_path, PIP_INDEX_URL=world.simple_url(world.inherited))
    assert "all imported" in printed
