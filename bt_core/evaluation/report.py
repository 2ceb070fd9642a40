"""Evaluation of a bundle on test scans: all figures, from the predictions table alone."""

from collections import Counter
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
from scipy.special import softmax

from bt_core.ensemble.calibration import calibration_of, combine
from bt_core.ensemble.cascade import stands
from bt_core.ensemble.review import decide
from bt_core.evaluation.benefit import decision_curve
from bt_core.evaluation.comparison import compare
from bt_core.evaluation.deferral import risk_coverage, rule_out, set_figures
from bt_core.evaluation.intervals import estimate
from bt_core.evaluation.metrics import confusion_matrix
from bt_core.evaluation.predictions import ANSWERED, Scans
from bt_core.evaluation.reliability import calibration_figures
from bt_core.evaluation.slices import slice_figures
from bt_core.labels import LabelSpace
from bt_core.models.bundle import BundleInfo

SCHEMA_VERSION: Final = 2
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
        `by_scan` and `by_family` (see `intervals.estimate`), and is None without scans. `clean` and
        `all` also have `calibration` (and `calibration_before`, with all temperatures 1),
        `deferral`, `prediction_sets`, `rule_out` and `decision_curves`. `members` (against their
        ensemble; None for one), `cascade` (against it too) and `slices` are of the clean scans.
        `flow`: counts by status and reason, and the `worst_case` of what was not answered.

    Raises:
        DatasetError: if no scan could be read.
    """
    space = bundle.label_space
    scans = Scans.of(predictions, space)
    clean = scans.where(scans.clean_N)
    subsets = {"clean": clean, "answered": clean.where(clean.scored_N)}
    statuses = [predictions[name].to_pylist() for name in ("status", "reason")]
    reasons = Counter(
        f"{s}: {reason}" if reason else s for s, reason in zip(*statuses, strict=True)
    )
    figures = {name: _figures(part, bundle, prevalence) for name, part in subsets.items()}
    same = len(clean) == len(scans)  # then nothing is computed twice
    figures["all"] = figures["clean"] if same else _figures(scans, bundle, prevalence)
    return {
        "schema_version": SCHEMA_VERSION,
        "task": space.task,
        "classes": list(space.names),
        "prevalence": prevalence,
        "flow": {
            "num_scans": predictions.num_rows,
            "by_status": dict(sorted(reasons.items())),
            "worst_case": _worst_case(predictions, clean, space) if len(clean) else None,
        },
        "num_seen_in_training": len(scans) - len(clean),
        **figures,
        "members": _members(clean, bundle) if len(clean) else None,
        "cascade": _cascade(clean, bundle) if len(clean) else None,
        "slices": slice_figures(clean, space) if len(clean) else None,
        "robustness": None,
        "shortcuts": None,
    }


def _figures(
    scans: Scans, bundle: BundleInfo, prevalence: dict[str, float] | None
) -> dict[str, Any] | None:
    if not len(scans):
        return None
    space = bundle.label_space
    shares_K = None if prevalence is None else np.array([prevalence[n] for n in space.names])
    estimates = estimate(
        scans.labels_N, scans.probs_NK, scans.family_N, space.names, space.healthy, shares_K
    )
    counts = np.bincount(scans.labels_N, minlength=space.num_classes).tolist()
    healthy_prob_N = scans.probs_NK[:, space.healthy]
    return {
        "num_scans": len(scans),
        "num_families": int(scans.family_N.max()) + 1,
        "counts": dict(zip(space.names, counts, strict=True)),
        "confusion_matrix": confusion_matrix(scans.labels_N, scans.probs_NK).tolist(),
        **{
            unit: {name: one.model_dump() for name, one in figures.items()}
            for unit, figures in estimates.items()
        },
        "calibration": calibration_figures(
            scans.labels_N, scans.probs_NK, scans.family_N, space.healthy
        ),
        "calibration_before": calibration_figures(
            scans.labels_N, _untempered(scans, bundle), scans.family_N, space.healthy
        ),
        "deferral": risk_coverage(scans.confidence_N, scans.right_N),
        "prediction_sets": set_figures(scans.labels_N, scans.sets_NK, scans.family_N, space.names),
        "rule_out": rule_out(
            scans.labels_N != space.healthy,
            healthy_prob_N,
            scans.family_N,
            bundle.review.healthy_above,
        ),
        "decision_curves": _decision_curves(scans, space, prevalence),
    }


def _decision_curves(
    scans: Scans, space: LabelSpace, prevalence: dict[str, float] | None
) -> dict[str, Any]:
    """Return the curve of any tumour against none, and of each type against the rest."""
    types = [k for k in range(space.num_classes) if k != space.healthy]
    questions = {"any tumour": types} | {space.names[k]: [k] for k in types if len(types) > 1}
    return {
        question: decision_curve(
            np.isin(scans.labels_N, own),
            scans.probs_NK[:, own].sum(1),
            scans.family_N,
            None if prevalence is None else sum(prevalence[space.names[k]] for k in own),
        )
        for question, own in questions.items()
        if np.isin(scans.labels_N, own).any() and not np.isin(scans.labels_N, own).all()
    }


def _worst_case(predictions: pa.Table, clean: Scans, space: LabelSpace) -> dict[str, Any]:
    """Return the figures if every scan that got no answer had got a wrong one.

    Returns:
        num_unanswered (without those with a copy in training, and without those deferred, which
        have an answer); accuracy and missed_tumor_rate, by scan, over the clean scans and these.
    """
    columns = ["status", "label", "group", "copy_in_training", "seen_in_training"]
    rows = predictions.select(columns).to_pylist()
    trained_on = {r["group"] for r in rows if r["copy_in_training"] or r["seen_in_training"]}
    unanswered = [
        row["label"] != space.names[space.healthy]
        for row in rows
        if row["status"] not in ANSWERED and (not row["group"] or row["group"] not in trained_on)
    ]
    tumour_N = clean.labels_N != space.healthy
    missed = (clean.probs_NK.argmax(1) == space.healthy) & tumour_N
    num_tumours = int(tumour_N.sum()) + sum(unanswered)
    return {
        "num_unanswered": len(unanswered),
        "accuracy": float(clean.right_N.sum() / (len(clean) + len(unanswered))),
        "missed_tumor_rate": (
            float((missed.sum() + sum(unanswered)) / num_tumours) if num_tumours else None
        ),
    }


def _untempered(scans: Scans, bundle: BundleInfo) -> np.ndarray:
    """Return the ensemble's probs_NK as they were before any temperature was fitted."""
    weights = [member.weight for member in bundle.members]
    return combine(scans.logits_NMK.swapaxes(0, 1), weights, [1.0] * len(weights), 1.0)


