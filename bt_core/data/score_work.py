"""The work folder of a scoring job, by which a killed one goes on; gone when it is finished.

::

    OUT/.lock           held by the one job that works on OUT
    OUT/.work/
        job.json        ScoreJob; its presence means that the manifest is whole
        manifest/       which scans there are (`manifest.ManifestWriter`)
        checkpoint/     scan_ids of the rows that are done, by Ray Data; `*.pending.parquet` are not
        rows/           these rows, in no order, and those of writes that did not end
        dealt/          the rows by ranges of scan_id (`publish`); not on a store
        parts/          the sorted rows, until they move to OUT/scores
"""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from bt_core import storage
from bt_core.config import StrictModel, parse
from bt_core.errors import ConfigError, RunError, UsageError
from bt_core.store_errors import is_elsewhere, node_of

_PENDING: Final = ".pending.parquet"
_UNWRITABLE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)
_PATH: Final = re.compile(r"[\"'](/[^\"']+)[\"']")
_OF_WRITER: Final = "Error writing bytes to file"
"""What pyarrow, by which all results are written, says of a file that it has opened."""
MANIFEST_FILE: Final = "manifest.json"
"""Written last, so its presence means that all scores are there."""
_SAME: Final = ("bundle_id", "source", "listing_digest", "settings", "bt_version")


class ScoreJob(StrictModel):
    """What is scored, by what, how often it was started; the first five decide if it may go on."""

    bundle_id: str
    source: str
    listing_digest: str
    """Of the refs in the order of their listing."""
    settings: dict[str, str]
    bt_version: str
    num_scans: int
    started_at: str
    overwrites: bool = False
    """It was begun with --overwrite, so this does not ask to begin anew."""
    num_attempts: int = 1
    run_ids: tuple[str, ...] = ()
    """Of the attempts; the last one's files are what the job leaves."""


class ScoreWork:
    """The work folder of an output folder.

    Args:
        out: the output folder.
    """

    def __init__(self, out: str) -> None:
        self.folder = storage.join(out, ".work")
        self.manifest = storage.join(self.folder, "manifest")
        self.checkpoint = storage.join(self.folder, "checkpoint")
        self.rows = storage.join(self.folder, "rows")
        self.dealt = storage.join(self.folder, "dealt")
        self.parts = storage.join(self.folder, "parts")
        self._job = storage.join(self.folder, "job.json")
        self._counted: dict[str, int] = {}

    def is_begun(self) -> bool:
        """Return whether a job was begun here and not finished."""
        return storage.exists(self._job)

    def job(self) -> ScoreJob:
        """Return the job that was begun here.

        Raises:
            UsageError: if it was begun by a version that wrote other fields.
        """
        try:
            return parse(ScoreJob, storage.read_json(self._job), self._job)
        except (ValueError, ConfigError) as error:
            raise UsageError(
                f"{self._job} is of an unfinished job of another version: finish it with that "
                "version, choose another -o, or pass --overwrite to begin anew"
            ) from error

    def overwrites(self, source: str, listing_digest: str) -> bool:
        """Return whether the job that was begun replaces scores by those of this listing."""
        try:
            begun = self.job()
        except UsageError:
            return False
        same = (storage.absolute(source), listing_digest) == (begun.source, begun.listing_digest)
        return begun.overwrites and same

    def begin(self, job: ScoreJob) -> ScoreJob:
        """Put a new job on record, or another attempt at the one that was begun.

        Raises:
            UsageError: if the one that was begun is other work; says what differs.
        """
        if self.is_begun():
            begun = self.job()
            refuse_other_work(begun, job)
            attempts, runs = begun.num_attempts + 1, (*begun.run_ids, *job.run_ids)
            job = begun.model_copy(update={"num_attempts": attempts, "run_ids": runs})
        storage.write_json(self._job, job.model_dump())
        return job

    def num_done(self) -> int:
        """Return how many rows are done; only files that are new since the last call are read."""
        names = storage.list_files(self.checkpoint, ".parquet")
        new = [n for n in names if n not in self._counted and not n.endswith(_PENDING)]
        self._counted |= dict(zip(new, storage.each(self._num_rows, new), strict=True))
        return sum(self._counted.values())

    def _num_rows(self, name: str) -> int:
        content = storage.read_bytes(storage.join(self.checkpoint, name))
        return int(pq.read_metadata(pa.BufferReader(content)).num_rows)

    def settle(self) -> None:
        """Remove what is pending of ids that are done.

        A store renames by copy and removal, and a process may end in between: its rows would then
        be removed, and its ids count as done.
        """
        names = set(storage.list_files(self.checkpoint, ".parquet"))
        for name in names:
            if name.endswith(_PENDING) and name.removesuffix(_PENDING) + ".parquet" in names:
                storage.remove_file(storage.join(self.checkpoint, name))

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        storage.remove_dir(self.folder)


