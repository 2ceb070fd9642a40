from collections import Counter, defaultdict

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bt_core.data.catalog import label_refs
from bt_core.data.splits import SPLITS, SplitPlan, assign_splits, grouped_split
from bt_core.errors import REASONS, REJECTED_REASONS, ScanError, SourceError, status_of
from bt_core.labels import class_of_folder, infer_task, to_task
from bt_core.scans.archives import ScanRef


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("glioma", "glioma"),
        ("Glioma_Tumor", "glioma"),
        ("notumor", "no_tumor"),
        ("No Tumor", "no_tumor"),
        ("normal", "no_tumor"),
        ("no", "no_tumor"),
        ("yes", "tumor"),
        ("Brain Tumor", "tumor"),
        ("Healthy", "no_tumor"),
        ("pituitary-tumor", "pituitary"),
        ("metastasis", None),
        ("Training", None),
        ("", None),
    ],
)
def test_folder_names_mean_classes(folder, expected):
    assert class_of_folder(folder) == expected


def test_the_task_follows_from_the_classes_or_is_refused():
    assert infer_task({"glioma", "no_tumor"}) == "four_class"
    assert infer_task({"tumor", "no_tumor"}) == "binary"
    with pytest.raises(SourceError, match="--task binary"):
        infer_task({"tumor", "glioma"})
    assert to_task("glioma", "binary") == "tumor"
    assert to_task("no_tumor", "binary") == "healthy"
    assert to_task("tumor", "four_class") is None


def test_every_reason_has_a_meaning_and_a_status():
    assert set(REASONS) >= REJECTED_REASONS
    assert {status_of(reason) for reason in REASONS} == {"rejected", "failed"}
    with pytest.raises(ValueError, match="nonsense"):
        ScanError("nonsense")


THIRDS = (0.7, 0.15, 0.15)
groups_and_labels = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from("abc")), min_size=1, max_size=120
).map(lambda pairs: [(f"{label}{group}", label) for group, label in pairs])


@given(groups_and_labels, st.integers(0, 5))
def test_no_group_crosses_a_split_and_row_order_does_not_matter(pairs, seed):
    groups, labels = zip(*pairs, strict=True)
    splits = grouped_split(groups, labels, THIRDS, seed)
    of_group = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        of_group[group].add(split)
    assert all(len(found) == 1 for found in of_group.values())
    assert set(splits) <= set(SPLITS)
    for label in set(labels):
        own = {g: s for g, s, named in zip(groups, splits, labels, strict=True) if named == label}
        assert len(set(own.values())) == min(3, len(own)) or len(own) == 2
    backwards = grouped_split(groups[::-1], labels[::-1], THIRDS, seed)
    assert backwards[::-1] == splits


def test_shares_hold_for_each_class():
    labels = ["a"] * 1000 + ["b"] * 200
    splits = grouped_split([str(i) for i in range(1200)], labels, THIRDS)
    for label, total in (("a", 1000), ("b", 200)):
        counts = Counter(s for s, own in zip(splits, labels, strict=True) if own == label)
        assert counts == {"train": 0.7 * total, "validation": 0.15 * total, "test": 0.15 * total}


def test_the_seed_changes_the_split():
    groups, labels = [str(i) for i in range(100)], ["a"] * 100
    assert grouped_split(groups, labels, THIRDS, 0) != grouped_split(groups, labels, THIRDS, 1)


def test_added_scans_move_only_groups_at_the_cuts():
    groups, added = [str(i) for i in range(2000)], [f"new {i}" for i in range(200)]
    before = grouped_split(groups, ["a"] * 2000, THIRDS)
    after = grouped_split(groups + added, ["a"] * 2200, THIRDS)
    assert sum(x != y for x, y in zip(before, after, strict=False)) < 40


def test_a_group_counts_for_its_most_frequent_label():
    groups = ["mixed"] * 3 + [str(i) for i in range(9)]
    labels = ["a", "a", "b"] + ["a"] * 9
    splits = grouped_split(groups, labels, THIRDS)
    assert len(set(splits[:3])) == 1


def test_kept_splits_stay_and_the_others_fill_up():
    groups = [str(i) for i in range(100)]
    keep = {str(i): "test" for i in range(10)}
    splits = grouped_split(groups, ["a"] * 100, THIRDS, keep=keep)
    assert splits[:10] == ["test"] * 10
    assert Counter(splits) == {"train": 70, "validation": 15, "test": 15}


def test_bad_fractions_are_refused():
    for fractions in ((0.5, 0.5, 0.5), (1.0, 0.5, -0.5)):
        with pytest.raises(ValueError, match="sum to 1"):
            grouped_split(["g"], ["a"], fractions)


