"""Commands as jobs on `bt cluster up`: several raylets, a token, scans and results in S3."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import requests
from moto.server import ThreadedMotoServer
from pyarrow import fs

from bt_core import storage
from bt_core.errors import EXIT_INTERRUPTED, EXIT_USAGE
from bt_core.scans.phantom import write_archive
from cluster.local import free_port
from tests.conftest import SMALL, short_folder

pytestmark = pytest.mark.integration
BT = Path(sys.executable).with_name("bt")


@dataclass
class Cluster:
    """A cluster in a process of its own, with a home, and so a token, of its own."""

    process: subprocess.Popen[str]
    address: str
    dashboard: str
    environment: dict[str, str]

    def bt(self, *words, **changed):
        """Run a command against it, as a user would in a shell."""
        line = [str(BT), *map(str, words)]
        environment = {k: v for k, v in (self.environment | changed).items() if v is not None}
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)

    def job(self, *words, **changed):
        """Run a command as a job; return what it printed."""
        done = self.bt(*words, "--submit", self.dashboard, **changed)
        assert done.returncode in (0, 3), done.stdout + done.stderr
        return done.stdout

    def end(self):
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(120) == 0
        self.process.stdout.close()


def started(home, store, *words, ports=None):
    """Start `bt cluster up` and return it when it says that it is up."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= store | {"HOME": str(home), "TMPDIR": str(home)}
    port, dashboard = ports or (free_port(), free_port())
    line = [str(BT), "cluster", "up", "--port", str(port), "--dashboard-port", str(dashboard)]
    process = subprocess.Popen([*line, *words], env=environment, stdout=subprocess.PIPE, text=True)
    said = ""
    while "Ctrl-C" not in said:
        text = process.stdout.readline()
        assert text, f"it ended with {process.wait()} after: {said}"
        said += text
    return Cluster(process, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment)


