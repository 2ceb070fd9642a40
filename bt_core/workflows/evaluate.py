"""Bundles and runs on the same scans, or on an archive: each is reported on, and compared."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from bt_core import storage
from bt_core.data.catalog import Dataset
from bt_core.errors import BundleError, UsageError
from bt_core.evaluation.evaluated import EvaluatedScans, of_dataset, of_source
from bt_core.evaluation.predictions import Scans
from bt_core.labels import LabelSpace
from bt_core.models.bundle import COPIES_FILE, Bundle
from bt_core.models.run import Run
from bt_core.scans.identity import hash_key
from bt_core.workflows.ensemble import build
from bt_core.workflows.evaluate_model import ModelEvaluation
from bt_core.workflows.score import clear_scores
from bt_core.workflows.workers import Place, Session


@dataclass(frozen=True)
class Evaluated:
    """What was found of one model.

    Attributes:
        name: of the model.
        out: folder of its report.
        figures: as in `metrics.json`.
        scans: the answered ones.
        tested: what was evaluated on.
        is_whole: the source was whole, and every scan got an answer.
    """

    name: str
    out: str
    figures: dict[str, Any]
    scans: Scans
    tested: EvaluatedScans
    is_whole: bool


class Evaluation:
    """Models that are to be evaluated on the same scans, and the folders of their reports.

    Args:
        models: folders of bundles, or of finished runs, which become bundles below `out`.
        data: dataset folder, or labelled source.
        is_dataset: which of these.
        out: folder of the report, or with several models of a folder for each.
        session: to calibrate runs with.
        overwrite: replace what an earlier evaluation left.

    Attributes:
        space: the classes, which all models share.

    Raises:
        UsageError: if two models are named alike or know different classes, or a folder holds
            results.
        BundleError: if a member of a bundle cannot answer.
    """

    def __init__(
        self,
        models: Sequence[str],
        data: str,
        is_dataset: bool,
        out: str,
        session: Session,
        overwrite: bool = False,
    ) -> None:
        self._data, self._is_dataset = data, is_dataset
        self._places = _places(models, out, overwrite)
        own = data if is_dataset else None
        self._bundles = {
            name: _bundle(model, out, own, session)
            for name, model in zip(self._places, models, strict=True)
        }
        self.space = _common_space(self._bundles)

    def run(
        self,
        place: Place,
        prevalence: dict[str, float] | None = None,
        trained_on: str | None = None,
        depth: bool = True,
    ) -> Iterator[Evaluated]:
        """Score, report, and yield each model when its report is written; Ray must run already.

        Args:
            place: gives the workers.
            prevalence: shares of the classes where it will be used, for predictive values there.
            trained_on: for a source: dataset that the models were trained with, to find copies.
            depth: draw heat maps, answer some scans again perturbed, and probe for shortcuts.
        """
        for name, (truth, tested) in self._truths(trained_on).items():
            out, bundle = self._places[name], self._bundles[name]
            one = ModelEvaluation(bundle, truth, tested, out, place, prevalence, depth)
            figures, scans = one.run()
            is_whole = figures["all"]["num_scans"] == truth.num_rows and tested.is_whole
            yield Evaluated(name, out, figures, scans, tested, is_whole)

    def _truths(self, trained_on: str | None) -> dict[str, tuple[pa.Table, EvaluatedScans]]:
        """Return for each model the catalog rows that it is evaluated on, and what they are."""
        if not self._is_dataset:
            trained = Dataset(trained_on) if trained_on else None
            for name, bundle in self._bundles.items():
                digest = bundle.info.provenance.get("dataset_digest")
                if trained is not None and trained.info.digest != digest:
                    raise UsageError(f"{name} was not trained with the dataset in {trained_on}")
            truth, tested = of_source(self._data, self.space, hash_key()[0], trained)
            return {
                name: (
                    truth,
                    tested.model_copy(
                        update={
                            "copies_found": tested.copies_found or COPIES_FILE in bundle.info.files
                        }
                    ),
                )
                for name, bundle in self._bundles.items()
            }
        dataset = Dataset(self._data)
        if dataset.info.label_space != self.space:
            raise UsageError(
                f"the model knows {', '.join(self.space.names)}; the dataset holds "
                f"{', '.join(dataset.info.label_space.names)}"
            )
        return {
            name: of_dataset(
                dataset, bundle.info.bundle_id, str(bundle.info.provenance.get("dataset_digest"))
            )
            for name, bundle in self._bundles.items()
        }


def _places(models: Sequence[str], out: str, overwrite: bool) -> dict[str, str]:
    """Return each model's name and the folder of its report; make room there or refuse."""
    names = [os.path.basename(storage.absolute(model)) for model in models]
    if len(set(names)) < len(names):
        raise UsageError(f"two models are named alike ({', '.join(names)}); rename a folder")
    places = {name: out if len(names) == 1 else storage.join(out, name) for name in names}
    for place in places.values():
        for name in ("metrics.json", "manifest.json", "scores"):
            if storage.exists(storage.join(place, name)) and not overwrite:
                raise UsageError(f"{place} holds {name}; choose another -o, or pass --overwrite")
        clear_scores(place)
    return places


def _bundle(model: str, out: str, data: str | None, session: Session) -> Bundle:
    """Open a bundle, or make one of a run, below the reports.

    Raises:
        BundleError: if it is a bundle of which a member cannot answer.
    """
    if not storage.exists(storage.join(model, "run.json")):
        bundle = Bundle(model)
        if bundle.unusable:  # before the test split is opened for it
            raise BundleError(" ".join(bundle.unusable.values()))
        return bundle
    place = storage.join(out, "bundles", os.path.basename(storage.absolute(model)))
    storage.remove_dir(place)
    run = Run(model)
    is_own = data is not None and Dataset(data).info.digest == run.info.dataset_digest
    build(place, [run], session, data=data if is_own else None)
    return Bundle(place)


def _common_space(bundles: dict[str, Bundle]) -> LabelSpace:
    spaces = {name: bundle.info.label_space for name, bundle in bundles.items()}
    first = next(iter(spaces))
    for name, space in spaces.items():
        if space != spaces[first]:
            raise UsageError(f"{name} knows other classes than {first}; evaluate them apart")
    return spaces[first]
