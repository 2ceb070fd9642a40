"""Which locations a client may name: those below a prefix that the operator allows."""

import os
import re
from collections.abc import Iterable
from typing import Final

from bt_core import storage
from bt_core.scans.scan_lists import SUFFIXES

_URI: Final = re.compile(r"([a-z][a-z0-9+.-]*://[^/?#@%:\\\s]+)((?:/[^/?#%\\]+)*)/?")
"""A scheme in lower case, a host or bucket, and a path: no user, port, query or escapes."""
MAX_LENGTH: Final = 2048


class NotAllowedError(ValueError):
    """A location that a client may not name; the message quotes no other than that."""


def resolved(location: str) -> str:
    """Return the one way to write a location: a local path without links, or a plain URI.

    Raises:
        NotAllowedError: if it is neither an absolute path nor such a URI, or goes up by `..`.
    """
    if len(location) > MAX_LENGTH or not location.isprintable():
        raise NotAllowedError("it is too long, or holds characters that cannot be printed")
    if ".." in re.split(r"[/\\]", location):
        raise NotAllowedError("it holds '..'")
    if storage.is_uri(location):
        match = _URI.fullmatch(location)
        if match is None or "::" in location or "." in location.split("/"):
            raise NotAllowedError("it is not a plain URI as s3://bucket/folder")
        return match[1] + match[2]
    if not location.startswith("/"):
        raise NotAllowedError("it is neither an absolute path nor a URI")
    return os.path.realpath(location)


def allowed_source(location: str, prefixes: Iterable[str]) -> str:
    """Return a source resolved; it may be a prefix itself.

    Raises:
        NotAllowedError: if it lies below none, or is a list, whose rows would name other places.
    """
    found = _resolved("source", location)
    if found.lower().endswith(SUFFIXES):
        raise NotAllowedError("source is a list, which may name scans elsewhere; give their folder")
    if not any(_is_below(found, prefix) or found == resolved(prefix) for prefix in prefixes):
        raise NotAllowedError("source lies in no place from which the operator lets jobs read")
    return found


def allowed_output(location: str, prefixes: Iterable[str]) -> str:
    """Return an output folder resolved; it must lie below a prefix.

    Raises:
        NotAllowedError: if it lies below none.
    """
    found = _resolved("output", location)
    if not any(_is_below(found, prefix) for prefix in prefixes):
        raise NotAllowedError("output lies below no place to which the operator lets jobs write")
    return found


def _resolved(field: str, location: str) -> str:
    try:
        return resolved(location)
    except NotAllowedError as error:
        raise NotAllowedError(f"{field}: {error}") from error


def _is_below(found: str, prefix: str) -> bool:
    return found.startswith(resolved(prefix).rstrip("/") + "/")
