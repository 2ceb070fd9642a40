"""Ray Data over scans: decode in guarded tasks, find copies, score.

Scans are read where they are decoded. Only those of a tar.gz or tar.zst, which has no random
access, are read by one task per archive, which hands them to the decoding tasks.
"""

import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.util.annotations import RayDeprecationWarning

from bt_core import storage
from bt_core.data.decode_guard import MAX_RETRIES, num_overseers, oversee, oversee_stream
from bt_core.data.decode_stage import Columns, DecodeStage, RowStage
from bt_core.data.families import CopyIndex, FamilyStage, Pairs, exact_pairs
from bt_core.data.stream import split_streamed
from bt_core.log import Progress
from bt_core.scans.preprocess import PreprocessSpec
from bt_core.scans.thumbnails import SPECTRUM_LENGTH, THUMBNAIL
from bt_core.store_files import SHORT_PART

SCORE_BATCH: Final = 64
_SEARCH_ROWS: Final = 2048
BLOCK_ROWS: Final = 1024
_MAP_BLOCK_ROWS: Final = 64
"""Where work takes long for each scan, so that all actors have some and its progress is seen."""
SCANS_WORTH_AN_ACTOR: Final = 256
_MAPS_WORTH_AN_ACTOR: Final = 16
_STARVED_AFTER_SECONDS: Final = 300


def configure() -> None:
    """Set Ray Data's context for this process: fail when starved, show bars on a terminal only.

    It logs nothing: the commands say in one line each what was done, and what it logs of an error
    it raises as well, so that `--debug` shows it.
    """
    # Pools are of one size: Ray Data does not add to one beside tasks that hold the other CPUs.
    warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = _STARVED_AFTER_SECONDS
    context.retried_io_errors = [SHORT_PART]  # of others a store's client asks again by itself
    context.enable_progress_bars = sys.stderr.isatty()


