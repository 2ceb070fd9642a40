"""The files of a source: what each is called, which are passed over, and what none may be."""

import hashlib
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from bt_core import storage
from bt_core.errors import ScanError, SourceError
from bt_core.scans.limits import Limits

_SYSTEM_NAMES: Final = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
_OTHER_SUFFIXES: Final = frozenset({
    ".txt", ".csv", ".tsv", ".parquet", ".md", ".json", ".xml", ".html", ".htm", ".pdf", ".yaml",
    ".yml", ".ini", ".log", ".py", ".ipynb", ".mat", ".xls", ".xlsx", ".doc", ".docx", ".db",
    ".sha256", ".md5",
})  # fmt: skip
ZIP_MAGIC: Final = (b"PK\x03\x04", b"PK\x05\x06")
GZIP_MAGIC: Final = b"\x1f\x8b"
ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
OTHER_ARCHIVE_MAGIC: Final = (b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\xfd7zXZ\x00", b"BZh9")
TAR_BLOCK: Final = 512
CUT: Final = "rest of an archive that is cut or damaged"
UNREADABLE_FOLDER: Final = "folder that cannot be read"


ATTRIBUTES: Final = ("site", "scanner", "sequence", "plane", "source")
"""Columns of a list by which figures are told apart. Their texts stand in reports."""
MOST_VALUES: Final = 20
"""Distinct texts of an attribute; with more of them it may tell scans, or patients, apart."""


NAMED: Final = -3


@dataclass(frozen=True)
class ScanRef:
    r"""One file of a source.

    Attributes:
        scan_id: 20 hexadecimal digits, from the member's name and its occurrence among equal names;
            the same wherever the source is copied to.
        uri: the folder or archive.
        member: path inside it, with forward slashes; what is not UTF-8 is written as `\xNN`.
        position: where it is in an archive, which tells equal names apart: index in a zip's
            directory, or offset of its first header in the unpacked tar. A file of a folder has -1,
            or -2 if its name is not UTF-8 (then `member` has backslashes as `\x5c`); one that a
            list names by a URI has -3 (`NAMED`), as its folder may never have been there.
        label: class name that a list gives, as written there; empty where the folder decides.
        given_split: split that a list gives, as written there.
        patient: keyed hash of the patient that a list gives; never the patient's own name.
        attributes: what a list says of the scan's origin, one for each of `ATTRIBUTES`, or none.
    """

    scan_id: str
    uri: str
    member: str
    position: int
    label: str = ""
    given_split: str = ""
    patient: str = ""
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listing:
    """What a source holds: scans, and how many other files were passed over and why.

    Attributes:
        refs: the scans; none if they were given to a sink as they were found.
        skipped: why files were passed over, and how many.
        num_scans: how many scans there are, in `refs` or given to the sink.
        skipped_names: names of files that were passed over, and why; the first thousand.
    """

    refs: list[ScanRef]
    skipped: dict[str, int] = field(default_factory=dict)
    num_scans: int = 0
    skipped_names: tuple[tuple[str, str], ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether no scan can be missing: a cut archive or a closed folder may have held more."""
        return not {CUT, UNREADABLE_FOLDER} & self.skipped.keys()


_MOST_NAMES: Final = 1000
"""Of files passed over that a listing keeps."""


class Lister:
    """Collects the refs of one source.

    Args:
        uri: the source.
        limits: how many files it may have.
        sink: takes each ref instead of `refs`, so that no memory is needed for them.
    """

    def __init__(
        self, uri: str, limits: Limits, sink: Callable[[ScanRef], None] | None = None
    ) -> None:
        self.uri, self.limits, self.sink = uri, limits, sink
        self.refs: list[ScanRef] = []
        self.skipped: Counter[str] = Counter()
        self.skipped_names: list[tuple[str, str]] = []
        self.num_scans = 0
        self._seen: dict[int, int] = {}

    def add(self, name: str, position: int, member: str | None = None) -> None:
        """Add a file by its name, unless it is one to skip.

        Args:
            name: path inside the source; bytes that are not UTF-8 are surrogates.
            position: as in `ScanRef`.
            member: as in `ScanRef`, if it is not `printable(name)`.

        Raises:
            SourceError: if there are too many files.
        """
        ref = self.identify(name, position, member)
        if ref is not None:
            self.append(ref)

    def identify(self, name: str, position: int, member: str | None = None) -> ScanRef | None:
        """Return a file's ref without adding it; None for one to skip, which is counted."""
        reason = _skip_reason(name)
        if reason:
            self.skipped[reason] += 1
            if len(self.skipped_names) < _MOST_NAMES:
                self.skipped_names.append((printable(name), reason))
            return None
        shown = printable(name) if member is None else member
        return ScanRef(self.next_id(name), self.uri, shown, position)

    def append(self, ref: ScanRef) -> None:
        """Add a ref as it is; raises SourceError if there are too many files."""
        self.num_scans += 1
        if self.num_scans > self.limits.max_members:
            raise SourceError(
                f"{storage.redact(self.uri)} holds more files than the limit of "
                f"{self.limits.max_members}; set BT_MAX_MEMBERS to raise it"
            )
        (self.sink or self.refs.append)(ref)

    def next_id(self, name: str) -> str:
        """Return the scan_id of the next file of this name."""
        raw = name.encode("utf-8", "surrogateescape")
        # 64 bits of a digest take a third of a name's memory, and would meet by chance once in
        # 10^7 sources of a million files; the two ids would differ even then.
        key = int.from_bytes(hashlib.sha256(raw).digest()[:8])
        number = self._seen.get(key, 0)
        self._seen[key] = number + 1
        return hashlib.sha256(b"%b\0%d" % (raw, number)).hexdigest()[:20]

    def listing(self, source: str) -> Listing:
        """Return what was collected of a source; raises SourceError if there is no scan."""
        if self.num_scans:
            names = tuple(self.skipped_names)
            return Listing(self.refs, dict(self.skipped), self.num_scans, names)
        why = ", ".join(f"{count} {why}" for why, count in self.skipped.items())
        raise SourceError(
            f"{storage.redact(source)} holds no scans{f' (skipped: {why})' if why else ''}; looked "
            "for PNG, JPEG, BMP, TIFF, WebP, DICOM and NIfTI files"
        )


def printable(name: str) -> str:
    """Return a member's name as valid Unicode, which Parquet and JSON need."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def refuse_archive(content: bytes) -> bytes:
    """Return a file's content.

    Raises:
        ScanError: `nested_archive`, if it is a zip, tar, 7z, rar, xz or Zstandard file, or a
            compressed tar. A compressed NIfTI file is a scan.
    """
    if content[128:132] == b"DICM":  # the preamble before it may hold anything
        return content
    magic = (*ZIP_MAGIC, ZSTD_MAGIC, *OTHER_ARCHIVE_MAGIC)
    if content.startswith(magic) or is_tar_header(content[:TAR_BLOCK]):
        raise ScanError("nested_archive")
    if content.startswith(GZIP_MAGIC):
        try:
            head = zlib.decompressobj(wbits=31).decompress(content[:65_536], TAR_BLOCK)
        except zlib.error:
            return content
        if is_tar_header(head):
            raise ScanError("nested_archive")
    return content


def is_tar_header(block: bytes) -> bool:
    """Return whether 512 bytes are a tar header, which its checksum tells."""
    if len(block) < TAR_BLOCK or not block[0]:
        return False
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def check_bytes(num_bytes: int, limits: Limits) -> None:
    """Raise ScanError `member_too_large` if a file is over the limit."""
    if num_bytes > limits.max_member_bytes:
        raise ScanError(
            "member_too_large", f"over {limits.max_member_bytes} bytes (BT_MAX_MEMBER_BYTES)"
        )


def check_total(uri: str, num_bytes: int, limits: Limits) -> None:
    """Raise SourceError if the members of an archive unpack to more than the limit."""
    if num_bytes > limits.max_total_bytes:
        raise SourceError(
            f"{storage.redact(uri)} unpacks to more than the limit of {limits.max_total_bytes} "
            "bytes; set BT_MAX_TOTAL_BYTES to raise it"
        )


def _skip_reason(name: str) -> str:
    parts = [part for part in name.replace("\\", "/").split("/") if part not in (".", "..")]
    if any(part.startswith(".") or part.lower() in _SYSTEM_NAMES for part in parts):
        return "system file"
    return "not a scan" if os.path.splitext(name)[1].lower() in _OTHER_SUFFIXES else ""
