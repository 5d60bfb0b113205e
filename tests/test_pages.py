"""What a browser sees of users, indexes, projects and versions."""

import json
import re
import time

import pytest

from harness import BROWSER, documentation, eventually, sdist, upload, upload_docs, wheel
from scripted import entry
from webpages import RESULT, check_page, crawl, page

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{0}{evil}&amp;\u202e\x0b"


@pytest.fixture(scope="module")
def site(shared_server):
    """alice/dev holds pluggy 1.4.0, 1.5.0 and 2.0rc1, with documentation and test results of 1.5.0."""
    server = shared_server
    server.add_user("alice")
    server.add_index("alice/dev", bases=[], title="Alice dev", description="For the team")
    server.add_index("alice/prod", bases=["alice/dev"], volatile=False)
    for version in ("1.4.0", "1.5.0", "2.0rc1"):
        upload(server, "alice/dev", wheel("pluggy", version, summary="plugin calling", requires_python=">=3.8",
                                          requires_dist=["click>=7", "tox; extra == 'dev'"]))
    upload(server, "alice/dev", sdist("pluggy", "1.5.0"), fields={"summary": "plugin calling"})
    upload(server, "alice/dev", wheel("click", "8.1"))
    upload_docs(server, "alice/dev", documentation("pluggy", "1.5.0"))
    (path,) = [link["href"] for link in server.get("/alice/dev/pluggy/1.5.0").result["+links"]
               if link["rel"] == "releasefile" and link["href"].endswith(".whl")]
    reply = server.request("POST", path[len(server.url):], body=json.dumps(RESULT).encode(), user="alice",
                           headers={"Content-Type": "application/json"})
    assert reply.status == 200
    return server


def test_the_front_page_lists_users_indexes_and_uploads(site):
    front = page(site, "/")
    assert front.headings[0] == "Package indexes"
    rows = front.rows()
    assert ["alice/dev stage", "Alice dev", "2 projects", time.strftime("%Y-%m-%d", time.gmtime()), ""] in rows
    assert ["alice/prod stage", "", "0 projects", "", "alice/dev"] in rows
    assert "click 8.1" in [row[0] for row in rows]
    assert "devpi use %s/alice/dev" % site.url in front.text


def test_the_front_page_counts_the_projects_that_are_there_now(make_server, upstream):
    server = make_server()
    server.add_user("alice")
    server.add_index("alice/dev")
    server.add_index("alice/pypi", type="mirror", mirror_url=upstream.url, mirror_no_project_list=True)

    def sizes():
        return [row[2] for row in page(server, "/").rows() if row[0].startswith("alice/")]
    assert sizes() == ["0 projects", "0 cached"]
    upload(server, "alice/dev", wheel("first", "1.0"))
    upload(server, "alice/dev", wheel("second", "1.0"))
    upstream.publish("third")
    assert server.get("/alice/pypi/+simple/third/").status == 200
    eventually(lambda: sizes() == ["2 projects", "1 cached"])       # once it is stored
    upload(server, "alice/dev", wheel("second", "2.0"))
    assert server.delete("/alice/dev/first", user="alice").status == 200
    assert sizes() == ["1 project", "1 cached"]


def test_a_fresh_server_has_a_guide(make_server):
    server = make_server()
    front = page(server, "/")
    assert "First steps" in front.headings and "curl -X PUT %s/alice/dev" % server.url in front.text
    assert "Recently uploaded" not in front.headings
    assert "root-password" in front.text and "/+login?next=/" in front.links


def test_over_http_from_another_machine_the_commands_work_there(make_server):
    server = make_server()
    def front():
        return server.get("/", headers={"Accept": BROWSER, "X-Forwarded-Host": "192.0.2.9:3141", "X-Real-IP": "192.0.2.7"})

    pip = "pip install --trusted-host 192.0.2.9:3141 --index-url http://192.0.2.9:3141/alice/dev/+simple/ your-package"
    assert pip in front().text and "Cross-Origin-Opener-Policy" not in front().headers
    assert "/alice -u root:PASSWORD -d" in front().text and "root-password" not in front().text
    server.add_user("alice")
    server.add_index("alice/dev", bases=[])
    upload(server, "alice/dev", wheel("here", "1.0"))
    assert "+simple/ &amp;&amp; pip config set global.trusted-host 192.0.2.9:3141<" in front().text


