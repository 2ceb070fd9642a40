"""The applications of Ray Serve: `serve.app:ensemble` holds a bundle, `serve.app:gateway` asks it.

They are two, so that a gateway can turn from one bundle to another, which is loaded already.
"""

import logging
import time
from typing import Any, Final, cast

from ray import serve
from ray.serve import Application, Deployment
from ray.serve.schema import ApplicationStatus, ReplicaState

from bt_core.config import parse
from bt_core.errors import ConfigError, RunError, UsageError, last_line
from bt_core.models.bundle import Bundle
from serve.access import LOOPBACK_HOSTS, check_exposure, is_loopback
from serve.explaining import ExplainerDeployment
from serve.gateway import Gateway
from serve.model import EnsembleDeployment
from serve.settings import REQUEST_SECONDS, EnsembleSettings, Hosted, ServeSettings, Targets
from serve.tracing import SERVE_CONFIG

GATEWAY: Final = "bt"
"""Name of the application that has the routes."""
_MAX_MESSAGE: Final = str(256 * 1024**2)
"""Bytes of a call of a gateway, which takes gRPC; 16 scans of 384 px by two specs are 5 MB."""


def ensemble(args: dict[str, object]) -> Application:
    """Return the application that holds a bundle, for `EnsembleSettings` given as a dict.

    Raises:
        ConfigError: if the settings do not validate.
    """
    settings = parse(EnsembleSettings, args, "ensemble settings")
    resources: dict[str, Any] = {
        "num_cpus": settings.cpus_per_replica,
        "runtime_env": {"env_vars": {"RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": _MAX_MESSAGE}},
    }
    if settings.device == "cuda":
        resources["num_gpus"] = settings.gpus_per_replica
    number: dict[str, Any] = {"num_replicas": settings.num_replicas}
    if settings.max_replicas is not None:
        number = {
            "autoscaling_config": {
                "min_replicas": settings.num_replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": 1,  # calls of gateways, each of up to 16 scans
            }
        }
    return (
        cast(Deployment, EnsembleDeployment)
        .options(**number, ray_actor_options=resources)
        .bind(settings.bundle, settings.device, settings.threads_per_replica, settings.cascade)
    )


def gateway(args: dict[str, object]) -> Application:
    """Return the application that has the routes, for `ServeSettings` given as a dict.

    What it asks is its deployment's `user_config`, with the fields of `Targets`.

    Who listens where is no part of an application but of Serve, so it cannot see whether strangers
    reach it; without keys or audit log it wants to be told that this is meant.

    Raises:
        ConfigError: if the settings do not validate, or leave the server open to strangers.
    """
    settings = parse(ServeSettings, args, "serve settings")
    if settings.keys is None and not settings.allow_anonymous:
        raise ConfigError(
            "serve settings: give keys, the path of a file that bt keys add makes, or, where only "
            "this machine reaches the server, allow_anonymous: true"
        )
    if settings.keys is None and not settings.allowed_hosts:
        settings = settings.model_copy(update={"allowed_hosts": LOOPBACK_HOSTS})
    if settings.audit_dir is None and not settings.allow_unaudited:
        raise ConfigError(
            "serve settings: give audit_dir, a folder for the audit log, or allow_unaudited: true"
        )
    return _gateway(settings)


