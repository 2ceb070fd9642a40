"""Scans on a web server that gives parts or not, fails, or lies: whole and right, or an error."""

import gc
import gzip
import logging
import pickle
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from pyarrow import fs

from bt_core import storage, web
from bt_core.errors import SourceError, StoreError
from bt_core.scans.archives import list_scans, read_member
from bt_core.store_errors import refuse_away
from tests.unit.sources import FILES, contents, make_zip, refusal, tar_bytes

LARGE = random.Random(0).randbytes(700_000)  # of several requests


class Answering(BaseHTTPRequestHandler):
    """Answers a GET as its server wants it."""

    def log_message(self, *words: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.num_requests += 1
        content = self.server.files.get(unquote(urlsplit(self.path).path).lstrip("/"))
        if content is None:
            return self.send_error(404)
        try:
            self.server.answer(self, content, self.server.num_requests)
        except (BrokenPipeError, ConnectionResetError):  # of a client that has seen enough
            self.close_connection = True

    def span(self, content: bytes) -> tuple[int, int]:
        """Return where the part that is asked for begins and ends."""
        first, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")
        return int(first), min(int(last or len(content)) + 1, len(content))

    def send(self, status: int, body: bytes = b"", **headers: object) -> None:
        self.send_response(status)
        assert isinstance(self.server, Server)
        given = {"Content_Length": len(body), "Last_Modified": self.server.changed,
                 "ETag": self.server.tag, **headers}  # fmt: skip
        for name, value in given.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """Files at a port of loopback."""

    def __init__(self, answer: "Answer", files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.answer, self.files, self.num_requests = answer, files, 0
        self.changed, self.tag = MADE, '"1"'
        self.address = f"http://127.0.0.1:{self.server_port}"


MADE = "Thu, 01 Jan 2026 00:00:00 GMT"
Answer = Callable[[Answering, bytes, int], None]


def part(to: Answering, content: bytes, _: int = 0, most: int = 10**9) -> None:
    """Answer as most servers do."""
    start, end = to.span(content)
    if start >= len(content):
        return to.send(416, Content_Range=f"bytes */{len(content)}")
    end = min(end, start + most)
    place = f"bytes {start}-{end - 1}/{len(content)}"
    to.send(206, content[start:end], Content_Range=place)


def capped(to: Answering, content: bytes, _: int) -> None:
    part(to, content, most=100_000)


def whole(to: Answering, content: bytes, _: int) -> None:
    to.send(200, content)


def chunked(to: Answering, content: bytes, _: int) -> None:
    to.protocol_version = "HTTP/1.1"
    to.close_connection = True
    body = b"%x\r\n%s\r\n" % (len(content), content) if content else b""
    to.send(200, body + b"0\r\n\r\n", Content_Length=None, Transfer_Encoding="chunked")


def elsewhere(answer: Answer) -> Answer:
    """Send on each request to where the file is."""

    def send_on(to: Answering, content: bytes, i: int) -> None:
        if to.path.endswith("?there"):
            return answer(to, content, i // 2)
        assert isinstance(to.server, Server)
        to.send(302, Location=f"{to.server.address}{to.path}?there")

    return send_on


def now_and_then(fault: Answer, otherwise: Answer) -> Answer:
    """Fail two of each three requests."""

    def answer(to: Answering, content: bytes, i: int) -> None:
        (otherwise if i % 3 == 0 else fault)(to, content, i)

    return answer


def busy(to: Answering, *_: object) -> None:
    to.send(503, b"not now")


def gone(to: Answering, *_: object) -> None:
    to.close_connection = True


def part_cut(to: Answering, content: bytes, _: int, says: bool = True) -> None:
    start, end = to.span(content)
    if start >= end:
        return part(to, content)
    place = f"bytes {start}-{end - 1}/{len(content)}"
    length = end - start if says else None
    to.send(206, content[start : (start + end) // 2], Content_Range=place, Content_Length=length)
    to.close_connection = True


def part_cut_unsaid(to: Answering, content: bytes, i: int) -> None:
    part_cut(to, content, i, says=False)


def whole_cut(to: Answering, content: bytes, _: int) -> None:
    to.send(200, content[: len(content) // 2], Content_Length=len(content))
    to.close_connection = True


def odd_header(to: Answering, content: bytes, _: int) -> None:
    start, end = to.span(content)
    if start >= end:
        return part(to, content)
    to.send_response(206)
    to.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
    to.send_header("Content-Length", str(end - start))
    to.wfile.write(b"".join(to._headers_buffer) + b"no header\r\n\r\n" + content[start:end])
    to._headers_buffer.clear()
    to.close_connection = True


SOUND = {
    "parts": part,
    "parts of its own choice": capped,
    "parts elsewhere": elsewhere(part),
    "parts elsewhere, now and then cut": elsewhere(now_and_then(part_cut, part)),
    "parts, with a header that is none": odd_header,
    "whole": whole,
    "whole, now and then in mid-file": now_and_then(whole, part),
    "whole in chunks": chunked,
    "parts, now and then busy": now_and_then(busy, part),
    "parts, now and then silent": now_and_then(gone, part),
    "parts, now and then cut": now_and_then(part_cut, part),
    "parts, now and then cut without a word": now_and_then(part_cut_unsaid, part),
    "whole, now and then busy": now_and_then(busy, whole),
    "whole, now and then cut": now_and_then(whole_cut, whole),
}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_RETRIES", web._RETRIES.new(backoff_factor=0))


@contextmanager
def served(answer: Answer, files: dict[str, bytes]) -> Iterator[Server]:
    with Server(answer, files) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("answer", SOUND.values(), ids=SOUND)
def test_what_is_read_is_what_is_there(
    answer: Answer, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    members = {**FILES, "large.png": LARGE}
    path = make_zip(tmp_path_factory.mktemp("zip") / "a.zip", list(members.items()))
    files = {
        "a.zip": path.read_bytes(),
        "a.tar.gz": gzip.compress(tar_bytes(list(FILES.items()))),
        "a.png": b"first",
        "empty.png": b"",
        "l.csv": b"path\na.png\nnone.png\nempty.png\n",
    }
    with served(answer, files) as server:
        assert contents(f"{server.address}/a.zip") == members
        assert contents(f"{server.address}/a.tar.gz") == FILES
        assert contents(f"{server.address}/a.png") == {"a.png": b"first"}
        assert storage.read_bytes(f"{server.address}/a.zip") == files["a.zip"]
        there, missing, empty = list_scans(f"{server.address}/l.csv").refs
        assert read_member(there) == b"first"
        assert refusal(missing).reason == "io_error"
        assert read_member(empty) == b""
        with pytest.raises(SourceError, match=r"none\.zip does not exist"):
            list_scans(f"{server.address}/none.zip")
    assert not caplog.records, "what urllib3 says names files"


@pytest.mark.parametrize(
    ("name", "asked_for"),
    [
        ("a%20b.png?versionId=x%2By/z", "/a%20b.png?versionId=x%2By/z"),
        ("a%20b.png", "/a%20b.png"),
        ("a b.png", "/a%20b.png"),
        ("ä.png", "/%C3%A4.png"),
        ("a%231.png", "/a%231.png"),
        ("a#1.png", "/a%231.png"),
        ("a%3F1.png", "/a%3F1.png"),
        ("a%252F1.png", "/a%252F1.png"),
    ],
)
def test_the_file_that_a_row_names_is_asked_for(name: str, asked_for: str, tmp_path: Path) -> None:
    asked = []

    def answer(to: Answering, content: bytes, _: int) -> None:
        asked.append(to.path)
        part(to, content)

    with served(answer, {unquote(urlsplit(asked_for).path).lstrip("/"): b"first"}) as server:
        (tmp_path / "l.csv").write_text(f"path\n{server.address}/{name}\n")
        [ref] = list_scans(str(tmp_path / "l.csv")).refs
        assert read_member(ref) == b"first"
    assert asked == [asked_for]


def test_a_small_file_takes_one_request() -> None:
    with served(part, {"a.png": b"first"}) as server:
        assert storage.read_bytes(f"{server.address}/a.png") == b"first"
        assert server.num_requests == 1


def other_part(to: Answering, content: bytes, _: int) -> None:
    place = f"bytes 1-{len(content) - 1}/{len(content)}"
    to.send(206, content[1:], Content_Range=place)


def part_of_nothing(to: Answering, content: bytes, _: int) -> None:
    to.send(206, content)


def packed_part(to: Answering, content: bytes, _: int) -> None:
    packed = gzip.compress(content)
    place = f"bytes 0-{len(packed) - 1}/{len(packed)}"
    to.send(206, packed, Content_Range=place, Content_Encoding="gzip")


def endless(to: Answering, content: bytes, _: int) -> None:
    to.send(200, content[:3], Content_Length=None)


def status(number: int, **headers: object) -> Answer:
    def answer(to: Answering, content: bytes, _: int) -> None:
        to.send(number, content, **headers)

    return answer


def silent(to: Answering, *_: object) -> None:
    time.sleep(0.3)


REFUSED = {
    "another part": (other_part, "does not answer: an answer unlike the question"),
    "a part without its place": (part_of_nothing, "an answer unlike the question"),
    "a part of something packed": (packed_part, "an answer unlike the question"),
    "an end that could be a fault": (endless, "an answer without a length"),
    "a length below nothing": (status(200, Content_Length=-1), "an answer without a length"),
    "a length in words": (status(200, Content_Length="few"), "an answer without a length"),
    "a packing that was not wanted": (status(200, Content_Encoding="gzip"), "unlike the question"),
    "another end": (status(416, Content_Range="bytes */5000"), "status 416"),
    "always late": (silent, "does not answer: ReadTimeoutError"),
    "always cut": (whole_cut, "does not answer: ProtocolError"),
    "always silent": (gone, "does not answer: ProtocolError"),
    "always busy": (busy, "does not answer: status 503"),
    "accepted": (status(202), "status 202"),
    "nothing": (status(204), "status 204"),
    "somewhere": (status(302), "status 302"),
    "unauthorized": (status(401), "refuses node .*: status 401"),
    "forbidden": (status(403), "refuses node .*: status 403"),
}


@pytest.mark.parametrize(("answer", "said"), REFUSED.values(), ids=REFUSED)
def test_a_server_that_fails_is_named_and_is_no_fault_of_a_scan(
    answer: Answer,
    said: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if answer is silent:
        monkeypatch.setattr(web, "_TIMEOUT", web.urllib3.Timeout(0.05))
        monkeypatch.setattr(web, "_RETRIES", web._RETRIES.new(total=1))
    with served(answer, {"Doe^Jane.png": b"a scan's bytes"}) as server:
        rows = tmp_path_factory.mktemp("list") / "l.csv"
        rows.write_text(f"path\n{server.address}/Doe^Jane.png\n")
        [ref] = list_scans(str(rows)).refs
        with pytest.raises(StoreError, match=f"^{server.address} .*{said}.*same command") as caught:
            read_member(ref)
        assert "Doe" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("location", ["http://[bad/", "ftp://h/x"])
def test_a_way_that_ends_nowhere_is_the_servers_fault(location: str, tmp_path: Path) -> None:
    with served(status(302, Location=location), {"a.png": b"x"}) as server:
        (tmp_path / "l.csv").write_text(f"path\n{server.address}/a.png\n")
        [ref] = list_scans(str(tmp_path / "l.csv")).refs
        try:
            read_member(ref)
        except StoreError as error:
            said = str(error)
    assert said.startswith(f"{server.address} does not answer: ")
    gc.collect()  # here: urllib3 does not close what had sent it there


@pytest.mark.parametrize("answer", [busy, status(403), gone])
def test_a_source_that_does_not_answer_is_not_called_missing(answer: Answer) -> None:
    with (
        served(answer, {"a.zip": b""}) as server,
        pytest.raises(StoreError, match=f"^{server.address} .*same command"),
    ):
        list_scans(f"{server.address}/a.zip")


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(StoreError, match=r"^http://127\.0\.0\.1:1 does not answer: NewConnection"):
        list_scans("http://127.0.0.1:1/a.zip")


@pytest.mark.parametrize(
    ("content", "changed", "tag", "said"),
    [
        (LARGE + b"more", MADE, '"1"', "a file that changes"),
        (LARGE, "Sun, 22 Nov 2026 20:00:00 GMT", '"1"', "a file that changes"),
        (LARGE, MADE, '"2"', "a file that changes"),
        (LARGE[:1000], MADE, '"1"', "status 416"),
    ],
)
def test_a_file_that_changes_while_it_is_read_is_no_mixture(
    content: bytes, changed: str, tag: str, said: str
) -> None:
    with served(part, {"a.bin": LARGE}) as server:
        file = web.open_url(f"{server.address}/a.bin")
        assert file.read(10) == LARGE[:10]
        file.seek(500_000)
        assert file.read(10) == LARGE[500_000:500_010]
        server.files["a.bin"], server.changed, server.tag = content, changed, tag
        file.seek(300_000)
        with pytest.raises(OSError, match=f"web server {server.address}: {said}"):
            file.read(10)


def test_a_row_that_is_no_url_is_its_own_fault(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("path\nhttp://[bad/a.png\nhttp://h:99999999/a.png\n")
    assert {refusal(r).reason for r in list_scans(str(tmp_path / "l.csv")).refs} == {"io_error"}


def test_a_packing_that_a_server_calls_an_encoding_is_the_files_own() -> None:
    def answer(to: Answering, content: bytes, _: int) -> None:
        to.send(200, content, Content_Encoding="gzip")

    packed = gzip.compress(tar_bytes(list(FILES.items())))
    with served(answer, {"a.tar.gz": packed}) as server:
        assert storage.read_bytes(f"{server.address}/a.tar.gz") == packed


def test_a_file_that_would_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_HELD_BYTES", 1000)
    with (
        served(whole, {"a.zip": bytes(2000)}) as server,
        pytest.raises(SourceError, match="from their start only; fetch it first"),
    ):
        list_scans(f"{server.address}/a.zip")


@pytest.mark.parametrize("answer", [part, whole])
def test_a_new_version_of_a_file_is_known_as_one(answer: Answer) -> None:
    with served(answer, {"a.bin": LARGE}) as server:
        info = storage.filesystem("http://")[0].get_file_info(f"{server.address}/a.bin")
        assert info.size == len(LARGE)
        assert info.mtime.isoformat().startswith("2026-01-01T00:00:00")
        for changed in ("yesterday", "Thu, 01 Jan 2026 00:00:00 +99999999999999"):
            server.changed = changed
            info = storage.filesystem("http://")[0].get_file_info(f"{server.address}/a.bin")
            assert (info.size, info.mtime) == (len(LARGE), None)


def test_the_store_travels_and_takes_nothing() -> None:
    filesystem, path = storage.filesystem("https://h/a.zip")
    assert path == "https://h/a.zip"
    again = pickle.loads(pickle.dumps(filesystem))
    assert again == filesystem
    for act in (again.create_dir, again.open_output_stream, again.delete_file):
        with pytest.raises(OSError, match="only gives files"):
            act(path)
    with pytest.raises(OSError, match="only gives files"):
        again.get_file_info(fs.FileSelector(path))


def test_what_another_node_says_of_a_server_is_said_again() -> None:
    quoted = RuntimeError(
        "ray::Scorer() (pid=7, ip=10.0.0.9)\nOSError: web server http://h:1: status 403\nmore"
    )
    with pytest.raises(StoreError, match=r"^http://h:1 refuses node 10\.0\.0\.9: status 403;"):
        refuse_away(quoted)
