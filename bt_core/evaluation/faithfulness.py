"""Can a heat map be believed? Figures for each map, and a check of the method on the model itself.

Shape suffixes: B batch, C channels, H and W image, P pixels of an image.
"""

import copy
from typing import Final

import numpy as np
import torch
from scipy.stats import rankdata
from torch.nn import functional

from bt_core.evaluation.explain import heat_maps
from bt_core.models.classifier import Classifier

_STEPS: Final = 8
"""Shares of the image that are taken away, one after another."""
_BLUR_SHARE: Final = 1 / 8
"""Side of the box, as a share of the image's, that a pixel is replaced by the mean of."""


@torch.inference_mode()
def deletion_and_insertion(
    model: Classifier, images_BCHW: torch.Tensor, heat_BHW: torch.Tensor, classes_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how soon the class's probability goes, and comes, with the hottest pixels first.

    Areas under the probability over the share of pixels replaced (Petsiuk et al. 2018); replaced
    pixels are blurred, not blackened, since a black hole is itself a finding. A faithful map has a
    small first number and a large second one.

    Returns:
        deletion_B and insertion_B, in [0, 1].
    """
    box = max(3, int(images_BCHW.shape[-1] * _BLUR_SHARE) // 2 * 2 + 1)
    blurred_BCHW = functional.avg_pool2d(
        images_BCHW, box, stride=1, padding=box // 2, count_include_pad=False
    )
    num = heat_BHW[0].numel()
    order_BP = heat_BHW.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank_BP = torch.empty_like(order_BP).scatter_(
        1, order_BP, torch.arange(num, device=order_BP.device).expand_as(order_BP).contiguous()
    )
    rank_B1HW = rank_BP.view(heat_BHW.shape)[:, None]
    curves: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
    for step in range(_STEPS + 1):
        hot_B1HW = rank_B1HW < num * step / _STEPS
        for curve, first, second in (
            (curves[0], blurred_BCHW, images_BCHW),
            (curves[1], images_BCHW, blurred_BCHW),
        ):
            probs_BK = model(torch.where(hot_B1HW, first, second)).float().softmax(1)
            curve.append(probs_BK.gather(1, classes_B[:, None])[:, 0])
    deletion_B, insertion_B = (torch.trapezoid(torch.stack(c), dim=0) / _STEPS for c in curves)
    return deletion_B, insertion_B


def mirror_agreement(
    model: Classifier, images_BCHW: torch.Tensor, heat_BHW: torch.Tensor, classes_B: torch.Tensor
) -> np.ndarray:
    """Return the rank correlations_B of maps with those of the mirrored images, turned back.

    Float64 in [-1, 1]; NaN where one of the two maps is flat.
    """
    mirrored_BHW, _ = heat_maps(model, images_BCHW.flip(3), classes_B)
    return rank_correlation(heat_BHW, mirrored_BHW.flip(2))


def share_outside(heat_BHW: torch.Tensor, inside_BHW: torch.Tensor) -> torch.Tensor:
    """Return the shares_B of the maps' heat that lies outside the head; NaN without any heat.

    Args:
        heat_BHW: of 0 or more.
        inside_BHW: bool, the head.
    """
    total_B = heat_BHW.sum((1, 2))
    return (heat_BHW * ~inside_BHW).sum((1, 2)) / torch.where(total_B > 0, total_B, torch.nan)


def randomised_similarity(
    model: Classifier,
    other: Classifier,
    images_BCHW: torch.Tensor,
    heat_BHW: torch.Tensor,
    classes_B: torch.Tensor,
) -> np.ndarray:
    """Return how alike a model's maps are to those of the same network with shuffled weights.

    The check of Adebayo et al. 2018: a map that stays when what was learnt is gone shows the
    picture and not the model.

    Args:
        model: the model.
        other: `shuffled` of it.
        images_BCHW: model input.
        heat_BHW: the model's maps.
        classes_B: the classes that they are for.

    Returns:
        Sizes of rank correlations_B, in [0, 1]; near 0 is what maps that depend on the model have.
        NaN where one of the maps is flat, which says nothing.
    """
    random_BHW, _ = heat_maps(other, images_BCHW, classes_B)
    return np.asarray(np.abs(rank_correlation(heat_BHW, random_BHW)))


@torch.no_grad()
def shuffled(model: Classifier, seed: int) -> Classifier:
    """Return a copy of a model whose weight matrices have their numbers in random order."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        if parameter.ndim > 1:
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return other.eval()


def rank_correlation(one_BHW: torch.Tensor, other_BHW: torch.Tensor) -> np.ndarray:
    """Return Spearman's correlations_B of each two maps, float64; NaN where one of them is flat."""
    ranks = [
        rankdata(heat.flatten(1).double().cpu().numpy(), axis=1) for heat in (one_BHW, other_BHW)
    ]
    centred = [r - r.mean(1, keepdims=True) for r in ranks]
    norm_B = np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    product_B = (centred[0] * centred[1]).sum(1)
    return np.asarray(product_B / np.where(norm_B > 0, norm_B, np.nan))
