"""Locations and the stores behind them, each opened once per process and asked again when it fails.

A location is a local path, or a URI: of a web server, or any store that pyarrow or fsspec opens. An
S3 store (or web server) that answers with an error, late or not at all is asked again
(`MAX_ATTEMPTS`), by every process that gets its client; one that stays away, or refuses, is
`StoreError`, never a scan that cannot be read.

The requests of a process to S3 share a budget of 100 retries (AWS's standard), which a success
fills up again: where a store fails all of many requests at once, it is asked less often than that.
"""

import json
import os
import re
import threading
from functools import lru_cache
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import fsspec
import pyarrow as pa
from pyarrow import fs

from bt_core.errors import ConfigError, UsageError, first_line
from bt_core.web import WebHandler

MAX_ATTEMPTS: Final = 8
"""Of a request to S3, with pauses that double: up to 70 s in all. `AWS_MAX_ATTEMPTS` changes it."""
VARIABLES: Final = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION",
    "AWS_MAX_ATTEMPTS",
)  # fmt: skip
"""Of the environment: where a store is and how often it is asked, without what is secret."""
_CONNECT_SECONDS: Final = 10.0
_SILENT_SECONDS: Final = 30.0
"""How long an answer may stand still before its request counts as failed."""
_PASSWORD: Final = re.compile(r"(?:(?<=s3)://[^/@]*:|://[^/@]*:(?!\d+/))[^@]*@")
"""A URI with `user:password@`; the password may hold slashes, as keys of S3 do."""
_SECRET_ENDINGS: Final = (
    "signature", "sig", "token", "secret", "password", "passwd", "pwd", "credential",
    "credentials", "key", "keyid", "auth", "authorization",
)  # fmt: skip
"""How names of secrets in a query end, without case and punctuation, as in `X-Amz-Signature`."""


def is_uri(location: str) -> bool:
    """Return whether a location has a scheme, as in `s3://bucket/key`."""
    return "://" in location


def absolute(location: str) -> str:
    """Return a URI as it is, and a local path absolute with `~` expanded."""
    return location if is_uri(location) else os.path.abspath(os.path.expanduser(location))


def redact(location: str) -> str:
    """Return a location for messages: a URI without user, password and query (signatures)."""
    if not is_uri(location):
        return location
    without_user = re.sub(r"://[^/@]*@", "://***@", _PASSWORD.sub("://***@", location))
    return re.sub(r"\?.*", "?***", without_user, flags=re.DOTALL)


def refuse_secrets(location: str) -> None:
    """Raise UsageError, which does not quote it, if a URI holds a password or signs itself."""
    if not is_uri(location):
        return
    queries = re.split("[?&;#]", location.partition("?")[2])
    names = (re.sub(r"[\W_]", "", unquote(part.partition("=")[0])) for part in queries)
    if _PASSWORD.search(location) or any(n.lower().endswith(_SECRET_ENDINGS) for n in names):
        raise UsageError(
            f"{redact(location)} holds a password, key or signature, which would be written into "
            "every result; give credentials by the environment (AWS_ACCESS_KEY_ID, ...) or a file "
            "of your client, or download the scans first"
        )


def filesystem(location: str) -> tuple[fs.FileSystem, str]:
    """Return the pyarrow filesystem of a location and the path inside it.

    Raises:
        UsageError: if neither pyarrow nor fsspec opens the scheme; says which package is missing.
    """
    if not is_uri(location):
        return fs.LocalFileSystem(), absolute(location)
    return _open_uri(location)


class S3Store(fs.S3FileSystem):  # type: ignore[misc]
    """S3 with explicit retries and time-outs, which pyarrow's own client forgets when it travels.

    Small files take one request instead of three. Folders are not made, since they are there with
    their first file; buckets are.

    Args:
        max_attempts: of each request.
        options: of `pyarrow.fs.S3FileSystem`.
    """

    def __init__(self, max_attempts: int, **options: Any) -> None:
        self._max_attempts = max_attempts
        retries = fs.AwsStandardS3RetryStrategy(max_attempts=max_attempts)
        super().__init__(**options, retry_strategy=retries)

    def __reduce__(self) -> tuple[Any, ...]:
        [options] = super().__reduce__()[1]
        return _s3_store, (self._max_attempts, options)

    def create_dir(self, path: str, *, recursive: bool = True) -> None:
        """Make a bucket; a folder needs no request."""
        if "/" not in path.strip("/"):
            super().create_dir(path, recursive=recursive)


_opening: Final = threading.RLock()
"""To open a client waits for all requests of other clients, with their retries: once is enough."""
_buckets: Final[dict[str, S3Store]] = {}


def _s3_store(max_attempts: int, options: dict[str, Any]) -> S3Store:
    """Return the client of some options, which this process may have already."""
    fixed = {
        "allow_delayed_open": True,
        "connect_timeout": _CONNECT_SECONDS,
        "request_timeout": _SILENT_SECONDS,
    }
    with _opening:
        return _client(max_attempts, json.dumps(options | fixed, sort_keys=True))


@lru_cache(maxsize=64)
def _client(max_attempts: int, options: str) -> S3Store:
    return S3Store(max_attempts, **json.loads(options))


def _open_uri(location: str) -> tuple[fs.FileSystem, str]:
    if location.startswith(("http://", "https://")):
        return fs.PyFileSystem(WebHandler()), location
    if location.startswith("s3://"):
        parts = urlsplit(location.replace("#", "%23"))
        query = f"?{parts.query}" if parts.query else ""
        path = unquote(parts.netloc.rpartition("@")[2] + parts.path)
        return _open_bucket(f"s3://{parts.netloc}{query}"), path.rstrip("/")
    return _open_once(location)


def _open_bucket(location: str) -> fs.FileSystem:
    """Open a bucket once per process, so that its connections serve all its files."""
    if location not in _buckets:
        given = os.environ.get("AWS_MAX_ATTEMPTS", str(MAX_ATTEMPTS))
        if not given.isdecimal() or int(given) < 1:
            raise ConfigError(f"AWS_MAX_ATTEMPTS={given}: give a whole number of 1 or more")
        with _opening:
            if location not in _buckets:
                [options] = _open_once(location)[0].__reduce__()[1]
                _buckets[location] = _s3_store(int(given), options)
    return _buckets[location]


@lru_cache(maxsize=256)
def _open_once(location: str) -> tuple[fs.FileSystem, str]:
    try:
        return fs.FileSystem.from_uri(location.replace(" ", "%20"))  # type: ignore[no-any-return]
    except (pa.ArrowInvalid, ValueError) as error:
        if "Unrecognized filesystem" not in str(error):
            raise UsageError(f"cannot open {redact(location)}: it is not a valid URI") from error
    except OSError as error:  # the first line; what follows may be a page of library paths
        raise UsageError(f"cannot open {redact(location)}: {redact(first_line(error))}") from error
    try:
        opened, path = fsspec.core.url_to_fs(location)
    except Exception as error:  # each of fsspec's stores has its own errors
        raise UsageError(
            f"cannot open {redact(location)}: {redact(first_line(error))}; use a local path or a "
            "URI that pyarrow.fs (s3://, gs://, hdfs://, file://) or fsspec (http://, ...) opens"
        ) from error
    return fs.PyFileSystem(fs.FSSpecHandler(opened)), str(path)
