"""`bt ensemble`: finished runs become a calibrated bundle."""

from typing import TYPE_CHECKING, Annotated

import typer

from bt_core import storage
from bt_core.errors import EXIT_OK, UsageError
from jobs.command import OutOption, OverwriteOption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bt_core.ensemble.build import Options
    from bt_core.models.bundle import BundleInfo
    from bt_core.models.run import Run


def run(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    out: OutOption,
    weights: Annotated[
        str,
        typer.Option(
            metavar="log_loss|greedy|equal",
            help="How shares are chosen; equal ones stay if these are no better on other families.",
        ),
    ] = "log_loss",
    quorum: Annotated[
        int | None,
        typer.Option(min=1, help="Members that must answer. [default: more than half]"),
    ] = None,
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
    max_disagreement: Annotated[
        float,
        typer.Option(
            min=0.0001, max=0.5, help="Share of answers that the cascade may change, at most."
        ),
    ] = 0.005,
    overwrite: OverwriteOption = False,
) -> int:
    """Put runs into one bundle: shares, temperatures, review rule and cascade from validation."""
    from bt_core.config import parse
    from bt_core.ensemble.build import Options
    from bt_core.models.run import Run

    out = storage.absolute(out)
    options = parse(
        Options,
        {
            "weights": weights,
            "quorum": quorum,
            "conformal_level": conformal_level,
            "max_missed_tumor_rate": max_missed_tumors,
            "max_disagreement": max_disagreement,
        },
        "options",
    )
    loaded = [Run(location) for location in runs]
    if storage.exists(out):
        if not overwrite:
            raise UsageError(f"{out} exists; choose another -o, or pass --overwrite")
        if not storage.exists(storage.join(out, "bundle.json")):
            raise UsageError(f"{out} is not a bundle, so it is not overwritten; choose another -o")
    _report(build(out, loaded, options))
    print(f"bundle in {out}")
    return EXIT_OK


def build(out: str, runs: "Sequence[Run]", options: "Options | None" = None) -> "BundleInfo":
    """Write a calibrated bundle of finished runs, in place of one that is there."""
    from bt_core.ensemble.build import assemble
    from bt_core.evaluation.model_card import model_card
    from bt_core.models.bundle import write_bundle

    info = assemble(runs, options)
    names = {member.name for member in info.members}
    storage.remove_dir(out)
    return write_bundle(
        out,
        info,
        {run.info.name: run.state_dict() for run in runs if run.info.name in names},
        [digest for run in runs for digest in run.training_digests()],
        model_card(info),
    )


def _report(info: "BundleInfo") -> None:
    from bt_core.evaluation.model_card import cascade_sentence

    metrics = info.metrics
    print(
        f"bundle {info.bundle_id}: {len(info.members)} members ("
        + ", ".join(f"{m.name} {m.weight:.2f}" for m in info.members)
        + f"; {info.least_members} must answer), validation accuracy {metrics['accuracy']:.4f}, "
        f"log loss {metrics['log_loss']:.4f}; {1 - metrics['answered']:.1%} are for review"
    )
    for name in info.provenance["weights"]["left_out"]:
        print(f"  {name} is left out: its share came out as 0 (--weights equal keeps it)")
    print(cascade_sentence(info))


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("ensemble")
