"""From stored pixels to a model's input tensor: one code path for training, batch scoring and HTTP.

Shape suffixes: B batch, S side; 1 and 3 are numbers of channels.
"""

from functools import cached_property
from typing import Final

import numpy as np
import torch

from bt_core import storage
from bt_core.scans.preprocess import PreprocessSpec, golden_image, preprocess_pixels

NUM_CHANNELS: Final = 3
"""Grey is repeated to three channels, as ImageNet backbones expect."""


class Preprocessor:
    """Makes a model's input from stored pixels, by a spec whose `mean` and `std` are resolved.

    Raises:
        ValueError: if `mean` or `std` is still None.
    """

    def __init__(self, spec: PreprocessSpec) -> None:
        if spec.mean is None or spec.std is None:
            raise ValueError("resolve mean and std from the backbone first")
        self.spec = spec
        self._mean_3 = torch.tensor(spec.mean).view(1, NUM_CHANNELS, 1, 1)
        self._std_3 = torch.tensor(spec.std).view(1, NUM_CHANNELS, 1, 1)

    @staticmethod
    def to_unit(pixels_BSS: torch.Tensor) -> torch.Tensor:
        """Return images_B1SS float32 in [0, 1] from pixels_BSS uint8; what augmentation gets."""
        return pixels_BSS.unsqueeze(1).to(torch.float32) / 255.0

    def normalize(self, unit_B1SS: torch.Tensor) -> torch.Tensor:
        """Return images_B3SS float32, `(unit - mean) / std`, grey repeated to three channels.

        The memory format is channels-last, in which convolutions run faster on CPUs and GPUs alike.
        """
        mean, std = self._mean_3.to(unit_B1SS.device), self._std_3.to(unit_B1SS.device)
        return ((unit_B1SS - mean) / std).contiguous(memory_format=torch.channels_last)

    def batch(self, pixels_BSS: np.ndarray) -> torch.Tensor:
        """Return the model input images_B3SS float32 of pixels_BSS uint8."""
        return self.normalize(self.to_unit(torch.from_numpy(np.array(pixels_BSS, dtype=np.uint8))))

    @cached_property
    def golden_digest(self) -> str:
        """SHA-256 of the model input of a fixed image: equal on all hosts that may use it."""
        tensor = self.batch(preprocess_pixels(golden_image(), self.spec)[None])
        return storage.sha256(np.ascontiguousarray(tensor.numpy()).tobytes())
