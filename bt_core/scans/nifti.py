"""One slice of a NIfTI volume becomes a grey image, as a viewer shows it.

Which slice: the middle one, index N // 2, of the N axial slices, counted towards the head after the
axes are turned to the nearest of right, anterior, superior (RAS). Of a volume that is one slice
thick, or two-dimensional, that slice. Of four dimensions the first volume.

How it is shown: radiological convention, so the patient's left is on the image's right; anterior is
up in an axial slice, superior in the others (a sagittal one looks to the image's left).

The data is read as a stream and only one slab of it is held, so neither what the header declares
nor what a gzip stream unpacks to is ever allocated.
"""

import gzip
import io
import zlib
from typing import BinaryIO, Final, cast

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import io_orientation
from nibabel.spatialimages import HeaderDataError

from bt_core.errors import ScanError
from bt_core.scans.decoded import (
    MAX_FRAME_BYTES,
    DecodedScan,
    check_bytes,
    check_size,
    square_pixels,
)
from bt_core.scans.intensity import colour_to_uint8, coloured_share, scale_by_percentiles

MAX_NIFTI_BYTES: Final = 1024**3
"""The whole file, unpacked."""

_GZIP: Final = b"\x1f\x8b"
_HEADERS: Final = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_PLANE_AXES: Final = {2: (1, 0), 1: (2, 0), 0: (2, 1)}
"""RAS axis that is cut: RAS axes of the image's rows and columns."""
_CHUNK: Final = 1024**2


def is_nifti(content: bytes) -> bool:
    """Return whether bytes are a NIfTI file or anything packed by gzip."""
    return content.startswith(_GZIP) or _header_size(content[:348]) > 0


def decode(content: bytes) -> DecodedScan:
    """Decode the slice that this module's rule chooses.

    Values are multiplied by scl_slope, scl_inter is added, and they are scaled between the 0.5 and
    99.5 percentiles of the slice; values that are not finite are left out, counted, and become
    black. Colour becomes grey. Pixels that are not square by the voxel sizes are made so.

    Raises:
        ScanError: with a reason code and no text of the header.
    """
    packed = content.startswith(_GZIP)
    stream = cast(BinaryIO, gzip.GzipFile(fileobj=io.BytesIO(content)) if packed else None)
    try:
        return _decode(stream or io.BytesIO(content), packed)
    except EOFError:
        raise ScanError("truncated_image", "gzip stream") from None
    except (zlib.error, gzip.BadGzipFile) as error:
        raise ScanError("corrupt_image", type(error).__name__) from None
    except HeaderDataError:
        raise ScanError("corrupt_image", "NIfTI header") from None


def _decode(stream: BinaryIO, packed: bool) -> DecodedScan:
    header, shape, dtype, offset = _read_header(stream)
    affine = header.get_best_affine()
    orientation = io_orientation(affine) if np.isfinite(affine).all() else np.full((3, 2), np.nan)
    if not np.isfinite(orientation).all():
        raise ScanError("corrupt_image", "orientation is not invertible")
    ras_of_axis, direction = orientation.astype(int).T.tolist()
    thin = [axis for axis in range(3) if shape[axis] == 1]
    cut = thin[0] if len(thin) == 1 else ras_of_axis.index(2)
    num_slices = shape[cut]
    index = num_slices // 2
    first, second = (axis for axis in range(3) if axis != cut)
    rows, columns = (
        first if ras_of_axis[first] == ras else second for ras in _PLANE_AXES[ras_of_axis[cut]]
    )
    check_size(shape[columns], shape[rows])

    stored_index = index if direction[cut] > 0 else num_slices - 1 - index
    plane = _read_plane(stream, shape, dtype, cut, stored_index)
    _read_rest(stream, shape, dtype, offset, packed)

    plane_HW = plane if rows == first else plane.T
    # Rows go down and columns to the right: towards posterior or inferior, and left (posterior).
    plane_HW = plane_HW[:: -direction[rows], :: -direction[columns]]
    steps = [f"slice {index + 1} of {num_slices}"]
    if shape[3] > 1:
        steps.append(f"first of {shape[3]} volumes")
    if int(header["sform_code"]) <= 0 and int(header["qform_code"]) <= 0:
        steps.append("no orientation in the header, NIfTI's default axes taken")
    image_HW, coloured = _to_grey(plane_HW, header, steps)
    sizes = voxel_sizes(affine)
    squared = square_pixels(image_HW, (float(sizes[rows]), float(sizes[columns])))
    if squared is not image_HW:
        steps.append("resized to square pixels")
    bit_depth = 8 if dtype.names else dtype.itemsize * 8
    return DecodedScan(
        squared, "NIFTI", bit_depth, tuple(steps), num_slices, index, coloured=coloured
    )


