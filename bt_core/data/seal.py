"""The seal of the test split: only `bt evaluate` opens it, and every opening is on record.

A figure on test scans is honest for the first model that is held against it; each further look
lets the choice of models lean towards these scans. So openings are counted where the scans are.
"""

import uuid
from datetime import UTC, datetime
from typing import Final

from pydantic import AliasChoices, Field

from bt_core import storage
from bt_core.config import StrictModel, parse
from bt_core.errors import SealedError

_FOLDER: Final = "test_openings"
_MAY_OPEN: Final = frozenset({"evaluate"})


class Opening(StrictModel):
    """One reading of the test split; says nothing of the person or the machine."""

    opened_at: str
    """ISO 8601, UTC."""
    command: str
    bundle_id: str = Field(validation_alias=AliasChoices("bundle_id", "run_id"))
    """Of the bundle that was held against the test scans; records used to call it `run_id`."""
    dataset_digest: str


def refuse_test(split: str, what: str) -> None:
    """Raise SealedError if a split is the test split.

    Args:
        split: name of the split that is asked for.
        what: the thing asked for, for the message.
    """
    if split == "test":
        raise SealedError(
            f"{what} of the test split are sealed: models are chosen on validation scans, and only "
            "bt evaluate reads test scans, which is put on record"
        )


def record_opening(dataset: str, command: str, bundle_id: str, dataset_digest: str) -> None:
    """Put an opening on record, before anything is read.

    Each is a file of its own that is never written again: stores have no appending, and two
    commands at once lose nothing this way.

    Args:
        dataset: folder of the dataset.
        command: the `bt` command that opens.
        bundle_id: of the bundle that it measures.
        dataset_digest: digest of the dataset's scans, labels and splits.

    Raises:
        SealedError: if the command is not one that may open the test split.
    """
    if command not in _MAY_OPEN:
        refuse_test("test", f"rows asked for by {command!r}")
    now = datetime.now(UTC)
    opening = Opening(
        opened_at=now.isoformat(timespec="seconds"),
        command=command,
        bundle_id=bundle_id,
        dataset_digest=dataset_digest,
    )
    name = f"{now:%Y%m%dT%H%M%S.%fZ}-{uuid.uuid4().hex[:8]}.json"
    storage.write_json(storage.join(dataset, _FOLDER, name), opening.model_dump())


def openings(dataset: str) -> list[Opening]:
    """Return all openings on record in a dataset's folder, oldest first."""
    folder = storage.join(dataset, _FOLDER)
    places = [storage.join(folder, name) for name in storage.list_files(folder, ".json")]
    return [parse(Opening, storage.read_json(place), place) for place in places]
