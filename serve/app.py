"""Builds the Ray Serve application; `serve.app:build` is its import path."""

import logging
from typing import Literal, cast

from pydantic import Field
from ray import serve
from ray.serve import Application, Deployment

from bt_core.config import StrictModel, parse
from bt_core.errors import UsageError
from serve.api import Gateway
from serve.model import EnsembleDeployment

APP_NAME = "bt"


class ServeSettings(StrictModel):
    """Arguments of the application, also in a Serve config file."""

    bundle: str
    device: Literal["cpu", "cuda"] = "cpu"
    num_replicas: int = Field(1, ge=1)
    """Copies of the ensemble."""
    threads_per_replica: int = Field(1, ge=1)
    """Torch threads of a copy on the CPU; copies times threads should not exceed the cores."""
    cpus_per_replica: float = Field(0.5, gt=0)
    cascade: bool = True
    """Let the first member answer alone where the bundle says that this is safe."""


def build(args: dict[str, object]) -> Application:
    """Return the bound application for `ServeSettings` given as a dict.

    Raises:
        ConfigError: if the settings do not validate.
    """
    settings = parse(ServeSettings, args, "serve settings")
    resources = {"num_cpus": settings.cpus_per_replica}
    if settings.device == "cuda":
        resources["num_gpus"] = 1
    ensemble = (
        cast(Deployment, EnsembleDeployment)
        .options(num_replicas=settings.num_replicas, ray_actor_options=resources)
        .bind(settings.bundle, settings.device, settings.threads_per_replica, settings.cascade)
    )
    gateway = cast(Deployment, Gateway).options(ray_actor_options={"num_cpus": 0.1})
    return gateway.bind(settings.bundle, ensemble)


def start(settings: ServeSettings, port: int) -> str:
    """Start Serve on this host's loopback address and deploy; return the base URL when it is ready.

    Raises:
        UsageError: if Serve hosts something already, which would be replaced.

    There is no user authentication yet, so it listens on loopback only.
    """
    host = "127.0.0.1"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if serve.status().applications:
        raise UsageError("Ray Serve already runs applications on this cluster; use another cluster")
    serve.start(http_options={"host": host, "port": port, "request_timeout_s": 30})
    serve.run(build(settings.model_dump()), name=APP_NAME, route_prefix="/")
    return f"http://{host}:{port}"
