"""What a cluster exports while it works, read by a Prometheus as the shipped files have it."""

import shutil
import subprocess
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import yaml
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from bt_core.scans.phantom import write_archive
from cluster.local import free_port
from tests.conftest import SMALL, short_folder
from tests.dashboard import SHOWN, filled_in, metrics_of
from tests.integration.test_cluster import BT, Cluster, is_ready, started
from tests.tiny_bundle import make_bundle

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3600)]
CONFIG = Path(__file__).parents[2] / "cluster" / "prometheus.yaml"
RUNS = {"training", "sweeping", "scoring", "serving"}
NOT_HERE = {"GPU", "GPU memory", "Drift"}
"""Panels without a curve, where there is no GPU and no bundle that knows its validation scans."""


@dataclass
class Prometheus:
    """A server that reads the cluster."""

    url: str

    def ask(self, path, **parameters):
        answer = requests.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=60).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def curves(self, expression):
        return self.ask("query", query=filled_in(expression))["result"]


@pytest.fixture(scope="module")
def cluster():
    """A node whose figures are renewed each second."""
    with short_folder() as home, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        running = started(home, {}, "--nodes", "1", "--cpus", "3")
        yield running
        running.end()


@pytest.fixture(scope="module")
def prometheus(cluster):
    """Prometheus by the shipped file, but for where the nodes' list lies, and more often."""
    server = shutil.which("prometheus")
    if server is None:  # a failure: what is skipped in silence goes untested for good
        pytest.fail("the dashboard's queries are put to Prometheus: apt-get install prometheus")
    home = Path(cluster.environment["HOME"])
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s"}
    (discovery,) = config["scrape_configs"][0]["file_sd_configs"]
    (name,) = discovery["files"]
    (listed,) = home.glob(f"bt-ray-*/{Path(name).name}")
    discovery["files"] = [str(listed)]
    (home / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    line = [
        server, f"--config.file={home}/prometheus.yaml", f"--storage.tsdb.path={home}/tsdb",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
    time.sleep(2)
    assert process.poll() is None, f"it takes no {home}/prometheus.yaml"
    yield Prometheus(f"http://127.0.0.1:{port}")
    process.terminate()
    process.wait(60)


@pytest.fixture(scope="module")
def worked(cluster: Cluster, prometheus):
    """Train, tune, score and serve on the cluster, each as a run with a name."""
    home = Path(cluster.environment["HOME"])
    archive, bundle, data = home / "scans.zip", home / "bundle", home / "data"
    make_bundle(bundle, sizes=(32, 48))
    write_archive(str(archive), num_per_class=10, size_px=96)
    (home / "sweep.yaml").write_text(
        "recipes: [cnn_small]\nsearch: grid\nscheduler: none\nfolds: 2\n"
        "space: {train.learning_rate: {choice: [0.001]}}\n"
        "fixed: {preprocess.size_px: 48, train.batch_size: 8, train.epochs: 2}\n"
    )

    def bt(run, *words):
        done = cluster.bt(*words, RAY_ADDRESS=cluster.address, BT_RUN_ID=run)
        assert done.returncode in (0, 3), done.stderr
        assert f" {run} INFO Ray: " in done.stderr

    bt("preparing", "prepare", archive, "-o", data, "--recipe", "cnn_small")
    train = ["--recipe", "cnn_small", "--data", data, *SMALL, "--set", "train.epochs=4"]
    bt("training", "train", *train, "-o", home / "run")
    bt("sweeping", "tune", home / "sweep.yaml", "--data", data, "-o", home / "sweep")
    port = free_port()
    serving = cluster.environment | {"RAY_ADDRESS": cluster.address, "BT_RUN_ID": "serving"}
    line = [str(BT), "serve", str(bundle), "--port", str(port)]
    server = subprocess.Popen(line, env=serving, stdout=subprocess.DEVNULL)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 600
    while not is_ready(url):
        assert server.poll() is None
        assert time.monotonic() < deadline
        time.sleep(1)
    with zipfile.ZipFile(archive) as file:
        scans = [file.read(name) for name in file.namelist()]
    for content in (*scans, b"no scan"):
        requests.post(f"{url}/v1/predictions", data=content, timeout=60)
        time.sleep(0.2)  # so that Prometheus sees it grow
    bt("scoring", "score", bundle, archive, "-o", home / "scores")
    yield
    server.terminate()
    server.wait(120)


def test_the_shipped_file_is_one_of_prometheus():
    promtool = shutil.which("promtool")
    assert promtool, "apt-get install prometheus"
    subprocess.run([promtool, "check", "config", "--lint=none", CONFIG], check=True)


def test_every_curve_of_the_dashboard_has_figures(worked, prometheus):
    deadline = time.monotonic() + 60
    empty = {title for title, _ in SHOWN}
    while empty - NOT_HERE and time.monotonic() < deadline:
        empty = {title for title, text in SHOWN if not prometheus.curves(text)}
        time.sleep(2)
    assert empty == NOT_HERE
    (scored,) = prometheus.curves("sum(ray_bt_score_scans_total)")
    assert scored["value"][1] == "40", "each scan once"
    runs = set(prometheus.ask("label/run_id/values", **{"match[]": '{__name__=~"ray_bt_.*"}'}))
    assert runs == RUNS


def test_what_has_no_figures_here_is_exported_by_ray_elsewhere():
    of_gpus = {n for title, text in SHOWN if title.startswith("GPU") for n in metrics_of(text)}
    assert {name.removeprefix("ray_") for name in of_gpus} <= METRICS_GAUGES.keys()
