"""Figures by any column of the catalog: where is the classifier worse than elsewhere?"""

from typing import Any, Final

import numpy as np

from bt_core.evaluation.intervals import estimate
from bt_core.evaluation.predictions import Scans
from bt_core.labels import LabelSpace

_MOST_VALUES: Final = 6
"""Numbers of more distinct values are cut at their quartiles."""
_NUM_DRAWS: Final = 500
_SHOWN: Final = ("accuracy", "macro_f1", "missed_tumor_rate")
_FEWEST_FAMILIES: Final = 10
"""Slices of fewer are listed, but cannot be the worst."""


def slice_figures(scans: Scans, space: LabelSpace) -> dict[str, Any]:
    """Return figures of every slice of every column that has more than one.

    A slice may differ by the classes that it holds, so its number of scans per class is given too.

    Returns:
        `slices`: column, value, num_scans, num_families, counts (by class) and the estimates of
        accuracy, macro_f1 and missed_tumor_rate by scan; and `worst`, the one of lowest accuracy,
        or None, with `below_all`: whether its interval lies below the accuracy of all scans.
    """
    found: list[dict[str, Any]] = []
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
                }
            )
    large = [one for one in found if one["num_families"] >= _FEWEST_FAMILIES]
    worst = min(large, key=lambda one: one["accuracy"]["value"], default=None)
    if worst is not None:
        worst = {**worst, "below_all": bool(worst["accuracy"]["high"] < scans.right_N.mean())}
    return {"slices": found, "worst": worst}


def _groups(values_N: np.ndarray) -> dict[str, np.ndarray]:
    """Return the name of each slice of a column to its scans."""
    distinct = np.unique(values_N)
    if len(distinct) <= _MOST_VALUES:
        return {str(value) or "(none)": values_N == value for value in distinct}
    if not np.issubdtype(values_N.dtype, np.number):
        return {}
    edges = np.unique(np.quantile(values_N, [0, 0.25, 0.5, 0.75, 1]))
    place_N = np.clip(np.searchsorted(edges, values_N, side="right") - 1, 0, len(edges) - 2)
    return {
        f"{edges[k]:g} to {edges[k + 1]:g}": place_N == k
        for k in range(len(edges) - 1)
        if (place_N == k).any()
    }
