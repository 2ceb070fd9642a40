"""The drawing of synthetic head-MRI slices: heads, tissues under three contrasts, and three masses.

Drawn from numbers alone: no patient, no atlas, no claim of anatomical truth. All shapes are soft
masks over head coordinates, so a seed shows the same head at every size.

Legend: H, W = rows, columns; u to the right, v to the back, in units of the head's half axes (scalp
at radius 1, inner skull table at `_BRAIN`); intensities in [0, 1]; c = canvas, t = contrast. All
arrays of a canvas are float32 (H, W).
"""

import hashlib
import math
from typing import Final, NamedTuple

import cv2
import numpy as np

from bt_core.labels import LABEL_SPACES

CLASS_NAMES: Final = LABEL_SPACES["four_class"].names
_BASE_SHARE: Final = {"glioma": 0.15, "meningioma": 0.15, "no_tumor": 0.3, "pituitary": 0.85}
"""Share of slices at the skull base; every class has some: the level alone must not tell it."""
_BRAIN: Final = 0.84
_MIN_SIZE_PX: Final = 32


class _Contrast(NamedTuple):
    """Intensities of tissues under one pulse sequence."""

    csf: float
    grey: float
    white: float
    fat: float
    tumor: float
    edema: float


_CONTRASTS: Final = (  # in the manner of T1 with contrast agent, T2, FLAIR
    _Contrast(csf=0.10, grey=0.38, white=0.54, fat=0.85, tumor=0.92, edema=0.30),
    _Contrast(csf=0.92, grey=0.50, white=0.36, fat=0.66, tumor=0.88, edema=0.60),
    _Contrast(csf=0.09, grey=0.46, white=0.36, fat=0.60, tumor=0.86, edema=0.64),
)


class _Plan(NamedTuple):
    """What a slice shows: its level, and the mass in head coordinates."""

    at_base: bool
    u: float
    v: float
    radius: float
    push: float  # mass effect in [0, 1): how far anatomy gives way
    on_falx: bool = False


class _Canvas:
    """Head coordinates of every pixel, and the image drawn on them."""

    def __init__(self, rng: np.random.Generator, size_px: int) -> None:
        self.rng, self.size_px = rng, size_px
        half_v = rng.uniform(0.84, 0.94)
        half_u = half_v * rng.uniform(0.76, 0.9)
        turn, shift_x, shift_y = rng.uniform((-12, -0.03, -0.03), (12, 0.03, 0.03)).tolist()
        c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        axis = ((np.arange(size_px) + 0.5) * 2 / size_px - 1).astype(np.float32)
        x, y = axis[None, :] - shift_x, axis[:, None] - shift_y
        self.v = (c * y - s * x) / half_v
        self.u = (c * x + s * y) / half_u / (1 + 0.07 * self.v)
        self.pixel = 2 / size_px / half_u
        self.r = np.sqrt(self.u**2 + self.v**2) * (1 + 0.012 * self.field(4))
        self.image = np.zeros((size_px, size_px), np.float32)

    def field(self, cells: int) -> np.ndarray:
        """Return smooth noise_HW of about unit spread with `cells` bumps across the image."""
        coarse = self.rng.standard_normal((cells, cells), np.float32) * 1.3
        size = (self.size_px, self.size_px)
        return np.asarray(cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC))

    def inside(self, depth: np.ndarray, softness: float = 1.0) -> np.ndarray:
        """Return the anti-aliased mask_HW, [0, 1], of a depth_HW in head units, positive inside."""
        return np.clip(depth / (self.pixel * softness) + 0.5, 0, 1)

    def paint(self, mask: np.ndarray, value: float | np.ndarray) -> None:
        """Blend a value, one or (H, W), into the image where the mask_HW, in [0, 1], says so."""
        self.image += mask * (value - self.image)

    def ellipse(self, u: float, v: float, ru: float, rv: float, degrees: float = 0.0) -> np.ndarray:
        """Return the depth_HW inside an ellipse, in head units; positive angles turn clockwise."""
        du, dv = self.u - u, self.v - v
        if degrees:
            c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            du, dv = c * du + s * dv, c * dv - s * du
        depth: np.ndarray = (1 - np.sqrt((du / ru) ** 2 + (dv / rv) ** 2)) * min(ru, rv)
        return depth

    def bend(self, plan: _Plan) -> None:
        """Make the coordinates give way to the mass; the skull (`r`) stays."""
        du, dv = self.u - plan.u, self.v - plan.v
        keep = 1 - plan.push * np.exp(-(du**2 + dv**2) / (1.8 * plan.radius) ** 2)
        self.u, self.v = plan.u + du * keep, plan.v + dv * keep


