"""schemathesis against the OpenAPI document: no 5xx, and every answer is one that it describes."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error, positive_data_acceptance
from starlette.testclient import TestClient

from serve.api import build_api
from serve.keys import ROLES, add_key
from serve.service import Service
from serve.settings import ServeSettings
from tests.hosted import SCANS, LocalBundle, bearer
from tests.tiny_bundle import make_bundle

# A schema cannot say which bytes are a scan, nor which bundle and jobs are there.
NOT_CHECKED = [positive_data_acceptance]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """An API with keys, and the header fields of one that may do everything."""
    root = tmp_path_factory.mktemp("serve")
    make_bundle(str(root / "bundle"), sizes=(32,))
    (root / "in").mkdir()
    places = {"scoring_sources": (str(root / "in"),), "scoring_outputs": (str(root / "out"),)}
    keys = str(root / "keys.json")
    key = add_key(keys, "everything", ROLES)
    hosted = LocalBundle(str(root / "bundle")).hosted
    service = Service(ServeSettings(bundle="unused", keys=keys, **places), hosted)
    yield build_api(service), bearer(key)
    service.close()


def test_answers_are_those_of_the_document(guarded):
    """By its strategies rather than its pytest plugin, which wants an older pytest."""
    api, headers = guarded
    document = schemathesis.openapi.from_asgi("/openapi.json", api)
    operations = [operation.ok() for operation in document.get_all_operations()]
    assert len(operations) > 10
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        def check(case):
            is_of_jobs = case.path.startswith("/v1/scoring-jobs")  # no Ray here: 503 is right
            excluded = [*NOT_CHECKED, not_a_server_error] if is_of_jobs else NOT_CHECKED
            answer = case.call_and_validate(headers=headers, excluded_checks=excluded)
            assert answer.status_code < 500 or answer.json()["code"] == "jobs_unavailable"

        check()


@pytest.fixture(scope="module")
def client(guarded):
    api, headers = guarded
    with TestClient(api, raise_server_exceptions=False, headers=headers) as client:
        yield client


PNG = {"content-type": "image/png"}
JSON = {"content-type": "application/json"}
BOUNDARY = {"content-type": "multipart/form-data; boundary=x"}
ODD = {
    "null bytes": (b"\0" * 999, {}),
    "a null byte in the type": (SCANS[0], {"content-type": b"image/png\0"}),
    "a type that is no type": (SCANS[0], {"content-type": b"\xff\xfe;;;=,"}),
    "a huge header": (SCANS[0], {"x-huge": "x" * 1_000_000}),
    "thousands of headers": (SCANS[0], {f"x-{i}": "x" for i in range(5_000)}),
    "json as a scan": (b"{}", JSON),
    "deep json": (b"[" * 500_000, JSON),
    "nan": (b'{"source": NaN, "output": Infinity}', JSON),
    "a huge number": (b'{"source": 1' + b"0" * 100_000 + b"}", JSON),
    "half a surrogate": (b'{"source": "\\ud800", "output": "\\udfff"}', JSON),
    "not utf-8": (b'{"source": "\xff"}', JSON),
    "another charset": (b"\xff\xfe{\0", {"content-type": "application/json; charset=utf-16"}),
    "multipart without end": (b"--x\r\n" * 50, BOUNDARY),
    "multipart with odd headers": (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="\0\xff"'
        b"\r\n\r\n\0\r\n--x--",
        BOUNDARY,
    ),
    "multipart with a huge header": (
        b"--x\r\nContent-Disposition: " + b"y" * 999_999 + b"\r\n\r\n\r\n--x--",
        BOUNDARY,
    ),
    "multipart of ten thousand parts": (
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * 10_000 + b"--x--",
        BOUNDARY,
    ),
    "a multipart boundary of no bytes": (
        b"----",
        {"content-type": "multipart/form-data; boundary="},
    ),
    "a boundary that is not ascii": (
        b"--\xff",
        {"content-type": b"multipart/form-data; boundary=\xff"},
    ),
    "no media type": (SCANS[0], {"content-type": ""}),
    "a key of null bytes": (b"{}", JSON | {"idempotency-key": "\0"}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_requests_are_the_clients_fault_on_every_route(client, name):
    content, headers = ODD[name]
    paths = {
        path.format(model="bt", version="1", job_id="x"): methods
        for path, methods in client.get("/openapi.json").json()["paths"].items()
    }
    assert len(paths) > 10
    for path, methods in paths.items():
        for method in methods:
            answer = client.request(method, path, content=content, headers=headers)
            # 503: there is no Ray here that takes jobs.
            assert answer.status_code < 500 or answer.json()["code"] == "jobs_unavailable", path
            if answer.status_code >= 400:
                assert answer.headers["content-type"] == "application/problem+json", path
                assert answer.json()["status"] == answer.status_code


def test_odd_paths_and_methods_are_problem_documents(client):
    for method, path in (
        ("GET", "/none"), ("GET", "/v1/scoring-jobs/%00"), ("GET", "/v1/scoring-jobs/" + "x" * 999),
        ("GET", "/v2/models/%00"), ("GET", "/v2/models/" + "%2e%2e%2f" * 9), ("PUT", "/v1/model"),
        ("TRACE", "/v1/predictions"), ("HUH", "/healthz"), ("GET", "/v1/model/%ff%fe"),
    ):  # fmt: skip
        answer = client.request(method, path)
        assert 400 <= answer.status_code < 500, (method, path)
        assert answer.headers["content-type"] == "application/problem+json", (method, path)
