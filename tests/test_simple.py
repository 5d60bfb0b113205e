"""Simple pages: what installers and people get, byte for byte, and how a client chooses."""

import gzip
import hashlib
import html.parser
import json
import re
import urllib.parse

import pytest

import harness
from harness import BROWSER, HTML, SIMPLE_JSON, around, multipart, path_of, sdist, submit, wheel

HTML_V1 = "application/vnd.pypi.simple.v1+html"
LATEST_JSON = "application/vnd.pypi.simple.latest+json"
LATEST_HTML = "application/vnd.pypi.simple.latest+html"
PIP = "pip/26.3 {}"
PIP_ACCEPT = SIMPLE_JSON + ", " + HTML_V1 + "; q=0.1, text/html; q=0.01"
UV_ACCEPT = SIMPLE_JSON + ", " + HTML_V1 + ";q=0.2, text/html;q=0.01"


# Helpers


@pytest.fixture(scope="module")
def site(shared_server):
    """`sim/dev` holds foo and more, `sim/child` and `other/far` inherit from it."""
    shared_server.add_user("sim")
    shared_server.add_user("other")
    shared_server.login("sim", "pw")
    shared_server.login("other", "pw")
    shared_server.add_index("sim/dev", volatile=True)
    shared_server.add_index("sim/child", bases=["sim/dev"])
    shared_server.add_index("other/far", bases=["sim/dev"])
    shared_server.add_index("sim/empty", bases=[])
    for archive in FOO:
        assert post(shared_server, "sim/dev", archive).status == 200
    assert post(shared_server, "sim/dev", wheel("Big.Project", "1.0")).status == 200
    for number in range(40):
        assert post(shared_server, "sim/dev", sdist("Big.Project", "2.%d" % number)).status == 200
    submit(shared_server, "sim/dev", "fileless", "3.0")
    submit(shared_server, "sim/dev", "foo", "9.0")
    assert post(shared_server, "sim/child", wheel("childs", "1.0")).status == 200
    return shared_server


FOO = [
    sdist("foo", "1.0"),
    wheel("foo", "1.0", requires_python=">=3.7,<4"),
    wheel("foo", "1.10"),
    wheel("foo", "1.9"),
]


def post(server, index, archive, **changes):
    fields = dict({":action": "file_upload", "name": archive.name, "version": archive.version}, **changes)
    return server.post_form(index, fields, {"content": (archive.filename, archive.content)})


def get(server, path, accept=None, method="GET", **headers):
    return harness.get(server, path, method, accept, **headers)


