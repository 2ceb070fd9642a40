"""DICOM objects become grey pictures as PS3.3 says, and nothing they say of a patient gets out."""

import io
import logging
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import decoders
from pydicom.uid import (
    JPEG2000,
    UID,
    BasicTextSRStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
)

from bt_core.errors import ScanError
from bt_core.scans.formats import DecodedScan, decode_scan

BT601 = np.array([0.299, 0.587, 0.114])
STORED = (np.add.outer(np.arange(40) * 30, np.arange(56) * 40) % 4096).astype(np.uint16)
"""12 bits."""
SIGNED = STORED.astype(np.int16) - 2048
STORED8 = (STORED // 16).astype(np.uint8)
RGB = np.stack([STORED8, STORED8[::-1], 255 - STORED8], axis=2)
PREAMBLE_BYTES = 132
WINDOW_STEP = "VOI LUT or window"
PERCENTILE_STEP = "percentile scaling to 8 bit"
CANARY = "CANARY^NAME"


def dicom_object(stored: np.ndarray, syntax: UID = ExplicitVRLittleEndian, **tags: object) -> bytes:
    """Return a DICOM file; a tag given as None is present without a value, as `...` is absent."""
    dataset = make_dataset(stored, syntax)
    for keyword, value in tags.items():
        if value is ...:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return file_bytes(dataset)


def make_dataset(stored: np.ndarray, syntax: UID = ExplicitVRLittleEndian) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = MRImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3"
    dataset.Rows, dataset.Columns = stored.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    if stored.ndim == 3:
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, "RGB"
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = stored.dtype.itemsize * 8
    dataset.BitsStored = 12 if dataset.BitsAllocated == 16 else 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = stored.tobytes()
    return dataset


def file_bytes(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def picture_bytes(pixels: np.ndarray, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


def lookup_table(values: np.ndarray, bits: int) -> Dataset:
    """Return one item of a Modality or VOI LUT Sequence that maps stored values from 0 on."""
    table = Dataset()
    table.add_new(0x00283002, "US", [len(values), 0, bits])
    table.add_new(0x00283006, "US", [int(v) for v in values])
    return table


def refusal(content: bytes, hint: str = "") -> ScanError:
    with pytest.raises(ScanError) as caught:
        decode_scan(content, hint)
    return caught.value


def windowed(values: np.ndarray, center: float, width: float) -> np.ndarray:
    """Return the linear window of PS3.3 C.11.2.1.2.1 with an output range of 0 to 255."""
    values = values.astype(float)
    inside = ((values - (center - 0.5)) / (width - 1) + 0.5) * 255
    low, high = center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2
    return np.where(values <= low, 0, np.where(values > high, 255, inside))


def between_percentiles(values: np.ndarray) -> np.ndarray:
    low, high = np.percentile(values.astype(float), (0.5, 99.5))
    return np.clip((values - low) / (high - low) * 255, 0, 255)


def assert_close(scan: DecodedScan, expected: np.ndarray) -> None:
    assert scan.format == "DICOM"
    assert scan.image_HW.dtype == np.uint8
    assert scan.image_HW.shape == expected.shape
    assert np.abs(scan.image_HW - expected).max() <= 1


@pytest.mark.parametrize(
    ("content", "expected", "steps"),
    [
        pytest.param(
            lambda: dicom_object(STORED, WindowCenter=2000, WindowWidth=1000),
            windowed(STORED, 2000, 1000),
            (WINDOW_STEP,),
            id="window",
        ),
        pytest.param(
            lambda: dicom_object(STORED, WindowCenter=[2000, 500], WindowWidth=[1000, 100]),
            windowed(STORED, 2000, 1000),
            (WINDOW_STEP,),
            id="first of two windows",
        ),
        pytest.param(
            lambda: dicom_object(STORED),
            between_percentiles(STORED),
            (PERCENTILE_STEP,),
            id="no window",
        ),
        pytest.param(
            lambda: dicom_object(STORED, WindowCenter=None, WindowWidth=None),
            between_percentiles(STORED),
            (PERCENTILE_STEP,),
            id="window tags without values",
        ),
        pytest.param(
            lambda: dicom_object(STORED, WindowWidth=500),
            between_percentiles(STORED),
            (PERCENTILE_STEP,),
            id="width without center",
        ),
        pytest.param(
            lambda: dicom_object(SIGNED),
            between_percentiles(SIGNED),
            (PERCENTILE_STEP,),
            id="signed",
        ),
        pytest.param(
            lambda: dicom_object(SIGNED, WindowCenter=-100, WindowWidth=800),
            windowed(SIGNED, -100, 800),
            (WINDOW_STEP,),
            id="signed with window",
        ),
        pytest.param(
            lambda: dicom_object(
                SIGNED, RescaleSlope=2, RescaleIntercept=-10, WindowCenter=100, WindowWidth=3000
            ),
            windowed(SIGNED * 2.0 - 10, 100, 3000),
            ("modality LUT", WINDOW_STEP),
            id="signed with rescale and window",
        ),
        pytest.param(
            lambda: dicom_object(STORED, RescaleSlope=-1, RescaleIntercept=4095),
            between_percentiles(4095.0 - STORED),
            ("modality LUT", PERCENTILE_STEP),
            id="negative slope",
        ),
        pytest.param(
            lambda: dicom_object(
                STORED, RescaleSlope=-1, RescaleIntercept=4095, WindowCenter=2000, WindowWidth=1000
            ),
            windowed(4095.0 - STORED, 2000, 1000),
            ("modality LUT", WINDOW_STEP),
            id="negative slope with window",
        ),
        pytest.param(
            lambda: dicom_object(
                STORED,
                ModalityLUTSequence=[lookup_table(np.arange(4096) // 16, bits=8)],
                WindowCenter=128,
                WindowWidth=256,
            ),
            windowed(STORED // 16, 128, 256),
            ("modality LUT", WINDOW_STEP),
            id="modality table with window",
        ),
        pytest.param(
            lambda: dicom_object(
                STORED, VOILUTSequence=[lookup_table(255 - np.arange(4096) // 16, bits=8)]
            ),
            255.0 - STORED // 16,
            (WINDOW_STEP,),
            id="VOI table",
        ),
        pytest.param(
            lambda: dicom_object(STORED, VOILUTSequence=[]),
            between_percentiles(STORED),
            (PERCENTILE_STEP,),
            id="empty VOI sequence",
        ),
        pytest.param(
            lambda: dicom_object(
                STORED, PhotometricInterpretation="MONOCHROME1", WindowCenter=2000, WindowWidth=1000
            ),
            255 - windowed(STORED, 2000, 1000),
            (WINDOW_STEP, "MONOCHROME1 inverted"),
            id="monochrome1",
        ),
        pytest.param(
            lambda: dicom_object(RGB), RGB @ BT601, ("colour to grey",), id="colour capture"
        ),
        pytest.param(
            lambda: dicom_object(
                RGB, PlanarConfiguration=1, PixelData=RGB.transpose(2, 0, 1).tobytes()
            ),
            RGB @ BT601,
            ("colour to grey",),
            id="colour capture by planes",
        ),
        pytest.param(
            lambda: dicom_object(STORED, NumberOfFrames=1),
            between_percentiles(STORED),
            (PERCENTILE_STEP,),
            id="one frame",
        ),
    ],
)
def test_stored_values_become_the_displayed_grey(
    content: Callable[[], bytes], expected: np.ndarray, steps: tuple[str, ...]
) -> None:
    scan = decode_scan(content())
    assert_close(scan, expected)
    assert scan.steps == steps
    assert scan.bit_depth == (8 if "colour to grey" in steps else 12)


def test_monochrome1_is_the_negative_of_monochrome2() -> None:
    bright = decode_scan(dicom_object(STORED, PhotometricInterpretation="MONOCHROME2"))
    dark = decode_scan(dicom_object(STORED, PhotometricInterpretation="MONOCHROME1"))
    assert np.array_equal(dark.image_HW, 255 - bright.image_HW)


def test_luminance_of_a_ybr_capture_is_its_first_channel() -> None:
    ybr = np.dstack([STORED8, np.full_like(STORED8, 128), np.full_like(STORED8, 128)])
    scan = decode_scan(dicom_object(ybr, PhotometricInterpretation="YBR_FULL"))
    assert_close(scan, STORED8.astype(float))


def test_16_bit_colour_is_not_clipped_to_8_bits() -> None:
    rgb16 = RGB.astype(np.uint16) * 16
    scan = decode_scan(dicom_object(rgb16))
    assert np.corrcoef(scan.image_HW.ravel(), (rgb16 @ BT601).ravel())[0, 1] > 0.99


def test_implicit_vr_gives_the_same_picture() -> None:
    plain = decode_scan(dicom_object(STORED))
    implicit = decode_scan(dicom_object(STORED, ImplicitVRLittleEndian))
    assert np.array_equal(implicit.image_HW, plain.image_HW)


def test_a_deflated_object_is_refused_before_it_is_inflated() -> None:
    error = refusal(dicom_object(STORED, DeflatedExplicitVRLittleEndian))
    assert error.reason == "transfer_syntax_unsupported"


def test_no_warning_with_a_header_value_gets_out_of_parallel_decoding(
    capfd: pytest.CaptureFixture[str],
) -> None:
    content = with_canary("StudyDate", "DA")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: decode_scan(content), range(200)))
    assert "CANARY" not in capfd.readouterr().err.upper()


def rle_object() -> bytes:
    dataset = make_dataset(STORED)
    dataset.compress(RLELossless)
    return file_bytes(dataset)


def jpeg_2000_frame() -> bytes:
    return picture_bytes(STORED8, "JPEG2000", irreversible=False, no_jp2=True)


def jpeg_frame() -> bytes:
    return picture_bytes(STORED8, "JPEG", quality=95)


def compressed_object(syntax: UID, frame: bytes) -> bytes:
    return dicom_object(STORED8, syntax, PixelData=encapsulate([frame]))


@pytest.mark.parametrize(
    ("content", "values"),
    [
        pytest.param(rle_object, STORED, id="RLE"),
        pytest.param(
            lambda: compressed_object(JPEG2000Lossless, jpeg_2000_frame()), STORED8, id="JPEG 2000"
        ),
    ],
)
def test_lossless_compression_gives_the_same_picture(
    content: Callable[[], bytes], values: np.ndarray
) -> None:
    assert_close(decode_scan(content()), between_percentiles(values))


def test_baseline_jpeg_is_decoded() -> None:
    smooth = np.add.outer(np.arange(40) * 2.5, np.arange(56) * 2.5).astype(np.uint8)
    frame = picture_bytes(smooth, "JPEG", quality=95)
    content = dicom_object(smooth, JPEGBaseline8Bit, PixelData=encapsulate([frame]))
    difference = decode_scan(content).image_HW - between_percentiles(smooth)
    assert np.abs(difference).max() <= 4


JUNK = b"\x01\x02not a codestream" * 8


@pytest.mark.parametrize(
    "syntax", [JPEGLSLossless, JPEGLosslessSV1, UID("1.2.840.10008.1.2.4.100")]
)
def test_compression_without_a_decoder_is_unsupported(syntax: UID) -> None:
    error = refusal(compressed_object(syntax, JUNK))
    assert error.reason == "transfer_syntax_unsupported"
    assert error.detail == syntax.name


def test_jpeg_2000_without_a_decoder_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders.JPEG2000Decoder, "_available", {})
    error = refusal(compressed_object(JPEG2000, jpeg_2000_frame()))
    assert error.reason == "transfer_syntax_unsupported"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: compressed_object(JPEG2000, JUNK), id="JPEG 2000 junk"),
        pytest.param(lambda: compressed_object(JPEGBaseline8Bit, JUNK), id="JPEG junk"),
        pytest.param(lambda: compressed_object(RLELossless, JUNK), id="RLE junk"),
        pytest.param(
            lambda: compressed_object(JPEG2000Lossless, jpeg_2000_frame()[:200]),
            id="JPEG 2000 cut",
        ),
        pytest.param(
            lambda: compressed_object(JPEGBaseline8Bit, jpeg_frame()[:400]), id="JPEG cut"
        ),
        pytest.param(lambda: rle_object()[:-60], id="RLE file cut"),
    ],
)
def test_damage_to_a_supported_compression_is_damage(content: Callable[[], bytes]) -> None:
    assert refusal(content()).reason in ("corrupt_image", "truncated_image")


def structured_report() -> bytes:
    dataset = make_dataset(STORED)
    for keyword in ("Rows", "Columns", "BitsAllocated", "PixelData", "SamplesPerPixel"):
        delattr(dataset, keyword)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = BasicTextSRStorage
    dataset.Modality, dataset.ValueType = "SR", "CONTAINER"
    return file_bytes(dataset)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(
            lambda: dicom_object(STORED, NumberOfFrames=2, PixelData=STORED.tobytes() * 2),
            "multi_frame",
            id="two frames",
        ),
        pytest.param(
            lambda: dicom_object(STORED, PixelData=...), "no_pixel_data", id="no pixel data"
        ),
        pytest.param(structured_report, "no_pixel_data", id="structured report"),
        pytest.param(
            lambda: dicom_object(STORED8, PhotometricInterpretation="PALETTE COLOR"),
            "unsupported_type",
            id="palette",
        ),
        pytest.param(
            lambda: dicom_object(STORED, Rows=60_000, Columns=60_000, PixelData=b"\0\0"),
            "image_too_large",
            id="claims to be huge",
        ),
        pytest.param(
            lambda: dicom_object(STORED, Rows=17_000, Columns=32, PixelData=b"\0\0"),
            "image_too_large",
            id="claims to be long",
        ),
        pytest.param(
            lambda: dicom_object(STORED, Rows=6_000, Columns=6_000, PixelData=b"\0\0"),
            "truncated_image",
            id="fewer pixels than claimed",
        ),
        pytest.param(lambda: dicom_object(STORED[:8, :8]), "image_too_small", id="8 x 8"),
        pytest.param(lambda: dicom_object(STORED * 0 + 7), "no_signal", id="flat"),
        pytest.param(lambda: dicom_object(STORED)[:-100], "truncated_image", id="file cut"),
        pytest.param(
            lambda: dicom_object(STORED)[:150], "corrupt_image", id="file cut in its header"
        ),
        pytest.param(lambda: dicom_object(STORED, Rows=...), "corrupt_image", id="no rows"),
        pytest.param(
            lambda: without_element(dicom_object(STORED), "BitsAllocated"),
            "corrupt_image",
            id="no bits allocated",
        ),
        pytest.param(
            lambda: dicom_object(STORED, WindowCenter=1, WindowWidth=0),
            "corrupt_image",
            id="window of no width",
        ),
    ],
)
def test_unusable_object_is_refused_with_its_reason(
    content: Callable[[], bytes], reason: str
) -> None:
    assert refusal(content()).reason == reason


