"""Makes a server directory as a released devpi_lite.py left it, and what that release answered:

    python tests/data/make_server_directory.py COMMIT tests/data/server_of_schema_N.zip

The one of schema 6 is of commit 381dd28, that of schema 3 of ea8e799.  A new schema wants another,
made by the last commit before it.

The zip has `server/`, the directory after a clean stop; `answers.json`, with the rows that people
put in (replay.Rows) and what was answered to `replay.views` of them (replay.shown_by), in offline
mode; and `about.json`.  tests/test_upgrade.py starts the present program on it.

What is in there is the same each time, but for the times, salts and tokens that a server makes.
The upstream of the mirror was a fake one, which is not there any more.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

import replay  # noqa: E402
from archives import sdist, wheel  # noqa: E402
from harness import PATCHED, SIMPLE_JSON, Server, Upstream, eventually, submit, upload  # noqa: E402

MIRROR = "root/mirror"
PASSWORDS = {"root": "the root's", "alice": "alice's p\u00e4ssword", "bob": "bob's second",
             "carol": "pw"}
# Of more than one piece, and some place of it unlike others.
MIRRORED = {"mirrored", "elsewhere", "forgotten", "withheld"}
README = "".join("## %d\n%s\n" % (number, "A long README. " * 500) for number in range(12))
DATA = {"\u00fc": {"deep": ["x", None, True, 2.5]}, "n": 10 ** 20}


class OldUpstream(Upstream):
    """By another name than the server has, so that answers tell the two apart."""

    @property
    def host_url(self):
        return super().host_url.replace("127.0.0.1", "localhost")


def must(reply, *statuses):
    assert reply.status in (statuses or (200, 201)), reply
    return reply


def publish(upstream):
    for version in ("1.0", "2.0"):
        upstream.publish(wheel("mirrored", version, summary="upstream's"))
    upstream.publish(sdist("mirrored", "1.0", summary="upstream's"))
    upstream.publish(wheel("mirrored", "3.0"), yanked="broken", requires_python=">=3.7")
    upstream.publish(sdist("elsewhere", "0.5"))
    upstream.publish("forgotten", "1.0")
    upstream.publish("withheld", "1.0")
    upstream.publish("withheld", "1.1")
    upstream.status("elsewhere", "archived", "it is finished")


def path_of(server, index, filename, project):
    """The path of a file that the project's page links to."""
    file, = (file for file in server.simple(index, project, user="root")["files"]
             if file["filename"] == filename)
    url = file["url"].partition("#")[0]
    return "/%s/%s" % (index, url[url.index("+f/"):])


def people(server, upstream):
    for name in ("alice", "bob", "carol", "dave"):
        server.add_user(name, PASSWORDS.get(name, "pw") if name != "bob" else "bob's first")
    must(server.patch("/alice", {"title": "Alice \u00c5", "email": "alice@example.com",
                                 "description": "makes alpha", "custom_data": DATA}, user="alice"))
    must(server.patch("/bob", {"password": PASSWORDS["bob"]}, user="bob"))
    server.login("bob", PASSWORDS["bob"])
    server.add_index("dave/gone")
    must(server.delete("/dave", user="root"))

    server.login("root")
    server.add_mirror(MIRROR, upstream, title="a mirror",
                      mirror_web_url_fmt="http://up.example/{name}/")
    server.add_index("alice/dev", bases=[MIRROR], acl_upload=["alice", "bob"], title="being made",
                     mirror_whitelist=["alpha"], custom_data=DATA, volatile=True)
    server.add_index("alice/stable", volatile=False, acl_upload=["alice", "bob"],
                     description="what is released")
    server.add_index("bob/private", acl_pkg_read=["bob"], acl_toxresult_upload=["bob"],
                     bases=["alice/stable", MIRROR], mirror_whitelist_inheritance="union")
    server.add_index("carol/empty", volatile=False)
    server.add_index("carol/gone")
    upload(server, "carol/gone", wheel("lost", "1.0"))
    must(server.delete("/carol/gone", user="carol"))


