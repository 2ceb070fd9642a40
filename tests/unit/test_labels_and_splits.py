from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bt_core.data.catalog import label_refs
from bt_core.data.splits import SPLITS, grouped_split
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


groups_and_labels = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from("abc")), min_size=1, max_size=120
).map(lambda pairs: [(f"{label}{group}", label) for group, label in pairs])


@given(groups_and_labels, st.integers(0, 5))
def test_no_group_crosses_a_split_and_row_order_does_not_matter(pairs, seed):
    groups, labels = zip(*pairs, strict=True)
    splits = grouped_split(groups, labels, seed=seed)
    of_group = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        of_group[group].add(split)
    assert all(len(found) == 1 for found in of_group.values())
    assert set(splits) <= set(SPLITS)
    backwards = grouped_split(groups[::-1], labels[::-1], seed=seed)
    assert backwards[::-1] == splits


def test_shares_hold_for_each_class():
    labels = ["a"] * 1000 + ["b"] * 200
    splits = grouped_split([str(i) for i in range(1200)], labels)
    for label, total in (("a", 1000), ("b", 200)):
        counts = Counter(s for s, own in zip(splits, labels, strict=True) if own == label)
        assert counts == {"train": 0.7 * total, "validation": 0.15 * total, "test": 0.15 * total}


def test_the_seed_changes_the_split():
    groups, labels = [str(i) for i in range(100)], ["a"] * 100
    assert grouped_split(groups, labels, seed=0) != grouped_split(groups, labels, seed=1)


def test_a_group_with_two_labels_and_bad_fractions_are_refused():
    with pytest.raises(ValueError, match="labels a and b"):
        grouped_split(["g", "g"], ["a", "b"])
    with pytest.raises(ValueError, match="sum to 1"):
        grouped_split(["g"], ["a"], fractions=(0.5, 0.5, 0.5))


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
