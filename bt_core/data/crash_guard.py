"""A scan that ends the scorer's process is set aside, and no other scan with it.

Ray restarts the actor and gives it the same batch again. So before a batch is scored, a small file
named after it is written, and removed afterwards. Who finds the file of its own batch knows that
the batch ended a process: its scans are then scored one by one, each under a file of its own that
counts its tries. A scan that ended two processes by itself gets the reason `scorer_crashed`.
"""

import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pyarrow as pa

from bt_core import storage
from bt_core.data.decode_stage import Columns

TRIES_PER_SCAN: Final = 2
MAX_RESTARTS: Final = 30
"""Of one scoring actor: some ten scans that end it, or a model that cannot be loaded at all."""
COMPUTE_SECONDS: Final = "compute_seconds"
"""Column that is added: seconds of scoring, shared out evenly over the rows of a batch."""


class CrashGuard:
    """Callable for an actor pool: a scorer whose batches are put on record while it works on them.

    Args:
        scorer: callable class from decoded columns to rows, one for one; a scan whose `reason` is
            set must not be given to a model.
        scorer_args: its constructor's arguments.
        folder: for the records, visible from every node; empty but for those of this attempt.
    """

    def __init__(
        self,
        scorer: Callable[..., Callable[[Columns], pa.Table]],
        scorer_args: tuple[Any, ...],
        folder: str,
    ) -> None:
        self._folder = folder
        self._score = scorer(*scorer_args)

    def __call__(self, columns: Columns) -> pa.Table:
        """Return the scorer's rows, with `COMPUTE_SECONDS`."""
        started = time.perf_counter()
        ids = [str(scan_id) for scan_id in columns["scan_id"]]
        record = storage.join(self._folder, storage.sha256("".join(ids).encode())[:20])
        if storage.exists(record):
            rows = pa.concat_tables([self._score_one(columns, i) for i in range(len(ids))])
        else:
            storage.write_bytes(record, b"")
            rows = self._score(columns)
        storage.remove_file(record)
        share = np.full(rows.num_rows, (time.perf_counter() - started) / max(1, rows.num_rows))
        return rows.append_column(COMPUTE_SECONDS, pa.array(share, pa.float32()))

    def _score_one(self, columns: Columns, i: int) -> pa.Table:
        one = {name: values[i : i + 1] for name, values in columns.items()}
        record = storage.join(self._folder, f"{one['scan_id'][0]}.scan")
        num_tries = int(storage.read_bytes(record)) if storage.exists(record) else 0
        if num_tries >= TRIES_PER_SCAN:
            return self._score({**one, "reason": np.array(["scorer_crashed"])})
        if str(one["reason"][0]):
            return self._score(one)
        storage.write_bytes(record, str(num_tries + 1).encode())
        rows = self._score(one)
        storage.remove_file(record)
        return rows
