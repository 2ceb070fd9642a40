"""`bt prepare`: a scan source becomes a catalog, a split and shards of pixels."""

from typing import TYPE_CHECKING, Annotated

import typer

from bt_core import storage
from bt_core.errors import EXIT_INCOMPLETE, EXIT_OK, UsageError
from jobs.command import OutOption, OverwriteOption, SourceArgument
from jobs.recipes_folder import RECIPES

if TYPE_CHECKING:
    from bt_core.data.catalog import DatasetInfo


def run(
    source: SourceArgument,
    out: OutOption,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            help="Write the shards that this recipe needs; may be repeated. "
            "[default: mobilenetv2] bt train writes those that are missing.",
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="four_class or binary. [default: what the folders say]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split and of the shards' order.")] = 0,
    overwrite: OverwriteOption = False,
) -> int:
    """Read a labelled archive; write catalog, grouped split and shards.

    Exit code 3 says that some files are in no split; the catalog holds them with their reasons.
    """
    from bt_core.data.catalog import Dataset, assign_splits, describe, label_refs
    from bt_core.data.pipeline import decode_catalog, ensure_view
    from bt_core.labels import LABEL_SPACES
    from bt_core.scans.archives import list_scans
    from bt_core.training.recipe import load_recipe
    from cluster.session import session

    if task not in (None, *LABEL_SPACES):
        raise UsageError(f"--task {task}: use four_class or binary")
    specs = [load_recipe(name, RECIPES).preprocess for name in recipe or ["mobilenetv2"]]
    out = storage.absolute(out)
    listing = list_scans(source)
    refs, space = label_refs(listing.refs, task)  # type: ignore[arg-type]
    _clear(out, overwrite)
    fractions = (0.7, 0.15, 0.15)
    with session():
        catalog = assign_splits(decode_catalog(refs), fractions, seed)
        info = describe(catalog, storage.absolute(source), space, listing.skipped, fractions, seed)
        storage.write_table(storage.join(out, "catalog.parquet"), catalog)
        for spec in specs:
            ensure_view(Dataset(out, info), spec)
        storage.write_json(storage.join(out, "dataset.json"), info.model_dump(mode="json"))
    _print_summary(info)
    print(f"dataset in {out}")
    return EXIT_INCOMPLETE if info.num_left_out else EXIT_OK


def _print_summary(info: "DatasetInfo") -> None:
    for split, counts in info.counts.items():
        classes = ", ".join(f"{name} {count}" for name, count in counts.items())
        print(f"{split:<11}{sum(counts.values()):>7} scans  ({classes})")
    for reason, count in info.num_left_out.items():
        print(f"left out   {count:>7} scans  ({reason}; see catalog.parquet)")
    for why, count in info.num_skipped.items():
        print(f"skipped    {count:>7} files  ({why})")


def _clear(out: str, overwrite: bool) -> None:
    """Make room for a new dataset, or refuse if there is one."""
    marker, catalog = (storage.join(out, name) for name in ("dataset.json", "catalog.parquet"))
    if storage.exists(marker):
        if not overwrite:
            raise UsageError(f"{out} holds a dataset; choose another -o, or pass --overwrite")
        storage.remove_file(marker)
    elif storage.exists(storage.join(out, "views")) and not storage.exists(catalog):
        raise UsageError(f"{out} holds a folder `views` that is not ours; choose another -o")
    storage.remove_dir(storage.join(out, "views"))


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("prepare")
