"""Scoring jobs on Ray: submitted, looked up and stopped in Ray's own store; knows no HTTP."""

import re
import shlex
import sys
import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from bt_core import storage
from bt_core.errors import EXIT_INCOMPLETE, UsageError
from bt_core.log import logger
from cluster.environment import job_environment
from cluster.submit import SCORING_JOB, own_cluster
from serve.locations import allowed_output, allowed_source, resolved
from serve.schemas import ScoringJob, ScoringRequest, ScoringSummary
from serve.settings import ServeSettings

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_CLOCK: Final = timedelta(seconds=2)
"""What rounding, and the clocks of two nodes, may differ by."""
_MOST_WAITING: Final = 50
"""Jobs of one owner that have not ended."""
_KIND: Final = "bt_scoring"
"""Of the metadata, by which these jobs are known among others."""
_ID: Final = re.compile(r"bt-scoring-[0-9a-f]{32}")
_STATES: Final = {
    "PENDING": "queued",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "STOPPED": "cancelled",
    "FAILED": "failed",
}
_MESSAGES: Final = {
    "queued": "waits for its turn on the cluster",
    "running": "scores",
    "succeeded": "all scans have a row, and each could be read",
    "incomplete": "all scans have a row, but some could not be scored or the source is cut short",
    "cancelled": "was stopped; the same request under another idempotency key goes on with it",
}


class UnknownJobError(Exception):
    """No scoring job of this owner has this id."""


class KeyReusedError(Exception):
    """An idempotency key came with another request before."""


class NoJobsError(Exception):
    """The cluster takes no scoring jobs now; says why."""