def releases(server):
    """A good deal, last of all what keeps others from changing it."""
    dev = "alice/dev"
    alpha = [wheel("alpha", "1.0", requires_python=">=3.6", requires_dist=["mirrored>=1"]),
             sdist("alpha", "1.0"), wheel("alpha", "1.1", summary="the next"),
             wheel("alpha", "2.0rc1")]
    upload(server, dev, *alpha[:3], fields={"classifiers": ["A :: B", "C"], "keywords": "one two"})
    upload(server, dev, alpha[3], fields={"version": "2.0-RC1"})
    upload(server, dev, wheel("alpha", "2.1"), user="bob", fields={
        "attestations": json.dumps([{"version": 1, "envelope": {"statement": "e30="}}], indent=1)})
    upload(server, dev, wheel("Beta.Two", "0.1"), wheel("beta_two", "0.2", summary="spelled anew"))
    upload(server, dev, wheel("gamma", "1.0"), fields={
        "description": README, "description_content_type": "text/markdown"})
    upload(server, dev, wheel("gamma", "1.0.1"), fields={"description": "short \u2028 \U0001f40d"})
    upload(server, dev, wheel("delta", "1.0"), sdist("epsilon", "1.0"), wheel("epsilon", "2.0"))
    upload(server, dev, wheel("zeta", "1.0"), wheel("eta", "1.0"), wheel("eta", "1.1"))
    submit(server, dev, "registered", "7", summary="no file")

    for version, mark in (("1.0", "one"), ("1.1", "two")):
        must(server.post_form(dev, {":action": "doc_upload", "name": "alpha", "version": version},
                              {"content": ("docs.zip", replay.documentation(mark))}))
    tested = path_of(server, dev, alpha[0].filename, "alpha")
    for mark in ("first", "second"):
        must(server.post(tested, {"testenvs": {}, "mark": mark}, user="bob"))

    must(server.request("PUSH", "/" + dev, {
        "name": "alpha", "version": "1.0", "targetindex": "alice/stable"}, user="alice"))
    must(server.request("PUSH", "/" + dev, {
        "name": "epsilon", "version": "1.0", "targetindex": "alice/stable"}, user="alice"))
    must(server.request("PUSH", "/" + MIRROR, {
        "name": "mirrored", "version": "1.0", "targetindex": "bob/private"}, user="bob"))

    for archive, reason in ((alpha[1], ""), (alpha[2], "is%20%22bad%22")):
        path = path_of(server, dev, archive.filename, "alpha")
        must(server.patch(path + "?yank=" + reason, user="alice"))
    must(server.patch("/%s/gamma/1.0.1" % dev, {"yanked": "all of it"}, user="alice"))
    taken_back = path_of(server, dev, alpha[3].filename, "alpha")
    must(server.patch(taken_back + "?yank=a+mistake", user="alice"))
    must(server.patch(taken_back + "?unyank", user="alice"))

    for index, name in ((dev, "epsilon-2.0-py3-none-any.whl"),
                        ("alice/stable", "epsilon-1.0.tar.gz")):
        must(server.delete(path_of(server, index, name, "epsilon") + "?force", user="alice"))
    must(server.delete("/%s/eta/1.1" % dev, user="alice"))
    must(server.delete("/%s/zeta" % dev, user="alice"))

    for project, status in (("beta-two", {"status": "archived", "reason": "na \u00fc"}),
                            ("delta", {"status": "quarantined"})):
        must(server.patch("/%s/%s" % (dev, project), {"project-status": status}, user="alice"))


def mirrored(server):
    """Some of the files are fetched, a release and a project are deleted."""
    for project in sorted(MIRRORED):
        server.simple(MIRROR, project)
    must(server.get("/%s/+simple/" % MIRROR, headers={"Accept": SIMPLE_JSON}))
    for name in ("mirrored-2.0-py3-none-any.whl", "mirrored-1.0.tar.gz", "elsewhere-0.5.tar.gz"):
        path = path_of(server, MIRROR, name, name.partition("-")[0])
        must(server.get(path, headers={"Accept": "*/*"}))
    path = path_of(server, MIRROR, "mirrored-2.0-py3-none-any.whl", "mirrored")
    must(server.get(path + ".metadata"))
    must(server.delete("/%s/withheld/1.0" % MIRROR, user="root"))
    must(server.delete("/%s/forgotten" % MIRROR, user="root"))


