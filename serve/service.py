"""What answers requests: decode within bounds, ask the ensemble. Knows neither HTTP nor Ray."""

import asyncio
import base64
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from bt_core import storage
from bt_core.ensemble.review import of_frame
from bt_core.errors import ScanError, status_of
from bt_core.log import logger
from bt_core.models.bundle import BundleInfo
from bt_core.scans.gate import GATE_REJECTS
from bt_core.scans.views import onto_image, png
from serve import tracing
from serve.decoding import Shown, UploadDecoder
from serve.hosted import HostedBundle, OverloadedError, Scan
from serve.settings import ServeSettings

ANSWER_SECONDS: Final = 35.0
"""For which a request may wait for its answer; with the time that its body may take (20 s) below
the 60 s after which Ray Serve gives it up without words."""
_MOST_COMPARED: Final = 4
"""Scans that the shadow works on at once."""
Upload = tuple[bytes, str]
"""The bytes of a scan, and its file name or media type."""

AUDITED: ContextVar[list[Mapping[str, Any]] | None] = ContextVar("audited", default=None)
"""Results of scans of the request at hand, for whoever writes them down; None where nobody does."""


def note(result: Mapping[str, Any]) -> None:
    """Take down the result of a scan for the audit of the request at hand.

    Args:
        result: with the fields of a prediction or a refusal; others stay out of the log.
    """
    audited = AUDITED.get()
    if audited is not None:
        audited.append(result)


class Observer:
    """Takes note of what a service does; this one of nothing."""

    def took(self, stage: str, seconds: float) -> None:
        """Take note of a stage of one scan: `decode`, `ensemble` or `total`."""

    def answered(self, result: dict[str, Any], intensity: float | None) -> None:
        """Take note of a prediction or a refusal; of the former with its thumbnail's mean grey."""

    def turned_away(self) -> None:
        """Take note of a request for which there was no room."""

    def compared(self, agrees: bool) -> None:
        """Take note of a scan that a shadow answered, too."""

    def hosts(self, info: BundleInfo) -> None:
        """Take note of the bundle that answers from now on."""


@dataclass(frozen=True)
class _Decoded:
    """An upload that could be decoded.

    Attributes:
        scan: it, for an ensemble.
        frame: which of how many.
        shown: how it is shown to a person, if that was asked for.
    """

    scan: Scan
    frame: tuple[int, int]
    shown: Shown | None


