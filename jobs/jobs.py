"""`bt jobs`: what was submitted to a cluster, how far it is, and its end."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from bt_core.errors import EXIT_OK

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

    for job in submitted(cluster):
        began = _time(job.start_time)
        ended = _time(job.end_time) or datetime.now(UTC)
        lasted = f"{(ended - began).total_seconds():.0f} s" if began else "-"
        since = f"{began:%Y-%m-%d %H:%M:%S}" if began else "-"
        print(f"{job.submission_id}  {job.status.value:9}  {since}  {lasted:>8}  {job.entrypoint}")
    return EXIT_OK


def run_follow(job: JobArgument, cluster: ClusterOption = _HERE) -> int:
    """Show a job's log until it ends, and end with its exit code."""
    from cluster.submit import follow

    return follow(cluster, job)


def run_stop(job: JobArgument, cluster: ClusterOption = _HERE) -> int:
    """Stop a job; the same command submitted again goes on where it was."""
    from cluster.submit import stop

    print(f"{job}: {stop(cluster, job)}")
    return EXIT_OK


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("jobs")
