"""What a devpi-server, real or ours, is filled with by HTTP, and the facts: what it then has to show.

Each version is given what it can hold, from 1.1 to 7; nothing here knows how a dump looks.
"""

import dataclasses
import hashlib
import json
import re
import urllib.parse

from archives import around, documentation, sdist, wheel
from devpi_server import DevpiServer
from harness import Upstream, submit

PASSWORDS = {"root": "root-pw", "mira": "mira-pw", "noel": "noel \u00e9\u20ac pw"}
LONG = "".join("## Part %d\n%s\n" % (part, "The tide comes and goes. " * 25) for part in range(15))
DATA = {"desk": 4, "names": ["M\u00edra", None]}


class Site:
    """What is put into one server, and the facts."""

    def __init__(self, server, upstream):
        self.server, self.upstream, self.release = server, upstream, server.release
        self.users, self.indexes, self.releases = {}, {}, {}
        self.passwords = dict(PASSWORDS)
        if self.release < (1, 2):       # ASCII only
            self.passwords["noel"] = "noel-pw"

    # -- users and indexes

    def user(self, name, **more):
        reply = self.server.put("/" + name, dict(
            more, password=self.passwords[name], email=name + "@example.org"))
        assert reply.status == 201, reply
        self.server.login(name, self.passwords[name])
        self.users[name] = dict(more, email=name + "@example.org")

    def index(self, name, **config):
        user = name.partition("/")[0]
        sent = dict(config)
        if self.release >= (7, 0):
            sent = self.of_seven(sent)
        elif self.release < (3, 0) and "mirror_whitelist" in sent:
            sent["pypi_whitelist"] = sent.pop("mirror_whitelist")
        reply = self.server.put("/" + name, sent, user=user)
        assert reply.status == 200, (name, reply)
        self.indexes[name] = config

    @staticmethod
    def of_seven(config):
        names = {"mirror_url": "remote_url", "mirror_cache_expiry": "remote_refresh_delay",
                 "mirror_web_url_fmt": "remote_web_url_fmt"}
        kinds = {"stage": "local", "mirror": "remote"}
        sent = {names.get(key, key): value for key, value in config.items()}
        if "type" in sent:
            sent["type"] = kinds[sent["type"]]
        if sent.pop("mirror_whitelist", []) == ["*"]:
            sent["project_inheritance_rules"] = ["allow all"]
        if sent.pop("mirror_whitelist_inheritance", "") == "union":
            sent["trust_inheritance_rules_from"] = "type:not remote"
        return sent

    # -- releases

    def of(self, index, name, version):
        return self.releases.setdefault(index, {}).setdefault(name, {}).setdefault(
            version, {"files": {}, "docs": None})

    def upload(self, index, archive, user=None, project=None, **fields):
        user = user or index.partition("/")[0]
        if self.release < (1, 2) and archive.filename.endswith(".whl"):     # not known yet
            filename = "%s-%s.zip" % (archive.name, archive.version)
            archive = dataclasses.replace(archive, filename=filename, content=around(
                filename, archive.sha256.encode(), archive.name, archive.version))
        fields.setdefault("classifiers", ["Topic :: Sea", "Topic :: Moon"])
        if self.release < (5, 0):       # only releases of a registered project were taken
            form = {key: value for key, value in archive.fields.items()
                    if key not in ("filetype", "pyversion")}
            reply = self.server.post_form(
                index, dict(dict(form, **{":action": "submit"}), **fields), user=user)
            assert reply.status == 200, (archive.filename, reply)
        reply = self.server.post_file(index, archive, user, **fields)
        assert reply.status == 200, (archive.filename, reply)
        release = self.of(index, project or archive.name, archive.version)
        release["metadata"] = {"name": archive.name, "version": archive.version,
                               "summary": archive.fields["summary"],
                               # 1.1 takes the last of several
                               "classifiers": fields["classifiers"][-1 if self.release < (1, 2) else 0:], **{
                                   key: fields[key] for key in ("keywords", "description", "author")
                                   if key in fields}}
        release["files"][archive.filename] = {
            "sha256": archive.sha256, "md5": archive.md5, "size": len(archive.content),
            "log": [["upload", user]], "results": []}

    def path_of(self, index, name, version, filename):
        """Where the server says that the file is."""
        result = self.server.get("/%s/%s/%s" % (index, name, version)).result
        for link in result.get("+links", ()):
            if link["rel"] == "releasefile" and link["href"].endswith("/" + filename):
                return self.server._path_of(link["href"])
        for path in result.get("+files", {}).values():
            if path.endswith("/" + filename):
                return "/" + path.lstrip("/")
        raise AssertionError((filename, result))

    def result(self, index, name, version, filename, environment, retcode):
        text = json.dumps({"toxversion": "4.0", "platform": "linux", "host": "quay",
                           "reportversion": "1", "testenvs": {environment: {
                               "python": {"executable": "python", "version": "3"},
                               "setup": [{"command": ["x"], "retcode": "0", "output": ""}],
                               "test": [{"command": ["pytest"], "retcode": str(retcode),
                                         "output": "%s \u00fcber" % environment}]}}})
        path = self.path_of(index, name, version, filename)
        reply = self.server.post(path, text, user=index.partition("/")[0], headers={
            "Content-Type": "application/json"})
        assert reply.status == 200, reply
        self.of(index, name, version)["files"][filename]["results"].append(
            json.loads(text))

    def attached(self, index, name, version, filename):
        """A test result as 1.x had it: of some bytes, wherever they lie."""
        file = self.of(index, name, version)["files"][filename]
        result = {"testenvs": {"py26": {}}, "installpkg": {"md5": file["md5"], "type": "sdist"}}
        reply = self.server.post("/+tests", result)
        assert reply.status == 200, reply
        file["results"].append(result)

    def docs(self, index, version, page):
        docs = documentation("tide-table", version, page)
        reply = self.server.post_form(index, {
            ":action": "doc_upload", "name": docs.name, "version": docs.version}, {
                "content": (docs.filename, docs.content)})
        assert reply.status == 200, reply
        if self.release < (1, 2):       # of the project, not of a release
            for release in self.releases[index][docs.name].values():
                release["docs"] = None
        self.of(index, docs.name, docs.version)["docs"] = page

    def push(self, source, name, version, target, user):
        reply = self.server.request("PUSH", "/" + source, {
            "name": name, "version": version, "targetindex": target}, user=user)
        assert reply.status == 200, reply
        pushed = json.loads(json.dumps(self.of(source, name, version)))
        for file in pushed["files"].values():
            file["log"] = [file["log"][-1], ["push", user]]
        self.releases.setdefault(target, {}).setdefault(name, {})[version] = pushed


