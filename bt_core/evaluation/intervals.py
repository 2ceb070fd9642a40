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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from scipy.special import expit, logit
from scipy.stats import t as student

from bt_core.config import StrictModel
from bt_core.evaluation.metrics import denominators, figures_of

NUM_DRAWS: Final = 2_000
LEVEL: Final = 0.95
_AROUND_ZERO: Final = ("mcc", "kappa")
"""Figures from -1 to 1."""
_LOSSES: Final = ("log_loss", "brier")
"""Figures without an upper bound, and Brier's: positive, and skewed like them."""
_AT_ONCE: Final = 100
"""Draws whose weights are in memory together."""
DEFINED: Final = 0.95
"""Share of draws that must define a figure for it to have an interval."""

_PRIOR: Final = 10.0
"""Families in error that the assumption of wholly alike families weighs as much as."""
FEWEST: Final = 5
"""Families below which no interval is given."""


@dataclass(frozen=True)
class _Base:
    """What a figure rests on.

    Attributes:
        num_families: families with a scan in its denominator.
        effective: that number if all were of equal weight (Kish 1965).
        num_scans: scans there.
    """

    num_families: int
    effective: float
    num_scans: int


class Estimate(StrictModel):
    """A figure with its 95 % interval; None is what is not defined, such as no scan of a class."""

    value: float | None
    low: float | None
    high: float | None


def interval_text(one: Mapping[str, float | None], sign: str = "") -> str:
    """Return an estimate, as a mapping, for people: `0.961 [0.939, 0.975]`, or a dash."""
    value, low, high = one["value"], one["low"], one["high"]
    if value is None:
        return "-"
    if low is None or high is None:
        return f"{value:{sign}.3f}"
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def share_of(
    hit_N: np.ndarray, family_N: np.ndarray, num_draws: int = NUM_DRAWS, seed: int = 0
) -> dict[str, Any]:
    """Return `by_scan` and `by_family`: the estimates, as mappings, of a share of scans.

    Args:
        hit_N: bool.
        family_N: families, any numbers.
        num_draws: D.
        seed: of the draws.
    """
    if not len(hit_N):
        nothing = Estimate(value=None, low=None, high=None).model_dump()
        return {"by_scan": nothing, "by_family": nothing}
    code_N, size_F = np.unique(family_N, return_inverse=True, return_counts=True)[1:]
    counts_DF = draw_families(code_N, num_draws, seed)
    found = {}
    for unit, weight_N in (("by_scan", np.ones(len(hit_N))), ("by_family", 1 / size_F[code_N])):
        hits_F = np.bincount(code_N, weights=weight_N * hit_N)
        total_F = np.bincount(code_N, weights=weight_N)
        draws_D = (counts_DF @ hits_F) / (counts_DF @ total_F)
        value = float(hits_F.sum() / total_F.sum())
        found[unit] = _estimate("share", value, draws_D, _base(weight_N, code_N)).model_dump()
    return found


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
    units: Sequence[str] = ("by_scan", "by_family"),
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
        units: which of the two are wanted.

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

    found = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for unit in units:
            weight_N = weights[unit]
            base_of = _bases(labels_N, probs_NK, weight_N, family_N, names, healthy)
            plain = figures(weight_N, np.ones((1, len(size_F))))
            blocks = [counts_DF[i : i + _AT_ONCE] for i in range(0, num_draws, _AT_ONCE)]
            drawn = list(pool.map(lambda block, own=weight_N: figures(own, block), blocks))
            found[unit] = {
                name: _estimate(
                    name,
                    float(value_1[0]),
                    np.concatenate([one[name] for one in drawn]),
                    base_of(name),
                )
                for name, value_1 in plain.items()
            }
    return found


