"""Grouped, stratified, seeded splits: what is identical never crosses a border."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

SPLITS: Final = ("train", "validation", "test")


def grouped_split(
    groups: Sequence[str],
    labels: Sequence[str],
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    seed: int = 0,
) -> list[str]:
    """Assign every scan to train, validation or test.

    Whole groups are dealt class by class, in an order given by a keyed hash of the group's name,
    each to the split that is furthest below its share of that class. So shares hold per class up to
    one group, and the answer does not depend on the order of the rows.

    Args:
        groups: N names; scans of one group stay together.
        labels: N class names; all scans of a group must have the same one.
        fractions: shares of train, validation and test; positive, sum 1.
        seed: changes the order of the deal.

    Returns:
        N split names.

    Raises:
        ValueError: if the fractions do not sum to 1, or a group has two labels.
    """
    if abs(sum(fractions) - 1) > 1e-9 or min(fractions) <= 0:
        raise ValueError(f"fractions must be positive and sum to 1, got {fractions}")
    members: dict[str, list[int]] = defaultdict(list)
    label_of: dict[str, str] = {}
    for i, (group, label) in enumerate(zip(groups, labels, strict=True)):
        if label_of.setdefault(group, label) != label:
            raise ValueError(f"group {group} has the labels {label_of[group]} and {label}")
        members[group].append(i)
    result = [""] * len(groups)
    for label in sorted(set(labels)):
        own = sorted((g for g in members if label_of[g] == label), key=lambda g: _rank(g, seed))
        total = sum(len(members[g]) for g in own)
        filled = [0, 0, 0]
        for group in own:
            room = [share * total - have for share, have in zip(fractions, filled, strict=True)]
            target = max(range(3), key=lambda k: room[k] / fractions[k])
            filled[target] += len(members[group])
            for i in members[group]:
                result[i] = SPLITS[target]
    return result


def _rank(group: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{group}".encode()).digest()
