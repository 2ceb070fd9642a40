"""Cluster files pass Ray's own schema, install only the lock, and open nothing to the world.

`prepare_config` merges a file with the defaults of its provider and `validate_config` checks the
result; both work offline and without boto3. Whether AWS has image and group, and whether machines
answer, only `ray up` can tell.
"""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.providers import _get_default_config
from ray.autoscaler._private.util import prepare_config, validate_config

REPOSITORY = Path(__file__).parents[2]
AWS = "ray_cluster.yaml"
FILES = [AWS, "cluster/on_premises.yaml"]
TOKEN_FILE = "~/.ray/auth_token"
SETUP_LISTS = ["initialization_commands", "head_setup_commands", "worker_setup_commands"]
START_LISTS = ["head_start_ray_commands", "worker_start_ray_commands"]

Config = dict[str, Any]


def commands(config: Config, *lists: str) -> list[str]:
    """Return the commands of the lists, and those that node types bring of their own."""
    owners = [config, *config.get("available_node_types", {}).values()]
    return [command for owner in owners for name in lists for command in owner.get(name, [])]


def is_ray_start(command: str) -> bool:
    return re.search(r"\bray\s+start\b", command) is not None


def requirements(command: str) -> list[str]:
    """Return what a `pip install` command names itself, neither files nor folders."""
    words = shlex.split(command)
    if "install" not in words or not any(re.search(r"\bpip[\d.]*$", word) for word in words):
        return []
    arguments = words[words.index("install") + 1 :]
    taken = {i + 1 for i, word in enumerate(arguments) if word in {"-r", "-e"}}
    return [w for i, w in enumerate(arguments) if i not in taken and not w.startswith("-")]


def read(name: str) -> Config:
    return yaml.safe_load((REPOSITORY / name).read_text())


@pytest.fixture(scope="module", params=FILES)
def raw(request: pytest.FixtureRequest) -> Config:
    return read(request.param)


@pytest.fixture(scope="module")
def merged(raw: Config) -> Config:
    """The file as `ray up` sees it, with defaults filled in."""
    return prepare_config(deepcopy(raw))


@pytest.fixture(scope="module")
def aws() -> Config:
    return prepare_config(read(AWS))


def test_schema_accepts_the_file(merged: Config) -> None:
    validate_config(merged)


def test_schema_rejects_an_unknown_key(raw: Config) -> None:
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_hours"):
        validate_config(prepare_config(deepcopy(raw) | {"idle_timeout_hours": 1}))


def test_schema_rejects_an_unknown_head_type() -> None:
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(prepare_config(read(AWS) | {"head_node_type": "boss"}))


def test_head_runs_no_work(merged: Config) -> None:
    (start,) = filter(is_ray_start, merged["head_start_ray_commands"])
    head = merged["available_node_types"][merged["head_node_type"]]
    if merged["provider"]["type"] == "local":  # which has one type for all nodes
        assert {"--num-cpus=0", "--num-gpus=0"} <= set(shlex.split(start))
    else:
        assert head["resources"] == {"CPU": 0}
        assert head["max_workers"] == 0


def test_every_worker_on_premises_starts() -> None:
    config = prepare_config(read("cluster/on_premises.yaml"))
    (nodes,) = config["available_node_types"].values()
    num_workers = len(config["provider"]["worker_ips"])
    assert nodes["min_workers"] == nodes["max_workers"] == config["max_workers"] == num_workers
    assert config["provider"]["head_ip"] not in config["provider"]["worker_ips"]


def test_one_pool_has_gpus_on_spot_and_one_has_none(aws: Config) -> None:
    pools = dict(aws["available_node_types"])
    del pools[aws["head_node_type"]]
    by_gpu = {bool(pool["resources"].get("GPU")): pool for pool in pools.values()}
    assert len(pools) == len(by_gpu) == 2
    limits = {gpu: (pool["min_workers"], pool["max_workers"]) for gpu, pool in by_gpu.items()}
    assert limits == {False: (1, 10), True: (1, 4)}
    assert by_gpu[True]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert all(pool["resources"]["CPU"] > 0 for pool in pools.values())
    assert aws["max_workers"] >= 10 + 4, "the limit of the whole must not cut the pools"
    assert aws["idle_timeout_minutes"] > 0


@pytest.mark.parametrize("name", START_LISTS)
def test_every_ray_start_asks_for_the_token(merged: Config, name: str) -> None:
    starts = [command for command in commands(merged, name) if is_ray_start(command)]
    assert len(starts) == 1
    assert re.search(r"\bRAY_AUTH_MODE=token ray start\b", starts[0])


