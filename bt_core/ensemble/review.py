"""Which answers a person should see. Shape suffixes: N scans, K classes."""

import math
from typing import Any

import numpy as np

from bt_core.models.bundle import ReviewInfo


def fit_review(
    probs_NK: np.ndarray,
    labels_N: np.ndarray,
    target_accuracy: float = 0.98,
    conformal_level: float = 0.95,
) -> ReviewInfo:
    """Choose the review rule on validation scans.

    The confidence threshold is the lowest one at which the scans at or above it are right at
    `target_accuracy` or more. Prediction sets are split-conformal with the score 1 - p(true class)
    (Sadinle et al. 2019, "Least ambiguous set-valued classifiers").

    Args:
        probs_NK: calibrated probabilities.
        labels_N: true class indices.
        target_accuracy: wanted accuracy of what is answered without review.
        conformal_level: wanted share of sets that hold the true class.
    """
    confidence_N = probs_NK.max(1)
    order = np.argsort(-confidence_N, kind="stable")
    right = (probs_NK.argmax(1) == labels_N)[order]
    accuracy = np.cumsum(right) / np.arange(1, len(right) + 1)
    last_of_ties = np.append(np.diff(confidence_N[order]) != 0, True)
    good = np.flatnonzero((accuracy >= target_accuracy) & last_of_ties)
    min_confidence = float(confidence_N[order][good[-1]]) if len(good) else 1.0
    return ReviewInfo(
        min_confidence=min_confidence,
        target_accuracy=target_accuracy,
        conformal_level=conformal_level,
        conformal_min_prob=_conformal_min_prob(probs_NK, labels_N, conformal_level),
    )


def prediction_sets(probs_NK: np.ndarray, min_prob: float) -> np.ndarray:
    """Return bool (N, K): the classes of each set; the likeliest class is always in it."""
    sets_NK = probs_NK >= min_prob
    sets_NK[np.arange(len(probs_NK)), probs_NK.argmax(1)] = True
    return sets_NK


def of_frame(answer: dict[str, Any], frame_index: int, num_frames: int) -> dict[str, Any]:
    """Return an answer with the slice that it is for; a person should see one of several."""
    answer = {**answer, "frame_index": frame_index, "num_frames": num_frames}
    if num_frames > 1 and answer["status"] == "scored":
        answer |= {"status": "deferred", "reason": "one_of_many_frames"}
    return answer


def _conformal_min_prob(probs_NK: np.ndarray, labels_N: np.ndarray, level: float) -> float:
    num = len(labels_N)
    rank = math.ceil((num + 1) * level)
    if rank > num:
        return 0.0  # too few scans to promise the level: every class stays in
    scores_N = np.sort(1.0 - probs_NK[np.arange(num), labels_N])
    return float(max(0.0, 1.0 - scores_N[rank - 1]))
