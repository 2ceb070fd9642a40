"""What answers requests: decode within bounds, ask the ensemble. Knows neither HTTP nor Ray."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from bt_core import storage
from bt_core.ensemble.ensemble import preprocess_digest
from bt_core.ensemble.review import of_frame
from bt_core.errors import ScanError, status_of
from bt_core.inference.predictor import needed_specs
from bt_core.models.bundle import BundleInfo
from bt_core.scans.gate import GATE_REJECTS
from serve.decoding import UploadDecoder
from serve.settings import ServeSettings

Scan = tuple[list[np.ndarray], str, str]
"""Pixels_SS uint8 for each spec of the bundle, the pixel digest, and what the input gate says."""
Upload = tuple[bytes, str]
"""The bytes of a scan, and its file name or media type."""


class OverloadedError(Exception):
    """Nothing can answer in time now; the same request may be answered shortly."""


@dataclass(frozen=True)
class HostedBundle:
    """A bundle that answers.

    Attributes:
        info: its description.
        predict: asks for the answer on a decoded scan; raises OverloadedError.
        loaded_id: asks which bundle is loaded; raises OverloadedError while none is.
    """

    info: BundleInfo
    predict: Callable[[Scan], Awaitable[dict[str, Any]]]
    loaded_id: Callable[[], Awaitable[str]]


class Service:
    """Answers uploads.

    Args:
        settings: limits.
        ensemble: what answers.
    """

    def __init__(self, settings: ServeSettings, ensemble: HostedBundle) -> None:
        self.settings = settings
        self.ensemble = ensemble
        self._decoder = UploadDecoder(settings.decoders_per_gateway)
        self._num_in_flight = 0

    async def answer_all(self, uploads: Sequence[Upload]) -> list[dict[str, Any]]:
        """Return a result for each upload, in their order; one that is no scan spoils no other.

        Raises:
            OverloadedError: if one of them could not be answered in time.
        """
        with self._admitted(len(uploads)):
            tasks = [asyncio.ensure_future(self.answer(*upload)) for upload in uploads]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()

    async def answer(self, content: bytes, hint: str) -> dict[str, Any]:
        """Return the fields of a prediction, or of a refusal: status, reason and detail.

        Raises:
            OverloadedError: if it could not be answered in time.
        """
        ensemble = self.ensemble  # another bundle may take its place in between
        specs, _ = needed_specs(ensemble.info)
        digest = storage.sha256(content)
        fields = {
            "scan_id": digest[:20],
            "content_sha256": digest,
            "bundle_id": ensemble.info.bundle_id,
            "preprocess_digest": preprocess_digest(ensemble.info),
        }
        try:
            pixels, pixel_sha256, frame, gate = await self._decoder.decode(content, hint, specs)
            if gate in GATE_REJECTS:
                raise ScanError(gate)
        except ScanError as error:
            status = status_of(error.reason)
            return {**fields, "status": status, "reason": error.reason, "detail": str(error)}
        answer = await ensemble.predict((pixels, pixel_sha256, gate))
        return {**fields, **of_frame(answer, *frame)}

    @contextmanager
    def _admitted(self, num_scans: int) -> Iterator[None]:
        """Turn away what would have to wait for too long; one request alone is always let in."""
        limit = self.settings.max_in_flight
        if self._num_in_flight and self._num_in_flight + num_scans > limit:
            raise OverloadedError
        self._num_in_flight += num_scans
        try:
            yield
        finally:
            self._num_in_flight -= num_scans

    def close(self) -> None:
        """End the decoders."""
        self._decoder.close()
