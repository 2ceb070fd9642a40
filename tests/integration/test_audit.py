"""`bt audit` and what `bt prepare` does with copies, through the commands."""

import csv
import hashlib
import json
import os
import re
import zipfile

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from bt_core.data.catalog import Dataset
from bt_core.scans.phantom import CLASS_NAMES, phantom_slice
from bt_core.scans.thumbnails import transformed
from tests.conftest import bt
from tests.unit.test_families import all_pairs, perturbed

DATASET = os.environ.get("BT_DATASET")
pytestmark = pytest.mark.integration


def write(archive, name, image):
    archive.writestr(name, cv2.imencode(".png", np.ascontiguousarray(image))[1].tobytes())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """12 scans of each class; 8 test scans are turned or perturbed copies; one conflict."""
    path = tmp_path_factory.mktemp("copies") / "scans.zip"
    rng = np.random.default_rng(1)
    doubted = phantom_slice("pituitary", 99, 96)
    with zipfile.ZipFile(path, "w") as archive:
        for name in CLASS_NAMES:
            slices = [phantom_slice(name, i, 96) for i in range(12)]
            for i, image in enumerate(slices):
                write(archive, f"{'Testing' if i > 9 else 'Training'}/{name}/{i}.png", image)
            write(archive, f"Testing/{name}/turned.png", transformed(slices[0], 3))
            write(archive, f"Testing/{name}/perturbed.png", perturbed(slices[1], rng))
        write(archive, "Training/glioma/doubted.png", doubted)
        write(archive, "Training/pituitary/doubted.png", doubted[:, ::-1])
        archive.writestr("Training/glioma/broken.png", b"\x89PNG\r\n\x1a\n")
    return path


@pytest.fixture(scope="module")
def audited(ray_session, source, tmp_path_factory):
    out = tmp_path_factory.mktemp("audit") / "audit"
    assert bt("audit", source, "-o", out) == 3, "one file cannot be read"
    return out


def test_the_figures_are_the_planted_ones(audited):
    figures = json.loads((audited / "audit.json").read_text())
    assert (figures["num_scans"], figures["num_readable"]) == (59, 58)
    assert sum(figures["unreadable"].values()) == 1
    assert [f["member"] for f in figures["unreadable_files"]] == ["Training/glioma/broken.png"]
    assert {own["num_scans_with_copies"] for own in figures["classes"].values()} == {4, 5}
    assert figures["exact_copies"]["num_redundant"] == 0
    assert figures["families"]["num"] == 49
    assert figures["families"]["by_size"] == {"1": 40, "2": 9}
    test = figures["across_splits"]["test"]
    assert test["all"] == {"num_scans": 16, "num_exact": 0, "num_copies": 8, "num_in_family": 8}
    copies_by_class = {name: own["num_copies"] for name, own in test["by_class"].items()}
    assert copies_by_class == dict.fromkeys(CLASS_NAMES, 2)
    conflicts = [{scan["label"] for scan in scans} for scans in figures["label_conflicts"]]
    assert conflicts == [{"glioma", "pituitary"}]


def test_the_page_is_self_contained_and_shows_the_pairs(audited):
    page = (audited / "audit.html").read_text()
    assert "8 of 16 test scans" in page
    assert 4 <= page.count("data:image/png;base64,") <= 1 + 8
    assert "label conflict 1" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "doubted" not in page, "file names may hold names of patients"


def test_every_pair_is_in_a_table(audited):
    pairs = pq.read_table(audited / "copies.parquet").to_pylist()
    assert len(pairs) == 9
    assert all(0.98 <= pair["correlation"] <= 1 for pair in pairs)
    assert sum(pair["transform"] == "rotated by 90°, mirrored" for pair in pairs) >= 4


def test_an_audit_does_not_overwrite_a_docket_in_silence(audited, source, capfd):
    assert bt("audit", source, "-o", audited) == 2
    assert "--overwrite" in capfd.readouterr().err


