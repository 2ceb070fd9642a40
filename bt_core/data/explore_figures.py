"""The figures of an explored source. Scans are named by class and the start of their scan_id only.

Shape suffixes: N scans, K classes, T thumbnail side.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bt_core.data.explore import PROPERTIES, TESTED, numbers, of_class, property_values
from bt_core.data.explore_stage import PICTURE_PX, THUMBNAIL_PX, unpacked
from bt_core.data.page import BLUE, ORANGE, readable
from bt_core.scans import views
from bt_core.scans.preprocess import ClaheSpec

_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
_UNITS: Final = {
    "width": "width (px)",
    "height": "height (px)",
    "aspect": "width / height",
    "channels": "channels",
    "bit_depth": "bits per sample",
    "num_bytes": "file size (KiB)",
    "mean": "mean intensity",
    "std": "standard deviation",
    "border_mean": "mean intensity of the border",
}
_CLAHE_8, _CLAHE_16 = ClaheSpec(clip_limit=2.0, grid=8), ClaheSpec(clip_limit=2.0, grid=16)
_MAX_BARS: Final = 6
"""A property of so few different values gets a bar for each, not bins."""
View = tuple[str, Callable[[np.ndarray], np.ndarray]]
_VIEWS: Final[tuple[View, ...]] = (
    ("grey", lambda image_HW: image_HW),
    (f"above {views.THRESHOLD}", views.threshold),
    (f"dilated {views.DILATION_PX}x{views.DILATION_PX}", views.dilation),
    ("ORB key points", views.key_points),
    ("CLAHE 2.0, 16x16", lambda image_HW: views.clahe(image_HW, _CLAHE_16)),
    ("equalised", views.equalised),
)


def class_counts(counts: dict[str, dict[str, int]]) -> Figure:
    """Draw bars of scans per class, side by side for each split."""
    names = list(next(iter(counts.values()), {}))
    figure = Figure(figsize=(2.4 + 1.2 * len(names), 3.4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(counts)
    for i, (split, of_split) in enumerate(counts.items()):
        x = np.arange(len(names)) + (i - (len(counts) - 1) / 2) * width
        bars = axes.bar(x, list(of_split.values()), width * 0.95, label=split, color=_COLOURS[i])
        axes.bar_label(bars, fontsize=8)
    axes.set_xticks(range(len(names)), [readable(name) for name in names])
    axes.set_ylabel("scans")
    axes.margins(y=0.12)
    if len(counts) > 1:
        axes.legend(title="split folder", fontsize=8, title_fontsize=8, ncols=len(counts))
        axes.margins(y=0.3)
    return figure


def image_properties(rows: pa.Table, names: Sequence[str]) -> Figure:
    """Draw histograms of the files' facts, stacked by class."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    colours, texts = _COLOURS[: len(names)], [readable(n) for n in names]
    for axes, name in zip(figure.subplots(2, 3).flat, PROPERTIES, strict=True):
        scale = 1024 if name == "num_bytes" else 1
        values = [property_values(of_class(rows, n), name) / scale for n in names]
        different = np.unique(np.concatenate(values))
        if len(different) <= _MAX_BARS:
            values = [np.searchsorted(different, v).astype(np.float64) for v in values]
            bins = np.arange(len(different) + 1) - 0.5
            axes.set_xticks(range(len(different)), [f"{v:.4g}" for v in different], fontsize=8)
            axes.set_xlim(-1.5, len(different) + 0.5)
        else:
            bins = np.linspace(different[0], different[-1], 31)
        axes.hist(values, bins, stacked=True, rwidth=0.95, color=colours, label=texts)
        axes.set_xlabel(_UNITS[name])
        axes.set_ylabel("scans")
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(names),
        frameon=False,
    )
    return figure


