"""
Bodies that are still coming: how many of one address, and how many of their bytes are held.

A request whose body is not there yet is no work, and takes no place of those that are worked on.
It costs a connection, which the server bounds, and what came of it, which is bounded here.
"""

from __future__ import annotations

from typing import Final

from pyenclave.errors import ServiceError
from pyenclave.services.web.limits import Limits

__all__ = ["Unfinished"]

_SHARE: Final = 2  # one address holds at most one part in so many


class Unfinished:
    """
    Counts unfinished bodies and their bytes by address group.

    Args:
        limits: Of the service: ``unfinished``, ``unfinished_bytes``, ``body``.

    """

    def __init__(self, limits: Limits) -> None:
        self._most = limits.unfinished
        # One whole body always fits.
        self._bytes = max(limits.body, limits.unfinished_bytes)
        self._share = max(limits.body, self._bytes // _SHARE)
        self._of: dict[str, tuple[int, int]] = {}
        self.held = 0  # bytes, of all

    def __len__(self) -> int:
        return sum(count for count, _ in self._of.values())

    def begin(self, group: str) -> None:
        """
        Wait for a body.

        Raises:
            ServiceError: 429: too many of this address do not end.

        """
        count, size = self._of.get(group, (0, 0))
        if count >= self._most:
            raise _slower()
        self._of[group] = count + 1, size

    def hold(self, group: str, size: int) -> None:
        """
        Keep *size* more bytes of a body that does not end with them.

        Raises:
            ServiceError: 429: this address holds its share; 503: all together hold all there is.

        """
        count, held = self._of[group]
        if held + size > self._share:
            raise _slower()
        if self.held + size > self._bytes:
            raise ServiceError(
                "the service is busy", status=503, error_code="ServerBusy", retry_after=1
            )
        self._of[group] = count, held + size
        self.held += size

    def end(self, group: str, size: int) -> None:
        """Forget a body, whole or not, of which *size* bytes were held."""
        count, held = self._of[group]
        self.held -= size
        if count == 1:
            del self._of[group]
        else:
            self._of[group] = count - 1, held - size


def _slower() -> ServiceError:
    return ServiceError(
        "too many unfinished requests", status=429, error_code="Throttled", retry_after=1
    )
