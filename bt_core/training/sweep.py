"""What a sweep tries: recipes, a search space over their dotted keys, and how trials are judged."""

import fnmatch
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from bt_core import storage
from bt_core.config import OneOf, StrictModel, apply_overrides, load_yaml, parse, with_values
from bt_core.errors import ConfigError
from bt_core.scans.preprocess import PreprocessSpec
from bt_core.training.engine import SCORE
from bt_core.training.recipe import Recipe, load_recipe, recipe_names

Metric = Literal["val_score", "val_macro_f1", "val_accuracy", "val_log_loss"]
MODES: Final[dict[str, Literal["max", "min"]]] = {
    SCORE: "max", "val_macro_f1": "max", "val_accuracy": "max", "val_log_loss": "min",
}  # fmt: skip
"""Whether more or less of a metric is better."""


class Dimension(OneOf):
    """Values that one key of a recipe may take; exactly one field is given."""

    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """One of these."""
    uniform: tuple[float, float] | None = None
    """A number between two bounds."""
    log_uniform: tuple[PositiveFloat, PositiveFloat] | None = None
    """A number between two bounds, its logarithm drawn uniformly."""
    int_range: tuple[int, int] | None = None
    """A whole number between two bounds, both included."""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        bounds = self.uniform or self.log_uniform or self.int_range
        if bounds and bounds[0] >= bounds[1]:
            raise ValueError(f"bounds must rise, got {bounds}")
        return self

    def ends(self) -> tuple[Any, ...]:
        """Return every choice, or both bounds."""
        ends = self.choice or self.uniform or self.log_uniform or self.int_range
        assert ends is not None
        return ends

    def values(self) -> tuple[Any, ...] | None:
        """Return all values if they can be counted, else None."""
        if self.int_range is not None:
            return tuple(range(self.int_range[0], self.int_range[1] + 1))
        return self.choice


