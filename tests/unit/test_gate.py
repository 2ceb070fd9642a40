"""The input gate: heads pass, and what is none, or is drawn on, gets its reason."""

import io
import os
from dataclasses import replace

import cv2
import matplotlib
import matplotlib.cbook
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.figure import Figure
from PIL import Image
from pydicom.data import get_testdata_file
from sklearn.datasets import load_sample_images

from bt_core.data.decode_stage import CONTENT, DecodeStage
from bt_core.errors import REASONS, REJECTED_REASONS
from bt_core.scans.decoded import BURNED_IN, MIN_SIDE_PX, DecodedScan
from bt_core.scans.formats import decode_scan
from bt_core.scans.gate import GATE_DEFERS, GATE_REJECTS, find_shape, gate
from bt_core.scans.intensity import coloured_share
from bt_core.scans.phantom import CLASS_NAMES, encode_picture, phantom_slice
from serve.decoding import decode_upload
from tests.scan_files import GREY16, RGB16, dicom_object, encode, encode_cv2, palette_object

HEAD = phantom_slice("glioma", 3, 256)
HEADS = [phantom_slice(name, seed, 160) for name in CLASS_NAMES for seed in range(10)]
WORDS = "REPORT OF THE FINDINGS: NO EVIDENCE OF MASS"


def gate_of(image_HW):
    return gate(DecodedScan(np.ascontiguousarray(image_HW), "PNG", 8, ()))


def gate_of_file(pixels, suffix="PNG"):
    return gate(decode_scan(encode(pixels, suffix)))


def in_colour(image_HW):
    return np.repeat(image_HW[:, :, None], 3, axis=2)


def page(ink, paper, size=0.5):
    picture = np.full((640, 500), paper, np.uint8)
    for y in range(30, 620, int(40 * size)):
        cv2.putText(picture, WORDS, (10, y), cv2.FONT_HERSHEY_SIMPLEX, size, ink, 1)
    return picture


def chart(dark=False):
    background, ink = ("black", "white") if dark else ("white", "black")
    figure = Figure(facecolor=background)
    axes = figure.subplots()
    axes.set_facecolor(background)
    axes.tick_params(colors=ink)
    axes.plot(np.sin(np.arange(100) / 9), color=ink)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.array(Image.open(buffer).convert("L"))


def with_text(image_HW, num_lines):
    """Burn a name into the upper left corner."""
    marked = image_HW.copy()
    for line in range(num_lines):
        where = (4, 14 + 14 * line)
        cv2.putText(marked, "DOE JANE", where, cv2.FONT_HERSHEY_SIMPLEX, 0.35, 255, 1, cv2.LINE_AA)
    return marked


@pytest.mark.parametrize("size_px", [96, 224, 512])
def test_heads_pass_at_any_size(size_px):
    reasons = [
        gate_of(phantom_slice(name, seed, size_px)) for name in CLASS_NAMES for seed in range(3)
    ]
    assert reasons == [""] * 12


@pytest.mark.parametrize("transform", [np.fliplr, np.flipud, np.rot90, lambda x: np.pad(x, 40)])
def test_heads_pass_however_they_lie(transform):
    assert [gate_of(transform(head)) for head in HEADS] == [""] * len(HEADS)


def test_heads_pass_in_a_thin_bright_frame():
    framed = HEAD.copy()
    framed[[0, 1, -2, -1]] = framed[:, [0, 1, -2, -1]] = 255
    assert gate_of(framed) == ""


@pytest.mark.parametrize("gain", [0.25, 0.5, 1.0])
def test_dim_heads_with_a_grey_ground_pass(gain):
    assert gate_of(np.rint(HEAD * gain + 20).astype(np.uint8)) == ""


def test_inverted_heads_are_told():
    assert {gate_of(255 - head) for head in HEADS} == {"inverted_contrast"}


NOISE = np.random.default_rng(0)
NO_HEADS = {
    "noise": NOISE.integers(0, 256, (224, 224)).astype(np.uint8),
    "clouds": cv2.normalize(
        cv2.GaussianBlur(NOISE.normal(size=(224, 224)), (0, 0), 14), None, 0, 255, cv2.NORM_MINMAX
    ).astype(np.uint8),
    "gradient": np.tile(np.arange(224, dtype=np.uint8), (224, 1)),
    "bright page": page(0, 255),
    "bright chart": chart(),
    "dark chart": chart(dark=True),
    "grey photograph": cv2.cvtColor(load_sample_images().images[0], cv2.COLOR_RGB2GRAY),
    "stripes": np.tile(np.repeat([0, 200], 16).astype(np.uint8), (224, 7)),
}


@pytest.mark.parametrize("name", NO_HEADS)
def test_what_shows_no_head_is_rejected(name):
    assert gate_of(NO_HEADS[name]) in GATE_REJECTS


def test_a_dark_page_of_text_is_not_answered_alone():
    reasons = {gate_of(page(255, 0, size)) for size in (0.4, 0.5, 0.6)}
    assert reasons <= {"not_a_head", "burnt_in_text"}


@pytest.mark.parametrize("name", ["CT_small.dcm", "examples_ybr_color.dcm", "JPEG2000.dcm"])
def test_other_parts_of_the_body_are_not_answered_alone(name):
    with open(get_testdata_file(name), "rb") as file:
        assert gate(decode_scan(file.read())) in (*GATE_REJECTS, *GATE_DEFERS)


def test_next_to_nothing_is_blank():
    dot, faint = np.zeros((2, 224, 224), np.uint8)
    dot[100:108, 100:108] = 255
    faint[::2] = 9
    assert [gate_of(dot), gate_of(faint)] == ["almost_blank", "almost_blank"]


