"""Finished runs become a bundle: equal weights, calibration from validation logits."""

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
from sklearn.metrics import f1_score

from bt_core import __version__
from bt_core.ensemble.calibration import averaged_log_probs, combine, fit_temperature
from bt_core.ensemble.review import fit_review
from bt_core.errors import UsageError
from bt_core.models.bundle import BundleInfo, MemberInfo
from bt_core.models.run import Run

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


def assemble(
    runs: Sequence[Run], conformal_level: float = 0.95, max_missed_tumor_rate: float = 0.01
) -> BundleInfo:
    """Calibrate an equal-weight ensemble of runs on the validation scans that they share.

    Each member gets a temperature of its own, so that none outvotes the others by being loud; the
    average gets one more, because averaging makes it under-confident.

    Args:
        runs: finished runs.
        conformal_level: see `review.fit_review`.
        max_missed_tumor_rate: likewise.

    Raises:
        UsageError: if the runs differ in labels or validation scans, or two have the same name.
    """
    _check_compatible(runs)
    tables = [run.validation() for run in runs]
    labels_N = np.array(tables[0]["label"].to_pylist())
    logits_MNK = np.array([table["logits"].to_pylist() for table in tables])
    weights = [1.0 / len(runs)] * len(runs)
    temperatures = [fit_temperature(logits, labels_N) for logits in logits_MNK]
    averaged_NK = averaged_log_probs(logits_MNK, weights, temperatures)
    temperature = fit_temperature(averaged_NK, labels_N)
    probs_NK = combine(logits_MNK, weights, temperatures, temperature)
    groups = np.unique(tables[0]["group"].to_pylist(), return_inverse=True)[1]
    review = fit_review(
        probs_NK,
        labels_N,
        runs[0].info.label_space,
        groups,
        conformal_level=conformal_level,
        max_missed_tumor_rate=max_missed_tumor_rate,
    )
    return BundleInfo(
        label_space=runs[0].info.label_space,
        members=tuple(
            _member(run, weight, t)
            for run, weight, t in zip(runs, weights, temperatures, strict=True)
        ),
        temperature=temperature,
        review=review,
        metrics=_metrics(probs_NK, labels_N, review.min_confidence),
        provenance=_provenance(runs),
    )


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


def _metrics(probs_NK: np.ndarray, labels_N: np.ndarray, min_confidence: float) -> dict[str, Any]:
    predicted_N = probs_NK.argmax(1)
    right_N = predicted_N == labels_N
    answered_N = probs_NK.max(1) >= min_confidence
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
