"""Decoding in tasks whose death is noticed.

Ray retries for ever by default, so a file that kills its decoder would stop a job without an end.
Here every retry is bounded: the scans of a task that died are tried one by one, twice each, and one
that dies again is set aside as `decoder_crashed`.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
import ray
import ray.exceptions

from bt_core.data.decode_stage import Columns, RowStage, column_of, run_stage
from bt_core.data.stream import BATCH_ROWS, stream_batches

MAX_RETRIES: Final = 2
"""How often Ray may repeat a lost task or restart a lost actor."""
TRIES_PER_SCAN: Final = 2
BATCHES_AT_ONCE: Final = 8
"""Batches of one block that are decoded at once: at 32 MiB each, 256 MiB in the object store."""
_BLOCKS_EACH: Final = 32
"""Blocks that one task oversees, one after another, before there are more such tasks."""
_CRASHES: Final = (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)
_LOSSES: Final = (ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError)

_run_stage: Final = ray.remote(max_retries=0)(run_stage)


def num_overseers(num_blocks: int) -> int:
    """Return how many tasks oversee the decoding; each is a process more than there are CPUs.

    A large job asks for more than the cluster has now, so that one that scales by itself does.
    """
    num_cpus = float(ray.cluster_resources().get("CPU", 1))
    return max(math.ceil(num_cpus / BATCHES_AT_ONCE), math.ceil(num_blocks / _BLOCKS_EACH))


def oversee(columns: Columns, stage: RowStage) -> Iterator[Columns]:
    """Decode the scans of a block in tasks of a few, several at once."""
    starts = range(0, len(columns["scan_id"]), BATCH_ROWS)
    batches = ({k: v[i : i + BATCH_ROWS] for k, v in columns.items()} for i in starts)
    return _in_tasks(batches, stage)


def oversee_stream(columns: Columns, stage: RowStage) -> Iterator[Columns]:
    """Read archives in order, decode their scans in parallel, and never run far ahead of that."""
    return _in_tasks(stream_batches(columns), stage)


def _in_tasks(batches: Iterable[Columns], stage: RowStage) -> Iterator[Columns]:
    window = BATCHES_AT_ONCE + 1
    pending: deque[tuple[Any, Columns]] = deque()
    for batch in batches:
        pending.append((_run_stage.remote(stage, batch), batch))
        if len(pending) >= window:
            yield _outcome(*pending.popleft(), stage)
    while pending:
        yield _outcome(*pending.popleft(), stage)


def _outcome(task: Any, columns: Columns, stage: RowStage) -> Columns:
    """Return a task's rows; if its worker or its node died, those of a task for each scan."""
    try:
        return _get(task)
    except (*_CRASHES, *_LOSSES):
        rows = [{k: v[i] for k, v in columns.items()} for i in range(len(columns["scan_id"]))]
        return _one_by_one(rows, stage)


def _one_by_one(rows: list[dict[str, Any]], stage: RowStage) -> Columns:
    """Give every scan a task of its own, so that the one that crashes harms no other."""
    batches = [{k: column_of([v]) for k, v in row.items()} for row in rows]
    task = _run_stage.options(max_retries=TRIES_PER_SCAN - 1)
    pending = [task.remote(stage, batch) for batch in batches]
    parts: list[Columns] = []
    for row, batch, ref in zip(rows, batches, pending, strict=True):
        try:
            parts.append(_get_again(ref, task, stage, batch))
        except _CRASHES:
            blank = stage.set_aside(row, "decoder_crashed", f"{TRIES_PER_SCAN} tries")
            parts.append({k: np.array([v]) for k, v in blank.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _get_again(ref: Any, task: Any, stage: RowStage, batch: Columns) -> Columns:
    """Return a task's rows; when a node died with them, which is no fault of a scan, ask again."""
    for _ in range(MAX_RETRIES):
        try:
            return _get(ref)
        except _LOSSES:
            ref = task.remote(stage, batch)
    return _get(ref)


def _get(ref: Any) -> Columns:
    result: Columns = ray.get(ref)
    return result
