"""One logger, `bt`, for the whole project. Nothing is configured on import."""

import logging
import sys
import time
from typing import Final

logger: Final = logging.getLogger("bt")
_EVERY_SECONDS: Final = 10.0


def configure(level: int = logging.INFO) -> None:
    """Send this project's log lines to standard error; other libraries' loggers are left alone.

    Calling it again only changes the level.
    """
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
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
