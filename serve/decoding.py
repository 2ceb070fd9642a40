"""Decodes uploads in processes of their own: a file that ends its decoder ends nothing else."""

import asyncio
import multiprocessing
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Final

import numpy as np
from pebble import ProcessExpired, ProcessPool

from bt_core.data.decode_stage import bounded, pixel_digest
from bt_core.errors import ScanError
from bt_core.scans.decoded import MAX_DECODE_BYTES
from bt_core.scans.formats import decode_scan
from bt_core.scans.gate import gate
from bt_core.scans.preprocess import PreprocessSpec, preprocess_pixels

MAX_SECONDS: Final = 20.0
"""An upload that takes longer to decode is refused; below Serve's time-out of a request."""

Decoded = tuple[list[np.ndarray], str, tuple[int, int], str]
"""Pixels_SS uint8 for each spec, the pixel digest, which frame of how many, and what the input gate
says (see `scans.gate`)."""


def decode_upload(content: bytes, hint: str, specs: Sequence[PreprocessSpec]) -> Decoded:
    """Return an uploaded scan decoded and preprocessed.

    Raises:
        ScanError: with a reason code, if it is not a scan that can be used.
    """
    scan = decode_scan(content, hint)
    pixels = [preprocess_pixels(scan.image_HW, spec) for spec in specs]
    frame = scan.frame_index, scan.num_frames
    return pixels, pixel_digest(scan.image_HW), frame, gate(scan)


class UploadDecoder:
    """A pool of processes that decode; one that dies is replaced.

    Args:
        num_processes: how many uploads are decoded at once.
        max_bytes: of memory, besides the upload, that decoding one may take.
        max_seconds: that decoding one may take.
    """

    def __init__(
        self,
        num_processes: int = 2,
        max_bytes: int = MAX_DECODE_BYTES,
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        self._limits = max_bytes, max_seconds
        self._num_processes = num_processes
        self._pool = self._new_pool()
        for _ in range(num_processes):  # so that the first upload does not wait for their imports
            self._pool.schedule(_attempt, args=(b"", "", (), self._limits))

    async def decode(self, content: bytes, hint: str, specs: tuple[PreprocessSpec, ...]) -> Decoded:
        """Do what `decode_upload` does, within bounds of memory and time.

        Raises:
            ScanError: as `decode_upload`, or `decoder_crashed`.
        """
        try:
            outcome = await self._ask(content, hint, specs)
        except BrokenProcessPool:  # a process was killed between two files, and the pool with it
            outcome = await self._ask(content, hint, specs)
        if isinstance(outcome, ScanError):
            raise outcome
        return outcome

    async def _ask(
        self, content: bytes, hint: str, specs: tuple[PreprocessSpec, ...]
    ) -> Decoded | ScanError:
        if not self._pool.active:
            self.close()
            self._pool = self._new_pool()
        task = self._pool.schedule(_attempt, args=(content, hint, specs, self._limits))
        future = asyncio.wrap_future(task)
        future.add_done_callback(_retrieve)
        try:  # shielded: pebble would end the process of a client that hangs up
            outcome: Decoded | ScanError = await asyncio.shield(future)
        except ProcessExpired:
            return ScanError("decoder_crashed")
        return outcome

    def _new_pool(self) -> ProcessPool:
        # Not fork: a server has threads, whose locks would stay held in the child.
        spawn = multiprocessing.get_context("spawn")
        return ProcessPool(max_workers=self._num_processes, context=spawn)

    def close(self) -> None:
        """End the processes."""
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()


def _retrieve(future: "asyncio.Future[Decoded | ScanError]") -> None:
    """Take an exception that nobody waits for any more, which asyncio would print."""
    if not future.cancelled():
        future.exception()


def _attempt(
    content: bytes, hint: str, specs: Sequence[PreprocessSpec], limits: tuple[int, float]
) -> Decoded | ScanError:
    try:
        with bounded(*limits):
            return decode_upload(content, hint, specs)
    except ScanError as error:  # as a value: pebble would hang a traceback's text on it
        return ScanError(error.reason, error.detail)
