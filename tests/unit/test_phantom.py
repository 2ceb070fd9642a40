"""Synthetic slices look like their class, and archives of them are whole, mixed and repeatable."""

import hashlib
import io
import zipfile
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest

from bt_core.errors import UsageError
from bt_core.scans.phantom import phantom_slice, write_archive
from bt_core.scans.phantom_anatomy import CLASS_NAMES
from jobs.phantom import run

SIZE_PX = 64
NUM_PER_CLASS = 10
SEEDS = range(24)


def slices(class_name: str) -> np.ndarray:
    """Return many slices of one class as float (N, H, W) in [0, 255]."""
    return np.stack([phantom_slice(class_name, seed, SIZE_PX) for seed in SEEDS]).astype(float)


def box(images_NHW: np.ndarray, v: tuple[float, float], u: tuple[float, float]) -> np.ndarray:
    """Cut the same box out of all images; bounds are shares of height and width."""
    height, width = images_NHW.shape[1:]
    rows = slice(round(v[0] * height), round(v[1] * height))
    columns = slice(round(u[0] * width), round(u[1] * width))
    return images_NHW[:, rows, columns]


@pytest.fixture(scope="module")
def stacks() -> dict[str, np.ndarray]:
    return {name: slices(name) for name in CLASS_NAMES}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("phantom") / "scans.zip"
    write_archive(str(path), NUM_PER_CLASS, seed=3, size_px=SIZE_PX)
    return path


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        return {name: file.read(name) for name in file.namelist()}


@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_same_arguments_same_pixels(class_name: str) -> None:
    first = phantom_slice(class_name, 5, SIZE_PX)
    assert np.array_equal(first, phantom_slice(class_name, 5, SIZE_PX))
    assert not np.array_equal(first, phantom_slice(class_name, 6, SIZE_PX))


@pytest.mark.parametrize("size_px", [32, 65, 192])
def test_shape_type_and_range(size_px: int) -> None:
    image_HW = phantom_slice("glioma", 1, size_px)
    assert image_HW.shape == (size_px, size_px)
    assert image_HW.dtype == np.uint8
    assert image_HW.max() > 120
    assert image_HW[:3, :3].mean() < 20, "the background is near black"


def test_a_seed_shows_the_same_head_at_every_size() -> None:
    small = phantom_slice("meningioma", 2, 96).astype(float)
    large = cv2.resize(phantom_slice("meningioma", 2, 192), (96, 96), interpolation=cv2.INTER_AREA)
    assert np.corrcoef(small.ravel(), large.astype(float).ravel())[0, 1] > 0.95


def test_classes_with_one_seed_are_different_heads() -> None:
    digests = {phantom_slice(name, 0, SIZE_PX).tobytes() for name in CLASS_NAMES}
    assert len(digests) == len(CLASS_NAMES)


def test_pituitary_mass_is_bright_at_the_centre(stacks: dict[str, np.ndarray]) -> None:
    centre = {
        name: box(stack, (0.46, 0.56), (0.46, 0.54)).mean(axis=(1, 2))
        for name, stack in stacks.items()
    }
    assert np.percentile(centre["pituitary"], 10) > 140
    for name in ("glioma", "meningioma", "no_tumor"):
        assert np.median(centre[name]) < np.percentile(centre["pituitary"], 10)


def test_meningioma_is_a_bright_even_mass(stacks: dict[str, np.ndarray]) -> None:
    def evenly_bright(images_NHW: np.ndarray) -> np.ndarray:
        """Share of pixels whose whole 5 x 5 neighbourhood is bright."""
        kernel = np.ones((5, 5), np.uint8)
        return np.array([(cv2.erode(image, kernel) > 155).mean() for image in images_NHW])

    meningioma = evenly_bright(stacks["meningioma"])
    assert (meningioma > 0).mean() > 0.9
    for name in ("glioma", "no_tumor"):
        assert evenly_bright(stacks[name]).mean() < 0.2 * meningioma.mean()


def test_glioma_breaks_the_symmetry_of_the_white_matter(stacks: dict[str, np.ndarray]) -> None:
    def asymmetry(images_NHW: np.ndarray) -> np.ndarray:
        smooth = np.stack([cv2.GaussianBlur(image, (0, 0), 3) for image in images_NHW])
        inner = box(smooth, (0.3, 0.7), (0.25, 0.75))
        return np.asarray(np.abs(inner - inner[:, :, ::-1]).mean(axis=(1, 2)))

    assert np.median(asymmetry(stacks["glioma"])) > 1.5 * np.median(asymmetry(stacks["no_tumor"]))


def test_unknown_class_lists_the_valid_names() -> None:
    with pytest.raises(ValueError, match=r"'notumor'.*glioma, meningioma, no_tumor, pituitary"):
        phantom_slice("notumor", 0)


def test_too_small_a_size_is_refused() -> None:
    with pytest.raises(ValueError, match="size_px = 16"):
        phantom_slice("glioma", 0, size_px=16)


