"""How often an account and an address may ask: sliding windows of the `limits` library, in memory."""

from __future__ import annotations

import ipaddress
import time

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from robustkit.errors import RobustkitError
from robustkit.serve.refusal import Refused


class Throttle:
    """Rates such as "600/minute" for each account and each address, divided among `replicas`.

    The counts live in this process. Their windows are numbered by the clock, so a clock that jumps opens a new
    window and locks nobody out.
    Raises: RobustkitError for a rate that cannot be read, or is less than one for each replica.
    """

    def __init__(self, account: str, address: str, replicas: int = 1) -> None:
        self._account, self._address = _rate(account, replicas), _rate(address, replicas)
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def account(self, account: str) -> None:
        """Count one request. Raises: Refused, 429."""
        self._hit(self._account, "account", account)

    def address(self, address: str) -> None:
        """Count one request; the addresses of an IPv6 network of 64 bits are one. Raises: Refused, 429."""
        self._hit(self._address, "address", _network(address))

    def _hit(self, rate: RateLimitItem, kind: str, name: str) -> None:
        if not self._limiter.hit(rate, kind, name):
            reset = self._limiter.get_window_stats(rate, kind, name).reset_time - time.time()
            wait = min(max(reset, 1.0), float(rate.get_expiry()))
            raise Refused(429, f"this {kind} asks more often than {rate}; wait.", retry_after=wait)


def _rate(text: str, replicas: int) -> RateLimitItem:
    try:
        whole = parse(text)
    except ValueError as error:
        raise RobustkitError(f"rate {text!r} cannot be read; write it like 600/minute.") from error
    if whole.amount < replicas:
        raise RobustkitError(
            f"{text} for {replicas} replicas leaves less than one request each; raise the rate."
        )
    return type(whole)(whole.amount // replicas, whole.multiples)


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address  # a socket of the file system has none
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed.version == 6 else address
