"""The Open Inference Protocol, as its clients send it."""

import base64
import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.open_inference_messages import InferRequest, read_request, read_scans, write_response
from tests.hosted import SCANS, client_of, tiny_hosted
from tests.tiny_bundle import SPACE
from tests.unit.test_http_api import BAD

CLASSES = len(SPACE.names)


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    return tiny_hosted(tmp_path_factory, 32)


@pytest.fixture(scope="module")
def client(ensemble):
    with client_of(ensemble.hosted, max_files=4) as client:
        yield client


def request_of(*scans, **changes):
    data = [base64.b64encode(scan).decode() for scan in scans]
    tensor = {"name": "scan", "shape": [len(scans)], "datatype": "BYTES", "data": data}
    return {"inputs": [tensor | changes]}


def binary_request_of(*scans, **members):
    blob = b"".join(struct.pack("<I", len(scan)) + scan for scan in scans)
    tensor = {"name": "scan", "shape": [len(scans)], "datatype": "BYTES"}
    tensor["parameters"] = {"binary_data_size": len(blob)}
    head = json.dumps({"inputs": [tensor], **members}).encode()
    return {
        "content": head + blob,
        "headers": {"Inference-Header-Content-Length": str(len(head))},
    }


def outputs_of(answer):
    assert answer.status_code == 200, answer.text
    return {output["name"]: output for output in answer.json()["outputs"]}


def test_metadata_and_health(client, ensemble):
    bundle_id = ensemble.hosted.info.bundle_id
    assert client.get("/v2").json()["name"] == "bt"
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    for path in ("/v2/models/bt", f"/v2/models/bt/versions/{bundle_id}"):
        metadata = client.get(path).json()
        assert metadata["versions"] == [bundle_id]
        assert metadata["inputs"] == [{"name": "scan", "datatype": "BYTES", "shape": [-1]}]
        assert metadata["outputs"][0] == {
            "name": "probabilities", "datatype": "FP64", "shape": [-1, CLASSES],
        }  # fmt: skip
        assert client.get(f"{path}/ready").json() == {"name": "bt", "ready": True}
    ensemble.is_there = False
    try:
        for path in ("/v2/health/ready", "/v2/models/bt/ready"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        assert client.get("/v2/health/live").status_code == 200
        answer = client.post("/v2/models/bt/infer", json=request_of(SCANS[0]))
        assert answer.status_code == 503
        assert answer.json()["error"]
    finally:
        ensemble.is_there = True


def test_it_answers_as_the_predictions_route_does(client, ensemble):
    scans = [SCANS[0], BAD, SCANS[1]]
    sent = {"id": "42", **request_of(*scans)}
    answer = client.post("/v2/models/bt/infer", json=sent)
    outputs = outputs_of(answer)
    assert answer.json()["id"] == "42"
    assert answer.json()["model_version"] == ensemble.hosted.info.bundle_id
    results = client.post("/v1/predictions", files=[("files", scan) for scan in scans]).json()
    probabilities = np.array(outputs["probabilities"]["data"], float).reshape(3, CLASSES)
    for i, result in enumerate(results["results"]):
        assert outputs["status"]["data"][i] == result["status"]
        assert outputs["reason"]["data"][i] == result["reason"]
        assert outputs["predicted_label"]["data"][i] == result.get("predicted_label", "")
        expected = result.get("probabilities", dict.fromkeys(SPACE.names, np.nan))
        np.testing.assert_array_equal(probabilities[i], list(expected.values()))
    shapes = {name: output["shape"] for name, output in outputs.items()}
    assert shapes == {
        "probabilities": [3, CLASSES], "predicted_label": [3], "status": [3], "reason": [3],
    }  # fmt: skip
    version = f"/v2/models/bt/versions/{ensemble.hosted.info.bundle_id}/infer"
    assert client.post(version, json=sent).json() == answer.json()
    column = request_of(*scans, shape=[3, 1], data=[[t] for t in sent["inputs"][0]["data"]])
    assert outputs_of(client.post("/v2/models/bt/infer", json=column)) == outputs


def test_binary_tensors_hold_the_same(client):
    outputs = outputs_of(client.post("/v2/models/bt/infer", json=request_of(*SCANS)))
    assert outputs_of(client.post("/v2/models/bt/infer", **binary_request_of(*SCANS))) == outputs
    wanted = {"parameters": {"binary_data_output": True}}
    answer = client.post("/v2/models/bt/infer", **binary_request_of(*SCANS, **wanted))
    num_json_bytes = int(answer.headers["inference-header-content-length"])
    blob = answer.content[num_json_bytes:]
    for output in json.loads(answer.content[:num_json_bytes])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        own, blob = blob[:size], blob[size:]
        if output["datatype"] == "FP64":
            values = np.frombuffer(own, "<f8").tolist()
        else:
            values = []
            while own:
                end = 4 + int.from_bytes(own[:4], "little")
                values.append(own[4:end].decode())
                own = own[end:]
        assert values == outputs[output["name"]]["data"]
    assert blob == b""


def test_only_the_outputs_that_are_named_are_sent(client):
    named = {"outputs": [{"name": "status"}]}
    answer = client.post("/v2/models/bt/infer", json=request_of(SCANS[0]) | named)
    assert list(outputs_of(answer)) == ["status"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0",
        b"{}",
        b"[" * 100_000,
        b'{"inputs": NaN}',
        {"inputs": []},
        request_of(),
        request_of(*SCANS, SCANS[0], SCANS[0]),
        request_of(SCANS[0], shape=[2]),
        request_of(SCANS[0], shape=[1, 2]),
        request_of(SCANS[0], shape=[-1]),
        request_of(SCANS[0], datatype="FP32"),
        request_of(SCANS[0], name="image"),
        request_of(SCANS[0], data=["not base64!"]),
        request_of(SCANS[0], data=["ü"]),
        request_of(SCANS[0], data=None),
        request_of(SCANS[0], data=None, parameters={"binary_data_size": 5}),
        request_of(SCANS[0], data=None, parameters={"binary_data_size": "x"}),
        request_of(SCANS[0]) | {"outputs": [{"name": "logits"}]},
    ],
)
def test_what_is_no_request_is_refused(client, body):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post("/v2/models/bt/infer", content=content)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
    assert answer.json()["error"] == answer.json()["detail"]


