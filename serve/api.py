"""The HTTP API: the gateway decodes and checks, the ensemble's deployment answers."""

import asyncio
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.openapi.constants import REF_PREFIX
from fastapi.responses import JSONResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from bt_core import __version__, storage
from bt_core.ensemble.ensemble import preprocess_digest
from bt_core.ensemble.review import of_frame
from bt_core.errors import ScanError
from bt_core.inference.predictor import needed_specs
from bt_core.models.bundle import Bundle
from bt_core.scans.gate import GATE_REJECTS
from serve.decoding import UploadDecoder
from serve.model import Scan
from serve.problems import HTTP_OF_REASON, install_problems, problem
from serve.schemas import EXAMPLE_PREDICTION, ModelDescription, Predictions, Problem

MAX_BODY_BYTES: Final = 32 * 1024**2
TRIES: Final = 3
"""How often a scan is sent when replicas die under it; an answer has no side effects."""
_READY_TIMEOUT_SECONDS: Final = 5.0

_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "description": "One scan (PNG, JPEG, BMP, TIFF, WebP, DICOM or NIfTI), at most 32 MiB.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {"files": {"type": "string", "format": "binary"}},
                }
            },
            "image/png": {"schema": {"type": "string", "format": "binary"}},
            "image/jpeg": {"schema": {"type": "string", "format": "binary"}},
            "application/dicom": {"schema": {"type": "string", "format": "binary"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


def _answers(*codes: int) -> dict[int | str, dict[str, Any]]:
    schema = {"$ref": f"{REF_PREFIX}Problem"}
    content = {"application/problem+json": {"schema": schema}}
    return {
        code: {"model": Problem, "content": content, "description": "Problem"} for code in codes
    }


# Helpers stand above the class: Serve pickles it as it is decorated, with what is defined by then.
async def _read_scan(request: Request) -> tuple[bytes, str]:
    """Return the scan's bytes and its file name or media type.

    Raises:
        HTTPException: 400 without exactly one file, or for a body that is not well-formed.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        return await request.body(), media_type
    async with request.form(max_files=2, max_fields=8) as form:
        files = form.getlist("files")
        if len(files) != 1 or not isinstance(files[0], UploadFile):
            raise HTTPException(400, "send exactly one file, in the multipart field 'files'")
        return await files[0].read(), files[0].filename or ""


api = FastAPI(
    title="bt",
    version=__version__,
    summary="Classifies brain-MRI scans. For research; not a medical device.",
)
install_problems(api, MAX_BODY_BYTES)


@serve.deployment(max_ongoing_requests=100, max_queued_requests=200)
@serve.ingress(api)
class Gateway:
    """Decodes and preprocesses scans, so that only whole ones reach the ensemble's batches.

    Args:
        bundle_location: folder of the bundle; its description is read, not its weights.
        ensemble: handle of the ensemble's deployment.
    """

    def __init__(self, bundle_location: str, ensemble: DeploymentHandle) -> None:
        self._info = Bundle(bundle_location).info
        specs, _ = needed_specs(self._info)
        self._decoder = UploadDecoder(specs)
        self._preprocess_digest = preprocess_digest(self._info)
        self._ensemble = ensemble

    @api.post(
        "/v1/predictions",
        response_model=Predictions,
        openapi_extra=_BODY,
        operation_id="predict",
        tags=["v1"],
        responses={
            200: {"content": {"application/json": {"example": EXAMPLE_PREDICTION}}},
            **_answers(400, 413, 415, 422, 503),
        },
    )
    async def predict(self, request: Request) -> Any:
        """Classify one scan, sent as the multipart field `files` or as the raw body."""
        content, hint = await _read_scan(request)
        try:
            pixels, pixel_sha256, frame, gate = await self._decoder.decode(content, hint)
            if gate in GATE_REJECTS:
                raise ScanError(gate)
        except ScanError as error:
            return problem(HTTP_OF_REASON[error.reason], error.reason, str(error))
        try:
            answer = await self._ask((pixels, pixel_sha256, gate))
        except (BackPressureError, DeploymentUnavailableError, RayActorError):
            return problem(503, "overloaded", "no replica could answer in time; try again shortly")
        digest = storage.sha256(content)
        fields = {
            "scan_id": digest[:20],
            "content_sha256": digest,
            "bundle_id": self._info.bundle_id,
            "preprocess_digest": self._preprocess_digest,
        }
        return {"results": [{**fields, **of_frame(answer, *frame)}]}

    @api.get("/v1/model", response_model=ModelDescription, operation_id="model", tags=["v1"])
    async def model(self) -> Any:
        """Describe the bundle that answers."""
        info = self._info
        members = [m.model_dump(mode="json", exclude={"golden_digest"}) for m in info.members]
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

    @api.get("/healthz", operation_id="healthz", tags=["health"])
    async def healthz(self) -> dict[str, str]:
        """Say that this process answers."""
        return {"status": "alive"}

    @api.get("/readyz", operation_id="readyz", tags=["health"], responses=_answers(503))
    async def readyz(self) -> JSONResponse:
        """Say whether the ensemble is loaded."""
        try:
            call = self._ensemble.bundle_id.remote()
            loaded = await asyncio.wait_for(call, _READY_TIMEOUT_SECONDS)
        except (TimeoutError, BackPressureError, DeploymentUnavailableError, RayActorError):
            return problem(503, "not_ready", "the ensemble is not loaded yet")
        return JSONResponse({"status": "ready", "bundle_id": loaded})

    async def _ask(self, scan: Scan) -> dict[str, Any]:
        for attempt in range(1, TRIES + 1):
            try:
                answer: dict[str, Any] = await self._ensemble.predict.remote(scan)
                return answer
            except RayActorError:
                if attempt == TRIES:
                    raise
        raise AssertionError("unreachable")
