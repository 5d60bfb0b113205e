"""What monitoring and proxies ask: status, health, metrics, the permission probe, and what the server can do."""

import json
import math
import os
import re
import time

import pytest

from harness import PROGRAM, Server, eventually, path_of, wheel

FEATURES = ["projectconfig-v2", "push-no-docs", "push-only-docs", "push-register-project", "server-keyvalue-parsing"]
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OUTSIDE = "https://pypi.example.org/sub"
CLOSED = "http://127.0.0.1:9"  # nothing listens there
NUMBER = (int, float)


# Helpers


@pytest.fixture(scope="module")
def site(shared_server):
    """The open stage `ops/dev` with the wheel `thing` 1.0, and `ops/hidden` with the same, which only `ops` may read."""
    server = shared_server
    for name in ("ops", "stranger"):
        server.add_user(name)
        server.login(name)
    server.login("root")
    server.add_index("ops/dev")
    server.add_index("ops/hidden", acl_pkg_read=["ops"])
    for index in ("ops/dev", "ops/hidden"):
        assert server.upload(index, wheel("thing", "1.0")).status == 200
    return server


@pytest.fixture(scope="module")
def spare(tmp_path_factory):
    """Another server, for what would disturb the first."""
    server = Server(tmp_path_factory.mktemp("spare") / "server", "--outside-url", OUTSIDE).start()
    server.add_user("ops")
    server.login("ops")
    server.login("root")
    yield server
    if server.running:
        server.kill()


class Metrics:
    """Prometheus' text format 0.0.4, read strictly: ValueError unless each sample has a HELP and a TYPE before it.

    `types`: family -> type.  `samples`: (name, ((label, value), ...) sorted by label) -> number.
    """

    NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
    LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"'
    SUFFIXES = {"summary": ("", "_sum", "_count"), "histogram": ("_bucket", "_sum", "_count")}

    def __init__(self, text):
        self.types, self.samples = {}, {}
        helps, family = set(), None
        if not text.endswith("\n"):
            raise ValueError("the last line has no end")
        for line in text[:-1].split("\n"):
            comment = re.fullmatch(r"# (HELP|TYPE) (%s) (.+)" % self.NAME, line)
            if comment and comment.group(1) == "HELP":
                family = comment.group(2)
                if family in helps:
                    raise ValueError("two families %s, or one in pieces" % family)
                helps.add(family)
            elif comment:
                if comment.group(2) != family or family in self.types:
                    raise ValueError("a TYPE without its HELP: " + line)
                if comment.group(3) not in ("counter", "gauge", "histogram", "summary", "untyped"):
                    raise ValueError("no type: " + line)
                self.types[family] = comment.group(3)
            else:
                self._sample(line, family)
        if helps != set(self.types):
            raise ValueError("HELP without TYPE: %s" % (helps - set(self.types)))

    def _sample(self, line, family):
        sample = re.fullmatch(r"(%s)(?:\{(.*)\})? (\S+)" % self.NAME, line)
        if not sample:
            raise ValueError("no sample: %r" % line)
        name, labels, number = sample.groups()
        suffixes = self.SUFFIXES.get(self.types.get(family), ("",))
        if family not in self.types or name not in [family + suffix for suffix in suffixes]:
            raise ValueError("a sample outside its family: " + line)
        if labels is not None and not re.fullmatch("(?:%s)(?:,(?:%s))*,?" % (self.LABEL, self.LABEL), labels):
            raise ValueError("malformed labels: " + line)
        pairs = [(label, _unescaped(value)) for label, value in re.findall(self.LABEL, labels or "")]
        key = (name, tuple(sorted(pairs)))
        if len(dict(pairs)) != len(pairs) or key in self.samples:
            raise ValueError("twice: " + line)
        self.samples[key] = float(number)
        if self.types[family] == "counter" and not 0 <= self.samples[key] < math.inf:
            raise ValueError("no count: " + line)

    def all(self, name, **labels):
        """The numbers of the samples of that name that have these labels, by all their labels."""
        return {key: number for (found, key), number in self.samples.items()
                if found == name and set(labels.items()) <= set(key)}

    def total(self, name, **labels):
        return sum(self.all(name, **labels).values())


def _unescaped(value):
    return re.sub(r"\\(.)", lambda escape: "\n" if escape.group(1) == "n" else escape.group(1), value)


def metrics(server, **options):
    reply = server.get("/+metrics", **options)
    assert (reply.status, reply.headers["Content-Type"]) == (200, METRICS_TYPE)
    return Metrics(reply.body.decode("utf-8"))


