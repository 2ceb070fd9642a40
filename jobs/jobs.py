"""`bt jobs`: what was submitted to a cluster, how far it is, and its end."""

import re
import sys
from datetime import UTC, datetime
from typing import Annotated, Final

import typer

from bt_core.errors import EXIT_OK
from cluster.submit import Follower
from jobs.command import GOES_ON

ClusterOption = Annotated[
    str,
    typer.Option(
        "--cluster",
        envvar="RAY_API_SERVER_ADDRESS",
        metavar="http://HOST:8265",
        help="Dashboard of the cluster.",
    ),
]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="As bt jobs list shows it.")]
_HERE = "http://127.0.0.1:8265"


def run_list(cluster: ClusterOption = _HERE) -> int:
    """Show the jobs of a cluster, the oldest first: state, when it began, how long, command."""
    from cluster.submit import submitted

    found = submitted(cluster)
    if not found:
        print(f"no jobs at {cluster}")
    for job in found:
        began = _time(job.start_time)
        ended = _time(job.end_time) or datetime.now(UTC)
        lasted = f"{(ended - began).total_seconds():.0f} s" if began else "-"
        since = f"{began:%Y-%m-%d %H:%M:%S}" if began else "-"
        print(f"{job.submission_id}  {job.status.value:9}  {since}  {lasted:>8}  {job.entrypoint}")
    return EXIT_OK


def run_follow(job: JobArgument, cluster: ClusterOption = _HERE) -> int:
    """Show a job's log until it ends, and end with its exit code."""
    from cluster.submit import follow

    return follow(cluster, job, FOLLOWER)


def run_stop(job: JobArgument, cluster: ClusterOption = _HERE) -> int:
    """Stop a job."""
    from cluster.submit import stop

    details, had_ended = stop(cluster, job)
    print(f"{job}: {'had ended before: ' if had_ended else ''}{details.status.value}")
    if details.status == "STOPPED":
        print(f"to have it done, {again(details.entrypoint)}")
    return EXIT_OK


def show(text: str) -> None:
    """Print a piece of a job's log."""
    print(text, end="", flush=True)


def wants_stop(job: str) -> bool:
    """Ask whether to stop a job; without a terminal, or without an answer, it goes on."""
    if not sys.stdin.isatty():
        return False
    try:
        return typer.confirm(f"\nstop job {job} on the cluster too?", err=True)
    except typer.Abort:  # Ctrl-C again, or Ctrl-D
        return False


def again(entrypoint: str) -> str:
    """Say what to do about a command that did not end, and what becomes of it then."""
    found = re.search(r"-m jobs\.(\w+)", entrypoint)
    if found is None:
        return "submit it again"
    return f"submit the same command again{GOES_ON.get(found[1], ': it begins anew')}"


FOLLOWER: Final = Follower(show, wants_stop, again)


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("jobs")