def _header_size(start: bytes) -> int:
    """Return 348 for a NIfTI-1 file, 540 for NIfTI-2, 0 for anything else, by size and magic."""
    for size, magic_at in ((348, 344), (540, 4)):
        stated = (int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big"))
        if size in stated and start[magic_at : magic_at + 3] in (b"n+1", b"n+2", b"ni1", b"ni2"):
            return size
    return 0


def _read_header(
    stream: BinaryIO,
) -> tuple[nib.Nifti1Header, tuple[int, int, int, int], np.dtype, int]:
    """Return the header, the sizes of four axes, the stored dtype and where the data starts.

    The stream then stands at the start of the data.
    """
    start = stream.read(348)
    size = _header_size(start)
    if not size:
        raise ScanError("unsupported_type", "gzip of something that is not NIfTI")
    start += stream.read(size - 348)
    if len(start) < size:
        raise ScanError("truncated_image", "NIfTI header")
    header = _HEADERS[size](start, check=False)
    if not bytes(header["magic"]).startswith(b"n+"):
        raise ScanError("unsupported_type", "NIfTI in two files; convert it to one .nii file")
    num_axes = int(header["dim"][0])
    if not 2 <= num_axes <= 7:
        raise ScanError("corrupt_image", f"{num_axes} dimensions")
    if num_axes > 4:
        raise ScanError("unsupported_type", f"{num_axes} dimensions, at most 4")
    sizes = [int(n) for n in header["dim"][1 : num_axes + 1]]
    if min(sizes) < 1:
        raise ScanError("corrupt_image", "a dimension is not positive")
    shape = cast(tuple[int, int, int, int], tuple(sizes + [1] * (4 - num_axes)))
    dtype = _dtype(header)
    position = float(header["vox_offset"])
    if not size <= position <= MAX_NIFTI_BYTES:
        raise ScanError("corrupt_image", "data does not start behind the header")
    offset = int(position)
    total = offset + shape[0] * shape[1] * shape[2] * shape[3] * dtype.itemsize
    check_bytes(total, MAX_NIFTI_BYTES, "the volume")
    check_bytes(shape[0] * shape[1] * dtype.itemsize, MAX_FRAME_BYTES, "one stored slice")
    _skip(stream, offset - size)
    return header, shape, dtype, offset


def _dtype(header: nib.Nifti1Header) -> np.dtype:
    try:
        dtype: np.dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError):
        raise ScanError("corrupt_image", "unknown data type") from None
    colour = dtype.names is not None and dtype.names[:3] == ("R", "G", "B")
    if not colour and (dtype.kind not in "iuf" or dtype.itemsize > 8):
        raise ScanError("unsupported_type", "NIfTI of complex or extended numbers")
    return dtype


def _read_plane(
    stream: BinaryIO, shape: tuple[int, int, int, int], dtype: np.dtype, cut: int, index: int
) -> np.ndarray:
    """Read the first volume up to its end, or to the slice if that is stored in one piece.

    Returns:
        The slice with its axes in stored order. The first axis runs fastest in the file.
    """
    slab_shape = (shape[1], shape[0])
    slab_bytes = shape[0] * shape[1] * dtype.itemsize
    if cut == 2:
        _skip(stream, index * slab_bytes)
        return np.frombuffer(_exactly(stream, slab_bytes), dtype).reshape(slab_shape).T
    other = shape[1 - cut]
    plane = np.empty((other, shape[2]), dtype)
    for z in range(shape[2]):
        slab = np.frombuffer(_exactly(stream, slab_bytes), dtype).reshape(slab_shape).T
        plane[:, z] = slab[index] if cut == 0 else slab[:, index]
    return plane


def _read_rest(
    stream: BinaryIO, shape: tuple[int, int, int, int], dtype: np.dtype, offset: int, packed: bool
) -> None:
    """Read on to the end, to tell a file that was cut or damaged behind the slice."""
    end = offset + shape[0] * shape[1] * shape[2] * shape[3] * dtype.itemsize
    _skip(stream, end - stream.tell())
    while packed and stream.read(_CHUNK):  # gzip's checksum comes last
        check_bytes(stream.tell(), MAX_NIFTI_BYTES, "the unpacked file")


def _skip(stream: BinaryIO, num_bytes: int) -> None:
    while num_bytes > 0:
        num_bytes -= len(_exactly(stream, min(num_bytes, _CHUNK)))


def _exactly(stream: BinaryIO, num_bytes: int) -> bytes:
    data = stream.read(num_bytes)
    if len(data) < num_bytes:
        raise ScanError("truncated_image", "NIfTI data")
    return data


def _to_grey(
    plane_HW: np.ndarray, header: nib.Nifti1Header, steps: list[str]
) -> tuple[np.ndarray, float]:
    """Return the grey slice, and the share of its pixels that had a colour."""
    if plane_HW.dtype.names:
        channels = np.stack([plane_HW[name] for name in "RGB"], axis=-1)
        steps.append("colour to grey")
        return colour_to_uint8(channels, 255.0), coloured_share(channels)
    slope, intercept = header.get_slope_inter()
    values = plane_HW
    if slope is not None and (slope, intercept) != (1.0, 0.0):
        with np.errstate(all="ignore"):
            values = plane_HW.astype(np.float64) * slope + intercept
        steps.append("scl_slope and scl_inter")
    return scale_by_percentiles(values, steps), 0.0