# Status


def test_status_has_every_key_of_the_contract(site):
    reply = site.get("/+status")
    assert (reply.status, reply.headers["Content-Type"], reply.json()["type"]) == (200, "application/json", "status")
    result = reply.result
    fixed = {
        "serverdir": None, "server-code": None, "host": "127.0.0.1", "port": site.port, "outside-url": None,
        "uuid": reply.headers["X-DEVPI-UUID"], "serial": int(reply.headers["X-DEVPI-SERIAL"]), "role": "MASTER", "polling_replicas": {}}
    assert {key: result[key] for key in fixed} == fixed
    assert result["versioninfo"]["devpi-server"] == "6.20.3" and result["versioninfo"]["devpi-lite"]
    assert all(isinstance(version, str) for version in result["versioninfo"].values())
    assert isinstance(result["last-commit-timestamp"], float) and abs(time.time() - result["last-commit-timestamp"]) < 60
    assert type(result["event-serial"]) is int and result["event-serial"] <= result["serial"]
    for key in ("event-serial-timestamp", "event-serial-in-sync-at"):
        assert result[key] is None or isinstance(result[key], NUMBER)
    assert result["status"] in ("ok", "warn", "fatal")
    assert isinstance(result["messages"], list)
    assert not [key for key in result if key.startswith(("primary-", "master-", "replica-", "replication-"))]


def test_events_of_the_last_commit_are_done_soon(site):
    site.patch("/ops", {"title": "event"}, user="ops")
    result = eventually(lambda: (lambda found: found["event-serial"] == found["serial"] and found)(site.get("/+status").result))
    assert abs(time.time() - result["event-serial-in-sync-at"]) < 60


def test_metrics_of_the_status_are_triples(site):
    listed = site.get("/+status").result["metrics"]
    assert listed
    for name, kind, number in listed:
        assert re.fullmatch(r"[a-z_][a-z0-9_]*", name) and kind in ("counter", "gauge")
        assert isinstance(number, NUMBER) and not isinstance(number, bool)
    assert len({name for name, _, _ in listed}) == len(listed)


def test_paths_are_shown_to_root_alone(site):
    for user in (None, "ops"):
        reply = site.get("/+status", user=user)
        assert (reply.result["serverdir"], reply.result["server-code"]) == (None, None)
        for path in (str(site.directory), str(PROGRAM), str(PROGRAM.parent)):
            assert path not in reply.text
    shown = site.get("/+status", user="root").result
    assert os.path.realpath(shown["serverdir"]) == os.path.realpath(str(site.directory))
    assert os.path.realpath(shown["server-code"]) == os.path.realpath(str(PROGRAM))
    assert set(shown) == set(site.get("/+status").result)


def test_outside_url_is_shown_as_configured(spare):
    for headers in ({}, {"X-Outside-URL": "https://other.example.org"}):
        assert spare.get("/+status", headers=headers).result["outside-url"] == OUTSIDE


@pytest.mark.parametrize("accept", ["application/json", "*/*", None])
def test_status_is_json_for_all_who_do_not_ask_for_something_else(site, accept):
    reply = site.get("/+status", headers={"Accept": accept})
    assert (reply.status, reply.headers["Content-Type"]) == (200, "application/json")


# Features


@pytest.mark.parametrize("path", ["/+api", "/ops/+api", "/ops/dev/+api"])
def test_api_lists_the_features_that_switch_the_client_on(site, path):
    assert site.get(path).result["features"] == FEATURES


# Health


@pytest.mark.parametrize("path", ["/+health/live", "/+health/ready"])
def test_healthy(site, path):
    reply = site.get(path)
    assert (reply.status, reply.headers["Content-Type"], reply.json()) == (200, "application/json", {"status": "ok"})
    for accept in ("*/*", None):
        assert site.get(path, headers={"Accept": accept}).json() == {"status": "ok"}


def test_not_ready_while_the_directory_cannot_be_written(spare):
    """The directory is put aside, with a file in its place: so writing fails for root, too."""
    aside = spare.directory.with_name("aside")
    spare.directory.rename(aside)
    try:
        spare.directory.write_bytes(b"")
        reply = eventually(lambda: (lambda found: found.status != 200 and found)(spare.get("/+health/ready")))
        assert (reply.status, reply.headers["Content-Type"]) == (503, "application/json")
        assert reply.json()["message"] and str(spare.directory) not in reply.text
        assert spare.get("/+health/live").json() == {"status": "ok"}
    finally:
        spare.directory.unlink()
        aside.rename(spare.directory)
    eventually(lambda: spare.get("/+health/ready").status == 200)
    spare.add_index("ops/after")
    assert spare.upload("ops/after", wheel("after", "1.0")).status == 200


