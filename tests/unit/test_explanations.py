"""Explanations over HTTP: whose map lies where on the picture, what each member says, refusals."""

import base64
import io

import cv2
import numpy as np
import pytest
from PIL import Image

from bt_core.evaluation.explainer import FIGURES, Explainer
from bt_core.scans.formats import decode_scan
from bt_core.scans.phantom import encode_picture, phantom_slice
from bt_core.scans.preprocess import PreprocessSpec, preprocess_pixels, seen_box
from bt_core.scans.views import SHOWN_PX, onto_image, reduced
from serve.decoding import decode_upload
from tests.hosted import client_of, tiny_hosted
from tests.scan_files import VOLUME, deadly_dicom, nifti
from tests.tiny_bundle import make_bundle

HEAD = phantom_slice("glioma", 1, 96)
SCAN = encode_picture(HEAD, ".png")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_hosted(tmp_path_factory, 32, 48)


@pytest.fixture(scope="module")
def client(bundle):
    with client_of(bundle.hosted, max_in_flight=4) as client:
        yield client


def explain(client, content, **headers):
    return client.post("/v1/explanations", content=content, headers=headers)


def pixels_of(text):
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    assert (image.format, image.mode) == ("PNG", "L")
    return np.asarray(image)


def test_an_explanation_is_the_prediction_with_its_map_and_votes(client, bundle):
    answer = explain(client, SCAN)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    (predicted,) = client.post("/v1/predictions", content=SCAN).json()["results"]
    assert {name: found[name] for name in predicted} == predicted
    assert np.array_equal(pixels_of(found["picture"]), HEAD)
    explainer = Explainer(bundle.location, "cpu", 1)
    pixels, *_ = decode_upload(SCAN, "", explainer.ensemble.specs)
    (row,) = explainer.explain([p[None] for p in pixels], [predicted])
    heat_SS = np.frombuffer(row["heat"], np.uint8).reshape(32, 32)
    heat_HW = pixels_of(found["heat"])
    assert heat_HW.shape == HEAD.shape
    expected_HW = cv2.resize(heat_SS, HEAD.shape, interpolation=cv2.INTER_LINEAR)
    assert np.abs(heat_HW.astype(int) - expected_HW).max() <= 2
    assert found["method"] == row["method"] == "grad_cam"
    assert found["heat_members"] == ["m0", "m1"]
    assert found["figures"] == {name: row[name] for name in FIGURES}


def test_the_votes_are_what_each_member_says_alone(client, bundle):
    members = explain(client, SCAN).json()["members"]
    assert list(members) == ["m0", "m1"]
    for probabilities in members.values():
        assert tuple(probabilities) == bundle.hosted.info.label_space.names
        assert sum(probabilities.values()) == pytest.approx(1)
    pixels, *_ = decode_upload(SCAN, "", bundle.ensemble.specs)
    logits_K = bundle.ensemble.predictor.logits([p[None] for p in pixels])[1, 0].astype(float)
    scaled = np.exp(logits_K / 1.5)  # the temperature of the members
    np.testing.assert_allclose(list(members["m1"].values()), scaled / scaled.sum(), rtol=1e-6)


def test_the_overlay_is_a_picture_for_whoever_asks_for_one(client):
    answer = explain(client, SCAN, accept="text/html, image/png;q=0.9")
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).width > 400
    both = explain(client, SCAN, accept="application/json, image/png")
    assert both.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"no scan at all", 415, "unsupported_type"),
        (deadly_dicom(), 422, "decoder_crashed"),
        (encode_picture(255 - HEAD, ".png"), 422, "inverted_contrast"),
    ],
)
def test_what_is_no_scan_is_a_problem_document(client, content, status, code):
    answer = explain(client, content)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert explain(client, content, accept="image/png").status_code == status


def test_one_scan_is_explained_at_a_time(client):
    files = [("files", ("a.png", SCAN)), ("files", ("b.png", SCAN))]
    assert client.post("/v1/explanations", files=files[:1]).status_code == 200
    assert client.post("/v1/explanations", files=files).status_code == 400


