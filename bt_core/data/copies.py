"""Copies in a catalog: families, label conflicts, and the docket in which a person settles them."""

import csv
import io
import itertools
from collections import defaultdict
from collections.abc import Mapping
from typing import Final

import numpy as np
import pyarrow as pa

from bt_core import storage
from bt_core.data.families import Pairs, join_components
from bt_core.errors import UsageError
from bt_core.labels import LabelSpace, class_of_folder, to_task
from bt_core.scans.scan_lists import csv_rows
from bt_core.scans.thumbnails import TRANSFORMS

DROP: Final = "drop"
_DOCKET_COLUMNS: Final = ("conflict", "scan_id", "member", "label", "decision")


def add_families(catalog: pa.Table, pairs: Pairs) -> pa.Table:
    """Add the columns `family` and `group`.

    Scans joined by copies form a family, named after the smallest pixel digest in it. Families that
    share a patient form a group, named likewise: what a split keeps together. Both are empty for
    scans that could not be read.
    """
    patients: dict[str, int] = {}
    same = [
        (patients.setdefault(patient, i), i)
        for i, patient in enumerate(catalog["patient"].to_pylist())
        if patient
    ]
    linked = np.array(same, np.int64).reshape(-1, 2)
    left = np.concatenate([pairs.left_P, linked[:, 0]])
    right = np.concatenate([pairs.right_P, linked[:, 1]])
    families = join_components(catalog.num_rows, pairs.left_P, pairs.right_P)
    groups = join_components(catalog.num_rows, left, right)
    for name, components in (("family", families), ("group", groups)):
        catalog = catalog.append_column(name, _named(catalog["pixel_sha256"], components))
    return catalog


def pairs_table(catalog: pa.Table, pairs: Pairs) -> pa.Table:
    """Return pairs with scan ids: left, right, correlation, transform (left turned into right).

    A scan that repeats another's pixels stands there once, with the first one of them.
    """
    scan_ids = np.array(catalog["scan_id"].to_pylist(), object)
    return pa.table(
        {
            "left": pa.array(scan_ids[pairs.left_P], pa.string()),
            "right": pa.array(scan_ids[pairs.right_P], pa.string()),
            "correlation": pairs.correlation_P,
            "transform": np.array(TRANSFORMS)[pairs.transform_P],
        }
    )


def pictures_of(catalog: pa.Table, pairs: Pairs) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Return the different pictures of the usable rows, and which of them are copies.

    Returns:
        For each picture the rows whose pixels are equal to it; and pairs of indices of pictures.
    """
    pictures: dict[str, list[int]] = defaultdict(list)
    columns = catalog.select(["pixel_sha256", "reason"]).to_pydict()
    for row, reason in enumerate(columns["reason"]):
        if not reason:
            pictures[columns["pixel_sha256"][row]].append(row)
    number = {row: k for k, rows in enumerate(pictures.values()) for row in rows}
    ends = zip(pairs.left_P.tolist(), pairs.right_P.tolist(), strict=True)
    edges = ((number.get(left), number.get(right)) for left, right in ends)
    return list(pictures.values()), [
        (a, b) for a, b in edges if a is not None and b is not None and a != b
    ]


def find_conflicts(catalog: pa.Table, pairs: Pairs) -> list[list[int]]:
    """Return the label conflicts: each the rows of a picture that stands under several labels.

    Rows with a reason do not count. Scans of equal pixels are one picture. Two pictures are in
    conflict when they are copies and not all their scans have one label; pictures joined by
    conflicts are one conflict. A copy further along a family, which is no copy of these, is not
    drawn in.
    """
    pictures, edges = pictures_of(catalog, pairs)
    labels = catalog["label"].to_pylist()
    labels_of = [{labels[row] for row in rows} - {""} for rows in pictures]
    edges = [(a, b) for a, b in edges if len(labels_of[a] | labels_of[b]) > 1]
    edges += [(k, k) for k, own in enumerate(labels_of) if len(own) > 1]
    ends = np.array(edges, np.int64).reshape(-1, 2)
    joined = join_components(len(pictures), ends[:, 0], ends[:, 1])
    conflicts: dict[int, list[int]] = defaultdict(list)
    for k in sorted(set(ends.ravel().tolist())):
        conflicts[int(joined[k])] += pictures[k]
    return sorted(sorted(rows) for rows in conflicts.values())


def leave_out_conflicts(catalog: pa.Table, conflicts: list[list[int]]) -> pa.Table:
    """Give the scans of label conflicts the reason `label_conflict`: nobody knows who is right."""
    reasons = catalog["reason"].to_pylist()
    for row in (row for rows in conflicts for row in rows):
        reasons[row] = reasons[row] or "label_conflict"
    return _replaced(catalog, "reason", reasons)


def docket_csv(
    catalog: pa.Table, conflicts: list[list[int]], decisions: Mapping[str, str] | None = None
) -> bytes:
    """Return the docket of label conflicts: a CSV with a column `decision` to fill in.

    Args:
        catalog: rows with the labels of the source.
        conflicts: what `find_conflicts` gives for them.
        decisions: those that a person has made already, by scan_id; the others are left empty.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, _DOCKET_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for number, rows in enumerate(conflicts, 1):
        for row in catalog.select(["scan_id", "member", "label"]).take(pa.array(rows)).to_pylist():
            decision = (decisions or {}).get(row["scan_id"], "")
            member = plain_cell(row["member"])
            writer.writerow({"conflict": number, **row, "member": member, "decision": decision})
    return text.getvalue().encode()


