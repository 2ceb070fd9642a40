"""Folders of initial weights: staged, checked, and used without internet."""

import pytest
import safetensors.torch
import timm
import torch

from bt_core import storage
from bt_core.errors import WeightsError
from bt_core.models.backbones import input_size_px
from bt_core.models.classifier import build_classifier
from bt_core.models.spec import ModelSpec
from bt_core.models.weights import check_weights, hub_id, initial_sha256, stage_weights
from bt_core.scans.preprocess import PreprocessSpec

NAME = "mobilenetv2_050"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder as timm writes it, of random weights for 10 classes and an odd argument."""
    folder = tmp_path_factory.mktemp("timm") / "weights"
    torch.manual_seed(3)
    arguments = {"pad_type": "same"}
    model = timm.create_model(NAME, num_classes=10, **arguments)
    timm.models.save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    return folder


@pytest.fixture
def staged(source, tmp_path):
    stage_weights(NAME, f"local-dir:{source}", str(tmp_path / "staged"))
    return tmp_path / "staged"


def test_staged_weights_are_checked_and_used(source, staged):
    facts = check_weights(str(staged))
    assert facts["architecture"] == NAME
    assert facts["digests_compared"]
    assert facts["sha256"] == storage.sha256((staged / "model.safetensors").read_bytes())
    assert not check_weights(str(source))["digests_compared"]
    spec = ModelSpec(backbone=NAME, weights=f"local-dir:{staged}")
    model, resolved, _ = build_classifier(spec, PreprocessSpec(size_px=64), 4)
    original = safetensors.torch.load_file(source / "model.safetensors")
    assert torch.equal(model.backbone.conv_stem.weight, original["conv_stem.weight"])
    assert resolved.backbone_args["pad_type"] == "same"
    assert "num_classes" not in resolved.backbone_args
    started_from = initial_sha256(model.backbone, "local-dir")
    again, _, _ = build_classifier(spec, PreprocessSpec(size_px=32), 2)
    assert initial_sha256(again.backbone, "local-dir") == started_from, "whatever the head"
    with torch.no_grad():
        model.backbone.conv_stem.weight[0, 0, 0, 0] += 1
    assert initial_sha256(model.backbone, "local-dir") != started_from
    assert initial_sha256(model.backbone, "none") == "none"


def test_a_changed_file_is_noticed(staged):
    path = staged / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="not what was staged"):
        check_weights(str(staged))


def test_digests_are_read_as_sha256sum_writes_them_and_must_be_whole(staged):
    sums = staged / "SHA256SUMS"
    lines = sums.read_text().splitlines()
    sums.write_text("".join(line.replace("  ", " *") + "\n" for line in lines))
    assert check_weights(str(staged))["digests_compared"]
    sums.write_text(lines[0] + "\n")
    with pytest.raises(WeightsError, match="does not list"):
        check_weights(str(staged))
    sums.unlink()
    (staged / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="architecture"):
        check_weights(str(staged))


def test_tensors_that_do_not_fit_are_named(source, tmp_path):
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    tensors["conv_stem.weight"] = torch.zeros(3, 3)
    tensors["extra"] = tensors.pop("bn1.weight")
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(WeightsError) as error:
        check_weights(str(tmp_path))
    assert "bn1.weight is missing" in str(error.value)
    assert "extra is unknown" in str(error.value)
    assert "conv_stem.weight is (3, 3), not (16, 3, 3, 3)" in str(error.value)


def test_what_cannot_be_staged_or_read_says_why(source, staged, tmp_path):
    with pytest.raises(WeightsError, match="not empty"):
        stage_weights(NAME, f"local-dir:{source}", str(staged))
    with pytest.raises(WeightsError, match="'resnet18'"):
        stage_weights("resnet18", f"local-dir:{source}", str(tmp_path / "other"))
    (staged / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(WeightsError, match="cannot be read"):
        check_weights(str(staged))
    with pytest.raises(WeightsError, match=r"not a timm folder"):
        check_weights(str(tmp_path))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_backbone_knows_its_size_and_where_its_weights_are():
    assert input_size_px(ModelSpec(backbone="legacy_xception")) == 299
    assert input_size_px(ModelSpec(backbone="conv_stack", weights="none")) is None
    assert hub_id("resnet50").startswith("timm/resnet50")
