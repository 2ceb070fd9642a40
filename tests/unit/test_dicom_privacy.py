"""Nothing that a DICOM object says of a patient gets out of decoding."""

import logging
import struct
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pydicom._dicom_dict import DicomDictionary
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless

from bt_core.errors import ScanError
from bt_core.scans.formats import decode_scan
from tests.scan_files import STORED, STORED8, file_bytes, item, jpeg_2000_frame, make_dataset

CANARY = "CANARY^NAME"


def outcome(content: bytes) -> list[object]:
    """Return all that a caller gets to see of a decoded scan or a refusal."""
    try:
        scan = decode_scan(content, "scan.dcm", hash_key=b"key")
    except ScanError as error:
        chain = (error.__cause__, error.__context__)
        return [error, error.detail, error.args, repr(error), *chain, *traceback_of(error)]
    return [scan.steps, scan.format, scan.patient, repr(scan), scan.bit_depth, scan.num_frames]


def traceback_of(error: BaseException) -> list[str]:
    """Return a traceback with the variables of its frames, as some loggers write it."""
    seen = traceback.TracebackException.from_exception(error, capture_locals=True)
    return [
        f"{name}={value}"
        for frame in seen.stack
        if frame.filename != __file__
        for name, value in (frame.locals or {}).items()
        if name != "content"  # what the caller has anyway
    ]


def assert_nothing_gets_out(
    content: bytes, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.clear()
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as escaped, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        shown = outcome(content)
    assert escaped == []
    output = capfd.readouterr()
    everything = f"{[str(s) for s in shown]} {caplog.text} {output.out} {output.err}"
    assert "CANARY" not in everything.upper()


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
    assert_nothing_gets_out(with_canary(keyword, vr), caplog, capfd)


TEXT_VRS = (
    "AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR",
    "UT",
)  # fmt: skip
LEFT_OUT = {
    "SOPClassUID", "PhotometricInterpretation", "NumberOfFrames", "RescaleSlope", "PixelSpacing",
    "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTFunction", "PixelAspectRatio",
    "SpecificCharacterSet",
}  # fmt: skip
"""Elements whose value decides the picture; each is planted alone above."""


def planted(tag: int, vr: str) -> bytes:
    """Return an element with the canary as its value, whatever its VR allows."""
    value = CANARY.encode() + b" "
    long_form = vr in ("UC", "UR", "UT")
    length = (
        b"\0\0" + len(value).to_bytes(4, "little") if long_form else struct.pack("<H", len(value))
    )
    return struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr.encode() + length + value


def full_of_canaries(dataset: Dataset) -> bytes:
    """Return a file with the canary in every element of text, some private and a nested one."""
    dataset.ReferencedImageSequence = [item(PatientName=CANARY)]
    canaries = [planted(0x0009_0010, "LO"), planted(0x0009_1001, "LO"), planted(0x0009_1002, "PN")]
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        if vr in TEXT_VRS and 0x0008_0000 <= tag < 0x7FE0_0000 and keyword not in LEFT_OUT:
            canaries.append(planted(tag, vr))
    content = file_bytes(dataset)
    pixels = content.find(b"\xe0\x7f\x10\x00OW") % (len(content) + 1)  # none: at the end
    return content[:pixels] + b"".join(canaries) + content[pixels:]


def test_an_object_full_of_canaries(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    content = full_of_canaries(make_dataset(STORED))
    assert content.count(CANARY.encode()) > 1000
    assert_nothing_gets_out(content, caplog, capfd)
    scan = decode_scan(content, hash_key=b"key")
    assert scan.image_HW.shape == STORED.shape
    assert len(scan.patient) == 32


@pytest.mark.parametrize(
    ("tags", "end"),
    [
        ({"PixelData": None}, None),
        ({"PixelData": b"\0\0"}, None),
        ({"Rows": 60_000}, None),
        ({"BitsStored": 40}, None),
        ({"BitsAllocated": 24}, None),
        ({"SOPClassUID": None}, None),
        ({}, -500),
        ({}, 30_000),
        ({"VOILUTSequence": [item(PatientName=CANARY)]}, None),
        ({"PixelPaddingValue": 7, "SmallestImagePixelValue": 3}, None),
    ],
)
def test_a_broken_object_full_of_canaries(
    tags: dict[str, object],
    end: int | None,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    dataset = make_dataset(STORED)
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    assert_nothing_gets_out(full_of_canaries(dataset)[:end], caplog, capfd)


def test_an_unknown_transfer_syntax_is_not_quoted(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    content = file_bytes(make_dataset(STORED))
    syntax = b"1.2.840.10008.1.2.1\0"
    assert content.count(syntax) == 1
    canary = CANARY.encode().ljust(len(syntax), b"\0")
    assert_nothing_gets_out(content.replace(syntax, canary), caplog, capfd)


def test_a_comment_in_a_damaged_codestream(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    frame = jpeg_2000_frame()
    marker = frame.index(b"\xff\x64")
    comment = b"\xff\x64" + (len(CANARY) + 4).to_bytes(2, "big") + b"\0\1" + CANARY.encode()
    for cut in (0, 60):
        damaged = frame[:marker] + comment + frame[marker : len(frame) - cut] + b"\xff\xd9"
        dataset = make_dataset(STORED8, JPEG2000Lossless)
        dataset.PixelData = encapsulate([damaged])
        assert_nothing_gets_out(file_bytes(dataset), caplog, capfd)


def test_no_warning_gets_out_of_parallel_decoding(capfd: pytest.CaptureFixture[str]) -> None:
    content = with_canary("StudyDate", "DA")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: decode_scan(content), range(200)))
    assert "CANARY" not in capfd.readouterr().err.upper()


def test_a_bad_date_does_not_stop_a_good_picture() -> None:
    plain = make_dataset(STORED)
    plain.WindowCenter, plain.WindowWidth = 2000, 1000
    scan = decode_scan(with_canary("StudyDate", "DA"))
    assert np.array_equal(scan.image_HW, decode_scan(file_bytes(plain)).image_HW)
