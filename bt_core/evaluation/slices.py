"""Figures by any column of the catalog: where is the classifier worse than elsewhere?

Shape suffixes: N scans, F families, D draws.
"""

import math
from typing import Any, Final

import numpy as np
from scipy.stats import t as student

from bt_core.data.explore import ALPHA, holm
from bt_core.evaluation.intervals import draw_families, estimate
from bt_core.evaluation.predictions import Scans
from bt_core.labels import LabelSpace
from bt_core.scans.members import MOST_VALUES

_MOST_NUMBERS: Final = 6
"""Numbers of more distinct values are cut at their quartiles."""
_NUM_DRAWS: Final = 500
_SHOWN: Final = ("accuracy", "macro_f1", "missed_tumor_rate")
_FEWEST_FAMILIES: Final = 10
"""Slices of fewer, or with fewer besides, are listed, but cannot be the worst."""


def slice_figures(scans: Scans, space: LabelSpace) -> dict[str, Any]:
    """Return figures of every slice of every column that has more than one.

    A slice may differ by the classes that it holds, so its number of scans per class is given too.

    Returns:
        `slices`: column, value, num_scans, num_families, counts (by class), the estimates of
        accuracy, macro_f1 and missed_tumor_rate by scan, and `p_value` of its accuracy against that
        of all other scans (Holm-corrected over all slices; None for few families); and `worst`, the
        one of lowest accuracy, or None, with `below_others`: whether that is beyond chance.
    """
    found: list[dict[str, Any]] = []
    counts_DF = draw_families(scans.family_N, _NUM_DRAWS, seed=0)
    for column, values_N in scans.slices.items():
        groups = _groups(values_N)
        if len(groups) < 2:
            continue
        for name, chosen_N in groups.items():
            part = scans.where(chosen_N)
            figures = estimate(
                part.labels_N, part.probs_NK, part.family_N, space.names, space.healthy,
                num_draws=_NUM_DRAWS, units=("by_scan",),
            )["by_scan"]  # fmt: skip
            counts = np.bincount(part.labels_N, minlength=space.num_classes)
            found.append(
                {
                    "column": column,
                    "value": name,
                    "num_scans": len(part),
                    "num_families": int(part.family_N.max()) + 1,
                    "counts": dict(zip(space.names, counts.tolist(), strict=True)),
                    **{shown: figures[shown].model_dump() for shown in _SHOWN},
                    "p_value": _p_value(scans, chosen_N, counts_DF),
                }
            )
    tested = [one for one in found if one["p_value"] is not None]
    for one, p_value in zip(tested, holm([one["p_value"] for one in tested]), strict=True):
        one["p_value"] = p_value
    worst = min(tested, key=lambda one: one["accuracy"]["value"], default=None)
    if worst is not None:
        below = worst["accuracy"]["value"] < scans.right_N.mean() and worst["p_value"] < ALPHA
        worst = {**worst, "below_others": bool(below)}
    return {"slices": found, "worst": worst}


def _p_value(scans: Scans, chosen_N: np.ndarray, counts_DF: np.ndarray) -> float | None:
    """Return the two-sided p value of a slice's accuracy against that of all other scans.

    Of Student's t, with the deviation of their difference over draws of families, but not less than
    that of families that are all as often right: a small side without an error seems not to vary at
    all. None where one side has few families.
    """
    rates, nums = [], []
    for side_N in (chosen_N, ~chosen_N):
        size_F = np.bincount(scans.family_N, weights=side_N)
        right_F = np.bincount(scans.family_N, weights=side_N & scans.right_N)
        num_D = counts_DF @ size_F
        nums.append(int((size_F > 0).sum()))
        if nums[-1] < _FEWEST_FAMILIES or not num_D.all():
            return None
        rates.append((right_F.sum() / size_F.sum(), (counts_DF @ right_F) / num_D))
    (one, one_D), (other, other_D) = rates
    everywhere = scans.right_N.mean()
    alike = math.sqrt(everywhere * (1 - everywhere) * (1 / nums[0] + 1 / nums[1]))
    deviation = max(float((one_D - other_D).std(ddof=1)), alike)
    if not deviation:  # all are right, or all wrong
        return 1.0
    return float(2 * student.sf(abs(one - other) / deviation, min(nums) - 1))


def _groups(values_N: np.ndarray) -> dict[str, np.ndarray]:
    """Return the name of each slice of a column to its scans."""
    distinct = np.unique(values_N)
    is_number = np.issubdtype(values_N.dtype, np.number)
    if len(distinct) <= (_MOST_NUMBERS if is_number else MOST_VALUES):
        return {str(value) or "(none)": values_N == value for value in distinct}
    if not is_number:
        return {}
    edges = np.unique(np.quantile(values_N, [0, 0.25, 0.5, 0.75, 1]))
    place_N = np.clip(np.searchsorted(edges, values_N, side="right") - 1, 0, len(edges) - 2)
    return {
        f"{edges[k]:g} to {edges[k + 1]:g}": place_N == k
        for k in range(len(edges) - 1)
        if (place_N == k).any()
    }
