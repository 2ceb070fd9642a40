"""Compressed tars, which cannot be read from their middle: one pass gives all wanted members.

A batch is a dict of columns, as Ray Data hands it over.
"""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bt_core.data.decode_stage import CONTENT, Columns, column_of
from bt_core.errors import BtError, ScanError
from bt_core.scans.archives import open_archive, stream_members
from bt_core.scans.tars import StreamedTar
from bt_core.store_errors import refuse_away

BATCH_ROWS: Final = 64
"""Scans that one decoding task is given."""
_BATCH_BYTES: Final = 32 * 1024**2


def is_streamed(uri: str) -> bool:
    """Return whether an archive can only be read in order; False if it cannot be opened.

    Raises:
        StoreError: if its store does not answer.
    """
    try:
        return isinstance(open_archive(uri), StreamedTar)
    except (OSError, BtError) as error:  # each of its scans will say so
        refuse_away(error)
        return False


def split_streamed(refs: pa.Table) -> tuple[list[pa.Table], pa.Table]:
    """Return the refs of each compressed tar as a table of its own, and all other refs."""
    inside = refs.filter(pc.greater_equal(refs["position"], 0))
    uris = [uri for uri in pc.unique(inside["uri"]).to_pylist() if is_streamed(uri)]
    if not uris:
        return [], refs
    streamed = [inside.filter(pc.equal(inside["uri"], uri)).combine_chunks() for uri in uris]
    is_inside = pc.is_in(refs["uri"], value_set=pa.array(uris, refs["uri"].type))
    is_direct = pc.or_(pc.less(refs["position"], 0), pc.invert(is_inside))
    return streamed, refs.filter(is_direct)


def stream_batches(columns: Columns) -> Iterator[Columns]:
    """Add the column `CONTENT` to refs of compressed tars, reading each archive once.

    Args:
        columns: rows of `REF_COLUMNS` and any others, in any order.

    Yields:
        All rows, once each, in the order of the archives: up to 64 of them or about 32 MiB. What
        the stream did not give has a ScanError: `member_corrupt` behind a damage, `io_error` if
        the archive has changed.
    """
    uris = np.asarray(columns["uri"])
    for uri in dict.fromkeys(uris.tolist()):
        yield from _stream_one(uri, columns, np.flatnonzero(uris == uri).tolist())


def _stream_one(uri: str, columns: Columns, rows: list[int]) -> Iterator[Columns]:
    waiting: dict[tuple[str, str, int], list[int]] = {}
    for i in rows:
        key = (columns["scan_id"][i], columns["member"][i], int(columns["position"][i]))
        waiting.setdefault(key, []).append(i)
    batch: list[tuple[int, bytes | ScanError]] = []
    num_bytes = 0
    rest = ScanError("io_error", "the archive has changed since it was listed")
    try:
        for ref, content in stream_members(uri):
            for i in waiting.pop((ref.scan_id, ref.member, ref.position), []):
                batch.append((i, content))
                num_bytes += len(content) if isinstance(content, bytes) else 0
                if len(batch) >= BATCH_ROWS or num_bytes >= _BATCH_BYTES:
                    yield _with_content(columns, batch)
                    batch, num_bytes = [], 0
            if not waiting:
                break
    except ScanError as error:
        rest = error
    batch += [(i, rest) for left in waiting.values() for i in left]
    for start in range(0, len(batch), BATCH_ROWS):
        yield _with_content(columns, batch[start : start + BATCH_ROWS])


def _with_content(columns: Columns, batch: list[tuple[int, Any]]) -> Columns:
    rows = [i for i, _ in batch]
    taken = {name: np.asarray(values)[rows] for name, values in columns.items()}
    return {**taken, CONTENT: column_of([content for _, content in batch])}