# What holds for all of these pages


@pytest.mark.parametrize("path", ["/+status", "/+api", "/+health/live", "/+health/ready", "/+metrics"])
def test_pages_for_machines_have_the_headers_of_every_answer(site, path):
    reply, head = site.get(path), site.request("HEAD", path)
    for answer in (reply, head):
        assert (answer.status, answer.headers["X-DEVPI-API-VERSION"], answer.headers["X-DEVPI-SERVER-VERSION"]) == (200, "2", "6.20.3")
        assert answer.headers["X-DEVPI-SERIAL"].isdigit() and re.fullmatch("[0-9a-f]{32}", answer.headers["X-DEVPI-UUID"])
    assert (head.body, head.headers["Content-Type"]) == (b"", reply.headers["Content-Type"])


@pytest.mark.parametrize("method, path", [
    ("POST", "/+status"), ("DELETE", "/+status"), ("POST", "/+health/live"), ("PUT", "/+health/ready"), ("POST", "/+metrics"),
    ("GET", "/+health"), ("GET", "/+health/"), ("GET", "/+health/other"), ("GET", "/+metrics/x")])
def test_other_methods_and_paths_are_404(site, method, path):
    assert site.request(method, path, user="root").status == 404


# Metrics


@pytest.mark.parametrize("text", [
    "a 1\n", "# HELP a text\na 1\n", "# HELP a text\n# TYPE a counter\na 1", "# HELP a text\n# TYPE a counter\na 1\na 1\n",
    '# HELP a text\n# TYPE a gauge\na{b="1",b="2"} 1\n', '# HELP a text\n# TYPE a gauge\na{b="\\x"} 1\n',
    '# HELP a text\n# TYPE a gauge\na{b="c"d} 1\n', "# HELP a text\n# TYPE a number\na 1\n", "# HELP a text\n# TYPE a gauge\nb 1\n",
    "# HELP a text\n# TYPE a counter\na_sum 1\n", "# HELP a text\n# TYPE a gauge\na one\n", "# HELP a text\n# TYPE a counter\na -1\n"])
def test_parser_of_these_tests_is_strict(text):
    with pytest.raises(ValueError):
        Metrics(text)


def test_metrics_parse_and_have_the_promised_names(site):
    found = metrics(site)
    expected = {
        "devpi_lite_serial": "gauge", "devpi_lite_requests_total": "counter", "devpi_lite_upstream_errors_total": "counter",
        "devpi_lite_disk_free_bytes": "gauge", "devpi_lite_outbox_waiting": "gauge", "devpi_lite_search_queue": "gauge"}
    assert {name: found.types.get(name) for name in expected} == expected
    assert all(name.startswith("devpi_lite_") for name in found.types)
    for name in ("devpi_lite_serial", "devpi_lite_disk_free_bytes", "devpi_lite_outbox_waiting", "devpi_lite_search_queue"):
        assert found.all(name)
    assert {label for key in found.all("devpi_lite_requests_total") for label, _ in key} == {"method", "code"}
    assert found.total("devpi_lite_disk_free_bytes") > 0
    for suffix in ("_sum", "_count"):
        assert found.total("devpi_lite_request_seconds" + suffix) > 0


@pytest.mark.parametrize("accept", ["*/*", None, "application/json", "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"])
def test_metrics_are_text_whatever_is_accepted(site, accept):
    assert metrics(site, headers={"Accept": accept}).total("devpi_lite_requests_total") > 0


def test_serial_is_a_metric(site):
    site.patch("/ops", {"title": "metric"}, user="ops")
    assert metrics(site).all("devpi_lite_serial") == {(): int(site.get("/+api").headers["X-DEVPI-SERIAL"])}


def test_requests_are_counted_by_method_and_code(site):
    """Those too that are answered from a cache."""
    page = "/ops/dev/+simple/thing/"
    kinds = {("HEAD", "200"): lambda: site.request("HEAD", page), ("PUT", "404"): lambda: site.put("/+nothing"),
             ("PATCH", "403"): lambda: site.patch("/ops/dev", {})}
    before = metrics(site)
    for send in kinds.values():
        for _ in range(6):
            send()
    for (method, code), _ in kinds.items():
        labels = {"method": method, "code": code}
        assert eventually(lambda: metrics(site).total("devpi_lite_requests_total", **labels)) is not None
        eventually(lambda: metrics(site).total("devpi_lite_requests_total", **labels)
                   - before.total("devpi_lite_requests_total", **labels) >= 6)
    after = metrics(site)
    assert after.total("devpi_lite_request_seconds_count") >= before.total("devpi_lite_request_seconds_count") + 18
    assert after.total("devpi_lite_request_seconds_sum") > before.total("devpi_lite_request_seconds_sum")


