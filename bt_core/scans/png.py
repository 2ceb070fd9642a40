"""PNG chunks, read before any native decoder sees them: ISO/IEC 15948."""

import itertools
import struct
import zlib
from collections.abc import Iterator
from typing import Final

from isal import igzip_lib, isal_zlib

from bt_core.errors import ScanError
from bt_core.scans.decoded import check_size

_MAGIC: Final = b"\x89PNG\r\n\x1a\n"
_PLAIN: Final = frozenset(
    b"IHDR PLTE IDAT IEND tRNS bKGD gAMA cHRM sRGB sBIT pHYs tIME tEXt zTXt iTXt".split()
)
"""Chunks of a PNG without EXIF or animation."""
_SAMPLES: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples of a pixel by colour type."""
_MAX_STORED_BYTES: Final = 4 * 1024**2
_MAX_DATA_CHUNKS: Final = 4096
_WORTH_IT: Final = 0.9
"""Share of its size that data is packed to, above which there is little to inflate."""


def plain_size(content: bytes) -> tuple[int, int] | None:
    """Return the width and height of a PNG that has no more than its picture, None for others.

    Raises:
        ScanError: for a size that may not be decoded, and for a chunk longer than the file,
            whatever the PNG: OpenCV would allocate what it claims, up to 4 GB.
    """
    if not content.startswith(_MAGIC) or content[12:16] != b"IHDR":
        return None
    width, height = struct.unpack_from(">II", content.ljust(24, b"\0"), 16)
    if width and height:
        check_size(width, height)
    return (width, height) if {kind for kind, _, _ in _chunks(content)} <= _PLAIN else None


def with_stored_data(content: bytes) -> bytes:
    """Return a plain PNG with the same pixels whose data is stored instead of compressed.

    OpenCV spends most of its time on inflating; ISA-L does that 2.5 times as fast. What is odd
    (damaged, interlaced) is returned as it is, for the decoder to judge, and so is what would not
    gain: pictures over 4 MiB, where copying costs more, and data that is hardly packed.
    """
    try:
        width, height, depth, kind, _, _, interlaced = struct.unpack_from(">IIBBBBB", content, 16)
        num_bytes = height * ((width * depth * _SAMPLES.get(kind, 0) + 7) // 8 + 1)
        if interlaced or num_bytes > _MAX_STORED_BYTES:
            return content
        data_chunks = (chunk[1:] for chunk in _chunks(content) if chunk[0] == b"IDAT")
        spans = list(itertools.islice(data_chunks, _MAX_DATA_CHUNKS + 1))
        is_whole = all(_is_intact(content, start, end) for start, end in spans)
        in_a_row = all(a[1] == b[0] for a, b in itertools.pairwise(spans))
        if not (0 < len(spans) <= _MAX_DATA_CHUNKS and is_whole and in_a_row):
            return content
        packed = b"".join(content[start + 8 : end - 4] for start, end in spans)
        # ISA-L reads beyond the window that a stream states, which zlib refuses.
        window = 1 << (packed[0] >> 4) + 8 if packed else 0
        if window < min(num_bytes, 2**15) or len(packed) > _WORTH_IT * num_bytes:
            return content
        inflater = isal_zlib.decompressobj()
        raw = inflater.decompress(packed, num_bytes)
    except (igzip_lib.IsalError, struct.error, ScanError):  # type: ignore[misc]  # its stub is wrong
        return content
    if len(raw) != num_bytes or not inflater.eof or inflater.unused_data:
        return content
    data = b"IDAT" + zlib.compress(raw, 0)
    length, checksum = (struct.pack(">I", n) for n in (len(data) - 4, isal_zlib.crc32(data)))
    return b"".join([content[: spans[0][0]], length, data, checksum, content[spans[-1][1] :]])


def _chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield each chunk's kind, where it starts and where it ends, up to IEND."""
    kind, position = b"", len(_MAGIC)
    while position < len(content) and kind != b"IEND":
        kind = content[position + 4 : position + 8]
        end = position + int.from_bytes(content[position : position + 4], "big") + 12
        if end > len(content):
            raise ScanError("truncated_image", "a chunk ends behind the file")
        yield kind, position, end
        position = end


def _is_intact(content: bytes, start: int, end: int) -> bool:
    """Return whether a chunk's checksum is right."""
    checksum = int.from_bytes(content[end - 4 : end], "big")
    return bool(isal_zlib.crc32(content[start + 4 : end - 4]) == checksum)
