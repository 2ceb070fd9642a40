"""Stages, optimizers, averages and precision: what is trained, at which rate, and exactly again."""

import numpy as np
import pytest
import torch
from torch import nn

from bt_core.config import parse
from bt_core.errors import ConfigError, RunError
from bt_core.models.backbones import parameter_groups
from bt_core.models.classifier import Classifier, build_classifier
from bt_core.models.spec import HeadSpec, ModelSpec
from bt_core.scans.preprocess import PreprocessSpec
from bt_core.training.learner import autocast_dtype, explained_memory
from bt_core.training.spec import AugmentSpec, TrainSpec
from bt_core.training.stages import (
    build_average,
    build_optimizer,
    build_schedule,
    check_stages,
    has_idle_weights,
    select_trainable,
    train_mode,
)
from tests.unit.toy_training import SIDE, AloneContext, run, toy_recipe

STAGES = [
    {"epochs": 2, "trainable": "head", "learning_rate": 0.02, "schedule": "constant"},
    {"epochs": 2, "trainable": "blocks:2", "schedule": "plateau"},
    {"epochs": 2, "schedule": "cosine", "warmup": 0.2, "layer_decay": 0.7},
]


def toy_model():
    recipe = toy_recipe()
    return build_classifier(recipe.model, recipe.preprocess, 2)[0]


def trainable_names(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def assert_equal_states(one, two):
    assert one.keys() == two.keys()
    assert not [name for name in one if not torch.equal(one[name], two[name])]


@pytest.mark.parametrize(("pool", "idle"), [("backbone", False), ("flatten", True)])
def test_weights_that_take_no_part_are_found_so_that_several_workers_do_not_wait(pool, idle):
    """MobileNetV3 has a layer behind its feature map, which a flattening head goes round."""
    spec = ModelSpec(
        backbone="mobilenetv3_small_050", weights="none", head=HeadSpec(pool=pool, dropout=0.2)
    )
    model = build_classifier(spec, PreprocessSpec(size_px=32), 4)[0].train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert has_idle_weights(model, (3, 32, 32)) == idle
    assert_equal_states(model.state_dict(), before)
    assert model.training
    select_trainable(model, "head")
    assert not has_idle_weights(model, (3, 32, 32))


@pytest.mark.parametrize(
    "train",
    [
        {"stages": STAGES, "ema_decay": 0.9, "accumulation_steps": 3},
        {"stages": STAGES, "patience": 1, "optimizer": "sgd", "gradient_clip_norm": 0.5},
        {"epochs": 5, "schedule": "one_cycle", "precision": "bf16", "focal_gamma": 2},
        {"epochs": 5, "schedule": "plateau", "plateau_patience": 0, "precision": "fp16"},
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(train):
    """Interrupted after every epoch, so at the borders of stages as well."""
    recipe = toy_recipe(augment=AugmentSpec(noise=0.1, mixup_alpha=0.4), **train)
    straight, broken = AloneContext(), AloneContext(stop_after=range(1, 6))
    expected = run(straight, recipe).state_dict()
    while broken.stop_after:
        try:
            resumed = run(broken, recipe)
        except KeyboardInterrupt:
            continue
        break
    else:
        resumed = run(broken, recipe)
    assert_equal_states(resumed.state_dict(), expected)
    one, two = straight.restore(), broken.restore()
    assert_equal_states(one["model"], two["model"])
    timed = {"epoch_seconds", "images_per_second", "data_wait", "memory_mib"}
    assert [
        [{k: v for k, v in f.items() if k not in timed} for f in state["history"]]
        for state in (one, two)
    ] == [[{k: v for k, v in f.items() if k not in timed} for f in straight.metrics]] * 2


def test_stages_take_their_own_settings_and_share_out_the_epochs():
    train = TrainSpec(stages=STAGES, optimizer="sgd")
    assert train.epochs == 6
    assert [s.trainable for s in train.plan()] == ["head", "blocks:2", "all"]
    assert [s.learning_rate for s in train.plan()] == [0.02, 1e-3, 1e-3]
    assert {s.optimizer for s in train.plan()} == {"sgd"}
    uneven = [{"epochs": 3}, {"epochs": 10}, {"epochs": 1}]
    for epochs in range(3, 40):
        shares = [s.epochs for s in TrainSpec(stages=uneven, epochs=epochs).plan()]
        assert sum(shares) == epochs
        assert min(shares) >= 1
    assert [s.epochs for s in TrainSpec(stages=uneven).plan()] == [3, 10, 1]
    assert TrainSpec.model_validate(train.model_dump(mode="json")) == train


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"trainable": "blocks:0"}, "use all, head, layers:N"),
        ({"stages": [{"epochs": 1, "trainable": "last 3"}]}, "use all, head, layers:N"),
        ({"stages": [{"epochs": 1}, {"epochs": 1}], "epochs": 1}, "fewer than stages"),
        ({"stages": [{"epoch": 1}]}, "did you mean 'epochs'"),
        ({"schedule": "plateau", "warmup": 0.1}, "use cosine or constant"),
        ({"stages": [{"epochs": 1, "warmup": 0.5}]}, "of stage 1 has no effect"),
        ({"optimizer": "adamax"}, "'adamw', 'adam' or 'sgd'"),
        ({"precision": "fp8"}, "'auto', 'fp32', 'bf16' or 'fp16'"),
    ],
)
def test_wrong_settings_are_answered_with_the_right_ones(wrong, message):
    with pytest.raises(ConfigError, match=message):
        parse(TrainSpec, wrong, "recipe")


