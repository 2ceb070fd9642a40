"""How far a runtime's answers are from the reference's, and whether that is near enough.

Shape suffixes: N scans, K classes.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from pydantic import Field
from scipy.special import softmax
from scipy.stats import beta

from bt_core.config import StrictModel
from bt_core.inference.runtime import confidence

EXACT_BELOW: Final = (0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
"""Confidences that doubtful answers may lie below."""


class Limits(StrictModel):
    """What may differ from the reference."""

    max_flips: float = Field(0.001, ge=0, le=1)
    """Share of scans whose likeliest class is another one."""
    max_change: float = Field(0.05, ge=0, le=1)
    """Of any probability of any scan, by the member alone."""
    min_scans: int = Field(300, ge=1)
    """On fewer, lower precision than float32 is not accepted: that none of 300 flips says that
    fewer than 1 % do, with 95 % confidence."""


@dataclass
class Measured:
    """One way to run a member, on the validation scans and on one thread of this host."""

    name: str
    batch_size: int
    exact_below: float = 0.0
    """As in `RuntimeInfo`."""
    exact_share: float = 0.0
    """Of the validation scans that it answers in float32."""
    images_per_second: float | None = None
    """Of CPU time, median of rounds that all took turns in; None for what this host cannot run."""
    start_seconds: float | None = None
    """Compiling it, once its files are there."""
    label_flips: float | None = None
    """Share of scans with another likeliest class than the reference's."""
    max_change: float | None = None
    """Largest difference of any probability from the reference's, golden picture included."""
    mean_change: float | None = None
    accepted: bool = False
    why_not: str = ""


def doubtful_below(
    logits_NK: np.ndarray, wanted_NK: np.ndarray, temperature: float, limits: Limits
) -> float | None:
    """Return the lowest confidence of `EXACT_BELOW` that keeps the limits, or None.

    Answers less sure are taken from the reference. Both limits are halved, because the scans that
    choose are those that are counted afterwards.

    Args:
        logits_NK: the candidate's.
        wanted_NK: the reference's.
        temperature: the member's.
        limits: what may differ.
    """
    half = Limits(max_flips=limits.max_flips / 2, max_change=limits.max_change / 2)
    for below in EXACT_BELOW:
        doubtful_N1 = confidence(logits_NK)[:, None] < below
        row = Measured("", 1)
        compare(row, np.where(doubtful_N1, wanted_NK, logits_NK), wanted_NK, temperature, 0.0)
        judge(row, half)
        if row.accepted:
            return below
    return None


def compare(
    row: Measured,
    logits_NK: np.ndarray,
    wanted_NK: np.ndarray,
    temperature: float,
    golden: float,
) -> None:
    """Fill in how far answers are from the reference's.

    Args:
        row: of the candidate.
        logits_NK: the candidate's.
        wanted_NK: the reference's.
        temperature: the member's.
        golden: largest change of the golden picture's probabilities.
    """
    probs_NK, right_NK = (
        softmax(np.float64(one) / temperature, axis=1) for one in (logits_NK, wanted_NK)
    )
    change_NK = np.nan_to_num(np.abs(probs_NK - right_NK), nan=1.0)
    row.label_flips = float((probs_NK.argmax(1) != right_NK.argmax(1)).mean())
    row.max_change = float(max(change_NK.max(), golden))
    row.mean_change = float(change_NK.mean())


def judge(row: Measured, limits: Limits, is_unproven: bool = False) -> None:
    """Accept a candidate, or say why not.

    Args:
        row: of the candidate.
        limits: what may differ.
        is_unproven: it was compared on too few scans to be accepted.
    """
    if row.label_flips is None or row.max_change is None:
        return
    faults = [f"it takes {limits.min_scans} scans to accept it"] if is_unproven else []
    if row.label_flips > limits.max_flips:
        faults.append(f"{row.label_flips:.2%} of labels flip, {limits.max_flips:.2%} may")
    if row.max_change > limits.max_change:
        faults.append(f"a probability moves by {row.max_change:.3f}, {limits.max_change:g} may")
    row.accepted, row.why_not = not faults, "; ".join(faults)


def flip_bound(num_flips: int, num_scans: int) -> float:
    """Return what the share of all scans that flip is below, with 95 % confidence.

    The upper bound of Clopper & Pearson (1934), on one side.
    """
    if num_flips == num_scans:
        return 1.0
    return float(beta.ppf(0.95, num_flips + 1, num_scans - num_flips))
