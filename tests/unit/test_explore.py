"""What a source looks like: measurements, statistics against scipy, the probe, and the page."""

import json
import re

import cv2
import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from bt_core.data.catalog import label_refs
from bt_core.data.explore import choose, class_tests, describe_source, holm, read_rows
from bt_core.data.explore_page import figures, write_exploration
from bt_core.data.explore_stage import (
    SIDE_PX,
    ExploreStage,
    block_means,
    border_mask,
    unpacked,
)
from bt_core.data.probe import probe_shortcuts
from bt_core.errors import UsageError
from bt_core.scans import views
from bt_core.scans.archives import list_scans
from bt_core.scans.phantom import phantom_slice
from bt_core.scans.preprocess import ClaheSpec, PreprocessSpec

SPEC = PreprocessSpec(size_px=48)
CLASSES = ("glioma", "meningioma", "no_tumor")


def scan(rng, side=SIDE_PX):
    """A noisy disc on black: nothing about it depends on its class."""
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    disc = (x**2 + y**2 < 0.16) * rng.uniform(80, 160)
    return np.clip(disc + rng.normal(10, 6, (side, side)), 0, 255).astype(np.uint8)


def explored(folder, num_per_class=12, change=None, seed=0, sampled=2_000, shown=2):
    """Write scans, with a class's pictures changed by `change`, and run the stage on them."""
    rng = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(num_per_class):
            image_HW = scan(rng)
            image_HW = change(name, image_HW) if change else image_HW
            cv2.imwrite(str(folder / name / f"{i}.png"), image_HW)
    return staged(folder, seed, sampled, shown)


def staged(folder, seed=0, sampled=2_000, shown=2):
    refs, _ = label_refs(list_scans(str(folder)).refs, None)
    chosen = choose(refs, sampled, shown, seed)
    columns = {name: np.array(chosen[name].to_pylist()) for name in chosen.column_names}
    return pa.table({k: v.tolist() for k, v in ExploreStage(SPEC)(columns).items()})


def probe(rows, seed=0):
    return probe_shortcuts(rows, rows["pixel_sha256"].to_pylist(), seed)


def test_a_scan_is_measured_as_numpy_does(tmp_path):
    rows = explored(tmp_path, num_per_class=3, sampled=4, shown=1)
    images = [cv2.imread(f"{r['uri']}/{r['member']}", 0) for r in rows.to_pylist()]
    for row, image_SS in zip(rows.to_pylist(), images, strict=True):
        assert image_SS.shape == (SIDE_PX, SIDE_PX), "written at the side that is measured"
        assert row["mean"] == pytest.approx(image_SS.mean())
        assert row["std"] == pytest.approx(image_SS.std())
        assert row["median"] == np.median(image_SS)
        assert (row["min"], row["max"]) == (image_SS.min(), image_SS.max())
        frame = image_SS.astype(float)
        frame[12:-12, 12:-12] = np.nan
        assert row["border_mean"] == pytest.approx(np.nanmean(frame))
        assert (row["channels"], row["width"]) == (1, SIDE_PX)
    counts = unpacked(rows["histogram"], np.uint16, (256,))
    assert np.array_equal(counts, [np.bincount(i.ravel(), minlength=256) for i in images])
    for row, image_SS in zip(rows.to_pylist(), images, strict=True):
        halved = np.rint(image_SS.reshape(60, 2, 60, 2).mean((1, 3), dtype=np.float32))
        expected = halved.astype(np.uint8).tobytes() if row["sampled"] else b""
        assert row["thumbnail"] == expected
        assert len(row["picture"]) == (256 * 256 if row["shown"] else 0)
        assert len(row["prepared"]) == (48 * 48 if row["shown"] else 0)
    assert sum(rows["sampled"].to_pylist()) == 4
    assert sum(rows["shown"].to_pylist()) == 3


