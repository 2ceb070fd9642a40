"""A scan that ends the scorer's process is set aside, and no other scan with it.

Ray restarts the actor and gives it the same batch again. So each batch is put on record before it
is scored, in a process that outlives the scorer's, and taken off it afterwards. A batch that is
found there has ended a process: its scans are then scored one by one, each with a record of its own
that counts its tries. A scan that ended two processes by itself gets the reason `scorer_crashed`.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa

from bt_core import storage
from bt_core.data.decode_stage import Columns

TRIES_PER_SCAN: Final = 2
MAX_RESTARTS: Final = 30
"""Of one scoring actor: some ten scans that end it, or a model that cannot be loaded at all."""
COMPUTE_SECONDS: Final = "compute_seconds"
"""Column that is added: seconds of scoring, shared out evenly over the rows of a batch."""


class Records(Protocol):
    """What the scorers of one attempt are working on, all in one place."""

    def begin(self, work: str) -> int:
        """Put work on record; return how many tries at it were begun and did not end."""

    def end(self, work: str, num_rows: int) -> None:
        """Take work off the record, which gave so many rows."""


class Tries:
    """The records in memory, for a process that outlives the scorers."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()
        self._num_rows = 0

    def begin(self, work: str) -> int:
        """Put work on record; return how many tries at it were begun and did not end."""
        self._begun[work] += 1
        return self._begun[work] - 1

    def end(self, work: str, num_rows: int) -> None:
        """Take work off the record, which gave so many rows."""
        del self._begun[work]
        self._num_rows += num_rows

    def num_rows(self) -> int:
        """Return how many rows all work has given so far."""
        return self._num_rows


class CrashGuard:
    """Callable for an actor pool: a scorer whose batches are put on record while it works on them.

    Args:
        scorer: callable class from decoded columns to rows, one for one; a scan whose `reason` is
            set must not be given to a model.
        scorer_args: its constructor's arguments.
        records: of this attempt, shared by all scorers.
    """

    def __init__(
        self,
        scorer: Callable[..., Callable[[Columns], pa.Table]],
        scorer_args: tuple[Any, ...],
        records: Records,
    ) -> None:
        self._records = records
        self._score = scorer(*scorer_args)

    def __call__(self, columns: Columns) -> pa.Table:
        """Return the scorer's rows, with `COMPUTE_SECONDS`."""
        started = time.perf_counter()
        ids = [str(scan_id) for scan_id in columns["scan_id"]]
        batch = storage.sha256("".join(ids).encode())
        if self._records.begin(batch):
            rows = pa.concat_tables([self._score_one(columns, i) for i in range(len(ids))])
        else:
            rows = self._score(columns)
        self._records.end(batch, rows.num_rows)
        share = np.full(rows.num_rows, (time.perf_counter() - started) / max(1, rows.num_rows))
        return rows.append_column(COMPUTE_SECONDS, pa.array(share, pa.float32()))

    def _score_one(self, columns: Columns, i: int) -> pa.Table:
        one = {name: values[i : i + 1] for name, values in columns.items()}
        if str(one["reason"][0]):
            return self._score(one)
        scan_id = str(one["scan_id"][0])
        if self._records.begin(scan_id) >= TRIES_PER_SCAN:
            return self._score({**one, "reason": np.array(["scorer_crashed"])})
        rows = self._score(one)
        self._records.end(scan_id, 0)
        return rows
