"""What a submitted command takes along, all of which the cluster's dashboard shows to everyone."""

import asyncio
import inspect
import logging
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobDetails, JobStatus

from bt_core import stores
from bt_core.errors import EXIT_INTERRUPTED, RunError, UsageError
from bt_core.log import logger
from cluster.environment import all_but_code, job_environment, plain_variables
from cluster.local import free_port
from cluster.pins import unlike_the_lock
from cluster.submit import Follower, _followed, submit, submitted
from cluster.token import use_token
from jobs.cli import app
from jobs.cluster import run_join
from jobs.command import _LOCATIONS
from jobs.jobs import FOLLOWER, again, wants_stop

LIMITS = {
    "BT_MAX_MEMBERS": "200000",
    "BT_MAX_TOTAL_BYTES": "3",
    "BT_MAX_MEMBER_BYTES": "2",
    "BT_MAX_RATIO": "1",
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "propagate", True)  # a command of another test may have ended it
    for name in (*LIMITS, *stores.VARIABLES, "BT_HASH_KEY", "BT_HASH_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)


def test_limits_and_the_file_of_the_key_go_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job_environment("one")["env_vars"] == {"BT_RUN_ID": "one"}
    monkeypatch.chdir(tmp_path)
    for name, value in (LIMITS | {"BT_HASH_KEY_FILE": "key"}).items():
        monkeypatch.setenv(name, value)
    sent = job_environment("one")
    key = {"BT_HASH_KEY_FILE": str(tmp_path / "key")}
    assert sent["env_vars"] == LIMITS | key | {"BT_RUN_ID": "one"}
    assert "working_dir" in sent


def checkout(folder: Path) -> Path:
    """The code as a user has it, with what may lie beside it and in it."""
    root = Path(inspect.getfile(submit)).parents[1]
    for name in ("bt_core", "cluster", "jobs", "serve"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.lock", ".gitignore"):
        shutil.copy(root / name, folder)
    return folder


def sent_from(root: Path, package: Path) -> set[str]:
    """What Ray itself packs of a folder."""
    create_package(str(root), package, include_gitignore=True, excludes=all_but_code(root))
    return set(ZipFile(package).namelist())


def test_all_code_goes_along(tmp_path: Path) -> None:
    root = checkout(tmp_path / "checkout")
    code = {"pyproject.toml", "requirements.lock"}
    for pattern in ("**/*.py", "**/*.j2", "jobs/recipes/**/*.yaml", "jobs/peers/*", "serve/page/*"):
        code |= {str(path.relative_to(root)) for path in root.glob(pattern) if path.is_file()}
    assert len(code) > 250
    assert sent_from(root, tmp_path / "package.zip") == code


def test_no_data_goes_along_whatever_its_folder_is_called(tmp_path: Path) -> None:
    root = checkout(tmp_path / "checkout")
    before = sent_from(root, tmp_path / "before.zip")
    for name in (
        "scans", "scans [2024]", "end ", "scans?", "*", "back\\slash", "!bt_core", "#scans", ".old",
        "bt_core [old]", "bt_core2", "jobs/scans", "bt_core/data/a.d", "serve/page/scans", "a.py",
    ):  # fmt: skip
        (root / name / "deeper").mkdir(parents=True)
        for file in ("JOHN_DOE.dcm", "JOHN_DOE.py", "patients.yaml", "deeper/scan", "deeper/a.py"):
            (root / name / file).touch()
    assert sent_from(root, tmp_path / "package.zip") == before


def test_no_file_or_link_beside_the_code_goes_along(tmp_path: Path) -> None:
    root, elsewhere = checkout(tmp_path / "checkout"), tmp_path / "elsewhere"
    before = sent_from(root, tmp_path / "before.zip")
    elsewhere.mkdir()
    (elsewhere / "JOHN_DOE.py").touch()
    for name in (
        "scans.zip",
        "patients.csv",
        "JOHN_DOE",
        "mine.py",
        "jobs/patients.csv",
        "serve/1",
    ):
        (root / name).touch()
    (root / "linked").symlink_to(elsewhere)
    (root / "jobs" / "linked").symlink_to(elsewhere)
    (root / "jobs" / "recipes" / "sweeps" / "linked.yaml").symlink_to(elsewhere)
    (root / "linked.csv").symlink_to(elsewhere / "JOHN_DOE.py")
    assert sent_from(root, tmp_path / "package.zip") == before


def test_where_a_store_is_goes_along_without_what_is_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = {"AWS_ENDPOINT_URL": "http://minio:9000", "AWS_MAX_ATTEMPTS": "20"}
    for name, value in (place | {"AWS_SECRET_ACCESS_KEY": "SECRET"}).items():
        monkeypatch.setenv(name, value)
    assert job_environment("one")["env_vars"] == place | {"BT_RUN_ID": "one"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://KEY:SECRET@minio:9000")
    with pytest.raises(UsageError, match="holds a password"):
        job_environment("one")
    with pytest.raises(UsageError, match="holds a password"):
        plain_variables()


class DeadHead:
    """A cluster whose machine is switched off while a log comes: nothing closes, nobody answers."""

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "the first line\n"
        await asyncio.sleep(60)


class Endless:
    """A cluster with a job that ends when it is stopped; Ctrl-C comes after its first line."""

    status = JobStatus.RUNNING

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "the first line\n"
        # What the signal would call, without one to all that the test process holds: asyncio.run's
        # own handler, which cancels what runs and then raises KeyboardInterrupt.
        interrupt = signal.getsignal(signal.SIGINT)
        assert callable(interrupt)
        assert interrupt is not signal.default_int_handler
        interrupt(signal.SIGINT, None)
        await asyncio.sleep(60)

    def stop_job(self, job: str) -> None:
        self.status = JobStatus.STOPPED

    def get_job_info(self, job: str) -> JobDetails:
        command = "python -m jobs.train --recipe r"
        return JobDetails(type="SUBMISSION", status=self.status, entrypoint=command)


class Deaf(Endless):
    """A cluster with a job that does not end."""

    def stop_job(self, job: str) -> None:
        pass


@pytest.fixture
def python_handles_sigint() -> Iterator[None]:
    """SIGINT as in a new process, whatever ran before: only then asyncio.run sets its own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def followed(client: object, says: bool = False, command: str = "train") -> tuple[int, list[str]]:
    """The exit code, and what was shown and asked, of following a job of a cluster."""
    seen: list[str] = []

    def answer(job: str) -> bool:
        seen.append(f"stop {job}?")
        return says

    address = f"http://127.0.0.1:{free_port()}"
    entrypoint = f"python -m jobs.{command} --recipe r"
    code = _followed(client, address, "job-1", entrypoint, Follower(seen.append, answer, again))
    return code, seen


@pytest.mark.parametrize(
    ("command", "becomes"),
    [("train", "it goes on from its last epoch"), ("prepare", "it begins anew")],
)
def test_a_head_that_is_switched_off_is_noticed(
    command: str, becomes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.submit._LOOK_SECONDS", 0.05)
    with pytest.raises(RunError, match=f"submit the same command again: {becomes}"):
        followed(DeadHead(), command=command)


@pytest.mark.parametrize(
    ("says", "status", "said"),
    [
        (True, "STOPPED", "job-1 was stopped; to have it done, submit the same command again: it "),
        (False, "RUNNING", "job-1 goes on; follow it with: bt jobs follow job-1 --cluster http://"),
    ],
)
@pytest.mark.usefixtures("python_handles_sigint")
def test_after_an_interruption_a_job_stops_if_that_is_wanted(
    says: bool, status: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Endless()
    with caplog.at_level(logging.INFO):
        assert followed(cluster, says) == (EXIT_INTERRUPTED, ["the first line\n", "stop job-1?"])
    assert cluster.status == status
    assert said in caplog.text


@pytest.mark.usefixtures("python_handles_sigint")
def test_a_job_that_does_not_stop_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.submit._STOP_SECONDS", 0.0)
    with pytest.raises(RunError, match="was asked to stop, but it is still RUNNING; bt jobs list"):
        followed(Deaf(), says=True)


def test_without_a_terminal_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert not wants_stop("job-1")


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [("y\n", True), ("Yes\n", True), ("n\n", False), ("\n", False), ("\4", False)],
)
def test_a_job_is_stopped_by_a_clear_yes_alone(
    typed: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyboard, terminal = os.openpty()
    with os.fdopen(keyboard, "w"), os.fdopen(terminal) as stdin:
        os.write(keyboard, typed.encode())
        monkeypatch.setattr(sys, "stdin", stdin)
        assert wants_stop("job-1") == wanted


def test_what_becomes_of_a_command_is_said_of_each() -> None:
    python = "/usr/bin/python -m jobs"
    assert again(f"{python}.score b s") == (
        "submit the same command again: it goes on with what is not scored yet"
    )
    assert again(f"{python}.evaluate b") == "submit the same command again: it begins anew"
    assert again("sleep 600") == "submit it again"


def test_a_cluster_that_takes_requests_and_answers_none_is_said_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.submit._ANSWER_SECONDS", 0.1)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UsageError, match=f"cluster {address}: .*timed out"):
            submitted(address)


def test_the_key_itself_stays_here_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        job_environment("one")
        assert caplog.text == ""
        monkeypatch.setenv("BT_HASH_KEY", "SECRET of the site")
        assert "SECRET" not in repr(job_environment("one"))
    assert "BT_HASH_KEY is not sent" in caplog.text
    assert "BT_HASH_KEY_FILE" in caplog.text
    assert "SECRET" not in caplog.text


@pytest.mark.parametrize("word", ["s3://KEY:SECRET@b/a.zip", "--out=https://h/o?sig=SECRET"])
def test_secrets_among_the_arguments_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match="give credentials by the environment") as caught:
        submit("http://127.0.0.1:1", "jobs.score", ["bundle", word], FOLLOWER)
    assert "SECRET" not in str(caught.value)


def test_every_parameter_that_is_a_path_is_made_absolute() -> None:
    found = set()
    for group in (app, *(g.typer_instance for g in app.registered_groups)):
        for one in group.registered_commands:
            assert one.callback is not None
            parameters = inspect.signature(one.callback, eval_str=True).parameters
            for name, parameter in parameters.items():
                for extra in getattr(parameter.annotation, "__metadata__", ()):
                    words = set(re.findall(r"[A-Z]+", str(getattr(extra, "metavar", "") or "")))
                    if words & {
                        "DIR",
                        "SOURCE",
                        "BUNDLE",
                        "MODEL",
                        "RUN",
                        "REPORT",
                        "SWEEP",
                        "CSV",
                    }:
                        found.add(name)
    assert found
    assert found <= _LOCATIONS


def test_versions_other_than_the_locks_are_named(tmp_path: Path) -> None:
    root = Path(inspect.getfile(submit)).parents[1]
    assert unlike_the_lock(root) == [], "these tests run by the lock"
    assert unlike_the_lock(tmp_path) == [], "an installed program has none"
    (tmp_path / "pyproject.toml").write_bytes((root / "pyproject.toml").read_bytes())
    lock = (root / "requirements.lock").read_text()
    pins = dict(re.findall(r"^(timm|torch)==(\S+)", lock, re.MULTILINE))
    changed = lock.replace(f"timm=={pins['timm']}", "timm==9.9").replace(
        f"\ntorch=={pins['torch']}", f"\ntorch=={pins['torch']}+cu130"
    )
    (tmp_path / "requirements.lock").write_text(changed)
    assert unlike_the_lock(tmp_path) == [f"timm {pins['timm']} instead of 9.9"]


def test_a_node_that_joins_says_if_it_has_other_versions(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cluster.pins.version", lambda name: "0.1" if name == "timm" else "")
    with caplog.at_level(logging.WARNING), pytest.raises(UsageError, match="HOST:PORT"):
        run_join("not-an-address", "127.0.0.1", cpus=1)
    assert re.search(r"figures may differ .*timm 0\.1 instead of 1\.", caplog.text)


@pytest.mark.parametrize(
    ("address", "mode"),
    [
        ("127.0.0.1:6379", "disabled"),
        ("http://localhost:8265", "disabled"),
        ("[::1]:6379", "disabled"),
        ("auto", "disabled"),
        ("10.0.0.5:6379", None),
        ("http://head:8265", None),
        ("ray://head:10001", None),
    ],
)
def test_a_cluster_elsewhere_is_not_asked_without_a_token(
    address: str, mode: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that what is set below is undone, too
        monkeypatch.delenv(name)
    if mode is None:
        with pytest.raises(UsageError, match="RAY_AUTH_MODE=disabled uses it nevertheless"):
            use_token(address)
        assert "RAY_AUTH_MODE" not in os.environ
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("secret")
        mode = "token"
    use_token(address)
    assert os.environ["RAY_AUTH_MODE"] == mode
