"""The dependency rule of the library, read from the imports themselves."""

import ast
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FOUNDATIONS = {"errors", "labels", "log", "storage", "store_errors", "store_files", "stores", "web"}
# A package of bt_core may import itself and what is listed here.
ALLOWED = {
    "errors": set(),
    "log": {"errors"},
    "labels": {"errors"},
    "store_errors": {"errors"},
    "web": {"store_errors"},
    "stores": {"errors", "web"},
    "store_files": {"store_errors", "stores", "web"},
    "storage": {"store_files", "stores"},
    "locks": {"errors", "storage"},
    "config": FOUNDATIONS,
    "scans": FOUNDATIONS | {"config"},
    "models": FOUNDATIONS | {"config", "scans"},
    "inference": FOUNDATIONS | {"config", "scans", "models"},
    "ensemble": FOUNDATIONS | {"config", "scans", "models", "inference"},
    "telemetry": {"log"},
    "data": FOUNDATIONS | {"config", "scans", "telemetry"},
    "training": FOUNDATIONS | {"config", "scans", "models", "data", "telemetry"},
    "evaluation": FOUNDATIONS
    | {"config", "scans", "models", "inference", "ensemble", "data", "training"},
    "workflows": FOUNDATIONS
    | {"config", "scans", "models", "inference", "ensemble", "data", "training", "evaluation"},
}
TOP_LEVEL = {"bt_core": set(), "cluster": {"bt_core"}, "jobs": {"bt_core", "cluster", "serve"}}
TOP_LEVEL["serve"] = {"bt_core", "cluster"}
# Of each other these import nothing but the modules named here.
DOORS = {
    ("jobs", "serve"): {"access", "app", "batch", "front", "keys", "settings", "tracing"},
    ("serve", "cluster"): {"environment", "submit"},
}
ONLY_IN = {
    "cv2": ("bt_core/scans/", "jobs/baselines.py"),
    "timm": ("bt_core/models/backbones.py",),
    "fastapi": ("serve/", "jobs/peers/"),
    "openvino": ("bt_core/inference/openvino_runtime.py",),
    "nncf": ("bt_core/inference/openvino_runtime.py",),
    "torchvision": ("bt_core/training/augment.py",),
    "torchvision.io": (),  # no scan is decoded by torchvision: damaged files end its process
    "torchvision.datasets": (),
    "ray": (
        "bt_core/telemetry.py",
        "bt_core/data/decode_guard.py",
        "bt_core/data/pipeline.py",
        "bt_core/data/scoring.py",
        "bt_core/data/views.py",
        "bt_core/training/worker.py",
        "bt_core/training/launch.py",
        "bt_core/training/process_group.py",
        "bt_core/training/search.py",
        "bt_core/workflows/ensemble.py",
        "cluster/",
        "jobs/",
        "serve/",
    ),
}
FILES = [path for name in TOP_LEVEL for path in sorted((ROOT / name).rglob("*.py"))]


def imported_modules(path: Path, only_at_import: bool = False) -> set[str]:
    """Return what a file imports, or only what it imports when it is imported itself."""
    tree = ast.parse(path.read_text())
    modules: set[str] = set()
    for node in tree.body if only_at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def faults_of(path: Path) -> list[str]:
    relative = path.relative_to(ROOT).as_posix()
    own_top = relative.split("/")[0]
    own_part = relative.split("/")[1].removesuffix(".py") if own_top == "bt_core" else ""
    faults = []
    for module in imported_modules(path):
        top, *rest = module.split(".")
        part = rest[0] if rest else ""
        for name in (top, f"{top}.{part}"):
            if name in ONLY_IN and not relative.startswith(ONLY_IN[name]):
                faults.append(f"{relative} imports {name}")
        if top in TOP_LEVEL and top != own_top and top not in TOP_LEVEL[own_top]:
            faults.append(f"{relative} imports {module}")
        if part and part not in DOORS.get((own_top, top), {part}):
            faults.append(f"{relative} imports {module}")
        inside = own_top == top == "bt_core" and part in ALLOWED and own_part in ALLOWED
        if inside and part != own_part and part not in ALLOWED[own_part]:
            faults.append(f"{relative} imports {module}")
    return faults


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path):
    assert faults_of(path) == []


