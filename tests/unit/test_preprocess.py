"""Preprocessing gives the square pixels that its spec asks for, and its digests say which."""

import hashlib

import cv2
import numpy as np
import pytest
from pydantic import ValidationError

from bt_core.config import parse
from bt_core.errors import ConfigError
from bt_core.scans.preprocess import (
    ClaheSpec,
    PreprocessSpec,
    crop_to_head,
    golden_image,
    preprocess_pixels,
)

NOISE = np.random.default_rng(0).integers(0, 256, (128, 128)).astype(np.uint8)


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("clahe", [None, {"clip_limit": 2.0, "grid": 8}])
@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (40, 300), (301, 33), (500, 400)])
def test_output_is_square_uint8_of_the_asked_size(
    fit: str, crop: bool, clahe: dict[str, float] | None, shape: tuple[int, int]
) -> None:
    spec = PreprocessSpec(size_px=64, fit=fit, crop_to_head=crop, clahe=clahe)
    image_HW = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    before = image_HW.copy()
    image_SS = preprocess_pixels(image_HW, spec)
    assert image_SS.shape == (64, 64)
    assert image_SS.dtype == np.uint8
    assert np.array_equal(image_HW, before), "the input is left alone"


def test_shrinking_averages_areas() -> None:
    blocks = NOISE.reshape(64, 2, 64, 2).astype(float).mean(axis=(1, 3))
    image_SS = preprocess_pixels(NOISE, PreprocessSpec(size_px=64))
    assert np.abs(image_SS - blocks).max() <= 0.51


def test_enlarging_interpolates_linearly() -> None:
    ramp = np.tile(np.arange(0, 160, 5, dtype=np.uint8), (32, 1))
    image_SS = preprocess_pixels(ramp, PreprocessSpec(size_px=64))
    centres = np.clip((np.arange(64) + 0.5) / 2 - 0.5, 0, 31)
    assert np.abs(image_SS - centres * 5).max() <= 1


def test_an_image_of_the_asked_size_is_unchanged() -> None:
    assert np.array_equal(preprocess_pixels(NOISE, PreprocessSpec(size_px=128)), NOISE)


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        ((64, 128), slice(16, 48), slice(0, 64)),
        ((128, 64), slice(0, 64), slice(16, 48)),
        ((128, 128), slice(0, 64), slice(0, 64)),
    ],
)
def test_pad_keeps_the_aspect_ratio_with_black_borders(
    shape: tuple[int, int], rows: slice, columns: slice
) -> None:
    image_SS = preprocess_pixels(
        np.full(shape, 200, np.uint8), PreprocessSpec(size_px=64, fit="pad")
    )
    expected = np.zeros((64, 64), np.uint8)
    expected[rows, columns] = 200
    assert np.array_equal(image_SS, expected)


def test_stretch_fills_the_square() -> None:
    image_SS = preprocess_pixels(np.full((64, 128), 200, np.uint8), PreprocessSpec(size_px=64))
    assert (image_SS == 200).all()


def low_contrast() -> np.ndarray:
    y, x = np.mgrid[0:128, 0:128]
    return (100 + 8 * np.sin(x / 9) * np.cos(y / 7)).astype(np.uint8)


def test_clahe_raises_a_low_contrast() -> None:
    plain = preprocess_pixels(low_contrast(), PreprocessSpec(size_px=128))
    weak = preprocess_pixels(
        low_contrast(), PreprocessSpec(size_px=128, clahe=ClaheSpec(clip_limit=2))
    )
    strong = preprocess_pixels(
        low_contrast(), PreprocessSpec(size_px=128, clahe=ClaheSpec(clip_limit=20))
    )
    assert plain.std() < 5
    assert weak.std() > 1.5 * plain.std()
    assert strong.std() > 1.5 * weak.std()


def head(top: int, left: int, height: int, width: int) -> np.ndarray:
    """Return a textured bright ellipse that fills the given box, on dark ground."""
    y, x = np.mgrid[0:200, 0:160]
    centre_y, centre_x = top + (height - 1) / 2, left + (width - 1) / 2
    inside = ((y - centre_y) / (height / 2)) ** 2 + ((x - centre_x) / (width / 2)) ** 2 <= 1
    return np.where(inside, 150 + (x * 3 + y * 5) % 60, 4).astype(np.uint8)


