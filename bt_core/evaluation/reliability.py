"""Does a confidence of 0.9 mean right nine times in ten?

Shape suffixes: N scans, K classes, F families, D draws, P parameters.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit
from scipy.stats import t as student

from bt_core.evaluation.intervals import FEWEST, LEVEL, Estimate, draw_families, share_of

Equal = Literal["width", "mass"]
_NUM_BINS: Final = 15
_NUM_DRAWS: Final = 500
_SURE: Final = 1e-6
"""Probabilities nearer to 0 or 1 are taken as this near, so that their log odds are finite."""


def _binned(confidence_N: np.ndarray, equal: Equal) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges, and the bin of each scan: of equal width, or nearly of equal numbers.

    Some bins may be empty, and ties fold those of equal numbers together.
    """
    edges = np.linspace(0, 1, _NUM_BINS + 1)
    if equal == "mass":
        edges = np.unique(np.quantile(confidence_N, edges))
    return edges, np.searchsorted(edges[1:-1], confidence_N)


def calibration_figures(
    labels_N: np.ndarray, probs_NK: np.ndarray, family_N: np.ndarray, healthy: int
) -> dict[str, Any]:
    """Return how well what was said fits what came true.

    Args:
        labels_N: true class indices.
        probs_NK: probabilities, rows sum to 1.
        family_N: family of each scan, from 0 to F - 1.
        healthy: index of the class without a tumour.

    Returns:
        `bins` of equal width, but for empty ones: what was said against what came true. Each has
        `low` and `high` (the second included), `num`, the means `confidence` and `accuracy`, and
        the `interval` of the latter. As estimates, in mappings: the expected calibration errors
        `ece` (equal width) and `ece_equal_mass` of the likeliest class, which are mean distances of
        accuracy from confidence (Naeini et al. 2015), and `class_wise_ece`, the mean over the
        classes of the error of each class's probability, equal mass (Nixon et al. 2019); `slope` of
        what came true against the log odds of a tumour (1 is right; below 1, answers are too sure),
        and `intercept`, with the slope held at 1 (0 is right; above 0, tumours are more frequent
        than said): Cox 1958.
    """
    confidence_N, right_N = probs_NK.max(1), probs_NK.argmax(1) == labels_N
    edges, bin_N = _binned(confidence_N, "width")
    bins = [
        {
            "low": float(edges[b]),
            "high": float(edges[b + 1]),
            "num": int(own_N.sum()),
            "confidence": float(confidence_N[own_N].mean()),
            "accuracy": float(right_N[own_N].mean()),
            "interval": share_of(right_N[own_N], family_N[own_N], _NUM_DRAWS)["by_scan"],
        }
        for b in np.unique(bin_N)
        for own_N in (bin_N == b,)
    ]
    likeliest = [(confidence_N, right_N)]
    each = [(probs_NK[:, k], labels_N == k) for k in range(probs_NK.shape[1])]
    counts_DF = draw_families(family_N, _NUM_DRAWS, seed=0)
    found = {
        "ece": _error(likeliest, "width", family_N, counts_DF),
        "ece_equal_mass": _error(likeliest, "mass", family_N, counts_DF),
        "class_wise_ece": _error(each, "mass", family_N, counts_DF),
    }
    log_odds_N = logit(np.clip(1 - probs_NK[:, healthy], _SURE, 1 - _SURE))
    tumour_N, ones_N = labels_N != healthy, np.ones(len(labels_N))
    with_slope = np.stack([ones_N, log_odds_N], axis=1)
    found["slope"] = _coefficients(with_slope, 0 * log_odds_N, tumour_N, family_N)[1]
    found["intercept"] = _coefficients(ones_N[:, None], log_odds_N, tumour_N, family_N)[0]
    return {"bins": bins} | {name: one.model_dump() for name, one in found.items()}


