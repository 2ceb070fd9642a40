"""`bt bench`: this project against plain PyTorch, both sides in one run on the same cores."""

import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Annotated, Any

import typer

from bt_core import storage
from bt_core.errors import EXIT_OK
from jobs.options import DataOption
from jobs.recipes_folder import RECIPES

JsonOption = Annotated[bool, typer.Option("--json", help="Print one last line of JSON.")]


def run_train(
    data: DataOption,
    recipe: Annotated[str, typer.Option("--recipe", help="Name of a recipe.")] = "mobilenetv2",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=2, help="Epochs of each round.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the sides take turns.")] = 2,
    as_json: JsonOption = False,
) -> int:
    """Train by a plain loop, by Ray Train with one worker, and with two: images/s of the epochs.

    Each side has all cores; two workers have half of the threads each, and half of each batch.
    """
    from bt_core.data.catalog import Dataset
    from bt_core.training.recipe import load_recipe

    overrides = [*(settings or []), f"train.epochs={epochs}"]
    loaded = load_recipe(recipe, RECIPES, overrides)
    dataset = Dataset(data)
    apart(_write_view, dataset.location, loaded.model_dump_json())
    sides: dict[str, list[float]] = {"plain": [], "one worker": [], "two workers": []}
    waits: dict[str, list[float]] = {"one worker": [], "two workers": []}
    args = (dataset.location, loaded.model_dump_json())
    for number in range(rounds):
        sides["plain"] += apart(_plain_train_rates, *args)
        for num_workers, side in enumerate(waits, 1):
            figures = apart(_ray_train_figures, *args, num_workers)
            sides[side] += [epoch["images_per_second"] for epoch in figures]
            waits[side] += [epoch["data_wait"] for epoch in figures]
        print(f"round {number + 1}: " + medians_line(sides), flush=True)
    medians = {side: statistics.median(rates) for side, rates in sides.items()}
    ratios = {
        "one worker against the plain loop": medians["one worker"] / medians["plain"],
        "two workers against one": medians["two workers"] / medians["one worker"],
    }
    data_wait = {side: statistics.median(own) for side, own in waits.items()}
    for what, ratio in ratios.items():
        print(f"Ray Train, {what}: {ratio:.2f} of its images/s (medians of epochs)")
    print("waiting for data: " + ", ".join(f"{s} {share:.1%}" for s, share in data_wait.items()))
    if as_json:
        print(json.dumps({"ratios": ratios, "data_wait": data_wait, "images_per_second": sides}))
    return EXIT_OK


def _write_view(dataset_location: str, recipe_json: str) -> None:
    """Write the shards before the rounds, so that no Ray runs beside the plain loop."""
    from bt_core.data.catalog import Dataset
    from bt_core.data.views import ensure_view
    from bt_core.training.recipe import Recipe
    from cluster.session import session

    with session():
        ensure_view(Dataset(dataset_location), Recipe.model_validate_json(recipe_json).preprocess)


def _plain_train_rates(dataset_location: str, recipe_json: str) -> list[float]:
    import numpy as np
    import torch

    from bt_core.data.catalog import Dataset
    from bt_core.data.views import ensure_view
    from bt_core.models.classifier import build_classifier
    from bt_core.models.inputs import Preprocessor
    from bt_core.training.recipe import Recipe
    from jobs.baselines import plain_train

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    recipe, dataset = Recipe.model_validate_json(recipe_json), Dataset(dataset_location)
    view = ensure_view(dataset, recipe.preprocess)
    table = storage.read_table(storage.join(view, "split=train"))
    side = recipe.preprocess.size_px
    pixels = np.stack(
        [np.array(p, np.uint8).reshape(side, side) for p in table["pixels"].to_pylist()]
    )
    model, _, spec = build_classifier(
        recipe.model, recipe.preprocess, dataset.info.label_space.num_classes
    )
    labels = np.array(table["label"].to_pylist())
    return plain_train(model, recipe, Preprocessor(spec), pixels, labels, recipe.train.epochs)


def _ray_train_figures(
    dataset_location: str, recipe_json: str, num_workers: int
) -> list[dict[str, Any]]:
    from bt_core.data.catalog import Dataset
    from bt_core.training.launch import plan_scaling, train
    from bt_core.training.recipe import Recipe
    from cluster.session import session

    recipe = Recipe.model_validate_json(recipe_json)
    with session() as resources, tempfile.TemporaryDirectory() as folder:
        scaling = plan_scaling(num_workers, "cpu", resources.num_cpus, resources.num_gpus)
        run = train(recipe, Dataset(dataset_location), f"{folder}/run", scaling)
        return run.history()


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a fresh process, so that the sides share no warm state."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *args).result()


def medians_line(sides: dict[str, list[float]]) -> str:
    """Return the median rate of each side, as printed after each round."""
    return ", ".join(f"{side} {statistics.median(rates):.1f}/s" for side, rates in sides.items())


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("bench")
