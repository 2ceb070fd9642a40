"""`bt score`: an archive of scans becomes Parquet rows, one for each scan."""

import uuid
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from bt_core import storage
from bt_core.errors import EXIT_INCOMPLETE, EXIT_OK, REASONS, UsageError
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
    import pyarrow as pa

    from bt_core.models.bundle import Bundle


def run(
    bundle: BundleArgument,
    source: SourceArgument,
    out: OutOption,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> int:
    """Score every scan of an archive.

    Exit code 3 says that some could not be scored, or that the archive is cut short.
    """
    import pyarrow as pa

    from bt_core.data.catalog import ref_columns
    from bt_core.models.bundle import Bundle
    from bt_core.scans.archives import list_scans

    out = output_folder(out, source)
    opened = Bundle(bundle)
    listing = list_scans(source)
    _clear(out, overwrite)
    started = datetime.now(UTC)
    scores = score_refs(opened, pa.table(ref_columns(listing.refs)), out, device)
    counts = _counts(scores)
    reasons = dict(Counter(r for r in scores["reason"].to_pylist() if r))
    seconds = (datetime.now(UTC) - started).total_seconds()
    storage.write_json(
        storage.join(out, "summary.json"),
        {
            "n_in": len(listing.refs),
            **counts,
            "reasons": reasons,
            "skipped_files": listing.skipped,
            "bundle_id": opened.info.bundle_id,
            "source": storage.absolute(source),
            "started_at": started.isoformat(timespec="seconds"),
            "seconds": round(seconds, 2),
            "scans_per_second": round(len(listing.refs) / seconds, 1),
        },
    )
    print(
        f"{len(listing.refs)} scans = "
        + " + ".join(f"{count} {status}" for status, count in counts.items())
        + f"  ({len(listing.refs) / seconds:.1f} scans/s)"
    )
    for reason, count in sorted(reasons.items()):
        print(f"  {count} {reason}: {REASONS[reason]}")
    for why, count in listing.skipped.items():
        print(f"  skipped {count}: {why}")
    print(f"scores in {out}")
    is_whole = listing.is_whole and not counts["rejected"] + counts["failed"]
    return EXIT_OK if is_whole else EXIT_INCOMPLETE


def score_refs(
    bundle: "Bundle", refs: "pa.Table", out: str, device: str, in_depth: bool = False
) -> "pa.Table":
    """Score listed scans into the folder `scores` below `out`, all rows or none, and return them.

    Raises:
        RuntimeError: if the rows are not those of the refs, which would be a defect of this
            program.
    """
    from bt_core.data import pipeline
    from bt_core.ensemble.scorer import Scorer

    beside = storage.join(out, f"scores.{uuid.uuid4().hex[:8]}.tmp")
    with placed(bundle, device) as (specs, chosen, actors):
        args = (bundle.location, chosen, 1, in_depth)
        pipeline.score(refs, specs, Scorer, args, beside, actors)
    scores = storage.read_table(beside)
    pipeline.check_rows(refs, scores)
    storage.move_dir(beside, storage.join(out, "scores"))
    return scores


def _counts(scores: "pa.Table") -> dict[str, int]:
    from bt_core.ensemble.scorer import STATUSES

    found: dict[str, Any] = Counter(scores["status"].to_pylist())
    return {status: found.get(status, 0) for status in STATUSES}


def _clear(out: str, overwrite: bool) -> None:
    """Make room for new scores or refuse; remove what an interrupted job left."""
    summary = storage.join(out, "summary.json")
    if storage.exists(summary) or storage.exists(storage.join(out, "scores")):
        if not overwrite:
            raise UsageError(f"{out} holds scores; choose another -o, or pass --overwrite")
        storage.remove_file(summary)
    clear_scores(out)


def clear_scores(out: str) -> None:
    """Remove scores below a folder, and what an interrupted job left of some."""
    for name in storage.list_dirs(out):
        if name == "scores" or (name.startswith("scores.") and name.endswith(".tmp")):
            storage.remove_dir(storage.join(out, name))


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("score")
