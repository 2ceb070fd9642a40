"""Who is let in, what stands around every answer, and where it ends."""

import asyncio
import base64
import hashlib
import re

import pytest
from markupsafe import escape
from starlette.responses import HTMLResponse
from starlette.testclient import TestClient

from bt_core.errors import ConfigError, UsageError
from serve.access import check_exposure, require
from serve.app import gateway
from serve.guards import BodyBounds
from serve.keys import add_key, new_key, revoke_key
from serve.settings import ServeSettings
from tests.hosted import SCANS, LocalBundle, bearer, client_of, files
from tests.tiny_bundle import make_bundle


@pytest.fixture(scope="module")
def hosted(tmp_path_factory):
    location = str(tmp_path_factory.mktemp("serve") / "bundle")
    make_bundle(location, sizes=(32,))
    return LocalBundle(location).hosted


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    file = str(tmp_path_factory.mktemp("keys") / "keys.json")
    roles = {"a": ["predict"], "b": ["explain", "jobs"], "root": ["admin"]}
    return file, {name: add_key(file, name, given) for name, given in roles.items()}


def added(api):
    """Routes that the project has not, to see what becomes of them."""

    @api.get("/v1/forgotten")
    async def forgotten():
        return {}

    @api.post("/v1/broken", dependencies=[require("admin")])
    async def broken():
        raise ValueError("/secret/path of Doe^John")

    @api.get("/v1/page", dependencies=[require()])
    async def page():
        return HTMLResponse("", headers={"Content-Security-Policy": "default-src 'self'"})


@pytest.fixture(scope="module")
def guarded(hosted, keys):
    with client_of(hosted, added, keys=keys[0]) as client:
        yield client


def is_problem(answer, status, code):
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return True


def test_a_key_with_the_role_is_let_in_by_either_header(guarded, keys):
    for headers in (bearer(keys[1]["a"]), {"X-API-Key": keys[1]["a"]}):
        answer = guarded.post("/v1/predictions", content=SCANS[0], headers=headers)
        assert answer.status_code == 200, answer.text
        assert guarded.get("/v1/model", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/predictions", "/v1/forgotten", "/v1/nothing", "/x", "/docs/"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
def test_strangers_get_nowhere(guarded, method, path):
    answer = guarded.request(method, f"http://testserver{path}")
    assert is_problem(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"] == 'Bearer realm="bt"'


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer x"},
        {"Authorization": "Basic YTpi"},
        {"Authorization": ""},
        {"X-API-Key": "x" * 60_000},
        {"X-API-Key": "é".encode("latin-1")},
        bearer(new_key()),
    ],
)
def test_what_is_no_key_of_ours_is_refused(guarded, headers):
    answer = guarded.get("/v1/model", headers=headers)
    assert is_problem(answer, 401, "unauthorized")
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]


def test_a_role_is_needed_and_none_includes_another(guarded, keys):
    for name in ("b", "root"):
        answer = guarded.post("/v1/predictions", content=SCANS[0], headers=bearer(keys[1][name]))
        assert is_problem(answer, 403, "forbidden")
        assert guarded.get("/v1/model", headers=bearer(keys[1][name])).status_code == 200


def test_open_paths_are_open_for_reading_only(guarded):
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert guarded.get(path).status_code == 200
        assert guarded.post(path).status_code == 401


def test_a_strangers_body_is_not_read(hosted, keys):
    with client_of(hosted, keys=keys[0]) as client:
        api = client.app
    scope = {
        "type": "http", "method": "POST", "path": "/v1/predictions", "raw_path": b"/v1/predictions",
        "query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http",
        "root_path": "", "client": ("10.0.0.1", 1), "server": ("x", 80),
    }  # fmt: skip
    sent = []

    async def receive():
        raise AssertionError("the body was asked for")

    async def send(message):
        sent.append(message)

    asyncio.run(api(scope, receive, send))
    assert sent[0]["status"] == 401


def test_revoking_and_adding_need_no_restart(hosted, tmp_path):
    file = str(tmp_path / "keys.json")
    key = add_key(file, "a", ["predict"])
    with client_of(hosted, keys=file) as client:
        assert client.get("/v1/model", headers=bearer(key)).status_code == 200
        revoke_key(file, "a")
        assert is_problem(client.get("/v1/model", headers=bearer(key)), 401, "unauthorized")
        other = add_key(file, "b", ["predict"])
        assert client.get("/v1/model", headers=bearer(other)).status_code == 200


