"""The deployment that receives requests: the HTTP API over an ensemble on other replicas."""

from typing import Any, Final

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from bt_core.config import parse
from bt_core.models.bundle import Bundle, BundleInfo
from serve.api import build_api
from serve.service import HostedBundle, OverloadedError, Scan, Service
from serve.settings import ServeSettings

TRIES: Final = 3
"""How often a scan is sent when replicas die under it; an answer has no side effects."""


# Serve's own limits, whose answers are plain text, lie above those of the service.
@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1})
@serve.ingress()
class Gateway:
    """Decodes and preprocesses scans, so that only whole ones reach the ensemble's batches.

    Args:
        settings: of the application; the bundle's description is read, not its weights.
        ensemble: handle of the ensemble's deployment.
    """

    def __init__(self, settings: dict[str, Any], ensemble: DeploymentHandle) -> None:
        parsed = parse(ServeSettings, settings, "serve settings")
        info = Bundle(parsed.bundle).info
        self._service = Service(parsed, hosted(info, ensemble))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the API, once the service is there."""
        return build_api(self._service)


def hosted(info: BundleInfo, handle: DeploymentHandle) -> HostedBundle:
    """Return the ensemble behind a handle."""

    async def predict(scan: Scan) -> dict[str, Any]:
        for attempt in range(1, TRIES + 1):
            try:
                answer: dict[str, Any] = await handle.predict.remote(scan)
                return answer
            except RayActorError as error:
                if attempt == TRIES:
                    raise OverloadedError from error
            except (BackPressureError, DeploymentUnavailableError) as error:
                raise OverloadedError from error
        raise AssertionError("unreachable")

    async def loaded_id() -> str:
        try:
            bundle_id: str = await handle.bundle_id.remote()
        except (BackPressureError, DeploymentUnavailableError, RayActorError) as error:
            raise OverloadedError from error
        return bundle_id

    return HostedBundle(info, predict, loaded_id)
