"""`bt tune` and `bt replay` through the commands: interrupted, gone on with, ranked, replayed."""

import json
import signal
import subprocess
import sys
import threading
import time

import psutil
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from bt_core.data.catalog import Dataset
from bt_core.data.seal import openings
from bt_core.training.launch import check_settings
from bt_core.training.recipe import load_recipe
from bt_core.training.sweep_job import read_predictions, records_of
from bt_core.training.trial import differences, read_records, run_trial
from jobs.recipes_folder import RECIPES
from tests.conftest import bt

pytestmark = pytest.mark.integration

SWEEP = {
    "recipes": ["cnn_small"],
    "fixed": {
        "preprocess.size_px": 48,
        "train.batch_size": 8,
        "train.learning_rate": 0.01,
        "model.backbone_args.width": 8,
    },
    "folds": 2,
    "epochs": 2,
    "max_concurrent": 1,
}


def write(path, **changes):
    path.write_text(yaml.safe_dump({**SWEEP, **changes}))
    return path


def when(condition, action):
    """Do something from another thread as soon as a condition holds."""

    def wait():
        while not condition():
            time.sleep(0.05)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def swept(chain, tmp_path_factory):
    """A sweep of four trials, two of which diverge, stopped by Ctrl-C behind the first."""
    root = tmp_path_factory.mktemp("tune")
    space = {
        "preprocess.equalize": {"choice": [False, True]},
        "train.weight_decay": {"choice": [0.01, 1.0e38]},
    }
    sweep = write(root / "sweep.yaml", space=space, search="grid", scheduler="none")
    words = ("tune", sweep, "--data", chain.data, "-o", root / "out")
    out = str(root / "out")
    opened = len(openings(str(chain.data)))
    # A process of its own, as a user would stop: signals of this one are for the whole session.
    started = subprocess.Popen([sys.executable, "-m", "jobs.tune", *map(str, words[1:])])
    interrupt = when(
        lambda: any(r.status in ("finished", "failed") for r in records_of(out)),
        lambda: started.send_signal(signal.SIGINT),
    )
    first = started.wait()
    interrupt.join()
    before = {r.trial_id: r for r in records_of(out) if r.status in ("finished", "failed")}
    assert not (root / "out" / "leaderboard.parquet").exists()
    second = bt(*words)
    assert len(openings(str(chain.data))) == opened, "a sweep does not open the test split"
    return root / "out", words, (first, second), before


def test_an_interrupted_sweep_keeps_its_finished_trials(swept):
    out, words, codes, before = swept
    assert codes == (130, 0)
    assert 1 <= len(before) < 4
    after = {record.trial_id: record for record in read_records(str(out))}
    assert len(after) == 4
    assert {i: after[i] for i in before} == before, "what was finished was not trained again"
    assert bt(*words) == 2, "a finished sweep is not gone on with"