def intensity_histograms(intensity: dict[str, dict[str, Any]], names: Sequence[str]) -> Figure:
    """Draw each class's share of pixels per grey level, on a logarithmic scale."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, colour in zip(names, _COLOURS, strict=False):
        axes.plot(intensity[name]["histogram"], color=colour, label=readable(name), linewidth=1.3)
    axes.set_yscale("log")
    axes.set_xlim(0, 255)
    axes.set_xlabel("grey level")
    axes.set_ylabel("share of pixels")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def intensity_boxes(rows: pa.Table, names: Sequence[str]) -> Figure:
    """Draw box plots of each scan's mean, spread and border intensity by class."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, feature in zip(figure.subplots(1, len(TESTED)), TESTED, strict=True):
        values = [numbers(of_class(rows, name), feature) for name in names]
        boxes = axes.boxplot(
            values, widths=0.6, patch_artist=True, flierprops={"markersize": 2, "alpha": 0.3}
        )
        for box, colour in zip(boxes["boxes"], _COLOURS, strict=False):
            box.set_facecolor(f"{colour}99")
        for line in boxes["medians"]:
            line.set_color("black")
        labels = [readable(name) for name in names]
        axes.set_xticks(range(1, len(names) + 1), labels, rotation=30, ha="right", fontsize=8)
        axes.set_title(_UNITS[feature], fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    return figure


def random_grid(rows: pa.Table, names: Sequence[str]) -> Figure:
    """Draw the shown scans, a row for each class."""
    lines = [(name, of_class(rows, name)) for name in names]
    lines = [(name, line) for name, line in lines if line.num_rows]
    columns = max(line.num_rows for _, line in lines)
    figure, grid = _picture_grid(len(lines), columns)
    for row, (name, line) in zip(grid, lines, strict=True):
        pictures = unpacked(line["picture"], np.uint8, (PICTURE_PX, PICTURE_PX))
        for axes, picture, scan_id in zip(row, pictures, line["scan_id"].to_pylist(), strict=False):
            _show(axes, picture, scan_id[:8])
        row[0].set_ylabel(readable(name), fontsize=9)
    return figure


def preprocessing(rows: pa.Table, names: Sequence[str], recipe: str, side: int) -> Figure:
    """Draw one scan of each class before and after preprocessing, with its histograms.

    Args:
        rows: shown rows.
        names: class names.
        recipe: name of the recipe whose spec made `prepared`.
        side: that spec's output side.
    """
    figure, grid = _picture_grid(len(names), 5)
    steps = (f"prepared: {readable(recipe)}", "CLAHE 2.0, 8x8", "equalised")
    for i, (row, name) in enumerate(zip(grid, names, strict=True)):
        one = of_class(rows, name).slice(0, 1)
        before_HW = unpacked(one["picture"], np.uint8, (PICTURE_PX, PICTURE_PX))[0]
        prepared_SS = unpacked(one["prepared"], np.uint8, (side, side))[0]
        after = (prepared_SS, views.clahe(before_HW, _CLAHE_8), views.equalised(before_HW))
        images = (before_HW, *after)
        for axes, image, title in zip(row[:4], images, ("as decoded", *steps), strict=True):
            _show(axes, image, title if i == 0 else "")
        row[0].set_ylabel(f"{readable(name)}\n{one['scan_id'][0].as_py()[:8]}", fontsize=8)
        labels = ("decoded", "prepared", "CLAHE", "equalised")
        for image, colour, title in zip(images, ("black", *_COLOURS), labels, strict=False):
            share = np.bincount(image.ravel(), minlength=256).cumsum() / image.size
            row[4].plot(share, color=colour, label=title, linewidth=1)
        row[4].set(frame_on=True, xlim=(0, 255), ylim=(0, 1.02), xticks=[0, 255], yticks=[0, 1])
        row[4].set_box_aspect(1)
        row[4].tick_params(labelsize=7)
    grid[0][4].set_title("share of pixels up to level", fontsize=8)
    grid[0][4].legend(fontsize=6, loc="lower right")
    return figure


def picture_views(rows: pa.Table, names: Sequence[str]) -> Figure:
    """Draw threshold, dilation, key points, CLAHE and equalisation of one scan of each class."""
    figure, grid = _picture_grid(len(names), len(_VIEWS))
    for i, (row, name) in enumerate(zip(grid, names, strict=True)):
        one = of_class(rows, name).slice(0, 1)
        picture_HW = unpacked(one["picture"], np.uint8, (PICTURE_PX, PICTURE_PX))[0]
        for axes, (title, view) in zip(row, _VIEWS, strict=True):
            _show(axes, view(picture_HW), title if i == 0 else "")
        row[0].set_ylabel(f"{readable(name)}\n{one['scan_id'][0].as_py()[:8]}", fontsize=8)
    return figure


def heat_maps(rows: pa.Table, names: Sequence[str]) -> Figure:
    """Draw mean, spread and difference from the overall mean of thumbnails by class, and one scan.

    Args:
        rows: sampled rows, with thumbnails.
        names: class names with a sampled row each.
    """
    shape = (THUMBNAIL_PX, THUMBNAIL_PX)
    stacks = [unpacked(of_class(rows, n)["thumbnail"], np.uint8, shape) for n in names]
    means = [stack.mean(0) for stack in stacks]
    overall_TT = np.concatenate(stacks).mean(0)
    spreads = [stack.std(0) for stack in stacks]
    differences = [mean_TT - overall_TT for mean_TT in means]
    reach = max(float(np.abs(d).max()) for d in differences) or 1.0
    lines: list[tuple[str, list[np.ndarray], str, float, float]] = [
        ("mean", means, "inferno", 0, max(float(m.max()) for m in means)),
        ("standard deviation", spreads, "viridis", 0, max(float(s.max()) for s in spreads)),
        ("class mean minus\nmean of all", differences, "RdBu_r", -reach, reach),
        ("one scan", [stack[0] for stack in stacks], "inferno", 0, 255),
    ]
    figure, grid = _picture_grid(len(lines), len(names))
    for row, (title, images, colours, low, high) in zip(grid, lines, strict=True):
        for axes, image_TT, name in zip(row, images, names, strict=True):
            drawn = axes.imshow(image_TT, cmap=colours, vmin=low, vmax=high)
            axes.set_title(readable(name) if title == "mean" else "", fontsize=9)
        row[0].set_ylabel(title, fontsize=8)
        figure.colorbar(drawn, ax=list(row), shrink=0.9, aspect=12).ax.tick_params(labelsize=7)
    return figure


def shortcut_probe(probe: dict[str, Any]) -> Figure:
    """Draw balanced accuracy of each feature group with its interval, beside chance."""
    features = list(probe["features"].values())
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for y, feature in enumerate(reversed(features)):
        accuracy = feature["balanced_accuracy"]
        axes.barh(y, accuracy, height=0.65, color=ORANGE if feature["blind"] else BLUE)
        axes.plot([feature["low"], feature["high"]], [y, y], color="black", linewidth=1.5)
        axes.text(max(feature["high"], accuracy) + 0.012, y, f"{accuracy:.2f}", va="center")
    axes.axvline(probe["chance"], color="black", linestyle="--", linewidth=1)
    axes.text(probe["chance"], len(features) - 0.4, " chance", fontsize=8, va="bottom")
    axes.set_yticks(range(len(features)), [f["title"] for f in reversed(features)])
    axes.set_xlim(0, 1.08)
    axes.set_ylim(-0.6, len(features) - 0.05)
    axes.set_xlabel("balanced accuracy; orange: sees no tumour, blue: may see one")
    return figure


def _picture_grid(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """Return a figure of empty frames without ticks, and its axes (rows, columns)."""
    size = 1.45
    figure = Figure(figsize=(0.5 + size * columns, 0.2 + size * 1.08 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    return figure, grid


def _show(axes: Axes, image: np.ndarray, title: str) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=255)
    axes.set_title(title, fontsize=8)
