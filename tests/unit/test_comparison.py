"""Models side by side, and requirements on their figures."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from bt_core.errors import UsageError
from bt_core.evaluation.comparison import compare, permutation_p_value
from bt_core.evaluation.predictions import Scans
from bt_core.evaluation.requirements import Requirement
from bt_core.labels import LABEL_SPACES

SPACE = LABEL_SPACES["four_class"]


def answers(labels, right, family, clean=None):
    """Scans whose answer is the true class where `right`, else the next one."""
    said = np.where(right, labels, (labels + 1) % 4)
    probs = np.full((len(labels), 4), 0.1)
    probs[np.arange(len(labels)), said] = 0.7
    return Scans(
        scan_id=np.array([f"{i:05}" for i in range(len(labels))]),
        labels_N=labels,
        probs_NK=probs,
        family_N=np.unique(family, return_inverse=True)[1],
        scored_N=np.ones(len(labels), dtype=bool),
        clean_N=np.ones(len(labels), dtype=bool) if clean is None else clean,
        sets_NK=probs > 0.5,
        logits_NMK=np.log(probs)[:, None],
        slices={},
    )


def two_models(generator, num_families=60, first=0.9, second=0.9, size=4):
    """Models that are right or wrong on whole families."""
    family = np.repeat(np.arange(num_families), size)
    labels = generator.integers(4, size=num_families)[family]
    rights = [(generator.random(num_families) < p)[family] for p in (first, second)]
    return [answers(labels, right, family) for right in rights]


def test_with_single_scans_it_is_mcnemars_exact_test():
    generator = np.random.default_rng(0)
    one, other = two_models(generator, num_families=200, first=0.9, second=0.8, size=1)
    only_one, only_other = (
        (one.right_N & ~other.right_N).sum(),
        (other.right_N & ~one.right_N).sum(),
    )
    expected = binomtest(int(only_one), int(only_one + only_other)).pvalue
    assert permutation_p_value(one, other) == pytest.approx(expected, abs=0.01)
    assert permutation_p_value(one, one) == 1.0


def test_equal_models_are_called_different_no_more_often_than_said_though_errors_go_by_family():
    generator = np.random.default_rng(1)
    pairs = [two_models(generator, num_families=40) for _ in range(80)]
    called = sum(permutation_p_value(one, other) < 0.05 for one, other in pairs)
    assert called <= 10, "of 80, 4 expected; 3 sigma are 6"


@pytest.mark.parametrize("metric", ["val_accuracy", "val_macro_f1"])
def test_a_worse_model_is_told_apart(metric):
    one, other = two_models(np.random.default_rng(2), 150, first=0.97, second=0.8)
    assert permutation_p_value(one, other, metric) < 0.01


def test_ties_and_ranks_and_differences():
    generator = np.random.default_rng(3)
    best, twin = two_models(generator, 150, first=0.95, second=0.95)
    worse = answers(best.labels_N, best.right_N & (best.family_N % 4 > 0), best.family_N)
    found = compare({"best": best, "twin": twin, "worse": worse}, SPACE)
    assert [found["models"][name]["tied"] for name in ("best", "twin", "worse")] == [
        True, True, False
    ]  # fmt: skip
    assert [found["models"][name]["rank"] for name in ("best", "twin", "worse")] == [1, 1, 3]
    pair = next(one for one in found["pairs"] if one["models"] == ["best", "worse"])
    gain = pair["difference"]["accuracy"]
    assert gain["value"] == pytest.approx(best.right_N.mean() - worse.right_N.mean())
    assert 0 < gain["low"] < gain["value"] < gain["high"]
    assert (found["num_scans"], found["num_families"]) == (600, 150)


def test_few_families_and_models_that_never_differ_have_no_interval():
    one, other = two_models(np.random.default_rng(5), num_families=4, first=1.0, second=0.5)
    few = compare({"one": one, "other": other}, SPACE)["pairs"][0]
    assert few["difference"]["accuracy"]["low"] is None
    many, _ = two_models(np.random.default_rng(6), num_families=50)
    surer = replace(many, probs_NK=many.probs_NK**2 / (many.probs_NK**2).sum(1, keepdims=True))
    alike = compare({"one": many, "other": surer}, SPACE)["pairs"][0]
    assert alike["difference"]["accuracy"] == {"value": 0.0, "low": None, "high": None}


def test_a_model_does_not_differ_from_itself():
    many, _ = two_models(np.random.default_rng(6), num_families=50)
    same = compare({"one": many, "other": many}, SPACE)["pairs"][0]
    assert same["difference"]["accuracy"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert Requirement.parse("low>=-0.01").check(same["difference"]["accuracy"])[0]
    assert same["p_value"] == 1.0


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("clean.macrof1", "did you mean clean.macro_f1"),
        ("clean.by_family.acuracy.low", "clean.accuracy"),
        ("all.gliom.recall", "all.glioma.recall"),
    ],
)
def test_a_figure_that_no_evaluation_has_is_refused_before_one(key, advice):
    with pytest.raises(UsageError, match=advice):
        Requirement.parse(f"{key}>=0.9").refuse_unknown(SPACE.names, SPACE.healthy)


@pytest.mark.parametrize(
    "key",
    [
        "clean.macro_f1",
        "all.by_family.glioma.recall.low",
        "clean.glioma.ppv_at_prevalence",
        "clean.calibration.ece.value",
        "clean.deferral.accuracy_at.0.8",
        "robustness.anything",
    ],
)
def test_figures_of_an_evaluation_are_not_refused_before_one(key):
    Requirement.parse(f"{key}>=0.9").refuse_unknown(SPACE.names, SPACE.healthy)


def test_only_scans_that_no_model_was_trained_on_are_compared():
    generator = np.random.default_rng(4)
    one, other = two_models(generator, 30)
    half = one.family_N < 15
    seen = answers(other.labels_N, other.right_N, other.family_N, clean=half)
    found = compare({"one": one, "other": seen}, SPACE)
    assert (found["num_scans"], found["num_families"]) == (60, 15)
    none = answers(other.labels_N, other.right_N, other.family_N, clean=half & False)
    with pytest.raises(UsageError, match="no test scan in common"):
        compare({"one": one, "other": none}, SPACE)
    relabelled = answers((one.labels_N + 1) % 4, one.right_N, one.family_N)
    with pytest.raises(UsageError, match="other labels or families"):
        compare({"one": one, "other": relabelled}, SPACE)


FIGURES = {
    "clean": {
        "by_scan": {
            "macro_f1": {"value": 0.96, "low": 0.94, "high": 0.97},
            "glioma.auc": {"value": None, "low": None, "high": None},
        },
        "by_family": {"macro_f1": {"value": 0.95, "low": 0.93, "high": 0.96}},
    },
    "calibration": {"ece": 0.02, "bins": [{"low": 0.0}]},
    "classes": ["glioma"],
}


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("clean.macro_f1>=0.95", True),
        ("clean.macro_f1 > 0.96", False),
        ("clean.by_scan.macro_f1.value<=0.96", True),
        ("clean.macro_f1.low>=0.95", False),
        ("clean.by_family.macro_f1>=0.95", True),
        ("calibration.ece<5e-2", True),
        ("clean.glioma.auc>=0.1", False),
    ],
)
def test_a_requirement_is_met_or_not(text, met):
    found, line = Requirement.parse(text).check(FIGURES)
    assert found is met
    assert line.endswith(", met" if met else "NOT MET")


@pytest.mark.parametrize("text", ["clean.macro_f1", "clean.macro_f1=0.9", ">=1", "a>=b", "a>=1e"])
def test_a_requirement_of_another_form_is_answered_with_the_form(text):
    with pytest.raises(UsageError, match=r"write KEY>=NUMBER"):
        Requirement.parse(text)


def test_an_unknown_figure_is_answered_with_those_that_are_alike():
    with pytest.raises(UsageError, match=r"did you mean clean\.macro_f1"):
        Requirement.parse("clean.macro_fl>=0.9").check(FIGURES)
    with pytest.raises(UsageError, match=r"metrics.json lists them all"):
        Requirement.parse("zzz>=0.9").check(FIGURES)
