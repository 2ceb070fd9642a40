"""Zip archives: the directory is read once, members by random access, nothing is trusted.

Sizes that the directory declares are checked against the limits, and hold: `zipfile` never returns
more of a member than its directory entry says.
"""

import itertools
import os
import stat
import struct
import weakref
import zipfile
from typing import BinaryIO, Final

from bt_core import storage
from bt_core.errors import ScanError, SourceError
from bt_core.scans.limits import SMALL_BYTES, Limits, limits
from bt_core.scans.members import Lister, ScanRef, check_bytes, check_total, printable

_METHODS: Final = frozenset(
    {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
)
_AES: Final = 99
_ENCRYPTED, _PATCHED, _STRONGLY_ENCRYPTED = 0x1, 0x20, 0x40
_END, _END_64, _LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_TAIL_BYTES: Final = 65_536 + 22 + 20 + 56
"""The end record with the longest comment, and the two zip64 records before it."""
_ENTRY_BYTES: Final = 1024
"""Of one directory entry on average, at most: 46, its name, extra fields and comment."""
_LOCAL_HEADER_BYTES: Final = 30
_UNIX: Final = 3


class ZipSource:
    """An open zip archive, which several threads may read.

    Args:
        uri: for messages.
        file: opened for reading; closed with this object.

    Raises:
        SourceError: if it is not a zip, or its directory is damaged or has too many entries.
    """

    def __init__(self, uri: str, file: BinaryIO) -> None:
        self._uri = uri
        weakref.finalize(self, file.close)
        try:
            _check_directory(uri, file, limits())
            self._zip = zipfile.ZipFile(file)
        except SourceError:
            raise
        except Exception as error:  # a damaged directory makes zipfile raise many types
            raise SourceError(
                f"{storage.redact(uri)} is not a readable zip archive ({type(error).__name__}); it "
                "may be cut short: copy it again, or repack it"
            ) from error
        self._infos = self._zip.infolist()

    def list(self, lister: Lister) -> None:
        """List the members.

        Raises:
            SourceError: if they are too many, unpack to too much, or share bytes (a bomb).
        """
        _refuse_overlap(self._uri, self._infos, self._zip.start_dir)
        check_total(self._uri, sum(info.file_size for info in self._infos), lister.limits)
        for i, info in enumerate(self._infos):
            if not info.is_dir():
                lister.add(info.filename, i)

    def read(self, ref: ScanRef) -> bytes:
        """Return one member's content.

        Raises:
            ScanError: with a reason code.
            OSError: if the store cannot be read.
        """
        info = self._infos[ref.position] if ref.position < len(self._infos) else None
        if info is None or printable(info.filename) != ref.member:
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


def _refuse_overlap(uri: str, infos: list[zipfile.ZipInfo], end: int) -> None:
    """Refuse members that share packed bytes, a bomb that Python < 3.11.8 reads (CVE-2024-0450)."""
    spans = sorted((i.header_offset, i.header_offset + i.compress_size) for i in infos)
    for (_, data_end), (following, _) in itertools.pairwise([*spans, (end, end)]):
        if data_end + _LOCAL_HEADER_BYTES > following:
            raise SourceError(
                f"{storage.redact(uri)} has members that overlap, as in a zip bomb; not opened"
            )


def _check_directory(uri: str, file: BinaryIO, given: Limits) -> None:
    """Refuse a directory too long for the allowed number of members, before parsing it.

    The end records are in section 4.3.14 to 4.3.16 of the zip specification (APPNOTE.TXT).
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL_BYTES))
    tail = file.read(_TAIL_BYTES)
    end = tail.rfind(_END)
    if end < 0 or len(tail) < end + 22:
        raise zipfile.BadZipFile("no end record")
    (num_bytes,) = struct.unpack_from("<L", tail, end + 12)
    end_64 = tail.rfind(_END_64, 0, end)
    if tail[max(0, end - 20) :].startswith(_LOCATOR_64) and 0 <= end_64 <= end - 76:
        (num_bytes,) = struct.unpack_from("<Q", tail, end_64 + 40)
    if num_bytes > max(given.max_members, 1000) * _ENTRY_BYTES:
        raise SourceError(
            f"{storage.redact(uri)} has a directory of {num_bytes} bytes, which is for more files "
            f"than the limit of {given.max_members}; set BT_MAX_MEMBERS to raise it"
        )
