"""One model on the scans that are tested: answers, figures, pictures and the report."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bt_core import storage
from bt_core.data.decode_stage import REF_COLUMNS
from bt_core.data.explore import choose, read_rows
from bt_core.data.explore_stage import ExploreStage
from bt_core.data.pipeline import decode_catalog
from bt_core.data.probe import NUM_PROBED, probe_shortcuts
from bt_core.errors import DatasetError
from bt_core.evaluation.embedding import with_embedding
from bt_core.evaluation.evaluated import EvaluatedScans
from bt_core.evaluation.explainer import Explainer
from bt_core.evaluation.model_card import model_card
from bt_core.evaluation.pages import refuse_without_clean, write_report
from bt_core.evaluation.predictions import Scans, join_truth
from bt_core.evaluation.report import evaluate
from bt_core.evaluation.robustness import Perturber, chosen_for_robustness, robustness_figures
from bt_core.evaluation.sheets import chosen_scans
from bt_core.log import logger
from bt_core.models.bundle import Bundle
from bt_core.models.bundle_writer import write_card
from bt_core.workflows.explain import work_on
from bt_core.workflows.score import score_refs
from bt_core.workflows.workers import Place


@dataclass(frozen=True)
class ModelEvaluation:
    """One model on the scans that are tested.

    Attributes:
        bundle: the model.
        truth: catalog rows of the scans.
        tested: what they are.
        out: folder of the report.
        place: gives the workers; Ray must run already.
        prevalence: shares of the classes where it will be used, for predictive values there.
        depth: draw heat maps, answer some scans again perturbed, and probe for shortcuts.
    """

    bundle: Bundle
    truth: pa.Table
    tested: EvaluatedScans
    out: str
    place: Place
    prevalence: dict[str, float] | None
    depth: bool

    def run(self) -> tuple[dict[str, Any], Scans]:
        """Score, report, and return the figures and the answered scans."""
        refs = self.truth.select(list(REF_COLUMNS))
        scores = score_refs(self.bundle, refs, self.out, self.place, in_depth=True)
        _refuse_changed_source(self.truth, scores)
        predictions = with_embedding(join_truth(scores, self.truth))
        storage.remove_dir(storage.join(self.out, "scores"))  # predictions.parquet has them all
        info = self.bundle.info
        figures = evaluate(predictions, info, self.prevalence)
        refuse_without_clean(figures)
        scans = Scans.of(predictions, info.label_space)
        clean = scans.where(scans.clean_N)
        explained = self._explained(clean) if self.depth else None
        if self.depth:
            figures["robustness"] = self._robustness(clean)
            figures["shortcuts"] = self._shortcuts(scans)
        write_report(self.out, predictions, explained, figures, info, self.tested)
        self._write_card(figures)
        return figures, scans

    def _write_card(self, figures: dict[str, Any]) -> None:
        """Let figures on the dataset that a bundle was trained with enter its model card."""
        if self.tested.digest != self.bundle.info.provenance.get("dataset_digest"):
            return
        try:
            write_card(self.bundle.location, model_card(self.bundle.info, figures, self.tested))
        except OSError:
            logger.warning("%s cannot be written, so its card stays", self.bundle.location)

    def _explained(self, clean: Scans) -> pa.Table | None:
        """Return the explanations of the scans that the report shows."""
        chosen = chosen_scans(clean, self.bundle.info.label_space)
        ids = {i for ids in chosen.values() for i in ids}
        return self._work(sorted(ids), Explainer, "explained") if ids else None

    def _robustness(self, clean: Scans) -> dict[str, Any] | None:
        """Return figures under perturbations of some scans by chance."""
        answered = self._work(chosen_for_robustness(clean), Perturber, "perturbed")
        columns = (clean.scan_id, clean.labels_N, clean.family_N)
        truth_of = {str(i): (int(k), str(f)) for i, k, f in zip(*columns, strict=True)}
        return robustness_figures(answered, truth_of, self.bundle.info.label_space)

    def _shortcuts(self, scans: Scans) -> dict[str, Any]:
        """Return how well the classes of some scans are told without seeing a tumour.

        Nothing is trained on but the test scans themselves, so copies in training do no harm.
        """
        refs = self._refs(scans.scan_id.tolist(), "label", "given_split", "group")
        refs = choose(refs, NUM_PROBED, shown_per_row=0, seed=0)
        stage = ExploreStage(self.bundle.info.members[0].preprocess)
        rows = read_rows(decode_catalog(refs.filter(refs["sampled"]), stage).sort_by("scan_id"))
        return probe_shortcuts(rows, rows["group"].to_pylist())

    def _work(self, scan_ids: list[str], worker: type[Any], done: str) -> pa.Table:
        refs = self._refs(scan_ids)
        return pa.concat_tables(work_on(self.bundle, refs, self.place, worker, done))

    def _refs(self, scan_ids: list[str], *columns: str) -> pa.Table:
        """Return where some scans are, and other columns of the catalog."""
        chosen = pc.is_in(self.truth["scan_id"], pa.array(scan_ids, pa.string()))
        return self.truth.filter(chosen).select([*REF_COLUMNS, *columns])


def _refuse_changed_source(test: pa.Table, predictions: pa.Table) -> None:
    """Raise DatasetError if a scan's bytes are not those that were labelled."""
    labelled = dict(zip(*(test[c].to_pylist() for c in ("scan_id", "content_sha256")), strict=True))
    for row in predictions.select(["scan_id", "content_sha256"]).to_pylist():
        if row["content_sha256"] not in (None, labelled[row["scan_id"]]):
            raise DatasetError(
                f"scan {row['scan_id']} is not the one that was labelled: the source has changed "
                "since bt prepare; prepare it again"
            )
