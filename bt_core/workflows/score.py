"""A source of scans becomes Parquet rows, one for each scan, by a bundle."""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from bt_core import __version__, log, storage
from bt_core.data import pipeline
from bt_core.data.dicom_stage import write_results
from bt_core.data.manifest import ManifestWriter, RefDigest
from bt_core.data.publish import DICOM_FOLDER, Published, publish
from bt_core.data.score_work import (
    MANIFEST_FILE,
    ScoreJob,
    ScoreWork,
    is_of_scores,
    refuse_foreign,
    writing,
)
from bt_core.data.scoring import score_manifest
from bt_core.data.stream import is_streamed
from bt_core.ensemble.scorer import STATUSES, Scorer
from bt_core.errors import UsageError
from bt_core.models.bundle import Bundle
from bt_core.models.run import environment
from bt_core.scans.archives import Listing, list_scans
from bt_core.scans.dicom_results import Kind
from bt_core.workflows.workers import Place, Workers

_LIGHT_CPUS = 0.1
"""Of an actor that only asks an ensemble elsewhere."""


@dataclass(frozen=True)
class ScoreOptions:
    """How a source is scored.

    Attributes:
        cascade: let the first member answer alone where the bundle says that this is safe.
        dicom: for DICOM scans also write such an object.
        hosted: returns a scorer that asks an ensemble elsewhere, and the arguments of its
            constructor; called while Ray runs. None loads the bundle into the workers.
        overwrite: replace scores that are there.
    """

    cascade: bool = True
    dicom: Kind | None = None
    hosted: Callable[[Bundle], tuple[Callable[..., Scorer], tuple[Any, ...]]] | None = None
    overwrite: bool = False

    def on_record(self, device: str) -> dict[str, str]:
        """Return what decides, with the bundle and the source, if a killed job may go on."""
        return {
            "device": "serve" if self.hosted else device,
            "cascade": "as hosted" if self.hosted else "on" if self.cascade else "off",
            "dicom": self.dicom or "none",
        }


def score_source(
    bundle: Bundle, source: str, out: str, place: Place, options: ScoreOptions | None = None
) -> tuple[dict[str, Any], bool]:
    """Score a source, or what a killed job left of it, into a folder that no other job works on.

    Args:
        bundle: what answers.
        source: folder, archive, list or single scan; path or URI.
        out: folder for the scores, held with `score_work.locked`.
        place: gives the workers.
        options: see there.

    Returns:
        The content of `manifest.json`, and whether the source was whole.

    Raises:
        UsageError: if the folder holds scores, other work or foreign files, or the source does not
            allow what is asked for.
        RunError: if rows cannot be written, or the scorer's process dies again and again.
    """
    options = options or ScoreOptions()
    streamed = is_streamed(storage.absolute(source))
    if streamed and options.dicom:
        raise UsageError(
            f"--dicom reads scans a second time, which a compressed tar such as {source} does not "
            "allow one by one: repack it as tar or zip"
        )
    work = ScoreWork(out)
    started, clock = datetime.now(UTC), time.monotonic()
    try:
        listing, digest = _list(work, source, out, options.overwrite)
        with place(bundle) as workers:
            job = ScoreJob(
                bundle_id=bundle.info.bundle_id,
                source=storage.absolute(source),
                listing_digest=digest,
                settings=options.on_record(workers[1]),
                bt_version=__version__,
                num_scans=listing.num_scans,
                started_at=started.isoformat(timespec="seconds"),
                overwrites=options.overwrite,
                run_ids=(log.run_id(),),
            )
            job = _begin(work, out, job)
            num_before = work.num_done()
            _score(work, bundle, workers, options, streamed)
            with writing(out):
                published = publish(work, out, job.num_scans)
                results = (
                    write_results(published.parts, out, options.dicom) if options.dicom else None
                )
    finally:
        if not work.is_begun():
            work.remove()
    with writing(out):
        seconds = time.monotonic() - clock
        num_scored = job.num_scans - num_before
        manifest = _manifest(job, bundle, listing, published, seconds, num_scored)
        manifest |= {} if results is None else {"dicom": results}
        storage.write_json(storage.join(out, MANIFEST_FILE), manifest)
        work.remove()
    return manifest, listing.is_whole


