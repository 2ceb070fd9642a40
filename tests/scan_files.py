"""Builders of small scan files of every kind, for tests and for `tests.fuzz_decode`."""

import gzip
import io
import struct
import zlib
from pathlib import Path

import cv2
import nibabel as nib
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage

BT601 = np.array([0.299, 0.587, 0.114])
GREY = (np.add.outer(np.arange(40) * 3, np.arange(56) * 2) % 256).astype(np.uint8)
RGB = np.stack([GREY, GREY[::-1], 255 - GREY], axis=2)
SMOOTH = np.add.outer(np.arange(64) * 1.5, np.arange(80) * 1.2).astype(np.uint8)
"""Without hard edges, so that lossy formats stay close to it."""
SMOOTH_RGB = np.stack([SMOOTH, SMOOTH[::-1], 255 - SMOOTH], axis=2)
GREY16 = GREY.astype(np.uint16) * 200 + 17
RGB16 = RGB.astype(np.uint16) * 200 + 100
STORED = (np.add.outer(np.arange(40) * 30, np.arange(56) * 40) % 4096).astype(np.uint16)
"""12 bits."""
SIGNED = STORED.astype(np.int16) - 2048
STORED8 = (STORED // 16).astype(np.uint8)
VOLUME = np.arange(36 * 40 * 44).reshape(36, 40, 44)
"""Axes right, anterior, superior; no two voxels are equal."""


def encode(pixels: np.ndarray | Image.Image, file_format: str, **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def encode_cv2(pixels: np.ndarray, suffix: str, options: tuple[int, ...] = ()) -> bytes:
    """Encode what Pillow cannot write; the channels of `pixels` are RGB(A)."""
    if pixels.ndim == 3:
        pixels = pixels[:, :, [2, 1, 0, 3][: pixels.shape[2]]]
    ok, content = cv2.imencode(suffix, np.ascontiguousarray(pixels), options)
    assert ok
    return bytes(content)


def with_alpha(pixels: np.ndarray) -> np.ndarray:
    """Append an alpha channel that is never opaque and differs from pixel to pixel."""
    return np.dstack([pixels, (GREY // 2 + 60).astype(pixels.dtype)])


def palette(num_colours: int = 16) -> Image.Image:
    return Image.fromarray(RGB).quantize(num_colours)


def palette_as_grey(num_colours: int = 16) -> np.ndarray:
    image = palette(num_colours)
    colours = np.array(image.getpalette()).reshape(-1, 3)
    return colours[np.asarray(image)] @ BT601


def cmyk() -> Image.Image:
    key = np.full_like(SMOOTH, 30)
    return Image.fromarray(np.dstack([SMOOTH, SMOOTH[::-1], 255 - SMOOTH, key]), "CMYK")


def cmyk_as_grey() -> np.ndarray:
    inks = np.asarray(cmyk()).astype(float)
    return (255 - inks[:, :, :3]) * (255 - inks[:, :, 3:]) / 255 @ BT601


def between_percentiles(values: np.ndarray) -> np.ndarray:
    """Return values scaled to 0..255 between the 0.5 and 99.5 percentiles of the finite ones."""
    values = values.astype(float)
    low, high = np.percentile(values[np.isfinite(values)], (0.5, 99.5))
    return np.clip((values - low) / (high - low) * 255, 0, 255)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    """Return a small PNG whose header claims any size."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(bytes(10))
    chunks = (b"IHDR", header), (b"IDAT", data), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def interlaced_png() -> bytes:
    """Return `GREY` as an Adam7 PNG, which neither Pillow nor OpenCV writes."""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)]
    data = b""
    for x, y, step_x, step_y in [*passes, (0, 1, 1, 2)]:
        data += b"".join(b"\0" + row.tobytes() for row in GREY[y::step_y, x::step_x])
    header = struct.pack(">IIBBBBB", GREY.shape[1], GREY.shape[0], 8, 0, 0, 0, 1)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def bmp_16_bit() -> bytes:
    """Return `GREY` as a BMP of 5 bits a colour, which Pillow cannot write."""
    five = (GREY >> 3).astype(np.uint16)
    pixels = (five << 10 | five << 5 | five)[::-1].tobytes()
    height, width = GREY.shape
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 16, 0, len(pixels), 0, 0, 0, 0)
    return struct.pack("<2sIHHI", b"BM", 54 + len(pixels), 0, 0, 54) + info + pixels


def dicom_object(stored: np.ndarray, syntax: UID = ExplicitVRLittleEndian, **tags: object) -> bytes:
    """Return a DICOM file; a tag given as None is present without a value, as `...` is absent."""
    dataset = make_dataset(stored, syntax)
    for keyword, value in tags.items():
        if value is ...:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return file_bytes(dataset)


def make_dataset(stored: np.ndarray, syntax: UID = ExplicitVRLittleEndian) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = MRImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3"
    dataset.Rows, dataset.Columns = stored.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    if stored.ndim == 3:
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, "RGB"
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = stored.dtype.itemsize * 8
    dataset.BitsStored = 12 if dataset.BitsAllocated == 16 else dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = stored.tobytes()
    return dataset


def file_bytes(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def bare_dicom() -> bytes:
    """Return a data set of the default transfer syntax alone, as old tools wrote it."""
    dataset = make_dataset(STORED)
    del dataset.file_meta
    buffer = io.BytesIO()
    pydicom.dcmwrite(
        buffer, dataset, implicit_vr=True, little_endian=True, enforce_file_format=False
    )
    return buffer.getvalue()


def lookup_table(values: np.ndarray, bits: int) -> Dataset:
    """Return one item of a Modality or VOI LUT Sequence that maps stored values from 0 on."""
    table = Dataset()
    table.add_new(0x00283002, "US", [len(values), 0, bits])
    table.add_new(0x00283006, "US", [int(v) for v in values])
    return table


def item(**tags: object) -> Dataset:
    dataset = Dataset()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return dataset


def frames(num_frames: int) -> np.ndarray:
    """Return frames (N, H, W) of 12 bits that differ in shape, not just in scale."""
    return np.stack([np.roll(STORED, 7 * i, axis=1) for i in range(num_frames)])


def multi_frame(num_frames: int, **tags: object) -> bytes:
    pixels = frames(num_frames).tobytes()
    return dicom_object(STORED, NumberOfFrames=num_frames, PixelData=pixels, **tags)


def compressed_object(syntax: UID, *encoded: bytes, **tags: object) -> bytes:
    tags = {"NumberOfFrames": len(encoded)} | tags if len(encoded) > 1 else tags
    return dicom_object(STORED8, syntax, PixelData=encapsulate(list(encoded)), **tags)


def recompressed(syntax: UID, stored: np.ndarray = STORED, **tags: object) -> bytes:
    """Return an object compressed by pydicom's own encoders: RLE, JPEG-LS or JPEG 2000."""
    dataset = make_dataset(stored)
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    dataset.compress(syntax)
    return file_bytes(dataset)


def jpeg_2000_frame(pixels: np.ndarray = STORED8) -> bytes:
    return encode(pixels, "JPEG2000", irreversible=False, no_jp2=True)


def palette_object(**tags: object) -> bytes:
    """Return an object whose 8-bit palette is red up, green down, blue constant."""
    ramp = np.arange(256, dtype=np.uint8)
    dataset = make_dataset(STORED8)
    dataset.PhotometricInterpretation = "PALETTE COLOR"
    for colour, values in (("Red", ramp), ("Green", 255 - ramp), ("Blue", 0 * ramp + 9)):
        setattr(dataset, f"{colour}PaletteColorLookupTableDescriptor", [256, 0, 8])
        setattr(dataset, f"{colour}PaletteColorLookupTableData", values.tobytes())
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return file_bytes(dataset)


def nifti(
    values: np.ndarray, affine: np.ndarray | None = None, packed: bool = False, **fields: object
) -> bytes:
    """Return a NIfTI-1 file; `fields` of the header are set after everything else."""
    kind = nib.Nifti2Image if fields.pop("version", 1) == 2 else nib.Nifti1Image
    image = kind(values, np.eye(4) if affine is None else affine, dtype=values.dtype)
    content = image.to_bytes()
    if fields:
        header = image.header.copy()
        size = len(header.binaryblock)
        header = type(header)(content[:size], check=False)
        for name, value in fields.items():
            header[name] = value
        content = header.binaryblock + content[size:]
    return gzip.compress(content, 1) if packed else content


def reoriented(axes: str) -> tuple[np.ndarray, np.ndarray]:
    """Return `VOLUME` as stored with axes such as `LPS`, and the affine that says so."""
    start = nib.orientations.axcodes2ornt(tuple("RAS"))
    end = nib.orientations.axcodes2ornt(tuple(axes))
    transform = nib.orientations.ornt_transform(start, end)
    stored = nib.orientations.apply_orientation(VOLUME, transform)
    return stored, nib.orientations.inv_ornt_aff(transform, VOLUME.shape)


def axial_view(volume_RAS: np.ndarray) -> np.ndarray:
    """Return the middle axial slice as shown: row 0 most anterior, column 0 the patient's right."""
    slice_RA = volume_RAS[:, :, volume_RAS.shape[2] // 2]
    return np.array(
        [[slice_RA[x, y] for x in reversed(range(slice_RA.shape[0]))]
         for y in reversed(range(slice_RA.shape[1]))]
    )  # fmt: skip


def deadly_dicom() -> bytes:
    """Return a JPEG Lossless object on which gdcm 3.2 calls abort(), found by `fuzz_decode`."""
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    content = bytearray((folder / "SC_rgb_jpeg_gdcm.dcm").read_bytes())
    content[1353] = 128  # inside the codestream's frame header
    return bytes(content)
