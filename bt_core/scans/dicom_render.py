"""Stored DICOM values become displayed grey: PS3.3 C.7.6.3, C.7.6.16, C.11.1, C.11.2."""

import numpy as np
import pydicom
from pydicom.pixels import apply_color_lut, apply_modality_lut

from bt_core.errors import ScanError
from bt_core.scans.decoded import square_pixels
from bt_core.scans.intensity import colour_to_uint8, coloured_share, scale_by_percentiles, to_uint8

_GREY = ("MONOCHROME1", "MONOCHROME2")


def render(
    dataset: pydicom.Dataset, index: int, stored: np.ndarray, photometric: str
) -> tuple[np.ndarray, list[str], float]:
    """Return one frame as displayed image_HW uint8, the steps, and the share of coloured pixels.

    Grey: modality LUT or rescale, then the VOI LUT or the first window (percentiles without one
    or if it has no width), then MONOCHROME1 is inverted; padding pixels are left out of the
    percentiles and become black. Values of the frame's own functional groups go before the
    object's. Colour becomes grey. Pixels that are not square by the stated spacing or aspect ratio
    are made so.

    Args:
        dataset: the object.
        index: of the frame, from 0.
        stored: (H, W) or (H, W, 3) values of the frame.
        photometric: what the values mean now, after decoding.

    Raises:
        ScanError: `unsupported_type` for other photometric interpretations, `corrupt_image`.
    """
    coloured = 0.0
    if photometric == "PALETTE COLOR" and stored.ndim == 2:
        image_HW, coloured = _palette(stored, dataset)
        steps = ["palette to grey"]
    elif photometric == "RGB" and stored.ndim == 3:
        full = 2.0 ** int(dataset.get("BitsStored", stored.dtype.itemsize * 8)) - 1
        image_HW, steps = colour_to_uint8(stored, full), ["colour to grey"]
        coloured = coloured_share(stored, full)
    elif photometric in _GREY and stored.ndim == 2:
        image_HW, steps = _grey(dataset, index, stored, photometric)
    else:
        raise ScanError("unsupported_type", "photometric interpretation of the DICOM object")
    squared = square_pixels(image_HW, _spacing(dataset, index))
    if squared is not image_HW:
        steps.append("resized to square pixels")
    return squared, steps, coloured


def _grey(
    dataset: pydicom.Dataset, index: int, stored: np.ndarray, photometric: str
) -> tuple[np.ndarray, list[str]]:
    steps: list[str] = []
    padding = _padding(dataset, stored)
    modality = _group(dataset, index, "PixelValueTransformationSequence")
    values = apply_modality_lut(stored, modality)
    if modality.get("ModalityLUTSequence") or None not in (
        modality.get("RescaleSlope"),
        modality.get("RescaleIntercept"),
    ):
        steps.append("modality LUT")
    shown_HW = _apply_voi(values, _group(dataset, index, "FrameVOILUTSequence"), steps)
    image_HW = scale_by_percentiles(values, steps, padding) if shown_HW is None else shown_HW
    if photometric == "MONOCHROME1":
        image_HW = 255 - image_HW
        steps.append("MONOCHROME1 inverted")
    if padding is not None:
        image_HW[padding] = 0
        steps.append("padding pixels black")
    return image_HW, steps


def _apply_voi(values: np.ndarray, voi: pydicom.Dataset, steps: list[str]) -> np.ndarray | None:
    """Apply the VOI LUT, else the first window; None if neither is stated in a usable way."""
    if voi.get("VOILUTSequence"):
        image_HW = _look_up(values, voi.VOILUTSequence[0])
    elif None in (voi.get("WindowCenter"), voi.get("WindowWidth")):
        return None
    else:
        windowed_HW = _window(values, voi)
        if windowed_HW is None:  # some exporters write 0 where they know none
            steps.append("window without a width ignored")
            return None
        image_HW = windowed_HW
    steps.append("VOI LUT or window")
    return image_HW


