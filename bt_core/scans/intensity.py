"""Intensity scaling that pictures and DICOM share."""

import numpy as np


def to_uint8(
    image_HW: np.ndarray, low: float | None = None, high: float | None = None
) -> np.ndarray:
    """Scale an image linearly to 0..255, clipped.

    Args:
        image_HW: any real dtype; non-finite values count as `low`.
        low: value that becomes 0; None takes the 0.5 percentile.
        high: value that becomes 255; None takes the 99.5 percentile.

    Returns:
        uint8 image of the same shape; all zero if `low` and `high` are equal.
    """
    values = np.asarray(image_HW, dtype=np.float32)
    finite = np.isfinite(values)
    if low is None or high is None:
        sample = values[finite]
        low, high = np.percentile(sample, (0.5, 99.5)) if sample.size else (0.0, 0.0)
        if low == high and sample.size:  # a small bright structure on a flat ground
            low, high = float(sample.min()), float(sample.max())
    values = np.where(finite, values, np.float32(low))
    span = max(float(high) - float(low), 0.0)
    if span == 0.0:
        return np.zeros(values.shape, np.uint8)
    scaled = (values - np.float32(low)) * np.float32(255.0 / span)
    image: np.ndarray = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return image
