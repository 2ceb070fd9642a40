import numpy as np
import pytest
from scipy.special import softmax

from bt_core.ensemble.build import Options, Validation, calibrate
from bt_core.ensemble.calibration import calibration_of, combine, fit_temperature
from bt_core.ensemble.cascade import fit_cascade, stands
from bt_core.ensemble.review import (
    Decisions,
    conformal_quantile,
    decide,
    fit_review,
    prediction_sets,
)
from bt_core.ensemble.weights import choose_weights, fit_weights
from bt_core.errors import BundleError, UsageError
from bt_core.labels import LABEL_SPACES
from bt_core.models.bundle import MemberInfo, ReviewInfo
from bt_core.models.spec import ModelSpec
from bt_core.scans.preprocess import PreprocessSpec

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


def members_of(accuracies, num=600, seed=0):
    """Logits of members that are right so often, and sure or not as they are right or not."""
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(0, 4, num)
    hard_N = rng.random(num)
    logits = []
    for accuracy in accuracies:
        right_N = hard_N < accuracy
        wrong_N = (labels_N + rng.integers(1, 4, num)) % 4
        said_N = np.where(right_N, labels_N, wrong_N)
        margin_N = np.where(hard_N < accuracy - 0.1, 6.0, 1.5) + rng.normal(0, 0.3, num)
        logits_NK = rng.normal(0, 0.2, (num, 4))
        logits_NK[np.arange(num), said_N] += margin_N
        logits.append(logits_NK)
    return np.array(logits), labels_N


def true_probs(logits_MNK, labels_N):
    return softmax(logits_MNK, axis=2)[:, np.arange(len(labels_N)), labels_N]


@pytest.mark.parametrize("method", ["log_loss", "greedy"])
def test_weights_minimise_the_log_loss_and_leave_out_what_adds_nothing(method):
    logits_MNK, labels_N = members_of([0.95, 0.9, 0.3])
    probs_MN = true_probs(logits_MNK, labels_N)
    shares_M = fit_weights(probs_MN, np.arange(600), method)
    assert shares_M.sum() == pytest.approx(1)
    assert (shares_M >= 0).all()
    assert shares_M[2] < 0.05
    loss = -np.log(shares_M @ probs_MN).mean()
    rng = np.random.default_rng(0)
    others = rng.dirichlet(np.ones(3), 200)
    tolerance = 1e-3 if method == "log_loss" else 5e-3
    assert loss <= min(-np.log(other @ probs_MN).mean() for other in others) + tolerance


def test_weights_count_families_once():
    """Ninety copies of one scan, which member 1 knows, against ten scans that member 0 knows."""
    family_N = np.array([0] * 90 + list(range(1, 11)))
    probs_MN = np.where(family_N == 0, [[0.01]], [[0.9]]).repeat(2, 0)
    probs_MN[1] = np.where(family_N == 0, 0.9, 0.01)
    by_family = fit_weights(probs_MN, family_N, "log_loss")
    by_scan = fit_weights(probs_MN, np.arange(100), "log_loss")
    assert by_family[0] > 0.8 > 0.3 > by_scan[0]


def test_equal_shares_stay_if_fitted_ones_are_no_better_on_other_families():
    rng = np.random.default_rng(0)
    noise_MN = rng.permuted(np.tile(np.linspace(0.2, 0.9, 25), (4, 1)), axis=1)
    shares_M, losses = choose_weights(noise_MN, np.arange(25), "log_loss")
    assert losses["log_loss"] > losses["equal"]
    np.testing.assert_allclose(shares_M, 0.25)
    few = choose_weights(noise_MN[:, :3], np.arange(3), "log_loss")
    assert few[1]["equal"] is None
    np.testing.assert_allclose(few[0], 0.25)


def review_of(**changes):
    levels = dict.fromkeys(SPACE.names, 0.3)
    known = {
        "min_confidence": 0.6, "target_accuracy": 0.98, "conformal_level": 0.95,
        "conformal_min_probs": levels, "max_missed_tumor_rate": 0.01, "healthy_above": 0.8,
    }  # fmt: skip
    return ReviewInfo(**known | changes)


@pytest.mark.parametrize(
    ("probs", "reason"),
    [
        ([0.9, 0.05, 0.02, 0.03], ""),
        ([0.05, 0.03, 0.9, 0.02], ""),  # no tumour, surely
        ([0.15, 0.03, 0.8, 0.02], "tumor_not_excluded"),
        ([0.4, 0.02, 0.5, 0.08], "tumor_not_excluded"),  # the one that matters most is said
        ([0.62, 0.31, 0.04, 0.03], "several_classes"),
        ([0.55, 0.25, 0.1, 0.1], "low_confidence"),
    ],
)
def test_what_needs_review_and_why(probs, reason):
    decided = decide(np.array([probs]), review_of(), SPACE)
    assert decided.reason_N[0] == reason
    assert decided.sure_N[0] == (reason == "")
    strict = review_of(conformal_min_probs=dict.fromkeys(SPACE.names, 0.95))
    assert not decide(np.array([probs]), strict, SPACE).sure_N[0], "an empty set decides nothing"


