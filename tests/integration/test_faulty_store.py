"""Commands from and to a bucket whose store fails now and then, or for good: the same results."""

import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile

import cv2
import pytest
from pyarrow import fs

from bt_core import storage
from bt_core.data.score_work import ScoreWork
from bt_core.models.bundle import Bundle
from bt_core.scans.phantom import phantom_slice, write_archive
from tests.conftest import SMALL, bt, bt_process
from tests.faulty_store import FaultyStore
from tests.integration.test_serve_command import Command
from tests.tiny_bundle import make_bundle

pytestmark = pytest.mark.integration
FAULTS = (500, 503, "late", "cut")
BUCKET = "s3://hospital"


@pytest.fixture(scope="module")
def store():
    server = FaultyStore()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        server.start()
        server.make_bucket("hospital")
        yield server
    server.stop()


@pytest.fixture(scope="module")
def work(ray_session, store, tmp_path_factory):
    """A folder and a bucket with the same bundle and archive, and scores of the undisturbed."""
    folder = tmp_path_factory.mktemp("work")
    make_bundle(folder / "bundle", sizes=(32,))
    pictures = [
        cv2.imencode(".png", phantom_slice("glioma", seed, 48))[1].tobytes() for seed in range(10)
    ]
    with zipfile.ZipFile(folder / "scans.zip", "w") as file:
        for i in range(1500):
            file.writestr(f"{i:04d}.png", b"broken" if i % 250 == 7 else pictures[i % 10])
    fs.copy_files(str(folder / "bundle"), f"{BUCKET}/bundle")
    storage.write_bytes(f"{BUCKET}/scans.zip", (folder / "scans.zip").read_bytes())
    assert bt("score", folder / "bundle", folder / "scans.zip", "-o", folder / "out") == 3
    return folder


def rows(location):
    """Return the rows of a finished job without what differs between two of them."""
    table = storage.read_table(f"{location}/scores")
    return table.drop_columns(["scored_at", "uri"]).sort_by("scan_id")


def test_scores_from_and_to_a_store_that_fails_are_the_same(store, work):
    out = f"{BUCKET}/out"
    with store.disturbed(0.1, *FAULTS):
        done = bt_process("score", f"{BUCKET}/bundle", f"{BUCKET}/scans.zip", "-o", out)
    assert done.returncode == 3, done.stderr
    assert rows(out).equals(rows(str(work / "out")))
    assert set(store.num_disturbed) == set(FAULTS)
    left = {name.split("/")[0] for name in storage.list_files(out)}
    assert left == {"manifest.json", "review.csv", "scores"}


