"""The folder of a report: figures for programs, pages and pictures for people.

::

    metrics.json          every figure, schema_version first
    report.html           the report, self-contained
    checklist.html        the seventeen points of `checklist`
    MODEL_CARD.md         of the bundle, with these figures
    predictions.parquet   every answer beside the truth
    explanations.parquet  the heat maps that are shown, and their figures
    inputs.json           the bundle's facts and what was tested: the report can be made again
    *.png                 the report's pictures
"""

from typing import Any, Final

import pyarrow as pa

from bt_core import storage
from bt_core.config import parse
from bt_core.data.page import render
from bt_core.errors import RunError, UsageError
from bt_core.evaluation import plots
from bt_core.evaluation.checklist import checklist
from bt_core.evaluation.evaluated import EvaluatedScans
from bt_core.evaluation.model_card import model_card
from bt_core.evaluation.predictions import SLICE_COLUMNS, Scans
from bt_core.evaluation.report import SCHEMA_VERSION
from bt_core.evaluation.reported import REPORTED
from bt_core.evaluation.sheets import KINDS, chosen_scans, map_figures, sheets
from bt_core.models.bundle import BundleInfo

_FILES: Final = frozenset(
    {"metrics.json", "inputs.json", "report.html", "checklist.html", "MODEL_CARD.md",
     "predictions.parquet", "explanations.parquet"}
)  # fmt: skip
_READABLE: Final = (1, SCHEMA_VERSION)
"""Versions of metrics.json: what a report is made again from is alike in these."""
_PICTURES: Final = frozenset(
    {"confusion", "classes", "curves", "calibration", "deferral", "decision", "robustness",
     "embedding", "training", "sheet"}
)  # fmt: skip
"""First words of the names of pictures."""


def write_report(
    location: str,
    predictions: pa.Table,
    explained: pa.Table | None,
    figures: dict[str, Any],
    bundle: BundleInfo,
    tested: EvaluatedScans,
) -> None:
    """Write a report's folder; metrics.json comes last.

    Args:
        location: the folder.
        predictions: see `predictions.join_truth`.
        explained: rows of `explainer.SCHEMA` of `sheets.chosen_scans`; None draws no maps.
        figures: of `evaluate`, with `robustness` if that was measured; gains `explanations`.
        bundle: what was evaluated.
        tested: on what.

    Raises:
        RunError: if there are no clean figures; a report without them would mislead.
    """
    refuse_without_clean(figures)
    space = bundle.label_space
    scans = Scans.of(predictions, space)
    clean = scans.where(scans.clean_N)
    chosen = chosen_scans(clean, space)
    figures["explanations"] = None
    if explained is not None:
        sample = set(chosen["sample"])
        rows = [row for row in explained.to_pylist() if row["scan_id"] in sample]
        figures["explanations"] = map_figures(rows)
    pictures = _pictures(predictions, explained, figures, bundle, clean, chosen)
    provenance = {
        "bundle_id": bundle.bundle_id,
        "dataset_digest": tested.digest,
        "same_dataset_as_training": tested.digest == bundle.provenance.get("dataset_digest"),
        "num_test_openings": tested.num_openings,
        "run_id": tested.run_id,
    }
    files = _rendered(figures, bundle, tested, provenance, pictures)
    files |= {f"{name}.png": png for name, png in pictures.items()}
    files["MODEL_CARD.md"] = model_card(bundle, figures, tested).encode()
    if storage.exists(storage.join(location, "metrics.json")):
        _clear(location)
    for name, content in files.items():
        storage.write_bytes(storage.join(location, name), content)
    answers = storage.with_run_id(predictions, tested.run_id)
    storage.write_table(storage.join(location, "predictions.parquet"), answers)
    if explained is not None:
        maps = _without_hidden_pictures(explained, {i for kind in KINDS for i in chosen[kind]})
        storage.write_table(storage.join(location, "explanations.parquet"), maps)
    inputs = {"bundle": bundle.model_dump(mode="json"), "tested": tested.model_dump(mode="json")}
    storage.write_json(storage.join(location, "inputs.json"), inputs)
    storage.write_json(storage.join(location, "metrics.json"), {**figures, **provenance})


