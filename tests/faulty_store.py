"""A real S3 server whose answers can be made to fail, to come late or to break off; it counts."""

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from pyarrow import fs
from werkzeug.serving import make_server

_REFUSAL = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>not now</Message></Error>"
_STATUS = {400: (b"ExpiredToken", "400 Bad Request"),
           401: (b"InvalidToken", "401 Unauthorized"),
           403: (b"AccessDenied", "403 Forbidden"),
           500: (b"InternalError", "500 Internal Server Error"),
           503: (b"SlowDown", "503 Slow Down")}  # fmt: skip


class FaultyStore:
    """moto's S3 server on loopback, which a test disturbs while it runs.

    Attributes:
        share: of requests that are disturbed, 0 to 1.
        kinds: what happens to one of these: 500 and 503 (it is refused for now), 400, 401 and 403
            (credentials that hold no longer, or not here), `late` (the answer takes
            `late_seconds`), `cut` (the connection closes in the middle of the answer), `lost` (it
            is done, and then refused as with 500: the client cannot know).
        counts: requests by kind (GET, HEAD, LIST, PUT, COPY, DELETE, MULTIPART), failed ones too.
        num_disturbed: by what happened.
    """

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server(
            "127.0.0.1", 0, self, threaded=True, request_handler=MotoRequestHandler
        )
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._random = random.Random(0)
        self._lock = threading.Lock()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.share, self.late_seconds = 0.0, 1.0
        self.kinds: tuple[int | str, ...] = (500, 503)
        self.counts: Counter[str] = Counter()
        self.num_disturbed: Counter[int | str] = Counter()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def __call__(self, environ, start_response):
        """Answer one request (WSGI)."""
        with self._lock:
            self.counts[kind_of(environ)] += 1
            disturbed = self._random.random() < self.share
            fault = self._random.choice(self.kinds) if disturbed else None
            if fault is not None:
                self.num_disturbed[fault] += 1
        if fault == "late":
            time.sleep(self.late_seconds)
        if fault in _STATUS:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return _refuse(fault, start_response)
        answer = self._app(environ, start_response if fault != "lost" else lambda *_: None)
        if fault == "lost":
            b"".join(answer)
            return _refuse(500, start_response)
        return _broken_off(answer) if fault == "cut" else answer

    def make_bucket(self, name: str) -> None:
        """Make a bucket, whoever else may have made it."""
        maker = fs.S3FileSystem(
            access_key="test",
            secret_key="test",
            endpoint_override=self.endpoint,
            allow_bucket_creation=True,
        )
        maker.create_dir(name)

    @contextmanager
    def disturbed(self, share: float, *kinds: int | str) -> Iterator[None]:
        """Disturb a share of requests while the block runs."""
        self.share, self.kinds = share, kinds
        try:
            yield
        finally:
            self.share = 0.0

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def kind_of(environ) -> str:
    """Return what a request asks S3 for."""
    method, query = environ["REQUEST_METHOD"], environ.get("QUERY_STRING", "")
    if "list-type" in query or (method == "GET" and environ["PATH_INFO"].count("/") < 2):
        return "LIST"
    if "uploadId" in query or "uploads" in query:
        return "MULTIPART"
    if method == "POST" and "delete" in query:
        return "DELETE"
    return "COPY" if "HTTP_X_AMZ_COPY_SOURCE" in environ else method


def _refuse(status: int, start_response) -> list[bytes]:
    code, line = _STATUS[status]
    start_response(line, [("Content-Type", "application/xml")])
    return [_REFUSAL % code]


def _broken_off(answer) -> Iterator[bytes]:
    """Give half of an answer, then end the connection."""
    content = b"".join(answer)
    yield content[: len(content) // 2]
    raise ConnectionAbortedError
