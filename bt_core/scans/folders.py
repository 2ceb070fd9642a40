"""Folders and single files, local or remote: listed without opening, read with a cap.

Links to files are followed. Links to folders are not, so that a circle of them does no harm; they
are counted. Only regular files are ever opened, since a pipe or a device could hang the reader.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import Final

from pyarrow import fs

from bt_core import storage
from bt_core.errors import ScanError, SourceError
from bt_core.scans.faults import fault_of
from bt_core.scans.limits import limits
from bt_core.scans.members import UNREADABLE_FOLDER, Lister, ScanRef, check_bytes
from bt_core.store_errors import refuse_away

_PLAIN: Final = -1
_ESCAPED: Final = -2


def list_folder(lister: Lister) -> None:
    """List the files of a folder and of the folders below it, sorted by name.

    Raises:
        SourceError: if it cannot be listed, or has too many files.
    """
    source = lister.uri
    filesystem, path = storage.filesystem(source)
    try:
        names = sorted(_walk(path, lister) if _is_local(filesystem) else storage.list_files(source))
    except UnicodeDecodeError:
        raise SourceError(
            f"{storage.redact(source)} holds a file name that is not UTF-8; rename it"
        ) from None
    except Exception as error:  # a store's own errors
        refuse_away(error)
        raise SourceError(
            f"{storage.redact(source)} cannot be listed: {type(error).__name__}"
        ) from error
    for name in names:
        add_file(lister, name)


def add_file(lister: Lister, name: str) -> None:
    """Add a file of a folder by its name, in which bytes that are not UTF-8 are surrogates."""
    try:
        name.encode()
        lister.add(name, _PLAIN)
    except UnicodeEncodeError:
        raw = os.fsencode(name).replace(b"\\", b"\\x5c")
        lister.add(name, _ESCAPED, raw.decode("utf-8", "backslashreplace"))


def read_file(ref: ScanRef) -> bytes:
    """Return the content of a folder's file, at most `Limits.max_member_bytes`.

    Raises:
        ScanError: `io_error`, `unsupported_member` or `member_too_large`.
        StoreError: if that is no fault of the file (`faults.fault_of`).
    """
    name = ref.member
    if ref.position == _ESCAPED:
        raw = re.sub(rb"\\x([0-9a-f]{2})", lambda m: bytes.fromhex(m[1].decode()), name.encode())
        name = os.fsdecode(raw)
    try:
        filesystem, root = storage.filesystem(ref.uri)
        path = f"{root.rstrip('/')}/{name}"
        return _read_local(path) if _is_local(filesystem) else _read_remote(filesystem, path)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise fault_of(error, ref.uri, ref.position) from error


def _is_local(filesystem: fs.FileSystem) -> bool:
    return isinstance(filesystem, fs.LocalFileSystem)


def _walk(root: str, lister: Lister) -> Iterator[str]:
    """Yield the paths of all files below a local folder, relative to it."""
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(f"{root}/{folder}"))
        except OSError:
            if not folder:
                raise
            lister.skipped[UNREADABLE_FOLDER] += 1
            continue
        for entry in entries:
            name = f"{folder}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                folders.append(f"{name}/")
            elif entry.is_symlink() and entry.is_dir():
                lister.skipped["link to a folder"] += 1
            else:
                yield name


def _read_local(path: str) -> bytes:
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(path)
        raise ScanError("unsupported_member", "not a regular file")
    # Were it replaced by a pipe since, opening would not wait for a writer.
    with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
        return _read_capped(file.read, os.fstat(file.fileno()).st_size)


def _read_remote(filesystem: fs.FileSystem, path: str) -> bytes:
    with storage.open_file(filesystem, path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        return _read_capped(file.read, size)


def _read_capped(read: Callable[[int], bytes], size: int) -> bytes:
    """Read a file whole; one that grows meanwhile is read up to the size it had."""
    check_bytes(size, limits())
    return read(size)
