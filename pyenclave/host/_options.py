"""Settings of calls: one immutable value for handles of every form."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

__all__ = ["NO_OPTIONS", "Options"]

_CORRELATION = re.compile(r"[A-Za-z0-9._:-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """
    How calls are made.

    Attributes:
        timeout: Seconds until a call raises CallTimeoutError, waiting for a thread of the enclave
            included; None: no deadline. The function inside is not stopped.
        kill_after: Seconds that a call whose caller stopped waiting (deadline, cancellation,
            interruption) may still run; then the worker is ended and the handle raises
            EnclaveLostError. None: as long as it likes.
        correlation: Id under which the host's records, EcallError.id and, of a debug enclave, its
            log name the calls: 1 to 64 letters, digits or ``._:-``, such as a request's id. A
            production enclave does not look at it. None: an id of each error's own.

    Raises:
        TypeError: A value is of a wrong type.
        ValueError: *timeout* is not above 0, *kill_after* is below, or *correlation* has other
            characters.

    """

    timeout: float | None = None
    kill_after: float | None = None
    correlation: str | None = None

    def __post_init__(self) -> None:
        if self.correlation is not None:
            if not isinstance(self.correlation, str):
                raise TypeError(f"a correlation id is a string, not {self.correlation!r}")
            if _CORRELATION.fullmatch(self.correlation) is None:
                raise ValueError(
                    "a correlation id is 1 to 64 letters, digits or ._:- , "
                    f"not {self.correlation[:80]!r}"
                )
        _check("timeout", self.timeout, zero=False)
        _check("kill_after", self.kill_after, zero=True)

    @property
    def seconds(self) -> float:
        """The timeout as the core takes it: below 0 for none."""
        return -1.0 if self.timeout is None else float(self.timeout)

    @property
    def grace(self) -> float:
        """``kill_after`` as the core takes it: below 0 for none."""
        return -1.0 if self.kill_after is None else float(self.kill_after)


def _check(name: str, value: float | None, *, zero: bool) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is a number of seconds, not {value!r}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} must be {'at least' if zero else 'above'} 0 seconds: {value!r}")


NO_OPTIONS = Options()
