"""One trial of a sweep: folds x seeds of one recipe, with a record that can train it again."""

import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, Final, Literal

import pyarrow as pa
import torch
from pydantic import Field

from bt_core import storage
from bt_core.config import StrictModel, parse
from bt_core.data.catalog import Dataset
from bt_core.errors import ConfigError, UsageError, WeightsError
from bt_core.log import logger
from bt_core.models.classifier import build_classifier
from bt_core.models.weights import check_weights, initial_sha256
from bt_core.training.engine import KEPT, SCORE, Predictions
from bt_core.training.folds import load_rows, train_fold
from bt_core.training.learner import DivergedError, is_out_of_memory
from bt_core.training.recipe import Recipe
from bt_core.training.sweep import Candidate

REPLAYED: Final = ("epoch", "loss", "learning_rate", "val_scans", "val_accuracy", "val_macro_f1",
                   "val_log_loss", SCORE)  # fmt: skip
"""Figures of an epoch that do not depend on how fast it went."""


class FitRecord(StrictModel):
    """One training inside a trial."""

    fold: int
    seed: int
    epochs: list[dict[str, Any]] = Field(default_factory=list)
    """Figures of every epoch."""

    def kept(self) -> dict[str, Any]:
        """Return the figures of the epoch that is kept, as `TrainSpec.keep` says."""
        return max(self.epochs, key=lambda figures: float(figures[KEPT]))


class TrialRecord(StrictModel):
    """Everything that a trial was, so that it can be trained again."""

    trial_id: str
    recipe: dict[str, Any]
    point: dict[str, Any]
    """Dotted key to the value that the search chose."""
    notes: list[str] = Field(default_factory=list)
    num_folds: int
    seeds: list[int]
    metric: str
    dataset_digest: str
    view: str
    """Folder below the dataset's `views` with the pixels."""
    device: str
    num_threads: int
    environment: dict[str, str]
    started_at: str
    seconds: float = 0.0
    status: Literal["running", "finished", "stopped", "failed"] = "running"
    reason: str = ""
    """Of a trial that failed or was stopped."""
    fits: list[FitRecord] = Field(default_factory=list)

    @property
    def num_epochs(self) -> int:
        """Epochs trained in all."""
        return sum(len(one.epochs) for one in self.fits)

    def mean(self, metric: str) -> float | None:
        """Return the mean of a metric over the trainings so far, each at the epoch it keeps."""
        trained = [one.kept()[metric] for one in self.fits if one.epochs]
        return fmean(trained) if trained else None


def run_trial(
    record: TrialRecord,
    dataset: Dataset,
    on_epoch: Callable[[TrialRecord, float], None],
    on_fit: Callable[[pa.Table], None] = lambda predictions: None,
    done: pa.Table | None = None,
) -> TrialRecord:
    """Train a trial's folds and seeds, one after another.

    Args:
        record: what to train.
        dataset: prepared scans.
        on_epoch: is given the record so far and the share of the work that is done, in (0, 1]. A
            trial goes through folds in the same order as all others, so that two trials of equal
            share are compared on the same folds.
        on_fit: is given, behind each training, the validation predictions of the kept epochs of
            all trainings so far: scan_id, label, logits, fold, seed.
        done: what `on_fit` was given when the trial was interrupted. The record's trainings that
            it holds are kept; all others are trained from their start.

    Returns:
        The finished record.

    Raises:
        ConfigError, WeightsError, RunError: if it cannot be trained.
    """
    torch.set_num_threads(record.num_threads)
    started = time.perf_counter()
    recipe = parse(Recipe, record.recipe, f"recipe of trial {record.trial_id}")
    view = storage.join(dataset.location, "views", record.view)
    rows = load_rows(dataset, view, record.num_folds)
    planned = [(fold, seed) for seed in record.seeds for fold in range(record.num_folds)]
    tables = [] if done is None else [done]
    trained = {
        (row["fold"], row["seed"])
        for table in tables
        for row in table.select(["fold", "seed"]).to_pylist()
    }
    fits = [one for one in record.fits if (one.fold, one.seed) in trained]

    def so_far(**update: Any) -> TrialRecord:
        seconds = round(record.seconds + time.perf_counter() - started, 1)
        return record.model_copy(update={"fits": list(fits), "seconds": seconds, **update})

    for fold, seed in planned[len(fits) :]:
        fits.append(FitRecord(fold=fold, seed=seed))

        def report(figures: dict[str, Any]) -> None:
            last = fits[-1]
            fits[-1] = last.model_copy(update={"epochs": [*last.epochs, dict(figures)]})
            share = (len(fits) - 1 + len(fits[-1].epochs) / recipe.train.epochs) / len(planned)
            on_epoch(so_far(), share)

        seeded = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})})
        kept = train_fold(seeded, rows, fold, torch.device(record.device), report)
        tables.append(_table(kept, fold, seed))
        on_fit(pa.concat_tables(tables))
    return so_far(status="finished")


