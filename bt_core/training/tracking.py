"""Figures of each epoch for TensorBoard and MLflow, beside the run's own history.jsonl.

Both packages are imported when they are used. Nothing is created before the first epoch, so that a
command that is refused leaves no trace.
"""

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol

from bt_core import storage
from bt_core.errors import UsageError
from bt_core.log import logger
from bt_core.training.recipe import Recipe

_EXPERIMENT: Final = "bt"
_RUN_FILE: Final = "mlflow.json"


class Tracker(Protocol):
    """Where figures go."""

    def epoch(self, figures: dict[str, Any]) -> None:
        """Take an epoch's figures; of a run that goes on, those before come again."""

    def close(self, finished: bool) -> None:
        """End the record of a run that is finished, or that may go on."""


@contextmanager
def tracking(
    recipe: Recipe, location: str, tensorboard: bool, mlflow: str | None
) -> Iterator[list[Tracker]]:
    """Give the trackers that were asked for, and close them as the block ends.

    Args:
        recipe: its settings are MLflow's parameters.
        location: the run folder.
        tensorboard: write event files into its subfolder `tensorboard`.
        mlflow: tracking URI.

    Raises:
        UsageError: if MLflow is not installed, its server does not answer, or the URI holds a
            password.
    """
    trackers: list[Tracker] = []
    if tensorboard:
        trackers.append(TensorBoardTracker(location))
    if mlflow is not None:
        trackers.append(MlflowTracker(mlflow, location, recipe))
    finished = False
    try:
        yield trackers
        finished = True
    finally:
        for tracker in trackers:
            tracker.close(finished)


class TensorBoardTracker:
    """Writes event files; for a run folder at a URI they are sent there at the end."""

    def __init__(self, location: str) -> None:
        self._target = storage.join(location, "tensorboard")
        self._writer: Any = None

    def epoch(self, figures: dict[str, Any]) -> None:
        """Add each figure as a scalar."""
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._folder = tempfile.mkdtemp() if storage.is_uri(self._target) else self._target
            # Readers drop what earlier files of the same run say from this epoch on.
            self._writer = SummaryWriter(self._folder, purge_step=figures["epoch"])
        for name, value in _numbers(figures).items():
            group = "validation" if name.startswith("val_") else "training"
            self._writer.add_scalar(f"{group}/{name.removeprefix('val_')}", value, figures["epoch"])
        self._writer.flush()

    def close(self, finished: bool) -> None:
        """Write what is left."""
        if self._writer is None:
            return
        self._writer.close()
        if self._folder != self._target:
            for name in storage.list_files(self._folder):
                content = storage.read_bytes(storage.join(self._folder, name))
                storage.write_bytes(storage.join(self._target, name), content)
            storage.remove_dir(self._folder)


class MlflowTracker:
    """Logs one MLflow run; a failing server costs the record, never the training."""

    def __init__(self, uri: str, location: str, recipe: Recipe) -> None:
        check_mlflow_uri(uri)
        if importlib.util.find_spec("mlflow") is None:
            raise UsageError("--mlflow needs the package mlflow-skinny: pip install .[mlflow]")
        for name, value in {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_ALLOW_FILE_STORE": "true",  # MLflow prefers a data base; a folder is asked for
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # its default waits for four minutes
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        }.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        self._uri, self._location, self._recipe = uri, location, recipe
        self._run: str | None = None
        self._logged, self._failed = 0, False
        try:
            self._client = MlflowClient(tracking_uri=uri)
            self._client.get_experiment_by_name(_EXPERIMENT)
        except Exception as error:  # whatever its stores raise
            raise UsageError(
                f"--mlflow {storage.redact(uri)} cannot be used ({type(error).__name__}); check "
                "the address, and MLFLOW_TRACKING_USERNAME and _PASSWORD if it needs them"
            ) from error

    def epoch(self, figures: dict[str, Any]) -> None:
        """Log each figure as a metric, once."""
        if not self._failed:
            self._guarded(lambda: self._log(figures))

    def close(self, finished: bool) -> None:
        """Set the run's status."""
        run = self._run
        if run is not None and not self._failed:
            status = "FINISHED" if finished else "KILLED"
            self._guarded(lambda: self._client.set_terminated(run, status))

    def _guarded(self, log: Any) -> None:
        try:
            log()
        except Exception as error:  # whatever its stores raise
            self._failed = True
            logger.warning(
                "MLflow at %s failed (%s); training goes on without it",
                storage.redact(self._uri),
                type(error).__name__,
            )

    def _log(self, figures: dict[str, Any]) -> None:
        if self._run is None:
            self._run = self._begun_run() or self._new_run()
        if figures["epoch"] > self._logged:
            for name, value in _numbers(figures).items():
                self._client.log_metric(self._run, name, value, step=figures["epoch"])
            self._logged = figures["epoch"]

    def _begun_run(self) -> str | None:
        """Return the run that an interrupted command began on the same server."""
        try:
            begun = storage.read_json(storage.join(self._location, _RUN_FILE))
        except FileNotFoundError:
            return None
        if begun["uri"] != self._uri:
            return None
        run = str(begun["run_id"])
        steps = [metric.step for metric in self._client.get_metric_history(run, "loss")]
        self._logged = max(steps, default=0)
        self._client.update_run(run, status="RUNNING")
        return run

    def _new_run(self) -> str:
        found = self._client.get_experiment_by_name(_EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(_EXPERIMENT)
        name = os.path.basename(self._location.rstrip("/"))
        run = str(self._client.create_run(experiment, run_name=name).info.run_id)
        for key, value in _flat(self._recipe.model_dump(mode="json")).items():
            self._client.log_param(run, key, value)
        storage.write_json(
            storage.join(self._location, _RUN_FILE), {"uri": self._uri, "run_id": run}
        )
        return run


def check_mlflow_uri(uri: str) -> None:
    """Raise UsageError, which does not quote it, if a tracking URI holds a password or key."""
    try:
        storage.refuse_secrets(uri)
    except UsageError as error:
        raise UsageError(
            f"--mlflow {storage.redact(uri)}: leave user and password out of the URI, and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN)"
        ) from error


def _numbers(figures: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in figures.items() if isinstance(v, int | float) and k != "epoch"}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat
