"""Tars, plain and compressed: the same members and ids as in a folder, and no harm by bad ones."""

import gzip
import io
import os
import random
import struct
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zstandard

from bt_core.data.catalog import ref_columns
from bt_core.data.decode_stage import CONTENT
from bt_core.data.stream import is_streamed, split_streamed, stream_batches
from bt_core.errors import ScanError, SourceError, StoreError
from bt_core.scans.archives import ScanRef, list_scans, read_member, stream_members
from bt_core.scans.tar_headers import TarDamage, read_header
from tests.unit.sources import (
    FILES,
    PACK,
    contents,
    make_folder,
    make_tar,
    make_zip,
    refusal,
    tar_bytes,
)

KINDS = pytest.mark.parametrize("kind", list(PACK))
STREAMED = pytest.mark.parametrize("kind", ["tar.gz", "tar.zst"])


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def header(name: str, type: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = type
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def raw_header(name: str, type: bytes, size: int) -> bytes:
    """Return a header block with any size, also a negative one, and a right checksum."""
    block = bytearray(header(name, type).tobuf(tarfile.GNU_FORMAT)[:512])
    block[124:136] = size.to_bytes(12, "big", signed=True)
    block[124] = 0xFF if size < 0 else 0x80
    return with_checksum(block)


def with_checksum(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def streamed(source: str) -> list[tuple[str, bytes | str]]:
    return [
        (ref.member, content if isinstance(content, bytes) else content.reason)
        for ref, content in stream_members(source)
    ]


@KINDS
def test_a_tar_gives_the_members_and_ids_of_a_folder(tmp_path: Path, kind: str) -> None:
    source = make_tar(tmp_path / f"scans.{kind}", list(FILES.items()))
    folder = make_folder(tmp_path / "scans", FILES)
    assert contents(source) == FILES
    ids = {ref.member: ref.scan_id for ref in list_scans(folder).refs}
    assert {ref.member: ref.scan_id for ref in list_scans(source).refs} == ids


@STREAMED
def test_a_stream_gives_the_listed_refs_with_their_content(tmp_path: Path, kind: str) -> None:
    members = [*FILES.items(), ("glioma/a.png", b"again"), ("notes.txt", b"x"), ("e.png", b"")]
    source = make_tar(tmp_path / f"scans.{kind}", members)
    listing = list_scans(source)
    pairs = list(stream_members(source))
    assert [ref for ref, _ in pairs] == listing.refs
    assert [content for _, content in pairs] == [read_member(ref) for ref in listing.refs]
    assert listing.skipped == {"not a scan": 1}
    assert len({ref.scan_id for ref in listing.refs}) == 5


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_names_of_every_format_are_read(tmp_path: Path, kind: str, format: int) -> None:
    long = "/".join(["n" * 60] * (2 if format == tarfile.USTAR_FORMAT else 5)) + ".png"
    names = [long, "größe.png", "脳/a b.png", "../up.png", "/etc/evil.png", "c:\\x.png"]
    files = {name: name.encode() for name in names}
    source = write(tmp_path / f"s.{kind}", PACK[kind](tar_bytes(list(files.items()), format)))
    read = contents(source)
    assert {name.lstrip("/"): content for name, content in read.items()} == {
        name.lstrip("/"): content for name, content in files.items()
    }
    assert not Path("/etc/evil.png").exists()


@KINDS
def test_a_name_that_is_not_utf_8_is_kept(tmp_path: Path, kind: str) -> None:
    source = make_tar(tmp_path / f"s.{kind}", [(os.fsdecode(b"\xe9.png"), b"x"), ("b.png", b"y")])
    assert contents(source) == {"\\xe9.png": b"x", "b.png": b"y"}


@KINDS
def test_what_is_no_file_is_a_row_with_a_reason(tmp_path: Path, kind: str) -> None:
    others = {
        "symlink.png": tarfile.SYMTYPE,
        "hardlink.png": tarfile.LNKTYPE,
        "pipe.png": tarfile.FIFOTYPE,
        "char.png": tarfile.CHRTYPE,
        "block.png": tarfile.BLKTYPE,
        "unknown.png": b"Z",
    }
    headers = [header(name, type, linkname="/etc/passwd") for name, type in others.items()]
    tar = tar_bytes([header("dir", tarfile.DIRTYPE), *headers])
    tar = tar[: 512 * 7] + tar_bytes([("ok.png", b"good")])
    source = write(tmp_path / f"s.{kind}", PACK[kind](tar))
    *bad, good = list_scans(source).refs
    assert {ref.member: refusal(ref).reason for ref in bad} == dict.fromkeys(
        others, "unsupported_member"
    )
    assert read_member(good) == b"good"
    if kind != "tar":
        assert streamed(source) == [
            *((n, "unsupported_member") for n in others),
            ("ok.png", b"good"),
        ]


def old_sparse() -> bytes:
    """Return a GNU sparse member whose map goes on in two further blocks."""
    block = bytearray(header("sparse.png", tarfile.GNUTYPE_SPARSE, size=5).tobuf()[:512])
    block[482] = 1
    more, last = bytearray(512), bytearray(512)
    more[504] = 1
    return with_checksum(block) + bytes(more + last) + b"12345".ljust(512, b"\0")


def pax_sparse() -> bytes:
    info = header("./GNUSparseFile.0/sparse.png", size=5)
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "sparse.png"}
    return info.tobuf(tarfile.PAX_FORMAT) + b"12345".ljust(512, b"\0")


@KINDS
@pytest.mark.parametrize("make", [old_sparse, pax_sparse])
def test_sparse_files_are_unsupported(tmp_path: Path, kind: str, make: Callable[[], bytes]) -> None:
    source = write(tmp_path / f"s.{kind}", PACK[kind](make() + tar_bytes([("ok.png", b"good")])))
    bad, good = list_scans(source).refs
    assert (bad.member, refusal(bad).reason) == ("sparse.png", "unsupported_member")
    assert read_member(good) == b"good"


@KINDS
def test_a_pax_size_goes_before_that_of_the_header(tmp_path: Path, kind: str) -> None:
    info = header("a.png", size=0)
    info.pax_headers = {"size": "5"}
    tar = info.tobuf(tarfile.PAX_FORMAT) + b"first".ljust(512, b"\0")
    source = write(tmp_path / f"s.{kind}", PACK[kind](tar + tar_bytes([("b.png", b"second")])))
    assert contents(source) == {"a.png": b"first", "b.png": b"second"}


@pytest.mark.parametrize(
    "tail",
    [
        pytest.param(raw_header("x.png", tarfile.REGTYPE, -512), id="negative size"),
        pytest.param(raw_header("x", tarfile.XHDTYPE, 1 << 40), id="endless pax header"),
        pytest.param(raw_header("x", tarfile.GNUTYPE_LONGNAME, 1 << 80), id="endless name"),
        pytest.param(raw_header("x", tarfile.XHDTYPE, 9) + b"7" * 512, id="digits only"),
        pytest.param(
            raw_header("x", tarfile.XHDTYPE, 17) + b"17 size=-00001024\n".ljust(512, b"\0"),
            id="negative pax size",
        ),
        pytest.param(raw_header("x", tarfile.XGLTYPE, 0) * 40, id="extensions only"),
        pytest.param(b"\1" * 512, id="no header"),
        pytest.param(b"\1" * 100, id="part of a header"),
    ],
)
@KINDS
def test_a_bad_header_ends_the_archive_and_is_counted(
    tmp_path: Path, kind: str, tail: bytes
) -> None:
    tar = tar_bytes([("a.png", b"first")])[:1024] + tail
    source = write(tmp_path / f"s.{kind}", PACK[kind](tar))
    listing = list_scans(source)
    assert [read_member(ref) for ref in listing.refs] == [b"first"]
    assert listing.skipped == {"rest of an archive that is cut or damaged": 1}


def test_a_long_pax_header_of_digits_is_refused_at_once() -> None:
    tar = raw_header("x", tarfile.XHDTYPE, 1 << 20) + b"1" * (1 << 20)
    started = time.perf_counter()
    with pytest.raises(TarDamage):
        read_header(io.BytesIO(tar), 0)
    assert time.perf_counter() - started < 1


@KINDS
def test_a_cut_archive_keeps_its_good_members(tmp_path: Path, kind: str) -> None:
    noise = random.Random(0).randbytes(300_000)
    tar = tar_bytes([("a.png", b"first"), ("b.png", noise)])
    packed = PACK[kind](tar)
    cut = packed[: 1024 + 512 + 1000] if kind == "tar" else packed[:-600]
    source = write(tmp_path / f"s.{kind}", cut)
    listing = list_scans(source)
    good, bad = listing.refs
    assert read_member(good) == b"first"
    assert refusal(bad).reason == "member_corrupt"
    assert list(listing.skipped) == ["rest of an archive that is cut or damaged"]


@KINDS
def test_an_archive_cut_between_members_is_not_whole(tmp_path: Path, kind: str) -> None:
    tar = tar_bytes([("a.png", b"first"), ("b.png", b"second")])
    listing = list_scans(write(tmp_path / f"s.{kind}", PACK[kind](tar[:1024])))
    assert [ref.member for ref in listing.refs] == ["a.png"]
    assert not listing.is_whole
    assert list_scans(write(tmp_path / f"whole.{kind}", PACK[kind](tar))).is_whole


def test_a_tar_that_changed_is_an_io_error(tmp_path: Path) -> None:
    source = make_tar(tmp_path / "s.tar", [("a.png", b"first"), ("b.png", b"second")])
    first, second = list_scans(source).refs
    make_tar(tmp_path / "s.tar", [("c.png", b"long" * 1000)])
    assert refusal(first).reason == refusal(second).reason == "io_error"


@KINDS
def test_the_size_limit_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    source = make_tar(tmp_path / f"s.{kind}", [("a.png", bytes(100)), ("b.png", bytes(101))])
    monkeypatch.setenv("BT_MAX_MEMBER_BYTES", "100")
    at_limit, over_limit = list_scans(source).refs
    assert read_member(at_limit) == bytes(100)
    assert refusal(over_limit).reason == "member_too_large"
    if kind != "tar":
        assert streamed(source) == [("a.png", bytes(100)), ("b.png", "member_too_large")]


@KINDS
def test_the_total_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    source = make_tar(tmp_path / f"s.{kind}", [(f"{i}.png", bytes(20_000)) for i in range(5)])
    monkeypatch.setenv("BT_MAX_TOTAL_BYTES", "80000")
    with pytest.raises(SourceError, match="limit of 80000 bytes; set BT_MAX_TOTAL_BYTES"):
        list_scans(source)


@KINDS
def test_the_number_of_members_is_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    source = make_tar(tmp_path / f"s.{kind}", list(FILES.items()))
    monkeypatch.setenv("BT_MAX_MEMBERS", "2")
    with pytest.raises(SourceError, match="limit of 2; set BT_MAX_MEMBERS"):
        list_scans(source)


@STREAMED
def test_a_bomb_is_refused_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    source = make_tar(tmp_path / f"s.{kind}", [("a.png", bytes(30 * 1024**2))])
    with pytest.raises(SourceError, match=r"over 200 times its size.*BT_MAX_RATIO"):
        list_scans(source)
    monkeypatch.setenv("BT_MAX_RATIO", "1000000")
    assert len(list_scans(source).refs) == 1


@STREAMED
def test_a_compressed_tar_is_not_held_in_memory(tmp_path: Path, kind: str) -> None:
    noise = random.Random(0).randbytes(1024**2)
    path = tmp_path / f"s.{kind}"
    packer = gzip.open if kind == "tar.gz" else zstandard.open
    with packer(path, "wb", *([1] if kind == "tar.gz" else [])) as file:
        for i in range(150):
            info = header(f"{i}.png", size=len(noise))
            file.write(info.tobuf() + noise)
        file.write(bytes(1024))
    before = rss_bytes()
    assert len(list_scans(str(path)).refs) == 150
    assert sum(len(content) for _, content in stream_members(str(path))) == 150 * 1024**2
    assert rss_bytes() - before < 60 * 1024**2


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def columns_of(refs: list[ScanRef], **others: list[str]) -> dict[str, np.ndarray]:
    return {k: np.array(v) for k, v in {**ref_columns(refs), **others}.items()}


@STREAMED
def test_batches_of_a_stream_hold_every_row_once(tmp_path: Path, kind: str) -> None:
    members = [(f"{i % 90}.png", f"{i}".encode()) for i in range(200)]
    source = make_tar(tmp_path / f"s.{kind}", members)
    refs = list_scans(source).refs
    expected = {ref.scan_id: read_member(ref) for ref in refs[::50]}
    order = random.Random(0).sample(range(200), 150)
    columns = columns_of([refs[i] for i in order], label=[str(i) for i in order])
    batches = list(stream_batches(columns))
    assert max(len(batch["label"]) for batch in batches) <= 64
    rows = [row for b in batches for row in zip(*(b[k] for k in b), strict=True)]
    assert {row[:-1] for row in rows} == set(zip(*columns.values(), strict=True))
    by_id = {row[0]: row for row in rows}
    assert all(by_id[refs[i].scan_id][-1] == str(i).encode() for i in order)
    assert all(by_id[k][-1] == v for k, v in expected.items() if k in by_id)


def test_rows_that_a_stream_does_not_give_have_a_reason(tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(2000)
    members = [(f"{i}.png", noise) for i in range(10)]
    source = make_tar(tmp_path / "s.tar.gz", members)
    refs = list_scans(source).refs
    (tmp_path / "s.tar.gz").write_bytes(gzip.compress(tar_bytes(members[:4])))
    assert reasons(refs) == {"read": 4, "io_error": 6}
    (tmp_path / "s.tar.gz").write_bytes(PACK["tar.gz"](tar_bytes(members))[:1000])
    assert reasons(refs) == {"member_corrupt": 10} or reasons(refs)["read"] < 10
    (tmp_path / "s.tar.gz").unlink()
    with pytest.raises(StoreError, match="is not there"):
        reasons(refs)


def reasons(refs: list[ScanRef]) -> dict[str, int]:
    content = [c for batch in stream_batches(columns_of(refs)) for c in batch[CONTENT]]
    return Counter(c.reason if isinstance(c, ScanError) else "read" for c in content)


def test_only_compressed_tars_are_streamed(tmp_path: Path) -> None:
    gz = make_tar(tmp_path / "a.tar.gz", list(FILES.items()))
    zst = make_tar(tmp_path / "b.tar.zst", list(FILES.items()))
    others = [
        make_tar(tmp_path / "c.tar", list(FILES.items())),
        str(make_zip(tmp_path / "d.zip", list(FILES.items()))),
        make_folder(tmp_path / "e", FILES),
    ]
    assert [is_streamed(uri) for uri in (gz, zst, *others[:2], "/nowhere")] == [True] * 2 + [
        False
    ] * 3
    refs = [ref for source in (others[0], gz, *others[1:], zst) for ref in list_scans(source).refs]
    tables, direct = split_streamed(pa.table(ref_columns(refs)))
    assert [table["uri"].unique().to_pylist() for table in tables] == [[gz], [zst]]
    assert set(direct["uri"].to_pylist()) == set(others)
    assert direct.num_rows + sum(table.num_rows for table in tables) == 15


def test_a_tar_larger_than_a_size_field_says_is_cut(tmp_path: Path) -> None:
    tar = tar_bytes([("a.png", b"x")])[:1024] + raw_header("b.png", tarfile.REGTYPE, 1 << 60)
    listing = list_scans(write(tmp_path / "s.tar", tar + struct.pack("<Q", 0)))
    good, bad = listing.refs
    assert read_member(good) == b"x"
    assert refusal(bad).reason == "member_too_large"
