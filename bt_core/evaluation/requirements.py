"""Requirements on figures, such as `clean.macro_f1>=0.95`, for the continuous testing of models."""

import difflib
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np

from bt_core.errors import UsageError
from bt_core.evaluation.metrics import figures_of

_COMPARE: Final[dict[str, Callable[[float, float], bool]]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_ESTIMATE: Final = re.compile(
    r"(?:clean|all|answered)\.(?:by_scan\.|by_family\.)?(.+?)(?:\.(?:value|low|high))?"
)
_SECTIONS: Final = frozenset(
    {"num_scans", "num_families", "counts", "calibration", "calibration_before", "deferral",
     "prediction_sets", "rule_out", "decision_curves"}
)  # fmt: skip
"""Of `report.evaluate` beside the figures with estimates."""
_FORM: Final = re.compile(r"\s*([\w.\- ]+?)\s*(>=|<=|>|<)\s*([-+.\deE]+)\s*")


@dataclass(frozen=True)
class Requirement:
    """One figure and its bound.

    Attributes:
        key: as in metrics.json, such as `clean.by_family.accuracy.low`; what is left out is
            `by_scan` and `value`, so `clean.accuracy` is `clean.by_scan.accuracy.value`.
        comparison: `>=`, `<=`, `>` or `<`.
        bound: what it is compared with.
    """

    key: str
    comparison: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `KEY>=NUMBER`.

        Raises:
            UsageError: if it has another form.
        """
        found = _FORM.fullmatch(text)
        try:
            if found is not None:
                return cls(found[1], found[2], float(found[3]))
        except ValueError:
            pass
        raise UsageError(f"--require {text!r}: write KEY>=NUMBER, as in clean.macro_f1>=0.95")

    def refuse_unknown(self, names: Sequence[str], healthy: int) -> None:
        """Raise UsageError for a figure of metrics.json that no evaluation has.

        For use before a test split is opened, which counts. Keys below another section than the
        figures with estimates are left to `check`.

        Args:
            names: K class names.
            healthy: index of the class without a tumour.
        """
        found = _ESTIMATE.fullmatch(self.key)
        if found is None or found[1].split(".")[0] in _SECTIONS:
            return
        num_classes = len(names)
        ones = np.ones((num_classes, 1))
        shares_K = np.full(num_classes, 1 / num_classes)
        known = figures_of(
            np.arange(num_classes), np.eye(num_classes), ones, names, healthy, shares_K
        )
        if found[1] not in known:
            raise UsageError(self._unknown(list(known), f"{self.key.split('.')[0]}."))

    def _unknown(self, known: Sequence[str], prefix: str = "") -> str:
        alike = difflib.get_close_matches(self.key, [prefix + name for name in known], n=3)
        advice = f"did you mean {', '.join(alike)}" if alike else "metrics.json lists them all"
        return f"--require: no figure {self.key!r}; {advice}"

    def check(self, figures: dict[str, Any]) -> tuple[bool, str]:
        """Return whether figures meet it, and a line that says so; what is not defined does not.

        Raises:
            UsageError: if there is no such figure; names those that are alike.
        """
        values: dict[str, float | None] = {}
        for key, number in _numbers(figures):
            short = key.replace(".by_scan.", ".")
            values |= dict.fromkeys(
                (key, short, key.removesuffix(".value"), short.removesuffix(".value")), number
            )
        if self.key not in values:
            raise UsageError(self._unknown(list(values)))
        value = values[self.key]
        met = value is not None and _COMPARE[self.comparison](value, self.bound)
        shown = "not defined" if value is None else f"{value:.4f}"
        word = "met" if met else "NOT MET"
        return met, f"required {self.key} {self.comparison} {self.bound:g}: {shown}, {word}"


def _numbers(figures: Any, key: str = "") -> Iterator[tuple[str, float | None]]:
    """Yield the dotted key of every number, and of what is not defined."""
    if isinstance(figures, dict):
        for name, value in figures.items():
            yield from _numbers(value, f"{key}.{name}" if key else str(name))
    elif figures is None or (isinstance(figures, int | float) and not isinstance(figures, bool)):
        yield key, figures
