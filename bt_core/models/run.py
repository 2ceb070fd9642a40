"""A run folder: what one training left behind, in open formats.

::

    run.json             RunInfo; written last, so its presence means that the run is finished
    recipe.json          every setting, as resolved
    history.jsonl        one line per epoch
    validation.parquet   scan_id, label, logits, group (family or patient) of every validation scan
                         at the kept epoch
    training_scans.parquet  pixel digests of the scans that trained or chose it
    model.safetensors    weights of the kept epoch
    started.json, checkpoints/   for resuming; not needed afterwards
"""

import platform
from importlib.metadata import version
from typing import Any, Final

import pyarrow as pa
import safetensors.torch
import torch

from bt_core import __version__, storage
from bt_core.config import StrictModel, parse
from bt_core.errors import ConfigError, UsageError
from bt_core.labels import LabelSpace
from bt_core.models.spec import ModelSpec
from bt_core.scans.preprocess import PreprocessSpec

HISTORY_FILE: Final = "history.jsonl"
_PACKAGES: Final = ("ray", "torch", "torchvision", "timm", "numpy", "opencv-python-headless")


def environment() -> dict[str, str]:
    """Return what decides a training's numbers beside its settings: versions, kind of processor."""
    own = {"bt": __version__, "python": platform.python_version()}
    kinds = {"cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"}
    if torch.cuda.is_available():
        kinds["gpu"] = torch.cuda.get_device_name()
    return own | kinds | {package: version(package) for package in _PACKAGES}


class RunInfo(StrictModel):
    """Content of `run.json`."""

    name: str
    recipe: dict[str, Any]
    recipe_digest: str
    label_space: LabelSpace
    model: ModelSpec
    preprocess: PreprocessSpec
    golden_digest: str
    dataset: str
    """Location of the dataset."""
    dataset_digest: str
    kept_epoch: int
    metrics: dict[str, float]
    """Validation figures of the kept epoch."""
    num_parameters: int
    num_workers: int
    device: str
    seconds: float
    environment: dict[str, str]
    run_ids: tuple[str, ...] = ()
    """Of the commands that trained it: several where it went on after a stop."""


class Run:
    """A finished run on disk.

    Raises:
        UsageError: if the folder is not one, or the run is not finished.
    """

    def __init__(self, location: str) -> None:
        self.location = storage.absolute(location)
        where = storage.join(self.location, "run.json")
        try:
            self.info = parse(RunInfo, storage.read_json(where), where)
        except FileNotFoundError as error:
            raise UsageError(
                f"{location} is not a finished run (no run.json); give the folder of a bt train, "
                "or run the same bt train again to finish it"
            ) from error
        except (ValueError, ConfigError) as error:
            raise UsageError(f"{where} cannot be understood: {error}") from error

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the weights of the kept epoch."""
        content = storage.read_bytes(storage.join(self.location, "model.safetensors"))
        return safetensors.torch.load(content)

    def validation(self) -> pa.Table:
        """Return scan_id, label (class index), logits and group of all validation scans, sorted."""
        table = storage.read_table(storage.join(self.location, "validation.parquet"))
        return table.sort_by("scan_id")

    def training_digests(self) -> list[str]:
        """Return the pixel digests of the scans that trained or chose it."""
        table = storage.read_table(storage.join(self.location, "training_scans.parquet"))
        digests: list[str] = table["pixel_sha256"].to_pylist()
        return digests

    def history(self) -> list[dict[str, Any]]:
        """Return the figures of every epoch."""
        return read_history(self.location)


def read_history(location: str) -> list[dict[str, Any]]:
    """Return the figures of the epochs that a run, finished or not, has written so far."""
    try:
        lines = storage.read_bytes(storage.join(location, HISTORY_FILE)).splitlines()
    except FileNotFoundError:
        return []
    return [storage.loads_json(line) for line in lines]
