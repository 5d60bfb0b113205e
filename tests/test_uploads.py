"""Uploads: what twine, uv, Poetry, devpi-client and curl send, and what must never get in."""

import contextlib
import hashlib
import io
import itertools
import os
import socket
import tarfile
import threading
import urllib.parse

import pytest

from harness import (
    Server, around, links, multipart, page, path_of, sdist, serial, user_pass, wheel, zipped)

BOUNDARY = "b0undary-b0undary"
numbers = itertools.count(1)


# Helpers


@pytest.fixture(scope="module")
def site(shared_server):
    """A server with `up/dev` (volatile), `up/stable` (not volatile), the mirror `up/mirror` and a stranger."""
    shared_server.add_user("up")
    shared_server.add_user("stranger")
    shared_server.login("up", "pw")
    shared_server.login("stranger", "pw")
    shared_server.add_index("up/dev", volatile=True)
    shared_server.add_index("up/stable", volatile=False)
    shared_server.add_index("up/imports")
    shared_server.add_index("up/mirror", type="mirror", mirror_url="http://127.0.0.1:9/simple/")
    return shared_server


@pytest.fixture(scope="module")
def lenient(tmp_path_factory):
    """A server with `up/dev`, volatile, that takes archives that can't be read."""
    server = Server(tmp_path_factory.mktemp("lenient") / "server", "--accept-broken-archives").start()
    server.add_user("up")
    server.login("up", "pw")
    server.add_index("up/dev", volatile=True)
    yield server
    server.kill()


def form(archive, **changes):
    """The form of an archive as twine sends it; a change to None leaves the field out."""
    fields = {
        ":action": "file_upload",
        "protocol_version": "1",
        "metadata_version": "2.1",
        "name": archive.name,
        "version": archive.version,
        "filetype": "bdist_wheel" if archive.filename.endswith(".whl") else "sdist",
        "pyversion": "py3" if archive.filename.endswith(".whl") else "source",
        "sha256_digest": archive.sha256,
    }
    for key, value in changes.items():
        fields[":action" if key == "action" else key] = value
    return {key: value for key, value in fields.items() if value is not None}


def post(server, index, fields, content=None, user="up", headers=None, **options):
    """Posts a form; `content` is (file name, bytes)."""
    body, content_type = multipart(fields, {"content": content} if content else {})
    sent = {"Content-Type": content_type}
    sent.update(headers or {})
    return server.request("POST", "/%s/" % index, body=body, headers=sent, user=user, **options)


def put_file(server, index, archive, user="up", headers=None, filename=None, **changes):
    return post(
        server, index, form(archive, **changes), (filename or archive.filename, archive.content), user, headers)


def raw_file(name, version, content, suffix=".tar.gz"):
    """The form and the file of an archive that has these bytes in it, as they are."""
    fields, filename = {":action": "file_upload", "name": name, "version": version}, "%s-%s%s" % (name, version, suffix)
    return fields, (filename, around(filename, content, name, version))


def parts(items, boundary=BOUNDARY):
    """A multipart body from (name, file name or None, bytes) in exactly this order."""
    lines = []
    for name, filename, content in items:
        head = 'Content-Disposition: form-data; name="%s"' % name
        if filename is not None:
            head += '; filename="%s"\r\nContent-Type: application/octet-stream' % filename
        lines.append(b"--%s\r\n%s\r\n\r\n%s\r\n" % (boundary.encode(), head.encode("utf-8"), content))
    return b"".join(lines) + b"--%s--\r\n" % boundary.encode()


def post_parts(server, index, body, headers=None, user="up"):
    sent = {"Content-Type": "multipart/form-data; boundary=%s" % BOUNDARY}
    sent.update(headers or {})
    return server.request("POST", "/%s/" % index, body=body, headers=sent, user=user)


def entries(server, index, project):
    """Filename -> entry of the JSON page; empty when there is no such project."""
    reply = page(server, index, project)
    return {entry["filename"]: entry for entry in reply.json()["files"]} if reply.status == 200 else {}


def state(server, index, project):
    """Everything a client can see of a project, and the serial."""
    json_page = page(server, index, project)
    html_page = server.get("/%s/+simple/%s/" % (index, project), headers={"Accept": "text/html"})
    record = server.get("/%s/%s" % (index, project))
    return (
        serial(server), json_page.status, json_page.body, html_page.status, html_page.body, record.status, record.body,
        server.get("/%s" % index).body,
    )


def authorization(server, user="up", password="pw"):
    return "Authorization: Basic %s\r\n" % user_pass(user, password)


def head(server, index, content_type, extra, user="up"):
    """A request head for raw sockets; `extra` holds the framing headers."""
    return (
        "POST /%s/ HTTP/1.1\r\nHost: %s\r\nAccept: application/json\r\nContent-Type: %s\r\n%s%s\r\n"
        % (index, urllib.parse.urlsplit(server.url).netloc, content_type, authorization(server, user) if user else "",
           extra)
    ).encode()


def read_head(stream):
    """Status line and headers (lower-case names) of one answer."""
    status = stream.readline().decode("latin-1").rstrip("\r\n")
    headers = {}
    while True:
        line = stream.readline().decode("latin-1").rstrip("\r\n")
        if not line:
            return status, headers
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()


def still_answers(server):
    assert server.get("/+api").status == 200


# Registering metadata


@pytest.mark.parametrize("encoding", ["multipart", "urlencoded"])
def test_submit_registers_a_release_without_files(site, encoding):
    project = "registered-" + encoding
    fields = {":action": "submit", "name": project, "version": "1.0", "summary": "a\u00e9\u4e2d", "author": "Ann"}
    if encoding == "multipart":
        reply = post(site, "up/dev", fields)
    else:
        reply = site.request(
            "POST", "/up/dev/", body=urllib.parse.urlencode(fields).encode(),
            headers={"Content-Type": "application/x-www-form-urlencoded"}, user="up")
    assert (reply.status, reply.body) == (200, b"")
    shown = site.get("/up/dev/%s/1.0" % project).result
    assert (shown["summary"], shown["author"], shown["license"], shown["classifiers"]) == ("a\u00e9\u4e2d", "Ann", "", [])
    assert "+links" not in shown
    assert page(site, "up/dev", project).json()["files"] == []
    assert page(site, "up/dev", project).json()["versions"] == ["1.0"]


def test_urlencoded_submit_takes_repeated_fields_as_a_list(site):
    fields = [(":action", "submit"), ("name", "urlencoded-list"), ("version", "1"), ("classifiers", "A :: B"),
              ("classifiers", "C :: D")]
    reply = site.request(
        "POST", "/up/dev/", body=urllib.parse.urlencode(fields).encode(),
        headers={"Content-Type": "application/x-www-form-urlencoded"}, user="up")
    assert reply.status == 200
    assert site.get("/up/dev/urlencoded-list/1").result["classifiers"] == ["A :: B", "C :: D"]


def test_submit_replaces_all_metadata_and_keeps_the_files(site):
    archive = wheel("resubmitted", "1.0")
    assert put_file(site, "up/dev", archive, summary="first", author="Ann").status == 200
    reply = post(site, "up/dev", {":action": "submit", "name": "resubmitted", "version": "1.0", "summary": "second"})
    assert reply.status == 200
    shown = site.get("/up/dev/resubmitted/1.0").result
    assert (shown["summary"], shown["author"]) == ("second", "")
    assert site.fetch("up/dev", archive.filename, "resubmitted") == archive.content


@pytest.mark.parametrize("fields, message", [
    ({"version": "1"}, 'invalid metadata: Missing required field "name"'),
    ({"name": "x"}, 'invalid metadata: Missing required field "version"'),
    ({"name": "-x", "version": "1"},
     "invalid metadata: Invalid package name. Names must start with an ASCII letter or digit"),
    ({"name": "x-", "version": "1"},
     "invalid metadata: Invalid package name. Names must end with an ASCII letter or digit"),
    ({"name": "x y", "version": "1"},
     "invalid metadata: Invalid package name. "
     "Names must contain only ASCII letters, digits, underscores, hyphens, and periods"),
    ({"name": "x", "version": "1#2"}, "invalid metadata: Invalid package name or version (URL safety)"),
    ({"name": "x", "version": "<1>"}, "invalid metadata: Invalid package name or version (URL safety)"),
])
def test_submit_with_invalid_metadata_is_refused_in_words(site, fields, message):
    before = serial(site)
    reply = post(site, "up/dev", dict(fields, **{":action": "submit"}))
    assert (reply.status, reply.reason) == (400, message)
    assert reply.json()["message"] == message
    assert serial(site) == before


# A release file


@pytest.mark.parametrize("make", [wheel, sdist])
@pytest.mark.parametrize("slash", ["/", ""])
def test_uploaded_file_comes_back_byte_for_byte(site, make, slash):
    archive = make("whole" + ("a" if slash else "b"), "1.2.3")
    body, content_type = multipart(form(archive), {"content": (archive.filename, archive.content)})
    reply = site.request("POST", "/up/stable" + slash, body=body, headers={"Content-Type": content_type}, user="up")
    assert (reply.status, reply.body) == (200, b"")
    assert reply.headers.get("Content-Type") == "text/html; charset=UTF-8"
    entry = entries(site, "up/stable", archive.name)[archive.filename]
    assert entry["hashes"] == {"sha256": archive.sha256}
    assert site.fetch("up/stable", archive.filename, archive.name) == archive.content


def test_upload_raises_the_serial_by_one_and_the_answer_names_it(site):
    before = serial(site)
    reply = put_file(site, "up/dev", wheel("serialed", "1.0"))
    assert int(reply.headers.get("X-DEVPI-SERIAL")) == before + 1 == serial(site)


def test_upload_is_in_the_history_of_the_release(site):
    archive = wheel("logged", "1.0")
    put_file(site, "up/dev", archive)
    [link] = links(site, "up/dev/logged/1.0")
    assert (link["rel"], link["hash_spec"], link["hashes"]) == (
        "releasefile", "sha256=" + archive.sha256, {"sha256": archive.sha256})
    assert link["href"] == site.url + path_of(archive, "up/dev")
    [entry] = link["log"]
    assert (entry["what"], entry["who"], entry["dst"], len(entry["when"])) == ("upload", "up", "up/dev", 6)


@pytest.mark.parametrize("order", [
    ["content", "fields"], ["fields", "content"], ["name", "content", "rest"], ["action-last"]])
def test_the_parts_of_a_form_may_come_in_any_order(site, order):
    archive = wheel("order" + "".join(order).replace("-", ""), "1.0")
    fields = [(key, None, value.encode()) for key, value in form(archive).items()]
    content = [("content", archive.filename, archive.content)]
    if order == ["content", "fields"]:
        items = content + fields
    elif order == ["fields", "content"]:
        items = fields + content
    elif order == ["action-last"]:
        items = content + sorted(fields, reverse=True)
        items = [item for item in items if item[0] != ":action"] + [item for item in items if item[0] == ":action"]
    else:
        items = fields[3:] + content + fields[:3]
    assert post_parts(site, "up/dev", parts(items)).status == 200
    assert site.fetch("up/dev", archive.filename, archive.name) == archive.content


def test_content_that_holds_near_boundaries_survives(site):
    content = b"".join(
        b"\r\n--" + BOUNDARY[:cut].encode() + b"\r\n-" for cut in range(len(BOUNDARY))) + b"\r\n\r\n--\r" * 5000
    fields, (filename, content) = raw_file("nearboundary", "1", content)
    assert content.count(BOUNDARY[:-1].encode()) == 1
    items = [(key, None, value.encode()) for key, value in fields.items()] + [("content", filename, content)]
    assert post_parts(site, "up/dev", parts(items)).status == 200
    assert site.fetch("up/dev", filename, "nearboundary") == content


def test_quoted_boundary_preamble_and_epilogue_are_understood(site):
    fields, content = raw_file("quotedboundary", "1", b"abc")
    items = [(key, None, value.encode()) for key, value in fields.items()] + [("content",) + content]
    body = b"This is a preamble\r\n" + parts(items, "a b=c") + b"and an epilogue"
    reply = post_parts(
        site, "up/dev", body, {"Content-Type": 'Multipart/Form-Data; charset=utf-8; boundary="a b=c"'})
    assert reply.status == 200
    assert site.fetch("up/dev", content[0], "quotedboundary") == content[1]


def test_empty_file_is_stored_where_broken_archives_are_taken(lenient):
    fields, (filename, _) = raw_file("emptyfile", "1", b"")
    assert post(lenient, "up/dev", fields, (filename, b"")).status == 200
    assert lenient.fetch("up/dev", filename, "emptyfile") == b""
    assert entries(lenient, "up/dev", "emptyfile")[filename]["size"] == 0


@pytest.mark.parametrize("sent, shown", [
    ({"classifiers": ["A :: B", "C :: D"]}, {"classifiers": ["A :: B", "C :: D"]}),
    ({"classifier": ["A :: B", "C :: D"]}, {"classifiers": ["A :: B", "C :: D"]}),
    ({"classifiers": "A :: B"}, {"classifiers": ["A :: B"]}),
    ({"provides_extra": ["x", "y"]}, {"provides_extras": ["x", "y"]}),
    ({"provides_extras": ["x", "y"]}, {"provides_extras": ["x", "y"]}),
    ({"project_urls": ["Home, https://pypi.org/"]}, {"project_urls": ["Home, https://pypi.org/"]}),
    ({"project_url": ["Home, https://pypi.org/"]}, {"project_urls": ["Home, https://pypi.org/"]}),
    ({"requires_dist": ["a>=1", "", "b; extra == 'x'"]}, {"requires_dist": ["a>=1", "b; extra == 'x'"]}),
    ({"license_file": ["LICENSE", "NOTICE"]}, {"license_file": ["LICENSE", "NOTICE"]}),
    ({"dynamic": ["version"]}, {"dynamic": ["version"]}),
    ({"summary": "UNKNOWN", "author": "Zo\u00eb"}, {"summary": "", "author": "Zo\u00eb"}),
    ({"description": "a\r\nb\n\n\u4e2d"}, {"description": "a\r\nb\n\n\u4e2d"}),
    ({"license_expression": "MIT OR Apache-2.0"}, {"license_expression": "MIT OR Apache-2.0"}),
])
def test_form_fields_of_all_clients_reach_the_version_data(site, sent, shown):
    fields, content = raw_file("spelled", "1.0", b"not an archive")
    fields[":action"] = "submit"
    fields.update(sent)
    assert post(site, "up/dev", fields).status == 200
    result = site.get("/up/dev/spelled/1.0").result
    assert {key: result[key] for key in shown} == shown