def test_refusals_name_only_technical_values() -> None:
    assert refusal(dicom_object(STORED, NumberOfFrames=7)).detail == "7 frames"
    assert "60000x50000" in refusal(dicom_object(STORED, Rows=50_000, Columns=60_000)).detail


def without_meta_bytes() -> bytes:
    """Return a data set of the default transfer syntax alone, as old tools wrote it."""
    dataset = make_dataset(STORED)
    del dataset.file_meta
    buffer = io.BytesIO()
    pydicom.dcmwrite(
        buffer, dataset, implicit_vr=True, little_endian=True, enforce_file_format=False
    )
    return buffer.getvalue()


@pytest.mark.parametrize("hint", ["scan.dcm", "SCAN.DCM", "scan.dicom", "application/dicom"])
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: dicom_object(STORED)[PREAMBLE_BYTES:], id="meta header"),
        pytest.param(without_meta_bytes, id="bare data set"),
    ],
)
def test_the_name_tells_dicom_without_a_preamble(content: Callable[[], bytes], hint: str) -> None:
    assert_close(decode_scan(content(), hint), between_percentiles(STORED))


def test_dicom_without_preamble_or_hint_is_unsupported() -> None:
    assert refusal(dicom_object(STORED)[PREAMBLE_BYTES:], "scan").reason == "unsupported_type"


