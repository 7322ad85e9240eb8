"""
What a row of the benchmark is, and the figures of its spread.

A row is a dictionary. Measured rows have ``name``, ``value``, ``unit``, ``peer``, ``peer_value``
and ``ratio``, which is above 1 where ours is better. Beside them there may be

- ``spread``, ``peer_spread``, ``ratio_spread``: first and third quartile over the rounds,
- ``native``: what the same costs in a loop in C, in the row's unit, and ``cycles``: core cycles of
  that, each where it was measured,
- ``cores``: ``near``, ``far`` or ``same``, for what crosses processors, and ``line``: how many ns a
  cache line took from one to the other and back,
- ``bits``: the protections that were probed for the last launch, by name: true, false or a level,
- ``note``: a sentence; ``absent``: peers that are not installed.

A row that could not be measured has ``name`` and ``error``, or ``name`` and ``absent``.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

__all__ = ["AbsentError", "Row", "figures", "quartiles", "scratch", "spread"]

Row = dict[str, Any]

_PATIENCE: Final = 5.0  # seconds for a platform to end


class AbsentError(Exception):
    """
    What a row needs is not on this machine.

    Args:
        names: What is missing, as people would install it.
    """

    def __init__(self, *names: str) -> None:
        super().__init__(", ".join(names))
        self.names = names


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the first and the third quartile of *values* (at least one)."""
    if len(values) < 2:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def spread(
    ours: Sequence[float], theirs: Sequence[float], *, scale: float = 1.0, more: bool = False
) -> Row:
    """
    Return the quartiles of a row whose rounds took turns.

    Args:
        ours: One figure of each round.
        theirs: The peer's.
        scale: What makes figures of the row's unit of them.
        more: More is better (a rate), not less (a time).

    Returns:
        ``spread``, ``peer_spread`` and ``ratio_spread``. The last pairs rounds that ran one after
        the other; where there are not as many of each, it pairs the median of theirs with ours.
    """
    if len(ours) == len(theirs):
        pairs = list(zip(ours, theirs, strict=True))
    else:
        middle = statistics.median(theirs)
        pairs = [(value, middle) for value in ours]
    return {
        "spread": [value * scale for value in quartiles(ours)],
        "peer_spread": [value * scale for value in quartiles(theirs)],
        "ratio_spread": quartiles([a / b if more else b / a for a, b in pairs]),
    }


def figures(
    name: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    peer: str,
    unit: str = "ns",
    more: bool = False,
    **rest: Any,
) -> Row:
    """
    Return a row of medians with their spread.

    Args:
        name: The row's name; what follows a slash names one of several peers or ways.
        ours: One figure of each round, in *unit*.
        theirs: The peer's, in *unit*.
        peer: What it is compared with.
        unit: Of both.
        more: More is better (a rate), not less (a time).
        rest: Other members.
    """
    value, peer_value = statistics.median(ours), statistics.median(theirs)
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "peer": peer,
        "peer_value": peer_value,
        "ratio": value / peer_value if more else peer_value / value,
        **spread(ours, theirs, more=more),
        **rest,
    }


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder for an enclave's state; it goes when the platform wrote its last file there."""
    folder = Path(tempfile.mkdtemp(prefix="pyenclave-bench-"))
    try:
        yield folder
    finally:
        end = time.monotonic() + _PATIENCE
        while folder.exists():
            late = time.monotonic() > end
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)
            if late:
                break
            time.sleep(0.02)
