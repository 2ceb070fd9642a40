"""The deployment that says what moved an answer, by torch models, since maps need gradients."""

import asyncio
import threading
from typing import TYPE_CHECKING, Any, Final

from ray import serve

from serve.hosted import Explained, Scan

if TYPE_CHECKING:
    from bt_core.evaluation.explainer import Explainer

MAX_WAITING: Final = 8
"""Of each gateway: an explanation passes every member over twenty times, an answer once."""


# None is started before it is asked for.
@serve.deployment(
    max_ongoing_requests=1,
    max_queued_requests=MAX_WAITING,
    autoscaling_config={"min_replicas": 0, "max_replicas": 1, "target_ongoing_requests": 1},
    ray_actor_options={"num_cpus": 0.1},
)
class ExplainerDeployment:
    """Explains one answer at a time with the bundle that gave it, which it loads when asked.

    Args:
        num_threads: torch threads.
    """

    def __init__(self, num_threads: int) -> None:
        self._explainer = LazyExplainer(num_threads)

    async def explain(
        self, location: str, bundle_id: str, scan: Scan, answer: dict[str, Any], draw: bool
    ) -> Explained:
        """Return what `LazyExplainer.explain` returns."""
        return await asyncio.to_thread(
            self._explainer.explain, location, bundle_id, scan, answer, draw
        )


class LazyExplainer:
    """Keeps the bundle that it was asked for last.

    Args:
        num_threads: torch threads.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._loaded: tuple[tuple[str, str], Explainer] | None = None
        self._lock = threading.Lock()  # whoever gave up waiting leaves a thread behind

    def explain(
        self, location: str, bundle_id: str, scan: Scan, answer: dict[str, Any], draw: bool
    ) -> Explained:
        """Return what moved an answer.

        Args:
            location: folder of the bundle.
            bundle_id: that of the bundle which answered; what is loaded may be another by now.
            scan: decoded.
            answer: with the fields of a prediction.
            draw: draw the map over the pixels as well.
        """
        from bt_core.evaluation.explainer import FIGURES
        from bt_core.evaluation.sheets import overlay_png, square

        with self._lock:
            explainer = self._load(location, bundle_id)
            pixels = [image_SS[None] for image_SS in scan[0]]
            (row,) = explainer.explain(pixels, [answer])
            (members,) = explainer.ensemble.votes(pixels)
            return Explained(
                bundle_id=explainer.ensemble.info.bundle_id,
                heat_SS=square(row, "heat"),
                spec=explainer.ensemble.predictor.spec_of[0],
                method=row["method"],
                heat_members=explainer.drawn_members,
                members=members,
                figures={name: row[name] for name in FIGURES},
                overlay=overlay_png(row) if draw else b"",
            )

    def _load(self, location: str, bundle_id: str) -> "Explainer":
        from bt_core.evaluation.explainer import Explainer

        if self._loaded is None or self._loaded[0] != (location, bundle_id):
            self._loaded = None  # two of them may not fit into memory
            explainer = Explainer(location, "cpu", self._num_threads)
            self._loaded = (location, bundle_id), explainer
        return self._loaded[1]