def test_an_explainer_out_of_reach_is_said_so(client, bundle):
    bundle.is_there = False
    try:
        answer = explain(client, SCAN)
        assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
    finally:
        bundle.is_there = True


def test_pictures_come_with_predictions_on_demand_and_of_refused_scans_too(client):
    inverted = encode_picture(255 - HEAD, ".png")
    files = [("files", (name, c)) for name, c in (("a", SCAN), ("b", inverted), ("c", b"none"))]
    bare = client.post("/v1/predictions", files=files).json()["results"]
    assert all("picture" not in result for result in bare)
    shown = client.post("/v1/predictions?pictures=true", files=files).json()["results"]
    pictures = [result.pop("picture", None) for result in shown]
    assert shown == bare
    assert np.array_equal(pixels_of(pictures[0]), HEAD)
    assert np.array_equal(pixels_of(pictures[1]), 255 - HEAD)
    assert pictures[2] is None


def test_a_volume_shows_the_slice_that_was_decoded(client):
    content = nifti(VOLUME.astype(np.int16))
    files = [("files", ("scan.nii", content)), ("files", ("scan.png", SCAN))]
    shown, _ = client.post("/v1/predictions?pictures=true", files=files).json()["results"]
    image_HW = decode_scan(content, "scan.nii").image_HW
    assert np.array_equal(pixels_of(shown["picture"]), image_HW)


def test_the_bundle_that_answered_explains(bundle, tmp_path):
    other = make_bundle(str(tmp_path / "other"), sizes=(48,))
    pixels, digest, _, gate, _ = decode_upload(SCAN, "", bundle.ensemble.specs)
    (answer,) = bundle.ensemble.answer([p[None] for p in pixels], [digest], [gate])
    for location, bundle_id, members in (
        (str(tmp_path / "other"), other.bundle_id, ["m0"]),
        (bundle.location, bundle.hosted.info.bundle_id, ["m0", "m1"]),
    ):
        scan = (pixels if len(members) > 1 else pixels[1:], digest, gate)
        explained = bundle.explainer.explain(location, bundle_id, scan, answer, draw=False)
        assert (explained.bundle_id, list(explained.members)) == (bundle_id, members)


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("shape", [(300, 200), (180, 240), (900, 1400)])
def test_a_map_lies_where_the_model_saw_it(shape, crop, fit):
    """A bright spot that the model saw is hottest at the spot of the picture."""
    image_HW = np.zeros(shape, np.uint8)
    height, width = shape
    cv2.ellipse(
        image_HW, (width // 2, height // 2), (width // 3, height // 3), 0, 0, 360, 90, cv2.FILLED
    )
    spot = (round(width * 0.6), round(height * 0.4))
    cv2.circle(image_HW, spot, min(shape) // 20, 255, cv2.FILLED)
    spec = PreprocessSpec(size_px=64, crop_to_head=crop, fit=fit)
    seen_SS = preprocess_pixels(image_HW, spec)
    map_SS = np.where(seen_SS > 150, 255, 0).astype(np.uint8)
    drawn_HW = onto_image(map_SS, seen_box(image_HW, spec), shape)
    shown_HW = reduced(image_HW)
    assert drawn_HW.shape == shown_HW.shape
    assert max(shown_HW.shape) <= SHOWN_PX
    y, x = np.nonzero(drawn_HW > 127)
    scale = shown_HW.shape[1] / width
    assert abs(x.mean() - (spot[0] + 0.5) * scale + 0.5) < 1.5
    assert abs(y.mean() - (spot[1] + 0.5) * scale + 0.5) < 1.5


@pytest.mark.parametrize("size", [32, 48])
def test_a_flat_map_stays_flat_to_the_rim(size):
    flat = np.full((size, size), 200, np.uint8)
    drawn_HW = onto_image(flat, (0, 0, 97, 61), (61, 97))
    assert drawn_HW.min() == drawn_HW.max() == 200
    beside_HW = onto_image(flat, (40, 10, 20, 20), (61, 97))
    assert beside_HW[20, 50] == 200
    assert beside_HW[:8].max() == 0
    assert beside_HW[:, :37].max() == 0
