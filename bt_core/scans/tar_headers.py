"""The headers of a tar: block by block, so that no header can make the reader loop or swell.

`tarfile` parses each block. Its own walk over an archive is not used: before Python 3.11.14 a
negative size makes it loop (CVE-2025-8194), a long pax header takes it hours (CVE-2024-6232), and
it holds any extension header in memory.
"""

import tarfile
from dataclasses import dataclass
from typing import Final, Protocol

from bt_core.scans.members import TAR_BLOCK

_MAX_EXTENSION_BYTES: Final = 1024**2
_MAX_EXTENSIONS: Final = 16
_FILE_TYPES: Final = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_FOLDER_TYPES: Final = (tarfile.DIRTYPE, b"D")
_NO_DATA: Final = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
_VOLUME_LABEL: Final = b"V"


class TarDamage(Exception):
    """The archive is cut or damaged from here on."""


class Bytes(Protocol):
    """What a tar is read from: a file, or an unpacked stream that seeks forward only."""

    def read(self, size: int, /) -> bytes:
        """Return the next `size` bytes, fewer only at the end."""

    def seek(self, offset: int, /) -> int:
        """Go to an offset from the start."""


@dataclass(frozen=True)
class TarMember:
    """One member.

    Attributes:
        name: path; bytes that are not UTF-8 are surrogates.
        start: offset of its first header, extensions included.
        data: offset of its content.
        size: of its content, in bytes.
        end: offset of the next member's first header.
        is_file: False for links, devices, pipes, sparse files and types nobody knows.
        is_hidden: True for folders and volume labels, which are not listed.
    """

    name: str
    start: int
    data: int
    size: int
    end: int
    is_file: bool
    is_hidden: bool


def read_header(file: Bytes, start: int) -> TarMember | None:
    """Parse the headers of the member at an offset: ustar, GNU long names and sparse files, pax.

    Returns:
        The member, or None at the archive's end.

    Raises:
        TarDamage: if the headers are cut, or not valid.
        OSError: if the file cannot be read.
    """
    file.seek(start)
    position, name, pax = start, "", dict[str, bytes]()
    for _ in range(_MAX_EXTENSIONS):
        block = file.read(TAR_BLOCK)
        if len(block) < TAR_BLOCK:
            raise TarDamage("the archive ends without its end mark, so members may be missing")
        if not block.strip(b"\0"):
            return None
        header = _parse(block)
        position += TAR_BLOCK
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            content = _extension(file, header.size)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = _text(content.split(b"\0", 1)[0])
            else:
                pax = _pax_records(content)
        elif header.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            return _member(file, header, block, start, position, name, pax)
        position += _padded(header.size)
        file.seek(position)
    raise TarDamage("too many extension headers")


def _member(
    file: Bytes,
    header: tarfile.TarInfo,
    block: bytes,
    start: int,
    position: int,
    name: str,
    pax: dict[str, bytes],
) -> TarMember:
    is_sparse = header.type == tarfile.GNUTYPE_SPARSE or any(
        k.startswith("GNU.sparse") for k in pax
    )
    more = header.type == tarfile.GNUTYPE_SPARSE and block[482]
    while more:  # further blocks of a sparse file's map
        block = file.read(TAR_BLOCK)
        if len(block) < TAR_BLOCK:
            raise TarDamage("the archive ends in a header")
        position += TAR_BLOCK
        more = block[504]
    name = _text(pax.get("GNU.sparse.name") or pax.get("path") or b"") or name or header.name
    size = _size(pax["size"]) if "size" in pax else header.size
    is_file = header.type in _FILE_TYPES and not is_sparse
    is_hidden = header.type in (*_FOLDER_TYPES, _VOLUME_LABEL)
    end = position + (0 if header.type in _NO_DATA else _padded(size))
    return TarMember(name, start, position, size, end, is_file, is_hidden)


def _parse(block: bytes) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise TarDamage(type(error).__name__) from error
    if header.size < 0:
        raise TarDamage("a negative size")
    return header


def _extension(file: Bytes, size: int) -> bytes:
    if size > _MAX_EXTENSION_BYTES:
        raise TarDamage("an extension header is too long")
    content = file.read(size)
    if len(content) < size:
        raise TarDamage("the archive ends in a header")
    return content


def _pax_records(content: bytes) -> dict[str, bytes]:
    """Parse `LENGTH KEY=VALUE newline` records (POSIX.1-2001, pax extended header)."""
    records: dict[str, bytes] = {}
    position = 0
    while position < len(content) and content[position]:
        space = content.find(b" ", position, position + 20)
        length = _size(content[position : max(space, position)])
        end = position + length
        equals = content.find(b"=", space, end)
        if equals < 0 or end > len(content) or content[end - 1 : end] != b"\n":
            raise TarDamage("a pax header that is not valid")
        records[_text(content[space + 1 : equals])] = content[equals + 1 : end - 1]
        position = end
    return records


def _size(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 18:
        raise TarDamage("a size that is not a number")
    return int(digits)


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // TAR_BLOCK) * TAR_BLOCK
