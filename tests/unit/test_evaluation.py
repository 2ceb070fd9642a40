"""What a report is made of: the join with the truth, calibration, deferral, benefit, slices."""

import numpy as np
import pyarrow as pa
import pytest
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from bt_core.errors import RunError
from bt_core.evaluation.benefit import THRESHOLDS, decision_curve
from bt_core.evaluation.deferral import risk_coverage, rule_out, set_figures
from bt_core.evaluation.intervals import estimate, share_of
from bt_core.evaluation.predictions import SLICE_COLUMNS, Scans, join_truth
from bt_core.evaluation.reliability import (
    calibration_figures,
)
from bt_core.evaluation.report import evaluate
from bt_core.evaluation.slices import slice_figures
from bt_core.labels import LABEL_SPACES
from bt_core.models.bundle import BundleInfo, CascadeInfo, MemberInfo, ReviewInfo, SubsetInfo
from bt_core.models.spec import ModelSpec
from bt_core.scans.preprocess import PreprocessSpec

SPACE = LABEL_SPACES["four_class"]
REVIEW = ReviewInfo(
    min_confidence=0.5,
    target_accuracy=0.98,
    conformal_level=0.95,
    conformal_min_probs=dict.fromkeys(SPACE.names, 0.1),
    max_missed_tumor_rate=0.01,
    healthy_above=0.8,
)
MEMBER = MemberInfo(
    name="a",
    model=ModelSpec(backbone="cnn_small"),
    preprocess=PreprocessSpec(),
    golden_digest="",
    weight=1.0,
    temperature=2.0,
)
BUNDLE = BundleInfo(
    label_space=SPACE, members=(MEMBER,), temperature=1.0, review=REVIEW, metrics={}, provenance={}
)


