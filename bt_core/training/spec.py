"""Settings of augmentation and training, as written in a recipe."""

import itertools
import re
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from bt_core.config import StrictModel

Optimizer = Literal["adamw", "adam", "sgd"]
Schedule = Literal["one_cycle", "cosine", "constant", "plateau"]
_EPOCHS: Final = 6


_PARTS: Final = r"all|head|(layers|blocks):[1-9]\d*"


def _known_part(trainable: str) -> str:
    if re.fullmatch(_PARTS, trainable):
        return trainable
    raise ValueError(
        "use all, head, layers:N (the last N weight layers of the backbone) or blocks:N (its last "
        "N blocks); the head is always trained"
    )


Trainable = Annotated[
    str, AfterValidator(_known_part), WithJsonSchema({"type": "string", "pattern": f"^({_PARTS})$"})
]


class AugmentSpec(StrictModel):
    """Random changes of training images, drawn anew for every image and epoch."""

    horizontal_flip: bool = True
    vertical_flip: bool = False
    rotation_degrees: float = Field(15.0, ge=0, le=180)
    """Largest rotation to either side."""
    zoom: float = Field(0.1, ge=0, lt=1)
    """Scale is drawn from 1 - zoom to 1 + zoom."""
    shear_degrees: float = Field(0.0, ge=0, le=45)
    """Largest horizontal shear to either side."""
    shift: float = Field(0.0, ge=0, lt=1)
    """Largest move along each axis, as a share of the side."""
    contrast: float = Field(0.2, ge=0, lt=1)
    """Contrast factor about the image's mean is drawn from 1 - contrast to 1 + contrast."""
    brightness: float = Field(0.0, ge=0, lt=1)
    """Largest change of every pixel to either side, where 1 is from black to white."""
    noise: float = Field(0.0, ge=0, lt=1)
    """Largest standard deviation of Gaussian noise, where 1 is from black to white."""
    mixup_alpha: float = Field(0.0, ge=0)
    """Beta distribution of the share that a second image of the batch has; 0 mixes none."""
    cutmix_alpha: float = Field(0.0, ge=0)
    """The same for a rectangle of it. With both, each batch takes one of them."""


class StageSpec(StrictModel):
    """One part of a training; what is left out is as in `train`."""

    epochs: int = Field(ge=1)
    trainable: Trainable | None = None
    learning_rate: float | None = Field(None, gt=0)
    layer_decay: float | None = Field(None, gt=0, le=1)
    optimizer: Optimizer | None = None
    weight_decay: float | None = Field(None, ge=0)
    schedule: Schedule | None = None
    warmup: float | None = Field(None, ge=0, lt=1)


def _sum_of_stages(given: dict[str, Any]) -> int:
    return sum(stage.epochs for stage in given.get("stages", ())) or _EPOCHS


class TrainSpec(StrictModel):
    """How the weights are fitted."""

    stages: tuple[StageSpec, ...] = ()
    """One after another, each with a fresh optimizer, from the best weights of the one before.
    Without any, the whole training is one stage."""
    epochs: int = Field(default_factory=_sum_of_stages, ge=1)
    """In all. Left out it is the sum of the stages, or 6; another number than their sum makes every
    stage longer or shorter in proportion."""
    trainable: Trainable = "all"
    """`head`, `all`, `layers:N` (last N weight layers of the backbone) or `blocks:N` (last N
    blocks). The head is always trained; frozen parts keep their batch-norm statistics."""
    batch_size: int = Field(32, ge=2)
    """Scans per batch over all workers together."""
    accumulation_steps: int = Field(1, ge=1)
    """Batches whose gradients make one step of the optimizer."""
    optimizer: Optimizer = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    """Peak rate of the schedule."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor of the rate from each block of the backbone to the one before it; the head has 1."""
    weight_decay: float = Field(0.01, ge=0)
    schedule: Schedule = "one_cycle"
    """`plateau` lowers the rate when the validation score stops rising."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of a stage's steps in which `cosine` or `constant` rises from 0."""
    plateau_patience: int = Field(2, ge=0)
    """Epochs without a better validation score that `plateau` lets pass."""
    plateau_factor: float = Field(0.3, gt=0, lt=1)
    """What `plateau` multiplies the rate with."""
    gradient_clip_norm: float | None = Field(None, gt=0)
    """Largest norm of the gradient of all weights together; a longer one is shortened to it."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    focal_gamma: float = Field(0.0, ge=0)
    """Exponent of the focal loss; 0 is cross-entropy."""
    class_weights: bool = False
    """Weigh each class by the inverse of its share in the training scans."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Validate and keep an exponential moving average of the weights, with this decay per step."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of training steps; `auto` is fp32 on CPUs, and on GPUs bf16 where they have it, else fp16."""
    patience: int | None = Field(None, ge=1)
    """End a stage after this many epochs without a better validation score; None trains all."""
    keep: Literal["best", "last"] = "best"
    """Epoch of each stage whose weights are kept: the one with the best validation score, or the
    last. A figure on scans that chose the epoch is too good; `last` lets them choose nothing."""
    seed: int = 0

    @model_validator(mode="after")
    def _can_be_planned(self) -> "TrainSpec":
        by_score = [stage.schedule == "plateau" for stage in self.plan()]
        if self.keep == "last" and any(by_score):
            raise ValueError(
                "the schedule plateau follows the validation score, which `keep: last` leaves out "
                "of every choice; use another schedule"
            )
        if self.keep == "last" and self.patience is not None:
            raise ValueError(
                f"patience ({self.patience}) ends a stage by the validation score, which `keep: "
                "last` leaves out of every choice; leave one of them out"
            )
        if self.epochs < len(self.stages):
            raise ValueError(
                f"epochs ({self.epochs}) are fewer than stages ({len(self.stages)}), of which each "
                "needs one"
            )
        for name in StageSpec.model_fields.keys() - {"epochs"}:
            changed = getattr(self, name) != type(self).model_fields[name].default
            if changed and self.stages and all(getattr(s, name) is not None for s in self.stages):
                raise ValueError(
                    f"train.{name} ({getattr(self, name)}) has no effect: every stage has its own; "
                    f"set train.stages.0.{name} and so on"
                )
        for number, stage in enumerate(self.plan(), 1):
            if stage.warmup and stage.schedule not in ("cosine", "constant"):
                raise ValueError(
                    f"warmup ({stage.warmup}) of stage {number} has no effect with the schedule "
                    f"{stage.schedule}; use cosine or constant, or warmup 0"
                )
        return self

    def plan(self) -> tuple["TrainSpec", ...]:
        """Return the settings of each stage: these, with the stage's own and its epochs."""
        if not self.stages:
            return (self,)
        # Each stage has one epoch; the others are shared out by what each has beyond its first.
        beyond = [stage.epochs - 1 for stage in self.stages]
        spare = self.epochs - len(beyond)
        ends = [round(spare * e / max(sum(beyond), 1)) for e in itertools.accumulate(beyond)]
        ends[-1] = spare
        plan = []
        for stage, start, end in zip(self.stages, [0, *ends], ends, strict=False):
            own = stage.model_dump(exclude_none=True) | {"epochs": 1 + end - start, "stages": ()}
            plan.append(self.model_copy(update=own))
        return tuple(plan)
