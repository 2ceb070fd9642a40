"""The HTTP API over a service: its routes, and the guards around them."""

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.formparsers import MultiPartParser

from bt_core import __version__
from serve import open_inference, scoring_jobs
from serve.docs import docs
from serve.hosted import OverloadedError
from serve.problems import install_problems, problem
from serve.security import secure
from serve.service import Service
from serve.v1 import health, v1
from serve.web import page


def build_api(service: Service) -> FastAPI:
    """Return the HTTP API of a service."""
    api = FastAPI(
        title="bt",
        version=__version__,
        summary="Classifies brain-MRI scans. For research; not a medical device.",
        docs_url=None,  # these load their scripts from elsewhere; see serve.docs
        redoc_url=None,
    )
    api.state.service = service
    # Scans of patients stay in memory, which `max_held_mib` bounds, rather than in files of /tmp.
    MultiPartParser.spool_max_size = service.settings.max_body_mib * 1024**2
    install_problems(api, service.settings.max_body_mib * 1024**2)

    @api.exception_handler(OverloadedError)
    async def _out_of_reach(_: Request, error: OverloadedError) -> JSONResponse:
        return problem(503, "overloaded", "this cannot be answered now; try again shortly")

    secure(api, service.settings)
    for router in (v1, health, open_inference.router, scoring_jobs.router, docs, page):
        api.include_router(router)
    return api
