"""`bt optimise` on the chain's bundle, and scoring with what it writes."""

import json
import shutil

import pyarrow.parquet as pq
import pytest

from bt_core.data.catalog import Dataset
from bt_core.data.seal import openings
from bt_core.inference.optimise import name_of
from bt_core.inference.predictor import Predictor
from bt_core.models.bundle import Bundle
from tests.conftest import bt

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def fast(chain, tmp_path_factory):
    """The chain's bundle, optimised so strictly that float32 alone passes."""
    out = tmp_path_factory.mktemp("optimise") / "fast"
    opened = len(openings(str(chain.data)))
    options = ["--max-flips", 0, "--max-change", 0.0005, "--only", "openvino", "--min-scans", 1]
    assert bt("optimise", chain.bundle, "--data", chain.data, "-o", out, *options) == 0
    assert len(openings(str(chain.data))) == opened, "the test split stays sealed"
    return out


def test_the_outcome_is_written_and_the_fastest_accepted_one_runs(chain, fast):
    before, after = Bundle(str(chain.bundle)), Bundle(str(fast))
    assert after.info.bundle_id != before.info.bundle_id
    assert after.training_index() == before.training_index()
    for kept in ("review", "temperature", "metrics", "label_space"):
        assert getattr(after.info, kept) == getattr(before.info, kept)
    found = after.info.provenance["runtimes"]
    validation = Dataset(str(chain.data)).split("validation")
    assert found["num_scans"] == validation.num_rows
    assert found["bundle_id"] == before.info.bundle_id
    assert found["num_threads"] == 1
    assert set(found["versions"]) == {"torch", "openvino", "nncf"}
    for member in after.info.members:
        rows = found["members"][member.name]
        names = [row["name"] for row in rows]
        alone = [name for name in names if "below" not in name]
        assert alone == ["torch fp32", "openvino fp32", "openvino bf16", "openvino int8"]
        accepted = [row for row in rows if row["accepted"]]
        best = max(accepted, key=lambda row: row["images_per_second"])
        assert name_of(member.runtime) == best["name"] == found["chosen"][member.name]
        assert member.runtime.exact_below == best["exact_below"]
        assert rows[1]["accepted"], "float32 is float32"
        refused = [row for row in rows if not row["accepted"]]
        assert all(row["why_not"] for row in refused)
        exported = {p.split("/")[-1] for p in after.info.files if f"/{member.name}/openv" in p}
        assert exported == set(member.runtime.exports)
    assert found["ensemble"]["label_flips"] == 0
    assert found["ensemble"]["max_change"] <= 0.0005
    assert 0 < found["ensemble"]["label_flips_below"] < 0.5
    card = (fast / "MODEL_CARD.md").read_text()
    assert "times the reference's rate" in card
    assert str(chain.root) not in json.dumps(after.info.provenance)


def test_the_optimised_bundle_scores_the_archive_alike(chain, fast, tmp_path):
    bundle = Bundle(str(fast))
    asked = {m.name: f"{m.runtime.kind} {m.runtime.precision}" for m in bundle.info.members}
    assert Predictor(bundle).runtime_names == asked
    assert bt("score", fast, chain.archive, "-o", tmp_path / "scores") == 0
    folders = (chain.scores / "scores", tmp_path / "scores" / "scores")
    slow, quick = (
        {row["scan_id"]: row for row in pq.read_table(f, partitioning=None).to_pylist()}
        for f in folders
    )
    assert slow.keys() == quick.keys()
    for scan_id, row in slow.items():
        assert quick[scan_id]["predicted_label"] == row["predicted_label"]
        assert quick[scan_id]["confidence"] == pytest.approx(row["confidence"], abs=0.0005)


@pytest.mark.slow
def test_a_bundle_can_be_optimised_again_and_back(chain, fast, tmp_path, capsys):
    """Where nothing but the reference passes, no export of an earlier time stays behind."""
    out = tmp_path / "again"
    options = ["--max-change", 0, "--only", "openvino", "--scans", 6]
    assert bt("optimise", fast, "--data", chain.data, "-o", out, *options) == 0
    printed = capsys.readouterr().out
    assert "6 validation scans, images per second of CPU time on 1 thread" in printed
    assert "chosen" in printed
    info = Bundle(str(out)).info
    for member in info.members:
        if member.runtime.kind == "torch":
            assert f"members/{member.name}/openvino.xml" not in info.files
        else:
            assert info.provenance["runtimes"]["members"][member.name][1]["max_change"] == 0


def test_what_is_wrong_is_refused_before_anything_is_measured(chain, tmp_path, capsys):
    other = tmp_path / "data"
    shutil.copytree(chain.data, other, ignore=shutil.ignore_patterns("views"))
    facts = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps({**facts, "digest": "0" * 64}))
    assert bt("optimise", chain.bundle, "--data", other, "-o", tmp_path / "fast") == 2
    assert "is not the dataset that bundle" in capsys.readouterr().err
    assert bt("optimise", chain.bundle, "--data", chain.data, "-o", chain.bundle) == 2
    assert "is the bundle itself" in capsys.readouterr().err
    taken = tmp_path / "taken"
    taken.mkdir()
    args = ["optimise", chain.bundle, "--data", chain.data, "-o", taken]
    assert bt(*args) == 2
    assert "exists; choose another -o" in capsys.readouterr().err
    assert bt(*args, "--overwrite") == 2
    assert "is not a bundle" in capsys.readouterr().err
    assert bt(*args, "--only", "onnx") == 2
    assert "--only onnx: use compiled or openvino" in capsys.readouterr().err
    assert not (tmp_path / "fast").exists()
