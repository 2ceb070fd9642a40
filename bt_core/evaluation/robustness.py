"""How answers change when pictures get worse. Shape suffixes: B batch, S side, K classes."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa

from bt_core.ensemble.ensemble import Ensemble
from bt_core.evaluation.intervals import estimate, family_codes
from bt_core.evaluation.predictions import Scans
from bt_core.labels import LabelSpace
from bt_core.models.bundle import Bundle
from bt_core.scans.perturb import PERTURBATIONS, UNITS, perturb

SAMPLE: Final = 150
"""Scans by chance; each is answered once for every strength of every perturbation."""
_NUM_DRAWS: Final = 500
_NONE: Final = "none"


class Perturber:
    """Callable for an actor pool: decoded columns in, one row for each scan out.

    Args:
        bundle_location: folder of the bundle, readable on every node.
        device: `cpu` or `cuda`.
        num_threads: torch threads on the CPU.
    """

    def __init__(self, bundle_location: str, device: str, num_threads: int) -> None:
        self._ensemble = Ensemble(Bundle(bundle_location), device, num_threads)

    def __call__(self, columns: dict[str, Any]) -> pa.Table:
        """Return scan_id and `probs`: of each of `variants()`, each class; None if unreadable."""
        good = np.flatnonzero(np.array(columns["reason"]) == "")
        pixels = [columns[f"pixels_{i}"][good] for i in range(len(self._ensemble.specs))]
        seeds = [zlib.crc32(str(columns["scan_id"][i]).encode()) for i in good]
        by_variant = []
        for name, strength in variants() if len(good) else ():
            changed = [_changed(own, name, strength, seeds) for own in pixels]
            answers = self._ensemble.answer(changed, ["0" * 64] * len(good))
            by_variant.append([list(answer["probabilities"].values()) for answer in answers])
        rows: list[dict[str, Any]] = [
            {"scan_id": str(i), "probs": None} for i in columns["scan_id"]
        ]
        for b, i in enumerate(good):
            rows[i]["probs"] = [own[b] for own in by_variant]
        kind = pa.list_(pa.list_(pa.float64()))
        return pa.Table.from_pylist(rows, pa.schema([("scan_id", pa.string()), ("probs", kind)]))


def variants() -> list[tuple[str, float]]:
    """Return name and strength of every variant; the first is the picture as it is."""
    return [(_NONE, 0.0), *((name, s) for name, all_s in PERTURBATIONS.items() for s in all_s)]


def chosen_for_robustness(scans: Scans, seed: int = 0) -> list[str]:
    """Return the ids of `SAMPLE` scans by chance, or of all if there are fewer."""
    chosen = np.random.default_rng(seed).permutation(len(scans))[:SAMPLE]
    return [str(i) for i in scans.scan_id[np.sort(chosen)]]


def robustness_figures(
    answered: pa.Table, truth_of: Mapping[str, tuple[int, str]], space: LabelSpace
) -> dict[str, Any] | None:
    """Return accuracy and missed tumours for each strength of each perturbation.

    Args:
        answered: rows of `Perturber`.
        truth_of: scan id to class index and group.
        space: the classes.

    Returns:
        num_scans, and `curves`: name to `unit` and `points`, each with strength and the estimates
        of accuracy and missed_tumor_rate by scan, the first of the picture as it is (strength
        None); None without any scan.
    """
    rows = [row for row in answered.to_pylist() if row["probs"] is not None]
    if not rows:
        return None
    truth = [truth_of[row["scan_id"]] for row in rows]
    labels_N = np.array([label for label, _ in truth])
    family_N = family_codes([group for _, group in truth])
    probs_VNK = np.array([row["probs"] for row in rows]).swapaxes(0, 1)
    points: dict[str, list[dict[str, Any]]] = {}
    for (name, strength), probs_NK in zip(variants(), probs_VNK, strict=True):
        figures = estimate(
            labels_N,
            probs_NK,
            family_N,
            space.names,
            space.healthy,
            num_draws=_NUM_DRAWS,
            units=("by_scan",),
        )["by_scan"]
        shown = {n: figures[n].model_dump() for n in ("accuracy", "missed_tumor_rate")}
        points.setdefault(name, []).append({"strength": strength, **shown})
    first = {**points.pop(_NONE)[0], "strength": None}
    return {
        "num_scans": len(rows),
        "curves": {
            name: {"unit": UNITS[name], "points": [first, *own]} for name, own in points.items()
        },
    }


def _changed(
    pixels_BSS: np.ndarray, name: str, strength: float, seeds: Sequence[int]
) -> np.ndarray:
    if name == _NONE:
        return pixels_BSS
    pairs = zip(pixels_BSS, seeds, strict=True)
    return np.stack([perturb(image_SS, name, strength, seed) for image_SS, seed in pairs])
