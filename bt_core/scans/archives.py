"""Scan sources: folders, archives, lists and single files, listed once and read member by member.

Nothing is ever unpacked to disk, so member names are data and cannot escape (zip slip). Sizes that
an archive declares are never trusted for memory: members are read with a hard cap.
"""

import os
import posixpath
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import lru_cache
from typing import Final

from pyarrow import fs

from bt_core import storage
from bt_core.errors import BtError, ScanError, SourceError, UsageError
from bt_core.scans.faults import fault_of
from bt_core.scans.folders import add_file, list_folder, read_file
from bt_core.scans.limits import limits
from bt_core.scans.members import (
    GZIP_MAGIC,
    OTHER_ARCHIVE_MAGIC,
    TAR_BLOCK,
    ZIP_MAGIC,
    ZSTD_MAGIC,
    Lister,
    Listing,
    ScanRef,
    is_tar_header,
    refuse_archive,
)
from bt_core.scans.scan_lists import SUFFIXES, read_list
from bt_core.scans.tars import DAMAGE, StreamedTar, TarSource, open_stream
from bt_core.scans.zips import ZipSource
from bt_core.store_errors import FileFault, refuse_away

__all__ = [
    "Archive",
    "Listing",
    "ScanRef",
    "list_scans",
    "open_archive",
    "read_member",
    "stream_members",
]

Archive = ZipSource | TarSource | StreamedTar
_STREAMED_SUFFIXES: Final = (".tar.gz", ".tgz", ".tar.zst", ".tzst")
_OTHER_SUFFIXES: Final = (".7z", ".rar", ".bz2", ".tbz2", ".xz", ".txz")
_REMEMBERED_SECONDS: Final = 30
"""How long a remote archive is taken to be the same without asking its store again."""


def list_scans(
    source: str, hash_key: bytes | None = None, sink: Callable[[ScanRef], None] | None = None
) -> Listing:
    """List the scans of a source without decoding them.

    A source is a folder, an archive (zip, tar, tar.gz, tar.zst), a list (CSV, TSV, Parquet; see
    `scan_lists`) or a single file, on a local disk or at a URI. Hidden and system files, and files
    whose suffix says that they are text or tables, are skipped and counted, except in a list.
    Every other file becomes a scan, also one that will turn out not to be a picture.

    Args:
        source: path or URI.
        hash_key: key for the hashes that stand for a list's patients; None leaves them out.
        sink: takes each ref as it is found, for sources of any size; the listing then holds none.

    Raises:
        SourceError: if the source is missing, of another kind, empty, over the limits, or a zip
            whose members overlap (a bomb), or a list of which a row holds a secret.
        UsageError: if the URI cannot be opened, or holds a secret (`storage.refuse_secrets`).
    """
    storage.refuse_secrets(source)
    source = storage.absolute(source)
    lister = Lister(source, limits(), sink)
    try:
        filesystem, path = storage.filesystem(source)
        kind = filesystem.get_file_info(path).type
        if kind == fs.FileType.NotFound:
            or_away = ", or cannot be reached" if storage.is_uri(source) else ""
            raise SourceError(
                f"{storage.redact(source)} does not exist{or_away}; give a folder, an archive "
                "(zip, tar), a list (CSV, Parquet) or a scan file"
            )
        _list(lister, kind, hash_key)
    except BtError:
        raise
    except Exception as error:  # a store's own errors
        refuse_away(error)
        why = error if isinstance(error, FileFault) else type(error).__name__
        raise SourceError(f"{storage.redact(source)} cannot be read: {why}") from error
    return lister.listing(source)


