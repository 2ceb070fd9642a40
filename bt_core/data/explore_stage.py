"""What is measured on each scan when a source is explored; pixels come back of a few scans only.

Shape suffixes: H, W sides; S `SIDE_PX`, T `THUMBNAIL_PX`, N scans.
"""

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa

from bt_core.data.decode_stage import Columns, DecodeStage
from bt_core.scans.decoded import BURNED_IN
from bt_core.scans.preprocess import PreprocessSpec

SIDE_PX: Final = 120
"""Side of the stretched square that all scans are measured on."""
THUMBNAIL_PX: Final = 60
BORDER: Final = 0.1
"""Width of the frame that counts as border, as a share of the side."""
PICTURE_PX: Final = 256
"""Side of the padded square that is shown."""
_SMALL: Final = PreprocessSpec(size_px=SIDE_PX)
_PICTURE: Final = PreprocessSpec(size_px=PICTURE_PX, fit="pad")
_PIXELS: Final = ("histogram", "border_histogram", "thumbnail", "picture", "prepared")
_NUMBERS: Final = ("mean", "std", "median", "min", "max", "border_mean")


@dataclass(frozen=True)
class ExploreStage:
    """Turns rows with `sampled` and `shown` (bool) into decoded and measured rows, one for one.

    Adds to the columns of `DecodeStage`, on the scan stretched to 120 px: mean, std, median, min,
    max and border_mean, float, in grey levels 0..255; and, as bytes (empty where there is nothing),
    histogram and border_histogram (256 counts, uint16), thumbnail (uint8, T x T; of `sampled`
    scans), picture (uint8, 256 x 256, padded) and prepared (by `prepare`), both of `shown` scans.
    """

    prepare: PreprocessSpec
    _decode: DecodeStage = field(default=DecodeStage((_SMALL,)), init=False)

    def __call__(self, columns: Columns) -> Columns:
        """Process a batch; a scan that cannot be used gets a reason, never an exception."""
        num_rows = len(columns["scan_id"])
        rows = [self._process({k: v[i] for k, v in columns.items()}) for i in range(num_rows)]
        # numpy's own bytes type would cut trailing zeros off
        return {
            name: np.array([row[name] for row in rows], dtype=object if name in _PIXELS else None)
            for name in rows[0]
        }

    def set_aside(self, row: dict[str, Any], reason: str, detail: str) -> dict[str, Any]:
        """Return the full row of a scan that gave nothing, with its reason."""
        return _measured(self._decode.set_aside(row, reason, detail))

    def _process(self, row: dict[str, Any]) -> dict[str, Any]:
        decode = DecodeStage((_SMALL, _PICTURE, self.prepare)) if row["shown"] else self._decode
        return _measured(decode.process(row))


def _measured(row: dict[str, Any]) -> dict[str, Any]:
    """Replace the pixels of a decoded row by what is measured on them."""
    small_SS, picture_HW, prepared_HW = (row.pop(f"pixels_{i}", None) for i in range(3))
    row |= {name: b"" for name in _PIXELS} | {name: 0.0 for name in _NUMBERS}
    if row["reason"]:
        return row
    border = small_SS[border_mask(SIDE_PX)]
    row |= {
        "mean": float(small_SS.mean()),
        "std": float(small_SS.std()),
        "median": float(np.median(small_SS)),
        "min": float(small_SS.min()),
        "max": float(small_SS.max()),
        "border_mean": float(border.mean()),
        "histogram": _histogram(small_SS),
        "border_histogram": _histogram(border),
    }
    if BURNED_IN in row["steps"]:  # the text may be a name
        small_SS, picture_HW, prepared_HW = (
            None if image is None else np.zeros_like(image)
            for image in (small_SS, picture_HW, prepared_HW)
        )
    if row["sampled"]:
        row["thumbnail"] = block_means(small_SS[None], THUMBNAIL_PX)[0].tobytes()
    if row["shown"]:
        row |= {"picture": picture_HW.tobytes(), "prepared": prepared_HW.tobytes()}
    return row


def border_mask(side: int) -> np.ndarray:
    """Return mask_SS bool, true in the outer frame of `BORDER` of the side."""
    width = round(BORDER * side)
    mask_SS = np.ones((side, side), bool)
    mask_SS[width : side - width, width : side - width] = False
    return mask_SS


def block_means(images_NSS: np.ndarray, side: int) -> np.ndarray:
    """Return square images (N, side, side) uint8, averaged over blocks; `side` divides theirs."""
    num, block = len(images_NSS), images_NSS.shape[1] // side
    blocks = images_NSS.reshape(num, side, block, side, block)
    smaller: np.ndarray = np.rint(blocks.mean((2, 4), dtype=np.float32)).astype(np.uint8)
    return smaller


def unpacked(column: pa.ChunkedArray, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """Return a column of bytes as one array (N, *shape)."""
    content = b"".join(column.to_pylist())
    return np.frombuffer(content, dtype).reshape(column.length(), *shape)


def _histogram(values: np.ndarray) -> bytes:
    """Return 256 counts as uint16, which S x S pixels cannot overflow."""
    return np.bincount(values.ravel(), minlength=256).astype(np.uint16).tobytes()
