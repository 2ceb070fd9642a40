"""The hosted ensemble under load: killed, swapped, shadowed, and asked by jobs."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pyarrow.parquet as pq
import pytest
import requests

from bt_core.models.bundle import Bundle
from bt_core.scans.phantom import encode_picture, phantom_slice
from serve.app import start, swap
from serve.settings import EnsembleSettings, ServeSettings
from tests.conftest import bt
from tests.tiny_bundle import make_bundle

pytestmark = pytest.mark.integration
SCANS = [encode_picture(phantom_slice("glioma", seed, 96), ".png") for seed in range(8)]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Two bundles that answer otherwise, and one whose weights are damaged."""
    folder = tmp_path_factory.mktemp("bundles")
    make_bundle(folder / "one", sizes=(32,))
    make_bundle(folder / "two", sizes=(48,))
    make_bundle(folder / "damaged", sizes=(40,))
    weights = folder / "damaged" / "members" / "m0" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    return folder


@pytest.fixture(scope="module")
def url(ray_session, bundles):
    from ray import serve

    from cluster.local import free_port

    yield start(ServeSettings(bundle=str(bundles / "one")), free_port())
    serve.shutdown()


@pytest.fixture(scope="module")
def expected(bundles):
    """The probabilities of each scan by each bundle, from a process without Serve."""
    from bt_core.ensemble.ensemble import Ensemble
    from serve.decoding import decode_upload

    found = {}
    for name in ("one", "two"):
        ensemble = Ensemble(Bundle(str(bundles / name)), cascade=True)
        decoded = [decode_upload(content, "", ensemble.specs) for content in SCANS]
        found[ensemble.info.bundle_id] = [
            ensemble.answer([p[None] for p in pixels], [digest], [gate])[0]["probabilities"]
            for pixels, digest, _, gate, _ in decoded
        ]
    return found


class Load:
    """Clients that ask without a pause while a block runs; what they got is kept."""

    def __init__(self, url, num_clients=4):
        self._url, self._num = url, num_clients
        self._stop = threading.Event()
        self.answers = []

    def _ask(self, first):
        i = first
        while not self._stop.is_set():
            i = (i + 1) % len(SCANS)
            answer = requests.post(f"{self._url}/v1/predictions", data=SCANS[i], timeout=60)
            self.answers.append((i, answer.status_code, answer.text))

    def __enter__(self):
        self._pool = ThreadPoolExecutor(self._num)
        self._clients = [self._pool.submit(self._ask, i) for i in range(self._num)]
        self._wait_for(20)
        return self

    def __exit__(self, *_):
        self._wait_for(len(self.answers) + 20)
        self._stop.set()
        for client in self._clients:
            client.result(timeout=120)
        self._pool.shutdown()

    def _wait_for(self, num):
        deadline = time.monotonic() + 120
        while len(self.answers) < num and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(self.answers) >= num

    def failed(self):
        return [(status, text) for _, status, text in self.answers if status != 200]

    def wrong(self, expected):
        results = [
            (i, json.loads(text)["results"][0]) for i, code, text in self.answers if code == 200
        ]
        return [r for i, r in results if r["probabilities"] != expected[r["bundle_id"]][i]]


def replica_pids(name):
    return [
        p.pid
        for p in psutil.process_iter(["cmdline"])
        if any(f"ServeReplica:{name}" in word for word in p.info["cmdline"] or ())
    ]


def test_a_replica_killed_under_load_costs_no_answer(url, expected):
    (pid,) = replica_pids(f"bt-{next(iter(expected))}")
    with Load(url, 12) as load:  # so many that scans of several requests go together
        os.kill(pid, signal.SIGKILL)
    assert len(load.answers) > 40
    assert load.failed() == []
    assert load.wrong(expected) == []


def test_each_scan_of_a_batch_gets_its_own_answer(url, expected):
    wanted = next(iter(expected.values()))
    order = [i for i in range(len(SCANS)) for _ in range(4)]
    files = [("files", (f"{n}.png", SCANS[i])) for n, i in enumerate(order)]
    found = requests.post(f"{url}/v1/predictions", files=files, timeout=60).json()["results"]
    assert len({str(probs) for probs in wanted}) == len(SCANS)
    assert [result["probabilities"] for result in found] == [wanted[i] for i in order]


@pytest.mark.slow
def test_what_cannot_be_asked_changes_nothing(url, bundles, expected, monkeypatch):
    """As when the gateways that would ask it cannot start."""
    from bt_core.errors import RunError
    from serve import app

    opened = app._deploy

    def elsewhere(settings):
        return opened(settings).model_copy(update={"bundle": str(bundles / "gone")})

    monkeypatch.setattr(app, "_deploy", elsewhere)
    one, _ = expected
    with Load(url) as load, pytest.raises(RunError, match="goes on answering"):
        swap(EnsembleSettings(bundle=str(bundles / "two")))
    assert load.failed() == []
    assert load.wrong(expected) == []
    assert requests.get(f"{url}/v1/model", timeout=60).json()["bundle_id"] == one


def test_a_damaged_bundle_changes_nothing(url, bundles, expected):
    from bt_core.errors import BundleError

    with Load(url) as load, pytest.raises(BundleError, match="differs from its digest"):
        swap(EnsembleSettings(bundle=str(bundles / "damaged")))
    assert load.failed() == []
    assert load.wrong(expected) == []


def test_a_swap_under_load_costs_no_answer(url, bundles, expected):
    one, two = expected
    with Load(url) as load:
        assert swap(EnsembleSettings(bundle=str(bundles / "two"))) == (one, two)
    assert load.failed() == []
    assert load.wrong(expected) == []
    told = [json.loads(text)["results"][0]["bundle_id"] for *_, text in load.answers]
    assert {told[0], told[-1]} == {one, two}
    assert requests.get(f"{url}/v1/model", timeout=60).json()["bundle_id"] == two
    assert swap(EnsembleSettings(bundle=str(bundles / "one"))) == (two, one)


def test_a_job_asks_the_hosted_ensemble_and_gets_the_same_rows(url, bundles, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for i, content in enumerate([*SCANS, b"broken"]):
        (folder / f"{i}.png").write_bytes(content)
    with Load(url, 1) as load:
        assert bt("score", bundles / "one", folder, "-o", tmp_path / "a", "--via", "serve") == 3
    assert load.failed() == []
    assert bt("score", bundles / "one", folder, "-o", tmp_path / "b") == 3
    hosted, own = (
        pq.read_table(tmp_path / name / "scores").drop_columns(["scored_at"]) for name in "ab"
    )
    assert hosted.equals(own)
    code = bt("score", bundles / "two", folder, "-o", tmp_path / "c", "--via", "serve")
    assert code == 2, "it is not what is hosted"


def test_figures_of_the_replicas_are_exported(url):
    """Ray hands them on every few seconds."""
    post = requests.post(f"{url}/v1/predictions", data=b"no scan", timeout=60)
    assert post.status_code == 415
    wanted = ('reason="unsupported_type"', "ray_bt_stage_seconds_bucket{", "ray_serve_")
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        text = requests.get(f"{url}/metrics", timeout=60).text
        if all(word in text for word in wanted):
            return
        time.sleep(2)
    raise AssertionError(text[-2000:])
