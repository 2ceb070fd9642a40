"""Pictures as PNG bytes, drawn without a display."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bt_core.data.page import BLUE, ORANGE, figure_png


def confusion_matrix_png(matrix_KK: Sequence[Sequence[int]], names: Sequence[str]) -> bytes:
    """Draw a confusion matrix: rows are true classes, shade is the share of the row."""
    counts = np.array(matrix_KK)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(1.6 + 0.95 * len(names), 1.2 + 0.8 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        text = f"{counts[row, column]}\n{share:.0%}"
        colour = "white" if share > 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    readable = [name.replace("_", " ") for name in names]
    axes.set_xticks(range(len(names)), readable, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), readable)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return figure_png(figure)


def training_curves_png(history: Sequence[dict[str, Any]]) -> bytes:
    """Draw loss, validation log loss, accuracy and macro F1 against the epoch.

    Dotted lines are borders of stages, the dashed one is the epoch whose weights are kept.
    """
    epochs = [figures["epoch"] for figures in history]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [f["loss"] for f in history], "o-", color=BLUE, label="training loss")
    left.plot(
        epochs,
        [f["val_log_loss"] for f in history],
        "s--",
        color=ORANGE,
        label="validation log loss",
    )
    right.plot(
        epochs, [f["val_accuracy"] for f in history], "o-", color=BLUE, label="validation accuracy"
    )
    right.plot(
        epochs,
        [f["val_macro_f1"] for f in history],
        "s--",
        color=ORANGE,
        label="validation macro F1",
    )
    borders = [
        later["epoch"] - 0.5
        for earlier, later in itertools.pairwise(history)
        if later["stage"] != earlier["stage"]
    ]
    kept = max(history, key=lambda f: float(f["kept_by"]))["epoch"]
    for axes in (left, right):
        for border in borders:
            axes.axvline(border, color="grey", linestyle=":")
        axes.axvline(kept, color="grey", linestyle="--", linewidth=1, label=f"kept epoch: {kept}")
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.legend()
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure_png(figure)
