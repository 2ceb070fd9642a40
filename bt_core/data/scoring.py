"""Scoring on Ray Data: streamed, each scan exactly once, and going on where a killed job was.

::

    manifest -> without what is done -> refs in blocks -> decode in guarded tasks
             -> score in a pool of actors -> append rows to Parquet, ids to the checkpoint

The checkpoint is Ray Data's own: the ids of a file of rows are written before it under a pending
name, and renamed after it. What another attempt left pending is removed with its rows.

Nothing lists a folder that grows while a job is under way, which on a store of objects would take
longer with each file. What Ray Data asks a store for is in proportion to the files of rows.
"""

import threading
from collections import Counter as Counts
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.data.checkpoint import CheckpointConfig
from ray.util.metrics import Counter, Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bt_core import storage
from bt_core.data.decode_guard import MAX_RETRIES, num_overseers, oversee, oversee_stream
from bt_core.data.decode_stage import Columns, DecodeStage
from bt_core.data.pipeline import (
    BLOCK_ROWS,
    SCORE_BATCH,
    bounded_retries,
    configure,
    lean_reader,
    num_workers,
)
from bt_core.data.score_work import ScoreWork, writing
from bt_core.data.scorer_guard import MAX_RESTARTS, CrashGuard, Tries
from bt_core.errors import RunError, last_line
from bt_core.log import Progress
from bt_core.scans.preprocess import PreprocessSpec
from bt_core.telemetry import WorkClock, exported

COMMIT_ROWS: Final = 256
"""Rows at least, or the last ones, that are written and put on record at once."""
_PIECES_EACH: Final = 8
"""Blocks that each actor gets of a small archive; of a large one it gets more."""
_MOST_ROWS: Final = 512
"""Of a block: each costs the driver some memory and time."""
_ROW_BYTES: Final = 1024
"""Of a decoded row without its pixels."""
_FILTER_BYTES: Final = 256 * 1024**2
_LOOK_SECONDS: Final = 2.0


