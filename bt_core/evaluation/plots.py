"""Pictures as PNG bytes, drawn without a display."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from bt_core.data.page import BLUE, ORANGE, figure_png, readable
from bt_core.evaluation.predictions import Scans
from bt_core.labels import LabelSpace


def report_pictures(figures: dict[str, Any], clean: Scans, space: LabelSpace) -> dict[str, bytes]:
    """Return the pictures of a report by name, all of the scans without a copy in training."""
    robustness, decisions = figures["robustness"], figures["clean"]["decision_curves"]
    extra = {} if robustness is None else {"robustness": _robustness_png(robustness["curves"])}
    if decisions:  # there are none where all scans have a tumour, or none has
        extra["decision_curves"] = _decision_curves_png(decisions)
    return {
        **extra,
        "confusion_matrix": confusion_matrix_png(figures["clean"]["confusion_matrix"], space.names),
        "classes": _classes_png(figures["clean"]["by_scan"], space),
        "curves": _curves_png(clean, space),
        "calibration": _calibration_png(figures["clean"], clean),
        "deferral": _deferral_png(figures["clean"]["deferral"]),
    }


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
    titles = [readable(name) for name in names]
    axes.set_xticks(range(len(names)), titles, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), titles)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return figure_png(figure)


def _classes_png(figures: dict[str, Any], space: LabelSpace) -> bytes:
    """Draw each class's figures with their intervals."""
    kinds = ("recall", "specificity", "precision", "f1")
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for place, kind in enumerate(kinds):
        x_K = np.arange(space.num_classes) + 0.2 * (place - 1.5)
        rows = [figures[f"{name}.{kind}"] for name in space.names]
        defined = [(x, row) for x, row in zip(x_K, rows, strict=True) if row["low"] is not None]
        value, low, high = (
            np.array([row[n] for _, row in defined]) for n in ("value", "low", "high")
        )
        axes.errorbar(
            [x for x, _ in defined],
            value,
            yerr=np.maximum([value - low, high - value], 0),
            fmt="os^D"[place],
            capsize=3,
            label="F1" if kind == "f1" else kind,
        )
    axes.set_xticks(range(space.num_classes), [readable(name) for name in space.names])
    axes.set_ylabel("figure, 95 % interval")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure_png(figure)


def _curves_png(scans: Scans, space: LabelSpace) -> bytes:
    """Draw ROC and precision-recall curves, each class against the rest."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, name in enumerate(space.names):
        own_N, score_N = scans.labels_N == k, scans.probs_NK[:, k]
        if not own_N.any() or own_N.all():
            continue
        false_alarms, found, _ = roc_curve(own_N, score_N)
        left.plot(false_alarms, found, label=readable(name))
        precision, recall, _ = precision_recall_curve(own_N, score_N)
        right.plot(recall, precision, label=readable(name))
    left.plot([0, 1], [0, 1], ":", color="grey", linewidth=1)
    _label(left, "false-positive rate (1 - specificity)", "recall (sensitivity)")
    _label(right, "recall (sensitivity)", "precision (PPV)")
    return figure_png(figure)


def _calibration_png(figures: dict[str, Any], scans: Scans) -> bytes:
    """Draw accuracy against confidence, and how sure right and wrong answers were."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], ":", color="grey", linewidth=1, label="perfectly calibrated")
    for name, label, colour, line in (
        ("calibration_before", "before temperatures", ORANGE, "--"),
        ("calibration", "as answered", BLUE, "-"),
    ):
        bins = figures[name]["bins"]
        num_B = np.array([b["num"] for b in bins])
        said, came_true = ([b[n] for b in bins] for n in ("confidence", "accuracy"))
        left.plot(said, came_true, line, color=colour, label=label)
        low, high = (
            np.array([np.nan if b["interval"][side] is None else b["interval"][side] for b in bins])
            for side in ("low", "high")
        )
        left.vlines(said, low, high, color=colour, linewidth=1, alpha=0.6)
        left.scatter(said, came_true, s=10 + 90 * num_B / num_B.max(), color=colour)
    _label(left, "confidence", "accuracy (size: number of scans)")
    edges = np.linspace(0, 1, 21)
    for chosen_N, label, colour in (
        (scans.right_N, "right", BLUE),
        (~scans.right_N, "wrong", ORANGE),
    ):
        right.hist(
            scans.confidence_N[chosen_N], edges, histtype="step", linewidth=2,
            label=f"{label} ({chosen_N.sum()})", color=colour,
        )  # fmt: skip
    right.set_yscale("symlog", linthresh=1)
    _label(right, "confidence", "scans")
    return figure_png(figure)


