"""The Open Inference Protocol, version 2: clients of KServe, Triton and others get answers here.

The specification is https://github.com/kserve/open-inference-protocol (REST). A scan is an element
of a BYTES tensor: base64 text in JSON, or as it is by the extension of binary tensors.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response
from pydantic import Field
from starlette.exceptions import HTTPException

from bt_core import __version__
from serve.access import require
from serve.budget import spend_scans
from serve.hosted import HostedBundle
from serve.open_inference_messages import (
    INPUT,
    JSON_LENGTH,
    REQUEST_SCHEMA,
    InferRequest,
    InferResponse,
    Live,
    ModelMetadata,
    ModelReady,
    Ready,
    ServerMetadata,
    read_request,
    read_scans,
    write_response,
)
from serve.routing import ServiceOf, answers
from serve.v1 import readyz

MODEL_NAME: Final = "bt"
_TEXTS: Final = ("predicted_label", "status", "reason")
_OUTPUTS: Final = ("probabilities", *_TEXTS)
_EXAMPLE: Final = {
    "inputs": [{"name": INPUT, "shape": [1], "datatype": "BYTES", "data": ["iVBORw0KGgo="]}]
}
_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": REQUEST_SCHEMA, "example": _EXAMPLE},
        },
    }
}

router = APIRouter(prefix="/v2", tags=["open inference protocol"])
ModelName = Annotated[str, Path(description=f"Always `{MODEL_NAME}`.", examples=[MODEL_NAME])]
Version = Annotated[str, Field(description="Id of the bundle that answers.")]
Route = Callable[..., Awaitable[Any]]


def _of_model(
    method: str, end: str, names: tuple[str, str], **options: Any
) -> Callable[[Route], Route]:
    """Declare a route of the model, and the same of its version, under two operation ids."""

    def declared(route: Route) -> Route:
        for part, name in zip(("", "/versions/{version}"), names, strict=True):
            path = f"/models/{{model}}{part}{end}"
            router.add_api_route(path, route, methods=[method], operation_id=name, **options)
        return route

    return declared


@router.get(
    "",
    response_model=ServerMetadata,
    operation_id="server_metadata",
    dependencies=[require()],
    responses=answers(401),
)
async def server_metadata() -> Any:
    """Describe the server."""
    return {"name": "bt", "version": __version__, "extensions": ["binary_tensor_data"]}


@router.get("/health/live", response_model=Live, operation_id="server_live")
async def server_live() -> Any:
    """Say that this process answers."""
    return {"live": True}


@router.get(
    "/health/ready", response_model=Ready, operation_id="server_ready", responses=answers(503)
)
async def server_ready(service: ServiceOf) -> Any:
    """Say whether the ensemble is loaded."""
    ready = await readyz(service)
    return {"ready": True} if ready.status_code == 200 else ready


@_of_model(
    "GET",
    "",
    ("model_metadata", "model_version_metadata"),
    response_model=ModelMetadata,
    dependencies=[require()],
    responses=answers(401, 404),
)
async def model_metadata(service: ServiceOf, model: ModelName, version: Version = "") -> Any:
    """Describe the bundle's input and outputs."""
    _check_name(service.ensemble, model, version)
    info = service.ensemble.info
    num_classes = len(info.label_space.names)
    shapes = {name: [-1] for name in _TEXTS} | {"probabilities": [-1, num_classes]}
    return {
        "name": MODEL_NAME,
        "versions": [info.bundle_id],
        "platform": "bt_bundle",
        "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {"name": name, "datatype": "BYTES" if name in _TEXTS else "FP64", "shape": shapes[name]}
            for name in _OUTPUTS
        ],
    }


@_of_model(
    "GET",
    "/ready",
    ("model_ready", "model_version_ready"),
    response_model=ModelReady,
    dependencies=[require()],
    responses=answers(401, 404, 503),
)
async def model_ready(service: ServiceOf, model: ModelName, version: Version = "") -> Any:
    """Say whether the ensemble is loaded."""
    _check_name(service.ensemble, model, version)
    ready = await readyz(service)
    return {"name": MODEL_NAME, "ready": True} if ready.status_code == 200 else ready


@_of_model(
    "POST",
    "/infer",
    ("infer", "infer_version"),
    response_model=InferResponse,
    dependencies=[require("predict")],
    openapi_extra=_BODY,
    responses=answers(400, 401, 403, 404, 408, 413, 429, 503),
)
async def infer(
    request: Request, service: ServiceOf, model: ModelName, version: Version = ""
) -> Any:
    """Classify scans; each has a status, and a reason where it is not `scored`.

    A scan that cannot be used has no label and, as probabilities, nulls (NaN in binary). A request
    that is not of the protocol gets 400.
    """
    ensemble = service.ensemble  # another bundle may take its place while the body arrives
    _check_name(ensemble, model, version)
    service.turn_away_if_full()
    spend_scans(request, 0)
    try:
        asked, blobs = read_request(await request.body(), request.headers.get(JSON_LENGTH))
        scans = read_scans(asked.inputs[0], blobs, service.settings.max_files)
        wanted = _wanted(asked)
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
    spend_scans(request, len(scans))
    results = await service.answer_all([(scan, "") for scan in scans], ensemble=ensemble)
    info = ensemble.info
    outputs = {name: _column(name, results, info.label_space.names) for name in wanted}
    content, num_json_bytes = write_response(
        {"model_name": MODEL_NAME, "model_version": info.bundle_id, "id": asked.id}, outputs, asked
    )
    if num_json_bytes == len(content):
        return Response(content, media_type="application/json")
    return Response(
        content, headers={JSON_LENGTH: str(num_json_bytes)}, media_type="application/octet-stream"
    )


def _column(
    name: str, results: list[dict[str, Any]], classes: tuple[str, ...]
) -> list[list[float | None]] | list[str]:
    """Return one output for all scans."""
    if name in _TEXTS:
        return [result.get(name, "") for result in results]
    nothing = dict.fromkeys(classes)
    return [[result.get(name, nothing)[c] for c in classes] for result in results]


def _wanted(asked: InferRequest) -> list[str]:
    names = [output.name for output in asked.outputs] or list(_OUTPUTS)
    if unknown := sorted(set(names) - set(_OUTPUTS)):
        raise ValueError(f"no output {unknown[0]!r}; there are {', '.join(_OUTPUTS)}")
    return list(dict.fromkeys(names))


def _check_name(ensemble: HostedBundle, model: str, version: str) -> None:
    bundle_id = ensemble.info.bundle_id
    if model != MODEL_NAME or version not in ("", bundle_id):
        raise HTTPException(404, f"the only model is {MODEL_NAME!r}, version {bundle_id!r}")
