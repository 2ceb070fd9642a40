"""`bt compare`: reports of several bundles on one dataset, side by side."""

import os
from typing import Annotated

import typer

from bt_core import storage
from bt_core.errors import EXIT_FAILED, EXIT_OK, UsageError
from jobs.command import all_met
from jobs.options import RequireOption


def run(
    reports: Annotated[
        list[str],
        typer.Argument(metavar="REPORT REPORT...", help="Folders that bt evaluate wrote."),
    ],
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write all of it to a JSON file, too."),
    ] = None,
    require: RequireOption = None,
) -> int:
    """Say which bundles differ by more than chance, on scans that none was trained on.

    `--require difference.accuracy.low>=-0.01` holds the first against the second.
    """
    from bt_core.evaluation.comparison import compare, comparison_lines
    from bt_core.evaluation.pages import read_report
    from bt_core.evaluation.predictions import Scans
    from bt_core.evaluation.requirements import Requirement

    names = [os.path.basename(storage.absolute(report)) for report in reports]
    if len(reports) < 2 or len(set(names)) < len(names):
        raise UsageError(
            f"bt compare takes two reports or more, in folders of different names, got {names}"
        )
    requirements = [Requirement.parse(text) for text in require or []]
    read = {name: read_report(report) for name, report in zip(names, reports, strict=True)}
    spaces = {name: bundle.label_space for name, (_, _, _, bundle, _) in read.items()}
    space = spaces[names[0]]
    if any(other != space for other in spaces.values()):
        raise UsageError(f"the reports are of different tasks: {', '.join(names)}")
    models = {name: Scans.of(predictions, space) for name, (predictions, *_) in read.items()}
    found = compare(models, space)
    found["difference"] = found["pairs"][0]["difference"]
    print(*comparison_lines(found), sep="\n")
    if out is not None:
        storage.write_json(storage.absolute(out), found)
    return EXIT_OK if all_met(requirements, found) else EXIT_FAILED


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("compare")
