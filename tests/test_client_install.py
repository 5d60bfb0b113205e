"""The client's `devpi install`: pip (or uv) on the current index, with the credentials out of sight.

A program of ours stands in the place of pip and uv: it notes how it was called.
"""

import json
import os
import shlex
import sys

import pytest

from client import CERTIFICATE, Client, Gate, POSIX
from harness import new_index

pytestmark = pytest.mark.skipif(not POSIX, reason="its pip is an executable script")

PIP = """if True:
    import json, os, sys
    here = os.path.dirname(os.path.abspath(__file__))
    if sys.argv[1:] == ["--version"]:
        print("pip 24.0 from %s (python 3.11)" % here)
        sys.exit()
    with open(os.path.join(here, "calls"), "a") as calls:
        calls.write(json.dumps({
            "program": os.path.abspath(__file__), "arguments": sys.argv[1:], "environment": dict(os.environ)}) + "\\n")
    sys.exit(int(os.environ.get("CODE", 0)))"""


@pytest.fixture
def devpi(tmp_path, site, index):
    """The client with alice logged in on an index, and the stand-in as the pip of the Python that runs the client."""
    devpi = Client(tmp_path / "home").sign_in(site, "alice", index)
    devpi.pip = devpi.write("modules/pip/__init__.py", "").parent
    devpi.write("modules/pip/__main__.py", PIP.replace("if True:", "if __name__ == '__main__':", 1))
    devpi.environment["PYTHONPATH"] = str(devpi.pip.parent)
    return devpi


OWN = shlex.quote(sys.executable) + " -m pip install -U "


@pytest.fixture
def venv(devpi):
    """A virtual environment, as far as anybody asks, with the stand-in for pip."""
    devpi.add_command("pip", PIP, "venv/bin")
    devpi.write("venv/pyvenv.cfg", "home = /usr/bin\n")
    return devpi.home / "venv"


def calls(directory):
    """How the stand-in in that directory was called since the last time that this was asked."""
    path = directory / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("")
    return [json.loads(line) for line in lines]


def test_pip_gets_the_index_by_its_environment_and_nobody_sees_the_session(devpi, site):
    index = new_index(site, "alice", acl_pkg_read=["alice"])
    devpi.sign_in(site, "alice", index)
    printed = devpi("install", "six", "flask>2", PYTHONDONTWRITEBYTECODE="1", PIP_EXTRA_INDEX_URL="https://example.org/simple/")
    (call,) = calls(devpi.pip)
    assert call["arguments"] == ["install", "-U", "six", "flask>2"]
    environment, token = call["environment"], site.tokens["alice"]
    assert environment["PIP_INDEX_URL"].startswith("http://alice:")
    assert environment["PIP_INDEX_URL"].endswith("@127.0.0.1:%d/%s/+simple/" % (site.port, index))
    assert environment["PIP_PRE"] == "1" and not {"PYTHONDONTWRITEBYTECODE", "PIP_EXTRA_INDEX_URL"} & set(environment)
    (echo,) = [line for line in printed.lines if line.startswith("--> ")]
    assert OWN + "six 'flask>2'" in echo and "pre-releases count too (--no-pre: final releases only)" in printed.lines
    assert "PIP_INDEX_URL='http://****:****@127.0.0.1:%d/%s/+simple/'" % (site.port, index) in echo
    assert token not in printed + printed.errors and not any(token in argument for argument in call["arguments"])
    printed = devpi("install", "--no-pre", "six")
    assert "PIP_PRE" not in calls(devpi.pip)[0]["environment"] and "pre-releases" not in printed


@pytest.mark.parametrize("protected, base, needs_login", [(False, False, False), (True, False, True), (False, True, True)])
def test_the_login_is_handed_on_only_where_reading_needs_it(devpi, site, protected, base, needs_login):
    """What is installed runs with the variables of who installs it, and a login may do more than read."""
    acl = {True: {"acl_pkg_read": ["alice"]}, False: {}}
    bases = [new_index(site, "alice", **acl[base])]
    index = new_index(site, "alice", bases=bases, **acl[protected])
    devpi("install", "--index", index, "six")
    (call,) = calls(devpi.pip)
    handed_on = [value for value in call["environment"].values() if site.tokens["alice"] in value]
    assert bool(handed_on) == needs_login
    assert call["environment"]["UV_DEFAULT_INDEX"].endswith("127.0.0.1:%d/%s/+simple/" % (site.port, index))


def test_the_options_of_install(devpi, site, index):
    other = new_index(site, "alice")
    devpi("install", "--index", other, "-r", "requirements.txt")
    devpi("install", "-e", ".")
    devpi("install", "-l")
    requirements, editable, listing = calls(devpi.pip)
    assert requirements["arguments"] == ["install", "-U", "--requirement", "requirements.txt"]
    assert "/%s/+simple/" % other in requirements["environment"]["PIP_INDEX_URL"]
    assert editable["arguments"][-2:] in (["-e", "."], ["--editable", "."]) and listing["arguments"][0] == "list"
    assert "cannot specify packagespecs and --editable" in devpi("install", "-e", ".", "six", expect=1)
    devpi("install")
    assert calls(devpi.pip) == []