def test_the_front_page_names_a_release_once_and_who_uploaded_it_also_after_a_replacement(make_server):
    server = make_server()
    server.add_user("alice")
    server.add_index("alice/dev", bases=[])
    for archive in (wheel("twice", "1.0"), sdist("twice", "1.0"), wheel("twice", "1.0", summary="anew")):
        upload(server, "alice/dev", archive)
    (row,) = [row for row in page(server, "/").rows() if row[0] == "twice 1.0"]
    assert (row[1], row[3]) == ("alice/dev", "alice")
    assert "anonymous" not in server.get("/alice/dev/+feed.atom", headers={"Accept": "*/*"}).text
    assert "twice 1.0" in server.get("/alice/dev/twice/+feed.atom", headers={"Accept": "*/*"}).text
    assert server.get("/alice/dev/thrice/+feed.atom", headers={"Accept": "*/*"}).status == 404


def test_the_front_page_names_the_twenty_newest_releases_of_all_stages(make_server):
    server = make_server()
    server.add_user("alice")
    uploads = [("s%02d" % number, "1.0") for number in range(21)] + [("s00", "2.0"), ("s05", "2.0"), ("s00", "3.0")]
    for stage in sorted({stage for stage, _ in uploads}):
        server.add_index("alice/" + stage, bases=[])
    for stage, version in uploads:
        upload(server, "alice/" + stage, wheel("p-" + stage, version))
    shown = [row[:2] for row in page(server, "/").rows() if row[0].startswith("p-")]
    assert shown == [["p-%s %s" % each, "alice/" + each[0]] for each in uploads[:3:-1]]


def test_every_link_leads_somewhere(site):
    found = crawl(site)
    assert {"/", "/alice", "/alice/dev", "/alice/dev?show=settings", "/alice/dev?show=inheritance",
            "/alice/dev?sort=-uploaded", "/alice/dev/pluggy", "/alice/dev/pluggy/1.5.0", "/+status"} <= set(found)


def test_a_user_page_shows_the_address_to_logged_in_users_only(site):
    site.add_user("carol")
    site.patch("/carol", {"email": "carol@example.org", "title": "Carol C."}, user="carol")
    assert page(site, "/carol").headings[0] == "carol Carol C."
    assert "carol@example.org" not in page(site, "/carol").source
    assert "carol@example.org" in page(site, "/carol", user="carol").source


def test_an_index_page_lists_projects_by_their_latest_release(site):
    rows = {row[0].partition(" ")[0]: row for row in page(site, "/alice/dev").rows()}
    pluggy = rows["pluggy"]
    assert pluggy[:2] == ["pluggy plugin calling", "1.5.0"] and pluggy[3:] == ["2", "failed", "1.5.0"]
    assert pluggy[2].endswith(" alice")
    assert rows["click"][1] == "8.1"


def test_an_index_page_filters_sorts_and_tells_its_settings(site):
    assert [row[0] for row in page(site, "/alice/dev?q=Plu").rows()] == ["pluggy plugin calling"]
    assert "No project here begins with x-y" in page(site, "/alice/dev?q=x_y").text
    newest = page(site, "/alice/dev?sort=-uploaded").rows()
    assert [row[0].partition(" ")[0] for row in newest] == ["click", "pluggy"]
    settings = page(site, "/alice/dev?show=settings")
    assert ["acl_toxresult_upload", "anonymous"] in settings.rows() and "mirror_whitelist none" in settings.text
    assert "alice/dev stage" in page(site, "/alice/prod?show=inheritance").text
    assert "its base alice/dev is volatile" in page(site, "/alice/prod").text


def test_an_index_leads_to_its_comparison_with_another(site):
    shown = page(site, "/alice/dev?show=inheritance")
    assert "alice/prod" in [text for _, text in shown.with_text("option")]
    (form,) = [form for form in shown.of("form") if form.get("action", "").endswith("+compare")]
    reply = site.get(form["action"] + "?with=alice/prod", headers={"Accept": BROWSER})
    assert (reply.status, reply.headers["Location"]) == (302, site.url + "/alice/dev/+compare/alice/prod")
    assert page(site, "/alice/dev/+compare/alice/prod").headings[0] == "alice/dev beside alice/prod"
    assert "name the other stage" in page(site, "/alice/dev/+compare", 400).text


