"""The deployment that receives requests: the HTTP API over ensembles of other applications."""

import asyncio
import time
from typing import Any, Final

import numpy as np
from fastapi import FastAPI
from grpc.aio import AioRpcError
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from bt_core import log
from bt_core.config import parse
from bt_core.errors import BtError, RunError
from bt_core.models.bundle import Bundle, BundleInfo
from serve import metrics
from serve.api import build_api
from serve.hosted import Explain, Explained, HostedBundle, OverloadedError, Scan
from serve.model import MAX_BATCH
from serve.service import ANSWER_SECONDS, Service
from serve.settings import REQUEST_SECONDS, Hosted, ServeSettings, Targets

TRIES: Final = 3
"""How often a scan is sent when replicas die under it; an answer has no side effects."""
EXPLAIN_SECONDS: Final = 25.0
"""That an explanation may take with the start of its replica; below Serve's own time-out."""
_GATHER_SECONDS: Final = 0.02
"""For which a scan waits for others at most, to go with them in one call."""
_MOST_SECONDS: Final = 600.0
"""That an application may take to load its ensemble."""
_BUSY: Final = (BackPressureError, DeploymentUnavailableError)
_GONE: Final = (*_BUSY, RayActorError)


# Serve's own limits, whose answers are plain text, lie above those of the service.
# A changed one starts before the old one ends.
@serve.deployment(
    max_ongoing_requests=1000,
    max_surge_percent=100,
    graceful_shutdown_timeout_s=REQUEST_SECONDS,
    ray_actor_options={"num_cpus": 0.1},
    # The audit log says more, and a line of Serve's costs a sixth of what a request does here.
    logging_config={"enable_access_log": False},
)
@serve.ingress()
class Gateway:
    """Decodes and preprocesses scans, so that only whole ones reach an ensemble's batches.

    Args:
        settings: of the application; those of the ensemble do not matter.
        explainer: handle of what says what moved an answer.
    """

    def __init__(self, settings: dict[str, Any], explainer: DeploymentHandle) -> None:
        log.configure()  # into the log files of this replica
        self._settings = settings
        self._explainer = explainer
        parsed = parse(ServeSettings, settings, "serve settings")
        self._service = Service(parsed, observer=metrics.RayObserver())
        self._targets: Targets | None = None

    async def reconfigure(self, targets: dict[str, Any]) -> None:
        """Turn to other ensembles, once they answer; what is being answered is not disturbed.

        Raises:
            BtError: if they do not, unless there is one that goes on answering.
        """
        wanted = parse(Targets, targets, "targets of the gateway")
        try:
            ensemble = await self._opened(wanted.ensemble)
            shadow = None if wanted.shadow is None else await self._opened(wanted.shadow)
        except BtError as error:
            if self._targets is None:
                raise
            log.logger.error("the bundle before goes on answering: %s", error)
            return
        self._service.host(ensemble, shadow, wanted.shadow_share)
        self._targets = wanted

    def state(self) -> dict[str, Any]:
        """Return the settings, and the targets in use."""
        targets = self._targets.model_dump() if self._targets else None
        return {"settings": self._settings, "targets": targets}

    async def _opened(self, hosted: Hosted) -> HostedBundle:
        """Return the ensemble of an application, once it answers.

        Raises:
            RunError: if it does not, or holds another bundle.
        """
        info = Bundle(hosted.bundle).info
        explain = explained_by(self._explainer, hosted.bundle, info.bundle_id)
        deadline = time.monotonic() + _MOST_SECONDS
        while True:
            try:
                opened = hosted_bundle(
                    hosted.bundle, info, serve.get_app_handle(hosted.app), explain
                )
                loaded = await opened.loaded_id()
                break
            except (RayServeException, OverloadedError):
                if time.monotonic() > deadline:
                    raise RunError(f"application {hosted.app} does not answer") from None
                await asyncio.sleep(0.5)
        if loaded != info.bundle_id:
            raise RunError(f"application {hosted.app} holds bundle {loaded}, not {info.bundle_id}")
        return opened

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the API, once the service is there."""
        api = build_api(self._service)
        api.include_router(metrics.routes)
        return api


def hosted_bundle(
    location: str, info: BundleInfo, handle: DeploymentHandle, explain: Explain
) -> HostedBundle:
    """Return the ensemble behind a handle, and what explains its answers."""
    # By gRPC, with plain pickle, which costs less than Ray's default, a task of the actor.
    predicting = handle.options(
        method_name="predict",
        _by_reference=False,
        request_serialization="pickle",
        response_serialization="pickle",
    )

    async def ask(scans: list[Scan]) -> list[dict[str, Any]]:
        of_specs, digests, gates = zip(*scans, strict=True)
        pixels = [np.stack(same) for same in zip(*of_specs, strict=True)]
        for attempt in range(1, TRIES + 1):
            try:
                call = predicting.remote(pixels, digests, gates)
                found: list[dict[str, Any]] = await asyncio.wait_for(call, ANSWER_SECONDS)
                return found
            except (RayActorError, AioRpcError) as error:
                if attempt == TRIES:
                    raise OverloadedError from error
            # Cancelled: by the replica, which ends.
            except (*_BUSY, TimeoutError, asyncio.CancelledError) as error:
                raise OverloadedError from error
        raise AssertionError("unreachable")

    # Here rather than at the replica: a call costs as much as the model needs for a scan.
    @serve.batch(  # type: ignore[untyped-decorator]
        max_batch_size=MAX_BATCH, batch_wait_timeout_s=_GATHER_SECONDS, max_concurrent_batches=16
    )
    async def predict_all(scans: list[Scan]) -> list[dict[str, Any] | BaseException]:
        try:
            return [*await ask(scans)]
        except RayTaskError as error:  # of one scan, perhaps: it is not to cost others their answer
            if len(scans) == 1:
                return [error]
        alone = (ask([scan]) for scan in scans)
        found = await asyncio.gather(*alone, return_exceptions=True)
        return [one if isinstance(one, BaseException) else one[0] for one in found]

    num_waiting = 0

    async def predict(scan: Scan) -> dict[str, Any]:
        nonlocal num_waiting
        num_waiting += 1
        # One that is alone goes at once; of many, half go while the other half are answered.
        predict_all.set_max_batch_size(min(MAX_BATCH, max(1, num_waiting // 2)))
        try:
            answer: dict[str, Any] | BaseException = await predict_all(scan)
        finally:
            num_waiting -= 1
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def loaded_id() -> str:
        try:
            bundle_id: str = await handle.bundle_id.remote()
        except _GONE as error:
            raise OverloadedError from error
        return bundle_id

    return HostedBundle(location, info, predict, loaded_id, explain)


def explained_by(handle: DeploymentHandle, location: str, bundle_id: str) -> Explain:
    """Return what explains the answers of a bundle, behind a handle."""

    async def explain(scan: Scan, answer: dict[str, Any], draw: bool) -> Explained:
        response = handle.explain.remote(location, bundle_id, scan, answer, draw)
        try:
            explained: Explained = await asyncio.wait_for(response, EXPLAIN_SECONDS)
        except RayTaskError as error:  # as of a bundle whose weights are damaged
            why = type(error.cause).__name__
            log.logger.error("cannot explain with bundle %s: %s", bundle_id, why)
            raise OverloadedError from error
        except (
            TimeoutError, BackPressureError, DeploymentUnavailableError, RayActorError
        ) as error:  # fmt: skip
            raise OverloadedError from error
        return explained

    return explain
