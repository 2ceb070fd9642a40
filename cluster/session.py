"""The one place that starts or joins Ray."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from bt_core.errors import UsageError
from bt_core.log import RUN_ID, logger, run_id
from bt_core.models.bundle import Bundle
from bt_core.scans.preprocess import PreprocessSpec
from cluster.environment import plain_variables
from cluster.pins import warn_unless_locked
from cluster.submit import SCORING_JOB
from cluster.token import TOKEN_FILE

_LEAST_SHARE = 0.25
"""Of a CPU that a scorer holds, so that not too many start on one node of a mixed cluster."""

_LEAST_NODE_CPUS = 2
"""With one CPU each, nodes on which a scorer holds a part have no whole one for a task."""

_BOUNDED = {"RAY_task_oom_retries": "2"}
"""How often a task is done again whose process took the last memory: Ray's default is for ever.
Each process that hands out tasks counts by itself, the driver and all workers."""


@dataclass(frozen=True)
class Resources:
    """What the cluster has in all: logical CPUs, GPUs, living nodes, CPUs of the largest.

    Attributes:
        held_cpus: by others, such as an ensemble that answers online.
        cpus_per_gpu: on the node that has fewest for each of its GPUs; 0 without GPUs.
    """

    num_cpus: float
    num_gpus: float
    num_nodes: int
    largest_node_cpus: float
    held_cpus: float = 0.0
    cpus_per_gpu: float = 0.0

    def room(self, device: str) -> float:
        """Return how many CPUs a worker can hold at most: with a GPU, the GPU's share of its node.

        One that held more would leave a GPU without a worker, or wait for ever.
        """
        return self.cpus_per_gpu if device == "cuda" else self.largest_node_cpus

    def scorers(self, device: str) -> tuple[int, float, float]:
        """Return number of scoring actors, CPUs and GPUs of each.

        On CPUs, actors hold half of the logical CPUs that are there without the largest node, so
        that decoding always finds one, even when a node is lost and its actors start on another;
        each uses one thread, so actors and threads never exceed the cores. Where others hold CPUs,
        actors leave a whole one, which the tasks that read take; without it they would wait for
        ever.
        """
        # A node that alone has CPUs, beside a head that has none, cannot be lost without an end.
        lasting = self.num_cpus - self.largest_node_cpus or self.num_cpus
        if device == "cuda":
            return int(self.num_gpus), min(1.0, lasting / (4 * self.num_gpus)), 1.0
        actors = max(1, int(self.num_cpus))
        share = max(_LEAST_SHARE, round(lasting / (2 * actors), 3))
        if self.held_cpus:
            room = max(_LEAST_SHARE, self.num_cpus - self.held_cpus - 1)
            actors = min(actors, int(room / _LEAST_SHARE))
            share = min(share, round(room / actors, 3))
        return actors, share, 0.0


@contextmanager
def session(
    num_cpus: int | None = None,
    dashboard: bool = False,
    worker_env: Mapping[str, str] | None = None,
) -> Iterator[Resources]:
    """Join the cluster of `RAY_ADDRESS` (set inside a submitted job), or start Ray on this machine.

    A Ray that was running in this process already is used and left running. Ray itself protects a
    local cluster with a token (unless `RAY_AUTH_MODE=disabled` is exported); the token file is
    closed to others.

    Args:
        num_cpus: logical CPUs of a local Ray; None takes all cores, and two at least, since an
            actor and the tasks that feed it need one each.
        dashboard: give a local Ray its dashboard, ten processes more, which takes jobs too; of
            those that the HTTP API submits one at a time.
        worker_env: environment variables of all processes that work for this one, besides their
            own. Without effect on a Ray that was running in this process already.

    Raises:
        UsageError: if the cluster cannot be reached, or no node is there that could work.
    """
    started = not ray.is_initialized()
    if started:
        _init(num_cpus, dashboard, worker_env)
    try:
        resources = ray.cluster_resources()
        nodes = [node for node in ray.nodes() if node["Alive"]]
        cpus = float(resources.get("CPU", 0))
        largest = max((float(n["Resources"].get("CPU", 0)) for n in nodes), default=0.0)
        _refuse_too_small(largest)
        is_new = started and "RAY_ADDRESS" not in os.environ
        free_cpus = cpus if is_new else float(ray.available_resources().get("CPU", 0))
        found = Resources(
            num_cpus=cpus,
            num_gpus=float(resources.get("GPU", 0)),
            num_nodes=len(nodes),
            largest_node_cpus=largest,
            held_cpus=cpus - free_cpus,
            cpus_per_gpu=_cpus_per_gpu([node["Resources"] for node in nodes]),
        )
        if started:
            warn_unless_locked()
            logger.info(
                "Ray: %d node(s), %g CPUs, %g GPUs",
                found.num_nodes,
                found.num_cpus,
                found.num_gpus,
            )
        yield found
    except KeyboardInterrupt:
        logger.info("interrupted: ending, which takes some seconds")
        raise
    finally:
        if started:
            ray.shutdown()


def _refuse_too_small(largest_node_cpus: float) -> None:
    """Raise UsageError for a cluster on which actors may hold a part of every node's only CPU.

    Tasks take whole CPUs, so those that read and decode would then wait for ever.
    """
    if largest_node_cpus < _LEAST_NODE_CPUS:
        raise UsageError(
            f"needs a node of {_LEAST_NODE_CPUS} CPUs at least; the largest of this cluster has "
            f"{largest_node_cpus:g}: let a larger one join, or wait until one is up (commands plan "
            "with the nodes that are there)"
        )


def _cpus_per_gpu(nodes: Sequence[Mapping[str, float]]) -> float:
    return min((n.get("CPU", 0.0) / n["GPU"] for n in nodes if n.get("GPU")), default=0.0)


def choose_device(device: str, resources: Resources) -> str:
    """Resolve `auto` to what is there, and check that what is asked for is there.

    Raises:
        UsageError: if `device` is none of auto, cpu and cuda, or the cluster has no GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device}: use auto, cpu or cuda")
    if device == "auto":
        return "cuda" if resources.num_gpus >= 1 else "cpu"
    if device == "cuda" and resources.num_gpus < 1:
        raise UsageError("--device cuda needs 1 GPU; the cluster has 0: use --device cpu")
    return device


