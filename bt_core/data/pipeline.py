"""Ray Data over scans: decode in guarded tasks, find copies, score.

Ray retries for ever by default, so a file that kills its decoder would stop a job without an end.
Here every retry is bounded, and decoding runs in tasks of its own whose death is noticed: the scans
of a dead task are tried one by one, twice each, and one that dies again is set aside as
`decoder_crashed`.

Scans are read where they are decoded. Only those of a tar.gz or tar.zst, which has no random
access, are read by one task per archive, which hands them to the decoding tasks.
"""

import logging
import math
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import ray.exceptions
from ray.util.annotations import RayDeprecationWarning

from bt_core.data.decode_stage import Columns, DecodeStage, RowStage, column_of, run_stage
from bt_core.data.families import CopyIndex, FamilyStage, Pairs, exact_pairs
from bt_core.data.stream import split_streamed, stream_batches
from bt_core.scans.preprocess import PreprocessSpec

MAX_RETRIES: Final = 2
"""How often Ray may repeat a lost task or restart a lost actor."""
TRIES_PER_SCAN: Final = 2
_DECODE_BATCH: Final = 64
_SEARCH_ROWS: Final = 2048
_SCANS_WORTH_AN_ACTOR: Final = 256
_STARVED_AFTER_SECONDS: Final = 300
_BLOCK_ROWS: Final = 1024
"""Scans that a task of Ray Data oversees; it hands them, `_DECODE_BATCH` at a time, to others."""
_BATCHES_EACH: Final = 8
"""Batches of one block that are decoded at once: at 32 MiB each, 256 MiB in the object store."""
_CRASHES: Final = (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)


_run_stage: Final = ray.remote(max_retries=0)(run_stage)


