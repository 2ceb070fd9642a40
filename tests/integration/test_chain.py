"""The whole chain on synthetic scans, through the real commands."""

import io
import json
import re
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
import torch

from bt_core import storage
from bt_core.data.catalog import Dataset
from bt_core.data.seal import openings
from bt_core.data.views import find_view, read_view
from bt_core.labels import LABEL_SPACES
from bt_core.log import run_id
from bt_core.models.bundle import Bundle
from bt_core.models.classifier import rebuild_classifier
from bt_core.models.inputs import Preprocessor
from bt_core.models.run import Run
from bt_core.scans.phantom import phantom_slice
from bt_core.scans.preprocess import PreprocessSpec
from tests.conftest import SMALL, bt

pytestmark = pytest.mark.integration
SPACE = LABEL_SPACES["four_class"]


def rows(path, **options):
    return pq.read_table(path, partitioning=None, **options).to_pylist()


def test_the_catalog_has_one_row_for_each_file_and_copies_stay_together(chain):
    catalog = rows(chain.data / "catalog.parquet")
    assert len(catalog) == 80
    assert len({row["scan_id"] for row in catalog}) == 80
    assert Counter(row["label"] for row in catalog) == {
        "glioma": 20, "meningioma": 20, "no_tumor": 20, "pituitary": 20
    }  # fmt: skip
    assert {row["format"] for row in catalog} == {"PNG", "JPEG", "DICOM"}
    splits_of_pixels = {}
    for row in catalog:
        splits_of_pixels.setdefault(row["pixel_sha256"], set()).add(row["split"])
    assert len(splits_of_pixels) < 80, "the archive has planted copies"
    assert all(len(splits) == 1 for splits in splits_of_pixels.values())
    info = Dataset(str(chain.data)).info
    assert {s: sum(c.values()) for s, c in info.counts.items()} == Counter(
        row["split"] for row in catalog
    )


def test_shards_hold_every_scan_of_a_split_once_in_mixed_order(chain, ray_session):
    specs = [PreprocessSpec(**Run(str(run)).info.recipe["preprocess"]) for run in chain.runs]
    [(view, is_there)] = {find_view(Dataset(str(chain.data)), spec) for spec in specs}
    assert is_there, "both runs share it"
    assert not Path(view, "split=test").exists(), "test scans are sealed"
    for split in ("train", "validation"):
        shards = read_view(view, split).take_all()
        expected = Dataset(str(chain.data)).split(split)["scan_id"].to_pylist()
        assert sorted(row["scan_id"] for row in shards) == sorted(expected)
        assert {row["pixels"].shape for row in shards} == {(48, 48)}
    labels = [row["label"] for row in read_view(view, "train").take_all()]
    assert len(set(labels[:12])) > 2, "shards are not sorted by class"


def test_a_run_is_complete_and_validates_every_validation_scan(chain):
    run = Run(str(chain.runs[0]))
    validation = run.validation()
    expected = Dataset(str(chain.data)).split("validation")["scan_id"].to_pylist()
    assert validation["scan_id"].to_pylist() == sorted(expected)
    history = run.history()
    assert [figures["epoch"] for figures in history] == [1, 2, 3]
    assert all(figures["val_scans"] == len(expected) for figures in history)
    best = max(history, key=lambda figures: figures["val_score"])
    assert run.info.kept_epoch == best["epoch"]
    predicted = [
        max(range(4), key=logits.__getitem__) for logits in validation["logits"].to_pylist()
    ]
    right = sum(p == t for p, t in zip(predicted, validation["label"].to_pylist(), strict=True))
    assert right / len(expected) == pytest.approx(best["val_accuracy"])
    assert (chain.runs[0] / "curves.png").stat().st_size > 5_000
    assert (chain.runs[0] / "recipe.json").exists()


def test_the_bundle_holds_both_members_without_a_pickle_or_a_path(chain):
    bundle = Bundle(str(chain.bundle))
    members = ["mobilenetv2", "cnn_small"]
    assert [m.name for m in bundle.info.members] == members, "the cheaper one first"
    assert [m.weight for m in bundle.info.members] == [0.5, 0.5]
    suffixes = {p.suffix for p in chain.bundle.rglob("*") if p.is_file()}
    assert suffixes == {".json", ".safetensors", ".md"}
    for path in chain.bundle.rglob("*.*"):
        if path.suffix in (".json", ".md"):
            assert str(chain.root) not in path.read_text()
    card = (chain.bundle / "MODEL_CARD.md").read_text()
    assert "Not a medical device" in card
    assert "none with a copy in training" in card, "bt evaluate has put its figures there"


