"""Shares of the members in the average. Shape suffixes: M members, N scans, K classes."""

from typing import Final, Literal

import numpy as np
from sklearn.model_selection import GroupKFold

from bt_core.ensemble.review import count_once

Method = Literal["log_loss", "greedy", "equal"]
_STEPS: Final = 500
_ROUNDS: Final = 50
_NUM_FOLDS: Final = 5
_LEAST_SHARE: Final = 0.01
"""Of a member that answers; what has less costs its time and changes nothing."""


def fit_weights(true_probs_MN: np.ndarray, family_N: np.ndarray, method: Method) -> np.ndarray:
    """Return shares_M that sum to 1.

    Args:
        true_probs_MN: each member's tempered probability of the scan's true class.
        family_N: families; each counts once, whatever its size.
        method: `log_loss`, the shares that minimise the log loss of the mean; `greedy`, ensemble
            selection with replacement by the same loss (Caruana et al. 2004); `equal`.
    """
    if method == "equal":
        return np.full(len(true_probs_MN), 1 / len(true_probs_MN))
    counted_N, num_families = count_once(family_N)
    fit = _by_log_loss if method == "log_loss" else _by_selection
    shares_M = fit(np.maximum(true_probs_MN, 1e-12), counted_N / num_families)
    shares_M = np.where(shares_M < _LEAST_SHARE, 0, shares_M)
    result: np.ndarray = shares_M / shares_M.sum()
    return result


def out_of_fold_log_loss(
    true_probs_MN: np.ndarray, family_N: np.ndarray, method: Method
) -> float | None:
    """Return the log loss, one per family, of shares fitted on other families, in five folds.

    None if there are fewer than five families.
    """
    counted_N, num_families = count_once(family_N)
    if num_families < _NUM_FOLDS:
        return None
    losses_N = np.zeros(len(family_N))
    for fitted, held in GroupKFold(_NUM_FOLDS).split(family_N, groups=family_N):
        shares_M = fit_weights(true_probs_MN[:, fitted], family_N[fitted], method)
        losses_N[held] = -np.log(np.maximum(shares_M @ true_probs_MN[:, held], 1e-12))
    return float((losses_N * counted_N).sum() / num_families)


def choose_weights(
    true_probs_MN: np.ndarray, family_N: np.ndarray, method: Method
) -> tuple[np.ndarray, dict[str, float | None]]:
    """Return shares_M by a method if it does better on other families than equal ones, else these.

    Returns:
        The shares, and the out-of-fold log loss by method.
    """
    methods: dict[str, Method] = {method: method, "equal": "equal"}
    losses = {n: out_of_fold_log_loss(true_probs_MN, family_N, m) for n, m in methods.items()}
    ours, plain = losses[method], losses["equal"]
    better = ours is not None and plain is not None and ours < plain
    chosen: Method = method if better else "equal"
    return fit_weights(true_probs_MN, family_N, chosen), losses


def _by_log_loss(true_probs_MN: np.ndarray, counted_N: np.ndarray) -> np.ndarray:
    """Maximise the likelihood of a mixture of known densities by EM, whose problem is convex."""
    shares_M = np.full(len(true_probs_MN), 1 / len(true_probs_MN))
    for _ in range(_STEPS):
        parts_MN = shares_M[:, None] * true_probs_MN
        shares_M = (parts_MN / parts_MN.sum(0)) @ counted_N
    return shares_M


def _by_selection(true_probs_MN: np.ndarray, counted_N: np.ndarray) -> np.ndarray:
    """Add the member that helps most, again and again, and keep the best of all sums."""
    total_N = np.zeros(len(counted_N))
    counts_M = np.zeros(len(true_probs_MN))
    best, best_loss = counts_M, np.inf
    for size in range(1, _ROUNDS + 1):
        losses_M = -np.log((total_N + true_probs_MN) / size) @ counted_N
        chosen = int(losses_M.argmin())
        total_N = total_N + true_probs_MN[chosen]
        counts_M = counts_M + (np.arange(len(counts_M)) == chosen)
        if losses_M[chosen] < best_loss - 1e-9:
            best, best_loss = counts_M / size, losses_M[chosen]
    return best