def test_twine_uv_and_poetry_forms_are_accepted_whole(site):
    archive = wheel("clientforms", "1.0")
    more = {
        "metadata_version": "2.4", "blake2_256_digest": hashlib.blake2b(archive.content, digest_size=32).hexdigest(),
        "md5_digest": hashlib.md5(archive.content).hexdigest(), "comment": "", "requires_python": ">=3.8",
        "description_content_type": "text/markdown", "keywords": "a, b", "home_page": "", "download_url": "",
        "platform": ["any"], "supported_platform": [""], "provides_dist": ["x"], "obsoletes_dist": ["y"],
        "requires_external": ["libc"], "provides": ["a"], "requires": ["b"], "obsoletes": ["c"],
        "maintainer": "M", "maintainer_email": "m@localhost", "author_email": "a@localhost", "license": "MIT",
    }
    assert put_file(site, "up/stable", archive, **more).status == 200
    shown = site.get("/up/stable/clientforms/1.0").result
    for key in ("requires_python", "description_content_type", "keywords", "platform", "provides_dist", "maintainer"):
        assert shown[key] == more[key]
    assert shown["supported_platform"] == []
    for key in ("protocol_version", "filetype", "pyversion", "sha256_digest", ":action", "content"):
        assert key not in shown


@pytest.mark.parametrize("metadata_version, more", [
    ("2.5", {"import_name": ["a", "b; private"], "import_namespace": ["n"]}),
    ("2.6", {"dynamic": ["requires-dist"], "import_names": [""]}),
    ("2.9", {"some_future_field": ["1", "2"], "x" * 200: "y"}),
    ("2.1", {"gpg_signature": "sig", "attestations": "[]"}),
])
def test_new_and_unknown_fields_never_refuse_an_upload(site, metadata_version, more):
    archive = wheel("future" + metadata_version.replace(".", ""), "1.0", metadata_version=metadata_version)
    assert put_file(site, "up/stable", archive, metadata_version=metadata_version, **more).status == 200
    assert archive.filename in entries(site, "up/stable", archive.name)


@pytest.mark.parametrize("lines, form, shown", [
    (("Import-Name: a", "Import-Name: b; private", "Import-Namespace: n"), {},
     {"import_name": ["a", "b; private"], "import_namespace": ["n"]}),
    ((), {"import_names": ["a", "b"], "import_namespaces": ["n"]}, {"import_name": ["a", "b"], "import_namespace": ["n"]}),
    (("Import-Name:",), {}, {"import_name": [""]}),             # nothing is to be imported (PEP 794)
    ((), {"import_name": [""], "import_namespace": [""]}, {"import_name": [""]}),
    ((), {}, {})])
@pytest.mark.parametrize("metadata_version", ["2.5", "2.6"])
def test_import_names_are_kept_shown_and_pushed(site, metadata_version, lines, form, shown):
    name = "imports%d" % next(numbers)
    head = ("Metadata-Version: " + metadata_version, "Name: " + name, "Version: 1.0", "Dynamic: requires-dist")
    archive = wheel(name, "1.0", metadata="\n".join(head + lines).encode() + b"\n")
    assert put_file(site, "up/stable", archive, metadata_version=metadata_version, **form).status == 200
    assert site.post("/up/stable", {"name": name, "version": "1.0", "targetindex": "up/imports"}, user="up").status == 200
    for index in ("up/stable", "up/imports"):
        found = site.get("/%s/%s/1.0" % (index, name)).result
        assert {key: value for key, value in found.items() if key.startswith("import")} == shown
        assert (found["metadata_version"], found["dynamic"]) == (metadata_version, ["requires-dist"])
        file, = entries(site, index, name).values()
        assert file["core-metadata"] == {"sha256": hashlib.sha256(archive.metadata).hexdigest()}


def test_metadata_of_an_unknown_major_version_is_refused(site):
    archive = wheel("toonew", "1.0", metadata_version="3.0")
    assert put_file(site, "up/stable", archive, metadata_version="3.0").status == 400
    assert entries(site, "up/stable", "toonew") == {}


def test_second_file_of_a_release_changes_only_the_fields_it_sends(site):
    assert put_file(site, "up/stable", wheel("merged", "1.0"), summary="first", author="Ann").status == 200
    assert put_file(site, "up/stable", sdist("merged", "1.0"), summary="second").status == 200
    shown = site.get("/up/stable/merged/1.0").result
    assert (shown["summary"], shown["author"]) == ("second", "Ann")
    assert len(shown["+links"]) == 2


def test_installers_see_the_requirement_of_the_archive_and_scripts_that_of_the_form(site):
    archive = wheel("twofaced", "1.0", requires_python=">=3.9")
    assert put_file(site, "up/stable", archive, requires_python=">=3.7").status == 200
    assert entries(site, "up/stable", "twofaced")[archive.filename]["requires-python"] == ">=3.9"
    assert site.get("/up/stable/twofaced/1.0").result["requires_python"] == ">=3.7"


def test_gaps_of_the_form_are_filled_from_the_archive(site):
    archive = wheel("gaps", "1.0", summary="from the archive", requires_python=">=3.9", requires_dist=("dep>=1",))
    assert put_file(site, "up/stable", archive, metadata_version=None).status == 200
    shown = site.get("/up/stable/gaps/1.0").result
    assert (shown["summary"], shown["requires_python"], shown["requires_dist"]) == (
        "from the archive", ">=3.9", ["dep>=1"])


@pytest.mark.parametrize("make", [wheel, sdist])
def test_an_unreadable_archive_falls_back_to_the_requirement_of_the_form(lenient, make):
    site = lenient
    archive = make("formonly", "1.0")
    fields = form(archive, sha256_digest=None, requires_python=">=3.6")
    assert post(site, "up/dev", fields, (archive.filename, b"123")).status == 200
    entry = entries(site, "up/dev", "formonly")[archive.filename]
    assert entry["requires-python"] == ">=3.6"
    assert "core-metadata" not in entry


@pytest.mark.parametrize("version, filename", [
    ("1.0+local.1", "local_a-1.0+local.1-py3-none-any.whl"),
    ("1.0+local-1", "local_a-1.0+local.1-py3-none-any.whl"),
    ("1.0+Ubuntu.1", "local_a-1.0+ubuntu.1-py3-none-any.whl"),
    ("1.0+local.1", "local_a-1.0+local.1.tar.gz"),
    ("1!2.0+x", "local_a-1!2.0+x-py3-none-any.whl"),
    ("1.0", "local_a-1.0.0-py3-none-any.whl"),
    ("1.0.0", "local_a-1.0-py3-none-any.whl"),
    ("2.0-1", "local_a-2.0.post1.tar.gz"),
])
def test_local_and_differently_spelled_versions_are_accepted(site, version, filename):
    site.delete("/up/dev/local-a", user="up")
    fields = {":action": "file_upload", "name": "local-a", "version": version}
    content = around(filename, b"", "local-a", version)
    assert post(site, "up/dev", fields, (filename, content)).status == 200
    assert site.fetch("up/dev", filename, "local-a") == content
    assert list(site.get("/up/dev/local-a").result) == [version]


