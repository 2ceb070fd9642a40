"""The engine without Ray: it learns, goes on where it was, and draws the same numbers again."""

from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from bt_core import storage
from bt_core.errors import RunError
from bt_core.training.augment import augment
from bt_core.training.engine import Predictions, steps_per_epoch, stopped_early, worker_batch_size
from bt_core.training.launch import _root_cause, plan_scaling
from bt_core.training.losses import build_loss
from bt_core.training.process_group import interface_of
from bt_core.training.run_folder import as_begun
from bt_core.training.spec import AugmentSpec, TrainSpec
from bt_core.training.stages import build_optimizer, build_schedule
from cluster.session import Resources, _cpus_per_gpu
from tests.unit.toy_training import SIDE, AloneContext, run, toy_recipe


def test_the_loop_learns_and_validates_every_scan():
    context = AloneContext()
    run(context, toy_recipe(epochs=6))
    assert [m["epoch"] for m in context.metrics] == [1, 2, 3, 4, 5, 6]
    assert context.metrics[-1]["loss"] < 0.5 * context.metrics[0]["loss"]
    assert context.metrics[-1]["val_accuracy"] > 0.9
    assert context.metrics[-1]["val_scans"] == 30 == len(context.predictions.scan_id)
    assert context.synced
    assert context.written == 6


def test_early_stopping_counts_from_the_best_epoch():
    scores = [0.5, 0.7, 0.6, 0.65]
    history = [{"val_score": score} for score in scores]
    assert not stopped_early(history, None)
    assert not stopped_early(history, 3)
    assert stopped_early(history, 2)
    context = AloneContext()
    run(context, toy_recipe(epochs=30, patience=1, learning_rate=0.02))
    assert len(context.metrics) < 30


def test_the_last_epoch_is_kept_when_validation_is_to_choose_nothing():
    best, last = AloneContext(), AloneContext()
    settings = {"epochs": 6, "learning_rate": 0.02, "schedule": "constant"}
    run(best, toy_recipe(**settings))
    run(last, toy_recipe(**settings, keep="last"))
    assert [f["kept_by"] for f in best.metrics] == [f["val_score"] for f in best.metrics]
    assert [f["kept_by"] for f in last.metrics] == [1, 2, 3, 4, 5, 6]
    assert [f["loss"] for f in best.metrics] == [f["loss"] for f in last.metrics]
    for setting in ({"patience": 2}, {"schedule": "plateau"}):
        with pytest.raises(ValidationError, match="last` leaves out"):
            TrainSpec(keep="last", **setting)


def test_a_setting_that_every_stage_overrides_is_refused():
    stages = [{"epochs": 1, "learning_rate": 0.1}, {"epochs": 1, "learning_rate": 0.01}]
    with pytest.raises(ValidationError, match=r"no effect.*train\.stages\.0\.learning_rate"):
        TrainSpec(stages=stages, learning_rate=0.5)
    del stages[1]["learning_rate"]
    assert TrainSpec(stages=stages, learning_rate=0.5).plan()[1].learning_rate == 0.5


def test_a_diverging_run_says_so():
    with pytest.raises(RunError, match=r"lower train\.learning_rate"):
        run(AloneContext(), toy_recipe(learning_rate=1e30, optimizer="sgd", schedule="constant"))


@pytest.mark.parametrize(
    ("scans", "batch", "workers", "size", "steps"),
    [(100, 32, 1, 32, 3), (100, 32, 2, 16, 3), (10, 32, 1, 10, 1), (101, 10, 4, 2, 12)],
)
def test_every_worker_has_the_same_number_of_full_batches(scans, batch, workers, size, steps):
    assert worker_batch_size(scans, batch, workers) == size
    assert steps_per_epoch(scans, batch, workers) == steps


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_schedules_last_for_every_step_of_the_run(schedule, optimizer):
    train = TrainSpec(schedule=schedule, optimizer=optimizer, learning_rate=0.1)
    stepped = build_optimizer(torch.nn.Linear(2, 2), train)
    scheduler = build_schedule(stepped, train, total_steps=10)
    rates = []
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0])
        stepped.step()
        scheduler.step()
    assert max(rates) == pytest.approx(0.1, rel=0.05)
    assert (rates[-1] < 0.02) == (schedule != "constant")


def test_norms_and_biases_are_not_decayed():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    groups = build_optimizer(model, TrainSpec(weight_decay=0.1)).param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert [len(g["params"]) for g in groups] == [1, 3]


