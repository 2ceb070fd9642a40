"""The catalog of a prepared dataset: one row per file, split or left out with a reason.

A dataset folder holds `dataset.json`, `catalog.parquet`, `views/<name>/` with the pixel shards of
train and validation, and `test_openings/` (see `seal`).
"""

import itertools
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from bt_core import storage
from bt_core.config import StrictModel, parse
from bt_core.data.seal import openings, record_opening, refuse_test
from bt_core.data.splits import SPLITS, SplitPlan
from bt_core.errors import ConfigError, DatasetError, SourceError, UsageError
from bt_core.labels import (
    LABEL_SPACES,
    LabelSpace,
    class_of_folder,
    infer_task,
    known_folder_names,
    to_task,
)
from bt_core.scans.members import ATTRIBUTES, ScanRef

_GIVEN_SPLITS = {
    "training": "train", "train": "train", "testing": "test", "test": "test",
    "validation": "validation", "valid": "validation", "val": "validation",
}  # fmt: skip


class DatasetInfo(StrictModel):
    """Content of `dataset.json`; written last, so its presence means that the dataset is whole."""

    format_version: int = 1
    source: str
    label_space: LabelSpace
    plan: SplitPlan
    num_scans: int
    num_left_out: dict[str, int]
    """Reason code to number of files that are in no split."""
    num_skipped: dict[str, int]
    """Files of the source that are not scans, by why."""
    counts: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Split to class to number of scans."""
    num_families: int
    """In the splits: scans that are copies of one another, single scans included."""
    num_copied_from_training: int = 0
    """Validation and test scans with a copy in training; only a given split has any."""
    digest: str
    """Of every scan's content digest, label and split."""


class Dataset:
    """A prepared dataset on disk.

    Args:
        location: its folder.
        info: what `dataset.json` will say, for a dataset that is still being prepared.

    Raises:
        DatasetError: if the folder is not one, or its preparation was not finished.
    """

    def __init__(self, location: str, info: DatasetInfo | None = None) -> None:
        self.location = storage.absolute(location)
        if info is not None:
            self.info = info
            return
        marker = storage.join(self.location, "dataset.json")
        try:
            self.info = parse(DatasetInfo, storage.read_json(marker), marker)
        except FileNotFoundError as error:
            raise DatasetError(
                f"{location} is not a prepared dataset (no dataset.json); run: "
                f"bt prepare SOURCE -o {location}"
            ) from error
        except (ValueError, ConfigError) as error:
            raise DatasetError(f"{marker} cannot be understood: {error}") from error

    def catalog(self) -> pa.Table:
        """Return the rows of all files but the test scans, which are sealed."""
        table = self._all_rows()
        return table.filter(pc.not_equal(table["split"], "test"))

    def split(self, name: str) -> pa.Table:
        """Return the catalog rows of train or validation.

        Raises:
            SealedError: for the test split; see `open_test`.
        """
        refuse_test(name, "rows")
        table = self._all_rows()
        return table.filter(pc.equal(table["split"], name))

    def open_test(self, command: str, bundle_id: str) -> pa.Table:
        """Return the catalog rows of the test split, and put on record that they were read.

        Args:
            command: the `bt` command that reads them; only `evaluate` may.
            bundle_id: of the bundle that is held against them.

        Raises:
            SealedError: for any other command.
        """
        record_opening(self.location, command, bundle_id, self.info.digest)
        table = self._all_rows()
        return table.filter(pc.equal(table["split"], "test"))

    def num_openings(self) -> int:
        """Return how often this test split has been opened."""
        found = openings(self.location)
        return sum(opening.dataset_digest == self.info.digest for opening in found)

    def split_of_pixels(self) -> dict[str, str]:
        """Return the split of every picture that is in one, by its pixel digest.

        A picture that stood on several sides counts as trained on. That is all that leaves the
        sealed rows: which pictures to keep apart, without their places and labels.
        """
        columns = self._all_rows().select(["pixel_sha256", "split"]).to_pydict()
        found: dict[str, str] = {}
        for digest, split in zip(columns["pixel_sha256"], columns["split"], strict=True):
            if split and found.setdefault(digest, split) != split:
                found[digest] = "train"
        return found

    def _all_rows(self) -> pa.Table:
        return storage.read_table(storage.join(self.location, "catalog.parquet"))


def groups_of(rows: pa.Table) -> dict[str, str]:
    """Return the group of each scan, by its scan_id: what a split keeps together.

    Args:
        rows: with the columns `scan_id` and `group`.
    """
    columns = rows.select(["scan_id", "group"]).to_pydict()
    return dict(zip(columns["scan_id"], columns["group"], strict=True))


