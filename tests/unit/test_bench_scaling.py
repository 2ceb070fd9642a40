"""The model of many nodes: what is full first, on figures whose answer is known."""

import pytest

from jobs.bench_scaling import NODE_CORES, marginal_ms, predict


def row(num_nodes, num_scans, nodes_ms, driver_ms, gcs_ms):
    """Figures of a run that starts in 9, 5 and 1 seconds of CPU time."""
    costs = {"nodes": (9, nodes_ms), "driver": (5, driver_ms), "gcs": (1, gcs_ms)}
    seconds = {f"{k}_seconds": start + ms * num_scans / 1000 for k, (start, ms) in costs.items()}
    return {"num_nodes": num_nodes, "num_scans": num_scans, **seconds}


def test_what_starts_is_not_counted():
    rows = [row(1, 1000, 2.0, 0.5, 0.1), row(1, 5000, 2.0, 0.5, 0.1)]
    assert marginal_ms(rows)[1] == pytest.approx({"nodes": 2.0, "driver": 0.5, "gcs": 0.1})
    with pytest.raises(ValueError, match="give two"):
        marginal_ms(rows[:1])


def test_the_rate_is_that_of_what_is_full_first():
    """The driver takes 0.1 ms and 0.001 more for each node: at 1,000 nodes 1.1 ms."""
    marginal = {n: {"nodes": 8.0, "driver": 0.1 + 0.001 * n, "gcs": 0.05} for n in (1, 2, 4)}
    predicted = {count: (rate, full) for count, rate, full in predict(marginal, 0.0)}
    assert predicted[1] == (pytest.approx(NODE_CORES * 1000 / 8), "nodes")
    assert predicted[1000] == (pytest.approx(1000 / 1.1), "driver")
    with_model = {count: (rate, full) for count, rate, full in predict(marginal, 792.0)}
    assert with_model[16] == (pytest.approx(16 * NODE_CORES * 1000 / 800), "nodes")