def configure() -> None:
    """Set Ray Data's context for this process: fail when starved, show bars on a terminal only.

    Its log lines are kept to errors: the commands say in one line each what was done.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = _STARVED_AFTER_SECONDS
    context.enable_progress_bars = sys.stderr.isatty()


def decode(refs: pa.Table, stage: RowStage) -> ray.data.Dataset:
    """Run a stage over scan refs in guarded tasks, in parallel over the cluster.

    Args:
        refs: rows of `REF_COLUMNS` and any others.
        stage: a `DecodeStage`.

    Returns:
        A lazy dataset with one row for each ref, in no particular order.
    """
    configure()
    streamed, direct = split_streamed(refs)
    blocks = [direct.slice(i, _BLOCK_ROWS) for i in range(0, direct.num_rows, _BLOCK_ROWS)]
    parts = [(blocks, _guarded), (streamed, _guarded_stream)] if streamed else [(blocks, _guarded)]
    with bounded_retries():
        first, *others = [
            ray.data.from_arrow(tables).map_batches(
                work,
                fn_kwargs={"stage": stage},
                batch_size=None,
                compute=ray.data.TaskPoolStrategy(size=_num_overseers()),
                max_retries=MAX_RETRIES,
            )
            for tables, work in parts
            if tables or not streamed
        ]
    return first.union(*others) if others else first


def decode_catalog(refs: pa.Table, stage: RowStage | None = None) -> pa.Table:
    """Read, decode and digest every scan; return the rows without pixels, one for each ref.

    Args:
        refs: rows of `REF_COLUMNS` and any others.
        stage: what to run instead of a `DecodeStage` without specs.

    Raises:
        RuntimeError: if rows were lost, which would be a defect of this program.
    """
    dataset = decode(refs, stage or DecodeStage())
    tables = [ray.get(ref) for ref in dataset.to_arrow_refs()]
    table = pa.concat_tables(tables, promote_options="permissive")
    check_rows(refs, table)
    return table


def survey(refs: pa.Table, stage: FamilyStage) -> tuple[pa.Table, Pairs]:
    """Read, decode and digest every scan, and find all copies among them.

    Args:
        refs: rows of `REF_COLUMNS` and any others.
        stage: what is done to each scan.

    Returns:
        The catalog without pixels, one row for each ref, sorted by scan_id; and the pairs of
        copies, which index its rows.

    Raises:
        RuntimeError: if rows were lost, which would be a defect of this program.
    """
    catalog, thumbnails_NFF, descriptors_ND = describe_scans(refs, stage)
    return catalog, find_copies(catalog, thumbnails_NFF, descriptors_ND)


def describe_scans(refs: pa.Table, stage: FamilyStage) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """Return the catalog as `survey` does, and its rows' thumbnails and descriptors.

    These are gathered here, 5 KB for each scan.
    """
    tables, thumbnails, descriptors = [], [], []
    for batch in decode(refs, stage).iter_batches(batch_size=None, batch_format="numpy"):
        thumbnails.append(batch.pop("thumbnail"))
        descriptors.append(batch.pop("descriptor"))
        tables.append(pa.table(batch))
    catalog = pa.concat_tables(tables, promote_options="permissive")
    check_rows(refs, catalog)
    order = pc.sort_indices(catalog, [("scan_id", "ascending"), ("position", "ascending")])
    rows = order.to_numpy()
    return catalog.take(order), np.concatenate(thumbnails)[rows], np.concatenate(descriptors)[rows]


def find_copies(catalog: pa.Table, thumbnails_NFF: np.ndarray, descriptors_ND: np.ndarray) -> Pairs:
    """Find all copies among scans; the index is made once and searched over the cluster.

    Returns:
        First each scan with the first one of equal pixels, then every near copy among those first
        ones; see `data.families`.
    """
    exact, rows = exact_pairs(catalog["pixel_sha256"].to_pylist())
    if len(rows) < 2:
        return exact
    configure()
    index = ray.put(CopyIndex(thumbnails_NFF[rows], descriptors_ND[rows]))
    num_blocks = -(-len(rows) // _SEARCH_ROWS)
    with bounded_retries():
        found = ray.data.range(num_blocks, override_num_blocks=num_blocks).map_batches(
            _search, fn_kwargs={"index": [index]}, batch_size=None, max_retries=MAX_RETRIES
        )
        blocks = list(found.iter_batches(batch_size=None, batch_format="numpy"))
    near = Pairs.concatenate([Pairs(**block) for block in blocks])
    near = Pairs(rows[near.left_P], rows[near.right_P], near.correlation_P, near.transform_P)
    return Pairs.concatenate([exact, near])


def score(
    refs: pa.Table,
    specs: tuple[PreprocessSpec, ...],
    scorer: type[Callable[[Columns], Any]],
    scorer_args: tuple[Any, ...],
    output: str,
    num_actors: int,
    cpus_per_actor: float,
    num_gpus_per_actor: float = 0.0,
) -> None:
    """Decode scans, run a scorer on them in a pool of actors, and write its rows to Parquet.

    Args:
        refs: rows of `REF_COLUMNS`.
        specs: preprocessing specs with distinct pixels, in the scorer's order.
        scorer: callable class from decoded columns to result rows, one for one; it loads its model
            once.
        scorer_args: its constructor's arguments.
        output: folder that the Parquet files are written to.
        num_actors: copies of the scorer at most; a small job starts fewer, since loading a copy
            takes as long as scoring hundreds of scans.
        cpus_per_actor: logical CPUs each holds; leave at least one for decoding.
        num_gpus_per_actor: GPUs each holds.
    """
    size = max(1, min(num_actors, refs.num_rows // _SCANS_WORTH_AN_ACTOR))
    with bounded_retries():
        decode(refs, DecodeStage(specs)).map_batches(
            scorer,
            fn_constructor_args=scorer_args,
            batch_size=_DECODE_BATCH,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=size),
            num_cpus=cpus_per_actor,
            num_gpus=num_gpus_per_actor or None,
            max_restarts=MAX_RETRIES,
            max_task_retries=MAX_RETRIES,
        ).write_parquet(
            output,
            mode="append",
            min_rows_per_file=50_000,
            ray_remote_args={"max_retries": MAX_RETRIES},
        )


def check_rows(refs: pa.Table, rows: pa.Table) -> None:
    """Check that each scan of the refs has one row.

    Raises:
        RuntimeError: if rows were lost or doubled, which would be a defect of this program.
    """
    if Counter(rows["scan_id"].to_pylist()) != Counter(refs["scan_id"].to_pylist()):
        raise RuntimeError(f"{refs.num_rows} scans went in, {rows.num_rows} rows came out")


def _search(blocks: Columns, index: list[ray.ObjectRef]) -> Columns:
    copies: CopyIndex = ray.get(index[0])
    starts = [int(block) * _SEARCH_ROWS for block in blocks["id"]]
    parts = [copies.search(at, min(at + _SEARCH_ROWS, len(copies))) for at in starts]
    return vars(Pairs.concatenate(parts))


def _guarded(columns: Columns, stage: RowStage) -> Iterator[Columns]:
    """Decode the scans of a block in tasks of a few, several at once."""
    starts = range(0, len(columns["scan_id"]), _DECODE_BATCH)
    batches = ({k: v[i : i + _DECODE_BATCH] for k, v in columns.items()} for i in starts)
    return _in_tasks(batches, stage)


def _guarded_stream(columns: Columns, stage: RowStage) -> Iterator[Columns]:
    """Read archives in order, decode their scans in parallel, and never run far ahead of that."""
    return _in_tasks(stream_batches(columns), stage)


def _in_tasks(batches: Iterable[Columns], stage: RowStage) -> Iterator[Columns]:
    window = _BATCHES_EACH + 1
    pending: deque[tuple[Any, Columns]] = deque()
    for batch in batches:
        pending.append((_run_stage.remote(stage, batch), batch))
        if len(pending) >= window:
            yield _outcome(*pending.popleft(), stage)
    while pending:
        yield _outcome(*pending.popleft(), stage)


def _num_overseers() -> int:
    """Return how many tasks oversee the decoding; each is a process more than there are CPUs."""
    num_cpus = float(ray.cluster_resources().get("CPU", 1))
    return math.ceil(num_cpus / _BATCHES_EACH)


def _outcome(task: Any, columns: Columns, stage: RowStage) -> Columns:
    """Return a task's rows; if its worker died, those of one task per scan."""
    try:
        return _get(task)
    except (*_CRASHES, ray.exceptions.NodeDiedError):
        rows = [{k: v[i] for k, v in columns.items()} for i in range(len(columns["scan_id"]))]
        return _one_by_one(rows, stage)


def _one_by_one(rows: list[dict[str, Any]], stage: RowStage) -> Columns:
    """Give every scan a task of its own, so that the one that crashes harms no other."""
    task = _run_stage.options(max_retries=TRIES_PER_SCAN - 1)
    pending = [task.remote(stage, {k: column_of([v]) for k, v in row.items()}) for row in rows]
    parts: list[Columns] = []
    for row, ref in zip(rows, pending, strict=True):
        try:
            parts.append(_get(ref))
        except _CRASHES:
            blank = stage.set_aside(row, "decoder_crashed", f"{TRIES_PER_SCAN} tries")
            parts.append({k: np.array([v]) for k, v in blank.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _get(ref: Any) -> Columns:
    result: Columns = ray.get(ref)
    return result


@contextmanager
def bounded_retries() -> Iterator[None]:
    """Allow `max_retries` and its like, which Ray 2.60 deprecates without another way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)
        yield
