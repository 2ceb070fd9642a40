"""Figures that Ray exports for Prometheus, each with the id of its run as the tag `run_id`.

Ray hands a gauge on once after it was set, but a counter until its node ends: what happens now and
then is counted. The last seconds of a process that is ended may be missing; files have it all.
"""

import time
from typing import Any, Final, TypeVar

from ray.util.metrics import Counter, Gauge, Histogram

from bt_core.log import run_id

EPOCHS: Final = "bt_epochs_total"
"""Name of the counter of trained epochs, of single trainings and of sweeps."""
_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)


def exported(
    kind: type[_Metric], name: str, description: str, tags: tuple[str, ...] = (), **options: Any
) -> _Metric:
    """Return a metric of Ray's, exported as `ray_NAME`, with tags of its own and `run_id`."""
    metric = kind(name, description, tag_keys=(*tags, "run_id"), **options)
    metric.set_default_tags({"run_id": run_id()})
    return metric


class WorkClock:
    """Counts the seconds in which a process works on batches, and those in which it waits for them.

    Args:
        name: what the names of the two counters begin with.
    """

    def __init__(self, name: str) -> None:
        self._busy = exported(Counter, f"{name}_busy_seconds_total", "Of work on batches.")
        self._wait = exported(Counter, f"{name}_wait_seconds_total", "Of waiting for batches.")
        self._since = time.monotonic()

    def asks(self) -> None:
        """Take note that the first of some batches is asked for now."""
        self._since = time.monotonic()

    def begins(self) -> None:
        """Take note that a batch is there."""
        self._wait.inc(self._lap())

    def ends(self) -> None:
        """Take note that the batch is done, and the next asked for."""
        self._busy.inc(self._lap())

    def _lap(self) -> float:
        before, self._since = self._since, time.monotonic()
        return self._since - before
