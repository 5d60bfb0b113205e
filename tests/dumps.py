"""Dumps of devpi as devpi-export writes them, made by hand: small, and wrong where a test wants it."""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import sqlite3
import subprocess
import zipfile

import devpi_lite
from harness import normal_name, run_command, wheel

DATA = pathlib.Path(__file__).resolve().parent / "data"
STAGE = {"type": "stage", "bases": [], "volatile": True, "acl_upload": ["mira"],
         "acl_toxresult_upload": [":ANONYMOUS:"], "mirror_whitelist": [],
         "mirror_whitelist_inheritance": "intersection"}
WHEN = [2026, 11, 28, 13, 0, 0]
MODIFIED = "Sat, 28 Nov 2026 13:00:00 GMT"
# of the password `mira-pw`, with little work
ARGON2 = "$argon2id$v=19$m=256,t=1,p=1$c2FtcGxlLXNhbHQtbWlyYQ$0nyZmDcCuXJyYbevAdqM+R1/K36WKsE2GXR+KsShIEE"


class Dump:
    """A dump of version 2 in a folder: root and mira, whose stage is mira/dev.

    Change `data`, then `write`.
    """

    def __init__(self, folder, version="2"):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data = {
            "dumpversion": version, "pythonversion": [3, 11, 7, "final", 0], "devpi_server": "6.20.3",
            "users": {name: {"username": name, "pwhash": ARGON2, "created": "2026-11-28T12:59:49Z"}
                      for name in ("root", "mira")},
            "indexes": {}}
        self.add_index("mira/dev")

    def add_index(self, path, config=STAGE, **more):
        self.data["indexes"][path] = {"indexconfig": {**config, **more}, "projects": {}, "files": []}
        return self.data["indexes"][path]

    def index(self, path="mira/dev"):
        return self.data["indexes"][path]

    def register(self, name, version, index="mira/dev", **metadata):
        versions = self.index(index)["projects"].setdefault(normal_name(name), {})
        if self.data["dumpversion"] in ("3", 3):
            versions = versions.setdefault("versions", {})
        versions[version] = {"name": name, "version": version, **metadata}

    def add(self, archive, index="mira/dev", **entry):
        """Adds an `Archive`, with its release; returns the entry of `files`."""
        project = normal_name(archive.name)
        self.register(archive.name, archive.version, index, summary="A test package")
        return self.add_file(
            "releasefile", project, archive.version, "%s/%s/%s/%s" % (index, project, archive.version, archive.filename),
            archive.content, index, **entry)

    def add_file(self, type, project, version, relpath, content, index="mira/dev", **entry):
        path = self.folder / relpath
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        entry = {
            "type": type, "projectname": project, "version": version, "relpath": relpath,
            "entrymapping": {"hashes": {"sha256": sha256}, "hash_spec": "sha256=" + sha256, "last_modified": MODIFIED,
                             "project": project, "version": version},
            "log": [{"what": "upload", "who": "mira", "when": WHEN, "dst": index}], **entry}
        entry = {key: value for key, value in entry.items() if value is not None}
        self.index(index)["files"].append(entry)
        return entry

    def add_result(self, archive, content=b'{"testenvs": {}}', index="mira/dev", **entry):
        project = normal_name(archive.name)
        relpath = "%s/%s/sha256=%s/%s.toxresult-20261128130000-0" % (index, project, archive.sha256, archive.filename)
        path = "%s/+f/%s/%s/%s" % (index, archive.sha256[:3], archive.sha256[3:16], archive.filename)
        return self.add_file(
            "toxresult", project, archive.version, relpath, content, index, **{"for_entrypath": path, **entry})

    def write(self, text=None):
        text = json.dumps(self.data, indent=2) if text is None else text
        (self.folder / "dataindex.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        return self.folder

    def imported(self, target, *options, **keywords):
        self.write()
        return run_import(self.folder, target, *options, **keywords)

    def imported_here(self, target, *options):
        self.write()
        return import_here(self.folder, target, *options)


def run_import(folder, target, *options, **keywords):
    return run_command("import", folder, "--serverdir", target, *options, **keywords)


def import_here(folder, target, *options):
    """As `run_import`, in this process: for what is refused before passwords are hashed, in a tenth of the time."""
    out, error, umask = io.StringIO(), io.StringIO(), os.umask(0o077)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            status = devpi_lite.main(["import", str(folder), "--serverdir", str(target), *options])
    finally:
        os.umask(umask)
    return subprocess.CompletedProcess([], status, out.getvalue(), error.getvalue())


def unpacked(name, folder):
    """The folder of a dump in tests/data."""
    with zipfile.ZipFile(DATA / name) as archive:
        archive.extractall(folder)
    return pathlib.Path(folder)


def assert_nothing(target):
    """A failed import left nothing behind."""
    assert not os.path.exists(target) or set(os.listdir(target)) <= {".lock"}


def rows(directory, sql, *values):
    db = sqlite3.connect(str(directory / "devpi_lite.db"))
    try:
        return db.execute(sql, values).fetchall()
    finally:
        db.close()


def small(version="1.0", name="lantern", **options):
    return wheel(name, version, **options)