def _make_plan(class_name: str, rng: np.random.Generator) -> _Plan:
    """Choose the level and the place of the mass."""
    at_base = rng.random() < _BASE_SHARE[class_name]
    side, end = (float(sign) for sign in rng.choice((-1.0, 1.0), 2))
    if class_name == "glioma":
        radius = rng.uniform(0.18, 0.23) if at_base else rng.uniform(0.17, 0.28)
        v = rng.uniform(-0.08, 0.05) if at_base else rng.uniform(-0.38, 0.38)
        return _Plan(at_base, side * rng.uniform(0.32, 0.42), v, radius, rng.uniform(0.1, 0.45))
    if class_name == "meningioma":
        radius = rng.uniform(0.17, 0.28)
        if not at_base and rng.random() < 0.25:
            v = end * rng.uniform(0.48, 0.6)
            return _Plan(at_base, side * 0.35 * radius, v, radius, push=0.4, on_falx=True)
        angle = math.radians(rng.uniform(-15, 60) if at_base else rng.uniform(-70, 70))
        far = _BRAIN - rng.uniform(0.25, 0.6) * radius
        return _Plan(at_base, side * far * math.cos(angle), far * math.sin(angle), radius, push=0.4)
    u, v = rng.uniform(-0.02, 0.02), rng.uniform(0.0, 0.06)
    return _Plan(at_base, u, v, rng.uniform(0.13, 0.21), 0.3 if class_name == "pituitary" else 0)


def _draw_parenchyma(c: _Canvas, t: _Contrast, depth: np.ndarray, folds: np.ndarray) -> None:
    """Draw CSF, folded cortex and white matter, given the depth below the brain's surface."""
    c.paint(c.inside(depth + 0.02), t.csf)
    c.paint(c.inside(depth), t.white + 0.012 * c.field(24))
    cortex = np.clip((0.1 - depth) / 0.04, 0, 1)
    ribbon = np.exp(-((folds / 0.5) ** 2)) * np.clip((0.28 - depth) / 0.1, 0, 1)
    c.paint(np.maximum(cortex, ribbon) * c.inside(depth), t.grey)
    sulci = np.exp(-((folds / 0.17) ** 2)) * np.clip((0.2 - depth) / 0.1, 0, 1)
    c.paint(0.85 * sulci * c.inside(depth), t.csf)


def _draw_upper_level(c: _Canvas, t: _Contrast, ventricle: float) -> None:
    """Draw a slice through the lateral ventricles; `ventricle` scales their size."""
    brain = _BRAIN - c.r
    _draw_parenchyma(c, t, brain, c.field(21))
    fissure = c.inside(np.minimum(brain, 0.012 - np.abs(c.u + 0.008 * c.field(8))))
    c.paint(fissure * np.clip((np.abs(c.v) - 0.36) / 0.06, 0, 1), t.csf)
    c.u = np.abs(c.u)  # draws left and right at once
    c.paint(0.8 * c.inside(c.ellipse(0.16, 0.1, 0.1, 0.15, -25), 3), t.grey)
    c.paint(0.8 * c.inside(c.ellipse(0.3, -0.06, 0.06, 0.2, -14), 3), t.grey)
    front = c.ellipse(0.105, -0.2, 0.065 * ventricle, 0.17 * ventricle, 24)
    back = c.ellipse(0.2, 0.28, 0.06 * ventricle, 0.19 * ventricle, -24)
    third = c.ellipse(0, 0.06, 0.016, 0.11)
    c.paint(c.inside(np.maximum(np.maximum(front, back), third), 1.5), t.csf)


def _draw_base_level(c: _Canvas, t: _Contrast) -> None:
    """Draw a slice at the skull base: orbits, sinuses, temporal lobes, petrous bone, cerebellum."""
    c.u = np.abs(c.u)  # draws left and right at once
    c.paint(c.inside(0.88 - c.r), 0.2 + 0.05 * c.field(20))
    _draw_parenchyma(c, t, c.ellipse(0.47, -0.02, 0.3, 0.3), c.field(18))
    folia = 0.25 + np.sin(c.v * 50 + 8 * c.u**2 + 0.8 * c.field(5))
    _draw_parenchyma(c, t, c.ellipse(0, 0.53, 0.55, 0.27), folia)
    c.paint(c.inside(c.ellipse(0, 0.12, 0.2, 0.16)), t.csf)  # basal cistern
    c.paint(c.inside(c.ellipse(0, 0.25, 0.17, 0.14), 2), t.white)  # pons
    c.paint(c.inside(c.ellipse(0, 0.41, 0.07, 0.035), 1.5), t.csf)  # fourth ventricle
    c.paint(c.inside(c.ellipse(0.5, 0.27, 0.28, 0.06, 14), 1.5), 0.05)  # petrous bone
    c.paint(c.inside(c.ellipse(0.32, 0.22, 0.09, 0.025, 14), 1.5), 0.9 * t.fat)  # its marrow
    c.paint(c.inside(c.ellipse(0.36, -0.55, 0.22, 0.27, 16)), 0.9 * t.fat)  # orbit
    c.paint(c.inside(c.ellipse(0.36, -0.62, 0.15, 0.14)), 0.06)  # eye: wall and inside
    c.paint(c.inside(c.ellipse(0.36, -0.62, 0.13, 0.12)), max(t.csf, 0.22))
    c.paint(c.inside(c.ellipse(0, -0.52, 0.11, 0.3)), 0.03)  # nasal cavity
    c.paint(c.inside(c.ellipse(0, -0.2, 0.15, 0.1)), 0.03)  # sphenoid sinus
    c.paint(c.inside(c.ellipse(0, 0.02, 0.055, 0.035)), t.grey)  # pituitary gland