def start(
    settings: ServeSettings,
    port: int,
    host: str = "127.0.0.1",
    shadow: EnsembleSettings | None = None,
    shadow_share: float = 0.05,
    traced: bool = False,
) -> str:
    """Start Serve on an address of this host and deploy; return the base URL when it is ready.

    On a loopback address neither keys nor an audit log are needed.

    Args:
        settings: of the gateway, and of the ensemble that answers.
        port: for HTTP.
        host: address to listen on.
        shadow: another ensemble, whose answers are compared.
        shadow_share: of the scans that it gets.
        traced: send spans to where `tracing.ENDPOINT` of the processes' environment says.

    Raises:
        UsageError: if Serve runs already, whose applications would be replaced and whose address
            would stay; or if strangers could reach a server without keys or audit log.
        RunError: if a bundle cannot be loaded.
    """
    if is_loopback(host):
        hosts = (*LOOPBACK_HOSTS, host, *settings.allowed_hosts)
        local = {"allow_anonymous": True, "allow_unaudited": True, "allowed_hosts": hosts}
        settings = settings.model_copy(update=local)
    check_exposure(host, settings)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    status = serve.status()
    if status.applications or status.proxies:
        raise UsageError("Ray Serve already runs on this cluster; use another one, or --swap")
    serve.start(
        http_options={"host": host, "port": port, "request_timeout_s": REQUEST_SECONDS},
        tracing_config=SERVE_CONFIG if traced else None,
    )
    try:
        targets = Targets(
            ensemble=_deploy(settings.of_ensemble()),
            shadow=shadow and _deploy(shadow),
            shadow_share=shadow_share,
        )
        _point(settings, targets)
    except BaseException:
        serve.shutdown()
        raise
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def swap(new: EnsembleSettings) -> tuple[str, str]:
    """Let another bundle answer, without a request that fails; return the ids of both.

    The new one is loaded and verified beside the one that answers. If that fails, nothing changes.

    Raises:
        UsageError: if no gateway runs on this cluster.
        RunError: if the new bundle cannot be loaded, or the gateway cannot ask it.
    """
    if GATEWAY not in serve.status().applications:
        raise UsageError(
            "no bt serve runs on this cluster; set RAY_ADDRESS to what the running one has printed"
        )
    state: dict[str, Any] = serve.get_app_handle(GATEWAY).state.remote().result(timeout_s=60)
    before = Targets.model_validate(state["targets"])
    settings = ServeSettings.model_validate(state["settings"])
    if app_of(new.bundle) == before.ensemble.app:
        raise UsageError(f"bundle {new.bundle} answers already")
    hosted = _deploy(settings.of_ensemble(bundle=new.bundle, device=new.device))
    try:
        _point(settings, before.model_copy(update={"ensemble": hosted}))
    except RuntimeError as error:
        _point(settings, before)
        if before.shadow != hosted:
            serve.delete(hosted.app)
        raise RunError(
            f"the gateway cannot ask {new.bundle}; the bundle before goes on answering"
        ) from error
    if before.shadow != before.ensemble:
        _wait_for_old_gateways()
        serve.delete(before.ensemble.app)
    return before.ensemble.app.removeprefix("bt-"), hosted.app.removeprefix("bt-")


def _deploy(settings: EnsembleSettings) -> Hosted:
    """Load a bundle into an application of its own, which answers when this returns."""
    hosted = Hosted(app=app_of(settings.bundle), bundle=settings.bundle)
    known = serve.status().applications.get(hosted.app)
    if known is not None and known.status == ApplicationStatus.RUNNING:
        return hosted
    try:
        serve.run(ensemble(settings.model_dump()), name=hosted.app, route_prefix=None)
    except RuntimeError as error:
        why = serve.status().applications[hosted.app].message
        serve.delete(hosted.app)
        raise RunError(f"{settings.bundle} cannot be loaded: {last_line(why)}") from error
    return hosted


def app_of(bundle: str) -> str:
    """Return the name of the application in which `bt serve` hosts a bundle."""
    return f"bt-{Bundle(bundle).info.bundle_id}"


def _point(settings: ServeSettings, targets: Targets) -> None:
    """Let gateways ask the targets: new ones start, and the old ones end when these answer."""
    serve.run(_gateway(settings, targets.model_dump()), name=GATEWAY, route_prefix="/")


def _gateway(settings: ServeSettings, targets: dict[str, Any] | None = None) -> Application:
    explainer = cast(Deployment, ExplainerDeployment).bind(settings.threads_per_replica)
    deployment = cast(Deployment, Gateway).options(
        num_replicas=settings.num_gateways, user_config=targets
    )
    return deployment.bind(settings.model_dump(), explainer)


def _wait_for_old_gateways() -> None:
    """Return when those that turn to nothing new have answered what they had begun."""
    deadline = time.monotonic() + REQUEST_SECONDS
    while time.monotonic() < deadline:
        states = serve.status().applications[GATEWAY].deployments["Gateway"].replica_states
        if not any(num for state, num in states.items() if state != ReplicaState.RUNNING):
            return
        time.sleep(0.5)
