"""One logger, `bt`, for the whole project. Nothing is configured on import."""

import logging
import sys
from typing import Final

logger: Final = logging.getLogger("bt")


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
