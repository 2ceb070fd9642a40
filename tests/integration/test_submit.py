"""Commands as jobs on a Ray cluster: the log comes back, the exit code is kept."""

import os
import select
import subprocess
import sys
import time

import pytest
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from bt_core.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE
from tests.conftest import bt, bt_process
from tests.integration.test_cluster import BT

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def dashboard(ray_session):
    return "http://" + ray._private.worker.global_worker.node.webui_url


def test_a_command_runs_as_a_job_and_streams_its_output(dashboard, tmp_path):
    out = tmp_path / "scans.zip"
    result = bt_process("phantom", out, "--num-per-class", 1, "--submit", dashboard)
    assert result.returncode == 0, result.stderr
    assert f"4 synthetic scans in {out}" in result.stdout
    assert out.exists()


def test_the_workers_of_a_driver_that_joins_know_its_run(ray_session):
    program = (
        "import os, ray; from bt_core.log import run_id; from cluster.session import session\n"
        "from cluster.token import use_token; use_token(os.environ['RAY_ADDRESS'])\n"
        "with session(): print('workers of', ray.get(ray.remote(run_id).remote()))"
    )
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "BT_RUN_ID": "of-a-driver"}
    line = [sys.executable, "-c", program]
    joined = subprocess.run(
        line, env=os.environ | address, capture_output=True, text=True, check=True
    )
    assert joined.stdout == "workers of of-a-driver\n"


def test_a_relative_path_means_the_users_folder_and_the_exit_code_is_kept(dashboard, tmp_path):
    result = bt_process(
        "prepare", "no-such-archive.zip", "-o", "data", "--submit", dashboard, cwd=tmp_path
    )
    assert result.returncode == EXIT_USAGE, result.stdout + result.stderr
    assert f"{tmp_path}/no-such-archive.zip does not exist" in result.stdout


def test_a_cluster_that_is_not_there_is_said_so():
    result = bt_process("phantom", "x.zip", "--submit", "http://127.0.0.1:1")
    assert result.returncode == EXIT_USAGE
    assert "http://127.0.0.1:1" in result.stderr
    result = bt_process("phantom", "x.zip", "--submit", "localhost:8265")
    assert result.returncode == EXIT_USAGE
    assert "http://HOST:8265" in result.stderr


TYPED_AND_SENT = [
    ("score b s3://k/x.zip --out=o --overwrite", "--out HERE/o --overwrite -- HERE/b s3://k/x.zip"),
    ("score b a.zip -oo --no-cascade", "--out HERE/o --no-cascade -- HERE/b HERE/a.zip"),
    ("train --recipe a --data a -o o", "--recipe a --data HERE/a --out HERE/o"),
    ("train --recipe r.yaml --data /d -o /o", "--recipe HERE/r.yaml --data /d --out /o"),
    (
        "tune /s --data /d -o /o --set b={c:local-dir:/w} --weights local-dir:w/x",
        "--data /d --out /o --weights local-dir:HERE/w/x --set b={c:local-dir:/w} -- /s",
    ),
    (
        "train --recipe a --data /d -o /o --num-workers 2",
        "--recipe a --data /d --out /o --num-workers 2",
    ),
    ("ensemble a /b -o o", "--out HERE/o -- HERE/a /b"),
    ("phantom -- -x.zip", "-- HERE/-x.zip"),
]


@pytest.mark.parametrize(("typed", "sent"), TYPED_AND_SENT)
def test_only_paths_are_rewritten_and_submit_is_dropped(typed, sent, monkeypatch, tmp_path):
    told = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cluster.submit.submit", lambda *given: told.append(given[:3]) or 0)
    name, *rest = typed.split()
    assert bt(name, "--submit", "http://h:1", *rest) == 0
    assert told == [("http://h:1", f"jobs.{name}", sent.replace("HERE", str(tmp_path)).split())]


