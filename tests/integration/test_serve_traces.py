"""`bt serve --traces`: a request's spans reach a collector, in the trace of the caller."""

import os
import signal
import subprocess
import sys
import time

import pytest
import requests

from bt_core.scans.phantom import encode_picture, phantom_slice
from cluster.local import free_port
from serve.tracing import SERVE_CONFIG
from tests.collector import collector
from tests.integration.test_cluster import is_ready
from tests.tiny_bundle import make_bundle

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
REFUSED = "1af7651916cd43dd8448eb211c80319c"
# Ray's proxy, which names spans by the path that was asked for, is traced by these alone.
PROXY = {
    "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": SERVE_CONFIG["exporter_import_path"],
    "RAY_SERVE_TRACING_SAMPLING_RATIO": "1",
}
STAGES = ("POST /v1/predictions", "decode", "preprocess", "ensemble", "member m0", "member m1")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A server that sends its spans to a collector."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    make_bundle(tmp_path / "bundle", sizes=(32, 48))
    port = free_port()
    with collector() as found:
        words = ["serve", tmp_path / "bundle", "--port", port, "--traces", found.url]
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.serve", *map(str, words[1:])],
            env={**os.environ, "BT_RUN_ID": "traced", **PROXY},
            stdout=subprocess.DEVNULL,
        )
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 900
        while not is_ready(url):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(1)
        yield url, found
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0


def in_trace(found, trace):
    return [span for span in found.spans if span.trace_id.hex() == trace]


def check_that_names_in_paths_stay_here(url, found):
    headers = {"traceparent": f"00-{REFUSED}-{PARENT}-01", "tracestate": "of=JOHN_DOE"}
    paths = ("/v1/JOHN_DOE_1947.dcm", "/JOHN_DOE/1947", "/static/JOHN_DOE.js")
    for path in paths:
        assert requests.get(f"{url}{path}", headers=headers, timeout=60).status_code == 404
    deadline = time.monotonic() + 60
    while True:
        names = [span.name for span in in_trace(found, REFUSED)]
        if names.count("proxy_http_request") == len(paths):
            break
        assert time.monotonic() < deadline, names
        time.sleep(0.5)
    assert "GET /static/{name}" in names
    assert b"DOE" not in found.received


def test_each_stage_of_a_request_is_a_span_below_the_callers(served):
    url, found = served
    scan = encode_picture(phantom_slice("glioma", 1, 96), ".png")
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-ID": "JOHN_DOE 1947"}
    named = [("files", ("JOHN_DOE.png", scan))]
    route = f"{url}/v1/predictions?pictures=false&of=JOHN_DOE"
    answer = requests.post(route, files=named, headers=headers, timeout=60)
    assert answer.status_code == 200
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        names = {span.name for span in in_trace(found, TRACE)}
        if all(any(name.startswith(stage) for name in names) for stage in STAGES):
            break
        time.sleep(0.5)
    spans = {span.span_id: span for span in in_trace(found, TRACE)}
    for stage in STAGES:
        known = [one for one in spans.values() if one.name.startswith(stage)]
        assert len(known) == 1, f"{stage}: {[(s.name, s.trace_id.hex()) for s in found.spans]}"
        (span,), above = known, []
        while span.span_id in spans and span.parent_span_id in spans:
            span = spans[span.parent_span_id]
            above.append(span.name)
        assert span.parent_span_id.hex() == PARENT, f"{stage} is below {above}"
        assert not stage.startswith("member") or "ensemble" in above
    assert {r["bt.run_id"] for r in found.resources} == {"traced"}
    assert {r["service.name"] for r in found.resources} == {"bt"}
    assert b"DOE" not in found.received
    check_that_names_in_paths_stay_here(url, found)
