"""Whatever the bytes, `decode_scan` raises nothing but `ScanError` and keeps its memory bound."""

import contextlib
import gzip
import math
import struct
import subprocess
import sys
from collections.abc import Callable

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from bt_core.data.decode_stage import bounded
from bt_core.errors import ScanError
from bt_core.scans.decoded import MAX_DECODE_BYTES, MIN_SIDE_PX
from bt_core.scans.formats import decode_scan
from tests.fuzz_decode import corpus, peak_memory
from tests.scan_files import (
    GREY,
    STORED,
    compressed_object,
    dicom_object,
    encode,
    encode_cv2,
    jpeg_2000_frame,
    png_claiming,
    recompressed,
)
from tests.unit.test_scan_table import BAD

CORPUS = corpus()
PNG = encode(GREY, "PNG")


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """Draw a valid file with bytes changed, most often near its start, spliced, and cut short."""
    files = st.sampled_from(list(CORPUS.values()))
    content = bytearray(draw(files))
    near_start = st.integers(0, min(len(content), 400) - 1)
    anywhere = st.integers(0, len(content) - 1)
    for position in draw(st.lists(near_start | anywhere, max_size=8)):
        content[position] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        other = draw(files)
        start = draw(st.integers(0, len(other)))
        position = draw(anywhere)
        content[position : position + 40] = other[start : start + draw(st.integers(0, 200))]
    end = draw(st.none() | st.integers(0, len(content)))
    return bytes(content[:end])


@settings(max_examples=2000, deadline=None, database=None, derandomize=True)
@given(
    content=st.binary(max_size=600) | damaged_files(),
    hint=st.sampled_from(["", "scan.png", "scan.dcm", "scan.nii.gz"]),
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
    assert min(scan.image_HW.shape) >= MIN_SIDE_PX
    assert scan.image_HW.min() < scan.image_HW.max()
    assert 0 <= scan.frame_index < scan.num_frames


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(inner=damaged_files())
def test_whatever_is_in_a_gzip(inner: bytes) -> None:
    with contextlib.suppress(ScanError):
        decode_scan(gzip.compress(inner, 1), "scan.nii.gz")


def large_16_bit(samples: int) -> np.ndarray:
    """Return 39.9 Mpx of 16 bits, the most that the limit of pixels lets through."""
    ramp = np.arange(6_330)[:, None] * np.arange(1, samples + 1) * 7
    row = ramp.astype(np.uint16)
    return np.ascontiguousarray(np.broadcast_to(row, (6_300, *row.shape)).squeeze())


def large_nifti(shape: tuple[int, ...], packed: bool) -> bytes:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float64)
    header.set_data_shape(shape)
    header["magic"], header["vox_offset"] = b"n+1", 352
    values = (np.arange(math.prod(shape), dtype=np.uint8) % 251).astype(np.float64)
    content = header.binaryblock + bytes(4) + values.tobytes()
    return gzip.compress(content, 1) if packed else content


