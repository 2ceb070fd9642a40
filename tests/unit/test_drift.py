"""The stability index is small for scans like the validation scans, and large for others."""

import numpy as np
import pytest

from bt_core.ensemble.drift import DriftWatch, fit_drift

RNG = np.random.default_rng(0)
CONFIDENCE = RNG.beta(8, 1, 2000)
INTENSITY = RNG.normal(60, 15, 2000)


def watched(confidence_N, intensity_N, num=1000):
    watch = DriftWatch(fit_drift({"confidence": CONFIDENCE, "intensity": INTENSITY}), 1000)
    for confidence, intensity in zip(confidence_N[:num], intensity_N[:num], strict=True):
        watch.add({"confidence": confidence, "intensity": intensity})
    return watch.stability()


def test_scans_like_the_validation_scans_are_stable():
    found = watched(RNG.beta(8, 1, 1000), RNG.normal(60, 15, 1000))
    assert set(found) == {"confidence", "intensity"}
    assert max(found.values()) < 0.05


def test_what_shifts_is_told_by_itself():
    found = watched(RNG.beta(8, 1, 1000), RNG.normal(90, 15, 1000))
    assert found["confidence"] < 0.05
    assert found["intensity"] > 0.25


def test_only_the_latest_answers_count():
    watch = DriftWatch(fit_drift({"intensity": INTENSITY}), 200)
    for _ in range(500):
        watch.add({"intensity": 200.0, "confidence": 0.3})
    assert watch.stability()["intensity"] > 1
    for value in RNG.normal(60, 15, 200):
        watch.add({"intensity": value})
    assert watch.stability()["intensity"] < 0.2


def test_it_equals_the_formula():
    reference = fit_drift({"intensity": np.arange(100.0)})
    watch = DriftWatch(reference, 100)
    for _ in range(100):
        watch.add({"intensity": 0.0})
    p = np.array(reference.shares["intensity"]) * 100 + 0.5
    q = np.eye(len(p))[0] * 100 + 0.5
    p, q = p / p.sum(), q / q.sum()
    assert watch.stability()["intensity"] == pytest.approx(((q - p) * np.log(q / p)).sum())


def test_values_that_are_all_equal_and_no_answers_at_all():
    watch = DriftWatch(fit_drift({"confidence": np.ones(50), "intensity": np.zeros(50)}))
    assert watch.stability() == {}
    watch.add({"confidence": 1.0, "intensity": 0.0})
    assert all(np.isfinite(value) for value in watch.stability().values())