def test_archive_is_complete(archive: Path) -> None:
    names = list(members(archive))
    assert len(names) == len(set(names)) == 4 * NUM_PER_CLASS
    assert Counter(name.split("/")[0] for name in names) == {"Training": 32, "Testing": 8}
    assert Counter(name.split("/")[1] for name in names) == dict.fromkeys(
        ("glioma", "meningioma", "notumor", "pituitary"), NUM_PER_CLASS
    )
    assert any(name.startswith("Training/glioma/gl_00") for name in names)


def test_archive_mixes_formats_that_match_their_names(archive: Path) -> None:
    magic = {".png": (0, b"\x89PNG"), ".jpg": (0, b"\xff\xd8\xff"), ".dcm": (128, b"DICM")}
    for class_folder in ("glioma", "meningioma", "notumor", "pituitary"):
        contents = {k: v for k, v in members(archive).items() if f"/{class_folder}/" in k}
        assert {name[-4:] for name in contents} == set(magic)
        for name, content in contents.items():
            start, expected = magic[name[-4:]]
            assert content[start:].startswith(expected)


def test_default_shares_of_formats_and_copies(tmp_path: Path) -> None:
    path = tmp_path / "scans.zip"
    assert write_archive(str(path), num_per_class=50, size_px=32) == 200
    contents = members(path)
    share = {k: n / 200 for k, n in Counter(name[-4:] for name in contents).items()}
    assert share == pytest.approx({".png": 0.45, ".jpg": 0.45, ".dcm": 0.1}, abs=0.03)
    assert len(contents) - len(set(contents.values())) == 4, "one copy in fifty of each class"


def test_copies_lie_across_training_and_testing_of_one_class(archive: Path) -> None:
    groups: dict[str, list[str]] = {}
    for name, content in members(archive).items():
        groups.setdefault(hashlib.sha256(content).hexdigest(), []).append(name)
    copies = [names for names in groups.values() if len(names) > 1]
    assert len(copies) == 4
    for names in copies:
        assert {name.split("/")[0] for name in names} == {"Training", "Testing"}
        assert len({name.split("/")[1] for name in names}) == 1


def test_same_arguments_same_bytes(archive: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "made" / "again.zip", tmp_path / "other.zip"
    write_archive(str(again), NUM_PER_CLASS, seed=3, size_px=SIZE_PX)
    write_archive(str(other), NUM_PER_CLASS, seed=4, size_px=SIZE_PX)
    assert again.read_bytes() == archive.read_bytes()
    assert not set(members(other).values()) & set(members(archive).values())
    assert [p.name for p in again.parent.iterdir()] == ["again.zip"], "nothing unfinished is left"


def test_dicom_members_are_plain_and_carry_no_identity(archive: Path) -> None:
    contents = [v for name, v in members(archive).items() if name.endswith(".dcm")]
    for content in contents:
        dataset = pydicom.dcmread(io.BytesIO(content))  # a warning would be an error
        assert dataset.PatientName == ""
        assert dataset.PatientID == ""
        assert dataset.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
        assert dataset.PhotometricInterpretation == "MONOCHROME2"
        assert (dataset.BitsAllocated, dataset.BitsStored) == (16, 12)
        assert (dataset.WindowCenter, dataset.WindowWidth) == (2048, 4096)
        stored = dataset.pixel_array
        assert stored.shape == (SIZE_PX, SIZE_PX)
        assert 255 < stored.max() <= 4095, "uses more than 8 of its 12 bits"


def test_class_folders_without_a_split(tmp_path: Path) -> None:
    path = tmp_path / "scans.zip"
    assert write_archive(str(path), 2, size_px=32, split_folders=False) == 8
    assert {name.split("/")[0] for name in members(path)} == {
        "glioma",
        "meningioma",
        "notumor",
        "pituitary",
    }


def test_unlabelled_names_tell_nothing(tmp_path: Path) -> None:
    labelled, flat = tmp_path / "labelled.zip", tmp_path / "flat.zip"
    write_archive(str(labelled), 4, size_px=32)
    assert write_archive(str(flat), 4, size_px=32, labelled=False) == 16
    assert [name[:-4] for name in members(flat)] == [f"scan_{i:04d}" for i in range(1, 17)]
    shuffled, ordered = list(members(flat).values()), list(members(labelled).values())
    assert shuffled != ordered
    assert sorted(shuffled) == sorted(ordered)


@pytest.mark.parametrize(("num_per_class", "size_px"), [(0, 32), (1, 8)])
def test_a_refused_archive_leaves_nothing(tmp_path: Path, num_per_class: int, size_px: int) -> None:
    with pytest.raises(ValueError, match=r"num_per_class = 0|size_px = 8"):
        write_archive(str(tmp_path / "scans.zip"), num_per_class, size_px=size_px)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"scans.zip cannot be written \(.*\); choose another"):
        run(str(tmp_path / "file" / "scans.zip"))