class Service:
    """Answers uploads.

    Args:
        settings: limits.
        ensemble: what answers; None until `host` gives one.
        observer: takes note of what is done.
    """

    def __init__(
        self,
        settings: ServeSettings,
        ensemble: HostedBundle | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.settings = settings
        self._observer = observer or Observer()
        self._ensemble = ensemble
        self._shadow: HostedBundle | None = None
        self._shadow_share = 0.0
        self._comparing: set[asyncio.Task[None]] = set()
        self._decoder = UploadDecoder(settings.decoders_per_gateway)
        self._num_in_flight = 0

    @property
    def ensemble(self) -> HostedBundle:
        """What answers.

        Raises:
            OverloadedError: if nothing does yet.
        """
        if self._ensemble is None:
            raise OverloadedError
        return self._ensemble

    def turn_away_if_full(self) -> None:
        """Turn away what would have to wait for too long.

        However many scans a request holds, it needs one free place only: else those of many would
        never get in among those of one. Routes ask before they read a body, which costs more than
        to refuse it.

        Raises:
            OverloadedError: if there is no room.
        """
        if self._num_in_flight >= self.settings.max_in_flight:
            self._observer.turned_away()
            raise OverloadedError

    def host(self, ensemble: HostedBundle, shadow: HostedBundle | None, share: float) -> None:
        """Let another ensemble answer from now on; what is being answered is not disturbed.

        Args:
            ensemble: what answers.
            shadow: what is asked, too, without telling anybody; None if nothing is.
            share: of the scans that the shadow gets.
        """
        self._ensemble, self._shadow, self._shadow_share = ensemble, shadow, share
        self._observer.hosts(ensemble.info)

    async def answer_all(
        self,
        uploads: Sequence[Upload],
        with_pictures: bool = False,
        ensemble: HostedBundle | None = None,
    ) -> list[dict[str, Any]]:
        """Return a result for each upload, in their order; one that is no scan spoils no other.

        Args:
            uploads: any number, all answered by the same bundle.
            with_pictures: give a picture of each, too.
            ensemble: what answers; None: what answers at present.

        Raises:
            OverloadedError: if one of them could not be answered in time.
        """
        chosen = ensemble or self.ensemble  # another bundle may take its place in between
        with self._admitted(len(uploads)):
            tasks = [
                asyncio.ensure_future(self._answer(chosen, *upload, with_pictures))
                for upload in uploads
            ]
            try:
                async with _in_time():
                    results = list(await asyncio.gather(*tasks))
                for result in results:
                    note(result)
                return results
            finally:
                for task in tasks:
                    task.cancel()

    async def _answer(
        self, ensemble: HostedBundle, content: bytes, hint: str, with_picture: bool
    ) -> dict[str, Any]:
        """Return the fields of a prediction, or of a refusal: status, reason and detail."""
        began = time.perf_counter()
        fields, decoded = await self._decode(ensemble, content, hint, with_picture)
        if decoded is None:
            self._observer.answered(fields, None)
            return fields
        asked = time.perf_counter()
        with tracing.span("ensemble"):
            answer = await ensemble.predict(decoded.scan)
        ended = time.perf_counter()
        self._ask_shadow(content, hint, answer)
        stages = {"decode": asked - began, "ensemble": ended - asked, "total": ended - began}
        for stage, seconds in stages.items():
            self._observer.took(stage, seconds)
        result = {**fields, **of_frame(answer, *decoded.frame)}
        _, places = ensemble.needed
        self._observer.answered(result, float(decoded.scan[0][places[-1]].mean()))
        return result

    async def explain(
        self, content: bytes, hint: str, draw: bool = False
    ) -> tuple[dict[str, Any], bytes]:
        """Return the fields of an explanation, or of a refusal, and an overlay if it is asked for.

        Raises:
            OverloadedError: if it could not be explained in time.
        """
        async with _in_time():
            with self._admitted(1):
                return await self._explained(content, hint, draw)

    async def _explained(
        self, content: bytes, hint: str, draw: bool
    ) -> tuple[dict[str, Any], bytes]:
        ensemble = self.ensemble
        fields, decoded = await self._decode(ensemble, content, hint, True)
        if decoded is None or decoded.shown is None:
            note(fields)
            return fields, b""
        with tracing.span("ensemble"):
            answer = of_frame(await ensemble.predict(decoded.scan), *decoded.frame)
        with tracing.span("explain"):
            explained = await ensemble.explain(decoded.scan, answer, draw)
        if explained.bundle_id != ensemble.info.bundle_id:  # a new one is just taking its place
            raise OverloadedError
        shown = decoded.shown
        heat = png(onto_image(explained.heat_SS, shown.boxes[explained.spec], shown.shape))
        about = {n: getattr(explained, n) for n in ("method", "heat_members", "members", "figures")}
        result = {**fields, **answer, "heat": _base64(heat), **about}
        note(result)
        return result, explained.overlay

    async def _decode(
        self, ensemble: HostedBundle, content: bytes, hint: str, show: bool
    ) -> tuple[dict[str, Any], _Decoded | None]:
        """Return what is known of an upload, and it decoded; None for one that is refused."""
        fields = {"content_sha256": storage.sha256(content), **ensemble.provenance}
        specs, _ = ensemble.needed
        try:
            pixels, pixel_sha256, frame, gate, shown = await self._decoder.decode(
                content, hint, specs, show
            )
            if shown is not None:
                fields["picture"] = _base64(shown.png)
            if gate in GATE_REJECTS:
                raise ScanError(gate)
        except ScanError as error:
            refusal = {"status": status_of(error.reason), "reason": error.reason}
            return {**fields, **refusal, "detail": str(error)}, None
        return fields, _Decoded((pixels, pixel_sha256, gate), frame, shown)

    def _ask_shadow(self, content: bytes, hint: str, answer: dict[str, Any]) -> None:
        """Have the shadow answer, too, where there is one and room for it."""
        shadow = self._shadow
        is_busy = (
            len(self._comparing) >= _MOST_COMPARED
            or 2 * self._num_in_flight > self.settings.max_in_flight
        )
        if shadow is None or is_busy or random.random() >= self._shadow_share:
            return
        task = asyncio.ensure_future(self._compare(shadow, content, hint, answer))
        self._comparing.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._comparing.discard)

    async def _compare(
        self, shadow: HostedBundle, content: bytes, hint: str, answer: dict[str, Any]
    ) -> None:
        try:
            _, decoded = await self._decode(shadow, content, hint, False)
            if decoded is None:
                return
            other = await shadow.predict(decoded.scan)
        except OverloadedError:
            return
        agrees = all(answer[name] == other[name] for name in ("predicted_label", "status"))
        self._observer.compared(agrees)
        logger.info(
            "shadow %s %s: %s %s against %s %s on %s",
            shadow.info.bundle_id,
            "agrees" if agrees else "disagrees",
            other["predicted_label"], other["status"], answer["predicted_label"], answer["status"],
            storage.sha256(content)[:20],
        )  # fmt: skip

    @contextmanager
    def _admitted(self, num_scans: int) -> Iterator[None]:
        """Count scans as being worked on, if there is room for them."""
        self.turn_away_if_full()
        self._num_in_flight += num_scans
        try:
            yield
        finally:
            self._num_in_flight -= num_scans

    def close(self) -> None:
        """End the decoders."""
        self._decoder.close()


@asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            yield
    except TimeoutError as error:
        raise OverloadedError from error


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
