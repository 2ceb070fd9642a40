"""The audit log of accesses: who asked when for what and got what; no pixels, nothing of a patient.

One JSON line for each scan that was answered or refused, and one for each request without scans
that was denied or was to change something. Requests of strangers lie in a file of their own:
whoever floods the server with them pushes none of the other lines out of the rotated files.

A line is written before its answer is sent. If it cannot be written, as on a full disk, the request
gets 503 and no answer: who turned auditing on wants no answer that nobody can account for, and
filling the disk must not be a way to work unseen.
"""

import errno
import io
import json
import logging
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from typing import Any, Final

from filelock import FileLock, Timeout
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bt_core.errors import UsageError
from bt_core.log import logger
from serve.access import Caller
from serve.guards import request_id
from serve.problems import problem
from serve.service import AUDITED

_DENIALS: Final = frozenset({401, 403, 429})
_READS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_FIELDS: Final = (
    "content_sha256", "status", "reason", "predicted_label", "confidence", "bundle_id",
    "job_id", "request_sha256",
)  # fmt: skip
_MAX_GATEWAYS: Final = 1000


class AuditLog:
    """The files of one gateway: `audit-HOST-N.jsonl` and, of strangers, `denied-HOST-N.jsonl`.

    Several processes cannot rotate one file, so each takes the first N that no other holds, by a
    lock that the system frees when it ends.

    Args:
        folder: local folder, made if it is not there.
        file_bytes: size at which a file is put aside under a number.
        num_files: how many that were put aside are kept.

    Raises:
        UsageError: if the folder cannot be written.
    """

    def __init__(self, folder: str, file_bytes: int, num_files: int) -> None:
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            self._lock, name = _free_name(folder)
            paths = [os.path.join(folder, f"{kind}-{name}.jsonl") for kind in ("audit", "denied")]
            self._known, self._strangers = (_Rotated(p, file_bytes, num_files) for p in paths)
        except OSError as error:
            why = error.strerror or str(error)
            raise UsageError(f"audit folder {folder} cannot be written ({why})") from error

    def write(self, lines: Sequence[Mapping[str, Any]], *, of_stranger: bool) -> None:
        """Append all lines or none, and hand them to the system; raises OSError if that fails."""
        handler = self._strangers if of_stranger else self._known
        handler.append("\n".join(json.dumps(line, separators=(",", ":")) for line in lines))

    def close(self) -> None:
        """Close the files and free their names."""
        self._known.close()
        self._strangers.close()
        self._lock.release()


def _free_name(folder: str) -> tuple[FileLock, str]:
    host = re.sub(r"[^0-9A-Za-z.-]", "_", socket.gethostname())
    for number in range(_MAX_GATEWAYS):
        lock = FileLock(os.path.join(folder, f".{host}-{number}.lock"), timeout=0, mode=0o600)
        try:
            lock.acquire()
        except Timeout:
            continue
        return lock, f"{host}-{number}"
    raise OSError("too many gateways write to it")


class _Rotated(RotatingFileHandler):
    """Rotates as the standard library does, but appends all or nothing and raises what fails."""

    stream: Any

    def __init__(self, path: str, file_bytes: int, num_files: int) -> None:
        super().__init__(path, maxBytes=file_bytes, backupCount=num_files)

    def _open(self) -> Any:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return io.FileIO(os.open(self.baseFilename, flags, 0o600), "a")

    def append(self, text: str) -> None:
        if self.shouldRollover(logging.makeLogRecord({"msg": text})):
            self.doRollover()
        content = f"{text}\n".encode()
        size = self.stream.seek(0, os.SEEK_END)
        try:
            if self.stream.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self.stream.truncate(size)
            raise


class Audit:
    """ASGI middleware: writes down what a request came to, before its answer leaves.

    Args:
        app: what is audited, authentication included.
        log: where to.
    """

    def __init__(self, app: ASGIApp, log: AuditLog) -> None:
        self.app = app
        self._log = log
        self._templates: list[tuple[re.Pattern[str], str]] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its answer if that could be written down."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, noted, is_lost = time.monotonic(), list[Mapping[str, Any]](), False

        async def audited(message: Message) -> None:
            nonlocal is_lost
            if message["type"] == "http.response.start":
                try:
                    self._write(scope, message["status"], noted, time.monotonic() - started)
                except OSError as error:
                    is_lost = True
                    logger.error("the audit log cannot be written: %s", error.strerror)
                    refusal = problem(503, "not_audited", "no answer, as it cannot be written down")
                    await refusal(scope, receive, send)
            if not is_lost:
                await send(message)

        token = AUDITED.set(noted)
        try:
            await self.app(scope, receive, audited)
        finally:
            AUDITED.reset(token)

    def _write(
        self, scope: Scope, http_status: int, scans: list[Mapping[str, Any]], seconds: float
    ) -> None:
        caller: Caller | None = scope["state"].get("caller")
        if not scans and scope["method"] in _READS and http_status not in _DENIALS:
            return
        request = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": request_id(scope),
            "key": caller.name if caller else "",
            "address": caller.address if caller else "",
            "method": scope["method"],
            "route": self._route(scope),
            "http_status": http_status,
            "seconds": round(seconds, 4),
        }
        fields = [{k: scan[k] for k in _FIELDS if k in scan} for scan in scans]
        lines = [request | scan for scan in fields] or [request]
        self._log.write(lines, of_stranger=not (caller and caller.roles))

    def _route(self, scope: Scope) -> str:
        """Return a request's route as the API describes it; a path itself may hold anything."""
        if self._templates is None:
            paths = sorted(scope["app"].openapi()["paths"], key=lambda path: path.count("{"))
            self._templates = [(compile_path(path)[0], path) for path in paths]
        found = (template for regex, template in self._templates if regex.match(scope["path"]))
        return next(found, "")