@pytest.mark.parametrize("content", [b"some text\n" * 30, b"\0" * 400, b"II*\0" * 50])
def test_other_content_named_dcm_is_refused(content: bytes) -> None:
    assert refusal(content, "scan.dcm").reason in ("unsupported_type", "corrupt_image")


def with_canary(keyword: str, vr: str) -> bytes:
    """Return an object whose patient is the canary, and so is one more value, whatever its VR."""
    dataset = make_dataset(STORED)
    dataset.PatientName = dataset.PatientID = CANARY
    dataset.WindowCenter, dataset.WindowWidth = 2000, 1000
    if keyword not in PIXEL_LAYOUT and keyword in dataset:
        delattr(dataset, keyword)
    dataset.InstitutionName = CANARY
    content = file_bytes(dataset)
    if keyword in PIXEL_LAYOUT:
        content = without_element(content, keyword)
    value = (len(CANARY) + 1).to_bytes(2, "little") + CANARY.encode()
    placeholder = place_of("InstitutionName") + b"LO" + value
    assert content.count(placeholder) == 1
    return content.replace(placeholder, place_of(keyword) + vr.encode() + value)


PIXEL_LAYOUT = ("BitsAllocated", "SamplesPerPixel", "PixelRepresentation")
"""Elements that pydicom needs to write pixel data at all."""


