"""Networks from scratch, with timm's contract: forward_features, then forward_head(pre_logits)."""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import nn

from bt_core.models.spec import Init


def initialise(layer: nn.Linear | nn.Conv2d, init: Init) -> None:
    """Draw a layer's weights anew as `HeadSpec.init` says; `default` leaves torch's own."""
    if init == "default":
        return
    if init == "he":
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    else:
        nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class ConvStack(nn.Module):
    """3x3 convolutions with ReLU, max pools and dropout in any order, as in classic CNNs.

    Args:
        layers: channels of a convolution, `pool` (2x2), or `{"dropout": p}`, in order.
        padding: `same` keeps the size in a convolution, `valid` takes 2 px from it.
        batch_norm: put batch norm between each convolution and its ReLU.
        init: of the convolutions: torch's own, or Glorot's uniform with biases of 0, as in Keras.
        in_chans: channels of the input.

    Raises:
        ValueError: for a layer, padding or init that is none of these.
    """

    def __init__(
        self,
        layers: Sequence[int | str | dict[str, float]],
        padding: str = "same",
        batch_norm: bool = False,
        init: Init = "default",
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        if init not in ("default", "glorot"):
            raise ValueError(f"init is default or glorot, not {init!r}")
        if padding not in ("same", "valid"):
            raise ValueError(f"padding is same or valid, not {padding!r}")
        built: list[nn.Module] = []
        for layer in layers:
            if isinstance(layer, int) and not isinstance(layer, bool) and layer > 0:
                built.append(nn.Conv2d(in_chans, layer, 3, padding=padding, bias=not batch_norm))
                built += [nn.BatchNorm2d(layer)] if batch_norm else []
                built.append(nn.ReLU(inplace=True))
                in_chans = layer
            elif layer == "pool":
                built.append(nn.MaxPool2d(2))
            elif isinstance(layer, dict) and list(layer) == ["dropout"]:
                built.append(nn.Dropout(layer["dropout"]))
            else:
                raise ValueError(f"a layer is a number of channels, pool or dropout, not {layer!r}")
        self.features = nn.Sequential(*built)
        for module in built:
            if isinstance(module, nn.Conv2d):
                initialise(module, init)

    def forward_features(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the last feature map (B, C, h, w), C channels of the last convolution."""
        features: torch.Tensor = self.features(images_BCHW)
        return features

    def forward_head(self, features: torch.Tensor, pre_logits: bool = True) -> torch.Tensor:
        """Return pooled features_BC; there are no logits here, see the head.

        Args:
            features: as `forward_features` returns them.
            pre_logits: has to be true.

        Raises:
            ValueError: if logits are asked for.
        """
        if not pre_logits:
            raise ValueError("a backbone has no logits; the head is a module of its own")
        return features.mean((2, 3))


def small_cnn(width: int = 32, in_chans: int = 3) -> ConvStack:
    """Return four 3x3 convolution blocks (batch norm, ReLU, max pool).

    388,896 parameters with the default width, before the head.

    Args:
        width: channels of the first block; each further block doubles them.
        in_chans: channels of the input.
    """
    widths = [width, 2 * width, 4 * width, 8 * width]
    layers = [layer for channels in widths for layer in (channels, "pool")]
    return ConvStack(layers, batch_norm=True, in_chans=in_chans)


NETWORKS: Final[dict[str, Callable[..., nn.Module]]] = {
    "cnn_small": small_cnn,
    "conv_stack": ConvStack,
}
"""Own networks by the name used in `ModelSpec.backbone`."""
