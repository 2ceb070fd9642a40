"""Which models of a sweep differ by more than the noise, and which are tied.

Two models are told apart only if their difference is beyond both kinds of noise:

- of the scans: a delete-one-family jackknife of the paired difference of the metric, so that copies
  and a patient's scans count once (Efron & Stein 1981; clustered paired differences as in Miller
  2024, "Adding Error Bars to Evals"). Works for any metric, also for the F1 value, which is no mean
  over scans.
- of training: the differences over folds x seeds, with the correction for training sets that
  overlap (Nadeau & Bengio 2003; for repeated folds Bouckaert & Frank 2004). Their variance is the
  larger of the pair's own, which few trainings estimate badly, and that of all models together
  (residuals of models by trainings, a two-way layout), which models that hardly vary would make too
  small for those that do. One training each says nothing about this.

A pair's p value is the larger of the two (an intersection-union test, Berger 1982), Holm (1979)
corrects over all pairs, since the leader is known only from the same figures; below 0.05 the models
differ. A model's rank is one more than the number of models that are better beyond the noise.

Shape suffixes: M models, J trainings (folds x seeds), F families, K classes, N rows.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.stats import t as student

from bt_core.data.explore import ALPHA, holm

_NUM_DRAWS: Final = 2_000
_MAX_LOG_LOSS: Final = 100.0
"""As in the training's own score."""


@dataclass(frozen=True)
class Counts:
    """What one model's validation predictions amount to in each family.

    Attributes:
        confusion_FKK: true by predicted class.
        log_loss_F: sums of log losses, nats.
    """

    confusion_FKK: np.ndarray
    log_loss_F: np.ndarray


def count(
    labels_N: np.ndarray, logits_NK: np.ndarray, family_N: np.ndarray, num_families: int
) -> Counts:
    """Add up predictions by family; rows of several seeds add up too.

    Args:
        labels_N: class indices.
        logits_NK: float.
        family_N: indices from 0 to `num_families` - 1.
        num_families: F.
    """
    num_classes = logits_NK.shape[1]
    confusion_FKK = np.zeros((num_families, num_classes, num_classes))
    np.add.at(confusion_FKK, (family_N, labels_N, logits_NK.argmax(1)), 1.0)
    shifted_NK = logits_NK.astype(np.float64) - logits_NK.max(1, keepdims=True)
    loss_N = np.log(np.exp(shifted_NK).sum(1)) - shifted_NK[np.arange(len(labels_N)), labels_N]
    log_loss_F = np.bincount(family_N, weights=loss_N, minlength=num_families)
    return Counts(confusion_FKK, log_loss_F)


def metric_of(metric: str, confusion_XKK: np.ndarray, log_loss_X: np.ndarray) -> np.ndarray:
    """Return a metric of any number of confusion matrices at once.

    Args:
        metric: one of `sweep.MODES`.
        confusion_XKK: true by predicted class.
        log_loss_X: sums.
    """
    num_X = confusion_XKK.sum((1, 2))
    right_XK = np.diagonal(confusion_XKK, axis1=1, axis2=2)
    log_loss_X = log_loss_X / num_X
    if metric == "val_accuracy":
        return np.asarray(right_XK.sum(1) / num_X)
    if metric == "val_log_loss":
        return log_loss_X
    either_XK = confusion_XKK.sum(1) + confusion_XKK.sum(2)
    f1_XK = 2 * right_XK / np.maximum(either_XK, 1)
    macro_f1_X = f1_XK.sum(1) / np.maximum((either_XK > 0).sum(1), 1)
    if metric == "val_macro_f1":
        return np.asarray(macro_f1_X)
    return np.asarray(macro_f1_X - 0.01 * np.minimum(log_loss_X, _MAX_LOG_LOSS))


def family_accuracy(counts: Counts, seed: int = 0) -> tuple[float, float, float]:
    """Return the accuracy over one scan per family, and its 95 % interval.

    A family counts by the share of its scans that are right: the mean over all ways to choose one
    scan of each. The interval is a percentile bootstrap over families (Efron & Tibshirani 1993).
    """
    right_F = np.trace(counts.confusion_FKK, axis1=1, axis2=2)
    share_F = right_F / counts.confusion_FKK.sum((1, 2))
    generator = np.random.default_rng(seed)
    num_families = len(share_F)
    means = [share_F[generator.integers(num_families, size=num_families)].mean()
             for _ in range(_NUM_DRAWS)]  # fmt: skip
    low, high = np.quantile(means, [ALPHA / 2, 1 - ALPHA / 2])
    return float(share_F.mean()), float(low), float(high)


