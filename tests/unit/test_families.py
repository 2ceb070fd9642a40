"""Copies of scans: the index against all pairs, families, conflicts and the docket."""

import itertools

import cv2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bt_core.data import copies, families
from bt_core.data.families import CopyIndex, Pairs, exact_pairs, join_components
from bt_core.errors import UsageError
from bt_core.labels import LABEL_SPACES
from bt_core.scans.phantom import CLASS_NAMES, perturbed_copy, phantom_slice
from bt_core.scans.preprocess import preprocess_pixels
from bt_core.scans.thumbnails import (
    MIN_CORRELATION,
    SPECTRUM_LENGTH,
    THUMBNAIL,
    TRANSFORMS,
    correlations,
    invariants,
    spectrum,
    spectrum_distances,
    transformed,
    unit_thumbnails,
)

waves = st.tuples(st.integers(0, 6), st.integers(0, 6), st.floats(0.5, 40), st.integers(0, 99))
thumbnails = hnp.arrays(np.uint8, (2, 40, 40), elements=st.integers(0, 255), fill=st.integers(0, 3))


def invariants_of(pixels_NFF):
    return invariants(spectrum(pixels_NFF))


def thumbnail(image):
    return preprocess_pixels(image, THUMBNAIL)


def perturbed(image, rng):
    """A turned, resized, re-encoded, brightened copy, decoded."""
    content = np.frombuffer(perturbed_copy(image, rng), np.uint8)
    return cv2.imdecode(content, cv2.IMREAD_GRAYSCALE)


def all_pairs(pixels_NFF):
    """Every copy by brute force: all pairs, 8 transforms, written without the code under test."""
    flat = pixels_NFF.reshape(len(pixels_NFF), -1).astype(np.float64)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    square = flat.reshape(-1, 40, 40)
    found = set()
    for mirror, turns in itertools.product((False, True), range(4)):
        other = square.transpose(0, 2, 1) if mirror else square
        for _ in range(turns):
            other = other.transpose(0, 2, 1)[:, ::-1]
        left, right = np.nonzero(other.reshape(len(flat), -1) @ flat.T >= MIN_CORRELATION)
        found |= {(min(i, j), max(i, j)) for i, j in zip(left, right, strict=True) if i != j}
    return found


@pytest.fixture(scope="module")
def planted():
    """300 phantoms, the last 60 of them perturbed copies of the first 60."""
    rng = np.random.default_rng(0)
    images = [phantom_slice(CLASS_NAMES[i % 4], i, 128) for i in range(240)]
    images += [perturbed(images[i], rng) for i in range(60)]
    return np.stack([thumbnail(image) for image in images])


@given(thumbnails, st.integers(0, 7))
def test_invariants_ignore_turns_and_lie_no_further_apart_than_the_thumbnails(pair, k):
    one, other = pair[:1], pair[1:]
    turned = invariants_of(transformed(one, k))
    assert turned.shape == (1, SPECTRUM_LENGTH)
    np.testing.assert_allclose(turned, invariants_of(one), atol=2e-5)
    distance = np.linalg.norm(invariants_of(one) - invariants_of(other))
    nearest_8 = spectrum_distances(spectrum(one), spectrum(other))[:, 0]
    for j in range(8):
        apart = unit_thumbnails(transformed(one, j)) - unit_thumbnails(other)
        assert distance - 1e-4 <= nearest_8[j] <= np.linalg.norm(apart) + 1e-4


