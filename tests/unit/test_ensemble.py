import numpy as np
import pytest
from scipy.special import softmax

from bt_core.ensemble.calibration import combine, fit_temperature
from bt_core.ensemble.review import conformal_quantile, fit_review, prediction_sets
from bt_core.labels import LABEL_SPACES

SPACE = LABEL_SPACES["four_class"]


@pytest.fixture
def overconfident():
    """Logits whose right temperature is known: labels are drawn from softmax(logits / 3)."""
    rng = np.random.default_rng(0)
    logits_NK = rng.normal(size=(20_000, 4)) * 4
    cumulated = softmax(logits_NK / 3.0, axis=1).cumsum(1)
    labels_N = (rng.random((len(logits_NK), 1)) > cumulated).sum(1)
    return logits_NK, labels_N


def test_the_temperature_that_made_the_labels_is_found(overconfident):
    assert fit_temperature(*overconfident) == pytest.approx(3.0, rel=0.05)


def test_combining_one_member_is_tempered_softmax():
    logits_MNK = np.array([[[2.0, 0.0, -1.0]]])
    probs = combine(logits_MNK, [1.0], [2.0], 1.0)
    np.testing.assert_allclose(probs, softmax(logits_MNK[0] / 2.0, axis=1))


def test_combining_averages_probabilities_not_logits():
    logits_MNK = np.array([[[100.0, 0.0]], [[0.0, 0.0]]])
    np.testing.assert_allclose(combine(logits_MNK, [0.5, 0.5], [1, 1], 1.0), [[0.75, 0.25]])
    np.testing.assert_allclose(combine(logits_MNK, [0.2, 0.8], [1, 1], 1.0), [[0.6, 0.4]])


def test_the_review_threshold_gives_the_wanted_accuracy(overconfident):
    logits_NK, labels_N = overconfident
    probs_NK = softmax(logits_NK / 3.0, axis=1)
    review = fit_review(probs_NK, labels_N, SPACE, target_accuracy=0.8)
    answered = probs_NK.max(1) >= review.min_confidence
    right = probs_NK.argmax(1) == labels_N
    assert right[answered].mean() >= 0.8
    assert 0.05 < answered.mean() < 0.95
    lower = probs_NK.max(1) >= review.min_confidence - 0.02
    assert right[lower].mean() < 0.8, "a lower threshold would have done"


def test_conformal_sets_hold_each_class_at_their_level_and_few_tumours_pass(overconfident):
    logits_NK, labels_N = overconfident
    probs_NK = softmax(logits_NK / 3.0, axis=1)
    half = slice(0, 10_000)
    review = fit_review(
        probs_NK[half], labels_N[half], SPACE, conformal_level=0.9, max_missed_tumor_rate=0.02
    )
    probs_NK, labels_N = probs_NK[10_000:], labels_N[10_000:]
    sets_NK = prediction_sets(probs_NK, list(review.conformal_min_probs.values()))
    held_N = sets_NK[np.arange(10_000), labels_N]
    for k in range(4):
        assert held_N[labels_N == k].mean() == pytest.approx(0.9, abs=0.025)
    passed_N = probs_NK[:, SPACE.healthy] > review.healthy_above
    assert passed_N[labels_N != SPACE.healthy].mean() == pytest.approx(0.02, abs=0.008)
    assert passed_N[labels_N == SPACE.healthy].mean() > 0.1


def clustered(generator, num_families):
    """Scores that go by families of very different sizes, the large ones with low scores."""
    large = generator.random(num_families) < 0.3
    size = np.where(large, 12, 1)
    center = generator.beta(2, 5, size=num_families) * np.where(large, 0.4, 1.0)
    family = np.repeat(np.arange(num_families), size)
    return (center[family] + 0.02 * generator.random(len(family))).clip(0, 1), family


def test_a_promise_by_family_holds_for_new_families_and_one_by_scan_does_not():
    """At 0.9, over 400 draws of 60 families; binomial error (3 sigma) is 0.045."""
    generator = np.random.default_rng(1)
    covered = {"family": 0.0, "scan": 0.0}
    for _ in range(400):
        scores, family = clustered(generator, 60)
        new, new_family = clustered(generator, 200)
        first = np.unique(new_family, return_index=True)[1]  # one scan of each new family
        thresholds = {
            "family": conformal_quantile(scores, family, 0.9),
            "scan": conformal_quantile(scores, np.arange(len(scores)), 0.9),
        }
        for unit, threshold in thresholds.items():
            covered[unit] += (new[first] <= threshold).mean() / 400
    assert 0.89 < covered["family"] < 0.93
    assert covered["scan"] < 0.85


def test_too_few_scans_promise_nothing():
    probs_NK = np.array([[0.7, 0.1, 0.1, 0.1]])
    review = fit_review(probs_NK, np.array([0]), SPACE, conformal_level=0.95)
    assert set(review.conformal_min_probs.values()) == {0.0}
    assert review.healthy_above == 1.0
    hopeless = fit_review(probs_NK, np.array([1]), SPACE)
    assert hopeless.min_confidence == 1.0


def test_the_likeliest_class_is_always_in_the_set():
    sets_NK = prediction_sets(np.array([[0.4, 0.35, 0.25]]), [0.5, 0.3, 0.3])
    assert sets_NK.tolist() == [[True, True, False]]
