"""What was installed once through the server can be installed again when PyPI is out of reach."""

import pytest

from clients import INSTALLERS, Clients, in_a_few_tries
from harness import wheel

NEEDED = {"six": "1.16.0", "iniconfig": "2.0.0"}
REQUIREMENTS = ["%s==%s" % pair for pair in NEEDED.items()]
INDEXES = ["root/pypi", "alice/inherited"]


@pytest.fixture(scope="module")
def offline(pypi_server, tmp_path_factory):
    """A server that pip 20.3, which asks for no metadata files, has used once; now in offline mode."""
    directory = tmp_path_factory.mktemp("offline")
    server = pypi_server(directory / "server")
    server.add_user("alice")
    server.add_index("alice/inherited", bases=["root/pypi"])
    assert server.upload("alice/inherited", wheel("hello-lib", "1.0")).status == 200
    online, url = Clients(directory / "online"), server.url + "/root/pypi/+simple/"
    assert in_a_few_tries(lambda: online.install("pip20", url, *REQUIREMENTS)) == NEEDED
    return server.restart("--offline-mode")


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("installer", INSTALLERS)
def test_the_same_install_works_offline_with_empty_caches(clients, offline, installer, index):
    assert clients.install(installer, "%s/%s/+simple/" % (offline.url, index), *REQUIREMENTS) == NEEDED


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("installer", INSTALLERS)
def test_offline_the_newest_release_is_the_newest_at_hand(clients, offline, installer, index):
    """Nothing is offered that cannot be served."""
    assert clients.install(installer, "%s/%s/+simple/" % (offline.url, index), *NEEDED) == NEEDED


@pytest.mark.parametrize("installer", INSTALLERS)
def test_offline_private_projects_are_served(clients, offline, installer):
    url = offline.url + "/alice/inherited/+simple/"
    assert clients.install(installer, url, "hello-lib", "six") == {"hello-lib": "1.0", "six": "1.16.0"}


@pytest.mark.parametrize("index", INDEXES)
def test_offline_a_project_that_was_never_fetched_is_out_of_reach(clients, offline, index):
    """It is not reported as unknown: nobody could tell."""
    assert offline.get("/%s/+simple/idna/" % index).status == 404
    printed = clients.install("uv", "%s/%s/+simple/" % (offline.url, index), "idna", expect=None, UV_HTTP_RETRIES="0")
    assert "idna" in printed
