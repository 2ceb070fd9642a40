"""PNG, JPEG, BMP, TIFF and WebP become grey images.

OpenCV decodes after Pillow has read the header only; torchvision is never used (it segfaults on
damaged PNGs).
"""

import io
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from PIL import BmpImagePlugin, Image, TiffImagePlugin, UnidentifiedImageError

from bt_core.errors import ScanError
from bt_core.scans.codestream import decode_with_opencv, jpeg_ends_early, jpeg_header
from bt_core.scans.decoded import MAX_FRAME_BYTES, DecodedScan, check_bytes, check_size
from bt_core.scans.intensity import coloured_share, scale_by_percentiles
from bt_core.scans.png import plain_size, with_stored_data

_PILLOW_FORMATS: Final = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
_EXIF_ORIENTATION: Final = 0x0112
_TIFF_BITS: Final = 258
_TIFF_PHOTOMETRIC: Final = 262
_TIFF_SAMPLES: Final = 277
_TIFF_TILE: Final = (322, 323)
_TIFF_MAGIC: Final = (b"II*\0", b"MM\0*")
_JPEG_MAGIC: Final = b"\xff\xd8\xff"
_PLAIN_JPEG: Final = frozenset({0xC0, 0xC1, 0xC4, 0xDB, 0xDD, 0xE0, 0xEE, 0xFE})
"""Markers of a sequential JPEG without EXIF or a second picture."""


@dataclass(frozen=True)
class _Header:
    """What a picture's header says. `pillow` is the opened picture, None for a plain one."""

    format: str
    width: int
    height: int
    mode: str
    progressive: bool = False
    orientation: int = 1
    white_is_zero: bool = False
    pillow: Image.Image | None = None


def decode(content: bytes) -> DecodedScan:
    """Decode a picture of one page.

    Raises:
        ScanError: with a reason code.
    """
    header = _open_plain_jpeg(content) or _open_plain_png(content) or _open(content)
    image = _read_pixels(content, header)
    if image is None:
        raise ScanError(_damage(content))
    if image.shape[:2] != (header.height, header.width):
        raise ScanError("corrupt_image", "decoded size differs from the header")
    bit_depth = image.dtype.itemsize * 8
    steps: list[str] = []
    image_HW, coloured = _grey(image, steps)
    if header.white_is_zero and image_HW.dtype == np.uint16:  # OpenCV inverts 8 bits only
        image_HW = 65535 - image_HW
        steps.append("white-is-zero inverted")
    if image_HW.dtype != np.uint8:
        image_HW = scale_by_percentiles(image_HW, steps)
    turn = _EXIF_TRANSFORMS.get(header.orientation)
    if turn is not None and header.format != "TIFF":  # OpenCV turned TIFF upright
        image_HW = turn(image_HW)
        steps.append(f"EXIF orientation {header.orientation}")
    image_HW = np.ascontiguousarray(image_HW)
    return DecodedScan(image_HW, header.format, bit_depth, tuple(steps), coloured=coloured)


def _open_plain_jpeg(content: bytes) -> _Header | None:
    """Read the header of a JPEG that has no more than its picture: the common case, made fast."""
    if not content.startswith(_JPEG_MAGIC):
        return None
    try:
        header = jpeg_header(content)
    except ScanError:
        return None
    if not header.markers <= _PLAIN_JPEG or header.precision != 8 or header.components == 4:
        return None
    check_size(header.width, header.height)
    return _Header("JPEG", header.width, header.height, "")


def _open_plain_png(content: bytes) -> _Header | None:
    size = plain_size(content)
    return _Header("PNG", *size, "") if size else None


