"""API keys: a file of their names, roles and hashes, and what follows it while it changes.

A key is 256 random bits, so a plain SHA-256 of it is right at rest: slow and salted hashes are for
passwords, which can be guessed; nobody guesses 256 random bits, salted or not, and a fast hash lets
every request be checked without a way to keep the server busy.
"""

import hashlib
import hmac
import os
import re
import secrets
import stat
import tempfile
import zlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final, Literal, Self, get_args

from filelock import FileLock, Timeout
from pydantic import AwareDatetime, Field, model_validator

from bt_core import storage
from bt_core.config import StrictModel, parse
from bt_core.errors import BtError, ConfigError, UsageError
from bt_core.log import logger

Role = Literal["predict", "explain", "jobs", "admin"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)
"""What a key may be for. None includes another: who watches the server's figures (`admin`) does not
get to see scans by that, so `admin` alone may not predict."""

KEY_FORM: Final = re.compile(r"bt_([0-9a-f]{64})([0-9a-f]{8})")
"""256 random bits and a CRC-32 of their digits, so that a scanner for leaked keys knows one and a
typing error is told from a key that was revoked."""

_LOCK_SECONDS: Final = 10.0


class StoredKey(StrictModel):
    """A key as the file holds it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    """Whose it is; stands in the audit log."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the whole key as it is sent."""
    roles: tuple[Role, ...] = Field(min_length=1)
    created: AwareDatetime
    expires: AwareDatetime | None = None
    """From then on it is refused."""


class KeysFile(StrictModel):
    """All keys of a server."""

    format_version: Literal[1] = 1
    keys: tuple[StoredKey, ...] = ()

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [key.name for key in self.keys]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two keys are named {', '.join(doubled)}")
        return self


def new_key() -> str:
    """Return a new random key."""
    digits = secrets.token_hex(32)
    return f"bt_{digits}{_checksum(digits)}"


def is_well_formed(key: str) -> bool:
    """Return whether a text has the form of a key and its own checksum."""
    match = KEY_FORM.fullmatch(key)
    return match is not None and _checksum(match[1]) == match[2]


def _checksum(digits: str) -> str:
    return f"{zlib.crc32(digits.encode()):08x}"


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(location: str) -> KeysFile:
    """Return the keys of a local file.

    Raises:
        ConfigError: if it is not there, is not a keys file, or others than its owner may write it,
            who could then let themselves in.
    """
    try:
        with open(location, "rb") as file:
            mode, content = os.fstat(file.fileno()).st_mode, file.read()
        found = storage.loads_json(content)
    except FileNotFoundError as error:
        raise ConfigError(
            f"keys file {location} does not exist; make it by bt keys add {location} --name NAME "
            "--role predict"
        ) from error
    except OSError as error:
        raise ConfigError(f"keys file {location} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"keys file {location} is not JSON; bt keys add writes one") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"keys file {location} may be written by others than its owner; run chmod 600 on it"
        )
    return parse(KeysFile, found, f"keys file {location}")


def add_key(location: str, name: str, roles: Sequence[str], expires: datetime | None = None) -> str:
    """Add a key to a file, which is made if it is not there, and return it; it is kept nowhere.

    Raises:
        UsageError: if the name is taken, or the file cannot be written.
        ConfigError: if a name, role or the file does not validate.
    """
    key = new_key()
    entry = {
        "name": name,
        "sha256": _digest(key),
        "roles": tuple(dict.fromkeys(roles)),
        "created": datetime.now(UTC),
        "expires": expires,
    }
    stored = parse(StoredKey, entry, "key")

    def added(keys: tuple[StoredKey, ...]) -> tuple[StoredKey, ...]:
        if any(other.name == name for other in keys):
            raise UsageError(f"{location} has a key {name!r}; revoke it first, or choose a name")
        return (*keys, stored)

    _change(location, added, may_be_new=True)
    return key


def revoke_key(location: str, name: str) -> None:
    """Take a key out of a file; servers that follow the file refuse it from then on.

    Raises:
        UsageError: if there is none of this name, or the file cannot be written.
    """

    def without(keys: tuple[StoredKey, ...]) -> tuple[StoredKey, ...]:
        if all(key.name != name for key in keys):
            names = ", ".join(key.name for key in keys) or "none"
            raise UsageError(f"{location} has no key {name!r}; it has {names}")
        return tuple(key for key in keys if key.name != name)

    _change(location, without, may_be_new=False)


def _change(
    location: str,
    change: Callable[[tuple[StoredKey, ...]], tuple[StoredKey, ...]],
    *,
    may_be_new: bool,
) -> None:
    try:
        with FileLock(f"{location}.lock", timeout=_LOCK_SECONDS, mode=0o600):
            new = may_be_new and not os.path.exists(location)
            content = KeysFile() if new else read_keys(location)
            changed = KeysFile(keys=change(content.keys))
            _replace(location, storage.dumps_json(changed.model_dump(mode="json")))
    except Timeout as error:
        raise UsageError(f"another bt keys is changing {location}; try again") from error
    except OSError as error:
        raise UsageError(f"keys file {location} cannot be written ({error.strerror})") from error


def _replace(location: str, content: bytes) -> None:
    """Write a file of mode 0600 beside its place and rename it."""
    folder, name = os.path.split(os.path.abspath(location))
    descriptor, beside = tempfile.mkstemp(prefix=f"{name}.", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, location)
    except OSError:
        os.unlink(beside)
        raise


class KeyRing:
    """The keys of a file, followed as it changes, so that revoking needs no restart.

    A file that vanished, or turned unreadable or invalid, changes nothing until it is mended, and
    is logged: a slip of the hand in it must neither let everybody in nor lock everybody out.

    Args:
        location: of a file on this host.

    Raises:
        ConfigError: as `read_keys`.
    """

    def __init__(self, location: str) -> None:
        self._location = location
        self._stamp = self._now()
        self._keys = read_keys(location).keys

    def find(self, key: str) -> StoredKey | None:
        """Return the entry of a key, expired or not; every entry is compared, in constant time."""
        self._follow()
        digest, found = _digest(key), None
        for stored in self._keys:
            if hmac.compare_digest(stored.sha256, digest):
                found = stored
        return found

    def _follow(self) -> None:
        stamp = self._now()
        if stamp == self._stamp:
            return
        before, self._stamp = self._stamp, stamp
        try:
            self._keys = read_keys(self._location).keys
            logger.info("keys file changed: %d keys", len(self._keys))
        except BtError as error:
            logger.error("the last good keys stay: %s", error)
            if stamp and isinstance(error.__cause__, OSError):  # it may be read in a moment
                self._stamp = before

    def _now(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self._location)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def has_expired(key: StoredKey) -> bool:
    """Return whether a key is over its time."""
    return key.expires is not None and datetime.now(UTC) >= key.expires
