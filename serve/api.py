"""The HTTP API over a service; each area adds its routes here."""

import asyncio
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.openapi.constants import REF_PREFIX
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from bt_core import __version__
from serve.problems import HTTP_OF_REASON, install_problems, problem
from serve.schemas import EXAMPLE_PREDICTION, ModelDescription, Predictions, Problem
from serve.service import OverloadedError, Service, Upload

_READY_TIMEOUT_SECONDS: Final = 5.0

_FILE: Final = {"schema": {"type": "string", "format": "binary"}}
_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "description": "Scans (PNG, JPEG, BMP, TIFF, WebP, DICOM or NIfTI): one or more as the "
        "multipart field `files`, or one as the body.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {
                        "files": {
                            "type": "array",
                            "minItems": 1,
                            "items": {"type": "string", "format": "binary"},
                        }
                    },
                }
            },
            "image/png": _FILE,
            "image/jpeg": _FILE,
            "application/dicom": _FILE,
            "application/octet-stream": _FILE,
        },
    }
}


def answers(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Return the problem documents of a route for its OpenAPI description."""
    schema = {"$ref": f"{REF_PREFIX}Problem"}
    content = {"application/problem+json": {"schema": schema}}
    return {
        code: {"model": Problem, "content": content, "description": "Problem"} for code in codes
    }


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(_service)]
"""The service, as a parameter of a route."""

v1 = APIRouter(prefix="/v1", tags=["v1"])
health = APIRouter(tags=["health"])


def build_api(service: Service) -> FastAPI:
    """Return the HTTP API of a service."""
    api = FastAPI(
        title="bt",
        version=__version__,
        summary="Classifies brain-MRI scans. For research; not a medical device.",
    )
    api.state.service = service
    install_problems(api, service.settings.max_body_mib * 1024**2)
    for router in (v1, health):
        api.include_router(router)
    return api


@v1.post(
    "/predictions",
    response_model=Predictions,
    openapi_extra=_BODY,
    operation_id="predict",
    responses={
        200: {"content": {"application/json": {"example": EXAMPLE_PREDICTION}}},
        **answers(400, 413, 415, 422, 503),
    },
)
async def predict(request: Request, service: ServiceOf) -> Any:
    """Classify scans, sent as the multipart field `files` or one as the raw body.

    Of several, each has a result of its own: one that cannot be used gets the status `rejected` or
    `failed`, and the others their answers. A single one that cannot be used is a problem document.
    """
    uploads = await read_uploads(request, service.settings.max_files)
    try:
        results = await service.answer_all(uploads)
    except OverloadedError:
        return problem(503, "overloaded", "too many scans are being answered; try again shortly")
    if len(results) == 1 and "detail" in results[0]:
        reason = results[0]["reason"]
        return problem(HTTP_OF_REASON[reason], reason, results[0]["detail"])
    return {"results": results}


@v1.get("/model", response_model=ModelDescription, operation_id="model")
async def model(service: ServiceOf) -> Any:
    """Describe the bundle that answers."""
    info = service.ensemble.info
    hidden = {"golden_digest", "golden_probs"}
    members = [m.model_dump(mode="json", exclude=hidden) for m in info.members]
    return {
        "bundle_id": info.bundle_id,
        "task": info.label_space.task,
        "labels": info.label_space.names,
        "members": members,
        "review": info.review.model_dump(),
        "cascade": info.cascade and info.cascade.model_dump(),
        "validation_metrics": info.metrics,
        "provenance": info.provenance,
    }


@health.get("/healthz", operation_id="healthz")
async def healthz() -> dict[str, str]:
    """Say that this process answers."""
    return {"status": "alive"}


@health.get("/readyz", operation_id="readyz", responses=answers(503))
async def readyz(service: ServiceOf) -> JSONResponse:
    """Say whether the ensemble is loaded."""
    try:
        loaded = await asyncio.wait_for(service.ensemble.loaded_id(), _READY_TIMEOUT_SECONDS)
    except (TimeoutError, OverloadedError):
        return problem(503, "not_ready", "the ensemble is not loaded yet")
    return JSONResponse({"status": "ready", "bundle_id": loaded})


async def read_uploads(request: Request, max_files: int) -> list[Upload]:
    """Return the scans of a request, with their file names or media types.

    Raises:
        HTTPException: 400 without a file or with too many, or for a body that is not well-formed.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        return [(await request.body(), media_type)]
    async with request.form(max_files=max_files, max_fields=8) as form:
        files = [file for file in form.getlist("files") if isinstance(file, UploadFile)]
        if not files or len(files) != len(form.getlist("files")):
            raise HTTPException(400, f"send 1 to {max_files} files in the multipart field 'files'")
        return [(await file.read(), file.filename or "") for file in files]
