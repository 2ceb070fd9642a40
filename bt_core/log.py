"""One logger, `bt`, for the whole project, and the id of a run. Nothing is configured on import."""

import logging
import os
import re
import secrets
import sys
import time
from datetime import UTC, datetime
from typing import Final

from bt_core.errors import UsageError

logger: Final = logging.getLogger("bt")
RUN_ID: Final = "BT_RUN_ID"
"""Variable of the environment by which the processes of a run have one id."""
_EVERY_SECONDS: Final = 10.0
_RUN_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def run_id() -> str:
    """Return the id of this run of a command, the same in all processes that work for it.

    It is `BT_RUN_ID` of the environment, where it is put if nobody has set it.

    Raises:
        UsageError: if that is no id.
    """
    if RUN_ID not in os.environ:
        now = datetime.now(UTC).strftime("%y%m%d-%H%M%S")
        os.environ[RUN_ID] = f"{now}-{secrets.token_hex(3)}"
    given = os.environ[RUN_ID]
    if not _RUN_ID.fullmatch(given):
        raise UsageError(f"{RUN_ID}={given[:80]!r}: give 1 to 64 letters, digits, - or _")
    return given


def configure(level: int = logging.INFO) -> None:
    """Send this project's log lines to standard error; other libraries' loggers are left alone.

    Each names its run, unless a terminal shows them. Calling it again only changes the level.

    Raises:
        UsageError: see `run_id`.
    """
    if not logger.handlers:
        run = "" if sys.stderr and sys.stderr.isatty() else f"{run_id()} "
        handler = logging.StreamHandler(sys.stderr)
        line = f"%(asctime)s {run}%(levelname)s %(message)s"
        handler.setFormatter(logging.Formatter(line, "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(level)


class Progress:
    """Says every ten seconds how far long work is; on a terminal, where Ray draws bars, nothing.

    Args:
        what: the work in the past tense, as in `read 3000 of 10000 scans`.
        total: number of scans.
        done: how many of them were done before.
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total, self._done = what, total, done
        self._before = done
        self._first: tuple[float, int] | None = None
        """When the first scans were done, and how many: before, worker processes start."""
        self._said = time.monotonic()

    def add(self, num_scans: int) -> None:
        """Count scans that are done."""
        self.reach(self._done + num_scans)

    def reach(self, done: int) -> None:
        """Take note of how many scans are done by now."""
        self._done = done
        now = time.monotonic()
        if self._first is None and done > self._before:
            self._first = (now, done)
        if now - self._said < _EVERY_SECONDS or (sys.stderr and sys.stderr.isatty()):
            return
        self._said = now
        began, num = self._first or (now, done)
        if done == num:  # nobody knows yet how fast it goes
            logger.info("%s %d of %d scans", self._what, done, self._total)
            return
        rate = (done - num) / (now - began)
        left = duration((self._total - done) / rate)
        logger.info(
            "%s %d of %d scans (%.1f/s, %s left)", self._what, done, self._total, rate, left
        )


def duration(seconds: float) -> str:
    """Return a time as people say it: `45 s`, `12 min`, `3 h 05 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