def place_of(keyword: str) -> bytes:
    tag = tag_for_keyword(keyword)
    assert tag is not None
    return (tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little")


def without_element(content: bytes, keyword: str) -> bytes:
    """Cut one unsigned short out of an explicit little-endian file."""
    start = content.index(place_of(keyword) + b"US" + b"\x02\x00")
    return content[:start] + content[start + 10 :]


@pytest.mark.parametrize(
    ("keyword", "vr"),
    [
        ("InstitutionName", "LO"),
        ("StudyDate", "DA"),
        ("PatientBirthDate", "DA"),
        ("StudyTime", "TM"),
        ("AcquisitionDateTime", "DT"),
        ("PatientAge", "AS"),
        ("SpecificCharacterSet", "CS"),
        ("StudyInstanceUID", "UI"),
        ("PatientWeight", "DS"),
        ("InstanceNumber", "IS"),
        ("NumberOfFrames", "IS"),
        ("WindowCenter", "DS"),
        ("WindowWidth", "DS"),
        ("RescaleSlope", "DS"),
        ("RescaleIntercept", "DS"),
        ("PhotometricInterpretation", "CS"),
        ("BitsStored", "US"),
        ("BitsAllocated", "US"),
        ("SamplesPerPixel", "US"),
        ("PixelRepresentation", "US"),
        ("VOILUTFunction", "CS"),
    ],
)
def test_no_header_value_gets_out(
    keyword: str,
    vr: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    content = with_canary(keyword, vr)
    caplog.clear()
    capfd.readouterr()
    shown: list[object] = []
    with warnings.catch_warnings(record=True) as escaped, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        try:
            scan = decode_scan(content)
            shown += [scan.steps, scan.format]
        except ScanError as error:
            shown += [error, error.detail, error.args, error.__cause__, repr(error)]
    assert escaped == []
    output = capfd.readouterr()
    everything = f"{[str(s) for s in shown]} {caplog.text} {output.out} {output.err}"
    assert "CANARY" not in everything.upper()


def test_a_bad_date_does_not_stop_a_good_picture() -> None:
    scan = decode_scan(with_canary("StudyDate", "DA"))
    assert_close(scan, windowed(STORED, 2000, 1000))