def test_an_unreadable_scan_is_a_row_with_its_reason_and_in_no_figure(tmp_path):
    (tmp_path / "glioma").mkdir()
    (tmp_path / "glioma" / "bad.png").write_bytes(b"\x89PNG but not for long")
    (tmp_path / "glioma" / "colour.png").write_bytes(
        cv2.imencode(".png", np.random.default_rng(0).integers(0, 256, (40, 50, 3)))[1].tobytes()
    )
    (tmp_path / "no").mkdir()
    cv2.imwrite(str(tmp_path / "no" / "1.png"), scan(np.random.default_rng(1)))
    rows = staged(tmp_path)
    facts = describe_source(rows, ("glioma", "no_tumor"), seed=0)
    assert facts["unreadable"] == {"corrupt_image": 1}
    assert (facts["num_scans"], facts["num_read"]) == (3, 2)
    assert facts["counts"] == {"all": {"glioma": 1, "no_tumor": 1}}
    assert facts["properties"]["channels"]["max"] == 3
    assert facts["properties"]["aspect"]["max"] == pytest.approx(50 / 40)
    assert facts["tests"]["pairs"] == [], "three scans of a class are the fewest"
    assert probe(read_rows(rows))["verdict"]["level"] == "not probed"


def test_a_class_is_described_over_all_its_pixels(tmp_path):
    rows = explored(tmp_path, num_per_class=4)
    pixels = np.stack([cv2.imread(str(tmp_path / "glioma" / f"{i}.png"), 0) for i in range(4)])
    figures_ = describe_source(rows, CLASSES, seed=0)["intensity"]["glioma"]
    assert figures_["mean"] == pytest.approx(pixels.mean())
    assert figures_["std"] == pytest.approx(pixels.std())
    assert figures_["median"] == np.median(pixels)
    assert (figures_["min"], figures_["max"]) == (pixels.min(), pixels.max())
    assert figures_["std_of_scan_means"] == pytest.approx(pixels.mean((1, 2)).std())
    assert sum(figures_["histogram"]) == pytest.approx(1)


def test_copies_and_pictures_in_two_classes_are_counted(tmp_path):
    explored(tmp_path, num_per_class=3)
    same = (tmp_path / "glioma" / "0.png").read_bytes()
    (tmp_path / "glioma" / "again.png").write_bytes(same)
    (tmp_path / "no_tumor" / "too.png").write_bytes(same)
    facts = describe_source(staged(tmp_path), CLASSES, seed=0)
    assert facts["num_read"] - facts["num_distinct_pixels"] == 2
    assert facts["num_pixels_in_two_classes"] == 1


def test_the_choice_is_seeded_and_does_not_depend_on_the_order_of_the_rows():
    ids = [f"{i:020x}" for i in range(300)]
    labels = ["glioma" if i % 3 else "pituitary" for i in range(300)]
    refs = pa.table({"scan_id": ids, "label": labels, "given_split": ["train", "test"] * 150})

    def chosen(table, seed, column):
        table = choose(table, 50, 4, seed)
        return {r["scan_id"] for r in table.to_pylist() if r[column]}

    shuffled = refs.take(np.random.default_rng(1).permutation(300))
    for column, number in (("sampled", 50), ("shown", 4 * 2 * 2)):
        assert len(chosen(refs, 0, column)) == number
        assert chosen(refs, 0, column) == chosen(shuffled, 0, column)
        assert chosen(refs, 0, column) != chosen(refs, 1, column)


def test_normal_classes_get_a_t_test_and_others_a_rank_test():
    rng = np.random.default_rng(0)
    normal, moved = rng.normal(0, 1, 80), rng.normal(0.9, 2, 60)
    skewed = rng.exponential(1, 70)
    tests = class_tests({"x": {"a": normal, "b": moved, "c": skewed}}, seed=0)
    for name, values in (("a", normal), ("b", moved), ("c", skewed)):
        expected = stats.shapiro(values)
        found = tests["normality"]["x"][name]
        assert (found["statistic"], found["p"]) == pytest.approx(tuple(expected))
    ab, ac, _ = tests["pairs"]
    expected = stats.ttest_ind(normal, moved, equal_var=False)
    assert (ab["test"], ab["p"]) == ("Welch t", pytest.approx(expected.pvalue))
    pooled = np.sqrt((79 * normal.var(ddof=1) + 59 * moved.var(ddof=1)) / 138)
    assert ab["effect"] == pytest.approx((normal.mean() - moved.mean()) / pooled)
    expected = stats.mannwhitneyu(normal, skewed)
    assert (ac["test"], ac["p"]) == ("Mann-Whitney U", pytest.approx(expected.pvalue))
    delta = np.sign(normal[:, None] - skewed[None]).mean()
    assert ac["effect"] == pytest.approx(delta)
    assert ac["sentence"] == "differs, large effect"
    assert [p["p_holm"] for p in tests["pairs"]] == holm([p["p"] for p in tests["pairs"]])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_cannot_be_tested_is_said_and_not_guessed():
    flat, few = np.full(10, 7.0), np.array([1.0, 2.0])
    tests = class_tests({"x": {"a": flat, "b": flat, "c": few}}, seed=0)
    assert tests["normality"]["x"]["a"]["p"] is None
    (pair,) = tests["pairs"]
    assert (pair["p"], pair["effect"]) == (1.0, 0.0)
    assert pair["sentence"] == "no difference shown, negligible effect"


