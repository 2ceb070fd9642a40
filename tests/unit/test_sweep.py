"""Sweep files, folds, records and the tie rule, without Ray."""

import itertools
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import timm
from scipy.special import softmax
from scipy.stats import t as student
from scipy.stats import ttest_rel
from sklearn.metrics import accuracy_score, f1_score, log_loss

from bt_core import storage
from bt_core.config import parse
from bt_core.data.catalog import Dataset, DatasetInfo
from bt_core.data.splits import SplitPlan, assign_splits
from bt_core.errors import ConfigError, DatasetError, RunError, UsageError, WeightsError
from bt_core.labels import LABEL_SPACES
from bt_core.training.folds import fold_of_scans
from bt_core.training.leaderboard import leaderboard, text_table, to_table
from bt_core.training.learner import BatchMemoryError, DivergedError
from bt_core.training.noise import (
    count,
    family_accuracy,
    holm_of_pairs,
    metric_of,
    ranks,
    scan_noise,
    training_noise,
)
from bt_core.training.search import _reason_of_death, _scheduler, _settle
from bt_core.training.sweep import SweepSpec, candidates, load_sweep, preprocessings
from bt_core.training.sweep_job import plan_slots, point_of, read_record, write_record
from bt_core.training.trial import FitRecord, TrialRecord, reason_of, with_weights
from jobs.recipes_folder import RECIPES


def spec_of(**content):
    return parse(SweepSpec, {"recipes": ["cnn_small"], **content}, "sweep.yaml")


CHOICE = {"train.learning_rate": {"choice": [0.1, 0.01]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"folsd": 3}, "did you mean 'folds'"),
        ({"space": {"a": {"choice": [1], "uniform": [0, 1]}}}, "exactly one of choice"),
        ({"space": {"a": {"uniform": [1, 0]}}}, "bounds must rise"),
        ({"space": {"a": {"log_uniform": [0, 1]}}}, "greater than 0"),
        ({"space": {"a": {"uniform": [0, 1]}}, "search": "grid"}, "a grid needs choices"),
        ({"num_samples": 3}, "no effect without a space"),
        ({"space": CHOICE, "search": "grid", "num_samples": 3}, "no effect on a grid"),
        ({"space": CHOICE, "fixed": {"train.learning_rate": 1}}, "in fixed and in space"),
        ({"space": {"preprocess.size_px": {"uniform": [32, 64]}}}, "stored before the sweep"),
        ({"space": {"train.seed": {"choice": [0, 1]}}}, "set by the sweep itself"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"fixed": {"model.backbone": "resnet18"}}, "sweep's own `backbones`"),
        ({"space": {"model.backbone": {"choice": ["resnet18"]}}}, "sweep's own `backbones`"),
        ({"metric": "test_accuracy"}, "metric"),
    ],
)
def test_a_wrong_sweep_is_answered_with_what_is_wrong(content, message):
    with pytest.raises(ConfigError, match=message):
        spec_of(**content)


def test_every_sweep_in_the_project_names_recipes_that_there_are():
    for path in sorted((RECIPES / "sweeps").glob("*.yaml")):
        content = storage.read_bytes(str(path)).decode()
        assert content.startswith("# ")
        found = candidates(load_sweep(str(path)), RECIPES, "four_class")
        assert found, path
    reference = candidates(spec_of(recipes=["*"]), RECIPES, "four_class")
    assert {c.name for c in reference} == {p.stem for p in RECIPES.glob("*.yaml")}


def test_each_choice_is_checked_against_each_recipe_before_anything_runs():
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        candidates(spec_of(space={"train.learnin_rate": {"choice": [1]}}), RECIPES, "four_class")
    with pytest.raises(ConfigError, match=r"size_px.*greater than or equal to 32"):
        candidates(
            spec_of(space={"preprocess.size_px": {"choice": [64, 16]}}), RECIPES, "four_class"
        )
    with pytest.raises(ConfigError, match="no recipe is like 'nonesuch"):
        candidates(spec_of(recipes=["nonesuch*"]), RECIPES, "four_class")
    with pytest.raises(ConfigError, match="below a value"):
        candidates(spec_of(fixed={"name.first": 1}), RECIPES, "four_class")


