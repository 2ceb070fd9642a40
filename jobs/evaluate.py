"""`bt evaluate`: bundles or runs on test scans, or on an archive, become figures and reports."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bt_core import storage
from bt_core.errors import EXIT_FAILED, EXIT_INCOMPLETE, EXIT_OK, DatasetError, UsageError
from bt_core.log import logger
from jobs.command import (
    DeviceOption,
    OutOption,
    OverwriteOption,
    PrevalenceOption,
    RequireOption,
    all_met,
    class_shares,
)
from jobs.compare import print_comparison
from jobs.ensemble import build
from jobs.explain import work_on
from jobs.score import score_refs

if TYPE_CHECKING:
    import pyarrow as pa

    from bt_core.evaluation.predictions import EvaluatedScans, Scans
    from bt_core.labels import LabelSpace
    from bt_core.models.bundle import Bundle


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
    depth: Annotated[
        bool,
        typer.Option(
            "--depth/--no-depth",
            help="Draw heat maps, and answer some scans again with noise, blur and the like.",
        ),
    ] = True,
    require: RequireOption = None,
    overwrite: OverwriteOption = False,
) -> int:
    """Score test scans; write report.html, metrics.json, predictions.parquet and pictures.

    Several models get a folder each, and are compared. A run is calibrated into a bundle first.
    """
    from bt_core.evaluation.comparison import compare
    from bt_core.evaluation.gate import Requirement
    from cluster.session import session

    requirements = [Requirement.parse(text) for text in require or []]
    out = storage.absolute(out)
    places = _places(models, out, overwrite)
    bundles = {name: _bundle(model, out) for name, model in zip(places, models, strict=True)}
    space = next(iter(bundles.values())).info.label_space
    shares = class_shares(prevalence, space.names) if prevalence else None
    codes, scans = [], {}
    with session():
        truths = _truths(data, bundles, space)
        for name, bundle in bundles.items():
            truth, tested = truths[name]
            one = _Evaluation(bundle, truth, tested, places[name], device, shares, depth)
            figures, scans[name] = one.run()
            print(f"report in {storage.join(places[name], 'report.html')}")
            met = all_met(requirements, figures)
            whole = figures["all"]["num_scans"] == truth.num_rows
            codes.append(EXIT_FAILED if not met else EXIT_OK if whole else EXIT_INCOMPLETE)
    if len(scans) > 1:
        comparison = compare(scans, space)
        print_comparison(comparison)
        storage.write_json(storage.join(out, "comparison.json"), comparison)
    return EXIT_FAILED if EXIT_FAILED in codes else max(codes)


@dataclass(frozen=True)
class _Evaluation:
    """One model on the scans that are tested."""

    bundle: "Bundle"
    truth: "pa.Table"
    tested: "EvaluatedScans"
    out: str
    device: str
    prevalence: dict[str, float] | None
    depth: bool

    def run(self) -> tuple[dict[str, Any], "Scans"]:
        """Score, report, and return the figures and the answered scans."""
        from bt_core.data.decode_stage import REF_COLUMNS
        from bt_core.evaluation.embedding import with_embedding
        from bt_core.evaluation.pages import write_report
        from bt_core.evaluation.predictions import Scans, join_truth
        from bt_core.evaluation.report import evaluate

        refs = self.truth.select(list(REF_COLUMNS))
        scores = score_refs(self.bundle, refs, self.out, self.device, in_depth=True)
        _refuse_changed_source(self.truth, scores)
        predictions = with_embedding(join_truth(scores, self.truth))
        info = self.bundle.info
        figures = evaluate(predictions, info, self.prevalence)
        scans = Scans.of(predictions, info.label_space)
        clean = scans.where(scans.clean_N)
        explained = self._explained(clean) if self.depth and len(clean) else None
        if self.depth and len(clean):
            figures["robustness"] = self._robustness(clean)
        write_report(self.out, predictions, explained, figures, info, self.tested)
        storage.remove_dir(storage.join(self.out, "scores"))  # predictions.parquet has them all
        _print_summary(figures, self.tested)
        self._write_card(figures)
        return figures, scans

    def _write_card(self, figures: dict[str, Any]) -> None:
        """Let figures on the dataset that a bundle was trained with enter its model card."""
        from bt_core.evaluation.model_card import model_card
        from bt_core.models.bundle import write_card

        if self.tested.digest != self.bundle.info.provenance.get("dataset_digest"):
            return
        try:
            write_card(self.bundle.location, model_card(self.bundle.info, figures))
        except OSError:
            logger.warning("%s cannot be written, so its card stays", self.bundle.location)

    def _explained(self, clean: "Scans") -> "pa.Table":
        """Return the explanations of the scans that the report shows."""
        from bt_core.evaluation.explainer import Explainer
        from bt_core.evaluation.sheets import chosen_scans

        chosen = chosen_scans(clean, self.bundle.info.label_space)
        ids = {i for ids in chosen.values() for i in ids}
        return self._work(sorted(ids), Explainer, "explained")

    def _robustness(self, clean: "Scans") -> dict[str, Any] | None:
        """Return figures under perturbations of some scans by chance."""
        from bt_core.evaluation.robustness import (
            Perturber,
            chosen_for_robustness,
            robustness_figures,
        )

        answered = self._work(chosen_for_robustness(clean), Perturber, "perturbed")
        columns = (clean.scan_id, clean.labels_N, clean.family_N)
        truth_of = {str(i): (int(k), str(f)) for i, k, f in zip(*columns, strict=True)}
        return robustness_figures(answered, truth_of, self.bundle.info.label_space)

    def _work(self, scan_ids: list[str], worker: type[Any], done: str) -> "pa.Table":
        import pyarrow as pa
        import pyarrow.compute as pc

        from bt_core.data.decode_stage import REF_COLUMNS

        chosen = pc.is_in(self.truth["scan_id"], pa.array(scan_ids, pa.string()))
        refs = self.truth.filter(chosen).select(list(REF_COLUMNS))
        return pa.concat_tables(work_on(self.bundle, refs, self.device, worker, done))


def _places(models: list[str], out: str, overwrite: bool) -> dict[str, str]:
    """Return each model's name and the folder of its report; make room there or refuse."""
    names = [os.path.basename(storage.absolute(model)) for model in models]
    if len(set(names)) < len(names):
        raise UsageError(f"two models are named alike ({', '.join(names)}); rename a folder")
    places = {name: out if len(names) == 1 else storage.join(out, name) for name in names}
    for place in places.values():
        for name in ("metrics.json", "summary.json", "scores"):
            if storage.exists(storage.join(place, name)) and not overwrite:
                raise UsageError(f"{place} holds {name}; choose another -o, or pass --overwrite")
        storage.remove_dir(storage.join(place, "scores"))
    return places


