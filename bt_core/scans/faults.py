"""Whose fault it is that a scan cannot be read: its own, or that of the place where it lies.

The first becomes a row, which stays. The second is of a node or a store, and ends the work: what it
is cured by, the same command goes on after.
"""

import os
import platform
from urllib.parse import urlsplit

from pyarrow import fs

from bt_core import storage
from bt_core.errors import ConfigError, ScanError, SourceError, StoreError, UsageError
from bt_core.scans.members import NAMED
from bt_core.store_errors import FileFault, is_of_file, refuse_away


def fault_of(error: Exception, uri: str, position: int) -> ScanError:
    """Return the fault of a scan that could not be read.

    Its own are: one file that is not there, or not to be read, in a folder that is there; a damage
    inside an archive; and a row of a list that names what no store has.

    Args:
        error: what reading it raised.
        uri: of its `ScanRef`.
        position: of its `ScanRef`.

    Raises:
        StoreError: if its folder or archive cannot be read by this process, the store refuses or
            does not answer, or a setting of this process is wrong.
    """
    refuse_away(error, _store_of(uri))
    is_row = position == NAMED and not isinstance(error, ConfigError)
    if isinstance(error, UsageError) and not isinstance(error, SourceError) and not is_row:
        raise _place_fault(str(error), "set that right there") from error
    if isinstance(error, OSError) and not isinstance(error, FileFault):
        filesystem, path = storage.filesystem(uri)
        if not isinstance(filesystem, fs.LocalFileSystem):
            _check_store(error, filesystem, path, uri, position)
        elif position != NAMED:
            _check_disk(path, position)
    return ScanError("io_error", type(error).__name__)


def is_filled(folder: str) -> bool:
    """Return whether a local folder holds anything that this process sees.

    An empty one counts as not there: it may be the place of a mount, on a node without it.
    """
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def _check_disk(path: str, position: int) -> None:
    try:
        if position >= 0:
            with open(path, "rb") as archive:
                archive.read(1)
            return
        with os.scandir(path) as entries:
            if next(entries, None) is None:
                raise FileNotFoundError
    except OSError as error:
        why = "is not there, or is empty" if isinstance(error, FileNotFoundError) else _why(error)
        raise _place_fault(f"{_outermost(path)} {why}", "mount it there") from error


def _outermost(path: str) -> str:
    """Return the first folder of a path that is not there or empty: the mount that is missing."""
    parts = path.split("/")
    for i in range(2, len(parts)):
        folder = "/".join(parts[:i])
        if not os.path.exists(folder) or (os.access(folder, os.R_OK) and not is_filled(folder)):
            return folder
    return path


def _check_store(
    error: OSError, filesystem: fs.FileSystem, path: str, uri: str, position: int
) -> None:
    """Raise StoreError unless a store says that one file is not there, of a place that is."""
    shown = storage.redact(uri)
    if position == NAMED:  # a row's folder may be named after a patient
        shown, path = _store_of(uri), path.partition("/")[0]
    if not is_of_file(error):
        raise _place_fault(f"{shown} {_why(error)}", "see that it answers there") from error
    if position == NAMED and isinstance(filesystem, fs.PyFileSystem):
        return
    if position < 0 and filesystem.type_name == "py::web":  # it has no folders that could be asked
        return
    try:
        is_there = filesystem.get_file_info(path).type != fs.FileType.NotFound
    except Exception as unknown:  # a store's own errors
        refuse_away(unknown, _store_of(uri))
        raise _place_fault(f"{shown} {_why(unknown)}", "see that it answers there") from error
    if not is_there:
        raise _place_fault(f"{shown} is not there", "see that it is") from error


def _store_of(uri: str) -> str:
    try:
        parts = urlsplit(storage.redact(uri))
    except ValueError:  # it is none
        return "the store"
    return f"{parts.scheme}://{parts.netloc}" if parts.netloc else "the store"


def _why(error: Exception) -> str:
    """Return what an error says without the names in it."""
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read ({os.strerror(error.errno)})"
    cause = error.__cause__ or error
    return f"cannot be read ({type(cause).__name__} {getattr(cause, 'status', '')}".rstrip() + ")"


def _place_fault(what: str, cure: str) -> StoreError:
    return StoreError(
        f"node {platform.node()}: {what}; what is done is kept: {cure}, then give the same command "
        "again"
    )
