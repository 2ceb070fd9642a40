"""Figures of a classifier, for many weightings of the scans at once.

A weighting says how much each scan counts. Ones give the plain figure, one over the size of its
family counts each family once, and numbers of draws with replacement give one draw of a bootstrap:
so a figure and its interval come from the same lines, which equal scikit-learn's with
`sample_weight`. What is not defined, such as the AUC of a class without scans, is NaN. Averages are
over the classes that have scans (in scikit-learn's words `labels=present, zero_division=0`), so a
class that is there and never answered counts as precision 0.

Shape suffixes: N scans, K classes, D weightings, G groups of equal scores.
"""

from collections.abc import Sequence

import numpy as np
import sklearn.metrics

Figures = dict[str, np.ndarray]
"""Name to one value per weighting (`accuracy`, `macro_f1`, `glioma.recall`)."""


def figures_of(
    labels_N: np.ndarray,
    probs_NK: np.ndarray,
    weights_ND: np.ndarray,
    names: Sequence[str],
    healthy: int,
    prevalence_K: np.ndarray | None = None,
) -> Figures:
    """Return every figure of a classification under each weighting.

    Args:
        labels_N: true class indices.
        probs_NK: probabilities, rows sum to 1; the first of the largest is the answer.
        weights_ND: how much each scan counts, at least 0.
        names: K class names.
        healthy: index of the class without a tumour.
        prevalence_K: shares of the classes where the classifier will be used; adds each class's
            predictive values there.

    Raises:
        ValueError: without scans.
    """
    if not len(labels_N):
        raise ValueError("no scans to evaluate")
    num_classes = len(names)
    cell_N = labels_N * num_classes + probs_NK.argmax(1)
    cells_NC = (cell_N[:, None] == np.arange(num_classes**2)).astype(np.float64)
    counts_DKK = (weights_ND.T @ cells_NC).reshape(-1, num_classes, num_classes)
    return {
        **_of_counts(counts_DKK, names, healthy),
        **({} if prevalence_K is None else _at_prevalence(counts_DKK, names, prevalence_K)),
        **_of_probabilities(labels_N, probs_NK, weights_ND),
        **_of_rankings(labels_N, probs_NK, weights_ND, names),
    }


def denominators(
    labels_N: np.ndarray, probs_NK: np.ndarray, names: Sequence[str], healthy: int
) -> dict[str, list[np.ndarray]]:
    """Return the scans, as bool masks_N, that each figure with a part of the scans rests on.

    An AUC rests on two parts, a mean over classes on the scans of each class. Figures that are not
    there rest on all scans.
    """
    said_N = probs_NK.argmax(1)
    found: dict[str, list[np.ndarray]] = {
        "missed_tumor_rate": [labels_N != healthy],
        "false_alarm_rate": [labels_N == healthy],
    }
    classes = [labels_N == k for k in range(len(names)) if (labels_N == k).any()]
    for k, name in enumerate(names):
        own_N, answered_N = labels_N == k, said_N == k
        parts = {
            "precision": [answered_N],
            "recall": [own_N],
            "specificity": [~own_N],
            "f1": [own_N | answered_N],
            "npv": [~answered_N],
            "auc": [own_N, ~own_N],
            "average_precision": [own_N, ~own_N],
            "ppv_at_prevalence": [answered_N],
            "npv_at_prevalence": [~answered_N],
        }
        found |= {f"{name}.{kind}": masks for kind, masks in parts.items()}
    means = ("precision", "recall", "specificity", "f1", "npv", "auc", "average_precision")
    return found | dict.fromkeys(
        ("balanced_accuracy", *(f"macro_{kind}" for kind in means)), classes
    )


def confusion_matrix(labels_N: np.ndarray, probs_NK: np.ndarray) -> np.ndarray:
    """Return counts_KK, rows are true classes."""
    classes = np.arange(probs_NK.shape[1])
    return np.asarray(
        sklearn.metrics.confusion_matrix(labels_N, probs_NK.argmax(1), labels=classes)
    )


def _of_counts(counts_DKK: np.ndarray, names: Sequence[str], healthy: int) -> Figures:
    true_DK, said_DK = counts_DKK.sum(2), counts_DKK.sum(1)
    right_DK = np.diagonal(counts_DKK, axis1=1, axis2=2)
    total_D = true_DK.sum(1)
    neither_DK = total_D[:, None] - true_DK - said_DK + right_DK
    present_DK = true_DK > 0
    precision_DK = _ratio(right_DK, said_DK)
    by_class = {
        "precision": np.where(present_DK & (said_DK == 0), 0.0, precision_DK),
        "recall": _ratio(right_DK, true_DK),
        "specificity": _ratio(neither_DK, total_D[:, None] - true_DK),
        "f1": _ratio(2 * right_DK, true_DK + said_DK),
        "npv": _ratio(neither_DK, total_D[:, None] - said_DK),
    }
    found = {"accuracy": _ratio(right_DK.sum(1), total_D)}
    found["balanced_accuracy"] = _mean_defined(by_class["recall"], present_DK)
    for kind, values_DK in by_class.items():
        found[f"macro_{kind}"] = _mean_defined(values_DK, present_DK)
        found[f"weighted_{kind}"] = _mean_defined(values_DK, true_DK)
        found |= {f"{name}.{kind}": values_DK[:, k] for k, name in enumerate(names)}
    # Matthews' coefficient for several classes: Gorodkin 2004. Kappa: Cohen 1960.
    agreed_D, chance_D = right_DK.sum(1) * total_D, (true_DK * said_DK).sum(1)
    spread_D = (total_D**2 - (true_DK**2).sum(1)) * (total_D**2 - (said_DK**2).sum(1))
    mcc_D = _ratio(agreed_D - chance_D, np.sqrt(spread_D))
    found["mcc"] = np.where(np.isnan(mcc_D), 0.0, mcc_D)  # 0 by convention: no better than chance
    found["kappa"] = _ratio(agreed_D - chance_D, total_D**2 - chance_D)
    ill = np.arange(len(names)) != healthy
    found["missed_tumor_rate"] = _ratio(counts_DKK[:, ill, healthy].sum(1), true_DK[:, ill].sum(1))
    found["false_alarm_rate"] = _ratio(
        counts_DKK[:, healthy][:, ill].sum(1), counts_DKK[:, healthy].sum(1)
    )
    return found


