"""A primary and a replica on hosts of their own, with a line between them that is cut; on disks that are full; with clocks
that differ; of programs of other versions; with a damaged log; and many replicas that read slowly."""

import contextlib
import ctypes
import os
import socket
import sqlite3
import statistics
import subprocess
import sys
import threading
import time

import pytest
from harness import Server, eventually, patched, path_of, run_command, wheel
from replicas import ANY, SOON, comes_to_be, head, primary_at, same, signed, status, unsound, upload_demo


class Site:
    """A primary with an index of ann's, and a replica."""

    def __init__(self, folder, primary, replica):
        self.folder, self.primary, self.replica = folder, primary, replica

    def begin(self):
        self.primary.start()
        self.primary.login("root")
        self.primary.add_user("ann")
        self.primary.add_index("ann/dev")
        self.replica.passwords.update(self.primary.passwords)
        return self

    def upload(self, version, server=None, size=0):
        return upload_demo(server or self.primary, version, size)

    def end(self):
        for server in (self.replica, self.primary):
            if server.running:
                server.kill()


def site_of(folder, primary_code="", replica_code="", primary_options=(), **places):
    """A `Site` whose programs are patched so, and whose directories are in folders of their own."""
    scripts = {}
    for name, code in (("primary", primary_code), ("replica", replica_code)):
        (folder / name).mkdir()
        scripts[name] = patched(folder / name, SOON + code)
    primary = primary_at(places.get("primary", folder) / "p", *primary_options, script=scripts["primary"])
    site = Site(folder, primary, None)
    site.replica = Server(places.get("replica", folder) / "r", "--proxy-timeout", "3", "--request-timeout", "1",
                          root_password=None, script=scripts["replica"])
    return site


def follow(site, *options):
    """Start the replica."""
    site.replica.start("--primary-url", site.primary.url, "--secretfile", str(site.primary.directory / ".secret"), *options)


@pytest.fixture
def make_site(tmp_path):
    made = []

    def make(**keywords):
        made.append(site_of(tmp_path, **keywords).begin())
        return made[-1]
    yield make
    for site in made:
        site.end()


# -- hosts of their own


def _run(*words):
    return subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


class Host:
    """A network namespace: a host with its own interfaces and routes."""

    def __init__(self, name):
        self.name = name
        self.run("ip", "link", "set", "lo", "up")

    def run(self, *words):
        done = _run("ip", "netns", "exec", self.name, *words)
        assert done.returncode == 0, done.stdout

    @contextlib.contextmanager
    def inside(self):
        """This thread is on that host."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/thread-self/ns/net") as here, open("/var/run/netns/" + self.name) as there:
            assert libc.setns(there.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert libc.setns(here.fileno(), 0) == 0


class OnHost(Server):
    """A server on a `Host`, asked from there."""
    host = None

    def _exchange(self, *arguments):
        with self.host.inside():
            return super()._exchange(*arguments)


ENTERS = """
import ctypes, os
there = os.open("/var/run/netns/%s", os.O_RDONLY)
assert ctypes.CDLL(None).setns(there, 0) == 0
os.close(there)
"""


@pytest.fixture
def hosts(tmp_path):
    """A `Site` on two hosts, 10.213.7.1 and .2, joined by a line."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("hosts of their own are network namespaces of Linux, which take root to make")
    names = ["dl%d%s" % (os.getpid() % 100000, letter) for letter in "ab"]
    try:
        made = [_run("ip", "netns", "add", name) for name in names]
    except FileNotFoundError:
        pytest.skip("there is no `ip` to make hosts with")
    if any(done.returncode for done in made):
        for name in names:
            _run("ip", "netns", "del", name)
        pytest.skip("network namespaces can't be made here: %s" % made[0].stdout.decode())
    site = None
    try:
        one, other = map(Host, names)
        done = _run("ip", "link", "add", "dev0", "netns", names[0], "type", "veth", "peer", "name", "dev0", "netns", names[1])
        if done.returncode:
            pytest.skip("there are no lines between network namespaces here: %s" % done.stdout.decode())
        for number, host in enumerate((one, other), 1):
            host.run("ip", "address", "add", "10.213.7.%d/24" % number, "dev", "dev0")
            host.run("ip", "link", "set", "dev0", "up")
        site = site_of(tmp_path, ENTERS % names[0], ENTERS % names[1])
        for server, host in ((site.primary, one), (site.replica, other)):
            server.__class__, server.host = OnHost, host
            server.options += ("--host", "0.0.0.0")
        site.begin()
        site.replica.start("--primary-url", "http://10.213.7.1:%d" % site.primary.port,
                           "--secretfile", str(site.primary.directory / ".secret"))
        yield site
    finally:
        if site:
            site.end()
        for name in names:
            _run("ip", "netns", "del", name)


CUTS = {
    "both": (("ip", "link", "set", "dev0", "down"), ("ip", "link", "set", "dev0", "up")),
    # what the primary sends is lost on the way
    "to the replica": (("ip", "route", "add", "blackhole", "10.213.7.2"), ("ip", "route", "del", "blackhole", "10.213.7.2")),
    # what the replica sends is
    "to the primary": (("ip", "route", "add", "blackhole", "10.213.7.1"), ("ip", "route", "del", "blackhole", "10.213.7.1"))}