def answers(server):
    """What people put in, and what is said of it to root, to bob and to nobody."""
    with replay.database(server.directory) as db:
        tables = {name for name, in db.execute("SELECT name FROM sqlite_master")}
        replay.PEOPLE = {table: key for table, key in replay.PEOPLE.items() if table in tables}
        rows = replay.read_rows(db, [MIRROR])
        here = ["/%s/%s" % (MIRROR, path) for path, in db.execute(
            "SELECT path FROM files WHERE release_id IS NULL AND sha256 IS NOT NULL")]
    assert len(here) == 4, here
    more = [("GET", path, replay.ANY, None) for path in [
        *here, *(path + ".metadata" for path in here if path.endswith(".whl"))]]
    more += [("GET", path, SIMPLE_JSON, None) for path in (
        "/dave", "/carol/gone", "/alice/dev/zeta", "/alice/dev/+simple/zeta/", "/alice/dev/eta/1.1",
        *("/%s/+simple/%s/" % (MIRROR, name) for name in ("forgotten", "withheld")))]
    eventually(lambda: replay.is_settled(server))
    seen, contents = [], {}     # each content once: many answers are the same
    for user in ("root", "bob", None):
        if user:
            server.login(user)
        asked = [view for view in [*replay.views(rows), *replay.searches(rows), *more]
                 if of_interest(user, view[1])]
        for view, (status, headers, body) in replay.shown_by(server, asked, user).items():
            content = contents.setdefault((tuple(headers), body), len(contents))
            seen.append([user, view, status, content])
    return {"tables": {table: list(there.items()) for table, there in rows.tables.items()},
            "orders": list(rows.orders.items()), "serial": rows.serial, "seen": seen,
            "contents": list(contents)}


def of_interest(user, path):
    """Whether somebody asks for it: root for all but what never was on an index, others where they
    are told something else."""
    if user == "bob":
        return path.startswith("/bob")
    if user is None:
        return path.count("/") < 3 or path.startswith(("/bob", "/alice/dev/+simple"))
    return not path.startswith(("/%s/" % MIRROR, "/carol/empty/")) or "/+f/" in path or \
        path.endswith(("/+api", "/+simple/")) or bool(MIRRORED & set(path.split("/")))


def plain(value):
    """For JSON: bytes."""
    return {"bytes": value.decode("latin-1")}


def main(commit, target):
    with tempfile.TemporaryDirectory() as folder:
        script = pathlib.Path(folder, "devpi_lite.py")
        commit = subprocess.check_output(["git", "rev-parse", commit], text=True, cwd=TESTS).strip()
        script.write_bytes(subprocess.check_output(
            ["git", "show", commit + ":devpi_lite.py"], cwd=TESTS))
        upstream = OldUpstream().start()
        server = Server(
            pathlib.Path(folder, "server"), root_password=PASSWORDS["root"], script=script)
        server.start()
        try:
            # all passwords but root's cost little to check: the test checks them each time
            server.script = pathlib.Path(folder, "hasty.py")
            server.script.write_text(PATCHED % (folder, ""))
            server.restart()
            publish(upstream)
            people(server, upstream)
            mirrored(server)
            releases(server)
            upstream.stop()
            server.restart("--offline-mode")
            said = answers(server)
            assert server.stop() == 0
        finally:
            if server.running:
                server.kill()
        with replay.database(server.directory) as db:
            schema = db.execute("PRAGMA user_version").fetchone()[0]
        about = {"commit": commit, "schema": schema, "passwords": PASSWORDS}
        with zipfile.ZipFile(target, "w", zipfile.ZIP_BZIP2, compresslevel=9) as archive:
            for path in sorted(server.directory.rglob("*")):
                if path.is_file():
                    archive.write(path, path.relative_to(folder).as_posix(), compress_type=(
                        zipfile.ZIP_DEFLATED if path.stat().st_size < 3000 else None))
            archive.writestr("answers.json", json.dumps(said, default=plain))
            archive.writestr("about.json", json.dumps(about, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
