"""What is counted and timed, for Prometheus: by Ray's own exporters, gathered at `/metrics`."""

import asyncio
import re
import time
from collections import defaultdict
from typing import Any, Final

import httpx
import ray
from fastapi import APIRouter, Response
from ray.util.metrics import Counter, Gauge, Histogram

from bt_core.ensemble.drift import DriftWatch
from bt_core.models.bundle import BundleInfo
from bt_core.telemetry import exported
from serve.access import require
from serve.service import Observer

_SECONDS: Final = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0]
_EVERY: Final = 20
"""Answers between two looks at the drift."""
_SECONDS_BETWEEN_COUNTS: Final = 1.0
_KEPT: Final = re.compile(r"^(# (?:HELP|TYPE) )?ray_((?:bt|serve)_\w+)")
_TIMEOUT_SECONDS: Final = 5.0
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

routes = APIRouter(tags=["health"])


class RayObserver(Observer):
    """Counts for Ray's exporter; each replica has its own numbers, told apart by tags."""

    def __init__(self) -> None:
        self._stages = exported(
            Histogram, "bt_stage_seconds", "Of one scan.", ("stage",), boundaries=_SECONDS
        )
        self._results = exported(
            Counter, "bt_scans_total", "Answered or refused.", ("status", "reason")
        )
        self._labels = exported(Counter, "bt_labels_total", "Predicted classes.", ("label",))
        self._turned_away = exported(
            Counter, "bt_turned_away_total", "Requests for which there was no room."
        )
        self._shadow = exported(
            Counter, "bt_shadow_total", "Scans that the shadow answered, too.", ("agrees",)
        )
        self._drift = exported(
            Gauge,
            "bt_drift_stability_index",
            "Of the latest 1000 answers against the validation scans; over 0.25 is a shift.",
            ("quantity",),
        )
        self._num_turned_away, self._counted_at = 0, 0.0
        self._watch: DriftWatch | None = None
        self._num_answered = 0

    def hosts(self, info: BundleInfo) -> None:
        """Compare with the validation scans of this bundle from now on."""
        self._watch = DriftWatch(info.drift) if info.drift else None

    def took(self, stage: str, seconds: float) -> None:
        """Time a stage of one scan."""
        self._stages.observe(seconds, {"stage": stage})

    def answered(self, result: dict[str, Any], intensity: float | None) -> None:
        """Count a result, and look at the drift now and then."""
        self._results.inc(1, {"status": result["status"], "reason": result["reason"]})
        if intensity is None:
            return
        self._labels.inc(1, {"label": result["predicted_label"]})
        if self._watch is None:
            return
        self._watch.add({"confidence": result["confidence"], "intensity": intensity})
        self._num_answered += 1
        if self._num_answered % _EVERY == 0:
            for quantity, index in self._watch.stability().items():
                self._drift.set(index, {"quantity": quantity})

    def turned_away(self) -> None:
        """Count requests for which there was no room."""
        # Not each by itself: a call of Ray's gives other threads their turn, which takes longer
        # than all the rest of a refusal.
        self._num_turned_away += 1
        now = time.monotonic()
        if now - self._counted_at >= _SECONDS_BETWEEN_COUNTS:
            self._turned_away.inc(self._num_turned_away)
            self._num_turned_away, self._counted_at = 0, now

    def compared(self, agrees: bool) -> None:
        """Count a scan that the shadow answered, too."""
        self._shadow.inc(1, {"agrees": str(agrees).lower()})


@routes.get(
    "/metrics",
    operation_id="metrics",
    response_class=Response,
    dependencies=[require("admin")],
)
async def metrics() -> Response:
    """Give the figures of all replicas on all nodes, as Prometheus reads them.

    Ray exports them every ten seconds. Only those of this project and of Ray Serve are here; each
    node's own exporter has all.
    """
    nodes = await asyncio.to_thread(ray.nodes)
    urls = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in nodes
        if node["Alive"]
    ]
    async with httpx.AsyncClient(timeout=_TIMEOUT_SECONDS) as client:
        answers = await asyncio.gather(*(client.get(url) for url in urls), return_exceptions=True)
    texts = [answer.text for answer in answers if isinstance(answer, httpx.Response)]
    return Response(gathered(texts), media_type=CONTENT_TYPE)


def gathered(texts: list[str]) -> str:
    """Return the metrics of this application and of Ray Serve out of several exporters' texts.

    Each metric's HELP and TYPE stand once, before its samples, as the format asks.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = defaultdict(list)
    for text in texts:
        name = ""
        own_heads: list[str] = []
        for line in text.splitlines():
            found = _KEPT.match(line)
            if line.startswith("# HELP "):
                name, own_heads = line.split(" ")[2], []
            if found is None:
                continue
            if line.startswith("#"):
                own_heads.append(line)
                heads[name] = own_heads
            else:
                samples[name].append(line)
    lines = [line for name in samples for line in (*heads.get(name, ()), *samples[name])]
    return "\n".join(lines) + "\n"