def test_parts_of_a_network_are_counted_from_the_head():
    model = toy_model()
    select_trainable(model, "head")
    head = [f"head.{name}" for name, _ in model.head.named_parameters()]
    assert trainable_names(model) == head
    select_trainable(model, "blocks:1")
    last = [f"backbone.features.{n}" for n in ("12.weight", "13.weight", "13.bias")]
    assert trainable_names(model) == [*last, *head]
    select_trainable(model, "layers:3")
    assert len(trainable_names(model)) == 3 * 3 + 2
    select_trainable(model, "all")
    assert len(trainable_names(model)) == 4 * 3 + 2
    with pytest.raises(ConfigError, match="has 4 layers; use layers:1 to layers:4, or all"):
        check_stages(
            model, TrainSpec(stages=[{"epochs": 1}, {"epochs": 1, "trainable": "layers:5"}])
        )


@pytest.mark.parametrize("name", ["mobilenetv2_100", "convnext_atto", "vit_tiny_patch16_224"])
def test_groups_of_timm_backbones_are_all_parameters_from_shallow_to_deep(name):
    spec = ModelSpec(backbone=name, weights="none")
    backbone = build_classifier(spec, PreprocessSpec(size_px=224), 2)[0].backbone
    groups = parameter_groups(backbone)
    names = [name for name, _ in backbone.named_parameters()]
    assert sorted(n for group in groups for n in group) == sorted(names)
    assert names[0] in groups[0]
    assert names[-1] in groups[-1]
    assert any(n.endswith("weight") and "norm" not in n for n in groups[-1])


def test_a_frozen_backbone_keeps_its_statistics_and_weights():
    context = AloneContext()
    torch.manual_seed(0)
    before = {k: v.clone() for k, v in toy_model().backbone.state_dict().items()}
    after = run(context, toy_recipe(trainable="head", epochs=2)).backbone.state_dict()
    assert_equal_states(before, after)
    changed = run(AloneContext(), toy_recipe(trainable="blocks:1", epochs=1)).backbone.state_dict()
    same = {name for name in before if torch.equal(before[name], changed[name])}
    assert same == {n for n in before if int(n.split(".")[1]) < 12}


