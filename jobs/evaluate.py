"""`bt evaluate`: bundles or runs on test scans, or on an archive, become figures and reports."""

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bt_core import storage
from bt_core.errors import EXIT_FAILED, EXIT_INCOMPLETE, EXIT_OK, UsageError
from jobs.command import all_met, class_shares
from jobs.options import DeviceOption, OutOption, OverwriteOption, PrevalenceOption, RequireOption
from jobs.output_folders import output_folder

if TYPE_CHECKING:
    from bt_core.evaluation.evaluated import EvaluatedScans


def run(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Bundle folders, or folders of finished runs."),
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="DIR|SOURCE",
            help="Dataset folder that bt prepare wrote, or a labelled folder, archive or list for "
            "external validation.",
        ),
    ],
    out: OutOption = "report",
    device: DeviceOption = "auto",
    prevalence: PrevalenceOption = None,
    trained_on: Annotated[
        str | None,
        typer.Option(
            "--trained-on",
            metavar="DIR",
            help="For external validation: the dataset that the models were trained with, to find "
            "mirrored, turned and re-encoded copies of its scans.",
        ),
    ] = None,
    depth: Annotated[
        bool,
        typer.Option(
            "--depth/--no-depth",
            help="Draw heat maps, answer some scans again with noise, blur and the like, and probe "
            "for shortcuts.",
        ),
    ] = True,
    require: RequireOption = None,
    overwrite: OverwriteOption = False,
) -> int:
    """Score test scans; write report.html, metrics.json, predictions.parquet and pictures.

    Several models get a folder each, and are compared. A run is calibrated into a bundle first.
    Exit code 3 says that some scans got no answer, or that the source is cut short; 1, that a
    requirement is not met.
    """
    from bt_core.evaluation.comparison import compare, comparison_lines
    from bt_core.evaluation.requirements import Requirement
    from bt_core.workflows.evaluate import Evaluation
    from cluster.session import placed, session

    requirements = [Requirement.parse(text) for text in require or []]
    is_dataset = storage.exists(storage.join(data, "dataset.json"))
    if is_dataset and trained_on:
        raise UsageError("--trained-on is for a source; give the one that DIR was prepared from")
    out = storage.absolute(out) if is_dataset else output_folder(out, data)
    evaluation = Evaluation(models, data, is_dataset, out, session, overwrite)
    space = evaluation.space
    for requirement in requirements:  # a typo must not cost an opening of the test split
        requirement.refuse_unknown(space.names, space.healthy)
    shares = class_shares(prevalence, space.names) if prevalence else None
    found = []
    with session():
        place = partial(placed, device=device)
        for one in evaluation.run(place, shares, trained_on, depth):
            _print_summary(one.figures, one.tested)
            print(f"report in {storage.join(one.out, 'report.html')}")
            found.append(one)
    if len(found) > 1:
        comparison = compare({one.name: one.scans for one in found}, space)
        print(*comparison_lines(comparison), sep="\n")
        storage.write_json(storage.join(out, "comparison.json"), comparison)
    met = []
    for one in found:
        if requirements and len(found) > 1:
            print(f"{one.name}:")
        met.append(all_met(requirements, one.figures))
    if not all(met):
        return EXIT_FAILED
    return EXIT_OK if all(one.is_whole for one in found) else EXIT_INCOMPLETE


def _print_summary(figures: dict[str, Any], tested: "EvaluatedScans") -> None:
    from bt_core.evaluation.intervals import interval_text
    from bt_core.scans.members import ATTRIBUTES

    clean = figures["clean"]

    def shown(name: str) -> str:
        return interval_text(clean["by_scan"][name])

    print(
        f"{clean['num_scans']} test scans ({clean['num_families']} families) "
        f"{'without a copy in training' if tested.copies_found else 'not trained on'}, of "
        f"{figures['all']['num_scans']}: accuracy {shown('accuracy')}, macro F1 "
        f"{shown('macro_f1')}"
    )
    print(
        f"missed tumours {shown('missed_tumor_rate')}, false alarms {shown('false_alarm_rate')}, "
        f"log loss {shown('log_loss')}"
    )
    for name in figures["classes"]:
        print(
            f"  {name:<11} recall {shown(f'{name}.recall')}  precision {shown(f'{name}.precision')}"
            f"  n {clean['counts'][name]}"
        )
    unread = figures["flow"]["num_scans"] - figures["all"]["num_scans"]
    if unread:
        print(
            f"{unread} of {figures['flow']['num_scans']} scans got no answer; the report says why"
        )
    named = {one["column"] for one in figures["slices"]["slices"]} & set(ATTRIBUTES)
    if named:
        print(f"the texts of the list's {', '.join(sorted(named))} stand in the report")
    if not tested.is_whole:
        print("the source is cut short: scans are missing that nobody can count")
    if not tested.copies_found:
        print("copies of training scans were not looked for, only equal pixels; see --trained-on")
    if tested.num_openings is not None:
        print(f"openings of this test split on record: {tested.num_openings}")


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("evaluate")
