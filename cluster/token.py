"""The token that protected clusters ask for: whether there is one, and when Ray is to send it."""

import os
from pathlib import Path
from typing import Final

from bt_core.errors import UsageError

TOKEN_FILE: Final = Path("~/.ray/auth_token")
_THIS_MACHINE: Final = frozenset({"", "127.0.0.1", "localhost", "::1"})


def has_token() -> bool:
    """Return whether there is a token for protected clusters, where Ray looks for it."""
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    return bool(given) or TOKEN_FILE.expanduser().exists()


def use_token(address: str) -> None:
    """Have Ray send the token that is there to a cluster whose address is given.

    It does so by itself only where it finds a cluster of this machine. Before it is imported, since
    it reads the mode then.

    Raises:
        UsageError: if there is none, for a cluster beyond this machine: one that takes orders
            without a token takes anybody's.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    host = address.rpartition("://")[2].rpartition(":")[0].strip("[]")
    if has_token():
        os.environ["RAY_AUTH_MODE"] = "token"
    elif host in _THIS_MACHINE:
        os.environ["RAY_AUTH_MODE"] = "disabled"
    else:
        raise UsageError(
            f"cluster {address}: there is no token for it, as a file {TOKEN_FILE} or in "
            "RAY_AUTH_TOKEN; get the cluster's own. Whoever reaches a cluster without one runs "
            "code on it: RAY_AUTH_MODE=disabled uses it nevertheless"
        )
