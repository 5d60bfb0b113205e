"""Real wheels and sdists, small and made in memory, and the form that uploads them.

The same arguments always give the same bytes; for other bytes under the same name, vary `summary`,
`size` or `extra_members`.
"""

import base64
import bz2
import dataclasses
import gzip
import hashlib
import io
import re
import tarfile
import warnings
import zipfile

# The fixed time inside every archive: what makes equal arguments give equal bytes.
ZIP_TIME = (2024, 1, 2, 3, 4, 6)
TAR_TIME = 1704164646


@dataclasses.dataclass(frozen=True)
class Archive:
    """A distribution file.

    `metadata` is its METADATA or PKG-INFO, `fields` the metadata as an upload form names it.
    """

    filename: str
    content: bytes
    name: str
    version: str
    metadata: bytes
    fields: dict

    @property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @property
    def md5(self):
        return hashlib.md5(self.content).hexdigest()


def normal_name(name):
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def wheel(
    name,
    version,
    requires_python=None,
    requires_dist=(),
    size=0,
    tag="py3-none-any",
    summary="A test package",
    metadata_version="2.1",
    extra_members=None,
    metadata=None,
):
    """A wheel that pip installs. `size` adds a member of that many bytes that don't compress.

    `extra_members` maps member names to bytes; `metadata` replaces the bytes of METADATA.
    """
    fields = _fields(name, version, requires_python, requires_dist, summary, metadata_version)
    fields.update(filetype="bdist_wheel", pyversion=tag.split("-")[0])
    if metadata is None:
        metadata = _metadata_file(fields)
    stem = "%s-%s" % (_escaped(name), version.replace("-", "_"))
    info = stem + ".dist-info"
    members = {_escaped(name) + "/__init__.py": ("version = %r\n" % version).encode()}
    if size:
        members[_escaped(name) + "/padding.bin"] = _noise(size)
    members.update(extra_members or {})
    members[info + "/METADATA"] = metadata
    members[info + "/WHEEL"] = _wheel_file(tag)
    members[info + "/RECORD"] = _record(members, info)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            entry = zipfile.ZipInfo(member, ZIP_TIME)
            entry.external_attr = 0o100644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return Archive("%s-%s.whl" % (stem, tag), packed.getvalue(), name, version, metadata, fields)


def sdist(
    name,
    version,
    requires_python=None,
    requires_dist=(),
    size=0,
    summary="A test package",
    metadata_version="2.1",
    extra_members=None,
    metadata=None,
):
    """A source distribution (.tar.gz) that pip installs without fetching a build tool."""
    fields = _fields(name, version, requires_python, requires_dist, summary, metadata_version)
    fields.update(filetype="sdist", pyversion="source")
    if metadata is None:
        metadata = _metadata_file(fields)
    stem = "%s-%s" % (_escaped(name), version)
    built = wheel(name, version, requires_python, requires_dist, summary=summary, metadata=metadata)
    members = {
        "PKG-INFO": metadata,
        "pyproject.toml": _PYPROJECT,
        "backend.py": _BACKEND % (built.filename, built.content),
        _escaped(name) + "/__init__.py": ("version = %r\n" % version).encode(),
    }
    if size:
        members["padding.bin"] = _noise(size)
    members.update(extra_members or {})
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for member, content in members.items():
            entry = tarfile.TarInfo("%s/%s" % (stem, member))
            entry.size, entry.mtime, entry.mode = len(content), TAR_TIME, 0o644
            archive.addfile(entry, io.BytesIO(content))
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=TAR_TIME) as archive:
        archive.write(plain.getvalue())
    return Archive(stem + ".tar.gz", packed.getvalue(), name, version, metadata, fields)