def test_a_command_of_two_words_stays_one(monkeypatch):
    told = []
    monkeypatch.setattr("cluster.submit.submit", lambda *given: told.append(given[:3]) or 0)
    assert bt("bench", "train", "--data", "/d", "--submit", "http://h:1") == 0
    assert told == [("http://h:1", "jobs.bench", ["train", "--data", "/d"])]


def test_an_output_that_is_not_given_is_asked_for(capsys):
    assert bt("train", "--recipe", "cnn_small", "--data", "d", "--submit", "http://h:1") == 2
    assert "--submit needs --out" in capsys.readouterr().err


def test_jobs_are_listed_followed_and_stopped(dashboard, capsys):
    client = JobSubmissionClient(dashboard)
    done = client.submit_job(entrypoint="echo a line of its log; exit 3")
    assert bt("jobs", "follow", done, "--cluster", dashboard) == 3
    assert "a line of its log" in capsys.readouterr().out
    endless = client.submit_job(entrypoint="sleep 600")
    assert bt("jobs", "list", "--cluster", dashboard) == 0
    told = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "FAILED" in told[done]
    assert "sleep 600" in told[endless]
    assert list(told).index(done) < list(told).index(endless), "the oldest comes first"
    assert bt("jobs", "stop", endless, "--cluster", dashboard) == 0
    assert capsys.readouterr().out == f"{endless}: STOPPED\nto have it done, submit it again\n"
    assert client.get_job_status(endless) == JobStatus.STOPPED
    assert bt("jobs", "stop", endless, "--cluster", dashboard) == 0
    assert f"{endless}: had ended before: STOPPED\n" in capsys.readouterr().out


def wait_until(client, job, status):
    deadline = time.monotonic() + 60
    while client.get_job_status(job) != status:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_job_that_waits_for_its_turn_stops_when_it_comes(
    dashboard, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr("cluster.submit._STOP_SECONDS", 0.0)
    client = JobSubmissionClient(dashboard)
    most = int(ray.cluster_resources()["memory"] * 0.6)
    first = client.submit_job(entrypoint="sleep 600", entrypoint_memory=most)
    wait_until(client, first, JobStatus.RUNNING)
    waits = client.submit_job(entrypoint="sleep 600", entrypoint_memory=most)
    assert bt("jobs", "stop", waits, "--cluster", dashboard) == EXIT_FAILED
    said = capsys.readouterr().err
    assert f"job {waits} was asked to stop, but it has not begun, and Ray ends it" in said
    assert client.get_job_status(waits) == JobStatus.PENDING
    client.stop_job(first)
    wait_until(client, waits, JobStatus.STOPPED)


def test_ctrl_c_in_a_terminal_asks_and_yes_stops_the_job(dashboard):
    client = JobSubmissionClient(dashboard)
    job = client.submit_job(entrypoint="echo it has begun; sleep 600")
    keyboard, terminal = os.openpty()
    line = [BT, "jobs", "follow", job, "--cluster", dashboard]
    process = subprocess.Popen(
        ["setsid", "--ctty", *line], stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    shown = ""
    for awaited, typed in [("it has begun", "\3"), ("[y/N]:", "y\n"), ("was stopped", "")]:
        while awaited not in shown:
            assert select.select([keyboard], [], [], 60)[0], shown
            shown += os.read(keyboard, 4096).decode()
        os.write(keyboard, typed.encode())
    assert f"stop job {job} on the cluster too? [y/N]:" in shown
    assert process.wait(60) == EXIT_INTERRUPTED
    os.close(keyboard)
    assert client.get_job_status(job) == JobStatus.STOPPED


def test_a_job_that_is_not_there_is_said_so(dashboard, capsys):
    for verb in ("follow", "stop"):
        assert bt("jobs", verb, "nothing", "--cluster", dashboard) == EXIT_USAGE
        assert "no job nothing; bt jobs list" in capsys.readouterr().err
    assert bt("jobs", "list", "--cluster", "http://127.0.0.1:1") == EXIT_USAGE
    assert bt("jobs", "list", "--submit", dashboard) == EXIT_USAGE
    assert "leave --submit out" in capsys.readouterr().err
