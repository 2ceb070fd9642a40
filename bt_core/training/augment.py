"""Augmentation of whole batches on the model's device, seeded.

Shape suffixes: B batch, C channels, S side, K classes; 1 is one channel.
"""

import math
from collections.abc import Callable

import torch
from torch.nn import functional

from bt_core.training.spec import AugmentSpec

Mixing = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def augment(unit_B1SS: torch.Tensor, spec: AugmentSpec, generator: torch.Generator) -> torch.Tensor:
    """Move and change the intensities of each image on its own.

    Args:
        unit_B1SS: float32 images in [0, 1].
        spec: ranges of the random changes.
        generator: source of randomness, on the CPU; equal states give equal results.

    Returns:
        Images of the same shape in [0, 1]; what comes from outside an image is black.
    """
    batch, device = len(unit_B1SS), unit_B1SS.device
    theta_B23 = _affine(batch, spec, generator).to(device)
    contrast, brightness, noise = (
        _uniform(batch, limit, generator).view(-1, 1, 1, 1).to(device)
        for limit in (spec.contrast, spec.brightness, spec.noise)
    )
    grid = functional.affine_grid(theta_B23, list(unit_B1SS.shape), align_corners=False)
    moved = functional.grid_sample(unit_B1SS, grid, align_corners=False)
    mean = moved.mean((1, 2, 3), keepdim=True)
    changed = (moved - mean) * (1 + contrast) + mean + brightness
    if (
        spec.noise
    ):  # drawn where it is used: millions of numbers are slow to draw elsewhere and send
        seed = int(torch.randint(2**62, (1,), generator=generator))
        own = torch.Generator(device).manual_seed(seed)
        changed += noise * torch.randn(changed.shape, generator=own, device=device)
    return changed.clamp(0, 1)


def build_mixing(spec: AugmentSpec, num_classes: int) -> Mixing:
    """Return a function from images_BCSS and labels_B to mixed images_BCSS and targets_BK.

    It draws from torch's own generator, one share for each batch (mixup: arXiv 1710.09412, cutmix:
    arXiv 1905.04899). Targets are float32 shares of the classes; without mixing, 0 and 1.
    """
    if not spec.mixup_alpha and not spec.cutmix_alpha:
        return lambda images_BCSS, labels_B: (
            images_BCSS,
            functional.one_hot(labels_B, num_classes).float(),
        )
    from torchvision.transforms import v2

    kinds = ((v2.MixUp, spec.mixup_alpha), (v2.CutMix, spec.cutmix_alpha))
    mixes = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
    choose: Mixing = v2.RandomChoice(mixes)
    return choose


def _affine(batch: int, spec: AugmentSpec, generator: torch.Generator) -> torch.Tensor:
    """Return theta_B23, from output to input coordinates: flip(rotate(shear(x))) / zoom + shift."""
    angle = _uniform(batch, math.radians(spec.rotation_degrees), generator)
    scale = 1 + _uniform(batch, spec.zoom, generator)
    shear = _uniform(batch, math.radians(spec.shear_degrees), generator).tan()
    shift_B2 = _uniform(2 * batch, 2 * spec.shift, generator).view(batch, 2)
    flips = (spec.horizontal_flip, spec.vertical_flip)
    flip_x, flip_y = (_signs(batch, generator) if asked else torch.ones(batch) for asked in flips)
    rows = (
        (flip_x * angle.cos(), flip_x * (shear * angle.cos() - angle.sin())),
        (flip_y * angle.sin(), flip_y * (shear * angle.sin() + angle.cos())),
    )
    linear_B22 = torch.stack([torch.stack(row, 1) for row in rows], 1) / scale.view(-1, 1, 1)
    return torch.cat([linear_B22, shift_B2.unsqueeze(2)], 2)


def _uniform(num: int, limit: float, generator: torch.Generator) -> torch.Tensor:
    return (torch.rand(num, generator=generator) * 2 - 1) * limit


def _signs(num: int, generator: torch.Generator) -> torch.Tensor:
    return torch.where(torch.rand(num, generator=generator) < 0.5, -1.0, 1.0)
