"""`bt optimise`: each member of a bundle gets the fastest runtime that answers as it should."""

from typing import Annotated, Any

import typer

from bt_core import storage
from bt_core.errors import EXIT_OK, UsageError
from jobs.options import BundleArgument, DataOption, OutOption, OverwriteOption
from jobs.output_folders import make_room, refuse_taken


def run(
    bundle: BundleArgument,
    data: DataOption,
    out: OutOption,
    max_flips: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of scans whose likeliest class may change."),
    ] = 0.001,
    max_change: Annotated[
        float, typer.Option(min=0, max=1, help="By how much any probability may change.")
    ] = 0.05,
    scans: Annotated[
        int, typer.Option(min=1, help="Validation scans to compare answers on, at most.")
    ] = 2000,
    min_scans: Annotated[
        int,
        typer.Option(min=1, help="Validation scans below which only runtimes in fp32 are chosen."),
    ] = 300,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1, max=64, help="Scans of each forward pass: 1 for a service with few requests."
        ),
    ] = 4,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Measure this runtime only: compiled or openvino. May be repeated."),
    ] = None,
    overwrite: OverwriteOption = False,
) -> int:
    """Write a bundle whose members run as fast as they can on a CPU like this one.

    Candidates are measured on one thread, and compared with PyTorch in float32 on the dataset's
    validation scans. Calibration and review stay.
    """
    from bt_core.data.catalog import Dataset
    from bt_core.inference.fidelity import Limits
    from bt_core.inference.optimise import CANDIDATES
    from bt_core.models.bundle import Bundle

    unknown = sorted(set(only or ()) - {kind for kind, _ in CANDIDATES})
    if unknown:
        raise UsageError(f"--only {unknown[0]}: use compiled or openvino")
    out = storage.absolute(out)
    opened, dataset = Bundle(bundle), Dataset(data)  # answered before Ray is imported
    from bt_core.workflows.optimise import (
        choose_runtimes,
        read_scans,
        refuse_unfit,
        with_choices,
        write_optimised,
    )
    from cluster.session import session

    refuse_unfit(opened, dataset, out)
    refuse_taken(out, "bundle.json", "a bundle", overwrite)
    limits = Limits(max_flips=max_flips, max_change=max_change, min_scans=min_scans)
    kinds = [one for one in CANDIDATES if not only or one[0] in only]
    pixels = read_scans(opened, dataset, scans, session)
    choices = choose_runtimes(opened, pixels, limits, kinds, batch_size)
    info = with_choices(opened, choices, limits)
    if overwrite:
        make_room(out, "bundle.json", "a bundle")
    info = write_optimised(out, opened, info, choices)
    for line in _table(info.provenance["runtimes"]):
        print(line)
    print(f"bundle {info.bundle_id} in {out}")
    return EXIT_OK


def _table(runtimes: dict[str, Any]) -> list[str]:
    """Return the lines that are printed of `provenance["runtimes"]`."""
    lines = [
        f"{runtimes['num_scans']} validation scans, images per second of CPU time on "
        f"{runtimes['num_threads']} thread of {runtimes['cpu']}; at most "
        f"{runtimes['max_flips']:.2%} of labels may flip, and no "
        f"probability move by more than {runtimes['max_change']:g}",
        f"{'member':<18}{'runtime':<32}{'images/s':>9}{'flips':>8}{'largest':>9}{'mean':>10}",
    ]
    for member, rows in runtimes["members"].items():
        for row in rows:
            name, figures = row["name"], " " * 36
            if row["images_per_second"] is not None:
                figures = (
                    f"{row['images_per_second']:>9.1f}{row['label_flips']:>8.2%}"
                    f"{row['max_change']:>9.4f}{row['mean_change']:>10.6f}"
                )
            if row["exact_below"] and row["images_per_second"] is not None:
                figures += f"  {row['exact_share']:.1%} in fp32"
            chosen = "chosen" if name == runtimes["chosen"][member] else row["why_not"]
            lines.append(f"{member:<18}{name:<32}{figures}  {chosen}".rstrip())
    ensemble = runtimes["ensemble"]
    seconds = {"torch fp32": 0.0, "chosen": 0.0}
    for member, rows in runtimes["members"].items():
        rates = {row["name"]: row["images_per_second"] for row in rows}
        seconds["torch fp32"] += 1 / rates["torch fp32"]
        seconds["chosen"] += 1 / rates[runtimes["chosen"][member]]
    lines += [
        "(flips: labels other than by torch fp32; largest, mean: changes of a probability)",
        f"ensemble: {seconds['torch fp32'] / seconds['chosen']:.1f} times torch fp32's images/s; "
        f"{ensemble['label_flips']:.2%} of labels flip (of all scans fewer than "
        f"{ensemble['label_flips_below']:.2%}, with 95 % confidence), "
        f"{ensemble['decision_flips']:.2%} with the need for review; probabilities move by at most "
        f"{ensemble['max_change']:.4f}",
    ]
    return lines


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("optimise")
