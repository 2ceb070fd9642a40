"""Damaged input, wrong use and killed workers: a clear message, an exit code, no lost row."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from bt_core.data import pipeline
from bt_core.data.catalog import Dataset, ref_columns
from bt_core.data.decode_stage import DecodeStage
from bt_core.data.views import ensure_view
from bt_core.models.run import Run, read_history
from bt_core.scans.archives import list_scans
from bt_core.scans.phantom import phantom_slice
from bt_core.scans.preprocess import PreprocessSpec
from tests.conftest import SMALL, bt, bt_process
from tests.tiny_bundle import make_bundle, with_subsets

pytestmark = pytest.mark.integration


def png(seed=0):
    import cv2

    return cv2.imencode(".png", phantom_slice("glioma", seed, 96))[1].tobytes()


def jpeg():
    import cv2

    return cv2.imencode(".jpg", phantom_slice("glioma", 1, 96))[1].tobytes()


def test_bad_files_are_rows_with_reasons_and_exit_code_3(chain, tmp_path, capfd):
    archive = tmp_path / "mixed.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("good.png", png())
        file.writestr("truncated.jpg", jpeg()[:-400])
        file.writestr("empty.png", b"")
        file.writestr("text.png", b"not a picture at all")
        file.writestr("tiny.png", __import__("cv2").imencode(".png", np.eye(8, dtype=np.uint8))[1])
        file.writestr("__MACOSX/._good.png", b"resource fork")
    assert bt("score", chain.bundle, archive, "-o", tmp_path / "out") == 3
    rows = {r["member"]: r for r in pq.read_table(tmp_path / "out" / "scores").to_pylist()}
    assert rows["good.png"]["status"] in ("scored", "deferred")
    found = {m: (r["status"], r["reason"]) for m, r in rows.items() if m != "good.png"}
    assert found == {
        "truncated.jpg": ("failed", "truncated_image"),
        "empty.png": ("failed", "empty_file"),
        "text.png": ("rejected", "unsupported_type"),
        "tiny.png": ("rejected", "image_too_small"),
    }
    assert rows["empty.png"]["predicted_label"] is None
    summary = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert summary["n_in"] == 5
    assert summary["skipped_files"] == {"system file": 1}
    assert summary["skipped_names"] == {"__MACOSX/._good.png": "system file"}
    assert summary["members_left_out"] == {}
    assert "5 scans = " in capfd.readouterr().out


def test_a_damaged_member_is_left_out_and_stands_in_the_manifest(ray_session, tmp_path, capfd):
    with_subsets(tmp_path / "bundle")
    weights = tmp_path / "bundle" / "members" / "m1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    (tmp_path / "good.png").write_bytes(png())
    out = tmp_path / "out"
    code = bt("score", tmp_path / "bundle", tmp_path / "good.png", "-o", out)
    printed = capfd.readouterr()
    assert code == 0, printed.err
    summary = json.loads((out / "manifest.json").read_text())
    assert list(summary["members_left_out"]) == ["m1"]
    assert "differs from its digest" in summary["members_left_out"]["m1"]
    assert "m1 did not answer" in printed.out


def test_the_scores_of_another_job_are_not_overwritten(ray_session, tmp_path):
    """A finished job in a subfolder that is named as its rows would be."""
    make_bundle(tmp_path / "bundle", sizes=(32,))
    (tmp_path / "good.png").write_bytes(png())
    words = ("score", tmp_path / "bundle", tmp_path / "good.png", "-o")
    assert bt(*words, tmp_path / "runs" / "scores") == 0
    assert bt(*words, tmp_path / "runs") == 2
    assert bt(*words, tmp_path / "runs", "--overwrite") == 2
    assert (tmp_path / "runs" / "scores" / "manifest.json").exists()
    assert (tmp_path / "runs" / "scores" / "scores" / "part-00000.parquet").exists()


def test_prepare_keeps_corrupt_files_and_conflicts_with_a_reason(ray_session, tmp_path):
    root = tmp_path / "set"
    for label, offset in (("glioma", 0), ("notumor", 100)):
        (root / label).mkdir(parents=True)
        for i in range(8):
            (root / label / f"{i}.png").write_bytes(png(offset + i))
    (root / "glioma" / "cut.png").write_bytes(png()[:500])
    (root / "glioma" / "same.png").write_bytes(png(999))
    (root / "notumor" / "same.png").write_bytes(png(999))
    assert bt("prepare", root, "-o", tmp_path / "data") == 3
    table = pq.read_table(tmp_path / "data" / "catalog.parquet")
    catalog = {r["member"]: r for r in table.to_pylist()}
    assert len(catalog) == 19
    assert catalog["glioma/cut.png"]["reason"] in ("truncated_image", "corrupt_image")
    assert catalog["glioma/same.png"]["reason"] == "label_conflict"
    assert catalog["notumor/same.png"]["reason"] == "label_conflict"
    assert {r["split"] for r in catalog.values() if r["reason"]} == {""}


def wrong_uses(chain, tmp_path):
    empty = tmp_path / "empty.zip"
    zipfile.ZipFile(empty, "w").close()
    strange = tmp_path / "strange"
    (strange / "metastasis").mkdir(parents=True)
    (strange / "metastasis" / "a.png").write_bytes(png())
    missing = tmp_path / "missing_file"
    shutil.copytree(chain.bundle, missing)
    (missing / "members" / "cnn_small" / "model.safetensors").unlink()
    changed = tmp_path / "changed"
    shutil.copytree(chain.bundle, changed)
    weights = changed / "members" / "cnn_small" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    edited = tmp_path / "edited"
    shutil.copytree(chain.bundle, edited)
    info = json.loads((edited / "bundle.json").read_text())
    info["review"]["min_confidence"] = 0.0
    (edited / "bundle.json").write_text(json.dumps(info))
    out = tmp_path / "out"
    train = ["train", "--data", chain.data, "-o", out]
    return {
        "empty archive": (["score", chain.bundle, empty, "-o", out], "holds no scans"),
        "no such source": (["prepare", tmp_path / "nowhere", "-o", out], "does not exist"),
        "unknown class": (["prepare", strange, "-o", out], "metastasis"),
        "unknown key": ([*train, "--recipe", "cnn_small", "--set", "train.epoch=3"], "'epochs'"),
        "unknown recipe": ([*train, "--recipe", "resnet"], "cnn_small, explained_baseline"),
        "unknown backbone": (
            [*train, "--recipe", "mobilenetv2", "--set", "model.backbone=mobilenetv9"],
            "mobilenetv9",
        ),
        "no weights folder": (
            [*train, "--recipe", "mobilenetv2", "--set", f"model.weights=local-dir:{tmp_path}"],
            "hub or none",
        ),
        "hub without internet": ([*train, "--recipe", "mobilenetv2"], "local-dir:PATH"),
        "missing bundle": (["score", tmp_path / "nothing", empty, "-o", out], "not a bundle"),
        "missing bundle file": (["score", missing, chain.archive, "-o", out], "is missing"),
        "changed byte": (["score", changed, chain.archive, "-o", out], "differs from its digest"),
        "edited bundle.json": (["score", edited, chain.archive, "-o", out], "was changed"),
        "no dataset": (["train", "--recipe", "cnn_small", "--data", tmp_path], "bt prepare"),
        "no run": (["ensemble", tmp_path, "-o", out], "not a finished run"),
        "no GPU": (
            ["score", chain.bundle, chain.archive, "-o", out, "--device", "cuda"],
            "the cluster has 0",
        ),
        "bad device": (
            ["score", chain.bundle, chain.archive, "-o", out, "--device", "gpu"],
            "auto, cpu or cuda",
        ),
        "too many workers": (
            [*train, "--recipe", "cnn_small", "--num-workers", 99],
            "the cluster has 2 CPUs",
        ),
        "no such split": (["prepare", chain.archive, "-o", out, "--split", "official"], "or given"),
        "two splits": (
            ["prepare", chain.archive, "-o", out, "--split", "given", "--keep-splits", chain.data],
            "no effect",
        ),
        "empty source": (["audit", "", "-o", out], "SOURCE is empty"),
        "output in the source": (
            ["explore", missing, "-o", missing / "out"],
            "is or lies in the source",
        ),
        "output is a file": (["prepare", chain.archive, "-o", empty], "is a file"),
        "no GPU for a run": (
            [*train, "--recipe", "cnn_small", "--device", "cuda"],
            "the cluster has 0",
        ),
        "no such task": (["audit", chain.archive, "-o", out, "--task", "three"], "or binary"),
        "no docket": (["prepare", chain.archive, "-o", out, "--resolve", empty], "no column"),
        "wrong task": ([*train, "--recipe", "cnn_small", "--set", "task=binary"], "four_class"),
    }


def test_wrong_use_is_one_line_and_exit_code_2(chain, tmp_path, capfd):
    for name, (words, expected) in wrong_uses(chain, tmp_path).items():
        capfd.readouterr()
        code = bt(*words)
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert code == 2, name
        assert len(errors) == 1, name
        assert expected in errors[0], name
        assert not (tmp_path / "out" / "scores").exists(), name


def test_a_source_that_changed_since_prepare_is_noticed(chain, tmp_path, capfd):
    data, source = tmp_path / "data", tmp_path / "scans.zip"
    shutil.copytree(chain.data, data)
    with zipfile.ZipFile(chain.archive) as old, zipfile.ZipFile(source, "w") as new:
        members = {name: old.read(name) for name in old.namelist()}
        for name, content in zip(members, reversed(members.values()), strict=True):
            new.writestr(name, content)
    table = pq.read_table(data / "catalog.parquet")
    moved = pa.array([str(source)] * table.num_rows)
    table = table.set_column(table.schema.get_field_index("uri"), "uri", moved)
    pq.write_table(table, data / "catalog.parquet")
    assert bt("evaluate", chain.bundle, "--data", data, "-o", tmp_path / "out") == 2
    assert "the source has changed" in capfd.readouterr().err
    assert not (tmp_path / "out" / "metrics.json").exists()
    views = sorted((data / "views").iterdir())
    with pytest.raises(ray.exceptions.RayTaskError, match="prepare it again"):
        ensure_view(Dataset(str(data)), PreprocessSpec(size_px=36))
    assert sorted((data / "views").iterdir()) == views, "no half of a view is left"


def test_overwrite_removes_nothing_but_what_the_command_wrote(chain, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for words in (
        ["train", "--recipe", "cnn_small", "--data", chain.data, *SMALL],
        ["ensemble", chain.runs[0]],
        ["prepare", tmp_path / "nowhere.zip"],
        ["demo", "--out", tmp_path / "mine"],
    ):
        overwrite = [] if words[0] == "demo" else ["-o", tmp_path / "mine", "--overwrite"]
        assert bt(*words, *overwrite) == 2, words
    assert (tmp_path / "mine" / "thesis.txt").exists()
    again = ["train", "--recipe", "cnn_small", "--data", chain.data, "-o", chain.runs[0]]
    assert bt(*again, "--overwrite", "--device", "cuda") == 2
    assert (chain.runs[0] / "run.json").exists(), "a wrong device does not cost the run"
    nowhere = tmp_path / "nowhere.zip"
    assert bt("prepare", nowhere, "-o", chain.data, "--overwrite") == 2
    assert (chain.data / "dataset.json").exists(), "a wrong source does not cost the dataset"
    assert bt("evaluate", chain.bundle, "--data", chain.data, "-o", chain.scores) == 2
    assert (chain.scores / "scores").exists()


def test_a_demo_that_cannot_reach_its_end_costs_no_earlier_one(tmp_path, capfd):
    cats, earlier = tmp_path / "scans" / "cats" / "a.png", tmp_path / "demo" / ".bt-demo"
    for path in (cats, earlier):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"something")
    (tmp_path / "link").symlink_to(earlier.parent)
    for words, said in (
        (["--data", tmp_path / "scans"], "unknown class folder 'cats'"),
        (["--weights", f"local-dir:{tmp_path / 'nowhere'}"], "is not a timm folder"),
        (["--data", tmp_path / "link" / ".bt-demo"], "which the demo clears"),
    ):
        assert bt("demo", "--out", earlier.parent, *words) == 2
        assert said in capfd.readouterr().err
        assert earlier.read_bytes() == b"something", words


class DeadlyStage(DecodeStage):
    """A decoder that ends its process on one scan, as a bug in a native codec would."""

    def process(self, row):
        if row["member"].endswith("deadly.png"):
            os._exit(139)
        return super().process(row)


def test_a_scan_that_kills_its_worker_twice_is_set_aside_and_no_other(ray_session, tmp_path):
    ray.cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["x"]))
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    (tmp_path / "deadly.png").write_bytes(png(50))
    refs = pa.table(ref_columns(list_scans(str(tmp_path)).refs))
    rows = pipeline.decode(refs, DeadlyStage()).take_all()
    reasons = {row["member"]: row["reason"] for row in rows}
    assert len(rows) == 11
    assert {m: r for m, r in reasons.items() if r} == {"deadly.png": "decoder_crashed"}


EIGHT_EPOCHS = ("--recipe", "cnn_small", *SMALL, "--set", "train.epochs=8", "--set",
                "preprocess.size_px=64")  # fmt: skip


@pytest.fixture(scope="module")
def survivor(chain, tmp_path_factory):
    """A run whose worker was killed in the middle of an epoch."""
    run = tmp_path_factory.mktemp("survivor") / "run"
    killed = []

    def kill_one_worker_after_the_first_epoch():
        history = run / "history.jsonl"
        deadline = time.monotonic() + 120
        while not history.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        for process in psutil.Process().children(recursive=True):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)
                return

    killer = threading.Thread(target=kill_one_worker_after_the_first_epoch)
    killer.start()
    code = bt("train", *EIGHT_EPOCHS, "--data", chain.data, "-o", run)
    killer.join()
    assert code == 0
    assert len(killed) == 1, "the worker was there to be killed"
    return run


def test_a_training_worker_killed_in_mid_epoch_does_not_end_the_run(survivor):
    epochs = [figures["epoch"] for figures in Run(str(survivor)).history()]
    assert epochs == list(range(1, 9))
    assert 8 in whole_checkpoints(survivor)


def test_a_killed_train_command_goes_on_where_it_was(chain, survivor, tmp_path):
    """The whole process dies; the same command, given again, begins after its last epoch."""
    out = tmp_path / "run"
    words = ["train", *EIGHT_EPOCHS, "--data", chain.data, "-o", out]
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": address}
    command = [sys.executable, "-m", "jobs.train", *map(str, words[1:])]
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while len(read_history(str(out))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    first.kill()
    first.wait()
    before = read_history(str(out))
    assert 2 <= len(before) < 8, "it was killed in the middle"
    again = bt_process(*words, env=environment)
    assert again.returncode == 0, again.stderr
    assert "going on after epoch" in again.stderr
    history = Run(str(out)).history()
    assert [figures["epoch"] for figures in history] == list(range(1, 9))
    assert history[0] == before[0], "the first epoch was not trained again"
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, survivor)]
    assert weights[0] == weights[1], "neither interruption left a trace in the weights"


def whole_checkpoints(out):
    """Read every checkpoint of a run; return the epochs that each was trained for."""
    folders = sorted((out / "checkpoints").glob("*/"))
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in folders]
    assert all(pq.read_table(folder / "validation.parquet").num_rows for folder in folders)
    assert not list(out.rglob("*.tmp"))
    return [len(state["history"]) for state in states]


def test_a_full_disk_costs_no_checkpoint_and_the_run_goes_on(chain, small_disk, capfd):
    out = small_disk / "run"
    words = ["train", "--recipe", "cnn_small", "--data", chain.data, *SMALL]
    words += ["--set", "train.epochs=3", "-o", out]
    assert bt(*words) == 1
    errors = [e for e in capfd.readouterr().err.splitlines() if e.startswith("error:")]
    assert len(errors) == 1
    assert "cannot be written" in errors[0]
    assert "No space left on device" in errors[0]
    assert "make room, and the same command goes on" in errors[0]
    assert whole_checkpoints(out) == [1]
    before = read_history(str(out))
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert bt(*words) == 0
    history = Run(str(out)).history()
    assert len(history) == 3
    assert history[0] == before[0], "the first epoch was not trained again"


@pytest.mark.slow
def test_a_diverging_run_ends_at_once_and_keeps_the_last_good_checkpoint(chain, tmp_path, capfd):
    out = tmp_path / "run"
    stages = "[{epochs: 1}, {epochs: 2, learning_rate: 1.0e+30, schedule: constant}]"
    code = bt(
        "train", "--recipe", "cnn_small", "--data", chain.data, *SMALL, "--set",
        "train.optimizer=sgd", "--set", f"train.stages={stages}", "--set", "train.epochs=3",
        "-o", out,
    )  # fmt: skip
    errors = [e for e in capfd.readouterr().err.splitlines() if e.startswith("error:")]
    assert code == 1
    assert len(errors) == 1
    assert "epoch 2" in errors[0]
    assert "lower learning_rate of that stage (1e+30)" in errors[0]
    assert whole_checkpoints(out) == [1]


LOSE_A_NODE = """
import sys
import numpy as np
import ray
from ray.cluster_utils import Cluster
from bt_core.data import decode_guard
from bt_core.data.catalog import Dataset, ref_columns
from bt_core.data.decode_stage import DecodeStage
from bt_core.data.views import ensure_view
from bt_core.scans.archives import list_scans
from bt_core.scans.preprocess import PreprocessSpec

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
node = cluster.add_node(num_cpus=1, resources={"other": 1})
ray.init(address=cluster.address)
refs = ref_columns(list_scans(sys.argv[1]).refs)
columns = {name: np.array(values) for name, values in refs.items()}
stage = DecodeStage((PreprocessSpec(size_px=512),))  # large enough for the object store
task = decode_guard._run_stage.options(resources={"other": 1}).remote(stage, columns)
ray.wait([task], fetch_local=False)
cluster.remove_node(node)
try:
    ray.get(task)
except ray.exceptions.ObjectLostError:
    print("lost")
rows = decode_guard._outcome(task, columns, stage)
print("again", rows["scan_id"].tolist() == refs["scan_id"], set(rows["reason"].tolist()))
"""


@pytest.mark.slow
def test_rows_that_are_lost_with_their_node_are_made_again(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    command = [sys.executable, "-c", LOSE_A_NODE, str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert "lost\nagain True {''}" in result.stdout, result.stderr
