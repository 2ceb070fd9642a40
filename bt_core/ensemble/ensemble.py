"""The ensemble of a bundle: from pixels to answers. Shape suffixes: B batch, S side, K classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bt_core import storage
from bt_core.ensemble.calibration import combine
from bt_core.ensemble.review import prediction_sets
from bt_core.inference.predictor import Predictor
from bt_core.models.bundle import Bundle, BundleInfo, index_key
from bt_core.scans.preprocess import PreprocessSpec


class Ensemble:
    """A loaded bundle.

    Args:
        bundle: a verified bundle.
        device: `cpu` or `cuda`.
        num_threads: torch threads on the CPU.
    """

    def __init__(self, bundle: Bundle, device: str = "cpu", num_threads: int = 1) -> None:
        self.info = bundle.info
        self.predictor = Predictor(bundle, device, num_threads)
        self._trained_on = bundle.training_index()

    @property
    def specs(self) -> tuple[PreprocessSpec, ...]:
        """The preprocessing specs with distinct pixels, in the order that `answer` takes them."""
        return self.predictor.specs

    def answer(
        self, pixels: Sequence[np.ndarray], pixel_sha256: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return one answer per scan, with the fields that score rows and HTTP share.

        Args:
            pixels: for each of `specs`, pixels_BSS uint8 of the same B scans.
            pixel_sha256: B digests of the decoded images, to tell scans that were trained on.

        Returns:
            B dicts: status (`scored` or `deferred`), reason, predicted_label, confidence,
            probabilities (by class), entropy (in nats), prediction_set, members_used,
            seen_in_training.
        """
        return self.judge(self.predictor.logits(pixels), pixel_sha256)

    def judge(self, logits_MBK: np.ndarray, pixel_sha256: Sequence[str]) -> list[dict[str, Any]]:
        """Return the answers of `answer` from the members' logits."""
        info = self.info
        probs_BK = combine(
            logits_MBK,
            [m.weight for m in info.members],
            [m.temperature for m in info.members],
            info.temperature,
        )
        min_probs_K = [info.review.conformal_min_probs[name] for name in info.label_space.names]
        sets_BK = prediction_sets(probs_BK, min_probs_K)
        return [
            self._fields(probs, chosen, index_key(digest) in self._trained_on)
            for probs, chosen, digest in zip(probs_BK, sets_BK, pixel_sha256, strict=True)
        ]

    def _fields(self, probs_K: np.ndarray, set_K: np.ndarray, seen: bool) -> dict[str, Any]:
        names = self.info.label_space.names
        confidence = float(probs_K.max())
        sure = confidence >= self.info.review.min_confidence
        return {
            "status": "scored" if sure else "deferred",
            "reason": "" if sure else "low_confidence",
            "predicted_label": names[int(probs_K.argmax())],
            "confidence": confidence,
            "probabilities": {n: float(p) for n, p in zip(names, probs_K, strict=True)},
            "entropy": float(-(probs_K * np.log(np.maximum(probs_K, 1e-300))).sum()),
            "prediction_set": [n for n, chosen in zip(names, set_K, strict=True) if chosen],
            "members_used": [m.name for m in self.info.members],
            "seen_in_training": seen,
        }


def preprocess_digest(info: BundleInfo) -> str:
    """Return one digest for the preprocessing of all members, in their order."""
    return storage.digest_of([m.preprocess.digest for m in info.members])
