"""Names of users and indexes that are gone, or not there yet: nobody takes over the rights that stand under them."""

import itertools
import sqlite3

import pytest

from harness import audited, path_of, wheel

numbers = itertools.count(1)
ACLS = ("acl_upload", "acl_toxresult_upload", "acl_pkg_read")


@pytest.fixture
def people(shared_server):
    """Names of three fresh users who are logged in, and of one who is not there yet."""
    shared_server.login("root", "secret")
    names = ["%s%d" % (name, next(numbers)) for name in ("alice", "bob", "corp", "carol")]
    for name in names[:3]:
        shared_server.add_user(name)
        shared_server.login(name)
    return names


def create(server, name, by=None):
    reply = server.put("/" + name, {"password": "evil"}, user=by)
    if reply.status == 201:
        server.passwords[name] = "evil"
        server.login(name)
    return reply


def config(server, index, user):
    return server.get("/%s?no_projects=" % index, user=user).result


def changes_of(server, index):
    return [(row["action"], row["who"], row["detail"]) for row in audited(server, index=index)]


@pytest.mark.parametrize("key", ACLS)
def test_a_deleted_user_leaves_all_acls(shared_server, people, key):
    alice, bob, _, _ = people
    index = alice + "/dev"
    shared_server.add_index(index, **{key: [alice, bob, ":AUTHENTICATED:"], "volatile": False})
    assert shared_server.delete("/" + bob, user="root").status == 200
    assert config(shared_server, index, alice)[key] == [alice, ":AUTHENTICATED:"]
    assert changes_of(shared_server, index)[0] == ("index.modify", "root", "%s: %s deleted" % (key, bob))
    assert create(shared_server, bob).status == 201     # the name means nothing any more: anybody may have it


def test_a_stranger_under_an_old_name_reads_and_uploads_nothing(shared_server, people):
    alice, bob, _, _ = people
    index = alice + "/priv"
    shared_server.add_index(index, acl_pkg_read=[alice, bob], acl_upload=[alice, bob], volatile=False)
    assert shared_server.upload(index, wheel("foo", "1.0"), user=bob).status == 200
    assert shared_server.delete("/" + bob, user=bob).status == 200
    assert create(shared_server, bob).status == 201
    assert shared_server.get("/%s/foo" % index, user=bob).status == 403
    assert shared_server.upload(index, wheel("foo", "6.6"), user=bob).status in (401, 403)


@pytest.mark.parametrize("key", ACLS)
@pytest.mark.parametrize("who", [None, "alice", "root"])
def test_a_name_that_an_acl_holds_already_is_made_by_root_only(shared_server, people, key, who):
    alice, _, _, carol = people
    shared_server.add_index(alice + "/dev", **{key: [alice, carol]})
    reply = create(shared_server, carol, by=alice if who == "alice" else who)
    assert reply.status == (201 if who == "root" else 403)
    if who != "root":
        assert "only root" in reply.json()["message"] and alice not in reply.json()["message"]
        assert shared_server.patch("/%s/dev" % alice, {key: [alice]}, user=alice).status == 200
        assert create(shared_server, carol).status == 201


def test_only_whole_names_count(shared_server, people):
    alice, bob, _, carol = people
    shared_server.add_index(alice + "/dev", acl_upload=[carol + "x", ":" + carol], title=carol)
    assert create(shared_server, carol).status == 201


def test_an_index_that_others_build_on_is_not_deleted(shared_server, people):
    alice, bob, corp, _ = people
    prod, open_, closed, own = corp + "/prod", alice + "/open", bob + "/closed", corp + "/own"
    shared_server.add_index(prod)
    shared_server.add_index(own, bases=[prod])
    shared_server.add_index(open_, bases=[prod])
    shared_server.add_index(closed, bases=[prod, own], acl_pkg_read=[bob])
    reply = shared_server.delete("/" + prod, user=corp)
    assert (reply.status, reply.json()["message"]) == (
        409, "%s can't be deleted: in use as a base by %s, 1 more that you may not read; "
        "?force deletes it all the same and takes it out of their bases" % (prod, open_))
    assert bob in shared_server.delete("/" + prod, user="root").json()["message"]
    assert config(shared_server, prod, corp)["type"] == "stage"
    assert shared_server.delete("/%s?force" % prod, user=alice).status == 403
    assert shared_server.delete("/%s?force" % prod, user=corp).status == 201
    assert config(shared_server, open_, alice)["bases"] == []
    assert config(shared_server, closed, bob)["bases"] == [own]
    assert config(shared_server, own, corp)["bases"] == [prod]      # of one's own, a deleted base stays listed, as in devpi
    assert changes_of(shared_server, closed)[0] == ("index.modify", corp, "bases: %s deleted" % prod)


