"""Files, local or on any store that pyarrow or fsspec opens; writing never leaves halves.

A location is a local path or a URI such as `s3://bucket/key`.
"""

import hashlib
import io
import json
import os
import re
import uuid
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, BinaryIO, Final
from urllib.parse import unquote

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from bt_core.errors import UsageError

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


@lru_cache(maxsize=256)
def _open_uri(location: str) -> tuple[fs.FileSystem, str]:
    """Open a store once per process; a new S3 client for every file would take longer than it."""
    try:
        return fs.FileSystem.from_uri(location.replace(" ", "%20"))  # type: ignore[no-any-return]
    except (pa.ArrowInvalid, ValueError) as error:
        if "Unrecognized filesystem" not in str(error):
            raise UsageError(f"cannot open {redact(location)}: it is not a valid URI") from error
    except OSError as error:  # the first line; what follows may be a page of library paths
        raise UsageError(f"cannot open {redact(location)}: {redact(_first_line(error))}") from error
    try:
        opened, path = fsspec.core.url_to_fs(location)
    except Exception as error:  # each of fsspec's stores has its own errors
        raise UsageError(
            f"cannot open {redact(location)}: {redact(_first_line(error))}; use a local path or a "
            "URI that pyarrow.fs (s3://, gs://, hdfs://, file://) or fsspec (http://, ...) opens"
        ) from error
    return fs.PyFileSystem(fs.FSSpecHandler(opened)), str(path)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


_HELD_BYTES: Final = 512 * 1024**2
"""Largest file held in memory because its server does not read from the middle of a file."""


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
            content = self._file.read_at(wanted, self._position) if wanted else b""
        except OSError:
            raise
        except Exception as error:  # whatever a store's client raises
            raise OSError(type(error).__name__) from error
        if len(content) < min(wanted, 1):
            raise OSError("the file has become shorter")
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
            raise OSError("the server reads files from their start only; fetch it first")
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
        OSError: if it cannot be opened, whatever the store's own error is.
    """
    if isinstance(filesystem_, fs.LocalFileSystem):
        return open(path, "rb")
    try:
        file = filesystem_.open_input_file(path)
        if isinstance(filesystem_, fs.PyFileSystem) and not _reads_anywhere(file):
            with filesystem_.handler.fs.open(path, block_size=0) as whole:
                return _held(whole)
        return io.BufferedReader(_StoreFile(file, file.size()), buffer_bytes)
    except OSError:
        raise
    except Exception as error:
        raise OSError(type(error).__name__) from error


def join(location: str, *parts: str) -> str:
    """Return a location below another."""
    return "/".join([location.rstrip("/"), *parts])


def exists(location: str) -> bool:
    """Return whether a file or folder is there."""
    filesystem_, path = filesystem(location)
    return bool(filesystem_.get_file_info(path).type != fs.FileType.NotFound)


def is_dir(location: str) -> bool:
    """Return whether a folder is there."""
    filesystem_, path = filesystem(location)
    return bool(filesystem_.get_file_info(path).type == fs.FileType.Directory)


def is_file(location: str) -> bool:
    """Return whether a file is there."""
    filesystem_, path = filesystem(location)
    return bool(filesystem_.get_file_info(path).type == fs.FileType.File)


def list_files(location: str, suffix: str = "") -> list[str]:
    """Return the sorted relative paths of all files below a folder that end in `suffix`."""
    filesystem_, path = filesystem(location)
    infos = filesystem_.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    root = path.rstrip("/") + "/"
    return sorted(
        i.path.removeprefix(root)
        for i in infos
        if i.type == fs.FileType.File and i.path.endswith(suffix)
    )


def list_dirs(location: str) -> list[str]:
    """Return the names of the folders directly below a folder; none if it is not there."""
    filesystem_, path = filesystem(location)
    infos = filesystem_.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(i.base_name for i in infos if i.type == fs.FileType.Directory)


def read_bytes(location: str) -> bytes:
    """Return a file's bytes; raises FileNotFoundError as the store does."""
    filesystem_, path = filesystem(location)
    with filesystem_.open_input_file(path) as file:
        return bytes(file.read())


def write_bytes(location: str, content: bytes) -> None:
    """Write a file beside its place and rename it, so that a reader never sees half of it."""
    filesystem_, path = filesystem(location)
    filesystem_.create_dir(os.path.dirname(path), recursive=True)
    beside = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with filesystem_.open_output_stream(beside) as file:
            file.write(content)
        filesystem_.move(beside, path)
    except OSError:  # a full disk, which what was written of the file would fill
        remove_file(f"{location}{beside.removeprefix(path)}")
        raise


def read_json(location: str) -> Any:
    """Return a JSON file's content."""
    return loads_json(read_bytes(location))


def loads_json(content: bytes) -> Any:
    """Return the object that JSON bytes hold; raises ValueError if they are not JSON."""
    return json.loads(content)


def dumps_json(content: object) -> bytes:
    """Return indented JSON with a final newline; NaN and infinity are refused with ValueError."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def write_json(location: str, content: object) -> None:
    """Write `dumps_json` of an object."""
    write_bytes(location, dumps_json(content))


def read_table(location: str, columns: list[str] | None = None) -> pa.Table:
    """Return a Parquet file, or a folder of Parquet files, as one table."""
    filesystem_, path = filesystem(location)
    return pq.read_table(path, filesystem=filesystem_, columns=columns)


def write_table(location: str, table: pa.Table) -> None:
    """Write one Parquet file (zstd) beside its place and rename it."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(location, sink.getvalue().to_pybytes())


def with_run_id(table: pa.Table, run_id: str) -> pa.Table:
    """Return a table that names the run that it is of in the metadata of its Parquet file."""
    return table.replace_schema_metadata({**(table.schema.metadata or {}), "bt_run_id": run_id})


def move_dir(source: str, target: str) -> None:
    """Rename a finished folder into its place; the place must be free."""
    filesystem_, source_path = filesystem(source)
    _, target_path = filesystem(target)
    filesystem_.create_dir(os.path.dirname(target_path), recursive=True)
    if isinstance(filesystem_, fs.LocalFileSystem):
        filesystem_.move(source_path, target_path)
        return
    # Object stores have no folders to rename; files are copied, markers (JSON) last.
    for name in sorted(list_files(source), key=lambda name: name.endswith(".json")):
        filesystem_.copy_file(f"{source_path}/{name}", f"{target_path}/{name}")
    filesystem_.delete_dir(source_path)


def remove_file(location: str) -> None:
    """Delete a file; nothing happens if it is not there."""
    filesystem_, path = filesystem(location)
    if filesystem_.get_file_info(path).type == fs.FileType.File:
        filesystem_.delete_file(path)


def remove_dir(location: str) -> None:
    """Delete a folder and what is below it; nothing happens if it is not there."""
    filesystem_, path = filesystem(location)
    if filesystem_.get_file_info(path).type == fs.FileType.Directory:
        filesystem_.delete_dir(path)


def sha256(content: bytes | memoryview) -> str:
    """Return the SHA-256 of bytes as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def digest_of(content: object) -> str:
    """Return the SHA-256 of a JSON-able object in canonical form (sorted keys, no spaces)."""
    return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def digest_lines(lines: Iterable[str]) -> str:
    """Return the SHA-256 of lines, independent of their order."""
    return sha256("\n".join(sorted(lines)).encode())
