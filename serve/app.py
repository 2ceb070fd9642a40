"""Builds the Ray Serve application; `serve.app:build` is its import path."""

import logging
from typing import Final, cast

from ray import serve
from ray.serve import Application, Deployment

from bt_core.config import parse
from bt_core.errors import UsageError
from serve.gateway import Gateway
from serve.model import EnsembleDeployment
from serve.settings import ServeSettings

APP_NAME: Final = "bt"


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
    gateway = cast(Deployment, Gateway).options(num_replicas=settings.num_gateways)
    return gateway.bind(settings.model_dump(), ensemble)


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
