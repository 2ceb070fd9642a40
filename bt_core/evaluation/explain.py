"""Where a classifier looks: Grad-CAM for feature maps, attention rollout for transformers.

A heat map shows what moved the answer, not where a tumour is: no method localises reliably (Arun et
al. 2021), so each map is judged as well, see `faithfulness`.

Shape suffixes: B batch, C channels, H and W image, h and w feature map, D features, T tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.nn import functional

from bt_core.models.classifier import Classifier

Method = Literal["grad_cam", "attention_rollout"]
_ATTENTION: Final = "attn_drop"
"""Name of the module that timm's transformers pass their attention through."""


def heat_maps(
    model: Classifier, images_BCHW: torch.Tensor, classes_B: torch.Tensor
) -> tuple[torch.Tensor, Method]:
    """Return how much each place counted for a class, and by which method.

    Args:
        model: in evaluation mode; its weights may be without gradients.
        images_BCHW: model input.
        classes_B: the class to be explained. Attention rollout knows no classes: it shows what the
            pooled token took from where.

    Returns:
        heat_BHW float32 in [0, 1], the largest of each image 1; all 0 where nothing counted.
    """
    with torch.no_grad(), _kept_attention(model.backbone) as attentions:
        features = model.forward_features(images_BCHW)
    with torch.enable_grad():
        features.requires_grad_()
        score = model.forward_head(features).gather(1, classes_B[:, None]).sum()
        (gradients,) = torch.autograd.grad(score, features)
    prefix = int(getattr(model.backbone, "num_prefix_tokens", 0))
    if features.ndim == 3 and _is_plain(attentions, features.shape[1]):
        heat_Bhw = _rollout(attentions, prefix)
        method: Method = "attention_rollout"
    else:
        channels_last = getattr(model.backbone, "output_fmt", "NCHW") == "NHWC"
        heat_Bhw = _grad_cam(features.detach(), gradients, prefix, channels_last)
        method = "grad_cam"
    heat_B1HW = functional.interpolate(
        heat_Bhw[:, None], images_BCHW.shape[2:], mode="bilinear", align_corners=False
    )
    largest_B111 = heat_B1HW.amax((1, 2, 3), keepdim=True)
    return (heat_B1HW / largest_B111.clamp(min=1e-12))[:, 0], method


def _grad_cam(
    features: torch.Tensor, gradients: torch.Tensor, prefix: int, channels_last: bool
) -> torch.Tensor:
    """Return heat_Bhw: channels weighed by their mean gradient, negatives left out.

    Selvaraju et al. 2017; tokens of a transformer form a square map.
    """
    if features.ndim == 3:
        features_BTD, gradients_BTD = features[:, prefix:], gradients[:, prefix:]
        side = int(features_BTD.shape[1] ** 0.5)
        heat_BT = (features_BTD * gradients_BTD.mean(1, keepdim=True)).sum(2).relu()
        return heat_BT[:, : side**2].reshape(-1, side, side)
    axes, channel = ((1, 2), 3) if channels_last else ((2, 3), 1)
    return (features * gradients.mean(axes, keepdim=True)).sum(channel).relu()


def _rollout(attentions: list[torch.Tensor], prefix: int) -> torch.Tensor:
    """Return heat_Bhw: attention followed through all layers (Abnar & Zuidema 2020).

    Heads are averaged, and half of each layer passes by its attention. Of the class token if there
    is one, else on mean over all tokens.
    """
    joint_BTT: torch.Tensor | None = None
    for heads_BNTT in attentions:
        layer_BTT = heads_BNTT.mean(1) + torch.eye(heads_BNTT.shape[-1], device=heads_BNTT.device)
        layer_BTT = layer_BTT / layer_BTT.sum(2, keepdim=True)
        joint_BTT = layer_BTT if joint_BTT is None else layer_BTT @ joint_BTT
    assert joint_BTT is not None
    taken_BT = joint_BTT[:, 0] if prefix else joint_BTT.mean(1)
    taken_BT = taken_BT[:, prefix:]
    taken_BT = taken_BT - taken_BT.amin(1, keepdim=True)  # every token takes something from each
    side = int(taken_BT.shape[1] ** 0.5)
    return taken_BT[:, : side**2].reshape(-1, side, side)


def _is_plain(attentions: list[torch.Tensor], num_tokens: int) -> bool:
    """Return whether every layer attends from all tokens to all, so that layers can be joined."""
    return bool(attentions) and all(
        a.ndim == 4 and a.shape[-2:] == (num_tokens, num_tokens) for a in attentions
    )


@contextmanager
def _kept_attention(backbone: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the attention of every layer, which fused kernels would not compute."""
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        kept.append(output.detach())

    parents: list[Any] = [
        module
        for module in backbone.modules()
        if isinstance(getattr(module, _ATTENTION, None), nn.Module)
    ]
    hooks = [getattr(module, _ATTENTION).register_forward_hook(keep) for module in parents]
    fused = [(module, module.fused_attn) for module in parents if hasattr(module, "fused_attn")]
    for module, _ in fused:
        module.fused_attn = False
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
        for module, before in fused:
            module.fused_attn = before
