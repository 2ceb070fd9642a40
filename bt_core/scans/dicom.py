"""DICOM objects become grey images. No header value ever leaves this module except technical ones.

pydicom's warnings quote values verbatim (a name in a date field, for one), so they are swallowed
here.
"""

import io
import logging
import threading
import warnings
from collections.abc import Callable
from typing import Final

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_modality_lut, get_decoder
from pydicom.uid import UID, ImplicitVRLittleEndian

from bt_core.errors import ScanError
from bt_core.scans.intensity import to_uint8

_PREAMBLE: Final = 128
_ONE_AT_A_TIME: Final = threading.Lock()
_DEFLATED: Final = b"1.2.840.10008.1.2.1.99"
_GREY: Final = ("MONOCHROME1", "MONOCHROME2")


def is_dicom(content: bytes, hint: str = "") -> bool:
    """Return whether bytes carry the DICOM prefix, or the name or media type says DICOM."""
    if content[_PREAMBLE : _PREAMBLE + 4] == b"DICM":
        return True
    named = hint.lower().endswith((".dcm", ".dicom", "application/dicom"))
    return named and content[:2] in (b"\2\0", b"\x08\0")  # group 0002 or 0008 comes first


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
    # pydicom sends the same texts to its logger, whatever becomes of the warnings.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    with _ONE_AT_A_TIME, warnings.catch_warnings():  # the filters belong to the process
        warnings.simplefilter("ignore")
        dataset = _read(content)
        _check_header(dataset, check_size)
        _check_decoder(UID(dataset.file_meta.TransferSyntaxUID))
        try:
            stored = dataset.pixel_array
        except (NotImplementedError, RuntimeError, AttributeError) as error:
            raise ScanError("corrupt_image", type(error).__name__) from None
        except (ValueError, EOFError) as error:
            raise ScanError("truncated_image", type(error).__name__) from None
        return _render(dataset, stored)


def _read(content: bytes) -> pydicom.Dataset:
    if _DEFLATED in content[:4096]:  # pydicom would inflate it without a limit
        raise ScanError("transfer_syntax_unsupported", "Deflated Explicit VR Little Endian")
    try:
        dataset = pydicom.dcmread(io.BytesIO(content), force=True)
    except InvalidDicomError:
        raise ScanError("unsupported_type", "no DICOM header") from None
    bare = not dataset.file_meta and content[:2] == b"\x08\0"
    if bare and dataset.original_encoding == (True, True):  # PS3.5: the default syntax
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    if "TransferSyntaxUID" not in dataset.file_meta:
        raise ScanError("corrupt_image", "no transfer syntax")
    return dataset


def _check_decoder(syntax: UID) -> None:
    """Tell a missing decoder from damaged data before either is tried."""
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise ScanError("transfer_syntax_unsupported", syntax.name)


def _check_header(dataset: pydicom.Dataset, check_size: Callable[[int, int], None]) -> None:
    if "PixelData" not in dataset:
        if len(dataset) == 0:  # what pydicom gives for compressed pixels that end early
            raise ScanError("truncated_image", "no data set")
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
        grey *= 255.0 / (2**bit_depth - 1)
        return np.clip(np.rint(grey), 0, 255).astype(np.uint8), bit_depth, ("colour to grey",)
    steps: list[str] = []
    values = apply_modality_lut(stored, dataset)
    if dataset.get("ModalityLUTSequence") or None not in (
        dataset.get("RescaleSlope"),
        dataset.get("RescaleIntercept"),
    ):
        steps.append("modality LUT")
    if dataset.get("VOILUTSequence"):
        image_HW = _look_up(values, dataset.VOILUTSequence[0])
        steps.append("VOI LUT or window")
    elif None not in (dataset.get("WindowCenter"), dataset.get("WindowWidth")):
        image_HW = _window(values, dataset)
        steps.append("VOI LUT or window")
    else:
        image_HW = to_uint8(values)
        steps.append("percentile scaling to 8 bit")
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        image_HW = 255 - image_HW
        steps.append("MONOCHROME1 inverted")
    return image_HW, bit_depth, tuple(steps)


def _look_up(values: np.ndarray, item: pydicom.Dataset) -> np.ndarray:
    """Apply a VOI LUT; pydicom 3.0 wraps the indices of tables with 8-bit entries."""
    entries, first, bits = item.LUTDescriptor
    data = item.LUTData
    table = np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.asarray(data)
    index = np.clip(np.rint(values) - first, 0, min(entries or 2**16, len(table)) - 1)
    return to_uint8(table[index.astype(int)], 0.0, float(2**bits - 1))


def _window(values: np.ndarray, dataset: pydicom.Dataset) -> np.ndarray:
    """Apply the first window: PS3.3 C.11.2.1.2 and C.11.2.1.3."""
    center, width = (
        float(np.ravel(dataset[name].value)[0]) for name in ("WindowCenter", "WindowWidth")
    )
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    if width < (1 if function == "LINEAR" else 1e-9):
        raise ScanError("corrupt_image", "window without a width")
    values = values.astype(np.float64)
    if function == "SIGMOID":
        return to_uint8(1 / (1 + np.exp(-4 * (values - center) / width)), 0.0, 1.0)
    if function == "LINEAR":
        center, width = center - 0.5, max(width - 1, 1e-9)
    return to_uint8(values, center - width / 2, center + width / 2)
