"""Starts Ray Train on a prepared dataset, and follows it."""

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import ray.train
from ray.data import ExecutionOptions
from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from bt_core import storage
from bt_core.data.catalog import Dataset
from bt_core.data.views import ensure_view, read_view
from bt_core.errors import DatasetError, RunError, UsageError, last_line
from bt_core.log import logger
from bt_core.models.classifier import build_classifier
from bt_core.models.run import HISTORY_FILE, Run, read_history
from bt_core.training.cpu import WORKER_ENV
from bt_core.training.engine import KEPT, progress_line
from bt_core.training.process_group import NodeAddressConfig
from bt_core.training.recipe import Recipe
from bt_core.training.run_folder import Scaling, claim, finish
from bt_core.training.stages import check_stages
from bt_core.training.tracking import Tracker
from bt_core.training.worker import train_loop

MAX_FAILURES: Final = 3
"""Lost workers that a run survives; the default of Ray is none."""
MAX_PREEMPTIONS: Final = 10
"""Spot nodes taken away that a run survives; the default of Ray is no limit."""

_LOOK_SECONDS: Final = 1.0
_STORE_LOOK_SECONDS: Final = 10.0
"""Of a history behind a URI, where each look takes two requests."""


def plan_scaling(
    num_workers: int | None,
    device: str,
    num_cpus: float,
    num_gpus: float,
    room: float | None = None,
) -> Scaling:
    """Fit the workers into the cluster; Ray Data keeps one whole CPU, or both would hang.

    Args:
        num_workers: None takes one per GPU, or one on CPUs.
        device: `cuda` or `cpu`.
        num_cpus: logical CPUs of the cluster.
        num_gpus: GPUs of the cluster.
        room: logical CPUs that a worker can hold at most, of the largest node or, with a GPU, of
            the GPU's share of its node; None means that there is one node.

    Raises:
        UsageError: if more workers are asked for than the cluster holds.
    """
    limit = num_gpus if device == "cuda" else num_cpus
    workers = num_workers or (int(num_gpus) if device == "cuda" else 1)
    if workers > limit:
        unit = "GPUs" if device == "cuda" else "CPUs"
        raise UsageError(f"--num-workers {workers}: the cluster has {limit:g} {unit}")
    spare = max(num_cpus - 1.0, num_cpus / 2)
    each = min(spare / workers, 4.0, room or num_cpus)
    return Scaling(workers, device, math.floor(each * 1000) / 1000)


def train(
    recipe: Recipe,
    dataset: Dataset,
    location: str,
    scaling: Scaling,
    trackers: Sequence[Tracker] = (),
) -> Run:
    """Train one classifier, or go on with a run that was stopped.

    Args:
        recipe: the settings.
        dataset: prepared scans; the view that the recipe needs is written if it is not there.
        location: the run folder. Shared storage when the cluster has several nodes.
        scaling: workers and device.
        trackers: get the figures of each epoch, from the first, also of a run that goes on.

    Returns:
        The finished run.

    Raises:
        UsageError: if the folder holds a finished run, or an unfinished one with other settings.
        DatasetError: if the dataset's label space is not the recipe's task.
        RunError: if training diverged, memory or disk did not suffice, or the workers failed more
            than `MAX_FAILURES` times.
    """
    location = storage.absolute(location)
    run_ids = claim(location, recipe, dataset, scaling)
    view = ensure_view(dataset, recipe.preprocess)
    started = time.perf_counter()
    trainer = _trainer(recipe, dataset, view, location, scaling)
    try:
        with _progress_shown(location, recipe.train.epochs, trackers):
            result = trainer.fit()
    except SystemExit as stop:  # Ray Train's own handler of Ctrl-C ends this way
        raise KeyboardInterrupt from stop
    except ray.train.TrainingFailedError as error:
        raise RunError(f"training failed: {_root_cause(error)}") from error
    if result.return_value:
        raise RunError(result.return_value)
    checkpoint, metrics = max(result.best_checkpoints, key=lambda pair: float(pair[1][KEPT]))
    seconds = time.perf_counter() - started
    return finish(location, recipe, dataset, scaling, (checkpoint, metrics), seconds, run_ids)


def check_settings(recipe: Recipe, dataset: Dataset) -> None:
    """Raise before any work starts if a run could not even begin.

    Raises:
        DatasetError: if the label spaces differ.
        ConfigError: if the backbone does not exist, or a stage trains more of it than there is.
        WeightsError: if the initial weights cannot be had.
    """
    if dataset.info.label_space.task != recipe.task:
        raise DatasetError(
            f"{dataset.location} is a {dataset.info.label_space.task} dataset, the recipe's is "
            f"{recipe.task}; pass --set task={dataset.info.label_space.task}, or prepare again"
        )
    space = dataset.info.label_space
    model, _, _ = build_classifier(recipe.model, recipe.preprocess, space.num_classes)
    check_stages(model, recipe.train)


def _trainer(
    recipe: Recipe, dataset: Dataset, view: str, location: str, scaling: Scaling
) -> TorchTrainer:
    space, counts = dataset.info.label_space, dataset.info.counts["train"]
    gpu = {"GPU": 1} if scaling.device == "cuda" else {}
    reading = ExecutionOptions(preserve_order=True)  # equal runs see equal batches
    filesystem, path = storage.filesystem(location)
    return TorchTrainer(
        train_loop,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "history": storage.join(location, HISTORY_FILE),
            "num_classes": space.num_classes,
            "class_counts": [counts[name] for name in space.names],
        },
        torch_config=NodeAddressConfig(),
        datasets={split: read_view(view, split) for split in ("train", "validation")},
        dataset_config=DataConfig(datasets_to_split=["train"], execution_options=reading),
        scaling_config=ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=bool(gpu),
            resources_per_worker={"CPU": scaling.cpus_per_worker, **gpu},
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=path,
            storage_filesystem=filesystem,
            worker_runtime_env={"env_vars": WORKER_ENV},
            failure_config=FailureConfig(
                max_failures=MAX_FAILURES,
                controller_failure_limit=MAX_FAILURES,
                max_preemption_failures=MAX_PREEMPTIONS,
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute=KEPT),
        ),
    )


@contextmanager
def _progress_shown(location: str, epochs: int, trackers: Sequence[Tracker]) -> Iterator[None]:
    """Log one line per epoch while the block runs, as rank 0 adds it to the run's history."""
    ended = threading.Event()
    shown = max((figures["epoch"] for figures in read_history(location)), default=0)
    if shown:
        logger.info("going on after epoch %d/%d", shown, epochs)

    def follow() -> None:
        last, over = 0, False
        while not over:
            over = ended.wait(_STORE_LOOK_SECONDS if storage.is_uri(location) else _LOOK_SECONDS)
            try:
                history = read_history(location)
            except OSError:  # a store that does not answer now; the next look may do better
                continue
            for figures in history:
                if figures["epoch"] <= last:
                    continue
                last = figures["epoch"]
                if last > shown:
                    logger.info(progress_line(figures, epochs))
                for tracker in trackers:
                    tracker.epoch(figures)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()


def _root_cause(error: BaseException) -> str:
    """Return the last line, which names it, of the first error that a worker raised."""
    failures = getattr(error, "worker_failures", None)
    inner = next(iter(failures.values())) if failures else error
    if "running low on memory" in str(inner):  # so Ray says that it ended the worker
        return (
            "a node ran low on memory and a worker was ended; lower train.batch_size and raise "
            "train.accumulation_steps by the same factor, or use fewer workers"
        )
    return last_line(inner)
