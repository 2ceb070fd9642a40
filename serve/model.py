"""The deployment that holds the ensemble and answers batches."""

import asyncio
import contextvars
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from ray import serve

from bt_core.ensemble.ensemble import Ensemble
from bt_core.models.bundle import Bundle
from serve.settings import REQUEST_SECONDS

MAX_BATCH: Final = 16
"""Scans of online requests that a gateway has answered together."""
_JOB_SLICE: Final = 4
"""Scans of a job that are answered in one go: so long an online request may have to wait."""


@serve.deployment(max_ongoing_requests=4 * MAX_BATCH, graceful_shutdown_timeout_s=REQUEST_SECONDS)
class EnsembleDeployment:
    """Loads a bundle once; its replicas answer in batches.

    Args:
        bundle_location: folder of the bundle, readable on every node.
        device: `cpu` or `cuda`.
        num_threads: torch threads of a replica on the CPU.
        cascade: let the first member answer alone where the bundle says that this is safe.
    """

    def __init__(
        self, bundle_location: str, device: str, num_threads: int, cascade: bool = True
    ) -> None:
        self._ensemble = Ensemble(Bundle(bundle_location), device, num_threads, cascade)
        self._thread = ThreadPoolExecutor(1)
        self._job_slices = asyncio.Semaphore(1)

    def bundle_id(self) -> str:
        """Return the id of the loaded bundle; answering at all says that it is loaded."""
        return self._ensemble.info.bundle_id

    async def predict(
        self, pixels: Sequence[np.ndarray], pixel_sha256: Sequence[str], gates: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Answer scans of online requests in one go, as `Ensemble.answer` does.

        Damaged ones never get here, so none spoils a batch.
        """
        return await self._answer(pixels, pixel_sha256, gates)

    async def answer(
        self, pixels: Sequence[np.ndarray], pixel_sha256: Sequence[str], gates: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Answer many scans of a job, as `Ensemble.answer` does, a few at a time.

        Online requests go in between, so that they wait for a few scans at most.
        """
        answers: list[dict[str, Any]] = []
        for i in range(0, len(pixel_sha256), _JOB_SLICE):
            part = slice(i, i + _JOB_SLICE)
            own = [pixels_BSS[part] for pixels_BSS in pixels]
            async with self._job_slices:  # however many workers a job has
                answers += await self._answer(own, pixel_sha256[part], gates[part])
        return answers

    async def _answer(
        self, pixels: Sequence[np.ndarray], pixel_sha256: Sequence[str], gates: Sequence[str]
    ) -> list[dict[str, Any]]:
        traced = contextvars.copy_context().run  # its spans belong to the request
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, traced, self._ensemble.answer, pixels, pixel_sha256, gates
        )