def test_prepare_keeps_families_together_and_obeys_the_docket(audited, source, tmp_path, capfd):
    data = tmp_path / "data"
    assert bt("prepare", source, "-o", data, "--recipe", "cnn_small") == 3
    catalog = pq.read_table(data / "catalog.parquet").to_pylist()
    split_of = {row["member"]: row["split"] for row in catalog}
    for name in CLASS_NAMES:
        assert split_of[f"Testing/{name}/turned.png"] == split_of[f"Training/{name}/0.png"]
        assert split_of[f"Testing/{name}/perturbed.png"] == split_of[f"Training/{name}/1.png"]
    assert sum(row["reason"] == "label_conflict" for row in catalog) == 2
    docket = tmp_path / "docket.csv"
    rows = list(csv.DictReader((data / "docket.csv").read_text().splitlines()))
    rows[[row["label"] for row in rows].index("glioma")]["decision"] = "pituitary"
    with docket.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    settled = tmp_path / "settled"
    words = ("--recipe", "cnn_small", "--resolve", docket, "--keep-splits", data)
    assert bt("prepare", source, "-o", settled, *words) == 3
    assert f"56 scans of {data}; 2 are new" in capfd.readouterr().out
    after = {row["member"]: row for row in pq.read_table(settled / "catalog.parquet").to_pylist()}
    assert {m for m, row in after.items() if row["reason"]} == {"Training/glioma/broken.png"}
    assert after["Training/glioma/doubted.png"]["label"] == "pituitary"
    assert all(after[member]["split"] == split for member, split in split_of.items() if split)
    kept = list(csv.DictReader((settled / "docket.csv").read_text().splitlines()))
    assert [row["decision"] for row in kept] == [row["decision"] for row in rows]
    before = {path: path.read_bytes() for path in settled.rglob("*.parquet")}
    again = ("prepare", source, "-o", settled, "--recipe", "cnn_small", "--overwrite")
    assert bt(*again) == 2, "it would empty the docket"
    docket.write_text("scan_id,decision\nnobody,drop\n")
    assert bt(*again, "--resolve", docket) == 2
    assert {path: path.read_bytes() for path in settled.rglob("*.parquet")} == before
    assert (settled / "dataset.json").exists(), "what goes wrong costs no dataset"


def test_the_given_split_is_kept_on_request_and_its_copies_are_counted(
    ray_session, source, tmp_path, capfd
):
    data = tmp_path / "data"
    assert bt("prepare", source, "-o", data, "--recipe", "cnn_small", "--split", "given") == 3
    catalog = pq.read_table(data / "catalog.parquet").to_pylist()
    given = [row for row in catalog if not row["reason"]]
    assert all((row["split"] == "test") == (row["given_split"] == "test") for row in given)
    copied = sum(row["copy_in_training"] for row in given)
    assert 0 < copied <= 8
    assert f"copied     {copied:>7} scans" in capfd.readouterr().out
    assert Dataset(str(data)).info.plan.by == "given"


@pytest.mark.skipif(not DATASET, reason="BT_DATASET is not set")
def test_an_audit_of_real_scans_is_what_brute_force_gives(ray_session, tmp_path):
    assert bt("audit", DATASET, "-o", tmp_path / "audit") == 0
    with zipfile.ZipFile(DATASET) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        contents = [np.frombuffer(archive.read(name), np.uint8) for name in names]
    images = [cv2.imdecode(content, cv2.IMREAD_GRAYSCALE) for content in contents]
    shrunk = [cv2.resize(image, (40, 40), interpolation=cv2.INTER_AREA) for image in images]
    near = all_pairs(np.stack(shrunk))
    same = {}
    for i, image in enumerate(images):
        same.setdefault((image.shape, image.tobytes()), []).append(i)
    different = {
        (i, j)
        for i, j in near
        if images[i].shape != images[j].shape or (images[i] != images[j]).any()
    }
    first_of = {i: rows[0] for rows in same.values() for i in rows}
    expected = {frozenset((first_of[i], first_of[j])) for i, j in different}

    number = {hashlib.sha256(f"{n}\0000".encode()).hexdigest()[:20]: i for i, n in enumerate(names)}
    table = pq.read_table(tmp_path / "audit" / "copies.parquet").to_pylist()
    ends = [(number[pair["left"]], number[pair["right"]]) for pair in table]
    found = {frozenset((first_of[i], first_of[j])) for i, j in ends if first_of[i] != first_of[j]}
    assert not found - expected, "no false pair"
    assert len(found & expected) >= 0.999 * len(expected)

    figures = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert figures["exact_copies"]["num_redundant"] == len(images) - len(same)
    training = {i for i, name in enumerate(names) if name.startswith("Training/")}
    copied = {i for pair in near for i in pair if training & set(pair)} - training
    test = figures["across_splits"]["test"]["all"]
    assert test["num_copies"] == len(copied) == 864
    exact = {i for rows in same.values() if training & set(rows) for i in rows} - training
    assert test["num_exact"] == len(exact) == 182
    label_of = [name.split("/")[1] for name in names]
    conflicts = {pair for pair in near if label_of[pair[0]] != label_of[pair[1]]}
    assert len(figures["label_conflicts"]) == len(conflicts) == 4
