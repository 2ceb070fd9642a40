"""The manifest of a scoring job: its scans in Parquet, written while they are listed.

Neither listing nor scoring holds all of them: a piece of some thousand refs is all that is kept.
"""

import hashlib
from typing import Final

import pyarrow as pa

from bt_core import storage
from bt_core.data.catalog import ref_columns
from bt_core.data.score_work import writing
from bt_core.scans.members import ScanRef

PIECE_ROWS: Final = 8192


class RefDigest:
    """A sink for `list_scans` that keeps a digest of the refs and nothing else."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def __call__(self, ref: ScanRef) -> None:
        """Take the next ref."""
        fields = (ref.scan_id, ref.uri, ref.member, str(ref.position))
        self._digest.update(("\0".join(fields) + "\n").encode())

    def hexdigest(self) -> str:
        """Return the SHA-256 of the refs so far, in their order."""
        return self._digest.hexdigest()


class ManifestWriter(RefDigest):
    """A sink for `list_scans` that writes the refs as it gets them.

    Args:
        folder: gets `refs-NNNNN.parquet`, each with scan_id, uri, member and position of up to
            8192 refs, in their order.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder
        self._piece: list[ScanRef] = []
        self._num_pieces = 0

    def __call__(self, ref: ScanRef) -> None:
        """Take the next ref."""
        super().__call__(ref)
        self._piece.append(ref)
        if len(self._piece) == PIECE_ROWS:
            self.close()

    def close(self) -> None:
        """Write what is left."""
        if not self._piece:
            return
        name = f"refs-{self._num_pieces:05d}.parquet"
        with writing(self._folder):
            table = pa.table(ref_columns(self._piece))
            storage.write_table(storage.join(self._folder, name), table)
        self._num_pieces += 1
        self._piece = []