def said_of(process):
    """Wait for a command that fails and return its one line."""
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    [line] = [line for line in errors.splitlines() if line.startswith("error:")]
    return line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "said"),
    [(503, "does not answer: AWS Error"), (400, "refuses node .*: AWS Error .*: give every node")],
)
def test_a_store_that_stays_away_ends_a_job_in_one_line_and_it_goes_on(
    store, work, monkeypatch, status, said
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    out = f"{BUCKET}/kept{status}"
    words = ["score", f"{BUCKET}/bundle", f"{BUCKET}/scans.zip", "-o", out]
    command = [sys.executable, "-m", "jobs.score", *words[1:]]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not ScoreWork(out).num_done() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    with store.disturbed(1.0, status):
        line = said_of(first)
    assert re.search(said, line), line
    assert line.endswith("the same command again: it goes on with what is not scored yet")
    assert 0 < ScoreWork(out).num_done() < 1500, "it was away in the middle"
    again = bt_process(*words)
    assert again.returncode == 3, again.stderr
    assert rows(out).equals(rows(str(work / "out")))
    assert storage.read_json(f"{out}/manifest.json")["attempts"] == 2


@pytest.mark.slow
def test_an_archive_that_is_away_ends_a_job_and_fails_no_scan(work, tmp_path):
    shutil.copy(work / "scans.zip", tmp_path)
    mount, away, out = tmp_path / "scans.zip", tmp_path / "away.zip", str(tmp_path / "out")
    words = ["score", work / "bundle", mount, "-o", out]
    command = [sys.executable, "-m", "jobs.score", *map(str, words[1:])]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not ScoreWork(out).is_begun() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    mount.rename(away)
    line = said_of(first)
    assert f"node {platform.node()}: {mount} is not there" in line
    assert line.endswith("the same command again: it goes on with what is not scored yet")
    assert ScoreWork(out).num_done() < 1500, "it was away before the end"
    away.rename(mount)
    assert bt_process(*words).returncode == 3
    assert rows(out).equals(rows(str(work / "out")))


@pytest.mark.slow
def test_a_store_that_refuses_ends_bt_prepare_and_no_scan_is_lost(store, tmp_path):
    write_archive(str(tmp_path / "scans.zip"), num_per_class=100, size_px=96)
    with zipfile.ZipFile(tmp_path / "scans.zip") as file:
        for name in file.namelist():
            storage.write_bytes(f"{BUCKET}/folder/{name}", file.read(name))
    words = ["prepare", f"{BUCKET}/folder", "-o", str(tmp_path / "data"), "--recipe", "cnn_small"]
    command = [sys.executable, "-m", "jobs.prepare", *words[1:]]
    store.counts.clear()
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not store.counts["GET"] and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    with store.disturbed(1.0, 403):
        line = said_of(first)
    assert f"{BUCKET} refuses node {platform.node()}: AWS Error ACCESS_DENIED" in line
    assert not (tmp_path / "data").exists()
    assert bt_process(*words).returncode == 0
    catalog = storage.read_table(str(tmp_path / "data" / "catalog.parquet"))
    assert set(catalog["reason"].to_pylist()) == {""}


@pytest.mark.slow
def test_a_bundle_in_a_store_that_fails_is_served(store, work, tmp_path):
    with store.disturbed(0.1, *FAULTS):
        server = Command(f"{BUCKET}/bundle", tmp_path / "serve.log")
        try:
            server.wait()
            assert server.bundle_id() == Bundle(str(work / "bundle")).info.bundle_id
        finally:
            assert server.stop() == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_model_from_a_store_that_fails_is_the_same(store, ray_session, tmp_path):
    """prepare, train, ensemble and score, undisturbed on a disk and disturbed in a bucket."""
    write_archive(str(tmp_path / "scans.zip"), num_per_class=20, size_px=96)
    storage.write_bytes(f"{BUCKET}/train.zip", (tmp_path / "scans.zip").read_bytes())
    two_epochs = ["--recipe", "cnn_small", *SMALL, "--set", "train.epochs=2"]
    results = []
    for archive, at, share in (
        (tmp_path / "scans.zip", str(tmp_path), 0.0),
        (f"{BUCKET}/train.zip", f"{BUCKET}/chain", 0.1),
    ):
        steps = (
            ["prepare", archive, "-o", f"{at}/data", "--recipe", "cnn_small"],
            ["train", "--data", f"{at}/data", "-o", f"{at}/run", *two_epochs],
            ["ensemble", f"{at}/run", "-o", f"{at}/bundle"],
            ["score", f"{at}/bundle", archive, "-o", f"{at}/scores"],
        )
        for words in steps:
            with store.disturbed(share, *FAULTS):
                done = bt_process(*words)
            assert done.returncode == 0, done.stderr
        catalog = storage.read_table(f"{at}/data/catalog.parquet").drop_columns(["uri"])
        weights = storage.read_bytes(f"{at}/run/model.safetensors")
        scores = rows(f"{at}/scores").drop_columns(["bundle_id"])  # it says when it was made
        results.append((catalog.sort_by("scan_id"), weights, scores))
    undisturbed, disturbed = results
    assert disturbed[0].equals(undisturbed[0])
    assert disturbed[1] == undisturbed[1]
    assert disturbed[2].equals(undisturbed[2])


@pytest.mark.slow
def test_a_sweep_whose_store_stays_away_goes_on_and_no_trial_failed(store, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    write_archive(str(tmp_path / "scans.zip"), num_per_class=20, size_px=96)
    data, out = tmp_path / "data", f"{BUCKET}/sweep"
    assert bt_process("prepare", tmp_path / "scans.zip", "-o", data).returncode == 0
    (tmp_path / "sweep.yaml").write_text(
        "recipes: [cnn_small]\nsearch: grid\nscheduler: none\nfolds: 2\n"
        "space: {train.learning_rate: {choice: [0.001, 0.003]}}\n"
        "fixed: {preprocess.size_px: 48, train.batch_size: 8, train.epochs: 4}\n"
    )
    words = ["tune", tmp_path / "sweep.yaml", "--data", data, "-o", out]
    command = [sys.executable, "-m", "jobs.tune", *map(str, words[1:])]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in first.stderr:
        if "epoch 1" in line:
            break
    with store.disturbed(1.0, 503):
        errors = first.communicate(timeout=300)[1]
    assert first.returncode == 1, errors
    assert "the same command" in errors
    again = bt_process(*words)
    assert again.returncode == 0, again.stderr
    board = storage.read_table(f"{out}/leaderboard.parquet").to_pylist()
    assert [(row["status"], row["num_epochs"]) for row in board] == [("finished", 8)] * 2
