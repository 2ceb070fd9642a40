"""The model of many nodes: what is full first, on figures whose answer is known."""

import pytest

from jobs.bench_scaling import NODE_CORES, Cost, fit, last_that_grows, predict

COSTS = {
    "nodes": Cost(0.0, 0.008, 0.0, 0.0),
    "driver": Cost(5.0, 0.0001, 0.05, 0.0),
    "gcs": Cost(1.0, 0.0, 0.01, 0.0005),
}


def row(num_nodes, num_scans, seconds):
    """Figures of a run whose costs are `COSTS`."""
    own = {"num_nodes": num_nodes, "num_scans": num_scans, "seconds": seconds}
    for part, (start, scan, second, node_second) in COSTS.items():
        used = start + scan * num_scans + (second + node_second * num_nodes) * seconds
        own[f"{part}_seconds"] = used
    return own


def test_the_costs_behind_the_figures_are_found():
    rows = [
        row(n, size, 20 + size * (0.01 + 0.002 * n)) for n in (1, 2, 4) for size in (1000, 9000)
    ]
    for part, found in fit(rows).items():
        assert found == pytest.approx(COSTS[part], abs=1e-6), part
    for fewer in (rows[::2], rows[:2]):
        with pytest.raises(ValueError, match="two sizes and two numbers of nodes"):
            fit(fewer)


def test_the_rate_is_that_of_what_is_full_first():
    """One driver has room for 9,500 scans a second; the GCS is full of 1,980 nodes alone."""
    predicted = {count: (rate, full) for count, rate, full in predict(COSTS, 0.0)}
    assert predicted[1] == (pytest.approx(NODE_CORES / 0.008), "nodes")
    assert predicted[1000] == (pytest.approx(0.95 / 0.0001), "driver")
    with_model = {count: (rate, full) for count, rate, full in predict(COSTS, 792.0)}
    assert with_model[16] == (pytest.approx(16 * NODE_CORES / 0.8), "nodes")
    assert predict(COSTS, 0.0, [2000]) == [(2000, 0.0, "gcs")]


def test_the_last_node_that_adds_to_the_rate_is_named():
    assert last_that_grows(COSTS, 0.0) == 4  # of 2,000 scans a second each
    assert last_that_grows(COSTS, 792.0) == 475
    assert last_that_grows(COSTS, 10_000.0) == 1000
