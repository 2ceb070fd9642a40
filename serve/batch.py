"""Scoring through the ensemble that Ray Serve hosts, in place of one that each worker loads."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from ray import serve
from ray.exceptions import RayActorError

from bt_core.ensemble.scorer import Scorer
from bt_core.errors import RunError, UsageError
from bt_core.inference.predictor import needed_specs
from bt_core.models.bundle import Bundle
from serve.app import GATEWAY
from serve.settings import Targets

_TRIES: Final = 3
_SECONDS: Final = 600.0


class HostedEnsemble:
    """Answers as `Ensemble` does, by the replicas of an application.

    Args:
        bundle_location: folder of the bundle that it holds; its description is read.
        app: its name.
    """

    def __init__(self, bundle_location: str, app: str) -> None:
        self.info = Bundle(bundle_location).info
        self.specs, _ = needed_specs(self.info)
        self._handle = serve.get_app_handle(app)

    def answer(
        self, pixels: Sequence[np.ndarray], pixel_sha256: Sequence[str], gates: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return what `Ensemble.answer` does.

        Raises:
            RunError: if replicas die again and again.
        """
        for _ in range(_TRIES):
            try:
                call = self._handle.answer.remote(pixels, pixel_sha256, gates)
                answers: list[dict[str, Any]] = call.result(timeout_s=_SECONDS)
                return answers
            except RayActorError:
                continue
        raise RunError("the replicas of the hosted ensemble die; look at the logs of Ray Serve")


def hosted_scorer(bundle_location: str, app: str) -> Scorer:
    """Return a scorer that asks an application."""
    return Scorer.asking(HostedEnsemble(bundle_location, app))


def hosted_app(bundle: Bundle) -> str:
    """Return the name of the application that answers on this cluster.

    Raises:
        UsageError: if none does, or it holds another bundle.
    """
    if GATEWAY not in serve.status().applications:
        raise UsageError(
            "--via serve: no bt serve runs on this cluster; set RAY_ADDRESS to what the running "
            "one has printed"
        )
    state = serve.get_app_handle(GATEWAY).state.remote().result(timeout_s=60)
    hosted = Targets.model_validate(state["targets"]).ensemble
    held = serve.get_app_handle(hosted.app).bundle_id.remote().result(timeout_s=60)
    if held != bundle.info.bundle_id:
        raise UsageError(
            f"--via serve: what runs there holds bundle {held}, and not "
            f"{bundle.info.bundle_id}; name its folder, or swap it first"
        )
    return hosted.app
