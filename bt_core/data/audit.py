"""What `bt audit` says about a source: copies, where they cross the given splits, and conflicts."""

import io
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa
from PIL import Image

from bt_core.data.copies import pictures_of
from bt_core.data.families import Pairs
from bt_core.data.page import render
from bt_core.errors import REASONS
from bt_core.scans.decoded import BURNED_IN
from bt_core.scans.preprocess import PreprocessSpec
from bt_core.scans.thumbnails import TRANSFORMS, transformed

PICTURE: Final = PreprocessSpec(size_px=160, fit="pad")
"""How scans are shown in pairs."""
_PER_TRANSFORM: Final = 3
_MAX_CONFLICTS_SHOWN: Final = 20
_CLOSE_CALLS_SHOWN: Final = 6
_CLOSE: Final = 0.985


def audit_figures(
    catalog: pa.Table, pairs: Pairs, conflicts: list[list[int]], skipped: dict[str, int]
) -> dict[str, Any]:
    """Return all figures of an audit as a JSON-able object.

    Args:
        catalog: rows with label (empty if the source has no classes), given_split, reason, family.
        pairs: the copies; indices of its rows.
        conflicts: what `copies.find_conflicts` gives.
        skipped: files of the source that are not scans, by why.
    """
    columns = catalog.select(["label", "given_split", "reason", "family"]).to_pydict()
    usable = [row for row, reason in enumerate(columns["reason"]) if not reason]
    pictures, edges = pictures_of(catalog, pairs)
    sizes = Counter(columns["family"][row] for row in usable)
    near = np.ones(len(pairs), bool)
    near[: sum(len(rows) - 1 for rows in pictures)] = False  # exact ones come first
    of_transform = Counter(TRANSFORMS[k] for k in pairs.transform_P[near])
    return {
        "num_scans": catalog.num_rows,
        "num_readable": len(usable),
        "unreadable": dict(Counter(reason for reason in columns["reason"] if reason)),
        "unreadable_files": [
            row
            for row in catalog.select(["scan_id", "member", "reason", "detail"]).to_pylist()
            if row["reason"]
        ],
        "skipped": skipped,
        "num_without_class": sum(not columns["label"][row] for row in usable),
        "exact_copies": {
            "num_pictures": sum(len(rows) > 1 for rows in pictures),
            "num_scans": sum(len(rows) for rows in pictures if len(rows) > 1),
            "num_redundant": len(usable) - len(pictures),
        },
        "families": {
            "num": len(sizes),
            "num_with_copies": sum(size > 1 for size in sizes.values()),
            "num_scans_with_copies": sum(size for size in sizes.values() if size > 1),
            "largest": max(sizes.values(), default=0),
            "by_size": {str(size): n for size, n in sorted(Counter(sizes.values()).items())},
        },
        "near_pairs": {"num": int(near.sum()), "by_transform": dict(of_transform.most_common())},
        "classes": {
            label: _class_figures(
                [columns["family"][r] for r in usable if columns["label"][r] == label], sizes
            )
            for label in sorted(set(columns["label"]) - {""})
        },
        "across_splits": _across_splits(columns, pictures, edges),
        "label_conflicts": [
            catalog.select(["scan_id", "member", "label", "given_split"])
            .take(pa.array(rows))
            .to_pylist()
            for rows in conflicts
        ],
    }


def _class_figures(families: list[str], sizes: Counter[str]) -> dict[str, int]:
    """Count the scans of a class by their families; a copy may stand in another class."""
    return {
        "num_scans": len(families),
        "num_families": len(set(families)),
        "num_scans_with_copies": sum(sizes[family] > 1 for family in families),
    }


def _across_splits(
    columns: dict[str, list[Any]], pictures: list[list[int]], edges: list[tuple[int, int]]
) -> dict[str, dict[str, Any]] | None:
    """Count the scans of each given split but train that have a copy in train, whole and by class.

    `num_exact`: equal pixels; `num_copies`: copies by the definition, exact ones included;
    `num_in_family`: joined to a training scan through copies of copies.
    """
    split_of, label_of, family_of = (columns[c] for c in ("given_split", "label", "family"))
    trained = {k for k, rows in enumerate(pictures) if any(split_of[r] == "train" for r in rows)}
    near = trained | {b for a, b in edges if a in trained} | {a for a, b in edges if b in trained}
    families = {family_of[row] for k in trained for row in pictures[k] if split_of[row] == "train"}
    counts: dict[str, dict[str, Any]] = {}
    for k, rows in enumerate(pictures):
        for row in rows:
            if split_of[row] in ("", "train"):
                continue
            own = counts.setdefault(split_of[row], {"all": Counter(), "by_class": {}})
            found = {"num_scans": 1, "num_exact": int(k in trained), "num_copies": int(k in near)}
            found["num_in_family"] = int(family_of[row] in families)
            own["all"].update(found)
            if label_of[row]:
                own["by_class"].setdefault(label_of[row], Counter()).update(found)
    return counts if counts and trained else None


