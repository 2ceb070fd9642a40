"""`bt cluster`: a Ray cluster of several nodes on this machine, or a node that joins one."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from bt_core.errors import EXIT_OK
from jobs.command import stop_signal

if TYPE_CHECKING:
    from cluster.local import Node

HostOption = Annotated[
    str, typer.Option(metavar="ADDRESS", help="Of this machine, by which others reach the node.")
]


def run_up(
    nodes: Annotated[int, typer.Option(min=0, help="That work, beside the head.")] = 2,
    cpus: Annotated[
        int | None,
        typer.Option(
            min=2, help="Logical CPUs of each. [default: its share of the cores, two at least]"
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of each.")] = 0,
    host: HostOption = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the head.")] = 6379,
    dashboard_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Of the dashboard, on loopback only.")
    ] = 8265,
) -> int:
    """Run a cluster of several nodes on this machine until Ctrl-C, for trying what runs on many.

    Who has no token, ~/.ray/auth_token, gets no answer from it.
    """
    from cluster.local import Node, NodeOptions, head, worker

    cores = len(os.sched_getaffinity(0))
    share = 0.3 / (nodes + 1)
    own = NodeOptions(host, cpus or max(2, cores // max(1, nodes)), gpus, share)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    stopped = stop_signal()
    running: list[Node] = []
    with ExitStack() as stack:
        first = NodeOptions(host, 0, 0, share)  # as in ray_cluster.yaml, it only coordinates
        try:
            running += [stack.enter_context(head(first, port, dashboard_port, stopped))]
            for _ in range(nodes):
                running += [stack.enter_context(worker(own, address, stopped))]
            print(f"{nodes} nodes of {own.num_cpus} CPUs and a head at {address}")
            print(f"as jobs: bt COMMAND ... --submit http://127.0.0.1:{dashboard_port}")
            print(f"from here: RAY_ADDRESS={address} bt COMMAND ...")
            if host != "127.0.0.1":
                print(f"more nodes: bt cluster join {address} --host ADDRESS, with the same token")
            print("Ctrl-C ends it", flush=True)
            _wait(stopped, running[0])
        finally:
            if running:
                print("ending, which takes up to half a minute", flush=True)
            for node in running[1:]:  # all at once, and the head behind them
                node.stop()
    print("ended")
    return EXIT_OK


def run_join(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Of the head.")],
    host: HostOption,
    cpus: Annotated[
        int | None, typer.Option(min=0, help="Logical CPUs. [default: the cores]")
    ] = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs.")] = 0,
) -> int:
    """Let this machine work for a cluster elsewhere until Ctrl-C, with the same token."""
    from cluster.local import NodeOptions, worker
    from cluster.pins import warn_unless_locked

    warn_unless_locked()
    num_cpus = len(os.sched_getaffinity(0)) if cpus is None else cpus
    stopped = stop_signal()
    with worker(NodeOptions(host, num_cpus, gpus), address, stopped) as node:
        print(f"{num_cpus} CPUs at {host} work for {address}; Ctrl-C ends it", flush=True)
        _wait(stopped, node)
    return EXIT_OK


def _wait(stopped: Callable[[], bool], node: "Node") -> None:
    """Return at a signal.

    Raises:
        RunError: if the node ends by itself.
    """
    while not stopped():
        node.check()
        time.sleep(0.5)


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("cluster")
