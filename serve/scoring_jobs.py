"""Routes of scoring jobs: an archive is scored on the cluster, and asked for until it is done."""

from collections.abc import Callable
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Header, Path, Request, Response
from fastapi.responses import JSONResponse

from bt_core import storage
from bt_core.errors import UsageError
from bt_core.log import logger
from serve.access import caller_of, require
from serve.locations import NotAllowedError
from serve.problems import problem
from serve.ray_jobs import KeyReusedError, NoJobsError, ScoringJobs, UnknownJobError
from serve.routing import ServiceOf, answers
from serve.schemas import ScoringJob, ScoringRequest
from serve.schemas import ScoringJobs as JobList
from serve.service import note

_NOT_SET: Final = (
    "this server takes no scoring jobs; its operator must set scoring_sources and scoring_outputs"
)


async def _jobs(request: Request) -> ScoringJobs:
    state = request.app.state
    if not hasattr(state, "scoring_jobs"):
        state.scoring_jobs = ScoringJobs(state.service.settings)
    jobs: ScoringJobs = state.scoring_jobs
    return jobs


async def _owner(request: Request) -> str:
    """Return the name of the key that asks, which owns the jobs that it submits."""
    return caller_of(request.scope).name


JobsOf = Annotated[ScoringJobs, Depends(_jobs)]
Owner = Annotated[str, Depends(_owner)]
JobId = Annotated[
    str,
    Path(max_length=100, description="As given back.", examples=["bt-scoring-" + "0" * 32]),
]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        description="A name of your own for this request: sent again under it, it starts nothing.",
    ),
]

router = APIRouter(prefix="/v1/scoring-jobs", tags=["scoring jobs"], dependencies=[require("jobs")])


# Not async, so that each runs in a thread: Ray's client waits for its answers.
@router.post(
    "",
    status_code=202,
    response_model=ScoringJob,
    operation_id="submit_scoring_job",
    responses={
        202: {"headers": {"Location": {"schema": {"type": "string"}}}},
        **answers(400, 401, 403, 408, 413, 422, 503),
    },
)
def submit(
    body: ScoringRequest,
    response: Response,
    service: ServiceOf,
    jobs: JobsOf,
    owner: Owner,
    key: Key = None,
) -> Any:
    """Start to score an archive with the bundle that answers here.

    Of a job that was stopped or failed half-way, the same source and output go on with the rest.
    """
    if refusal := _refusal(jobs):
        return refusal
    try:
        job = jobs.submit(body, service.ensemble.location, owner, key)
    except NotAllowedError as error:
        return problem(403, "not_allowed", str(error))
    except KeyReusedError:
        return problem(422, "idempotency_key_reused", "the key came with another request before")
    except (NoJobsError, UsageError, OSError, RuntimeError) as error:
        return _unavailable(error)
    asked = storage.digest_of([body.source, body.output, body.dicom])
    note({"job_id": job.id, "request_sha256": asked, "bundle_id": service.ensemble.info.bundle_id})
    response.headers["Location"] = f"{router.prefix}/{job.id}"
    return job


@router.get(
    "",
    response_model=JobList,
    operation_id="list_scoring_jobs",
    responses=answers(401, 403, 503),
)
def list_jobs(jobs: JobsOf, owner: Owner) -> Any:
    """Return your jobs, the newest first, without their summaries."""
    if refusal := _refusal(jobs):
        return refusal
    try:
        return {"jobs": jobs.of_owner(owner)}
    except (UsageError, OSError, RuntimeError) as error:
        return _unavailable(error)


@router.get(
    "/{job_id}",
    response_model=ScoringJob,
    operation_id="scoring_job",
    responses=answers(401, 403, 404, 422, 503),
)
def get(job_id: JobId, jobs: JobsOf, owner: Owner) -> Any:
    """Return how far a job is and, when it has finished, what came out."""
    return _one(jobs, lambda: jobs.get(job_id, owner))


@router.post(
    "/{job_id}/cancel",
    status_code=202,
    response_model=ScoringJob,
    operation_id="cancel_scoring_job",
    responses=answers(401, 403, 404, 422, 503),
)
def cancel(job_id: JobId, jobs: JobsOf, owner: Owner) -> Any:
    """Ask a job to stop, which takes seconds; one that has ended stays as it is."""
    note({"job_id": job_id})
    return _one(jobs, lambda: jobs.cancel(job_id, owner))


def _one(jobs: ScoringJobs, ask: Callable[[], ScoringJob]) -> ScoringJob | JSONResponse:
    if refusal := _refusal(jobs):
        return refusal
    try:
        return ask()
    except UnknownJobError:
        return problem(404, "not_found", "no scoring job of yours has this id")
    except (UsageError, OSError, RuntimeError) as error:
        return _unavailable(error)


def _refusal(jobs: ScoringJobs) -> JSONResponse | None:
    return None if jobs.are_allowed else problem(403, "not_allowed", _NOT_SET)


def _unavailable(error: Exception) -> JSONResponse:
    logger.error("scoring jobs: %s", error)
    detail = str(error) if isinstance(error, NoJobsError) else "the cluster takes no jobs now"
    return problem(503, "jobs_unavailable", detail)
