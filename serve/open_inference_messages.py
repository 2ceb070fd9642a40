"""Messages of the Open Inference Protocol: JSON, and its extension of binary tensors."""

import base64
import binascii
import json
import struct
from typing import Any, Final, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

INPUT: Final = "scan"
JSON_LENGTH: Final = "Inference-Header-Content-Length"
"""Header of the extension: how many bytes of the body are JSON; the tensors follow."""
_SIZE: Final = "binary_data_size"


class ServerMetadata(BaseModel):
    """What answers."""

    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    """This process answers."""

    live: bool


class Ready(BaseModel):
    """The ensemble is loaded."""

    ready: bool


class TensorMetadata(BaseModel):
    """Name, type and shape of a tensor; -1 stands for any number."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """The bundle as a model with one input."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelReady(BaseModel):
    """The model is loaded."""

    name: str
    ready: bool


class RequestInput(BaseModel):
    """The scans."""

    name: Literal["scan"]
    shape: list[int] = Field(min_length=1, max_length=2, description="[N], or [N, 1].")
    datatype: Literal["BYTES"]
    parameters: dict[str, Any] = {}
    data: list[str] | list[list[str]] | None = Field(
        None, description="Base64 of each scan; left out by the extension of binary tensors."
    )


class RequestOutput(BaseModel):
    """An output that is wanted."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(BaseModel):
    """Scans to classify."""

    id: str | None = None
    parameters: dict[str, Any] = {}
    inputs: list[RequestInput] = Field(min_length=1, max_length=1)
    outputs: list[RequestOutput] = Field([], description="All, if none are named.")


class ResponseOutput(BaseModel):
    """One output for all scans, flattened row by row."""

    name: str
    shape: list[int]
    datatype: Literal["FP64", "BYTES"]
    data: list[float | None] | list[str] | None = None
    parameters: dict[str, Any] = {}


class InferResponse(BaseModel):
    """What the ensemble says; of a scan without an answer the probabilities are null."""

    model_name: str
    model_version: str
    id: str | None
    outputs: list[ResponseOutput]


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON schema without references, which an OpenAPI document looks up elsewhere."""
    definitions = schema.pop("$defs", {})

    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [walk(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return walk(definitions[node["$ref"].rpartition("/")[2]])
        return {key: walk(value) for key, value in node.items()}

    inlined: dict[str, Any] = walk(schema)
    return inlined


REQUEST_SCHEMA: Final = _inlined(InferRequest.model_json_schema())


def read_request(body: bytes, json_length: str | None) -> tuple[InferRequest, bytes]:
    """Return a request, and the binary tensors that follow its JSON.

    Args:
        body: of the HTTP request.
        json_length: value of the header `JSON_LENGTH`.

    Raises:
        ValueError: if it is not such a request; the message quotes nothing of it.
    """
    num_json_bytes = len(body)
    if json_length is not None:
        if not json_length.isascii() or not json_length.isdigit() or len(json_length) > 12:
            raise ValueError(f"{JSON_LENGTH} is not a number of bytes")
        num_json_bytes = int(json_length)
    if num_json_bytes > len(body):
        raise ValueError(f"{JSON_LENGTH} is over the length of the body")
    try:
        request = InferRequest.model_validate_json(body[:num_json_bytes])
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors())
        raise ValueError("; ".join(faults)) from error
    return request, body[num_json_bytes:]


def read_scans(tensor: RequestInput, blobs: bytes, max_scans: int) -> list[bytes]:
    """Return the scans of the input tensor.

    Raises:
        ValueError: if they are not as many as the shape says, or not 1 to `max_scans`, or damaged.
    """
    num_scans = tensor.shape[0]
    if not 1 <= num_scans <= max_scans or tensor.shape[1:] not in ([], [1]):
        raise ValueError(f"the shape is to be [N] or [N, 1], with N of 1 to {max_scans}")
    if (tensor.data is None) != (_SIZE in tensor.parameters):
        raise ValueError(f"give either data or the parameter {_SIZE}")
    if tensor.data is None:
        if tensor.parameters[_SIZE] != len(blobs):
            raise ValueError(f"{_SIZE} is not the length of what follows the JSON")
        scans = _split(blobs)
    else:
        texts = [t for item in tensor.data for t in (item if isinstance(item, list) else [item])]
        try:
            scans = [base64.b64decode(text, validate=True) for text in texts]
        except (binascii.Error, ValueError) as error:
            raise ValueError("data is to be base64 of each scan") from error
    if len(scans) != num_scans:
        raise ValueError(f"the shape says {num_scans} scans, and {len(scans)} were sent")
    return scans


def _split(blobs: bytes) -> list[bytes]:
    """Return the elements of a binary tensor, each after its length in 4 bytes."""
    elements = []
    position = 0
    while position < len(blobs):
        start = position + 4
        position = start + int.from_bytes(blobs[position:start], "little")
        if position > len(blobs):
            raise ValueError("the binary tensor ends inside an element")
        elements.append(blobs[start:position])
    return elements


def write_response(
    names: dict[str, Any], outputs: dict[str, Any], request: InferRequest
) -> tuple[bytes, int]:
    """Return the body of a response, and how many bytes of it are JSON.

    Args:
        names: of the model, its version and the request.
        outputs: by name, lists of texts, or of lists of numbers or nulls.
        request: says which outputs are wanted as binary tensors.
    """
    every = request.parameters.get("binary_data_output") is True
    binary = {o.name for o in request.outputs if o.parameters.get("binary_data", every) is True}
    tensors, blobs = [], []
    for name, values in outputs.items():
        is_text = isinstance(values[0], str)
        tensor: dict[str, object] = {
            "name": name,
            "shape": [len(values)] if is_text else [len(values), len(values[0])],
            "datatype": "BYTES" if is_text else "FP64",
        }
        if name in binary or (every and not request.outputs):
            blob = _joined(values) if is_text else np.array(values, "<f8").tobytes()
            tensor["parameters"] = {_SIZE: len(blob)}
            blobs.append(blob)
        else:
            tensor["data"] = values if is_text else [v for row in values for v in row]
        tensors.append(tensor)
    content = json.dumps({**names, "outputs": tensors}, allow_nan=False).encode()
    return b"".join([content, *blobs]), len(content)


def _joined(texts: list[str]) -> bytes:
    encoded = [text.encode() for text in texts]
    return b"".join(struct.pack("<I", len(element)) + element for element in encoded)
