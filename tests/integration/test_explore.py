"""The command, on a small archive with a file that cannot be read, and on one without classes."""

import json
import zipfile

import pytest

from bt_core.scans.phantom import write_archive
from tests.conftest import bt

pytestmark = pytest.mark.integration


def test_explore_describes_an_archive_and_counts_what_it_could_not_read(
    ray_session, tmp_path, capsys
):
    archive, out = tmp_path / "scans.zip", tmp_path / "out"
    write_archive(str(archive), num_per_class=6, size_px=64)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("Training/glioma/broken.png", b"\x89PNG but not for long")
        file.writestr("readme.txt", b"words")
    assert bt("explore", archive, "-o", out, "--recipe", "cnn_small") == 3
    printed = capsys.readouterr().out
    assert "corrupt_image 1" in printed
    assert "explore.html" in printed
    facts = json.loads((out / "explore.json").read_text())
    assert (facts["num_scans"], facts["num_read"]) == (25, 24)
    assert facts["skipped"] == {"not a scan": 1}
    assert sum(sum(c.values()) for c in facts["counts"].values()) == 24
    assert set(facts["counts"]) == {"train", "test"}
    assert facts["num_read"] - facts["num_distinct_pixels"] == 4, "the archive has planted copies"
    assert len(facts["probe"]["features"]) == 6
    assert sorted(p.name for p in out.glob("*.png")) == sorted(facts["pictures"])
    assert "broken" not in (out / "explore.html").read_text()
    (out / "notes.txt").write_text("mine")
    assert bt("explore", archive, "-o", out) == 2
    assert "notes.txt" in capsys.readouterr().err


def test_a_source_without_classes_is_explored_as_one(ray_session, tmp_path, capsys):
    archive, out = tmp_path / "scans.zip", tmp_path / "out"
    write_archive(str(archive), num_per_class=2, size_px=64, labelled=False)
    assert bt("explore", archive, "-o", out) == 0
    facts = json.loads((out / "explore.json").read_text())
    assert facts["counts"] == {"all": {"unlabelled": 8}}
    assert facts["probe"]["verdict"]["level"] == "not probed"
    assert facts["tests"]["pairs"] == []
    assert "Not probed" in (out / "explore.html").read_text()
