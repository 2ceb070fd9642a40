"""`bt explain`: where a bundle looks, as overlays and figures for each scan."""

from functools import partial
from typing import Any

from bt_core import storage
from bt_core.errors import EXIT_INCOMPLETE, EXIT_OK, UsageError
from jobs.options import BundleArgument, DeviceOption, OutOption, OverwriteOption, SourceArgument
from jobs.output_folders import output_folder


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
    from bt_core.workflows.explain import explain_scans
    from cluster.session import placed

    explained = explain_scans(opened, refs, out, partial(placed, device=device), to_picture)
    missing = explained["method"].null_count
    for row in explained.to_pylist() if to_picture else ():
        print("  ".join(f"{name} {_shown(value)}" for name, value in row.items() if value))
    print(f"{explained.num_rows - missing} of {explained.num_rows} scans explained in {out}")
    if not listing.is_whole:
        print("the source is cut short: scans are missing that nobody can count")
    return EXIT_INCOMPLETE if missing or not listing.is_whole else EXIT_OK


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("explain")
