"""The web page at `/`: plain files, under a policy that lets them load nothing from elsewhere."""

from importlib import resources
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from bt_core.errors import REASONS, REJECTED_REASONS

MAX_FILES: Final = 32
"""Scans that the page sends in one request, if the server takes as many."""
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "Cache-Control": "no-cache",
}
_MEDIA_TYPES: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

page = APIRouter(include_in_schema=False)


@page.get("/")
async def index() -> Response:
    """Return the page."""
    return _file("index.html")


@page.get("/static/data.json")
async def data(request: Request) -> JSONResponse:
    """Return what the page must know before anybody shows a key: limits, and reasons in words."""
    settings = request.app.state.service.settings
    known: dict[str, Any] = {
        "max_files": min(settings.max_files, MAX_FILES),
        "max_body_bytes": settings.max_body_mib * 1024**2,
        "reasons": REASONS,
        "rejected": sorted(REJECTED_REASONS),
    }
    return JSONResponse(known, headers=_HEADERS)


@page.get("/static/{name}")
async def file(name: str) -> Response:
    """Return a file of the page."""
    return _file(name)


def _file(name: str) -> Response:
    """Return a file of the page by its name, which holds no slash.

    Raises:
        HTTPException: 404 for any other name.
    """
    folder = resources.files("serve") / "page"
    known = {own.name: own for own in folder.iterdir()}
    media_type = _MEDIA_TYPES.get(name.rpartition(".")[2])
    if name not in known or media_type is None:
        raise HTTPException(404, "the page has no such file")
    return Response(known[name].read_bytes(), media_type=media_type, headers=_HEADERS)