def _error(
    of: Sequence[tuple[np.ndarray, np.ndarray]],
    equal: Equal,
    family_N: np.ndarray,
    counts_DF: np.ndarray,
) -> Estimate:
    """Return the mean expected calibration error of pairs of what was said and what came true.

    The error of a sample lies above the true one, that of a draw from the sample as much again; so
    the interval is the basic one, the draws mirrored at the value (Davison & Hinkley 1997, 5.2). It
    begins at 0 unless the value is beyond those of draws without any error, of what is left of the
    gaps when the sample's own are taken off. Mirrored, it could not end above twice the value, far
    too low where that is small by chance; so it ends no lower than the draws without their bias.
    """
    values, draws, without = [], [], []
    num_F = np.bincount(family_N)
    for said_N, true_N in of:
        _, bin_N = _binned(said_N, equal)
        place_N, num_bins = np.unique(bin_N, return_inverse=True)[1], len(np.unique(bin_N))
        gap_FB = np.zeros((len(num_F), num_bins))
        np.add.at(gap_FB, (family_N, place_N), true_N - said_N)
        values.append(np.abs(gap_FB.sum(0)).sum() / num_F.sum())
        num_D, gap_DB = counts_DF @ num_F, counts_DF @ gap_FB
        draws.append(np.abs(gap_DB).sum(1) / num_D)
        without.append(np.abs(gap_DB - gap_FB.sum(0)).sum(1) / num_D)
    value = float(np.mean(values))
    if len(num_F) < FEWEST:
        return Estimate(value=value, low=None, high=None)
    tail = 100 * (1 - LEVEL) / 2
    drawn_D = np.mean(draws, axis=0)
    least, most = np.percentile(drawn_D, (tail, 100 - tail))
    is_none = value <= np.percentile(np.mean(without, axis=0), 100 - tail)
    low = 0.0 if is_none else max(0.0, 2 * value - most)
    high = max(low, 2 * value - least, most - (drawn_D.mean() - value))
    return Estimate(value=value, low=low, high=float(high))


def _coefficients(
    x_NP: np.ndarray, offset_N: np.ndarray, true_N: np.ndarray, family_N: np.ndarray
) -> list[Estimate]:
    """Return the coefficients of a logistic regression, with intervals robust to families.

    The variance is the sandwich over families (Liang & Zeger 1986). Undefined where one side is
    empty, or a threshold divides the two sides, for then there is no maximum.
    """
    num_families = int(family_N.max()) + 1
    nothing = [Estimate(value=None, low=None, high=None)] * x_NP.shape[1]
    log_odds_N = x_NP[:, -1] if x_NP.shape[1] > 1 else np.zeros(len(true_N))
    sides = [log_odds_N[true_N], log_odds_N[~true_N]]
    if not all(map(len, sides)):
        return nothing
    apart = sides[0].min() >= sides[1].max() or sides[0].max() <= sides[1].min()
    if x_NP.shape[1] > 1 and apart:
        return nothing

    def loss(beta_P: np.ndarray) -> tuple[float, np.ndarray]:
        z_N = x_NP @ beta_P + offset_N
        value = np.logaddexp(0, z_N).sum() - z_N[true_N].sum()
        return float(value), x_NP.T @ (expit(z_N) - true_N)

    found = minimize(loss, np.zeros(x_NP.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-6})
    beta_P = found.x
    said_N = expit(x_NP @ beta_P + offset_N)
    information_PP = (x_NP * (said_N * (1 - said_N))[:, None]).T @ x_NP
    if not np.isfinite(beta_P).all() or np.linalg.cond(information_PP) > 1e12:
        return nothing
    bread_PP = np.linalg.inv(information_PP)
    score_FP = np.zeros((num_families, len(beta_P)))
    np.add.at(score_FP, family_N, x_NP * (true_N - said_N)[:, None])
    enough = num_families / max(1, num_families - 1)
    variance_PP = enough * bread_PP @ (score_FP.T @ score_FP) @ bread_PP
    if num_families < FEWEST:
        return [Estimate(value=float(b), low=None, high=None) for b in beta_P]
    half_P = student.ppf((1 + LEVEL) / 2, num_families - 1) * np.sqrt(np.diag(variance_PP))
    return [
        Estimate(value=float(b), low=float(b - h), high=float(b + h))
        for b, h in zip(beta_P, half_P, strict=True)
    ]
