"""Families: the copies of a scan under the 8 flips and rotations, re-encoding and resizing.

Two scans are copies when the normalised correlation of their 40x40 thumbnails is at least 0.98
under one of the 8 transforms of the square (the dihedral group D4). With thumbnails of zero mean
and unit norm that is a distance of at most sqrt(2 - 2 * 0.98) = 0.2.

The shortlist cannot miss one, since each of its steps only shrinks distances, and keeps what is
within 0.2: first numbers that no transform changes, a product of matrices for all pairs of two
blocks (7 ns a pair on one core; in so many dimensions a tree prunes little, and costs several times
as much); then the low DCT frequencies under each transform; the thumbnails decide.

Array names: N scans, P pairs, F = 40, D length of a spectrum.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from bt_core.data.decode_stage import Columns, DecodeStage
from bt_core.scans.thumbnails import (
    MIN_CORRELATION,
    SPECTRUM_LENGTH,
    THUMBNAIL,
    correlations,
    invariants,
    spectrum,
    spectrum_distances,
)

_BLOCK_ROWS: Final = 1024
_RADIUS: Final = float(np.sqrt(2 - 2 * MIN_CORRELATION)) + 1e-4
"""With room for float32 rounding; the correlation decides in the end."""
_PAIRS_AT_ONCE: Final = 1024


@dataclass(frozen=True)
class Pairs:
    """Verified copies.

    Attributes:
        left_P: indices of scans.
        right_P: indices of their copies, larger than `left_P`.
        correlation_P: float32 in [0.98, 1].
        transform_P: index into `TRANSFORMS` of what turns the left scan into the right one.
    """

    left_P: np.ndarray
    right_P: np.ndarray
    correlation_P: np.ndarray
    transform_P: np.ndarray

    def __len__(self) -> int:
        return len(self.left_P)

    @classmethod
    def concatenate(cls, parts: "list[Pairs]") -> "Pairs":
        """Return the pairs of all parts; of none, no pairs."""
        empty = cls(*(np.zeros(0, t) for t in (np.int64, np.int64, np.float32, np.int8)))
        fields = ("left_P", "right_P", "correlation_P", "transform_P")
        return cls(*(np.concatenate([getattr(p, f) for p in [empty, *parts]]) for f in fields))


@dataclass(frozen=True)
class FamilyStage:
    """Turns rows of `REF_COLUMNS` into catalog rows with what the search for copies needs.

    Adds to `DecodeStage`'s columns `thumbnail` uint8 (40, 40) and `spectrum` float32 (D,), both
    zero where `reason` is not empty.

    Args:
        hash_key: for patient identifiers; None leaves them out.
    """

    hash_key: bytes | None = field(default=None, repr=False)

    @property
    def _decode(self) -> DecodeStage:
        return DecodeStage((THUMBNAIL,), self.hash_key)

    def __call__(self, columns: Columns) -> Columns:
        """Process a batch; a scan that cannot be used gets a reason, never an exception."""
        result = self._decode(columns)
        thumbnails = result.pop("pixels_0")
        return {**result, "thumbnail": thumbnails, "spectrum": spectrum(thumbnails)}

    def set_aside(self, row: dict[str, Any], reason: str, detail: str) -> dict[str, Any]:
        """Return the full row of a scan that gave nothing, with its reason."""
        blank = self._decode.set_aside(row, reason, detail)
        blank["thumbnail"] = blank.pop("pixels_0")
        return {**blank, "spectrum": np.zeros(SPECTRUM_LENGTH, np.float32)}


class CopyIndex:
    """Finds every pair of copies among scans.

    The first step compares all N (N - 1) / 2 pairs, too quickly to matter beside reading up to some
    100,000 scans, and is spread over the cluster beyond. The others' time, and the memory, grow
    with the number of pairs found: n copies of one scan that differ in their pixels are
    n (n - 1) / 2 pairs.

    Args:
        pixels_NFF: uint8 thumbnails (N, F, F), made with the spec `THUMBNAIL`.
        spectra_ND: what `spectrum` gives for them.
        rows: indices of the scans to search among, rising; None means all. Those whose thumbnail is
            flat have no copies, and are left out.
    """

    def __init__(
        self,
        pixels_NFF: np.ndarray,
        spectra_ND: np.ndarray,
        rows: np.ndarray | None = None,
    ) -> None:
        rows = np.arange(len(pixels_NFF)) if rows is None else rows
        self.rows = rows[spectra_ND[rows].any(axis=1)]
        self.pixels_NFF = pixels_NFF
        self.spectra_ND = spectra_ND
        self._points = invariants(spectra_ND[self.rows])
        self._half_squares = np.einsum("nd,nd->n", self._points, self._points) / 2

    def __len__(self) -> int:
        return len(self.rows)

    def search(self, start: int, stop: int) -> Pairs:
        """Return the copies of `rows[start:stop]` among the rows after each of them."""
        parts = [self._verify(pairs) for pairs in self._shortlist(start, stop)]
        return Pairs.concatenate(parts)

    def _shortlist(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield candidate pairs (P, 2), a few at a time."""
        for first in range(start, stop, _BLOCK_ROWS):
            left = slice(first, min(first + _BLOCK_ROWS, stop))
            for begin in range(first, len(self), _BLOCK_ROWS):
                right = slice(begin, begin + _BLOCK_ROWS)
                # |x - y|^2 / 2 = |x|^2 / 2 + |y|^2 / 2 - xy, with one pass over the product
                excess = self._points[left] @ self._points[right].T - self._half_squares[right]
                near = excess >= self._half_squares[left, None] - _RADIUS**2 / 2
                pairs = np.argwhere(near) + np.array([first, begin])
                pairs = self.rows[pairs[pairs[:, 0] < pairs[:, 1]]]
                yield from (
                    pairs[i : i + _PAIRS_AT_ONCE] for i in range(0, len(pairs), _PAIRS_AT_ONCE)
                )

    def _verify(self, pairs_P2: np.ndarray) -> Pairs:
        """Return the candidates that are copies, each with its best transform."""
        left, right = pairs_P2.T
        near_8P = spectrum_distances(self.spectra_ND[left], self.spectra_ND[right]) <= _RADIUS
        correlation_8P = np.zeros(near_8P.shape, np.float32)
        for transform, near in enumerate(near_8P):
            if near.any():
                correlation_8P[transform, near] = correlations(
                    self.pixels_NFF[left[near]], self.pixels_NFF[right[near]], transform
                )
        best = correlation_8P.argmax(axis=0)
        value = correlation_8P.max(axis=0)
        found = value >= MIN_CORRELATION
        return Pairs(left[found], right[found], value[found], best[found].astype(np.int8))


def exact_pairs(pixel_digests: Sequence[str]) -> tuple[Pairs, np.ndarray]:
    """Return each scan paired with the first one of equal pixels, and the first ones' indices.

    Scans with an empty digest, which could not be read, are in neither.
    """
    first_of: dict[str, int] = {}
    left, right = [], []
    for i, digest in enumerate(pixel_digests):
        first = first_of.setdefault(digest, i)
        if first != i and digest:
            left.append(first)
            right.append(i)
    first_of.pop("", None)
    num = len(left)
    pairs = Pairs(
        np.array(left, np.int64),
        np.array(right, np.int64),
        np.ones(num, np.float32),
        np.zeros(num, np.int8),
    )
    return pairs, np.array(list(first_of.values()), np.int64)


def join_components(num_scans: int, left_P: np.ndarray, right_P: np.ndarray) -> np.ndarray:
    """Return int32 (N,): the number of each scan's component when pairs are joined."""
    links = coo_array((np.ones(len(left_P), bool), (left_P, right_P)), shape=(num_scans, num_scans))
    components: np.ndarray = connected_components(links, directed=False)[1]
    return components