def test_pips_exit_code_is_ours(devpi):
    assert "command failed" in devpi("install", "six", expect=23, CODE="23")


def test_a_virtual_environment_is_remembered(devpi, venv):
    devpi("install", "--venv", venv, "six")
    devpi("install", "flask")
    assert [call["arguments"][-1] for call in calls(venv / "bin")] == ["six", "flask"]
    assert devpi.state()["venvdir"] == str(venv)
    assert "No virtualenv found at: '" in devpi("install", "--venv", devpi.home / "nope", "six", expect=1)
    devpi("use", "--venv", "-")
    devpi("install", "six", VIRTUAL_ENV=venv)
    assert len(calls(venv / "bin")) == 1 and not calls(devpi.pip)
    devpi("install", "--venv", "venv", "six", WORKON_HOME=devpi.home, cwd="/")
    assert len(calls(venv / "bin")) == 1


def test_a_virtual_environment_without_pip_is_served_by_uv(devpi, venv, site, index):
    (venv / "bin" / "pip").unlink()
    devpi.add_command("python", PIP, "venv/bin")
    devpi.environment["PATH"] = devpi.add_command("uv", PIP)
    printed = devpi("install", "--venv", venv, "six")
    (call,) = calls(devpi.home / "bin")
    assert call["program"].endswith("/uv") and call["arguments"][:2] == ["pip", "install"] and "six" in call["arguments"]
    assert call["environment"]["UV_DEFAULT_INDEX"].endswith("/%s/+simple/" % index)
    assert site.tokens["alice"] not in " ".join(call["arguments"]) + printed + printed.errors
    devpi("install", "--venv", "-", "--uv", "six", expect=None, PATH="/nonexistent")


def test_without_pip_it_says_so(devpi):
    printed = devpi("install", "six", expect=1, PATH="/nonexistent", PYTHONPATH=without_pip(devpi))
    assert "no pip binary found" in printed


def without_pip(devpi):
    """A directory for PYTHONPATH that makes a Python one without pip."""
    return devpi.write("none/pip.py", "raise ImportError").parent


def test_which_pip_it_is(devpi):
    """That of the Python by which the client was started, and not the first one on the PATH, which may be of another Python."""
    path = devpi.add_command("pip", PIP)
    devpi("install", "six", PATH=path)
    assert len(calls(devpi.pip)) == 1 and not calls(devpi.home / "bin")
    devpi("install", "six", PATH=path, PYTHONPATH=without_pip(devpi))
    assert len(calls(devpi.home / "bin")) == 1
    # as an installed program, of an environment of its own that is not on the PATH, or is
    text = "import sys\nsys.argv[0] = 'devpi'\nsys.path.insert(0, %r)\nimport devpi_lite_client\n" \
        "sys.exit(devpi_lite_client.main())\n" % os.path.dirname(devpi.command[1])
    devpi.command = [sys.executable, str(devpi.write("program", text))]
    devpi("install", "six", PATH=path.replace(os.path.dirname(sys.executable), "/nonexistent"))
    assert len(calls(devpi.home / "bin")) == 1
    devpi("install", "six", PATH=path + os.pathsep + os.path.dirname(sys.executable))
    assert len(calls(devpi.pip)) == 1 and not calls(devpi.home / "bin")


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT"])
def test_an_authority_of_ones_own_is_handed_on(devpi, site, index, name):
    """Each program has a variable of its own for it, and runs in a directory of its own."""
    pem = devpi.write("own.pem", CERTIFICATE)
    gate = Gate(site, certificate=pem)
    try:
        devpi.sign_in(site, "alice", index, url=gate.url)
        devpi("install", "six", **{name: "own.pem"})
        environment = calls(devpi.pip)[0]["environment"]
        assert {environment.get(each) for each in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")} == {str(pem)}
        devpi("install", "six", SSL_CERT_FILE="own.pem", PIP_CERT=pem.parent / "other.pem", expect=1)
        (devpi.home / "other.pem").write_text(CERTIFICATE)
        devpi("install", "six", SSL_CERT_FILE="own.pem", PIP_CERT=pem.parent / "other.pem")
        assert calls(devpi.pip)[0]["environment"]["PIP_CERT"] == str(devpi.home / "other.pem")
        devpi.sign_in(site, "alice", index)
        devpi("install", "six", **{name: pem})
        environment = calls(devpi.pip)[0]["environment"]
        assert [each for each in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE") if each in environment] == [name]
    finally:
        gate.close()
