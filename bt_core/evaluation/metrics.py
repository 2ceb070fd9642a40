"""Figures of a classifier from labels and probabilities. Shape suffixes: N scans, K classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import (
    confusion_matrix,
    precision_recall_fscore_support,
    roc_auc_score,
)


def classification_metrics(
    labels_N: np.ndarray, probs_NK: np.ndarray, names: Sequence[str]
) -> dict[str, Any]:
    """Return the figures of a classification, as scikit-learn defines them.

    Args:
        labels_N: true class indices.
        probs_NK: probabilities, rows sum to 1.
        names: K class names.

    Returns:
        num_scans, accuracy, balanced_accuracy, macro (precision, recall, f1, auc), log_loss,
        per_class (precision, recall, f1, auc one-vs-rest, support) and the confusion matrix (rows
        are true classes). A figure that is not defined, such as the AUC of a class without scans,
        is None.

    Raises:
        ValueError: without scans.
    """
    if not len(labels_N):
        raise ValueError("no scans to evaluate")
    classes = np.arange(len(names))
    predicted_N = probs_NK.argmax(1)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels_N, predicted_N, labels=classes, zero_division=0.0
    )
    aucs = [_auc(labels_N == k, probs_NK[:, k]) for k in classes]
    true_probs_N = probs_NK[np.arange(len(labels_N)), labels_N]
    present = np.unique(labels_N)
    return {
        "num_scans": len(labels_N),
        "accuracy": float((predicted_N == labels_N).mean()),
        "balanced_accuracy": float(recall[present].mean()),
        "macro": {
            "precision": float(precision.mean()),
            "recall": float(recall.mean()),
            "f1": float(f1.mean()),
            "auc": None if None in aucs else float(np.mean(np.array(aucs, dtype=float))),
        },
        "log_loss": float(-np.log(np.maximum(true_probs_N, 1e-15)).mean()),
        "per_class": {
            name: {
                "precision": float(precision[k]),
                "recall": float(recall[k]),
                "f1": float(f1[k]),
                "auc": aucs[k],
                "support": int(support[k]),
            }
            for k, name in enumerate(names)
        },
        "confusion_matrix": confusion_matrix(labels_N, predicted_N, labels=classes).tolist(),
    }


def _auc(positive_N: np.ndarray, score_N: np.ndarray) -> float | None:
    if positive_N.all() or not positive_N.any():
        return None
    return float(roc_auc_score(positive_N, score_N))
