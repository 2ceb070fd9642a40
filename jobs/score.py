"""`bt score`: an archive of scans becomes Parquet rows, one for each scan."""

import os
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from bt_core import storage
from bt_core.errors import EXIT_INCOMPLETE, EXIT_OK, REASONS, UsageError
from jobs.options import BundleArgument, DeviceOption, OutOption, OverwriteOption, SourceArgument
from jobs.output_folders import output_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from bt_core.ensemble.scorer import Scorer
    from bt_core.models.bundle import Bundle
    from bt_core.scans.dicom_results import Kind


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
    from bt_core.data.score_work import device_as_begun
    from bt_core.locks import locked
    from bt_core.models.bundle import Bundle

    out = output_folder(out, source)
    opened = Bundle(bundle)  # a wrong one is answered before Ray is imported
    from bt_core.workflows.score import ScoreOptions, score_source
    from cluster.session import placed

    with locked(out):
        device = device if overwrite else device_as_begun(out, device)
        kind = _dicom_kind(dicom)
        hosted = _hosted if _is_via_serve(via, cascade) else None
        options = ScoreOptions(cascade, kind, hosted, overwrite)
        place = partial(placed, device=device)
        manifest, is_whole = score_source(opened, source, out, place, options)
    _print_summary(manifest, opened, out)
    is_whole = is_whole and not manifest["rejected"] + manifest["failed"]
    return EXIT_OK if is_whole else EXIT_INCOMPLETE


def _is_via_serve(given: str | None, cascade: bool) -> bool:
    if given not in (None, "serve"):
        raise UsageError(f"--via {given}: use serve, or leave it out")
    if given and "RAY_ADDRESS" not in os.environ:
        import ray

        if not ray.is_initialized():
            raise UsageError("--via serve: set RAY_ADDRESS to what bt serve has printed")
    if given and not cascade:
        raise UsageError("--via serve: what runs there decides on the cascade; leave it out")
    return given is not None


def _hosted(bundle: "Bundle") -> "tuple[Callable[..., Scorer], tuple[str, str]]":
    from serve.batch import hosted_app, hosted_scorer

    return hosted_scorer, (bundle.location, hosted_app(bundle))


def _dicom_kind(given: str | None) -> "Kind | None":
    if given is None or given in ("sr", "sc"):
        return cast("Kind | None", given)
    raise UsageError(f"--dicom {given}: use sr (structured report) or sc (secondary capture)")


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