@pytest.mark.parametrize("box", [(30, 20, 120, 90), (0, 0, 100, 80), (90, 60, 110, 100)])
def test_crop_finds_the_box_of_the_head(box: tuple[int, int, int, int]) -> None:
    top, left, height, width = box
    image_HW = head(*box)
    image_HW[199, 0] = image_HW[0, 159] = 255  # specks of noise do not widen the box
    cropped = crop_to_head(image_HW)
    offset = cropped.__array_interface__["data"][0] - image_HW.__array_interface__["data"][0]
    found = (*divmod(offset, image_HW.shape[1]), *cropped.shape)
    assert found == pytest.approx((top, left, height, width), abs=4)


@pytest.mark.parametrize(
    "image_HW",
    [
        pytest.param(np.zeros((64, 80), np.uint8), id="black"),
        pytest.param(np.full((64, 80), 255, np.uint8), id="white"),
        pytest.param(np.full((64, 80), 77, np.uint8), id="grey"),
        pytest.param(head(90, 70, 30, 30), id="a bright spot of under a tenth"),
    ],
)
def test_crop_leaves_an_image_without_a_head_whole(image_HW: np.ndarray) -> None:
    assert np.array_equal(crop_to_head(image_HW), image_HW)


def test_cropping_comes_before_resizing() -> None:
    spec = PreprocessSpec(size_px=64, crop_to_head=True)
    image_SS = preprocess_pixels(head(50, 40, 100, 80), spec)
    assert (image_SS[32] > 100).mean() > 0.9, "the head fills the width"
    plain = preprocess_pixels(head(50, 40, 100, 80), PreprocessSpec(size_px=64))
    assert (plain[32] > 100).mean() < 0.6


def test_each_interpolation_is_the_one_that_it_says() -> None:
    """Two pixels enlarged: nearest copies, linear stays between, cubic and lanczos overshoot."""
    step = np.repeat(np.array([[50, 200]], np.uint8), 16, axis=1).repeat(32, axis=0)

    def resized(method: str) -> np.ndarray:
        return preprocess_pixels(step, PreprocessSpec(size_px=100, interpolation=method))

    assert set(np.unique(resized("nearest"))) == {50, 200}
    linear = resized("linear")
    assert (linear.min(), linear.max()) == (50, 200)
    assert len(np.unique(linear)) > 2
    assert np.array_equal(linear, resized("auto")), "auto enlarges linearly"
    for method in ("cubic", "lanczos"):
        assert resized(method).min() < 50 < 200 < resized(method).max()
    assert not np.array_equal(resized("cubic"), resized("lanczos"))
    shrunk = PreprocessSpec(size_px=64, interpolation="area")
    assert np.array_equal(
        preprocess_pixels(NOISE, shrunk), preprocess_pixels(NOISE, PreprocessSpec(size_px=64))
    ), "auto averages areas to shrink"


def test_equalisation_makes_the_grey_levels_equally_frequent() -> None:
    dark = (np.linspace(0, 1, 128**2).reshape(128, 128) ** 0.5 * 120).astype(np.uint8)
    image_SS = preprocess_pixels(dark, PreprocessSpec(size_px=128, equalize=True))
    assert (image_SS.min(), image_SS.max()) == (0, 255)
    quartiles = np.percentile(image_SS, (25, 50, 75))
    assert np.abs(quartiles - (64, 128, 191)).max() < 5


def test_clipped_percentiles_become_black_and_white() -> None:
    ramp = np.tile(np.arange(200, dtype=np.uint8), (200, 1))
    image_SS = preprocess_pixels(ramp, PreprocessSpec(size_px=200, clip_percentiles=(10, 90)))
    low, high = np.percentile(ramp, (10, 90))
    expected = np.clip((np.arange(200) - low) / (high - low) * 255, 0, 255)
    assert np.abs(image_SS[0] - expected).max() <= 1
    spot = np.zeros((64, 64), np.uint8)
    spot[:4, :4] = 90
    kept = preprocess_pixels(spot, PreprocessSpec(size_px=64, clip_percentiles=(1, 90)))
    assert np.array_equal(kept, spot), "an image that is flat between them is left alone"