@given(waves, st.integers(0, 7))
def test_near_copies_stay_within_the_bound(wave, k):
    """Noise, and the same with a wave of a low frequency: there a wrong factor would show."""
    u, v, amplitude, seed = wave
    noise = np.random.default_rng(seed).normal(128, 40, (40, 40))
    y, x = np.mgrid[0:40, 0:40] + 0.5
    wave = amplitude * np.cos(np.pi * u * y / 40) * np.cos(np.pi * v * x / 40)
    one, other = (np.clip(a, 0, 255).astype(np.uint8)[None] for a in (noise, noise + wave))
    other = transformed(other, k)
    distance = np.linalg.norm(invariants_of(one) - invariants_of(other))
    apart = np.linalg.norm(unit_thumbnails(transformed(one, k)) - unit_thumbnails(other))
    nearest = spectrum_distances(spectrum(one), spectrum(other))[k, 0]
    assert distance - 1e-4 <= nearest <= apart + 1e-4
    assert spectrum_distances(spectrum(one), spectrum(transformed(one, k)))[k, 0] < 0.01


def test_the_transforms_are_the_eight_symmetries_and_named_right():
    image = np.arange(4).reshape(2, 2)  # 0 1 / 2 3
    results = {transformed(image, k).tobytes() for k in range(len(TRANSFORMS))}
    assert len(results) == 8
    named = {name: transformed(image, k).tolist() for k, name in enumerate(TRANSFORMS)}
    assert named["as it is"] == [[0, 1], [2, 3]]
    assert named["mirrored left-right"] == [[1, 0], [3, 2]]
    assert named["mirrored top-bottom"] == [[2, 3], [0, 1]]
    assert named["rotated by 90°"] == [[1, 3], [0, 2]]
    assert named["rotated by 180°"] == [[3, 2], [1, 0]]


def test_the_index_finds_exactly_what_all_pairs_give(planted):
    index = CopyIndex(planted, spectrum(planted))
    pairs = Pairs.concatenate([index.search(0, 100), index.search(100, 300)])
    found = set(zip(pairs.left_P.tolist(), pairs.right_P.tolist(), strict=True))
    assert found == all_pairs(planted)
    assert {(i, 240 + i) for i in range(60)} <= found
    assert len(found) < 70, "phantoms are different pictures"


def blended(image, wave, correlation):
    """The image with so much of a wave that its correlation with itself becomes this one."""
    one = image.astype(np.float64) - image.mean()
    wave = wave - wave.mean()
    wave -= one * (wave * one).sum() / (one * one).sum()  # at a right angle to it
    share = np.sqrt(1 / correlation**2 - 1) * np.linalg.norm(one) / np.linalg.norm(wave)
    mixed = one + share * wave
    return np.rint(np.interp(mixed, (mixed.min(), mixed.max()), (0, 255))).astype(np.uint8)


@pytest.mark.parametrize("k", range(8))
def test_copies_just_above_the_bound_are_found_and_below_it_are_not(k):
    """Blended with a slow wave, the difference is all in the numbers that the shortlist sees."""
    y, x = np.mgrid[0:40, 0:40] + 0.5
    image = np.rint(phantom_slice("pituitary", 5, 40) * 0.6).astype(np.uint8)
    found = []
    for u, v in ((1, 0), (2, 1), (3, 3), (7, 4)):
        wave = np.cos(np.pi * u * y / 40) * np.cos(np.pi * v * x / 40)
        for correlation in (0.9802, 0.981, 0.9790):
            other = transformed(blended(image, wave, correlation), k)
            pixels = np.stack([image, other])
            pairs = CopyIndex(pixels, spectrum(pixels)).search(0, 2)
            exact = correlations(pixels[:1], pixels[1:], k)[0]
            assert abs(exact - correlation) < 2e-4, "the blend is what it says"
            assert len(pairs) == (exact >= MIN_CORRELATION)
            found.append(len(pairs))
    assert sum(found) == 8


def test_several_blocks_find_what_one_finds(planted, monkeypatch):
    monkeypatch.setattr(families, "_BLOCK_ROWS", 70)
    index = CopyIndex(planted, spectrum(planted))
    pairs = Pairs.concatenate([index.search(at, at + 100) for at in (0, 100, 200)])
    found = set(zip(pairs.left_P.tolist(), pairs.right_P.tolist(), strict=True))
    assert len(found) == len(pairs)
    assert found == all_pairs(planted)


