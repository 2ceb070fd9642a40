"""DICOM objects become grey pictures as PS3.3 says."""

import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.pixels import decoders
from pydicom.uid import (
    JPEG2000,
    UID,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from bt_core.errors import ScanError
from bt_core.scans import dicom
from bt_core.scans.decoded import BURNED_IN
from bt_core.scans.formats import DecodedScan, decode_scan
from bt_core.scans.identity import keyed_hash, patient_hash
from tests.scan_files import (
    BT601,
    RGB,
    SIGNED,
    SMOOTH,
    STORED,
    STORED8,
    bare_dicom,
    between_percentiles,
    compressed_object,
    dicom_object,
    encode,
    file_bytes,
    frames,
    item,
    jpeg_2000_frame,
    lookup_table,
    make_dataset,
    multi_frame,
    recompressed,
)

PREAMBLE_BYTES = 132
WINDOW_STEP = "VOI LUT or window"
PERCENTILE_STEP = "percentile scaling to 8 bit"
JUNK = b"\x01\x02not a codestream" * 8


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
        *(
            pytest.param(
                lambda width=width: dicom_object(STORED, WindowCenter=2000, WindowWidth=width),
                between_percentiles(STORED),
                ("window without a width ignored", PERCENTILE_STEP),
                id=f"window of width {width}",
            )
            for width in (0, -100, 0.5)
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


@pytest.mark.parametrize("entries", [256, 255])
@pytest.mark.parametrize("dtype", ["u1", "<u2"])
def test_a_voi_table_of_8_bits_may_be_packed(dtype: str, entries: int) -> None:
    table = item()
    table.add_new("LUTDescriptor", "US", [entries, 0, 8])
    content = (255 - np.arange(entries)).astype(dtype).tobytes()
    table.add_new("LUTData", "OW", content + b"\0" * (len(content) % 2))
    scan = decode_scan(dicom_object(STORED8, VOILUTSequence=[table]))
    assert_close(scan, 255.0 - np.minimum(STORED8, entries - 1))
    assert scan.steps == (WINDOW_STEP,)


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


@pytest.mark.parametrize("hint", ["scan.dcm", "SCAN.DCM", "scan.dicom", "application/dicom"])
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: dicom_object(STORED)[PREAMBLE_BYTES:], id="meta header"),
        pytest.param(bare_dicom, id="bare data set"),
    ],
)
def test_the_name_tells_dicom_without_a_preamble(content: Callable[[], bytes], hint: str) -> None:
    assert_close(decode_scan(content(), hint), between_percentiles(STORED))


def test_dicom_without_preamble_or_hint_is_unsupported() -> None:
    assert refusal(dicom_object(STORED)[PREAMBLE_BYTES:], "scan").reason == "unsupported_type"


@pytest.mark.parametrize("content", [b"some text\n" * 30, b"\0" * 400, b"II*\0" * 50])
def test_other_content_named_dcm_is_refused(content: bytes) -> None:
    assert refusal(content, "scan.dcm").reason in ("unsupported_type", "corrupt_image")


def is_compressed(path: Path) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path, force=True)
    syntax = dataset.file_meta.get("TransferSyntaxUID", UID(""))
    return bool(syntax) and syntax.is_encapsulated and "PixelData" in dataset


# The files in the package itself: pydicom's own functions that list them try the network for more.
TEST_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
COMPRESSED = sorted(path for path in TEST_FILES.glob("*.dcm") if is_compressed(path))
NOT_DECODED = {
    "JPEG-lossy.dcm": "transfer_syntax_unsupported",  # JPEG Extended of 12 bits: the extra `gpl`
    "JPGExtended.dcm": "transfer_syntax_unsupported",
    "JPEG2000-embedded-sequence-delimiter.dcm": "corrupt_image",  # on purpose
}


