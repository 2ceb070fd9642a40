"""Lists of scans: a CSV, TSV or Parquet table with one row per scan.

The columns are a path and, if wanted, label, split, patient and the scan's origin, under the names
in `_COLUMNS`. The others are named to the user: one that holds patients under another name would go
unused. Relative paths start at the list's folder.
"""

import csv
import io
import posixpath
from functools import lru_cache
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bt_core import storage
from bt_core.errors import SourceError, UsageError
from bt_core.log import logger
from bt_core.scans.faults import is_filled
from bt_core.scans.identity import patient_hash
from bt_core.scans.limits import Limits
from bt_core.scans.members import ATTRIBUTES, MOST_VALUES, NAMED, Lister, ScanRef
from bt_core.store_errors import refuse_away

SUFFIXES: Final = (".csv", ".tsv", ".parquet")
_COLUMNS: Final = {
    "path": ("path", "file", "uri", "filename"),
    "label": ("label", "class"),
    "split": ("split",),
    "patient": ("patient", "patient_id", "patientid", "subject", "subject_id", "subjectid"),
    # members.ATTRIBUTES, in that order
    "site": ("site", "hospital", "institution", "centre", "center"),
    "scanner": ("scanner", "scanner_model", "manufacturer"),
    "sequence": ("sequence", "weighting"),
    "plane": ("plane", "orientation"),
    "source": ("source", "collection"),
}
_MAX_LIST_BYTES: Final = 512 * 1024**2


def read_list(lister: Lister, hash_key: bytes | None) -> None:
    """List the scans that a table names; whether they exist is seen when they are read.

    Args:
        lister: of the table; takes its rows.
        hash_key: key for the hashes that stand for the patients (`identity.patient_hash`, which
            gives none for placeholders such as ANONYMOUS); None leaves them out.

    Raises:
        SourceError: if the table cannot be read, is too long, has no column of paths, or one of
            them holds a secret.
    """
    source = lister.uri
    folder = posixpath.dirname(source)
    rooted = lru_cache(maxsize=1024)(_rooted)
    for number, row in enumerate(_rows(source, lister.limits), 1):
        path, label, split, patient, *attributes = (text.strip() for text in row)
        uri, member, position = _place(folder, path)
        try:
            storage.refuse_secrets(path if storage.is_uri(path) else storage.join(folder, path))
        except UsageError as error:
            raise SourceError(
                f"{storage.redact(source)}, row {number} without the header: {error}"
            ) from None
        if uri.startswith("/"):
            uri, missing = rooted(uri)
            member = posixpath.join(missing, member)
        hashed = patient_hash(patient, hash_key)
        scan_id = lister.next_id(path)
        origin = tuple(attributes)
        lister.append(ScanRef(scan_id, uri, member, position, label, split, hashed, origin))


def _rooted(folder: str) -> tuple[str, str]:
    """Return the nearest folder that is there, and the path below it of one that may not be.

    So a ref's folder that is missing later is missing on that node.
    """
    missing = ""
    while folder != "/" and not is_filled(folder):
        folder, name = posixpath.split(folder)
        missing = posixpath.join(name, missing)
    return folder, missing


def _place(folder: str, path: str) -> tuple[str, str, int]:
    """Return the folder of a path, the file as that folder's store names it, and its position."""
    if path.startswith("file:///"):
        path = unquote(urlsplit(path).path)
    if not storage.is_uri(path):
        return (*posixpath.split(path), -1) if path.startswith("/") else (folder, path, -1)
    plain, mark, query = path.partition("?")
    uri, name = posixpath.split(plain)
    if plain.startswith(("http://", "https://")):  # there the query is part of the file's name
        is_plain = not query and not set("#?%/") & set(unquote(name))
        return uri, unquote(name) if is_plain else name + mark + query, NAMED
    return uri + mark + query, unquote(name), NAMED


