"""Far from training: the rate holds on new families, and outliers are found."""

import numpy as np
import pytest
import safetensors.numpy

from bt_core.ensemble.far import FarDetector

NUM_FEATURES = 64
MIXING = np.random.default_rng(7).normal(size=(6, NUM_FEATURES))
CENTRE = np.abs(np.random.default_rng(8).normal(3, 1, NUM_FEATURES))


def drawn(num_families, seed, copies=3):
    """Features of scans that differ in 6 directions, copies nearly alike, and their families."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, copies + 1, num_families)
    family_N = np.repeat(np.arange(num_families), sizes)
    own_ND = rng.normal(size=(num_families, 6)) @ MIXING + rng.normal(
        size=(num_families, NUM_FEATURES)
    ) * rng.gamma(2, 0.2, (num_families, 1))
    noise_ND = rng.normal(0, 0.02, (len(family_N), NUM_FEATURES))
    features_ND = CENTRE + own_ND[family_N] + noise_ND
    return features_ND.astype(np.float32), family_N


@pytest.fixture(scope="module")
def detector():
    return FarDetector.fit(*drawn(400, 0), rate=0.05)


@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_the_rate_holds_on_new_families(rate):
    """On average over fits; and the threshold is no higher than that needs."""
    shares = []
    for seed in range(60):
        detector = FarDetector.fit(*drawn(300, seed), rate=rate, seed=seed)
        new_ND, _ = drawn(400, 1000 + seed, copies=1)
        shares.append(detector.is_far(new_ND).mean())
    error = np.std(shares) / np.sqrt(len(shares))
    assert np.mean(shares) <= rate + 3 * error
    assert np.mean(shares) >= rate / 2


def test_many_copies_of_one_family_do_not_move_the_threshold_like_evidence():
    features_ND, family_N = drawn(300, 1, copies=1)
    odd = np.argmax(FarDetector.fit(features_ND, family_N, 0.05).score(features_ND))
    repeated_ND = np.concatenate([features_ND, np.repeat(features_ND[[odd]], 900, axis=0)])
    families = np.concatenate([family_N, np.full(900, family_N[odd])])
    new_ND, _ = drawn(2000, 2, copies=1)
    share = FarDetector.fit(repeated_ND, families, 0.05, seed=3).is_far(new_ND).mean()
    assert 0.01 < share < 0.12


def test_outliers_are_found(detector):
    rng = np.random.default_rng(3)
    elsewhere = np.abs(rng.normal(3, 1, (50, NUM_FEATURES)))
    noisy = drawn(50, 4)[0]
    noisy += rng.normal(0, 4, noisy.shape)
    assert detector.is_far(elsewhere).all()
    assert detector.is_far(noisy).all()


def test_distances_are_about_one_and_ignore_the_scale(detector):
    new_ND, _ = drawn(300, 5)
    assert 0.7 < np.median(detector.score(new_ND)) < 1.5
    np.testing.assert_allclose(detector.score(7 * new_ND), detector.score(new_ND), rtol=1e-5)


def test_it_is_mahalanobis_under_the_model(detector):
    covariance = np.diag(np.full(NUM_FEATURES, detector.rest))
    for row_D, variance in zip(detector.components_CD, detector.variances_C, strict=True):
        row_D = row_D.astype(np.float64)
        covariance += np.outer(row_D, row_D) * (float(variance) - detector.rest)
    new_ND = drawn(20, 6)[0].astype(np.float64)
    apart = new_ND / np.linalg.norm(new_ND, axis=1, keepdims=True) - detector.mean_D
    squared = np.einsum("nd,de,ne->n", apart, np.linalg.inv(covariance), apart)
    expected = np.sqrt(squared / NUM_FEATURES)
    np.testing.assert_allclose(detector.score(new_ND), expected, rtol=1e-3)


def test_it_is_stored_as_small_arrays(detector):
    content = safetensors.numpy.save(detector.arrays())
    again = FarDetector.from_arrays(safetensors.numpy.load(content))
    new_ND, _ = drawn(40, 9)
    assert (again.score(new_ND) == detector.score(new_ND)).all()
    assert (again.threshold, again.rate) == (detector.threshold, detector.rate)
    wide = np.random.default_rng(0).normal(size=(200, 2048)).astype(np.float32)
    wide_detector = FarDetector.fit(wide, np.arange(200))
    assert len(safetensors.numpy.save(wide_detector.arrays())) < 300_000


def test_too_few_families_call_nothing_far():
    features_ND, family_N = drawn(40, 10)
    detector = FarDetector.fit(features_ND, family_N, rate=0.02)
    assert detector.threshold == np.inf
    assert not detector.is_far(1e6 * np.random.default_rng(0).normal(size=(9, NUM_FEATURES))).any()
    with pytest.raises(ValueError, match="1 families"):
        FarDetector.fit(features_ND, np.zeros(len(features_ND)))


@pytest.mark.parametrize("num_families", [2, 3, 9])
def test_hardly_any_scans_still_give_finite_distances(num_families):
    detector = FarDetector.fit(*drawn(num_families, 11), rate=0.5)
    assert np.isfinite(detector.score(drawn(20, 12)[0])).all()
    assert np.isfinite(detector.score(np.zeros((2, NUM_FEATURES), np.float32))).all()


def test_equal_features_lie_at_zero():
    same = np.tile(CENTRE.astype(np.float32), (200, 1))
    detector = FarDetector.fit(same, np.arange(200), rate=0.05)
    assert not detector.is_far(same).any()
    assert detector.is_far(same[:1] + np.arange(NUM_FEATURES)).all()


def test_an_answer_depends_on_no_neighbour(detector):
    new_ND, _ = drawn(10, 13)
    alone = [detector.score(row_D[None])[0] for row_D in new_ND]
    np.testing.assert_allclose(detector.score(new_ND), alone, rtol=1e-12)


def test_a_distance_is_the_same_to_the_last_bit_alone_and_among_others():
    rng = np.random.default_rng(0)
    features_ND = rng.normal(size=(200, 320)).astype(np.float32) + 2
    detector = FarDetector.fit(features_ND, np.arange(200))
    together = detector.score(features_ND[:64])
    alone = np.concatenate([detector.score(features_ND[i : i + 1]) for i in range(64)])
    assert (together == alone).all()
