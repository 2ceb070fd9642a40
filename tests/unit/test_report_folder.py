"""The folder of a report: what it holds, and that it can be made again."""

import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from bt_core.errors import RunError, UsageError
from bt_core.evaluation.checklist import checklist
from bt_core.evaluation.embedding import embed, with_embedding
from bt_core.evaluation.evaluated import EvaluatedScans
from bt_core.evaluation.explainer import FIGURES, SCHEMA
from bt_core.evaluation.model_card import model_card
from bt_core.evaluation.pages import read_report, write_report
from bt_core.evaluation.predictions import join_truth
from bt_core.evaluation.report import evaluate
from jobs.report import run as remake
from tests.unit.test_evaluation import BUNDLE, tables

HISTORY = [
    {"epoch": e, "stage": 1, "loss": 1 / e, "val_accuracy": 0.8, "val_macro_f1": 0.8,
     "val_log_loss": 0.5, "kept_by": e} for e in (1, 2)
]  # fmt: skip
MEMBERS = {"a": {"initial_weights": "none", "recipe": "r", "history": HISTORY}}
TRAINED = BUNDLE.model_copy(
    update={
        "provenance": {"dataset_digest": "d" * 64, "members": MEMBERS},
        "metrics": {
            "num_scans": 9, "accuracy": 0.9, "macro_f1": 0.9, "log_loss": 0.3, "answered": 0.8
        },
    }
)  # fmt: skip
TESTED = EvaluatedScans(
    source="s",
    split_by="family",
    copies_found=True,
    digest="d" * 64,
    num_left_out={"label_conflict": 2},
    num_openings=1,
)


def predictions_of(num=120):
    scores, truth = tables(num=num, bonus=0.3)
    generator = np.random.default_rng(0)
    features = generator.normal(size=(num, 8)).astype(np.float32)
    joined = join_truth(scores, truth)
    said = [
        max(("glioma", "meningioma", "no_tumor", "pituitary"), key=lambda n: row[f"prob_{n}"])
        for row in joined.to_pylist()
    ]
    joined = joined.append_column("predicted_label", pa.array(said))
    return with_embedding(joined.append_column("features", pa.array(features.tolist())))


def maps_of(predictions):
    rows = [
        {
            "scan_id": row["scan_id"], "status": "scored", "reason": "",
            "predicted_label": row["predicted_label"], "confidence": 0.9, "method": "grad_cam",
            "size_px": 8, "image": bytes(64), "heat": bytes(range(64)),
            **dict.fromkeys(FIGURES, 0.4),
        }
        for row in predictions.to_pylist()
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=SCHEMA)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    predictions = predictions_of()
    shares = {"glioma": 0.02, "meningioma": 0.02, "no_tumor": 0.94, "pituitary": 0.02}
    figures = evaluate(predictions, TRAINED, shares)
    write_report(str(out), predictions, maps_of(predictions), figures, TRAINED, TESTED)
    return out


def test_a_report_has_pages_that_need_nothing_else_and_every_picture(written):
    names = {path.name for path in written.iterdir()}
    assert names > {"metrics.json", "inputs.json", "predictions.parquet", "explanations.parquet"}
    pictures = {name.removesuffix(".png") for name in names if name.endswith(".png")}
    assert pictures == {
        "confusion_matrix", "classes", "curves", "calibration", "deferral", "decision_curves",
        "embedding", "training_a", "sheet_wrong", "sheet_unsure", "sheet_right",
    }  # fmt: skip
    page = (written / "report.html").read_text()
    assert page.count("<img") == page.count('alt="') == len(pictures)
    for name in ("report.html", "checklist.html"):
        text = re.sub(r"data:image/png;base64,[\w+/=]+", "", (written / name).read_text())
        assert "http" not in text.split("<body>")[1]
    assert "ppv at prevalence" in page
    assert "NeuroScan" in page


def test_metrics_have_a_version_and_every_figure_under_clean_and_all(written):
    metrics = json.loads((written / "metrics.json").read_text())
    assert metrics["schema_version"] == 2
    for unit in ("by_scan", "by_family"):
        assert metrics["clean"][unit].keys() == metrics["all"][unit].keys()
        assert len(metrics["clean"][unit]) > 50
    assert metrics["explanations"]["num"] == 32
    assert metrics["same_dataset_as_training"]


def test_a_report_is_made_again_from_its_own_tables(written, tmp_path):
    before = {p.name: p.read_bytes() for p in written.iterdir()}
    predictions, explained, figures, bundle, tested = read_report(str(written))
    assert (bundle, tested) == (TRAINED, TESTED)
    again = evaluate(predictions, bundle, figures["prevalence"])
    write_report(str(tmp_path), predictions, explained, again, bundle, tested)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    changed = [name for name in before if before[name] != after[name]]
    assert set(changed) <= {"predictions.parquet"}, "Arrow may name the items of lists otherwise"
    assert pq.read_table(tmp_path / "predictions.parquet").to_pylist() == predictions.to_pylist()
    with pytest.raises(UsageError, match="is not a report"):
        read_report(str(tmp_path / "nothing"))


