"""Who a scan is of, without saying it: keyed hashes that stand for patients."""

import hashlib
import hmac
import os
import secrets
from functools import lru_cache
from typing import Final

from bt_core import storage
from bt_core.errors import UsageError

_MIN_KEY_BYTES: Final = 16
"""A shorter key could be found by trying, and with it the names behind the hashes."""
_PLACEHOLDERS: Final = frozenset({
    "anon", "anonym", "anonymised", "anonymized", "anonymous", "anonymouspatient", "blank",
    "deidentified", "deleted", "dummy", "na", "nan", "noid", "noname", "none", "notavailable",
    "null", "patient", "patientid", "redacted", "removed", "test", "testpatient", "undefined",
    "unknown", "unknownpatient", "xxx", "xxxx",
})  # fmt: skip
"""What anonymizers and exporters write for every patient alike; compared by `is_placeholder`."""


def hash_key() -> tuple[bytes, bool]:
    """Return the site's key for `keyed_hash`, and whether it stays the same between runs.

    It is the text of the environment variable `BT_HASH_KEY`, else the content of the file that
    `BT_HASH_KEY_FILE` names, without surrounding white space. If neither is set, it is drawn at
    random once per process: equal patients then are equal within this run only.

    Raises:
        UsageError: if the key is shorter than 16 bytes, or its file cannot be read.
    """
    text, location = os.environ.get("BT_HASH_KEY"), os.environ.get("BT_HASH_KEY_FILE")
    if text is not None:
        return _checked(os.fsencode(text), "BT_HASH_KEY"), True
    if location is None:
        return _random_key(), False
    try:
        content = storage.read_bytes(location)
    except OSError as error:
        raise UsageError(
            f"BT_HASH_KEY_FILE: {storage.redact(location)} cannot be read "
            f"({type(error).__name__}); let it name a file with a secret of at least 16 bytes"
        ) from error
    return _checked(content, "the file of BT_HASH_KEY_FILE"), True


def patient_hash(patient: str, key: bytes | None) -> str:
    """Return the `keyed_hash` of a patient's identifier without the white space around it.

    It is empty for a placeholder (`is_placeholder`) and without a key.
    """
    return "" if key is None or is_placeholder(patient) else keyed_hash(patient.strip(), key)


def is_placeholder(patient: str) -> bool:
    """Return whether an identifier stands for no one, so that equal ones do not tell one patient.

    These are the words of a closed set (ANONYMOUS, UNKNOWN, N/A, REMOVED, ...) whatever their case
    and punctuation, zeros only, punctuation only, and the empty text.
    """
    plain = "".join(filter(str.isalnum, patient)).lower()
    return plain in _PLACEHOLDERS or not plain.strip("0")


def keyed_hash(value: str, key: bytes) -> str:
    """Return the first 32 hexadecimal digits of the HMAC-SHA256 (RFC 2104) of a text."""
    return hmac.new(key, value.encode("utf-8", "backslashreplace"), hashlib.sha256).hexdigest()[:32]


def _checked(key: bytes, where: str) -> bytes:
    key = key.strip()
    if len(key) < _MIN_KEY_BYTES:
        raise UsageError(
            f"{where} holds a key of {len(key)} bytes; it needs at least {_MIN_KEY_BYTES}, for "
            "example from: openssl rand -hex 32"
        )
    return key


@lru_cache(maxsize=1)
def _random_key() -> bytes:
    return secrets.token_bytes(32)
