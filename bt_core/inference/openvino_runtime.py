"""A member as an OpenVINO graph: exported, quantised, run. The only user of openvino and nncf.

Both are imported when they are needed, and never without `_without_telemetry`.

Shape suffixes: B batch, C channels, S side, K classes, D features.
"""

import contextlib
import io
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from bt_core.errors import UnavailableError, first_line, last_line
from bt_core.inference.runtime import Answer, PixelsToLogits, in_batches
from bt_core.models.bundle import EXPORTS, INT8_EXPORTS, RuntimeInfo
from bt_core.models.classifier import Classifier
from bt_core.models.inputs import Preprocessor

_CAPABILITY: Final = {"fp32": "FP32", "bf16": "BF16", "int8": "INT8"}
_HINT: Final = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""What is not quantised of an int8 graph stays in float32."""


class OpenVINORuntime:
    """An exported member on an x86 or ARM CPU.

    Args:
        files: content of its `exports`, by name.
        preprocessor: the member's.
        info: precision, and the batch size that was exported.
        num_threads: of this process.

    Raises:
        UnavailableError: if OpenVINO is not installed, cannot compile the files, or the CPU has no
            instructions for the precision.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        preprocessor: Preprocessor,
        info: RuntimeInfo,
        num_threads: int,
    ) -> None:
        self.info = info
        self._preprocessor = preprocessor if takes_images(preprocessor) else None
        core = _core()
        capabilities = _capabilities(core)
        if _CAPABILITY[info.precision] not in capabilities:
            raise UnavailableError(
                f"OpenVINO {_openvino_version()} finds no {info.precision} instructions on this "
                f"CPU (only {', '.join(capabilities)})"
            )
        if info.precision == "int8" and not _cpu_sums_int8():
            raise UnavailableError("this CPU has no int8 dot products (VNNI), and others overflow")
        names = INT8_EXPORTS if info.precision == "int8" else EXPORTS
        xml, weights = (files[name] for name in names)
        settings = {
            "INFERENCE_PRECISION_HINT": _HINT[info.precision],
            "INFERENCE_NUM_THREADS": num_threads,
            "NUM_STREAMS": 1,
            # Actors of one host would all be pinned to its first cores.
            "ENABLE_CPU_PINNING": False,
        }
        try:
            model = core.read_model(model=xml, weights=weights)
            self._compiled = core.compile_model(model, "CPU", settings)
        except Exception as error:  # whatever a reader or compiler raises
            raise UnavailableError(
                f"OpenVINO {_openvino_version()} cannot compile the export: {last_line(error)}"
            ) from error
        self._request = self._compiled.create_infer_request()

    @property
    def num_threads(self) -> int:
        """Threads that OpenVINO runs it on."""
        return int(self._compiled.get_property("INFERENCE_NUM_THREADS"))

    def run(self, pixels_BSS: np.ndarray) -> Answer:
        """Return logits and features, as `Runtime` says."""
        return in_batches(pixels_BSS, self.info.batch_size, self._forward)

    def _forward(self, pixels_BSS: np.ndarray) -> Answer:
        given = pixels_BSS
        if self._preprocessor is not None:
            given = np.ascontiguousarray(self._preprocessor.batch(pixels_BSS).numpy())
        found = self._request.infer([given], share_inputs=True)
        logits_BK, features_BD = (found[output] for output in self._compiled.outputs)
        return logits_BK, features_BD


def takes_images(preprocessor: Preprocessor) -> bool:
    """Return whether the exported graph takes a model's input instead of pixels.

    Standardised images are made outside: their mean and deviation are sums in float64, which
    OpenVINO computes in float32, or in bf16. With those, logits of a faint image moved by 0.035.
    """
    return preprocessor.spec.normalize == "zscore"


