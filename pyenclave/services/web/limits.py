"""What one service takes: sizes, times, numbers, rates."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

__all__ = ["Buckets", "Limits", "address_group", "expected"]

_MAX_BUCKETS: Final = 10_000
_DAY: Final = 86_400.0  # seconds
# What each limit may be. What is beyond is a mistake: a service that takes nothing, or anything.
_RANGES: Final[dict[str, tuple[float, float]]] = {
    "path": (1, 1 << 20),
    "header": (1, 16 << 20),
    "body": (1, 1 << 30),
    "json_depth": (1, 128),
    "header_seconds": (0.001, _DAY),
    "body_seconds": (0.001, _DAY),
    "total_seconds": (0.001, _DAY),
    "idle_seconds": (0.001, _DAY),
    "concurrent": (1, 1 << 20),
    "unfinished": (1, 1 << 20),
    "unfinished_bytes": (1, 1 << 40),
    "connections": (1, 1 << 20),
    "rate": (0.001, 1e9),
    "burst": (1, 1_000_000_000),
    "refusals": (0.001, 1e9),
    "refusals_burst": (1, 1_000_000_000),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """
    The limits of a service.

    Attributes:
        path: Bytes of a path, and separately of a query.
        header: Bytes of all headers; a token has up to 16 KiB.
        body: Bytes of a body.
        json_depth: Levels of nesting in a body.
        header_seconds: From the connection, or the last answer's end, to the end of the headers.
        body_seconds: From there to the end of the body.
        total_seconds: From there to the answer.
        idle_seconds: A connection without a request.
        concurrent: Requests that are worked on at once; more are told to come back. One whose body
            is still coming is not worked on.
        unfinished: Requests of one address whose bodies are still coming.
        unfinished_bytes: What is held of such bodies in all; of one address half of it.
        connections: Open connections; beyond it the one that has kept a request unfinished (or
            idled) longest is cut. None: what the process's descriptors allow, at most 4,096.
        rate: Requests a second of one address, and of one caller; None for any number.
        burst: How many may come at once.
        refusals: Refused requests (401 with a token, 403, 404) a second of one caller or address.
        refusals_burst: How many may come at once: guesses are slow.

    """

    path: int = 2048
    header: int = 32 << 10
    body: int = 1 << 20
    json_depth: int = 24
    header_seconds: float = 10.0
    body_seconds: float = 10.0
    total_seconds: float = 30.0
    idle_seconds: float = 60.0
    concurrent: int = 256
    unfinished: int = 256
    unfinished_bytes: int = 128 << 20
    connections: int | None = None
    rate: float | None = 10_000.0
    burst: int = 20_000
    refusals: float | None = 20.0
    refusals_burst: int = 500

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            low, high = _RANGES[name]
            if value is not None and not low <= value <= high:  # nor if it is no number (NaN)
                raise ValueError(f"the limit {name} is {expected(name)}, not {value}")


def expected(name: str) -> str:
    """Return which numbers the limit *name* may be, in words."""
    low, high = _RANGES[name]
    return f"a number from {low:,g} to {high:,.0f}"


@lru_cache(maxsize=1024)
def address_group(address: str) -> str:
    """Return what counts as one client: an IPv4 address, the /64 of an IPv6 address."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((parsed, 64), strict=False))


class Buckets:
    """
    Token buckets, one a key; the number of keys is bounded, the one unused longest goes.

    Args:
        rate: How much comes back a second; None: nothing is ever short.
        burst: How much there is at most.
        clock: Seconds that never go back.

    """

    def __init__(
        self, rate: float | None, burst: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._clock = clock
        self._levels: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._levels)

    def _level(self, key: Hashable, now: float, rate: float) -> float:
        held = self._levels.get(key)
        if held is None:
            return self._burst
        return min(self._burst, held[0] + max(0.0, now - held[1]) * rate)

    def take(self, key: Hashable) -> float:
        """Take one; return 0, or the seconds until there is one."""
        if self._rate is None:
            return 0.0
        now = self._clock()
        level = self._level(key, now, self._rate)
        if level < 1.0:
            return (1.0 - level) / self._rate
        self._levels[key] = (level - 1.0, now)
        self._levels.move_to_end(key)
        if len(self._levels) > _MAX_BUCKETS:
            self._levels.popitem(last=False)
        return 0.0

    def wait(self, key: Hashable) -> float:
        """Return the seconds until there is one, and take none."""
        if self._rate is None or key not in self._levels:
            return 0.0
        level = self._level(key, self._clock(), self._rate)
        return 0.0 if level >= 1.0 else (1.0 - level) / self._rate