def tables(num=120, seed=0, bonus=1.0, **changed):
    """Score rows in one order and catalog rows in another; families of two scans each."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(4, size=num)
    probs = generator.dirichlet(np.ones(4), size=num)
    probs[np.arange(num), labels] += bonus
    probs /= probs.sum(1, keepdims=True)
    ids = [f"{i:04}" for i in range(num)]
    scores = pa.table(
        {
            "scan_id": ids,
            "status": ["scored"] * num,
            "reason": [""] * num,
            "seen_in_training": [False] * num,
            "logits": [[row] for row in np.log(probs).tolist()],
            "prediction_set": [[SPACE.names[row.argmax()]] for row in probs],
            **{f"prob_{name}": probs[:, k] for k, name in enumerate(SPACE.names)},
        }
    )
    truth = pa.table(
        {
            "scan_id": ids,
            "label": [SPACE.names[k] for k in labels],
            "group": [f"g{i // 2}" for i in range(num)],
            "copy_in_training": [False] * num,
            **{name: ["same"] * num for name in SLICE_COLUMNS},
            "width": generator.integers(100, 500, size=num),
            **changed,
        }
    )
    return scores.take(generator.permutation(num)), truth.take(generator.permutation(num))


def test_predictions_meet_the_truth_by_id_whatever_the_order():
    scores, truth = tables()
    joined = join_truth(scores, truth)
    own = dict(zip(truth["scan_id"].to_pylist(), truth["label"].to_pylist(), strict=True))
    assert all(own[row["scan_id"]] == row["label"] for row in joined.to_pylist())
    assert joined.equals(join_truth(scores.take(np.arange(120)[::-1]), truth))
    for wrong in (scores.slice(1), pa.concat_tables([scores.slice(1), scores.slice(5, 1)])):
        with pytest.raises(RunError, match="do not match"):
            join_truth(wrong, truth)


def test_figures_stand_under_clean_and_under_all_and_clean_leaves_whole_copies_out():
    copied = [i % 8 == 0 for i in range(120)]  # and with each of them the other of its family
    scores, truth = tables(copy_in_training=copied)
    found = evaluate(join_truth(scores, truth), BUNDLE)
    assert (found["all"]["num_scans"], found["clean"]["num_scans"]) == (120, 90)
    assert found["num_seen_in_training"] == 30
    assert found["clean"]["by_scan"].keys() == found["all"]["by_scan"].keys()
    assert found["clean"]["by_scan"].keys() == found["clean"]["by_family"].keys()
    scores = scores.set_column(2, "reason", pa.array(["too_small"] * 120))
    scores = scores.set_column(1, "status", pa.array(["rejected"] * 119 + ["deferred"]))
    part = evaluate(join_truth(scores, truth), BUNDLE)
    assert part["flow"]["by_status"] == {
        "deferred: too_small": 1, "rejected: too_small": 119
    }  # fmt: skip
    assert part["all"]["num_scans"] == 1
    assert part["answered"] is None


def test_a_bundle_that_was_trained_on_every_scan_has_no_clean_figures():
    scores, truth = tables(copy_in_training=[True] * 120)
    found = evaluate(join_truth(scores, truth), BUNDLE)
    assert found["clean"] is None
    assert found["slices"] is None
    assert found["all"]["calibration"]["ece"]["value"] > 0


def test_bins_and_expected_calibration_errors_are_of_scikit_learns_bins():
    generator = np.random.default_rng(1)
    num_scans = 399  # so that no scan lies on an edge
    probs = generator.dirichlet(np.ones(3), size=num_scans)
    labels = generator.integers(3, size=num_scans)
    confidence, right = probs.max(1), probs.argmax(1) == labels
    found = calibration_figures(labels, probs, np.arange(num_scans), 0)
    shares = np.linspace(0, 1, 16)
    for name, strategy, edges in (
        ("ece", "uniform", shares),
        ("ece_equal_mass", "quantile", np.quantile(confidence, shares)),
    ):
        true, said = calibration_curve(right, confidence, n_bins=15, strategy=strategy)
        num = np.histogram(confidence, edges)[0]
        error = np.average(np.abs(true - said), weights=num[num > 0])
        assert found[name]["value"] == pytest.approx(error)
        if strategy == "uniform":
            assert [b["accuracy"] for b in found["bins"]] == pytest.approx(true)
            assert [b["confidence"] for b in found["bins"]] == pytest.approx(said)
            assert [b["num"] for b in found["bins"]] == num[num > 0].tolist()


def test_equal_confidences_are_one_bin():
    probs, labels = np.tile([0.7, 0.2, 0.1], (60, 1)), np.repeat([0, 1], 30)
    found = calibration_figures(labels, probs, np.arange(60), 0)
    assert found["ece"]["value"] == pytest.approx(0.2)
    assert found["ece_equal_mass"]["value"] == pytest.approx(0.2)
    assert [b["num"] for b in found["bins"]] == [60]


def test_calibration_tells_a_boaster_from_an_honest_one():
    generator = np.random.default_rng(2)
    probs = generator.dirichlet(np.ones(4), size=5000)
    labels = (generator.random((5000, 1)) > probs.cumsum(1)).sum(1)
    families = np.arange(5000) // 2
    honest = calibration_figures(labels, probs, families, 3)
    boast = probs**4 / (probs**4).sum(1, keepdims=True)
    boaster = calibration_figures(labels, boast, families, 3)
    for name in ("ece", "ece_equal_mass", "class_wise_ece"):
        assert honest[name]["value"] < 0.03 < 0.1 < boaster[name]["low"]
        assert honest[name]["low"] == 0.0, "no error is within the interval of an honest one"
    assert honest["slope"]["low"] < 1 < honest["slope"]["high"]
    assert honest["intercept"]["low"] < 0 < honest["intercept"]["high"]
    assert boaster["slope"]["high"] < 0.5
    nothing = np.zeros(9, dtype=int)
    one_answer = calibration_figures(nothing, np.eye(4)[nothing], np.arange(9), 3)
    assert one_answer["ece"]["value"] == one_answer["ece_equal_mass"]["value"] == 0.0
    assert one_answer["slope"]["value"] is None


def test_slope_and_intercept_are_those_of_a_logistic_regression():
    generator = np.random.default_rng(3)
    said = generator.uniform(0.02, 0.98, 800)
    tumour = generator.random(800) < 1 / (1 + np.exp(-0.6 * np.log(said / (1 - said)) - 0.3))
    probs = np.stack([said, 1 - said], axis=1)
    found = calibration_figures(np.where(tumour, 0, 1), probs, np.arange(800), 1)
    log_odds = np.log(said / (1 - said))[:, None]
    plain = LogisticRegression(C=np.inf, tol=1e-10).fit(log_odds, tumour)
    assert found["slope"]["value"] == pytest.approx(plain.coef_[0, 0], rel=1e-4)
    assert found["slope"]["low"] < found["slope"]["value"] < found["slope"]["high"] < 1
    # With the slope held at 1, what is said and the intercept give as many tumours as there are.
    moved = 1 / (1 + np.exp(-log_odds[:, 0] - found["intercept"]["value"]))
    assert moved.sum() == pytest.approx(tumour.sum())


def test_one_who_is_far_too_sure_still_has_an_intercept():
    generator = np.random.default_rng(0)
    tumour = generator.random(400) < 0.5
    told = np.where(generator.random(400) < 0.97, tumour, ~tumour)
    said = 1 / (1 + np.exp(-generator.uniform(10, 13, 400) * np.where(told, 1, -1)))
    probs = np.stack([said, 1 - said], axis=1)
    found = calibration_figures(np.where(tumour, 0, 1), probs, np.arange(400), 1)
    assert found["slope"]["high"] < 0.5
    assert found["intercept"]["value"] is not None


@pytest.mark.parametrize("gap", [0.01, 0.03])
def test_intervals_of_calibration_hold_where_all_answers_are_sure(gap):
    generator = np.random.default_rng(6)
    held = 0
    for _ in range(100):
        sure = generator.uniform(0.95, 1.0, 400)
        right = generator.random(400) < sure - gap
        probs = np.stack([sure, 1 - sure], axis=1)
        found = calibration_figures(np.where(right, 0, 1), probs, np.arange(400), 1)
        held += found["ece"]["low"] - 1e-9 <= gap <= found["ece"]["high"]
    assert held >= 88


@pytest.mark.parametrize("power", [1.0, 1.6], ids=["calibrated", "too sure"])
def test_intervals_of_calibration_hold_the_true_errors_by_simulation(power):
    """500 scans in families of one to four that are right or wrong together."""
    generator = np.random.default_rng(4)
    held = {"ece": 0, "slope": 0}
    num_trials = 120
    for _ in range(num_trials):
        family = np.repeat(np.arange(200), generator.integers(1, 5, 200))
        true = generator.beta(4, 1, 200) * generator.choice([-1, 1], 200) / 2 + 0.5
        came_true = generator.random(200) < true
        odds = (true / (1 - true)) ** power
        said = (odds / (1 + odds))[family]
        probs = np.stack([said, 1 - said], axis=1)
        found = calibration_figures(np.where(came_true[family], 0, 1), probs, family, 1)
        held["slope"] += found["slope"]["low"] <= 1 / power <= found["slope"]["high"]
        sure = np.maximum(said, 1 - said)
        right = np.where(said > 0.5, true[family], 1 - true[family])
        bins = np.minimum((sure * 15).astype(int), 14)
        error = sum(abs((right - sure)[bins == b].sum()) for b in set(bins)) / len(said)
        held["ece"] += found["ece"]["low"] - 1e-9 <= error <= found["ece"]["high"]
    for name, num in held.items():
        assert num >= 0.9 * num_trials, f"{name}: {num / num_trials}"


def test_scans_without_an_answer_count_as_wrong_in_the_worst_case():
    scores, truth = tables(num=100, bonus=50.0)
    status = ["scored" if i >= "0010" else "rejected" for i in scores["scan_id"].to_pylist()]
    scores = scores.set_column(1, "status", pa.array(status))
    found = evaluate(join_truth(scores, truth), BUNDLE)
    worst = found["flow"]["worst_case"]
    assert worst["num_unanswered"] == 10
    assert found["clean"]["by_scan"]["accuracy"]["value"] == 1.0
    assert worst["accuracy"] == 0.9
    kinds = dict(zip(truth["scan_id"].to_pylist(), truth["label"].to_pylist(), strict=True))
    tumours = [i for i, kind in kinds.items() if kind != "no_tumor"]
    expected = sum(i < "0010" for i in tumours) / len(tumours)
    assert worst["missed_tumor_rate"] == pytest.approx(expected)


def test_the_worst_case_leaves_out_families_that_were_trained_on():
    seen = [i == 1 for i in range(100)]
    scores, truth = tables(num=100, bonus=50.0)
    scores = scores.sort_by("scan_id").set_column(3, "seen_in_training", pa.array(seen))
    scores = scores.set_column(1, "status", pa.array(["failed"] + ["scored"] * 99))
    found = evaluate(join_truth(scores, truth), BUNDLE)
    assert found["clean"]["num_scans"] == 98
    assert found["flow"]["worst_case"]["num_unanswered"] == 0


def test_calibration_before_any_temperature_and_members_against_their_ensemble():
    scores, truth = tables(num=200, bonus=0.3)
    joined = join_truth(scores, truth)
    found = evaluate(joined, BUNDLE)
    assert found["members"] is None
    for name in ("ece", "ece_equal_mass", "class_wise_ece"):  # the logits are those answered
        assert found["clean"]["calibration_before"][name]["value"] == pytest.approx(
            found["clean"]["calibration"][name]["value"]
        )
    good = np.array(joined["logits"].to_pylist())[:, 0]
    bad = np.roll(good, 1, axis=1)
    both = np.stack([good, bad], axis=1).tolist()
    place = joined.schema.get_field_index("logits")
    joined = joined.set_column(place, "logits", pa.array(both))
    halves = tuple(MEMBER.model_copy(update={"name": n, "weight": 0.5}) for n in ("good", "bad"))
    found = evaluate(joined, BUNDLE.model_copy(update={"members": halves}))
    models = found["members"]["models"]
    assert list(models) == ["ensemble", "good", "bad"]
    assert models["good"]["accuracy"]["value"] == models["ensemble"]["accuracy"]["value"]
    assert models["bad"]["rank"] == 3
    assert found["clean"]["calibration_before"]["ece"] != found["clean"]["calibration"]["ece"]


def test_the_surest_scans_are_answered_first_and_ties_together():
    confidence = np.array([0.9, 0.8, 0.8, 0.6, 0.5])
    right = np.array([True, True, False, True, False])
    found = risk_coverage(confidence, right)
    assert found["coverage"] == pytest.approx([0.2, 0.6, 0.8, 1.0])
    assert found["risk"] == pytest.approx([0, 1 / 3, 1 / 4, 2 / 5])
    assert found["area"] == pytest.approx(0.4 / 3 + 0.2 / 4 + 0.2 * 2 / 5)
    assert found["accuracy_at"] == pytest.approx({"0.8": 3 / 4, "0.9": 0.6, "0.95": 0.6, "1": 0.6})


def test_prediction_sets_are_counted_over_all_scans_and_each_class():
    labels = np.array([0, 0, 1])
    sets = np.array([[True, False, False], [False, True, True], [True, True, True]])
    found = set_figures(labels, sets, np.array([0, 1, 1]), ("a", "b", "c"))
    assert (found["mean_size"], found["single"]) == pytest.approx((2, 1 / 3))
    assert found["coverage"]["by_scan"]["value"] == pytest.approx(2 / 3)
    assert found["coverage"]["by_family"]["value"] == pytest.approx(3 / 4)
    first, last = found["per_class"]["a"], found["per_class"]["c"]
    assert (first["num"], first["coverage"]["by_scan"]["value"]) == (2, 0.5)
    assert (last["num"], last["coverage"]["by_scan"]["value"], last["mean_size"]) == (0, None, None)


def test_ruling_out_counts_scans_and_families():
    ill = np.array([True, True, True, False, False])
    found = rule_out(ill, np.array([0.9, 0.1, 0.2, 0.95, 0.5]), np.array([0, 1, 1, 2, 2]), 0.8)
    assert found["missed"]["by_scan"]["value"] == pytest.approx(1 / 3)
    assert found["missed"]["by_family"]["value"] == pytest.approx(1 / 2)
    assert found["cleared"]["by_scan"]["value"] == pytest.approx(1 / 2)
    none = rule_out(ill[:3], np.ones(3), np.arange(3), 1.0)
    assert none["missed"]["by_scan"]["value"] == 0.0
    assert none["cleared"]["by_scan"]["value"] is None


def test_a_share_has_the_interval_of_the_figure_that_is_the_same_share():
    generator = np.random.default_rng(0)
    labels, family = generator.integers(4, size=300), np.arange(300) // 3
    probs = generator.dirichlet(np.ones(4), size=300)
    figures = estimate(labels, probs, family, SPACE.names, SPACE.healthy)
    found = share_of(probs.argmax(1) == labels, family + 7)
    for unit in ("by_scan", "by_family"):
        assert found[unit] == pytest.approx(figures[unit]["accuracy"].model_dump())


def test_net_benefit_is_that_of_the_formula():
    positive = np.array([True, True, False, False, False])
    score = np.array([0.9, 0.4, 0.6, 0.2, 0.1])
    found = decision_curve(positive, score, np.arange(5), num_draws=50)
    at = int(np.flatnonzero(THRESHOLDS == 0.5)[0])
    assert found["model"][at] == pytest.approx((1 - 1) / 5)
    assert found["treat_all"][at] == pytest.approx(2 / 5 - 3 / 5)
    low = int(np.flatnonzero(THRESHOLDS == 0.3)[0])
    assert found["model"][low] == pytest.approx((2 - 1 * 0.3 / 0.7) / 5)
    assert all(a <= b for a, b in zip(found["low"], found["high"], strict=True))
    rare = decision_curve(positive, score, np.arange(5), prevalence=0.1, num_draws=50)
    assert rare["model"][low] == pytest.approx(0.1 - 0.9 / 3 * 0.3 / 0.7)
    assert rare["treat_all"][at] == pytest.approx(0.1 - 0.9)


def test_the_worst_slice_is_named():
    scores, truth = tables(num=200, given_split=["bad" if i < 60 else "good" for i in range(200)])
    joined = join_truth(scores, truth)
    labels = joined["label"].to_pylist()
    bad = np.array(joined["given_split"].to_pylist()) == "bad"
    wrong = bad & (np.arange(200) % 4 < 2)
    for name in SPACE.names:  # every other answer of the bad slice is the next class
        said_next = [SPACE.names[(SPACE.index(label) + 1) % 4] == name for label in labels]
        values = np.where(wrong, said_next, joined[f"prob_{name}"].to_numpy())
        place = joined.schema.get_field_index(f"prob_{name}")
        joined = joined.set_column(place, f"prob_{name}", pa.array(values))
    found = evaluate(joined, BUNDLE)["slices"]
    assert {one["column"] for one in found["slices"]} == {"given_split", "width"}
    assert (found["worst"]["column"], found["worst"]["value"]) == ("given_split", "bad")
    assert found["worst"]["below_others"]
    widths = [one for one in found["slices"] if one["column"] == "width"]
    assert sum(one["num_scans"] for one in widths) == 200
    assert len(widths) == 4


@pytest.mark.parametrize("shares", [[0.2] * 5, [0.9, 0.1]], ids=["equal", "one small"])
def test_slices_by_chance_are_seldom_called_worse(shares):
    called = 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        chosen = generator.choice(len(shares), size=150, p=shares)
        site = [f"site {k}" for k in chosen for _ in range(2)]
        scores, truth = tables(num=300, seed=seed, bonus=1.5, site=site)
        found = slice_figures(Scans.of(join_truth(scores, truth), SPACE), SPACE)
        assert {one["column"] for one in found["slices"]} == {"site", "width"}
        called += found["worst"]["below_others"]
    assert called <= 6, "0.05 of 40 and its chance"


def test_a_part_of_the_scans_numbers_its_families_anew():
    scores, truth = tables()
    scans = Scans.of(join_truth(scores, truth), SPACE)
    part = scans.where(np.arange(120) >= 100)
    assert sorted(set(part.family_N)) == list(range(10))
    assert len(part) == 20
    assert (part.slices["width"] == scans.slices["width"][100:]).all()


def test_at_a_stated_prevalence_nothing_lies_beyond_what_it_allows():
    scores, truth = tables(num=160, bonus=0.6)
    shares = {"glioma": 0.02, "meningioma": 0.02, "no_tumor": 0.94, "pituitary": 0.02}
    clean = evaluate(join_truth(scores, truth), BUNDLE, shares)["clean"]
    for curve in clean["decision_curves"].values():
        assert max(curve["high"]) <= curve["prevalence"] + 1e-12
        assert max(curve["model"]) <= curve["prevalence"] + 1e-12
    for name in ("glioma", "meningioma", "pituitary"):
        one = clean["by_scan"][f"{name}.ppv_at_prevalence"]
        assert 0 < one["low"] < one["value"] < one["high"] < 1


def test_the_cascade_is_judged_from_the_logits_against_the_ensemble():
    """Four scans: the first member answers two alone, of which one is a tumour it calls free."""
    healthy, glioma = SPACE.healthy, SPACE.index("glioma")
    first = np.zeros((4, 4))
    said, sure = [glioma, healthy, healthy, glioma], [0.97, 0.97, 0.5, 0.5]
    for i, (label, p) in enumerate(zip(said, sure, strict=True)):
        first[i] = (1 - p) / 3
        first[i, label] = p
    scores, truth = tables(4)
    scores, truth = scores.sort_by("scan_id"), truth.sort_by("scan_id")
    whole = np.full((4, 4), 0.02)
    whole[np.arange(4), [glioma, glioma, healthy, glioma]] = 0.94
    logits = np.log(np.stack([first, whole], 1)).tolist()
    columns = {
        "status": ["scored"] * 4,
        "reason": [""] * 4,
        "logits": logits,
        **{f"prob_{name}": whole[:, k] for k, name in enumerate(SPACE.names)},
    }
    for name, values in columns.items():
        scores = scores.set_column(scores.schema.get_field_index(name), name, pa.array(values))
    labels = ["glioma", "glioma", "no_tumor", "glioma"]
    truth = truth.set_column(truth.schema.get_field_index("label"), "label", pa.array(labels))
    review = REVIEW.model_copy(update={"healthy_above": 0.6, "min_confidence": 0.4})
    cascade = CascadeInfo(
        min_confidence=dict.fromkeys(SPACE.names, 0.9), max_disagreement=0.005, agreement=1.0,
        agreement_by_family=1.0, answered_alone=0.5, num_scans=4, num_families=4,
    )  # fmt: skip
    sharp = MEMBER.model_copy(update={"temperature": 1.0, "weight": 0.5})
    bundle = BUNDLE.model_copy(
        update={
            "members": (sharp, sharp.model_copy(update={"name": "b"})),
            "subsets": (SubsetInfo(members=("a",), temperature=1.0, review=review),),
            "cascade": cascade,
        }
    )
    found = evaluate(join_truth(scores, truth), bundle)["cascade"]
    assert found == {
        "answered_alone": 0.5, "agreement": 0.75, "missed": 1, "missed_by_ensemble": 0
    }  # fmt: skip
    assert evaluate(join_truth(scores, truth), BUNDLE)["cascade"] is None
