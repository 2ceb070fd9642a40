"""The seal of the test split."""

import pyarrow as pa
import pytest

from bt_core import storage
from bt_core.data.catalog import Dataset, DatasetInfo
from bt_core.data.seal import openings
from bt_core.data.splits import SplitPlan
from bt_core.data.views import read_view
from bt_core.errors import SealedError
from bt_core.labels import LABEL_SPACES


@pytest.fixture
def dataset(tmp_path):
    splits = ["train", "validation", "test", ""]
    table = pa.table({"scan_id": list("abcd"), "pixel_sha256": list("ABCA"), "split": splits})
    storage.write_table(str(tmp_path / "catalog.parquet"), table)
    info = DatasetInfo(
        source="s", label_space=LABEL_SPACES["binary"], plan=SplitPlan(), num_scans=4,
        num_left_out={}, num_skipped={}, num_families=3, digest="d",
    )  # fmt: skip
    return Dataset(str(tmp_path), info)


def test_test_rows_and_pixels_are_refused_with_the_reason(dataset):
    for read in (lambda: dataset.split("test"), lambda: read_view(dataset.location, "test")):
        with pytest.raises(SealedError, match="only bt evaluate reads test scans"):
            read()
    with pytest.raises(SealedError, match="'tune'"):
        dataset.open_test("tune", "x")
    assert dataset.num_openings() == 0, "what was refused was not an opening"
    assert dataset.catalog()["scan_id"].to_pylist() == ["a", "b", "d"]
    assert dataset.split("validation")["scan_id"].to_pylist() == ["b"]


def test_every_opening_is_on_record_and_counted_for_its_split(dataset):
    assert dataset.open_test("evaluate", "first")["scan_id"].to_pylist() == ["c"]
    dataset.open_test("evaluate", "second")
    assert [o.bundle_id for o in openings(dataset.location)] == ["first", "second"]
    assert dataset.num_openings() == 2
    grown = Dataset(dataset.location, dataset.info.model_copy(update={"digest": "e"}))
    assert grown.num_openings() == 0, "another split"
    assert set(openings(dataset.location)[0].model_dump()) == {
        "opened_at", "command", "bundle_id", "dataset_digest"
    }  # fmt: skip


def test_openings_that_were_recorded_under_older_names_count(dataset):
    old = {"opened_at": "2025-01-01T00:00:00+00:00", "command": "evaluate", "run_id": "first"}
    place = storage.join(dataset.location, "test_openings", "20250101T000000.000000Z-0.json")
    storage.write_json(place, old | {"dataset_digest": "d"})
    dataset.open_test("evaluate", "second")
    assert [o.bundle_id for o in openings(dataset.location)] == ["first", "second"]
    assert dataset.num_openings() == 2


def test_the_split_of_every_picture_is_known_without_opening(dataset):
    assert dataset.split_of_pixels() == {"A": "train", "B": "validation", "C": "test"}
    assert not openings(dataset.location)
