"""Finished runs become a bundle: weights and calibration from validation logits.

Shape suffixes: M members, N scans, K classes.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from typing import Any, Final

import numpy as np
import torch
from pydantic import Field
from sklearn.metrics import f1_score
from torch.utils.flop_counter import FlopCounterMode

from bt_core import __version__
from bt_core.config import StrictModel
from bt_core.ensemble.calibration import (
    averaged_log_probs,
    calibration_of,
    combine,
    fit_temperature,
)
from bt_core.ensemble.cascade import fit_cascade
from bt_core.ensemble.drift import fit_drift
from bt_core.ensemble.review import Decisions, decide, fit_review
from bt_core.ensemble.weights import Method, choose_weights
from bt_core.errors import UsageError
from bt_core.labels import LabelSpace
from bt_core.models.bundle import BundleInfo, MemberInfo, SubsetInfo
from bt_core.models.classifier import rebuild_classifier
from bt_core.models.run import Run

_MOST_MEMBERS: Final = 10
"""Every subset that the quorum allows is calibrated: 385 of ten members."""

_HISTORY: Final = (
    "epoch",
    "stage",
    "loss",
    "val_accuracy",
    "val_macro_f1",
    "val_log_loss",
    "kept_by",
)
"""Figures of an epoch that a report draws."""


class Options(StrictModel):
    """How members are weighed and calibrated."""

    weights: Method = "log_loss"
    quorum: int | None = Field(None, ge=1)
    """How many members must answer at least; None asks for more than half of them."""
    conformal_level: float = Field(0.95, gt=0, lt=1)
    max_missed_tumor_rate: float = Field(0.01, gt=0, lt=1)
    max_disagreement: float = Field(0.005, gt=0, lt=1)
    """See `cascade.fit_cascade`."""


def assemble(runs: Sequence[Run], options: Options | None = None) -> BundleInfo:
    """Calibrate an ensemble of runs on the validation scans that they share.

    Members stand in the order of their cost, the cheapest first. Each gets a temperature of its
    own, so that none outvotes the others by being loud; the average gets one more, because
    averaging makes it under-confident. A member whose weight comes out as 0 is left out.

    Raises:
        UsageError: if the runs differ in labels or validation scans, two have the same name, there
            are more than ten, or the quorum is larger than their number.
    """
    options = options or Options()
    _check_compatible(runs)
    cost = {run.info.name: _flops(run) for run in runs}
    runs = sorted(runs, key=lambda run: (cost[run.info.name], run.info.name))
    tables = [run.validation() for run in runs]
    labels_N = np.array(tables[0]["label"].to_pylist())
    family_N = np.unique(tables[0]["group"].to_pylist(), return_inverse=True)[1]
    logits_MNK = np.array([table["logits"].to_pylist() for table in tables])
    temperatures = [fit_temperature(logits, labels_N) for logits in logits_MNK]
    true_probs_MN = np.stack(
        [
            combine(logits[None], [1.0], [t], 1.0)[np.arange(len(labels_N)), labels_N]
            for logits, t in zip(logits_MNK, temperatures, strict=True)
        ]
    )
    weights_M, losses = choose_weights(true_probs_MN, family_N, options.weights)
    kept = np.flatnonzero(weights_M)
    members = tuple(_member(runs[m], float(weights_M[m]), temperatures[m]) for m in kept)
    scans = Validation(logits_MNK[kept], labels_N, family_N)
    info = calibrate(members, scans, runs[0].info.label_space, options)
    provenance = _provenance([runs[m] for m in kept]) | {
        "weights": {
            "method": options.weights,
            "out_of_fold_log_loss": losses,
            "left_out": [runs[m].info.name for m in np.flatnonzero(weights_M == 0)],
        },
        "flops": {runs[m].info.name: cost[runs[m].info.name] for m in kept},
    }
    return info.model_copy(update={"provenance": provenance})


@dataclass(frozen=True)
class Validation:
    """What the members say of the validation scans, which calibrate them."""

    logits_MNK: np.ndarray
    labels_N: np.ndarray
    family_N: np.ndarray


def calibrate(
    members: tuple[MemberInfo, ...], scans: Validation, space: LabelSpace, options: Options
) -> BundleInfo:
    """Fit temperatures, review rules, the subsets' too, and the cascade, of weighed members.

    Raises:
        UsageError: if there are more than ten members, or fewer than the quorum.
    """
    num, quorum = len(members), options.quorum or len(members) // 2 + 1
    if num > _MOST_MEMBERS:
        raise UsageError(f"{num} members; {_MOST_MEMBERS} are the most that one bundle holds")
    if quorum > num:
        raise UsageError(
            f"a quorum of {quorum} asks for more members than there are ({num}); a run whose share "
            "came out as 0 is left out, unless the weights are equal"
        )
    sizes = range(quorum, num)
    chosen = [c for size in sizes for c in combinations(range(num), size)]
    chosen += [(0,)] if num > 1 and (0,) not in chosen else []
    subsets = [_fit_subset(members, c, scans, space, options) for c in chosen]
    whole = _fit_subset(members, tuple(range(num)), scans, space, options)
    info = BundleInfo(
        label_space=space,
        members=members,
        temperature=whole.temperature,
        review=whole.review,
        quorum=quorum,
        subsets=tuple(subsets),
        metrics={},
        provenance={},
    )
    probs_NK = calibration_of(info, whole.members).probs(scans.logits_MNK)
    decisions = decide(probs_NK, whole.review, space)
    cascade = None
    if num > 1:
        first = calibration_of(info, [members[0].name])
        alone = decide(first.probs(scans.logits_MNK[:1]), first.review, space)
        cascade = fit_cascade(
            alone, decisions, scans.labels_N, scans.family_N, space, options.max_disagreement
        )
    metrics = _metrics(probs_NK, scans.labels_N, decisions)
    drift = fit_drift({"confidence": decisions.confidence_N})
    return info.model_copy(update={"metrics": metrics, "cascade": cascade, "drift": drift})


def _fit_subset(
    members: tuple[MemberInfo, ...],
    chosen: tuple[int, ...],
    scans: Validation,
    space: LabelSpace,
    options: Options,
) -> SubsetInfo:
    logits_MNK = scans.logits_MNK[list(chosen)]
    shares = np.array([members[m].weight for m in chosen])
    weights = list(shares / shares.sum())
    own = [members[m].temperature for m in chosen]
    temperature = fit_temperature(averaged_log_probs(logits_MNK, weights, own), scans.labels_N)
    return SubsetInfo(
        members=tuple(members[m].name for m in chosen),
        temperature=temperature,
        review=fit_review(
            combine(logits_MNK, weights, own, temperature),
            scans.labels_N,
            space,
            scans.family_N,
            conformal_level=options.conformal_level,
            max_missed_tumor_rate=options.max_missed_tumor_rate,
        ),
    )


@torch.no_grad()
def _flops(run: Run) -> int:
    """Return the floating point operations of a run's classifier for one scan."""
    spec = run.info.preprocess
    model = rebuild_classifier(run.info.model, spec, run.info.label_space.num_classes)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, spec.channels, spec.size_px, spec.size_px))
    return int(counter.get_total_flops())


