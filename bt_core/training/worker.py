"""One Ray Train worker: gives the engine its shards, its peers and its checkpoints."""

import errno
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.train
import ray.train.torch
import torch
import torch.distributed
from pyarrow import fs
from ray.train import Checkpoint
from ray.util.metrics import Counter
from torch import nn

from bt_core import storage
from bt_core.config import parse
from bt_core.errors import RunError
from bt_core.models.classifier import Classifier, build_classifier
from bt_core.models.inputs import Preprocessor
from bt_core.telemetry import EPOCHS, WorkClock, exported
from bt_core.training.engine import (
    Batch,
    Predictions,
    fit,
    validation_batch_size,
    worker_batch_size,
)
from bt_core.training.learner import DivergedError
from bt_core.training.recipe import Recipe
from bt_core.training.stages import has_idle_weights

STATE_FILE, PREDICTIONS_FILE = "state.pt", "validation.parquet"
PARTIAL_PREFIX: Final = ".partial_"
"""Begins the name of a checkpoint that is being written."""
_SHUFFLE_ROWS: Final = 4096
_SPARE_BYTES: Final = 1024**2
"""What a checkpoint must leave free: Ray rewrites its list of checkpoints in place afterwards,
which a disk that is full to the last byte would cut short."""


class RayContext:
    """`TrainContext` inside a Ray Train worker.

    Args:
        history: file that rank 0 writes the figures of all epochs to, as JSON lines.
        num_scans: number of training scans.
        batch_size: scans per step over all workers.
        seed: of the order of the scans.
        image_shape: channels, height and width of the model's input.
    """

    def __init__(
        self,
        history: str,
        num_scans: int,
        batch_size: int,
        seed: int,
        image_shape: tuple[int, int, int],
    ) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()
        self._batch_size = worker_batch_size(num_scans, batch_size, self.world_size)
        self._seed = seed
        self._history = history
        self._image_shape = image_shape
        self._clock = WorkClock("bt_train")
        self._scans = exported(Counter, "bt_train_scans_total", "Scans that were trained on.")
        self._epochs = exported(Counter, EPOCHS, "Epochs that were trained.")

    def train_batches(self, epoch: int) -> Iterator[Batch]:
        """Stream this worker's shard; a buffer shuffles rows that are stored in random order."""
        shard = ray.train.get_dataset_shard("train")
        self._clock.asks()
        for batch in shard.iter_batches(
            batch_size=self._batch_size,
            batch_format="numpy",
            drop_last=True,
            prefetch_batches=4,
            local_shuffle_buffer_size=_SHUFFLE_ROWS,
            local_shuffle_seed=self._seed * 1_009 + epoch,
        ):
            self._clock.begins()
            try:
                yield Batch(scan_id=batch["scan_id"], pixels=batch["pixels"], label=batch["label"])
            finally:  # an epoch leaves after its last one
                self._clock.ends()
                self._scans.inc(len(batch["label"]))

    def validation_batches(self) -> Iterator[Batch]:
        """Stream all validation rows and keep those whose id falls to this worker."""
        shard = ray.train.get_dataset_shard("validation")
        size = validation_batch_size(self._batch_size, self.device)
        for batch in shard.iter_batches(batch_size=size, batch_format="numpy"):
            mine = np.array([_owner(i, self.world_size) == self.rank for i in batch["scan_id"]])
            if mine.any():
                yield Batch(
                    scan_id=batch["scan_id"][mine],
                    pixels=batch["pixels"][mine],
                    label=batch["label"][mine],
                )

    def wrap(self, model: Classifier) -> nn.Module:
        """Move the model to the device and, with several workers, into DDP."""
        idle = self.world_size > 1 and has_idle_weights(model, self._image_shape)
        wrapped: nn.Module = ray.train.torch.prepare_model(
            model, parallel_strategy_kwargs={"find_unused_parameters": idle}
        )
        return wrapped

    def gather(self, own: Predictions) -> Predictions:
        """Collect every worker's predictions."""
        if self.world_size == 1:
            return own
        parts: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(parts, own)
        everyone = Predictions()
        for part in parts:
            everyone.scan_id += part.scan_id
            everyone.label += part.label
            everyone.logits += part.logits
        return everyone

    def sync(self, model: Classifier) -> None:
        """Broadcast rank 0's buffers: each worker's batch norms have seen other batches."""
        if self.world_size > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def mean(self, value: float) -> float:
        """Average over the workers."""
        if self.world_size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        if self.device.type == "cuda":  # NCCL reduces on the device only
            total = total.to(self.device)
        torch.distributed.all_reduce(total)
        mean: float = total.item() / self.world_size
        return mean

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Write the run's history file, on rank 0."""
        if self.rank == 0:
            lines = "".join(json.dumps(figures) + "\n" for figures in history)
            with _explained_storage(self._history):
                storage.write_bytes(self._history, lines.encode())

    def restore(self) -> dict[str, Any] | None:
        """Load the last checkpoint that Ray Train has committed."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            state: dict[str, Any] = torch.load(
                os.path.join(folder, STATE_FILE), weights_only=True, map_location=self.device
            )
        return state

    def report(
        self, metrics: dict[str, Any], state: dict[str, Any], predictions: Predictions
    ) -> None:
        """Report to Ray Train; rank 0 adds the checkpoint."""
        with tempfile.TemporaryDirectory() as folder, _explained_storage(self._history):
            checkpoint = None
            if self.rank == 0:
                torch.save(state, os.path.join(folder, STATE_FILE))
                pq.write_table(pa.table(vars(predictions)), os.path.join(folder, PREDICTIONS_FILE))
                checkpoint = Checkpoint.from_directory(folder)
            if self.rank == 0:
                self._epochs.inc()
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_upload_fn=_store_checkpoint)


def _store_checkpoint(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """Copy a checkpoint beside its place and rename it: no folder ever holds half of one."""
    store = ray.train.get_context().get_storage()
    files, target = store.storage_filesystem, f"{store.experiment_fs_path}/{name}"
    local = isinstance(files, fs.LocalFileSystem)
    beside = f"{store.experiment_fs_path}/{PARTIAL_PREFIX}{name}" if local else target
    try:
        files.create_dir(beside, recursive=True)
        fs.copy_files(checkpoint.path, beside, fs.LocalFileSystem(), files)
        if local and shutil.disk_usage(beside).free < _SPARE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        files.delete_dir(beside)
        raise
    if local:  # a store of objects has no folders to rename, and no halves of objects
        files.move(beside, target)
    return Checkpoint(target, files)


@contextmanager
def _explained_storage(history: str) -> Iterator[None]:
    """Raise RunError with what to do where the run folder cannot be written."""
    try:
        yield
    except OSError as error:
        folder = storage.redact(os.path.dirname(history))
        raise RunError(
            f"{folder} or the temporary folder {tempfile.gettempdir()} cannot be written "
            f"({' '.join(str(error).split())}); the last checkpoint is whole: make room, and the "
            "same command goes on after it"
        ) from error


def train_loop(config: dict[str, Any]) -> str | None:
    """Run on every worker; return why a run ended that would end again if it were repeated.

    Args:
        config: `recipe` (JSON form), `history` (file), `num_classes`, `class_counts`.
    """
    context = ray.train.get_context()
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // context.get_local_world_size()))
    recipe = parse(Recipe, config["recipe"], "recipe")
    torch.manual_seed(recipe.train.seed)
    model, _, preprocess = build_classifier(recipe.model, recipe.preprocess, config["num_classes"])
    counts, train, side = config["class_counts"], recipe.train, preprocess.size_px
    shape = (preprocess.channels, side, side)
    place = RayContext(config["history"], sum(counts), train.batch_size, train.seed, shape)
    try:
        fit(place, model, recipe, Preprocessor(preprocess), counts)
    except RunError as error:
        if place.world_size > 1 and not isinstance(error, DivergedError):
            raise  # the others may wait for this one; only its failure ends them
        return str(error)
    return None


def _owner(scan_id: str, world_size: int) -> int:
    return zlib.crc32(scan_id.encode()) % world_size
