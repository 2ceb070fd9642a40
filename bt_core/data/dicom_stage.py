"""Answers written as DICOM objects, one file for each DICOM scan, in tasks that may crash."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bt_core import storage
from bt_core.data import pipeline
from bt_core.data.decode_stage import Columns
from bt_core.data.publish import DICOM_FOLDER
from bt_core.errors import ScanError
from bt_core.scans.archives import ScanRef, read_member
from bt_core.scans.dicom_results import Answer, Kind, dicom_result

ANSWER_COLUMNS: Final = (
    "scan_id", "uri", "member", "position", "format", "status", "reason", "predicted_label",
    "frame_index", "num_frames", "bundle_id", "content_sha256",
)  # fmt: skip
"""Of score rows, besides `prob_<class>`."""


@dataclass(frozen=True)
class DicomResultStage:
    """Reads the scan of each answered row again and writes `<scan_id>.dcm` into a folder.

    Columns of the result: scan_id, reason (empty where a file was written) and detail.

    Args:
        folder: for the files; objects with the patient's identity.
        kind: structured report or secondary capture.
    """

    folder: str
    kind: Kind

    def __call__(self, columns: Columns) -> Columns:
        """Process a batch of answered rows of DICOM scans."""
        rows = [
            self._process({name: values[i] for name, values in columns.items()})
            for i in range(len(columns["scan_id"]))
        ]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def set_aside(self, row: dict[str, Any], reason: str, detail: str) -> dict[str, Any]:
        """Return the row of a scan for which there is no file."""
        return {"scan_id": str(row["scan_id"]), "reason": reason, "detail": detail}

    def _process(self, row: dict[str, Any]) -> dict[str, Any]:
        scan_id, prefix = str(row["scan_id"]), "prob_"
        ref = ScanRef(scan_id, str(row["uri"]), str(row["member"]), int(row["position"]))
        answer = Answer(
            bundle_id=str(row["bundle_id"]),
            predicted_label=str(row["predicted_label"]),
            probabilities={
                name.removeprefix(prefix): float(p)
                for name, p in row.items()
                if name.startswith(prefix)
            },
            needs_review=str(row["status"]) != "scored",
            reason=str(row["reason"]),
            frame_index=int(row["frame_index"]),
            num_frames=int(row["num_frames"]),
        )
        try:
            content = read_member(ref)
            if storage.sha256(content) != str(row["content_sha256"]):  # another patient's, perhaps
                raise ScanError("io_error", "the file has changed since it was scored")
            made = dicom_result(content, answer, self.kind)
        except ScanError as error:
            return self.set_aside(row, error.reason, error.detail)
        storage.write_bytes(storage.join(self.folder, f"{scan_id}.dcm"), made)
        return self.set_aside(row, "", "")


def write_results(parts: list[dict[str, Any]], out: str, kind: Kind) -> dict[str, Any]:
    """Write the answers on DICOM scans of published rows into `DICOM_FOLDER` below a folder.

    Args:
        parts: as in `publish.Published`.
        out: the folder that they lie below.
        kind: of the objects.

    Returns:
        kind, written, and not_written: how many have none, by reason.
    """
    stage = DicomResultStage(storage.join(out, DICOM_FOLDER), kind)
    reasons: Counter[str] = Counter()
    for part in parts:  # one after another: all rows of a large archive would not fit
        rows = storage.read_table(storage.join(out, part["file"]))
        chosen = [n for n in rows.column_names if n in ANSWER_COLUMNS or n.startswith("prob_")]
        answered = pc.is_valid(rows["predicted_label"])
        scans = rows.filter(pc.and_(answered, pc.equal(rows["format"], "DICOM"))).select(chosen)
        if not scans.num_rows:
            continue
        written = pipeline.decode(scans, stage).iter_batches(
            batch_size=None, batch_format="pyarrow"
        )
        reasons.update(pa.concat_tables(list(written))["reason"].to_pylist())
    num_written = reasons.pop("", 0)
    return {"kind": kind, "written": num_written, "not_written": dict(sorted(reasons.items()))}
