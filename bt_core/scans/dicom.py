"""DICOM objects become grey images. No header value ever leaves this module except technical ones.

pydicom's warnings quote values verbatim (a name in a date field, for one), so they are swallowed
here. What the stored values mean is in `dicom_render`.
"""

import io
import logging
import threading
import warnings
import zlib
from typing import Final

import numpy as np
import pydicom
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.filereader import _read_file_meta_info, read_dataset, read_preamble
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSTransferSyntaxes,
    RLELossless,
    UID_dictionary,
)

from bt_core.errors import ScanError
from bt_core.scans.codestream import (
    decode_with_opencv,
    jpeg_2000_header,
    jpeg_ends_early,
    jpeg_header,
)
from bt_core.scans.decoded import BURNED_IN, MAX_FRAME_BYTES, DecodedScan, check_bytes, check_size
from bt_core.scans.dicom_render import render
from bt_core.scans.identity import is_placeholder, patient_hash

MAX_DICOM_BYTES: Final = 512 * 1024**2
"""All frames of one object, decoded."""
MAX_FRAMES: Final = 512

_PREAMBLE: Final = 128
_ONE_AT_A_TIME: Final = threading.Lock()
_J2K: Final = frozenset(JPEG2000TransferSyntaxes)
_PLUGIN: Final = {
    JPEGBaseline8Bit: "pillow",
    JPEGLossless: "gdcm",
    JPEGLosslessSV1: "gdcm",
    RLELossless: "pylibjpeg",
    **dict.fromkeys(JPEGLSTransferSyntaxes, "pyjpegls"),
    **dict.fromkeys(_J2K, "pylibjpeg"),
}
"""One decoder for each compression: the same bytes give the same pixels, wherever they are read.
JPEG Extended is not named: with 12 bits only the plugin of the extra `gpl` reads it."""


def is_dicom(content: bytes, hint: str = "") -> bool:
    """Return whether bytes carry the DICOM prefix, or the name or media type says DICOM."""
    if content[_PREAMBLE : _PREAMBLE + 4] == b"DICM":
        return True
    named = hint.lower().endswith((".dcm", ".dicom", "application/dicom"))
    return named and content[:2] in (b"\2\0", b"\x08\0")  # group 0002 or 0008 comes first


def decode(content: bytes, hash_key: bytes | None = None) -> DecodedScan:
    """Decode a DICOM object: of several frames the middle one, in the order they are stored.

    Args:
        content: the whole file.
        hash_key: key of the patient's hash, which is empty for None and for placeholders such as
            ANONYMOUS (`identity.is_placeholder`).

    Raises:
        ScanError: with a reason code and no header value but sizes and registered names.
    """
    # pydicom sends the same texts to its logger, whatever becomes of the warnings.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    with _ONE_AT_A_TIME, warnings.catch_warnings():  # the filters belong to the process
        warnings.simplefilter("ignore")
        dataset = read(content)
        num_frames = _check_header(dataset)
        index = num_frames // 2
        stored, photometric = decode_frame(dataset, index, num_frames)
        image_HW, steps, coloured = render(dataset, index, stored, photometric)
        patient = str(dataset.get("PatientID") or "").strip()
        if num_frames > 1:
            steps.insert(0, f"frame {index + 1} of {num_frames}")
        if patient and is_placeholder(patient):
            steps.append("placeholder for the patient ignored")
        if str(dataset.get("BurnedInAnnotation") or "").strip().upper() == "YES":
            steps.append(BURNED_IN)
        return DecodedScan(
            image_HW,
            "DICOM",
            int(dataset.get("BitsStored", stored.dtype.itemsize * 8)),
            tuple(steps),
            num_frames,
            index,
            patient_hash(patient, hash_key),
            coloured,
        )


def read(content: bytes) -> pydicom.Dataset:
    """Return the data set of a file, compressed pixels untouched.

    Raises:
        ScanError: if it is not DICOM, or does not say how it is encoded.
    """
    stream = io.BytesIO(content)
    try:
        read_preamble(stream, force=True)
        meta = _read_file_meta_info(stream)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            dataset = read_dataset(_inflated(content[stream.tell() :]), False, True)
            dataset.file_meta = meta
            meta.TransferSyntaxUID = ExplicitVRLittleEndian
            return dataset
        dataset = pydicom.dcmread(io.BytesIO(content), force=True)
    except InvalidDicomError:
        raise ScanError("unsupported_type", "no DICOM header") from None
    bare = not dataset.file_meta and content[:2] == b"\x08\0"
    if bare and dataset.original_encoding == (True, True):  # PS3.5: the default syntax
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    if "TransferSyntaxUID" not in dataset.file_meta:
        raise ScanError("corrupt_image", "no transfer syntax")
    return dataset


