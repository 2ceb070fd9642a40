"""The Grafana dashboard: what its figures are made of is counted somewhere."""

import re
from itertools import combinations

import pytest

from tests.dashboard import DASHBOARD, RUN, SHOWN, metrics_of
from tests.unit.manifests import document, documents
from tests.unit.test_import_direction import ROOT

PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
SOURCES = [p.read_text() for top in ("bt_core", "serve") for p in (ROOT / top).rglob("*.py")]


def counted():
    """The names of what this project counts, by its code."""
    names = {name for text in SOURCES for name in re.findall(r'"(bt_\w+)"', text)}
    clocks = {name for text in SOURCES for name in re.findall(r'WorkClock\("(\w+)"\)', text)}
    return names | {f"{c}_{what}_seconds_total" for c in clocks for what in ("busy", "wait")}


@pytest.mark.parametrize(("title", "expression"), SHOWN)
def test_every_figure_of_ours_is_counted_and_told_apart_by_run(title, expression):
    ours = {name for name in metrics_of(expression) if name.startswith("ray_bt_")}
    assert {name.removeprefix("ray_") for name in ours} <= counted()
    assert expression.count(RUN) == len(re.findall(r"ray_bt_\w+", expression))
    assert metrics_of(expression)


def test_panels_name_the_chosen_source_and_lie_side_by_side():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}
    for one, other in combinations((panel["gridPos"] for panel in DASHBOARD["panels"]), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in PANELS)


def test_on_kubernetes_the_pods_are_read_that_let_prometheus_in():
    monitor = document("pod_monitor.yaml")
    (policy,) = [p for p in documents("network_policy.yaml") if p["metadata"]["name"] == "nodes"]
    assert monitor["metadata"]["namespace"] == policy["metadata"]["namespace"]
    assert monitor["spec"]["selector"] == policy["spec"]["podSelector"]
    assert [end["port"] for end in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]
