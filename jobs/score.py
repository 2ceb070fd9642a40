"""`bt score`: an archive of scans becomes Parquet rows, one for each scan."""

import os
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

import typer

from bt_core import __version__, log, storage
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
    from collections.abc import Callable

    import pyarrow as pa

    from bt_core.data.publish import Published
    from bt_core.data.score_work import ScoreJob, ScoreWork
    from bt_core.models.bundle import Bundle
    from bt_core.scans.archives import Listing
    from bt_core.scans.dicom_results import Kind


@dataclass(frozen=True)
class Settings:
    """What a scoring job is asked for besides its bundle and source."""

    device: str = "auto"
    cascade: bool = True
    dicom: "Kind | None" = None
    via_serve: bool = False


_LIGHT_CPUS: Final = 0.1
"""Of an actor that only asks an ensemble elsewhere."""


def run(
    bundle: BundleArgument,
    source: SourceArgument,
    out: OutOption,
    device: DeviceOption = "auto",
    cascade: Annotated[
        bool,
        typer.Option(
            "--cascade/--no-cascade",
            help="Let the first member answer alone where the bundle says that this is safe.",
        ),
    ] = True,
    dicom: Annotated[
        str | None,
        typer.Option(
            metavar="sr|sc",
            help="For DICOM scans also write a structured report, or a picture, of their study. "
            "These files name the patient.",
        ),
    ] = None,
    via: Annotated[
        str | None,
        typer.Option(
            metavar="serve",
            help="Ask the ensemble that a bt serve on the cluster of RAY_ADDRESS hosts, in place "
            "of loading it into workers. Whether its cascade answers is for the server to say.",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> int:
    """Score every scan of an archive; the same command goes on with a job that was killed.

    Exit code 3 says that some could not be scored, or that the archive is cut short.
    """
    from bt_core.data.score_work import locked
    from bt_core.models.bundle import Bundle

    out = output_folder(out, source)
    opened = Bundle(bundle)
    with locked(out):
        options = Settings(device, cascade, _dicom_kind(dicom), _is_via_serve(via))
        manifest, is_whole = score_source(opened, source, out, options, overwrite)
    _print_summary(manifest, opened, out)
    is_whole = is_whole and not manifest["rejected"] + manifest["failed"]
    return EXIT_OK if is_whole else EXIT_INCOMPLETE


def score_source(
    bundle: "Bundle", source: str, out: str, options: "Settings", overwrite: bool = False
) -> tuple[dict[str, Any], bool]:
    """Score a source, or what a killed job left of it, into a folder that no other job works on.

    Returns:
        The content of `manifest.json`, and whether the source was whole.
    """
    from bt_core.data.dicom_stage import write_results
    from bt_core.data.publish import publish
    from bt_core.data.score_work import MANIFEST_FILE, ScoreJob, ScoreWork, writing
    from bt_core.data.scoring import score_manifest
    from bt_core.data.stream import is_streamed
    from bt_core.ensemble.scorer import Scorer

    streamed = is_streamed(storage.absolute(source))
    if streamed and options.dicom:
        raise UsageError(
            f"--dicom reads scans a second time, which a compressed tar such as {source} does not "
            "allow one by one: repack it as tar or zip"
        )
    work = ScoreWork(out)
    started, clock = datetime.now(UTC), time.monotonic()
    try:
        listing, digest = _list(work, source, out, overwrite)
        with placed(bundle, options.device) as (specs, chosen, actors):
            job = ScoreJob(
                bundle_id=bundle.info.bundle_id,
                source=storage.absolute(source),
                listing_digest=digest,
                settings={
                    "device": "serve" if options.via_serve else chosen,
                    "cascade": _cascade(options),
                    "dicom": options.dicom or "none",
                },
                bt_version=__version__,
                num_scans=listing.num_scans,
                started_at=started.isoformat(timespec="seconds"),
                overwrites=overwrite,
                run_ids=(log.run_id(),),
            )
            with writing(out):
                if not work.is_begun():
                    clear_scores(out)
                job = work.begin(job)
            num_before = work.num_done()
            if options.via_serve:
                from serve.batch import hosted_app, hosted_scorer

                scorer: Callable[..., Scorer] = hosted_scorer
                scorer_args: tuple[object, ...] = bundle.location, hosted_app(bundle)
                actors = actors[0], _LIGHT_CPUS, 0.0
            else:
                scorer, scorer_args = Scorer, (bundle.location, chosen, 1, False, options.cascade)
            score_manifest(work, specs, scorer, scorer_args, actors, streamed)
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


def _cascade(options: Settings) -> str:
    if options.via_serve:
        if not options.cascade:
            raise UsageError("--via serve: what runs there decides on the cascade; leave it out")
        return "as hosted"
    return "on" if options.cascade else "off"


def _is_via_serve(given: str | None) -> bool:
    if given not in (None, "serve"):
        raise UsageError(f"--via {given}: use serve, or leave it out")
    if given and "RAY_ADDRESS" not in os.environ:
        import ray

        if not ray.is_initialized():
            raise UsageError("--via serve: set RAY_ADDRESS to what bt serve has printed")
    return given is not None


def _dicom_kind(given: str | None) -> "Kind | None":
    if given is None or given in ("sr", "sc"):
        return cast("Kind | None", given)
    raise UsageError(f"--dicom {given}: use sr (structured report) or sc (secondary capture)")


def score_refs(
    bundle: "Bundle", refs: "pa.Table", out: str, device: str, in_depth: bool = False
) -> "pa.Table":
    """Score a few thousand listed scans at once into the folder `scores` below `out`.

    Returns:
        All rows; none is written if it is not all of them.

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


def clear_scores(out: str) -> None:
    """Remove scores below a folder, and what an interrupted `score_refs` left of some.

    What else a scoring job writes goes only where one has finished: it may be somebody's own.
    """
    from bt_core.data.publish import DICOM_FOLDER
    from bt_core.data.score_work import MANIFEST_FILE, is_of_scores

    if storage.exists(storage.join(out, MANIFEST_FILE)):
        storage.remove_file(storage.join(out, "review.csv"))
        storage.remove_dir(storage.join(out, DICOM_FOLDER))
        storage.remove_file(storage.join(out, MANIFEST_FILE))
    for name in storage.list_dirs(out):
        is_ours = name == "scores" and is_of_scores(storage.join(out, name))
        if is_ours or (name.startswith("scores.") and name.endswith(".tmp")):
            storage.remove_dir(storage.join(out, name))


def _list(work: "ScoreWork", source: str, out: str, overwrite: bool) -> "tuple[Listing, str]":
    """List a source into the work folder, or once more for a job that goes on; or refuse.

    Returns:
        The listing without its refs, and their digest.
    """
    from bt_core.data.manifest import ManifestWriter, RefDigest
    from bt_core.data.score_work import MANIFEST_FILE, refuse_foreign
    from bt_core.scans.archives import list_scans

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


def _manifest(
    job: "ScoreJob",
    bundle: "Bundle",
    listing: "Listing",
    published: "Published",
    seconds: float,
    num_scored: int,
) -> dict[str, Any]:
    """Return the content of `manifest.json`; `seconds` are of the last attempt, as its rate is."""
    from bt_core.ensemble.scorer import STATUSES
    from bt_core.models.run import environment

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


def _print_summary(manifest: dict[str, Any], bundle: "Bundle", out: str) -> None:
    from bt_core.data.publish import DICOM_FOLDER
    from bt_core.ensemble.scorer import STATUSES

    print(
        f"{manifest['n_in']} scans = "
        + " + ".join(f"{manifest[status]} {status}" for status in STATUSES)
        + f"  ({manifest['scans_per_second']} scans/s)"
    )
    for reason, count in manifest["reasons"].items():
        print(f"  {count} {reason}: {REASONS[reason]}")
    if manifest["seen_in_training"]:
        print(f"  {manifest['seen_in_training']} are, or copy, scans that the models learnt from")
    for why, count in manifest["skipped_files"].items():
        print(f"  skipped {count}: {why}")
    if not manifest["is_whole"]:
        print("  the source is cut short or closed in part: it may hold more scans than these")
    wanted = {f"{m.name}: {m.runtime.kind} {m.runtime.precision}" for m in bundle.info.members}
    for name, count in manifest["runtimes"].items():
        if name not in wanted:
            print(f"  {count} answers of {name}, since a host cannot run what the bundle asks for")
    for name, why in bundle.unusable.items():
        print(f"  {name} did not answer: {why}")
    if manifest.get("dicom"):
        results = manifest["dicom"]
        print(f"  {results['written']} DICOM files, which name patients, in {out}/{DICOM_FOLDER}")
        for reason, count in results["not_written"].items():
            print(f"  {count} scans without one: {REASONS[reason]}")
    if manifest["attempts"] > 1:
        print(f"done in {manifest['attempts']} attempts")
    print(f"scores in {out}, what a person should look at in {storage.join(out, 'review.csv')}")


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("score")
