"""The Grafana dashboard as tests look at it."""

import json
import re
from pathlib import Path

FILE = Path(__file__).parents[1] / "cluster" / "grafana_dashboard.json"
DASHBOARD = json.loads(FILE.read_text())
RUN = 'run_id=~"$run_id"'
SHOWN = [
    (panel["title"], target["expr"])
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", ())
]
"""Titles and PromQL expressions of all curves."""


def metrics_of(expression):
    """Return the names of the metrics in an expression, a histogram's without its suffix."""
    return {name.removesuffix("_bucket") for name in re.findall(r"\bray_\w+", expression)}


def filled_in(expression):
    """Return an expression as Grafana sends it, with all runs chosen."""
    return expression.replace("$run_id", ".*").replace("$__rate_interval", "5m")
