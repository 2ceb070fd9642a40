"""What scanners, networks and people do to a picture, at stated strengths, for robustness curves.

All act on the square uint8 pixels that a model is given, so that sizes are shares of the side.
Array names: S side.
"""

from collections.abc import Callable
from typing import Final

import cv2
import numpy as np

PERTURBATIONS: Final[dict[str, tuple[float, ...]]] = {
    "noise": (0.02, 0.05, 0.1, 0.2),
    "blur": (0.005, 0.01, 0.02, 0.04),
    "bias field": (0.2, 0.4, 0.6, 0.8),
    "contrast": (0.8, 0.6, 0.4, 0.2),
    "rotation": (5.0, 15.0, 30.0, 45.0),
    "crop": (0.05, 0.1, 0.15, 0.2),
    "JPEG quality": (50.0, 25.0, 10.0, 5.0),
    "resolution": (0.5, 0.25, 0.125, 0.0625),
}
"""Name to strengths, from weak to strong."""
UNITS: Final = {
    "noise": "standard deviation, share of white",
    "blur": "standard deviation, share of the side",
    "bias field": "largest change of brightness across the picture",
    "contrast": "factor about the mean",
    "rotation": "degrees",
    "crop": "share cut from each side",
    "JPEG quality": "of 100",
    "resolution": "share of the pixels per side",
}


def perturb(image_SS: np.ndarray, name: str, strength: float, seed: int) -> np.ndarray:
    """Return image_SS uint8, changed.

    Args:
        image_SS: uint8.
        name: of `PERTURBATIONS`.
        strength: in the unit of `UNITS`.
        seed: of what is drawn by chance.
    """
    changed: np.ndarray = _CHANGES[name](image_SS, strength, np.random.default_rng(seed))
    return changed.clip(0, 255).round().astype(np.uint8)


def _noise(image_SS: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Rician noise, as magnitudes of MRI have: of both parts of the signal."""
    real, imaginary = generator.normal(0, 255 * share, (2, *image_SS.shape))
    return np.asarray(np.hypot(image_SS + real, imaginary))


def _blur(image_SS: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    return np.asarray(cv2.GaussianBlur(image_SS, (0, 0), share * len(image_SS)))


def _bias_field(image_SS: np.ndarray, change: float, generator: np.random.Generator) -> np.ndarray:
    """Brightness that falls off smoothly in one direction, as near a surface coil."""
    angle = generator.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-0.5 : 0.5 : len(image_SS) * 1j, -0.5 : 0.5 : len(image_SS) * 1j]
    return np.asarray(image_SS * (1 + change * (np.cos(angle) * x + np.sin(angle) * y)))


def _contrast(image_SS: np.ndarray, factor: float, generator: np.random.Generator) -> np.ndarray:
    mean = image_SS.mean()
    return np.asarray((image_SS - mean) * factor + mean)


def _rotation(image_SS: np.ndarray, degrees: float, generator: np.random.Generator) -> np.ndarray:
    side = len(image_SS)
    sign = generator.choice([-1, 1])
    turn = cv2.getRotationMatrix2D(((side - 1) / 2, (side - 1) / 2), float(sign * degrees), 1.0)
    return np.asarray(cv2.warpAffine(image_SS, turn, (side, side)))


def _crop(image_SS: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    side, cut = len(image_SS), round(share * len(image_SS))
    return np.asarray(cv2.resize(image_SS[cut : side - cut, cut : side - cut], (side, side)))


def _jpeg(image_SS: np.ndarray, quality: float, generator: np.random.Generator) -> np.ndarray:
    _, encoded = cv2.imencode(".jpg", image_SS, [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE))


def _resolution(image_SS: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    side, small = len(image_SS), max(4, round(share * len(image_SS)))
    shrunk = cv2.resize(image_SS, (small, small), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(shrunk, (side, side)))


_CHANGES: Final[dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]]] = {
    "noise": _noise,
    "blur": _blur,
    "bias field": _bias_field,
    "contrast": _contrast,
    "rotation": _rotation,
    "crop": _crop,
    "JPEG quality": _jpeg,
    "resolution": _resolution,
}