def test_a_local_version_has_a_page_of_its_own_and_literal_plus_signs(site):
    archive = wheel("localpage", "1.0+abc.5")
    assert put_file(site, "up/stable", archive).status == 200
    for spelling in ("1.0+abc.5", "1.0%2Babc.5"):
        assert site.get("/up/stable/localpage/" + spelling).result["version"] == "1.0+abc.5"
    assert "+f/" in entries(site, "up/stable", "localpage")[archive.filename]["url"]
    assert site.fetch("up/stable", archive.filename, "localpage") == archive.content


@pytest.mark.parametrize("spelling, filename", [
    ("Foo.Bar_Baz", "foo_bar_baz-1.0-py3-none-any.whl"), ("foo-bar-baz", "Foo.Bar_Baz-1.0.tar.gz"),
    ("FOO--bar..baz", "foo_bar_baz-1.0.zip")])
def test_all_spellings_of_a_name_are_one_project(site, spelling, filename):
    fields = {":action": "file_upload", "name": spelling, "version": "1.0"}
    assert post(site, "up/dev", fields, (filename, around(filename, b"x", spelling, "1.0"))).status == 200
    assert filename in entries(site, "up/dev", "foo-bar-baz")
    assert site.get("/up/dev/foo-bar-baz/1.0").result["name"] == spelling


@pytest.mark.parametrize("suffix", [
    ".exe", ".tar.gz", ".bz2", ".tar.bz2", ".rpm", ".deb", ".zip", ".tgz", ".egg", ".dmg", ".msi", ".TAR.GZ", "-py3.9.egg"])
def test_every_archive_type_is_accepted(site, suffix):
    fields, content = raw_file("suffixed", "1.0", b"123", suffix)
    assert post(site, "up/dev", fields, content).status == 200
    assert content[0] in entries(site, "up/dev", "suffixed")


# Who may


@pytest.mark.parametrize("user, password", [
    (None, None), ("up", "wrong"), ("nobody", "pw"), ("__token__", "garbage"), ("__token__", "pypi-AgEIcHlwaS5vcmc"),
    ("up", "")])
def test_upload_without_valid_credentials_asks_for_them(site, user, password):
    archive = wheel("unauthorised", "1.0")
    extra = {"user": user, "password": password} if user else {"user": None}
    reply = post(site, "up/dev", form(archive), (archive.filename, archive.content), **extra)
    assert reply.status == 401
    assert reply.reason.startswith("Unauthorized: uploading to up/dev takes a login")
    assert reply.headers.get("WWW-Authenticate") == 'Basic realm="pypi"'
    assert reply.headers.get("Location") is None
    assert page(site, "up/dev", "unauthorised").status == 404


def test_upload_without_the_right_is_refused_in_words(site):
    reply = put_file(site, "up/dev", wheel("forbidden", "1.0"), user="stranger")
    assert (reply.status, reply.reason) == (403, "Forbidden: no permission to submit to up/dev: up may")
    assert reply.json()["message"] == "no permission to submit to up/dev: up may"
    assert page(site, "up/dev", "forbidden").status == 404


def test_owner_and_root_need_to_be_listed_to_upload(site):
    site.add_index("up/listed", acl_upload=["stranger"])
    site.login("root", "secret")
    for user, status in (("up", 403), ("root", 403), ("stranger", 200)):
        assert put_file(site, "up/listed", wheel("listed", "1.0"), user=user).status == status
    [link] = links(site, "up/listed/listed/1.0")
    assert link["log"][0]["who"] == "stranger"


def test_anonymous_upload_where_the_index_allows_it_is_logged_as_nobody(site):
    site.add_index("up/open", acl_upload=[":anonymous:"])
    assert put_file(site, "up/open", wheel("opened", "1.0"), user=None).status == 200
    [link] = links(site, "up/open/opened/1.0")
    assert link["log"][0]["who"] is None


def test_password_and_session_token_both_work_as_basic_password(site):
    token = site.login("up", "pw")
    for number, secret in enumerate(("pw", token)):
        archive = wheel("secrets", "1.%d" % number)
        reply = post(
            site, "up/dev", form(archive), (archive.filename, archive.content), user="up", password=secret)
        assert reply.status == 200


def test_messages_name_the_stages_that_take_an_upload(site):
    site.add_user("helpless")
    site.login("helpless", "pw")
    site.delete("/up/open", user="up")      # where anybody may
    archive = wheel("messages", "1.0")
    message = "cannot submit to mirror index up/mirror, which caches another server"
    site.put("/up/secret", {"acl_upload": ["helpless"], "acl_pkg_read": ["up"]}, user="up")
    for user in ("helpless", None):
        assert put_file(site, "up/mirror", archive, user=user).reason == message
    for number in range(6):
        site.put("/up/help%d" % number, {"acl_upload": ["helpless"]}, user="up")
    site.add_index("helpless/own")
    assert put_file(site, "up/mirror", archive, user="helpless").reason.endswith(
        "; you may upload to helpless/own, up/help0, up/help1, up/help2, up/help3, ...")


@pytest.mark.parametrize("path", [
    "/up/dev/foo", "/up/dev/foo/", "/up/dev/foo/1.0", "/up/dev/+simple/", "/up/dev/+simple/foo/", "/up/dev/+simple"])
def test_who_uploads_to_another_page_of_the_index_hears_where_to(site, path):
    body, content_type = multipart(dict(GOOD), {"content": FILE})
    reply = site.post(path, body, user="up", headers={"Content-Type": content_type})
    assert (reply.status, reply.reason) == (
        404, "nothing is uploaded here: the address to upload to is %s/up/dev/" % site.url)


# Refusals, their order and their words


