"""Evaluation of a bundle on test scans: figures from the predictions table, and a page."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bt_core import storage
from bt_core.data.catalog import DatasetInfo
from bt_core.data.page import render
from bt_core.errors import RunError
from bt_core.evaluation.metrics import classification_metrics
from bt_core.evaluation.plots import confusion_matrix_png
from bt_core.models.bundle import BundleInfo


def evaluate(predictions: pa.Table, truth: pa.Table, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the figures of predictions against the truth, joined on scan_id.

    Args:
        predictions: score rows of exactly the scans of `truth`.
        truth: scan_id, label and copy_in_training.
        names: class names in the order of the probabilities.

    Returns:
        `clean`: metrics on the scans of which no copy was trained on, the headline; `all`: metrics
        on all answered scans; `answered`: metrics without the deferred ones; `flow`: counts by
        status and reason.

    Raises:
        RunError: if scans are missing or doubled, or none could be read.
    """
    wanted, got = truth["scan_id"].to_pylist(), predictions["scan_id"].to_pylist()
    if Counter(wanted) != Counter(got):
        raise RunError(
            f"{len(wanted)} scans to evaluate, {len(got)} predictions that do not match them"
        )
    columns = ["scan_id", "status", "reason", "seen_in_training", *(f"prob_{n}" for n in names)]
    joined = predictions.select(columns).join(
        truth.select(["scan_id", "label", "copy_in_training"]), keys="scan_id"
    )
    joined = joined.sort_by("scan_id")
    usable = joined.filter(pc.is_in(joined["status"], pa.array(["scored", "deferred"])))
    if not usable.num_rows:
        raise RunError("no test scan could be read; is the source of the dataset still there?")
    seen = pc.or_(usable["seen_in_training"], usable["copy_in_training"])
    clean = usable.filter(pc.invert(seen))
    answered = usable.filter(pc.equal(usable["status"], "scored"))
    reasons = Counter(
        f"{status}: {reason}" if reason else status
        for status, reason in zip(
            joined["status"].to_pylist(), joined["reason"].to_pylist(), strict=True
        )
    )
    return {
        "clean": _metrics(clean, names),
        "all": _metrics(usable, names),
        "answered": _metrics(answered, names),
        "flow": {"num_scans": len(wanted), "by_status": dict(sorted(reasons.items()))},
        "num_seen_in_training": usable.num_rows - clean.num_rows,
    }


def write_report(
    location: str, figures: dict[str, Any], bundle: BundleInfo, dataset: DatasetInfo
) -> None:
    """Write metrics.json, confusion_matrix.png and report.html (self-contained) into a folder.

    Raises:
        RunError: if there are no clean figures; a report without them would mislead.
    """
    if figures["clean"] is None:
        raise RunError(
            "every test scan, or a copy, was trained on, so nothing can be said about new ones; "
            "evaluate on the dataset that the bundle was trained with, or on other scans"
        )
    names = bundle.label_space.names
    picture = confusion_matrix_png(figures["clean"]["confusion_matrix"], names)
    provenance = {
        "bundle_id": bundle.bundle_id,
        "dataset_digest": dataset.digest,
        "same_dataset_as_training": dataset.digest == bundle.provenance.get("dataset_digest"),
    }
    page = render(
        "bt_core.evaluation",
        "report.html.j2",
        figures=figures,
        bundle=bundle,
        dataset=dataset,
        provenance=provenance,
        names=names,
        picture=picture,
    )
    storage.write_bytes(storage.join(location, "confusion_matrix.png"), picture)
    storage.write_bytes(storage.join(location, "report.html"), page)
    storage.write_json(storage.join(location, "metrics.json"), {**figures, **provenance})


def _metrics(table: pa.Table, names: tuple[str, ...]) -> dict[str, Any] | None:
    if not table.num_rows:
        return None
    labels_N = np.array([names.index(label) for label in table["label"].to_pylist()])
    probs_NK = np.stack([table[f"prob_{name}"].to_numpy() for name in names], axis=1)
    return classification_metrics(labels_N, probs_NK, names)
