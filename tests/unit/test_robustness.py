"""Perturbations of pictures, and the curves over their strengths."""

import numpy as np
import pyarrow as pa
import pytest

from bt_core.evaluation.robustness import Perturber, robustness_figures, variants
from bt_core.labels import LABEL_SPACES
from bt_core.scans.perturb import PERTURBATIONS, UNITS, perturb
from bt_core.scans.phantom import phantom_slice
from tests.tiny_bundle import make_bundle

SPACE = LABEL_SPACES["four_class"]


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_stronger_is_further_from_the_picture_and_repeats(name):
    image = phantom_slice("glioma", 3, 128)
    before = image.copy()
    changed = [perturb(image, name, strength, seed=1) for strength in PERTURBATIONS[name]]
    assert (image == before).all()
    assert all(one.shape == image.shape and one.dtype == np.uint8 for one in changed)
    distances = [np.abs(one.astype(float) - image).mean() for one in changed]
    assert distances == sorted(distances)
    assert distances[0] > 0
    assert (perturb(image, name, PERTURBATIONS[name][2], seed=1) == changed[2]).all()
    assert name in UNITS


def test_every_scan_is_answered_for_every_variant_or_has_none(tmp_path):
    make_bundle(tmp_path / "bundle", sizes=(32,))
    columns = {
        "scan_id": np.array(["a", "b"]),
        "reason": np.array(["", "io_error"]),
        "pixels_0": np.stack([phantom_slice("glioma", 1, 32)] * 2),
        "pixels_1": np.stack([phantom_slice("glioma", 1, 64)] * 2),
    }
    first, broken = Perturber(str(tmp_path / "bundle"), "cpu", 1)(columns).to_pylist()
    assert broken == {"scan_id": "b", "probs": None}
    assert np.array(first["probs"]).shape == (len(variants()), 4)
    assert np.array(first["probs"]).sum(1) == pytest.approx(1.0)
    assert len(set(map(tuple, first["probs"]))) > 20


def test_curves_begin_with_the_picture_as_it_is():
    labels = np.arange(24) % 4
    right, wrong = np.eye(4), np.roll(np.eye(4), 1, axis=1)
    worst = {(name, strengths[-1]) for name, strengths in PERTURBATIONS.items()}
    probs = [[(wrong if v in worst else right)[k].tolist() for v in variants()] for k in labels]
    table = pa.table({"scan_id": [f"{i}" for i in range(24)], "probs": probs})
    truth = {f"{i}": (int(k), f"g{i}") for i, k in enumerate(labels)}
    found = robustness_figures(table, truth, SPACE)
    assert found["num_scans"] == 24
    assert found["curves"].keys() == PERTURBATIONS.keys()
    for curve in found["curves"].values():
        assert [point["accuracy"]["value"] for point in curve["points"]] == [1, 1, 1, 1, 0]
        assert curve["points"][0]["strength"] is None
    lost = pa.table({"scan_id": ["0"], "probs": pa.array([None], table.schema.field("probs").type)})
    assert robustness_figures(lost, truth, SPACE) is None
