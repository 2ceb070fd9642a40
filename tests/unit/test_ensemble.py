import numpy as np
import pytest
from scipy.special import softmax

from bt_core.ensemble.calibration import combine, fit_temperature
from bt_core.ensemble.review import fit_review, prediction_sets


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
    review = fit_review(probs_NK, labels_N, target_accuracy=0.8)
    answered = probs_NK.max(1) >= review.min_confidence
    right = probs_NK.argmax(1) == labels_N
    assert right[answered].mean() >= 0.8
    assert 0.05 < answered.mean() < 0.95
    lower = probs_NK.max(1) >= review.min_confidence - 0.02
    assert right[lower].mean() < 0.8, "a lower threshold would have done"


def test_conformal_sets_hold_the_truth_at_their_level_on_new_scans(overconfident):
    logits_NK, labels_N = overconfident
    probs_NK = softmax(logits_NK / 3.0, axis=1)
    review = fit_review(probs_NK[:10_000], labels_N[:10_000], conformal_level=0.9)
    sets_NK = prediction_sets(probs_NK[10_000:], review.conformal_min_prob)
    covered = sets_NK[np.arange(10_000), labels_N[10_000:]].mean()
    assert covered == pytest.approx(0.9, abs=0.015)


def test_too_few_scans_promise_nothing():
    review = fit_review(np.array([[0.9, 0.1]]), np.array([0]), conformal_level=0.95)
    assert review.conformal_min_prob == 0.0
    hopeless = fit_review(np.array([[0.9, 0.1]]), np.array([1]))
    assert hopeless.min_confidence == 1.0


def test_the_likeliest_class_is_always_in_the_set():
    sets_NK = prediction_sets(np.array([[0.4, 0.35, 0.25]]), 0.5)
    assert sets_NK.tolist() == [[True, False, False]]