def test_a_large_class_is_sampled_for_shapiro_by_the_seed():
    values = {"x": {"a": np.random.default_rng(0).normal(size=6_000)}}
    one, again, other = (class_tests(values, s)["normality"]["x"]["a"] for s in (0, 0, 1))
    assert one["n"] == 5_000
    assert one == again != other


def white_border(name, image_HW):
    if name == "glioma":
        image_HW = image_HW.copy()
        image_HW[border_mask(SIDE_PX)] = 200
    return image_HW


def test_no_shortcut_is_found_where_none_is(tmp_path):
    result = probe(explored(tmp_path, num_per_class=40))
    assert result["verdict"]["level"] == "none", result["verdict"]
    assert result["chance"] == pytest.approx(1 / 3)
    for feature in result["features"].values():
        assert abs(feature["balanced_accuracy"] - 1 / 3) < 0.16
        assert feature["low"] <= feature["balanced_accuracy"] <= feature["high"]


def test_a_planted_border_is_found_by_what_sees_the_border(tmp_path):
    features = probe(explored(tmp_path, num_per_class=40, change=white_border))["features"]
    for name in ("border_only", "border_histogram", "intensity"):
        assert features[name]["low"] > 0.5, "one class of three is certain"
    verdict = probe(staged(tmp_path))["verdict"]
    assert verdict["level"] == "strong"
    assert "without seeing a tumour" in verdict["sentence"]


def test_a_planted_size_is_found_by_the_file_alone(tmp_path):
    def larger(name, image_HW):
        return cv2.resize(image_HW, (240, 240)) if name == "no_tumor" else image_HW

    features = probe(explored(tmp_path, num_per_class=40, change=larger))["features"]
    assert features["file"]["low"] > 0.5
    assert features["file"]["low"] > features["border_only"]["high"]


def test_copies_of_a_picture_do_not_teach_the_probe(tmp_path):
    """Each picture stands there five times; only whoever splits copies could know its class."""
    rng = np.random.default_rng(3)
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for i in range(14):
            content = cv2.imencode(".png", rng.integers(0, 256, (40, 40)).astype(np.uint8))[1]
            for copy in range(5):
                (tmp_path / name / f"{i}_{copy}.png").write_bytes(content.tobytes())
    rows = staged(tmp_path)
    honest = probe(rows)["features"]["thumbnail"]
    leaking = probe_shortcuts(rows, rows["scan_id"].to_pylist())["features"]["thumbnail"]
    assert leaking["balanced_accuracy"] > 0.95
    assert honest["balanced_accuracy"] < 0.6
    assert honest["high"] - honest["low"] > 0.15, "42 pictures, not 210"


def test_block_means_average_each_block():
    image = np.arange(16, dtype=np.uint8).reshape(1, 4, 4)
    assert block_means(image, 2).tolist() == [[[2, 4], [10, 12]]]  # 2.5 goes to the even number


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """An exploration whose first class is named by someone who means harm."""
    folder = tmp_path_factory.mktemp("explored")
    rows = explored(folder / "Patient_Jane_Doe", num_per_class=5, change=white_border)
    evil = "<script>alert('x')</script>$\\frac$"
    labels = [evil if label == "glioma" else label for label in rows["label"].to_pylist()]
    rows = rows.set_column(rows.column_names.index("label"), "label", pa.array(labels))
    facts = describe_source(rows, (evil, *CLASSES[1:]), seed=0)
    facts |= {"skipped": {"<b>why": 1}, "side_px": SIDE_PX, "seed": 0, "probe": probe(rows)}
    out = folder / "out"
    write_exploration(str(out), facts, figures(rows, facts, "<i>recipe", SPEC))
    return out, facts, rows


