"""Runs a sweep on Ray Tune: one process per trial, without Ray Train inside it.

Tune schedules, stops, retries, persists and resumes; `trial` trains. A trial's worker, its threads
and the logical CPUs that it holds are one and the same, so that few CPUs suffice (a Ray Train run
inside a trial would hold more, and wait for itself).
"""

import json
import logging
import math
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any, Final

import pyarrow as pa
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch
from ray.util.metrics import Counter

from bt_core import storage
from bt_core.data.catalog import Dataset
from bt_core.data.views import ensure_view
from bt_core.errors import RunError, StoreError, last_line
from bt_core.log import logger
from bt_core.telemetry import EPOCHS, exported
from bt_core.training.learner import is_out_of_memory
from bt_core.training.sweep import MODES, Candidate, Dimension, SweepSpec, preprocessings
from bt_core.training.sweep_job import (
    RECIPE_KEY,
    Job,
    begin,
    drop_all_but,
    read_predictions,
    read_record,
    write_predictions,
    write_record,
)
from bt_core.training.trial import FitRecord, TrialRecord, reason_of, run_trial

_EXPERIMENT: Final = "tune"
_SHARE, _SCORE = "share_done", "score"
_WORST: Final = {"max": -1.0, "min": 1e6}
"""Score of a trial that failed."""
_MAX_DEATHS: Final = 2
"""Times that a trial whose process died, or whose node, is started again."""
_CUT_OFF: Final = "its records or scans cannot be read or written"
_NODE_LOST: Final = "its node has died"
"""As Ray says it of an actor: no fault of the trial either."""


def prepare_views(dataset: Dataset, spec: SweepSpec, found: list[Candidate]) -> dict[str, str]:
    """Store the pixels of every preprocessing of the sweep, once for all trials."""
    needed = preprocessings(spec, found)
    logger.info("%d kind(s) of preprocessing for the sweep", len(needed))
    return {p.pixel_digest: os.path.basename(ensure_view(dataset, p)) for p in needed}


def search(job: Job) -> bool:
    """Run the sweep's trials, or go on with those that an interrupted one left.

    Returns:
        Whether it ran to its end; False if it was interrupted.

    Raises:
        RunError: if Tune itself failed, or some trials lost their store, their disk or their nodes.
    """
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # records are ours; Tune's say no more
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # with verbose=0, no tables of its own
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # reasons are in our records
    trainable = tune.with_resources(
        tune.with_parameters(_trial, job=job), {"cpu": job.slots.cpus, "gpu": job.slots.gpus}
    )
    filesystem, folder = storage.filesystem(storage.join(job.location, _EXPERIMENT))
    if tune.Tuner.can_restore(folder, storage_filesystem=filesystem):
        logger.info("going on with the sweep in %s", job.location)
        tuner = tune.Tuner.restore(
            folder,
            trainable,
            resume_unfinished=True,
            restart_errored=True,  # what has failed by itself is on record, and reported from there
            storage_filesystem=filesystem,
        )
    else:
        tuner = _new_tuner(job, trainable)
    before = signal.getsignal(signal.SIGINT)
    try:
        grid = tuner.fit()
    except tune.TuneError as error:
        raise RunError(f"the sweep failed: {last_line(error)}") from error
    # Tune says nothing of an interrupt, but its handler of Ctrl-C puts the one before back.
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is before:
            return False
        signal.signal(signal.SIGINT, before)
    _settle(job, grid._experiment_analysis.trials)
    return True


def _new_tuner(job: Job, trainable: Any) -> tune.Tuner:
    spec = job.spec
    mode = MODES[spec.metric]
    names = [candidate.name for candidate in job.candidates]
    space = {key: _domain(dimension, spec.search) for key, dimension in spec.space.items()}
    at_once = job.slots.max_concurrent
    algorithm: Any = BasicVariantGenerator(max_concurrent=at_once, random_state=spec.seed)
    num_samples = spec.num_samples
    recipe: Any = tune.grid_search(names)
    if spec.search == "optuna":
        algorithm, recipe = OptunaSearch(seed=spec.seed), tune.choice(names)
        algorithm = ConcurrencyLimiter(algorithm, max_concurrent=at_once)
        num_samples *= len(names)
    minutes = spec.time_budget_minutes
    filesystem, path = storage.filesystem(job.location)
    return tune.Tuner(
        trainable,
        param_space={RECIPE_KEY: recipe, **space},
        tune_config=tune.TuneConfig(
            metric=_SCORE,
            mode=mode,
            num_samples=num_samples,
            scheduler=_scheduler(spec),
            search_alg=algorithm,
            time_budget_s=minutes * 60 if minutes else None,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=_EXPERIMENT,
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=_MAX_DEATHS),
            callbacks=[_Lines()],
        ),
    )


def _domain(dimension: Dimension, search: str) -> Any:
    """Return Tune's domain; choices travel as JSON text, since Optuna takes only plain values."""
    values = dimension.values()
    if values is not None and (search == "grid" or dimension.choice is not None):
        texts = [json.dumps(value) for value in values]
        return tune.grid_search(texts) if search == "grid" else tune.choice(texts)
    if dimension.int_range is not None:
        return tune.randint(dimension.int_range[0], dimension.int_range[1] + 1)
    if dimension.log_uniform is not None:
        return tune.loguniform(*dimension.log_uniform)
    assert dimension.uniform is not None
    return tune.uniform(*dimension.uniform)


