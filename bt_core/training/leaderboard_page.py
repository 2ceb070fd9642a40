"""The leaderboard as one HTML page without network, with parallel coordinates."""

from collections.abc import Sequence
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from bt_core import storage
from bt_core.data.page import figure_png, render
from bt_core.training.leaderboard import TOGETHER, Row, alone, by_family, noise_note, short
from bt_core.training.sweep import MODES, SweepSpec

_MARGIN: Final = 0.06


def write_page(location: str, rows: Sequence[Row], spec: SweepSpec) -> None:
    """Write leaderboard.html into a folder."""
    page = render(
        "bt_core.training",
        "leaderboard.html.j2",
        rows=rows,
        spec=spec,
        keys=list(spec.space),
        short=short,
        by_family=by_family,
        together=TOGETHER,
        alone=alone(rows),
        note=noise_note(rows, spec),
        picture=parallel_coordinates_png(rows, spec),
    )
    storage.write_bytes(storage.join(location, "leaderboard.html"), page)


def parallel_coordinates_png(rows: Sequence[Row], spec: SweepSpec) -> bytes:
    """Draw each trial that has a score as a line over recipe, searched keys and score.

    The colour is the score, thick lines are the leader and what is tied with it, and trials that
    were stopped are dotted.
    """
    shown = [row for row in reversed(rows) if row["score"] is not None]
    names = ["recipe", *spec.space, "score"]
    figure = Figure(figsize=(2.4 + 1.9 * len(names), 4.8), layout="constrained")
    axes = figure.add_subplot()
    heights = [
        _axis(axes, x, [row[name] for row in shown], _is_log(name, spec))
        for x, name in enumerate(names)
    ]
    scores = [row["score"] for row in shown]
    scale = Normalize(min(scores, default=0.0), max(scores, default=1.0))
    colours = matplotlib.colormaps["viridis_r" if MODES[spec.metric] == "max" else "viridis"]
    for i, row in enumerate(shown):
        axes.plot(
            range(len(names)),
            [column[i] for column in heights],
            "-" if row["status"] == "finished" else ":",
            color=colours(scale(row["score"])),
            linewidth=2.6 if row["tied"] else 1.0,
        )
    titles = [spec.metric if name == "score" else name.split(".")[-1] for name in names]
    axes.set_xticks(range(len(names)), titles)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(-_MARGIN, 1 + _MARGIN)
    axes.set_yticks([])
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    return figure_png(figure)


def _is_log(name: str, spec: SweepSpec) -> bool:
    return name in spec.space and spec.space[name].log_uniform is not None


def _axis(axes: Axes, x: int, values: Sequence[Any], is_log: bool) -> list[float]:
    """Draw one vertical axis with its labels and return each value's height in [0, 1]."""
    axes.axvline(x, color="0.6", linewidth=0.8, zorder=0)
    numeric = all(type(v) in (int, float) for v in values) and len(set(values)) > 1
    if numeric:
        numbers = np.log(values) if is_log else np.asarray(values, float)
        low, high = float(numbers.min()), float(numbers.max())
        heights = [float(h) for h in (numbers - low) / (high - low)]
        labels = {0.0: short(min(values)), 1.0: short(max(values))}
    else:
        kinds = sorted({str(v) for v in values})
        places = {kind: (i + 0.5) / len(kinds) for i, kind in enumerate(kinds)}
        heights = [places[str(v)] for v in values]
        labels = {place: kind for kind, place in places.items()}
    behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    for height, label in labels.items():
        axes.text(x + 0.04, height, label, fontsize=8, va="center", bbox=behind)
    return heights