def _bundle(model: str, out: str) -> "Bundle":
    """Open a bundle, or make one of a run, below the reports."""
    from bt_core.models.bundle import Bundle
    from bt_core.models.run import Run

    if not storage.exists(storage.join(model, "run.json")):
        return Bundle(model)
    place = storage.join(out, "bundles", os.path.basename(storage.absolute(model)))
    storage.remove_dir(place)
    build(place, [Run(model)])
    return Bundle(place)


def _truths(
    data: str, bundles: dict[str, "Bundle"], space: "LabelSpace"
) -> dict[str, tuple["pa.Table", "EvaluatedScans"]]:
    """Return for each model the catalog rows that it is tested on, and what they are."""
    from bt_core.data.catalog import Dataset
    from bt_core.evaluation.predictions import EvaluatedScans

    for name, bundle in bundles.items():
        if bundle.info.label_space != space:
            raise UsageError(f"{name} knows other classes than {next(iter(bundles))}")
    if not storage.exists(storage.join(data, "dataset.json")):
        return dict.fromkeys(bundles, _external(data, space))
    dataset = Dataset(data)
    if dataset.info.label_space != space:
        raise UsageError(
            f"the model knows {', '.join(space.names)}; the dataset holds "
            f"{', '.join(dataset.info.label_space.names)}"
        )
    found = {}
    for name, bundle in bundles.items():
        rows = dataset.open_test("evaluate", bundle.info.bundle_id)
        tested = EvaluatedScans(
            source=dataset.info.source,
            split_by=dataset.info.plan.by,
            digest=dataset.info.digest,
            num_left_out=dataset.info.num_left_out,
            num_openings=dataset.num_openings(),
        )
        found[name] = rows, tested
    return found


def _external(source: str, space: "LabelSpace") -> tuple["pa.Table", "EvaluatedScans"]:
    """Return the rows of a labelled source; scans that cannot be read stay, conflicts do not."""
    import pyarrow.compute as pc

    from bt_core.data.catalog import label_refs
    from bt_core.data.external import external_scans
    from bt_core.evaluation.predictions import EvaluatedScans
    from bt_core.scans.archives import list_scans
    from bt_core.scans.identity import hash_key

    if storage.is_dir(source) and storage.exists(storage.join(source, "catalog.parquet")):
        raise DatasetError(f"the preparation of {source} was not finished; give bt prepare again")
    key, _ = hash_key()
    refs, _ = label_refs(list_scans(source, key).refs, space.task)
    rows = external_scans(refs, key)
    in_conflict = pc.equal(rows["reason"], "label_conflict")
    kept = rows.filter(pc.invert(in_conflict))
    columns = kept.select(["content_sha256", "label"]).to_pylist()
    tested = EvaluatedScans(
        source=storage.absolute(source),
        split_by="external",
        digest=storage.digest_lines(f"{r['content_sha256']} {r['label']}" for r in columns),
        num_left_out={"label_conflict": n} if (n := rows.num_rows - kept.num_rows) else {},
    )
    return kept, tested


def _print_summary(figures: dict[str, Any], tested: "EvaluatedScans") -> None:
    from bt_core.evaluation.intervals import interval_text

    clean = figures["clean"]

    def shown(name: str) -> str:
        return interval_text(clean["by_scan"][name])

    print(
        f"{clean['num_scans']} test scans ({clean['num_families']} families) without a copy in "
        f"training, of {figures['all']['num_scans']}: accuracy {shown('accuracy')}, "
        f"macro F1 {shown('macro_f1')}"
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
    if tested.num_openings is not None:
        print(f"openings of this test split on record: {tested.num_openings}")


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
