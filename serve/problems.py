"""Errors over HTTP: RFC 9457 problem documents, without paths, stacks or file content."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from bt_core.errors import REASONS
from serve.schemas import Problem

HTTP_OF_REASON: Final[dict[str, int]] = {reason: 422 for reason in REASONS} | {
    "unsupported_type": 415,
    "transfer_syntax_unsupported": 415,
    "image_too_large": 413,
    "member_too_large": 413,
}
"""Status of each reason code; what is not listed otherwise is 422."""


def problem(
    status: int, code: str, detail: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return a problem document; `code` is stable and meant for programs."""
    content = Problem(
        title=HTTPStatus(status).phrase, status=status, detail=detail, code=code, error=detail
    )
    retry = {"Retry-After": "1"} if status == 503 else {}
    return JSONResponse(
        content.model_dump(),
        status,
        headers={**retry, **(headers or {})},
        media_type="application/problem+json",
    )


class DeclaredLengthLimit:
    """ASGI middleware: 413 to a declared length over the limit, before the body is read."""

    def __init__(self, app: ASGIApp, max_body_size: int) -> None:
        self.app = app
        self.max_body_size = max_body_size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        declared = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        if declared.isdigit() and int(declared) > self.max_body_size:
            response = problem(413, "body_too_large", _limit_text(self.max_body_size))
            await response(scope, receive, send)
            return
        await self.app(scope, receive, send)


def refusal(result: Mapping[str, Any]) -> JSONResponse:
    """Return the problem document of a scan that cannot be used, from its result."""
    reason = result["reason"]
    return problem(HTTP_OF_REASON[reason], reason, result["detail"])


def install_problems(api: FastAPI, max_body_size: int) -> None:
    """Make every foreseen error of an app a problem document, and limit request bodies."""

    @api.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 413:
            return problem(413, "body_too_large", _limit_text(max_body_size))
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        code = "overloaded" if error.status_code == 503 else code
        return problem(error.status_code, code, str(error.detail), error.headers)

    @api.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        return problem(422, "invalid_request", faults)

    # The outermost is added last. Starlette's limit counts bodies of no declared length.
    api.add_middleware(RequestBodyLimitMiddleware, max_body_size=max_body_size)
    api.add_middleware(DeclaredLengthLimit, max_body_size=max_body_size)


def _limit_text(max_body_size: int) -> str:
    return f"the body is over the limit of {max_body_size // 1024**2} MiB"