def test_every_answer_has_the_headers(guarded, keys):
    answers = [
        guarded.get("/healthz"),
        guarded.get("/v1/model"),
        guarded.get("/v1/nothing", headers=bearer(keys[1]["a"])),
        guarded.post("/v1/broken", headers=bearer(keys[1]["root"])),
        guarded.post("/v1/predictions", content=b"x", headers=bearer(keys[1]["a"])),
        guarded.post("/v1/predictions", content=b"", headers={"content-length": str(2**40)}),
    ]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-request-id"]
        assert "server" not in answer.headers
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)
    page = guarded.get("/v1/page", headers=bearer(keys[1]["a"]))
    assert page.headers["content-security-policy"] == "default-src 'self'"


def test_an_error_says_nothing_of_its_inside(guarded, keys, lines):
    answer = guarded.post("/v1/broken", headers=bearer(keys[1]["root"]))
    assert is_problem(answer, 500, "internal_error")
    assert "secret" not in answer.text + lines.text
    assert "request failed: ValueError" in lines.text


def test_no_page_of_another_origin_is_let_in(guarded, hosted, keys):
    asks = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for headers in (asks, {**asks, **bearer(keys[1]["a"])}):
        answer = guarded.options("/v1/predictions", headers=headers)
        assert answer.status_code in (401, 405)
        assert not [name for name in answer.headers if name.startswith("access-control")]
    local = {"allowed_hosts": ("127.0.0.1", "localhost", "::1")}
    with client_of(hosted, **local) as client:
        client.base_url = "http://localhost:8000"
        assert client.get("/v1/model").status_code == 200
        assert client.get("/v1/model", headers={"Origin": "http://localhost:8000"}).is_success
        assert client.get("/v1/model", headers={"Host": "[::1]:8000"}).is_success
        for foreign in (
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://localhost:9000"},
            {"Host": "evil.example:8000"},
            {"Host": ""},
            {"Host": "[::1"},
        ):
            answer = client.post("/v1/predictions", content=SCANS[0], headers=foreign)
            assert is_problem(answer, 403, "forbidden"), foreign