@pytest.mark.parametrize("cut", sorted(CUTS))
def test_a_line_that_is_cut_loses_nothing(hosts, cut):
    archive = hosts.upload("1.0")
    same(hosts.primary, hosts.replica)
    begin, end = CUTS[cut]
    host = hosts.replica.host if cut == "to the primary" else hosts.primary.host
    host.run(*begin)
    later = [hosts.upload("2.%d" % number, size=40000) for number in range(3)]
    assert "10.213.7.1" in comes_to_be(hosts.replica, "unreachable")["replication-trouble"]
    assert hosts.replica.get(path_of(archive, "ann/dev"), headers=ANY).body == archive.content
    began = time.monotonic()
    refused = hosts.replica.upload("ann/dev", wheel("demo", "3.0"))
    assert refused.status in (502, 503) and "10.213.7.1" in refused.json()["message"], refused
    assert time.monotonic() - began < 5
    host.run(*end)
    same(hosts.primary, hosts.replica)
    assert hosts.replica.upload("ann/dev", wheel("demo", "4.0")).status == 200
    same(hosts.primary, hosts.replica)
    for each in later:
        assert hosts.replica.get(path_of(each, "ann/dev"), headers=ANY).body == each.content


# -- full disks


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 3 MB; `small_disk.grow()` makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not sys.platform.startswith("linux") or os.geteuid() != 0 \
            or _run("mount", "-t", "tmpfs", "-o", "size=3m,mode=700", "none", str(folder)).returncode:
        pytest.skip("a small disk is a tmpfs of Linux, which takes root to mount")

    class Disk:
        path = folder

        @staticmethod
        def grow():
            assert _run("mount", "-o", "remount,size=64m", str(folder)).returncode == 0
    yield Disk
    _run("umount", "-l", str(folder))


def test_a_replica_with_a_full_disk_says_so_and_goes_on_when_there_is_room(make_site, small_disk):
    site = make_site(replica=small_disk.path)
    follow(site)
    small = site.upload("1.0")
    same(site.primary, site.replica)
    large = [site.upload("2.%d" % number, size=900000) for number in range(4)]
    found = eventually(lambda: (lambda found: (found["replication-errors"] or "full" in str(
        found["replication-trouble"]) or "disk" in str(found["messages"])) and found)(status(site.replica)))
    assert found["wanted"]["files"] or found["replication-trouble"]
    assert [path for path in unsound(site.replica) if "/files/" in path] == []
    assert site.replica.get(path_of(small, "ann/dev"), headers=ANY).body == small.content
    small_disk.grow()
    same(site.primary, site.replica)
    assert unsound(site.replica) == []
    for archive in large:
        assert site.replica.get(path_of(archive, "ann/dev"), headers=ANY).body == archive.content


def test_an_upload_through_a_replica_to_a_full_primary_leaves_nothing(make_site, small_disk):
    site = make_site(primary=small_disk.path)
    follow(site)
    site.upload("1.0", site.replica)
    same(site.primary, site.replica)
    before = head(site.primary)
    refused = site.replica.upload("ann/dev", wheel("demo", "2.0", size=4 << 20))
    assert refused.status == 507, refused
    assert head(site.primary) == before == head(site.replica)
    assert unsound(site.primary) == [] == unsound(site.replica)
    small_disk.grow()
    site.upload("2.0", site.replica, size=4 << 20)
    same(site.primary, site.replica)


# -- clocks


@pytest.mark.parametrize("seconds", [86400, -86400])
def test_a_clock_a_day_off_is_named_and_nothing_else_comes_of_it(make_site, seconds):
    site = make_site(replica_code="""
import os, types
clock = types.SimpleNamespace(**vars(devpi_lite.time))
now = clock.time
clock.time = lambda: now() + (%d if os.path.exists(%r) else 0)
devpi_lite.time = clock
""" % (seconds, str(__file__) + ".never"))
    right = str(site.folder / "wrong-clock")
    script = site.replica.script
    script.write_text(script.read_text().replace(str(__file__) + ".never", right))
    site.upload("1.0")
    follow(site)
    same(site.primary, site.replica)
    open(right, "w").close()
    trouble = eventually(lambda: (lambda text: text and "clock differs" in text and text)(
        status(site.replica)["replication-trouble"]))
    assert 86390 < int(trouble.rpartition(" by ")[2].split()[0]) < 86410, trouble
    site.upload("2.0")
    metrics = site.replica.get("/+metrics", user="root").text
    lags = [line for line in metrics.splitlines() if line.startswith("devpi_lite_replica_lag")]
    assert lags and not any(float(line.split()[-1]) < 0 for line in lags), lags
    os.unlink(right)
    same(site.primary, site.replica)


# -- other versions


