"""NIfTI volumes: which slice is shown, which way up, and how its values become grey."""

import builtins
import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bt_core.errors import ScanError
from bt_core.scans.decoded import DecodedScan
from bt_core.scans.formats import decode_scan
from tests.scan_files import GREY, VOLUME, axial_view, between_percentiles, nifti, reoriented

AXIAL = between_percentiles(axial_view(VOLUME))
STEP = "slice 23 of 44"
PERCENTILES = "percentile scaling to 8 bit"


def assert_close(scan: DecodedScan, expected: np.ndarray) -> None:
    assert scan.format == "NIFTI"
    assert scan.image_HW.shape == expected.shape
    assert np.abs(scan.image_HW - expected).max() <= 1


ORIENTATIONS = ["RAS", "LAS", "LPS", "RPI", "PIR", "ASL", "SRA", "IPL", "LSA", "SAR"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_the_same_slice_the_same_way_up_however_it_is_stored(axes: str, packed: bool) -> None:
    stored, affine = reoriented(axes)
    scan = decode_scan(nifti(stored.astype("i4"), affine, packed))
    assert_close(scan, AXIAL)
    assert scan.steps == (STEP, PERCENTILES)
    assert (scan.num_frames, scan.frame_index) == (44, 22)


def test_a_marker_on_the_patients_left_is_on_the_images_right() -> None:
    """Without the arithmetic of the other tests: two bright marks, left and front."""
    volume = np.full((40, 50, 33), 10, "u1")
    volume[2:6, 23:27, 16] = 200  # x grows to the right, so this is left
    volume[18:22, 44:48, 16] = 100  # y grows to the front
    scan = decode_scan(nifti(volume))
    assert scan.image_HW.shape == (50, 40)
    rows, columns = np.nonzero(scan.image_HW == 255)
    assert columns.min() > 30, "left is shown on the right"
    assert 20 < rows.mean() < 30
    rows, columns = np.nonzero((scan.image_HW > 80) & (scan.image_HW < 160))
    assert rows.max() < 10, "anterior is up"


def test_an_oblique_volume_is_taken_by_its_nearest_axes() -> None:
    turn = np.deg2rad(20)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    assert_close(decode_scan(nifti(VOLUME.astype("i4"), affine)), AXIAL)


def test_the_quaternion_counts_where_there_is_no_matrix() -> None:
    stored, affine = reoriented("LPS")
    image = nib.Nifti1Image(stored.astype("i4"), None)
    image.set_qform(affine, 1)
    assert_close(decode_scan(image.to_bytes()), AXIAL)


def test_no_orientation_at_all_is_recorded() -> None:
    scan = decode_scan(nifti(VOLUME[::-1].astype("i4"), sform_code=0, qform_code=0))
    assert_close(scan, AXIAL)  # NIfTI's default: x grows to the left
    assert scan.steps[1] == "no orientation in the header, NIfTI's default axes taken"


@pytest.mark.parametrize(
    ("thin", "expected"),
    [
        (2, VOLUME[:, :, 5].T[::-1, ::-1]),
        (1, VOLUME[:, 5, :].T[::-1, ::-1]),  # coronal: superior up, left on the right
        (0, VOLUME[5].T[::-1, ::-1]),  # sagittal: superior up, anterior on the left
    ],
)
@pytest.mark.parametrize("stored_as", ["RAS", "SPL", "PIR"])
def test_a_single_slice_is_shown_in_its_own_plane(
    thin: int, expected: np.ndarray, stored_as: str
) -> None:
    stored, affine = reoriented(stored_as)
    codes = nib.orientations.aff2axcodes(affine)
    axis = next(i for i, code in enumerate(codes) if code in ("RL", "AP", "SI")[thin])
    position = 5 if codes[axis] in "RAS" else VOLUME.shape[thin] - 1 - 5
    scan = decode_scan(nifti(np.take(stored, [position], axis).astype("i4"), affine))
    assert_close(scan, between_percentiles(expected))
    assert (scan.num_frames, scan.frame_index) == (1, 0)


def test_of_several_volumes_the_first() -> None:
    values = np.stack([VOLUME, VOLUME % 91, VOLUME % 17], axis=3).astype("i4")
    scan = decode_scan(nifti(values, packed=True))
    assert_close(scan, AXIAL)
    assert scan.steps == (STEP, "first of 3 volumes", PERCENTILES)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_every_real_type(dtype: str) -> None:
    values = (VOLUME % 120).astype(dtype)
    scan = decode_scan(nifti(values))
    assert_close(scan, between_percentiles(axial_view(values)))
    assert scan.bit_depth == np.dtype(dtype).itemsize * 8


def test_values_that_are_not_finite_are_left_out_and_counted() -> None:
    values = VOLUME.astype("f4")
    values[3, 4, 22], values[5, 6, 22], values[7, 8, 22] = np.nan, np.inf, -np.inf
    values[0, 0, 0] = np.nan  # in another slice
    scan = decode_scan(nifti(values))
    assert scan.steps == (STEP, "3 values that are not finite left out", PERCENTILES)
    shown = axial_view(values)
    expected = np.where(np.isfinite(shown), between_percentiles(shown), 0)
    assert_close(scan, expected)


@pytest.mark.parametrize("value", [1e300, -1e300, 3.5e38])
def test_values_beyond_single_precision_do_not_blind_the_rest(value: float) -> None:
    values = VOLUME.astype("f8")
    values[3, 4, 22] = value
    scan = decode_scan(nifti(values))
    assert "1 values that are not finite left out" in scan.steps
    assert np.abs(np.delete(scan.image_HW - AXIAL, (40 - 1 - 4) * 36 + 36 - 1 - 3)).max() <= 1


@pytest.mark.parametrize(
    ("zooms", "shape"),
    [
        ((1, 1, 1), (40, 36)),
        ((1.005, 1, 5), (40, 36)),
        ((2, 1, 1), (40, 72)),
        ((1, 2.5, 1), (100, 36)),
        ((0.5, 1, 7), (80, 36)),
    ],
)
def test_voxels_become_square_pixels(zooms: tuple[float, ...], shape: tuple[int, int]) -> None:
    scan = decode_scan(nifti(VOLUME.astype("i4"), np.diag([*zooms, 1])))
    assert scan.image_HW.shape == shape
    assert ("resized to square pixels" in scan.steps) == (shape != (40, 36))


def test_resizing_keeps_the_picture_where_it_is() -> None:
    scan = decode_scan(nifti(VOLUME.astype("i4"), np.diag([2, 1, 1, 1])))
    assert np.abs(scan.image_HW[:, ::2] - AXIAL).max() <= 3


def test_an_absurd_voxel_size_is_refused() -> None:
    with pytest.raises(ScanError, match="image_too_large"):
        decode_scan(nifti(VOLUME.astype("i4"), np.diag([1e6, 1, 1, 1])))


def test_header_extensions_are_passed_over() -> None:
    image = nib.Nifti1Image(VOLUME.astype("i4"), np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"a note" * 50))
    content = image.to_bytes()
    assert b"a note" in content
    assert_close(decode_scan(content), AXIAL)


