"""`bt report`: a report is made again from its own tables, without a model or scans."""

from typing import Annotated

import typer

from bt_core import storage
from bt_core.errors import EXIT_FAILED, EXIT_OK
from jobs.command import all_met, class_shares
from jobs.options import PrevalenceOption, RequireOption


def run(
    report: Annotated[str, typer.Argument(metavar="REPORT", help="Folder that bt evaluate wrote.")],
    prevalence: PrevalenceOption = None,
    require: RequireOption = None,
) -> int:
    """Compute every figure again from predictions.parquet, and write the report anew."""
    from bt_core.evaluation.pages import read_report, write_report
    from bt_core.evaluation.report import evaluate
    from bt_core.evaluation.requirements import Requirement

    requirements = [Requirement.parse(text) for text in require or []]
    report = storage.absolute(report)
    predictions, explained, before, bundle, tested = read_report(report)
    names = bundle.label_space.names
    shares = class_shares(prevalence, names) if prevalence else before["prevalence"]
    figures = evaluate(predictions, bundle, shares)
    for name in ("robustness", "shortcuts"):  # these need the scans
        figures[name] = before.get(name)
    write_report(report, predictions, explained, figures, bundle, tested)
    print(f"report in {storage.join(report, 'report.html')}")
    return EXIT_OK if all_met(requirements, figures) else EXIT_FAILED


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("report")
