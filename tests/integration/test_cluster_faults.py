"""What a cluster may lose in the middle of each command: a node, its network, its disk, the head.

Every node has a network namespace, and so an address, of its own; the commands run as jobs.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

import psutil
import pyarrow.parquet as pq
import pytest

from bt_core import storage
from bt_core.models.run import read_history
from bt_core.scans.phantom import write_archive
from cluster.local import free_port
from tests.conftest import short_folder
from tests.integration.test_cluster import BT, started

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]
NUM_SCANS = 480
NUM_NODES = 3
HEAD = "10.78.0.1"
SETTINGS = ("preprocess.size_px=48", "train.batch_size=32", "train.epochs=6")
SET = [word for setting in SETTINGS for word in ("--set", setting)]

ALIVE = """
import ray
ray.init(log_to_driver=False)
print(*(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]))
"""


def run(line):
    subprocess.run(line.split(), check=True)


@contextmanager
def network():
    """Namespaces `bt1`, `bt2`, ... with 10.78.0.2, ... on a bridge of this machine, 10.78.0.1."""
    run("ip link add btbridge type bridge")
    try:
        run(f"ip addr add {HEAD}/24 dev btbridge")
        run("ip link set btbridge up")
        for i in range(1, NUM_NODES + 1):
            run(f"ip netns add bt{i}")
            run(f"ip link add btveth{i} type veth peer name eth0 netns bt{i}")
            run(f"ip link set btveth{i} master btbridge up")
            run(f"ip -n bt{i} addr add 10.78.0.{i + 1}/24 dev eth0")
            run(f"ip -n bt{i} link set eth0 up")
            run(f"ip -n bt{i} link set lo up")
        yield
    finally:
        for i in range(1, NUM_NODES + 1):
            subprocess.run(["ip", "netns", "del", f"bt{i}"], check=False)
        run("ip link del btbridge")


class Site:
    """A head and three nodes of two CPUs that joined it."""

    def __init__(self, home):
        self.home, self.nodes = home, {}
        self.ports = (free_port(HEAD), free_port())
        self.up()

    def up(self):
        words = ["--nodes", "0", "--host", HEAD]
        # Workers that give way to all else would wait long for each other on a busy machine.
        self.head = started(self.home, {"RAY_worker_niceness": "0"}, *words, ports=self.ports)
        for i in range(1, NUM_NODES + 1):
            self.join(i)

    def join(self, i, **changed):
        line = f"ip netns exec bt{i} {BT} cluster join {HEAD}:{self.ports[0]}"
        words = [*line.split(), "--host", f"10.78.0.{i + 1}", "--cpus", "2"]
        environment = self.head.environment | changed
        node = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
        assert "work for" in node.stdout.readline()
        self.nodes[i] = node

    def processes(self, i):
        return psutil.Process(self.nodes[i].pid).children(recursive=True)

    def kill(self, i):
        """End all of a node at once, as a machine that is switched off."""
        node = self.nodes.pop(i)
        for process in [*psutil.Process(node.pid).children(recursive=True), node]:
            process.kill()
        node.communicate()

    def kill_head(self):
        """End the head alone; return its nodes, whose processes do not know that yet."""
        for process in psutil.Process(self.head.process.pid).children(recursive=True):
            process.kill()
        assert self.head.process.wait(60) != 0
        self.head.process.stdout.close()
        orphans, self.nodes = self.nodes, {}
        return orphans.values()

    def down(self):
        for node in self.nodes.values():
            node.send_signal(signal.SIGINT)
        for node in self.nodes.values():
            node.communicate(timeout=60)
        self.head.end()

    def alive(self):
        """Return what the head says of which nodes live: their addresses."""
        line = [sys.executable, "-c", ALIVE]
        asking = {"RAY_ADDRESS": f"{HEAD}:{self.ports[0]}", "RAY_AUTH_MODE": "token"}
        environment = self.head.environment | asking
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.split()

    def start(self, *words):
        line = [str(BT), *map(str, words), "--submit", self.head.dashboard]
        return subprocess.Popen(
            line,
            env=self.head.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def busy(self, job, title):
        """Wait until a process of that title works on a node; return the node."""
        deadline = time.monotonic() + 300
        while job.poll() is None and time.monotonic() < deadline:
            for i in self.nodes:
                for process in self.processes(i):
                    try:
                        if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                            return i
                    except psutil.Error:
                        continue
            time.sleep(0.05)
        raise AssertionError(f"no {title} was seen: {job.communicate()[0]}")


def ended(job):
    said = job.communicate(timeout=900)[0]
    return job.returncode, said


@pytest.fixture(scope="module")
def site():
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    with network(), short_folder() as home:
        running = Site(home)
        yield running
        running.down()


class Work:
    """What each command makes of one archive: where, by which words, and what it should be."""

    def __init__(self, site, root):
        self.site, self.root = site, root
        self.archive, self.sweep = root / "scans.zip", root / "sweep.yaml"
        write_archive(str(self.archive), num_per_class=NUM_SCANS // 4, size_px=96)
        self.sweep.write_text(
            "recipes: [cnn_small]\nsearch: grid\nscheduler: none\nfolds: 2\n"
            "space: {train.learning_rate: {choice: [0.001, 0.003]}}\n"
            "fixed: {preprocess.size_px: 48, train.batch_size: 32, train.epochs: 6}\n"
        )
        self.undisturbed = root / "undisturbed"
        for command in ("prepare", "train", "tune"):
            self.finish(command, self.undisturbed)
        bundle = self.undisturbed / "bundle"
        self.finish_words("ensemble", self.undisturbed / "train", "-o", bundle)
        self.finish("score", self.undisturbed)

    def words(self, command, place):
        data, out = self.undisturbed / "prepare", place / command
        return {
            "prepare": ["prepare", self.archive, "--recipe", "cnn_small"],
            "train": ["train", "--recipe", "cnn_small", "--data", data, "--num-workers", 2, *SET],
            "tune": ["tune", self.sweep, "--data", data, "--cpus-per-trial", 1],
            "score": ["score", self.undisturbed / "bundle", self.archive],
        }[command] + ["-o", out]

    def finish(self, command, place):
        self.finish_words(*self.words(command, place))

    def finish_words(self, *words):
        code, said = ended(self.site.start(*words))
        assert code == 0, said

    def result(self, command, place):
        """Return what must be the same however often the command was disturbed."""
        out = place / command
        if command == "prepare":
            table = pq.read_table(out / "catalog.parquet")
            return table.sort_by("scan_id").to_pylist()
        if command == "train":
            record = storage.read_json(str(out / "run.json"))
            losses = [pytest.approx(epoch["loss"], rel=0.2) for epoch in read_history(str(out))]
            return record["num_workers"], losses
        if command == "tune":
            board = storage.read_table(str(out / "leaderboard.parquet")).to_pylist()
            columns = ("train.learning_rate", "status", "num_fits", "num_epochs", "val_score")
            return sorted(tuple(row[name] for name in columns) for row in board)
        table = pq.read_table(out / "scores").drop_columns(["scored_at", "uri"])
        assert storage.read_json(str(out / "manifest.json"))["n_in"] == NUM_SCANS
        return table.sort_by("scan_id").to_pylist()

    def check(self, command, place):
        assert self.result(command, place) == self.result(command, self.undisturbed)


@pytest.fixture(scope="module")
def work(site, tmp_path_factory):
    return Work(site, tmp_path_factory.mktemp("work"))


TITLES = {
    "prepare": "ray::run_stage",
    "train": "ray::RayTrainWorker",
    "tune": ("ray::ImplicitFunc", "ray::_trial"),
    "score": "ray::MapWorker",
}


@pytest.mark.parametrize("command", TITLES)
def test_a_node_that_is_lost_costs_no_result(site, work, tmp_path, command):
    job = site.start(*work.words(command, tmp_path))
    lost = site.busy(job, TITLES[command])
    time.sleep(2 if command != "prepare" else 0)
    assert job.poll() is None, "it is lost in the middle"
    site.kill(lost)
    try:
        code, said = ended(job)
        assert code == 0, said
        work.check(command, tmp_path)
    finally:
        site.join(lost)


@pytest.mark.parametrize("command", ["train", "score"])
@pytest.mark.parametrize("seconds", [5, 30])
def test_a_cut_network_costs_no_result(site, work, tmp_path, command, seconds):
    job = site.start(*work.words(command, tmp_path))
    cut = site.busy(job, TITLES[command])
    run(f"ip link set btveth{cut} down")
    try:
        time.sleep(seconds)
        assert job.poll() is None, "it was cut in the middle"
    finally:
        run(f"ip link set btveth{cut} up")
    code, said = ended(job)
    assert code == 0, said
    work.check(command, tmp_path)
    if seconds == 5:
        assert f"10.78.0.{cut + 1}" in site.alive()
    elif f"10.78.0.{cut + 1}" not in site.alive():
        site.kill(cut)
        site.join(cut)


@pytest.mark.parametrize("command", TITLES)
def test_a_lost_head_costs_the_time_only(site, work, tmp_path, command):
    """The same command goes on with the work of the first, whose orphans live on for a while."""
    words = work.words(command, tmp_path)
    job = site.start(*words)
    site.busy(job, TITLES[command])
    time.sleep({"prepare": 0, "train": 3}.get(command, 5))
    assert job.poll() is None
    orphans = site.kill_head()
    code, said = ended(job)
    site.up()
    assert code == 1
    assert "Traceback" not in said
    assert "the same command" in said
    work.finish_words(*words)
    work.check(command, tmp_path)
    if command != "prepare":  # that begins anew
        record = {"train": "run.json", "tune": "sweep.json"}.get(command, "manifest.json")
        assert len(storage.read_json(str(tmp_path / command / record))["run_ids"]) == 2
    for node in orphans:
        node.communicate(timeout=300)


def test_a_node_whose_disk_is_full_costs_no_result(site, work, tmp_path):
    """Ray's own files have no room there: a job ends right, wherever its tasks ran."""
    with ExitStack() as stack:
        disk = stack.enter_context(short_folder())
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk]
        subprocess.run(mount, check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", disk], check=True)
        site.kill(1)
        site.join(1, TMPDIR=str(disk))
        stack.callback(site.join, 1)
        stack.callback(site.kill, 1)
        job = site.start(*work.words("score", tmp_path))
        site.busy(job, TITLES["score"])
        fill(disk)
        assert job.poll() is None, "it was filled in the middle"
        code, said = ended(job)
        assert code == 0, said
        work.check("score", tmp_path)


def fill(disk):
    try:
        with open(disk / "fill", "wb") as file:
            while True:
                file.write(bytes(1024**2))
                file.flush()
    except OSError:
        return
