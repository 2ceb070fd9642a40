"""Real scans, where they are at hand: BT_DATASET is the archive, BT_WEIGHTS a weights source."""

import json
import os
from collections import defaultdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bt_core.data.catalog import ref_columns
from bt_core.data.decode_stage import DecodeStage
from bt_core.data.pipeline import decode_catalog
from bt_core.scans.archives import list_scans
from bt_core.scans.gate import GATE_DEFERS, GATE_REJECTS
from tests.conftest import bt

DATASET, WEIGHTS = os.environ.get("BT_DATASET"), os.environ.get("BT_WEIGHTS")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not DATASET, reason="BT_DATASET is not set"),
]


@pytest.fixture(scope="module")
def prepared(ray_session, tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "data"
    assert bt("prepare", DATASET, "-o", out) in (0, 3)
    return out


def test_every_file_is_in_the_catalog_and_no_copy_crosses_a_split(prepared):
    catalog = pq.read_table(prepared / "catalog.parquet").to_pylist()
    assert len(catalog) == 5966
    splits = defaultdict(set)
    for row in catalog:
        if row["split"]:
            splits[row["pixel_sha256"]].add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert len(splits) < len(catalog), "the set is known to hold exact copies"
    crossed = defaultdict(set)
    for row in catalog:
        crossed[row["pixel_sha256"]].add(row["given_split"])
    assert any(len(given) > 1 for given in crossed.values()), "its own split lets copies cross"


def test_the_gate_lets_real_scans_pass(ray_session):
    refs = pa.table(ref_columns(list_scans(DATASET).refs[::4]))
    gates = decode_catalog(refs, DecodeStage(gated=True))["gate"].to_pylist()
    rejected, deferred = (
        sum(gate in reasons for gate in gates) / len(gates)
        for reasons in (GATE_REJECTS, GATE_DEFERS)
    )
    assert rejected < 0.005
    assert 0 < deferred < 0.02, "some do hold coloured banners and text"


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS, reason="BT_WEIGHTS is not set")
@pytest.mark.timeout(3600)
def test_mobilenetv2_reaches_its_accuracy(prepared, tmp_path):
    run, bundle, report = tmp_path / "run", tmp_path / "bundle", tmp_path / "report"
    weights = f"model.weights={WEIGHTS}"
    train = ["train", "--recipe", "mobilenetv2", "--data", prepared, "--set", weights]
    assert bt(*train, "-o", run) == 0
    assert bt("ensemble", run, "-o", bundle) == 0
    assert bt("evaluate", bundle, "--data", prepared, "-o", report) == 0
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["clean"]["num_scans"] == 899
    assert metrics["clean"]["by_scan"]["accuracy"]["value"] >= 0.94
    assert pq.read_table(report / "predictions.parquet").num_rows == 899
