"""What listens for `bt serve`."""

import os
import stat

import pytest

from serve.front import haproxy


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in [n for n in os.environ if n.startswith("RAY_SERVE_") or n == "RAY_ADDRESS"]:
        monkeypatch.delenv(name)


def test_haproxy_has_files_that_nobody_else_reaches_and_ports_of_its_own():
    before = dict(os.environ)
    with haproxy("127.0.0.1") as is_on, haproxy("::1"):
        assert is_on
        assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
        ports = {os.environ[f"RAY_SERVE_HAPROXY_{n}_PORT"] for n in ("METRICS", "STATS")}
        assert len(ports) == 2
        admin = os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]
        folder = os.path.dirname(admin)
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        node_id = "0" * 56
        assert len(os.path.join(folder, node_id, os.path.basename(admin))) < 108
    assert dict(os.environ) == before
    assert not os.path.exists(folder)


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    with haproxy("localhost") as is_on:
        assert not is_on
    assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "0"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1"])
def test_no_other_hosts_clients(host):
    with haproxy(host) as is_on:
        assert not is_on
        assert "RAY_SERVE_ENABLE_HA_PROXY" not in os.environ


def test_not_on_a_cluster_that_runs(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    with haproxy() as is_on:
        assert not is_on
        assert "RAY_SERVE_ENABLE_HA_PROXY" not in os.environ
