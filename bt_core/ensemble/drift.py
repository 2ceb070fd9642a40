"""Whether scans that are answered still look like the validation scans, and are answered alike."""

from collections import deque
from collections.abc import Mapping
from typing import Final

import numpy as np

from bt_core.models.bundle import DriftInfo

_NUM_BINS: Final = 10
_PSEUDO_COUNT: Final = 0.5
"""Added to each bin, so that an empty one is no infinite surprise."""


def fit_drift(values: Mapping[str, np.ndarray]) -> DriftInfo:
    """Return the distributions of validation scans, in bins of about a tenth each.

    Args:
        values: of each quantity, by name, a number for each scan.
    """
    edges, shares = {}, {}
    for name, values_N in values.items():
        inner = np.unique(np.quantile(values_N, np.linspace(0, 1, _NUM_BINS + 1)[1:-1]))
        counts = np.bincount(np.searchsorted(inner, values_N), minlength=len(inner) + 1)
        edges[name] = tuple(inner.tolist())
        shares[name] = tuple((counts / len(values_N)).tolist())
    return DriftInfo(edges=edges, shares=shares)


class DriftWatch:
    """Compares the latest answers with the validation scans.

    Args:
        reference: of the bundle.
        num_kept: how many of the latest answers count.
    """

    def __init__(self, reference: DriftInfo, num_kept: int = 1000) -> None:
        self._reference = reference
        self._bins: dict[str, deque[int]] = {n: deque(maxlen=num_kept) for n in reference.edges}

    def add(self, values: Mapping[str, float]) -> None:
        """Take note of an answer, by the quantities that the reference knows."""
        for name, places in self._bins.items():
            if name in values:
                places.append(int(np.searchsorted(self._reference.edges[name], values[name])))

    def stability(self) -> dict[str, float]:
        """Return the population stability index of each quantity; empty before the first answer.

        The symmetrised Kullback-Leibler divergence of shares; below 0.1 counts as stable, above
        0.25 as shifted (Siddiqi, "Credit Risk Scorecards", 2006). Of few answers it is large by
        chance: about (bins - 1) / answers.
        """
        found = {}
        for name, places in self._bins.items():
            if not places:
                continue
            expected = np.array(self._reference.shares[name]) * len(places) + _PSEUDO_COUNT
            seen = np.bincount(list(places), minlength=len(expected)) + _PSEUDO_COUNT
            expected, seen = expected / expected.sum(), seen / seen.sum()
            found[name] = float(((seen - expected) * np.log(seen / expected)).sum())
        return found
