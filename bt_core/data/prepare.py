"""A listed source becomes a dataset: catalog, copies, a split by families, shards of pixels."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pyarrow as pa

from bt_core import storage
from bt_core.data import copies
from bt_core.data.catalog import Dataset, DatasetInfo, describe, label_refs
from bt_core.data.families import FamilyStage
from bt_core.data.pipeline import survey
from bt_core.data.splits import SplitPlan, assign_splits
from bt_core.data.views import ensure_view
from bt_core.errors import UsageError
from bt_core.scans.archives import Listing
from bt_core.scans.preprocess import PreprocessSpec


@dataclass(frozen=True)
class PrepareOptions:
    """How a source becomes a dataset.

    Attributes:
        plan: of the split.
        task: `four_class` or `binary`; None for what the folders say.
        resolve: docket of label conflicts that a person has filled in.
        keep_splits: earlier dataset whose scans keep their split.
    """

    plan: SplitPlan
    task: str | None = None
    resolve: str | None = None
    keep_splits: str | None = None


@dataclass(frozen=True)
class Prepared:
    """What was prepared.

    Attributes:
        info: of the dataset.
        catalog: a row for each scan.
        num_conflicts: label conflicts that are open.
        num_kept: scans whose split was kept.
        num_new: scans of a split that was not.
    """

    info: DatasetInfo
    catalog: pa.Table
    num_conflicts: int
    num_kept: int
    num_new: int


def prepare(
    source: str,
    listing: Listing,
    key: bytes,
    specs: Sequence[PreprocessSpec],
    out: str,
    options: PrepareOptions,
    session: Callable[[], AbstractContextManager[object]],
) -> Prepared:
    """Read a labelled source, and write catalog, docket, copies, shards and description.

    Args:
        source: that was listed.
        listing: its scans.
        key: of the patients' hashes.
        specs: preprocessing of the shards.
        out: folder of the dataset, in place of one that is there.
        options: see there.
        session: starts or joins Ray while the block runs.

    Raises:
        UsageError: if the docket in `out` holds decisions and is not given, or one is wrong.
        SourceError: if a folder is no known class.
    """
    refs, space = label_refs(listing.refs, options.task)
    decisions = copies.read_docket(options.resolve, space) if options.resolve else {}
    previous = Dataset(options.keep_splits).split_of_pixels() if options.keep_splits else None
    docket_at = storage.join(out, "docket.csv")
    if not options.resolve and copies.has_decisions(docket_at):
        raise UsageError(
            f"{out}/docket.csv holds decisions; pass it with --resolve, or choose another -o"
        )
    with session():
        catalog, pairs = survey(refs, FamilyStage(key))
        catalog = copies.add_families(catalog, pairs)
        docket = copies.docket_csv(catalog, copies.find_conflicts(catalog, pairs), decisions)
        catalog = copies.resolve(catalog, decisions)
        conflicts = copies.find_conflicts(catalog, pairs)
        catalog = copies.leave_out_conflicts(catalog, conflicts)
        catalog = assign_splits(catalog, options.plan, previous)
        info = describe(catalog, storage.absolute(source), space, listing.skipped, options.plan)
        _clear(out)  # not before all is known: what goes wrong earlier costs no dataset
        storage.write_table(storage.join(out, "catalog.parquet"), catalog)
        storage.write_bytes(docket_at, docket)
        storage.write_table(storage.join(out, "copies.parquet"), copies.pairs_table(catalog, pairs))
        for spec in specs:
            ensure_view(Dataset(out, info), spec)
        storage.write_json(storage.join(out, "dataset.json"), info.model_dump(mode="json"))
    return Prepared(info, catalog, len(conflicts), *_kept(catalog, previous or {}))


def _kept(catalog: pa.Table, previous: Mapping[str, str]) -> tuple[int, int]:
    columns = catalog.select(["pixel_sha256", "split"]).to_pydict()
    usable = [d for d, s in zip(columns["pixel_sha256"], columns["split"], strict=True) if s]
    num_kept = sum(digest in previous for digest in usable)
    return num_kept, len(usable) - num_kept


def _clear(out: str) -> None:
    """Make room for the new dataset."""
    marker = storage.join(out, "dataset.json")
    if storage.exists(marker):
        storage.remove_file(marker)
    storage.remove_dir(storage.join(out, "views"))