def test_a_sweep_is_changed_by_overrides(tmp_path):
    (tmp_path / "s.yaml").write_text("recipes: [cnn_small]\n")
    fixed = "fixed={train.precision: bf16}"
    spec = load_sweep(str(tmp_path / "s.yaml"), ["folds=1", fixed])
    assert (spec.folds, spec.fixed) == (1, {"train.precision": "bf16"})
    with pytest.raises(ConfigError, match="'folds'"):
        load_sweep(str(tmp_path / "s.yaml"), ["fold=1"])


def test_a_recipe_takes_the_sweeps_epochs_and_the_datasets_task_and_says_so():
    [one] = candidates(spec_of(epochs=2, fixed={"train.batch_size": 4}), RECIPES, "binary")
    recipe = one.recipe({"train.learning_rate": 0.5})
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.learning_rate) == (2, 4, 0.5)
    assert recipe.task == "binary"
    assert one.notes == ["for binary here, four_class in its file"]


def test_backbones_compete_each_at_its_own_input_size(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {backbone: resnet18, weights: none}\n")
    spec = spec_of(recipes=[str(path)], backbones=["vit_tiny_r_s16_p8_384", "test_vit", "resnet18"])
    sizes = [(c.name, c.recipe({}).preprocess.size_px) for c in candidates(spec, RECIPES, "binary")]
    assert sizes == [
        ("mine-vit_tiny_r_s16_p8_384", 384), ("mine-test_vit", 160), ("mine-resnet18", 224)
    ]  # fmt: skip
    twice = spec_of(recipes=[str(path)], backbones=["resnet18", "resnet18"])
    with pytest.raises(ConfigError, match="two are named mine-resnet18"):
        candidates(twice, RECIPES, "binary")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"space": CHOICE, "num_samples": 5}, 15),
        ({"space": CHOICE, "num_samples": 5, "search": "optuna"}, 15),
        ({"space": {**CHOICE, "a": {"int_range": [1, 4]}}, "search": "grid"}, 24),
        ({}, 3),
    ],
)
def test_the_number_of_trials_is_known_before(content, expected):
    assert spec_of(**content).num_trials(3) == expected


def test_weights_that_cannot_be_had_are_an_error_or_a_note(tmp_path):
    fixed = {"model.weights": f"local-dir:{tmp_path}"}
    spec = spec_of(recipes=["mobilenetv2"], fixed=fixed)
    found = candidates(spec, RECIPES, "four_class")
    with pytest.raises(WeightsError, match="is not a timm folder"):
        with_weights(found, [], "error", 4)
    [bare] = with_weights(found, [], "none", 4)
    assert bare.recipe({}).model.weights == "none"
    assert bare.notes == ["local-dir weights not at hand: starts from none"]
    scratch = candidates(spec_of(), RECIPES, "four_class")
    assert with_weights(scratch, [], "error", 4)[0].notes == []


def test_weights_of_a_sweep_must_be_whole_and_fit_some_recipe(tmp_path):
    found = candidates(spec_of(recipes=["mobilenetv2"]), RECIPES, "four_class")
    with pytest.raises(WeightsError, match="is not a timm folder"):
        with_weights(found, [f"local-dir:{tmp_path}/typo"], "none", 4)
    model = timm.create_model("mobilenetv2_050", num_classes=10)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    with pytest.raises(WeightsError, match="mobilenetv2_050, which no recipe"):
        with_weights(found, [f"local-dir:{tmp_path}"], "none", 4)
    both = spec_of(recipes=["mobilenetv2"], backbones=["mobilenetv2_050", "test_vit"])
    found = candidates(both, RECIPES, "four_class")
    own, other = with_weights(found, [f"local-dir:{tmp_path}"], "none", 4)
    assert other.recipe({}).model.weights == "none"
    assert own.recipe({}).model.weights == f"local-dir:{tmp_path}"
    assert len(own.started_from) == 64
    assert other.started_from == "none"


