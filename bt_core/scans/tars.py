"""Tar archives: plain ones by random access, compressed ones as a stream from start to end.

A compressed tar cannot be read from its middle. It is listed in one pass, and read in one pass by
`StreamedTar.members`; reading one member alone unpacks all that stand before it.
"""

import gzip
import os
import threading
import weakref
import zlib
from collections.abc import Iterator
from contextlib import closing
from typing import Any, BinaryIO, Final

import zstandard

from bt_core import storage
from bt_core.errors import ScanError, SourceError
from bt_core.scans.faults import fault_of
from bt_core.scans.limits import SMALL_BYTES, Limits, limits
from bt_core.scans.members import (
    CUT,
    GZIP_MAGIC,
    Lister,
    ScanRef,
    check_bytes,
    check_total,
    printable,
    refuse_archive,
)
from bt_core.scans.tar_headers import TarDamage, TarMember, read_header

_CHUNK_BYTES: Final = 1024**2
_STREAM_BUFFER_BYTES: Final = 8 * 1024**2
DAMAGE: Final = (TarDamage, EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)
"""What a damaged archive makes its unpacker or the reading of headers raise."""
_CHANGED: Final = "the archive has changed since it was listed"


class TarSource:
    """An open tar without compression, which several threads may read.

    Args:
        uri: for messages.
        file: opened for reading; closed with this object.
    """

    def __init__(self, uri: str, file: BinaryIO) -> None:
        self._uri, self._file = uri, file
        self._lock = threading.Lock()
        self._size = file.seek(0, os.SEEK_END)
        weakref.finalize(self, file.close)

    def list(self, lister: Lister) -> None:
        """List the members; what follows a damaged header cannot be found, which is counted.

        Raises:
            SourceError: if they are too many or too large together, or it cannot be read.
        """
        total = start = 0
        try:
            while member := self._header(start):
                if not member.is_hidden:
                    lister.add(member.name, member.start)
                total += min(member.size, self._size - member.data) if member.is_file else 0
                check_total(self._uri, total, lister.limits)
                start = member.end
        except TarDamage:
            lister.skipped[CUT] += 1

    def read(self, ref: ScanRef) -> bytes:
        """Return one member's content; its header is read again and must still fit.

        Raises:
            ScanError: with a reason code.
            OSError: if the store cannot be read.
        """
        try:
            member = self._header(ref.position)
        except TarDamage as error:
            raise ScanError("io_error", _CHANGED) from error
        _check_member(ref, member, limits())
        if member is None or member.data + member.size > self._size:
            raise ScanError("member_corrupt", "the archive ends early")
        with self._lock:
            self._file.seek(member.data)
            return self._file.read(member.size)

    def _header(self, start: int) -> TarMember | None:
        if start > self._size:
            raise TarDamage("the archive ends early")
        with self._lock:
            return read_header(self._file, start)


