"""A recipe is one run: task, preprocessing, augmentation, model and training, in one YAML file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bt_core import storage
from bt_core.config import StrictModel, apply_overrides, load_yaml, parse
from bt_core.errors import ConfigError
from bt_core.labels import Task
from bt_core.models.backbones import input_size_px
from bt_core.models.spec import ModelSpec
from bt_core.scans.preprocess import PreprocessSpec
from bt_core.training.spec import AugmentSpec, TrainSpec


class Recipe(StrictModel):
    """One training run, complete."""

    name: str
    description: str = ""
    task: Task = "four_class"
    preprocess: PreprocessSpec = PreprocessSpec()
    augment: AugmentSpec = AugmentSpec()
    model: ModelSpec
    train: TrainSpec = TrainSpec()

    @classmethod
    def file_schema(cls) -> dict[str, Any]:
        """Return the JSON schema of a recipe's file, whose name may be left to the file's."""
        schema = cls.model_json_schema()
        schema["required"] = [key for key in schema["required"] if key != "name"]
        return schema

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