def _table(predictions: Predictions, fold: int, seed: int) -> pa.Table:
    table = pa.table(
        {
            "scan_id": predictions.scan_id,
            "label": predictions.label,
            "logits": pa.array(predictions.logits, pa.list_(pa.float32())),
        }
    )
    table = table.append_column("fold", pa.array([fold] * table.num_rows))
    return table.append_column("seed", pa.array([seed] * table.num_rows))


def with_weights(
    found: list[Candidate], sources: Sequence[str], missing: str, num_classes: int
) -> list[Candidate]:
    """Give each recipe initial weights that can be had, by building its classifier once.

    Args:
        found: recipes of the sweep.
        sources: `local-dir:PATH`; each serves the recipes whose backbone it holds, one at least.
        missing: `error`, or `none` to start such recipes from none, with a note.
        num_classes: K.

    Raises:
        ConfigError: if a backbone does not exist.
        WeightsError: if weights cannot be had and `missing` is `error`, or a source is broken or
            fits no recipe.
    """
    held = {source: check_weights(source.partition(":")[2])["architecture"] for source in sources}
    backbones = {candidate.recipe({}).model.backbone for candidate in found}
    for source, architecture in held.items():
        if architecture not in backbones:
            raise WeightsError(
                f"--weights {source} holds {architecture}, which no recipe of the sweep has; they "
                f"have {', '.join(sorted(backbones))}"
            )
    return [_with_weights(candidate, held, missing, num_classes) for candidate in found]


def _with_weights(
    candidate: Candidate, held: dict[str, str], missing: str, num_classes: int
) -> Candidate:
    spec = candidate.recipe({}).model
    own = spec.weights
    fitting = [source for source, backbone in held.items() if backbone == spec.backbone]
    tried = [own] if own == "none" else [*fitting, own]
    for weights in tried:
        try:
            recipe = candidate.recipe({"model.weights": weights})
            model, _, _ = build_classifier(recipe.model, recipe.preprocess, num_classes)
        except WeightsError:
            if weights != own or missing == "error":
                raise
            continue
        content, source = recipe.model_dump(mode="json"), recipe.model.weights_source
        started_from = initial_sha256(model.backbone, source)
        return Candidate(candidate.name, content, candidate.notes, started_from)
    logger.warning("%s: %s weights cannot be had; it starts from none", candidate.name, own)
    recipe = candidate.recipe({"model.weights": "none"})
    note = f"{own.partition(':')[0]} weights not at hand: starts from none"
    return Candidate(candidate.name, recipe.model_dump(mode="json"), [*candidate.notes, note])


def reason_of(error: BaseException) -> str:
    """Return why a trial failed, as one line that begins with a code."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, DivergedError):
        return f"not_finite: {text}"
    if is_out_of_memory(error):
        return "out_of_memory: use a smaller batch or picture, or more memory per trial"
    if isinstance(error, ConfigError | WeightsError):
        return f"refused: {text}"
    return f"error: {type(error).__name__}: {text}"


def read_records(location: str) -> list[TrialRecord]:
    """Return the records of a finished sweep's `trials.jsonl`.

    Raises:
        UsageError: if the folder holds none.
    """
    where = storage.join(location, "trials.jsonl")
    try:
        lines = storage.read_bytes(where).splitlines()
    except FileNotFoundError as error:
        raise UsageError(f"{location} holds no trials.jsonl; give the -o of a bt tune") from error
    return [parse(TrialRecord, storage.loads_json(line), where) for line in lines]


def replay(record: TrialRecord, dataset: Dataset) -> TrialRecord:
    """Train a trial again from its record, as far as it had gone, in this process.

    On the kind of CPU and with the package versions of the record its figures come out equal to
    the last bit.

    Returns:
        The new record.

    Raises:
        UsageError: if the trial never trained an epoch, or the dataset is another one, or it was
            trained on a GPU and there is none.
    """
    if not record.num_epochs:
        raise UsageError(f"trial {record.trial_id} trained no epoch: {record.reason}")
    if dataset.info.digest != record.dataset_digest:
        raise UsageError(f"{dataset.location} is not the dataset that the trial was trained on")
    if record.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"trial {record.trial_id} was trained on a GPU, and there is none here")
    wanted = record.num_epochs

    def on_epoch(so_far: TrialRecord, share: float) -> None:
        if so_far.num_epochs == wanted and record.status != "finished":
            raise _Enough(so_far)

    try:
        bare = record.model_copy(update={"status": "running", "fits": [], "seconds": 0.0})
        return run_trial(bare, dataset, on_epoch)
    except _Enough as enough:
        return enough.record


class _Enough(Exception):
    def __init__(self, record: TrialRecord) -> None:
        super().__init__()
        self.record = record


def differences(first: TrialRecord, second: TrialRecord) -> list[str]:
    """Return each figure of each epoch in which two records of a trial differ, as text."""
    found = []
    for one, other in zip(first.fits, second.fits, strict=True):
        for a, b in zip(one.epochs, other.epochs, strict=True):
            found += [
                f"fold {one.fold}, seed {one.seed}, epoch {a['epoch']}, {name}: "
                f"{a[name]}, {b[name]}"
                for name in REPLAYED
                if a[name] != b[name]
            ]
    return found