def test_invented_methods_do_not_make_new_series_without_end(site):
    before = metrics(site)
    for number in range(30):
        site.request("BREW%d" % number, "/+api")
        site.raw(b'B"R%d\\ / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n' % number)
    after = metrics(site)
    assert len(after.samples) <= len(before.samples) + 10
    assert not [key for _, key in after.samples if "BREW" in str(key)]


def test_errors_of_upstream_are_counted_for_indexes_that_everybody_may_read(site):
    name = "ops/mirror@2"
    site.add_index(name, type="mirror", mirror_url=CLOSED + "/simple/")
    site.add_index("ops/secretmirror", type="mirror", mirror_url=CLOSED + "/other/", acl_pkg_read=["ops"])
    for _ in range(2):
        assert site.get("/%s/+simple/thing/" % name).status == 502
        assert site.get("/ops/secretmirror/+simple/thing/", user="ops").status == 502
    eventually(lambda: metrics(site).total("devpi_lite_upstream_errors_total", index=name) >= 1)
    for user in (None, "stranger", "root", "ops"):
        assert "secretmirror" not in site.get("/+metrics", user=user).text


def test_hidden_indexes_leave_no_trace(site):
    site.add_index("ops/covert", acl_pkg_read=["ops"], webhook_url=CLOSED + "/covert-hook")
    assert site.upload("ops/covert", wheel("covert-thing", "1.0")).status == 200
    for path in ("/+status", "/+metrics", "/+health/ready"):
        for user in (None, "stranger"):
            assert "covert" not in site.get(path, user=user).text


def test_waiting_messages_are_shown_by_status_and_metrics(spare):
    """The first try fails at once; the next is ten seconds away."""
    spare.add_index("ops/waiting", webhook_url=[CLOSED + "/hook"])
    result = spare.get("/+status").result
    assert (result["outbox"], result["status"], result["messages"]) == ([], "ok", [])
    assert metrics(spare).total("devpi_lite_outbox_waiting") == 0
    assert spare.upload("ops/waiting", wheel("waiting", "1.0")).status == 200
    (entry,) = eventually(lambda: [entry for entry in spare.get("/+status", user="root").result["outbox"] if entry["last-error"]])
    assert isinstance(entry["last-error"], str)
    assert entry == {"target": CLOSED, "kind": "webhook", "waiting": 1, "dead": 0, "last-error": entry["last-error"]}
    for user in (None, "ops"):
        (shown,) = spare.get("/+status", user=user).result["outbox"]
        assert set(shown) == set(entry)
        assert not [key for key in entry if shown[key] not in (entry[key], None)]
    assert metrics(spare).total("devpi_lite_outbox_waiting") == 1


# The permission probe for reverse proxies


def probe(server, uri, method="GET", headers=None, **options):
    return server.request(method, "/+authcheck", headers=dict(headers or {}, **{"X-Original-URI": uri}), **options)


OPEN = ["/", "/ops", "/ops/", "/ops/dev", "/ops/dev/", "/ops/dev/+simple", "/ops/dev/+simple/", "/ops/dev/+simple/thing/", "/ops/dev/thing",
        "/ops/dev/thing/1.0", path_of(wheel("thing", "1.0"), "ops/dev"), path_of(wheel("thing", "1.0"), "ops/dev") + ".metadata",
        "/ops/dev/%2Bsimple/thing/", "//ops/dev/+simple/thing/", "/ops/dev/+simple/thing/?x=/ops/hidden", "/+status", "/+api", "/+login",
        "/ops/+api", "/ops/dev/+api", "/ops/hidden/+api"]
UNROUTED = ["/+nothing", "/+api/", "/+login/", "/+status/", "/ops//dev/+simple/", "/ops/dev/thing/1.0/more/and/more", "/ops/dev/+nothing/x",
            "/ops/+nothing"]
