"""An explored source as a folder: one HTML page, the same figures as PNG, all numbers as JSON."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure

from bt_core import storage
from bt_core.data import explore_figures as draw
from bt_core.data.page import figure_png, render
from bt_core.errors import REASONS, UsageError
from bt_core.scans.preprocess import PreprocessSpec

_PAGE, _NUMBERS = "explore.html", "explore.json"


def earlier_files(location: str) -> list[str]:
    """Return the files of an earlier exploration in a folder, which may be replaced.

    Raises:
        UsageError: if the folder holds anything else.
    """
    files = storage.list_files(location)
    ours = {_PAGE, _NUMBERS}
    if _NUMBERS in files:
        try:
            ours |= set(storage.read_json(storage.join(location, _NUMBERS))["pictures"])
        except (ValueError, KeyError, TypeError):
            ours = set()
    foreign = [name for name in files if name not in ours]
    if foreign:
        raise UsageError(f"{location} holds {foreign[0]}, which is not ours; choose another -o")
    return files


def figures(
    rows: pa.Table, facts: dict[str, Any], recipe: str, spec: PreprocessSpec
) -> dict[str, tuple[str, Figure]]:
    """Return file name (without suffix) to caption and figure, in the order of the page.

    Args:
        rows: readable rows of `ExploreStage`, sorted.
        facts: of `describe_source`, with `probe`.
        recipe: name of the recipe whose preprocessing is shown.
        spec: that preprocessing.
    """
    names = [n for n in facts["classes"] if facts["intensity"][n]["num_scans"]]
    shown, sampled = rows.filter(rows["shown"]), rows.filter(rows["sampled"])
    names_shown, names_sampled = (
        [n for n in names if n in set(part["label"].to_pylist())] for part in (shown, sampled)
    )
    drawn = {
        "class_counts": ("Scans per class and split folder", draw.class_counts(facts["counts"])),
        "image_properties": (
            "Facts about the files, stacked by class",
            draw.image_properties(rows, names),
        ),
        "intensity_histograms": (
            "Share of pixels per grey level, all scans of a class together",
            draw.intensity_histograms(facts["intensity"], names),
        ),
        "intensity_by_class": (
            "Per scan, by class: box from quartile to quartile",
            draw.intensity_boxes(rows, names),
        ),
    }
    for split in facts["counts"]:
        part = shown.filter(pc.equal(shown["given_split"], "" if split == "all" else split))
        if part.num_rows:
            drawn[f"grid_{split}"] = (f"Random scans, {split}", draw.random_grid(part, names))
    if names_shown:
        drawn["preprocessing"] = (
            "Before and after preprocessing",
            draw.preprocessing(shown, names_shown, recipe, spec.size_px),
        )
        drawn["views"] = (
            "Threshold, dilation, key points, contrast",
            draw.picture_views(shown, names_shown),
        )
    if names_sampled:
        drawn["heat_maps"] = (
            "Heat maps of intensity in grey levels, each scan stretched to a square",
            draw.heat_maps(sampled, names_sampled),
        )
    if facts["probe"]["features"]:
        drawn["shortcut_probe"] = (
            "Balanced accuracy with 95 % intervals",
            draw.shortcut_probe(facts["probe"]),
        )
    return drawn


def write_exploration(
    location: str, facts: dict[str, Any], drawn: dict[str, tuple[str, Figure]]
) -> None:
    """Write explore.html (self-contained), explore.json and every figure as PNG into a folder.

    Raises:
        UsageError: if the folder holds anything but an earlier exploration, which is replaced.
    """
    earlier = earlier_files(location)
    pictures = {name: (caption, figure_png(figure)) for name, (caption, figure) in drawn.items()}
    page = render(
        "bt_core.data",
        "explore.html.j2",
        facts=facts,
        pictures=pictures,
        looks=[
            name
            for name in pictures
            if name.startswith("grid_") or name in ("preprocessing", "views", "heat_maps")
        ],
        reasons=REASONS,
    )
    for name in earlier:
        storage.remove_file(storage.join(location, name))
    for name, (_, png) in pictures.items():
        storage.write_bytes(storage.join(location, f"{name}.png"), png)
    storage.write_bytes(storage.join(location, _PAGE), page)
    written = {**facts, "pictures": [f"{name}.png" for name in pictures]}
    storage.write_json(storage.join(location, _NUMBERS), written)
