"""Runs commands of this project as jobs on a Ray cluster, follows and stops them, as `ray job`."""

import asyncio
import logging
import os
import shlex
import sys
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from bt_core import storage, stores
from bt_core.errors import EXIT_FAILED, EXIT_OK, RunError, UsageError
from bt_core.log import RUN_ID, logger, run_id
from bt_core.scans import limits
from cluster.token import use_token

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

SCORING_JOB: Final = "scoring_job"
"""A resource of Ray: as many scoring jobs of the HTTP API run at once as nodes declare of it, since
two that share few CPUs may each hold what the other waits for."""
_LOOK_SECONDS: Final = 30.0
"""Between two looks whether the cluster of a job can still be reached, and for each."""
_TALKATIVE: Final = (
    "ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk",
)  # fmt: skip
"""Loggers that tell of each file that is not uploaded; the last two set their level on import."""


def submit(address: str, module: str, arguments: list[str]) -> int:
    """Submit `python -m MODULE ARGUMENTS`, stream its log, and return its exit code.

    Ctrl-C asks whether to stop the job; without a terminal it goes on.

    Args:
        address: of the cluster's dashboard, `http://HOST:8265`.
        module: such as `jobs.train`.
        arguments: its words; paths must be visible on the cluster.

    Raises:
        UsageError: if the cluster cannot be reached or refuses the token, or if an argument holds a
            secret: the dashboard shows the arguments of a job to everyone.
        RunError: if the cluster does not answer any more while the job runs.
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
    return _followed(client, address, job)


def follow(address: str, job: str) -> int:
    """Stream the log of a job from its beginning until it ends, and return its exit code.

    Ctrl-C asks whether to stop the job; without a terminal it goes on.

    Raises:
        UsageError: if the cluster cannot be reached or refuses the token, or has no such job.
        RunError: as `submit`.
    """
    client = _client(address)
    _info(client, job)
    return _followed(client, address, job)


def stop(address: str, job: str) -> str:
    """Ask a job to stop, which takes seconds, and return its state at the end.

    Raises:
        UsageError: if the cluster cannot be reached or refuses the token, or has no such job.
    """
    client = _client(address)
    _info(client, job)
    client.stop_job(job)
    while not (state := _info(client, job).status).is_terminal():
        time.sleep(0.5)
    return str(state.value)


def submitted(address: str) -> list["JobDetails"]:
    """Return what was submitted to a cluster, the oldest first.

    Raises:
        UsageError: if the cluster cannot be reached or refuses the token.
    """
    found = _client(address).list_jobs()
    return sorted((job for job in found if job.submission_id), key=lambda job: job.start_time or 0)


def _followed(client: "JobSubmissionClient", address: str, job: str) -> int:
    from aiohttp import ClientError

    again = f"bt jobs follow {job} --cluster {address}"
    try:
        asyncio.run(_stream(client, address, job))
        details = client.get_job_info(job)
    except KeyboardInterrupt:
        if not _wants_stop(job):
            logger.info("job %s goes on; follow it with: %s", job, again)
            return EXIT_FAILED
        client.stop_job(job)
        logger.info("job %s stopped", job)
        return EXIT_FAILED
    except (ClientError, OSError, RuntimeError) as error:  # of aiohttp, requests, and Ray itself
        raise RunError(
            f"cluster {address} does not answer any more ({type(error).__name__}). When it does, "
            f"job {job} may go on: {again}. If it was lost with the cluster's head, the same "
            "command goes on from what is done"
        ) from error
    if details.driver_exit_code is not None:
        return int(details.driver_exit_code)
    if details.status == "SUCCEEDED":
        return EXIT_OK
    logger.error("job %s: %s: %s", job, details.status, details.message)
    return EXIT_FAILED


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
    from ray.job_submission import JobSubmissionClient

    if not ray.is_initialized():  # asking would start one
        raise UsageError("this process works in no cluster")
    try:
        return JobSubmissionClient(ray.get_runtime_context().gcs_address)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        raise UsageError(f"the cluster takes no jobs: {type(error).__name__}") from error


def _client(address: str) -> "JobSubmissionClient":
    if not address.startswith(("http://", "https://")):
        raise UsageError(f"cluster {address}: write it as http://HOST:8265")
    use_token(address)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(
            f"cluster {address}: {first}; check the address and the token (RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH)"
        ) from error


def job_environment(run: str) -> dict[str, object]:
    """Return the runtime environment of a job whose run has this id.

    It uploads the checkout that this runs from; an installed package must be there already.
    """
    environment: dict[str, object] = {"env_vars": _variables() | {RUN_ID: run}}
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").is_file():
        return environment
    return {"working_dir": str(root), "excludes": all_but_code(root), **environment}


def all_but_code(root: Path) -> list[str]:
    """Return patterns, as of a .gitignore, that leave of a checkout what is installed of it.

    All else is left out, whatever it is called: no scans, results or history.
    """
    setup = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {package.replace(".", "/"): ["*.py"] for package in setup["packages"]}
    for package, files in setup["package-data"].items():
        for file in files:
            folder, _, kind = f"{package}/{file}".rpartition("/")
            folders.setdefault(folder, []).append(kind)
    patterns = ["*", "!/.", "!/pyproject.toml", "!/requirements.lock"]
    for folder, kinds in sorted(folders.items()):  # a folder before those in it
        patterns += [f"!/{folder}", f"/{folder}/**", *(f"!/{folder}/{kind}" for kind in kinds)]
    return patterns


def _variables() -> dict[str, str]:
    """Return what the job takes along of the user's environment: nothing that is secret."""
    if "BT_HASH_KEY" in os.environ:
        logger.warning(
            "BT_HASH_KEY is not sent, since the dashboard shows a job's settings to everyone; put "
            "the key into a file on the cluster's nodes and name it by BT_HASH_KEY_FILE"
        )
    taken = (*limits.VARIABLES, *stores.VARIABLES)
    variables = {name: os.environ[name] for name in taken if name in os.environ}
    for name in stores.VARIABLES:
        storage.refuse_secrets(variables.get(name, ""))
    if location := os.environ.get("BT_HASH_KEY_FILE"):
        storage.refuse_secrets(location)
        variables["BT_HASH_KEY_FILE"] = storage.absolute(location)
    return variables


async def _stream(client: "JobSubmissionClient", address: str, job: str) -> None:
    """Print the log of a job until it ends.

    Raises:
        OSError: if the cluster cannot be reached any more. A machine that is switched off does not
            close the connection over which the log comes.
    """
    place = urlsplit(address)
    port = place.port or (443 if place.scheme == "https" else 80)
    streaming = asyncio.create_task(_print_log(client, job))
    while not streaming.done():
        await asyncio.wait({streaming}, timeout=_LOOK_SECONDS)
        if not streaming.done():
            reached = asyncio.open_connection(place.hostname, port)
            _, writer = await asyncio.wait_for(reached, timeout=_LOOK_SECONDS)
            writer.close()
    await streaming


async def _print_log(client: "JobSubmissionClient", job: str) -> None:
    async for text in client.tail_job_logs(job):
        sys.stdout.write(text)
        sys.stdout.flush()


def _wants_stop(job: str) -> bool:
    if not sys.stdin.isatty():
        return False
    return input(f"\nstop job {job} on the cluster too? [y/N] ").strip().lower() in ("y", "yes")
