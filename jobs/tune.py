"""`bt tune`: a sweep over recipes and settings becomes a leaderboard and the best recipe."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from bt_core import log, storage
from bt_core.errors import EXIT_OK, UsageError
from jobs.options import DataOption, OutOption, OverwriteOption
from jobs.output_folders import make_room
from jobs.recipes_folder import RECIPES

if TYPE_CHECKING:
    from bt_core.data.catalog import Dataset
    from bt_core.training.sweep import SweepSpec
    from bt_core.training.sweep_job import Job

_CLAIM = "sweep.json"


def run(
    sweep: Annotated[
        str, typer.Argument(metavar="SWEEP", help="Sweep file (YAML), as in jobs/recipes/sweeps.")
    ],
    data: DataOption,
    out: OutOption = "runs/sweep",
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            metavar="local-dir:PATH",
            help="Initial weights for the recipes whose backbone they fit. Give it several times.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the sweep, as in --set folds=1."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs of each training. [default: the sweep's]")
    ] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="Trials at once. [default: as many as fit]")
    ] = None,
    cpus_per_trial: Annotated[
        int | None, typer.Option(min=1, help="Threads and logical CPUs of a trial.")
    ] = None,
    gpus_per_trial: Annotated[
        float | None, typer.Option(min=0, help="GPUs of a trial; a part of one is possible.")
    ] = None,
    time_budget: Annotated[
        float | None, typer.Option(metavar="MINUTES", help="Stop and rank what there is by then.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> int:
    """Try recipes and settings on validation scans only, or go on with an interrupted sweep."""
    from bt_core.config import parse
    from bt_core.data.catalog import Dataset
    from bt_core.locks import locked
    from bt_core.training.cpu import WORKER_ENV
    from bt_core.training.search import prepare_views, search
    from bt_core.training.sweep import SweepSpec, candidates, load_sweep
    from bt_core.training.sweep_job import Job, plan_slots
    from bt_core.training.trial import with_weights
    from cluster.session import session

    given: dict[str, Any] = {
        "epochs": epochs,
        "max_concurrent": max_concurrent,
        "cpus_per_trial": cpus_per_trial,
        "gpus_per_trial": gpus_per_trial,
        "time_budget_minutes": time_budget,
    }
    changed = {key: value for key, value in given.items() if value is not None}
    spec = parse(SweepSpec, load_sweep(sweep, settings or []).model_dump() | changed, sweep)
    dataset = Dataset(data)
    space = dataset.info.label_space
    found = candidates(spec, RECIPES, space.task)
    out = storage.absolute(out)
    _refuse_finished(out, overwrite)
    found = with_weights(found, weights or [], spec.missing_weights, space.num_classes)
    with session(worker_env=WORKER_ENV) as resources:
        slots = plan_slots(
            spec,
            resources.num_cpus,
            resources.num_gpus,
            resources.largest_node_cpus,
            resources.cpus_per_gpu,
        )
        if overwrite:  # not before all is known to be possible
            make_room(out, _CLAIM, "a sweep")
        with locked(out):
            _claim(out, spec, dataset, [candidate.content for candidate in found])
            views = prepare_views(dataset, spec, found)
            job = Job(spec, found, dataset.location, views, slots, out)
            if not search(job):
                raise KeyboardInterrupt
    return _conclude(job, dataset)


def _refuse_finished(out: str, overwrite: bool) -> None:
    if storage.exists(storage.join(out, "leaderboard.parquet")) and not overwrite:
        raise UsageError(f"{out} holds a finished sweep; choose another -o, or pass --overwrite")


def _claim(out: str, spec: "SweepSpec", dataset: "Dataset", recipes: list[dict[str, Any]]) -> None:
    """Mark a folder as this sweep's, or go on in it if it was started with equal settings."""
    marker = storage.join(out, _CLAIM)
    digests = {
        "sweep_digest": spec.digest,
        "recipes_digest": storage.digest_of(recipes),
        "dataset_digest": dataset.info.digest,
        "max_concurrent": spec.max_concurrent,  # Ray Tune goes on with those that it began with
        "time_budget_minutes": spec.time_budget_minutes,
    }
    begun: dict[str, Any] = storage.read_json(marker) if storage.exists(marker) else digests
    if {key: begun[key] for key in digests} != digests:
        raise UsageError(
            f"{out} holds an unfinished sweep with other settings, recipes or data; finish it "
            "with those, choose another -o, or pass --overwrite"
        )
    settings = {"sweep": spec.model_dump(mode="json"), "dataset": dataset.location}
    runs = {"run_ids": [*begun.get("run_ids", ()), log.run_id()]}
    storage.write_json(marker, {**digests, **settings, **runs})


def _conclude(job: "Job", dataset: "Dataset") -> int:
    """Rank the trials and write the results; the leaderboard as Parquet comes last."""
    from bt_core.data.catalog import groups_of
    from bt_core.training import leaderboard as board
    from bt_core.training.leaderboard_page import write_page
    from bt_core.training.sweep_job import read_predictions, records_of

    spec, out = job.spec, job.location
    records = records_of(out)
    lines = "".join(record.model_dump_json() + "\n" for record in records)
    storage.write_bytes(storage.join(out, "trials.jsonl"), lines.encode())
    finished = [record.trial_id for record in records if record.status == "finished"]
    tables = {trial_id: read_predictions(out, trial_id) for trial_id in finished}
    predictions = {trial_id: table for trial_id, table in tables.items() if table is not None}
    rows = board.leaderboard(records, predictions, groups_of(dataset.catalog()), spec)
    print(board.text_table(rows, spec))
    if predictions:
        best = next(record for record in records if record.trial_id == rows[0]["trial_id"])
        recipe = board.best_recipe_yaml(best, rows, spec)
        storage.write_bytes(storage.join(out, "best.yaml"), recipe)
    write_page(out, rows, spec)
    table = storage.with_run_id(board.to_table(rows, list(spec.space)), log.run_id())
    storage.write_table(storage.join(out, "leaderboard.parquet"), table)
    trained, planned = sum(record.num_epochs for record in records), _planned_epochs(records)
    print(f"{trained} of {planned} epochs trained; leaderboard in {out}/leaderboard.html")
    total = spec.num_trials(len(job.candidates))
    begun = sum(record.status == "failed" or bool(record.fits) for record in records)
    if begun < total:
        print(f"{total - begun} of {total} trials had not begun when the time budget ended")
    if not predictions:
        raise UsageError(f"no trial of {out} was finished; its leaderboard has the reasons")
    print(f"train the best with: bt train --recipe {out}/best.yaml --data {dataset.location}")
    return EXIT_OK


def _planned_epochs(records: list[Any]) -> int:
    return sum(int(r.recipe["train"]["epochs"]) * r.num_folds * len(r.seeds) for r in records)


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("tune")
