"""Finished runs become a calibrated bundle, which knows the scans that they were trained on."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from ray.exceptions import RayError

from bt_core import storage
from bt_core.data.catalog import Dataset, groups_of
from bt_core.data.views import ensure_view, read_pixels
from bt_core.ensemble.build import Options, assemble
from bt_core.ensemble.drift import fit_drift
from bt_core.ensemble.far import FarDetector
from bt_core.errors import BtError, UsageError, first_line
from bt_core.evaluation.model_card import model_card
from bt_core.inference.predictor import with_golden_probs
from bt_core.inference.runtime import TorchRuntime
from bt_core.log import logger
from bt_core.models.bundle import COPIES_FILE, FAR_FILE, BundleInfo, DriftInfo
from bt_core.models.bundle_writer import write_bundle
from bt_core.models.classifier import rebuild_classifier
from bt_core.models.inputs import Preprocessor
from bt_core.models.run import Run
from bt_core.models.training_index import TrainingIndex
from bt_core.scans.thumbnails import THUMBNAIL
from bt_core.workflows.workers import Session

_MOST_FAR: Final = 2000
"""Validation scans that show how far from the others scans may be."""


def build(
    out: str,
    runs: Sequence[Run],
    session: Session,
    options: Options | None = None,
    data: str | None = None,
    copies: bool = True,
) -> BundleInfo:
    """Write a calibrated bundle of finished runs, in place of one that is there.

    Where the runs found their dataset may be gone since; then the bundle does without what it would
    have learnt from it, and that is said. A dataset that is named must be there.

    Args:
        out: folder of the bundle.
        runs: of one dataset.
        session: to read their scans with.
        options: how members are weighed and calibrated.
        data: dataset folder of the runs; None for where they found it.
        copies: keep what tells copies of training scans.

    Raises:
        UsageError: if the runs do not go together, or were not trained on `data`.
    """
    info = assemble(runs, options)
    kept = {run.info.name: run for run in runs}
    first = kept[info.members[0].name]
    try:
        arrays, info = _known_scans(_dataset_of(first, data), info, first, session, copies)
    except (BtError, OSError, ValueError, RayError) as error:
        if data is not None:
            raise
        logger.warning(
            "the bundle will know neither copies of training scans nor scans unlike them, since "
            "their dataset cannot be read (%s); give it with --data",
            first_line(error),
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


def _dataset_of(run: Run, data: str | None) -> Dataset:
    dataset = Dataset(data or run.info.dataset)
    if dataset.info.digest != run.info.dataset_digest:
        raise UsageError(
            f"{dataset.location} is not the dataset that {run.location} was trained on (the "
            "digests differ)"
        )
    return dataset


def _known_scans(
    dataset: Dataset, info: BundleInfo, first: Run, session: Session, copies: bool
) -> tuple[dict[str, dict[str, np.ndarray]], BundleInfo]:
    """Return what tells copies of training scans, and scans unlike them, by file of the bundle.

    And the description, with how bright the validation scans are.
    """
    with session():
        own = ensure_view(dataset, first.info.preprocess)
        thumbnails = ensure_view(dataset, THUMBNAIL)
    parts = [read_pixels(thumbnails, split) for split in ("train", "validation")]
    arrays: dict[str, dict[str, np.ndarray]] = {}
    if copies:
        arrays[COPIES_FILE] = _training_index(dataset, parts)
    far = _far_detector(
        first, info.label_space.num_classes, *read_pixels(own, "validation", _MOST_FAR)
    )
    if far is not None:
        arrays[FAR_FILE] = far.arrays()
    return arrays, info.model_copy(update={"drift": _with_intensity(info.drift, parts[1][1])})


def _training_index(
    dataset: Dataset, parts: list[tuple[list[str], np.ndarray]]
) -> dict[str, np.ndarray]:
    columns = dataset.catalog().select(["scan_id", "family"]).to_pydict()
    family_of = dict(zip(columns["scan_id"], columns["family"], strict=True))
    families = [family_of[scan_id][:16] for ids, _ in parts for scan_id in ids]
    pixels_NFF = np.concatenate([pixels for _, pixels in parts])
    return TrainingIndex.build(pixels_NFF, families).arrays()


def _far_detector(
    run: Run, num_classes: int, ids: list[str], pixels_NSS: np.ndarray
) -> FarDetector | None:
    """Fit a detector on what a run makes of its validation scans; None for too few groups."""
    group_of = groups_of(run.validation())
    used = [i for i, scan_id in enumerate(ids) if scan_id in group_of]
    spec = run.info.preprocess
    classifier = rebuild_classifier(run.info.model, spec, num_classes)
    classifier.load_state_dict(run.state_dict())
    features_ND = TorchRuntime(classifier, Preprocessor(spec)).run(pixels_NSS[used])[1]
    groups = np.array([group_of[ids[i]] for i in used])
    return FarDetector.fit(features_ND, groups) if len(set(groups.tolist())) > 1 else None


def _with_intensity(drift: DriftInfo | None, thumbnails_NFF: np.ndarray) -> DriftInfo:
    own = fit_drift({"intensity": thumbnails_NFF.mean(axis=(1, 2))})
    known = drift or DriftInfo(edges={}, shares={})
    return DriftInfo(edges={**known.edges, **own.edges}, shares={**known.shares, **own.shares})