class Links(html.parser.HTMLParser):
    """The anchors (attributes and text) and meta elements of a page, as a browser reads them."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.meta, self.tags, self._open = [], {}, [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "a":
            self._open = (dict(attrs), [])
        elif tag == "meta" and "name" in dict(attrs):
            self.meta[dict(attrs)["name"]] = dict(attrs)["content"]

    def handle_data(self, data):
        if self._open:
            self._open[1].append(data)

    def handle_endtag(self, tag):
        if tag == "a":
            self.anchors.append((self._open[0], "".join(self._open[1])))
            self._open = None


# The JSON form


def test_json_page_holds_exactly_the_keys_that_say_something(site):
    reply = get(site, "/sim/dev/+simple/foo/", SIMPLE_JSON)
    assert reply.status == 200
    assert reply.headers.get("Content-Type") == SIMPLE_JSON
    page = reply.json()
    assert set(page) == {"meta", "name", "versions", "files"}
    assert page["meta"] == {"api-version": "1.4"}
    assert page["name"] == "foo"
    by_name = {entry["filename"]: entry for entry in page["files"]}
    assert len(page["files"]) == len(by_name) == len(FOO)
    for archive in FOO:
        entry = by_name[archive.filename]
        upload_time = entry.pop("upload-time")
        assert re.match(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z$", upload_time)
        expected = {
            "filename": archive.filename,
            "url": "../../+f/%s/%s/%s" % (archive.sha256[:3], archive.sha256[3:16], archive.filename),
            "hashes": {"sha256": archive.sha256},
            "size": len(archive.content),
        }
        if archive.filename.endswith(".whl"):
            expected["core-metadata"] = {"sha256": hashlib.sha256(archive.metadata).hexdigest()}
        if archive is FOO[1]:
            expected["requires-python"] = ">=3.7,<4"
        assert entry == expected


def test_versions_name_every_release_once_also_those_without_files(site):
    page = get(site, "/sim/dev/+simple/foo/", SIMPLE_JSON).json()
    assert sorted(page["versions"]) == ["1.0", "1.10", "1.9", "9.0"]
    assert get(site, "/sim/dev/+simple/fileless/", SIMPLE_JSON).json()["versions"] == ["3.0"]


def test_versions_of_all_indexes_are_united(site):
    site.add_index("sim/united", bases=["sim/dev"])
    submit(site, "sim/united", "foo", "7.0")
    page = get(site, "/sim/united/+simple/foo/", SIMPLE_JSON).json()
    assert sorted(page["versions"]) == ["1.0", "1.10", "1.9", "7.0", "9.0"]


def test_upload_time_and_size_survive_a_second_look(site):
    first = get(site, "/sim/dev/+simple/foo/", SIMPLE_JSON).body
    assert get(site, "/sim/dev/+simple/foo/", SIMPLE_JSON).body == first


def test_json_project_list_holds_names_only(site):
    reply = get(site, "/sim/dev/+simple/", SIMPLE_JSON)
    assert reply.headers.get("Content-Type") == SIMPLE_JSON
    page = reply.json()
    assert set(page) == {"meta", "projects"} and page["meta"] == {"api-version": "1.4"}
    assert sorted(project["name"] for project in page["projects"]) == ["big-project", "fileless", "foo"]
    assert all(set(project) == {"name"} for project in page["projects"])


def test_project_list_names_inherited_projects_once(site):
    names = [project["name"] for project in get(site, "/sim/child/+simple/", SIMPLE_JSON).json()["projects"]]
    assert sorted(names) == ["big-project", "childs", "fileless", "foo"]


def test_project_list_of_an_empty_index_is_empty(site):
    assert get(site, "/sim/empty/+simple/", SIMPLE_JSON).json()["projects"] == []


# The HTML form


def test_html_page_has_title_heading_version_and_one_line_a_file(site):
    text = get(site, "/sim/dev/+simple/foo/", HTML).text
    assert text.startswith('<!DOCTYPE html><html lang="en"><head>')
    assert "<title>sim/dev: links for foo</title>" in text
    assert "<h1>sim/dev: links for foo</h1>" in text
    assert '<meta name="pypi:repository-version" content="1.4">' in text
    assert text.rstrip().endswith("</body></html>")
    lines = [line for line in text.split("\n") if "<a " in line]
    assert len(lines) == len(FOO)
    for line in lines:
        assert re.match(r'^sim/dev <a href="\.\./\.\./\+f/[^"<>]+"( [a-z-]+="[^"<>]*")*>[^<>]+</a><br>$', line)


def test_html_attributes_of_a_file(site):
    anchors = {text: attributes for attributes, text in Links(get(site, "/sim/dev/+simple/foo/", HTML).text).anchors}
    assert set(anchors) == {archive.filename for archive in FOO}
    for archive in FOO:
        href = "../../+f/%s/%s/%s#sha256=%s" % (
            archive.sha256[:3], archive.sha256[3:16], archive.filename, archive.sha256)
        expected = {"href": href}
        if archive.filename.endswith(".whl"):
            expected["data-core-metadata"] = "sha256=" + hashlib.sha256(archive.metadata).hexdigest()
        if archive is FOO[1]:
            expected["data-requires-python"] = ">=3.7,<4"
        assert anchors[archive.filename] == expected


def test_special_characters_are_escaped_in_html_attributes(site):
    assert 'data-requires-python="&gt;=3.7,&lt;4"' in get(site, "/sim/dev/+simple/foo/", HTML).text


def test_people_see_the_newest_version_first(site):
    names = [text for _, text in Links(get(site, "/sim/dev/+simple/foo/", HTML).text).anchors]
    assert names[:2] == [FOO[2].filename, FOO[3].filename]
    assert sorted(names[2:]) == sorted([FOO[0].filename, FOO[1].filename])


def test_installers_see_the_files_of_an_index_before_those_of_its_bases(site):
    site.add_index("sim/above", bases=["sim/dev"])
    own = [wheel("foo", "0.1"), wheel("foo", "1.10", size=10)]
    for archive in own:
        assert post(site, "sim/above", archive).status == 200
    entries = get(site, "/sim/above/+simple/foo/", SIMPLE_JSON).json()["files"]
    names = [entry["filename"] for entry in entries]
    assert sorted(names[:2]) == sorted(archive.filename for archive in own)
    assert sorted(names[2:]) == sorted(FOO[number].filename for number in (0, 1, 3))
    shown = {entry["filename"]: entry["hashes"]["sha256"] for entry in entries}
    assert shown[own[1].filename] == own[1].sha256  # the first index wins


def test_html_project_list_for_installers(site):
    text = get(site, "/sim/dev/+simple/", HTML, User_Agent=PIP).text
    assert text.startswith('<!DOCTYPE html><html lang="en">')
    for name in ("big-project", "fileless", "foo"):
        assert '<a href="%s/">%s</a>\n' % (name, name) in text
    assert len(Links(text).anchors) == 3
    assert text.rstrip().endswith("</body></html>")
    assert "h2" not in Links(text).tags


def test_html_project_list_for_people_is_grouped_by_index(site):
    text = get(site, "/sim/child/+simple/", HTML).text
    assert "<title>sim/child: simple list (including inherited indices)</title>" in text
    first, second = text.index("<h2>sim/child (bases: sim/dev)</h2>"), text.index("<h2>sim/dev")
    assert first < text.index('<a href="childs/">childs</a><br>') < second
    assert second < text.index('<a href="big-project/">big-project</a><br>') < text.index('<a href="foo/">foo</a><br>')


HOSTILE = "\"><script>alert('x')</script>&amp;\u2028\x01"


def test_hostile_text_from_metadata_stays_text(site):
    plain = wheel("escaped", "1.0")
    evil = wheel("escaped", "1.0", metadata=plain.metadata.replace(
        b"\nName:", b"\nRequires-Python: >=3.7\"><script>alert('x')</script>&amp;\nName:", 1))
    assert post(site, "sim/dev", evil).status == 200
    text = get(site, "/sim/dev/+simple/escaped/", HTML).text
    assert "<script" not in text and "&amp;amp;" in text
    [(attributes, _)] = Links(text).anchors
    assert attributes["data-requires-python"] == ">=3.7\"><script>alert('x')</script>&amp;"
    [entry] = get(site, "/sim/dev/+simple/escaped/", SIMPLE_JSON).json()["files"]
    assert entry["requires-python"] == attributes["data-requires-python"]
    assert site.delete("/sim/dev/escaped", user="sim").status == 200


def test_hostile_text_from_the_form_stays_text(site):
    body, content_type = multipart(
        {":action": "file_upload", "name": "escapedform", "version": "1.0", "requires_python": HOSTILE},
        {"content": ("escapedform-1.0.exe", b"no archive that says more")})
    reply = site.request("POST", "/sim/dev/", body=body, headers={"Content-Type": content_type}, user="sim")
    assert reply.status == 200
    text = get(site, "/sim/dev/+simple/escapedform/", HTML).text
    assert "<script" not in text
    assert len(Links(text).anchors) == 1
    json.loads(get(site, "/sim/dev/+simple/escapedform/", SIMPLE_JSON).body.decode("utf-8"))
    assert site.delete("/sim/dev/escapedform", user="sim").status == 200


@pytest.mark.parametrize("filename", ["amp-1.0&lt;.tar.gz", "amp-1.0&copy.tar.gz", "amp-1.0+a b.tar.gz", "amp-1.0'x'.zip",
                                      "amp-1.0;x=1.tar.gz"])
def test_unusual_file_names_are_linked_so_that_they_can_be_fetched(site, filename):
    content = around(filename, b"amp", "amp", "1.0")
    body, content_type = multipart(
        {":action": "file_upload", "name": "amp", "version": "1.0"}, {"content": (filename, content)})
    reply = site.request("POST", "/sim/dev/", body=body, headers={"Content-Type": content_type}, user="sim")
    assert reply.status == 200
    [(attributes, text)] = Links(get(site, "/sim/dev/+simple/amp/", HTML).text).anchors
    assert text == filename
    path = urllib.parse.urljoin("/sim/dev/+simple/amp/", attributes["href"].split("#")[0])
    assert get(site, path, "*/*").body == content
    assert site.delete("/sim/dev/amp", user="sim").status == 200


# Who gets which form


NEGOTIATION = [
    (None, HTML),
    ("", HTML),
    ("*/*", HTML),
    ("text/html", HTML),
    ("text/*", HTML),
    (SIMPLE_JSON, SIMPLE_JSON),
    (HTML_V1, HTML_V1),
    (LATEST_JSON, SIMPLE_JSON),
    (LATEST_HTML, HTML_V1),
    (PIP_ACCEPT, SIMPLE_JSON),
    (UV_ACCEPT, SIMPLE_JSON),
    (BROWSER, HTML),
    (SIMPLE_JSON + ", text/html", HTML),
    (SIMPLE_JSON + ";q=0.5, text/html", HTML),
    (SIMPLE_JSON + ", text/html;q=0.9", SIMPLE_JSON),
    (SIMPLE_JSON + ";q=0.8, " + HTML_V1 + ";q=0.9", HTML_V1),
    (SIMPLE_JSON + ";q=0, */*", HTML),
    ("text/html;q=0, " + SIMPLE_JSON + ";q=0.1", SIMPLE_JSON),
    (SIMPLE_JSON + ";q=abc, text/html;q=0.1", HTML),
    (SIMPLE_JSON + ";q=0.001", SIMPLE_JSON),
    (SIMPLE_JSON.upper(), SIMPLE_JSON),
    (",, , " + SIMPLE_JSON, SIMPLE_JSON),
    ("*/*;q=0.1, " + SIMPLE_JSON + ";q=0.2", SIMPLE_JSON),
    (SIMPLE_JSON + " ; q=0.9 ,text/html ; q=0.95", HTML),
    ("application/json", HTML),
    ("application/xml", HTML),
    ("application/vnd.pypi.simple.v2+json", HTML),
    ("text/html;q=0", HTML),
    ("garbage", HTML),
    (";;;q=,=", HTML),
]
NEGOTIATED_PATHS = ["/sim/dev/+simple/foo/", "/sim/dev/+simple/"]


@pytest.mark.parametrize("path", NEGOTIATED_PATHS)
@pytest.mark.parametrize("accept, expected", NEGOTIATION)
def test_accept_decides_the_form(site, path, accept, expected):
    reply = get(site, path, accept)
    assert reply.status == 200
    content_type = reply.headers.get("Content-Type")
    if expected == HTML:
        assert content_type == "text/html; charset=UTF-8"
    elif expected == SIMPLE_JSON:
        assert content_type == SIMPLE_JSON
    else:
        assert content_type.split(";")[0] == expected
    assert reply.body.startswith(b"{" if expected == SIMPLE_JSON else b"<!DOCTYPE html>")
    by_program = set() if expected == SIMPLE_JSON else {"User-Agent"}
    assert set(reply.headers.get("Vary").split(", ")) == {"Accept", "Accept-Encoding"} | by_program


@pytest.mark.parametrize("path", NEGOTIATED_PATHS)
@pytest.mark.parametrize("query, expected", [
    ("format=" + SIMPLE_JSON.replace("+", "%2B"), SIMPLE_JSON),
    ("format=" + SIMPLE_JSON, SIMPLE_JSON),
    ("format=" + HTML_V1.replace("+", "%2B"), HTML_V1),
    ("format=text/html", HTML),
    ("format=text%2Fhtml", HTML),
    ("format=" + LATEST_JSON.replace("+", "%2B"), SIMPLE_JSON),
])
@pytest.mark.parametrize("accept", [SIMPLE_JSON, HTML, None])
def test_format_in_the_query_wins_over_accept(site, path, query, expected, accept):
    reply = get(site, path + "?" + query, accept)
    assert reply.status == 200
    assert reply.headers.get("Content-Type").split(";")[0] == expected


INSTALLERS = ["pip/26.3", "uv/0.13.9", "setuptools/60", "distribute/0.6", "pex/2.1", "foo/1 pip/23.0", "a b c uv/1 x"]
NOT_INSTALLERS = ["curl/8", "pipx", "mypip/1", "Mozilla/5.0 (pip/1)", "pip 26", ""]


@pytest.mark.parametrize("agent", INSTALLERS)
@pytest.mark.parametrize("path", ["/sim/dev", "/sim/dev/"])
def test_installers_get_the_project_list_at_the_bare_index(site, agent, path):
    reply = get(site, path, PIP_ACCEPT, User_Agent=agent)
    assert reply.status == 200
    assert reply.headers.get("Content-Type") == SIMPLE_JSON
    assert {"name": "foo"} in reply.json()["projects"]
    assert '<a href="foo/">foo</a>' in get(site, path, HTML, User_Agent=agent).text


@pytest.mark.parametrize("agent", INSTALLERS)
def test_installers_get_the_links_at_the_bare_project(site, agent):
    for path in ("/sim/dev/foo", "/sim/dev/foo/"):
        assert len(get(site, path, PIP_ACCEPT, User_Agent=agent).json()["files"]) == len(FOO)
        for accept in (HTML, None):
            reply = get(site, path, accept, User_Agent=agent)
            assert len(Links(reply.text).anchors) == len(FOO)


@pytest.mark.parametrize("agent", NOT_INSTALLERS)
def test_others_get_the_configuration_there(site, agent):
    headers = {"Accept": "application/json", "User-Agent": agent}
    assert site.get("/sim/dev", headers=headers).json()["type"] == "indexconfig"
    assert site.get("/sim/dev/foo", headers=headers).json()["type"] == "projectconfig"


def test_a_client_that_prefers_simple_json_gets_it_at_the_bare_index(site):
    for path in ("/sim/dev", "/sim/dev/"):
        assert {"name": "big-project"} in get(site, path, SIMPLE_JSON).json()["projects"]


def test_installer_asking_for_a_version_gets_the_version_data(site):
    reply = site.get("/sim/dev/foo/1.0", headers={"Accept": "application/json", "User-Agent": PIP})
    assert reply.json()["type"] == "versiondata"


# Redirects


@pytest.mark.parametrize("path, target", [
    ("/sim/dev/+simple", "/sim/dev/+simple/"), ("/sim/dev/+simple/foo", "/sim/dev/+simple/foo/"),
    ("/sim/dev/%2Bsimple/foo", "/sim/dev/+simple/foo/")])
@pytest.mark.parametrize("accept", [HTML, "*/*", None])
def test_a_missing_slash_redirects_people(site, path, target, accept):
    reply = get(site, path, accept)
    assert (reply.status, reply.headers.get("Location")) == (302, site.url + target)
    assert "User-Agent" in reply.headers.get("Vary")


@pytest.mark.parametrize("headers", [
    {"Accept": HTML, "User-Agent": PIP}, {"Accept": PIP_ACCEPT, "User-Agent": "uv/0.13"}, {"Accept": SIMPLE_JSON}])
def test_a_missing_slash_is_no_redirect_for_installers_and_json_clients(site, headers):
    for path in ("/sim/dev/+simple", "/sim/dev/+simple/foo"):
        assert site.get(path, headers=headers).status == 200


@pytest.mark.parametrize("spelling", ["Foo", "FOO", "foo_", "F.o--o", "f%20oo", "Foo%0D%0AX-Evil:%201", "Foo%22%3E"])
@pytest.mark.parametrize("headers", [{"Accept": HTML}, {"Accept": SIMPLE_JSON, "User-Agent": PIP}])
def test_another_spelling_of_a_name_redirects_everybody_even_if_unknown(site, spelling, headers):
    normal = re.sub(r"[^A-Za-z0-9]+", "-", urllib.parse.unquote(spelling)).lower()
    reply = site.get("/sim/dev/+simple/%s/?x=1" % spelling, headers=headers)
    assert (reply.status, reply.headers.get("Location")) == (302, "%s/sim/dev/+simple/%s/" % (site.url, normal))
    assert reply.headers.get("X-Evil") is None


@pytest.mark.parametrize("path, target", [
    ("/sim/dev/Big.Project", "/sim/dev/big-project"), ("/sim/dev/Big.Project/1.0", "/sim/dev/big-project/1.0"),
    ("/sim/dev/+simple/Big.Project", "/sim/dev/+simple/big-project")])
def test_another_spelling_redirects_on_every_project_route(site, path, target):
    reply = site.get(path, headers={"Accept": "application/json"})
    assert reply.status == 302
    assert reply.headers.get("Location").rstrip("/") == site.url + target


def test_names_that_are_not_ascii_are_refused(site):
    reply = get(site, "/sim/dev/+simple/%C3%BC/", SIMPLE_JSON)
    assert reply.status == 400
    assert "unicode project names not allowed" in reply.text


@pytest.mark.parametrize("path", ["//sim/dev/+simple/foo/", "/sim/dev/%2Bsimple/foo/", "/sim/dev/%2bsimple/foo/"])
def test_percent_encoded_and_doubled_leading_parts_are_the_same_page(site, path):
    reply = get(site, path, SIMPLE_JSON)
    assert (reply.status, reply.json()["name"]) == (200, "foo")


@pytest.mark.parametrize("path", ["/sim//dev/+simple/foo/", "/sim/dev/+simple//foo/", "/sim/dev/+simple/foo/x/"])
def test_paths_between_the_routes_are_not_found(site, path):
    assert get(site, path, SIMPLE_JSON).status == 404


# Where links point


STYLES = [
    ("+simple/foo/", "../../"),
    ("+simple/foo", "../"),
    ("foo/", "../"),
    ("foo", ""),
]


@pytest.mark.parametrize("style, prefix", STYLES)
@pytest.mark.parametrize("form", [SIMPLE_JSON, HTML])
@pytest.mark.parametrize("index, base_prefix", [("sim/dev", ""), ("sim/child", "../dev/"), ("other/far", "../../sim/dev/")])
def test_links_are_relative_to_the_request_in_every_path_style(site, style, prefix, form, index, base_prefix):
    archive = FOO[0]
    reply = get(site, "/%s/%s" % (index, style), form, User_Agent=PIP)
    if form == SIMPLE_JSON:
        url = [entry["url"] for entry in reply.json()["files"] if entry["filename"] == archive.filename][0]
    else:
        url = [attributes["href"] for attributes, text in Links(reply.text).anchors if text == archive.filename][0]
        url = url.split("#")[0]
    assert url == "%s%s+f/%s/%s/%s" % (
        prefix, base_prefix, archive.sha256[:3], archive.sha256[3:16], archive.filename)
    assert urllib.parse.urljoin("/%s/%s" % (index, style), url) == path_of(archive, "sim/dev")


def test_a_header_asks_for_absolute_links(site):
    page = get(site, "/sim/child/+simple/foo/", SIMPLE_JSON, X_Devpi_Absolute_Urls="").json()
    assert page["files"][0]["url"] == site.url + path_of(FOO[0], "sim/dev")
    text = get(site, "/sim/child/+simple/foo/", HTML, X_Devpi_Absolute_Urls="1").text
    assert 'href="%s/sim/dev/+f/' % site.url in text


def test_absolute_links_follow_the_outside_url_of_a_proxy_on_this_machine(site):
    reply = get(site, "/sim/dev/+simple/foo/", SIMPLE_JSON, X_Devpi_Absolute_Urls="1", X_Outside_URL="https://pypi.org/sub")
    assert reply.json()["files"][0]["url"] == "https://pypi.org/sub" + path_of(FOO[0], "sim/dev")
    reply = get(site, "/sim/dev/+simple/foo", HTML, X_Outside_URL="https://pypi.org/sub")
    assert reply.headers.get("Location") == "https://pypi.org/sub/sim/dev/+simple/foo/"


def test_option_makes_all_links_absolute_with_the_outside_url(make_server):
    server = make_server("--absolute-urls", "--outside-url", "https://pypi.org/sub")
    server.add_user("sim")
    server.login("sim", "pw")
    server.add_index("sim/dev")
    assert post(server, "sim/dev", FOO[0]).status == 200
    for path in ("/sim/dev/+simple/foo/", "/sub/sim/dev/+simple/foo/"):
        [entry] = get(server, path, SIMPLE_JSON).json()["files"]
        assert entry["url"] == "https://pypi.org/sub" + path_of(FOO[0], "sim/dev")
    assert get(server, "/sub" + path_of(FOO[0], "sim/dev"), "*/*").body == FOO[0].content


def test_two_clients_with_different_hosts_do_not_share_absolute_links(site):
    for host in ("one.localhost", "two.localhost", "one.localhost:80", "two.localhost:81"):
        url = get(site, "/sim/dev/+simple/foo/", SIMPLE_JSON, X_Devpi_Absolute_Urls="1", Host=host).json()["files"][0]["url"]
        assert url.startswith("http://%s/sim/dev/+f/" % (host[:-3] if host.endswith(":80") else host))


@pytest.mark.parametrize("host", ['x"><script>', "x y", "x\ty", "a/b"])
def test_a_hostile_host_never_reaches_a_page(site, host):
    reply = get(site, "/sim/dev/+simple/foo/", HTML, X_Devpi_Absolute_Urls="1", Host=host)
    assert reply.status in (200, 400)
    assert "<script" not in reply.text
    if reply.status == 200:
        assert len(Links(reply.text).anchors) == len(FOO)


# Nothing there


@pytest.mark.parametrize("form", [SIMPLE_JSON, HTML, None])
def test_an_unknown_project_is_not_found_and_a_known_one_without_files_is_empty(site, form):
    assert get(site, "/sim/dev/+simple/unknown/", form).status == 404
    assert get(site, "/sim/child/+simple/unknown/", form, User_Agent=PIP).status == 404
    for index in ("sim/dev", "sim/child"):
        reply = get(site, "/%s/+simple/fileless/" % index, form)
        assert reply.status == 200
        assert not (reply.json()["files"] if form == SIMPLE_JSON else Links(reply.text).anchors)


def test_the_refusal_names_the_project(site):
    reply = site.get("/sim/dev/+simple/unknown/", headers={"Accept": "application/json"})
    assert (reply.status, reply.json()["message"]) == (404, "The project unknown does not exist.")


@pytest.mark.parametrize("path", ["/sim/none/+simple/", "/sim/none/+simple/foo/", "/nobody/none/+simple/foo/"])
def test_an_unknown_index_is_not_found(site, path):
    assert get(site, path, SIMPLE_JSON, User_Agent=PIP).status == 404


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "POST", "PUSH"])
def test_other_methods_on_simple_pages_are_not_found(site, method):
    assert site.request(method, "/sim/dev/+simple/foo/", body=b"{}", user="sim").status == 404
    assert get(site, "/sim/dev/+simple/foo/", SIMPLE_JSON).status == 200


# Caching and compression


def test_head_is_get_without_a_body(site):
    for path in NEGOTIATED_PATHS:
        for accept in (SIMPLE_JSON, HTML):
            full, bare = get(site, path, accept), get(site, path, accept, method="HEAD")
            assert (bare.status, bare.body) == (200, b"")
            for name in ("Content-Type", "Content-Length", "ETag", "Vary", "Cache-Control"):
                assert bare.headers.get(name) == full.headers.get(name)


def test_a_stage_page_is_revalidated_always(site):
    for path in ("/sim/dev/+simple/foo/", "/sim/child/+simple/foo/"):
        assert get(site, path, SIMPLE_JSON).headers.get("Cache-Control") == "no-cache"


def test_a_page_over_a_kilobyte_is_compressed_for_those_who_ask(site):
    path = "/sim/dev/+simple/big-project/"
    for accept in (SIMPLE_JSON, HTML):
        plain = get(site, path, accept)
        packed = get(site, path, accept, Accept_Encoding="gzip, deflate")
        assert plain.headers.get("Content-Encoding") is None
        assert packed.headers.get("Content-Encoding") == "gzip"
        assert gzip.decompress(packed.body) == plain.body
        assert len(packed.body) < len(plain.body)
        assert "Accept-Encoding" in packed.headers.get("Vary") and "Accept-Encoding" in plain.headers.get("Vary")


@pytest.mark.parametrize("encoding, packed", [
    ("gzip, deflate, zstd", True), ("GZIP", True), ("gzip;q=0.5", True), ("identity", False), ("deflate", False),
    ("gzip;q=0", False), ("*", None), ("br", False), ("", False)])
def test_accept_encoding_is_obeyed(site, encoding, packed):
    reply = get(site, "/sim/dev/+simple/big-project/", SIMPLE_JSON, Accept_Encoding=encoding)
    used = reply.headers.get("Content-Encoding")
    assert used in (("gzip", None) if packed is None else ("gzip",) if packed else (None,))
    body = gzip.decompress(reply.body) if used else reply.body
    assert len(json.loads(body.decode())["files"]) == 41


def test_every_representation_has_an_etag_of_its_own(site):
    path = "/sim/dev/+simple/big-project/"
    tags = [
        get(site, path, accept, **headers).headers.get("ETag")
        for accept in (SIMPLE_JSON, HTML, HTML_V1) for headers in ({}, {"Accept_Encoding": "gzip"})]
    tags.append(get(site, path, SIMPLE_JSON, X_Devpi_Absolute_Urls="1").headers.get("ETag"))
    tags.append(get(site, path, HTML, User_Agent=PIP).headers.get("ETag"))
    assert all(re.match(r'^(W/)?"[!#-~]+"$', tag) for tag in tags)
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize("headers", [{}, {"Accept_Encoding": "gzip"}])
@pytest.mark.parametrize("accept", [SIMPLE_JSON, HTML])
@pytest.mark.parametrize("path", ["/sim/dev/+simple/big-project/", "/sim/child/+simple/foo/", "/sim/dev/+simple/"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_an_unchanged_page_is_answered_304_with_exactly_these_headers(site, path, accept, headers, method):
    full = get(site, path, accept, **headers)
    tag = full.headers.get("ETag")
    reply = get(site, path, accept, method, If_None_Match=tag, **headers)
    assert (reply.status, reply.body) == (304, b"")
    names = {name.lower() for name in reply.headers.keys()}
    assert {name for name in names if not name.startswith("x-devpi-")} - {"connection"} == {
        "etag", "cache-control", "vary", "date"}
    assert "x-devpi-api-version" in names and "x-devpi-serial" in names
    for name in ("ETag", "Cache-Control", "Vary"):
        assert reply.headers.get(name) == full.headers.get(name)


@pytest.mark.parametrize("template, status", [
    ('"other", {tag}', 304), ("W/{tag}", 304), ("*", 304), ('"other"', 200), ("garbage", 200), ("", 200)])
def test_if_none_match_forms(site, template, status):
    path = "/sim/dev/+simple/foo/"
    tag = get(site, path, SIMPLE_JSON).headers.get("ETag").replace("W/", "")
    assert get(site, path, SIMPLE_JSON, If_None_Match=template.format(tag=tag)).status == status


def test_the_tag_of_one_form_does_not_match_another(site):
    path = "/sim/dev/+simple/big-project/"
    tag = get(site, path, SIMPLE_JSON).headers.get("ETag")
    assert get(site, path, HTML, If_None_Match=tag).status == 200
    assert get(site, path, SIMPLE_JSON, If_None_Match=tag, Accept_Encoding="gzip").status == 200


def test_a_page_changes_its_tag_with_its_project_only(site):
    submit(site, "sim/dev", "tagged", "1.0")
    path = "/sim/child/+simple/tagged/"
    first = get(site, path, SIMPLE_JSON)
    submit(site, "sim/dev", "neighbour", "1.0")
    site.patch("/sim/dev", {"title": "changed"}, user="sim")
    again = get(site, path, SIMPLE_JSON)
    assert (again.body, again.headers.get("ETag")) == (first.body, first.headers.get("ETag"))
    assert post(site, "sim/dev", wheel("tagged", "1.0")).status == 200
    changed = get(site, path, SIMPLE_JSON, If_None_Match=first.headers.get("ETag"))
    assert changed.status == 200
    assert len(changed.json()["files"]) == 1
    for name in ("tagged", "neighbour"):
        site.delete("/sim/dev/" + name, user="sim")


def test_a_page_follows_every_change_at_once(site):
    site.add_index("sim/moving", volatile=True, bases=[])
    path = "/sim/moving/+simple/moved/"
    assert get(site, path, SIMPLE_JSON).status == 404
    post(site, "sim/moving", wheel("moved", "1.0"))
    assert len(get(site, path, SIMPLE_JSON).json()["files"]) == 1
    post(site, "sim/moving", wheel("moved", "2.0"))
    assert len(get(site, path, SIMPLE_JSON).json()["files"]) == 2
    site.patch("/sim/moving", {"bases": ["sim/dev"]}, user="sim")
    assert get(site, "/sim/moving/+simple/foo/", SIMPLE_JSON).status == 200
    site.delete("/sim/moving/moved/1.0", user="sim")
    assert [entry["filename"] for entry in get(site, path, SIMPLE_JSON).json()["files"]] == [wheel("moved", "2.0").filename]
    site.delete("/sim/moving/moved", user="sim")
    assert get(site, path, SIMPLE_JSON).status == 404
    site.delete("/sim/moving", user="sim")
    assert get(site, path, SIMPLE_JSON).status == 404
    assert get(site, "/sim/moving/+simple/foo/", SIMPLE_JSON).status == 404
