"""Files, local or on any store that pyarrow opens; writing never leaves halves.

A location is a local path or a URI such as `s3://bucket/key`.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from bt_core.errors import UsageError


def is_uri(location: str) -> bool:
    """Return whether a location has a scheme, as in `s3://bucket/key`."""
    return "://" in location


def absolute(location: str) -> str:
    """Return a URI as it is, and a local path absolute with `~` expanded."""
    return location if is_uri(location) else os.path.abspath(os.path.expanduser(location))


def filesystem(location: str) -> tuple[fs.FileSystem, str]:
    """Return the pyarrow filesystem of a location and the path inside it.

    Raises:
        UsageError: if the scheme is not one that pyarrow opens.
    """
    if not is_uri(location):
        return fs.LocalFileSystem(), absolute(location)
    try:
        filesystem, path = fs.FileSystem.from_uri(location)
    except (pa.ArrowInvalid, ValueError) as error:
        raise UsageError(
            f"cannot open {location}: {error}; use a local path or a URI that pyarrow.fs knows "
            "(s3://, gs://, hdfs://, file://)"
        ) from error
    return filesystem, path


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
    with filesystem_.open_output_stream(beside) as file:
        file.write(content)
    filesystem_.move(beside, path)


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
