"""Which scans are evaluated: the test split of a dataset, or a labelled source from elsewhere."""

import os
from datetime import UTC, datetime
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from bt_core import storage
from bt_core.config import StrictModel
from bt_core.data import copies
from bt_core.data.catalog import Dataset, label_refs
from bt_core.data.families import FamilyStage
from bt_core.data.pipeline import survey
from bt_core.errors import DatasetError
from bt_core.labels import LabelSpace
from bt_core.log import run_id
from bt_core.scans.archives import list_scans

_REFS = ("scan_id", "uri", "member", "position", "label", "given_split", "patient")


class EvaluatedScans(StrictModel):
    """What a bundle was evaluated on."""

    source: str
    """Name of the archive or folder, without its place."""
    split_by: Literal["family", "given", "external"]
    """How the test scans were kept apart from training; `external` is another source or dataset."""
    copies_found: bool
    """Whether mirrored, turned, re-encoded and resized copies of training scans are known. If not,
    only scans with the same pixels are."""
    digest: str
    """Of the dataset, or of the source's scans and labels."""
    num_left_out: dict[str, int]
    """Reason to number of scans and files that are not evaluated."""
    label_conflicts: tuple[str, ...] = ()
    """Ids of the scans that were left out since they stand under several labels."""
    num_openings: int | None = None
    """Times that this test split was opened, this one included."""
    is_whole: bool = True
    """False if the source is cut short."""
    opened_at: str = ""
    """When the scans were listed or the test split was opened, in UTC."""
    run_id: str = ""
    """Of the command that did so, as in its log."""


def of_dataset(
    dataset: Dataset, bundle_id: str, trained_digest: str
) -> tuple[pa.Table, EvaluatedScans]:
    """Open the test split of a dataset for a bundle, and put that on record.

    Args:
        dataset: prepared scans.
        bundle_id: what will be held against them.
        trained_digest: of the dataset that it was trained with. The split of another one says
            nothing of what it has seen.

    Returns:
        Catalog rows, and what they are.
    """
    rows = dataset.open_test("evaluate", bundle_id)
    own = dataset.info.digest == trained_digest
    if not own:
        rows = _with_column(rows, "copy_in_training", pa.array([False] * rows.num_rows))
    catalog = dataset.catalog()
    conflicts = catalog.filter(pc.equal(catalog["reason"], "label_conflict"))
    return rows, EvaluatedScans(
        source=_name(dataset.info.source),
        split_by=dataset.info.plan.by if own else "external",
        copies_found=own,
        digest=dataset.info.digest,
        num_left_out=dataset.info.num_left_out,
        label_conflicts=tuple(sorted(conflicts["scan_id"].to_pylist())),
        num_openings=dataset.num_openings(),
        opened_at=_now(),
        run_id=run_id(),
    )


def of_source(
    source: str, space: LabelSpace, key: bytes, trained: Dataset | None
) -> tuple[pa.Table, EvaluatedScans]:
    """Read and label the scans of a source, and find families among them.

    Args:
        source: labelled folder, archive or list.
        space: the classes.
        key: of the patients' hashes.
        trained: dataset that the models were trained with, to find copies of its scans.

    Returns:
        Catalog rows, label conflicts left out, scans that cannot be read not; and what they are.

    Raises:
        DatasetError: if it is the folder of a dataset that was not finished.
        SourceError: if it cannot be read, or a folder is no known class.
    """
    if storage.is_dir(source) and storage.exists(storage.join(source, "catalog.parquet")):
        raise DatasetError(f"the preparation of {source} was not finished; give bt prepare again")
    listing = list_scans(source, key)
    refs, _ = label_refs(listing.refs, space.task)
    catalog = _with_families(refs, key, trained)
    in_conflict = pc.equal(catalog["reason"], "label_conflict")
    rows = catalog.filter(pc.invert(in_conflict))
    conflicts = catalog.filter(in_conflict)["scan_id"].to_pylist()
    contents = rows.select(["content_sha256", "label"]).to_pylist()
    return rows, EvaluatedScans(
        source=_name(source),
        split_by="external",
        copies_found=trained is not None,
        digest=storage.digest_lines(f"{r['content_sha256']} {r['label']}" for r in contents),
        num_left_out=listing.skipped | ({"label_conflict": len(conflicts)} if conflicts else {}),
        label_conflicts=tuple(sorted(conflicts)),
        is_whole=listing.is_whole,
        opened_at=_now(),
        run_id=run_id(),
    )


def _with_families(refs: pa.Table, key: bytes, trained: Dataset | None) -> pa.Table:
    """Return catalog rows of refs, with groups, and whether a scan of the group was trained on."""
    own = set(refs["scan_id"].to_pylist())
    together, seen_ids = refs, frozenset[str]()
    if trained is not None:
        known = trained.catalog()
        known = known.filter(pc.not_equal(known["split"], "")).select(list(_REFS))
        seen_ids = frozenset(known["scan_id"].to_pylist())
        others = known.filter(pc.invert(pc.is_in(known["scan_id"], pa.array(sorted(own)))))
        for name in set(refs.column_names) - set(_REFS):  # what the source's list says besides
            others = others.append_column(name, pa.array([""] * others.num_rows))
        others = others.select(refs.column_names).cast(refs.schema)
        together = pa.concat_tables([refs, others])
    catalog, pairs = survey(together, FamilyStage(key))
    catalog = copies.add_families(catalog, pairs)
    columns = catalog.select(["scan_id", "group"]).to_pydict()
    pairs_of = list(zip(columns["scan_id"], columns["group"], strict=True))
    seen_groups = {group for scan_id, group in pairs_of if scan_id in seen_ids and group}
    catalog = copies.leave_out_conflicts(catalog, copies.find_conflicts(catalog, pairs))
    copied = pa.array([group in seen_groups for _, group in pairs_of])
    catalog = catalog.append_column("copy_in_training", copied)
    return catalog.filter(pc.is_in(catalog["scan_id"], pa.array(sorted(own))))


def _with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, values)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="minutes")


def _name(source: str) -> str:
    return os.path.basename(source.rstrip("/"))