class StreamedTar:
    """A tar.gz or tar.zst, opened anew for each pass.

    Args:
        uri: the archive.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def list(self, lister: Lister) -> None:
        """List the members in one pass over the archive, which also checks that it unpacks.

        Raises:
            SourceError: if they are too many, or unpack to too much (a bomb), or it cannot be read.
        """
        with closing(open_stream(self._uri, lister.limits)) as stream:
            try:
                start = 0
                while member := read_header(stream, start):
                    if not member.is_hidden:
                        lister.add(member.name, member.start)
                    start = member.end
                    stream.seek(start)
                stream.skip_rest()
            except DAMAGE:
                lister.skipped[CUT] += 1

    def members(self) -> Iterator[tuple[ScanRef, bytes | ScanError]]:
        """Yield every listed member with its content, or why it has none, in the archive's order.

        Raises:
            ScanError: `member_corrupt` or `io_error`, if what follows cannot be read.
            StoreError: if that is no fault of the archive (`faults.fault_of`).
        """
        given = limits()
        lister = Lister(self._uri, given)
        try:
            with closing(open_stream(self._uri, given)) as stream:
                start = 0
                while member := read_header(stream, start):
                    start = member.end
                    if member.is_hidden:
                        continue
                    ref = lister.identify(member.name, member.start)
                    if ref is not None:
                        yield ref, _content(stream, ref, member, given)
        except DAMAGE as error:
            raise ScanError("member_corrupt", type(error).__name__) from error
        except (OSError, SourceError) as error:
            raise fault_of(error, self._uri, 0) from error

    def read(self, ref: ScanRef) -> bytes:
        """Return one member's content, unpacking all that stand before it: slow.

        Raises:
            ScanError: with a reason code.
            OSError: if the store cannot be read.
        """
        given = limits()
        with closing(open_stream(self._uri, given)) as stream:
            try:
                member = read_header(stream, ref.position)
            except DAMAGE as error:
                raise ScanError("member_corrupt", type(error).__name__) from error
            content = _content(stream, ref, member, given)
        if isinstance(content, ScanError):
            raise content
        return content


class UnpackedStream:
    """The unpacked bytes of a compressed file, in order, under the limits of a source.

    Args:
        uri: for messages.
        file: the packed file; closed with this object.
        given: total size and ratio that end the reading.
    """

    def __init__(self, uri: str, file: BinaryIO, given: Limits) -> None:
        self._uri, self._file, self._given = uri, file, given
        self._position = 0
        is_gzip = file.read(2) == GZIP_MAGIC
        file.seek(0)
        self._unpacker: Any = (
            gzip.GzipFile(fileobj=file)
            if is_gzip
            else zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        )

    def read(self, size: int, /) -> bytes:
        """Return the next `size` bytes, fewer only at the end.

        Raises:
            SourceError: if the archive unpacks to more than the limits allow.
        """
        chunks = []
        while size > 0 and (chunk := self._unpacker.read(min(size, _CHUNK_BYTES))):
            chunks.append(chunk)
            size -= len(chunk)
            self._position += len(chunk)
            self._check()
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def seek(self, offset: int, /) -> int:
        """Skip to an offset; raises TarDamage if it lies behind or after the end."""
        if offset < self._position:
            raise TarDamage("not in order")
        while self._position < offset:
            if not self.read(min(offset - self._position, _CHUNK_BYTES)):
                raise TarDamage("the archive ends early")
        return offset

    def skip_rest(self) -> None:
        """Read what follows the last member, so that the checksum at the end is checked."""
        while self.read(_CHUNK_BYTES):
            pass

    def close(self) -> None:
        """Close the packed file."""
        self._file.close()

    def _check(self) -> None:
        check_total(self._uri, self._position, self._given)
        packed = max(self._file.tell(), 1)
        if self._position > SMALL_BYTES and self._position > self._given.max_ratio * packed:
            raise SourceError(
                f"{storage.redact(self._uri)} unpacks to over {self._given.max_ratio} times its "
                "size, as a bomb does; set BT_MAX_RATIO to raise the limit"
            )


def open_stream(uri: str, given: Limits) -> UnpackedStream:
    """Open a gzip or Zstandard file; raises OSError if it cannot be opened."""
    filesystem, path = storage.filesystem(uri)
    return UnpackedStream(uri, storage.open_file(filesystem, path, _STREAM_BUFFER_BYTES), given)


def _check_member(ref: ScanRef, member: TarMember | None, given: Limits) -> None:
    if member is None or printable(member.name) != ref.member:
        raise ScanError("io_error", _CHANGED)
    if not member.is_file:
        raise ScanError("unsupported_member")
    check_bytes(member.size, given)


def _content(
    stream: UnpackedStream, ref: ScanRef, member: TarMember | None, given: Limits
) -> bytes | ScanError:
    """Return the content of the member whose header was just read, or why it has none."""
    try:
        _check_member(ref, member, given)
        assert member is not None
        stream.seek(member.data)
        content = stream.read(member.size)
        if len(content) < member.size:
            return ScanError("member_corrupt", "the archive ends early")
        return refuse_archive(content)
    except ScanError as error:
        return error
    except DAMAGE as error:
        return ScanError("member_corrupt", type(error).__name__)
