"""`bt serve`: a bundle answers over HTTP on this machine."""

import errno
import os
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

from bt_core import storage
from bt_core.errors import EXIT_OK, UsageError
from jobs import serve_options
from jobs.command import stop_signal
from jobs.options import BundleArgument, DeviceOption

if TYPE_CHECKING:
    from bt_core.models.bundle import Bundle
    from serve.settings import ServeSettings

_AGENT_PORT: Final = 52365
"""On which Ray's agent takes jobs; ray.init lets nobody choose another."""


def run(
    bundle: BundleArgument,
    port: serve_options.Port = 8000,
    host: serve_options.Host = "127.0.0.1",
    keys: serve_options.Keys = None,
    audit: serve_options.Audit = None,
    scans_per_minute: serve_options.ScansPerMinute = 0,
    device: DeviceOption = "auto",
    shadow: serve_options.Shadow = None,
    shadow_share: serve_options.ShadowShare = None,
    swap: serve_options.Swap = False,
    scoring_sources: serve_options.ScoringSources = None,
    scoring_outputs: serve_options.ScoringOutputs = None,
    with_haproxy: serve_options.WithHaproxy = False,
    traces: serve_options.Traces = None,
    overrides: serve_options.Overrides = None,
) -> int:
    """Host a bundle with Ray Serve until Ctrl-C: POST /v1/predictions, docs under /docs."""
    from bt_core.models.bundle import Bundle
    from serve.front import haproxy

    opened = Bundle(bundle)
    if swap:
        if shadow or overrides or keys or audit or with_haproxy or scoring_sources or traces:
            raise UsageError("--swap changes the bundle alone; of other options it takes --device")
        return _swap(opened, device)
    if shadow_share is not None and not shadow:
        raise UsageError("--shadow-share is for --shadow BUNDLE")
    if bool(scoring_sources) != bool(scoring_outputs):
        raise UsageError("give both --scoring-source and --scoring-output, or neither")
    given = {
        "bundle": opened.location,
        "keys": keys and os.path.abspath(keys),
        "audit_dir": audit and os.path.abspath(audit),
        "max_scans_per_minute": scans_per_minute,
        "scoring_sources": tuple(map(storage.absolute, scoring_sources or ())),
        "scoring_outputs": tuple(map(storage.absolute, scoring_outputs or ())),
    }
    _check_traces(traces)
    settings = _settings(given, overrides or [])
    _check_place(settings, host, port)
    beside = Bundle(shadow).location if shadow else None
    with haproxy(host) if with_haproxy else nullcontext():
        return _serve(settings, (host, port), device, beside, shadow_share or 0.05, traces)


def _check_traces(traces: str | None) -> None:
    if traces and not traces.startswith(("http://", "https://")):
        raise UsageError(f"--traces {traces}: write it as http://HOST:4318")
    storage.refuse_secrets(traces or "")


def _settings(given: dict[str, Any], overrides: list[str]) -> "ServeSettings":
    from bt_core.config import apply_overrides, parse
    from serve.settings import ServeSettings

    named = {*given, "device"}
    for override in overrides:
        if (key := override.partition("=")[0]) in named:
            raise UsageError(f"--set {key}: it has an option or argument of its own, see --help")
    return parse(ServeSettings, apply_overrides(given, overrides), "bt serve")


def _check_place(settings: "ServeSettings", host: str, port: int) -> None:
    """Raise UsageError where nobody may be answered, or the ports are not to be had."""
    from serve.access import check_exposure
    from serve.keys import read_keys

    if settings.keys is not None:
        read_keys(settings.keys)
    check_exposure(host, settings)
    _check_port(host, port)
    if settings.scoring_sources and "RAY_ADDRESS" not in os.environ:
        _check_agent_port()


def _check_agent_port() -> None:
    """Raise UsageError where Ray's jobs would be taken by nobody, which it would not say."""
    import socket

    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", _AGENT_PORT)) == 0:
            raise UsageError(
                f"scoring jobs need port {_AGENT_PORT}, which something holds, perhaps another "
                "Ray of this machine: end it, or leave --scoring-source and --scoring-output out"
            )


def _serve(
    settings: "ServeSettings",
    address: tuple[str, int],
    device: str,
    shadow: str | None,
    shadow_share: float,
    traces: str | None,
) -> int:
    """Host until a signal comes."""
    from bt_core.models.bundle import Bundle
    from cluster.session import choose_device, session
    from serve.tracing import ENDPOINT

    host, port = address
    collector = {ENDPOINT: traces} if traces else None
    with session(dashboard=bool(settings.scoring_sources), worker_env=collector) as resources:
        import ray
        from ray import serve

        from serve.app import start

        chosen = choose_device(device, resources)
        settings = settings.model_copy(update={"device": chosen})
        beside = settings.of_ensemble(bundle=shadow) if shadow else None
        url = start(settings, port, host, beside, shadow_share, traced=bool(traces))
        try:
            bundle_id = Bundle(settings.bundle).info.bundle_id
            print(f"bundle {bundle_id} answers at {url} (API docs: {url}/docs)")
            cluster = ray.get_runtime_context().gcs_address
            print(f"another bundle: RAY_ADDRESS={cluster} bt serve BUNDLE --swap")
            print("Ctrl-C stops it", flush=True)
            stopped = stop_signal()
            while not stopped():
                time.sleep(0.5)
            print("stopping: what was begun is answered first", flush=True)
        finally:
            serve.shutdown()
    print("stopped")
    return EXIT_OK


def _swap(bundle: "Bundle", device: str) -> int:
    from cluster.session import choose_device, session

    if "RAY_ADDRESS" not in os.environ:
        raise UsageError("--swap: set RAY_ADDRESS to what the running bt serve has printed")
    with session() as resources:
        from serve.app import swap
        from serve.settings import EnsembleSettings

        chosen = choose_device(device, resources)
        before, after = swap(EnsembleSettings(bundle=bundle.location, device=chosen))
    print(f"bundle {after} answers in place of {before}")
    return EXIT_OK


def _check_port(host: str, port: int) -> None:
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UsageError(f"--port {port} is taken; choose another") from error
            why = error.strerror or str(error)
            raise UsageError(f"cannot listen on --host {host} --port {port}: {why}") from error


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("serve")
