"""Figures equal scikit-learn's on random tables; intervals hold what they promise."""

import numpy as np
import pytest
from sklearn import metrics as sk

from bt_core.evaluation.intervals import estimate, family_codes
from bt_core.evaluation.metrics import confusion_matrix, figures_of

NAMES = ("glioma", "meningioma", "no_tumor", "pituitary")


def random_table(seed):
    """Labels, probabilities and weights: coarse scores that tie, and classes that are absent."""
    generator = np.random.default_rng(seed)
    num_scans, num_classes = int(generator.integers(2, 60)), int(generator.choice([2, 4]))
    present = generator.choice(num_classes, size=generator.integers(1, num_classes + 1))
    labels = generator.choice(present, size=num_scans)
    levels = generator.choice([2, 5, 1000])
    raw = generator.integers(0, levels, size=(num_scans, num_classes)) + 1e-3
    raw[np.arange(num_scans), labels] += generator.choice([0, levels])
    probs = raw / raw.sum(1, keepdims=True)
    weights = generator.choice([0.5, 1.0, 2.0, 3.0], size=num_scans)
    return labels, probs, weights


def expected_figures(labels, probs, weights):
    """The same by scikit-learn, for what it defines."""
    num_classes = probs.shape[1]
    names, classes = NAMES[:num_classes], np.arange(num_classes)
    said = probs.argmax(1)
    shared = {"sample_weight": weights}
    found = {
        "accuracy": sk.accuracy_score(labels, said, **shared),
        "mcc": sk.matthews_corrcoef(labels, said, **shared),
        "log_loss": sk.log_loss(labels, probs, labels=classes, **shared),
        "kappa": sk.cohen_kappa_score(labels, said, labels=classes, **shared),
        "brier": sk.brier_score_loss(labels, probs, labels=classes, **shared)
        if num_classes > 2
        else sk.brier_score_loss(labels, probs[:, 1], pos_label=1, labels=classes, **shared),
    }
    if num_classes > 2:
        found["top2_accuracy"] = sk.top_k_accuracy_score(
            labels, probs, k=2, labels=classes, **shared
        )
    present = np.unique(labels)
    for average in ("macro", "weighted", None):
        chosen = classes if average is None else present
        *values, _ = sk.precision_recall_fscore_support(
            labels, said, average=average, labels=chosen, zero_division=0.0, **shared
        )
        for kind, value in zip(("precision", "recall", "f1"), values, strict=True):
            if average is None:
                there = {k for k in classes if k in present or (kind != "recall" and k in said)}
                found |= {f"{names[k]}.{kind}": value[k] if k in there else np.nan for k in classes}
            else:
                found[f"{average}_{kind}"] = value
    found["balanced_accuracy"] = found["macro_recall"]
    rankings = {"auc": [], "average_precision": []}
    for k, name in enumerate(names):
        own, others = labels == k, labels != k
        rest = {"zero_division": np.nan, "sample_weight": weights, "pos_label": False}
        found[f"{name}.specificity"] = sk.recall_score(own, said == k, **rest)
        found[f"{name}.npv"] = sk.precision_score(own, said == k, **rest)
        if own.any() and others.any():
            found[f"{name}.auc"] = sk.roc_auc_score(own, probs[:, k], **shared)
            rankings["auc"].append(found[f"{name}.auc"])
        if own.any():
            found[f"{name}.average_precision"] = sk.average_precision_score(
                own, probs[:, k], **shared
            )
            rankings["average_precision"].append(found[f"{name}.average_precision"])
    found |= {f"macro_{kind}": np.mean(own) if own else np.nan for kind, own in rankings.items()}
    for kind in ("specificity", "npv"):
        own = [found[f"{names[k]}.{kind}"] for k in present]
        found[f"macro_{kind}"] = np.nanmean(own) if not np.isnan(own).all() else np.nan
    healthy, ill = labels == 2 % num_classes, said != 2 % num_classes
    rates = {"zero_division": np.nan}
    found["missed_tumor_rate"] = 1 - sk.recall_score(~healthy, ill, sample_weight=weights, **rates)
    found["false_alarm_rate"] = 1 - sk.recall_score(healthy, ~ill, sample_weight=weights, **rates)
    return found


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.filterwarnings("ignore:y_pred contains classes")
@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("seed", range(60))
def test_every_figure_is_scikit_learns(seed):
    labels, probs, weights = random_table(seed)
    names = NAMES[: probs.shape[1]]
    weights_ND = np.stack([np.ones_like(weights), weights], axis=1)
    found = figures_of(labels, probs, weights_ND, names, 2 % len(names))
    for column, own in enumerate(weights_ND.T):
        for name, value in expected_figures(labels, probs, own).items():
            assert found[name][column] == pytest.approx(value, nan_ok=True), name


