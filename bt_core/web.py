"""Files of a web server (http://, https://), of which every answer is checked before it counts.

fsspec, which pyarrow would take, puts a part that breaks off, or is of other bytes than asked for,
into a file as if it were whole.
"""

import io
import logging
import re
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any, BinaryIO, Final
from urllib.parse import urlsplit

import pyarrow as pa
import urllib3
from pyarrow import fs
from urllib3.exceptions import HTTPError, ProtocolError

from bt_core.store_errors import FileFault

_RETRIES: Final = urllib3.Retry(
    total=7,
    redirect=5,
    other=0,  # a certificate that does not hold
    allowed_methods=None,
    status_forcelist=(408, 429, 500, 502, 503, 504),
    backoff_factor=0.1,
    respect_retry_after_header=False,  # it may ask for hours, or in words
    raise_on_redirect=False,
    raise_on_status=False,
)
"""Of a request, with pauses that double: up to 13 s in all."""
_TIMEOUT: Final = urllib3.Timeout(connect=10.0, read=30.0)
_GONE: Final = (404, 410)
_STORED: Final = ("", "identity", "aws-chunked")
"""Encodings of an answer that leave the file's bytes as they are."""
_SPAN: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_HELD_BYTES: Final = 512 * 1024**2
"""Largest file held in memory because its server does not read from the middle of a file."""


def open_url(url: str, buffer_bytes: int = 256 * 1024) -> BinaryIO | io.BufferedReader:
    """Open a file for reading from any place in it; a small one takes one request.

    Args:
        url: of the file.
        buffer_bytes: how much one request brings.

    Raises:
        FileNotFoundError: if the server says so.
        FileFault: if it gives files from their start only, and this one is over 512 MiB.
        OSError: if the server does not answer, refuses, or answers in part.
    """
    answer = _get(url, 0, buffer_bytes)
    if answer.num_in_all == len(answer.content):
        return io.BytesIO(answer.content)
    return io.BufferedReader(_WebFile(url, answer), buffer_bytes)


class WebHandler(fs.FileSystemHandler):  # type: ignore[misc]
    """Web servers as a filesystem of pyarrow; its paths are URLs, nothing is listed or written."""

    def get_type_name(self) -> str:
        """Return the name of this kind of store."""
        return "web"

    def normalize_path(self, path: str) -> str:
        """Return the URL as it is."""
        return path

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        """Return of each URL whether there is a file, and what the server says of its version.

        Raises:
            OSError: if the server does not answer, or refuses.
        """
        return [_info_of(path) for path in paths]

    def open_input_file(self, path: str) -> pa.PythonFile:
        """Open a file as `open_url` does."""
        return pa.PythonFile(open_url(path), mode="r")

    def open_input_stream(self, path: str) -> pa.PythonFile:
        """Open a file as `open_url` does."""
        return self.open_input_file(path)

    def _refuse(self, *_: Any) -> Any:
        raise OSError("a web server only gives files: nothing is listed there, or written")

    get_file_info_selector = create_dir = delete_dir = delete_dir_contents = _refuse
    delete_root_dir_contents = delete_file = move = copy_file = _refuse
    open_output_stream = open_append_stream = _refuse

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WebHandler)

    def __hash__(self) -> int:
        return hash(WebHandler)


@dataclass(frozen=True)
class _Answer:
    """A part of a file, or all of it.

    Attributes:
        content: the bytes.
        num_in_all: bytes of the whole file.
        version: by which the server tells one state of the file from another.
    """

    content: bytes
    num_in_all: int
    version: tuple[str, ...] = ()


class _WebFile(io.RawIOBase):
    """A file as a raw Python file that asks for each part."""

    def __init__(self, url: str, start: _Answer) -> None:
        self._url, self._start, self._size = url, start, start.num_in_all
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + (0, self._position, self._size)[whence]
        if position < 0:
            raise OSError("a seek to before the start of the file")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._size - self._position))
        content = self._start.content[self._position : self._position + wanted]
        if wanted and not content:
            answer = _get(self._url, self._position, wanted)
            if answer.version != self._start.version or answer.num_in_all != self._size:
                raise _fault(self._url, "a file that changes")
            content = answer.content
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


@lru_cache(maxsize=1)
def _pool() -> urllib3.PoolManager:
    # What it says names files, of which a name may be a patient's.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    return urllib3.PoolManager(maxsize=16)


