"""
ISO 8601 durations, as far as rotation policies use them: ``P90D``, ``P1Y6M``, ``P2W``, ``PT48H``.

Years and months are calendar ones: a month after 31 January is the last day of February.
"""

from __future__ import annotations

import calendar
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Self

__all__ = ["Duration"]

_FORM: Final = re.compile(
    r"P(?=[0-9T])(?:(?P<years>[0-9]{1,4})Y)?(?:(?P<months>[0-9]{1,4})M)?(?:(?P<weeks>[0-9]{1,4})W)?"
    r"(?:(?P<days>[0-9]{1,5})D)?"
    r"(?:T(?=[0-9])(?:(?P<hours>[0-9]{1,6})H)?(?:(?P<minutes>[0-9]{1,7})M)?"
    r"(?:(?P<seconds>[0-9]{1,9})S)?)?",
    re.ASCII,
)
_LONGEST: Final = 100 * 366  # days
_ANCHOR: Final = datetime(2001, 1, 1, tzinfo=UTC)  # a year of 365 days


@dataclass(frozen=True, slots=True)
class Duration:
    """
    A length of time.

    Attributes:
        text: As it was written.
        months: Calendar months, years included.
        exact: The rest.
    """

    text: str
    months: int
    exact: timedelta

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        Read a duration.

        Raises:
            ValueError: Not of the form, zero, or longer than a hundred years.

        """
        match = _FORM.fullmatch(text) if len(text) <= 64 else None
        if match is None:
            raise ValueError("not an ISO 8601 duration such as P90D")
        number = {name: int(value or 0) for name, value in match.groupdict().items()}
        found = cls(
            text=text,
            months=number["years"] * 12 + number["months"],
            exact=timedelta(
                weeks=number["weeks"],
                days=number["days"],
                hours=number["hours"],
                minutes=number["minutes"],
                seconds=number["seconds"],
            ),
        )
        if not timedelta() < found.exact + timedelta(days=31 * found.months) or (
            found.months * 28 + found.exact.days > _LONGEST
        ):
            raise ValueError("a duration of zero, or of more than a hundred years")
        return found

    def after(self, moment: int) -> int:
        """Return the Unix time that is this much later than *moment*."""
        return self._moved(moment, 1)

    def before(self, moment: int) -> int:
        """Return the Unix time that is this much earlier than *moment*."""
        return self._moved(moment, -1)

    def at_least(self, days: int) -> bool:
        """Tell whether it is that long, in a year of 365 days."""
        start = int(_ANCHOR.timestamp())
        return self.after(start) - start >= days * 86400

    def longer_than(self, other: Duration) -> bool:
        """Tell whether it is longer than *other*, in a year of 365 days."""
        start = int(_ANCHOR.timestamp())
        return self.after(start) > other.after(start)

    def _moved(self, moment: int, sign: int) -> int:
        when = datetime.fromtimestamp(moment, UTC)
        count = when.year * 12 + when.month - 1 + sign * self.months
        year, month = divmod(count, 12)
        if not 1 <= year <= 9998:
            return 0 if sign < 0 else 253_402_300_799
        day = min(when.day, calendar.monthrange(year, month + 1)[1])
        try:
            moved = when.replace(year=year, month=month + 1, day=day) + sign * self.exact
        except OverflowError:
            return 0 if sign < 0 else 253_402_300_799
        return max(0, int(moved.timestamp()))
