"""Sources are listed and read the same wherever they lie, and hostile archives do no harm."""

import os
import re
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bt_core.errors import ScanError, SourceError
from bt_core.scans.archives import ScanRef, list_scans, read_member

LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
FILES = {"glioma/a.png": b"first", "glioma/b.dcm": b"second", "no_tumor/a.png": b"third"}
OTHER_FILES = {
    ".hidden.png": "system file",
    ".cache/a.png": "system file",
    "__MACOSX/glioma/._a.png": "system file",
    "glioma/.DS_Store": "system file",
    "glioma/Thumbs.db": "system file",
    "desktop.ini": "system file",
    "README.md": "not a scan",
    "labels.CSV": "not a scan",
    "glioma/notes.txt": "not a scan",
    "meta.json": "not a scan",
}


def make_folder(path: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return str(path)


def make_zip(
    path: Path, members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED
) -> Path:
    """Write a zip; names stay as they are, and equal names do not warn as with `ZipFile`."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.NameToInfo.pop(name, None)
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return path


def refusal(ref: ScanRef) -> ScanError:
    with pytest.raises(ScanError) as caught:
        read_member(ref)
    return caught.value


def contents(source: str) -> dict[str, bytes]:
    return {ref.member: read_member(ref) for ref in list_scans(source).refs}


def patch(path: Path, change: Callable[[bytearray], object]) -> Path:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return make_folder(tmp_path / "scans", FILES)


@pytest.fixture
def archive(tmp_path: Path) -> str:
    return str(make_zip(tmp_path / "scans.zip", list(FILES.items()), zipfile.ZIP_DEFLATED))


def test_folder_and_zip_give_the_same_members_and_ids(folder: str, archive: str) -> None:
    assert contents(folder) == contents(archive) == FILES
    ids = {ref.member: ref.scan_id for ref in list_scans(folder).refs}
    assert ids == {ref.member: ref.scan_id for ref in list_scans(archive).refs}
    assert len(set(ids.values())) == len(FILES)
    assert all(re.fullmatch("[0-9a-f]{20}", scan_id) for scan_id in ids.values())


def test_ids_do_not_depend_on_where_the_source_lies(folder: str, tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "deeper" / "copy")
    shutil.copytree(folder, elsewhere)
    assert [ref.scan_id for ref in list_scans(folder).refs] == [
        ref.scan_id for ref in list_scans(elsewhere).refs
    ]


def test_ids_stay_the_same_between_versions(folder: str) -> None:
    assert list_scans(folder).refs[0].scan_id == "430d11521b02a9c5b0a2"


def test_a_single_file_is_a_source(folder: str) -> None:
    source = f"{folder}/glioma/b.dcm"
    [ref] = list_scans(source).refs
    assert (ref.uri, ref.member) == (f"{folder}/glioma", "b.dcm")
    assert read_member(ref) == b"second"


def test_a_source_may_be_relative(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = list_scans(folder).refs
    monkeypatch.chdir(Path(folder).parent)
    assert list_scans("scans").refs == list_scans("scans/").refs == refs


def test_a_uri_is_a_source(folder: str, archive: str) -> None:
    assert contents(f"file://{folder}") == contents(f"file://{archive}") == FILES


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_other_files_are_skipped_and_counted(tmp_path: Path, kind: str) -> None:
    files = FILES | {name: b"x" for name in OTHER_FILES}
    if kind == "folder":
        source = make_folder(tmp_path / "scans", files)
    else:
        source = str(make_zip(tmp_path / "scans.zip", list(files.items())))
    listing = list_scans(source)
    assert {ref.member for ref in listing.refs} == set(FILES)
    assert listing.skipped == {"system file": 6, "not a scan": 4}


def test_a_file_without_a_known_suffix_is_a_scan(tmp_path: Path) -> None:
    files = {"IM0001": b"x", "slice.nii": b"y"}
    assert contents(make_folder(tmp_path / "scans", files)) == files


def test_folders_inside_a_zip_are_no_scans(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "scans.zip", [("glioma/", b""), ("glioma/a.png", b"first")])
    assert contents(str(path)) == {"glioma/a.png": b"first"}


def test_equal_names_in_a_zip_are_different_scans(tmp_path: Path) -> None:
    members = [("a.png", b"first"), ("b.png", b"other"), ("a.png", b"second")]
    refs = list_scans(str(make_zip(tmp_path / "scans.zip", members))).refs
    assert [ref.member for ref in refs] == ["a.png", "b.png", "a.png"]
    assert [read_member(ref) for ref in refs] == [b"first", b"other", b"second"]
    assert len({ref.scan_id for ref in refs}) == 3


@pytest.mark.parametrize(
    "name",
    ["../../evil.png", "/etc/evil.png", "a/../../evil.png", "C:\\evil.png", "..\\evil.png"],
)
def test_a_name_that_points_outside_stays_data(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    source = str(make_zip(inside / "scans.zip", [(name, b"evil"), ("ok.png", b"good")]))
    before = sorted(tmp_path.rglob("*"))
    assert contents(source) == {name: b"evil", "ok.png": b"good"}
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/etc/evil.png").exists()


def test_a_leading_dot_slash_does_not_hide_a_scan(tmp_path: Path) -> None:
    source = str(make_zip(tmp_path / "scans.zip", [("./glioma/a.png", b"first")]))
    assert list(contents(source).values()) == [b"first"]


def set_encrypted(content: bytearray) -> None:
    """Set the encryption flag of the first member in both of its headers."""
    content[content.index(LOCAL) + 6] |= 1
    content[content.index(CENTRAL) + 8] |= 1


def set_unknown_method(content: bytearray) -> None:
    for position in (content.index(LOCAL) + 8, content.index(CENTRAL) + 10):
        content[position : position + 2] = struct.pack("<H", 97)


def flip_data(content: bytearray) -> None:
    content[content.index(b"first")] ^= 0xFF


def understate_size(content: bytearray) -> None:
    """Declare that the first member unpacks to two bytes."""
    position = content.index(CENTRAL) + 24
    content[position : position + 4] = struct.pack("<I", 2)


def spoil_local_header(content: bytearray) -> None:
    content[content.index(LOCAL)] = 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_encrypted, "member_encrypted"),
        (set_unknown_method, "archive_method_unsupported"),
        (flip_data, "member_corrupt"),
        (understate_size, "member_corrupt"),
        (spoil_local_header, "member_corrupt"),
    ],
)
def test_a_bad_member_has_a_reason_and_spares_the_others(
    tmp_path: Path, change: Callable[[bytearray], object], reason: str
) -> None:
    source = str(patch(make_zip(tmp_path / "scans.zip", list(FILES.items())), change))
    bad, *others = list_scans(source).refs
    assert refusal(bad).reason == reason
    assert [read_member(ref) for ref in others] == [b"second", b"third"]


def test_damaged_deflate_data_is_member_corrupt(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "scans.zip", [("a.png", os.urandom(500))], zipfile.ZIP_DEFLATED)

    def damage(content: bytearray) -> None:
        content[35:60] = b"\xff" * 25

    assert refusal(list_scans(str(patch(path, damage))).refs[0]).reason == "member_corrupt"


def test_a_member_that_swells_is_too_large(tmp_path: Path) -> None:
    zeros = bytes(2 * 1024**2 + 1)
    source = str(make_zip(tmp_path / "scans.zip", [("a.png", zeros)], zipfile.ZIP_DEFLATED))
    assert refusal(list_scans(source).refs[0]).reason == "member_too_large"


def test_a_small_member_may_swell(tmp_path: Path) -> None:
    zeros = bytes(1024**2)
    source = str(make_zip(tmp_path / "scans.zip", [("a.png", zeros)], zipfile.ZIP_DEFLATED))
    assert read_member(list_scans(source).refs[0]) == zeros


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_the_size_limit_holds_for_every_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    files = {"at_limit.png": bytes(100), "over_limit.png": bytes(101)}
    source = make_folder(tmp_path / "scans", files)
    if kind == "zip":
        source = str(make_zip(tmp_path / "scans.zip", list(files.items())))
    monkeypatch.setenv("BT_MAX_MEMBER_BYTES", "100")
    at_limit, over_limit = list_scans(source).refs
    assert read_member(at_limit) == bytes(100)
    assert refusal(over_limit).reason == "member_too_large"


def add_overlapping_entry(content: bytearray) -> None:
    """Let a second directory entry point to the first member's bytes."""
    start, end = content.index(CENTRAL), content.index(END)
    entry = bytes(content[start:end])
    content[end:end] = entry
    end += len(entry)
    content[end + 8 : end + 16] = struct.pack("<HHI", 2, 2, 2 * len(entry))


def test_overlapping_members_are_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "bomb.zip", [("a.png", b"first")])
    assert len(list_scans(str(path)).refs) == 1
    bomb = shutil.copy(path, tmp_path / "bomb2.zip")
    patch(bomb, add_overlapping_entry)
    with zipfile.ZipFile(bomb) as archive:
        assert archive.namelist() == ["a.png", "a.png"]
    with pytest.raises(SourceError, match="overlap"):
        list_scans(str(bomb))