def test_rows_of_a_newer_program_stop_a_replica_until_it_is_newer_too(make_site):
    newer = """
@devpi_lite.row("later")
class Later(devpi_lite.NamedRows):
    table, source, key, order = "later", "later", ("name",), "name"
    def all(self, db):
        return iter(())
    def write(self, change, key, value):
        pass
put = devpi_lite.Change.put
"""
    makes = newer + """
def puts(self, kind, key, value):
    if kind == "project" and key[-1] == "new-thing" and value is not None and not self.is_replay:
        self.put("later", ("thing",), {})
    return put(self, kind, key, value)
devpi_lite.Change.put = puts
"""
    site = make_site(primary_code=makes)
    old = site.upload("1.0")
    follow(site)
    same(site.primary, site.replica)
    before = head(site.replica)
    assert site.primary.upload("ann/dev", wheel("new-thing", "1.0")).status == 200
    trouble = eventually(lambda: status(site.replica)["replication-trouble"])
    assert "newer devpi_lite.py" in trouble and "later" in trouble
    assert head(site.replica) == before
    assert site.replica.get(path_of(old, "ann/dev"), headers=ANY).body == old.content
    site.replica.stop()
    site.replica.script = patched(site.folder / "replica", SOON + newer)
    follow(site)
    eventually(lambda: head(site.replica) == head(site.primary))


@pytest.mark.parametrize("who", ["primary", "replica"])
def test_a_directory_of_a_newer_program_is_refused(make_site, who):
    site = make_site()
    follow(site)
    same(site.primary, site.replica)
    site.replica.stop()
    site.primary.stop()
    server = getattr(site, who)
    with contextlib.closing(sqlite3.connect(str(server.directory / "devpi_lite.db"))) as db:
        db.execute("PRAGMA user_version = 99")
        db.commit()
    refused = run_command("--serverdir", server.directory, "--port", "0")
    assert refused.returncode == 1 and "use a newer devpi_lite.py" in refused.stderr


# -- a damaged log


def test_a_byte_altered_in_the_primarys_log_is_entered_nowhere(make_site):
    site = make_site()
    site.upload("1.0")
    follow(site)
    same(site.primary, site.replica)
    site.replica.stop()
    before = head(site.replica)
    for number in range(3):
        site.upload("2.%d" % number)
    with contextlib.closing(sqlite3.connect(str(site.primary.directory / "devpi_lite.db"), timeout=10)) as db:
        ops, = db.execute("SELECT ops FROM changelog WHERE serial = ?", (before[0] + 2,)).fetchone()
        db.execute("UPDATE changelog SET ops = ? WHERE serial = ?", (
            ops[:-6] + bytes([ops[-6] ^ 1]) + ops[-5:], before[0] + 2))
        db.commit()
    follow(site)
    trouble = eventually(lambda: status(site.replica)["replication-trouble"])
    assert str(before[0] + 2) in trouble and "damaged" in trouble, trouble
    assert head(site.replica)[0] <= before[0] + 1
    assert status(site.replica)["replication-state"] != "following"
    found = status(site.primary)
    assert found["status"] == "fatal" and "changelog" in str(found["messages"]), found["messages"]
    checked = run_command("fsck", "--serverdir", site.primary.directory)
    assert checked.returncode != 0
    site.replica.stop()
    healed = run_command("resync", "--serverdir", site.replica.directory, "--secretfile",
                         site.primary.directory / ".secret")
    assert healed.returncode == 0, healed
    follow(site)
    site.upload("3.0")
    same(site.primary, site.replica)


# -- slow readers


def test_thirty_replicas_that_take_nothing_cost_uploads_nothing(make_site):
    site = make_site()
    for number in range(5):
        site.upload("1.%d" % number, size=200000)

    def times(version, count=12):
        spent = []
        for number in range(count):
            began = time.monotonic()
            site.upload("%s.%d" % (version, number))
            spent.append(time.monotonic() - began)
        return statistics.median(spent)

    alone, sockets = times("2"), []
    try:
        serial, chain = head(site.primary)
        for number in range(30):
            target = ("/+repl/v1/log?after=0&hash=%s&wait=30" % first_hash(site.primary), "/+repl/v1/snapshot",
                      "/+repl/v1/log?after=%d&hash=%s&wait=30" % (serial, chain.lower()))[number % 3]
            opened = socket.socket()
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            opened.connect(("127.0.0.1", site.primary.port))
            headers = signed(site.primary, target, uuid="%032x" % number)
            opened.sendall(("GET %s HTTP/1.1\r\nHost: localhost\r\nAuthorization: %s\r\n\r\n" % (
                target, headers["Authorization"])).encode())
            sockets.append(opened)
        ends = threading.Event()

        def sips():
            """As a line of 1 kB/s."""
            while not ends.wait(0.25):
                with contextlib.suppress(OSError):
                    sockets[0].recv(256)
        thread = threading.Thread(target=sips)
        thread.start()
        with_them = min(times("3"), times("4"))
        ends.set()
        thread.join()
    finally:
        for opened in sockets:
            opened.close()
    assert with_them < 2 * alone + 0.02, (alone, with_them)


def first_hash(server):
    with contextlib.closing(sqlite3.connect(str(server.directory / "devpi_lite.db"))) as db:
        return db.execute("SELECT lower(hex(hash)) FROM changelog WHERE serial = 0").fetchone()[0]
