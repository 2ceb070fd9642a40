"""The training index of a bundle: which family of training scans a scan is a copy of, if any.

It finds copies under the 8 flips and rotations, resized, re-encoded, of another brightness or
sharpness: what is compared is the correlation of the 40 x 40 lowest DCT coefficients of two
thumbnails, the best of the 8 transforms. Each training scan takes 1.6 KB.

Mind that the index holds a blurred picture of some 40 px of each training scan. Families are named
by the start of a pixel digest, which says nothing of a patient.

Measured on 5,966 public scans: all 14,842 pairs that `data.families` calls copies are found, and
all of 400 copies by `phantom.perturbed_copy`. Of 1,791 scans of other families 3.4 % are taken for
copies of a training scan, which makes 18 pairs of families: by eye 12 are the same picture
sharpened or brightened, 6 neighbouring slices of one head, none of two heads. A look-up among 4,000
scans takes 0.2 ms of one core, among 100,000 1.3 ms, in batches of 64.

Array names: N training scans, B scans looked up, F = 64, K frequencies a side, C candidates.
"""

from collections.abc import Mapping, Sequence
from typing import Final, Self

import numpy as np

from bt_core.scans.thumbnails import (
    TRANSFORMS,
    frequencies,
    invariants,
    summary,
    transformed_frequencies,
)

MIN_CORRELATION: Final = 0.98
"""From here on two scans are copies; as in `data.families`, but of blurred thumbnails."""
_FREQUENCIES: Final = 40
_NUM_CANDIDATES: Final = 32
_BLOCK_ROWS: Final = 4096
_FULL: Final = 127.0


class TrainingIndex:
    """Finds the training family that a scan is a copy of.

    The scans nearest by numbers that no flip or rotation changes are compared under each of the 8.

    Args:
        codes_NKK: int8, the coefficients of each scan; `build` makes them.
        families_N: uint64, the family of each.
    """

    def __init__(self, codes_NKK: np.ndarray, families_N: np.ndarray) -> None:
        self._codes_NKK = codes_NKK
        self._families_N = families_N
        blocks = [
            invariants(summary(_decoded(codes_NKK[i : i + _BLOCK_ROWS])))
            for i in range(0, max(len(codes_NKK), 1), _BLOCK_ROWS)
        ]
        self._points_ND = np.concatenate(blocks)
        self._half_squares_N = np.einsum("nd,nd->n", self._points_ND, self._points_ND) / 2

    def __len__(self) -> int:
        return len(self._families_N)

    @classmethod
    def build(cls, thumbnails_NFF: np.ndarray, families: Sequence[str]) -> Self:
        """Return the index of training scans; of equal thumbnails in a family one is kept.

        Args:
            thumbnails_NFF: uint8, made with the spec `thumbnails.THUMBNAIL`.
            families: the family of each, 16 hexadecimal digits.

        Raises:
            ValueError: if a family is named otherwise.
        """
        families_N = np.array([int(name, 16) for name in families], np.uint64)
        if any(f"{number:016x}" != name for number, name in zip(families_N, families, strict=True)):
            raise ValueError("a family is named by 16 hexadecimal digits")
        keys = [
            (number, picture.tobytes())
            for number, picture in zip(families_N.tolist(), thumbnails_NFF, strict=True)
        ]
        kept = sorted(dict(zip(reversed(keys), range(len(keys) - 1, -1, -1), strict=True)).values())
        blocks = [
            _encoded(frequencies(thumbnails_NFF[kept[i : i + _BLOCK_ROWS]], _FREQUENCIES))
            for i in range(0, max(len(kept), 1), _BLOCK_ROWS)
        ]
        return cls(np.concatenate(blocks), families_N[kept])

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Return the index that `arrays` gave."""
        return cls(arrays["codes"], arrays["families"])

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what to store: codes int8 (N, K, K) and families uint64 (N,)."""
        return {"codes": self._codes_NKK, "families": self._families_N}

    def lookup(self, thumbnails_BFF: np.ndarray) -> list[tuple[str | None, float]]:
        """Return each scan's training family, None if it is a copy of none, and a correlation.

        The correlation, in [0, 1], is the highest found with any training scan, copy or not; 0 for
        a scan without contrast and in an empty index.

        Args:
            thumbnails_BFF: uint8, made with the spec `thumbnails.THUMBNAIL`.
        """
        if not len(self) or not len(thumbnails_BFF):
            return [(None, 0.0)] * len(thumbnails_BFF)
        scans_BKK = _unit(frequencies(thumbnails_BFF, _FREQUENCIES))
        candidates_BC = self._nearest(invariants(summary(scans_BKK)))
        candidates_BCD = _decoded(self._codes_NKK[candidates_BC.ravel()]).reshape(
            *candidates_BC.shape, -1
        )
        views_B8D = np.stack(
            [
                transformed_frequencies(scans_BKK, t).reshape(len(scans_BKK), -1)
                for t in range(len(TRANSFORMS))
            ],
            axis=1,
        )
        best_BC = (views_B8D @ candidates_BCD.swapaxes(1, 2)).max(axis=1)
        place_B = best_BC.argmax(axis=1)
        value_B = best_BC.max(axis=1).clip(0, 1)
        family_B = self._families_N[np.take_along_axis(candidates_BC, place_B[:, None], 1)[:, 0]]
        return [
            (f"{family:016x}" if value >= MIN_CORRELATION else None, value)
            for family, value in zip(family_B.tolist(), value_B.tolist(), strict=True)
        ]

    def _nearest(self, points_BD: np.ndarray) -> np.ndarray:
        """Return candidates_BC: the rows of the nearest points."""
        # |x - y|^2 / 2 = |x|^2 / 2 + |y|^2 / 2 - xy, of which |x| does not matter
        distance_BN = self._half_squares_N - points_BD @ self._points_ND.T
        num = min(_NUM_CANDIDATES, len(self))
        nearest_BC: np.ndarray = np.argpartition(distance_BN, num - 1, axis=1)[:, :num]
        return nearest_BC


def _unit(coefficients_NKK: np.ndarray) -> np.ndarray:
    """Return coefficients of unit norm; those of a flat thumbnail stay zero."""
    norm_N = np.sqrt(np.einsum("nij,nij->n", coefficients_NKK, coefficients_NKK))
    unit: np.ndarray = coefficients_NKK / np.where(norm_N > 0, norm_N, 1)[:, None, None]
    return unit


def _encoded(coefficients_NKK: np.ndarray) -> np.ndarray:
    """Return int8 codes: roots of shares of the largest, so that small ones keep their digits."""
    largest_N = np.abs(coefficients_NKK).max(axis=(1, 2), keepdims=True)
    shares = coefficients_NKK / np.where(largest_N > 0, largest_N, 1)
    codes: np.ndarray = np.rint(np.sign(shares) * np.sqrt(np.abs(shares)) * _FULL).astype(np.int8)
    return codes


def _decoded(codes_NKK: np.ndarray) -> np.ndarray:
    values = codes_NKK.astype(np.float32)
    return _unit(values * np.abs(values))
