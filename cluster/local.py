"""Nodes of a Ray cluster on this machine: several, for trying, or one that joins another's head."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from bt_core.errors import RunError, UsageError
from bt_core.log import RUN_ID
from cluster.submit import SCORING_JOB, refuse_silent
from cluster.token import TOKEN_FILE, has_token

_START_SECONDS: Final = 120.0
_END_SECONDS: Final = 10.0
_MEMORY_SHARE: Final = 0.3
"""Of this machine's memory for the object stores of all its nodes, as Ray takes for one."""


@dataclass(frozen=True)
class NodeOptions:
    """What a node has.

    Attributes:
        host: its address, by which others reach it. Ray listens on all of the machine's, whatever
            it is told, so the token keeps strangers off.
        num_cpus: logical CPUs.
        num_gpus: likewise.
        memory_share: of this machine's memory, for its object store.
    """

    host: str
    num_cpus: int
    num_gpus: int = 0
    memory_share: float = _MEMORY_SHARE


@dataclass(frozen=True)
class Node:
    """A node that runs.

    Attributes:
        process: `ray start`, which ends when one of the node's own processes does.
        log: what it says.
    """

    process: subprocess.Popen[bytes]
    log: BinaryIO

    def check(self) -> None:
        """Raise RunError if it has ended."""
        if (code := self.process.poll()) is not None:
            raise RunError(f"a node has ended ({code}): {self._last_line()}")

    def stop(self) -> None:
        """Ask it to end, which takes seconds; several that are asked at once end at once."""
        self.process.send_signal(signal.SIGTERM)

    def wait_until_started(self, stopped: Callable[[], bool]) -> None:
        """Return when it works.

        Raises:
            RunError: if it ends, or takes too long.
            KeyboardInterrupt: if `stopped`.
        """
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            self.check()
            if b"Ray runtime started" in self._said():
                return
            if stopped():
                raise KeyboardInterrupt
            time.sleep(0.2)
        raise RunError(f"a node does not start: {self._last_line()}")

    def _said(self) -> bytes:
        self.log.seek(0)
        return self.log.read()

    def _last_line(self) -> str:
        lines = self._said().decode(errors="replace").strip().splitlines()
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["it said nothing"])[-1]


@contextmanager
def head(
    options: NodeOptions, port: int, dashboard_port: int, stopped: Callable[[], bool]
) -> Iterator[Node]:
    """Run a head, with a dashboard on loopback that takes jobs, while the block runs.

    Raises:
        UsageError: if a port is taken or Ray's protection by a token is switched off.
        RunError: if it does not start.
        KeyboardInterrupt: if `stopped` while it starts.
    """
    _make_token()
    _check_free(options.host, port)
    _check_free("127.0.0.1", dashboard_port)
    words = [
        "--head", f"--port={port}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard_port}", f"--resources={json.dumps({SCORING_JOB: 1})}",
    ]  # fmt: skip
    with _node(options, words, stopped) as node:
        yield node


@contextmanager
def worker(options: NodeOptions, address: str, stopped: Callable[[], bool]) -> Iterator[Node]:
    """Run a node that joins the head at an address, while the block runs.

    Raises:
        UsageError: if nobody answers there, it is no HOST:PORT, or there is no token here.
        RunError: if it does not start.
        KeyboardInterrupt: if `stopped` while it starts.
    """
    host, port = _head_of(address)
    _refuse_unprotected()
    if not has_token():
        raise UsageError(
            f"there is no token here, and {address} wants its own: copy {TOKEN_FILE} from the "
            "head's machine to this one"
        )
    refuse_silent(host, port, address)
    with _node(options, [f"--address={address}"], stopped) as node:
        yield node


def _head_of(address: str) -> tuple[str, int]:
    found = re.fullmatch(r"(\[[^\]]+\]|[^\s:/\[\]]+):(\d{1,5})", address)
    if found is None:
        raise UsageError(
            f"{address}: write it as HOST:PORT of the head, as in HOST:6379; a dashboard's port, "
            "8265, is for --submit"
        )
    return found[1].strip("[]"), int(found[2])


@contextmanager
def _node(options: NodeOptions, words: list[str], stopped: Callable[[], bool]) -> Iterator[Node]:
    agent, runtime_env = free_port(options.host), free_port(options.host)
    memory = int(options.memory_share * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    # Its own folder: what Ray notes in the usual one would lead other commands here.
    folder = tempfile.mkdtemp(prefix="bt-ray-")
    line = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *words,
        f"--node-ip-address={options.host}", f"--num-cpus={options.num_cpus}",
        f"--num-gpus={options.num_gpus}", f"--object-store-memory={memory}",
        f"--dashboard-agent-listen-port={agent}", f"--runtime-env-agent-port={runtime_env}",
        "--min-worker-port=0", "--max-worker-port=0",  # any: not those that a user may give above
        "--disable-usage-stats", f"--temp-dir={folder}",
    ]  # fmt: skip
    # A session of its own: Ctrl-C is for this process, which ends its nodes in their order.
    # And not the run of this command, which is no job's.
    environment = {k: v for k, v in os.environ.items() if k != RUN_ID} | {"RAY_AUTH_MODE": "token"}
    path = (
        f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # `python` of jobs
    )
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            line, env=environment | {"PATH": path}, stdout=log, stderr=log, start_new_session=True
        )
        node = Node(process, log)
        try:
            node.wait_until_started(stopped)
            yield node
        finally:
            node.stop()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)


def _make_token() -> None:
    """Make the token that every request to a cluster must show, if there is none."""
    _refuse_unprotected()
    if not has_token():  # by Ray itself; it prints the token
        command = [sys.executable, "-m", "ray.scripts.scripts", "get-auth-token", "--generate"]
        environment = {**os.environ, "RAY_AUTH_MODE": "token"}
        subprocess.run(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            check=True,
            start_new_session=True,  # Ctrl-C is for this process
        )
    if (file := TOKEN_FILE.expanduser()).exists():
        file.chmod(0o600)


def _refuse_unprotected() -> None:
    """Raise UsageError if Ray's protection by a token is switched off."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        raise UsageError(
            f"RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']}: whoever reaches a cluster without a "
            "token runs code on it, so none is started; unset the variable"
        )


def _check_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            why = error.strerror or str(error)
            raise UsageError(
                f"cannot listen on {host} port {port} ({why}); choose another"
            ) from error


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port of an address of this machine that nobody listens on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
