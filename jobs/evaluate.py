"""`bt evaluate`: bundles or runs on test scans, or on an archive, become figures and reports."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from bt_core import storage
from bt_core.errors import EXIT_FAILED, EXIT_INCOMPLETE, EXIT_OK, BundleError, UsageError
from jobs.command import (
    DeviceOption,
    OutOption,
    OverwriteOption,
    PrevalenceOption,
    RequireOption,
    all_met,
    class_shares,
    output_folder,
)
from jobs.compare import print_comparison
from jobs.ensemble import build
from jobs.evaluate_model import ModelEvaluation
from jobs.score import clear_scores

if TYPE_CHECKING:
    import pyarrow as pa

    from bt_core.evaluation.evaluated import EvaluatedScans
    from bt_core.labels import LabelSpace
    from bt_core.models.bundle import Bundle


def run(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Bundle folders, or folders of finished runs."),
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="DIR|SOURCE",
            help="Dataset folder that bt prepare wrote, or a labelled folder, archive or list for "
            "external validation.",
        ),
    ],
    out: OutOption = "report",
    device: DeviceOption = "auto",
    prevalence: PrevalenceOption = None,
    trained_on: Annotated[
        str | None,
        typer.Option(
            "--trained-on",
            metavar="DIR",
            help="For external validation: the dataset that the models were trained with, to find "
            "mirrored, turned and re-encoded copies of its scans.",
        ),
    ] = None,
    depth: Annotated[
        bool,
        typer.Option(
            "--depth/--no-depth",
            help="Draw heat maps, answer some scans again with noise, blur and the like, and probe "
            "for shortcuts.",
        ),
    ] = True,
    require: RequireOption = None,
    overwrite: OverwriteOption = False,
) -> int:
    """Score test scans; write report.html, metrics.json, predictions.parquet and pictures.

    Several models get a folder each, and are compared. A run is calibrated into a bundle first.
    Exit code 3 says that some scans got no answer, or that the source is cut short; 1, that a
    requirement is not met.
    """
    from bt_core.evaluation.comparison import compare
    from bt_core.evaluation.requirements import Requirement
    from cluster.session import session

    requirements = [Requirement.parse(text) for text in require or []]
    is_dataset = storage.exists(storage.join(data, "dataset.json"))
    if is_dataset and trained_on:
        raise UsageError("--trained-on is for a source; give the one that DIR was prepared from")
    out = storage.absolute(out) if is_dataset else output_folder(out, data)
    places = _places(models, out, overwrite)
    own = data if is_dataset else None
    bundles = {name: _bundle(model, out, own) for name, model in zip(places, models, strict=True)}
    space = _common_space(bundles)
    for requirement in requirements:  # a typo must not cost an opening of the test split
        requirement.refuse_unknown(space.names, space.healthy)
    shares = class_shares(prevalence, space.names) if prevalence else None
    all_figures, scans, is_whole = {}, {}, True
    with session():
        for name, (truth, tested) in _truths(data, bundles, space, is_dataset, trained_on).items():
            one = ModelEvaluation(bundles[name], truth, tested, places[name], device, shares, depth)
            all_figures[name], scans[name] = one.run()
            print(f"report in {storage.join(places[name], 'report.html')}")
            whole = all_figures[name]["all"]["num_scans"] == truth.num_rows
            is_whole = is_whole and whole and tested.is_whole
    if len(scans) > 1:
        comparison = compare(scans, space)
        print_comparison(comparison)
        storage.write_json(storage.join(out, "comparison.json"), comparison)
    met = []
    for name, figures in all_figures.items():
        if requirements and len(all_figures) > 1:
            print(f"{name}:")
        met.append(all_met(requirements, figures))
    if not all(met):
        return EXIT_FAILED
    return EXIT_OK if is_whole else EXIT_INCOMPLETE


def _places(models: list[str], out: str, overwrite: bool) -> dict[str, str]:
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


def _bundle(model: str, out: str, data: str | None) -> "Bundle":
    """Open a bundle, or make one of a run, below the reports.

    Raises:
        BundleError: if it is a bundle of which a member cannot answer.
    """
    from bt_core.data.catalog import Dataset
    from bt_core.models.bundle import Bundle
    from bt_core.models.run import Run

    if not storage.exists(storage.join(model, "run.json")):
        bundle = Bundle(model)
        if bundle.unusable:  # before the test split is opened for it
            raise BundleError(" ".join(bundle.unusable.values()))
        return bundle
    place = storage.join(out, "bundles", os.path.basename(storage.absolute(model)))
    storage.remove_dir(place)
    run = Run(model)
    is_own = data is not None and Dataset(data).info.digest == run.info.dataset_digest
    build(place, [run], data=data if is_own else None)
    return Bundle(place)


def _common_space(bundles: dict[str, "Bundle"]) -> "LabelSpace":
    spaces = {name: bundle.info.label_space for name, bundle in bundles.items()}
    first = next(iter(spaces))
    for name, space in spaces.items():
        if space != spaces[first]:
            raise UsageError(f"{name} knows other classes than {first}; evaluate them apart")
    return spaces[first]


def _truths(
    data: str,
    bundles: dict[str, "Bundle"],
    space: "LabelSpace",
    is_dataset: bool,
    trained_on: str | None,
) -> dict[str, tuple["pa.Table", "EvaluatedScans"]]:
    """Return for each model the catalog rows that it is evaluated on, and what they are."""
    from bt_core.data.catalog import Dataset
    from bt_core.evaluation.evaluated import of_dataset, of_source
    from bt_core.models.bundle import COPIES_FILE
    from bt_core.scans.identity import hash_key

    if not is_dataset:
        trained = Dataset(trained_on) if trained_on else None
        for name, bundle in bundles.items():
            digest = bundle.info.provenance.get("dataset_digest")
            if trained is not None and trained.info.digest != digest:
                raise UsageError(f"{name} was not trained with the dataset in {trained_on}")
        truth, tested = of_source(data, space, hash_key()[0], trained)
        return {
            name: (
                truth,
                tested.model_copy(
                    update={"copies_found": tested.copies_found or COPIES_FILE in bundle.info.files}
                ),
            )
            for name, bundle in bundles.items()
        }
    dataset = Dataset(data)
    if dataset.info.label_space != space:
        raise UsageError(
            f"the model knows {', '.join(space.names)}; the dataset holds "
            f"{', '.join(dataset.info.label_space.names)}"
        )
    return {
        name: of_dataset(
            dataset, bundle.info.bundle_id, str(bundle.info.provenance.get("dataset_digest"))
        )
        for name, bundle in bundles.items()
    }


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("evaluate")
