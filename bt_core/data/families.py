"""Families: the copies of a scan under the 8 flips and rotations, re-encoding and resizing.

Two scans are copies when the normalised correlation of their 64x64 thumbnails is at least 0.98
under one of the 8 transforms of the square (the dihedral group D4). With thumbnails of zero mean
and unit norm that is a distance of at most sqrt(2 - 2 * 0.98) = 0.2.

The shortlist cannot miss one, since each of its steps only shrinks distances, and keeps what is
within 0.2: a k-d tree over the leading principal components of numbers that no transform changes;
then the low DCT frequencies under all 8 transforms; the thumbnails decide.

Array names: N scans, P pairs, F = 64, D length of a spectrum.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import scipy.fft
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from bt_core.data.decode_stage import Columns, DecodeStage
from bt_core.scans.preprocess import PreprocessSpec

THUMBNAIL: Final = PreprocessSpec(size_px=64)
MIN_CORRELATION: Final = 0.98
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

_FREQUENCIES: Final = 16
_BAND_EDGES: Final = (16, 18, 20, 22, 24, 32, 40, 48, 56, 64)
SPECTRUM_LENGTH: Final = _FREQUENCIES**2 + len(_BAND_EDGES) - 1
_TREE_DIMENSIONS: Final = 64
_TREE_ROWS: Final = 8192
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


def transformed(image_HW: np.ndarray, transform: int) -> np.ndarray:
    """Return a view of an image, or of a stack in its last two axes, under `TRANSFORMS`."""
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

    First the 16 x 16 lowest coefficients of the orthonormal DCT of `unit_thumbnails`, by rows, then
    the norms of bands of the higher ones.
    """
    coefficients = scipy.fft.dctn(unit_thumbnails(pixels_NFF), axes=(1, 2), norm="ortho")
    low = coefficients[:, :_FREQUENCIES, :_FREQUENCIES].reshape(len(pixels_NFF), -1)
    higher = np.maximum(*np.mgrid[0 : THUMBNAIL.size_px, 0 : THUMBNAIL.size_px])
    bands = [
        np.linalg.norm(coefficients[:, (higher >= start) & (higher < stop)], axis=1)
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
    """Return float32 (P,): the smallest distance of two spectra under the 8 transforms.

    The distance of the thumbnails, under the same transform, is never smaller.
    """
    num_low = _FREQUENCIES**2
    low_left, low_right = left_PD[:, :num_low], right_PD[:, :num_low]
    parity = (-1.0) ** np.arange(_FREQUENCIES, dtype=np.float32)
    one = np.ones_like(parity)
    signs = [np.outer(u, v).ravel() for u in (one, parity) for v in (one, parity)]
    signs_L4 = np.stack(signs, axis=1)
    swapped = low_left.reshape(-1, _FREQUENCIES, _FREQUENCIES).transpose(0, 2, 1)
    inner_P8 = np.concatenate(
        [
            (low_left * low_right) @ signs_L4,
            (swapped.reshape(-1, num_low) * low_right) @ signs_L4,
        ],
        axis=1,
    )
    left_2, right_2 = (np.einsum("pd,pd->p", x, x) for x in (low_left, low_right))
    bands = left_PD[:, num_low:] - right_PD[:, num_low:]
    squared = left_2 + right_2 - 2 * inner_P8.max(axis=1) + np.einsum("pd,pd->p", bands, bands)
    distances: np.ndarray = np.sqrt(np.maximum(squared, 0))
    return distances


@dataclass(frozen=True)
class FamilyStage:
    """Turns rows of `REF_COLUMNS` into catalog rows with what the search for copies needs.

    Adds to `DecodeStage`'s columns `thumbnail` uint8 (64, 64) and `spectrum` float32 (D,), both
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

    Time and memory grow with the number of scans and with the number of pairs: n copies of one
    scan that differ in their pixels are n (n - 1) / 2 pairs.

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
        centred = invariants(spectra_ND[self.rows])
        if len(self.rows):
            centred -= centred.mean(axis=0, keepdims=True)
        sample = centred[:: max(1, len(centred) // 20_000)]
        _, axes = np.linalg.eigh(sample.T @ sample)
        self._points = centred @ axes[:, ::-1][:, :_TREE_DIMENSIONS]
        starts = range(0, len(self.rows), _TREE_ROWS)
        self._trees = {at: cKDTree(self._points[at : at + _TREE_ROWS]) for at in starts}

    def __len__(self) -> int:
        return len(self.rows)

    def search(self, start: int, stop: int) -> Pairs:
        """Return the copies of `rows[start:stop]` among the rows after each of them."""
        parts = [self._verify(pairs) for pairs in self._shortlist(start, stop)]
        return Pairs.concatenate(parts)

    def _shortlist(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield candidate pairs (P, 2), a few at a time."""
        for first in range(start, stop, 256):
            block = cKDTree(self._points[first : min(first + 256, stop)])
            for begin, tree in self._trees.items():
                if begin + tree.n <= first:  # each pair is looked for once, from its first scan
                    continue
                near = block.sparse_distance_matrix(tree, _RADIUS, output_type="ndarray")
                pairs = np.stack([near["i"] + first, near["j"] + begin], axis=1)
                pairs = self.rows[pairs[pairs[:, 0] < pairs[:, 1]]]
                for at in range(0, len(pairs), _PAIRS_AT_ONCE):
                    some = pairs[at : at + _PAIRS_AT_ONCE]
                    left, right = (self.spectra_ND[some[:, k]] for k in (0, 1))
                    yield some[spectrum_distances(left, right) <= _RADIUS]

    def _verify(self, pairs_P2: np.ndarray) -> Pairs:
        parts = []
        for at in range(0, len(pairs_P2), _PAIRS_AT_ONCE):
            left, right = pairs_P2[at : at + _PAIRS_AT_ONCE].T
            correlation_8P = correlations(self.pixels_NFF[left], self.pixels_NFF[right])
            best = correlation_8P.argmax(axis=0)
            value = correlation_8P.max(axis=0)
            found = value >= MIN_CORRELATION
            parts.append(
                Pairs(left[found], right[found], value[found], best[found].astype(np.int8))
            )
        return Pairs.concatenate(parts)


def correlations(left_PFF: np.ndarray, right_PFF: np.ndarray) -> np.ndarray:
    """Return float32 (8, P): the normalised correlation of each pair under each transform."""
    left, right = unit_thumbnails(left_PFF), unit_thumbnails(right_PFF)
    rows = [np.einsum("pij,pij->p", transformed(left, k), right) for k in range(len(TRANSFORMS))]
    stacked: np.ndarray = np.stack(rows)
    return stacked.clip(max=1.0)


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
