"""Which runtime a member gets: the fastest whose answers are the reference's, both measured.

Shape suffixes: N scans, B batch, S side, K classes.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from pydantic import Field
from scipy.special import softmax

from bt_core.config import StrictModel
from bt_core.errors import UnavailableError
from bt_core.inference.runtime import Runtime, TorchRuntime, golden_change, start
from bt_core.models.bundle import RuntimeInfo
from bt_core.models.classifier import Classifier
from bt_core.models.inputs import Preprocessor

CANDIDATES: Final = (
    ("compiled", "bf16"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
)
"""Kind and precision of what is measured against the reference."""
_ROUNDS: Final = 5
_ROUND_SECONDS: Final = 0.4
_KEPT_FLAGS: Final = ("avx2", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")


class Limits(StrictModel):
    """What may differ from the reference."""

    max_flips: float = Field(0.001, ge=0, le=1)
    """Share of scans whose likeliest class is another one."""
    max_change: float = Field(0.05, ge=0, le=1)
    """Of any probability of any scan, by the member alone."""


@dataclass
class Measured:
    """One way to run a member, on the validation scans and on one thread of this host."""

    kind: str
    precision: str
    batch_size: int
    images_per_second: float | None = None
    """Median of rounds that all took turns in; None for what this host cannot run."""
    start_seconds: float | None = None
    """Compiling it, once its files are there."""
    label_flips: float | None = None
    """Share of scans with another likeliest class than the reference's."""
    max_change: float | None = None
    """Largest difference of any probability from the reference's, golden picture included."""
    mean_change: float | None = None
    accepted: bool = False
    why_not: str = ""


@dataclass(frozen=True)
class Scans:
    """Pixels of one preprocessing spec.

    Attributes:
        compared_NSS: uint8, validation scans that answers are compared on.
        ranges_NSS: uint8, training scans that int8 takes its ranges from.
    """

    compared_NSS: np.ndarray
    ranges_NSS: np.ndarray


@dataclass
class Choice:
    """What was measured of one member, and what it gets.

    Attributes:
        runtime: the fastest accepted one.
        files: exported, by name; none for a runtime that needs none.
        measured: all, the reference first.
        logits_NK: of the compared scans, by the chosen runtime.
        reference_NK: by the reference.
    """

    runtime: RuntimeInfo
    measured: list[Measured]
    logits_NK: np.ndarray
    reference_NK: np.ndarray
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass
class _Started:
    """One candidate that runs here."""

    runtime: Runtime
    measured: Measured
    logits_NK: np.ndarray
    files: Mapping[str, bytes]


def choose_runtime(
    classifier: Classifier,
    preprocessor: Preprocessor,
    temperature: float,
    scans: Scans,
    limits: Limits,
    candidates: Sequence[tuple[str, str]] = CANDIDATES,
    batch_size: int = 4,
) -> Choice:
    """Measure every candidate on as many threads as torch has, and choose.

    Args:
        classifier: in evaluation mode, on the CPU.
        preprocessor: the member's.
        temperature: divides its logits before the softmax.
        scans: pixels of its preprocessing spec.
        limits: what may differ.
        candidates: kinds and precisions; the reference is always one.
        batch_size: scans of each forward pass.
    """
    reference = TorchRuntime(classifier, preprocessor, batch_size)
    wanted_NK = reference.run(scans.compared_NSS)[0]
    kept = RuntimeInfo(batch_size=batch_size)
    first = Measured(kind="torch", precision="fp32", batch_size=batch_size)
    started = [_Started(reference, first, wanted_NK, {})]
    rows = [first]
    exporter = _Exporter(classifier, preprocessor, scans.ranges_NSS, batch_size)
    for kind, precision in candidates:
        info = kept.model_copy(
            update={"kind": kind, "precision": precision, "max_change": limits.max_change}
        )
        row = Measured(kind=kind, precision=precision, batch_size=batch_size)
        rows.append(row)
        try:
            files = exporter.files(precision) if kind == "openvino" else {}
            began = time.perf_counter()
            runtime = start(classifier, preprocessor, info, files)
            row.start_seconds = round(time.perf_counter() - began, 2)
        except UnavailableError as error:
            row.why_not = str(error)
            continue
        logits_NK = runtime.run(scans.compared_NSS)[0]
        golden = golden_change(runtime, reference, preprocessor.spec, temperature)
        compare(row, logits_NK, wanted_NK, temperature, golden)
        started.append(_Started(runtime, row, logits_NK, files))
    compare(first, wanted_NK, wanted_NK, temperature, 0.0)
    _time_in_turns(started, scans.compared_NSS)
    for row in rows:
        judge(row, limits)
    best = max(
        (one for one in started if one.measured.accepted),
        key=lambda one: one.measured.images_per_second or 0.0,
    )
    return Choice(best.runtime.info, rows, best.logits_NK, wanted_NK, best.files)