def test_a_long_index_is_read_in_pages(site):
    site.add_index("alice/many", bases=[])
    for number in range(103):
        reply = site.upload("alice/many", None, raw=True,
                            fields={":action": "submit", "name": "p%03d" % number, "version": "1"})
        assert reply.status == 200
    first = page(site, "/alice/many")
    assert len(first.rows()) == 100
    (following,) = [link for link in first.links if "after=" in link]
    second = page(site, following)
    assert [row[0] for row in second.rows()] == ["p100", "p101", "p102"]
    assert not [link for link in second.links if "after=" in link]


def test_a_long_index_is_read_in_pages_by_upload(site):
    site.add_index("alice/busy", bases=[])
    names = ["p%03d" % number for number in range(102)]
    upload(site, "alice/busy", *(wheel(name, "1.0") for name in names), wheel("p050", "1.1"), wheel("p000", "1.1"))
    first = page(site, "/alice/busy?sort=-uploaded")
    (following,) = [link for link in first.links if "after=" in link]
    second = page(site, following)
    found = [row[0].partition(" ")[0] for row in first.rows() + second.rows()]
    assert found == ["p000", "p050"] + [name for name in reversed(names) if name not in ("p000", "p050")]
    assert len(first.rows()) == 100 and not [link for link in second.links if "after=" in link]


def test_a_project_page_lists_versions_newest_first(site):
    project = page(site, "/alice/dev/pluggy")
    assert project.headings[0] == "pluggy latest: 1.5.0"
    assert [row[0] for row in project.rows()] == ["2.0rc1 pre", "1.5.0", "1.4.0"]
    row = project.rows()[1]
    assert row[1] == "alice/dev" and row[3:] == ["1 sdist, 1 wheel", ">=3.8", "failed", "read"]
    assert [row[0] for row in page(site, "/alice/dev/pluggy?pre=0").rows()] == ["1.5.0", "1.4.0"]
    assert page(site, "/alice/prod/pluggy").rows()[1][1] == "alice/dev"


def test_a_version_whose_files_a_base_has_too_says_so(make_server):
    server = make_server()
    server.add_user("alice")
    server.add_index("alice/base", bases=[])
    server.add_index("alice/dev", bases=["alice/base"])
    upload(server, "alice/base", wheel("twin", "1.0"), wheel("twin", "0.9"))
    upload(server, "alice/dev", wheel("twin", "1.0"), sdist("twin", "1.1"))
    assert [(row[0], "also in alice/base" in row[1]) for row in page(server, "/alice/dev/twin").rows()] == [
        ("1.1", False), ("1.0", True), ("0.9", False)]


def test_a_version_page_tells_what_is_known(site):
    version = page(site, "/alice/dev/pluggy/1.5.0")
    assert version.headings[0].startswith("pluggy 1.5.0")
    for text in ("plugin calling", "Requires-Python >=3.8", "dev (1)", "· failed", "uploaded by alice to alice/dev"):
        assert text in version.text, text
    assert "There is a newer version" not in version.text
    assert "/alice/dev/click" in version.links
    assert "There is a newer version: 1.5.0" in page(site, "/alice/dev/pluggy/1.4.0").text
    assert "The latest stable version is 1.5.0" in page(site, "/alice/dev/pluggy/2.0rc1").text
    assert "This version lives in alice/dev" in page(site, "/alice/prod/pluggy/1.5.0").text


@pytest.mark.parametrize("alias, heading", [("latest", "pluggy 1.5.0"), ("stable", "pluggy 1.5.0")])
def test_an_alias_shows_the_version_that_it_means(site, alias, heading):
    assert page(site, "/alice/dev/pluggy/" + alias).headings[0].startswith(heading)


def test_yanked_releases_say_so(site):
    upload(site, "alice/dev", wheel("yanky", "1.0"), wheel("yanky", "0.9"))
    assert site.patch("/alice/dev/yanky/1.0", {"yanked": "loses data"}, user="alice").status == 200
    project = page(site, "/alice/dev/yanky")
    assert project.headings[0] == "yanky latest: 0.9"
    assert project.rows()[0][0] == "1.0 yanked: loses data"
    assert [row[0] for row in page(site, "/alice/dev/yanky?yanked=0").rows()] == ["0.9"]
    assert "This version is yanked: loses data" in page(site, "/alice/dev/yanky/1.0").text


