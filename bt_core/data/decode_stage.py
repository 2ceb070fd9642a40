"""The work done on each scan wherever Ray runs it: read, decode, digest, preprocess. Never raises.

A batch is a dict of columns, as Ray Data hands it over. S is a spec's output side, B the batch
size.
"""

import hashlib
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np

from bt_core import storage
from bt_core.errors import ScanError
from bt_core.scans.archives import ScanRef, read_member
from bt_core.scans.decoded import MAX_DECODE_BYTES
from bt_core.scans.formats import decode_scan
from bt_core.scans.gate import gate
from bt_core.scans.preprocess import PreprocessSpec, preprocess_pixels

REF_COLUMNS = ("scan_id", "uri", "member", "position")
MAX_DECODE_SECONDS: Final = 120.0
"""A scan that takes longer counts as one that ended its worker."""
CONTENT = "content"
"""Column with what a stream gave for each ref: bytes, or a ScanError. It does not pass through."""
Columns = dict[str, Any]


@dataclass(frozen=True)
class DecodeStage:
    """Turns rows of `REF_COLUMNS` into decoded rows, one for one.

    Added columns: content_sha256, pixel_sha256 (of the decoded grey image, before preprocessing),
    format, width, height, channels (of the file, alpha counted), num_bytes, bit_depth, steps (what
    was done to decode it), num_frames and frame_index (the slice that was taken), patient (keyed
    hash, or empty), reason (empty when decoded), detail, gate (what `scans.gate` says of a decoded
    scan, or empty), and `pixels_<i>` uint8 (S, S) for the i-th spec, all zero where `reason` is not
    empty. Other columns pass through; a patient that is known already is kept.
    A scan is read from its source, unless the column `CONTENT` already holds it.

    Args:
        specs: preprocessing specs with distinct pixels; none makes a catalog.
        hash_key: for patient identifiers; None leaves them out.
        gated: ask the input gate; else its column is empty.
    """

    specs: tuple[PreprocessSpec, ...] = ()
    hash_key: bytes | None = field(default=None, repr=False)
    gated: bool = False

    def __call__(self, columns: Columns) -> Columns:
        """Process a batch; a scan that cannot be used gets a reason, never an exception."""
        num_rows = len(columns["scan_id"])
        rows = [self.process({k: v[i] for k, v in columns.items()}) for i in range(num_rows)]
        return _to_columns(rows)

    def process(self, row: dict[str, Any]) -> dict[str, Any]:
        """Read and decode the scan of one row."""
        ref = ScanRef(
            str(row["scan_id"]), str(row["uri"]), str(row["member"]), int(row["position"])
        )
        result = self.set_aside(row, "", "")
        try:
            content = read_member(ref) if CONTENT not in row else row[CONTENT]
            if isinstance(content, ScanError):
                raise content
            result["content_sha256"] = storage.sha256(content)
            with bounded(MAX_DECODE_BYTES, MAX_DECODE_SECONDS):
                scan = decode_scan(content, ref.member, self.hash_key)
        except ScanError as error:
            return {**result, "reason": error.reason, "detail": error.detail}
        height, width = scan.image_HW.shape
        result |= {
            "pixel_sha256": pixel_digest(scan.image_HW),
            "format": scan.format,
            "width": width,
            "height": height,
            "bit_depth": scan.bit_depth,
            "steps": "; ".join(scan.steps),
            "channels": 1 + 2 * ("colour to grey" in scan.steps) + ("alpha dropped" in scan.steps),
            "num_bytes": len(content),
            "num_frames": scan.num_frames,
            "frame_index": scan.frame_index,
            "patient": result["patient"] or scan.patient,
            "gate": gate(scan) if self.gated else "",
        }
        for i, spec in enumerate(self.specs):
            result[f"pixels_{i}"] = preprocess_pixels(scan.image_HW, spec)
        return result

    def set_aside(self, row: dict[str, Any], reason: str, detail: str) -> dict[str, Any]:
        """Return the full row of a scan that gave nothing, with its reason."""
        blank: dict[str, Any] = {"content_sha256": "", "pixel_sha256": "", "format": ""}
        blank |= {"width": 0, "height": 0, "bit_depth": 0, "channels": 0, "num_bytes": 0}
        blank |= {"num_frames": 0, "frame_index": 0, "steps": "", "reason": reason}
        blank |= {"gate": "", "detail": detail, "patient": row.get("patient", "")}
        for i, spec in enumerate(self.specs):
            blank[f"pixels_{i}"] = np.zeros((spec.size_px, spec.size_px), np.uint8)
        return {**{k: v for k, v in row.items() if k != CONTENT}, **blank}


@contextmanager
def bounded(num_bytes: int, seconds: float) -> Iterator[None]:
    """Bound the memory and the time that a native codec takes; for a process that decodes alone.

    Over `num_bytes` more of private memory (on Linux) an allocation fails, which a codec answers by
    an error or by ending its process, rather than taking the memory of every other job on the
    machine. After `seconds` the process is ended by SIGALRM, also where no Python code runs. Both
    count the whole process, so this is for a Ray task, not for a server.
    """
    alarm = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with _bounded_memory(num_bytes):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *alarm)


@contextmanager
def _bounded_memory(num_bytes: int) -> Iterator[None]:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[5]) * resource.getpagesize()
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = used + num_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard < 0 else min(wanted, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


class RowStage(Protocol):
    """Work on a batch of columns that can also give the row of a scan it could not do."""

    def __call__(self, columns: Columns) -> Columns:
        """Return one row for each row."""

    def set_aside(self, row: dict[str, Any], reason: str, detail: str) -> dict[str, Any]:
        """Return the row of a scan that ended its worker."""


def run_stage(stage: RowStage, columns: Columns) -> Columns:
    """Run a stage on a batch: what decoding tasks call; here, so that they import no Ray Data."""
    return stage(columns)


def pixel_digest(image_HW: np.ndarray) -> str:
    """Return the SHA-256 of a decoded image's shape and pixels: equal for exact copies."""
    digest = hashlib.sha256(f"{image_HW.shape}".encode())
    digest.update(np.ascontiguousarray(image_HW).data)
    return digest.hexdigest()


def column_of(values: list[Any]) -> np.ndarray:
    """Return values as a column (N,); bytes stay objects, as NumPy's own lose zeros at the end."""
    if values and isinstance(values[0], bytes | ScanError):
        column = np.empty(len(values), object)
        column[:] = values
        return column
    return np.array(values)


def _to_columns(rows: list[dict[str, Any]]) -> Columns:
    return {name: column_of([row[name] for row in rows]) for name in rows[0]} if rows else {}
