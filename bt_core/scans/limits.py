"""What a source may hold at most; each limit can be set by an environment variable.

On a cluster, the two that are checked while reading (`BT_MAX_MEMBER_BYTES`, `BT_MAX_RATIO`) must be
set where the workers run; a command given `--submit` takes all of them along.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from bt_core.errors import UsageError

SMALL_BYTES: Final = 1024**2
"""Up to here a member may unpack to any multiple of its size."""


@dataclass(frozen=True)
class Limits:
    """Limits of one source.

    Attributes:
        max_members: files of a folder, archive or list (`BT_MAX_MEMBERS`).
        max_total_bytes: of all members of an archive, unpacked (`BT_MAX_TOTAL_BYTES`).
        max_member_bytes: of one file, unpacked (`BT_MAX_MEMBER_BYTES`).
        max_ratio: unpacked over packed size, above which what is larger than 1 MiB counts as a bomb
            (`BT_MAX_RATIO`).
    """

    max_members: int = 100_000
    max_total_bytes: int = 20 * 1024**3
    max_member_bytes: int = 512 * 1024**2
    max_ratio: int = 200


VARIABLES: Final = ("BT_MAX_MEMBERS", "BT_MAX_TOTAL_BYTES", "BT_MAX_MEMBER_BYTES", "BT_MAX_RATIO")


def limits() -> Limits:
    """Return the limits that the environment sets, and the defaults of the others.

    Raises:
        UsageError: if a variable is not a positive whole number.
    """
    return _parse(tuple(os.environ.get(name) for name in VARIABLES))


@lru_cache(maxsize=8)
def _parse(values: tuple[str | None, ...]) -> Limits:
    default = Limits()
    result = []
    for name, value in zip(VARIABLES, values, strict=True):
        if value is not None and not (value.isascii() and value.isdigit() and int(value[:19]) > 0):
            raise UsageError(f"{name} is {value!r}; set it to a positive whole number")
        result.append(int(value[:19]) if value else getattr(default, name[3:].lower()))
    return Limits(*result)
