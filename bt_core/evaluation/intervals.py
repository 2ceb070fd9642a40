"""Figures with intervals that respect that copies of one scan are no further evidence.

Whole families (groups of copies, or of a patient's scans) are drawn with replacement: the cluster
bootstrap (Davison & Hinkley 1997, section 3.8; Field & Welsh 2007). Its variance gives the number
of independent scans that would know as much, and that the interval of Wilson (1927), as for shares
in clustered surveys (Korn & Graubard 1998; Franco et al. 2019). Near 0 and 1, where good
classifiers are, percentiles of the draws cover far less than they say: 0.73 instead of 0.95 for a
missed-tumour rate of 0.4 % on 300 families, and without an error seen they say 0 to 0.

The draws depend on the families and the seed alone, so two models on the same scans are drawn alike
and their figures can be compared draw by draw.

Shape suffixes: N scans, K classes, F families, D draws.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
from scipy.stats import t as student

from bt_core.config import StrictModel
from bt_core.evaluation.metrics import figures_of

NUM_DRAWS: Final = 2_000
LEVEL: Final = 0.95
_AROUND_ZERO: Final = ("mcc", "kappa")
"""Figures from -1 to 1."""
_LOSSES: Final = ("log_loss", "brier")
"""Figures without an upper bound, and Brier's: positive, and skewed like them."""
_AT_ONCE: Final = 100
"""Draws whose weights are in memory together."""
_DEFINED: Final = 0.95
"""Share of draws that must define a figure for it to have an interval."""

_FEWEST: Final = 5
"""Families below which no interval is given."""


class Estimate(StrictModel):
    """A figure with its 95 % interval; None is what is not defined, such as no scan of a class."""

    value: float | None
    low: float | None
    high: float | None


def family_codes(family_N: Sequence[str]) -> np.ndarray:
    """Return indices_N from 0 to F - 1 of the families of scans, by their names' order."""
    codes_N: np.ndarray = np.unique(np.array(family_N), return_inverse=True)[1]
    return codes_N


def draw_families(family_N: np.ndarray, num_draws: int, seed: int) -> np.ndarray:
    """Return how often each family is drawn with replacement, counts_DF."""
    num_families = int(family_N.max()) + 1
    generator = np.random.default_rng(seed)
    return generator.multinomial(
        num_families, np.full(num_families, 1 / num_families), size=num_draws
    )


def estimate(
    labels_N: np.ndarray,
    probs_NK: np.ndarray,
    family_N: np.ndarray,
    names: Sequence[str],
    healthy: int,
    prevalence_K: np.ndarray | None = None,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> dict[str, dict[str, Estimate]]:
    """Return every figure with its interval, with each scan counting once and each family once.

    Args:
        labels_N: true class indices.
        probs_NK: probabilities, rows sum to 1.
        family_N: family of each scan, from 0 to F - 1.
        names: K class names.
        healthy: index of the class without a tumour.
        prevalence_K: see `metrics.figures_of`.
        num_draws: D.
        seed: of the draws.

    Returns:
        `by_scan` and `by_family`: name of the figure to its estimate. In the second, a scan weighs
        one over the size of its family: the mean over all ways to keep one scan of each.

    Raises:
        ValueError: without scans.
    """
    if not len(labels_N):
        raise ValueError("no scans to evaluate")
    size_F = np.bincount(family_N)
    weights = {"by_scan": np.ones(len(labels_N)), "by_family": 1 / size_F[family_N]}
    counts_DF = draw_families(family_N, num_draws, seed)

    def figures(weight_N: np.ndarray, counts_DF: np.ndarray) -> dict[str, np.ndarray]:
        weights_ND = counts_DF.T[family_N] * weight_N[:, None]
        return figures_of(labels_N, probs_NK, weights_ND, names, healthy, prevalence_K)

    families_of = _num_families(labels_N, family_N, names, healthy)
    found = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for unit, weight_N in weights.items():
            plain = figures(weight_N, np.ones((1, len(size_F))))
            blocks = [counts_DF[i : i + _AT_ONCE] for i in range(0, num_draws, _AT_ONCE)]
            drawn = list(pool.map(lambda block, own=weight_N: figures(own, block), blocks))
            found[unit] = {
                name: _estimate(
                    name,
                    float(value_1[0]),
                    np.concatenate([one[name] for one in drawn]),
                    (families_of(name), len(labels_N)),
                )
                for name, value_1 in plain.items()
            }
    return found


def _num_families(
    labels_N: np.ndarray, family_N: np.ndarray, names: Sequence[str], healthy: int
) -> Callable[[str], int]:
    """Return a function from a figure's name to the number of families that it rests on."""
    of_class = {
        name: len(np.unique(family_N[labels_N == k]))
        for k, name in enumerate(names)
        if (labels_N == k).any()
    }
    special = {
        "missed_tumor_rate": len(np.unique(family_N[labels_N != healthy])),
        "false_alarm_rate": len(np.unique(family_N[labels_N == healthy])),
    }
    smallest, num_all = min(of_class.values()), len(np.unique(family_N))

    def families_of(figure: str) -> int:
        own = of_class.get(figure.partition(".")[0]) or special.get(figure)
        return own or (smallest if figure.startswith(("macro", "balanced")) else num_all)

    return families_of


def _estimate(name: str, value: float, draws_D: np.ndarray, sizes: tuple[int, int]) -> Estimate:
    """Return a figure's estimate.

    Args:
        name: of the figure.
        value: of all scans.
        draws_D: of the bootstrap.
        sizes: numbers of families that it rests on, and of scans.
    """
    num_families = sizes[0]
    defined = draws_D[~np.isnan(draws_D)]
    if np.isnan(value):
        return Estimate(value=None, low=None, high=None)
    if len(defined) < _DEFINED * len(draws_D) or num_families < _FEWEST:
        return Estimate(value=value, low=None, high=None)
    z = float(student.ppf((1 + LEVEL) / 2, num_families - 1))
    variance = float(defined.var(ddof=1)) * num_families / (num_families - 1)
    if name in _LOSSES:
        factor = math.exp(z * math.sqrt(variance) / value) if value else 1.0
        return Estimate(value=value, low=value / factor, high=value * factor)
    if name in _AROUND_ZERO:
        low, high = _wilson((1 + value) / 2, variance / 4, z, sizes)
        return Estimate(value=value, low=2 * low - 1, high=2 * high - 1)
    low, high = _wilson(value, variance, z, sizes)
    return Estimate(value=value, low=low, high=high)


def _wilson(share: float, variance: float, z: float, sizes: tuple[int, int]) -> tuple[float, float]:
    """Return Wilson's interval of a share whose variance says how many scans it is worth."""
    num_families, num_scans = sizes
    inner = share * (1 - share)
    num = min(inner / variance, num_scans) if inner > 0 and variance > 0 else num_families
    centre = (share + z**2 / (2 * num)) / (1 + z**2 / num)
    half = z / (1 + z**2 / num) * math.sqrt(inner / num + z**2 / (4 * num**2))
    return max(0.0, centre - half), min(1.0, centre + half)