def device_as_begun(out: str, device: str) -> str:
    """Return the device, where `auto` leaves it open that of a job here that is to go on.

    So a job goes on, or says what it lacks, when the cluster has other GPUs than at its start.
    """
    work = ScoreWork(out)
    if device != "auto" or not work.is_begun():
        return device
    begun = work.job().settings.get("device", device)
    return begun if begun in ("cpu", "cuda") else device


def is_of_scores(folder: str) -> bool:
    """Return whether a folder holds Parquet files and nothing else, or is not there."""
    names = storage.list_files(folder) if storage.exists(folder) else []
    is_flat = not storage.exists(folder) or not storage.list_dirs(folder)
    return is_flat and all(name.endswith(".parquet") for name in names)


def refuse_foreign(out: str, is_begun: bool) -> None:
    """Refuse a folder that holds another program's files under the names of those to be written.

    Args:
        out: the output folder.
        is_begun: a job that was killed may have left its review.csv there.

    Raises:
        UsageError: says which.
    """
    manifest, foreign = storage.join(out, MANIFEST_FILE), ""
    if not is_of_scores(storage.join(out, "scores")):
        foreign = "folder scores"
    elif storage.exists(manifest):
        foreign = "" if _is_manifest(manifest) else MANIFEST_FILE
    elif not is_begun and storage.exists(storage.join(out, "review.csv")):
        foreign = "review.csv"
    if foreign:
        raise UsageError(f"{out} holds a {foreign} that no bt score wrote there; choose another -o")


def _is_manifest(location: str) -> bool:
    try:
        return "n_in" in storage.read_json(location)
    except (ValueError, TypeError):  # no JSON, or not an object
        return False


def refuse_other_work(begun: ScoreJob, job: ScoreJob) -> None:
    """Raise UsageError if a job is not the one that was begun."""
    differs = [
        f"{name} was {_shown(getattr(begun, name))} and is {_shown(getattr(job, name))}"
        for name in _SAME
        if getattr(begun, name) != getattr(job, name)
    ]
    if differs:
        raise UsageError(
            "the output folder holds an unfinished job that is other work: "
            f"{'; '.join(differs)}; give that job's command again to finish it, choose another "
            "-o, or pass --overwrite to begin anew"
        )


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={each}" for key, each in sorted(value.items()))
    text = storage.redact(str(value))
    return text[:16] if len(text) == 64 else text


@contextmanager
def writing(folder: str) -> Iterator[None]:
    """Raise RunError with what to do where a folder cannot be written while a job is under way.

    A file elsewhere that is full, or closed, on some node is named instead.
    """
    try:
        yield
    except OSError as error:  # of this process, or of a Ray task, which quotes its traceback
        number = next((n for n in _UNWRITABLE if os.strerror(n) in str(error)), None)
        if number is None:
            raise
        is_closed = number in (errno.EROFS, errno.EACCES)
        raise RunError(
            f"{_place_of(folder, str(error), os.strerror(number))} ({os.strerror(number)}); what "
            f"is scored is kept: {'see to that' if is_closed else 'make room'}, and the same "
            "command goes on from there"
        ) from error


def _place_of(folder: str, text: str, why: str) -> str:
    """Return what cannot be used, as far as an error says: the folder, or a file on some node."""
    shown = f"{storage.redact(folder)} cannot be written"
    paths = [path for line in text.splitlines() if why in line for path in _PATH.findall(line)]
    if paths:
        below = os.path.join(os.path.abspath(folder), "")
        if not storage.is_uri(folder) and any(f"{path}/".startswith(below) for path in paths):
            return shown
        return f"{storage.redact(paths[-1])} cannot be used on node {node_of(text)}"
    is_of_writer = _OF_WRITER in text or not is_elsewhere(text)
    if is_of_writer and not storage.is_uri(folder):
        return shown
    return shown.replace(" cannot", f" or {tempfile.gettempdir()} on node {node_of(text)} cannot")
