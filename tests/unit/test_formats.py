"""Pictures of every supported kind decode to the right pixels; every other input has a reason."""

import io
import struct
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

from bt_core.errors import ScanError
from bt_core.scans import formats
from bt_core.scans.formats import decode_scan

BT601 = np.array([0.299, 0.587, 0.114])
GREY = (np.add.outer(np.arange(40) * 3, np.arange(56) * 2) % 256).astype(np.uint8)
RGB = np.stack([GREY, GREY[::-1], 255 - GREY], axis=2)
RGB_AS_GREY = RGB @ BT601
SMOOTH = np.add.outer(np.arange(64) * 1.5, np.arange(80) * 1.2).astype(np.uint8)
"""Without hard edges, so that lossy formats stay close to it."""
SMOOTH_RGB = np.stack([SMOOTH, SMOOTH[::-1], 255 - SMOOTH], axis=2)
GREY16 = GREY.astype(np.uint16) * 200 + 17
DEPTH16_STEP = "percentile scaling to 8 bit"


def encode(pixels: np.ndarray | Image.Image, file_format: str, **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def encode_cv2(pixels: np.ndarray, suffix: str) -> bytes:
    """Encode 16-bit colour, which Pillow cannot write; the channels of `pixels` are RGB(A)."""
    order = [2, 1, 0, 3][: pixels.shape[2]]
    ok, content = cv2.imencode(suffix, np.ascontiguousarray(pixels[:, :, order]))
    assert ok
    return bytes(content)


def with_alpha(pixels: np.ndarray) -> np.ndarray:
    """Append an alpha channel that is never opaque and differs from pixel to pixel."""
    return np.dstack([pixels, (GREY // 2 + 60).astype(pixels.dtype)])


def palette() -> Image.Image:
    return Image.fromarray(RGB).quantize(16)


def palette_as_grey() -> np.ndarray:
    image = palette()
    colours = np.array(image.getpalette()).reshape(-1, 3)
    return colours[np.asarray(image)] @ BT601


def cmyk() -> Image.Image:
    key = np.full_like(SMOOTH, 30)
    return Image.fromarray(np.dstack([SMOOTH, SMOOTH[::-1], 255 - SMOOTH, key]), "CMYK")


def cmyk_as_grey() -> np.ndarray:
    inks = np.asarray(cmyk()).astype(float)
    return (255 - inks[:, :, :3]) * (255 - inks[:, :, 3:]) / 255 @ BT601


def percentiles_to_8_bit(values: np.ndarray) -> np.ndarray:
    low, high = np.percentile(values, (0.5, 99.5))
    return np.clip((values - low) / (high - low) * 255, 0, 255)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int) -> bytes:
    """Return a small PNG whose header claims any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(10))
    chunks = (b"IHDR", header), (b"IDAT", data), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def dicom_bytes() -> bytes:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = MRImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3"
    dataset.Rows, dataset.Columns = GREY.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
    dataset.PixelData = (GREY.astype(np.uint16) * 16).tobytes()
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def reason_of(content: bytes, hint: str = "") -> str:
    with pytest.raises(ScanError) as caught:
        decode_scan(content, hint)
    return caught.value.reason


LOSSLESS: dict[str, tuple[Callable[[], bytes], str, np.ndarray | Callable[[], np.ndarray]]] = {
    "png grey": (lambda: encode(GREY, "PNG"), "PNG", GREY),
    "png with a resolution chunk": (lambda: encode(GREY, "PNG", dpi=(72, 72)), "PNG", GREY),
    "png rgb": (lambda: encode(RGB, "PNG"), "PNG", RGB_AS_GREY),
    "png rgba": (lambda: encode(with_alpha(RGB), "PNG"), "PNG", RGB_AS_GREY),
    "png grey alpha": (lambda: encode(with_alpha(GREY), "PNG"), "PNG", GREY),
    "png palette": (lambda: encode(palette(), "PNG"), "PNG", palette_as_grey),
    "png palette transparent": (
        lambda: encode(palette(), "PNG", transparency=3),
        "PNG",
        palette_as_grey,
    ),
    "png 1 bit": (lambda: encode(GREY > 100, "PNG"), "PNG", np.where(GREY > 100, 255, 0)),
    "bmp grey": (lambda: encode(GREY, "BMP"), "BMP", GREY),
    "bmp rgb": (lambda: encode(RGB, "BMP"), "BMP", RGB_AS_GREY),
    "bmp palette": (lambda: encode(palette(), "BMP"), "BMP", palette_as_grey),
    "bmp 1 bit": (lambda: encode(GREY > 100, "BMP"), "BMP", np.where(GREY > 100, 255, 0)),
    "tiff grey": (lambda: encode(GREY, "TIFF"), "TIFF", GREY),
    "tiff lzw": (lambda: encode(GREY, "TIFF", compression="tiff_lzw"), "TIFF", GREY),
    "tiff deflate": (lambda: encode(GREY, "TIFF", compression="tiff_deflate"), "TIFF", GREY),
    "tiff white is zero": (lambda: encode(GREY, "TIFF", tiffinfo={262: 0}), "TIFF", GREY),
    "tiff rgb": (lambda: encode(RGB, "TIFF"), "TIFF", RGB_AS_GREY),
    "tiff rgba": (lambda: encode(with_alpha(RGB), "TIFF"), "TIFF", RGB_AS_GREY),
    "tiff palette": (lambda: encode(palette(), "TIFF"), "TIFF", palette_as_grey),
    "webp lossless rgb": (lambda: encode(RGB, "WEBP", lossless=True), "WEBP", RGB_AS_GREY),
    "webp lossless rgba": (
        lambda: encode(with_alpha(RGB), "WEBP", lossless=True, exact=True),
        "WEBP",
        RGB_AS_GREY,
    ),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_picture_decodes_to_its_grey_values(name: str) -> None:
    make, file_format, expected = LOSSLESS[name]
    expected = expected() if callable(expected) else expected
    scan = decode_scan(make())
    assert scan.format == file_format
    assert scan.bit_depth == 8
    assert scan.image_HW.dtype == np.uint8
    assert scan.image_HW.shape == GREY.shape
    assert np.abs(scan.image_HW - expected.astype(float)).max() <= 0.51


@pytest.mark.parametrize(
    ("make", "expected", "tolerance"),
    [
        pytest.param(lambda: encode(SMOOTH, "JPEG", quality=95), SMOOTH, 2, id="jpeg grey"),
        pytest.param(
            lambda: encode(SMOOTH_RGB, "JPEG", quality=95), SMOOTH_RGB @ BT601, 3, id="jpeg rgb"
        ),
        pytest.param(
            lambda: encode(SMOOTH, "JPEG", quality=95, progressive=True),
            SMOOTH,
            2,
            id="jpeg progressive",
        ),
        pytest.param(lambda: encode(cmyk(), "JPEG", quality=95), cmyk_as_grey(), 4, id="jpeg cmyk"),
        pytest.param(lambda: encode(SMOOTH, "WEBP", quality=95), SMOOTH, 4, id="webp"),
        pytest.param(
            lambda: encode(SMOOTH_RGB, "WEBP", quality=95), SMOOTH_RGB @ BT601, 5, id="webp rgb"
        ),
        pytest.param(lambda: encode(cmyk(), "TIFF"), cmyk_as_grey(), 2, id="tiff cmyk"),
    ],
)
def test_lossy_or_converted_picture_is_close(
    make: Callable[[], bytes], expected: np.ndarray, tolerance: float
) -> None:
    scan = decode_scan(make())
    assert scan.image_HW.dtype == np.uint8
    assert scan.image_HW.shape == SMOOTH.shape
    assert np.abs(scan.image_HW - expected.astype(float)).max() <= tolerance


RGB16 = RGB.astype(np.uint16) * 200 + 100


@pytest.mark.parametrize(
    ("make", "values"),
    [
        pytest.param(lambda: encode(GREY16, "PNG"), GREY16, id="png"),
        pytest.param(lambda: encode(GREY16, "TIFF"), GREY16, id="tiff"),
        pytest.param(lambda: encode(GREY16.astype(">u2"), "TIFF"), GREY16, id="tiff big endian"),
        pytest.param(lambda: encode_cv2(RGB16, ".png"), RGB16 @ BT601, id="png rgb"),
        pytest.param(lambda: encode_cv2(with_alpha(RGB16), ".png"), RGB16 @ BT601, id="png rgba"),
        pytest.param(lambda: encode_cv2(RGB16, ".tif"), RGB16 @ BT601, id="tiff rgb"),
        pytest.param(
            lambda: encode(65535 - GREY16, "TIFF", tiffinfo={262: 0}),
            GREY16,
            id="tiff white is zero",
        ),
    ],
)
def test_16_bits_are_scaled_between_percentiles(
    make: Callable[[], bytes], values: np.ndarray
) -> None:
    scan = decode_scan(make())
    assert scan.bit_depth == 16
    assert scan.steps[-1] == DEPTH16_STEP
    assert scan.image_HW.dtype == np.uint8
    assert np.abs(scan.image_HW - percentiles_to_8_bit(values)).max() <= 1


def test_float_tiff_ignores_values_that_are_not_finite() -> None:
    values = GREY.astype(np.float32) / 100 - 1
    holed = values.copy()
    holed[3, 4], holed[5, 6] = np.nan, np.inf
    scan = decode_scan(encode(holed, "TIFF"))
    assert scan.bit_depth == 32
    finite = np.isfinite(holed)
    difference = np.abs(scan.image_HW - percentiles_to_8_bit(values))[finite]
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


def test_dicom_is_told_by_its_prefix() -> None:
    scan = decode_scan(dicom_bytes(), "scan.png")
    assert scan.format == "DICOM"
    assert scan.image_HW.shape == GREY.shape


ANIMATION = {"save_all": True, "append_images": [Image.fromarray(RGB[:, ::-1].copy())]}
JPEG = encode(SMOOTH, "JPEG")
PNG = encode(GREY, "PNG")
NOISE_PNG = encode(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8), "PNG")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", "empty_file", id="no bytes"),
        pytest.param(b"a patient's story\n" * 20, "unsupported_type", id="text"),
        pytest.param(bytes(500), "unsupported_type", id="zeros"),
        pytest.param(encode(GREY, "GIF"), "unsupported_type", id="gif"),
        pytest.param(encode(GREY, "JPEG2000"), "unsupported_type", id="jpeg 2000"),
        pytest.param(encode(GREY, "PPM"), "unsupported_type", id="pgm"),
        pytest.param(JPEG[:60], "corrupt_image", id="jpeg cut in its header"),
        pytest.param(JPEG[: -len(JPEG) // 4], "truncated_image", id="jpeg cut in its data"),
        pytest.param(JPEG[:-2], "truncated_image", id="jpeg without its end"),
        pytest.param(PNG[:20], "corrupt_image", id="png cut in its header"),
        pytest.param(NOISE_PNG[: len(NOISE_PNG) // 2], "truncated_image", id="png cut in its data"),
        pytest.param(encode(GREY, "BMP")[:-100], "truncated_image", id="bmp cut in its data"),
        pytest.param(encode(GREY, "TIFF")[:-100], "truncated_image", id="tiff cut in its data"),
        pytest.param(encode(RGB, "WEBP")[:-20], "corrupt_image", id="webp cut in its data"),
        pytest.param(encode(GREY[:8, :8], "PNG"), "image_too_small", id="8 x 8"),
        pytest.param(encode(GREY[:31], "PNG"), "image_too_small", id="31 rows"),
        pytest.param(encode(GREY[:, :31], "PNG"), "image_too_small", id="31 columns"),
        pytest.param(encode(np.full((40, 40), 77, np.uint8), "PNG"), "no_signal", id="flat"),
        pytest.param(
            encode(np.full((40, 40), 777, np.uint16), "PNG"), "no_signal", id="flat in 16 bits"
        ),
        pytest.param(encode(RGB, "TIFF", **ANIMATION), "multi_frame", id="tiff of two pages"),
        pytest.param(encode(RGB, "WEBP", **ANIMATION), "multi_frame", id="animated webp"),
        pytest.param(encode(RGB, "PNG", **ANIMATION), "multi_frame", id="animated png"),
    ],
)
def test_unusable_file_is_refused_with_its_reason(content: bytes, reason: str) -> None:
    assert reason_of(content, "scan.png") == reason


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
    monkeypatch.setattr(formats.cv2, "imdecode", lambda *_: decoded.append(1))
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
        formats.check_size(width, height)
        return
    with pytest.raises(ScanError) as caught:
        formats.check_size(width, height)
    assert caught.value.reason == reason
    assert f"{width}x{height}" in caught.value.detail


VALID_FILES = {
    "png": PNG,
    "png16": encode(GREY16, "PNG"),
    "png palette": encode(palette(), "PNG"),
    "jpeg": JPEG,
    "jpeg rgb": encode(SMOOTH_RGB, "JPEG", exif=Image.Exif()),
    "bmp": encode(RGB, "BMP"),
    "tiff": encode(GREY, "TIFF"),
    "tiff lzw": encode(RGB, "TIFF", compression="tiff_lzw"),
    "webp": encode(RGB, "WEBP"),
    "webp lossless": encode(RGB, "WEBP", lossless=True),
    "dicom": dicom_bytes(),
}


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """Draw a valid file with some bytes changed, most often near its start, then cut short."""
    content = bytearray(draw(st.sampled_from(list(VALID_FILES.values()))))
    near_start = st.integers(0, min(len(content), 400) - 1)
    anywhere = st.integers(0, len(content) - 1)
    for position in draw(st.lists(near_start | anywhere, max_size=8)):
        content[position] = draw(st.integers(0, 255))
    end = draw(st.none() | st.integers(0, len(content)))
    return bytes(content[:end])


@settings(max_examples=400, deadline=None, database=None, derandomize=True)
@given(
    content=st.binary(max_size=300) | damaged_files(),
    hint=st.sampled_from(["", "scan.png", "scan.dcm"]),
)
def test_whatever_the_bytes_only_a_scan_or_a_scan_error_comes_back(
    content: bytes, hint: str
) -> None:
    try:
        scan = decode_scan(content, hint)
    except ScanError:
        return  # its constructor refuses reason codes that are not listed
    assert scan.image_HW.dtype == np.uint8
    assert scan.image_HW.ndim == 2
    assert min(scan.image_HW.shape) >= formats.MIN_SIDE_PX
    assert scan.image_HW.min() < scan.image_HW.max()


@pytest.mark.parametrize("name", VALID_FILES)
def test_a_file_that_ends_early_is_refused(name: str) -> None:
    content = VALID_FILES[name]
    for end in range(0, len(content), max(1, len(content) // 40)):
        with pytest.raises(ScanError):
            decode_scan(content[:end])
