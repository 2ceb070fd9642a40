"""What an error of a store means: one file is not there, or the store is away, or refuses."""

import platform
import re
from typing import Final

from bt_core.errors import StoreError

_AWAY: Final = re.compile(
    r"AWS Error (?:NETWORK_CONNECTION|SLOW_DOWN|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|"
    r"REQUEST_TIMEOUT|THROTTLING|UNKNOWN \(HTTP status (?:5\d\d|429|408)\))"
    r"|(?:UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|RESOURCE_EXHAUSTED)\b"
    r"|web server \S+: (?!status 4(?!08|29))"
)
"""How pyarrow says that a store did not answer, however often it was asked."""
_OF_FILE: Final = re.compile(
    r"AWS Error (?:NO_SUCH_KEY|RESOURCE_NOT_FOUND|INVALID_RANGE|"
    r"UNKNOWN \(HTTP status (?:404|416)\))|(?:NOT_FOUND|OUT_OF_RANGE)\b"
)
"""What a store says of one file: it is not there, or is shorter than it was."""
_SAID: Final = re.compile(
    r"AWS Error [A-Z_]+(?: \(HTTP status \d+\))?(?: during \w+ operation)?"
    r"(?:: (?:Unable to parse ExceptionName: \w+|curlCode: \d+, [\w' ]+))?"
    r"|(?<=google::cloud::Status\()[A-Z_]+"
    r"|web server \S+: (?:status \d+|[A-Z]\w+|a file that changes|"
    r"an answer (?:without a length|unlike the question))"
)
"""What a store says, without its own words, which may name a file."""
_QUOTED: Final = re.compile(r"\bStoreError: ([^\n]+)")
_ELSEWHERE: Final = re.compile(r"\(pid=\d+, ip=([^,)]+)")
"""The node of a task, in what Ray quotes of its traceback."""
_WEB: Final = re.compile(r"web server (\S+): (.+)")
_BUCKET: Final = re.compile("in bucket '([^']*)'")


class FileFault(OSError):
    """What is wrong with one file, and not with its store."""


def is_of_file(error: OSError) -> bool:
    """Return whether an error says that one file is not there, or is shorter than it was."""
    found = _SAID.search(str(error))
    return isinstance(error, FileNotFoundError) or bool(found and _OF_FILE.match(found[0]))


def refuse_away(error: BaseException, store: str = "the store") -> None:
    """Raise StoreError if an error came from a store that did not answer, or refused; else nothing.

    Args:
        error: of this process, or Ray's of another one, which quotes its traceback.
        store: what to call one that the error does not name.
    """
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if quoted := _QUOTED.search(text):
            raise StoreError(quoted[1]) from error
        if isinstance(seen, StoreError):
            raise StoreError(text) from error
        if (found := _SAID.search(text)) and not _OF_FILE.match(found[0]):
            raise StoreError(_explain(found[0], text, store)) from error
        seen = seen.__cause__ or seen.__context__


def _explain(said: str, text: str, store: str) -> str:
    is_away = bool(_AWAY.match(said))
    if bucket := _BUCKET.search(text):
        store = f"s3://{bucket[1]}"
    elif web := _WEB.match(said):
        store, said = web.groups()
    if is_away:
        return (
            f"{store} does not answer: {said.strip()}; what is done is kept: when it answers "
            "again, give the same command again"
        )
    return (
        f"{store} refuses node {node_of(text)}: {said}; what is done is kept: give every node "
        "valid credentials and the store's settings, then give the same command again"
    )


def is_elsewhere(text: str) -> bool:
    """Return whether an error's text came from a Ray task."""
    return bool(_ELSEWHERE.search(text))


def node_of(text: str) -> str:
    """Return the node that an error's text came from: of a Ray task by its address, or this one."""
    found: list[str] = _ELSEWHERE.findall(text)
    return found[-1] if found else platform.node()
