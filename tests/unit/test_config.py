import pytest

from bt_core.config import StrictModel, apply_overrides, load_yaml, parse
from bt_core.errors import ConfigError
from bt_core.training.recipe import Recipe, load_recipe, recipe_names
from jobs.recipes_folder import RECIPES


class Inner(StrictModel):
    width_px: int = 3


class Outer(StrictModel):
    inner: Inner = Inner()
    name: str


def test_all_faults_are_listed_at_once_with_dotted_paths():
    with pytest.raises(ConfigError) as caught:
        parse(Outer, {"inner": {"width_px": "wide", "widht_px": 4}}, "a.yaml")
    message = str(caught.value)
    assert "inner.width_px" in message
    assert "'inner.widht_px', did you mean 'width_px'?" in message
    assert "(valid here: width_px)" in message
    assert "name: Field required" in message


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.epochs=3", ("train", "epochs"), 3),
        ("train.learning_rate=1e-3", ("train", "learning_rate"), "1e-3"),
        ("model.weights=none", ("model", "weights"), "none"),
        ("a.b.c=[1, 2]", ("a", "b", "c"), [1, 2]),
        ("train.patience=null", ("train", "patience"), None),
    ],
)
def test_overrides_reach_nested_keys(override, path, value):
    result = apply_overrides({"train": {"epochs": 1, "seed": 7}}, [override])
    for part in path:
        result = result[part]
    assert result == value


def test_overrides_do_not_change_what_they_are_given():
    content = {"train": {"epochs": 1}}
    apply_overrides(content, ["train.epochs=2"])
    assert content == {"train": {"epochs": 1}}


def test_an_override_reaches_one_entry_of_a_list():
    content = {"stages": [{"epochs": 1}, {"epochs": 2, "rate": 0.1}]}
    result = apply_overrides(content, ["stages.1.epochs=5", "stages.0.rate=0.3"])
    assert result == {"stages": [{"epochs": 1, "rate": 0.3}, {"epochs": 5, "rate": 0.1}]}
    assert content["stages"][1]["epochs"] == 2


@pytest.mark.parametrize(
    "override", ["train.epochs", "=3", "name.x=1", "a=[1", "list.1.x=1", "list.x=1", "list.-1=1"]
)
def test_a_bad_override_says_what_is_wrong(override):
    with pytest.raises(ConfigError, match="--set"):
        apply_overrides({"name": "text", "list": [{}]}, [override])


def test_yaml_must_be_a_mapping(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="mapping"):
        load_yaml(str(tmp_path / "list.yaml"))


@pytest.mark.parametrize("name", recipe_names(RECIPES))
def test_every_shipped_recipe_validates(name):
    recipe = load_recipe(name, RECIPES)
    assert recipe.name == name
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert (RECIPES / f"{name}.yaml").read_text().startswith("# Reproduces:")


def test_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(ConfigError, match="cnn_4m, cnn_small, explained_baseline"):
        load_recipe("resnet5O", RECIPES)


def test_scientific_notation_reaches_the_recipe_as_a_number():
    recipe = load_recipe("cnn_small", RECIPES, ["train.learning_rate=1e-4"])
    assert recipe.train.learning_rate == 1e-4
    assert recipe.digest != load_recipe("cnn_small", RECIPES).digest


def test_a_relative_weights_path_becomes_absolute():
    recipe = load_recipe("mobilenetv2", RECIPES, ["model.weights=local-dir:weights/x"])
    assert recipe.model.weights.startswith("local-dir:/")
    with pytest.raises(ConfigError, match=r"hub, local-dir:PATH or none"):
        load_recipe("mobilenetv2", RECIPES, ["model.weights=imagenet"])