def test_the_report_agrees_with_its_own_predictions(chain):
    metrics = json.loads((chain.report / "metrics.json").read_text())
    truth = {
        row["scan_id"]: row["label"]
        for row in rows(chain.data / "catalog.parquet")
        if row["split"] == "test"
    }
    predictions = rows(chain.report / "predictions.parquet")
    assert {row["scan_id"] for row in predictions} == set(truth)
    right = sum(row["predicted_label"] == truth[row["scan_id"]] for row in predictions)
    accuracy = metrics["all"]["by_scan"]["accuracy"]
    assert accuracy["value"] == pytest.approx(right / len(truth))
    assert accuracy["low"] < accuracy["value"] < accuracy["high"] or right == len(truth)
    assert metrics["clean"]["num_scans"] == len(truth), "no test scan was trained on"
    page = (chain.report / "report.html").read_text()
    assert f"{100 * metrics['clean']['by_scan']['accuracy']['value']:.1f} % accuracy" in page
    families = {row["group"] for row in predictions}
    assert metrics["clean"]["num_families"] == len(families)
    assert "not a medical device" in page
    opening = openings(str(chain.data))[0]
    assert (opening.command, opening.dataset_digest) == ("evaluate", metrics["dataset_digest"])
    assert opening.bundle_id == metrics["bundle_id"]
    assert metrics["num_test_openings"] == 1
    assert page.count("<img") == len(list(chain.report.glob("*.png"))) >= 7
    assert "Where it looks" in page
    assert metrics["explanations"]["num"] > 0
    text = re.sub(r"data:image/png;base64,[\w+/=]+", "", page.split("<body>")[1])
    assert "http" not in text, "the page needs no network"


