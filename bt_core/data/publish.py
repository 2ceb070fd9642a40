"""From the rows of a finished job, in no order, to sorted files; a part at a time is in memory.

The rows are dealt out by ranges of scan_id to files below the work folder, then each range is
sorted, held against the manifest, and written. scan_ids are digests, so ranges of equal width hold
about equally many; were they not, parts would be of unequal size and nothing else.

Objects of a store do not grow, so behind a URI rows are dealt out to the driver's temporary folder,
which needs room for all of them: at most 1 KB each, before compression.
"""

import csv
import io
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bt_core import storage
from bt_core.data.copies import plain_cell
from bt_core.data.score_work import ScoreWork
from bt_core.data.scorer_guard import COMPUTE_SECONDS
from bt_core.errors import REASONS
from bt_core.log import logger, run_id

DICOM_FOLDER: Final = "dicom_results"
PART_ROWS: Final = 25_000
_DEALT_AT_ONCE: Final = 8192
_READ_AT_ONCE: Final = 16
REVIEW_COLUMNS: Final = (
    "member", "status", "reason_in_words", "predicted_label", "confidence", "prediction_set",
    "reason", "scan_id",
)  # fmt: skip
_SCORED: Final = "scored"
_SAYS: Final = ("scan_id", "status", "reason", "predicted_label")
"""Columns in which two rows of a scan may not differ."""


@dataclass
class Published:
    """What was written: counts, seconds of scoring, and the files."""

    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    runtimes: Counter[str] = field(default_factory=Counter)
    """Answers by `MEMBER: RUNTIME`."""
    num_seen: int = 0
    """Rows of scans that trained or chose the models, or copy one of these."""
    compute_seconds: float = 0.0
    parts: list[dict[str, Any]] = field(default_factory=list)
    """Of each file: file, num_rows, sha256."""


