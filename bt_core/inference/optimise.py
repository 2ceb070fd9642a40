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

from bt_core.errors import UnavailableError, first_line
from bt_core.inference.fidelity import Limits, Measured, compare, doubtful_below, judge
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
_KEPT_FLAGS: Final = ("avx2", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")


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
    contest = _Contest(classifier, preprocessor, temperature, scans, limits, batch_size)
    for kind, precision in candidates:
        info = RuntimeInfo.model_validate(
            {
                "kind": kind,
                "precision": precision,
                "batch_size": batch_size,
                "max_change": limits.max_change,
            }
        )
        contest.try_with_recheck(info)
    _time_in_turns(contest.started, scans.compared_NSS)
    best = max(
        (one for one in contest.started if one.measured.accepted),
        key=lambda one: one.measured.images_per_second or 0.0,
    )
    return Choice(best.runtime.info, contest.rows, best.logits_NK, contest.wanted_NK, best.files)


class _Contest:
    """The candidates of one member that were tried out, the reference first."""

    def __init__(
        self,
        classifier: Classifier,
        preprocessor: Preprocessor,
        temperature: float,
        scans: Scans,
        limits: Limits,
        batch_size: int,
    ) -> None:
        self._classifier, self._preprocessor = classifier, preprocessor
        self._temperature, self._scans, self._limits = temperature, scans, limits
        self._exporter = _Exporter(classifier, preprocessor, scans.ranges_NSS, batch_size)
        self._reference = TorchRuntime(classifier, preprocessor, batch_size)
        self.wanted_NK = self._reference.run(scans.compared_NSS)[0]
        first = Measured("torch fp32", batch_size)
        compare(first, self.wanted_NK, self.wanted_NK, temperature, 0.0)
        judge(first, limits)
        self.rows = [first]
        self.started = [_Started(self._reference, first, self.wanted_NK, {})]

    def try_with_recheck(self, info: RuntimeInfo) -> None:
        """Try a candidate; if it is refused, also with doubtful scans once more in float32."""
        alone = self._try(info)
        if alone is None or alone.measured.accepted:
            return
        args = (alone.logits_NK, self.wanted_NK, self._temperature, self._limits)
        below = doubtful_below(*args)
        if below is None:
            return
        checked = self._try(info.model_copy(update={"exact_below": below}))
        if checked is not None:
            checked.measured.exact_share = float((confidence(alone.logits_NK) < below).mean())

    def _try(self, info: RuntimeInfo) -> _Started | None:
        """Start a candidate and compare its answers; None if this host cannot run it."""
        row = Measured(name_of(info), info.batch_size, info.exact_below)
        self.rows.append(row)
        try:
            files = self._exporter.files(info.exports)
            began = time.perf_counter()
            load, device = (lambda: self._classifier), torch.device("cpu")
            runtime = start(load, self._preprocessor, info, files, device)
        except UnavailableError as error:
            row.why_not = _without_paths(error)
            return None
        row.start_seconds = round(time.perf_counter() - began, 2)
        logits_NK = runtime.run(self._scans.compared_NSS)[0]
        spec = self._preprocessor.spec
        golden = golden_change(runtime, self._reference, spec, self._temperature)
        compare(row, logits_NK, self.wanted_NK, self._temperature, golden)
        is_unproven = info.precision != "fp32" and len(logits_NK) < self._limits.min_scans
        judge(row, self._limits, is_unproven)
        self.started.append(_Started(runtime, row, logits_NK, files))
        return self.started[-1]


def name_of(info: RuntimeInfo) -> str:
    """Return how people call a runtime."""
    checked = f" (fp32 below {info.exact_below:g})" if info.exact_below else ""
    return f"{info.kind} {info.precision}{checked}"


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


def _without_paths(error: UnavailableError) -> str:
    """Return the first line of an error without paths of this machine, for the bundle keeps it."""
    return re.sub(r"(?<!\w)/[^\s:'\"]+", "...", first_line(error))
