"""Scan sources: a folder, a zip archive or one file, listed once and read member by member.

Nothing is ever unpacked to disk, so member names are data and cannot escape (zip slip). Sizes that
an archive declares are never trusted for memory: members are read with a hard cap.
"""

import hashlib
import io
import itertools
import os
import posixpath
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from pyarrow import fs

from bt_core import storage
from bt_core.errors import ScanError, SourceError

MAX_MEMBERS: Final = 100_000
MAX_MEMBER_BYTES: Final = 512 * 1024**2
MAX_RATIO: Final = 200
"""Unpacked over packed size above which a member larger than 1 MiB counts as a bomb."""
_SMALL_BYTES: Final = 1024**2

_SYSTEM_NAMES: Final = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
_OTHER_SUFFIXES: Final = frozenset(
    [
        ".txt",
        ".csv",
        ".tsv",
        ".md",
        ".json",
        ".xml",
        ".html",
        ".htm",
        ".pdf",
        ".yaml",
        ".yml",
        ".ini",
        ".log",
        ".py",
        ".ipynb",
        ".mat",
        ".xls",
        ".xlsx",
        ".doc",
        ".docx",
        ".db",
        ".sha256",
        ".md5",
    ]
)


@dataclass(frozen=True)
class ScanRef:
    """One file of a source.

    Attributes:
        scan_id: 20 hexadecimal digits, from the member's name and its occurrence among equal names;
            the same wherever the source is copied to.
        uri: the folder or archive.
        member: path inside it, with forward slashes.
        position: index in the archive's directory (-1 in a folder), which tells equal names apart.
    """

    scan_id: str
    uri: str
    member: str
    position: int


@dataclass(frozen=True)
class Listing:
    """What a source holds: scans, and how many other files were passed over and why."""

    refs: list[ScanRef]
    skipped: dict[str, int] = field(default_factory=dict)


def list_scans(source: str) -> Listing:
    """List the scans of a folder, a zip archive or a single file, without reading their content.

    Hidden and system files, and files whose suffix says that they are text or tables, are skipped
    and counted. Every other file becomes a scan, also one that will turn out not to be a picture.

    Raises:
        SourceError: if the source is missing, is not a folder, zip or file, is empty, has too many
            members, or is a zip whose members overlap (a bomb).
    """
    source = storage.absolute(source)
    filesystem, path = storage.filesystem(source)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.NotFound:
        raise SourceError(f"{source} does not exist; give a folder, a zip archive or an image file")
    if kind == fs.FileType.Directory:
        try:
            return _listing(source, [(name, -1) for name in storage.list_files(source)])
        except UnicodeDecodeError:
            raise SourceError(f"{source} holds a file name that is not UTF-8; rename it") from None
    if not _is_zip(source):
        if source.lower().endswith((".zip", ".tar", ".gz", ".tgz", ".zst", ".7z", ".rar")):
            raise SourceError(f"{source} is not a readable zip archive; repack it as zip")
        folder, name = posixpath.split(source)
        return _listing(folder, [(name, -1)])
    infos = _open_zip(source).infolist()
    _refuse_overlap(source, infos)
    return _listing(
        source, [(info.filename, i) for i, info in enumerate(infos) if not info.is_dir()]
    )


def read_member(ref: ScanRef) -> bytes:
    """Return the bytes of one scan, at most `MAX_MEMBER_BYTES`.

    Raises:
        ScanError: `io_error`, `member_encrypted`, `member_too_large` or `member_corrupt`.
    """
    if ref.position < 0:
        return _read_file(storage.join(ref.uri, ref.member))
    try:
        archive = _open_zip(ref.uri)
        info = archive.infolist()[ref.position]
        if printable(info.filename) != ref.member:
            raise ScanError("io_error", "the archive has changed since it was listed")
        if info.flag_bits & 0x1:
            raise ScanError("member_encrypted")
        if info.file_size > 1024**2 and info.file_size > MAX_RATIO * max(info.compress_size, 1):
            raise ScanError("member_too_large", f"unpacks to over {MAX_RATIO} times its size")
        with archive.open(info) as file:
            return _capped(file.read(MAX_MEMBER_BYTES + 1))
    except ScanError:
        raise
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise ScanError("member_corrupt", type(error).__name__) from error
    except (OSError, SourceError, IndexError) as error:
        raise ScanError("io_error", type(error).__name__) from error
    except Exception as error:  # zlib.error, lzma.LZMAError: whatever a decompressor raises
        raise ScanError("member_corrupt", type(error).__name__) from error