def families(num, **columns):
    """A catalog of num families of two scans each, of one class."""
    defaults = {
        "label": ["a"] * 2 * num,
        "given_split": [""] * 2 * num,
        "reason": [""] * 2 * num,
        "group": [str(i // 2) for i in range(2 * num)],
        "pixel_sha256": [f"pixels {i}" for i in range(2 * num)],
    }
    return pa.table({**defaults, **columns})


def test_splits_and_folds_are_by_group_and_leave_out_what_has_a_reason():
    catalog = families(50, reason=["corrupt_image"] + [""] * 99)
    table = assign_splits(catalog, SplitPlan()).to_pydict()
    assert (table["split"][0], table["fold"][0]) == ("", -1)
    assert not any(table["copy_in_training"])
    assert table["split"][2::2] == table["split"][3::2]
    assert table["fold"][2::2] == table["fold"][3::2]
    for split, fold in zip(table["split"], table["fold"], strict=True):
        assert (fold == -1) == (split in ("", "test"))
    assert set(table["fold"]) == {-1, 0, 1, 2, 3, 4}


def test_the_given_split_is_kept_and_its_copies_in_training_are_marked():
    given_split = ["train"] * 60 + ["train", "test"] * 10 + ["test"] * 20
    table = assign_splits(families(50, given_split=given_split), SplitPlan(by="given")).to_pydict()
    assert [s == "test" for s in table["split"]] == [s == "test" for s in given_split]
    assert 0.1 < Counter(table["split"])["validation"] / 70 < 0.25
    copied = [60 <= i < 80 and split == "test" for i, split in enumerate(given_split)]
    assert table["copy_in_training"] == copied
    assert set(table["split"][60:80:2]) == {"train"}, "validation chooses: it sees no test scan"
    with pytest.raises(SourceError, match="100 of 100 are not"):
        assign_splits(families(50), SplitPlan(by="given"))


def test_copies_across_a_given_validation_split_are_marked_too():
    given_split = ["train"] * 80 + ["validation", "test"] * 5 + ["train", "validation"] * 5
    table = assign_splits(families(50, given_split=given_split), SplitPlan(by="given")).to_pydict()
    assert table["split"] == given_split
    marked = [i for i, copied in enumerate(table["copy_in_training"]) if copied]
    assert marked == [81, 83, 85, 87, 89, 91, 93, 95, 97, 99]


def test_scans_of_an_earlier_dataset_keep_their_split_and_a_bridge_goes_to_training():
    first = assign_splits(families(50), SplitPlan()).to_pydict()
    previous = dict(zip(first["pixel_sha256"], first["split"], strict=True))
    grown = families(60, group=[str(max(i // 2, 1)) for i in range(120)])  # joins groups 0 and 1
    again = assign_splits(grown, SplitPlan(seed=7), previous).to_pydict()
    assert again["split"][4:100] == first["split"][4:]
    both = {first["split"][0], first["split"][2]}
    assert set(again["split"][:4]) == (both if len(both) == 1 else {"train"})


def refs_of(*members):
    return [ScanRef(f"{i}", "set", member, i) for i, member in enumerate(members)]


def labels_of(*members):
    return label_refs(refs_of(*members), None)[0]["label"].to_pylist()


def test_the_deepest_known_folder_gives_the_label_and_the_given_split_is_kept():
    members = ("Training/glioma/patient 1/a.png", "Testing/no_tumor/b.png")
    table, space = label_refs(refs_of(*members), None)
    assert table["label"].to_pylist() == ["glioma", "no_tumor"]
    assert table["given_split"].to_pylist() == ["train", "test"]
    assert space.task == "four_class"


def test_a_wrapper_named_like_a_split_decides_nothing():
    members = ("test/Training/glioma/a.png", "test/Testing/no_tumor/b.png")
    table, _ = label_refs(refs_of(*members), None)
    assert table["given_split"].to_pylist() == ["train", "test"]


def test_zips_made_on_windows_have_backslashes():
    assert labels_of("Training\\glioma\\a.png", "Training\\notumor\\b.png") == [
        "glioma",
        "no_tumor",
    ]


def test_a_wrapper_named_like_a_class_labels_nothing():
    assert labels_of("Brain Tumor/yes/a.png", "Brain Tumor/no/b.png") == ["tumor", "healthy"]
    with pytest.raises(SourceError, match="metastasis"):
        labels_of("Brain Tumor/yes/a.png", "Brain Tumor/no/b.png", "Brain Tumor/metastasis/c.png")


def test_one_class_alone_is_not_a_set():
    with pytest.raises(SourceError, match="one class only"):
        labels_of("glioma/a.png", "glioma/b.png")