class SweepSpec(StrictModel):
    """One sweep, complete; a YAML file."""

    description: str = ""
    recipes: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of recipes, with * and ? for any letters, or .yaml files."""
    backbones: tuple[str, ...] = ()
    """Each takes the place of every recipe's own, with its own input size where the recipe states
    none; without any, recipes keep theirs."""
    fixed: dict[str, Any] = Field(default_factory=dict)
    """Dotted recipe key to the value that it has in every trial."""
    space: dict[str, Dimension] = Field(default_factory=dict)
    """Dotted recipe key to what is tried; without any, each recipe is tried as it stands."""
    search: Literal["random", "grid", "optuna"] = "random"
    """Optuna's TPE also chooses among the recipes; random and grid try each of them alike."""
    num_samples: PositiveInt = 1
    """Points of the space per recipe; a grid has its own number."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """Which trials are stopped early: the worse ones at each rung, those below the median, none."""
    reduction_factor: int = Field(3, ge=2)
    """ASHA goes on with one in this many of the trials at each rung."""
    folds: PositiveInt = 3
    """Folds by group over the train and validation scans; 1 keeps the dataset's own validation."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    """Each fold is trained once with each seed."""
    epochs: PositiveInt | None = None
    """In place of the recipes' own."""
    metric: Metric = SCORE  # type: ignore[assignment]
    """What is compared, on validation scans, at the epoch that the recipe keeps."""
    missing_weights: Literal["error", "none"] = "error"
    """What to do with a recipe whose initial weights cannot be had: stop, or start it from none
    (the leaderboard then says so)."""
    max_concurrent: PositiveInt | None = None
    """Trials at once; None fills the cluster."""
    cpus_per_trial: PositiveInt = 1
    """Threads that a trial computes with, and logical CPUs that it holds."""
    gpus_per_trial: float | None = Field(None, ge=0)
    """None is one where the cluster has GPUs."""
    time_budget_minutes: PositiveFloat | None = None
    """What runs then is stopped, and ranked behind what was finished."""
    seed: int = 0
    """Of the search."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ, got {self.seeds}")
        both = sorted(set(self.fixed) & set(self.space))
        if both:
            raise ValueError(f"{', '.join(both)} stands in fixed and in space; keep one")
        if self.num_samples > 1 and not self.space:
            raise ValueError("num_samples has no effect without a space")
        if self.num_samples > 1 and self.search == "grid":
            raise ValueError("num_samples has no effect on a grid; it tries every combination once")
        endless = sorted(key for key, d in self.space.items() if d.values() is None)
        if self.search == "grid" and endless:
            raise ValueError(f"a grid needs choices or whole numbers for {', '.join(endless)}")
        pixels = [key for key in endless if key.startswith("preprocess.")]
        if pixels:
            raise ValueError(
                f"{', '.join(pixels)}: preprocessing is searched by choices, since the pixels of "
                "each are stored before the sweep"
            )
        if "model.backbone" in {*self.fixed, *self.space}:
            raise ValueError(
                "list backbones in the sweep's own `backbones`, not as model.backbone, so that "
                "each gets its own input size and initial weights"
            )
        owned = {"name", "task", "train.seed"} | ({"train.epochs"} if self.epochs else set())
        wrong = sorted(owned & {*self.fixed, *self.space})
        if wrong:
            raise ValueError(f"{', '.join(wrong)} is set by the sweep itself (seeds, epochs, data)")
        return self

    @property
    def fits(self) -> list[tuple[int, int]]:
        """Fold and seed of every training in a trial, in order."""
        return [(fold, seed) for seed in self.seeds for fold in range(self.folds)]

    def num_trials(self, num_candidates: int) -> int:
        """Return the number of trials, for that many recipes (times backbones)."""
        if self.search != "grid":
            return self.num_samples * num_candidates
        values = (dimension.values() or () for dimension in self.space.values())
        return math.prod(map(len, values)) * num_candidates

    @property
    def digest(self) -> str:
        """Digest of all that decides the trials; how many run at once does not."""
        free = {"max_concurrent", "time_budget_minutes", "description"}
        return storage.digest_of(self.model_dump(mode="json", exclude=free))


@dataclass(frozen=True)
class Candidate:
    """A recipe of the sweep as trials start from it.

    Attributes:
        name: of the recipe.
        content: its settings in JSON form, with what is fixed for all trials.
        notes: how it differs from the recipe file, for people.
        started_from: see `weights.initial_sha256`.
    """

    name: str
    content: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    started_from: str = "none"

    def recipe(self, point: Mapping[str, Any]) -> Recipe:
        """Return the recipe of one trial.

        Args:
            point: dotted key to value.

        Raises:
            ConfigError: if the recipe does not validate with it.
        """
        return parse(Recipe, with_values(self.content, point), f"recipe {self.name}")


def load_sweep(location: str, overrides: Sequence[str] = ()) -> SweepSpec:
    """Load a sweep's YAML file, with `key=value` overrides applied.

    Raises:
        ConfigError: with every fault.
    """
    return parse(SweepSpec, apply_overrides(load_yaml(location), list(overrides)), location)


def candidates(spec: SweepSpec, folder: Path, task: str) -> list[Candidate]:
    """Return the sweep's recipes, each checked with every choice and bound of the space.

    Args:
        spec: the sweep.
        folder: where recipes with a name are.
        task: of the dataset; a recipe for another one is trained for this one, and noted.

    Raises:
        ConfigError: if a recipe does not exist or does not validate.
    """
    found = []
    for recipe in _recipes(spec, folder):
        values = {**spec.fixed, "task": task}
        notes = [] if recipe.task == task else [f"for {task} here, {recipe.task} in its file"]
        if spec.epochs is not None:
            values["train.epochs"] = spec.epochs
        content = with_values(recipe.model_dump(mode="json"), values)
        candidate = Candidate(recipe.name, content, notes)
        candidate.recipe({})
        first = {key: dimension.ends()[0] for key, dimension in spec.space.items()}
        for key, dimension in spec.space.items():
            for end in dimension.ends():
                _checked(candidate, {**first, key: end}, key)
        found.append(candidate)
    names = [candidate.name for candidate in found]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ConfigError(f"recipes: two are named {', '.join(doubled)}; rename one")
    return found


def _checked(candidate: Candidate, point: dict[str, Any], key: str) -> None:
    """Check a value; if it only clashes with the first choices of other keys, let the trial say."""
    try:
        candidate.recipe({key: point[key]})
    except ConfigError:
        candidate.recipe(point)


def preprocessings(spec: SweepSpec, found: list[Candidate]) -> list[PreprocessSpec]:
    """Return every preprocessing that a trial may need, each kind of stored pixels once."""
    needed: dict[str, PreprocessSpec] = {}
    for candidate, point in itertools.product(found, _pixel_points(spec)):
        try:
            preprocess = candidate.recipe(point).preprocess
        except ConfigError:  # that combination becomes a failed trial with its reason
            continue
        needed.setdefault(preprocess.pixel_digest, preprocess)
    return list(needed.values())


def _pixel_points(spec: SweepSpec) -> Iterator[dict[str, Any]]:
    keys = [key for key in spec.space if key.startswith("preprocess.")]
    for values in itertools.product(*(spec.space[key].values() or () for key in keys)):
        yield dict(zip(keys, values, strict=True))


def _recipes(spec: SweepSpec, folder: Path) -> Iterator[Recipe]:
    """Yield the recipes as in their files, or once with each backbone of the sweep."""
    for name in _names(spec, folder):
        if not spec.backbones:
            yield load_recipe(name, folder)
        for backbone in spec.backbones:
            recipe = load_recipe(name, folder, [f"model.backbone={backbone}"])
            yield recipe.model_copy(update={"name": f"{recipe.name}-{backbone}"})


def _names(spec: SweepSpec, folder: Path) -> list[str]:
    """Resolve patterns; a name that is met twice counts once."""
    there = recipe_names(folder)
    names: dict[str, None] = {}
    for wanted in spec.recipes:
        matched = fnmatch.filter(there, wanted) if set(wanted) & set("*?[") else [wanted]
        if not matched:
            raise ConfigError(f"recipes: no recipe is like {wanted!r}; there are {there}")
        names.update(dict.fromkeys(matched))
    return list(names)
