"""The HTTP API over an ensemble in this process: the routes as behind Ray Serve, without it."""

import asyncio

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from serve.api import build_api
from serve.hosted import OverloadedError
from serve.service import Service
from serve.settings import ServeSettings
from tests.hosted import SCANS, LocalBundle, files, tiny_hosted
from tests.scan_files import deadly_dicom
from tests.tiny_bundle import make_bundle

BAD = b"no scan at all"


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    return tiny_hosted(tmp_path_factory, 32)


@pytest.fixture(scope="module")
def service(ensemble):
    settings = ServeSettings(bundle="unused", max_files=4, max_in_flight=6, max_body_mib=1)
    service = Service(settings, ensemble.hosted)
    yield service
    service.close()


@pytest.fixture(scope="module")
def client(service):
    with TestClient(build_api(service), raise_server_exceptions=False) as client:
        yield client


def test_one_scan_as_body_or_file_gets_the_same_answer(client):
    bare = client.post("/v1/predictions", content=SCANS[0])
    assert bare.status_code == 200, bare.text
    assert client.post("/v1/predictions", files=files(SCANS[0])).json() == bare.json()
    (answer,) = bare.json()["results"]
    assert answer["status"] in ("scored", "deferred")
    assert sum(answer["probabilities"].values()) == pytest.approx(1)


def test_one_bad_file_among_several_costs_no_other_its_answer(client):
    answer = client.post("/v1/predictions", files=files(SCANS[0], BAD, SCANS[1], deadly_dicom()))
    assert answer.status_code == 200
    good, bad, other, deadly = answer.json()["results"]
    (alone,) = client.post("/v1/predictions", content=SCANS[1]).json()["results"]
    assert other == alone
    assert good["predicted_label"]
    assert (bad["status"], bad["reason"]) == ("rejected", "unsupported_type")
    assert (deadly["status"], deadly["reason"]) == ("failed", "decoder_crashed")
    assert "predicted_label" not in bad


def test_a_bad_file_alone_is_a_problem_document(client):
    answer = client.post("/v1/predictions", files=files(BAD))
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_type")
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [
        ({"files": files(*SCANS, *SCANS)}, 400, "bad_request"),
        ({"data": {"files": "text"}, "files": [("other", SCANS[0])]}, 400, "bad_request"),
        ({"files": [("other", SCANS[0])]}, 400, "bad_request"),
        ({"content": bytes(2 * 1024**2)}, 413, "body_too_large"),
        (
            {"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data"}},
            400,
            "bad_request",
        ),
    ],
)
def test_requests_that_do_not_fit_are_problem_documents(client, options, status, code):
    answer = client.post("/v1/predictions", **options)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text


def test_more_than_it_can_work_on_is_turned_away_at_once(ensemble, service):
    async def both():
        first = asyncio.ensure_future(service.answer_all([(content, "") for content in SCANS * 2]))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await service.answer_all([(SCANS[0], "")])
        return await first

    ensemble.seconds = 0.3
    try:
        assert len(asyncio.run(both())) == 6
        assert len(asyncio.run(service.answer_all([(SCANS[0], "")]))) == 1, "there is room again"
    finally:
        ensemble.seconds = 0.0


def test_a_request_of_many_scans_gets_in_where_one_of_one_would(ensemble, service):
    async def both():
        first = asyncio.ensure_future(service.answer_all([(SCANS[0], "")] * 5))
        await asyncio.sleep(0)
        second = await service.answer_all([(SCANS[1], "")] * 4)
        return len(await first), len(second)

    ensemble.seconds = 0.1
    try:
        assert asyncio.run(both()) == (5, 4)
    finally:
        ensemble.seconds = 0.0


@pytest.mark.parametrize("path", ["/v1/predictions", "/v1/explanations", "/v2/models/bt/infer"])
def test_where_there_is_no_room_a_body_is_not_even_read(ensemble, service, path):
    read = []

    async def body():
        read.append(1)
        yield SCANS[0]

    async def both():
        first = asyncio.ensure_future(service.answer_all([(content, "") for content in SCANS * 2]))
        await asyncio.sleep(0)
        transport = httpx.ASGITransport(build_api(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            answer = await client.post(path, content=body())
        await first
        return answer

    ensemble.seconds = 0.3
    try:
        answer = asyncio.run(both())
    finally:
        ensemble.seconds = 0.0
    assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
    assert int(answer.headers["retry-after"]) >= 1
    assert not read


def test_an_ensemble_out_of_reach_is_said_so(ensemble, client):
    assert client.get("/readyz").json()["status"] == "ready"
    ensemble.is_there = False
    try:
        answer = client.post("/v1/predictions", content=SCANS[0])
        assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200
    finally:
        ensemble.is_there = True


def test_every_answer_of_a_batch_is_its_own(client):
    rng = np.random.default_rng(0)
    order = rng.permutation(3).tolist()
    together = client.post("/v1/predictions", files=files(*(SCANS[i] for i in order))).json()
    for i, result in zip(order, together["results"], strict=True):
        assert result == client.post("/v1/predictions", content=SCANS[i]).json()["results"][0]


def test_a_shadow_answers_for_nobody_and_its_disagreement_is_logged(
    ensemble, service, tmp_path, lines
):
    make_bundle(tmp_path / "other", sizes=(48,), sure=True)
    other = LocalBundle(str(tmp_path / "other"))
    before = asyncio.run(service.answer_all([(SCANS[0], "")]))
    service.host(ensemble.hosted, other.hosted, 1.0)

    async def answered():
        results = await service.answer_all([(SCANS[0], "")])
        await asyncio.gather(*service._comparing)
        return results

    try:
        assert asyncio.run(answered()) == before
        told = f"shadow {other.hosted.info.bundle_id} "
        assert told in lines.text
        other.is_there = False
        assert asyncio.run(answered()) == before
        assert lines.text.count(told) == 1
    finally:
        service.host(ensemble.hosted, None, 0.0)


EXPORTED = """# HELP ray_bt_scans_total Answered or refused.
# TYPE ray_bt_scans_total counter
ray_bt_scans_total{node="%s"} 3.0
# HELP ray_node_mem_used Memory
# TYPE ray_node_mem_used gauge
ray_node_mem_used 1.0
# HELP ray_bt_stage_seconds Of one scan.
# TYPE ray_bt_stage_seconds histogram
ray_bt_stage_seconds_bucket{le="0.1",node="%s"} 2.0
ray_bt_stage_seconds_count{node="%s"} 2.0
"""


def test_metrics_of_several_nodes_are_one_text_with_each_head_once():
    from serve.metrics import gathered

    text = gathered([EXPORTED.replace("%s", name) for name in ("a", "b")])
    assert text.count("# TYPE") == 2
    assert "node_mem" not in text
    lines = text.splitlines()
    assert lines[:4] == [
        "# HELP ray_bt_scans_total Answered or refused.",
        "# TYPE ray_bt_scans_total counter",
        'ray_bt_scans_total{node="a"} 3.0',
        'ray_bt_scans_total{node="b"} 3.0',
    ]
    assert lines[5] == "# TYPE ray_bt_stage_seconds histogram"
    assert len(lines) == 10
