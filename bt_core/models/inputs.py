"""From stored pixels to a model's input tensor: one code path for training, batch scoring and HTTP.

Shape suffixes: B batch, C channels, S side; 1 is one channel.
"""

from functools import cached_property
from typing import Final

import numpy as np
import torch

from bt_core import storage
from bt_core.scans.preprocess import PreprocessSpec, golden_image, preprocess_pixels

_MIN_STD: Final = 1e-6


class Preprocessor:
    """Makes a model's input from stored pixels, by a spec whose normalisation is resolved.

    Raises:
        ValueError: if the backbone's `mean` or `std` is asked for and still None.
    """

    def __init__(self, spec: PreprocessSpec) -> None:
        mean, std = spec.mean, spec.std
        if spec.normalize != "backbone":
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if mean is None or std is None:
            raise ValueError("resolve mean and std from the backbone first")
        self.spec = spec
        self._mean_C = torch.tensor(mean).view(spec.channels, -1).mean(1)
        self._std_C = torch.tensor(std).view(spec.channels, -1).mean(1)

    @staticmethod
    def to_unit(pixels_BSS: torch.Tensor) -> torch.Tensor:
        """Return images_B1SS float32 in [0, 1] from pixels_BSS uint8; what augmentation gets."""
        return pixels_BSS.unsqueeze(1).to(torch.float32) / 255.0

    def normalize(self, unit_B1SS: torch.Tensor) -> torch.Tensor:
        """Return images_BCSS float32, normalised by the spec, grey repeated to its channels.

        The memory format is channels-last, in which convolutions run faster on CPUs and GPUs alike.
        """
        if self.spec.normalize == "zscore":
            unit_B1SS = _zscore(unit_B1SS)
        mean, std = (
            values.view(1, -1, 1, 1).to(unit_B1SS.device) for values in (self._mean_C, self._std_C)
        )
        return ((unit_B1SS - mean) / std).contiguous(memory_format=torch.channels_last)

    def batch(self, pixels_BSS: np.ndarray) -> torch.Tensor:
        """Return the model input images_BCSS float32 of pixels_BSS uint8."""
        return self.normalize(self.to_unit(torch.from_numpy(np.array(pixels_BSS, dtype=np.uint8))))

    @cached_property
    def golden_digest(self) -> str:
        """SHA-256 of the model input of a fixed image: equal on all hosts that may use it."""
        tensor = self.batch(preprocess_pixels(golden_image(), self.spec)[None])
        return storage.sha256(np.ascontiguousarray(tensor.numpy()).tobytes())


def _zscore(unit_B1SS: torch.Tensor) -> torch.Tensor:
    """Give each image mean 0 and standard deviation 1; a flat one becomes 0.

    Sums are in float64, so that an image's answer does not depend on the order in which a batch or
    several threads add its pixels.
    """
    exact = unit_B1SS.double()
    std, mean = torch.std_mean(exact, dim=(1, 2, 3), correction=0, keepdim=True)
    return ((exact - mean) / std.clamp(min=_MIN_STD)).to(unit_B1SS.dtype)
