"""The training loop in plain torch; `TrainContext` lets it run alone or in a Ray Train worker.

Shape suffixes: B batch, S side, K classes, N scans.
"""

import resource
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
from bt_core.training.augment import augment
from bt_core.training.recipe import Recipe, TrainSpec

SCORE = "val_score"
"""Picks the best epoch: validation macro F1 minus a hundredth of the log loss, so that of equal F1
values the one with the better probabilities wins."""


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
        """Return the model on the device, synchronised over the workers."""

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
    """Train a classifier, from the context's last checkpoint if there is one.

    Args:
        context: where it runs.
        model: the classifier with its initial weights.
        recipe: the settings.
        preprocessor: makes model input from stored pixels.
        class_counts: K numbers of training scans per class, for steps and class weights.
    """
    train = recipe.train
    wrapped = context.wrap(model)
    steps = steps_per_epoch(sum(class_counts), train.batch_size, context.world_size)
    optimizer = build_optimizer(wrapped, train)
    scheduler = build_schedule(optimizer, train, steps * train.epochs)
    loss_fn = _loss(train, class_counts).to(context.device)
    history: list[dict[str, Any]] = []
    state = context.restore()
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        history = state["history"]
        context.write_history(history)
    for epoch in range(len(history) + 1, train.epochs + 1):
        if stopped_early(history, train.patience):
            break
        started = time.perf_counter()
        figures = _train_epoch(
            context, wrapped, recipe, preprocessor, optimizer, scheduler, loss_fn, epoch, steps
        )
        context.sync(model)
        predictions = context.gather(_validate(context, model, preprocessor))
        figures = {"epoch": epoch, **figures, **validation_figures(predictions)}
        figures["epoch_seconds"] = round(time.perf_counter() - started, 2)
        history.append(figures)
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "history": history,
        }
        context.report(figures, state, predictions)
        context.write_history(history)


def worker_batch_size(num_scans: int, batch_size: int, world_size: int) -> int:
    """Return one worker's scans per step: its part of the batch, or its shard if smaller."""
    return max(1, min(batch_size, num_scans) // world_size)


def steps_per_epoch(num_scans: int, batch_size: int, world_size: int) -> int:
    """Return the number of full batches that each worker sees per epoch."""
    shard = num_scans // world_size
    return max(1, shard // worker_batch_size(num_scans, batch_size, world_size))


def build_optimizer(model: nn.Module, train: TrainSpec) -> torch.optim.Optimizer:
    """Return the recipe's optimizer; biases and norm weights are not decayed."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": train.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=train.learning_rate, momentum=0.9, nesterov=True)
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=train.learning_rate)


def build_schedule(
    optimizer: torch.optim.Optimizer, train: TrainSpec, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the learning-rate schedule, stepped once per batch."""
    if train.schedule == "one_cycle":
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=train.learning_rate, total_steps=total_steps
        )
    if train.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=1)


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


def _loss(train: TrainSpec, class_counts: list[int]) -> nn.Module:
    weight = None
    if train.class_weights:
        counts = torch.tensor(class_counts, dtype=torch.float32)
        share = counts.sum() / ((counts > 0).sum() * counts.clamp(min=1))
        # A class without scans weighs nothing, or label smoothing would pull every answer to it.
        weight = torch.where(counts > 0, share, 0.0)
    return nn.CrossEntropyLoss(weight=weight, label_smoothing=train.label_smoothing)


def _train_epoch(
    context: TrainContext,
    model: nn.Module,
    recipe: Recipe,
    preprocessor: Preprocessor,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    loss_fn: nn.Module,
    epoch: int,
    steps: int,
) -> dict[str, Any]:
    """Train on at most `steps` batches, the number that every worker has."""
    model.train()
    seed = recipe.train.seed * 1_000_003 + epoch * 1_009 + context.rank
    torch.manual_seed(seed)  # for dropout: an epoch draws the same whether or not it was resumed
    generator = torch.Generator().manual_seed(seed)
    total_loss = torch.zeros((), device=context.device)
    num_images, num_steps, waited = 0, 0, 0.0
    started = time.perf_counter()
    batches = context.train_batches(epoch)
    while num_steps < steps:
        asked = time.perf_counter()
        batch = next(batches, None)
        waited += time.perf_counter() - asked
        if batch is None:
            break
        labels_B = torch.tensor(batch["label"], dtype=torch.long).to(context.device)
        unit_B1SS = preprocessor.to_unit(torch.tensor(batch["pixels"]).to(context.device))
        images_B3SS = preprocessor.normalize(augment(unit_B1SS, recipe.augment, generator))
        loss = loss_fn(model(images_B3SS), labels_B)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        total_loss += loss.detach()
        num_images += len(labels_B)
        num_steps += 1
    mean_loss = context.mean(float(total_loss) / max(num_steps, 1))
    if not np.isfinite(mean_loss):
        raise FloatingPointError(
            f"the loss of epoch {epoch} is {mean_loss}; lower the learning rate"
        )
    seconds = time.perf_counter() - started
    return {
        "loss": mean_loss,
        "learning_rate": scheduler.get_last_lr()[0],
        "images_per_second": num_images * context.world_size / seconds,
        "data_wait": waited / seconds,
        "memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


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
