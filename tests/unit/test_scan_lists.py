"""Lists of scans in CSV and Parquet: paths, labels, splits, and patients who stay unnamed."""

import hashlib
import hmac
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bt_core.data.catalog import label_refs
from bt_core.errors import SourceError, StoreError, UsageError
from bt_core.scans.archives import list_scans, read_member
from bt_core.scans.identity import hash_key, keyed_hash
from tests.conftest import Lines
from tests.unit.sources import FILES, make_folder, make_zip, refusal

KEY = b"0123456789abcdef"
ROWS = {
    "path": ["glioma/a.png", "glioma/b.dcm", "no_tumor/a.png"],
    "label": ["Glioma", "glioma_tumor", "No Tumor"],
    "split": ["train", "Testing", ""],
    "patient": ["Doe^Jane", "Doe^Jane", ""],
    "age": ["41", "41", "55"],
}


def write_list(path: Path, columns: dict[str, list[str]], separator: str = ",") -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        rows = [columns.keys(), *zip(*columns.values(), strict=True)]
        path.write_text("".join(separator.join(row) + "\r\n" for row in rows), "utf-8-sig")
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(make_folder(tmp_path / "scans", FILES))


@pytest.mark.parametrize(
    ("name", "separator"), [("l.csv", ","), ("l.csv", ";"), ("l.TSV", "\t"), ("l.parquet", "")]
)
def test_a_list_gives_paths_labels_splits_and_hashed_patients(
    folder: Path, name: str, separator: str
) -> None:
    refs = list_scans(write_list(folder / name, ROWS, separator), KEY).refs
    assert {ref.member: read_member(ref) for ref in refs} == FILES
    assert [(ref.label, ref.given_split) for ref in refs] == list(
        zip(ROWS["label"], ROWS["split"], strict=True)
    )
    digest = hmac.new(KEY, b"Doe^Jane", hashlib.sha256).hexdigest()[:32]
    assert [ref.patient for ref in refs] == [digest, digest, ""]
    assert "Doe" not in repr(refs)
    table, _ = label_refs(refs, None)
    assert table["label"].to_pylist() == ["glioma", "glioma", "no_tumor"]
    assert table["given_split"].to_pylist() == ["train", "test", ""]
    assert table["patient"].to_pylist() == [digest, digest, ""]


@pytest.mark.parametrize("column", ["patient_id", "PatientID", "Patient ID", "SubjectId"])
@pytest.mark.parametrize("name", ["l.csv", "l.parquet"])
def test_the_column_of_patients_has_several_names(folder: Path, name: str, column: str) -> None:
    columns = {"path": ROWS["path"], column: ROWS["patient"]}
    refs = list_scans(write_list(folder / name, columns), KEY).refs
    assert refs[0].patient == refs[1].patient != ""


@pytest.mark.parametrize("name", ["l.csv", "l.parquet"])
def test_columns_that_are_not_used_are_named(folder: Path, lines: Lines, name: str) -> None:
    columns = {"File": ROWS["path"], "pat": ROWS["patient"], "age": ROWS["age"]}
    list_scans(write_list(folder / name, columns), KEY)
    assert "not used: pat, age (used: File as path)" in lines.text
    assert "Doe" not in lines.text


@pytest.mark.parametrize("name", ["l.csv", "l.parquet"])
def test_where_a_scan_comes_from_enters_the_catalog(folder: Path, name: str) -> None:
    columns = {"path": ROWS["path"], "label": ["glioma", "glioma", "no_tumor"]}
    columns |= {"Hospital": ["A", "B", ""], "orientation": ["axial", "axial", "coronal"]}
    table, _ = label_refs(list_scans(write_list(folder / name, columns)).refs, None)
    assert table["site"].to_pylist() == ["A", "B", ""]
    assert table["plane"].to_pylist() == ["axial", "axial", "coronal"]
    assert not {"scanner", "sequence", "source"} & set(table.column_names)


@pytest.mark.parametrize("value", ["/ward/1.dcm", "Doe^Jane", "jane@example.org", "C:\\scans"])
@pytest.mark.parametrize("name", ["l.csv", "l.parquet"])
def test_origins_that_may_name_a_person_are_left_out(
    folder: Path,
    name: str,
    value: str,
    lines: Lines,
) -> None:
    columns = {"path": ROWS["path"], "site": ["A", value, ""], "plane": ["axial"] * 3}
    refs = list_scans(write_list(folder / name, columns)).refs
    assert value not in str(refs)
    assert "axial" in str(refs)
    assert "the list's site is not used" in lines.text
    assert value not in lines.text


