"""`bt ensemble`: finished runs become a calibrated bundle."""

from typing import TYPE_CHECKING, Annotated, Final

import typer

from bt_core import storage
from bt_core.errors import EXIT_OK, BtError, UsageError
from bt_core.log import logger
from jobs.command import OutOption, OverwriteOption, refuse_taken

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from bt_core.data.catalog import Dataset
    from bt_core.ensemble.build import Options
    from bt_core.models.bundle import BundleInfo, DriftInfo
    from bt_core.models.run import Run

_MOST_FAR: Final = 2000
"""Validation scans that show how far from the others scans may be."""


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
    _report(build(out, loaded, options, data, copies))
    print(f"bundle in {out}")
    return EXIT_OK


def build(
    out: str,
    runs: "Sequence[Run]",
    options: "Options | None" = None,
    data: str | None = None,
    copies: bool = True,
) -> "BundleInfo":
    """Write a calibrated bundle of finished runs, in place of one that is there.

    Where the runs found their dataset may be gone since; then the bundle does without what it would
    have learnt from it, and that is said. A dataset that is named must be there.
    """
    from ray.exceptions import RayError

    from bt_core.ensemble.build import assemble
    from bt_core.evaluation.model_card import model_card
    from bt_core.inference.predictor import with_golden_probs
    from bt_core.models.bundle_writer import write_bundle

    info = assemble(runs, options)
    kept = {run.info.name: run for run in runs}
    first = kept[info.members[0].name]
    try:
        arrays, info = _known_scans(_dataset_of(first, data), info, first, copies)
    except (BtError, OSError, ValueError, RayError) as error:
        if data is not None:
            raise
        logger.warning(
            "the bundle will know neither copies of training scans nor scans unlike them, since "
            "their dataset cannot be read (%s); give it with --data",
            next(iter(str(error).splitlines()), type(error).__name__),
        )
        arrays = {}
    states = {member.name: kept[member.name].state_dict() for member in info.members}
    storage.remove_dir(out)
    return write_bundle(
        out,
        with_golden_probs(info, states),
        states,
        [digest for run in runs for digest in run.training_digests()],
        model_card(info),
        arrays,
    )


def _dataset_of(run: "Run", data: str | None) -> "Dataset":
    from bt_core.data.catalog import Dataset

    dataset = Dataset(data or run.info.dataset)
    if dataset.info.digest != run.info.dataset_digest:
        raise UsageError(
            f"{dataset.location} is not the dataset that {run.location} was trained on (the "
            "digests differ)"
        )
    return dataset


def _known_scans(
    dataset: "Dataset", info: "BundleInfo", first: "Run", copies: bool
) -> "tuple[dict[str, dict[str, np.ndarray]], BundleInfo]":
    """Return what tells copies of training scans, and scans unlike them, by file of the bundle.

    And the description, with how bright the validation scans are.
    """
    import numpy as np

    from bt_core.data.views import ensure_view, read_pixels
    from bt_core.ensemble.far import FarDetector
    from bt_core.inference.runtime import TorchRuntime
    from bt_core.models.bundle import COPIES_FILE, FAR_FILE
    from bt_core.models.classifier import rebuild_classifier
    from bt_core.models.inputs import Preprocessor
    from bt_core.models.training_index import TrainingIndex
    from bt_core.scans.thumbnails import THUMBNAIL
    from cluster.session import session

    spec = first.info.preprocess
    with session():
        own = ensure_view(dataset, spec)
        thumbnails = ensure_view(dataset, THUMBNAIL)
    parts = [read_pixels(thumbnails, split) for split in ("train", "validation")]
    arrays = {}
    if copies:
        columns = dataset.catalog().select(["scan_id", "family"]).to_pydict()
        family_of = dict(zip(columns["scan_id"], columns["family"], strict=True))
        families = [family_of[scan_id][:16] for ids, _ in parts for scan_id in ids]
        pixels_NFF = np.concatenate([pixels for _, pixels in parts])
        arrays[COPIES_FILE] = TrainingIndex.build(pixels_NFF, families).arrays()
    judged = first.validation().select(["scan_id", "group"]).to_pydict()
    group_of = dict(zip(judged["scan_id"], judged["group"], strict=True))
    ids, pixels_NSS = read_pixels(own, "validation", _MOST_FAR)
    used = [i for i, scan_id in enumerate(ids) if scan_id in group_of]
    classifier = rebuild_classifier(first.info.model, spec, info.label_space.num_classes)
    classifier.load_state_dict(first.state_dict())
    features_ND = TorchRuntime(classifier, Preprocessor(spec)).run(pixels_NSS[used])[1]
    groups = np.array([group_of[ids[i]] for i in used])
    if len(set(groups.tolist())) > 1:
        arrays[FAR_FILE] = FarDetector.fit(features_ND, groups).arrays()
    return arrays, info.model_copy(update={"drift": _with_intensity(info.drift, parts[1][1])})


def _with_intensity(drift: "DriftInfo | None", thumbnails_NFF: "np.ndarray") -> "DriftInfo":
    from bt_core.ensemble.drift import fit_drift
    from bt_core.models.bundle import DriftInfo

    own = fit_drift({"intensity": thumbnails_NFF.mean(axis=(1, 2))})
    known = drift or DriftInfo(edges={}, shares={})
    return DriftInfo(edges={**known.edges, **own.edges}, shares={**known.shares, **own.shares})


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
