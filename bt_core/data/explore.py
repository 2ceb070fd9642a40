"""Statistics of a scan source: counts, image properties, intensities, and tests between classes.

Pure functions over the rows of `ExploreStage`. Shape suffixes: N scans, K classes.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import stats

from bt_core.data.explore_stage import unpacked

UNLABELLED: Final = "unlabelled"
ALPHA: Final = 0.05
PROPERTIES: Final = ("width", "height", "aspect", "channels", "bit_depth", "num_bytes")
"""Facts about a scan's file; `aspect` is width over height."""
TESTED: Final = ("mean", "std", "border_mean")
_MAX_SHAPIRO: Final = 5_000
"""Above it, scipy's p-values of Shapiro-Wilk are not accurate."""
_FEWEST: Final = 3
_SPLIT_NAMES: Final = ("train", "validation", "test")


def name_unlabelled(refs: pa.Table) -> tuple[pa.Table, tuple[str, ...]]:
    """Give refs without a label the class `unlabelled`; return them and all classes' names."""
    labels = [label or UNLABELLED for label in refs["label"].to_pylist()]
    index = refs.schema.get_field_index("label")
    return refs.set_column(index, "label", pa.array(labels)), tuple(sorted(set(labels)))


def choose(refs: pa.Table, num_sampled: int, shown_per_row: int, seed: int) -> pa.Table:
    """Add the columns `sampled` and `shown` (bool) to labelled refs, at random but seeded.

    Args:
        refs: rows with scan_id, label and given_split.
        num_sampled: scans whose thumbnails come back, at most, spread over the classes as they are.
        shown_per_row: scans of each class and split that are shown as pictures.
        seed: of both choices; the order of the rows does not matter.
    """
    order = np.argsort(np.array(refs["scan_id"].to_pylist()), kind="stable")
    order = order[np.random.default_rng(seed).permutation(len(order))]
    sampled, shown = np.zeros(len(order), bool), np.zeros(len(order), bool)
    sampled[order[:num_sampled]] = True
    cells = list(zip(refs["label"].to_pylist(), refs["given_split"].to_pylist(), strict=True))
    taken: Counter[tuple[str, str]] = Counter()
    for i in order:
        taken[cells[i]] += 1
        shown[i] = taken[cells[i]] <= shown_per_row
    return refs.append_column("sampled", pa.array(sampled)).append_column("shown", pa.array(shown))


def describe_source(rows: pa.Table, names: Sequence[str], seed: int) -> dict[str, Any]:
    """Return every figure of the readable and unreadable rows, ready for strict JSON.

    Args:
        rows: of `ExploreStage`, with label and given_split.
        names: K class names in the order of the page.
        seed: of the samples for Shapiro-Wilk.
    """
    good = read_rows(rows)
    digests = good["pixel_sha256"].to_pylist()
    pairs = set(zip(digests, good["label"].to_pylist(), strict=True))
    return {
        "num_scans": rows.num_rows,
        "num_read": good.num_rows,
        "unreadable": dict(sorted(Counter(filter(None, rows["reason"].to_pylist())).items())),
        "num_distinct_pixels": len(set(digests)),
        "num_pixels_in_two_classes": len(pairs) - len(set(digests)),
        "classes": list(names),
        "counts": class_counts(good, names),
        "formats": dict(sorted(Counter(good["format"].to_pylist()).items())),
        "properties": {n: _five_numbers(property_values(good, n)) for n in PROPERTIES},
        "intensity": {name: _intensity(of_class(good, name)) for name in names},
        "tests": class_tests(
            {t: {n: numbers(of_class(good, n), t) for n in names} for t in TESTED}, seed
        ),
    }


def read_rows(rows: pa.Table) -> pa.Table:
    """Return the rows of scans that could be read."""
    return rows.filter(pc.equal(rows["reason"], ""))