class ScoringJobs:
    """The scoring jobs of a cluster, which outlive this process.

    Its methods wait for Ray's dashboard: call them in a thread.

    Args:
        settings: what may be named.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._connected: JobSubmissionClient | None = None

    @property
    def are_allowed(self) -> bool:
        """Whether the operator has said from where and to where jobs may work."""
        return bool(self._settings.scoring_sources and self._settings.scoring_outputs)

    def submit(
        self, request: ScoringRequest, bundle: str, owner: str, key: str | None
    ) -> ScoringJob:
        """Submit a job, or return the one that was submitted under the same key.

        Args:
            request: what to score.
            bundle: folder of the one that scores.
            owner: whose job it is.
            key: the owner's idempotency key, or None.

        Raises:
            NotAllowedError: if a location is not allowed.
            KeyReusedError: if the key came with another request.
            NoJobsError: if the cluster takes none.
        """
        import ray

        words = self._words(request, bundle)
        name = uuid.uuid4().hex if key is None else storage.digest_of([owner, key])[:32]
        job_id = f"bt-scoring-{name}"
        metadata = {"kind": _KIND, "owner": owner, "request": request.model_dump_json()}
        client = self._client()
        if key is not None and (known := self._find(job_id)):
            _check_same(known, metadata)
            return self.get(job_id, owner)
        num_waiting = sum(job.state in ("queued", "running") for job in self.of_owner(owner))
        if num_waiting >= _MOST_WAITING:
            raise NoJobsError(f"{num_waiting} jobs of yours have not ended; wait for one of them")
        if not ray.cluster_resources().get(SCORING_JOB):
            raise NoJobsError(
                f"the cluster says not how many scoring jobs may run at once; start one of its "
                f"nodes with --resources='{{\"{SCORING_JOB}\": 1}}'"
            )
        try:
            client.submit_job(
                entrypoint=shlex.join([sys.executable, "-m", "jobs.score", *words]),
                submission_id=job_id,
                metadata=metadata,
                runtime_env=job_environment(run=job_id),
                entrypoint_resources={SCORING_JOB: 1},
            )
        except RuntimeError:
            known = self._find(job_id)
            if known is None:
                raise
            _check_same(known, metadata)  # the same request came twice at once
        logger.info("scoring job %s submitted", job_id)
        return self.get(job_id, owner)

    def of_owner(self, owner: str) -> list[ScoringJob]:
        """Return the jobs of an owner, the newest first."""
        jobs = [job for job in self._client().list_jobs() if _is_of(job, owner)]
        jobs.sort(key=lambda job: job.start_time or 0, reverse=True)
        return [_record(job) for job in jobs]

    def get(self, job_id: str, owner: str) -> ScoringJob:
        """Return a job, with a summary of its scores when it has finished.

        Raises:
            UnknownJobError: if the owner has none of this id.
        """
        job = self._find(job_id)
        if job is None or not _is_of(job, owner):
            raise UnknownJobError
        record = _record(job)
        if record.state in ("succeeded", "incomplete"):
            return record.model_copy(update={"summary": self._summary(record)})
        return record

    def cancel(self, job_id: str, owner: str) -> ScoringJob:
        """Stop a job; one that has ended stays as it is.

        Raises:
            UnknownJobError: if the owner has none of this id.
        """
        record = self.get(job_id, owner)
        if record.state in ("queued", "running"):
            self._client().stop_job(job_id)
            logger.info("scoring job %s is being stopped", job_id)
        return self.get(job_id, owner)

    def _words(self, request: ScoringRequest, bundle: str) -> list[str]:
        """Return the words after `bt score`, of locations that are allowed."""
        source = allowed_source(request.source, self._settings.scoring_sources)
        out = allowed_output(request.output, self._settings.scoring_outputs)
        words = [storage.absolute(bundle), source, "-o", out]
        words += ["--device", self._settings.device]
        words += ["--cascade" if request.cascade else "--no-cascade"]
        words += ["--dicom", request.dicom] if request.dicom else []
        return [*words, "--overwrite"] if request.overwrite else words

    def _summary(self, record: ScoringJob) -> ScoringSummary | None:
        """Return the counts of a job's manifest; None if another run has written it since."""
        try:
            out = allowed_output(record.output, self._settings.scoring_outputs)
            manifest = storage.read_json(storage.join(out, "manifest.json"))
            written_at = datetime.fromisoformat(manifest["ended_at"])
        except (OSError, ValueError, UsageError):
            return None
        ended_at = record.ended_at or written_at
        if not record.created_at - _CLOCK <= written_at <= ended_at + _CLOCK:
            return None
        return ScoringSummary.model_validate(manifest)

    def _client(self) -> "JobSubmissionClient":
        if self._connected is None:
            self._connected = own_cluster()
        return self._connected

    def _find(self, job_id: str) -> "JobDetails | None":
        if not _ID.fullmatch(job_id):  # it becomes part of a URL
            return None
        try:
            return self._client().get_job_info(job_id)
        except RuntimeError as error:
            if "status code 404" in str(error):
                return None
            raise


def _is_of(job: "JobDetails", owner: str) -> bool:
    metadata = job.metadata or {}
    return metadata.get("kind") == _KIND and metadata.get("owner") == owner


def _check_same(job: "JobDetails", metadata: dict[str, str]) -> None:
    if (job.metadata or {}).get("request") != metadata["request"]:
        raise KeyReusedError


def _record(job: "JobDetails") -> ScoringJob:
    request = ScoringRequest.model_validate_json(job.metadata["request"])
    state = _STATES[job.status.value]
    if state == "failed" and job.driver_exit_code == EXIT_INCOMPLETE:
        state = "incomplete"
    return ScoringJob.model_validate(
        {
            **request.model_dump(),
            "id": job.submission_id,
            "state": state,
            "message": _MESSAGES.get(state) or _failure(job, request),
            "created_at": _time(job.start_time),
            "ended_at": _time(job.end_time),
        }
    )


def _time(milliseconds: int | None) -> datetime | None:
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)


def _failure(job: "JobDetails", request: ScoringRequest) -> str:
    """Return the line that says why, if it holds no path but those that the client sent."""
    lines = (job.message or "").splitlines()
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if not said:
        return "ended without an answer; the job's log on the cluster says why"
    text, others = said[-1], said[-1]
    for sent in (request.source, request.output):
        text = text.replace(resolved(sent), sent)
        others = re.sub(rf"{re.escape(resolved(sent))}\S*", "", others)
    if "/" in others:
        return "could not be finished; the job's log on the cluster says why"
    return text