@contextmanager
def placed(
    bundle: Bundle, device: str
) -> Iterator[tuple[tuple[PreprocessSpec, ...], str, tuple[int, float, float]]]:
    """Start or join Ray for work with a bundle, while the block runs.

    Yields:
        The bundle's distinct preprocessing specs, the device, and number, CPUs and GPUs of actors.
    """
    from bt_core.inference.predictor import needed_specs

    specs, _ = needed_specs(bundle.info)
    with session() as resources:
        chosen = choose_device(device, resources)
        yield specs, chosen, resources.scorers(chosen)


def _init(num_cpus: int | None, dashboard: bool, worker_env: Mapping[str, str] | None) -> None:
    for name, value in _BOUNDED.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    variables = dict(worker_env or {})
    if address:  # a local Ray inherits the others
        bounded = {name: os.environ[name] for name in _BOUNDED}
        variables = {RUN_ID: run_id(), **bounded, **plain_variables(), **variables}
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    try:
        if address:
            # A job that was submitted with a run id has it from there, too, which Ray would refuse.
            os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
            ray.init(
                address=address,
                runtime_env={"env_vars": variables},
                logging_level=logging.WARNING,
                log_to_driver=False,
            )
            return
        cores = num_cpus or max(2, len(os.sched_getaffinity(0)))
        # Ray ends idle processes over one for each CPU; the next step then waits for their imports.
        os.environ.setdefault("RAY_num_workers_soft_limit", str(2 * cores))
        if dashboard:  # jobs wait for each other; Ray gives up one that waits for 15 minutes
            os.environ.setdefault("RAY_JOB_START_TIMEOUT_SECONDS", str(7 * 24 * 3600))
        ray.init(
            address="local",
            num_cpus=cores,
            runtime_env={"env_vars": variables} if variables else None,
            include_dashboard=dashboard,
            resources={SCORING_JOB: 1} if dashboard else None,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
    except Exception as error:  # Ray raises plain ones, too
        if not address:
            raise UsageError(
                f"Ray did not start on this machine: {error}; give the command again, or set "
                "RAY_ADDRESS to a cluster that runs"
            ) from error
        raise UsageError(
            f"cannot reach Ray at {address}: {error}; check RAY_ADDRESS and, for a cluster that "
            "needs a token, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from error
    token = TOKEN_FILE.expanduser()
    if token.exists():
        token.chmod(0o600)
