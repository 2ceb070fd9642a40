"""Score rows: what batch scoring writes, one row for each scan, nothing dropped."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, Protocol, Self

import numpy as np
import pyarrow as pa

from bt_core.ensemble.ensemble import Ensemble, preprocess_digest
from bt_core.ensemble.review import of_frame
from bt_core.errors import BundleError, status_of
from bt_core.labels import LabelSpace
from bt_core.models.bundle import Bundle, BundleInfo
from bt_core.scans.gate import GATE_REJECTS
from bt_core.scans.preprocess import PreprocessSpec

STATUSES: Final = ("scored", "deferred", "rejected", "failed")


def score_schema(space: LabelSpace) -> pa.Schema:
    """Return the Parquet schema of score rows: plain Arrow types, readable without this project."""
    return pa.schema(
        [
            pa.field("scan_id", pa.string(), nullable=False),
            pa.field("uri", pa.string(), nullable=False),
            pa.field("member", pa.string(), nullable=False),
            pa.field("position", pa.int64(), nullable=False),
            pa.field("format", pa.string(), nullable=False),
            pa.field("content_sha256", pa.string()),
            pa.field("status", pa.string(), nullable=False),
            pa.field("reason", pa.string(), nullable=False),
            pa.field("predicted_label", pa.string()),
            pa.field("confidence", pa.float64()),
            *(pa.field(f"prob_{name}", pa.float64()) for name in space.names),
            pa.field("entropy", pa.float64()),
            pa.field("frame_index", pa.int64()),
            pa.field("num_frames", pa.int64()),
            pa.field("prediction_set", pa.list_(pa.string())),
            pa.field("members_used", pa.list_(pa.string())),
            pa.field("runtimes", pa.list_(pa.string())),
            pa.field("seen_in_training", pa.bool_()),
            pa.field("nearest_family", pa.string()),
            pa.field("nearest_correlation", pa.float64()),
            pa.field("distance", pa.float64()),
            pa.field("bundle_id", pa.string(), nullable=False),
            pa.field("preprocess_digest", pa.string(), nullable=False),
            pa.field("scored_at", pa.timestamp("us", tz="UTC"), nullable=False),
        ]
    )


def refusals(columns: dict[str, Any]) -> list[str]:
    """Return why each decoded row is not answered; empty for those that are.

    That is what went wrong when it was read, or what the input gate rejects it for.
    """
    pairs = zip(columns["reason"], columns["gate"], strict=True)
    return [str(reason) or (str(gate) if gate in GATE_REJECTS else "") for reason, gate in pairs]


class Answers(Protocol):
    """What a scorer asks: an `Ensemble`, or one that is elsewhere."""

    info: BundleInfo

    @property
    def specs(self) -> tuple[PreprocessSpec, ...]:
        """The preprocessing specs with distinct pixels."""

    def answer(
        self, pixels: Sequence[np.ndarray], pixel_sha256: Sequence[str], gates: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return one answer per scan, as `Ensemble.answer` does."""


class Scorer:
    """Callable for an actor pool: decoded columns in, score rows out. The model is loaded once.

    Args:
        bundle_location: folder of the bundle, readable on every node.
        device: `cpu` or `cuda`.
        num_threads: torch threads on the CPU.
        in_depth: add the columns `logits` (of each member, in the bundle's order, each class) and
            `features` (that the first member's head takes); all members then answer every scan.
        cascade: let the first member answer alone where the bundle says that this is safe.

    Raises:
        BundleError: if a member cannot answer that is needed: by the quorum, or in depth any.
    """

    _schema: pa.Schema

    def __init__(
        self,
        bundle_location: str,
        device: str,
        num_threads: int,
        in_depth: bool = False,
        cascade: bool = True,
    ) -> None:
        bundle = Bundle(bundle_location)
        ensemble = Ensemble(bundle, device, num_threads, cascade and not in_depth, in_depth)
        if in_depth and bundle.unusable:
            raise BundleError(" ".join(bundle.unusable.values()))
        self._ask(ensemble)
        if in_depth:
            numbers = pa.list_(pa.float32())
            self._schema = self._schema.append(pa.field("logits", pa.list_(numbers)))
            self._schema = self._schema.append(pa.field("features", numbers))

    @classmethod
    def asking(cls, ensemble: Answers) -> Self:
        """Return a scorer that asks something else than an ensemble of its own."""
        scorer = cls.__new__(cls)
        scorer._ask(ensemble)
        return scorer

    def _ask(self, ensemble: Answers) -> None:
        self._ensemble = ensemble
        self._schema = score_schema(ensemble.info.label_space)
        self._preprocess_digest = preprocess_digest(ensemble.info)

    def __call__(self, columns: dict[str, Any]) -> pa.Table:
        """Return one score row for each decoded row; those with a reason skip the model."""
        reasons = refusals(columns)
        good = [i for i, reason in enumerate(reasons) if not reason]
        answers: dict[int, dict[str, Any]] = {}
        if good:
            pixels = [columns[f"pixels_{i}"][good] for i in range(len(self._ensemble.specs))]
            digests, gates = ([str(columns[n][i]) for i in good] for n in ("pixel_sha256", "gate"))
            found = self._ensemble.answer(pixels, digests, gates)
            answers = dict(zip(good, found, strict=True))
        now = datetime.now(UTC)
        rows = [
            self._row(columns, i, reason, answers.get(i), now) for i, reason in enumerate(reasons)
        ]
        return pa.Table.from_pylist(rows, schema=self._schema)

    def _row(
        self,
        columns: dict[str, Any],
        i: int,
        reason: str,
        answer: dict[str, Any] | None,
        now: datetime,
    ) -> dict[str, Any]:
        row: dict[str, Any] = {
            "scan_id": str(columns["scan_id"][i]),
            "uri": str(columns["uri"][i]),
            "member": str(columns["member"][i]),
            "position": int(columns["position"][i]),
            "format": str(columns["format"][i]),
            "content_sha256": str(columns["content_sha256"][i]) or None,
            "bundle_id": self._ensemble.info.bundle_id,
            "preprocess_digest": self._preprocess_digest,
            "scored_at": now,
        }
        if answer is None:
            return {**row, "status": status_of(reason), "reason": reason}
        frame = int(columns["frame_index"][i]), int(columns["num_frames"][i])
        probs = {f"prob_{name}": p for name, p in answer["probabilities"].items()}
        return {**row, **of_frame(answer, *frame), **probs}