@pytest.fixture(scope="module")
def store():
    """An S3 server on loopback with a bucket, as variables of the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    variables = {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        bucket = fs.S3FileSystem(
            endpoint_override=variables["AWS_ENDPOINT_URL"], allow_bucket_creation=True
        )
        bucket.create_dir("site")
        yield variables
    server.stop()


@pytest.fixture(scope="module")
def cluster(store):
    with short_folder() as home:
        running = started(home, store, "--nodes", "2", "--cpus", "2")
        yield running
        running.end()
        assert not list(home.glob("bt-ray-*")), "it leaves nothing"


def test_nobody_without_the_token_is_answered(cluster, tmp_path):
    token = Path(cluster.environment["HOME"], ".ray", "auth_token")
    assert token.stat().st_mode & 0o077 == 0
    assert requests.get(f"{cluster.dashboard}/api/jobs/", timeout=30).status_code == 401
    words = ("jobs", "list", "--cluster", cluster.dashboard)
    assert cluster.bt(*words).returncode == 0
    for changed in (
        {"HOME": str(tmp_path)},
        {"RAY_AUTH_TOKEN": "of somebody else", "RAY_AUTH_MODE": "token"},
    ):
        refused = cluster.bt(*words, **changed)
        assert refused.returncode == EXIT_USAGE, refused.stdout + refused.stderr
        assert "check the address and the token" in refused.stderr
        phantom = ("phantom", tmp_path / "x.zip", "--num-per-class", 1)
        assert cluster.bt(*phantom, "--submit", cluster.dashboard, **changed).returncode == 2
    assert not (tmp_path / "x.zip").exists()


def test_the_dashboard_is_for_this_machine_and_the_head_refuses_strangers(cluster, tmp_path):
    """Ray's head listens on all addresses, whatever it is told; so the token has to keep it."""
    port = int(cluster.dashboard.rpartition(":")[2])
    listening = [c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [place.ip for place in listening if place.port == port] == ["127.0.0.1"]
    line = [sys.executable, "-c", "import ray; ray.init(log_to_driver=False); print('joined')"]
    joining = cluster.environment | {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "token"}
    tried = [
        ({}, True),
        ({"RAY_AUTH_TOKEN": "of somebody else"}, False),
        ({"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}, False),
    ]
    joiners = [
        subprocess.Popen(
            line,
            env=joining | changed,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for changed, _ in tried
    ]  # at once: one that is refused tries for a while
    said = [joiner.communicate(timeout=300)[0] for joiner in joiners]
    assert ["joined" in text for text in said] == [joins for _, joins in tried]


def test_without_protection_none_is_started(tmp_path):
    line = [str(BT), "cluster", "up", "--port", str(free_port())]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_USAGE
    assert "runs code on it, so none is started; unset the variable" in done.stderr


def test_a_node_that_cannot_join_says_why_and_makes_no_token(cluster, tmp_path):
    for head, changed, said in (
        ("127.0.0.1", {}, "127.0.0.1: write it as HOST:PORT of the head"),
        (f"127.0.0.1:{free_port()}", {}, "nobody answers at 127.0.0.1:"),
        (cluster.address, {"HOME": str(tmp_path)}, "copy ~/.ray/auth_token from the head"),
    ):
        done = cluster.bt("cluster", "join", head, "--host", "127.0.0.1", **changed)
        assert done.returncode == EXIT_USAGE, done.stdout + done.stderr
        assert said in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_end_while_it_starts_is_an_end(number, tmp_path):
    with short_folder() as home:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment |= {"HOME": str(home), "TMPDIR": str(home)}
        ports = ("--port", str(free_port()), "--dashboard-port", str(free_port()))
        process = subprocess.Popen([str(BT), "cluster", "up", *ports], env=environment)
        try:
            nodes = []
            while len(nodes) < 2:  # what starts the head, and a process of the head itself
                assert process.poll() is None
                time.sleep(0.05)
                with suppress(psutil.NoSuchProcess):  # the maker of the token, which has ended
                    found = psutil.Process(process.pid).children(recursive=True)
                    nodes = found if found and "--block" in found[0].cmdline() else []
            process.send_signal(number)
            assert process.wait(60) == EXIT_INTERRUPTED
            assert not psutil.wait_procs(nodes, 5)[1], "it leaves nothing"
            assert not list(home.glob("bt-ray-*"))
        finally:  # a test that fails leaves no nodes, by which Ray would lead other commands here
            process.terminate()
            process.wait(60)


def test_a_port_that_is_taken_is_said_so(cluster):
    port = cluster.address.rpartition(":")[2]
    done = cluster.bt("cluster", "up", "--port", port, "--dashboard-port", free_port())
    assert done.returncode == EXIT_USAGE
    assert f"port {port}" in done.stderr


def test_an_archive_in_a_bucket_is_scored_into_the_bucket(cluster, chain, tmp_path):
    """Each scan has the row that it has where all lies on a disk of one machine."""
    site = "s3://site/scored"
    storage.write_bytes(f"{site}/scans.zip", chain.archive.read_bytes())
    for file in chain.bundle.rglob("*"):
        if file.is_file():
            at = f"{site}/bundle/{file.relative_to(chain.bundle)}"
            storage.write_bytes(at, file.read_bytes())
    words = ("score", f"{site}/bundle", f"{site}/scans.zip", "-o", f"{site}/out")
    said = cluster.job(*words, BT_RUN_ID="from-here")
    manifest = storage.read_json(f"{site}/out/manifest.json")
    assert manifest["run_ids"] == ["from-here"]
    assert " from-here INFO Ray: " in said, "the log of the job"
    own = json.loads((chain.scores / "manifest.json").read_text())
    names = ("n_in", "scored", "deferred", "rejected", "failed", "bundle_id")
    assert {name: manifest[name] for name in names} == {name: own[name] for name in names}
    places = ["scored_at", "uri", "scan_id"]
    remote = storage.read_table(f"{site}/out/scores").drop_columns(places).sort_by("member")
    local = pq.read_table(chain.scores / "scores").drop_columns(places).sort_by("member")
    assert remote.equals(local)


@pytest.mark.slow
def test_four_nodes_do_the_whole_chain_as_jobs(store, home, tmp_path):
    running = started(home, store, "--nodes", "4", "--cpus", "2")
    site = "s3://site/whole"
    archive, sweep = tmp_path / "scans.zip", tmp_path / "sweep.yaml"
    write_archive(str(archive), num_per_class=20, size_px=96)
    storage.write_bytes(f"{site}/scans.zip", archive.read_bytes())
    sweep.write_text(
        "recipes: [cnn_small]\nsearch: grid\nscheduler: none\nfolds: 2\n"
        "space: {train.learning_rate: {choice: [0.001, 0.003]}}\n"
        "fixed: {preprocess.size_px: 48, train.batch_size: 8, train.epochs: 2}\n"
    )
    storage.write_bytes(f"{site}/sweep.yaml", sweep.read_bytes())
    try:
        data, run, bundle = f"{site}/data", f"{site}/runs/cnn", f"{site}/bundle"
        running.job("prepare", f"{site}/scans.zip", "-o", data, "--recipe", "cnn_small")
        common = ["--data", data, *SMALL, "--set", "train.epochs=3"]
        running.job("train", "--recipe", "cnn_small", *common, "--num-workers", 2, "-o", run)
        assert storage.read_json(f"{run}/run.json")["num_workers"] == 2
        running.job("tune", sweep, "--data", data, "--cpus-per-trial", 1, "-o", f"{site}/sweep")
        assert storage.read_table(f"{site}/sweep/leaderboard.parquet").num_rows == 2
        running.job("ensemble", run, "-o", bundle)
        running.job("evaluate", bundle, "--data", data, "-o", f"{site}/report")
        running.job("score", bundle, f"{site}/scans.zip", "-o", f"{site}/scores")
        assert storage.read_json(f"{site}/scores/manifest.json")["n_in"] == 80
        answer_as_a_job(running, bundle, archive)
    finally:
        running.end()


def answer_as_a_job(running, bundle, archive):
    """Serve on the cluster from a job, ask for one scan, stop the job."""
    import zipfile

    port = free_port()
    with zipfile.ZipFile(archive) as file:
        content = file.read(file.namelist()[0])
    line = [str(BT), "serve", bundle, "--port", str(port), "--submit", running.dashboard]
    job = subprocess.Popen(line, env=running.environment, stdout=subprocess.DEVNULL)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while not is_ready(url):
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(1)
        answer = requests.post(f"{url}/v1/predictions", data=content, timeout=60)
        assert answer.status_code == 200, answer.text
        listed = running.bt("jobs", "list", "--cluster", running.dashboard).stdout
        (serving,) = [text.split()[0] for text in listed.splitlines() if "jobs.serve" in text]
        assert running.bt("jobs", "stop", serving, "--cluster", running.dashboard).returncode == 0
    finally:
        job.terminate()
        job.wait(60)


def is_ready(url):
    try:
        return requests.get(f"{url}/readyz", timeout=60).status_code == 200
    except requests.ConnectionError:
        return False
