"""Trains one recipe on folds in this process, without Ray Train: what a trial of a sweep does.

Shape suffixes: B batch, S side, N scans, K classes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from bt_core import storage
from bt_core.data.catalog import Dataset
from bt_core.data.seal import refuse_test
from bt_core.data.splits import SPLITS, grouped_folds
from bt_core.errors import DatasetError
from bt_core.models.classifier import Classifier, build_classifier
from bt_core.models.inputs import Preprocessor
from bt_core.training.engine import (
    KEPT,
    Batch,
    Predictions,
    fit,
    validation_batch_size,
    worker_batch_size,
)
from bt_core.training.recipe import Recipe

_NO_FOLD = -1


@dataclass(frozen=True)
class FoldRows:
    """The train and validation scans of a dataset, sorted by scan_id.

    Attributes:
        scan_id: N ids.
        label_N: class indices.
        fold_N: the fold that validates on a scan; -1 where none does.
        pixels_NSS: uint8.
        num_classes: K.
    """

    scan_id: list[str]
    label_N: np.ndarray
    fold_N: np.ndarray
    pixels_NSS: np.ndarray
    num_classes: int


def fold_of_scans(dataset: Dataset, num_folds: int) -> dict[str, int]:
    """Return the fold of every scan of train and validation, whole groups at a time.

    Args:
        dataset: prepared scans; its test split is not read.
        num_folds: as many as the dataset's plan has are the folds in its catalog. With 1, the only
            fold is the validation split, without scans that have a copy in training; what trains
            has -1.

    Raises:
        DatasetError: if some fold has no scan.
    """
    columns = ["scan_id", "label", "group", "split", "copy_in_training"]
    rows = [row for row in dataset.catalog().select(columns).to_pylist() if row["split"]]
    if num_folds == 1:
        validates = [r["split"] == "validation" and not r["copy_in_training"] for r in rows]
        rows = [r for r, own in zip(rows, validates, strict=True) if own or r["split"] == "train"]
        folds = [0 if row["split"] == "validation" else _NO_FOLD for row in rows]
    else:
        groups, labels = [row["group"] for row in rows], [row["label"] for row in rows]
        folds = grouped_folds(groups, labels, num_folds, dataset.info.plan.seed)
    missing = set(range(num_folds)) - set(folds)
    if missing:
        raise DatasetError(f"too few scans for {num_folds} folds; fold {min(missing)} is empty")
    return {row["scan_id"]: fold for row, fold in zip(rows, folds, strict=True)}


def load_rows(dataset: Dataset, view: str, num_folds: int) -> FoldRows:
    """Read a view's train and validation pixels into memory and give each scan its fold.

    Raises:
        DatasetError: if the view does not hold the catalog's scans.
    """
    fold_of = fold_of_scans(dataset, num_folds)
    tables = [_read_shards(view, split) for split in SPLITS[:2]]
    ids = [str(i) for table in tables for i in table["scan_id"].to_pylist()]
    labels_N = np.array([label for table in tables for label in table["label"].to_pylist()])
    side = int(storage.read_json(storage.join(view, "view.json"))["preprocess"]["size_px"])
    pixels_NSS = np.concatenate([_pixels(table, side) for table in tables])
    order = [i for i in sorted(range(len(ids)), key=ids.__getitem__) if ids[i] in fold_of]
    if len(order) != len(fold_of):
        raise DatasetError(f"{view} does not hold the scans of the catalog; remove it")
    return FoldRows(
        scan_id=[ids[i] for i in order],
        label_N=labels_N[order],
        fold_N=np.array([fold_of[ids[i]] for i in order]),
        pixels_NSS=pixels_NSS[order],
        num_classes=dataset.info.label_space.num_classes,
    )


def _read_shards(view: str, split: str) -> pa.Table:
    refuse_test(split, "pixels")
    return storage.read_table(
        storage.join(view, f"split={split}"), columns=["scan_id", "label", "pixels"]
    )


def _pixels(table: pa.Table, side: int) -> np.ndarray:
    """Return pixels_NSS; whether the column is Ray's tensor type depends on what is imported."""
    chunks = [c.storage if isinstance(c, pa.ExtensionArray) else c for c in table["pixels"].chunks]
    flat = [chunk.flatten().to_numpy() for chunk in chunks]
    return np.concatenate([np.empty(0, np.uint8), *flat]).reshape(-1, side, side)


