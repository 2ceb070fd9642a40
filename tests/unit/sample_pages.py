"""Every page that bt writes, made without Ray and with every section that it can have."""

import numpy as np
import pyarrow as pa

from bt_core.data import audit, copies
from bt_core.data.explore import describe_source
from bt_core.data.explore_page import figures, write_exploration
from bt_core.data.families import Pairs
from bt_core.evaluation.pages import write_report
from bt_core.evaluation.report import evaluate
from bt_core.evaluation.robustness import robustness_figures, variants
from bt_core.scans.phantom import CLASS_NAMES, phantom_slice
from bt_core.training.leaderboard import leaderboard
from bt_core.training.leaderboard_page import write_page
from tests.unit import test_explore, test_report_folder, test_sweep
from tests.unit.test_evaluation import MEMBER, SPACE

LONG = "/srv/" + "a_folder_whose_name_has_no_place_to_break_" * 4


def write_report_pages(folder, shortcuts):
    """Write report.html and checklist.html of an ensemble of two, one of whose scans was rejected.

    Args:
        folder: where.
        shortcuts: what `write_explore_page` gives.
    """
    predictions = test_report_folder.predictions_of()
    num_scored = predictions.num_rows - 1
    for name, values in {
        "logits": [[own[0], own[0][::-1]] for own in predictions["logits"].to_pylist()],
        "status": ["rejected", *["scored"] * num_scored],
        "reason": ["too_small", *[""] * num_scored],
        "site": ["north", "south"] * (predictions.num_rows // 2),
    }.items():
        place = predictions.schema.get_field_index(name)
        predictions = predictions.set_column(place, name, pa.array(values))
    trained = test_report_folder.TRAINED
    history = trained.provenance["members"]["a"]
    provenance = trained.provenance | {"members": {"a": history, "b_of_a_long_name": history}}
    members = (MEMBER, MEMBER.model_copy(update={"name": "b_of_a_long_name"}))
    changed = {"bundle_id": "0123456789abcdef", "members": members, "provenance": provenance}
    bundle = trained.model_copy(update=changed)
    tested = test_report_folder.TESTED.model_copy(update={"label_conflicts": ("0" * 20, "f" * 20)})
    shares = dict(zip(SPACE.names, (0.02, 0.02, 0.94, 0.02), strict=True))
    found = evaluate(predictions, bundle, shares)
    found |= {"robustness": _robustness(predictions), "shortcuts": shortcuts}
    maps = test_report_folder.maps_of(predictions)
    write_report(str(folder), predictions, maps, found, bundle, tested)


def _robustness(predictions, num=24):
    """Return figures of answers by chance."""
    rows = predictions.slice(1, num).to_pylist()
    probs = np.random.default_rng(0).dirichlet(np.ones(4), size=(num, len(variants())))
    answered = pa.table({"scan_id": [row["scan_id"] for row in rows], "probs": probs.tolist()})
    truth = {row["scan_id"]: (SPACE.names.index(row["label"]), row["group"]) for row in rows}
    return robustness_figures(answered, truth, SPACE)


def write_audit_page(folder):
    """Write audit.html: a copy across splits, a label conflict, and a file that is not read."""
    labels = ["glioma", "glioma", "pituitary", "no_tumor", "no_tumor", ""]
    num = len(labels)
    catalog = pa.table(
        {
            "scan_id": [f"{i:020x}" for i in range(num)],
            "member": [f"{i}.png" for i in range(num)],
            "pixel_sha256": [letter * 64 for letter in "abcde"] + [""],
            "label": labels,
            "given_split": ["train", "test", "train", "train", "test", "train"],
            "patient": [""] * num,
            "reason": [""] * 5 + ["corrupt_image"],
            "detail": [""] * num,
            "steps": [[]] * num,
        }
    )
    left, right = np.array([[0, 0, 3], [1, 2, 4]])
    turns = np.array([0, 3, 5], np.int8)
    pairs = Pairs(left, right, np.array([0.981, 0.99, 1], np.float32), turns)
    catalog = copies.add_families(catalog, pairs)
    conflicts = copies.find_conflicts(catalog, pairs)
    chosen = audit.choose_pairs(catalog, pairs, conflicts)
    pixels = {i: phantom_slice("glioma", 1, 160) for i in catalog["scan_id"].to_pylist()}
    found = audit.audit_figures(catalog, pairs, conflicts, {"not a picture": 2})
    page = audit.audit_page(found, LONG, audit.draw_pairs(catalog, pairs, chosen, pixels))
    (folder / "audit.html").write_bytes(page)


def write_explore_page(folder):
    """Write explore.html: scans whose border tells their class; return what the probe found."""
    change = test_explore.white_border
    rows = test_explore.explored(folder / "scans", num_per_class=5, change=change)
    facts = describe_source(rows, CLASS_NAMES, seed=0)
    facts |= {"skipped": {LONG: 1}, "side_px": test_explore.SIDE_PX, "seed": 0}
    facts |= {"unreadable": {"corrupt_image": 1}, "probe": test_explore.probe(rows)}
    drawn = figures(rows, facts, "cnn_small", test_explore.SPEC)
    write_exploration(str(folder / "explored"), facts, drawn)
    return facts["probe"]


def write_leaderboard_page(folder):
    """Write leaderboard.html: two finished trials, one stopped, one failed."""
    point = {"train.learning_rate": 0.001, "model.dropout": 0.25, "train.weight_decay": 1e-5}
    records = [
        test_sweep.record_of("aaaa1111", scores=(0.9, 0.8)),
        test_sweep.record_of("bbbb2222", scores=(0.4, 0.5)),
        test_sweep.record_of("cccc3333", "stopped", (0.99,), "stopped early by asha"),
        test_sweep.record_of("dddd4444", "failed", (), f"error: FileNotFoundError: {LONG}"),
    ]
    records = [one.model_copy(update={"point": point}) for one in records]
    tables = {}
    for number, record in enumerate(records[:2]):
        rng = np.random.default_rng(number)
        labels_N, logits_NK = test_sweep.predictions(rng, 200, 0.85 - 0.3 * number)
        columns = {"scan_id": [str(i) for i in range(200)], "label": labels_N}
        tables[record.trial_id] = pa.table(columns | {"logits": logits_NK.tolist()})
    space = {key: {"choice": [value, 2 * value]} for key, value in point.items()}
    spec = test_sweep.spec_of(folds=2, space=space, description="A sweep.")
    rows = leaderboard(records, tables, {str(i): str(i // 2) for i in range(200)}, spec)
    write_page(str(folder), rows, spec)
