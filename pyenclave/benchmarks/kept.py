"""
Runs that were kept: reading what ``pyenclave bench --json`` wrote, and comparing two of them.

The file may come from anywhere: its shape is checked before anything is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from pyenclave.benchmarks.rows import Row
from pyenclave.errors import ArgumentError
from pyenclave.formats import jsonstrict

__all__ = ["MAX_SIZE", "Change", "Run", "compare", "read"]

MAX_SIZE: Final = 4 << 20  # bytes
_MAX_ROWS: Final = 1000
_MAX_TEXT: Final = 2000  # characters
_MAX_BITS: Final = 64  # protections of one launch
_MAX_BIT: Final = 40  # characters of the name of one
_MAX_LEVEL: Final = (1 << 31) - 1
_NUMBERS: Final = ("value", "peer_value", "ratio", "native", "cycles", "line")
_SPREADS: Final = ("spread", "peer_spread", "ratio_spread")
_TEXTS: Final = ("name", "unit", "peer", "cores", "note", "error")


class Run(NamedTuple):
    """One run of the benchmark."""

    machine: Mapping[str, Any]
    results: Sequence[Row]
    when: str = ""
    version: str = ""

    @property
    def wide(self) -> bool:
        """Whether it was on a machine of the class VAES-512."""
        kernels = self.machine.get("kernels")
        return isinstance(kernels, Mapping) and kernels.get("gcm") == "vaes512"


class Change(NamedTuple):
    """
    A row then and now.

    Attributes:
        name: The row.
        then: Its ratio; None: it was not there, or not measured.
        now: Likewise.
        factor: ``now / then``: above 1 is better than it was.
        moved: Whether the quartiles of then and now lie apart; None: one of them kept no spread.
    """

    name: str
    then: float | None
    now: float | None
    factor: float | None
    moved: bool | None


def _refuse(what: str, where: str, expected: str, found: object) -> ArgumentError:
    return ArgumentError(
        f"{where} is not a kept run: {what}",
        expected=expected,
        found=repr(found)[:80],
        advice="pyenclave bench --json writes one.",
    )


def _number(value: object, what: str, where: str) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]
        raise _refuse(what, where, "a number above 0", value)
    return float(value)  # type: ignore[arg-type]


def _text(value: object, what: str, where: str) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise _refuse(what, where, f"text of at most {_MAX_TEXT} characters", value)
    return value


def _bits(value: object, what: str, where: str) -> dict[str, bool | int]:
    if not isinstance(value, dict) or len(value) > _MAX_BITS:
        raise _refuse(what, where, f"an object of at most {_MAX_BITS} protections", value)
    for name, bit in value.items():
        if not name or len(name) > _MAX_BIT:
            raise _refuse(what, where, f"names of 1 to {_MAX_BIT} characters", name)
        if not isinstance(bit, int) or (bit is not False and not 1 <= bit <= _MAX_LEVEL):
            raise _refuse(what, where, "true, false or a level above 0", bit)
    return value


def _row(found: object, place: int, where: str) -> Row:
    what = f"row {place}"
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise _refuse(what, where, "an object with a name", found)
    row: Row = {}
    for key in _TEXTS:
        if key in found:
            row[key] = _text(found[key], f"{what}, {key}", where)
    for key in _NUMBERS:
        if found.get(key) is not None:
            row[key] = _number(found[key], f"{what}, {key}", where)
    for key in _SPREADS:
        if key in found:
            pair = found[key]
            if not isinstance(pair, list) or len(pair) != 2:
                raise _refuse(f"{what}, {key}", where, "two numbers", pair)
            low, high = (_number(value, f"{what}, {key}", where) for value in pair)
            if low > high:
                raise _refuse(f"{what}, {key}", where, "the lesser first", pair)
            row[key] = [low, high]
    if "absent" in found:
        absent = found["absent"]
        if not isinstance(absent, list) or len(absent) > 20:
            raise _refuse(f"{what}, absent", where, "a list of names", absent)
        row["absent"] = [_text(name, f"{what}, absent", where) for name in absent]
    if "bits" in found:
        row["bits"] = _bits(found["bits"], f"{what}, bits", where)
    missing = {"value", "unit", "peer", "peer_value"} - set(row)
    if "ratio" in row and missing:
        raise _refuse(what, where, "a value, its unit and its peer's", sorted(row))
    return row


def read(data: bytes, where: str = "the file") -> Run:
    """
    Read a run that ``pyenclave bench --json`` wrote.

    Args:
        data: The file's bytes.
        where: The file's name, for errors.

    Raises:
        ArgumentError: It is not such a file.
    """
    document = jsonstrict.object_of(data, where, ArgumentError, max_size=MAX_SIZE)
    results = document.get("results")
    if not isinstance(results, list) or len(results) > _MAX_ROWS:
        raise _refuse("results", where, f"a list of at most {_MAX_ROWS} rows", results)
    machine = document.get("machine", {})
    if not isinstance(machine, dict):
        raise _refuse("machine", where, "an object", machine)
    rows = [_row(found, place, where) for place, found in enumerate(results)]
    names = [row["name"] for row in rows]
    if len(set(names)) != len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise _refuse("results", where, "each row once", double)
    when, version = (_text(document.get(key, ""), key, where) for key in ("when", "version"))
    return Run(machine, rows, when, version)


def compare(then: Run, now: Run) -> list[Change]:
    """
    Compare the ratios of two runs, row by row.

    A row has moved if the middle half of its rounds then and the middle half now do not overlap.
    That is what the row itself can tell; two runs of the same code on a machine with neighbours
    differ more, now and then.

    Returns:
        The rows of *now* in their order, then those that are only in *then*.
    """
    before = {row["name"]: row for row in then.results}
    changes = []
    for row in now.results:
        changes.append(_change(row["name"], before.pop(row["name"], {}), row))
    return changes + [_change(name, row, {}) for name, row in before.items()]


def _change(name: str, then: Row, now: Row) -> Change:
    old, new = then.get("ratio"), now.get("ratio")
    if old is None or new is None:
        return Change(name, old, new, None, None)
    moved = None
    if "ratio_spread" in then and "ratio_spread" in now:
        (low, high), (least, most) = then["ratio_spread"], now["ratio_spread"]
        moved = high < least or most < low
    return Change(name, old, new, new / old, moved)