def test_augmentation_is_seeded_bounded_and_per_image():
    images = torch.rand(1, 1, SIDE, SIDE).repeat(8, 1, 1, 1)
    spec = AugmentSpec()
    one = augment(images, spec, torch.Generator().manual_seed(3))
    two = augment(images, spec, torch.Generator().manual_seed(3))
    assert torch.equal(one, two)
    assert not torch.equal(one[0], one[1])
    assert one.min() >= 0
    assert one.max() <= 1
    assert one.shape == images.shape


def test_augmentation_with_nothing_to_do_changes_nothing():
    images = torch.rand(4, 1, SIDE, SIDE)
    spec = AugmentSpec(horizontal_flip=False, rotation_degrees=0, zoom=0, contrast=0)
    torch.testing.assert_close(augment(images, spec, torch.Generator()), images, rtol=0, atol=1e-5)


def test_a_flip_is_the_mirror_image():
    images = torch.rand(32, 1, SIDE, SIDE)
    spec = AugmentSpec(rotation_degrees=0, zoom=0, contrast=0)
    flipped = augment(images, spec, torch.Generator().manual_seed(0))
    same = torch.isclose(flipped, images, atol=1e-4).flatten(1).all(1)
    mirrored = torch.isclose(flipped, images.flip(3), atol=1e-4).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 4 < mirrored.sum() < 28


def test_workers_always_leave_a_cpu_to_ray_data():
    for cpus in range(2, 65):
        for workers in range(1, cpus + 1):
            each = plan_scaling(workers, "cpu", cpus, 0).cpus_per_worker
            assert each > 0
            assert cpus - workers * each >= 1 - 1e-9
    assert plan_scaling(None, "cpu", 2, 0).cpus_per_worker == 1.0


def test_a_worker_fits_on_a_node():
    assert plan_scaling(1, "cpu", 8, 0, room=2).cpus_per_worker == 2


def test_a_class_without_scans_draws_no_answers():
    loss = build_loss(TrainSpec(class_weights=True, label_smoothing=0.05), [1000, 500, 0])
    torch.testing.assert_close(loss.weight_K, torch.tensor([0.75, 1.5, 0.0]))


MIXED = [{"CPU": 32.0}, {"CPU": 4.0, "GPU": 2.0}, {"memory": 1e9}]


def test_gpu_workers_default_to_one_for_each_gpu():
    assert plan_scaling(None, "cuda", 32, 4).num_workers == 4
    mixed = Resources(36, 2, 3, 32, cpus_per_gpu=_cpus_per_gpu(MIXED))
    each = plan_scaling(None, "cuda", 36, 2, mixed.room("cuda")).cpus_per_worker
    assert each == 2, "a worker fits beside the others of its node"
    assert plan_scaling(1, "cpu", 36, 2, mixed.room("cpu")).cpus_per_worker == 4


def test_a_run_that_is_to_go_on_keeps_device_and_workers_unless_told_otherwise(tmp_path):
    assert as_begun(str(tmp_path), "auto", None) == ("auto", None)
    storage.write_json(str(tmp_path / "started.json"), {"device": "cuda", "num_workers": 4})
    assert as_begun(str(tmp_path), "auto", None) == ("cuda", 4)
    assert as_begun(str(tmp_path), "cpu", 2) == ("cpu", 2)


def test_workers_are_reached_where_their_nodes_are():
    addresses = {
        "lo": [SimpleNamespace(address="127.0.0.1")],
        "eth0": [SimpleNamespace(address="02:00:00:00:00:01"), SimpleNamespace(address="10.0.0.5")],
        "eth1": [SimpleNamespace(address="fe80::1%eth1")],
    }
    assert interface_of("10.0.0.5", addresses) == "eth0"
    assert interface_of("fe80::1", addresses) == "eth1"
    assert interface_of("203.0.113.7", addresses) is None, "Gloo chooses, as without us"


def test_a_worker_that_ray_ended_for_memory_names_the_settings_that_help():
    text = "Actor died\n1 worker(s) were killed due to the node running low on memory. See\nthe log"
    assert "lower train.batch_size" in _root_cause(RuntimeError(text))
    assert _root_cause(RuntimeError("first\n  last line\n")) == "last line"


def test_empty_predictions_are_a_fresh_list_each():
    assert Predictions().scan_id is not Predictions().scan_id
