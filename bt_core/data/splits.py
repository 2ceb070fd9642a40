"""Grouped, stratified, seeded splits: copies of a scan, and a patient's scans, stay together."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import numpy as np
import pyarrow as pa

from bt_core.config import StrictModel
from bt_core.errors import SourceError

SPLITS: Final = ("train", "validation", "test")


_TRAINED_BEFORE: Final[dict[str, set[str]]] = {
    "train": set(),
    "validation": {"train"},
    "test": {"train", "validation"},
}


class SplitPlan(StrictModel):
    """How a dataset is split."""

    by: Literal["family", "given"] = "family"
    """By families of copies (and patients), or the source's own Training and Testing folders."""
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Of train, validation and test; only the first two count for a given split."""
    num_folds: int = 5
    seed: int = 0


def assign_splits(
    catalog: pa.Table, plan: SplitPlan, previous: Mapping[str, str] | None = None
) -> pa.Table:
    """Add the columns `split`, `fold` and `copy_in_training` to a catalog with families.

    Args:
        catalog: rows with label, given_split, reason, group and pixel_sha256.
        plan: how to split.
        previous: pixel digest to split in an earlier dataset; what was there keeps its split, and
            its group with it. A group that stood on two sides joins training: it cannot test.

    Returns:
        The catalog. `split` is empty for what is left out. `fold`, 0 up, divides all scans but the
        test scans by group; -1 elsewhere. `copy_in_training` marks validation scans whose group has
        a scan in train, and test scans whose group has one in train or validation, by which epochs
        and thresholds are chosen; only a given split leaves any there.

    Raises:
        SourceError: if the given split is asked for and some usable scan has none.
    """
    columns = catalog.select(
        ["label", "given_split", "reason", "group", "pixel_sha256"]
    ).to_pydict()
    usable = [i for i, reason in enumerate(columns["reason"]) if not reason]
    groups = [columns["group"][i] for i in usable]
    labels = [columns["label"][i] for i in usable]
    if plan.by == "given":
        splits = _given(groups, labels, [columns["given_split"][i] for i in usable], plan)
    else:
        keep = _kept(groups, [columns["pixel_sha256"][i] for i in usable], previous or {})
        splits = grouped_split(groups, labels, plan.fractions, plan.seed, keep=keep)
    sides: dict[str, set[str]] = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        sides[group].add(split)
    inner = [k for k, split in enumerate(splits) if split != "test"]
    inner_groups, inner_labels = [groups[k] for k in inner], [labels[k] for k in inner]
    folds = grouped_folds(inner_groups, inner_labels, plan.num_folds, plan.seed)
    split_N, fold_N = [""] * catalog.num_rows, [-1] * catalog.num_rows
    copied_N = [False] * catalog.num_rows
    for i, group, split in zip(usable, groups, splits, strict=True):
        split_N[i] = split
        copied_N[i] = bool(sides[group] & _TRAINED_BEFORE[split])
    for k, fold in zip(inner, folds, strict=True):
        fold_N[usable[k]] = fold
    catalog = catalog.append_column("split", pa.array(split_N, pa.string()))
    catalog = catalog.append_column("fold", pa.array(fold_N, pa.int64()))
    return catalog.append_column("copy_in_training", pa.array(copied_N, pa.bool_()))


def _given(groups: list[str], labels: list[str], given: list[str], plan: SplitPlan) -> list[str]:
    """Keep the given split; cut validation from its training scans if it has none.

    A group with a test scan stays in training: validation, which chooses, must not have seen it.
    """
    if "" in given or "train" not in given or "test" not in given:
        raise SourceError(
            f"--split given needs every scan below a Training or Testing folder; {given.count('')} "
            f"of {len(given)} are not. Leave the option out to split by families"
        )
    if "validation" in given:
        return given
    train, validation, _ = plan.fractions
    shares = [train / (train + validation), validation / (train + validation)]
    tested = {group for group, split in zip(groups, given, strict=True) if split == "test"}
    inner = [k for k, split in enumerate(given) if split == "train" and groups[k] not in tested]
    own = grouped_split(
        [groups[k] for k in inner], [labels[k] for k in inner], shares, plan.seed, SPLITS[:2]
    )
    result = list(given)
    for k, split in zip(inner, own, strict=True):
        result[k] = split
    return result


def _kept(groups: list[str], digests: list[str], previous: Mapping[str, str]) -> dict[str, str]:
    kept: dict[str, str] = {}
    for group, digest in zip(groups, digests, strict=True):
        split = previous.get(digest)
        if split and kept.setdefault(group, split) != split:
            kept[group] = "train"
    return kept


def grouped_split(
    groups: Sequence[str],
    labels: Sequence[str],
    fractions: Sequence[float],
    seed: int = 0,
    names: Sequence[str] = SPLITS,
    keep: Mapping[str, str] | None = None,
) -> list[str]:
    """Assign every scan to a split, whole groups at a time.

    The groups of a class stand in a line, ordered by a keyed hash of their name; the line is cut at
    the fractions of its scans. So shares hold for each class to within half a group at each cut,
    the order of the rows does not matter, and new groups move only groups at the cuts. A group that
    gains a scan may get another name, and so another place: `keep` holds what must not move.

    Args:
        groups: N names; scans of one group stay together.
        labels: N class names; a group counts for its most frequent one.
        fractions: shares of the splits; positive, sum 1.
        seed: changes the order of the line.
        names: of the splits.
        keep: split of groups that have one already; the others fill up what is missing.

    Returns:
        N names of splits. None is empty for a class that has enough groups.

    Raises:
        ValueError: if the fractions are not positive or do not sum to 1.
    """
    if abs(sum(fractions) - 1) > 1e-9 or min(fractions) <= 0:
        raise ValueError(f"fractions must be positive and sum to 1, got {tuple(fractions)}")
    members: dict[str, list[str]] = defaultdict(list)
    for group, label in zip(groups, labels, strict=True):
        members[group].append(label)
    split_of = {group: split for group, split in (keep or {}).items() if group in members}
    lines: dict[str, list[str]] = defaultdict(list)
    kept: dict[str, Counter[str]] = defaultdict(Counter)
    for group, own in members.items():
        label = min(own, key=lambda name: (-own.count(name), name))
        if group in split_of:
            kept[label][split_of[group]] += len(own)
        else:
            lines[label].append(group)
    for label, line in lines.items():
        line.sort(key=lambda group: _rank(group, seed))
        sizes = np.array([len(members[group]) for group in line])
        total = sizes.sum() + kept[label].total()
        wanted = [f * total - kept[label][n] for f, n in zip(fractions, names, strict=True)]
        for group, part in zip(line, _cut(sizes, np.array(wanted)), strict=True):
            split_of[group] = names[part]
    return [split_of[group] for group in groups]


def grouped_folds(
    groups: Sequence[str], labels: Sequence[str], num_folds: int, seed: int
) -> list[int]:
    """Return the fold, 0 up, of every scan; whole groups at a time, as `grouped_split` does.

    Args:
        groups: N names; scans of one group stay together.
        labels: N class names.
        num_folds: two at least.
        seed: of the dataset's plan; its folds are independent of its splits.
    """
    names, shares = [str(k) for k in range(num_folds)], [1 / num_folds] * num_folds
    return [int(fold) for fold in grouped_split(groups, labels, shares, seed + 1, names)]


def _cut(sizes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the part that each group of a line falls into, by the middle of the group.

    Every part that wants scans gets a group, as long as there are groups enough.
    """
    wanted = np.maximum(wanted, 0)
    edges = np.cumsum(wanted)[:-1] / wanted.sum() * sizes.sum()
    middles = np.cumsum(sizes) - sizes / 2
    cuts = np.searchsorted(middles, edges)
    if len(sizes) >= len(wanted) and wanted.min() > 0:
        for k in range(len(cuts)):
            after = cuts[k - 1] + 1 if k else 1
            cuts[k] = np.clip(cuts[k], after, len(sizes) - len(cuts) + k)
    return np.searchsorted(cuts, np.arange(len(sizes)), side="right")


def _rank(group: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{group}".encode()).digest()