def _check_compatible(runs: Sequence[Run]) -> None:
    first = runs[0]
    names = [run.info.name for run in runs]
    if len(set(names)) < len(names):
        raise UsageError(f"two runs have the same folder name ({', '.join(names)}); rename one")
    for run in runs[1:]:
        if run.info.label_space != first.info.label_space:
            raise UsageError(f"{run.location} has other classes than {first.location}")
        if run.info.dataset_digest != first.info.dataset_digest:
            raise UsageError(
                f"{run.location} was trained on another dataset or split than {first.location}; "
                "one member would be calibrated on scans it was trained on: use one dataset for all"
            )


def _member(run: Run, weight: float, temperature: float) -> MemberInfo:
    return MemberInfo(
        name=run.info.name,
        model=run.info.model.model_copy(update={"weights": "none"}),
        preprocess=run.info.preprocess,
        golden_digest=run.info.golden_digest,
        weight=weight,
        temperature=temperature,
    )


def _metrics(probs_NK: np.ndarray, labels_N: np.ndarray, decisions: Decisions) -> dict[str, Any]:
    predicted_N = probs_NK.argmax(1)
    right_N = predicted_N == labels_N
    answered_N = decisions.sure_N
    true_probs_N = probs_NK[np.arange(len(labels_N)), labels_N]
    return {
        "split": "validation",
        "num_scans": len(labels_N),
        "accuracy": float(right_N.mean()),
        "macro_f1": float(f1_score(labels_N, predicted_N, average="macro", zero_division=0.0)),
        "log_loss": float(-np.log(np.maximum(true_probs_N, 1e-300)).mean()),
        "answered": float(answered_N.mean()),
        "accuracy_answered": float(right_N[answered_N].mean()) if answered_N.any() else None,
    }


def _provenance(runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "bt_version": __version__,
        "dataset_digest": runs[0].info.dataset_digest,
        "members": {
            run.info.name: {
                "recipe": run.info.recipe["name"],
                "recipe_digest": run.info.recipe_digest,
                "settings": _settings(run),
                "initial_weights": _weights_name(run),
                "kept_epoch": run.info.kept_epoch,
                "num_parameters": run.info.num_parameters,
                "environment": run.info.environment,
                "metrics": run.info.metrics,
                "history": [
                    {key: figures[key] for key in _HISTORY if key in figures}
                    for figures in run.history()
                ],
            }
            for run in runs
        },
    }


def _settings(run: Run) -> dict[str, Any]:
    """Return the recipe as it was trained, the seed included, without paths of that machine."""
    recipe = run.info.recipe
    return {**recipe, "model": {**recipe["model"], "weights": _weights_name(run)}}


def _weights_name(run: Run) -> str:
    """Name the initial weights without the path of the machine that trained."""
    source, _, path = run.info.model.weights.partition(":")
    return f"{source}:{os.path.basename(path)}" if path else source
