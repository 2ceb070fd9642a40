"""Sizes that a compressed picture states of itself, read before any native decoder sees it.

A native decoder allocates by the codestream, whatever the file around it says.
"""

from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np

from bt_core.errors import ScanError

_JPEG_SOF: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}  # F7 is JPEG-LS
_SOS: Final = 0xDA
_J2K_START: Final = b"\xff\x4f\xff\x51"
_JP2_SIGNATURE: Final = b"\0\0\0\x0cjP  "
_FILLER: Final = bytes(range(255)) * 2
"""Stands for any Huffman-coded data: long, varied, without a marker, nor one with an FF before."""


@dataclass(frozen=True)
class FrameHeader:
    """What a codestream says before its data.

    Attributes:
        width: in pixels.
        height: in pixels.
        components: 1 for grey, 3 for colour, 4 for CMYK.
        precision: bits of a component.
        markers: of a JPEG, the segments in front of the first scan, by their second byte.
        scan: of a JPEG, where the first scan's marker stands; -1 if there is none.
    """

    width: int
    height: int
    components: int
    precision: int
    markers: frozenset[int] = frozenset()
    scan: int = -1


def jpeg_header(content: bytes) -> FrameHeader:
    """Read a JPEG's or JPEG-LS's frame header: ITU-T T.81 B.2.2, T.87 C.2.2.

    Raises:
        ScanError: `corrupt_image` if there is none before the first scan.
    """
    frame = b""
    markers: set[int] = set()
    position = 2
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == _SOS:
            break
        if marker in _JPEG_SOF:
            frame = content[position + 4 : position + 10]
        markers.add(marker)
        position += 2 + _big(content[position + 2 : position + 4])
    if len(frame) < 6 or not content.startswith(b"\xff\xd8"):
        raise ScanError("corrupt_image", "no JPEG frame header")
    at_scan = content[position : position + 2] == bytes((0xFF, _SOS))
    height, width = _big(frame[1:3]), _big(frame[3:5])
    scan = position if at_scan else -1
    return FrameHeader(width, height, frame[5], frame[0], frozenset(markers), scan)


def jpeg_2000_header(content: bytes) -> FrameHeader:
    """Read a JPEG 2000 codestream's SIZ segment, bare or inside JP2 boxes: ITU-T T.800 A.5.1.

    Raises:
        ScanError: `corrupt_image` if there is none.
    """
    start = _jp2_codestream(content) if content.startswith(_JP2_SIGNATURE) else 0
    siz = content[start + 4 : start + 43]
    if content[start : start + 4] != _J2K_START or len(siz) < 39:
        raise ScanError("corrupt_image", "no JPEG 2000 image size")
    right, bottom, left, top = (_big(siz[4 + 4 * i : 8 + 4 * i]) for i in range(4))
    return FrameHeader(right - left, bottom - top, _big(siz[36:38]), (siz[38] & 0x7F) + 1)


def _jp2_codestream(content: bytes) -> int:
    """Return where the contents of the first `jp2c` box start: T.800 I.4."""
    position = 0
    while position + 8 <= len(content):
        length, kind = _big(content[position : position + 4]), content[position + 4 : position + 8]
        if kind == b"jp2c":
            return position + (16 if length == 1 else 8)
        if length < 8:  # an extended or open length, which small boxes have no use for
            break
        position += length
    return len(content)


def _big(digits: bytes) -> int:
    return int.from_bytes(digits, "big")


def jpeg_ends_early(content: bytes, image: np.ndarray | None) -> bool:
    """Return whether a JPEG's data ends before its end marker, as after a cut that was patched up.

    libjpeg then makes up the rest (grey, or blurred in a progressive picture) and OpenCV shows it
    as if it were whole. Data put in front of the end marker is passed over by a decoder that has
    all it needs, and changes the picture of one that has not. Costs one more decode. (Callers that
    look for made-up pixels first miss a cut in the very last block.)

    Args:
        content: the file.
        image: what `decode_with_opencv` made of it.
    """
    scan = jpeg_header(content).scan
    end = content.find(b"\xff\xd9", scan)
    if scan < 0 or end < 0:
        return True
    longer = decode_with_opencv(content[:end] + _FILLER + content[end:])
    return image is None or longer is None or not np.array_equal(image, longer)


def decode_with_opencv(content: bytes) -> np.ndarray | None:
    """Return a picture as OpenCV decodes it unchanged, None if it cannot."""
    image: np.ndarray | None = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    return image
