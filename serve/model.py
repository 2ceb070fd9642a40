"""The deployment that holds the ensemble and answers in batches."""

import asyncio
from typing import Any, Final

import numpy as np
from ray import serve

from bt_core.ensemble.ensemble import Ensemble
from bt_core.models.bundle import Bundle
from serve.service import Scan

MAX_BATCH: Final = 16


@serve.deployment(max_ongoing_requests=4 * MAX_BATCH)
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

    def bundle_id(self) -> str:
        """Return the id of the loaded bundle; answering at all says that it is loaded."""
        return self._ensemble.info.bundle_id

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.005)  # type: ignore[untyped-decorator]
    async def predict(self, scans: list[Scan]) -> list[dict[str, Any]]:
        """Answer decoded scans; damaged ones never get here, so none spoils a batch."""
        pixels = [
            np.stack([scan[0][i] for scan in scans]) for i in range(len(self._ensemble.specs))
        ]
        digests, gates = [scan[1] for scan in scans], [scan[2] for scan in scans]
        return await asyncio.to_thread(self._ensemble.answer, pixels, digests, gates)
