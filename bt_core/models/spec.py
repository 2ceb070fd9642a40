"""What a classifier is made of, as written in a recipe and kept in a bundle."""

import os
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from bt_core.config import OneOf, StrictModel

Activation = Literal["relu", "gelu", "silu", "tanh"]
Init = Literal["default", "he", "glorot"]


class LayerSpec(OneOf):
    """One layer of a head, as a mapping of one key: `dense: 128`, `dropout: 0.5`, ..."""

    dense: PositiveInt | None = None
    """Width of a linear layer."""
    activation: Activation | None = None
    dropout: float | None = Field(None, ge=0, lt=1)
    batch_norm: Literal[True] | None = None


class HeadSpec(StrictModel):
    """The layers between the backbone's features and the classes; a linear layer comes last.

    Either `layers` says them one by one, or `hidden` and `dropout` say the usual ones in short.
    """

    pool: Literal["backbone", "flatten"] = "backbone"
    """The backbone's own pooling (an average, for most), or the whole feature map flattened."""
    hidden: tuple[PositiveInt, ...] = ()
    """Widths of ReLU layers before the last linear layer."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Before the last linear layer, and after each hidden one; None without `layers` is 0.2."""
    layers: tuple[LayerSpec, ...] = ()
    init: Init = "default"
    """Of the linear layers' weights: torch's own, He's normal, or Glorot's uniform as in Keras; the
    last two start with biases of 0."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.layers and (self.hidden or self.dropout is not None):
            raise ValueError(
                "write hidden and dropout, or layers, not both; a layer is changed by its place, "
                "as in model.head.layers.0.dropout"
            )
        return self

    def all_layers(self) -> tuple[LayerSpec, ...]:
        """Return the layers before the last linear one, however they were written."""
        if self.layers:
            return self.layers
        drop = LayerSpec(dropout=0.2 if self.dropout is None else self.dropout)
        blocks = [
            (LayerSpec(dense=width), LayerSpec(activation="relu"), drop) for width in self.hidden
        ]
        return tuple(layer for block in blocks for layer in block) or (drop,)


class ModelSpec(StrictModel):
    """A backbone, its initial weights and its head."""

    backbone: str
    """A name of `timm.list_models()`, or one of this project's own networks (`cnn_small`,
    `conv_stack`)."""
    backbone_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the backbone's constructor."""
    weights: str = "hub"
    """`hub` (timm's download), `local-dir:PATH` (config.json + model.safetensors) or `none`."""
    head: HeadSpec = HeadSpec()
    test_time_flips: Literal["none", "horizontal", "both"] = "none"
    """Outside training, logits are the mean over the image and its mirror images: left-right, or
    with `both` also top-bottom and turned by 180 degrees. Answers take two or four times longer."""

    @field_validator("weights")
    @classmethod
    def _known_source(cls, weights: str) -> str:
        source, _, path = weights.partition(":")
        if source == "local-dir" and path:
            return f"local-dir:{os.path.abspath(os.path.expanduser(path))}"
        if weights in ("hub", "none"):
            return weights
        raise ValueError("use hub, local-dir:PATH or none")

    @property
    def weights_source(self) -> Literal["hub", "local-dir", "none"]:
        """The kind of source, without a path."""
        return self.weights.partition(":")[0]  # type: ignore[return-value]
