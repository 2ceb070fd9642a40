"""The training index of a bundle: which family of training scans a scan is a copy of, if any.

It finds what `data.families` calls copies, by the same thumbnails. Each training scan takes 1.6 KB.

Mind that the index holds a picture of 40 px of each training scan. Families are named by the start
of a pixel digest, which says nothing of a patient.

Measured on 5,966 public scans, half of them in the index: each of the 1,548 others with a copy
there is found, none without, and all of 400 copies by `phantom.perturbed_copy`. A look-up among
4,000 scans takes 0.2 ms of one core, among 100,000 1.3 ms, in batches of 64.

Array names: N training scans, B scans looked up, F = 40, C candidates.
"""

from collections.abc import Mapping, Sequence
from typing import Final, Self

import numpy as np

from bt_core.scans.thumbnails import (
    MIN_CORRELATION,
    THUMBNAIL,
    TRANSFORMS,
    invariants,
    spectrum,
    transformed,
    unit_thumbnails,
)

_NUM_CANDIDATES: Final = 32
_BLOCK_ROWS: Final = 4096


class TrainingIndex:
    """Finds the training family that a scan is a copy of.

    The scans nearest by numbers that no flip or rotation changes are compared under each of the 8.

    Args:
        thumbnails_NFF: uint8, made with the spec `thumbnails.THUMBNAIL`.
        families_N: uint64, the family of each.
    """

    def __init__(self, thumbnails_NFF: np.ndarray, families_N: np.ndarray) -> None:
        self._thumbnails_NFF = thumbnails_NFF
        self._families_N = families_N
        starts = range(0, max(len(families_N), 1), _BLOCK_ROWS)
        blocks = [thumbnails_NFF[i : i + _BLOCK_ROWS] for i in starts]
        self._points_ND = np.concatenate([invariants(spectrum(block)) for block in blocks])
        deviations = [block.std(axis=(1, 2), dtype=np.float64) for block in blocks]
        norms_N = np.concatenate(deviations) * THUMBNAIL.size_px
        self._scale_N = np.where(norms_N > 0, 1 / np.where(norms_N > 0, norms_N, 1), 0)
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
        return cls(thumbnails_NFF[kept], families_N[kept])

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Return the index that `arrays` gave."""
        return cls(arrays["thumbnails"], arrays["families"])

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what to store: thumbnails uint8 (N, F, F) and families uint64 (N,)."""
        return {"thumbnails": self._thumbnails_NFF, "families": self._families_N}

    def lookup(self, thumbnails_BFF: np.ndarray) -> list[tuple[str | None, float]]:
        """Return each scan's training family, None if it is a copy of none, and a correlation.

        The correlation, in [0, 1], is the highest found with any training scan, copy or not; 0 for
        a scan without contrast and in an empty index.

        Args:
            thumbnails_BFF: uint8, made with the spec `thumbnails.THUMBNAIL`.
        """
        if not len(self) or not len(thumbnails_BFF):
            return [(None, 0.0)] * len(thumbnails_BFF)
        candidates_BC = self._nearest(invariants(spectrum(thumbnails_BFF)))
        # Their means need not go: the scans have none, so that nothing of them is left over.
        candidates_BCD = self._thumbnails_NFF[candidates_BC].reshape(*candidates_BC.shape, -1)
        scans_BFF = unit_thumbnails(thumbnails_BFF)
        views_B8D = np.stack(
            [transformed(scans_BFF, t).reshape(len(scans_BFF), -1) for t in range(len(TRANSFORMS))],
            axis=1,
        )
        products_B8C = views_B8D @ candidates_BCD.astype(np.float32).swapaxes(1, 2)
        best_BC = (products_B8C * self._scale_N[candidates_BC][:, None]).max(axis=1)
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