def export(classifier: Classifier, preprocessor: Preprocessor, batch_size: int) -> Any:
    """Return a member as an OpenVINO model with fixed shapes.

    Args:
        classifier: in evaluation mode, on the CPU.
        preprocessor: the member's.
        batch_size: pictures of each forward pass.

    Raises:
        UnavailableError: if OpenVINO is not installed, or has no counterpart of some operation.
    """
    side = preprocessor.spec.size_px
    whole = PixelsToLogits(classifier, preprocessor)
    graph: torch.nn.Module = whole
    example = torch.zeros(batch_size, side, side, dtype=torch.uint8)
    if takes_images(preprocessor):
        graph, example = _ImagesToLogits(whole), preprocessor.batch(example.numpy())
    openvino = _openvino()
    try:
        with torch.no_grad():
            exported = torch.export.export(graph.eval(), (example.contiguous(),))
        model = openvino.convert_model(exported)
        model.reshape({model.inputs[0]: list(example.shape)})
    except Exception as error:  # whatever a converter raises
        raise UnavailableError(f"it cannot be exported: {first_line(error)}") from error
    return model


def quantize(model: Any, pixels_NSS: np.ndarray, preprocessor: Preprocessor) -> Any:
    """Return an exported model in int8, its ranges taken from calibration scans.

    Args:
        model: of `export`.
        pixels_NSS: uint8, at least as many as the model's batch.
        preprocessor: the member's.

    Raises:
        UnavailableError: if NNCF is not installed, or cannot quantise the model.
    """
    size = model.inputs[0].partial_shape[0].get_length()
    whole = range(0, len(pixels_NSS) - size + 1, size)
    batches: Sequence[np.ndarray] = [pixels_NSS[i : i + size] for i in whole]
    if takes_images(preprocessor):
        batches = [preprocessor.batch(one).contiguous().numpy() for one in batches]
    _without_telemetry()
    try:
        import nncf
    except ImportError as error:
        raise UnavailableError("int8 needs NNCF: pip install 'bt[int8]'") from error
    nncf.set_log_level(logging.ERROR)
    attends = any("Attention" in one.get_type_name() for one in model.get_ops())
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # progress bars
            return nncf.quantize(
                model,
                nncf.Dataset(batches),
                model_type=nncf.ModelType.TRANSFORMER if attends else None,
                subset_size=len(batches),
            )
    except Exception as error:  # whatever a quantiser raises
        raise UnavailableError(f"NNCF: {type(error).__name__}: {error}") from error


def files_of(model: Any, names: tuple[str, str] = EXPORTS) -> dict[str, bytes]:
    """Return an OpenVINO model's files by name, with its weights as they are."""
    with tempfile.TemporaryDirectory() as folder:
        _openvino().save_model(model, f"{folder}/{names[0]}", compress_to_fp16=False)
        return {name: Path(folder, name).read_bytes() for name in names}


class _ImagesToLogits(torch.nn.Module):
    def __init__(self, whole: PixelsToLogits) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, images_BCSS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.whole.answer(images_BCSS)


def _without_telemetry() -> None:
    """Keep openvino and nncf from calling home.

    Importing either one sends an event to Google Analytics, as do converting and quantising,
    unless a file in the home folder says no. Both do without where `openvino_telemetry` cannot be
    imported, and `None` here makes Python refuse to import it: what sends is never loaded.
    """
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]


def _openvino() -> Any:
    _without_telemetry()
    try:
        import openvino
    except (ImportError, OSError) as error:
        raise UnavailableError("openvino is not installed here: pip install openvino") from error
    return openvino


def _openvino_version() -> str:
    return str(_openvino().get_version()).split("-")[0]


def _cpu_sums_int8() -> bool:
    """Return whether int8 products are summed in 32 bits; older x86 sums pairs of them in 16."""
    found = torch.cpu.get_capabilities()
    flags = ("avx512_vnni", "avx_vnni", "amx_int8")
    return found.get("architecture") != "x86_64" or any(found.get(flag) for flag in flags)


def _core() -> Any:
    return _openvino().Core()


def _capabilities(core: Any) -> list[str]:
    return list(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
