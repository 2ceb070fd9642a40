"""What scoring would do on many nodes: a model fitted to `bt bench pipeline` on a few.

A scan costs CPU time of the nodes. What a cluster has one of (the driver, which plans Ray Data's
tasks, and Ray's GCS) costs some for each scan, some for each second that goes by, and some for each
second and node; of it there is one second in a second. The rate is that of the one that is full
first. Not in it: the network, the store, nodes that fail, and that the GCS has several threads.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from scipy.optimize import nnls

SINGLE: Final = ("driver", "gcs")
"""What a cluster has one of."""
PARTS: Final = ("nodes", *SINGLE)
NODES: Final = (1, 4, 16, 64, 256, 1000)
NODE_CORES: Final = 16


class Cost(NamedTuple):
    """CPU seconds of one part: once, for each scan, each second, and each second and node."""

    start: float
    scan: float
    second: float
    node_second: float


def fit(rows: Sequence[Mapping[str, Any]]) -> dict[str, Cost]:
    """Return what each of `PARTS` costs.

    Of `SINGLE` by least squares with none below 0 (Lawson and Hanson). Of the nodes, which share
    this machine's cores and are never idle, the median over their numbers of what one scan more
    costs.

    Args:
        rows: of `bt bench pipeline`, of two sizes and two numbers of nodes at least: `num_scans`,
            `num_nodes`, `seconds` of wall time, and `NAME_seconds` of CPU time for each part.

    Raises:
        ValueError: if there are fewer sizes or numbers of nodes.
    """
    scans, nodes, seconds = (
        np.array([row[name] for row in rows], float)
        for name in ("num_scans", "num_nodes", "seconds")
    )
    if min(len(np.unique(scans)), len(np.unique(nodes))) < 2:
        raise ValueError("a model needs two sizes and two numbers of nodes at least")
    used = {part: np.array([row[f"{part}_seconds"] for row in rows], float) for part in PARTS}
    each = [np.polyfit(scans[nodes == n], used["nodes"][nodes == n], 1)[0] for n in set(nodes)]
    terms = np.stack([np.ones(len(rows)), scans, seconds, nodes * seconds], axis=1)
    scale = terms.max(axis=0)  # these differ by six orders of magnitude
    return {
        "nodes": Cost(0.0, max(0.0, float(np.median(each))), 0.0, 0.0),
        **{part: Cost(*(nnls(terms / scale, used[part])[0] / scale).tolist()) for part in SINGLE},
    }


def predict(
    costs: Mapping[str, Cost], model_ms: float, counts: Sequence[int] = NODES
) -> list[tuple[int, float, str]]:
    """Return the rate for numbers of nodes of `NODE_CORES` cores, and what is full first.

    Args:
        costs: as `fit` returns them.
        model_ms: CPU time of the model for a scan, in milliseconds.
        counts: numbers of nodes.

    Returns:
        Number of nodes, scans per second, and one of `PARTS`.
    """
    predicted = []
    for count in counts:
        rates = {}
        for part, cost in costs.items():
            cores = count * NODE_CORES if part == "nodes" else 1
            left = max(0.0, cores - cost.second - cost.node_second * count)
            scan = cost.scan + (model_ms / 1000 if part == "nodes" else 0.0)
            rates[part] = left / scan if scan else (np.inf if left else 0.0)
        full = min(rates, key=rates.__getitem__)
        predicted.append((count, float(rates[full]), full))
    return predicted


def last_that_grows(costs: Mapping[str, Cost], model_ms: float) -> int:
    """Return the number of nodes, 1,000 at most, up to which another one adds to the rate."""
    grows = [full == "nodes" for _, _, full in predict(costs, model_ms, range(1, NODES[-1] + 1))]
    return len(grows) if all(grows) else grows.index(False)
