"""`bt prepare`: a scan source becomes a catalog, a split and shards of pixels."""

from typing import TYPE_CHECKING, Annotated

import typer

from bt_core import storage
from bt_core.errors import EXIT_INCOMPLETE, EXIT_OK, UsageError
from jobs.command import (
    OutOption,
    OverwriteOption,
    SourceArgument,
    TaskOption,
    output_folder,
    say_if_random,
)
from jobs.recipes_folder import RECIPES

if TYPE_CHECKING:
    import pyarrow as pa

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
    from bt_core.data import copies
    from bt_core.data.catalog import Dataset, describe, label_refs
    from bt_core.data.families import FamilyStage
    from bt_core.data.pipeline import survey
    from bt_core.data.splits import SplitPlan, assign_splits
    from bt_core.data.views import ensure_view
    from bt_core.training.recipe import load_recipe
    from cluster.session import session

    plan = SplitPlan(by=split, seed=seed)
    specs = [load_recipe(name, RECIPES).preprocess for name in recipe or ["mobilenetv2"]]
    refs, space = label_refs(listing.refs, task)
    decisions = copies.read_docket(resolve, space) if resolve else {}
    previous = Dataset(keep_splits).split_of_pixels() if keep_splits else None
    if not resolve and copies.has_decisions(storage.join(out, "docket.csv")):
        raise UsageError(
            f"{out}/docket.csv holds decisions; pass it with --resolve, or choose another -o"
        )
    with session():
        catalog, pairs = survey(refs, FamilyStage(key))
        catalog = copies.add_families(catalog, pairs)
        docket = copies.docket_csv(catalog, copies.find_conflicts(catalog, pairs), decisions)
        catalog = copies.resolve(catalog, decisions)
        conflicts = copies.find_conflicts(catalog, pairs)
        catalog = assign_splits(copies.leave_out_conflicts(catalog, conflicts), plan, previous)
        info = describe(catalog, storage.absolute(source), space, listing.skipped, plan)
        _clear(out)  # not before all is known: what goes wrong earlier costs no dataset
        storage.write_table(storage.join(out, "catalog.parquet"), catalog)
        storage.write_bytes(storage.join(out, "docket.csv"), docket)
        storage.write_table(storage.join(out, "copies.parquet"), copies.pairs_table(catalog, pairs))
        for spec in specs:
            ensure_view(Dataset(out, info), spec)
        storage.write_json(storage.join(out, "dataset.json"), info.model_dump(mode="json"))
    _print_summary(info)
    if previous is not None:
        _print_kept(catalog, previous, f"{keep_splits}")
    say_if_random(key_is_kept, catalog["patient"])
    if conflicts:
        docket_at = storage.join(out, "docket.csv")
        print(f"label conflicts open: {len(conflicts)}; fill in {docket_at} and pass --resolve")
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


def _print_kept(catalog: "pa.Table", previous: dict[str, str], earlier: str) -> None:
    columns = catalog.select(["pixel_sha256", "split"]).to_pydict()
    usable = [d for d, s in zip(columns["pixel_sha256"], columns["split"], strict=True) if s]
    num_kept = sum(digest in previous for digest in usable)
    print(f"kept       {num_kept:>7} scans of {earlier}; {len(usable) - num_kept} are new")


def _refuse_occupied(out: str, overwrite: bool) -> None:
    """Refuse a folder that holds a dataset, unless it may be replaced, or foreign views."""
    if storage.exists(storage.join(out, "dataset.json")):
        if not overwrite:
            raise UsageError(f"{out} holds a dataset; choose another -o, or pass --overwrite")
    elif storage.exists(storage.join(out, "views")) and not storage.exists(
        storage.join(out, "catalog.parquet")
    ):
        raise UsageError(f"{out} holds a folder `views` that is not ours; choose another -o")


def _clear(out: str) -> None:
    """Make room for the new dataset."""
    marker = storage.join(out, "dataset.json")
    if storage.exists(marker):
        storage.remove_file(marker)
    storage.remove_dir(storage.join(out, "views"))


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("prepare")
