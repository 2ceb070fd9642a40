"""`bt bench`: this project against plain PyTorch, both sides in one run on the same cores."""

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Annotated, Any

import typer

from bt_core import storage
from bt_core.errors import EXIT_OK
from jobs.command import BundleArgument, DataOption, SourceArgument
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


def run_score(
    bundle: BundleArgument,
    source: SourceArgument,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the sides take turns.")] = 3,
    as_json: JsonOption = False,
) -> int:
    """Score a zip with `bt score` and with a DataLoader loop, archive to Parquet: scans/s.

    Both sides start cold in a process of their own; starting Ray, loading and writing count. The
    rate without start-up is shown beside it.
    """
    sides: dict[str, list[float]] = {"plain": [], "ray": [], "ray_warm": []}
    agreement = 1.0
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            args = (storage.absolute(bundle), storage.absolute(source), folder)
            num, seconds = apart(_plain_score_seconds, *args)
            sides["plain"].append(num / seconds)
            num, seconds, warm = apart(_ray_score_seconds, *args)
            sides["ray"].append(num / seconds)
            sides["ray_warm"].append(num / warm)
            agreement = min(agreement, _agreement(folder))
        print(f"round {number + 1}: " + medians_line(sides), flush=True)
    medians = {side: statistics.median(rates) for side, rates in sides.items()}
    print(
        f"bt score: {medians['ray'] / medians['plain']:.2f} of the plain loop's scans/s with Ray's "
        f"start, {medians['ray_warm'] / medians['plain']:.2f} without; labels agree on "
        f"{agreement:.2%}"
    )
    if as_json:
        print(
            json.dumps(
                {
                    "ratio": medians["ray"] / medians["plain"],
                    "ratio_warm": medians["ray_warm"] / medians["plain"],
                    "agreement": agreement,
                    "scans_per_second": sides,
                }
            )
        )
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


def _plain_score_seconds(bundle: str, source: str, folder: str) -> tuple[int, float]:
    started = time.perf_counter()
    import torch

    from bt_core.ensemble.calibration import combine
    from bt_core.errors import UsageError
    from bt_core.inference.predictor import Predictor
    from bt_core.models.bundle import Bundle
    from bt_core.scans.archives import list_scans
    from jobs.baselines import plain_score

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    opened = Bundle(bundle)
    predictor, info = Predictor(opened), opened.info
    if len(predictor.specs) != 1:
        raise UsageError(
            "the plain loop has one preprocessing; use a bundle whose members share one"
        )
    members = [m.temperature for m in info.members]
    shares = [m.weight for m in info.members]
    names = [ref.member for ref in list_scans(source).refs]
    num = plain_score(
        source,
        names,
        predictor.specs[0],
        lambda pixels: combine(predictor.logits([pixels]), shares, members, info.temperature),
        info.label_space.names,
        f"{folder}/plain.parquet",
        num_workers=2,
    )
    return num, time.perf_counter() - started


def _ray_score_seconds(bundle: str, source: str, folder: str) -> tuple[int, float, float]:
    started = time.perf_counter()
    from bt_core.models.bundle import Bundle
    from cluster.session import session
    from jobs.score import score_source

    with session():
        warm = time.perf_counter()
        manifest, _ = score_source(Bundle(bundle), source, f"{folder}/ray", "cpu")
        ended = time.perf_counter()
    return manifest["n_in"], ended - started, ended - warm


def _agreement(folder: str) -> float:
    """Return the share of scans that both sides give the same likeliest class."""
    import numpy as np

    plain = storage.read_table(f"{folder}/plain.parquet").sort_by("member")
    ours = storage.read_table(f"{folder}/ray/scores").sort_by("member")
    names = [name for name in plain.column_names if name.startswith("prob_")]
    stacked = [np.stack([t[name].to_numpy() for name in names], 1) for t in (plain, ours)]
    return float((stacked[0].argmax(1) == stacked[1].argmax(1)).mean())


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
