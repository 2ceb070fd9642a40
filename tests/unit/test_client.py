"""The Python client against the real API under uvicorn, on connections that really break."""

import ast
import io
import socket
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn
from fastapi.responses import PlainTextResponse
from PIL import Image

from serve import client as client_module
from serve.api import build_api
from serve.client import (
    Client,
    ClientError,
    OverloadedError,
    RequestError,
    ScanRefusedError,
    ServerError,
    UnreachableError,
)
from serve.problems import problem
from serve.service import Service
from serve.settings import ServeSettings
from tests.hosted import SCANS, LocalBundle
from tests.tiny_bundle import make_bundle
from tests.unit.test_http_api import BAD


class Faulty:
    """ASGI middleware that does something else than the app for the first requests."""

    def __init__(self, app):
        self.app = app
        self.faults = []
        self.seen = []

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.seen.append(scope)
        fault = self.faults.pop(0) if self.faults else self.app
        await fault(scope, receive, send)


def busy(status=503, wait="0"):
    response = problem(status, "overloaded", "too many scans")
    response.headers["retry-after"] = wait
    return response


async def broken(scope, receive, send):
    """Promise more than is sent, then hang up."""
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"99")]}
    )
    await send({"type": "http.response.body", "body": b"{", "more_body": True})
    raise ConnectionResetError


@contextmanager
def listening(app):
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    location = str(tmp_path_factory.mktemp("serve") / "bundle")
    make_bundle(location, sizes=(32,))
    settings = ServeSettings(bundle="unused", max_files=4, max_body_mib=1)
    service = Service(settings, LocalBundle(location).hosted)
    yield Faulty(build_api(service))
    service.close()


@pytest.fixture(scope="module")
def url(app):
    with listening(app) as url:
        yield url


@pytest.fixture
def client(app, url):
    app.faults.clear()
    app.seen.clear()
    with Client(url, max_files=3, tries=3) as client:
        yield client


