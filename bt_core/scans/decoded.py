"""What decoding gives, and the limits that every format keeps. Array names: H height, W width."""

from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np

from bt_core.errors import ScanError

MAX_PIXELS: Final = 40_000_000
MIN_SIDE_PX: Final = 32
MAX_SIDE_PX: Final = 16_384
MAX_FRAME_BYTES: Final = 256 * 1024**2
"""Decoded samples of one picture, frame or NIfTI slab, as they are stored."""
MAX_DECODE_BYTES: Final = 2 * 1024**3
"""Memory that decoding one scan may take at its peak, besides the bytes given; tests hold it."""
BURNED_IN: Final = "burned-in annotation stated"
"""The step of a DICOM object which says that its pixels show text, maybe the patient's name."""


@dataclass(frozen=True)
class DecodedScan:
    """A decoded scan and what was done to get it.

    Attributes:
        image_HW: uint8 grey image, 0 dark to 255 bright.
        format: `PNG`, `JPEG`, `BMP`, `TIFF`, `WEBP`, `DICOM` or `NIFTI`, from the content, not the
            name.
        bit_depth: bits of one stored sample.
        steps: what was applied, in order, for example `colour to grey`, and what was found, such as
            `BURNED_IN`. No header value but sizes.
        num_frames: frames of a DICOM object, slices of a NIfTI volume along the axis that was cut.
        frame_index: which of them this is, from 0: the middle one, `num_frames // 2`.
        patient: keyed hash of the DICOM PatientID; empty without one, without a key, and for
            placeholders that stand for many (`identity.is_placeholder`).
        coloured: share of the pixels, before they became grey, that showed a colour
            (`intensity.coloured_share`), in [0, 1].
    """

    image_HW: np.ndarray
    format: str
    bit_depth: int
    steps: tuple[str, ...]
    num_frames: int = 1
    frame_index: int = 0
    patient: str = ""
    coloured: float = 0.0


def check_size(width: int, height: int) -> None:
    """Raise ScanError if a picture of this size, in pixels, may not be decoded or used."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE_PX:
        raise ScanError("image_too_large", f"{width}x{height}, limit {MAX_PIXELS} pixels")
    if min(width, height) < MIN_SIDE_PX:
        raise ScanError("image_too_small", f"{width}x{height}, at least {MIN_SIDE_PX} px a side")


def check_bytes(num_bytes: int, limit: int, what: str) -> None:
    """Raise ScanError if decoding would give more bytes than a limit."""
    if num_bytes > limit:
        raise ScanError("image_too_large", f"{num_bytes} bytes in {what}, limit {limit}")


def square_pixels(image_HW: np.ndarray, spacing_HW: tuple[float, float]) -> np.ndarray:
    """Enlarge the coarser axis by linear interpolation if the spacings differ by over 1 %.

    Args:
        image_HW: uint8.
        spacing_HW: distance between rows, and between columns, in any one unit; a spacing that is
            not positive and finite counts as unknown, and nothing is done.

    Returns:
        The same array if nothing had to be done.

    Raises:
        ScanError: `image_too_large` if the enlarged picture would be over the limits.
    """
    between_rows, between_columns = spacing_HW
    if not (0 < between_rows < np.inf and 0 < between_columns < np.inf):
        return image_HW
    ratio = between_rows / between_columns
    if abs(ratio - 1) <= 0.01:
        return image_HW
    height, width = image_HW.shape
    if ratio > 1:
        height = round(min(height * ratio, 2**31))
    else:
        width = round(min(width / max(ratio, 1e-9), 2**31))
    check_size(width, height)
    resized: np.ndarray = cv2.resize(image_HW, (width, height), interpolation=cv2.INTER_LINEAR)
    return resized
