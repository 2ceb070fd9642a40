"""What scoring would do on many nodes: a model fitted to `bt bench pipeline` on a few.

A scan costs CPU time of the nodes, which more nodes share, and of what a cluster has one of: the
driver, which plans Ray Data's tasks, and Ray's GCS. All are taken between two sizes of archive, so
that starting is left out, and what there is one of as a line over the number of nodes. The rate is
that of the one that is full first. Not in it: the network, the store, and nodes that fail.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

SINGLE: Final = ("driver", "gcs")
"""What a cluster has one of."""
NODES: Final = (1, 4, 16, 64, 256, 1000)
NODE_CORES: Final = 16


def marginal_ms(rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Return milliseconds of CPU time for one scan more, by number of nodes.

    Args:
        rows: of `bt bench pipeline`, with two sizes at least for each number of nodes; of `nodes`,
            and of each in `SINGLE`, `NAME_seconds` of CPU time in all.

    Raises:
        ValueError: if there is one size only.
    """
    found = {}
    for num_nodes in sorted({row["num_nodes"] for row in rows}):
        own = sorted((r for r in rows if r["num_nodes"] == num_nodes), key=lambda r: r["num_scans"])
        first, last = own[0], own[-1]
        more = last["num_scans"] - first["num_scans"]
        if not more:
            raise ValueError("one size tells nothing of what one scan more costs: give two")
        found[num_nodes] = {
            name: max(0.0, 1000 * (last[f"{name}_seconds"] - first[f"{name}_seconds"]) / more)
            for name in ("nodes", *SINGLE)
        }
    return found


def predict(
    marginal: Mapping[int, Mapping[str, float]], model_ms: float
) -> list[tuple[int, float, str]]:
    """Return the rate for each of `NODES` nodes of `NODE_CORES` cores, and what is full first.

    Args:
        marginal: as `marginal_ms` returns it.
        model_ms: CPU time of the model for a scan, in milliseconds.

    Returns:
        Number of nodes, scans per second, and `nodes` or one of `SINGLE`.
    """
    counts = np.array(sorted(marginal), float)
    work = float(np.median([each["nodes"] for each in marginal.values()])) + model_ms
    predicted = []
    for num_nodes in NODES:
        rates = {"nodes": num_nodes * NODE_CORES * 1000 / work}
        for name in SINGLE:
            costs = np.array([marginal[int(count)][name] for count in counts])
            slope, start = np.polyfit(counts, costs, 1) if len(counts) > 1 else (0.0, costs[0])
            cost = max(start, 0.0) + max(slope, 0.0) * num_nodes
            rates[name] = 1000 / cost if cost > 0 else float("inf")
        full = min(rates, key=rates.__getitem__)
        predicted.append((num_nodes, rates[full], full))
    return predicted