@pytest.mark.parametrize("path", COMPRESSED, ids=lambda path: path.name)
def test_pydicoms_compressed_files(path: Path) -> None:
    """36 of the 39 give the pixels that pydicom gives by trying all its decoders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compare_with_pydicom(path)


def compare_with_pydicom(path: Path) -> None:
    dataset = dicom.read(path.read_bytes())
    num_frames = int(dataset.get("NumberOfFrames", 1) or 1)
    if path.name in NOT_DECODED:
        with pytest.raises(ScanError) as caught:
            dicom.decode_frame(dataset, num_frames // 2, num_frames)
        assert caught.value.reason == NOT_DECODED[path.name]
        return
    stored, _ = dicom.decode_frame(dataset, num_frames // 2, num_frames)
    expected = pydicom.dcmread(path, force=True).pixel_array
    if num_frames > 1:
        expected = expected[num_frames // 2]
    assert np.array_equal(stored, expected)


def test_pydicoms_compressed_files_are_all_there() -> None:
    assert len(COMPRESSED) == 39
    assert len(NOT_DECODED) == 3


def test_scans_among_pydicoms_compressed_files_decode_to_the_end() -> None:
    """Refused are, besides `NOT_DECODED`, dose maps and pictures under the smallest side."""
    reasons: dict[str, list[str]] = {}
    for path in COMPRESSED:
        try:
            reason = decode_scan(path.read_bytes(), path.name).format
        except ScanError as error:
            reason = error.reason
        reasons.setdefault(reason, []).append(path.name)
    assert len(reasons.pop("DICOM")) == 31
    assert reasons.pop("image_too_small") == [
        "JPEGLSNearLossless_08.dcm",
        "JPEGLSNearLossless_16.dcm",
        "SC_rgb_small_odd_jpeg.dcm",
    ]
    assert reasons.pop("not_an_image_object") == ["rtdose_rle.dcm", "rtdose_rle_1frame.dcm"]
    assert {name: reason for reason, names in reasons.items() for name in names} == NOT_DECODED


def test_jpeg_2000_without_a_decoder_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders.JPEG2000Decoder, "_available", {})
    error = refusal(compressed_object(JPEG2000, jpeg_2000_frame()))
    assert error.reason == "transfer_syntax_unsupported"
    assert error.detail == JPEG2000.name


def test_an_unregistered_syntax_is_not_quoted() -> None:
    content = compressed_object(JPEG2000, JUNK)
    private = b"1.2.826.0.1.12345".ljust(len(JPEG2000), b"\0")
    error = refusal(content.replace(JPEG2000.encode(), private))
    assert error.reason == "transfer_syntax_unsupported"
    assert "12345" not in str(error)


def test_refusals_name_only_technical_values() -> None:
    assert refusal(dicom_object(STORED, NumberOfFrames=700)).detail == "700 frames, limit 512"
    assert "60000x50000" in refusal(dicom_object(STORED, Rows=50_000, Columns=60_000)).detail
    small = compressed_object(JPEG2000Lossless, jpeg_2000_frame(SMOOTH))
    assert refusal(small).detail == "codestream of 80x64x1, header says 56x40x1"


def rle_object() -> bytes:
    return recompressed(RLELossless)


def rle_of(segment: bytes, segments: int = 2, offset: int = 64) -> bytes:
    """Return a 16-bit object of twice the same segment."""
    header = struct.pack("<3I", segments, offset, 64 + len(segment)).ljust(64, b"\0")
    frame = header + segment + segment
    return compressed_object(RLELossless, frame, BitsAllocated=16, BitsStored=12, HighBit=11)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: rle_object()[:-60], id="RLE file cut"),
        pytest.param(
            lambda: compressed_object(JPEGBaseline8Bit, encode(STORED8, "JPEG")[:400]),
            id="JPEG cut",
        ),
        pytest.param(lambda: rle_of(b"\x81\x05", segments=3), id="RLE of too many segments"),
        pytest.param(lambda: rle_of(b"\x81\x05", offset=4000), id="RLE segment behind its end"),
        # The decoder is in Rust and panics, which is no Exception in Python.
        pytest.param(lambda: rle_of(b"\x81\x05" * 17 + b"\xbf\x05"), id="RLE of too many pixels"),
    ],
)
def test_damage_to_a_supported_compression_is_damage(content: Callable[[], bytes]) -> None:
    assert refusal(content()).reason in ("corrupt_image", "truncated_image")


@pytest.mark.parametrize(("num_frames", "index"), [(1, 0), (2, 1), (3, 1), (24, 12), (25, 12)])
def test_the_middle_frame_is_taken(num_frames: int, index: int) -> None:
    scan = decode_scan(multi_frame(num_frames))
    assert_close(scan, between_percentiles(frames(num_frames)[index]))
    assert (scan.num_frames, scan.frame_index) == (num_frames, index)
    says = [f"frame {index + 1} of {num_frames}"] if num_frames > 1 else []
    assert scan.steps == (*says, PERCENTILE_STEP)


def test_only_the_chosen_frame_is_decoded() -> None:
    good = jpeg_2000_frame((frames(3)[1] // 16).astype(np.uint8))
    content = compressed_object(JPEG2000Lossless, JUNK, good, JUNK)
    assert_close(decode_scan(content), between_percentiles(frames(3)[1] // 16))


def enhanced(per_frame: list[pydicom.Dataset], shared: pydicom.Dataset) -> DecodedScan:
    content = multi_frame(
        3,
        PerFrameFunctionalGroupsSequence=per_frame,
        SharedFunctionalGroupsSequence=[shared],
        WindowCenter=1,
        WindowWidth=2,
    )
    return decode_scan(content)


def rescale(slope: float, intercept: float) -> pydicom.Dataset:
    values = item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="US")
    return item(PixelValueTransformationSequence=[values])


def test_functional_groups_of_the_frame_go_before_the_shared_and_the_object() -> None:
    window = item(FrameVOILUTSequence=[item(WindowCenter=4000, WindowWidth=6000)])
    scan = enhanced([rescale(1, 0), rescale(2, 10), rescale(3, 0)], window)
    assert_close(scan, windowed(frames(3)[1] * 2.0 + 10, 4000, 6000))
    assert scan.steps == ("frame 2 of 3", "modality LUT", WINDOW_STEP)

    per_frame = [
        item(),
        item(FrameVOILUTSequence=[item(WindowCenter=900, WindowWidth=700)]),
        item(),
    ]
    assert_close(enhanced(per_frame, window), windowed(frames(3)[1], 900, 700))
    assert_close(enhanced([], rescale(1, 0)), windowed(frames(3)[1], 1, 2))


def test_spacing_of_the_functional_groups_makes_pixels_square() -> None:
    measures = item(PixelMeasuresSequence=[item(PixelSpacing=[2, 1])])
    assert enhanced([], measures).image_HW.shape == (80, 56)


@pytest.mark.parametrize(
    ("tags", "shape"),
    [
        ({"PixelSpacing": [0.5, 0.5]}, (40, 56)),
        ({"PixelSpacing": [1.0, 1.009]}, (40, 56)),
        ({"PixelSpacing": [1.5, 1.0]}, (60, 56)),
        ({"PixelSpacing": [0.5, 1.0]}, (40, 112)),
        ({"PixelAspectRatio": ["3", "2"]}, (60, 56)),
        ({"PixelSpacing": [1.0, 0.0]}, (40, 56)),
        ({"PixelSpacing": None}, (40, 56)),
    ],
)
def test_pixels_become_square(tags: dict[str, object], shape: tuple[int, int]) -> None:
    scan = decode_scan(dicom_object(STORED, **tags))
    assert scan.image_HW.shape == shape
    assert ("resized to square pixels" in scan.steps) == (shape != (40, 56))


def test_an_absurd_aspect_is_refused_before_it_is_allocated() -> None:
    assert refusal(dicom_object(STORED, PixelSpacing=[1e30, 1e-30])).reason == "image_too_large"


SIXTEEN_BITS = {"BitsStored": 16, "HighBit": 15}


def with_border(value: int) -> np.ndarray:
    stored = SIGNED.copy()
    stored[:, :8] = value
    return stored


@pytest.mark.parametrize(
    ("stored", "tags"),
    [
        pytest.param(with_border(-2500), {"PixelPaddingValue": -2500}, id="value"),
        pytest.param(with_border(2047), {"PixelPaddingValue": 2047}, id="bright value"),
        pytest.param(
            with_border(-2500),
            {"PixelPaddingValue": -2400, "PixelPaddingRangeLimit": -2600},
            id="range",
        ),
    ],
)
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_out_of_the_percentiles(
    stored: np.ndarray, tags: dict[str, object], photometric: str
) -> None:
    scan = decode_scan(
        dicom_object(stored, PhotometricInterpretation=photometric, **SIXTEEN_BITS, **tags)
    )
    inside = between_percentiles(np.where(stored == stored[0, 0], np.nan, stored.astype(float)))
    inside = 255 - inside if photometric == "MONOCHROME1" else inside
    assert_close(scan, np.where(np.isnan(inside), 0, inside))
    inverted = ["MONOCHROME1 inverted"] if photometric == "MONOCHROME1" else []
    assert scan.steps == (PERCENTILE_STEP, *inverted, "padding pixels black")


def test_only_values_that_are_not_finite_are_counted_as_such() -> None:
    stored = STORED.copy()
    stored[:, :8] = 7
    slope = 1e35  # of the stored values, those over 3402 times this do not fit into float32
    stored[20, 20:25] = 4000
    tags = {"PixelPaddingValue": 7, "RescaleSlope": slope, "RescaleIntercept": 0}
    scan = decode_scan(dicom_object(stored, **tags))
    assert scan.steps[1:] == (
        "5 values that are not finite left out",
        PERCENTILE_STEP,
        "padding pixels black",
    )


def test_signed_padding_written_as_unsigned() -> None:
    dataset = make_dataset(with_border(-2500))
    dataset.BitsStored, dataset.HighBit = 16, 15
    dataset.add_new("PixelPaddingValue", "US", 2**16 - 2500)
    assert "padding pixels black" in decode_scan(file_bytes(dataset)).steps


KEY = b"a key of this site"


def test_the_patient_leaves_only_as_a_keyed_hash() -> None:
    scan = decode_scan(dicom_object(STORED, PatientID="MRN 0815 "), hash_key=KEY)
    assert scan.patient == keyed_hash("MRN 0815", KEY)
    # From `printf 'MRN 0815' | openssl dgst -sha256 -hmac 'a key of this site'`.
    assert scan.patient == "88de76f63944e19162b10622d68645cb"
    assert decode_scan(dicom_object(STORED, PatientID="MRN 0815")).patient == ""
    assert decode_scan(dicom_object(STORED), hash_key=KEY).patient == ""
    assert decode_scan(dicom_object(STORED, PatientID="  "), hash_key=KEY).patient == ""
    assert decode_scan(dicom_object(STORED, PatientID="MRN 0815"), hash_key=b"x").patient not in (
        scan.patient,
        "",
    )


PLACEHOLDERS = [
    "ANONYMOUS", "anon", " Anonymized ", "0", "00000000", "0-0", "UNKNOWN", "NONE", "NA", "N/A",
    "-", "TEST", "Patient", "DE-IDENTIFIED", "DEIDENTIFIED", "REMOVED", "***",
]  # fmt: skip


@pytest.mark.parametrize("patient", PLACEHOLDERS)
def test_a_placeholder_does_not_make_one_patient_of_many(patient: str) -> None:
    scan = decode_scan(dicom_object(STORED, PatientID=patient), hash_key=KEY)
    assert scan.patient == patient_hash(patient, KEY) == ""
    assert scan.steps[-1] == "placeholder for the patient ignored"


@pytest.mark.parametrize("patient", ["ANON0001", "1", "TEST-2", "0010", "Patient 7", "Ж", "Nah"])
def test_what_names_one_patient_is_no_placeholder(patient: str) -> None:
    assert patient_hash(patient, KEY) == keyed_hash(patient, KEY)
    assert patient_hash(patient, None) == ""


@pytest.mark.parametrize(
    ("stated", "steps"),
    [
        ("YES", (PERCENTILE_STEP, BURNED_IN)),
        ("YES ", (PERCENTILE_STEP, BURNED_IN)),
        ("NO", (PERCENTILE_STEP,)),
        (None, (PERCENTILE_STEP,)),
    ],
)
def test_a_burned_in_annotation_is_said_if_the_object_states_it(
    stated: str | None, steps: tuple[str, ...]
) -> None:
    tags = {"SOPClassUID": SecondaryCaptureImageStorage, "BurnedInAnnotation": stated}
    assert decode_scan(dicom_object(STORED, **tags)).steps == steps
    assert decode_scan(dicom_object(STORED, SOPClassUID=tags["SOPClassUID"])).steps == steps[:1]


def test_a_directory_is_never_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    content = (TEST_FILES / "dicomdirtests" / "DICOMDIR").read_bytes()
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("opened a file"))
    assert refusal(content).reason == "not_an_image_object"
