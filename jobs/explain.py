"""`bt explain`: where a bundle looks, as overlays and figures for each scan."""

from typing import TYPE_CHECKING, Any

from bt_core import storage
from bt_core.errors import EXIT_INCOMPLETE, EXIT_OK, UsageError
from jobs.command import (
    BundleArgument,
    DeviceOption,
    OutOption,
    OverwriteOption,
    SourceArgument,
    output_folder,
    placed,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa

    from bt_core.models.bundle import Bundle


def run(
    bundle: BundleArgument,
    source: SourceArgument,
    out: OutOption,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> int:
    """Draw what moved each answer; one scan with -o PICTURE.png, many with -o FOLDER.

    A folder gets explanations.parquet and overlays/SCAN_ID.png. A heat map shows what moved the
    answer, not where a tumour is. Exit code 3 says that some scans could not be explained, or that
    the source is cut short.
    """
    import pyarrow as pa

    from bt_core.data.catalog import ref_columns
    from bt_core.evaluation.explainer import Explainer
    from bt_core.models.bundle import Bundle
    from bt_core.scans.archives import list_scans

    to_picture = out.lower().endswith(".png")
    out = storage.absolute(out) if to_picture else output_folder(out, source)
    opened = Bundle(bundle)
    listing = list_scans(source)
    refs = listing.refs
    if to_picture and len(refs) != 1:
        raise UsageError(f"{source} holds {len(refs)} scans; give a folder as -o, not a picture")
    table_at = storage.join(out, "explanations.parquet")
    if storage.exists(out if to_picture else table_at) and not overwrite:
        raise UsageError(f"{out} is there already; choose another -o, or pass --overwrite")
    tables = []
    listed = pa.table(ref_columns(refs))
    for table in work_on(opened, listed, device, Explainer, "explained"):
        _write_overlays(table, out, to_picture)
        tables.append(table.drop_columns(["image", "heat"]))
    explained = pa.concat_tables(tables)
    missing = explained["method"].null_count
    for row in explained.to_pylist() if to_picture else ():
        print("  ".join(f"{name} {_shown(value)}" for name, value in row.items() if value))
    if not to_picture:
        storage.write_table(table_at, explained)
    print(f"{explained.num_rows - missing} of {explained.num_rows} scans explained in {out}")
    if not listing.is_whole:
        print("the source is cut short: scans are missing that nobody can count")
    return EXIT_INCOMPLETE if missing or not listing.is_whole else EXIT_OK


def work_on(
    bundle: "Bundle", refs: "pa.Table", device: str, worker: type[Any], done: str
) -> "Iterator[pa.Table]":
    """Yield the rows that a worker, loaded with a bundle, returns for listed scans."""
    from bt_core.data import pipeline

    with placed(bundle, device) as (specs, chosen, actors):
        args = (bundle.location, chosen, 1)
        yield from pipeline.map_scans(refs, specs, worker, args, actors, done)


def _write_overlays(table: "pa.Table", out: str, to_picture: bool) -> None:
    from bt_core.evaluation.sheets import overlay_png

    for row in table.to_pylist():
        if row["heat"] is not None:
            own = storage.join(out, "overlays", f"{row['scan_id']}.png")
            storage.write_bytes(out if to_picture else own, overlay_png(row))


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("explain")