def _group(dataset: pydicom.Dataset, index: int, keyword: str) -> pydicom.Dataset:
    """Return the frame's own item of a functional group, else the shared one, else the object."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for groups in (*per_frame[index : index + 1], *shared[:1]):
        if groups.get(keyword):
            item: pydicom.Dataset = groups[keyword].value[0]
            return item
    return dataset


def _spacing(dataset: pydicom.Dataset, index: int) -> tuple[float, float]:
    """Return the distances between rows and columns, (1, 1) where they are not stated."""
    stated = _group(dataset, index, "PixelMeasuresSequence").get("PixelSpacing")
    stated = stated or dataset.get("PixelSpacing") or dataset.get("PixelAspectRatio")
    if not stated or np.size(stated) != 2:
        return 1.0, 1.0
    return float(stated[0]), float(stated[1])


def _padding(dataset: pydicom.Dataset, stored: np.ndarray) -> np.ndarray | None:
    """Return where the padding value or range stands, None if nowhere: PS3.3 C.7.5.1.1.2."""
    first = dataset.get("PixelPaddingValue")
    if first is None:
        return None
    limit = dataset.get("PixelPaddingRangeLimit")
    ends = [int(first), int(first if limit is None else limit)]
    if stored.dtype == np.int16:  # writers give signed values as unsigned ones
        ends = [end - 2**16 if end >= 2**15 else end for end in ends]
    padding: np.ndarray = (stored >= min(ends)) & (stored <= max(ends))
    return padding if padding.any() else None


def _palette(stored: np.ndarray, dataset: pydicom.Dataset) -> tuple[np.ndarray, float]:
    if "SegmentedRedPaletteColorLookupTableData" in dataset:
        raise ScanError("unsupported_type", "segmented palette")
    if stored.dtype.itemsize > 2:
        raise ScanError("corrupt_image", "palette index of more than 16 bits")
    bits = int(dataset.RedPaletteColorLookupTableDescriptor[2])
    low = int(stored.min())
    used = np.arange(low, int(stored.max()) + 1, dtype=stored.dtype)
    colours, full = apply_color_lut(used, dataset), 2.0**bits - 1
    index_HW = stored.astype(np.int32) - low
    image_HW: np.ndarray = colour_to_uint8(colours, full)[index_HW]
    return image_HW, coloured_share(to_uint8(colours, 0.0, full)[index_HW])


def _look_up(values: np.ndarray, item: pydicom.Dataset) -> np.ndarray:
    """Apply a VOI LUT; pydicom 3.0 wraps the indices of tables with 8-bit entries."""
    entries, first, bits = item.LUTDescriptor
    entries = entries or 2**16
    table = item.LUTData
    if isinstance(table, bytes):  # entries of 8 bits may be two to a word, padded to an even number
        is_packed = bits <= 8 and len(table) <= entries + 1
        table = np.frombuffer(table, np.uint8 if is_packed else "<u2")
    table = np.asarray(table)
    index = np.clip(np.rint(values) - first, 0, min(entries, len(table)) - 1)
    return to_uint8(table[index.astype(int)], 0.0, float(2**bits - 1))


def _window(values: np.ndarray, voi: pydicom.Dataset) -> np.ndarray | None:
    """Apply the first window: PS3.3 C.11.2.1.2 and C.11.2.1.3; None if it has no valid width."""
    center, width = (
        float(np.ravel(voi[name].value)[0]) for name in ("WindowCenter", "WindowWidth")
    )
    function = str(voi.get("VOILUTFunction") or "LINEAR").upper()
    if not (1 if function == "LINEAR" else 1e-9) <= width < np.inf:
        return None
    if function == "SIGMOID":
        slope = (values.astype(np.float64) - center) * (-4 / width)
        return to_uint8(1 / (1 + np.exp(slope)), 0.0, 1.0)
    if function == "LINEAR":
        center, width = center - 0.5, max(width - 1, 1e-9)
    return to_uint8(values, center - width / 2, center + width / 2)