GOOD = {":action": "file_upload", "name": "Foo", "version": "1.0"}
FILE = ("Foo-1.0.tar.gz", b"123")
REFUSALS = [
    # index, user, changes to the form, file, status, phrase (None: any)
    ("up/none", "up", {}, FILE, 404, None),
    ("nobody/none", "up", {}, FILE, 404, None),
    ("up/mirror", "up", {}, FILE, 404, "cannot submit to mirror index up/mirror, which caches another server..."),
    ("up/mirror", None, {}, FILE, 404, "cannot submit to mirror index up/mirror, which caches another server..."),
    ("up/dev", "stranger", {}, FILE, 403, "no permission to submit to up/dev: up may"),
    ("up/dev", "stranger", {":action": "foo"}, FILE, 403, "no permission to submit to up/dev: up may"),
    ("up/dev", "up", {":action": "foo"}, FILE, 400, "action 'foo' not supported"),
    ("up/dev", "up", {":action": "foo"}, None, 400, "action 'foo' not supported"),
    ("up/dev", "up", {}, None, 400, "content file field not found"),
    ("up/dev", "up", {"version": "2.0"}, None, 400, "content file field not found"),
    ("up/dev", "up", {"version": "2.0"}, FILE, 400, "filename 'Foo-1.0.tar.gz' does not contain version '2.0'"),
    ("up/dev", "up", {"version": "2.0", "name": "x"}, ("Foo-1.0.txt", b"1"), 400,
     "filename 'Foo-1.0.txt' does not contain version '2.0'"),
    ("up/dev", "up", {}, ("Foo-1.0.txt", b"1"), 400, "'Foo-1.0.txt' is not a valid archive name"),
    ("up/dev", "up", {}, ("Foo-1.0.tar", b"1"), 400, "'Foo-1.0.tar' is not a valid archive name"),
    ("up/dev", "up", {}, ("Foo-1.0.tar.xz", b"1"), 400, "'Foo-1.0.tar.xz' is not a valid archive name"),
    ("up/dev", "up", {}, ("Foo-1.0", b"1"), 400, "'Foo-1.0' is not a valid archive name"),
    ("up/dev", "up", {"name": "x"}, ("other-1.0.txt", b"1"), 400, "'other-1.0.txt' is not a valid archive name"),
    ("up/dev", "up", {}, ("other-1.0.tar.gz", b"1"), 400,
     "filename 'other-1.0.tar.gz' does not match project name 'Foo'"),
    ("up/dev", "up", {"name": None}, FILE, 400, 'invalid metadata: Missing required field "name"'),
    ("up/dev", "up", {"version": None}, FILE, 400, 'invalid metadata: Missing required field "version"'),
    ("up/dev", "up", {"sha256_digest": "0" * 64}, FILE, 400, None),
    ("up/dev", "up", {"md5_digest": "0" * 32}, FILE, 400, None),
    ("up/dev", "up", {"blake2_256_digest": "0" * 64}, FILE, 400, None),
    ("up/dev", "up", {"sha256_digest": "nonsense"}, FILE, 400, None),
]


@pytest.mark.parametrize("index, user, changes, file, status, phrase", REFUSALS)
def test_every_refusal_has_its_status_and_its_words_and_changes_nothing(
        site, index, user, changes, file, status, phrase):
    before = state(site, "up/dev", "foo")
    fields = {key: value for key, value in dict(GOOD, **changes).items() if value is not None}
    reply = post(site, index, fields, file, user=user)
    assert reply.status == status
    if phrase is not None:
        message = reply.json()["message"]
        assert message == phrase or phrase.endswith("...") and message.startswith(phrase[:-3])
        said = "Forbidden: " + message if status == 403 else message
        assert reply.reason == said
        assert reply.json()["code"] == "%d %s" % (status, said)
    assert reply.headers.get("Content-Type") == "application/json"
    assert reply.headers.get("X-DEVPI-API-VERSION") == "2"
    assert state(site, "up/dev", "foo") == before
    assert before[1] == before[5] == 404


def test_a_form_without_an_action_is_refused(site):
    before = serial(site)
    fields = {"name": "foo", "version": "1.0"}
    assert post(site, "up/dev", fields, FILE).status == 400
    assert serial(site) == before


@pytest.mark.parametrize("accept, content_type", [
    ("application/json", "application/json"),
    ("application/json;q=0.9, text/plain;q=0.8", "application/json"),
    ("text/html", "text/html"),
    ("*/*", "text/plain"),
    (None, "text/plain"),
])
def test_the_body_of_a_refusal_says_the_same_as_its_phrase(site, accept, content_type):
    reply = post(site, "up/dev", dict(GOOD, **{":action": "a<b>&c"}), FILE, headers={"Accept": accept})
    assert reply.status == 400
    assert reply.headers.get("Content-Type").split(";")[0] == content_type
    assert reply.reason == "action 'a<b>&c' not supported"
    if content_type == "application/json":
        assert reply.json()["message"] == reply.reason
        assert reply.headers.get("Content-Type") == "application/json"
    elif content_type == "text/html":
        assert "a&lt;b&gt;&amp;c" in reply.text and "<b>" not in reply.text
    else:
        assert reply.reason in reply.text


def test_name_or_version_that_differ_from_the_metadata_file_are_refused(site):
    honest = wheel("honest", "1.0")
    other_name = wheel("honest", "1.0", metadata=honest.metadata.replace(b"Name: honest", b"Name: other"))
    other_version = wheel("honest", "1.0", metadata=honest.metadata.replace(b"Version: 1.0", b"Version: 1.1"))
    assert honest.metadata not in (other_name.metadata, other_version.metadata)
    before = state(site, "up/stable", "honest")
    for archive in (other_name, other_version):
        assert put_file(site, "up/stable", archive).status == 400
    assert state(site, "up/stable", "honest") == before
    assert put_file(site, "up/stable", honest).status == 200


@pytest.mark.parametrize("changed", [b"Name: other", b"Version: 2.0"])
def test_name_or_version_that_differ_from_an_sdists_metadata_are_refused(site, changed):
    key = changed.split(b":")[0]
    good = tar_gz([("liar-1.0/PKG-INFO", b"Metadata-Version: 2.1\nName: liar\nVersion: 1.0\n")])
    lines = [changed if line.startswith(key + b":") else line
             for line in b"Metadata-Version: 2.1\nName: liar\nVersion: 1.0\n".split(b"\n")]
    bad = tar_gz([("liar-1.0/PKG-INFO", b"\n".join(lines))])
    fields, _ = raw_file("liar", "1.0", b"")
    assert post(site, "up/dev", fields, ("liar-1.0.tar.gz", bad)).status == 400
    assert page(site, "up/dev", "liar").status == 404
    assert post(site, "up/dev", fields, ("liar-1.0.tar.gz", good)).status == 200
    assert site.delete("/up/dev/liar", user="up").status == 200


@pytest.mark.parametrize("change", [
    (b"Name: samename", b"Name: Same.Name"), (b"Version: 1.0", b"Version: 1.0.0"), (b"Version: 1.0", b"Version: v1.0")])
def test_metadata_that_only_spells_name_or_version_differently_is_accepted(site, change):
    name = "same-name" if change[0].startswith(b"Name") else "samename"
    original = wheel(name, "1.0")
    line = [line for line in original.metadata.split(b"\n") if line.startswith(change[1].split(b":")[0] + b":")][0]
    archive = wheel(name, "1.0", metadata=original.metadata.replace(line, change[1]))
    assert put_file(site, "up/dev", archive).status == 200
    assert archive.filename in entries(site, "up/dev", name)


# Archives


def tar_gz(members, compress="gz"):
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:" + compress) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return target.getvalue()


