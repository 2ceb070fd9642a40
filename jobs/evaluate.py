"""`bt evaluate`: a bundle on a dataset's test scans becomes figures and a report."""

from typing import TYPE_CHECKING

from bt_core import storage
from bt_core.errors import EXIT_INCOMPLETE, EXIT_OK, DatasetError, UsageError
from jobs.command import BundleArgument, DataOption, DeviceOption, OutOption, OverwriteOption
from jobs.score import score_refs

if TYPE_CHECKING:
    import pyarrow as pa


def run(
    bundle: BundleArgument,
    data: DataOption,
    out: OutOption = "report",
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> int:
    """Score the test scans; write report.html and metrics.json."""
    from bt_core.data.catalog import Dataset
    from bt_core.data.decode_stage import REF_COLUMNS
    from bt_core.evaluation.report import evaluate, write_report
    from bt_core.models.bundle import Bundle

    opened = Bundle(bundle)
    dataset = Dataset(data)
    names = opened.info.label_space.names
    if dataset.info.label_space != opened.info.label_space:
        raise UsageError(
            f"the bundle knows {', '.join(names)}; the dataset holds "
            f"{', '.join(dataset.info.label_space.names)}"
        )
    out = storage.absolute(out)
    held = [n for n in ("metrics.json", "summary.json", "scores") if storage.exists(f"{out}/{n}")]
    if held and not overwrite:
        raise UsageError(f"{out} holds {held[0]}; choose another -o, or pass --overwrite")
    storage.remove_dir(storage.join(out, "scores"))
    test = dataset.open_test("evaluate", opened.info.bundle_id)
    predictions = score_refs(opened, test.select(list(REF_COLUMNS)), out, device)
    _refuse_changed_source(test, predictions)
    figures = evaluate(predictions, test, names)
    figures["num_test_openings"] = dataset.num_openings()
    write_report(out, figures, opened.info, dataset.info)
    clean = figures["clean"]
    print(
        f"{clean['num_scans']} test scans without a copy in training: "
        f"accuracy {clean['accuracy']:.4f}, macro F1 {clean['macro']['f1']:.4f}, "
        f"log loss {clean['log_loss']:.4f}"
    )
    for name, row in clean["per_class"].items():
        print(
            f"  {name:<11} precision {row['precision']:.3f}  recall {row['recall']:.3f}  "
            f"F1 {row['f1']:.3f}  n {row['support']}"
        )
    print(f"openings of this test split on record: {figures['num_test_openings']}")
    print(f"report in {storage.join(out, 'report.html')}")
    return EXIT_OK if figures["all"]["num_scans"] == test.num_rows else EXIT_INCOMPLETE


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