def test_a_project_whose_files_are_all_yanked_says_what_installers_do(make_server):
    server = make_server()
    server.add_user("alice")
    server.add_index("alice/dev", bases=[])
    for version in ("1.0", "1.1"):
        upload(server, "alice/dev", wheel("gone", version))
        assert "All files are yanked" not in page(server, "/alice/dev/gone").text
        server.patch("/alice/dev/gone/%s" % version, {"yanked": True}, user="alice")
    assert "All files are yanked: installers take one only" in page(server, "/alice/dev/gone").text


def test_a_quarantined_project_has_no_downloads(site):
    upload(site, "alice/dev", wheel("sick", "1.0"))
    upload_docs(site, "alice/dev", documentation("sick", "1.0"))
    status = {"project-status": {"status": "quarantined", "reason": "steals keys"}}
    assert site.patch("/alice/dev/sick", status, user="alice").status == 200
    assert "/sick/1.0/+d/" not in page(site, "/alice/dev").source
    for path in ("/alice/dev/sick", "/alice/dev/sick/1.0"):
        found = page(site, path)
        assert "This project is quarantined: steals keys" in found.text
        assert not [link for link in found.links if "+f/" in link or "+d/" in link]


def test_the_results_of_tests_have_pages(site):
    (filename,) = re.findall(r"\+toxresults/([^/\"]+\.whl)\"", page(site, "/alice/dev/pluggy/1.5.0").source)
    table = page(site, "/alice/dev/pluggy/1.5.0/+toxresults/" + filename)
    rows = {row[1]: row for row in table.rows()}
    assert rows["py311"][:7] == ["passed", "py311", "3.11.7", "ci-1", "linux", "passed", "passed"]
    assert rows["py312"][0] == "failed" and rows["py312"][5:7] == ["not run", "failed"]
    (path, _) = [link for link in table.links if "/+toxresults/%s/" % filename in link]
    result = page(site, path)
    assert "E assert <b>0</b>" in result.text and "\x1b" not in result.source and "done" in result.text
    opened = [attributes for attributes in result.of("details") if "open" in attributes]
    assert len(opened) == 1
    assert "No test results" in page(site, "/alice/dev/click/8.1/+toxresults/click-8.1-py3-none-any.whl").text
    page(site, "/alice/dev/pluggy/1.5.0/+toxresults/none.whl", 404)


def test_a_test_result_that_nobody_can_read_says_when_it_came(site):
    upload(site, "alice/dev", wheel("blurred", "1.0"))
    (link,) = site.get("/alice/dev/blurred/1.0").result["+links"]
    reply = site.request("POST", link["href"][len(site.url):], body=b'{"testenvs": 5}', user="alice",
                         headers={"Content-Type": "application/json"})
    assert reply.status == 200
    (row,) = page(site, "/alice/dev/blurred/1.0/+toxresults/blurred-1.0-py3-none-any.whl").rows()
    assert row[:7] == ["unreadable"] + [""] * 6 and row[7].startswith(time.strftime("%Y-", time.gmtime()))
    assert "1 result" in page(site, "/alice/dev/blurred/1.0").text


def test_devpis_routes_lead_to_their_pages(site):
    for path, target in (
            ("/alice/", "/alice"), ("/alice/dev/?q=a", "/alice/dev?q=a"), ("/alice/dev/Pluggy", "/alice/dev/pluggy"),
            ("/alice/dev/pluggy/", "/alice/dev/pluggy"), ("/alice/dev/pluggy/1.5.0/", "/alice/dev/pluggy/1.5.0")):
        reply = site.get(path, headers={"Accept": BROWSER})
        assert (reply.status, reply.headers["Location"]) == (302, site.url + target)


def test_other_clients_get_what_they_got(site):
    for accept in ("application/json", "*/*", None):
        assert site.get("/alice/dev", headers={"Accept": accept}).json()["type"] == "indexconfig"
    pip = {"User-Agent": "pip/24.0", "Accept": "text/html"}
    body = site.get("/alice/dev", headers=pip).body
    assert b"pluggy" in body and b"<main" not in body


