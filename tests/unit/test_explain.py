"""Heat maps: where they are hot, whether they can be believed, and which scans are shown."""

import functools

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from bt_core.evaluation.explain import heat_maps
from bt_core.evaluation.explainer import FIGURES, SCHEMA, Explainer
from bt_core.evaluation.faithfulness import (
    deletion_and_insertion,
    mirror_agreement,
    randomised_similarity,
    rank_correlation,
    share_outside,
    shuffled,
)
from bt_core.evaluation.predictions import Scans, join_truth
from bt_core.evaluation.sheets import KINDS, chosen_scans, map_figures, overlay_png, sheets
from bt_core.labels import LABEL_SPACES
from bt_core.models.classifier import build_classifier
from bt_core.models.spec import HeadSpec, ModelSpec
from bt_core.scans.decoded import BURNED_IN
from bt_core.scans.preprocess import PreprocessSpec, head_mask
from tests.tiny_bundle import make_bundle
from tests.unit.test_evaluation import tables

SIDE = 96
SPACE = LABEL_SPACES["four_class"]


def heads(num, seed, mark):
    """Grey discs; half of them have a bright square, inside the head or at the border."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    inside = (y - SIDE / 2) ** 2 + (x - SIDE / 2) ** 2 < (0.36 * SIDE) ** 2
    images = np.where(inside, generator.normal(90, 12, (num, SIDE, SIDE)), 4.0)
    labels = np.arange(num) % 2
    corners = generator.integers(SIDE // 2 - 24, SIDE // 2 + 12, size=(num, 2))
    for image, label, (top, left) in zip(images, labels, corners, strict=True):
        if label:
            at = (top, left) if mark == "inside" else (2, 2)
            image[at[0] : at[0] + 12, at[1] : at[1] + 12] = 230
    return images.clip(0, 255).astype(np.uint8), labels


def as_input(pixels):
    return torch.from_numpy(pixels)[:, None].float().repeat(1, 3, 1, 1) / 255 - 0.3


@functools.cache
def trained(mark):
    """A small network that has learnt to find the square."""
    torch.manual_seed(0)
    spec = ModelSpec(
        backbone="cnn_small", backbone_args={"width": 8}, weights="none", head=HeadSpec(dropout=0.0)
    )
    model = build_classifier(spec, PreprocessSpec(size_px=SIDE), 2)[0].train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        pixels, labels = heads(24, step, mark)
        loss = nn.functional.cross_entropy(model(as_input(pixels)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def explained(model, mark, num=24):
    """Maps and figures of scans that have the mark, as a row each."""
    pixels, labels = heads(2 * num, 1000, mark)
    pixels = pixels[labels == 1]
    images, classes = as_input(pixels), torch.ones(num, dtype=torch.long)
    heat, method = heat_maps(model, images, classes)
    deletion, insertion = deletion_and_insertion(model, images, heat, classes)
    inside = torch.from_numpy(np.stack([head_mask(one) for one in pixels]))
    columns = {
        "outside_head": share_outside(heat, inside).numpy(),
        "mirror_agreement": mirror_agreement(model, images, heat, classes),
        "deletion": deletion.numpy(),
        "insertion": insertion.numpy(),
        "randomised_similarity": randomised_similarity(
            model, shuffled(model, 0), images, heat, classes
        ),
    }
    return [
        {
            "method": method,
            **{n: None if np.isnan(v[i]) else float(v[i]) for n, v in columns.items()},
        }
        for i in range(num)
    ]


@pytest.mark.parametrize(
    ("backbone", "size", "method"),
    [
        ("cnn_small", 48, "grad_cam"),
        ("mobilenetv3_small_050", 64, "grad_cam"),
        ("test_vit", 64, "attention_rollout"),
        ("levit_128s", 224, "grad_cam"),
        ("swin_tiny_patch4_window7_224", 224, "grad_cam"),
    ],
)
def test_any_kind_of_backbone_has_maps_of_the_images_size(backbone, size, method):
    torch.manual_seed(0)
    spec = ModelSpec(backbone=backbone, weights="none")
    model = build_classifier(spec, PreprocessSpec(size_px=size), 4)[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")]
    heat, how = heat_maps(model, torch.rand(3, 3, size, size), torch.tensor([0, 1, 3]))
    assert how == method
    assert heat.shape == (3, size, size)
    assert heat.min() >= 0
    assert set(heat.amax((1, 2)).tolist()) <= {0.0, 1.0}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert fused == [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")]


def test_a_trained_model_passes_the_sanity_check_and_an_untrained_one_does_not():
    model = trained("inside")
    found = map_figures(explained(model, "inside"))
    assert found["passes"], found
    assert found["outside_head"] < 0.3
    assert not map_figures(explained(shuffled(model, seed=5), "inside"))["passes"]


def test_the_sanity_check_needs_maps_that_say_something():
    good = {
        "method": "grad_cam", "deletion": 0.1, "insertion": 0.9, "outside_head": 0.1,
        "mirror_agreement": 0.9,
    }  # fmt: skip
    rows = [{**good, "insertion": 0.9 - i / 100, "randomised_similarity": 0.1} for i in range(9)]
    assert map_figures(rows)["passes"]
    assert not map_figures([{**row, "randomised_similarity": None} for row in rows])["passes"]
    assert not map_figures([{**row, "randomised_similarity": 0.8} for row in rows])["passes"]
    assert not map_figures([{**row, "insertion": 0.1} for row in rows])["passes"]


def test_members_that_see_another_cut_are_not_drawn_into_one_map(tmp_path):
    generator = np.random.default_rng(0)
    pixels = [generator.integers(0, 255, (8, s, s), dtype=np.uint8) for s in (32, 48)]
    classes = torch.arange(8) % 4
    heats = {}
    for name, crop in (("same", False), ("other", True)):
        info = make_bundle(tmp_path / name, sizes=(32, 48))
        second = info.members[1]
        cut = second.preprocess.model_copy(update={"crop_to_head": crop})
        explainer = Explainer(str(tmp_path / name), "cpu", 1)
        members = (info.members[0], second.model_copy(update={"preprocess": cut}))
        explainer.ensemble.predictor.members = members
        heats[name] = explainer._judged_maps(pixels, classes)[0]
    one = Explainer(str(tmp_path / "other"), "cpu", 1)
    alone, _ = heat_maps(
        one.ensemble.predictor.models[0], one.ensemble.predictor.inputs(pixels)[0], classes
    )  # fmt: skip
    assert np.abs(heats["other"] - (alone * 255).numpy()).max() <= 1
    assert (heats["same"] != heats["other"]).any()


def test_a_model_that_looks_at_a_border_mark_is_exposed_by_the_heat_outside_the_head():
    at_border = map_figures(explained(trained("border"), "border"))
    honest = map_figures(explained(trained("inside"), "inside"))
    assert at_border["outside_head"] > 0.6 > 2 * honest["outside_head"]


def test_the_head_is_one_region_with_what_it_encloses():
    y, x = np.mgrid[:96, :96]
    radius = np.hypot(y - 48, x - 48)
    ring = np.where((radius < 40) & (radius > 34), 200, 0).astype(np.uint8)
    ring[:6, :6] = 255  # a mark in the corner
    mask = head_mask(ring)
    assert mask[48, 48]
    assert not mask[:6, :6].any()
    assert mask.mean() == pytest.approx(np.pi * 40**2 / 96**2, rel=0.05)
    assert head_mask(np.zeros((40, 40), np.uint8)).all()


def test_rank_correlation_is_spearmans_and_flat_maps_have_none():
    ramp = torch.arange(16.0).view(1, 4, 4)
    assert rank_correlation(ramp, ramp**3).tolist() == pytest.approx([1.0])
    assert rank_correlation(ramp, -ramp).tolist() == pytest.approx([-1.0])
    assert np.isnan(rank_correlation(ramp, torch.ones(1, 4, 4))).all()
    inside = torch.tensor([[[True, False]]])
    assert share_outside(torch.tensor([[[3.0, 1.0]]]), inside).tolist() == [0.25]
    assert share_outside(torch.zeros(1, 1, 2), inside).isnan().all()


def test_every_scan_has_a_row_with_a_map_or_a_reason(tmp_path):
    make_bundle(tmp_path / "bundle", sizes=(32, 48), min_confidence=0.0, sure=True)
    generator = np.random.default_rng(0)
    columns = {
        "scan_id": np.array(["a", "b", "c", "d"]),
        "reason": np.array(["", "corrupt_image", "", ""]),
        "steps": np.array(["", "", "colour to grey", BURNED_IN]),
        "gate": np.array([""] * 4),
        "frame_index": np.array([0, 0, 4, 0]),
        "num_frames": np.array([1, 1, 9, 1]),
        "pixel_sha256": np.array(["0" * 64, "", "1" * 64, "2" * 64]),
        "pixels_0": generator.integers(0, 255, (4, 32, 32), dtype=np.uint8),
        "pixels_1": generator.integers(0, 255, (4, 48, 48), dtype=np.uint8),
        "pixels_2": generator.integers(0, 255, (4, 64, 64), dtype=np.uint8),
    }
    table = Explainer(str(tmp_path / "bundle"), "cpu", 1)(columns)
    assert table.schema == SCHEMA
    first, broken, last, text = table.to_pylist()
    assert (broken["reason"], broken["heat"]) == ("corrupt_image", None)
    assert (text["reason"], text["image"], text["status"]) == ("text_burned_in", None, "rejected")
    assert (last["status"], last["reason"]) == ("deferred", "one_of_many_frames")
    for row in (first, last):
        assert len(row["heat"]) == len(row["image"]) == 32 * 32
        assert all(name in row for name in FIGURES)
        assert overlay_png(row).startswith(b"\x89PNG")
    assert (
        np.frombuffer(last["image"], np.uint8).tolist() == columns["pixels_0"][2].ravel().tolist()
    )


def test_sheets_show_one_scan_of_a_family_and_none_with_text_burned_in():
    scores, truth = tables(num=160, bonus=0.3)
    scans = Scans.of(join_truth(scores, truth), SPACE)
    chosen = chosen_scans(scans, SPACE)
    place = {str(i): n for n, i in enumerate(scans.scan_id)}
    for kind in KINDS:
        own = [place[i] for i in chosen[kind]]
        assert 0 < len(own) <= 12
        by_class = [scans.labels_N[n] for n in own]
        assert by_class == sorted(by_class)
        for k in range(4):
            families = [scans.family_N[n] for n in own if scans.labels_N[n] == k]
            assert len(set(families)) == len(families)
    assert not scans.right_N[[place[i] for i in chosen["wrong"]]].any()
    assert scans.right_N[[place[i] for i in chosen["right"]]].all()
    assert len(chosen["sample"]) == 32
    burned = truth.set_column(
        truth.schema.get_field_index("steps"), "steps", pa.array([BURNED_IN] * 160)
    )
    hidden = chosen_scans(Scans.of(join_truth(scores, burned), SPACE), SPACE)
    assert not any(hidden.values())


def test_sheets_are_drawn_of_what_has_a_map():
    row = {
        "scan_id": "a", "status": "scored", "reason": "", "predicted_label": "glioma",
        "confidence": 0.9, "method": "grad_cam", "size_px": 8, "image": bytes(64),
        "heat": bytes(range(64)), **dict.fromkeys(FIGURES, 0.5),
    }  # fmt: skip
    lost = {"scan_id": "b", "status": "failed", "reason": "io_error"}
    table = pa.Table.from_pylist([row, lost], schema=SCHEMA)
    chosen = {"wrong": ["a", "b"], "unsure": ["b"], "right": [], "sample": []}
    found = sheets(table, chosen, {"a": "meningioma", "b": "glioma"})
    assert list(found) == ["sheet_wrong"]
    assert found["sheet_wrong"].startswith(b"\x89PNG")
    assert map_figures([lost | {"method": None}]) is None