def _rendered(
    figures: dict[str, Any],
    bundle: BundleInfo,
    tested: EvaluatedScans,
    provenance: dict[str, Any],
    pictures: dict[str, bytes],
) -> dict[str, bytes]:
    """Return the pages by their names."""
    points = checklist(figures, bundle, tested)
    return {
        name: render(
            "bt_core.evaluation",
            f"{name}.j2",
            figures=figures,
            bundle=bundle,
            tested=tested,
            provenance=provenance,
            names=bundle.label_space.names,
            pictures=pictures,
            sheet_titles=KINDS,
            column_titles=SLICE_COLUMNS,
            reported=[row for row in REPORTED if row[1] == bundle.label_space.task],
            points=points,
        )
        for name in ("report.html", "checklist.html")
    }


def refuse_without_clean(figures: dict[str, Any]) -> None:
    """Raise RunError if no scan is left that was not trained on: there is no honest figure."""
    if figures["clean"] is None:
        raise RunError(
            "every test scan, or a copy, was trained on, so nothing can be said about new ones; "
            "evaluate on the dataset that the bundle was trained with, or on other scans"
        )


def _clear(location: str) -> None:
    """Remove what an earlier report left, so that nothing of it is taken for the next one's."""
    for name in storage.list_files(location):
        own = name.endswith(".png") and name.removesuffix(".png").split("_")[0] in _PICTURES
        if name in _FILES or own:
            storage.remove_file(storage.join(location, name))


def read_report(
    location: str,
) -> tuple[pa.Table, pa.Table | None, dict[str, Any], BundleInfo, EvaluatedScans]:
    """Return what `write_report` was given; the figures are those of metrics.json.

    Raises:
        UsageError: if the folder is not a report.
    """
    try:
        figures = storage.read_json(storage.join(location, "metrics.json"))
        if figures.get("schema_version") not in _READABLE:
            raise UsageError(
                f"{location} was written by another version of bt (schema "
                f"{figures.get('schema_version')}, not {SCHEMA_VERSION}); give bt evaluate again"
            )
        inputs = storage.read_json(storage.join(location, "inputs.json"))
        predictions = storage.read_table(storage.join(location, "predictions.parquet"))
    except FileNotFoundError as error:
        raise UsageError(
            f"{location} is not a report (metrics.json, inputs.json and predictions.parquet); give "
            "the -o of a bt evaluate"
        ) from error
    maps = storage.join(location, "explanations.parquet")
    return (
        predictions,
        storage.read_table(maps) if storage.exists(maps) else None,
        figures,
        parse(BundleInfo, inputs["bundle"], f"{location}/inputs.json"),
        parse(EvaluatedScans, inputs["tested"], f"{location}/inputs.json"),
    )


def _without_hidden_pictures(explained: pa.Table, shown: set[str]) -> pa.Table:
    """Keep the pictures of the scans on the sheets alone; those by chance gave figures only."""
    for name in ("image", "heat"):
        values = [row[name] if row["scan_id"] in shown else None for row in explained.to_pylist()]
        place = explained.schema.get_field_index(name)
        explained = explained.set_column(place, name, pa.array(values, pa.binary()))
    return explained


def _pictures(
    predictions: pa.Table,
    explained: pa.Table | None,
    figures: dict[str, Any],
    bundle: BundleInfo,
    clean: Scans,
    chosen: dict[str, list[str]],
) -> dict[str, bytes]:
    space = bundle.label_space
    pictures = plots.report_pictures(figures, clean, space)
    pictures |= plots.embedding_pictures(predictions, clean, space)
    for name, member in bundle.provenance.get("members", {}).items():
        if member.get("history"):
            pictures[f"training_{name}"] = plots.training_curves_png(member["history"])
    if explained is not None:
        labels = zip(clean.scan_id, clean.labels_N, strict=True)
        pictures |= sheets(explained, chosen, {str(i): space.names[k] for i, k in labels})
    return pictures
