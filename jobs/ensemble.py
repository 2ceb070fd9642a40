"""`bt ensemble`: finished runs become a calibrated bundle."""

from typing import TYPE_CHECKING, Annotated

import typer

from bt_core import storage
from bt_core.errors import EXIT_OK
from jobs.options import OutOption, OverwriteOption
from jobs.output_folders import refuse_taken

if TYPE_CHECKING:
    from bt_core.models.bundle import BundleInfo


def run(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    out: OutOption,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Dataset folder of the runs, whose scans later ones are compared with. "
            "[default: where the runs found it]",
        ),
    ] = None,
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
    copies: Annotated[
        bool,
        typer.Option(
            "--copies/--no-copies",
            help="Keep what tells copies of training scans: a picture of 40 px of each.",
        ),
    ] = True,
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
    refuse_taken(out, "bundle.json", "a bundle", overwrite)
    from bt_core.workflows.ensemble import build
    from cluster.session import session

    _report(build(out, loaded, session, options, data, copies))
    print(f"bundle in {out}")
    return EXIT_OK


def _report(info: "BundleInfo") -> None:
    from bt_core.evaluation.model_card import cascade_sentence

    metrics, num = info.metrics, len(info.members)
    print(
        f"bundle {info.bundle_id}: {num} member{'s' if num > 1 else ''} ("
        + ", ".join(f"{m.name} {m.weight:.2f}" for m in info.members)
        + f"; {info.least_members} must answer), validation accuracy {metrics['accuracy']:.4f}, "
        f"log loss {metrics['log_loss']:.4f}; {1 - metrics['answered']:.1%} are for review"
    )
    if not metrics["answered"]:
        print(
            "  no answer goes without review: validation scans are of too few families for what is "
            "promised; prepare more scans, or promise less (--conformal-level, --max-missed-tumors)"
        )
    for name in info.provenance["weights"]["left_out"]:
        print(f"  {name} is left out: its share came out as 0 (--weights equal keeps it)")
    print(cascade_sentence(info))


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("ensemble")