PLAIN = PreprocessSpec(clahe=ClaheSpec())


@pytest.mark.parametrize(
    "change",
    [
        {"size_px": 225},
        {"crop_to_head": True},
        {"fit": "pad"},
        {"clahe": None},
        {"clahe": {"clip_limit": 2.5}},
        {"clahe": {"grid": 4}},
        {"clahe": None, "equalize": True},
        {"interpolation": "cubic"},
        {"clip_percentiles": (1, 99)},
    ],
    ids=str,
)
def test_both_digests_react_to_what_changes_pixels(change: dict[str, object]) -> None:
    changed = PreprocessSpec(**{"clahe": {}, **change})
    assert changed.pixel_digest != PLAIN.pixel_digest
    assert changed.digest != PLAIN.digest


@pytest.mark.parametrize(
    "change",
    [
        {"mean": (0.5, 0.5, 0.5)},
        {"std": (0.2, 0.2, 0.2)},
        {"channels": 1},
        {"normalize": "unit"},
        {"normalize": "zscore"},
    ],
    ids=str,
)
def test_normalisation_leaves_the_pixel_digest_alone(change: dict[str, object]) -> None:
    changed = PreprocessSpec(clahe=ClaheSpec(), **change)
    assert changed.pixel_digest == PLAIN.pixel_digest
    assert changed.digest != PLAIN.digest


def test_every_field_has_been_thought_of_in_the_digest_tests() -> None:
    assert set(PreprocessSpec.model_fields) == {
        *("size_px", "crop_to_head", "fit", "interpolation"),
        *("clip_percentiles", "equalize", "clahe"),
        *("channels", "normalize", "mean", "std"),
    }
    assert set(ClaheSpec.model_fields) == {"clip_limit", "grid"}


@pytest.mark.parametrize(
    "content",
    [
        {"size": 224},
        {"clahe": {"limit": 2.0}},
        {"size_px": 31},
        {"size_px": 1025},
        {"fit": "crop"},
        {"clahe": {"clip_limit": 0}},
        {"clahe": {"grid": 33}},
        {"std": [0.2, 0.2, 0.0]},
        {"mean": [0.5]},
        {"interpolation": "bilinear"},
        {"clip_percentiles": [99, 1]},
        {"clip_percentiles": [-1, 99]},
        {"equalize": True, "clahe": {}},
        {"normalize": "zscore", "mean": [0.5, 0.5, 0.5]},
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused(content: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PreprocessSpec.model_validate(content)


def test_an_unknown_key_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'crop_to_head'"):
        parse(PreprocessSpec, {"crop_to_haed": True}, "recipe.yaml")


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        PLAIN.size_px = 100


def test_the_golden_image_never_changes() -> None:
    image_HW = golden_image()
    assert image_HW.shape == (160, 144)
    assert image_HW.dtype == np.uint8
    digest = hashlib.sha256(image_HW.tobytes()).hexdigest()
    assert digest == "caccae654092bff61ece3bb384c9fd9a63cc27e47bc89735fcf6d5639f37f51e"


def test_the_golden_image_shows_what_each_step_does() -> None:
    specs = [
        PreprocessSpec(),
        PreprocessSpec(crop_to_head=True),
        PreprocessSpec(fit="pad"),
        PreprocessSpec(clahe=ClaheSpec()),
        PreprocessSpec(equalize=True),
        PreprocessSpec(clip_percentiles=(2, 80)),
        PreprocessSpec(interpolation="nearest"),
    ]
    outputs = {preprocess_pixels(golden_image(), spec).tobytes() for spec in specs}
    assert len(outputs) == len(specs)
    resized = cv2.resize(golden_image(), (224, 224), interpolation=cv2.INTER_LINEAR)
    assert resized.tobytes() in outputs