def test_origins_of_too_many_values_are_left_out(folder: Path) -> None:
    paths = [ROWS["path"][0]] * 50
    for num, is_kept in ((20, True), (21, False)):
        columns = {"path": paths, "source": [f"study {i % num}" for i in range(50)]}
        refs = list_scans(write_list(folder / f"{num}.csv", columns)).refs
        assert any(ref.attributes and any(ref.attributes) for ref in refs) == is_kept


def test_origins_that_are_no_texts_do_not_cost_the_list(folder: Path) -> None:
    table = pa.table(
        {
            "path": ROWS["path"],
            "orientation": [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]],
            "site": [1.0, float("nan"), None],
        }
    )
    pq.write_table(table, folder / "l.parquet")
    refs = list_scans(str(folder / "l.parquet")).refs
    assert [ref.attributes[0] for ref in refs] == ["1", "", ""]


def test_patients_are_left_out_without_a_key(folder: Path) -> None:
    refs = list_scans(write_list(folder / "l.csv", ROWS)).refs
    assert {ref.patient for ref in refs} == {""}


def test_placeholders_of_a_list_are_no_patients(folder: Path) -> None:
    columns = ROWS | {"patient": ["ANONYMOUS", " n/a", "000"]}
    refs = list_scans(write_list(folder / "l.csv", columns), KEY).refs
    assert {ref.patient for ref in refs} == {""}


def test_a_relative_path_has_the_id_of_the_folder(folder: Path) -> None:
    listed = {ref.member: ref.scan_id for ref in list_scans(str(folder)).refs}
    refs = list_scans(write_list(folder / "l.csv", ROWS)).refs
    assert {ref.member: ref.scan_id for ref in refs} == listed


@pytest.mark.parametrize("column", ["path", "file", "uri", "filename", " Path "])
def test_the_column_of_paths_has_several_names(folder: Path, column: str) -> None:
    refs = list_scans(write_list(folder / "l.csv", {column: ["glioma/a.png"]})).refs
    assert [read_member(ref) for ref in refs] == [b"first"]


def test_paths_may_be_absolute_uris_and_equal(folder: Path, tmp_path: Path) -> None:
    other = Path(make_folder(tmp_path / "other place", {"ä b.png": b"fourth"})) / "ä b.png"
    paths = [
        str(other),
        other.as_uri(),
        "glioma/a.png",
        "glioma/a.png",
        "../other place/ä b.png",
        f"file://{folder}/glioma/b.dcm",
    ]
    refs = list_scans(write_list(folder / "l.csv", {"path": paths})).refs
    expected = [b"fourth", b"fourth", b"first", b"first", b"fourth", b"second"]
    assert [read_member(ref) for ref in refs] == expected
    assert len({ref.scan_id for ref in refs}) == 6
    assert [ref.member for ref in refs[:2]] == ["ä b.png", "ä b.png"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nowhere.png", "io_error"),
        ("", "io_error"),
        ("glioma", "io_error"),
        ("foo://nowhere/a.png", "io_error"),
        ("pipe", "unsupported_member"),
        ("more.zip", "nested_archive"),
        ("/dev/zero", "unsupported_member"),
    ],
)
def test_a_row_that_cannot_be_read_spares_the_others(folder: Path, path: str, reason: str) -> None:
    os.mkfifo(folder / "pipe")
    make_zip(folder / "more.zip", list(FILES.items()))
    columns = {"path": [path, "glioma/a.png"], "label": ["glioma", "glioma"]}
    bad, good = list_scans(write_list(folder / "l.csv", columns)).refs
    assert refusal(bad).reason == reason
    assert read_member(good) == b"first"


def test_a_row_of_no_file_is_told_from_a_node_without_the_mount(folder: Path) -> None:
    mount = Path(make_folder(folder.parent / "mount", {"JOHN_DOE/a.png": b"x"}))
    (folder.parent / "empty").mkdir()
    paths = [f"{mount}/JOHN_DOE/a.png", f"{mount}/none/b.png", f"{folder.parent}/empty/c.png"]
    refs = list_scans(write_list(folder / "l.csv", {"path": paths})).refs
    assert read_member(refs[0]) == b"x"
    assert [refusal(ref).reason for ref in refs[1:]] == ["io_error"] * 2
    shutil.rmtree(mount)
    mount.mkdir()
    for ref in refs[:2]:
        with pytest.raises(StoreError, match=f"{mount} is not there, or is empty; .* mount it"):
            read_member(ref)
    assert refusal(refs[2]).reason == "io_error"


