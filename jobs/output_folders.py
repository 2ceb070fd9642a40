"""Output folders: where they may lie, and what in them may be replaced."""

import os

from bt_core import storage
from bt_core.errors import UsageError
from bt_core.locks import refuse_locked


def output_folder(out: str, source: str) -> str:
    """Return the output folder as an absolute location.

    Raises:
        UsageError: if it is a file, or is or lies in the source, where results would be taken for
            scans the next time.
    """
    if not source.strip():
        raise UsageError("SOURCE is empty; give a folder, an archive, a list or a scan file")
    out, source = storage.absolute(out), storage.absolute(source)
    if not storage.is_uri(out) and not storage.is_uri(source):
        below = f"{os.path.realpath(out)}/".startswith(f"{os.path.realpath(source).rstrip('/')}/")
    else:
        below = f"{out.rstrip('/')}/".startswith(f"{source.rstrip('/')}/")
    if below:
        raise UsageError(f"-o {out} is or lies in the source; choose a folder beside it")
    if storage.is_file(out):
        raise UsageError(f"-o {out} is a file; choose a folder")
    return out


def refuse_taken(out: str, marker: str, what: str, overwrite: bool) -> None:
    """Refuse an output folder that holds something that is not to be replaced.

    Raises:
        UsageError: if it is there and not to be overwritten, or does not hold the file `marker`,
            and so is not `what` it should be.
    """
    if not storage.exists(out):
        return
    if not overwrite:
        raise UsageError(f"{out} exists; choose another -o, or pass --overwrite")
    if not storage.exists(storage.join(out, marker)):
        raise UsageError(f"{out} is not {what}, so it is not overwritten; choose another -o")


def make_room(out: str, marker: str, what: str) -> None:
    """Remove an output folder that is to be overwritten.

    Raises:
        UsageError: if it does not hold the file `marker`, and so is not `what` it should be;
            or if another command is working on it.
    """
    refuse_taken(out, marker, what, overwrite=True)
    refuse_locked(out)
    storage.remove_dir(out)