@pytest.mark.parametrize("length", ["x", "-1", "²", "1" * 30, "999999"])
def test_a_wrong_length_of_the_json_is_refused(client, length):
    sent = binary_request_of(SCANS[0])
    headers = {"Inference-Header-Content-Length": length.encode()}
    answer = client.post("/v2/models/bt/infer", content=sent["content"], headers=headers)
    assert answer.status_code == 400


def test_other_models_are_not_there(client):
    for path in ("/v2/models/other", "/v2/models/bt/versions/1", "/v2/models/bt/versions/1/ready"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    answer = client.post("/v2/models/other/infer", json=request_of(SCANS[0]))
    assert (answer.status_code, "'bt'" in answer.json()["error"]) == (404, True)


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=5))
def test_binary_and_base64_tensors_are_read_alike(scans):
    sent = binary_request_of(*scans)
    length = sent["headers"]["Inference-Header-Content-Length"]
    for body, header in ((sent["content"], length), (json.dumps(request_of(*scans)), None)):
        body = body.encode() if isinstance(body, str) else body
        request, blobs = read_request(body, header)
        assert read_scans(request.inputs[0], blobs, 5) == scans


@given(st.binary(max_size=200), st.none() | st.text(max_size=5))
def test_no_body_does_more_than_raise_value_error(body, length):
    try:
        request, blobs = read_request(body, length)
        read_scans(request.inputs[0], blobs, 5)
    except ValueError:
        pass


@given(st.lists(st.text(max_size=9), min_size=1, max_size=4))
def test_texts_of_any_kind_are_written(texts):
    request = InferRequest.model_validate(request_of(b"x"))
    content, num_json_bytes = write_response({}, {"status": texts}, request)
    assert len(content) == num_json_bytes
    (output,) = json.loads(content)["outputs"]
    assert output == {
        "name": "status", "shape": [len(texts)], "datatype": "BYTES", "data": texts,
    }  # fmt: skip
