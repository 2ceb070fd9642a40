"""Pictures: how they are turned, named, limited, and that no damage passes unnoticed."""

import cv2
import numpy as np
import pytest
from PIL import Image

from bt_core.errors import ScanError
from bt_core.scans import decoded, pictures
from bt_core.scans.formats import decode_scan
from tests.scan_files import (
    GREY,
    GREY16,
    RGB,
    SMOOTH,
    SMOOTH_RGB,
    STORED,
    VOLUME,
    between_percentiles,
    dicom_object,
    encode,
    nifti,
    palette,
    png_claiming,
    with_alpha,
)

DEPTH16_STEP = "percentile scaling to 8 bit"
JPEG = encode(SMOOTH, "JPEG")
PNG = encode(GREY, "PNG")
NOISE_PNG = encode(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8), "PNG")


def reason_of(content: bytes, hint: str = "") -> str:
    with pytest.raises(ScanError) as caught:
        decode_scan(content, hint)
    return caught.value.reason


def test_16_bits_are_scaled_between_percentiles() -> None:
    scan = decode_scan(encode(GREY16, "PNG"))
    assert scan.bit_depth == 16
    assert scan.steps == (DEPTH16_STEP,)


def test_float_tiff_ignores_values_that_are_not_finite() -> None:
    values = GREY.astype(np.float32) / 100 - 1
    holed = values.copy()
    holed[3, 4], holed[5, 6] = np.nan, np.inf
    scan = decode_scan(encode(holed, "TIFF"))
    assert scan.bit_depth == 32
    assert scan.steps == ("2 values that are not finite left out", DEPTH16_STEP)
    finite = np.isfinite(holed)
    difference = np.abs(scan.image_HW - between_percentiles(values))[finite]
    assert difference.max() <= 1
    assert scan.image_HW[3, 4] == scan.image_HW[5, 6] == 0


def test_steps_say_what_was_done() -> None:
    assert decode_scan(encode(GREY, "PNG")).steps == ()
    assert decode_scan(encode(RGB, "PNG")).steps == ("colour to grey",)
    assert decode_scan(encode(with_alpha(RGB), "PNG")).steps == ("alpha dropped", "colour to grey")


# Where the first stored row and the first stored column lie in the upright picture (TIFF 6.0).
ORIENTATIONS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """Return the pixels that a file with this orientation stores for an upright picture."""
    first_row, first_column = ORIENTATIONS[orientation]
    if "bottom" in (first_row, first_column):
        upright = upright[::-1]
    if "right" in (first_row, first_column):
        upright = upright[:, ::-1]
    swapped = first_row in ("left", "right")
    return np.ascontiguousarray(upright.T if swapped else upright)