def test_a_user_on_whose_indexes_others_build_is_not_deleted(shared_server, people):
    alice, bob, corp, _ = people
    for name in ("one", "two"):
        shared_server.add_index("%s/%s" % (corp, name))
    shared_server.add_index(alice + "/above", bases=[corp + "/one", corp + "/two"])
    shared_server.add_index(corp + "/own", bases=[corp + "/one"])
    for who in (corp, "root"):
        reply = shared_server.delete("/" + corp, user=who)
        assert reply.status == 409 and alice + "/above" in reply.json()["message"]
    assert shared_server.delete("/%s?force" % corp, user=corp).status == 200
    assert config(shared_server, alice + "/above", alice)["bases"] == []
    assert create(shared_server, corp).status == 201
    shared_server.add_index(corp + "/one")
    assert shared_server.upload(corp + "/one", wheel("requests", "99")).status == 200
    assert shared_server.get("/%s/above/+simple/requests/" % alice).status == 404


def test_a_non_volatile_index_keeps_its_user_with_force_too(shared_server, people):
    alice, _, corp, _ = people
    shared_server.add_index(corp + "/prod", volatile=False)
    shared_server.add_index(alice + "/above", bases=[corp + "/prod"])
    for path in ("/" + corp, "/%s/prod" % corp):
        assert shared_server.delete(path + "?force", user=corp).status == 403
    assert config(shared_server, alice + "/above", alice)["bases"] == [corp + "/prod"]


def test_names_that_an_older_program_left_in_bases_are_made_by_root_only(server):
    """Such a database has a base whose index, or whose user, is gone."""
    server.login("root", "secret")
    for name in ("alice", "corp"):
        server.add_user(name)
        server.login(name)
    server.add_index("corp/prod")
    server.add_index("corp/extra")
    server.add_index("alice/above", bases=["corp/prod", "corp/extra"])
    server.stop()

    with sqlite3.connect(str(server.directory / "devpi_lite.db")) as db:
        db.execute("DELETE FROM indexes WHERE name = 'prod'")
    db.close()
    server.start()
    reply = server.put("/corp/prod", {}, user="corp")
    assert reply.status == 403 and "only root" in reply.json()["message"]
    assert server.put("/corp/prod", {}, user="root").status == 200
    server.stop()
    with sqlite3.connect(str(server.directory / "devpi_lite.db")) as db:
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("DELETE FROM users WHERE name = 'corp'")
    db.close()
    server.start()
    assert server.put("/corp", {"password": "evil"}).status == 403
    assert server.put("/corp", {"password": "good"}, user="root").status == 201


def test_whom_restrict_modify_names_makes_such_users_too(make_server):
    server = make_server("--restrict-modify", "admin,:ANONYMOUS:")
    server.login("root", "secret")
    server.add_user("admin", by="root")
    server.login("admin")
    server.put("/admin/dev", {"acl_upload": ["carol"]}, user="admin")
    assert server.put("/carol", {"password": "x"}).status == 403
    assert server.put("/carol", {"password": "x"}, user="admin").status == 201


def test_a_deleted_file_stays_deleted_whatever_a_mirror_of_that_name_lists(shared_server, people, upstream):
    alice = people[0]
    index, archive = alice + "/turn", upstream.publish("turned", "1.0")
    shared_server.add_index(index)
    assert shared_server.upload(index, archive).status == 200
    path = path_of(archive, index)
    assert shared_server.delete(path, user=alice).status == 200
    assert shared_server.delete("/" + index, user=alice).status == 201
    shared_server.add_mirror(index, upstream)
    assert shared_server.versions(index, "turned") == ["1.0"]
    assert shared_server.delete("/" + index, user=alice).status == 201
    shared_server.add_index(index)
    assert shared_server.get(path).status == 410
