"""Runs commands of this project as jobs on a Ray cluster, follows and stops them, as `ray job`."""

import asyncio
import logging
import os
import shlex
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from bt_core import storage
from bt_core.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, RunError, UsageError, first_line
from bt_core.log import logger, run_id
from cluster.environment import job_environment
from cluster.token import use_token

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

SCORING_JOB: Final = "scoring_job"
"""A resource of Ray: as many scoring jobs of the HTTP API run at once as nodes declare of it, since
two that share few CPUs may each hold what the other waits for."""
_LOOK_SECONDS: Final = 30.0
"""Between two looks whether the cluster of a job can still be reached, and for each."""
_ANSWER_SECONDS: Final = 60.0
"""That a cluster may take to answer a request."""
_REACH_SECONDS: Final = 10.0
_STOP_SECONDS: Final = 30.0
"""That a job may take to stop. Ray kills what has not ended 3 s after it was asked to."""
_TALKATIVE: Final = (
    "ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk",
)  # fmt: skip
"""Loggers that tell of each file that is not uploaded; the last two set their level on import."""


@dataclass(frozen=True)
class Follower:
    """Who follows a job.

    Attributes:
        show: gets the job's log, piece by piece.
        wants_stop: says after Ctrl-C whether the job of this id is to stop as well.
        again: says what to do about a command that did not end, and what becomes of it then.
    """

    show: Callable[[str], None]
    wants_stop: Callable[[str], bool]
    again: Callable[[str], str]


def submit(address: str, module: str, arguments: list[str], follower: Follower) -> int:
    """Submit `python -m MODULE ARGUMENTS`, stream its log, and return its exit code.

    Args:
        address: of the cluster's dashboard, `http://HOST:8265`.
        module: such as `jobs.train`.
        arguments: its words; paths must be visible on the cluster.
        follower: who gets the log, and is asked after Ctrl-C.

    Raises:
        UsageError: if the cluster cannot be reached or refuses the token, or if an argument holds a
            secret: the dashboard shows the arguments of a job to everyone.
        RunError: if the cluster does not answer any more while the job runs, or the job is to stop
            and does not.
    """
    for word in arguments:
        storage.refuse_secrets(word)
    if "AWS_SECRET_ACCESS_KEY" in os.environ and any("s3://" in word for word in arguments):
        logger.warning(
            "AWS_SECRET_ACCESS_KEY is not sent, since the dashboard shows a job's settings to "
            "everyone; the cluster's nodes need credentials of their own"
        )
    client = _client(address)
    entrypoint = shlex.join(["python", "-m", module, *arguments])
    job = client.submit_job(entrypoint=entrypoint, runtime_env=job_environment(run_id()))
    logger.info("job %s: %s", job, entrypoint)
    return _followed(client, address, job, entrypoint, follower)


def follow(address: str, job: str, follower: Follower) -> int:
    """Stream the log of a job from its beginning until it ends, and return its exit code.

    Raises:
        UsageError: if the cluster cannot be reached or refuses the token, or has no such job.
        RunError: as `submit`.
    """
    client = _client(address)
    return _followed(client, address, job, _info(client, job).entrypoint, follower)


def stop(address: str, job: str) -> "tuple[JobDetails, bool]":
    """Ask a job to stop; return what is known of it when it has ended, and whether it had before.

    Raises:
        UsageError: if the cluster cannot be reached or refuses the token, or has no such job.
        RunError: if it does not end for half a minute, as one that has not begun.
    """
    client = _client(address)
    if (before := _info(client, job)).status.is_terminal():
        return before, True
    return _stopped(client, job), False


def submitted(address: str) -> list["JobDetails"]:
    """Return what was submitted to a cluster, the oldest first.

    Raises:
        UsageError: if the cluster cannot be reached or refuses the token.
    """
    found = _client(address).list_jobs()
    return sorted((job for job in found if job.submission_id), key=lambda job: job.start_time or 0)


def _followed(
    client: "JobSubmissionClient", address: str, job: str, entrypoint: str, follower: Follower
) -> int:
    from aiohttp import ClientError

    try:
        details = _until_end(client, address, job, follower)
    except (ClientError, OSError, RuntimeError) as error:  # of aiohttp, requests, and Ray itself
        raise RunError(
            f"cluster {address} does not answer any more ({type(error).__name__}). When it does, "
            f"job {job} may go on: {_following(address, job)}. If it was lost with the cluster's "
            f"head, {follower.again(entrypoint)}"
        ) from error
    if details is None:
        return EXIT_INTERRUPTED
    if details.driver_exit_code is not None:
        return int(details.driver_exit_code)
    if details.status == "SUCCEEDED":
        return EXIT_OK
    if details.status == "STOPPED":
        logger.info("job %s was stopped; to have it done, %s", job, follower.again(entrypoint))
        return EXIT_INTERRUPTED
    logger.error("job %s: %s: %s", job, details.status, details.message)
    return EXIT_FAILED


