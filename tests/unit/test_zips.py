"""Hostile and damaged zips: a reason for each bad member, and no harm to the others."""

import os
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bt_core.errors import SourceError
from bt_core.scans.archives import list_scans, read_member
from tests.unit.sources import FILES, contents, make_zip, patch, refusal

LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


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


def test_damaged_deflate_data_is_member_corrupt(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "scans.zip", [("a.png", os.urandom(500))], zipfile.ZIP_DEFLATED)

    def damage(content: bytearray) -> None:
        content[35:60] = b"\xff" * 25

    assert refusal(list_scans(str(patch(path, damage))).refs[0]).reason == "member_corrupt"


def test_a_member_that_swells_is_too_large(tmp_path: Path) -> None:
    zeros = bytes(2 * 1024**2 + 1)
    source = str(make_zip(tmp_path / "scans.zip", [("a.png", zeros)], zipfile.ZIP_DEFLATED))
    assert refusal(list_scans(source).refs[0]).reason == "member_too_large"


def test_a_zip_behind_a_program_and_with_more_members_than_16_bits_count(tmp_path: Path) -> None:
    members = [(f"{i}.png", b"%d" % i) for i in range(66_000)]
    path = make_zip(tmp_path / "scans.zip", members)
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    refs = list_scans(str(path)).refs
    assert [(ref.member, ref.position) for ref in refs] == [
        (name, i) for i, (name, _) in enumerate(members)
    ]
    for i in (0, 63, 64, 40_000, 65_999):
        assert read_member(refs[i]) == b"%d" % i


def test_a_small_member_may_swell(tmp_path: Path) -> None:
    zeros = bytes(1024**2)
    source = str(make_zip(tmp_path / "scans.zip", [("a.png", zeros)], zipfile.ZIP_DEFLATED))
    assert read_member(list_scans(source).refs[0]) == zeros


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


def test_folders_inside_a_zip_are_no_scans(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "scans.zip", [("glioma/", b""), ("glioma/a.png", b"first")])
    assert contents(str(path)) == {"glioma/a.png": b"first"}


def test_equal_names_in_a_zip_are_different_scans(tmp_path: Path) -> None:
    members = [("a.png", b"first"), ("b.png", b"other"), ("a.png", b"second")]
    refs = list_scans(str(make_zip(tmp_path / "scans.zip", members))).refs
    assert [ref.member for ref in refs] == ["a.png", "b.png", "a.png"]
    assert [read_member(ref) for ref in refs] == [b"first", b"other", b"second"]
    assert len({ref.scan_id for ref in refs}) == 3


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


def test_an_archive_that_was_replaced_is_listed_anew(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "scans.zip", [("a.png", b"old")])
    assert contents(str(path)) == {"a.png": b"old"}
    os.replace(make_zip(tmp_path / "new.zip", [("b.png", b"new content")]), path)
    assert contents(str(path)) == {"b.png": b"new content"}


def set_method(method: int) -> Callable[[bytearray], object]:
    def change(content: bytearray) -> None:
        for position in (content.index(LOCAL) + 8, content.index(CENTRAL) + 10):
            content[position : position + 2] = struct.pack("<H", method)

    return change


def set_strong_encryption(content: bytearray) -> None:
    content[content.index(CENTRAL) + 8] |= 0x40


def set_mode(mode: int) -> Callable[[bytearray], object]:
    """Give the first member the Unix file mode of a link, a device, ..."""

    def change(content: bytearray) -> None:
        entry = content.index(CENTRAL)
        content[entry + 5] = 3
        content[entry + 38 : entry + 42] = struct.pack("<L", mode << 16)

    return change


