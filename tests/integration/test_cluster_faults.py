"""What is lost when nodes, the head or the network of a cluster fail: nothing that was on record.

Each job is a real one on `bt cluster up`; its results are held against those of an undisturbed run.
All of them take minutes.
"""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
import zipfile
from contextlib import contextmanager, suppress

import cv2
import psutil
import pyarrow.parquet as pq
import pytest

from bt_core.data.score_work import ScoreWork
from bt_core.models.run import read_history
from bt_core.scans.phantom import phantom_slice, write_archive
from tests.conftest import SMALL
from tests.integration.test_cluster import BT, Cluster, started

pytestmark = [pytest.mark.integration, pytest.mark.slow]
NUM_SCANS = 1500


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A zip of scans that are quickly decoded, with a few that cannot be."""
    path = tmp_path_factory.mktemp("many") / "scans.zip"
    pictures = [
        cv2.imencode(".png", phantom_slice("glioma", seed, 48))[1].tobytes() for seed in range(30)
    ]
    with zipfile.ZipFile(path, "w") as file:
        for i in range(NUM_SCANS):
            file.writestr(f"{i:04d}.png", b"broken" if i % 250 == 7 else pictures[i % 30])
    return path


@pytest.fixture(scope="module")
def undisturbed(chain, many, tmp_path_factory):
    """The rows of a job on one machine that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    command = [BT, "score", chain.bundle, many, "-o", out]
    assert subprocess.run(command, check=False).returncode == 3
    return rows(out)


@pytest.fixture
def cluster(home):
    running = started(home, {}, "--nodes", "3", "--cpus", "1")
    yield running
    running.end()


def rows(out):
    """Return the rows of a finished job without what differs between two of them."""
    table = pq.read_table(out / "scores")
    assert table["scan_id"].to_pylist() == sorted(set(table["scan_id"].to_pylist()))
    return table.drop_columns(["scored_at", "uri"])


class Job(threading.Thread):
    """A command as a job, waited for in a thread of its own."""

    def __init__(self, cluster, *words):
        super().__init__()
        self.cluster, self.words, self.done = cluster, words, None
        self.start()

    def run(self):
        self.done = self.cluster.bt(*self.words, "--submit", self.cluster.dashboard)

    def code(self):
        self.join(900)
        assert self.done is not None, "it hangs"
        return self.done.returncode


def wait_until(is_so, job, seconds=300):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert job.done is None, job.done.stdout + job.done.stderr
        assert time.monotonic() < deadline
        time.sleep(0.1)


def nodes_of(cluster):
    """Return the processes of the nodes that work: `ray start`, with all that belongs to it."""
    return [p for p in psutil.Process(cluster.process.pid).children() if not is_head(p)]


def is_head(process):
    return "--head" in process.cmdline()


def kill(process):
    """End a node as a power cut would."""
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def busiest(cluster, title):
    """Return the node in which a worker of that title runs."""
    for node in nodes_of(cluster):
        if any(title in " ".join(p.cmdline()) for p in node.children(recursive=True)):
            return node
    raise AssertionError(f"no {title} runs")


def test_a_node_lost_in_mid_score_costs_no_row(cluster, chain, many, undisturbed, tmp_path):
    out = tmp_path / "out"
    job = Job(cluster, "score", chain.bundle, many, "-o", out)
    wait_until(lambda: out.exists() and ScoreWork(str(out)).num_done() > 0, job)
    kill(nodes_of(cluster)[0])
    assert job.code() == 3, job.done.stdout + job.done.stderr
    assert rows(out).equals(undisturbed)


def test_a_node_lost_in_mid_prepare_costs_no_scan(cluster, chain, tmp_path):
    archive, out, alone = tmp_path / "scans.zip", tmp_path / "data", tmp_path / "alone"
    write_archive(str(archive), num_per_class=200, size_px=256)
    job = Job(cluster, "prepare", archive, "-o", out, "--recipe", "cnn_small")
    wait_until(lambda: any_worker(cluster, "ray::"), job)
    time.sleep(3)
    kill(busiest(cluster, "ray::"))
    assert job.code() == 0, job.done.stdout + job.done.stderr
    command = [BT, "prepare", archive, "-o", alone, "--recipe", "cnn_small"]
    assert subprocess.run(command, check=False).returncode == 0
    tables = [pq.read_table(folder / "catalog.parquet") for folder in (out, alone)]
    assert tables[0].sort_by("scan_id").equals(tables[1].sort_by("scan_id"))


def any_worker(cluster, title):
    with suppress(AssertionError, psutil.NoSuchProcess):
        return busiest(cluster, title) is not None
    return False


def test_a_node_lost_in_mid_training_costs_an_epoch_at_most(cluster, chain, tmp_path):
    out = tmp_path / "run"
    words = ["--data", chain.data, *SMALL, "--set", "train.epochs=6", "-o", out]
    job = Job(cluster, "train", "--recipe", "cnn_small", *words, "--num-workers", 2)
    wait_until(lambda: len(read_history(str(out))) >= 2, job)
    kill(busiest(cluster, "RayTrainWorker"))
    assert job.code() == 0, job.done.stdout + job.done.stderr
    assert [figures["epoch"] for figures in read_history(str(out))] == [1, 2, 3, 4, 5, 6]


