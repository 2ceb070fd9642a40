"""Bytes become a grey image: the one place where pictures are decoded.

Order of checks: size, magic bytes, header dimensions, decode, signal. Pictures are decoded by
OpenCV after Pillow has read the header only; torchvision is never used (it segfaults on damaged
PNGs).
"""

import io
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from bt_core.errors import ScanError
from bt_core.scans import dicom
from bt_core.scans.intensity import to_uint8

MAX_PIXELS: Final = 40_000_000
MIN_SIDE_PX: Final = 32
MAX_SIDE_PX: Final = 16_384

_PILLOW_FORMATS: Final = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
_EXIF_ORIENTATION: Final = 0x0112
_TIFF_PHOTOMETRIC: Final = 262


@dataclass(frozen=True)
class DecodedScan:
    """A decoded scan and what was done to get it.

    Attributes:
        image_HW: uint8 grey image, 0 dark to 255 bright.
        format: `PNG`, `JPEG`, `BMP`, `TIFF`, `WEBP` or `DICOM`, from the content, not the name.
        bit_depth: bits of one stored sample.
        steps: what was applied, in order, for example `colour to grey`.
    """

    image_HW: np.ndarray
    format: str
    bit_depth: int
    steps: tuple[str, ...]


def decode_scan(content: bytes, hint: str = "") -> DecodedScan:
    """Decode one scan file.

    Colour becomes grey by the ITU-R BT.601 weights, alpha is dropped, EXIF rotation is applied,
    more than 8 bits are scaled between the 0.5 and 99.5 percentiles.

    Args:
        content: the whole file.
        hint: the file's name or media type, used only for formats without magic bytes.

    Returns:
        The image with a record of what was done.

    Raises:
        ScanError: with a reason code; nothing else is raised, whatever the bytes are.
    """
    if not content:
        raise ScanError("empty_file")
    try:
        is_dicom = dicom.is_dicom(content, hint)
        scan = _decode_dicom(content) if is_dicom else _decode_picture(content)
    except ScanError:
        raise
    except Exception as error:  # decoders raise many types; the text may quote file content
        raise ScanError("corrupt_image", type(error).__name__) from None
    if scan.image_HW.min() == scan.image_HW.max():
        raise ScanError("no_signal")
    return scan


def check_size(width: int, height: int) -> None:
    """Raise ScanError if a picture of this size, in pixels, may not be decoded or used."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE_PX:
        raise ScanError("image_too_large", f"{width}x{height}, limit {MAX_PIXELS} pixels")
    if min(width, height) < MIN_SIDE_PX:
        raise ScanError("image_too_small", f"{width}x{height}, at least {MIN_SIDE_PX} px a side")


def _decode_dicom(content: bytes) -> DecodedScan:
    image_HW, bit_depth, steps = dicom.decode(content, check_size)
    return DecodedScan(image_HW, "DICOM", bit_depth, steps)


def _decode_picture(content: bytes) -> DecodedScan:
    try:
        Image.MAX_IMAGE_PIXELS = None  # check_size has a lower limit, and does not warn
        header = Image.open(io.BytesIO(content), formats=_PILLOW_FORMATS)
    except (UnidentifiedImageError, SyntaxError, OSError):
        raise ScanError(_header_fault(content)) from None
    check_size(*header.size)
    if getattr(header, "n_frames", 1) > 1:
        raise ScanError("multi_frame")
    steps: list[str] = []
    image: np.ndarray | None
    if header.format == "TIFF" and header.mode == "RGBA":  # OpenCV multiplies it by alpha
        image = np.asarray(header)[:, :, [2, 1, 0, 3]]
    else:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise ScanError(_damage(header))
    if image.shape[:2] != (header.height, header.width):
        raise ScanError("corrupt_image", "decoded size differs from the header")
    bit_depth = image.dtype.itemsize * 8
    image_HW = _grey(image, steps)
    tags = header.getexif()
    white_is_zero = header.format == "TIFF" and tags.get(_TIFF_PHOTOMETRIC) == 0
    if white_is_zero and image_HW.dtype == np.uint16:  # OpenCV inverts 8 bits only
        image_HW = 65535 - image_HW
        steps.append("white-is-zero inverted")
    if image_HW.dtype != np.uint8:
        image_HW = to_uint8(image_HW)
        steps.append("percentile scaling to 8 bit")
    orientation = tags.get(_EXIF_ORIENTATION, 1)
    if orientation in _EXIF_TRANSFORMS and header.format != "TIFF":  # OpenCV turned TIFF upright
        image_HW = _EXIF_TRANSFORMS[orientation](image_HW)
        steps.append(f"EXIF orientation {orientation}")
    return DecodedScan(np.ascontiguousarray(image_HW), str(header.format), bit_depth, tuple(steps))


_EXIF_TRANSFORMS: Final = {
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.T,
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).T,
    8: lambda image: np.rot90(image, 1),
}


def _grey(image: np.ndarray, steps: list[str]) -> np.ndarray:
    if image.ndim == 2:
        return image
    if image.shape[2] == 4:
        steps.append("alpha dropped")
        image = image[:, :, :3]
    elif image.shape[2] == 2:
        steps.append("alpha dropped")
        return image[:, :, 0]
    if image.shape[2] == 1:
        return image[:, :, 0]
    steps.append("colour to grey")
    grey: np.ndarray = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_BGR2GRAY)
    return grey


def _header_fault(content: bytes) -> str:
    """Tell a damaged picture (right magic bytes) from a file of another kind."""
    magic = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")
    webp = content[:4] == b"RIFF" and content[8:12] == b"WEBP"
    return "corrupt_image" if content.startswith(magic) or webp else "unsupported_type"


def _damage(header: Image.Image) -> str:
    """Say whether a picture that OpenCV refused ends early or is damaged, by Pillow's complaint."""
    try:
        header.load()
    except OSError as error:
        return "truncated_image" if "truncated" in str(error) else "corrupt_image"
    except Exception:
        return "corrupt_image"
    return "corrupt_image"