def test_photographs_are_rejected_for_their_colour():
    photographs = [*load_sample_images().images]
    path = os.path.join(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")
    photographs.append(np.array(Image.open(path)))
    assert {gate_of_file(photograph, "JPEG") for photograph in photographs} == {"colour_picture"}


@pytest.mark.parametrize("suffix", ["PNG", "JPEG"])
def test_a_coloured_mark_is_found_and_grey_stored_as_colour_is_none(suffix):
    picture = in_colour(HEAD)
    assert gate_of_file(picture, suffix) == ""
    cv2.arrowedLine(picture, (30, 30), (100, 100), (255, 220, 0), 2)
    assert gate_of_file(picture, suffix) == "colour_overlay"


def test_a_few_letters_pass_and_a_name_is_found():
    letter = HEAD.copy()
    cv2.putText(letter, "R", (6, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.5, 255, 1)
    assert gate_of(letter) == ""
    assert gate_of(with_text(HEAD, 3)) == "burnt_in_text"
    twice = cv2.resize(with_text(HEAD, 3), None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR)
    assert gate_of(twice) == "burnt_in_text"


def test_text_that_the_file_states_counts_without_being_seen():
    scan = DecodedScan(HEAD, "DICOM", 8, (BURNED_IN,))
    assert gate(scan) == "burnt_in_text"
    assert gate(replace(scan, steps=())) == ""


def test_a_head_of_few_pixels_is_told_whatever_surrounds_it():
    small = cv2.resize(HEAD, (48, 48), interpolation=cv2.INTER_AREA)
    assert gate_of(small) == "low_resolution"
    assert gate_of(np.pad(small, 20)) == "low_resolution"
    assert gate_of(cv2.resize(HEAD, (128, 128), interpolation=cv2.INTER_AREA)) == ""


def test_a_stretched_head_is_told():
    assert gate_of(cv2.resize(HEAD, (700, 200))) == "odd_shape"
    assert gate_of(cv2.resize(HEAD, (200, 250))) == ""


def test_the_shape_is_measured_in_pixels_of_the_picture():
    ellipse = np.zeros((100, 120), np.uint8)
    cv2.ellipse(ellipse, (60, 50), (40, 30), 0, 0, 360, 200, cv2.FILLED)
    shape, mask = find_shape(ellipse, 4.0)
    assert shape.width_px / 4 == pytest.approx(81, abs=2)
    assert shape.height_px / 4 == pytest.approx(61, abs=2)
    assert shape.area == pytest.approx(np.pi * 40 * 30 / ellipse.size, rel=0.08)
    assert shape.solidity == pytest.approx(1, abs=0.02)
    assert (shape.fill, shape.rest, shape.dark_frame) == (1, 0, 1)
    assert mask.sum() == pytest.approx(shape.area * ellipse.size)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.uint8,
        st.tuples(st.integers(MIN_SIDE_PX, 90), st.integers(MIN_SIDE_PX, 90)),
        elements=st.integers(0, 255),
        fill=st.integers(0, 255),
    ),
    st.floats(0, 1),
)
def test_any_picture_gets_a_known_answer_and_is_left_alone(image_HW, coloured):
    before = image_HW.copy()
    reason = gate(DecodedScan(image_HW, "PNG", 8, (), coloured=coloured))
    assert reason in ("", *GATE_REJECTS, *GATE_DEFERS)
    assert (image_HW == before).all()


@pytest.mark.parametrize("shape", [(32, 16_000), (16_000, 32), (33, 257)])
def test_long_pictures_get_an_answer(shape):
    assert gate_of(np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8))


def test_every_reason_is_known_and_those_that_reject_say_so():
    assert {*GATE_REJECTS, *GATE_DEFERS} <= set(REASONS)
    assert set(GATE_REJECTS) <= REJECTED_REASONS
    assert not set(GATE_DEFERS) & REJECTED_REASONS


def test_colour_is_measured_in_any_depth():
    share = coloured_share(np.dstack([RGB16, GREY16])[:, :, :3], 65535.0)
    apart = np.abs(np.diff(RGB16.astype(float), axis=2)).max(2) > 24 / 255 * 65535
    assert share == pytest.approx(apart.mean())
    assert coloured_share(RGB16.astype(np.int32), 65535.0) == pytest.approx(share)
    assert coloured_share(RGB16.astype(np.float32), 65535.0) == pytest.approx(share)
    assert decode_scan(encode_cv2(RGB16, ".png")).coloured == pytest.approx(share)


def test_colour_is_measured_in_dicom():
    red = np.zeros((40, 56, 3), np.uint8)
    red[:10] = (200, 0, 0)
    red[10:] = np.arange(56, dtype=np.uint8)[None, :, None]
    assert decode_scan(dicom_object(red)).coloured == 0.25
    assert decode_scan(palette_object()).coloured > 0
    assert decode_scan(dicom_object(red[..., 0])).coloured == 0


def test_batches_and_uploads_are_told_alike():
    contents = [encode_picture(image, ".png") for image in (HEAD, 255 - HEAD, with_text(HEAD, 3))]
    contents.append(b"no scan at all")
    column = np.empty(len(contents), object)
    column[:] = contents
    refs = {k: np.array([k] * len(contents)) for k in ("scan_id", "uri", "member")}
    rows = DecodeStage(gated=True)(
        {**refs, "position": np.zeros(len(contents), int), CONTENT: column}
    )
    assert rows["gate"].tolist() == ["", "inverted_contrast", "burnt_in_text", ""]
    assert rows["reason"].tolist() == ["", "", "", "unsupported_type"]
    uploads = [decode_upload(content, "", ())[3] for content in contents[:3]]
    assert uploads == rows["gate"].tolist()[:3]
