"""The training index names the family of a copy, however it was changed, and of nothing else."""

import cv2
import numpy as np
import pytest
import safetensors.numpy

from bt_core.data.families import CopyIndex
from bt_core.models.training_index import TrainingIndex
from bt_core.scans.phantom import CLASS_NAMES, perturbed_copy, phantom_slice
from bt_core.scans.preprocess import preprocess_pixels
from bt_core.scans.thumbnails import (
    MIN_CORRELATION,
    THUMBNAIL,
    TRANSFORMS,
    spectrum,
    transformed,
)

HEADS = [phantom_slice(name, seed, 128) for name in CLASS_NAMES for seed in range(15)]
OTHERS = [phantom_slice(name, seed, 128) for name in CLASS_NAMES for seed in range(100, 110)]
NAMES = [f"{1 + 2**59 * (i % 31):016x}"[:15] + f"{i % 16:x}" for i in range(len(HEADS))]


def thumbnails_of(images):
    return np.stack([preprocess_pixels(image, THUMBNAIL) for image in images])


THUMBNAILS = thumbnails_of(HEADS)


@pytest.fixture(scope="module")
def index():
    return TrainingIndex.build(THUMBNAILS, NAMES)


def families_of(index, thumbnails_BFF):
    return [family for family, _ in index.lookup(thumbnails_BFF)]


def decoded(content):
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE)


def test_the_names_differ():
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("transform", range(len(TRANSFORMS)))
def test_a_training_scan_is_found_under_every_transform(index, transform):
    turned = np.ascontiguousarray(transformed(THUMBNAILS, transform))
    assert families_of(index, turned) == NAMES
    assert min(value for _, value in index.lookup(turned)) > 0.999


def test_copies_as_they_stand_in_public_sets_are_found(index):
    rng = np.random.default_rng(0)
    copies = [decoded(perturbed_copy(head, rng)) for head in HEADS]
    assert families_of(index, thumbnails_of(copies)) == NAMES


def test_sharpened_copies_are_found(index):
    sharp = [
        cv2.addWeighted(head, 2.0, cv2.GaussianBlur(head, (0, 0), 1.5), -1.0, 0) for head in HEADS
    ]
    assert families_of(index, thumbnails_of(sharp)) == NAMES


def test_other_heads_are_copies_of_none_and_tell_how_near_they_are(index):
    found = index.lookup(thumbnails_of(OTHERS))
    assert [family for family, _ in found] == [None] * len(OTHERS)
    assert all(0.3 < value < MIN_CORRELATION for _, value in found)


def test_the_correlation_is_the_best_of_all(index):
    """By brute force: all training scans, 8 transforms, without the code under test."""
    others = thumbnails_of(OTHERS[:8])
    for other, (_, value) in zip(others, index.lookup(others), strict=True):
        best = max(
            np.corrcoef(transformed(other, t).ravel(), own.ravel())[0, 1]
            for t in range(8)
            for own in THUMBNAILS
        )
        assert value == pytest.approx(best, abs=1e-5)


def test_whatever_families_call_a_copy_is_found(index):
    rng = np.random.default_rng(1)
    noisy = [np.clip(h + rng.normal(0, 12, h.shape), 0, 255).astype(np.uint8) for h in HEADS]
    both = np.concatenate([THUMBNAILS, thumbnails_of(noisy)])
    pairs = CopyIndex(both, spectrum(both)).search(0, len(both))
    right = pairs.right_P[(pairs.left_P < len(HEADS)) & (pairs.right_P >= len(HEADS))]
    assert len(right)
    found = families_of(index, both[right])
    assert found == [NAMES[i - len(HEADS)] for i in right]


def test_an_answer_depends_on_no_neighbour(index):
    together = index.lookup(thumbnails_of(OTHERS[:6]))
    alone = [index.lookup(thumbnails_of([image]))[0] for image in OTHERS[:6]]
    assert [f for f, _ in together] == [f for f, _ in alone]
    np.testing.assert_allclose([v for _, v in together], [v for _, v in alone], atol=1e-5)


def test_it_is_stored_as_small_arrays(index):
    content = safetensors.numpy.save(index.arrays())
    assert len(content) < 2048 * len(HEADS)
    again = TrainingIndex.from_arrays(safetensors.numpy.load(content))
    assert len(again) == len(index)
    assert again.lookup(THUMBNAILS[:9]) == index.lookup(THUMBNAILS[:9])


def test_equal_thumbnails_of_a_family_are_stored_once():
    twice = TrainingIndex.build(np.concatenate([THUMBNAILS[:3]] * 2), NAMES[:3] * 2)
    assert len(twice) == 3
    assert families_of(twice, THUMBNAILS[:3]) == NAMES[:3]
    assert len(TrainingIndex.build(THUMBNAILS[[0, 0]], NAMES[:2])) == 2


def test_nothing_and_flat_scans_are_copies_of_none(index):
    flat = np.full((2, 40, 40), 7, np.uint8)
    assert index.lookup(flat) == [(None, 0.0)] * 2
    assert index.lookup(flat[:0]) == []
    empty = TrainingIndex.build(THUMBNAILS[:0], [])
    empty = TrainingIndex.from_arrays(
        safetensors.numpy.load(safetensors.numpy.save(empty.arrays()))
    )
    assert len(empty) == 0
    assert empty.lookup(THUMBNAILS[:2]) == [(None, 0.0)] * 2
    of_flat = TrainingIndex.build(flat, NAMES[:2])
    assert of_flat.lookup(flat) == [(None, 0.0)] * 2


@pytest.mark.parametrize("name", ["12", "0x00000000000001", "G" * 16, "ABCDEF0123456789"])
def test_a_family_that_is_no_digest_is_refused(name):
    with pytest.raises(ValueError, match=r"hexadecimal|invalid literal"):
        TrainingIndex.build(THUMBNAILS[:1], [name])