class FoldContext:
    """`TrainContext` of one fold and seed, with all rows in memory.

    Args:
        rows: scans with their folds.
        fold: validates; all others train.
        batch_size: scans per step.
        seed: of the order of the scans.
        device: where the model is.
        on_epoch: is given the figures of each epoch; may raise to end the training.
    """

    rank, world_size = 0, 1

    def __init__(
        self,
        rows: FoldRows,
        fold: int,
        batch_size: int,
        seed: int,
        device: torch.device,
        on_epoch: Callable[[dict[str, Any]], None],
    ) -> None:
        self.device = device
        self.kept = Predictions()
        self._kept_by = -math.inf
        self._rows, self._seed, self._on_epoch = rows, seed, on_epoch
        self._train_N = np.flatnonzero(rows.fold_N != fold)
        self._validation_N = np.flatnonzero(rows.fold_N == fold)
        self._batch_size = worker_batch_size(len(self._train_N), batch_size, 1)

    @property
    def class_counts(self) -> list[int]:
        """K numbers of training scans."""
        labels = self._rows.label_N[self._train_N]
        return [int(n) for n in np.bincount(labels, minlength=self._rows.num_classes)]

    def train_batches(self, epoch: int) -> Iterator[Batch]:
        """Yield full batches in an order that seed and epoch decide."""
        order = np.random.default_rng([self._seed, epoch]).permutation(self._train_N)
        for start in range(0, len(order) - self._batch_size + 1, self._batch_size):
            yield self._batch(order[start : start + self._batch_size])

    def validation_batches(self) -> Iterator[Batch]:
        """Yield all validation scans."""
        size = validation_batch_size(self._batch_size, self.device)
        for start in range(0, len(self._validation_N), size):
            yield self._batch(self._validation_N[start : start + size])

    def _batch(self, index: np.ndarray) -> Batch:
        rows = self._rows
        return Batch(
            scan_id=np.array([rows.scan_id[i] for i in index]),
            pixels=rows.pixels_NSS[index],
            label=rows.label_N[index],
        )

    def wrap(self, model: Classifier) -> nn.Module:
        """Move the model to the device."""
        return model.to(self.device)

    def gather(self, own: Predictions) -> Predictions:
        """Return the predictions: there is one worker."""
        return own

    def sync(self, model: Classifier) -> None:
        """Do nothing: there is one worker."""

    def mean(self, value: float) -> float:
        """Return the value: there is one worker."""
        return value

    def restore(self) -> dict[str, Any] | None:
        """Return None: a trial that was interrupted starts again."""
        return None

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Do nothing: `on_epoch` has the figures already."""

    def report(
        self, metrics: dict[str, Any], state: dict[str, Any], predictions: Predictions
    ) -> None:
        """Hold the predictions of the epoch to be kept, and pass the figures on."""
        if metrics[KEPT] > self._kept_by:
            self._kept_by, self.kept = metrics[KEPT], predictions
        self._on_epoch(metrics)


def train_fold(
    recipe: Recipe,
    rows: FoldRows,
    fold: int,
    device: torch.device,
    on_epoch: Callable[[dict[str, Any]], None],
) -> Predictions:
    """Train a recipe, with its own seed, on all folds but one; all randomness is seeded.

    Returns:
        The validation predictions of the epoch that is kept.

    Raises:
        ConfigError, WeightsError: if the classifier cannot be built.
        RunError: if training diverges, or a batch does not fit in memory.
    """
    train = recipe.train
    torch.manual_seed(train.seed)
    model, _, preprocess = build_classifier(recipe.model, recipe.preprocess, rows.num_classes)
    context = FoldContext(rows, fold, train.batch_size, train.seed, device, on_epoch)
    fit(context, model, recipe, Preprocessor(preprocess), context.class_counts)
    return context.kept
