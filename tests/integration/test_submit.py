"""Commands as jobs on a Ray cluster: the log comes back, the exit code is kept."""

import pytest
import ray

from bt_core.errors import EXIT_USAGE
from jobs.command import _job_arguments
from tests.conftest import bt_process

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


def test_only_paths_are_rewritten_and_submit_is_dropped(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    argv = ["score", "b", "s3://bucket/x.zip", "--out=o", "--submit", "http://h:1", "--overwrite"]
    arguments = {"bundle": "b", "source": "s3://bucket/x.zip", "out": "o", "overwrite": True}
    assert _job_arguments("score", argv, arguments) == [
        f"{tmp_path}/b", "s3://bucket/x.zip", f"--out={tmp_path}/o", "--overwrite"
    ]  # fmt: skip