def decisions_of(logits_NK, labels_N, family_N):
    probs_NK = softmax(logits_NK, axis=1)
    return decide(probs_NK, fit_review(probs_NK, labels_N, SPACE, family_N), SPACE)


def test_the_cascade_agrees_with_the_ensemble_on_new_families_as_often_as_it_says():
    """At 0.02, over 60 draws of 600 families; each is judged on 3,000 others."""
    found, alone_shares = [], []
    for seed in range(60):
        logits_MNK, labels_N = members_of([0.9, 0.97], 3600, seed)
        fit, new = slice(0, 600), slice(600, None)
        review = [fit_review(softmax(one[fit], axis=1), labels_N[fit], SPACE) for one in logits_MNK]
        alone, whole = (
            [decide(softmax(one[part], axis=1), rule, SPACE) for part in (fit, new)]
            for one, rule in zip(logits_MNK, review, strict=True)
        )
        cascade = fit_cascade(alone[0], whole[0], labels_N[fit], np.arange(600), SPACE, 0.02)
        stands_N = stands(alone[1], cascade.min_confidence, SPACE.names)
        differs_N = (alone[1].label_N != whole[1].label_N) | ~whole[1].sure_N
        found.append((stands_N & differs_N).mean())
        alone_shares.append(stands_N.mean())
    assert np.mean(found) <= 0.02 + 3 * np.std(found) / np.sqrt(60)
    assert np.mean(alone_shares) > 0.3, "else the cascade would save nothing"


def test_the_cascade_misses_no_tumour_that_the_ensemble_finds():
    num = 1000
    labels_N = np.zeros(num, int)
    labels_N[500:] = SPACE.healthy
    sure = np.full(num, "", "<U20")
    sets_NK = np.zeros((num, 4), bool)
    whole = Decisions(labels_N, np.full(num, 0.99), sets_NK, sure)
    said_N, confidence_N = labels_N.copy(), np.linspace(0.9, 0.99, num)
    said_N[10], confidence_N[10] = SPACE.healthy, 0.97  # one glioma is called free, surely
    alone = Decisions(said_N, confidence_N, sets_NK, sure)
    cascade = fit_cascade(alone, whole, labels_N, np.arange(num), SPACE, 0.005)
    assert not stands(alone, cascade.min_confidence, SPACE.names)[10]
    assert cascade.min_confidence["no_tumor"] > 0.97 > cascade.min_confidence["glioma"]
    assert cascade.agreement == 1.0


def test_no_cascade_is_promised_by_few_families_or_by_a_first_member_that_is_never_sure():
    logits_MNK, labels_N = members_of([0.9, 0.97], 300)
    alone, whole = (decisions_of(one, labels_N, np.arange(300)) for one in logits_MNK)
    copies = np.arange(300) // 30
    assert fit_cascade(alone, whole, labels_N, copies, SPACE, 0.005) is None
    never = Decisions(alone.label_N, alone.confidence_N, alone.sets_NK, np.full(300, "x"))
    assert fit_cascade(never, whole, labels_N, np.arange(300), SPACE, 0.1) is None


def bundle_parts(num=3, **options):
    logits_MNK, labels_N = members_of([0.85, 0.93, 0.96][:num], 900)
    members = tuple(
        MemberInfo(
            name=f"m{i}", model=ModelSpec(backbone="cnn_small", weights="none"),
            preprocess=PreprocessSpec(), golden_digest="", weight=1 / num, temperature=1.0,
        )
        for i in range(num)
    )  # fmt: skip
    scans = Validation(logits_MNK, labels_N, np.arange(900))
    return calibrate(members, scans, SPACE, Options(**options)), scans


def test_every_subset_of_the_quorum_has_its_own_calibration():
    info, scans = bundle_parts()
    assert info.least_members == 2
    pairs = {("m0", "m1"), ("m0", "m2"), ("m1", "m2")}
    assert {s.members for s in info.subsets} == pairs | {("m0",)}, "the first for the cascade"
    whole, pair = calibration_of(info, ["m0", "m1", "m2"]), calibration_of(info, ["m1", "m2"])
    assert pair.weights == (0.5, 0.5)
    assert pair.temperature != whole.temperature
    probs_NK = pair.probs(scans.logits_MNK[1:])
    refitted = fit_temperature(np.log(probs_NK), scans.labels_N)
    assert refitted == pytest.approx(1, abs=0.01), "it is calibrated already"
    with pytest.raises(BundleError, match="not calibrated for m1 alone"):
        calibration_of(info, ["m1"])


def test_the_quorum_and_the_number_of_members_are_bounded():
    assert bundle_parts(quorum=3)[0].least_members == 3
    assert {s.members for s in bundle_parts(quorum=3)[0].subsets} == {("m0",)}
    assert bundle_parts(1)[0].cascade is None
    with pytest.raises(UsageError, match="quorum of 4"):
        bundle_parts(quorum=4)
