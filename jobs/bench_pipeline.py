"""`bt bench pipeline`: ceiling and memory of scoring itself, with a model that costs nothing."""

import itertools
import json
import math
import os
import resource
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer

from bt_core.errors import EXIT_OK, UsageError
from jobs.bench import JsonOption, apart
from jobs.bench_data import numbers
from jobs.bench_scaling import NODE_CORES, PARTS, SINGLE, fit, last_that_grows, predict

if TYPE_CHECKING:
    import pyarrow as pa

_LOOK_SECONDS = 1.0


def run_pipeline(
    sizes: Annotated[
        str, typer.Option("--sizes", metavar="N,N,...", help="Numbers of tiny scans.")
    ] = "20000,200000",
    nodes: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Numbers of nodes, each with its share of the CPUs, two at least, to run the "
            "sizes on. [default: a Ray of one node in the same process]",
        ),
    ] = None,
    cpus: Annotated[int, typer.Option(min=2, help="Logical CPUs in all, with --nodes.")] = 8,
    model_ms: Annotated[
        float,
        typer.Option(
            metavar="MS",
            help="CPU time of a model for a scan, for what many nodes would do; three at 224 px "
            "took 50.",
        ),
    ] = 50.0,
    as_json: JsonOption = False,
) -> int:
    """List, decode and write archives of tiny scans without a model: scans/s and memory.

    Each size has a process and a Ray of its own; starting Ray is not counted. With --nodes and two
    sizes, a model fitted to them says what up to 1,000 nodes would do, and what is full first.
    """
    rows = []
    several = [None] if nodes is None else numbers(nodes)
    for num_nodes in several:
        if num_nodes and (cpus % num_nodes or cpus < 2 * num_nodes):
            raise UsageError(
                f"--nodes {num_nodes} --cpus {cpus}: a node's share is a whole number of CPUs, two "
                f"at least; use --cpus {2 * math.lcm(*numbers(nodes or '1'))}"
            )
    for num_nodes, size in itertools.product(several, numbers(sizes)):
        with tempfile.TemporaryDirectory() as folder:
            write_tiny(f"{folder}/scans.zip", size)
            where = () if num_nodes is None else (num_nodes, cpus // num_nodes)
            figures = apart(_figures_on_nodes if where else _pipeline_figures, folder, *where)
            rows.append({"num_scans": size, "num_nodes": num_nodes or 1, **figures})
        row = rows[-1]
        print(
            f"{row['num_nodes']} node(s), {size:>7} scans: {row['scans_per_second']:.0f}/s (listed "
            f"in {row['list_seconds']:.1f} s, scored in {row['score_seconds']:.1f} s, published in "
            f"{row['publish_seconds']:.1f} s), driver {row['driver_bytes'] / 1e6:.0f} MB, largest "
            f"worker {row['worker_bytes'] / 1e6:.0f} MB, all workers "
            f"{row['workers_bytes'] / 1e6:.0f} MB; for each scan "
            + ", ".join(f"{name} {1000 * row[f'{name}_seconds'] / size:.3f} ms" for name in PARTS)
            + " of CPU time",
            flush=True,
        )
    growth = {
        name: max(row[name] for row in rows) / rows[0][name]
        for name in ("driver_bytes", "worker_bytes", "workers_bytes")
    }
    print("largest against the first: " + ", ".join(f"{k} {v:.2f}" for k, v in growth.items()))
    varied = nodes and min(len(set(numbers(sizes))), len(set(numbers(nodes)))) > 1
    scaling = _scaling(rows, model_ms) if varied else {}
    if as_json:
        print(json.dumps({"sizes": rows, "growth": growth, "scaling": scaling}))
    return EXIT_OK


def _scaling(rows: list[dict[str, Any]], model_ms: float) -> dict[str, Any]:
    """Print what a model fitted to these figures says of many nodes, and return it."""
    costs = fit(rows)
    print(f"nodes: {1000 * costs['nodes'].scan:.4f} ms of CPU time for each scan")
    for part in SINGLE:
        cost = costs[part]
        print(
            f"{part}: {1000 * cost.scan:.4f} ms of CPU time for each scan, {cost.second:.4f} of a "
            f"core all the time, {cost.node_second:.4f} more for each node"
        )
    predicted = {}
    for ms in (0.0, model_ms):
        predicted[f"{ms:g}"] = predict(costs, ms)
        print(
            f"by the model fitted to these, nodes of {NODE_CORES} cores, {ms:g} ms for a scan; the "
            f"rate grows up to {last_that_grows(costs, ms)} nodes:"
        )
        for num_nodes, rate, full in predicted[f"{ms:g}"]:
            print(f"  {num_nodes:>5} nodes: {rate:>9.0f} scans/s, {full} full")
    return {"costs": {part: cost._asdict() for part, cost in costs.items()}, "predicted": predicted}


def write_tiny(path: str, num_scans: int) -> None:
    """Write a zip of PNGs of 32 px, as small as a scan may be; 64 different ones in turns."""
    import numpy as np

    from bt_core.scans.phantom import encode_picture

    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (32, 32), np.uint8) for _ in range(64)]
    encoded = [encode_picture(picture, ".png") for picture in pictures]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for i in range(num_scans):
            archive.writestr(f"case_{i // 100:05d}/scan_{i:07d}.png", encoded[i % 64])


