"""Evaluation of a bundle on test scans: all figures from the predictions table, and a page."""

from collections import Counter
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
from scipy.special import softmax

from bt_core import storage
from bt_core.data.page import render
from bt_core.ensemble.calibration import combine
from bt_core.errors import RunError
from bt_core.evaluation import plots
from bt_core.evaluation.benefit import decision_curve
from bt_core.evaluation.comparison import compare
from bt_core.evaluation.deferral import clearance, risk_coverage, set_figures
from bt_core.evaluation.intervals import estimate
from bt_core.evaluation.metrics import confusion_matrix
from bt_core.evaluation.predictions import Scans, Tested
from bt_core.evaluation.reliability import calibration_figures
from bt_core.evaluation.sheets import KINDS, chosen_scans, map_figures, sheets
from bt_core.evaluation.slices import slice_figures
from bt_core.labels import LabelSpace
from bt_core.models.bundle import BundleInfo

SCHEMA_VERSION: Final = 1
"""Of metrics.json."""


def evaluate(
    predictions: pa.Table, bundle: BundleInfo, prevalence: dict[str, float] | None = None
) -> dict[str, Any]:
    """Return all figures of a predictions table.

    Args:
        predictions: see `predictions.join_truth`.
        bundle: what gave them: its classes, its promises, its members.
        prevalence: shares of the classes where the classifier will be used.

    Returns:
        `clean`: figures on the scans of which neither they nor one of their family (or patient) was
        trained on, the headline; `all`: figures on all answered scans; `answered`: on the clean
        ones without those deferred. Each has num_scans, num_families, confusion_matrix, and
        `by_scan` and `by_family` (see `intervals.estimate`), and is None without scans. On the
        clean scans also `calibration` (and `calibration_before`, with all temperatures 1),
        `members` (against their ensemble; None for one), `deferral`, `prediction_sets`,
        `clearance`, `decision_curves` and `slices`. `flow`: counts by status and reason.

    Raises:
        RunError: if no scan could be read.
    """
    space = bundle.label_space
    scans = Scans.of(predictions, space)
    clean = scans.where(scans.clean_N)
    subsets = {"clean": clean, "all": scans, "answered": clean.where(clean.scored_N)}
    statuses = [predictions[name].to_pylist() for name in ("status", "reason")]
    reasons = Counter(
        f"{s}: {reason}" if reason else s for s, reason in zip(*statuses, strict=True)
    )
    found: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "task": space.task,
        "classes": list(space.names),
        "prevalence": prevalence,
        "flow": {"num_scans": predictions.num_rows, "by_status": dict(sorted(reasons.items()))},
        "num_seen_in_training": len(scans) - len(clean),
        "robustness": None,
        **{name: _figures(part, space, prevalence) for name, part in subsets.items()},
    }
    return found if not len(clean) else found | _in_depth(clean, bundle)


def _figures(
    scans: Scans, space: LabelSpace, prevalence: dict[str, float] | None
) -> dict[str, Any] | None:
    if not len(scans):
        return None
    shares_K = None if prevalence is None else np.array([prevalence[n] for n in space.names])
    estimates = estimate(
        scans.labels_N, scans.probs_NK, scans.family_N, space.names, space.healthy, shares_K
    )
    return {
        "num_scans": len(scans),
        "num_families": int(scans.family_N.max()) + 1,
        "counts": dict(zip(space.names, _counts(scans, space), strict=True)),
        "confusion_matrix": confusion_matrix(scans.labels_N, scans.probs_NK).tolist(),
        **{
            unit: {name: one.model_dump() for name, one in figures.items()}
            for unit, figures in estimates.items()
        },
    }


def _counts(scans: Scans, space: LabelSpace) -> list[int]:
    return [int(n) for n in np.bincount(scans.labels_N, minlength=space.num_classes)]


