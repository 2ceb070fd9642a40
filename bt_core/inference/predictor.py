"""The only path from stored pixels to logits.

Shape suffixes: M members, B batch, S side, K classes.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch.nn import functional

from bt_core.errors import BundleError
from bt_core.models.bundle import Bundle
from bt_core.models.classifier import Classifier
from bt_core.models.inputs import Preprocessor
from bt_core.scans.preprocess import PreprocessSpec

_CPU_CHUNK: Final = 4
"""Scans per forward pass on a CPU, always: short batches are filled up with black. The order of
float32 sums depends on the batch's size (and on the number of threads, hence one), so this makes a
scan's answer the same to the last bit alone or among others. It is also the fastest size, since
activations stay in the cache: MobileNetV2 at 128 px on one thread gave 217 images/s with 4 and 139
with 64."""

_MOST_FEATURES: Final = 2048


class Predictor:
    """All members of a bundle, loaded, on one device.

    Args:
        bundle: a verified bundle.
        device: `cpu` or `cuda`.
        num_threads: torch threads of this process on the CPU; other numbers than one change the
            last bits of the answers.

    Raises:
        BundleError: if weights do not fit, or this host preprocesses the golden image differently.
    """

    def __init__(self, bundle: Bundle, device: str = "cpu", num_threads: int = 1) -> None:
        torch.set_num_threads(num_threads)
        self.device = torch.device(device)
        self.specs, self.spec_of = distinct_specs([m.preprocess for m in bundle.info.members])
        self._preprocessors: list[Preprocessor] = []
        self.models: list[Classifier] = []
        for member in bundle.info.members:
            preprocessor = Preprocessor(member.preprocess)
            if preprocessor.golden_digest != member.golden_digest:
                raise BundleError(
                    f"member {member.name}: this host preprocesses the golden image differently "
                    "from the one that trained it; install the versions of requirements.lock"
                )
            self._preprocessors.append(preprocessor)
            self.models.append(bundle.load_member(member).to(self.device))

    @torch.inference_mode()
    def logits(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Return logits_MBK float32.

        Args:
            pixels: for each of `specs`, in their order, pixels_BSS uint8 of the same B scans.
        """
        members = zip(self.models, self._preprocessors, self.spec_of, strict=True)
        return np.stack([self._member_logits(m, p, pixels[i]) for m, p, i in members])

    def logits_and_features(self, pixels: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return what `logits` does, and features_BD float32 that the first member's head takes.

        Of a head that takes the whole feature map they are means over neighbours, `_MOST_FEATURES`.
        """
        first, kept = self.models[0], []
        hook = first.head.register_forward_pre_hook(
            lambda module, inputs: kept.append(inputs[0].float().cpu())
        )
        try:
            logits_MBK = self.logits(pixels)
        finally:
            hook.remove()
        plain = kept[:: 1 + len(first.flips)]  # of mirrored views none
        features = torch.cat(plain)[: logits_MBK.shape[1]]
        if features.shape[1] > _MOST_FEATURES:
            features = functional.adaptive_avg_pool1d(features[:, None], _MOST_FEATURES)[:, 0]
        features_BD: np.ndarray = features.numpy()
        return logits_MBK, features_BD

    def inputs(self, pixels: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Return each member's model input images_BCSS, on the device, of what `logits` takes."""
        members = zip(self._preprocessors, self.spec_of, strict=True)
        return [p.batch(pixels[i]).to(self.device) for p, i in members]

    def _member_logits(
        self, model: torch.nn.Module, preprocessor: Preprocessor, pixels_BSS: np.ndarray
    ) -> np.ndarray:
        num, step = len(pixels_BSS), len(pixels_BSS)
        if self.device.type == "cpu":
            step = _CPU_CHUNK
            pixels_BSS = np.pad(pixels_BSS, ((0, -num % step), (0, 0), (0, 0)))
        parts = [
            model(preprocessor.batch(pixels_BSS[i : i + step]).to(self.device)).float().cpu()
            for i in range(0, len(pixels_BSS), step)
        ]
        logits_BK: np.ndarray = torch.cat(parts).numpy()[:num]
        return logits_BK


def distinct_specs(
    specs: Sequence[PreprocessSpec],
) -> tuple[tuple[PreprocessSpec, ...], tuple[int, ...]]:
    """Return the specs with distinct pixels, and for each given spec its place among them."""
    distinct: dict[str, PreprocessSpec] = {}
    for spec in specs:
        distinct.setdefault(spec.pixel_digest, spec)
    places = list(distinct)
    return tuple(distinct.values()), tuple(places.index(s.pixel_digest) for s in specs)
