"""Importing a module of this project only defines things."""

import json
import subprocess
import sys

from tests.unit.test_import_direction import FILES, ROOT, TOP_LEVEL, imported_modules

MINE = [path.relative_to(ROOT) for path in FILES if path.parent.name != "peers"]


def effects(folder, first, then):
    result = subprocess.run(
        [sys.executable, "-m", "tests.import_effects"],
        input=json.dumps({"first": sorted(first), "then": sorted(then)}),
        env={"PYTHONPATH": f"{ROOT}:{folder}", "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )
    return json.loads(result.stdout)


def test_importing_a_module_changes_nothing_in_its_process(tmp_path):
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in MINE}
    libraries = {m for path in MINE for m in imported_modules(ROOT / path, only_at_import=True)}
    foreign = {module for module in libraries if module.split(".")[0] not in TOP_LEVEL}
    assert effects(tmp_path, foreign, modules) == {}


def test_what_an_import_changes_is_found(tmp_path):
    (tmp_path / "bad.py").write_text(
        "import logging, os, signal, threading, time, warnings\n"
        "os.environ['OMP_NUM_THREADS'] = '1'\n"
        "os.chdir('/')\n"
        "warnings.simplefilter('ignore')\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "threading.Thread(target=time.sleep, args=(9,), name='own', daemon=True).start()\n"
    )
    assert effects(tmp_path, ["logging"], ["bad"]) == {
        "bad": [
            "handler of signal 15",
            "handlers of the root logger",
            "level of logger root",
            "thread own",
            "variable OMP_NUM_THREADS",
            "warning filters",
            "working directory",
        ]
    }
