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
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._started = self._said = time.monotonic()

    def add(self, num_scans: int) -> None:
        """Count scans that are done."""
        self._done += num_scans
        now = time.monotonic()
        if now - self._said < _EVERY_SECONDS or (sys.stderr and sys.stderr.isatty()):
            return
        self._said = now
        rate = self._done / (now - self._started)
        logger.info("%s %d of %d scans (%.0f/s)", self._what, self._done, self._total, rate)