def _deferral_png(deferral: dict[str, Any]) -> bytes:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(deferral["coverage"], deferral["risk"], color=BLUE)
    axes.set_xlabel("share of scans answered, the surest first")
    axes.set_ylabel("share of wrong answers")
    axes.grid(alpha=0.3)
    return figure_png(figure)


def _decision_curves_png(curves: dict[str, Any]) -> bytes:
    """Draw the net benefit of each question against treating all or none."""
    columns = 2 if len(curves) > 1 else 1
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows), layout="constrained")
    for number, (question, curve) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(rows, columns, number)
        threshold = curve["threshold"]
        axes.fill_between(threshold, curve["low"], curve["high"], color=BLUE, alpha=0.2)
        axes.plot(threshold, curve["model"], color=BLUE, label="classifier")
        axes.plot(threshold, curve["treat_all"], "--", color=ORANGE, label="treat all")
        axes.axhline(0, color="grey", linestyle=":", label="treat none")
        top = max(*curve["high"], 0.05)
        axes.set_ylim(-0.15 * top, 1.05 * top)
        axes.set_title(f"{readable(question)}, at {curve['prevalence']:.1%} of scans", fontsize=9)
        _label(axes, "threshold probability", "net benefit")
    return figure_png(figure)


def _robustness_png(curves: dict[str, Any]) -> bytes:
    """Draw accuracy and missed tumours against the strength of each perturbation."""
    figure = Figure(figsize=(8.4, 5.6), layout="constrained")
    panels = figure.subplots(2, -(-len(curves) // 2), sharey=True, squeeze=False).flatten()
    for axes, (name, curve) in zip(panels, curves.items(), strict=False):
        points = curve["points"]
        places = range(len(points))
        for key, label, colour in (
            ("accuracy", "accuracy", BLUE),
            ("missed_tumor_rate", "missed tumours", ORANGE),
        ):
            rows = [point[key] for point in points]
            known = [
                (x, row) for x, row in zip(places, rows, strict=True) if row["low"] is not None
            ]
            x = [place for place, _ in known]
            axes.plot(x, [row["value"] for _, row in known], "o-", color=colour, label=label)
            low, high = ([row[n] for _, row in known] for n in ("low", "high"))
            axes.fill_between(x, low, high, color=colour, alpha=0.2)
        marks = ["as is", *(f"{point['strength']:g}" for point in points[1:])]
        axes.set_xticks(list(places), marks, fontsize=7)
        axes.set_title(name, fontsize=9)
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    return figure_png(figure)


def embedding_pictures(predictions: pa.Table, clean: Scans, space: LabelSpace) -> dict[str, bytes]:
    """Return the picture `embedding` of the clean scans that have a place, or nothing."""
    own = pc.is_in(predictions["scan_id"], pa.array(clean.scan_id.tolist()))
    table = predictions.filter(pc.and_(own, pc.is_valid(predictions["tsne_x"])))
    if not table.num_rows:
        return {}
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot()
    x_N, y_N = (table[name].to_numpy() for name in ("tsne_x", "tsne_y"))
    labels, said = (np.array(table[n].to_pylist()) for n in ("label", "predicted_label"))
    for name in space.names:
        own = labels == name
        axes.scatter(x_N[own], y_N[own], s=8, label=readable(name))
    wrong = labels != said
    axes.scatter(
        x_N[wrong], y_N[wrong], s=36, facecolors="none", edgecolors="black", label="wrong answer"
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(fontsize=8)
    return {"embedding": figure_png(figure)}


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:  # none where scans are of one class alone
        axes.legend(fontsize=8)


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
