"""A member compiled by PyTorch to kernels of this host's own.

Shape suffixes: B batch, S side.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Final

import numpy as np
import torch

from bt_core.errors import UnavailableError, first_line
from bt_core.inference.runtime import Answer, PixelsToLogits, in_batches
from bt_core.models.bundle import RuntimeInfo
from bt_core.models.classifier import Classifier
from bt_core.models.inputs import Preprocessor

_CUDA_BATCH: Final = 64
"""Scans of a CUDA graph, whose shapes are fixed."""


class CompiledRuntime:
    """PyTorch compiled to kernels of this host's own; CUDA graphs on GPUs.

    The host needs a C++ compiler (for a GPU, Triton). Compiling takes from ten seconds to minutes
    the first time; later processes of this host find the kernels in torch's cache.

    Args:
        classifier: on its device, in evaluation mode.
        preprocessor: the member's.
        info: `precision` fp32 or bf16, by autocast.

    Raises:
        UnavailableError: if it cannot be compiled here, or the CPU has no bf16 instructions.
    """

    def __init__(
        self, classifier: Classifier, preprocessor: Preprocessor, info: RuntimeInfo
    ) -> None:
        self.info = info
        self._device = next(classifier.parameters()).device
        on_cpu = self._device.type == "cpu"
        if info.precision == "bf16" and on_cpu and not _cpu_has_bf16():
            raise UnavailableError("this CPU has no bf16 instructions")
        self._size = info.batch_size if on_cpu else _CUDA_BATCH
        self._graph = torch.compile(
            PixelsToLogits(classifier, preprocessor),
            fullgraph=True,
            dynamic=False,
            mode=None if on_cpu else "reduce-overhead",
            options={"freezing": True} if on_cpu else None,
        )
        # A CUDA graph belongs to the thread that recorded it.
        self._thread = None if on_cpu else ThreadPoolExecutor(1)
        black_BSS = np.zeros((self._size, *[preprocessor.spec.size_px] * 2), np.uint8)
        try:
            with torch._inductor.config.patch(compile_threads=torch.get_num_threads()):
                for _ in range(1 if on_cpu else 3):  # to warm up, to record, to replay
                    self.run(black_BSS)
        except Exception as error:  # whatever a compiler raises
            said = f"{type(error).__name__}: {first_line(error)}"
            raise UnavailableError(f"torch.compile: {said}") from error

    def run(self, pixels_BSS: np.ndarray) -> Answer:
        """Return logits and features, as `Runtime` says."""
        if self._thread is None:
            return in_batches(pixels_BSS, self._size, self._forward)
        return self._thread.submit(in_batches, pixels_BSS, self._size, self._forward).result()

    @torch.inference_mode()
    def _forward(self, pixels_BSS: np.ndarray) -> Answer:
        is_half = self.info.precision == "bf16"
        precision = torch.autocast(self._device.type, torch.bfloat16) if is_half else nullcontext()
        with precision:
            logits_BK, features_BD = self._graph(torch.from_numpy(pixels_BSS).to(self._device))
        # A copy: the next replay of a CUDA graph writes over what this one gave.
        return logits_BK.cpu().numpy().copy(), features_BD.cpu().numpy().copy()


def _cpu_has_bf16() -> bool:
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))