@pytest.mark.parametrize("path, sentence", [
    ("/alice/nope", "The stage alice/nope could not be found."), ("/nobody", "nobody"),
    ("/alice/dev/nope", "nope"), ("/alice/dev/pluggy/9.9", "The version 9.9 of project pluggy does not exist."),
    ("/alice/dev/pluggy/1.5.0/x/y/z", "there is nothing at")])
def test_what_is_not_there_is_said_on_a_page(site, path, sentence):
    assert sentence in page(site, path, 404).text
    assert site.get(path, headers={"Accept": "application/json"}).json()["message"]


def test_a_page_is_asked_for_again_with_its_tag_and_comes_gzipped(site):
    wanted = {"Accept": BROWSER, "Accept-Encoding": "gzip"}
    reply = site.get("/alice/dev", headers=wanted)
    assert reply.headers["Content-Encoding"] == "gzip" and len(reply.body) < 15 << 10
    again = site.get("/alice/dev", headers={**wanted, "If-None-Match": reply.headers["ETag"]})
    assert again.status == 304 and again.headers["ETag"] == reply.headers["ETag"]
    assert "Content-Security-Policy" in again.headers


def test_a_hidden_index_leaves_no_trace(site):
    site.add_user("hermit")
    site.add_index("hermit/cave", bases=[], acl_pkg_read=["hermit"], title="Lascaux")
    site.add_index("hermit/open", bases=["hermit/cave"])
    upload(site, "hermit/cave", wheel("bison", "1.0", summary="painted"), user="hermit")
    assert "bison" in page(site, "/hermit/cave", user="hermit").text
    for path in crawl(site):
        reply = site.get(path, headers={"Accept": BROWSER})
        assert b"cave" not in reply.body and b"bison" not in reply.body and b"Lascaux" not in reply.body, path
    for path in ("/hermit/cave", "/hermit/cave/bison", "/hermit/cave/bison/1.0", "/hermit/open/bison"):
        there = page(site, path, 404)
        assert "Lascaux" not in there.text and "painted" not in there.text
    not_there = page(site, "/hermit/none", 404).source.replace("hermit/none", "X")
    assert page(site, "/hermit/cave", 404).source.replace("hermit/cave", "X") == not_there


def test_hostile_texts_stay_texts(site):
    site.add_user("mallory")
    profile = {"title": EVIL, "description": EVIL, "email": EVIL}
    assert site.patch("/mallory", profile, user="mallory").status == 200
    site.add_index("mallory/dev", bases=[], title=EVIL, description=EVIL)
    metadata = dict.fromkeys((
        "summary", "author", "author_email", "license", "keywords", "home_page", "maintainer", "maintainer_email",
        "description", "platform", "download_url", "classifiers"), EVIL)
    metadata.update(project_urls="Evil, javascript:alert(1)", requires_dist="click ; extra == '%s'" % EVIL)
    upload(site, "mallory/dev", wheel("evil", "1.0"), fields=metadata, user="mallory")
    site.patch("/mallory/dev/evil/1.0", {"yanked": EVIL}, user="mallory")
    site.patch("/mallory/dev/evil", {"project-status": {"status": "deprecated", "reason": EVIL}}, user="mallory")
    (link,) = site.get("/mallory/dev/evil/1.0").result["+links"]
    result = json.loads(json.dumps(RESULT).replace("py312", "py<script>").replace("ci-1", "<script>alert(1)</script>"))
    site.request("POST", link["href"][len(site.url):], body=json.dumps(result).encode(), user="mallory",
                 headers={"Content-Type": "application/json"})
    pages = crawl(site, "/mallory/dev/evil/1.0", most=60)
    pages["search"] = page(site, "/+search?query=%22%27%3E%3Cscript%3Ealert(1)%3C/script%3E")
    for path, found in pages.items():
        if found:
            assert not [attributes for attributes in found.of("img")], path
            assert len(found.of("script")) == 1 and not found.of("b"), path
    assert "<script>alert(1)</script>" in pages["/mallory/dev/evil/1.0"].text


# -- inside archives