def _rows(source: str, given: Limits) -> list[tuple[str, ...]]:
    """Return the texts of every row in the order of `_COLUMNS`; empty where there is no column."""
    shown = storage.redact(source)
    try:
        filesystem, path = storage.filesystem(source)
        with storage.open_file(filesystem, path) as file:
            content = file.read(_MAX_LIST_BYTES + 1)
        if len(content) > _MAX_LIST_BYTES:
            raise SourceError(f"{shown} is over {_MAX_LIST_BYTES} bytes, too long for a list")
        is_parquet = source.lower().endswith(".parquet")
        columns = _parquet(content, given, shown) if is_parquet else _text(content, shown)
        for name in [name for name in ATTRIBUTES if name in columns]:
            if not _is_shareable(columns[name]):
                logger.warning(
                    "the list's %s is not used: it has over %d values, or one that looks like a "
                    "path or a person's name (with / \\ ^ or @)", name, MOST_VALUES
                )  # fmt: skip
                del columns[name]
    except SourceError:
        raise
    except Exception as error:  # of the store, csv and Arrow, which may quote a patient's row
        refuse_away(error)
        raise SourceError(
            f"{shown} is not a readable list ({type(error).__name__}); save it as CSV in UTF-8 or "
            "as Parquet"
        ) from None
    blank = [""] * len(columns["path"])
    return list(zip(*(columns.get(role, blank) for role in _COLUMNS), strict=True))


def _is_shareable(texts: list[str]) -> bool:
    """Return whether an attribute's texts may stand in a report that strangers read."""
    distinct = set(texts)
    return len(distinct) <= MOST_VALUES and not any(set("/\\^@") & set(t) for t in distinct)


def _roles(names: list[str], shown: str) -> dict[str, int]:
    """Return where the columns are that are used, and say which are not.

    Raises:
        SourceError: if none holds paths.
    """
    keys = [name.strip().lower().replace(" ", "_") for name in names]
    found = {
        role: keys.index(next(name for name in known if name in keys))
        for role, known in _COLUMNS.items()
        if set(known) & set(keys)
    }
    if "path" not in found:
        raise SourceError(
            f"{shown} has no column of paths; name it {', '.join(_COLUMNS['path'])} (further "
            f"columns that are used: {', '.join(list(_COLUMNS)[1:])})"
        )
    unused = [name for i, name in enumerate(names) if i not in found.values()]
    if unused:
        logger.warning(
            "columns of the list that are not used: %s (used: %s)",
            ", ".join(unused[:10]),
            ", ".join(f"{names[i]} as {role}" for role, i in found.items()),
        )
    return found


def _text(content: bytes, shown: str) -> dict[str, list[str]]:
    separator = "\t" if shown.lower().endswith(".tsv") else ","
    names, *rows = csv_rows(content.decode("utf-8-sig"), separator)
    rows = [row for row in rows if row]
    return {
        role: [row[i] if i < len(row) else "" for row in rows]
        for role, i in _roles(names, shown).items()
    }


def csv_rows(text: str, separator: str = ",") -> list[list[str]]:
    """Return the rows of a CSV text, the header first.

    Semicolons are taken where the header has no other separator, as spreadsheets write it where the
    comma is decimal.

    Raises:
        csv.Error: if it is not CSV.
    """
    first = text.partition("\n")[0]
    if separator not in first and ";" in first:
        separator = ";"
    return list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))


def _parquet(content: bytes, given: Limits, shown: str) -> dict[str, list[str]]:
    file = pq.ParquetFile(pa.BufferReader(content))
    if file.metadata.num_rows > given.max_members:
        raise SourceError(
            f"the list has {file.metadata.num_rows} rows, over the limit of {given.max_members}; "
            "set BT_MAX_MEMBERS to raise it"
        )
    names = file.schema_arrow.names
    wanted = {role: names[i] for role, i in _roles(names, shown).items()}
    table = file.read(columns=list(wanted.values()))
    found = {}
    for role, name in wanted.items():
        try:
            found[role] = _strings(table[name])
        except pa.ArrowNotImplementedError:
            if role not in ATTRIBUTES:
                raise
            logger.warning("the list's column %s is not used: it holds no texts", name)
    return found


def _strings(column: Any) -> list[str]:
    if pa.types.is_floating(column.type):  # what pandas writes for a missing number
        column = pc.if_else(pc.is_nan(column), None, column)
    return ["" if value is None else value for value in column.cast(pa.string()).to_pylist()]
