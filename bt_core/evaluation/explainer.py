"""Explanations of a bundle's answers, one row for each scan, nothing dropped.

Shape suffixes: M members, B batch, C channels, S side of the first preprocessing.
"""

from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional

from bt_core.ensemble.ensemble import Ensemble
from bt_core.errors import status_of
from bt_core.evaluation.explain import heat_maps
from bt_core.evaluation.faithfulness import (
    deletion_and_insertion,
    mirror_agreement,
    rank_correlation,
    share_outside,
    shuffled,
)
from bt_core.models.bundle import Bundle
from bt_core.scans.preprocess import head_mask

FIGURES: Final = (
    "outside_head", "mirror_agreement", "deletion", "insertion", "randomised_similarity",
)  # fmt: skip
"""Of each map; means over the members by their weights."""
SCHEMA: Final = pa.schema(
    [
        pa.field("scan_id", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("predicted_label", pa.string()),
        pa.field("confidence", pa.float64()),
        pa.field("method", pa.string()),
        *(pa.field(name, pa.float64()) for name in FIGURES),
        pa.field("size_px", pa.int64()),
        pa.field("image", pa.binary()),
        pa.field("heat", pa.binary()),
    ]
)
"""`image` and `heat` are uint8, size_px x size_px, row by row; heat 255 is the hottest place."""


class Explainer:
    """Callable for an actor pool: decoded columns in, explanations out.

    Args:
        bundle_location: folder of the bundle, readable on every node.
        device: `cpu` or `cuda`.
        num_threads: torch threads on the CPU.
    """

    def __init__(self, bundle_location: str, device: str, num_threads: int) -> None:
        self._ensemble = Ensemble(Bundle(bundle_location), device, num_threads)
        self._models = self._ensemble.predictor.models
        self._shuffled = [shuffled(model, seed=0) for model in self._models]

    def __call__(self, columns: dict[str, Any]) -> pa.Table:
        """Return one row for each decoded row; those with a reason have no map."""
        reasons = [str(reason) for reason in columns["reason"]]
        rows = [
            {"scan_id": str(i), "status": status_of(reason), "reason": reason}
            if reason
            else {"scan_id": str(i)}
            for i, reason in zip(columns["scan_id"], reasons, strict=True)
        ]
        good = [i for i, reason in enumerate(reasons) if not reason]
        if good:
            pixels = [columns[f"pixels_{i}"][good] for i in range(len(self._ensemble.specs))]
            digests = [str(columns["pixel_sha256"][i]) for i in good]
            for i, explained in zip(good, self.explain(pixels, digests), strict=True):
                rows[i] |= explained
        return pa.Table.from_pylist(rows, schema=SCHEMA)

    def explain(self, pixels: list[np.ndarray], pixel_sha256: list[str]) -> list[dict[str, Any]]:
        """Return the fields of `SCHEMA`, but for scan_id, of scans.

        Args:
            pixels: for each of the ensemble's specs, pixels_BSS uint8 of the same B scans.
            pixel_sha256: B digests of the decoded images.
        """
        answers = self._ensemble.answer(pixels, pixel_sha256)
        names = self._ensemble.info.label_space.names
        classes_B = torch.tensor([names.index(a["predicted_label"]) for a in answers])
        heat_BSS, methods, figures = self._judged_maps(pixels, classes_B)
        return [
            {
                "status": answer["status"],
                "reason": answer["reason"],
                "predicted_label": answer["predicted_label"],
                "confidence": answer["confidence"],
                "method": methods,
                **{name: None if np.isnan(f[b]) else float(f[b]) for name, f in figures.items()},
                "size_px": pixels[0].shape[-1],
                "image": np.ascontiguousarray(pixels[0][b]).tobytes(),
                "heat": np.ascontiguousarray(heat_BSS[b]).tobytes(),
            }
            for b, answer in enumerate(answers)
        ]

    def _judged_maps(
        self, pixels: list[np.ndarray], classes_B: torch.Tensor
    ) -> tuple[np.ndarray, str, dict[str, np.ndarray]]:
        """Return the members' mean heat_BSS uint8, their methods, and the figures of the maps."""
        predictor = self._ensemble.predictor
        classes_B = classes_B.to(predictor.device)
        total = {name: np.zeros(len(classes_B)) for name in FIGURES}
        heat_BSS, methods = torch.zeros(pixels[0].shape), []
        inside_BSS = torch.from_numpy(np.stack([head_mask(image) for image in pixels[0]]))
        members = zip(
            self._ensemble.info.members,
            self._models,
            self._shuffled,
            predictor.inputs(pixels),
            strict=True,
        )
        for info, model, other, images_BCSS in members:
            heat, method = heat_maps(model, images_BCSS, classes_B)
            deletion_B, insertion_B = deletion_and_insertion(model, images_BCSS, heat, classes_B)
            random, _ = heat_maps(other, images_BCSS, classes_B)
            found = {
                "mirror_agreement": mirror_agreement(model, images_BCSS, heat, classes_B),
                "deletion": deletion_B.cpu().numpy(),
                "insertion": insertion_B.cpu().numpy(),
                "randomised_similarity": rank_correlation(heat, random),
            }
            for name, values_B in found.items():
                total[name] += info.weight * values_B
            side = heat_BSS.shape[-1]
            fitted = functional.interpolate(heat[:, None].cpu(), (side, side), mode="bilinear")
            heat_BSS += info.weight * fitted[:, 0]
            methods.append(method)
        total["outside_head"] = share_outside(heat_BSS, inside_BSS).numpy()
        largest_B11 = heat_BSS.amax((1, 2), keepdim=True).clamp(min=1e-12)
        as_bytes = (heat_BSS / largest_B11 * 255).round().to(torch.uint8).numpy()
        return as_bytes, ", ".join(dict.fromkeys(methods)), total
