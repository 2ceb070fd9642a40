"""What a classifier is made of, as written in a recipe and kept in a bundle."""

import os
from typing import Any, Literal

from pydantic import Field, field_validator

from bt_core.config import StrictModel


class HeadSpec(StrictModel):
    """The layers after the backbone's pooled features."""

    hidden: tuple[int, ...] = ()
    """Widths of ReLU layers before the last linear layer."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Before the last linear layer, and after each hidden one."""


class ModelSpec(StrictModel):
    """A backbone, its initial weights and its head."""

    backbone: str
    """A name of `timm.list_models()`, or one of this project's own networks (`cnn_small`)."""
    backbone_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the backbone's constructor."""
    weights: str = "hub"
    """`hub` (timm's download), `local-dir:PATH` (config.json + model.safetensors) or `none`."""
    head: HeadSpec = HeadSpec()

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
