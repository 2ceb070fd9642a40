"""The only path from stored pixels to logits.

Shape suffixes: M members, B batch, S side, K classes.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import torch
from opentelemetry import trace

from bt_core.errors import BundleError
from bt_core.inference.runtime import (
    Runtime,
    TorchRuntime,
    golden_probs,
    largest_change,
    load_runtime,
)
from bt_core.log import logger
from bt_core.models.bundle import Bundle, BundleInfo, MemberInfo
from bt_core.models.classifier import Classifier, rebuild_classifier
from bt_core.models.inputs import Preprocessor
from bt_core.scans.preprocess import PreprocessSpec
from bt_core.scans.thumbnails import THUMBNAIL

_tracer: Final = trace.get_tracer("bt")
_GOLDEN_TOLERANCE: Final = 0.02
"""Kernels of other CPUs and GPUs (TF32) add in other orders; a fault is far beyond."""


class Predictor:
    """The members of a bundle that can answer, loaded, on one device.

    Args:
        bundle: a verified bundle; a member that turns out not to load is left out of it.
        device: `cpu` or `cuda`.
        num_threads: threads of this process on the CPU, torch's and OpenVINO's; other numbers than
            one change the last bits of the answers.

    Raises:
        BundleError: if fewer members than the quorum load: their weights do not fit, or this host
            preprocesses the golden image differently, or answers on it otherwise.
    """

    def __init__(self, bundle: Bundle, device: str = "cpu", num_threads: int = 1) -> None:
        torch.set_num_threads(num_threads)
        self.device = torch.device(device)
        self._preprocessors: list[Preprocessor] = []
        self._loaders: list[Callable[[], Classifier]] = []
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
        # Of all members: what decodes scans does not know which of them load here.
        self.specs, places = needed_specs(bundle.info)
        of = dict(zip((m.name for m in bundle.info.members), places, strict=False))
        self.spec_of = tuple(of[m.name] for m in self.members)
        self.thumbnail = places[-1]
        """Place among `specs` of the thumbnail that the training index takes."""

    @property
    def models(self) -> list[Classifier]:
        """The members' classifiers, on the device; those that run as an export load now."""
        return [load() for load in self._loaders]

    @property
    def runtime_names(self) -> dict[str, str]:
        """What each member runs as, as in `openvino bf16`, by its name."""
        members = zip(self.members, self.runtimes, strict=True)
        return {m.name: f"{r.info.kind} {r.info.precision}" for m, r in members}

    def _load(self, bundle: Bundle, member: MemberInfo) -> None:
        preprocessor = Preprocessor(member.preprocess)
        if preprocessor.golden_digest != member.golden_digest:
            raise BundleError(
                f"member {member.name}: this host preprocesses the golden image differently "
                "from the one that trained it; install the versions of requirements.lock"
            )

        @functools.cache
        def load() -> Classifier:
            model = bundle.load_member(member).to(self.device)
            _check_golden(member, TorchRuntime(model, preprocessor))
            return model

        self.runtimes.append(load_runtime(bundle, member, preprocessor, load, self.device))
        self._loaders.append(load)
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
        return np.stack([self._run(m, pixels)[0] for m in asked])

    def first(self, pixels: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return the first member's logits_BK, and features_BD float32 that its head takes.

        Of a head that takes the whole feature map they are means over neighbours.
        """
        return self._run(0, pixels)

    def _run(self, m: int, pixels: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return logits_BK and features_BD of a member, as a span where there are traces."""
        with _tracer.start_as_current_span(f"member {self.members[m].name}"):
            return self.runtimes[m].run(pixels[self.spec_of[m]])

    def inputs(self, pixels: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Return each member's model input images_BCSS, on the device, of what `logits` takes."""
        members = zip(self._preprocessors, self.spec_of, strict=True)
        return [p.batch(pixels[i]).to(self.device) for p, i in members]


def _check_golden(member: MemberInfo, reference: TorchRuntime) -> None:
    """Refuse a host that computes another answer than the one on which the bundle was built.

    Raises:
        BundleError: with how far it is off.
    """
    if not member.golden_probs:
        return
    told = golden_probs(reference, member.preprocess, member.temperature)
    change = largest_change(told, np.array(member.golden_probs))
    if change > _GOLDEN_TOLERANCE:
        raise BundleError(
            f"member {member.name}: on this host a probability of the golden picture is "
            f"{change:.3f} from what it was where the bundle was built; {_GOLDEN_TOLERANCE:g} is "
            "allowed: install the versions of requirements.lock, or test this machine's memory"
        )


def needed_specs(info: BundleInfo) -> tuple[tuple[PreprocessSpec, ...], tuple[int, ...]]:
    """Return what a scan is made into to be answered: for the members, and as a thumbnail.

    Returns:
        The specs with distinct pixels, and places among them: of each member's, then of the
        thumbnail's.
    """
    return distinct_specs([*(member.preprocess for member in info.members), THUMBNAIL])


def distinct_specs(
    specs: Sequence[PreprocessSpec],
) -> tuple[tuple[PreprocessSpec, ...], tuple[int, ...]]:
    """Return the specs with distinct pixels, and for each given spec its place among them."""
    distinct: dict[str, PreprocessSpec] = {}
    for spec in specs:
        distinct.setdefault(spec.pixel_digest, spec)
    places = list(distinct)
    return tuple(distinct.values()), tuple(places.index(s.pixel_digest) for s in specs)


def with_golden_probs(
    info: BundleInfo, state_dicts: Mapping[str, dict[str, torch.Tensor]]
) -> BundleInfo:
    """Return the description of a bundle with what its members answer on the golden picture.

    Args:
        info: of a bundle that is built.
        state_dicts: weights by member name.
    """
    members = []
    for member in info.members:
        model = rebuild_classifier(member.model, member.preprocess, info.label_space.num_classes)
        model.load_state_dict(state_dicts[member.name])
        reference = TorchRuntime(model.eval(), Preprocessor(member.preprocess))
        probs_BK = golden_probs(reference, member.preprocess, member.temperature)
        rows = tuple(tuple(row) for row in probs_BK.tolist())
        members.append(member.model_copy(update={"golden_probs": rows}))
    return info.model_copy(update={"members": tuple(members)})