def test_a_zip_cut_at_its_end_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "scans.zip", list(FILES.items()))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(SourceError, match=r"scans\.zip is not a readable zip archive"):
        list_scans(str(path))


def test_a_zip_that_lost_bytes_in_the_middle_loses_only_those_members(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "scans.zip", list(FILES.items()))
    content = path.read_bytes()
    path.write_bytes(content[:5] + content[45:])
    first, *others = list_scans(str(path)).refs
    assert refusal(first).reason == "member_corrupt"
    assert [read_member(ref) for ref in others] == [b"second", b"third"]


@pytest.mark.parametrize("content", [b"", b"x", b"0123456789" * 2, b"0123456789" * 30])
def test_a_tiny_file_is_a_source(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert contents(str(tmp_path / "a.png")) == {"a.png": content}


@pytest.mark.parametrize("name", ["scans.zip", "scans.tar", "scans.tar.gz", "scans.7z"])
def test_an_archive_of_another_kind_says_to_repack(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not a zip")
    with pytest.raises(SourceError, match=rf"{name}.*repack it as zip"):
        list_scans(str(tmp_path / name))


def empty_folder(tmp_path: Path) -> Path:
    (tmp_path / "scans" / "inner").mkdir(parents=True)
    return tmp_path / "scans"


def text_folder(tmp_path: Path) -> Path:
    return Path(make_folder(tmp_path / "scans", {"README.md": b"x"}))


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        pytest.param(
            lambda path: path / "nowhere", "give a folder, a zip archive or an image", id="missing"
        ),
        pytest.param(empty_folder, "looked for PNG", id="empty folder"),
        pytest.param(text_folder, r"skipped: \{'not a scan': 1\}", id="folder of text"),
        pytest.param(
            lambda path: make_zip(path / "scans.zip", []),
            "looked for PNG|repack it as zip",
            id="empty zip",
        ),
        pytest.param(
            lambda path: make_zip(path / "scans.zip", [("a.txt", b"x")]),
            r"skipped: \{'not a scan': 1\}",
            id="zip of text",
        ),
    ],
)
def test_a_source_without_scans_says_which_and_what_to_do(
    tmp_path: Path, make: Callable[[Path], Path], advice: str
) -> None:
    source = str(make(tmp_path))
    with pytest.raises(SourceError) as caught:
        list_scans(source)
    assert source in str(caught.value)
    assert re.search(advice, str(caught.value))