def test_no_command_imports_another():
    jobs = imported_modules(ROOT / "jobs" / "cli.py")
    commands = {m for m in jobs if m.startswith("jobs.")} - {"jobs.command", "jobs.command.command"}
    assert {"jobs.score", "jobs.evaluate", "jobs.demo"} <= commands
    for module in sorted(commands):
        name = module.removeprefix("jobs.")
        if name != "demo" and not name.startswith("bench"):  # they run the others
            found = imported_modules(ROOT / "jobs" / f"{name}.py") & commands
            assert not found, f"jobs/{name}.py imports {', '.join(sorted(found))}"


def test_every_part_of_the_library_has_a_rule():
    parts = {p.name.removesuffix(".py") for p in (ROOT / "bt_core").iterdir()}
    assert parts - {"__init__", "__pycache__"} == set(ALLOWED)


def test_no_rule_allows_more_than_is_used():
    used = {(p.relative_to(ROOT).as_posix(), m) for p in FILES for m in imported_modules(p)}
    for name, places in ONLY_IN.items():
        for place in places:
            assert any(path.startswith(place) and m.split(".")[0] == name for path, m in used), (
                place,
                name,
            )
    for (own, other), parts in DOORS.items():
        for part in parts:
            door = f"{other}.{part}"
            assert any(path.startswith(f"{own}/") and m == door for path, m in used), (own, door)


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("bt_core/scans/bad.py", "import ray"),
        ("bt_core/scans/bad.py", "from bt_core.models import spec"),
        ("bt_core/scans/bad.py", "import jobs.cli"),
        ("bt_core/scans/bad.py", "from torchvision.transforms import v2"),
        ("bt_core/training/augment.py", "from torchvision import io"),
        ("bt_core/training/augment.py", "from torchvision.datasets import ImageFolder"),
        ("jobs/bad.py", "from serve import service"),
        ("jobs/bad.py", "def run():\n    import serve.service"),
        ("serve/bad.py", "from cluster.session import session"),
        ("cluster/bad.py", "from jobs import cli"),
    ],
)
def test_a_forbidden_import_is_found(path, statement, tmp_path, monkeypatch):
    bad = tmp_path / path
    bad.parent.mkdir(parents=True)
    bad.write_text(statement)
    monkeypatch.setattr("tests.unit.test_import_direction.ROOT", tmp_path)
    assert faults_of(bad)


def brought_by(requirements: list[str]) -> set[str]:
    """Return the distributions that requirements bring along, by what is installed here."""
    found: set[tuple[str, frozenset[str]]] = set()
    left = [Requirement(text) for text in requirements]
    while left:
        wanted = left.pop()
        key = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if key not in found:
            found.add(key)
            for text in metadata.requires(wanted.name) or []:
                inner = Requirement(text)
                extras = ("", *wanted.extras)
                if not inner.marker or any(inner.marker.evaluate({"extra": e}) for e in extras):
                    left.append(inner)
    return {name for name, _ in found}


def test_what_starts_is_installed_without_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    brought = brought_by(project["dependencies"])
    distributions = metadata.packages_distributions()
    own = {*TOP_LEVEL, *sys.stdlib_module_names}
    for path in FILES:
        if path.parent.name == "peers":  # servers to compare with, which are no dependencies
            continue
        for node in ast.parse(path.read_text()).body:  # what functions import may be optional
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in {name.partition(".")[0] for name in names} - own:
                givers = {canonicalize_name(name) for name in distributions[module]}
                assert givers & brought, f"{path.relative_to(ROOT)} imports {module}"