def compare(
    row: Measured,
    logits_NK: np.ndarray,
    wanted_NK: np.ndarray,
    temperature: float,
    golden: float,
) -> None:
    """Fill in how far answers are from the reference's.

    Args:
        row: of the candidate.
        logits_NK: the candidate's.
        wanted_NK: the reference's.
        temperature: the member's.
        golden: largest change of the golden picture's probabilities.
    """
    probs_NK, right_NK = (
        softmax(np.float64(one) / temperature, axis=1) for one in (logits_NK, wanted_NK)
    )
    change_NK = np.nan_to_num(np.abs(probs_NK - right_NK), nan=1.0)
    row.label_flips = float((probs_NK.argmax(1) != right_NK.argmax(1)).mean())
    row.max_change = float(max(change_NK.max(), golden))
    row.mean_change = float(change_NK.mean())


def judge(row: Measured, limits: Limits) -> None:
    """Accept a candidate, or say why not."""
    if row.label_flips is None or row.max_change is None:
        return
    faults = []
    if row.label_flips > limits.max_flips:
        faults.append(f"{row.label_flips:.2%} of labels flip, {limits.max_flips:.2%} may")
    if row.max_change > limits.max_change:
        faults.append(f"a probability moves by {row.max_change:.3f}, {limits.max_change:g} may")
    row.accepted, row.why_not = not faults, "; ".join(faults)


def host() -> dict[str, Any]:
    """Return what of this host decides rates and answers: CPU and its instructions, versions."""
    from importlib.metadata import PackageNotFoundError, version

    found = torch.cpu.get_capabilities()
    versions = {}
    for name in ("torch", "openvino", "nncf"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = ""
    return {
        "cpu": str(found.get("cpu_name", found.get("architecture", ""))),
        "instructions": [flag for flag in _KEPT_FLAGS if found.get(flag)],
        "num_threads": torch.get_num_threads(),
        "versions": versions,
    }


class _Exporter:
    """Exports a member once, and quantises it once."""

    def __init__(
        self,
        classifier: Classifier,
        preprocessor: Preprocessor,
        ranges_NSS: np.ndarray,
        batch_size: int,
    ) -> None:
        self._classifier, self._preprocessor = classifier, preprocessor
        self._ranges_NSS, self._batch_size = ranges_NSS, batch_size
        self._model: Any = None

    def files(self, precision: str) -> Mapping[str, bytes]:
        """Return the files of a graph that fp32 and bf16 share, or of the one in int8.

        Raises:
            UnavailableError: if it cannot be made here.
        """
        from bt_core.inference.openvino_runtime import export, files_of, quantize

        if self._model is None:
            self._model = export(self._classifier, self._preprocessor, self._batch_size)
        if precision == "int8":
            return files_of(quantize(self._model, self._ranges_NSS, self._preprocessor))
        return files_of(self._model)


def _time_in_turns(started: Sequence[_Started], pixels_NSS: np.ndarray) -> None:
    """Fill in rates: medians of rounds, so that what else the host does hits all alike."""
    size = started[0].measured.batch_size
    pixels_BSS = np.resize(pixels_NSS, (size, *pixels_NSS.shape[1:]))
    rates: list[list[float]] = [[] for _ in started]
    for _ in range(_ROUNDS):
        for one, own in zip(started, rates, strict=True):
            began, num = time.perf_counter(), 0
            while (seconds := time.perf_counter() - began) < _ROUND_SECONDS:
                one.runtime.run(pixels_BSS)
                num += size
            own.append(num / seconds)
    for one, own in zip(started, rates, strict=True):
        one.measured.images_per_second = round(statistics.median(own), 1)
