"""Ensembles that answer decoded scans, as a service knows them: without HTTP, without Ray."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bt_core.ensemble.ensemble import preprocess_digest
from bt_core.inference.predictor import needed_specs
from bt_core.models.bundle import BundleInfo
from bt_core.scans.preprocess import PreprocessSpec

Scan = tuple[list[np.ndarray], str, str]
"""Pixels_SS uint8 for each spec of the bundle, the pixel digest, and what the input gate says."""


class OverloadedError(Exception):
    """Nothing can answer in time now; the same request may be answered shortly."""


@dataclass(frozen=True)
class Explained:
    """What an explainer says of an answer.

    Attributes:
        bundle_id: of the bundle that it asked.
        heat_SS: uint8, 255 at the hottest place.
        spec: which of the bundle's specs made the pixels that the map lies on.
        method: of the map.
        heat_members: whose maps it is the mean of.
        members: each member's own probabilities, by its name and by class.
        figures: of the map, see `explainer.FIGURES`.
        overlay: the map drawn over the pixels, as PNG; empty if it was not asked for.
    """

    bundle_id: str
    heat_SS: np.ndarray
    spec: int
    method: str
    heat_members: list[str]
    members: dict[str, dict[str, float]]
    figures: dict[str, float | None]
    overlay: bytes


Explain = Callable[[Scan, dict[str, Any], bool], Awaitable[Explained]]
"""Asks what moved an answer, and whether to draw it."""


async def out_of_reach(scan: Scan, answer: dict[str, Any], draw: bool) -> Explained:
    """Explain nothing: what stands for an explainer where none is hosted."""
    raise OverloadedError


@dataclass(frozen=True)
class HostedBundle:
    """A bundle that answers.

    Attributes:
        location: its folder.
        info: its description.
        predict: asks for the answer on a decoded scan; raises OverloadedError.
        loaded_id: asks which bundle is loaded; raises OverloadedError while none is.
        explain: asks what moved the answer on a decoded scan; raises OverloadedError.
    """

    location: str
    info: BundleInfo
    predict: Callable[[Scan], Awaitable[dict[str, Any]]]
    loaded_id: Callable[[], Awaitable[str]]
    explain: Explain = out_of_reach

    @cached_property
    def needed(self) -> tuple[tuple[PreprocessSpec, ...], tuple[int, ...]]:
        """What `needed_specs` gives for it."""
        return needed_specs(self.info)

    @cached_property
    def provenance(self) -> dict[str, str]:
        """Fields of every answer."""
        digest = preprocess_digest(self.info)
        return {"bundle_id": self.info.bundle_id, "preprocess_digest": digest}
