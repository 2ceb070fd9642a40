"""The README's commands, word for word and in order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1300)]

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def run(script, folder, **environment):
    """Run a script as from a user's shell: also where `make` runs the tests."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={**own, **environment},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def session_address(ray_session):
    """Lets the commands join the session's Ray, so that none starts one of its own."""
    import ray

    return ray.get_runtime_context().gcs_address


def test_the_first_block_is_the_two_commands():
    assert BLOCKS[0] == "make demo\nmake test\n"


# Each of its steps is a command of the next test, too, or of the chain that others share.
@pytest.mark.slow
@pytest.mark.parametrize("given", ["DATA", pytest.param("", id="synthetic scans")])
def test_make_demo_runs_the_whole_chain(chain, given, tmp_path, session_address):
    out = tmp_path / "demo"
    command = BLOCKS[0].splitlines()[0] + (f" DATA={chain.archive}" if given else "")
    weights = os.environ.get("BT_WEIGHTS")  # with these it trains fewer epochs
    command += f" WEIGHTS={weights}" if given and weights else ""
    printed = run(command, ROOT, OUT=str(out), RAY_ADDRESS=session_address)
    for name in ("data", "runs", "bundle", "report", "scores"):
        assert (out / name).is_dir()
        assert f"{out}/{name}: " in printed
    assert "POST /v1/predictions: " in printed
    assert "next: .venv/bin/bt serve" in printed.splitlines()[-1]


def test_the_users_commands_work_in_order(tmp_path, session_address):
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parents[1])
    script = "\n".join(BLOCKS[1:])
    printed = run(script, tmp_path, RAY_ADDRESS=session_address)
    assert "exploration in" in printed
    assert "report in" in printed
    assert "predicted_label" in printed
    assert printed.count('"results"') == 2
    assert (tmp_path / "runs" / "report" / "report.html").exists()
