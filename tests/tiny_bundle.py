"""A small bundle of untrained networks, which tells nothing and answers at once."""

import shutil

import torch

from bt_core.inference.predictor import with_golden_probs
from bt_core.labels import LABEL_SPACES
from bt_core.models.bundle import BundleInfo, MemberInfo, ReviewInfo, SubsetInfo
from bt_core.models.bundle_writer import write_bundle
from bt_core.models.classifier import build_classifier
from bt_core.models.inputs import Preprocessor
from bt_core.models.spec import ModelSpec
from bt_core.scans.preprocess import PreprocessSpec

TINY = ModelSpec(backbone="cnn_small", backbone_args={"width": 4}, weights="none")
SPACE = LABEL_SPACES["four_class"]


def make_bundle(
    location, sizes=(32, 48), flips="none", min_confidence=0.3, sure=False, arrays=None, **changes
):
    """Write a bundle of untrained networks, one for each size, and return its description."""
    members, weights = [], {}
    for i, size in enumerate(sizes):
        torch.manual_seed(i)
        tiny = TINY.model_copy(update={"test_time_flips": flips})
        model, spec, preprocess = build_classifier(tiny, PreprocessSpec(size_px=size), 4)
        name = f"m{i}"
        members.append(
            MemberInfo(
                name=name,
                model=spec,
                preprocess=preprocess,
                golden_digest=Preprocessor(preprocess).golden_digest,
                weight=1 / len(sizes),
                temperature=1.5,
            )
        )
        weights[name] = model.state_dict()
    review = ReviewInfo(
        min_confidence=min_confidence,
        target_accuracy=0.98,
        conformal_level=0.9,
        conformal_min_probs=dict.fromkeys(SPACE.names, 0.2),
        max_missed_tumor_rate=0.01,
        healthy_above=0.0 if sure else 0.9,
    )
    info = BundleInfo(
        label_space=SPACE, members=tuple(members), temperature=1e-3 if sure else 0.9,
        review=review, metrics={}, provenance={}, **changes,
    )  # fmt: skip
    info = with_golden_probs(info, weights)
    return write_bundle(str(location), info, weights, ["ab" * 32], "a card", arrays)


def with_subsets(location, cascade=None, temperature=3.0):
    """A bundle of two members, each of which may answer alone by a calibration of its own."""
    whole = make_bundle(location)
    shutil.rmtree(location)
    alone = tuple(
        SubsetInfo(members=(f"m{i}",), temperature=temperature + i, review=whole.review)
        for i in (0, 1)
    )
    return make_bundle(location, quorum=1, subsets=alone, cascade=cascade)
