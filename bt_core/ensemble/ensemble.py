"""The ensemble of a bundle: from pixels to answers. Shape suffixes: B batch, S side, K classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import softmax

from bt_core import storage
from bt_core.ensemble.calibration import Calibration, calibration_of
from bt_core.ensemble.cascade import stands
from bt_core.ensemble.far import FarDetector
from bt_core.ensemble.review import decide
from bt_core.inference.predictor import Predictor
from bt_core.labels import LabelSpace
from bt_core.models.bundle import COPIES_FILE, FAR_FILE, Bundle, BundleInfo, index_key
from bt_core.models.training_index import TrainingIndex
from bt_core.scans.preprocess import PreprocessSpec


class Ensemble:
    """A loaded bundle.

    Args:
        bundle: a verified bundle.
        device: `cpu` or `cuda`.
        num_threads: torch threads on the CPU.
        cascade: let the first member answer alone where the bundle says that this is safe; not
            done when a member is missing, since it was fitted with all.
        in_depth: add `logits` (M, K) and `features` (D,) to the answers.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        num_threads: int = 1,
        cascade: bool = False,
        in_depth: bool = False,
    ) -> None:
        info = self.info = bundle.info
        self.predictor = Predictor(bundle, device, num_threads)
        names = [member.name for member in self.predictor.members]
        self._whole = calibration_of(info, names)
        self.shares = self._whole.weights
        is_whole = len(names) == len(info.members)
        self._cascade = info.cascade if cascade and is_whole else None
        self._first = calibration_of(info, names[:1]) if self._cascade else None
        self._in_depth = in_depth
        self._trained_on = bundle.training_index()
        copies, far = bundle.arrays(COPIES_FILE), bundle.arrays(FAR_FILE)
        self._index = None if copies is None else TrainingIndex.from_arrays(copies)
        # It knows the features of the bundle's first member, and no other's.
        is_known = far is not None and names[0] == info.members[0].name
        self._far = FarDetector.from_arrays(far) if far is not None and is_known else None

    @property
    def specs(self) -> tuple[PreprocessSpec, ...]:
        """The preprocessing specs with distinct pixels, in the order that `answer` takes them."""
        return self.predictor.specs

    def answer(
        self,
        pixels: Sequence[np.ndarray],
        pixel_sha256: Sequence[str],
        gates: Sequence[str] | None = None,
    ) -> list[dict[str, Any]]:
        """Return one answer per scan, with the fields that score rows and HTTP share.

        Args:
            pixels: for each of `specs`, pixels_BSS uint8 of the same B scans.
            pixel_sha256: B digests of the decoded images, to tell scans that were trained on.
            gates: B reasons of the input gate (`scans.gate`) for which a person should look, or
                empty texts; None if it was not asked.

        Returns:
            B dicts: status (`scored` or `deferred`), reason, predicted_label, confidence,
            probabilities (by class), entropy (in nats), prediction_set, members_used, runtimes (of
            these), seen_in_training (itself or a copy), nearest_family (of the training scans that
            it is a copy of; None if of none), nearest_correlation (with any training scan) and
            distance (from them all, see `far`); the last two are None if the bundle does not know.
        """
        first_BK, features_BD = self.predictor.first(pixels)
        answers: list[dict[str, Any]] = [{}] * len(pixel_sha256)
        rest = np.arange(len(answers))
        if self._cascade is not None and self._first is not None:
            alone = decide(self._first.probs(first_BK[None]), self._first.review, self._space)
            stands_B = stands(alone, self._cascade.min_confidence, self._space.names)
            rest, left_alone = np.flatnonzero(~stands_B), np.flatnonzero(stands_B)
            alone_fields = self._fields(self._first, first_BK[None, left_alone])
            for b, fields in zip(left_alone, alone_fields, strict=True):
                answers[b] = fields
        if len(rest):
            others = range(1, len(self.predictor.members))
            logits_MBK = first_BK[None, rest]
            if others:
                asked = self.predictor.logits([p[rest] for p in pixels], others)
                logits_MBK = np.concatenate([logits_MBK, asked])
            for b, fields in zip(rest, self._fields(self._whole, logits_MBK), strict=True):
                answers[b] = fields
        if self._in_depth:
            for answer, features_D in zip(answers, features_BD, strict=True):
                answer["features"] = features_D
        gates = gates or [""] * len(answers)
        return self._in_context(answers, pixels, pixel_sha256, gates, features_BD)

    def votes(self, pixels: Sequence[np.ndarray]) -> list[dict[str, dict[str, float]]]:
        """Return what each member says by itself: tempered probabilities by its name and by class.

        Args:
            pixels: as `answer` takes them.
        """
        logits_MBK = np.float64(self.predictor.logits(pixels))
        temperatures = np.array(self._whole.temperatures)[:, None, None]
        probs_BMK = softmax(logits_MBK / temperatures, axis=2).swapaxes(0, 1)
        return [
            {
                member: dict(zip(self._space.names, probs_K.tolist(), strict=True))
                for member, probs_K in zip(self._whole.members, probs_MK, strict=True)
            }
            for probs_MK in probs_BMK
        ]

    @property
    def _space(self) -> LabelSpace:
        return self.info.label_space

    def _fields(self, calibration: Calibration, logits_MBK: np.ndarray) -> list[dict[str, Any]]:
        """Return what members say of scans."""
        names, runtimes = self._space.names, self.predictor.runtime_names
        probs_BK = calibration.probs(logits_MBK)
        decisions = decide(probs_BK, calibration.review, self._space)
        entropy_B = -(probs_BK * np.log(np.maximum(probs_BK, 1e-300))).sum(1)
        answers = [
            {
                "status": "deferred" if decisions.reason_N[b] else "scored",
                "reason": str(decisions.reason_N[b]),
                "predicted_label": names[decisions.label_N[b]],
                "confidence": float(decisions.confidence_N[b]),
                "probabilities": dict(zip(names, probs_BK[b].tolist(), strict=True)),
                "entropy": float(entropy_B[b]),
                "prediction_set": [names[k] for k in np.flatnonzero(decisions.sets_NK[b])],
                "members_used": list(calibration.members),
                "runtimes": [runtimes[name] for name in calibration.members],
            }
            for b in range(len(probs_BK))
        ]
        if self._in_depth:
            for answer, logits_MK in zip(answers, logits_MBK.swapaxes(0, 1), strict=True):
                answer["logits"] = list(logits_MK)
        return answers

    def _in_context(
        self,
        answers: list[dict[str, Any]],
        pixels: Sequence[np.ndarray],
        pixel_sha256: Sequence[str],
        gates: Sequence[str],
        features_BD: np.ndarray,
    ) -> list[dict[str, Any]]:
        """Add what is known of the scans besides, and defer those that are odd."""
        nearest: list[tuple[str | None, float | None]] = [(None, None)] * len(answers)
        if self._index is not None:
            nearest = list(self._index.lookup(pixels[self.predictor.thumbnail]))
        distances: list[float | None] = [None] * len(answers)
        if self._far is not None:
            distances = self._far.score(features_BD).tolist()
        for b, answer in enumerate(answers):
            (family, correlation), distance = nearest[b], distances[b]
            answer["seen_in_training"] = (
                family is not None or index_key(pixel_sha256[b]) in self._trained_on
            )
            answer |= {
                "nearest_family": family, "nearest_correlation": correlation, "distance": distance
            }  # fmt: skip
            is_far = self._far is not None and (distance or 0.0) > self._far.threshold
            odd = gates[b] or ("far_from_training" if is_far else "")
            if odd:  # it says more than how sure an answer is that may be about nothing
                answer |= {"status": "deferred", "reason": odd}
        return answers


def preprocess_digest(info: BundleInfo) -> str:
    """Return one digest for the preprocessing of all members, in their order."""
    return storage.digest_of([m.preprocess.digest for m in info.members])
