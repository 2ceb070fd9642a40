"""`bt ensemble`: finished runs become a calibrated bundle."""

from typing import TYPE_CHECKING, Annotated

import typer

from bt_core import storage
from bt_core.errors import EXIT_OK, UsageError
from jobs.command import OutOption, OverwriteOption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bt_core.models.bundle import BundleInfo
    from bt_core.models.run import Run


def run(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    out: OutOption,
    conformal_level: Annotated[
        float,
        typer.Option(min=0.5, max=0.999, help="Share of each class that its sets are to hold."),
    ] = 0.95,
    max_missed_tumors: Annotated[
        float,
        typer.Option(
            min=0.0001, max=0.5, help="Share of tumours that may be called free of one, at most."
        ),
    ] = 0.01,
    overwrite: OverwriteOption = False,
) -> int:
    """Put runs into one bundle: equal weights, temperatures fitted on the validation scans."""
    from bt_core.models.run import Run

    out = storage.absolute(out)
    loaded = [Run(location) for location in runs]
    if storage.exists(out):
        if not overwrite:
            raise UsageError(f"{out} exists; choose another -o, or pass --overwrite")
        if not storage.exists(storage.join(out, "bundle.json")):
            raise UsageError(f"{out} is not a bundle, so it is not overwritten; choose another -o")
    info = build(out, loaded, conformal_level, max_missed_tumors)
    metrics = info.metrics
    print(
        f"bundle {info.bundle_id}: {len(info.members)} members, validation accuracy "
        f"{metrics['accuracy']:.4f}, log loss {metrics['log_loss']:.4f}; below a confidence of "
        f"{info.review.min_confidence:.3f} scans are deferred ({1 - metrics['answered']:.1%})"
    )
    print(f"bundle in {out}")
    return EXIT_OK


def build(
    out: str,
    runs: "Sequence[Run]",
    conformal_level: float = 0.95,
    max_missed_tumor_rate: float = 0.01,
) -> "BundleInfo":
    """Write a calibrated bundle of finished runs, in place of one that is there."""
    from bt_core.ensemble.build import assemble
    from bt_core.evaluation.model_card import model_card
    from bt_core.models.bundle import write_bundle

    info = assemble(runs, conformal_level, max_missed_tumor_rate)
    storage.remove_dir(out)
    return write_bundle(
        out,
        info,
        {run.info.name: run.state_dict() for run in runs},
        [digest for run in runs for digest in run.training_digests()],
        model_card(info),
    )


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("ensemble")