def test_figures_by_hand():
    labels = np.array([0, 0, 1, 1, 1, 2])
    probs = np.array(
        [[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.1, 0.6, 0.3], [0.6, 0.3, 0.1],
         [0.1, 0.2, 0.7]]
    )  # fmt: skip
    found = figures_of(labels, probs, np.ones((6, 1)), ("a", "b", "c"), healthy=2)
    expected = {
        "accuracy": 4 / 6,
        "b.precision": 2 / 3,
        "b.recall": 2 / 3,
        "a.auc": 7 / 8,
        "balanced_accuracy": (1 / 2 + 2 / 3 + 1) / 3,
        "log_loss": -np.log([0.8, 0.2, 0.8, 0.6, 0.3, 0.7]).mean(),
        "missed_tumor_rate": 0.0,
        "false_alarm_rate": 0.0,
    }
    assert {name: found[name][0] for name in expected} == pytest.approx(expected)


def test_predictive_values_at_a_prevalence_are_those_of_a_set_with_that_prevalence():
    generator = np.random.default_rng(0)
    labels, probs = generator.integers(4, size=300), generator.dirichlet(np.ones(4), size=300)
    wanted = np.array([0.02, 0.03, 0.9, 0.05])
    weights = (wanted / np.bincount(labels))[labels]
    there = figures_of(labels, probs, weights[:, None], NAMES, 2)
    found = figures_of(labels, probs, np.ones((300, 1)), NAMES, 2, prevalence_K=wanted)
    for name in NAMES:
        assert found[f"{name}.ppv_at_prevalence"] == pytest.approx(there[f"{name}.precision"])
        assert found[f"{name}.npv_at_prevalence"] == pytest.approx(there[f"{name}.npv"])


def test_the_confusion_matrix_counts_true_classes_in_rows():
    probs = np.eye(3)[[0, 1, 1, 2]]
    found = confusion_matrix(np.array([0, 0, 1, 2]), probs)
    assert found.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


def clustered_scans(generator, num_families, signal=5.0):
    """Scans whose errors go by families, as those of copies do."""
    family = np.repeat(np.arange(num_families), 1 + generator.poisson(2, size=num_families))
    labels = generator.integers(4, size=num_families)[family]
    logits = 1.5 * generator.normal(size=(num_families, 4))[family]
    logits += 0.5 * generator.normal(size=logits.shape)
    logits[np.arange(len(family)), labels] += signal
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return labels, probs, family


def test_intervals_cover_by_family_as_often_as_they_say_and_by_scan_far_less():
    """At 0.95, of 250 repetitions; binomial error (3 sigma) is 0.04."""
    generator = np.random.default_rng(3)
    labels, probs, family = clustered_scans(generator, 60_000)
    weights = np.stack([np.ones(len(family)), 1 / np.bincount(family)[family]], axis=1)
    truth = figures_of(labels, probs, weights, NAMES, 2)
    held = ("accuracy", "macro_f1", "mcc", "log_loss", "missed_tumor_rate", "glioma.recall")
    hits = {
        key: 0
        for unit in ("by_scan", "by_family", "as if apart")
        for key in ((unit, n) for n in held)
    }
    for repetition in range(250):
        labels, probs, family = clustered_scans(generator, 120)
        found = estimate(labels, probs, family, NAMES, 2, num_draws=100, seed=repetition)
        apart = estimate(
            labels, probs, np.arange(len(family)), NAMES, 2, num_draws=100, seed=repetition
        )
        cases = [("by_scan", 0, found["by_scan"]), ("by_family", 1, found["by_family"])]
        for unit, column, own in [*cases, ("as if apart", 0, apart["by_scan"])]:
            for name in held:
                one = own[name]
                hits[unit, name] += one.low <= truth[name][column] <= one.high
    share = {key: count / 250 for key, count in hits.items()}
    assert all(share[u, n] > 0.91 for u in ("by_scan", "by_family") for n in held), share
    assert all(share["as if apart", n] < 0.9 for n in ("accuracy", "macro_f1", "log_loss")), share