def read_member(ref: ScanRef) -> bytes:
    """Return the bytes of one scan, at most `Limits.max_member_bytes`.

    From a tar.gz or tar.zst, all members before it are unpacked; `stream_members` gives them all.

    Raises:
        ScanError: `io_error`, `member_encrypted`, `member_too_large`, `member_corrupt`,
            `unsupported_member`, `archive_method_unsupported` or `nested_archive`.
        StoreError: if that is no fault of the scan (`faults.fault_of`).
    """
    try:
        if ref.position < 0:
            return refuse_archive(read_file(ref))
        archive = open_archive(ref.uri)
        if archive is None:
            raise ScanError("io_error", "the archive has changed since it was listed")
        return refuse_archive(archive.read(ref))
    except (OSError, UsageError) as error:
        raise fault_of(error, ref.uri, ref.position) from error


def stream_members(uri: str) -> Iterator[tuple[ScanRef, bytes | ScanError]]:
    """Yield every scan of a tar.gz or tar.zst with its content, or why it has none, in one pass.

    Raises:
        ScanError: `member_corrupt` or `io_error`, if what follows cannot be read.
        StoreError: if that is no fault of the archive (`faults.fault_of`).
    """
    try:
        archive = open_archive(uri)
    except (OSError, UsageError) as error:
        raise fault_of(error, uri, 0) from error
    if not isinstance(archive, StreamedTar):
        raise ScanError("io_error", "the archive has changed since it was listed")
    yield from archive.members()


def open_archive(uri: str) -> Archive | None:
    """Open an archive, once per process and version of the file; None if it is not an archive.

    Raises:
        SourceError: if it is an archive that cannot be read.
        OSError: if it is not there.
    """
    filesystem, path = storage.filesystem(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        info = os.stat(path)
        return _open_version(uri, (info.st_size, info.st_mtime_ns, info.st_ino))
    return _open_version(uri, _remote_version(uri, int(time.monotonic() / _REMEMBERED_SECONDS)))


@lru_cache(maxsize=16)
def _remote_version(uri: str, _interval: int) -> tuple[int, ...]:
    filesystem, path = storage.filesystem(uri)
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(path)
    return (info.size or 0, info.mtime_ns or 0)


@lru_cache(maxsize=4)
def _open_version(uri: str, _version: tuple[int, ...]) -> Archive | None:
    """Tell the kind by the content; the name only decides what is said of a damaged file."""
    name = uri.lower()
    filesystem, path = storage.filesystem(uri)
    file = storage.open_file(filesystem, path)
    head = file.read(TAR_BLOCK)
    if head.startswith(ZIP_MAGIC) or name.endswith(".zip"):
        return ZipSource(uri, file)
    if is_tar_header(head) or (name.endswith(".tar") and len(head) == TAR_BLOCK and not any(head)):
        return TarSource(uri, file)
    file.close()
    if head.startswith((GZIP_MAGIC, ZSTD_MAGIC)):
        block = _first_block(uri)
        if is_tar_header(block) or (name.endswith(_STREAMED_SUFFIXES) and block and not any(block)):
            return StreamedTar(uri)
    is_other = head.startswith(OTHER_ARCHIVE_MAGIC) or name.endswith(_OTHER_SUFFIXES)
    if is_other or name.endswith((".tar", *_STREAMED_SUFFIXES)):
        raise SourceError(
            f"{storage.redact(uri)} is not a readable archive; repack it as zip, tar, tar.gz or "
            "tar.zst"
        )
    return None


def _first_block(uri: str) -> bytes:
    with closing(open_stream(uri, limits())) as stream:
        try:
            return stream.read(TAR_BLOCK)
        except DAMAGE:
            return b""


def _list(lister: Lister, kind: fs.FileType, hash_key: bytes | None) -> None:
    source = lister.uri
    if kind == fs.FileType.Directory:
        return list_folder(lister)
    if kind != fs.FileType.File:
        raise SourceError(f"{source} is neither a folder nor a regular file")
    if source.lower().endswith(SUFFIXES):
        return read_list(lister, hash_key)
    archive = open_archive(source)
    if archive is not None:
        return archive.list(lister)
    lister.uri, name = posixpath.split(source)
    add_file(lister, name)
    return None