def audit_text(figures: dict[str, Any]) -> str:
    """Return the figures as a few lines for a terminal."""
    exact, families = figures["exact_copies"], figures["families"]
    lines = [
        f"{figures['num_readable']} of {figures['num_scans']} scans can be read"
        + "".join(f"; {n} {reason}" for reason, n in figures["unreadable"].items())
        + (" (named in audit.json)" if figures["unreadable"] else "")
        + "".join(f"; skipped {n} {why}" for why, n in figures["skipped"].items()),
        f"exact copies: {exact['num_scans']} scans are {exact['num_pictures']} pictures",
        f"families: {families['num']}, of which {families['num_with_copies']} hold several copies "
        f"({families['num_scans_with_copies']} scans; the largest {families['largest']})",
    ]
    lines += [
        f"  {label:<11} {own['num_scans']:>6} scans, {own['num_families']:>6} families, "
        f"{own['num_scans_with_copies']:>6} scans with copies"
        for label, own in figures["classes"].items()
    ]
    for split, counts in (figures["across_splits"] or {}).items():
        whole = counts["all"]
        lines.append(
            f"across the given splits: {whole['num_copies']} of {whole['num_scans']} {split} scans "
            f"({whole['num_copies'] / whole['num_scans']:.1%}) have a copy in training, "
            f"{whole['num_exact']} of them pixel by pixel"
        )
        lines += [
            f"  {label:<11} {own['num_copies']:>6} of {own['num_scans']:>6}"
            for label, own in sorted(counts["by_class"].items())
        ]
    if figures["across_splits"] is None:
        lines.append("across the given splits: the source has no Training and Testing folders")
    lines.append(f"label conflicts: {len(figures['label_conflicts'])}")
    if figures["num_without_class"]:
        lines.append(
            f"  {figures['num_without_class']} scans stand under no known class, so a conflict of "
            "theirs is not seen"
        )
    return "\n".join(lines)


def audit_page(figures: dict[str, Any], source: str, shown: list[dict[str, Any]]) -> bytes:
    """Return the page, self-contained HTML; `shown` is what `draw_pairs` gives."""
    return render(
        "bt_core.data",
        "audit.html.j2",
        figures=figures,
        source=source,
        shown=shown,
        reasons=REASONS,
    )


def choose_pairs(
    catalog: pa.Table, pairs: Pairs, conflicts: list[list[int]], seed: int = 0
) -> dict[int, str]:
    """Choose pairs to look at: index of a pair to its title.

    A pair of each label conflict first, then pairs across the given splits of every transform at
    random, then those nearest to the threshold. Scans whose header says that text is burned into
    the picture, which may be a name, are passed over.
    """
    hidden = np.array([BURNED_IN in steps for steps in catalog["steps"].to_pylist()], bool)
    shown = ~(hidden[pairs.left_P] | hidden[pairs.right_P])
    split = np.array(catalog["given_split"].to_pylist(), object)
    across = shown & (split[pairs.left_P] != split[pairs.right_P])
    number_N = np.zeros(catalog.num_rows, np.int64)
    for number, rows in enumerate(conflicts, 1):
        number_N[rows] = number
    label = np.array(catalog["label"].to_pylist(), object)
    differ = shown & (label[pairs.left_P] != label[pairs.right_P])
    inside = number_N[pairs.left_P] * (number_N[pairs.left_P] == number_N[pairs.right_P]) * differ
    order = np.random.default_rng(seed).permutation(len(pairs))
    _, first_of_each = np.unique(inside, return_index=True)
    first_of_each = first_of_each[inside[first_of_each] > 0][:_MAX_CONFLICTS_SHOWN]
    chosen = {int(p): f"label conflict {inside[p]}" for p in first_of_each}
    for k in range(len(TRANSFORMS)):
        own = order[(across & (pairs.transform_P == k))[order]][:_PER_TRANSFORM]
        chosen |= {int(p): "across splits" for p in own if int(p) not in chosen}
    closest = np.argsort(np.where(shown, pairs.correlation_P, 2), kind="stable")
    closest = closest[: min(_CLOSE_CALLS_SHOWN, int(shown.sum()))]
    closest = closest[pairs.correlation_P[closest] < _CLOSE]
    return chosen | {int(p): "near the threshold" for p in closest if int(p) not in chosen}


def rows_of(pairs: Pairs, chosen: dict[int, str]) -> np.ndarray:
    """Return the rows (N,) of the scans of chosen pairs, each once and in order, int64."""
    rows = {int(end[p]) for p in chosen for end in (pairs.left_P, pairs.right_P)}
    return np.array(sorted(rows), np.int64)


def draw_pairs(
    catalog: pa.Table, pairs: Pairs, chosen: dict[int, str], pixels: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Draw the chosen pairs for the page.

    Args:
        catalog: rows with scan_id, label and given_split.
        pairs: the copies.
        chosen: what `choose_pairs` gives.
        pixels: uint8 (S, S) by scan_id, under the spec `PICTURE`.

    Returns:
        For each: title, left and right (label, given split and scan id in words), transform,
        correlation, and `picture`, PNG bytes: left, right, and left turned onto right.
    """
    shown = []
    for p, title in chosen.items():
        ends = pa.array([int(pairs.left_P[p]), int(pairs.right_P[p])])
        rows = catalog.select(["scan_id", "label", "given_split"]).take(ends).to_pylist()
        if not all(row["scan_id"] in pixels for row in rows):  # the source has changed since
            continue
        left, right = (pixels[row["scan_id"]] for row in rows)
        gap = np.full((left.shape[0], 6), 128, np.uint8)
        turned = transformed(left, int(pairs.transform_P[p]))
        buffer = io.BytesIO()
        Image.fromarray(np.hstack([left, gap, right, gap, turned])).save(buffer, "PNG")
        words = [(row["label"], row["given_split"], f"scan {row['scan_id']}") for row in rows]
        names = [" ".join(filter(None, own)) for own in words]
        shown.append(
            {
                "title": title,
                "left": names[0],
                "right": names[1],
                "transform": TRANSFORMS[int(pairs.transform_P[p])],
                "correlation": float(pairs.correlation_P[p]),
                "picture": buffer.getvalue(),
            }
        )
    return shown
