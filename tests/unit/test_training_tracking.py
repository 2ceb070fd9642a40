"""TensorBoard's event files and MLflow's runs, read back."""

import contextlib
import logging
import struct

import pytest
from typer.testing import CliRunner

from bt_core.errors import UsageError
from bt_core.training.tracking import tracking
from jobs.cli import app
from tests.unit.toy_training import toy_recipe


def figures(epoch):
    return {"epoch": epoch, "stage": 1, "loss": 1.0 / epoch, "val_accuracy": 0.5 + epoch / 10}


def scalars_of(folder):
    """Return {(tag, step): value} of event files as TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event

    found, purged = {}, []
    for path in sorted(folder.glob("events.*")):
        content, position = path.read_bytes(), 0
        while position < len(content):  # length, checksum, event, checksum
            (length,) = struct.unpack_from("<Q", content, position)
            event = Event.FromString(content[position + 12 : position + 12 + length])
            position += 16 + length
            if event.HasField("session_log"):
                purged.append(event.step)
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found, purged


def test_tensorboard_has_every_figure_of_every_epoch(tmp_path):
    for first in (1, 2):  # a run that goes on gives the epochs before again
        with tracking(toy_recipe(), str(tmp_path), True, None) as trackers:
            for epoch in range(1, first + 2):
                trackers[0].epoch(figures(epoch))
    found, purged = scalars_of(tmp_path / "tensorboard")
    assert {step for _, step in found} == {1, 2, 3}
    assert found["training/loss", 2] == pytest.approx(0.5)
    assert found["validation/accuracy", 3] == pytest.approx(0.8)
    assert set(purged) == {1}, "what the first command wrote is dropped from epoch 1 on"


def test_mlflow_has_one_run_with_parameters_metrics_and_its_end(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    uri = f"file://{tmp_path}/mlruns"
    asked = (toy_recipe(), str(tmp_path / "run"), False, uri)
    with contextlib.suppress(KeyboardInterrupt), tracking(*asked) as trackers:
        trackers[0].epoch(figures(1))
        raise KeyboardInterrupt
    client = mlflow.tracking.MlflowClient(tracking_uri=uri)
    (experiment,) = client.search_experiments(filter_string="name = 'bt'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED"
    with tracking(*asked) as trackers:
        for epoch in (1, 2, 3):
            trackers[0].epoch(figures(epoch))
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.learning_rate"] == "0.01"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_a_server_that_fails_later_costs_the_record_and_not_the_training(tmp_path, caplog):
    pytest.importorskip("mlflow")
    store = tmp_path / "mlruns"
    with tracking(toy_recipe(), str(tmp_path / "run"), False, f"file://{store}") as trackers:
        trackers[0].epoch(figures(1))
        for path in sorted(store.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        with caplog.at_level(logging.WARNING, "bt"):
            logging.getLogger("bt").addHandler(caplog.handler)
            trackers[0].epoch(figures(2))
            trackers[0].epoch(figures(3))
            logging.getLogger("bt").removeHandler(caplog.handler)
    assert sum("training goes on without it" in message for message in set(caplog.messages)) == 1


def test_a_server_that_is_not_there_ends_the_command_before_it_begins(tmp_path):
    pytest.importorskip("mlflow")
    with (
        pytest.raises(UsageError, match=r"--mlflow http://127.0.0.1:9 cannot be used"),
        tracking(toy_recipe(), str(tmp_path), False, "http://127.0.0.1:9"),
    ):
        pytest.fail("there is nobody")
    assert not list(tmp_path.iterdir())


def test_a_password_in_the_address_is_refused_and_not_repeated():
    words = ["train", "--recipe", "cnn_small", "--data", "x", "--submit", "http://127.0.0.1:9"]
    result = CliRunner().invoke(app, [*words, "--mlflow", "https://ann:sesame@host:5000"])
    assert result.exit_code == 2
    assert "sesame" not in result.output
    assert "MLFLOW_TRACKING_PASSWORD" in result.output