# As large as the limits allow, and small files that lie.
HEAVY: dict[str, tuple[Callable[[], bytes], str]] = {
    "png 16 bit rgba": (lambda: encode_cv2(large_16_bit(4), ".png", (16, 1)), "decoded"),
    "jpeg rgb": (lambda: encode((large_16_bit(3) >> 8).astype(np.uint8), "JPEG"), "decoded"),
    "tiff 16 bit rgb": (lambda: encode_cv2(large_16_bit(3), ".tif"), "decoded"),
    "tiff float": (lambda: encode(large_16_bit(1).astype(np.float32), "TIFF"), "decoded"),
    "dicom with rescale and window": (
        lambda: dicom_object(
            large_16_bit(1),
            RescaleSlope=2, RescaleIntercept=1, WindowCenter=900, WindowWidth=500,
            VOILUTFunction="SIGMOID",
        ),
        "decoded",
    ),
    "dicom rle": (lambda: recompressed(RLELossless, large_16_bit(1)), "decoded"),
    "dicom jpeg 2000": (lambda: recompressed(JPEG2000Lossless, large_16_bit(1)), "decoded"),
    "dicom jpeg-ls": (lambda: recompressed(JPEGLSLossless, large_16_bit(1)), "decoded"),
    "dicom 16 bit rgb": (
        lambda: dicom_object(large_16_bit(3)), "decoded"
    ),
    "nifti of wide slices": (lambda: large_nifti((5_600, 5_900, 3), False), "decoded"),
    "nifti gz cut across": (lambda: large_nifti((300, 40, 4_000), True), "decoded"),
    "png chunk of 3 GB": BAD["png with a chunk of 3 GB"],
    "png of 2**31": (lambda: png_claiming(2**31 - 1, 2**31 - 1), "image_too_large"),
    "png of 40 Mpx without data": (lambda: png_claiming(6_300, 6_300, 16, 6), "truncated_image"),
    "webp canvas of 4 Gpx": BAD["webp with a huge canvas"],
    "tiff of a huge width": BAD["tiff with a wide picture"],
    "dicom deflated bomb": BAD["dicom deflated bomb"],
    "nifti gz bomb": BAD["nifti gz bomb"],
    "nifti of 27 TB": BAD["nifti of 27 TB"],
    "dicom of 40 Mpx without data": (
        lambda: dicom_object(STORED, Rows=6_300, Columns=6_300), "truncated_image"
    ),
    "dicom jpeg 2000 of 40 Mpx without data": (
        lambda: compressed_object(
            JPEG2000Lossless, claiming_jpeg_2000(), Rows=6_300, Columns=6_300
        ),
        "corrupt_image",
    ),
}  # fmt: skip


def claiming_jpeg_2000() -> bytes:
    """Return a codestream of 56 x 40 that claims, in picture and tile, to be 6,300 x 6,300."""
    frame = jpeg_2000_frame()
    small = struct.pack(">II", 56, 40)
    assert frame.count(small) == 2
    return frame.replace(small, struct.pack(">II", 6_300, 6_300))


def measure(names: list[str]) -> None:
    """Print a line for each file: its outcome and the memory it took. Run by the tests below."""
    peak_memory(PNG, "")  # what is loaded once is loaded now
    peak_memory(dicom_object(STORED), "")
    for name in names:
        taken, outcome = peak_memory(HEAVY[name][0](), "scan.dcm" if "dicom" in name else "")
        print(outcome.split()[0], taken)


def measured(names: list[str]) -> dict[str, tuple[str, int]]:
    """Return outcome and memory of each file, from a process of its own."""
    code = f"from tests.unit.test_decode_bounds import measure; measure({names!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: (line[0], int(line[1])) for name, line in zip(names, lines, strict=True)}


def test_what_is_refused_by_its_header_is_not_allocated() -> None:
    names = [name for name, (_, outcome) in HEAVY.items() if outcome != "decoded"]
    for name, (outcome, taken) in measured(names).items():
        assert outcome == HEAVY[name][1], name
        # The deflated bomb is unpacked up to the limit for a whole object, 512 MB, and no further.
        limit = 1200 if name == "dicom deflated bomb" else 200
        assert taken < limit * 1024**2, name


WORST = ["dicom with rescale and window", "dicom 16 bit rgb", "nifti gz cut across"]


def test_the_largest_files_keep_the_bound() -> None:
    for name, (outcome, taken) in measured(WORST).items():
        assert outcome == "decoded", name
        assert taken <= MAX_DECODE_BYTES, name


@pytest.mark.slow
def test_every_largest_file_keeps_the_bound() -> None:
    names = [name for name, (_, outcome) in HEAVY.items() if outcome == "decoded"]
    for name, (outcome, taken) in measured(names).items():
        assert outcome == "decoded", name
        assert taken <= MAX_DECODE_BYTES, name


def test_a_decoding_task_cannot_take_more_memory_than_its_bound():
    with bounded(64 * 1024**2, 60):
        np.ones(16 * 1024**2, np.uint8)
        with pytest.raises(MemoryError):
            np.ones(512 * 1024**2, np.uint8)
    assert np.ones(512 * 1024**2, np.uint8)[-1] == 1