class StubScorer:
    """A scorer without a model: what it costs is the pipeline's."""

    def __call__(self, columns: dict[str, Any]) -> "pa.Table":
        """Return one row for each scan; those with a reason have failed."""
        import pyarrow as pa

        names = ("scan_id", "uri", "member", "content_sha256", "reason")
        texts = {name: pa.array(columns[name].tolist(), pa.string()) for name in names}
        count = len(columns["scan_id"])
        status = pa.array(["failed" if r else "scored" for r in columns["reason"].tolist()])
        label = pa.array(["glioma"] * count, pa.string())
        confidence = pa.array(columns["pixels_0"].mean((1, 2)) / 255, pa.float64())
        return pa.table(
            {**texts, "status": status, "predicted_label": label, "confidence": confidence}
        )


def _figures_on_nodes(folder: str, num_nodes: int, cpus_each: int) -> dict[str, Any]:
    """Return the figures on a cluster of nodes on this machine, beside a head without work."""
    from cluster.local import NodeOptions, free_port, head, worker
    from cluster.token import use_token

    share = 0.3 / (num_nodes + 1)
    port, dashboard_port = free_port(), free_port()
    with ExitStack() as stack:
        first = NodeOptions("127.0.0.1", 0, memory_share=share)
        stack.enter_context(head(first, port, dashboard_port, _never))
        own = NodeOptions("127.0.0.1", cpus_each, memory_share=share)
        for _ in range(num_nodes):
            stack.enter_context(worker(own, f"127.0.0.1:{port}", _never))
        os.environ["RAY_ADDRESS"] = f"127.0.0.1:{port}"
        use_token(os.environ["RAY_ADDRESS"])
        return _pipeline_figures(folder)


def _never() -> bool:
    return False  # Ctrl-C interrupts this process itself


def _pipeline_figures(folder: str) -> dict[str, Any]:
    from bt_core.data.manifest import ManifestWriter
    from bt_core.data.publish import publish
    from bt_core.data.score_work import ScoreJob, ScoreWork
    from bt_core.data.scoring import score_manifest
    from bt_core.scans.archives import list_scans
    from bt_core.scans.preprocess import PreprocessSpec
    from cluster.session import session

    os.environ["BT_MAX_MEMBERS"] = str(10**9)
    source, out = f"{folder}/scans.zip", f"{folder}/out"
    work = ScoreWork(out)
    with session() as resources, _watched() as peaks:
        before = _cpu_seconds()
        started = time.perf_counter()
        writer = ManifestWriter(work.manifest)
        num_scans = list_scans(source, sink=writer).num_scans
        writer.close()
        listed = time.perf_counter()
        job = ScoreJob(
            bundle_id="none",
            source=source,
            listing_digest=writer.hexdigest(),
            settings={},
            bt_version="",
            num_scans=num_scans,
            started_at="",
        )
        work.begin(job)
        specs = (PreprocessSpec(size_px=32),)
        score_manifest(work, specs, StubScorer, (), resources.scorers("cpu"), is_streamed=False)
        scored = time.perf_counter()
        published = publish(work, out, num_scans)
        ended = time.perf_counter()
        after = _cpu_seconds()
    if published.statuses != {"scored": num_scans}:
        raise RuntimeError("a scan of the bench was not scored")
    return {
        "seconds": ended - started,
        "scans_per_second": num_scans / (ended - started),
        "list_seconds": listed - started,
        "score_seconds": scored - listed,
        "publish_seconds": ended - scored,
        **{f"{name}_seconds": after[name] - before[name] for name in after},
        "driver_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        **peaks,
    }


def _cpu_seconds() -> dict[str, float]:
    """Return the CPU time so far of what a cluster has one of, and of the rest of this machine.

    The rest is that of the cluster's nodes, where nothing else runs here meanwhile.
    """
    own = psutil.Process()
    used, machine = own.cpu_times(), psutil.cpu_times()
    found = {"driver": used.user + used.system, "gcs": 0.0}
    for process in own.children(recursive=True):
        with suppress(psutil.Error):
            if process.name() == "gcs_server":
                times = process.cpu_times()
                found["gcs"] += times.user + times.system
    found["nodes"] = machine.user + machine.nice + machine.system - sum(found.values())
    return found


@contextmanager
def _watched() -> Iterator[dict[str, int]]:
    """Note the most memory of Ray's workers while the block runs: of one, and of all at once.

    Counted is what is theirs alone (RssAnon), not the object store that all of them map.
    """
    peaks = {"worker_bytes": 0, "workers_bytes": 0}
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK_SECONDS):
            own = [_private_bytes(pid) for pid in _workers()]
            peaks["worker_bytes"] = max([peaks["worker_bytes"], *own])
            peaks["workers_bytes"] = max(peaks["workers_bytes"], sum(own))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def _workers() -> list[int]:
    """Return the process ids of the workers of the Ray that this process started."""
    parent_of: dict[int, int] = {}
    is_worker = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent_of[int(folder.name)] = int(
                folder.joinpath("stat").read_text().split(") ")[-1].split()[1]
            )
            if folder.joinpath("cmdline").read_bytes().startswith(b"ray::"):
                is_worker.append(int(folder.name))
        except OSError:  # it ended meanwhile
            continue
    return [pid for pid in is_worker if os.getpid() in _ancestors(pid, parent_of)]


def _ancestors(pid: int, parent_of: dict[int, int]) -> list[int]:
    found = []
    while pid in parent_of:
        pid = parent_of[pid]
        found.append(pid)
    return found


def _private_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
