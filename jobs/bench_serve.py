"""`bt bench serve`: the hosted ensemble against servers that a user would write, under one load."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final

import psutil
import typer

from bt_core import storage
from bt_core.errors import EXIT_OK, RunError, UsageError
from jobs.bench import JsonOption
from jobs.command import BundleArgument

_PEERS: Final = ("fastapi", "litserve", "bentoml")
_START_SECONDS: Final = 300.0


def run_serve(
    bundle: BundleArgument,
    scan: Annotated[str, typer.Option(metavar="FILE", help="Scan that every client sends.")],
    seconds: Annotated[int, typer.Option(min=2, help="Of each measurement.")] = 60,
    clients: Annotated[int, typer.Option(min=1, help="Of the closed loop.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the sides take turns.")] = 1,
    peers: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            help="fastapi, litserve or bentoml (pip install litserve bentoml). [default: all]",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Ask by one and by many clients in a closed loop, and at twice the rate that is sustained.

    Peers run eager PyTorch, then the bundle's own runtime. The load comes from autocannon (npm
    install -g autocannon), on the same machine.
    """
    if shutil.which("autocannon") is None:
        raise UsageError("bt bench serve needs autocannon: npm install -g autocannon")
    opened = storage.absolute(bundle)
    if not os.path.isfile(scan):
        raise UsageError(f"--scan {scan}: no such file")
    chosen = peers or list(_PEERS)
    sides = ["bt", *chosen, *(f"{peer}, own runtime" for peer in chosen)]
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in sides:
            with _server(side, opened) as port:
                figures = _measured(side, port, scan, seconds, clients)
                if side == "bt":
                    figures["overload"] = _overloaded(port, scan, seconds, clients, figures)
            found[side].append(figures)
            print(f"round {number + 1}: {side}: {_line(figures)}", flush=True)
    result = _result(found, chosen)
    for name, value in result.items():
        print(f"{name}: {value:.2f}")
    if as_json:
        print(json.dumps({**result, "sides": found}))
    return EXIT_OK


@contextmanager
def _server(side: str, bundle: str) -> Iterator[int]:
    """Start one side and end it; yield the port that it answers on."""
    from jobs.demo import free_port

    port = free_port()
    peer, _, runtime = side.partition(", ")
    if side == "bt":
        words = [sys.executable, "-m", "jobs.serve", bundle, "--port", str(port)]
    else:
        words = [sys.executable, "-m", f"jobs.peers.with_{peer}", bundle, str(port)]
        words += ["--own-runtime"] if runtime else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            words, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            _wait_for(process, port, log)
            yield port
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait_for(process: "subprocess.Popen[bytes]", port: int, log: Any) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        listening = {
            c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN
        }
        if port in listening:
            time.sleep(5)  # LitServe listens before its model is there
            return
        time.sleep(0.5)
    log.seek(0)
    raise RunError(f"a server did not start: {log.read().decode(errors='replace')[-400:]}")


def _load(
    side: str, port: int, scan: str, seconds: int, clients: int, rate: int = 0
) -> dict[str, Any]:
    """Return requests/s, latencies in ms, and counts of answers, of one load."""
    field, path = ("files", "/v1/predictions") if side == "bt" else ("request", "/predict")
    form = json.dumps({field: {"type": "file", "path": scan}})
    words = [
        "autocannon", "--json", "--no-progress", "-m", "POST", "-t", "30", "--form", form,
        "-c", str(clients), "-d", str(seconds), "--excludeErrorStats",
        *(["-R", str(rate)] if rate else []),
        f"http://127.0.0.1:{port}{path}",
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"autocannon failed: {done.stderr.strip()[-300:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    return {
        "requests_per_second": told["2xx"] / told["duration"],
        "p50_ms": told["latency"]["p50"],
        "p99_ms": told["latency"]["p99"],
        "answered": told["2xx"],
        "refused": told["non2xx"],
        "failed": told["errors"],
        "statuses": {k: v["count"] for k, v in told.get("statusCodeStats", {}).items()},
    }


def _measured(side: str, port: int, scan: str, seconds: int, clients: int) -> dict[str, Any]:
    _load(side, port, scan, 5, 2)  # to warm up
    return {
        "alone": _load(side, port, scan, seconds, 1),
        "many": _load(side, port, scan, seconds, clients),
    }


def _overloaded(
    port: int, scan: str, seconds: int, clients: int, figures: dict[str, Any]
) -> dict[str, Any]:
    """Ask at twice the rate that many clients reached, and look at the memory."""
    before = _memory_mb()
    rate = round(2 * figures["many"]["requests_per_second"])
    found = _load("bt", port, scan, seconds, 8 * clients, rate)
    return {**found, "rate": rate, "memory_mb": [before, _memory_mb()]}


def _memory_mb() -> float:
    """Return the memory of all Ray processes of this user's children, shared pages once."""
    total = 0.0
    for process in psutil.process_iter(["cmdline"]):
        try:
            if any("ServeReplica" in word or "spawn_main" in word for word in process.cmdline()):
                total += process.memory_full_info().pss / 1e6
        except psutil.Error:
            continue
    return round(total)


def _line(figures: dict[str, Any]) -> str:
    parts = []
    for name, own in figures.items():
        parts.append(
            f"{name} {own['requests_per_second']:.1f}/s p50 {own['p50_ms']} ms p99 "
            f"{own['p99_ms']} ms ({own['refused']} refused, {own['failed']} failed)"
        )
    return "; ".join(parts)


def _result(found: dict[str, list[dict[str, Any]]], peers: list[str]) -> dict[str, float]:
    """Return ratios to the best peer, of medians of rounds."""
    import statistics

    def median(side: str, load: str, name: str) -> float:
        return float(statistics.median(own[load][name] for own in found[side]))

    own = [f"{peer}, own runtime" for peer in peers]
    rate = median("bt", "many", "requests_per_second")
    overload_p99 = statistics.median(one["overload"]["p99_ms"] for one in found["bt"])
    return {
        "ratio_rate": rate / max(median(p, "many", "requests_per_second") for p in peers),
        "ratio_rate_own_runtime": rate / max(median(p, "many", "requests_per_second") for p in own),
        "ratio_p50_alone": median("bt", "alone", "p50_ms")
        / min(median(p, "alone", "p50_ms") for p in peers),
        "ratio_p99_many": median("bt", "many", "p99_ms")
        / min(median(p, "many", "p99_ms") for p in peers),
        "ratio_p99_overload": overload_p99 / max(1.0, median("bt", "alone", "p99_ms")),
    }
