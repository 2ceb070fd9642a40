"""Zip archives: the directory is read once, members by random access, nothing is trusted.

Sizes that the directory declares are checked against the limits, and hold: `zipfile` never returns
more of a member than its directory entry says.
"""

import io
import os
import stat
import struct
import weakref
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, Final

import numpy as np

from bt_core import storage
from bt_core.errors import BtError, ScanError, SourceError
from bt_core.scans.limits import SMALL_BYTES, Limits, limits
from bt_core.scans.members import Lister, ScanRef, check_bytes, check_total, printable

_METHODS: Final = frozenset(
    {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
)
_AES: Final = 99
_ENCRYPTED, _PATCHED, _STRONGLY_ENCRYPTED = 0x1, 0x20, 0x40
_END, _END_64, _LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_ENTRY = b"PK\x01\x02"
_END_RECORD: Final = "<4s4H2LH"
_TAIL_BYTES: Final = 65_536 + 22 + 20 + 56
"""The end record with the longest comment, and the two zip64 records before it."""
_ENTRY_BYTES: Final = 1024
"""Of one directory entry on average, at most: 46, its name, extra fields and comment."""
_LOCAL_HEADER_BYTES: Final = 30
_UNIX: Final = 3
_PARSED_AT_ONCE: Final = 1000
_HELD: Final = 64
_FACTS: Final = (
    "compress_type", "flag_bits", "CRC", "compress_size", "file_size", "external_attr",
    "create_system", "extra",
)  # fmt: skip


class ZipSource:
    """An open zip archive, which several threads may read.

    Of its directory the bytes are held, about 100 for each member, and parsed by `zipfile` where
    they are needed: its own objects for all members would take seven times as much, in every
    process that reads the archive.

    Args:
        uri: for messages.
        file: opened for reading; closed with this object.

    Raises:
        SourceError: if it is not a zip, or its directory is damaged or has too many entries.
    """

    def __init__(self, uri: str, file: BinaryIO) -> None:
        self._uri = uri
        weakref.finalize(self, file.close)
        with _explained(uri):
            self._directory, self._start, self._shift = _read_directory(uri, file, limits())
            self._entries = _entries(self._directory)
            self._zip = zipfile.ZipFile(_WithoutDirectory(file))
        self._held: tuple[int, Sequence[zipfile.ZipInfo]] = (-1, ())

    def list(self, lister: Lister) -> None:
        """List the members.

        Raises:
            SourceError: if they are too many, unpack to too much, or share bytes (a bomb).
        """
        num = len(self._entries)
        starts_N, ends_N = np.zeros(num, np.int64), np.zeros(num, np.int64)
        total = 0
        with _explained(self._uri):
            for i, info in self._infos():
                starts_N[i] = info.header_offset
                ends_N[i] = info.header_offset + info.compress_size
                total += info.file_size
                if not info.is_dir():
                    lister.add(info.filename, i)
        _refuse_overlap(self._uri, starts_N, ends_N, self._start)
        check_total(self._uri, total, lister.limits)

    def _infos(self) -> Iterator[tuple[int, zipfile.ZipInfo]]:
        for start in range(0, len(self._entries), _PARSED_AT_ONCE):
            yield from enumerate(self._parse(start, start + _PARSED_AT_ONCE), start)

    def _info(self, number: int) -> zipfile.ZipInfo:
        """Return a member's facts; its neighbours', which are mostly asked for next, are kept."""
        start = number - number % _HELD
        held_start, held = self._held
        if start != held_start:
            held = self._parse(start, start + _HELD)
            self._held = start, held
        return held[number - start]

    def _parse(self, start: int, stop: int) -> Sequence[zipfile.ZipInfo]:
        """Return what the directory says of some members, by a zip that has no others."""
        stop = min(stop, len(self._entries))
        end = self._entries[stop] if stop < len(self._entries) else len(self._directory)
        own = self._directory[self._entries[start] : end]
        count = stop - start
        record = struct.pack(_END_RECORD, _END, 0, 0, count, count, len(own), 0, 0)
        with zipfile.ZipFile(io.BytesIO(own + record)) as directory:
            return [_moved(info, self._shift) for info in directory.infolist()]

    def read(self, ref: ScanRef) -> bytes:
        """Return one member's content.

        Raises:
            ScanError: with a reason code.
            OSError: if the store cannot be read.
        """
        if ref.position >= len(self._entries):
            raise ScanError("io_error", "the archive has changed since it was listed")
        with _explained(self._uri):
            info = self._info(ref.position)
        if printable(info.filename) != ref.member:
            raise ScanError("io_error", "the archive has changed since it was listed")
        _check_member(info, limits())
        try:
            with self._zip.open(info) as file:
                return file.read(info.file_size)
        except NotImplementedError as error:
            raise ScanError("archive_method_unsupported") from error
        except OSError:
            raise
        except Exception as error:  # BadZipFile, EOFError, zlib.error, lzma.LZMAError, ...
            raise ScanError("member_corrupt", type(error).__name__) from error


def _check_member(info: zipfile.ZipInfo, given: Limits) -> None:
    if info.header_offset < 0:
        raise ScanError("member_corrupt", "the archive has lost bytes")
    if info.flag_bits & (_ENCRYPTED | _STRONGLY_ENCRYPTED) or info.compress_type == _AES:
        raise ScanError("member_encrypted")
    kind = stat.S_IFMT(info.external_attr >> 16) if info.create_system == _UNIX else 0
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ScanError("unsupported_member", "a link or a device")
    if info.compress_type not in _METHODS or info.flag_bits & _PATCHED:
        raise ScanError("archive_method_unsupported", f"method {info.compress_type}")
    check_bytes(info.file_size, given)
    swells = info.file_size > given.max_ratio * max(info.compress_size, 1)
    if info.file_size > SMALL_BYTES and swells:
        raise ScanError(
            "member_too_large", f"unpacks to over {given.max_ratio} times its size (BT_MAX_RATIO)"
        )


def _refuse_overlap(uri: str, starts_N: np.ndarray, ends_N: np.ndarray, end: int) -> None:
    """Refuse members that share packed bytes, a bomb that Python < 3.11.8 reads (CVE-2024-0450)."""
    order = np.lexsort((ends_N, starts_N))
    following_N = np.append(starts_N[order][1:], end)
    if (ends_N[order] + _LOCAL_HEADER_BYTES > following_N).any():
        raise SourceError(
            f"{storage.redact(uri)} has members that overlap, as in a zip bomb; not opened"
        )


def _read_directory(uri: str, file: BinaryIO, given: Limits) -> tuple[bytes, int, int]:
    """Return the directory, where it begins, and what to add to its offsets of members.

    One too long for the allowed number of members is refused before it is read. The end records are
    in section 4.3.14 to 4.3.16 of the zip specification (APPNOTE.TXT); what stands before a zip, as
    the program of a self-extracting one, shifts it.
    """
    size = file.seek(0, os.SEEK_END)
    base = max(0, size - _TAIL_BYTES)
    file.seek(base)
    tail = file.read(_TAIL_BYTES)
    end = tail.rfind(_END, 0, max(0, len(tail) - 22 + len(_END)))
    if end < 0:
        raise zipfile.BadZipFile("no end record")
    num_bytes, offset = struct.unpack_from("<2L", tail, end + 12)
    end_64 = end - 20 - 56
    if tail[max(0, end - 20) :].startswith(_LOCATOR_64) and tail[max(0, end_64) :].startswith(
        _END_64
    ):
        num_bytes, offset = struct.unpack_from("<2Q", tail, end_64 + 40)
        end = end_64
    if num_bytes > max(given.max_members, 1000) * _ENTRY_BYTES:
        raise SourceError(
            f"{storage.redact(uri)} has a directory of {num_bytes} bytes, which is for more files "
            f"than the limit of {given.max_members}; set BT_MAX_MEMBERS to raise it"
        )
    start = base + end - num_bytes
    if start < 0:
        raise zipfile.BadZipFile("the directory begins before the file")
    file.seek(start)
    return file.read(num_bytes), start, start - offset


def _entries(directory: bytes) -> "array[int]":
    """Return where each entry of a directory begins (section 4.3.12)."""
    found, at = array("q"), 0
    while at < len(directory):
        if len(directory) < at + 46 or not directory.startswith(_ENTRY, at):
            raise zipfile.BadZipFile("a directory entry is damaged")
        found.append(at)
        at += 46 + sum(struct.unpack_from("<3H", directory, at + 28))
    if at > len(directory):
        raise zipfile.BadZipFile("the directory ends early")
    return found


def _moved(info: zipfile.ZipInfo, shift: int) -> zipfile.ZipInfo:
    """Return a member's facts without those that newer Pythons draw from its neighbours."""
    moved = zipfile.ZipInfo(info.orig_filename)
    for name in _FACTS:
        setattr(moved, name, getattr(info, name))
    moved.header_offset = info.header_offset + shift
    return moved


class _WithoutDirectory:
    """An archive as a zip without members, by which `zipfile` opens those that it is told of."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = file.seek(0, os.SEEK_END)
        self._end = struct.pack(_END_RECORD, _END, 0, 0, 0, 0, 0, 0, 0)
        self._position = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size + len(self._end))[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        if self._position >= self._size:
            content = self._end[self._position - self._size :]
            content = content[:size] if size >= 0 else content
        else:
            self._file.seek(self._position)
            left = self._size - self._position
            content = self._file.read(min(size, left) if size >= 0 else left)
        self._position += len(content)
        return content


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Raise SourceError for whatever a damaged directory makes `zipfile` raise."""
    try:
        yield
    except (BtError, OSError):
        raise
    except Exception as error:
        raise SourceError(
            f"{storage.redact(uri)} is not a readable zip archive ({type(error).__name__}); it "
            "may be cut short: copy it again, or repack it"
        ) from error
