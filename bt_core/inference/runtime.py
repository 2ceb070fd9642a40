"""Ways to run one classifier, from stored pixels to logits. Torch in float32 is the reference.

Shape suffixes: B batch, C channels, S side, K classes, D features.
"""

from typing import Final, Protocol

import numpy as np
import torch
from torch import nn

from bt_core.models.bundle import Bundle, MemberInfo, RuntimeInfo
from bt_core.models.classifier import Classifier
from bt_core.models.inputs import Preprocessor

MOST_FEATURES: Final = 2048
"""Wider features are means over neighbours."""


class Runtime(Protocol):
    """One member, ready to answer."""

    info: RuntimeInfo
    """What runs, which is the reference where the host lacks what the bundle asks for."""

    def run(self, pixels_BSS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return logits_BK and features_BD, what the head is given, float32, of pixels uint8.

        The same picture gives the same answer, to the last bit, alone or among others.
        """


class PixelsToLogits(nn.Module):
    """A member as one graph: from pixels_BSS uint8 to logits_BK and features_BD, both float32.

    Features are those of the plain view; of a head that takes the whole feature map they are means
    over neighbours, `MOST_FEATURES` of them.
    """

    def __init__(self, classifier: Classifier, preprocessor: Preprocessor) -> None:
        super().__init__()
        self.classifier = classifier
        self.preprocessor = preprocessor

    def forward(self, pixels_BSS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and features."""
        images_BCSS = self.preprocessor.normalize(self.preprocessor.to_unit(pixels_BSS))
        logits_BK, features_BD = self.classifier.forward_with_features(images_BCSS)
        if features_BD.shape[1] > MOST_FEATURES:
            pooled = nn.functional.adaptive_avg_pool1d(features_BD[:, None], MOST_FEATURES)
            features_BD = pooled[:, 0]
        return logits_BK.float(), features_BD.float()


class TorchRuntime:
    """Eager PyTorch in float32: the reference.

    Args:
        classifier: on its device, in evaluation mode.
        preprocessor: the member's.
        batch_size: scans for each forward pass on a CPU, always: short batches are filled up with
            black. The order of float32 sums depends on the batch's size (and on the number of
            threads, hence one), so this makes a scan's answer the same alone or among others. Four
            is also the fastest: activations stay in the cache. MobileNetV2 at 128 px on one thread
            gave 217 images/s with 4 and 139 with 64.
    """

    def __init__(
        self, classifier: Classifier, preprocessor: Preprocessor, batch_size: int = 4
    ) -> None:
        self.info = RuntimeInfo(batch_size=batch_size)
        self._graph = PixelsToLogits(classifier, preprocessor)
        self._device = next(classifier.parameters()).device

    @torch.inference_mode()
    def run(self, pixels_BSS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return logits and features, as `Runtime` says."""
        num, step = len(pixels_BSS), max(1, len(pixels_BSS))
        if self._device.type == "cpu":
            step = self.info.batch_size
            pixels_BSS = np.pad(pixels_BSS, ((0, -num % step), (0, 0), (0, 0)))
        pixels = torch.from_numpy(np.array(pixels_BSS, dtype=np.uint8))
        parts = [
            self._graph(pixels[i : i + step].to(self._device)) for i in range(0, len(pixels), step)
        ]
        logits_BK, features_BD = (
            torch.cat(own).cpu().numpy()[:num] for own in zip(*parts, strict=True)
        )
        return logits_BK, features_BD


def load_runtime(
    bundle: Bundle,
    member: MemberInfo,
    classifier: Classifier,
    preprocessor: Preprocessor,
) -> Runtime:
    """Return the runtime that the bundle chose for a member, or the reference.

    Args:
        bundle: holds exported files.
        member: says which runtime.
        classifier: the member's, on its device.
        preprocessor: the member's.
    """
    return TorchRuntime(classifier, preprocessor)
