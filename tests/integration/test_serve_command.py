"""`bt serve --haproxy` by its command, as a user gives it in two terminals."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import requests

from bt_core.models.bundle import Bundle
from cluster.local import free_port
from tests.conftest import bt_process
from tests.tiny_bundle import make_bundle

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
START_SECONDS = 120


class Command:
    """A `bt serve` in a process of its own."""

    def __init__(self, bundle, log):
        self.log = log
        self.port = free_port()
        words = [sys.executable, "-m", "jobs.serve", bundle, "--haproxy", "--port", self.port]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                list(map(str, words)), stdout=out, stderr=out, start_new_session=True
            )

    def wait(self):
        end = time.monotonic() + START_SECONDS
        while "Ctrl-C stops it" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.2)

    def bundle_id(self):
        return requests.get(f"http://127.0.0.1:{self.port}/v1/model", timeout=30).json()[
            "bundle_id"
        ]

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(120)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Two tiny bundles, and what starts a server of one of them."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    started = []

    def start(name, size):
        make_bundle(str(tmp_path / name), sizes=(size,))
        started.append(Command(tmp_path / name, tmp_path / f"{name}.log"))
        return started[-1]

    yield start
    for command in started:
        command.stop()


def haproxies(port):
    words = (" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))
    configs = [found[1] for word in words if (found := re.search(r"haproxy -db -f (\S+)", word))]
    texts = (Path(config).read_text() for config in configs if os.path.exists(config))
    return [text for text in texts if f":{port}\n" in text]


def test_the_printed_line_swaps_and_ctrl_c_leaves_nothing(commands, tmp_path):
    command = commands("one", 32)
    make_bundle(str(tmp_path / "other"), sizes=(40,))
    command.wait()
    ids = [Bundle(str(tmp_path / name)).info.bundle_id for name in ("one", "other")]
    assert command.bundle_id() == ids[0]
    assert haproxies(command.port)
    address = re.search(r"RAY_ADDRESS=(\S+) bt serve BUNDLE --swap", command.log.read_text())
    swapped = bt_process(
        "serve", tmp_path / "other", "--swap", env={**os.environ, "RAY_ADDRESS": address[1]}
    )
    assert swapped.returncode == 0, swapped.stderr
    assert command.bundle_id() == ids[1]
    assert command.stop() == 0
    assert not haproxies(command.port)


@pytest.mark.slow
def test_no_server_answers_for_another(commands, tmp_path):
    """Not even while its gateway is gone, when HAProxy turns to Serve's own proxy."""
    first, second = commands("one", 32), commands("other", 40)
    first.wait()
    second.wait()
    ids = [Bundle(str(tmp_path / name)).info.bundle_id for name in ("one", "other")]
    assert [first.bundle_id(), second.bundle_id()] == ids
    (gateway,) = (
        process
        for process in psutil.Process(first.process.pid).children(recursive=True)
        if "ServeReplica:bt:Gateway" in " ".join(process.cmdline())
    )
    gateway.kill()
    end, seen = time.monotonic() + 20, set()
    while time.monotonic() < end:
        try:
            answer = requests.get(f"http://127.0.0.1:{first.port}/v1/model", timeout=30)
        except requests.ConnectionError:
            continue
        if answer.ok:
            seen.add(answer.json()["bundle_id"])
    assert seen == {ids[0]}