def _until_end(
    client: "JobSubmissionClient", address: str, job: str, follower: Follower
) -> "JobDetails | None":
    """Return what is known of a job when it has ended; None if it is left to itself."""
    try:
        asyncio.run(_stream(client, address, job, follower.show))
        return client.get_job_info(job)
    except KeyboardInterrupt:
        if follower.wants_stop(job):
            return _stopped(client, job)
        logger.info("job %s goes on; follow it with: %s", job, _following(address, job))
        return None


def _following(address: str, job: str) -> str:
    return f"bt jobs follow {job} --cluster {address}"


def _stopped(client: "JobSubmissionClient", job: str) -> "JobDetails":
    """Ask a job to stop, and return what is known of it when it has.

    Raises:
        RunError: if it does not for `_STOP_SECONDS`.
    """
    client.stop_job(job)
    deadline = time.monotonic() + _STOP_SECONDS
    while not (details := _info(client, job)).status.is_terminal():
        if time.monotonic() > deadline:
            why = (
                "it has not begun, and Ray ends it as soon as its turn comes"
                if details.status == "PENDING"
                else f"it is still {details.status.value}"
            )
            raise RunError(
                f"job {job} was asked to stop, but {why}; bt jobs list shows when it has ended"
            )
        time.sleep(0.5)
    return details


def _info(client: "JobSubmissionClient", job: str) -> "JobDetails":
    try:
        return client.get_job_info(job)
    except RuntimeError as error:  # Ray's client raises plain ones, with the status in the text
        if "404" in str(error) or "does not exist" in str(error):
            raise UsageError(f"the cluster has no job {job}; bt jobs list shows them") from error
        raise


def own_cluster() -> "JobSubmissionClient":
    """Return a client for jobs on the cluster that this process works in.

    Raises:
        UsageError: if the cluster has no dashboard, which takes jobs, or refuses the token.
    """
    import ray
    from ray.exceptions import AuthenticationError

    if not ray.is_initialized():  # asking would start one
        raise UsageError("this process works in no cluster")
    try:
        return _connected(ray.get_runtime_context().gcs_address)
    except (OSError, RuntimeError, ValueError, AuthenticationError) as error:
        raise UsageError(f"the cluster takes no jobs: {type(error).__name__}") from error


def _client(address: str) -> "JobSubmissionClient":
    if not address.startswith(("http://", "https://")):
        raise UsageError(f"cluster {address}: write it as http://HOST:8265")
    use_token(address)
    refuse_silent(*_host_and_port(address), address)
    from ray.exceptions import AuthenticationError

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return _connected(address)
    except (OSError, RuntimeError, AuthenticationError) as error:  # the first of requests, too
        raise UsageError(
            f"cluster {address}: {first_line(error).rstrip('.')}; check the address and the "
            "token: the address is a dashboard's (8265, not 6379), and its token lies in "
            "~/.ray/auth_token or is given by RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from error


def refuse_silent(host: str, port: int, shown: str) -> None:
    """Raise UsageError if nobody listens on a port, which Ray's own clients ask again for long."""
    try:
        socket.create_connection((host, port), timeout=_REACH_SECONDS).close()
    except OSError as error:
        raise UsageError(
            f"nobody answers at {shown} ({error.strerror or 'no answer'}); is the cluster up, and "
            "is this its address?"
        ) from error


def _host_and_port(address: str) -> tuple[str, int]:
    place = urlsplit(address)
    return place.hostname or "", place.port or (443 if place.scheme == "https" else 80)


def _connected(address: str) -> "JobSubmissionClient":
    from ray.job_submission import JobSubmissionClient

    class Bounded(JobSubmissionClient):  # type: ignore[misc]
        """Waits for an answer no longer than `_ANSWER_SECONDS`; Ray's own has no time-out."""

        def _do_request(self, *words: Any, **options: Any) -> Any:
            return super()._do_request(*words, timeout=_ANSWER_SECONDS, **options)

    return Bounded(address)


async def _stream(
    client: "JobSubmissionClient", address: str, job: str, show: Callable[[str], None]
) -> None:
    """Show the log of a job until it ends.

    Raises:
        OSError: if the cluster cannot be reached any more. A machine that is switched off does not
            close the connection over which the log comes.
    """
    host, port = _host_and_port(address)
    streaming = asyncio.create_task(_show_log(client, job, show))
    while not streaming.done():
        await asyncio.wait({streaming}, timeout=_LOOK_SECONDS)
        if not streaming.done():
            reached = asyncio.open_connection(host, port)
            _, writer = await asyncio.wait_for(reached, timeout=_LOOK_SECONDS)
            writer.close()
    await streaming


async def _show_log(client: "JobSubmissionClient", job: str, show: Callable[[str], None]) -> None:
    async for text in client.tail_job_logs(job):
        show(text)