def test_no_error_seen_is_no_proof_that_there_are_none():
    labels = np.arange(400) % 4
    found = estimate(labels, np.eye(4)[labels], np.arange(400) // 2, NAMES, 2, num_draws=50)
    missed = found["by_scan"]["missed_tumor_rate"]
    assert (missed.value, missed.low) == (0.0, 0.0)
    assert 0.01 < missed.high < 0.05
    assert found["by_family"]["accuracy"].value == 1.0
    assert 0.97 < found["by_family"]["accuracy"].low < 0.99


def test_one_error_more_never_gives_a_better_bound():
    labels, family = np.arange(1000) % 4, np.arange(1000) // 4 % 250
    lows = []
    for num_wrong in range(8):
        said = labels.copy()
        said[: 40 * num_wrong : 40] = (labels[: 40 * num_wrong : 40] + 1) % 4
        found = estimate(labels, np.eye(4)[said], family, NAMES, 2, num_draws=200)["by_scan"]
        lows.append([found[n].low for n in ("accuracy", "macro_f1", "mcc", "glioma.recall")])
    assert (np.diff(lows, axis=0) <= 1e-9).all(), lows


def test_a_figure_rests_on_the_scans_of_its_denominator():
    """Of two classes, one's recall is the other's specificity, whichever of them is rare."""
    labels = np.repeat([0, 1], [12, 300])
    family = np.arange(312)
    found = estimate(labels, np.eye(2)[labels], family, ("healthy", "tumor"), 0, num_draws=50)
    one = found["by_scan"]
    assert one["healthy.recall"] == one["tumor.specificity"]
    assert one["tumor.recall"] == one["healthy.specificity"]
    assert one["healthy.recall"].low < 0.8 < 0.98 < one["tumor.recall"].low
    assert one["healthy.precision"] == one["tumor.npv"]
    assert (one["log_loss"].low, one["brier"].low) == (None, None), "no error seen is no proof"


def test_a_class_that_is_never_answered_costs_precision():
    labels = np.repeat([0, 1], 100)
    probs = np.eye(2)[np.ones(200, dtype=int)]
    found = figures_of(labels, probs, np.ones((200, 1)), ("healthy", "tumor"), 0)
    assert found["macro_precision"][0] == 0.25
    assert found["healthy.precision"][0] == 0.0


def test_what_is_not_defined_is_none_and_few_families_have_no_interval():
    labels = np.zeros(8, dtype=int)
    probs = np.full((8, 4), 0.25)
    found = estimate(labels, probs, np.arange(8) % 2, NAMES, 2, num_draws=20)["by_scan"]
    assert found["glioma.auc"].value is None
    assert found["false_alarm_rate"].value is None
    assert (found["accuracy"].value, found["accuracy"].low) == (1.0, None)
    with pytest.raises(ValueError, match="no scans"):
        estimate(labels[:0], probs[:0], labels[:0], NAMES, 2)


def test_draws_depend_on_families_and_seed_alone():
    generator = np.random.default_rng(5)
    labels, probs, family = clustered_scans(generator, 40)
    first, again = (estimate(labels, probs, family, NAMES, 2, num_draws=60) for _ in range(2))
    assert first == again
    assert first != estimate(labels, probs, family, NAMES, 2, num_draws=60, seed=1)
    assert family_codes(["b", "a", "b"]).tolist() == [1, 0, 1]