def publish(work: ScoreWork, out: str, num_scans: int, part_rows: int = PART_ROWS) -> Published:
    """Write `scores/part-NNNNN.parquet`, sorted by scan_id within and across, and `review.csv`.

    Args:
        work: of a job whose scans are all done.
        out: output folder, without `scores`.
        num_scans: how many the manifest has.
        part_rows: rows of one file, about.

    Raises:
        RuntimeError: if the rows are not those of the manifest, each once; nothing is written.
    """
    num_parts = -(-num_scans // part_rows)
    starts = np.array([f"{(i << 32) // num_parts:08x}" for i in range(num_parts)])
    for left in (work.dealt, work.parts, storage.join(out, "scores")):  # of a killed attempt
        storage.remove_dir(left)
    published = Published()
    review = storage.join(work.folder, "review.csv")
    filesystem, path = storage.filesystem(review)
    with _room(work) as dealt, filesystem.open_output_stream(path) as file:
        _deal(_tables(work.manifest, ["scan_id"]), starts, storage.join(dealt, "refs"))
        _deal(_tables(work.rows), starts, storage.join(dealt, "rows"))
        file.write(_csv([dict(zip(REVIEW_COLUMNS, REVIEW_COLUMNS, strict=True))]))
        for i in range(num_parts):
            expected = _sorted(storage.join(dealt, "refs", f"{i:05d}"))
            rows = _once(_sorted(storage.join(dealt, "rows", f"{i:05d}")))
            _check(expected, rows)
            if rows is not None:
                file.write(_csv(_to_review(rows)))
                _add(published, rows, work.parts)
            del expected, rows  # before the next are read
            pa.default_memory_pool().release_unused()
    storage.move_dir(work.parts, storage.join(out, "scores"))
    _, target = storage.filesystem(storage.join(out, "review.csv"))
    filesystem.move(path, target)
    return published


@contextmanager
def _room(work: ScoreWork) -> Iterator[str]:
    """Give a folder on a disk for the rows that are dealt out."""
    if not storage.is_uri(work.dealt):
        yield work.dealt
        return
    name = f"bt-dealt-{storage.digest_of(work.dealt)[:16]}"
    folder = os.path.join(tempfile.gettempdir(), name)
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed: it holds names
    os.mkdir(folder, 0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _tables(folder: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield the rows of a folder's files, some thousand at a time."""
    held: list[pa.Table] = []
    names = storage.list_files(folder, ".parquet")
    for start in range(0, len(names), _READ_AT_ONCE):
        some = [storage.join(folder, name) for name in names[start : start + _READ_AT_ONCE]]
        for content in storage.each(storage.read_bytes, some):
            held.append(pq.read_table(pa.BufferReader(content), columns=columns))
        if sum(table.num_rows for table in held) >= _DEALT_AT_ONCE:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _deal(tables: Iterator[pa.Table], starts: np.ndarray, folder: str) -> None:
    """Append every row to the file of its range, NNNNN, an Arrow stream; some may get none."""
    filesystem, root = storage.filesystem(folder)
    filesystem.create_dir(root, recursive=True)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    writers: dict[int, Any] = {}
    with ExitStack() as stack:
        for table in tables:
            table = table.sort_by("scan_id")
            part_N = np.searchsorted(starts, _ids(table), side="right") - 1
            ends = np.searchsorted(part_N, np.arange(len(starts)), side="right").tolist()
            for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
                if start == end:
                    continue
                if i not in writers:
                    sink = stack.enter_context(filesystem.open_output_stream(f"{root}/{i:05d}"))
                    stream = pa.ipc.new_stream(sink, table.schema, options=options)
                    writers[i] = stack.enter_context(stream)
                writers[i].write_table(table.slice(start, end - start))


def _ids(table: pa.Table) -> np.ndarray:
    return np.array(table["scan_id"].to_pylist(), np.str_)


def _sorted(location: str) -> pa.Table | None:
    """Return the rows of a range sorted by scan_id; None if it has none."""
    if not storage.exists(location):
        return None
    filesystem, path = storage.filesystem(location)
    with filesystem.open_input_stream(path) as file, pa.ipc.open_stream(file) as stream:
        return stream.read_all().sort_by("scan_id").combine_chunks()


def _once(rows: pa.Table | None) -> pa.Table | None:
    """Drop the second of two rows of a scan that say the same.

    A writer of an attempt that lost its head may live on for a while, and end a file after the next
    attempt has read what is done.
    """
    if rows is None or len(pc.unique(rows["scan_id"])) == len(rows):
        return rows
    said = [rows[name].to_pylist() for name in _SAYS if name in rows.column_names]
    keys = list(zip(*said, strict=True))
    is_first = [i == 0 or keys[i] != keys[i - 1] for i in range(len(keys))]
    if not all(is_first):
        logger.warning("%d scans were scored twice, alike", is_first.count(False))
        rows = rows.filter(pa.array(is_first))
    return rows


def _check(refs: pa.Table | None, rows: pa.Table | None) -> None:
    """Raise RuntimeError unless the rows of a range are those of the refs, each once."""
    expected = [] if refs is None else refs["scan_id"].to_pylist()
    found = [] if rows is None else rows["scan_id"].to_pylist()
    if found == expected and len(set(expected)) == len(expected):
        return
    missing, strange = len(set(expected) - set(found)), len(set(found) - set(expected))
    doubled = len(found) - len(set(found))
    raise RuntimeError(
        f"{missing} scans have no row, {doubled} rows are doubled and {strange} are of no scan: "
        "nothing was published; if another job was working on this folder, begin anew with "
        "--overwrite, else this is a defect"
    )


def _add(published: Published, rows: pa.Table, folder: str) -> None:
    for name, counts in (("status", published.statuses), ("reason", published.reasons)):
        counts.update(
            dict(tuple(each.values()) for each in pc.value_counts(rows[name]).to_pylist())
        )
    if "runtimes" in rows.column_names:
        flat = [pc.list_flatten(rows[name]) for name in ("members_used", "runtimes")]
        ran = pc.value_counts(pc.binary_join_element_wise(*flat, ": "))
        published.runtimes.update(dict(tuple(each.values()) for each in ran.to_pylist()))
    if "seen_in_training" in rows.column_names:
        published.num_seen += pc.sum(rows["seen_in_training"]).as_py() or 0
    published.compute_seconds += pc.sum(rows[COMPUTE_SECONDS]).as_py() or 0.0
    plain = rows.drop_columns([COMPUTE_SECONDS]).replace_schema_metadata(None)
    plain = storage.with_run_id(plain, run_id())
    sink = pa.BufferOutputStream()
    pq.write_table(plain, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    name = f"part-{len(published.parts):05d}.parquet"
    storage.write_bytes(storage.join(folder, name), content)
    digest = storage.sha256(content)
    part = {"file": f"scores/{name}", "num_rows": plain.num_rows, "sha256": digest}
    published.parts.append(part)


def _to_review(rows: pa.Table) -> list[dict[str, Any]]:
    """Return the lines of `review.csv`: all rows but those that were answered without a doubt."""
    columns = [name for name in REVIEW_COLUMNS if name in rows.column_names]
    doubtful = rows.filter(pc.not_equal(rows["status"], _SCORED))
    seen: list[dict[str, Any]] = doubtful.select(columns).to_pylist()
    for row in seen:
        row["member"] = plain_cell(row["member"])
        row["reason_in_words"] = REASONS.get(row["reason"], "")
        if row.get("confidence") is not None:
            row["confidence"] = f"{row['confidence']:.3f}"
        row["prediction_set"] = " or ".join(row.get("prediction_set") or ())
    return seen


def _csv(lines: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    csv.DictWriter(text, REVIEW_COLUMNS, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()
