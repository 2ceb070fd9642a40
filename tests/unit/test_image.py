"""The image: what its build gets, what it installs, and that nothing in it runs as root.

No engine is needed: the Dockerfile is linted and its instructions are read.
"""

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = REPOSITORY / "cluster" / "Dockerfile"
MAKEFILE = (REPOSITORY / "Makefile").read_text()
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def stages() -> list[list[tuple[str, str]]]:
    """Return the instructions of each stage, and before them those of none."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found: list[list[tuple[str, str]]] = [[]]
    for line in filter(None, joined.splitlines()):
        name, _, value = line.partition(" ")
        if name == "FROM":
            found.append([])
        found[-1].append((name, value))
    return found


def values(stage: list[tuple[str, str]], name: str) -> str:
    return "\n".join(value for found, value in stage if found == name)


def is_sent(path: str) -> bool:
    """Return whether the build gets a file, by the last line of .dockerignore that matches it."""
    sent = True
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        prefixes = accumulate(path.split("/"), lambda parent, name: f"{parent}/{name}")
        if not line.startswith("#") and any(fnmatchcase(prefix, pattern) for prefix in prefixes):
            sent = line.startswith("!")
    return sent


def test_the_linter_finds_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run(
        [hadolint, "--failure-threshold", "style", DOCKERFILE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_the_build_gets_the_code_and_nothing_else():
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        assert is_sent(f"{package.replace('.', '/')}/__init__.py"), package
    for name in ("pyproject.toml", "requirements.lock", "README.md", "LICENSE"):
        assert is_sent(name), name
    for name in (
        ".git/config", ".venv/bin/python", "data/a.png", "runs/keys.json", "scans.zip", ".env",
        "tests/conftest.py", "bt_core/data/__pycache__/a.pyc", "jobs/__pycache__/a.pyc",
    ):  # fmt: skip
        assert not is_sent(name), name


def test_it_installs_by_the_lock_and_takes_no_build_tool_along(stages):
    _, build, final = stages
    (uv,) = re.findall(r"uv==[\d.]+", MAKEFILE)
    assert f"pip install --no-cache-dir {uv} " in values(build, "RUN")
    installs = [line for line in values(build, "RUN").splitlines() if "uv pip install" in line]
    assert "--constraints requirements.lock" in installs[0]
    assert all("--no-deps" in line for line in installs[1:])
    assert "pip install" not in values(final, "RUN")
    assert values(final, "COPY") == "--from=build /opt/bt /opt/bt"


def test_it_has_the_python_that_the_lock_was_made_for(stages):
    before, *rest = stages
    (python,) = re.findall(
        r"^PYTHON *\?= python(3\.\d+)", (REPOSITORY / "Makefile").read_text(), re.M
    )
    assert values(before, "ARG").startswith(f"PYTHON=python:{python}-slim")
    assert all(values(stage, "FROM").startswith("${PYTHON}") for stage in rest)


def test_it_runs_as_a_plain_user_and_asks_for_the_token(stages):
    final = stages[-1]
    assert values(final, "USER") == "1000:1000"
    assert [name for name, _ in final].index("USER") > max(
        index for index, (name, _) in enumerate(final) if name in ("RUN", "COPY")
    )
    assert re.search(r"useradd --uid 1000 --create-home\b", values(final, "RUN"))
    assert "RAY_AUTH_MODE=token" in values(final, "ENV").split()


def test_it_has_what_kuberay_calls(stages):
    final = stages[-1]
    assert re.search(r"--no-install-recommends wget\b", values(final, "RUN"))
    assert "PATH=/opt/bt/bin:$PATH" in values(final, "ENV").split()  # ray, python, bt
    assert values(final, "ENTRYPOINT") == "", "KubeRay's own command takes its place"


def test_its_label_is_the_version(stages):
    labels = dict(re.findall(r'(\S+)="([^"]*)"', values(stages[-1], "LABEL")))
    assert labels["org.opencontainers.image.version"] == PROJECT["project"]["version"]
    assert labels["org.opencontainers.image.licenses"] == PROJECT["project"]["license"]
    assert labels["org.opencontainers.image.description"] == PROJECT["project"]["description"]
