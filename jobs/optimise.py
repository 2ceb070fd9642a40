"""`bt optimise`: each member of a bundle gets the fastest runtime that answers as it should."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from bt_core import storage
from bt_core.errors import EXIT_OK, BundleError, UsageError
from bt_core.log import logger
from jobs.command import (
    BundleArgument,
    DataOption,
    OutOption,
    OverwriteOption,
    make_room,
    refuse_taken,
)

if TYPE_CHECKING:
    from bt_core.data.catalog import Dataset
    from bt_core.inference.fidelity import Limits
    from bt_core.inference.optimise import Choice, Scans
    from bt_core.models.bundle import Bundle, BundleInfo
    from bt_core.scans.preprocess import PreprocessSpec

_MAX_RANGES: Final = 300
"""Training scans that int8 takes its ranges from; NNCF's own default."""


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
    import torch

    from bt_core.data.catalog import Dataset
    from bt_core.inference.fidelity import Limits
    from bt_core.inference.optimise import CANDIDATES
    from bt_core.models.bundle import Bundle

    unknown = sorted(set(only or ()) - {kind for kind, _ in CANDIDATES})
    if unknown:
        raise UsageError(f"--only {unknown[0]}: use compiled or openvino")
    out = storage.absolute(out)
    opened, dataset = Bundle(bundle), Dataset(data)
    _check(opened, dataset, out, overwrite)
    limits = Limits(max_flips=max_flips, max_change=max_change, min_scans=min_scans)
    kinds = [one for one in CANDIDATES if not only or one[0] in only]
    pixels = _read_scans(opened, dataset, scans)
    torch.set_num_threads(1)
    choices = _choose(opened, pixels, limits, kinds, batch_size)
    num_scans = len(next(iter(pixels.values())).compared_NSS)
    info = write_optimised(out, opened, choices, limits, num_scans, overwrite)
    for line in table(info.provenance["runtimes"]):
        print(line)
    print(f"bundle {info.bundle_id} in {out}")
    return EXIT_OK


def _check(bundle: "Bundle", dataset: "Dataset", out: str, overwrite: bool) -> None:
    """Refuse what would be wrong at the end, before hours of measuring."""
    if bundle.unusable:
        raise BundleError(" ".join(bundle.unusable.values()))
    if bundle.info.provenance.get("dataset_digest") != dataset.info.digest:
        raise UsageError(
            f"{dataset.location} is not the dataset that bundle {bundle.info.bundle_id} was made "
            "with (the digests differ), so its validation scans may have been trained on: give "
            "--data the folder that its runs had"
        )
    if out == bundle.location:
        raise UsageError(f"-o {out} is the bundle itself; choose a folder beside it")
    refuse_taken(out, "bundle.json", "a bundle", overwrite)


def _read_scans(bundle: "Bundle", dataset: "Dataset", most: int) -> "dict[str, Scans]":
    """Return the pixels of each distinct preprocessing spec by its digest.

    Ray runs only to make a view that is not there, and not while rates are measured.
    """
    from bt_core.data.views import ensure_view, find_view, read_pixels
    from bt_core.inference.optimise import Scans
    from cluster.session import session

    specs: dict[str, PreprocessSpec] = {
        m.preprocess.pixel_digest: m.preprocess for m in bundle.info.members
    }
    missing = [spec for spec in specs.values() if not find_view(dataset, spec)[1]]
    if missing:
        with session():
            for spec in missing:
                ensure_view(dataset, spec)
    found = {}
    for digest, spec in specs.items():
        view = find_view(dataset, spec)[0]
        found[digest] = Scans(
            read_pixels(view, "validation", most)[1], read_pixels(view, "train", _MAX_RANGES)[1]
        )
    return found


def _choose(
    bundle: "Bundle",
    pixels: "dict[str, Scans]",
    limits: "Limits",
    kinds: list[tuple[str, str]],
    batch_size: int,
) -> "dict[str, Choice]":
    """Measure the members one after another: two at a time would slow one another."""
    from bt_core.inference.optimise import choose_runtime
    from bt_core.models.inputs import Preprocessor

    choices = {}
    for member in bundle.info.members:
        logger.info("measuring %s (%s)", member.name, member.model.backbone)
        choices[member.name] = choose_runtime(
            bundle.load_member(member),
            Preprocessor(member.preprocess),
            member.temperature,
            pixels[member.preprocess.pixel_digest],
            limits,
            kinds,
            batch_size,
        )
    return choices


def write_optimised(
    out: str,
    bundle: "Bundle",
    choices: "dict[str, Choice]",
    limits: "Limits",
    num_scans: int,
    overwrite: bool,
) -> "BundleInfo":
    """Write the bundle anew with the chosen runtimes, and all that was measured."""
    from bt_core.evaluation.model_card import model_card
    from bt_core.inference.optimise import host, name_of
    from bt_core.models.bundle_writer import rewrite_bundle

    measured = {
        **host(),
        "split": "validation",
        "num_scans": num_scans,
        **limits.model_dump(),
        "members": {n: [asdict(m) for m in c.measured] for n, c in choices.items()},
        "chosen": {n: name_of(c.runtime) for n, c in choices.items()},
        "ensemble": _of_ensemble(bundle, choices),
        "bundle_id": bundle.info.bundle_id,
    }
    members = tuple(
        m.model_copy(update={"runtime": choices[m.name].runtime}) for m in bundle.info.members
    )
    provenance = {**bundle.info.provenance, "runtimes": measured}
    info = bundle.info.model_copy(update={"members": members, "provenance": provenance})
    exports = {
        f"members/{member}/{name}": content
        for member, choice in choices.items()
        for name, content in choice.files.items()
    }
    if overwrite:
        make_room(out, "bundle.json", "a bundle")
    return rewrite_bundle(out, bundle, info, exports, model_card(info))


def _of_ensemble(bundle: "Bundle", choices: "dict[str, Choice]") -> dict[str, float]:
    """Return how far the ensemble's answers are from those of all members' references."""
    import numpy as np

    from bt_core.ensemble.calibration import calibration_of
    from bt_core.ensemble.review import decide
    from bt_core.inference.fidelity import flip_bound

    info = bundle.info
    names = [member.name for member in info.members]
    calibration = calibration_of(info, names)
    chosen_NK, reference_NK = (
        calibration.probs(np.stack([getattr(choices[name], which) for name in names]))
        for which in ("logits_NK", "reference_NK")
    )
    chosen, reference = (
        decide(probs_NK, info.review, info.label_space) for probs_NK in (chosen_NK, reference_NK)
    )
    flips_N = chosen.label_N != reference.label_N
    return {
        "label_flips": float(flips_N.mean()),
        "label_flips_below": flip_bound(int(flips_N.sum()), len(flips_N)),
        "decision_flips": float((flips_N | (chosen.sure_N != reference.sure_N)).mean()),
        "max_change": float(np.abs(chosen_NK - reference_NK).max()),
    }


def table(runtimes: dict[str, Any]) -> list[str]:
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
