"""What all trials of a sweep share: their place in the cluster, and their records on disk.

A trial's folder is `trials/ID` below the sweep's, with its record and the validation predictions
of the trainings that it has finished.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import pyarrow as pa

from bt_core import storage
from bt_core.config import parse, with_values
from bt_core.data.catalog import Dataset
from bt_core.errors import ConfigError, UsageError
from bt_core.models.run import environment
from bt_core.training.sweep import Candidate, SweepSpec
from bt_core.training.trial import TrialRecord, reason_of

RECIPE_KEY: Final = "recipe"
"""Where a search puts the name of the recipe, beside the dotted keys of the space."""
_TRIALS, _RECORD, _PREDICTIONS = "trials", "record.json", "predictions.parquet"


@dataclass(frozen=True)
class Slots:
    """What trials hold: how many run at once, threads and GPUs of each, device."""

    max_concurrent: int
    cpus: int
    gpus: float
    device: str


@dataclass(frozen=True)
class Job:
    """What every trial needs besides its point; travels to the trial's process."""

    spec: SweepSpec
    candidates: list[Candidate]
    dataset: str
    views: dict[str, str]
    """Pixel digest to the view's folder name."""
    slots: Slots
    location: str


def plan_slots(
    spec: SweepSpec,
    num_cpus: float,
    num_gpus: float,
    largest_node: float,
    cpus_per_gpu: float | None = None,
) -> Slots:
    """Fit the trials into the cluster: never more threads than CPUs.

    Args:
        spec: the sweep.
        num_cpus: logical CPUs of the cluster.
        num_gpus: its GPUs.
        largest_node: logical CPUs of its largest node.
        cpus_per_gpu: on the node that has fewest for each of its GPUs; None means that there is
            one node.

    Raises:
        UsageError: if not even one trial fits.
    """
    if spec.cpus_per_trial > largest_node:
        raise UsageError(
            f"cpus_per_trial {spec.cpus_per_trial}: the largest node has {largest_node:g} CPUs"
        )
    gpus = min(num_gpus, 1.0) if spec.gpus_per_trial is None else spec.gpus_per_trial
    if gpus > num_gpus:
        raise UsageError(f"gpus_per_trial {gpus:g}: the cluster has {num_gpus:g}")
    if gpus and cpus_per_gpu is not None and spec.cpus_per_trial > max(1.0, gpus) * cpus_per_gpu:
        raise UsageError(
            f"cpus_per_trial {spec.cpus_per_trial}: nodes with GPUs have {cpus_per_gpu:g} for each"
        )
    fitting = int(num_cpus // spec.cpus_per_trial)
    if gpus:
        fitting = min(fitting, int(num_gpus / gpus + 1e-9))
    at_once = min(spec.max_concurrent or fitting, fitting)
    return Slots(max(1, at_once), spec.cpus_per_trial, gpus, "cuda" if gpus else "cpu")


def point_of(config: dict[str, Any], spec: SweepSpec) -> dict[str, Any]:
    """Return dotted key to plain value of what the search chose."""
    point: dict[str, Any] = {}
    for key, dimension in spec.space.items():
        value = config[key]
        if isinstance(value, str):
            point[key] = json.loads(value)
        else:
            point[key] = int(value) if dimension.int_range is not None else float(value)
    return point


def begin(config: dict[str, Any], job: Job, trial_id: str) -> TrialRecord:
    """Return the record of a trial; one whose settings clash has failed already."""
    candidate = next(c for c in job.candidates if c.name == config[RECIPE_KEY])
    point = point_of(config, job.spec)
    fields: dict[str, Any] = {
        "trial_id": trial_id,
        "point": point,
        "notes": candidate.notes,
        "num_folds": job.spec.folds,
        "seeds": list(job.spec.seeds),
        "metric": job.spec.metric,
        "dataset_digest": Dataset(job.dataset).info.digest,
        "device": job.slots.device,
        "num_threads": job.slots.cpus,
        "environment": environment() | {"initial_weights_sha256": candidate.started_from},
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        recipe = candidate.recipe(point)
    except ConfigError as error:
        content = with_values(candidate.content, point)
        reason = reason_of(error)
        return TrialRecord(**fields, recipe=content, view="", status="failed", reason=reason)
    view = job.views[recipe.preprocess.pixel_digest]
    return TrialRecord(**fields, recipe=recipe.model_dump(mode="json"), view=view)


def write_record(location: str, record: TrialRecord) -> None:
    """Write a trial's record into its folder below a sweep's."""
    where = storage.join(location, _TRIALS, record.trial_id, _RECORD)
    storage.write_json(where, record.model_dump(mode="json"))


def read_record(location: str, trial_id: str) -> TrialRecord | None:
    """Return a trial's record as far as it has come, or None if it has none yet."""
    where = storage.join(location, _TRIALS, trial_id, _RECORD)
    try:
        return parse(TrialRecord, storage.read_json(where), where)
    except FileNotFoundError:
        return None


def records_of(location: str) -> list[TrialRecord]:
    """Return the records of all trials that a sweep has started, by trial id."""
    names = storage.list_dirs(storage.join(location, _TRIALS))
    found = (read_record(location, name) for name in sorted(names))
    return [record for record in found if record is not None]


def drop_all_but(location: str, trial_ids: set[str]) -> None:
    """Remove the folders of all other trials."""
    folder = storage.join(location, _TRIALS)
    for name in set(storage.list_dirs(folder)) - trial_ids:
        storage.remove_dir(storage.join(folder, name))


def write_predictions(location: str, trial_id: str, table: pa.Table) -> None:
    """Write the validation predictions of the trainings that a trial has finished."""
    storage.write_table(storage.join(location, _TRIALS, trial_id, _PREDICTIONS), table)


def read_predictions(location: str, trial_id: str) -> pa.Table | None:
    """Return the validation predictions of a trial, or None if no training of it was finished."""
    try:
        return storage.read_table(storage.join(location, _TRIALS, trial_id, _PREDICTIONS))
    except FileNotFoundError:
        return None
