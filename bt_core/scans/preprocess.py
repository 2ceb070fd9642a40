"""From a decoded scan to the square uint8 pixels that shards store.

The second step, from pixels to a model's input tensor, is `models.inputs`; decoding needs no torch.
Array names: H height, W width, S output side.
"""

from typing import Annotated, Final, Literal, Self

import cv2
import numpy as np
from pydantic import Field, PositiveFloat, model_validator

from bt_core import storage
from bt_core.config import StrictModel
from bt_core.scans.intensity import to_uint8

Box = tuple[int, int, int, int]
"""Left, top, width and height in pixels."""
Percent = Annotated[float, Field(ge=0, le=100)]

_INTERPOLATIONS: Final = {
    "nearest": cv2.INTER_NEAREST,
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
    "lanczos": cv2.INTER_LANCZOS4,
}


class ClaheSpec(StrictModel):
    """Contrast-limited adaptive histogram equalisation."""

    clip_limit: float = Field(2.0, gt=0, le=40)
    grid: int = Field(8, ge=1, le=32)
    """Tiles per side."""


class PreprocessSpec(StrictModel):
    """What is done to a decoded grey scan; travels with every model."""

    size_px: int = Field(224, ge=32, le=1024)
    """Side of the square output."""
    crop_to_head: bool = False
    """Crop to the bounding box of the largest bright region before resizing."""
    fit: Literal["stretch", "pad"] = "stretch"
    """Stretch to the square, or keep the aspect ratio and pad with black."""
    interpolation: Literal["auto", "nearest", "linear", "cubic", "area", "lanczos"] = "auto"
    """Of the resize; auto averages areas to shrink and interpolates linearly to enlarge."""
    clip_percentiles: tuple[Percent, Percent] | None = None
    """Intensities of the (cropped) image that become 0 and 255; what is beyond them is clipped."""
    equalize: bool = False
    """Equalise the histogram of the whole (cropped) image; not together with `clahe`."""
    clahe: ClaheSpec | None = None
    channels: Literal[1, 3] = 3
    """Of a model's input: grey repeated to three, as ImageNet backbones expect, or once."""
    normalize: Literal["backbone", "unit", "zscore"] = "backbone"
    """What a model is given: `(x - mean) / std` of pixels x in [0, 1], by default with the
    backbone's own numbers; x itself; or each image with mean 0 and standard deviation 1."""
    mean: tuple[float, float, float] | None = None
    """Per channel, subtracted after scaling to [0, 1]; None means the backbone's own. One channel
    takes the average."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Per channel, divided by after `mean`; None means the backbone's own."""

    @property
    def pixel_digest(self) -> str:
        """Digest of the fields that decide the uint8 pixels, and so which shards can be shared."""
        return storage.digest_of(self.model_dump(exclude={"channels", "normalize", "mean", "std"}))

    @property
    def digest(self) -> str:
        """Digest of the whole spec."""
        return storage.digest_of(self.model_dump())

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.equalize and self.clahe is not None:
            raise ValueError("use equalize or clahe, not both")
        if self.clip_percentiles and self.clip_percentiles[0] >= self.clip_percentiles[1]:
            raise ValueError(f"clip_percentiles must rise, got {self.clip_percentiles}")
        if self.normalize != "backbone" and (self.mean or self.std):
            raise ValueError(f"mean and std have no effect with normalize {self.normalize}")
        return self


def preprocess_pixels(image_HW: np.ndarray, spec: PreprocessSpec) -> np.ndarray:
    """Return image_SS uint8: crop, clip percentiles, equalise or CLAHE, pad, resize."""
    if spec.crop_to_head:
        image_HW = crop_to_head(image_HW)
    if spec.clip_percentiles is not None:
        low, high = np.percentile(image_HW, spec.clip_percentiles)
        if low < high:  # else the image is all but flat, and has nothing to stretch
            image_HW = to_uint8(image_HW, low, high)
    if spec.equalize:
        image_HW = cv2.equalizeHist(image_HW)
    if spec.clahe is not None:
        grid = (spec.clahe.grid, spec.clahe.grid)
        image_HW = cv2.createCLAHE(spec.clahe.clip_limit, grid).apply(image_HW)
    if spec.fit == "pad":
        image_HW = _pad_to_square(image_HW)
    shrinking = min(image_HW.shape) > spec.size_px
    automatic = "area" if shrinking else "linear"
    method = _INTERPOLATIONS[automatic if spec.interpolation == "auto" else spec.interpolation]
    size = (spec.size_px, spec.size_px)
    image_SS: np.ndarray = cv2.resize(image_HW, size, interpolation=method)
    return image_SS


def seen_box(image_HW: np.ndarray, spec: PreprocessSpec) -> Box:
    """Return what of a decoded image `preprocess_pixels` shows; padding lies outside of it."""
    left, top, width, height = 0, 0, image_HW.shape[1], image_HW.shape[0]
    contour = _head_contour(image_HW) if spec.crop_to_head else None
    if contour is not None:
        left, top, width, height = cv2.boundingRect(contour)
    if spec.fit == "pad":
        side = max(width, height)
        left, top = left - (side - width) // 2, top - (side - height) // 2
        width = height = side
    return left, top, width, height


def crop_to_head(image_HW: np.ndarray) -> np.ndarray:
    """Return the bounding box of the largest region above Otsu's threshold, as a view (h, w).

    The image is returned whole if that region covers less than a tenth of it: then no head was
    found.

    Args:
        image_HW: uint8.
    """
    contour = _head_contour(image_HW)
    if contour is None:
        return image_HW
    x, y, width, height = cv2.boundingRect(contour)
    return image_HW[y : y + height, x : x + width]


def head_mask(image_HW: np.ndarray) -> np.ndarray:
    """Return mask_HW bool: that region with what it encloses; all of the image without a head."""
    contour = _head_contour(image_HW)
    if contour is None:
        return np.ones(image_HW.shape, dtype=bool)
    mask_HW = np.zeros(image_HW.shape, np.uint8)
    cv2.drawContours(mask_HW, [cv2.convexHull(contour)], -1, 1, thickness=cv2.FILLED)
    return mask_HW.astype(bool)


def _head_contour(image_HW: np.ndarray) -> np.ndarray | None:
    """Return the largest bright region's outline, or None if its box is below a tenth."""
    smooth = cv2.GaussianBlur(image_HW, (5, 5), 0)
    _, mask = cv2.threshold(smooth, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return None
    largest = np.asarray(max(contours, key=cv2.contourArea))
    _, _, width, height = cv2.boundingRect(largest)
    return None if width * height < 0.1 * image_HW.size else largest


def _pad_to_square(image_HW: np.ndarray) -> np.ndarray:
    height, width = image_HW.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return np.pad(image_HW, ((top, side - height - top), (left, side - width - left)))


def golden_image() -> np.ndarray:
    """Return a fixed image (160, 144) uint8 of integers alone: a textured disc on black."""
    y, x = np.mgrid[0:160, 0:144]
    disc = (x - 72) ** 2 + (y - 80) ** 2 < 64**2
    return np.where(disc, (x * 7 + y * 13 + x * y // 11) % 256, 0).astype(np.uint8)
