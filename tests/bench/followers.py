"""w13, replicas: how fast a fresh one has 10,000 files, beside rsync and a real devpi replica; how soon an upload can be read
there; what replicas cost the primary's uploads; an idle one; and hot pages."""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request

import load
from run import MS, joined, page, ratio, releases
from server import small_wheel
from upkeep import FILE_SIZE, fill


def w13(run):
    """A fresh replica against rsync, uploads that can be read there, uploads with four replicas, an idle replica, hot pages."""
    count = run.size(10000, 1000)
    primary = run.server("--role", "primary").start()
    primary.add_stage("priv")
    primary.fill(run.generator, releases("small", 5))
    fill(run, primary, count)
    primary.settle()
    replica, rate = measure_fresh(run, primary, count)
    measure_reading(run, primary, replica)
    measure_idle(run, replica)
    measure_hot(run, primary, replica)
    replica.stop()
    measure_uploads(run)
    if run.devpi:
        measure_devpi(run, primary, rate)
    primary.stop()


def new_replica(run, primary):
    return run.server("--primary-url", "http://%s:%d" % (load.HOST, primary.port),
                      "--secretfile", os.path.join(primary.directory, ".secret"))


def status(server):
    with load.connect(server.port) as connection:
        return json.loads(load.exchange(connection, load.get("/+status", "application/json")).body)["result"]


def in_sync(primary, replica, seconds=300):
    """Returns when the replica has all rows and files; RuntimeError with what it lacks."""
    until = time.monotonic() + seconds
    serial = status(primary)["serial"]
    while True:
        found = status(replica)
        if found["serial"] >= serial and not found["wanted"]["files"] and found["replication-state"] == "following":
            return
        if time.monotonic() > until:
            raise RuntimeError("the replica has serial %s of %s, wants %s" % (found["serial"], serial, found["wanted"]))
        time.sleep(0.05)


# -- a fresh replica


