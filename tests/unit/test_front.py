"""What listens for `bt serve`."""

import os
import stat

import pytest

from bt_core.errors import UsageError
from serve.front import haproxy


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in [n for n in os.environ if n.startswith("RAY_SERVE_") or n == "RAY_ADDRESS"]:
        monkeypatch.delenv(name)


def test_haproxy_has_files_that_nobody_else_reaches_and_ports_of_its_own():
    before = dict(os.environ)
    with haproxy():
        assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
        ports = {value for name, value in os.environ.items() if name.endswith("_PORT")}
        assert len(ports - set(before.values())) == 4
        assert not ports & {"8404", "8500", "9101", "9500"}, "others' servers may have Serve's own"
        admin = os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]
        folder = os.path.dirname(admin)
        assert os.path.dirname(os.environ["RAY_SERVE_HAPROXY_LOG_TARGET"]) == folder
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        node_id = "0" * 56
        assert len(os.path.join(folder, node_id, os.path.basename(admin))) < 108
    assert dict(os.environ) == before
    assert not os.path.exists(folder)


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", "8404")
    with haproxy():
        assert os.environ["RAY_SERVE_HAPROXY_STATS_PORT"] == "8404"
    assert os.environ["RAY_SERVE_HAPROXY_STATS_PORT"] == "8404"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "127.0.0.2", "::1"])
def test_no_other_host(host):
    with pytest.raises(UsageError, match=r"on 127\.0\.0\.1 only"), haproxy(host):
        pass
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in os.environ


def test_not_on_a_cluster_that_runs(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    with pytest.raises(UsageError, match="unset RAY_ADDRESS"), haproxy():
        pass