def test_the_page_needs_no_network_and_escapes_what_it_shows(written):
    page = (written[0] / "explore.html").read_text()
    assert "<script" not in page
    assert "<b>why" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert "url(" not in page
    assert "not a medical device" in page
    pictures = sorted(p.name for p in written[0].glob("*.png"))
    assert page.count("<img") == len(pictures) == page.count("data:image/png;base64,")
    assert all(cv2.imread(str(written[0] / name)) is not None for name in pictures)
    assert pictures == [
        "class_counts.png", "grid_all.png", "heat_maps.png", "image_properties.png",
        "intensity_by_class.png", "intensity_histograms.png", "preprocessing.png",
        "shortcut_probe.png", "views.png",
    ]  # fmt: skip


def test_numbers_are_strict_json_and_no_file_is_named(written):
    def refuse(constant):
        raise ValueError(constant)

    text = (written[0] / "explore.json").read_text()
    numbers = json.loads(text, parse_constant=refuse)
    assert numbers["probe"] == written[1]["probe"]
    assert numbers["counts"] == written[1]["counts"]
    page = (written[0] / "explore.html").read_text()
    assert "Jane" not in page + text
    assert "0.png" not in page.split("base64")[0]


def test_an_exploration_replaces_its_own_files_only(written, tmp_path):
    _, facts, rows = written
    drawn = {"class_counts": figures(rows, facts, "recipe", SPEC)["class_counts"]}
    every = dict.fromkeys(("class_counts", "grid_all", "preprocessing", "views", "heat_maps"))
    every |= dict.fromkeys(("image_properties", "intensity_histograms", "intensity_by_class"))
    every |= {"shortcut_probe": None}
    drawn = dict.fromkeys(every, drawn["class_counts"])
    out = tmp_path / "out"
    write_exploration(str(out), facts, drawn | {"grid_test": drawn["views"]})
    write_exploration(str(out), facts, drawn)
    assert not (out / "grid_test.png").exists(), "nothing of an earlier run is left"
    (out / "thesis.png").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"thesis\.png"):
        write_exploration(str(out), facts, drawn)
    assert (out / "thesis.png").read_bytes() == b"mine"


def test_pictures_leave_out_a_class_of_which_none_could_be_read(written):
    _, facts, rows = written
    flags = zip(rows["label"].to_pylist(), rows["shown"].to_pylist(), strict=True)
    without_one = rows.filter(pa.array([not (n == "no_tumor" and shown) for n, shown in flags]))
    assert len(figures(without_one, facts, "recipe", SPEC)["views"][1].axes) == 2 * 6
    without_any = rows.filter(pa.array([not shown for shown in rows["shown"].to_pylist()]))
    lost = set(figures(rows, facts, "r", SPEC)) - set(figures(without_any, facts, "r", SPEC))
    assert lost == {"grid_all", "preprocessing", "views"}


IMAGE = phantom_slice("glioma", 0, 100)


@pytest.mark.parametrize(
    "view",
    [
        views.threshold,
        views.dilation,
        views.key_points,
        views.equalised,
        lambda image_HW: views.clahe(image_HW, ClaheSpec(grid=16)),
    ],
)
def test_a_view_keeps_the_size_and_leaves_its_input_alone(view):
    before = IMAGE.copy()
    seen = view(IMAGE)
    assert seen.shape[:2] == IMAGE.shape
    assert seen.dtype == np.uint8
    assert (seen.reshape(100, 100, -1) != before[..., None]).any()
    assert np.array_equal(IMAGE, before)


def test_views_are_what_they_say():
    assert np.array_equal(views.threshold(IMAGE), np.where(IMAGE > 70, 255, 0))
    dot = np.zeros((40, 40), np.uint8)
    dot[20, 20] = 90
    assert (views.dilation(dot) == 90).sum() == 36
    drawn = views.key_points(IMAGE)
    assert drawn.shape == (100, 100, 3)
    assert (drawn[..., 0] != drawn[..., 2]).any(), "circles are in colour"
