"""Source projects as a packager has them on disk: built, tested and documented by the tools that their users run."""

import io
import stat
import subprocess
import tarfile
import textwrap
import zipfile
from pathlib import Path

from archives import Archive, normal_name
from clients import PYTHON, clean_environment

# A build backend (PEP 517) that packs the directory as it stands. Real ones have to be fetched for each build.
BACKEND = """\
import io, os, tarfile, zipfile
METADATA = %(metadata)r
STEM, MODULE = %(stem)r, %(module)r

def build_sdist(sdist_directory, config_settings=None):
    filename = STEM + ".tar.gz"
    with tarfile.open(os.path.join(sdist_directory, filename), "w:gz") as archive:
        for name in sorted(set(os.listdir(".")) - {"dist", "build", ".git"}):
            archive.add(name, STEM + "/" + name)
        entry = tarfile.TarInfo(STEM + "/PKG-INFO")
        entry.size = len(METADATA)
        archive.addfile(entry, io.BytesIO(METADATA.encode()))
    return filename

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    filename, info = STEM + "-py3-none-any.whl", STEM + ".dist-info/"
    members = {
        MODULE + ".py": open(MODULE + ".py").read(),
        info + "METADATA": METADATA,
        info + "WHEEL": "Wheel-Version: 1.0\\nGenerator: tests\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    members[info + "RECORD"] = "".join("%%s,,\\n" %% name for name in [*members, info + "RECORD"])
    with zipfile.ZipFile(os.path.join(wheel_directory, filename), "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    return filename

build_editable = build_wheel
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'

# Stands in the place of Sphinx, which is many packages: `sphinx-build -E SOURCE OUTPUT` makes one page of one page.
SPHINX_BUILD = """\
#!%s
import pathlib, sys
source, output = map(pathlib.Path, sys.argv[-2:])
output.mkdir(parents=True)
(output / "index.html").write_text("<p>" + (source / "index.rst").read_text())
"""


def write_project(directory, name, version, settings="", metadata=""):
    """A project with documentation in `directory`; `settings` are added to its pyproject.toml. Returns the directory.

    `metadata` are more lines for its METADATA file.
    """
    module = normal_name(name).replace("-", "_")
    lines = "Metadata-Version: 2.1\nName: %s\nVersion: %s\nSummary: A project of the tests\n" % (name, version)
    backend = BACKEND % {"metadata": lines + metadata, "stem": "%s-%s" % (module, version), "module": module}
    return write_files(directory, {
        "pyproject.toml": PYPROJECT + settings,
        "backend.py": backend,
        module + ".py": "version = %r\n" % version,
        "docs/conf.py": "",
        "docs/index.rst": "The manual of %s %s" % (name, version),
    })


def write_files(directory, files):
    """Writes {path: text} below the directory, which it returns."""
    for path, text in files.items():
        path = Path(directory) / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return Path(directory)


def git_add(directory):
    """Puts all that is in the directory under version control."""
    for command in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git"] + command, cwd=str(directory), env=clean_environment(directory), check=True)


def sphinx_build(directory):
    """The directory, with an executable `sphinx-build` in it."""
    script = write_files(directory, {"sphinx-build": SPHINX_BUILD % PYTHON}) / "sphinx-build"
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return Path(directory)


def documentation(name, version, page, suffix=".doc.zip"):
    """An archive of one page, named as devpi-client expects it; version None leaves the version out of the name."""
    packed, content = io.BytesIO(), page.encode()
    if suffix.endswith(".zip"):
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("index.html", content)
    else:
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            entry = tarfile.TarInfo("index.html")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    stem = name if version is None else "%s-%s" % (name, version)
    return Archive(stem + suffix, packed.getvalue(), name, version, b"", {})