def test_damage_behind_the_slice_is_noticed() -> None:
    content = gzip.compress(nifti(VOLUME.astype("i2")), 1)
    for position in (len(content) // 2, len(content) - 200, len(content) - 6):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        with pytest.raises(ScanError) as caught:
            decode_scan(bytes(damaged))
        assert caught.value.reason in ("corrupt_image", "truncated_image")


def test_nothing_is_opened_and_no_header_text_gets_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"descrip": b"CANARY", "aux_file": b"CANARY", "db_name": b"CANARY"}
    content = nifti(VOLUME.astype("i2"), **fields)
    assert content.count(b"CANARY") == 3
    monkeypatch.setattr(builtins, "open", lambda *_, **__: pytest.fail("opened a file"))
    assert "CANARY" not in repr(decode_scan(content, "scan.nii"))
    with pytest.raises(ScanError) as caught:
        decode_scan(nifti(VOLUME.astype("i2"), datatype=7, **fields), "scan.nii")
    assert "CANARY" not in repr(caught.value)


def test_a_pair_of_files_is_refused_in_words() -> None:
    pair = nib.Nifti1Pair(VOLUME.astype("i2"), np.eye(4)).header.binaryblock
    with pytest.raises(ScanError, match=r"convert it to one \.nii"):
        decode_scan(pair, "scan.hdr")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("anatomical.nii", None),
        ("functional.nii", "image_too_small"),
        ("standard.nii.gz", "image_too_small"),
        ("example4d.nii.gz", None),
        ("example_nifti2.nii.gz", "image_too_small"),
    ],
)
def test_nibabels_own_files(name: str, reason: str | None) -> None:
    """What nibabel ships, compared with what nibabel reads."""
    path = Path(nib.__file__).parent / "tests" / "data" / name
    if reason is not None:
        with pytest.raises(ScanError, match=reason):
            decode_scan(path.read_bytes(), name)
        return
    image = nib.as_closest_canonical(nib.load(path))
    volume = np.asarray(image.dataobj, dtype=float)
    view = axial_view(volume if volume.ndim == 3 else volume[..., 0])
    scan = decode_scan(path.read_bytes(), name)
    assert scan.num_frames == volume.shape[2]
    assert_close(scan, between_percentiles(view))


def test_flat_and_empty_volumes_have_no_signal() -> None:
    for values in (np.zeros((40, 40, 3), "i2"), np.full((40, 40, 3), np.nan, "f4")):
        with pytest.raises(ScanError, match="no_signal"):
            decode_scan(nifti(values))


def test_two_dimensions_are_the_slice() -> None:
    scan = decode_scan(nifti(GREY.T.copy()))
    assert_close(scan, between_percentiles(GREY[::-1, ::-1]))
    assert scan.steps == ("slice 1 of 1", PERCENTILES)
