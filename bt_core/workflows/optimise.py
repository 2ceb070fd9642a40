"""Each member of a bundle gets the fastest runtime that answers as it should, in a new bundle."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

import numpy as np
import torch

from bt_core.data.catalog import Dataset
from bt_core.data.views import ensure_view, find_view, read_pixels
from bt_core.ensemble.calibration import calibration_of
from bt_core.ensemble.review import decide
from bt_core.errors import BundleError, UsageError
from bt_core.evaluation.model_card import model_card
from bt_core.inference.fidelity import Limits, flip_bound
from bt_core.inference.optimise import CANDIDATES, Choice, Scans, choose_runtime, host, name_of
from bt_core.log import logger
from bt_core.models.bundle import Bundle, BundleInfo
from bt_core.models.bundle_writer import rewrite_bundle
from bt_core.models.inputs import Preprocessor
from bt_core.scans.preprocess import PreprocessSpec
from bt_core.workflows.workers import Session

_MAX_RANGES: Final = 300
"""Training scans that int8 takes its ranges from; NNCF's own default."""


def refuse_unfit(bundle: Bundle, dataset: Dataset, out: str) -> None:
    """Refuse what would be wrong at the end, before hours of measuring.

    Raises:
        BundleError: if a member cannot answer.
        UsageError: if the dataset is not the bundle's, or `out` is its folder.
    """
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


def read_scans(bundle: Bundle, dataset: Dataset, most: int, session: Session) -> dict[str, Scans]:
    """Return the pixels of each distinct preprocessing spec by its digest.

    Ray runs only to make a view that is not there, and not while rates are measured.

    Args:
        bundle: its members' specs.
        dataset: that it was made with.
        most: validation scans at most.
        session: to make views with.
    """
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


def choose_runtimes(
    bundle: Bundle,
    pixels: dict[str, Scans],
    limits: Limits,
    kinds: Sequence[tuple[str, str]] = CANDIDATES,
    batch_size: int = 4,
) -> dict[str, Choice]:
    """Measure the members one after another: two at a time would slow one another.

    Torch works on one thread in this process from then on.

    Args:
        bundle: its members.
        pixels: of `read_scans`.
        limits: what may differ.
        kinds: candidates, as in `choose_runtime`.
        batch_size: scans of each forward pass.

    Returns:
        What was measured of each member, by its name, and what it gets.
    """
    torch.set_num_threads(1)
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


def with_choices(bundle: Bundle, choices: dict[str, Choice], limits: Limits) -> BundleInfo:
    """Return the bundle's description with the chosen runtimes, and all that was measured.

    Args:
        bundle: that was measured.
        choices: of `choose_runtimes`.
        limits: of these.
    """
    measured = {
        **host(),
        "split": "validation",
        "num_scans": len(next(iter(choices.values())).logits_NK),
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
    return bundle.info.model_copy(update={"members": members, "provenance": provenance})


def write_optimised(
    out: str, bundle: Bundle, info: BundleInfo, choices: dict[str, Choice]
) -> BundleInfo:
    """Write a bundle anew, as `with_choices` describes it, into a folder that is not there."""
    exports = {
        f"members/{member}/{name}": content
        for member, choice in choices.items()
        for name, content in choice.files.items()
    }
    return rewrite_bundle(out, bundle, info, exports, model_card(info))


def _of_ensemble(bundle: Bundle, choices: dict[str, Choice]) -> dict[str, float]:
    """Return how far the ensemble's answers are from those of all members' references."""
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
