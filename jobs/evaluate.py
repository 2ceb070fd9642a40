"""`bt evaluate`: a bundle on a dataset's test scans becomes figures and a report."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from bt_core import storage
from bt_core.errors import EXIT_FAILED, EXIT_INCOMPLETE, EXIT_OK, DatasetError, UsageError
from jobs.command import (
    BundleArgument,
    DataOption,
    DeviceOption,
    OutOption,
    OverwriteOption,
    RequireOption,
    all_met,
)
from jobs.explain import explain_refs
from jobs.score import score_refs

if TYPE_CHECKING:
    import pyarrow as pa


def run(
    bundle: BundleArgument,
    data: DataOption,
    out: OutOption = "report",
    device: DeviceOption = "auto",
    prevalence: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS=SHARE,...",
            help="Shares of the classes where it will be used; adds predictive values there.",
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option(help="Draw heat maps of right, wrong and unsure answers.")
    ] = True,
    require: RequireOption = None,
    overwrite: OverwriteOption = False,
) -> int:
    """Score the test scans; write report.html, metrics.json, predictions.parquet and pictures."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from bt_core.data.catalog import Dataset
    from bt_core.data.decode_stage import REF_COLUMNS
    from bt_core.evaluation.gate import Requirement
    from bt_core.evaluation.predictions import Scans, join_truth
    from bt_core.evaluation.report import evaluate, write_report
    from bt_core.evaluation.sheets import chosen_scans
    from bt_core.models.bundle import Bundle
    from cluster.session import session

    opened = Bundle(bundle)
    dataset = Dataset(data)
    space = opened.info.label_space
    if dataset.info.label_space != space:
        raise UsageError(
            f"the bundle knows {', '.join(space.names)}; the dataset holds "
            f"{', '.join(dataset.info.label_space.names)}"
        )
    shares = _shares(prevalence, space.names) if prevalence else None
    requirements = [Requirement.parse(text) for text in require or []]
    out = storage.absolute(out)
    held = [n for n in ("metrics.json", "summary.json", "scores") if storage.exists(f"{out}/{n}")]
    if held and not overwrite:
        raise UsageError(f"{out} holds {held[0]}; choose another -o, or pass --overwrite")
    storage.remove_dir(storage.join(out, "scores"))
    test = dataset.open_test("evaluate", opened.info.bundle_id)
    with session():
        scores = score_refs(opened, test.select(list(REF_COLUMNS)), out, device)
        _refuse_changed_source(test, scores)
        predictions = join_truth(scores, test)
        figures = evaluate(predictions, space, opened.info.review, shares)
        figures["num_test_openings"] = dataset.num_openings()
        explained = None
        if explain and figures["clean"] is not None:
            scans = Scans.of(predictions, space)
            chosen = chosen_scans(scans.where(scans.clean_N), space)
            shown = pc.is_in(test["scan_id"], pa.array({i for ids in chosen.values() for i in ids}))
            refs = test.filter(shown).select(list(REF_COLUMNS))
            explained = pa.concat_tables(explain_refs(opened, refs, device))
    write_report(out, predictions, explained, figures, opened.info, dataset.info)
    storage.remove_dir(storage.join(out, "scores"))  # predictions.parquet has them all
    _print_summary(figures)
    print(f"report in {storage.join(out, 'report.html')}")
    if not all_met(requirements, figures):
        return EXIT_FAILED
    return EXIT_OK if figures["all"]["num_scans"] == test.num_rows else EXIT_INCOMPLETE


def _shares(text: str, names: tuple[str, ...]) -> dict[str, float]:
    """Return the share of each class from `CLASS=SHARE,...`."""
    try:
        shares = {k.strip(): float(v) for k, v in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise UsageError(f"--prevalence {text}: write CLASS=SHARE,CLASS=SHARE") from error
    if (
        set(shares) != set(names)
        or min(shares.values()) < 0
        or abs(sum(shares.values()) - 1) > 0.01
    ):
        raise UsageError(
            f"--prevalence {text}: give each of {', '.join(names)} a share of 0 or more, sum 1"
        )
    return shares


def _print_summary(figures: dict[str, Any]) -> None:
    clean = figures["clean"]

    def shown(name: str) -> str:
        one = clean["by_scan"][name]
        if one["value"] is None:
            return "-"
        between = "" if one["low"] is None else f" [{one['low']:.3f}, {one['high']:.3f}]"
        return f"{one['value']:.3f}{between}"

    print(
        f"{clean['num_scans']} test scans ({clean['num_families']} families) without a copy in "
        f"training: accuracy {shown('accuracy')}, macro F1 {shown('macro_f1')}"
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
    print(f"openings of this test split on record: {figures['num_test_openings']}")


def _refuse_changed_source(test: "pa.Table", predictions: "pa.Table") -> None:
    """Raise DatasetError if a scan's bytes are not those that were labelled."""
    labelled = dict(zip(*(test[c].to_pylist() for c in ("scan_id", "content_sha256")), strict=True))
    for row in predictions.select(["scan_id", "content_sha256"]).to_pylist():
        if row["content_sha256"] not in (None, labelled[row["scan_id"]]):
            raise DatasetError(
                f"scan {row['scan_id']} is not the one that was labelled: the source has changed "
                "since bt prepare; prepare it again"
            )


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("evaluate")
