"""Intensity scaling that all formats share."""

from typing import Final

import cv2
import numpy as np

GREY_WEIGHTS: Final = (0.299, 0.587, 0.114)
"""Of red, green and blue: ITU-R BT.601."""
_MIN_COLOUR: Final = 24
"""Grey levels by which green differs from red or blue where a pixel counts as coloured: lossy
compression of grey pictures stays well below."""


def to_uint8(
    image_HW: np.ndarray, low: float | None = None, high: float | None = None
) -> np.ndarray:
    """Scale an image linearly to 0..255, clipped.

    Args:
        image_HW: any real dtype; values that are not finite as float32 count as `low`.
        low: value that becomes 0; None takes the 0.5 percentile.
        high: value that becomes 255; None takes the 99.5 percentile.

    Returns:
        uint8 image of the same shape; all zero if `low` and `high` are equal.
    """
    with np.errstate(all="ignore"):
        values = np.array(image_HW, dtype=np.float32)  # a copy: the rest works in place
        finite = np.isfinite(values)
        if low is None or high is None:
            sample = values[finite]
            low, high = (
                np.percentile(sample, (0.5, 99.5), overwrite_input=True)
                if sample.size
                else (0.0, 0.0)
            )
            if low == high and sample.size:  # a small bright structure on a flat ground
                low, high = float(sample.min()), float(sample.max())
        span = max(float(high) - float(low), 0.0)
        scale = np.float32(255.0 / span) if span else np.float32(np.inf)
        if not np.isfinite(scale):
            return np.zeros(values.shape, np.uint8)
        np.copyto(values, np.float32(low), where=~finite)
        values -= np.float32(low)
        values *= scale
        np.clip(np.rint(values, out=values), 0, 255, out=values)
        return values.astype(np.uint8)


def scale_by_percentiles(
    image_HW: np.ndarray, steps: list[str], padding_HW: np.ndarray | None = None
) -> np.ndarray:
    """Scale by `to_uint8`, and say so in `steps`, with the number of values that are not finite.

    Args:
        image_HW: any real dtype.
        steps: is appended to.
        padding_HW: bool, where the values are none of the picture: left out of the percentiles.
    """
    if image_HW.dtype.kind == "f":
        with np.errstate(over="ignore"):
            num_bad = image_HW.size - np.count_nonzero(np.isfinite(image_HW.astype(np.float32)))
        if num_bad:
            steps.append(f"{num_bad} values that are not finite left out")
    if padding_HW is not None:
        image_HW = np.where(padding_HW, np.float32(np.nan), image_HW)
    steps.append("percentile scaling to 8 bit")
    return to_uint8(image_HW)


def colour_to_uint8(image_HWC: np.ndarray, full: float) -> np.ndarray:
    """Return grey_HW uint8 of red, green and blue; `full` is the brightest value of a channel."""
    red, green, blue = (np.float32(weight) for weight in GREY_WEIGHTS)
    grey = image_HWC[..., 0] * red
    grey += image_HWC[..., 1] * green
    grey += image_HWC[..., 2] * blue
    return to_uint8(grey, 0.0, full)


def coloured_share(image_HWC: np.ndarray, full: float = 255.0) -> float:
    """Return the share of pixels that show a colour, in [0, 1].

    Args:
        image_HWC: three channels, green in the middle.
        full: the brightest value of a channel.
    """
    if image_HWC.dtype not in (np.uint8, np.uint16, np.float32):  # what OpenCV splits
        image_HWC = image_HWC.astype(np.float32)
    first_HW, green_HW, last_HW = cv2.split(np.ascontiguousarray(image_HWC))
    apart_HW = cv2.max(cv2.absdiff(first_HW, green_HW), cv2.absdiff(green_HW, last_HW))
    num_coloured = cv2.countNonZero(cv2.compare(apart_HW, _MIN_COLOUR / 255 * full, cv2.CMP_GT))
    return float(num_coloured / apart_HW.size)
