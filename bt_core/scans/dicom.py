"""DICOM objects become grey images. No header value ever leaves this module except technical ones.

pydicom's warnings quote values verbatim (a name in a date field, for one), so they are swallowed
here.
"""

import io
import warnings
from collections.abc import Callable
from typing import Final

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import UID

from bt_core.errors import ScanError
from bt_core.scans.intensity import to_uint8

_PREAMBLE: Final = 128
_GREY: Final = ("MONOCHROME1", "MONOCHROME2")


def is_dicom(content: bytes, hint: str = "") -> bool:
    """Return whether bytes carry the DICOM prefix, or the name or media type says DICOM."""
    return content[_PREAMBLE : _PREAMBLE + 4] == b"DICM" or hint.lower().endswith(
        (".dcm", ".dicom", "application/dicom")
    )


def decode(
    content: bytes, check_size: Callable[[int, int], None]
) -> tuple[np.ndarray, int, tuple[str, ...]]:
    """Decode a single-frame greyscale DICOM object.

    Modality LUT or rescale, then the VOI LUT or the first window (percentiles without one), then
    MONOCHROME1 is inverted: PS3.3 C.7.6.3, C.11.1, C.11.2.

    Args:
        content: the whole file.
        check_size: called with (columns, rows) before any pixel is decoded; raises to refuse.

    Returns:
        image_HW uint8, bits stored per sample, and the steps that were applied.

    Raises:
        ScanError: with a reason code and no header value but sizes and the transfer syntax.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = _read(content)
        _check_header(dataset, check_size)
        try:
            stored = dataset.pixel_array
        except (NotImplementedError, RuntimeError, AttributeError) as error:
            syntax = UID(dataset.file_meta.TransferSyntaxUID)
            if syntax.is_compressed and not isinstance(error, AttributeError):
                raise ScanError("transfer_syntax_unsupported", syntax.name) from None
            raise ScanError("corrupt_image", type(error).__name__) from None
        except (ValueError, EOFError) as error:
            raise ScanError("truncated_image", type(error).__name__) from None
        return _render(dataset, stored)


def _read(content: bytes) -> pydicom.Dataset:
    try:
        dataset = pydicom.dcmread(io.BytesIO(content))
    except InvalidDicomError:
        raise ScanError("unsupported_type", "no DICOM header") from None
    if "TransferSyntaxUID" not in getattr(dataset, "file_meta", {}):
        raise ScanError("corrupt_image", "no transfer syntax")
    return dataset


def _check_header(dataset: pydicom.Dataset, check_size: Callable[[int, int], None]) -> None:
    if "PixelData" not in dataset:
        raise ScanError("no_pixel_data")
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    if frames != 1:
        raise ScanError("multi_frame", f"{frames} frames")
    check_size(int(dataset.Columns), int(dataset.Rows))
    if (
        dataset.get("PhotometricInterpretation") not in _GREY
        and dataset.get("SamplesPerPixel") == 1
    ):
        raise ScanError("unsupported_type", "not a greyscale DICOM object")


def _render(
    dataset: pydicom.Dataset, stored: np.ndarray
) -> tuple[np.ndarray, int, tuple[str, ...]]:
    bit_depth = int(dataset.get("BitsStored", stored.dtype.itemsize * 8))
    if stored.ndim == 3:  # a colour secondary capture
        grey = stored[..., :3].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
        return np.clip(np.rint(grey), 0, 255).astype(np.uint8), bit_depth, ("colour to grey",)
    steps: list[str] = []
    values = apply_modality_lut(stored, dataset)
    if "RescaleSlope" in dataset or "ModalityLUTSequence" in dataset:
        steps.append("modality LUT")
    if "VOILUTSequence" in dataset or "WindowWidth" in dataset:
        windowed = apply_voi_lut(values, dataset, index=0)
        image_HW = to_uint8(windowed, *_window_output_range(dataset))
        steps.append("VOI LUT or window")
    else:
        image_HW = to_uint8(values)
        steps.append("percentile scaling to 8 bit")
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        image_HW = 255 - image_HW
        steps.append("MONOCHROME1 inverted")
    return image_HW, bit_depth, tuple(steps)


def _window_output_range(dataset: pydicom.Dataset) -> tuple[float, float]:
    """Return the values that black and white have after `apply_voi_lut`."""
    if "VOILUTSequence" in dataset:
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        return 0.0, float(2**bits - 1)
    bits = int(dataset.BitsStored)
    signed = int(dataset.PixelRepresentation) == 1
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    slope = float(dataset.get("RescaleSlope", 1) or 1)
    intercept = float(dataset.get("RescaleIntercept", 0) or 0)
    return low * slope + intercept, high * slope + intercept
