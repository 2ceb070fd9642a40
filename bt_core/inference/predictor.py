"""The only path from stored pixels to logits.

Shape suffixes: M members, B batch, S side, K classes.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from bt_core.errors import BundleError
from bt_core.inference.runtime import Runtime, load_runtime
from bt_core.log import logger
from bt_core.models.bundle import Bundle, MemberInfo
from bt_core.models.classifier import Classifier
from bt_core.models.inputs import Preprocessor
from bt_core.scans.preprocess import PreprocessSpec


class Predictor:
    """The members of a bundle that can answer, loaded, on one device.

    Args:
        bundle: a verified bundle; a member that turns out not to load is left out of it.
        device: `cpu` or `cuda`.
        num_threads: threads of this process on the CPU, torch's and OpenVINO's; other numbers than
            one change the last bits of the answers.

    Raises:
        BundleError: if fewer members than the quorum load: their weights do not fit, or this host
            preprocesses the golden image differently.
    """

    def __init__(self, bundle: Bundle, device: str = "cpu", num_threads: int = 1) -> None:
        torch.set_num_threads(num_threads)
        self.device = torch.device(device)
        self._preprocessors: list[Preprocessor] = []
        self.models: list[Classifier] = []
        self.runtimes: list[Runtime] = []
        for member in bundle.usable():
            try:
                self._load(bundle, member)
            except BundleError as error:
                bundle.leave_out(member.name, error)
        self.members = bundle.usable()
        """Those that answer, in the bundle's order."""
        for name, why in bundle.unusable.items():
            logger.warning("member %s does not answer: %s", name, why)
        self.specs, self.spec_of = distinct_specs([m.preprocess for m in self.members])

    @property
    def fallbacks(self) -> dict[str, str]:
        """Members that run as the reference instead of as the bundle asks, with the reason."""
        members = zip(self.members, self.runtimes, strict=True)
        return {m.name: runtime.fallback for m, runtime in members if runtime.fallback}

    def _load(self, bundle: Bundle, member: MemberInfo) -> None:
        preprocessor = Preprocessor(member.preprocess)
        if preprocessor.golden_digest != member.golden_digest:
            raise BundleError(
                f"member {member.name}: this host preprocesses the golden image differently "
                "from the one that trained it; install the versions of requirements.lock"
            )
        model = bundle.load_member(member).to(self.device)
        self.runtimes.append(load_runtime(bundle, member, model, preprocessor))
        self.models.append(model)
        self._preprocessors.append(preprocessor)

    def logits(
        self, pixels: Sequence[np.ndarray], members: Iterable[int] | None = None
    ) -> np.ndarray:
        """Return logits_MBK float32.

        Args:
            pixels: for each of `specs`, in their order, pixels_BSS uint8 of the same B scans.
            members: places in `members` of those to ask, M of them; None asks all.
        """
        asked = range(len(self.runtimes)) if members is None else members
        return np.stack([self.runtimes[m].run(pixels[self.spec_of[m]])[0] for m in asked])

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