@pytest.mark.parametrize(("folds", "epochs"), [(3, 2), (3, 6), (5, 3), (3, 9)])
def test_the_first_rung_of_asha_is_one_epoch(folds, epochs):
    scheduler = _scheduler(spec_of(folds=folds, epochs=epochs, scheduler="asha"))
    work = folds * epochs
    rungs = [milestone for milestone, _ in scheduler._brackets[0]._rungs]
    met = [min(k for k in range(1, work + 1) if 1000 * k / work >= m) for m in reversed(rungs)]
    assert met[:2] == [1, 3]


def test_pixels_of_every_combination_are_stored_once():
    space = {
        "preprocess.equalize": {"choice": [False, True]},
        "preprocess.size_px": {"int_range": [32, 33]},
        "preprocess.normalize": {"choice": ["unit", "zscore"]},
        "preprocess.clahe": {"choice": [None, {"clip_limit": 2.0}]},
    }
    spec = spec_of(space=space)
    specs = preprocessings(spec, candidates(spec, RECIPES, "four_class"))
    found = {(p.equalize, p.size_px, p.clahe is not None) for p in specs}
    assert found == set(itertools.product((False, True), (32, 33), (False, True))) - {
        (True, 32, True), (True, 33, True)
    }, "equalised and CLAHE together is no recipe; that trial will say so"  # fmt: skip
    assert len(specs) == 6


def test_points_come_back_as_they_were_written():
    space = {
        "a": {"choice": [[], [128], None, "adamw", True]},
        "b": {"uniform": [0, 1]},
        "c": {"int_range": [1, 3]},
    }
    config = {"recipe": "x", "a": "[128]", "b": np.float64(0.5), "c": np.int64(2)}
    point = point_of(config, spec_of(space=space))
    assert point == {"a": [128], "b": 0.5, "c": 2}
    assert [type(v) for v in point.values()] == [list, float, int]


def test_trials_never_hold_more_threads_than_there_are_cpus():
    assert plan_slots(spec_of(), 2, 0, 2).max_concurrent == 2
    assert plan_slots(spec_of(cpus_per_trial=2), 5, 0, 4).max_concurrent == 2
    assert plan_slots(spec_of(max_concurrent=9), 4, 0, 4).max_concurrent == 4
    assert plan_slots(spec_of(), 4, 1, 4).device == "cuda", "a GPU is used where there is one"
    assert plan_slots(spec_of(gpus_per_trial=0), 4, 1, 4).device == "cpu"
    slots = plan_slots(spec_of(gpus_per_trial=0.5), 16, 1, 16)
    assert (slots.max_concurrent, slots.device) == (2, "cuda")
    with pytest.raises(UsageError, match="the largest node has 2"):
        plan_slots(spec_of(cpus_per_trial=4), 8, 0, 2)
    with pytest.raises(UsageError, match="the cluster has 0"):
        plan_slots(spec_of(gpus_per_trial=1), 8, 0, 8)
    with pytest.raises(UsageError, match="nodes with GPUs have 2 for each"):
        plan_slots(spec_of(cpus_per_trial=4), 40, 4, 32, cpus_per_gpu=2)


