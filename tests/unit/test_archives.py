"""Sources are listed and read the same wherever they lie, and hostile names do no harm."""

import gzip
import io
import os
import platform
import re
import shutil
import socket
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from bt_core.errors import SourceError, StoreError, UsageError
from bt_core.scans.archives import ScanRef, list_scans, read_member
from bt_core.scans.limits import Limits, limits
from bt_core.scans.members import NAMED
from tests.unit.sources import FILES, contents, make_folder, make_zip, refusal

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


@pytest.mark.parametrize("content", [b"", b"x", b"0123456789" * 2, b"0123456789" * 30])
def test_a_tiny_file_is_a_source(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert contents(str(tmp_path / "a.png")) == {"a.png": content}


@pytest.mark.parametrize("name", ["scans.zip", "scans.tar", "scans.tar.gz", "scans.7z"])
def test_an_archive_of_another_kind_says_to_repack(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not a zip")
    with pytest.raises(SourceError, match=rf"{name}.*repack it"):
        list_scans(str(tmp_path / name))


def empty_folder(tmp_path: Path) -> Path:
    (tmp_path / "scans" / "inner").mkdir(parents=True)
    return tmp_path / "scans"


def text_folder(tmp_path: Path) -> Path:
    return Path(make_folder(tmp_path / "scans", {"README.md": b"x"}))


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        pytest.param(lambda path: path / "nowhere", "give a folder, an archive", id="missing"),
        pytest.param(empty_folder, "looked for PNG", id="empty folder"),
        pytest.param(text_folder, "skipped: 1 not a scan", id="folder of text"),
        pytest.param(
            lambda path: make_zip(path / "scans.zip", []),
            "looked for PNG|repack it",
            id="empty zip",
        ),
        pytest.param(
            lambda path: make_zip(path / "scans.zip", [("a.txt", b"x")]),
            "skipped: 1 not a scan",
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


@pytest.mark.parametrize(("name", "position"), [("s.zip", 0), ("s.tar", 0), ("folder", -1)])
def test_a_source_that_a_node_does_not_see_is_no_fault_of_its_scans(
    tmp_path: Path, name: str, position: int
) -> None:
    mount = tmp_path / "mount"
    ref = ScanRef("0" * 20, f"{mount}/more/{name}", "JOHN_DOE.png", position)
    tmp_path.joinpath("other").touch()
    said = (
        f"node {platform.node()}: {mount} is not there, or is empty; .*: mount it there, then give"
    )
    assert re.match(said, said_of(ref))
    mount.mkdir()  # as it is where nothing is mounted
    assert re.match(said, said_of(ref))
    (mount / "more").mkdir()
    assert re.match(said.replace("mount is", "mount/more is"), said_of(ref))


def said_of(ref: ScanRef) -> str:
    with pytest.raises(StoreError) as caught:
        read_member(ref)
    return str(caught.value)


def test_an_archive_that_a_node_may_not_read_is_no_fault_of_its_scans(tmp_path: Path) -> None:
    (tmp_path / "s.zip").symlink_to("s.zip")  # a loop, which root may not read either
    assert "s.zip cannot be read (Too many levels" in said_of(
        ScanRef("0" * 20, f"{tmp_path}/s.zip", "a.png", 0)
    )


def test_a_wrong_setting_of_a_node_is_no_fault_of_a_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "many")
    for position in (NAMED, -1, 0):
        said = said_of(ScanRef("0" * 20, "s3://of-no-client/a", "a.png", position))
        assert "AWS_MAX_ATTEMPTS=many: give a whole number" in said
    assert "cannot open foo://a" in said_of(ScanRef("0" * 20, "foo://a", "a.png", -1))


@pytest.mark.parametrize("name", ["größe/räume.png", "脳.png", "a b/c'd.png", "x" * 200 + ".png"])
def test_unusual_names_are_kept(tmp_path: Path, name: str) -> None:
    assert contents(make_folder(tmp_path / "scans", {name: b"x"})) == {name: b"x"}
    assert contents(str(make_zip(tmp_path / "scans.zip", [(name, b"x")]))) == {name: b"x"}


def test_reading_unpacks_nothing_to_disk(
    archive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    assert contents(archive) == FILES
    assert sorted(tmp_path.rglob("*")) == before


def packed(kind: str) -> bytes:
    """Return a small archive of a kind."""
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("a.png", b"x")
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    tar = buffer.getvalue()
    signatures = {"7z": b"7z\xbc\xaf\x27\x1c", "rar": b"Rar!\x1a\x07\x01\0", "xz": b"\xfd7zXZ\0"}
    signatures |= {"tar": tar, "tar.gz": gzip.compress(tar)}
    return signatures.get(kind) or zstandard.compress(tar)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.zst", "7z", "rar", "xz"])
def test_an_archive_inside_a_source_is_not_opened(tmp_path: Path, kind: str) -> None:
    files = {"more.bin": packed(kind), "z.png": b"good"}
    for source in (
        make_folder(tmp_path / "scans", files),
        str(make_zip(tmp_path / "scans.zip", list(files.items()))),
    ):
        nested, good = list_scans(source).refs
        assert refusal(nested).reason == "nested_archive"
        assert read_member(good) == b"good"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(gzip.compress(b"\x5c\x01\0\0" + bytes(400)), id="NIfTI"),
        pytest.param(b"\x1f\x8b" + b"damaged gzip", id="damaged gzip"),
        pytest.param(b"PK\x03\x04" + bytes(124) + b"DICM", id="DICOM with a zip's magic"),
    ],
)
def test_what_looks_like_an_archive_may_be_a_scan(tmp_path: Path, content: bytes) -> None:
    assert contents(make_folder(tmp_path / "scans", {"a.nii.gz": content})) == {"a.nii.gz": content}


def test_a_compressed_nifti_file_is_a_source(tmp_path: Path) -> None:
    content = gzip.compress(b"\x5c\x01\0\0" + bytes(400))
    (tmp_path / "scan.nii.gz").write_bytes(content)
    assert contents(str(tmp_path / "scan.nii.gz")) == {"scan.nii.gz": content}


def test_every_kind_of_file_in_a_folder_ends_in_a_row(folder: str, tmp_path: Path) -> None:
    root = Path(folder)
    (root / "link.png").symlink_to(root / "glioma" / "a.png")
    (root / "dangling.png").symlink_to(root / "nowhere.png")
    (root / "glioma" / "up").symlink_to(root)  # a circle
    os.mkfifo(root / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        monkey = os.getcwd()
        os.chdir(root)  # the path of a socket is limited to 107 bytes
        try:
            listener.bind("socket.png")
        finally:
            os.chdir(monkey)
        listing = list_scans(folder)
        found = {ref.member: ref for ref in listing.refs if ref.member not in FILES}
        assert listing.skipped == {"link to a folder": 1}
        assert read_member(found.pop("link.png")) == b"first"
        assert {name: refusal(ref).reason for name, ref in found.items()} == {
            "dangling.png": "io_error",
            "pipe.png": "unsupported_member",
            "socket.png": "unsupported_member",
        }


def test_a_device_is_never_opened() -> None:
    assert refusal(ScanRef("0" * 20, "/dev", "zero", -1)).reason == "unsupported_member"


def test_a_pipe_is_not_a_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(SourceError, match="neither a folder nor a regular file"):
        list_scans(str(tmp_path / "pipe.png"))


def test_names_that_are_not_utf_8_are_found_again(tmp_path: Path) -> None:
    names = [b"\xff.png", b"\\xff.png", b"a\\xff\xff.png", "é".encode() + b"\xe9.png", b"ok.png"]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(name)
    refs = list_scans(str(tmp_path)).refs
    assert len({ref.scan_id for ref in refs}) == len({(r.member, r.position) for r in refs}) == 5
    assert sorted(read_member(ref) for ref in refs) == sorted(names)
    for ref in refs:
        ref.member.encode()
    assert "\\xff.png" in {ref.member for ref in refs}


def test_listing_many_files_is_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(2_001):
        (tmp_path / f"{i}.png").touch()
    monkeypatch.setenv("BT_MAX_MEMBERS", "2000")
    started = time.perf_counter()
    with pytest.raises(SourceError, match="limit of 2000; set BT_MAX_MEMBERS"):
        list_scans(str(tmp_path))
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("value", ["", "0", "-1", "many", "1e9", "²"])
def test_a_limit_that_is_no_number_is_refused(
    folder: str, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("BT_MAX_RATIO", value)
    with pytest.raises(UsageError, match="BT_MAX_RATIO is"):
        list_scans(folder)


def test_the_default_limits_are_those_of_the_readme() -> None:
    assert limits() == Limits(100_000, 20 * 1024**3, 512 * 1024**2, 200)
