"""Averaging and temperature scaling. Shape suffixes: M members, N scans, K classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax

from bt_core.errors import BundleError
from bt_core.models.bundle import BundleInfo, ReviewInfo

_SEARCH = (0.05, 20.0)


def fit_temperature(logits_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """Return the temperature that minimises the log loss of softmax(logits / T).

    Guo et al. 2017, "On Calibration of Modern Neural Networks"; searched between 0.05 and 20.
    """
    rows = np.arange(len(labels_N))

    def log_loss(log_temperature: float) -> float:
        scaled = log_softmax(np.float64(logits_NK) / np.exp(log_temperature), axis=1)
        return float(-scaled[rows, labels_N].mean())

    found = minimize_scalar(log_loss, bounds=tuple(np.log(_SEARCH)), method="bounded")
    return float(np.exp(found.x))


def averaged_log_probs(
    logits_MNK: np.ndarray, weights: Sequence[float], temperatures: Sequence[float]
) -> np.ndarray:
    """Return the logarithm of the weighted mean of the members' tempered probabilities, (N, K)."""
    scaled = np.float64(logits_MNK) / np.array(temperatures)[:, None, None]
    log_probs_MNK = log_softmax(scaled, axis=2)
    mean: np.ndarray = logsumexp(log_probs_MNK, axis=0, b=np.array(weights)[:, None, None])
    return mean


def combine(
    logits_MNK: np.ndarray,
    weights: Sequence[float],
    temperatures: Sequence[float],
    temperature: float,
) -> np.ndarray:
    """Return the ensemble's calibrated probabilities, probs_NK float64, rows summing to 1.

    Args:
        logits_MNK: logits of every member.
        weights: M shares that sum to 1.
        temperatures: M temperatures, one per member, applied before averaging.
        temperature: applied to the logarithm of the average.
    """
    log_probs_NK = averaged_log_probs(logits_MNK, weights, temperatures)
    probs_NK: np.ndarray = softmax(log_probs_NK / temperature, axis=1)
    return probs_NK


@dataclass(frozen=True)
class Calibration:
    """How the logits of some members become probabilities, and which answers need review."""

    members: tuple[str, ...]
    weights: tuple[float, ...]
    temperatures: tuple[float, ...]
    temperature: float
    review: ReviewInfo

    def probs(self, logits_MNK: np.ndarray) -> np.ndarray:
        """Return calibrated probs_NK float64 of the logits of these members, in their order."""
        return combine(logits_MNK, self.weights, self.temperatures, self.temperature)


def calibration_of(info: BundleInfo, members: Sequence[str]) -> Calibration:
    """Return the calibration of some of a bundle's members, in the bundle's order.

    Raises:
        BundleError: if the bundle has none for them.
    """
    chosen = [m for m in info.members if m.name in members]
    names = tuple(m.name for m in chosen)
    total = sum(m.weight for m in chosen)
    temperature, review = info.temperature, info.review
    if len(chosen) < len(info.members):
        fitted = {subset.members: subset for subset in info.subsets}
        if names not in fitted:
            raise BundleError(
                f"the bundle is not calibrated for {', '.join(names) or 'no member'} alone; all of "
                f"{', '.join(m.name for m in info.members)} must be there"
            )
        temperature, review = fitted[names].temperature, fitted[names].review
    return Calibration(
        names,
        tuple(m.weight / total for m in chosen),
        tuple(m.temperature for m in chosen),
        temperature,
        review,
    )
