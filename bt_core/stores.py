"""Locations and the stores behind them, each opened once per process and asked again when it fails.

A location is a local path, or a URI of any store that pyarrow or fsspec opens. An S3 store that
answers with an error, late or not at all is asked again (`MAX_ATTEMPTS`), by every process that
gets its client; one that stays away, or refuses, is `StoreError`, never a scan that cannot be read.

The requests of a process share a budget of 100 retries (AWS's standard), which a success fills up
again: where a store fails all of many requests at once, it is asked less often than that.
"""

import io
import json
import os
import re
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, BinaryIO, Final, TypeVar
from urllib.parse import unquote, urlsplit

import fsspec
import pyarrow as pa
from pyarrow import fs

from bt_core.errors import ConfigError, UsageError, first_line
from bt_core.store_errors import FileFault
from bt_core.store_errors import refuse_away as refuse_away

T = TypeVar("T")
MAX_ATTEMPTS: Final = 8
"""Of a request to S3, with pauses that double: up to 70 s in all. `AWS_MAX_ATTEMPTS` changes it."""
VARIABLES: Final = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION",
    "AWS_MAX_ATTEMPTS",
)  # fmt: skip
"""Of the environment: where a store is and how often it is asked, without what is secret."""
_CONNECT_SECONDS: Final = 10.0
_SILENT_SECONDS: Final = 30.0
"""How long an answer may stand still before its request counts as failed."""
SHORT_PART: Final = "Failed to flush response stream"
"""What pyarrow says of an answer longer than the part of a file that it asked for, as the text of
an error may be. It does not ask again then."""
_PASSWORD: Final = re.compile(r"(?:(?<=s3)://[^/@]*:|://[^/@]*:(?!\d+/))[^@]*@")
"""A URI with `user:password@`; the password may hold slashes, as keys of S3 do."""
_SECRET_ENDINGS: Final = (
    "signature", "sig", "token", "secret", "password", "passwd", "pwd", "credential",
    "credentials", "key", "keyid", "auth", "authorization",
)  # fmt: skip
"""How names of secrets in a query end, without case and punctuation, as in `X-Amz-Signature`."""


def is_uri(location: str) -> bool:
    """Return whether a location has a scheme, as in `s3://bucket/key`."""
    return "://" in location


def absolute(location: str) -> str:
    """Return a URI as it is, and a local path absolute with `~` expanded."""
    return location if is_uri(location) else os.path.abspath(os.path.expanduser(location))


def redact(location: str) -> str:
    """Return a location for messages: a URI without user, password and query (signatures)."""
    if not is_uri(location):
        return location
    without_user = re.sub(r"://[^/@]*@", "://***@", _PASSWORD.sub("://***@", location))
    return re.sub(r"\?.*", "?***", without_user, flags=re.DOTALL)


def refuse_secrets(location: str) -> None:
    """Raise UsageError, which does not quote it, if a URI holds a password or signs itself."""
    if not is_uri(location):
        return
    queries = re.split("[?&;#]", location.partition("?")[2])
    names = (re.sub(r"[\W_]", "", unquote(part.partition("=")[0])) for part in queries)
    if _PASSWORD.search(location) or any(n.lower().endswith(_SECRET_ENDINGS) for n in names):
        raise UsageError(
            f"{redact(location)} holds a password, key or signature, which would be written into "
            "every result; give credentials by the environment (AWS_ACCESS_KEY_ID, ...) or a file "
            "of your client, or download the scans first"
        )


def filesystem(location: str) -> tuple[fs.FileSystem, str]:
    """Return the pyarrow filesystem of a location and the path inside it.

    Raises:
        UsageError: if neither pyarrow nor fsspec opens the scheme; says which package is missing.
    """
    if not is_uri(location):
        return fs.LocalFileSystem(), absolute(location)
    return _open_uri(location)


class S3Store(fs.S3FileSystem):  # type: ignore[misc]
    """S3 with explicit retries and time-outs, which pyarrow's own client forgets when it travels.

    Small files take one request instead of three. Folders are not made, since they are there with
    their first file; buckets are.

    Args:
        max_attempts: of each request.
        options: of `pyarrow.fs.S3FileSystem`.
    """

    def __init__(self, max_attempts: int, **options: Any) -> None:
        self._max_attempts = max_attempts
        retries = fs.AwsStandardS3RetryStrategy(max_attempts=max_attempts)
        super().__init__(**options, retry_strategy=retries)

    def __reduce__(self) -> tuple[Any, ...]:
        [options] = super().__reduce__()[1]
        return _s3_store, (self._max_attempts, options)

    def create_dir(self, path: str, *, recursive: bool = True) -> None:
        """Make a bucket; a folder needs no request."""
        if "/" not in path.strip("/"):
            super().create_dir(path, recursive=recursive)


