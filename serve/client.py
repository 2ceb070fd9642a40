"""A client of the HTTP API in one file: copy it; it needs Python 3.11 and httpx, nothing of bt.

::

    with Client("http://127.0.0.1:8000") as client:
        answer = client.predict("scan.dcm")
        print(answer.predicted_label, answer.confidence, answer.status)

Errors::

    ClientError                  code and detail
    ├── UnreachableError         no connection, or one that broke, after all tries
    ├── OverloadedError          429 or 503 after all tries
    ├── RequestError             another 4xx: the request is wrong; sent once only
    │   └── ScanRefusedError     the scan cannot be used; `code` is the reason
    ├── ServerError              another 5xx, or an answer that is none of this API
    └── JobTimeoutError          the job did not end in time; it goes on
"""

import hashlib
import os
import random
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar

import httpx

Scan = bytes | str | os.PathLike[str]
"""The bytes of a scan, or the path of its file."""

_AGAIN: Final = frozenset({429, 503})
_MOST_WAIT_SECONDS: Final = 60.0
"""A server that asks for more patience is not asked again."""
_ENDED: Final = frozenset({"succeeded", "incomplete", "failed", "cancelled"})


class ClientError(Exception):
    """Base of all errors of this client.

    Attributes:
        code: stable, for programs; a code of the server, or one of this client.
        detail: in words.
    """

    def __init__(self, code: str, detail: str) -> None:
        self.code = code
        self.detail = detail
        super().__init__(f"{code}: {detail}")


class UnreachableError(ClientError):
    """The server could not be reached, or the connection broke, in all tries."""


class OverloadedError(ClientError):
    """The server had too much to do in all tries."""


class RequestError(ClientError):
    """The server will never take this request as it is."""


class ScanRefusedError(RequestError):
    """The scan cannot be used; `code` is one of the server's reason codes."""


class ServerError(ClientError):
    """The server failed, or what answered is not this API."""


class JobTimeoutError(ClientError):
    """A scoring job did not end in time; it goes on."""


@dataclass(frozen=True)
class Prediction:
    """The answer for one scan; see the API's documentation for each field.

    Of a scan without an answer (status `rejected` or `failed`) only the first fields are there.
    """

    content_sha256: str
    status: Literal["scored", "deferred", "rejected", "failed"]
    reason: str
    bundle_id: str
    preprocess_digest: str
    detail: str = ""
    predicted_label: str | None = None
    confidence: float | None = None
    probabilities: dict[str, float] = field(default_factory=dict)
    entropy: float | None = None
    frame_index: int | None = None
    num_frames: int | None = None
    prediction_set: list[str] = field(default_factory=list)
    members_used: list[str] = field(default_factory=list)
    runtimes: list[str] = field(default_factory=list)
    seen_in_training: bool | None = None
    nearest_family: str | None = None
    nearest_correlation: float | None = None
    distance: float | None = None


@dataclass(frozen=True)
class ScoringJob:
    """A scoring job; `summary` has the counts of one that has finished."""

    id: str
    state: Literal["queued", "running", "succeeded", "incomplete", "failed", "cancelled"]
    message: str
    source: str
    output: str
    created_at: str
    ended_at: str | None = None
    summary: dict[str, Any] | None = None


Result = TypeVar("Result", Prediction, ScoringJob)


