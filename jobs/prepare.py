"""`bt prepare`: a scan source becomes a catalog, a split and shards of pixels."""

from typing import TYPE_CHECKING, Annotated

import typer

from bt_core import storage
from bt_core.errors import EXIT_INCOMPLETE, EXIT_OK, UsageError
from jobs.command import say_if_random
from jobs.options import OutOption, OverwriteOption, SourceArgument, TaskOption
from jobs.output_folders import output_folder
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
    task: TaskOption = None,
    split: Annotated[
        str,
        typer.Option(
            metavar="family|given",
            help="family keeps copies (and a patient's scans) together; given keeps the source's "
            "Training and Testing folders, and every figure is then given twice.",
        ),
    ] = "family",
    resolve: Annotated[
        str | None,
        typer.Option(metavar="CSV", help="Docket of label conflicts that a person has filled in."),
    ] = None,
    keep_splits: Annotated[
        str | None,
        typer.Option(
            "--keep-splits",
            metavar="DIR",
            help="Earlier dataset whose scans keep their split: test scans stay test scans.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split and of the shards' order.")] = 0,
    overwrite: OverwriteOption = False,
) -> int:
    """Read a labelled archive; write catalog, copies, split by families, and shards.

    Exit code 3 says that some files are in no split without a person's decision (the catalog holds
    them with their reasons), or that the source is cut short.
    """
    from bt_core.scans.archives import list_scans
    from bt_core.scans.identity import hash_key

    if split not in ("family", "given"):
        raise UsageError(f"--split {split}: use family or given")
    if split == "given" and keep_splits:
        raise UsageError("--keep-splits has no effect on --split given; leave one of them out")
    out = output_folder(out, source)
    _refuse_occupied(out, overwrite)
    key, key_is_kept = hash_key()
    listing = list_scans(source, key)  # a wrong path is answered before Ray is imported
    from bt_core.data.prepare import PrepareOptions, prepare
    from bt_core.data.splits import SplitPlan
    from bt_core.training.recipe import load_recipe
    from cluster.session import session

    options = PrepareOptions(SplitPlan(by=split, seed=seed), task, resolve, keep_splits)
    specs = [load_recipe(name, RECIPES).preprocess for name in recipe or ["mobilenetv2"]]
    done = prepare(source, listing, key, specs, out, options, session)
    info = done.info
    _print_summary(info)
    if keep_splits:
        print(f"kept       {done.num_kept:>7} scans of {keep_splits}; {done.num_new} are new")
    say_if_random(key_is_kept, done.catalog["patient"])
    if done.num_conflicts:
        docket_at = storage.join(out, "docket.csv")
        print(f"label conflicts open: {done.num_conflicts}; fill in {docket_at} and pass --resolve")
    print(f"dataset in {out}")
    undecided = info.num_left_out.keys() - {"dropped"}  # a person's word leaves nothing open
    return EXIT_INCOMPLETE if undecided or not listing.is_whole else EXIT_OK


def _print_summary(info: "DatasetInfo") -> None:
    for split, counts in info.counts.items():
        classes = ", ".join(f"{name} {count}" for name, count in counts.items())
        print(f"{split:<11}{sum(counts.values()):>7} scans  ({classes})")
    kept = "never" if info.plan.by == "family" else "also"
    print(f"families   {info.num_families:>7}        (copies of one scan, {kept} across splits)")
    if info.num_copied_from_training:
        print(
            f"copied     {info.num_copied_from_training:>7} scans  (not in training, but a copy is)"
        )
    for reason, count in info.num_left_out.items():
        print(f"left out   {count:>7} scans  ({reason}; see catalog.parquet)")
    for why, count in info.num_skipped.items():
        print(f"skipped    {count:>7} files  ({why})")


def _refuse_occupied(out: str, overwrite: bool) -> None:
    """Refuse a folder that holds a dataset, unless it may be replaced, or foreign views."""
    if storage.exists(storage.join(out, "dataset.json")):
        if not overwrite:
            raise UsageError(f"{out} holds a dataset; choose another -o, or pass --overwrite")
    elif storage.exists(storage.join(out, "views")) and not storage.exists(
        storage.join(out, "catalog.parquet")
    ):
        raise UsageError(f"{out} holds a folder `views` that is not ours; choose another -o")


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("prepare")
