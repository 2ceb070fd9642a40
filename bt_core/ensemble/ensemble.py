"""The ensemble of a bundle: from pixels to answers. Shape suffixes: B batch, S side, K classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bt_core import storage
from bt_core.ensemble.calibration import Calibration, calibration_of
from bt_core.ensemble.cascade import stands
from bt_core.ensemble.review import decide
from bt_core.inference.predictor import Predictor
from bt_core.models.bundle import Bundle, BundleInfo, index_key
from bt_core.scans.preprocess import PreprocessSpec


class Ensemble:
    """A loaded bundle.

    Args:
        bundle: a verified bundle.
        device: `cpu` or `cuda`.
        num_threads: torch threads on the CPU.
        cascade: let the first member answer alone where the bundle says that this is safe; not
            done when a member is missing, since it was fitted with all.
    """

    def __init__(
        self, bundle: Bundle, device: str = "cpu", num_threads: int = 1, cascade: bool = False
    ) -> None:
        self.info = bundle.info
        self.predictor = Predictor(bundle, device, num_threads)
        self.members = [member.name for member in self.predictor.members]
        self._whole = calibration_of(self.info, self.members)
        self.shares = self._whole.weights
        is_whole = len(self.members) == len(self.info.members)
        self._cascade = self.info.cascade if cascade and is_whole else None
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
        if self._cascade is None:
            return self.judge(self.predictor.logits(pixels), pixel_sha256)
        info = self.info
        first = calibration_of(info, self.members[:1])
        first_1BK = self.predictor.logits(pixels, [0])
        answers = self._fields(first, first_1BK, pixel_sha256)
        alone = decide(first.probs(first_1BK), first.review, info.label_space)
        rest = np.flatnonzero(~stands(alone, self._cascade.min_confidence, info.label_space.names))
        if len(rest):
            others = self.predictor.logits([p[rest] for p in pixels], range(1, len(self.members)))
            logits_MBK = np.concatenate([first_1BK[:, rest], others])
            judged = self.judge(logits_MBK, [pixel_sha256[int(b)] for b in rest])
            for b, answer in zip(rest, judged, strict=True):
                answers[b] = answer
        return answers

    def judge(self, logits_MBK: np.ndarray, pixel_sha256: Sequence[str]) -> list[dict[str, Any]]:
        """Return the answers of `answer` from the logits of all members, without the cascade."""
        return self._fields(self._whole, logits_MBK, pixel_sha256)

    def _fields(
        self, calibration: Calibration, logits_MBK: np.ndarray, pixel_sha256: Sequence[str]
    ) -> list[dict[str, Any]]:
        names = self.info.label_space.names
        probs_BK = calibration.probs(logits_MBK)
        decisions = decide(probs_BK, calibration.review, self.info.label_space)
        entropy_B = -(probs_BK * np.log(np.maximum(probs_BK, 1e-300))).sum(1)
        return [
            {
                "status": "deferred" if decisions.reason_N[b] else "scored",
                "reason": str(decisions.reason_N[b]),
                "predicted_label": names[decisions.label_N[b]],
                "confidence": float(decisions.confidence_N[b]),
                "probabilities": dict(zip(names, probs_BK[b].tolist(), strict=True)),
                "entropy": float(entropy_B[b]),
                "prediction_set": [names[k] for k in np.flatnonzero(decisions.sets_NK[b])],
                "members_used": list(calibration.members),
                "seen_in_training": index_key(digest) in self._trained_on,
            }
            for b, digest in enumerate(pixel_sha256)
        ]


def preprocess_digest(info: BundleInfo) -> str:
    """Return one digest for the preprocessing of all members, in their order."""
    return storage.digest_of([m.preprocess.digest for m in info.members])
