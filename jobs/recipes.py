"""`bt recipes`: what recipes there are, and what one of them builds."""

import json
from typing import Annotated

import typer

from bt_core.errors import EXIT_OK
from jobs.recipes_folder import RECIPES

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of a recipe, or a .yaml file.")
]


def run_list() -> int:
    """List the recipes: task, backbone, where its weights come from, and what it is."""
    from bt_core.config import load_yaml
    from bt_core.training.recipe import recipe_names

    for name in recipe_names(RECIPES):
        content = load_yaml(str(RECIPES / f"{name}.yaml"))
        model = content["model"]
        print(
            f"{name:<28}{content.get('task', 'four_class'):<12}{model['backbone']:<18}"
            f"{model.get('weights', 'hub'):<6}{content.get('description', '')}"
        )
    return EXIT_OK


def run_show(
    name: NameArgument,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override, as in --set train.epochs=3."),
    ] = None,
) -> int:
    """Show a recipe with every setting as resolved, its layers, and its number of parameters."""
    import yaml

    from bt_core.labels import LABEL_SPACES
    from bt_core.models.classifier import rebuild_classifier
    from bt_core.models.summary import layer_table
    from bt_core.training.recipe import load_recipe, recipe_path

    recipe = load_recipe(name, RECIPES, settings or [])
    for line in recipe_path(name, RECIPES).read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        print(line)
    print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=100))
    num_classes = LABEL_SPACES[recipe.task].num_classes
    model = rebuild_classifier(recipe.model, recipe.preprocess, num_classes)
    side = recipe.preprocess.size_px
    rows = layer_table(model, (recipe.preprocess.channels, side, side))
    print(f"{'layer':<44}{'kind':<22}{'output':<18}{'parameters':>12}")
    for row in rows:
        shape = "x".join(map(str, row.output_shape))
        print(f"{row.name:<44}{row.kind:<22}{shape:<18}{row.num_parameters:>12,}")
    print(f"{'all':<84}{sum(p.numel() for p in model.parameters()):>12,}")
    return EXIT_OK


def run_schema() -> int:
    """Print the JSON schema of a recipe, with which editors complete and check YAML."""
    from bt_core.training.recipe import Recipe

    print(json.dumps(Recipe.file_schema(), indent=2))
    return EXIT_OK


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("recipes")
