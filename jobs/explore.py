"""`bt explore`: what a scan source looks like, and whether it can be solved by trivial features."""

from typing import Annotated, Any, Final

import typer

from bt_core import storage
from bt_core.errors import EXIT_INCOMPLETE, EXIT_OK, RunError
from jobs.options import OutOption, SourceArgument, TaskOption
from jobs.output_folders import output_folder
from jobs.recipes_folder import RECIPES

_SHOWN_PER_ROW: Final = 8


def run(
    source: SourceArgument,
    out: OutOption = "runs/explore",
    recipe: Annotated[
        str, typer.Option(help="Whose preprocessing is shown before and after.")
    ] = "mobilenetv2",
    task: TaskOption = None,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
) -> int:
    """Describe the scans of a source: explore.html, explore.json and every figure as PNG.

    Exit code 3 says that some scans could not be read, which the page counts by reason, or that the
    source is cut short.
    """
    from bt_core.scans.archives import list_scans
    from bt_core.scans.identity import hash_key

    out = output_folder(out, source)
    key, _ = hash_key()
    listing = list_scans(source, key)  # a wrong path is answered before Ray is imported
    from bt_core.data.catalog import groups_of, label_refs_if_known
    from bt_core.data.copies import add_families
    from bt_core.data.explore import choose, describe_source, name_unlabelled, read_rows
    from bt_core.data.explore_page import earlier_files, figures, write_exploration
    from bt_core.data.explore_stage import SIDE_PX, ExploreStage
    from bt_core.data.families import FamilyStage
    from bt_core.data.pipeline import decode_catalog, survey
    from bt_core.data.probe import NUM_PROBED, probe_shortcuts
    from bt_core.training.recipe import load_recipe
    from cluster.session import session

    shown = load_recipe(recipe, RECIPES)
    earlier_files(out)
    refs, names = name_unlabelled(label_refs_if_known(listing.refs, task))
    with session():
        chosen = choose(refs, NUM_PROBED, _SHOWN_PER_ROW, seed)
        rows = decode_catalog(chosen, ExploreStage(shown.preprocess)).sort_by("scan_id")
        sampled, pairs = survey(chosen.filter(chosen["sampled"]), FamilyStage(key))
    facts = describe_source(rows, names, seed)
    if not facts["num_read"]:
        raise RunError(f"no scan of {source} could be read: {_counted(facts['unreadable'])}")
    rows = read_rows(rows)
    probed = rows.filter(rows["sampled"])
    group_of = groups_of(add_families(sampled, pairs))
    probe = probe_shortcuts(probed, [group_of[i] for i in probed["scan_id"].to_pylist()], seed)
    facts |= {"skipped": listing.skipped, "side_px": SIDE_PX, "seed": seed, "probe": probe}
    write_exploration(out, facts, figures(rows, facts, shown.name, shown.preprocess))
    _print_summary(facts)
    print(f"exploration in {storage.join(out, 'explore.html')}")
    return EXIT_INCOMPLETE if facts["unreadable"] or not listing.is_whole else EXIT_OK


def _print_summary(facts: dict[str, Any]) -> None:
    for split, counts in facts["counts"].items():
        print(f"{split:<11}{sum(counts.values()):>7} scans  ({_counted(counts)})")
    copies = facts["num_read"] - facts["num_distinct_pixels"]
    print(f"{copies} exact copies; {facts['num_pixels_in_two_classes']} pictures in two classes")
    for kind in ("unreadable", "skipped"):
        if facts[kind]:
            print(f"{kind}: {_counted(facts[kind])}")
    print(facts["probe"]["verdict"]["sentence"])


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("explore")