def class_counts(rows: pa.Table, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return split to class to number of scans; a source without split folders has one, `all`."""
    splits = [split or "all" for split in rows["given_split"].to_pylist()]
    counted = Counter(zip(splits, rows["label"].to_pylist(), strict=True))
    order = [s for s in (*_SPLIT_NAMES, "all") if s in set(splits)]
    return {split: {name: counted[split, name] for name in names} for split in order}


def of_class(rows: pa.Table, name: str) -> pa.Table:
    """Return the rows of one class."""
    return rows.filter(pc.equal(rows["label"], name))


def numbers(rows: pa.Table, column: str) -> np.ndarray:
    """Return a numeric column as float64 (N,)."""
    values: np.ndarray = rows[column].to_numpy().astype(np.float64)
    return values


def property_values(rows: pa.Table, name: str) -> np.ndarray:
    """Return one of `PROPERTIES` as float64 (N,)."""
    if name == "aspect":
        ratio: np.ndarray = numbers(rows, "width") / numbers(rows, "height")
        return ratio
    return numbers(rows, name)


def mean_histogram(rows: pa.Table) -> np.ndarray:
    """Return the shares (256,) of the grey levels over all rows' pixels; zeros without a row."""
    counts = unpacked(rows["histogram"], np.uint16, (256,)).sum(0, dtype=np.float64)
    shares: np.ndarray = counts / max(counts.sum(), 1)
    return shares


def class_tests(values: dict[str, dict[str, np.ndarray]], seed: int) -> dict[str, Any]:
    """Test normality of each class, then every pair of classes for a difference.

    Shapiro-Wilk decides the test of a pair: Welch's t-test if both classes pass at 0.05, else
    Mann-Whitney U. P-values are corrected over all pairs and features by Holm's method (Holm,
    Scand. J. Stat. 1979). Effects: Cohen's d with 0.2, 0.5, 0.8 as small, medium, large (Cohen
    1988), or Cliff's delta with 0.147, 0.33, 0.474 (Romano et al. 2006).

    Args:
        values: feature to class to one number for each scan (N,).
        seed: chooses the sample for Shapiro-Wilk of classes above 5,000 scans.

    Returns:
        `normality`: feature to class to n, statistic and p (None where it cannot be tested);
        `pairs`: one entry for each feature and pair of classes with 3 scans or more.
    """
    normality = {
        feature: {name: _shapiro(x, seed) for name, x in of_class.items()}
        for feature, of_class in values.items()
    }
    pairs = []
    for feature, of_class in values.items():
        for one, two in itertools.combinations(of_class, 2):
            if min(len(of_class[one]), len(of_class[two])) < _FEWEST:
                continue
            normal = all((normality[feature][name]["p"] or 0) >= ALPHA for name in (one, two))
            compared = _compare(of_class[one], of_class[two], normal)
            pairs.append({"feature": feature, "classes": [one, two], **compared})
    for pair, corrected in zip(pairs, holm([p["p"] for p in pairs]), strict=True):
        pair["p_holm"] = corrected
        differs = "differs" if corrected < ALPHA else "no difference shown"
        pair["sentence"] = f"{differs}, {pair['size']} effect"
    return {"normality": normality, "pairs": pairs}


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down method."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(steps, 1)
    return [float(value) for value in corrected]


def _shapiro(x: np.ndarray, seed: int) -> dict[str, Any]:
    sample = x
    if len(x) > _MAX_SHAPIRO:
        sample = np.random.default_rng(seed).choice(x, _MAX_SHAPIRO, replace=False)
    if len(x) < _FEWEST or np.ptp(sample) == 0:
        return {"n": len(sample), "statistic": None, "p": None}
    result = stats.shapiro(sample)
    return {"n": len(sample), "statistic": float(result.statistic), "p": float(result.pvalue)}


def _compare(x: np.ndarray, y: np.ndarray, normal: bool) -> dict[str, Any]:
    if normal:
        result = stats.ttest_ind(x, y, equal_var=False)
        variance = (len(x) - 1) * x.var(ddof=1) + (len(y) - 1) * y.var(ddof=1)
        effect = float((x.mean() - y.mean()) / np.sqrt(variance / (len(x) + len(y) - 2)))
        words = {
            "test": "Welch t",
            "effect_name": "Cohen's d",
            "size": _size(effect, 0.2, 0.5, 0.8),
        }
    elif np.ptp(np.concatenate([x, y])) == 0:  # nothing to rank
        none = {"test": "Mann-Whitney U", "statistic": None, "p": 1.0}
        return none | {"effect_name": "Cliff's delta", "effect": 0.0, "size": "negligible"}
    else:
        result = stats.mannwhitneyu(x, y, alternative="two-sided")
        effect = float(2 * result.statistic / (len(x) * len(y)) - 1)
        size = _size(effect, 0.147, 0.33, 0.474)
        words = {"test": "Mann-Whitney U", "effect_name": "Cliff's delta", "size": size}
    figures = {"statistic": float(result.statistic), "p": float(result.pvalue), "effect": effect}
    return {**words, **figures}


def _size(effect: float, small: float, medium: float, large: float) -> str:
    steps = [(large, "large"), (medium, "medium"), (small, "small")]
    return next((word for bound, word in steps if abs(effect) >= bound), "negligible")


def _intensity(rows: pa.Table) -> dict[str, Any]:
    """Return figures over all pixels of a class, and over the means of its scans."""
    if not rows.num_rows:
        return {"num_scans": 0}
    shares = mean_histogram(rows)
    levels = np.arange(256)
    mean = float((shares * levels).sum())
    means = numbers(rows, "mean")
    return {
        "num_scans": rows.num_rows,
        "mean": mean,
        "median": float(np.searchsorted(shares.cumsum(), 0.5)),
        "std": float(np.sqrt((shares * (levels - mean) ** 2).sum())),
        "min": float(numbers(rows, "min").min()),
        "max": float(numbers(rows, "max").max()),
        "std_of_scan_means": float(means.std()),
        "border_mean": float(numbers(rows, "border_mean").mean()),
        "histogram": [float(share) for share in shares],
    }


def _five_numbers(x: np.ndarray) -> dict[str, float] | None:
    if not len(x):
        return None
    low, first, median, third, high = np.percentile(x, (0, 25, 50, 75, 100)).tolist()
    return {"min": low, "q1": first, "median": median, "q3": third, "max": high}