_opening: Final = threading.RLock()
"""To open a client waits for all requests of other clients, with their retries: once is enough."""
_buckets: Final[dict[str, S3Store]] = {}


def _s3_store(max_attempts: int, options: dict[str, Any]) -> S3Store:
    """Return the client of some options, which this process may have already."""
    fixed = {
        "allow_delayed_open": True,
        "connect_timeout": _CONNECT_SECONDS,
        "request_timeout": _SILENT_SECONDS,
    }
    with _opening:
        return _client(max_attempts, json.dumps(options | fixed, sort_keys=True))


@lru_cache(maxsize=64)
def _client(max_attempts: int, options: str) -> S3Store:
    return S3Store(max_attempts, **json.loads(options))


def _open_uri(location: str) -> tuple[fs.FileSystem, str]:
    if location.startswith("s3://"):
        parts = urlsplit(location.replace("#", "%23"))
        query = f"?{parts.query}" if parts.query else ""
        path = unquote(parts.netloc.rpartition("@")[2] + parts.path)
        return _open_bucket(f"s3://{parts.netloc}{query}"), path.rstrip("/")
    return _open_once(location)


def _open_bucket(location: str) -> fs.FileSystem:
    """Open a bucket once per process, so that its connections serve all its files."""
    if location not in _buckets:
        given = os.environ.get("AWS_MAX_ATTEMPTS", str(MAX_ATTEMPTS))
        if not given.isdecimal() or int(given) < 1:
            raise ConfigError(f"AWS_MAX_ATTEMPTS={given}: give a whole number of 1 or more")
        with _opening:
            if location not in _buckets:
                [options] = _open_once(location)[0].__reduce__()[1]
                _buckets[location] = _s3_store(int(given), options)
    return _buckets[location]


@lru_cache(maxsize=256)
def _open_once(location: str) -> tuple[fs.FileSystem, str]:
    try:
        return fs.FileSystem.from_uri(location.replace(" ", "%20"))  # type: ignore[no-any-return]
    except (pa.ArrowInvalid, ValueError) as error:
        if "Unrecognized filesystem" not in str(error):
            raise UsageError(f"cannot open {redact(location)}: it is not a valid URI") from error
    except OSError as error:  # the first line; what follows may be a page of library paths
        raise UsageError(f"cannot open {redact(location)}: {redact(first_line(error))}") from error
    try:
        opened, path = fsspec.core.url_to_fs(location)
    except Exception as error:  # each of fsspec's stores has its own errors
        raise UsageError(
            f"cannot open {redact(location)}: {redact(first_line(error))}; use a local path or a "
            "URI that pyarrow.fs (s3://, gs://, hdfs://, file://) or fsspec (http://, ...) opens"
        ) from error
    return fs.PyFileSystem(fs.FSSpecHandler(opened)), str(path)


_HELD_BYTES: Final = 512 * 1024**2
"""Largest file held in memory because its server does not read from the middle of a file."""


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


def _reads_anywhere(file: pa.NativeFile) -> bool:
    """Tell a plain HTTP server, which ignores ranges, by asking for the last byte."""
    try:
        size = file.size()
        return size == 0 or len(file.read_at(1, size - 1)) == 1
    except Exception:  # a new request then gives the whole file, or the error that counts
        return False


def _held(whole: BinaryIO) -> io.BytesIO:
    """Read a stream into memory; one that may give less than asked for at a time."""
    held = io.BytesIO()
    while chunk := whole.read(1024**2):
        if held.tell() + len(chunk) > _HELD_BYTES:
            raise FileFault("the server reads files from their start only; fetch it first")
        held.write(chunk)
    held.seek(0)
    return held


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
    try:
        file = _open_remote(filesystem_, path)
        if isinstance(filesystem_, fs.PyFileSystem) and not _reads_anywhere(file):
            with filesystem_.handler.fs.open(path, block_size=0) as whole:
                return _held(whole)
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
