"""Locks on output folders, so that no two commands work on one at the same time.

The system frees the lock of a process that is killed. Stores behind a URI have no locks, so there
nothing is held.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from filelock import FileLock, Timeout
from pyarrow import fs

from bt_core import storage
from bt_core.errors import UsageError

_LOCK_FILE: Final = ".lock"


@contextmanager
def locked(out: str) -> Iterator[None]:
    """Make an output folder and keep other commands off it while the block runs.

    Raises:
        UsageError: if another command holds it, or the folder cannot be written.
    """
    path = _local(out)
    if path is None:
        yield
        return
    try:
        os.makedirs(path, exist_ok=True)
        lock = _acquired(out, path)
    except OSError as error:
        raise UsageError(
            f"-o {out} cannot be written ({error.strerror}); choose a folder that you may write to"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()
        with suppress(OSError):
            os.rmdir(path)  # only if nothing was written to it


def refuse_locked(out: str) -> None:
    """Raise UsageError if another command holds an output folder."""
    path = _local(out)
    if path is not None and os.path.exists(os.path.join(path, _LOCK_FILE)):
        _acquired(out, path).release()


def _local(out: str) -> str | None:
    filesystem, path = storage.filesystem(out)
    return path if isinstance(filesystem, fs.LocalFileSystem) else None


def _acquired(out: str, path: str) -> FileLock:
    lock = FileLock(os.path.join(path, _LOCK_FILE), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(
            f"another command is working on {out}; wait for its end, or choose another -o"
        ) from None
    return lock