def printable(name: str) -> str:
    """Return a member's name as valid Unicode, which Parquet and JSON need."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _listing(uri: str, names: list[tuple[str, int]]) -> Listing:
    refs: list[ScanRef] = []
    skipped: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for name, position in names:
        reason = _skip_reason(name)
        if reason:
            skipped[reason] += 1
            continue
        digest = hashlib.sha256(f"{name}\0{seen[name]}".encode("utf-8", "surrogateescape"))
        seen[name] += 1
        refs.append(ScanRef(digest.hexdigest()[:20], uri, printable(name), position))
    if not refs:
        also = f" (skipped: {dict(skipped)})" if skipped else ""
        raise SourceError(
            f"{uri} holds no scans{also}; looked for PNG, JPEG, BMP, TIFF, WebP and DICOM files"
        )
    if len(refs) > MAX_MEMBERS:
        raise SourceError(f"{uri} holds {len(refs)} files, over the limit of {MAX_MEMBERS}")
    return Listing(refs, dict(skipped))


def _skip_reason(name: str) -> str:
    parts = [part for part in name.replace("\\", "/").split("/") if part not in (".", "..")]
    if any(part.startswith(".") or part.lower() in _SYSTEM_NAMES for part in parts):
        return "system file"
    return "not a scan" if os.path.splitext(name)[1].lower() in _OTHER_SUFFIXES else ""


def _is_zip(source: str) -> bool:
    """Tell by the end record, which stands in the last 64 KiB of every zip."""
    try:
        return zipfile.is_zipfile(io.BytesIO(_tail(source, 70_000)))
    except OSError as error:
        raise SourceError(f"{source} cannot be read: {type(error).__name__}") from error


def _tail(source: str, num_bytes: int) -> bytes:
    filesystem, path = storage.filesystem(source)
    with filesystem.open_input_file(path) as file:
        file.seek(max(0, file.size() - num_bytes))
        return bytes(file.read(num_bytes))


def _open_zip(source: str) -> zipfile.ZipFile:
    """Open an archive once per process and version of the file."""
    filesystem, path = storage.filesystem(source)
    info = filesystem.get_file_info(path)
    if info.type != fs.FileType.File:
        raise SourceError(f"{source} is not there any more")
    return _open_zip_version(source, info.size, info.mtime_ns)


@lru_cache(maxsize=2)
def _open_zip_version(source: str, size: int, mtime_ns: int) -> zipfile.ZipFile:
    filesystem, path = storage.filesystem(source)
    try:
        if size < _SMALL_BYTES:  # pyarrow's files refuse a seek to before their start
            return zipfile.ZipFile(io.BytesIO(_tail(source, _SMALL_BYTES)))
        return zipfile.ZipFile(io.BufferedReader(filesystem.open_input_file(path)))
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise SourceError(f"{source} is not a readable zip archive: {error}") from error


def _refuse_overlap(source: str, infos: list[zipfile.ZipInfo]) -> None:
    """Refuse members that share packed bytes, a bomb that Python < 3.11.8 reads (CVE-2024-0450)."""
    ordered = sorted(infos, key=lambda info: info.header_offset)
    for first, second in itertools.pairwise(ordered):
        if first.header_offset + 30 + first.compress_size > second.header_offset:
            raise SourceError(f"{source} has members that overlap, as in a zip bomb; not opened")


def _read_file(location: str) -> bytes:
    filesystem, path = storage.filesystem(location)
    try:
        with filesystem.open_input_file(path) as file:
            return _capped(bytes(file.read(MAX_MEMBER_BYTES + 1)))
    except OSError as error:
        raise ScanError("io_error", type(error).__name__) from error


def _capped(content: bytes) -> bytes:
    if len(content) > MAX_MEMBER_BYTES:
        raise ScanError("member_too_large", f"over {MAX_MEMBER_BYTES // 1024**2} MiB")
    return content
