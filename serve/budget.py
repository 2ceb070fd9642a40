"""How many scans a key may send in a minute."""

import math
import time
from typing import Final

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.exceptions import HTTPException
from starlette.requests import Request

from serve.access import caller_of

_SECONDS: Final = 60


class ScanBudget:
    """Scans of the last minute, for each key or, without keys, each client address.

    It is counted in this process, so a server of N gateways lets N times as many in.

    Args:
        max_scans_per_minute: of one caller.
    """

    def __init__(self, max_scans_per_minute: int) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._item = RateLimitItemPerMinute(max_scans_per_minute)

    def spend(self, identity: str, num_scans: int) -> tuple[bool, dict[str, str]]:
        """Take scans from a caller's budget, all or none; of 0, only look whether any is left.

        Returns:
            Whether they were there, and the header fields that say how much is left, as in
            draft-ietf-httpapi-ratelimit-headers-10.
        """
        if num_scans:
            is_within = self._limiter.hit(self._item, identity, cost=num_scans)
        else:
            is_within = self._limiter.test(self._item, identity)
        stats = self._limiter.get_window_stats(self._item, identity)
        seconds = max(1, math.ceil(stats.reset_time - time.time()))
        fields = {
            "RateLimit-Policy": f'"scans";q={self._item.amount};w={_SECONDS}',
            "RateLimit": f'"scans";r={stats.remaining};t={seconds}',
        }
        return is_within, fields if is_within else {**fields, "Retry-After": str(seconds)}


def spend_scans(request: Request, num_scans: int) -> None:
    """Take scans from the budget of who asks, if the service sets one.

    Args:
        request: whose answer gets the header fields.
        num_scans: that it holds; 0 before they are read, to refuse early.

    Raises:
        HTTPException: 429 if the budget does not hold them; none is taken then.
    """
    budget: ScanBudget | None = request.app.state.budget
    if budget is None:
        return
    is_within, fields = budget.spend(caller_of(request.scope).identity, num_scans)
    request.state.answer_headers = fields
    if not is_within:
        raise HTTPException(429, "too many scans within a minute; see the header Retry-After")
