"""Decodes uploads in processes of their own: a file that ends its decoder ends nothing else."""

import asyncio
import multiprocessing
import signal
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Final

import numpy as np
from pebble import ProcessExpired, ProcessPool

from bt_core.data.decode_stage import bounded, pixel_digest
from bt_core.errors import ScanError
from bt_core.scans.decoded import MAX_DECODE_BYTES
from bt_core.scans.formats import decode_scan
from bt_core.scans.gate import gate
from bt_core.scans.preprocess import Box, PreprocessSpec, preprocess_pixels, seen_box
from bt_core.scans.views import png, reduced
from serve import tracing
from serve.tracing import Lap

TRIES: Final = 2
"""How often an upload is decoded whose process ends, or is said to have."""
_GRACE_SECONDS: Final = 5.0
MAX_SECONDS: Final = 20.0
"""An upload that takes longer to decode is refused; below Serve's time-out of a request."""


@dataclass(frozen=True)
class Shown:
    """How a decoded scan is shown to a person.

    Attributes:
        png: it, `views.reduced`.
        shape: its height and width in pixels before that.
        boxes: what of it the pixels of each spec show.
    """

    png: bytes
    shape: tuple[int, int]
    boxes: tuple[Box, ...]


Decoded = tuple[list[np.ndarray], str, tuple[int, int], str, Shown | None]
"""Pixels_SS uint8 for each spec, the pixel digest, which frame of how many, what the input gate
says (see `scans.gate`), and the picture, if it was asked for."""

Outcome = tuple[Decoded | ScanError, list[Lap]]
"""What became of an upload, and when its stages began and ended."""


def decode_upload(
    content: bytes,
    hint: str,
    specs: Sequence[PreprocessSpec],
    show: bool = False,
    laps: list[Lap] | None = None,
) -> Decoded:
    """Return an uploaded scan decoded and preprocessed; `show` asks for its picture too.

    Args:
        content: of the upload.
        hint: its file name or media type.
        specs: how it is preprocessed.
        show: give its picture, too.
        laps: gets when its stages began and ended.

    Raises:
        ScanError: with a reason code, if it is not a scan that can be used.
    """
    began = time.time_ns()
    scan = decode_scan(content, hint)
    decoded = time.time_ns()
    pixels = [preprocess_pixels(scan.image_HW, spec) for spec in specs]
    if laps is not None:
        laps += [("decode", began, decoded), ("preprocess", decoded, time.time_ns())]
    frame = scan.frame_index, scan.num_frames
    shown = None
    if show:
        height, width = scan.image_HW.shape
        boxes = tuple(seen_box(scan.image_HW, spec) for spec in specs)
        shown = Shown(png(reduced(scan.image_HW)), (height, width), boxes)
    return pixels, pixel_digest(scan.image_HW), frame, gate(scan), shown


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
            self._pool.schedule(_attempt, args=(b"", "", (), False, self._limits))

    async def decode(
        self, content: bytes, hint: str, specs: tuple[PreprocessSpec, ...], show: bool = False
    ) -> Decoded:
        """Do what `decode_upload` does, within bounds of memory and time.

        Raises:
            ScanError: as `decode_upload`, or `decoder_crashed`.
        """
        for _ in range(TRIES):
            # When a process dies, pebble may not have read yet that it was done with one file and
            # had begun another: then the wrong one is blamed, or the pool given up.
            try:
                outcome, laps = await self._ask(content, hint, specs, show)
            except TimeoutError:
                break
            except ProcessExpired as error:
                if error.exitcode == -signal.SIGALRM:  # it took too long, and would again
                    break
            except BrokenProcessPool:
                pass
            else:
                tracing.add(laps)
                if isinstance(outcome, ScanError):
                    raise outcome
                return outcome
        raise ScanError("decoder_crashed")

    async def _ask(
        self, content: bytes, hint: str, specs: tuple[PreprocessSpec, ...], show: bool
    ) -> Outcome:
        if not self._pool.active:
            self.close()
            self._pool = self._new_pool()
        task = self._pool.schedule(
            _attempt,
            args=(content, hint, specs, show, self._limits),
            # Later than the process ends itself: for one that pebble takes to be still at work.
            timeout=self._limits[1] + _GRACE_SECONDS,
        )
        future = asyncio.wrap_future(task)
        future.add_done_callback(_retrieve)
        # Shielded: pebble would end the process of a client that hangs up.
        try:
            outcome: Outcome = await asyncio.shield(future)
        except asyncio.CancelledError:
            if not task.running():  # nobody waits for what has not begun
                task.cancel()  # type: ignore[no-untyped-call]
            raise
        return outcome

    def _new_pool(self) -> ProcessPool:
        # Not fork: a server has threads, whose locks would stay held in the child.
        spawn = multiprocessing.get_context("spawn")
        return ProcessPool(max_workers=self._num_processes, context=spawn)

    def close(self) -> None:
        """End the processes."""
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()


def _retrieve(future: "asyncio.Future[Outcome]") -> None:
    """Take an exception that nobody waits for any more, which asyncio would print."""
    if not future.cancelled():
        future.exception()


def _attempt(
    content: bytes,
    hint: str,
    specs: Sequence[PreprocessSpec],
    show: bool,
    limits: tuple[int, float],
) -> Outcome:
    laps: list[Lap] = []
    try:
        with bounded(*limits):
            return decode_upload(content, hint, specs, show, laps), laps
    except ScanError as error:  # as a value: pebble would hang a traceback's text on it
        return ScanError(error.reason, error.detail), laps
