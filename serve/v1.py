"""Routes that classify scans, explain answers and describe the bundle; and whether it answers."""

import asyncio
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from serve.access import require
from serve.hosted import OverloadedError
from serve.problems import problem, refusal
from serve.routing import BODY, FILE, ServiceOf, answers, read_uploads
from serve.schemas import (
    EXAMPLE_EXPLANATION,
    EXAMPLE_PREDICTION,
    Explanation,
    ModelDescription,
    Predictions,
)

_READY_TIMEOUT_SECONDS: Final = 5.0

Pictures = Annotated[
    bool,
    Query(description="Give each scan as a PNG, too: few programs show DICOM or NIfTI."),
]
Each = Annotated[
    bool,
    Query(description="Give a single file that cannot be used a result, and no problem document."),
]

v1 = APIRouter(prefix="/v1", tags=["v1"])
health = APIRouter(tags=["health"])


@v1.post(
    "/predictions",
    response_model=Predictions,
    response_model_exclude_unset=True,
    openapi_extra=BODY,
    operation_id="predict",
    dependencies=[require("predict")],
    responses={
        200: {"content": {"application/json": {"example": EXAMPLE_PREDICTION}}},
        **answers(400, 401, 403, 408, 413, 415, 422, 429, 503),
    },
)
async def predict(
    request: Request, service: ServiceOf, pictures: Pictures = False, each: Each = False
) -> Any:
    """Classify scans, sent as the multipart field `files` or one as the raw body.

    Of several, each has a result of its own: one that cannot be used gets the status `rejected` or
    `failed`, and the others their answers. A single one that cannot be used is a problem document,
    or with `each` a result as well.
    """
    service.turn_away_if_full()
    uploads = await read_uploads(request, service.settings.max_files)
    results = await service.answer_all(uploads, pictures)
    if len(results) == 1 and "detail" in results[0] and not each:
        return refusal(results[0])
    return {"results": results}


@v1.post(
    "/explanations",
    response_model=Explanation,
    openapi_extra=BODY,
    operation_id="explain",
    dependencies=[require("explain")],
    responses={
        200: {
            "description": "With `Accept: image/png` the map drawn over the scan.",
            "content": {"application/json": {"example": EXAMPLE_EXPLANATION}, "image/png": FILE},
        },
        **answers(400, 401, 403, 408, 413, 415, 422, 429, 503),
    },
)
async def explain(request: Request, service: ServiceOf) -> Any:
    """Classify one scan and say what moved the answer: a heat map, and each member's own vote.

    The first after a pause takes seconds longer, since what explains is started for it.
    """
    service.turn_away_if_full()
    (upload,) = await read_uploads(request, 1)
    draw = _wants_png(request.headers.get("accept", ""))
    result, overlay = await service.explain(*upload, draw)
    if "detail" in result:
        return refusal(result)
    return Response(overlay, media_type="image/png") if draw else result


@v1.get(
    "/model",
    response_model=ModelDescription,
    operation_id="model",
    dependencies=[require()],
    responses=answers(401),
)
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


def _wants_png(accept: str) -> bool:
    """Return whether a client asked for a picture rather than for JSON, which is the default."""
    types = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    return "image/png" in types and "application/json" not in types