def test_a_node_lost_in_mid_sweep_costs_no_finished_trial(cluster, chain, tmp_path):
    sweep, out = tmp_path / "sweep.yaml", tmp_path / "sweep"
    sweep.write_text(
        "recipes: [cnn_small]\nsearch: grid\nscheduler: none\nfolds: 2\n"
        "space: {train.learning_rate: {choice: [0.001, 0.003, 0.01]}}\n"
        "fixed: {preprocess.size_px: 48, train.batch_size: 8, train.epochs: 3}\n"
    )
    job = Job(cluster, "tune", sweep, "--data", chain.data, "--cpus-per-trial", 1, "-o", out)
    wait_until(lambda: list(out.glob("trials/*/predictions*.parquet")), job)
    kill(busiest(cluster, "ray::"))
    code = job.code()
    if code:  # what was lost is tried again by the same command
        again = Job(cluster, *job.words)
        assert again.code() == 0, again.done.stdout + again.done.stderr
    board = pq.read_table(out / "leaderboard.parquet").to_pylist()
    assert [row["status"] for row in board] == ["finished"] * 3


def test_a_head_that_starts_again_goes_on_with_the_job(home, chain, many, undisturbed, tmp_path):
    out = tmp_path / "out"
    first = started(home, {}, "--nodes", "2", "--cpus", "1")
    words = ("score", chain.bundle, many, "-o", out)
    job = Job(first, *words)
    try:
        wait_until(lambda: out.exists() and ScoreWork(str(out)).num_done() > 0, job)
    finally:
        for child in psutil.Process(first.process.pid).children():
            kill(child)
        assert first.process.wait(120) == 1, "it says that the head has ended"
    assert job.code() != 0
    num_done = ScoreWork(str(out)).num_done()
    assert 0 < num_done < NUM_SCANS
    second = started(home, {}, "--nodes", "2", "--cpus", "1")
    try:
        again = Job(second, *words)
        assert again.code() == 3, again.done.stdout + again.done.stderr
    finally:
        second.end()
    assert rows(out).equals(undisturbed)
    assert json.loads((out / "manifest.json").read_text())["attempts"] == 2


@contextmanager
def namespaces(names):
    """Network namespaces on one bridge, each an own machine as far as addresses go."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")

    def ip(*words):
        subprocess.run(["ip", *words], check=True)

    ip("link", "add", "btbr", "type", "bridge")
    ip("link", "set", "btbr", "up")
    try:
        for i, name in enumerate(names, 1):
            ip("netns", "add", name)
            ip("link", "add", f"{name}-out", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{name}-out", "master", "btbr", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield {name: f"10.77.0.{i}" for i, name in enumerate(names, 1)}
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)
        subprocess.run(["ip", "link", "del", "btbr"], check=False)


@pytest.mark.parametrize("seconds", [5, 30])
def test_a_node_cut_off_for_a_while_costs_no_row(seconds, home, chain, many, undisturbed, tmp_path):
    """A head and three nodes, each with an address of its own."""
    out = tmp_path / "out"
    with namespaces(["bthead", "btone", "bttwo", "btthree"]) as addresses:
        head, *others = addresses
        running = in_namespaces(home, addresses)
        try:
            job = Job(running[head], "score", chain.bundle, many, "-o", out)
            wait_until(lambda: out.exists() and ScoreWork(str(out)).num_done() > 0, job)
            subprocess.run(["ip", "link", "set", f"{others[0]}-out", "down"], check=True)
            time.sleep(seconds)
            subprocess.run(["ip", "link", "set", f"{others[0]}-out", "up"], check=True)
            assert job.code() == 3, job.done.stdout + job.done.stderr
        finally:
            for one in reversed(list(running.values())):
                one.process.send_signal(signal.SIGINT)
                one.process.wait(120)
    assert rows(out).equals(undisturbed)


def in_namespaces(home, addresses):
    """Start a head in the first namespace and let the others join it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"HOME": str(home), "TMPDIR": str(home)}
    (head, at), *others = addresses.items()
    running = {}
    up = ["cluster", "up", "--host", at, "--nodes", "1", "--cpus", "1"]
    for name, words in [
        (head, up),
        *(
            (name, ["cluster", "join", f"{at}:6379", "--host", own, "--cpus", "1"])
            for name, own in others
        ),
    ]:
        line = ["ip", "netns", "exec", name, str(BT), *words]
        process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)
        while "Ctrl-C" not in (text := process.stdout.readline()):
            assert text, f"{name} ended with {process.wait()}"
        running[name] = Within(process, f"{at}:6379", "http://127.0.0.1:8265", environment, name)
    return running


class Within(Cluster):
    """Commands run in the namespace of the node, where the dashboard's loopback is."""

    def __init__(self, *arguments):
        *own, self.name = arguments
        super().__init__(*own)

    def bt(self, *words, **changed):
        line = ["ip", "netns", "exec", self.name, str(BT), *map(str, words)]
        environment = self.environment | changed
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


def test_a_full_disk_on_one_node_costs_no_row(home, chain, many, undisturbed, tmp_path):
    small, out = home / "d", tmp_path / "out"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", small]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    running = started(home, {}, "--nodes", "2", "--cpus", "1")
    line = [str(BT), "cluster", "join", running.address, "--host", "127.0.0.1", "--cpus", "1"]
    environment = running.environment | {"TMPDIR": str(small)}
    third = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert "Ctrl-C" in third.stdout.readline()
        job = Job(running, "score", chain.bundle, many, "-o", out)
        wait_until(lambda: out.exists() and ScoreWork(str(out)).num_done() > 0, job)
        with suppress(OSError), (small / "filler").open("wb") as file:
            while True:
                file.write(bytes(1024**2))
        assert job.code() == 3, job.done.stdout + job.done.stderr
    finally:
        third.send_signal(signal.SIGINT)
        third.wait(120)
        running.end()
        subprocess.run(["umount", "--lazy", small], check=True)
    assert rows(out).equals(undisturbed)