class Client:
    """A connection to a server; use it in a `with` block, or close it.

    Args:
        url: of the server, such as `http://127.0.0.1:8000`.
        api_key: sent as bearer token; None sends none.
        timeout: seconds to wait for a connection, and for each part of an answer.
        tries: how often a request is sent while the connection breaks or the server is busy.
        max_files: scans of one request, at most what the server takes.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        tries: int = 5,
        max_files: int = 16,
    ) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        if tries < 1 or max_files < 1:
            raise ValueError(f"tries {tries} and max_files {max_files} must be 1 or more")
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout)
        self._tries = tries
        self._max_files = max_files

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def predict(self, scan: Scan) -> Prediction:
        """Classify one scan.

        Raises:
            ScanRefusedError: if it cannot be used.
            ClientError: see this module.
        """
        answer = self._json("POST", "/v1/predictions", files=[_part(scan)], of_scan=True)
        return _parsed(Prediction, answer["results"][0])

    def predict_many(self, scans: Iterable[Scan]) -> Iterator[Prediction]:
        """Classify any number of scans, some at a time; yields one result for each, in order.

        One that cannot be used does not raise here: its status is `rejected` or `failed`; of one
        that is larger than the server takes, no bundle has seen anything.
        """
        remaining = iter(scans)
        while chunk := list(islice(remaining, self._max_files)):
            files = [_part(scan) for scan in chunk]
            yield from self._each(files)

    def _each(self, files: list[tuple[str, tuple[str, bytes]]]) -> list[Prediction]:
        try:
            answer = self._json("POST", "/v1/predictions", params={"each": "true"}, files=files)
        except RequestError as error:
            if error.code != "body_too_large":
                raise
            if len(files) > 1:  # together they are more than the server takes at once
                return [self._each([file])[0] for file in files]
            digest = hashlib.sha256(files[0][1][1]).hexdigest()
            return [Prediction(digest, "rejected", error.code, "", "", error.detail)]
        return [_parsed(Prediction, result) for result in answer["results"]]

    def explain(self, scan: Scan) -> dict[str, Any]:
        """Classify one scan, and return the fields of its prediction and explanation.

        Raises:
            ScanRefusedError: if it cannot be used.
            ClientError: see this module.
        """
        return self._json("POST", "/v1/explanations", files=[_part(scan)], of_scan=True)

    def explain_png(self, scan: Scan) -> bytes:
        """Return the scan with its heat map, as PNG.

        Raises:
            ScanRefusedError: if it cannot be used.
            ClientError: see this module.
        """
        headers = {"Accept": "image/png"}
        sent = {"files": [_part(scan)], "headers": headers}
        return self._ask("POST", "/v1/explanations", of_scan=True, **sent).content

    def model(self) -> dict[str, Any]:
        """Return the description of the bundle that answers."""
        return self._json("GET", "/v1/model")

    def submit_scoring_job(
        self,
        source: str,
        output: str,
        *,
        cascade: bool = True,
        dicom: Literal["sr", "sc"] | None = None,
        overwrite: bool = False,
        idempotency_key: str | None = None,
    ) -> ScoringJob:
        """Start to score an archive that the server can read, into a folder that it can write.

        Args:
            source: absolute path or URI, as the server sees it.
            output: folder, likewise.
            cascade: let the first member answer alone where that is as safe.
            dicom: also write structured reports, or pictures, of DICOM scans.
            overwrite: replace scores that are there.
            idempotency_key: a name of yours for this request; under the same one a second call
                starts nothing, and returns the same job. None: each call starts one.

        Raises:
            ClientError: see this module.
        """
        body = {
            "source": source,
            "output": output,
            "cascade": cascade,
            "dicom": dicom,
            "overwrite": overwrite,
        }
        # Always with a key: a try whose answer was lost may have started the job.
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return _parsed(
            ScoringJob, self._json("POST", "/v1/scoring-jobs", json=body, headers=headers)
        )

    def scoring_job(self, job_id: str) -> ScoringJob:
        """Return how far a scoring job is."""
        return _parsed(ScoringJob, self._json("GET", f"/v1/scoring-jobs/{job_id}"))

    def cancel_scoring_job(self, job_id: str) -> ScoringJob:
        """Ask a scoring job to stop; one that has ended stays as it is."""
        return _parsed(ScoringJob, self._json("POST", f"/v1/scoring-jobs/{job_id}/cancel"))

    def wait_for_job(
        self, job_id: str, *, timeout: float | None = None, interval: float = 2.0
    ) -> ScoringJob:
        """Return a scoring job when it has ended, however that was: look at its `state`.

        Args:
            job_id: of the job.
            timeout: seconds to wait; None waits for ever.
            interval: seconds between two questions.

        Raises:
            JobTimeoutError: if it has not ended by then.
            ClientError: see this module.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while (job := self.scoring_job(job_id)).state not in _ENDED:
            if end is not None and time.monotonic() + interval > end:
                raise JobTimeoutError("job_timeout", f"job {job_id} is still {job.state}")
            time.sleep(interval)
        return job

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        answer = self._ask(method, path, **options)
        try:
            content: dict[str, Any] = answer.json()
        except ValueError as error:
            raise ServerError("no_json", f"{path} answered with something else") from error
        return content

    def _ask(
        self, method: str, path: str, *, of_scan: bool = False, **options: Any
    ) -> httpx.Response:
        """Send a request until it is answered, or cannot be, or all tries are used up.

        Any request here may be sent again: it changes nothing, or has an idempotency key.
        """
        for tries_left in reversed(range(self._tries)):
            wait = 0.0
            try:
                answer = self._http.request(method, path, **options)
                if answer.is_success:
                    return answer
                failure = _failure(answer, of_scan)
                if answer.status_code not in _AGAIN and not _is_of_a_proxy(answer):
                    raise failure
                wait = _retry_after(answer)
            except (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout) as error:
                failure = UnreachableError("unreachable", f"{type(error).__name__}: {error}")
            except httpx.TransportError as error:  # one that took too long would again
                raise UnreachableError("unreachable", f"{type(error).__name__}: {error}") from error
            if not tries_left or wait > _MOST_WAIT_SECONDS:
                raise failure
            # Full jitter, so that clients turned away together do not come back together.
            backoff = min(0.25 * 2 ** (self._tries - tries_left), _MOST_WAIT_SECONDS)
            time.sleep(wait + random.uniform(0, backoff))
        raise AssertionError("unreachable")


def _part(scan: Scan) -> tuple[str, tuple[str, bytes]]:
    """Return a scan as a form field; of its file's name, which may name a patient, the suffix."""
    if isinstance(scan, bytes):
        return "files", ("scan", scan)
    path = Path(scan)
    suffix = ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix
    return "files", (f"scan{suffix}", path.read_bytes())


def _parsed(kind: type[Result], content: dict[str, Any]) -> Result:
    """Return a result without the fields that a newer server adds."""
    known = {f.name for f in fields(kind)}
    try:
        return kind(**{name: value for name, value in content.items() if name in known})
    except TypeError as error:
        raise ServerError("unknown_answer", "the answer lacks fields of this API") from error


def _failure(answer: httpx.Response, of_scan: bool) -> ClientError:
    try:
        content = answer.json()
        code, detail = str(content["code"]), str(content["detail"])
    except (ValueError, KeyError, TypeError):  # of a proxy in between
        code, detail = f"http_{answer.status_code}", answer.text[:200]
    if answer.status_code in _AGAIN:
        return OverloadedError(code, detail)
    if not answer.is_client_error:
        return ServerError(code, detail)
    # The detail of a refused scan begins with its reason code.
    refused = of_scan and detail.startswith(f"{code}: ")
    return ScanRefusedError(code, detail) if refused else RequestError(code, detail)


def _is_of_a_proxy(answer: httpx.Response) -> bool:
    """Return whether what stands before the server says that it cannot be reached."""
    is_problem = answer.headers.get("content-type", "").startswith("application/problem+json")
    return answer.status_code in (500, 502, 504) and not is_problem


def _retry_after(answer: httpx.Response) -> float:
    """Return how many seconds the server asks to wait; it may also name a time of day."""
    text = answer.headers.get("retry-after", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0
