"""Which runtime a member gets: the fastest whose answers are the reference's, both measured.

Shape suffixes: N scans, B batch, S side, K classes.
"""

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from pydantic import Field
from scipy.special import softmax
from scipy.stats import beta

from bt_core.config import StrictModel
from bt_core.errors import UnavailableError
from bt_core.inference.runtime import Runtime, TorchRuntime, confidence, golden_change, start
from bt_core.models.bundle import EXPORTS, INT8_EXPORTS, RuntimeInfo
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
_RATE_BATCH: Final = 64
"""Scans that come at once, as in scoring."""
EXACT_BELOW: Final = (0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
"""Confidences that doubtful answers may lie below."""
_KEPT_FLAGS: Final = ("avx2", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")


class Limits(StrictModel):
    """What may differ from the reference."""

    max_flips: float = Field(0.001, ge=0, le=1)
    """Share of scans whose likeliest class is another one."""
    max_change: float = Field(0.05, ge=0, le=1)
    """Of any probability of any scan, by the member alone."""
    min_scans: int = Field(300, ge=1)
    """On fewer, lower precision than float32 is not accepted: that none of 300 flips says that
    fewer than 1 % do, with 95 % confidence."""


@dataclass
class Measured:
    """One way to run a member, on the validation scans and on one thread of this host."""

    name: str
    batch_size: int
    exact_below: float = 0.0
    """As in `RuntimeInfo`."""
    exact_share: float = 0.0
    """Of the validation scans that it answers in float32."""
    images_per_second: float | None = None
    """Of CPU time, median of rounds that all took turns in; None for what this host cannot run."""
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
    first = Measured("torch fp32", batch_size)
    compare(first, wanted_NK, wanted_NK, temperature, 0.0)
    started = [_Started(reference, first, wanted_NK, {})]
    rows = [first]
    exporter = _Exporter(classifier, preprocessor, scans.ranges_NSS, batch_size)

    def try_out(info: RuntimeInfo) -> _Started | None:
        rows.append(row := Measured(name_of(info), batch_size, info.exact_below))
        try:
            files = exporter.files(info.exports)
            began = time.perf_counter()
            runtime = start(classifier, preprocessor, info, files)
        except UnavailableError as error:
            row.why_not = _without_paths(str(error))
            return None
        row.start_seconds = round(time.perf_counter() - began, 2)
        logits_NK = runtime.run(scans.compared_NSS)[0]
        golden = golden_change(runtime, reference, preprocessor.spec, temperature)
        compare(row, logits_NK, wanted_NK, temperature, golden)
        judge(row, limits, info.precision != "fp32" and len(logits_NK) < limits.min_scans)
        started.append(_Started(runtime, row, logits_NK, files))
        return started[-1]

    for kind, precision in candidates:
        info = RuntimeInfo.model_validate(
            {
                "kind": kind,
                "precision": precision,
                "batch_size": batch_size,
                "max_change": limits.max_change,
            }
        )
        alone = try_out(info)
        if alone is None or alone.measured.accepted:
            continue
        below = doubtful_below(alone.logits_NK, wanted_NK, temperature, limits)
        if below is not None:
            checked = try_out(info.model_copy(update={"exact_below": below}))
            if checked is not None:
                checked.measured.exact_share = float((confidence(alone.logits_NK) < below).mean())
    judge(first, limits)
    _time_in_turns(started, scans.compared_NSS)
    best = max(
        (one for one in started if one.measured.accepted),
        key=lambda one: one.measured.images_per_second or 0.0,
    )
    return Choice(best.runtime.info, rows, best.logits_NK, wanted_NK, best.files)


def name_of(info: RuntimeInfo) -> str:
    """Return how people call a runtime."""
    checked = f" (fp32 below {info.exact_below:g})" if info.exact_below else ""
    return f"{info.kind} {info.precision}{checked}"


def doubtful_below(
    logits_NK: np.ndarray, wanted_NK: np.ndarray, temperature: float, limits: Limits
) -> float | None:
    """Return the lowest confidence of `EXACT_BELOW` that keeps the limits, or None.

    Answers less sure are taken from the reference. Both limits are halved, because the scans that
    choose are those that are counted afterwards.

    Args:
        logits_NK: the candidate's.
        wanted_NK: the reference's.
        temperature: the member's.
        limits: what may differ.
    """
    half = Limits(max_flips=limits.max_flips / 2, max_change=limits.max_change / 2)
    for below in EXACT_BELOW:
        doubtful_N1 = confidence(logits_NK)[:, None] < below
        row = Measured("", 1)
        compare(row, np.where(doubtful_N1, wanted_NK, logits_NK), wanted_NK, temperature, 0.0)
        judge(row, half)
        if row.accepted:
            return below
    return None


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


def judge(row: Measured, limits: Limits, is_unproven: bool = False) -> None:
    """Accept a candidate, or say why not.

    Args:
        row: of the candidate.
        limits: what may differ.
        is_unproven: it was compared on too few scans to be accepted.
    """
    if row.label_flips is None or row.max_change is None:
        return
    faults = [f"it takes {limits.min_scans} scans to accept it"] if is_unproven else []
    if row.label_flips > limits.max_flips:
        faults.append(f"{row.label_flips:.2%} of labels flip, {limits.max_flips:.2%} may")
    if row.max_change > limits.max_change:
        faults.append(f"a probability moves by {row.max_change:.3f}, {limits.max_change:g} may")
    row.accepted, row.why_not = not faults, "; ".join(faults)


def flip_bound(num_flips: int, num_scans: int) -> float:
    """Return what the share of all scans that flip is below, with 95 % confidence.

    The upper bound of Clopper & Pearson (1934), on one side.
    """
    if num_flips == num_scans:
        return 1.0
    return float(beta.ppf(0.95, num_flips + 1, num_scans - num_flips))


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
        self._made: dict[str, bytes] = {}

    def files(self, names: Sequence[str]) -> Mapping[str, bytes]:
        """Return exported files by name, each made once.

        Raises:
            UnavailableError: if one cannot be made here.
        """
        from bt_core.inference.openvino_runtime import export, files_of, quantize

        if names and self._model is None:
            self._model = export(self._classifier, self._preprocessor, self._batch_size)
        if EXPORTS[0] in names and EXPORTS[0] not in self._made:
            self._made |= files_of(self._model)
        if INT8_EXPORTS[0] in names and INT8_EXPORTS[0] not in self._made:
            model = quantize(self._model, self._ranges_NSS, self._preprocessor)
            self._made |= files_of(model, INT8_EXPORTS)
        return {name: self._made[name] for name in names}


def _time_in_turns(started: Sequence[_Started], pixels_NSS: np.ndarray) -> None:
    """Fill in rates: medians of rounds, so that what else the host does hits all alike.

    By CPU time, which on one quiet core is the time that passes.
    """
    rates: list[list[float]] = [[] for _ in started]
    for _ in range(_ROUNDS):
        for one, own in zip(started, rates, strict=True):
            began, num, seconds = time.process_time(), 0, 0.0
            while seconds < _ROUND_SECONDS:
                first = num % len(pixels_NSS)
                num += len(one.runtime.run(pixels_NSS[first : first + _RATE_BATCH])[0])
                seconds = time.process_time() - began
            own.append(num / seconds)
    for one, own in zip(started, rates, strict=True):
        one.measured.images_per_second = round(statistics.median(own), 1)


def _without_paths(text: str) -> str:
    """Return the first line of an error without paths of this machine, for the bundle keeps it."""
    return re.sub(r"(?<!\w)/[^\s:'\"]+", "...", next(iter(text.splitlines()), ""))