def _cascade(scans: Scans, bundle: BundleInfo) -> dict[str, Any] | None:
    """Return how the cascade, which these figures are without, would have changed the answers.

    By what the members say alone: what the input gate and the like defer is deferred either way.
    `answered_alone` is the share that the first member answers; `agreement` the share with the
    ensemble's class and need for review; `missed` and `missed_by_ensemble` count tumours called
    free of one without review. None if the bundle has no cascade.
    """
    if bundle.cascade is None:
        return None
    space = bundle.label_space
    first = calibration_of(bundle, [bundle.members[0].name])
    alone = decide(first.probs(scans.logits_NMK[:, :1].swapaxes(0, 1)), first.review, space)
    stands_N = stands(alone, bundle.cascade.min_confidence, space.names)
    everyone = calibration_of(bundle, [member.name for member in bundle.members])
    whole = decide(everyone.probs(scans.logits_NMK.swapaxes(0, 1)), bundle.review, space)
    ill_N = scans.labels_N != space.healthy
    same_N = ~stands_N | ((alone.label_N == whole.label_N) & whole.sure_N)
    called_N = (whole.label_N == space.healthy) & whole.sure_N
    called_alone_N = np.where(stands_N, alone.label_N == space.healthy, called_N)
    return {
        "answered_alone": float(stands_N.mean()),
        "agreement": float(same_N.mean()),
        "missed": int((called_alone_N & ill_N).sum()),
        "missed_by_ensemble": int((called_N & ill_N).sum()),
    }


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