def label_refs(refs: list[ScanRef], task: str | None) -> tuple[pa.Table, LabelSpace]:
    """Give every listed scan its label: the one of its list, or the one of its folder.

    The deepest folder whose name is a known class decides; the deepest one such as Training is kept
    as `given_split`. What a list says goes before what folders say.

    Args:
        refs: listed scans.
        task: the label space, four_class or binary; None infers it.

    Returns:
        A table with scan_id, uri, member, position, label, given_split, patient (keyed hashes;
        empty where unknown) and those of `ATTRIBUTES` that a list has; and the label space.

    Raises:
        UsageError: if there is no such task.
        SourceError: if some folder or given label is not a known class (all are listed, with the
            known names), some given split is not known, or fewer than two classes are there.
    """
    classes = _classes(refs)
    unknown = Counter(
        f"label {r.label!r}" if r.label else f"class folder {_folder(r.member)!r}"
        for r, c in zip(refs, classes, strict=True)
        if c is None
    )
    if unknown:
        listed = ", ".join(f"{name} ({count}x)" for name, count in unknown.most_common(10))
        raise SourceError(
            f"unknown {listed}; known names are: {known_folder_names()}. Rename or remove these, "
            "or give a list (CSV, Parquet) with the columns path and label"
        )
    labels, space = _labels(classes, task)
    if "" in labels:
        raise SourceError("folders of untyped tumours cannot be used for the task four_class")
    if len(set(labels)) < 2:
        raise SourceError(f"the source holds one class only ({labels[0]}); at least two are needed")
    return _labelled(refs, labels), space


def label_refs_if_known(refs: list[ScanRef], task: str | None) -> pa.Table:
    """Give every listed scan its label as `label_refs` does, or an empty one where none is known.

    Raises:
        UsageError: if there is no such task.
        SourceError: if folders of typed and untyped tumours are mixed and no task is given.
    """
    return _labelled(refs, _labels(_classes(refs), task)[0])


def _labelled(refs: list[ScanRef], labels: list[str]) -> pa.Table:
    columns: dict[str, Any] = ref_columns(refs)
    columns["label"] = labels
    columns["given_split"] = [_given_split(ref) for ref in refs]
    columns["patient"] = [ref.patient for ref in refs]
    for name, values in zip(
        ATTRIBUTES, zip(*(r.attributes for r in refs), strict=True), strict=False
    ):
        if any(values):
            columns[name] = list(values)
    return pa.table(columns)


def _labels(classes: list[str | None], task: str | None) -> tuple[list[str], LabelSpace]:
    if task not in (None, *LABEL_SPACES):
        raise UsageError(f"--task {task}: use {' or '.join(LABEL_SPACES)}")
    space = LABEL_SPACES[task or infer_task({c for c in classes if c is not None})]
    return [to_task(c, space.task) or "" if c else "" for c in classes], space


def _classes(refs: list[ScanRef]) -> list[str | None]:
    folders = [[] if ref.label else _folders(ref.member) for ref in refs]
    # What all members share is the archive's own name, which may sound like a class.
    levels = zip(*folders, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, levels))
    shared = 0 if any(len(own) == shared for own in folders) else shared
    return [
        class_of_folder(ref.label) if ref.label else _class_of_folders(own[shared:])
        for ref, own in zip(refs, folders, strict=True)
    ]


def ref_columns(refs: list[ScanRef]) -> dict[str, Any]:
    """Return listed scans as columns scan_id, uri, member, position."""
    return {
        "scan_id": [r.scan_id for r in refs],
        "uri": [r.uri for r in refs],
        "member": [r.member for r in refs],
        "position": pa.array([r.position for r in refs], pa.int64()),
    }


def describe(
    catalog: pa.Table,
    source: str,
    space: LabelSpace,
    skipped: dict[str, int],
    plan: SplitPlan,
) -> DatasetInfo:
    """Return the facts of a split catalog.

    Raises:
        SourceError: if some class has no scan in some split; more scans are needed then.
    """
    rows = catalog.select(["split", "label", "reason", "content_sha256", "family"]).to_pylist()
    counts = {s: {c: 0 for c in space.names} for s in SPLITS}
    for row in rows:
        if row["split"]:
            counts[row["split"]][row["label"]] += 1
    present = {r["label"] for r in rows}
    bare = [f"{s}/{c}" for s in SPLITS for c in sorted(present) if not counts[s][c]]
    if bare:
        raise SourceError(
            f"too few usable scans: no scan for {', '.join(bare)}; every class needs one in "
            "each split, so at least three different pictures"
        )
    lines = (f"{r['content_sha256']} {r['label']} {r['split']}" for r in rows)
    return DatasetInfo(
        source=source,
        label_space=space,
        plan=plan,
        num_scans=len(rows),
        num_left_out=dict(Counter(r["reason"] for r in rows if r["reason"])),
        num_skipped=skipped,
        counts=counts,
        num_families=len({row["family"] for row in rows if row["split"]}),
        num_copied_from_training=sum(catalog["copy_in_training"].to_pylist()),
        digest=storage.digest_lines(lines),
    )


def _folders(member: str) -> list[str]:
    """Return the folders above a member; zips made on Windows may have backslashes."""
    return member.replace("\\", "/").split("/")[:-1]


def _class_of_folders(folders: list[str]) -> str | None:
    known = (class_of_folder(folder) for folder in reversed(folders))
    return next((name for name in known if name), None)


def _folder(member: str) -> str:
    return member.rsplit("/", 1)[0] if "/" in member else "(no folder)"


def _given_split(ref: ScanRef) -> str:
    if ref.given_split:
        split = _GIVEN_SPLITS.get(ref.given_split.lower())
        if split is None:
            raise SourceError(
                f"unknown split {ref.given_split!r} in the list; write one of: "
                f"{', '.join(_GIVEN_SPLITS)}"
            )
        return split
    parts = (_GIVEN_SPLITS.get(part.lower(), "") for part in reversed(_folders(ref.member)))
    return next((part for part in parts if part), "")
