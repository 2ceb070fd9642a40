"""One stage of a training: the model with its optimizer, schedule, loss scale and average."""

import itertools
import math
import resource
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from bt_core.errors import RunError
from bt_core.models.classifier import Classifier
from bt_core.models.inputs import Preprocessor
from bt_core.training.augment import augment, build_mixing
from bt_core.training.cpu import FastDepthwise
from bt_core.training.losses import build_loss
from bt_core.training.recipe import Recipe
from bt_core.training.spec import TrainSpec
from bt_core.training.stages import (
    build_average,
    build_optimizer,
    build_schedule,
    select_trainable,
    train_mode,
)

if TYPE_CHECKING:
    from bt_core.training.engine import Batch, TrainContext

_NO_MEMORY: Final = ("DefaultCPUAllocator", "bad_alloc", "ALLOC_FAILED")
"""How torch names memory that it did not get, beside its OutOfMemoryError on GPUs."""


class DivergedError(RunError):
    """The loss is not finite, on every worker alike."""


class BatchMemoryError(RunError):
    """A batch does not fit in memory, on one worker perhaps."""


class Learner:
    """Trains a classifier for the epochs of one stage.

    Args:
        context: where it runs.
        model: the classifier with the weights that the stage begins with.
        recipe: the settings.
        stage: those of the stage, one of `recipe.train.plan()`.
        preprocessor: makes model input from stored pixels.
        class_counts: K numbers of training scans per class.
        num_batches: of each worker in an epoch.
    """

    def __init__(
        self,
        context: "TrainContext",
        model: Classifier,
        recipe: Recipe,
        stage: TrainSpec,
        preprocessor: Preprocessor,
        class_counts: list[int],
        num_batches: int,
    ) -> None:
        self._context, self._model, self._recipe = context, model, recipe
        self._stage, self._preprocessor, self._num_batches = stage, preprocessor, num_batches
        select_trainable(model, stage.trainable)
        self._wrapped = context.wrap(model)
        self._average = build_average(model, stage.ema_decay) if stage.ema_decay else None
        self._optimizer = build_optimizer(model, stage)
        steps = math.ceil(num_batches / stage.accumulation_steps)
        self._schedule = build_schedule(self._optimizer, stage, steps * stage.epochs)
        self._dtype = autocast_dtype(stage.precision, context.device)
        self._scaler = torch.amp.GradScaler(
            context.device.type, enabled=self._dtype == torch.float16
        )
        self._loss_fn = build_loss(stage, class_counts).to(context.device)
        self._mix = build_mixing(recipe.augment, len(class_counts))

    @property
    def validated(self) -> Classifier:
        """The model whose weights are validated and kept: the average, if there is one."""
        return self._model if self._average is None else self._average.module  # type: ignore[return-value]

    def state(self) -> dict[str, Any]:
        """Return what `load` needs to go on exactly; `model` holds the weights to keep."""
        state: dict[str, Any] = {
            "model": self.validated.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
        }
        if self._average is not None:
            state["trained_model"] = self._model.state_dict()
            state["num_averaged"] = int(self._average.n_averaged)
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state` of the same stage."""
        self.validated.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["scheduler"])
        self._scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            self._model.load_state_dict(state["trained_model"])
            self._average.n_averaged.fill_(state["num_averaged"])

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """Train on the number of batches that every worker has, and return the epoch's figures.

        Args:
            epoch: from 1, over all stages; it seeds what is drawn, so that an epoch is the same
                whether or not the run was interrupted before it.

        Raises:
            RunError: if the loss is not finite, or a batch does not fit in memory.
        """
        train_mode(self._wrapped, self._model)
        seed = self._recipe.train.seed * 1_000_003 + epoch * 1_009 + self._context.rank
        torch.manual_seed(seed)  # for dropout and mixing
        generator = torch.Generator().manual_seed(seed)
        total_loss = torch.zeros((), device=self._context.device)
        num_images, num_batches, waited = 0, 0, 0.0
        started = time.perf_counter()
        batches = self._context.train_batches(epoch)
        with explained_memory(self._stage, self._context.device):
            while num_batches < self._num_batches:
                left = self._num_batches - num_batches
                asked = time.perf_counter()
                group = list(itertools.islice(batches, min(self._stage.accumulation_steps, left)))
                waited += time.perf_counter() - asked
                if not group:
                    break
                total_loss += self._step(group, generator)
                num_images += sum(len(batch["label"]) for batch in group)
                num_batches += len(group)
            mean_loss = self._context.mean(float(total_loss) / max(num_batches, 1))
        self.check_finite(mean_loss, "loss", epoch)
        seconds = time.perf_counter() - started
        return {
            "loss": mean_loss,
            "learning_rate": max(self._schedule.get_last_lr()),
            "images_per_second": num_images * self._context.world_size / seconds,
            "data_wait": waited / seconds,
            "memory_mib": _memory_mib(self._context.device),
        }

    def check_finite(self, loss: float, what: str, epoch: int) -> None:
        """Raise DivergedError, which names `what` and the epoch, unless a loss is finite."""
        if math.isfinite(loss):
            return
        stage, clip = self._stage, self._stage.gradient_clip_norm
        staged = bool(self._recipe.train.stages)
        key = "learning_rate of that stage" if staged else "train.learning_rate"
        advice = (
            "set train.gradient_clip_norm=1" if clip is None else f"gradient_clip_norm ({clip:g})"
        )
        automatic = stage.precision == "auto" and torch.cuda.is_available()
        narrow = stage.precision == "fp16" or automatic
        fp16 = ", or set train.precision=fp32" if narrow else ""
        raise DivergedError(
            f"training diverged: the {what} of epoch {epoch} is {loss}; lower {key} "
            f"({stage.learning_rate:g}) or {advice}{fp16}; then give --overwrite or another -o"
        )

    def end_epoch(self, score: float) -> None:
        """Tell a schedule that follows the validation score what it was."""
        if isinstance(self._schedule, ReduceLROnPlateau):
            self._schedule.step(score)

    def _step(self, group: list["Batch"], generator: torch.Generator) -> torch.Tensor:
        """Take one step by the mean gradient of a group of batches; return the sum of losses."""
        total_loss = torch.zeros((), device=self._context.device)
        for number, batch in enumerate(group, 1):
            with self._synchronised_if(number == len(group)):
                loss = self._loss(batch, generator)
                self._scaler.scale(loss / len(group)).backward()  # type: ignore[no-untyped-call]
            total_loss += loss.detach()
        if self._stage.gradient_clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._model.parameters(), self._stage.gradient_clip_norm)
        scale = self._scaler.get_scale()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        # A lower scale means that the gradient overflowed in fp16 and the step was left out.
        if self._scaler.get_scale() >= scale:
            if not isinstance(self._schedule, ReduceLROnPlateau):
                self._schedule.step()
            if self._average is not None:
                self._average.update_parameters(self._model)
        return total_loss

    def _loss(self, batch: "Batch", generator: torch.Generator) -> torch.Tensor:
        device = self._context.device
        labels_B = torch.tensor(batch["label"], dtype=torch.long).to(device)
        unit_B1SS = self._preprocessor.to_unit(torch.tensor(batch["pixels"]).to(device))
        changed_B1SS = augment(unit_B1SS, self._recipe.augment, generator)
        images_BCSS, targets_BK = self._mix(self._preprocessor.normalize(changed_B1SS), labels_B)
        narrow = torch.autocast(device.type, self._dtype, enabled=self._dtype is not None)
        with narrow, FastDepthwise() if device.type == "cpu" else nullcontext():
            logits_BK = self._wrapped(images_BCSS.contiguous(memory_format=torch.channels_last))
        loss: torch.Tensor = self._loss_fn(logits_BK.float(), targets_BK)
        return loss

    def _synchronised_if(self, last: bool) -> AbstractContextManager[None]:
        """Exchange gradients between workers only for the last batch of a step."""
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            return nullcontext()
        held: AbstractContextManager[None] = self._wrapped.no_sync()
        return held


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the type that training steps compute in, or None for float32 throughout."""
    if precision == "auto":
        if device.type != "cuda":
            return None
        whole = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if whole else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory did not suffice, on a GPU or outside."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError | BatchMemoryError)
    return known or any(sign in str(error) for sign in _NO_MEMORY)


@contextmanager
def explained_memory(stage: TrainSpec, device: torch.device) -> Iterator[None]:
    """Raise RunError with the settings that help where memory does not suffice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        size, steps = stage.batch_size, stage.accumulation_steps
        where = "GPU" if device.type == "cuda" else "worker"
        raise BatchMemoryError(
            f"a batch of {size} scans does not fit in the memory of the {where}; set "
            f"train.batch_size={max(2, size // 2)} and train.accumulation_steps={2 * steps}, which "
            "make steps of as many scans in less memory, or lower preprocess.size_px; then give "
            "--overwrite or another -o"
        ) from error


def _memory_mib(device: torch.device) -> int:
    """Return the peak of the GPU's memory, or of this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