def _glioma(c: _Canvas, t: _Contrast, plan: _Plan) -> None:
    """Draw a ragged ring with a dark core and a halo of oedema, inside the brain."""
    brain = c.inside(_BRAIN - 0.04 - c.r, 2)
    stretch, turn = c.rng.uniform(0.75, 1.0), c.rng.uniform(0, 180)
    ragged = 0.16 * plan.radius * c.field(9) + 0.1 * plan.radius * c.field(18)
    depth = c.ellipse(plan.u, plan.v, plan.radius, plan.radius * stretch, turn) + ragged
    halo = np.clip((depth + plan.radius * c.rng.uniform(0.5, 0.8)) / (0.3 * plan.radius), 0, 1)
    c.paint(0.9 * halo * brain, t.edema)
    c.paint(c.inside(depth, 2) * brain, t.tumor * (0.86 + 0.1 * c.field(16)))
    core = depth - plan.radius * c.rng.uniform(0.3, 0.42) + 0.08 * plan.radius * c.field(14)
    c.paint(c.inside(core, 2) * brain, 0.15 + 0.04 * c.field(20))


def _meningioma(c: _Canvas, t: _Contrast, plan: _Plan) -> None:
    """Draw a smooth even mass with a broad base on the inner skull table or on the falx."""
    turn = 0.0 if plan.on_falx else math.degrees(math.atan2(plan.v, plan.u))
    depth = c.ellipse(plan.u, plan.v, plan.radius, plan.radius * c.rng.uniform(1.0, 1.25), turn)
    table = _BRAIN + 0.015 - c.r
    if plan.on_falx:
        table = np.minimum(table, math.copysign(1, plan.u) * c.u)
    c.paint(0.7 * c.inside(np.minimum(depth + 0.03, table)), min(t.csf, 0.6 * t.white))
    c.paint(c.inside(np.minimum(depth, table), 1.3), 0.95 * t.tumor)
    tail = np.minimum(depth + 0.35 * plan.radius, 0.018 - np.abs(table - 0.012))
    c.paint(0.8 * c.inside(tail), 0.9 * t.tumor)


def _pituitary(c: _Canvas, t: _Contrast, plan: _Plan) -> None:
    """Draw a bright round mass on the centre line, in and above the sella."""
    high = plan.radius * c.rng.uniform(0.8, 1.1)
    depth = c.ellipse(plan.u, plan.v, plan.radius, high) + 0.04 * plan.radius * c.field(8)
    c.paint(0.8 * c.inside(depth + 0.025), 0.06)
    c.paint(c.inside(depth, 1.5), t.tumor * (0.98 + 0.03 * c.field(16)))


_DRAW_MASS: Final = {"glioma": _glioma, "meningioma": _meningioma, "pituitary": _pituitary}


def stable_int(text: str) -> int:
    """Return the same integer for the same text, in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def render(class_name: str, seed: int, size_px: int) -> np.ndarray:
    """Return a slice as float32 (H, W) in [0, 1].

    Raises:
        ValueError: for an unknown class, or a size at which no head can be seen.
    """
    if class_name not in CLASS_NAMES:
        raise ValueError(f"unknown class {class_name!r}; valid names: {', '.join(CLASS_NAMES)}")
    if size_px < _MIN_SIZE_PX:
        raise ValueError(f"size_px = {size_px} is too small to show a head; use >= {_MIN_SIZE_PX}")
    rng = np.random.default_rng(stable_int(f"{class_name}/{seed}"))
    plan = _make_plan(class_name, rng)
    t = _CONTRASTS[rng.integers(len(_CONTRASTS))]
    t = t._replace(tumor=t.tumor * rng.uniform(0.86, 1.04))
    c = _Canvas(rng, size_px)
    straight = c.u, c.v
    c.paint(c.inside(1 - c.r), t.fat * (1 + 0.05 * c.field(12)))  # scalp
    c.paint(c.inside(0.94 - c.r), 0.04)  # skull
    c.paint(0.6 * c.inside(0.012 - np.abs(c.r - 0.9)), 0.45 * t.fat)  # its marrow
    c.bend(plan)
    if plan.at_base:
        _draw_base_level(c, t)
    else:
        small = 0.6 if class_name == "pituitary" else 1.0
        _draw_upper_level(c, t, ventricle=small * rng.uniform(0.75, 1.25))
    c.u, c.v = straight
    if class_name in _DRAW_MASS:
        _DRAW_MASS[class_name](c, t, plan)
    bias = 1 + rng.uniform(0.03, 0.1) * c.field(3)
    image = cv2.GaussianBlur(c.image * bias, (0, 0), rng.uniform(0.002, 0.0045) * size_px)
    noise = rng.uniform(0.008, 0.028) * rng.standard_normal((2, size_px, size_px), np.float32)
    magnitude: np.ndarray = np.hypot(image + noise[0], noise[1])  # hence the noise is Rician
    return magnitude.clip(0, 1)
