"""Models side by side on the same scans: which differ by more than chance, and which are tied.

A family of copies (or a patient's scans) is one piece of evidence. The test exchanges two models'
answers on whole families, at random: a paired permutation test by cluster (Good 2005, "Permutation,
Parametric and Bootstrap Tests of Hypotheses"). With one scan per family it asks what McNemar's test
asks. Holm's method corrects over all pairs.

Shape suffixes: N scans, K classes, F families, D draws or exchanges.
"""

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any, Final

import numpy as np
from scipy.stats import t as student

from bt_core.data.explore import ALPHA
from bt_core.errors import UsageError
from bt_core.evaluation.intervals import (
    DEFINED,
    FEWEST,
    LEVEL,
    draw_families,
    estimate,
    interval_text,
)
from bt_core.evaluation.metrics import figures_of
from bt_core.evaluation.predictions import Scans
from bt_core.labels import LabelSpace
from bt_core.training.noise import count, holm_of_pairs, metric_of

COMPARED: Final = ("accuracy", "macro_f1", "macro_auc", "log_loss", "missed_tumor_rate")
_NUM_PERMUTATIONS: Final = 9_999
_NUM_DRAWS: Final = 1_000
_AT_ONCE: Final = 500


def compare(models: Mapping[str, Scans], space: LabelSpace) -> dict[str, Any]:
    """Compare models on the scans that none of them, nor their families, were trained on.

    Args:
        models: name to answered scans; two at least.
        space: the classes.

    Returns:
        `num_scans`, `num_families`; `models`: name to estimates of `COMPARED`, `rank` by accuracy
        (one more than the number of models that are better beyond chance) and `tied` with the best;
        and `pairs`: for each two models, `difference` of each figure (first minus second, 95 %
        interval by draws of families, which both share) and `p_value` (Holm-corrected) of the
        accuracy.

    Raises:
        UsageError: if they share no such scan, or disagree on a scan's label or family.
    """
    aligned = _aligned(models)
    names = list(aligned)
    first = aligned[names[0]]
    estimates = {
        name: estimate(
            s.labels_N, s.probs_NK, s.family_N, space.names, space.healthy, units=("by_scan",)
        )["by_scan"]
        for name, s in aligned.items()
    }
    p_MM = np.ones((len(names), len(names)))
    for i, j in combinations(range(len(names)), 2):
        p_MM[i, j] = p_MM[j, i] = permutation_p_value(aligned[names[i]], aligned[names[j]])
    p_MM = holm_of_pairs(p_MM)
    draws = {name: _draws(scans, space) for name, scans in aligned.items()}
    accuracy_M = np.array([scans.right_N.mean() for scans in aligned.values()])
    better_MM = (accuracy_M[:, None] > accuracy_M[None]) & (p_MM < ALPHA)
    leader, num_families = int(accuracy_M.argmax()), int(first.family_N.max()) + 1
    return {
        "num_scans": len(first),
        "num_families": num_families,
        "models": {
            name: {
                "rank": int(better_MM[:, i].sum()) + 1,
                "tied": bool(p_MM[leader, i] >= ALPHA),
                **{figure: estimates[name][figure].model_dump() for figure in COMPARED},
            }
            for i, name in enumerate(names)
        },
        "pairs": [
            {
                "models": [names[i], names[j]],
                "p_value": float(p_MM[i, j]),
                "difference": _differences(draws[names[i]], draws[names[j]], num_families),
            }
            for i, j in combinations(range(len(names)), 2)
        ],
    }


def permutation_p_value(
    one: Scans, other: Scans, metric: str = "val_accuracy", seed: int = 0
) -> float:
    """Return the two-sided p value of a difference, by exchanging answers on whole families.

    Args:
        one: a model's answers.
        other: another's to the same scans, in the same order.
        metric: of `training.noise.metric_of`, of counts only.
        seed: of the exchanges.
    """
    half_sum_KK, half_FKK = _halves(one, other)

    def difference(signs_DF: np.ndarray) -> np.ndarray:
        shift_DKK = np.tensordot(signs_DF, half_FKK, axes=1)
        left_D, right_D = (
            metric_of(metric, counts_DKK, np.zeros(1))
            for counts_DKK in (half_sum_KK + shift_DKK, half_sum_KK - shift_DKK)
        )
        return np.asarray(left_D - right_D)

    observed = abs(float(difference(np.ones((1, len(half_FKK))))[0]))
    generator, extreme = np.random.default_rng(seed), 0
    for start in range(0, _NUM_PERMUTATIONS, _AT_ONCE):
        num = min(_AT_ONCE, _NUM_PERMUTATIONS - start)
        signs_DF = generator.choice([-1.0, 1.0], size=(num, len(half_FKK)))
        extreme += int((np.abs(difference(signs_DF)) >= observed - 1e-12).sum())
    return (extreme + 1) / (_NUM_PERMUTATIONS + 1)


