"""The folder of a run: what marks it as begun, and what a finished one holds."""

import os
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import safetensors.torch
import torch

from bt_core import storage
from bt_core.data.catalog import Dataset, groups_of
from bt_core.errors import UsageError
from bt_core.log import run_id
from bt_core.models.classifier import build_classifier
from bt_core.models.inputs import Preprocessor
from bt_core.models.run import Run, RunInfo, environment
from bt_core.models.weights import initial_sha256
from bt_core.training.recipe import Recipe
from bt_core.training.worker import PARTIAL_PREFIX, PREDICTIONS_FILE, STATE_FILE

_MARKER: Final = "started.json"


@dataclass(frozen=True)
class Scaling:
    """Where a run trains: number of workers, `cuda` or `cpu`, and logical CPUs of each worker."""

    num_workers: int
    device: str
    cpus_per_worker: float


def as_begun(location: str, device: str, num_workers: int | None) -> tuple[str, int | None]:
    """Return device and workers, where they are left open those of a run that is to go on.

    So a run goes on, or says what it lacks, when the cluster has other GPUs than at its start.

    Args:
        location: the run folder.
        device: `auto` leaves it open.
        num_workers: None leaves it open.
    """
    marker = storage.join(storage.absolute(location), _MARKER)
    begun = storage.read_json(marker) if storage.exists(marker) else {}
    if device == "auto":
        device = begun.get("device", device)
    return device, num_workers or begun.get("num_workers")


def claim(location: str, recipe: Recipe, dataset: Dataset, scaling: Scaling) -> list[str]:
    """Mark a folder as this run's, or go on in it if it was started with equal settings.

    Returns:
        The ids of the commands that have worked on it, this one last.

    Raises:
        UsageError: if it holds a finished run, or an unfinished one with other settings.
    """
    if storage.exists(storage.join(location, "run.json")):
        raise UsageError(f"{location} holds a finished run; choose another -o or pass --overwrite")
    marker = storage.join(location, _MARKER)
    wanted = {
        "recipe_digest": recipe.digest,
        "dataset_digest": dataset.info.digest,
        "num_workers": scaling.num_workers,  # decides the steps of the schedule
    }
    begun: dict[str, Any] = storage.read_json(marker) if storage.exists(marker) else wanted
    if {name: begun[name] for name in wanted} != wanted:
        raise UsageError(
            f"{location} holds an unfinished run with other settings, data or workers; finish it "
            "with those, or pass --overwrite or another -o"
        )
    checkpoints = storage.join(location, "checkpoints")
    for name in storage.list_dirs(checkpoints):  # of a worker that was killed while it wrote
        if name.startswith(PARTIAL_PREFIX):
            storage.remove_dir(storage.join(checkpoints, name))
    run_ids = [*begun.get("run_ids", ()), run_id()]
    storage.write_json(marker, {**wanted, "device": scaling.device, "run_ids": run_ids})
    return run_ids


def finish(
    location: str,
    recipe: Recipe,
    dataset: Dataset,
    scaling: Scaling,
    best: tuple[Any, dict[str, Any]],
    seconds: float,
    run_ids: list[str],
) -> Run:
    """Turn the best checkpoint into a finished run, which its last file, `run.json`, marks.

    Args:
        location: the run folder, as of `claim`.
        recipe: the settings.
        dataset: that it was trained on.
        scaling: workers and device.
        best: the checkpoint of Ray Train, with its figures.
        seconds: that the training took.
        run_ids: as `claim` returned them.
    """
    checkpoint, metrics = best
    space = dataset.info.label_space
    model, model_spec, preprocess = build_classifier(
        recipe.model, recipe.preprocess, space.num_classes
    )
    started_from = initial_sha256(model.backbone, recipe.model.weights_source)
    with checkpoint.as_directory() as folder:
        state = torch.load(os.path.join(folder, STATE_FILE), weights_only=True, map_location="cpu")
        predictions = storage.read_table(os.path.join(folder, PREDICTIONS_FILE))
    model.load_state_dict(state["model"])
    info = RunInfo(
        name=os.path.basename(location),
        recipe=recipe.model_dump(mode="json"),
        recipe_digest=recipe.digest,
        label_space=space,
        model=model_spec,
        preprocess=preprocess,
        golden_digest=Preprocessor(preprocess).golden_digest,
        dataset=dataset.location,
        dataset_digest=dataset.info.digest,
        kept_epoch=int(metrics["epoch"]),
        metrics={k: float(v) for k, v in metrics.items() if k.startswith("val_")},
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_workers=scaling.num_workers,
        device=scaling.device,
        seconds=round(seconds, 1),
        environment=environment() | {"initial_weights_sha256": started_from},
        run_ids=tuple(run_ids),
    )
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    seen = dataset.catalog()  # validation scans as well: they chose the epoch, and will calibrate
    seen = seen.filter(pc.not_equal(seen["split"], ""))
    digests = pa.table({"pixel_sha256": seen["pixel_sha256"].unique()})
    storage.write_json(storage.join(location, "recipe.json"), info.recipe)
    storage.write_table(
        storage.join(location, "validation.parquet"), _fit_to_calibrate(predictions, dataset)
    )
    storage.write_table(storage.join(location, "training_scans.parquet"), digests)
    storage.write_bytes(
        storage.join(location, "model.safetensors"), safetensors.torch.save(tensors)
    )
    storage.write_json(storage.join(location, "run.json"), info.model_dump(mode="json"))
    return Run(location)


def _fit_to_calibrate(predictions: pa.Table, dataset: Dataset) -> pa.Table:
    """Return the validation scans of families that trained nothing, each with its family.

    Only a given split has others; where it has no such scan at all, they stay.
    """
    known = dataset.split("validation")
    clean = known.filter(pc.invert(known["copy_in_training"]))
    if clean.num_rows:
        is_clean = pc.is_in(predictions["scan_id"], clean["scan_id"].combine_chunks())
        predictions = predictions.filter(is_clean)
    group_of = groups_of(known)
    groups = [group_of[scan_id] for scan_id in predictions["scan_id"].to_pylist()]
    return predictions.append_column("group", pa.array(groups, pa.string()))
