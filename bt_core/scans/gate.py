"""The input gate: whether the pixels of a decoded scan can be those of a head in MRI.

A head is one compact bright shape on a dark ground that reaches around it. What shows none is
rejected; what shows one with something odd is answered, and deferred to a person. It looks at
pixels alone and lets through what only looks like a head (a CT of one, a bright disc): such scans
are for `ensemble.far`. Text that lies on the head itself is not found.

Measured on 5,966 public scans of 224 px: 0.1 % rejected (6: framed in white, cut at the crown, or a
brain as dark as the ground), 1.2 % deferred (39 for text, of which by eye a third has none; 32 for
coloured banners). Of the same scans inverted 99.9 % are rejected; with a name of two lines burnt in
88 % are deferred.

Array names: H height, W width, of the picture or its reduced copy.
"""

from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np

from bt_core.scans.decoded import BURNED_IN, DecodedScan

GATE_REJECTS: Final = ("almost_blank", "colour_picture", "inverted_contrast", "not_a_head")
GATE_DEFERS: Final = ("colour_overlay", "low_resolution", "odd_shape", "burnt_in_text")

MIN_HEAD_PX: Final = 64
"""Of the head's longer side, in pixels of the file: fewer show too little of a mass."""
_SHAPE_PX: Final = 128
"""Longer side of the copy on which shapes are measured."""
_TEXT_PX: Final = 256
"""Longer side of the copy on which letters are looked for."""
_MIN_CONTRAST: Final = 20
"""Grey levels between the 1st and 99th percentile."""
_MIN_SPECK: Final = 0.02
_MIN_AREA: Final = 0.08
"""Shares of the picture that the largest shape covers: less is a blank, or no head."""
_MIN_DARK_FRAME: Final = 0.42
"""Share of the picture's outermost pixels that must belong to the dark ground."""
_MIN_SOLIDITY: Final = 0.6
"""Area of the shape over that of its convex hull."""
_MIN_FILL: Final = 0.5
"""Share of the shape that is bright, not enclosed dark."""
_MAX_REST: Final = 0.25
"""Share of the picture that other bright shapes cover."""
_MAX_ASPECT: Final = 2.3
_MIN_COLOUR_PICTURE: Final = 0.25
_MIN_COLOUR_OVERLAY: Final = 0.0005
_MIN_LETTERS: Final = 8
"""On the dark ground: single letters that name a side are common, and harmless."""
_MIN_PAGE: Final = 160
"""Anywhere: of 5,966 scans the one with most had 135; pages of text have 400 and more."""
_MIN_INK: Final = 50
"""Grey levels of a letter above what surrounds it."""


@dataclass(frozen=True)
class Shape:
    """The largest bright shape of a picture. Shares are in [0, 1].

    Attributes:
        contrast: grey levels between the picture's 1st and 99th percentile.
        area: share of the picture that it covers, holes included.
        solidity: its area over that of its convex hull.
        fill: share of it that is bright itself.
        rest: share of the picture that all other shapes cover.
        dark_frame: share of the picture's outermost pixels that no shape covers.
        width_px: of its upright box, in pixels of the picture.
        height_px: likewise.
    """

    contrast: int
    area: float = 0.0
    solidity: float = 0.0
    fill: float = 0.0
    rest: float = 0.0
    dark_frame: float = 1.0
    width_px: float = 0.0
    height_px: float = 0.0

    @property
    def is_head(self) -> bool:
        """Whether a head can look so."""
        return (
            self.area >= _MIN_AREA
            and self.dark_frame >= _MIN_DARK_FRAME
            and self.solidity >= _MIN_SOLIDITY
            and self.fill >= _MIN_FILL
            and self.rest <= _MAX_REST
        )

    @property
    def aspect(self) -> float:
        """The box's longer over its shorter side."""
        return max(self.width_px, self.height_px) / max(min(self.width_px, self.height_px), 1.0)


def gate(scan: DecodedScan) -> str:
    """Return the reason why a scan is not answered, or not without a person; empty if neither.

    Returns:
        The first that applies of `GATE_REJECTS` and then of `GATE_DEFERS`.
    """
    reduced_HW = _reduced(scan.image_HW, _TEXT_PX)
    small_HW = _reduced(reduced_HW, _SHAPE_PX)
    scale = max(scan.image_HW.shape) / max(small_HW.shape)
    shape, shapes_HW = find_shape(small_HW, scale)
    if shape.contrast < _MIN_CONTRAST or shape.area < _MIN_SPECK:
        return "almost_blank"
    if scan.coloured >= _MIN_COLOUR_PICTURE:
        return "colour_picture"
    if not shape.is_head:
        inverted = find_shape(255 - small_HW, scale)[0].is_head
        return "inverted_contrast" if inverted else "not_a_head"
    if scan.coloured >= _MIN_COLOUR_OVERLAY:
        return "colour_overlay"
    if max(shape.width_px, shape.height_px) < MIN_HEAD_PX:
        return "low_resolution"
    if shape.aspect > _MAX_ASPECT:
        return "odd_shape"
    on_ground, anywhere = count_letters(reduced_HW, shapes_HW)
    text = on_ground >= _MIN_LETTERS or anywhere >= _MIN_PAGE or BURNED_IN in scan.steps
    return "burnt_in_text" if text else ""