def test_too_many_members_are_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BT_MAX_MEMBERS", "3")
    assert len(list_scans(folder).refs) == 3
    monkeypatch.setenv("BT_MAX_MEMBERS", "2")
    with pytest.raises(SourceError, match="limit of 2"):
        list_scans(folder)


def test_a_vanished_file_is_an_io_error(folder: str) -> None:
    first, *others = list_scans(folder).refs
    Path(folder, first.member).unlink()
    assert refusal(first).reason == "io_error"
    assert [read_member(ref) for ref in others] == [b"second", b"third"]


def test_an_archive_that_is_not_there_is_an_io_error(tmp_path: Path) -> None:
    ref = ScanRef("0" * 20, str(tmp_path / "gone.zip"), "a.png", 0)
    assert refusal(ref).reason == "io_error"


def test_an_archive_that_was_replaced_is_listed_anew(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "scans.zip", [("a.png", b"old")])
    assert contents(str(path)) == {"a.png": b"old"}
    os.replace(make_zip(tmp_path / "new.zip", [("b.png", b"new content")]), path)
    assert contents(str(path)) == {"b.png": b"new content"}


@pytest.mark.parametrize("name", ["größe/räume.png", "脳.png", "a b/c'd.png", "x" * 200 + ".png"])
def test_unusual_names_are_kept(tmp_path: Path, name: str) -> None:
    assert contents(make_folder(tmp_path / "scans", {name: b"x"})) == {name: b"x"}
    assert contents(str(make_zip(tmp_path / "scans.zip", [(name, b"x")]))) == {name: b"x"}


def test_a_zip_name_of_another_encoding_is_read(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "scans.zip", [("xx.png", b"first"), ("b.png", b"second")])

    def rename(content: bytearray) -> None:
        content[:] = content.replace(b"xx.png", b"\xff\xfe.png")

    assert list(contents(str(patch(path, rename))).values()) == [b"first", b"second"]


def test_a_zip_name_that_is_falsely_called_utf_8_does_no_harm(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "scans.zip", [("é.png", b"first")])

    def rename(content: bytearray) -> None:
        content[:] = content.replace("é.png".encode(), b"\xff\xfe.png")

    with pytest.raises(SourceError, match=r"scans\.zip"):
        list_scans(str(patch(path, rename)))


def test_a_file_name_that_is_not_utf_8_does_no_harm(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "scans", {"a.png": b"first"})
    try:
        Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")).write_bytes(b"second")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    try:
        refs = list_scans(folder).refs
    except SourceError as error:
        assert folder in str(error)  # noqa: PT017
    else:
        assert sorted(read_member(ref) for ref in refs) == [b"first", b"second"]


def test_reading_unpacks_nothing_to_disk(
    archive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    assert contents(archive) == FILES
    assert sorted(tmp_path.rglob("*")) == before