def test_the_index_searches_among_chosen_rows_only(planted):
    rows = np.array([1, 5, 240, 241, 245])
    pairs = CopyIndex(planted, spectrum(planted), rows).search(0, 5)
    assert set(zip(pairs.left_P.tolist(), pairs.right_P.tolist(), strict=True)) == {
        (1, 241),
        (5, 245),
    }


def test_a_pair_says_how_the_left_is_turned_into_the_right():
    image = phantom_slice("glioma", 3, 40)
    pixels = np.stack([image, *(transformed(image, k) for k in range(8))])
    pairs = CopyIndex(pixels, spectrum(pixels)).search(0, 1)
    assert dict(zip(pairs.right_P.tolist(), pairs.transform_P.tolist(), strict=True)) == {
        k + 1: k for k in range(8)
    }
    assert (pairs.correlation_P > 0.9999).all()
    assert (pairs.correlation_P <= 1).all()


def test_flat_thumbnails_have_no_copies_and_cost_nothing():
    pixels = np.zeros((3, 40, 40), np.uint8)
    pixels[2] = 200
    index = CopyIndex(pixels, spectrum(pixels))
    assert len(index) == len(index.search(0, 3)) == 0
    assert not any(correlations(pixels, pixels, k).any() for k in range(8))


def test_equal_pixels_pair_with_their_first_and_the_unreadable_with_nothing():
    pairs, first = exact_pairs(["a", "", "b", "a", "", "a"])
    assert (pairs.left_P.tolist(), pairs.right_P.tolist()) == ([0, 0], [3, 5])
    assert first.tolist() == [0, 2]
    assert join_components(6, pairs.left_P, pairs.right_P).tolist() == [0, 1, 2, 0, 3, 0]


def catalog_of(*rows):
    """(pixels, label, patient) each; empty pixels for a scan that could not be read."""
    return pa.table(
        {
            "scan_id": [f"scan{i}" for i in range(len(rows))],
            "member": [f"{row[1]}/{i}.png" for i, row in enumerate(rows)],
            "pixel_sha256": [row[0] * 64 for row in rows],
            "label": [row[1] for row in rows],
            "patient": [row[2] if len(row) > 2 else "" for row in rows],
            "reason": ["" if row[0] else "corrupt_image" for row in rows],
        }
    )


def pairs_of(*ends):
    left, right = np.array(ends, np.int64).reshape(-1, 2).T
    return Pairs(left, right, np.ones(len(left), np.float32), np.zeros(len(left), np.int8))


def test_families_join_copies_and_groups_join_patients_too():
    catalog = catalog_of(
        ("c", "glioma"), ("b", "glioma"), ("a", "glioma", "P1"), ("d", "glioma", "P1"),
        ("", "glioma", "P1"), ("e", "glioma"),
    )  # fmt: skip
    catalog = copies.add_families(catalog, pairs_of((0, 1), (1, 2)))
    assert catalog["family"].to_pylist() == ["a" * 16] * 3 + ["d" * 16, "", "e" * 16]
    assert catalog["group"].to_pylist() == ["a" * 16] * 4 + ["", "e" * 16]


def test_a_conflict_is_between_copies_not_between_copies_of_copies():
    catalog = catalog_of(
        ("a", "glioma"), ("b", "glioma"), ("c", "pituitary"), ("d", "pituitary"),
        ("e", "glioma"), ("e", "meningioma"), ("f", ""), ("g", "glioma"),
    )  # fmt: skip
    pairs = pairs_of((0, 1), (1, 2), (2, 3), (4, 5), (6, 7))
    conflicts = copies.find_conflicts(catalog, pairs)
    assert conflicts == [[1, 2], [4, 5]]
    reasons = copies.leave_out_conflicts(catalog, conflicts)["reason"].to_pylist()
    assert reasons == ["", "label_conflict", "label_conflict", "", *["label_conflict"] * 2, "", ""]


