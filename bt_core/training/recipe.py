"""A recipe is one run: task, preprocessing, augmentation, model and training, in one YAML file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from bt_core import storage
from bt_core.config import StrictModel, apply_overrides, load_yaml, parse
from bt_core.errors import ConfigError
from bt_core.labels import Task
from bt_core.models.backbones import input_size_px
from bt_core.models.spec import ModelSpec
from bt_core.scans.preprocess import PreprocessSpec


class AugmentSpec(StrictModel):
    """Random changes of training images, drawn anew for every image and epoch."""

    horizontal_flip: bool = True
    rotation_degrees: float = Field(15.0, ge=0, le=180)
    """Largest rotation to either side."""
    zoom: float = Field(0.1, ge=0, lt=1)
    """Scale is drawn from 1 - zoom to 1 + zoom."""
    contrast: float = Field(0.2, ge=0, lt=1)
    """Contrast factor about the image's mean is drawn from 1 - contrast to 1 + contrast."""


class TrainSpec(StrictModel):
    """How the weights are fitted."""

    epochs: int = Field(6, ge=1)
    batch_size: int = Field(32, ge=2)
    """Scans per step over all workers together."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    """Peak rate of the schedule."""
    weight_decay: float = Field(0.01, ge=0)
    schedule: Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    class_weights: bool = False
    """Weigh each class by the inverse of its share in the training scans."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many epochs without a better validation score; None trains them all."""
    seed: int = 0


class Recipe(StrictModel):
    """One training run, complete."""

    name: str
    description: str = ""
    task: Task = "four_class"
    preprocess: PreprocessSpec = PreprocessSpec()
    augment: AugmentSpec = AugmentSpec()
    model: ModelSpec
    train: TrainSpec = TrainSpec()

    @property
    def digest(self) -> str:
        """Digest of every setting."""
        return storage.digest_of(self.model_dump(mode="json"))


def recipe_names(folder: Path) -> list[str]:
    """Return the names of the recipes in a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def recipe_path(name: str, folder: Path) -> Path:
    """Return the file of a recipe, given by name or path.

    Raises:
        ConfigError: if there is no such recipe; lists those there are.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"no recipe {name!r}; there are: {', '.join(recipe_names(folder))}, or a .yaml file"
        )
    return path


def load_recipe(name: str, folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by name or path, with `section.key=value` overrides applied.

    One that does not state `preprocess.size_px` gets the backbone's own.

    Raises:
        ConfigError: if there is no such recipe (lists those there are) or it does not validate.
        WeightsError: if it asks the weights' folder for the size, and that is not one of timm's.
    """
    path = recipe_path(name, folder)
    content: dict[str, Any] = {"name": path.stem, **load_yaml(str(path))}
    content = apply_overrides(content, list(overrides))
    recipe = parse(Recipe, content, f"recipe {name}")
    own = None if "size_px" in content.get("preprocess", {}) else input_size_px(recipe.model)
    if own is None:
        return recipe
    preprocess = recipe.preprocess.model_copy(update={"size_px": own})
    return recipe.model_copy(update={"preprocess": preprocess})