@pytest.fixture
def waits(monkeypatch):
    """Note how long the client would wait instead of waiting."""
    seconds = []
    clock = SimpleNamespace(sleep=seconds.append, time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr(client_module, "time", clock)
    return seconds


def test_a_scan_from_bytes_or_a_file_gets_its_answer(client, app, tmp_path):
    answer = client.predict(SCANS[0])
    assert answer.status in ("scored", "deferred")
    assert sum(answer.probabilities.values()) == pytest.approx(1)
    path = tmp_path / "Smith.John.PNG"
    path.write_bytes(SCANS[0])
    assert client.predict(path) == client.predict(str(path)) == answer
    assert client.model()["bundle_id"] == answer.bundle_id


def test_a_scan_is_explained_in_figures_or_as_a_picture(client):
    found = client.explain(SCANS[0])
    assert found["predicted_label"] == client.predict(SCANS[0]).predicted_label
    assert found["heat_members"] == ["m0"]
    with Image.open(io.BytesIO(client.explain_png(SCANS[0]))) as overlay:
        assert overlay.format == "PNG"
    for explain in (client.explain, client.explain_png):
        with pytest.raises(ScanRefusedError):
            explain(BAD)


def test_names_of_files_stay_here(client, app, tmp_path):
    bodies = []

    async def recorded(scope, receive, send):
        async def heard():
            message = await receive()
            bodies.append(message.get("body", b""))
            return message

        await app.app(scope, heard, send)

    names = {
        "Smith.John.dcm": b'"scan.dcm"',
        "Smith": b'"scan"',
        "J.Smith.nii.gz": b'"scan.nii.gz"',
    }
    for name, sent in names.items():
        (tmp_path / name).write_bytes(BAD)
        app.faults.append(recorded)
        with pytest.raises(ScanRefusedError):
            client.predict(tmp_path / name)
        assert sent in b"".join(bodies)
    assert b"Smith" not in b"".join(bodies)


def test_many_scans_go_in_chunks_and_a_bad_one_costs_no_other_its_answer(client, app):
    scans = [*SCANS, BAD, *SCANS, BAD]
    answers = list(client.predict_many(iter(scans)))
    assert len(app.seen) == 3
    assert [answer.status for answer in answers if not answer.predicted_label] == ["rejected"] * 2
    for scan, answer in zip(scans, answers, strict=True):
        if scan == BAD:
            assert answer.reason == "unsupported_type"
            assert answer.detail
        else:
            assert answer == client.predict(scan)
    (alone,) = client.predict_many([BAD])
    assert alone == answers[3]
    assert list(client.predict_many([])) == []


def test_one_that_is_too_large_costs_no_other_its_answer(client):
    first, large, last = client.predict_many([SCANS[0], b"\0" * 2 * 1024**2, SCANS[1]])
    assert (large.status, large.reason) == ("rejected", "body_too_large")
    assert "1 MiB" in large.detail
    assert [first, last] == list(client.predict_many(SCANS[:2]))


def test_a_refused_scan_raises_with_its_reason_and_is_sent_once(client, app):
    with pytest.raises(ScanRefusedError) as caught:
        client.predict(BAD)
    assert caught.value.code == "unsupported_type"
    assert isinstance(caught.value, RequestError)
    assert len(app.seen) == 1


def test_a_server_that_is_busy_twice_is_asked_again_when_it_says(client, app, waits):
    app.faults = [busy(503, "7"), busy(429, "3")]
    assert client.predict(SCANS[0]).probabilities
    assert len(app.seen) == 3
    assert 7 <= waits[0] <= 7.5
    assert 3 <= waits[1] <= 4


def test_what_a_proxy_says_of_a_server_that_is_away_is_no_answer(client, app, waits):
    """HAProxy says 500 in plain text, and others 502 or 504; a server's own 500 is a problem."""
    app.faults = [PlainTextResponse("Internal Server Error", 500), PlainTextResponse("", 502)]
    assert client.predict(SCANS[0]).probabilities
    assert len(waits) == 2
    app.faults = [problem(500, "internal_error", "the request failed inside the server")]
    with pytest.raises(ServerError):
        client.predict(SCANS[0])
    assert len(waits) == 2


def test_retry_after_may_be_a_time_of_day(client, app, waits):
    then = datetime.now(UTC) + timedelta(seconds=30)
    app.faults = [busy(503, format_datetime(then, usegmt=True)), busy(503, "soon")]
    client.predict(SCANS[0])
    assert 20 < waits[0] < 31
    assert 0 <= waits[1] <= 1


def test_waits_grow_and_differ(client, app, url, waits):
    with Client(url, tries=8) as patient:
        for _ in range(4):
            app.faults = [busy()] * 7
            patient.predict(SCANS[0])
    rounds = [waits[i : i + 7] for i in range(0, 28, 7)]
    assert len({round_[0] for round_ in rounds}) > 1, "without jitter all come back together"
    assert max(round_[-1] for round_ in rounds) > 1
    assert all(wait <= 0.25 * 2 ** (i + 1) for round_ in rounds for i, wait in enumerate(round_))


def test_a_server_that_stays_busy_is_given_up(client, app, waits):
    app.faults = [busy()] * 3
    with pytest.raises(OverloadedError) as caught:
        client.predict(SCANS[0])
    assert (caught.value.code, caught.value.detail) == ("overloaded", "too many scans")
    assert len(app.seen) == 3
    app.faults = [busy(503, "86400")]
    with pytest.raises(OverloadedError):
        client.predict(SCANS[0])
    assert len(app.seen) == 4, "nobody waits for a day"


def test_a_connection_that_breaks_is_made_again(client, app, waits):
    app.faults = [broken, broken]
    assert client.predict(SCANS[0]).probabilities
    assert len(app.seen) == 3
    app.faults = [broken] * 3
    with pytest.raises(UnreachableError):
        client.predict(SCANS[0])


def test_a_server_that_is_not_there_is_said_so(waits):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}", tries=2) as client, pytest.raises(UnreachableError):
        client.model()
    assert len(waits) == 1


def test_other_errors_of_the_client_are_sent_once(client, app, waits):
    with pytest.raises(RequestError) as caught:
        client.scoring_job("bt-scoring-" + "0" * 32)
    assert caught.value.code == "not_allowed"
    assert len(app.seen) == 1
    app.faults = [PlainTextResponse("Request timed out", 408)]
    with pytest.raises(RequestError) as caught:
        client.predict(SCANS[0])
    assert (caught.value.code, caught.value.detail) == ("http_408", "Request timed out")
    app.faults = [PlainTextResponse("hello"), PlainTextResponse('{"results": [{}]}')]
    for _ in range(2):
        with pytest.raises(ServerError):
            client.predict(SCANS[0])
    assert waits == []


def test_the_key_is_sent(app, url):
    with Client(url, api_key="secret") as client:
        client.model()
    assert (b"authorization", b"Bearer secret") in app.seen[-1]["headers"]


def test_the_file_works_alone():
    imports = set()
    for node in ast.walk(ast.parse(Path(client_module.__file__).read_text())):
        if isinstance(node, ast.Import):
            imports |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imports.add(node.module.split(".")[0])
    assert imports - sys.stdlib_module_names == {"httpx"}


def test_every_error_is_of_one_tree():
    errors = [
        e for e in vars(client_module).values() if isinstance(e, type) and issubclass(e, Exception)
    ]
    assert len(errors) == 7
    assert all(issubclass(error, ClientError) for error in errors)
    assert all(error.__name__ in client_module.__doc__ for error in errors)
