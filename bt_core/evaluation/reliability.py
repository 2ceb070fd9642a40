"""Does a confidence of 0.9 mean right nine times in ten? Shape suffixes: N scans, K classes."""

from typing import Any, Literal

import numpy as np

Bins = list[dict[str, Any]]


def reliability(
    confidence_N: np.ndarray,
    right_N: np.ndarray,
    equal: Literal["width", "mass"] = "width",
    num_bins: int = 15,
) -> Bins:
    """Return what was said against what came true, in bins of confidence.

    Args:
        confidence_N: probabilities in [0, 1].
        right_N: bool, whether it came true.
        equal: bins of equal width, or (nearly) of equal numbers of scans.
        num_bins: at most; empty ones, and those that ties fold together, are left out.

    Returns:
        For each bin low and high (the second included), num, confidence and accuracy (means).
    """
    edges = np.linspace(0, 1, num_bins + 1)
    if equal == "mass":
        edges = np.unique(np.quantile(confidence_N, edges))
    bin_N = np.searchsorted(edges[1:-1], confidence_N)
    return [
        {
            "low": float(edges[b]),
            "high": float(edges[min(b + 1, len(edges) - 1)]),
            "num": int((bin_N == b).sum()),
            "confidence": float(confidence_N[bin_N == b].mean()),
            "accuracy": float(right_N[bin_N == b].mean()),
        }
        for b in np.unique(bin_N)
    ]


def expected_calibration_error(bins: Bins) -> float:
    """Return the mean distance of accuracy from confidence, by scans (Naeini et al. 2015)."""
    total = sum(b["num"] for b in bins)
    return float(sum(b["num"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / total)


def calibration_figures(labels_N: np.ndarray, probs_NK: np.ndarray) -> dict[str, Any]:
    """Return bins and expected calibration errors of the likeliest class, and of each class.

    Returns:
        `bins` (equal width), `ece` (equal width), `ece_equal_mass`, and `class_wise_ece`: the mean
        over the classes of the error of each class's probability, equal mass (Nixon et al. 2019).
    """
    confidence_N, right_N = probs_NK.max(1), probs_NK.argmax(1) == labels_N
    bins = reliability(confidence_N, right_N)
    by_mass = reliability(confidence_N, right_N, "mass")
    of_class = [
        expected_calibration_error(reliability(probs_NK[:, k], labels_N == k, "mass"))
        for k in range(probs_NK.shape[1])
    ]
    return {
        "bins": bins,
        "ece": expected_calibration_error(bins),
        "ece_equal_mass": expected_calibration_error(by_mass),
        "class_wise_ece": float(np.mean(of_class)),
    }
