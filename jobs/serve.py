"""`bt serve`: a bundle answers over HTTP on this machine."""

import signal
import threading
from typing import Annotated

import typer

from bt_core.errors import EXIT_OK, UsageError
from jobs.command import BundleArgument, DeviceOption


def run(
    bundle: BundleArgument,
    port: Annotated[int, typer.Option(min=1, max=65535, help="On 127.0.0.1.")] = 8000,
    device: DeviceOption = "auto",
) -> int:
    """Host a bundle with Ray Serve until Ctrl-C: POST /v1/predictions, docs under /docs."""
    from bt_core.models.bundle import Bundle
    from cluster.session import choose_device, session

    opened = Bundle(bundle)
    _check_port(port)
    with session() as resources:
        from ray import serve

        from serve.app import start
        from serve.settings import ServeSettings

        chosen = choose_device(device, resources)
        settings = ServeSettings(bundle=opened.location, device=chosen)
        try:
            url = start(settings, port)
            print(f"bundle {opened.info.bundle_id} answers at {url} (API docs: {url}/docs)")
            print("Ctrl-C stops it", flush=True)
            _wait_for_stop()
        finally:
            serve.shutdown()
    return EXIT_OK


def _wait_for_stop() -> None:
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()


def _check_port(port: int) -> None:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UsageError(f"--port {port} is taken; choose another") from error


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("serve")