def wheel_members(name="hostile", version="1.0"):
    info = "%s-%s.dist-info/" % (name, version)
    return [
        ("%s/__init__.py" % name, b""),
        (info + "METADATA", ("Metadata-Version: 2.1\nName: %s\nVersion: %s\n" % (name, version)).encode()),
        (info + "WHEEL", b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
        (info + "RECORD", b""),
    ]


def two_end_records():
    first = zipped(*wheel_members())
    return first + zipped(*wheel_members()[1:])


SDIST_INFO = ("hostile-1.0/PKG-INFO", b"Metadata-Version: 2.1\nName: hostile\nVersion: 1.0\n")
HOSTILE = {
    "wheel with ..": ("py3-none-any.whl", lambda: zipped(*wheel_members() + [("hostile/../../evil", b"x")])),
    "wheel with an absolute path": ("py3-none-any.whl", lambda: zipped(*wheel_members() + [("/etc/evil", b"x")])),
    "wheel with a member twice": (
        "py3-none-any.whl", lambda: zipped(*wheel_members() + [("hostile/__init__.py", b"other")])),
    "wheel with METADATA twice": (
        "py3-none-any.whl", lambda: zipped(*wheel_members() + [(wheel_members()[1][0], b"Name: x\n")])),
    "wheel with two end records": ("py3-none-any.whl", two_end_records),
    "wheel with trailing data": ("py3-none-any.whl", lambda: zipped(*wheel_members()) + b"trailing"),
    "zip sdist with ..": (".zip", lambda: zipped(SDIST_INFO, ("hostile-1.0/../../evil", b"x"))),
    "zip sdist with trailing data": (".zip", lambda: zipped(SDIST_INFO) + b"trailing"),
    "sdist with ..": (".tar.gz", lambda: tar_gz([SDIST_INFO, ("hostile-1.0/../../evil", b"x")])),
    "sdist with an absolute path": (".tar.gz", lambda: tar_gz([SDIST_INFO, ("/etc/evil", b"x")])),
}


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_hostile_archives_are_refused(site, kind):
    suffix, make = HOSTILE[kind]
    before = state(site, "up/dev", "hostile")
    filename = "hostile-1.0-" + suffix if suffix.endswith("whl") else "hostile-1.0" + suffix
    fields = {":action": "file_upload", "name": "hostile", "version": "1.0"}
    reply = post(site, "up/dev", fields, (filename, make()))
    assert reply.status == 400
    assert reply.reason == reply.json()["message"]
    assert reply.reason not in ("", "Bad Request")
    assert state(site, "up/dev", "hostile") == before


UNREADABLE = {
    "bytes as wheel": ("py3-none-any.whl", lambda: b"123"),
    "bytes as sdist": (".tar.gz", lambda: b"123"),
    "bytes as zip": (".zip", lambda: b"PK\x03\x04nothing more"),
    "wheel without dist-info": ("py3-none-any.whl", lambda: zipped(("odd/__init__.py", b""))),
    "sdist without PKG-INFO": (".tar.gz", lambda: tar_gz([("odd-1.0/setup.py", b"")])),
    "cut gzip": (".tar.gz", lambda: tar_gz([("odd-1.0/PKG-INFO", os.urandom(5000))])[:1000]),
    "tar that ends early": (".tgz", lambda: tar_gz([("odd-1.0/PKG-INFO", b"x" * 5000)], "")[:1000]),
}


@pytest.mark.parametrize("kind", sorted(UNREADABLE))
def test_unreadable_archives_are_stored_without_a_metadata_file_where_such_are_taken(lenient, kind):
    site = lenient
    suffix, make = UNREADABLE[kind]
    content = make()
    filename = "odd-1.0-" + suffix if suffix.endswith("whl") else "odd-1.0" + suffix
    assert post(site, "up/dev", {":action": "file_upload", "name": "odd", "version": "1.0"},
                (filename, content)).status == 200
    entry = entries(site, "up/dev", "odd")[filename]
    assert "core-metadata" not in entry and "dist-info-metadata" not in entry
    assert site.fetch("up/dev", filename, "odd") == content
    path = "/up/dev/+f/%s" % entry["url"].split("+f/")[1]
    assert site.get(path + ".metadata").status == 404


def test_a_compressed_bomb_does_not_stop_the_server(site):
    big = tar_gz([("bomb-1.0/filler", b"\0" * (64 << 20)), ("bomb-1.0/PKG-INFO", b"\0" * (32 << 20))])
    assert len(big) < 1 << 20
    fields, _ = raw_file("bomb", "1.0", b"")
    reply = post(site, "up/dev", fields, ("bomb-1.0.tar.gz", big))
    assert reply.status == 400
    still_answers(site)


# Uploading again


@pytest.mark.parametrize("make", [wheel, sdist])
def test_identical_upload_to_a_non_volatile_index_is_answered_200_and_changes_nothing(site, make):
    archive = make("again", "1.0")
    put_file(site, "up/stable", archive)
    before = state(site, "up/stable", "again")
    reply = put_file(site, "up/stable", archive, summary="changed")
    assert (reply.status, reply.reason) == (200, "Upload of identical file to non volatile index.")
    assert state(site, "up/stable", "again") == before


def test_other_content_on_a_non_volatile_index_is_answered_409_and_changes_nothing(site):
    archive = wheel("conflict", "1.0")
    other = wheel("conflict", "1.0", size=10)
    assert archive.content != other.content and archive.filename == other.filename
    put_file(site, "up/stable", archive, summary="first")
    before = state(site, "up/stable", "conflict")
    reply = put_file(site, "up/stable", other, summary="second", author="Eve")
    message = "%s already exists in non-volatile index" % archive.filename
    assert (reply.status, reply.reason, reply.json()["message"]) == (409, message, message)
    assert state(site, "up/stable", "conflict") == before
    assert site.fetch("up/stable", archive.filename, "conflict") == archive.content


def test_volatile_index_replaces_the_file_and_remembers_that_it_did(site):
    first, second = wheel("replaced", "1.0"), wheel("replaced", "1.0", size=10)
    third = wheel("replaced", "1.0", size=20)
    put_file(site, "up/dev", first)
    old = links(site, "up/dev/replaced/1.0")[0]["href"][len(site.url):]
    assert put_file(site, "up/dev", second).status == 200
    [link] = links(site, "up/dev/replaced/1.0")
    assert [entry["what"] for entry in link["log"]] == ["overwrite", "upload"]
    assert (link["log"][0]["count"], link["log"][0]["who"]) == (1, None)
    assert site.fetch("up/dev", second.filename, "replaced") == second.content
    assert site.get(old, headers={"Accept": "*/*"}).status == 410
    assert put_file(site, "up/dev", third).status == 200
    assert links(site, "up/dev/replaced/1.0")[0]["log"][0]["count"] == 2
    assert list(entries(site, "up/dev", "replaced")) == [third.filename]


def test_the_same_file_in_a_base_does_not_stop_an_upload(site):
    site.add_index("up/child", bases=["up/stable"], volatile=False)
    base, own = wheel("inbase", "1.0"), wheel("inbase", "1.0", size=5)
    put_file(site, "up/stable", base)
    assert put_file(site, "up/child", own).status == 200
    assert site.fetch("up/child", own.filename, "inbase") == own.content
    assert site.fetch("up/stable", base.filename, "inbase") == base.content


@pytest.mark.parametrize("volatile", [False, True])
def test_of_simultaneous_different_uploads_of_one_file_exactly_one_stays(site, volatile):
    index, count = ("up/dev" if volatile else "up/stable"), 6
    archives = [wheel("race", "1.0", size=number * 1000) for number in range(count)]
    start, replies = threading.Barrier(count), [None] * count

    def run(number):
        start.wait(10)
        replies[number] = put_file(site, index, archives[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    statuses = sorted(reply.status for reply in replies)
    assert statuses == ([200] * count if volatile else [200] + [409] * (count - 1))
    content = site.fetch(index, archives[0].filename, "race")
    if volatile:
        assert content in [archive.content for archive in archives]
    else:
        assert content == archives[[reply.status for reply in replies].index(200)].content
    assert len(entries(site, index, "race")) == 1
    assert len(links(site, "%s/race/1.0" % index)) == 1


def test_simultaneous_identical_uploads_all_succeed_and_store_one_file(site):
    archive = wheel("samerace", "1.0")
    replies = []
    threads = [threading.Thread(target=lambda: replies.append(put_file(site, "up/stable", archive))) for _ in range(6)]
    before = serial(site)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [reply.status for reply in replies] == [200] * 6
    assert sorted(reply.reason for reply in replies).count("Upload of identical file to non volatile index.") == 5
    assert serial(site) == before + 1


# Framing: chunked bodies, 100-continue, limits


def test_chunked_body_is_understood(site):
    archive = wheel("chunked", "1.0")
    body, content_type = multipart(form(archive), {"content": (archive.filename, archive.content)})
    chunks = b"".join(
        b"%X;ext=1\r\n%s\r\n" % (len(body[at:at + 777]), body[at:at + 777]) for at in range(0, len(body), 777))
    data = head(site, "up/dev", content_type, "Transfer-Encoding: chunked\r\nConnection: close\r\n")
    answer = site.raw(data + chunks + b"0\r\nTrailer: x\r\n\r\n")
    assert answer.split(b"\r\n")[0].startswith(b"HTTP/1.1 200")
    assert site.fetch("up/dev", archive.filename, "chunked") == archive.content


@pytest.mark.parametrize("body", [
    b"zz\r\nabc\r\n0\r\n\r\n", b"-5\r\nabc\r\n0\r\n\r\n", b"5\r\nabc\r\n0\r\n\r\n", b"3\r\nabcXX0\r\n\r\n",
    b"FFFFFFFFFFFFFFFFFF\r\nabc", b"+3\r\nabc\r\n0\r\n\r\n", b"3" * 9000])
def test_broken_chunks_are_refused(site, body):
    before = serial(site)
    data = head(site, "up/dev", "multipart/form-data; boundary=x", "Transfer-Encoding: chunked\r\n")
    with site.connect() as connection:
        connection.settimeout(10)
        connection.sendall(data + body)
        connection.shutdown(socket.SHUT_WR)
        status = connection.makefile("rb").readline().decode()
    assert status.split()[1] in ("400", "413")
    assert serial(site) == before
    still_answers(site)


def test_expect_100_continue_is_answered_before_the_body(site):
    archive = wheel("expected", "1.0")
    body, content_type = multipart(form(archive), {"content": (archive.filename, archive.content)})
    extra = "Content-Length: %d\r\nExpect: 100-continue\r\n" % len(body)
    with site.connect() as connection:
        connection.settimeout(10)
        stream = connection.makefile("rb")
        connection.sendall(head(site, "up/dev", content_type, extra))
        assert read_head(stream)[0].startswith("HTTP/1.1 100")
        connection.sendall(body)
        assert read_head(stream)[0].startswith("HTTP/1.1 200")
    assert site.fetch("up/dev", archive.filename, "expected") == archive.content


@pytest.mark.parametrize("index, user, status", [
    ("up/dev", None, "401"), ("up/dev", "stranger", "403"), ("up/none", "up", "404"), ("up/mirror", "up", "404")])
def test_an_upload_that_cannot_succeed_is_refused_before_its_body(site, index, user, status):
    extra = "Content-Length: 500000\r\nExpect: 100-continue\r\n"
    with site.connect() as connection:
        connection.settimeout(10)
        connection.sendall(head(site, index, "multipart/form-data; boundary=x", extra, user=user))
        line, headers = read_head(connection.makefile("rb"))
    assert line.split()[1] == status
    assert ("www-authenticate" in headers) == (status == "401")


def test_refused_upload_does_not_disturb_the_next_request_of_the_connection(site):
    archive = wheel("pipelined", "1.0", size=300000)
    body, content_type = multipart(form(archive), {"content": (archive.filename, archive.content)})
    netloc = urllib.parse.urlsplit(site.url).netloc
    follow = ("GET /+api HTTP/1.1\r\nHost: %s\r\nAccept: application/json\r\nConnection: close\r\n\r\n" % netloc).encode()
    with site.connect() as connection:
        connection.settimeout(10)
        with contextlib.suppress(OSError):  # the server may close instead of reading on
            connection.sendall(
                head(site, "up/dev", content_type, "Content-Length: %d\r\n" % len(body), user="stranger")
                + body + follow)
        stream = connection.makefile("rb")
        line, headers = read_head(stream)
        assert line.split()[1] == "403"
        stream.read(int(headers["content-length"]))
        with contextlib.suppress(ConnectionError):
            line = stream.readline()
            assert line == b"" or line.startswith(b"HTTP/1.1 200"), "the body was read as a request"


def test_body_over_the_limit_is_refused_before_it_is_read(make_server):
    server = make_server("--max-request-body-size", "200000")
    server.add_user("up")
    server.login("up", "pw")
    server.add_index("up/dev")
    before = serial(server)
    with server.connect() as connection:
        connection.settimeout(10)
        extra = "Content-Length: 200001\r\nExpect: 100-continue\r\n"
        connection.sendall(head(server, "up/dev", "multipart/form-data; boundary=x", extra))
        assert read_head(connection.makefile("rb"))[0].split()[1] == "413"
    with server.connect() as connection:
        connection.settimeout(10)
        connection.sendall(head(server, "up/dev", "multipart/form-data; boundary=x", "Transfer-Encoding: chunked\r\n"))
        with contextlib.suppress(OSError):
            for _ in range(30):
                connection.sendall(b"2710\r\n" + b"x" * 10000 + b"\r\n")
            connection.sendall(b"0\r\n\r\n")
        assert read_head(connection.makefile("rb"))[0].split()[1] == "413"
    assert serial(server) == before
    archive = wheel("fits", "1.0", size=100000)
    assert put_file(server, "up/dev", archive).status == 200
    assert server.fetch("up/dev", archive.filename, "fits") == archive.content


# Broken forms


def field(name, value=b"x"):
    return b'Content-Disposition: form-data; name="%s"\r\n\r\n%s' % (name, value)


GOOD_FIELDS = b"".join(
    b"--%s\r\n%s\r\n" % (BOUNDARY.encode(), field(name, value))
    for name, value in ((b":action", b"file_upload"), (b"name", b"broken"), (b"version", b"1")))
GOOD_CONTENT = (
    b'--%s\r\nContent-Disposition: form-data; name="content"; filename="broken-1.tar.gz"\r\n\r\n%s'
    % (BOUNDARY.encode(), around("broken-1.tar.gz", b"abc", "broken", "1")))
END = b"\r\n--%s--\r\n" % BOUNDARY.encode()
BROKEN = {
    "empty": b"",
    "no final boundary": GOOD_FIELDS + GOOD_CONTENT,
    "final boundary cut": GOOD_FIELDS + GOOD_CONTENT + END[:-6],
    "ends in a part head": GOOD_FIELDS + b"--%s\r\nContent-Disposition: form" % BOUNDARY.encode(),
    "no boundary at all": b"just some text",
    "another boundary": (GOOD_FIELDS + GOOD_CONTENT + END).replace(BOUNDARY.encode(), b"other"),
    "part without disposition": GOOD_FIELDS + b"--%s\r\nX-Y: z\r\n\r\nvalue\r\n" % BOUNDARY.encode() + GOOD_CONTENT + END,
    "part without a name":
        GOOD_FIELDS + b"--%s\r\nContent-Disposition: form-data\r\n\r\nv\r\n" % BOUNDARY.encode() + GOOD_CONTENT + END,
    "endless part head":
        GOOD_FIELDS + b"--%s\r\nX-Long: %s\r\n\r\nv\r\n" % (BOUNDARY.encode(), b"y" * 300000) + GOOD_CONTENT + END,
    "endless many part headers":
        GOOD_FIELDS + b"--%s\r\n%s\r\n\r\nv\r\n" % (BOUNDARY.encode(), b"X: y\r\n" * 30000) + GOOD_CONTENT + END,
    "part that is not form-data":
        GOOD_FIELDS + b"--%s\r\nContent-Disposition: attachment; name=x\r\n\r\nv\r\n" % BOUNDARY.encode()
        + GOOD_CONTENT + END,
    "text that is not UTF-8": GOOD_FIELDS + b"--%s\r\n%s\r\n" % (BOUNDARY.encode(), field(b"summary", b"\xff\xfe"))
        + GOOD_CONTENT + END,
    "content without a file name": GOOD_FIELDS + b"--%s\r\n%s" % (BOUNDARY.encode(), field(b"content", b"abc")) + END,
}


def test_the_unbroken_form_of_these_tests_is_accepted(site):
    assert post_parts(site, "up/dev", GOOD_FIELDS + GOOD_CONTENT + END).status == 200
    assert site.delete("/up/dev/broken", user="up").status == 200


@pytest.mark.parametrize("kind", sorted(BROKEN))
def test_broken_multipart_bodies_are_refused_and_change_nothing(site, kind):
    before = state(site, "up/dev", "broken")
    reply = post_parts(site, "up/dev", BROKEN[kind])
    assert reply.status == 400
    assert reply.json()["message"]
    assert state(site, "up/dev", "broken") == before
    still_answers(site)


@pytest.mark.parametrize("content_type", [
    "multipart/form-data", "multipart/form-data; boundary=", 'multipart/form-data; boundary=""',
    "multipart/form-data; boundary=" + "x" * 5000, "multipart/mixed; boundary=" + BOUNDARY, "text/plain"])
def test_a_form_without_a_usable_boundary_is_refused(site, content_type):
    before = serial(site)
    reply = post_parts(site, "up/dev", GOOD_FIELDS + GOOD_CONTENT + END, {"Content-Type": content_type})
    assert reply.status == 400
    assert reply.json()["message"]
    assert serial(site) == before


def test_body_that_ends_early_leaves_nothing(site):
    before = state(site, "up/dev", "broken")
    body = GOOD_FIELDS + GOOD_CONTENT + END
    data = head(site, "up/dev", "multipart/form-data; boundary=" + BOUNDARY, "Content-Length: %d\r\n" % (len(body) + 50))
    with site.connect() as connection:
        connection.settimeout(10)
        connection.sendall(data + body)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(OSError):
            answer = connection.makefile("rb").readline()
    assert answer == b"" or answer.split()[1] == b"400"
    assert state(site, "up/dev", "broken") == before


def test_a_long_description_is_kept_whole(site):
    text = "x\u00e9" * (1 << 20)
    fields = {":action": "submit", "name": "longtext", "version": "1", "description": text}
    assert post(site, "up/dev", fields).status == 200
    assert (site.get("/up/dev/longtext/1").result["description"] == text) is True  # no diff of megabytes
    assert site.delete("/up/dev/longtext", user="up").status == 200


@pytest.mark.parametrize("fields", [
    {"description": "x" * (10 * 1024 * 1024 + 1)},
    {"classifiers": ["x" * (9 << 20)] * 3},
    {"f%d" % number + "x" * 7000: "" for number in range(3200)},        # the names count
    {"x" * 9000: ""},
])
def test_a_field_over_the_limit_is_refused(site, fields):
    before = serial(site)
    reply = post(site, "up/dev", dict(fields, **{":action": "submit", "name": "hugefield", "version": "1"}))
    assert reply.status in (400, 413)
    assert serial(site) == before
    assert page(site, "up/dev", "hugefield").status == 404


# Names that want to be more than names


def raw_answer_head(site, body):
    """The bytes of the answer's head, to look for injected header lines."""
    extra = "Content-Length: %d\r\nConnection: close\r\n" % len(body)
    answer = site.raw(head(site, "up/dev", "multipart/form-data; boundary=" + BOUNDARY, extra) + body)
    return answer.partition(b"\r\n\r\n")[0]


@pytest.mark.parametrize("place", [":action", "version", "name"])
@pytest.mark.parametrize("evil", ["x\r\nX-Evil: 1", "x\nX-Evil: 1", "x\r\n\r\n<script>", "x\0y\x1b[2J", "x\u2028y\u00e9", "x" * 5000])
def test_a_form_value_never_becomes_a_header_line(site, place, evil):
    fields = dict(GOOD, **{place: evil})
    body = parts([(key, None, value.encode()) for key, value in fields.items()] + [("content",) + FILE])
    lines = raw_answer_head(site, body).split(b"\r\n")
    assert lines[0].startswith(b"HTTP/1.1 400 ")
    phrase = lines[0][len(b"HTTP/1.1 400 "):]
    assert len(phrase) <= 300 and all(32 <= byte < 127 for byte in phrase)
    assert not [line for line in lines[1:] if line.lower().startswith(b"x-evil") or b"\n" in line]
    assert page(site, "up/dev", "foo").status == 404


EVIL_NAMES = [
    "../../../../evil-1.0.tar.gz", "/evil-1.0.tar.gz", "..\\..\\evil-1.0.tar.gz", "C:\\evil-1.0.tar.gz",
    "evil-1.0/../evil-1.0.tar.gz", "evil-1.0%0d%0aX-Evil: 1.tar.gz", "evil-1.0%22%0Ax.tar.gz",
    "evil-1.0\u2028.tar.gz", "evil-1.0\x00.tar.gz", "evil-1.0\x7f.tar.gz", "evil-1.0<script>.tar.gz", "evil-1.0#x.tar.gz",
    "evil-1.0?x.tar.gz", "evil-1.0" + "x" * 300 + ".tar.gz", "", ".", "..",
]


@pytest.mark.parametrize("filename", EVIL_NAMES)
def test_a_file_name_never_becomes_a_path_a_header_or_markup(lenient, filename):
    site = lenient
    fields = dict(GOOD, name="evil")
    body = parts([(key, None, value.encode()) for key, value in fields.items()] + [("content", filename, b"evil")])
    answer = raw_answer_head(site, body)
    assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 400 "))
    assert b"\nx-evil" not in answer.lower()
    shown = entries(site, "up/dev", "evil")
    assert bool(shown) == answer.startswith(b"HTTP/1.1 200 ")
    for name, entry in shown.items():
        assert not set(name) & set("/\\\r\n\0\x7f")
        assert name == entry["url"].split("#")[0].rsplit("/", 1)[1] or "%" in entry["url"]
        assert site.fetch("up/dev", name, "evil") == b"evil"
        html = site.get("/up/dev/+simple/evil/", headers={"Accept": "text/html"}).text
        assert "<script>" not in html
    if shown:
        assert site.delete("/up/dev/evil", user="up").status == 200
