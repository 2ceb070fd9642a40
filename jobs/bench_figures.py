"""`bt bench figures`: what all figures of an evaluation cost, with their intervals."""

import json
import resource
import statistics
import time
from typing import Annotated, Any

import typer

from bt_core.errors import EXIT_OK
from jobs.bench import JsonOption, apart

_PLAIN_DRAWS = 10


def run_figures(
    num_scans: Annotated[int, typer.Option(min=100, help="Answered scans.")] = 10_000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the sides take turns.")] = 3,
    as_json: JsonOption = False,
) -> int:
    """All figures of answered scans with intervals, against scikit-learn's functions: seconds.

    Ours are 2,000 draws of families, by scan and by family. The plain side calls scikit-learn for
    the same figures, by scan alone, in 10 draws, and its time is multiplied by 200.
    """
    sides: dict[str, list[float]] = {"plain": [], "figures": []}
    peak = 0
    for number in range(rounds):
        sides["plain"].append(2_000 / _PLAIN_DRAWS * apart(_plain_seconds, num_scans))
        seconds, peak = apart(_figures_seconds, num_scans)
        sides["figures"].append(seconds)
        medians = {side: statistics.median(values) for side, values in sides.items()}
        print(
            f"round {number + 1}: plain {medians['plain']:.0f} s, ours {medians['figures']:.1f} s, "
            f"{medians['plain'] / medians['figures']:.0f} times as fast (medians)",
            flush=True,
        )
    print(f"peak memory of the process {peak / 1e6:.0f} MB")
    if as_json:
        print(json.dumps({**sides, "peak_bytes": peak}))
    return EXIT_OK


def _answered(num_scans: int) -> tuple[Any, Any, Any]:
    """Return labels, probabilities and families of synthetic answers, most of them right."""
    import numpy as np

    generator = np.random.default_rng(0)
    drawn_N = generator.integers(int(0.6 * num_scans), size=num_scans)
    family_N = np.unique(drawn_N, return_inverse=True)[1]
    labels_N = generator.integers(4, size=num_scans)[family_N]
    logits_NK = generator.normal(size=(num_scans, 4))
    logits_NK[np.arange(num_scans), labels_N] += 3.0
    probs_NK = np.exp(logits_NK) / np.exp(logits_NK).sum(1, keepdims=True)
    return labels_N, probs_NK, family_N


def _figures_seconds(num_scans: int) -> tuple[float, int]:
    """Return seconds, and the largest memory of this process in bytes."""
    from bt_core.evaluation.intervals import estimate
    from bt_core.labels import LABEL_SPACES

    space = LABEL_SPACES["four_class"]
    answers = _answered(num_scans)
    started = time.perf_counter()
    estimate(*answers, space.names, space.healthy)
    seconds = time.perf_counter() - started
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _plain_seconds(num_scans: int) -> float:
    """Return the seconds of `_PLAIN_DRAWS` draws."""
    import numpy as np
    from sklearn import metrics

    labels_N, probs_NK, family_N = _answered(num_scans)
    said_N, num_families = probs_NK.argmax(1), int(family_N.max()) + 1
    generator = np.random.default_rng(0)
    started = time.perf_counter()
    for _ in range(_PLAIN_DRAWS):
        drawn_F = generator.integers(num_families, size=num_families)
        own = {"sample_weight": np.bincount(drawn_F, minlength=num_families)[family_N]}
        for average in ("macro", "weighted", None):
            metrics.precision_recall_fscore_support(
                labels_N, said_N, average=average, zero_division=0.0, **own
            )
        for of_answers in (
            metrics.accuracy_score,
            metrics.matthews_corrcoef,
            metrics.cohen_kappa_score,
            metrics.confusion_matrix,
        ):
            of_answers(labels_N, said_N, **own)
        for of_probs in (metrics.log_loss, metrics.brier_score_loss, metrics.top_k_accuracy_score):
            of_probs(labels_N, probs_NK, **own)
        for k in range(4):
            metrics.roc_auc_score(labels_N == k, probs_NK[:, k], **own)
            metrics.average_precision_score(labels_N == k, probs_NK[:, k], **own)
    return time.perf_counter() - started
