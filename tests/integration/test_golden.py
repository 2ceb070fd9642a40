"""One scan, three paths: training input, batch scoring and HTTP see the same tensor and agree."""

import base64
import io
import re
import time
import zipfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import requests
import torch
from PIL import Image

from bt_core import storage
from bt_core.data.catalog import Dataset
from bt_core.data.decode_stage import DecodeStage
from bt_core.ensemble.ensemble import Ensemble
from bt_core.ensemble.scorer import Scorer
from bt_core.evaluation.explainer import FIGURES, Explainer
from bt_core.inference.predictor import Predictor, needed_specs
from bt_core.models.bundle import Bundle
from bt_core.models.inputs import Preprocessor
from bt_core.models.run import Run
from bt_core.scans.archives import ScanRef, read_member
from bt_core.scans.phantom import encode_picture, phantom_slice
from serve.app import GATEWAY, start
from serve.decoding import decode_upload
from serve.settings import ServeSettings
from tests.scan_files import deadly_dicom

pytestmark = pytest.mark.integration


SHARED_FIELDS = (
    "status", "reason", "predicted_label", "prediction_set", "members_used", "seen_in_training",
    "bundle_id", "preprocess_digest", "content_sha256", "runtimes", "nearest_family",
    "nearest_correlation", "distance",
)  # fmt: skip


@pytest.fixture(scope="module")
def service(chain):
    from ray import serve

    from cluster.local import free_port

    url = start(ServeSettings(bundle=str(chain.bundle)), free_port())
    yield url
    serve.shutdown()


@pytest.fixture(scope="module")
def refs(chain):
    """Three scans of every format in the training split, as catalog rows."""
    rows = Dataset(str(chain.data)).split("train").to_pylist()
    chosen = [
        row
        for kind in ("PNG", "JPEG", "DICOM")
        for row in [r for r in rows if r["format"] == kind][:3]
    ]
    assert len({row["format"] for row in chosen}) == 3
    return chosen


def content_of(row):
    return read_member(ScanRef(row["scan_id"], row["uri"], row["member"], row["position"]))


@pytest.fixture
def tensors(monkeypatch):
    """Record every tensor that a model is given in this process."""
    seen = []
    original = Preprocessor.normalize

    def recorded(self, unit_B1SS):
        tensor = original(self, unit_B1SS)
        seen.append(tensor[:1])  # the first scan; what fills up the batch comes after it
        return tensor

    monkeypatch.setattr(Preprocessor, "normalize", recorded)
    return seen


def training_tensors(chain, refs):
    """What the training loop computes from the shards, before augmentation."""
    view = next(p for p in (chain.data / "views").iterdir() if p.name.startswith("48px"))
    shards = {r["scan_id"]: r for r in pq.read_table(view / "split=train").to_pylist()}
    preprocessor = Preprocessor(Bundle(str(chain.bundle)).info.members[0].preprocess)
    tensors = []
    for row in refs:
        pixels = np.array(shards[row["scan_id"]]["pixels"], np.uint8).reshape(1, 48, 48)
        tensors.append(preprocessor.normalize(preprocessor.to_unit(torch.from_numpy(pixels))))
    return tensors


def scoring_tensors(chain, refs, tensors):
    scorer = Scorer(str(chain.bundle), "cpu", 1)
    columns = {k: np.array([r[k] for r in refs]) for k in ("scan_id", "uri", "member", "position")}
    specs, _ = needed_specs(Bundle(str(chain.bundle)).info)
    tensors.clear()
    for i in range(len(refs)):
        scorer(DecodeStage(specs)({k: v[i : i + 1] for k, v in columns.items()}))
    return tensors[:: len(tensors) // len(refs)]


def http_tensors(chain, refs, tensors):
    """What the gateway decodes and the ensemble's deployment is given, in this process."""
    ensemble = Ensemble(Bundle(str(chain.bundle)))
    tensors.clear()
    for row in refs:
        pixels, digest, *_ = decode_upload(content_of(row), row["member"], ensemble.specs)
        answer = ensemble.answer([image_SS[None] for image_SS in pixels], [digest])[0]
        assert answer["seen_in_training"]
    return tensors[:: len(tensors) // len(refs)]


def test_three_paths_give_byte_equal_tensors(chain, refs, tensors):
    trained = training_tensors(chain, refs)
    scored = scoring_tensors(chain, refs, tensors)
    served = http_tensors(chain, refs, tensors)
    for one, two, three in zip(trained, scored, served, strict=True):
        assert one.shape == (1, 3, 48, 48)
        digests = {storage.sha256(tensor.numpy().tobytes()) for tensor in (one, two, three)}
        assert len(digests) == 1


def test_http_and_batch_scoring_agree_on_every_scan(chain, service):
    """Not a bit differs: neither the batch nor the neighbours change an answer."""
    names = Bundle(str(chain.bundle)).info.label_space.names
    for row in pq.read_table(chain.scores / "scores").to_pylist():
        ref = ScanRef(row["scan_id"], row["uri"], row["member"], -1)
        answer = post(service, read_by_name(chain, ref.member))
        assert {k: answer[k] for k in SHARED_FIELDS} == {k: row[k] for k in SHARED_FIELDS}
        ours = [row[f"prob_{name}"] for name in names]
        assert [answer["probabilities"][name] for name in names] == ours


def test_the_predictor_repeats_the_validation_logits_of_training(chain):
    run, dataset = Run(str(chain.runs[0])), Dataset(str(chain.data))
    bundle = Bundle(str(chain.bundle))
    predictor = Predictor(bundle)
    rows = dataset.split("validation").sort_by("scan_id").to_pylist()
    columns = {k: np.array([r[k] for r in rows]) for k in ("scan_id", "uri", "member", "position")}
    decoded = DecodeStage(predictor.specs)(columns)
    logits_MBK = predictor.logits([decoded[f"pixels_{i}"] for i in range(len(predictor.specs))])
    trained = np.array(run.validation()["logits"].to_pylist())
    own = [member.name for member in bundle.info.members].index(run.info.name)
    np.testing.assert_allclose(logits_MBK[own], trained, atol=1e-4)


def post(url, content, **options):
    response = requests.post(f"{url}/v1/predictions", data=content, timeout=60, **options)
    assert response.status_code == 200, response.text
    return response.json()["results"][0]


def read_by_name(chain, member):
    with zipfile.ZipFile(chain.archive) as archive:
        return archive.read(member)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 422, "empty_file"),
        (b"not a picture", 415, "unsupported_type"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, 422, "corrupt_image"),
        (b"\0" * (65 * 1024**2), 413, "body_too_large"),
    ],
)
def test_bad_bodies_are_problem_documents(service, body, status, code):
    answer = requests.post(f"{service}/v1/predictions", data=body, timeout=60)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert (problem["status"], problem["code"]) == (status, code)
    assert "/" not in problem["detail"].replace("N/A", ""), "no path leaks"


