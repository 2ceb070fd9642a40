"""Networks from scratch, with timm's contract: forward_features, then forward_head(pre_logits)."""

import itertools
from collections.abc import Callable
from typing import Final

import torch
from torch import nn


class SmallCnn(nn.Module):
    """Four 3x3 convolution blocks (batch norm, ReLU, max pool), then global average pooling.

    388,896 parameters with the default width, before the head.

    Args:
        width: channels of the first block; each further block doubles them.
        in_chans: channels of the input.
    """

    def __init__(self, width: int = 32, in_chans: int = 3) -> None:
        super().__init__()
        widths = [in_chans, width, 2 * width, 4 * width, 8 * width]
        blocks: list[nn.Module] = []
        for in_chans, out_chans in itertools.pairwise(widths):
            blocks += [
                nn.Conv2d(in_chans, out_chans, 3, padding=1, bias=False),
                nn.BatchNorm2d(out_chans),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
            ]
        self.features = nn.Sequential(*blocks)
        self.num_features = widths[-1]

    def forward_features(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the last feature map, (B, 8 * width, H / 16, W / 16)."""
        features: torch.Tensor = self.features(images_BCHW)
        return features

    def forward_head(self, features: torch.Tensor, pre_logits: bool = True) -> torch.Tensor:
        """Return pooled features (B, num_features); there are no logits here, see the head."""
        if not pre_logits:
            raise ValueError("a backbone has no logits; the head is a module of its own")
        return features.mean((2, 3))


NETWORKS: Final[dict[str, Callable[..., nn.Module]]] = {"cnn_small": SmallCnn}
"""Own networks by the name used in `ModelSpec.backbone`."""