def test_the_leaderboard_has_every_trial_with_rank_or_reason(swept, capfd):
    out = swept[0]
    rows = pq.read_table(out / "leaderboard.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["finished", "finished", "failed", "failed"]
    assert rows[0]["rank"] == 1
    assert rows[0]["tied"]
    assert rows[0]["val_score"] >= rows[1]["val_score"]
    assert all(row["reason"].startswith("not_finite") for row in rows[2:])
    assert {(row["preprocess.equalize"], row["train.weight_decay"]) for row in rows} == {
        (equalize, decay) for equalize in (False, True) for decay in (0.01, 1.0e38)
    }
    page = (out / "leaderboard.html").read_text()
    assert all(row["trial_id"] in page for row in rows)
    assert page.count("<img") == 1
    assert "http" not in page.split("<body>")[1], "the page needs no network"


def test_the_best_recipe_is_one_that_bt_train_takes(swept, chain):
    out = swept[0]
    best = load_recipe(str(out / "best.yaml"), RECIPES)
    leader = pq.read_table(out / "leaderboard.parquet").to_pylist()[0]
    assert best.preprocess.equalize == leader["preprocess.equalize"]
    assert best.train.epochs == 2
    check_settings(best, Dataset(str(chain.data)))


def test_a_trial_replays_from_its_record_to_the_same_figures(swept, capfd):
    out = swept[0]
    record = next(r for r in read_records(str(out)) if r.status == "finished")
    assert bt("replay", out, record.trial_id) == 0
    assert "4 epochs trained again, all figures equal" in capfd.readouterr().out
    lines = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    changed = next(line for line in lines if line["trial_id"] == record.trial_id)
    changed["fits"][1]["epochs"][1]["loss"] += 1e-6
    (out / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert bt("replay", out, record.trial_id) == 1
    assert "1 figures differ" in capfd.readouterr().out
    assert bt("replay", out, "nonesuch") == 2


def test_an_interrupted_trial_goes_on_behind_the_folds_that_it_finished(swept, chain):
    out = str(swept[0])
    whole = next(r for r in records_of(out) if r.status == "finished")
    predictions = read_predictions(out, whole.trial_id)
    half = whole.fits[1].model_copy(update={"epochs": whole.fits[1].epochs[:1]})
    broken = whole.model_copy(update={"status": "running", "fits": [whole.fits[0], half]})
    shares, kept = [], []
    again = run_trial(
        broken,
        Dataset(str(chain.data)),
        lambda so_far, share: shares.append(share),
        kept.append,
        predictions.filter(pc.equal(predictions["fold"], 0)),
    )
    assert shares == [0.75, 1.0]
    assert (again.status, len(again.fits)) == ("finished", 2)
    assert differences(whole, again) == []
    assert kept[-1].equals(predictions)


def test_optuna_chooses_and_asha_stops_and_the_leaderboard_says_so(chain, tmp_path, capfd):
    space = {
        "train.learning_rate": {"log_uniform": [1.0e-5, 0.03]},
        "train.batch_size": {"int_range": [6, 9]},
        "model.head.dropout": {"choice": [0.0, 0.5]},
    }
    fixed = {k: v for k, v in SWEEP["fixed"].items() if k not in space}
    settings = {"search": "optuna", "num_samples": 5, "scheduler": "asha", "reduction_factor": 2}
    sweep = write(tmp_path / "sweep.yaml", fixed=fixed, space=space, **settings)
    assert bt("tune", sweep, "--data", chain.data, "-o", tmp_path / "out") == 0
    rows = pq.read_table(tmp_path / "out" / "leaderboard.parquet").to_pylist()
    assert len(rows) == 5
    outcomes = {(row["status"], row["reason"]) for row in rows}
    assert outcomes == {("finished", ""), ("stopped", "stopped early by asha")}
    assert all(row["num_epochs"] < 4 for row in rows if row["status"] == "stopped")
    assert len({row["train.learning_rate"] for row in rows}) == 5
    assert {row["train.batch_size"] for row in rows} <= {6, 7, 8, 9}
    assert "had not begun" not in capfd.readouterr().out


def test_a_time_budget_ends_the_sweep_and_says_what_never_began(chain, tmp_path, capfd):
    space = {"train.weight_decay": {"choice": [0.01, 0.02, 0.03]}}
    sweep = write(tmp_path / "sweep.yaml", space=space, search="grid", epochs=2000)
    out = tmp_path / "out"
    assert bt("tune", sweep, "--data", chain.data, "-o", out, "--time-budget", "0.2") == 2
    said = capfd.readouterr()
    assert "2 of 3 trials had not begun when the time budget ended" in said.out
    assert "no trial of" in said.err
    rows = pq.read_table(out / "leaderboard.parquet").to_pylist()
    assert {(row["status"], row["reason"]) for row in rows} == {
        ("stopped", "the time budget ended")
    }


def test_a_trial_whose_process_is_killed_fails_alone(chain, tmp_path):
    out = tmp_path / "out"
    content = {key: value for key, value in SWEEP.items() if key != "epochs"}
    content["space"] = {"train.epochs": {"choice": [2000, 1]}}
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({**content, "search": "grid", "scheduler": "none"}))
    dead = set()

    def kill_thrice():
        while len(dead) < 3:
            time.sleep(0.05)
            if not any(r.status == "running" and r.fits for r in records_of(str(out))):
                continue
            for process in psutil.Process().children(recursive=True):
                # Ray names a process after its actor; the class of Tune's function trials is this.
                if process.pid not in dead and "ImplicitFunc.train" in " ".join(process.cmdline()):
                    dead.add(process.pid)
                    process.kill()

    killer = threading.Thread(target=kill_thrice, daemon=True)
    killer.start()
    assert bt("tune", sweep, "--data", chain.data, "-o", out) == 0
    killer.join(timeout=1)
    first, second = pq.read_table(out / "leaderboard.parquet").to_pylist()
    assert (first["train.epochs"], first["status"]) == (1, "finished")
    assert (second["train.epochs"], second["status"]) == (2000, "failed")
    assert second["reason"].startswith("killed")