def measure_fresh(run, primary, count):
    """Records it; returns one that runs, and the files a second of each round.

    Nothing is deleted between two rounds: where ext4 has just deleted many files, it makes new ones slowly."""
    case = "fresh replica, %d files of %d KB" % (count, FILE_SIZE // 1000)
    took, copied, ours, theirs, replica = [], [], [], [], None
    has_rsync = shutil.which("rsync")
    for at in range(run.rounds):
        if has_rsync:
            copied.append(rsync(run, primary, at))
        if replica:
            replica.stop()
        replica = new_replica(run, primary)
        os.sync()       # what others wrote is not its work
        before = primary.cpu()
        replica.start()
        began = time.perf_counter()
        in_sync(primary, replica)
        took.append(time.perf_counter() - began)
        ours.append((primary.cpu() - before) / count * MS)
        theirs.append((replica.cpu() - replica.start_cpu) / count * MS)
    rate = [count / seconds for seconds in took]
    run.record("w13", case, "from its first answer to the last file", "s", took)
    run.record("w13", case, "files in a second", "/s", rate, "high")
    run.record("w13", case, "CPU of the primary, a file", "ms", ours)
    run.record("w13", case, "CPU of the replica, a file", "ms", theirs)
    if has_rsync:
        run.record("w13", case, "rsync from a daemon, and sync", "s", copied)
        run.record("w13", case, "of rsync and sync", "x", ratio(took, copied))
    return replica, rate


def rsync(run, primary, at):
    """Seconds that an rsync of the primary's files from a daemon takes, and a sync: so they are as safe as the replica's."""
    settings, port = run.place("rsyncd-%d.conf" % at), free_port()
    root = "uid = 0\ngid = 0\n" if os.getuid() == 0 else ""
    with open(settings, "w") as file:
        file.write("%suse chroot = no\nlog file = %s\n[files]\npath = %s\n"
                   % (root, run.place("rsyncd.log"), os.path.join(primary.directory, "files")))
    daemon = subprocess.Popen(["rsync", "--daemon", "--no-detach", "--address", load.HOST, "--port", str(port),
                               "--config", settings], stdin=subprocess.DEVNULL, start_new_session=True)
    run.keep(Killed(daemon))
    time.sleep(0.5)
    os.sync()
    began = time.perf_counter()
    done = subprocess.run(["rsync", "-a", "rsync://%s:%d/files/" % (load.HOST, port), run.place("rsync-%d" % at)])
    os.sync()
    took = time.perf_counter() - began
    daemon.kill()
    daemon.wait()
    if done.returncode:
        raise RuntimeError("rsync: exit status %d" % done.returncode)
    return took


class Killed:
    """A process that ends with the run."""

    def __init__(self, process):
        self.process = process

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def free_port():
    with socket.socket() as chosen:
        chosen.bind((load.HOST, 0))
        return chosen.getsockname()[1]


# -- one that follows


def measure_reading(run, primary, replica):
    """How long after an upload's answer its file is first given by the replica."""
    count, waits = run.size(200, 50), []
    for at in range(count):
        wheel = small_wheel("soon-%d" % at, "1.0")
        request = load.get("/root/priv/+f/%s/%s/%s" % (wheel.sha256[:3], wheel.sha256[3:16], wheel.filename), "*/*")
        with load.connect(replica.port) as connection:
            primary.upload(wheel)
            began = time.perf_counter()
            while load.exchange(connection, request).status != 200:
                if time.perf_counter() > began + 30:
                    raise RuntimeError("%s does not come to the replica" % wheel.filename)
                time.sleep(0.001)
            waits.append((time.perf_counter() - began) * MS)
    waits.sort()
    run.record("w13", "%d uploads, one after the other" % count, "readable on the replica, p50", "ms", [waits[count // 2]])
    run.record("w13", "%d uploads, one after the other" % count, "readable on the replica, p99", "ms", [waits[count * 99 // 100]])


def measure_idle(run, replica):
    seconds = run.size(60, 10)
    replica.settle()
    time.sleep(2)
    before = replica.cpu()
    time.sleep(seconds)
    used = (replica.cpu() - before) / seconds * 100
    run.record("w13", "idle replica, %d s" % seconds, "CPU, of a core", "%", [used])


def measure_hot(run, primary, replica):
    """The same page of both, in turn."""
    request, results = load.get(page("small")), {"primary": [], "replica": []}
    for _ in range(run.rounds):
        parts = {"primary": [], "replica": []}
        for _ in range(4):
            parts["primary"].append(run.hot(primary, request, 16, run.seconds / 2))
            parts["replica"].append(run.hot(replica, request, 16, run.seconds / 2))
        for name, measured in parts.items():
            results[name].append(joined(measured))
    cpu = {name: [result.cpu_each for result in measured] for name, measured in results.items()}
    for name, measured in results.items():
        run.record("w13", "hot page of the " + name, "rate", "req/s", [result.rate for result in measured], "high")
    run.record("w13", "hot page of the replica", "CPU each, of the primary's", "x", ratio(cpu["replica"], cpu["primary"]))


def measure_uploads(run):
    """Uploads, four at a time, followed by four replicas and alone, in turn.

    The replicas stand for four other machines: they run on the other half of the processors, and have their files in memory. For
    the uploads alone they are stopped (SIGSTOP): each has one request open, which the primary answers once."""
    processors = sorted(os.sched_getaffinity(0))
    half = len(processors) // 2
    here, elsewhere = processors[:half] or processors, processors[half:]
    memory = run.keep(Folder("/dev/shm" if os.path.isdir("/dev/shm") else None))
    primary = run.server("--role", "primary").start()
    primary.add_stage("priv")
    replicas = [new_replica(run, primary) for _ in range(4)]
    for at, each in enumerate(replicas):
        each.directory = os.path.join(memory.path, str(at))
        each.start()
        pin(each.pid, elsewhere)
    pin(primary.pid, here)
    pin(run.generator.process.pid, here)
    count, names = run.size(300, 100), iter(range(1000000))

    def upload():
        tasks = [load.Task(primary.upload_request(small_wheel("with-%d" % next(names), "1.0"))) for _ in range(count)]
        return run.generator.run(load.each, primary.port, primary.pid, tasks, 4).checked()

    kinds = {"alone": [], "with four replicas": []}
    upload()
    for _ in range(run.rounds):
        parts = {name: [] for name in kinds}
        for _ in range(4):
            for each in replicas:
                in_sync(primary, each)
            parts["with four replicas"].append(upload())
            for each in replicas:
                in_sync(primary, each)
                os.kill(each.pid, signal.SIGSTOP)
            parts["alone"].append(upload())
            for each in replicas:
                os.kill(each.pid, signal.SIGCONT)
        for name, measured in parts.items():
            kinds[name].append(joined(measured))
    pin(run.generator.process.pid, processors)

    for name, results in kinds.items():
        case = "uploads, four at a time, " + name
        run.record("w13", case, "rate", "uploads/s", [result.rate for result in results], "high")
        run.record("w13", case, "CPU of the primary each", "ms", [result.cpu_each * MS for result in results])
    rates = {name: [result.rate for result in results] for name, results in kinds.items()}
    run.record("w13", "uploads, four at a time, with four replicas", "rate, of the rate alone", "x",
               ratio(rates["with four replicas"], rates["alone"]), "high")
    for each in replicas + [primary]:
        each.stop()


class Folder:
    """A temporary folder below `place`, which is deleted at the end of the run."""

    def __init__(self, place):
        self.path = tempfile.mkdtemp(prefix="devpi_lite-bench-", dir=place)

    def kill(self):
        shutil.rmtree(self.path, ignore_errors=True)


def pin(pid, processors):
    """Have all threads of a process, and those that they start, run on these processors."""
    for thread in os.listdir("/proc/%d/task" % pid):
        os.sched_setaffinity(int(thread), processors)


# -- the peer


def measure_devpi(run, primary, rate):
    """A fresh replica of a real devpi-server, on as many of the same files as `--devpi-files` says."""
    count = run.devpi_files or run.size(500, 100)
    peer = Peer(run, count)
    seconds = peer.measure(run, primary)
    case = "fresh replica, %d files of %d KB" % (count, FILE_SIZE // 1000)
    run.record("w13", case + ", devpi's", "files in a second", "/s", [count / seconds], "high")
    run.record("w13", case + ", devpi's", "files a second of ours, of devpi's", "x", [each / (count / seconds) for each in rate],
               "high")


class Peer:
    """A devpi primary and its replica."""

    def __init__(self, run, count):
        self.run, self.count, self.processes = run, count, []

    def program(self, name):
        return os.path.join(self.run.devpi, "bin", name)

    def measure(self, run, primary):
        """Seconds from the replica's first answer until it has all files."""
        source = run.started_server()
        fill(run, source, self.count)
        source.stop()
        dump, secret = run.place("devpi-dump"), run.place("devpi-secret")
        subprocess.run([run.program.python, run.program.script, "export", dump, "--serverdir", source.directory],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with open(secret, "w") as file:
            file.write("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGH")
        os.chmod(secret, 0o600)
        one, other = run.place("devpi-primary"), run.place("devpi-replica")
        ports = [free_port(), free_port()]
        url = "http://%s:%d" % (load.HOST, ports[0])
        self.quietly([self.program("devpi-import"), "--serverdir", one, "--no-root-pypi", dump])
        # the default makes each of the two compute for half a minute
        cheap = ["--secretfile", secret, "--argon2-memory-cost", "1024", "--argon2-parallelism", "1", "--argon2-time-cost", "1"]
        self.begin(["--serverdir", one, "--role", "primary", "--port", str(ports[0])] + cheap, ports[0])
        self.quietly([self.program("devpi-init"), "--serverdir", other, "--role", "replica", "--primary-url", url])
        self.begin(["--serverdir", other, "--role", "replica", "--primary-url", url, "--port", str(ports[1])] + cheap, ports[1])
        began = time.perf_counter()
        while sum(len(files) for _, _, files in os.walk(os.path.join(other, "+files"))) < self.count:
            if time.perf_counter() > began + 600:
                raise RuntimeError("devpi's replica does not get all files")
            time.sleep(0.2)
        took = time.perf_counter() - began
        for process in self.processes:
            process.kill()
        return took

    @staticmethod
    def quietly(words):
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def begin(self, options, port):
        with open(self.run.place("devpi.log"), "ab") as log:
            process = subprocess.Popen([self.program("devpi-server"), "--host", load.HOST] + options,
                                       stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.processes.append(self.run.keep(Killed(process)))
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen("http://%s:%d/+api" % (load.HOST, port), timeout=10).close()
                return
            except OSError:
                if time.monotonic() > until or process.poll() is not None:
                    with open(self.run.place("devpi.log"), errors="replace") as log:
                        raise RuntimeError("devpi-server does not start:\n" + log.read()[-2000:])
                time.sleep(0.2)