def test_only_frozen_parts_are_in_evaluation_mode():
    model = toy_model()
    select_trainable(model, "layers:2")
    train_mode(model, model)
    norms = [m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == [False, False, True, True]
    assert model.head.training


def test_rates_fall_from_the_head_to_the_first_block():
    model = toy_model()
    train = TrainSpec(layer_decay=0.5, learning_rate=1.0, weight_decay=0.1)
    optimizer = build_optimizer(model, train)
    rate_of = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    rates = {n: rate_of[id(p)] for n, p in model.named_parameters()}
    assert {rate for name, rate in rates.items() if name.startswith("head")} == {1}
    assert [rates[f"backbone.features.{n}.weight"] for n in (12, 8, 4, 0)] == [
        0.5, 0.25, 0.125, 0.0625,
    ]  # fmt: skip
    schedule = build_schedule(optimizer, train, total_steps=10)
    peaks = torch.zeros(len(optimizer.param_groups))
    for _ in range(10):
        peaks = peaks.maximum(torch.tensor(schedule.get_last_lr()))
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(peaks, torch.tensor([g["max_lr"] for g in optimizer.param_groups]))


def test_warm_up_rises_to_the_peak_and_cosine_falls_to_nothing():
    optimizer = build_optimizer(nn.Linear(2, 2), TrainSpec(learning_rate=1.0))
    train = TrainSpec(learning_rate=1.0, schedule="cosine", warmup=0.3)
    schedule = build_schedule(optimizer, train, total_steps=10)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.05, abs=0.01)


def test_plateau_lowers_the_rate_where_the_score_does_not_rise():
    context = AloneContext()
    train = {"schedule": "plateau", "plateau_patience": 0, "plateau_factor": 0.5}
    run(context, toy_recipe(epochs=8, learning_rate=0.08, **train))
    expected, best, rate = [], -1.0, 0.08
    for figures in context.metrics:
        expected.append(rate)
        rate = rate if figures["val_score"] > best else rate / 2
        best = max(best, figures["val_score"])
    assert [f["learning_rate"] for f in context.metrics] == pytest.approx(expected)
    assert rate < 0.08


def test_accumulated_batches_step_like_one_large_batch():
    """Without norms, a step over 4 batches of 16 scans is the step over 64 scans."""
    states = []
    for size, steps in ((16, 4), (64, 1)):
        context = AloneContext(batch_size=size)
        recipe = toy_recipe(
            augment=AugmentSpec(horizontal_flip=False, rotation_degrees=0, zoom=0, contrast=0),
            batch_size=size, accumulation_steps=steps, epochs=2, optimizer="sgd",
            schedule="constant", trainable="head",
        )  # fmt: skip
        model = recipe.model.model_copy(update={"head": HeadSpec(dropout=0)})
        recipe = recipe.model_copy(update={"model": model})
        states.append(run(context, recipe).head.state_dict())
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-4, atol=1e-6)


def test_the_last_short_group_is_a_step_of_the_schedule():
    context = AloneContext()
    run(context, toy_recipe(epochs=3, accumulation_steps=3))  # 4 batches: groups of 3 and 1
    steps = next(iter(context.restore()["optimizer"]["state"].values()))["step"]
    assert int(steps) == 6
    assert context.restore()["scheduler"]["total_steps"] == 6


def test_the_average_is_validated_saved_and_behind_the_weights():
    context = AloneContext()
    model = run(context, toy_recipe(ema_decay=0.95, epochs=2))
    state = context.restore()
    assert_equal_states(state["trained_model"], model.state_dict())
    assert state["num_averaged"] == 8
    average = build_average(model, 0.95)
    average.module.load_state_dict(state["model"])
    pairs = zip(average.module.head.parameters(), model.head.parameters(), strict=True)
    assert not any(torch.equal(averaged, trained) for averaged, trained in pairs)


def test_an_average_follows_the_formula():
    model = Classifier(nn.Identity(), nn.Linear(1, 1, bias=False))
    average = build_average(model, 0.3)
    expected = None
    for step, value in enumerate([1.0, 2.0, 3.0, 4.0, 5.0]):
        nn.init.constant_(model.head.weight, value)
        average.update_parameters(model)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert average.module.head.weight.item() == pytest.approx(expected)