def overstate_size(content: bytearray) -> None:
    """Declare that the first member unpacks to 400 MiB."""
    position = content.index(CENTRAL) + 24
    content[position : position + 4] = struct.pack("<I", 400 * 1024**2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_encrypted, "member_encrypted"),
        (set_unknown_method, "archive_method_unsupported"),
        (flip_data, "member_corrupt"),
        (understate_size, "member_corrupt"),
        (spoil_local_header, "member_corrupt"),
        pytest.param(set_method(9), "archive_method_unsupported", id="deflate64"),
        pytest.param(set_method(98), "archive_method_unsupported", id="PPMd"),
        pytest.param(set_method(99), "member_encrypted", id="AES"),
        pytest.param(set_strong_encryption, "member_encrypted", id="strong encryption"),
        pytest.param(set_mode(stat.S_IFLNK | 0o777), "unsupported_member", id="link"),
        pytest.param(set_mode(stat.S_IFIFO | 0o600), "unsupported_member", id="pipe"),
        pytest.param(set_mode(stat.S_IFBLK | 0o600), "unsupported_member", id="device"),
        pytest.param(overstate_size, "member_too_large", id="forged size"),
    ],
)
def test_a_bad_member_has_a_reason_and_spares_the_others(
    tmp_path: Path, change: Callable[[bytearray], object], reason: str
) -> None:
    source = str(patch(make_zip(tmp_path / "scans.zip", list(FILES.items())), change))
    bad, *others = list_scans(source).refs
    assert refusal(bad).reason == reason
    assert [read_member(ref) for ref in others] == [b"second", b"third"]


def test_a_regular_unix_mode_is_no_link(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "scans.zip", list(FILES.items()))
    assert contents(str(patch(path, set_mode(stat.S_IFREG | 0o644)))) == FILES


def test_the_total_of_declared_sizes_is_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(make_zip(tmp_path / "scans.zip", list(FILES.items())))
    monkeypatch.setenv("BT_MAX_TOTAL_BYTES", "16")
    assert contents(source) == FILES
    monkeypatch.setenv("BT_MAX_TOTAL_BYTES", "15")
    with pytest.raises(SourceError, match="limit of 15 bytes; set BT_MAX_TOTAL_BYTES"):
        list_scans(source)


def test_the_default_total_is_20_gib(tmp_path: Path) -> None:
    def declare(content: bytearray) -> None:
        position = 0
        for _ in range(6):
            position = content.index(CENTRAL, position + 1)
            content[position + 24 : position + 28] = struct.pack("<I", 0xF0000000)

    path = make_zip(tmp_path / "scans.zip", [(f"{i}.png", b"x") for i in range(6)])
    with pytest.raises(SourceError, match=str(20 * 1024**3)):
        list_scans(str(patch(path, declare)))


def test_a_directory_for_too_many_files_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_zip(tmp_path / "scans.zip", [("a" * 60_000 + f"{i}.png", b"") for i in range(18)])
    monkeypatch.setenv("BT_MAX_MEMBERS", "17")
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(SourceError, match=r"directory of .* set BT_MAX_MEMBERS"):
        list_scans(str(path))


def test_zip64_is_read(tmp_path: Path) -> None:
    path = tmp_path / "scans.zip"
    with zipfile.ZipFile(path, "w") as archive, archive.open("a.png", "w", force_zip64=True) as f:
        f.write(b"first")
    assert contents(str(path)) == {"a.png": b"first"}


def test_more_members_than_a_plain_zip_counts(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "scans.zip", [(f"{i}.png", b"x") for i in range(65_600)])
    refs = list_scans(str(path)).refs
    assert len(refs) == 65_600
    assert read_member(refs[-1]) == b"x"


def test_a_large_zip_is_not_read_whole(tmp_path: Path) -> None:
    """A file with holes: 1.5 GiB that are not there between the first member and the others."""
    path = make_zip(tmp_path / "scans.zip", list(FILES.items()))
    content = path.read_bytes()
    cut = content.index(LOCAL, 1)
    gap = 3 * 1024**3 // 2
    with path.open("r+b") as file:
        file.seek(cut + gap)
        moved = bytearray(content[cut:])
        entry = moved.index(CENTRAL)
        for i in range(3):
            offset = entry + 42
            old = struct.unpack_from("<I", moved, offset)[0]
            moved[offset : offset + 4] = struct.pack("<I", old + (gap if i else 0))
            entry = moved.find(CENTRAL, entry + 4)
        end = moved.index(END) + 16
        moved[end : end + 4] = struct.pack("<I", content.index(CENTRAL) + gap)
        file.write(moved)
    assert os.stat(path).st_size > gap
    before = rss_bytes()
    assert contents(str(path)) == FILES
    assert rss_bytes() - before < 100 * 1024**2


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
