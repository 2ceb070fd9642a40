"""The table of scan files: every good one has its expected pixels, every bad one its reason."""

import gzip
import io
import re
import struct
import tarfile
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    MPEG2MPML,
    BasicTextSRStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    MediaStorageDirectoryStorage,
    RLELossless,
    RTStructureSetStorage,
    SegmentationStorage,
)

from bt_core.errors import ScanError
from bt_core.scans.formats import decode_scan
from tests.scan_files import (
    BT601,
    GREY,
    GREY16,
    RGB,
    RGB16,
    SIGNED,
    SMOOTH,
    SMOOTH_RGB,
    STORED,
    STORED8,
    VOLUME,
    axial_view,
    bare_dicom,
    between_percentiles,
    bmp_16_bit,
    cmyk,
    cmyk_as_grey,
    compressed_object,
    dicom_object,
    encode,
    encode_cv2,
    file_bytes,
    frames,
    interlaced_png,
    jpeg_2000_frame,
    make_dataset,
    multi_frame,
    nifti,
    palette,
    palette_as_grey,
    palette_object,
    png_claiming,
    recompressed,
    with_alpha,
)

Good = tuple[str, Callable[[], bytes], Callable[[], np.ndarray], float]
RGB_GREY = RGB @ BT601
FLOATS = GREY.astype(np.float32) / 100 - 1
AXIAL = axial_view(VOLUME)
FLAT = np.full((40, 40), 77)


def black_and_white() -> np.ndarray:
    return np.where(GREY > 100, 255, 0)


def stored_lossy(quality: int) -> bytes:
    return encode(SMOOTH, "JPEG", quality=quality)