def test_the_description_is_read_without_a_script(guarded):
    page = guarded.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    style = re.search("<style>(.*?)</style>", page.text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in page.headers["content-security-policy"]
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in page.text
    assert "`" not in page.text, "code is marked as such"
    assert " style=" not in page.text
    assert not re.search('(src|href)="(?![#/])', page.text), "it loads and leads nowhere else"
    document = guarded.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        assert path in page.text
        for operation in operations.values():
            assert escape(operation["summary"]) in page.text
            for parameter in operation.get("parameters", []):
                assert parameter.get("description"), f"{path}: {parameter['name']} says nothing"
    for name in document["components"]["schemas"]:
        assert f'id="{name}"' in page.text
    assert set(re.findall('href="#([^"]*)"', page.text)) <= set(
        re.findall('id="([^"]*)"', page.text)
    )


def test_openapi_names_the_schemes_and_the_answers(guarded):
    document = guarded.get("/openapi.json").json()
    schemes = document["components"]["securitySchemes"]
    assert {scheme["type"] for scheme in schemes.values()} == {"http", "apiKey"}
    operation = document["paths"]["/v1/predictions"]["post"]
    assert sorted(next(iter(one)) for one in operation["security"]) == sorted(schemes)
    assert {"401", "403", "408", "429"} <= operation["responses"].keys()
    assert "security" not in document["paths"]["/healthz"]["get"]


def test_nobody_starts_an_open_server_by_accident(tmp_path):
    for host in ("0.0.0.0", "::", "192.168.1.2", "clinic.example"):
        with pytest.raises(UsageError, match="--keys FILE"):
            check_exposure(host, ServeSettings(bundle="b", audit_dir="d"))
        with pytest.raises(UsageError, match="give --audit DIR, or stay on 127"):
            check_exposure(host, ServeSettings(bundle="b", keys="k"))
        check_exposure(host, ServeSettings(bundle="b", keys="k", audit_dir="d"))
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        check_exposure(host, ServeSettings(bundle="b"))
    with pytest.raises(ConfigError, match="allow_anonymous: true"):
        gateway({"bundle": "b"})
    with pytest.raises(ConfigError, match="allow_unaudited: true"):
        gateway({"bundle": "b", "keys": "k"})


def test_a_budget_is_counted_in_scans_and_for_each_key(hosted, keys, tmp_path):
    file = str(tmp_path / "keys.json")
    one, other = (bearer(add_key(file, name, ["predict"])) for name in ("a", "b"))
    with client_of(hosted, keys=file, max_scans_per_minute=4, max_files=4) as client:
        first = client.post("/v1/predictions", files=files(*SCANS), headers=one)
        assert first.status_code == 200
        assert first.headers["ratelimit-policy"] == '"scans";q=4;w=60'
        assert first.headers["ratelimit"].startswith('"scans";r=1;t=')
        answer = client.post("/v1/predictions", files=files(*SCANS[:2]), headers=one)
        assert is_problem(answer, 429, "too_many_requests")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert client.post("/v1/predictions", content=SCANS[0], headers=one).status_code == 200
        answer = client.post("/v1/predictions", content=SCANS[0], headers=one)
        assert is_problem(answer, 429, "too_many_requests")
        assert client.post("/v1/predictions", content=SCANS[0], headers=other).status_code == 200


def test_without_keys_a_budget_is_an_addresss(hosted):
    with client_of(hosted, max_scans_per_minute=1, max_files=1) as client:
        assert client.post("/v1/predictions", content=SCANS[0]).status_code == 200
        assert client.post("/v1/predictions", content=SCANS[0]).status_code == 429
        spoofed = {"X-Forwarded-For": "10.1.1.1", "Forwarded": "for=10.1.1.1"}
        assert client.post("/v1/predictions", content=SCANS[0], headers=spoofed).status_code == 429
        elsewhere = TestClient(client.app, client=("10.0.0.2", 1))
        assert elsewhere.post("/v1/predictions", content=SCANS[0]).status_code == 200


def test_settings_that_would_let_nothing_in_are_refused():
    with pytest.raises(ValueError, match="below max_files"):
        ServeSettings(bundle="b", max_scans_per_minute=3)
    with pytest.raises(ValueError, match="below max_body_mib"):
        ServeSettings(bundle="b", max_held_mib=8)


def test_a_body_that_stalls_is_cut_off(hosted):
    stalled = asyncio.Event()

    async def ask(client):
        parts = iter([{"type": "http.request", "body": b"x", "more_body": True}])
        sent = []

        async def receive():
            for part in parts:
                return part
            await stalled.wait()

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/v1/predictions", "query_string": b"",
            "raw_path": b"/v1/predictions", "headers": [], "http_version": "1.1", "root_path": "",
            "scheme": "http", "client": ("10.0.0.1", 1), "server": ("x", 80),
        }  # fmt: skip
        await client.app(scope, receive, send)
        return sent

    with client_of(hosted, max_read_seconds=0.2) as client:
        start, body = asyncio.run(ask(client))
    assert start["status"] == 408
    assert b'"request_timeout"' in body["body"]
    assert (b"connection", b"close") in start["headers"]


def test_bodies_of_all_requests_are_bounded_together():
    release, refused = asyncio.Event(), []

    async def app(scope, receive, send):
        try:
            while (await receive()).get("more_body"):
                pass
            await release.wait()
        except Exception as error:
            refused.append(error.status_code)

    bounds = BodyBounds(app, max_read_seconds=60, max_held_bytes=10)

    def request(num_bytes):
        messages = [{"type": "http.request", "body": bytes(num_bytes), "more_body": False}]

        async def receive():
            return messages.pop()

        return asyncio.ensure_future(bounds({"type": "http"}, receive, None))

    async def ask():
        first = [request(5), request(5)]
        await asyncio.sleep(0)
        await request(1)
        assert refused == [503]
        release.set()
        await asyncio.gather(*first)
        await request(10)
        assert refused == [503], "what was answered is held no more"

    asyncio.run(ask())


@pytest.mark.parametrize("num_parts", [9, 10_000])
def test_many_fields_are_refused(guarded, keys, num_parts):
    part = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nv\r\n'
    headers = {**bearer(keys[1]["a"]), "content-type": "multipart/form-data; boundary=x"}
    answer = guarded.post("/v1/predictions", content=part * num_parts + b"--x--", headers=headers)
    assert is_problem(answer, 400, "bad_request")


def test_a_long_text_field_is_refused(guarded, keys):
    answer = guarded.post(
        "/v1/predictions",
        data={"note": "x" * 2_000_000},
        files=files(SCANS[0]),
        headers=bearer(keys[1]["a"]),
    )
    assert is_problem(answer, 400, "bad_request")
