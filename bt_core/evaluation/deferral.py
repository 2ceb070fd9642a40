"""What is gained by handing the unsure scans to a person. Shape suffixes: N scans, K classes."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from bt_core.evaluation.intervals import share_of

COVERAGES: Final = (0.8, 0.9, 0.95, 1.0)


def risk_coverage(confidence_N: np.ndarray, right_N: np.ndarray) -> dict[str, Any]:
    """Return the error rate among the surest scans, for every share of scans that is answered.

    Scans of equal confidence are answered together (Geifman & El-Yaniv 2017).

    Returns:
        `coverage` and `risk` (lists, rising coverage, at most 200 points), `area` under the curve
        over all scans, and `accuracy_at`: accuracy of the surest share of scans, or of the smallest
        larger share that ties allow.
    """
    order = np.argsort(-confidence_N, kind="stable")
    num_N = np.arange(1, len(order) + 1)
    errors_N = np.cumsum(~right_N[order])
    last_of_ties = np.flatnonzero(np.append(np.diff(confidence_N[order]) != 0, True))
    coverage_G, risk_G = num_N[last_of_ties] / len(order), (errors_N / num_N)[last_of_ties]
    weight_G = np.diff(coverage_G, prepend=0.0)
    shown = np.unique(np.linspace(0, len(coverage_G) - 1, 200).astype(int))
    return {
        "coverage": coverage_G[shown].tolist(),
        "risk": risk_G[shown].tolist(),
        "area": float((risk_G * weight_G).sum()),
        "accuracy_at": {
            f"{c:g}": float(1 - risk_G[np.searchsorted(coverage_G, c - 1e-12)]) for c in COVERAGES
        },
    }


def set_figures(
    labels_N: np.ndarray, sets_NK: np.ndarray, family_N: np.ndarray, names: Sequence[str]
) -> dict[str, Any]:
    """Return how often conformal prediction sets hold the true class, and how large they are.

    Returns:
        `coverage` (see `intervals.share_of`), `mean_size`, `single` (share of sets of one class);
        and in `per_class` for the scans of each class `num`, `coverage` and `mean_size` (None
        without any).
    """
    held_N, size_N = sets_NK[np.arange(len(labels_N)), labels_N], sets_NK.sum(1)

    def of(chosen_N: np.ndarray) -> dict[str, Any]:
        num = int(chosen_N.sum())
        return {
            "num": num,
            "coverage": share_of(held_N[chosen_N], family_N[chosen_N]),
            "mean_size": float(size_N[chosen_N].mean()) if num else None,
        }

    return {
        **of(np.ones(len(labels_N), dtype=bool)),
        "single": float((size_N == 1).mean()),
        "per_class": {name: of(labels_N == k) for k, name in enumerate(names)},
    }


def rule_out(
    ill_N: np.ndarray, healthy_prob_N: np.ndarray, family_N: np.ndarray, above: float
) -> dict[str, Any]:
    """Return what comes of calling scans free of a tumour above a probability of none.

    Args:
        ill_N: bool, whether the scan has a tumour.
        healthy_prob_N: probability of none.
        family_N: families, from 0 up.
        above: the threshold, chosen on validation scans.

    Returns:
        `above`; `missed`: share of tumours that are called free of one; `cleared`: share of the
        other scans (see `intervals.share_of`).
    """
    passed_N = healthy_prob_N > above
    return {
        "above": above,
        "missed": share_of(passed_N[ill_N], family_N[ill_N]),
        "cleared": share_of(passed_N[~ill_N], family_N[~ill_N]),
    }