# name: format, file, expected grey, tolerance. 0.51 is rounding; 1.01 rounding twice, in colour to
# grey or in percentile scaling; more is what a lossy format may lose.
GOOD: dict[str, Good] = {
    "png grey": ("PNG", lambda: encode(GREY, "PNG"), lambda: GREY, 0),
    "png resolution": ("PNG", lambda: encode(GREY, "PNG", dpi=(72, 72)), lambda: GREY, 0),
    "png interlaced": ("PNG", interlaced_png, lambda: GREY, 0),
    "png rgb": ("PNG", lambda: encode(RGB, "PNG"), lambda: RGB_GREY, 0.51),
    "png rgba": ("PNG", lambda: encode(with_alpha(RGB), "PNG"), lambda: RGB_GREY, 0.51),
    "png grey alpha": ("PNG", lambda: encode(with_alpha(GREY), "PNG"), lambda: GREY, 0.51),
    "png palette": ("PNG", lambda: encode(palette(), "PNG"), palette_as_grey, 0.51),
    "png palette 256": (
        "PNG",
        lambda: encode(palette(256), "PNG"),
        lambda: palette_as_grey(256),
        0.51,
    ),
    "png palette transparent": (
        "PNG",
        lambda: encode(palette(), "PNG", transparency=3),
        palette_as_grey,
        0.51,
    ),
    "png 1 bit": ("PNG", lambda: encode(GREY > 100, "PNG"), black_and_white, 0),
    "png 16 bit": ("PNG", lambda: encode(GREY16, "PNG"), lambda: between_percentiles(GREY16), 1.01),
    "png 16 bit rgb": (
        "PNG",
        lambda: encode_cv2(RGB16, ".png"),
        lambda: between_percentiles(RGB16 @ BT601),
        1.01,
    ),
    "png 16 bit rgba": (
        "PNG",
        lambda: encode_cv2(with_alpha(RGB16), ".png"),
        lambda: between_percentiles(RGB16 @ BT601),
        1.01,
    ),
    "jpeg grey": ("JPEG", lambda: stored_lossy(95), lambda: SMOOTH, 2),
    "jpeg quality 60": ("JPEG", lambda: stored_lossy(60), lambda: SMOOTH, 5),
    "jpeg rgb": (
        "JPEG",
        lambda: encode(SMOOTH_RGB, "JPEG", quality=95),
        lambda: SMOOTH_RGB @ BT601,
        3,
    ),
    "jpeg rgb without subsampling": (
        "JPEG",
        lambda: encode(SMOOTH_RGB, "JPEG", quality=95, subsampling=0),
        lambda: SMOOTH_RGB @ BT601,
        3,
    ),
    "jpeg progressive": (
        "JPEG",
        lambda: encode(SMOOTH, "JPEG", quality=95, progressive=True),
        lambda: SMOOTH,
        2,
    ),
    "jpeg rgb progressive": (
        "JPEG",
        lambda: encode(SMOOTH_RGB, "JPEG", quality=95, progressive=True),
        lambda: SMOOTH_RGB @ BT601,
        3,
    ),
    "jpeg restart markers": (
        "JPEG",
        lambda: encode(SMOOTH, "JPEG", quality=95, restart_marker_blocks=2),
        lambda: SMOOTH,
        2,
    ),
    "jpeg optimised, comment, profile": (
        "JPEG",
        lambda: encode(
            SMOOTH, "JPEG", quality=95, optimize=True, comment=b"text", icc_profile=b"p" * 200
        ),
        lambda: SMOOTH,
        2,
    ),
    "jpeg cmyk": ("JPEG", lambda: encode(cmyk(), "JPEG", quality=95), cmyk_as_grey, 4),
    "jpeg middle grey to its end": (
        "JPEG",
        lambda: encode(np.where(SMOOTH < 60, 20, 128).astype(np.uint8), "JPEG", quality=100),
        lambda: np.where(SMOOTH < 60, 20, 128),
        3,
    ),
    "jpeg data behind its end": ("JPEG", lambda: stored_lossy(95) + b"more", lambda: SMOOTH, 2),
    "bmp 8 bit grey": ("BMP", lambda: encode(GREY, "BMP"), lambda: GREY, 0),
    "bmp 24 bit": ("BMP", lambda: encode(RGB, "BMP"), lambda: RGB_GREY, 0.51),
    "bmp 32 bit": ("BMP", lambda: encode(with_alpha(RGB), "BMP"), lambda: RGB_GREY, 0.51),
    "bmp 8 bit palette": ("BMP", lambda: encode(palette(), "BMP"), palette_as_grey, 0.51),
    "bmp 1 bit": ("BMP", lambda: encode(GREY > 100, "BMP"), black_and_white, 0),
    "bmp 16 bit": ("BMP", bmp_16_bit, lambda: GREY & 0xF8, 8),
    "tiff grey": ("TIFF", lambda: encode(GREY, "TIFF"), lambda: GREY, 0),
    "tiff lzw": ("TIFF", lambda: encode(GREY, "TIFF", compression="tiff_lzw"), lambda: GREY, 0),
    "tiff deflate": (
        "TIFF",
        lambda: encode(GREY, "TIFF", compression="tiff_adobe_deflate"),
        lambda: GREY,
        0,
    ),
    "tiff packbits": (
        "TIFF",
        lambda: encode(GREY, "TIFF", compression="packbits"),
        lambda: GREY,
        0,
    ),
    "tiff fax": (
        "TIFF",
        lambda: encode(Image.fromarray(GREY > 100), "TIFF", compression="group4"),
        black_and_white,
        0,
    ),
    "tiff white is zero": (
        "TIFF",
        lambda: encode(GREY, "TIFF", tiffinfo={262: 0}),
        lambda: GREY,
        0,
    ),
    "tiff rgb": ("TIFF", lambda: encode(RGB, "TIFF"), lambda: RGB_GREY, 0.51),
    "tiff rgba": ("TIFF", lambda: encode(with_alpha(RGB), "TIFF"), lambda: RGB_GREY, 0.51),
    "tiff palette": ("TIFF", lambda: encode(palette(), "TIFF"), palette_as_grey, 0.51),
    "tiff cmyk": ("TIFF", lambda: encode(cmyk(), "TIFF"), cmyk_as_grey, 2),
    "tiff 16 bit": (
        "TIFF",
        lambda: encode(GREY16, "TIFF"),
        lambda: between_percentiles(GREY16),
        1.01,
    ),
    "tiff 16 bit big endian": (
        "TIFF",
        lambda: encode(GREY16.astype(">u2"), "TIFF"),
        lambda: between_percentiles(GREY16),
        1.01,
    ),
    "tiff 16 bit rgb": (
        "TIFF",
        lambda: encode_cv2(RGB16, ".tif"),
        lambda: between_percentiles(RGB16 @ BT601),
        1.01,
    ),
    "tiff 16 bit white is zero": (
        "TIFF",
        lambda: encode(65535 - GREY16, "TIFF", tiffinfo={262: 0}),
        lambda: between_percentiles(GREY16),
        1.01,
    ),
    "tiff float": (
        "TIFF",
        lambda: encode(FLOATS, "TIFF"),
        lambda: between_percentiles(FLOATS),
        1.01,
    ),
    "webp lossless rgb": (
        "WEBP",
        lambda: encode(RGB, "WEBP", lossless=True),
        lambda: RGB_GREY,
        0.51,
    ),
    "webp lossless rgba": (
        "WEBP",
        lambda: encode(with_alpha(RGB), "WEBP", lossless=True, exact=True),
        lambda: RGB_GREY,
        0.51,
    ),
    "webp grey": ("WEBP", lambda: encode(SMOOTH, "WEBP", quality=95), lambda: SMOOTH, 4),
    "webp rgb": (
        "WEBP",
        lambda: encode(SMOOTH_RGB, "WEBP", quality=95),
        lambda: SMOOTH_RGB @ BT601,
        5,
    ),
    "dicom": ("DICOM", lambda: dicom_object(STORED), lambda: between_percentiles(STORED), 1.01),
    "dicom signed": (
        "DICOM",
        lambda: dicom_object(SIGNED),
        lambda: between_percentiles(SIGNED),
        1.01,
    ),
    "dicom implicit": (
        "DICOM",
        lambda: dicom_object(STORED, ImplicitVRLittleEndian),
        lambda: between_percentiles(STORED),
        1.01,
    ),
    "dicom big endian": (
        "DICOM",
        lambda: dicom_object(STORED, ExplicitVRBigEndian, PixelData=STORED.byteswap().tobytes()),
        lambda: between_percentiles(STORED),
        1.01,
    ),
    "dicom deflated": (
        "DICOM",
        lambda: dicom_object(STORED, DeflatedExplicitVRLittleEndian),
        lambda: between_percentiles(STORED),
        1.01,
    ),
    "dicom without meta header": (
        "DICOM",
        bare_dicom,
        lambda: between_percentiles(STORED),
        1.01,
    ),
    "dicom rle": (
        "DICOM",
        lambda: recompressed(RLELossless),
        lambda: between_percentiles(STORED),
        1.01,
    ),
    "dicom rle colour": (
        "DICOM",
        lambda: recompressed(RLELossless, RGB),
        lambda: RGB_GREY,
        0.51,
    ),
    "dicom jpeg-ls": (
        "DICOM",
        lambda: recompressed(JPEGLSLossless),
        lambda: between_percentiles(STORED),
        1.01,
    ),
    "dicom jpeg-ls near lossless": (
        "DICOM",
        lambda: recompressed(JPEGLSNearLossless, STORED8, WindowCenter=128, WindowWidth=256),
        lambda: STORED8,
        4,
    ),
    "dicom jpeg 2000 lossless": (
        "DICOM",
        lambda: recompressed(JPEG2000Lossless),
        lambda: between_percentiles(STORED),
        1.01,
    ),
    "dicom jpeg 2000 signed": (
        "DICOM",
        lambda: recompressed(JPEG2000Lossless, SIGNED),
        lambda: between_percentiles(SIGNED),
        1.01,
    ),
    "dicom jpeg 2000 in a jp2 wrapper": (
        "DICOM",
        lambda: compressed_object(
            JPEG2000Lossless, encode(STORED8, "JPEG2000", irreversible=False, no_jp2=False)
        ),
        lambda: between_percentiles(STORED8),
        1.01,
    ),
    "dicom jpeg baseline": (
        "DICOM",
        lambda: dicom_object(
            SMOOTH,
            JPEGBaseline8Bit,
            WindowCenter=128,
            WindowWidth=256,
            PixelData=encapsulate([stored_lossy(95)]),
        ),
        lambda: SMOOTH,
        3,
    ),
    "dicom 5 frames": (
        "DICOM",
        lambda: multi_frame(5),
        lambda: between_percentiles(frames(5)[2]),
        1.01,
    ),
    "dicom 3 frames of jpeg 2000": (
        "DICOM",
        lambda: compressed_object(
            JPEG2000Lossless,
            *(jpeg_2000_frame((frame // 16).astype(np.uint8)) for frame in frames(3)),
        ),
        lambda: between_percentiles(frames(3)[1] // 16),
        1.01,
    ),
    "dicom rgb": ("DICOM", lambda: dicom_object(RGB), lambda: RGB_GREY, 0.51),
    "dicom rgb 16 bit": (
        "DICOM",
        lambda: dicom_object(RGB.astype(np.uint16) * 16),
        lambda: RGB_GREY * 16 / 4095 * 255,
        0.51,
    ),
    "dicom palette": (
        "DICOM",
        palette_object,
        lambda: 0.299 * STORED8 + 0.587 * (255.0 - STORED8) + 0.114 * 9,
        0.51,
    ),
    "nifti": (
        "NIFTI",
        lambda: nifti(VOLUME.astype("i4")),
        lambda: between_percentiles(AXIAL),
        1.01,
    ),
    "nifti gz": (
        "NIFTI",
        lambda: nifti(VOLUME.astype("f4"), packed=True),
        lambda: between_percentiles(AXIAL),
        1.01,
    ),
    "nifti 2": (
        "NIFTI",
        lambda: nifti(VOLUME.astype("u4"), version=2),
        lambda: between_percentiles(AXIAL),
        1.01,
    ),
    "nifti big endian": (
        "NIFTI",
        lambda: nifti_big_endian(),
        lambda: between_percentiles(AXIAL),
        1.01,
    ),
    "nifti two dimensions": (
        "NIFTI",
        lambda: nifti(STORED.T.astype("i2")),
        lambda: between_percentiles(STORED[::-1, ::-1]),
        1.01,
    ),
    "nifti four dimensions": (
        "NIFTI",
        lambda: nifti(np.stack([VOLUME, VOLUME[::-1] % 97], axis=3).astype("i4")),
        lambda: between_percentiles(AXIAL),
        1.01,
    ),
    "nifti colour": ("NIFTI", lambda: nifti_colour(), lambda: RGB_GREY[::-1, ::-1], 0.51),
    "nifti rescaled": (
        "NIFTI",
        lambda: nifti(VOLUME.astype("i4"), scl_slope=-2.5, scl_inter=10),
        lambda: between_percentiles(-1.0 * AXIAL),
        1.01,
    ),
}  # fmt: skip


def nifti_big_endian() -> bytes:
    import nibabel as nib

    header = nib.Nifti1Header(endianness=">")
    image = nib.Nifti1Image(VOLUME.astype(">i4"), np.eye(4), header)
    content = bytes(image.to_bytes())
    assert content[:4] == b"\0\0\1\x5c"
    return content


def nifti_colour() -> bytes:
    colour = np.zeros((GREY.shape[1], GREY.shape[0], 1), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    for channel, name in enumerate("RGB"):
        colour[name][:, :, 0] = RGB[:, :, channel].T
    return nifti(colour)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_gives_its_pixels(name: str) -> None:
    file_format, make, expected, tolerance = GOOD[name]
    scan = decode_scan(make(), "scan.dcm" if file_format == "DICOM" else "")
    assert scan.format == file_format
    assert scan.image_HW.dtype == np.uint8
    assert scan.image_HW.flags.c_contiguous
    assert scan.image_HW.shape == expected().shape
    assert np.abs(scan.image_HW - expected().astype(float)).max() <= tolerance


ANIMATION = {"save_all": True, "append_images": [Image.fromarray(RGB[:, ::-1].copy())]}
JPEG = encode(SMOOTH, "JPEG")
PNG = encode(GREY, "PNG")
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
NOISE_PNG = encode(NOISE, "PNG")
NIFTI = nifti(VOLUME.astype("i2"))
JUNK = b"\x01\x02not a codestream" * 8
PREAMBLE_BYTES = 132


def patched_up(progressive: bool, keep: float) -> bytes:
    """Return a JPEG cut in its data, with the end marker put back."""
    content = encode(NOISE, "JPEG", quality=90, progressive=progressive)
    return content[: int(len(content) * keep)] + b"\xff\xd9"


def jpeg_with_precision(bits: int) -> bytes:
    start = JPEG.index(b"\xff\xc0") + 4
    return JPEG[:start] + bytes([bits]) + JPEG[start + 1 :]


def tiff_with(tag: int, value: int) -> bytes:
    """Return a TIFF with one number in its directory changed, whatever that does to it."""
    content = encode(GREY, "TIFF")
    entry = struct.pack("<H", tag) + rb"[\x03\x04]\x00\x01\x00\x00\x00"  # short or long, one of it
    [start] = [match.end() for match in re.finditer(entry, content)]
    return content[:start] + struct.pack("<I", value) + content[start + 4 :]


def png_with_a_huge_chunk() -> bytes:
    """Return a PNG with a chunk that claims 3 GB, which OpenCV would allocate."""
    start = PNG.index(b"IDAT") - 4
    return PNG[:start] + struct.pack(">I", 3 * 10**9) + PNG[start + 4 :]


def webp_claiming(width: int, height: int) -> bytes:
    canvas = b"".join((side - 1).to_bytes(3, "little") for side in (width, height))
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def object_of(sop_class: str) -> bytes:
    dataset = make_dataset(STORED)
    for keyword in ("Rows", "Columns", "BitsAllocated", "PixelData", "SamplesPerPixel"):
        delattr(dataset, keyword)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = sop_class
    return file_bytes(dataset)


def tar_gz() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("scan.png"), io.BytesIO(b""))
    return buffer.getvalue()


def gzip_bomb() -> bytes:
    """Return a small volume in gzip that goes on for 1.1 GB of zeros: 1 MB."""
    packer = zlib.compressobj(1, wbits=31)
    zeros = bytes(2**20)
    data = [packer.compress(NIFTI), *(packer.compress(zeros) for _ in range(1100))]
    return b"".join(data) + packer.flush()


def deflated_bomb() -> bytes:
    """Return a deflated object of 600 MB of zeros: 0.6 MB."""
    content = dicom_object(STORED, DeflatedExplicitVRLittleEndian)
    start = PREAMBLE_BYTES + 12 + int.from_bytes(content[PREAMBLE_BYTES + 8 :][:4], "little")
    packer = zlib.compressobj(1, wbits=-15)
    zeros = bytes(2**20)
    data = b"".join(packer.compress(zeros) for _ in range(600)) + packer.flush()
    return content[:start] + data


def off_by_one_byte(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "no bytes": (lambda: b"", "empty_file"),
    "text": (lambda: b"a patient's story\n" * 20, "unsupported_type"),
    "zeros": (lambda: bytes(500), "unsupported_type"),
    "gif": (lambda: encode(GREY, "GIF"), "unsupported_type"),
    "animated gif": (lambda: encode(GREY, "GIF", **ANIMATION), "unsupported_type"),
    "jpeg 2000": (lambda: encode(GREY, "JPEG2000"), "unsupported_type"),
    "pgm": (lambda: encode(GREY, "PPM"), "unsupported_type"),
    "pdf": (lambda: encode(RGB, "PDF"), "unsupported_type"),
    "tar.gz": (tar_gz, "unsupported_type"),
    "gzipped text": (lambda: gzip.compress(b"text" * 200), "unsupported_type"),
    "jpeg cut in its header": (lambda: JPEG[:60], "corrupt_image"),
    "jpeg cut in its data": (lambda: JPEG[: -len(JPEG) // 4], "truncated_image"),
    "jpeg at 60 %": (lambda: JPEG[: len(JPEG) * 6 // 10], "truncated_image"),
    "jpeg without its end": (lambda: JPEG[:-2], "truncated_image"),
    "jpeg patched up at 30 %": (lambda: patched_up(False, 0.3), "truncated_image"),
    "jpeg patched up at 95 %": (lambda: patched_up(False, 0.95), "truncated_image"),
    "progressive jpeg patched up at 50 %": (lambda: patched_up(True, 0.5), "truncated_image"),
    "progressive jpeg patched up at 95 %": (lambda: patched_up(True, 0.95), "truncated_image"),
    "jpeg of 12 bits": (lambda: jpeg_with_precision(12), "unsupported_type"),
    "jpeg start only": (lambda: b"\xff\xd8\xff\xd9", "corrupt_image"),
    "png cut in its header": (lambda: PNG[:20], "truncated_image"),
    "png cut in its data": (lambda: NOISE_PNG[: len(NOISE_PNG) // 2], "truncated_image"),
    "png with a flipped byte": (
        lambda: off_by_one_byte(NOISE_PNG, len(NOISE_PNG) // 2),
        "corrupt_image",
    ),
    "png without data": (lambda: png_claiming(64, 64), "truncated_image"),
    "png with a chunk of 3 GB": (png_with_a_huge_chunk, "truncated_image"),
    "png of 20,000 x 20,000": (lambda: png_claiming(20_000, 20_000), "image_too_large"),
    "png of 2 rows too long": (lambda: png_claiming(32, 16_385), "image_too_large"),
    "png of no width": (lambda: png_claiming(0, 64), "corrupt_image"),
    "png of an unknown depth": (lambda: png_claiming(64, 64, depth=7), "corrupt_image"),
    "bmp cut in its data": (lambda: encode(GREY, "BMP")[:-100], "truncated_image"),
    "bmp cut in its header": (lambda: encode(GREY, "BMP")[:30], "corrupt_image"),
    "bmp of 7 bits": (
        lambda: encode(GREY, "BMP")[:28] + b"\x07" + encode(GREY, "BMP")[29:],
        "unsupported_type",
    ),
    "tiff cut in its data": (lambda: encode(GREY, "TIFF")[:-100], "truncated_image"),
    "tiff cut in its header": (lambda: encode(GREY, "TIFF")[:6], "corrupt_image"),
    "tiff of 13 bits": (lambda: tiff_with(258, 13), "unsupported_type"),
    "tiff of an unknown compression": (lambda: tiff_with(259, 777), "corrupt_image"),
    "tiff with a wide picture": (lambda: tiff_with(256, 65_535), "image_too_large"),
    "tiff of two pages": (lambda: encode(RGB, "TIFF", **ANIMATION), "multi_frame"),
    "animated webp": (lambda: encode(RGB, "WEBP", **ANIMATION), "multi_frame"),
    "animated png": (lambda: encode(RGB, "PNG", **ANIMATION), "multi_frame"),
    "webp cut in its data": (lambda: encode(RGB, "WEBP")[:-20], "corrupt_image"),
    "webp cut in its header": (lambda: encode(RGB, "WEBP")[:18], "corrupt_image"),
    "webp with a huge canvas": (lambda: webp_claiming(2**24, 2**8), "image_too_large"),
    "8 x 8": (lambda: encode(GREY[:8, :8], "PNG"), "image_too_small"),
    "31 rows": (lambda: encode(GREY[:31], "PNG"), "image_too_small"),
    "31 columns": (lambda: encode(GREY[:, :31], "PNG"), "image_too_small"),
    "flat": (lambda: encode(FLAT.astype(np.uint8), "PNG"), "no_signal"),
    "flat in 16 bits": (lambda: encode(FLAT.astype(np.uint16), "PNG"), "no_signal"),
    "flat in colour": (lambda: encode(np.dstack([FLAT] * 3).astype(np.uint8), "PNG"), "no_signal"),
    "tiff of nan": (lambda: encode(FLOATS * np.nan, "TIFF"), "no_signal"),
    "dicom without pixels": (lambda: dicom_object(STORED, PixelData=...), "no_pixel_data"),
    "dicom report": (lambda: object_of(BasicTextSRStorage), "not_an_image_object"),
    "dicom structure set": (lambda: object_of(RTStructureSetStorage), "not_an_image_object"),
    "dicom directory": (lambda: object_of(MediaStorageDirectoryStorage), "not_an_image_object"),
    "dicom segmentation": (
        lambda: dicom_object(STORED8, SOPClassUID=SegmentationStorage),
        "not_an_image_object",
    ),
    "dicom of 513 frames": (
        lambda: dicom_object(STORED, NumberOfFrames=513),
        "too_many_frames",
    ),
    "dicom of -1 frames": (lambda: dicom_object(STORED, NumberOfFrames=-1), "corrupt_image"),
    "dicom of fewer frames than it says": (
        lambda: dicom_object(STORED, NumberOfFrames=3),
        "truncated_image",
    ),
    "dicom of 8.6 TB": (
        lambda: dicom_object(STORED, Rows=65_535, Columns=65_535, NumberOfFrames=500),
        "image_too_large",
    ),
    "dicom of 600 MB in frames": (
        lambda: dicom_object(STORED, Rows=1_000, Columns=1_000, NumberOfFrames=300),
        "image_too_large",
    ),
    "dicom too long": (lambda: dicom_object(STORED, Rows=17_000), "image_too_large"),
    "dicom 8 x 8": (lambda: dicom_object(STORED[:8, :8]), "image_too_small"),
    "dicom flat": (lambda: dicom_object(STORED * 0 + 7), "no_signal"),
    "dicom all padding": (
        lambda: dicom_object(STORED, PixelPaddingValue=0, PixelPaddingRangeLimit=4095),
        "no_signal",
    ),
    "dicom cut in its pixels": (lambda: dicom_object(STORED)[:-100], "truncated_image"),
    "dicom cut in its header": (lambda: dicom_object(STORED)[:150], "corrupt_image"),
    "dicom without rows": (lambda: dicom_object(STORED, Rows=...), "corrupt_image"),
    "dicom of an odd photometric": (
        lambda: dicom_object(STORED, PhotometricInterpretation="HSV"),
        "unsupported_type",
    ),
    "dicom palette in segments": (
        lambda: palette_object(SegmentedRedPaletteColorLookupTableData=b"\0\1\2\3"),
        "unsupported_type",
    ),
    "dicom as mpeg": (lambda: compressed_object(MPEG2MPML, JUNK), "transfer_syntax_unsupported"),
    "dicom jpeg of 12 bits": (
        lambda: dicom_object(
            SMOOTH, JPEGExtended12Bit, PixelData=encapsulate([jpeg_with_precision(12)])
        ),
        "transfer_syntax_unsupported",
    ),
    "dicom deflated and cut": (
        lambda: dicom_object(STORED, DeflatedExplicitVRLittleEndian)[:-100],
        "truncated_image",
    ),
    "dicom deflated bomb": (deflated_bomb, "image_too_large"),
    "dicom jpeg 2000 junk": (lambda: compressed_object(JPEG2000, JUNK), "corrupt_image"),
    "dicom jpeg junk": (lambda: compressed_object(JPEGBaseline8Bit, JUNK), "corrupt_image"),
    "dicom jpeg-ls junk": (lambda: compressed_object(JPEGLSLossless, JUNK), "corrupt_image"),
    "dicom jpeg lossless junk": (lambda: compressed_object(JPEGLosslessSV1, JUNK), "corrupt_image"),
    "dicom rle junk": (lambda: compressed_object(RLELossless, JUNK), "corrupt_image"),
    "dicom jpeg of another size": (
        lambda: compressed_object(JPEGBaseline8Bit, JPEG),
        "corrupt_image",
    ),
    "dicom jpeg 2000 of another size": (
        lambda: compressed_object(JPEG2000Lossless, jpeg_2000_frame(SMOOTH)),
        "corrupt_image",
    ),
    "dicom jpeg 2000 in colour": (
        lambda: compressed_object(JPEG2000Lossless, jpeg_2000_frame(RGB)),
        "corrupt_image",
    ),
    "dicom jpeg 2000 cut": (
        lambda: compressed_object(JPEG2000Lossless, jpeg_2000_frame()[:200]),
        "truncated_image",
    ),
    "dicom jpeg patched up": (
        lambda: dicom_object(
            NOISE, JPEGBaseline8Bit, PixelData=encapsulate([patched_up(False, 0.5)])
        ),
        "truncated_image",
    ),
    "dicom jpeg cut": (
        lambda: dicom_object(SMOOTH, JPEGBaseline8Bit, PixelData=encapsulate([JPEG[:400]])),
        "truncated_image",
    ),
    "nifti cut in its data": (lambda: NIFTI[:-100], "truncated_image"),
    "nifti cut in its header": (lambda: NIFTI[:347], "truncated_image"),
    "nifti gz cut": (lambda: gzip.compress(NIFTI, 1)[:-100], "truncated_image"),
    "nifti gz with a flipped byte": (
        lambda: off_by_one_byte(gzip.compress(NIFTI, 1), 20_000),
        "corrupt_image",
    ),
    "nifti gz with a wrong checksum": (
        lambda: off_by_one_byte(gzip.compress(NIFTI, 1), -8 % len(gzip.compress(NIFTI, 1))),
        "corrupt_image",
    ),
    "nifti gz bomb": (gzip_bomb, "image_too_large"),
    "nifti of 27 TB": (
        lambda: nifti(VOLUME.astype("i2"), dim=[3, 30_000, 30_000, 30_000, 1, 1, 1, 1]),
        "image_too_large",
    ),
    "nifti of a negative dimension": (
        lambda: nifti(VOLUME.astype("i2"), dim=[3, -5, 40, 32, 1, 1, 1, 1]),
        "corrupt_image",
    ),
    "nifti of a dimension of zero": (
        lambda: nifti(VOLUME.astype("i2"), dim=[3, 40, 0, 32, 1, 1, 1, 1]),
        "corrupt_image",
    ),
    "nifti of no dimensions": (
        lambda: nifti(VOLUME.astype("i2"), dim=[0, 40, 40, 32, 1, 1, 1, 1]),
        "corrupt_image",
    ),
    "nifti of 5 dimensions": (
        lambda: nifti(VOLUME[..., None, None].astype("i2") % np.ones((1, 1, 1, 1, 3), "i2")),
        "unsupported_type",
    ),
    "nifti of complex numbers": (lambda: nifti(VOLUME.astype("c8")), "unsupported_type"),
    "nifti of an unknown type": (
        lambda: nifti(VOLUME.astype("i2"), datatype=7),
        "corrupt_image",
    ),
    "nifti header of a pair": (
        lambda: nifti(VOLUME.astype("i2"), magic=b"ni1"),
        "unsupported_type",
    ),
    "nifti data in its header": (
        lambda: nifti(VOLUME.astype("i2"), vox_offset=100),
        "corrupt_image",
    ),
    "nifti data nowhere": (
        lambda: nifti(VOLUME.astype("i2"), vox_offset=np.nan),
        "corrupt_image",
    ),
    "nifti without directions": (
        lambda: nifti(VOLUME.astype("i2"), srow_x=0, srow_y=0, srow_z=0, sform_code=1),
        "corrupt_image",
    ),
    "nifti of nan": (lambda: nifti(VOLUME * np.float32(np.nan)), "no_signal"),
    "nifti flat": (lambda: nifti(VOLUME.astype("i2") * 0 + 3), "no_signal"),
    "nifti of 20 rows": (lambda: nifti(VOLUME[:, :20].astype("i2")), "image_too_small"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gives_its_reason(name: str) -> None:
    make, reason = BAD[name]
    with pytest.raises(ScanError) as caught:
        decode_scan(make(), "scan.dcm" if name.startswith("dicom") else "scan.png")
    assert caught.value.reason == reason
    assert caught.value.__context__ is None, "the first error could quote the file"


def test_the_table_covers_every_format() -> None:
    assert len(GOOD) >= 60
    assert len(BAD) >= 60
    assert {case[0] for case in GOOD.values()} == {
        "PNG", "JPEG", "BMP", "TIFF", "WEBP", "DICOM", "NIFTI",
    }  # fmt: skip
