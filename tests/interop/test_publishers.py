"""twine and `uv publish` upload, and show their users what the server has to say."""

import pytest

from clients import PUBLISHERS
from harness import sdist, wheel

FILE = wheel("hello-published", "1.0", summary="the first one")
OTHER_CONTENT = wheel("hello-published", "1.0", summary="another one")


@pytest.fixture(params=["private", "inherited"])
def index(request, world):
    """A non-volatile index: on its own, or with bases."""
    bases = [world.private, world.mirror] if request.param == "inherited" else []
    return world.new_index(volatile=False, bases=bases)


def stored(world, index, archive=FILE):
    return world.server.fetch(index, archive.filename, archive.name)


@pytest.mark.parametrize("publisher", PUBLISHERS)
class TestEveryPublisher:
    @pytest.fixture
    def publish(self, clients, world, publisher):
        def publish(index, archive, user=world.user, password=world.password, **options):
            return clients.publish(publisher, world.index_url(index), archive, user, password, **options)
        return publish

    @pytest.mark.parametrize("archive", [FILE, sdist("hello-published", "1.0")], ids=["wheel", "sdist"])
    def test_uploads_a_new_file(self, world, publish, index, archive):
        publish(index, archive)
        assert stored(world, index, archive) == archive.content

    def test_may_upload_an_identical_file_again(self, world, publish, index):
        publish(index, FILE)
        publish(index, FILE)
        assert world.server.filenames(index, FILE.name) == [FILE.filename]
        assert stored(world, index) == FILE.content

    def test_shows_that_a_file_of_a_non_volatile_index_cannot_change(self, world, publish, index):
        publish(index, FILE)
        printed = publish(index, OTHER_CONTENT, expect=None)
        assert "409 Conflict" in printed
        assert FILE.filename + " already exists in non-volatile index" in joined(printed)
        assert stored(world, index) == FILE.content

    def test_replaces_a_file_of_a_volatile_index(self, world, publish):
        index = world.new_index(volatile=True)
        publish(index, FILE)
        publish(index, OTHER_CONTENT)
        assert stored(world, index) == OTHER_CONTENT.content

    def test_is_refused_with_a_wrong_password(self, world, publish, index):
        printed = publish(index, FILE, password="wrong", expect=None)
        assert "401 Unauthorized" in printed
        assert world.server.get("/%s/%s" % (index, FILE.name)).status == 404

    def test_is_refused_as_a_user_who_may_not_upload(self, world, publish, index):
        printed = publish(index, FILE, user="bob", password="pw-of-bob", expect=None)
        assert "403 Forbidden" in printed and "no permission to submit" in joined(printed)
        assert world.server.get("/%s/%s" % (index, FILE.name)).status == 404

    def test_is_told_that_a_mirror_takes_no_uploads(self, world, publish):
        printed = publish(world.mirror, FILE, expect=None)
        assert "404 Not Found" in printed and "cannot submit to mirror index" in joined(printed)


def joined(printed):
    """Undoes the line breaks that a client puts into a long message."""
    return " ".join(printed.split())


def test_uv_publish_skips_a_file_that_its_check_url_has(clients, world, index):
    check = {"UV_PUBLISH_CHECK_URL": world.simple_url(index)}
    arguments = ["uv", world.index_url(index), FILE, world.user, world.password]
    assert "Uploading" in clients.publish(*arguments, **check)
    assert "already exists, skipping" in joined(clients.publish(*arguments, **check))


def test_uv_publish_is_stopped_by_its_check_url_when_the_content_differs(clients, world, index):
    check = {"UV_PUBLISH_CHECK_URL": world.simple_url(index)}
    clients.publish("uv", world.index_url(index), FILE, world.user, world.password, **check)
    printed = clients.publish("uv", world.index_url(index), OTHER_CONTENT, world.user, world.password,
                              expect=None, **check)
    assert FILE.sha256 in joined(printed) and OTHER_CONTENT.sha256 in joined(printed)
    assert stored(world, index) == FILE.content


def test_a_file_can_be_installed_as_soon_as_twine_is_done(clients, world, index):
    clients.publish("twine", world.index_url(index), FILE, world.user, world.password)
    assert clients.install("pip", world.simple_url(index), "hello-published") == {"hello-published": "1.0"}
