"""`bt train`: one recipe on one dataset becomes a run."""

from typing import Annotated

import typer

from bt_core import storage
from bt_core.errors import EXIT_OK, UsageError
from jobs.options import DataOption, DeviceOption, OutOption, OverwriteOption
from jobs.output_folders import make_room
from jobs.recipes_folder import RECIPES


def _without_password(uri: str | None) -> str | None:
    """Refuse a URI with a password before it is sent to a cluster as part of the command."""
    from bt_core.training.tracking import check_mlflow_uri

    if uri is not None:
        try:
            check_mlflow_uri(uri)
        except UsageError as error:
            raise typer.BadParameter(str(error)) from None
    return uri


def run(
    recipe: Annotated[str, typer.Option("--recipe", help="Name of a recipe, or a .yaml file.")],
    data: DataOption,
    out: OutOption = "",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override, as in --set train.epochs=3."),
    ] = None,
    num_workers: Annotated[
        int | None, typer.Option(min=1, help="Training workers. [default: one per GPU, else 1]")
    ] = None,
    device: DeviceOption = "auto",
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write event files into the run folder.")
    ] = False,
    mlflow: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            callback=_without_password,
            help="Log to MLflow too: a server, or a folder as file:///PATH. [extra: mlflow]",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> int:
    """Fine-tune one classifier, or go on with an interrupted run."""
    from bt_core.data.catalog import Dataset
    from bt_core.evaluation.plots import training_curves_png
    from bt_core.locks import locked
    from bt_core.training.launch import check_settings, plan_scaling, train
    from bt_core.training.recipe import load_recipe
    from bt_core.training.run_folder import as_begun
    from bt_core.training.tracking import tracking
    from cluster.session import choose_device, session

    loaded = load_recipe(recipe, RECIPES, settings or [])
    dataset = Dataset(data)
    check_settings(loaded, dataset)
    out = storage.absolute(out or f"runs/{loaded.name}")
    if not overwrite:
        device, num_workers = as_begun(out, device, num_workers)
    with session() as resources:
        chosen = choose_device(device, resources)
        scaling = plan_scaling(
            num_workers,
            chosen,
            resources.num_cpus,
            resources.num_gpus,
            resources.room(chosen),
        )
        if overwrite:  # not before all is known to be possible
            make_room(out, "started.json", "a run")
        with locked(out), tracking(loaded, out, tensorboard, mlflow) as trackers:
            finished = train(loaded, dataset, out, scaling, trackers)
    curves = training_curves_png(finished.history())
    storage.write_bytes(storage.join(out, "curves.png"), curves)
    kept, metrics = finished.info.kept_epoch, finished.info.metrics
    print(
        f"kept epoch {kept}: validation accuracy {metrics['val_accuracy']:.4f}, macro F1 "
        f"{metrics['val_macro_f1']:.4f} on {metrics['val_scans']:.0f} scans"
    )
    print(f"run in {out}")
    return EXIT_OK


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("train")
