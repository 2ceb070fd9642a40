"""A labelled source that is no prepared dataset: what external validation tests."""

import pyarrow as pa

from bt_core.data import copies
from bt_core.data.families import FamilyStage
from bt_core.data.pipeline import survey


def external_scans(refs: pa.Table, key: bytes) -> pa.Table:
    """Return catalog rows of the scans of a source, with families and groups among themselves.

    Args:
        refs: labelled refs, see `catalog.label_refs`.
        key: of the patients' hashes.

    Returns:
        One row for each ref. A picture under several labels has the reason `label_conflict`;
        `copy_in_training` is False everywhere, since only a bundle knows what it was trained on.
    """
    catalog, pairs = survey(refs, FamilyStage(key))
    catalog = copies.add_families(catalog, pairs)
    catalog = copies.leave_out_conflicts(catalog, copies.find_conflicts(catalog, pairs))
    return catalog.append_column("copy_in_training", pa.array([False] * catalog.num_rows))
