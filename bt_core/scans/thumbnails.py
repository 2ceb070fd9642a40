"""Thumbnails of scans, and their low frequencies, under the 8 flips and rotations of the square.

Array names: N scans, P pairs, F = 40, D length of a spectrum.
"""

import itertools
from typing import Final

import numpy as np
import scipy.fft

from bt_core.scans.preprocess import PreprocessSpec

THUMBNAIL: Final = PreprocessSpec(size_px=40)
"""So small that a sharpened copy looks like its original. Of 5,966 public scans thumbnails of 64 px
leave 50 families of these apart: by eye the same picture sharpened or brightened, or neighbouring
slices of one head, and none under two classes."""
MIN_CORRELATION: Final = 0.98
"""From here on two scans are copies of each other."""
TRANSFORMS: Final = (
    "as it is",
    "mirrored left-right",
    "rotated by 90°",
    "rotated by 90°, mirrored",
    "rotated by 180°",
    "mirrored top-bottom",
    "rotated by 270°",
    "rotated by 270°, mirrored",
)
"""What `transformed` does, by index: quarter turns anticlockwise, then perhaps a mirror."""

_FREQUENCIES: Final = 20
_BAND_EDGES: Final = (20, 22, 24, 28, 32, 36, 40)
SPECTRUM_LENGTH: Final = _FREQUENCIES**2 + len(_BAND_EDGES) - 1


def transformed(image_HW: np.ndarray, transform: int) -> np.ndarray:
    """Return a view of an image, or of a stack (..., H, W) of images, under `TRANSFORMS`.

    Quarter turns exchange H and W.
    """
    turned = np.rot90(image_HW, transform // 2, axes=(-2, -1))
    return turned[..., ::-1] if transform % 2 else turned


def unit_thumbnails(pixels_NFF: np.ndarray) -> np.ndarray:
    """Return thumbnails (N, F, F) as float32 of zero mean and unit norm.

    One without contrast becomes all zero: it correlates with nothing, and has no copies.
    """
    values = pixels_NFF.astype(np.float32)
    values -= values.mean(axis=(1, 2), keepdims=True)
    norm = np.sqrt(np.einsum("nij,nij->n", values, values))
    scale = np.where(norm > 0, 1 / np.where(norm > 0, norm, 1), 0).astype(np.float32)
    return values * scale[:, None, None]


def spectrum(pixels_NFF: np.ndarray) -> np.ndarray:
    """Return float32 (N, D) of uint8 thumbnails (N, F, F): what tells them apart, shortly.

    The 20 x 20 lowest coefficients of the orthonormal DCT-II of `unit_thumbnails`, and the norms of
    bands above them.
    """
    coefficients_NFF = scipy.fft.dctn(unit_thumbnails(pixels_NFF), axes=(1, 2), norm="ortho")
    num_scans, side, _ = coefficients_NFF.shape
    low = coefficients_NFF[:, :_FREQUENCIES, :_FREQUENCIES].reshape(num_scans, _FREQUENCIES**2)
    higher = np.maximum(*np.mgrid[0:side, 0:side])
    bands = [
        np.linalg.norm(coefficients_NFF[:, (higher >= start) & (higher < stop)], axis=1)
        for start, stop in itertools.pairwise(_BAND_EDGES)
    ]
    return np.concatenate([low, np.stack(bands, axis=1)], axis=1).astype(np.float32)


def invariants(spectrum_ND: np.ndarray) -> np.ndarray:
    """Return float32 (N, D): of a spectrum, what no flip or rotation changes.

    Under D4 a coefficient (u, v) changes its sign by (-1)^u or (-1)^v, and changes places with
    (v, u). So for each such pair (a, b) two numbers stay: a+b and |a-b| where u and v are even,
    |a+b| and |a-b| where both are odd, the sorted |a|, |b| otherwise (sums divided by sqrt 2). The
    norms of bands stay as they are. Each is a contraction of its own coefficients, so the whole
    never increases a distance.
    """
    num_low = _FREQUENCIES**2
    c = spectrum_ND[:, :num_low].reshape(-1, _FREQUENCIES, _FREQUENCIES)
    half = np.float32(np.sqrt(0.5))
    columns = []
    for u in range(_FREQUENCIES):
        for v in range(u, _FREQUENCIES):
            a, b = c[:, u, v], c[:, v, u]
            if u == v:
                columns.append(np.abs(a) if u % 2 else a)
            elif u % 2 != v % 2:
                columns += [np.maximum(np.abs(a), np.abs(b)), np.minimum(np.abs(a), np.abs(b))]
            else:
                total = (a + b) * half
                columns += [np.abs(total) if u % 2 else total, np.abs(a - b) * half]
    return np.concatenate([np.stack(columns, axis=1), spectrum_ND[:, num_low:]], axis=1)


def spectrum_distances(left_PD: np.ndarray, right_PD: np.ndarray) -> np.ndarray:
    """Return float32 (8, P): the distance of two spectra, the left one under each of `TRANSFORMS`.

    The distance of the thumbnails, under the same transform, is never smaller.
    """
    num_low = _FREQUENCIES**2
    low_left, low_right = left_PD[:, :num_low], right_PD[:, :num_low]
    swapped = low_left.reshape(-1, _FREQUENCIES, _FREQUENCIES).transpose(0, 2, 1)
    plain, turned = low_left * low_right, swapped.reshape(-1, num_low) * low_right
    parity = (-1.0) ** np.arange(_FREQUENCIES, dtype=np.float32)
    one = np.ones_like(parity)
    of_rows, of_columns, of_both = (
        np.outer(u, v).ravel() for u, v in ((parity, one), (one, parity), (parity, parity))
    )
    unsigned = np.ones(num_low, np.float32)
    inner_8P = np.concatenate(
        [
            np.stack([unsigned, of_columns]) @ plain.T,
            np.stack([of_rows, of_both]) @ turned.T,
            np.stack([of_both, of_rows]) @ plain.T,
            np.stack([of_columns, unsigned]) @ turned.T,
        ]
    )
    left_2, right_2 = (np.einsum("pd,pd->p", x, x) for x in (low_left, low_right))
    bands = left_PD[:, num_low:] - right_PD[:, num_low:]
    squared_8P = left_2 + right_2 + np.einsum("pd,pd->p", bands, bands) - 2 * inner_8P
    distances: np.ndarray = np.sqrt(np.maximum(squared_8P, 0))
    return distances


def correlations(left_PFF: np.ndarray, right_PFF: np.ndarray, transform: int) -> np.ndarray:
    """Return float32 (P,): the normalised correlation of each pair, the left one transformed."""
    left, right = unit_thumbnails(left_PFF), unit_thumbnails(right_PFF)
    values: np.ndarray = np.einsum("pij,pij->p", transformed(left, transform), right)
    return values.clip(max=1.0)