def scan_noise(counts: list[Counts], metric: str) -> np.ndarray:
    """Return p_MM of each pair's difference against the noise of the scans (two-sided)."""
    estimates, left_out = [], []
    for one in counts:
        total_KK, total = one.confusion_FKK.sum(0), one.log_loss_F.sum()
        estimates.append(metric_of(metric, total_KK[None], total[None])[0])
        without_FKK = total_KK - one.confusion_FKK
        left_out.append(metric_of(metric, without_FKK, total - one.log_loss_F))
    estimate_M, left_out_MF = np.array(estimates), np.array(left_out)
    num_families = left_out_MF.shape[1]
    centred_MF = left_out_MF - left_out_MF.mean(1, keepdims=True)
    gram_MM = centred_MF @ centred_MF.T
    own_M = np.diagonal(gram_MM)
    variance_MM = own_M[:, None] + own_M[None] - 2 * gram_MM
    variance_MM *= (num_families - 1) / num_families
    return _p_values(estimate_M[:, None] - estimate_M[None], variance_MM, num_families - 1)


def training_noise(scores_MJ: np.ndarray, num_folds: int) -> np.ndarray | None:
    """Return p_MM of each pair's difference against the noise of training (two-sided).

    Args:
        scores_MJ: each model's metric in each training; all models have the same trainings.
        num_folds: folds; 1 is a fixed validation split, where only seeds differ.

    Returns:
        None if there is only one training each, or one model.
    """
    num_models, num_fits = scores_MJ.shape
    if num_fits < 2 or num_models < 2:
        return None
    means_M = scores_MJ.mean(1)
    residual_MJ = scores_MJ - means_M[:, None] - scores_MJ.mean(0) + scores_MJ.mean()
    degrees = (num_models - 1) * (num_fits - 1)
    overlap = 1 / (num_folds - 1) if num_folds > 1 else 0.0
    of_all = 2 * (residual_MJ**2).sum() / degrees
    of_pair_MM = (scores_MJ[:, None] - scores_MJ[None]).var(2, ddof=1)
    variance_MM = np.maximum(of_all, of_pair_MM) * (1 / num_fits + overlap)
    return _p_values(means_M[:, None] - means_M[None], variance_MM, degrees)


def _p_values(difference_MM: np.ndarray, variance_MM: np.ndarray, degrees: int) -> np.ndarray:
    """Return two-sided p of Student's t; equal models have 1, whatever their variance."""
    error_MM = np.sqrt(np.maximum(variance_MM, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        p_MM = 2 * student.sf(np.abs(difference_MM) / error_MM, degrees)
    return np.where(np.isclose(difference_MM, 0, atol=1e-12), 1.0, p_MM)


def holm_of_pairs(p_MM: np.ndarray) -> np.ndarray:
    """Return p_MM, symmetric, with its pairs corrected by Holm's method and a diagonal of 1."""
    upper = np.triu_indices(len(p_MM), 1)
    result_MM = np.ones_like(p_MM)
    result_MM[upper] = holm(p_MM[upper].tolist())
    result_MM.T[upper] = result_MM[upper]
    return result_MM


def ranks(
    counts: list[Counts], scores_MJ: np.ndarray, metric: str, num_folds: int, larger_is_better: bool
) -> tuple[list[int], list[float]]:
    """Return each model's rank, and its corrected p value against the leader by mean score.

    Args:
        counts: of the M models, over the same families.
        scores_MJ: the metric in each training.
        metric: one of `sweep.MODES`.
        num_folds: folds of the sweep.
        larger_is_better: of the metric.
    """
    p_MM = scan_noise(counts, metric)
    of_training = training_noise(scores_MJ, num_folds)
    if of_training is not None:
        p_MM = np.maximum(p_MM, of_training)
    p_MM = holm_of_pairs(p_MM)
    means_M = scores_MJ.mean(1) * (1 if larger_is_better else -1)
    better_MM = (means_M[:, None] > means_M[None]) & (p_MM < ALPHA)
    leader = int(means_M.argmax())
    return [int(n) + 1 for n in better_MM.sum(0)], [float(p) for p in p_MM[leader]]