def _scheduler(spec: SweepSpec) -> TrialScheduler:
    """Return the scheduler; its time is the share of a trial's work, in per mille.

    So recipes of different numbers of epochs meet at the same part of their schedules, on the same
    folds. The first rung is one epoch of a trial that has the sweep's epochs (10, if the recipes
    keep their own).
    """
    grace = max(1, math.floor(1000 / (len(spec.fits) * (spec.epochs or 10))))
    if spec.scheduler == "asha":
        return ASHAScheduler(
            time_attr=_SHARE,
            max_t=1001,  # at its end a trial is finished, not stopped
            grace_period=grace,
            reduction_factor=spec.reduction_factor,
        )
    if spec.scheduler == "median":
        return MedianStoppingRule(time_attr=_SHARE, grace_period=grace, min_samples_required=3)
    return FIFOScheduler()


def _trial(config: dict[str, Any], job: Job) -> None:
    """Run in a process of its own, with as many threads as it holds CPUs.

    What goes wrong in the training itself is reported as a worst score and not raised: raised, it
    would cost a new process, and a second try that fails in the same way. A store or a disk that
    fails is no fault of the trial: it is tried again, and by the next command.

    Raises:
        RunError: if its files cannot be read or written.
    """
    try:
        _run(config, job)
    except (OSError, StoreError) as error:
        raise RunError(f"{_CUT_OFF}: {type(error).__name__}: {error}") from error


def _run(config: dict[str, Any], job: Job) -> None:
    trial_id = tune.get_context().get_trial_id()
    record = read_record(job.location, trial_id)
    if record is not None and record.status in ("finished", "failed"):  # Tune did not see its end
        tune.report(_figures(record, 1.0))
        return
    done = read_predictions(job.location, trial_id) if record is not None else None
    record = record or begin(config, job, trial_id)
    write_record(job.location, record)
    share_done = 0.0
    epochs = exported(Counter, EPOCHS, "Epochs that were trained.")

    def on_epoch(so_far: TrialRecord, share: float) -> None:
        nonlocal record, share_done
        record, share_done = so_far, share
        epochs.inc()
        write_record(job.location, so_far)
        if share < 1:  # the end is reported when all is written
            tune.report(_figures(so_far, share))

    def on_fit(predictions: pa.Table) -> None:
        write_predictions(job.location, trial_id, predictions)

    if record.status != "failed":
        try:
            record = run_trial(record, Dataset(job.dataset), on_epoch, on_fit, done)
            share_done = 1.0
        except Exception as error:
            if isinstance(error, OSError | StoreError) and not is_out_of_memory(error):
                raise
            record = record.model_copy(update={"status": "failed", "reason": reason_of(error)})
        write_record(job.location, record)
    tune.report(_figures(record, share_done))


def _figures(record: TrialRecord, share: float) -> dict[str, Any]:
    score = record.mean(record.metric)
    if record.status == "failed" or score is None:
        score = _WORST[MODES[record.metric]]
    last = record.fits[-1] if record.fits else FitRecord(fold=0, seed=0)
    where = f"fold {last.fold} seed {last.seed} epoch {len(last.epochs)}"
    return {_SCORE: score, _SHARE: 1000 * share, "where": record.reason or where}


class _Lines(tune.Callback):  # type: ignore[misc]
    """One line in the log for every report."""

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Say how far a trial is."""
        if _SCORE not in result:
            return
        logger.info(
            "trial %s  %s  %3.0f %%  mean so far %.4f  %s",
            trial.trial_id,
            trial.config[RECIPE_KEY],
            result[_SHARE] / 10,
            result[_SCORE],
            result["where"],
        )


def _settle(job: Job, trials: Sequence[Any]) -> None:
    """Give the records of trials that Tune ended, or that died, their status and reason.

    Trials that Tune does not know were begun after its last snapshot before a kill; others have
    taken their place.

    Raises:
        RunError: if some lost their store, their disk or their nodes, and are to go on.
    """
    drop_all_but(job.location, {trial.trial_id for trial in trials})
    cut_off = []
    for trial in trials:
        record = read_record(job.location, trial.trial_id)
        if record is not None and record.status != "running":
            continue
        if trial.status == "ERROR" and _is_to_go_on(trial):
            cut_off.append(trial)  # it stays as it is
            continue
        if trial.status == "ERROR":
            update = {"status": "failed", "reason": _reason_of_death(trial)}
        elif trial.status == "TERMINATED":
            update = {"status": "stopped", "reason": _reason_of_stop(trial, job.spec)}
        else:
            continue  # it goes on when the command is given again
        record = record or begin(trial.config, job, trial.trial_id)
        write_record(job.location, record.model_copy(update=update))
    if cut_off:
        why = last_line(cut_off[0].get_error())
        raise RunError(
            f"{len(cut_off)} of {len(trials)} trials could not go on ({why}); what is trained is "
            "kept, and the same command goes on from there"
        )


def _is_to_go_on(trial: Any) -> bool:
    text = f"{trial.get_error()}"
    return _CUT_OFF in text or _NODE_LOST in text


def _reason_of_stop(trial: Any, spec: SweepSpec) -> str:
    """Tell the scheduler's decision, which marks the result that it rests on, from the others."""
    if spec.scheduler != "none" and trial.last_result.get("done"):
        return f"stopped early by {spec.scheduler}"
    return "the time budget ended" if spec.time_budget_minutes else "stopped by Ray Tune"


def _reason_of_death(trial: Any) -> str:
    text = f"{trial.get_error()}"
    if "OutOfMemory" in text or "memory pressure" in text:
        return "out_of_memory: Ray ended the trial's process; use a smaller batch or fewer trials"
    if "died" in text:
        return f"killed: the trial's process died {_MAX_DEATHS + 1} times"
    return f"error: {last_line(trial.get_error())}"