def around(filename, content, name, version):
    """An archive as its file name says, of that release, with the bytes as they are in a member.

    Of a file that is no wheel, egg, zip or tar, the bytes alone.
    """
    lower, stem, metadata = filename.lower(), "%s-%s" % (_escaped(name), version), (
        "Metadata-Version: 2.1\nName: %s\nVersion: %s\n" % (name, version)
    ).encode()
    place = {"whl": stem + ".dist-info/METADATA", "egg": "EGG-INFO/PKG-INFO"}
    members = {place.get(lower[-3:], stem + "/PKG-INFO"): metadata, stem + "/content": content}
    if lower.endswith(".whl"):
        members[stem + ".dist-info/WHEEL"] = _wheel_file("py3-none-any")
        members[stem + ".dist-info/RECORD"] = _record(members, stem + ".dist-info")
    packed = io.BytesIO()
    if lower.endswith((".whl", ".egg", ".zip")):
        with zipfile.ZipFile(packed, "w") as archive:
            for member, data in members.items():
                archive.writestr(zipfile.ZipInfo(member, ZIP_TIME), data)
        return packed.getvalue()
    if not lower.endswith((".tar.gz", ".tgz", ".tar.bz2")):
        return content
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for member, data in members.items():
            entry = tarfile.TarInfo(member)
            entry.size, entry.mtime = len(data), TAR_TIME
            archive.addfile(entry, io.BytesIO(data))
    if lower.endswith("bz2"):
        return bz2.compress(packed.getvalue())
    stored = io.BytesIO()
    with gzip.GzipFile(fileobj=stored, mode="wb", compresslevel=0, mtime=TAR_TIME) as archive:
        archive.write(packed.getvalue())
    return stored.getvalue()


def zipped(*members, compression=zipfile.ZIP_DEFLATED):
    """A zip of (name, text or bytes) members, in that order; a name may stand twice."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name, ZIP_TIME), content, compression)
    return packed.getvalue()


def documentation(name, version, page="<h1>The manual</h1>", suffix=".doc.zip", **pages):
    """A zip of one page (and of `pages`, NAME.html each), under the name that clients give it.

    Version None leaves the version out of the name.
    """
    members = [("index.html", page)] + [(other + ".html", text) for other, text in pages.items()]
    stem = name if version is None else "%s-%s" % (name, version)
    return Archive(stem + suffix, zipped(*members), name, version, b"", {})


def multipart(fields, files):
    """The body and Content-Type of a multipart/form-data form. A list as a value repeats the field.

    `files` maps a field to (filename, bytes).
    """
    digest = hashlib.sha256(repr((fields, sorted(files))).encode()).hexdigest()
    boundary = "test-boundary-" + digest[:32]
    parts = []
    for field, value in fields.items():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            item = item if isinstance(item, bytes) else str(item).encode()
            parts.append(
                b'--%s\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
                % (boundary.encode(), field.encode(), item)
            )
    for field, (filename, content) in files.items():
        parts.append(
            b'--%s\r\nContent-Disposition: form-data; name="%s"; filename="%s"\r\n'
            b"Content-Type: application/octet-stream\r\n\r\n"
            % (boundary.encode(), field.encode(), filename.encode())
        )
        parts += [content, b"\r\n"]
    parts.append(b"--%s--\r\n" % boundary.encode())
    return b"".join(parts), "multipart/form-data; boundary=" + boundary


# -- the parts ------------------------------------------------------------------------------------


_PYPROJECT = b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
# An in-tree build backend (PEP 517) that writes out the wheel it carries.
_BACKEND = b"""\
import os
FILENAME, CONTENT = %a, %a
def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    with open(os.path.join(wheel_directory, FILENAME), "wb") as wheel:
        wheel.write(CONTENT)
    return FILENAME
"""


def _escaped(name):
    """The name as it stands in file names (PEP 427, 625)."""
    return normal_name(name).replace("-", "_")


def _fields(name, version, requires_python, requires_dist, summary, metadata_version):
    fields = {
        "metadata_version": metadata_version, "name": name, "version": version, "summary": summary}
    if requires_python:
        fields["requires_python"] = requires_python
    if requires_dist:
        fields["requires_dist"] = list(requires_dist)
    return fields


def _metadata_file(fields):
    lines = [
        "Metadata-Version: " + fields["metadata_version"],
        "Name: " + fields["name"],
        "Version: " + fields["version"],
        "Summary: " + fields["summary"],
    ]
    if "requires_python" in fields:
        lines.append("Requires-Python: " + fields["requires_python"])
    lines += ["Requires-Dist: " + requirement for requirement in fields.get("requires_dist", ())]
    return ("\n".join(lines) + "\n").encode()


def _noise(size):
    """`size` bytes that look random, the same on every call."""
    return hashlib.shake_128(b"noise").digest(size)


def _wheel_file(tag):
    return ("Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: %s\n" % tag).encode()


def _record(members, info):
    rows = []
    for member, content in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.append("%s,sha256=%s,%d" % (member, digest, len(content)))
    return ("\n".join(rows) + "\n%s/RECORD,,\n" % info).encode()