def _inflated(packed: bytes) -> io.BytesIO:
    """Inflate with a limit, which pydicom has not."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    data = inflater.decompress(packed, MAX_DICOM_BYTES)
    if inflater.unconsumed_tail:
        raise ScanError("image_too_large", f"inflates to over {MAX_DICOM_BYTES} bytes")
    if not inflater.eof:
        raise ScanError("truncated_image", "deflated data set")
    return io.BytesIO(data)


def _check_header(dataset: pydicom.Dataset) -> int:
    """Return the number of frames of an object that may be decoded."""
    uid = dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID")
    kind = UID_dictionary.get(str(uid), ("",))[0]
    if kind and "Image" not in kind:  # reports, plans, doses, segmentations, directories
        raise ScanError("not_an_image_object", kind)
    if "PixelData" not in dataset:
        if len(dataset) == 0:  # what pydicom gives for compressed pixels that end early
            raise ScanError("truncated_image", "no data set")
        raise ScanError("no_pixel_data")
    num_frames = int(dataset.get("NumberOfFrames", 1) or 1)
    if num_frames < 1:
        raise ScanError("corrupt_image", "number of frames is not positive")
    if num_frames > MAX_FRAMES:
        raise ScanError("too_many_frames", f"{num_frames} frames, limit {MAX_FRAMES}")
    columns, rows = int(dataset.Columns), int(dataset.Rows)
    check_size(columns, rows)
    bits = int(dataset.BitsAllocated) * int(dataset.SamplesPerPixel)
    frame_bytes = rows * columns * bits // 8
    check_bytes(frame_bytes, MAX_FRAME_BYTES, "one frame")
    check_bytes(frame_bytes * num_frames, MAX_DICOM_BYTES, f"{num_frames} frames")
    return num_frames


def decode_frame(dataset: pydicom.Dataset, index: int, num_frames: int) -> tuple[np.ndarray, str]:
    """Decode one frame.

    Returns:
        Stored values (H, W) or (H, W, 3) in native byte order, and the photometric interpretation
        that they have now: YBR has become RGB.

    Raises:
        ScanError: `transfer_syntax_unsupported`, `truncated_image` or `corrupt_image`.
    """
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    plugin = _plugin_for(syntax)
    try:
        if syntax.is_encapsulated:
            _check_codestream(dataset, syntax, index, num_frames)
        stored, properties = get_decoder(syntax).as_array(
            dataset, index=index, decoding_plugin=plugin
        )
    except (NotImplementedError, RuntimeError, AttributeError) as error:
        raise ScanError("corrupt_image", type(error).__name__) from None
    except (ValueError, EOFError) as error:
        raise ScanError("truncated_image", type(error).__name__) from None
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":  # a panic in Rust, which is no Exception
            raise
        raise ScanError("corrupt_image", "decoder panicked") from None
    native = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    return native, str(properties["photometric_interpretation"])


def _plugin_for(syntax: UID) -> str:
    """Return the decoder to use; tells a missing one from damaged data before either is tried."""
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        available = False
    else:
        plugin = _PLUGIN.get(syntax, "")
        available = plugin in decoder.available_plugins if plugin else decoder.is_available
    if not available:
        known = syntax in UID_dictionary  # a name that is not registered may be anything
        raise ScanError("transfer_syntax_unsupported", syntax.name if known else "unknown UID")
    return plugin


def _check_codestream(dataset: pydicom.Dataset, syntax: UID, index: int, num_frames: int) -> None:
    """Hold a compressed frame's own sizes against the object's before a native decoder sees it."""
    offsets = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
    frame = get_frame(
        dataset.PixelData,
        index,
        number_of_frames=num_frames,
        extended_offsets=offsets if None not in offsets else None,
    )
    rows, columns, samples = (
        int(dataset[name].value) for name in ("Rows", "Columns", "SamplesPerPixel")
    )
    if syntax == RLELossless:
        _check_rle(frame, samples * (int(dataset.BitsAllocated) // 8))
        return
    header = jpeg_2000_header(frame) if syntax in _J2K else jpeg_header(frame)
    if (header.height, header.width, header.components) != (rows, columns, samples):
        raise ScanError(
            "corrupt_image",
            f"codestream of {header.width}x{header.height}x{header.components}, "
            f"header says {columns}x{rows}x{samples}",
        )
    if b"\xff\xd9" not in frame[-64:]:  # the end marker, padded
        raise ScanError("truncated_image", "no end of the codestream")
    only_gpl = syntax == JPEGExtended12Bit and header.precision != 8
    if only_gpl and "pylibjpeg" not in get_decoder(syntax).available_plugins:
        raise ScanError("transfer_syntax_unsupported", f"{syntax.name}, {header.precision} bits")
    if syntax == JPEGBaseline8Bit and jpeg_ends_early(frame, decode_with_opencv(frame)):
        raise ScanError("truncated_image", "JPEG data ends before its end marker")


def _check_rle(frame: bytes, num_segments: int) -> None:
    """Refuse segments that are too many or do not lie one behind the other: PS3.5 G.5."""
    header = np.frombuffer(frame[:64].ljust(64, b"\0"), "<u4").astype(np.int64)
    offsets = [*header[1 : num_segments + 1], len(frame)]
    in_order = offsets[0] == 64 and bool((np.diff(offsets) > 0).all())
    if header[0] != num_segments or not in_order:
        raise ScanError("corrupt_image", "RLE segments do not fit the samples")