def score_refs(
    bundle: Bundle, refs: pa.Table, out: str, place: Place, in_depth: bool = False
) -> pa.Table:
    """Score a few thousand listed scans at once into the folder `scores` below `out`.

    Returns:
        All rows; none is written if it is not all of them.

    Raises:
        RuntimeError: if the rows are not those of the refs, which would be a defect of this
            program.
    """
    beside = storage.join(out, f"scores.{uuid.uuid4().hex[:8]}.tmp")
    with place(bundle) as (specs, device, actors):
        args = (bundle.location, device, 1, in_depth)
        pipeline.score(refs, specs, Scorer, args, beside, actors)
    scores = storage.read_table(beside)
    pipeline.check_rows(refs, scores)
    storage.move_dir(beside, storage.join(out, "scores"))
    return scores


def clear_scores(out: str) -> None:
    """Remove scores below a folder, and what an interrupted `score_refs` left of some.

    What else a scoring job writes goes only where one has finished: it may be somebody's own.
    """
    if storage.exists(storage.join(out, MANIFEST_FILE)):
        storage.remove_file(storage.join(out, "review.csv"))
        storage.remove_dir(storage.join(out, DICOM_FOLDER))
        storage.remove_file(storage.join(out, MANIFEST_FILE))
    for name in storage.list_dirs(out):
        is_ours = name == "scores" and is_of_scores(storage.join(out, name))
        if is_ours or (name.startswith("scores.") and name.endswith(".tmp")):
            storage.remove_dir(storage.join(out, name))


def _list(work: ScoreWork, source: str, out: str, overwrite: bool) -> tuple[Listing, str]:
    """List a source into the work folder, or once more for a job that goes on; or refuse.

    Returns:
        The listing without its refs, and their digest.
    """
    has_scores = any(storage.exists(storage.join(out, n)) for n in (MANIFEST_FILE, "scores"))
    refuse_foreign(out, work.is_begun())
    is_finished = storage.exists(storage.join(out, MANIFEST_FILE))
    if is_finished:  # what was killed just before it would have removed its work folder
        work.remove()
    if has_scores and not work.is_begun() and not overwrite:
        raise UsageError(f"{out} holds scores; choose another -o, or pass --overwrite")
    if work.is_begun():
        again = RefDigest()
        listing = list_scans(source, sink=again)  # a wrong source does not cost what is done
        # A killed job that began with --overwrite is given again with it, and goes on, too.
        goes_on = not overwrite or work.overwrites(source, again.hexdigest())
        if goes_on:
            return listing, again.hexdigest()
    work.remove()
    writer = ManifestWriter(work.manifest)
    listing = list_scans(source, sink=writer)
    writer.close()
    return listing, writer.hexdigest()


def _begin(work: ScoreWork, out: str, job: ScoreJob) -> ScoreJob:
    with writing(out):
        if not work.is_begun():
            clear_scores(out)
        return work.begin(job)


def _score(
    work: ScoreWork, bundle: Bundle, workers: Workers, options: ScoreOptions, is_streamed: bool
) -> None:
    specs, device, actors = workers
    scorer: Callable[..., Scorer] = Scorer
    args: tuple[Any, ...] = bundle.location, device, 1, False, options.cascade
    if options.hosted is not None:
        scorer, args = options.hosted(bundle)
        actors = actors[0], _LIGHT_CPUS, 0.0
    score_manifest(work, specs, scorer, args, actors, is_streamed)


def _manifest(
    job: ScoreJob,
    bundle: Bundle,
    listing: Listing,
    published: Published,
    seconds: float,
    num_scored: int,
) -> dict[str, Any]:
    """Return the content of `manifest.json`; `seconds` are of the last attempt, as its rate is."""
    return {
        "n_in": job.num_scans,
        **{status: published.statuses[status] for status in STATUSES},
        "seen_in_training": published.num_seen,
        "reasons": {reason: n for reason, n in sorted(published.reasons.items()) if reason},
        "skipped_files": listing.skipped,
        "skipped_names": dict(listing.skipped_names),
        "members_left_out": bundle.unusable,
        "is_whole": listing.is_whole,
        "bundle_id": job.bundle_id,
        "source": job.source,
        "listing_digest": job.listing_digest,
        "settings": job.settings,
        "parts": published.parts,
        "versions": environment(),
        "attempts": job.num_attempts,
        "run_ids": job.run_ids,
        "started_at": job.started_at,
        "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 2),
        "runtimes": dict(sorted(published.runtimes.items())),
        "compute_seconds": round(published.compute_seconds, 2),
        "scans_per_second": round(num_scored / seconds, 1),
    }
