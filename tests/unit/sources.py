"""Small sources and what to do with them, for the tests of every kind of source."""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from bt_core.errors import ScanError
from bt_core.scans.archives import ScanRef, list_scans, read_member

FILES = {"glioma/a.png": b"first", "glioma/b.dcm": b"second", "no_tumor/a.png": b"third"}


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


def tar_bytes(
    members: list[tuple[str, bytes]] | list[tarfile.TarInfo], format: int = tarfile.GNU_FORMAT
) -> bytes:
    """Return a tar of files, or of headers without content."""
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=format, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            header = tarfile.TarInfo(member[0])
            header.size = len(member[1])
            archive.addfile(header, io.BytesIO(member[1]))
    return buffer.getvalue()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "tar.gz": gzip.compress,
    "tar.zst": zstandard.compress,
}


def make_tar(path: Path, members: list[tuple[str, bytes]]) -> str:
    """Write a tar, packed as the name's ending says."""
    kind = path.name.split(".", 1)[1]
    path.write_bytes(PACK[kind](tar_bytes(members)))
    return str(path)