@pytest.fixture(scope="module")
def archives(site):
    """alice/inside holds two versions of tool, as sdist and as wheel with a licence and an odd member."""
    site.add_index("alice/inside", bases=[])
    for version in ("1.0", "1.1"):
        members = {"tool/code.py": b"def f():\n    return '<b>" + version.encode() + b"</b>'\n",
                   "tool-%s.dist-info/licenses/LICENSE" % version: b"Do as you like.\n",
                   "tool/data.bin": b"\0\1\2" * 99}
        if version == "1.0":
            members["tool/old.py"] = b"x = 1\n"
        upload(site, "alice/inside", wheel("tool", version, extra_members=members,
                                           requires_dist=["click>=%s" % version]))
    for platform in ("manylinux2014_x86_64", "macosx_11_0_arm64", "win_amd64"):
        upload(site, "alice/inside", wheel("tool", "1.1", tag="cp313-cp313-" + platform))
    upload(site, "alice/inside", sdist("tool", "1.0"), wheel("plus", "1.0+local.1"))
    return site


def test_the_members_of_an_archive_are_listed_and_shown(archives):
    home = "/alice/inside/tool/1.0/+files/tool-1.0-py3-none-any.whl"
    listing = page(archives, home)
    assert listing.headings[0] == "tool-1.0-py3-none-any.whl"
    assert "tool/code.py" in [row[0] for row in listing.rows()]
    assert "Licence files tool-1.0.dist-info/licenses/LICENSE" in listing.text
    code = page(archives, home + "/tool/code.py")
    assert "return '<b>1.0</b>'" in code.text and not code.of("b")
    assert code.of("span", id="L2") and code.of("a", href="#L2")
    assert "Binary, 297 bytes." in page(archives, home + "/tool/data.bin").text
    for path in (home + "/tool/nothing.py", home + "/tool/", home + "/..%2f..%2fpasswd", home + "?number=999"):
        page(archives, path, 404)
    assert page(archives, "/alice/inside/plus/1.0+local.1").headings[0].strip() == "plus 1.0+local.1"
    listing = page(archives, "/alice/inside/plus/1.0+local.1/+files/plus-1.0+local.1-py3-none-any.whl")
    assert "plus-1.0+local.1.dist-info/METADATA" in [row[0] for row in listing.rows()]


def test_a_diff_tells_metadata_members_and_lines(archives):
    diff = page(archives, "/alice/inside/tool/+diff/1.0...1.1")
    assert "− click>=1.0 + click>=1.1" in diff.text
    assert "Gone (1)" in diff.text and "tool/old.py" in diff.text
    assert "- return '<b>1.0</b>'" in diff.text and "+ return '<b>1.1</b>'" in diff.text
    for path in ("1.0...9", "1.0", "...", "1.0..1.1"):
        page(archives, "/alice/inside/tool/+diff/" + path, 404)


def test_wheels_are_shown_by_platform(archives):
    version = page(archives, "/alice/inside/tool/1.1?python=3.13&platform=linux")
    assert ["cp313", "cp313", "wheel"] == version.rows()[0][:3]
    assert [name for _, name in version.with_text("th", scope="col")][:4] == [
        "Python", "ABI", "manylinux_2_17_x86_64", "any"]
    assert "No wheel fits." in page(archives, "/alice/inside/tool/1.1?python=2.7").text


# -- mirrors


def test_a_mirror_shows_what_is_cached_and_reads_all_names_in_pages(make_server, upstream):
    server = make_server()
    names = ["p%03d" % number for number in range(250)]
    for name in names:
        upstream.publish(name, "1.0")
    server.add_user("owner")
    server.add_index("owner/pypi", type="mirror", mirror_url=upstream.url, title="The mirror")
    assert "Nothing is cached yet" in page(server, "/owner/pypi").text
    server.get("/owner/pypi/p007")
    server.get("/owner/pypi/+simple/")
    eventually(lambda: "Names 250" in page(server, "/owner/pypi").text)

    cached = page(server, "/owner/pypi")
    assert [row[0] for row in cached.rows()] == ["p007"]
    assert upstream.url in cached.text and "Last contact" in cached.text
    found, path = [], "/owner/pypi?show=names"
    for _ in range(3):
        shown = page(server, path)
        found += [row[0] for row in shown.rows()]
        path = next((link for link in shown.links if "after=" in link), None)
    assert found == names and path is None
    assert [row[0] for row in page(server, "/owner/pypi?q=p24").rows()] == names[240:250]
    assert "No name that is known here begins so." in page(server, "/owner/pypi?q=zz").text
    server.add_index("owner/unlisted", type="mirror", mirror_url=upstream.url, mirror_no_project_list=True)
    assert "Names upstream lists none" in page(server, "/owner/unlisted").text
    project = page(server, "/owner/pypi/p007")
    assert [row[:2] for row in project.rows()] == [["1.0", "owner/pypi"]]
    (form,) = [form for form in project.of("form") if form.get("method") == "post"]
    assert server.request("POST", form["action"], headers={"Accept": BROWSER}).status == 302