def _open(content: bytes) -> _Header:
    """Read the header by Pillow, and refuse by what it says."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":  # Pillow allocates as it opens one
        width, height = _webp_size(content) if len(content) >= 30 else (0, 0)
        if not width or not height:
            raise ScanError("corrupt_image", "no WebP picture chunk")
        check_size(width, height)
    Image.MAX_IMAGE_PIXELS = None  # check_size has a lower limit, and does not warn
    try:
        header = Image.open(io.BytesIO(content), formats=_PILLOW_FORMATS)
    except (UnidentifiedImageError, SyntaxError, OSError):
        raise _header_fault(content) from None
    check_size(*header.size)
    if getattr(header, "is_animated", False):
        raise ScanError("multi_frame")
    if header.format == "PNG" and "exif" not in header.info and b"eXIf" not in content:
        tags = Image.Image.getexif(header)  # PNG's own decodes the picture, to look behind it
    else:
        tags = header.getexif()
    if header.format == "TIFF":
        _check_tiff_bytes(header.size, tags)
    return _Header(
        "JPEG" if header.format == "MPO" else str(header.format),
        *header.size,
        header.mode,
        bool(header.info.get("progressive")),
        tags.get(_EXIF_ORIENTATION, 1),
        header.format == "TIFF" and tags.get(_TIFF_PHOTOMETRIC) == 0,
        header,
    )


def _check_tiff_bytes(size: tuple[int, int], tags: Image.Exif) -> None:
    """Hold what a TIFF's tags make a decoder allocate, for the picture and for a tile, to a limit.

    The other formats have 8 bytes a pixel at most.
    """
    bits = np.ravel(tags.get(_TIFF_BITS, 1)).tolist()
    num_bits = max(sum(bits), bits[0] * int(tags.get(_TIFF_SAMPLES, 1)))
    tile = [int(tags.get(tag, 0)) for tag in _TIFF_TILE]
    pixels = max(size[0] * size[1], tile[0] * tile[1])
    check_bytes(pixels * num_bits // 8, MAX_FRAME_BYTES, "the picture")


def _read_pixels(content: bytes, header: _Header) -> np.ndarray | None:
    """Return (H, W) or (H, W, C) in OpenCV's channel order, None if the data is damaged."""
    if header.format == "TIFF" and header.mode == "RGBA":  # OpenCV multiplies it by alpha
        return np.asarray(header.pillow)[:, :, [2, 1, 0, 3]]
    is_plain_png = header.format == "PNG" and header.pillow is None
    image = decode_with_opencv(with_stored_data(content) if is_plain_png else content)
    if header.format != "JPEG" or image is None:
        return image
    # What libjpeg makes up in a sequential colour or grey picture is middle grey to its end.
    other_kind = header.progressive or header.mode == "CMYK"
    if (other_kind or (image[-1, -1] == 128).all()) and jpeg_ends_early(content, image):
        raise ScanError("truncated_image", "JPEG data ends before its end marker")
    return image


_EXIF_TRANSFORMS: Final = {
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.T,
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).T,
    8: lambda image: np.rot90(image, 1),
}


def _grey(image: np.ndarray, steps: list[str]) -> tuple[np.ndarray, float]:
    """Return the grey image, and the share of its pixels that had a colour."""
    if image.ndim == 2:
        return image, 0.0
    if image.shape[2] == 4:
        steps.append("alpha dropped")
        image = image[:, :, :3]
    elif image.shape[2] == 2:
        steps.append("alpha dropped")
        return image[:, :, 0], 0.0
    if image.shape[2] == 1:
        return image[:, :, 0], 0.0
    steps.append("colour to grey")
    image = np.ascontiguousarray(image)
    is_whole = image.dtype.kind == "u"
    full = float(np.iinfo(image.dtype).max if is_whole else np.nanmax(image, initial=0.0))
    grey: np.ndarray = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    return grey, coloured_share(image, full)


def _webp_size(content: bytes) -> tuple[int, int]:
    """Return the size that the first chunk states, (0, 0) if it is none: RFC 9649, 2.5 to 2.7."""
    kind, head = content[12:16], content[20:30]
    if kind == b"VP8X":
        return _little(head[4:7]) + 1, _little(head[7:10]) + 1
    if kind == b"VP8L":
        bits = _little(head[1:5])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return _little(head[6:8]) & 0x3FFF, _little(head[8:10]) & 0x3FFF
    return 0, 0


def _little(digits: bytes) -> int:
    return int.from_bytes(digits, "little")


def _header_fault(content: bytes) -> ScanError:
    """Tell a damaged picture (right magic bytes) from a whole one, or a file, of another kind."""
    try:
        if content.startswith(_TIFF_MAGIC):
            TiffImagePlugin.TiffImageFile(io.BytesIO(content))
        elif content.startswith(b"BM"):
            BmpImagePlugin.BmpImageFile(io.BytesIO(content))
        elif content.startswith(_JPEG_MAGIC) and (bits := jpeg_header(content).precision) != 8:
            return ScanError("unsupported_type", f"JPEG with {bits} bits")
    except (SyntaxError, OSError) as error:
        if "unknown" in str(error) or "nsupported" in str(error):
            return ScanError("unsupported_type", "layout of the pixels")
    known = (b"\x89PNG", _JPEG_MAGIC, b"BM", *_TIFF_MAGIC)
    webp = content[:4] == b"RIFF" and content[8:12] == b"WEBP"
    damaged = content.startswith(known) or webp
    return ScanError("corrupt_image" if damaged else "unsupported_type")


def _damage(content: bytes) -> str:
    """Say whether a picture that OpenCV refused ends early or is damaged, by Pillow's complaint."""
    try:
        Image.open(io.BytesIO(content), formats=_PILLOW_FORMATS).load()
    except OSError as error:
        return "truncated_image" if "truncated" in str(error) else "corrupt_image"
    except Exception:
        return "corrupt_image"
    return "corrupt_image"