def _at_prevalence(
    counts_DKK: np.ndarray, names: Sequence[str], prevalence_K: np.ndarray
) -> Figures:
    """Return the predictive values where classes have other shares but look the same."""
    rates_DKK = _ratio(counts_DKK, counts_DKK.sum(2, keepdims=True))
    joint_DKK = rates_DKK * (prevalence_K / prevalence_K.sum())[:, None]
    right_DK, said_DK = np.diagonal(joint_DKK, axis1=1, axis2=2), joint_DKK.sum(1)
    neither_DK = 1 - joint_DKK.sum(2) - said_DK + right_DK
    ppv_DK, npv_DK = _ratio(right_DK, said_DK), _ratio(neither_DK, 1 - said_DK)
    return {f"{name}.ppv_at_prevalence": ppv_DK[:, k] for k, name in enumerate(names)} | {
        f"{name}.npv_at_prevalence": npv_DK[:, k] for k, name in enumerate(names)
    }


def _of_probabilities(
    labels_N: np.ndarray, probs_NK: np.ndarray, weights_ND: np.ndarray
) -> Figures:
    """Return means over scans: log loss in nats, Brier score, share of labels in the top two."""
    num_classes = probs_NK.shape[1]
    smallest = np.finfo(probs_NK.dtype).eps
    own_N = probs_NK[np.arange(len(labels_N)), labels_N].clip(smallest, 1.0)
    truth_NK = labels_N[:, None] == np.arange(num_classes)
    # Brier 1950: the sum over the classes; for two classes half of it, as is usual there.
    brier_N = ((probs_NK - truth_NK) ** 2).sum(1) / (2 if num_classes == 2 else 1)
    of_scans = {"log_loss": -np.log(own_N), "brier": brier_N}
    if num_classes > 2:
        top_two = np.argsort(probs_NK, axis=1, kind="stable")[:, -2:]
        of_scans["top2_accuracy"] = (top_two == labels_N[:, None]).any(1).astype(float)
    total_D = weights_ND.sum(0)
    return {name: _ratio(values_N @ weights_ND, total_D) for name, values_N in of_scans.items()}


def _of_rankings(
    labels_N: np.ndarray, probs_NK: np.ndarray, weights_ND: np.ndarray, names: Sequence[str]
) -> Figures:
    """Return the area under the ROC curve, and the average precision, of each class and on mean."""
    pairs = [_ranking(labels_N == k, probs_NK[:, k], weights_ND) for k in range(probs_NK.shape[1])]
    found: Figures = {}
    for kind, columns in zip(("auc", "average_precision"), zip(*pairs, strict=True), strict=True):
        values_DK = np.stack(columns, axis=1)
        found[f"macro_{kind}"] = _mean_defined(values_DK, np.ones_like(values_DK))
        found |= {f"{name}.{kind}": values_D for name, values_D in zip(names, columns, strict=True)}
    return found


def _ranking(
    positive_N: np.ndarray, score_N: np.ndarray, weights_ND: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the AUC and the average precision of one class against the rest."""
    order = np.argsort(-score_N, kind="stable")
    first_of_group = np.flatnonzero(np.diff(score_N[order], prepend=np.inf))  # equal scores
    all_ND = weights_ND[order]
    positive_ND = np.where(positive_N[order, None], all_ND, 0.0)
    all_GD = np.add.reduceat(all_ND, first_of_group, axis=0)
    positive_GD = np.add.reduceat(positive_ND, first_of_group, axis=0)
    found_GD, passed_GD = positive_GD.cumsum(0), all_GD.cumsum(0)
    num_positive_D, num_D = found_GD[-1].copy(), passed_GD[-1]  # `found_GD` is overwritten below
    # A negative is beaten by the positives above it, and half by those with the same score.
    beaten_D = np.einsum("gd,gd->d", all_GD - positive_GD, found_GD - positive_GD / 2)
    precision_GD = np.divide(found_GD, passed_GD, out=found_GD, where=passed_GD > 0)
    auc_D = _ratio(beaten_D, num_positive_D * (num_D - num_positive_D))
    return auc_D, _ratio(np.einsum("gd,gd->d", positive_GD, precision_GD), num_positive_D)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide; what is divided by 0 is NaN."""
    quotient = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator != 0)
    return quotient


def _mean_defined(values_DK: np.ndarray, weights_DK: np.ndarray) -> np.ndarray:
    """Return the weighted mean over the classes whose value is defined."""
    shares_DK = ~np.isnan(values_DK) * weights_DK
    return _ratio((np.nan_to_num(values_DK) * shares_DK).sum(1), shares_DK.sum(1))
