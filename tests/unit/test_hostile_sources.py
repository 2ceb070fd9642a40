"""Whatever an archive's bytes are, the answer is data or a foreseen error, and it comes soon."""

import contextlib
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bt_core.data.catalog import ref_columns
from bt_core.data.decode_stage import CONTENT, column_of
from bt_core.data.stream import is_streamed, stream_batches
from bt_core.errors import ScanError, SourceError
from bt_core.scans.archives import list_scans, read_member
from tests.unit.sources import FILES, PACK, make_zip, tar_bytes

NAMES = [".zip", ".tar", ".tar.gz", ".tar.zst", ".csv", ".parquet", ""]
HURRIED = settings(
    max_examples=150, deadline=10_000, suppress_health_check=[HealthCheck.too_slow], database=None
)


def packed_examples() -> list[bytes]:
    """Return one valid archive of every kind."""
    with tempfile.TemporaryDirectory() as folder:
        members = [*FILES.items(), ("n" * 150 + ".png", b"long name")]
        zips = [
            make_zip(Path(folder) / f"{method}.zip", members, method).read_bytes()
            for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)
        ]
    tars = [tar_bytes(members, format) for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    return zips + [pack(tar) for tar in tars for pack in PACK.values()]


EXAMPLES = packed_examples()


def survives(content: bytes, suffix: str) -> None:
    """Check that a source of these bytes is listed and read without any other error."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        path.write_bytes(content)
        try:
            refs = list_scans(str(path)).refs
        except SourceError:
            return
        for ref in refs:
            ref.member.encode()
            with contextlib.suppress(ScanError):
                assert isinstance(read_member(ref), bytes)
        if refs[0].position >= 0 and is_streamed(str(path)):
            columns = {name: column_of(list(v)) for name, v in ref_columns(refs).items()}
            batches = list(stream_batches(columns))
            assert sum(len(batch[CONTENT]) for batch in batches) == len(refs)


@pytest.mark.parametrize("suffix", NAMES)
@HURRIED
@given(content=st.binary(max_size=2000))
def test_random_bytes_do_no_harm(suffix: str, content: bytes) -> None:
    survives(content, suffix)


@HURRIED
@given(
    content=st.sampled_from(EXAMPLES),
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)),
        min_size=1,
        max_size=5,
    ),
    cut=st.floats(0, 1),
    suffix=st.sampled_from([".zip", ".tar", ".tar.gz", ""]),
)
def test_damaged_archives_do_no_harm(
    content: bytes, changes: list[tuple[float, bytes]], cut: float, suffix: str
) -> None:
    damaged = bytearray(content)
    for place, new in changes:
        start = int(place * len(damaged))
        damaged[start : start + len(new)] = new
    survives(bytes(damaged[: int(cut * len(damaged)) if cut > 0.5 else None]), suffix)


@HURRIED
@given(tar=st.binary(max_size=3000), kind=st.sampled_from(["tar.gz", "tar.zst"]))
def test_random_bytes_inside_a_compressed_tar_do_no_harm(tar: bytes, kind: str) -> None:
    start = tar_bytes([("a.png", b"first")])[:1024]
    survives(PACK[kind](start + tar), f".{kind}")