@pytest.fixture
def dataset(tmp_path):
    """Sixty pictures of two classes, each twice, and their splits."""
    num = 120
    table = pa.table(
        {
            "scan_id": [f"s{i:03}" for i in range(num)],
            "label": [("healthy", "tumor")[i // 2 % 2] for i in range(num)],
            "given_split": [""] * num,
            "reason": [""] * num,
            "group": [f"g{i // 2}" for i in range(num)],
            "pixel_sha256": [str(i) for i in range(num)],
        }
    )
    catalog = assign_splits(table, SplitPlan())
    storage.write_table(str(tmp_path / "catalog.parquet"), catalog)
    info = DatasetInfo(
        source="s", label_space=LABEL_SPACES["binary"], plan=SplitPlan(), num_scans=num,
        num_left_out={}, num_skipped={}, num_families=60, digest="d",
    )  # fmt: skip
    return Dataset(str(tmp_path), info), catalog.to_pylist()


def test_folds_keep_groups_together_and_never_touch_the_test_split(dataset):
    prepared, rows = dataset
    for num_folds in (2, 3, 5):
        fold_of = fold_of_scans(prepared, num_folds)
        assert set(fold_of) == {r["scan_id"] for r in rows if r["split"] != "test"}
        assert set(fold_of.values()) == set(range(num_folds))
        of_group = {}
        for row in rows:
            if row["split"] != "test":
                of_group.setdefault(row["group"], set()).add(fold_of[row["scan_id"]])
        assert all(len(folds) == 1 for folds in of_group.values())
    assert fold_of == {r["scan_id"]: r["fold"] for r in rows if r["fold"] >= 0}, "the catalog's own"
    one = fold_of_scans(prepared, 1)
    assert {i for i, fold in one.items() if fold == 0} == {
        r["scan_id"] for r in rows if r["split"] == "validation"
    }
    with pytest.raises(DatasetError, match="too few scans for 200 folds"):
        fold_of_scans(prepared, 200)


def predictions(rng, num, accuracy, num_classes=4):
    labels_N = np.arange(num) % num_classes
    logits_NK = rng.normal(size=(num, num_classes))
    right_N = rng.random(num) < accuracy
    answers_N = np.where(right_N, labels_N, (labels_N + 1) % num_classes)
    logits_NK[np.arange(num), answers_N] += 5
    return labels_N, logits_NK


def test_metrics_of_counts_are_those_of_scikit_learn():
    labels_N, logits_NK = predictions(np.random.default_rng(0), 200, 0.7)
    family_N = np.arange(200) // 2
    counted = count(labels_N, logits_NK, family_N, 100)
    total = (counted.confusion_FKK.sum(0)[None], counted.log_loss_F.sum()[None])
    predicted_N = logits_NK.argmax(1)
    probs_NK = np.exp(logits_NK) / np.exp(logits_NK).sum(1, keepdims=True)
    macro_f1 = f1_score(labels_N, predicted_N, average="macro")
    loss = log_loss(labels_N, probs_NK)
    accuracy = accuracy_score(labels_N, predicted_N)
    assert metric_of("val_accuracy", *total)[0] == pytest.approx(accuracy)
    assert metric_of("val_macro_f1", *total)[0] == pytest.approx(macro_f1)
    assert metric_of("val_log_loss", *total)[0] == pytest.approx(loss)
    assert metric_of("val_score", *total)[0] == pytest.approx(macro_f1 - 0.01 * loss)


def test_noise_of_scans_is_the_paired_t_test_where_every_family_is_one_scan():
    rng = np.random.default_rng(1)
    labels_N, first_NK = predictions(rng, 300, 0.9)
    second_NK = predictions(rng, 300, 0.8)[1]
    counts = [count(labels_N, x, np.arange(300), 300) for x in (first_NK, second_NK)]
    right = [(x.argmax(1) == labels_N).astype(float) for x in (first_NK, second_NK)]
    expected = ttest_rel(*right).pvalue
    assert scan_noise(counts, "val_accuracy")[0, 1] == pytest.approx(expected, rel=1e-6)


def test_a_family_counts_once_by_the_share_of_its_scans_that_are_right():
    labels_N, family_N = np.zeros(6, int), np.array([0, 0, 0, 0, 1, 2])
    logits_NK = np.eye(2)[[0, 0, 0, 1, 0, 1]]
    accuracy, low, high = family_accuracy(count(labels_N, logits_NK, family_N, 3))
    assert accuracy == pytest.approx((0.75 + 1 + 0) / 3)
    assert 0 <= low < accuracy < high <= 1
    many = count(np.zeros(900, int), np.eye(2)[np.arange(900) % 10 // 9], np.arange(900), 900)
    accuracy, low, high = family_accuracy(many)
    assert (accuracy, low, high) == pytest.approx((0.9, 0.88, 0.92), abs=0.004)  # 1.96 sqrt(pq/n)


def test_copies_of_a_scan_are_no_further_evidence():
    rng = np.random.default_rng(1)
    labels_N, first_NK = predictions(rng, 100, 0.9)
    second_NK = predictions(rng, 100, 0.8)[1]
    once = [count(labels_N, x, np.arange(100), 100) for x in (first_NK, second_NK)]
    family_N = np.arange(400) % 100
    copied = [
        count(np.tile(labels_N, 4), np.tile(x, (4, 1)), family_N, 100)
        for x in (first_NK, second_NK)
    ]
    p = [scan_noise(counts, "val_macro_f1")[0, 1] for counts in (once, copied)]
    assert p[0] == pytest.approx(p[1])


def test_noise_of_training_is_the_corrected_resampled_t_test():
    first_J, second_J = np.array([0.9, 0.8, 0.85, 0.95]), np.array([0.7, 0.78, 0.71, 0.74])
    p = training_noise(np.stack([first_J, second_J]), num_folds=4)[0, 1]
    difference_J = first_J - second_J
    error = np.sqrt(difference_J.var(ddof=1) * (1 / 4 + 1 / 3))
    assert p == pytest.approx(2 * student.sf(difference_J.mean() / error, 3))
    assert training_noise(np.array([[0.9], [0.1]]), num_folds=1) is None, "nothing to see"


def test_two_equal_models_that_vary_are_rarely_told_apart_beside_many_that_do_not():
    rng = np.random.default_rng(0)
    spread_M1 = np.array([0.02, 0.02, *[0.002] * 16])[:, None]
    draws = [training_noise(rng.normal(0.9, spread_M1, (18, 3)), num_folds=3) for _ in range(500)]
    assert np.mean([p_MM[0, 1] < 0.05 for p_MM in draws]) < 0.1, "with one variance for all: 0.3"


def test_holms_correction_is_that_of_the_textbook():
    p_MM = np.ones((3, 3))
    for (i, j), p in {(0, 1): 0.01, (0, 2): 0.04, (1, 2): 0.03}.items():
        p_MM[i, j] = p_MM[j, i] = p
    adjusted = holm_of_pairs(p_MM)
    assert adjusted[0, 1] == pytest.approx(0.03)
    assert adjusted[1, 2] == adjusted[2, 0] == pytest.approx(0.06)


def test_equal_models_are_tied_and_a_worse_one_is_not():
    rng = np.random.default_rng(2)
    labels_N = predictions(rng, 400, 1)[0]
    logits = [predictions(rng, 400, accuracy)[1] for accuracy in (0.92, 0.90, 0.5)]
    logits.append(logits[0])
    counts = [count(labels_N, x, np.arange(400) // 2, 200) for x in logits]
    scores_MJ = np.array(
        [[(x.argmax(1) == labels_N)[j::3].mean() for j in range(3)] for x in logits]
    )
    found, p = ranks(counts, scores_MJ, "val_accuracy", num_folds=3, larger_is_better=True)
    assert found == [1, 1, 4, 1]
    assert p[2] < 0.05 < p[1]
    assert p[0] == p[3] == 1


def record_of(trial_id, status="finished", scores=(0.5, 0.5), reason=""):
    fits = [
        FitRecord(fold=j, seed=0, epochs=[
            {"val_score": s, "val_accuracy": s, "val_macro_f1": s, "val_log_loss": 1 - s,
             "kept_by": s}
        ])
        for j, s in enumerate(scores)
    ]  # fmt: skip
    return TrialRecord(
        trial_id=trial_id, recipe={"name": "r", "model": {"weights": "none"}}, point={"a": [1]},
        num_folds=2, seeds=[0], metric="val_score", dataset_digest="d", view="v", device="cpu",
        num_threads=1, environment={}, started_at="", status=status, reason=reason, fits=fits,
    )  # fmt: skip


def test_a_trial_that_lost_its_node_is_to_go_on_and_one_that_died_has_failed(tmp_path):
    said = {
        "lost": "The actor died because its node has died. Node Id: 1f",
        "died": "The actor is dead because its worker process has died.",
    }
    job = SimpleNamespace(location=str(tmp_path))
    trials = []
    for name, text in said.items():
        write_record(job.location, record_of(name, "running", (0.5,)))
        trials.append(SimpleNamespace(trial_id=name, status="ERROR", get_error=lambda t=text: t))
    with pytest.raises(RunError, match=r"1 of 2 trials could not go on .*node has died"):
        _settle(job, trials)
    assert read_record(job.location, "lost").status == "running"
    assert read_record(job.location, "died").reason == "killed: the trial's process died 3 times"


def test_the_leaderboard_puts_finished_before_stopped_before_failed():
    records = [
        record_of("broken", "failed", (), "not_finite: the loss is nan"),
        record_of("halted", "stopped", (0.99,), "stopped early by asha"),
        record_of("worse", scores=(0.4, 0.5)),
        record_of("better", scores=(0.9, 0.8)),
    ]
    rng = np.random.default_rng(3)
    tables = {}
    for name, accuracy in (("worse", 0.45), ("better", 0.85)):
        labels_N, logits_NK = predictions(rng, 200, accuracy)
        ids = [str(i) for i in range(200)]
        tables[name] = pa.table({"scan_id": ids, "label": labels_N, "logits": logits_NK.tolist()})
    spec = spec_of(folds=2, space={"a": {"choice": [[1], 2]}})
    rows = leaderboard(records, tables, {str(i): str(i // 2) for i in range(200)}, spec)
    assert [row["trial_id"] for row in rows] == ["better", "worse", "halted", "broken"]
    assert [row["rank"] for row in rows[2:]] == [None, None]
    assert 0.8 < rows[0]["family_accuracy_low"] < rows[0]["family_accuracy"] < 0.9
    text = text_table(rows, spec)
    assert "not_finite: the loss is nan" in text
    assert "Holm" in text
    table = to_table(rows, ["a"])
    assert table["a"].to_pylist() == ["[1]"] * 4
    assert table.num_rows == 4


def test_seeds_answer_together_as_an_ensemble_would():
    rng = np.random.default_rng(4)
    labels_N = rng.integers(3, size=400)
    logits = rng.normal(size=(2, 400, 3))
    logits[:, np.arange(400), labels_N] += 1.5
    ids = [str(i) for i in range(400)]
    table = pa.concat_tables(
        pa.table({"scan_id": ids, "label": labels_N, "logits": own.tolist()}) for own in logits
    )
    record = record_of("a", scores=(0.7,) * 4)
    rows = leaderboard([record], {"a": table}, {i: i for i in ids}, spec_of(folds=2, seeds=[0, 1]))
    joint = (softmax(logits, axis=2).mean(0).argmax(1) == labels_N).mean()
    assert rows[0]["seeds_together"] == pytest.approx(joint)
    assert rows[0]["family_accuracy"] < joint
    assert "seeds together" in text_table(rows, spec_of(folds=2, seeds=[0, 1]))
    alone = leaderboard([record], {"a": table}, {i: i for i in ids}, spec_of(folds=4))
    assert "seeds_together" not in alone[0]


def test_reasons_begin_with_a_code():
    assert reason_of(DivergedError("training diverged: nan")).startswith("not_finite: ")
    assert reason_of(MemoryError()).startswith("out_of_memory: ")
    assert reason_of(BatchMemoryError("a batch does not fit")).startswith("out_of_memory: ")
    assert reason_of(RuntimeError("an illegal memory access")).startswith("error: ")
    assert reason_of(RuntimeError("DefaultCPUAllocator: can't allocate memory")).startswith("out_")
    assert reason_of(ConfigError("no")).startswith("refused: ")
    assert reason_of(KeyError("x")).startswith("error: KeyError")
    assert _reason_of_death(SimpleNamespace(get_error=AssertionError)).startswith("error: ")