def find_shape(small_HW: np.ndarray, scale: float = 1.0) -> tuple[Shape, np.ndarray]:
    """Return the largest bright shape, and the mask of all (uint8, 0 or 1), with no holes.

    Bright is what lies above the middle between the darkest percentile and Otsu's threshold, so
    that a dim brain in a bright scalp counts.

    Args:
        small_HW: uint8, of some 128 px a side.
        scale: pixels of the picture for each of these.
    """
    smooth_HW = cv2.GaussianBlur(small_HW, (3, 3), 0)
    counts = cv2.calcHist([smooth_HW], [0], None, [256], [0, 256]).ravel()
    low, high = np.searchsorted(np.cumsum(counts), np.array([0.01, 0.99]) * smooth_HW.size)
    otsu, _ = cv2.threshold(smooth_HW, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    _, bright_HW = cv2.threshold(smooth_HW, (low + otsu) / 2, 1, cv2.THRESH_BINARY)
    bright_HW = cv2.copyMakeBorder(bright_HW, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    bright_HW = cv2.morphologyEx(bright_HW, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))[1:-1, 1:-1]
    contours, _ = cv2.findContours(bright_HW, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    shape_HW, all_HW = np.zeros_like(bright_HW), np.zeros_like(bright_HW)
    if not contours:
        return Shape(int(high - low)), all_HW
    largest = np.asarray(max(contours, key=cv2.contourArea))
    cv2.drawContours(shape_HW, [largest], -1, 1, cv2.FILLED)
    cv2.drawContours(all_HW, contours, -1, 1, cv2.FILLED)
    covered, hull = int(cv2.countNonZero(shape_HW)), cv2.convexHull(largest)
    hull_HW = np.zeros_like(bright_HW)
    cv2.fillConvexPoly(hull_HW, hull, 1)
    frame = np.concatenate([all_HW[0], all_HW[-1], all_HW[:, 0], all_HW[:, -1]])
    _, _, width, height = cv2.boundingRect(largest)
    shape = Shape(
        contrast=int(high - low),
        area=covered / small_HW.size,
        solidity=covered / cv2.countNonZero(hull_HW),
        fill=cv2.countNonZero(cv2.bitwise_and(shape_HW, bright_HW)) / covered,
        rest=(cv2.countNonZero(all_HW) - covered) / small_HW.size,
        dark_frame=1.0 - float(frame.mean()),
        width_px=width * scale,
        height_px=height * scale,
    )
    return shape, all_HW


def count_letters(image_HW: np.ndarray, shapes_HW: np.ndarray) -> tuple[int, int]:
    """Return how many thin bright marks of the size of letters lie on the dark ground, and in all.

    A word whose letters run together counts as often as it is longer than high.

    Args:
        image_HW: uint8, of some 256 px a side: on smaller copies letters run together.
        shapes_HW: mask of the bright shapes on a smaller copy; what is thick in it, with what lies
            between its ends, is no ground.
    """
    height, width = image_HW.shape
    thick_HW = cv2.morphologyEx(shapes_HW, cv2.MORPH_OPEN, np.ones((7, 7), np.uint8))
    for outline in cv2.findContours(thick_HW, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]:
        cv2.fillConvexPoly(thick_HW, cv2.convexHull(outline), 1)
    thick_HW = cv2.dilate(thick_HW, np.ones((13, 13), np.uint8))  # the scalp around a brain
    thick_HW = cv2.resize(thick_HW, (width, height), interpolation=cv2.INTER_NEAREST)
    thin_HW = cv2.morphologyEx(image_HW, cv2.MORPH_TOPHAT, np.ones((9, 9), np.uint8))
    _, marks_HW = cv2.threshold(thin_HW, _MIN_INK, 1, cv2.THRESH_BINARY)
    find = cv2.connectedComponentsWithStatsWithAlgorithm  # BBDT: a third of the default's time
    _, _, boxes_L5, centres_L2 = find(marks_HW, 8, cv2.CV_32S, cv2.CCL_BBDT)
    _, _, wide, high, ink = boxes_L5[1:].T
    fits = (high >= 4) & (high <= 0.07 * max(height, width)) & (wide <= 6 * high) & (ink >= 6)
    letters = np.maximum(wide / high, 1.0)[fits]
    x, y = centres_L2[1:][fits].astype(int).T
    return int(letters[thick_HW[y, x] == 0].sum()), int(letters.sum())


def _reduced(image_HW: np.ndarray, side_px: int) -> np.ndarray:
    """Return an image whose longer side has at most so many pixels, by averaging."""
    height, width = image_HW.shape
    factor = side_px / max(height, width)
    if factor >= 1:
        return image_HW
    size = max(1, round(width * factor)), max(1, round(height * factor))
    reduced_HW: np.ndarray = cv2.resize(image_HW, size, interpolation=cv2.INTER_AREA)
    return reduced_HW
