"""Explanations of a bundle's answers, one row for each scan, nothing dropped.

Shape suffixes: M members, B batch, C channels, S side of the first preprocessing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional

from bt_core.ensemble.ensemble import Ensemble
from bt_core.ensemble.review import of_frame
from bt_core.ensemble.scorer import refusals
from bt_core.errors import status_of
from bt_core.evaluation.explain import heat_maps
from bt_core.evaluation.faithfulness import (
    deletion_and_insertion,
    mirror_agreement,
    randomised_similarity,
    share_outside,
    shuffled,
)
from bt_core.models.bundle import Bundle
from bt_core.scans.decoded import BURNED_IN
from bt_core.scans.preprocess import PreprocessSpec, head_mask

FIGURES: Final = (
    "outside_head", "mirror_agreement", "deletion", "insertion", "randomised_similarity",
)  # fmt: skip
"""Of each map; means over the members by their weights."""
TEXT_BURNED_IN: Final = "text_burned_in"
"""Reason of a scan whose header says so: the text may be a name, so it is not drawn."""
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
        self.ensemble = Ensemble(Bundle(bundle_location), device, num_threads)
        self._shuffled = [shuffled(model, seed=0) for model in self.ensemble.predictor.models]

    @property
    def drawn_members(self) -> list[str]:
        """Names of the members that the map is the mean of: they see the picture as the first."""
        members = self.ensemble.predictor.members
        geometry = _geometry(members[0].preprocess)
        return [m.name for m in members if _geometry(m.preprocess) == geometry]

    def __call__(self, columns: dict[str, Any]) -> pa.Table:
        """Return one row for each decoded row; what may not or cannot be drawn has no map."""
        reasons = [
            reason or (TEXT_BURNED_IN if BURNED_IN in str(steps) else "")
            for reason, steps in zip(refusals(columns), columns["steps"], strict=True)
        ]
        rows: list[dict[str, Any]] = [
            {
                "scan_id": str(i),
                "status": "rejected" if reason == TEXT_BURNED_IN else status_of(reason),
                "reason": reason,
            }
            for i, reason in zip(columns["scan_id"], reasons, strict=True)
        ]
        good = [i for i, reason in enumerate(reasons) if not reason]
        if good:
            pixels = [columns[f"pixels_{i}"][good] for i in range(len(self.ensemble.specs))]
            digests, gates = ([str(columns[n][i]) for i in good] for n in ("pixel_sha256", "gate"))
            found = self.ensemble.answer(pixels, digests, gates)
            answers = [
                of_frame(answer, int(columns["frame_index"][i]), int(columns["num_frames"][i]))
                for i, answer in zip(good, found, strict=True)
            ]
            for i, explained in zip(good, self.explain(pixels, answers), strict=True):
                rows[i] |= explained
        return pa.Table.from_pylist(rows, schema=SCHEMA)

    def explain(
        self, pixels: list[np.ndarray], answers: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return the fields of `SCHEMA`, but for scan_id, of scans.

        Args:
            pixels: for each of the ensemble's specs, pixels_BSS uint8 of the same B scans.
            answers: B answers of the ensemble, to be explained.
        """
        names = self.ensemble.info.label_space.names
        classes_B = torch.tensor([names.index(a["predicted_label"]) for a in answers])
        heat_BSS, methods, figures = self._judged_maps(pixels, classes_B)
        shown_BSS = pixels[self.ensemble.predictor.spec_of[0]]
        return [
            {
                **{n: answer[n] for n in ("status", "reason", "predicted_label", "confidence")},
                "method": methods,
                **{name: None if np.isnan(f[b]) else float(f[b]) for name, f in figures.items()},
                "size_px": shown_BSS.shape[-1],
                "image": np.ascontiguousarray(shown_BSS[b]).tobytes(),
                "heat": np.ascontiguousarray(heat_BSS[b]).tobytes(),
            }
            for b, answer in enumerate(answers)
        ]

    def _judged_maps(
        self, pixels: list[np.ndarray], classes_B: torch.Tensor
    ) -> tuple[np.ndarray, str, dict[str, np.ndarray]]:
        """Return heat_BSS uint8, methods, and the figures of the maps.

        Figures are means over the members by their weights. The map that is drawn is the mean over
        the members that see the picture cut out and fitted as the first one does.
        """
        predictor, members = self.ensemble.predictor, self.ensemble.predictor.members
        classes_B = classes_B.to(predictor.device)
        total = {name: np.zeros(len(classes_B)) for name in FIGURES}
        drawn_BSS, methods = torch.zeros(pixels[predictor.spec_of[0]].shape), []
        drawn = self.drawn_members
        inputs = predictor.inputs(pixels)
        shares = self.ensemble.shares
        for m, (member, model) in enumerate(zip(members, predictor.models, strict=True)):
            heat, method = heat_maps(model, inputs[m], classes_B)
            own = pixels[predictor.spec_of[m]]
            for name, values_B in self._judge(m, inputs[m], heat, classes_B, own).items():
                total[name] += shares[m] * values_B
            if member.name in drawn:
                side = drawn_BSS.shape[-1]
                fitted = functional.interpolate(heat[:, None].cpu(), (side, side), mode="bilinear")
                drawn_BSS += shares[m] * fitted[:, 0]
            methods.append(method)
        largest_B11 = drawn_BSS.amax((1, 2), keepdim=True).clamp(min=1e-12)
        as_bytes = (drawn_BSS / largest_B11 * 255).round().to(torch.uint8).numpy()
        return as_bytes, ", ".join(dict.fromkeys(methods)), total

    def _judge(
        self,
        member: int,
        images_BCSS: torch.Tensor,
        heat_BSS: torch.Tensor,
        classes_B: torch.Tensor,
        pixels_BSS: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Return the figures of one member's maps."""
        model = self.ensemble.predictor.models[member]
        other = self._shuffled[member]
        inside_BSS = torch.from_numpy(np.stack([head_mask(image_SS) for image_SS in pixels_BSS]))
        deletion_B, insertion_B = deletion_and_insertion(model, images_BCSS, heat_BSS, classes_B)
        return {
            "outside_head": share_outside(heat_BSS.cpu(), inside_BSS).numpy(),
            "mirror_agreement": mirror_agreement(model, images_BCSS, heat_BSS, classes_B),
            "deletion": deletion_B.cpu().numpy(),
            "insertion": insertion_B.cpu().numpy(),
            "randomised_similarity": randomised_similarity(
                model, other, images_BCSS, heat_BSS, classes_B
            ),
        }


def _geometry(spec: PreprocessSpec) -> tuple[bool, str]:
    return spec.crop_to_head, spec.fit
