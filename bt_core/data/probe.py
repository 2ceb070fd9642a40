"""The shortcut probe: how well features that cannot see a tumour predict the class.

A set whose classes come from different sources can often be told apart by file size, borders or
field of view; a classifier then scores well without having learnt anything of the disease. Shape
suffixes: N scans, D features, K classes, R bootstrap draws, S thumbnail side.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bt_core.data.explore import PROPERTIES, numbers, property_values
from bt_core.data.explore_stage import THUMBNAIL_PX, block_means, border_mask, unpacked

NUM_PROBED: Final = 2_000
"""Scans that are enough."""
_SIDE_PX: Final = 20
"""Side of the pictures that the probe sees: a two-pixel frame is the border of a tenth."""
_NUM_BINS: Final = 16
_NUM_FOLDS: Final = 5
_NUM_DRAWS: Final = 1_000
_WEAK, _STRONG = 0.05, 0.25
"""Share of the way from chance to certainty, at the interval's lower end, at which a shortcut is
called weak or strong."""

BLIND: Final = ("file", "intensity", "border_histogram", "border_only")
"""Feature groups that see nothing of where a tumour may be."""
TITLES: Final = {
    "file": "file and picture size",
    "intensity": "overall intensity",
    "border_histogram": "histogram of the border",
    "border_only": "border alone",
    "centre_masked": "all but the centre",
    "thumbnail": "whole thumbnail",
}


def probe_shortcuts(rows: pa.Table, groups: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Predict the class from each feature group alone, by cross-validated logistic regression.

    Folds keep groups whole and class shares equal. Accuracy is balanced over the classes, so that
    chance is 1/K; its 95 % interval is a bootstrap over whole groups.

    Args:
        rows: readable, sampled rows of `ExploreStage` with a label.
        groups: N names; scans of one group are never in training and test fold at once.
        seed: of the folds and the bootstrap.

    Returns:
        num_scans, chance, majority (the largest class's share), `features` by name with title,
        balanced_accuracy, low, high, and blind; and `verdict` with level (none, weak, strong) and
        sentence. `features` is empty, and the verdict says why, if there is too little to split.
    """
    labels = np.array(rows["label"].to_pylist())
    classes, labels_N = np.unique(labels, return_inverse=True)
    _, groups_N = np.unique(np.array(groups), return_inverse=True)
    in_class = [len(set(groups_N[labels_N == k])) for k in range(len(classes))]
    num_folds = min([_NUM_FOLDS, *in_class])
    result: dict[str, Any] = {"num_scans": len(labels), "chance": None, "majority": None}
    if len(classes) < 2 or num_folds < 2:
        return result | _not_probed("that needs two classes with two different scans each")
    result["chance"] = 1 / len(classes)
    result["majority"] = max(Counter(labels_N.tolist()).values()) / len(labels_N)
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    folds = list(splitter.split(labels_N, labels_N, groups_N))
    if any(len(set(labels_N[train])) < len(classes) for train, _ in folds):
        return result | _not_probed("the groups of some class do not fill two folds")
    features = {}
    for name, values_ND in feature_groups(rows).items():
        right_N = _predicted(values_ND, labels_N, folds) == labels_N
        accuracy, low, high = _balanced(right_N, labels_N, groups_N, seed)
        features[name] = {
            "title": TITLES[name],
            "blind": name in BLIND,
            "num_features": values_ND.shape[1],
            "balanced_accuracy": accuracy,
            "low": low,
            "high": high,
        }
    verdict = _verdict(features, result["chance"])
    return result | {"num_folds": num_folds, "features": features, "verdict": verdict}


def _not_probed(why: str) -> dict[str, Any]:
    sentence = f"Not probed for shortcuts: {why}."
    return {"features": {}, "verdict": {"level": "not probed", "sentence": sentence}}


def feature_groups(rows: pa.Table) -> dict[str, np.ndarray]:
    """Return each group's features, float64 (N, D)."""
    file_ND = np.stack([property_values(rows, name) for name in PROPERTIES], axis=1)
    file_ND[:, -1] = np.log(file_ND[:, -1])
    counts = unpacked(rows["border_histogram"], np.uint16, (256,)).astype(np.float64)
    shares = counts / counts.sum(1, keepdims=True)
    thumbnails = unpacked(rows["thumbnail"], np.uint8, (THUMBNAIL_PX, THUMBNAIL_PX))
    pixels_NSS = block_means(thumbnails, _SIDE_PX).astype(np.float64)
    outside = np.ones((_SIDE_PX, _SIDE_PX), bool)
    quarter = _SIDE_PX // 4
    outside[quarter:-quarter, quarter:-quarter] = False
    return {
        "file": file_ND,
        "intensity": np.stack([numbers(rows, name) for name in ("mean", "std")], axis=1),
        "border_histogram": shares.reshape(len(shares), _NUM_BINS, -1).sum(2),
        "border_only": pixels_NSS[:, border_mask(_SIDE_PX)],
        "centre_masked": pixels_NSS[:, outside],
        "thumbnail": pixels_NSS.reshape(len(pixels_NSS), -1),
    }


def _predicted(values_ND: np.ndarray, labels_N: np.ndarray, folds: list[Any]) -> np.ndarray:
    predicted_N = np.empty_like(labels_N)
    for train, test in folds:
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=2_000)
        )
        predicted_N[test] = model.fit(values_ND[train], labels_N[train]).predict(values_ND[test])
    return predicted_N


def _balanced(
    right_N: np.ndarray, labels_N: np.ndarray, groups_N: np.ndarray, seed: int
) -> tuple[float, float, float]:
    """Return balanced accuracy and its 95 % bootstrap interval over groups."""
    num_groups, num_classes = groups_N.max() + 1, labels_N.max() + 1
    total_GK, right_GK = np.zeros((2, num_groups, num_classes))
    np.add.at(total_GK, (groups_N, labels_N), 1)
    np.add.at(right_GK, (groups_N, labels_N), right_N)
    rng = np.random.default_rng(seed)
    draws = (
        rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups)) for _ in range(_NUM_DRAWS)
    )
    drawn = [(draw @ right_GK, draw @ total_GK) for draw in draws]
    whole = [right_K / total_K for right_K, total_K in drawn if total_K.all()]
    low, high = np.percentile(np.mean(whole, axis=1), (2.5, 97.5))
    return float((right_GK.sum(0) / total_GK.sum(0)).mean()), float(low), float(high)


def _verdict(features: dict[str, dict[str, Any]], chance: float) -> dict[str, str]:
    blind = {name: f for name, f in features.items() if f["blind"]}
    best = max(blind.values(), key=lambda f: float(f["low"]))
    skill = (best["low"] - chance) / (1 - chance)
    said = (
        f"{best['title']} predicts the class at {best['balanced_accuracy']:.2f} balanced accuracy "
        f"(95 % interval {best['low']:.2f} to {best['high']:.2f}; chance {chance:.2f})"
    )
    if skill < _WEAK:
        return {"level": "none", "sentence": f"No shortcut found: {said}."}
    level = "strong" if skill >= _STRONG else "weak"
    solved = "partly be solved" if level == "strong" else "be solved to a small part"
    sentence = f"{said[0].upper()}{said[1:]}: this set can {solved} without seeing a tumour."
    return {"level": level, "sentence": sentence}