def _halves(one: Scans, other: Scans) -> tuple[np.ndarray, np.ndarray]:
    """Return half the sum of both confusion matrices, and by family half their difference.

    An exchange turns the sign of a family's difference, so any confusion matrix is one product.
    """
    num_families = int(one.family_N.max()) + 1
    left_FKK, right_FKK = (
        count(s.labels_N, s.probs_NK, s.family_N, num_families).confusion_FKK for s in (one, other)
    )
    return (left_FKK + right_FKK).sum(0) / 2, (left_FKK - right_FKK) / 2


def _draws(scans: Scans, space: LabelSpace) -> dict[str, np.ndarray]:
    """Return each figure, first as it is and then in every draw of families."""
    counts_DF = draw_families(scans.family_N, _NUM_DRAWS, seed=0)
    counts_DF = np.concatenate([np.ones((1, counts_DF.shape[1])), counts_DF])
    blocks = [
        figures_of(
            scans.labels_N,
            scans.probs_NK,
            counts_DF[start : start + _AT_ONCE].T[scans.family_N],
            space.names,
            space.healthy,
        )
        for start in range(0, len(counts_DF), _AT_ONCE)
    ]
    return {name: np.concatenate([block[name] for block in blocks]) for name in COMPARED}


def _differences(
    one: dict[str, np.ndarray], other: dict[str, np.ndarray], num_families: int
) -> dict[str, dict[str, float | None]]:
    """Return each figure's difference with an interval of Student's t from the paired draws.

    Without a draw in which the models differ, or with few families, there is no interval: nothing
    seen is no proof that there is nothing. One whose every answer is equal is no other model.
    """
    if all(np.array_equal(one[name], other[name], equal_nan=True) for name in one):
        nothing = {"value": 0.0, "low": 0.0, "high": 0.0}
        return {name: dict(nothing) for name in COMPARED}
    found = {}
    for name in COMPARED:
        value, *drawn = one[name] - other[name]
        drawn_D = np.array(drawn)
        defined = drawn_D[~np.isnan(drawn_D)]
        low = high = None
        sure = len(defined) >= DEFINED * len(drawn_D) and num_families >= FEWEST
        if sure and not np.isnan(value) and defined.std() > 0:
            scale = math.sqrt(num_families / (num_families - 1))
            half = float(student.ppf((1 + LEVEL) / 2, num_families - 1) * defined.std() * scale)
            low, high = float(value) - half, float(value) + half
        found[name] = {"value": None if np.isnan(value) else float(value), "low": low, "high": high}
    return found


def comparison_lines(found: Mapping[str, Any]) -> list[str]:
    """Return what is printed of a comparison: ranks with ties, and each pair's difference."""
    lines = [f"{found['num_scans']} test scans ({found['num_families']} families), none trained on"]
    several = sum(model["tied"] for model in found["models"].values()) > 1
    ranked = sorted(
        found["models"].items(), key=lambda item: (item[1]["rank"], -item[1]["accuracy"]["value"])
    )
    for name, model in ranked:
        mark = "=" if model["tied"] and several else " "
        missed = interval_text(model["missed_tumor_rate"])
        lines.append(
            f"{mark}{model['rank']}  {name}  accuracy {interval_text(model['accuracy'])}, "
            f"macro F1 {interval_text(model['macro_f1'])}, missed tumours {missed}"
        )
    for pair in found["pairs"]:
        first, second = pair["models"]
        lines.append(
            f"{first} - {second}: accuracy {interval_text(pair['difference']['accuracy'], '+')}, "
            f"p {pair['p_value']:.2g}"
        )
    if several:
        lines += ["= tied: not told apart from the best by a permutation of families (Holm, 0.05)"]
    return lines


def _aligned(models: Mapping[str, Scans]) -> dict[str, Scans]:
    """Return each model's answers to the clean scans that all have, in one order."""
    common = set.intersection(*(set(s.scan_id[s.clean_N].tolist()) for s in models.values()))
    if not common:
        raise UsageError(
            f"{', '.join(models)} have no test scan in common that none was trained on; evaluate "
            "them on one dataset"
        )
    found: dict[str, Scans] = {}
    for name, scans in models.items():
        part = scans.where(np.isin(scans.scan_id, list(common)))
        found[name] = part.where(np.argsort(part.scan_id))
    first = next(iter(found.values()))
    for name, scans in found.items():
        if (scans.labels_N != first.labels_N).any() or (scans.family_N != first.family_N).any():
            raise UsageError(
                f"{name} was evaluated against other labels or families than "
                f"{next(iter(found))}; evaluate them on one dataset"
            )
    return found
