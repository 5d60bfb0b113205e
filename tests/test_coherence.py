"""Many who change the same few things at once: nothing fails, and what is kept in memory is what a fresh start gives."""

import collections
import itertools
import random
from concurrent.futures import ThreadPoolExecutor

from harness import (
    HTML, JSON, SIMPLE_JSON, SOAK, Upstream, documentation, eventually, multipart, patched, sdist,
    wheel)

USERS, STAGES, VERSIONS = ("ada", "bob"), ("ada/a", "ada/b", "bob/a", "bob/b"), ("1.0", "2.0")
CROWD = 6
MOVES_OF_PROJECT = 100  # then the crowd turns to the next one, and what was kept of this one stays as it was last
PROJECTS = ["project-%d" % number for number in range(100 if SOAK else 10)]
UNSETTLED = 20 * len(PROJECTS)  # moves in which indexes are changed, which empties all that is kept of them and of those above
PAGES = (("/%s/%s", JSON), ("/%s/+simple/%s/", SIMPLE_JSON), ("/%s/+simple/%s/", HTML), ("/%s/+pypi/%s/json", JSON),
         ("/%s/%s/latest/+doc/index.html", HTML))
DOCS = documentation("any", None).content


class Player:
    """One of the crowd, which asks a server for one random thing after the other; `moves` counts for all."""

    def __init__(self, server, moves, seed):
        self.server, self.moves, self.random = server, moves, random.Random(seed)
        self.on_projects = [self.upload, self.upload, self.push, self.mirrored, self.docs, self.remove, self.yank, self.status]
        self.on_indexes = [self.remake, self.rebase, self.close, self.retitle]

    def pick(self, *names):
        return self.random.choice(names)

    def play(self, counts):
        """Plays until the last project has had its moves."""
        for move in self.moves:
            if move >= MOVES_OF_PROJECT * len(PROJECTS):
                return
            self.project, self.version = PROJECTS[move // MOVES_OF_PROJECT], self.pick(*VERSIONS)
            self.user, self.index = self.pick(*USERS), self.pick(*STAGES)
            changes = self.on_projects + (self.on_indexes if move < UNSETTLED else [])
            counts[self.pick(self.read, self.read, self.pick(*changes))().status] += 1

    def ask(self, method, path, body=None, **options):
        return self.server.request(method, "/" + path, body, user=self.user, **options)

    def upload(self):
        archive = self.pick(wheel, sdist)(self.project, self.version, summary=str(self.random.random()))
        return self.server.upload(self.index, archive, user=self.user)

    def push(self):
        body = {"name": self.project, "version": self.version, "targetindex": self.pick(*STAGES)}
        return self.ask("PUSH", self.index, body)

    def mirrored(self):
        return self.ask("PUSH", "root/mirror", {"name": self.project, "version": self.version, "targetindex": self.index})

    def docs(self):
        fields = {":action": "doc_upload", "name": self.project, "version": self.version}
        body, content_type = multipart(fields, {"content": ("docs.zip", DOCS)})
        return self.ask("POST", self.index + "/", body, headers={"Content-Type": content_type})

    def remove(self):
        return self.ask("DELETE", "/".join((self.index, self.project, self.version)[:self.pick(2, 3)]) + "?force")

    def yank(self):
        return self.ask("PATCH", "%s/%s/%s" % (self.index, self.project, self.version), {"yanked": self.pick(False, "broken")})

    def status(self):
        word = self.pick("active", "active", "archived", "quarantined")
        return self.ask("PATCH", "%s/%s" % (self.index, self.project), {"project-status": {"status": word}})

    def remake(self):
        if self.random.random() < 0.7:
            return self.ask("PUT", self.index, {"bases": [], "acl_upload": list(USERS)})
        return self.ask("DELETE", self.index)

    def rebase(self):
        bases = self.random.sample(["ada/a", "bob/a", "bob/b", "root/mirror"], 2)
        return self.ask("PATCH", self.index, {"bases": bases, "mirror_whitelist": self.pick([], ["*"])})

    def close(self):
        return self.ask("PATCH", self.index, {"acl_pkg_read": self.pick([":ANONYMOUS:"], ["ada"], ["bob"])})

    def retitle(self):
        title = {"title": str(self.random.random())}
        return self.ask("PATCH", self.pick(self.index, self.user), title)

    def read(self):
        return see(self.server, self.user, self.index, self.project, self.pick(*PAGES))


def see(server, user, index, project, page):
    path, accepted = page
    return server.get(path % (index, project), user=user, headers={"Accept": accepted})


def everything(server):
    """{(user, index, project, page): (status, body)} of all that there is to see."""
    seen = {}
    for view in itertools.product((None, "ada"), STAGES, PROJECTS, PAGES):
        reply = see(server, *view)
        seen[view] = reply.status, reply.text.replace(server.url, "")
    return seen


def test_after_a_crowd_of_changes_memory_says_what_the_disk_says(make_server):
    upstream = Upstream().start()
    for project in PROJECTS:
        upstream.publish(project, "1.0")
    server = make_server()
    server.add_mirror("root/mirror", upstream.url)
    for user in USERS:
        server.add_user(user)
        server.login(user)
    for index in STAGES:
        server.add_index(index, bases=[], acl_upload=list(USERS))
    counts, moves = collections.Counter(), itertools.count()
    with ThreadPoolExecutor(CROWD) as pool:
        for done in [pool.submit(Player(server, moves, seed).play, counts) for seed in range(CROWD)]:
            done.result()
    assert not [status for status in counts if status >= 500], server.whole_output()
    assert counts[200] > MOVES_OF_PROJECT * len(PROJECTS) / 5
    before = everything(server)
    server.restart()
    server.login("ada")
    after = everything(server)
    assert {key: (before[key], after[key]) for key in before if before[key] != after[key]} == {}
    assert "Traceback" not in server.whole_output()
    upstream.stop()


# The program, in which it takes long until all that a commit touched is dropped.
SLOW_DROP = """
import time
drop = devpi_lite.Cache._drop
def slow(self, tags):
    time.sleep(0.1)
    drop(self, tags)
devpi_lite.Cache._drop = slow
"""


def test_what_is_asked_for_while_a_commit_is_told_is_not_kept_as_new(make_server, tmp_path):
    server = make_server(script=patched(tmp_path, SLOW_DROP))
    server.add_user("ada")
    server.add_index("ada/a")
    assert server.upload("ada/a", wheel("shared", "1.0")).status == 200

    def versions(number):       # each under a head of its own, so that each is an answer of its own
        reply = server.get("/ada/a/+simple/shared/", headers={"Accept": SIMPLE_JSON, "X-Number": str(number)})
        return reply.json()["versions"]
    assert versions(0) == ["1.0"]
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(server.upload, "ada/a", wheel("shared", "2.0"))
        numbers = itertools.count(1)
        last = next(number for number in numbers if versions(number) and upload.done())
        assert upload.result().status == 200
    assert last > 5
    assert [number for number in range(last + 1) if sorted(versions(number)) != ["1.0", "2.0"]] == []


# The program, in which who asks for the resolution order of an index waits for a file.
LATE_ORDER = """
import os, time
order = devpi_lite.Indexes.order
def late(self, index):
    open(%r, "w").close()
    while not os.path.exists(%r):
        time.sleep(0.01)
    return order(self, index)
devpi_lite.Indexes.order = late
"""


def test_an_index_that_changes_while_one_reads_is_kept_as_it_is_then(make_server, tmp_path):
    begun, go = tmp_path / "begun", tmp_path / "go"
    server = make_server(script=patched(tmp_path, LATE_ORDER % (str(begun), str(go))))
    server.add_user("ada")
    server.add_index("ada/a", acl_pkg_read=["ada"])
    assert server.upload("ada/a", wheel("shared", "1.0")).status == 200
    page = "/ada/a/+pypi/shared/json"
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(server.get, page, user="ada")
        eventually(begun.exists)
        assert server.patch("/ada/a", {"acl_pkg_read": [":ANONYMOUS:"]}, user="ada").status == 200
        go.touch()
        assert reading.result().status == 200
    assert server.get(page).status == 200


def test_what_one_account_changes_leaves_the_pages_of_others_in_memory(server):
    server.login("root", "secret")
    for user in ("ada", "eve"):
        server.add_user(user)
        server.login(user)
    server.add_index("ada/below")
    server.add_index("ada/top", bases=["ada/below"])
    server.add_index("eve/x", bases=["ada/below"])
    assert server.upload("ada/below", wheel("shared", "1.0")).status == 200

    def kept(look=True):
        """Whether the page of ada/top, and its answer for nobody and for ada, are in memory; then they are."""
        lines = dict(line.rsplit(" ", 1) for line in server.get("/+metrics").text.splitlines() if line[:1] != "#")
        sizes = int(lines["devpi_lite_page_cache_bytes"]), int(lines["devpi_lite_answer_cache_bytes"])
        for user in (None, "ada") if look else ():
            assert see(server, user, "ada/top", "shared", PAGES[1]).status == 200
        return all(sizes)

    kept()
    of_others = [("PATCH", "/eve/x", {"title": "x"}), ("PATCH", "/eve/x", {"acl_upload": ["eve", "ada"], "bases": []}),
                 ("PATCH", "/eve", {"title": "x", "custom_data": 1}), ("PUT", "/eve/y", {}), ("PUT", "/mia", {"password": "x"}),
                 ("DELETE", "/eve/y", None), ("PATCH", "/eve", {"password": "x"}), ("DELETE", "/mia", None)]
    for method, path, body in of_others:
        assert server.request(method, path, body, user="root").status in (200, 201)
        assert kept(), (method, path, body)
    of_these = [("PATCH", "/ada/top", {"title": "x"}), ("PATCH", "/ada/below", {"title": "x"}),
                ("PATCH", "/ada/below", {"acl_pkg_read": [":AUTHENTICATED:", ":ANONYMOUS:"]}), ("PATCH", "/ada/top", {"bases": []})]
    for method, path, body in of_these:
        assert server.request(method, path, body, user="root").status == 200
        assert not kept(look=body != {"bases": []}), (method, path, body)
    assert see(server, None, "ada/top", "shared", PAGES[1]).status == 404


def test_a_changed_account_or_acl_ends_what_was_kept_for_it(server):
    """Each answer is asked for twice, under the same head, so that it comes from memory."""
    server.login("root", "secret")
    for user in ("ada", "bob"):
        server.add_user(user)
        server.login(user)
    server.add_index("ada/below", acl_pkg_read=["bob"])
    server.add_index("ada/top", bases=["ada/below"])
    assert server.upload("ada/below", wheel("shared", "1.0")).status == 200
    link = server.simple("ada/below", "shared", user="bob")["files"][0]["url"].split("#")[0].replace("../../", "/ada/below/")

    paths = ["/ada/below/+simple/shared/", "/ada/top/+simple/shared/", "/ada/below/+simple/", link, link + ".metadata",
             "/ada/top/+pypi/shared/json"]

    def statuses():
        return {server.get(path, user="bob", headers={"Accept": "*/*"}).status for path in 2 * paths}
    assert statuses() == {200}
    assert server.patch("/ada/below", {"acl_pkg_read": ["ada"]}, user="ada").status == 200
    assert statuses() == {403}
    assert server.patch("/ada/below", {"acl_pkg_read": ["bob"]}, user="ada").status == 200
    assert statuses() == {200}
    assert server.patch("/bob", {"password": "new"}, user="root").status == 200
    assert statuses() == {401}
    server.login("bob", "new")
    assert statuses() == {200}
    assert server.delete("/bob", user="root").status == 200
    assert statuses() == {401}
