"""Who may ask: every request shows a key of the keys file, but for a few open paths.

Authentication is ASGI middleware, so that a stranger's body is never read and a route that forgets
`require` is still closed to strangers; which role a route needs, it says by `require`.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from bt_core.errors import UsageError
from serve.keys import ROLES, KeyRing, Role, StoredKey, has_expired, is_well_formed
from serve.problems import problem
from serve.settings import ServeSettings

OPEN_PATHS: Final = frozenset(
    {"/", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json"}
)
OPEN_FOLDER: Final = "/static/"
"""What lies below it is the page's own files. All of these are read without a key; none says
anything about a scan."""

LOOPBACK_HOSTS: Final = ("127.0.0.1", "::1", "localhost")
_BEARER: Final = HTTPBearer(auto_error=False, description="A key that `bt keys add` printed.")
_HEADER: Final = APIKeyHeader(name="X-API-Key", auto_error=False, description="The same key.")


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        name: of the key; empty where none is needed or none was shown.
        roles: what the caller may do.
        address: the client's, as the server in front states it.
    """

    name: str
    roles: frozenset[str]
    address: str

    @property
    def identity(self) -> str:
        """Return what a budget is counted for: the key or, without keys, the address."""
        return f"key {self.name}" if self.name else f"address {self.address}"


def is_loopback(host: str) -> bool:
    """Return whether a host to listen on is reached from its own machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, settings: ServeSettings) -> None:
    """Raise UsageError if strangers could reach a server without keys or audit log.

    An audit log is asked for there because what was not written down cannot be found out later.
    """
    given = {
        "--keys FILE (bt keys add makes one)": settings.keys,
        "--audit DIR": settings.audit_dir,
    }
    missing = [option for option, value in given.items() if value is None]
    if missing and not is_loopback(host):
        raise UsageError(
            f"--host {host} lets other machines in: give {' and '.join(missing)}, or stay on "
            "127.0.0.1"
        )


def caller_of(scope: Scope) -> Caller:
    """Return who asks; only behind `Authentication`."""
    caller: Caller = scope["state"]["caller"]
    return caller


def require(role: Role | None = None) -> Any:
    """Return a dependency that lets in callers with a role, or any with a key.

    For others it raises HTTPException, 403. A route takes it as
    `dependencies=[require("predict")]`; it documents 401 and 403 itself, by `answers`.
    """

    async def check(
        request: Request,
        _bearer: Annotated[Any, Security(_BEARER)],
        _header: Annotated[Any, Security(_HEADER)],
    ) -> None:
        caller = caller_of(request.scope)
        if role is not None and role not in caller.roles:
            raise HTTPException(
                403, f"this key is for {', '.join(sorted(caller.roles))}; this needs one for {role}"
            )

    return Depends(check)


class Authentication:
    """ASGI middleware: finds out who asks, and turns strangers away before their body is read.

    Without keys everybody on this machine may ask, but no web page that a browser here has open:
    neither under a name of its own that it points at this machine, nor from another origin.

    Args:
        app: what is guarded.
        keys: that are let in; None lets everybody in.
        hosts: names that a request without keys may have in its Host header; empty: any.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing | None, hosts: Sequence[str] = ()) -> None:
        self.app = app
        self._keys = keys
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its caller in the scope's state, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        address = scope["client"][0] if scope.get("client") else ""
        state = scope.setdefault("state", {})
        state["caller"] = Caller("", frozenset(), address)
        if self._keys is None:
            refusal = _foreign(headers, self._hosts)
            state["caller"] = Caller("", frozenset(ROLES), address)
            if refusal is not None:
                await problem(403, "forbidden", refusal)(scope, receive, send)
                return
        else:
            found = _known(headers, self._keys)
            if isinstance(found, StoredKey):
                state["caller"] = Caller(found.name, frozenset(found.roles), address)
            elif not _is_open(scope):
                await _unknown(found)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _is_open(scope: Scope) -> bool:
    path = scope["path"]
    reads = scope["method"] in ("GET", "HEAD")
    return reads and (path in OPEN_PATHS or path.startswith(OPEN_FOLDER))


def shown_key(headers: Headers) -> str | None:
    """Return the key of a request, empty if it shows one in a form that is none.

    Returns None if it shows no key. Two, even equal ones, are none: a proxy in front might have
    checked the other.
    """
    bearers, plain = headers.getlist("authorization"), headers.getlist("x-api-key")
    if not bearers and not plain:
        return None
    if len(bearers) + len(plain) > 1:
        return ""
    if plain:
        key = plain[0].strip()
    else:
        scheme, _, key = bearers[0].strip().partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
    return key if is_well_formed(key) else ""


def _known(headers: Headers, keys: KeyRing) -> StoredKey | str | None:
    """Return the entry of the key that a request shows, or why there is none; None: no key."""
    key = shown_key(headers)
    if key is None:
        return None
    if not key:
        return "what was sent is not one key as bt keys add prints it; look for a typing error"
    found = keys.find(key)
    if found is None:
        return "the key is unknown or was revoked; ask whoever runs this server for one"
    if has_expired(found):
        return "the key is over its time; ask whoever runs this server for one"
    return found


def _unknown(why: str | None) -> Any:
    challenge = 'Bearer realm="bt"' + (', error="invalid_token"' if why else "")
    detail = why or "send a key as Authorization: Bearer KEY, or as X-API-Key: KEY"
    return problem(401, "unauthorized", detail, {"WWW-Authenticate": challenge})


def _foreign(headers: Headers, hosts: frozenset[str]) -> str | None:
    """Return why a request looks like one of a web page from elsewhere, or None."""
    host, origin = headers.get("host", ""), headers.get("origin")
    try:
        name = urlsplit(f"//{host}").hostname
        same_origin = origin is None or urlsplit(origin).netloc == host
    except ValueError:  # brackets that are no IPv6 address
        name, same_origin = None, False
    if hosts and name not in hosts:
        return "without keys this server answers to the names of this machine only"
    return None if same_origin else "without keys this server answers no page of another origin"