def test_every_scan_of_an_archive_is_explained_or_has_its_reason(chain, tmp_path, capfd):
    source, out = tmp_path / "scans", tmp_path / "out"
    source.mkdir()
    for seed, label in enumerate(("glioma", "no_tumor")):
        cv2.imwrite(str(source / f"{label}.png"), phantom_slice(label, seed, 96))
    (source / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert bt("explain", chain.bundle, source, "-o", out) == 3
    assert "2 of 3 scans explained" in capfd.readouterr().out
    found = rows(out / "explanations.parquet")
    assert sorted(bool(row["reason"]) and not row["method"] for row in found) == [
        False,
        False,
        True,
    ]
    assert len(list((out / "overlays").glob("*.png"))) == 2
    picture = tmp_path / "one.png"
    assert bt("explain", chain.bundle, source / "glioma.png", "-o", picture) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert bt("explain", chain.bundle, source / "glioma.png", "-o", picture) == 2
    assert bt("explain", chain.bundle, source, "-o", tmp_path / "many.png") == 2


def test_external_scans_and_several_models_say_what_was_seen_in_training(chain, tmp_path, capfd):
    source, out = tmp_path / "elsewhere", tmp_path / "out"
    for seed in range(3):
        for label in SPACE.names:
            (source / label).mkdir(parents=True, exist_ok=True)
            scan = phantom_slice(label, 900 + seed, 96)
            cv2.imwrite(str(source / label / f"{seed}.png"), scan)
    trained = Dataset(str(chain.data)).split("train").to_pylist()
    known = next(row for row in trained if row["format"] == "PNG")
    with zipfile.ZipFile(chain.archive) as archive:
        content = archive.read(known["member"])
    (source / known["label"] / "known.png").write_bytes(content)
    mirrored = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE)[:, ::-1]
    cv2.imwrite(str(source / known["label"] / "mirrored.jpg"), mirrored)
    (source / "glioma" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    words = ("evaluate", chain.bundle, chain.runs[0], "--data", source, "-o", out)
    assert bt(*words, "--no-depth", "--require", "all.num_scans>=14") == 3
    said = capfd.readouterr().out
    assert said.count("required all.num_scans >= 14: 14.0000, met") == 2
    assert "not looked for" not in said, "the bundles know copies of their training scans"
    assert "bundle - cnn_small: accuracy" in said or "cnn_small - bundle: accuracy" in said
    assert len(json.loads((out / "comparison.json").read_text())["models"]) == 2
    for name in ("bundle", "cnn_small"):
        metrics = json.loads((out / name / "metrics.json").read_text())
        assert metrics["all"]["num_scans"] == 14
        assert metrics["clean"]["num_scans"] == 12, "the mirrored one stands with the known one"
        assert metrics["flow"]["num_scans"] == 15
        page = (out / name / "report.html").read_text()
        assert "2 of 14 were trained on" in page
        assert "not looked for" not in page
    assert Bundle(str(out / "bundles" / "cnn_small")).info.members[0].name == "cnn_small"
    assert bt(*words, "--no-depth") == 2, "reports are not overwritten"
    (source / known["label"] / "known.png").unlink()
    words = ("evaluate", chain.bundle, "--data", source, "-o", tmp_path / "again", "--no-depth")
    assert bt(*words, "--trained-on", chain.data) == 3
    metrics = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert (metrics["all"]["num_scans"], metrics["clean"]["num_scans"]) == (13, 12)
    assert "not looked for" not in (tmp_path / "again" / "report.html").read_text()
    assert bt("evaluate", chain.bundle, "--data", source, "-o", source / "in") == 2


def test_reports_are_held_against_each_other_and_against_a_requirement(chain, tmp_path, capfd):
    twin, out = tmp_path / "twin", tmp_path / "out.json"
    shutil.copytree(chain.report, twin)
    assert bt("compare", chain.report, twin, "-o", out, "--require", "num_scans>=1") == 0
    said = capfd.readouterr().out
    assert "tied" in said
    assert "required num_scans >= 1" in said
    assert json.loads(out.read_text())["pairs"][0]["p_value"] == 1.0
    too_much = ["--require", "difference.accuracy.low>=0.1"]
    assert bt("compare", chain.report, twin, *too_much) == 1
    assert "NOT MET" in capfd.readouterr().out
    again = ["--prevalence", "glioma=0.1,meningioma=0.1,no_tumor=0.7,pituitary=0.1"]
    assert bt("report", twin, *again) == 0
    assert "ppv at prevalence" in (twin / "report.html").read_text()
    before, after = (json.loads((p / "metrics.json").read_text()) for p in (chain.report, twin))
    assert before["all"]["by_scan"].items() <= after["all"]["by_scan"].items()
    assert bt("report", tmp_path) == 2
    assert bt("compare", chain.report, tmp_path) == 2
    assert bt("compare", chain.report, chain.report) == 2


def test_scores_account_for_every_scan_and_know_what_was_trained_on(chain):
    summary = json.loads((chain.scores / "manifest.json").read_text())
    statuses = ("scored", "deferred", "rejected", "failed")
    assert summary["n_in"] == 80 == sum(summary[status] for status in statuses)
    scores = {row["scan_id"]: row for row in rows(chain.scores / "scores")}
    assert len(scores) == 80
    data = Dataset(str(chain.data))
    training = {i for s in ("train", "validation") for i in data.split(s)["scan_id"].to_pylist()}
    assert {i for i, row in scores.items() if row["seen_in_training"]} == training
    names = ("glioma", "meningioma", "no_tumor", "pituitary")
    for row in scores.values():
        probs = {name: row[f"prob_{name}"] for name in names}
        assert sum(probs.values()) == pytest.approx(1)
        assert row["predicted_label"] == max(probs, key=probs.get)
        assert row["confidence"] == max(probs.values())
        assert row["predicted_label"] in row["prediction_set"]
        assert row["members_used"] == ["mobilenetv2", "cnn_small"]
        assert row["runtimes"] == ["torch fp32"] * 2
        assert (row["nearest_family"] is not None) == row["seen_in_training"]
        assert 0 < row["nearest_correlation"] <= 1
        assert row["distance"] > 0
    schema = pq.read_schema(next((chain.scores / "scores").glob("*.parquet")))
    assert not any("extension" in str(field.type) for field in schema)


def test_all_that_a_command_leaves_names_its_run(chain):
    own = run_id()  # of all commands of this process
    assert json.loads((chain.scores / "manifest.json").read_text())["run_ids"] == [own]
    assert Run(str(chain.runs[0])).info.run_ids == (own,)
    assert json.loads((chain.report / "metrics.json").read_text())["run_id"] == own
    assert f"<code>{own}</code>" in (chain.report / "report.html").read_text()
    for path in (*chain.scores.glob("scores/*.parquet"), chain.report / "predictions.parquet"):
        assert pq.read_schema(path).metadata[b"bt_run_id"] == own.encode()


def test_a_second_run_is_refused_and_overwrite_is_explicit(chain, capsys):
    assert bt("score", chain.bundle, chain.archive, "-o", chain.scores) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert bt("prepare", chain.archive, "-o", chain.data) == 2
    assert bt("ensemble", chain.runs[0], "-o", chain.bundle) == 2
    assert bt("evaluate", chain.bundle, "--data", chain.data, "-o", chain.report) == 2
    command = ["train", "--recipe", "cnn_small", "--data", chain.data, *SMALL]
    assert bt(*command, "--set", "train.epochs=3", "-o", chain.runs[0]) == 2
    assert "finished run" in capsys.readouterr().err
    assert bt("ensemble", chain.runs[0], "-o", chain.root / "again") == 0
    assert bt("ensemble", chain.runs[0], "-o", chain.root / "again", "--overwrite") == 0


def test_two_workers_train_on_disjoint_shards_and_validate_everything(chain, ray_session):
    out = chain.root / "runs" / "two_workers"
    stages = "train.stages=[{epochs: 1, trainable: head}, {epochs: 1}]"
    code = bt(
        "train", "--recipe", "cnn_small", "--data", chain.data, *SMALL, "--set", "train.epochs=2",
        "--set", stages, "--set", "train.ema_decay=0.9", "--set", "train.accumulation_steps=2",
        "--num-workers", 2, "--tensorboard", "-o", out,
    )  # fmt: skip
    assert code == 0
    assert len(list((out / "tensorboard").glob("events.*"))) == 1
    run = Run(str(out))
    assert run.info.num_workers == 2
    model = rebuild_classifier(run.info.model, run.info.preprocess, 4)
    model.load_state_dict(run.state_dict())
    view = next(p for p in (chain.data / "views").iterdir() if p.name.startswith("48px"))
    rows_by_id = {r["scan_id"]: r for r in read_view(str(view), "validation").take_all()}
    pixels = np.stack([rows_by_id[i]["pixels"] for i in run.validation()["scan_id"].to_pylist()])
    with torch.inference_mode():
        logits = model(Preprocessor(run.info.preprocess).batch(pixels)).numpy()
    saved = np.array(run.validation()["logits"].to_pylist())
    np.testing.assert_allclose(logits, saved, atol=1e-4)
    expected = Dataset(str(chain.data)).split("validation")["scan_id"].to_pylist()
    assert run.validation()["scan_id"].to_pylist() == sorted(expected)


def test_a_folder_source_gives_the_same_split_as_its_zip(chain, tmp_path):
    import zipfile

    with zipfile.ZipFile(chain.archive) as archive:
        archive.extractall(tmp_path / "folder")
    assert bt("prepare", tmp_path / "folder", "-o", tmp_path / "data") == 0
    ours, zipped = (Dataset(str(d)) for d in (tmp_path / "data", chain.data))
    assert ours.info.digest == zipped.info.digest
    assert storage.read_json(str(tmp_path / "data" / "dataset.json"))["num_left_out"] == {}


def test_answers_on_dicom_scans_become_reports_in_their_studies(chain, tmp_path):
    out = tmp_path / "out"
    assert bt("score", chain.bundle, chain.archive, "--dicom", "sr", "-o", out) == 0
    answered = {
        row["scan_id"]: row for row in rows(out / "scores") if row["format"] == "DICOM"
    }  # fmt: skip
    assert answered
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["dicom"] == {"kind": "sr", "written": len(answered), "not_written": {}}
    assert {path.stem for path in (out / "dicom_results").iterdir()} == set(answered)
    with zipfile.ZipFile(chain.archive) as archive:
        for scan_id, row in answered.items():
            scan = pydicom.dcmread(io.BytesIO(archive.read(row["member"])))
            report = pydicom.dcmread(out / "dicom_results" / f"{scan_id}.dcm")
            assert report.StudyInstanceUID == scan.StudyInstanceUID
            assert report.PatientID == scan.PatientID
    assert bt("score", chain.bundle, chain.archive, "--dicom", "png", "-o", tmp_path / "o") == 2


def test_without_the_cascade_all_members_answer_and_more_is_never_less(chain, tmp_path):
    out = tmp_path / "out"
    assert bt("score", chain.bundle, chain.archive, "--no-cascade", "-o", out) == 0
    settings = json.loads((out / "manifest.json").read_text())["settings"]
    assert settings["cascade"] == "off"
    assert all(len(row["members_used"]) == 2 for row in rows(out / "scores"))


def test_nothing_is_repeated_for_ever_but_a_few_calls_without_scans(chain):
    without_end = {launch for launch in chain.launched if -1 in launch[1:]}
    bounded_by_restarts = {("MapWorker(MapBatches(_Counted))", 30, -1)}
    of_rays_own = {  # which cannot be told otherwise, and run on no bytes of a scan
        ("ActorLocationTracker", -1, -1),
        ("_AutoscalingCoordinatorActor", -1, -1),
        ("get_table_block_metadata_schema", -1),
        ("StreamingRepartition[num_rows_per_block=1024,strict=False]", -1),
    }
    assert without_end - of_rays_own == bounded_by_restarts
    assert len(chain.launched) > 10
