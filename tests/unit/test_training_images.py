"""Augmentation, mixing and the loss."""

import math

import pytest
import torch
from torch import nn

from bt_core.training.augment import augment, build_mixing
from bt_core.training.losses import ClassificationLoss
from bt_core.training.spec import AugmentSpec
from tests.unit.toy_training import SIDE, AloneContext, run, toy_recipe

NOTHING = {"horizontal_flip": False, "rotation_degrees": 0, "zoom": 0, "contrast": 0}


def one(images, seed=0, **changes):
    spec = AugmentSpec(**{**NOTHING, **changes})
    return augment(images, spec, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "change",
    [
        {"horizontal_flip": True}, {"vertical_flip": True}, {"rotation_degrees": 20}, {"zoom": 0.2},
        {"shear_degrees": 20}, {"shift": 0.2}, {"contrast": 0.4}, {"brightness": 0.3},
        {"noise": 0.1},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_each_change_acts_alone_per_image_seeded_and_in_range(change):
    images = torch.rand(1, 1, SIDE, SIDE).repeat(16, 1, 1, 1)
    changed = one(images, **change)
    assert torch.equal(changed, one(images, **change))
    assert not torch.equal(changed, one(images, seed=1, **change))
    assert (
        len({round(float(image.double().std()) + float(image[0, 3, 5]), 9) for image in changed})
        > 1
    )
    assert changed.min() >= 0
    assert changed.max() <= 1


def test_a_vertical_flip_is_the_picture_upside_down():
    images = torch.rand(32, 1, SIDE, SIDE)
    flipped = one(images, vertical_flip=True)
    same = torch.isclose(flipped, images, atol=1e-4).flatten(1).all(1)
    turned = torch.isclose(flipped, images.flip(2), atol=1e-4).flatten(1).all(1)
    assert (same ^ turned).all()
    assert 4 < turned.sum() < 28


def centre_of(images):
    weights = images[:, 0] / images[:, 0].sum((1, 2), keepdim=True)
    places = torch.arange(SIDE) - (SIDE - 1) / 2
    return (weights.sum(1) @ places), (weights.sum(2) @ places)


def test_a_shift_moves_the_centre_by_at_most_its_share():
    images = torch.zeros(64, 1, SIDE, SIDE)
    images[:, :, 14:18, 14:18] = 1
    x, y = centre_of(one(images, shift=0.25))
    for moved in (x, y):
        assert moved.abs().max() <= 0.25 * SIDE + 1e-3
        assert moved.abs().max() > 0.15 * SIDE
        assert abs(float(moved.mean())) < 0.08 * SIDE


def test_a_shear_moves_rows_sideways_and_leaves_their_heights():
    images = torch.zeros(64, 1, SIDE, SIDE)
    images[:, :, 4:6, 14:18] = 1
    x, y = centre_of(one(images, shear_degrees=30))
    assert (y + 11).abs().max() < 0.1
    assert 3 < x.abs().max() <= 11 * math.tan(math.radians(30)) + 0.1


def test_brightness_moves_the_mean_and_noise_the_deviation():
    grey = torch.full((64, 1, SIDE, SIDE), 0.5)
    means = one(grey, brightness=0.3).mean((1, 2, 3)) - 0.5
    assert 0.2 < means.abs().max() <= 0.3
    deviations = one(grey, noise=0.1).std((1, 2, 3))
    assert 0.07 < deviations.max() <= 0.11
    assert deviations.min() < 0.03


@pytest.mark.parametrize("kind", ["mixup_alpha", "cutmix_alpha"])
def test_mixed_targets_are_the_shares_of_the_images(kind):
    torch.manual_seed(0)
    labels = torch.arange(4)
    images = labels.view(4, 1, 1, 1).float().repeat(1, 1, SIDE, SIDE)  # an image of its class
    mixed, targets = build_mixing(AugmentSpec(**{kind: 1.0}), 4)(images, labels)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(4.0))
    assert (targets.max(1).values < 1).all()


def test_without_mixing_targets_are_whole():
    images, labels = torch.rand(3, 1, 4, 4), torch.tensor([2, 0, 1])
    mixed, targets = build_mixing(AugmentSpec(), 3)(images, labels)
    assert mixed is images
    assert targets.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_plain_cross_entropy_is_torchs_own(smoothing):
    logits, labels = torch.randn(16, 4), torch.randint(4, (16,))
    hard = nn.functional.one_hot(labels, 4).float()
    own = ClassificationLoss(None, smoothing, 0.0)
    expected = nn.CrossEntropyLoss(label_smoothing=smoothing)
    torch.testing.assert_close(own(logits, hard), expected(logits, labels))
    soft = torch.rand(16, 4).softmax(1)
    torch.testing.assert_close(own(logits, soft), expected(logits, soft))
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0])
    weighted = ClassificationLoss(weights, 0.0, 0.0)
    torch.testing.assert_close(weighted(logits, hard), nn.CrossEntropyLoss(weights)(logits, labels))


def test_focus_lowers_the_loss_of_what_is_known_already():
    probs = torch.tensor([[0.9, 0.05, 0.05], [0.4, 0.3, 0.3]])
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    weights = torch.tensor([2.0, 1.0, 1.0])
    each = [
        -2 * (1 - 0.9) ** 2 * math.log(0.9),
        -2 * 0.5 * (1 - 0.4) ** 2 * math.log(0.4) - 0.5 * (1 - 0.3) ** 2 * math.log(0.3),
    ]
    loss = ClassificationLoss(weights, 0.0, 2.0)(probs.log(), targets)
    assert loss.item() == pytest.approx(sum(each) / (2 + 1.5), rel=1e-5)


def test_focus_has_a_gradient_where_the_answer_is_certain():
    logits = torch.tensor([[60.0, -60.0]], requires_grad=True)
    ClassificationLoss(None, 0.0, 0.5)(logits, torch.tensor([[1.0, 0.0]])).backward()
    assert logits.grad.isfinite().all()


def test_mixing_weights_and_focus_learn_together():
    context = AloneContext()
    mixing = AugmentSpec(**NOTHING, mixup_alpha=0.2, cutmix_alpha=0.5)
    run(context, toy_recipe(augment=mixing, epochs=8, class_weights=True, focal_gamma=1))
    assert context.metrics[-1]["val_accuracy"] > 0.9