def test_a_filled_in_docket_settles_conflicts(tmp_path):
    catalog = catalog_of(("a", "glioma"), ("b", "pituitary"), ("c", "glioma"), ("d", "meningioma"))
    pairs = pairs_of((0, 1), (2, 3))
    docket = tmp_path / "docket.csv"
    empty = copies.docket_csv(catalog, copies.find_conflicts(catalog, pairs)).decode()
    assert empty.splitlines()[1] == "1,scan0,glioma/0.png,glioma,"
    space = LABEL_SPACES["four_class"]
    docket.write_text(empty)
    assert copies.read_docket(str(docket), space) == {}
    lines = empty.splitlines()
    filled = [lines[0], lines[1] + "Pituitary Tumor", lines[2], lines[3] + "drop", lines[4]]
    docket.write_text("\ufeff" + "\r\n".join(filled), encoding="utf-8")  # as spreadsheets save it
    decisions = copies.read_docket(str(docket), space)
    assert decisions == {"scan0": "pituitary", "scan2": "drop"}
    settled = copies.resolve(catalog, decisions)
    assert settled["label"].to_pylist() == ["pituitary", "pituitary", "glioma", "meningioma"]
    assert settled["reason"].to_pylist() == ["", "", "dropped", ""]
    assert copies.find_conflicts(settled, pairs) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("scan,decision\na,drop\n", "no column scan_id"),
        ("", "no column decision and scan_id"),
        ("scan_id;decision\na;perhaps\n", "line 2: 'perhaps'"),
        ("scan_id,decision\na,perhaps\nb,glioma\nc,hm\n", "line 2: 'perhaps'; line 4: 'hm'"),
        ("scan_id,decision\na,drop\na,glioma\n", "line 3: scan a was decided otherwise"),
        ('scan_id,decision\na,"dr', "not a CSV file"),
        ("scan_id,decision\na,tumor\n", "'tumor'; a decision is one of glioma, meningioma"),
    ],
)
def test_a_docket_that_cannot_be_obeyed_is_refused_with_every_fault(tmp_path, text, complaint):
    docket = tmp_path / "docket.csv"
    docket.write_text(text)
    with pytest.raises(UsageError, match=complaint):
        copies.read_docket(str(docket), LABEL_SPACES["four_class"])


def test_a_docket_is_safe_in_a_spreadsheet_and_kept_when_it_holds_decisions(tmp_path):
    catalog = catalog_of(("a", "glioma"), ("a", "pituitary"))
    catalog = catalog.set_column(1, "member", pa.array(["=HYPERLINK(1)/a.png", "b.png"]))
    docket = tmp_path / "docket.csv"
    assert not copies.has_decisions(str(docket))
    docket.write_bytes(copies.docket_csv(catalog, [[0, 1]]))
    assert ",'=HYPERLINK(1)/a.png," in docket.read_text()
    assert not copies.has_decisions(str(docket))
    docket.write_bytes(copies.docket_csv(catalog, [[0, 1]], {"scan1": "drop"}))
    assert copies.has_decisions(str(docket))
    assert copies.read_docket(str(docket), LABEL_SPACES["four_class"]) == {"scan1": "drop"}
    docket.write_text("conflict;scan_id;member;label;decision\n1;scan1;b.png;pituitary;drop\n")
    assert copies.has_decisions(str(docket)), "as a spreadsheet saves it where commas are decimal"
    assert copies.read_docket(str(docket), LABEL_SPACES["four_class"]) == {"scan1": "drop"}
    docket.write_text('scan_id,decision\n"')
    assert copies.has_decisions(str(docket)), "what cannot be understood is not overwritten"


def test_a_docket_of_another_source_or_of_no_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="the first is scan9; was it written for another source"):
        copies.resolve(catalog_of(("a", "glioma")), {"scan9": "drop"})
    with pytest.raises(UsageError, match="FileNotFoundError"):
        copies.read_docket(str(tmp_path / "none.csv"), LABEL_SPACES["four_class"])
