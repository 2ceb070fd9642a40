"""Which answers a person should see. Shape suffixes: N scans, K classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bt_core.labels import LabelSpace
from bt_core.models.bundle import ReviewInfo


def fit_review(
    probs_NK: np.ndarray,
    labels_N: np.ndarray,
    space: LabelSpace,
    family_N: np.ndarray | None = None,
    target_accuracy: float = 0.98,
    conformal_level: float = 0.95,
    max_missed_tumor_rate: float = 0.01,
) -> ReviewInfo:
    """Choose the review rule on validation scans.

    The confidence threshold is the lowest one at which the scans at or above it are right at
    `target_accuracy` or more. Prediction sets are split-conformal with the score 1 - p(true class),
    for each class by itself (Sadinle et al. 2019), so that no class pays for another. What is above
    `healthy_above` may be called free of a tumour: of new tumours no more than
    `max_missed_tumor_rate` are there.

    Both promises are for a scan of a new family, one scan of each: families count once (Lee, Barber
    & Willett 2023, "Distribution-free inference with hierarchical data"). Counting scans instead
    takes copies for evidence, and promises more than it holds.

    Args:
        probs_NK: calibrated probabilities.
        labels_N: true class indices.
        space: the classes.
        family_N: group of copies or of a patient's scans; None takes each scan for its own.
        target_accuracy: wanted accuracy of what is answered without review.
        conformal_level: wanted share of sets that hold the true class.
        max_missed_tumor_rate: wanted bound of the share of tumours that may be called free of one.
    """
    confidence_N = probs_NK.max(1)
    order = np.argsort(-confidence_N, kind="stable")
    right = (probs_NK.argmax(1) == labels_N)[order]
    accuracy = np.cumsum(right) / np.arange(1, len(right) + 1)
    last_of_ties = np.append(np.diff(confidence_N[order]) != 0, True)
    good = np.flatnonzero((accuracy >= target_accuracy) & last_of_ties)
    min_confidence = float(confidence_N[order][good[-1]]) if len(good) else 1.0
    families_N = np.arange(len(labels_N)) if family_N is None else family_N
    ill_N = labels_N != space.healthy
    healthy_above = conformal_quantile(
        probs_NK[ill_N, space.healthy], families_N[ill_N], 1 - max_missed_tumor_rate
    )
    return ReviewInfo(
        min_confidence=min_confidence,
        target_accuracy=target_accuracy,
        conformal_level=conformal_level,
        conformal_min_probs={
            name: 1.0
            - conformal_quantile(
                1.0 - probs_NK[labels_N == k, k], families_N[labels_N == k], conformal_level
            )
            for k, name in enumerate(space.names)
        },
        max_missed_tumor_rate=max_missed_tumor_rate,
        healthy_above=healthy_above,
    )


def count_once(family_N: np.ndarray) -> tuple[np.ndarray, int]:
    """Return what each scan counts, so that its family counts 1, and the number of families."""
    code_N, size_F = np.unique(family_N, return_inverse=True, return_counts=True)[1:]
    return 1 / size_F[code_N], len(size_F)


def conformal_quantile(scores_N: np.ndarray, family_N: np.ndarray, level: float) -> float:
    """Return the score that one of a new family does not exceed, `level` of the time or more.

    Args:
        scores_N: in [0, 1].
        family_N: families; each weighs as much as another, whatever its size, and the new one too.
        level: in (0, 1).

    Returns:
        1 if there are too few families to promise it.
    """
    if not len(scores_N):
        return 1.0
    counted_N, num_families = count_once(family_N)
    order = np.argsort(scores_N, kind="stable")
    passed_N = np.cumsum(counted_N[order]) / (num_families + 1)
    enough = np.flatnonzero(passed_N >= level - 1e-12)
    return float(scores_N[order][enough[0]]) if len(enough) else 1.0


def prediction_sets(probs_NK: np.ndarray, min_probs_K: np.ndarray | Sequence[float]) -> np.ndarray:
    """Return bool (N, K): the classes of each set; the likeliest class is always in it.

    Args:
        probs_NK: calibrated probabilities.
        min_probs_K: each class's probability from which it is in the set.
    """
    sets_NK = probs_NK >= np.asarray(min_probs_K)
    sets_NK[np.arange(len(probs_NK)), probs_NK.argmax(1)] = True
    return sets_NK


@dataclass(frozen=True)
class Decisions:
    """What is answered, and what of it a person should see."""

    label_N: np.ndarray
    """Index of the likeliest class."""
    confidence_N: np.ndarray
    """Its calibrated probability."""
    sets_NK: np.ndarray
    """Bool: the classes of each prediction set."""
    reason_N: np.ndarray
    """Reason code for review, empty if it needs none."""

    @property
    def sure_N(self) -> np.ndarray:
        """Bool: which need no review."""
        sure: np.ndarray = self.reason_N == ""
        return sure


def decide(probs_NK: np.ndarray, review: ReviewInfo, space: LabelSpace) -> Decisions:
    """Return the decisions on calibrated probabilities.

    An answer needs no review if its prediction set holds its class alone, by that class's own
    threshold too; if it does not call a scan free of a tumour at or below `healthy_above`; and if
    its confidence is `min_confidence` or more.
    """
    label_N, confidence_N = probs_NK.argmax(1), probs_NK.max(1)
    min_probs_K = np.array([review.conformal_min_probs[name] for name in space.names])
    sets_NK = prediction_sets(probs_NK, min_probs_K)
    healthy_N = label_N == space.healthy
    unlikely_N = (confidence_N < review.min_confidence) | (confidence_N < min_probs_K[label_N])
    reason_N = np.select(
        [
            healthy_N & (confidence_N <= review.healthy_above),
            sets_NK.sum(1) > 1,
            unlikely_N,
        ],
        ["tumor_not_excluded", "several_classes", "low_confidence"],
        "",
    )
    return Decisions(label_N, confidence_N, sets_NK, reason_N)


def of_frame(answer: dict[str, Any], frame_index: int, num_frames: int) -> dict[str, Any]:
    """Return an answer with the slice that it is for; a person should see one of several."""
    answer = {**answer, "frame_index": frame_index, "num_frames": num_frames}
    if num_frames > 1 and answer["status"] == "scored":
        answer |= {"status": "deferred", "reason": "one_of_many_frames"}
    return answer