def test_the_best_weights_of_a_stage_begin_the_next():
    """The second stage learns nothing (a rate of almost 0), so it shows what it began with."""
    stages = [{"epochs": 5, "learning_rate": 0.5}, {"epochs": 1, "learning_rate": 1e-12}]
    context = AloneContext()
    settings = {"optimizer": "sgd", "schedule": "constant", "trainable": "head"}
    run(context, toy_recipe(stages=stages, learning_rate=1e-3, **settings))
    first = [f["val_score"] for f in context.metrics if f["stage"] == 1]
    assert context.metrics[-1]["stage"] == 2
    assert context.metrics[-1]["val_score"] == pytest.approx(max(first), abs=1e-6)
    assert context.metrics[-1]["val_log_loss"] in [
        pytest.approx(f["val_log_loss"], abs=1e-4)
        for f in context.metrics[:-1]
        if f["val_score"] == max(first)
    ]


def test_patience_ends_a_stage_and_not_the_run():
    stages = [{"epochs": 30, "learning_rate": 0.02}, {"epochs": 1}]
    context = AloneContext()
    run(context, toy_recipe(stages=stages, patience=1))
    assert len(context.metrics) < 31
    assert [f["stage"] for f in context.metrics][-2:] == [1, 2]


def test_precision_is_chosen_by_the_device():
    cpu = torch.device("cpu")
    assert autocast_dtype("auto", cpu) is None
    assert autocast_dtype("fp32", cpu) is None
    assert autocast_dtype("bf16", cpu) == torch.bfloat16


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns(precision):
    context = AloneContext()
    run(context, toy_recipe(epochs=6, precision=precision))
    assert context.metrics[-1]["val_accuracy"] > 0.9


def test_a_batch_over_the_memory_names_the_settings_that_help():
    with (
        pytest.raises(RunError, match=r"batch of 32 scans .* train.batch_size=16 .*steps=2"),
        explained_memory(TrainSpec(), torch.device("cpu")),
    ):
        torch.empty(2**50)
    with (
        pytest.raises(RuntimeError, match="unrelated"),
        explained_memory(TrainSpec(), torch.device("cpu")),
    ):
        raise RuntimeError("unrelated")


class LargeBatches(AloneContext):
    """Its batches are 2^50 bytes, but for a view that repeats one byte."""

    def train_batches(self, epoch):
        pixels = np.broadcast_to(np.zeros(1, np.uint8), (2**40, SIDE, SIDE))
        yield {"scan_id": np.array([]), "pixels": pixels, "label": np.zeros(16, np.int64)}


def test_a_run_whose_batch_does_not_fit_says_so():
    with pytest.raises(RunError, match=r"does not fit in the memory of the worker"):
        run(LargeBatches(), toy_recipe())


def test_a_loss_that_diverges_leaves_the_checkpoint_of_the_epoch_before():
    stages = [{"epochs": 1}, {"epochs": 2, "learning_rate": 1e30}]
    context = AloneContext()
    advice = r"epoch 2 is (nan|inf); lower learning_rate of that stage \(1e\+30\)"
    with pytest.raises(RunError, match=advice):
        run(context, toy_recipe(stages=stages, optimizer="sgd", schedule="constant"))
    state = context.restore()
    assert [f["epoch"] for f in state["history"]] == [1]
    assert all(t.isfinite().all() for t in state["model"].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_half_precision_is_the_default_and_too_large_a_batch_is_explained():
    cuda = torch.device("cuda")
    assert autocast_dtype("auto", cuda) in (torch.bfloat16, torch.float16)
    with pytest.raises(RunError, match="memory of the GPU"), explained_memory(TrainSpec(), cuda):
        torch.empty(2**50, device=cuda)
    context = AloneContext()
    context.device = cuda
    context.wrap = lambda model: model.to(cuda)
    run(context, toy_recipe(epochs=6, ema_decay=0.5))
    assert context.metrics[-1]["val_accuracy"] > 0.9
    assert context.metrics[-1]["memory_mib"] > 0
