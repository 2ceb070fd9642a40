"""The predictions table: what a bundle said about each test scan, beside the truth.

Everything in a report comes from it, so a report can be made again without a model. Joined on
scan_id, never on the order of rows. Shape suffixes: N scans, M members, K classes.
"""

from collections import Counter
from dataclasses import dataclass, fields
from typing import Final, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bt_core.errors import DatasetError, RunError
from bt_core.evaluation.intervals import family_codes
from bt_core.labels import LabelSpace
from bt_core.scans.members import ATTRIBUTES

SLICE_COLUMNS: Final = {
    **{name: name for name in ATTRIBUTES},
    "given_split": "the source's own split",
    "format": "format",
    "width": "width, px",
    "height": "height, px",
    "bit_depth": "bits",
    "channels": "channels",
    "num_bytes": "size of the file, bytes",
    "steps": "changed while decoding",
}
"""Columns of the catalog by which figures are told apart, and what people call them; the first are
there where a list gives them."""

ANSWERED: Final = ("scored", "deferred")
"""Statuses of scans that got an answer, for a person to review perhaps."""


def join_truth(scores: pa.Table, truth: pa.Table) -> pa.Table:
    """Return score rows with label, group, copy_in_training and the slice columns of the catalog.

    Without uri, member and position: a report may be shown to people who are not to see names of
    files.

    Args:
        scores: rows of exactly the scans of `truth`.
        truth: catalog rows.

    Raises:
        RunError: if scans are missing or doubled.
    """
    wanted, got = truth["scan_id"].to_pylist(), scores["scan_id"].to_pylist()
    if Counter(wanted) != Counter(got):
        raise RunError(
            f"{len(wanted)} scans to evaluate, {len(got)} predictions that do not match them"
        )
    joined, known = scores.sort_by("scan_id"), truth.sort_by("scan_id")
    known_better = ("uri", "member", "position", "format")
    joined = joined.drop_columns([n for n in known_better if n in joined.column_names])
    own = [name for name in SLICE_COLUMNS if name in known.column_names]
    for name in ("label", "group", "copy_in_training", *own):
        joined = joined.append_column(name, known[name])
    return joined


@dataclass(frozen=True)
class Scans:
    """Scans that were answered, with or without review, as arrays.

    Attributes:
        scan_id: N ids.
        labels_N: true class indices.
        probs_NK: calibrated probabilities.
        family_N: group of copies or of a patient's scans, from 0 up.
        scored_N: answered without review.
        clean_N: no scan of its group was trained on.
        sets_NK: the prediction set holds the class.
        logits_NMK: of each member of the bundle.
        slices: name of a catalog column to its N values.
    """

    scan_id: np.ndarray
    labels_N: np.ndarray
    probs_NK: np.ndarray
    family_N: np.ndarray
    scored_N: np.ndarray
    clean_N: np.ndarray
    sets_NK: np.ndarray
    logits_NMK: np.ndarray
    slices: dict[str, np.ndarray]

    @classmethod
    def of(cls, predictions: pa.Table, space: LabelSpace) -> Self:
        """Return the answered scans of a predictions table.

        Raises:
            DatasetError: if no scan could be read.
        """
        answered = pc.is_in(predictions["status"], pa.array(ANSWERED))
        table = predictions.filter(answered)
        if not table.num_rows:
            reasons = Counter(predictions["reason"].to_pylist()).most_common(3)
            raise DatasetError(
                f"none of {predictions.num_rows} scans could be read "
                f"({', '.join(f'{reason} {num}' for reason, num in reasons)}); is the source still "
                "where it was? Relative paths of a list start at the list's folder"
            )
        seen = pc.or_(table["seen_in_training"], table["copy_in_training"])
        family_N = family_codes(table["group"].to_pylist())
        num_seen_F = np.bincount(family_N, weights=np.array(seen.to_pylist(), dtype=float))
        sets = table["prediction_set"].to_pylist()
        return cls(
            scan_id=np.array(table["scan_id"].to_pylist()),
            labels_N=np.array([space.index(label) for label in table["label"].to_pylist()]),
            probs_NK=np.stack([table[f"prob_{n}"].to_numpy() for n in space.names], axis=1),
            family_N=family_N,
            scored_N=np.array(table["status"].to_pylist()) == "scored",
            clean_N=num_seen_F[family_N] == 0,
            sets_NK=np.array([[name in chosen for name in space.names] for chosen in sets]),
            logits_NMK=np.array(table["logits"].to_pylist()),
            slices={
                name: np.array(table[name].to_pylist())
                for name in SLICE_COLUMNS
                if name in table.column_names
            },
        )

    def where(self, chosen_N: np.ndarray) -> "Scans":
        """Return some of the scans; families are numbered anew."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "slices"}
        kept = {name: values[chosen_N] for name, values in arrays.items()}
        kept["family_N"] = np.unique(kept["family_N"], return_inverse=True)[1]
        slices = {name: values[chosen_N] for name, values in self.slices.items()}
        return Scans(**kept, slices=slices)

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def right_N(self) -> np.ndarray:
        """Whether the likeliest class is the true one."""
        return np.asarray(self.probs_NK.argmax(1) == self.labels_N)

    @property
    def confidence_N(self) -> np.ndarray:
        """Probability of the likeliest class."""
        return np.asarray(self.probs_NK.max(1))
