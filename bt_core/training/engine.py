"""The training loop in plain torch; `TrainContext` lets it run alone or in a Ray Train worker.

Shape suffixes: B batch, S side, K classes, N scans.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from sklearn.metrics import f1_score
from torch import nn

from bt_core.models.classifier import Classifier
from bt_core.models.inputs import Preprocessor
from bt_core.training.learner import Learner, explained_memory
from bt_core.training.recipe import Recipe
from bt_core.training.spec import TrainSpec

SCORE = "val_score"
"""Picks the best epoch: validation macro F1 minus a hundredth of the log loss, so that of equal F1
values the one with the better probabilities wins."""
KEPT = "kept_by"
"""Figure of which the epoch with the largest value is kept: its score, or its number."""


class Batch(TypedDict):
    """Columns of a batch as they come from the shards: scan_id (B), pixels_BSS uint8, label (B)."""

    scan_id: np.ndarray
    pixels: np.ndarray
    label: np.ndarray


@dataclass
class Predictions:
    """Logits of validation scans: scan_id (N), label (N), logits_NK."""

    scan_id: list[str] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    logits: list[list[float]] = field(default_factory=list)


class TrainContext(Protocol):
    """What the loop needs from the place where it runs."""

    rank: int
    world_size: int
    device: torch.device

    def train_batches(self, epoch: int) -> Iterator[Batch]:
        """Yield this worker's share of the training scans, in a new order every epoch."""

    def validation_batches(self) -> Iterator[Batch]:
        """Yield this worker's share of the validation scans; all workers' shares are all scans."""

    def wrap(self, model: Classifier) -> nn.Module:
        """Return the model on the device, synchronised over the workers; once for each stage."""

    def gather(self, own: Predictions) -> Predictions:
        """Return the predictions of all workers together, on every worker."""

    def sync(self, model: Classifier) -> None:
        """Give every worker rank 0's buffers, so that all validate the model that is saved."""

    def mean(self, value: float) -> float:
        """Return the mean of a value over the workers."""

    def restore(self) -> dict[str, Any] | None:
        """Return the last checkpoint's state, or None."""

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Make the figures of all epochs so far visible outside."""

    def report(
        self, metrics: dict[str, Any], state: dict[str, Any], predictions: Predictions
    ) -> None:
        """Publish an epoch; every worker calls it once per epoch."""


def fit(
    context: TrainContext,
    model: Classifier,
    recipe: Recipe,
    preprocessor: Preprocessor,
    class_counts: list[int],
) -> None:
    """Train a classifier through its stages, from the context's last checkpoint if there is one.

    Each stage begins with the best weights of the one before it.

    Args:
        context: where it runs.
        model: the classifier with its initial weights.
        recipe: the settings.
        preprocessor: makes model input from stored pixels.
        class_counts: K numbers of training scans per class, for steps and class weights.

    Raises:
        RunError: if training diverges, or a batch does not fit in memory.
    """
    state = context.restore()
    history: list[dict[str, Any]] = []
    if state is not None:
        model.load_state_dict(state["model"])
        history = state["history"]
        context.write_history(history)
    train = recipe.train
    plan = train.plan()
    num_batches = steps_per_epoch(sum(class_counts), train.batch_size, context.world_size)
    for number, stage in enumerate(plan, 1):
        if history and history[-1]["stage"] > number:
            continue
        learner = Learner(context, model, recipe, stage, preprocessor, class_counts, num_batches)
        own = [figures for figures in history if figures["stage"] == number]
        best: dict[str, torch.Tensor] | None = None
        if own and state is not None:
            learner.load(state)
            best = state.get("best")
        while len(own) < stage.epochs and not stopped_early(own, train.patience):
            figures, predictions = _epoch(context, learner, preprocessor, stage, len(history) + 1)
            figures["stage"] = number
            own.append(figures)
            history.append(figures)
            is_best = figures[KEPT] == max(f[KEPT] for f in own)
            if number < len(plan) and is_best:  # the next stage begins with these
                best = {k: v.clone() for k, v in learner.validated.state_dict().items()}
            kept = {"history": history} | ({"best": best} if best is not None else {})
            context.report(figures, learner.state() | kept, predictions)
            context.write_history(history)
        if best is not None:
            model.load_state_dict(best)


def worker_batch_size(num_scans: int, batch_size: int, world_size: int) -> int:
    """Return one worker's scans per step: its part of the batch, or its shard if smaller."""
    return max(1, min(batch_size, num_scans) // world_size)


def validation_batch_size(worker_batch_size: int, device: torch.device) -> int:
    """Return a number of scans that fits, without gradients, where training does.

    On CPUs a small one, whose activations stay in the cache: MobileNetV2 at 192 px on two threads
    gave 274 images/s with 8 and 127 with 64.
    """
    return min(8 if device.type == "cpu" else 64, 2 * worker_batch_size)


def steps_per_epoch(num_scans: int, batch_size: int, world_size: int) -> int:
    """Return the number of full batches that each worker sees per epoch."""
    shard = num_scans // world_size
    return max(1, shard // worker_batch_size(num_scans, batch_size, world_size))


def stopped_early(history: list[dict[str, Any]], patience: int | None) -> bool:
    """Return whether the best epoch lies `patience` or more epochs back."""
    if patience is None or not history:
        return False
    scores = [figures[SCORE] for figures in history]
    return len(scores) - 1 - int(np.argmax(scores)) >= patience


def validation_figures(predictions: Predictions) -> dict[str, float]:
    """Return accuracy, macro F1, log loss and score of validation predictions."""
    labels_N = torch.tensor(predictions.label)
    logits_NK = torch.tensor(predictions.logits)
    predicted_N = logits_NK.argmax(1)
    macro_f1 = float(f1_score(labels_N, predicted_N, average="macro", zero_division=0.0))
    log_loss = float(nn.functional.cross_entropy(logits_NK, labels_N))
    return {
        "val_scans": len(labels_N),
        "val_accuracy": float((predicted_N == labels_N).float().mean()),
        "val_macro_f1": macro_f1,
        "val_log_loss": log_loss,
        SCORE: macro_f1 - 0.01 * min(log_loss, 100.0),
    }


def progress_line(figures: dict[str, Any], epochs: int) -> str:
    """Return the one fixed line that an epoch leaves in the log."""
    left = (epochs - figures["epoch"]) * figures["epoch_seconds"]
    return (
        f"epoch {figures['epoch']}/{epochs}  loss {figures['loss']:.4f}  "
        f"val accuracy {figures['val_accuracy']:.4f}  macro F1 {figures['val_macro_f1']:.4f}  "
        f"{figures['images_per_second']:.0f} images/s  data wait {figures['data_wait']:.0%}  "
        f"memory {figures['memory_mib']} MiB  ETA {left:.0f} s"
    )


def _epoch(
    context: TrainContext,
    learner: Learner,
    preprocessor: Preprocessor,
    stage: TrainSpec,
    epoch: int,
) -> tuple[dict[str, Any], Predictions]:
    """Train and validate once."""
    started = time.perf_counter()
    trained = learner.train_epoch(epoch)
    context.sync(learner.validated)
    with explained_memory(stage, context.device):
        own = _validate(context, learner.validated, preprocessor)
    predictions = context.gather(own)
    figures = {"epoch": epoch, **trained, **validation_figures(predictions)}
    learner.check_finite(figures["val_log_loss"], "validation log loss", epoch)
    figures[KEPT] = figures[SCORE] if stage.keep == "best" else float(epoch)
    learner.end_epoch(figures[SCORE])
    figures["epoch_seconds"] = round(time.perf_counter() - started, 2)
    return figures, predictions


@torch.inference_mode()
def _validate(context: TrainContext, model: Classifier, preprocessor: Preprocessor) -> Predictions:
    model.eval()
    own = Predictions()
    for batch in context.validation_batches():
        logits_BK = model(preprocessor.batch(batch["pixels"]).to(context.device))
        own.scan_id += [str(i) for i in batch["scan_id"]]
        own.label += [int(label) for label in batch["label"]]
        own.logits += logits_BK.float().cpu().tolist()
    return own
