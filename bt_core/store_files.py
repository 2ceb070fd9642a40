"""Reading a file of a store from any place in it, without having it whole."""

import io
import time
from collections.abc import Callable
from typing import Any, BinaryIO, Final, TypeVar

import pyarrow as pa
from pyarrow import fs

from bt_core.store_errors import FileFault
from bt_core.stores import MAX_ATTEMPTS
from bt_core.web import WebHandler, open_url

T = TypeVar("T")
SHORT_PART: Final = "Failed to flush response stream"
"""What pyarrow says of an answer longer than the part of a file that it asked for, as the text of
an error may be. It does not ask again then."""


def again(read: Callable[[], T]) -> T:
    """Return what a read gives, and do it again where pyarrow does not (`SHORT_PART`)."""
    for attempt in range(MAX_ATTEMPTS - 1):
        try:
            return read()
        except OSError as error:
            if SHORT_PART not in str(error):
                raise
        time.sleep(0.05 * 2**attempt)
    return read()


class _StoreFile(io.RawIOBase):
    """A file of a store as a raw Python file, each of whose failures is an OSError."""

    def __init__(self, file: Any, size: int) -> None:
        self._file, self._size, self._position = file, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + (0, self._position, self._size)[whence]
        if position < 0:
            raise OSError("a seek to before the start of the file")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._size - self._position))
        try:
            content = again(lambda: self._file.read_at(wanted, self._position)) if wanted else b""
        except OSError:
            raise
        except Exception as error:  # whatever a store's client raises
            raise OSError(type(error).__name__) from error
        if len(content) < min(wanted, 1):
            raise FileFault("the file has become shorter")
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def open_file(
    filesystem_: fs.FileSystem, path: str, buffer_bytes: int = 256 * 1024
) -> BinaryIO | io.BufferedReader:
    """Open a file for reading from any place in it, without reading it whole.

    Args:
        filesystem_: as `filesystem` returned it.
        path: inside it.
        buffer_bytes: how much one request to a remote store brings.

    Raises:
        OSError: if it cannot be opened, whatever the store's own error is; `FileFault` if there can
            be no file of this name.
    """
    if isinstance(filesystem_, fs.LocalFileSystem):
        return open(path, "rb")
    if isinstance(filesystem_, fs.PyFileSystem) and isinstance(filesystem_.handler, WebHandler):
        return open_url(path, buffer_bytes)
    try:
        file = _open_remote(filesystem_, path)
        return io.BufferedReader(_StoreFile(file, file.size()), buffer_bytes)
    except OSError:
        raise
    except ValueError as error:
        raise FileFault(type(error).__name__) from error
    except Exception as error:
        raise OSError(type(error).__name__) from error


def _open_remote(filesystem_: fs.FileSystem, path: str) -> pa.NativeFile:
    try:
        return filesystem_.open_input_file(path)
    except FileNotFoundError:
        if isinstance(filesystem_, fs.PyFileSystem):  # fsspec says so whatever a server answers
            filesystem_.handler.fs.cat_file(path, 0, 1)
        raise