def read_docket(location: str, space: LabelSpace) -> dict[str, str]:
    """Return the decisions of a filled-in docket: scan_id to a label, or `drop`.

    Rows without a decision are passed over; those scans stay left out.

    Raises:
        UsageError: if the file cannot be read, columns are missing, a decision is not understood
            (all of them are listed), or a scan is decided twice and differently.
    """
    try:
        header, lines = _docket_rows(storage.read_bytes(location).decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the docket {location}: {type(error).__name__}") from error
    except csv.Error as error:
        raise UsageError(f"{location} is not a CSV file: {error}") from error
    missing = {"scan_id", "decision"} - set(header)
    if missing:
        raise UsageError(
            f"{location} has no column {' and '.join(sorted(missing))}; fill in the docket.csv "
            "that bt audit wrote"
        )
    decisions: dict[str, str] = {}
    faults = []
    for number, row in enumerate(lines, 2):
        word = row["decision"].strip()
        known = class_of_folder(word)
        label = DROP if word.lower() == DROP else to_task(known, space.task) if known else None
        if word and label is None:
            faults.append(f"line {number}: {word!r}")
        elif label and decisions.setdefault(row["scan_id"], label) != label:
            faults.append(f"line {number}: scan {row['scan_id']} was decided otherwise above")
    if faults:
        raise UsageError(
            f"{location}: {'; '.join(faults)}; a decision is one of {', '.join(space.names)}, "
            f"{DROP}, or empty"
        )
    return decisions


def resolve(catalog: pa.Table, decisions: Mapping[str, str]) -> pa.Table:
    """Obey the decisions: relabel scans, or leave them out with the reason `dropped`.

    Raises:
        UsageError: if a decision is about a scan that is not in the catalog.
    """
    unknown = sorted(set(decisions) - set(catalog["scan_id"].to_pylist()))
    if unknown:
        raise UsageError(
            f"the docket decides on {len(unknown)} scans that the source does not hold, the first "
            f"is {unknown[0]}; was it written for another source, or for the same one packed in "
            "another way?"
        )
    labels, reasons = catalog["label"].to_pylist(), catalog["reason"].to_pylist()
    for row, scan_id in enumerate(catalog["scan_id"].to_pylist()):
        decision = decisions.get(scan_id, "")
        if decision == DROP:
            reasons[row] = reasons[row] or "dropped"
        elif decision:
            labels[row] = decision
    return _replaced(_replaced(catalog, "label", labels), "reason", reasons)


def has_decisions(location: str) -> bool:
    """Return whether there is a docket in which a person has decided something."""
    if not storage.exists(location):
        return False
    try:
        _, lines = _docket_rows(storage.read_bytes(location).decode("utf-8-sig", "replace"))
    except csv.Error:
        return True  # it is no longer what was written, so a person has
    return any(row.get("decision", "").strip() for row in lines)


def _docket_rows(text: str) -> tuple[list[str], list[dict[str, str]]]:
    """Return the header of a docket, and its rows by column; cells that are missing are empty."""
    header, *rows = csv_rows(text) or [[]]
    cells = (itertools.zip_longest(header, row[: len(header)], fillvalue="") for row in rows if row)
    return header, [dict(pairs) for pairs in cells]


def plain_cell(text: str) -> str:
    """Return a file name so that no spreadsheet takes it for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _named(pixel_sha256: pa.ChunkedArray, components: np.ndarray) -> pa.Array:
    digests = pixel_sha256.to_pylist()
    smallest: dict[int, str] = {}
    for digest, component in zip(digests, components.tolist(), strict=True):
        if digest:
            smallest[component] = min(digest, smallest.get(component, digest))
    names = [
        smallest[c][:16] if d else "" for d, c in zip(digests, components.tolist(), strict=True)
    ]
    return pa.array(names, pa.string())


def _replaced(catalog: pa.Table, name: str, values: list[str]) -> pa.Table:
    index = catalog.schema.get_field_index(name)
    return catalog.set_column(index, name, pa.array(values, pa.string()))
