"""A clock for tests of whatever takes a time: ``verify(at=…)``, policies, collateral."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

__all__ = ["Clock"]


class Clock:
    """
    A time that stands still until it is told to go.

    Nothing in the package reads a clock where a time matters: give ``clock.now()`` as ``at=``.

    Args:
        at: The first time, with a zone; None for now.

    Raises:
        ValueError: *at* has no zone.

    """

    def __init__(self, at: datetime | None = None) -> None:
        self._at = datetime.now(UTC).replace(microsecond=0)
        if at is not None:
            self.freeze(at)

    def now(self) -> datetime:
        """Return the time."""
        return self._at

    __call__ = now

    def freeze(self, at: datetime) -> datetime:
        """Set the time and return it."""
        if at.tzinfo is None:
            raise ValueError("a time without a zone is ambiguous")
        self._at = at
        return at

    def step(self, by: timedelta | None = None, **units: float) -> datetime:
        """Go on (or back) by a timedelta, or by its arguments (``days=30``); return the time."""
        if (by is None) == (not units):
            raise TypeError("either a timedelta or its arguments")
        self._at += timedelta(**units) if by is None else by
        return self._at

    def __repr__(self) -> str:
        return f"<Clock at {self._at.isoformat()}>"
