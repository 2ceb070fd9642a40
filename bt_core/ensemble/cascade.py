"""The cheapest member answers alone where that is safe. Shape suffixes: N scans, K classes."""

from collections.abc import Sequence

import numpy as np

from bt_core.ensemble.review import Decisions, count_once
from bt_core.labels import LabelSpace
from bt_core.models.bundle import CascadeInfo


def fit_cascade(
    alone: Decisions,
    whole: Decisions,
    labels_N: np.ndarray,
    family_N: np.ndarray,
    space: LabelSpace,
    max_disagreement: float = 0.005,
) -> CascadeInfo | None:
    """Choose from which confidence the first member's answer stands for the ensemble's.

    An answer is a class and whether it needs review; the first member's stands only if it needs
    none. The confidence is the lowest at which answers of a new family differ from the ensemble's
    at `max_disagreement` at most, in expectation: conformal risk control (Angelopoulos et al.
    2024), families counted once. For `no tumor` it is raised until no tumour of these scans is
    called free of one without review that the ensemble would not have.

    Args:
        alone: the first member's decisions on validation scans, by its own calibration.
        whole: the ensemble's.
        labels_N: true class indices.
        family_N: families.
        space: the classes.
        max_disagreement: in (0, 1).

    Returns:
        None if too few families are there to promise it, or no answer would stand.
    """
    differs_N = (alone.label_N != whole.label_N) | ~whole.sure_N
    counted_N, num_families = count_once(family_N)
    standing_N = np.where(alone.sure_N, alone.confidence_N, -1.0)
    threshold = _lowest_safe(standing_N, differs_N, counted_N, num_families, max_disagreement)
    if threshold is None:
        return None
    min_confidence = dict.fromkeys(space.names, threshold)
    misses_N = (
        (alone.label_N == space.healthy)
        & (labels_N != space.healthy)
        & ~((whole.label_N == space.healthy) & whole.sure_N)
        & (standing_N >= threshold)
    )
    if misses_N.any():
        healthy = space.names[space.healthy]
        min_confidence[healthy] = float(np.nextafter(standing_N[misses_N].max(), 2.0))
    stands_N = stands(alone, min_confidence, space.names)
    if not stands_N.any():
        return None
    wrong_N = stands_N & differs_N
    return CascadeInfo(
        min_confidence=min_confidence,
        max_disagreement=max_disagreement,
        agreement=float(1 - wrong_N.mean()),
        agreement_by_family=float(1 - (wrong_N * counted_N).sum() / num_families),
        answered_alone=float(stands_N.mean()),
        num_scans=len(labels_N),
        num_families=num_families,
    )


def stands(alone: Decisions, min_confidence: dict[str, float], names: Sequence[str]) -> np.ndarray:
    """Return bool_N: which of the first member's answers stand for the ensemble's."""
    least_K = np.array([min_confidence[name] for name in names])
    result: np.ndarray = alone.sure_N & (alone.confidence_N >= least_K[alone.label_N])
    return result


def _lowest_safe(
    standing_N: np.ndarray,
    differs_N: np.ndarray,
    counted_N: np.ndarray,
    num_families: int,
    max_disagreement: float,
) -> float | None:
    """Return the lowest confidence whose risk for a new family is bounded; None if none is."""
    order = np.argsort(-standing_N, kind="stable")
    risk_N = (np.cumsum((differs_N * counted_N)[order]) + 1) / (num_families + 1)
    last_of_ties = np.append(np.diff(standing_N[order]) != 0, True)
    safe = np.flatnonzero((risk_N <= max_disagreement) & last_of_ties & (standing_N[order] >= 0))
    return float(standing_N[order][safe[-1]]) if len(safe) else None