def _in_depth(scans: Scans, bundle: BundleInfo) -> dict[str, Any]:
    space = bundle.label_space
    ill_N, healthy_prob_N = scans.labels_N != space.healthy, scans.probs_NK[:, space.healthy]
    curves = {"any tumour": decision_curve(ill_N, 1 - healthy_prob_N, scans.family_N)}
    for k, name in enumerate(space.names):
        if k != space.healthy and space.num_classes > 2:
            own_N = scans.labels_N == k
            curves[name] = decision_curve(own_N, scans.probs_NK[:, k], scans.family_N)
    return {
        "calibration": calibration_figures(scans.labels_N, scans.probs_NK),
        "calibration_before": calibration_figures(scans.labels_N, _untempered(scans, bundle)),
        "members": _members(scans, bundle),
        "deferral": risk_coverage(scans.confidence_N, scans.right_N),
        "prediction_sets": set_figures(scans.labels_N, scans.sets_NK, space.names),
        "clearance": clearance(ill_N, healthy_prob_N, scans.family_N, bundle.review.healthy_above),
        "decision_curves": curves,
        "slices": slice_figures(scans, space),
    }


def _untempered(scans: Scans, bundle: BundleInfo) -> np.ndarray:
    """Return the ensemble's probs_NK as they were before any temperature was fitted."""
    weights = [member.weight for member in bundle.members]
    return combine(scans.logits_NMK.swapaxes(0, 1), weights, [1.0] * len(weights), 1.0)


def _members(scans: Scans, bundle: BundleInfo) -> dict[str, Any] | None:
    if len(bundle.members) < 2:
        return None
    alone = {
        member.name: replace(
            scans, probs_NK=softmax(scans.logits_NMK[:, m] / member.temperature, axis=1)
        )
        for m, member in enumerate(bundle.members)
    }
    return compare({"ensemble": scans, **alone}, bundle.label_space)


def write_report(
    location: str,
    predictions: pa.Table,
    explained: pa.Table | None,
    figures: dict[str, Any],
    bundle: BundleInfo,
    tested: Tested,
) -> None:
    """Write metrics.json, report.html (self-contained) and its pictures into a folder.

    Args:
        location: the folder.
        predictions: see `predictions.join_truth`.
        explained: rows of `explainer.SCHEMA` of `sheets.chosen_scans`; None draws no maps.
        figures: of `evaluate`, with `robustness` if that was measured; gains `explanations`.
        bundle: what was evaluated.
        tested: on what.

    Raises:
        RunError: if there are no clean figures; a report without them would mislead.
    """
    if figures["clean"] is None:
        raise RunError(
            "every test scan, or a copy, was trained on, so nothing can be said about new ones; "
            "evaluate on the dataset that the bundle was trained with, or on other scans"
        )
    space = bundle.label_space
    scans = Scans.of(predictions, space)
    clean = scans.where(scans.clean_N)
    pictures = plots.report_pictures(figures, clean, space)
    figures["explanations"] = None
    if explained is not None:
        chosen = chosen_scans(clean, space)
        label_of = {
            str(i): space.names[k] for i, k in zip(clean.scan_id, clean.labels_N, strict=True)
        }
        pictures |= sheets(explained, chosen, label_of)
        sample = [row for row in explained.to_pylist() if row["scan_id"] in set(chosen["sample"])]
        figures["explanations"] = map_figures(sample)
        storage.write_table(storage.join(location, "explanations.parquet"), explained)
    provenance = {
        "bundle_id": bundle.bundle_id,
        "dataset_digest": tested.digest,
        "same_dataset_as_training": tested.digest == bundle.provenance.get("dataset_digest"),
        "num_test_openings": tested.num_openings,
    }
    page = render(
        "bt_core.evaluation",
        "report.html.j2",
        figures=figures,
        bundle=bundle,
        tested=tested,
        provenance=provenance,
        names=space.names,
        pictures=pictures,
        sheet_titles=KINDS,
    )
    for name, png in pictures.items():
        storage.write_bytes(storage.join(location, f"{name}.png"), png)
    storage.write_table(storage.join(location, "predictions.parquet"), predictions)
    storage.write_bytes(storage.join(location, "report.html"), page)
    storage.write_json(storage.join(location, "metrics.json"), {**figures, **provenance})
