"""The only path from stored pixels to logits.

Shape suffixes: M members, B batch, S side, K classes.
"""

from collections.abc import Sequence

import numpy as np
import torch

from bt_core.errors import BundleError
from bt_core.inference.runtime import Runtime, load_runtime
from bt_core.models.bundle import Bundle
from bt_core.models.classifier import Classifier
from bt_core.models.inputs import Preprocessor
from bt_core.scans.preprocess import PreprocessSpec


class Predictor:
    """All members of a bundle, loaded, on one device.

    Args:
        bundle: a verified bundle.
        device: `cpu` or `cuda`.
        num_threads: threads of this process on the CPU, torch's and OpenVINO's; other numbers than
            one change the last bits of the answers.

    Raises:
        BundleError: if weights do not fit, or this host preprocesses the golden image differently.
    """

    def __init__(self, bundle: Bundle, device: str = "cpu", num_threads: int = 1) -> None:
        torch.set_num_threads(num_threads)
        self.device = torch.device(device)
        self.specs, self.spec_of = distinct_specs([m.preprocess for m in bundle.info.members])
        self._preprocessors: list[Preprocessor] = []
        self.models: list[Classifier] = []
        self.runtimes: list[Runtime] = []
        for member in bundle.info.members:
            preprocessor = Preprocessor(member.preprocess)
            if preprocessor.golden_digest != member.golden_digest:
                raise BundleError(
                    f"member {member.name}: this host preprocesses the golden image differently "
                    "from the one that trained it; install the versions of requirements.lock"
                )
            self._preprocessors.append(preprocessor)
            model = bundle.load_member(member).to(self.device)
            self.models.append(model)
            self.runtimes.append(load_runtime(bundle, member, model, preprocessor))
        self.names = [member.name for member in bundle.info.members]

    @property
    def fallbacks(self) -> dict[str, str]:
        """Members that run as the reference instead of as the bundle asks, with the reason."""
        members = zip(self.names, self.runtimes, strict=True)
        return {name: runtime.fallback for name, runtime in members if runtime.fallback}

    def logits(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Return logits_MBK float32.

        Args:
            pixels: for each of `specs`, in their order, pixels_BSS uint8 of the same B scans.
        """
        return self.logits_and_features(pixels)[0]

    def logits_and_features(self, pixels: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return what `logits` does, and features_BD float32 that the first member's head takes.

        Of a head that takes the whole feature map they are means over neighbours.
        """
        found = [r.run(pixels[i]) for r, i in zip(self.runtimes, self.spec_of, strict=True)]
        return np.stack([logits_BK for logits_BK, _ in found]), found[0][1]

    def inputs(self, pixels: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Return each member's model input images_BCSS, on the device, of what `logits` takes."""
        members = zip(self._preprocessors, self.spec_of, strict=True)
        return [p.batch(pixels[i]).to(self.device) for p, i in members]


def distinct_specs(
    specs: Sequence[PreprocessSpec],
) -> tuple[tuple[PreprocessSpec, ...], tuple[int, ...]]:
    """Return the specs with distinct pixels, and for each given spec its place among them."""
    distinct: dict[str, PreprocessSpec] = {}
    for spec in specs:
        distinct.setdefault(spec.pixel_digest, spec)
    places = list(distinct)
    return tuple(distinct.values()), tuple(places.index(s.pixel_digest) for s in specs)
