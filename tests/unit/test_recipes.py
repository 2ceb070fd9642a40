"""Every shipped recipe builds its model and trains; published networks have their exact form."""

import json

import jsonschema
import numpy as np
import pytest
import torch
from torch import nn

from bt_core.config import load_yaml
from bt_core.labels import LABEL_SPACES
from bt_core.models.classifier import build_classifier, rebuild_classifier
from bt_core.models.inputs import Preprocessor
from bt_core.models.summary import layer_table
from bt_core.training.engine import fit
from bt_core.training.recipe import load_recipe, recipe_names
from bt_core.training.stages import select_trainable
from jobs.cli import main
from jobs.recipes_folder import RECIPES
from tests.unit.toy_training import AloneContext

SIDE = 96
"""Small for speed; what a recipe's own size gives is the same network."""


class OneBatch(AloneContext):
    """A training set of four scans, which is also the validation set."""

    def __init__(self, num_classes):
        super().__init__()
        pixels = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE), dtype=np.uint8)
        ids = np.array(list("abcd"))
        self.batch = {"scan_id": ids, "pixels": pixels, "label": np.arange(4) % num_classes}

    def train_batches(self, epoch):
        yield self.batch

    def validation_batches(self):
        yield self.batch


@pytest.mark.parametrize("name", recipe_names(RECIPES))
def test_every_recipe_trains_what_it_says_and_nothing_else(name):
    bare = ["model.weights=none", f"preprocess.size_px={SIDE}", "train.batch_size=4"]
    recipe = load_recipe(name, RECIPES, bare)
    stages = max(1, len(recipe.train.stages))
    recipe = load_recipe(name, RECIPES, [*bare, f"train.epochs={stages}"])
    num_classes = LABEL_SPACES[recipe.task].num_classes
    torch.manual_seed(0)
    model, _, preprocess = build_classifier(recipe.model, recipe.preprocess, num_classes)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    context = OneBatch(num_classes)
    fit(context, model, recipe, Preprocessor(preprocess), [4 // num_classes] * num_classes)
    assert len(context.metrics) == stages
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.startswith("head.") for k in changed)
    parts = {stage.trainable for stage in recipe.train.plan()} - {"head"}
    trained = {k for k in changed if k.startswith("backbone.")}
    assert bool(trained) == bool(parts), "frozen, statistics included"
    if parts and "all" not in parts:
        [part] = parts
        select_trainable(model, part)
        free = {k for k, p in model.named_parameters() if p.requires_grad}
        assert {k for k in trained if k in dict(model.named_parameters())} <= free
        assert len(trained) < len(before) / 2


def test_the_four_million_parameter_network_is_the_published_one():
    recipe = load_recipe("cnn_4m", RECIPES)
    model = rebuild_classifier(recipe.model, recipe.preprocess, 4)
    assert sum(p.numel() for p in model.parameters()) == 4_447_044
    shapes = [
        row.output_shape
        for row in layer_table(model, (3, 150, 150))
        if row.kind in ("Conv2d", "MaxPool2d", "Linear")
    ]
    kinds = [type(m).__name__ for m in model.backbone.features if not isinstance(m, nn.ReLU)]
    letters = "".join({"Conv2d": "c", "MaxPool2d": "p", "Dropout": "d"}[kind] for kind in kinds)
    assert letters == "ccpdccdpdcccpdccpd"
    assert [m.p for m in model.head if isinstance(m, nn.Dropout)] == [0.5]
    assert shapes == [
        (32, 148, 148), (64, 146, 146), (64, 73, 73),
        (64, 71, 71), (64, 69, 69), (64, 34, 34),
        (128, 32, 32), (128, 30, 30), (128, 28, 28), (128, 14, 14),
        (128, 12, 12), (256, 10, 10), (256, 5, 5),
        (512,), (512,), (4,),
    ]  # fmt: skip
    assert model.head[0].in_features == 6_400


def test_the_head_of_the_binary_resnet_is_the_published_one():
    recipe = load_recipe("healthy_resnet50", RECIPES, ["model.weights=none"])
    model = rebuild_classifier(recipe.model, recipe.preprocess, 2)
    names = [type(module).__name__ for module in model.head]
    assert names[:4] == ["Linear", "Dropout", "BatchNorm1d", "ReLU"]
    linear = [m for m in model.head if isinstance(m, torch.nn.Linear)]
    assert [m.out_features for m in linear] == [512, 128, 16, 2]
    assert linear[0].in_features == 2048 * 5 * 5


def test_a_recipe_without_a_size_takes_the_backbones_own():
    other = ["model.backbone=legacy_xception", "model.weights=none"]
    assert load_recipe("pipeline_resnet50", RECIPES).preprocess.size_px == 224
    assert load_recipe("pipeline_resnet50", RECIPES, other).preprocess.size_px == 299
    stated = load_recipe("pipeline_resnet50", RECIPES, ["preprocess.size_px=96"])
    assert stated.preprocess.size_px == 96


def test_every_recipe_says_what_it_reproduces_and_what_came_out():
    for name in recipe_names(RECIPES):
        header = (RECIPES / f"{name}.yaml").read_text().split("description:")[0]
        for part in ("# Reproduces:", "# Reported", "# Ours:"):
            assert part in header, name


def bt_output(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_recipes_are_listed_shown_and_described(capsys):
    listed = bt_output(capsys, "recipes", "list")
    assert len(listed.splitlines()) == len(recipe_names(RECIPES))
    shown = bt_output(capsys, "recipes", "show", "cnn_4m", "--set", "train.epochs=3")
    assert "# Reproduces: system D" in shown
    assert "epochs: 3" in shown
    assert shown.splitlines()[-1].split() == ["all", "4,447,044"]
    schema = json.loads(bt_output(capsys, "recipes", "schema"))
    assert schema["additionalProperties"] is False
    for name in recipe_names(RECIPES):
        jsonschema.validate(load_yaml(str(RECIPES / f"{name}.yaml")), schema)
    wrong = {"model": {"backbone": "x"}, "train": {"trainable": "last:3"}}
    with pytest.raises(jsonschema.ValidationError, match="last:3"):
        jsonschema.validate(wrong, schema)
