"""Where a bundle looks, as overlays and figures for each scan; and other work with a bundle."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from bt_core import storage
from bt_core.data import pipeline
from bt_core.data.catalog import ref_columns
from bt_core.evaluation.explainer import Explainer
from bt_core.evaluation.sheets import overlay_png
from bt_core.models.bundle import Bundle
from bt_core.scans.members import ScanRef
from bt_core.workflows.workers import Place


def explain_scans(
    bundle: Bundle, refs: list[ScanRef], out: str, place: Place, to_picture: bool = False
) -> pa.Table:
    """Draw what moved each answer.

    Args:
        bundle: what answers.
        refs: the scans.
        out: folder for `explanations.parquet` and `overlays/SCAN_ID.png`.
        place: gives the workers.
        to_picture: `out` is the overlay of a single scan instead.

    Returns:
        Rows of `explainer.SCHEMA` without `image` and `heat`; `method` is null where a scan could
        not be explained.
    """
    tables = []
    for table in work_on(bundle, pa.table(ref_columns(refs)), place, Explainer, "explained"):
        for row in table.to_pylist():
            if row["heat"] is not None:
                own = storage.join(out, "overlays", f"{row['scan_id']}.png")
                storage.write_bytes(out if to_picture else own, overlay_png(row))
        tables.append(table.drop_columns(["image", "heat"]))
    explained = pa.concat_tables(tables)
    if not to_picture:
        storage.write_table(storage.join(out, "explanations.parquet"), explained)
    return explained


def work_on(
    bundle: Bundle, refs: pa.Table, place: Place, worker: type[Any], done: str
) -> Iterator[pa.Table]:
    """Yield the rows that a worker, loaded with a bundle, returns for listed scans.

    Args:
        bundle: what the worker loads.
        refs: rows of `decode_stage.REF_COLUMNS`.
        place: gives the actors.
        worker: as in `pipeline.map_scans`; constructed with the bundle's location, a device and a
            number of threads.
        done: the work in the past tense, for progress lines.
    """
    with place(bundle) as (specs, device, actors):
        args = (bundle.location, device, 1)
        yield from pipeline.map_scans(refs, specs, worker, args, actors, done)
