"""Scans with their heat maps: which to show, how they look, and what the maps are worth.

Shape suffixes: N scans, S side.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bt_core.data.page import figure_png, readable
from bt_core.evaluation.explainer import FIGURES
from bt_core.evaluation.predictions import Scans
from bt_core.labels import LabelSpace
from bt_core.scans.decoded import BURNED_IN

KINDS: Final = {
    "wrong": "surest wrong answers",
    "unsure": "least sure answers",
    "right": "surest right answers",
}
_PER_CLASS: Final = 3
_SAMPLE: Final = 32
"""Scans by chance, of which the maps' figures are means."""
_ALIKE: Final = 0.5
"""Rank correlation from which maps with and without what was learnt count as alike."""

_KNOWN: Final = 0.5
"""Share of maps that must have one."""


def chosen_scans(scans: Scans, space: LabelSpace, seed: int = 0) -> dict[str, list[str]]:
    """Return the ids of the scans of each sheet (`KINDS`), class by class, and of `sample`.

    One of each family, and none whose header says that text is burned into its picture: that may be
    a name.
    """
    shown_N = np.array([BURNED_IN not in str(steps) for steps in scans.slices["steps"]])
    order_of = {
        "wrong": (~scans.right_N, -scans.confidence_N),
        "unsure": (np.ones(len(scans), dtype=bool), scans.confidence_N),
        "right": (scans.right_N, -scans.confidence_N),
    }
    found: dict[str, list[str]] = {}
    for kind, (eligible_N, rank_N) in order_of.items():
        found[kind] = []
        for k in range(space.num_classes):
            own = np.flatnonzero(eligible_N & shown_N & (scans.labels_N == k))
            own = own[np.argsort(rank_N[own], kind="stable")]
            _, first = np.unique(scans.family_N[own], return_index=True)
            found[kind] += scans.scan_id[own[np.sort(first)[:_PER_CLASS]]].tolist()
    order = np.random.default_rng(seed).permutation(np.flatnonzero(shown_N))
    _, first = np.unique(scans.family_N[order], return_index=True)
    sample = np.sort(order[np.sort(first)[:_SAMPLE]])
    return {**found, "sample": scans.scan_id[sample].tolist()}


def map_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return means of the maps' figures, and whether they pass the sanity check.

    The check asks two things of the maps: that they change when what was learnt is shuffled
    (Adebayo et al. 2018), and that the class's probability comes sooner than it goes when the
    hottest pixels change first, which the maps of an untrained model do not show.

    Args:
        rows: of `explainer.SCHEMA`, of scans chosen by chance.

    Returns:
        num, the mean of each of `FIGURES` (None if no map has it), `gain` (insertion minus
        deletion) with its standard error, and `passes`; None without any map.
    """
    mapped = [row for row in rows if row["method"]]
    if not mapped:
        return None
    means = {}
    for name in FIGURES:
        values = [row[name] for row in mapped if row[name] is not None]
        means[name] = float(np.mean(values)) if values else None
    gains = np.array([row["insertion"] - row["deletion"] for row in mapped])
    error = float(gains.std(ddof=1) / np.sqrt(len(gains))) if len(gains) > 1 else None
    known = [row for row in mapped if row["randomised_similarity"] is not None]
    similarity = means["randomised_similarity"]
    depends = similarity is not None and similarity < _ALIKE and len(known) >= _KNOWN * len(mapped)
    return {
        "num": len(mapped),
        "methods": sorted({row["method"] for row in mapped}),
        **means,
        "gain": float(gains.mean()),
        "gain_standard_error": error,
        "passes": bool(depends and error is not None and gains.mean() > 2 * error),
    }


def overlay_png(row: Mapping[str, Any]) -> bytes:
    """Draw a row of `explainer.SCHEMA`: the scan as the model sees it, and with its heat map."""
    figure = Figure(figsize=(7, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(square(row, "image"), cmap="gray", vmin=0, vmax=255)
    left.set_axis_off()
    _draw_overlay(right, row)
    figure.suptitle(
        f"{readable(row['predicted_label'])}, confidence {row['confidence']:.3f}"
        f"{' (for review)' if row['status'] == 'deferred' else ''}; "
        f"{readable(row['method'])}; not a medical device",
        fontsize=9,
    )
    return figure_png(figure)


def square(row: Mapping[str, Any], name: str) -> np.ndarray:
    """Return `image` or `heat` of a row of `explainer.SCHEMA`, picture_SS uint8."""
    return np.frombuffer(row[name], np.uint8).reshape(row["size_px"], row["size_px"])


def sheet_png(rows: Sequence[Mapping[str, Any]], label_of: Mapping[str, str]) -> bytes:
    """Draw scans with their heat maps in rows of six.

    Args:
        rows: of `explainer.SCHEMA`, with maps.
        label_of: scan id to true class.
    """
    columns = 6
    lines = max(1, -(-len(rows) // columns))
    figure = Figure(figsize=(1.7 * columns, 2.1 * lines), layout="constrained")
    for number, row in enumerate(rows, 1):
        axes = figure.add_subplot(lines, columns, number)
        _draw_overlay(axes, row)
        said, true = row["predicted_label"], label_of[row["scan_id"]]
        title = readable(said) if said == true else f"{readable(said)}\nis {readable(true)}"
        axes.set_title(f"{title}, {row['confidence']:.2f}", fontsize=9)
    return figure_png(figure)


def sheets(
    explained: pa.Table, chosen: Mapping[str, Sequence[str]], label_of: Mapping[str, str]
) -> dict[str, bytes]:
    """Return the picture of each of `KINDS` that has a scan, by `sheet_KIND`."""
    row_of = {row["scan_id"]: row for row in explained.to_pylist() if row["method"]}
    found = {}
    for kind in KINDS:
        rows = [row_of[i] for i in chosen[kind] if i in row_of]
        if rows:
            found[f"sheet_{kind}"] = sheet_png(rows, label_of)
    return found


def _draw_overlay(axes: Axes, row: Mapping[str, Any]) -> None:
    heat_SS = square(row, "heat") / 255
    axes.imshow(square(row, "image"), cmap="gray", vmin=0, vmax=255)
    axes.imshow(heat_SS, cmap="inferno", vmin=0, vmax=1, alpha=0.65 * heat_SS)
    axes.set_axis_off()