def mirrored(site):
    """Two of three files of a project outside are fetched."""
    server, simple = site.server, "/root/sea/+simple/sealib/"
    page = server.get(simple, headers={"Accept": "text/html"})
    assert page.status == 200, page
    for name in ("sealib-1.0-py3-none-any.whl", "sealib-1.1.tar.gz"):
        href = re.search(r'href="([^"]*%s)[#"]' % re.escape(name), page.text).group(1)
        path = server._path_of(urllib.parse.urljoin(server.url + simple, href))
        reply = server.get(path, headers={"Accept": "*/*"})
        assert reply.status == 200, reply
        site.of("root/sea", "sealib", name.split("-")[1].replace(".tar.gz", ""))["files"][name] = {
            "sha256": hashlib.sha256(reply.body).hexdigest(), "size": len(reply.body)}


def fill(site):
    server, release = site.server, site.release
    site.user("mira")
    site.user("noel")
    if release >= (4, 9) and isinstance(server, DevpiServer):
        # as little work as there can be, so that a test may check it without a library
        digest = server._said([server.programs / "python", "-c", (
            "import argon2; print(argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)"
            ".hash('cheap-pw'))")]).strip()
        reply = server.put("/cheap", {"password": "other", "pwhash": digest})
        assert reply.status == 201, reply       # nobody logs in: the hash would be made anew
        site.passwords["cheap"], site.users["cheap"] = "cheap-pw", {}
    if release >= (4, 0):
        more = {"title": "Mira of the sea", "description": "counts tides", "custom_data": DATA}
        reply = server.patch("/mira", more, user="mira")
        assert reply.status == 200, reply
        site.users["mira"].update(more)

    mirrors = release >= (3, 0)
    if mirrors:
        server.login("root")
        site.index("root/sea", type="mirror", volatile=False, mirror_url=site.upstream.url,
                   mirror_web_url_fmt="https://example.org/p/{name}", title="the outside",
                   mirror_cache_expiry=900)
    if mirrors:
        mirrored(site)
    stage = {"type": "stage"}
    base = ["root/sea"] if mirrors else []
    site.index("mira/stable", volatile=False, bases=base, acl_upload=["mira"], **stage,
               **({"title": "released"} if release >= (3, 0) else {}))
    site.index("mira/dev", volatile=True, bases=["mira/stable", *base],
               acl_upload=["mira", "noel"], **stage,
               **({"mirror_whitelist": ["sealib"] if release < (7,) else []} if release >= (2, 0) else {}),
               **({"mirror_whitelist_inheritance": "union"} if release >= (6, 0) else {}),
               **({"custom_data": "SEA-1"} if release >= (2, 1) else {}),
               **({"acl_toxresult_upload": [":AUTHENTICATED:"]} if release >= (5, 2) else {}))
    site.index("noel/open", volatile=True, bases=["mira/dev"], acl_upload=[":ANONYMOUS:"], **stage,
               **({"mirror_whitelist": ["*"]} if release >= (2, 0) else {}))

    dev, stable = "mira/dev", "mira/stable"
    first = wheel("tide-table", "1.0", requires_python=">=2.7", summary="counts tides")
    site.upload(dev, sdist("tide-table", "1.0", summary="the first try"), summary="counts tides")
    again = sdist("tide-table", "1.0", summary="counts tides")
    site.upload(dev, again)
    site.of(dev, "tide-table", "1.0")["files"][again.filename]["log"] = [
        ["overwrite", None], ["upload", "mira"]]
    site.upload(dev, first)
    second = wheel("tide-table", "2.0", requires_dist=["sealib>=1"], summary="counts tides again")
    site.upload(dev, sdist("tide-table", "2.0", summary="counts tides again"), description=LONG)
    site.upload(dev, second, user="noel", description=LONG, keywords="sea,moon",
                author="M\u00edra \u6d77")
    spelled = dataclasses.replace(
        wheel("Sea.Lib", "1.5"), filename="Sea.Lib-1.5-py3-none-any.whl")
    site.upload(dev, spelled, project="sea-lib")
    site.upload(dev, sdist("sealib", "1.9"), version="1.9")
    if release >= (7, 0):
        reply = server.patch("/mira/dev/sealib", {"inheritance_rules": ["allow all"]}, user="mira")
        assert reply.status == 200, reply
        site.indexes[dev]["mirror_whitelist"] = ["sealib"]
    site.upload(dev, dataclasses.replace(
        wheel("under_Score", "0.1.dev3"), filename="under_Score-0.1.dev3-py3-none-any.whl"),
        project="under-score")
    submit(server, dev, "paper-boat", "0.5", summary="of paper")
    site.of(dev, "paper-boat", "0.5")["metadata"] = {
        "name": "paper-boat", "version": "0.5", "summary": "of paper"}
    site.docs(dev, "1.0", "<h1>old</h1>")
    site.docs(dev, "2.0", "<h1>new</h1>")
    if release >= (2, 0):
        site.result(dev, "tide-table", "2.0", second.filename, "py27", 0)
        site.result(dev, "tide-table", "2.0", second.filename, "py35", 1)
    else:
        site.attached(dev, "tide-table", "2.0", "tide_table-2.0.tar.gz")
    site.push(dev, "tide-table", "2.0", stable, "mira")
    site.upload("noel/open", wheel("nobody", "1.0"), user="noel")


def outside():
    """A started upstream with the project of which two of three files are fetched."""
    upstream = Upstream().start()
    upstream.publish(wheel("sealib", "1.0", requires_python=">=2.7"))
    upstream.publish(sdist("sealib", "1.1"), yanked="leaks")
    upstream.publish(wheel("sealib", "2.0"))
    return upstream
