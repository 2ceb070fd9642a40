"""Synthetic head-MRI slices that a person can tell apart, and archives of them."""

import io
import os
import tempfile
import zipfile

import cv2
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from bt_core.scans.phantom_anatomy import CLASS_NAMES, render, stable_int


def phantom_slice(class_name: str, seed: int, size_px: int = 192) -> np.ndarray:
    """Draw one synthetic slice; the same arguments give the same pixels.

    Args:
        class_name: glioma, meningioma, no_tumor or pituitary.
        seed: chooses head, level, contrast and mass; independent between classes.
        size_px: edge of the square image, >= 32; the head keeps its shape, only the noise differs.

    Returns:
        image_HW uint8 in [0, 255], background near 0, the forehead at the top.

    Raises:
        ValueError: on an unknown class or a size below 32.
    """
    image_HW: np.ndarray = np.rint(render(class_name, seed, size_px) * 255).astype(np.uint8)
    return image_HW


def encode_picture(image_HW: np.ndarray, suffix: str, quality: int = 90) -> bytes:
    """Return a uint8 image as the bytes of a .png or, with a quality of 0 to 100, a .jpg file."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if suffix == ".jpg" else []
    return bytes(cv2.imencode(suffix, np.ascontiguousarray(image_HW), options)[1])


def perturbed_copy(image_HW: np.ndarray, rng: np.random.Generator) -> bytes:
    """Return a copy as they stand in public sets, as the bytes of a .jpg file.

    One of the 8 flips and rotations, another size in each direction (0.8 to 1.5 times), another
    brightness (0.8 to 1.2 times), a quality of 60 to 95.
    """
    turned = np.rot90(image_HW, int(rng.integers(4)))
    turned = turned[:, ::-1] if rng.integers(2) else turned
    size = [round(side * rng.uniform(0.8, 1.5)) for side in turned.shape]
    resized = cv2.resize(np.ascontiguousarray(turned), size, interpolation=cv2.INTER_AREA)
    brighter = cv2.convertScaleAbs(resized, alpha=rng.uniform(0.8, 1.2))
    return encode_picture(brighter, ".jpg", int(rng.integers(60, 96)))


def _dicom_bytes(image_HW: np.ndarray, seed: int) -> bytes:
    """Return an image in [0, 1] as a 12-bit MR object without identity; the window spans it all."""
    study, series, instance = (generate_uid(entropy_srcs=[f"{k}/{seed}"]) for k in range(3))
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = MRImageStorage, instance
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
    dataset.PatientName = dataset.PatientID = ""
    dataset.Modality, dataset.ImageType = "MR", ["DERIVED", "SECONDARY", "OTHER"]
    dataset.Rows, dataset.Columns = image_HW.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0  # unsigned
    dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
    dataset.PixelData = np.rint(image_HW * 4095).astype("<u2").tobytes()
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _encode(class_name: str, seed: int, size_px: int, suffix: str) -> bytes:
    """Return a slice as the bytes of a .png, .jpg or .dcm file."""
    if suffix == ".dcm":
        return _dicom_bytes(render(class_name, seed, size_px), seed)
    return encode_picture(phantom_slice(class_name, seed, size_px), suffix)


def _plan_class(class_name: str, num: int, seed: int) -> list[tuple[str, int, str, str]]:
    """Return (class, slice seed, suffix, split folder) of a class's scans in random order."""
    rng = np.random.default_rng(stable_int(f"members/{class_name}/{seed}"))
    num_test = round(num / 5)
    num_unique = num - (max(1, round(num / 50)) if num_test else 0)
    num_dicom = max(1, round(num_unique / 10))
    num_jpg = (num_unique - num_dicom) // 2
    num_png = num_unique - num_dicom - num_jpg
    suffixes = rng.permutation([".dcm"] * num_dicom + [".jpg"] * num_jpg + [".png"] * num_png)
    scans = []
    for i in range(num):
        original = i % num_unique  # the last scans, in Testing, repeat the first
        slice_seed = stable_int(f"{class_name}/{seed}/{original}")
        split = "Training" if i < num - num_test else "Testing"
        scans.append((class_name, slice_seed, str(suffixes[original]), split))
    return [scans[i] for i in rng.permutation(num)]


def write_archive(
    path: str,
    num_per_class: int = 60,
    seed: int = 0,
    size_px: int = 192,
    split_folders: bool = True,
    labelled: bool = True,
) -> int:
    """Write a zip of synthetic scans beside its place and rename it; equal arguments, equal bytes.

    About 45 % are PNG, 45 % JPEG and 10 % DICOM, and 2 % (at least one per class, from 3 scans per
    class on) are exact copies of another scan of their class, across Training and Testing.

    Args:
        path: local path of the zip; its folder is made if missing.
        num_per_class: scans of each class, >= 1, copies included.
        seed: chooses slices, formats and copies.
        size_px: edge of the square images, >= 32.
        split_folders: Training/ and Testing/ (about 20 %) above the class folders.
        labelled: `glioma/gl_0001.png` and so on; if false, shuffled `scan_0001.png`, no folders.

    Returns:
        The number of members.

    Raises:
        ValueError: if `num_per_class` or `size_px` is too small.
    """
    if num_per_class < 1:
        raise ValueError(f"num_per_class = {num_per_class} must be >= 1")
    scans = [scan for name in CLASS_NAMES for scan in _plan_class(name, num_per_class, seed)]
    order = np.arange(len(scans))
    if not labelled:
        order = np.random.default_rng(stable_int(f"order/{seed}")).permutation(order)
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        unfinished = os.path.join(beside, "scans.zip")
        with zipfile.ZipFile(unfinished, "w") as archive:
            for place, i in enumerate(order):
                class_name, slice_seed, suffix, split = scans[i]
                label = class_name.replace("_", "")
                stem = f"{label}/{label[:2]}_{i % num_per_class + 1:04d}"
                stem = f"{split}/{stem}" if split_folders else stem
                stem = stem if labelled else f"scan_{place + 1:04d}"
                info = zipfile.ZipInfo(stem + suffix, date_time=(1980, 1, 1, 0, 0, 0))
                info.create_system, info.external_attr = 3, 0o644 << 16
                archive.writestr(info, _encode(class_name, slice_seed, size_px, suffix))
        os.replace(unfinished, path)
    return len(scans)
