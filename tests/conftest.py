"""Shared fixtures: one Ray for the whole session, and one small chain that many tests look at."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bt_core.log import logger
from bt_core.scans.phantom import write_archive
from jobs.cli import main

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a model hub; read when its client is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that share tiny tensors only wait
SMALL = ["--set", "preprocess.size_px=48", "--set", "train.batch_size=8"]


def bt(*words: object) -> int:
    """Run a command in this process, on the session's Ray, and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def bt_process(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own and return what it printed."""
    command = [sys.executable, "-m", f"jobs.{words[0]}", *map(str, words[1:])]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


class Lines(logging.Handler):
    """What this project logs, whatever other libraries do to the root logger."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())

    @property
    def text(self):
        return "\n".join(self.messages)


@pytest.fixture
def lines(monkeypatch):
    """Collect the log lines of a test."""
    handler = Lines()
    monkeypatch.setattr(logger, "disabled", False)
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(scope="session")
def ray_session(_environment):
    """One local Ray with two logical CPUs."""
    import ray

    from cluster.session import session

    with session(num_cpus=2, dashboard=True) as resources:
        yield resources
    assert not ray.is_initialized()


@contextmanager
def launches():
    """Collect what this process hands to Ray: name and how often Ray repeats it, -1 for ever."""
    from ray.actor import ActorClass
    from ray.remote_function import RemoteFunction

    seen = set()
    task, actor = RemoteFunction._remote, ActorClass._remote

    def of_task(self, args=None, kwargs=None, *rest, **options):
        given = {**self._default_options, **options}
        name = given.get("name") or self._function_name.rpartition(".")[2]
        seen.add((name, given.get("max_retries", 3)))
        return task(self, args, kwargs, *rest, **options)

    def of_actor(self, args=None, kwargs=None, *rest, **options):
        given = {**self._default_options, **options}
        repeats = (given.get("max_restarts", 0), given.get("max_task_retries", 0))
        seen.add((self.__ray_metadata__.class_name.rpartition(".")[2], *repeats))
        return actor(self, args, kwargs, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemoteFunction, "_remote", of_task)
        patch.setattr(ActorClass, "_remote", of_actor)
        yield seen


@dataclass(frozen=True)
class Chain:
    """What a small run of the whole chain left behind."""

    root: Path
    archive: Path
    data: Path
    runs: tuple[Path, Path]
    bundle: Path
    report: Path
    scores: Path
    launched: set[tuple[str | int, ...]]


@pytest.fixture(scope="session")
def chain(ray_session, tmp_path_factory):
    """Prepare, train two tiny classifiers, ensemble, evaluate and score by the commands."""
    with launches() as launched:
        return run_chain(tmp_path_factory, launched)


def run_chain(tmp_path_factory, launched):
    root = tmp_path_factory.mktemp("chain")
    archive, data, bundle = root / "scans.zip", root / "data", root / "bundle"
    runs = (root / "runs" / "cnn_small", root / "runs" / "mobilenetv2")
    write_archive(str(archive), num_per_class=20, size_px=96)
    assert bt("prepare", archive, "-o", data, "--recipe", "cnn_small") == 0
    common = ["--data", data, *SMALL]
    one = ["train", "--recipe", "cnn_small", *common, "--set", "train.epochs=3", "-o", runs[0]]
    two = ["train", "--recipe", "mobilenetv2", *common, "--set", "train.epochs=1", "-o", runs[1]]
    assert bt(*one) == 0
    assert bt(*two, "--set", "model.weights=none") == 0
    # On so few scans another choice of weights may leave a member out.
    assert bt("ensemble", *runs, "--weights", "equal", "-o", bundle) == 0
    assert bt("evaluate", bundle, "--data", data, "-o", root / "report") == 0
    assert bt("score", bundle, archive, "-o", root / "scores") == 0
    return Chain(root, archive, data, runs, bundle, root / "report", root / "scores", launched)


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium. Of a module, since its event loop would stand in the way of others'."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None:  # a failure: what is skipped in silence goes untested for good
        pytest.fail("the pages are opened in a browser: apt-get install chromium")
    with sync_playwright() as playwright:
        # Playwright starts it without Chromium's sandbox unless told otherwise. Root, which
        # containers run tests as, cannot have one; and these pages are ours.
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@contextmanager
def short_folder():
    """A folder whose name leaves room for those of Ray's sockets, which may have 107 characters."""
    folder = tempfile.mkdtemp(prefix="bt-", dir="/tmp")
    yield Path(folder)
    shutil.rmtree(folder)


@pytest.fixture
def home():
    with short_folder() as folder:
        yield folder


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 9 MiB: a checkpoint of `cnn_small` fits, a second one does not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture(scope="session", autouse=True)
def _environment():
    """A job that Ray starts as `python` finds this environment's."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