def _bases(
    labels_N: np.ndarray,
    probs_NK: np.ndarray,
    weight_N: np.ndarray,
    family_N: np.ndarray,
    names: Sequence[str],
    healthy: int,
) -> Callable[[str], _Base]:
    """Return a function from a figure's name to what it rests on."""
    parts = denominators(labels_N, probs_NK, names, healthy)
    everything = _base(weight_N, family_N)

    def base_of(figure: str) -> _Base:
        if figure not in parts:
            return everything
        bases = [_base(weight_N[mask], family_N[mask]) for mask in parts[figure]]
        smallest = min(bases, key=lambda base: base.effective)
        if not figure.startswith(("macro", "balanced")):
            return smallest
        # The variance of a mean over classes is the sum of theirs over the square of their number.
        effective = len(bases) ** 2 / sum(1 / base.effective for base in bases)
        return _Base(smallest.num_families, effective, sum(base.num_scans for base in bases))

    return base_of


def _base(weight_N: np.ndarray, family_N: np.ndarray) -> _Base:
    of_family_F = np.bincount(family_N, weights=weight_N)
    of_family_F = of_family_F[of_family_F > 0]
    if not len(of_family_F):
        return _Base(0, 0.0, 0)
    effective = of_family_F.sum() ** 2 / (of_family_F**2).sum()
    return _Base(len(of_family_F), float(effective), len(family_N))


def _estimate(name: str, value: float, draws_D: np.ndarray, base: _Base) -> Estimate:
    """Return a figure's estimate from its value on all scans and in the bootstrap's draws."""
    bare = Estimate(value=None if np.isnan(value) else value, low=None, high=None)
    defined = draws_D[~np.isnan(draws_D)]
    few = len(defined) < DEFINED * len(draws_D) or base.num_families < FEWEST
    if np.isnan(value) or few:
        return bare
    z = float(student.ppf((1 + LEVEL) / 2, base.num_families - 1))
    variance = float(defined.var(ddof=1)) * base.num_families / (base.num_families - 1)
    if name in _LOSSES:
        if not variance or not value:
            return bare
        factor = math.exp(z * math.sqrt(variance) / value)
        return Estimate(value=value, low=value / factor, high=value * factor)
    if name in _AROUND_ZERO:
        low, high = _wilson((1 + value) / 2, variance / 4, z, base)
        return Estimate(value=value, low=2 * low - 1, high=2 * high - 1)
    if name.endswith("_at_prevalence"):  # the prevalence bounds it, so it may lie near 0 or 1
        inside = defined[(defined > 0) & (defined < 1)]
        if 0 < value < 1 and len(inside) >= DEFINED * len(draws_D):
            scale = math.sqrt(base.num_families / (base.num_families - 1))
            half = z * float(logit(inside).std(ddof=1)) * scale
            low, high = expit([logit(value) - half, logit(value) + half])
            return Estimate(value=value, low=float(low), high=float(high))
    ranking = name.endswith(("auc", "average_precision"))
    low, high = _wilson(value, variance, z, base, prior=1.0 if ranking else _PRIOR)
    return Estimate(value=value, low=low, high=high)


def _wilson(
    share: float, variance: float, z: float, base: _Base, prior: float = _PRIOR
) -> tuple[float, float]:
    """Return Wilson's interval of a share, with the number of scans that its variance is worth.

    Few errors say little about the variance, none say nothing. So that number is drawn towards the
    number of families, as if all scans of one were right or wrong together, with the weight of
    `prior` families in error; else one error more could give a higher lower bound. For areas under
    curves, whose variance is known from far fewer errors, the weight is small; near 1 they are
    still wider than they need to be.
    """
    inner = share * (1 - share)
    measured = min(inner / variance, base.num_scans) if inner > 0 and variance > 0 else 0.0
    trust = base.effective * min(share, 1 - share) if measured else 0.0
    num = (trust * measured + prior * base.effective) / (trust + prior)
    centre = (share + z**2 / (2 * num)) / (1 + z**2 / num)
    half = z / (1 + z**2 / num) * math.sqrt(inner / num + z**2 / (4 * num**2))
    return max(0.0, centre - half), min(1.0, centre + half)
