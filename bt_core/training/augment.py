"""Augmentation of whole batches on the model's device, seeded."""

import math

import torch
from torch.nn import functional

from bt_core.training.recipe import AugmentSpec


def augment(unit_B1SS: torch.Tensor, spec: AugmentSpec, generator: torch.Generator) -> torch.Tensor:
    """Flip, rotate, zoom and change the contrast of each image on its own.

    Args:
        unit_B1SS: float32 images in [0, 1].
        spec: ranges of the random changes.
        generator: source of randomness, on the CPU; equal states give equal results.

    Returns:
        Images of the same shape in [0, 1]; what comes from outside an image is black.
    """
    batch, device = len(unit_B1SS), unit_B1SS.device

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(batch, generator=generator) * 2 - 1) * limit

    angle = uniform(math.radians(spec.rotation_degrees))
    scale = 1 + uniform(spec.zoom)
    flip = torch.ones(batch)
    if spec.horizontal_flip:
        flip = torch.where(torch.rand(batch, generator=generator) < 0.5, -1.0, 1.0)
    contrast = (1 + uniform(spec.contrast)).view(-1, 1, 1, 1).to(device)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = flip * angle.cos() / scale, -angle.sin() / scale
    theta[:, 1, 0], theta[:, 1, 1] = flip * angle.sin() / scale, angle.cos() / scale
    grid = functional.affine_grid(theta, list(unit_B1SS.shape), align_corners=False)
    moved = functional.grid_sample(unit_B1SS, grid.to(device), align_corners=False)
    mean = moved.mean((1, 2, 3), keepdim=True)
    return ((moved - mean) * contrast + mean).clamp(0, 1)
