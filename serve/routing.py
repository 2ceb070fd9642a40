"""What routes of several modules share: the service, the uploads, the documents of refusals."""

from http import HTTPStatus
from typing import Annotated, Any, Final

from fastapi import Depends, Request
from fastapi.openapi.constants import REF_PREFIX
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from serve.budget import spend_scans
from serve.schemas import Problem
from serve.service import Service, Upload

FILE: Final = {"schema": {"type": "string", "format": "binary"}}
BODY: Final[dict[str, Any]] = {
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
            "image/png": FILE,
            "image/jpeg": FILE,
            "application/dicom": FILE,
            "application/octet-stream": FILE,
        },
    }
}


def answers(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Return the problem documents of a route for its OpenAPI description."""
    schema = {"$ref": f"{REF_PREFIX}Problem"}
    content = {"application/problem+json": {"schema": schema}}
    return {
        code: {"model": Problem, "content": content, "description": HTTPStatus(code).phrase}
        for code in codes
    }


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(_service)]
"""The service, as a parameter of a route."""


async def read_uploads(request: Request, max_files: int) -> list[Upload]:
    """Return the scans of a request, with their file names or media types.

    Raises:
        HTTPException: 400 without a file or with too many, or for a body that is not well-formed;
            429 for more scans than the caller may send in a minute.
    """
    spend_scans(request, 0)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        content = await request.body()
        spend_scans(request, 1)
        return [(content, media_type)]
    async with request.form(max_files=max_files, max_fields=8) as form:
        files = [file for file in form.getlist("files") if isinstance(file, UploadFile)]
        if not files or len(files) != len(form.getlist("files")):
            raise HTTPException(400, f"send 1 to {max_files} files in the multipart field 'files'")
        spend_scans(request, len(files))
        return [(await file.read(), file.filename or "") for file in files]
