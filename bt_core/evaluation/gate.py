"""Requirements on figures, such as `clean.macro_f1>=0.95`, for the continuous testing of models."""

import difflib
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Self

from bt_core.errors import UsageError

_COMPARE: Final[dict[str, Callable[[float, float], bool]]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
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
            alike = difflib.get_close_matches(self.key, values, n=3)
            raise UsageError(
                f"--require: no figure {self.key!r}; "
                + (f"did you mean {', '.join(alike)}" if alike else "metrics.json lists them all")
            )
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
