"""Files, local or on any store that pyarrow or fsspec opens; writing never leaves halves.

A location is a local path or a URI such as `s3://bucket/key`.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from bt_core.store_files import again
from bt_core.store_files import open_file as open_file
from bt_core.stores import S3Store
from bt_core.stores import absolute as absolute
from bt_core.stores import filesystem as filesystem
from bt_core.stores import is_uri as is_uri
from bt_core.stores import redact as redact
from bt_core.stores import refuse_secrets as refuse_secrets

_AT_ONCE: Final = 16
"""Requests to a store that wait for one another's answers no longer."""


def join(location: str, *parts: str) -> str:
    """Return a location below another; the query of a URI stays at its end."""
    folder, mark, query = location.partition("?") if is_uri(location) else (location, "", "")
    return "/".join([folder.rstrip("/"), *parts]) + mark + query


def each(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Return what some work on a store gives for each of a few thousand items, several at once."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(work, items))


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

    def read() -> bytes:
        with filesystem_.open_input_file(path) as file:
            return bytes(file.read())

    return again(read)


def write_bytes(location: str, content: bytes) -> None:
    """Write a file beside its place and rename it, so that a reader never sees half of it.

    An S3 store shows no halves by itself.
    """
    filesystem_, path = filesystem(location)
    if isinstance(filesystem_, S3Store):
        with filesystem_.open_output_stream(path, compression=None) as file:
            file.write(content)
        return
    filesystem_.create_dir(os.path.dirname(path), recursive=True)
    beside = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with filesystem_.open_output_stream(beside) as file:
            file.write(content)
        filesystem_.move(beside, path)
    except OSError:  # a full disk, which what was written of the file would fill
        if filesystem_.get_file_info(beside).type == fs.FileType.File:
            filesystem_.delete_file(beside)
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
    return again(lambda: pq.read_table(path, filesystem=filesystem_, columns=columns))


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
    names = list_files(source)
    for is_marker in (False, True):
        chosen = [name for name in names if name.endswith(".json") == is_marker]
        each(lambda n: filesystem_.copy_file(f"{source_path}/{n}", f"{target_path}/{n}"), chosen)
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