def _info_of(url: str) -> fs.FileInfo:
    answer = _ask(url, {"Range": "bytes=0-0"})
    answer.close()
    if answer.status in _GONE:
        return fs.FileInfo(url, fs.FileType.NotFound)
    if answer.status not in (200, 206, 416):  # 416: of an empty file there is no first byte
        raise _fault(url, f"status {answer.status}")
    span = _SPAN.fullmatch(answer.headers.get("Content-Range", ""))
    size = span[3] if span else answer.headers.get("Content-Length", "")
    size = int(size) if re.fullmatch(r"\d{1,18}", size, re.ASCII) else None
    try:
        changed = parsedate_to_datetime(answer.headers.get("Last-Modified", ""))
    except (ValueError, OverflowError):
        changed = None
    return fs.FileInfo(url, fs.FileType.File, size=size, mtime=changed)


def _get(url: str, first: int, num: int) -> _Answer:
    """Return at most `num` bytes of a file; all, where the server gives no parts of files.

    urllib3 asks again until an answer begins; for what breaks off behind that, this does.
    """
    retries = _RETRIES
    while True:
        answer = _ask(url, {"Range": f"bytes={first}-{first + num - 1}"})
        try:
            if answer.status == 206:
                return _part(url, answer, first, num)
            if answer.status == 200:
                return _whole(url, answer, first)
            if answer.status == 416 and answer.headers.get("Content-Range") == "bytes */0":
                return _Answer(b"", 0)
        except HTTPError as error:
            try:
                retries = retries.increment("GET", url, error=error)
            except HTTPError:
                raise _fault(url, type(error).__name__) from None
            retries.sleep()
            continue
        finally:
            answer.close()
        if answer.status in _GONE:
            raise FileNotFoundError("the server has no such file")
        raise _fault(url, f"status {answer.status}")


def _ask(url: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
    """Return an answer whose content has not come yet."""
    url = url.replace("#", "%23")  # of a file's name: what follows it in a URL would not be sent
    try:
        urlsplit(url)
        urllib3.util.parse_url(url)
    except ValueError as error:
        raise FileFault(type(error).__name__) from None
    try:
        return _pool().request(
            "GET",
            url,
            headers={"Accept-Encoding": "identity", **headers},
            retries=_RETRIES,
            timeout=_TIMEOUT,
            preload_content=False,
        )
    except (HTTPError, ValueError) as error:  # it quotes the URL, which may hold a name
        raise _fault(url, type(getattr(error, "reason", error)).__name__) from None


def _part(url: str, answer: urllib3.BaseHTTPResponse, first: int, num: int) -> _Answer:
    """Return a part that is of the bytes asked for, though perhaps fewer.

    Raises:
        ProtocolError: if it broke off.
    """
    span = _SPAN.fullmatch(answer.headers.get("Content-Range", ""))
    start, last, num_in_all = map(int, span.groups()) if span else (-1, -1, -1)
    if start != first or not first <= last < min(first + num, num_in_all):
        raise _fault(url, "an answer unlike the question")
    _refuse_encoded(url, answer)
    content = answer.read(num + 1, decode_content=False)
    if len(content) != last + 1 - first:
        raise ProtocolError
    version = [answer.headers.get(name, "") for name in ("ETag", "Last-Modified")]
    return _Answer(content, num_in_all, tuple(version))


def _whole(url: str, answer: urllib3.BaseHTTPResponse, first: int) -> _Answer:
    """Return a whole file.

    Raises:
        ProtocolError: if it broke off, or a later part was asked for.
    """
    if first:
        raise ProtocolError
    is_chunked = answer.headers.get("Transfer-Encoding", "").lower() == "chunked"
    if answer.length_remaining is None and not is_chunked:
        raise _fault(url, "an answer without a length")  # one that broke off would look whole
    _refuse_encoded(url, answer)
    held = io.BytesIO()
    for chunk in answer.stream(1024**2, decode_content=False):
        held.write(chunk)
        if held.tell() > _HELD_BYTES:
            raise FileFault("the server reads files from their start only; fetch it first")
    return _Answer(held.getvalue(), held.tell())


def _refuse_encoded(url: str, answer: urllib3.BaseHTTPResponse) -> None:
    """Raise OSError for an answer of other bytes than the file's, though these were asked for.

    Servers call the packing of such files themselves an encoding.
    """
    is_packed = urlsplit(url).path.lower().endswith((".gz", ".tgz"))
    if answer.headers.get("Content-Encoding", "").lower() not in _STORED and not is_packed:
        raise _fault(url, "an answer unlike the question")


def _fault(url: str, what: str) -> OSError:
    """Return the error of a server, in words that `store_errors` knows, without the path."""
    parts = urlsplit(url)
    return OSError(f"web server {parts.scheme}://{parts.netloc.rpartition('@')[2]}: {what}")
