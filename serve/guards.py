"""What lies around the API: headers on every answer, no error text, bounds on reading bodies."""

import asyncio
import re
import uuid
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bt_core.log import logger
from serve.problems import problem

HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
"""Of every answer that does not state its own, as a page does for its policy."""

_REQUEST_ID: Final = re.compile(r"[0-9A-Za-z-]{1,64}")


def request_id(scope: Scope) -> str:
    """Return the id of a request, for logs; only behind `Envelope`."""
    found: str = scope["state"]["request_id"]
    return found


class Envelope:
    """ASGI middleware, the outermost: headers on every answer, and a request id.

    Ray Serve's proxy sets an id for each request and answers with it; where it is not in front, or
    what it was given is no plain id, a new one is made.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its answer with headers."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id")
        is_plain = given is not None and _REQUEST_ID.fullmatch(given)
        known = given if given is not None and is_plain else str(uuid.uuid4())
        scope.setdefault("state", {})["request_id"] = known

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                for name, value in scope["state"].get("answer_headers", {}).items():
                    headers.setdefault(name, value)
                if given is None:
                    headers["X-Request-ID"] = known
            await send(message)

        await self.app(scope, receive, with_headers)


class NoStacks:
    """ASGI middleware: an unforeseen error becomes a problem document, and its type a log line.

    Frameworks would raise it once more, for the server to print; its text may quote what was sent.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; answer for it where it fails before its answer began."""
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = has_begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            logger.error("request failed: %s", type(error).__name__)
            if has_begun or scope["type"] != "http":
                raise RuntimeError("request failed") from None
            refusal = problem(500, "internal_error", "the request failed inside the server")
            await refusal(scope, receive, send)


class BodyBounds:
    """ASGI middleware: bodies that come too slowly, or too many at once, are refused.

    Args:
        app: what reads them.
        max_read_seconds: from the end of the headers to the end of the body.
        max_held_bytes: of bodies of all requests at work.
    """

    def __init__(self, app: ASGIApp, max_read_seconds: float, max_held_bytes: int) -> None:
        self.app = app
        self._max_read_seconds = max_read_seconds
        self._max_held_bytes = max_held_bytes
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on whose body is bounded.

        What reads the body gets HTTPException, 408 when it comes too late, 503 when all that are
        held are too much.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        deadline = asyncio.get_running_loop().time() + self._max_read_seconds
        held_bytes, is_whole = 0, False

        async def bounded() -> Message:
            nonlocal held_bytes, is_whole
            if is_whole:  # what comes now is that the client has gone
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408,
                    f"the body did not arrive within {self._max_read_seconds:g} s",
                    {"Connection": "close"},
                ) from None
            num_bytes = len(message.get("body", b""))
            held_bytes += num_bytes
            self._held_bytes += num_bytes
            is_whole = message["type"] != "http.request" or not message.get("more_body", False)
            if self._held_bytes > self._max_held_bytes:
                raise HTTPException(503, "too many scans are being received; try again shortly")
            return message

        try:
            await self.app(scope, bounded, send)
        finally:
            self._held_bytes -= held_bytes
