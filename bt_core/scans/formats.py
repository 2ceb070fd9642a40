"""Bytes become a grey image: the one place where scans are decoded.

Order of checks: size, magic bytes, header dimensions, decode, signal. What is done for each kind is
in `pictures`, `dicom` and `nifti`; the limits are in `decoded`.
"""

import posixpath
from dataclasses import replace
from typing import Final

from bt_core.errors import ScanError
from bt_core.scans import dicom, nifti, pictures
from bt_core.scans.decoded import DecodedScan

__all__ = ["DecodedScan", "decode_scan"]

_SUFFIXES: Final = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
    ".dcm": "DICOM",
    ".dicom": "DICOM",
    ".nii": "NIFTI",
    ".gz": "NIFTI",
}


def decode_scan(content: bytes, hint: str = "", hash_key: bytes | None = None) -> DecodedScan:
    """Decode one scan file.

    Colour becomes grey by the ITU-R BT.601 weights, alpha is dropped, EXIF rotation is applied,
    more than 8 bits are scaled between the 0.5 and 99.5 percentiles unless DICOM states a window.
    Of several frames or slices the middle one is taken.

    Args:
        content: the whole file; it decides the format, whatever the name says.
        hint: the file's name or media type, used only for formats without magic bytes.
        hash_key: key for the hash of a DICOM patient's identifier; None leaves that out.

    Returns:
        The image with a record of what was done.

    Raises:
        ScanError: with a reason code; nothing else is raised, whatever the bytes are, and at most
            `decoded.MAX_DECODE_BYTES` of memory are taken.
    """
    if not content:
        raise ScanError("empty_file")
    try:
        scan = _decode(content, hint, hash_key)
    except ScanError as error:
        refusal = ScanError(error.reason, error.detail)
    except MemoryError:
        refusal = ScanError("image_too_large", "out of memory")
    except Exception as error:  # decoders raise many types; the text may quote file content
        refusal = ScanError("corrupt_image", type(error).__name__)
    else:
        if scan.image_HW.min() == scan.image_HW.max():
            raise ScanError("no_signal")
        suffix = posixpath.splitext(hint)[1].lower()
        if _SUFFIXES.get(suffix, scan.format) == scan.format:
            return scan
        step = f"content is {scan.format}, name ends in {suffix}"
        return replace(scan, steps=(step, *scan.steps))
    raise refusal  # outside the handlers: with no context that holds what a decoder said


def _decode(content: bytes, hint: str, hash_key: bytes | None) -> DecodedScan:
    if dicom.is_dicom(content, hint):
        return dicom.decode(content, hash_key)
    if nifti.is_nifti(content):
        return nifti.decode(content)
    return pictures.decode(content)