def decode(refs: pa.Table, stage: RowStage, block_rows: int = BLOCK_ROWS) -> ray.data.Dataset:
    """Run a stage over scan refs in guarded tasks, in parallel over the cluster.

    Args:
        refs: rows of `REF_COLUMNS` and any others.
        stage: a `DecodeStage`.
        block_rows: scans that a task decodes, and that pass on together.

    Returns:
        A lazy dataset with one row for each ref, in no particular order.
    """
    configure()
    streamed, direct = split_streamed(refs)
    blocks = [direct.slice(i, block_rows) for i in range(0, direct.num_rows, block_rows)]
    parts = [(blocks, oversee), (streamed, oversee_stream)] if streamed else [(blocks, oversee)]
    with bounded_retries():
        first, *others = [
            ray.data.from_arrow(tables).map_batches(
                work,
                fn_kwargs={"stage": stage},
                batch_size=None,
                compute=ray.data.TaskPoolStrategy(size=num_overseers(len(tables))),
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
    tables = []
    progress = Progress("read", refs.num_rows)
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        progress.add(table.num_rows)
        tables.append(table)
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
    catalog, thumbnails_NFF, spectra_ND = describe_scans(refs, stage)
    return catalog, find_copies(catalog, thumbnails_NFF, spectra_ND)


def describe_scans(refs: pa.Table, stage: FamilyStage) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """Return the catalog as `survey` does, and its rows' thumbnails and spectra.

    These are gathered here, 6 KB for each scan, and the search takes 7 KB to the object store.
    """
    refs = refs.sort_by("scan_id")
    row_of = {scan_id: row for row, scan_id in enumerate(refs["scan_id"].to_pylist())}
    thumbnails_NFF = np.zeros((refs.num_rows, THUMBNAIL.size_px, THUMBNAIL.size_px), np.uint8)
    spectra_ND = np.zeros((refs.num_rows, SPECTRUM_LENGTH), np.float32)
    tables = []
    progress = Progress("read", refs.num_rows)
    for batch in decode(refs, stage).iter_batches(batch_size=None, batch_format="numpy"):
        progress.add(len(batch["scan_id"]))
        rows = [row_of[scan_id] for scan_id in batch["scan_id"]]
        thumbnails_NFF[rows] = batch.pop("thumbnail")
        spectra_ND[rows] = batch.pop("spectrum")
        tables.append(pa.table(batch))
    catalog = pa.concat_tables(tables, promote_options="permissive").sort_by("scan_id")
    check_rows(refs, catalog)
    return catalog, thumbnails_NFF, spectra_ND


def find_copies(catalog: pa.Table, thumbnails_NFF: np.ndarray, spectra_ND: np.ndarray) -> Pairs:
    """Find all copies among scans; the index is made once and searched over the cluster.

    Returns:
        First each scan with the first one of equal pixels, then every near copy among those first
        ones; see `data.families`.
    """
    exact, rows = exact_pairs(catalog["pixel_sha256"].to_pylist())
    copies = CopyIndex(thumbnails_NFF, spectra_ND, rows)
    if len(copies) < 2:
        return exact
    configure()
    num_blocks = -(-len(copies) // _SEARCH_ROWS)
    blocks = [pa.table({"id": [block]}) for block in range(num_blocks)]
    index = ray.put(copies)
    with bounded_retries():
        found = ray.data.from_arrow(blocks).map_batches(
            _search, fn_kwargs={"index": [index]}, batch_size=None, max_retries=MAX_RETRIES
        )
        pairs = list(found.iter_batches(batch_size=None, batch_format="numpy"))
    return Pairs.concatenate([exact, *(Pairs(**part) for part in pairs)])


def decode_pixels(refs: pa.Table, spec: PreprocessSpec) -> dict[str, np.ndarray]:
    """Return the pixels_SS uint8 of a few scans by scan_id, without those that cannot be read."""
    pixels: dict[str, np.ndarray] = {}
    if not refs.num_rows:
        return pixels
    for batch in decode(refs, DecodeStage((spec,))).iter_batches(
        batch_size=None, batch_format="numpy"
    ):
        for scan_id, reason, image_SS in zip(
            batch["scan_id"], batch["reason"], batch["pixels_0"], strict=True
        ):
            if not reason:
                pixels[str(scan_id)] = image_SS
    return pixels


def score(
    refs: pa.Table,
    specs: tuple[PreprocessSpec, ...],
    scorer: type[Callable[[Columns], Any]],
    scorer_args: tuple[Any, ...],
    output: str,
    actors: tuple[int, float, float],
) -> None:
    """Decode scans, run a scorer on them in a pool of actors, and write its rows to Parquet.

    Args:
        refs: rows of `REF_COLUMNS`.
        specs: preprocessing specs with distinct pixels, in the scorer's order.
        scorer: callable class from decoded columns to result rows, one for one; it loads its model
            once.
        scorer_args: its constructor's arguments.
        output: folder that the Parquet files are written to.
        actors: copies of the scorer at most (a small job starts fewer, since loading a copy takes
            as long as scoring hundreds of scans), and logical CPUs and GPUs that each holds; leave
            at least one CPU for decoding.
    """
    work = _in_actors(refs, specs, scorer, scorer_args, actors, SCANS_WORTH_AN_ACTOR)
    filesystem, path = storage.filesystem(output)
    with bounded_retries():
        work.write_parquet(
            path,
            mode="append",
            filesystem=filesystem,
            min_rows_per_file=50_000,
            ray_remote_args={"max_retries": MAX_RETRIES},
        )


def map_scans(
    refs: pa.Table,
    specs: tuple[PreprocessSpec, ...],
    worker: type[Callable[[Columns], Any]],
    worker_args: tuple[Any, ...],
    actors: tuple[int, float, float],
    done: str,
) -> Iterator[pa.Table]:
    """Decode scans, run a worker on them in a pool of actors, and yield its rows as they come.

    Args:
        refs: rows of `REF_COLUMNS`.
        specs: as in `score`.
        worker: callable class as the scorer of `score`, whose work takes long for each scan.
        worker_args: its constructor's arguments.
        actors: as in `score`.
        done: the work in the past tense, for progress lines.
    """
    work = _in_actors(
        refs, specs, worker, worker_args, actors, _MAPS_WORTH_AN_ACTOR, _MAP_BLOCK_ROWS
    )
    progress = Progress(done, refs.num_rows)
    for table in work.iter_batches(batch_size=None, batch_format="pyarrow"):
        progress.add(table.num_rows)
        yield table


def _in_actors(
    refs: pa.Table,
    specs: tuple[PreprocessSpec, ...],
    worker: type[Callable[[Columns], Any]],
    worker_args: tuple[Any, ...],
    actors: tuple[int, float, float],
    scans_worth_one: int,
    block_rows: int = BLOCK_ROWS,
) -> ray.data.Dataset:
    """Return decoded scans, worked on in batches by as many actors as are worth their start."""
    num_actors, cpus_per_actor, num_gpus_per_actor = actors
    size = num_workers(num_actors, refs.num_rows, scans_worth_one)
    with bounded_retries():
        return decode(refs, DecodeStage(specs, gated=True), block_rows).map_batches(
            worker,
            fn_constructor_args=worker_args,
            batch_size=min(SCORE_BATCH, scans_worth_one),
            compute=ray.data.ActorPoolStrategy(size=size),
            num_cpus=cpus_per_actor,
            num_gpus=num_gpus_per_actor or None,
            max_restarts=MAX_RETRIES,
            max_task_retries=MAX_RETRIES,
        )


def num_workers(at_most: int, num_scans: int, worth_one: int = SCANS_WORTH_AN_ACTOR) -> int:
    """Return how many actors are worth their start for so many scans: one at least."""
    return max(1, min(at_most, num_scans // worth_one))


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


@contextmanager
def bounded_retries() -> Iterator[None]:
    """Allow `max_retries` and its like, which Ray 2.60 deprecates without another way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)
        yield


@contextmanager
def lean_reader() -> Iterator[None]:
    """Read Parquet by Ray Data's first reader.

    The second one starts 32 processes for each reading to look at the ends of files, and reads all
    files of a scoring job's manifest in one task with 8 MiB for each column of each: 450 MB for
    200,000 refs, of the checkpoint as much. A file is a task of the first one.
    """
    context = ray.data.DataContext.get_current()
    before, context.use_datasource_v2 = context.use_datasource_v2, False
    try:
        yield
    finally:
        context.use_datasource_v2 = before
