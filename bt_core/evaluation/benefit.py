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
    num_draws: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the net benefit over thresholds from 0.01 to 0.99, with 95 % bands by family.

    Args:
        positive_N: bool, whether the scan has the disease.
        score_N: its probability.
        family_N: see `intervals.estimate`.
        num_draws: of the bootstrap; bands are percentiles.
        seed: of the draws.

    Returns:
        `threshold`, `model`, `low`, `high`, `treat_all` (lists of T); treating none is 0.
    """
    treated_NT = score_N[:, None] >= THRESHOLDS
    odds_T = THRESHOLDS / (1 - THRESHOLDS)
    benefit_NT = treated_NT * np.where(positive_N[:, None], 1.0, -odds_T)
    counts_DF = draw_families(family_N, num_draws, seed)
    weights_DN = counts_DF[:, family_N]
    drawn_DT = weights_DN @ benefit_NT / weights_DN.sum(1, keepdims=True)
    low_T, high_T = np.quantile(drawn_DT, [0.025, 0.975], axis=0)
    share = positive_N.mean()
    return {
        "threshold": THRESHOLDS.tolist(),
        "model": benefit_NT.mean(0).tolist(),
        "low": low_T.tolist(),
        "high": high_T.tolist(),
        "treat_all": (share - (1 - share) * odds_T).tolist(),
    }
