"""Decision curves: is acting on the classifier better than treating all, or none?

Net benefit (Vickers & Elkin 2006) at a threshold t, the probability at which a person is
indifferent between treating and not: true positives minus false positives times t / (1 - t), per
scan.

Shape suffixes: N scans, T thresholds, D draws.
"""

from typing import Any, Final

import numpy as np

from bt_core.evaluation.intervals import draw_families

THRESHOLDS: Final = np.arange(1, 100) / 100


def decision_curve(
    positive_N: np.ndarray,
    score_N: np.ndarray,
    family_N: np.ndarray,
    prevalence: float | None = None,
    num_draws: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the net benefit over thresholds from 0.01 to 0.99, with 95 % bands by family.

    Args:
        positive_N: bool, whether the scan has the disease.
        score_N: its probability.
        family_N: see `intervals.estimate`.
        prevalence: share of scans with the disease where it will be used; None takes that of these.
        num_draws: of the bootstrap; bands are percentiles.
        seed: of the draws.

    Returns:
        `threshold`, `model`, `low`, `high`, `treat_all` (lists of T), and the `prevalence` that
        they are for; treating none is 0.
    """
    stated = float(positive_N.mean()) if prevalence is None else prevalence
    treated_NT = np.float64(score_N[:, None] >= THRESHOLDS)  # products of integers are slow
    odds_T = THRESHOLDS / (1 - THRESHOLDS)

    def benefit(weights_DN: np.ndarray) -> np.ndarray:
        """Return the benefit in each draw, for the prevalence, which is not drawn."""
        ill_DN, well_DN = weights_DN * positive_N, weights_DN * ~positive_N
        with np.errstate(invalid="ignore"):  # a draw without scans of one side is left out
            found_DT = ill_DN @ treated_NT / ill_DN.sum(1, keepdims=True)
            false_DT = well_DN @ treated_NT / well_DN.sum(1, keepdims=True)
        return np.asarray(stated * found_DT - (1 - stated) * odds_T * false_DT)

    drawn_DT = benefit(draw_families(family_N, num_draws, seed)[:, family_N])
    low_T, high_T = np.nanquantile(drawn_DT, [0.025, 0.975], axis=0)
    return {
        "prevalence": stated,
        "threshold": THRESHOLDS.tolist(),
        "model": benefit(np.ones((1, len(positive_N))))[0].tolist(),
        "low": low_T.tolist(),
        "high": high_T.tolist(),
        "treat_all": (stated - (1 - stated) * odds_T).tolist(),
    }