HIDDEN = ["/ops/hidden", "/ops/hidden/", "/ops/hidden/+simple", "/ops/hidden/+simple/", "/ops/hidden/+simple/thing/", "/ops/hidden/thing",
          "/ops/hidden/thing/1.0", path_of(wheel("thing", "1.0"), "ops/hidden"), path_of(wheel("thing", "1.0"), "ops/hidden") + ".metadata",
          "/ops/hidden/%2Bsimple/thing/", "/ops/h%69dden/+simple/", "/%6fps/hidden/+simple/", "//ops/hidden/+simple/",
          "/ops/hidden/+simple/?x=/ops/dev", "/ops/hidden/thing/1.0/+doc/index.html"]


@pytest.mark.parametrize("base", ["", "http://pypi.example.org", "https://pypi.example.org:8443"])
def test_authcheck_lets_pass_what_everybody_may_read(site, base):
    assert {path: (probe(site, base + path).status, probe(site, base + path).body) for path in OPEN} == {path: (200, b"") for path in OPEN}


@pytest.mark.parametrize("base", ["", "http://pypi.example.org"])
def test_authcheck_refuses_what_does_not_route(site, base):
    for user in (None, "root"):
        assert {path: probe(site, base + path, user=user).status for path in UNROUTED} == {path: 403 for path in UNROUTED}


@pytest.mark.parametrize("base", ["", "http://pypi.example.org"])
def test_authcheck_refuses_an_index_that_the_caller_may_not_read(site, base):
    expected = {None: 403, "stranger": 403, "ops": 200, "root": 200}
    for user, status in expected.items():
        assert {path: probe(site, base + path, user=user).status for path in HIDDEN} == {path: status for path in HIDDEN}


def test_authcheck_takes_basic_credentials(site):
    path = HIDDEN[4]
    assert probe(site, path, user="ops", password="pw").status == 200
    assert probe(site, path, user="stranger", password="pw").status == 403
    assert probe(site, path, user="ops", password="wrong").status == 403


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "PUSH"])
def test_authcheck_answers_whatever_the_method(site, method):
    before = site.get("/+api").headers["X-DEVPI-SERIAL"]
    allowed, refused = probe(site, "/ops/dev/+simple/", method), probe(site, "/ops/hidden/+simple/", method)
    assert (allowed.status, allowed.body, refused.status) == (200, b"", 403)
    assert site.get("/+api").headers["X-DEVPI-SERIAL"] == before


def test_authcheck_takes_off_the_path_of_the_outside_url(site):
    outside = {"X-Outside-URL": "https://pypi.example.org/sub"}
    expected = {"/sub/ops/dev/+simple/": 200, "/sub/ops/hidden/+simple/": 403, "/sub/+api": 200, "/sub/+nothing": 403}
    for base in ("", "https://pypi.example.org"):
        assert {path: probe(site, base + path, headers=outside).status for path in expected} == expected


def test_authcheck_without_a_path_to_check_is_a_bad_request(site):
    reply = site.get("/+authcheck")
    assert (reply.status, bool(reply.json()["message"])) == (400, True)


@pytest.mark.parametrize("uri", [
    "/ops/hidden/+simple/#/ops/dev", "ops/hidden/+simple/", "http://[::1/ops/hidden/+simple/", "ftp://host/ops/hidden/+simple/",
    "http:/ops/hidden/+simple/", "http:///ops/hidden/+simple/", "https://host\\/ops/hidden/+simple/", "/ops/hidden/%", "/ops/hidden/%ff/",
    "/ops/hidden/+simple/\u00ef/", "/ops/dev/../hidden/+simple/", "/ops/./hidden/+simple/", "/ops/dev/%2e%2e/hidden/+simple/",
    "/ops/%2e/hidden/+simple/", "/ops/hidden/thing/+api", "/ops/hidden/+f/abc/0123456789abc/+api", "/ops/hidden/thing/1.0/+doc/+api",
    "/ops/hidden/thing/1.0/+doc/+login", "http://host?/ops/dev@/ops/hidden/+simple/"])
def test_authcheck_does_not_open_a_hidden_index_by_an_odd_url(site, uri):
    """A proxy may have put the path right (nginx drops dots and doubled slashes) before it looks for the file."""
    assert probe(site, uri).status in (400, 403)


@pytest.mark.parametrize("uri", ["", "no-path", "http://", "http://host", "http://[::1", "/ops/dev/%", "/%ff%fe", "*", "/" * 5000])
def test_authcheck_survives_what_is_no_url(site, uri):
    assert probe(site, uri).status in (200, 400, 403)


def test_status_of_a_server_is_json_that_others_can_read(site):
    """No NaN nor Infinity, which JSON does not have."""

    def refuse(word):
        raise ValueError(word)

    json.loads(site.get("/+status").body, parse_constant=refuse)
