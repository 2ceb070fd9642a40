"""Ways to run one classifier, from stored pixels to logits. Torch in float32 is the reference.

Shape suffixes: B batch, C channels, S side, K classes, D features, N scans.
"""

from collections.abc import Callable, Mapping
from typing import Final, Protocol

import numpy as np
import torch
from scipy.special import softmax
from torch import nn

from bt_core.errors import UnavailableError
from bt_core.log import logger
from bt_core.models.bundle import Bundle, MemberInfo, RuntimeInfo
from bt_core.models.classifier import Classifier
from bt_core.models.inputs import Preprocessor
from bt_core.scans.preprocess import PreprocessSpec, golden_image, preprocess_pixels

MOST_FEATURES: Final = 2048
"""Wider features are means over neighbours."""

Answer = tuple[np.ndarray, np.ndarray]
"""logits_BK and features_BD, float32."""


class Runtime(Protocol):
    """One member, ready to answer."""

    info: RuntimeInfo
    """What runs, which is the reference where the host lacks what the bundle asks for."""

    def run(self, pixels_BSS: np.ndarray) -> Answer:
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
        return self.answer(self.preprocessor.normalize(self.preprocessor.to_unit(pixels_BSS)))

    def answer(self, images_BCSS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and features of a model's input."""
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
    def run(self, pixels_BSS: np.ndarray) -> Answer:
        """Return logits and features, as `Runtime` says."""
        if self._device.type == "cpu":
            return in_batches(pixels_BSS, self.info.batch_size, self._forward)
        return self._forward(np.array(pixels_BSS, np.uint8))

    def _forward(self, pixels_BSS: np.ndarray) -> Answer:
        logits_BK, features_BD = self._graph(torch.from_numpy(pixels_BSS).to(self._device))
        return logits_BK.cpu().numpy(), features_BD.cpu().numpy()


class CheckedRuntime:
    """A fast runtime whose doubtful answers are given once more in float32.

    Lower precision moves the probabilities of doubtful scans only: those of sure ones are close to
    0 and 1, where the softmax is flat.

    Args:
        fast: of lower precision.
        exact: in float32.
        info: has `exact_below`, the confidence that makes an answer doubtful.
    """

    def __init__(self, fast: Runtime, exact: Runtime, info: RuntimeInfo) -> None:
        self.info = info
        self._fast, self._exact = fast, exact

    def run(self, pixels_BSS: np.ndarray) -> Answer:
        """Return logits and features, as `Runtime` says."""
        logits_BK, features_BD = self._fast.run(pixels_BSS)
        doubtful_B = confidence(logits_BK) < self.info.exact_below
        if doubtful_B.any():
            logits_BK[doubtful_B], features_BD[doubtful_B] = self._exact.run(pixels_BSS[doubtful_B])
        return logits_BK, features_BD


def confidence(logits_BK: np.ndarray) -> np.ndarray:
    """Return the largest probability of each scan, confidence_B, without a temperature."""
    largest_B: np.ndarray = softmax(np.float64(logits_BK), axis=1).max(1)
    return largest_B


def in_batches(
    pixels_BSS: np.ndarray, size: int, forward: Callable[[np.ndarray], Answer]
) -> Answer:
    """Return the answers of a function that takes `size` pictures, filled up with black."""
    num = len(pixels_BSS)
    filled = np.pad(pixels_BSS, ((0, -num % size if num else size), (0, 0), (0, 0)))
    parts = [forward(filled[i : i + size]) for i in range(0, len(filled), size)]
    logits_BK, features_BD = (np.concatenate(own)[:num] for own in zip(*parts, strict=True))
    return logits_BK, features_BD


def load_runtime(
    bundle: Bundle,
    member: MemberInfo,
    preprocessor: Preprocessor,
    load: Callable[[], Classifier],
    device: torch.device,
) -> Runtime:
    """Return the runtime that the bundle chose for a member, or the reference, and say so.

    Args:
        bundle: holds exported files.
        member: says which runtime.
        preprocessor: the member's.
        load: gives the member's classifier on the device; not asked where an export does without.
        device: that the members are on.

    Raises:
        BundleError: if a file of the export is missing.
    """
    wanted = member.runtime
    if wanted.kind == "torch":
        return TorchRuntime(load(), preprocessor, wanted.batch_size)
    try:
        files = {n: bundle.read(f"members/{member.name}/{n}") for n in wanted.exports}
        runtime = start(load, preprocessor, wanted, files, device)
        known_BK = np.array(member.golden_probs)
        if not len(known_BK):  # a bundle from before they were kept
            reference = TorchRuntime(load(), preprocessor)
            known_BK = golden_probs(reference, preprocessor.spec, member.temperature)
        change = largest_change(
            golden_probs(runtime, preprocessor.spec, member.temperature), known_BK
        )
        if change > wanted.max_change:
            raise UnavailableError(
                f"on this host a probability of the golden picture is {change:.3f} from the "
                f"reference's; {wanted.max_change:g} is allowed"
            )
    except UnavailableError as error:
        logger.warning(
            "member %s runs as torch fp32 instead of %s %s: %s",
            member.name, wanted.kind, wanted.precision, error,
        )  # fmt: skip
        return TorchRuntime(load(), preprocessor)
    return runtime


def start(
    load: Callable[[], Classifier],
    preprocessor: Preprocessor,
    info: RuntimeInfo,
    files: Mapping[str, bytes],
    device: torch.device,
) -> Runtime:
    """Return a runtime other than the reference, with as many threads as torch has.

    Args:
        load: gives the classifier on its device, in evaluation mode.
        preprocessor: the member's.
        info: what to start.
        files: content of its `exports`, by name.
        device: that the members are on.

    Raises:
        UnavailableError: if this host cannot run it.
    """
    if info.exact_below:
        alone = info.model_copy(update={"exact_below": 0.0})
        fast = start(load, preprocessor, alone, files, device)
        if info.kind == "openvino":
            whole = alone.model_copy(update={"precision": "fp32"})
            return CheckedRuntime(fast, start(load, preprocessor, whole, files, device), info)
        return CheckedRuntime(fast, TorchRuntime(load(), preprocessor, info.batch_size), info)
    if info.kind == "compiled":
        from bt_core.inference.compiled_runtime import CompiledRuntime

        return CompiledRuntime(load(), preprocessor, info)
    from bt_core.inference.openvino_runtime import OpenVINORuntime

    if device.type != "cpu":
        raise UnavailableError(f"OpenVINO runs on the CPU, and the members are on {device.type}")
    return OpenVINORuntime(files, preprocessor, info, torch.get_num_threads())


def golden_change(
    runtime: Runtime, reference: Runtime, spec: PreprocessSpec, temperature: float
) -> float:
    """Return the largest difference between the probabilities of two runtimes, in [0, 1].

    Of the golden picture; 1 if either gives what is no number.
    """
    one, other = (golden_probs(r, spec, temperature) for r in (runtime, reference))
    return largest_change(one, other)


def largest_change(one_BK: np.ndarray, other_BK: np.ndarray) -> float:
    """Return the largest difference of two arrays of probabilities; 1 where one is no number."""
    return float(np.nan_to_num(np.abs(one_BK - other_BK), nan=1.0).max())


def golden_probs(runtime: Runtime, spec: PreprocessSpec, temperature: float) -> np.ndarray:
    """Return the probabilities (4, K) of the golden picture in four positions."""
    image_SS = preprocess_pixels(golden_image(), spec)
    golden_BSS = np.stack([np.rot90(image_SS, turns) for turns in range(4)])
    probs_BK: np.ndarray = softmax(np.float64(runtime.run(golden_BSS)[0]) / temperature, axis=1)
    return probs_BK