def test_a_list_names_also_what_a_folder_would_skip(folder: Path) -> None:
    (folder / ".hidden.txt").write_bytes(b"x")
    [ref] = list_scans(write_list(folder / "l.csv", {"path": [".hidden.txt"]})).refs
    assert read_member(ref) == b"x"


def test_a_folder_with_a_list_stays_a_folder(folder: Path) -> None:
    write_list(folder / "l.csv", {"path": ["glioma/a.png"]})
    listing = list_scans(str(folder))
    assert len(listing.refs) == 3
    assert listing.skipped == {"not a scan": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.csv", b"image,label\na.png,glioma\n", "name it path, file, uri, filename"),
        ("l.csv", b"", "not a readable list"),
        ("l.csv", b"path\n\xff\xfe.png\n", "save it as CSV in UTF-8"),
        ("l.csv", b'path\n"Doe^Jane\n', "not a readable list"),
        ("l.csv", b"path\n", "holds no scans"),
        ("l.parquet", b"not Parquet", "not a readable list"),
    ],
)
def test_a_list_that_cannot_be_used_says_what_to_do(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        list_scans(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert "Doe" not in str(caught.value)


@pytest.mark.parametrize("name", ["l.csv", "l.parquet"])
def test_a_list_may_be_too_long(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    source = write_list(folder / name, ROWS)
    monkeypatch.setenv("BT_MAX_MEMBERS", "2")
    with pytest.raises(SourceError, match="limit of 2; set BT_MAX_MEMBERS"):
        list_scans(source)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [("label", "metastasis", "'metastasis'.*known names.*glioma"), ("split", "x", "'x'.*training")],
)
def test_an_unknown_word_is_answered_with_the_known_ones(
    folder: Path, column: str, value: str, message: str
) -> None:
    columns = ROWS | {column: [value, *ROWS[column][1:]]}
    with pytest.raises(SourceError, match=message):
        label_refs(list_scans(write_list(folder / "l.csv", columns)).refs, None)


def test_without_a_label_the_folder_decides(folder: Path) -> None:
    columns = ROWS | {"label": ["meningioma", "", ""]}
    table, _ = label_refs(list_scans(write_list(folder / "l.csv", columns)).refs, None)
    assert table["label"].to_pylist() == ["meningioma", "glioma", "no_tumor"]


def test_the_key_comes_from_the_environment_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_bytes(KEY + b"\n")
    monkeypatch.setenv("BT_HASH_KEY_FILE", str(tmp_path / "key"))
    assert hash_key() == (KEY, True)
    monkeypatch.setenv("BT_HASH_KEY", "another key of 24 bytes")
    assert hash_key() == (b"another key of 24 bytes", True)


def test_a_key_of_no_site_lasts_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BT_HASH_KEY", raising=False)
    monkeypatch.delenv("BT_HASH_KEY_FILE", raising=False)
    key, is_stable = hash_key()
    assert (len(key), is_stable, hash_key()) == (32, False, (key, False))
    code = "from bt_core.scans.identity import hash_key; print(hash_key()[0].hex())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() not in ("", key.hex())


@pytest.mark.parametrize("key", ["", "   ", "short", "x" * 15])
def test_a_key_that_could_be_guessed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("BT_HASH_KEY", key)
    with pytest.raises(UsageError, match="at least 16"):
        hash_key()
    monkeypatch.delenv("BT_HASH_KEY")
    (tmp_path / "key").write_text(key)
    monkeypatch.setenv("BT_HASH_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(UsageError, match="at least 16"):
        hash_key()


def test_a_key_file_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BT_HASH_KEY_FILE", "/nowhere/key")
    with pytest.raises(UsageError, match="/nowhere/key cannot be read"):
        hash_key()


def test_hashes_depend_on_value_and_key() -> None:
    hashes = {keyed_hash(v, k) for v in ("a", "b") for k in (KEY, KEY[::-1])}
    assert len(hashes) == 4
    assert all(len(h) == 32 and set(h) <= set("0123456789abcdef") for h in hashes)
    # RFC 4231, test case 2, cut to 32 digits.
    expected = "5bdcc146bf60754e6a042426089575c7"
    assert keyed_hash("what do ya want for nothing?", b"Jefe") == expected
