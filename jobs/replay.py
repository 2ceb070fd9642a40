"""`bt replay`: a trial of a sweep is trained again from its record, to the same figures."""

from typing import Annotated

import typer

from bt_core import storage
from bt_core.errors import EXIT_FAILED, EXIT_OK, UsageError
from jobs.options import DataOption


def run(
    out: Annotated[str, typer.Argument(metavar="SWEEP_DIR", help="Folder that bt tune wrote.")],
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="Trial id of its leaderboard.")],
    data: DataOption = "",
) -> int:
    """Train a trial again from its record and compare every figure of every epoch."""
    from bt_core.config import parse
    from bt_core.data.catalog import Dataset
    from bt_core.data.views import ensure_view
    from bt_core.models.classifier import build_classifier
    from bt_core.models.run import environment
    from bt_core.models.weights import initial_sha256
    from bt_core.training.recipe import Recipe
    from bt_core.training.trial import differences, read_records, replay
    from cluster.session import session

    out = storage.absolute(out)
    records = {record.trial_id: record for record in read_records(out)}
    if trial not in records:
        raise UsageError(f"no trial {trial!r} in {out}; there are: {', '.join(records)}")
    record = records[trial]
    recipe = parse(Recipe, record.recipe, "the trial's recipe")
    dataset = Dataset(data or storage.read_json(storage.join(out, "sweep.json"))["dataset"])
    if not storage.exists(storage.join(dataset.location, "views", record.view, "view.json")):
        with session():
            ensure_view(dataset, recipe.preprocess)
    again = replay(record, dataset)
    found = differences(record, again)
    if not found:
        print(f"trial {trial}: {again.num_epochs} epochs trained again, all figures equal")
        return EXIT_OK
    print("\n".join(found))
    model, _, _ = build_classifier(
        recipe.model, recipe.preprocess, dataset.info.label_space.num_classes
    )
    started_from = initial_sha256(model.backbone, recipe.model.weights_source)
    now, was = environment() | {"initial_weights_sha256": started_from}, record.environment
    others = [f"{k} {v} (now {now.get(k, 'none')})" for k, v in was.items() if now.get(k) != v]
    print(f"{len(found)} figures differ; trained with: {', '.join(others) or 'equal versions'}")
    return EXIT_FAILED


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("replay")