def lopsided() -> np.ndarray:
    """Return a picture without any symmetry, in blocks that JPEG keeps exactly."""
    upright = np.full((40, 56), 20, np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = 200, 120, 60
    return upright


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_orientation_tag_gives_the_upright_picture(orientation: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(file_format, {})
    stored = stored_as(lopsided(), orientation)
    scan = decode_scan(encode(stored, file_format, exif=exif, **options))
    assert scan.image_HW.shape == lopsided().shape
    assert np.abs(scan.image_HW.astype(int) - lopsided()).max() <= 2
    assert scan.image_HW.flags.c_contiguous


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode_scan(encode(lopsided(), "PNG", exif=exif)).image_HW, lopsided())


@pytest.mark.parametrize("hint", ["scan.jpg", "scan.txt", "scan.dcm", "application/dicom", ""])
def test_content_decides_the_format_not_the_name(hint: str) -> None:
    scan = decode_scan(encode(GREY, "PNG"), hint)
    assert scan.format == "PNG"
    assert np.array_equal(scan.image_HW, GREY)


@pytest.mark.parametrize(
    ("content", "hint", "step"),
    [
        (encode(SMOOTH, "JPEG"), "a.b/scan.png", "content is JPEG, name ends in .png"),
        (encode(GREY, "PNG"), "SCAN.JPG", "content is PNG, name ends in .jpg"),
        (encode(GREY, "PNG"), "scan.nii.gz", "content is PNG, name ends in .gz"),
        (dicom_object(STORED), "scan.tif", "content is DICOM, name ends in .tif"),
        (nifti(VOLUME.astype("i2")), "scan.dcm", "content is NIFTI, name ends in .dcm"),
    ],
)
def test_a_name_that_lies_is_recorded(content: bytes, hint: str, step: str) -> None:
    assert decode_scan(content, hint).steps == (step, *decode_scan(content).steps)


@pytest.mark.parametrize("hint", ["scan.jpg", "scan.JPEG", "image/png", "scan", "jpg.patient"])
def test_a_name_that_does_not_lie_is_not(hint: str) -> None:
    assert decode_scan(encode(GREY, "JPEG"), hint).steps == ()


def test_the_smallest_side_is_accepted() -> None:
    assert decode_scan(encode(GREY[:32, :32], "PNG")).image_HW.shape == (32, 32)


def test_one_flipped_byte_in_png_data_is_corrupt() -> None:
    middle = NOISE_PNG.index(b"IDAT") + len(NOISE_PNG) // 2
    damaged = bytearray(NOISE_PNG)
    damaged[middle] ^= 0xFF
    assert reason_of(bytes(damaged)) == "corrupt_image"


def test_no_flipped_bit_in_png_data_passes_unnoticed() -> None:
    start = PNG.index(b"IDAT") + 4
    end = PNG.index(b"IEND") - 4
    for position in range(start, end):
        damaged = bytearray(PNG)
        damaged[position] ^= 0x01
        assert reason_of(bytes(damaged)) in ("corrupt_image", "truncated_image"), position


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (8_000, 8_000),
        (10_000, 10_000),
        (20_000, 20_000),
        (20_000, 100),
        (100, 20_000),
        (2**31 - 1, 2**31 - 1),
    ],
)
def test_a_huge_size_in_the_header_is_refused_before_decoding(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    monkeypatch.setattr(cv2, "imdecode", lambda *_: decoded.append(1))
    assert reason_of(png_claiming(width, height)) == "image_too_large"
    assert decoded == []


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (6_324, 6_324, None),
        (6_325, 6_325, "image_too_large"),
        (16_384, 100, None),
        (16_385, 100, "image_too_large"),
        (32, 32, None),
        (31, 5_000, "image_too_small"),
    ],
)
def test_size_limits(width: int, height: int, reason: str | None) -> None:
    if reason is None:
        decoded.check_size(width, height)
        return
    with pytest.raises(ScanError) as caught:
        decoded.check_size(width, height)
    assert caught.value.reason == reason
    assert f"{width}x{height}" in caught.value.detail


def test_a_plain_jpeg_and_one_with_exif_give_the_same_pixels() -> None:
    """The first is opened without Pillow."""
    exif = Image.Exif()
    exif[0x010E] = "a description"
    plain, described = encode(SMOOTH_RGB, "JPEG"), encode(SMOOTH_RGB, "JPEG", exif=exif)
    assert pictures._open_plain_jpeg(plain) is not None
    assert pictures._open_plain_jpeg(described) is None
    assert np.array_equal(decode_scan(plain).image_HW, decode_scan(described).image_HW)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("colour", [False, True])
def test_a_jpeg_cut_anywhere_and_given_an_end_is_refused(progressive: bool, colour: bool) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (96, 96, 3 if colour else 1), np.uint8)
    content = encode(noise.squeeze(), "JPEG", quality=90, progressive=progressive)
    decode_scan(content)
    data = content.index(b"\xff\xda") + 14
    for end in range(data, len(content) - 600, (len(content) - data) // 25):
        assert reason_of(content[:end] + b"\xff\xd9") == "truncated_image", end


VALID_FILES = {
    "png": PNG,
    "png16": encode(GREY16, "PNG"),
    "png palette": encode(palette(), "PNG"),
    "jpeg": JPEG,
    "jpeg progressive": encode(SMOOTH, "JPEG", progressive=True),
    "jpeg rgb": encode(SMOOTH_RGB, "JPEG", exif=Image.Exif()),
    "bmp": encode(RGB, "BMP"),
    "tiff": encode(GREY, "TIFF"),
    "tiff lzw": encode(RGB, "TIFF", compression="tiff_lzw"),
    "webp": encode(RGB, "WEBP"),
    "webp lossless": encode(RGB, "WEBP", lossless=True),
    "dicom": dicom_object(STORED),
    "nifti": nifti(VOLUME.astype("i2")),
    "nifti gz": nifti(VOLUME.astype("i2"), packed=True),
}


@pytest.mark.parametrize("name", VALID_FILES)
def test_a_file_that_ends_early_is_refused(name: str) -> None:
    content = VALID_FILES[name]
    for end in range(0, len(content), max(1, len(content) // 40)):
        with pytest.raises(ScanError):
            decode_scan(content[:end])