def test_the_service_describes_itself(service, chain):
    with zipfile.ZipFile(chain.archive) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dcm"))
        content = archive.read(name)
    url = f"{service}/v1/predictions"
    answer = requests.post(url, files={"files": (name, content)}, timeout=60)
    assert answer.json()["results"][0] == post(service, content)
    two = [("files", ("a.png", content)), ("files", ("b.png", content))]
    assert (
        requests.post(url, files=two, timeout=60).json()["results"] == answer.json()["results"] * 2
    )
    assert requests.post(url, data={"files": "text"}, timeout=60).status_code == 415
    assert requests.get(url, timeout=60).status_code == 405
    assert requests.get(f"{service}/healthz", timeout=60).json() == {"status": "alive"}
    bundle_id = Bundle(str(chain.bundle)).info.bundle_id
    ready = requests.get(f"{service}/readyz", timeout=60).json()
    assert ready == {"status": "ready", "bundle_id": bundle_id}
    model = requests.get(f"{service}/v1/model", timeout=60).json()
    assert model["bundle_id"] == bundle_id
    assert model["labels"] == ["glioma", "meningioma", "no_tumor", "pituitary"]
    assert model["review"]["conformal_min_probs"].keys() == set(model["labels"])
    document = requests.get(f"{service}/openapi.json", timeout=60).json()
    answers = document["paths"]["/v1/predictions"]["post"]["responses"]
    assert "example" in answers["200"]["content"]["application/json"]
    assert set(answers) >= {"200", "400", "413", "415", "422", "503"}
    assert requests.get(f"{service}/docs", timeout=60).status_code == 200


def explained(url, content, **options):
    """Ask for an explanation; again where the replica takes longer to start than a request may."""
    for _ in range(20):
        answer = requests.post(f"{url}/v1/explanations", data=content, timeout=60, **options)
        if answer.status_code != 503:
            return answer
        assert (answer.json()["code"], answer.headers["retry-after"]) == ("overloaded", "1")
        time.sleep(1)
    pytest.fail("nothing is explained")


def test_what_explains_is_started_when_it_is_asked_for(service, chain):
    from ray import serve

    content = encode_picture(phantom_slice("glioma", 1, 96), ".png")
    own = serve.status().applications[GATEWAY].deployments["ExplainerDeployment"]
    assert sum(own.replica_states.values()) == 0
    answer = explained(service, content)
    assert answer.status_code == 200, answer.text
    found, predicted = answer.json(), post(service, content)
    assert {name: found[name] for name in predicted} == predicted
    assert found["members"].keys() == {"cnn_small", "mobilenetv2"}
    explainer = Explainer(str(chain.bundle), "cpu", 1)
    pixels, *_ = decode_upload(content, "", explainer.ensemble.specs)
    (row,) = explainer.explain([image_SS[None] for image_SS in pixels], [predicted])
    assert found["figures"] == pytest.approx({name: row[name] for name in FIGURES}, abs=1e-4)
    heat = Image.open(io.BytesIO(base64.b64decode(found["heat"])))
    assert (heat.mode, heat.size) == ("L", (96, 96))
    picture = explained(service, content, headers={"accept": "image/png"})
    assert picture.content.startswith(b"\x89PNG")
    assert explained(service, b"not a picture").json()["code"] == "unsupported_type"


def test_the_page_is_there(service):
    answer = requests.get(service, timeout=60)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "Not a medical device" in answer.text
    for path in re.findall(r'(?:src|href)="(static/[^"]+)"', answer.text):
        assert requests.get(f"{service}/{path}", timeout=60).status_code == 200


def test_a_file_that_ends_its_decoder_leaves_the_service_alive(service):
    for _ in range(3):
        answer = requests.post(f"{service}/v1/predictions", data=deadly_dicom(), timeout=60)
        assert (answer.status_code, answer.json()["code"]) == (422, "decoder_crashed")
    assert post(service, encode_picture(phantom_slice("glioma", 1, 96), ".png"))["status"]