def score_manifest(
    work: ScoreWork,
    specs: tuple[PreprocessSpec, ...],
    scorer: Callable[..., Callable[[Columns], pa.Table]],
    scorer_args: tuple[Any, ...],
    actors: tuple[int, float, float],
    is_streamed: bool,
) -> None:
    """Score the scans of a job's manifest that have no row yet.

    Args:
        work: of a job that was put on record, with its manifest; gets rows and checkpoint.
        specs: preprocessing specs with distinct pixels, in the scorer's order.
        scorer: as in `scorer_guard.CrashGuard`.
        scorer_args: its constructor's arguments.
        actors: as in `pipeline.score`.
        is_streamed: the source is a compressed tar, which one task reads from its start.

    Raises:
        RunError: if rows cannot be written, or the scorer's process dies again and again.
    """
    job = work.job()
    num_done = work.num_done()
    num_left = job.num_scans - num_done
    if not num_left:
        return
    work.settle()
    configure()
    num_actors, cpus, gpus = actors
    num_actors = num_workers(num_actors, num_left)
    if num_done:  # the checkpoint's filter holds a CPU
        cpus = max(0.0, round(cpus - 1 / num_actors, 3))
    row_bytes = _ROW_BYTES + sum(spec.size_px**2 for spec in specs)
    block_rows = job.num_scans if is_streamed else BLOCK_ROWS
    num_blocks = -(-num_left // block_rows)
    tries = _SharedTries()
    rows_filesystem, rows_path = storage.filesystem(work.rows)
    with (
        lean_reader(),
        bounded_retries(),
        writing(work.folder),
        _explained(),
        _reported(tries, job.num_scans, num_done),
    ):
        _refs(work, num_left, num_actors, row_bytes).repartition(
            target_num_rows_per_block=block_rows
        ).map_batches(
            oversee_stream if is_streamed else oversee,
            fn_kwargs={"stage": DecodeStage(specs, gated=True)},
            batch_size=None,
            compute=ray.data.TaskPoolStrategy(size=num_overseers(num_blocks)),
            max_retries=MAX_RETRIES,
        ).map_batches(
            _Counted,
            fn_constructor_args=(scorer, scorer_args, tries),
            batch_size=SCORE_BATCH,
            compute=ray.data.ActorPoolStrategy(size=num_actors),
            num_cpus=cpus,
            num_gpus=gpus or None,
            max_restarts=MAX_RESTARTS,
            max_task_retries=-1,  # the guard ends what would go on for ever
        ).write_parquet(
            rows_path,
            mode="append",
            filesystem=rows_filesystem,
            min_rows_per_file=COMMIT_ROWS,
            ray_remote_args={"max_retries": MAX_RETRIES},
        )


def _refs(work: ScoreWork, num_left: int, num_actors: int, row_bytes: int) -> ray.data.Dataset:
    """Return the refs of a job, without those that are done."""
    filesystem, path = storage.filesystem(work.manifest)
    refs = ray.data.read_parquet(
        path,
        filesystem=filesystem,
        override_num_blocks=len(storage.list_files(work.manifest)),
        ray_remote_args={"max_retries": MAX_RETRIES},
    )
    refs.context.checkpoint_config = _checkpoint(work)
    # Small archives, too, pass on in pieces, so that all actors have work and rows are done soon.
    rows_at_once = min(max(num_left // (_PIECES_EACH * num_actors), SCORE_BATCH), _MOST_ROWS)
    refs.context.target_max_block_size = rows_at_once * row_bytes
    return refs


class _Counted(CrashGuard):
    """Counts what is scored; a batch that is scored again counts again."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._scans = exported(Counter, "bt_score_scans_total", "Rows of a job.", ("status",))
        self._clock = WorkClock("bt_score")

    def __call__(self, columns: Columns) -> pa.Table:
        self._clock.begins()
        rows = super().__call__(columns)
        self._clock.ends()
        for status, num in Counts(rows["status"].to_pylist()).items():
            self._scans.inc(num, {"status": status})
        return rows


def _checkpoint(work: ScoreWork) -> CheckpointConfig:
    filesystem, path = storage.filesystem(work.checkpoint)
    config = CheckpointConfig(
        id_column="scan_id",
        checkpoint_path=path,
        override_filesystem=filesystem,
        delete_checkpoint_on_success=False,
    )
    config.checkpoint_actor_pool_max_size = 1
    config.checkpoint_actor_memory_bytes = _FILTER_BYTES
    return config


class _SharedTries:
    """The records of all scorers, in an actor on the driver's node: lost only with the job."""

    def __init__(self) -> None:
        here = ray.get_runtime_context().get_node_id()
        self._actor = (
            ray.remote(Tries)
            .options(
                num_cpus=0,
                max_restarts=MAX_RETRIES,
                max_task_retries=MAX_RETRIES,
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
            )
            .remote()
        )

    def begin(self, work: str) -> int:
        """Put work on record, and wait until it is; see `Tries`."""
        return int(ray.get(self._actor.begin.remote(work)))

    def end(self, work: str, num_rows: int) -> None:
        """Take work off the record."""
        self._actor.end.remote(work, num_rows)

    def num_rows(self) -> int:
        """Return how many rows the scorers have given so far."""
        return int(ray.get(self._actor.num_rows.remote(), timeout=_LOOK_SECONDS))


@contextmanager
def _reported(tries: _SharedTries, total: int, done: int) -> Iterator[None]:
    """Say how far the job is while the driver waits for it, by the rows of the scorers."""
    ended = threading.Event()
    progress = Progress("scored", total, done)
    left = exported(Gauge, "bt_score_left_scans", "Scans of a job that have no row yet.")

    def look() -> None:
        while not ended.wait(_LOOK_SECONDS):
            try:
                num_done = min(total, done + tries.num_rows())
                progress.reach(num_done)
                left.set(total - num_done)
            except ray.exceptions.RayError:  # it is being restarted; the next look does better
                continue

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    left.set(0)


@contextmanager
def _explained() -> Iterator[None]:
    """Raise RunError with what to do where scorers die for good."""
    try:
        yield
    except ray.exceptions.ActorDiedError as error:
        if error.actor_init_failed:
            raise RunError(f"no scorer could start: {last_line(error)}") from error
        raise RunError(
            f"a scorer's process died {MAX_RESTARTS} times (memory, or a fault in the model's "
            "runtime); what is scored is kept: the same command goes on from there"
        ) from error