def test_ray_starts_nowhere_else(merged: Config) -> None:
    assert not any(is_ray_start(command) for command in commands(merged, *SETUP_LISTS))


def test_dashboard_stays_on_loopback(merged: Config) -> None:
    (start,) = filter(is_ray_start, merged["head_start_ray_commands"])
    assert [w for w in shlex.split(start) if w.startswith("--dashboard-host")] == [
        "--dashboard-host=127.0.0.1"
    ]
    assert "0.0.0.0" not in json.dumps(merged)


def test_no_node_falls_back_to_the_open_security_group(aws: Config) -> None:
    for node_type in aws["available_node_types"].values():
        assert node_type["node_config"]["SecurityGroupIds"]
    assert "security_group" not in aws["provider"], "no rules beyond the user's own group"


def test_no_default_command_is_left(merged: Config) -> None:
    default = _get_default_config(merged["provider"])
    left = set(commands(merged, *SETUP_LISTS, *START_LISTS)) & set(
        commands(default, "setup_commands", *SETUP_LISTS, *START_LISTS)
    )
    assert left <= {"ray stop"}


@pytest.mark.parametrize("name", ["head_setup_commands", "worker_setup_commands"])
def test_ray_comes_from_the_lock_alone(merged: Config, name: str) -> None:
    setup = commands(merged, "initialization_commands", name)
    assert any("pip install" in c and "-r ~/bt/requirements.lock" in c for c in setup)
    assert not any("://" in command for command in setup)
    for text in [text for command in setup for text in requirements(command)]:
        requirement = Requirement(text)
        assert requirement.name != "ray"
        assert str(requirement.specifier).startswith("=="), f"{text} is not pinned"


def test_lock_pins_the_ray_that_is_tested() -> None:
    lock = (REPOSITORY / "requirements.lock").read_text()
    assert re.findall(r"^ray(?:\[.*\])?\s*==\s*(\S+)", lock, re.MULTILINE) == [ray.__version__]


def test_only_the_code_and_the_token_are_copied(merged: Config) -> None:
    """By name, so that nothing else in the folder travels, whatever it is called."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    packages = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    read_by_pip = {project["project"]["readme"], *project["project"]["license-files"]}
    code = packages | read_by_pip | {"pyproject.toml", "requirements.lock"}
    mounts = {f"~/bt/{name}": name for name in code}
    assert merged["file_mounts"] == mounts | {TOKEN_FILE: TOKEN_FILE}
    assert all((REPOSITORY / name).exists() for name in code)


def test_what_is_copied_is_copied_whole(merged: Config) -> None:
    assert merged["rsync_exclude"] == ["__pycache__"]


def test_the_nodes_install_what_was_copied(merged: Config, tmp_path: Path) -> None:
    """As Ray's updater has rsync do it: a folder's contents to a folder of that name."""
    for remote, local in merged["file_mounts"].items():
        if local != TOKEN_FILE:
            target = tmp_path / Path(remote).relative_to("~/bt")
            copy = shutil.copytree if (REPOSITORY / local).is_dir() else shutil.copy
            copy(REPOSITORY / local, target)
    line = [
        sys.executable,
        "-W",
        "error",
        "-c",
        "from setuptools import setup; setup()",
        "-q",
        "egg_info",
    ]
    subprocess.run(line, cwd=tmp_path, check=True)
    assert (tmp_path / "bt.egg-info").is_dir()


def serve_config(name: str) -> Config:
    found = read(name)
    return yaml.safe_load(found["spec"]["serveConfigV2"]) if "spec" in found else found


@pytest.mark.parametrize(
    "name", ["cluster/serve_config.yaml", "cluster/kuberay/serve/ray_service.yaml"]
)
def test_the_serve_config_is_one_that_serve_deploy_takes_and_our_settings_validate(name: str):
    from ray.serve.schema import ServeDeploySchema

    from bt_core.config import parse
    from serve.settings import EnsembleSettings, ServeSettings, Targets

    config = ServeDeploySchema.model_validate(serve_config(name))
    ensemble, gateway = config.applications
    parse(EnsembleSettings, ensemble.args, "ensemble")
    parse(ServeSettings, gateway.args, "gateway")
    (deployment,) = gateway.deployments
    targets = parse(Targets, deployment.user_config, "targets")
    assert targets.ensemble.app == ensemble.name
    for application in config.applications:
        module, name = application.import_path.split(":")
        assert callable(getattr(importlib.import_module(module), name))