def test_a_refresh_that_fails_says_why(make_server, scripted):
    server = make_server()
    server.add_user("owner")
    scripted.page("there", entry("there-1.0-py3-none-any.whl"))
    server.add_index("owner/pypi", type="mirror", mirror_url=scripted.url)
    server.get("/owner/pypi/+simple/there/")
    scripted.answers["/simple/there/"] = lambda handler: handler.reply(b"", status=500)
    reply = server.post("/owner/pypi/there/refresh", headers={"Accept": BROWSER})
    failed = check_page(reply).text
    assert reply.status == 502 and "answered 500" in failed and "try again later" in failed
    assert [row[0] for row in page(server, "/owner/pypi/there").rows()] == ["1.0"]
    reply = server.post("/owner/pypi/+simple/there/refresh", headers={"Accept": "application/json"})
    assert reply.status == 302      # as devpi has it


def test_the_description_comes_from_the_metadata_file_and_never_from_the_wheel(make_server, scripted):
    server = make_server()
    server.add_user("owner")
    plain, lost = wheel("plain", "1.0"), wheel("lost", "1.0")
    for archive in (plain, lost):
        scripted.answers["/files/" + archive.filename] = archive.content
        scripted.page(archive.name, entry(archive.filename, hashes={"sha256": archive.sha256}, **{"core-metadata": True}))
    scripted.answers["/files/%s.metadata" % plain.filename] = plain.metadata
    server.add_index("owner/pypi", type="mirror", mirror_url=scripted.url)

    def buttons():
        return [form["action"] for form in page(server, "/owner/pypi/plain/1.0").of("form") if "action" in form]

    button = "/owner/pypi/plain/1.0/+description"
    assert button in buttons() and server.post(button, headers={"Accept": BROWSER}).status == 302
    assert button not in buttons()      # it has none
    reply = server.post("/owner/pypi/lost/1.0/+description", headers={"Accept": BROWSER})
    assert reply.status == 404 and "lost-1.0-py3-none-any.whl" in check_page(reply).text
    assert not [path for _, path, _ in scripted.requests if path.endswith(".whl")]


def test_an_unreachable_upstream_is_named_on_the_page(make_server, upstream):
    server = make_server()
    server.add_user("owner")
    upstream.publish("there", "1.0")
    server.add_index("owner/pypi", type="mirror", mirror_url=upstream.url, mirror_cache_expiry=0)
    server.get("/owner/pypi/+simple/there/")
    upstream.stop()
    server.get("/owner/pypi/+simple/other/")
    shown = page(server, "/owner/pypi")
    assert "has had no contact with its upstream since" in shown.text and "Last failure" in shown.text


def test_style_and_script_are_small(site):
    """Every page carries them."""
    front = page(site, "/")
    assert len(front.raw["style"]) <= 6 << 10 and len(front.raw["script"]) <= 1536


def test_what_a_private_name_shuts_out_is_said_where_upstream_has_it(make_server, upstream):
    server = make_server()
    upstream.publish("shared", "9.9")
    server.add_user("owner")
    server.add_index("owner/pypi", type="mirror", mirror_url=upstream.url)
    server.add_index("owner/dev", bases=["owner/pypi"])
    upload(server, "owner/dev", wheel("shared", "1.0"), wheel("own", "1.0"))
    server.get("/owner/pypi/+simple/")
    eventually(lambda: "Names 1" in page(server, "/owner/pypi").text)
    assert "Releases of owner/pypi are not shown" in page(server, "/owner/dev/shared").text
    assert "are not shown" not in page(server, "/owner/dev/own").text