@pytest.mark.parametrize("version", [1, 2])
def test_a_report_that_is_made_again_keeps_what_needs_the_scans(written, tmp_path, version):
    folder = tmp_path / "report"
    shutil.copytree(written, folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    verdict = {"level": "weak", "sentence": "Border alone predicts the class."}
    probed = {"features": {}, "verdict": verdict, "num_scans": 9, "chance": 0.25}
    metrics |= {"schema_version": version, "shortcuts": probed}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    assert remake(str(folder)) == 0
    assert json.loads((folder / "metrics.json").read_text())["shortcuts"] == probed
    page = (folder / "report.html").read_text()
    assert verdict["sentence"] in page
    assert verdict["sentence"].rstrip(".") in (folder / "checklist.html").read_text()


def test_scans_of_one_class_alone_have_a_report(tmp_path):
    predictions = predictions_of()
    kept = predictions.filter(pc.equal(predictions["label"], "no_tumor"))
    figures = evaluate(kept, TRAINED)
    write_report(str(tmp_path), kept, None, figures, TRAINED, TESTED)
    assert "needs scans with and without a tumour" in (tmp_path / "report.html").read_text()


def test_a_new_report_removes_the_old_ones_files_and_nobody_elses(tmp_path):
    predictions, figures = predictions_of(), evaluate(predictions_of(), TRAINED)
    foreign = tmp_path / "sheet_music.png"
    foreign.write_bytes(b"mine")
    write_report(str(tmp_path), predictions, maps_of(predictions), figures, TRAINED, TESTED)
    assert foreign.read_bytes() == b"mine", "there was no report before"
    (tmp_path / "notes.png").write_bytes(b"mine")
    write_report(str(tmp_path), predictions, None, figures, TRAINED, TESTED)
    left = {path.name for path in tmp_path.iterdir()}
    assert "notes.png" in left
    assert not left & {"explanations.parquet", "sheet_wrong.png", "sheet_right.png"}
    assert json.loads((tmp_path / "metrics.json").read_text())["explanations"] is None


def test_every_point_of_the_checklist_is_answered_or_says_why_not(written):
    metrics = json.loads((written / "metrics.json").read_text())
    points = checklist(metrics, TRAINED, TESTED)
    assert len(points) == 17
    assert all(point.answer or point.missing for point in points)
    bare = checklist({**metrics, "explanations": None, "prevalence": None}, TRAINED, TESTED)
    assert "pass --prevalence" in bare[6].missing
    assert "--no-depth" in bare[15].missing
    page = (written / "checklist.html").read_text()
    assert page.count("<li>") == 17


def test_the_model_card_has_test_figures_with_intervals_or_says_that_they_are_of_validation(
    written,
):
    card = (written / "MODEL_CARD.md").read_text()
    accuracy = json.loads((written / "metrics.json").read_text())["clean"]["by_scan"]["accuracy"]
    assert f"{accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]" in card
    assert "optimistic" not in card
    assert "figures are\noptimistic" in model_card(TRAINED)
    for text in (card, model_card(TRAINED)):
        assert "Not a medical device" in text


def test_a_report_without_clean_figures_fails_loudly(tmp_path):
    predictions = predictions_of()
    seen = pa.array([True] * predictions.num_rows)
    place = predictions.schema.get_field_index("copy_in_training")
    predictions = predictions.set_column(place, "copy_in_training", seen)
    figures = evaluate(predictions, TRAINED)
    with pytest.raises(RunError, match="nothing can be said about new ones"):
        write_report(str(tmp_path), predictions, None, figures, TRAINED, TESTED)
    assert not list(tmp_path.iterdir())


def test_features_of_groups_lie_apart_and_what_has_none_has_no_place():
    generator = np.random.default_rng(0)
    features = np.concatenate([generator.normal(0, 1, (40, 20)), generator.normal(9, 1, (40, 20))])
    places = embed(features, seed=0)
    centres = places[:40].mean(0), places[40:].mean(0)
    spread = places[:40].std()
    assert np.linalg.norm(centres[0] - centres[1]) > 2 * spread
    values = [None, *features[:11].tolist()]
    found = with_embedding(pa.table({"features": pa.array(values)}))
    assert found.column_names == ["tsne_x", "tsne_y"]
    assert found["tsne_x"].null_count == 1
    alike = with_embedding(pa.table({"features": pa.array([[1.0, 2.0]] * 30)}))
    broken = with_embedding(
        pa.table({"features": pa.array([[float("nan"), i] for i in range(30)])})
    )
    assert alike["tsne_x"].null_count == broken["tsne_x"].null_count == 30
    few = with_embedding(pa.table({"features": pa.array(values[:4])}))
    assert few["tsne_x"].null_count == 4
