"""Classifiers and bundles, without Ray."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from bt_core import storage
from bt_core.config import parse
from bt_core.ensemble.calibration import calibration_of
from bt_core.ensemble.ensemble import Ensemble
from bt_core.ensemble.far import FarDetector
from bt_core.ensemble.scorer import Scorer
from bt_core.errors import BundleError, ConfigError, WeightsError
from bt_core.inference.predictor import Predictor, distinct_specs
from bt_core.inference.runtime import TorchRuntime
from bt_core.models.bundle import (
    COPIES_FILE,
    FAR_FILE,
    Bundle,
    CascadeInfo,
    index_key,
)
from bt_core.models.bundle_writer import write_card
from bt_core.models.classifier import build_classifier, build_head, rebuild_classifier
from bt_core.models.cnn import ConvStack
from bt_core.models.inputs import Preprocessor
from bt_core.models.spec import HeadSpec, ModelSpec
from bt_core.models.training_index import TrainingIndex
from bt_core.scans.phantom import phantom_slice
from bt_core.scans.preprocess import ClaheSpec, PreprocessSpec, preprocess_pixels
from bt_core.scans.thumbnails import THUMBNAIL
from tests.tiny_bundle import SPACE, TINY, make_bundle, with_subsets


def test_a_bundle_comes_back_as_it_was_written(tmp_path):
    info = make_bundle(tmp_path / "b")
    bundle = Bundle(str(tmp_path / "b"))
    assert bundle.info == info
    assert bundle.training_index() == {index_key("ab" * 32)}
    assert (tmp_path / "b" / "MODEL_CARD.md").read_text() == "a card"
    torch.manual_seed(1)
    expected = build_classifier(TINY, PreprocessSpec(size_px=48), 4)[0].eval()
    loaded = bundle.load_member(info.members[1])
    images = torch.rand(2, 3, 48, 48)
    assert torch.equal(expected(images), loaded(images))
    assert not list(tmp_path.glob("*.tmp"))
    write_card(str(tmp_path / "b"), "a better card")
    assert Bundle(str(tmp_path / "b")).info == info
    assert (tmp_path / "b" / "MODEL_CARD.md").read_text() == "a better card"


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_changed_byte_is_noticed(tmp_path_factory, data):
    """A flipped byte in any file that decides an answer makes the bundle unusable."""
    location = tmp_path_factory.mktemp("bundle") / "b"
    info = make_bundle(location, sizes=(32,))
    path = location / data.draw(st.sampled_from(sorted([*info.files, "bundle.json"])))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        same = Bundle(str(location)).info == info
    except BundleError:
        return
    assert same, "only whitespace of bundle.json may change unnoticed"


def test_a_missing_file_and_a_newer_format_are_refused(tmp_path):
    make_bundle(tmp_path / "b")
    (tmp_path / "b" / "members" / "m1" / "config.json").unlink()
    with pytest.raises(BundleError, match=r"m1/config.json is missing"):
        Bundle(str(tmp_path / "b"))
    make_bundle(tmp_path / "c", format_version=99)
    with pytest.raises(BundleError, match="format 99"):
        Bundle(str(tmp_path / "c"))


def test_weights_of_another_architecture_do_not_load(tmp_path):
    info = make_bundle(tmp_path / "b", sizes=(32,))
    other = info.members[0].model_copy(
        update={"model": TINY.model_copy(update={"backbone_args": {"width": 8}})}
    )
    with pytest.raises(BundleError, match="does not fit"):
        Bundle(str(tmp_path / "b")).load_member(other)


def test_a_host_that_preprocesses_differently_may_not_score(tmp_path):
    make_bundle(tmp_path / "b", sizes=(32,))
    bundle = Bundle(str(tmp_path / "b"))
    member = bundle.info.members[0].model_copy(update={"golden_digest": "0" * 64})
    bundle.info = bundle.info.model_copy(update={"members": (member,)})
    with pytest.raises(BundleError, match="golden image"):
        Predictor(bundle)


def test_an_ensemble_answers_for_each_scan_and_knows_training_scans(tmp_path):
    make_bundle(tmp_path / "b")
    ensemble = Ensemble(Bundle(str(tmp_path / "b")))
    rng = np.random.default_rng(0)
    pixels = [
        rng.integers(0, 256, (5, s.size_px, s.size_px), dtype=np.uint8) for s in ensemble.specs
    ]
    answers = ensemble.answer(pixels, ["ab" * 32, "cd" * 32, "ef" * 32, "01" * 32, "23" * 32])
    assert [a["seen_in_training"] for a in answers] == [True, False, False, False, False]
    for answer in answers:
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert (answer["reason"] == "") == (answer["status"] == "scored")
        assert answer["members_used"] == ["m0", "m1"]
        assert 0 < answer["entropy"] <= np.log(4) + 1e-9


@pytest.mark.parametrize("flips", ["none", "both"])
def test_score_rows_in_depth_hold_logits_and_the_first_members_features(tmp_path, flips):
    make_bundle(tmp_path / "b", flips=flips)
    generator = np.random.default_rng(0)
    columns = {
        "scan_id": np.array([f"{i}" for i in range(7)]),
        "reason": np.array(["", "io_error", *[""] * 5]),
        **{name: np.array([""] * 7) for name in ("uri", "member", "content_sha256")},
        "pixel_sha256": np.array(["0" * 64] * 7),
        "position": np.arange(7),
        "format": np.array(["PNG"] * 7),
        "gate": np.array([""] * 7),
        "frame_index": np.zeros(7, int),
        "num_frames": np.ones(7, int),
        **{
            f"pixels_{i}": generator.integers(0, 255, (7, s, s), np.uint8)
            for i, s in enumerate((32, 48, 64))
        },
    }
    plain = Scorer(str(tmp_path / "b"), "cpu", 1)(columns)
    deep = Scorer(str(tmp_path / "b"), "cpu", 1, in_depth=True)(columns)
    same = [name for name in plain.column_names if name != "scored_at"]
    assert deep.select(same).equals(plain.select(same))
    assert deep["logits"].null_count == deep["features"].null_count == 1
    rows = [row for row in deep.to_pylist() if row["logits"]]
    bundle = Bundle(str(tmp_path / "b"))
    logits = Predictor(bundle).logits([columns[f"pixels_{i}"][[0, 2, 3, 4, 5, 6]] for i in (0, 1)])
    np.testing.assert_array_equal([row["logits"] for row in rows], logits.swapaxes(0, 1))
    if flips == "none":
        head = bundle.load_member(bundle.info.members[0]).head
        features = torch.tensor([row["features"] for row in rows])
        torch.testing.assert_close(head(features).detach().numpy(), logits[0])
    assert len({tuple(row["features"]) for row in rows}) == 6


def test_an_answer_is_the_same_to_the_last_bit_alone_and_among_others(tmp_path):
    make_bundle(tmp_path / "b", sizes=(48,))
    predictor = Predictor(Bundle(str(tmp_path / "b")))
    pixels_BSS = np.random.default_rng(0).integers(0, 256, (9, 48, 48), dtype=np.uint8)
    together = predictor.logits([pixels_BSS])
    alone = [predictor.logits([pixels_BSS[i : i + 1]]) for i in range(9)]
    assert (together == np.concatenate(alone, axis=1)).all()
    shifted = [predictor.logits([pixels_BSS[:2]]), predictor.logits([pixels_BSS[2:]])]
    assert (together == np.concatenate(shifted, axis=1)).all()


def some_pixels(ensemble, num=12):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (num, s.size_px, s.size_px), np.uint8) for s in ensemble.specs]


@pytest.mark.parametrize("fault", ["damaged", "missing", "other preprocessing"])
def test_a_member_that_cannot_answer_is_left_out_and_said(tmp_path, fault, lines, monkeypatch):
    info = with_subsets(tmp_path / "b")
    weights = tmp_path / "b" / "members" / "m0" / "model.safetensors"
    if fault == "damaged":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif fault == "missing":
        weights.unlink()
    else:
        digest = Preprocessor.golden_digest.func
        monkeypatch.setattr(
            Preprocessor,
            "golden_digest",
            property(lambda self: "0" * 64 if self.spec.size_px == 32 else digest(self)),
        )
    ensemble = Ensemble(Bundle(str(tmp_path / "b")), cascade=True)
    pixels = some_pixels(ensemble)
    assert [spec.size_px for spec in ensemble.specs] == [32, 48, 40], "what decodes does not know"
    answers = ensemble.answer(pixels, ["cd" * 32] * 12)
    assert "member m0 does not answer" in lines.text
    expected = softmax(ensemble.predictor.logits(pixels)[0] / 1.5 / 4.0, axis=1)
    for answer, probs_K in zip(answers, expected, strict=True):
        assert answer["members_used"] == ["m1"]
        np.testing.assert_allclose(list(answer["probabilities"].values()), probs_K, atol=1e-6)
    strict = info.model_copy(update={"quorum": 2})
    bundle = Bundle(str(tmp_path / "b")) if fault == "other preprocessing" else None
    if bundle:
        bundle.info = strict
        with pytest.raises(BundleError, match="golden image"):
            Predictor(bundle)


def test_a_host_that_computes_other_answers_may_not_score(tmp_path, monkeypatch):
    make_bundle(tmp_path / "b", sizes=(32,))
    Predictor(Bundle(str(tmp_path / "b")))
    right = TorchRuntime._forward

    def faulty(self, pixels_BSS):
        logits_BK, features_BD = right(self, pixels_BSS)
        return logits_BK + np.array([0.5, 0, 0, 0], np.float32), features_BD

    monkeypatch.setattr(TorchRuntime, "_forward", faulty)
    with pytest.raises(BundleError, match=r"golden picture is 0\.\d+ from what it was"):
        Predictor(Bundle(str(tmp_path / "b")))


def test_odd_scans_are_deferred_and_copies_of_training_scans_known(tmp_path):
    scans = [phantom_slice("glioma", seed, 128) for seed in range(60)]
    specs = [PreprocessSpec(size_px=32), THUMBNAIL]
    pixels = [np.stack([preprocess_pixels(s, spec) for s in scans]) for spec in specs]
    index = TrainingIndex.build(pixels[1][:40], [f"{i:016x}" for i in range(40)])
    make_bundle(tmp_path / "a", sizes=(32,), sure=True)
    features_ND = Ensemble(Bundle(str(tmp_path / "a"))).predictor.first(pixels)[1]
    far = FarDetector.fit(features_ND, np.arange(60), rate=0.1)
    arrays = {COPIES_FILE: index.arrays(), FAR_FILE: far.arrays()}
    make_bundle(tmp_path / "b", sizes=(32,), sure=True, arrays=arrays)
    ensemble = Ensemble(Bundle(str(tmp_path / "b")))
    mirrored = [np.concatenate([p[:1, :, ::-1], p[50:53]]) for p in pixels]
    mirrored = [np.concatenate([p, np.full_like(p[:1], 255)]) for p in mirrored]
    gates = ["", "", "burnt_in_text", "", ""]
    copy, plain, marked, other, blank = ensemble.answer(mirrored, ["cd" * 32] * 5, gates)
    assert (copy["seen_in_training"], copy["nearest_family"]) == (True, "0" * 16)
    assert copy["nearest_correlation"] > 0.98
    for answer in (plain, marked, other):
        assert (answer["seen_in_training"], answer["nearest_family"]) == (False, None)
        assert answer["distance"] < far.threshold
    assert (marked["status"], marked["reason"]) == ("deferred", "burnt_in_text")
    assert (plain["status"], plain["reason"]) == ("scored", "")
    assert (blank["status"], blank["reason"]) == ("deferred", "far_from_training")
    assert blank["distance"] > far.threshold
    assert blank["nearest_correlation"] == 0


def test_a_bundle_below_its_quorum_is_refused(tmp_path):
    with_subsets(tmp_path / "b")
    for name in ("m0", "m1"):
        (tmp_path / "b" / "members" / name / "model.safetensors").unlink()
    with pytest.raises(BundleError, match="is missing"):
        Bundle(str(tmp_path / "b"))


def test_the_cascade_asks_the_others_only_where_the_first_is_not_safe(tmp_path):
    plain = with_subsets(tmp_path / "a", temperature=0.02)
    first = Ensemble(Bundle(str(tmp_path / "a")))
    pixels = some_pixels(first)
    alone = calibration_of(plain, ["m0"]).probs(first.predictor.logits(pixels, [0]))
    middle = float(np.median(alone.max(1)))
    cascade = CascadeInfo(
        min_confidence=dict.fromkeys(SPACE.names, middle), max_disagreement=0.005, agreement=1,
        agreement_by_family=1, answered_alone=0.5, num_scans=12, num_families=12,
    )  # fmt: skip
    with_subsets(tmp_path / "b", cascade, temperature=0.02)
    bundle = Bundle(str(tmp_path / "b"))
    answers = Ensemble(bundle, cascade=True).answer(pixels, ["cd" * 32] * 12)
    together = Ensemble(bundle, cascade=False).answer(pixels, ["cd" * 32] * 12)
    assert all(answer["members_used"] == ["m0", "m1"] for answer in together)
    used = {tuple(answer["members_used"]) for answer in answers}
    assert used == {("m0",), ("m0", "m1")}
    for answer, whole, probs_K in zip(answers, together, alone, strict=True):
        if len(answer["members_used"]) == 2:
            assert answer == whole, "not a bit differs from the ensemble's"
        else:
            assert answer["confidence"] >= middle
            assert answer["status"] == "scored"
            assert list(answer["probabilities"].values()) == probs_K.tolist()


def test_specs_that_differ_in_normalisation_alone_share_their_pixels():
    one = PreprocessSpec(size_px=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    two = one.model_copy(update={"mean": (0.4, 0.4, 0.4)})
    three = one.model_copy(update={"clahe": ClaheSpec()})
    distinct, places = distinct_specs([one, two, three, one])
    assert distinct == (one, three)
    assert places == (0, 0, 1, 0)


def test_normalisation_by_hand():
    spec = PreprocessSpec(size_px=32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    tensor = Preprocessor(spec).batch(np.full((2, 32, 32), 51, np.uint8))
    assert tensor.shape == (2, 3, 32, 32)
    expected = [(0.2 - 0.1) / 0.5, 0.0, (0.2 - 0.3) / 1.0]
    np.testing.assert_allclose(tensor[1, :, 5, 5], expected, atol=1e-7)
    with pytest.raises(ValueError, match="resolve mean and std"):
        Preprocessor(PreprocessSpec())


def test_unit_and_zscore_need_nothing_of_the_backbone():
    rng = np.random.default_rng(0)
    pixels_BSS = rng.integers(0, 256, (3, 32, 32), dtype=np.uint8)
    pixels_BSS[2] = 77  # flat
    unit = Preprocessor(PreprocessSpec(size_px=32, normalize="unit")).batch(pixels_BSS)
    expected = np.repeat(pixels_BSS[:, None].astype(np.float32) / np.float32(255), 3, axis=1)
    assert np.array_equal(unit.numpy(), expected)
    scored = Preprocessor(PreprocessSpec(size_px=32, normalize="zscore"))
    together = scored.batch(pixels_BSS)
    assert together.dtype == torch.float32
    np.testing.assert_allclose(together[:2].mean((2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(together[:2].std((2, 3), correction=0), 1, atol=1e-6)
    assert (together[2] == 0).all()
    alone = torch.cat([scored.batch(pixels_BSS[i : i + 1]) for i in range(3)])
    assert (together == alone).all()
    for spec in (PreprocessSpec(normalize="unit"), PreprocessSpec(normalize="zscore")):
        assert build_classifier(TINY, spec, 4)[2] == spec


def test_a_bundle_from_before_a_setting_existed_still_opens(tmp_path):
    info = make_bundle(tmp_path / "b")
    path = tmp_path / "b" / "bundle.json"
    content = json.loads(path.read_text())
    for member in content["members"]:
        for name in ("interpolation", "clip_percentiles", "equalize", "normalize"):
            del member["preprocess"][name]
    del content["bundle_id"]
    content["bundle_id"] = storage.digest_of(content)[:16]
    path.write_text(json.dumps(content))
    old = Bundle(str(tmp_path / "b"))
    assert old.info.bundle_id == content["bundle_id"] != info.bundle_id
    assert old.info.members == info.members
    assert Predictor(old).logits([np.zeros((1, s, s), np.uint8) for s in (32, 48)]).shape[0] == 2
    content["temperature"] = 2.0
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match="was changed"):
        Bundle(str(tmp_path / "b"))


def test_the_small_network_has_the_stated_size():
    model, _, preprocess = build_classifier(
        ModelSpec(backbone="cnn_small", weights="none"), PreprocessSpec(), 4
    )
    assert sum(p.numel() for p in model.backbone.parameters()) == 388_896
    assert preprocess.mean == (0.5, 0.5, 0.5)
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 4)


def test_heads_have_the_widths_of_their_spec():
    head = build_head(1280, 4, HeadSpec(hidden=(128, 16), dropout=0.5))
    linear = [m for m in head if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(1280, 128), (128, 16), (16, 4)]


def kinds(head):
    return [type(module).__name__ for module in head]


def test_a_head_has_its_layers_in_order_with_the_stated_initialisation():
    layers = [{"dense": 512}, {"dropout": 0.4}, {"batch_norm": True}, {"activation": "relu"}]
    torch.manual_seed(0)
    head = build_head(2048, 2, HeadSpec(layers=layers, init="he"))
    assert kinds(head) == ["Linear", "Dropout", "BatchNorm1d", "ReLU", "Linear"]
    assert head[0].weight.std().item() == pytest.approx((2 / 2048) ** 0.5, rel=0.02)
    assert not head[0].bias.any()
    limit = (6 / (2048 + 512)) ** 0.5
    glorot = build_head(2048, 2, HeadSpec(layers=layers, init="glorot"))[0].weight
    assert 0.99 * limit < glorot.abs().max().item() <= limit


@pytest.mark.parametrize(
    ("head", "text"),
    [
        ({"layers": [{"dense": 8, "dropout": 0.1}]}, "exactly one of"),
        ({"layers": [{}]}, "exactly one of"),
        ({"layers": [{"dropout": 0.1}], "hidden": [8]}, "not both"),
        ({"layers": [{"dense": 8}], "dropout": 0.1}, "not both"),
        ({"layers": [{"width": 8}]}, "valid here: activation, batch_norm, dense, dropout"),
    ],
)
def test_a_head_that_contradicts_itself_is_refused(head, text):
    with pytest.raises(ConfigError, match=text):
        parse(HeadSpec, head, "head")


def test_a_head_comes_back_from_its_json():
    for head in (HeadSpec(), HeadSpec(hidden=(8,), dropout=0.1), HeadSpec(layers=[{"dense": 8}])):
        assert HeadSpec.model_validate(json.loads(head.model_dump_json())) == head


@pytest.mark.parametrize(("flips", "axes"), [("horizontal", [[3]]), ("both", [[3], [2], [2, 3]])])
@torch.no_grad()
def test_with_test_time_flips_a_mirrored_image_has_the_same_answer(flips, axes):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 32, 32)
    spec = TINY.model_copy(update={"test_time_flips": flips})
    plain = build_classifier(TINY, PreprocessSpec(size_px=32), 4)[0].eval()
    flipped = rebuild_classifier(spec, PreprocessSpec(size_px=32), 4)
    flipped.load_state_dict(plain.state_dict())
    views = [images, *(images.flip(own) for own in axes)]
    expected = torch.stack([plain(view) for view in views]).mean(0)
    for view in views:
        torch.testing.assert_close(flipped(view), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain(images), plain(images.flip(3)))
    answers = []
    for model in (flipped, plain):
        torch.manual_seed(1)  # of the dropout
        answers.append(model.train()(images))
    torch.testing.assert_close(*answers)


def test_a_flattened_map_gives_the_head_its_real_width():
    spec = ModelSpec(
        backbone="conv_stack",
        backbone_args={"layers": [8, "pool", 16, "pool"], "padding": "valid"},
        weights="none",
        head=HeadSpec(pool="flatten", hidden=(5,)),
    )
    model, resolved, preprocess = build_classifier(spec, PreprocessSpec(size_px=46), 4)
    assert model.head[0].in_features == 16 * 10 * 10  # 46, 44, 22, 20, 10
    assert model(torch.rand(2, 3, 46, 46)).shape == (2, 4)
    rebuilt = rebuild_classifier(resolved, preprocess, 4)
    rebuilt.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("arguments", "size", "text"),
    [
        ({"layers": [8, "pol"]}, 48, "'pol'"),
        ({"layers": [8, {"drop": 0.5}]}, 48, "drop"),
        ({"layers": [8], "padding": "full"}, 48, "'full'"),
        ({"layers": [8, *["pool"] * 6]}, 48, "cannot take images of 48x48"),
    ],
)
def test_a_stack_that_cannot_be_built_says_why(arguments, size, text):
    spec = ModelSpec(backbone="conv_stack", backbone_args=arguments, weights="none")
    with pytest.raises(ConfigError, match=text):
        build_classifier(spec, PreprocessSpec(size_px=size), 4)


def test_a_backbone_that_refuses_a_size_without_a_word_is_refused_as_well(monkeypatch):
    def refuse(self, images_BCHW):
        raise AssertionError

    monkeypatch.setattr(ConvStack, "forward_features", refuse)
    spec = ModelSpec(backbone="conv_stack", backbone_args={"layers": [8]}, weights="none")
    with pytest.raises(ConfigError, match="cannot take images of 48x48: AssertionError"):
        build_classifier(spec, PreprocessSpec(size_px=48), 4)


@pytest.mark.parametrize("pool", ["backbone", "flatten"])
@pytest.mark.parametrize(
    "backbone",
    # plain, with a wide last layer in the head, bound to one size, hybrid, channels last
    ["resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224", "levit_128s", "tiny_vit_5m_224"],
)
def test_any_timm_backbone_becomes_a_classifier_at_any_size(backbone, pool):
    spec = ModelSpec(backbone=backbone, weights="none", head=HeadSpec(pool=pool))
    model, resolved, preprocess = build_classifier(spec, PreprocessSpec(size_px=128), 4)
    images = torch.rand(2, 3, 128, 128)
    assert model(images).shape == (2, 4)
    assert torch.equal(model.eval()(images), model.forward_head(model.forward_features(images)))
    assert preprocess.mean is not None
    rebuilt = rebuild_classifier(resolved, preprocess, 4)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(images), model(images))


def test_weights_come_from_a_timm_folder_with_its_arguments(tmp_path):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(7)
    source = timm.create_model("mobilenetv2_050", num_classes=10, pad_type="same")
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "mobilenetv2_050", "num_classes": 10, "model_args": {"pad_type": "same"},
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 224, 224],
                           "classifier": "classifier", "first_conv": "conv_stem"},
    }  # fmt: skip
    storage.write_json(str(tmp_path / "config.json"), config)
    spec = ModelSpec(backbone="mobilenetv2_050", weights=f"local-dir:{tmp_path}")
    model, resolved, preprocess = build_classifier(spec, PreprocessSpec(), 4)
    assert torch.equal(model.backbone.conv_stem.weight, source.conv_stem.weight)
    assert resolved.backbone_args == {"pad_type": "same"}
    assert preprocess.std == (0.25, 0.25, 0.25)
    rebuilt = rebuild_classifier(resolved, preprocess, 4)
    rebuilt.load_state_dict(model.state_dict())
    images = torch.rand(1, 3, 96, 96)
    assert torch.equal(rebuilt(images), model.eval()(images))
    wrong = ModelSpec(backbone="resnet18", weights=f"local-dir:{tmp_path}")
    with pytest.raises(WeightsError, match=r"'mobilenetv2_050'.*'resnet18'"):
        build_classifier(wrong, PreprocessSpec(), 4)


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        ({"backbone": "mobilenetv9", "weights": "none"}, ConfigError, "near: mobilenet"),
        ({"backbone": "cnn_small", "weights": "hub"}, WeightsError, "model.weights=none"),
        ({"backbone": "resnet18", "weights": "local-dir:/nowhere"}, WeightsError, "hub or none"),
        ({"backbone": "resnet18", "weights": "hub"}, WeightsError, "local-dir:PATH"),
        (
            {"backbone": "resnet18", "weights": "none", "backbone_args": {"wings": 2}},
            ConfigError,
            "wings",
        ),
    ],
)
def test_what_cannot_be_built_says_why_and_what_else(spec, error, text):
    with pytest.raises(error, match=text):
        build_classifier(ModelSpec(**spec), PreprocessSpec(), 4)


def test_bundle_json_is_plain_json(tmp_path):
    make_bundle(tmp_path / "b")
    content = json.loads((tmp_path / "b" / "bundle.json").read_text())
    assert set(content["files"]) == {
        "training_index.safetensors",
        *(f"members/m{i}/{f}" for i in (0, 1) for f in ("config.json", "model.safetensors")),
    }


@pytest.mark.parametrize("backbone", ["cnn_small", "mobilenetv2_050"])
def test_one_channel_goes_through_training_bundle_and_golden_input(backbone):
    spec = PreprocessSpec(size_px=48, channels=1)
    model = ModelSpec(backbone=backbone, weights="none")
    classifier, resolved_model, resolved = build_classifier(model, spec, 4)
    images = Preprocessor(resolved).batch(np.zeros((2, 48, 48), np.uint8))
    assert images.shape == (2, 1, 48, 48)
    assert classifier.eval()(images).shape == (2, 4)
    assert torch.allclose(
        images, torch.tensor(-np.mean(resolved.mean) / np.mean(resolved.std)).float()
    )
    assert rebuild_classifier(resolved_model, resolved, 4)(images).shape == (2, 4)
    assert spec.pixel_digest == PreprocessSpec(size_px=48).pixel_digest
    assert spec.digest != PreprocessSpec(size_px=48).digest
